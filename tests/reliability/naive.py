"""Section 3 and 4 of the method once more, slowly: plain loops over rows, for tests to compare with.

Nothing here is taken from the code that it is compared with.
"""
import dataclasses
import datetime

SPLITS = ("train", "validate", "test")


@dataclasses.dataclass
class Row:
    """A check-in; `number` is its place in the raw file."""
    number: int
    user: object
    poi: object
    category: object
    time: datetime.datetime
    split: str = ""
    trajectory: int = -1


def in_time(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.time, row.number))


def frequent(rows: list[Row], min_poi_freq: int, min_user_freq: int) -> list[Row]:
    for field, least in (("poi", min_poi_freq), ("user", min_user_freq)):
        counts = {}
        for row in rows:
            counts[getattr(row, field)] = counts.get(getattr(row, field), 0) + 1
        rows = [row for row in rows if counts[getattr(row, field)] > least]
    return rows


def split(rows: list[Row], shares=(0.8, 0.9)) -> None:
    """Set `split` of rows that are in order of time."""
    for place, row in enumerate(rows):
        row.split = SPLITS[sum(place >= int(len(rows) * share) for share in shares)]


def of_users(rows: list[Row]) -> dict[object, list[Row]]:
    found = {}
    for row in rows:
        found.setdefault(row.user, []).append(row)
    return found


def without_isolated(rows: list[Row], hours: float) -> list[Row]:
    day, kept = datetime.timedelta(hours=hours), []
    for own in of_users(rows).values():
        for i, row in enumerate(own):
            neighbours = own[max(0, i - 1):i] + own[i + 1:i + 2]
            if not neighbours or any(abs(row.time - other.time) <= day for other in neighbours):
                kept.append(row)
    return in_time(kept)


def number_trajectories(rows: list[Row], minutes: float) -> None:
    """Set `trajectory` of rows in order of time, by user and time."""
    number = -1
    for _, own in sorted(of_users(rows).items()):
        for i, row in enumerate(own):
            if i == 0 or row.time - own[i - 1].time > datetime.timedelta(minutes=minutes):
                number += 1
            row.trajectory = number


def last(items: list, count: int) -> list:
    return items[max(0, len(items) - count):]


def pairs(train: list[Row], rows: list[Row], listed=None, max_history=600, max_current_with_history=200,
          max_current=500, max_similar=200, max_history_with_similar=200) -> list[tuple]:
    """(trajectory, similar, history, current, target) of each trajectory of `rows`, as places in order of time.

    `rows` may be `train` itself; else train's check-ins come first among those of one second.
    """
    found = []
    for trajectory in sorted({row.trajectory for row in rows}):
        own = [i for i, row in enumerate(rows) if row.trajectory == trajectory]
        start, target = rows[own[0]], rows[own[-1]]
        current = [i for i in own[:-1] if rows[i].time < target.time]
        history = [i for i, row in enumerate(train) if row.user == target.user and row.time < target.time
                   and (i < own[0] if rows is train else row.time <= start.time)]
        history = [] if len(current) > max_current_with_history else last(history, max_history)
        similar = []
        if listed is not None and len(history) <= max_history_with_similar:
            ended = {other for other in listed.get(str(trajectory), ())
                     if all(row.time < start.time for row in train if row.trajectory == other)}
            similar = last([i for i, row in enumerate(train) if row.trajectory in ended], max_similar)
        found.append((trajectory, similar, history, last(current, max_current), own[-1]))
    return found
