"""What the released code's test does otherwise: the pairs that it counts, and what it asks of which model.

It counts those whose prompt fits in its own wording, longer than ours. A paraphrase measures it, with as many words and
marks in the same places: with Llama-2's tokenizer each check-in of NYC is as long to the token (82.3 on average, where
ours has 68.2), with others about as long.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ga_llm.base import prompts
from ga_llm.base.cli import boolean
from ga_llm.base.prompts import ANSWER, QUESTION, gps_token
from ga_llm.evaluation.baselines import read_known
from ga_llm.pairs.spelling import TestPrompt

MOST_HISTORY, MOST_TRAJECTORY, MOST_WITH_HISTORY = 600, 500, 200    # check-ins; a trajectory's target is one of them
COLUMNS = ("LocalTime", "Latitude", "Longitude", "PoiCategoryName", "PoiCategoryId")
CHECK_IN = ("On {0}, user {1} entered POI id {2}, placed at coordinates ({3:.6f}, {4:.6f}) by the coordinates token "
            "{5}. There is a {6} of category ID {7}.")
HISTORY = "Here is now older, past trajectory data of user {}:"
CURRENT = "Here now is the present trajectory of user {}:"
ASK = ("From these data, On {0}, Which POI id does user {1} enter? See that POI id is an integer of the range from 0 "
       "to {2}.")
ANSWERED = "On {0}, user {1} will enter POI id "
AT_ONCE = 2000      # check-ins; bounds the memory


def add_flags(parser) -> None:
    """The flags that do as the released test does."""
    parser.add_argument("--released_prompt", type=boolean, default=False,
                        help="ask with the released test's spaces, not those of the training: `<answer>:At …,  user`")
    parser.add_argument("--base_norms", type=boolean, default=False,
                        help="the base model's norms, not the trained ones, which the released test loses")


def asked(pair: str) -> str:
    """A joined pair with the released test's spaces: none behind `<answer>:`, two in front of the answer's user."""
    question, answer = prompts.split(pair)
    return question + answer.lstrip().replace(", user", ",  user", 1)


def fitting(test_prompts: Sequence[TestPrompt], tokenizer, length: int, sample_path: Path) -> np.ndarray | None:
    """(pairs,) bool, or None without the data set's sample.csv: whether the released code's prompt of each pair has
    at most `length` of the tokenizer's tokens.

    Its check-ins are those of the sample that it would show, whatever the pair's own prompt shows. A pair whose user,
    time and POI are not in the sample, as in a file of another wording, counts as it is (`fits`).
    """
    if not sample_path.exists():
        return None
    rows = read_known(sample_path, COLUMNS)
    in_train = (rows["Split"] == "train").to_numpy()
    time, highest = rows["LocalTime"].to_numpy(), rows["PoiId"].max()
    row_of = {key: i for i, key in enumerate(zip(rows["UserId"], time, rows["PoiId"])) if not in_train[i]}
    trajectory = list(zip(rows["TrajectoryId"], rows["Split"]))
    rows_of = rows.groupby(["TrajectoryId", "Split"], sort=False).indices
    train = np.flatnonzero(in_train)
    of_user = {user: train[found] for user, found in rows[in_train].groupby("UserId").indices.items()}
    shown = {}      # pair: (history, current)
    for i, prompt in enumerate(test_prompts):
        row = row_of.get((prompt.user, prompt.time, prompt.target))
        if row is not None:
            own, past = rows_of[trajectory[row]], of_user.get(prompt.user, train[:0])
            past = past[time[past] < time[own[0]]]
            shown[i] = (past[-MOST_HISTORY:] if len(own) <= MOST_WITH_HISTORY else past[:0],
                        own[-MOST_TRAJECTORY:-1])
    lengths = np.zeros(len(rows), dtype=np.int64)
    needed = np.unique(np.concatenate([np.empty(0, int), *(part for parts in shown.values() for part in parts)]))
    for first in range(0, len(needed), AT_ONCE):
        some = needed[first:first + AT_ONCE]
        lengths[some] = _tokens(tokenizer, [_check_in(row) for row in rows.iloc[some].itertuples()])

    example = _check_in(next(rows.itertuples()))
    alone, twice = _tokens(tokenizer, [example, f"{example} {example}"])
    seam = twice - 2 * alone        # what the space between two texts costs

    frames = dict(zip(shown, _tokens(tokenizer, [
        " ".join([QUESTION, *[HISTORY.format(prompt.user)] * (len(shown[i][0]) > 0), CURRENT.format(prompt.user),
                  ASK.format(prompt.time, prompt.user, highest), ANSWER, ANSWERED.format(prompt.time, prompt.user)])
        for i, prompt in enumerate(test_prompts) if i in shown])))
    beginning = len(tokenizer("")["input_ids"])     # BOS, where there is one

    def total(i: int) -> int:
        return beginning + frames[i] + sum(lengths[part].sum() + seam * len(part) for part in shown[i])

    return np.array([total(i) <= length if i in shown else prompt.fits for i, prompt in enumerate(test_prompts)],
                    dtype=bool)


def _check_in(row) -> str:
    return CHECK_IN.format(row.LocalTime, row.UserId, row.PoiId, row.Latitude, row.Longitude, gps_token(row.PoiId),
                           row.PoiCategoryName, row.PoiCategoryId)


def _tokens(tokenizer, texts: list[str]) -> list[int]:
    return [len(found.ids) for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
