"""Raw files of each format → one table of check-ins.

The table's columns: UserId, PoiId, PoiCategoryId (as in the file), PoiCategoryName, Latitude and Longitude (degrees),
LocalTime (datetime64, whole seconds); getnext adds Split and Trajectory (the file's text). Whatever a file has wrong
raises a UserError of one line with its name and the line's number. Any file may be given as `.gz`.
"""
import ast
import codecs
import contextlib
import csv
import gzip
import io
import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from checkins.config import Config
from checkins.wording import short
from ga_llm.base import prompts, writing
from ga_llm.base.artifacts import SPLITS
from ga_llm.base.cli import UserError

GENERATE_CA = "make it with `python data-preprocess/generate_ca_raw.py`"
GOWALLA_COLUMNS = ["UserId", "PoiId", "PoiCategoryId", "Latitude", "Longitude", "UTCTime"]
GOWALLA_TIME = "%Y-%m-%dT%H:%M:%SZ"
TSMC2014_COLUMNS = ["user", "venue", "category id", "category name", "latitude", "longitude", "timezone offset",
                    "UTC time"]
GETNEXT_COLUMNS = ["user_id", "POI_id", "POI_catid", "POI_catname", "latitude", "longitude", "local_time",
                   "trajectory_id"]
LARGEST_ID = 10 ** 15 - 1   # where pandas reads a column as floats, whole numbers are exact up to 2 ** 53
LONGEST_NUMBER = 300        # digits that a float can hold
OFFSETS = -24 * 60, 24 * 60     # minutes
YEARS = 1970, 2100          # of check-ins; what lies outside is another kind of number, or a slip of the pen
# Date and time as ISO 8601 has them; pandas alone would take "2012", "10:0" and time zones too.
ISO_8601 = r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?"
# Behind a time of day: what says where "local" is.
OFFSET = r":\d\d(?:\.\d+)?(\s*(?:Z|UTC|[+-]\d\d(?::?\d\d)?))$"

logger = logging.getLogger(__name__)
# pandas says that a line is too long, and then drops the rest of it. `tables` makes that an error of its own.
warnings.filterwarnings("ignore", category=pd.errors.ParserWarning, message="Length of header or names")
# Python says so of a backslash in a spot's category, which is no program of ours.
warnings.filterwarnings("ignore", message="invalid escape sequence|.* is an invalid escape sequence")


def read(config: Config) -> pd.DataFrame:
    """All check-ins of a data set in (local time, raw-file order), indexed 0…n-1."""
    reader = {"getnext": _getnext, "tsmc2014": _tsmc2014, "gowalla": _gowalla, "csv": _csv}[config.format]
    return reader(config).sort_values("LocalTime", kind="stable", ignore_index=True)


def find(path: Path | str, way_out: str) -> Path:
    """`path`, or `path.gz` if only that is there. Raises UserError with `way_out` if neither is, or if it is empty."""
    path = Path(path)
    packed = path.with_name(path.name + ".gz")
    found = path if path.is_file() or not packed.is_file() else packed
    if not found.is_file():
        what = "a folder, not a file" if path.is_dir() else "a link to nothing" if path.is_symlink() else "not found"
        raise UserError(f"{path}: {what}; {way_out}")
    if found.stat().st_size == 0:
        raise UserError(f"{found}: empty; {way_out}")
    return found


