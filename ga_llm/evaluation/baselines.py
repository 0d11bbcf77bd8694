"""What needs no LLM: the user's own history, popularity, a Markov chain, and, where it has been trained, the pointer
alone. No result counts that does not beat them.

Each ranks POIs on the same pairs as the model. A target that a baseline does not know has rank infinity: no credit.
"""
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ga_llm.base.artifacts import USER_HISTORY, require
from ga_llm.base.cli import UserError
from ga_llm.evaluation import pointer_alone
from ga_llm.evaluation.metrics import NO_POI, Ranking, histories

POPULARITY, MARKOV_CHAIN = "popularity", "Markov chain"
MADE_BY = "python data-preprocess/run.py -f best_conf/<name>.yml"
COLUMNS = ["UserId", "PoiId", "TrajectoryId"]


def read_check_ins(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Those columns of a sample, in order of time. Raises UserError if the file is missing or of another make."""
    try:
        rows = pd.read_csv(require(path, MADE_BY), usecols=list(columns), index_col=False,
                           dtype={column: np.int64 for column in COLUMNS})
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; make it again with `{MADE_BY}`") from None
    if rows.empty:
        raise UserError(f"{path}: no check-ins; make it again with `{MADE_BY}`")
    return rows


def read_known(sample_path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Those columns, COLUMNS and Split of sample.csv, but for check-ins of users and POIs that train does not have,
    which no question shows.
    """
    rows = read_check_ins(sample_path, [*COLUMNS, "Split", *columns])
    train = rows[rows["Split"] == "train"]
    return rows[rows["UserId"].isin(train["UserId"]) & rows["PoiId"].isin(train["PoiId"])].reset_index(drop=True)


def read_train(path: Path) -> pd.DataFrame:
    """UserId, PoiId (encoded) and TrajectoryId of the train split's check-ins, in order of time."""
    return read_check_ins(path, COLUMNS)


def rankings(train: pd.DataFrame, test_prompts, folder: Path | None = None) -> dict[str, Ranking]:
    """{baseline: its Ranking of the pairs}; train: as `read_train` gives it; folder: the data set's preprocessed, where
    `pointer_alone` may have left what it says.

    Among equals, each count prefers the POI visited first.
    """
    pointer = folder and pointer_alone.ranking(folder, test_prompts)
    return {
        USER_HISTORY: user_history(train, test_prompts),
        **({pointer_alone.NAME: pointer} if pointer else {}),
        POPULARITY: popularity(train, test_prompts),
        MARKOV_CHAIN: markov_chain(train, test_prompts),
    }


def user_history(train: pd.DataFrame, test_prompts) -> Ranking:
    """By how often the user has been there (`metrics.histories`)."""
    def ranked(history: list[int], target: int) -> tuple[float, int]:
        pois, _ = _most_visited(history)
        return pois.index(target) + 1 if target in pois else np.inf, next(iter(pois), NO_POI)

    found = zip(histories(test_prompts, train), test_prompts)
    return _ranking(ranked(history, prompt.target) for history, prompt in found)


def popularity(train: pd.DataFrame, test_prompts) -> Ranking:
    """By how often anyone has been there, in train."""
    pois, _ = _most_visited(train["PoiId"].tolist())
    rank = {poi: i for i, poi in enumerate(pois, start=1)}
    return _ranking((rank.get(prompt.target, np.inf), next(iter(pois), NO_POI)) for prompt in test_prompts)


def markov_chain(train: pd.DataFrame, test_prompts) -> Ranking:
    """A first-order chain over all users: steps between consecutive train check-ins of one trajectory.

    A POI that was seen to follow the prompt's last one scores its share of the steps from there; any other scores 0.4
    times its share of the check-ins ("stupid back-off": Brants et al., EMNLP 2007), so every POI of train has a rank.
    Ties go to the more popular, then to the one visited first. Where the prompt shows no check-in, or train has no step
    from it, popularity alone decides.
    """
    pois, visits = _most_visited(train["PoiId"].tolist())
    place = {poi: i for i, poi in enumerate(pois)}      # among equal scores the smaller place comes first
    visits, n = np.array(visits, dtype=np.int64), len(pois)
    following = train.groupby("TrajectoryId")["PoiId"].shift(-1)
    pair = train["PoiId"].map(place)[following.notna()] * n + following.dropna().map(place)
    # The steps as sorted (from · n + to), so that those from one place lie next to each other.
    steps, times = np.unique(pair.to_numpy(np.int64), return_counts=True)

    def ranked(prompt) -> tuple[float, int]:
        last = place.get(next(iter(prompt.shown[-1:]), None), n)
        first, end = np.searchsorted(steps, [last * n, (last + 1) * n])
        # Scores times 5 · (train's check-ins) · (steps from here): whole numbers, so equal scores are equal.
        scores = 2 * visits * max(1, times[first:end].sum())
        scores[steps[first:end] - last * n] = 5 * len(train) * times[first:end]
        top = pois[scores.argmax()] if n else NO_POI
        target = place.get(prompt.target)
        if target is None:
            return np.inf, top
        return 1 + (scores > scores[target]).sum() + (scores[:target] == scores[target]).sum(), top

    return _ranking(ranked(prompt) for prompt in test_prompts)


def _most_visited(visits: list[int]) -> tuple[list[int], list[int]]:
    """The POIs by number of visits, and those numbers; ties go to the one visited first."""
    ordered = Counter(visits).most_common()
    return [poi for poi, _ in ordered], [count for _, count in ordered]


def _ranking(of_pairs: Iterable[tuple[float, int]]) -> Ranking:
    """From each pair's (rank, top)."""
    table = np.array(list(of_pairs), dtype=np.float64).reshape(-1, 2)
    return Ranking(table[:, 0], table[:, 1].astype(np.int64))
