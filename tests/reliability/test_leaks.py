"""No check-in at or after a target's time, and none of validation or test, gets where it could be learned from.

Every raw check-in gets coordinates that no other has, so that whatever a prompt shows is traced to its row of the raw
file; then some are given a category and coordinates that stand out, and whatever they must not reach keeps its bytes.
"""
import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import naive
import numpy as np
import pandas as pd
import pytest
import torch
from checkins import transitions
from harness import ROOT, call

from ga_llm.base import artifacts, prompts
from ga_llm.llm import backbone
from ga_llm.pairs import token_cache
from geo_encoder import gps_tokens
from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.injection import gps_injection

NYC = Path(os.environ.get("GA_LLM_DATA", ROOT.parent / "shared/data")) / "nyc/raw"
SCRIPTS = {1: "data-preprocess/process_projector_gps_stage1.py", 2: "data-preprocess/process_llm_gps.py"}
PAM = ("data-preprocess/poi_embeddings.py", "data-preprocess/process_pam_stage1.py")
# Row 12345 of the raw data lies at 40.700345, -74.000012: all within 120 m, so no place is torn apart.
MARK = re.compile(r"\(40\.700(\d{3}), -74\.000(\d{3})\)")
SIMILAR, HISTORY, CURRENT = range(3)
# (stage, -use_sim), and how many trajectories the hostile search lists; None: all of train's.
STAGES = {"sample": [(1, False), (2, False), (1, True), (2, True)], "nyc": [(1, False), (2, True)]}
LISTED = {"sample": None, "nyc": 200}
PLANTED = "Planted marker"
FAR = (-33.123456, 151.654321)


