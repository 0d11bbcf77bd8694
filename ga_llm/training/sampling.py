"""The order in which pairs are trained: drawn anew every epoch, and from nothing but the seed and the epoch."""
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler):
    """Indices 0 … size - 1 in random order, or with `lengths` in batches of about equal length.

    Departure from transformers: its grouping draws from the global generator, and accelerate does not tell its own
    sampler the epoch when one of several processes resumes. Either way a resumed run would train other pairs than the
    run that was interrupted. Without lengths the order is the one that accelerate draws.

    lengths: (size,) tokens of each pair. batch: pairs per step, the longest batch comes first.
    """

    def __init__(self, size: int, seed: int, lengths=None, batch: int = 1):
        self.size, self.seed, self.batch, self.epoch = size, seed, batch, 0
        self.lengths = None if lengths is None else [int(length) for length in lengths]

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.size, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))
