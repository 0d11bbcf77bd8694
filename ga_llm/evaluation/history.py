"""The user's own history as a second opinion: the model's probabilities, mixed with those of a count that knows time.

Language models gain from being joined to a cache of what they have just read (Grave et al., ICLR 2017) or to their
nearest neighbours (Khandelwal et al., ICLR 2020); here the cache is the user's check-ins. A visit counts the more the
more recent it is, the nearer its time of day is to the target's, and if both days are workdays or both are not:

    P(place) = (1 - w) · P_model(place) + w · Σ visits there / Σ visits

It needs no training and no more of the data than the prompt may show. The constants were fixed before any was tried on
the test split.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ga_llm.base.cli import UserError
from ga_llm.evaluation import ensemble
from ga_llm.evaluation.baselines import COLUMNS, read_check_ins
from ga_llm.pairs.spelling import TestPrompt

RECENT_DAYS = 60.0      # after so many a visit counts 1/e
NEAR_HOURS = 1.5        # one standard deviation of the time of day
ANY_HOUR = 0.2          # what a visit counts at any other hour, beside 1 at the same one
SAME_KIND, OTHER_KIND = 1.5, 0.5        # of day: workdays, weekends


def visit_weights(times: np.ndarray, now: np.datetime64) -> np.ndarray:
    """times: (visits,) datetime64, local, before `now`; returns (visits,)."""
    def hours(time):
        return (time - time.astype("datetime64[D]")) / np.timedelta64(1, "h")

    apart = np.abs(hours(times) - hours(now))
    apart = np.minimum(apart, 24 - apart)
    kind = np.is_busday(times.astype("datetime64[D]")) == np.is_busday(now.astype("datetime64[D]"))
    age = (now - times) / np.timedelta64(1, "D")
    return (np.exp(-age / RECENT_DAYS) * (ANY_HOUR + np.exp(-(apart / NEAR_HOURS) ** 2 / 2))
            * np.where(kind, SAME_KIND, OTHER_KIND))


def probabilities(sample_path: Path, test_prompts: Sequence[TestPrompt], candidates: Sequence[int]) -> np.ndarray:
    """(pairs, candidates) float32: each pair's shares of the visits; zeros where the user has none at a candidate.

    Counted are the user's train check-ins and those of the target's own trajectory, all before the target's second.
    sample_path: the data set's sample.csv. Raises UserError if a prompt does not name its user and time as ours does.
    """
    rows = read_check_ins(sample_path, [*COLUMNS, "LocalTime", "Split"])
    times, train = rows["LocalTime"].to_numpy("datetime64[s]"), (rows["Split"] == "train").to_numpy()
    of_user = rows.groupby("UserId").indices
    columns = pd.Index(candidates)
    found = np.zeros((len(test_prompts), len(candidates)), dtype=np.float32)
    for pair, prompt in zip(found, test_prompts):
        if prompt.user is None or prompt.time is None:
            raise UserError(f"line {prompt.pair + 1} of the test file names no user or no time, which --history_weight "
                            "needs; make the questions with process_llm_gps.py")
        own, now = of_user.get(prompt.user, np.empty(0, dtype=int)), np.datetime64(prompt.time.replace(" ", "T"))
        pois, own_times, trajectories = rows["PoiId"].to_numpy()[own], times[own], rows["TrajectoryId"].to_numpy()[own]
        current = trajectories[(own_times == now) & (pois == prompt.target) & ~train[own]]
        visits = (train[own] | np.isin(trajectories, current)) & (own_times < now)
        where = columns.get_indexer(pois[visits])
        np.add.at(pair, where[where >= 0], visit_weights(own_times[visits], now)[where >= 0])
        pair /= max(pair.sum(), np.finfo(np.float32).tiny)
    return found


def mix(log_probs: np.ndarray, shares: np.ndarray, weight: float) -> np.ndarray:
    """The mixture's log-probabilities. log_probs, shares: (pairs, candidates), of the model and of `probabilities`."""
    with np.errstate(divide="ignore"):
        return np.log((1 - weight) * ensemble.normalised(log_probs) + weight * shares)
