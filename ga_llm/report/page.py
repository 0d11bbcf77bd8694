"""The page of a report: its sections, of tables and pictures."""
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ga_llm.base import artifacts
from ga_llm.evaluation import metrics, pointer_alone
from ga_llm.report import contents, figures
from ga_llm.report.contents import HISTORY, NEAR_KM, Absent, Baseline, Evaluation
from ga_llm.report.encoder_views import EncoderViews
from ga_llm.report.markup import (NONE, RIGHT, Page, cell, count, definitions, interval, km, number, panels, paragraph,
                                  percent, safe, table)
from geo_encoder.gps_tokens import GPSMapping

MODEL = "model"
ACC = ("Acc@1", "Acc@5", "Acc@10")      # by group
COLUMNS = tuple(column for block in metrics.BLOCKS for column in block)
MOST_LINES = 2_000      # of an error map


def build(evaluation: Evaluation, mapping: Callable[[], GPSMapping], baseline: Callable[[], Baseline],
          encoder: Callable[[], EncoderViews], losses: Callable[[], dict], folder: Path) -> Page:
    """The whole page. The functions give what `report` reads, or raise Absent; folder: the data set's preprocessed."""
    dataset, pairs = evaluation.settings["dataset_name"], len(evaluation.records)
    page = Page(f"Next-POI recommendation: {dataset}, {pairs:,} test pairs")
    page.section("In short", lambda: in_short(evaluation, baseline, encoder))
    page.section("Metrics and baselines", lambda: metrics_section(page, evaluation))
    page.section("Accuracy by group", lambda: groups_section(page, evaluation))
    page.section("Calibration of the probabilities", lambda: calibration_section(page, evaluation, baseline()))
    page.section("Where the guesses are wrong", lambda: errors_section(page, evaluation, mapping(), baseline()))
    page.section("Examples", lambda: examples_section(page, evaluation, mapping(), baseline(), folder))
    page.section("What the geo-encoder knows of distance", lambda: encoder_section(page, encoder()))
    page.section("Losses of the training", lambda: losses_section(page, losses()))
    page.section("Where this comes from", lambda: origin_section(evaluation))
    return page


def in_short(evaluation: Evaluation, baseline: Callable[[], Baseline], encoder: Callable[[], EncoderViews]
             ) -> list[str]:
    found = evaluation.metrics
    model, history = found["all"][MODEL], found["all"][HISTORY]
    lines = [f"Acc@1 {interval(model, 'Acc@1')}; the count of the user's own history reaches "
             f"{interval(history, 'Acc@1')} on the same pairs (value, 95 % interval)."]
    try:
        theirs = baseline()
        lines.append(verdict(evaluation, theirs))
        known = [values[~np.isnan(values)] for values in (evaluation.km, theirs.km)]
        if all(map(len, known)):
            ours, other = (km(float(np.median(values))) for values in known)
            lines.append(f"Half of the first guesses lie within {ours} of the true place; of the baseline's, within "
                         f"{other}.")
        stated = contents.reliability(evaluation.probability, evaluation.ranks == 1)
        lines.append(f"Expected calibration error of the first guess's probability: {stated.ece:.3f}.")
    except Absent as absent:
        lines.append(f"Not told here: {absent}.")
    lines += beside_pointer(found)
    try:
        views = encoder()
        lines.append(f"Distance between the geo-encoder's vectors and km: Pearson's correlation "
                     f"{number(views.after.pearson)}, {number(views.before.pearson)} in an encoder that has learned "
                     "nothing.")
    except Absent:
        pass
    if mixture(evaluation):
        lines.append(f"\"{MODEL}\" stands for a mixture here: {mixture(evaluation)}.")
    if evaluation.settings.get("test_type") != "llm":
        lines.append(f"Tested as {evaluation.settings.get('test_type')}, not as the trained whole (llm).")
    return ["<ul>" + "".join(f"<li>{safe(line)}</li>" for line in lines) + "</ul>"]


def mixture(evaluation: Evaluation) -> str:
    """What the model's probabilities were mixed with, as the test was told; empty if they are its own."""
    others = evaluation.settings.get("average_with", "")
    return "" if others in ("", "None", "[]") else f"the mean of its probabilities and of {others}"


def verdict(evaluation: Evaluation, baseline: Baseline) -> str:
    """One sentence: does the model beat the baseline?"""
    one = metrics.difference(np.stack([baseline.ranks == 1, evaluation.ranks == 1]).astype(float), 1)
    return _verdict("that count", one["difference"], one["low"], one["high"])


