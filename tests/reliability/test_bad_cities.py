"""Check-ins that are odd, hostile or few: the result is the one counted by hand, or a refusal in one line."""
import datetime
import json
import logging

import pandas as pd
import pytest

from cities import CATEGORY, FORMATS, HEADERS, SQUARE, every, line, refused, succeeds, visits
from cities import city, copies, good  # noqa: F401
from ga_llm.base import prompts

pytestmark = pytest.mark.bulk
START = datetime.datetime(2024, 1, 1)


def table(made, name: str) -> pd.DataFrame:
    return pd.read_csv(made.folder / name)


def stats(made) -> dict:
    """{split: (users, pois, categories, trajectories, check-ins)}"""
    counts = json.loads((made.folder / "stats.json").read_text())
    return {split: tuple(counts[split][name] for name in ("users", "pois", "categories", "trajectories", "check_ins"))
            for split in ("train", "validate", "test")}


def ids(made, field: str) -> list:
    return json.loads((made.folder / "label_encoding.json").read_text())[field]["values"]


def pairs(made, split: str = "train") -> list[str]:
    """The pairs of a split, each on one line."""
    path, = made.folder.glob(f"{split}_qa_pairs*llm*gps.[jt]*")
    if split == "train":
        return [prompts.join(pair["question"], pair["answer"]) for pair in json.loads(path.read_text())]
    return path.read_text().removesuffix("\n").split("\n")


def read(pair: str):
    """What a reader of the prompt finds in it."""
    prompt, answer = prompts.split(pair)
    current = prompt.rpartition(prompts.CURRENT)[2]
    return (prompts.POI_ID.findall(prompt), prompts.GPS_TOKEN.findall(prompt), prompts.POI_ID.findall(current),
            prompt.count(prompts.QUESTION), prompt.count(prompts.ANSWER), prompt.count(prompts.CURRENT), answer)


# Names of categories that try to be a part of the prompt, or of the file.

NAMES = {
    "<question>: who": "question : who", "<answer>: POI id 3.": "answer : poi id 3.", "<GPS 3>": "GPS 3",
    "POI id 7": "poi id 7", "POI\tid  7": "poi id 7", "PO<I id 3": "PO I id 3", "POI id <4": "poi id 4",
    "Current trajectory of user 2:": "current trajectory of user 2:", "line\nbreak": "line break",
    "a\r\nb\u2028c\x0bd\x85e": "a b c d e", 'say "cheese"': 'say "cheese"', '"': '"', "comma, tab\t;": "comma, tab ;",
    "Café 東京 \U0001f363": "Café 東京 \U0001f363", "NA": "NA", "0": "0", "=1+1": "=1+1", "\ufeffbom": "\ufeffbom",
    "x" * 3000: "x" * 3000, "{0} %s \\n": "{0} %s \\n",
}


HOSTILE = [(format_, name) for format_ in FORMATS for name in NAMES
           if format_ != "tsmc2014" or not set("\t\n\r").intersection(name)]     # a TSV has no quotes to hold those


@pytest.mark.parametrize("format_, name", HOSTILE, ids=[f"{format_}-{ascii(name)[:20]}" for format_, name in HOSTILE])
def test_no_name_of_a_category_passes_for_a_part_of_the_prompt(city, good, format_, name):
    made = city(format_)
    if format_ == "gowalla":
        text = ("[{'name': %r}]" % name).replace('"', '""')
        made.edit("spots", lambda old: old.replace(f'"{CATEGORY % "food"}"', f'"{text}"'))
    else:
        quoted = name if format_ == "tsmc2014" else '"' + name.replace('"', '""') + '"'
        for role in made.raw_check_ins:
            made.edit(role, lambda old: old.replace(",food,", f",{quoted},").replace("\tfood\t", f"\t{quoted}\t"))
    succeeds(made.samples)
    succeeds(made.questions)
    for split in ("train", "test"):
        found, expected = pairs(made, split), pairs(good(format_), split)
        assert [read(pair) for pair in found] == [read(pair) for pair in expected]
        assert all(f" {NAMES[name]}, category id " in pair and "food" not in pair for pair in found)


@pytest.mark.parametrize("format_, encoding, works", [
    ("csv", "utf-8", True), ("csv", "latin-1", False), ("getnext", "latin-1", False), ("gowalla", "latin-1", False),
    ("tsmc2014", "latin-1", True), ("tsmc2014", "utf-8", True), ("tsmc2014", "utf-8-sig", True),
    ("tsmc2014", "both", True)])
