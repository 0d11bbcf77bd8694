"""Is B better than A? The difference of two predictions.jsonl over the same pairs, by paired bootstrap."""
from pathlib import Path

import numpy as np

from ga_llm.base import json_text
from ga_llm.base.artifacts import require
from ga_llm.base.cli import UserError
from ga_llm.evaluation import metrics

MADE_BY = "python test_next_gps.py …"
KEY = ("pair", "user", "time", "target")
MEAN_KM = metrics.KM[0]
OPTIONAL = type(None)
TYPES = {"pair": (int,), "user": (int, OPTIONAL), "time": (str, OPTIONAL), "target": (int,), "rank": (int, OPTIONAL),
         "top": (list,), "km": (int, float, OPTIONAL)}


def compare(a: Path, b: Path) -> str:
    """The differences as a table for a person; raises UserError as `differences` does."""
    found = differences(a, b)
    width = max(map(len, found))
    lines = [f"A: {a}", f"B: {b}", "B - A over the same pairs [95 % interval], p: two-sided, both by paired bootstrap",
             f"{'':{width}}  {'n':>6}  {'A':>8}  {'B':>8}  {'B - A':27}  {'p':>6}"]
    for metric, row in found.items():
        digits = 2 if metric == MEAN_KM else 4
        low, high = (f"{row[key]:+.{digits}f}" for key in ("low", "high"))
        difference = f"{row['difference']:+.{digits}f} [{low}, {high}]"
        lines.append(f"{metric:{width}}  {row['n']:>6}  {row['a']:>8.{digits}f}  {row['b']:>8.{digits}f}  "
                     f"{difference:27}  {row['p']:.4f}" + " (less is better)" * (metric == MEAN_KM))
    return "\n".join(lines)


def differences(a: Path, b: Path, draws: int = 10_000, seed: int = 0) -> dict[str, dict]:
    """{metric: {"n", "a", "b", "difference", "low", "high", "p"}}: B - A, with its 95 % percentile interval.

    Each draw takes the same pairs of both. p: twice the smaller share of draws at or beyond 0, counting the observed
    one too, at most 1. "mean km" is over the pairs that have a distance in both. If either file holds sampled answers,
    metrics of ranks beyond the first are left out.
    Raises UserError if a file is missing, a line is wrong, or the pairs are not the same.
    """
    one, other = read(a), read(b)
    _check_same(one, other, a, b)
    records = [list(one.values()), [other[key] for key in one]]
    (ranks_a, km_a), (ranks_b, km_b) = (_ranks_and_km(rows) for rows in records)
    values_a, values_b = metrics.per_pair(ranks_a, km_a), metrics.per_pair(ranks_b, km_b)
    if any(_sampled(rows) for rows in records):
        values_a = {name: values for name, values in values_a.items() if name in metrics.OF_ONE_ANSWER}
    found = _paired({name: (values, values_b[name]) for name, values in values_a.items()}, draws, seed)
    known = ~np.isnan(km_a) & ~np.isnan(km_b)
    if known.any():
        found |= _paired({MEAN_KM: (km_a[known], km_b[known])}, draws, seed)
    return found


def _paired(values: dict[str, tuple[np.ndarray, np.ndarray]], draws: int, seed: int) -> dict[str, dict]:
    """values: {metric: (A's, B's)}, each (pairs,)."""
    drawn = metrics.resampled(np.stack([b - a for a, b in values.values()]), draws, seed)
    found = {}
    for (metric, (a, b)), row in zip(values.items(), drawn):
        low, high = np.percentile(row, [2.5, 97.5])
        beyond = min((row <= 0).sum(), (row >= 0).sum())
        found[metric] = {"n": len(a), "a": float(a.mean()), "b": float(b.mean()), "difference": float((b - a).mean()),
                         "low": float(low), "high": float(high), "p": float(min(1, 2 * (beyond + 1) / (draws + 1)))}
    return found


def _ranks_and_km(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    return (np.array([np.inf if record["rank"] is None else record["rank"] for record in records]),
            np.array([record["km"] for record in records], dtype=np.float64))      # None becomes nan


def _sampled(records: list[dict]) -> bool:
    """A sampled answer stands without a log-probability."""
    return any(value is None for record in records for _, value in record["top"])


def read(path: Path) -> dict[tuple, dict]:
    """{(pair, user, time, target): the line's object} of a predictions.jsonl, in the file's order.

    Raises UserError if the file is missing or a line is wrong.
    """
    found = {}
    with open(require(path, MADE_BY), "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = _record(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}; make it again with `{MADE_BY}`") from None
            key = tuple(record[name] for name in KEY)
            if key in found:
                raise UserError(f"{path}, line {number}: pair {key[0]} stands twice; make it again with `{MADE_BY}`")
            found[key] = record
    return found


def _record(line: bytes) -> dict:
    """Parse one line. Raises ValueError that says what is wrong with it."""
    try:
        record = json_text.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("not an object")
    for name, types in TYPES.items():
        if name not in record:
            raise ValueError(f"no {name!r}")
        if type(record[name]) not in types:     # isinstance would take true for a rank
            raise ValueError(f"{name} is {record[name]!r}")
    for name, least in (("rank", 1), ("km", 0)):
        if record[name] is not None and record[name] < least:
            raise ValueError(f"{name} is {record[name]!r}, less than {least}")
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in record["top"]):
        raise ValueError("top holds something else than [POI id, log-probability]")
    return record


def _check_same(one: dict, other: dict, a: Path, b: Path) -> None:
    different = one.keys() ^ other.keys()
    if different:
        key = min(different, key=lambda key: key[0])
        has, lacks = (a, b) if key in one else (b, a)
        pair, user, time, target = key
        raise UserError(f"{lacks}: has no pair {pair} (user {user}, {time}, POI {target}), which {has} has; only the "
                        "same pairs can be compared (same --test_file, --protocol, --limit)")