def beside_pointer(found: dict) -> list[str]:
    """The same of the pointer alone, a line if it stands in `found`, a metrics.json."""
    alone = found["all"].get(pointer_alone.NAME)
    if not cell(alone, "Acc@1"):
        return []
    against = found.get("against")
    of_it = cell(against.get(pointer_alone.NAME), "Acc@1", "difference") if isinstance(against, dict) else None
    return [f"The pointer alone, without an LLM, reaches {interval(alone, 'Acc@1')}."
            + (f" {_verdict('the pointer alone', *of_it)}" if of_it else "")]


def _verdict(whom: str, difference: float, low: float, high: float) -> str:
    what = (f"The model is better than {whom}" if low > 0 else
            f"The model is worse than {whom}, so as a recommender it is no result" if high < 0 else
            "That is no difference beyond the drawing of test pairs")
    return f"{what}: Acc@1 differs by {difference:+.4f} [{low:+.4f}, {high:+.4f}] (paired bootstrap, 95 %)."


def metrics_section(page: Page, evaluation: Evaluation) -> list[str]:
    found = evaluation.metrics
    methods = {name: summary for name, summary in found["all"].items() if isinstance(summary, dict)}
    shown = [metric for metric in ("Acc@1", "Acc@5", "Acc@10", "Acc@20", "MRR", metrics.WITHIN)
             if cell(methods[MODEL], metric)]
    # A name that is none of ours is shown in the table alone.
    drawn = {name: summary for name, summary in methods.items() if name in figures.STYLES}
    cells = {name: [cell(summary, metric) for metric in shown] for name, summary in drawn.items()}
    rows = [[name, count(summary), *(interval(summary, column) for column in COLUMNS)]
            for name, summary in methods.items()]
    pictures = [page.picture(
        "metrics", figures.intervals(shown, cells, "value, 95 % interval"),
        "Dots with intervals: " + described(shown, cells),
        "Dots are values over all pairs, bars 95 % bootstrap intervals. Filled circle: the model; the others need no "
        "LLM. More is better: a result counts if the circle lies to the right of the hollow square.")]
    shown = [metric for metric in metrics.KM if cell(methods[MODEL], metric)]
    if shown:
        cells = {name: [cell(summary, metric) for metric in shown] for name, summary in drawn.items()}
        pictures.append(page.picture(
            "km", figures.intervals(shown, cells, "km, 95 % interval"), "Dots with intervals: " +
            described(shown, cells), "How far the first guess lies from the true place: less is better, and the circle "
            "should lie to the left of the hollow square."))
    parts = [panels(*pictures),
             table(["", "n", *COLUMNS], rows, "All pairs: value [95 % interval]; km: less is better", strong=[0])]
    for kind, what in (("fits", "Those pairs alone whose prompt fits --seq_len"), (
            "fits_released", "Those pairs alone whose prompt would fit --seq_len in the released code's wording")):
        fits = found.get(kind)
        if isinstance(fits, dict) and cell(fits.get(MODEL), "Acc@1") and fits[MODEL].get("n") != methods[MODEL]["n"]:
            rows = [[name, count(summary), *(interval(summary, column) for column in COLUMNS)]
                    for name, summary in fits.items() if isinstance(summary, dict)]
            parts.append(table(["", "n", *COLUMNS], rows, what, strong=[0]))
    return parts


def described(rows: Sequence[str], cells: dict[str, Sequence]) -> str:
    """Of a picture of intervals, in words: the model beside the user-history baseline."""
    return "; ".join(f"{row}: " + ", ".join(f"{method} {number(cells[method][i][0])}" for method in (MODEL, HISTORY)
                                            if method in cells and cells[method][i] is not None)
                     for i, row in enumerate(rows)) + "."


