"""What the explorer of `report.py` takes: the size of its file, and how soon it answers, in headless Chromium.

    python benchmarks/explorer.py

A made-up city of 10,000 test pairs and 5,000 places, two runs side by side, without network. Real mouse clicks and
keys; what is counted is the browser's own event timing, from the input to the next picture on the screen. The limits
that docs/serving.md claims: 15 MB, 100 ms in the median. The exit code is 1 if one is missed. Needs the package
playwright and a Chromium on the PATH.
"""
import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import ga_llm  # noqa: E402, F401 (before transformers, which it prepares for)
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from ga_llm.base import prompts  # noqa: E402
from ga_llm.evaluation import baselines, metrics  # noqa: E402
from ga_llm.pairs import spelling  # noqa: E402
from ga_llm.report import contents, explorer  # noqa: E402
from geo_encoder.gps_tokens import GPSMapping  # noqa: E402

LIMIT_MB, LIMIT_MS = 15, 100
TOP, VISITS, STEPS = 20, 100, 10        # guesses of a pair, check-ins of a user in train, of a trajectory
SHORTEST_MS = 16                        # the browser tells no shorter ones
TIMING = f"""() => {{
  window.took = [];
  new PerformanceObserver(list => window.took.push(...list.getEntries().map(entry => entry.duration)))
    .observe({{ type: "event", durationThreshold: {SHORTEST_MS} }});
}}"""


def city(pairs: int, places: int, users: int, seed: int = 0) -> tuple:
    """(two evaluations of the same pairs, the mapping, the baseline), as `explorer.gather` takes them."""
    draw = np.random.default_rng(seed)
    mapping = GPSMapping(np.arange(places), 40.7 + 0.1 * draw.normal(size=places), -74 + 0.1 * draw.normal(size=places))
    user, target = draw.integers(0, users, pairs), draw.integers(0, places, pairs)
    times = pd.Timestamp("2012-11-01") + pd.to_timedelta(draw.integers(0, 120 * 86400, pairs), unit="s")
    times = [str(time) for time in times]
    lines = [prompts.join(prompts.question(u, [], [], [f"POI id {poi}." for poi in draw.integers(0, places, STEPS)],
                                           prompts.ask_poi(time, u, 0, places - 1)), prompts.answer_poi(time, u, poi))
             for u, time, poi in zip(user.tolist(), times, target.tolist())]
    train = pd.DataFrame({"UserId": np.repeat(np.arange(users), VISITS),
                          "TrajectoryId": np.arange(users * VISITS) // STEPS,
                          "PoiId": draw.zipf(1.3, users * VISITS) % places})
    asked = spelling.untokenized(lines)
    found = baselines.user_history(train, asked)
    baseline = contents.Baseline(train, asked, found.ranks, found.tops, np.full(pairs, np.nan), np.full(pairs, np.nan))
    return [run(name, user, times, target, mapping, draw) for name in ("runs/a", "runs/b")], mapping, baseline


def run(name: str, user, times, target, mapping: GPSMapping, draw: np.random.Generator) -> contents.Evaluation:
    """One evaluation: the target is among its first guesses or beyond them."""
    n, places = len(target), len(mapping.ids)
    top = (draw.integers(0, places, (n, 1)) + np.arange(TOP) * 97) % places
    ranks = draw.integers(1, 2 * TOP, n)
    among = ranks <= TOP
    top[among, ranks[among] - 1] = target[among]
    log_probabilities = -np.sort(-np.log(draw.dirichlet(np.full(TOP, 0.5), n) + 1e-6), axis=1)
    km = metrics.distances(top[:, 0], target, mapping)
    records = [{"pair": i, "user": u, "time": time, "target": t, "current": STEPS, "fits": True, "rank": rank,
                "top": [list(guess) for guess in zip(guesses, values)], "km": away}
               for i, (u, time, t, rank, guesses, values, away) in enumerate(zip(
                   user.tolist(), times, target.tolist(), ranks.tolist(), top.tolist(), log_probabilities.tolist(),
                   km.tolist()))]
    return contents.Evaluation(Path(name), {}, {"dataset_name": "city"}, records, ranks.astype(float), top[:, 0], km,
                               np.exp(log_probabilities[:, 0]))


def answers(path: Path, times: int) -> dict[str, list[float]]:
    """{what is done: ms of each}."""
    from playwright.sync_api import sync_playwright
    found = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True).new_page()
        page.goto(path.as_uri())
        page.evaluate(TIMING)
        page.click("#whole")
        spots = page.evaluate(f"""[...truths].slice(0, {times}).map(place => {{
            const at = maps[0].latLngToContainerPoint(point(place)), box = $("map0").getBoundingClientRect();
            return [box.x + at.x, box.y + at.y]; }})""")
        acts = {"a click on Next": lambda i: page.click("#next"),
                "a key in the list": lambda i: page.locator("#list").press("ArrowDown"),
                "a key on the slider": lambda i: page.locator("#time").press("ArrowLeft" if i % 2 else "ArrowRight"),
                "another outcome": lambda i: page.locator("#outcome").press("ArrowUp" if i % 4 > 1 else "ArrowDown"),
                "a click on a place": lambda i: (page.click("#whole"), page.evaluate("window.took = []"),
                                                 page.mouse.click(*spots[i]))}
        for name, act in acts.items():
            found[name] = []
            for i in range(times):
                page.evaluate("window.took = []")
                act(i)
                page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
                found[name].append(max(page.evaluate("window.took"), default=SHORTEST_MS))
        browser.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--places", type=int, default=5_000)
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--times", type=int, default=20, help="that each thing is done")
    args = parser.parse_args()
    runs, mapping, baseline = city(args.pairs, args.places, args.users)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "explorer.html"
        path.write_text(explorer.page(explorer.gather(runs, mapping, baseline, Path(folder))), encoding="utf-8")
        size = path.stat().st_size / 1e6
        print(f"{args.pairs:,} pairs, {args.places:,} places, two runs: {size:.1f} MB (limit: {LIMIT_MB})")
        found = answers(path, args.times)
    for name, took in found.items():
        print(f"{name:20} median {statistics.median(took):4.0f} ms (limit: {LIMIT_MS}), worst {max(took):4.0f} ms")
    sys.exit(size > LIMIT_MB or max(map(statistics.median, found.values())) > LIMIT_MS)


if __name__ == "__main__":
    main()
