"""What the released code does otherwise, by the flags that do it here too (docs/differences.md), on tiny models."""
import forked
import pytest
import torch
from harness import refusal

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
