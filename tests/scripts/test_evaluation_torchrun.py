"""Evaluation by several processes, started by torchrun, and killed again and again."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import free_port, run
from test_evaluation_processes import TABLE, Copies

from ga_llm.base import artifacts


@pytest.mark.slow
def test_killed_again_and_again(repo, tmp_path):
    """Now two processes, now one, now three, when some more predictions are there."""
    tested, chance, left = Copies(repo, tmp_path, flags=[*TABLE, "--batch_size", "1"]), random.Random(0), [0]
    one = tested.by(1)
    for processes in (2, 1, 3):
        started, _ = tested.start(processes, "killed")
        goal = left[-1] + chance.randint(1, 3)
        while tested.predicted("killed") < goal and any(process.is_alive() for process in started):
            time.sleep(0.001)
        for process in started:
            process.kill()
        for process in started:
            process.join(60)
        left.append(tested.predicted("killed"))
    assert left == sorted(left) and 0 < left[1] < left[-1]
    assert tested.by(2, "killed") == one and f"going on behind {left[-1]} pairs" in tested.told


TORCHRUN = ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}"]


@pytest.mark.slow
def test_under_torchrun(repo, tmp_path):
    tested = Copies(repo, tmp_path)
    one = tested.by(1)
    result = run(repo, *TORCHRUN, *tested.command("two"))
    assert (tested.copy("two") / artifacts.PREDICTIONS).read_bytes() == one[artifacts.PREDICTIONS]
    assert result.stdout.count("wrote ") == result.stdout.count("protocol ga-llm") == 1


@pytest.mark.soak       # test_evaluation_processes.py has errors of processes without torchrun, which costs most
def test_an_error_under_torchrun(repo, tmp_path):
    wrong = run(repo, *TORCHRUN, *Copies(repo, tmp_path).command("two"), "--base_model", "nowhere/there", check=False)
    assert wrong.returncode == 1 and wrong.stderr.count("error: ") == 1 and "nowhere/there" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.soak), "1"])
def test_torchrun_ends_all_if_one_is_killed(repo, tmp_path, rank):
    """And the others' predictions count when it is started again. Beams take long enough."""
    tested = Copies(repo, tmp_path, flags=["--decoding", "beam", "--limit", "16"])
    one, killed = tested.by(1), tested.copy("killed")
    before = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with open(tmp_path / "told", "w") as told:
        running = subprocess.Popen([*map(str, [*TORCHRUN, *tested.command("killed")])], cwd=repo, stdout=told,
                                   stderr=told, env={**os.environ, "PATH": before})
    while running.poll() is None and len(list(killed.glob(f"*/.{artifacts.PREDICTIONS}.*"))) < 2:
        time.sleep(0.02)
    for process in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            os.kill(int(process), signal.SIGKILL)
    assert running.wait(120) == 1, (tmp_path / "told").read_text()
    assert not list(killed.glob(f"*/{artifacts.METRICS}"))
    assert tested.by(1, "killed") == one and "going on behind" in tested.told
