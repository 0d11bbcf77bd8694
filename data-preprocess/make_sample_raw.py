"""A synthetic city in any of the three raw formats: for the demo, for tests, and to measure scale.

    python data-preprocess/make_sample_raw.py                                     # the demo's city, TKY format
    python data-preprocess/make_sample_raw.py -format ca -users 2000 -days 90     # Gowalla's three files
    python data-preprocess/make_sample_raw.py -format tky -dataset_name tky -users 100000

Files go to data-preprocess/data/<dataset_name>/raw; dataset_name is `sample` for the TKY format and the format's own
name otherwise. The same flags and seed give the same bytes. A file that is there with other contents is never
replaced unless asked (-overwrite True), so real check-ins are safe.

The people: everyone has a home, a work place, lunch places near work and hobbies on weekdays of their own; some have a
station, a coffee place, shops and outings at weekends; each at an hour of their own. They check in at a part of these,
for a few days at a time, then pause for more than a day, which ends a trajectory. Now and then they explore: a short
hop from where they were, to a place that is popular there and open. So the next place depends on the user, on the hour
and the weekday, and on where the user is; a count of the user's places alone says little.

What is synthetic: nothing here is fitted to real check-ins, and accuracy on this city says nothing about real ones.
Clocks do not change for daylight saving.
"""
import dataclasses
import datetime
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from sklearn.neighbors import KDTree

from checkins.wording import short
from ga_llm.base import artifacts, cli, writing
from ga_llm.base.cli import UserError

log = logging.getLogger("make_sample_raw")

DATA = Path("data-preprocess/data")
KM_PER_DEGREE = 111.32  # of latitude
DAY = 86400  # seconds
WEEK = 7
USERS_AT_ONCE = 2000
ROWS_AT_ONCE = 500_000


@dataclasses.dataclass(frozen=True)
class Category:
    """What a place is. `opens` and `closes` are local hours; past midnight counts on from 24."""
    name: str
    kind: str
    share: float  # of all places
    opens: float = 0
    closes: float = 24


