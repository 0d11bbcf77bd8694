"""Settings and intermediate files that are wrong: YAML, flags, samples, mapping, lists of similar trajectories."""
import json

import pandas as pd
import pytest
import yaml

from cities import City, cell, city, config, copies, good, refused, succeeds  # noqa: F401
from harness import snapshot

pytestmark = pytest.mark.bulk
QUESTION_SCRIPTS = ("process_llm_gps.py", "process_projector_gps_stage1.py", "traj_qk.py")
PAM_SCRIPTS = ("poi_embeddings.py", "process_pam_stage1.py")
LAUGHS = "a: &a [lol, lol]\n" + "".join(f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
                                      for old, new in zip("abcdefghijklm", "bcdefghijklmn"))


# YAML.

def text_of(format_: str = "csv", **changes) -> str:
    """The YAML of a city with keywords changed; None removes a key."""
    name = "ca" if format_ == "gowalla" else "city"
    return yaml.safe_dump({key: value for key, value in {**config(format_, name), **changes}.items()
                           if value is not None})


GOOD = text_of()
RAW = config("csv", "city")["raw"]
COLUMNS = config("csv", "city")["columns"]
YAML = {                                  # text -> words of the refusal
    "empty": ("", "key: value"), "a comment": ("# nothing\n", "key: value"), "a list": ("- a\n", "key: value"),
    "a word": ("nonsense", "key: value"), "null": ("~", "key: value"), "two documents": (GOOD + "---\n" + GOOD, "YAML"),
    "tabs": ("a:\n\t- b\n", "line 2", "not YAML"), "unclosed": (GOOD + "x: [1, 2\n", "not YAML"),
    "a key twice": (GOOD + "max_history: 7\n", "line 28", "'max_history' twice"),
    "a key twice below": (GOOD.replace("raw:", "raw:\n  check_ins: x.csv"), "'check_ins' twice"),
    "an alias": (GOOD.replace("max_current: 500", "max_current: &m 500").replace("max_history: 600", "max_history: *m"),
                 "alias"),
    "billion laughs": (LAUGHS, "alias"),
    "merged laughs": ("a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "alias"), "recursive": ("a: &a [*a]\n", "alias"),
    "nested lists": (GOOD + "x: " + "[" * 10_000, "nested too deeply"),
    "nested and closed": (GOOD + "x: " + "[" * 9000 + "]" * 9000, "nested too deeply"),
    "nested maps": ("{a: " * 10_000, "nested too deeply"),
    "not UTF-8": (GOOD.replace("put", "M\xfcll").encode("latin-1"), "not YAML", "utf-8"),
    "NUL": (GOOD + "\0", "not YAML"), "UTF-16": (GOOD.encode("utf-16"), "not YAML"),
    "a large file": (GOOD + "# " + "x" * 2_000_000, "too large"),
    "code": ("a: !!python/object/apply:os.system [date]\n", "not YAML"), "a tag": ("a: !mine 1\n", "not YAML"),
    "a date that is none": (GOOD + "x: 2024-02-30\n", "not YAML"),
    "a huge number": (GOOD + f"x: {'9' * 5000}\n", "YAML"),
    "unknown key": (GOOD + "min_poi_frequency: 9\n", "unknown key 'min_poi_frequency'", "min_poi_freq"),
    "unknown key that is a list": (GOOD + "? [a, b]\n: 1\n", "not YAML"),
    "unknown key of many lines": (GOOD + '"a\\nb": 1\n', "unknown key 'a\\nb'"),
    "key that is a number": (GOOD + "7: 1\n", "unknown key 7"),
    "long key": (GOOD + f"{'k' * 500}: 1\n", "unknown key 'kkk"),
}
VALUES = {
    "max_history": [-1, 1.5, "many", True, [600], {}, 10 ** 30, float("nan"), ""],
    "min_poi_freq": [-1, "9", 2 ** 64, 9.0], "min_user_freq": [False, None],
    "split_at": [[0.9, 0.8], [0.8, 1.5], [float("nan"), 0.9], [0.8, float("nan")], [0, 0.9], [-0.1, 0.9], [0.8], 0.8,
                 [0.7, 0.8, 0.9], ["0.8", "0.9"], [True, True], {"train": 0.8}, [0.8, float("inf")]],
    "isolation_hours": [0, -24, float("nan"), "24", True, [24]], "session_time_interval": [0, -1, float("nan"), {}],
    "passes": [0, -1, 1.0, 10 ** 9, "once", True], "first_id": [2, -1, True, 1.0, "1", [1]],
    "format": ["foursquare", 7, ["csv"], {"csv": 1}, "CSV"],
    "dataset_name": ["town", "../city", "a/city", "", ".", "City", 5, ["city"], "city\n"],
    "raw": [{}, [], "raw.csv", {"file": "x"}, {"check_ins": 5}, {"check_ins": ["raw.csv"]}, {"check_ins": ""},
            {"check_ins": "/"}, {"check_ins": "."}, {"check_ins": "a\0b"}, {"check_ins": "a\nb"},
            {**RAW, "spots": "x"}],
    "raw_from": [5, ["a"], {}, "two\nlines"],
    "columns": [{**COLUMNS, "lat": "lon"}, {**COLUMNS, "lat": 5}, {"user": "u"}, ["user"], {**COLUMNS, "extra": "x"},
                {**COLUMNS, "user": "poi"}, {**COLUMNS, "user": "u\nv"}],
    "published": [[], "none", {"tests": {}}, {"test": {"pois": "many"}}, {"test": {"pois": 1.5}}, {"test": [1]},
                  {"test": {"places": 1}}, {"test": {"pois": None}}, {"test": {"pois": True}}, {7: {}}],
}
for key, values in VALUES.items():
    for value in values:
        YAML[f"{key}: {ascii(value)[:40]}"] = (text_of(**{key: value}), key)


@pytest.mark.parametrize("text, words", [(text, words) for text, *words in YAML.values()], ids=YAML)
def test_a_yaml_that_is_wrong(city, text, words):
    made = city("csv")
    made.yaml.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(made, made.samples, "best_conf/city.yml", *words)


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n"),
                                    lambda text: f"%YAML 1.1\n---\n{text}", json.dumps],
                         ids=["byte order mark", "CRLF", "with a head", "JSON"])