def groups_section(page: Page, evaluation: Evaluation) -> list[str]:
    found = evaluation.metrics.get("groups")
    found = found if isinstance(found, dict) else {}
    rows = [(f"{grouping}: {group}", methods) for grouping, by_group in found.items()
            if isinstance(by_group, dict) for group, methods in by_group.items()
            if isinstance(methods, dict) and cell(methods.get(MODEL), "Acc@1") and cell(methods.get(HISTORY), "Acc@1")]
    if not rows:
        raise Absent(f"{artifacts.METRICS} has no groups")
    labels, of_row, headings = [], [], []
    for name, methods in rows:
        grouping, _, group = name.partition(": ")
        if not headings or labels[headings[-1]] != grouping:
            headings.append(len(labels))
            labels.append(grouping)
            of_row.append({})
        labels.append(group)
        of_row.append(methods)
    pictures = []
    for metric in ACC:
        cells = {method: [cell(methods.get(method), metric) for methods in of_row] for method in (MODEL, HISTORY)}
        if any(cells[MODEL]):
            pictures.append(page.picture(
                f"groups_{metric.replace('@', '_').lower()}", figures.intervals(labels, cells, metric, headings),
                f"{metric} by group: " + described([name for name, _ in rows], {
                    method: [one for row, one in enumerate(of_method) if row not in headings]
                    for method, of_method in cells.items()}),
                f"{metric} of the model (filled circle) and of the user's history (hollow square), 95 % intervals.",
                metric))
    heads = ["", "n", *(f"{metric}: {who}" for metric in (*ACC, "MRR") for who in ("model", "history"))]
    cells = [[name, count(methods[MODEL]), *(interval(methods[method], metric) for metric in (*ACC, "MRR")
                                               for method in (MODEL, HISTORY))] for name, methods in rows]
    return [paragraph("Users by their number of train trajectories, trajectories by their check-ins (the upper and "
                      "lower 30 % each); whether the user has been at the target before, and whether the prompt shows "
                      "it. The history knows no place that is new to the user: at unseen targets it is always wrong, "
                      "and there a model can only gain."),
            panels(*pictures, three=True), "<details><summary>The numbers</summary>",
            table(heads, cells, "By group: value [95 % interval]"), "</details>"]


def calibration_section(page: Page, evaluation: Evaluation, baseline: Baseline) -> list[str]:
    right = evaluation.ranks == 1
    found = {MODEL: contents.reliability(evaluation.probability, right)}
    mean = float(np.nanmean(evaluation.probability))
    try:
        found[HISTORY] = contents.reliability(baseline.share, baseline.ranks == 1)
    except Absent:      # no user has a history: it then makes no guess at all
        pass
    with np.errstate(invalid="ignore", divide="ignore"):
        bars = {name: contents.wilson(one.right, one.n) for name, one in found.items()}
    known = ~np.isnan(evaluation.probability)
    share = right[known].mean()
    low, high = contents.wilson(share, known.sum())
    claims = ("it claims too much" if mean > high else "it claims too little" if mean < low else
              "that is no difference beyond the drawing of test pairs")
    eces = "; ".join(f"{name} {one.ece:.3f}" for name, one in found.items())
    rows = [[f"{100 * i // contents.BINS} to {100 * (i + 1) // contents.BINS} %",
             *(text for one in found.values() for text in (f"{one.n[i]:,}", percent(one.probability[i]),
                                                           percent(one.right[i])))] for i in range(contents.BINS)]
    heads = ["", *(f"{who}: {what}" for who in ("model", "history")[:len(found)]
                   for what in ("pairs", "stated", RIGHT))]
    return [paragraph(f"Of first guesses that are given 30 %, 30 % should be right. On average the model gives its "
                      f"first guess {percent(mean)}, and {percent(float(share))} [{percent(low)}, {percent(high)}] are "
                      f"right: {claims}. Expected calibration error (mean |stated - right| over ten bins, weighted by "
                      f"their pairs): {eces}."),
            panels(page.picture(
                "calibration", figures.reliability(found, bars),
                f"Reliability diagram. Expected calibration error: {eces}.",
                "Above: points on the grey diagonal say what happens, points below it claim too much; bars are 95 % "
                "intervals (Wilson). Below: how many pairs each point stands for. The model's probabilities are "
                + ("the mixture's, which are of the places alone" if mixture(evaluation) else
                   "its own, not normalised over the places") +
                "; the baseline's is the share of its guess among the user's check-ins."),
                   table(heads, rows, "Stated and right on average, by probability"))]


