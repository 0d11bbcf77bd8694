"""Raw check-ins as tired people and strangers hand them in: read right, or refused in one line without a trace."""
import datetime
import gzip
import json
import re

import pandas as pd
import pytest

import cities
from cities import COLUMN, FORMATS, cell, city, copies, every, good, in_order, refused, succeeds  # noqa: F401
from harness import snapshot

pytestmark = pytest.mark.bulk


def test_the_good_cities_are_what_they_should_be(good):
    for format_ in FORMATS:
        stats = json.loads((good(format_).folder / "stats.json").read_text())
        names = ("users", "pois", "categories", "trajectories", "check_ins")
        assert {split: tuple(stats[split][name] for name in names) for split in cities.COUNTS} == cities.COUNTS
        places = pd.read_csv(good(format_).folder / f"{good(format_).name}_gps_mapping.csv")
        first = cities.FIRST_ID[format_]
        assert places.to_numpy().tolist() == [[first + i, 41 + i, -120.5] for i in range(4)]
        train = pd.read_csv(good(format_).folder / "train_sample.csv")
        assert train["LocalTime"].tolist() == [str(visit[3]) for visit in cities.visits()[:64]]
        assert (train["PoiId"] - first + 1).tolist() == [visit[1] for visit in cities.visits()[:64]]
        assert (train["UserId"] - first + 1).tolist() == [visit[0] for visit in cities.visits()[:64]]


# What changes nothing: the samples are the same to the byte.

def backwards(text: str) -> str:
    head, *lines = text.splitlines(keepends=True)
    return "".join([head, *lines[::-1]]) if "\t" not in head else "".join([head, *lines][::-1])


HARMLESS = {
    "byte order mark": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "lone CR": lambda text: text.replace("\n", "\r"),
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "times out of order": backwards,
    "no end of the last line": lambda text: text[:-1],
    "semicolons": lambda text: text.replace(",", ";").replace("\t", ";"),
}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_works_as_if_nothing_were_the_matter(city, good, format_, change):
    made = city(format_)
    made.edit(made.main, change)
    succeeds(made.samples)
    assert snapshot(made.folder) == snapshot(good(format_).folder)


def portal(text: str) -> str:
    """The file of TSMC 2014 as data portals have it, with columns in another order."""
    head = "userId\tvenueId\tvenueCategoryId\tvenueCategory\tlatitude\tlongitude\ttimezoneOffset\tutcTimestamp\n"
    return in_order("tsmc2014", 7, 0, 1, 2, 3, 4, 5, 6)(head + text).replace("\t", ",")


def unix(time: str) -> str:
    return str(int(datetime.datetime.strptime(time, "%a %b %d %H:%M:%S %z %Y").timestamp()))


@pytest.mark.parametrize("format_, role, change", [
    ("csv", "check_ins", in_order("csv", 5, 3, 4, 2, 0, 1)),
    ("getnext", "test", in_order("getnext", 12, 9, 6, 5, 4, 2, 1, 0)),
    ("gowalla", "spots", lambda text: "".join(f"{kind},{spot}\n" for spot, _, _, kind in
                                              (line.split(",", 3) for line in text.splitlines()))),
    ("csv", "check_ins", lambda text: text.replace("user,poi", " user, poi ")),
    ("csv", "check_ins", every("csv", "time", lambda time: time.replace(" ", "T") + ".75")),
    ("csv", "check_ins", every("csv", "time", lambda time: time + " +09:00")),
    ("csv", "check_ins", every("csv", "time", lambda time: time + ("Z" if "04" in time else "-0330"))),
    ("csv", "check_ins", every("csv", "poi", '"%s"'.__mod__)),
    ("csv", "check_ins", every("csv", "lat", lambda lat: f"{float(lat):.3e}")),
    ("getnext", "train", every("getnext", "user", lambda user: f"{user}.0")),
    ("tsmc2014", "check_ins", every("tsmc2014", "offset", "540.0")),
    ("tsmc2014", "check_ins", portal), ("tsmc2014", "check_ins", lambda text: every("tsmc2014", "time", unix)(text)),
    ("gowalla", "all_check_ins", lambda text: "user,check-in_time,latitude,longitude,location_id\n"
     + text.replace("\t", ",")),
    ("getnext", "test", every("getnext", "time", lambda time: time.replace(" ", "T").replace("+00:00", "-04:00"))),
    ("gowalla", "states", lambda text: "\ufeff" + text),
    ("gowalla", "spots", lambda text: text + text.partition("\n")[2]),
], ids=["csv: columns", "getnext: columns", "spots: columns", "spaces in the header", "fractions", "offsets",
        "mixed offsets", "quoted ids", "exponents", "ids 1.0", "offset 540.0", "portal",
        "Unix seconds", "Gowalla with a header", "zones", "GeoJSON with BOM", "spots twice"])
