"""A user's check-ins and a time in, the most likely places out: asking as in training, ranking, answering.

The question is the one that process_llm_gps.py would write for these check-ins: those that no gap of more than
`session_time_interval` separates from each other and from the time asked about are the current trajectory, the
earlier ones the history. (It drops lone check-ins beforehand; here they stay.) Coordinates are the GPS mapping's, a
POI's category is its most frequent one in train.
"""
import dataclasses
import datetime
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ga_llm.base import artifacts, prompts
from ga_llm.base.cli import UserError
from ga_llm.base.reading import WAY_OUT, read_tensors
from ga_llm.evaluation import metrics, pointed, ranking
from ga_llm.llm import beside, pointing
from ga_llm.pairs.check_ins import Shown
from ga_llm.pairs.spelling import Spelling
from ga_llm.serving.check_in_files import TIME_FORMAT, CheckIn
from ga_llm.serving.export import check_questions
from ga_llm.serving.places import Places
from ga_llm.training.checkpoints import AGREEMENT, read_agreement

END, END_OF_TOKEN = ".", ">."       # what stands behind the id in our wording, and behind that of `<GPS n>`
WIDTH, NO_NAME = 80, "–"            # columns of what is printed


@dataclasses.dataclass
class Asking:
    """How an exported model is asked (its ga_llm.json). context: tokens; gap: minutes."""
    context: int
    dataset: str
    places: str
    questions: dict
    gap: float
    max_current: int
    max_current_with_history: int
    beside: dict = dataclasses.field(default_factory=dict)      # a pointer, if it has one (`llm.beside`)

    @property
    def answers_by_token(self) -> bool:
        """By `<GPS n>`, not by `POI id n`."""
        return self.questions.get("answer") == "token"


def read_asking(model: Path) -> Asking:
    """Raises UserError if `model` is no folder that export.py wrote."""
    path = model / AGREEMENT
    if not model.is_dir():
        raise UserError(f"--model {model}: no such folder; make it with `python export.py`")
    found = read_agreement(model)
    trajectories = found.get("trajectories")
    if not isinstance(trajectories, dict) or "questions" not in found:
        raise UserError(f"{path}: not there, or of a checkpoint; give a folder that `python export.py` made")
    check_questions(found["questions"], path)
    names = ("session_time_interval", "max_current", "max_current_with_history")
    for name in names:
        if type(trajectories.get(name)) not in (int, float) or trajectories[name] < 0:
            raise UserError(f"{path}: {name} is {str(trajectories.get(name))[:100]!r}; {WAY_OUT}")
    return Asking(found.get("model_max_length"), found.get("dataset"), found.get("places"), found["questions"],
                  *(trajectories[name] for name in names), found.get("beside", {}))


