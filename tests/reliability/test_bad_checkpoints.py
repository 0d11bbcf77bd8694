"""Checkpoints that are incomplete, broken or of another run: one line that names the file, and nothing is damaged."""
import json
import os
import shutil

import forked
import pytest
import torch
from commands import stage
from harness import refusal, snapshot
from make_tiny_llama import make_tiny_llama
from safetensors.torch import load_file, save_file
from strangers import (ADAPTER, CONFIG, TRAINED, both, copy, cut, edit_json, edit_tensors, evaluate, predictions,
                       remove, resume, write, zipped)

from ga_llm.training.checkpoints import AGREEMENT, CONVERTED

pytestmark = pytest.mark.bulk
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
INDEX = f"{CONVERTED}/pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def models(repo):
    """Base models beside models/tiny: wider, deeper, shallower, and of the same shape."""
    for name, options in {"wide": {"hidden": 48}, "deep": {"layers": 3}, "flat": {"layers": 1},
                          "twin": {"seed": 1}}.items():
        make_tiny_llama(repo / f"models/{name}", **{"hidden": 32, "kv_heads": 2, **options})
    return repo / "models"


@pytest.fixture(scope="module")
def checkpoint(repo):
    return repo / "outputs/llm/checkpoint-6"


def converted(*names, index=None, edit=lambda state: None):
    """What zero_to_fp32.py writes: a file, or a folder of the files `names` and an index of them."""
    def change(folder):
        state = {f"base_model.model.{name}": tensor for name, tensor in load_file(folder / TRAINED).items()}
        state |= {name.replace(".weight", ".default.weight"): tensor
                  for name, tensor in load_file(folder / ADAPTER).items()}
        edit(state)
        if not names:
            return zipped(folder / CONVERTED, state)
        (folder / CONVERTED).mkdir()
        keys = sorted(state)
        for i, name in enumerate(names):
            zipped(folder / CONVERTED / name, {key: state[key] for key in keys[i::len(names)]})
        if index:
            (folder / INDEX).write_text(json.dumps(
                {"metadata": {}, "weight_map": {key: index[i % len(index)] for i, key in enumerate(keys)}}))
    return change


def fill(name, key, value):
    return edit_tensors(name, lambda tensors: tensors[key].view(-1)[:1].fill_(value))


def drop(name, key):
    return edit_tensors(name, lambda tensors: tensors.pop(key))


def reshape(name, key, *shape):
    return edit_tensors(name, lambda tensors: tensors.update({key: torch.ones(*shape)}))


def fewer_rows(name, key, count):
    return edit_tensors(name, lambda tensors: tensors.update({key: tensors[key][:-count].clone()}))


def kinds(name):
    """{id: (change, names of the line)} for one file of a checkpoint that is broken."""
    return {f"{name} {kind}": (change, [name]) for kind, change in {
        "cut off": cut(name), "empty": write(name, ""), "a text": write(name, "hello\n" * 99),
        "binary": lambda folder: (folder / name).write_bytes(os.urandom(999)),
        "a folder": both(remove(name), lambda folder: (folder / name).mkdir())}.items()}


