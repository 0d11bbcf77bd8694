"""Question-answer pairs: what is in each part, the limits, leaks, fields, files."""
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from checkins import config, questions, samples
from ga_llm.base import artifacts, prompts
from ga_llm.base.cli import UserError

FOLDER = Path("datasets/city/preprocessed")
ROOT = Path(__file__).parents[2]


def sample(rows):
    """(user, trajectory, hour) rows → a sample as `samples.load` gives it (the columns that `pairs` needs)."""
    frame = pd.DataFrame(rows, columns=["UserId", "TrajectoryId", "hour"])
    frame["Time"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(frame["hour"], unit="h")
    return frame.sort_values("Time", kind="stable", ignore_index=True)


@pytest.fixture
def conf(settings):
    return config.load(settings("csv"))


def run(user, trajectory, n, start=0):
    return [(user, trajectory, start + i) for i in range(n)]


def lengths(pair):
    return len(pair.similar), len(pair.history), len(pair.current)


def test_parts_of_train_pairs(conf):
    # Time order: rows 0–2 are user 1's first trajectory, 3–4 user 2's, 5–7 user 1's second.
    train = sample([*run(1, 0, 3), *run(2, 2, 2, start=10), *run(1, 1, 3, start=100)])
    found = list(questions.pairs(conf, train, train))
    assert [(p.trajectory, p.history.tolist(), p.current.tolist(), p.target) for p in found] == [
        (0, [], [0, 1], 2), (1, [0, 1, 2], [5, 6], 7), (2, [], [3], 4)]


def test_history_of_test_pairs_is_the_users_train_alone(conf):
    train = sample([*run(1, 0, 3), *run(2, 1, 4)])
    test = sample([*run(1, 2, 2, start=50), *run(1, 3, 2, start=90)])
    found = list(questions.pairs(conf, train, test))
    assert [train.loc[p.history, "UserId"].tolist() for p in found] == [[1, 1, 1]] * 2
    assert [(p.current.tolist(), p.target) for p in found] == [([0], 1), ([2], 3)]


def test_no_train_check_in_after_the_first_current_one(conf):
    train = sample(run(1, 0, 10))
    pair, = questions.pairs(conf, train, sample([(1, 1, 5), (1, 1, 6)]))
    assert pair.history.tolist() == [0, 1, 2, 3, 4, 5]    # at the very same time, train's comes first


def test_equal_times_within_train_follow_the_files_order(conf):
    train = sample([(1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 2)])
    assert [p.history.tolist() for p in questions.pairs(conf, train, train)] == [[], [0, 1]]


@pytest.mark.parametrize("current, history, shown", [
    ([2, 3], [0, 1, 2], [0]),       # the common case: as the file has it
    ([3, 3], [0, 1, 2], []),        # the target's own second, though before it in the file
    ([2, 3, 3, 3], [0, 1, 2], [0]),
    ([1, 1], [0], []),              # train has one of that second too
    ([0], [], [])], ids=str)
def test_nothing_of_the_targets_own_second(conf, current, history, shown):
    train, test = sample(run(1, 0, 3)), sample([(1, 1, hour) for hour in current])
    pair, = questions.pairs(conf, train, test)
    assert (pair.history.tolist(), pair.current.tolist(), pair.target) == (history, shown, len(current) - 1)


def test_a_check_in_that_stands_twice_is_not_shown_to_its_copy(conf):
    train = sample([(1, 0, 0), (1, 0, 5), (1, 0, 5), (1, 1, 5), (1, 1, 5), (1, 1, 40), (1, 1, 40)])
    assert [(p.history.tolist(), p.current.tolist()) for p in questions.pairs(conf, train, train)] == [
        ([], [0]), ([0, 1, 2], [3, 4])]


def test_one_remaining_check_in_is_a_pair_without_current(conf):
    pair, = questions.pairs(conf, sample(run(1, 0, 3)), sample([(1, 4, 70)]))
    assert lengths(pair) == (0, 3, 0) and pair.target == 0


@pytest.mark.parametrize("before, current, history, kept", [
    (599, 200, 599, 200), (601, 200, 600, 200), (50, 201, 0, 201), (50, 500, 0, 500), (50, 501, 0, 500)])
def test_limits(conf, before, current, history, kept):
    train = sample(run(1, 0, before))
    test = sample(run(1, 1, current + 1, start=10_000))
    pair, = questions.pairs(conf, train, test)
    assert lengths(pair) == (0, history, kept)
    assert pair.current.tolist() == list(range(current - kept, current)) and pair.target == current
    if history:
        assert pair.history.tolist() == list(range(before - history, before))    # the latest


def test_use_sim_does_not_stick(conf):
    # User 1's history is too long for similar ones; user 2, who comes after, still gets them.
    train = sample([*run(1, 0, 201), *run(2, 1, 3), *run(3, 2, 5)])
    test = sample([*run(1, 3, 2, start=5000), *run(2, 4, 2, start=5000)])
    found = list(questions.pairs(conf, train, test, {"3": [2], "4": [2]}))
    assert [lengths(pair) for pair in found] == [(0, 201, 1), (5, 3, 1)]


def test_similar_at_exactly_200_and_the_latest_200(conf):
    train = sample([*run(1, 0, 200), *run(2, 1, 150), *run(3, 2, 150, start=500)])
    pair, = questions.pairs(conf, train, sample(run(1, 3, 2, start=9000)), {"3": [1, 2]})
    assert lengths(pair) == (200, 200, 1)
    assert train.loc[pair.similar, "TrajectoryId"].value_counts().to_dict() == {2: 150, 1: 50}
    assert train.loc[pair.similar, "Time"].is_monotonic_increasing


def test_similar_that_has_not_ended_is_passed_over(conf):
    # Trajectory 1 ends at hour 4; the queries start at 4 and 5.
    train = sample([*run(2, 1, 5), *run(1, 0, 2, start=5)])
    assert [lengths(p)[0] for p in questions.pairs(conf, train, train, {"0": [1], "1": [0]})] == [5, 0]
    pair, = questions.pairs(conf, train, sample(run(3, 9, 2, start=4)), {"9": [1]})
    assert len(pair.similar) == 0


@pytest.fixture
def city(small_city, script):
    script("run.py", "-f", str(small_city))
    return config.load(small_city)


def read(split, stage, sim=False):
    path = FOLDER / artifacts.questions(split, "city", stage, sim)
    if split == "train":
        return json.loads(path.read_text())
    return [dict(zip(("question", "answer"), prompts.split(line))) for line in path.read_text().splitlines()]


def test_stage_2_files(city, script):
    script("process_llm_gps.py", "-dataset_name", "city", "-use_sim", "False")
    for split in ("train", "test"):
        rows = samples.load(city, split)
        ids = sorted(rows["TrajectoryId"].unique())
        found = read(split, 2)
        assert len(found) == len(ids) > 0
        for trajectory, pair in zip(ids, found):    # by user, then trajectory, which is the order of the ids
            target = rows[rows["TrajectoryId"] == trajectory].iloc[-1]
            assert pair["answer"].endswith(f"POI id {target['PoiId']}.")
            assert target["LocalTime"] in pair["answer"] and target["LocalTime"] in pair["question"]
            assert pair["question"].startswith("<question>:") and "\n" not in pair["question"]
    assert "test_qa_pairs_kqt_200items_city_llm_without_sim_gps.txt" in os.listdir(FOLDER)
    # The last train pair of ann: everything she did before, in order, and no check-in twice.
    ann = samples.load(city, "train").query("UserId == 1")
    pair = [pair for pair in read("train", 2) if "user 1 will" in pair["answer"]][-1]
    body = pair["question"].rsplit("At ", 1)[0]
    assert [int(n) for n in prompts.POI_ID.findall(body)] == ann["PoiId"].tolist()[:-1]
    assert re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", body) == ann["LocalTime"].tolist()[:-1]


def test_stage_1_asks_for_the_targets_coordinates(city, script):
    """The token is the target's own, and the answer is where the mapping puts that id."""
    script("process_projector_gps_stage1.py", "-dataset_name", "city", "-use_sim", "False")
    places = pd.read_csv(FOLDER / "city_gps_mapping.csv").set_index("GPS_id")
    for split in ("train", "test"):
        rows = samples.load(city, split)
        ids = sorted(rows["TrajectoryId"].unique())
        found = read(split, 1)
        assert len(found) == len(ids) > 0
        for trajectory, pair in zip(ids, found):
            target = rows[rows["TrajectoryId"] == trajectory].iloc[-1]["PoiId"]
            assert int(prompts.GPS_TOKEN.findall(pair["question"])[-1]) == target
            numbers = [float(number) for number in re.findall(r"-?\d+\.\d{6}", pair["answer"])]
            assert numbers == places.loc[target].round(6).tolist()
            assert "food" not in pair["question"] and "category" not in pair["question"]
    assert "train_qa_pairs_kqt_200items_city_projector_gps_without_sim_stage1.json" in os.listdir(FOLDER)


def test_fields_and_history_flags(city, script):
    script("process_llm_gps.py", "-dataset_name", "city", "-fields", "gps,time", "-max_history", "0")
    question = read("train", 2)[-1]["question"]
    assert "History" not in question and "food" not in question and "40.0" not in question
    assert re.search(r"\d\d:00:00 POI id \d <GPS \d>\.", question)
    script("process_llm_gps.py", "-dataset_name", "city", "-fields", "poi,time", "-max_history", "2")
    pair = read("train", 2)[-1]
    assert "<GPS" not in pair["question"]
    history, current = re.split("Current trajectory", pair["question"].split("History")[1])
    assert len(prompts.POI_ID.findall(history)) == 2


@pytest.mark.parametrize("text, stage, fields", [
    ("category,time", 2, ("time", "poi", "category")), ("poi", 2, ("poi",)), ("gps", 1, ("poi", "gps"))])
def test_fields_are_put_in_order(text, stage, fields):
    allowed = prompts.FIELDS if stage == 2 else prompts.STAGE_1_FIELDS
    assert questions.shown_fields(text, allowed, stage) == fields


@pytest.mark.parametrize("text, stage, word", [("colour", 2, "colour"), ("category,gps", 1, "category"),
                                               ("time,poi", 1, "gps")])
def test_wrong_fields(city, error_of, text, stage, word):
    name = "process_llm_gps.py" if stage == 2 else "process_projector_gps_stage1.py"
    message = error_of(name, "-dataset_name", "city", "-fields", text)
    assert "-fields" in message and word in message


def similar_files(city):
    train = samples.load(city, "train")
    for split in ("train", "test"):
        ids = samples.load(city, split)["TrajectoryId"].unique().tolist()
        (FOLDER / f"{split}_key_top200.json").write_text(
            json.dumps({str(i): train["TrajectoryId"].unique().tolist() for i in ids}))


@pytest.mark.parametrize("flag, expected", [("False", False), ("True", True)])
def test_use_sim_flag(city, script, flag, expected):
    similar_files(city)
    script("process_llm_gps.py", "-dataset_name", "city", "-use_sim", flag)
    found = read("test", 2, sim=expected)
    assert all(("Similar" in pair["question"]) == expected for pair in found)
    train = read("train", 2, sim=expected)
    assert "Similar" not in train[0]["question"]    # nothing has ended before the first
    assert any("Similar" in pair["question"] for pair in train) == expected


@pytest.mark.parametrize("text, words", [
    (None, ["test_key_top200.json: not found", "python data-preprocess/traj_sim.py -dataset_name city"]),
    ("[1]", ["not an object", "traj_sim.py"]),
    ('{"9": [12345]}', ["trajectory 12345 is not in train_sample.csv", "traj_sim.py"]),
    ('{"777": [0]}', ["trajectory 777 is not in test_sample.csv", "traj_sim.py"])])
def test_wrong_similar_files(city, error_of, text, words):
    similar_files(city)
    path = FOLDER / "test_key_top200.json"
    path.unlink() if text is None else path.write_text(text)
    message = error_of("process_llm_gps.py", "-dataset_name", "city", "-use_sim", "True")
    assert all(word in message for word in words), message
    assert not list(FOLDER.glob("*qa_pairs*"))


def test_keys_and_queries(city, script):
    script("traj_qk.py", "-dataset_name", "city")
    for split in ("train", "test"):
        rows = samples.load(city, split)
        found = json.loads((FOLDER / f"{split}_kq_pairs.json").read_text())
        assert [value["trajectory_id"] for value in found] == sorted(rows["TrajectoryId"].unique())
        for value in found:
            own = rows[rows["TrajectoryId"] == value["trajectory_id"]]
            assert (value["start"], value["end"]) == (own["LocalTime"].iloc[0], own["LocalTime"].iloc[-1])
            assert value["user"] == own["UserId"].iloc[0]
            assert [int(n) for n in prompts.POI_ID.findall(value["key"])] == own["PoiId"].tolist()
            assert [int(n) for n in prompts.POI_ID.findall(value["query"])] == own["PoiId"].tolist()[:-1]


def test_train_is_a_json_array_of_one_record_a_line(city, script):
    script("process_llm_gps.py", "-dataset_name", "city")
    lines = (FOLDER / artifacts.questions("train", "city", 2, False)).read_text().splitlines()
    assert lines[0] == "[" and lines[-1] == "]"
    assert all(json.loads(line.rstrip(",")).keys() == {"question", "answer"} for line in lines[1:-1])


def test_an_empty_array_is_an_array(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        assert questions.write_json_array(file, []) == 0
    assert json.loads((tmp_path / "x.json").read_text()) == []


def test_same_bytes_twice_and_a_failing_run_damages_nothing(city, script, error_of, monkeypatch):
    similar_files(city)
    def files():
        return {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    arguments = ("process_llm_gps.py", "-dataset_name", "city", "-use_sim", "True")
    script(*arguments)
    first = files()
    script(*arguments)
    assert files() == first
    monkeypatch.setattr(prompts, "answer_poi", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
    assert "the disk is full" in error_of(*arguments)
    assert files() == first
    (FOLDER / "test_sample.csv").unlink()
    assert "run.py -f best_conf/city.yml" in error_of(*arguments)


@pytest.mark.parametrize("name", ["traj_qk.py", "process_llm_gps.py", "process_projector_gps_stage1.py"])
def test_unknown_data_set_and_missing_samples(settings, error_of, name):
    settings("csv")
    message = error_of(name, "-dataset_name", "atlantis")
    assert "atlantis" in message and "city" in message
    message = error_of(name, "-dataset_name", "city")
    assert "train_sample.csv: not found; make it with `python data-preprocess/run.py -f best_conf/city.yml`" in message


def test_wrong_sample_file(city, error_of):
    path = FOLDER / "train_sample.csv"
    path.write_text(path.read_text().replace("TrajectoryId", "Trajectory"))
    assert "train_sample.csv: no column TrajectoryId" in error_of("traj_qk.py", "-dataset_name", "city")
    path.write_text("")
    assert "train_sample.csv: empty" in error_of("traj_qk.py", "-dataset_name", "city")


def test_scripts_from_the_command_line_without_torch_or_installation(small_city):
    """As a user runs them: another process, the repository's root as working directory, nothing installed."""
    def run_script(*arguments):
        return subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": ""})
    done = run_script(str(ROOT / "data-preprocess" / "run.py"), "-f", str(small_city))
    assert done.returncode == 0 and "validate" in done.stdout
    done = run_script(str(ROOT / "data-preprocess" / "process_llm_gps.py"), "-dataset_name", "city", "-use_sim", "no")
    assert done.returncode == 0
    assert not re.search(r"\| +torch\b", done.stderr) and re.search(r"\| +pandas\b", done.stderr)


def test_limits_come_from_the_yaml(conf):
    train = sample(run(1, 0, 50))
    short = dataclasses.replace(conf, max_history=7)
    pair, = questions.pairs(short, train, sample(run(1, 1, 2, start=900)))
    assert pair.history.tolist() == list(range(43, 50))


def test_history_step(conf):
    """Of at most 10 check-ins a history loses up to 3 more, and begins every 4th; shorter ones are whole."""
    train = sample(run(1, 0, 50))
    stepped = dataclasses.replace(conf, max_history=10, history_step=4)
    firsts = [next(questions.pairs(stepped, train, sample([(1, 1, h), (1, 1, h + 1)]))).history.tolist()[0]
              for h in (9, 10, 11, 13, 14, 17, 18)]      # hour h: the first h + 1 of train are before
    assert firsts == [0, 4, 4, 4, 8, 8, 12]
    pair, = questions.pairs(stepped, train, sample([(1, 1, 17), (1, 1, 18)]))
    assert pair.history.tolist() == list(range(8, 18))


@pytest.mark.parametrize("most", [0, 1, 3, 7, 1000])
def test_covering_pairs_show_every_check_in(conf, most):
    """By brute force over a random city, and no pair could be left out of a user's own."""
    draw = np.random.default_rng(most)
    rows = [(user, 100 * user + t, 60 * t + 5 * user + int(draw.integers(60)) / 60) for user in range(6)
            for t in range(int(draw.integers(1, 12))) for _ in range(int(draw.integers(2, 6)))]
    train = sample(rows)
    found = list(questions.pairs(dataclasses.replace(conf, max_history=most), train, train))
    kept = list(questions.covering(found, train))
    assert [p.trajectory for p in kept] == [p.trajectory for p in found if p.trajectory in {p.trajectory for p in kept}]

    def shown(pairs):
        return {int(row) for p in pairs for row in (*p.history, *p.current, p.target)}

    assert shown(kept) == shown(found)
    if most == 1000:        # one pair shows all of a user
        assert len(kept) == train["UserId"].nunique()
    if most >= 7:
        assert len(kept) < len(found)


@pytest.fixture
def trained_on(conf):
    """Six users with up to eleven trajectories each: (train, its pairs)."""
    draw = np.random.default_rng(7)
    rows = [(user, 100 * user + t, 60 * t + 5 * user + int(draw.integers(60)) / 60) for user in range(6)
            for t in range(11) for _ in range(int(draw.integers(2, 6)))]
    train = sample(rows)
    return train, list(questions.pairs(conf, train, train))


def test_thinned_histories_lose_whole_trajectories(trained_on):
    train, found = trained_on
    trajectory, copies = train["TrajectoryId"].to_numpy(), list(questions.thinned(found, train, 50))
    assert [pair.trajectory for pair in copies] == 50 * [pair.trajectory for pair in found]
    shares = []
    for pair, whole in zip(copies, 50 * found):
        assert (pair.target, pair.current.tolist()) == (whole.target, whole.current.tolist())
        stays = np.isin(whole.history, pair.history)
        assert pair.history.tolist() == whole.history[stays].tolist()       # in their order
        for of_one in {trajectory[row] for row in whole.history}:
            assert len(set(stays[trajectory[whole.history] == of_one])) == 1
        if len(whole.history):
            shares.append(1 - stays.mean())
    # Drawn between 0 and .9, for each pair anew: its mean is .45, and histories stay whole or vanish, too.
    assert abs(np.mean(shares) - questions.MISSING / 2) < 0.03 and min(shares) == 0 and max(shares) == 1
    again = questions.thinned(found, train, 50)
    assert all(pair.history.tolist() == other.history.tolist() for pair, other in zip(copies, again))
