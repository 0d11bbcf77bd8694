"""Rows of tables: ours beside baselines, with differences, what they were measured on, and the published figures.

A row is read from a run (its link and metrics.json below --work_dir) or from `results/`, where `keep` has written the
same row: committed, so that the tables of README.md and docs/tables.md are made, and tested, without the runs.
Published figures are their authors' and are not verified here; each row says where it came from.
"""
import csv
import dataclasses
import io
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

log = logging.getLogger("results")

METRICS = ("Acc@1", "Acc@5", "MRR@5", "MRR")
COMPARED = ("Acc@1", "MRR")
BASELINES = ("user-history frequency", "history by hour and recency", "Markov chain", "popularity")     # where they are
NOISE = 0.05        # a p below it, or the 95 % interval, says that a difference is more than the drawing of test pairs
APART = ("target's check-ins in train", "target in the user's history")     # of metrics.groups
NONE = "–"
OTHERS = "others, by their folder"
MODEL = "model"
KEPT = Path("results")
KEEP_AGAIN = "write it again with `python results.py --keep`, or remove it"
# The rows of the short table, where they are kept; experiments of any scale.
SHORT = tuple(f"{name}_{dataset}" for dataset in ("nyc", "tky", "ca")
              for name in ("main", "without_gcim", "without_pam", "without_both", "mean", "mean_history"))
COMMAND = "python results.py --readme README.md --tables docs/tables.md"
BEGIN, END = f"<!-- results: made by {COMMAND} -->", "<!-- /results -->"
NO_RESULT = "No result is kept yet."
ABOUT = """\
Every figure is over the row's n test pairs; in brackets stands its 95 % percentile bootstrap interval over them. A
difference is row − reference over the same pairs, by paired bootstrap, with its 95 % interval and p (two-sided, not
corrected for the number of rows); "within noise" means that the interval holds 0 or p is at least .05, so that the
drawing of test pairs may explain it: what another seed of the training would change is in none of these."""


@dataclasses.dataclass(kw_only=True)
class Row:
    """One row of a table. A kept file holds these fields but `path`: figures over pairs, nothing about a single one.

    found, fits: {method: {"n", metric: {"value", "low", "high"}}} over the row's pairs, and over those of them whose
    prompt fits --seq_len. groups: {grouping: {group: the same}}, of METRICS. differences: {metric of COMPARED:
    comparison.differences' row and "verdict"}, against `reference`. training: {kind of step: {"steps": optimizer steps,
    "seconds": of all its starts}}, as logged last; seconds: {kind of step: of the start that finished it, or those}.
    """
    path: Path = dataclasses.field(compare=False)       # of metrics.json or of the kept file
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
    values |= {**told, "name": about["row"], "group": group, "model": _name_only(about["model"]),
               "published": about.get("published") or {}, "seconds": seconds, "training": training, "found": found,
               "differences": None, "fits": fits, "groups": _of_groups(groups)}
    return Row(path=path, **_checked(values, link, again))


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
    from ga_llm.tables import chain       # here, for they take seconds to import, which --tables need not wait for
    from ga_llm.training import run_log       # here, for they take seconds to import, which --tables need not wait for
    seconds, training, left = {}, {}, [test]
    try:
        for step in left:                   # grows by the steps that a step builds on
            done = _object(steps / step / chain.DONE, "its cost is not told")
            kind = done["step"]
            seconds[kind] = float(done["seconds"])
            left += [before for before in done["steps"] if before not in left]
            logged = run_log.read_log(steps / step / chain.OUT / artifacts.TRAINER_LOG)
            if logged:
                training[kind] = {"steps": logged[-1]["step"], "seconds": logged[-1]["elapsed_seconds"]}
                seconds[kind] = max(seconds[kind], training[kind]["seconds"])   # an interrupted one has more
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
            values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "path"}
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
    if (values["scale"], values["experiment"]) != (path.parent.name, path.stem):
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


KEPT_FIELDS = {             # of a kept file -> whether a value can be its
    **dict.fromkeys(("experiment", "scale", "table", "name"), _is_text),
    **dict.fromkeys(("dataset", "model", "reference", "source", "protocol", "decoding", "date", "command", "commit",
                     "hardware"), _or_none(_is_text)),
    "group": _or_none(lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))),
    "published": _map_of(_is_number), "seconds": _or_none(_map_of(_is_number)),
    "training": _or_none(_map_of(_has_numbers("steps", "seconds"))), "found": _is_found,
    "differences": _or_none(_are_differences), "fits": _or_none(_is_found), "groups": _map_of(_map_of(_is_found)),
}


