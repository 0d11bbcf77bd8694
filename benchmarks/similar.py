"""Time and memory of the search of similar trajectories with the light encoder, and what it is worth.

    python benchmarks/similar.py -dataset_name nyc
    python benchmarks/similar.py -dataset_name nyc -users 3000

Everything is made in a temporary folder. Limit: on real NYC traj_sim.py takes at most 60 s on 2 cores; the exit code is
1 if it takes longer. Beside it, on every hundredth query: the naive way, which compares one query at a time with all
keys and sorts them, and must find the same. With `-users`, a synthetic city of so many users too (make_sample_raw.py,
TKY format; 3,000 make as many trajectories as the paper's ca has). No peak is below this process's own.

What it is worth: of the latest 1,500 train trajectories, how often the target's place is in the prompt's similar part
(the latest 200 check-ins of those listed), and in the listed trajectories as a whole; beside lists of the most recent
earlier trajectories, and of random earlier ones. "New": targets that are not in the user's own earlier check-ins.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from preprocessing import ROOT, measure
from sklearn.metrics.pairwise import linear_kernel

sys.path.insert(0, str(ROOT / "data-preprocess"))

from checkins import config, questions, samples, similar  # noqa: E402
from ga_llm.base import artifacts  # noqa: E402

LIMIT_SECONDS = 60
EVERY = 100         # of which queries the naive way is measured
LATEST = 1500


def table(name: str, folder: Path, datasets: Path) -> float:
    """Run the steps in `folder`, print what each took; returns the wall seconds of traj_sim.py."""
    flags = ["-dataset_name", name, "-datasets", datasets]
    print(f"{'step':34}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}", flush=True)
    for step in (["run.py", "-f", f"best_conf/{name}.yml", "-datasets", datasets], ["traj_qk.py", *flags],
                 ["traj_sim.py", *flags], ["process_llm_gps.py", *flags, "-use_sim", "True"]):
        took = measure(step, folder)
        shown = " ".join(step[:1] + step[5:])
        print("{:34}{:8.2f}{:8.2f}{:9.0f}".format(shown, *took), flush=True)
        if step[0] == "traj_sim.py":
            seconds = took[0]
    return seconds


def against_naive(conf: config.Config) -> None:
    """Print what a query takes here and in the naive way; both must find the same."""
    train = similar.load(conf, "train")
    asked = np.flatnonzero([bool(query) for query in train.queries])
    keys, queries = similar.light(train.keys, {"train": [train.queries[i] for i in asked]})
    queries = queries["train"]
    print(f"train: {len(train.ids):,} trajectories, {len(asked):,} queries; "
          f"{keys.nnz / len(train.ids):.0f} terms a key")
    started = time.perf_counter()
    found = dict(similar.search(queries, train.starts[asked], keys, train.ends, train.ids, similar.MOST))
    ours = (time.perf_counter() - started) / len(asked)

    unit_keys, unit_queries = similar._unit(keys), similar._unit(queries)
    some = np.arange(0, len(asked), EVERY)
    started = time.perf_counter()
    for query in some:
        scores = linear_kernel(unit_queries[[query]], unit_keys)[0]
        scores[~(train.ends < train.starts[asked[query]])] = 0
        best = np.lexsort((train.ids, -scores))[:similar.MOST]
        assert train.ids[best[scores[best] > 0]].tolist() == found[query].tolist()
    naive = (time.perf_counter() - started) / len(some)
    print(f"search: {1e3 * ours:.2f} ms a query; one at a time ({len(some)} queries, the same lists): "
          f"{1e3 * naive:.2f} ms, {naive / ours:.1f} times slower", flush=True)


def worth(conf: config.Config) -> None:
    """Print how often the target's place is in what is listed, beside lists that are made without looking."""
    train, rows = similar.load(conf, "train"), samples.load(conf, "train")
    listed = questions.load_similar(conf, "train", {"train": rows})
    latest = train.ids[np.argsort(train.starts, kind="stable")[-LATEST:]]
    starts, ends = (pd.Series(column, train.ids) for column in (train.starts, train.ends))
    by_end, draw = ends.sort_values(kind="stable"), np.random.default_rng(0)
    before = {i: by_end.index[:by_end.searchsorted(starts[i])].to_numpy() for i in latest}
    lists = {f"similar ({top})": {i: listed[str(i)][:top] for i in latest} for top in (25, 100, 200)}
    for top in (25, 200):
        lists[f"most recent ({top})"] = {i: before[i][::-1][:top].tolist() for i in latest}
        lists[f"random ({top})"] = {i: draw.permutation(before[i])[:top].tolist() for i in latest}

    poi = rows["PoiId"].to_numpy()
    places = {i: set(own) for i, own in rows.groupby("TrajectoryId")["PoiId"]}
    target = {pair.trajectory: pair.target for pair in questions.pairs(conf, rows, rows)}
    visited = rows.groupby("UserId")["PoiId"].agg(list)     # each user's check-ins, in order of time
    number = rows.groupby("UserId").cumcount().to_numpy()
    new = {i for i in latest if poi[target[i]] not in visited[rows["UserId"][target[i]]][:number[target[i]]]}
    print(f"{'target in …, of the latest ' + str(LATEST):34}{'similar part':>14}{'new':>8}{'lists':>9}{'new':>8}"
          f"{'check-ins':>11}")
    for name, own in lists.items():
        pairs = [pair for pair in questions.pairs(conf, rows, rows, {str(i): ids for i, ids in own.items()})
                 if pair.trajectory in own and len(pair.history) <= conf.max_history_with_similar]
        part = {pair.trajectory: poi[pair.target] in poi[pair.similar] for pair in pairs}
        whole = {i: any(poi[target[i]] in places[other] for other in own[i]) for i in latest}
        shares = [np.mean([hits[i] for i in hits if i in among]) for hits in (part, whole) for among in (hits, new)]
        print("{:34}{:14.4f}{:8.4f}{:9.4f}{:8.4f}{:11.0f}".format(
            name, *shares, np.mean([len(pair.similar) for pair in pairs])), flush=True)
    print(f"{len(part):,} of {LATEST:,} have a history of at most {conf.max_history_with_similar} check-ins and so a "
          f"similar part; {len(new):,} ask for a new place, {len(new & part.keys()):,} of them with that part")


def city(users: int) -> None:
    with tempfile.TemporaryDirectory(prefix="city-") as folder:
        (Path(folder) / "best_conf").symlink_to(ROOT / "best_conf")
        print(f"a city of {users:,} users", flush=True)
        measure(["make_sample_raw.py", "-format", "tky", "-dataset_name", "tky", "-users", str(users)], Path(folder))
        table("tky", Path(folder), Path("datasets"))
        conf = config.load(ROOT / "best_conf/tky.yml", Path(folder) / "datasets")
        print(f"{samples.load(conf, 'train')['TrajectoryId'].nunique():,} train trajectories", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-dataset_name", default="nyc")
    parser.add_argument("-users", type=int, help="also: a synthetic city of so many users")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="similar-") as folder:
        conf = config.load(ROOT / artifacts.CONFIGS / f"{args.dataset_name}.yml", Path(folder))
        seconds = table(args.dataset_name, ROOT, Path(folder))
        met = seconds <= LIMIT_SECONDS
        print(f"limit on traj_sim.py: {LIMIT_SECONDS} s: {'met' if met else 'missed'}")
        if args.users:
            city(args.users)
        against_naive(conf)
        worth(conf)
    sys.exit(not met)


if __name__ == "__main__":
    main()