@dataclasses.dataclass
class City:
    """A data set in a root of its own. raw: all check-ins in the order of the raw files, as text, by column."""
    name: str
    root: Path
    raw: pd.DataFrame

    def __post_init__(self):
        self.folder = self.root / "datasets" / self.name / "preprocessed"
        self.time = pd.to_datetime(self.raw["time"]).to_numpy()

    def run(self, *stages: tuple[int, bool], listed: int | None = None) -> "City":
        """Write the raw files, and run run.py, traj_qk.py, PAM's two and for each (stage, use_sim) the question script.

        listed: how many trajectories the hostile search lists (`search`); None: all.
        """
        raw = self.root / "data-preprocess/data" / self.name / "raw"
        raw.mkdir(parents=True)
        (self.root / "best_conf").symlink_to(ROOT / "best_conf")
        {"sample": write_sample, "nyc": write_nyc}[self.name](self.raw, raw)
        self.script("data-preprocess/run.py", "-f", f"best_conf/{self.name}.yml")
        for script in ("data-preprocess/traj_qk.py", *PAM):
            self.script(script, "-dataset_name", self.name)
        self.samples = {split: pd.read_csv(self.folder / artifacts.split_sample(split)) for split in naive.SPLITS}
        if any(use_sim for _, use_sim in stages):
            self.search(listed)
        for stage, use_sim in stages:
            self.script(SCRIPTS[stage], "-dataset_name", self.name, "-use_sim", use_sim)
        return self

    def script(self, *command) -> None:
        result = call(self.root, *command)
        assert result.code == 0, result.err

    def search(self, count: int | None) -> None:
        """A hostile search: it lists the `count` train trajectories that began around each one, itself and later ones
        too, or all of them.
        """
        by_start = self.samples["train"].groupby("TrajectoryId")["LocalTime"].first().sort_values(kind="stable")
        count = count or 2 * len(by_start)
        for split in ("train", "test"):
            starts = self.samples[split].groupby("TrajectoryId")["LocalTime"].first()
            places = zip(starts.index, by_start.searchsorted(starts))
            listed = {str(trajectory): by_start.index[max(0, place - count // 2):place + count // 2].tolist()
                      for trajectory, place in places}
            (self.folder / artifacts.similar_trajectories(split)).write_text(json.dumps(listed))

    def questions(self, split: str, stage: int, use_sim: bool) -> list[tuple[str, str]]:
        """(question, answer) of each pair."""
        text = (self.folder / artifacts.questions(split, self.name, stage, use_sim)).read_text(encoding="utf-8")
        if split == "train":
            return [(pair["question"], pair["answer"]) for pair in json.loads(text)]
        return [prompts.split(line) for line in text.splitlines()]

    def raw_rows(self, split: str) -> np.ndarray:
        """The raw row of each row of a split's sample, by its coordinates."""
        rows = self.samples[split]
        return rows_at((rows["Latitude"] - 40.7) * 1e6, (-74 - rows["Longitude"]) * 1e6)


def rows_at(low, high) -> np.ndarray:
    return (np.round(low) + 1000 * np.round(high)).astype(int)


def marked(raw: pd.DataFrame) -> pd.DataFrame:
    number = np.arange(len(raw))
    return raw.assign(latitude=[f"40.700{n % 1000:03d}" for n in number],
                      longitude=[f"-74.000{n // 1000:03d}" for n in number])


def planted(raw: pd.DataFrame, which, name: str = PLANTED) -> pd.DataFrame:
    """The same users, places and times; those of `which` (a mask) have another category's name and lie far away."""
    raw = raw.copy()
    raw.loc[which, ["name", "latitude", "longitude"]] = (name, *map(str, FAR))
    return raw


COLUMNS = ["user", "poi", "category", "name", "latitude", "longitude", "offset", "utc"]


def read_sample(folder: Path) -> pd.DataFrame:
    """The demo's city; `split` and `trajectory` as the plain loops of `naive` find them ("" where filtered out).

    Some of the users and a place have other names in the last part, and so has a category: train has never seen them.
    """
    assert call(folder, "data-preprocess/make_sample_raw.py", "-users", 50).code == 0
    path, = (folder / "data-preprocess/data/sample/raw").glob("*.txt")
    raw = pd.read_csv(path, sep="\t", names=COLUMNS, dtype=str, encoding="latin-1", keep_default_na=False, quoting=3)
    shutil.rmtree(folder / "data-preprocess")
    late = raw.index >= len(raw) * .85      # the file is in order of time
    for column, old, new in (("user", raw["user"].str.endswith("3"), "999"),
                             ("poi", raw["poi"] == raw["poi"][late].mode()[0], "f" * 24),
                             ("category", raw["name"] == "Office", "f" * 24)):
        raw.loc[late & old, column] = new
    return with_splits(raw)


def with_splits(raw: pd.DataFrame) -> pd.DataFrame:
    time = (pd.to_datetime(raw["utc"], format="%a %b %d %H:%M:%S +0000 %Y")
            + pd.to_timedelta(raw["offset"].astype(int), unit="min"))
    rows = naive.in_time([naive.Row(i, int(user), poi, category, when.to_pydatetime()) for i, user, poi, category, when
                          in zip(range(len(raw)), raw["user"], raw["poi"], raw["category"], time)])
    rows = naive.frequent(rows, 9, 9)
    naive.split(rows)
    rows = naive.without_isolated(rows, 24)
    naive.number_trajectories(rows, 24 * 60)
    split, trajectory = np.full(len(raw), "", dtype=object), np.full(len(raw), -1)
    for row in rows:
        split[row.number], trajectory[row.number] = row.split, row.trajectory
    return raw.assign(time=time, split=split, trajectory=trajectory)


def write_sample(raw: pd.DataFrame, folder: Path) -> None:
    lines = ["\t".join(cells) for cells in raw[COLUMNS].itertuples(index=False)]
    (folder / "dataset_TSMC2014_SAMPLE.txt").write_text("\n".join(lines) + "\n", encoding="latin-1")


NYC_FILES = {"train": "NYC_train.csv", "validate": "NYC_val.csv", "test": "NYC_test.csv"}


def read_nyc(_) -> pd.DataFrame:
    if not NYC.is_dir():
        pytest.skip("the real NYC check-ins are not here")
    parts = [pd.read_csv(NYC / f"{name}.gz", dtype=str, keep_default_na=False).assign(split=split)
             for split, name in NYC_FILES.items()]
    raw = pd.concat(parts, ignore_index=True).rename(columns={
        "user_id": "user", "POI_id": "poi", "POI_catid": "category", "POI_catname": "name"})
    return raw.assign(time=raw["local_time"].str[:19], trajectory=raw["user"] + "/" + raw["trajectory_id"])


def write_nyc(raw: pd.DataFrame, folder: Path) -> None:
    back = {"user": "user_id", "poi": "POI_id", "category": "POI_catid", "name": "POI_catname"}
    columns = [*back, "latitude", "longitude", "local_time", "trajectory_id"]
    for split, name in NYC_FILES.items():
        raw.loc[raw["split"] == split, columns].rename(columns=back).to_csv(folder / name, index=False)


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    """cities("sample"), cities("nyc"): every check-in marked."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            raw = {"sample": read_sample, "nyc": read_nyc}[name](root)
            made[name] = City(name, root, marked(raw)).run(*STAGES[name], listed=LISTED[name])
        return made[name]
    return make


@pytest.fixture(scope="module", params=["sample", pytest.param("nyc", marks=pytest.mark.slow)])
def city(request, cities):
    return cities(request.param)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_check_in_that_a_prompt_shows(city, split):
    """Of train, or earlier in the same trajectory and split; in each case before the target's second."""
    for stage, use_sim in STAGES[city.name]:
        check_shown(city, split, stage, use_sim)


def check_shown(city, split, stage, use_sim):
    pairs = city.questions(split, stage, use_sim)
    own = pd.DataFrame({"raw": city.raw_rows(split), "trajectory": city.samples[split]["TrajectoryId"]})
    by_trajectory = own.groupby("trajectory")["raw"]
    first, target = by_trajectory.first().to_numpy(), by_trajectory.last().to_numpy()
    assert len(pairs) == len(target) > 50
    if stage == 2:      # the pairs stand in the order of the trajectories, so these are their targets
        assert [prompts.TIME.search(answer)[0] for _, answer in pairs] == time_texts(city.time[target])

    shown, pair, part = [], [], []
    for i, (question, _) in enumerate(pairs):
        found = [(int(low) + 1000 * int(high), match.start()) for match in MARK.finditer(question)
                 for low, high in [match.groups()]]
        assert len(found) == len(prompts.POI_ID.findall(question.rpartition(" At " if stage == 2 else "What")[0]))
        history, current = (question.find(heading) for heading in ("History of user", prompts.CURRENT))
        current = current if current >= 0 else len(question)
        history = history if history >= 0 else current
        shown += [row for row, _ in found]
        part += [SIMILAR if at < history else HISTORY if at < current else CURRENT for _, at in found]
        pair += [i] * len(found)
    shown, pair, part = map(np.array, (shown, pair, part))
    in_split, user, trajectory = (city.raw[name].to_numpy()[shown] for name in ("split", "user", "trajectory"))
    asked_user, asked_trajectory = (city.raw[name].to_numpy()[target][pair] for name in ("user", "trajectory"))

    assert (city.time[shown] < city.time[target][pair]).all()
    assert (in_split[part != CURRENT] == "train").all() and (in_split[part == CURRENT] == split).all()
    assert (user[part != SIMILAR] == asked_user[part != SIMILAR]).all()
    assert (trajectory[part == CURRENT] == asked_trajectory[part == CURRENT]).all()
    assert (city.time[shown] <= city.time[first][pair])[part == HISTORY].all()
    assert (np.bincount(part, minlength=3) > 0).tolist() == [use_sim, True, True]
    train = city.raw[city.raw["split"] == "train"]
    ends = pd.Series(city.time[train.index]).groupby(train["trajectory"].to_numpy()).max()
    ends = ends[trajectory[part == SIMILAR]].to_numpy()
    assert (ends < city.time[first][pair][part == SIMILAR]).all()


def time_texts(times) -> list[str]:
    return pd.Series(times).dt.strftime("%Y-%m-%d %H:%M:%S").tolist()


def test_mapping_and_encoding_are_of_train_alone(city):
    train = city.raw[city.raw["split"] == "train"]
    found = json.loads((city.folder / artifacts.LABEL_ENCODING).read_text())
    for field, column in (("user", train["user"].map(int)), ("poi", train["poi"]), ("category", train["category"])):
        assert found[field]["values"] == sorted(set(column)), field
        if city.name == "sample":       # else nothing would be shown
            assert set(city.raw[field][city.raw["split"] == "test"]).difference(train[field])
    mapping = pd.read_csv(city.folder / artifacts.gps_mapping(city.name))
    places = {}
    for poi, *place in zip(train["poi"], train["latitude"].map(float), train["longitude"].map(float)):
        places.setdefault(poi, []).append(place)
    assert mapping["GPS_id"].tolist() == [found["poi"]["first_id"] + i for i in range(len(places))]
    expected = [[math.fsum(column) / len(column) for column in zip(*places[poi])] for poi in sorted(places)]
    np.testing.assert_allclose(mapping[["Latitude", "Longitude"]], expected, rtol=0, atol=1e-9)
    for split in naive.SPLITS:      # and the samples hold what the raw data's split says
        assert set(city.raw["split"].to_numpy()[city.raw_rows(split)]) == {split}


def vectors(city: City, tokenizer_of: str, stages, length: int = 4096) -> dict[str, bytes]:
    """What training sees of both stages' train questions, and the vectors that stand for the places."""
    mapping = gps_tokens.read_gps_mapping(city.folder / artifacts.gps_mapping(city.name))
    tokenizer = backbone.load_tokenizer(tokenizer_of)
    tokens = gps_tokens.add_gps_tokens(tokenizer, mapping)
    seen = {}
    for stage, use_sim in stages:
        path = city.folder / artifacts.questions("train", city.name, stage, use_sim)
        few = city.root / f"few_{stage}_{use_sim}.json"      # one in twenty, or in 500: the whole file takes long
        few.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))[::20 if city.name == "sample" else 500]))
        folder = token_cache.load(few, tokenizer, length, "mapping").folder
        seen |= {f"{few.name} {name}": (folder / name).read_bytes() for name in (token_cache.IDS, token_cache.INDEX)}
    torch.manual_seed(0)
    config = GeoEncoderConfig(16)
    injection = gps_injection(build_encoder(config), config.level, mapping, tokens)
    injection.freeze(torch.float32)
    assert len(injection.table) == len(mapping.ids) and injection.table.std() > 0
    return {**seen, "vectors": injection.table.numpy().tobytes()}