def _compare(rows: Sequence[Row]) -> None:
    """Give each row that has a reference, run at the same scale with the same pairs, the differences to it."""
    by_name, compared = {(row.scale, row.experiment): row for row in rows if row.experiment}, {}
    for row in rows:
        reference = by_name.get((row.scale, row.reference))
        if reference is None or row.group or reference.group or row.path == reference.path:
            continue
        files = tuple(one.path.with_name(artifacts.PREDICTIONS) for one in (reference, row))
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


def between_marks(text: str, tables: str, name: str) -> str:
    """`text`, of the file `name`, with `tables` between BEGIN and END. Raises UserError unless each is there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UserError(f"{name}: lacks the lines `{BEGIN}` and `{END}`, each once and in this order; put them where "
                        "the tables are to stand")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def short(rows: Sequence[Row]) -> str:
    """One table: the rows named in SHORT, and below those over the same pairs the baselines on them."""
    chosen = sorted((row for row in rows if row.experiment in SHORT),
                    key=lambda row: (row.scale, SHORT.index(row.experiment)))
    if not chosen:
        return NO_RESULT
    lines = _heads("", "model", "data", "n", "Acc@1 [95 %]", "Acc@5", "MRR")
    same_pairs = {}
    for row in chosen:
        same_pairs.setdefault((row.scale, row.dataset, row.protocol, row.n), []).append(row)
    for members in same_pairs.values():
        data = members[0].dataset or NONE
        lines += [_line([row.name, row.model or NONE, data, *_figures(row.found[MODEL])]) for row in members]
        lines += [_line([f"*{name}*", NONE, data, *_figures(summary)]) for name, summary in _baselines(members)]
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """A section for each table and scale: ours, baselines on the same pairs, where each row came from, published."""
    if not rows:
        return NO_RESULT
    sections = [f"### {table}{scale and f' (scale {scale})'}\n\n{_section(members, rows)}"
                for (table, scale), members in _grouped(rows).items()]
    return "\n\n".join([ABOUT, *sections])


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found = {}
    for row in rows:
        found.setdefault((row.table, row.scale or ""), []).append(row)
    return found


def _section(rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    differ = any(row.differences for row in rows)
    compared = {(row.scale, row.reference) for row in rows if row.differences}
    elsewhere = [row for row in all_rows if (row.scale, row.experiment) in compared and row not in rows]
    lines = _heads("", "n", "Acc@1 [95 %]", "Acc@5", "MRR", *["Acc@1 − reference"] * differ, "")
    for number, row in enumerate(rows, start=1):
        lines.append(_line([row.name, *_figures(row.found[MODEL]), *[_difference(row)] * differ, f"({number})"]))
    for row in elsewhere:
        lines.append(_line([f"{row.name} (reference)", *_figures(row.found[MODEL]), *[NONE] * differ,
                            f"see {row.table}"]))
    for name, summary in _baselines(rows):
        lines.append(_line([name, *_figures(summary), *[NONE] * differ, "same pairs"]))
    lines += _apart(rows)
    lines += ["", *(f"{number}. {_note(row)}" for number, row in enumerate(rows, start=1))]
    return "\n".join(lines + _published(rows))


def _apart(rows: Sequence[Row]) -> list[str]:
    """How far the first guess is off, and MRR where the target is rare or new, of each row and the first one's history
    count; nothing where the rows are about single groups, or of other pairs."""
    first = rows[0]
    groups = [(grouping, group) for grouping in APART for group in first.groups.get(grouping, {})]
    if not groups or any(row.group or row.n != first.n for row in rows):
        return []
    heads = [f"{grouping}: {group} (n = {first.groups[grouping][group][MODEL]['n']:,})" for grouping, group in groups]
    lines = ["", "Mean distance from the first guess to the true place, and MRR apart:", "",
             *_heads("", "mean km [95 %]", "within 1 km", *heads)]
    methods = [(row.name, row, MODEL) for row in rows] + [(BASELINES[0], first, BASELINES[0])] * (
        BASELINES[0] in first.found)
    for name, row, method in methods:
        km = row.found[method].get("mean km")
        cells = [NONE if km is None else f"{km['value']:.2f} [{km['low']:.2f}, {km['high']:.2f}]",
                 _figure(row.found[method].get("share within 1 km", {}).get("value"))]
        for grouping, group in groups:
            found = row.groups.get(grouping, {}).get(group, {}).get(method, {})
            cells.append(_figure(found.get("MRR", {}).get("value")))
        lines.append(_line([name, *cells]))
    return lines


def _figures(summary: dict) -> list[str]:
    return [f"{summary['n']:,}", _interval(summary.get("Acc@1")), *(_figure(summary.get(metric, {}).get("value"))
                                                                   for metric in ("Acc@5", "MRR"))]


def _note(row: Row) -> str:
    """Where a row came from, in one line."""
    parts = [f"{row.name}: {row.model or 'model not told'}", f"protocol {row.protocol or NONE}, decoding "
             f"{row.decoding or NONE}", row.date or NONE, row.hardware or NONE]
    if row.group:
        parts.insert(1, ": ".join(row.group))
    if row.training:
        steps = ", ".join(f"{kind} {told['steps']:,}" for kind, told in row.training.items())
        parts.append(f"training {_minutes(row.training)} min (steps: {steps})")
    if row.seconds:
        parts.append(f"all steps of its chain {sum(row.seconds.values()) / 60:,.1f} min")
    if row.fits and row.fits[MODEL]["n"] != row.n:
        parts.append(f"{row.fits[MODEL]['n']:,} prompts fit --seq_len, Acc@1 {_interval(row.fits[MODEL]['Acc@1'])}")
    if row.differences:
        parts.append(f"reference: {row.reference}")
    if row.commit:
        parts.append(f"code {row.commit[:7]}{row.commit[40:]}")
    return "; ".join([*parts, f"`{row.command or NONE}`"])


def _minutes(training: dict) -> str:
    return f"{sum(told['seconds'] for told in training.values()) / 60:,.1f}"


def _published(rows: Sequence[Row]) -> list[str]:
    """The table of others' figures for these rows, each with ours behind it."""
    rows = [row for row in rows if row.published]
    shown = [metric for metric in METRICS if any(metric in row.published for row in rows)]
    if not shown:
        return []
    lines = ["", "**Published by others, not verified here** (in parentheses ours):", "", *_heads("", *shown, "source")]
    for row in rows:
        ours = (row.found[MODEL].get(metric, {}).get("value") for metric in shown)
        lines.append(_line([row.name, *(f"{_figure(row.published.get(metric))} ({_figure(value)})"
                                        for metric, value in zip(shown, ours)), row.source or NONE]))
    return lines


