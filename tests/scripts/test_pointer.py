"""A model with a pointer, from its questions to its recommendations."""
import json
import re
import shutil

import forked
import numpy as np
import pandas as pd
import pytest
from commands import DATA, metrics
from harness import call
from safetensors.torch import load_file
from test_processes import CUT_UP, LEAVES, STACKS, close, losses

from ga_llm.base import artifacts
from ga_llm.training.checkpoints import ADAPTER

TRAIN, TEST = (artifacts.questions(split, "sample", 2, False) for split in ("train", "test"))
GEO = ["--geoencoder_path", "outputs/gcim/6/geo_encoder_merged.pth"]
EXACT = ["--max_steps", "4", "--save_steps", "2", "--load_in_4bit", "False", "--bf16", "False", "--pointer", "True"]
FULL = ["--geoencoder_path", "", "--low_rank_training", "False", "--geo_output", "True", "--geo_encoder", "cells",
        "--loss_on", "poi_ids", "--batch_tokens", "256", "--use_full_attn", "True"]


def files(kind):
    return ["--data_path", f"{kind}/sample/preprocessed/{TRAIN}",
            "--gps_mapping_path", f"{kind}/sample/preprocessed/sample_gps_mapping.csv"]


@pytest.fixture(scope="module")
def trained(pointed):
    forked.train(pointed, 2, "outputs/pointed", *files("moments"), *EXACT, *GEO)
    forked.train(pointed, 2, "outputs/by_token", *files("tokens"), *EXACT, *FULL)
    return pointed


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def evaluated(repo, output, tmp_path, *flags):
    """(metrics, predictions) of a checkpoint's own evaluation."""
    result = forked.run(repo, ["test_next_gps.py", "--output_dir", output, "--full_table", "True", *flags],
                        tmp_path / "log")
    assert result.code == 0, result.err[-3000:]
    predictions = repo / result.out.strip().splitlines()[-1].split()[3]
    return metrics(repo, result.out), [json.loads(line) for line in predictions.read_text().splitlines()]


@pytest.mark.parametrize("output", ["outputs/pointed", "outputs/by_token"])
def test_evaluation_by_the_checkpoint_alone(trained, tmp_path, output):
    """All probabilities of a prompt add up to at most 1; without the pointer they are others, and lie elsewhere."""
    checkpoint = f"{output}/checkpoint-4"
    found, predictions = evaluated(trained, checkpoint, tmp_path)
    table = np.load(trained / checkpoint / artifacts.LOG_PROBABILITIES)
    assert found["all"]["model"]["n"] == len(predictions) == len(table) and (np.exp(table).sum(1) < 1 + 1e-4).all()
    visited = [prediction["rank"] for prediction in predictions]
    assert np.mean(visited) < table.shape[1] / 2        # even untrained, it points to where the user has been
    alone, _ = evaluated(trained, checkpoint, tmp_path, "--pointer", "False")
    other = np.load(trained / checkpoint / artifacts.LLM_ALONE / artifacts.LOG_PROBABILITIES)
    assert not np.allclose(table, other, atol=1e-3) and alone["settings"]["pointer"] == "False"
    assert json.loads((trained / checkpoint / "ga_llm.json").read_text())["beside"].keys() >= {"pointer",
                                                                                              "moment_injection"}


def test_a_run_goes_on_exactly(trained):
    shutil.copytree(trained / "outputs/pointed/checkpoint-2", trained / "outputs/resumed/checkpoint-2")
    forked.train(trained, 2, "outputs/resumed", *files("moments"), *EXACT, *GEO, "--resume_from_checkpoint", "auto")
    one, other = (weights(trained / output / "checkpoint-4") for output in ("outputs/pointed", "outputs/resumed"))
    assert close(one, other, 0) and any(name.startswith("pointer.") for name in one)


def test_another_pointer_does_not_go_on(trained, tmp_path):
    shutil.copytree(trained / "outputs/pointed/checkpoint-2", trained / "outputs/other/checkpoint-2")
    process, = forked.start(trained, 2, "outputs/other", *files("moments"), *EXACT, *GEO, "--pointer_heads", "4",
                            "--resume_from_checkpoint", "auto")
    process.join(300)
    assert process.exitcode == 2
    assert "trained with --pointer_heads 8" in (trained / "outputs/other.log").read_text().splitlines()[-1]


