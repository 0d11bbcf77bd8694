"""A run that goes on with other flags than it began with: refused, or said; and weights that begin another run."""
import argparse
import dataclasses
import json
import logging

import pytest
import torch
from finetune_GCIM import Stage1Arguments
from finetune_LLM_with_GCIM import Stage2Arguments
from safetensors.torch import load_file

from ga_llm.base.artifacts import RUN, TRAINABLE_PARAMS
from ga_llm.base.cli import UserError
from ga_llm.base.reading import sha256
from ga_llm.training import arguments, checkpoints, flags

CLASSES = [Stage1Arguments, Stage2Arguments]


@pytest.fixture
def parse(tmp_path):
    def run(kind, *extra):
        (tmp_path / "x").write_text("x")
        return arguments.parse(kind, ["--model_name_or_path", "M", "--output_dir", str(tmp_path / "O"), "--data_path",
                                      str(tmp_path / "x"), "--gps_mapping_path", str(tmp_path / "x"), *map(str, extra)])
    return run


@pytest.mark.parametrize("kind", CLASSES)
def test_every_flag_that_decides(parse, tmp_path, kind):
    args = parse(kind)
    deciding = flags.deciding(args)
    assert set(deciding) >= {
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim",
        "optim_args", "adam_beta1", "max_grad_norm", "gradient_accumulation_steps", "per_device_train_batch_size",
        "seed", "data_seed", "max_steps", "num_train_epochs", "lora_r", "lora_alpha", "use_full_attn", "shared_prefix",
        "tree_tokens", "loss_on", "model_max_length", "train_sampling_strategy", "dataloader_drop_last",
        "label_smoothing_factor", "neftune_noise_alpha", "low_rank_training", "init_from"}
    path = tmp_path / "checkpoint-2" / checkpoints.AGREEMENT
    flags.check(deciding, args, path)
    for name, value in deciding.items():
        other = {"max_steps": 7, "num_train_epochs": 9}.get(name, "another")
        if name == flags.TRAINING:
            with pytest.raises(UserError, match=f"does not fit this training .{value}., it is of another .another.; "):
                flags.check(deciding | {name: other}, args, path)
            continue
        if name in flags.FROM_HERE_ON:
            flags.check(deciding | {name: other}, args, path)
            continue
        with pytest.raises(UserError, match=f"trained with --{name} {other}, not --") as error:
            flags.check(deciding | {name: other}, args, path)
        assert f"or give --{name} {other}" in str(error.value) and "\n" not in str(error.value)
        assert f"(--init_from {path.parent})" in str(error.value)


def test_no_name_is_stale():
    names = {field.name for kind in CLASSES for field in dataclasses.fields(kind)}
    for begin in flags.PASSED_OVER:
        assert any(name.startswith(begin) for name in names), begin
    assert set(flags.FROM_HERE_ON) <= names and not [name for name in flags.FROM_HERE_ON
                                                     if name.startswith(flags.PASSED_OVER)]


LENGTHS = {     # schedule, warm-up, the length before and now: whether it may be
    "linear": ("linear", 0, "--max_steps 4", "--max_steps 8", False),
    "cosine": ("cosine", 0, "--num_train_epochs 1", "--num_train_epochs 2", False),
    "constant": ("constant", 0, "--max_steps 4", "--max_steps 8", True),
    "shorter": ("constant", 0, "--max_steps 8", "--max_steps 4", True),
    "steps, then epochs": ("constant", 0, "--max_steps 8", "--num_train_epochs 4", True),
    "warm-up in steps": ("constant_with_warmup", 20, "--num_train_epochs 1", "--num_train_epochs 2", True),
    "warm-up as a share": ("constant_with_warmup", 0.1, "--num_train_epochs 1", "--num_train_epochs 2", False),
    "the root": ("inverse_sqrt", 5, "--max_steps 4", "--max_steps 8", True),
    "other epochs": ("linear", 0, "--max_steps 4 --num_train_epochs 1", "--max_steps 4 --num_train_epochs 2", True),
}


@pytest.mark.parametrize("schedule, warmup, before, now, fits", LENGTHS.values(), ids=LENGTHS)
def test_the_length_of_a_run(parse, tmp_path, schedule, warmup, before, now, fits):
    common = ["--lr_scheduler_type", schedule, "--warmup_steps", warmup]
    trained = flags.deciding(parse(Stage2Arguments, *common, *before.split()))
    args = parse(Stage2Arguments, *common, *now.split())
    if fits:
        flags.check(trained, args, tmp_path)
    else:
        with pytest.raises(UserError, match=f"not {now}(.0)?, on which its {schedule} schedule depends"):
            flags.check(trained, args, tmp_path)


