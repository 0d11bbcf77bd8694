"""One user's check-ins and a time in, the most likely places out: reading them, asking as in training, answering.

The question is the one that process_llm_gps.py would write for these check-ins: those that no gap of more than
`session_time_interval` separates from each other and from the time asked about are the current trajectory, the
earlier ones the history. (It drops lone check-ins beforehand; here they stay.) Coordinates are the GPS mapping's, a
POI's category is its most frequent one in train.
"""
import csv
import dataclasses
import datetime
import io
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ga_llm.base import artifacts, prompts
from ga_llm.base.cli import UserError
from ga_llm.base.reading import WAY_OUT, read_json, read_tensors
from ga_llm.evaluation import baselines, decoding, metrics, pointed
from ga_llm.evaluation.ranking import Trie
from ga_llm.llm import beside, pointing
from ga_llm.pairs.check_ins import Shown
from ga_llm.pairs.spelling import Spelling
from ga_llm.serving.export import check_questions
from ga_llm.training.checkpoints import AGREEMENT, read_agreement
from geo_encoder.gps_tokens import GPSMapping, read_gps_mapping

log = logging.getLogger(__name__)

# Headers, without case, spaces and signs.
TIME_COLUMNS = ("time", "localtime", "datetime", "timestamp", "when", "date", "checkintime")
RAW_COLUMNS = ("poi", "poiid", "venue", "venueid", "place", "placeid", "location", "locationid")
ENCODED_COLUMNS = ("gpsid", "encodedpoi", "encodedpoiid", "encodedid")
USER_COLUMNS = ("user", "userid")
IDS = ("raw", "encoded")
TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d)(:\d\d)?(?:\.\d+)?\s*(Z|UTC|[+-]\d\d(?::?\d\d)?)?")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
UNKNOWN = "unknown"     # the category's name of a POI that train_sample.csv does not have
END, END_OF_TOKEN = ".", ">."       # what stands behind the id in our wording, and behind that of `<GPS n>`


@dataclasses.dataclass
class Places:
    """What a data set's preprocessed folder says of its POIs, users and categories.

    raw: {encoded POI id: raw id}; coordinates: {encoded: degrees}; category: {encoded: (name, id)}.
    """
    mapping: GPSMapping
    labels: dict[str, dict]
    raw: dict[int, str]
    coordinates: dict[int, tuple[float, float]]
    category: dict[int, tuple[str, int]]

    def encode(self, field: str, text: str) -> int | None:
        """The id of a raw user or POI; None if train has none."""
        return self.labels[field]["of"].get(text)


@dataclasses.dataclass(frozen=True)
class CheckIn:
    time: datetime.datetime     # local
    poi: int                    # encoded


@dataclasses.dataclass
class Asking:
    """How an exported model is asked (its ga_llm.json). context: tokens; gap: minutes."""
    context: int
    dataset: str
    places: str
    questions: dict
    gap: float
    max_current: int
    max_current_with_history: int
    beside: dict = dataclasses.field(default_factory=dict)      # a pointer, if it has one (`llm.beside`)

    @property
    def answers_by_token(self) -> bool:
        """By `<GPS n>`, not by `POI id n`."""
        return self.questions.get("answer") == "token"


def read_asking(model: Path) -> Asking:
    """Raises UserError if `model` is no folder that export.py wrote."""
    path = model / AGREEMENT
    if not model.is_dir():
        raise UserError(f"--model {model}: no such folder; make it with `python export.py`")
    found = read_agreement(model)
    trajectories = found.get("trajectories")
    if not isinstance(trajectories, dict) or "questions" not in found:
        raise UserError(f"{path}: not there, or of a checkpoint; give a folder that `python export.py` made")
    check_questions(found["questions"], path)
    names = ("session_time_interval", "max_current", "max_current_with_history")
    for name in names:
        if type(trajectories.get(name)) not in (int, float) or trajectories[name] < 0:
            raise UserError(f"{path}: {name} is {str(trajectories.get(name))[:100]!r}; {WAY_OUT}")
    return Asking(found.get("model_max_length"), found.get("dataset"), found.get("places"), found["questions"],
                  *(trajectories[name] for name in names), found.get("beside", {}))


