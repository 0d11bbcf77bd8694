"""Raw files of each format → one table of check-ins.

The table's columns: UserId, PoiId, PoiCategoryId (as in the file), PoiCategoryName, Latitude and Longitude (degrees),
LocalTime (datetime64, whole seconds); Split, Trajectory and PoiName (text) where the files have their own. Whatever a
file has wrong raises a UserError of one line with its name and the line's number. Any file may be given as `.gz`.

Files of the known formats go round in variants: with a header or none, with commas or tabs, their columns in another
order, under other names and with others between, and times written otherwise. All are read (see `files.tables`).
"""
import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from checkins import cells, files
from checkins.config import Config
from checkins.wording import short
from ga_llm.base import globe, prompts
from ga_llm.base.artifacts import SPLITS
from ga_llm.base.cli import UserError

GENERATE_CA = "make it with `python data-preprocess/generate_ca_raw.py`"
OFFSETS = -24 * 60, 24 * 60     # minutes
CHUNK = 500_000                 # rows of the millions in memory at once
NO_CATEGORY = "place"           # of places of which none is known
SPLIT_NAMES = {"train": "train", "training": "train", "validate": "validate", "validation": "validate",
               "valid": "validate", "val": "validate", "dev": "validate", "test": "test", "testing": "test"}
# What a column may be called, as `files.plain` gives it; in order of preference.
USERS = ("userid", "user", "uid")
POIS = ("poiid", "venueid", "placeid", "locationid", "spotid", "poi", "venue", "place", "location", "spot")
LATITUDES, LONGITUDES = ("latitude", "lat"), ("longitude", "lon", "lng", "long")
CATEGORY_IDS = ("categoryid", "venuecategoryid", "poicategoryid", "poicatid", "catid")
CATEGORIES = ("categoryname", "venuecategoryname", "venuecategory", "poicategoryname", "poicatname", "catname",
              "category")
UTC_TIMES = ("utctime", "utctimestamp", "utcdatetime", "checkintime", "timestamp", "datetime", "createdat", "time")
TIME_OFFSETS = ("timezoneoffset", "timezoneoffsetinminutes", "utcoffset", "timezone", "offset", "tz")
TRAJECTORIES = ("trajectoryid", "pseudosessiontrajectoryid", "trajid", "sessionid", "trailid")

TSMC2014 = {"user": USERS, "venue": POIS, "category id": CATEGORY_IDS, "category name": CATEGORIES,
            "latitude": LATITUDES, "longitude": LONGITUDES, "timezone offset": TIME_OFFSETS, "UTC time": UTC_TIMES}
GETNEXT = {"user_id": USERS, "POI_id": POIS, "POI_catname": CATEGORIES, "latitude": LATITUDES, "longitude": LONGITUDES,
           "trajectory_id": TRAJECTORIES, "POI_catid": CATEGORY_IDS, "local_time": ("localdatetime",),
           "UTC_time": UTC_TIMES, "timezone": TIME_OFFSETS}
GOWALLA = {"UserId": USERS, "PoiId": POIS, "PoiCategoryId": CATEGORY_IDS, "Latitude": LATITUDES,
           "Longitude": LONGITUDES, "UTCTime": UTC_TIMES}
TIST2015 = {"user": USERS, "venue": POIS, "UTC time": UTC_TIMES, "timezone offset": TIME_OFFSETS}
TIST2015_POIS = {"venue": POIS, "latitude": LATITUDES, "longitude": LONGITUDES, "category name": CATEGORIES,
                 "country": ("countrycode", "country")}
SNAP = {"user": USERS, "UTC time": UTC_TIMES, "latitude": LATITUDES, "longitude": LONGITUDES, "location id": POIS}

logger = logging.getLogger(__name__)


def read(config: Config) -> pd.DataFrame:
    """All check-ins of a data set in (local time, raw-file order), indexed 0…n-1."""
    reader = {"getnext": _getnext, "tsmc2014": _tsmc2014, "gowalla": _gowalla, "tist2015": _tist2015, "snap": _snap,
              "csv": _csv}[config.format]
    return reader(config).sort_values("LocalTime", kind="stable", ignore_index=True)


def _getnext(config: Config) -> pd.DataFrame:
    """GETNext's three files: the split and the trajectories are theirs."""
    parts = []
    for split in SPLITS:        # check-ins of equal time: train's first, whatever the YAML's order
        path = files.find(config.raw[split], config.raw_from, other_names=True)
        text = ("POI_id", "POI_catid", "POI_catname", "local_time", "UTC_time", "trajectory_id")
        for frame in files.tables(path, keep=[*GETNEXT][:6], names=GETNEXT, text=text, rows_needed=split != "validate",
                                  instead={"POI_catid": (), "local_time": ("UTC_time", "timezone")}):
            category = frame.get("POI_catid", frame["POI_catname"])
            local = (cells.local_times(frame, "local_time", path) if "local_time" in frame else
                     _local(frame, "UTC_time", "timezone", path))
            parts.append(_check_ins(
                path, cells.integers(frame, "user_id", path), frame["POI_id"], category, frame["POI_catname"], frame,
                "latitude", "longitude", local,
            ).assign(Split=split, Trajectory=frame["trajectory_id"]))
    return pd.concat(parts, ignore_index=True)


