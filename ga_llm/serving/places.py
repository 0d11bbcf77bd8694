"""What a data set's preprocessed folder says of its places, users and categories."""
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json
from ga_llm.evaluation import baselines
from geo_encoder.gps_tokens import GPSMapping, read_gps_mapping

log = logging.getLogger(__name__)

UNKNOWN = "unknown"     # the category's name of a POI that train_sample.csv does not have


@dataclasses.dataclass
class Places:
    """raw: {encoded POI id: raw id}; coordinates: {encoded: degrees}; category: {encoded: (name, id)}; names: {encoded:
    the place's own name}, empty where the data has none.
    """
    mapping: GPSMapping
    labels: dict[str, dict]
    raw: dict[int, str]
    coordinates: dict[int, tuple[float, float]]
    category: dict[int, tuple[str, int]]
    names: dict[int, str]

    def encode(self, field: str, text: str) -> int | None:
        """The id of a raw user or POI; None if train has none."""
        return self.labels[field]["of"].get(text)

    def describe(self, poi: int) -> dict:
        """Raw id, name (None if it has none, and no such key if none has), category, degrees."""
        name = {"name": self.names.get(poi)} if self.names else {}
        return {"id": self.raw.get(poi, str(poi)), **name, "category": self.category[poi][0],
                "latitude": self.coordinates[poi][0], "longitude": self.coordinates[poi][1]}


def read_places(dataset: str, root: Path | str, digest: str, trained_on: str) -> Places:
    """Raises UserError if files are missing or broken, or the places are not those of the model.

    digest, trained_on: the mapping's and the data set's name, which the model was exported with.
    """
    folder = artifacts.preprocessed(dataset, root)
    path = folder / artifacts.gps_mapping(dataset)
    mapping = read_gps_mapping(path)
    if mapping.digest != digest:
        raise UserError(f"{path}: other places than those that the model was exported with (data set {trained_on})"
                        "; give --dataset_name and --data_path of the training")
    labels = read_labels(folder / artifacts.LABEL_ENCODING)
    raw = {poi: text for text, poi in labels["poi"]["of"].items()}
    of_poi = dict(zip(mapping.ids.tolist(), zip(mapping.latitude.tolist(), mapping.longitude.tolist())))
    return Places(mapping, labels, raw, of_poi, read_categories(folder / artifacts.split_sample("train"),
                                                                of_poi, labels["category"]["unseen"]),
                  read_names(folder / artifacts.poi_names(dataset), labels["poi"]["of"]))


def read_names(path: Path, of: dict[str, int]) -> dict[int, str]:
    """{encoded POI id: name} of `<ds>_poi_names.csv`; none if it is not there. of: {raw POI id: encoded}; others count
    for nothing. Raises UserError if the file is broken.
    """
    if not path.exists():
        return {}
    try:
        rows = pd.read_csv(path, usecols=artifacts.NAME_COLUMNS, keep_default_na=False, index_col=False, dtype=str)
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; give it a header {','.join(artifacts.NAME_COLUMNS)}, "
                        "or remove it") from None
    named = zip(*(rows[column].tolist() for column in artifacts.NAME_COLUMNS))
    return {of[poi]: " ".join(name.split()) for poi, name in named if poi in of and name.strip()}


def user_ids(users: Sequence[str | None], places: Places) -> list[int]:
    """The ids of raw users; None is one whom nobody has named."""
    ids = [None if user is None else places.encode("user", user) for user in users]
    unknown, unseen = [user for user, own in zip(users, ids) if own is None], places.labels["user"]["unseen"]
    if unknown:
        who = f"user {unknown[0]} is not in train" if unknown[0] is not None else "no --user"
        if len(users) > 1:
            who = f"{len(unknown)} of {len(users)} users are not in train, such as {unknown[0]}"
        log.warning("%s: asked for as user %d, who stands for all that train does not have", who, unseen)
    return [unseen if own is None else own for own in ids]


def read_labels(path: Path) -> dict[str, dict]:
    """{user, poi, category: {"unseen": id, "of": {raw, as text: id}}} of label_encoding.json."""
    found = read_json(artifacts.require(path, baselines.MADE_BY))
    labels = {}
    for field in ("user", "poi", "category"):
        part = found.get(field)
        if (not isinstance(part, dict) or not isinstance(part.get("values"), list)
                or any(type(part.get(name)) is not int for name in ("first_id", "unseen"))):
            raise UserError(f"{path}: {field} has no values, first_id and unseen; make it again with "
                            f"`{baselines.MADE_BY}`")
        labels[field] = {"unseen": part["unseen"],
                         "of": {str(value): i for i, value in enumerate(part["values"], start=part["first_id"])}}
    return labels


def read_categories(path: Path, pois, unseen: int) -> dict[int, tuple[str, int]]:
    """{POI: (name, id) of its most frequent category in train, of equals the one seen first}."""
    columns = ["PoiId", "PoiCategoryId", "PoiCategoryName"]
    try:
        rows = pd.read_csv(artifacts.require(path, baselines.MADE_BY), usecols=columns, keep_default_na=False,
                           dtype={"PoiId": np.int64, "PoiCategoryId": np.int64, "PoiCategoryName": str})
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; make it again with `{baselines.MADE_BY}`") from None
    counts = rows.value_counts(columns, sort=False).rename("n").reset_index()
    order = rows.drop_duplicates().reset_index(drop=True).reset_index().merge(counts, on=columns)
    best = order.sort_values(["n", "index"], ascending=[False, True]).drop_duplicates("PoiId")
    found = dict(zip(best["PoiId"].tolist(), zip(best["PoiCategoryName"].tolist(), best["PoiCategoryId"].tolist())))
    return {poi: found.get(poi, (UNKNOWN, unseen)) for poi in pois}