def read_places(dataset: str, root: Path | str, asking: Asking) -> Places:
    """Raises UserError if files are missing or broken, or the places are not those of the model."""
    folder = artifacts.preprocessed(dataset, root)
    path = folder / artifacts.gps_mapping(dataset)
    mapping = read_gps_mapping(path)
    if mapping.digest != asking.places:
        raise UserError(f"{path}: other places than those that the model was exported with (data set {asking.dataset})"
                        "; give --dataset_name and --data_path of the training")
    labels = read_labels(folder / artifacts.LABEL_ENCODING)
    raw = {poi: text for text, poi in labels["poi"]["of"].items()}
    of_poi = dict(zip(mapping.ids.tolist(), zip(mapping.latitude.tolist(), mapping.longitude.tolist())))
    return Places(mapping, labels, raw, of_poi, read_categories(folder / artifacts.split_sample("train"),
                                                                of_poi, labels["category"]["unseen"]))


def read_labels(path: Path) -> dict[str, dict]:
    """{user, poi, category: {"unseen": id, "of": {raw, as text: id}}} of label_encoding.json."""
    found = read_json(artifacts.require(path, baselines.MADE_BY))
    labels = {}
    for field in ("user", "poi", "category"):
        part = found.get(field)
        if (not isinstance(part, dict) or not isinstance(part.get("values"), list)
                or any(type(part.get(name)) is not int for name in ("first_id", "unseen"))):
            raise UserError(f"{path}: {field} has no values, first_id and unseen; make it again with "
                            f"`{baselines.MADE_BY}`")
        labels[field] = {"unseen": part["unseen"],
                         "of": {str(value): i for i, value in enumerate(part["values"], start=part["first_id"])}}
    return labels


def read_categories(path: Path, pois, unseen: int) -> dict[int, tuple[str, int]]:
    """{POI: (name, id) of its most frequent category in train, of equals the one seen first}."""
    columns = ["PoiId", "PoiCategoryId", "PoiCategoryName"]
    try:
        rows = pd.read_csv(artifacts.require(path, baselines.MADE_BY), usecols=columns, keep_default_na=False,
                           dtype={"PoiId": np.int64, "PoiCategoryId": np.int64, "PoiCategoryName": str})
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; make it again with `{baselines.MADE_BY}`") from None
    counts = rows.value_counts(columns, sort=False).rename("n").reset_index()
    order = rows.drop_duplicates().reset_index(drop=True).reset_index().merge(counts, on=columns)
    best = order.sort_values(["n", "index"], ascending=[False, True]).drop_duplicates("PoiId")
    found = dict(zip(best["PoiId"].tolist(), zip(best["PoiCategoryName"].tolist(), best["PoiCategoryId"].tolist())))
    return {poi: found.get(poi, (UNKNOWN, unseen)) for poi in pois}


def read_time(text: str) -> datetime.datetime | None:
    """A local time, with or without seconds; None if it is none. What follows it (Z, +09:00) is not looked at."""
    found = TIME.fullmatch(text.strip())
    try:
        return datetime.datetime.strptime(f"{found[1]} {found[2]}{found[3] or ':00'}", TIME_FORMAT) if found else None
    except ValueError:      # 2013-02-30
        return None


def read_check_ins(source: str, places: Places, ids: str | None) -> list[CheckIn]:
    """The check-ins of a CSV (or of stdin: "-") that are at places of train, in order of time.

    ids: "raw" or "encoded"; None: by the column's name. Others are counted in a log line. Raises UserError with file
    and line for what is no check-in, or if no place is known.
    """
    name = "stdin" if source == "-" else source
    content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason}); save it as CSV in UTF-8") from None
    header_line = text.split("\n", 1)[0]
    if not header_line.strip():
        raise UserError(f"{name}: empty; give a CSV with a header that has a time and a POI")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header_line.count))
    found, unknown, zones, users = [], [], 0, set()
    try:
        header = next(reader)
        at, poi_at, user_at, ids = _columns(name, header, ids)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{name}, line {reader.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where}: {len(row)} cells, where the header has {len(header)}; mend the line")
            time, poi = read_time(row[at]), row[poi_at].strip()
            if time is None:
                raise UserError(f"{where}: {row[at][:60]!r} is no local time such as 2013-01-05 18:00:00; mend it")
            zones += TIME.fullmatch(row[at].strip())[4] is not None
            if user_at is not None:
                users.add(row[user_at].strip())
            if ids == "encoded":
                known = int(poi) if re.fullmatch(r"[0-9]{1,18}", poi) else None
                if known is None:
                    raise UserError(f"{where}: {poi[:60]!r} is no encoded POI id; give whole numbers, or --ids raw")
            else:
                known = places.encode("poi", poi)
            if known in places.coordinates:
                found.append(CheckIn(time, known))
            else:
                unknown.append((reader.line_num, poi))
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num}: not CSV ({error}); mend the line") from None
    if len(users) > 1:
        raise UserError(f"{name}: check-ins of {len(users)} users; give those of one")
    if not found:
        what = f"POI {unknown[0][1][:60]!r} of line {unknown[0][0]} is none" if unknown else "it has none"
        other = "--ids " + ("raw" if ids == "encoded" else "encoded")
        raise UserError(f"{name}: no check-in at a place that the model knows ({what}); give the data set's {ids} ids, "
                        f"or {other}")
    if zones:
        log.warning("%s: times are taken as local; what follows %d of them (Z, +09:00) is ignored", name, zones)
    if unknown:
        log.warning("%s: %d of %d check-ins are at places that the model does not know, such as %s on line %d, and "
                    "left out", name, len(unknown), len(unknown) + len(found), unknown[0][1][:60], unknown[0][0])
    return sorted(found, key=lambda check_in: check_in.time)       # stable: equal times as in the file


