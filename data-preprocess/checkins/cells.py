"""Cells of a raw file as numbers, times and names; what is none raises a UserError with its line."""
import ast
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from checkins.files import reject
from checkins.wording import short
from ga_llm.base import prompts
from ga_llm.base.cli import UserError

LARGEST_ID = 10 ** 15 - 1   # where pandas reads a column as floats, whole numbers are exact up to 2 ** 53
LONGEST_NUMBER = 300        # digits that a float can hold
YEARS = 1970, 2100          # of check-ins; what lies outside is another kind of number, or a slip of the pen
ASCTIME = "%a %b %d %H:%M:%S +0000 %Y"
ASCTIME_LIKE = re.compile(r"[^\W\d]+ ")
# Date and time as ISO 8601 has them; pandas alone would take "2012" and "10:0" too.
ISO_8601 = r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?"
# Behind a time of day: what says where "local" is.
ZONE = r":\d\d(?:\.\d+)?(\s*(?:Z|UTC|[+-](?:[01]\d|2[0-3])(?::?[0-5]\d)?))$"
UNIX = {1: re.compile(r"\d{9,10}(?:\.\d*)?$"), 1000: re.compile(r"\d{12,13}(?:\.\d*)?$")}     # parts of a second
# Python says so of a backslash in a spot's category, which is no program of ours.
warnings.filterwarnings("ignore", message="invalid escape sequence|.* is an invalid escape sequence")


def numbers(frame: pd.DataFrame, column: str, path: Path, least: float = -np.inf, most: float = np.inf) -> pd.Series:
    """A column as numbers. Raises UserError with the line of the first that is none from `least` to `most`."""
    values = _to_numbers(frame[column])
    span = "" if most == np.inf else f" between {least} and {most}"
    wrong = ~values.between(least, most) | (values.dtype == bool)       # pandas reads a column of True as such
    reject(wrong, path, lambda line: f"{column} {short(frame[column][line])} is no number{span}")
    return values


def integers(frame: pd.DataFrame, column: str, path: Path, least: int = -LARGEST_ID, most: int = LARGEST_ID
             ) -> pd.Series:
    """A column as int64. Raises UserError with the line of the first that is no whole number from `least` to `most`."""
    values = _to_numbers(frame[column])
    wrong = ~values.between(least, most) | (values.dtype == bool) | (values % 1 != 0)
    reject(wrong, path, lambda line: f"{column} {short(frame[column][line])} is no whole number between {least} and "
                                      f"{most}")
    return values.astype("int64")