CATEGORIES = (
    Category("Home (private)", "home", .25),
    Category("Office", "work", .09, 6, 22),
    Category("University", "work", .03, 6, 22),
    Category("Train Station", "station", .05, 5, 25),
    Category("Subway", "station", .03, 5, 25),
    Category("Ramen / Noodle House", "food", .07, 11, 23),
    Category("Sushi Restaurant", "food", .05, 11, 22),
    Category("Diner", "food", .05, 10, 24),
    Category("Caf\u00e9", "coffee", .05, 6.5, 20),  # not ASCII, as in the real files
    Category("Coffee Shop", "coffee", .05, 6, 21),
    Category("Food & Drink Shop", "shop", .05, 7, 24),
    Category("Mall", "shop", .04, 10, 21),
    Category("Bookstore", "shop", .03, 10, 21),
    Category("Gym / Fitness Center", "hobby", .05, 6, 23),
    Category("Bar", "hobby", .04, 17, 26),
    Category("Movie Theater", "hobby", .02, 10, 25),
    Category("Park", "outing", .03, 5, 22),
    Category("Museum", "outing", .02, 10, 18),
)
EXPLORABLE = ("food", "coffee", "shop", "hobby", "outing")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A habit of the day: what, when, from where. `hours`: each user's own is one of them, half past on average.

    `users` is the share of people who have the habit. `hop_km` is the mean distance of the place from `anchor` (home
    or work); `chance` is the share of days on which an active user checks in there.
    """
    kind: str
    hours: tuple[int, ...]
    chance: float
    anchor: str = "home"
    hop_km: float = 1.
    varies: bool = False  # whether the user has a second place for it
    users: float = 1.


# Weekday and weekend hours hardly overlap: the hour of a check-in tells more than how often a place was visited.
WEEKDAY = (
    Slot("coffee", (7,), .50, users=.3),
    Slot("station", (8,), .60, hop_km=.5, users=.4),
    Slot("work", (9, 10), .55),
    Slot("food", (12, 13), .50, "work", .5, varies=True),
    Slot("coffee", (15,), .50, "work", .5, users=.2),
    Slot("hobby", (18,), .45, "work", 1., varies=True),
    Slot("shop", (20,), .50, users=.3),
    Slot("home", (21, 22), .55),
)
# The same evening slot on the user's other weekdays: another hobby, another hour.
OTHER_HOBBY = Slot("hobby", (19,), .45, "home", 1.5)
WEEKEND = (
    Slot("home", (10,), .50, users=.4),
    Slot("food", (11,), .50, hop_km=1.),
    Slot("shop", (14,), .50, hop_km=2., varies=True, users=.6),
    Slot("outing", (16, 17), .50, hop_km=3., users=.6),
    Slot("hobby", (20,), .45, hop_km=3., users=.7),
    Slot("home", (21, 22), .55),
)
SECOND_PLACE = .2   # chance of the second place, where there is one
EXPLORING = .14     # chance that a check-in is at a place off the routine
EXPLORING_KM = 1.   # mean length of such a hop
ACTIVE_DAYS = 2.2   # mean length of a spell of check-ins
PAUSE_DAYS = 1.2, 2.2  # shortest pause between spells, and what is added on average


@dataclasses.dataclass(frozen=True)
class Format:
    """Where and when the city is. `centres` gives latitude, longitude and share of the people."""
    start: datetime.date
    utc_offset: int  # minutes
    centres: tuple[tuple[float, float, float], ...]


FORMATS = {
    "tky": Format(datetime.date(2012, 4, 3), 540, ((35.68, 139.76, 1.),)),
    "nyc": Format(datetime.date(2012, 4, 3), -240, ((40.74, -73.98, 1.),)),
    # Los Angeles, San Francisco, Las Vegas; and Phoenix, which lies in neither California nor Nevada.
    "ca": Format(datetime.date(2010, 4, 5), -420,
                 ((34.05, -118.24, .4), (37.77, -122.42, .3), (36.17, -115.14, .15), (33.45, -112.07, .15))),
}
# Rough outlines (longitude, latitude), enough to tell which side of a border those cities lie on.
STATES = {
    "California": [[-124.4, 42], [-120, 42], [-120, 39], [-114.6, 35], [-114.7, 32.7], [-117.1, 32.5], [-120.6, 34.5],
                   [-124.4, 40.3], [-124.4, 42]],
    "Nevada": [[-120, 42], [-114.04, 42], [-114.04, 36.2], [-114.6, 35], [-120, 39], [-120, 42]],
    "Arizona": [[-114.05, 37], [-109.05, 37], [-109.05, 31.3], [-114.8, 32.5], [-114.6, 35], [-114.05, 36.2],
                [-114.05, 37]],
}
UNLISTED_SPOTS = .02  # of Gowalla's places, check-ins name some that the spots file does not have


@dataclasses.dataclass(frozen=True)
class CheckIns:
    """One row per check-in, by user and time. `seconds`: local, since midnight of the first day."""
    user: np.ndarray
    poi: np.ndarray
    seconds: np.ndarray


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("-format", choices=tuple(FORMATS), default="tky")
    parser.add_argument("-dataset_name", help="folder under data-preprocess/data; default: see above")
    parser.add_argument("-out", type=Path, help="write to this folder instead")
    parser.add_argument("-users", type=int, default=100)
    parser.add_argument("-days", type=int, default=90)
    parser.add_argument("-pois", type=int, help="places; default: 4 for each user")
    parser.add_argument("-jitter", type=float, default=10., metavar="MINUTES",
                        help="spread of a habit's time from day to day; 0: the same clock time, the easiest to learn")
    parser.add_argument("-seed", type=int, default=0)
    parser.add_argument("-overwrite", type=cli.boolean, default=False, help="replace files with other contents")
    args = parser.parse_args()

    pois = max(200, 4 * args.users) if args.pois is None else args.pois
    for flag, value, least, most in (("-users", args.users, 1, 10 ** 7), ("-days", args.days, 1, 36500),
                                     ("-pois", pois, 50, 10 ** 8), ("-jitter", args.jitter, 0, 1440),
                                     ("-seed", args.seed, 0, 2 ** 63)):
        if not least <= value <= most:
            raise UserError(f"{flag} {short(value)}: too small or large; give {least} to {most}")
    dataset = args.dataset_name
    if dataset is None:
        dataset = "sample" if args.format == "tky" else args.format
    artifacts.dataset_name(dataset)
    folder = args.out or DATA / dataset / "raw"
    city = City(FORMATS[args.format], pois, args.seed)
    log.info("generating %d users for %d days", args.users, args.days)
    check_ins = generate(city, args.users, args.days, args.seed, args.jitter)
    if not len(check_ins.user):
        raise UserError(f"-users {args.users} -days {args.days}: nobody checked in; ask for more of either")
    with writing.alone(folder):
        write_files({folder / name: contents for name, contents in
                     WRITERS[args.format](city, check_ins, dataset).items()}, args.overwrite)
    log.info("%s: %d check-ins of %d users at %d places in %d days", folder, len(check_ins.user),
             len(np.unique(check_ins.user)), len(np.unique(check_ins.poi)), args.days)


class City:
    """Places, with positions in km on a plane; several centres lie far apart on it."""

    APART = 10_000.

    def __init__(self, form: Format, pois: int, seed: int):
        draw = np.random.default_rng([seed, 0])
        self.form = form
        shares = np.array([category.share for category in CATEGORIES])
        counts = np.maximum(1, np.floor(shares * pois)).astype(int)
        counts[0] += pois - counts.sum()  # what rounding leaves
        self.category = draw.permutation(np.repeat(np.arange(len(CATEGORIES)), counts))
        self.popularity = draw.pareto(1.1, pois) + 1
        self.centre = draw.choice(len(form.centres), pois, p=[share for _, _, share in form.centres])
        self.xy = self._positions(draw)
        self.latitude, self.longitude = self._degrees()
        self.ids = draw.bytes(12 * pois).hex()
        opens = np.array([category.opens for category in CATEGORIES]) * 60
        closes = np.array([category.closes for category in CATEGORIES]) * 60
        self.opens, self.closes = opens[self.category], closes[self.category]
        kinds = np.array([category.kind for category in CATEGORIES])[self.category]
        self.places = {kind: np.flatnonzero(kinds == kind) for kind in np.unique(kinds)}
        self.places["explorable"] = np.flatnonzero(np.isin(kinds, EXPLORABLE))
        self.trees = {kind: KDTree(self.xy[places]) for kind, places in self.places.items()}

    def _positions(self, draw) -> np.ndarray:
        """Homes spread over the city, everything else crowds in districts, the first of them the largest."""
        count = len(self.category)
        radius = 5 * (count / 400) ** .25  # km; a larger city is also denser
        districts = int(np.sqrt(count) / 2) + 1
        middle = draw.normal(0, radius / 2, (districts, 2))
        weight = 1 / (1 + np.arange(districts))
        crowded = middle[draw.choice(districts, count, p=weight / weight.sum())] + draw.normal(0, .5, (count, 2))
        spread = draw.normal(0, radius / 1.5, (count, 2))
        xy = np.where((self.category == 0)[:, None], spread, crowded)
        xy[:, 0] += self.APART * self.centre
        return xy

    def _degrees(self) -> tuple[np.ndarray, np.ndarray]:
        centres = np.array(self.form.centres)[self.centre]
        latitude = centres[:, 0] + self.xy[:, 1] / KM_PER_DEGREE
        east = self.xy[:, 0] - self.APART * self.centre
        longitude = centres[:, 1] + east / (KM_PER_DEGREE * np.cos(np.radians(centres[:, 0])))
        return np.round(latitude, 6), np.round(longitude, 6)

    def is_open(self, poi: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """Whether places are open at a local minute of the day; hours past midnight wrap around."""
        minute = minute % 1440
        opens, closes = self.opens[poi], self.closes[poi]
        return ((opens <= minute) & (minute < closes)) | (minute + 1440 < closes)

    def near(self, draw, kind: str, anchor: np.ndarray, hop_km: float, minute: np.ndarray) -> np.ndarray:
        """For each anchor place a place of `kind`: a hop of random length and direction, then by popularity.

        Returns place indices, -1 where nothing around is open at `minute`.
        """
        count = len(anchor)
        length, angle = draw.exponential(hop_km, count), draw.uniform(0, 2 * np.pi, count)
        landing = self.xy[anchor] + length[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        places = self.places[kind]
        distance, found = self.trees[kind].query(landing, k=min(12, len(places)))
        candidates = places[found]
        # Gumbel's trick: the largest of log-weight + Gumbel noise is a draw by weight. Half a km counts as one e-fold.
        score = np.log(self.popularity[candidates]) - distance / .5 + draw.gumbel(size=candidates.shape)
        allowed = self.is_open(candidates, minute[:, None]) & (distance < self.APART / 2)
        score[~allowed | (candidates == anchor[:, None])] = -np.inf
        best = score.argmax(axis=1)
        rows = np.arange(count)
        return np.where(np.isfinite(score[rows, best]), candidates[rows, best], -1)


@dataclasses.dataclass(frozen=True)
class Routine:
    """Habits of some users: arrays of shape (users, weekday, slot). `place` is -1 where there is none."""
    place: np.ndarray
    second: np.ndarray
    minute: np.ndarray
    chance: np.ndarray


def make_routine(city: City, home: np.ndarray, draw) -> Routine:
    users = len(home)
    noon = np.full(users, 720.)
    work = city.near(draw, "work", home, 3., noon)
    anchors = {"home": home, "work": np.where(work < 0, home, work)}
    shape = users, WEEK, len(WEEKDAY)
    place, second, minute = np.full(shape, -1), np.full(shape, -1), np.zeros(shape)
    chance = np.zeros(shape)

    def fill(slot: Slot, days: np.ndarray, column: int) -> None:
        """Set one slot on the weekdays that the mask `days` (users, 7) marks."""
        when = draw.choice(slot.hours, users) * 60 + draw.uniform(25, 35, users)
        anchor = anchors[slot.anchor]
        choices = [anchors[slot.kind] if slot.kind in anchors else city.near(draw, slot.kind, anchor, slot.hop_km, when)
                   for _ in range(2)]
        if not slot.varies:
            choices[1] = choices[0]
        for target, values in ((place, choices[0]), (second, choices[1]), (minute, when),
                               (chance, slot.chance * (draw.random(users) < slot.users))):
            target[:, :, column] = np.where(days, values[:, None], target[:, :, column])

    weekday = np.broadcast_to(np.arange(WEEK) < 5, (users, WEEK))
    for column, slot in enumerate(WEEKDAY):
        fill(slot, weekday, column)
        if slot.kind == "hobby":
            fill(OTHER_HOBBY, weekday & (draw.random((users, WEEK)) < .5), column)
    chance[:, 5:] = 0
    for column, slot in enumerate(WEEKEND):
        fill(slot, ~weekday, column)
    lively = np.clip(draw.lognormal(0, .25, users), .4, 1.6)
    return Routine(place, second, minute, chance * lively[:, None, None])


def generate(city: City, users: int, days: int, seed: int, jitter: float) -> CheckIns:
    """All check-ins of `users` people, in blocks of people, each with a random stream of its own.

    `jitter` is the standard deviation, in minutes, of the time at which a habit is followed.
    """
    homes = np.random.default_rng([seed, 1]).permutation(city.places["home"])
    blocks = [generate_block(city, np.arange(first, min(first + USERS_AT_ONCE, users)), homes, days, jitter,
                             np.random.default_rng([seed, 2, first]))
              for first in range(0, users, USERS_AT_ONCE)]
    return CheckIns(*(np.concatenate([getattr(block, field.name) for block in blocks])
                      for field in dataclasses.fields(CheckIns)))


def generate_block(city: City, users: np.ndarray, homes: np.ndarray, days: int, jitter: float,
                   draw) -> CheckIns:
    home = homes[users % len(homes)]  # houses are shared where there are more people than houses
    routine = make_routine(city, home, draw)
    weekday = (city.form.start.weekday() + np.arange(days)) % WEEK
    chance = routine.chance[:, weekday]                                            # (users, days, slots)
    person, day, slot = np.nonzero(draw.random(chance.shape) < chance)
    habit = person, weekday[day], slot
    minute = np.clip(routine.minute[habit] + draw.normal(0, jitter, len(person)), 0, 1439)
    seconds = day * DAY + (minute * 60).astype(np.int64)

    kept = active(len(users), days, person, seconds, draw)
    person, seconds = person[kept], seconds[kept]
    place = np.where(draw.random(len(person)) < SECOND_PLACE, routine.second[habit][kept], routine.place[habit][kept])

    order = np.lexsort((seconds, person))
    person, seconds, place = person[order], seconds[order], place[order]
    # Explore from where the user was, or from home at the start.
    previous = np.roll(place, 1)
    starts = np.diff(person, prepend=-1) != 0
    previous = np.where(starts | (previous < 0), home[person], previous)
    off = np.flatnonzero(draw.random(len(person)) < EXPLORING)
    if len(off):
        found = city.near(draw, "explorable", previous[off], EXPLORING_KM, seconds[off] % DAY / 60)
        place[off] = np.where(found < 0, place[off], found)
    kept = (place >= 0) & city.is_open(place, seconds % DAY / 60)
    return CheckIns(users[person[kept]].astype(np.int32), place[kept].astype(np.int32), seconds[kept])


def active(users: int, days: int, person: np.ndarray, seconds: np.ndarray, draw) -> np.ndarray:
    """Mask of the moments that fall in a spell of check-ins. Pauses differ from user to user: some are seldom there."""
    shortest, extra = PAUSE_DAYS
    extra = extra * draw.lognormal(-.2, .6, users)
    spells = int(days / (shortest + ACTIVE_DAYS / 2)) + 5
    on = draw.exponential(ACTIVE_DAYS - .5, (users, spells)) + .5
    pause = shortest + draw.exponential(1, (users, spells)) * extra[:, None]
    # Starts and ends of spells take turns; the first starts up to a cycle before the first day.
    edges = np.stack([pause, on], axis=2).reshape(users, -1).cumsum(axis=1)
    edges -= draw.uniform(0, 1, (users, 1)) * edges[:, 1:2]
    apart = edges.max() - edges.min() + days + 1
    position = np.searchsorted((edges + apart * np.arange(users)[:, None]).ravel(), seconds / DAY + apart * person)
    return (position - person * edges.shape[1]) % 2 == 1


# The raw formats. Each writer returns, for every file name, a function that yields the file's bytes in parts.

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


if __name__ == "__main__":
    cli.run(main)
