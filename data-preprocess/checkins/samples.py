"""Samples: the check-ins of each split, encoded, with their trajectories; how they are made, written and read back."""
import dataclasses

import pandas as pd

from checkins import cells, encoding, files, filters, mapping, readers, splits, trajectories
from checkins.config import COUNTS, Config
from ga_llm.base import artifacts, json_text, writing
from ga_llm.base.artifacts import SPLITS
from ga_llm.base.cli import UserError

COLUMNS = ["UserId", "PoiId", "PoiCategoryId", "PoiCategoryName", "Latitude", "Longitude", "LocalTime", "TrajectoryId",
           "Split"]
ENCODED = {"user": "UserId", "poi": "PoiId", "category": "PoiCategoryId"}
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


@dataclasses.dataclass(frozen=True)
class Samples:
    """What run.py computes and writes. Tables have `COLUMNS` and are in (local time, raw-file order)."""

    sample: pd.DataFrame                        # all splits, unseen users and POIs of validation and test included
    splits: dict[str, pd.DataFrame]             # train, validate, test, without the unseen
    places: pd.DataFrame                        # the GPS mapping
    encodings: dict[str, encoding.Encoding]     # user, poi, category
    stats: dict                                 # split -> counts
    names: pd.DataFrame | None = None           # of the places, where the raw files have them


def make(config: Config) -> Samples:
    """Raw files → samples. Raises UserError if a file is wrong or nothing is left of train or test."""
    check_ins = readers.read(config)
    own_split = "Split" in check_ins
    for _ in range(0 if own_split else config.passes):
        check_ins = filters.frequent(check_ins, config.min_poi_freq, config.min_user_freq)
        check_ins = splits.by_time(check_ins, config.split_at)
        check_ins = filters.drop_isolated(check_ins, config.isolation_hours)
    if "Trajectory" in check_ins:
        check_ins["TrajectoryId"] = trajectories.by_name(check_ins)
    else:
        check_ins["TrajectoryId"] = trajectories.by_gap(check_ins, config.session_time_interval)

    train = check_ins[check_ins["Split"] == "train"]
    encodings = {field: encoding.Encoding.fit(train[column], config.first_id) for field, column in ENCODED.items()}
    names = mapping.names(train) if "PoiName" in train else None
    check_ins = check_ins.assign(**{column: encodings[field].encode(check_ins[column])
                                    for field, column in ENCODED.items()})
    places = mapping.places(check_ins[check_ins["Split"] == "train"])

    sample = trajectories.drop_single(check_ins)[COLUMNS]
    by_split = {split: sample[sample["Split"] == split] for split in SPLITS}
    for split in ("validate", "test"):
        rows = by_split[split]
        by_split[split] = rows[rows["UserId"].isin(by_split["train"]["UserId"])
                               & rows["PoiId"].isin(by_split["train"]["PoiId"])]
    for split in ("train", "test"):
        if by_split[split].empty:
            raise UserError(f"{config.path}: no check-ins left for {split}; give more data"
                            + ("" if own_split else ", or lower min_poi_freq and min_user_freq"))
    stats = {split: _counts(rows) for split, rows in by_split.items()}
    return Samples(sample, by_split, places, encodings, stats, names)


def write(config: Config, samples: Samples) -> None:
    """Write all of a data set's samples; the files appear together, when all are complete."""
    tables = {artifacts.SAMPLE: samples.sample, artifacts.gps_mapping(config.dataset_name): samples.places}
    tables |= {} if samples.names is None else {artifacts.poi_names(config.dataset_name): samples.names}
    tables |= {artifacts.split_sample(split): rows for split, rows in samples.splits.items()}
    objects = {artifacts.LABEL_ENCODING: {field: e.to_json() for field, e in samples.encodings.items()},
               artifacts.STATS: {"dataset": config.dataset_name, **samples.stats, "published": config.published}}
    with writing.together() as new_file:
        for name, table in tables.items():
            with new_file(config.folder / name) as file:
                table.to_csv(file, index=False, date_format=TIME_FORMAT)
        for name, value in objects.items():
            with new_file(config.folder / name, "wb") as file:
                file.write(json_text.dumps(value, indented=True) + b"\n")


def load(config: Config, split: str) -> pd.DataFrame:
    """One split's sample: `COLUMNS` as written (LocalTime is text) and Time (datetime64), indexed 0…n-1.

    Rows are in (local time, raw-file order), so a row's number is its place in time. Raises UserError, with the command
    that makes it, if the file is missing, empty or of another make.
    """
    path = artifacts.require(config.folder / artifacts.split_sample(split), config.run_command)
    rows, = files.tables(path, keep=COLUMNS, text=("PoiCategoryName", "LocalTime", "Split"), ours=True)
    rows["Time"] = cells.times(rows, "LocalTime", path, TIME_FORMAT)
    rows["Latitude"] = cells.latitudes(rows, "Latitude", path)
    rows["Longitude"] = cells.longitudes(rows, "Longitude", path)
    rows["PoiCategoryName"] = cells.category_names(rows["PoiCategoryName"], path)
    for column in ("UserId", "PoiId", "PoiCategoryId", "TrajectoryId"):
        rows[column] = cells.integers(rows, column, path, least=0)
    if (rows["Split"] != split).any():
        raise UserError(f"{path}: has check-ins of another split; make it again with `{config.run_command}`")
    return rows.sort_values("Time", kind="stable", ignore_index=True)


def load_places(config: Config) -> pd.DataFrame:
    """The GPS mapping, indexed by GPS_id: Latitude, Longitude (degrees)."""
    path = artifacts.require(config.folder / artifacts.gps_mapping(config.dataset_name), config.run_command)
    places, = files.tables(path, keep=artifacts.GPS_COLUMNS, ours=True)
    ids = cells.integers(places, "GPS_id", path, least=0)
    if ids.duplicated().any():
        raise UserError(f"{path}: two rows with GPS_id {ids[ids.duplicated()].iloc[0]}; make it again with "
                        f"`{config.run_command}`")
    return pd.DataFrame({"Latitude": cells.latitudes(places, "Latitude", path),
                         "Longitude": cells.longitudes(places, "Longitude", path)}).set_index(ids)


def table_of_stats(config: Config, stats: dict) -> str:
    """The counts by split as lines of text, beside the published figures where the data set has them."""
    rows = [(config.dataset_name, COUNTS)]
    for split, counts in stats.items():
        rows.append((split, [f"{counts[name]:,}" for name in COUNTS]))
        if split in config.published:
            figures = config.published[split]
            rows.append(("  published", [f"{figures[name]:,}" if name in figures else "–" for name in COUNTS]))
    return "\n".join(f"{title:<12}" + "".join(f"{cell:>14}" for cell in cells) for title, cells in rows)


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    distinct = [int(rows[column].nunique()) for column in ("UserId", "PoiId", "PoiCategoryId", "TrajectoryId")]
    return dict(zip(COUNTS, [*distinct, len(rows)]))
