"""Processes that share an evaluation, here as threads and by turns, with a store in memory."""
import itertools
import threading

import pytest
from torch.distributed import DistError, HashStore

from ga_llm.base.cli import UserError
from ga_llm.evaluation.processes import Processes, join, set_device, together


def some(size):
    store = HashStore()
    return [Processes(rank, size, store) for rank in range(size)]


@pytest.mark.parametrize("size, units", [(1, 5), (2, 7), (3, 2), (4, 0)])
def test_every_unit_falls_to_one(size, units):
    """By turns, each process has as many, and those that come late have what is left."""
    shares = [process.each(range(units)) for process in some(size)]
    turns = list(itertools.chain.from_iterable(itertools.zip_longest(*shares)))
    assert [unit for unit in turns if unit is not None] == list(range(units))
    fast, slow = some(2)
    share = slow.each(range(5))
    assert next(share) == 0 and list(fast.each(range(5))) == [1, 2, 3, 4] and list(share) == []


def test_alone():
    alone = Processes()
    assert list(alone.each("abc")) == ["a", "b", "c"] and alone.agree({1}) == {1} and alone.tells()
    assert [alone.count(2), alone.count(3)] == [2, 5]
    alone.finish()


def test_what_all_know():
    first, second = some(2)
    assert [first.count(2), second.count(3), first.count(1)] == [2, 5, 6]
    assert first.agree([1, 2]) == second.agree(None) == [1, 2]
    waits = threading.Thread(target=first.finish)
    waits.start()
    assert waits.is_alive()
    second.finish()
    waits.join(60)
    assert not waits.is_alive()


def test_the_first_that_fails_tells():
    first, second, third = some(3)
    shares = [process.each(range(9)) for process in (first, second)]
    assert [next(share) for share in shares] == [0, 1]
    assert second.tells() and not third.tells()
    for share in shares:
        with pytest.raises(DistError):
            next(share)
    with pytest.raises(DistError):
        third.agree(None)
    with pytest.raises(DistError):
        first.finish()
    assert not first.tells()


def test_a_script_alone_fails_as_ever(monkeypatch):
    """Under torchrun with one process, too: nobody is to be met."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join().store is None

    def fail(processes):
        raise UserError(f"{processes.size} process")

    with pytest.raises(UserError, match="1 process"):
        together(fail)()


def test_processes_that_nothing_brings_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert join().size == 1         # the rest of the environment is another program's
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="process 1 of 2: .*MASTER_ADDR.*; start them with torchrun"):
        join()


def test_more_processes_than_gpus(monkeypatch):
    given = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", given.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        set_device()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        set_device()
    assert given == [0, 1]
