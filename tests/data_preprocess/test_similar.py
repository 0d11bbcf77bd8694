"""Similar trajectories: what is listed equals what plain loops find, and nothing that had not ended."""
import collections
import datetime
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkins import config, questions, samples, similar
from ga_llm.base import artifacts, prompts

FOLDER = Path("datasets/city/preprocessed")
ROOT = Path(__file__).parents[2]
FIELDS = questions.KEY_FIELDS


def trajectory(number: int, visits, user: int = 1, query: int | None = None) -> dict:
    """What traj_qk.py writes of (time, poi, category) visits; query: how many the query shows, all but one."""
    texts = [prompts.check_in(FIELDS, str(time), user, poi, 40, -74, "Café, category id x", category)
             for time, poi, category in visits]
    query = len(texts) - 1 if query is None else query
    return {"trajectory_id": number, "user": user, "start": str(visits[0][0]), "end": str(visits[-1][0]),
            "key": " ".join(texts), "query": " ".join(texts[:query])}


def random_city(seed: int, train: int = 70, test: int = 20):
    """{split: {id: (visits, length of the query)}}; few places and hours, so that many are alike."""
    draw, city = random.Random(seed), {}
    for split, count, first_day in (("train", train, 0), ("test", test, 15)):
        city[split] = {}
        for number in draw.sample(range(1000), count):
            hour = draw.randrange(first_day * 24, 20 * 24)
            visits = []
            for _ in range(draw.choice((1, 1, 2, 2, 3, 5))):
                poi = draw.randrange(5)
                visits.append((datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=hour), poi, poi % 2))
                hour += draw.choice((0, 1, 1, 24))
            shown = sum(time < visits[-1][0] for time, _, _ in visits)
            city[split][number] = visits, shown
    return city


def write(city, order=None) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split, own in city.items():
        records = [trajectory(number, visits, query=shown) for number, (visits, shown) in own.items()]
        if order:
            order.shuffle(records)
        (FOLDER / artifacts.key_query_pairs(split)).write_text(json.dumps(records))


def read(split: str) -> dict[str, list[int]]:
    return json.loads((FOLDER / artifacts.similar_trajectories(split)).read_text())


# The oracle: loops over what was visited, not over its text.

def counted(visits) -> collections.Counter:
    terms = collections.Counter()
    for time, poi, category in visits:
        terms.update([("poi", poi), ("category", category), ("hour", time.hour), ("day", time.weekday())])
    for (_, poi, category), (_, next_poi, next_category) in zip(visits, visits[1:]):
        terms.update([("pois", poi, next_poi), ("categories", category, next_category)])
    return terms


def brute_force(city, split: str, top: int) -> tuple[dict[str, list[int]], int]:
    """The lists, and how often one of equals was listed before another, or was cut off by -top."""
    keys = {number: counted(visits) for number, (visits, _) in city["train"].items()}
    known = collections.Counter(term for terms in keys.values() for term in terms)

    def weights(terms):
        raw = {term: (1 + math.log(count)) * (1 + math.log((1 + len(keys)) / (1 + known[term])))
               for term, count in terms.items()}
        length = math.sqrt(math.fsum(value ** 2 for value in raw.values()))
        return {term: round(value / length * 2**24) for term, value in raw.items()}    # whole numbers: exact

    vectors, found, equals = {number: weights(terms) for number, terms in keys.items()}, {}, 0
    for number, (visits, shown) in city[split].items():
        own, scores = weights(counted(visits[:shown])), []
        for other, vector in vectors.items():
            if shown and city["train"][other][0][-1][0] < visits[0][0]:
                score = sum(value * vector.get(term, 0) for term, value in own.items())
                if score > 0:
                    scores.append((-score, other))
        scores.sort()
        equals += sum(a[0] == b[0] for a, b in zip(scores[:top], scores[1:]))
        found[str(number)] = [other for _, other in scores[:top]]
    return found, equals


@pytest.fixture
def conf(settings):
    return config.load(settings("csv"))


@pytest.mark.bulk
@pytest.mark.parametrize("seed, top", [(0, 200), (1, 5)])
@pytest.mark.parametrize("scores, keys", [(1, 16), (350, 7), (similar.SCORES_AT_ONCE, similar.KEYS_AT_ONCE)])
def test_as_plain_loops_find(conf, monkeypatch, seed, top, scores, keys):
    city = random_city(seed)
    write(city)
    monkeypatch.setattr(similar, "KEYS_AT_ONCE", keys)
    monkeypatch.setattr(similar.search, "__defaults__", (scores,))
    similar.write(conf, similar.light, top)
    for split, own in city.items():
        expected, equals = brute_force(city, split, top)
        assert read(split) == expected and (equals > 0 or split == "test")
        assert list(read(split)) == sorted(map(str, own), key=int)
        listed = [(number, other) for number, others in expected.items() for other in others]
        assert len(listed) > 40 and all(city["train"][other][0][-1][0] < own[int(number)][0][0][0]
                                         for number, other in listed)
    assert any(shown == 0 for _, shown in city["train"].values())
    assert (max(map(len, read("train").values())) == top) == (top == 5)