def test_a_yaml_that_is_right(city, good, change):
    made = city("csv")
    text = change(yaml.safe_load(GOOD) if change is json.dumps else GOOD)
    made.yaml.write_bytes(text.encode())
    succeeds(made.samples)
    assert snapshot(made.folder) == snapshot(good("csv").folder)


@pytest.mark.parametrize("values, words", [
    ({"train": "raw/train.csv", "validate": "raw/val.csv", "test": "raw/train.csv"}, ["another file for each"]),
    ({"train": "raw/train.csv", "validate": "./raw/../raw/train.csv", "test": "raw/test.csv"},
     ["another file for each"]),
    ({"train": "raw/train.csv", "test": "raw/test.csv"}, ["missing key validate"])])
def test_files_of_a_format_are_different_ones(city, values, words):
    """Training on the test file would be a fine result."""
    made = city("getnext")
    made.configure(raw=values)
    refused(made, made.samples, "best_conf/city.yml: raw", *words)


@pytest.mark.parametrize("states, words", [
    ([], "keep_states"), ("Nevada", "keep_states"), ([1], "keep_states"), (["Nevada", None], "keep_states"),
    (["Nev\nada"], "keep_states"), (["Nevadda"], "no feature named 'Nevadda'")])
def test_states_of_the_yaml(city, states, words):
    made = city("gowalla")
    made.configure(keep_states=states)
    refused(made, made.generate, words)