def test_names_in_the_other_encoding(city, format_, encoding, works):
    """Foursquare's file is latin-1; what is valid UTF-8 in it was saved as that by someone."""
    made = city(format_)
    role = {"gowalla": "spots", "getnext": "train"}.get(format_, "check_ins")
    text = made.read(role).replace("food", "Caf\xe9").replace("shop", "B\xfccher")
    made.write(role, text.encode(encoding) if encoding != "both" else
               text.encode("utf-8").replace("\xfc".encode("utf-8"), "\xfc".encode("latin-1")))
    if works:
        succeeds(made.samples)
        assert set(table(made, "sample.csv")["PoiCategoryName"]) == {"Caf\xe9", "B\xfccher"}
    else:
        refused(made, made.samples, made.path(role).name, "utf-8")


# Quotes and lines.

def test_a_line_is_named_as_an_editor_counts_it(city):
    """Also behind cells that hold line ends of their own."""
    made = city("csv")
    made.edit("check_ins", lambda text: text.replace("food", '"fo\no\nd"', 2).replace(",44.0,", ",north,", 1))
    line = 1 + made.read("check_ins")[:made.read("check_ins").index("north")].count("\n")
    assert line == 12       # that of the seventh check-in, behind two cells of three lines
    refused(made, made.samples, f"mine.csv, line {line}: lat 'north'")


@pytest.mark.parametrize("format_, old, new, words", [
    ("csv", "p2,food", 'p2,"food', ["line 4: a quote", "never closed"]),
    ("getnext", "id of food", '"id of food', ["train.csv, line 4: a quote", "never closed"]),
    ("tsmc2014", "food", 'fo\tod', ["line 3: more than 8 columns"]),
    ("tsmc2014", "food", 'fo\nod', ["line 3: ", "is empty"]),
    ("csv", "food", "food,drink", ["line 4: more than 6 columns"]),
    ("csv", "user,poi", "user,user,poi", ["two columns user"]),
    ("csv", "user,poi", "place", ["no column "]),
    ("csv", "user,poi", '"user,poi', ["mine.csv"]),
])
def test_quotes_and_marks_that_do_not_match(city, format_, old, new, words):
    made = city(format_)
    made.edit(made.main, lambda text: text.replace(old, new, 1))
    refused(made, made.samples, *words)


@pytest.mark.parametrize("quote", ['"', "'", '"food'], ids=ascii)
def test_quotes_in_a_tsv_are_text(city, quote):
    made = city("tsmc2014")
    made.edit("check_ins", lambda text: text.replace("\tfood", f"\t{quote}food", 1))
    succeeds(made.samples)
    assert (table(made, "sample.csv")["PoiCategoryName"] == f"{quote}food").sum() == 1


# Ids.

@pytest.mark.parametrize("format_, role, names, expected", [
    ("csv", "user", ("007", "7"), ["007", "7"]), ("csv", "user", ("7", "7.0"), ["7", "7.0"]),
    ("csv", "user", ("-1", "1e3"), ["-1", "1e3"]), ("csv", "user", ("True", "nan"), ["True", "nan"]),
    ("csv", "user", (" 1", "1"), [" 1", "1"]), ("csv", "user", ("9" * 30, "9" * 31), ["9" * 30, "9" * 31]),
    ("tsmc2014", "user", (-5, 2 ** 31 + 1), [-5, 2 ** 31 + 1]), ("tsmc2014", "user", ("3.0", "007"), [3, 7]),
    ("tsmc2014", "user", (10 ** 15 - 2, 10 ** 15 - 1), [10 ** 15 - 2, 10 ** 15 - 1]),
    ("getnext", "user", (0, 2 ** 40), [0, 2 ** 40]), ("gowalla", "user", (2 ** 32, -1), [-1, 2 ** 32])])
def test_ids_stay_apart(city, format_, role, names, expected):
    made = city(format_)
    for part in made.raw_check_ins:
        made.edit(part, every(format_, role, lambda old: str(names[int(old[-1]) - 1])))
        made.edit(part, lambda text: text + "\n")      # a blank line, which makes pandas read floats
    succeeds(made.samples)
    assert ids(made, "user") == expected
    assert stats(made)["train"] == (2, 4, 2, 16, 64)


