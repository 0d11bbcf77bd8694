"""What needs no model: the user's own history, and popularity. No result counts that does not beat them.

Each ranks POIs on the same pairs as the model. A target that a baseline does not know has rank infinity: no credit.
"""
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from ga_llm.artifacts import require
from ga_llm.cli import UserError

COLUMNS = ["UserId", "PoiId"]


def read_train(path: Path) -> pd.DataFrame:
    """UserId and PoiId (encoded) of the train split's check-ins, in order of time."""
    made_by = "python data-preprocess/run.py -f best_conf/<name>.yml"
    try:
        return pd.read_csv(require(path, made_by), usecols=COLUMNS)
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; make it again with `{made_by}`") from None


def frequency_rank(visits: Iterable[int], target: int) -> float:
    """The target's rank among the visited POIs by number of visits; ties go to the one visited first."""
    for rank, (poi, _) in enumerate(Counter(visits).most_common(), start=1):
        if poi == target:
            return rank
    return np.inf


def ranks(train: pd.DataFrame, test_prompts) -> dict[str, list[float]]:
    """{"user-history frequency": (pairs,), "popularity": (pairs,)} ranks of the targets.

    A user's history is all of the user's train check-ins, then the current trajectory without its target; where the
    prompt names no user as ours does, it is the prompt's check-ins.
    """
    history = {user: rows.tolist() for user, rows in train.groupby("UserId")["PoiId"]}
    popularity = {poi: rank for rank, (poi, _) in enumerate(Counter(train["PoiId"].tolist()).most_common(), start=1)}
    return {
        "user-history frequency": [
            frequency_rank(p.shown if p.user is None else history.get(p.user, []) + p.current, p.target)
            for p in test_prompts],
        "popularity": [popularity.get(p.target, np.inf) for p in test_prompts],
    }
