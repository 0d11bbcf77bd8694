"""run.py from raw files to samples: columns, ids, drops, counts, atomicity."""
import json
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path("datasets/city/preprocessed")
HEADER = "user,poi,category,lat,lon,time\n"


def write_raw(rows):
    """rows: (user, poi, category, hour)."""
    start = pd.Timestamp("2024-01-01")
    Path("raw.csv").write_text(HEADER + "".join(
        f"{user},{poi},{category},{10 + ord(poi[0]) % 7},20,{start + pd.Timedelta(hours=hour)}\n"
        for user, poi, category, hour in rows))


def table(name):
    return pd.read_csv(FOLDER / name)


@pytest.fixture
def unseen(settings, script):
    """Ten rows: 8 train, 1 validation, 1 test by split_at; kim and the POI `new` come after train."""
    write_raw([("bob", "b", "food", 0), ("bob", "a", "food", 1), ("ann", "b", "shop", 2), ("ann", "c", "food", 3),
               ("ann", "c", "food", 4), ("bob", "b", "food", 5), ("bob", "c", "food", 6), ("ann", "a", "food", 7),
               ("ann", "a", "cafe", 8),       # validation: a category not in train
               ("bob", "new", "food", 9),     # validation: a POI not in train
               ("kim", "a", "food", 10),      # test: a user not in train
               ("kim", "b", "food", 11),
               ("ann", "b", "shop", 12)])     # test
    def run(first_id):
        script("run.py", "-f", str(settings("csv", first_id=first_id, split_at=[8.5 / 13, 10.5 / 13])))
    return run


@pytest.mark.parametrize("first_id", [0, 1])
def test_unseen_values(unseen, first_id):
    unseen(first_id)
    n = {"user": 2, "poi": 3, "category": 2}
    encoding = json.loads((FOLDER / "label_encoding.json").read_text())
    assert encoding["user"]["values"] == ["ann", "bob"] and encoding["poi"]["values"] == ["a", "b", "c"]
    assert encoding["category"]["values"] == ["food", "shop"]
    assert {field: encoding[field]["unseen"] for field in n} == ({field: 0 for field in n} if first_id else n)

    sample = table("sample.csv")
    assert len(sample) == 13
    assert sample["UserId"].tolist()[:3] == [first_id + 1, first_id + 1, first_id]
    assert sample.loc[sample["Split"] == "test", "UserId"].tolist() == [encoding["user"]["unseen"]] * 2 + [first_id]
    assert sample.loc[9, "PoiId"] == encoding["poi"]["unseen"]
    # Users and POIs not in train go; a category not in train stays, as unseen.
    validate, test = table("validate_sample.csv"), table("test_sample.csv")
    assert validate["PoiCategoryId"].tolist() == [encoding["category"]["unseen"]]
    assert test["PoiId"].tolist() == [first_id + 1]
    assert table("city_gps_mapping.csv")["GPS_id"].tolist() == [first_id, first_id + 1, first_id + 2]


def test_columns_and_trajectories_over_splits(unseen):
    unseen(1)
    train, test = table("train_sample.csv"), table("test_sample.csv")
    assert train.columns.tolist() == ["UserId", "PoiId", "PoiCategoryId", "PoiCategoryName", "Latitude", "Longitude",
                                      "LocalTime", "TrajectoryId", "Split"]
    assert train["LocalTime"].tolist()[:2] == ["2024-01-01 00:00:00", "2024-01-01 01:00:00"]
    assert train.groupby("UserId")["TrajectoryId"].unique().map(list).to_dict() == {1: [0], 2: [1]}
    assert test["TrajectoryId"].tolist() == [0]    # ann's one trajectory, cut by the splits, keeps its id
    stats = json.loads((FOLDER / "stats.json").read_text())
    assert stats["train"] == {"users": 2, "pois": 3, "categories": 2, "trajectories": 2, "check_ins": 8}


def test_mapping_is_found_by_id_and_comes_from_train(unseen):
    unseen(1)
    places = table("city_gps_mapping.csv").set_index("GPS_id")
    assert places.loc[2, "Latitude"] == 10 + ord("b") % 7 and len(places) == 3


def test_filter_split_isolation_run_as_often_as_asked(settings, script):
    # ann is near bob's POI z twice, 30 h apart: isolated in pass 1, so that z falls to 2 check-ins for pass 2.
    rows = [("ann", "w", "k", hour) for hour in range(20)] + [("bob", "w", "k", hour) for hour in range(20)]
    rows += [("bob", "z", "k", 20), ("bob", "z", "k", 21), ("ann", "z", "k", 60)]
    write_raw(sorted(rows, key=lambda row: row[3]))
    pois = {}
    for passes in (1, 2):
        script("run.py", "-f", str(settings("csv", passes=passes, min_poi_freq=2)))
        sample = table("sample.csv")
        pois[passes] = (len(sample), sample["PoiId"].nunique())
    assert pois[1] == (42, 2) and pois[2] == (40, 1)


