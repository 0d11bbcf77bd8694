"""Raw files of each format → one table of check-ins.

The table's columns: UserId, PoiId, PoiCategoryId (as in the file), PoiCategoryName, Latitude and Longitude (degrees),
LocalTime (datetime64, whole seconds); getnext adds Split and Trajectory (the file's text). Whatever a file has wrong
raises a UserError of one line with its name and the line's number. Any file may be given as `.gz`.
"""
import ast
import contextlib
import csv
import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from checkins.config import Config
from ga_llm.cli import UserError

GENERATE_CA = "make it with `python data-preprocess/generate_ca_raw.py`"
GOWALLA_COLUMNS = ["UserId", "PoiId", "PoiCategoryId", "Latitude", "Longitude", "UTCTime"]
TSMC2014_COLUMNS = ["user", "venue", "category id", "category name", "latitude", "longitude", "timezone offset",
                    "UTC time"]
GETNEXT_COLUMNS = ["user_id", "POI_id", "POI_catid", "POI_catname", "latitude", "longitude", "local_time",
                   "trajectory_id"]

logger = logging.getLogger(__name__)
# pandas says that a line is too long, and then drops the rest of it. `tables` makes that an error of its own.
warnings.filterwarnings("ignore", category=pd.errors.ParserWarning, message="Length of header or names")


def read(config: Config) -> pd.DataFrame:
    """All check-ins of a data set in (local time, raw-file order), indexed 0…n-1."""
    reader = {"getnext": _getnext, "tsmc2014": _tsmc2014, "gowalla": _gowalla, "csv": _csv}[config.format]
    check_ins = reader(config)
    check_ins["PoiCategoryName"] = _by_value(check_ins["PoiCategoryName"], _clean_name)
    return check_ins.sort_values("LocalTime", kind="stable", ignore_index=True)


def find(path: Path | str, way_out: str) -> Path:
    """`path`, or `path.gz` if only that is there. Raises UserError with `way_out` if neither is, or if it is empty."""
    path = Path(path)
    packed = path.with_name(path.name + ".gz")
    found = path if path.is_file() or not packed.is_file() else packed
    if not found.is_file():
        raise UserError(f"{path}: not found; {way_out}")
    if found.stat().st_size == 0:
        raise UserError(f"{found}: empty; {way_out}")
    return found


def tables(path: Path, *, keep: list[str], columns: list[str] | None = None, text: Sequence[str] = (),
           empty: Sequence[str] = (), encoding: str = "utf-8-sig", chunk: int | None = None) -> Iterator[pd.DataFrame]:
    """A raw file as tables of at most `chunk` rows (None: one table), with the columns `keep`.

    columns: the names of a tab-separated file without header; None: comma-separated, with a header that has at least
    `keep`. text: columns that stay text, whatever they look like. empty: columns whose cells may be empty.
    Each table is indexed by line number. Raises UserError if the file is not such a table or a cell is empty.
    """
    first_line = 1
    options = {"sep": "\t", "quoting": csv.QUOTE_NONE, "encoding": encoding}
    with _readable(path):
        if columns is None:
            options = {"encoding": encoding, "skiprows": 1}
            columns, first_line = list(pd.read_csv(path, nrows=0, encoding=encoding).columns), 2
        missing = [column for column in keep if column not in columns]
        if missing:
            raise UserError(f"{path}: no column {missing[0]}; its header has {', '.join(columns)}")
        # One name more than columns: what lands there is one cell too many. Without it pandas would take the first
        # column of too long lines for an index.
        width, empty_file = len(columns), True
        frames = pd.read_csv(path, header=None, names=range(width + 1), index_col=False, skip_blank_lines=False,
                             low_memory=False, keep_default_na=False, na_values=[""], chunksize=chunk or 2 ** 40,
                             dtype={columns.index(column): str for column in text}, **options)
        with frames:
            for frame in frames:
                frame = frame.set_axis(frame.index + first_line, axis=0).dropna(how="all")
                filled = frame.notna()
                _reject(filled[width], path, lambda line: f"more than {width} columns ({', '.join(columns)})")
                for column in (name for name in keep if name not in empty):
                    _reject(~filled[columns.index(column)], path,
                            lambda line: f"{column} is empty ({filled.loc[line].sum()} of {width} columns filled)")
                empty_file = empty_file and frame.empty
                yield frame.drop(columns=width).set_axis(columns, axis=1)[keep]
        if empty_file:
            raise UserError(f"{path}: no rows; fetch or make it again")


def numbers(frame: pd.DataFrame, column: str, path: Path, limit: float = np.inf) -> pd.Series:
    """A column as floats. Raises UserError with the line of the first that is no number within ±limit."""
    values = pd.to_numeric(frame[column], errors="coerce")
    span = "" if limit == np.inf else f" between -{limit} and {limit}"
    _reject(~values.between(-limit, limit), path, lambda line: f"{column} {frame[column][line]} is no number{span}")
    return values


