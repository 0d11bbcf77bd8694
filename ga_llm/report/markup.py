"""The HTML of a report: one file that loads nothing from anywhere, of headings, pictures, tables and safe text."""
import base64
import html
import math
import re
from collections.abc import Callable, Sequence

from ga_llm.base import artifacts
from ga_llm.evaluation import metrics
from ga_llm.report.contents import Absent

NONE, RIGHT = "–", "right"


class Page:
    """What is gathered on the way: `pictures`, {file name: PNG}, and `body`, the sections as HTML."""

    def __init__(self, title: str):
        self.title, self.pictures, self.body = title, {}, []

    def section(self, heading: str, make: Callable[[], Sequence[str]]) -> None:
        """A section of what `make` gives; of one line, where it raises Absent."""
        try:
            parts = list(make())
        except Absent as absent:
            parts = [f'<p class="absent">Not shown: {safe(absent)}.</p>']
        self.body.append("\n".join(["<section>", f"<h2>{safe(heading)}</h2>", *parts, "</section>"]))

    def picture(self, name: str, png: bytes, alt: str, caption: str, heading: str | None = None) -> str:
        """A figure. name: of the PNG beside the page; alt: what is on it; caption: what to read from it."""
        self.pictures[artifacts.REPORT_PICTURES.replace("*", name)] = png
        above = f"<h3>{safe(heading)}</h3>" if heading else ""
        inlined = base64.b64encode(png).decode()
        return (f'<figure>{above}<img src="data:image/png;base64,{inlined}" alt="{safe(alt)}">'
                f"<figcaption>{safe(caption)}</figcaption></figure>")

    def html(self) -> str:
        return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{POLICY}\n'
                f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f"<title>{safe(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
                f"<h1>{safe(self.title)}</h1>\n" + "\n".join(self.body) + "\n</main>\n</body>\n</html>\n")


# Nothing may be loaded, whatever a name in the data tries to smuggle in.
POLICY = ('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
          'style-src \'unsafe-inline\'; base-uri \'none\'; form-action \'none\'">')
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: white; color: #1c2126; font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0.6rem; padding-top: 0.8rem; border-top: 1px solid #d5d9dd; }
h3 { font-size: 1.02rem; margin: 0 0 0.4rem; }
p, ul { max-width: 46rem; margin: 0.6rem 0; }
p, li, dd, figcaption { overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem 2rem; }
.panels.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.panels > * { min-width: 0; }
figure { margin: 0.8rem 0; max-width: 33rem; }
img { display: block; width: 100%; height: auto; }
figcaption { font-size: 0.88rem; color: #444c54; margin-top: 0.3rem; }
.wide { overflow-x: auto; margin: 0.8rem 0; max-width: 100%; }
.wide:focus { outline: 2px solid #12386b; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #444c54; padding-bottom: 0.3rem; }
th, td { text-align: left; padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid #e3e6e9; vertical-align: top; }
th { font-weight: 600; }
th.short { white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
td.text { min-width: 5.5rem; max-width: 20rem; overflow-wrap: break-word; }
tr.strong td, tr.strong th { font-weight: 600; background: #f0f3f6; }
article { border: 1px solid #d5d9dd; border-radius: 6px; padding: 0.9rem 1rem; min-width: 0; }
details { margin: 0.8rem 0; } summary { cursor: pointer; }
.absent { color: #444c54; border-left: 3px solid #8b949c; padding-left: 0.7rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: 0.2rem 1rem; }
dt { font-weight: 600; font-size: 0.9rem; overflow-wrap: anywhere; }
dd { margin: 0; font-family: ui-monospace, monospace; font-size: 0.82rem; }
@media (max-width: 600px) { main { padding: 0.5rem 0.9rem 3rem; } dl { grid-template-columns: minmax(0, 1fr); }
  dd { margin-bottom: 0.4rem; } th, td { padding-right: 0.5rem; } td.text { min-width: 4.5rem; }
  article { padding: 0.7rem; } }
@media print { section { break-inside: avoid; } }
"""


def safe(text) -> str:
    """Text that HTML takes for nothing else, `visible`."""
    return html.escape(visible(text))


def visible(text) -> str:
    """What cannot be seen or turns the writing round is shown as �."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in str(text))


def table(heads: Sequence[str], rows: Sequence[Sequence], caption: str, strong: Sequence[int] = ()) -> str:
    """A table that scrolls in a box of its own. The first cell of a row heads it; strong: rows that stand out.

    Numbers stand to the right.
    """
    head = "".join(f'<th scope="col">{safe(text)}</th>' for text in heads)
    lines = [f'<div class="wide" role="region" tabindex="0" aria-label="{safe(caption)}"><table>',
             f"<caption>{safe(caption)}</caption>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for i, (first, *cells) in enumerate(rows):
        shown = "".join(f'<td class="{"number" if is_number(cell) else "text"}">{safe(cell)}</td>' for cell in cells)
        lines.append(f'<tr{" class=strong" * (i in strong)}><th scope="row"{" class=short" * (len(str(first)) < 25)}>'
                     f"{safe(first)}</th>{shown}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def is_number(cell) -> bool:
    return (not isinstance(cell, str) or cell in (NONE, RIGHT)
            or re.fullmatch(r"(< )?[\d.,]+( (%|km|\[[\d., -]+\]))?", cell) is not None)


def panels(*pictures: str, three: bool = False) -> str:
    """Figures side by side as far as there is room, else below each other."""
    return f'<div class="panels{" three" * three}">' + "\n".join(pictures) + "</div>"


def paragraph(text: str) -> str:
    return f"<p>{safe(text)}</p>"


def definitions(rows: dict) -> str:
    """A list of names and what they are, where that is told."""
    shown = "".join(f"<dt>{safe(name)}</dt><dd>{safe(f'{value:.4g}' if isinstance(value, float) else value)}</dd>"
                    for name, value in rows.items() if value is not None)
    return f"<dl>{shown}</dl>"


def cell(summary: dict, metric: str, what: str = "value") -> tuple[float, float, float] | None:
    """(value, or `what` it is called, low, high); None if the summary has no such metric."""
    found = summary.get(metric) if isinstance(summary, dict) else None
    values = [found.get(key) for key in (what, "low", "high")] if isinstance(found, dict) else []
    is_whole = values and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    return tuple(values) if is_whole else None


def number(value: float, metric: str = "") -> str:
    return NONE if not math.isfinite(value) else f"{value:.2f}" if metric in metrics.KM else f"{value:.4f}"


def count(summary: dict) -> str:
    """How many pairs it is over."""
    return f"{summary['n']:,}" if type(summary.get("n")) is int else NONE


def interval(summary: dict, metric: str) -> str:
    found = cell(summary, metric)
    if found is None:
        return NONE
    value, low, high = (number(one, metric) for one in found)
    return f"{value} [{low}, {high}]"


def km(value: float) -> str:
    return NONE if not math.isfinite(value) else f"{value:.2f} km" if value < 100 else f"{value:,.0f} km"


def percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    if 0 < value < 1e-4:
        return "< 0.01 %"
    return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f} %"
