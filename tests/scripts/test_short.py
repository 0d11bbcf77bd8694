"""--output_dir alone: a checkpoint remembers the rest, flags override it, and what is gone is told in one line."""
import json
import re
import shutil

import forked
import pytest
from commands import MAPPING, PAIRS, evaluation
from harness import call, refusal, snapshot
from strangers import copy, edit_json
from test_export import CHECKPOINT, EXPORT, GEO

from ga_llm.base import artifacts, writing
from ga_llm.evaluation import trained
from ga_llm.training.checkpoints import AGREEMENT

VARYING = ("settings", "command", "date", "prompts_per_second")     # of metrics.json
PATHS = {"model_name_or_path": "models/tiny", "data_path": PAIRS[2], "gps_mapping_path": MAPPING,
         "geoencoder_path": GEO}


def run(repo, script, folder, *flags):
    """A short command."""
    return run_full(repo, script, "--output_dir", folder, *flags)


def run_full(repo, *command):
    try:
        return call(repo, *command)
    finally:
        writing._held.close()       # as the end of a process does


def results(folder):
    """(predictions, metrics) that an evaluation has left in `folder`."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return (folder / "predictions.jsonl").read_text(), {key: metrics[key] for key in metrics if key not in VARYING}


def remembering(**changes):
    """A change of a checkpoint: paths that it remembers are others, or with None forgotten."""
    return edit_json(AGREEMENT, paths={key: path for key, path in {**PATHS, **changes}.items() if path is not None})


def test_what_a_checkpoint_remembers(repo):
    agreement = json.loads((repo / CHECKPOINT / AGREEMENT).read_text())
    assert agreement["paths"] == PATHS and str(repo) not in json.dumps(agreement)


def test_evaluation_and_report(repo, tmp_path):
    """The same figures, page and pictures as with all flags."""
    found = []
    for name, command in (("full", evaluation),
                          ("short", lambda folder: ["test_next_gps.py", "--output_dir", folder])):
        folder = copy(repo / CHECKPOINT, tmp_path / name)
        result = run_full(repo, *command(folder))
        assert result.code == 0, result.err
        told = run(repo, "report.py", folder)
        assert told.code == 0, told.err
        pictures = {path.name: path.read_bytes() for path in (folder / "report").glob("*.png")}
        page = (folder / "report/report.html").read_text()
        found.append((results(folder), pictures, re.findall('class="absent">.*', page)))
    assert found[0] == found[1] and len(found[0][1]) > 5
    settings = json.loads((folder / "metrics.json").read_text())["settings"]
    assert [settings[name] for name in ("base_model", "dataset_name", "data_path", "context_size", "seq_len")] == [
        "models/tiny", "sample", "datasets", "4096", "4096"]


def test_export(repo, tmp_path):
    """The same files as with all flags, in which no path of this machine stands."""
    for name, command in (("full", EXPORT), ("short", ["export.py", "--output_dir", CHECKPOINT])):
        result = call(repo, *command, "--export_dir", tmp_path / name / "exported")
        assert result.code == 0, result.err
    full, short = (tmp_path / name / "exported" for name in ("full", "short"))
    assert snapshot(full) == snapshot(short) and (short / "README.md").exists()
    card = (short / "README.md").read_text()
    assert "recommend.py --model exported " in card and not re.search(r"(^|[\s\"'`=(])/\w", card, re.M)


def test_all_of_a_model(repo, tmp_path):
    """A full checkpoint needs no other base, so that one which is gone is not missed."""
    if not (repo / "outputs/full_model").exists():
        forked.train(repo, 2, "outputs/full_model", "--low_rank_training", "False", "--max_steps", "2")
    found = []
    for name, change in (("full", lambda folder: None), ("short", lambda folder: None),
                         ("gone", remembering(model_name_or_path="models/gone")),
                         ("old", edit_json(AGREEMENT, paths=None))):
        folder = copy(repo / "outputs/full_model/checkpoint-2", tmp_path / name, change)
        command = evaluation(folder) if name in ("full", "old") else ["test_next_gps.py", "--output_dir", folder]
        result = run_full(repo, *command, "--limit", "4")
        assert result.code == 0, result.err
        found.append(results(folder / "limit4"))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("flags, names", [
    (["--geoencoder_path", "outputs/gcim/4/geo_encoder_merged.pth"], [AGREEMENT, "other weights of GCIM's"]),
    (["--geoencoder_path", ""], [AGREEMENT, "trained with GCIM"]),
    (["--context_size", "64000"], [AGREEMENT, "give --context_size 4096"]),
    (["--base_model", "./models/nowhere"], ["./models/nowhere"]), (["--output_dir", "O/nope"], ["O/nope", "not found"]),
    (["--gps_mapping_path", "nowhere.csv"], ["nowhere.csv", "not found"]),
    (["--data_path", "nowhere"], ["nowhere/sample/preprocessed/", "not found"]),
    (["--dataset_name", "atlantis"], ["atlantis"]), (["--dataset_name", ""], ["--dataset_name is required"])],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "")
@pytest.mark.parametrize("script", ["test_next_gps.py", "export.py"])
def test_flags_override_and_are_checked(repo, tmp_path, script, flags, names):
    more = ["--export_dir", tmp_path / "refused"] if script == "export.py" else ["--limit", "4"]
    refusal(run(repo, script, copy(repo / CHECKPOINT, tmp_path / "C"), *more, *flags), *names)


@pytest.mark.parametrize("given", ["", "checkpoint-268"])
def test_a_checkpoint_that_is_there_is_named(repo, tmp_path, given):
    """For whoever gives the training's folder, or a number from another data set."""
    last = copy(repo / CHECKPOINT, tmp_path / "outputs" / "checkpoint-12")
    copy(repo / CHECKPOINT, tmp_path / "outputs" / "checkpoint-9")
    refusal(run(repo, "test_next_gps.py", tmp_path / "outputs" / given), f"such as {last}")