def integers(frame: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """A column as int64. Raises UserError with the line of the first that is no whole number."""
    values = numbers(frame, column, path)
    _reject(values % 1 != 0, path, lambda line: f"{column} {frame[column][line]} is no whole number")
    return values.astype("int64")


def times(frame: pd.DataFrame, column: str, path: Path, pattern: str, length: int | None = None) -> pd.Series:
    """A column of text (its first `length` characters) as datetime64, whole seconds."""
    parsed = pd.to_datetime(frame[column].str.slice(0, length), format=pattern, errors="coerce")
    _reject(parsed.isna(), path, lambda line: f"{column} {frame[column][line]!r} is no time such as "
            + ("2012-04-03T18:00:09" if pattern == "ISO8601" else
               pd.Timestamp("2012-04-03 18:00:09").strftime(pattern)))
    return parsed.astype("datetime64[s]")


def _getnext(config: Config) -> pd.DataFrame:
    """GETNext's three files: the split and the trajectories are theirs."""
    parts = []
    for split, name in config.raw.items():
        path = find(name, config.raw_from)
        text = ("POI_id", "POI_catid", "POI_catname", "local_time", "trajectory_id")
        for frame in tables(path, keep=GETNEXT_COLUMNS, text=text):
            parts.append(_check_ins(
                path, integers(frame, "user_id", path), frame["POI_id"], frame["POI_catid"], frame["POI_catname"],
                frame, "latitude", "longitude", times(frame, "local_time", path, "%Y-%m-%d %H:%M:%S", length=19),
            ).assign(Split=split, Trajectory=frame["trajectory_id"]))
    return pd.concat(parts, ignore_index=True)


def _tsmc2014(config: Config) -> pd.DataFrame:
    """Foursquare's TSMC2014 format: local time is UTC plus the offset in minutes."""
    path = find(config.raw["check_ins"], config.raw_from)
    text = ("venue", "category id", "category name", "UTC time")
    frame, = tables(path, columns=TSMC2014_COLUMNS, keep=TSMC2014_COLUMNS, text=text, encoding="latin-1")
    offset = pd.to_timedelta(numbers(frame, "timezone offset", path, limit=24 * 60), unit="min")
    local = times(frame, "UTC time", path, "%a %b %d %H:%M:%S +0000 %Y") + offset
    return _check_ins(path, integers(frame, "user", path), frame["venue"], frame["category id"],
                      frame["category name"], frame, "latitude", "longitude", local)


def _gowalla(config: Config) -> pd.DataFrame:
    """What generate_ca_raw.py writes. UTC counts as local time, as in the paper's data."""
    path = find(config.raw["check_ins"], GENERATE_CA)
    frame, = tables(path, keep=GOWALLA_COLUMNS, text=("PoiCategoryId", "UTCTime"))

    def name(text: str) -> str:
        try:
            return ast.literal_eval(text)[0]["name"]
        except (ValueError, SyntaxError, LookupError, TypeError):
            line = (frame["PoiCategoryId"] == text).idxmax()
            raise UserError(f"{path}, line {line}: PoiCategoryId {text!r} has no name; expected e.g. "
                            "[{'url': '/categories/89', 'name': 'Craftsman'}]") from None

    return _check_ins(path, integers(frame, "UserId", path), integers(frame, "PoiId", path), frame["PoiCategoryId"],
                      _by_value(frame["PoiCategoryId"], name), frame, "Latitude", "Longitude",
                      times(frame, "UTCTime", path, "%Y-%m-%dT%H:%M:%SZ"))


def _csv(config: Config) -> pd.DataFrame:
    """A CSV of one's own, its columns named by the YAML's `columns`. Ids are text; a category is its own name."""
    path = find(config.raw["check_ins"], config.raw_from)
    column = config.columns
    text = tuple(column[role] for role in ("user", "poi", "category", "time"))
    frame, = tables(path, keep=list(dict.fromkeys(column.values())), text=text)
    # Times are local. What follows them (Z, +09:00) would only say where "local" is.
    zone = frame[column["time"]].str.extract(r"(?<=\d)(Z|[+-]\d\d:?\d\d)$", expand=False).fillna("")
    if zone.any():
        logger.warning("%s: %s are taken as local times; their offsets (Z, +09:00) are ignored", path, column["time"])
        frame[column["time"]] = [text[:len(text) - len(z)] for text, z in zip(frame[column["time"]], zone)]
    return _check_ins(path, frame[column["user"]], frame[column["poi"]], frame[column["category"]],
                      frame[column["category"]], frame, column["lat"], column["lon"],
                      times(frame, column["time"], path, "ISO8601"))


def _check_ins(path, users, pois, categories, names, frame, latitude, longitude, local) -> pd.DataFrame:
    return pd.DataFrame({
        "UserId": users, "PoiId": pois, "PoiCategoryId": categories, "PoiCategoryName": names,
        "Latitude": numbers(frame, latitude, path, limit=90), "Longitude": numbers(frame, longitude, path, limit=180),
        "LocalTime": local})


def _clean_name(name: str) -> str:
    """One line without angle brackets, so that no name can look like `<question>:` or `<GPS 1>`."""
    return " ".join(name.replace("<", " ").replace(">", " ").split())


def _by_value(column: pd.Series, function) -> pd.Series:
    """`function` of each cell, computed once per distinct value."""
    return column.map({value: function(value) for value in column.unique()})


def _reject(bad: pd.Series, path: Path, reason) -> None:
    if bad.any():
        line = bad.idxmax()
        raise UserError(f"{path}, line {line}: {reason(line)}; mend or remove the line")


@contextlib.contextmanager
def _readable(path: Path):
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding} text; save it in that encoding") from None
    except pd.errors.EmptyDataError:
        raise UserError(f"{path}: no rows; fetch or make it again") from None
    except pd.errors.ParserError as error:
        line = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        reason = f", line {line[2]}: {line[3]} columns, expected {int(line[1]) - 1}" if line else f": {error}".strip()
        raise UserError(f"{path}{reason}; mend or remove the line") from None
