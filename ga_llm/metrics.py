"""Acc@k and MRR from ranks, each with its 95 % bootstrap interval, and the table that shows them."""
from collections.abc import Sequence

import numpy as np

ACC_AT = (1, 5, 10, 20)


def per_pair(ranks: Sequence[float]) -> dict[str, np.ndarray]:
    """What each pair adds to each metric. ranks: (N,), 1 is best, inf where the target has none."""
    ranks = np.asarray(ranks, dtype=np.float64)
    reciprocal = 1 / ranks
    values = {f"Acc@{k}": (ranks <= k).astype(np.float64) for k in ACC_AT}
    values["MRR"] = reciprocal
    values["MRR@5"] = np.where(ranks <= 5, reciprocal, 0.0)
    return values


def summary(ranks: Sequence[float], draws: int = 1000, seed: int = 0) -> dict:
    """{"n", and per metric {"value", "low", "high"}}: the mean over pairs and its percentile bootstrap interval."""
    n = len(ranks)
    result = {"n": n}
    if n == 0:
        return result
    samples = np.random.default_rng(seed).integers(0, n, size=(draws, n))
    for name, values in per_pair(ranks).items():
        low, high = np.percentile(values[samples].mean(axis=1), [2.5, 97.5])
        result[name] = {"value": float(values.mean()), "low": float(low), "high": float(high)}
    return result


def table(rows: dict[str, dict], columns: Sequence[str] = ("Acc@1", "Acc@5", "Acc@10", "MRR", "MRR@5")) -> str:
    """Aligned text: one row per {name: summary}."""
    width = max(len(name) for name in rows)
    lines = [f"{'':{width}}  {'n':>6}  " + "  ".join(f"{column:^23}" for column in columns)]
    for name, result in rows.items():
        cells = []
        for column in columns:
            metric = result.get(column)
            cells.append(f"{metric['value']:.4f} [{metric['low']:.4f}, {metric['high']:.4f}]"
                         if metric else f"{'-':^23}")
        lines.append(f"{name:{width}}  {result['n']:>6}  " + "  ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def report(test_prompts, predictions: dict[int, dict], baseline_ranks: dict[str, list], seconds: float) -> dict:
    """All of metrics.json: the model's and the baselines' summaries, over all pairs and over those that fit.

    baseline_ranks: {name: (pairs,) ranks}, in the order of `test_prompts`.
    """
    ranks = {"model": [predictions[prompt.pair]["rank"] or np.inf for prompt in test_prompts], **baseline_ranks}
    fits = np.array([prompt.fits for prompt in test_prompts], dtype=bool)
    in_prompt = [prompt.target in prompt.shown for prompt in test_prompts]
    return {
        "all": {name: summary(values) for name, values in ranks.items()},
        "fits": {name: summary(np.asarray(values)[fits]) for name, values in ranks.items()},
        "target_in_prompt": float(np.mean(in_prompt)),
        "prompts_per_second": len(test_prompts) / seconds,
    }


def text(report: dict, decoding: str) -> str:
    """The report for a person: a table for each denominator. A sampled answer has no rank, hence Acc@1 alone."""
    lines = []
    for denominator, title in (("all", "all pairs"), ("fits", "pairs whose prompt fits --seq_len")):
        rows = {name: dict(result) for name, result in report[denominator].items()}
        if decoding == "sample":
            rows["model"] = {key: rows["model"][key] for key in ("n", "Acc@1") if key in rows["model"]}
        lines += [f"{title} (value [95 % interval])", table(rows), ""]
    lines.append(f"target among the prompt's check-ins: {report['target_in_prompt']:.3f}; "
                 f"{report['prompts_per_second']:.2f} prompts per second")
    return "\n".join(lines)
