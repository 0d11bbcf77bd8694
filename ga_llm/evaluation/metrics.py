"""How good a ranking is: Acc@k, MRR, NDCG and distance, each with its 95 % bootstrap interval, and the report of them.

Every question has one right answer, so a method's ranks and best POIs (`Ranking`) are all that the metrics need.
"""
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

ACC_AT = (1, 5, 10, 20)
EARTH_RADIUS_KM = 6371.0088     # the mean radius (IUGG)
KM = ("mean km", "median km")
WITHIN = "share within 1 km"
# What a sampled answer has: there is no second best, so a metric of ranks beyond the first would not say what it says.
OF_ONE_ANSWER = ("Acc@1", *KM, WITHIN)

NO_POI = -1                     # in a Ranking's tops: no candidate
BLOCKS = (("Acc@1", "Acc@5", "Acc@10", "Acc@20"), ("MRR", "MRR@5", "MRR@10", "NDCG@10"), (*KM, WITHIN))
COMPARED = ("Acc@1", "MRR")
SHORT = ("Acc@1", "Acc@5", "Acc@10", "MRR")
WIDTH = 80                      # of what is printed
GROUP_SHARE = 0.3               # how much of the users, or pairs, is at either end (STHGCN, LLM4POI)
ROUNDING = 1e-12                # a difference this small is none: means of the same values, in another order
BLOCK_DRAWS = 2 ** 21           # pairs that are resampled at a time: bounds the memory


@dataclasses.dataclass
class Ranking:
    """What a method says about each pair. ranks: (pairs,) float, the target's, 1 is best, inf where it has none.

    tops: (pairs,) int, the POI id ranked first, NO_POI where there is no candidate.
    """
    ranks: np.ndarray
    tops: np.ndarray


def distances(tops: Sequence[int], targets: Sequence[int], mapping) -> np.ndarray:
    """(pairs,) km along the great circle from the POI ranked first to the true one; nan where either has no place.

    tops, targets: (pairs,) POI ids; mapping: a GPSMapping. By the haversine formula.
    """
    places = np.radians([mapping.latitude, mapping.longitude])
    rows = [pd.Index(mapping.ids).get_indexer(np.asarray(ids, dtype=np.int64)) for ids in (tops, targets)]
    (lat1, lon1), (lat2, lon2) = (np.where(row >= 0, places[:, row], np.nan) for row in rows)
    half_chord = np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(half_chord, 1)))