def errors_section(page: Page, evaluation: Evaluation, mapping: GPSMapping, baseline: Baseline) -> list[str]:
    targets = np.array([record["target"] for record in evaluation.records])
    true = coordinates(targets, mapping)
    distances = {MODEL: evaluation.km, HISTORY: baseline.km}
    right = {MODEL: evaluation.ranks == 1, HISTORY: baseline.ranks == 1}
    known = {name: values[~np.isnan(values)] for name, values in distances.items()}
    if not all(map(len, known.values())):
        raise Absent("no guess has a distance to the true place")
    shown = np.arange(len(targets))
    if len(shown) > MOST_LINES:
        shown = np.sort(np.random.default_rng(contents.SEED).choice(shown, MOST_LINES, replace=False))
    most = float(np.percentile(np.concatenate(list(known.values())), 99))
    pictures = []
    for name, tops, file in ((MODEL, evaluation.tops, "errors_model"), (HISTORY, baseline.tops, "errors_history")):
        guessed, values = coordinates(tops, mapping), distances[name]
        drawn = shown[~np.isnan(values[shown]) & ~np.isnan(true[shown]).any(1) & ~np.isnan(guessed[shown]).any(1)]
        pictures.append(page.picture(
            file, figures.error_map(mapping, true[drawn], guessed[drawn], values[drawn], right[name][drawn], most),
            f"Map of {len(drawn):,} pairs: lines from the first guess of the {name} to the true place.",
            f"{len(drawn):,} of {len(targets):,} pairs; grey: the data set's places. A line leads from the first guess "
            "to the true place, which has the dot; light is near, dark is far. White circles: the guess is right.",
            name))
    rows = [[RIGHT, *(percent(float(values.mean())) for values in right.values())]]
    rows += [[f"within {limit:g} km", *(percent(float((values <= limit).mean())) for values in distances.values())]
             for limit in (0.5, 1, 2, 5, 10)]
    rows += [[f"{part} % within (with a guess)", *(km(float(np.percentile(values, part))) for values in known.values())]
             for part in (50, 90)]
    shares = page.picture(
        "errors_km", figures.distance_shares(distances),
        "Pairs by distance: " + "; ".join(f"{row[0]}: model {row[1]}, history {row[2]}" for row in rows) + ".",
        "How many first guesses lie within so many km of the true place: the higher line is better. It begins with the "
        "guesses at the very spot (the right ones, and other POIs of the same coordinates); at the thin line stands "
        "the share within 1 km. Pairs without a guess count as never.",
        "distance")
    return [panels(*pictures), panels(shares, table(["", MODEL, HISTORY], rows, "Distance of the first guess"))]


def coordinates(pois: np.ndarray, mapping: GPSMapping) -> np.ndarray:
    """(n, 2) longitude and latitude, nan where the mapping has no such place. pois: (n,) ids."""
    of_poi = dict(zip(mapping.ids.tolist(), zip(mapping.longitude.tolist(), mapping.latitude.tolist())))
    return np.array([of_poi.get(int(poi), (np.nan, np.nan)) for poi in pois], dtype=np.float64).reshape(-1, 2)


def examples_section(page: Page, evaluation: Evaluation, mapping: GPSMapping, baseline: Baseline, folder: Path
                     ) -> list[str]:
    found = contents.examples(evaluation, baseline, mapping, folder)
    right, near, far = np.bincount(contents.outcomes(evaluation), minlength=len(contents.OUTCOMES)).tolist()
    return [paragraph(f"First guesses: {right:,} right, {near:,} near misses (wrong, within {NEAR_KM:g} km), "
                      f"{far:,} far misses. Of each kind {contents.EACH} are shown, "
                      "at one and two thirds of its pairs in the test file's order; nobody has picked them."),
            f'<p>Every pair, on a map: <a href="{artifacts.EXPLORER}">{artifacts.EXPLORER}</a> beside this page.</p>',
            panels(*(example(page, i, one, mapping) for i, one in enumerate(found, start=1)))]


def example(page: Page, i: int, one: dict, mapping: GPSMapping) -> str:
    def place(found: dict) -> str:
        return f"{found['category']}, POI {found['poi']}"

    def points(places: Sequence[dict]) -> np.ndarray:
        return np.array([(p["longitude"], p["latitude"]) for p in places], dtype=np.float64).reshape(-1, 2)

    history = one["history"]
    rank = "not ranked" if one["rank"] is None else f"rank {one['rank']:,}"
    def row(name: str, guess: dict | None) -> list:
        if guess is None:
            return [name, NONE, NONE, NONE, NONE]
        return [name, guess["category"], guess["poi"], percent(guess.get("probability")),
                RIGHT if guess["poi"] == one["target"]["poi"] else km(guess["km"])]

    top = [*(row(str(n), guess) for n, guess in enumerate(one["top"], start=1)), row("history", history)]
    check_ins = [[check_in["time"] or NONE, check_in["category"], check_in["poi"]] for check_in in one["check_ins"]]
    guess = "no guess" if not one["top"] else f"first guess {km(one['top'][0]['km'])} away"
    caption = "The current trajectory" + (f", without its {one['hidden']} earliest check-ins" if one["hidden"] else "")
    figure = page.picture(
        f"example_{i}", figures.example(
            mapping, points(one["check_ins"]), points([one["target"]])[0], points(one["top"]),
            None if history is None else points([history])[0]),
        f"Map of the trajectory's {len(one['check_ins'])} check-ins, the true place ({rank}) and the first "
        f"{len(one['top'])} guesses; {guess}.",
        "Numbers: the model's guesses, best first; star: the truth; square: the first guess of the user's history.")
    shown = (table(["time", "category", "POI"], check_ins, caption) if check_ins else
             paragraph("The trajectory has no check-in before the target."))
    return (f"<article><h3>{safe(one['kind'].capitalize())}: pair {one['pair']}, user {safe(one['user'])}</h3>"
            + paragraph(f"The truth at {one['time'] or NONE}: {place(one['target'])} ({rank}).") + figure + shown
            + table(["", "guess", "POI", "probability", "away"], top, "The model's top 5, the history's first guess")
            + "</article>")