def test_the_order_of_the_input_does_not_count(conf):
    city = random_city(3)
    made = []
    for order in (None, random.Random(0), random.Random(1)):
        write(city, order)
        similar.write(conf, similar.light, 4)
        made.append([(FOLDER / artifacts.similar_trajectories(split)).read_bytes() for split in city])
    assert made[0] == made[1] == made[2]


def at(day: int, hour: int) -> datetime.datetime:
    return datetime.datetime(2024, 1, day, hour)


def test_by_hand(conf):
    """Monday 8 o'clock at place 1, then 9 at place 2, is looked for."""
    asked = [(at(22, 8), 1, 0), (at(22, 9), 2, 1), (at(22, 10), 3, 0)]
    alike = [(at(8, 8), 1, 0), (at(8, 9), 2, 1)]
    train = {40: asked, 7: alike, 5: alike,                           # equal: the smaller id first
             9: [(at(15, 8), 1, 0), (at(15, 9), 2, 1)],               # of another week: equal, too
             2: [(at(20, 20), 1, 0), (at(22, 8), 2, 1)],              # ends in the second in which it starts
             1: [(at(2, 8), 1, 0), (at(2, 20), 3, 0)],                # a Tuesday: one place in common, and 20 h with 2
             3: [(at(3, 3), 77, 50), (at(3, 4), 78, 51)]}             # nothing in common
    write({"train": {number: (visits, len(visits) - 1) for number, visits in train.items()},
           "test": {99: (asked[:1], 0), 98: ([(at(30, 8), 5, 5), (at(30, 8), 5, 5)], 0),
                    97: ([(at(1, 8), 1, 0), (at(1, 9), 1, 0)], 1)}})
    similar.write(conf, similar.light, 200)
    assert read("train") == {"1": [], "2": [1, 5, 7, 9], "3": [], "5": [1], "7": [1], "9": [5, 7, 1],
                             "40": [5, 7, 9, 1]}
    assert read("test") == {"97": [], "98": [], "99": []}     # nothing is known before the target; nothing had ended
    similar.write(conf, similar.light, 2)
    assert read("train")["40"] == [5, 7]


@pytest.mark.parametrize("kind", [np.array, sparse.csr_array, sparse.csr_matrix])
def test_search_of_vectors(kind):
    """Cosines, not products; none of 0 or less; a row of zeros is like nothing."""
    keys = kind([[1., 0], [0, 5], [3, 3], [-1, 0], [100, 100], [0, 0]])
    days = np.datetime64("2024-01-01") + np.arange(6)
    late = np.datetime64("2025-01-01")
    found = {query: ids.tolist() for query, ids in similar.search(
        kind([[0, 2.], [1, 1], [1, 0], [0, 0]]), np.array([late, days[5], late, late]), keys, days,
        np.array([10, 11, 12, 13, 9, 15]), 3)}
    assert found == {0: [11, 9, 12], 1: [9, 12, 10], 2: [10, 9, 12], 3: []}


def test_scores_are_exact():
    """Equal vectors have equal scores wherever they stand, which floating-point sums alone do not give."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((200, 999)).astype(np.float32)
    order = draw.permutation(999)
    one, other = (similar._unit(each) for each in (vectors, vectors[:, order]))
    assert (one @ one[:7].T == (other[::-1] @ other[:7].T)[::-1]).all()
    assert np.abs(np.linalg.norm(one, axis=1) - 1).max() < 1e-6


def test_questions_show_what_is_listed(small_city, script):
    """The whole way on a city of two users: the check-ins in the prompts are those of the listed trajectories."""
    script("run.py", "-f", str(small_city))
    script("traj_qk.py", "-dataset_name", "city")
    script("traj_sim.py", "-dataset_name", "city", "-top", "3")
    script("process_llm_gps.py", "-dataset_name", "city", "-use_sim", "True")
    conf = config.load(small_city)
    train = samples.load(conf, "train")
    lines = (FOLDER / artifacts.questions("test", "city", 2, True)).read_text().splitlines()
    listed = read("test")
    assert len(lines) == len(listed) > 1
    for line, (number, others) in zip(lines, sorted(listed.items(), key=lambda item: int(item[0]))):
        assert len(others) == 3 and others != sorted(others)
        shown = line[line.index("Similar trajectories:"):line.index("History of user")]
        expected = train[train["TrajectoryId"].isin(others)]
        assert re.findall(r"user (\d+) POI id (\d+)", shown) == [
            (str(user), str(poi)) for user, poi in zip(expected["UserId"], expected["PoiId"])]
    assert {user for number in read("train") for user in train[train["TrajectoryId"].isin(read("train")[number])][
        "UserId"]} == {1, 2}


def test_the_light_encoder_needs_no_torch(conf):
    write(random_city(0))
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "data-preprocess/traj_sim.py"),
                           "-dataset_name", "city"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and read("test"), done.stderr[-2000:]
    assert not re.search(r"\| +(torch|transformers)\b", done.stderr) and re.search(r"\| +sklearn\b", done.stderr)


def test_with_an_llm(conf, script, tiny_llama):
    """Lists in the order of the cosines of plain forwards, text by text; what test asks changes nothing of train's."""
    city, folder = random_city(4, train=24, test=6), tiny_llama()
    write(city)
    script("traj_sim.py", "-dataset_name", "city", "-encoder", "llm", "-model_name_or_path", folder, "-batch_size",
           "5", "-top", "9")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def vector(text):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1]
        mean = states[0].double().mean(0)
        return mean / mean.norm()

    train = {record["trajectory_id"]: record for record in json.loads((FOLDER / "train_kq_pairs.json").read_text())}
    keys = {number: vector(record["key"]) for number, record in train.items()}
    lists = 0
    for split in city:
        for record in json.loads((FOLDER / artifacts.key_query_pairs(split)).read_text()):
            listed = read(split)[str(record["trajectory_id"])]
            ended = [number for number, key in train.items() if key["end"] < record["start"] and record["query"]]
            if not ended:
                assert listed == []
                continue
            own = vector(record["query"])
            cosines = {number: float(keys[number] @ own) for number in ended}
            assert len(listed) == min(9, len(ended)) and set(listed) <= set(ended)
            lowest = [cosines[number] for number in listed]
            assert all(a >= b - 1e-6 for a, b in zip(lowest, lowest[1:]))
            assert lowest[-1] >= max((cosines[n] for n in ended if n not in listed), default=-1) - 1e-6
            lists += 1
    assert lists > 10

    before = (FOLDER / "train_key_top200.json").read_bytes(), (FOLDER / "test_key_top200.json").read_bytes()
    write({**city, "test": random_city(5, train=24, test=9)["test"]})
    script("traj_sim.py", "-dataset_name", "city", "-encoder", "llm", "-model_name_or_path", folder, "-batch_size",
           "5", "-top", "9")
    assert (FOLDER / "train_key_top200.json").read_bytes() == before[0]
    assert (FOLDER / "test_key_top200.json").read_bytes() != before[1]


