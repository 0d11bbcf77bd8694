"""recommend.py: asks in the words of the training, answers as the evaluation does, refuses what is no check-in."""
import datetime
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from commands import DATA, evaluation
from harness import call, refusal
from sklearn.metrics.pairwise import haversine_distances
from test_export import CHECKPOINT, EXPORT

from ga_llm.base import prompts
from ga_llm.serving import check_in_files, recommendation
from ga_llm.serving.places import read_categories, read_places

MODEL = "outputs/for_recommend"


@pytest.fixture(scope="module")
def exported(repo):
    result = call(repo, *EXPORT, "--dtype", "float32", "--export_dir", MODEL)
    assert result.code == 0, result.err
    return repo


def histories(repo):
    """(encoded user, time of the target, train check-ins and those of the test trajectory) of each test pair."""
    train, test = (pd.read_csv(repo / DATA / f"{split}_sample.csv") for split in ("train", "test"))
    for (user, _), own in test.groupby(["UserId", "TrajectoryId"]):
        yield user, own["LocalTime"].max(), pd.concat([train[train["UserId"] == user], own])


def raw_ids(repo, field):
    encoding = json.loads((repo / DATA / "label_encoding.json").read_text())[field]
    return dict(enumerate(encoding["values"], start=encoding["first_id"]))


@pytest.mark.parametrize("fields", [None, "moment,gps", "moment,gps,category"])
def test_the_prompt_is_that_of_the_test_file(exported, tmp_path, monkeypatch, fields):
    """Each test pair's own check-ins make the line that process_llm_gps.py wrote of them, up to the answer's id."""
    monkeypatch.chdir(exported)
    asking = recommendation.read_asking(exported / MODEL)
    places, folder = read_places("sample", "datasets", asking.places, "sample"), exported / DATA
    if fields:
        folder = tmp_path / "sample/preprocessed"
        shutil.copytree(exported / DATA, folder)
        result = call(exported, "data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-datasets",
                      str(tmp_path), "-fields", fields, "-max_history", "10")
        assert result.code == 0, result.err
        asking.questions["fields"] = [field for field in prompts.ORDER if field in f"poi,{fields}".split(",")]
    lines = (folder / "test_qa_pairs_kqt_200items_sample_llm_without_sim_gps.txt").read_text().splitlines()
    made, file = [], tmp_path / "mine.csv"
    for user, time, rows in histories(exported):
        rows.rename(columns={"PoiId": "GPS_id"})[["LocalTime", "GPS_id"]].to_csv(file, index=False)
        at = check_in_files.read_time(time)
        past = check_in_files.before(check_in_files.read_check_ins(str(file), places, None), at, "it")
        made.append(recommendation.pair(past, at, user, places, asking).rpartition("POI id ")[0])
    assert made == [line.rpartition("POI id ")[0] for line in lines] and len(made) > 20


@pytest.mark.parametrize("hours, gap, most, step, with_history, history, current", [
    ([80, 50, 20, 10], 24, 9, None, 200, [80, 50], [20, 10]),      # 50 to 20: 30 hours
    ([74, 50, 26, 2], 24, 9, None, 200, [], [74, 50, 26, 2]),      # a gap of just 24 hours belongs
    ([80, 50, 30], 24, 9, None, 200, [80, 50, 30], []),            # the target begins a trajectory of its own
    ([200, 150, 100, 50, 10], 24, 2, None, 200, [100, 50], [10]),
    ([200, 150, 100, 50, 10], 24, 3, 2, 200, [100, 50], [10]),     # of 4, the first at a multiple of 2
    ([200, 150, 100, 50, 10], 24, 0, None, 200, [], [10]),
    ([80, 20, 10], 24, 9, None, 1, [], [20, 10])],
    ids=["a gap", "just no gap", "no current", "the latest", "a step", "no history", "a long current"])
def test_history_and_current(hours, gap, most, step, with_history, history, current):
    now = datetime.datetime(2013, 1, 20)
    rows = [check_in_files.CheckIn(now - datetime.timedelta(hours=h), h) for h in hours]
    asking = recommendation.Asking(64, "", "", {"max_history": most, "history_step": step}, 60 * gap, 500, with_history)
    found = recommendation.split(rows, now, asking)
    assert [[row.poi for row in part] for part in found] == [history, current]