def tables(path: Path, *, keep: list[str], columns: list[str] | None = None, text: Sequence[str] = (),
           empty: Sequence[str] = (), errors: str = "strict", chunk: int | None = None,
           ours: bool = False, rows_needed: bool = True) -> Iterator[pd.DataFrame]:
    """A raw file in UTF-8 as tables of at most `chunk` rows (None: one table), with the columns `keep`.

    columns: the names of a tab-separated file without header; None: comma-separated, with a header that has at least
    `keep`. text: columns that stay text, whatever they look like. empty: columns whose cells may be empty.
    errors: what to do with bytes that are not UTF-8, as for `open`. ours: a file that we have written, so that its last
    line has an end unless the file was cut off. rows_needed: a file without rows is refused.
    Each table is indexed by line number. Raises UserError if the file is not such a table or a cell is empty.
    """
    with writing.naming(path), _readable(path), _Text(path, errors) as file:
        first_line, options = 1, {"sep": "\t", "quoting": csv.QUOTE_NONE}
        if columns is None:
            reader, options = csv.reader(file), {}
            columns = [name.strip() for name in next(reader, [])]
            first_line = reader.line_num + 1
        for column in keep:
            if columns.count(column) != 1:
                what = "two columns" if column in columns else "no column"
                raise UserError(f"{path}: {what} {column}; its header has {short(', '.join(columns))}")
        # One name more than columns: what lands there is one cell too many. Without it pandas would take the first
        # column of too long lines for an index.
        width, empty_file = len(columns), True
        try:
            frames = pd.read_csv(file, header=None, names=range(width + 1), index_col=False, skip_blank_lines=False,
                                 low_memory=False, keep_default_na=False, na_values=[""], chunksize=chunk or 2 ** 40,
                                 dtype={columns.index(column): str for column in text}, **options)
            for frame in frames:
                lines = frame.index + first_line
                if file.quoted and "quoting" not in options:
                    inner = _line_ends_within(frame)
                    lines += inner.cumsum() - inner
                    first_line += int(inner.sum())
                frame = frame.set_axis(lines, axis=0).dropna(how="all")
                filled = frame.notna()
                _reject(filled[width], path, lambda line: f"more than {width} columns ({short(', '.join(columns))})")
                for column in (name for name in keep if name not in empty):
                    _reject(~filled[columns.index(column)], path,
                            lambda line: f"{column} is empty ({filled.loc[line].sum()} of {width} columns filled)")
                empty_file = empty_file and frame.empty
                yield frame.drop(columns=width).set_axis(columns, axis=1)[keep]
        except pd.errors.EmptyDataError:
            pass
        except pd.errors.ParserError as error:
            raise UserError(f"{path}{_parser_reason(str(error), first_line)}; mend or remove the line") from None
        if empty_file and rows_needed:
            raise UserError(f"{path}: no rows; fetch or make it again")
        if not file.ended and ours:
            raise UserError(f"{path}: cut off in its last line; make it again")
        if not file.ended:
            logger.warning("%s: its last line has no end; if the file was cut off there, fetch it again", path)


def whole_text(path: Path) -> str:
    """All of a raw file that is no table. Raises UserError if it cannot be read or is no UTF-8."""
    with writing.naming(path), _readable(path), _Text(path, "strict") as file:
        return file.read()


def numbers(frame: pd.DataFrame, column: str, path: Path, least: float = -np.inf, most: float = np.inf) -> pd.Series:
    """A column as numbers. Raises UserError with the line of the first that is none from `least` to `most`."""
    values = _to_numbers(frame[column])
    span = "" if most == np.inf else f" between {least} and {most}"
    wrong = ~values.between(least, most) | (values.dtype == bool)       # pandas reads a column of True as such
    _reject(wrong, path, lambda line: f"{column} {short(frame[column][line])} is no number{span}")
    return values


def integers(frame: pd.DataFrame, column: str, path: Path, least: int = -LARGEST_ID, most: int = LARGEST_ID
             ) -> pd.Series:
    """A column as int64. Raises UserError with the line of the first that is no whole number from `least` to `most`."""
    values = _to_numbers(frame[column])
    wrong = ~values.between(least, most) | (values.dtype == bool) | (values % 1 != 0)
    _reject(wrong, path, lambda line: f"{column} {short(frame[column][line])} is no whole number between {least} and "
                                      f"{most}")
    return values.astype("int64")


