"""Check-ins as numbers beside the questions, and as two tokens in them: what the texts show, and nothing else."""
import datetime
import hashlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import safetensors.numpy
from safetensors import safe_open

from ga_llm.base import artifacts, prompts

ROOT = Path(__file__).parents[2]
FOLDER = Path("datasets/sample/preprocessed")
VISIT = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) user \d+ POI id (\d+)")
ANSWERED = re.compile(r"At (\S+ \S+), user \d+ will visit .*?(?:POI id |<GPS )(\d+)")
SPLITS = ("train", "validate", "test")


@pytest.fixture
def city(root, script):
    (root / "best_conf").rmdir()
    (root / "best_conf").symlink_to(ROOT / "best_conf")
    script("make_sample_raw.py", "-users", "12", "-days", "40", "-pois", "50")
    script("run.py", "-f", "best_conf/sample.yml")
    return script


def asked(split, use_sim=False):
    path = FOLDER / artifacts.questions(split, "sample", 2, use_sim)
    text = path.read_text()
    lines = ([f"{pair['question']} {pair['answer']}" for pair in json.loads(text)] if split == "train"
             else text.splitlines())
    return path, [prompts.split(line) for line in lines]


def shown(path):
    """[[(local time, POI)] of each pair], the target last."""
    with safe_open(artifacts.check_ins(path), "np") as file:
        assert file.metadata() == {"questions": hashlib.sha256(path.read_bytes()).hexdigest()}
    held = safetensors.numpy.load_file(artifacts.check_ins(path))
    start, found = datetime.datetime(1970, 1, 1), []
    for first, end in zip([0, *held["ends"][:-1]], held["ends"]):
        rows = held["rows"][first:end]
        found.append([(str(start + datetime.timedelta(seconds=int(held["second"][row]))), int(held["place"][row]))
                      for row in rows])
    return found


@pytest.mark.parametrize("flags", [[], ["-max_history", "5"], ["-cover", "True", "-thinned", "3", "-missing", "0.5"]])
def test_the_arrays_hold_what_the_prompts_show(city, flags):
    city("process_llm_gps.py", "-dataset_name", "sample", "-validate", "True", *flags)
    for split in SPLITS:
        path, pairs = asked(split)
        found = shown(path)
        assert len(found) == len(pairs) > 5
        for (question, answer), own in zip(pairs, found):
            visits = [(time, int(poi)) for time, poi in VISIT.findall(question)]
            assert own == [*visits, (ANSWERED.search(answer)[1], int(ANSWERED.search(answer)[2]))]


def test_check_ins_of_similar_trajectories_come_first(city):
    for script in ("traj_qk.py", "traj_sim.py"):
        city(script, "-dataset_name", "sample")
    city("process_llm_gps.py", "-dataset_name", "sample", "-use_sim", "True")
    path, pairs = asked("test", use_sim=True)
    assert any("Similar trajectories" in question for question, _ in pairs)
    for (question, _), own in zip(pairs, shown(path), strict=True):
        assert own[:-1] == [(time, int(poi)) for time, poi in VISIT.findall(question)]


@pytest.mark.parametrize("as_token", [False, True])
def test_a_check_in_in_two_tokens(city, as_token):
    """<TIME n> is (weekday · 48 + half hour) · 17 + the step of time since the check-in before; by the calendar."""
    city("process_llm_gps.py", "-dataset_name", "sample", "-fields", "moment,gps", "-answer",
         "token" if as_token else "id")
    steps = list(prompts.STEPS)
    for split in ("train", "test"):
        path, pairs = asked(split)
        for (question, answer), own in zip(pairs, shown(path), strict=True):
            expected, before = [], None
            for time, poi in own:
                at = datetime.datetime.fromisoformat(time)
                gap = 16 if before is None else max(
                    step for step, minutes in enumerate(steps) if (at - before).total_seconds() >= 60 * minutes)
                expected.append(((at.weekday() * 48 + at.hour * 2 + at.minute // 30) * 17 + gap, poi))
                before = at
            found = re.findall(r"<TIME (\d+)>(?:<GPS |POI id )(\d+)", question + answer)
            assert [(int(moment), int(poi)) for moment, poi in found] == expected
            assert "> <" not in question and VISIT.search(question) is None
            assert answer.endswith(f"<TIME {expected[-1][0]}>" + (
                f"<GPS {own[-1][1]}>." if as_token else f"POI id {own[-1][1]}."))
    settings = json.loads(artifacts.question_settings(path).read_text())
    assert settings["fields"] == ["moment", "poi", "gps"] and settings.get("answer") == ("token" if as_token else None)


def test_with_pam_a_check_in_is_three_tokens(city):
    city("process_llm_gps.py", "-dataset_name", "sample", "-fields", "moment,gps", "-answer", "token", "-use_pam",
         "True")
    (file,) = FOLDER.glob("test_*_pam.txt")
    text = file.read_text()
    found = re.findall(r"<TIME \d+><GPS (\d+)>(?:<POI (\d+)>|\.)", text)
    assert found and all(gps == poi or not poi for gps, poi in found)
    assert sum(bool(poi) for _, poi in found) == text.count("<POI ")
    assert text.count("<TIME ") == len(found) == text.count("<GPS ")


def test_a_category_s_name_stands_behind_the_tokens(city):
    city("process_llm_gps.py", "-dataset_name", "sample", "-fields", "moment,gps,category", "-answer", "token")
    rows = pd.concat(pd.read_csv(FOLDER / artifacts.split_sample(split)) for split in ("train", "test"))
    names = dict(zip(rows["PoiId"], rows["PoiCategoryName"]))
    _, pairs = asked("test")
    for question, answer in pairs:
        found = re.findall(r"<TIME \d+><GPS (\d+)>( [^<]*?)?(?=<TIME|$| Current trajectory| At \d)", question)
        assert len(found) == question.count("<GPS ")
        assert [name for _, name in found] == [f" {names[int(poi)]}" for poi, _ in found]
        assert re.search(r"<TIME \d+><GPS \d+>\.$", answer)        # the target's category is not told


@pytest.mark.parametrize("flags, names", [
    (["-fields", "moment,gps,user"], "give -fields moment,gps, with category or without, and no others"),
    (["-fields", "moment,category"], "give -fields moment,gps, with category or without, and no others"),
    (["-fields", "moment"], "give -fields moment,gps, with category or without, and no others"),
    (["-answer", "token"], "goes with -fields moment,gps"), (["-missing", "0.2"], "goes with -thinned N")])
def test_mistakes(city, error_of, flags, names):
    assert names in error_of("process_llm_gps.py", "-dataset_name", "sample", *flags)


def test_without_places_none_are_left_behind(city):
    for flags, there in ((["-fields", "clock,gps"], True), (["-fields", "clock"], False)):
        city("process_llm_gps.py", "-dataset_name", "sample", *flags)
        assert bool(list(FOLDER.glob("*.check_ins.safetensors"))) == there


def test_stage_1_has_neither(city, error_of):
    assert "has no 'moment'" in error_of("process_projector_gps_stage1.py", "-dataset_name", "sample", "-fields",
                                         "moment,gps")
    city("process_projector_gps_stage1.py", "-dataset_name", "sample")
    assert not list(FOLDER.glob("*.check_ins.safetensors"))
