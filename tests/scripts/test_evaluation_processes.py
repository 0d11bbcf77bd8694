"""Evaluation by several processes: the files of one, also after a kill and with another number of processes."""
import functools
import json
import re
import shutil
import signal
from pathlib import Path

import forked
import pytest
from commands import free_port
from test_export import CHECKPOINT
from test_pointer import EXACT, GEO, files
from test_short import VARYING

from ga_llm.base import artifacts

NAMES = (artifacts.METRICS, artifacts.PREDICTIONS, artifacts.LOG_PROBABILITIES)
ADD = "ga_llm.evaluation.predictions:Store.add"
TABLE = ["--full_table", "True"]
POINTED = "outputs/pointed_many/checkpoint-4"


class Copies:
    """Copies of a checkpoint in `folder`, each evaluated by a number of processes, in chunks of two prompts."""

    def __init__(self, repo, folder, checkpoint=CHECKPOINT, flags=()):
        self.repo, self.folder, self.checkpoint, self.flags = repo, folder, repo / checkpoint, flags

    def copy(self, name) -> Path:
        copy = self.folder / name / self.checkpoint.name
        if not copy.exists():
            shutil.copytree(self.checkpoint, copy, ignore=shutil.ignore_patterns(*NAMES, ".*"))
        return copy

    def command(self, name, *flags):
        return ["test_next_gps.py", "--output_dir", self.copy(name), "--batch_size", "2", *self.flags, *flags]

    def start(self, processes, name, *hooks, flags=()):
        """The started processes that evaluate copy `name`, and their log."""
        port, log = free_port(), self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        return [forked.launch(self.repo, self.command(name, *flags), log, *hooks, **forked.ranks(rank, processes, port))
                for rank in range(processes)], log

    def run(self, processes, name, *hooks, flags=()):
        """The exit codes of evaluating copy `name`, and what was logged."""
        started, log = self.start(processes, name, *hooks, flags=flags)
        for process in started:
            process.join(300)
        return [process.exitcode for process in started], log.read_text() if log.exists() else ""

    def by(self, processes, name=None):
        """{file: contents} of an evaluation that succeeds; of metrics.json what does not tell how it was run."""
        name = name or f"by_{processes}"
        codes, told = self.run(processes, name)
        assert codes == [0] * processes, told[-5000:]
        self.told = told
        found, = self.copy(name).glob(f"**/{artifacts.PREDICTIONS}")
        assert not list(found.parent.glob(".*"))
        metrics = json.loads((found.parent / artifacts.METRICS).read_text())
        assert metrics["prompts_per_second"] > 0 and metrics["machine"].pop("world_size") == processes
        return {path.name: path.read_bytes() for path in found.parent.iterdir() if path.name in NAMES[1:]} | {
            artifacts.METRICS: {key: value for key, value in metrics.items() if key not in VARYING}}

    def killed(self, processes, name, call):
        """Each process is killed before it writes its `call`-th chunk; returns how many predictions are left."""
        codes, told = self.run(processes, name, functools.partial(forked.tell, ADD, call, signal.SIGKILL))
        assert -signal.SIGKILL in codes and "Traceback" not in told, told
        return self.predicted(name)

    def predicted(self, name):
        parts = list(self.copy(name).glob(f"**/.{artifacts.PREDICTIONS}.*"))
        return sum(path.read_bytes().count(b"\n") for path in parts)


def test_two_processes_write_what_one_does(repo, tmp_path):
    """Killed and started again with another number of them, too."""
    tested = Copies(repo, tmp_path, flags=TABLE)
    one = tested.by(1)
    assert tested.by(2) == one and one.keys() == {*NAMES}
    assert tested.told.count("the base model") <= 1 and "Traceback" not in tested.told
    left = tested.killed(2, "killed", 3)
    assert 0 < left < one[artifacts.PREDICTIONS].count(b"\n")
    assert tested.by(1, "killed") == one and f"going on behind {left} pairs" in tested.told


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, flags", [
    (CHECKPOINT, TABLE), (CHECKPOINT, ["--decoding", "beam", "--limit", "14"]), (CHECKPOINT, ["--decoding", "sample"]),
    (POINTED, TABLE)], ids=["rank", "beam", "sample", "pointer"])
def test_any_number_of_processes(repo, pointed, tmp_path, checkpoint, flags):
    if checkpoint == POINTED and not (repo / POINTED).exists():
        forked.train(repo, 2, Path(POINTED).parent, *files("moments"), *EXACT, *GEO)
    tested = Copies(repo, tmp_path, checkpoint, flags)
    one = tested.by(1)
    assert tested.by(3) == one
    for processes in (1, 3) if flags == TABLE and checkpoint == CHECKPOINT else (3,):
        name = f"goes_on_with_{processes}"
        left = tested.killed(2, name, 3)
        assert 0 < left < one[artifacts.PREDICTIONS].count(b"\n")
        assert tested.by(processes, name) == one and f"going on behind {left} pairs" in tested.told


@pytest.mark.parametrize("hook, line", [
    (functools.partial(forked.fail, "ga_llm.evaluation.trained:load", rank=1), "rank 1 has no model"),
    (functools.partial(forked.fail, ADD, rank=1), "rank 1 has no model"),
    (functools.partial(forked.fail, ADD, rank=0), "rank 0 has no model"),
    (functools.partial(forked.fail, "ga_llm.base.writing:hold", rank=0), "rank 0 has no model"), (None, "--limit")],
    ids=["while loading", "while predicting", "the first", "the lock", "a flag"])
def test_an_error_of_one_is_told_once_and_ends_all(repo, tmp_path, hook, line):
    tested = Copies(repo, tmp_path)
    codes, told = tested.run(2, "failed", *[hook] * (hook is not None), flags=[] if hook else ["--limit", "none"])
    assert codes == [2, 2] and "Traceback" not in told, told
    lines = [text for text in told.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", text)]     # no log lines
    assert len(lines) == 1 and lines[0].startswith("error: ") and line in lines[0], told
    assert tested.by(1, "failed")
