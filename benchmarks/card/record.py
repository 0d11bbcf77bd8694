"""The rows that benchmarks/gpu.py measures: kept in gpu.json as they come, printed as a table at the end."""
import dataclasses
import gc
import json
import math
import statistics
import time
import traceback
from pathlib import Path

import torch

from ga_llm.base.cli import UserError
from ga_llm.base.writing import atomic_write
from ga_llm.training.run_log import describe_evaluation


@dataclasses.dataclass
class Row:
    """One measurement. limit: as a text; met: whether the value keeps it, None without one."""
    part: str
    what: str
    value: float | str | None
    unit: str = ""
    limit: str = ""
    met: bool | None = None


class Record:
    def __init__(self, folder: Path, minutes: float, device: str):
        self.folder, self.device, self.rows = folder, device, []
        self.began, self.seconds = time.perf_counter(), minutes * 60
        folder.mkdir(parents=True, exist_ok=True)
        self.about = describe_evaluation() | {"device": describe_device(device)}
        self._write()

    @property
    def left(self) -> float:
        """Seconds until --minutes are over."""
        return self.seconds - (time.perf_counter() - self.began)

    @property
    def failed(self) -> bool:
        return any(row.met is False for row in self.rows)

    def add(self, part: str, what: str, value, unit: str = "", most: float | None = None,
            least: float | None = None) -> None:
        """A row; most, least: its limit, if it has one."""
        limit = f"at most {most:g}" if most is not None else f"at least {least:g}" if least is not None else ""
        met = None
        if limit:
            met = value is not None and math.isfinite(value) and (value <= most if most is not None else value >= least)
        self.rows.append(Row(part, what, value, unit, limit, met))
        print(self._line(self.rows[-1]), flush=True)
        self._write()

    def note(self, part: str, what: str, why: str) -> None:
        """A row without a value: what could not be measured, and why."""
        self.rows.append(Row(part, what, why))
        print(self._line(self.rows[-1]), flush=True)
        self._write()

    def attempt(self, part: str, work, args) -> None:
        """Run a part; whatever fails in it is a row, and the next part begins."""
        if self.left <= 0:
            return self.note(part, "left out", "no minutes left; give more with --minutes")
        began = time.perf_counter()
        try:
            work(self, args)
        except UserError as error:
            self.note(part, "left out", str(error))
        except Exception as error:      # of what fails on a card that nobody has tried, there is no list
            (self.folder / f"{part}.traceback.txt").write_text(traceback.format_exc())
            self.rows.append(Row(part, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                                 met=False))
            print(self._line(self.rows[-1]), flush=True)
        free(self.device)
        self.add(part, "seconds of this part", time.perf_counter() - began, "s")

    def _write(self) -> None:
        with atomic_write(self.folder / "gpu.json") as file:
            json.dump(self.about | {"seconds": round(time.perf_counter() - self.began, 1),
                                    "rows": [dataclasses.asdict(row) for row in self.rows]}, file, indent=1)

    def _line(self, row: Row) -> str:
        value = row.value if isinstance(row.value, str) else "-" if row.value is None else f"{row.value:,.4g}"
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        return f"{row.part:10} {row.what:58} {value:>12} {row.unit:10} {row.limit:16} {verdict}".rstrip()

    def table(self) -> str:
        head = f"\n{self.about['device']}, {self.about.get('date', '')}"
        return "\n".join([head, *map(self._line, self.rows)])


def describe_device(device: str) -> str:
    if device == "cpu":
        return "CPU"
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB"


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, work) -> float:
    """Seconds of a call."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def median_time(device: str, work, times: int) -> float:
    """Median seconds of `times` calls, after one that is not counted."""
    return statistics.median([timed(device, work) for _ in range(times + 1)][1:])
