"""What the released code does otherwise, by the flags that do it here too (docs/differences.md), on tiny models."""
import shutil
import sys

import forked
import numpy as np
import pytest
import torch
from commands import DATA, EMBEDDINGS, PAIRS, run
from harness import refusal
from safetensors.torch import load_file

from ga_llm.base.artifacts import alignment_questions
from ga_llm.training import staging


def weights(repo, output, name="geo_encoder_final_merged.pth"):
    return torch.load(repo / output / name, weights_only=True)


@pytest.mark.slow
def test_stage_1_trains_what_their_lora_reaches(repo):
    """From one checkpoint to the next ours moves the n-grams' table and six linear layers; theirs the table alone."""
    forked.train(repo, 1, "outputs/theirs", "--encoder_training", "released", "--encode_each", "True")
    moved = {}
    for output in ("outputs/gcim", "outputs/theirs"):
        before, after = (weights(repo, f"{output}/{step}", "geo_encoder_merged.pth") for step in (4, 6))
        moved[output] = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved["outputs/theirs"] == {"gps_embed_model.gps_embedding.weight"}
    assert len(moved["outputs/gcim"]) == 7 and moved["outputs/theirs"] < moved["outputs/gcim"]


@pytest.mark.slow
def test_stage_2_trains_all_of_the_encoder(repo):
    """As a rule it is frozen, and no file of it is written; theirs moves it, with a dropout for every token."""
    forked.train(repo, 2, "outputs/each", "--train_encoders", "True", "--encode_each", "True")
    forked.train(repo, 2, "outputs/shared", "--train_encoders", "True")
    before, each, shared = (weights(repo, *where) for where in (
        ("outputs/gcim/6", "geo_encoder_merged.pth"), ("outputs/each",), ("outputs/shared",)))
    moved = [name for name in before if not torch.equal(before[name], each[name])]
    assert moved == list(before) and len(moved) == 27
    assert any(not torch.equal(each[name], shared[name]) for name in before)
    assert staging.steps(repo / "outputs/llm") and not list((repo / "outputs/llm").rglob("geo_encoder*.pth"))


def test_a_frozen_encoder_has_no_dropout(repo, tmp_path):
    command = forked.training(2, "outputs/refused", "--encode_each", "True")
    refusal(forked.run(repo, command, tmp_path / "log", **forked.ranks()), "--encode_each", "--train_encoders True")


@pytest.mark.slow
def test_their_test(repo):
    """One sampled answer to a prompt with other spaces, by a model without its trained norms; it lies beside ours."""
    output = "outputs/llm/checkpoint-6"
    _, ours = forked.evaluate(repo, output)
    _, theirs = forked.evaluate(repo, output, "--decoding", "sample", "--released_prompt", "True", "--base_norms",
                                "True")
    assert theirs["n"] == ours["n"] and "MRR" not in theirs["all"]["model"]
    folder = repo / output / "sample_released_prompt_base_norms"
    assert (folder / "metrics.json").exists() and theirs["settings"]["released_prompt"] == "True"
    for flags in ([], ["--released_prompt", "True"]):
        forked.evaluate(repo, output, "--full_table", "True", *flags)
    tables = [np.load(repo / output / name / "log_probabilities.npy") for name in ("", "released_prompt")]
    assert tables[0].shape == tables[1].shape and (tables[0] != tables[1]).any(axis=1).all()    # else equal, bit by bit


@pytest.fixture(scope="module")
def aligned(repo):
    """aligned(name, *flags): `repo`'s questions of PAM behind the history, in a folder of their own."""
    run(repo, sys.executable, "data-preprocess/poi_embeddings.py", "-dataset_name", "sample")

    def asked(name, *flags):
        shutil.copytree(repo / "datasets", repo / name, ignore=shutil.ignore_patterns("tokens-*"))
        run(repo, sys.executable, "data-preprocess/process_pam_stage1.py", "-dataset_name", "sample", "-datasets", name,
            "-history", "True", *flags)
        return ["--data_path", f"{DATA.replace('datasets', name)}/{alignment_questions('sample')}",
                "--poi_embedding_path", EMBEDDINGS]
    return asked


@pytest.mark.slow
def test_pam_through_lora_alone_beside_a_frozen_llm(repo, aligned):
    """The LLM's LoRA stays at zero, which is none; of two layers that LoRA adapts, the weights move, not the biases."""
    flags = ["--projector", "gelu", "--projector_training", "lora", "--llm_lora", "False", "--encode_each", "True"]
    forked.train(repo, "pam", "outputs/pam_theirs", *aligned("asked_pam"), *flags)
    before, after = (weights(repo, f"outputs/pam_theirs/{step}", "poi_projector.pth") for step in (4, 6))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["0.weight", "2.weight"]
    assert list(before) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    lora = load_file(repo / "outputs/pam_theirs/checkpoint-6/adapter_model.safetensors")
    of_llm = {name: tensor for name, tensor in lora.items() if "injection" not in name}
    assert of_llm and all(tensor.abs().sum() == 0 for name, tensor in of_llm.items() if "lora_B" in name)
    forked.train(repo, "pam", "outputs/pam_theirs", *aligned("asked_again"), *flags, "--max_steps", "8",
                 "--resume_from_checkpoint", "auto")


@pytest.mark.slow
def test_one_script_trains_both_modules(repo, aligned):
    forked.train(repo, 1, "outputs/joint", *aligned("asked_both", "-fields", "time,user,poi,coordinates,gps,category"))
    for name in ("geo_encoder_merged.pth", "poi_projector.pth"):
        before, after = (weights(repo, f"outputs/joint/{step}", name) for step in (4, 6))
        assert any(not torch.equal(before[key], after[key]) for key in before), name
    assert {path.name for path in (repo / "outputs/joint").glob("*.pth")} == {
        "geo_encoder_final_merged.pth", "poi_projector_final.pth"}


@pytest.mark.parametrize("stage, flags, names", [
    ("pam", ["--llm_lora", "False", "--low_rank_training", "False"], ["--llm_lora", "--low_rank_training"]),
    (1, ["--projector", "gelu"], ["--projector", "--poi_embedding_path"]),
    (1, ["--loss_on", "poi_ids"], ["--loss_on poi_ids", "leave it out"])])
def test_flags_that_exclude_each_other(repo, tmp_path, stage, flags, names):
    command = forked.training(stage, "outputs/refused", *flags, "--data_path", PAIRS[2])
    refusal(forked.run(repo, command, tmp_path / "log", **forked.ranks()), *names)
