"""explorer.html: every test pair on a map that is drawn from the data itself, in one file that works offline.

Here its data are gathered, small; how they are shown is told by the files in `web/`, and drawn by Leaflet, which lies
there too. Coordinates are in whole 1e-5 degrees, distances in m, probabilities in whole 1e-4, times in seconds since
1970 (local), places, users and groups by their position in a list (-1: none).
"""
import base64
import dataclasses
import datetime
import hashlib
import html
import json
import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ga_llm.base import artifacts, globe
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json
from ga_llm.evaluation import baselines, comparison, metrics, pointer_alone
from ga_llm.report import contents, figures
from ga_llm.report.contents import OUTCOMES, Baseline, Evaluation
from ga_llm.report.markup import visible
from ga_llm.serving.places import UNKNOWN, read_categories
from geo_encoder.gps_tokens import GPSMapping

WEB = Path(__file__).with_name("web")
DEGREE, SHARE, METRE = 1e5, 1e4, 1e3        # what a whole number counts: parts of a degree, of 1, of a km
SHAPE_DIGITS = 4        # of a degree: 10 m
AROUND = 0.5            # shapes are shown as far beyond the places, in parts of these' extent


def gather(runs: Sequence[Evaluation], mapping: GPSMapping, baseline: Baseline | None, folder: Path,
           shapes: Sequence[np.ndarray] = (), absent: Sequence[str] = ()) -> dict:
    """What the page shows, for JSON. runs: one, or two of the same pairs in the same order.

    baseline: None where questions or train are missing; folder: the data set's preprocessed; shapes: as `read_shapes`
    gives them; absent: lines that say what is not shown, and why.
    """
    first, records = runs[0], runs[0].records
    named = {poi for run in runs for record in run.records for poi in (record["target"], *_pois(record))}
    current = _trajectories(first, baseline, folder)
    named |= {poi for check_ins in current for _, poi in check_ins}
    guesses = {}
    if baseline is not None:
        with_pointer = pointer_alone.NAME in first.metrics.get("all", ())     # it may have been trained since
        guesses = baselines.rankings(baseline.train, baseline.prompts, folder if with_pointer else None)
        named |= set(baseline.train["PoiId"].tolist())
    ids = [*mapping.ids.tolist(), *sorted(named - set(mapping.ids.tolist()))]
    place = {poi: row for row, poi in enumerate(ids)}
    users = sorted({record["user"] for record in records}, key=lambda user: (user is None, user))
    number = {user: row for row, user in enumerate(users)}
    return {
        "dataset": first.settings["dataset_name"], "near_km": contents.NEAR_KM, "outcomes": OUTCOMES,
        "absent": list(absent), "places": _places(ids, mapping, folder), "shapes": _lines(shapes, mapping),
        "users": _history(users, baseline, place),
        "pairs": {"pair": [record["pair"] for record in records],
                  "second": [_second(record["time"]) for record in records],
                  "user": [number[record["user"]] for record in records],
                  "target": [place[record["target"]] for record in records]},
        "order": order(runs),
        "current": {"place": [[place[poi] for _, poi in check_ins] for check_ins in current],
                    "second": [[_second(time) for time, _ in check_ins] for check_ins in current]},
        "groups": [] if baseline is None else [
            {"name": name, "groups": list(of), "of": _memberships(list(of.values()))}
            for name, of in metrics.groups(baseline.prompts, baseline.train).items()],
        "baselines": [{"name": name, "sign": figures.sign(name), "rank": _ranks(ranking.ranks),
                       "top": [place.get(int(poi), -1) for poi in ranking.tops]} for name, ranking in guesses.items()],
        "runs": [{"name": visible(run.folder), "rank": _ranks(run.ranks),
                  "km": [None if np.isnan(km) else round(METRE * km) for km in run.km],
                  "outcome": contents.outcomes(run).tolist(),
                  "top": [[place[poi] for poi in _pois(record)] for record in run.records],
                  "share": [[None if value is None else round(SHARE * contents.probability(value))
                             for _, value in record["top"]] for record in run.records]} for run in runs]}