def _tsmc2014(config: Config) -> pd.DataFrame:
    """Foursquare's TSMC2014 format: local time is UTC plus the offset in minutes."""
    path = files.find(config.raw["check_ins"], config.raw_from, other_names=True)
    frame, = files.tables(path, order=[*TSMC2014], keep=[name for name in TSMC2014 if name != "category id"],
                          instead={"category id": ()}, names=TSMC2014, errors=files.OR_LATIN_1,
                          text=("venue", "category id", "category name", "UTC time"))
    return _check_ins(path, cells.integers(frame, "user", path), frame["venue"],
                      frame.get("category id", frame["category name"]), frame["category name"], frame, "latitude",
                      "longitude", _local(frame, "UTC time", "timezone offset", path))


def _gowalla(config: Config) -> pd.DataFrame:
    """What generate_ca_raw.py writes. UTC counts as local time, as in the paper's data."""
    path = files.find(config.raw["check_ins"], GENERATE_CA)
    frame, = files.tables(path, keep=[*GOWALLA], names=GOWALLA, text=("PoiCategoryId", "UTCTime"))
    return _check_ins(path, cells.integers(frame, "UserId", path), cells.integers(frame, "PoiId", path),
                      frame["PoiCategoryId"], cells.gowalla_names(frame["PoiCategoryId"], path), frame, "Latitude",
                      "Longitude", cells.utc_times(frame, "UTCTime", path))


def _tist2015(config: Config) -> pd.DataFrame:
    """Foursquare's global-scale check-ins at the venues in a box: local time is UTC plus the offset in minutes."""
    path, pois_path = (files.find(config.raw[role], config.raw_from, other_names=True)
                       for role in ("check_ins", "pois"))
    columns = [name for name in TIST2015_POIS if name != "country"]
    pois = pd.concat([frame[_in_box(frame, config, pois_path)] for frame in files.tables(
        pois_path, order=[*TIST2015_POIS], keep=columns, names=TIST2015_POIS, text=("venue", "category name"),
        errors=files.OR_LATIN_1, chunk=CHUNK)])
    if pois.empty:
        raise _nothing_in_box(pois_path, config)
    pois["category name"] = cells.category_names(pois["category name"], pois_path)
    twice = pois["venue"].duplicated()
    if twice.any():
        logger.warning("%s: %d venues stand there twice; the first of each counts", pois_path, twice.sum())
    pois = pois[~twice].set_index("venue")

    def local(rows: pd.DataFrame) -> pd.DataFrame:
        place = pois.loc[rows["venue"]].set_index(rows.index)
        return _check_ins(path, cells.integers(rows, "user", path), rows["venue"], place["category name"],
                          place["category name"], place, "latitude", "longitude",
                          _local(rows, "UTC time", "timezone offset", path))
    return _gathered(path, config, (local(frame[frame["venue"].isin(pois.index)]) for frame in files.tables(
        path, order=[*TIST2015], keep=[*TIST2015], names=TIST2015, text=("venue", "UTC time"), chunk=CHUNK)))


def _snap(config: Config) -> pd.DataFrame:
    """Brightkite's or Gowalla's check-ins in a box, as SNAP gives them: UTC, of which `time_zone` makes local time.

    There are no categories. A few of Brightkite's rows have empty cells; they are left out, and counted.
    """
    path = files.find(config.raw["check_ins"], config.raw_from, other_names=True)
    broken = 0

    def local(frame: pd.DataFrame) -> pd.DataFrame:
        nonlocal broken
        whole = frame.dropna()
        broken += len(frame) - len(whole)
        rows = whole[_in_box(whole, config, path)]
        utc = cells.utc_times(rows, "UTC time", path)
        category = pd.Series(NO_CATEGORY, rows.index)
        return _check_ins(path, cells.integers(rows, "user", path), rows["location id"], category, category, rows,
                          "latitude", "longitude", cells.in_zone(utc, config.time_zone) if config.time_zone else utc)
    found = _gathered(path, config, (local(frame) for frame in files.tables(
        path, order=[*SNAP], keep=[*SNAP], names=SNAP, text=("UTC time", "location id"), empty=[*SNAP], chunk=CHUNK)))
    if broken:
        logger.warning("%s: %d rows with empty cells left out", path, broken)
    _say_no_category(path)
    if not config.time_zone:
        logger.info("%s: UTC counts as local time; give time_zone to have it converted", path)
    return found