def test_what_one_user_is_told(exported, tmp_path, caplog):
    """The places in the order and with the odds of the evaluation, from raw ids; a table; a map."""
    pytest.importorskip("folium")
    checkpoint = shutil.copytree(exported / CHECKPOINT, tmp_path / "checkpoint-6")
    command = evaluation(checkpoint, "--dtype", "float32", "--limit", "4")
    assert call(exported, *command).code == 0
    expected = [json.loads(line) for line in (checkpoint / "limit4/predictions.jsonl").open()][0]
    user, time, rows = next(histories(exported))
    assert (user, time) == (expected["user"], expected["time"])
    poi, file = raw_ids(exported, "poi"), tmp_path / "mine.csv"
    pd.DataFrame({"Local time": rows["LocalTime"], "POI_id": rows["PoiId"].map(poi)}).to_csv(file, index=False, sep=";")
    flags = ["--model", MODEL, "--check_ins", file, "--time", time, "-k", "20", "--user",
             raw_ids(exported, "user")[user]]
    result = call(exported, "recommend.py", *flags, "--json", "--map", tmp_path / "map.html", "--dtype", "float32")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    places = told["places"]
    assert [place["poi"] for place in places] == [poi for poi, _ in expected["top"]]
    log_p = np.log([place["probability"] * told["probability_of_all_pois"] for place in places])
    np.testing.assert_allclose(log_p, [value for _, value in expected["top"]], atol=2e-4)
    assert places[0]["id"] == poi[places[0]["poi"]] and told["user"] == user

    page = (tmp_path / "map.html").read_text()
    assert page.count("L.marker(") == 20 and f"{places[0]['latitude']}, {places[0]['longitude']}" in page

    text = call(exported, "recommend.py", *flags[:6], "-k", "9999", "--dtype", "float32")
    lines = text.out.splitlines()
    assert text.code == 0 and max(map(len, lines)) <= 80 and "no --user" in caplog.text
    shares = [float(share) for share in re.findall(r"(\d+\.\d\d) %", text.out)]
    assert len(shares) == len(pd.read_csv(exported / DATA / "sample_gps_mapping.csv"))
    assert sum(shares) == pytest.approx(100, abs=0.005 * len(shares)) and shares == sorted(shares, reverse=True)


@pytest.fixture(scope="module")
def asked(exported):
    """A test pair's check-ins as a file, and how the model ranks all places without a filter."""
    (exported / "asked").mkdir()
    user, time, rows = list(histories(exported))[3]
    rows.rename(columns={"PoiId": "GPS_id"})[["LocalTime", "GPS_id"]].to_csv(exported / "asked/mine.csv", index=False)
    flags = ["--model", MODEL, "--check_ins", "asked/mine.csv", "--time", time, "--user",
             raw_ids(exported, "user")[user], "--dtype", "float32"]
    result = call(exported, "recommend.py", *flags, "-k", "9999", "--json")
    assert result.code == 0, result.err
    past = rows[rows["LocalTime"] < time].sort_values("LocalTime", kind="stable")["PoiId"].tolist()
    return flags, json.loads(result.out), past


@pytest.mark.parametrize("flags", [["--exclude", "visited"], ["--within", "1.5"], ["--candidates", "asked/some.csv"],
                                   ["--exclude", "visited", "--within", "6", "--candidates", "asked/some.csv"]],
                         ids=["visited", "within", "candidates", "all"])
