"""Shared-prefix training: what several pairs begin with is computed once, in the forward and the backward pass.

A user's pairs repeat each other's history: in the file's order each history begins with the one before. So consecutive
pairs become one tree: the longest shared beginning is the trunk, and what is a pair's own (its current trajectory,
question and answer) is a branch, which attends to itself and to as much of the trunk as the pair begins with. Every
token has the position that it would have alone, so loss and gradients are those of the pairs one by one.

    trunk          a b c d e f          a tree of the pairs  a b c x y,  a b c d e z  and  a b c d e f w
    branches       x y | z | w          positions  0 1 2 3 4 5 | 3 4 | 5 | 6

It is exact for full attention alone: a token's vector depends on all that it attends to, and S²-Attn's groups follow
from where a pair ends. A pair that was cut on the left begins with other tokens and shares nothing.
"""
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import AttentionInterface, AttentionMaskInterface

from ga_llm.base.cli import UserError
from ga_llm.llm import pointing
from ga_llm.pairs.token_cache import TokenDataset

SHARED_PREFIX = "shared_prefix"     # what `attn_implementation` calls it
LEAST = 32                          # a pair joins a tree if that saves at least so many tokens
COPIES = 2**30                      # bytes of a layer's keys and values that may be kept for the backward pass


@dataclasses.dataclass(frozen=True)
class Tree:
    """Consecutive pairs, the first of them `first`; how many tokens of the trunk each begins with (never falling, the
    last one's are the trunk); and how many tokens the tree has."""
    first: int
    shared: tuple[int, ...]
    tokens: int


def plan(dataset: TokenDataset, limit: int) -> list[Tree]:
    """Cut the pairs into trees of at most `limit` tokens; a pair that shares nothing is a tree by itself."""
    trees = []
    shared, tokens, before = [], 0, None
    for i, length in enumerate(dataset.lengths.tolist()):
        ids = dataset[i]["input_ids"]
        if shared:
            alike = common(before, ids)
            joined = [min(own, alike) for own in shared[:-1]] + [alike]
            # The last pair's tokens are the trunk and its branch; of the others, what is their own.
            others = sum(dataset.lengths[i - len(joined):i].tolist()) - sum(joined)
            if others + length <= min(limit, tokens + length - LEAST):
                shared, tokens = [*joined, alike], others + length
            else:
                trees.append(Tree(i - len(shared), tuple(shared), tokens))
                shared = []
        if not shared:
            shared, tokens = [0], length
        before = ids
    return [*trees, Tree(len(dataset) - len(shared), tuple(shared), tokens)]


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two pairs begin with alike."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