def test_other_ways_to_write_the_same(city, good, format_, role, change):
    made = city(format_)
    made.edit(role, change)
    succeeds(made.samples)
    assert snapshot(made.folder) == snapshot(good(format_).folder)


@pytest.mark.parametrize("format_, roles", [("csv", ["check_ins"]), ("tsmc2014", ["check_ins"]),
                                            ("getnext", ["train", "validate", "test"]),
                                            ("gowalla", ["all_check_ins", "spots", "states"])])
def test_gz_stands_in_and_the_plain_file_goes_first(city, good, format_, roles):
    made = city(format_)
    for role in roles:
        made.pack(role)
    succeeds(made.samples)
    assert snapshot(made.folder) == snapshot(good(format_).folder)
    made.write(roles[0], "")
    assert "empty" in refused(made, made.samples, made.path(roles[0]).name + ": ")
    made.write(roles[0], good(format_).read(roles[0]))
    made.path(roles[0]).with_name(made.path(roles[0]).name + ".gz").write_bytes(b"nonsense")
    succeeds(made.samples)
    assert snapshot(made.folder) == snapshot(good(format_).folder)


# What is refused, and every output survives.

CUT = {"the last line": lambda text: text[:len(text) - 40], "half of it": lambda text: text[:len(text) // 2 - 3]}
WHOLE_FILES = {                                   # what happens to the file -> a word of the refusal
    "empty": (lambda text: "", "empty"),
    "one blank line": (lambda text: "\n", "no"),
    "UTF-16": (lambda text: text.encode("utf-16"), "save it"),
    "UTF-16 without its mark": (lambda text: text.encode("utf-16-le"), "NUL"),
    "colons": (lambda text: text.replace(",", ":").replace("\t", ":"), ""),
    "packed, but not called .gz": (lambda text: gzip.compress(text.encode()), ""),
    "NUL bytes": (lambda text: text[:200] + "\0\0" + text[200:], "NUL"),
    "cut off in the last line": (lambda text: text[:-30], "line "),
    "one column too many": (lambda text: text.replace("\n", ",x\n" if "\t" not in text else "\tx\n")
                            .replace(",x", "", 1), "more than"),
    "JSON": (lambda text: json.dumps([text]), ""),
}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("change, word", WHOLE_FILES.values(), ids=WHOLE_FILES)
def test_a_file_that_is_not_what_it_should_be(city, format_, change, word):
    made = city(format_)
    made.edit(made.main, change)
    refused(made, made.samples, made.path(made.main).name, word)


@pytest.mark.parametrize("format_, words", [
    ("csv", "mine.csv, line 2: lat -120.5"), ("tsmc2014", "tky.txt, line 1: latitude -120.5"),
    ("getnext", "train.csv, line 2: latitude -120.5"), ("gowalla", "no check-in in California, Nevada")])
def test_longitude_before_latitude(city, format_, words):
    """All of Gowalla's points are off the globe then, as a few of the real ones are."""
    made = city(format_)
    made.edit(made.main, lambda text: re.sub(r"(4\d\.0)([,\t])(-120\.5)", r"\3\2\1", text))
    refused(made, made.samples, words)


def folder(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("format_, role", [("csv", "check_ins"), ("tsmc2014", "check_ins"), ("getnext", "validate"),
                                           ("gowalla", "all_check_ins"), ("gowalla", "spots"), ("gowalla", "states")])
@pytest.mark.parametrize("change, words", [(lambda path: path.unlink(), "not found"), (folder, "a folder"),
                                           (dangling, "link to nothing"), (loop, "link to nothing")],
                         ids=["missing", "folder", "dangling link", "loop of links"])
def test_what_is_no_file(city, format_, role, change, words):
    made = city(format_)
    change(made.path(role))
    refused(made, made.samples, f"{made.path(role).relative_to(made.root)}: ", words, "put it there")


@pytest.mark.parametrize("format_, role", [("csv", "check_ins"), ("tsmc2014", "check_ins"), ("getnext", "test"),
                                           ("gowalla", "all_check_ins"), ("gowalla", "states")])
@pytest.mark.parametrize("change", [lambda packed: packed[:-20], lambda packed: b"plain text" * 9,
                                    lambda packed: packed[:-8] + b"0000" + packed[-4:],
                                    lambda packed: packed + b"and more"],
                         ids=["truncated", "not packed", "wrong checksum", "more behind it"])
def test_a_gz_that_is_none(city, format_, role, change):
    made = city(format_)
    made.pack(role, change)
    refused(made, made.samples, f"{made.path(role).name}.gz: cannot be read to its end", "fetch it again")


DEGREES = ["nan", "inf", "-inf", "1e400", "north", "", " ", "4O.5", "0x29", "41°", "1_0", "None", "9" * 400]
TIMES = ["2024-02-30 10:00:00", "2024-13-01 10:00:00", "24-01-01 10:00:00", "0001-01-01 00:00:00",
         "9999-12-31 23:59:59", "1704067200", "1704067200.5", "01/02/2024 10:00", "2024-01-01 25:00:00", "2024", "NaT",
         "2024-01-01 10", "2024-01-01 10:0", "20240101", "now", "", "nan"]
TSMC_TIMES = ["Tue Feb 30 18:00:09 +0000 2012", "Tue Apr 03 18:00:09 +0900 2012", "Tue Apr 03 18:00:09 +0000 12",
              "Sat Jan 01 00:00:00 +0000 0001", "Fri Dec 31 23:59:59 +0000 9999", "2012-04-03 18:00:09", "1333476009",
              "Die Apr 03 18:00:09 +0000 2012", "", "Tue Apr 03 18:00:09 +0000 20"]
IDS = ["u1", "3.5", "nan", "inf", "1e30", str(10 ** 15), str(2 ** 53 + 1), str(2 ** 63),
       "-" + str(2 ** 64), "", "True", "9" * 400]
CELLS = [(format_, role, value)
         for format_, roles in (("csv", {"lat": [*DEGREES, "91", "-90.1", '"40,5"'], "lon": ["181", "nan", ""],
                                         "time": TIMES, "user": [""], "poi": [""],
                                         "category": ["", " ", "<>", "\u2028"]}),
                                ("tsmc2014", {"lat": [*DEGREES, "91", "40,5"], "lon": ["-180.5", "1e999"],
                                              "time": TSMC_TIMES, "user": IDS, "category": ["<> >", ""],
                                              "offset": ["100000", "-99999", "nan", "540.5", "JST", "", "1441"]}),
                                ("getnext", {"lat": [*DEGREES, "-91"], "lon": ["999", "west"], "time": TIMES[:8],
                                             "user": IDS, "trajectory": [""], "poi": [""], "category": ["<<"]}),
                                ("gowalla", {"lat": ["nan", "north", "", "0x29"], "lon": ["nan", "40,5"],
                                             "user": IDS, "poi": IDS,
                                             "time": ["yesterday", "2010-02-30T10:00:00Z", ""]}))
         for role, values in roles.items() for value in values]


@pytest.mark.parametrize("format_, role, value", CELLS, ids=[f"{f}-{r}-{v[:40]!r}" for f, r, v in CELLS])
def test_a_cell_that_says_nothing(city, format_, role, value):
    """The refusal names the file and the line."""
    made = city(format_)
    made.edit(made.main, cell(5, COLUMN[format_][role], value))
    refused(made, made.samples, f"{made.path(made.main).relative_to(made.root)}, line 5: ")
