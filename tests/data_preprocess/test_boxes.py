"""Files of the whole world and a box in them: Foursquare's global-scale check-ins, Gowalla and Brightkite of SNAP."""
import datetime
import json
from pathlib import Path

import make_sample_raw as tool
import pandas as pd
import pytest

from checkins import config, readers
from ga_llm.base.cli import UserError

ASCTIME = "%a %b %d %H:%M:%S +0000 %Y"
FIJI = {"south": -17.0, "west": 178.0, "north": -16.0, "east": -178.0}
JAPAN = {"south": 30, "west": 130, "north": 45, "east": 150}
COLUMNS = ["user", "venue", "category id", "category", "latitude", "longitude", "offset", "utc"]
FOLDER = Path("datasets/city/preprocessed")


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """The check-ins of a generated city near Tokyo, in the file's order."""
    folder = tmp_path_factory.mktemp("raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_sample_raw.py", "-users", "40", "-days", "60", "-out", str(folder)])
        tool.main()
    return pd.read_csv(folder / "dataset_TSMC2014_SAMPLE.txt", sep="\t", names=COLUMNS, encoding="latin-1", dtype=str)


def tsv(table: pd.DataFrame, path: str) -> None:
    table.to_csv(path, sep="\t", header=False, index=False)


def write_tist(rows: pd.DataFrame) -> None:
    """Among check-ins of the rest of the world."""
    elsewhere = rows.assign(venue="far" + rows["venue"].str[:4], latitude="-3.5", longitude="-60.0")
    everywhere = pd.concat([elsewhere.head(50), rows, elsewhere.tail(50)])
    pois = everywhere.drop_duplicates("venue").assign(country="JP")
    tsv(everywhere[["user", "venue", "utc", "offset"]], "raw.txt")
    tsv(pois[["venue", "latitude", "longitude", "category", "country"]], "pois.txt")


def write_snap(rows: pd.DataFrame) -> None:
    times = pd.to_datetime(rows["utc"], format=ASCTIME).dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    table = rows.assign(time=times)[["user", "time", "latitude", "longitude", "venue"]]
    nowhere = pd.DataFrame([["7", "2012-05-01T10:00:00Z", "405.0", "-60", "off"], ["7", "", "", "", ""],
                            ["7", "2012-05-01T10:00:00Z", "0.0", "0.0", "0" * 32]], columns=table.columns)
    tsv(pd.concat([nowhere, table]), "raw.txt")


def samples(settings, script, format_: str, **changes) -> pd.DataFrame:
    script("run.py", "-f", str(settings(format_, min_poi_freq=2, min_user_freq=9, **changes)))
    return pd.read_csv(FOLDER / "sample.csv")


@pytest.mark.parametrize("chunk", [997, 500_000])
def test_a_generated_city_among_the_world(settings, script, city, monkeypatch, caplog, chunk):
    """All three formats tell the same check-ins, and so the samples are the same, but for what a category is called."""
    monkeypatch.setattr(readers, "CHUNK", chunk)
    tsv(city, "raw.txt")
    expected = samples(settings, script, "tsmc2014")
    assert len(expected) > 1000
    write_tist(city)
    found = samples(settings, script, "tist2015", bounding_box=JAPAN)
    pd.testing.assert_frame_equal(found.drop(columns="PoiCategoryId"), expected.drop(columns="PoiCategoryId"))
    assert json.loads((FOLDER / "label_encoding.json").read_text())["category"]["values"] == sorted(
        expected.loc[expected["Split"] == "train", "PoiCategoryName"].unique())
    write_snap(city)
    found = samples(settings, script, "snap", bounding_box=JAPAN, time_zone="Asia/Tokyo")
    other = ["PoiCategoryId", "PoiCategoryName"]
    pd.testing.assert_frame_equal(found.drop(columns=other), expected.drop(columns=other))
    assert set(found["PoiCategoryName"]) == {"place"} and "1 rows with empty cells left out" in caplog.text
    script("process_llm_gps.py", "-dataset_name", "city", "-fields", "time,user,poi,coordinates,gps")
    assert "place" not in next(FOLDER.glob("test_qa*gps.txt")).read_text()


