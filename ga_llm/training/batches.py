"""Batches of about as many tokens, instead of as many pairs (--batch_tokens).

Pairs of similar length stand together, so that little is padding, and a step costs about the same whether its pairs are
short or long. Not in the paper, whose batches are single pairs.
"""
import numpy as np
from torch.utils.data import Dataset

NOISE = 0.2     # by how much a pair may count as longer, so that not always the same ones stand together


class TokenBatches(Dataset):
    """The pairs of `dataset` in batches of at most `limit` tokens with padding; a longer pair is a batch by itself.

    An item is a list of pairs. members: of each batch, which pairs; lengths: (batches,) tokens, with padding.
    """

    def __init__(self, dataset, limit: int, seed: int = 0):
        self.dataset, self.members = dataset, []
        lengths = dataset.lengths
        chosen, longest = [], 0
        for i in np.argsort(lengths * (1 + NOISE * np.random.default_rng(seed).random(len(lengths)))).tolist():
            if chosen and max(longest, lengths[i]) * (len(chosen) + 1) > limit:
                self.members.append(chosen)
                chosen, longest = [], 0
            chosen.append(i)
            longest = max(longest, lengths[i])
        self.members.append(chosen)
        self.lengths = np.array([len(batch) * lengths[batch].max() for batch in self.members])

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.dataset[i] for i in self.members[index]]


class Unpacked:
    """Collates batches of `TokenBatches`; base: the collator of the pairs."""

    def __init__(self, base):
        self.base = base

    def __call__(self, batches: list[list[dict]]) -> dict:
        return self.base([pair for batch in batches for pair in batch])
