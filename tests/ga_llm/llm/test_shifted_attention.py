"""S²-Attn against a dense mask, at awkward lengths, with padding, grouped queries and gradient checkpointing."""
import types

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ga_llm.llm import shifted_attention as s2
from ga_llm.pairs.sft_data import AnswerCollator

TRAIN, EVAL = types.SimpleNamespace(training=True), types.SimpleNamespace(training=False)


def qkv(batch, heads, kv_heads, length, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, h, length, width, generator=generator) for h in (heads, kv_heads, kv_heads))


def assert_equals_dense_mask(out, q, k, v, mask, scale=None):
    """`out` and its gradients are those of the dense mask of groups of 8, on the tokens that are no padding."""
    heads, length, repeats = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    allowed = s2.dense_mask(length, 8, heads)[None] & mask[:, None, None, :]
    dense = F.scaled_dot_product_attention(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1),
                                           attn_mask=allowed, scale=scale)
    real = mask[:, None, :, None].expand_as(dense)
    got, wanted = out.transpose(1, 2)[real], dense[real]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(got.square().sum(), (q, k, v)),
                            torch.autograd.grad(wanted.square().sum(), (q, k, v))):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_group_rule():
    assert [s2.group_size(n) for n in (583, 4096, 4274, 8192, 32768)] == [8192, 1024, 8192, 2048, 8192]
    assert s2.group_bounds(10, 4, 0) == [0, 4, 8, 10]
    assert s2.group_bounds(10, 4, 2) == [0, 2, 6, 10]
    assert s2.group_bounds(3, 8, 4) == [0, 3]


def test_dense_mask_by_hand():
    mask = s2.dense_mask(6, 4, heads=2)
    assert mask[0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
                                      [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert mask[1].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0],
                                      [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("length, batch", [(583, 3), (4274, 1), (4096, 2), (8192, 1)])
def test_equals_dense_mask(length, batch):
    q, k, v = qkv(batch, 2, 2, length)
    out, weights = s2.shifted_sparse_attention(TRAIN, q, k, v, None)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=s2.dense_mask(length, s2.group_size(length), 2))
    assert weights is None and out.shape == (batch, length, 2, 8)
    torch.testing.assert_close(out.transpose(1, 2), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [7, 16, 37])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_small_groups_padding_and_grouped_queries(monkeypatch, length, side):
    """Nine heads over three keys, groups of 8, padding on either side: equal to the dense mask on real tokens."""
    monkeypatch.setattr(s2, "group_size", lambda n: 8)
    q, k, v = (x.requires_grad_() for x in qkv(2, 9, 3, length))
    mask = torch.ones(2, length, dtype=torch.bool)
    if side != "none":
        mask[1, slice(0, 3) if side == "left" else slice(length - 3, None)] = False
    given = s2.shifted_sparse_mask(2, length, length, attention_mask=mask)
    assert (given is None) == (side != "left")

    out, _ = s2.shifted_sparse_attention(TRAIN, q, k, v, given)
    assert_equals_dense_mask(out, q, k, v, mask)


def tiny(**options):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM._from_config(config, **options)


def test_eval_is_full_attention_with_cache_and_padding():
    model = tiny(attn_implementation=s2.SHIFTED_SPARSE).eval()
    plain = tiny(attn_implementation="sdpa").eval()
    ids = torch.randint(0, 50, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    generated = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
                            output_logits=True, return_dict_in_generate=True) for m in (model, plain)]
    ours, plain = (torch.stack(output.logits) for output in generated)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_whole_model_equals_dense_mask_with_gradient_checkpointing(monkeypatch):
    monkeypatch.setattr(s2, "group_size", lambda n: 8)
    model = tiny(attn_implementation=s2.SHIFTED_SPARSE).train()
    plain = tiny(attn_implementation="sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 50, (2, 21))
    model(ids, labels=ids).loss.backward()
    allowed = s2.dense_mask(21, 8, 4)[None].expand(2, -1, -1, -1)
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    plain(ids, attention_mask=bias, labels=ids).loss.backward()
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.fixture
def flash(monkeypatch):
    """flash-attn's variable-length call, which a loop over the cumulative lengths stands in for here, with gradients;
    it serves as it would on a GPU. Returns the list of its calls' (sequences, heads)."""
    calls = []

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size):
        left, right = window_size       # how many tokens before and behind it one sees; -1: all
        assert causal and (left == right == -1 or left >= right == 0)
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and cu_q[-1] == len(q)
        assert max_q == max_k == (cu_q[1:] - cu_q[:-1]).max() and (cu_q[1:] > cu_q[:-1]).all()
        assert q.shape == k.shape == v.shape and dropout_p == 0
        calls.append((len(cu_q) - 1, q.shape[1]))
        seen = torch.ones(max_q, max_q, dtype=torch.bool).tril().triu(-left if left >= 0 else -max_q)
        pieces = [F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), scale=softmax_scale,
                                                 attn_mask=seen[:b - a, :b - a]).transpose(0, 1)
                  for a, b in zip(cu_q.tolist(), cu_q[1:].tolist())]
        return torch.cat(pieces)

    monkeypatch.setattr(s2, "flash_attn_varlen_func", varlen)
    monkeypatch.setattr(s2, "_flash_serves", lambda query, mask: mask is None)
    return calls