def test_what_takes_effect_from_here_on_is_said(parse, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    before = flags.deciding(parse(Stage2Arguments)) | {"bf16": True}
    flags.check(before, parse(Stage2Arguments), tmp_path)
    assert "--bf16 False from here on, True before" in caplog.text
    flags.check(None, argparse.Namespace(), tmp_path / "old.json")
    assert "old.json: tells no flags of the training, so they are not compared" in caplog.text


def test_deepspeeds_own_optimizer_decides(tmp_path):
    def sections(**config):
        (tmp_path / "ds.json").write_text(json.dumps(config))
        return flags._deepspeed(str(tmp_path / "ds.json"))

    assert sections(zero_optimization={"stage": 2}, gradient_clipping="auto") is None is flags._deepspeed(None)
    assert sections(zero_optimization={"stage": 2}, gradient_clipping=1.0) == {"gradient_clipping": 1.0}
    assert sections(optimizer={"type": "AdamW"}) == {"optimizer": {"type": "AdamW"}} == flags._deepspeed(
        '{"optimizer": {"type": "AdamW"}}')


def state_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_other_flags_are_refused(train, tmp_path, stage):
    """Before anything is loaded or written; also where the run had finished."""
    train(stage, max_steps=2)
    folder = tmp_path / f"stage{stage}"
    before = sorted(folder.rglob("*"))
    for change in ({"learning_rate": 0.5}, {"gradient_accumulation_steps": 2}, {"max_steps": 4}, {"weight_decay": 0.1},
                   {"init_from": folder / "checkpoint-2"}):
        with pytest.raises(UserError, match=f"trained with --{[*change][0]} .*; start a new folder"):
            train(stage, **{"max_steps": 2, **change}, resume_from_checkpoint="auto")
    assert sorted(folder.rglob("*")) == before and len(json.loads((folder / RUN).read_text())["starts"]) == 1


def test_other_pairs_are_refused(train, tmp_path):
    train(2, max_steps=2, lr_scheduler_type="constant")
    path = tmp_path / "stage2/checkpoint-2" / checkpoints.AGREEMENT
    found = json.loads(path.read_text())
    assert found["files"] == {"data_path": sha256(tmp_path / "pairs.json"),
                              "gps_mapping_path": sha256(tmp_path / "gps_mapping.csv")}
    for name in found["files"]:
        path.write_text(json.dumps({**found, "files": {**found["files"], name: "0" * 64}}))
        with pytest.raises(UserError, match=f"trained on another file than --{name} .*; give that of the training"):
            train(2, max_steps=4, lr_scheduler_type="constant", resume_from_checkpoint="auto")


def test_a_constant_schedule_is_extended(train, tmp_path):
    """It ends as the longer run would have, bit for bit."""
    common = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "per_device_train_batch_size": 1}
    train(2, output_dir=tmp_path / "whole", max_steps=6, **common)
    train(2, output_dir=tmp_path / "parts", max_steps=2, **common)
    train(2, output_dir=tmp_path / "parts", max_steps=6, resume_from_checkpoint="auto", **common)
    whole, parts = (state_of(tmp_path / name / "checkpoint-6") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


# --init_from.

@pytest.mark.parametrize("stage, options", [(1, {}), (2, {}), (2, {"low_rank_training": False}),
                                            (2, {"train_encoders": True, "low_rank_training": False})])
def test_weights_alone(train, tmp_path, stage, options):
    """A step that is too small to be seen leaves the weights of the checkpoint, and has its own schedule."""
    train(stage, max_steps=4, output_dir=tmp_path / "first", **options)
    source = tmp_path / "first/checkpoint-4"
    trainer = train(stage, max_steps=2, output_dir=tmp_path / "second", init_from=source, learning_rate=1e-12,
                    lr_scheduler_type="cosine", logging_steps=1, **options)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2]
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(1e-12)
    before, after = state_of(source), state_of(tmp_path / "second/checkpoint-2")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    fresh = state_of(train(stage, max_steps=2, output_dir=tmp_path / "fresh", learning_rate=1e-12, **options)
                     and tmp_path / "fresh/checkpoint-2")
    assert any(not torch.allclose(fresh[name], tensor, atol=1e-4) for name, tensor in before.items())
    start, = json.loads((tmp_path / "second" / RUN).read_text())["starts"]
    assert start["arguments"]["init_from"] == str(source)
    files = {name: about["sha256"] for name, about in start["files"].items() if name.startswith("init_from/")}
    assert files == {f"init_from/{path.name}": sha256(path) for path in source.glob("*.safetensors")} != {}


def test_it_is_interrupted_and_goes_on_from_its_own_checkpoint(train, interrupted, tmp_path):
    train(2, max_steps=4, output_dir=tmp_path / "first")
    options = {"init_from": tmp_path / "first/checkpoint-4", "max_steps": 5, "save_steps": 1, "learning_rate": 0.001}
    train(2, output_dir=tmp_path / "whole", **options)
    with pytest.raises(interrupted):
        train(2, output_dir=tmp_path / "parts", resume_from_checkpoint="auto", interrupt_at=2, **options)
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    train(2, output_dir=tmp_path / "parts", resume_from_checkpoint="auto", **options)
    whole, parts = (state_of(tmp_path / name / "checkpoint-5") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_weights_that_do_not_fit(train, tmp_path):
    train(1, max_steps=2)
    source = tmp_path / "stage1/checkpoint-2"
    (tmp_path / "empty").mkdir()
    for stage, flags_, message in (
            (2, {"init_from": source}, "stage1/checkpoint-2/adapter_config.json: trained with r 4, not 8"),
            (1, {"init_from": source, "seed": 7}, "trained with seed 42, not 7"),
            (1, {"init_from": tmp_path / "nowhere"}, "nowhere: no such folder; name a checkpoint-N"),
            (1, {"init_from": tmp_path / "empty"}, "empty: no adapter_model.safetensors in it")):
        with pytest.raises(UserError, match=message):
            train(stage, output_dir=tmp_path / "other", **flags_)
    assert not list((tmp_path / "other").glob("checkpoint-*"))
    assert TRAINABLE_PARAMS in [path.name for path in source.iterdir()]
