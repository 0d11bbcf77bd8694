"""The Gowalla join on a square state and five spots."""
import json
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("shapely")

from checkins import readers  # noqa: E402

CRAFT = "[{'url': '/categories/89', 'name': 'Craftsman'}]"


@pytest.fixture
def raw(settings):
    """Squareland is 10–20 N, 30–40 E; Elsewhere lies beside it."""
    square = [[[30, 10], [40, 10], [40, 20], [30, 20], [30, 10]]]
    beside = [[[50, 10], [60, 10], [60, 20], [50, 20], [50, 10]]]
    Path("states.json").write_text(json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "properties": {"name": name}, "geometry": {"type": "Polygon", "coordinates": ring}}
        for name, ring in (("Squareland", square), ("Elsewhere", beside))]}))
    # Spot 2's own coordinates lie outside: the check-in's count. Spot 3 has no category.
    Path("spots.csv").write_text(f'id,lng,lat,spot_categories\n1,35,15,"{CRAFT}"\n2,0,0,"{CRAFT}"\n3,35,15,\n')
    Path("all.txt").write_text("".join(f"{user}\t2010-10-19T23:55:2{user}Z\t{lat}\t{lng}\t{spot}\n" for
                                       user, lat, lng, spot in [(1, 15, 35, 1),      # inside
                                                                (2, 15, 35, 2),      # inside by its own coordinates
                                                                (3, 15, 35, 3),      # no category
                                                                (4, 15, 35, 99),     # no such spot
                                                                (5, 15, 55, 1),      # in the other state
                                                                (6, 15, 45, 1),      # in neither
                                                                (7, 10, 30, 1),      # on the corner: intersects
                                                                (8, 405.0, 35, 1)]))  # off the globe
    return settings("gowalla", keep_states=["Squareland"])


def test_join(raw, script):
    Path("best_conf/ca.yml").write_text(raw.read_text().replace("dataset_name: city", "dataset_name: ca"))
    script("generate_ca_raw.py")
    rows = pd.read_csv("ca.csv")
    assert rows.columns.tolist() == ["UserId", "PoiId", "PoiCategoryId", "Latitude", "Longitude", "UTCTime"]
    assert rows["UserId"].tolist() == [1, 2, 7]
    assert rows.loc[1].tolist() == [2, 2, CRAFT, 15.0, 35.0, "2010-10-19T23:55:22Z"]


def test_several_states_and_small_chunks(raw, script, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 2)
    raw.write_text(raw.read_text().replace("- Squareland", "- Squareland\n- Elsewhere"))
    Path("best_conf/ca.yml").write_text(raw.read_text().replace("dataset_name: city", "dataset_name: ca"))
    script("generate_ca_raw.py")
    assert pd.read_csv("ca.csv")["UserId"].tolist() == [1, 2, 5, 7]


ROWS = ["1", "2010-10-19T23:55:21Z", "15", "35", "1"], ["5", "2010-10-19T23:55:25Z", "15", "55", "1"]
UNIX = {"2010-10-19T23:55:21Z": "1287532521", "2010-10-19T23:55:25Z": "1287532525"}


@pytest.mark.parametrize("header, order, separator, time", [
    (None, [0, 1, 2, 3, 4], ",", str), (["user", "check-in_time", "latitude", "longitude", "location_id"],
                                        [0, 1, 2, 3, 4], "\t", str),
    (["userid", "placeid", "datetime", "lat", "lng"], [0, 4, 1, 2, 3], ",", str),
    (["lat", "lng", "spot", "uid", "UTC_time"], [2, 3, 4, 0, 1], ";", UNIX.get),
    (["lat", "lng", "spot", "uid", "UTC_time"], [2, 3, 4, 0, 1], ",", lambda time: f"{UNIX[time]}000"),
    (None, [0, 1, 2, 3, 4], "\t", lambda time: time.replace("T", " ").replace("Z", "")),
    (None, [0, 1, 2, 3, 4], "\t", lambda time: time.replace("19T23", "20T08").replace("Z", "+09:00"))])
