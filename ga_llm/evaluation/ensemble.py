"""Several evaluations of the same pairs as one: the mean of their probabilities, by which runs of other seeds gain.

What single runs disagree in is mostly chance, and the mean takes it out (Lakshminarayanan et al., NeurIPS 2017).
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ga_llm.base.artifacts import require
from ga_llm.base.cli import UserError
from ga_llm.evaluation.metrics import Ranking
from ga_llm.evaluation.predictions import Store
from ga_llm.evaluation.ranking import TOP, Ranked
from ga_llm.pairs.spelling import TestPrompt

MADE_BY = "python test_next_gps.py --full_table True …"


def normalised(log_probs: np.ndarray) -> np.ndarray:
    """(pairs, candidates) probabilities of the candidates alone: a model gives some to what is no id."""
    log_probs = np.asarray(log_probs, dtype=np.float64)
    return np.exp(log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True))


def read(path: Path | str, test_prompts: Sequence[TestPrompt], candidates: Sequence[int]) -> np.ndarray:
    """(pairs, candidates) log-probabilities of another evaluation of these pairs (its log_probabilities.npy).

    Raises UserError if the file is missing, or is of other candidates or without one of the pairs.
    """
    path = require(Path(path), MADE_BY)
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: no table of numpy ({' '.join(str(error).split())}); make it again with `{MADE_BY}`"
                        ) from None
    last = max(prompt.pair for prompt in test_prompts)
    if not isinstance(table, np.ndarray) or table.dtype.kind != "f" or table.ndim != 2 or (
            table.shape[1] != len(candidates) or len(table) <= last):
        raise UserError(f"{path}: not of these pairs and {len(candidates)} POIs; give the table of an evaluation of "
                        "this test file")
    rows = table[[prompt.pair for prompt in test_prompts]]
    if np.isnan(rows).any():
        raise UserError(f"{path}: lacks pairs of these; give the table of an evaluation with this --protocol")
    return rows


def average(tables: Sequence[np.ndarray]) -> np.ndarray:
    """(pairs, candidates) log of the mean probabilities; tables: log-probabilities of the same shape."""
    return np.log(sum(map(normalised, tables)) / len(tables))


def rank(log_probs: np.ndarray, test_prompts: Sequence[TestPrompt], candidates: Sequence[int]) -> list[Ranked]:
    """The rankings of a table's rows."""
    place, found = {poi: i for i, poi in enumerate(candidates)}, []
    for row, prompt in zip(log_probs, test_prompts):
        best, target = np.argsort(-row, kind="stable")[:TOP], place.get(prompt.target)
        rank = None if target is None else int((row >= row[target]).sum())      # ties as in `ranking.rank_of`
        found.append(Ranked(rank, [(candidates[i], float(row[i])) for i in best], None))
    return found


def averaged(paths: Sequence[str], store: Store, test_prompts: Sequence[TestPrompt], candidates: Sequence[int],
             others: dict[str, Ranking]) -> tuple[Ranking, dict[str, Ranking]]:
    """What --average_with makes of the model's probabilities, and what it stands beside."""
    alone, table = store.ranking(test_prompts), store.table()[[prompt.pair for prompt in test_prompts]]
    table = average([table, *(read(path, test_prompts, candidates) for path in paths)])
    store.replace(test_prompts, rank(table, test_prompts, candidates))
    return store.ranking(test_prompts), {"model alone": alone, **others}