GOOD = trajectory(4, [(at(1, 8), 1, 0), (at(1, 9), 2, 1)])
DAMAGED = {
    "missing": (None, "not found; make it with"), "empty": ("", "empty; make it again with"),
    "cut off": (json.dumps([GOOD])[:-9], "not JSON"), "not UTF-8": (b'["\xff"]', "not JSON"),
    "an object": (json.dumps(GOOD), "not an array"), "no trajectories": ("[]", "not an array"),
    "null": ("null", "not an array"), "nested deeply": ("[" * 100_000, "not JSON"),
    "a text": ('["x"]', "trajectory 0: not an object of trajectory_id"),
    "no end": (json.dumps([GOOD, {name: GOOD[name] for name in GOOD if name != "end"}]), "trajectory 1: not an object"),
    **{f"{name}: {value!r}"[:40]: (json.dumps([{**GOOD, name: value}]), f"trajectory 0: {words}")
       for name, value, words in (
        ("trajectory_id", "4", "not an object"), ("trajectory_id", True, "not an object"),
        ("trajectory_id", 4.0, "not an object"), ("trajectory_id", -1, "its id"), ("trajectory_id", 2**63, "its id"),
        ("trajectory_id", 2**70, ""), ("user", None, "not an object"), ("start", 5, "not an object"),
        ("start", "2024-01-01", "its start"), ("end", "2023-12-31 00:00:00", "its start or end"),
        ("end", "2024-01-32 00:00:00", "its start or end"), ("end", "later", "its start or end"),
        ("start", "2023-01-01 00:00:00", "its key"), ("key", "", "its key"), ("key", "nonsense", "its key"),
        ("query", GOOD["key"], "its key"), ("query", "nonsense", "its key"), ("query", GOOD["key"][:20], "its key"))},
    "twice": (json.dumps([GOOD, GOOD]), "two trajectories with the same id"),
    "no date": (json.dumps([{**GOOD, "key": GOOD["key"].replace("2024-01-01 09", "2024-02-30 09")}]), "2024-02-30"),
}


@pytest.mark.bulk
@pytest.mark.parametrize("text, words", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_pairs(conf, error_of, split, text, words):
    write(random_city(0, 9, 5))
    path = FOLDER / artifacts.key_query_pairs(split)
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if words == "2024-02-30" and split == "test":
        return      # the target's date, which no query shows
    message = error_of("traj_sim.py", "-dataset_name", "city")
    assert words in message and "kq_pairs.json: " in message and "traj_qk.py" in message, message
    assert words == "2024-02-30" or f"{path}: " in message
    assert not list(FOLDER.glob("*top200*"))


def test_a_failing_run_leaves_both_files_as_they_were(conf, monkeypatch):
    write(random_city(0))
    similar.write(conf, similar.light, 200)
    before = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    write(random_city(1))
    monkeypatch.setattr(similar, "search", lambda *arguments, done=[]: iter(()) if not done.append(1) and len(
        done) == 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        similar.write(conf, similar.light, 200)
    assert {name: (FOLDER / name).read_bytes() for name in before if "top200" in name} == {
        name: text for name, text in before.items() if "top200" in name}
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(before)