@pytest.mark.parametrize("path", ["../joined.csv", "/tmp/joined.csv", "raw/../../joined.csv", "finetune_GCIM.py",
                                  "best_conf/ca.yml", ".git/hooks/pre-commit", "raw/joined.csv.gz", "raw/all.txt",
                                  "joined", ".csv"])
def test_a_strangers_yaml_may_not_say_where_to_write(city, path):
    made = city("gowalla")
    text = yaml.safe_load(made.yaml.read_text())
    made.configure(raw={**text["raw"], "check_ins": path})
    refused(made, made.generate, "best_conf/ca.yml: raw")


def test_the_ca_data_set_of_another_format(city):
    made = city("csv")
    (made.root / "best_conf" / "ca.yml").write_text(GOOD.replace("dataset_name: city", "dataset_name: ca"))
    refused(made, made.generate, "best_conf/ca.yml: format: expected gowalla")


# Flags.

NAMES = ["../city", "/etc/passwd", "", "a/b", "..", ".", "city/../city", "city\n", "~", "-", "c ity", "\u200bcity",
         "x" * 500, "atlantis", "city.yml", "*", "\0"]


@pytest.mark.parametrize("script", QUESTION_SCRIPTS + PAM_SCRIPTS)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_data_sets_that_are_none(city, script, name):
    made = city("csv")
    (made.root / "city.yml").write_text(GOOD)       # what `../city` would read
    refused(made, lambda: made.call(script, "-dataset_name", name), "-dataset_name")


@pytest.mark.parametrize("path", ["../city.yml", "best_conf/...yml", "best_conf/..yml", "best_conf/a b.yml"])
def test_a_yaml_whose_name_leads_out(city, path):
    made = city("csv")
    made.root = made.root / "inner"
    (made.root / "best_conf").mkdir(parents=True)
    target = made.root / path
    target.write_text(GOOD.replace("dataset_name: city", f"dataset_name: {json.dumps(target.stem)}"))
    if path != "../city.yml":
        refused(made, lambda: made.call("run.py", "-f", path), "dataset_name")
    else:                                           # read from anywhere, written to datasets/ of this root
        (made.root.parent / "raw").rename(made.root / "raw")
        succeeds(lambda: made.call("run.py", "-f", path))
        assert (made.root / "datasets" / "city" / "preprocessed" / "stats.json").exists()


