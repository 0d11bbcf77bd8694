"""POI-to-POI transitions of train → vectors of places, and questions about them (PAM: paper, Section 3.3).

A transition leads from one check-in to the next of its trajectory. All that is made here is made of train alone.
"""
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.neighbors import BallTree
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from checkins import questions, samples
from checkins.config import Config
from ga_llm.base import artifacts, json_text, prompts, writing
from ga_llm.base.artifacts import POI_WIDTH
from ga_llm.base.cli import UserError

NEIGHBOUR_WEIGHT = 0.1      # of a neighbour, in transitions; by the validation split of NYC
GEO_NEIGHBOURS = 5          # by default, as found there
SUCCESSORS = 5              # that an answer names
SEED = 0

logger = logging.getLogger(__name__)


def count(train: pd.DataFrame) -> pd.DataFrame:
    """PoiId, NextId, Count of each transition, in order of the ids. train: as `samples.load` gives it."""
    following = train.groupby("TrajectoryId")["PoiId"].shift(-1)
    steps = pd.DataFrame({"PoiId": train["PoiId"], "NextId": following})[following.notna()].astype("int64")
    return steps.groupby(["PoiId", "NextId"]).size().rename("Count").reset_index()


def categories(train: pd.DataFrame) -> pd.DataFrame:
    """PoiCategoryId and PoiCategoryName by POI: its most frequent in train, of equals the smaller id.

    Where that category has several names there, the first in time.
    """
    found = train.groupby(["PoiId", "PoiCategoryId"], as_index=False).agg(
        Count=("PoiId", "size"), PoiCategoryName=("PoiCategoryName", "first"))
    found = found.sort_values(["PoiId", "Count", "PoiCategoryId"], ascending=[True, False, True])
    return found.drop_duplicates("PoiId").set_index("PoiId")[["PoiCategoryId", "PoiCategoryName"]]


def neighbours(places: pd.DataFrame, k: int) -> sparse.csr_array:
    """For each of the places its k nearest on the globe: 1 at (place, neighbour) and back, else 0; by row of `places`.

    places: Latitude, Longitude in degrees.
    """
    k, size = min(k, len(places) - 1), len(places)
    if k < 1:
        return sparse.csr_array((size, size))
    points = np.radians(places[["Latitude", "Longitude"]].to_numpy(dtype=float))
    found = BallTree(points, metric="haversine").query(points, k + 1, return_distance=False)
    # A place is its own neighbour. Where more than k others lie at its very point, it may not be among those found.
    others = found != np.arange(size)[:, None]
    others[others.all(axis=1), -1] = False
    rows = np.repeat(np.arange(size), k)
    near = sparse.csr_array((np.ones(len(rows)), (rows, found[others])), shape=(size, size))
    return near.maximum(near.T)


def graph(transitions: pd.DataFrame, places: pd.DataFrame, category_of: pd.Series, geo: int, category: int
          ) -> sparse.csr_array:
    """The weights of the directed graph, by id: transitions, and NEIGHBOUR_WEIGHT for each of two kinds of neighbours.

    places: the GPS mapping by id. category_of: category id by POI. geo, category: how many nearest places, of all and
    of the same category.
    """
    size = int(places.index.max()) + 1
    edges = [(transitions["PoiId"], transitions["NextId"], transitions["Count"])]
    groups = [(places, geo)]
    if category:
        own = category_of.reindex(places.index)
        groups += [(of_category, category) for _, of_category in places.groupby(own)]
    for of_group, k in groups:
        near = neighbours(of_group, k).tocoo()
        ids = of_group.index.to_numpy()
        edges.append((ids[near.row], ids[near.col], near.data * NEIGHBOUR_WEIGHT))
    rows, columns, weights = (np.concatenate(parts) for parts in zip(*edges))
    return sparse.csr_array((weights.astype(float), (rows, columns)), shape=(size, size))    # sums what stands twice


def scaled(weights: sparse.csr_array) -> sparse.csr_array:
    """D_out^-1/2 · W · D_in^-1/2, so that popular places do not outweigh all others (Dhillon, KDD 2001)."""
    def inverse_root(sums):
        return sparse.diags_array(np.divide(1, np.sqrt(sums), out=np.zeros(len(sums)), where=sums > 0))
    return (inverse_root(weights.sum(axis=1)) @ weights @ inverse_root(weights.sum(axis=0))).tocsr()


