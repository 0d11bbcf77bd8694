"""One evaluation in several processes, such as torchrun starts: each takes the next prompts when it has done its last.

They meet in torchrun's key-value store, which is all that they need of torch.distributed: no tensor passes between
them. What each predicts lies in a file of its own (`predictions.Store`), and the first process reads them all.
"""
import contextlib
import datetime
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.distributed import DistError, PrefixStore, rendezvous

from ga_llm.base.cli import UserError
from ga_llm.base.reading import reason

LONGEST, SOON = datetime.timedelta(days=30), datetime.timedelta(seconds=10)     # that one waits for another


class Processes:
    """This process (`rank`, 0 is the first) of `size`. Without a store it is alone."""

    def __init__(self, rank: int = 0, size: int = 1, store=None):
        self.rank, self.size, self.store, self.counted = rank, size, store, 0

    def each(self, units: Sequence) -> Iterator:
        """Those of the `units` that fall to this process: every one falls to whoever is free first."""
        if self.store is None:
            yield from units
            return
        while (taken := self.store.add("taken", 1)) <= len(units):
            self._stop_if_failed()
            yield units[taken - 1]

    def count(self, number: int) -> int:
        """Add to what all processes have counted; returns their sum."""
        self.counted += number
        return self.counted if self.store is None else self.store.add("counted", number)

    def agree(self, value):
        """The first process's `value`, which JSON must know, for all."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set("agreed", json.dumps(value))
        value = json.loads(self.store.get("agreed"))
        self._stop_if_failed()
        return value

    def finish(self) -> None:
        """Called by every process when it has nothing left to do. The first waits for the others."""
        if self.store is None:
            return
        self.store.set(f"finished/{self.rank}", "")
        if self.rank == 0:
            self._wait_for_all(LONGEST)
            self._stop_if_failed()

    def tells(self) -> bool:
        """Whether it is for this process, which fails, to say so: the first that fails does, for all."""
        if self.store is None:
            return True
        try:
            first = self.store.add("failed", 1) == 1
            self.store.set("agreed", "null")        # nobody needs to wait for it any longer
            self.store.set(f"finished/{self.rank}", "")
        except DistError:       # whoever kept the store has failed, and said so
            return False
        if self.rank == 0:      # which may keep the store: torch has dozens of lines for those whom it leaves
            with contextlib.suppress(DistError):
                self._wait_for_all(SOON)
        return first

    def _wait_for_all(self, longest: datetime.timedelta) -> None:
        self.store.wait([f"finished/{rank}" for rank in range(self.size)], longest)

    def _stop_if_failed(self) -> None:
        if self.store.check(["failed"]):
            raise DistError("another process has failed")


def join() -> Processes:
    """Meet the other processes that torchrun has started, if it has. On GPUs each has the one of its LOCAL_RANK."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size == 1 or "RANK" not in os.environ:
        return Processes()
    try:
        store, _, _ = next(rendezvous("env://"))
    except (DistError, ValueError) as error:
        raise UserError(f"process {rank} of {size}: cannot meet the others ({reason(error)}); start them with torchrun"
                        ) from None
    store.set_timeout(LONGEST)
    found = Processes(rank, size, PrefixStore("evaluation", store))
    if rank > 0:        # what the first one says holds for all
        logging.disable(logging.WARNING)
    return found


def set_device() -> None:
    """Raises UserError where there are fewer GPUs than processes."""
    if torch.cuda.is_available():
        own, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if own >= gpus:
            raise UserError(f"process {own} of this machine has no GPU, of {gpus}; give --nproc_per_node={gpus}")
        torch.cuda.set_device(own)


def together(main: Callable[[Processes], None]) -> Callable[[], None]:
    """`main` as a script's, for `cli.run`, in as many processes as there are: if one fails it ends them all, and what
    it has to say is said once.
    """
    def run() -> None:
        processes = join()
        try:
            set_device()
            main(processes)
        except Exception:
            if not processes.tells():
                sys.exit(2)
            raise
    return run