def _to_numbers(column: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(column, errors="coerce")
    except OverflowError:       # a number of hundreds of digits stops pandas, where others become NaN
        return pd.to_numeric(column.mask(column.astype(str).str.len() > LONGEST_NUMBER), errors="coerce")


def times(frame: pd.DataFrame, column: str, path: Path, pattern: str, length: int | None = None) -> pd.Series:
    """A column of text (its first `length` characters) as datetime64, whole seconds, in the `YEARS` of check-ins."""
    iso = pattern == "ISO8601"
    example = "2012-04-03T18:00:09" if iso else pd.Timestamp("2012-04-03 18:00:09").strftime(pattern)
    cells = frame[column].str.slice(0, length)
    written_so = cells.str.fullmatch(ISO_8601) if iso else cells.str.len() == len(example)
    parsed = pd.to_datetime(cells.where(written_so), format=pattern, errors="coerce")
    _reject(parsed.isna(), path, lambda line: f"{column} {short(frame[column][line])} is no time such as {example}")
    _reject(~parsed.dt.year.between(*YEARS), path,
            lambda line: f"{column} {short(frame[column][line])} is not between {YEARS[0]} and {YEARS[1]}")
    return parsed.astype("datetime64[s]")


def category_names(names: pd.Series, path: Path) -> pd.Series:
    """Names as a prompt may show them. Raises UserError with the line of the first of which nothing is left."""
    clean = _by_value(names, _clean_name)
    _reject(clean == "", path, lambda line: f"category name {short(names[line])} is blank")
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

    return _by_value(categories, name)


def latitudes(frame: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """A column as degrees north. Raises UserError as `numbers` does."""
    return numbers(frame, column, path, -90, 90)


def longitudes(frame: pd.DataFrame, column: str, path: Path) -> pd.Series:
    """A column as degrees east. Raises UserError as `numbers` does."""
    return numbers(frame, column, path, -180, 180)


def _getnext(config: Config) -> pd.DataFrame:
    """GETNext's three files: the split and the trajectories are theirs."""
    parts = []
    for split in SPLITS:        # check-ins of equal time: train's first, whatever the YAML's order
        path = find(config.raw[split], config.raw_from)
        text = ("POI_id", "POI_catid", "POI_catname", "local_time", "trajectory_id")
        for frame in tables(path, keep=GETNEXT_COLUMNS, text=text, rows_needed=split != "validate"):
            parts.append(_check_ins(
                path, integers(frame, "user_id", path), frame["POI_id"], frame["POI_catid"], frame["POI_catname"],
                frame, "latitude", "longitude", times(frame, "local_time", path, "%Y-%m-%d %H:%M:%S", length=19),
            ).assign(Split=split, Trajectory=frame["trajectory_id"]))
    return pd.concat(parts, ignore_index=True)


def _tsmc2014(config: Config) -> pd.DataFrame:
    """Foursquare's TSMC2014 format: local time is UTC plus the offset in minutes."""
    path = find(config.raw["check_ins"], config.raw_from)
    text = ("venue", "category id", "category name", "UTC time")
    frame, = tables(path, columns=TSMC2014_COLUMNS, keep=TSMC2014_COLUMNS, text=text, errors=OR_LATIN_1)
    offset = pd.to_timedelta(integers(frame, "timezone offset", path, *OFFSETS), unit="min")
    local = times(frame, "UTC time", path, "%a %b %d %H:%M:%S +0000 %Y") + offset
    return _check_ins(path, integers(frame, "user", path), frame["venue"], frame["category id"],
                      frame["category name"], frame, "latitude", "longitude", local)


def _gowalla(config: Config) -> pd.DataFrame:
    """What generate_ca_raw.py writes. UTC counts as local time, as in the paper's data."""
    path = find(config.raw["check_ins"], GENERATE_CA)
    frame, = tables(path, keep=GOWALLA_COLUMNS, text=("PoiCategoryId", "UTCTime"))

    return _check_ins(path, integers(frame, "UserId", path), integers(frame, "PoiId", path), frame["PoiCategoryId"],
                      gowalla_names(frame["PoiCategoryId"], path), frame, "Latitude", "Longitude",
                      times(frame, "UTCTime", path, GOWALLA_TIME))


def _csv(config: Config) -> pd.DataFrame:
    """A CSV of one's own, its columns named by the YAML's `columns`. Ids are text; a category is its own name."""
    path = find(config.raw["check_ins"], config.raw_from)
    column = config.columns
    text = tuple(column[role] for role in ("user", "poi", "category", "time"))
    frame, = tables(path, keep=list(dict.fromkeys(column.values())), text=text)
    # Times are local. What follows them (Z, +09:00) would only say where "local" is.
    zone = frame[column["time"]].str.extract(OFFSET, expand=False).fillna("")
    if zone.any():
        logger.warning("%s: %s are taken as local times; their offsets (Z, +09:00) are ignored", path, column["time"])
        frame[column["time"]] = [text[:len(text) - len(z)] for text, z in zip(frame[column["time"]], zone)]
    return _check_ins(path, frame[column["user"]], frame[column["poi"]], frame[column["category"]],
                      frame[column["category"]], frame, column["lat"], column["lon"],
                      times(frame, column["time"], path, "ISO8601"))


def _check_ins(path, users, pois, categories, names, frame, latitude, longitude, local) -> pd.DataFrame:
    return pd.DataFrame({
        "UserId": users, "PoiId": pois, "PoiCategoryId": categories, "PoiCategoryName": category_names(names, path),
        "Latitude": latitudes(frame, latitude, path), "Longitude": longitudes(frame, longitude, path),
        "LocalTime": local})


def _clean_name(name: str) -> str:
    """One line in which nothing looks like a part of the prompt: `<question>:`, `<GPS 1>`, `POI id 1`, a heading."""
    name = " ".join(name.replace("<", " ").replace(">", " ").split())
    return prompts.POI_ID.sub(lambda found: found[0].lower(), name).replace(prompts.CURRENT, prompts.CURRENT.lower())


def _by_value(column: pd.Series, function) -> pd.Series:
    """`function` of each cell, computed once per distinct value."""
    return column.map({value: function(value) for value in column.unique()})


def _reject(bad: pd.Series, path: Path, reason) -> None:
    if bad.any():
        line = bad.idxmax()
        raise UserError(f"{path}, line {line}: {reason(line)}; mend or remove the line")


def _line_ends_within(frame: pd.DataFrame) -> pd.Series:
    """How many line ends the quoted cells of each row hold."""
    cells = frame.select_dtypes(["object", "str"])
    return sum((cells[column].str.count("\n").fillna(0).astype(int) for column in cells),
               start=pd.Series(0, frame.index))


class _Text(io.TextIOWrapper):
    """A file's text, unpacked, as pandas reads it, with an eye on what pandas says nothing about.

    quoted: whether a quote has been read; ended: whether what was read last is the end of a line.
    """

    def __init__(self, path: Path, errors: str):
        super().__init__(gzip.open(path) if path.suffix == ".gz" else open(path, "rb"), encoding="utf-8-sig",
                         errors=errors, newline="")
        self.path, self.quoted, self.ended = path, False, True

    def read(self, size: int = -1) -> str:
        return self._seen(super().read(size))

    def __next__(self) -> str:
        return self._seen(super().__next__())

    def _seen(self, text: str) -> str:
        if "\0" in text:    # pandas would end the cell there
            raise UserError(f"{self.path}: NUL characters, so it is no UTF-8 text (UTF-16, perhaps); save it as UTF-8")
        self.quoted = self.quoted or '"' in text
        if text:
            self.ended = text.endswith(("\n", "\r"))
        return text


OR_LATIN_1 = "or-latin-1"    # for `errors`: bytes that are not UTF-8 are latin-1
codecs.register_error(OR_LATIN_1, lambda error: (error.object[error.start:error.end].decode("latin-1"), error.end))


def _parser_reason(message: str, first_line: int) -> str:
    """What pandas says of a line, with the line's number in the file."""
    if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", message):
        line = int(found[2]) + first_line - 1
        return f", line {line}: {found[3]} columns, expected {int(found[1]) - 1}"
    if found := re.search(r"EOF inside string starting at row (\d+)", message):
        return f", line {int(found[1]) + first_line}: a quote (\") that is never closed"
    return f": {' '.join(message.split())}"


@contextlib.contextmanager
def _readable(path: Path):
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding} text; save it in that encoding") from None
    except csv.Error as error:
        raise UserError(f"{path}, line 1: no header of column names ({error}); mend the line") from None
