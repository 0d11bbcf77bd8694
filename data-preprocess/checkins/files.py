"""Raw files as tables: found under the names they go by, unpacked, their separator and header recognised.

Whatever a file has wrong raises a UserError of one line with its name and the line's number. Any file may be given as
`.gz`.
"""
import codecs
import contextlib
import csv
import gzip
import io
import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from checkins.wording import short
from ga_llm.base import writing
from ga_llm.base.cli import UserError

SUFFIXES = (".txt", ".csv", ".tsv")     # by which the same table goes
SEPARATORS = ("\t", ",", ";", "|")

logger = logging.getLogger(__name__)
# pandas says that a line is too long, and then drops the rest of it. `tables` makes that an error of its own.
warnings.filterwarnings("ignore", category=pd.errors.ParserWarning, message="Length of header or names")


def find(path: Path | str, way_out: str, other_names: bool = False) -> Path:
    """`path`, or `path.gz` if only that is there; with `other_names` one of another suffix, if neither is.

    Raises UserError with `way_out` if there is none, or if it is empty.
    """
    path = Path(path)
    names = [path, path.with_name(path.name + ".gz")]
    if other_names and path.suffix in SUFFIXES:
        others = [path.with_suffix(suffix) for suffix in SUFFIXES if suffix != path.suffix]
        names += others + [other.with_name(other.name + ".gz") for other in others]
    found = next((name for name in names if name.is_file()), None)
    if found is None:
        what = "a folder, not a file" if path.is_dir() else "a link to nothing" if path.is_symlink() else "not found"
        raise UserError(f"{path}: {what}; {way_out}")
    if found.stat().st_size == 0:
        raise UserError(f"{found}: empty; {way_out}")
    if found not in names[:2]:
        logger.info("%s: not found; %s is read", path, found.name)
    return found


def tables(path: Path, *, keep: Sequence[str], instead: Mapping[str, Sequence[str]] = MappingProxyType({}),
           names: Mapping[str, Sequence[str]] = MappingProxyType({}), order: Sequence[str] | None = None,
           text: Sequence[str] = (), empty: Sequence[str] = (), errors: str = "strict", chunk: int | None = None,
           ours: bool = False, rows_needed: bool = True) -> Iterator[pd.DataFrame]:
    """A raw file in UTF-8 as tables of at most `chunk` rows (None: one table), with the columns `keep`.

    The separator is recognised, and so is a header; with `order`, the columns of a file without header, there need be
    none. instead: columns that may be absent, and which are then needed in their place, if any. names: what else a
    column may be called, as `plain` gives it, in order of preference; in the tables it has its own name. text: columns
    that stay text, whatever they look like. empty: columns whose cells may be empty. errors: what to do with bytes that
    are not UTF-8, as for `open`. ours: a file that we have written, so with commas and a header, and its last line has
    an end unless the file was cut off. rows_needed: a file without rows is refused.
    Each table is indexed by line number. Raises UserError if the file is not such a table or a cell is empty.
    """
    wanted = [*keep, *instead, *(column for others in instead.values() for column in others)]
    with writing.naming(path), _readable(path), _Text(path, errors) as file:
        line = next((line for line in file if line.strip()), "")
    separator, headed = (",", True) if ours else _layout(line, wanted, names, order)
    with writing.naming(path), _readable(path), _Text(path, errors) as file:
        first_line, columns, quoting = 1, list(order or ()), csv.QUOTE_MINIMAL
        if headed:
            reader = csv.reader(file, delimiter=separator)
            header = [name.strip() for name in next((cells for cells in reader if cells), [])]
            columns = _own_names(header, wanted, names)
            others = [f"{own} = {name}" for own, name in zip(columns, header) if own != name]
            if others:
                logger.info("%s: columns by other names: %s", path, ", ".join(others))
            first_line = reader.line_num + 1
        elif separator == "\t":
            quoting = csv.QUOTE_NONE
        keep = [*keep, *(column for first, others in instead.items()
                         for column in ([first] if first in columns else others))]
        for column in keep:
            if columns.count(column) != 1:
                what = "two columns" if column in columns else "no column"
                others = f" ({', '.join(names[column])})" if column in names else ""
                raise UserError(f"{path}: {what} {column}{others}; its header has {short(', '.join(header))}")
        # One name more than columns: what lands there is one cell too many. Without it pandas would take the first
        # column of too long lines for an index.
        width, empty_file = len(columns), True
        try:
            frames = pd.read_csv(file, sep=separator, quoting=quoting, header=None, names=range(width + 1),
                                 index_col=False, skip_blank_lines=False, low_memory=False, keep_default_na=False,
                                 na_values=[""], chunksize=chunk or 2 ** 40,
                                 dtype={columns.index(column): str for column in text if column in columns})
            for frame in frames:
                lines = frame.index + first_line
                if file.quoted and quoting != csv.QUOTE_NONE:
                    inner = _line_ends_within(frame)
                    lines += inner.cumsum() - inner
                    first_line += int(inner.sum())
                frame = frame.set_axis(lines, axis=0).dropna(how="all")
                filled = frame.notna()
                reject(filled[width], path, lambda line: f"more than {width} columns ({short(', '.join(columns))})")
                for column in (name for name in keep if name not in empty):
                    reject(~filled[columns.index(column)], path,
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


def plain(name: str) -> str:
    """A column's name without what people write differently: "UTC_time" and "utcTime" are both utctime."""
    return "".join(char for char in name.lower() if char.isalnum())


def _layout(line: str, wanted: Sequence[str], names: Mapping[str, Sequence[str]], order: Sequence[str] | None
            ) -> tuple[str, bool]:
    """The separator of a file with this first line, and whether that is a header."""
    cells = {separator: _cells(line, separator) for separator in SEPARATORS}
    known = {separator: sum(column in _own_names(found, wanted, names) for column in wanted)
             for separator, found in cells.items()}
    best = max(SEPARATORS, key=known.get)
    if order is None or known[best] > 1:    # one name may stand in a row, too
        return (best if known[best] else ","), True
    return max(SEPARATORS, key=lambda separator: (len(cells[separator]) == len(order), len(cells[separator]))), False


def _cells(line: str, separator: str) -> list[str]:
    with contextlib.suppress(csv.Error, StopIteration):
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]
    return []


def _own_names(header: list[str], wanted: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[str]:
    """A header in which each wanted column has its own name, where it stands or goes by another."""
    result, plainly = list(header), [plain(name) for name in header]
    for column in wanted:
        known = next((name for name in (plain(column), *names.get(column, ())) if name in plainly), None)
        if column not in header and column in names and known:
            result = [column if name == known else own for own, name in zip(result, plainly)]
    return result


def whole_text(path: Path) -> str:
    """All of a raw file that is no table. Raises UserError if it cannot be read or is no UTF-8."""
    with writing.naming(path), _readable(path), _Text(path, "strict") as file:
        return file.read()


def reject(bad: pd.Series, path: Path, reason) -> None:
    """Raises UserError with the first line that is `bad`, and what `reason` says of it."""
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