GONE = {
    "a base": (remembering(model_name_or_path="models/gone"), ["'models/gone'", "not there; give --base_model"]),
    "an encoder": (remembering(geoencoder_path="gone.pth"), ["'gone.pth'", "not there; give --geoencoder_path"]),
    "a folder for it": (remembering(geoencoder_path="outputs"), ["'outputs'", "give --geoencoder_path"]),
    "a data set": (remembering(gps_mapping_path="gone/town/preprocessed/town_gps_mapping.csv"),
                   ["'gone/town/preprocessed/town_gps_mapping.csv'", "not there; give --data_path"]),
    "a mapping elsewhere": (remembering(gps_mapping_path="G.csv"), ["--dataset_name is required"]),
    "the name of a data set that is none": (
        remembering(gps_mapping_path="datasets/../x/preprocessed/.._gps_mapping.csv"), ["--dataset_name is required"]),
    "no path": (edit_json(AGREEMENT, paths=None), ["--base_model is required"]),
    "no agreement": (lambda folder: (folder / AGREEMENT).unlink(), ["--base_model is required"]),
    "no base": (remembering(model_name_or_path=None), ["--base_model is required"]),
    "what no path can be": (remembering(geoencoder_path="a\0b"), ["not there; give --geoencoder_path"]),
    "what cannot be written": (remembering(geoencoder_path="\ud800"), ["not there; give --geoencoder_path"]),
    "too long a name": (remembering(geoencoder_path="x" * 9999), ["not there; give --geoencoder_path"]),
    "a device": (remembering(geoencoder_path="/dev/zero"), ["not there; give --geoencoder_path"]),
    "orders to a terminal": (remembering(model_name_or_path="\x1b[2J"), [r"'\x1b[2J'", "give --base_model"]),
    "half of PAM": (remembering(projector_path=GEO), ["--projector_path", "--poi_embedding_path"]),
    "PAM's files": (remembering(projector_path="p.pth", poi_embedding_path="e.npy"), ["'p.pth'", "--projector_path"])}


