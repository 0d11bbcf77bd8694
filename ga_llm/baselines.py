"""What needs no model: the user's own history, and popularity. No result counts that does not beat them.

Each ranks the same candidates on the same pairs as the model.
"""
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ga_llm.artifacts import require


def read_popularity(train_sample: Path) -> Counter:
    """Check-ins per encoded POI id in the train split."""
    require(train_sample, "python data-preprocess/run.py -f best_conf/<name>.yml")
    return Counter(pd.read_csv(train_sample, usecols=["PoiId"])["PoiId"].tolist())


def rank_by(scores: Sequence[Counter], target: int) -> float:
    """The target's rank when candidates are ordered by the first score, ties by the next, then by id.

    inf if no score knows the target.
    """
    def key(poi):
        return (*(-score[poi] for score in scores), poi)

    if not any(target in score for score in scores):
        return np.inf
    candidates = set().union(*scores)
    return 1 + sum(key(poi) < key(target) for poi in candidates)


def ranks(popularity: Counter, test_prompts) -> dict[str, list[float]]:
    """{"user-history frequency": (pairs,), "popularity": (pairs,)} ranks of the targets."""
    return {
        "user-history frequency": [rank_by([Counter(p.shown), popularity], p.target) for p in test_prompts],
        "popularity": [rank_by([popularity], p.target) for p in test_prompts],
    }