BROKEN = {
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), ["no adapter_config.json"]),
    "no adapter": (remove(ADAPTER), [f"no {ADAPTER}"]),
    "no configuration": (remove(CONFIG), [f"no {CONFIG}"]),
    "no trainable parameters": (remove(TRAINED), [f"neither {TRAINED} nor", "run zero_to_fp32.py"]),
    **kinds(ADAPTER), **kinds(CONFIG), **kinds(TRAINED), **kinds(AGREEMENT),
    "agreement: a list": (write(AGREEMENT, "[1]"), [AGREEMENT, "no JSON object"]),
    "agreement: a text for a length": (edit_json(AGREEMENT, model_max_length="4096"), [AGREEMENT, "model_max_length"]),
    "agreement: a negative length": (edit_json(AGREEMENT, model_max_length=-4096), [AGREEMENT, "model_max_length"]),
    "agreement: length yes": (edit_json(AGREEMENT, model_max_length=True), [AGREEMENT, "model_max_length"]),
    "agreement: another length": (edit_json(AGREEMENT, model_max_length=8192), [AGREEMENT, "give --context_size 8192"]),
    "agreement: a number for a model": (edit_json(AGREEMENT, base_model=7), [AGREEMENT, "base_model"]),
    "agreement: numbers for names": (edit_json(AGREEMENT, trained=[7]), [AGREEMENT, "trained"]),
    "agreement: a list for paths": (edit_json(AGREEMENT, paths=["models/tiny"]), [AGREEMENT, "paths"]),
    "agreement: a number for a path": (edit_json(AGREEMENT, paths={"geoencoder_path": 7}), [AGREEMENT, "paths", "7"]),
    "agreement: an empty path": (edit_json(AGREEMENT, paths={"data_path": ""}), [AGREEMENT, "paths", "data_path"]),
    "agreement: a length beyond any": (edit_json(AGREEMENT, model_max_length=10**30), [AGREEMENT, "model_max_length"]),
    "agreement: an unknown quantization": (edit_json(AGREEMENT, quantization="int3"), [AGREEMENT, "quantization"]),
    "agreement: another model": (edit_json(AGREEMENT, base_model="0" * 64), [AGREEMENT, "trained on other weights"]),
    "adapter: NaN": (fill(ADAPTER, Q_PROJ, float("nan")), [ADAPTER, "NaN"]),
    "adapter: infinity": (fill(ADAPTER, Q_PROJ, float("-inf")), [ADAPTER, "infinity"]),
    "adapter: one pair's half missing": (drop(ADAPTER, Q_PROJ), [ADAPTER, "q_proj.lora_A.default.weight is missing"]),
    "adapter: one too many": (reshape(ADAPTER, Q_PROJ.replace("layers.0", "layers.7"), 8, 32), [ADAPTER, "no place"]),
    "adapter: another shape": (reshape(ADAPTER, Q_PROJ, 8, 31), [ADAPTER, "(8, 31)"]),
    "adapter: another rank": (reshape(ADAPTER, Q_PROJ, 4, 32), [CONFIG, "rank 4, 8"]),
    "trained: NaN": (fill(TRAINED, NORM, float("nan")), [TRAINED, NORM]),
    "trained: one too many": (reshape(TRAINED, "model.other.weight", 3), [TRAINED, "no place for"]),
    "trained: one too few": (drop(TRAINED, NORM), [TRAINED, f"{NORM} is missing"]),
    "trained: another shape": (reshape(TRAINED, NORM, 31), [TRAINED, NORM]),
    "trained: no rows of <GPS n>": (fewer_rows(TRAINED, EMBEDDING, 5), [TRAINED, EMBEDDING, "--gps_mapping_path"]),
    "converted: an empty folder": (lambda folder: (folder / CONVERTED).mkdir(), [CONVERTED, "an empty folder"]),
    "converted: cut off": (both(converted(), cut(CONVERTED)), [CONVERTED, "not a file of weights"]),
    "converted: empty": (write(CONVERTED, ""), [CONVERTED, "not a file of weights"]),
    "converted: no tensors": (lambda folder: zipped(folder / CONVERTED, {"a": 1}), [CONVERTED, "something else"]),
    "converted: a list": (lambda folder: zipped(folder / CONVERTED, [torch.ones(1)]), [CONVERTED, "something else"]),
    "converted: NaN": (converted(edit=lambda state: state[f"base_model.model.{NORM}"].fill_(float("nan"))),
                       [CONVERTED, "NaN"]),
    "converted: one too few": (converted(edit=lambda state: state.pop(f"base_model.model.{NORM}")),
                               [CONVERTED, f"{NORM} is missing"]),
    "converted: no LoRA": (converted(edit=lambda state: [state.pop(key) for key in [*state] if "lora_" in key]),
                           [CONVERTED, "is missing"]),
    "converted: one of its files missing": (converted("a.bin", index=["a.bin", "b.bin"]), [CONVERTED, "names b.bin"]),
    "converted: an index that leads away": (converted("a.bin", index=["../a.bin"]), [CONVERTED, "'../a.bin'"]),
    "converted: half of it": (both(converted("a.bin", "b.bin"), remove(f"{CONVERTED}/b.bin")),
                              [CONVERTED, "is missing"]),
    "converted: an index cut off": (both(converted("a.bin", index=["a.bin"]), cut(INDEX)), [INDEX, "not JSON"]),
}


@pytest.mark.parametrize("change, names", BROKEN.values(), ids=BROKEN)
def test_broken(repo, checkpoint, tmp_path, change, names):
    folder = copy(checkpoint, tmp_path / "checkpoint-6", change)
    before = snapshot(folder)
    assert str(folder) in refusal(evaluate(repo, folder), *names)
    assert {**snapshot(folder), ".lock": None} == {**before, ".lock": None}


