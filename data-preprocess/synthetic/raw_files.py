"""Check-ins as the raw files of a format, which are never replaced unasked.

Each writer returns, for every file name, a function that yields the file's bytes in parts.
"""
import datetime
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ga_llm.base import writing
from ga_llm.base.cli import UserError
from synthetic.city import CATEGORIES, City
from synthetic.people import DAY, WEEK, CheckIns

log = logging.getLogger("make_sample_raw")

ROWS_AT_ONCE = 500_000
# Rough outlines (longitude, latitude), enough to tell which side of a border those cities lie on.
STATES = {
    "California": [[-124.4, 42], [-120, 42], [-120, 39], [-114.6, 35], [-114.7, 32.7], [-117.1, 32.5], [-120.6, 34.5],
                   [-124.4, 40.3], [-124.4, 42]],
    "Nevada": [[-120, 42], [-114.04, 42], [-114.04, 36.2], [-114.6, 35], [-120, 39], [-120, 42]],
    "Arizona": [[-114.05, 37], [-109.05, 37], [-109.05, 31.3], [-114.8, 32.5], [-114.6, 35], [-114.05, 36.2],
                [-114.05, 37]],
}
UNLISTED_SPOTS = .02  # of Gowalla's places, check-ins name some that the spots file does not have


def write_tky(city: City, rows: CheckIns, dataset: str) -> dict[str, Callable[[], Iterator[bytes]]]:
    """user, venue, category id, category, latitude, longitude, offset (minutes), UTC time; latin-1, in time order."""
    order = np.argsort(rows.seconds, kind="stable")
    users = texts(f"{user + 1}\t" for user in range(rows.user.max(initial=0) + 1))
    places = texts(f"{venue(city, poi)}\t{category_id(c.name)}\t{c.name}\t{latitude}\t{longitude}"
                   f"\t{city.form.utc_offset}\t" for poi, c, latitude, longitude in listed(city))
    times = Times(city.form.start, rows.seconds, "%a %b %d {} +0000 %Y\n")

    def contents():
        for part in parts(order):
            utc = rows.seconds[part] - city.form.utc_offset * 60
            yield "".join(users[rows.user[part]] + places[rows.poi[part]] + times(utc)).encode("latin-1")
    return {f"dataset_TSMC2014_{dataset.upper()}.txt": contents}


NYC_COLUMNS = ("user_id,POI_id,POI_catid,POI_catid_code,POI_catname,latitude,longitude,timezone,UTC_time,local_time,"
               "day_of_week,norm_in_day_time,trajectory_id,norm_day_shift,norm_relative_time\n")


