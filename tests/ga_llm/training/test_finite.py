"""A training that diverges stops at its first step that is not finite, and leaves what was good."""
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from ga_llm.base.artifacts import TRAINER_LOG
from ga_llm.base.cli import UserError
from ga_llm.training import finite, run_log, staging, trainers

FLAGS = {"max_steps": 8, "save_steps": 1, "save_total_limit": 1, "logging_steps": 1}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("flags", [{}, {"max_grad_norm": 0}, {"gradient_accumulation_steps": 2}])
def test_a_rate_that_is_too_high(train, tmp_path, stage, flags):
    with pytest.raises(UserError, match="not finite, the training has diverged") as error:
        train(stage, learning_rate=1e30, **FLAGS, **flags)
    step = int(re.match(r"step (\d+)", str(error.value))[1])
    folder, last = tmp_path / f"stage{stage}", tmp_path / f"stage{stage}/checkpoint-{step - 1}"
    assert 1 < step < 8 and "\n" not in str(error.value) and "lower --learning_rate 1e+30" in str(error.value)
    assert f"(finite last at step {step - 1}, loss " in str(error.value)
    assert f"from {last} (--init_from)" in str(error.value)
    assert ("--max_grad_norm 1" in str(error.value)) == ("max_grad_norm" in flags)
    assert [line["step"] for line in run_log.read_log(folder / TRAINER_LOG)] == list(range(1, step))
    assert all(line["loss"] > 0 for line in run_log.read_log(folder / TRAINER_LOG))
    assert staging.steps(folder) == [step - 1]
    assert all(tensor.isfinite().all() for file in last.glob("*.safetensors") for tensor in load_file(file).values())


def lose(monkeypatch, what, value):
    """Let one of the three be `value` at the third step."""
    third = {"loss": lambda loss: loss + value, "gradient norm": lambda loss: loss * value}
    compute = trainers.GATrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if self.state.global_step == 2 and what == "weights":
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).view(-1)[-1] = value
        return third.get(what, lambda loss: loss)(loss) if self.state.global_step == 2 else loss

    monkeypatch.setattr(trainers.GATrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient norm", "weights"])
def test_each_is_looked_at(train, tmp_path, monkeypatch, what, value):
    lose(monkeypatch, what, value)
    with pytest.raises(UserError, match=rf"^step 3: (loss and )?.*\b{what}( and weights)? not finite"):
        train(2, **FLAGS)
    assert staging.steps(tmp_path / "stage2") == [2]


def test_the_first_step(train, tmp_path, monkeypatch):
    compute = trainers.GATrainer.compute_loss
    monkeypatch.setattr(trainers.GATrainer, "compute_loss",
                        lambda self, *args, **kwargs: compute(self, *args, **kwargs) * math.nan)
    with pytest.raises(UserError, match=r"^step 1: loss and .* \(finite at no step\); .*, and start again$"):
        train(1, **FLAGS)
    assert staging.steps(tmp_path / "stage1") == []


def test_lora_that_is_too_large_once_it_is_merged(train, tmp_path, monkeypatch):
    """Finite factors, whose product is not: neither the checkpoint nor the encoder appears."""
    gather = trainers.EncoderTrainer.gather

    def overflow(self):
        with torch.no_grad():
            for name, parameter in self.trained[0].encoder.named_parameters():
                if "lora_" in name:
                    parameter.fill_(1e25)
        gather(self)

    train(1, **{**FLAGS, "max_steps": 2}, lr_scheduler_type="constant")
    monkeypatch.setattr(trainers.EncoderTrainer, "gather", overflow)
    with pytest.raises(UserError, match="step 3: merged encoder not finite"):
        train(1, **FLAGS, lr_scheduler_type="constant", resume_from_checkpoint="auto")
    assert sorted(path.name for path in (tmp_path / "stage1").glob("[!.]*/")) == ["2", "checkpoint-2"]


@pytest.mark.parametrize("values", [[1.0, -3.0], [1.0, math.nan], [math.inf, math.nan], [1.0, -math.inf]])
def test_the_largest_weight(values):
    parameters = [torch.nn.Parameter(torch.tensor([value, 0.5])) for value in values] + [
        torch.nn.Parameter(torch.tensor([math.nan]), requires_grad=False)]
    found, expected = finite.largest(parameters).item(), max(map(abs, values))
    assert (math.isnan(found) and any(map(math.isnan, values))) or found == expected


def test_fp16_may_overflow_while_its_scale_falls(train, monkeypatch):
    """torch's GradScaler passes over a step whose gradient overflows, until nothing is left to halve."""
    class Scaler:
        scale = 2.0

        def get_scale(self):
            return self.scale

    trainer = train(2, **{**FLAGS, "max_steps": 1})
    monkeypatch.setattr(trainer.args, "fp16", True)
    trainer.accelerator.scaler = Scaler()
    finite.check_step(trainer, torch.tensor(1.0), math.inf)
    Scaler.scale = 0.5
    with pytest.raises(UserError, match="gradient norm not finite"):
        finite.check_step(trainer, torch.tensor(1.0), math.inf)
