"""What tests of kills and disks share: a larger sample city, a disk of their own, and commands measured on it."""
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from commands import few_pairs
from harness import ROOT, call
from trials import CASES, Disk, Trial


@pytest.fixture(scope="session")
def city(once):
    """A larger sample city than that of `repo`, up to its questions."""
    return once("city", make_city)


def make_city(city):
    shutil.copytree(ROOT / "best_conf", city / "best_conf")
    raw = ["data-preprocess/make_sample_raw.py", "-users", "300", "-out", "data-preprocess/data/sample/raw"]
    for command in (raw, *(CASES[name][0] for name in ("samples", "questions 2"))):
        result = call(city, *command)
        assert result.code == 0, result.err
    few_pairs(city, 2, 800)


@pytest.fixture(scope="session")
def disk(tmp_path_factory):
    """A small file system; where none may be mounted, a folder, on which only tests that fill it are skipped."""
    folder = Path(tempfile.mkdtemp())
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], capture_output=True)
        yield Disk(folder, mounted.returncode == 0)
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def trial(disk, tmp_path_factory, city, repo):
    """The trial of a case, measured once a session: trial("samples")."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = Trial(name, disk.folder / name, tmp_path_factory.mktemp("logs"), city, repo)
            if name in CASES:
                made[name].measure()
        return made[name]
    return make