FLAGS = [
    ("run.py", [], ["-f"]), ("run.py", ["-f"], ["-f"]), ("run.py", ["-f", ""], ["not found"]),
    ("run.py", ["-f", "best_conf"], ["best_conf: not found"]),
    ("run.py", ["-f", "best_conf/none.yml"], ["none.yml: not found"]),
    ("run.py", ["-f", "raw/mine.csv"], ["raw/mine.csv"]), ("run.py", ["-f", "best_conf/city.yml", "-x"], ["-x"]),
    ("run.py", ["-F", "best_conf/city.yml"], ["-f"]), ("run.py", ["best_conf/city.yml"], ["-f"]),
    ("generate_ca_raw.py", ["-f", "x"], ["-f"]), ("generate_ca_raw.py", [], ["-dataset_name ca: no best_conf/ca.yml"]),
    ("traj_qk.py", [], ["-dataset_name"]), ("traj_qk.py", ["-dataset_name", "city", "-use_sim", "True"], ["-use_sim"]),
    *(("process_llm_gps.py", ["-dataset_name", "city", *rest], words) for rest, words in (
        (["-use_sim", "maybe"], ["-use_sim", "'maybe'"]), (["-use_sim"], ["-use_sim"]),
        (["-use_sim", ""], ["-use_sim"]),
        (["-fields", "colour"], ["-fields", "'colour'", "poi"]), (["-fields", ""], ["-fields"]),
        (["-fields", ","], ["-fields"]), (["-fields", "time,,gps"], ["-fields"]), (["-fields", "TIME"], ["'TIME'"]),
        (["-fields", "time gps"], ["'time gps'"]), (["-fields", "x" * 999], ["-fields"]),
        (["-fields", "a\nb"], ["'a\\nb'"]),
        (["-max_history", "-1"], ["-max_history"]), (["-max_history", "x"], ["-max_history"]),
        (["-max_history", "1e3"], ["-max_history"]), (["-max_history", "10.5"], ["-max_history"]),
        (["-max_history", str(10 ** 30)], ["-max_history"]), (["-max_history", "nan"], ["-max_history"]),
        (["-max_history", ""], ["-max_history"]), (["-history_step", "0"], ["-history_step"]),
        (["-history_step", "-5"], ["-history_step"]), (["-history_step", "601"], ["-history_step", "600"]),
        (["-history_step", "11", "-max_history", "10"], ["-history_step", "10"]),
        (["-history_step", "1", "-max_history", "0"], ["-history_step"]), (["-history_step", "x"], ["-history_step"]),
        (["extra"], ["extra"]), (["-use_sim", "True"], ["train_key_top200.json: not found"]))),
    ("process_projector_gps_stage1.py", ["-dataset_name", "city", "-fields", "category,gps"], ["-fields", "category"]),
    ("process_projector_gps_stage1.py", ["-dataset_name", "city", "-fields", "poi,time"], ["-fields", "gps"]),
    ("process_pam_stage1.py", [], ["-dataset_name"]),
    ("process_pam_stage1.py", ["-dataset_name", "city", "-use_sim", "True"], ["-use_sim"]),
    ("process_pam_stage1.py", ["-dataset_name", "city", "-fields", "poi"], ["-fields", "-history True"]),
    *(("poi_embeddings.py", ["-dataset_name", "city", *rest], words) for rest, words in (
        (["-geo_neighbours", "-1"], ["-geo_neighbours", "'-1'"]), (["-geo_neighbours", "1.5"], ["-geo_neighbours"]),
        (["-geo_neighbours", ""], ["-geo_neighbours"]), (["-geo", "5"], ["-geo"]),
        (["-category_neighbours", "1001"], ["-category_neighbours", "1000"]), (["-from"], ["-from"]),
        (["-from", ""], [".: is a directory"]), (["-from", "raw"], ["raw: is a directory"]),
        (["-from", "none.npy"], ["none.npy: no such file"]), (["-from", "raw/mine.csv"], ["raw/mine.csv: not a .npy"]),
        (["-from", "x" * 300], ["xxx"]), (["-from", "a\0b"], ["null byte"]),
        (["-from", "x.npy", "-geo_neighbours", "0"], ["-from", "-geo_neighbours"]),
        (["-category_neighbours", "5", "-from", "x.npy"], ["-from", "-category_neighbours"]))),
    *(("make_sample_raw.py", flags, words) for flags, words in (
        (["-users", "0"], ["-users 0"]), (["-users", "-3"], ["-users -3"]), (["-users", "x"], ["-users"]),
        (["-users", str(10 ** 30)], ["-users"]), (["-days", "0"], ["-days 0"]), (["-days", "1000000"], ["-days"]),
        (["-pois", "0"], ["-pois 0"]), (["-pois", "49"], ["-pois 49"]), (["-pois", str(10 ** 20)], ["-pois"]),
        (["-seed", "-1"], ["-seed"]), (["-seed", "1.5"], ["-seed"]), (["-format", "csv"], ["-format", "tky"]),
        (["-dataset_name", "../x"], ["-dataset_name"]), (["-dataset_name", ""], ["-dataset_name"]),
        (["-dataset_name", "/etc"], ["-dataset_name"]), (["-dataset_name", "a/b"], ["-dataset_name"]),
        (["-overwrite", "perhaps"], ["-overwrite"]), (["-users", "2", "-out", "raw/mine.csv"], ["raw/mine.csv"]),
        (["-users", "2", "-out", "raw/mine.csv/x"], ["raw/mine.csv"]), (["-usr", "5"], ["-usr"]),
        (["-user", "5"], ["-user"]))),
]


