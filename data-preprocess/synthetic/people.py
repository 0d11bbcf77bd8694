"""The people: habits of the week, spells of check-ins with pauses between, and now and then a place off the routine."""
import dataclasses

import numpy as np

from synthetic.city import City

DAY = 86400  # seconds
WEEK = 7
USERS_AT_ONCE = 2000


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
JITTER = 10.        # standard deviation, in minutes, of the time at which a habit is followed
SECOND_PLACE = .2   # chance of the second place, where there is one
EXPLORING = .14     # chance that a check-in is at a place off the routine
EXPLORING_KM = 1.   # mean length of such a hop
ACTIVE_DAYS = 2.2   # mean length of a spell of check-ins
PAUSE_DAYS = 1.2, 2.2  # shortest pause between spells, and what is added on average


@dataclasses.dataclass(frozen=True)
class CheckIns:
    """One row per check-in, by user and time. `seconds`: local, since midnight of the first day."""
    user: np.ndarray
    poi: np.ndarray
    seconds: np.ndarray


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


def generate(city: City, users: int, days: int, seed: int) -> CheckIns:
    """All check-ins of `users` people, in blocks of people, each with a random stream of its own."""
    homes = np.random.default_rng([seed, 1]).permutation(city.places["home"])
    blocks = [generate_block(city, np.arange(first, min(first + USERS_AT_ONCE, users)), homes, days,
                             np.random.default_rng([seed, 2, first]))
              for first in range(0, users, USERS_AT_ONCE)]
    return CheckIns(*(np.concatenate([getattr(block, field.name) for block in blocks])
                      for field in dataclasses.fields(CheckIns)))


def generate_block(city: City, users: np.ndarray, homes: np.ndarray, days: int, draw) -> CheckIns:
    home = homes[users % len(homes)]  # houses are shared where there are more people than houses
    routine = make_routine(city, home, draw)
    weekday = (city.form.start.weekday() + np.arange(days)) % WEEK
    chance = routine.chance[:, weekday]                                            # (users, days, slots)
    person, day, slot = np.nonzero(draw.random(chance.shape) < chance)
    habit = person, weekday[day], slot
    minute = np.clip(routine.minute[habit] + draw.normal(0, JITTER, len(person)), 0, 1439)
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
