"""best_conf/<data set>.yml: every threshold, window, path and format that differs between data sets."""
import dataclasses
import os
import zoneinfo
from pathlib import Path

import yaml

from checkins.wording import short
from ga_llm.base import artifacts
from ga_llm.base.cli import UserError

# The raw files of each format, as keys under `raw:`, and the keys that only this format has.
RAW_FILES = {
    "getnext": ("train", "validate", "test"),
    "tsmc2014": ("check_ins",),
    "gowalla": ("check_ins", "all_check_ins", "spots", "states"),
    "tist2015": ("check_ins", "pois"),
    "snap": ("check_ins",),
    "csv": ("check_ins",),
}
OWN_KEYS = {"gowalla": ("keep_states",), "tist2015": ("bounding_box",), "snap": ("bounding_box",), "csv": ("columns",)}
OPTIONAL_KEYS = {"snap": ("time_zone",), "csv": ("time_zone",)}
BOX = {"south": 90, "west": 180, "north": 90, "east": 180}      # degrees at most
CSV_COLUMNS = ("user", "poi", "lat", "lon", "time")
CSV_OPTIONAL = ("category", "name", "offset", "split", "trajectory")
# What stats.json counts by split, and what `published` may hold.
COUNTS = ("users", "pois", "categories", "trajectories", "check_ins")
PROTOCOLS = ("llm4poi", "sthgcn")       # `published` may also hold how many pairs these have
# How check-ins without a split of their own are filtered and split, and how those without trajectories are cut.
SPLITTING = ("min_poi_freq", "min_user_freq", "split_at", "isolation_hours", "passes")
CUTTING = ("session_time_interval",)


@dataclasses.dataclass(frozen=True)
class Config:
    """One data set's file, checked. `best_conf/tky.yml` explains each key."""

    path: Path
    dataset_name: str
    format: str                          # a key of RAW_FILES
    raw: dict                            # role -> path from the repository's root
    raw_from: str                        # the way out if a raw file is missing
    first_id: int                        # 0: ids 0..n-1, unseen n; 1: ids 1..n, unseen 0
    max_history: int                     # check-ins
    max_current: int                     # check-ins
    max_current_with_history: int        # check-ins
    max_similar: int                     # check-ins
    max_history_with_similar: int        # check-ins
    published: dict                      # split -> {count: figure}; may be empty
    min_poi_freq: int | None = None      # check-ins; kept if above
    min_user_freq: int | None = None     # check-ins; kept if above
    split_at: list | None = None         # shares of all check-ins where validation and test begin
    isolation_hours: float | None = None
    passes: int | None = None            # of filter, split and isolation
    session_time_interval: float | None = None   # minutes
    keep_states: list | None = None      # gowalla: names of GeoJSON features
    bounding_box: dict | None = None     # tist2015, snap: south, west, north, east (degrees) of what is kept
    columns: dict | None = None          # csv: role -> column of the file
    time_zone: str | None = None         # snap, csv: IANA's name of where local times are; the file's are then UTC
    history_step: int | None = None      # check-ins; process_llm_gps.py -history_step, in no YAML
    datasets: Path = artifacts.DATASETS  # the root of what is written; every script's -datasets, in no YAML

    @property
    def folder(self) -> Path:
        """Where this data set's samples and questions lie."""
        return artifacts.preprocessed(self.dataset_name, self.datasets)

    @property
    def run_command(self) -> str:
        return self.command("run.py", f"-f {self.path}")

    def command(self, script: str, flags: str = "") -> str:
        """What the user runs to make this data set's files with `script`, whose first flags are given or name it."""
        elsewhere = "" if self.datasets == artifacts.DATASETS else f" -datasets {self.datasets}"
        return f"python data-preprocess/{script} {flags or f'-dataset_name {self.dataset_name}'}{elsewhere}"


KEYS_EXPLAINED = "see best_conf/tky.yml"
EXPLAINED = {"csv": "see best_conf/sample.yml", "tist2015": "see best_conf/istanbul.yml",
             "snap": "see best_conf/austin.yml"}