def order(runs: Sequence[Evaluation]) -> list[int]:
    """The positions of the pairs as they are listed. Of two runs, those come first whose reciprocal ranks differ most,
    then those whose first guesses do."""
    if len(runs) == 1:
        return list(range(len(runs[0].records)))
    apart = np.abs(1 / runs[0].ranks - 1 / runs[1].ranks)
    return np.lexsort([runs[0].tops == runs[1].tops, -apart]).tolist()


def page(data: dict) -> str:
    """The HTML: nothing is loaded, and no script runs but the two that are here."""
    leaflet = re.sub(r"//# sourceMappingURL=.*", "", _web("leaflet/leaflet.js"))
    scripts = {"leaflet": leaflet, "explorer": _web("explorer.js")}
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                       for text in scripts.values())
    # What JSON holds is no tag, whatever a name in the data is.
    packed = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return string.Template(_web("explorer.html")).substitute(
        scripts, allowed=allowed, data=packed, style=_web("explorer.css"), licence=_web("leaflet/LICENSE"),
        leaflet_style=re.sub(r"url\([^)]*\)", "none", _web("leaflet/leaflet.css")),
        title=html.escape(f"Explorer: {data['dataset']}, {len(data['pairs']['pair']):,} test pairs"))


def _web(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def read_shapes(dataset: str, given: Path | None) -> list[np.ndarray]:
    """The lines of a GeoJSON, (n, 2) each: longitude, latitude. That which is given, else the states of the data set's
    configuration; none if there are none. Raises UserError for what is no GeoJSON."""
    path = given or _configured(dataset)
    if path is None:
        return []
    found = []

    def walk(coordinates) -> None:
        if isinstance(coordinates[0][0], list):
            for part in coordinates:
                walk(part)
        else:
            found.append(np.array([point[:2] for point in coordinates], dtype=np.float64).reshape(-1, 2))

    try:
        content = read_json(path)
        for feature in content["features"] if "features" in content else [content]:
            geometry = feature.get("geometry", feature)
            if geometry["type"] not in ("Point", "MultiPoint"):
                walk(geometry["coordinates"])
        if not all(np.isfinite(line).all() for line in found):
            raise ValueError("a coordinate is no number")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a GeoJSON of lines or polygons ({' '.join(str(error).split())}); give another "
                        "with --shapes") from None
    return found


def _configured(dataset: str) -> Path | None:
    """The states that a data set is cut out by, if its configuration names them and they are there."""
    path = artifacts.CONFIGS / f"{dataset}.yml"
    try:
        states = yaml.safe_load(path.read_text(encoding="utf-8"))["raw"]["states"]
        return Path(states) if Path(states).is_file() else None
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):       # another has named its data set so
        return None


def align(evaluation: Evaluation, to: Evaluation) -> Evaluation:
    """The same evaluation with its pairs in the order of another's. Raises UserError if they are not the same pairs."""
    ours, theirs = ([tuple(record[name] for name in comparison.KEY) for record in one.records]
                    for one in (evaluation, to))
    row = {key: i for i, key in enumerate(ours)}
    lacking = next((key for key in theirs if key not in row), None)
    if lacking or len(ours) != len(theirs):
        what = f"no pair {lacking[0]} of user {lacking[1]}" if lacking else f"{len(ours)} pairs, not {len(theirs)}"
        raise UserError(f"--against {evaluation.folder}: has {what}, so its pairs are not those of {to.folder}; test "
                        f"both on the same questions with `{comparison.MADE_BY}`")
    rows = [row[key] for key in theirs]
    return dataclasses.replace(
        evaluation, records=[evaluation.records[i] for i in rows], ranks=evaluation.ranks[rows],
        tops=evaluation.tops[rows], km=evaluation.km[rows], probability=evaluation.probability[rows])


