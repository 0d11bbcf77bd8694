"""Rows of tables: what was measured, on what, the differences to other rows, and the published figures.

A row is read from a run (its link and metrics.json below --work_dir) or from `results/`, where `keep` has written the
same row: committed, so that the tables of README.md and docs/tables.md are made, and tested, without the runs.
Published figures are their authors' and are not verified here; each row says where it came from.
"""
import dataclasses
import json
import logging
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from ga_llm.base import artifacts, writing
from ga_llm.base.cli import UserError
from ga_llm.evaluation import comparison
from ga_llm.evaluation.metrics import COMPARED
from ga_llm.tables.seeds import MODEL, joined

log = logging.getLogger("results")

METRICS = ("Acc@1", "Acc@5", "MRR@5", "MRR")
NOISE = 0.05        # a p below it, or the 95 % interval, says that a difference is more than the drawing of test pairs
NONE = "–"
OTHERS = "others, by their folder"
KEPT = Path("results")
KEEP_AGAIN = "write it again with `python results.py --keep`, or remove it"


@dataclasses.dataclass(kw_only=True)
class Row:
    """One row of a table. A kept file holds these fields but the paths: figures over pairs, nothing about a single one.

    found, fits: {method: {"n", metric: {"value", "low", "high"}}} over the row's pairs, and over those of them whose
    prompt fits --seq_len. groups: {grouping: {group: the same}}, of METRICS. differences: {metric of COMPARED:
    comparison.differences' row and "verdict"}, against `reference`. seconds: {kind of step: what all steps of that kind
    took in its chain, of a mean all its models'; of each the start that finished it, of an interrupted training all}.
    training: {kind of step: {"steps": optimizer steps, "seconds": the same}}, of those that train.
    seeds: {seed: {metric: figure}}, where its figures are those of one or means over several (`seeds.joined`).
    """
    path: Path = dataclasses.field(compare=False)       # of metrics.json or of the kept file
    paths: tuple[Path, ...] = dataclasses.field(default=(), compare=False)     # of every seed's metrics.json
    experiment: str | None = None
    scale: str | None = None
    table: str
    name: str
    dataset: str | None = None
    group: list[str] | None = None                      # the grouping, and its group that is all the row is about
    model: str | None = None
    reference: str | None = None
    published: dict = dataclasses.field(default_factory=dict)       # metric -> figure
    source: str | None = None                           # of these
    protocol: str | None = None
    decoding: str | None = None
    date: str | None = None
    command: str | None = None
    commit: str | None = None
    hardware: str | None = None
    seconds: dict | None = None
    training: dict | None = None
    found: dict
    differences: dict | None = None
    fits: dict | None = None
    groups: dict = dataclasses.field(default_factory=dict)
    seeds: dict | None = None

    @property
    def n(self) -> int:
        return self.found[MODEL]["n"]


