"""CSVs of check-ins, and of places, as a user of recommend.py writes them: read, and checked line by line."""
import csv
import dataclasses
import datetime
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ga_llm.base.cli import UserError
from ga_llm.serving.places import Places

log = logging.getLogger(__name__)

# Headers, without case, spaces and signs.
TIME_COLUMNS = ("time", "localtime", "datetime", "timestamp", "when", "date", "checkintime")
RAW_COLUMNS = ("poi", "poiid", "venue", "venueid", "place", "placeid", "location", "locationid")
ENCODED_COLUMNS = ("gpsid", "encodedpoi", "encodedpoiid", "encodedid")
USER_COLUMNS = ("user", "userid")
IDS = ("raw", "encoded")
TOLD = 3        # of the candidates that the model does not know
TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d)(:\d\d)?(?:\.\d+)?\s*(Z|UTC|[+-]\d\d(?::?\d\d)?)?")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


@dataclasses.dataclass(frozen=True)
class CheckIn:
    time: datetime.datetime     # local
    poi: int                    # encoded


def read_time(text: str) -> datetime.datetime | None:
    """A local time, with or without seconds; None if it is none. What follows it (Z, +09:00) is not looked at."""
    found = TIME.fullmatch(text.strip())
    try:
        return datetime.datetime.strptime(f"{found[1]} {found[2]}{found[3] or ':00'}", TIME_FORMAT) if found else None
    except ValueError:      # 2013-02-30
        return None


def read_check_ins(source: str, places: Places, ids: str | None) -> list[CheckIn]:
    """The check-ins of one user's CSV (or of stdin: "-") that are at places of train, in order of time.

    ids: "raw" or "encoded"; None: by the column's name. Others are counted in a log line. Raises UserError with file
    and line for what is no check-in, or if no place is known.
    """
    users = _read(source, places, ids, False)
    if len(users) > 1:
        raise UserError(f"{_name(source)}: check-ins of {len(users)} users; give those of one, or --all_users")
    return next(iter(users.values()))


def read_all_users(source: str, places: Places, ids: str | None) -> dict[str, list[CheckIn]]:
    """{raw user: the same of each}, in the order in which the CSV first names them; empty where no place is known.

    Raises UserError, too, if there is no column of users.
    """
    return _read(source, places, ids, True)


def _read(source: str, places: Places, ids: str | None, many: bool) -> dict[str, list[CheckIn]]:
    name = _name(source)
    found, unknown, zones = {}, [], 0
    rows = _rows(source, "a time and a POI")
    _, header = next(rows)
    at, poi_at, user_at, ids = _columns(name, header, ids, many)
    for line, row in rows:
        where = f"{name}, line {line}"
        time, poi = read_time(row[at]), row[poi_at].strip()
        if time is None:
            raise UserError(f"{where}: {row[at][:60]!r} is no local time such as 2013-01-05 18:00:00; mend it")
        zones += TIME.fullmatch(row[at].strip())[4] is not None
        user = "" if user_at is None else row[user_at].strip()
        if many and not user:
            raise UserError(f"{where}: no user; mend it")
        known, own = _encoded(poi, ids, places, where), found.setdefault(user, [])
        if known is None:
            unknown.append((line, poi))
        else:
            own.append(CheckIn(time, known))
    count = sum(map(len, found.values()))
    if not count:
        what = f"POI {unknown[0][1][:60]!r} of line {unknown[0][0]} is none" if unknown else "it has none"
        raise UserError(f"{name}: no check-in at a place that the model knows ({what}); give the data set's {ids} ids, "
                        f"or {_other(ids)}")
    if zones:
        log.warning("%s: times are taken as local; what follows %d of them (Z, +09:00) is ignored", name, zones)
    if unknown:
        log.warning("%s: %d of %d check-ins are at places that the model does not know, such as %s on line %d, and "
                    "left out", name, len(unknown), len(unknown) + count, unknown[0][1][:60], unknown[0][0])
    # Stable: equal times as in the file.
    return {user: sorted(own, key=lambda check_in: check_in.time) for user, own in found.items()}