class TreeDataset(Dataset):
    """The trees of a data set's pairs. lengths: (trees,) tokens of each."""

    def __init__(self, dataset: TokenDataset, limit: int):
        self.dataset, self.trees = dataset, plan(dataset, limit)
        self.lengths = np.array([tree.tokens for tree in self.trees])

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> dict:
        tree = self.trees[index]
        return {"pairs": [self.dataset[tree.first + i] for i in range(len(tree.shared))], "shared": tree.shared}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the trunks and branches of one row lie, in tokens.

    blocks: the length of each trunk and branch. parts: the same, but with every trunk cut where branches leave it.
    sees: for each block, the parts that it attends to, in order; its own stand last.
    """
    blocks: list[int]
    parts: list[int]
    sees: list[list[int]]

    @property
    def seen(self) -> int:
        """How many keys the blocks attend to, in all."""
        return sum(self.parts[i] for sees in self.sees for i in sees)


class TreeCollator:
    """Trees side by side in one row, without padding; the LLM computes logits where an answer's token comes next.

    Returns input_ids and position_ids (1, S); logits_to_keep (K,), positions in the row; labels and shift_labels
    (1, K), the token that comes next there; layout, for the attention. Pairs with `targets` share those of the trunk,
    too: they count once. places: how many there are, where the pairs are `PointedPairs`.
    """

    def __init__(self, places: int | None = None):
        self.places = places

    def __call__(self, batch: Sequence[dict]) -> dict:
        ids, positions, keep, targets, layout, at = [], [], [], [], Layout([], [], []), 0
        pairs, where, labels = [], [], []       # for the pointer: of each pair, where its tokens stand, and its labels
        for tree in batch:
            trunk, cuts = tree["shared"][-1], sorted({0, *tree["shared"]})
            ids.append(tree["pairs"][-1]["input_ids"][:trunk])
            positions.append(np.arange(trunk))
            first = len(layout.parts)
            layout.parts.extend(np.diff(cuts).tolist())
            of_trunk = list(range(first, len(layout.parts)))
            if trunk:
                layout.blocks.append(trunk)
                layout.sees.append(of_trunk)
            begin, at = at, at + trunk
            for i, (pair, shared) in enumerate(zip(tree["pairs"], tree["shared"])):
                own, length = pair["input_ids"], len(pair["input_ids"])
                ids.append(own[shared:])
                positions.append(np.arange(shared, length))
                if length > shared:
                    layout.blocks.append(length - shared)
                    layout.sees.append([*of_trunk[:cuts.index(shared)], len(layout.parts)])
                    layout.parts.append(length - shared)
                # Where a shared beginning reaches into the answers, a trunk's token has several that come next.
                predicts = np.arange(pair["answer_start"] - 1, length - 1)
                if "targets" in pair:
                    predicts = np.flatnonzero(pair["targets"]) - 1
                    if i < len(tree["pairs"]) - 1:      # the trunk is the last pair's
                        predicts = predicts[_own(pair, predicts + 1, shared)]
                in_row = np.arange(length)
                in_row = np.where(in_row < shared, begin + in_row, at + in_row - shared)
                keep.append(in_row[predicts])
                targets.append(own[predicts + 1])
                pairs.append(pair)
                where.append(in_row)
                labels.append(predicts + 1)
                at += length - shared
        pointer = {} if self.places is None else {"pointer": pointing.collate(pairs, where, labels, self.places)}
        row = [torch.from_numpy(np.concatenate(part))[None] for part in (ids, positions, targets, keep)]
        return {"input_ids": row[0], "position_ids": row[1], "labels": row[2], "shift_labels": row[2],
                "logits_to_keep": row[3][0], "layout": layout, **pointer}


def _own(pair: dict, tokens: np.ndarray, shared: int) -> np.ndarray:
    """Which of these tokens count for a pair whose first `shared` are another's: a place that it asks for with all its
    tokens, if the last is the pair's own."""
    if "asked" not in pair:
        return tokens >= shared
    of_place = pair["asked"].of_token
    last = np.zeros(len(pair["asked"].at) + 1, dtype=np.int64)
    np.maximum.at(last, of_place, np.arange(len(of_place)))
    return last[of_place[tokens]] >= shared


@torch.compiler.disable     # its blocks follow from the trees
def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None,
                            **kwargs):
    """The AttentionInterface function: every block attends to the parts that it sees, causally to its own.

    query (1, H, S, D), key and value (1, KV heads, S, D), all after RoPE; layout as TreeCollator makes it, None: one
    causal sequence. Returns (1, S, H, D) and None.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(f"--shared_prefix: this model's attention has a {name}, which it does not know; train "
                            "without")
    # Under autocast an fp32 model's RoPE leaves float32, and the causal bias below is checked before autocast sees it.
    query, key = query.to(value.dtype), key.to(value.dtype)
    layout = layout or Layout([query.shape[2]], [query.shape[2]], [[0]])
    dropout = dropout if module.training else 0.0
    keys, values = key.split(layout.parts, dim=2), value.split(layout.parts, dim=2)
    attend = _attend
    if layout.seen * 2 * key[0, :, 0].numel() * key.element_size() > COPIES:
        # Each branch has a copy of its part of the trunk. Where these are many, the backward pass makes them again.
        attend = functools.partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=dropout > 0)
    outputs = [attend(block, scaling, dropout, *(keys[i] for i in sees), *(values[i] for i in sees))
               for block, sees in zip(query.split(layout.blocks, dim=2), layout.sees)]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend(query, scaling, dropout, *parts):
    """(1, H, Q, D): the last Q keys are the queries' own, seen causally; all before them are seen whole."""
    key, value = (torch.cat(half, dim=2) for half in (parts[:len(parts) // 2], parts[len(parts) // 2:]))
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    mask = causal_lower_right(query.shape[2], key.shape[2])     # on a GPU, flash attention without a mask in memory
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, lambda *args, **kwargs: None)
