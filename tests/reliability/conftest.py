"""A larger sample city than that of `repo`, for commands that take a moment."""
import shutil

import pytest
from commands import few_pairs
from harness import ROOT, call
from trials import CASES


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    """A larger sample city than that of `repo`, up to its questions."""
    city = tmp_path_factory.mktemp("city")
    shutil.copytree(ROOT / "best_conf", city / "best_conf")
    raw = ["data-preprocess/make_sample_raw.py", "-users", "300", "-out", "data-preprocess/data/sample/raw"]
    for command in (raw, *(CASES[name][0] for name in ("samples", "questions 2"))):
        result = call(city, *command)
        assert result.code == 0, result.err
    few_pairs(city, 2, 800)
    return city
