"""The pictures of a report: each returns a PNG's bytes, small enough to be read on a phone, and the same every time.

What they say survives greyscale: methods differ in marker and line, scales of distance run from light to dark. No text
from data is drawn, for a category's name may be anything.
"""
import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ga_llm.base import artifacts, globe
from ga_llm.evaluation import baselines, metrics, pointer_alone
from ga_llm.training import run_log

MODEL, HISTORY = "model", artifacts.USER_HISTORY
STYLES = {      # colour (dark to light in greyscale), marker, filled, line
    MODEL: ("#12386b", "o", True, "-"), HISTORY: ("#c2570c", "s", False, "--"),
    pointer_alone.NAME: ("#2b6e6a", "v", False, (0, (5, 1))),
    baselines.MARKOV_CHAIN: ("#5f6b76", "^", False, ":"), baselines.POPULARITY: ("#8b949c", "D", False, "-."),
}
OTHER = ("#5f6b76", "x", True, ":")
SIGNS = {"s": "□", "v": "▽", "^": "△", "D": "◇", "x": "×"}      # what a page writes for a marker
WIDTH, DPI = 4.3, 170       # inches: about what a phone shows, so that 10 points stay readable
FAR = colormaps["viridis_r"]    # light is near, dark is far
SHORTEST_KM = 0.1           # the scale of distance begins there
PLACES, INK = "0.82", "0.15"
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")   # 0.1 where matplotlib has a power of ten


def _figure(height: float, **options):
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(**options)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def sign(baseline: str) -> str:
    """One character, like the baseline's marker in the pictures."""
    return SIGNS[STYLES.get(baseline, OTHER)[1]]


def intervals(rows: Sequence[str], methods: dict[str, Sequence[tuple[float, float, float] | None]], what: str,
              headings: Sequence[int] = ()) -> bytes:
    """Dots with intervals. rows: labels, from the top; methods: {method: (value, low, high) of each row, or None}.

    headings: the rows that hold no dots, but a heading of those below.
    """
    figure, axes = _figure(0.9 + (0.14 + 0.12 * len(methods)) * len(rows))
    for i, (method, cells) in enumerate(methods.items()):
        colour, marker, filled, _ = STYLES.get(method, OTHER)
        shift = (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        at = [(row + shift, cell) for row, cell in enumerate(cells) if cell is not None]
        if not at:
            continue
        y, cells = zip(*at)
        value, low, high = np.array(cells).T
        axes.errorbar(value, y, xerr=np.clip([value - low, high - value], 0, None), fmt=marker, color=colour,
                      markerfacecolor=colour if filled else "white", markersize=6, capsize=3, linewidth=1.4,
                      label=method)
    ticks = [row for row in range(len(rows)) if row not in headings]
    axes.set_yticks(ticks, [rows[row][:40] for row in ticks], parse_math=False)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for row in range(len(rows)):
        axes.axhline(row - 0.5, color="0.5" if row in headings else "0.9", linewidth=0.8)
    for row in headings:
        axes.text(0.99, row, rows[row][:60], transform=axes.get_yaxis_transform(), ha="right", va="center",
                  style="italic", fontsize=9, parse_math=False)
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])      # a dot at 0 is a whole one
    axes.set_xlabel(what)
    axes.grid(axis="x", color="0.9")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return _png(figure)


def losses(lines: list[dict]) -> bytes:
    """lines: of a trainer_log.jsonl, at least two with a loss."""
    figure, axes = _figure(3.4)
    run_log.plot_loss(axes, lines)
    return _png(figure)


def reliability(methods: dict, intervals_of: dict) -> bytes:
    """methods: {method: report.Reliability}; intervals_of: {method: (low, high)}, (bins,) each, of the shares."""
    figure, (axes, below) = _figure(4.6, nrows=2, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="says what happens")
    width = 1 / len(next(iter(methods.values())).n) / (len(methods) + 0.5)
    for i, (method, found) in enumerate(methods.items()):
        colour, marker, filled, line = STYLES.get(method, OTHER)
        some, (low, high) = found.n > 0, intervals_of[method]
        axes.errorbar(found.probability[some], found.right[some], fmt=marker, linestyle=line, color=colour,
                      yerr=np.clip([(found.right - low)[some], (high - found.right)[some]], 0, None), capsize=3,
                      markerfacecolor=colour if filled else "white", markersize=6, linewidth=1.2, label=method)
        middle = (np.arange(len(found.n)) + 0.5) / len(found.n) + (i - (len(methods) - 1) / 2) * width
        below.bar(middle, found.n, width, color=colour if filled else "white", edgecolor=colour)
    axes.set_ylabel("share that was right")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(color="0.9")
    axes.legend(fontsize=9)
    below.set_xlabel("probability given to the first guess")
    below.set_ylabel("pairs")
    return _png(figure)


