"""The check-ins that pairs show, read back: when each was, and at which place of the mapping.

data-preprocess writes them beside each question file (`artifacts.check_ins`), bound to it by its SHA-256. What is given
out is what a pair's tokens show: of a pair that was cut, the check-ins that are left.
"""
import dataclasses
from pathlib import Path

import numpy as np
import safetensors

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json, reason, sha256

MADE_BY = "python data-preprocess/process_llm_gps.py -dataset_name <name> …"
NAMES = ("second", "place", "category", "trajectory", "rows", "ends")


def read(questions: Path | str, ids: np.ndarray) -> "CheckIns":
    """Those of a question file. ids: (places,), the mapping's. Raises UserError where it shows no places."""
    settings = artifacts.question_settings(questions)
    fields = read_json(settings).get("fields") if settings.exists() else None
    if isinstance(fields, list) and "gps" not in fields:
        raise UserError(f"{questions}: its check-ins show no <GPS n> ({', '.join(map(str, fields))}), to which a "
                        "pointer could point; make it with gps among process_llm_gps.py's -fields")
    return CheckIns(questions, sha256(questions), ids)


@dataclasses.dataclass(frozen=True)
class Shown:
    """The check-ins of one pair in the prompt's order, and the target last, whose time is asked about.

    second: (n,) int64, local, since 1970; place: (n,) int64, rows of the mapping; first: (n,) int64, which of them each
    one's trajectory begins with; at: (n - 1,) int64, where in the pair's tokens the `<GPS n>` of each but the target
    stands.
    """
    second: np.ndarray
    place: np.ndarray
    first: np.ndarray
    at: np.ndarray

    def latest(self, at: np.ndarray) -> "Shown":
        """Of a pair that was cut, what is left: as many check-ins as stand at the positions `at`, and the target."""
        gone = len(self.second) - 1 - len(at)
        return Shown(self.second[gone:], self.place[gone:], np.maximum(self.first[gone:] - gone, 0), at)

    @classmethod
    def of(cls, second, place, trajectory, at) -> "Shown":
        """trajectory: (n,), any number of each check-in's."""
        begins = np.flatnonzero(np.diff(trajectory, prepend=trajectory[0] - 1))
        first = np.repeat(begins, np.diff(begins, append=len(trajectory)))
        return cls(second, place, first, np.asarray(at, dtype=np.int64))


class CheckIns:
    """The check-ins of a question file's pairs.

    questions: the file; sha256: of its content. ids: (places,), the mapping's. Raises UserError if the arrays are
    missing, damaged, or another file's.
    """

    def __init__(self, questions: Path | str, sha256: str, ids: np.ndarray):
        self.path = artifacts.require(artifacts.check_ins(questions), MADE_BY)
        try:
            with safetensors.safe_open(self.path, "np") as file:
                of, held = (file.metadata() or {}).get("questions"), {name: file.get_tensor(name) for name in NAMES}
            if any(array.ndim != 1 or array.dtype.kind != "i" for array in held.values()):
                raise ValueError("not whole numbers in rows")
            self.second, self.category, self.trajectory, self.rows, self.ends = (
                held[name] for name in NAMES if name != "place")
            alike = len({len(held[name]) for name in NAMES[:4]}) == 1 and self.ends[-1:].sum() == len(self.rows)
            if not alike or np.any(np.diff(self.ends, prepend=0) < 1) or (
                    len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(self.second)):
                raise ValueError("its arrays do not fit each other")
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise UserError(f"{self.path}: damaged ({reason(error)}); make it again with `{MADE_BY}`") from None
        if of != sha256:
            raise UserError(f"{self.path}: not of {Path(questions).name} as it is now; make both again with "
                            f"`{MADE_BY}`")
        order = np.argsort(ids)
        found = order[np.searchsorted(ids[order], held["place"]).clip(max=len(ids) - 1)]
        unknown = np.flatnonzero(ids[found] != held["place"])
        if len(unknown):
            raise UserError(f"{self.path}: POI {held['place'][unknown[0]]} has no row in the GPS mapping; give the "
                            "mapping that run.py wrote for this data set")
        self.place = found

    def categories(self, places: int) -> np.ndarray:
        """(places,) int64: the category that each place has most often in these check-ins, the smallest among equals;
        0 where it has none."""
        kinds, counts = np.unique(np.stack([self.place, self.category]), axis=1, return_counts=True)
        found = np.zeros(places, dtype=np.int64)
        order = np.lexsort([-kinds[1], counts])         # later ones stay: the most frequent, then the smallest
        found[kinds[0][order]] = kinds[1][order]
        return found

    def shown(self, pair: int, places: np.ndarray, at: np.ndarray) -> Shown:
        """Those of pair number `pair` that its tokens show: their places (k,), rows of the mapping, stand at `at` (k,).

        Raises UserError if the pair's text shows others.
        """
        rows = self.rows[self.ends[pair - 1] if pair else 0:self.ends[pair]] if pair < len(self.ends) else self.rows[:0]
        first = len(rows) - 1 - len(at)
        if first < 0 or not np.array_equal(self.place[rows[first:-1]], places):
            raise UserError(f"{self.path}: pair {pair} has other check-ins than the question shows; make both again "
                            f"with `{MADE_BY}`")
        rows = rows[first:]
        return Shown.of(self.second[rows], self.place[rows], self.trajectory[rows], at)
