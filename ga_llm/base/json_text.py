"""JSON by orjson and ijson where they are installed, else by Python's own json: the same bytes, the same refusals.

Without orjson, files are written several times slower. Without ijson, a file of question-answer pairs is held in memory
whole, and a value nested deeper than Python recurses is refused.
"""
import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import orjson
except ImportError:
    orjson = None
try:
    import ijson
except ImportError:
    ijson = None

BLANKS = re.compile(r"[ \t\n\r]*")


def dumps(value, indented: bool = False) -> bytes:
    """Objects, arrays, texts, whole numbers, True, False and None as UTF-8 text without blanks, or two to a level.

    Raises a TypeError or ValueError for a text that is no Unicode (a lone surrogate).
    """
    if orjson:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 if indented else None)
    separators = (",", ": " if indented else ":")
    return json.dumps(value, ensure_ascii=False, indent=2 if indented else None, separators=separators).encode()


def loads(text: bytes):
    """Parse. Raises ValueError for what is not JSON (NaN, a lone surrogate), or is nested too deeply."""
    if orjson:
        return orjson.loads(text)
    try:
        value = json.loads(text.decode(), parse_constant=_refuse)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()      # a lone surrogate fails
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def records(path: Path) -> Iterator[dict]:
    """What the items of a JSON array in a file hold directly, one after another; {} for an item that is no object.

    Yields nothing if the document is something else. A list or an object in a record may stand as None. Raises
    ValueError where the file stops to be JSON.
    """
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        if ijson is None:
            yield from _read_whole(file.read())
            return
        try:
            yield from _of_events(ijson.basic_parse(file, buf_size=2**20, use_float=True))
        except ijson.JSONError as error:
            message = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            raise ValueError(message) from None


def _of_events(events: Iterable[tuple[str, object]]) -> Iterator[dict]:
    """However deep an item is nested, no memory goes into it: `ijson.items` would keep the path of every level."""
    depth, is_array, record, key = 0, False, {}, None
    for event, value in events:
        if event.startswith("end_"):
            depth -= 1
        elif event == "map_key":
            key = value
        elif depth == 0:
            is_array = event == "start_array"
        elif depth == 1:
            record = {}
        elif depth == 2:
            record[key] = value     # None where a list or an object begins
        depth += event.startswith("start_")
        if is_array and depth == 1 and event not in ("start_array", "map_key"):
            yield record


def _read_whole(data: bytes) -> Iterator[dict]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        text = data[:error.start].decode() + "\0"       # which JSON refuses, there and not before
    decoder = json.JSONDecoder(parse_constant=_refuse)

    def parse(at: int) -> tuple[object, int]:
        """The value that begins here, and where the next sign stands."""
        try:
            value, at = decoder.raw_decode(text, BLANKS.match(text, at).end())
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return value, BLANKS.match(text, at).end()

    at = BLANKS.match(text).end()
    if text[at:at + 1] != "[":
        _, at = parse(at)
    elif text[(end := BLANKS.match(text, at + 1).end()):end + 1] == "]":
        at = BLANKS.match(text, end + 1).end()
    else:
        sign = ","
        while sign == ",":
            value, at = parse(at + 1)
            yield {key: _whole(part) for key, part in value.items()} if isinstance(value, dict) else {}
            sign, at = text[at:at + 1], at if text[at:at + 1] == "," else at
        if sign != "]":
            raise ValueError(f"expected , or ] at character {at}")
        at = BLANKS.match(text, at + 1).end()
    if at < len(text):
        raise ValueError(f"more text behind the end, at character {at}")


def _whole(part):
    """As ijson gives it: a question mark for a lone surrogate."""
    return part.encode(errors="replace").decode() if isinstance(part, str) else part


def _refuse(constant: str):
    raise ValueError(f"{constant} is no number")
