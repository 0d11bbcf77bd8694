"""Disks that are full, read-only, or of others, and two runs in one folder: one line, and nothing half-written."""
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import forked
import pytest
from commands import few_pairs
from harness import refusal, snapshot
from trials import CASES, Trial

from ga_llm import staging, writing

ROOM = 2**27
PAGE = 4096


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def room(self, size):
        """Let so many bytes be free."""
        state = os.statvfs(self.folder)
        self.remount(f"size={(state.f_blocks - state.f_bfree) * state.f_frsize + max(PAGE, int(size))}")


@pytest.fixture
def disk():
    folder = Path(tempfile.mkdtemp())
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        mounted = None
    if mounted is None or mounted.returncode:
        folder.rmdir()
        pytest.skip("file systems may not be mounted here")
    yield Disk(folder)
    subprocess.run(["umount", "-l", folder], check=True)
    folder.rmdir()


def refused(trial, earlier, *hooks):
    """The command ends with one line that names its folder, and what was there before still is."""
    line = refusal(trial.run(*hooks), trial.output)
    trial.check(earlier)
    left = [path for path in trial.folder.rglob(".*") if not path.name.endswith(".partial")]
    assert left == []
    return line


def shares(*some):
    """Of what a command writes, as much as there is room for."""
    return [*some, *(pytest.param(share / 16, marks=pytest.mark.soak) for share in range(1, 16))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", shares(0, 0.6))
def test_full(name, share, disk, tmp_path, city, repo):
    trial = Trial(name, disk.folder / "here", tmp_path, city, repo)
    for earlier in {False, name != "tokens"}:
        trial.begin(earlier)
        disk.room(share * sum(-(-len(text) // PAGE) * PAGE for text in trial.made.values()))
        assert "no space left on device; make room" in refused(trial, earlier).lower().replace(")", "")
        disk.room(ROOM)
        trial.succeed()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", shares(0.6))
def test_files_too_large(name, share, tmp_path, city, repo):
    trial = Trial(name, tmp_path, tmp_path, city, repo)
    trial.begin(earlier=False)
    limit = functools.partial(forked.limit_files, int(share * max(map(len, trial.made.values()))))
    assert "file too large" in refused(trial, False, limit).lower()
    trial.succeed()
