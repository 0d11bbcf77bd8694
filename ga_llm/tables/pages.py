"""The rows of `results` as text: tables of Markdown, between the marks of a page, and CSV."""
import csv
import io
from collections.abc import Iterable, Sequence

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import baselines, pointer_alone
from ga_llm.tables.results import COMPARED, METRICS, MODEL, NONE, Row, verdict

BASELINES = (artifacts.USER_HISTORY, pointer_alone.NAME, baselines.MARKOV_CHAIN, baselines.POPULARITY)
APART = ("target's check-ins in train", "target in the user's history")     # of metrics.groups
# The rows of the short table, where they are kept; experiments of any scale.
SHORT = tuple(f"{name}_{dataset}" for dataset in ("nyc", "tky", "ca")
              for name in ("main", "without_gcim", "without_pam", "without_both", "pointer", "pointer_mean"))
COMPARING = ("cpu_pointer_short", "cpu_pretrained_short")      # scales whose rows stand in docs/tables.md alone
SEEDS = ("Acc@1", "Acc@5", "MRR")       # of each seed
COMMAND = "python results.py --readme README.md --tables docs/tables.md"
BEGIN, END = f"<!-- results: made by {COMMAND} -->", "<!-- /results -->"
NO_RESULT = "No result is kept yet."
ABOUT = """\
Every figure is over the row's n test pairs; in brackets stands its 95 % percentile bootstrap interval over them. A
difference is row − reference over the same pairs, by paired bootstrap, with its 95 % interval and p (two-sided, not
corrected for the number of rows); "within noise" means that the interval holds 0 or p is at least .05, so that the
drawing of test pairs may explain it. A mean of seeds is over that many trainings, and its interval and differences are
drawn over seeds, too; of a single training, what another seed would change is in none of these."""


def between_marks(text: str, tables: str, name: str) -> str:
    """`text`, of the file `name`, with `tables` between BEGIN and END. Raises UserError unless each is there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UserError(f"{name}: lacks the lines `{BEGIN}` and `{END}`, each once and in this order; put them where "
                        "the tables are to stand")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def short(rows: Sequence[Row]) -> str:
    """One table: the rows named in SHORT, and below those over the same pairs the baselines on them."""
    chosen = sorted((row for row in rows if row.experiment in SHORT and row.scale not in COMPARING),
                    key=lambda row: (row.scale, SHORT.index(row.experiment)))
    if not chosen:
        return NO_RESULT
    lines = _heads("", "model", "data", "n", "Acc@1 [95 %]", "Acc@5", "MRR")
    same_pairs = {}
    for row in chosen:
        same_pairs.setdefault(_pairs(row), []).append(row)
    for members in same_pairs.values():
        data = members[0].dataset or NONE
        lines += [_line([_name(row), row.model or NONE, data, *_figures(row.found[MODEL])]) for row in members]
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
        lines.append(_line([_name(row), *_figures(row.found[MODEL]), *[_difference(row)] * differ, f"({number})"]))
    for row in elsewhere:
        lines.append(_line([f"{_name(row)} (reference)", *_figures(row.found[MODEL]), *[NONE] * differ,
                            f"see {row.table}"]))
    for name, summary in _baselines(rows):
        lines.append(_line([name, *_figures(summary), *[NONE] * differ, "same pairs"]))
    lines += _apart(rows)
    lines += ["", *(f"{number}. {_note(row)}" for number, row in enumerate(rows, start=1))]
    return "\n".join(lines + _published(rows))


def _apart(rows: Sequence[Row]) -> list[str]:
    """How far the first guess is off, and MRR where the target is rare or new, of each row and the first one's two best
    baselines; nothing where the rows are about single groups, or of other pairs."""
    first = rows[0]
    groups = [(grouping, group) for grouping in APART for group in first.groups.get(grouping, {})]
    if not groups or any(row.group or row.n != first.n for row in rows):
        return []
    heads = [f"{grouping}: {group} (n = {first.groups[grouping][group][MODEL]['n']:,})" for grouping, group in groups]
    lines = ["", "Mean distance from the first guess to the true place, and MRR apart:", "",
             *_heads("", "mean km [95 %]", "within 1 km", *heads)]
    methods = [(_name(row), row, MODEL) for row in rows]
    methods += [(name, first, name) for name in BASELINES[:2] if name in first.found]
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


def _name(row: Row) -> str:
    return row.name + (f", mean of {len(row.seeds)} seeds" if row.seeds and len(row.seeds) > 1 else "")


def _note(row: Row) -> str:
    """Where a row came from, in one line."""
    parts = [f"{row.name}: {row.model or 'model not told'}", f"protocol {row.protocol or NONE}, decoding "
             f"{row.decoding or NONE}", row.date or NONE, row.hardware or NONE]
    if row.group:
        parts.insert(1, ": ".join(row.group))
    if row.training:
        steps = ", ".join(f"{kind} {told['steps']:,}" for kind, told in row.training.items())
        parts.append(f"training {_minutes(row.training)} min (steps: {steps})" + " a seed" * bool(row.seeds))
    if row.seconds:
        parts.append(f"all steps of its chain {sum(row.seconds.values()) / 60:,.1f} min")
    if row.fits and row.fits[MODEL]["n"] != row.n:
        parts.append(f"{row.fits[MODEL]['n']:,} prompts fit --seq_len, Acc@1 {_interval(row.fits[MODEL]['Acc@1'])}")
    if row.seeds:
        parts.append("; ".join(f"seed {seed} " + " / ".join(_figure(found.get(metric)) for metric in SEEDS)
                               for seed, found in row.seeds.items()))
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
    """(name, summary) of each baseline; once where rows share their pairs, else with the row's name. One that is told
    of some rows alone, as the pointer of those that were tested once it was trained, stands beside the others, too."""
    found, alike = [], len({_pairs(row) for row in rows}) == 1
    for name in BASELINES:
        of_rows = [(row, row.found[name]) for row in rows if name in row.found]
        distinct = [pair for i, pair in enumerate(of_rows) if all(pair[1] != other for _, other in of_rows[:i])]
        found += [(name if alike and len(distinct) == 1 else f"{name}: {row.name}", summary)
                  for row, summary in distinct]
    return found


def _pairs(row: Row) -> tuple:
    """What rows over the same pairs have in common."""
    return row.dataset, row.protocol, row.n


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
