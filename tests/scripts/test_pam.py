"""PAM by its commands: transitions to embeddings, a projector trained on them, stage 2 and evaluation with both."""
import json
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from commands import DATA, EMBEDDINGS, evaluation, run
from harness import refusal
from safetensors.torch import load_file

QUESTIONS = "qa_pairs_kqt_200items_sample_llm_without_sim_gps_pam"
PROJECTOR = "outputs/pam/6/poi_projector.pth"
NEITHER = ["--poi_embedding_path", "", "--projector_path", ""]
BOTH = ["--poi_embedding_path", EMBEDDINGS, "--projector_path", PROJECTOR]
STAGE_2 = ["--data_path", f"{DATA}/train_{QUESTIONS}.json", *BOTH]
TEST = ["--test_file", f"test_{QUESTIONS}.txt"]


@pytest.fixture(scope="module")
def aligned(repo):
    """`repo`, and PAM's steps up to a trained stage 2."""
    for script, flags in (("poi_embeddings.py", []), ("process_pam_stage1.py", []),
                          ("process_llm_gps.py", ["-use_pam", "True", "-max_history", "10"])):
        run(repo, sys.executable, f"data-preprocess/{script}", "-dataset_name", "sample", *flags)
    forked.train(repo, "pam", "outputs/pam")
    forked.train(repo, 2, "outputs/both", *STAGE_2)
    return repo


def test_what_the_steps_leave(aligned):
    projectors = [torch.load(aligned / "outputs/pam" / name, weights_only=True)
                  for name in ("4/poi_projector.pth", "6/poi_projector.pth", "poi_projector_final.pth")]
    assert all(list(each) == ["weight", "bias"] and each["weight"].shape == (32, 128) for each in projectors)
    assert not torch.equal(projectors[0]["weight"], projectors[1]["weight"])
    assert torch.equal(projectors[1]["weight"], projectors[2]["weight"])
    checkpoint = aligned / "outputs/both/checkpoint-6"
    trained = load_file(checkpoint / "trainable_params.safetensors")
    assert any("embed" in name for name in trained) and not any("injection" in name for name in trained)
    agreed = json.loads((checkpoint / "ga_llm.json").read_text())
    assert sorted(agreed["encoders"]) == ["GCIM", "PAM"]
    assert "poi_token" in agreed["questions"]["fields"] and agreed["questions"]["max_history"] == 10


def test_evaluation_with_both_modules(aligned, tmp_path):
    result = forked.run(aligned, evaluation("outputs/both/checkpoint-6", *TEST, *BOTH), tmp_path / "log")
    assert result.code == 0, result.err
    metrics = json.loads((aligned / "outputs/both/checkpoint-6/metrics.json").read_text())
    assert metrics["n"] == metrics["all"]["user-history frequency"]["n"] > 20
    assert metrics["machine"]["cores"] >= 1 and "test_next_gps.py --batch_size 8" in metrics["command"]


def test_evaluation_by_the_checkpoint_alone(aligned, tmp_path):
    """It remembers both modules, and questions with <POI n>."""
    found = []
    for name, command in (("full", lambda folder: evaluation(folder, *TEST, *BOTH)),
                          ("short", lambda folder: ["test_next_gps.py", "--output_dir", folder])):
        folder = shutil.copytree(aligned / "outputs/both/checkpoint-6", tmp_path / name,
                                 ignore=shutil.ignore_patterns("predictions.jsonl", "metrics.json"))
        result = forked.run(aligned, list(map(str, command(folder))), tmp_path / f"{name}.log")
        assert result.code == 0, result.err
        found.append(((folder / "predictions.jsonl").read_text(),
                      json.loads((folder / "metrics.json").read_text())["all"]))
    assert found[0] == found[1]


@pytest.mark.bulk
@pytest.mark.parametrize("flags, names", [
    ([*TEST, *NEITHER], ["<POI ", "--poi_embedding_path"]),
    (["--poi_embedding_path", ""], ["--projector_path", "--poi_embedding_path"]),
    (["--projector_path", ""], ["--poi_embedding_path", "--projector_path"]),
    (NEITHER, ["ga_llm.json", "trained with PAM", "--projector_path"]),
    ([*TEST, "--poi_embedding_path", EMBEDDINGS, "--projector_path", "outputs/pam/4/poi_projector.pth"],
     ["ga_llm.json", "other weights of PAM's"]),
    ([*TEST, *BOTH, "--geoencoder_path", "outputs/gcim/4/geo_encoder_merged.pth"], ["other weights of GCIM's"]),
    ([*TEST, *BOTH, "--geoencoder_path", ""], ["trained with GCIM", "--geoencoder_path"]),
    ([*TEST, *BOTH[:2], "--projector_path", "outputs/nowhere.pth"], ["outputs/nowhere.pth", "finetune_PAM.py"])],
    ids=["questions alone", "no embeddings", "no projector", "neither", "an earlier projector", "an earlier encoder",
         "no encoder", "no file"])
def test_another_model_than_was_trained(aligned, tmp_path, flags, names):
    refusal(forked.run(aligned, evaluation("outputs/both/checkpoint-6", *flags), tmp_path / "log"), *names)


def test_a_checkpoint_without_pam_takes_none(aligned, tmp_path):
    refusal(forked.run(aligned, evaluation("outputs/llm/checkpoint-6", *BOTH), tmp_path / "log"), "without PAM")


@pytest.mark.bulk
@pytest.mark.parametrize("stage, flags, names", [
    ("pam", ["--poi_embedding_path", ""], ["--poi_embedding_path is required"]),
    ("pam", ["--geo_encoder", "fourier"], ["--geo_encoder", "unknown flag"]),
    (2, [*STAGE_2[:4]], ["--projector_path"]),
    (2, [*STAGE_2[:2]], ["<POI ", "--poi_embedding_path"])],
    ids=["no embeddings", "a flag of GCIM's", "no projector", "questions alone"])
def test_training_refuses(aligned, tmp_path, stage, flags, names):
    command = forked.training(stage, "outputs/refused", *flags)
    refusal(forked.run(aligned, command, tmp_path / "log", **forked.ranks()), *names)
    assert not list(Path(aligned / "outputs/refused").glob("checkpoint-*"))


def test_resumed_with_another_projector(aligned, tmp_path):
    command = forked.training(2, "outputs/both", *STAGE_2, "--projector_path", "outputs/pam/4/poi_projector.pth",
                              "--max_steps", "8", "--resume_from_checkpoint", "auto")
    refusal(forked.run(aligned, command, tmp_path / "log", **forked.ranks()), "encoders", "ga_llm.json")