@pytest.mark.parametrize("change, names", GONE.values(), ids=GONE)
def test_what_is_gone(repo, tmp_path, change, names):
    folder = copy(repo / CHECKPOINT, tmp_path / "C", change)
    line = refusal(run(repo, "test_next_gps.py", folder), *names)
    assert len(line) < 600 and refusal(run(repo, "export.py", folder, "--export_dir", tmp_path / "E"), *names) == (
        line.replace("test_next_gps.py", "export.py"))
    assert not (tmp_path / "E").exists()


def test_what_is_gone_and_given(repo, tmp_path):
    """The flag that the error names is enough; as is an old checkpoint with all flags."""
    mapping = "sample/preprocessed/sample_gps_mapping.csv"
    shutil.copy(repo / MAPPING, tmp_path / "G.csv")
    shutil.copytree(repo / "datasets", tmp_path / "moved")
    whole = copy(repo / CHECKPOINT, tmp_path / "whole")
    assert run(repo, "test_next_gps.py", whole, "--limit", "4").code == 0
    for i, (change, flags) in enumerate([
            (remembering(model_name_or_path="models/gone"), ["--model_path", "models/tiny"]),
            (remembering(geoencoder_path="gone.pth"), ["--geoencoder_path", GEO]),
            (remembering(gps_mapping_path=f"gone/{mapping}"), ["--data_path", tmp_path / "moved"]),
            (remembering(gps_mapping_path=f"gone/{mapping}"), ["--dataset_name", "sample"]),
            (remembering(gps_mapping_path=str(tmp_path / "G.csv")), ["--dataset_name", "sample"]),
            (remembering(gps_mapping_path=str(tmp_path / "moved" / mapping)), []),
            (remembering(gps_mapping_path=None), ["--gps_mapping_path", MAPPING]),
            (remembering(model_name_or_path="models/gone", geoencoder_path="gone.pth", gps_mapping_path="gone.csv"),
             evaluation("C")[1:]),
            (edit_json(AGREEMENT, paths=None), evaluation("C")[1:])]):
        folder = copy(repo / CHECKPOINT, tmp_path / f"C{i}", change)
        result = run_full(repo, "test_next_gps.py", *flags, "--output_dir", folder, "--limit", "4")
        assert result.code == 0, result.err
        assert results(folder / "limit4") == results(whole / "limit4")


@pytest.mark.parametrize("questions, kind", [
    ({"use_sim": False, "fields": ["poi", "gps"]}, (False, False)), ({"fields": ["poi_token"]}, (False, True)),
    ({"use_sim": True, "fields": []}, (True, False)), ({"use_sim": "yes", "fields": 7}, (False, False))])
def test_the_kind_of_questions(questions, kind):
    """Those of an earlier version's checkpoint are the same as ever."""
    assert trained.question_kind({"questions": questions, "paths": {}}) == kind
    assert trained.question_kind({"questions": questions}) == trained.question_kind({"paths": {}}) == (False, False)


@pytest.mark.parametrize("path, expected", [
    ("datasets/nyc/preprocessed/nyc_gps_mapping.csv", ("nyc", "datasets")),
    ("/a b/nyc/preprocessed/nyc_gps_mapping.csv", ("nyc", "/a b")),
    ("nyc/preprocessed/nyc_gps_mapping.csv", ("nyc", ".")), ("preprocessed/nyc_gps_mapping.csv", None),
    ("datasets/nyc/preprocessed/tky_gps_mapping.csv", None), ("datasets/nyc/raw/nyc_gps_mapping.csv", None),
    ("datasets/../preprocessed/.._gps_mapping.csv", None), ("G.csv", None), ("", None), ("\0", None)])
def test_the_data_set_of_a_mapping(path, expected):
    found = artifacts.dataset_of(path)
    assert found == expected if expected is None else (found[0], str(found[1])) == expected