@pytest.mark.parametrize("length, shift", [(37, 0), (37, 4), (5, 4), (16, 4)])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_flash_groups_equal_sdpa(flash, length, shift, window):
    q, k, v = (x.requires_grad_() for x in qkv(3, 4, 4, length))
    bounds = s2.group_bounds(length, 8, shift)
    options = {"mask": None, "scale": 0.3, "dropout": 0.0, "window": window}
    mine, theirs = (attend(q, k, v, bounds, **options) for attend in (s2._attend_flash, s2._attend_sdpa))
    assert flash == [(3 * (len(bounds) - 1), 4)]
    torch.testing.assert_close(mine, theirs)
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (mine, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (9, 9), (7, 1), (4, 2)])
@pytest.mark.parametrize("length", [5, 16, 37])
def test_flash_path_equals_dense_mask(flash, monkeypatch, heads, kv_heads, length):
    """Grouped queries, odd head counts and right padding, forward and backward, through the whole function."""
    monkeypatch.setattr(s2, "group_size", lambda n: 8)
    q, k, v = (x.requires_grad_() for x in qkv(2, heads, kv_heads, length))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length - 3:] = False
    given = s2.shifted_sparse_mask(2, length, length, attention_mask=mask)
    out, _ = s2.shifted_sparse_attention(TRAIN, q, k, v, given, scaling=0.3)
    assert [of for _, of in flash] == [heads // 2, heads - heads // 2]

    assert_equals_dense_mask(out, q, k, v, mask, scale=0.3)


@pytest.mark.parametrize("path", ["flash", "sdpa"])
def test_collated_batch_equals_its_sequences_alone(request, monkeypatch, path):
    """What our collator pads on the right changes neither loss nor gradients, on either path."""
    calls = request.getfixturevalue("flash") if path == "flash" else []
    monkeypatch.setattr(s2, "group_size", lambda n: 8)
    model = tiny(attn_implementation=s2.SHIFTED_SPARSE).train()
    generator = torch.Generator().manual_seed(2)
    items = [{"input_ids": torch.randint(1, 50, (n,), generator=generator).tolist(), "answer_start": n - 4}
             for n in (21, 13)]        # the same number of answer tokens, so that the batch's loss is their mean
    collate = AnswerCollator(pad_token_id=0)

    def loss_and_gradients(batch):
        loss = model(**batch).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    together = loss_and_gradients(collate(items))
    assert len(calls) == (4 if path == "flash" else 0)      # two halves of the heads in two layers
    for mine, *alone in zip(together, *(loss_and_gradients(collate([item])) for item in items)):
        torch.testing.assert_close(mine, sum(alone) / 2, rtol=1e-3, atol=1e-6)


def test_flash_serves_half_precision_on_a_gpu_without_a_mask(monkeypatch):
    def query(is_cuda=True, dtype=torch.bfloat16):
        return types.SimpleNamespace(is_cuda=is_cuda, dtype=dtype)

    monkeypatch.setattr(s2, "flash_attn_varlen_func", None)     # as where it is not installed
    assert not s2._flash_serves(query(), None)
    monkeypatch.setattr(s2, "flash_attn_varlen_func", lambda *args, **kwargs: None)
    assert s2._flash_serves(query(), None) and s2._flash_serves(query(dtype=torch.float16), None)
    assert not s2._flash_serves(query(is_cuda=False), None)
    assert not s2._flash_serves(query(dtype=torch.float32), None)
    assert not s2._flash_serves(query(), torch.ones(1, 4, dtype=torch.bool))