def gather(work_dir: Path, others: Iterable[Path] = ()) -> list[Row]:
    """The rows of the experiments run in `work_dir`, then one for each other metrics.json in it or below `others`.

    A file that is damaged, or is no metrics.json of ours, is named and passed over, so that it hides no other.
    Raises UserError if nothing is left.
    """
    rows = []
    for link in sorted(Path(work_dir).glob("*/*.json")):
        if link.parent.name != "steps":
            _add(rows, lambda: _of_experiment(link, Path(work_dir)))
    taken = {row.path.resolve() for row in rows}
    rows = _joined(rows)
    folders = [folder for folder in (Path(work_dir), *map(Path, others)) if folder.is_dir()]
    found = {path.resolve(): path for folder in folders for path in folder.rglob(artifacts.METRICS)}
    for path in sorted(found.values()):
        if path.resolve() not in taken:
            _add(rows, lambda: _of_folder(path))
    if not rows:
        raise UserError(f"{work_dir}: no {artifacts.METRICS} of ours; run `python run_experiment.py "
                        "experiments/<name>.yml` first, or give --work_dir")
    _compare(rows)
    return rows


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Each experiment once: where some of its rows have seeds, these are one row, and one without is left out."""
    found, by_experiment = [], {}
    for row in rows:
        by_experiment.setdefault((row.scale, row.experiment), []).append(row)
    for same in by_experiment.values():
        _add(found, lambda: joined([row for row in same if row.seeds] or same))
    return found


def _add(rows: list[Row], read) -> None:
    try:
        rows.append(read())
    except UserError as error:
        log.warning("passed over: %s", error)


def _of_experiment(link: Path, work_dir: Path) -> Row:
    again = "run its experiment again"
    about = _object(link, again)
    for key in ("row", "metrics", "model"):
        if not isinstance(about.get(key), str):
            raise UserError(f"{link}: {key} is {str(about.get(key))[:60]!r}; {again}")
    path = work_dir / about["metrics"]
    report = read(path)
    found, group, groups = report["all"], about.get("group"), report.get("groups") or {}
    fits = report.get("fits") if _is_found(report.get("fits")) else None
    if group is not None:
        if not KEPT_FIELDS["group"](group):
            raise UserError(f"{link}: group is {str(group)[:60]!r}; {again}")
        grouping, name = group
        found, fits = groups.get(grouping, {}).get(name), None
        if not _is_found(found):
            raise UserError(f"{path}: no group {name!r} of {grouping!r}, which {link} asks for; test again")
        groups = {}
    seconds, training = _cost(work_dir / "steps", about.get("step"))
    told = _told(report) | ({"command": _public(str(about["command"]))} if about.get("command") else {})
    values = {key: about.get(key) for key in ("experiment", "scale", "table", "dataset", "reference", "source")}
    seeds = None if about.get("seed") is None else {str(about["seed"]): {
        metric: found[MODEL][metric]["value"] for metric in METRICS if metric in found[MODEL]}}
    values |= {**told, "name": about["row"], "seeds": seeds, "group": group, "model": _name_only(about["model"]),
               "published": about.get("published") or {}, "seconds": seconds, "training": training, "found": found,
               "differences": None, "fits": fits, "groups": _of_groups(groups)}
    return Row(path=path, paths=(path,), **_checked(values, link, again))


def _of_folder(path: Path) -> Row:
    report = read(path)
    return Row(path=path, table=OTHERS, name=str(path.parent), **_told(report), found=report["all"])


def read(path: Path) -> dict:
    """A metrics.json. Raises UserError if it is damaged, or none of ours."""
    report = _object(path, "test again")
    if not _is_found(report.get("all")):
        raise UserError(f"{path}: not a metrics.json of test_next_gps.py (no figures under all/model); test again, or "
                        "move it away")
    if not _map_of(_map_of(lambda found: isinstance(found, dict)))(report.get("groups", {})):
        raise UserError(f"{path}: groups are not those of test_next_gps.py; test again, or move it away")
    return report


def _object(path: Path, way_out: str) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())[:100]}); {way_out}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; {way_out}")
    return found


def _told(report: dict) -> dict[str, str | None]:
    """What a figure must be given with, of a metrics.json."""
    found = {key: None if report.get(key) is None else " ".join(str(report[key]).split())
             for key in ("protocol", "decoding", "date")}
    git, machine = (report.get(key) if isinstance(report.get(key), dict) else {} for key in ("git", "machine"))
    found["command"] = None if report.get("command") is None else _public(str(report["command"]))
    found["commit"] = str(git["commit"]) + " and changes" * bool(git.get("dirty")) if git.get("commit") else None
    gpus = machine.get("gpus") or []
    found["hardware"] = ", ".join(map(str, [machine.get("cpu", NONE), f"{machine.get('cores', NONE)} cores",
                                            *(gpus if isinstance(gpus, list) else [gpus])])) if machine else None
    return found


def _public(command: str) -> str:
    """A command without the folders of the machine that it was run on."""
    try:
        parts = shlex.split(command)
    except ValueError:          # a quote without its other half
        parts = command.split()
    split = (part.partition("=") if part.startswith("-") else ("", "", part) for part in parts)
    return " ".join(shlex.join(flag + equals + _name_only(value) for flag, equals, value in split).split())


def _name_only(text: str) -> str:
    """The last part of a path that leads out of the repository; any other text as it is."""
    path = PurePath(text)
    return path.name if path.is_absolute() or ".." in path.parts or text.startswith("~") else text


def _of_groups(groups: dict) -> dict:
    """The figures of METRICS in every group that has some: an empty one has none."""
    return {grouping: {group: {method: {key: summary[key] for key in ("n", *METRICS) if key in summary}
                               for method, summary in found.items()}
                       for group, found in by_group.items() if _is_found(found)}
            for grouping, by_group in groups.items()}


def _cost(steps: Path, test: str | None) -> tuple[dict | None, dict | None]:
    """`seconds` and `training` of a Row whose chain ends in the step `test`; None where they are not all told."""
    if test is None:
        return None, None
    from ga_llm.tables import chain       # these here, for they take seconds to import, and --tables needs none
    from ga_llm.training import run_log, staging
    seconds, training, left = {}, {}, [test]
    try:
        for step in left:                   # grows by the steps that a step builds on
            done = _object(steps / step / chain.DONE, "its cost is not told")
            kind, took, out = done["step"], float(done["seconds"]), steps / step / chain.OUT
            left += [before for before in dict.fromkeys(done["steps"]) if before not in left]     # named once an output
            logged = run_log.read_log(out / artifacts.TRAINER_LOG)
            if logged:
                took = max(took, logged[-1]["elapsed_seconds"])     # an interrupted one has more
                of_all = training.setdefault(kind, {"steps": 0, "seconds": 0.0})
                of_all["steps"] += max([logged[-1]["step"], *staging.steps(out)])    # not every step has a line
                of_all["seconds"] += took
            seconds[kind] = seconds.get(kind, 0.0) + took
    except UserError as error:
        log.warning("%s", error)
        return None, None
    except (KeyError, TypeError, ValueError):
        log.warning("%s: none of ours; its cost is not told", steps / step / chain.DONE)
        return None, None
    return dict(sorted(seconds.items())), dict(sorted(training.items()))


def keep(rows: Iterable[Row], folder: Path = KEPT) -> list[Path]:
    """Write each experiment's row to <folder>/<scale>/<experiment>.json; the same row gives the same bytes.

    Raises UserError if there is none.
    """
    files = {Path(folder) / row.scale / f"{row.experiment}.json": row for row in rows if row.experiment}
    if not files:
        raise UserError("no row of an experiment is there to keep; run `python run_experiment.py "
                        "experiments/<name>.yml` first, or give --work_dir")
    with writing.together() as new_file:
        for path, row in files.items():
            fields = (field.name for field in dataclasses.fields(row) if field.name in KEPT_FIELDS)
            values = {name: getattr(row, name) for name in fields}
            text = json.dumps(values, indent=1, ensure_ascii=False)
            text = re.sub(r'\{\s+"value": (\S+),\s+"low": (\S+),\s+"high": (\S+)\s+\}',       # a figure, a line
                          r'{"value": \1, "low": \2, "high": \3}', text)
            with new_file(path) as file:
                file.write(text + "\n")
    return list(files)


def kept(folder: Path = KEPT) -> list[Row]:
    """The rows that `keep` has written there. Raises UserError that names the file if one is damaged, or is out of date
    because it was compared with another reference than the one that is kept.
    """
    rows = [_of_kept(path) for path in sorted(Path(folder).glob("*/*.json"))]
    by_name = {(row.scale, row.experiment): row for row in rows}
    for row in rows:
        reference = by_name.get((row.scale, row.reference), row)
        for metric, difference in (row.differences or {}).items():
            for side, one in (("b", row), *([("a", reference)] * (reference is not row))):
                if not math.isclose(difference[side], one.found[MODEL][metric]["value"], abs_tol=1e-9):
                    raise UserError(f"{row.path}: its difference in {metric} is that of another {one.experiment} than "
                                    f"{one.path} has; {KEEP_AGAIN}")
    return rows


def _of_kept(path: Path) -> Row:
    return Row(path=path, **_checked(_object(path, KEEP_AGAIN), path, KEEP_AGAIN))


def _checked(values: dict, path: Path, way_out: str) -> dict:
    """`values` if they are the fields of a row whose file is `path`. Raises UserError that ends in `way_out`."""
    for key in sorted(values.keys() | KEPT_FIELDS.keys()):
        if key not in values or key not in KEPT_FIELDS or not KEPT_FIELDS[key](values[key]):
            raise UserError(f"{path}: {key[:60]} is {str(values.get(key, 'not there'))[:60]!r}; {way_out}")
    if (values["scale"], values["experiment"]) != (path.parent.name, path.name.partition(".")[0]):
        raise UserError(f"{path}: is about {values['scale']}/{values['experiment']}; {way_out}")
    return values


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value) -> bool:
    return isinstance(value, str)


def _map_of(holds):
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _or_none(holds):
    return lambda value: value is None or holds(value)


def _has_numbers(*keys: str):
    return lambda value: isinstance(value, dict) and all(_is_number(value.get(key)) for key in keys)


def _is_found(found) -> bool:
    """Whether it is {method: summary} with the model, and all that is shown of it numbers."""
    figure = _has_numbers("value", "low", "high")
    return (_map_of(lambda summary: isinstance(summary, dict) and type(summary.get("n")) is int)(found)
            and "Acc@1" in found.get(MODEL, {})
            and all(figure(summary[metric]) for summary in found.values() for metric in METRICS if metric in summary))


def _are_differences(value) -> bool:
    return (isinstance(value, dict) and "Acc@1" in value and value.keys() <= set(COMPARED)
            and _map_of(_has_numbers("n", "a", "b", "difference", "low", "high", "p"))(value)
            and all(one.get("verdict") == verdict(one) for one in value.values()))


def _are_seeds(value) -> bool:
    return value != {} and _map_of(_map_of(_is_number))(value) and all(map(str.isdigit, value))


KEPT_FIELDS = {             # of a kept file -> whether a value can be its
    **dict.fromkeys(("experiment", "scale", "table", "name"), _is_text),
    **dict.fromkeys(("dataset", "model", "reference", "source", "protocol", "decoding", "date", "command", "commit",
                     "hardware"), _or_none(_is_text)),
    "group": _or_none(lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))),
    "published": _map_of(_is_number), "seconds": _or_none(_map_of(_is_number)),
    "training": _or_none(_map_of(_has_numbers("steps", "seconds"))), "found": _is_found,
    "seeds": _or_none(_are_seeds),
    "differences": _or_none(_are_differences), "fits": _or_none(_is_found), "groups": _map_of(_map_of(_is_found)),
}


def _compare(rows: Sequence[Row]) -> None:
    """Give each row that has a reference, run at the same scale with the same pairs, the differences to it."""
    by_name, compared = {(row.scale, row.experiment): row for row in rows if row.experiment}, {}
    for row in rows:
        reference = by_name.get((row.scale, row.reference))
        if reference is None or row.group or reference.group or row.path == reference.path:
            continue
        files = tuple(tuple(path.with_name(artifacts.PREDICTIONS) for path in one.paths) for one in (reference, row))
        if files not in compared:
            try:
                found = comparison.differences(*files)
                compared[files] = {metric: found[metric] | {"verdict": verdict(found[metric])}
                                   for metric in COMPARED if metric in found}
            except UserError as error:
                log.warning("%s is not compared with %s: %s", row.experiment, row.reference, error)
                compared[files] = None
        row.differences = compared[files]


def verdict(difference: dict) -> str:
    return "within noise" if difference["low"] <= 0 <= difference["high"] or difference["p"] >= NOISE else (
        "better" if difference["difference"] > 0 else "worse")