def _to_numbers(column: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(column, errors="coerce")
    except OverflowError:       # a number of hundreds of digits stops pandas, where others become NaN
        return pd.to_numeric(column.mask(column.astype(str).str.len() > LONGEST_NUMBER), errors="coerce")


def times(frame: pd.DataFrame, column: str, path: Path, pattern: str) -> pd.Series:
    """A column of text, written by `pattern`, as datetime64, whole seconds, in the `YEARS` of check-ins."""
    example = pd.Timestamp("2012-04-03 18:00:09").strftime(pattern)
    cells = frame[column]
    parsed = pd.to_datetime(cells.where(cells.str.len() == len(example)), format=pattern, errors="coerce")
    return _in_years(parsed, cells, path, f"no time such as {example}")


def utc_times(frame: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """A column of text as datetime64 in UTC, whole seconds, however they are written.

    "Tue Apr 03 18:00:09 +0000 2012", ISO 8601 with or without a zone, Unix seconds or milliseconds: as the first cell
    is, all of them must be.
    """
    cells = frame[column]
    first = cells.iloc[0] if len(cells) else ""
    for scale, number in UNIX.items():
        if number.fullmatch(first):
            seconds = pd.to_numeric(cells.where(cells.str.fullmatch(number))) // scale
            return _in_years(pd.to_datetime(seconds, unit="s", errors="coerce"), cells, path,
                             f"no Unix time such as {first}, the column's first")
    if ASCTIME_LIKE.match(first):
        return times(frame, column, path, ASCTIME)
    time, zone = _zones(cells)
    hours = zone.str.extract(r"([+-])(\d\d):?(\d\d)?$")
    minutes = (hours[1].astype(float) * 60 + hours[2].fillna("0").astype(float)) * hours[0].map({"+": 1, "-": -1})
    return _iso(time, cells, path) - pd.to_timedelta(minutes.fillna(0).astype(int), unit="min")


def local_times(frame: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """A column of ISO 8601 as datetime64, whole seconds. It is local: a zone behind it only says where "local" is."""
    return _iso(_zones(frame[column])[0], frame[column], path)


def in_zone(utc: pd.Series, zone: str) -> pd.Series:
    """UTC as the local time of a zone of IANA's, daylight saving included; datetime64."""
    return utc.dt.tz_localize("UTC").dt.tz_convert(zone).dt.tz_localize(None)


def are_utc(cells: pd.Series) -> bool:
    """Whether a column of text begins with a time that can be UTC alone: a Unix time, or `ASCTIME`."""
    return len(cells) > 0 and any(kind.match(cells.iloc[0]) for kind in (ASCTIME_LIKE, *UNIX.values()))


def have_zones(cells: pd.Series) -> bool:
    """Whether an ISO time of a column of text has a zone behind it (Z, +09:00)."""
    return bool((_zones(cells)[1] != "").any())


def _zones(cells: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Each cell without its zone, and the zone."""
    zone = cells.str.extract(ZONE, expand=False).fillna("")
    if not (zone != "").any():
        return cells, zone
    return pd.Series([cell[:len(cell) - len(z)] for cell, z in zip(cells, zone)], cells.index, dtype="str"), zone


def _iso(time: pd.Series, cells: pd.Series, path: Path) -> pd.Series:
    parsed = pd.to_datetime(time.where(time.str.fullmatch(ISO_8601)), format="ISO8601", errors="coerce")
    return _in_years(parsed, cells, path, "no time such as 2012-04-03T18:00:09")


def _in_years(parsed: pd.Series, cells: pd.Series, path: Path, none: str) -> pd.Series:
    reject(parsed.isna(), path, lambda line: f"{cells.name} {short(cells[line])} is {none}")
    reject(~parsed.dt.year.between(*YEARS), path,
           lambda line: f"{cells.name} {short(cells[line])} is not between {YEARS[0]} and {YEARS[1]}")
    return parsed.astype("datetime64[s]")


def category_names(names: pd.Series, path: Path) -> pd.Series:
    """Names as a prompt may show them. Raises UserError with the line of the first of which nothing is left."""
    clean = by_value(names, clean_name)
    reject(clean == "", path, lambda line: f"category name {short(names[line])} is blank")
    return clean


def gowalla_names(categories: pd.Series, path: Path) -> pd.Series:
    """The readable name in each spot's raw category. Raises UserError with the line of the first that has none."""
    def name(text: str) -> str:
        try:
            found = ast.literal_eval(text)[0]["name"]
            found.encode()      # fails if it is no text, or text with half a character
            return found
        except (ValueError, SyntaxError, LookupError, TypeError, AttributeError, RecursionError, MemoryError):
            line = (categories == text).idxmax()    # the last two: nested too deeply to be parsed
            raise UserError(f"{path}, line {line}: category {short(text)} has no name; expected e.g. "
                            "[{'url': '/categories/89', 'name': 'Craftsman'}]") from None

    return by_value(categories, name)


def latitudes(frame: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """A column as degrees north. Raises UserError as `numbers` does."""
    return numbers(frame, column, path, -90, 90)


def longitudes(frame: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """A column as degrees east. Raises UserError as `numbers` does."""
    return numbers(frame, column, path, -180, 180)


def clean_name(name: str) -> str:
    """One line in which nothing looks like a part of the prompt: `<question>:`, `<GPS 1>`, `POI id 1`, a heading."""
    name = " ".join(name.replace("<", " ").replace(">", " ").split())
    return prompts.POI_ID.sub(lambda found: found[0].lower(), name).replace(prompts.CURRENT, prompts.CURRENT.lower())


def by_value(column: pd.Series, function) -> pd.Series:
    """`function` of each cell, computed once per distinct value."""
    return column.map({value: function(value) for value in column.unique()})
