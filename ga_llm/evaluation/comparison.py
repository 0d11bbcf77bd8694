"""Is B better than A? The difference of predictions.jsonl over the same pairs, by a bootstrap over pairs and runs."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ga_llm.base import json_text
from ga_llm.base.artifacts import require
from ga_llm.base.cli import UserError
from ga_llm.evaluation import metrics, published

MADE_BY = "python test_next_gps.py …"
KEY = ("pair", "user", "time", "target")
MEAN_KM = metrics.KM[0]
OPTIONAL = type(None)
TYPES = {"pair": (int,), "user": (int, OPTIONAL), "time": (str, OPTIONAL), "target": (int,),
         "current": (int, OPTIONAL), "rank": (int, OPTIONAL), "top": (list,), "km": (int, float, OPTIONAL)}
LEAST = {"rank": 1, "km": 0, "current": 0}


def compare(a: Sequence[Path], b: Sequence[Path]) -> str:
    """The differences as a table for a person; raises UserError as `differences` does."""
    found, aligned = _compared(a, b)
    width = max(map(len, found))
    by = "paired bootstrap"
    if len(a) + len(b) > 2:
        by = f"bootstrap over pairs and runs ({len(a)} of A, {len(b)} of B)"
    lines = [f"{name}: {path}{published.note(aligned.get(path))}" for name, paths in (("A", a), ("B", b))
             for path in paths]
    lines += [f"B - A over the same pairs [95 % interval], p: two-sided, both by {by}",
              f"{'':{width}}  {'n':>6}  {'A':>8}  {'B':>8}  {'B - A':27}  {'p':>6}"]
    for metric, row in found.items():
        digits = 2 if metric == MEAN_KM else 4
        low, high = (f"{row[key]:+.{digits}f}" for key in ("low", "high"))
        difference = f"{row['difference']:+.{digits}f} [{low}, {high}]"
        lines.append(f"{metric:{width}}  {row['n']:>6}  {row['a']:>8.{digits}f}  {row['b']:>8.{digits}f}  "
                     f"{difference:27}  {row['p']:.4f}" + " (less is better)" * (metric == MEAN_KM))
    return "\n".join(lines + [published.ABOUT] * bool(aligned))


def differences(a: Sequence[Path], b: Sequence[Path], draws: int = 10_000, seed: int = 0) -> dict[str, dict]:
    """{metric: {"n", "a", "b", "difference", "low", "high", "p"}}: B - A, with its 95 % percentile interval.

    a, b: the files of each method's runs, over whose mean the metrics are (`metrics.difference`); one of GenUP's
    (`published`) stands for a run, too. Of a single run, what another seed would change is not in the interval. "mean
    km" is over the
    pairs that have a distance in all runs. If a file holds sampled answers, metrics of ranks beyond the first are left
    out; beside published ones all but Acc@1 is.
    Raises UserError if a file is missing, a line is wrong, or the pairs are not the same.
    """
    return _compared(a, b, draws, seed)[0]


def _compared(a: Sequence[Path], b: Sequence[Path], draws: int = 10_000, seed: int = 0) -> tuple[dict, dict]:
    """What `differences` and `_read_all` return."""
    values, aligned = _values([*a, *b])
    return {metric: metrics.difference(runs_, len(a), draws, seed) for metric, runs_ in values.items()}, aligned


def means(files: Sequence[Path], draws: int = 10_000, seed: int = 0) -> dict[str, dict]:
    """{metric: {"value", "low", "high"}}: a method's mean over its runs, with its 95 % interval, drawn as in
    `differences`. Raises UserError as it does."""
    return {metric: metrics.mean(runs_, draws, seed) for metric, runs_ in _values(files)[0].items()}


def _values(files: Sequence[Path]) -> tuple[dict[str, np.ndarray], dict]:
    """{metric: (runs, pairs)}, and which published files align (`_read_all`)."""
    runs_read, aligned = _read_all(files)
    ranks_and_km = [_ranks_and_km(records) for records in runs_read]
    each = [metrics.per_pair(ranks, km) for ranks, km in ranks_and_km]
    kept = published.METRICS if aligned else metrics.OF_ONE_ANSWER if any(map(_sampled, runs_read)) else each[0]
    values = {name: np.stack([run[name] for run in each]) for name in each[0] if name in kept}
    km = np.stack([km for _, km in ranks_and_km])
    known = ~np.isnan(km).any(axis=0)
    return values | ({MEAN_KM: km[:, known]} if known.any() else {}), aligned


def _read_all(paths: Sequence[Path]) -> tuple[list[list[dict]], dict[Path, tuple[int, int]]]:
    """Each file's records of the pairs that all have, and {published file: (its pairs that align, all its pairs)}.

    Raises UserError as `differences` does.
    """
    ours = {path: read(path) for path in paths if not published.is_published(path)}
    if not ours:
        raise UserError(f"{paths[0]}: published predictions are compared with a predictions.jsonl of `{MADE_BY}`; give "
                        "one of the two")
    source, reference = next(iter(ours.items()))
    for path, records in ours.items():
        _check_same(reference, records, source, path)
    theirs = {path: published.align(path, reference, source) for path in paths if path not in ours}
    keys = [key for key in reference if all(key in same for same, _ in theirs.values())]
    found = ours | {path: same for path, (same, _) in theirs.items()}
    return ([[found[path][key] for key in keys] for path in paths],
            {path: (len(same), n) for path, (same, n) in theirs.items()})


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
    record.setdefault("current", None)      # files of before 2026-11-27 do not tell
    for name, types in TYPES.items():
        if name not in record:
            raise ValueError(f"no {name!r}")
        if type(record[name]) not in types:     # isinstance would take true for a rank
            raise ValueError(f"{name} is {record[name]!r}")
    for name, least in LEAST.items():
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
