"""Training scripts in processes forked from one that has imported everything: a start costs a second, not ten.

They run under the environment that torchrun gives its processes, as `__main__`, in the copy of the repository.
"""
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from commands import FLAGS, README_FLAGS, SCRIPTS, free_port

from ga_llm import staging

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["finetune_GCIM", "finetune_LLM_with_GCIM", "deepspeed"])


def start(repo, stage, output, *flags, processes=1, pause=0.0):
    """The started processes, one a rank; what they print goes to <output>.log.

    pause: seconds that each checkpoint stays hidden for longer, so that a test can meet it there.
    """
    command = [SCRIPTS[stage], *README_FLAGS, "--output_dir", str(output), *FLAGS[stage], *map(str, flags)]
    port = free_port()
    started = [_server.Process(target=_run, args=(str(repo), command, f"{output}.log", rank, processes, port, pause))
               for rank in range(processes)]
    for process in started:
        process.start()
    return started


def train(repo, stage, output, *flags, processes=1):
    started = start(repo, stage, output, *flags, processes=processes)
    for process in started:
        process.join(300)
    assert all(process.exitcode == 0 for process in started), (Path(repo) / f"{output}.log").read_text()[-5000:]


def _run(repo, command, log, rank, processes, port, pause):
    os.chdir(repo)
    to_disk = staging._to_disk
    staging._to_disk = lambda folder: (time.sleep(pause), to_disk(folder))
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port),
                   "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
