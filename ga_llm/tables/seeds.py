"""Rows of one experiment at several seeds as one row: means over the seeds, intervals over pairs and seeds."""
import dataclasses
from collections.abc import Sequence

from ga_llm.base import artifacts
from ga_llm.evaluation import comparison

MODEL = "model"     # of the methods in a metrics.json


def joined(rows: Sequence):
    """One `results.Row` of all.

    Its interval is drawn over pairs and seeds; in groups of pairs it spans those of the seeds. Baselines are those of
    the first: they have no seed. Raises UserError if the rows' pairs are not the same.
    """
    if len(rows) == 1:
        return rows[0]
    rows = sorted(rows, key=lambda row: min(map(int, row.seeds)))
    first, last = rows[0], rows[-1]
    means = comparison.means([path.with_name(artifacts.PREDICTIONS) for row in rows for path in row.paths])
    found = {name: value for name, value in _mean([row.found for row in rows])[MODEL].items() if name not in means}
    groups = {grouping: {group: _mean([row.groups[grouping][group] for row in rows]) for group in by_group}
              for grouping, by_group in first.groups.items()}
    seeds = {seed: figures for row in rows for seed, figures in row.seeds.items()}
    return dataclasses.replace(
        first, paths=tuple(path for row in rows for path in row.paths), seeds=seeds, date=last.date,
        commit=last.commit, command=_command(first.command, ",".join(seeds)), groups=groups,
        found=first.found | {MODEL: found | means}, fits=_mean([row.fits for row in rows]) if first.fits else None,
        seconds=_costs([row.seconds for row in rows]), training=_training([row.training for row in rows]))


def _mean(found: Sequence[dict]) -> dict:
    """{method: summary} of all; of the model the mean, between the lowest and the highest bound."""
    def of(metric):
        each = [one[MODEL][metric] for one in found]
        return {"value": sum(one["value"] for one in each) / len(each), "low": min(one["low"] for one in each),
                "high": max(one["high"] for one in each)}

    model = {metric: value if metric == "n" else of(metric) for metric, value in found[0][MODEL].items()
             if all(metric in one[MODEL] for one in found)}
    return found[0] | {MODEL: model}


def _costs(seconds: Sequence[dict | None]) -> dict | None:
    """Of a single seed, on average."""
    if not all(seconds):
        return None
    return {kind: sum(one.get(kind, 0) for one in seconds) / len(seconds) for kind in seconds[0]}


def _training(training: Sequence[dict | None]) -> dict | None:
    if not all(training):
        return None
    return {kind: {"steps": told["steps"],
                   "seconds": sum(one.get(kind, told)["seconds"] for one in training) / len(training)}
            for kind, told in training[0].items()}


def _command(command: str | None, seeds: str) -> str | None:
    """`run_experiment.py … --seeds 1` with all of them."""
    parts = (command or "").split(" ")
    if "--seeds" not in parts:
        return command
    at = parts.index("--seeds") + 1
    return " ".join([*parts[:at], seeds, *parts[at + 1:]])