def read_candidates(source: str, places: Places, ids: str | None) -> frozenset[int]:
    """The encoded ids of a file's places: one id a line, or a CSV whose header names the column as in one of check-ins.

    Those that the model does not know are counted in a log line. Raises UserError with file and line for what is no id,
    or if none is known.
    """
    name, found, unknown, column = _name(source), set(), [], 0
    rows = _rows(source, "one POI id a line")
    for number, (line, row) in enumerate(rows):
        heads = _find(name, row, "POI", RAW_COLUMNS + ENCODED_COLUMNS) if number == 0 else None
        if heads is not None:
            column, ids = heads, ids or _kind(row[heads])
        elif number == 0 and len(row) > 1:
            raise UserError(f"{name}, line {line}: {len(row)} cells and no column of the POI; give one id a line, or a "
                            f"header with one of {', '.join(RAW_COLUMNS + ENCODED_COLUMNS)}")
        else:
            where, poi = f"{name}, line {line}", row[column].strip()
            known = _encoded(poi, ids or IDS[0], places, where)
            if known is None:
                unknown.append((line, poi[:60]))
            else:
                found.add(known)
    if not found and unknown:
        line, poi = unknown[0]
        raise UserError(f"{name}: no POI that the model knows ({poi!r} of line {line} is none); give the data set's "
                        f"{ids or IDS[0]} ids, or {_other(ids or IDS[0])}")
    if not found:
        raise UserError(f"{name}: no POI; give one id a line")
    if unknown:
        such_as = ", ".join(f"{poi} (line {line})" for line, poi in unknown[:TOLD])
        log.warning("%s: %d ids are of no POI that the model knows, such as %s, and left out", name, len(unknown),
                    such_as)
    return frozenset(found)


def before(check_ins: Sequence[CheckIn], time: datetime.datetime, name: str) -> list[CheckIn]:
    """Those before `time`; in its own second nobody knows it yet. Raises UserError if there are none."""
    found = [check_in for check_in in check_ins if check_in.time < time]
    if not found:
        raise UserError(f"--time {time}: {name} has no check-in before it (the first is at {check_ins[0].time}); give "
                        "a later time, or earlier check-ins")
    return found


def _rows(source: str, expected: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of a CSV (or of stdin: "-"), the first row's, as many as in it, and without blank lines."""
    name = _name(source)
    content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason}); save it as CSV in UTF-8") from None
    first_line = text.split("\n", 1)[0]
    if not first_line.strip():
        raise UserError(f"{name}: empty; give a CSV with a header that has {expected}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first_line.count))
    width = None
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                width = width or len(row)
                if len(row) != width:
                    raise UserError(f"{name}, line {reader.line_num}: {len(row)} cells, where the first line has "
                                    f"{width}; mend the line")
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num}: not CSV ({error}); mend the line") from None


def _name(source: str) -> str:
    return "stdin" if source == "-" else source


def _encoded(poi: str, ids: str, places: Places, where: str) -> int | None:
    """The encoded id of a place that the model knows, else None."""
    if ids == "encoded":
        if not re.fullmatch(r"[0-9]{1,18}", poi):
            raise UserError(f"{where}: {poi[:60]!r} is no encoded POI id; give whole numbers, or --ids raw")
        known = int(poi)
    else:
        known = places.encode("poi", poi)
    return known if known in places.coordinates else None


def _other(ids: str) -> str:
    return "--ids " + ("raw" if ids == "encoded" else "encoded")


def _plain(column: str) -> str:
    return re.sub(r"[^a-z0-9]", "", column.lower())


def _kind(column: str) -> str:
    """Which ids the POI's column of this name holds."""
    return "encoded" if _plain(column) in ENCODED_COLUMNS else "raw"


def _find(name: str, header: list[str], what: str, allowed: tuple[str, ...]) -> int | None:
    hits = [i for i, column in enumerate(header) if _plain(column) in allowed]
    if len(hits) > 1:
        raise UserError(f"{name}, line 1: columns {header[hits[0]]} and {header[hits[1]]} both look like the {what}"
                        "; rename or remove one")
    return hits[0] if hits else None


def _columns(name: str, header: list[str], ids: str | None, many: bool) -> tuple[int, int, int | None, str]:
    """Where time, POI and user stand, and which ids the POI's are."""
    pois = RAW_COLUMNS + ENCODED_COLUMNS
    needed = [("time", TIME_COLUMNS), ("POI", pois), *[("user", USER_COLUMNS)] * many]
    for what, allowed in needed:
        if _find(name, header, what, allowed) is None:
            raise UserError(f"{name}, line 1: no column of the {what} in {', '.join(header)[:100]!r}; call it one of "
                            f"{', '.join(allowed)}")
    at, poi_at = _find(name, header, "time", TIME_COLUMNS), _find(name, header, "POI", pois)
    return at, poi_at, _find(name, header, "user", USER_COLUMNS), ids or _kind(header[poi_at])