def train_side(city: City) -> dict[str, bytes]:
    """What is made of train alone."""
    names = [artifacts.split_sample("train"), artifacts.gps_mapping(city.name), artifacts.LABEL_ENCODING]
    names += sorted(path.name for path in city.folder.glob("train_*.json"))
    embeddings = city.folder / artifacts.poi_embeddings(city.name)
    names += [embeddings.name, artifacts.embedding_settings(embeddings).name]
    assert artifacts.alignment_questions(city.name) in names
    return {name: (city.folder / name).read_bytes() for name in names}


def without_current(question: str) -> str:
    """A question without its current part's check-ins."""
    head, heading, _ = question.rpartition(prompts.CURRENT)
    return head if heading else question


def test_validation_and_test_reach_nothing_of_train(city, tmp_path, tiny_llama):
    """All of them planted: train's side keeps its bytes, and test's marks stand in current parts alone."""
    split = city.raw["split"]
    raw = planted(planted(city.raw, split == "validate", "Planted in validation"), split == "test")
    stages = STAGES[city.name] if city.name == "sample" else [(1, False)]       # NYC's other stage is in `crowded`
    other = City(city.name, tmp_path, raw).run(*stages, listed=LISTED[city.name])
    expected, found = train_side(city), train_side(other)
    assert found == {name: expected[name] for name in found} and len(found) > 3 + len(stages)
    assert vectors(other, tiny_llama(), stages) == vectors(city, tiny_llama(), stages)

    marks, where = (b"Planted", b"-33.123", b"151.654"), set()
    for path in sorted(path for path in other.folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        where |= {path.name for mark in marks if mark in content}
        assert (b"in validation" in content) <= (path.name in (artifacts.SAMPLE, artifacts.split_sample("validate")))
    tests = {artifacts.questions("test", city.name, stage, use_sim) for stage, use_sim in stages}
    assert where == {artifacts.SAMPLE, *map(artifacts.split_sample, ("validate", "test")), *tests,
                     artifacts.key_query_pairs("test")}
    for stage, use_sim in stages:
        pairs, before = (each.questions("test", stage, use_sim) for each in (other, city))
        assert [answer for _, answer in pairs] == [answer for _, answer in before]
        assert [without_current(question) for question, _ in pairs] == [
            without_current(question) for question, _ in before]
        assert not any(mark.decode() in without_current(question) for question, _ in pairs for mark in marks)


def elsewhere(raw: pd.DataFrame, split: str) -> pd.DataFrame:
    """The check-ins of a split deal out their places anew: the same users, times and number of visits of each place."""
    raw, rows = raw.copy(), np.flatnonzero(raw["split"] == split)
    columns = ["poi", "category", "name", "latitude", "longitude"]
    raw.loc[rows, columns] = raw.loc[np.random.default_rng(0).permutation(rows), columns].to_numpy()
    return raw


@pytest.mark.parametrize("name", ["sample", pytest.param("nyc", marks=pytest.mark.soak)])
def test_where_people_go_in_validation_and_test_reaches_nothing_of_train(cities, tmp_path, name):
    """Other steps from place to place there: POI embeddings, PAM's questions and all else of train keep their bytes."""
    city = cities(name)
    other = City(city.name, tmp_path / "late", elsewhere(elsewhere(city.raw, "validate"), "test")).run()
    expected, found = train_side(city), train_side(other)
    assert found == {name: expected[name] for name in found}
    for split in ("validate", "test"):
        assert transitions.count(other.samples[split]).ne(transitions.count(city.samples[split])).any(axis=None)
    if name == "sample":        # the check of the check: train's own steps do reach them
        found = train_side(City(name, tmp_path / "train", elsewhere(city.raw, "train")).run())
        for file in (artifacts.poi_embeddings(name), artifacts.alignment_questions(name)):
            assert found[file] != expected[file]


@pytest.fixture(scope="module", params=["sample", pytest.param("nyc", marks=pytest.mark.soak)])
def crowded(request, cities, tmp_path_factory):
    """A city, where the second in which a pair's target lies has four check-ins of the user, in train and in test:
    at another place, at the target's, the target itself, and at another place again, which is now the target.

    raw has the column `planted`: "<split> now" for these, "<split> later" for the user's next check-in of that split.
    """
    city = cities(request.param)
    raw, added = city.raw.assign(planted=""), []
    for split in ("train", "test"):
        rows = city.raw_rows(split)
        trajectories = city.samples[split].assign(raw=rows).groupby("TrajectoryId")["raw"].agg(list)
        own, following = next((own, following) for own, following in zip(trajectories, trajectories[1:])
                              if len(own) > 3 and raw["user"][own[0]] == raw["user"][following[0]])
        target, other = own[-1], next(row for row in rows if raw["poi"][row] != raw["poi"][own[-1]])
        for at, place in ((-.5, other), (-.4, target), (.5, other)):
            row = raw.loc[[target]].set_axis([target + at])
            row[["poi", "category", "name"]] = raw.loc[place, ["poi", "category", "name"]].tolist()
            added.append(row.assign(planted=f"{split} now"))
        raw.loc[following[0], "planted"] = f"{split} later"
    raw = pd.concat([raw, *added]).sort_index().reset_index(drop=True)
    raw = with_splits(raw) if city.name == "sample" else raw
    return City(city.name, tmp_path_factory.mktemp("crowded"), marked(raw)).run((1, False), (2, True), listed=50)


@pytest.mark.parametrize("what", ["now", "later"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_happens_in_the_targets_second_or_later(crowded, tmp_path, split, what):
    """Every pair that asks for that second, or an earlier one, keeps every byte of its question."""
    which = crowded.raw["planted"] == f"{split} {what}"
    assert which.sum() == {"now": 3, "later": 1}[what] and np.isin(np.flatnonzero(which), crowded.raw_rows(split)).all()
    other = City(crowded.name, tmp_path, planted(crowded.raw, which)).run((1, False), (2, True), listed=50)
    when = crowded.time[which][0]
    for of in ("train", "test"):
        last = crowded.samples[of].groupby("TrajectoryId")["LocalTime"].last()
        not_after = pd.to_datetime(last).to_numpy() <= when
        assert not_after.any() or of != split
        for stage, use_sim in ((1, False), (2, True)):
            pairs, before = (np.array([question for question, _ in each.questions(of, stage, use_sim)], dtype=object)
                             for each in (other, crowded))
            assert (pairs == before)[not_after].all() and not any(PLANTED in question for question in pairs[not_after])
            if (split, of, stage) == ("train", "train", 2):
                assert any(PLANTED in question for question in pairs)      # of those behind it, some do show it
    if split == "test":
        assert train_side(other) == train_side(crowded)
