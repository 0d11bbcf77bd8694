"""Orders that a resumed run can draw again."""
import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler

from ga_llm.training.sampling import EpochSampler


def test_random_order_is_accelerates_and_that_of_the_epoch():
    torch.manual_seed(7)
    theirs, ours = SeedableRandomSampler(range(50), data_seed=7), EpochSampler(50, 7)
    orders = []
    for epoch in range(3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        orders.append(list(ours))
        assert orders[-1] == list(theirs)
    torch.rand(3)       # what else is drawn does not matter
    ours.set_epoch(1)
    assert list(ours) == orders[1] != orders[0] and sorted(orders[1]) == list(range(50)) and len(ours) == 50


def test_groups_of_equal_length():
    lengths = np.random.default_rng(0).integers(10, 1000, 400)
    ours = EpochSampler(400, 0, lengths, batch=8)
    order = list(ours)
    assert sorted(order) == list(range(400)) and list(ours) == order
    spread = np.ptp(lengths[np.array(order).reshape(-1, 8)], axis=1)[1:]       # the first batch has the longest in it
    assert np.median(spread) < 0.2 * np.ptp(lengths)
    ours.set_epoch(1)
    assert list(ours) != order
