"""best_conf: the committed files load, and mistakes are named."""
from pathlib import Path

import pytest
import yaml

from checkins import config
from ga_llm.base.cli import UserError


@pytest.mark.parametrize("name", ["nyc", "tky", "ca", "sample", "istanbul", "austin"])
def test_committed_files(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    conf = config.load(f"best_conf/{name}.yml")
    assert conf.first_id == (0 if name == "nyc" else 1)
    assert conf.passes == {"nyc": None, "ca": 2}.get(name, 1)
    assert (conf.max_history, conf.max_current_with_history, conf.max_current, conf.max_similar) == (600, 200, 500, 200)
    if name != "nyc":
        assert (conf.min_poi_freq, conf.min_user_freq, conf.split_at) == (9, 9, [0.8, 0.9])
        assert (conf.isolation_hours, conf.session_time_interval) == (24, 1440)


COLUMNS = {role: role for role in config.CSV_COLUMNS}
NO_SPLITTING = {key: None for key in config.SPLITTING}


@pytest.mark.parametrize("changes, words", [
    ({"passes": None}, ["missing key passes"]),
    ({"min_poi_frequency": 9}, ["unknown key 'min_poi_frequency'", "min_poi_freq"]),
    ({"format": "foursquare"}, ["format", "tsmc2014", "'foursquare'"]),
    ({"first_id": 2}, ["first_id", "0 or 1"]),
    ({"max_history": "many"}, ["max_history", "whole number"]),
    ({"split_at": [0.9, 0.8]}, ["split_at"]),
    ({"columns": {"user": "u"}}, ["columns", "missing keys lat, lon, poi, time", "sample.yml"]),
    ({"columns": COLUMNS | {"split": "s"}}, ["isolation_hours", "split of their own", "remove it"]),
    ({"columns": COLUMNS | {"trajectory": "s"}}, ["session_time_interval", "trajectories of their own"]),
    ({"columns": COLUMNS | {"offset": "o"}, "time_zone": "Asia/Tokyo"}, ["time_zone", "none where columns"]),
    ({"time_zone": "Asia/Kyto"}, ["time_zone", "Asia/Tokyo", "'Asia/Kyto'"]), ({"time_zone": 540}, ["time_zone"]),
    ({"time_zone": "../UTC"}, ["time_zone"]), ({"time_zone": "Asia"}, ["time_zone"]),
    ({"raw": {"train": "a", "validate": "b"}} | NO_SPLITTING, ["raw", "missing key test"]),
    ({"raw": {"train": "a", "test": "b", "check_ins": "c"}} | NO_SPLITTING, ["raw", "unknown key 'check_ins'"]),
    ({"raw": {"train": "a", "test": "b"}, "columns": COLUMNS | {"split": "s"}} | NO_SPLITTING, ["columns", "no split"]),
    ({"raw": {"file": "x"}}, ["raw", "unknown key 'file'"]),
    ({"dataset_name": "town"}, ["dataset_name", "'city'"]),
    ({"published": {"tests": {}}}, ["published"]),
])
def test_mistakes_name_file_and_key(settings, changes, words):
    path = settings("csv")
    values = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(UserError) as error:
        config.load(path)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in ["best_conf/city.yml", *words])


BOX = {"south": -17.0, "west": 178, "north": -16, "east": -178}


@pytest.mark.parametrize("changes, words", [
    ({"bounding_box": BOX, "keep_states": ["Fiji"]}, ["unknown key 'keep_states'"]),
    ({"bounding_box": None}, ["missing key bounding_box", "istanbul.yml"]),
    ({"bounding_box": [1, 2, 3, 4]}, ["bounding_box", "a map of south, west"]),
    ({"bounding_box": {"south": 1}}, ["bounding_box: missing keys east, north, west"]),
    ({"bounding_box": BOX | {"south": -15}}, ["bounding_box", "south below north"]),
    ({"bounding_box": BOX | {"east": 178}}, ["bounding_box"]),
    ({"bounding_box": BOX | {"west": 181}}, ["bounding_box"]),
    ({"bounding_box": BOX | {"north": "16 S"}}, ["bounding_box"]),
    ({"bounding_box": BOX | {"north": float("nan")}}, ["bounding_box"]),
    ({"bounding_box": BOX, "time_zone": "Pacific/Fiji"}, ["unknown key 'time_zone'"])])
def test_mistakes_in_a_box(settings, changes, words):
    with pytest.raises(UserError) as error:
        config.load(settings("tist2015", **changes))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in ["best_conf/city.yml", *words])


@pytest.mark.parametrize("text", ["", "- a list", "key: [unclosed"])
def test_not_a_map(root, text):
    (root / "best_conf" / "x.yml").write_text(text)
    with pytest.raises(UserError, match="best_conf/x.yml") as error:
        config.load("best_conf/x.yml")
    assert "\n" not in str(error.value)