def test_the_weights_alone(trained):
    """A step that is too small to be seen leaves what a run starts from, the pointer and its like, too."""
    forked.train(trained, 2, "outputs/from", *files("moments"), *EXACT, *GEO, "--init_from",
                 "outputs/pointed/checkpoint-4", "--learning_rate", "1e-12", "--max_steps", "1")
    one, other = (weights(trained / folder) for folder in ("outputs/pointed/checkpoint-4", "outputs/from/checkpoint-1"))
    assert close(one, other, 1e-9) and any(name.startswith("pointer.") for name in one)


def test_a_rate_of_its_own_beside_the_llm(trained):
    """The LLM's is too small to be seen; what stands beside it learns all the same."""
    forked.train(trained, 2, "outputs/rates", *files("moments"), *EXACT, *GEO, "--init_from",
                 "outputs/pointed/checkpoint-4", "--learning_rate", "1e-12", "--beside_learning_rate", "1e-3",
                 "--max_steps", "1", "--warmup_steps", "0")
    one, other = (weights(trained / "outputs" / folder) for folder in ("pointed/checkpoint-4", "rates/checkpoint-1"))
    moved = {name: (one[name] - other[name]).abs().max().item() for name in one}
    own = {name: name.split(".")[0] in ("pointer", "moment_injection", "place_rows") for name in one}
    assert all(moved[name] < 1e-9 for name in one if not own[name])
    assert max(moved[name] for name in one if name.startswith("pointer.query")) > 5e-4
    assert max(moved[name] for name in one if name == "pointer.clock") > 5e-3       # a table: ten times


@pytest.fixture(scope="module")
def one_process(pointed):
    """With the embeddings alone beside LoRA, and no dropout: what several processes must train, too."""
    forked.train(pointed, 2, "outputs/pointed_1", *files("moments"), *EXACT, *GEO, "--lora_dropout", "0")
    return pointed / "outputs/pointed_1/checkpoint-4"


@pytest.mark.parametrize("stack", [pytest.param("ddp", marks=pytest.mark.slow), *CUT_UP])
def test_two_processes_train_what_one_does(pointed, one_process, stack):
    if stack.startswith("zero"):
        pytest.importorskip("deepspeed")
        if not (shutil.which("g++") and shutil.which("ninja")):
            pytest.skip("DeepSpeed compiles on a CPU: needs g++ and ninja")
    forked.train(pointed, 2, f"outputs/pointed_{stack}", *files("moments"), *EXACT, *GEO, "--lora_dropout", "0",
                 "--per_device_train_batch_size", "1", *STACKS[stack], processes=2)
    checkpoint = pointed / f"outputs/pointed_{stack}/checkpoint-4"
    assert (checkpoint / LEAVES[stack]).exists()
    assert losses(checkpoint) == pytest.approx(losses(one_process), rel=1e-3)
    one, other = ({**load_file(folder / ADAPTER), **load_file(folder / artifacts.TRAINABLE_PARAMS)}
                  for folder in (checkpoint, one_process))
    faster = [name for name in one if name.startswith("pointer.") and name.count(".") == 1]     # its tables: ten times
    assert close({name: one.pop(name) for name in faster}, {name: other.pop(name) for name in faster}, 1e-3)
    assert close(one, other, 1e-4)