WHOLE = {
    "the released code's": remove(AGREEMENT),
    "of an earlier version": edit_json(AGREEMENT, base_model=None, trained=None, paths=None),
    "converted, a file": converted(),
    "converted, a folder": converted("pytorch_model.bin"),
    "converted, a folder with an index": both(converted("a.bin", "b.bin", index=["a.bin", "b.bin"]),
                                              write("pytorch_model.bin/c.bin", "left by another conversion")),
    "converted, without our own file": both(converted(), remove(TRAINED)),
    "all files but those of evaluation gone": lambda folder: [path.unlink() for path in folder.iterdir() if path.name
                                                             not in (ADAPTER, CONFIG, TRAINED, AGREEMENT)],
}


@pytest.mark.parametrize("change", WHOLE.values(), ids=WHOLE)
def test_whole(repo, checkpoint, tmp_path, change):
    """Each says what the checkpoint as it was written says; that the base was in 4 bits, it need not tell."""
    found = []
    for name, edit in (("plain", lambda folder: None), ("changed", change)):
        folder = copy(checkpoint, tmp_path / name, edit)
        result = evaluate(repo, folder, "--load_in_4bit", "True")
        assert result.code == 0, result.err
        found.append(predictions(folder))
    assert found[0] == found[1]


@pytest.mark.parametrize("name, kind", [("nowhere", "missing"), ("checkpoint-6", "file")])
def test_no_folder(repo, tmp_path, name, kind):
    if kind == "file":
        (tmp_path / name).write_text("x")
    before = snapshot(tmp_path)
    refusal(evaluate(repo, tmp_path / name), name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("other, names", [
    ("wide", ["width"]), ("deep", ["layers.2", "is missing"]), ("flat", ["no place for", "layers.1"]),
    ("twin", [AGREEMENT, "trained on other weights than models/twin holds"])])
@pytest.mark.parametrize("known", [True, False])
def test_other_base_model(repo, models, checkpoint, tmp_path, other, names, known):
    """Told by the fingerprint where there is one; a model of another shape by that alone."""
    folder = copy(checkpoint, tmp_path / "checkpoint-6", (lambda folder: None) if known else remove(AGREEMENT))
    result = evaluate(repo, folder, "--base_model", f"models/{other}")
    if other == "twin" and not known:       # nothing in a checkpoint of the released code tells them apart
        assert result.code == 0, result.err
    else:
        refusal(result, *([AGREEMENT, f"than models/{other} holds"] if known and other != "wide" else names))


def test_same_base_model_elsewhere(repo, checkpoint, tmp_path):
    shutil.copytree(repo / "models/tiny", tmp_path / "copy")
    folder = copy(checkpoint, tmp_path / "checkpoint-6")
    assert evaluate(repo, folder, "--base_model", tmp_path / "copy").code == 0


def split(folder):
    """The model of a full checkpoint in two files, as transformers writes it where it is large."""
    weights = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, name in enumerate(names):
        save_file({key: weights[key] for key in sorted(weights)[i::2]}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {key: names[i % 2] for i, key in enumerate(sorted(weights))}}))
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def full(repo):
    """A checkpoint of --low_rank_training False."""
    if not (repo / "outputs/full_model").exists():
        forked.train(repo, 2, "outputs/full_model", "--low_rank_training", "False", "--max_steps", "2")
    return repo / "outputs/full_model/checkpoint-2"


FULL = {
    "as it is": (lambda folder: None, None),
    "in two files": (split, None),
    "one of two files missing": (both(split, remove("model-00002-of-00002.safetensors")), "names model-00002-of-00002"),
    "one of two files cut off": (both(split, cut("model-00002-of-00002.safetensors")), "not a "),
    "cut off": (cut("model.safetensors"), "not a usable model folder"),
    "one too few": (drop("model.safetensors", NORM), f"{NORM} is missing"),
    "NaN": (fill("model.safetensors", NORM, float("nan")), f"{NORM} holds NaN"),
    "another shape": (reshape("model.safetensors", NORM, 9), "do not have the sizes"),
}


@pytest.mark.parametrize("change, message", FULL.values(), ids=FULL)
def test_full_model(repo, full, tmp_path, change, message):
    folder = copy(full, tmp_path / "checkpoint-2", change)
    result = evaluate(repo, folder)
    if message is not None:
        assert str(folder) in refusal(result, message)
    else:
        assert result.code == 0, result.err


@pytest.mark.parametrize("change, message", FULL.values(), ids=FULL)
def test_full_model_resumed(repo, full, tmp_path, change, message):
    folder = copy(full, tmp_path / "O/checkpoint-2", change)
    before = snapshot(folder)
    result = resume(repo, 2, tmp_path / "O", "--low_rank_training", "False", "--max_steps", "3")
    if message is None:
        assert result.code == 0 and (tmp_path / "O/checkpoint-3").exists(), result.err
    else:
        assert str(folder) in refusal(result)
    assert snapshot(folder) == before


