"""Every metrics.json that is found, as rows of tables: ours beside the published figures, baselines, differences.

Published figures are their authors' and are not verified here; each row says where it came from.
"""
import csv
import dataclasses
import io
import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ga_llm import artifacts, comparison
from ga_llm.cli import UserError

log = logging.getLogger("results")

METRICS = ("Acc@1", "Acc@5", "MRR@5", "MRR")
COMPARED = ("Acc@1", "MRR")
BASELINES = ("user-history frequency", "Markov chain", "popularity")
NOISE = 0.05        # a p below it, or the 95 % interval, says that a difference is more than the drawing of test pairs
NONE = "–"
OTHERS = "others, by their folder"
MODEL = "model"


@dataclasses.dataclass
class Row:
    """One row of a table. `found`: {method: {"n", metric: {"value", "low", "high"}}} over the row's pairs."""
    table: str
    name: str
    path: Path                          # of metrics.json
    found: dict
    about: dict                         # protocol, decoding, date, machine, command; texts
    experiment: str | None = None
    scale: str | None = None
    model: str | None = None
    group: tuple | None = None
    reference: str | None = None
    published: dict = dataclasses.field(default_factory=dict)
    source: str | None = None
    differences: dict | None = None     # metric -> comparison.differences' row, against `reference`

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
            _keep(rows, lambda: _of_experiment(link, Path(work_dir)))
    taken = {row.path.resolve() for row in rows}
    folders = [folder for folder in (Path(work_dir), *map(Path, others)) if folder.is_dir()]
    for path in sorted({path.resolve(): path for folder in folders for path in folder.rglob(artifacts.METRICS)}.values()):
        if path.resolve() not in taken:
            _keep(rows, lambda: _of_folder(path))
    if not rows:
        raise UserError(f"{work_dir}: no {artifacts.METRICS} of ours; run `python run_experiment.py "
                        "experiments/<name>.yml` first, or give --work_dir")
    _compare(rows)
    return rows


def _keep(rows: list[Row], read) -> None:
    try:
        rows.append(read())
    except UserError as error:
        log.warning("passed over: %s", error)


def _of_experiment(link: Path, work_dir: Path) -> Row:
    about = _object(link)
    for key in ("experiment", "scale", "table", "row", "model", "metrics"):
        if not isinstance(about.get(key), str):
            raise UserError(f"{link}: {key} is {str(about.get(key))[:60]!r}; run its experiment again")
    path = work_dir / about["metrics"]
    report = read(path)
    found, group = report["all"], about.get("group")
    if group is not None:
        grouping, name = group
        found = report.get("groups", {}).get(grouping, {}).get(name)
        if not _is_found(found):
            raise UserError(f"{path}: no group {name!r} of {grouping!r}, which {link} asks for; test again")
    return Row(about["table"], about["row"], path, found, _about(report, about.get("command")), about["experiment"],
               about["scale"], about["model"], group and tuple(group), about.get("reference"),
               about.get("published") or {}, about.get("source"))


def _of_folder(path: Path) -> Row:
    report = read(path)
    return Row(OTHERS, str(path.parent), path, report["all"], _about(report))


def read(path: Path) -> dict:
    """A metrics.json. Raises UserError if it is damaged, or none of ours."""
    report = _object(path)
    if not _is_found(report.get("all")):
        raise UserError(f"{path}: not a metrics.json of test_next_gps.py (no figures under all/model); test again, or "
                        "move it away")
    return report


def _object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run its experiment again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())[:100]}); make it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; make it again")
    return found


def _is_found(found) -> bool:
    """Whether it is {method: summary} with the model, and all that is shown of it numbers."""
    return (isinstance(found, dict) and all(isinstance(summary, dict) and type(summary.get("n")) is int
                                            for summary in found.values())
            and "Acc@1" in found.get(MODEL, {}) and all(
                isinstance(summary[metric], dict) and all(
                    type(summary[metric].get(key)) in (int, float) and math.isfinite(summary[metric][key])
                    for key in ("value", "low", "high"))
                for summary in found.values() for metric in METRICS if metric in summary))


def _about(report: dict, command: str | None = None) -> dict[str, str]:
    """What a figure must be given with. command: what ran the whole chain; else the test's own."""
    found = {key: report.get(key) for key in ("protocol", "decoding", "date", "machine", "command")}
    if isinstance(found["machine"], dict):
        machine = found["machine"]
        gpus = machine.get("gpus") or []
        found["machine"] = ", ".join(map(str, [machine.get("cpu", NONE), f"{machine.get('cores', NONE)} cores",
                                               *(gpus if isinstance(gpus, list) else [gpus])]))
    found["command"] = command or found["command"]
    return {key: NONE if value is None else " ".join(str(value).split()) for key, value in found.items()}


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
                compared[files] = comparison.differences(*files)
            except UserError as error:
                log.warning("%s is not compared with %s: %s", row.experiment, row.reference, error)
                compared[files] = None
        row.differences = compared[files]


def verdict(difference: dict) -> str:
    return "within noise" if difference["low"] <= 0 <= difference["high"] or difference["p"] >= NOISE else (
        "better" if difference["difference"] > 0 else "worse")


