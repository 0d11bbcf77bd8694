"""What several files of these tests share."""
import shutil
from pathlib import Path

import forked
import pytest
from commands import DATA
from harness import call

from ga_llm.tables import chain


@pytest.fixture(scope="session")
def pointed(repo):
    """The repository with questions in two tokens a check-in, answered by ids ("moments") and by tokens ("tokens")."""
    for kind, flags in (("moments", []), ("tokens", ["-answer", "token"])):
        shutil.copytree(repo / DATA, repo / kind / "sample/preprocessed")
        result = call(repo, "data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-datasets", kind,
                      "-fields", "moment,gps", "-max_history", "10", *flags)
        assert result.code == 0, result.err
    return repo


@pytest.fixture
def steps_are_forked(monkeypatch):
    """The commands of an experiment's steps start in a moment (`forked`), not by python and torchrun in ten seconds."""
    def call_forked(command, log_file):
        script = next(at for at, part in enumerate(command) if part.endswith(".py"))
        environment = forked.ranks() if command[0] == "torchrun" else {}
        return forked.run(Path.cwd(), command[script:], log_file, **environment).code
    monkeypatch.setattr(chain, "_call", call_forked)
