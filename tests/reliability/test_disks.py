"""Disks that are full, read-only, or of others, and two runs in one folder: one line, and nothing half-written."""
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time

import forked
import pytest
from commands import few_pairs
from harness import ROOT, Result, refusal, snapshot
from trials import CASES, PAGE, TRAININGS

from ga_llm.base import writing
from ga_llm.base.artifacts import FINAL_ENCODER, TRAINER_LOG
from ga_llm.training import run_log, staging

pytestmark = pytest.mark.bulk

# Of what a command writes, as much as there is room for.
SHARES = [0.6, *(pytest.param(share / 8, marks=pytest.mark.soak) for share in range(8))]
ALL = [*CASES, *TRAININGS]
ALONE = [name for name in ALL if name != "tokens"]      # those that want the folder for themselves


def refused(trial, earlier, *hooks):
    """The command ends with one line that names its folder, and what was there before still is; returns the line."""
    line = refusal(trial.run(*hooks), trial.output)
    trial.check(earlier)
    left = [path.name for path in trial.folder.rglob(".*") if path.suffix != ".partial"]
    assert left == []
    return line.lower()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", SHARES)
def test_full(name, share, disk, trial):
    trial, earlier = trial(name), name != "tokens"
    trial.begin(earlier)
    with disk.room(share * sum(-(-len(text) // PAGE) * PAGE for text in trial.made.values())):
        line = refused(trial, earlier)
    assert "no space left on device" in line and "make room" in line
    trial.succeed()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", SHARES)
def test_files_too_large(name, share, trial):
    """As under some quotas; where nothing can be mounted, it stands for the full disk, too."""
    trial = trial(name)
    trial.begin(earlier=False)
    size = max(PAGE, share * max(map(len, trial.made.values())))       # of less the log would lack the line
    assert "file too large" in refused(trial, False, functools.partial(forked.limit_files, int(size)))


def size_of(folder):
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("stage, saved", [(1, 1.5)] + [
    pytest.param(stage, saved / 10, marks=pytest.mark.soak) for stage in (1, 2) for saved in (0, 3, 8, 12, 25)])
def test_training_on_a_full_disk(stage, saved, disk, repo, tmp_path):
    """There is room for so many checkpoints; those that are whole stay, and with more room it goes on."""
    folder = disk.folder / "trained"
    flags = ["--max_steps", 3, "--save_steps", 1, "--data_path", few_pairs(repo, stage, 6), "--resume_from_checkpoint",
             "auto"]
    command, log = forked.training(stage, folder, *flags), tmp_path / "log"
    one = size_of(repo / TRAINED[stage] / "checkpoint-6") + size_of(repo / TRAINED[stage] / "6")
    with disk.room(saved * one):
        line = refusal(forked.run(repo, command, log, **forked.ranks()), str(folder))
        assert "no space left on device; make room" in line
        steps = staging.steps(folder)
        assert steps == list(range(1, 1 + len(steps))) and len(steps) >= int(saved) - 1
        for number in steps:
            assert size_of(staging.checkpoint(folder, number)) > 0.9 * size_of(repo / TRAINED[stage] / "checkpoint-6")
        run_log.read_log(folder / TRAINER_LOG)
    forked.train(repo, stage, folder, *flags)
    assert staging.steps(folder) == [2, 3] and not staging.staging(folder).exists()
    assert [line["step"] for line in run_log.read_log(folder / TRAINER_LOG)] == [1, 2, 3]
    assert (folder / FINAL_ENCODER).exists() == (stage == 1)
    shutil.rmtree(folder)


TRAINED = {1: "outputs/gcim", 2: "outputs/llm"}


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def below_a_file(folder):
    shutil.rmtree(folder.parent)
    folder.parent.write_text("")


def a_link_to_nowhere(folder):
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def of_others(folder):
    folder.chmod(0o555)


def mended(trial):
    """What the functions above have made of the folder is gone."""
    for path in (trial.folder, trial.folder.parent):
        if path.is_symlink() or path.is_file():
            path.unlink()
    trial.begin(earlier=False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("wrong, says, hooks", [
    (a_file, "file exists", []), (below_a_file, "not a directory", []), (a_link_to_nowhere, "file exists", []),
    (of_others, "permission denied", [forked.lose_privileges])], ids=lambda value: getattr(value, "__name__", ""))
def test_no_place_to_write(name, wrong, says, hooks, trial):
    trial = trial(name)
    trial.begin(earlier=False)
    wrong(trial.folder)
    before = snapshot(trial.root)
    try:
        assert says in refusal(trial.run(*hooks), trial.output).lower()
        assert snapshot(trial.root) == before
    finally:
        mended(trial)


@pytest.mark.parametrize("name", ALL)
def test_read_only(name, disk, trial):
    trial = trial(name)
    trial.begin(earlier=False)
    before = snapshot(trial.root)
    with disk.read_only():
        assert "read-only file system" in refusal(trial.run(), trial.output).lower()
    assert snapshot(trial.root) == before


def test_tokens_are_read_from_a_read_only_disk(disk, trial):
    trial = trial("tokens")
    trial.begin(earlier=False)
    trial.succeed()
    with disk.read_only():
        trial.succeed()


@pytest.mark.parametrize("name", ["tokens", "evaluation", *TRAININGS])
def test_name_too_long(name, trial, tmp_path):
    trial, long = trial(name), "x" * 300
    command = [long if part == trial.output else part for part in trial.command]
    assert long in command
    refusal(forked.run(trial.root, command, tmp_path / "log", **trial.environment()), long, "name too long")


# Two runs at once.

@pytest.mark.parametrize("name", ALONE)
def test_second_run_is_refused(name, trial):
    trial = trial(name)
    trial.begin(earlier=False)
    with writing.alone(trial.folder):
        before = snapshot(trial.folder)
        refusal(trial.run(), trial.output, f"process {os.getpid()} on ")
        assert snapshot(trial.folder) == before


@contextlib.contextmanager
def paused(trial, at):
    """The process of the command, stopped before its `at`th change of a file."""
    process = trial.launch(functools.partial(forked.watch, str(trial.folder), str(trial.trace), at, signal.SIGSTOP))
    try:
        while process.is_alive() and (not trial.trace.exists() or len(trial.trace.read_text().splitlines()) < at):
            time.sleep(0.01)
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.mark.parametrize("name", ["samples", "questions 2", "full table"])
def test_first_run_is_unharmed_by_a_second(name, trial, tmp_path):
    trial = trial(name)
    trial.begin(earlier=True)
    trial.trace.unlink()
    with paused(trial, trial.operations // 2) as process:
        second = forked.run(trial.root, trial.command, tmp_path / "log")
        refusal(second, trial.output, f"process {process.pid} on ")
        os.kill(process.pid, signal.SIGCONT)
        trial.check_success(trial.end(process))


@pytest.mark.parametrize("name", ["samples", "full table"])
def test_next_run_starts_at_once_after_a_kill(name, trial):
    trial = trial(name)
    trial.begin(earlier=True)
    trial.trace.unlink()
    with paused(trial, trial.operations // 2) as process:
        process.kill()
    trial.succeed()


def test_tokens_are_waited_for(trial, tmp_path):
    trial = trial("tokens")
    trial.begin(earlier=False)
    trial.trace.unlink()
    with paused(trial, trial.operations // 2) as process:
        second = forked.launch(trial.root, trial.command, tmp_path / "log")
        time.sleep(0.5)
        assert second.is_alive()
        os.kill(process.pid, signal.SIGCONT)
        trial.check_success(trial.end(process))
        second.join()
        assert second.exitcode == 0
    trial.check_success(trial.run())


def test_a_lock_dies_with_its_process(tmp_path):
    """Though processes that it has forked, as a data loader does, live on."""
    script = ("import os, sys, time; from ga_llm.base import writing; writing.hold(sys.argv[1])\n"
              "if not os.fork(): print(os.getpid(), flush=True)\ntime.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    with pytest.raises(writing.UserError, match=f"process {parent.pid} on "), writing.alone(tmp_path):
        pass
    parent.kill()
    parent.wait()
    try:
        with writing.alone(tmp_path):
            os.kill(child, 0)       # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


# Standard output.

@pytest.mark.parametrize("redirected, unbuffered, code, says", [
    ("| true", "", 1, ""), ("> /dev/full", "", 2, "error: standard output: no space"),
    ("> /dev/full", "1", 2, "error: standard output: no space"), (">&-", "", 0, ""), (">&- 2>&-", "", 0, "")])
def test_output_that_goes_nowhere(redirected, unbuffered, code, says, trial):
    trial = trial("samples")
    trial.begin(earlier=False)
    command = f"{sys.executable} {ROOT}/{' '.join(trial.command)}"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {redirected}"], cwd=trial.root, text=True,
                            capture_output=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert result.returncode == code and says in result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    trial.check_success(Result(0, result.stdout, result.stderr))