def test_filters_leave_order_and_probabilities(exported, asked, flags, monkeypatch):
    """The places left are those of the ranking of all, as probable as the model has them; no other is asked for."""
    base, everything, past = asked
    mapping = pd.read_csv(exported / DATA / "sample_gps_mapping.csv").set_index("GPS_id")
    some, raw = mapping.index[::2].tolist(), raw_ids(exported, "poi")
    (exported / "asked/some.csv").write_text("\n".join(["name;POI", *(f"x;{raw[poi]}" for poi in some)]) + "\n")
    radians = np.radians(mapping[["Latitude", "Longitude"]].to_numpy())
    km = 6371.0088 * haversine_distances(radians, np.radians([mapping.loc[past[-1]].to_numpy()]))[:, 0]
    left = set(mapping.index)
    left -= set(past) if "visited" in flags else set()
    left &= set(mapping.index[km <= float(flags[flags.index("--within") + 1])]) if "--within" in flags else left
    left &= set(some) if "--candidates" in flags else left
    assert 1 < len(left) < len(mapping)

    tries, build = [], recommendation.ranking.Trie
    monkeypatch.setattr(recommendation.ranking, "Trie", lambda spelled: tries.append(set(spelled)) or build(spelled))
    result = call(exported, "recommend.py", *base, *flags, "-k", "9999", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert tries == [set(mapping.index), left] and told["ranked"] == len(left) and told["pointer"] is False
    expected = [place for place in everything["places"] if place["poi"] in left]
    assert [place["poi"] for place in told["places"]] == [place["poi"] for place in expected]
    assert [place["km"] for place in told["places"]] == [place["km"] for place in expected]
    own = np.array([place["probability"] for place in told["places"]])
    np.testing.assert_allclose(own, [place["probability"] * everything["probability_of_all_pois"]
                                     for place in expected], rtol=1e-4)
    assert told["probability_of_places_left"] == pytest.approx(own.sum()) and "probability_of_all_pois" not in told
    text = call(exported, "recommend.py", *base, *flags, "-k", "3").out
    assert max(map(len, text.splitlines())) <= 80 and text.count(" %") == min(3, len(left))
    assert f"of {len(left)} places that the filters leave" in " ".join(text.split())
    assert "not normalised over the places that are left" in " ".join(text.split())


def test_nothing_is_left(exported, asked, tmp_path):
    flags = [*asked[0], "--exclude", "visited", "--within", "0", "--map", tmp_path / "map.html"]
    told = call(exported, "recommend.py", *flags, "--json")
    assert told.code == 0 and json.loads(told.out)["places"] == [] and not (tmp_path / "map.html").exists()
    assert json.loads(told.out)["note"] == "the filters leave no place" and json.loads(told.out)["ranked"] == 0
    text = " ".join(call(exported, "recommend.py", *flags).out.split())
    assert "0 of 0 places" in text and text.endswith("none, the filters leave no place.")


def everyone(exported, path):
    """Write a CSV of several users, row by row in turns; returns them in the order in which it first names them, and
    {user: check-ins} of those who have some."""
    known, parts = raw_ids(exported, "user"), []
    for user, _, rows in list(histories(exported))[:6]:
        if str(known[user]) not in [name for name, _ in parts]:
            parts.append((str(known[user]), rows))
    parts[1] = ("a stranger", parts[1][1])
    rows = pd.concat([rows.assign(user=user, turn=range(len(rows))) for user, rows in parts]).sort_values(
        "turn", kind="stable")
    rows = rows.rename(columns={"PoiId": "GPS_id"})[["LocalTime", "GPS_id", "user"]].astype(str)
    late = pd.DataFrame({"LocalTime": ["2999-01-01 00:00:00"], "GPS_id": ["1"], "user": ["late"]})
    nowhere = pd.DataFrame({"LocalTime": ["2012-01-01 00:00:00"], "GPS_id": ["99999"], "user": ["nowhere"]})
    pd.concat([rows[:1], late, nowhere, rows[1:]]).to_csv(path, index=False)
    return [parts[0][0], "late", "nowhere", *(name for name, _ in parts[1:])], dict(parts)


@pytest.mark.parametrize("flags", [[], ["--exclude", "visited", "--within", "4"]], ids=["all", "filtered"])
def test_many_users_are_told_what_each_is(exported, tmp_path, flags, caplog):
    names, parts = everyone(exported, tmp_path / "everyone.csv")
    common = ["--model", MODEL, "--time", "2013-03-01 12:00", "-k", "4", "--dtype", "float32", *flags]
    result = call(exported, "recommend.py", *common, "--check_ins", tmp_path / "everyone.csv", "--all_users")
    assert result.code == 0, result.err
    told = [json.loads(line) for line in result.out.splitlines()]
    assert [line["user_id"] for line in told] == names and len(parts) >= 3
    assert f"3 of {len(names)} users are not in train, such as late" in caplog.text
    for line in told:
        if line["user_id"] in ("late", "nowhere"):
            assert line["places"] == [] and "no check-in before the time" in line["note"]
            continue
        rows = parts[line["user_id"]]
        rows.rename(columns={"PoiId": "GPS_id"})[["LocalTime", "GPS_id"]].to_csv(tmp_path / "one.csv", index=False)
        one = call(exported, "recommend.py", *common, "--check_ins", tmp_path / "one.csv", "--user", line["user_id"],
                   "--json")
        assert json.loads(one.out) == line and 1 <= len(line["places"]) <= 4


@pytest.mark.parametrize("flags, names", [
    (["--user", "7"], ["--user", "--all_users"]), (["--map", "m.html"], ["--map", "--all_users"]),
    ([], ["user.csv, line 1: no column of the user"])])
def test_what_does_not_go_with_many_users(exported, tmp_path, flags, names):
    (tmp_path / "user.csv").write_text(HEAD + "1\n")
    command = ["recommend.py", "--model", MODEL, "--check_ins", tmp_path / "user.csv", "--all_users", "--time",
               "2012-06-01 10:00", *ENCODED]
    refusal(call(exported, *command, *flags), *names)
    (tmp_path / "user.csv").write_text("user,time,poi\nann,2012-05-01 10:00,1\n ,2012-05-01 10:00,1\n")
    if not flags:
        refusal(call(exported, *command), "user.csv, line 3: no user")


@pytest.mark.parametrize("text, flags, names", [
    ("nowhere\n\nelsewhere\n", [], ["some.txt: no POI that the model knows", "'nowhere' of line 1", "--ids encoded"]),
    ("gps_id\n99999\n", [], ["some.txt: no POI", "'99999' of line 2", "--ids raw"]),
    ("x\n", ["--ids", "encoded"], ["some.txt, line 1", "'x'"]),
    ("{1},{2}\n", [], ["some.txt, line 1", "2 cells", "one id a line"]), ("poi\n", [], ["some.txt: no POI"]),
    ("poi,venue\n", [], ["poi and venue"]), ("poi,n\n{1}\n", [], ["some.txt, line 2", "1 cells"]),
    ("", [], ["some.txt: empty"]), (None, [], ["some.txt", "no such file"])])
def test_candidates_that_are_refused(exported, asked, tmp_path, text, flags, names):
    if text is not None:
        (tmp_path / "some.txt").write_text(text.format(*(raw_ids(exported, "poi").get(i) for i in range(3))))
    refusal(call(exported, "recommend.py", *asked[0], "--candidates", tmp_path / "some.txt", *flags), *names)


def test_candidates_that_the_model_does_not_know_are_left_out(exported, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(exported)
    places = read_places("sample", "datasets", recommendation.read_asking(exported / MODEL).places, "sample")
    file, raw = tmp_path / "some.txt", raw_ids(exported, "poi")
    file.write_text("\n".join(["a", raw[1], "b", "c", "", raw[2], "d"]) + "\n")
    assert check_in_files.read_candidates(str(file), places, None) == {1, 2}
    line, = caplog.messages
    assert line == (f"{file}: 4 ids are of no POI that the model knows, such as a (line 1), b (line 3), c (line 4), "
                    "and left out")


@pytest.mark.parametrize("flags, names", [(["--within", "-1"], ["--within", "km"]), (["--within", "near"], ["'near'"]),
                                          (["--within", "nan"], ["km"]), (["--exclude", "none"], ["--exclude"])])
def test_filters_that_are_refused(exported, asked, flags, names):
    refusal(call(exported, "recommend.py", *asked[0], *flags), *names)


def test_names_stand_for_ids(exported, asked, tmp_path):
    """Where the data set's folder has them; a place without a name has its category."""
    pytest.importorskip("folium")
    shutil.copytree(exported / "datasets", tmp_path / "datasets")
    best, second = (place for place in asked[1]["places"][:2])
    file = tmp_path / DATA / "sample_poi_names.csv"
    file.write_text(f"name,note,poi\nChez  <i>Ñ,x,{best['id']}\nGone,x,nowhere\n,x,{second['id']}\n")
    flags = [*asked[0], "-k", "2", "--data_path", tmp_path / "datasets"]
    told = json.loads(call(exported, "recommend.py", *flags, "--json").out)
    assert [place["name"] for place in told["places"]] == ["Chez <i>Ñ", None]
    assert told["places"] == [place | {"name": own["name"]} for place, own in zip(asked[1]["places"], told["places"])]
    text = call(exported, "recommend.py", *flags, "--map", tmp_path / "map.html")
    assert text.code == 0 and max(map(len, text.out.splitlines())) <= 80
    assert "Chez <i>Ñ" in text.out and best["id"] not in text.out and best["category"] in text.out
    page = (tmp_path / "map.html").read_text()
    assert "Chez &#60;i&#62;Ñ, " in page and second["category"] in page
    file.write_text("poi,title\n1,x\n")
    refusal(call(exported, "recommend.py", *flags), "sample_poi_names.csv", "poi,name")


def test_stdin_and_odd_files(exported, monkeypatch):
    monkeypatch.chdir(exported)
    asking = recommendation.read_asking(exported / MODEL)
    places = read_places("sample", "datasets", asking.places, "sample")
    raw = raw_ids(exported, "poi")
    text = ("\ufeffWhen,Venue ID,note\r\n2012-05-02T10:00:30Z," + raw[5] + ",b\r\n\r\n2012-05-02 10:00:30," + raw[7] +
            ',"two\nlines"\r\n2012-05-01 09:15,' + raw[6] + ",a\r\n2012-05-01 09:15,nowhere,a\r\n")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    found = check_in_files.read_check_ins("-", places, None)
    second = datetime.datetime(2012, 5, 2, 10, 0, 30)
    assert found == [check_in_files.CheckIn(datetime.datetime(2012, 5, 1, 9, 15), 6), check_in_files.CheckIn(second, 5),
                     check_in_files.CheckIn(second, 7)]
    assert check_in_files.before(found, second, "it") == found[:1]


def test_categories_and_hostile_names(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("PoiId,PoiCategoryId,PoiCategoryName\n1,2,Bar\n1,3,None\n1,3,None\n2,4,Zoo\n2,5,Park\n")
    assert read_categories(file, [1, 2, 3], 0) == {1: ("None", 3), 2: ("Zoo", 4), 3: ("unknown", 0)}
    evil = "`${alert(1)}</script><b>\\"
    place = {"rank": 1, "id": evil, "category": evil, "probability": 0.5, "km": 1.0, "latitude": 1.0, "longitude": 2.0,
             "time": "2012"}
    pytest.importorskip("folium")
    from ga_llm.serving import places_map
    page = places_map.draw([place], [place], evil)
    tame = place | {"id": "1", "category": "Bar"}
    harmless = places_map.draw([tame], [tame], "Where?")
    assert [page.count(part) for part in ("alert(", "${", "</script>", "<b>")] == [
        harmless.count(part) for part in ("alert(", "${", "</script>", "<b>")] and "alert(" not in harmless


HEAD = "time,poi\n2012-05-01 10:00,"
ENCODED = ["--ids", "encoded"]


@pytest.mark.parametrize("text, flags, names", [
    (HEAD + "nowhere\n", [], ["user.csv", "'nowhere' of line 2", "--ids encoded"]),
    (HEAD + "999999\n", ENCODED, ["'999999' of line 2", "--ids raw"]),
    (HEAD + "1\n2012-05-01 25:00,1\n", ENCODED, ["user.csv, line 3", "25:00"]),
    (HEAD + "x\n", ENCODED, ["user.csv, line 2", "'x'"]),
    (HEAD + "1,2\n", ENCODED, ["user.csv, line 2", "3 cells"]),
    ("hour,poi\n2012-05-01 10:00,1\n", [], ["no column of the time", "local"]),
    ("time,shop\n2012-05-01 10:00,1\n", [], ["no column of the POI"]),
    ("time,poi,venue_id\n2012-05-01 10:00,1,1\n", ENCODED, ["poi and venue_id"]),
    ("time,poi,user\n2012-05-01 10:00,1,1\n2012-05-01 11:00,1,2\n", ENCODED, ["2 users"]),
    ("time,poi\n", [], ["it has none"]), ("", [], ["user.csv: empty"]), (b"time,poi\n\xff\n", [], ["UTF-8"]),
    ("time,poi\n2013-05-01 10:00,1\n", ENCODED, ["--time", "no check-in before it"]),
    (None, [], ["user.csv", "no such file"]),
    (HEAD + "1\n", ["--model", "models/tiny"], ["ga_llm.json", "export.py"]),
    (HEAD + "1\n", ["--model", "nowhere"], ["nowhere", "export.py"]),
    (HEAD + "1\n", ["--dataset_name", "atlantis"], ["atlantis"]),
    (HEAD + "1\n", ["--time", "soon"], ["--time", "'soon'"]), (HEAD + "1\n", ["-k", "0"], ["-k"])],
    ids=["no place", "no encoded place", "no time", "no id", "three cells", "no time column", "no POI column", "twice",
         "two users", "no rows", "empty", "no text", "too early", "no file", "no export", "no model", "no data set",
         "when?", "none asked"])
def test_check_ins_that_are_refused(exported, tmp_path, text, flags, names):
    file = tmp_path / "user.csv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refusal(call(exported, "recommend.py", "--model", MODEL, "--check_ins", file, "--time", "2012-06-01 10:00", *flags,
                 "--map", tmp_path / "map.html"), *names)
    assert not (tmp_path / "map.html").exists()


def test_other_places_than_the_models(exported, tmp_path):
    """The same ids elsewhere would be other places."""
    shutil.copytree(exported / "datasets", tmp_path / "datasets")
    mapping = tmp_path / DATA / "sample_gps_mapping.csv"
    table = pd.read_csv(mapping)
    table.loc[0, "Latitude"] += 0.001
    table.to_csv(mapping, index=False)
    file = tmp_path / "user.csv"
    file.write_text(HEAD + "1\n")
    refusal(call(exported, "recommend.py", "--model", MODEL, "--check_ins", file, "--time", "2012-06-01 10:00",
                 "--data_path", tmp_path / "datasets", *ENCODED), "sample_gps_mapping.csv", "other places")
