"""A repository's root in a temporary folder, and check-ins written by hand."""
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from checkins import config

ROOT = Path(__file__).parents[2]
LIMITS = {"max_history": 600, "max_current": 500, "max_current_with_history": 200, "max_similar": 200,
          "max_history_with_similar": 200}
SPLITTING = {"min_poi_freq": 0, "min_user_freq": 0, "split_at": [0.8, 0.9], "isolation_hours": 24, "passes": 1,
             "session_time_interval": 1440}
RAW = {"csv": {"check_ins": "raw.csv"}, "tsmc2014": {"check_ins": "raw.txt"},
       "tist2015": {"check_ins": "raw.txt", "pois": "pois.txt"}, "snap": {"check_ins": "raw.txt"},
       "getnext": {"train": "train.csv", "validate": "val.csv", "test": "test.csv"},
       "gowalla": {"check_ins": "ca.csv", "all_check_ins": "all.txt", "spots": "spots.csv", "states": "states.json"}}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty repository's root, which is the working directory."""
    (tmp_path / "best_conf").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def settings(root):
    """Write best_conf/<name>.yml for a format; keywords override or add keys, None removes one. Returns its path."""
    def write(format_: str, name: str = "city", **changes) -> Path:
        values = {"dataset_name": name, "format": format_, "raw": RAW[format_], "raw_from": "put it there",
                  "first_id": 1, "published": {}, **LIMITS, **({} if format_ == "getnext" else SPLITTING)}
        if format_ == "csv":
            values["columns"] = {role: role for role in (*config.CSV_COLUMNS, "category")}
        if format_ == "gowalla":
            values["keep_states"] = ["Squareland"]
        values = {key: value for key, value in {**values, **changes}.items() if value is not None}
        path = Path("best_conf") / f"{name}.yml"
        path.write_text(yaml.safe_dump(values))
        return path
    return write


@pytest.fixture
def script(monkeypatch):
    """Run a script of data-preprocess/ in this process as from the command line."""
    import runpy

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "data-preprocess" / name), run_name="__main__")
    return run


@pytest.fixture
def error_of(script, capsys):
    """Run a script that must fail: exit code 2 and one line on stderr, which is returned."""
    def run(name: str, *arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script(name, *arguments)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return run


@pytest.fixture
def small_city(settings):
    """A CSV data set: two users, four POIs, a check-in every second hour, alternately; returns its config path.

    Users ann (40 check-ins) and bob (40); of 80 rows in time order, 64 are train, 8 validation, 8 test.
    """
    rows = []
    for hour in range(40):
        for user, offset in (("ann", 0), ("bob", 1)):
            time = pd.Timestamp("2024-01-01") + pd.Timedelta(hours=2 * hour + 30 * (hour // 4) + offset)
            rows.append(f"{user},{'wxyz'[hour % 4]},{'food' if hour % 2 else 'shop'},{40 + hour % 4},-73.5,{time}")
    Path("raw.csv").write_text("\n".join(["user,poi,category,lat,lon,time", *rows]) + "\n")
    return settings("csv")


@pytest.fixture
def real_data():
    """The folder of real check-ins, which may not be redistributed."""
    folder = Path(os.environ.get("GA_LLM_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "nyc" / "raw").is_dir():
        pytest.skip(f"real check-ins not in {folder}")
    return folder.resolve()