def _in_box(frame: pd.DataFrame, config: Config, path: Path) -> pd.Series:
    """Which rows lie in the `bounding_box`. What lies off the globe lies in none, and needs no error."""
    latitude, longitude = (cells.numbers(frame, name, path) for name in ("latitude", "longitude"))
    return globe.in_box(latitude, longitude, **config.bounding_box) & longitude.between(-180, 180)


def _gathered(path: Path, config: Config, parts: Iterator[pd.DataFrame]) -> pd.DataFrame:
    """The check-ins of all parts of a large file. Raises UserError if there are none."""
    kept = []
    for number, part in enumerate(parts, start=1):
        kept.append(part)
        logger.info("%s: part %d of up to %d rows read, %d check-ins kept", path, number, CHUNK, sum(map(len, kept)))
    if not any(map(len, kept)):
        raise _nothing_in_box(path, config)
    return pd.concat([part for part in kept if len(part)])


def _nothing_in_box(path: Path, config: Config) -> UserError:
    sides = ", ".join(f"{side} {degrees}" for side, degrees in config.bounding_box.items())
    return UserError(f"{path}: nothing in the bounding_box of {config.path} ({sides}); give another box, or check the "
                     "file")


def _csv(config: Config) -> pd.DataFrame:
    """CSVs of one's own, their columns named by the YAML's `columns`. Ids are text; a category is its own name."""
    if "check_ins" in config.raw:
        return _own(files.find(config.raw["check_ins"], config.raw_from), config)
    parts = [_own(files.find(config.raw[split], config.raw_from), config, rows_needed=split != "validate")
             .assign(Split=split) for split in SPLITS if split in config.raw]
    return pd.concat(parts, ignore_index=True)


def _own(path: Path, config: Config, rows_needed: bool = True) -> pd.DataFrame:
    """One CSV of one's own."""
    column = config.columns
    names = list(dict.fromkeys(column.values()))
    text = tuple(name for role, name in column.items() if role not in ("lat", "lon", "offset"))
    empty = {column["name"]} - {column[role] for role in column if role != "name"} if "name" in column else ()
    frame, = [*files.tables(path, keep=names, text=text, empty=empty, rows_needed=rows_needed)] or [
        pd.DataFrame(columns=names)]
    if "category" in column:
        category = frame[column["category"]]
    else:
        category = pd.Series(NO_CATEGORY, frame.index)
        _say_no_category(path)
    found = _check_ins(path, frame[column["user"]], frame[column["poi"]], category, category, frame, column["lat"],
                       column["lon"], _own_times(path, frame, config))
    if "split" in column:
        given = frame[column["split"]]
        split = given.str.strip().str.lower().map(SPLIT_NAMES)
        files.reject(split.isna(), path,
                     lambda line: f"{given.name} {short(given[line])} is none of {', '.join(SPLIT_NAMES)}")
        found["Split"] = split
    if "name" in column:        # for people alone: no prompt shows it
        found["PoiName"] = cells.by_value(frame[column["name"]].fillna(""), lambda name: " ".join(name.split()))
    if "trajectory" in column:
        found["Trajectory"] = frame[column["trajectory"]]
    return found


def _say_no_category(path: Path) -> None:
    logger.info("%s: no categories, so every place's is %s; -fields %s leaves it out of the prompts", path, NO_CATEGORY,
                ",".join(field for field in prompts.FIELDS if field != "category"))


def _own_times(path: Path, frame: pd.DataFrame, config: Config) -> pd.Series:
    """Local times: the file's, or, where the YAML tells how far they are off, or they can be no others, UTC's."""
    time = config.columns["time"]
    if "offset" in config.columns:
        return _local(frame, time, config.columns["offset"], path)
    if config.time_zone is not None:
        return cells.in_zone(cells.utc_times(frame, time, path), config.time_zone)
    if cells.are_utc(frame[time]):
        logger.warning("%s: %s are UTC, which counts as local time; give time_zone, or an offset under columns, to "
                       "have it converted", path, time)
        return cells.utc_times(frame, time, path)
    if cells.have_zones(frame[time]):
        logger.warning("%s: %s are taken as local times; their offsets (Z, +09:00) are ignored", path, time)
    return cells.local_times(frame, time, path)


def _local(frame: pd.DataFrame, utc: str, offset: str, path: Path) -> pd.Series:
    """UTC plus the offset in minutes, both columns of `frame`, as datetime64."""
    minutes = cells.integers(frame, offset, path, *OFFSETS)
    return cells.utc_times(frame, utc, path) + pd.to_timedelta(minutes, unit="min")


def _check_ins(path, users, pois, categories, names, frame, latitude, longitude, local) -> pd.DataFrame:
    return pd.DataFrame({
        "UserId": users, "PoiId": pois, "PoiCategoryId": categories,
        "PoiCategoryName": cells.category_names(names, path), "Latitude": cells.latitudes(frame, latitude, path),
        "Longitude": cells.longitudes(frame, longitude, path), "LocalTime": local})