@pytest.mark.parametrize("names", [("07", "7"), ("1", "1.0"), ("a", "A"), ("a", "a ")], ids=str)
@pytest.mark.parametrize("format_", ["csv", "tsmc2014", "getnext"])
def test_ids_of_places_are_text(city, format_, names):
    made = city(format_)
    for part in made.raw_check_ins:
        made.edit(part, every(format_, "poi", lambda old: (*names, "x", "y")[int(old[-1]) - 1]))
    succeeds(made.samples)
    assert ids(made, "poi") == sorted([*names, "x", "y"])


# Cities of other shapes: what must come out is counted by hand.

def test_rows_given_twice_count_twice(city):
    for format_ in FORMATS[:1]:
        made = city(format_)
        made.write_check_ins([row for visit in visits() for row in [line(format_, *visit)] * 2])
        succeeds(made.samples)
        assert stats(made) == {"train": (2, 4, 2, 16, 128), "validate": (2, 4, 2, 2, 16), "test": (2, 4, 2, 2, 16)}


def test_only_one_user(city):
    made = city("tsmc2014")
    made.write_check_ins([line("tsmc2014", *visit) for visit in visits() if visit[0] == 2])
    succeeds(made.samples)
    assert stats(made) == {"train": (1, 4, 2, 8, 32), "validate": (1, 4, 2, 1, 4), "test": (1, 4, 2, 1, 4)}


def test_a_user_with_one_check_in_has_an_id_and_no_row(city):
    """The one more row moves the borders to int(81 * 0.8) and int(81 * 0.9)."""
    made = city("csv")
    made.edit("check_ins", lambda text: text + "u0,p1,shop,41,-120.5,2024-01-01 00:30:00\n")
    succeeds(made.samples)
    assert ids(made, "user") == ["u0", "u1", "u2"]
    assert [stats(made)[split][-1] for split in ("train", "validate", "test")] == [63, 8, 9]
    assert sorted(set(table(made, "sample.csv")["UserId"])) == [2, 3]


def test_one_place_of_ten_thousand_visits(city):
    """Ten users, there each hour: trajectories of 800 in train, of which the latest 500 are shown, 600 of history."""
    made = city("csv")
    made.write_check_ins([line("csv", user, 1, "shop", START + datetime.timedelta(hours=hour))
                          for hour in range(1000) for user in range(10)])
    succeeds(made.samples)
    assert stats(made) == {"train": (10, 1, 1, 10, 8000), "validate": (10, 1, 1, 10, 1000),
                           "test": (10, 1, 1, 10, 1000)}
    assert table(made, "city_gps_mapping.csv").to_numpy().tolist() == [[1, 41.0, -120.5]]
    succeeds(lambda: made.questions("-fields", "clock"))
    train, test = [read(pair) for pair in pairs(made)], [read(pair) for pair in pairs(made, "test")]
    assert [(len(pois), len(current)) for pois, _, current, *_ in train] == [(500, 500)] * 10
    assert [(len(pois), len(current)) for pois, _, current, *_ in test] == [(699, 99)] * 10
    assert all("range from 1 to 1." in pair and pair.endswith("POI id 1.") for pair in pairs(made, "test"))


