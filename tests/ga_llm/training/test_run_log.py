"""The lines of a run, on a terminal and elsewhere; the files it leaves; what resuming does to them."""
import hashlib
import json
import logging
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import LlamaForCausalLM

from ga_llm.base.artifacts import LOSS_PICTURE, RUN, TRAINER_LOG
from ga_llm.base.cli import UserError
from ga_llm.pairs import sft_data
from ga_llm.training import arguments, run_log

LENGTHS = (8, 6, 4, 6)      # batches of two in this order: 14 tokens of 16 positions, 10 of 12


class Pairs(torch.utils.data.Dataset):
    sha256 = "of the data"

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return {"input_ids": np.arange(1, LENGTHS[index] + 1), "answer_start": LENGTHS[index] - 2}


@pytest.fixture
def make(tiny_llama, mapping_csv, tmp_path):
    """make(**flags): a LoggedTrainer of a tiny Llama and four pairs, two to a batch, in order."""
    def run(**flags):
        data = tmp_path / "pairs.json"
        data.write_text("[]")
        options = {"model_name_or_path": tiny_llama(), "data_path": data, "gps_mapping_path": mapping_csv,
                   "output_dir": tmp_path / "out", "per_device_train_batch_size": 2, "logging_steps": 1, "max_steps": 4,
                   "save_strategy": "no", "train_sampling_strategy": "sequential", "activation_checkpointing": False,
                   **flags}
        args = arguments.parse(arguments.SFTArguments, [p for k, v in options.items() for p in (f"--{k}", str(v))])
        torch.manual_seed(0)
        return run_log.LoggedTrainer(model=LlamaForCausalLM.from_pretrained(tiny_llama()), args=args,
                                     train_dataset=Pairs(), data_collator=sft_data.AnswerCollator(0))
    return run


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: it gains a second with each training step."""
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        def time(self):
            return self.now

    clock, step = Clock(), run_log.Trainer.training_step
    monkeypatch.setattr(run_log, "time", clock)

    def training_step(self, *args, **kwargs):
        clock.now += 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(run_log.Trainer, "training_step", training_step)
    return clock


def test_lines_by_hand(make, clock, tmp_path, caplog):
    """One step a second: 14 tokens in 16 positions, then 10 in 12, and again."""
    caplog.set_level(logging.INFO)
    make(learning_rate="3e-3", lr_scheduler_type="constant").train()
    lines = run_log.read_log(tmp_path / "out" / TRAINER_LOG)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [0.5, 1, 1.5, 2]
    assert [line["tokens_per_second"] for line in lines] == [14, 10, 14, 10]
    assert [line["padding_share"] for line in lines] == [0.125, 0.1667, 0.125, 0.1667]
    assert [line["elapsed_seconds"] for line in lines] == [1, 2, 3, 4]
    assert all(line["learning_rate"] == 3e-3 and line["grad_norm"] > 0 for line in lines)
    assert lines[3]["loss"] < lines[1]["loss"] and lines[2]["loss"] < lines[0]["loss"]
    shown = [record.getMessage() for record in caplog.records if record.name == run_log.__name__]
    assert shown[0] == f"step 1/4 epoch 0.50 loss {lines[0]['loss']:.4g} lr 0.003 14 tok/s 12 % padding eta 0:00:03"
    assert len(shown) == 4 and shown[3].endswith("10 tok/s 17 % padding eta 0:00:00")


def test_a_line_covers_all_steps_since_the_one_before(make, clock, tmp_path):
    """Two steps of two micro-batches each: 24 tokens of 28 positions a step."""
    make(logging_steps=2, gradient_accumulation_steps=2).train()
    lines = run_log.read_log(tmp_path / "out" / TRAINER_LOG)
    assert [(line["step"], line["tokens_per_second"], line["padding_share"]) for line in lines] == [
        (2, 12, 0.1429), (4, 12, 0.1429)]


def test_the_last_step_has_a_line(make, clock, tmp_path):
    """Three of the four steps are 38 tokens, and the last is 10."""
    make(logging_steps=3).train()
    lines = run_log.read_log(tmp_path / "out" / TRAINER_LOG)
    assert [(line["step"], line["tokens_per_second"], line["elapsed_seconds"]) for line in lines] == [
        (3, 12.7, 3), (4, 10, 4)]
    make(logging_strategy="no", output_dir=tmp_path / "none").train()
    assert run_log.read_log(tmp_path / "none" / TRAINER_LOG) == []


def test_without_a_mask_nothing_is_padding(make, clock, tmp_path):
    trainer, collate = make(per_device_train_batch_size=1, max_steps=1), sft_data.AnswerCollator(0)
    trainer.data_collator = lambda batch: {k: v for k, v in collate(batch).items() if k != "attention_mask"}
    trainer.train()
    line, = run_log.read_log(tmp_path / "out" / TRAINER_LOG)
    assert (line["tokens_per_second"], line["padding_share"]) == (8, 0)


def test_resuming_repeats_no_step(make, clock, tmp_path):
    """A run killed behind step 3 goes on from checkpoint-2: lines of 3 go, and what was left of a fourth."""
    make(save_strategy="steps", save_steps=2, max_steps=3).train()
    path = tmp_path / "out" / TRAINER_LOG
    before = run_log.read_log(path)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert run_log.read_log(path) == before and len(before) == 3
    clock.now += 1000
    checkpoint = str(tmp_path / "out/checkpoint-2")
    make(max_steps=4, resume_from_checkpoint=checkpoint).train(resume_from_checkpoint=checkpoint)
    after = run_log.read_log(path)
    assert after[:2] == before[:2]
    assert [(line["step"], line["elapsed_seconds"]) for line in after] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    starts = json.loads((tmp_path / "out" / RUN).read_text())["starts"]
    assert [start["from_step"] for start in starts] == [0, 2]
    assert [start["arguments"]["max_steps"] for start in starts] == [3, 4]
    assert imread(tmp_path / "out" / LOSS_PICTURE).shape[0] > 400


def test_run_json(make, tmp_path, mapping_csv, tiny_llama):
    make(max_steps=1, seed=7).train()
    start, = json.loads((tmp_path / "out" / RUN).read_text())["starts"]
    assert start["seed"] == 7 and start["arguments"]["learning_rate"] == 5e-5
    assert start["command"] == shlex.join(sys.orig_argv)
    assert start["versions"]["torch"] == torch.__version__ and "python" in start["versions"]
    assert start["files"]["data_path"] == {"path": str(tmp_path / "pairs.json"), "sha256": Pairs.sha256}
    assert start["files"]["gps_mapping_path"]["sha256"] == hashlib.sha256(mapping_csv.read_bytes()).hexdigest()
    assert start["base_model"]["config"]["model_type"] == "llama" and start["base_model"]["path"] == tiny_llama()
    assert start["machine"]["world_size"] == 1 and start["machine"]["cpu"]


def test_base_models_are_told_apart(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    seen = set()
    for content in (b"1", b"12"):
        weights.write_bytes(content)
        seen.add(run_log.describe_model_folder(str(tmp_path), None)["files_sha256"])
    weights.rename(tmp_path / "other.safetensors")
    seen.add(run_log.describe_model_folder(str(tmp_path), None)["files_sha256"])
    assert len(seen) == 3


def test_git_state(tmp_path):
    def git(*command):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True,
                       capture_output=True)

    code = tmp_path / "ga_llm/training/run_log.py"
    code.parent.mkdir(parents=True)
    code.write_text("1")
    assert run_log.git_state(tmp_path) is None
    git("init")
    assert run_log.git_state(tmp_path) is None      # in a repository, yet not of it
    git("add", "ga_llm")
    git("commit", "-m", "one")
    clean = run_log.git_state(tmp_path)
    assert len(clean["commit"]) == 40 and not clean["dirty"]
    code.write_text("2")
    assert run_log.git_state(tmp_path) == {**clean, "dirty": True}


def test_infinite_gradients_stay_json():
    assert json.loads(run_log._json_line({"grad_norm": float("inf"), "loss": 1.5})) == {"grad_norm": None, "loss": 1.5}


def test_one_bar_on_a_terminal(make, capfd, caplog, monkeypatch):
    """A single bar that carries the latest numbers, and no line beside it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer = make()
    assert not trainer.args.disable_tqdm
    capfd.readouterr()
    trainer.train()
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.split("\r")[-1].startswith("100%")
    assert "4/4" in err and "tok/s" in err and "% padding" in err
    assert not [record for record in caplog.records if record.name == run_log.__name__]


