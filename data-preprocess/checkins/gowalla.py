"""Gowalla's check-ins in some US states, with the categories of their spots (the paper's CA: California and Nevada)."""
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from shapely.geometry import shape

from checkins import cells, files, readers
from checkins.config import Config
from checkins.wording import short
from ga_llm.base.cli import UserError

TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

logger = logging.getLogger(__name__)


def output(config: Config) -> Path:
    """Where `join`'s rows go. A YAML may come from a stranger: it may not have any file replaced but a CSV in here."""
    if config.format != "gowalla":
        raise UserError(f"{config.path}: format: expected gowalla, got {config.format}; see best_conf/tky.yml")
    path = Path(config.raw["check_ins"])
    if path.is_absolute() or ".." in path.parts or path.suffix != ".csv":
        raise UserError(f"{config.path}: raw: check_ins: {short(str(path))} would be written; give a .csv under the "
                        "repository's root")
    return path


def states_area(path: Path, names: list[str]) -> shapely.Geometry:
    """The union of the GeoJSON features with these names. Raises UserError if the file lacks one."""
    try:
        features = json.loads(files.whole_text(path), parse_constant=_refuse)["features"]
        found = [(feature["properties"]["name"], feature["geometry"]) for feature in features]
        for name in names:
            if name not in dict(found):
                raise UserError(f"{path}: no feature named {short(name)}; it has {short(sorted(dict(found)))}")
        areas = [shapely.union_all([shape(geometry) for other, geometry in found if other == name]) for name in names]
        union = shapely.union_all(areas)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError,
            shapely.errors.ShapelyError) as error:
        raise UserError(f"{path}: not a GeoJSON of named features ({short(str(error))}); fetch it again") from None
    for name, area in zip(names, areas):
        west, south, east, north = area.bounds
        if not (area.area > 0 and -360 <= west <= east <= min(360, west + 360) and -90 <= south <= north <= 90):
            raise UserError(f"{path}: {short(name)} has no area on the globe, whose points are [longitude, latitude] "
                            "in degrees; fetch it again")
        if _jumps(area):
            raise UserError(f"{path}: {short(name)} has an edge that jumps from one side of 180° to the other; let its "
                            "longitudes run on (181 for -179), or cut it in two there, as GeoJSON has it")
    shapely.prepare(union)
    return union


def _refuse(constant: str):
    raise ValueError(f"{constant} is no number")


def _jumps(area: shapely.Geometry) -> bool:
    """Whether an edge is longer than half the globe, but no line around all of it, as Antarctica has."""
    points, ring = shapely.get_coordinates(shapely.get_rings(shapely.get_parts(area)), return_index=True)
    steps = np.abs(np.diff(points[:, 0]))[np.diff(ring) == 0]
    return bool(((steps > 180) & (steps < 360)).any())


def inside(area: shapely.Geometry, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Which points (degrees) intersect `area`, whose longitudes may run on beyond ±180 (Alaska's go down to -187).

    Only those in its bounding box are compared with the polygon.
    """
    west, south, east, north = area.bounds
    result = np.zeros(len(latitude), dtype=bool)
    for around in (-360, 0, 360):
        same = longitude + around
        near = np.flatnonzero((latitude >= south) & (latitude <= north) & (same >= west) & (same <= east))
        result[near] |= shapely.intersects_xy(area, same[near], latitude[near])
    return result


def join(config: Config) -> pd.DataFrame:
    """Check-ins in `keep_states` in the file's order, with their spot's category; columns as `readers` expects them.

    The point is the check-in's own: the spots' file has coordinates too, but the prompt shows where a check-in was
    recorded. Check-ins at a spot that is not in the spots' file, or has no category, are left out and counted.
    """
    path = {role: files.find(name, config.raw_from, other_names=True) for role, name in config.raw.items()
            if role != "check_ins"}
    area = states_area(path["states"], config.keep_states)
    spots = pd.concat(files.tables(path["spots"], keep=["id", "spot_categories"], text=("spot_categories",),
                                     chunk=readers.CHUNK, empty=("spot_categories",)))
    spots = spots.assign(id=cells.integers(spots, "id", path["spots"])).dropna().drop_duplicates()
    twice = spots["id"].duplicated()
    if twice.any():
        logger.warning("%s: %d spots have several categories; the first of each counts", path["spots"],
                       spots["id"][twice].nunique())
    spots = spots[~twice]
    category_of = spots.set_index("id")["spot_categories"].astype("category")

    kept, total, off_globe, unknown = [], 0, 0, 0
    for chunk in files.tables(path["all_check_ins"], order=[*readers.SNAP], keep=[*readers.SNAP], names=readers.SNAP,
                              text=("UTC time",), chunk=readers.CHUNK):
        total += len(chunk)
        # A few recorded points lie off the globe; they lie in no state and need no error.
        latitude = cells.numbers(chunk, "latitude", path["all_check_ins"])
        longitude = cells.numbers(chunk, "longitude", path["all_check_ins"])
        off_globe += int((~latitude.between(-90, 90) | ~longitude.between(-180, 180)).sum())
        chunk = chunk[inside(area, latitude.to_numpy(float), longitude.to_numpy(float))]
        time = cells.utc_times(chunk, "UTC time", path["all_check_ins"])
        poi = cells.integers(chunk, "location id", path["all_check_ins"])
        rows = pd.DataFrame({
            "UserId": cells.integers(chunk, "user", path["all_check_ins"]), "PoiId": poi,
            "PoiCategoryId": poi.map(category_of), "Latitude": latitude[chunk.index],
            "Longitude": longitude[chunk.index], "UTCTime": time.dt.strftime(TIME_FORMAT)})
        known = rows["PoiCategoryId"].notna()
        unknown += int((~known).sum())
        kept.append(rows[known])
        logger.info("%d check-ins read, %d kept", total, sum(map(len, kept)))
    rows = pd.concat(kept, ignore_index=True)
    if rows.empty:
        raise UserError(f"{path['all_check_ins']}: no check-in in {', '.join(config.keep_states)} at a spot of "
                        f"{path['spots']}; are these the Gowalla files?")
    logger.info("%d check-ins off the globe left out", off_globe)
    logger.info("%d check-ins at spots without a category left out", unknown)
    used = spots.loc[spots["id"].isin(rows["PoiId"]), "spot_categories"]
    cells.category_names(cells.gowalla_names(used, path["spots"]), path["spots"])   # found here, not by run.py
    return rows[[*readers.GOWALLA]]
