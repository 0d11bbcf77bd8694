"""Similar trajectories (paper, Section 4; LLM4POI, Section 3.3): which earlier ones are like this one?

Each trajectory's query, what is known before its target, is compared with the keys, whole train trajectories of any
user, by the cosine of their vectors. Only what ended strictly before the query's start may be found: the rest would be
a leak.
"""
import dataclasses
import datetime
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.metrics.pairwise import linear_kernel
from sklearn.preprocessing import normalize
from tqdm import tqdm

from checkins.config import Config
from checkins.questions import SPLITS
from checkins.samples import TIME_FORMAT
from ga_llm.base import artifacts, cli, json_text, prompts, writing

MOST = 200                  # trajectories listed; more check-ins than that no prompt shows of them
TERMS = 2**20               # columns that terms are hashed to; NYC has 120,000 different ones
SCORES_AT_ONCE = 2**23      # 64 MB
KEYS_AT_ONCE = 1024
GRID = 2.0**24              # unit vectors are rounded to multiples of 1/GRID, see `_unit`
CHECK_IN = re.compile(rf"({prompts.TIME.pattern}) .*?{prompts.POI_ID.pattern} .*?category id ([0-9]+)\.")
FIELDS = {"trajectory_id": int, "user": int, "start": str, "end": str, "key": str, "query": str}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """{train,test}_kq_pairs.json by column, in order of id. ids: int64; starts, ends: datetime64, local time."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    keys: list[str]
    queries: list[str]


# Texts of keys, and of queries by split -> their vectors, of keys and by split, as `search` takes them.
Encoder = Callable[[list[str], dict[str, list[str]]], tuple[Sequence, dict[str, Sequence]]]


def write(config: Config, encoder: Encoder, top: int) -> None:
    """Write {train,test}_key_top200.json: {trajectory id: ids of the at most `top` most similar train trajectories}."""
    with writing.alone(config.folder):
        found = {split: load(config, split) for split in SPLITS}
        train = found["train"]
        asked = {split: np.flatnonzero([bool(query) for query in of.queries]) for split, of in found.items()}
        keys, queries = encoder(train.keys, {split: [of.queries[i] for i in asked[split]]
                                             for split, of in found.items()})
        with writing.together() as new_file:
            for split, of in found.items():
                lists = {trajectory: [] for trajectory in of.ids.tolist()}
                searched = search(queries[split], of.starts[asked[split]], keys, train.ends, train.ids, top)
                for query, ids in tqdm(searched, desc=split, total=len(asked[split]), unit="trajectory",
                                       disable=not cli.show_progress()):
                    lists[of.ids[asked[split][query]].item()] = ids
                path = config.folder / artifacts.similar_trajectories(split)
                with new_file(path, "wb") as file:
                    for before, (trajectory, ids) in zip(itertools.chain([b"{\n"], itertools.repeat(b",\n")),
                                                         lists.items()):
                        listed = json_text.dumps(np.asarray(ids, dtype=int).tolist())
                        file.write(before + b'"%d": %s' % (trajectory, listed))
                    file.write(b"\n}\n")
                logger.info("%d %s trajectories, %.1f similar ones each: %s", len(lists), split,
                            np.mean([len(ids) for ids in lists.values()]), path)


def load(config: Config, split: str) -> Trajectories:
    """What traj_qk.py wrote of one split. Raises UserError, with the command that makes it, if it is damaged."""
    command = config.command("traj_qk.py")
    path = artifacts.require(config.folder / artifacts.key_query_pairs(split), command)

    def damaged(what: str) -> cli.UserError:
        return cli.UserError(f"{path}: {what}; make it again with `{command}`")

    try:
        records = json_text.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(f"not JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise damaged("not an array with at least one trajectory")
    for i, record in enumerate(records):
        if not isinstance(record, dict) or any(type(record.get(name)) is not kind for name, kind in FIELDS.items()):
            raise damaged(f"trajectory {i}: not an object of " + ", ".join(FIELDS))
        if not 0 <= record["trajectory_id"] < 2**63:
            raise damaged(f"trajectory {i}: its id is none")
        key, query = record["key"], record["query"]
        # The query is the key's beginning without its target. All of it would find by the answer.
        if not (CHECK_IN.match(key) and key.startswith(record["start"]) and key.startswith(query) and key != query
                and (not query or CHECK_IN.match(query))):
            raise damaged(f"trajectory {i}: its key is no text of check-ins of which its query is the beginning")
    starts, ends = (pd.to_datetime([record[name] for record in records], format=TIME_FORMAT, errors="coerce")
                    for name in ("start", "end"))
    wrong = np.flatnonzero(~(starts <= ends))       # NaT is no less
    if len(wrong):
        raise damaged(f"trajectory {wrong[0]}: its start or end is no time, or it ends before it starts")
    ids = np.array([record["trajectory_id"] for record in records])
    order = np.argsort(ids)
    if (np.diff(ids[order]) == 0).any():
        raise damaged("two trajectories with the same id")
    keys, queries = ([records[i][name] for i in order] for name in ("key", "query"))
    return Trajectories(ids[order], starts.to_numpy()[order], ends.to_numpy()[order], keys, queries)


def light(keys: list[str], queries: dict[str, list[str]]):
    """The encoder without an LLM: hashed n-grams of places, categories and times, by TF-IDF (log tf).

    How rare a term is, is counted over all of train's keys, so also over those that end after a train query. That shows
    no query what anyone does later: it weighs terms, as the encoding of train's places numbers them. Validation and
    test are not counted, and test's queries ask after train.
    """
    vectorizer = HashingVectorizer(analyzer=terms, n_features=TERMS, alternate_sign=False, norm=None)
    counts = vectorizer.transform(keys)
    weigh = TfidfTransformer(sublinear_tf=True).fit(counts)
    return weigh.transform(counts), {split: weigh.transform(vectorizer.transform(texts)) if texts else texts
                                     for split, texts in queries.items()}


def terms(text: str) -> Iterator[str]:
    """What `light` counts in a trajectory's text: its places, categories, hours, weekdays, and pairs in a row of the
    first two. Not the user, so that two users' alike trajectories are alike.
    """
    visits = CHECK_IN.findall(text)
    for time, poi, category in visits:
        yield from (f"poi {poi}", f"category {category}", f"hour {time[11:13]}", f"weekday {_weekday(time[:10])}")
    for (_, *before), (_, *after) in itertools.pairwise(visits):
        yield from (f"{kind} {a} {b}" for kind, a, b in zip(("pois", "categories"), before, after))


@functools.lru_cache(maxsize=100_000)
def _weekday(date: str) -> int:
    try:
        return datetime.date.fromisoformat(date).weekday()
    except ValueError:
        raise cli.UserError(f"{{train,test}}_kq_pairs.json: {date} is no date; make them again with traj_qk.py"
                            ) from None


def by_text(encode: Callable[[list[str]], Sequence]) -> Encoder:
    """The encoder that takes each text by itself; each split's queries apart, so that none depends on test's."""
    return lambda keys, queries: (encode(keys), {split: encode(texts) if texts else texts
                                                 for split, texts in queries.items()})


def search(queries: Sequence, starts: np.ndarray, keys: Sequence, ends: np.ndarray, ids: np.ndarray, top: int,
           scores_at_once: int = SCORES_AT_ONCE) -> Iterator[tuple[int, np.ndarray]]:
    """For each query its number and the ids of the `top` keys most similar to it that ended before it starts.

    queries, keys: rows of numbers, which `[row numbers]` gives as an array or a CSR matrix. starts, ends: datetime64,
    of queries and keys. The most similar first, and of equals the smaller id; keys at a cosine of 0 or less have
    nothing in common with the query, and are not listed. Departure from the usual k-nearest-neighbour search, which
    knows neither a limit for each query nor an order of equals: here both are exact, whatever the size of a block.
    """
    in_time, by_end = np.argsort(starts, kind="stable"), np.argsort(ends, kind="stable")
    ids, ended = ids[by_end], np.searchsorted(ends[by_end], starts[in_time], side="left")      # strictly before
    block = max(1, scores_at_once // max(1, len(ids)))
    for rows in _slices(len(in_time), block):
        # Sorted by time, a block meets only what ended before its last query.
        scores = np.empty((rows.stop - rows.start, ended[rows][-1]))
        vectors = _unit(queries[in_time[rows]])
        for some in _slices(scores.shape[1], KEYS_AT_ONCE):
            scores[:, some] = linear_kernel(vectors, _unit(keys[by_end[some]]), dense_output=True)
        for query, count, own in zip(in_time[rows].tolist(), ended[rows], scores):
            yield query, ids[:count][_best(own[:count], ids[:count], top)]


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(first, min(count, first + size)) for first in range(0, count, size))


def _unit(vectors):
    """Rows of length 1, as multiples of 2^-24: products and sums of these are exact in float64, in any order.

    So equal trajectories have equal scores, and no block, thread or library decides which comes first.
    """
    vectors = normalize(vectors.astype(np.float64))
    if isinstance(vectors, np.ndarray):
        return np.round(vectors * GRID) / GRID
    vectors.data = np.round(vectors.data * GRID) / GRID
    return vectors


def _best(scores: np.ndarray, ids: np.ndarray, top: int) -> np.ndarray:
    """The places of the `top` largest scores above 0, the largest first, and of equal ones the smaller id first."""
    found = np.flatnonzero(scores > 0)
    if len(found) > top:
        found = found[scores[found] >= np.partition(scores[found], -top)[-top]]
    return found[np.lexsort((ids[found], -scores[found]))[:top]]