def test_tensorboard_gets_the_same_numbers(make, clock, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make(report_to="tensorboard").train()
    folder, = (tmp_path / "out" / "runs").iterdir()
    scalars = events.EventAccumulator(str(folder)).Reload()
    for name, expected in (("tokens_per_second", [14, 10, 14, 10]), ("padding_share", [0.125, 0.1667] * 2)):
        found = scalars.Scalars(f"train/{name}")
        assert [event.step for event in found] == [1, 2, 3, 4]
        assert [event.value for event in found] == pytest.approx(expected)


def test_tensorboard_that_is_missing_is_one_line(make, monkeypatch):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", list)
    with pytest.raises(UserError, match="--report_to tensorboard: .*pip install tensorboard") as error:
        make(report_to="tensorboard")
    assert "\n" not in str(error.value)


def test_the_start_that_came_to_a_step(tmp_path):
    path = tmp_path / RUN
    assert run_log.read_start(path) == {}
    for n, step in enumerate((0, 4, 4, 8), start=1):
        run_log.add_start(path, {"from_step": step, "n": n})
    found = {step: run_log.read_start(path, step)["n"] for step in (1, 4, 5, 8, 9, None)}
    assert found == {1: 1, 4: 1, 5: 3, 8: 3, 9: 4, None: 4}
    path.write_text('{"starts": 7}')
    assert run_log.read_start(path, 4) == {}


@pytest.mark.parametrize("folder, step", [("O/checkpoint-4", 4), ("O/checkpoint-12/limit4", 12), ("O/checkpoint", None),
                                          ("checkpoint-1/checkpoint-2/x", 2), ("O/checkpoint-x", None)])
def test_the_step_of_a_folder(folder, step):
    assert run_log.step_of(folder) == step
