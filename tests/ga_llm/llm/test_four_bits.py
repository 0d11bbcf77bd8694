"""A base in 4 bits is evaluated as it was trained, or a line says that it is not."""
import importlib.util
import logging

import pytest
import torch

from ga_llm.base.cli import UserError
from ga_llm.llm import backbone, four_bits

CASES = {       # trained, --load_in_4bit, bitsandbytes is there: what comes of it, what the line says
    "as trained": ("nf4", None, True, True, None), "as trained, not quantized": ("none", None, True, False, None),
    "said so": ("nf4", True, True, True, None), "said so, too": ("none", False, True, False, None),
    "not wanted": ("nf4", False, True, False, "--load_in_4bit False"),
    "wanted": ("none", True, True, True, "--load_in_4bit True"),
    "no package": ("nf4", None, False, False, "pip install bitsandbytes"),
    "no package, and none needed": ("none", None, False, False, None),
    "not known": (None, None, True, torch.cuda.is_available(), None),
    "not known, wanted": (None, True, True, True, None),
}


@pytest.mark.parametrize("trained, wanted, installed, expected, line", CASES.values(), ids=CASES)
def test_what_is_loaded(monkeypatch, caplog, trained, wanted, installed, expected, line):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    caplog.set_level(logging.INFO)
    assert four_bits.choose(trained, wanted) == expected
    assert (line is None and not caplog.records) or (line in caplog.text and "not the model that was" in caplog.text)


@pytest.fixture
def load(tiny_llama):
    pytest.importorskip("bitsandbytes")
    return lambda four_bit: backbone.load_llm(tiny_llama(), 256, "sdpa", torch.float32, four_bit).eval()


def test_dequantized_weights_are_those_that_were_rounded(load):
    """Its logits are those of 4 bits but for bf16's rounding within, and not those of the unquantized base."""
    ids = torch.arange(3, 60)[None]
    quantized, dequantized, plain = load(True), four_bits.dequantize(load(True)), load(False)
    assert [four_bits.kind(model) for model in (quantized, dequantized, plain)] == ["nf4", "none", "none"]
    assert four_bits.dequantize(plain) is plain and dequantized.dtype == torch.float32
    with torch.no_grad():
        found = [model(ids).logits for model in (quantized, dequantized, plain)]
    assert (found[0] - found[1]).abs().max() < 0.1 * (found[0] - found[2]).abs().max()


def test_resuming_on_another_base(load, tmp_path):
    four_bits.check(tmp_path, None, load(True))
    four_bits.check(tmp_path, "nf4", load(True))
    with pytest.raises(UserError, match="in 4 bits .NF4., this one is not quantized; give --load_in_4bit True, "):
        four_bits.check(tmp_path, "nf4", load(False))
    with pytest.raises(UserError, match="base not quantized, this one is in 4 bits .NF4.; give --load_in_4bit False$"):
        four_bits.check(tmp_path, "none", load(True))
