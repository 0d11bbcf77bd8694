"""A training that diverges stops: at the first step whose loss, gradient norm or weights are not finite.

Nothing of that step is logged or saved, so no good checkpoint gives way to it. All processes stop at the same step, for
they ask each other.

Departure from transformers, which logs such a loss as the mean of those before (logging_nan_inf_filter), and trains on.
"""
import math
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ga_llm.base.cli import UserError
from ga_llm.training import staging


def check_step(trainer: Trainer, loss: torch.Tensor, grad_norm: torch.Tensor | float | None) -> None:
    """Raises UserError unless the step that has just been made was finite. Every process must call it.

    loss: the sum since the last log line. grad_norm: before it was clipped; None where nobody knows it.
    """
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    if trainer.args.fp16 and _scale(trainer) >= 1:
        grad_norm = None
    found = {"loss": loss, "gradient norm": grad_norm, "weights": largest(trainer.model.parameters())}
    values = torch.stack([torch.as_tensor(0.0 if value is None else value, device=trainer.args.device).float().sum()
                          for value in found.values()])
    broken = (~values.isfinite()).int()
    if trainer.args.world_size > 1:
        torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
    if broken.any():
        raise diverged(trainer, " and ".join(name for name, wrong in zip(found, broken.tolist()) if wrong))


def check_merged(trainer: Trainer, merged: Iterable[dict[str, torch.Tensor]]) -> None:
    """Raises UserError where LoRA, though finite, is no more so once it is multiplied out."""
    if not all(tensor.isfinite().all() for state in merged for tensor in state.values()):
        raise diverged(trainer, "merged encoder")


def largest(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor | None:
    """The largest magnitude among what this process holds of the trained parameters; NaN if one is NaN."""
    held = [getattr(p, "ds_tensor", p).detach() for p in parameters if p.requires_grad]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in held]
    held = [p for p in held if p.numel()]
    return torch.nn.utils.get_total_norm(held, norm_type=math.inf) if held else None


def _scale(trainer: Trainer) -> float:
    """By what fp16 multiplies the loss: while it is above 1, a gradient may overflow, and the step is passed over."""
    scaler = trainer.accelerator.scaler
    return math.inf if scaler is None else scaler.get_scale()


def diverged(trainer: Trainer, what: str) -> UserError:
    args, step = trainer.args, trainer.state.global_step
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    before = (f"finite last at step {step - 1}" + (f", loss {losses[-1]:.4g}" if losses else "") if step > 1 else
              "finite at no step")
    last = staging.last_checkpoint(args.output_dir)
    clip = "" if args.max_grad_norm > 0 else " or set --max_grad_norm 1"
    again = "start again" if last is None else f"start a new folder, if you like from {last} (--init_from)"
    return UserError(f"step {step}: {what} not finite, the training has diverged ({before}); lower --learning_rate "
                     f"{args.learning_rate:g}{clip}, or raise --warmup_steps {args.warmup_steps:g}, and {again}")