@pytest.mark.parametrize("script, flags, words", FLAGS, ids=[f"{s[:12]} {' '.join(f)[:40]!a}" for s, f, _ in FLAGS])
def test_flags_that_are_wrong(city, script, flags, words):
    made = city("csv")
    refused(made, lambda: made.call(script, *flags), *words)


@pytest.mark.parametrize("one, other", [
    (["-fields", "time,poi"], ["-fields", " poi ,time,time,poi"]), (["-fields", "time,poi"], ["-fields", "time"]),
    (["-max_history", "600"], []), (["-max_history", str(10 ** 9)], []), (["-max_history", "+0600"], []),
    (["-history_step", "1"], []), (["-use_sim", "no"], ["-use_sim", "FALSE"])])
def test_flags_that_say_the_same(city, one, other):
    made = city("csv")
    succeeds(lambda: made.questions(*one))
    first = questions(made)
    succeeds(lambda: made.questions(*other))
    assert len(first) > 5 and questions(made) == first


def questions(city):
    """All files but the settings, which may tell another limit that changes nothing here."""
    return {name: found for name, found in snapshot(city.folder).items() if not name.endswith(".settings.json")}


# Samples, mapping, lists of similar trajectories.

SAMPLE = {"UserId": 0, "PoiId": 1, "PoiCategoryId": 2, "PoiCategoryName": 3, "Latitude": 4, "Longitude": 5,
          "LocalTime": 6, "TrajectoryId": 7, "Split": 8}
BAD = [(column, value) for column, values in {
    "UserId": ["-1", "1.5", "u1", "", "nan", "1e30"], "PoiId": ["-1", "2.5", "", str(2 ** 63)], "PoiCategoryId": ["x"],
    "TrajectoryId": ["", "0.5", "-3"], "Latitude": ["nan", "91", "", "north"], "Longitude": ["inf", "-181"],
    "LocalTime": ["2024-02-30 00:00:00", "2024-01-01", "2024-01-01T00:00:00", "2024-1-1 0:00:00", "",
                  "0001-01-01 00:00:00"],
    "PoiCategoryName": ["", "<>"], "Split": [""]}.items() for value in values]
CELLS = [(QUESTION_SCRIPTS[i % 3], ("train", "test")[i % 2], *bad) for i, bad in enumerate(BAD)]


@pytest.mark.parametrize("script, split, column, value", CELLS, ids=[f"{c}-{v}-{s[8:16]}" for s, _, c, v in CELLS])
def test_a_cell_of_a_sample(city, script, split, column, value):
    made = city("csv")
    path = made.folder / f"{split}_sample.csv"
    path.write_text(cell(4, SAMPLE[column], value)(path.read_text()))
    refused(made, lambda: made.call(script, "-dataset_name", "city"), f"{split}_sample.csv, line 4: ")


