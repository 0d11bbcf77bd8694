"""Whole parameters where DeepSpeed ZeRO-3 has cut them up."""
import contextlib
from collections.abc import Iterable

from torch import nn


def gathered(parameters: Iterable[nn.Parameter], write: bool = False):
    """A context in which the parameters are whole; every rank must enter. With `write`, rank 0's changes are kept."""
    cut = [p for p in parameters if hasattr(p, "ds_id")]
    if not cut:
        return contextlib.nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if write else None)