def _baselines(rows: Sequence[Row]) -> list[tuple[str, dict]]:
    """(name, summary) of each baseline; once where rows share their pairs, else with the row's name."""
    found = []
    for name in BASELINES:
        of_rows = [(row, row.found[name]) for row in rows if name in row.found]
        distinct = [pair for i, pair in enumerate(of_rows) if all(pair[1] != other for _, other in of_rows[:i])]
        found += [(name if len(distinct) == 1 else f"{name}: {row.name}", summary) for row, summary in distinct]
    return found


def _heads(*cells: str) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _figure(value: float | None) -> str:
    """.3988, as papers write it."""
    return NONE if value is None else f"{value:.4f}".removeprefix("0")


def _interval(summary: dict | None) -> str:
    return NONE if summary is None else (f"{_figure(summary['value'])} [{_figure(summary['low'])}, "
                                         f"{_figure(summary['high'])}]")


def _difference(row: Row) -> str:
    difference = (row.differences or {}).get("Acc@1")
    if difference is None:
        return NONE
    value, low, high = (f"{difference[key]:+.4f}".replace("0.", ".", 1) for key in ("difference", "low", "high"))
    p = "p < .001" if difference["p"] < 0.001 else f"p {difference['p']:.3f}".replace("0.", ".", 1)
    return f"{value} [{low}, {high}], {p}: {verdict(difference)}"


def table(rows: Sequence[Row]) -> str:
    """The same as CSV, a line for each row, with every metric's interval; empty where there is no figure."""
    told = ("protocol", "decoding", "date", "hardware", "command", "commit", "source")
    heads = ["scale", "table", "row", "experiment", "dataset", "model", "group", "n"]
    heads += [f"{metric} {what}" for metric in METRICS for what in ("published", "ours", "low", "high")]
    heads += [f"{name} {metric}" for name in BASELINES for metric in METRICS]
    heads += ["reference", *(f"{metric} {what}" for metric in COMPARED
                             for what in ("difference", "difference low", "difference high", "p", "verdict"))]
    heads += [*told, "training minutes", "metrics"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        cells = [row.scale, row.table, row.name, row.experiment, row.dataset, row.model,
                 row.group and ": ".join(row.group), row.n]
        for metric in METRICS:
            summary = row.found[MODEL].get(metric, {})
            cells += [row.published.get(metric), *(summary.get(key) for key in ("value", "low", "high"))]
        cells += [row.found.get(name, {}).get(metric, {}).get("value") for name in BASELINES for metric in METRICS]
        cells.append(row.reference if row.differences else None)
        for metric in COMPARED:
            one = (row.differences or {}).get(metric, {})
            cells += [one.get(key) for key in ("difference", "low", "high", "p", "verdict")]
        cells += [*(getattr(row, key) for key in told), row.training and _minutes(row.training), row.path]
        writer.writerow(cells)
    return text.getvalue()