def per_pair(ranks: Sequence[float], km: Sequence[float]) -> dict[str, np.ndarray]:
    """What each pair adds to each metric that is a mean over all pairs.

    ranks: (pairs,) as in `Ranking`; km: (pairs,) as of `distances`, where nan counts as a miss.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    reciprocal = 1 / ranks
    values = {f"Acc@{k}": (ranks <= k).astype(np.float64) for k in ACC_AT}
    values["MRR"] = reciprocal
    values |= {f"MRR@{k}": np.where(ranks <= k, reciprocal, 0.0) for k in (5, 10)}
    values["NDCG@10"] = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)    # one relevant item: the ideal gain is 1
    values[WITHIN] = (np.asarray(km, dtype=np.float64) <= 1).astype(np.float64)
    return values


def resampled(values: np.ndarray, draws: int, seed: int = 0, statistic: Callable = np.mean) -> np.ndarray:
    """(metrics, draws): the statistic over as many pairs drawn with replacement, the same ones for every metric.

    values: (metrics, pairs). The same number of pairs and seed give the same draws, so methods are compared pair by
    pair.
    """
    random, n = np.random.default_rng(seed), values.shape[1]
    at_once = max(1, BLOCK_DRAWS // n)
    blocks = (random.integers(0, n, size=(min(at_once, draws - first), n)) for first in range(0, draws, at_once))
    return np.concatenate([np.stack([statistic(row[drawn], axis=-1) for row in values]) for drawn in blocks], axis=1)


def difference(values: np.ndarray, of_a: int, draws: int = 10_000, seed: int = 0) -> dict:
    """{"n", "a", "b", "difference", "low", "high", "p"}: how much better B's runs are than A's, on the same pairs.

    values: (runs, pairs), of one metric, the first `of_a` runs being A's. Each draw takes the same pairs of all runs,
    and draws the runs of each method: one fewer than there are, with replacement, because as many would show (k-1)/k of
    the variance between k runs, two thirds for three (Rao and Wu 1988). low, high: the 95 % percentile interval. p:
    twice the smaller share of draws at or beyond 0, counting the observed one too, at most 1.
    """
    random = np.random.default_rng([seed, 1])       # another stream than the pairs'
    weights = np.concatenate([-_run_weights(of_a, draws, random), _run_weights(len(values) - of_a, draws, random)])
    row = (weights * resampled(values, draws, seed)).sum(axis=0)
    low, high = np.percentile(row, [2.5, 97.5])
    beyond = min((row <= ROUNDING).sum(), (row >= -ROUNDING).sum())
    a, b = float(values[:of_a].mean()), float(values[of_a:].mean())
    return {"n": values.shape[1], "a": a, "b": b, "difference": b - a, "low": float(low), "high": float(high),
            "p": float(min(1, 2 * (beyond + 1) / (draws + 1)))}


def mean(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> dict[str, float]:
    """{"value", "low", "high"} of a method's runs, values: (runs, pairs), drawn as in `difference`."""
    weights = _run_weights(len(values), draws, np.random.default_rng([seed, 1]))
    low, high = np.percentile((weights * resampled(values, draws, seed)).sum(axis=0), [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def _run_weights(count: int, draws: int, random: np.random.Generator) -> np.ndarray:
    """(runs, draws): each run's share in the mean of those drawn."""
    size = max(1, count - 1)
    return random.multinomial(size, [1 / count] * count, draws).T / size


def summary(ranks: Sequence[float], km: Sequence[float], draws: int = 1000, seed: int = 0) -> dict:
    """{"n", and per metric {"value", "low", "high"}}: over the pairs, with the 95 % percentile bootstrap interval.

    ranks, km: as in `per_pair`. "mean km" and "median km" leave out pairs without a distance (nan); a metric that no
    pair is left for is absent.
    """
    km = np.asarray(km, dtype=np.float64)
    known = km[~np.isnan(km)]
    result = {"n": len(ranks)}
    for values, statistic in ((per_pair(ranks, km), np.mean), ({KM[0]: known}, np.mean), ({KM[1]: known}, np.median)):
        rows = np.stack(list(values.values()))
        if rows.shape[1]:
            bounds = np.percentile(resampled(rows, draws, seed, statistic), [2.5, 97.5], axis=1).T
            for name, value, (low, high) in zip(values, statistic(rows, axis=1), bounds):
                result[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return result


def histories(test_prompts, train: pd.DataFrame) -> Iterator[list[int]]:
    """For each pair where the user has been: all of the user's train check-ins, then the current trajectory.

    Where the prompt names no user as ours does, it is the prompt's check-ins.
    """
    of_user = {user: pois.tolist() for user, pois in train.groupby("UserId")["PoiId"]}
    for prompt in test_prompts:
        yield prompt.shown if prompt.user is None else of_user.get(prompt.user, []) + prompt.current


def groups(test_prompts, train: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """{grouping: {group: (pairs,) bool}}: the kinds of pairs that results are given for.

    - user activity: by the user's number of train trajectories. "very active" is at or above the 70 % quantile over
      train's users, "inactive" at or below the 30 % quantile (whoever is both is inactive), "normal" between. STHGCN
      and LLM4POI cut at the same shares; by quantile, users with equal numbers stay together. Pairs whose prompt names
      no user of train are in no group.
    - trajectory length: the check-ins of the pair's trajectory, the target included; "long", "middle" and "short" by
      the same rule, the quantiles being over the pairs.
    - target in the user's history: whether `histories` has it ("seen", "unseen").
    - target in prompt: whether a check-in of the prompt shows it.
    - target's check-ins in train: how often anyone has been there, "at most 2", "3 to 9", "10 or more".
    """
    trajectories = train.groupby("UserId")["TrajectoryId"].nunique()
    of_user = trajectories.to_dict()
    activity = [of_user.get(prompt.user, np.nan) for prompt in test_prompts]
    visits = train["PoiId"].value_counts().reindex([prompt.target for prompt in test_prompts], fill_value=0).to_numpy()
    lengths = [len(prompt.current) + 1 for prompt in test_prompts]
    seen = [prompt.target in history for prompt, history in zip(test_prompts, histories(test_prompts, train))]
    return {
        "user activity": _by_quantile(activity, trajectories, "very active", "normal", "inactive"),
        "trajectory length": _by_quantile(lengths, lengths, "long", "middle", "short"),
        "target in the user's history": _yes_no(seen, "seen", "unseen"),
        "target in prompt": _yes_no(_in_prompt(test_prompts), "in prompt", "not in prompt"),
        "target's check-ins in train": {"at most 2": visits <= 2, "3 to 9": (visits > 2) & (visits < 10),
                                        "10 or more": visits >= 10},
    }


def _by_quantile(values, reference, high: str, middle: str, low: str) -> dict[str, np.ndarray]:
    values = np.asarray(values, dtype=np.float64)
    least, most = pd.Series(reference, dtype=np.float64).quantile([GROUP_SHARE, 1 - GROUP_SHARE])
    is_low = values <= least
    return {high: (values >= most) & ~is_low, middle: (values > least) & (values < most), low: is_low}


def _yes_no(holds, yes: str, no: str) -> dict[str, np.ndarray]:
    holds = np.asarray(holds, dtype=bool)
    return {yes: holds, no: ~holds}


def _in_prompt(test_prompts) -> list[bool]:
    return [prompt.target in prompt.shown for prompt in test_prompts]


def report(test_prompts, model: Ranking, baselines: dict[str, Ranking], train: pd.DataFrame, mapping,
           prompts_per_second: float | None, protocol: str, decoding: str, fits_released: np.ndarray | None = None
           ) -> dict:
    """All of metrics.json (the script adds "settings", its flags, "split", whose questions they are, and "published_n",
    of how many pairs others have published results by this protocol, null if that is not known):

    - protocol: which pairs are asked (`protocols.PROTOCOLS`); n: how many there are
    - decoding: how the model answered. "rank": among all POIs; "beam": its 20 best, all others count as unranked;
      "sample": one answer, so that "model" has n, Acc@1 and the distances alone
    - target_time_given: the number of pairs whose question names the target's time
    - all, fits: {method: summary} over all pairs, and over those whose prompt fits --seq_len. Methods: "model" and the
      baselines. A summary is {"n": pairs, metric: {"value", "low", "high"}}, low and high being the 95 % percentile
      bootstrap interval; the metrics are Acc@k, MRR, MRR@k, NDCG@10, and, from the POI ranked first to the true one,
      "mean km", "median km" and "share within 1 km"
    - against: {baseline: {"Acc@1", "MRR": `difference` of the model's}}, over all pairs; MRR unless it is sampled
    - fits_released: the same over the pairs that the released code would count, whose prompt fits in its longer wording
      (`released.fitting`); null if that is not known
    - groups: {grouping: {group: {method: summary}}} (`groups`)
    - target_in_prompt: the share of pairs whose target is among the prompt's check-ins; null if there are no pairs
    - prompts_per_second: of this run, of all its processes together ("machine" tells their number, "world_size"); null
      if an earlier one had predicted all

    train: as `baselines.read_train` gives it; mapping: a GPSMapping.
    """
    methods = {"model": model, **baselines}
    targets = [prompt.target for prompt in test_prompts]
    km = {name: distances(ranking.tops, targets, mapping) for name, ranking in methods.items()}

    def over(pairs: np.ndarray) -> dict[str, dict]:
        found = {name: summary(ranking.ranks[pairs], km[name][pairs]) for name, ranking in methods.items()}
        if decoding == "sample":
            found["model"] = {key: value for key, value in found["model"].items() if key in ("n", *OF_ONE_ANSWER)}
        return found

    in_prompt = _in_prompt(test_prompts)
    return {
        "protocol": protocol,
        "n": len(test_prompts),
        "decoding": decoding,
        "target_time_given": sum(prompt.time is not None for prompt in test_prompts),
        "all": over(np.ones(len(test_prompts), dtype=bool)),
        "against": {} if not test_prompts else {
            name: _against(model.ranks, ranking.ranks, decoding == "sample") for name, ranking in baselines.items()},
        "fits": over(np.array([prompt.fits for prompt in test_prompts], dtype=bool)),
        "fits_released": None if fits_released is None else over(fits_released),
        "groups": {grouping: {group: over(pairs) for group, pairs in found.items()}
                   for grouping, found in groups(test_prompts, train).items()},
        "target_in_prompt": float(np.mean(in_prompt)) if in_prompt else None,
        "prompts_per_second": prompts_per_second,
    }


def _against(model: np.ndarray, baseline: np.ndarray, of_one_answer: bool) -> dict[str, dict]:
    nowhere = np.full(len(model), np.nan)       # no distances
    theirs, ours = (per_pair(ranks, nowhere) for ranks in (baseline, model))
    return {name: difference(np.stack([theirs[name], ours[name]]), 1) for name in COMPARED
            if not of_one_answer or name in OF_ONE_ANSWER}


def text(report: dict) -> str:
    """The report for a person, at most WIDTH columns wide: tables of all pairs, of the groups, of those that fit."""
    n, fit = report["n"], report["fits"]["model"]["n"]
    others = f" (published: {report['published_n']})" if report.get("published_n") else ""
    given = (f"protocol {report['protocol']}, n = {n}{others}, the target's time is given in "
             f"{report['target_time_given']} of {n} questions (GA-LLM's and LLM4POI's name it; STHGCN and GETNext "
             "never see it)")
    share, speed = report["target_in_prompt"], report["prompts_per_second"]
    processes = report.get("machine", {}).get("world_size", 1)
    lines = [textwrap.fill(given, WIDTH, break_on_hyphens=False), "",
             "all pairs: the model's value [95 % interval], and others' values",
             narrow(report["all"], [column for block in BLOCKS for column in block]), "",
             *_against_lines(report["against"]),
             _group_table(report["groups"], [name for name in report["all"] if name != "model"]), ""]
    fits = {"the pairs whose prompt fits --seq_len": report["fits"],
            "the pairs whose prompt would fit it in the released code's wording": report["fits_released"]}
    for what, found in fits.items():
        if found and found["model"]["n"] < n:
            lines += [f"{what}: {found['model']['n']} of {n}", *[narrow(found, SHORT)] * bool(found["model"]["n"]), ""]
    return "\n".join(lines + ["every prompt fits --seq_len"] * (fit == n) + [
        f"target among the prompt's check-ins: {'-' if share is None else format(share, '.3f')}; "
        f"{'-' if speed is None else format(speed, '.2f')} prompts per second"
        + f" by {processes} processes" * (processes > 1),
        "all intervals, and all metrics by group: in metrics.json and report.py's page"])


def _against_lines(against: dict[str, dict]) -> list[str]:
    lines = [f"{metric:5}  {name:23} {found[metric]['difference']:+.4f} [{found[metric]['low']:+.4f}, "
             f"{found[metric]['high']:+.4f}]  {found[metric]['p']:.4f}"
             for metric in COMPARED for name, found in against.items() if metric in found]
    return ["model - baseline [95 % interval], p (two-sided, paired bootstrap)", *lines, ""] if lines else []


def narrow(rows: dict[str, dict], columns: Sequence[str]) -> str:
    """Aligned text, one row per metric: the first method's with interval, the others' as columns, `-` for what is none.

    rows: {method: summary}. What would be wider than WIDTH stands below.
    """
    (first, found), *others = rows.items()
    width = max(map(len, columns))
    blocks = [[_column(first, [_with_interval(found, column) for column in columns])]]
    used = width + 2 + len(blocks[0][0][0])
    for name, result in others:
        cells = _column(name, [_value(result, column) for column in columns])
        if used + 2 + len(cells[0]) > WIDTH:
            blocks.append([])
            used = width
        blocks[-1].append(cells)
        used += 2 + len(cells[0])
    lines = []
    for block in blocks:
        heads = max(len(cells) for cells in block) - len(columns)
        labels = [" " * width] * heads + [f"{column:{width}}" for column in columns]
        padded = [[" " * len(cells[0])] * (len(labels) - len(cells)) + cells for cells in block]
        lines += ["  ".join(line).rstrip() for line in zip(labels, *padded)]
    return "\n".join(lines)


def _column(name: str, cells: Sequence[str]) -> list[str]:
    """The words of a head above each other, and the cells, all of one width; to the right where they are numbers."""
    lines = [*name.split(" "), *cells] if len(name) > max(map(len, cells)) else [name, *cells]
    return [f"{line:>{max(map(len, lines))}}" for line in lines]


def table(rows: dict[str, dict], columns: Sequence[str]) -> str:
    """Aligned text: one row per {name: summary}, one column per metric, `-` where it has none."""
    width = max(len(name) for name in rows)
    lines = [f"{'':{width}}  {'n':>6}  " + "  ".join(f"{column:23}" for column in columns)]
    for name, result in rows.items():
        cells = [f"{_with_interval(result, column):23}" for column in columns]
        lines.append(f"{name:{width}}  {result['n']:>6}  " + "  ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _group_table(found: dict[str, dict[str, dict]], baselines: list[str]) -> str:
    """One row per group: the model's Acc@1 with its interval, and MRR; of the best baseline, the values."""
    width = 2 + max(len(group) for by_group in found.values() for group in by_group)
    lines = ["by group; baseline: the best one's value",
             f"{'':{width}}  {'n':>6}  {'Acc@1: model':23}  baseline  MRR: model  baseline"]
    for grouping, by_group in found.items():
        lines.append(grouping)
        for group, methods in by_group.items():
            # The best of texts: all have four decimals and none exceeds 1; "-" comes before digits.
            acc, mrr = (max((_value(methods[name], metric) for name in baselines), default="-")
                        for metric in ("Acc@1", "MRR"))
            model = methods["model"]
            lines.append(f"{'  ' + group:{width}}  {model['n']:>6}  {_with_interval(model, 'Acc@1'):23}  {acc:>8}  "
                         f"{_value(model, 'MRR'):>10}  {mrr:>8}")
    return "\n".join(lines)


def _value(result: dict, metric: str) -> str:
    return f"{result[metric]['value']:.{2 if metric in KM else 4}f}" if metric in result else "-"


def _with_interval(result: dict, metric: str) -> str:
    if metric not in result:
        return "-"
    digits = 2 if metric in KM else 4
    value, low, high = (f"{result[metric][key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