LARGEST_FILE = 1_000_000    # bytes; a larger one is no YAML of ours, but perhaps raw data
MOST = 10 ** 9              # check-ins; more than any data set has
MOST_PASSES = 100
_LIMITS = ("max_history", "max_current", "max_current_with_history", "max_similar", "max_history_with_similar",
           "min_poi_freq", "min_user_freq")


class _Loader(yaml.SafeLoader):
    """YAML without what may surprise: a key given twice, of which PyYAML takes the last, and aliases.

    Aliases within aliases can make ten lines into more values than the memory holds.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name); write the value out",
                                              self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {short(key.value)} twice; remove one",
                                                        key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _values(path: Path) -> dict:
    """What a YAML file says. Raises UserError, with the line, if it is no map in YAML."""
    if not path.is_file():
        raise UserError(f"{path}: not found; run from the repository's root, with a file of {artifacts.CONFIGS}/")
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"{path}: too large for a data set's YAML; give a file of {artifacts.CONFIGS}/")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise UserError(f"{path}, line {line}: not YAML: {error.problem}; mend the line") from None
    except (yaml.YAMLError, ValueError) as error:       # ValueError: not UTF-8, a date such as 2024-02-30
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}; {KEYS_EXPLAINED}") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML of ours: nested too deeply; {KEYS_EXPLAINED}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `key: value`; {KEYS_EXPLAINED}")
    return values


def add_datasets_flag(parser) -> None:
    parser.add_argument("-datasets", type=Path, default=artifacts.DATASETS, metavar="FOLDER",
                        help="the root of what is written and read again (default: %(default)s)")


def add_flags(parser) -> None:
    """The flags that name a data set, for `from_flags`."""
    parser.add_argument("-dataset_name", required=True, help="nyc, tky, ca, or any with a best_conf/<name>.yml")
    add_datasets_flag(parser)


def from_flags(args) -> Config:
    return load(artifacts.config_file(args.dataset_name), args.datasets)


def load(path: Path | str, datasets: Path | str = artifacts.DATASETS) -> Config:
    """Read one data set's YAML; its files lie below `datasets`.

    Raises UserError with file and key if a key is missing, unknown or senseless.
    """
    path = Path(path)
    values = _values(path)
    format_ = values.get("format")
    explained = EXPLAINED.get(format_ if isinstance(format_, str) else None, KEYS_EXPLAINED)

    def check(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise UserError(f"{path}: {key}: expected {expected}, got {short(values.get(key))}; {explained}")

    check(isinstance(format_, str) and format_ in RAW_FILES, "format", "one of " + ", ".join(RAW_FILES))
    raw, columns = (values[key] if isinstance(values.get(key), dict) else {} for key in ("raw", "columns"))
    in_files = format_ == "getnext" or format_ == "csv" and "train" in raw
    own_split = in_files or format_ == "csv" and "split" in columns
    own_trajectories = format_ == "getnext" or format_ == "csv" and "trajectory" in columns
    optional = {field.name for field in dataclasses.fields(Config) if field.default is None}
    needed = {field.name for field in dataclasses.fields(Config)} - optional - {"path", "datasets"}
    needed |= set(OWN_KEYS.get(format_, ()))
    for keys, given, what in ((SPLITTING, own_split, "split"), (CUTTING, own_trajectories, "trajectories")):
        for key in sorted(values.keys() & set(keys if given else ())):
            raise UserError(f"{path}: {key}: the files have {what} of their own, so it does nothing; remove it")
        needed |= set() if given else set(keys)
    _same_keys(f"{path}", values, needed, OPTIONAL_KEYS.get(format_, ()), explained)
    check(values["dataset_name"] == path.stem, "dataset_name", f"{short(path.stem)}, the file's own name")
    artifacts.dataset_name(path.stem, f"{path}: dataset_name")
    check(_is_whole(values["first_id"]) and values["first_id"] in (0, 1), "first_id", "0 or 1")
    for key in sorted(needed.intersection(_LIMITS)):
        check(_is_whole(values[key]) and 0 <= values[key] <= MOST, key, f"a whole number of check-ins, at most {MOST}")
    raw_files = (("train", "test"), ("validate",)) if "train" in raw and format_ == "csv" else (RAW_FILES[format_], ())
    for key, (keys, more) in (("raw", raw_files), ("columns", (CSV_COLUMNS, CSV_OPTIONAL))):
        if key in needed:
            check(isinstance(values[key], dict), key, "a map of " + ", ".join(keys))
            _same_keys(f"{path}: {key}", values[key], set(keys), more, explained)
            check(all(map(_is_line, values[key].values())), key, "a line of text for each")
    names = values["raw"].values()
    # A name must end in a file, and no file may be given twice: what is written must not replace what is read.
    check(all(Path(name).name for name in names), "raw", "a file's path for each")
    check(len({os.path.realpath(name) for name in names}) == len(names), "raw", "another file for each")
    if "columns" in needed:
        apart = [column for role, column in values["columns"].items() if role not in ("category", "name")]
        check(len(set(apart)) == len(apart), "columns", "another column for each (but for category and name)")
        check(not (in_files and "split" in columns), "columns", "no split where raw names a file for each")
        check(not ("time_zone" in values and "offset" in columns), "time_zone", "none where columns has an offset")
    check(_is_line(values["raw_from"]), "raw_from", "a line of text")
    figures = values["published"]
    check(isinstance(figures, dict) and all(split in artifacts.SPLITS and isinstance(counts, dict)
                                            and not counts.keys() - {*COUNTS, *PROTOCOLS}
                                            and all(map(_is_whole, counts.values()))
                                            for split, counts in figures.items()),
          "published", f"{{}}, or a map of {', '.join(artifacts.SPLITS)} to maps of "
          f"{', '.join((*COUNTS, *PROTOCOLS))} to numbers")
    if "bounding_box" in needed:
        box = values["bounding_box"]
        check(isinstance(box, dict), "bounding_box", "a map of " + ", ".join(BOX))
        _same_keys(f"{path}: bounding_box", box, set(BOX), (), explained)
        check(all(_is_number(box[side]) and abs(box[side]) <= most for side, most in BOX.items())
              and box["south"] < box["north"] and box["west"] != box["east"], "bounding_box",
              "degrees, south below north (a box across 180° has its west east of its east)")
    if "time_zone" in values:
        check(isinstance(values["time_zone"], str) and _is_zone(values["time_zone"]), "time_zone",
              "a name such as Asia/Tokyo")
    if "passes" in needed:
        cuts = values["split_at"]
        check(isinstance(cuts, list) and len(cuts) == 2 and all(map(_is_number, cuts))
              and 0 < cuts[0] <= cuts[1] <= 1, "split_at", "two rising shares such as [0.8, 0.9]")
        check(_is_whole(values["passes"]) and 1 <= values["passes"] <= MOST_PASSES, "passes", f"1 to {MOST_PASSES}")
    for key in sorted(needed.intersection(("isolation_hours", "session_time_interval"))):
        check(_is_number(values[key]) and values[key] > 0, key, "a number above 0")
    if "keep_states" in needed:
        states = values["keep_states"]
        check(isinstance(states, list) and states and all(map(_is_line, states)), "keep_states",
              "a list of names")
    return Config(path=path, datasets=Path(datasets), **values)


def _is_whole(value) -> bool:
    return type(value) is int       # True is an int too


def _is_line(value) -> bool:
    return isinstance(value, str) and value.isprintable()       # messages, which are one line, show it


def _is_number(value) -> bool:
    return type(value) in (int, float)


def _is_zone(name: str) -> bool:
    try:
        zoneinfo.ZoneInfo(name)
        return True
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):    # no such zone, no name, a folder of zones
        return False


def _same_keys(where: str, values: dict, needed: set, optional: tuple[str, ...], explained: str) -> None:
    for key in values:
        if key not in needed and key not in optional:
            raise UserError(f"{where}: unknown key {short(key)}; it takes {', '.join(sorted(needed.union(optional)))}")
    lacking = sorted(needed - values.keys())
    if lacking:
        raise UserError(f"{where}: missing key{'s' * (len(lacking) > 1)} {', '.join(lacking)}; {explained}")