@pytest.mark.parametrize("kind, output", [("moments", "outputs/pointed"), ("tokens", "outputs/by_token")])
def test_recommendations_are_those_of_the_evaluation(trained, tmp_path, kind, output):
    """Of each test pair's own check-ins, in the plain folder with the pointer beside it."""
    checkpoint = f"{output}/checkpoint-4"
    _, predictions = evaluated(trained, checkpoint, tmp_path)
    exported = f"{output}_exported"
    result = call(trained, "export.py", "--output_dir", checkpoint, "--export_dir", exported, "--dtype", "float32",
                  "--data_path", kind)
    assert result.code == 0, result.err
    assert (trained / exported / artifacts.POINTER).exists()
    assert not any("pointer" in name for name in load_file(trained / exported / "model.safetensors"))
    card = (trained / exported / "README.md").read_text()
    assert "## The pointer" in card and "which is another model" in card and "vllm" not in card
    assert ("what follows is the token `<GPS n>`" if kind == "tokens" else "what follows is the id") in card
    assert re.search(r'will visit <TIME \d+>"' if kind == "tokens" else r'will visit <TIME \d+>POI id "', card)
    assert "recommend.py" in result.out
    train, test = (pd.read_csv(trained / DATA / f"{split}_sample.csv") for split in ("train", "test"))
    of_pair = {(user, own["LocalTime"].max()): own for (user, _), own in test.groupby(["UserId", "TrajectoryId"])}
    encoding = json.loads((trained / DATA / "label_encoding.json").read_text())["user"]
    ids = np.sort(pd.read_csv(trained / DATA / "sample_gps_mapping.csv")["GPS_id"].to_numpy())
    for prediction in predictions[:3]:
        user, time = prediction["user"], prediction["time"]
        rows = pd.concat([train[train["UserId"] == user], of_pair[user, time]])
        rows.rename(columns={"PoiId": "GPS_id"})[["LocalTime", "GPS_id"]].to_csv(tmp_path / "mine.csv", index=False)
        flags = ["--model", exported, "--check_ins", str(tmp_path / "mine.csv"), "--time", time, "-k", "5",
                 "--data_path", kind, "--user", str(encoding["values"][user - encoding["first_id"]])]
        result = call(trained, "recommend.py", *flags, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)["places"]
        assert json.loads(result.out)["pointer"] is True
        table = np.load(trained / checkpoint / artifacts.LOG_PROBABILITIES)[prediction["pair"]].astype(np.float64)
        probabilities = np.sort(np.exp(table) / np.exp(table).sum())[::-1][:5]
        assert [place["probability"] for place in found] == pytest.approx(probabilities.tolist(), rel=1e-3)
        new = ~np.isin(ids, rows[rows["LocalTime"] < time]["PoiId"])
        found = json.loads(call(trained, "recommend.py", *flags, "--json", "--exclude", "visited").out)["places"]
        best = np.flatnonzero(new)[np.argsort(-table[new])][:5]
        assert [place["poi"] for place in found] == ids[best].tolist()
        assert [place["probability"] for place in found] == pytest.approx(np.exp(table[best]).tolist(), rel=1e-3)
    assert "by the LLM and its pointer" in " ".join(call(trained, "recommend.py", *flags).out.split())


def test_other_places_than_the_trainings_are_refused(trained, tmp_path):
    """The same ids at other coordinates: the pointer's distances would be others."""
    mapping = trained / "moments/sample/preprocessed/sample_gps_mapping.csv"
    rows = pd.read_csv(mapping)
    rows["Latitude"] = rows["Latitude"].to_numpy()[::-1]
    rows.to_csv(tmp_path / "shuffled.csv", index=False)
    result = forked.run(trained, ["test_next_gps.py", "--output_dir", "outputs/pointed/checkpoint-4",
                                  "--gps_mapping_path", tmp_path / "shuffled.csv", "--limit", "2"], tmp_path / "log")
    assert result.code == 2 and "shuffled.csv: other places than those of" in result.err.splitlines()[-1]


def test_the_plan_counts_the_pointer(pointed, tmp_path):
    """Of the batch with the longest prompts, of at most 256 tokens, all of whose check-ins are asked for."""
    command = forked.training(2, tmp_path / "O", *files("tokens"), *EXACT, *FULL, "--dry_run", "True")
    result = forked.run(pointed, command, tmp_path / "log", **forked.ranks())
    assert result.code == 0, result.err[-3000:]
    prompts, asked, check_ins = map(int, re.search(
        r"a pointer of (\d+) prompts that ask for (\d+) places among (\d+) check-ins", result.out).groups())
    assert prompts >= 1 and check_ins > 5 and asked == check_ins
    assert re.search(r"\n +pointer( +\d+\.\d\d){4}\n", result.out)


def test_what_goes_with_what(pointed, tmp_path):
    """A mistake is one line, before the model is loaded."""
    for flags, names in (
            (["--geo_encoder", "cells"], "--train_encoders True or --geo_output True"),
            (["--geo_output", "True"], "not --geoencoder_path"),
            (["--pointer_without", "clock"], "goes with --pointer True"),
            (["--pointer", "True", "--pointer_without", "clock,hours"], "--pointer_without hours: unknown"),
            (["--batch_tokens", "99", "--shared_prefix", "True", "--use_full_attn", "True"], "exclude each other")):
        geo = ["--geoencoder_path", ""] if flags[0] == "--geo_encoder" else []
        process, = forked.start(pointed, 2, "outputs/wrong", *files("moments"), *GEO, *flags, *geo)
        process.join(300)
        last = (pointed / "outputs/wrong.log").read_text().splitlines()[-1]
        assert process.exitcode == 2 and last.startswith("error: ") and names in last
