"""Batches of about as many tokens: every pair once, none too large, pairs of like length together."""
import numpy as np
import pytest

from ga_llm.training.batches import TokenBatches, Unpacked


class Pairs:
    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def __getitem__(self, i):
        return {"input_ids": np.full(self.lengths[i], i)}


@pytest.mark.parametrize("limit", [1, 100, 700, 10 ** 6])
def test_every_pair_is_in_one_batch(limit):
    lengths = np.random.default_rng(0).integers(1, 500, 300)
    batches = TokenBatches(Pairs(lengths), limit)
    assert sorted(i for members in batches.members for i in members) == list(range(300))
    for number, members in enumerate(batches.members):
        assert batches.lengths[number] == len(members) * lengths[members].max()
        assert len(members) == 1 or batches.lengths[number] <= limit
    if limit == 700:
        assert 1 - lengths.sum() / batches.lengths.sum() < .2        # padding; drawn at random it is half


def test_other_seeds_put_others_together():
    lengths = [50] * 40 + list(range(40, 80))
    one, again, other = (TokenBatches(Pairs(lengths), 300, seed).members for seed in (1, 1, 2))
    assert one == again != other


def test_a_batch_is_collated_as_its_pairs():
    batches = TokenBatches(Pairs([3, 3, 5]), 9)
    seen = Unpacked(lambda pairs: [pair["input_ids"].tolist() for pair in pairs])([batches[0], batches[1]])
    assert sorted(map(len, seen)) == [3, 3, 5] and len(batches) == 2
