"""The same small city in every raw format, in a repository's root of its own, to be damaged by tests.

Users 1 and 2 check in 40 times each, alternately and an hour apart, in ten blocks of four check-ins with more than a
day between blocks; the places 1 to 4 take turns. Of the 80 check-ins, in order of time, 64 are train, 8 validation and
8 test, which makes 16, 2 and 2 trajectories of four, and as many question-answer pairs.
"""
import datetime
import gzip
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import yaml

from harness import Result, call, refusal, snapshot

COUNTS = {"train": (2, 4, 2, 16, 64), "validate": (2, 4, 2, 2, 8), "test": (2, 4, 2, 2, 8)}
FORMATS = ("csv", "tsmc2014", "getnext", "gowalla")
KINDS = ("shop", "food")
# role -> file, for each format
RAW = {"csv": {"check_ins": "raw/mine.csv"},
       "tsmc2014": {"check_ins": "raw/tky.txt"},
       "getnext": {"train": "raw/train.csv", "validate": "raw/val.csv", "test": "raw/test.csv"},
       "gowalla": {"check_ins": "raw/joined.csv", "all_check_ins": "raw/all.txt", "spots": "raw/spots.csv",
                   "states": "raw/states.json"}}
FIRST_ID = {"csv": 1, "tsmc2014": 1, "getnext": 0, "gowalla": 1}
LIMITS = {"max_history": 600, "max_current": 500, "max_current_with_history": 200, "max_similar": 200,
          "max_history_with_similar": 200}
SPLITTING = {"min_poi_freq": 0, "min_user_freq": 0, "split_at": [0.8, 0.9], "isolation_hours": 24, "passes": 1,
             "session_time_interval": 1440}
HEADERS = {"csv": "user,poi,category,lat,lon,time\n",
           "getnext": "user_id,POI_id,POI_catid,POI_catid_code,POI_catname,latitude,longitude,timezone,UTC_time,"
                      "local_time,day_of_week,norm_in_day_time,trajectory_id,norm_day_shift,norm_relative_time\n",
           "gowalla": "UserId,PoiId,PoiCategoryId,Latitude,Longitude,UTCTime\n"}
CATEGORY = "[{'url': '/categories/89', 'name': '%s'}]"
SQUARE = [[[-130, 30], [-110, 30], [-110, 50], [-130, 50], [-130, 30]]]
# Where each format has what, counted from 0.
COLUMN = {"csv": {"user": 0, "poi": 1, "category": 2, "lat": 3, "lon": 4, "time": 5},
          "tsmc2014": {"user": 0, "poi": 1, "category": 3, "lat": 4, "lon": 5, "offset": 6, "time": 7},
          "getnext": {"user": 0, "poi": 1, "category": 4, "lat": 5, "lon": 6, "time": 9, "trajectory": 12},
          "gowalla": {"user": 0, "time": 1, "lat": 2, "lon": 3, "poi": 4}}


