import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ga_llm.llm.right_padding import RIGHT_PADDED, causality_hides, right_padded_mask

LENGTHS = (11, 24, 17)
SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}


def padded(on_the_left=False):
    tokens = torch.randint(50, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return tokens, mask.flip(1) if on_the_left else mask


def trained(model, attention, tokens, mask):
    """Logits at the tokens, and the gradients of their loss."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    logits = model(tokens, attention_mask=mask).logits[mask.bool()]
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("on_the_left", [False, True])
@pytest.mark.parametrize("make", [lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)), lambda: MistralForCausalLM(
    MistralConfig(**SHAPE, sliding_window=9))], ids=["llama", "sliding window"])
def test_logits_and_gradients_are_those_with_a_mask(make, on_the_left):
    torch.manual_seed(0)
    model, batch = make(), padded(on_the_left)
    (logits, gradients), (expected, wanted) = (trained(model, name, *batch) for name in (RIGHT_PADDED, "sdpa"))
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=2e-5, rtol=1e-4)


def test_a_mask_is_made_where_causality_alone_would_not_do():
    _, right = padded()
    _, left = padded(on_the_left=True)
    sizes = (len(LENGTHS), max(LENGTHS), max(LENGTHS))
    assert right_padded_mask(*sizes, attention_mask=right.bool()) is None
    assert right_padded_mask(*sizes, attention_mask=None) is None
    assert right_padded_mask(*sizes, attention_mask=left.bool()).shape == (3, 1, 24, 24)
    assert not causality_hides(right.bool(), 1, max(LENGTHS))       # a token behind a cache, whose padding it sees


def test_sdpa_is_asked_for_causal_attention():
    model, (tokens, mask) = LlamaForCausalLM(LlamaConfig(**SHAPE)), padded()
    model.set_attn_implementation(RIGHT_PADDED)
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        model(tokens, attention_mask=mask)
    assert seen == [(None, True)] * 2
