"""Tests run on a CPU with what they build themselves: tiny random Llamas, a handful of places.

`make test` runs `--part drawn`: of each test function that is marked `bulk` (nearly alike cases) a tenth of its cases,
at least one, and nothing that is marked `slow`. `--part rest` is what that leaves out; without the option all run. What
is drawn depends on the commit; GA_LLM_DRAW, which the first line tells, repeats another's draw.
"""
import datetime
import fcntl
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # spinning threads of two processes stop each other
os.environ.setdefault("OMP_NUM_THREADS", "1")       # tiny models are no faster with more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

import forked  # noqa: E402
from commands import CODE, ROOT, run, stage_2  # noqa: E402
from make_tiny_llama import make_tiny_llama, sample_prompts  # noqa: E402

PLACES = 12


# The two parts.

def pytest_addoption(parser):
    parser.addoption("--part", choices=("all", "drawn", "rest"), default="all", help="see tests/conftest.py")


def pytest_configure(config):
    """The processes of pytest-xdist, which start later, inherit the draw."""
    commit = shutil.which("git") and subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], text=True,
                                                    capture_output=True).stdout.strip()
    os.environ.setdefault("GA_LLM_DRAW", commit or str(datetime.date.today()))


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    """Where pytest's header would stand, which -q leaves out."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and session.config.getoption("part") != "all":
        terminal.write_line(f"--part {session.config.getoption('part')}, GA_LLM_DRAW={os.environ['GA_LLM_DRAW']}")


@pytest.hookimpl(trylast=True)      # -m and -k come first
def pytest_collection_modifyitems(config, items):
    part = config.getoption("part")
    if part != "all":
        drawn = draw(items)
        config.hook.pytest_deselected(items=[item for item in items if (item in drawn) != (part == "drawn")])
        items[:] = [item for item in items if (item in drawn) == (part == "drawn")]
    # While one process makes `repo`, the other has what does without. tests/scripts come last, for they evaluate in it.
    need = {item.path for item in items if "repo" in item.fixturenames}
    first = min(need, default=None)
    items.sort(key=lambda item: item.path)
    items.sort(key=lambda item: (item.path in need) - 2 * (item.path == first))


def draw(items) -> set:
    """Those that `make test` runs."""
    cases, drawn = {}, set()
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        if item.get_closest_marker("bulk"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        else:
            drawn.add(item)
    for function, alike in cases.items():
        chance = random.Random(f"{os.environ['GA_LLM_DRAW']} {function}")
        drawn.update(chance.sample(alike, math.ceil(len(alike) / 10)))
    return drawn


# Fixtures.

@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folders of tiny random Llamas, made once a session: tiny_llama("llama3"), tiny_llama("sentencepiece", …)."""
    made = {}

    def make(style="llama3", **options):
        key = (style, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("llama") / style
            make_tiny_llama(folder, style=style, **{"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2,
                                                    "corpus": sample_prompts(0, count=50), **options})
            made[key] = folder
        return str(made[key])

    return make


@pytest.fixture
def mapping_csv(tmp_path):
    """A GPS mapping whose ids start at 1, miss one, and stand out of order: position is not id."""
    random = np.random.default_rng(0)
    ids = [i for i in range(1, PLACES + 2) if i != 4]
    random.shuffle(ids)
    rows = [f"{i},{40 + i / 100:.6f},{-74 + i / 50:.6f}" for i in ids]
    path = tmp_path / "gps_mapping.csv"
    path.write_text("GPS_id,Latitude,Longitude\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that make(folder) fills. Processes of pytest-xdist make one, and take a copy each."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def copy(name, make) -> Path:
        made, unfinished = common / f"{name}.made", common / f"{name}.unfinished"
        with open(common / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(made)
        return Path(shutil.copytree(made, tmp_path_factory.mktemp(name) / name, symlinks=True))

    return copy


@pytest.fixture(scope="session")
def repo(once):
    """A copy of the code, then every step up to a trained stage 2."""
    return once("repo", make_repo)


def make_repo(repo):
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, repo / name, **({"ignore": shutil.ignore_patterns("data", "__pycache__")}
                                          if copy is shutil.copytree else {}))
    for command in (["data-preprocess/make_sample_raw.py", "-users", "30", "-days", "60"],
                    ["data-preprocess/run.py", "-f", "best_conf/sample.yml"],
                    ["data-preprocess/traj_qk.py", "-dataset_name", "sample"],
                    ["data-preprocess/process_projector_gps_stage1.py", "-dataset_name", "sample", "-use_sim", "False",
                     "-max_history", "10"],
                    ["data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-use_sim", "False",
                     "-max_history", "10"]):
        run(repo, sys.executable, *command)
    make_tiny_llama(repo / "models/tiny", hidden=32, kv_heads=2)
    forked.train(repo, 1, "outputs/gcim")
    stage_2(repo, "outputs/llm")


@pytest.fixture
def no_pictures(monkeypatch):
    """Of a report: they take most of the time, and are tried in tests/scripts/test_report_script.py."""
    from ga_llm.report import figures
    for name in ("intervals", "reliability", "error_map", "distance_shares", "example", "colour_map", "distances",
                 "losses"):
        monkeypatch.setattr(figures, name, lambda *arguments: b"")