def split(check_ins: Sequence[CheckIn], time: datetime.datetime, asking: Asking) -> tuple[list, list]:
    """(history, current trajectory) of the check-ins before `time`, as process_llm_gps.py cuts them."""
    first, following = len(check_ins), time
    while first and (following - check_ins[first - 1].time).total_seconds() <= 60 * asking.gap:
        first -= 1
        following = check_ins[first].time
    current, most, step = check_ins[first:], asking.questions["max_history"], asking.questions.get("history_step")
    start = max(0, first - most)
    if step:        # a long history begins at a multiple of it
        start = min(first, -(-start // step) * step)
    history = [] if len(current) > asking.max_current_with_history else check_ins[start:first]
    return list(history), list(current[max(0, len(current) - asking.max_current):])


def pair(check_ins: Sequence[CheckIn], time: datetime.datetime, user: int, places: Places, asking: Asking) -> str:
    """The joined pair of these check-ins; the answer's POI id is a stand-in, for nobody knows it."""
    fields = asking.questions["fields"]
    history, current = split(check_ins, time, asking)
    shown = [prompts.check_in(fields, check_in.time.strftime(TIME_FORMAT), user, check_in.poi,
                              *places.coordinates[check_in.poi], *places.category[check_in.poi])
             for check_in in (*history, *current)]
    moment = ""
    if prompts.MOMENT in fields:
        *seconds, last = _seconds([*(check_in.time for check_in in (*history, *current)), time])
        shown, moment = prompts.in_tokens(shown, seconds, last)
    parts = shown[:len(history)], shown[len(history):]
    if prompts.MOMENT in fields:
        parts = [["".join(part)] if part else [] for part in parts]
    first, last = int(places.mapping.ids.min()), int(places.mapping.ids.max())
    at = time.strftime(TIME_FORMAT)
    question = prompts.question(user, [], *parts, prompts.ask_poi(at, user, first, last))
    return prompts.join(question, prompts.answer_poi(at, user, first, moment, asking.answers_by_token))


def _seconds(times: Sequence[datetime.datetime]) -> list[int]:
    """Local times as seconds since 1970."""
    return [int((time - datetime.datetime(1970, 1, 1)).total_seconds()) for time in times]


def shown(check_ins: Sequence[CheckIn], time: datetime.datetime, places: Places, asking: Asking) -> Shown:
    """What the pair of these check-ins shows, and where from nothing was cut; the target's place is a stand-in."""
    history, current = split(check_ins, time, asking)
    row = {poi: i for i, poi in enumerate(places.mapping.ids.tolist())}
    seconds = np.array(_seconds([*(check_in.time for check_in in (*history, *current)), time]))
    # A trajectory ends where the gap is longer than it may be.
    trajectory = np.cumsum(np.diff(seconds, prepend=seconds[0]) > 60 * asking.gap)
    rows = np.array([*(row[check_in.poi] for check_in in (*history, *current)), 0])
    return Shown.of(seconds, rows, trajectory, np.zeros(len(rows) - 1))


def load_pointer(folder: Path, described: dict, model, tokenizer, places: Places) -> None:
    """Let `model` of an exported folder have the pointer that lies there, if ga_llm.json tells of one."""
    if described:
        path = artifacts.require(folder / artifacts.POINTER, "python export.py")
        token_ids = np.asarray(tokenizer.convert_tokens_to_ids(places.mapping.tokens))
        beside.read(described, read_tensors(path), path, places.mapping, model.get_input_embeddings().embedding_dim,
                    token_ids, None).settle(model)


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which places may be recommended; without any all. km: from the last check-in, along the great circle."""
    visited: bool = True                        # may those where the user has been?
    km: float | None = None
    candidates: frozenset[int] | None = None

    def left(self, past: Sequence[CheckIn], places: Places) -> list[int] | None:
        """The POIs that may be, in the order of their ids; None: no filter is set."""
        if self == Filters():
            return None
        ids = np.sort(places.mapping.ids)
        allowed = np.ones(len(ids), dtype=bool)
        if not self.visited:
            allowed &= ~np.isin(ids, [check_in.poi for check_in in past])
        if self.km is not None:
            allowed &= metrics.distances(ids, [past[-1].poi] * len(ids), places.mapping) <= self.km
        if self.candidates is not None:
            allowed &= np.isin(ids, list(self.candidates))
        return ids[allowed].tolist()


class Recommender:
    """An exported model with its places; what all users share is made once."""

    def __init__(self, model, tokenizer, places: Places, asking: Asking):
        self.model, self.places, self.asking = model, places, asking
        ids = sorted(places.mapping.ids.tolist())
        self.spelled = Spelling(tokenizer, ids, END_OF_TOKEN if asking.answers_by_token else END)
        self.trie = self.all = ranking.Trie(self.spelled.tokens)
        self.token_ids = np.asarray(tokenizer.convert_tokens_to_ids(places.mapping.tokens))
        self.checked = False

    @property
    def has_pointer(self) -> bool:
        return getattr(self.model, pointing.MODULE, None) is not None

    def answer(self, user: int, past: Sequence[CheckIn], time: datetime.datetime, k: int,
               filters: Filters = Filters()) -> dict:
        """What is told of the `k` best places after `past`, the check-ins before `time`, which are not none.

        user: encoded. Probabilities are normalised over all places, for an LLM also gives some to what is no id, and
        "probability_of_all_pois" is what they had before. With filters they are the model's own, not normalised over
        the places that are left, and "probability_of_places_left" is their sum. fits: nothing was cut from the
        question.
        """
        history, current = split(past, time, self.asking)
        prompt, left = self._prompt(user, past, time), filters.left(past, self.places)
        log_probs = self._rank(prompt, left)
        order = np.argsort(-log_probs, kind="stable")
        total = np.logaddexp.reduce(log_probs) if len(order) else -np.inf
        best = np.exp(log_probs[order[:k]] - (total if left is None else 0))
        places = describe(np.array(self.all.candidates if left is None else left, dtype=np.int64)[order[:k]].tolist(),
                          best.tolist(), past[-1].poi, self.places)
        return {"time": time.strftime(TIME_FORMAT), "user": user, "history": len(history), "current": len(current),
                "pointer": self.has_pointer, "fits": prompt.fits, "ranked": len(order),
                "probability_of_all_pois" if left is None else "probability_of_places_left": float(np.exp(total)),
                "places": places, **({} if places else {"note": "the filters leave no place"})}

    def _prompt(self, user: int, past: Sequence[CheckIn], time: datetime.datetime):
        asked = pair(past, time, user, self.places, self.asking)
        prompt, = self.spelled.prompts([asked], self.asking.context, "the question", tried=self.checked)
        prompt = dataclasses.replace(prompt, target=metrics.NO_POI)     # none to search the rank of
        if self.has_pointer:
            (prompt, at, _), = pointed.positions([prompt], self.token_ids)
            prompt = dataclasses.replace(prompt, check_ins=shown(past, time, self.places, self.asking).latest(at))
        return prompt

    def _rank(self, prompt, left: Sequence[int] | None) -> np.ndarray:
        """Log-probabilities of the places that are `left`, or of all. Others are never asked for."""
        if not self.checked:
            ranking.check(self.model, self.all, prompt)
            self.checked = True
        if left is not None and not left:
            return np.empty(0)
        if left is None:
            self.trie = self.all
        elif self.trie.candidates != left:
            # Spelled as among all, where an id needs its end if another begins with it: so P is what it is there.
            self.trie = ranking.Trie({poi: self.spelled.tokens[poi] for poi in left})
        group, = ranking.plan([prompt], 1)
        (_, (found,)), = ranking.rank(self.model, self.trie, group, full=True)
        return found.log_probs.astype(np.float64)


def describe(pois: Sequence[int], probabilities: Sequence[float], last: int, places: Places) -> list[dict]:
    """What is told of each recommended place. last: the POI of the last check-in, from where km are counted."""
    km = metrics.distances(list(pois), [last] * len(pois), places.mapping)
    return [{"rank": i, "poi": poi, **places.describe(poi), "probability": p, "km": float(distance)}
            for i, (poi, p, distance) in enumerate(zip(pois, probabilities, km), start=1)]


def visits(check_ins: Sequence[CheckIn], places: Places) -> list[dict]:
    """The check-ins, in their order, for the map."""
    return [{**places.describe(check_in.poi), "time": check_in.time.strftime(TIME_FORMAT)} for check_in in check_ins]


def text(answer: dict) -> str:
    """An answer for a person, at most `WIDTH` columns wide."""
    found, normalised = answer["places"], "probability_of_all_pois" in answer
    head = (f"User {answer['user']} at {answer['time']}: {len(found)} of {answer['ranked']:,} places"
            f"{'' if normalised else ' that the filters leave'}, after {answer['history']} check-ins of history and "
            f"{answer['current']} of the current trajectory, by the LLM{' and its pointer' * answer['pointer']}. ")
    if not found:
        return textwrap.fill(f"{head}To recommend: none, {answer['note']}.", WIDTH)
    head += ("Probabilities are normalised over all places; " if normalised else
             "Probabilities are the model's own, not normalised over the places that are left; ")
    return f"{textwrap.fill(head + 'km are from the last check-in.', WIDTH)}\n\n{table(found)}"


def table(found: Sequence[dict]) -> str:
    """Aligned text; what is cut ends in …. Where places have names, these stand for their ids."""
    columns = [("name", 26), ("category", 24)] if "name" in found[0] else [("category", 24), ("id", 26)]
    lines = [f"{'':>3}  {'probability':>11}  {'km':>8}  " + "  ".join(f"{name:{width}}" for name, width in columns)]
    for row in found:
        cells = [f"{_cut(row[name] or NO_NAME, width):{width}}" for name, width in columns]
        lines.append(f"{row['rank']:>3}  {100 * row['probability']:>9.2f} %  {row['km']:>8.2f}  {'  '.join(cells)}")
    return "\n".join(line.rstrip() for line in lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "…"