def _columns(name: str, header: list[str], ids: str | None) -> tuple[int, int, int | None, str]:
    """Where time, POI and user stand, and which ids the POI's are."""
    plain = [re.sub(r"[^a-z0-9]", "", column.lower()) for column in header]

    def find(what: str, allowed: tuple[str, ...]) -> int | None:
        hits = [i for i, column in enumerate(plain) if column in allowed]
        if len(hits) > 1:
            raise UserError(f"{name}, line 1: columns {header[hits[0]]} and {header[hits[1]]} both look like the {what}"
                            "; rename or remove one")
        return hits[0] if hits else None

    at, poi_at = find("time", TIME_COLUMNS), find("POI", RAW_COLUMNS + ENCODED_COLUMNS)
    for what, column, allowed in (("time", at, TIME_COLUMNS), ("POI", poi_at, RAW_COLUMNS + ENCODED_COLUMNS)):
        if column is None:
            raise UserError(f"{name}, line 1: no column of the {what} in {', '.join(header)[:100]!r}; call it one of "
                            f"{', '.join(allowed)}")
    return at, poi_at, find("user", USER_COLUMNS), ids or ("encoded" if plain[poi_at] in ENCODED_COLUMNS else "raw")


def before(check_ins: Sequence[CheckIn], time: datetime.datetime, name: str) -> list[CheckIn]:
    """Those before `time`; in its own second nobody knows it yet. Raises UserError if there are none."""
    found = [check_in for check_in in check_ins if check_in.time < time]
    if not found:
        raise UserError(f"--time {time}: {name} has no check-in before it (the first is at {check_ins[0].time}); give "
                        "a later time, or earlier check-ins")
    return found


