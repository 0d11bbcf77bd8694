"""Shifted sparse attention (S²-Attn of LongLoRA, arXiv 2309.12307) as a transformers attention function.

In training, half the heads attend causally inside groups of g tokens that start at 0, the other half inside groups
that start at g/2. In eval it is full causal attention. Load a model with `attn_implementation=SHIFTED_SPARSE`. A model
with a sliding window (Mistral 7B v0.1: 4096) keeps it: within its group a token sees no further back.

Departure from LongLoRA's path without flash-attn: that one rolls the sequence, so the first g/2 tokens of the shifted
heads share a group with the last g/2. Here nothing wraps around: their first group is g/2 long.
"""
import itertools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from ga_llm.llm.right_padding import causality_hides

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

SHIFTED_SPARSE = "shifted_sparse"


def group_size(length: int) -> int:
    """Tokens per group: length/4 where the length divides by 4096, else 8192 (LongLoRA's rule)."""
    return length // 4 if length % 4096 == 0 else 8192


def group_bounds(length: int, group: int, shift: int) -> list[int]:
    """Where the groups of a sequence begin and end: [0, …, length]; a shift makes the first group that long."""
    starts = range(shift or group, length, group)
    return [0, *starts, length]


def dense_mask(length: int, group: int, heads: int, window: int | None = None) -> torch.Tensor:
    """(heads, length, length) bool, True where attended: what the groups amount to. For tests and for reading."""
    position = torch.arange(length)
    causal = position[:, None] >= position[None, :]
    if window is not None:
        causal &= position[:, None] - position[None, :] < window
    masks = []
    for shift in (0, group // 2):
        index = (position + (group - shift if shift else 0)) // group
        masks.append(causal & (index[:, None] == index[None, :]))
    return torch.stack([masks[0 if head < heads // 2 else 1] for head in range(heads)])


@torch.compiler.disable     # its groups follow from the length
def shifted_sparse_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                             sliding_window=None, **kwargs):
    """The AttentionInterface function.

    query (B, H, S, D), key and value (B, KV heads, S, D), all after RoPE; attention_mask (B, S) bool or None;
    sliding_window: how many tokens one sees, itself included, or None. Returns (B, S, H, D) and None.
    """
    # Under autocast an fp32 model's RoPE leaves fp32, which would be copied into groups, and which flash-attn refuses.
    query, key = query.to(value.dtype), key.to(value.dtype)
    heads, length = query.shape[1:3]
    if key.shape[1] != heads:
        # Halving the heads may cut through a group of queries that share a key, so give each query its own.
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    options = {"mask": attention_mask, "scale": scaling, "dropout": dropout if module.training else 0.0,
               "window": sliding_window}
    if not module.training:
        return _attend_causally(query, key, value, **options).transpose(1, 2), None

    group, half = group_size(length), heads // 2
    attend = _attend_flash if _flash_serves(query, attention_mask) else _attend_sdpa
    # split, and no slices: its gradient is put together once, that of a slice is padded with zeros to full size.
    parts = zip(*(x.split([half, heads - half], dim=1) for x in (query, key, value)))
    halves = [attend(*part, group_bounds(length, group, shift), **options)
              for part, shift in zip(parts, (0, group // 2))]
    return torch.cat(halves, dim=1).transpose(1, 2), None


def _flash_serves(query, mask) -> bool:
    return (flash_attn_varlen_func is not None and query.is_cuda and mask is None
            and query.dtype in (torch.float16, torch.bfloat16))


def _attend_flash(query, key, value, bounds, mask, scale, dropout, window):
    """Every group of every sequence is one entry of flash-attn's variable-length call."""
    batch, heads, length, width = query.shape
    starts = torch.arange(batch, device=query.device)[:, None] * length
    ends = torch.tensor(bounds[1:], device=query.device)[None, :]
    cumulative = F.pad((starts + ends).flatten(), (1, 0)).to(torch.int32)
    longest = max(end - start for start, end in zip(bounds, bounds[1:]))
    query, key, value = (x.transpose(1, 2).reshape(batch * length, heads, width) for x in (query, key, value))
    out = flash_attn_varlen_func(query, key, value, cumulative, cumulative, longest, longest, dropout_p=dropout,
                                 softmax_scale=scale, causal=True,
                                 window_size=(-1, -1) if window is None else (window - 1, 0))
    return out.view(batch, length, heads, width).transpose(1, 2)


def _attend_sdpa(query, key, value, bounds, mask, scale, dropout, window):
    """Runs of groups of equal length go through SDPA together, as one batch."""
    batch, heads, _, width = query.shape
    lengths = [end - start for start, end in zip(bounds, bounds[1:])]
    runs = [(group, len(list(equal))) for group, equal in itertools.groupby(lengths)]
    sizes = [group * groups for group, groups in runs]
    masks = mask.split(sizes, dim=1) if mask is not None else [None] * len(runs)
    outputs = []
    for (group, groups), padding, *piece in zip(runs, masks, *(x.split(sizes, dim=2) for x in (query, key, value))):
        q, k, v = (x.reshape(batch, heads, groups, group, width).transpose(1, 2).flatten(0, 1) for x in piece)
        padding = None if padding is None else padding.reshape(batch * groups, group)
        out = _attend_causally(q, k, v, padding, scale, dropout, window)
        outputs.append(out.view(batch, groups, heads, group, width).transpose(1, 2).flatten(2, 3))
    return torch.cat(outputs, dim=2)


def _attend_causally(query, key, value, mask, scale, dropout, window):
    """Causal attention, with a cache or without; mask (B, keys) bool, True where there is a token, or None."""
    queries, keys = query.shape[2], key.shape[2]
    allowed = None
    if mask is not None or queries != keys or (window is not None and window < keys):
        if mask is None:
            mask = torch.ones(1, keys, dtype=torch.bool, device=query.device)
        allowed = _allowed(mask, queries, window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout,
                                          is_causal=allowed is None, scale=scale)


def _allowed(mask, queries, window):
    """(B, keys) bool, True where there is a token, to (B, 1, queries, keys); the queries are the last keys.

    A padding token attends to itself, for a softmax over nothing is not a number.
    """
    keys = mask.shape[1]
    column = torch.arange(keys, device=mask.device)
    row = column[keys - queries:, None]
    causal = column <= row
    if window is not None:
        causal &= row - column < window
    return (causal & mask[:, None, None, :]) | (column == row)


def shifted_sparse_mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    """The AttentionMaskInterface function: (B, keys) bool, or None where causality alone hides the padding."""
    mask = flash_attention_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)
    return None if causality_hides(mask, q_length, kv_length) else mask


AttentionInterface.register(SHIFTED_SPARSE, shifted_sparse_attention)
AttentionMaskInterface.register(SHIFTED_SPARSE, shifted_sparse_mask)
