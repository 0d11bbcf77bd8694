"""A base in 4 bits: adapters that were trained on it belong to its weights as they were rounded, and to no others."""
import importlib.util
import logging

import torch
import transformers

from ga_llm.base.cli import UserError

log = logging.getLogger(__name__)

NF4, NONE = "nf4", "none"


def kind(model) -> str:
    """What a loaded LLM's weights are, as checkpoints remember it."""
    found = getattr(model.config, "quantization_config", None)
    return NF4 if getattr(found, "load_in_4bit", False) else NONE


def describe(found: str) -> str:
    return {NF4: "in 4 bits (NF4)", NONE: "not quantized"}[found]


def choose(trained: str | None, wanted: bool | None) -> bool:
    """Whether to load the base in 4 bits, with one line where it is not as it was `trained` (None: not known).

    wanted: the flag; None: as it was trained, or if that is not known, on a GPU.
    """
    if trained is None:
        return (torch.cuda.is_available() if wanted is None else wanted)
    four_bit, why = trained == NF4 if wanted is None else wanted, f"--load_in_4bit {wanted}"
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        four_bit, why = False, "bitsandbytes is not installed; pip install bitsandbytes"
    found = NF4 if four_bit else NONE
    if found != trained:
        log.warning("the base was %s in training and is %s here (%s): this is not the model that was trained",
                    describe(trained), describe(found), why)
    return four_bit


def check(path, trained: str | None, model) -> None:
    """Raises UserError unless a training's base is as its checkpoint, whose agreement is `path`, says."""
    found = kind(model)
    if trained not in (None, found):
        raise UserError(f"{path}: trained on a base {describe(trained)}, this one is {describe(found)}; give "
                        f"--load_in_4bit {trained == NF4}" + ", and pip install bitsandbytes" * (trained == NF4))


@torch.no_grad()
def dequantize(model):
    """The same weights, as they were rounded, in the dtype that `model` was loaded in."""
    if kind(model) == NONE:
        return model
    loudness = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()        # it says to which dtype
    try:
        return model.dequantize(model.dtype)
    finally:
        transformers.utils.logging.set_verbosity(loudness)