def factors(matrix: sparse.csr_array, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(goes from, comes to), each (POIs, rank), whose product is the best approximation of `matrix` of that rank.

    The same bits from the same matrix, whatever the number of threads. An empty row or column gives a row of zeros.
    """
    with threadpool_limits(1):
        left, strength, right = randomized_svd(matrix, min(rank, *matrix.shape), n_oversamples=32, n_iter=8,
                                               random_state=SEED)
    strength[strength < 1e-9 * strength.max()] = 0      # there is nothing in these directions but rounding
    halves = []
    for half, sums in ((left, matrix.sum(axis=1)), (right.T, matrix.sum(axis=0))):
        half = np.where(sums[:, None] > 0, half * np.sqrt(strength), 0)
        halves.append(np.pad(half, ((0, 0), (0, rank - half.shape[1]))))
    return halves[0], halves[1]


def embed(weights: sparse.csr_array) -> np.ndarray:
    """Vectors (POIs, 128) float32 of a graph, of length 1: "goes from" beside "comes to", the one as long as the other.

    The dot product of one place's first half with another's second half says whether people go there. As in HOPE (Ou
    et al., KDD 2016) the halves are a truncated SVD's; scaling them to one length takes out what is left of popularity.
    A half of zeros stays zeros, and the other one no longer than elsewhere.
    """
    halves = factors(scaled(weights), POI_WIDTH // 2)
    return (np.hstack([_unit(half) for half in halves]) / np.sqrt(2)).astype(np.float32)


def read_external(path: Path, places: pd.DataFrame) -> np.ndarray:
    """Another model's vectors as float32, cut to (highest id + 1, 128). Raises UserError if they do not fit the places.

    Row n must be encoded POI id n's.
    """
    way_out = f"-from takes an array of numbers with a row for each encoded POI id and {POI_WIDTH} columns"
    try:
        rows = np.lib.format.open_memmap(path, mode="r")     # mapped: checked before memory is taken; never a pickle
    except OSError:
        raise
    except Exception as error:      # of what a broken file makes numpy raise, there is no list
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a .npy file of numbers ({reason}); {way_out}") from None
    last = int(places.index.max())
    if rows.dtype.kind not in "iuf" or rows.ndim != 2 or rows.shape[1] != POI_WIDTH:
        shape = " × ".join(map(str, rows.shape)) or "no"
        raise UserError(f"{path}: {shape} values of type {str(rows.dtype)[:50]}; {way_out}")
    if len(rows) == last and places.index.min() == 1:
        raise UserError(f"{path}: {last} rows, but ids begin at 1, and row n must be POI n's; put a row of zeros in "
                        "front")
    if len(rows) <= last:
        raise UserError(f"{path}: {len(rows)} rows, and none for POI {last}; {way_out}")
    if len(rows) > last + 1:
        logger.warning("%s: %d rows; those beyond POI %d are left out", path, len(rows), last)
    with np.errstate(over="ignore"):
        vectors = rows[:last + 1].astype(np.float32, order="C")
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        raise UserError(f"{path}, row {broken.argmax()}: a value that is not finite in float32; mend the file")
    return vectors


def write_embeddings(config: Config, geo: int, category: int, source: Path | None) -> None:
    """Write <ds>_poi_embeddings.npy, and beside it what it was made of; source: another model's vectors, if given."""
    with writing.alone(config.folder), writing.together() as new_file:
        train, places = _load(config)
        transitions = count(train)
        made_of = {"dataset": config.dataset_name, "pois": len(places)}
        if source is None:
            vectors = embed(graph(transitions, places, categories(train)["PoiCategoryId"], geo, category))
            made_of |= {"source": "transitions", "geo_neighbours": geo, "category_neighbours": category,
                        "neighbour_weight": NEIGHBOUR_WEIGHT, "seed": SEED}
        else:
            vectors = read_external(source, places)
            made_of |= {"source": str(source)}
        made_of |= {"transitions": int(transitions["Count"].sum()), "distinct_transitions": len(transitions),
                    "pois_without_successor": len(places.index.difference(transitions["PoiId"])),
                    "pois_without_predecessor": len(places.index.difference(transitions["NextId"])),
                    "pois_without_vector": int((~vectors[places.index].any(axis=1)).sum())}
        path = config.folder / artifacts.poi_embeddings(config.dataset_name)
        with new_file(path, "wb") as file:
            np.save(file, vectors, allow_pickle=False)
        with new_file(artifacts.embedding_settings(path), "wb") as file:
            file.write(json_text.dumps(made_of, indented=True) + b"\n")
        logger.info("%d transitions, %d distinct; of %d POIs %d are followed by none, %d follow none",
                    *(made_of[name] for name in ("transitions", "distinct_transitions", "pois",
                                                 "pois_without_successor", "pois_without_predecessor")))
        logger.info("%d × %d, %d POIs have a row of zeros: %s", *vectors.shape, made_of["pois_without_vector"], path)


def write_questions(config: Config, fields: tuple[str, ...] = ()) -> None:
    """Write the questions of PAM's stage 1, and beside them their settings.

    fields: show these of the user's history, and ask about the target, as the released code does (`history_records`).
    """
    with writing.alone(config.folder), writing.together() as new_file:
        train, places = _load(config)
        path = config.folder / artifacts.alignment_questions(config.dataset_name)
        with new_file(artifacts.question_settings(path), "wb") as file:
            settings = {"dataset": config.dataset_name, "stage": "pam"} | ({"fields": fields} if fields else {})
            file.write(json_text.dumps(settings) + b"\n")
        with new_file(path, "wb") as file:
            found = history_records(config, train, places, fields) if fields else records(train)
            asked = questions.write_json_array(file, found)
        logger.info("%d questions about %d POIs: %s", asked, train["PoiId"].nunique(), path)


def records(train: pd.DataFrame) -> Iterator[dict]:
    """{"question", "answer"} of each POI of train, in order of id: its id, its category and, if any, its successors."""
    following = successors(count(train))
    of = categories(train)
    for poi, category, name in zip(of.index.tolist(), of["PoiCategoryId"].tolist(), of["PoiCategoryName"]):
        pairs = [(prompts.ask_id(poi), prompts.answer_id(poi)),
                 (prompts.ask_category(poi), prompts.answer_category(name, category))]
        if poi in following:
            pairs.append((prompts.ask_successors(poi), prompts.answer_successors(following[poi])))
        for ask, answer in pairs:
            yield {"question": f"{prompts.QUESTION} {ask}", "answer": answer}


def history_records(config: Config, train: pd.DataFrame, places: pd.DataFrame, fields: tuple[str, ...]
                    ) -> Iterator[dict]:
    """{"question", "answer"} of each trajectory of train: behind all that stage 2 would show, which POI is the target's
    `<POI n>`?
    """
    texts = questions.texts(train, fields)
    yield from questions.records(config, questions.PAM, train, texts, train, texts,
                                 questions.pairs(config, train, train), places, fields)


def successors(transitions: pd.DataFrame, most: int = SUCCESSORS) -> dict[int, list[int]]:
    """By POI those that follow it most often, the most frequent first, of equals the smaller id."""
    ordered = transitions.sort_values(["PoiId", "Count", "NextId"], ascending=[True, False, True])
    return ordered.groupby("PoiId").head(most).groupby("PoiId")["NextId"].agg(list).to_dict()


def _load(config: Config) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train's sample and the GPS mapping, which fit each other."""
    train, places = samples.load(config, "train"), samples.load_places(config)
    questions.check_places(config, {"train": train}, places)
    if places.index.max() > 2 * len(places):        # a table by id would be of any size
        raise UserError(f"{config.folder / artifacts.gps_mapping(config.dataset_name)}: {len(places)} rows, but a "
                        f"GPS_id of {places.index.max()}; make it again with `{config.run_command}`")
    return train, places


def _unit(rows: np.ndarray) -> np.ndarray:
    """Each row scaled to length 1, rows of zeros left as they are."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