def test_all_at_the_same_second(city):
    """The file's order decides the split; nothing of the target's own second is shown."""
    made = city("csv")
    made.edit("check_ins", every("csv", "time", "2024-01-01 10:00:00"))
    succeeds(made.samples)
    assert stats(made) == {"train": (2, 4, 2, 2, 64), "validate": (2, 4, 2, 2, 8), "test": (2, 4, 2, 2, 8)}
    assert table(made, "test_sample.csv")["PoiId"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    succeeds(made.questions)
    assert [read(pair)[0] for pair in pairs(made) + pairs(made, "test")] == [[]] * 4


def test_validation_may_be_empty(city):
    made = city("csv")
    made.configure(split_at=[0.9, 0.9])
    succeeds(made.samples)
    assert stats(made) == {"train": (2, 4, 2, 18, 72), "validate": (0, 0, 0, 0, 0), "test": (2, 4, 2, 2, 8)}
    made = city("getnext", "other")
    made.write("validate", HEADERS["getnext"])
    succeeds(made.samples)
    succeeds(made.questions)
    assert stats(made) == {"train": (2, 4, 2, 16, 64), "validate": (0, 0, 0, 0, 0), "test": (2, 4, 2, 2, 8)}


ROWS = {format_: [line(format_, *visit) for visit in visits()] for format_ in FORMATS}
NOTHING_LEFT = {
    "one row": ("csv", ROWS["csv"][:1], {}, "train"),
    "no user or place is frequent": ("csv", ROWS["csv"], {"min_user_freq": 10 ** 9}, "train"),
    "no place is frequent": ("tsmc2014", ROWS["tsmc2014"], {"min_poi_freq": 20}, "train"),
    "all alone in time": ("csv", ROWS["csv"], {"isolation_hours": 0.5, "session_time_interval": 0.5}, "train"),
    "trajectories of one": ("tsmc2014", ROWS["tsmc2014"], {"session_time_interval": 60}, "train"),
    "train too small": ("csv", ROWS["csv"], {"split_at": [0.01, 0.9]}, "train"),
    "no test": ("csv", ROWS["csv"], {"split_at": [0.9, 1]}, "test"),
    "test of unknown users": ("getnext", [*ROWS["getnext"][:72], *(
        line("getnext", user + 7, *rest) for user, *rest in visits()[72:])], {}, "test"),
    "test of unknown places": ("csv", [*ROWS["csv"][:72], *(
        line("csv", user, place + 7, *rest) for user, place, *rest in visits()[72:])], {}, "test"),
}


@pytest.mark.parametrize("format_, rows, changes, split", NOTHING_LEFT.values(), ids=NOTHING_LEFT)
def test_nothing_is_left(city, format_, rows, changes, split):
    made = city(format_)
    made.write_check_ins(rows)
    made.configure(**changes)
    refused(made, made.samples, f"best_conf/city.yml: no check-ins left for {split}", "give more data")


@pytest.mark.parametrize("role, word", [("train", "no rows"), ("test", "no rows")])
def test_a_file_of_getnext_without_rows(city, role, word):
    made = city("getnext")
    made.write(role, HEADERS["getnext"])
    refused(made, made.samples, made.path(role).name, word)


@pytest.mark.parametrize("value", [float("inf"), 1e300, 10 ** 12, 25.5])
def test_windows_of_any_size(city, value):
    """A gap of more hours than there are never ends a trajectory: one of each user, cut by the split."""
    made = city("csv")
    made.configure(session_time_interval=value * 60, isolation_hours=value)
    succeeds(made.samples)
    assert stats(made)["train"] == ((2, 4, 2, 16, 64) if value == 25.5 else (2, 4, 2, 2, 64))


# Gowalla: the join.

def test_what_the_join_leaves_out_is_counted(city, good, caplog):
    made = city("gowalla")
    made.edit("all_check_ins", lambda text: text + "".join(
        f"9\t2010-10-19T23:55:27Z\t{lat}\t{lng}\t{spot}\n"
        for lat, lng, spot in [(405.0, -120, 1), (41, 1e9, 1), ("1e400", -120, 1), ("-inf", "inf", 1),     # off
                               (41, -121, 77), (41, -121, 5),           # at no spot, at one without a category
                               (0, 0, 1)]))                             # elsewhere
    made.edit("spots", lambda text: text + '5,0,0,\n1,0,0,"[{\'name\': \'other\'}]"\n')
    caplog.set_level(logging.INFO)
    succeeds(made.samples)
    assert "4 check-ins off the globe left out" in caplog.text
    assert "2 check-ins at spots without a category left out" in caplog.text
    assert "spots.csv: 1 spots have several categories; the first of each counts" in caplog.text
    assert table(made, "sample.csv").equals(table(good("gowalla"), "sample.csv"))


CATEGORIES = ["[]", "x", "[{}]", "[{'name': 5}]", "[{'name': None}]", "[{'name': ''}]", "{'name': 'x'}",
              "[{'name': '\\ud800'}]", "[" * 100_000, "-" * 100_000 + "1", "(" * 90 + ")" * 90,
              "[{'name': __import__('os').getcwd()}]", "[{'name': 'cut", "[{'name': 'x'}] * 9", "1" * 10_000]


@pytest.mark.parametrize("text", CATEGORIES, ids=[text[:25] for text in CATEGORIES])
@pytest.mark.parametrize("role", ["spots", "check_ins"])
def test_a_category_that_has_no_name(city, role, text):
    """`check_ins` is what the join has written: the reader trusts it as little."""
    made = city("gowalla")
    made.edit(role, lambda old: old.replace(CATEGORY % "food", text, 1))
    run = made.generate if role == "spots" else lambda: made.call("run.py", "-f", "best_conf/ca.yml")
    refused(made, run, f"{made.path(role).name}, line {3 if role == 'spots' else 4}: category ")


def states(**changes) -> str:
    """A GeoJSON of the two states; keywords change Nevada's feature."""
    return json.dumps({"features": [
        {"properties": {"name": "California"}, "geometry": {"type": "Polygon", "coordinates": SQUARE}},
        {"properties": {"name": "Nevada"}, "geometry": {"type": "Polygon", "coordinates": SQUARE}, **changes}]})


def polygon(*points) -> dict:
    return {"geometry": {"type": "Polygon", "coordinates": [[*points]]}}


NO_GEOJSON = {
    "cut off": states()[:-9], "a list": "[1]", "text": '"x"', "number of features": '{"features": 5}',
    "map of features": '{"features": {"a": 1}}', "no features": '{"features": []}', "null": '{"features": null}',
    "nested lists": "[" * 100_000, "nested maps": '{"a":' * 100_000, "NaN instead": "NaN", "not UTF-8": b"\xff\xfe{",
    "no name": states(properties={}), "a list for a name": states(properties={"name": ["Nevada"]}),
    "no properties": states(properties=None), "another name": states(properties={"name": "N" * 99_999}),
    "no geometry": states(geometry=None), "text for geometry": states(geometry="POLYGON"),
    "unknown type": states(geometry={"type": "Blob", "coordinates": SQUARE}),
    "no coordinates": states(geometry={"type": "Polygon"}), "coordinates null": states(
        geometry={"type": "Polygon", "coordinates": None}),
    "numbers as text": states(**polygon(["-120", "x"], ["1", "2"], ["3", "4"], ["-120", "x"])),
    "too few points": states(**polygon([0, 0])), "points of one number": states(**polygon([0], [1], [2], [0])),
    "NaN": states(**polygon([0, 0], [0, float("nan")], [1, 1], [0, 0])),
    "Infinity": states(**polygon([0, 0], [0, float("inf")], [1, 1], [0, 0])),
    "latitude first": states(**polygon([30, -130], [30, -110], [50, -110], [50, -130], [30, -130])),
    "lines that cross": states(**polygon([-120, 30], [-110, 50], [-110, 30], [-120, 50], [-120, 30])).replace(
        "-130, 30], [-110, 30], [-110, 50", "-130, 30], [-110, 50], [-110, 30", 1),
    "a number of 400 digits": states(**polygon([0, 0], [1, 10 ** 400], [1, 0], [0, 0])),
    "in metres": states(**polygon([0, 0], [10 ** 6, 0], [10 ** 6, 10 ** 6], [0, 0])),
}


@pytest.mark.parametrize("text", NO_GEOJSON.values(), ids=NO_GEOJSON)
def test_states_that_are_none(city, text):
    made = city("gowalla")
    made.write("states", text)
    refused(made, made.generate, "raw/states.json: ")


@pytest.mark.parametrize("geometry", [{"type": "Point", "coordinates": [1, 2]}, polygon([1, 1], [2, 2], [1, 1], [1, 1])[
    "geometry"], {"type": "Polygon", "coordinates": []}, {"type": "GeometryCollection", "geometries": []}], ids=str)
def test_states_without_an_area(city, geometry):
    made = city("gowalla")
    made.write("states", states(geometry=geometry).replace("California", "Oregon"))
    made.configure(keep_states=["Nevada"])
    refused(made, made.generate, "raw/states.json: ")


def test_a_state_in_several_features_is_all_of_them(city, good):
    made = city("gowalla")
    halves = [[[[west, 30], [west + 10, 30], [west + 10, 50], [west, 50], [west, 30]]] for west in (-130.25, -120.25)]
    made.write("states", json.dumps({"features": [
        {"properties": {"name": name}, "geometry": {"type": "Polygon", "coordinates": half}}
        for name, half in [("California", halves[0]), ("California", halves[1]), ("Nevada", halves[1])]]}))
    succeeds(made.samples)
    assert table(made, "sample.csv").equals(table(good("gowalla"), "sample.csv"))