def test_full_model_has_the_positions_of_its_training(repo, full, tmp_path):
    folder = copy(full, tmp_path / "checkpoint-2", lambda folder: None)
    refusal(evaluate(repo, folder, "--context_size", "8192"), str(folder), "--context_size 4096")


# Resuming.

RESUMED = {
    "state cut off": (cut("trainer_state.json"), [], ["trainer_state.json", "not JSON"]),
    "state a list": (write("trainer_state.json", "[]"), [], ["trainer_state.json", "no JSON object"]),
    "state without steps": (edit_json("trainer_state.json", global_step=None), [], ["global_step is 'None'"]),
    "state with a text for steps": (edit_json("trainer_state.json", global_step="4"), [], ["global_step is '4'"]),
    "state with an unknown field": (edit_json("trainer_state.json", evil=1), [], ["trainer_state.json", "evil"]),
    "state with a text for a log": (edit_json("trainer_state.json", log_history="x"), [], ["log_history"]),
    "no state": (remove("trainer_state.json"), [], ["checkpoint-4", "trainer_state.json"]),
    "no optimizer": (remove("optimizer.pt"), [], ["no optimizer.pt"]),
    "no schedule": (remove("scheduler.pt"), [], ["no scheduler.pt"]),
    "optimizer cut off": (cut("optimizer.pt"), [], ["optimizer.pt", "not a file of weights"]),
    "schedule a text": (write("scheduler.pt", "hello"), [], ["scheduler.pt", "not a file of weights"]),
    "random states empty": (write("rng_state.pth", ""), [], ["rng_state.pth", "not a file of weights"]),
    "random states of another kind": (lambda folder: zipped(folder / "rng_state.pth", {"python": 7}), [],
                                      ["checkpoint-4", "random states do not fit"]),
    "optimizer of another kind": (lambda folder: zipped(folder / "optimizer.pt", {"state": {}, "param_groups": []}), [],
                                  ["checkpoint-4", "optimizer", "do not fit"]),
    "two processes": (lambda folder: ((folder / "rng_state.pth").rename(folder / "rng_state_0.pth"),
                                      shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")), [], None),
    "adapter cut off": (cut(ADAPTER), [], [ADAPTER, "not a file of weights"]),
    "no adapter": (remove(ADAPTER), [], [ADAPTER, "no such file"]),
    "no configuration": (remove(CONFIG), [], [CONFIG]),
    "no trainable parameters": (remove(TRAINED), [], [TRAINED, "no such file"]),
    "adapter: one too few": (drop(ADAPTER, Q_PROJ), [], [ADAPTER, "is missing"]),
    "adapter: NaN": (fill(ADAPTER, Q_PROJ, float("nan")), [], [ADAPTER, "NaN"]),
    "trained: one too few": (drop(TRAINED, NORM), [], [TRAINED, "is missing"]),
    "trained: no rows of <GPS n>": (fewer_rows(TRAINED, EMBEDDING, 5), [], [TRAINED, EMBEDDING]),
    "another rank": (edit_json(AGREEMENT, flags=None), ["--lora_r", "4"],
                     [CONFIG, "trained with r 8, not 4", "--lora_r 8"]),
    "another alpha": (edit_json(AGREEMENT, flags=None), ["--lora_alpha", "4"],
                      [CONFIG, "trained with lora_alpha 16, not 4"]),
    "other parameters": (edit_json(AGREEMENT, flags=None), ["--trainable_params", "norm"], [TRAINED]),
    "flags that are none": (edit_json(AGREEMENT, flags={"seed": 42}), [], [AGREEMENT, "flags are none of a training"]),
    "flags: a list": (edit_json(AGREEMENT, flags=[1]), [], [AGREEMENT, "flags is '[1]'"]),
    "another quantization": (edit_json(AGREEMENT, quantization="none"), ["--load_in_4bit", "True"],
                             [AGREEMENT, "trained on a base not quantized", "--load_in_4bit False"]),
    "another rate": (lambda folder: None, ["--learning_rate", "0.1"],
                     [AGREEMENT, "trained with --learning_rate 0.002, not --learning_rate 0.1", "--init_from"]),
    "another accumulation": (lambda folder: None, ["--gradient_accumulation_steps", "2"],
                             [AGREEMENT, "trained with --gradient_accumulation_steps 1"]),
    "other pairs": (edit_json(AGREEMENT, files={"data_path": "0" * 64}), [],
                    [AGREEMENT, "another file than --data_path"]),
    "other places": (edit_json(AGREEMENT, files={"gps_mapping_path": "0" * 64}), [],
                     [AGREEMENT, "another file than --gps_mapping_path"]),
    "another model": (lambda folder: None, ["--model_name_or_path", "models/twin"], [AGREEMENT, "models/twin"]),
    "a deeper model": (remove(AGREEMENT), ["--model_name_or_path", "models/deep"], [ADAPTER, "layers.2"]),
    "another length": (lambda folder: None, ["--model_max_length", "8192"], [AGREEMENT, "4096"]),
    "all of the model": (lambda folder: None, ["--low_rank_training", "False"],
                         [AGREEMENT, "trained with --low_rank_training True"]),
    "files that are elsewhere now": (edit_json(AGREEMENT, paths={"model_name_or_path": "gone", "data_path": "gone",
                                                                 "geoencoder_path": "gone"}), [], None),
    "step beyond the end": (edit_json("trainer_state.json", global_step=99), [], None),
}


@pytest.mark.parametrize("change, flags, names", RESUMED.values(), ids=RESUMED)
def test_resumed(repo, models, tmp_path, change, flags, names):
    folder = copy(repo / "outputs/llm/checkpoint-4", tmp_path / "O/checkpoint-4", change)
    before = snapshot(folder)
    result = resume(repo, 2, tmp_path / "O", *flags)
    if names is None:
        assert result.code == 0, result.err
    else:
        assert str(tmp_path / "O") in refusal(result, *names)
        assert [path.name for path in (tmp_path / "O").glob("*/")] == ["checkpoint-4"]
    assert snapshot(folder) == before


@pytest.mark.parametrize("flags, names", [
    (["--seed", "7"], [AGREEMENT, "trained with --seed 42, not --seed 7"]),
    (["--quadkey_level", "24"], [AGREEMENT, "trained with --quadkey_level 25"]),
    (["--geo_encoder", "fourier"], [AGREEMENT, "trained with --geo_encoder hierarchical"]),
    (["--encoder_training", "full"], ["checkpoint-4"]),
], ids=["another seed", "another level", "another encoder", "all of the encoder"])
def test_stage_1_resumed(repo, tmp_path, flags, names):
    """What lies below the encoder's LoRA is not saved, so it must be drawn again as it was."""
    copy(repo / "outputs/gcim/checkpoint-4", tmp_path / "O/checkpoint-4")
    copy(repo / "outputs/gcim/4", tmp_path / "O/4")
    before = snapshot(tmp_path / "O")
    refusal(resume(repo, 1, tmp_path / "O", *flags), *names)
    assert {**snapshot(tmp_path / "O"), ".lock": None} == {**before, ".lock": None}


@pytest.mark.parametrize("number", [1, 2])
def test_checkpoint_of_the_other_stage(repo, tmp_path, number):
    folder = copy(repo / f"outputs/{('llm', 'gcim')[number - 1]}/checkpoint-4", tmp_path / "O/checkpoint-4")
    before = snapshot(folder)
    flags = ["--lora_r", "8", "--lora_alpha", "16"]
    assert str(folder) in refusal(resume(repo, number, tmp_path / "O", *flags), "does not fit")
    assert snapshot(folder) == before


@pytest.mark.parametrize("wanted, message", [
    ("{}/x/../source/checkpoint-4", None), ("{}/link/checkpoint-4", None), ("{}/nowhere", "no such folder"),
    ("{}/file", "{}/file"), ("{}/source", "no trainer_state.json in it")],
    ids=["with ..", "through a link", "missing", "a file", "a folder above"])
def test_named_checkpoint(repo, tmp_path, wanted, message):
    """--resume_from_checkpoint names it, wherever it lies; what is there is only read."""
    copy(repo / "outputs/llm/checkpoint-4", tmp_path / "source/checkpoint-4")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    (tmp_path / "file").write_text("x")
    before = snapshot(tmp_path / "source")
    result = resume(repo, 2, tmp_path / "O", wanted=wanted.format(tmp_path))
    if message is None:
        assert result.code == 0, result.err
        ours, theirs = (load_file(folder / "checkpoint-6" / TRAINED)
                        for folder in (tmp_path / "O", repo / "outputs/llm"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    else:
        refusal(result, message.format(tmp_path))
    assert snapshot(tmp_path / "source") == before


@pytest.mark.soak
def test_under_torchrun(repo, tmp_path):
    """One process ends with our line and code, and torchrun passes on that it failed."""
    folder = copy(repo / "outputs/llm/checkpoint-4", tmp_path / "O/checkpoint-4", cut("optimizer.pt"))
    result = stage(repo, 2, tmp_path / "O", "--resume_from_checkpoint", "auto", check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(lines) == 1 and str(folder / "optimizer.pt") in lines[0]
    assert "exitcode  : 2" in result.stderr
