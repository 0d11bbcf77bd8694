"""Parameters that are cut up among processes: whole again where they must be, and FSDP where accelerate forgets it."""
import contextlib
import dataclasses
from collections.abc import Iterable

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor

from ga_llm.base.cli import UserError


def gathered(parameters: Iterable[nn.Parameter], write: bool = False):
    """A context in which ZeRO-3's parameters are whole; every rank must enter. With `write`, rank 0's changes are kept.
    """
    cut = [p for p in parameters if hasattr(p, "ds_id")]
    if not cut:
        return contextlib.nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if write else None)


@contextlib.contextmanager
def unsharded(module: nn.Module):
    """A context in which the parameters of `module` are whole, to be read: ZeRO-3's and FSDP's. Every rank must enter.
    """
    replaced = []
    with gathered(module.parameters()):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if isinstance(parameter, DTensor):
                    replaced.append((part, name, parameter))
                    part._parameters[name] = nn.Parameter(parameter.full_tensor(), requires_grad=False)
        try:
            yield
        finally:
            for part, name, parameter in replaced:
                part._parameters[name] = parameter


def set_up_fsdp(accelerator, args) -> bool:
    """Make `--fsdp` mean what it says, before the model is prepared; returns whether it is on.

    accelerate 1.15 takes its FSDP plugin over where processes are of the kinds MULTI_GPU, MULTI_XPU, …: MULTI_CPU is
    not in that list (AcceleratorState.__init__), so Trainer trains by DDP and says nothing. What follows the list
    works on gloo as well, so this does for MULTI_CPU what stands under it.
    """
    state = accelerator.state
    if args.fsdp_plugin_args is None:
        return False
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if state.fsdp_plugin.state_dict_type is not StateDictType.FULL_STATE_DICT:
        # Pieces are read through a list of them that is a pickle, which torch executes.
        raise UserError("--fsdp: checkpoints are kept whole; leave out state_dict_type "
                        f"{state.fsdp_plugin.state_dict_type.name}")
    if state.is_fsdp2 and state.fsdp_plugin.mixed_precision_policy is not None:
        # accelerate rounds the loss, and the sum of the gradients, to bf16; DDP and DeepSpeed do not.
        state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(
            state.fsdp_plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
    return True


def leave(accelerator) -> None:
    """The end of a script, for all processes at once: gloo aborts one that leaves its threads, or its peers, behind."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