def test_a_box_that_cuts_a_city(settings, city):
    write_tist(city)
    box = {"south": 35.5, "west": 139.7, "north": 35.7, "east": 139.8}
    latitude, longitude = city["latitude"].astype(float), city["longitude"].astype(float)
    inside = latitude.between(35.5, 35.7) & longitude.between(139.7, 139.8)
    found = readers.read(config.load(settings("tist2015", bounding_box=box)))
    assert 0 < len(found) == inside.sum() < len(city)
    assert sorted(found["PoiId"]) == sorted(city.loc[inside, "venue"])


def test_a_box_across_180_degrees(settings):
    longitudes = [177.9, 178, 179.9, 180, -180, -178, -177.9, 0]
    Path("raw.txt").write_text("".join(f"{user}\tv{user}\tTue Apr 03 23:00:09 +0000 2012\t720\n" for user in range(8)))
    Path("pois.txt").write_text("".join(f"v{poi}\t-16.5\t{longitude}\tBeach\tFJ\n" for poi, longitude in
                                        enumerate(longitudes)))
    found = readers.read(config.load(settings("tist2015", bounding_box=FIJI)))
    assert found["UserId"].tolist() == [1, 2, 3, 4, 5] and found["PoiCategoryId"].unique().tolist() == ["Beach"]
    assert set(found["LocalTime"]) == {datetime.datetime(2012, 4, 4, 11, 0, 9)}
    Path("raw.txt").write_text("".join(f"{user}\t2010-10-19T23:55:27Z\t-16.5\t{longitude}\tv\n" for user, longitude in
                                       enumerate(longitudes)))
    found = readers.read(config.load(settings("snap", bounding_box=FIJI)))
    assert found["UserId"].tolist() == [1, 2, 3, 4, 5]
    assert set(found["LocalTime"]) == {datetime.datetime(2010, 10, 19, 23, 55, 27)}     # UTC, without a time zone


CHECK_IN = "7\tv1\tTue Apr 03 18:00:09 +0000 2012\t720\n"
POI = "v1\t-16.5\t179\tBeach\tFJ\n"
SNAP = "7\t2010-10-19T23:55:27Z\t-16.5\t179\tv1\n"


@pytest.mark.parametrize("format_, raw, pois, words", [
    ("tist2015", CHECK_IN, None, ["pois.txt: not found; put it there"]),
    ("tist2015", CHECK_IN + CHECK_IN.replace("720", "7200"), POI, ["raw.txt, line 2: timezone offset 7200"]),
    ("tist2015", CHECK_IN + CHECK_IN.replace("7\t", "x\t", 1), POI, ["raw.txt, line 2: user 'x'"]),
    ("tist2015", CHECK_IN + "7\tv1\n", POI, ["raw.txt, line 2: UTC time is empty", "2 of 4 columns"]),
    ("tist2015", CHECK_IN, POI + "v2\tx\t179\tBeach\tFJ\n", ["pois.txt, line 2: latitude 'x'"]),
    ("tist2015", CHECK_IN, "v2\t-16.5\t179\t<>\tFJ\n", ["pois.txt, line 1: category name '<>' is blank"]),
    ("tist2015", CHECK_IN, "v1\t16.5\t179\tBeach\tFJ\n", ["pois.txt: nothing in the bounding_box", "south -17.0"]),
    ("tist2015", CHECK_IN.replace("v1", "v2"), POI, ["raw.txt: nothing in the bounding_box of best_conf/city.yml"]),
    ("snap", SNAP.replace("-16.5", "16.5"), None, ["raw.txt: nothing in the bounding_box"]),
    ("snap", SNAP + SNAP.replace("-16.5", "south"), None, ["raw.txt, line 2: latitude 'south'"]),
    ("snap", SNAP + SNAP.replace("2010-10-19", "2010-13-19"), None, ["raw.txt, line 2: UTC time '2010-13-19"]),
    ("snap", SNAP + SNAP.replace("7\t", "7.5\t", 1), None, ["raw.txt, line 2: user 7.5"])])
def test_mistakes(settings, format_, raw, pois, words):
    Path("raw.txt").write_text(raw)
    if pois is not None:
        Path("pois.txt").write_text(pois)
    with pytest.raises(UserError) as error:
        readers.read(config.load(settings(format_, bounding_box=FIJI)))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