def _pois(record: dict) -> list[int]:
    return [poi for poi, _ in record["top"]]


def _ranks(ranks: np.ndarray) -> list[int]:
    """0 where there is none."""
    return np.where(np.isfinite(ranks), ranks, 0).astype(int).tolist()


def _second(time: str | None) -> int | None:
    """Of a local time, since 1970 as if it were UTC; None for what is no time."""
    try:
        return int(datetime.datetime.fromisoformat(time).replace(tzinfo=datetime.timezone.utc).timestamp())
    except (TypeError, ValueError):
        return None


def _places(ids: Sequence[int], mapping: GPSMapping, folder: Path) -> dict:
    """Of each place id, y and x (None: not in the mapping) and category; and the categories' names."""
    train = folder / artifacts.split_sample("train")
    categories = read_categories(train, ids, -1) if train.is_file() else {}
    named = [visible(categories.get(poi, (UNKNOWN,))[0]) for poi in ids]
    kinds = {name: row for row, name in enumerate(sorted(set(named)))}
    longitude = globe.turned(mapping.longitude, globe.middle(mapping.longitude))    # they run on across ±180°
    y, x = (np.round(DEGREE * degrees).astype(int).tolist() for degrees in (mapping.latitude, longitude))
    rest = [None] * (len(ids) - len(y))
    return {"id": list(ids), "y": y + rest, "x": x + rest, "category": [kinds[name] for name in named],
            "categories": list(kinds)}


def _lines(shapes: Sequence[np.ndarray], mapping: GPSMapping) -> list[list[list[int]]]:
    """[[y, x], …] of those that come near the places."""
    around = globe.middle(mapping.longitude)
    places = np.column_stack([globe.turned(mapping.longitude, around), mapping.latitude])
    low, high = places.min(axis=0), places.max(axis=0)
    low, high = low - AROUND * (high - low), high + AROUND * (high - low)
    found = []
    for line in shapes:
        middle = (line[:, 0].min() + line[:, 0].max()) / 2
        line = line + [globe.turned(middle, around) - middle, 0]
        if (line.max(axis=0) >= low).all() and (line.min(axis=0) <= high).all():
            line = np.round(line, SHAPE_DIGITS)
            kept = np.append(True, np.any(np.diff(line, axis=0), axis=1))
            found.append(np.round(DEGREE * line[kept, ::-1]).astype(int).tolist())
    return found


def _history(users: Sequence[int | None], baseline: Baseline | None, place: dict[int, int]) -> list[dict]:
    """Of each user the id, the places where the user has been in train, and how often."""
    of_user = {} if baseline is None else {
        user: pois.value_counts() for user, pois in baseline.train.groupby("UserId")["PoiId"]}
    found = [(user, of_user.get(user, pd.Series(dtype=np.int64))) for user in users]
    return [{"id": user, "places": [place[poi] for poi in visits.index], "visits": visits.tolist()}
            for user, visits in found]


def _trajectories(evaluation: Evaluation, baseline: Baseline | None, folder: Path) -> list[list[tuple]]:
    """Of each pair the current trajectory's (time, POI): the split's, else the prompt's, whose times are not told."""
    known = contents.trajectories(evaluation, folder)
    prompts = baseline.prompts if baseline is not None else [None] * len(evaluation.records)
    return [known.get((record["user"], record["time"], record["target"]),
                      [] if prompt is None else [(None, poi) for poi in prompt.current])
            for record, prompt in zip(evaluation.records, prompts)]


def _memberships(groups: Sequence[np.ndarray]) -> list[int]:
    """Of each pair the first of the groups that it is in, -1 for none; groups: (pairs,) bool each."""
    table = np.stack(groups)
    return np.where(table.any(axis=0), table.argmax(axis=0), -1).tolist()