def test_single_check_in_trajectories_go(settings, script):
    rows = [("ann", "a", "k", hour) for hour in (0, 1, 2, 100, 200, 201, 202, 203)] + [("bob", "a", "k", 1)]
    write_raw(sorted(rows, key=lambda row: row[3]))
    script("run.py", "-f", str(settings("csv", isolation_hours=1000)))
    sample = table("sample.csv")    # ann's 100 and bob's only check-in are trajectories of one
    assert sample["TrajectoryId"].tolist() == [0] * 3 + [1] * 4 and set(sample["UserId"]) == {1}


def test_equal_times_keep_the_files_order(settings, script):
    write_raw([("ann", poi, "k", hour) for hour in range(10) for poi in ("q", "b", "z", "a")])
    script("run.py", "-f", str(settings("csv")))
    assert table("train_sample.csv")["PoiId"].tolist() == [3, 2, 4, 1] * 8


def test_table_of_counts_beside_the_published(settings, script, capsys):
    write_raw([("ann", "a", "k", hour) for hour in range(20)])
    script("run.py", "-f", str(settings("csv", published={"train": {"trajectories": 51661}})))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["city", "users", "pois", "categories", "trajectories", "check_ins"]
    assert lines[1].split() == ["train", "1", "1", "1", "1", "16"]
    assert lines[2].split() == ["published", "–", "–", "–", "51,661", "–"]


def test_same_bytes_twice_and_a_failing_run_damages_nothing(small_city, script, error_of):
    script("run.py", "-f", str(small_city))
    first = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert set(first) == {"sample.csv", "train_sample.csv", "validate_sample.csv", "test_sample.csv",
                          "city_gps_mapping.csv", "label_encoding.json", "stats.json"}
    script("run.py", "-f", str(small_city))
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == first
    with open("raw.csv", "a") as raw:
        raw.write("ann,w,food,95,0,2024-02-01\n")
    assert "raw.csv, line 82: lat 95" in error_of("run.py", "-f", str(small_city))
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == first


def test_nothing_left(settings, error_of):
    write_raw([("ann", "a", "k", hour) for hour in range(9)])
    message = error_of("run.py", "-f", str(settings("csv", min_poi_freq=9)))
    assert "no check-ins left for train" in message and "min_poi_freq" in message
    write_raw([("ann", "a", "k", 0), ("ann", "a", "k", 1)])
    assert "no check-ins left for test" in error_of("run.py", "-f", str(settings("csv", split_at=[1.0, 1.0])))


def test_unknown_config(root, error_of):
    assert "best_conf/atlantis.yml: not found" in error_of("run.py", "-f", "best_conf/atlantis.yml")


OWN = [("ann-é", "w", "t1", "train"), ("ann-é", "x", "t1", "Training"), ("bob", "w", "t1", "train"),
       ("bob", "x", "t1", "train"), ("ann-é", "w", "t2", "val"), ("ann-é", "x", "t2", "validation"),
       ("ann-é", "x", "t3", "test"), ("ann-é", "w", "t3", "test"), ("kim", "w", "t9", "test"),
       ("kim", "x", "t9", "test")]


@pytest.mark.parametrize("in_files", [True, False])
@pytest.mark.parametrize("own_trajectories", [True, False])
def test_own_splits_and_trajectories_with_users_that_are_text(settings, script, in_files, own_trajectories):
    """All within minutes: without the file's own, a user's check-ins are one trajectory."""
    header, made = "user;poi;lat;lon;time;part;trip\n", enumerate(OWN)
    rows = [f"{user};{poi};1;2;2024-01-01 10:{i:02};{split};{trip}\n" for i, (user, poi, trip, split) in made]
    columns = {role: role for role in ("user", "poi", "lat", "lon", "time")}
    columns |= {"trajectory": "trip"} if own_trajectories else {}
    changes = {key: None for key in ("min_poi_freq", "min_user_freq", "split_at", "isolation_hours", "passes")}
    changes["session_time_interval"] = None if own_trajectories else 60
    if in_files:
        changes["raw"] = {"train": "1.csv", "validate": "2.csv", "test": "3.csv"}
        for name, part in changes["raw"].items():
            Path(part).write_text(header + "".join(row for row in rows if f";{name[:3]}" in row.lower()))
    else:
        columns["split"] = "part"
        Path("raw.csv").write_text(header + "".join(rows))
    script("run.py", "-f", str(settings("csv", columns=columns, **changes)))
    assert json.loads((FOLDER / "label_encoding.json").read_text())["user"]["values"] == ["ann-é", "bob"]
    sample = table("sample.csv")
    assert sample["Split"].tolist() == ["train"] * 4 + ["validate"] * 2 + ["test"] * 4
    trajectories = sample["TrajectoryId"].tolist()
    assert len({*trajectories[:2], *trajectories[4:8]}) == (3 if own_trajectories else 1)
    assert trajectories[0] != trajectories[2]       # t1 is ann's and bob's
    assert table("test_sample.csv")["UserId"].tolist() == [1, 1]     # kim is not in train
    script("process_llm_gps.py", "-dataset_name", "city", "-fields", "time,user,poi,coordinates,gps")
    pairs = json.loads(next(FOLDER.glob("train_qa*gps.json")).read_text())
    assert len(pairs) == 2


