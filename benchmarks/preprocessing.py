"""Wall time and peak memory of each preprocessing step on a data set whose raw files are in place.

    python benchmarks/preprocessing.py -dataset_name nyc

The limit that the README claims: all four steps within 30 s and 2 GB on 2 cores, on real NYC. The exit code is 1 if
the data set is nyc and the limit is missed.
"""
import argparse
import os
import subprocess
import sys
import time

LIMIT_SECONDS, LIMIT_MB = 30, 2048


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory (MB) of one process. Raises SystemExit if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-dataset_name", default="nyc")
    name = parser.parse_args().dataset_name
    steps = [["run.py", "-f", f"best_conf/{name}.yml"], ["traj_qk.py", "-dataset_name", name],
             ["process_projector_gps_stage1.py", "-dataset_name", name, "-use_sim", "False"],
             ["process_llm_gps.py", "-dataset_name", name, "-use_sim", "False"]]
    rows = [(step[0], *measure([sys.executable, f"data-preprocess/{step[0]}", *step[1:]])) for step in steps]
    total = ("all", sum(row[1] for row in rows), sum(row[2] for row in rows), max(row[3] for row in rows))
    print(f"{'step':34}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}")
    for step, wall, cpu, peak in [*rows, total]:
        print(f"{step:34}{wall:8.2f}{cpu:8.2f}{peak:9.0f}")
    met = total[1] <= LIMIT_SECONDS and total[3] <= LIMIT_MB
    print(f"limit on real NYC: {LIMIT_SECONDS} s, {LIMIT_MB} MB: {'met' if met else 'missed'}")
    sys.exit(name == "nyc" and not met)


if __name__ == "__main__":
    main()