def distance_shares(methods: dict[str, np.ndarray]) -> bytes:
    """The share of pairs whose first guess lies within so many km. methods: {method: (pairs,) km, nan: no guess}."""
    figure, axes = _figure(3.6)
    for method, km in methods.items():
        colour, _, _, line = STYLES.get(method, OTHER)
        known = np.sort(km[~np.isnan(km)])
        least = SHORTEST_KM / 10
        share = np.arange(1, len(known) + 1) / len(km)
        axes.step([least, *np.maximum(known, least)], [0, *share], where="post", color=colour, linestyle=line,
                  linewidth=2, label=method)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PLAIN)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set_xlim(left=SHORTEST_KM / 10)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("km from the true place (left edge: the place itself)")
    axes.set_ylabel("share of the pairs")
    axes.grid(color="0.9")
    axes.legend(fontsize=9)
    return _png(figure)


def error_map(places, true: np.ndarray, guessed: np.ndarray, km: np.ndarray, right: np.ndarray, most_km: float
              ) -> bytes:
    """A line from each guess to the true place. places: a GPSMapping; true, guessed: (pairs, 2) longitude, latitude.

    km, right: (pairs,), between the two, and whether they are the same POI; most_km: where the scale ends.
    """
    ground = _lonlat(places)
    flat = globe.flat(ground)
    figure, axes = _figure(_height(flat(ground)) + 0.7)
    _ground(axes, flat(ground))
    true, guessed = flat(true), flat(guessed)
    order = np.argsort(-km, kind="stable")      # the near ones on top
    wrong = order[~right[order]]
    km = np.maximum(km, SHORTEST_KM)            # a wrong POI may stand at the very spot
    lines = LineCollection(np.stack([guessed, true], axis=1)[wrong], array=km[wrong], cmap=FAR,
                           norm=LogNorm(SHORTEST_KM, max(most_km, 2 * SHORTEST_KM)), linewidths=1.1, alpha=0.75)
    axes.add_collection(lines)
    axes.scatter(*true[wrong].T, c=km[wrong], cmap=lines.cmap, norm=lines.norm, s=11, linewidths=0, zorder=3)
    axes.scatter(*true[right].T, s=np.clip(6000 / len(km), 5, 16), facecolors="white", edgecolors="black",
                 linewidths=0.7, zorder=4)
    figure.colorbar(lines, ax=axes, orientation="horizontal", label="km from the guess to the true place (dot)",
                    pad=0.02, shrink=0.9, aspect=30, format=PLAIN)
    return _png(figure)


def example(places, check_ins: np.ndarray, target: np.ndarray, top: np.ndarray, history: np.ndarray | None) -> bytes:
    """One trajectory. check_ins (n, 2), target (2,), top (k, 2), history (2,): longitude, latitude; nan: no place."""
    figure, axes = _figure(3.9)
    flat = globe.flat(np.concatenate([check_ins, [target], top, *([[history]] if history is not None else [])]))
    check_ins, top, (target,) = flat(check_ins), flat(top), flat(target[None])
    if history is not None:
        history, = flat(history[None])
    axes.plot(*check_ins.T, color=INK, linewidth=1, marker=".", markersize=7, label="check-ins")
    if len(check_ins):
        axes.plot(*check_ins[-1], color=INK, marker="o", markersize=8, linestyle="", label="the last one")
    if history is not None:
        axes.plot(*history, color=STYLES[HISTORY][0], marker="s", markersize=20, markerfacecolor="none", linestyle="",
                  markeredgewidth=2, label="user-history's guess")
    axes.plot(*target, marker="*", markersize=31, markerfacecolor="white", markeredgecolor="black", markeredgewidth=1.5,
              linestyle="", label="the truth")
    # The best guess on top, the same place's guesses and marks behind it.
    for number, place in reversed(list(enumerate(top, start=1))):
        if not np.isnan(place).any():
            axes.text(*place, str(number), ha="center", va="center", fontsize=9, color="white", fontweight="bold",
                      bbox={"boxstyle": "circle,pad=0.25", "facecolor": STYLES[MODEL][0], "edgecolor": "white"})
    shown = np.concatenate([check_ins, [target], top, *([[history]] if history is not None else [])])
    shown = shown[~np.isnan(shown).any(axis=1)]
    if len(shown):
        # At least a kilometre or so, and as wide as high.
        middle = (shown.min(axis=0) + shown.max(axis=0)) / 2
        half = max(0.006, 0.64 * np.ptp(shown, axis=0).max())
        _ground(axes, flat(_lonlat(places)), *((at - half, at + half) for at in middle))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2, fontsize=9, frameon=False,
                markerscale=0.5)
    return _png(figure)


