"""The check-ins that each prompt shows, as numbers: when and where, for whatever reads more of them than their text.

Beside a question file lies a file of these arrays (`artifacts.check_ins`), bound to it by its SHA-256. What it holds
of a pair is what the pair's text shows, in the same order, and the target last: nothing that the prompt does not.
"""
import hashlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import pandas as pd
import safetensors.numpy

COLUMNS = {"place": "PoiId", "category": "PoiCategoryId", "trajectory": "TrajectoryId"}


class Hashed:
    """A file that is written, and the SHA-256 of what was."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    @property
    def sha256(self) -> str:
        return self.hash.hexdigest()


class CheckIns:
    """Collects what pairs show, as they are written.

    train, split: the samples (perhaps the same) that `Pair`'s row numbers are of.
    """

    def __init__(self, train: pd.DataFrame, split: pd.DataFrame):
        self.tables, self.offset = ((train,), 0) if split is train else ((train, split), len(train))
        self.rows, self.ends, self.end = [], [], 0

    def noting(self, pairs: Iterable) -> Iterator:
        """The pairs, as they come."""
        for pair in pairs:
            own = [pair.similar, pair.history, pair.current + self.offset, [pair.target + self.offset]]
            rows = np.concatenate(own).astype(np.int32)
            self.end += len(rows)
            self.rows.append(rows)
            self.ends.append(self.end)
            yield pair

    def content(self, sha256: str) -> bytes:
        """The file, for the question file of that hash.

        second (check-ins,) int64, local, since 1970; place, category, trajectory (check-ins,) int32, encoded; rows
        (shown,) int32, which of these each pair shows, its target last; ends (pairs,) int64, where each pair's end.
        """
        columns = {name: np.concatenate([table[column].to_numpy() for table in self.tables])
                   for name, column in {"second": "Time", **COLUMNS}.items()}
        arrays = {"second": columns["second"].astype("datetime64[s]").astype(np.int64),
                  **{name: columns[name].astype(np.int32) for name in COLUMNS},
                  "rows": np.concatenate([*self.rows, np.empty(0, np.int32)]),
                  "ends": np.array(self.ends, dtype=np.int64)}
        return safetensors.numpy.save(arrays, {"questions": sha256})