@pytest.mark.parametrize("in_files", [True, False])
def test_names_of_places(settings, script, in_files):
    """The most frequent in train, of equals the first, by raw ids, in a file of its own; all else is as without."""
    visits = [("007", "Café <b>Ü", "train"), ("x", "", "train"), ("b", "Two", "train"), ("b", "One", "train"),
              ("007", "Late", "train"), ("007", "Café <b>Ü", "train"), ("b", "One", "test"), ("007", "Late", "test")]
    header, columns = "user,poi,called,lat,lon,time,trip,part\n", ("user", "poi", "lat", "lon", "time")
    rows = [f"ann,{poi},{name},1,2,2024-01-01 10:{i:02},{split},{split}\n"
            for i, (poi, name, split) in enumerate(visits)]
    without = {key: None for key in ("min_poi_freq", "min_user_freq", "split_at", "isolation_hours", "passes",
                                     "session_time_interval")}
    roles = {role: role for role in columns} | {"trajectory": "trip"}
    if in_files:
        without["raw"] = {"train": "train.csv", "test": "test.csv"}
        for split in without["raw"]:
            Path(f"{split}.csv").write_text(header + "".join(row for row in rows if split in row))
    else:
        roles["split"] = "part"
        Path("raw.csv").write_text(header + "".join(rows))
    script("run.py", "-f", str(settings("csv", columns=roles, **without)))
    alone = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert "city_poi_names.csv" not in alone
    script("run.py", "-f", str(settings("csv", columns=roles | {"name": "called"}, **without)))
    named = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert named.pop("city_poi_names.csv").decode() == "poi,name\n007,Café <b>Ü\nb,Two\n" and named == alone
    script("run.py", "-f", str(settings("csv", columns=roles | {"name": "poi", "category": "poi"}, **without)))
    assert (FOLDER / "city_poi_names.csv").read_text() == "poi,name\n007,007\nb,b\nx,x\n"


def test_own_split_files_may_lack_validation(settings, script):
    header = "user,poi,lat,lon,time,trip\n"
    columns = {role: role for role in ("user", "poi", "lat", "lon", "time")} | {"trajectory": "trip"}
    without = {key: None for key in ("min_poi_freq", "min_user_freq", "split_at", "isolation_hours", "passes",
                                     "session_time_interval")}
    for name in "ab":
        Path(f"{name}.csv").write_text(header + f"u,p,1,2,2024-01-01 10:00,{name}\nu,p,1,2,2024-01-01 11:00,{name}\n")
    Path("c.csv").write_text(header)
    stats = []
    for raw in ({"train": "a.csv", "test": "b.csv"}, {"train": "a.csv", "validate": "c.csv", "test": "b.csv"}):
        script("run.py", "-f", str(settings("csv", raw=raw, columns=columns, **without)))
        stats.append(json.loads((FOLDER / "stats.json").read_text()))
    assert stats[0] == stats[1] and stats[0]["validate"]["check_ins"] == 0 and stats[0]["test"]["check_ins"] == 2


def test_a_split_that_is_none(settings, error_of):
    Path("raw.csv").write_text("user,poi,lat,lon,time,part\nu,p,1,2,2024-01-01,train\nu,p,1,2,2024-01-01,later\n")
    columns = {role: role for role in ("user", "poi", "lat", "lon", "time")} | {"split": "part"}
    without = {key: None for key in ("min_poi_freq", "min_user_freq", "split_at", "isolation_hours", "passes")}
    message = error_of("run.py", "-f", str(settings("csv", columns=columns, **without)))
    assert "raw.csv, line 3: part 'later' is none of train, " in message