def colour_map(places, colours: np.ndarray) -> bytes:
    """Each place in its colour. colours: (places, 3), 0 to 1."""
    ground = globe.flat(_lonlat(places))(_lonlat(places))
    figure, axes = _figure(_height(ground))
    # Darkened, so that no place is white on white.
    axes.scatter(*ground.T, c=0.05 + 0.83 * colours, s=max(3, min(30, 15_000 / len(colours))), linewidths=0)
    _frame(axes, ground)
    return _png(figure)


def distances(km: np.ndarray, distance: np.ndarray) -> bytes:
    """Distance between vectors, divided by its median, over km, (pairs,) each; with medians of twenty equal parts."""
    figure, axes = _figure(3.8)
    apart = km > 0
    km, distance = km[apart], distance[apart] / (np.median(distance) or 1)
    axes.hexbin(km, distance, xscale="log", gridsize=35, cmap="Greys", bins="log", mincnt=1, linewidths=0.1)
    axes.xaxis.set_major_formatter(PLAIN)
    parts = np.array_split(np.argsort(km, kind="stable"), min(20, max(1, len(km) // 5)))
    at, low, middle, high = np.array([(np.median(km[part]), *np.percentile(distance[part], [10, 50, 90]))
                                      for part in parts]).T
    axes.plot(at, middle, color=STYLES[HISTORY][0], marker="o", markersize=5, markeredgecolor="white", linewidth=2,
              label="median")
    for bound, label in ((low, "10 % and 90 %"), (high, None)):
        axes.plot(at, bound, color=STYLES[HISTORY][0], linestyle="--", linewidth=1.3, label=label)
    axes.set_ylim(0, max(2, 1.05 * distance.max(initial=0)))
    axes.set_xlabel("km between two places")
    axes.set_ylabel("distance of their vectors, median = 1")
    axes.legend(fontsize=9, loc="lower right")
    return _png(figure)


def _lonlat(places) -> np.ndarray:
    return np.column_stack([places.longitude, places.latitude])


# What follows takes all places as `globe.flat` gives them: (places, 2), in degrees of latitude.

def _height(ground: np.ndarray) -> float:
    """Of a figure that a map of all places fills, in inches."""
    (west, east), (south, north) = _margin(ground[:, 0]), _margin(ground[:, 1])
    return float(np.clip(WIDTH * (north - south) / (east - west), 0.4 * WIDTH, 1.5 * WIDTH))


def _ground(axes, ground: np.ndarray, across: tuple | None = None, up: tuple | None = None) -> None:
    """The places in grey beneath what is drawn, which shows the city without tiles."""
    axes.scatter(*ground.T, s=4, color=PLACES, linewidths=0, zorder=0)
    _frame(axes, ground, across, up)


def _frame(axes, ground: np.ndarray, across: tuple | None = None, up: tuple | None = None) -> None:
    """A map of the part, or of all places, with a bar of a round number of km."""
    across, up = across or _margin(ground[:, 0]), up or _margin(ground[:, 1])
    axes.set_xlim(across)
    axes.set_ylim(up)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("0.8")
    km_per_degree = np.radians(1) * metrics.EARTH_RADIUS_KM
    longest = 0.3 * (across[1] - across[0]) * km_per_degree
    power = 10.0 ** np.floor(np.log10(longest))
    km = next(step * power for step in (5, 2, 1) if step * power <= longest)
    x, y = across[1] - 0.04 * (across[1] - across[0]), up[0] + 0.04 * (up[1] - up[0])
    axes.plot([x - km / km_per_degree, x], [y, y], color="black", linewidth=2.5, solid_capstyle="butt", zorder=5)
    axes.text(x - km / km_per_degree / 2, y + 0.012 * (up[1] - up[0]), f"{km:g} km", ha="center", va="bottom",
              fontsize=9, zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1})


def _margin(degrees: np.ndarray) -> tuple[float, float]:
    low, high = float(degrees.min()), float(degrees.max())
    margin = max(0.03 * (high - low), 1e-3)
    return low - margin, high + margin
