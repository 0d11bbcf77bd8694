"""The pointer alone, without an LLM, as a baseline: what it has said of each pair, read back from one small file.

`tools/baselines.py -pointer True` trains it and leaves the file beside the data set's samples, bound to their train
split by its SHA-256. A pair is known by its user, the target's time and the target, so question files of other fields,
histories or protocols find theirs. It stands beside an evaluation with all of its pairs, or not at all.
"""
import datetime
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ga_llm.base import artifacts, writing
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json, sha256
from ga_llm.evaluation.metrics import NO_POI, Ranking

log = logging.getLogger(__name__)

NAME = "pointer alone (no LLM)"
COLUMNS = ("user", "time", "target", "rank", "guess")
KEY = COLUMNS[:3]


def write(folder: Path, records: Iterable[dict], **told) -> Path:
    """Keep what records of predictions.jsonl say, all of the pairs of `folder`'s samples.

    The file is JSON: train (the SHA-256 of train_sample.csv), written (date), what is `told`, and as lists user, time,
    target, rank (null: none) and guess (the POI ranked first), one of each pair.
    """
    rows = [(*(record[key] for key in KEY), record["rank"], record["top"][0][0] if record["top"] else NO_POI)
            for record in records]
    columns = dict(zip(COLUMNS, map(list, zip(*rows)))) if rows else {name: [] for name in COLUMNS}
    path = folder / artifacts.POINTER_ALONE
    with writing.atomic_write(path) as file:
        json.dump({"train": _train(folder), "written": datetime.date.today().isoformat(), **told, **columns}, file)
    return path


def ranking(folder: Path, test_prompts: Sequence) -> Ranking | None:
    """Of these pairs of the data set that is preprocessed in `folder`; None where it has not been trained.

    The file is looked for there, then in the data set's usual folder. Where it does not do, one line of the log says
    why: it is damaged, of another train split, or lacks a pair.
    """
    paths = [folder / artifacts.POINTER_ALONE,
             artifacts.DATASETS / folder.parent.name / folder.name / artifacts.POINTER_ALONE]
    why = None
    for path in filter(Path.is_file, paths):
        found = _ranking(path, folder, test_prompts)
        if isinstance(found, Ranking):
            return found
        why = why or f"{path}: {found}"
    if why:
        log.info("%s, so '%s' is not among the baselines; train it by `%s`", why, NAME, command(folder))
    return None


def command(folder: Path) -> str:
    """What trains it."""
    root = folder.parent.parent
    return (f"python tools/baselines.py -dataset_name {folder.parent.name}"
            + f" -data_path {root}" * (root != artifacts.DATASETS) + " -pointer True")


def _ranking(path: Path, folder: Path, test_prompts: Sequence) -> Ranking | str:
    """The ranking, or why there is none."""
    try:
        held = read_json(path)
        of, rows = held["train"], list(zip(*(held[name] for name in COLUMNS), strict=True))
        table = {}
        for *key, rank, guess in rows:
            # A user's two trajectories that end alike are one key: what they say must be the same.
            table.setdefault(tuple(key), set()).add((_rank(rank), np.int64(guess)))
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return "damaged"
    if of != _train(folder):
        return f"of another train split than {folder / artifacts.split_sample('train')}"
    found = [table.get((prompt.user, prompt.time, prompt.target), ()) for prompt in test_prompts]
    lacking = sum(len(answers) != 1 for answers in found)
    if lacking:
        return f"lacks {lacking} of these {len(found)} pairs"
    pairs = np.array([next(iter(answers)) for answers in found], dtype=np.float64).reshape(-1, 2)
    return Ranking(pairs[:, 0], pairs[:, 1].astype(np.int64))


def _rank(rank: int | None) -> float:
    if rank is not None and rank < 1:
        raise ValueError(rank)
    return np.inf if rank is None else float(rank)


def _train(folder: Path) -> str | None:
    """The train split's SHA-256."""
    path = folder / artifacts.split_sample("train")
    return sha256(path) if path.is_file() else None