def write_nyc(city: City, rows: CheckIns, dataset: str) -> dict[str, Callable[[], Iterator[bytes]]]:
    """GETNext's files: 80 / 10 / 10 by time, trajectories cut at gaps of more than a day.

    A day's time counts in half hours, as a fraction of the day; `day_shift` in days since the trajectory's first day.
    """
    order = np.argsort(rows.seconds, kind="stable")
    count = len(order)
    split = np.empty(count, np.int8)
    split[order] = np.searchsorted([int(count * .8), int(count * .9)], np.arange(count), side="right")
    # By user and time, as the rows are: a trajectory starts with a user, after a gap, and in another file.
    user_starts = np.diff(rows.user, prepend=-1) != 0
    starts = user_starts | (np.diff(rows.seconds, prepend=0) > DAY) | (np.diff(split, prepend=-1) != 0)
    number = np.cumsum(starts)
    number -= np.repeat(number[user_starts], np.diff(np.append(np.flatnonzero(user_starts), count))) - 1
    day = rows.seconds // DAY
    shift = day - np.repeat(day[starts], np.diff(np.append(np.flatnonzero(starts), count)))

    users = texts(f"{user + 1}," for user in range(rows.user.max(initial=0) + 1))
    trajectory = texts(f",{user + 1}_" for user in range(rows.user.max(initial=0) + 1))
    places = texts(f"{venue(city, poi)},{category_id(c.name)},{CATEGORIES.index(c)},{c.name},{latitude},{longitude},"
                   f"{city.form.utc_offset}," for poi, c, latitude, longitude in listed(city))
    times = Times(city.form.start, rows.seconds, "%Y-%m-%d {}+00:00,")
    weekdays = texts(str((city.form.start.weekday() + d) % WEEK) for d in range(WEEK))
    half_hours = texts(f",{half / 48}" for half in range(48))
    numbers = texts(f"{n}," for n in range(number.max(initial=0) + 1))
    shifts = texts(f"{days}," for days in range(shift.max(initial=0) + 1))

    def contents(which):
        yield NYC_COLUMNS.encode()
        for part in parts(order[split[order] == which]):
            local = rows.seconds[part]
            half = local % DAY // 1800
            relative = texts(f"{value}\n" for value in shift[part] + half / 48)
            yield "".join(
                users[rows.user[part]] + places[rows.poi[part]] + times(local - city.form.utc_offset * 60)
                + times(local) + weekdays[local // DAY % WEEK] + half_hours[half] + trajectory[rows.user[part]]
                + numbers[number[part]] + shifts[shift[part]] + relative).encode()
    return {f"NYC_{name}.csv": lambda which=which: contents(which) for which, name in
            enumerate(("train", "val", "test"))}


def write_ca(city: City, rows: CheckIns, dataset: str) -> dict[str, Callable[[], Iterator[bytes]]]:
    """Gowalla: check-ins by user, the latest first; spots with a readable category; outlines of states."""
    order = np.lexsort((-rows.seconds, rows.user))
    users = texts(f"{user}\t" for user in range(rows.user.max(initial=0) + 1))
    spots = 8000 + 7 * np.random.default_rng(len(city.category)).permutation(len(city.category))
    places = texts(f"\t{latitude}\t{longitude}\t{spots[poi]}\n" for poi, _, latitude, longitude in listed(city))
    times = Times(city.form.start, rows.seconds, "%Y-%m-%dT{}Z")

    def check_ins():
        for part in parts(order):
            utc = rows.seconds[part] - city.form.utc_offset * 60
            yield "".join(users[rows.user[part]] + times(utc) + places[rows.poi[part]]).encode()

    def spot_list():
        yield b"id,created_at,lng,lat,spot_categories\n"
        lines = (f"{spots[poi]},2009-02-09T00:00:00Z,{longitude},{latitude},"
                 f"\"[{{'url': '/categories/{CATEGORIES.index(c) + 1}', 'name': '{c.name}'}}]\"\n"
                 for poi, c, latitude, longitude in listed(city) if spots[poi] % 1000 >= 1000 * UNLISTED_SPOTS)
        yield "".join(lines).encode()

    def states():
        features = [{"type": "Feature", "id": f"{i:02}", "properties": {"name": name},
                     "geometry": {"type": "Polygon", "coordinates": [outline]}}
                    for i, (name, outline) in enumerate(STATES.items(), 1)]
        yield json.dumps({"type": "FeatureCollection", "features": features}, indent=1).encode()

    return {"loc-gowalla_totalCheckins.txt": check_ins, "gowalla_spots_subset1.csv": spot_list,
            "us_state_polygon_json.json": states}


WRITERS = {"tky": write_tky, "nyc": write_nyc, "ca": write_ca}


class Times:
    """Times as text from tables of days and of seconds: formatting each of millions would take minutes.

    `pattern` is strftime's for the day, with {} for the clock.
    """

    CLOCK: np.ndarray | None = None

    def __init__(self, start: datetime.date, seconds: np.ndarray, pattern: str):
        if Times.CLOCK is None:
            Times.CLOCK = texts(f"{s // 3600:02}:{s // 60 % 60:02}:{s % 60:02}" for s in range(DAY))
        days = range(-1, int(seconds.max(initial=0)) // DAY + 2)  # UTC may be the day before or after
        written = [(start + datetime.timedelta(d)).strftime(pattern).split("{}") for d in days]
        self.before, self.after = texts(before for before, _ in written), texts(after for _, after in written)

    def __call__(self, seconds: np.ndarray) -> np.ndarray:
        day, second = np.divmod(seconds, DAY)
        return self.before[day + 1] + self.CLOCK[second] + self.after[day + 1]


def texts(values) -> np.ndarray:
    return np.array(list(values), dtype=object)


def listed(city: City):
    """(index, category, latitude, longitude) of every place, as Python values."""
    categories = [CATEGORIES[c] for c in city.category]
    return zip(range(len(categories)), categories, city.latitude.tolist(), city.longitude.tolist(), strict=True)


def venue(city: City, poi: int) -> str:
    return city.ids[24 * poi:24 * poi + 24]


def category_id(name: str) -> str:
    """24 hexadecimal digits, as Foursquare's: the name's first bytes, from the end on."""
    return name.encode().ljust(12, b"\0")[:12].hex()


def parts(order: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(order), ROWS_AT_ONCE):
        yield order[first:first + ROWS_AT_ONCE]


def write_files(files: dict[Path, Callable[[], Iterator[bytes]]], overwrite: bool) -> None:
    """Write each file that is not there yet. One with other contents is an error, found before anything is written."""
    missing = {path: contents for path, contents in files.items() if overwrite or not holds(path, contents)}
    with writing.together() as new_file:
        for path, contents in missing.items():
            with new_file(path, "wb") as file:
                for part in contents():
                    file.write(part)
    for path in missing:
        log.info("wrote %s", path)
    for path in files.keys() - missing.keys():
        log.info("%s is already there, the same to the byte", path)


def holds(path: Path, contents: Callable[[], Iterator[bytes]]) -> bool:
    """Whether `path` exists, with exactly these contents. Raises UserError if it exists with others."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        if all(file.read(len(part)) == part for part in contents()) and not file.read(1):
            return True
    raise UserError(f"{path}: exists with other contents; pass -overwrite True to replace it, or write to another -out")