def markdown(rows: Sequence[Row]) -> str:
    """A section for each table and scale, with the baselines on the same pairs, and where each row came from."""
    lines = ["# Results", "",
             "Ours are given with their 95 % bootstrap interval over the test pairs. **Published figures are their "
             "authors' and were not verified here.** A difference is row − reference over the same pairs, by paired "
             "bootstrap, with its 95 % interval and p (two-sided, not corrected for the number of rows); \"within "
             "noise\" speaks of the drawing of test pairs, not of another seed of the training.", ""]
    for (table, scale), members in _grouped(rows).items():
        lines += [f"## {table}" + (f" (scale {scale})" if scale else ""), "", *_section(members), ""]
    return "\n".join(lines)


def _grouped(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    found = {}
    for row in rows:
        found.setdefault((row.table, row.scale), []).append(row)
    return found


def _section(rows: Sequence[Row]) -> list[str]:
    shown = [metric for metric in METRICS if any(metric in row.published for row in rows)]
    differ = any(row.differences for row in rows)
    heads = ["", "n", *(head for metric in METRICS for head in ([f"{metric}, published"] * (metric in shown) + [metric])),
             *(f"{metric}: difference" for metric in COMPARED if differ), "from"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for number, row in enumerate(rows, start=1):
        cells = [row.name, f"{row.n:,}"]
        for metric in METRICS:
            if metric in shown:
                cells.append(_figure(row.published.get(metric)))
            cells.append(_interval(row.found[MODEL].get(metric)))
        if differ:
            cells += [_difference(row, metric) for metric in COMPARED]
        lines.append(_line([*cells, f"({number})"]))
    for name, n, summary in _baselines(rows):
        cells = [name, f"{n:,}", *(cell for metric in METRICS for cell in
                                   ([NONE] * (metric in shown) + [_interval(summary.get(metric))]))]
        lines.append(_line([*cells, *[NONE] * (len(COMPARED) * differ), "same pairs"]))
    lines.append("")
    for number, row in enumerate(rows, start=1):
        about = row.about
        lines.append(f"{number}. {row.name}: {row.model or 'model not told'}; protocol {about['protocol']}, decoding "
                     f"{about['decoding']}; {about['date']}; {about['machine']}; `{about['command']}`"
                     + (f"; published: {row.source}" if row.source else "")
                     + (f"; reference: {row.reference}" if row.differences else ""))
    return lines


def _baselines(rows: Sequence[Row]) -> list[tuple[str, int, dict]]:
    """(name, n, summary) of each baseline; once where rows share their pairs, else with the row's name."""
    found = []
    for name in BASELINES:
        of_rows = [(row, row.found[name]) for row in rows if name in row.found]
        distinct = [pair for i, pair in enumerate(of_rows) if all(pair[1] != other for _, other in of_rows[:i])]
        found += [(name if len(distinct) == 1 else f"{name}: {row.name}", summary["n"], summary)
                  for row, summary in distinct]
    return found


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _figure(value: float | None) -> str:
    """.3988, as papers write it."""
    return NONE if value is None else f"{value:.4f}".removeprefix("0")


def _interval(summary: dict | None) -> str:
    return NONE if summary is None else (f"{_figure(summary['value'])} [{_figure(summary['low'])}, "
                                         f"{_figure(summary['high'])}]")


def _difference(row: Row, metric: str) -> str:
    difference = (row.differences or {}).get(metric)
    if difference is None:
        return NONE
    return (f"{difference['difference']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}], p "
            f"{difference['p']:.3f}: {verdict(difference)}")


def table(rows: Sequence[Row]) -> str:
    """The same as CSV, a line for each row; empty where there is no figure."""
    heads = ["scale", "table", "row", "experiment", "model", "group", "n"]
    heads += [f"{metric} {what}" for metric in METRICS for what in ("published", "ours", "low", "high")]
    heads += [f"{name} {metric}" for name in BASELINES for metric in METRICS]
    heads += ["reference", *(f"{metric} {what}" for metric in COMPARED
                             for what in ("difference", "difference low", "difference high", "p", "verdict"))]
    heads += ["protocol", "decoding", "date", "machine", "command", "published source", "metrics"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        cells = [row.scale, row.table, row.name, row.experiment, row.model, row.group and ": ".join(row.group), row.n]
        for metric in METRICS:
            summary = row.found[MODEL].get(metric, {})
            cells += [row.published.get(metric), *(summary.get(key) for key in ("value", "low", "high"))]
        cells += [row.found.get(name, {}).get(metric, {}).get("value") for name in BASELINES for metric in METRICS]
        cells.append(row.reference if row.differences else None)
        for metric in COMPARED:
            one = (row.differences or {}).get(metric)
            cells += [None] * 5 if one is None else [one["difference"], one["low"], one["high"], one["p"], verdict(one)]
        cells += [*(row.about[key] for key in ("protocol", "decoding", "date", "machine", "command")), row.source,
                  row.path]
        writer.writerow(cells)
    return text.getvalue()