def split(check_ins: Sequence[CheckIn], time: datetime.datetime, asking: Asking) -> tuple[list, list]:
    """(history, current trajectory) of the check-ins before `time`, as process_llm_gps.py cuts them."""
    first, following = len(check_ins), time
    while first and (following - check_ins[first - 1].time).total_seconds() <= 60 * asking.gap:
        first -= 1
        following = check_ins[first].time
    current, most, step = check_ins[first:], asking.questions["max_history"], asking.questions.get("history_step")
    start = max(0, first - most)
    if step:        # a long history begins at a multiple of it
        start = min(first, -(-start // step) * step)
    history = [] if len(current) > asking.max_current_with_history else check_ins[start:first]
    return list(history), list(current[max(0, len(current) - asking.max_current):])


def pair(check_ins: Sequence[CheckIn], time: datetime.datetime, user: int, places: Places, asking: Asking) -> str:
    """The joined pair of these check-ins; the answer's POI id is a stand-in, for nobody knows it."""
    fields = asking.questions["fields"]
    history, current = split(check_ins, time, asking)
    shown = [prompts.check_in(fields, check_in.time.strftime(TIME_FORMAT), user, check_in.poi,
                              *places.coordinates[check_in.poi], *places.category[check_in.poi])
             for check_in in (*history, *current)]
    after = ""
    if {prompts.AFTER, prompts.MOMENT} & set(fields):
        in_a_row = prompts.in_tokens if prompts.MOMENT in fields else prompts.in_a_row
        *seconds, last = _seconds([*(check_in.time for check_in in (*history, *current)), time])
        shown, after = in_a_row(shown, seconds, last)
    parts = shown[:len(history)], shown[len(history):]
    if prompts.MOMENT in fields:
        parts = [["".join(part)] if part else [] for part in parts]
    first, last = int(places.mapping.ids.min()), int(places.mapping.ids.max())
    at = time.strftime(TIME_FORMAT)
    question = prompts.question(user, [], *parts, prompts.ask_poi(at, user, first, last))
    return prompts.join(question, prompts.answer_poi(at, user, first, fields, after, asking.answers_by_token))


def _seconds(times: Sequence[datetime.datetime]) -> list[int]:
    """Local times as seconds since 1970."""
    return [int((time - datetime.datetime(1970, 1, 1)).total_seconds()) for time in times]


def shown(check_ins: Sequence[CheckIn], time: datetime.datetime, places: Places, asking: Asking) -> Shown:
    """What the pair of these check-ins shows, and where from nothing was cut; the target's place is a stand-in."""
    history, current = split(check_ins, time, asking)
    row = {poi: i for i, poi in enumerate(places.mapping.ids.tolist())}
    seconds = np.array(_seconds([*(check_in.time for check_in in (*history, *current)), time]))
    # A trajectory ends where the gap is longer than it may be.
    trajectory = np.cumsum(np.diff(seconds, prepend=seconds[0]) > 60 * asking.gap)
    rows = np.array([*(row[check_in.poi] for check_in in (*history, *current)), 0])
    return Shown.of(seconds, rows, trajectory, np.zeros(len(rows) - 1))


def load_pointer(folder: Path, described: dict, model, tokenizer, places: Places) -> None:
    """Let `model` of an exported folder have the pointer that lies there, if ga_llm.json tells of one."""
    if described:
        path = artifacts.require(folder / artifacts.POINTER, "python export.py")
        token_ids = np.asarray(tokenizer.convert_tokens_to_ids(places.mapping.tokens))
        beside.read(described, read_tensors(path), path, places.mapping, model.get_input_embeddings().embedding_dim,
                    token_ids, None).settle(model)


def rank(model, tokenizer, places: Places, asked: str, asking: Asking, check_ins: Shown
         ) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """All POIs (ids, probabilities), best first; the probability of all of them together before; whether all fits.

    The probabilities are normalised over the POIs: an LLM also gives some to what is no id.
    """
    spelled = Spelling(tokenizer, sorted(places.mapping.ids.tolist()), END_OF_TOKEN if asking.answers_by_token else END)
    prompt, = spelled.prompts([asked], asking.context, "the question")
    prompt = dataclasses.replace(prompt, target=metrics.NO_POI)     # none to search the rank of
    if getattr(model, pointing.MODULE, None) is not None:
        token_ids = np.asarray(tokenizer.convert_tokens_to_ids(places.mapping.tokens))
        (prompt, at, _), = pointed.positions([prompt], token_ids)
        prompt = dataclasses.replace(prompt, check_ins=check_ins.latest(at))
    trie = Trie(spelled.tokens)
    (_, (found,)), = decoding.decode("rank", model, tokenizer, trie, [prompt], 1, full=True)
    log_probs = found.log_probs.astype(np.float64)
    order = np.argsort(-log_probs, kind="stable")
    total = np.logaddexp.reduce(log_probs)
    return np.array(trie.candidates)[order], np.exp(log_probs[order] - total), float(np.exp(total)), prompt.fits


def describe(pois: Sequence[int], probabilities: Sequence[float], last: int, places: Places) -> list[dict]:
    """What is told of each recommended place. last: the POI of the last check-in, from where km are counted."""
    km = metrics.distances(list(pois), [last] * len(pois), places.mapping)
    return [{"rank": i, "poi": int(poi), "id": places.raw.get(int(poi), str(poi)), "category": places.category[poi][0],
             "probability": float(p), "km": float(distance), "latitude": places.coordinates[poi][0],
             "longitude": places.coordinates[poi][1]}
            for i, (poi, p, distance) in enumerate(zip(pois, probabilities, km), start=1)]


def visits(check_ins: Sequence[CheckIn], places: Places) -> list[dict]:
    """The check-ins, in their order, for the map."""
    return [{"latitude": places.coordinates[check_in.poi][0], "longitude": places.coordinates[check_in.poi][1],
             "category": places.category[check_in.poi][0], "id": places.raw.get(check_in.poi, str(check_in.poi)),
             "time": check_in.time.strftime(TIME_FORMAT)} for check_in in check_ins]


def table(found: Sequence[dict]) -> str:
    """Aligned text, at most 80 columns wide; what is cut ends in …"""
    lines = [f"{'':>3}  {'probability':>11}  {'km':>8}  {'category':24}  id"]
    for row in found:
        lines.append(f"{row['rank']:>3}  {100 * row['probability']:>9.2f} %  {row['km']:>8.2f}  "
                     f"{_cut(row['category'], 24):24}  {_cut(row['id'], 26)}")
    return "\n".join(line.rstrip() for line in lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "…"
