"""Tests run on a CPU with what they build themselves: tiny random Llamas, a handful of places."""
import os
import shutil
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # spinning threads of two processes stop each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from commands import CODE, ROOT, run, stage_1, stage_2  # noqa: E402
from make_tiny_llama import make_tiny_llama  # noqa: E402

PLACES = 12


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folders of tiny random Llamas, made once a session: tiny_llama("llama3"), tiny_llama("sentencepiece", …)."""
    made = {}

    def make(style="llama3", **options):
        key = (style, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("llama") / style
            make_tiny_llama(folder, style=style, **{"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, **options})
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
def repo(tmp_path_factory):
    """A copy of the code, then every step up to a trained stage 2."""
    repo = tmp_path_factory.mktemp("repo")
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, repo / name, **({"ignore": shutil.ignore_patterns("data", "__pycache__")}
                                          if copy is shutil.copytree else {}))
    for command in (["data-preprocess/make_sample_raw.py", "-users", "30", "-days", "60"],
                    ["data-preprocess/run.py", "-f", "best_conf/sample.yml"],
                    ["data-preprocess/traj_qk.py", "-dataset_name", "sample"],
                    ["data-preprocess/process_projector_gps_stage1.py", "-dataset_name", "sample", "-use_sim", "False"],
                    ["data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-use_sim", "False",
                     "-max_history", "10"],
                    ["tools/make_tiny_llama.py", "--output_dir", "models/tiny", "--hidden", "32", "--kv_heads", "2"]):
        run(repo, sys.executable, *command)
    stage_1(repo, "outputs/gcim")
    stage_2(repo, "outputs/llm")
    return repo
