"""The CPU's short cut against scaled_dot_product_attention."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ga_llm.llm import tree_attention


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length, past", [(1, 9), (5, 9), (40, 0), (7, 100)])
@pytest.mark.parametrize("few", [0, 512])
def test_equals_sdpa(monkeypatch, kv_heads, length, past, few):
    monkeypatch.setattr(tree_attention, "FEW", few)
    torch.manual_seed(0)
    query = torch.randn(2, 6, length, 8)
    key, value = torch.randn(2, 2, kv_heads, past + length, 8)
    seen = torch.rand(2, 1, length, past + length) < 0.5
    seen[..., -1] = True
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    layer = SimpleNamespace(num_key_value_groups=6 // kv_heads, is_causal=True)
    output, _ = tree_attention.tree_attention(layer, query, key, value, bias, scaling=0.3)
    whole = [part.repeat_interleave(6 // kv_heads, 1) for part in (key, value)]
    expected = F.scaled_dot_product_attention(query, *whole, attn_mask=seen, scale=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_without_a_mask_it_is_causal():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 10, 8)
    output, _ = tree_attention.tree_attention(SimpleNamespace(is_causal=True), query, key, value, None)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))
