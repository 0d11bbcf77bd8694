"""Time and peak memory of each preprocessing step: on a data set, and on a city a hundred times as large.

    python benchmarks/preprocessing.py -dataset_name nyc
    python benchmarks/preprocessing.py -dataset_name nyc -users 103000

Limits: on real NYC all four steps within 30 s and 2 GB on 2 cores. With `-users`, a synthetic city of so many users
(make_sample_raw.py, TKY format; 103,000 make 10 million check-ins) goes through the same steps in a temporary folder,
within 24 GB, and each check-in may cost 1.5 times as much CPU time as the data set's, what Python and its imports take
being left out on both sides. The exit code is 1 if a limit is missed.
"""
import argparse
import gzip
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS, LIMIT_MB = 30, 2048
LIMIT_RATIO, LIMIT_CITY_MB = 1.5, 24 * 1024


def measure(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory (MB) of one script in `folder`. Raises SystemExit if it fails."""
    script = ROOT / "data-preprocess" / command[0]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, script, *command[1:]], stdout=subprocess.DEVNULL, cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def steps(name: str) -> list[list[str]]:
    return [["run.py", "-f", f"best_conf/{name}.yml"], ["traj_qk.py", "-dataset_name", name],
            ["process_projector_gps_stage1.py", "-dataset_name", name, "-use_sim", "False"],
            ["process_llm_gps.py", "-dataset_name", name, "-use_sim", "False"]]


def check_ins(name: str, folder: Path) -> int:
    """Lines of the raw files that run.py reads, headers aside."""
    config, count = yaml.safe_load((folder / f"best_conf/{name}.yml").read_text()), 0
    for path in config["raw"].values():
        path = folder / path
        opened = path.open("rb") if path.exists() else gzip.open(f"{path}.gz")
        with opened as file:
            count += sum(1 for _ in file) - (config["format"] == "getnext")
    return count


def table(name: str, folder: Path) -> list[tuple[str, float, float, float]]:
    """Run all steps, print what each took, and return (step, wall s, CPU s, peak MB) of each and of all."""
    print(f"{name}: {check_ins(name, folder):,} check-ins")
    print(f"{'step':34}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}", flush=True)
    rows = []
    for step in steps(name):
        rows.append((step[0], *measure(step, folder)))
        print("{:34}{:8.2f}{:8.2f}{:9.0f}".format(*rows[-1]), flush=True)
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), max(row[3] for row in rows)))
    print("{:34}{:8.2f}{:8.2f}{:9.0f}".format(*rows[-1]), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-dataset_name", default="nyc")
    parser.add_argument("-users", type=int, help="also: a synthetic city of so many users")
    args = parser.parse_args()
    rows, met = table(args.dataset_name, ROOT), True
    if args.dataset_name == "nyc":
        met = rows[-1][1] <= LIMIT_SECONDS and rows[-1][3] <= LIMIT_MB
        print(f"limit on real NYC: {LIMIT_SECONDS} s, {LIMIT_MB} MB: {'met' if met else 'missed'}")
    if args.users:
        with tempfile.TemporaryDirectory(prefix="city-") as folder:
            met &= city(args.users, Path(folder), args.dataset_name, rows)
    sys.exit(not met)


def city(users: int, folder: Path, name: str, rows: list[tuple]) -> bool:
    """Measure the city, print its cost per check-in beside that of the data set `name`; whether limits are met."""
    (folder / "best_conf").symlink_to(ROOT / "best_conf")
    print()
    measure(["make_sample_raw.py", "-format", "tky", "-dataset_name", "tky", "-users", str(users)], folder)
    large = table("tky", folder)
    idle = [min(measure([step[0], "--help"], folder)[1] for _ in range(3)) for step in steps(name)]
    idle.append(sum(idle))
    counts = check_ins(name, ROOT), check_ins("tky", folder)
    print(f"\nCPU microseconds a check-in, without Python's start\n{'step':34}{name:>8}{'city':>8}{'ratio':>8}")
    for small, big, start in zip(rows, large, idle):
        costs = [1e6 * (row[2] - start) / count for row, count in zip((small, big), counts)]
        print(f"{small[0]:34}{costs[0]:8.2f}{costs[1]:8.2f}{costs[1] / costs[0]:8.2f}")
    met = costs[1] <= LIMIT_RATIO * costs[0] and large[-1][3] <= LIMIT_CITY_MB
    print(f"limit on the city: {LIMIT_RATIO} times the cost of {name} in all, {LIMIT_CITY_MB} MB: "
          f"{'met' if met else 'missed'}")
    return met


if __name__ == "__main__":
    main()