MAKE_AGAIN = "`python data-preprocess/run.py -f best_conf/city.yml`"
FILES = [                           # file, what happens to it, words of the refusal
    ("train_sample.csv", lambda text: None, ["not found", MAKE_AGAIN]),
    ("test_sample.csv", lambda text: "", ["empty", MAKE_AGAIN]),
    ("train_sample.csv", lambda text: text[:text.index("\n") + 1], ["no rows"]),
    ("train_sample.csv", lambda text: text[:-3], ["cut off"]),
    ("test_sample.csv", lambda text: text[:len(text) // 2], ["line "]),
    ("test_sample.csv", lambda text: text[:text.rindex("test") + 4], ["cut off"]),
    ("train_sample.csv", lambda text: text.replace("TrajectoryId", "trajectory_id"), ["no column TrajectoryId"]),
    ("train_sample.csv", lambda text: text.replace(",", "\t"), ["no column UserId"]),
    ("train_sample.csv", lambda text: text.replace("UserId,PoiId", "UserId,UserId"), ["two columns UserId"]),
    ("test_sample.csv", lambda text: text.replace(",test", ",train"), ["another split", MAKE_AGAIN]),
    ("train_sample.csv", lambda text: text.replace("\n1,", "\n1,9,"), ["more than 9 columns"]),
    ("train_sample.csv", lambda text: text.replace("food", '"food', 1), ["never closed"]),
    ("train_sample.csv", lambda text: text.encode("utf-16"), ["utf-8"]),
    ("train_sample.csv", lambda text: text.replace("food", "f\0d", 1), ["NUL"]),
    ("city_gps_mapping.csv", lambda text: None, ["not found", MAKE_AGAIN]),
    ("city_gps_mapping.csv", lambda text: "", ["empty", MAKE_AGAIN]),
    ("city_gps_mapping.csv", lambda text: text.replace("GPS_id", "id"), ["no column GPS_id"]),
    ("city_gps_mapping.csv", lambda text: text.replace("\n3,", "\n4,"), ["two rows with GPS_id 4", MAKE_AGAIN]),
    ("city_gps_mapping.csv", lambda text: text.replace("\n3,", "\n9,"), ["no row for POI 3", MAKE_AGAIN]),
    ("city_gps_mapping.csv", lambda text: "\n".join(text.split("\n")[:2]) + "\n", ["no row for POI 2", MAKE_AGAIN]),
    ("city_gps_mapping.csv", lambda text: text[:-2], ["cut off"]),
    *(("city_gps_mapping.csv", lambda text, new=new: text.replace("3,43.0,-120.5", new), ["mapping.csv, line 4: "])
      for new in ("3,91,0", "3,43,181", "3,nan,0", "3,0,inf", "3,x,0", "3.5,43,0", "-3,43,0", ",43,0", "3,43",
                  "3,43,0,0")),
    ("label_encoding.json", lambda text: None, None), ("stats.json", lambda text: "nonsense", None),
    ("sample.csv", lambda text: "nonsense", None), ("validate_sample.csv", lambda text: None, None),
]


@pytest.mark.parametrize("name, change, words", FILES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(FILES)])
@pytest.mark.parametrize("stage", [1, 2])
def test_samples_and_mapping(city, good, name, change, words, stage):
    """Words None: the file is none that questions are made from."""
    made = city("csv")
    path = made.folder / name
    new = change(path.read_text())
    path.unlink()
    if new is not None:
        path.write_bytes(new if isinstance(new, bytes) else new.encode())
    if words is None:
        succeeds(lambda: made.questions(stage=stage))
        if stage == 2:
            for question in made.folder.glob("*qa_pairs*"):
                assert question.read_bytes() == (good("csv").folder / question.name).read_bytes()
    else:
        refused(made, lambda: made.questions(stage=stage), f"datasets/city/preprocessed/{name}", *words)


@pytest.mark.parametrize("script", PAM_SCRIPTS)
def test_samples_and_mapping_of_pam(city, script):
    """They read train's sample and the mapping, by the same functions as the scripts above, and no other file."""
    made = city("csv")
    sample, mapping = made.folder / "train_sample.csv", made.folder / "city_gps_mapping.csv"

    def run():
        return made.call(script, "-dataset_name", "city")

    for path, change, words in (
            (sample, cell(4, SAMPLE["PoiId"], "-1"), ["line 4"]), (sample, lambda text: text[:-3], ["cut off"]),
            (mapping, lambda text: text.replace("\n3,", "\n9,"), ["no row for POI 3", MAKE_AGAIN]),
            (mapping, lambda text: f"{text}{10 ** 14},41,-120\n", ["5 rows, but a GPS_id of 10000", MAKE_AGAIN])):
        text = path.read_text()
        path.write_text(change(text))
        refused(made, run, path.name, *words)
        path.write_text(text)
    for path in (sample, mapping):
        text = path.read_text()
        path.unlink()
        refused(made, run, f"{path.name}: not found", MAKE_AGAIN)
        path.write_text(text)
    for path in made.folder.iterdir():
        if path not in (sample, mapping):
            path.unlink()
    succeeds(run)


@pytest.mark.parametrize("name", ["train_sample.csv", "city_gps_mapping.csv", "test_key_top200.json"])
@pytest.mark.parametrize("kind", ["folder", "dangling link", "loop"])
def test_what_is_no_file(city, name, kind):
    made = with_lists(city("csv"))
    path = made.folder / name
    path.unlink()
    path.mkdir() if kind == "folder" else path.symlink_to("nowhere" if kind == "dangling link" else name)
    refused(made, lambda: made.questions("-use_sim", "True"), name)


def test_a_mapping_in_another_order_and_with_more_places_is_read_by_id(city, good):
    made = city("csv")
    path = made.folder / "city_gps_mapping.csv"
    head, *rows = path.read_text().splitlines()
    succeeds(lambda: made.questions(stage=1))
    first = snapshot(made.folder)
    path.write_text("\r\n".join(["\ufeff" + head, *rows[::-1], ""]))
    succeeds(lambda: made.questions(stage=1))
    assert {**snapshot(made.folder), path.name: ""} == {**first, path.name: ""}


def with_lists(made: City) -> City:
    """Add the lists of similar trajectories: for each one, all of train's."""
    trains = pd.read_csv(made.folder / "train_sample.csv")["TrajectoryId"].unique().tolist()
    for split in ("train", "test"):
        ids = pd.read_csv(made.folder / f"{split}_sample.csv")["TrajectoryId"].unique().tolist()
        (made.folder / f"{split}_key_top200.json").write_text(json.dumps({str(i): trains for i in ids}))
    return made


def test_lists_that_are_right(city):
    made = with_lists(city("csv"))
    succeeds(lambda: made.questions("-use_sim", "True"))
    lines = (made.folder / "test_qa_pairs_kqt_200items_city_llm_with_sim_gps.txt").read_text().splitlines()
    # All of train has ended: 64 check-ins, of which 32 are also the user's history; and 3 of the current trajectory.
    assert [line.partition(" History of")[0].count("POI id") for line in lines] == [64, 64]
    assert [line.rpartition("<answer>:")[0].count("POI id ") for line in lines] == [64 + 32 + 3] * 2


LISTS = {
    "missing": None, "empty": "", "cut off": '{"9": [0, 1', "a list": "[1]", "text": '"x"', "null": "null",
    "number": "7", "number for a list": '{"9": 5}', "text for a list": '{"9": "01"}',
    "map for a list": '{"9": {"0": 1}}',
    "null for a list": '{"9": null}', "text in a list": '{"9": ["0"]}', "1.0": '{"9": [1.0]}', "true": '{"9": [true]}',
    "nested": '{"9": [[0]]}', "null in a list": '{"9": [null]}', "NaN": '{"9": [NaN]}', "nested deeply": "[" * 100_000,
    "nested maps": '{"9":' * 100_000, "unknown": '{"9": [12345]}', "huge": '{"9": [%d]}' % 10 ** 30,
    "negative": '{"9": [-1]}',
    "unknown key": '{"777": [0]}', "no number": '{"nine": [0]}', "09": '{"09": [0]}', "spaces": '{" 9": [0]}',
    "a float for a key": '{"9.0": [0]}', "not UTF-8": b'{"9": [0]}\xff', "UTF-16": '{"9": [0]}'.encode("utf-16"),
    "more behind it": '{"9": [0]} {}', "validation's": '{"9": [8]}', "long": '{"%s": [0]}' % ("9" * 5000),
}


@pytest.mark.parametrize("contents", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("stage", [1, 2])
def test_lists_that_are_wrong(city, contents, stage):
    """Trajectory 8 is validation's, 9 a test trajectory."""
    made = with_lists(city("csv"))
    path = made.folder / "test_key_top200.json"
    path.unlink()
    if contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    refused(made, lambda: made.questions("-use_sim", "True", stage=stage),
            "datasets/city/preprocessed/test_key_top200.json: ", "traj_sim.py")
