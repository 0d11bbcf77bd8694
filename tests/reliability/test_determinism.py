"""The same command gives the same bytes: whatever the hash seed, locale, time zone, umask, threads, order of folders.

Variants change the environment of a fresh copy of the repository, at another path each; what they write is compared
with the plain run's.
"""
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import evaluation, stage_1, stage_2
from harness import ROOT, call, snapshot

from ga_llm.base.artifacts import FINAL_ENCODER, METRICS, PREDICTIONS, TRAINABLE_PARAMS

PLAINLY = "as it is"
PLAIN = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC", "OMP_NUM_THREADS": "1"}
NOT_UTF_8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# What sitecustomize.py does when Python starts: folders are listed from z to a.
REVERSED = """
import os
listdir, scandir = os.listdir, os.scandir

class Reversed(list):
    def __iter__(self):
        return self
    def __next__(self):
        if not self:
            raise StopIteration
        return self.pop()
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def close(self):
        pass

def reversed_scandir(path="."):
    with scandir(path) as entries:
        return Reversed(sorted(entries, key=lambda entry: entry.name))

os.scandir = reversed_scandir
os.listdir = lambda path=".": sorted(listdir(path), reverse=True)
"""
# name: (environment, umask, name of the folder, whether paths are given from "/")
VARIANTS = {
    "again": ({}, 0o022, "copy", False),
    "hash seed 1": ({"PYTHONHASHSEED": "1"}, 0o022, "copy", False),
    "a random hash seed": ({"PYTHONHASHSEED": "random"}, 0o022, "copy", False),
    "no UTF-8": (NOT_UTF_8, 0o022, "copy", False),
    "Tokyo": ({"TZ": "Asia/Tokyo"}, 0o022, "copy", False),
    "New York": ({"TZ": "America/New_York"}, 0o022, "copy", False),
    "umask": ({}, 0o077, "copy", False),
    "threads": ({"OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "2"}, 0o022, "copy", False),
    "another place": ({}, 0o022, "a café's 東京", False),
    "absolute paths": ({}, 0o022, "a café's 東京", True),
    "folders reversed": ({"PYTHONPATH": "reversed"}, 0o022, "copy", False),
}
TOGETHER = {
    "hash seed 1, no UTF-8, Tokyo, umask, threads, folders reversed":
        ({**NOT_UTF_8, "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "2", "PYTHONPATH": "reversed"},
         0o077, "a café's 東京", False),
    "a random hash seed, New York, absolute paths":
        ({"PYTHONHASHSEED": "random", "TZ": "America/New_York"}, 0o002, "a café's 東京", True),
}
# The whole chain in one process, so that a variant costs seconds.
START = """
import json, runpy, sys
from pathlib import Path
base = Path.cwd() if sys.argv[1] == "absolute" else Path()
sys.path[:0] = ["data-preprocess"]

def run(script, *arguments):
    sys.argv = [script, *map(str, arguments)]
    runpy.run_path(script, run_name="__main__")
"""
DATA_SETS = """
for form, name, users in (("tky", "sample", 30), ("nyc", "nyc", 30), ("ca", "ca", 80)):
    run("data-preprocess/make_sample_raw.py", "-format", form, "-users", users, "-days", 60, "-out",
        base / "data-preprocess/data" / name / "raw")
run("data-preprocess/generate_ca_raw.py")
for name in ("sample", "nyc", "ca"):
    run("data-preprocess/run.py", "-f", base / f"best_conf/{name}.yml")
    run("data-preprocess/traj_qk.py", "-dataset_name", name)
    for split in ("train", "test"):
        folder = Path("datasets") / name / "preprocessed"
        ids, listed = (sorted(pair["trajectory_id"] for pair in json.loads((folder / f"{of}_kq_pairs.json").read_text(
            encoding="utf-8"))) for of in (split, "train"))
        (folder / f"{split}_key_top200.json").write_text(json.dumps({str(i): listed[-i % 7::3] for i in ids}))
    run("data-preprocess/poi_embeddings.py", "-dataset_name", name, "-category_neighbours", 3)
    run("data-preprocess/process_pam_stage1.py", "-dataset_name", name)
    for use_sim in (False, True):
        run("data-preprocess/process_projector_gps_stage1.py", "-dataset_name", name, "-use_sim", use_sim)
        run("data-preprocess/process_llm_gps.py", "-dataset_name", name, "-use_sim", use_sim)
"""
MODELS = """
run("tools/baselines.py", "-dataset_name", "nyc", "-data_path", base / "datasets")
for style in ("llama3", "sentencepiece"):
    run("tools/make_tiny_llama.py", "--output_dir", base / "models" / style, "--style", style, "--hidden", 16)
from ga_llm.llm import backbone
from ga_llm.pairs import token_cache
from geo_encoder import gps_tokens
for style in ("llama3", "sentencepiece"):
    tokenizer = backbone.load_tokenizer(str(base / "models" / style))
    folder = base / "datasets/ca/preprocessed"
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(folder / "ca_gps_mapping.csv"))
    for path in sorted(set(folder.glob("train_qa_pairs*_without_*.json")) - set(folder.glob("*.settings.json"))):
        token_cache.load(path, tokenizer, 500, "mapping")
"""


def copy_of_the_code(folder: Path) -> Path:
    folder.mkdir()
    for name in ("best_conf", "data-preprocess", "ga_llm", "geo_encoder", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    return folder


def run_chain(copy: Path, part: str, environment: dict, umask: int = 0o022, absolute: bool = False
              ) -> tuple[list[bytes], dict[str, dict[str, str]]]:
    """What a part of the chain prints, and a snapshot of all that is in the copy of the code afterwards."""
    result = subprocess.run([sys.executable, "-c", START + part, "absolute" if absolute else "relative"], cwd=copy,
                            umask=umask, env=environment, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-3000:]
    printed = result.stdout.replace(b"\\u2013", "\u2013".encode())      # how the other locale spells a dash
    return ([line for line in printed.splitlines() if not line.startswith(b"[20")],      # DeepSpeed's, with the time
            {part: snapshot(copy / part) for part in ("data-preprocess/data", "datasets", "models")})


def environment_of(folder: Path, changes: dict) -> dict:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **PLAIN, **changes}
    if changes.get("PYTHONPATH"):
        (folder / changes["PYTHONPATH"]).mkdir()
        (folder / changes["PYTHONPATH"] / "sitecustomize.py").write_text(REVERSED)
        environment["PYTHONPATH"] = str(folder / changes["PYTHONPATH"])
    return environment


@pytest.fixture(scope="module")
def left_by(tmp_path_factory):
    """left_by(variant, part): what that part of the chain prints and leaves there; a chain runs once."""
    pytest.importorskip("shapely")     # of the data set ca
    places, made = {}, {}

    def run(variant, part):
        changes, umask, name, absolute = {**TOGETHER, **VARIANTS, PLAINLY: ({}, 0o022, "plain", False)}[variant]
        if variant not in places:
            folder = tmp_path_factory.mktemp("variant")
            places[variant] = copy_of_the_code(folder / name), environment_of(folder, changes)
        for each in (DATA_SETS, MODELS)[:1 if part == DATA_SETS else 2]:
            if (variant, each) not in made:
                copy, environment = places[variant]
                made[variant, each] = run_chain(copy, each, environment, umask, absolute)
        return made[variant, part]
    return run


FIRST, SECOND = TOGETHER
ALONE = [pytest.param(name, marks=pytest.mark.soak) for name in VARIANTS]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [FIRST, SECOND, *ALONE])
def test_data_is_the_same_bytes(left_by, variant):
    printed, files = left_by(variant, DATA_SETS)
    assert (printed, files) == left_by(PLAINLY, DATA_SETS)
    assert len(files["data-preprocess/data"]) > 8 and len(files["datasets"]) > 40 and printed


@pytest.mark.slow
@pytest.mark.parametrize("variant", [FIRST, pytest.param(SECOND, marks=pytest.mark.soak), *ALONE])
def test_models_and_tokens_are_the_same_bytes(left_by, variant):
    """Random weights, tokenizers of both styles, the tokens of both stages; and the baselines' table."""
    printed, files = left_by(variant, MODELS)
    assert (printed, files) == left_by(PLAINLY, MODELS)
    assert sum(name.endswith("ids.bin") for name in files["datasets"]) == 4 and len(files["models"]) > 8
    assert any(b"user-history frequency" in line for line in printed)


def test_folders_are_really_listed_backwards(tmp_path):
    """The check of the check: sitecustomize.py is read, and pathlib and glob follow it."""
    for name in "abc":
        (tmp_path / "in" / name).mkdir(parents=True)
    code = ("import glob, os, pathlib; print(os.listdir('in'), glob.glob('*', root_dir='in'), "
            "[p.name for p in pathlib.Path('in').glob('*')], [p.name for p in pathlib.Path('in').rglob('*')])")
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                             env=environment_of(tmp_path, {"PYTHONPATH": "reversed"})).stdout
    assert printed.split() == "['c', 'b', 'a'] ['c', 'b', 'a'] ['c', 'b', 'a'] ['c', 'b', 'a']".split()


def test_order_of_the_raw_rows_does_not_matter_where_times_differ(tmp_path):
    """The same samples and questions from a shuffled file, in TKY's format and as a CSV of one's own."""
    plain, shuffled = tmp_path / "plain", tmp_path / "shuffled"
    for root in (plain, shuffled):
        root.mkdir()
        shutil.copytree(ROOT / "best_conf", root / "best_conf")
    assert call(plain, "data-preprocess/make_sample_raw.py", "-users", 30, "-days", 60).code == 0
    folder = Path("data-preprocess/data/sample/raw")
    path = folder / "dataset_TSMC2014_SAMPLE.txt"
    lines = {line.split("\t")[-1]: line for line in (plain / path).read_text(encoding="latin-1").splitlines()}
    lines = list(lines.values())        # one for each second
    table = pd.DataFrame([line.split("\t") for line in lines])
    table[7] = pd.to_datetime(table[7], format="%a %b %d %H:%M:%S +0000 %Y")
    table.columns = ["user", "poi", "_", "category", "lat", "lon", "offset", "time"]
    settings = (ROOT / "best_conf/sample.yml").read_text(encoding="utf-8")
    settings = settings.replace("dataset_name: sample", "dataset_name: mine").replace(
        "format: tsmc2014",
        "format: csv\ncolumns: {user: user, poi: poi, category: category, lat: lat, lon: lon, time: time}")
    for seed, root in enumerate((plain, shuffled)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        order = list(range(len(lines)))
        if seed:
            random.Random(seed).shuffle(order)
        (root / path).write_text("\n".join(lines[i] for i in order) + "\n", encoding="latin-1")
        table.iloc[order].to_csv(root / folder / "mine.csv", index=False)
        (root / "best_conf/mine.yml").write_text(settings.replace(path.name, "mine.csv"), encoding="utf-8")
        for name in ("sample", "mine"):
            for script, *flags in (("run.py", "-f", f"best_conf/{name}.yml"), ("traj_qk.py", "-dataset_name", name),
                                   ("process_llm_gps.py", "-dataset_name", name),
                                   ("poi_embeddings.py", "-dataset_name", name),
                                   ("process_pam_stage1.py", "-dataset_name", name),
                                   ("process_projector_gps_stage1.py", "-dataset_name", name)):
                result = call(root, f"data-preprocess/{script}", *flags)
                assert result.code == 0, result.err
    assert len(lines) > 1500 and (plain / path).read_bytes() != (shuffled / path).read_bytes()
    assert snapshot(plain / "datasets") == snapshot(shuffled / "datasets") != {}


@pytest.fixture(scope="module")
def copies(repo, tmp_path_factory):
    """The repository with its data and model, but nothing trained, at two places."""
    made = []
    for name in ("plain", "a café's 東京"):
        made.append(tmp_path_factory.mktemp("copies") / name)
        shutil.copytree(repo, made[-1], ignore=shutil.ignore_patterns("outputs", "tokens-*", "__pycache__"))
    return made


@pytest.mark.soak
def test_trained_weights_and_metrics(copies, tmp_path, monkeypatch):
    """Both stages and the evaluation, each in processes of their own: weights, losses and predictions to the bit."""
    environment, umask, _, _ = TOGETHER["hash seed 1, no UTF-8, Tokyo, umask, threads, folders reversed"]
    results = []
    for copy, changes, mask in zip(copies, ({}, environment), (0o022, umask)):
        with monkeypatch.context() as patch:
            for name, value in {**environment_of(tmp_path, changes), "OMP_NUM_THREADS": "1"}.items():
                patch.setenv(name, value)
            before = os.umask(mask)
            try:
                stage_1(copy, "outputs/gcim")
                stage_2(copy, "outputs/llm")
                done = subprocess.run([sys.executable, *evaluation("outputs/llm/checkpoint-6")], cwd=copy,
                                      capture_output=True, timeout=600)
            finally:
                os.umask(before)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        results.append(trained(copy / "outputs") | evaluated(copy / "outputs/llm/checkpoint-6"))
    plain, other = results
    assert plain == other


def trained(outputs: Path) -> dict:
    """The weights that both stages leave, as bytes, and their losses."""
    encoder = torch.load(outputs / "gcim" / FINAL_ENCODER, weights_only=True)
    last = outputs / "llm/checkpoint-6"
    logged = {folder.name: json.loads((folder / "checkpoint-6/trainer_state.json").read_text())["log_history"]
              for folder in (outputs / "gcim", outputs / "llm")}
    return {**{name: tensor.numpy().tobytes() for name, tensor in encoder.items()},
            **{name: (last / name).read_bytes() for name in ("adapter_model.safetensors", TRAINABLE_PARAMS)},
            **{name: [line.get("loss") for line in lines] for name, lines in logged.items()}}


def evaluated(checkpoint: Path) -> dict:
    metrics = json.loads((checkpoint / METRICS).read_text(encoding="utf-8"))
    assert metrics.pop("prompts_per_second") > 0
    return {"metrics": metrics, "predictions": (checkpoint / PREDICTIONS).read_bytes()}


def test_one_evaluation_after_another(repo, tmp_path):
    """The same metrics and predictions from a start anew, in this process."""
    results = []
    for name in ("one", "other"):
        shutil.copytree(repo / "outputs/llm/checkpoint-6", repo / f"outputs/{tmp_path.name}_{name}/checkpoint-6",
                        ignore=shutil.ignore_patterns("*.pt", "global_step*", METRICS, PREDICTIONS))
        done = call(repo, *evaluation(f"outputs/{tmp_path.name}_{name}/checkpoint-6", "--limit", "6"))
        assert done.code == 0, done.err
        results.append(evaluated_anywhere(repo / f"outputs/{tmp_path.name}_{name}"))
    assert results[0] == results[1]


def evaluated_anywhere(folder: Path) -> dict:
    path, = folder.rglob(METRICS)
    found = evaluated(path.parent)
    for where in ("settings", "command"):       # they name the folder
        found["metrics"].pop(where)
    return found
