"""What several files of these tests share."""
import shutil

import pytest
from commands import DATA
from harness import call


@pytest.fixture(scope="session")
def pointed(repo):
    """The repository with questions in two tokens a check-in, answered by ids ("moments") and by tokens ("tokens")."""
    for kind, flags in (("moments", []), ("tokens", ["-answer", "token"])):
        shutil.copytree(repo / DATA, repo / kind / "sample/preprocessed")
        result = call(repo, "data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-datasets", kind,
                      "-fields", "moment,gps", "-max_history", "10", *flags)
        assert result.code == 0, result.err
    return repo
