"""Scripts in processes forked from one that has imported everything: a start costs a moment, not ten seconds.

They run as `__main__`, in the copy of the repository or in another folder; training scripts under the environment that
torchrun gives its processes. What happens to them there (a kill, a limit) is a hook: a function called before the
script, wrapped by functools.partial if it takes arguments.
"""
import ctypes
import functools
import multiprocessing
import os
import pkgutil
import resource
import runpy
import signal
import sys
import tempfile
import unittest.mock
from multiprocessing import forkserver
from pathlib import Path

import torch
from commands import FLAGS, README_FLAGS, ROOT, SCRIPTS, evaluation, free_port, metrics
from harness import Result

from ga_llm.base import writing
from ga_llm.base.cli import UserError

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.fsync"}

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["warm"])


def launch(folder, command, log, *hooks, **environment):
    """The started process of a script with its flags, in `folder`; stderr goes to `log`, stdout to <log>.out."""
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):     # else 3.11 finds no `warm`
        forkserver.ensure_running()
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment}
    process = _server.Process(target=_run, args=(str(folder), [str(part) for part in command], str(log), hooks,
                                                 environment))
    process.start()
    return process


def run(folder, command, log, *hooks, **environment) -> Result:
    return end(launch(folder, command, log, *hooks, **environment), log)


def end(process, log) -> Result:
    """Wait for a launched process. Killed at once, it has not even opened what it writes to."""
    process.join(300)
    return Result(process.exitcode, *(path.read_text() if path.exists() else ""
                                      for path in (Path(f"{log}.out"), Path(log))))


def evaluate(repo, output, *flags):
    """(result, metrics) of an evaluation."""
    with tempfile.TemporaryDirectory() as logs:
        result = run(repo, evaluation(output, *flags), Path(logs) / "log")
    assert result.code == 0, result.err[-5000:]
    return result, metrics(repo, result.out)


def start(repo, stage, output, *flags, processes=1, hooks=()):
    """The started processes of a training, one a rank; what they print goes to <output>.log."""
    command = training(stage, output, *flags)
    port = free_port()
    return [launch(repo, command, Path(repo) / f"{output}.log", *hooks, **ranks(rank, processes, port))
            for rank in range(processes)]


def train(repo, stage, output, *flags, processes=1, hooks=()):
    started = start(repo, stage, output, *flags, processes=processes, hooks=hooks)
    for process in started:
        process.join(300)
    assert all(process.exitcode == 0 for process in started), (Path(repo) / f"{output}.log").read_text()[-5000:]


def training(stage, output, *flags):
    return [SCRIPTS[stage], *README_FLAGS, "--output_dir", str(output), *FLAGS[stage], *map(str, flags)]


def ranks(rank=0, processes=1, port=None):
    """What torchrun tells its processes."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()),
            "OMP_NUM_THREADS": "1"}


def _run(folder, command, log, hooks, environment):
    os.chdir(folder)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    for number, name in ((1, f"{log}.out"), (2, log)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = command
    for hook in hooks:
        hook()
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    finally:
        writing._held.close()       # a forked process ends without atexit


# Hooks.

def watch(folder, trace, at=None, sends=signal.SIGKILL):
    """Write a line to `trace` for every change of a file in `folder`, and before the `at`th send this process a signal.

    What C++ and Rust write is not seen, but the files beside it are.
    """
    folder, lines, count = os.path.abspath(folder), os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0

    def see(event, details):
        nonlocal count
        if event not in OPERATIONS and not (event == "open" and details[2] & WRITING):
            return
        path = os.path.abspath(_path(event, details))
        if path.startswith(folder):
            count += 1
            os.write(lines, f"{event} {path}\n".encode())
            if count == at:
                os.kill(os.getpid(), sends)

    fsync = os.fsync
    os.fsync = lambda handle: (sys.audit("os.fsync", handle), fsync(handle))     # Python does not announce it
    sys.addaudithook(see)


def _path(event, details):
    """The path of an event: given, by an open file, or relative to an open folder."""
    path, last = details[0], details[-1]
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    if event in ("os.mkdir", "os.remove", "os.rmdir") and last >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{last}"), os.fsdecode(path))
    return os.fsdecode(path)


def tell(function, call, *signals, rank=None):
    """Send this process signals before the `call`-th call of "module:function"; of `rank` alone, if one is given."""
    where, name = function.rsplit("." if "." in function.partition(":")[2] else ":", 1)
    owner, count = pkgutil.resolve_name(where), 0
    before = getattr(owner, name)

    @functools.wraps(before)
    def told(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            for number in signals if rank in (None, int(os.environ["RANK"])) else ():
                os.kill(os.getpid(), number)
        return before(*args, **kwargs)

    setattr(owner, name, told)


def fail(function, rank):
    """Let "module:function" raise a UserError in the process of this rank."""
    where, name = function.rsplit("." if "." in function.partition(":")[2] else ":", 1)
    owner = pkgutil.resolve_name(where)

    def failing(*args, **kwargs):
        if int(os.environ["RANK"]) == rank:
            raise UserError(f"rank {rank} has no model; give it one")
        return before(*args, **kwargs)

    before = getattr(owner, name)
    setattr(owner, name, failing)


def limit_files(size):
    """No file may become larger than `size` bytes, as under a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def lose_privileges():
    """Permissions count for root, too."""
    version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version_3, nothing) == 0