def encoder_section(page: Page, views: EncoderViews) -> list[str]:
    config, maps, distances = views.config, [], []
    for name, one in (("before", views.before), ("after", views.after)):
        when = f"{name} training"
        maps.append(page.picture(
            f"places_{name}", figures.colour_map(views.mapping, one.colours),
            f"Map of {len(one.colours):,} places {when}, coloured by the principal components of their vectors.",
            f"Red, green and blue are the first three principal components, {percent(one.explained)} of the variance. "
            "Where like colours lie side by side, neighbours have like vectors. Colours of the two maps cannot be "
            "compared with each other, and say nothing in greyscale: see the pictures below.", f"Places, {when}"))
        correlations = f"Pearson {number(one.pearson)}, Spearman {number(one.spearman)}"
        distances.append(page.picture(
            f"distances_{name}", figures.distances(one.km, one.distance),
            f"Distance of vectors over km, {when}: {correlations}.",
            f"{correlations} over {len(one.km):,} pairs of places. A line that rises "
            "says that places far apart have different vectors; a flat one, that vectors do not tell distance. Darker: "
            "more pairs. Distances are divided by their median, so that the two pictures can be compared.",
            f"Distance of vectors and km, {when}"))
    of = "" if len(views.mapping.ids) == views.places else f" of {views.places:,}, drawn with a fixed seed"
    return [paragraph(f"The encoder {views.path} ({config.kind}, n-grams of {config.ngram}, level {config.level}, "
                      f"width {config.hidden_size}, weights {views.digest}) on {len(views.mapping.ids):,} places{of}. "
                      f"\"Before\" is an encoder of the same configuration, newly initialised with seed "
                      f"{contents.SEED}: not the very one that the training began with. Distances are Euclidean."),
            panels(*maps, *distances)]


def losses_section(page: Page, found: dict[str, list[dict]]) -> list[str]:
    pictures = []
    for i, (name, lines) in enumerate(found.items(), start=1):
        trained = [line for line in lines if "loss" in line]
        values = [line["loss"] for line in trained]
        part = max(1, len(values) // 10)
        first, last = np.mean(values[:part]), np.mean(values[-part:])
        took = datetime.timedelta(seconds=round(trained[-1]["elapsed_seconds"]))
        said = (f"{trained[-1]['step']:,} steps in {took}; the mean loss of the first tenth of the log is "
                f"{first:.3g}, of the last {last:.3g}")
        pictures.append(page.picture(f"loss_{i}", figures.losses(lines), f"Training loss: {said}.",
                                    f"{said}. It is the training's own loss: what was learned, the test above says.",
                                    name[0].upper() + name[1:]))
    return [panels(*pictures)]


def origin_section(evaluation: Evaluation) -> list[str]:
    found = evaluation.metrics
    machine = found.get("machine") if isinstance(found.get("machine"), dict) else {}
    git = found.get("git") if isinstance(found.get("git"), dict) else {}
    start = contents.start_of(contents.training_folder(evaluation.folder), evaluation.folder)
    base = start.get("base_model") if isinstance(start.get("base_model"), dict) else {}
    rows = {"results": evaluation.folder, "tested": found.get("date"), "command": found.get("command"),
            "commit": f"{git.get('commit', NONE)}{' (with changes)' if git.get('dirty') else ''}",
            "processor": ", ".join(map(str, [machine.get("cpu", NONE), f"{machine.get('cores', NONE)} cores",
                                             *(machine.get("gpus") if isinstance(machine.get("gpus"), list) else [])])),
            "protocol": found.get("protocol"), "decoding": found.get("decoding"),
            "prompts per second": found.get("prompts_per_second"), "by processes": machine.get("world_size"),
            "target in the prompt": found.get("target_in_prompt"),
            "stage 2 started": start.get("time"), "its seed": start.get("seed"), "its base model": base.get("path"),
            "its command": start.get("command")}
    return [definitions(rows), "<details><summary>The test's settings, defaults included</summary>",
            definitions(dict(sorted(evaluation.settings.items()))), "</details>"]