def visits() -> list[tuple[int, int, str, datetime.datetime]]:
    """(user, place, category, local time), in order of time."""
    start = datetime.datetime(2024, 1, 1)
    return [(user, 1 + turn % 4, KINDS[turn % 2],
             start + datetime.timedelta(hours=2 * turn + 30 * (turn // 4) + user - 1))
            for turn in range(40) for user in (1, 2)]


def latitude(place: int) -> float:
    return 40.0 + place


LONGITUDE = -120.5     # as a latitude it would be off the globe


def line(format_: str, user, place, kind: str, time: datetime.datetime, lat=None) -> str:
    """One check-in as the format's file has it."""
    lat = latitude(place) if lat is None else lat
    if format_ == "csv":
        return f"u{user},p{place},{kind},{lat},{LONGITUDE},{time}\n"
    if format_ == "tsmc2014":
        utc = time - datetime.timedelta(minutes=540)
        return f"{user}\tp{place}\tid of {kind}\t{kind}\t{lat}\t{LONGITUDE}\t540\t{utc:%a %b %d %H:%M:%S +0000 %Y}\n"
    if format_ == "getnext":
        block = (time - datetime.datetime(2024, 1, 1)) // datetime.timedelta(hours=38)
        return (f"{user},p{place},id of {kind},5,{kind},{lat},{LONGITUDE},-240,{time}+00:00,{time}+00:00,1,0.5,"
                f"{user}_{block},0,0.5\n")
    return f"{user}\t{time:%Y-%m-%dT%H:%M:%SZ}\t{lat}\t{LONGITUDE}\t{place}\n"


def config(format_: str, name: str) -> dict:
    """What best_conf/<name>.yml says."""
    values = {"dataset_name": name, "format": format_, "raw": RAW[format_], "raw_from": "put it there",
              "first_id": FIRST_ID[format_], "published": {}, **LIMITS, **({} if format_ == "getnext" else SPLITTING)}
    if format_ == "csv":
        values["columns"] = {role: role for role in ("user", "poi", "category", "lat", "lon", "time")}
    if format_ == "gowalla":
        values["keep_states"] = ["California", "Nevada"]
    return values


class City:
    """A root with best_conf/<name>.yml and the raw files of `format_`; gowalla's is called ca, the others city."""

    def __init__(self, root: Path, format_: str):
        self.root, self.format = root, format_
        self.name = "ca" if format_ == "gowalla" else "city"
        self.yaml = root / "best_conf" / f"{self.name}.yml"
        self.folder = root / "datasets" / self.name / "preprocessed"

    def build(self) -> "City":
        """Write the YAML and the raw files."""
        if self.format == "gowalla":
            pytest.importorskip("shapely")
        (self.root / "best_conf").mkdir(parents=True)
        (self.root / "raw").mkdir()
        self.configure()
        self.write_check_ins([line(self.format, *visit) for visit in visits()])
        if self.format == "gowalla":
            self.write("spots", "id,lng,lat,spot_categories\n" + "".join(
                f'{place},0,0,"{CATEGORY % KINDS[(place - 1) % 2]}"\n' for place in range(1, 5)))
            self.write("states", json.dumps({"type": "FeatureCollection", "features": [
                {"type": "Feature", "properties": {"name": name},
                 "geometry": {"type": "Polygon", "coordinates": SQUARE}} for name in ("California", "Nevada")]}))
        return self

    def write_check_ins(self, lines: list[str], cuts=(64, 72)) -> None:
        """Replace the raw check-ins; getnext's go to its three files, which `cuts` divide."""
        if self.format == "getnext":
            for role, rows in (("train", lines[:cuts[0]]), ("validate", lines[cuts[0]:cuts[1]]),
                               ("test", lines[cuts[1]:])):
                self.write(role, HEADERS["getnext"] + "".join(rows))
        else:
            self.write(self.main, ("" if self.format == "gowalla" else HEADERS.get(self.format, "")) + "".join(lines))

    @property
    def main(self) -> str:
        """The role of the raw file that tests damage."""
        return {"getnext": "train", "gowalla": "all_check_ins"}.get(self.format, "check_ins")

    @property
    def raw_check_ins(self) -> tuple[str, ...]:
        return tuple(RAW["getnext"]) if self.format == "getnext" else (self.main,)

    def configure(self, **changes) -> None:
        """Write the YAML; keywords override or add keys."""
        self.yaml.write_text(yaml.safe_dump({**config(self.format, self.name), **changes}))

    def path(self, role: str) -> Path:
        return self.root / RAW[self.format][role]

    def read(self, role: str) -> str:
        return self.path(role).read_bytes().decode("utf-8")

    def write(self, role: str, contents: str | bytes) -> None:
        self.path(role).write_bytes(contents if isinstance(contents, bytes) else contents.encode("utf-8"))

    def edit(self, role: str, change) -> None:
        """Replace a raw file's text by what `change` makes of it (text or bytes)."""
        self.write(role, change(self.read(role)))

    def pack(self, role: str, change=lambda packed: packed) -> None:
        """Replace a raw file by its .gz, of whose bytes `change` makes something."""
        path = self.path(role)
        path.with_name(path.name + ".gz").write_bytes(change(gzip.compress(path.read_bytes(), mtime=0)))
        path.unlink()

    def call(self, script: str, *arguments) -> Result:
        """Run a script; it does not wait for the disk, which would be half of the tests' time."""
        with mock.patch.object(os, "fsync"):
            return call(self.root, f"data-preprocess/{script}", *arguments)

    def generate(self) -> Result:
        pytest.importorskip("shapely")
        return self.call("generate_ca_raw.py")

    def samples(self) -> Result:
        """Everything up to the samples."""
        if self.format == "gowalla":
            made = self.generate()
            if made.code:
                return made
        return self.call("run.py", "-f", f"best_conf/{self.name}.yml")

    def questions(self, *arguments, stage: int = 2) -> Result:
        script = "process_llm_gps.py" if stage == 2 else "process_projector_gps_stage1.py"
        return self.call(script, "-dataset_name", self.name, *arguments)


def refused(city: City, run, *names: str) -> str:
    """Check that `run()` ends in a refusal that has `names` in it, and that not a byte in the root has changed."""
    before = snapshot(city.root)
    text = refusal(run(), *names)
    assert snapshot(city.root) == before
    assert len(text) < 600
    return text


def succeeds(run) -> Result:
    result = run()
    assert result.code == 0 and "error" not in result.err and "Warning" not in result.err, result.err
    return result


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Cities of which samples and questions are made, one a format: copies get damaged, and must keep all of it."""
    made = {}

    def get(format_: str) -> City:
        if format_ not in made:
            made[format_] = City(tmp_path_factory.mktemp(format_) / "root", format_).build()
            succeeds(made[format_].samples)
            succeeds(made[format_].questions)
        return made[format_]
    return get


@pytest.fixture(scope="module")
def copies():
    """The copies that tests damage: {(format, name): folder}."""
    return {}


@pytest.fixture
def city(good, copies, tmp_path_factory):
    """A copy of a good city, to be damaged. It is mended for the next test, which is quicker than to copy all."""
    taken = []

    def get(format_: str, name: str = "root") -> City:
        if (format_, name) not in copies:
            copies[format_, name] = tmp_path_factory.mktemp(format_) / name
            shutil.copytree(good(format_).root, copies[format_, name])
        taken.append((copies[format_, name], good(format_).root))
        return City(copies[format_, name], format_)
    yield get
    for copy, original in taken:
        mend(copy, original)


def mend(copy: Path, original: Path) -> None:
    """Make one folder like the other."""
    found, expected = snapshot(copy), snapshot(original)
    wrong = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
    for name in sorted(wrong & found.keys(), reverse=True):         # what is in a folder before the folder
        (copy / name).rmdir() if found[name] == "folder" else (copy / name).unlink()
    for name in sorted(wrong & expected.keys()):
        (copy / name).mkdir() if expected[name] == "folder" else shutil.copy(original / name, copy / name)


# What may have happened to a text.

def cell(line: int, column: int, value: str):
    """The cell of a line (from 1) replaced."""
    def change(text: str) -> str:
        lines = text.split("\n")
        mark = "\t" if "\t" in lines[0] else ","
        cells = lines[line - 1].split(mark)
        cells[column] = value
        lines[line - 1] = mark.join(cells)
        return "\n".join(lines)
    return change


def every(format_: str, role: str, value):
    """A column replaced in all rows, by what `value` (a text, or a function of the cell) makes of it."""
    def change(text: str) -> str:
        mark, column = "," if format_ in HEADERS and format_ != "gowalla" else "\t", COLUMN[format_][role]
        lines = text.splitlines()
        for number in range(mark == ",", len(lines)):
            cells = lines[number].split(mark)
            cells[column] = value(cells[column]) if callable(value) else value
            lines[number] = mark.join(cells)
        return "\n".join(lines) + "\n"
    return change


def in_order(format_: str, *columns: int):
    """The columns in another order."""
    mark = "," if format_ in ("csv", "getnext") else "\t"
    return lambda text: "".join(mark.join(line.split(mark)[column] for column in columns) + "\n"
                                for line in text.splitlines())