def test_check_ins_as_they_go_round(raw, script, header, order, separator, time):
    Path("best_conf/ca.yml").write_text(raw.read_text().replace("dataset_name: city", "dataset_name: ca"))
    Path("all.txt").unlink()
    rows = [[row[0], time(row[1]), *row[2:]] for row in ROWS]
    text = "".join(separator.join(row) + "\n" for row in [header] * (header is not None)
                   + [[row[i] for i in order] for row in rows])
    Path("all.csv").write_text(text)
    script("generate_ca_raw.py")
    assert Path("ca.csv").read_text() == ("UserId,PoiId,PoiCategoryId,Latitude,Longitude,UTCTime\n"
                                          f'1,1,"{CRAFT}",15,35,2010-10-19T23:55:21Z\n')


@pytest.mark.parametrize("name, text, words", [
    ("states.json", "{", ["states.json", "GeoJSON"]),
    ("states.json", '{"features": []}', ["states.json", "no feature named 'Squareland'"]),
    ("spots.csv", "id,lat\n1,2\n", ["spots.csv", "no column spot_categories"]),
    ("all.txt", "1\t2010-10-19T23:55:27Z\t15\t35\t1\n1\t2010-10-19T23:55:27Z\tx\t35\t1\n",
     ["all.txt, line 2", "latitude 'x'"]),
    ("all.txt", "1\t2010-10-19T23:55:27Z\t15\t35\n", ["all.txt, line 1", "4 of 5 columns"]),
    ("all.txt", "1\t2010-10-19T23:55:27Z\t0\t0\t1\n", ["all.txt", "no check-in in Squareland"]),
    ("all.txt", None, ["all.txt: not found", "put it there"]),
])
def test_mistakes_leave_the_old_file(raw, error_of, name, text, words):
    Path("best_conf/ca.yml").write_text(raw.read_text().replace("dataset_name: city", "dataset_name: ca"))
    Path("ca.csv").write_text("old")
    Path(name).unlink() if text is None else Path(name).write_text(text)
    message = error_of("generate_ca_raw.py")
    assert all(word in message for word in words), message
    assert Path("ca.csv").read_text() == "old"


def state(*longitudes) -> str:
    """A GeoJSON of Squareland as polygons from 10 to 20 N, each between two of the longitudes."""
    polygons = [[[[west, 10], [east, 10], [east, 20], [west, 20], [west, 10]]] for west, east in longitudes]
    return json.dumps({"features": [{"properties": {"name": "Squareland"}, "geometry": {
        "type": "MultiPolygon", "coordinates": polygons}}]})


@pytest.mark.parametrize("longitudes", [[(-187, -170)], [(173, 190)], [(173, 180), (-180, -170)]],
                         ids=["runs on to the west, as Alaska's does", "runs on to the east", "cut in two"])
def test_a_state_across_180_degrees(raw, script, longitudes):
    Path("best_conf/ca.yml").write_text(raw.read_text().replace("dataset_name: city", "dataset_name: ca"))
    Path("states.json").write_text(state(*longitudes))
    Path("all.txt").write_text("".join(f"{user}\t2010-10-19T23:55:27Z\t15\t{longitude}\t1\n" for user, longitude in
                                       enumerate([174, -175, 180, -180, 172, -169, 0, 179.99])))
    script("generate_ca_raw.py")
    assert pd.read_csv("ca.csv")["UserId"].tolist() == [0, 1, 2, 3, 7]


def test_a_state_that_jumps_is_refused_and_one_around_the_globe_is_not(raw, script, error_of):
    Path("best_conf/ca.yml").write_text(raw.read_text().replace("dataset_name: city", "dataset_name: ca"))
    Path("states.json").write_text(state((-179, 175)))
    assert "Squareland" in (message := error_of("generate_ca_raw.py")) and "181 for -179" in message
    Path("states.json").write_text(state((-180, 180)))
    script("generate_ca_raw.py")
    assert pd.read_csv("ca.csv")["UserId"].tolist() == [1, 2, 5, 6, 7]
