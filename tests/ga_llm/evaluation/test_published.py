"""Published predictions beside ours: in files of GenUP's format made here, and in the real ones where they are."""
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import baselines, comparison, predictions, published
from ga_llm.evaluation.ranking import Ranked

GENUP = Path(os.environ.get("GA_LLM_DATA", Path(__file__).parents[4] / "shared/data")) / "published/genup"
# What its name says of the model, and its Acc@1 on the pairs that stand in the same place as ours.
REAL = {"Llama-2-7b-longlora-32k-merged": 0.2565, "Meta-Llama-3.1-8B": 0.2586, "Llama-3.2-1B": 0.2481}
TARGETS = list(range(100, 140))


@pytest.fixture
def ours(tmp_path):
    """Writes predictions.jsonl with these targets; `alone` are the pairs without a check-in before the target."""
    def write(targets=TARGETS, alone=(), right=(), name="ours.jsonl", **change):
        path = tmp_path / name
        path.write_text("".join(json.dumps(
            {"pair": pair, "user": 3, "time": "2012-04-03 18:00:09", "target": target,
             "current": 0 if pair in alone else 2, "fits": True, "rank": 1 if pair in right else 2,
             "top": [[target, -0.5]], "km": 0.0} | change) + "\n"
            for pair, target in enumerate(targets)))
        return path
    return write


@pytest.fixture
def theirs(tmp_path):
    """Writes one of GenUP's result files: right at the places `right`, without a number at the others."""
    def write(targets=TARGETS, right=(), name="theirs.json", change={}):
        path = tmp_path / name
        content = {"model_id": "M", "dataset_id": "D", "accuracy": len(right) / len(targets),
                   "predictions": [str(target) if i in right else "" for i, target in enumerate(targets)],
                   "targets": list(map(str, targets))} | change
        with (gzip.open if name.endswith(".gz") else open)(path, "wb") as file:
            file.write(json.dumps(content, indent=4).encode())
        return path
    return write


@pytest.mark.parametrize("name", ["theirs.json", "theirs.json.gz"])
def test_the_same_pairs_are_compared(ours, theirs, name):
    """Pairs 0, 7 and 8 have no check-in before the target, so that the file's first is our pair 1."""
    alone = (0, 7, 8)
    asked = [target for pair, target in enumerate(TARGETS) if pair not in alone]
    a, b = theirs(asked, right=(0, 1, 2, 30), name=name), ours(alone=alone, right=(0, 1, 2, 7, 9))
    found = comparison.differences([a], [b])
    assert list(found) == ["Acc@1"] and found["Acc@1"]["n"] == 37
    assert (found["Acc@1"]["a"], found["Acc@1"]["b"]) == pytest.approx((4 / 37, 3 / 37))
    # Right in one of the two alone: theirs at 2 and 30 (pairs 3 and 33), ours at pair 9.
    same, n = published.align(a, comparison.read(b), b)
    assert n == 37 and [key[0] for key, record in same.items() if record["rank"] == 1] == [1, 2, 3, 33]
    row, back = found["Acc@1"], comparison.differences([b], [a])["Acc@1"]
    assert (back["difference"], back["p"]) == pytest.approx((-row["difference"], row["p"]), abs=1e-9)


def test_it_is_the_paired_bootstrap_of_what_was_right(ours, theirs):
    """As if the published answers were a predictions.jsonl of our own."""
    random = np.random.default_rng(0)
    right, other = (set(random.choice(40, 15, replace=False).tolist()) for _ in range(2))
    from_file = comparison.differences([theirs(right=right)], [ours(right=other)])["Acc@1"]
    as_ours = comparison.differences([ours(right=right, name="a.jsonl")], [ours(right=other)])["Acc@1"]
    assert from_file == as_ours


def test_pairs_in_another_order_are_left_out(ours, theirs):
    swapped = [*TARGETS[:20], TARGETS[21], TARGETS[20], *TARGETS[22:]]
    a, b = theirs(swapped, right=range(40)), ours(right=[20, 21])
    row = comparison.differences([a], [b])["Acc@1"]
    assert (row["n"], row["a"], row["b"]) == (38, 1, 0)
    lines = comparison.compare([a], [b]).splitlines()
    assert lines[0] == (f"A: {a} (published; 38 of its 40 pairs stand in the same place as ours, the others are left "
                        "out)")
    assert lines[1] == f"B: {b}"


def test_what_their_prompts_showed_is_said_beside_it(ours, theirs):
    text = comparison.compare([theirs()], [ours()])
    assert text.endswith(published.ABOUT) and max(map(len, published.ABOUT.splitlines())) <= 120
    assert "GenUP" in text and "sampled" in text and "profile" in text
    assert published.ABOUT not in comparison.compare([ours()], [ours(name="other.jsonl")])


def test_beside_several_runs(ours, theirs):
    runs = [ours(right=range(20 + run), name=f"b{run}.jsonl") for run in range(3)]
    row = comparison.differences([theirs(right=range(10))], runs)["Acc@1"]
    assert (row["a"], row["b"]) == pytest.approx((10 / 40, 21 / 40)) and row["p"] < 0.05


@pytest.mark.parametrize("targets, alone, message", [
    (TARGETS[:39], (), "its 39 pairs are not the 40 of .*ours.jsonl .*: 39 stand in the same place"),
    (TARGETS, (0,), "its 40 pairs are not the 39 of .*: 0 stand in the same place"),
    (TARGETS[1:] + TARGETS[:1], (), "its 40 pairs are not the 40 of .*: 0 stand in the same place"),
    ([*TARGETS[:37], 139, 137, 138], (), ": 37 stand in the same place; give predictions of all test pairs"),
])
def test_other_pairs_are_refused(ours, theirs, targets, alone, message):
    with pytest.raises(UserError, match="theirs.json: .*" + message):
        comparison.compare([theirs(targets)], [ours(alone=alone)])


def test_ours_must_tell_the_check_ins_before_the_target(ours, theirs):
    with pytest.raises(UserError, match="ours.jsonl: does not tell .*'current'.*make it again with `python test_next"):
        comparison.compare([theirs()], [ours(current=None)])


def test_one_of_the_two_is_ours(theirs):
    with pytest.raises(UserError, match="theirs.json: published predictions are compared with a predictions.jsonl"):
        comparison.compare([theirs()], [theirs(name="other.json")])


@pytest.mark.parametrize("change, message", [
    ({"predictions": ["1"]}, "as many 'predictions' as 'targets'"), ({"targets": None}, "as many"),
    ({"predictions": [], "targets": []}, "as many"), ({"predictions": "12", "targets": "12"}, "as many"),
    ({"targets": [7, *map(str, TARGETS[1:])]}, r"targets\[0\] is 7, not a POI id in digits"),
    ({"targets": [*map(str, TARGETS[1:]), ""]}, r"targets\[39\] is ''"),
    ({"targets": [*map(str, TARGETS[1:]), "9" * 50]}, r"targets\[39\] is '9+…?, not"),
    ({"predictions": [*map(str, TARGETS[1:]), "x y"]}, r"predictions\[39\] is 'x y'"),
    ({"predictions": [*map(str, TARGETS[1:]), None]}, r"predictions\[39\] is None"),
    ({"targets": ["²", *map(str, TARGETS[1:])]}, r"targets\[0\] is '²'"),
])
def test_damaged_values_are_refused(ours, theirs, change, message):
    with pytest.raises(UserError, match=f"theirs.json: not one of GenUP's .*{message}.*fetch it again with `git "):
        comparison.compare([theirs(change=change)], [ours()])


@pytest.mark.parametrize("name, content, message", [
    ("theirs.json", b"version https://git-lfs.github.com/spec/v1\n", "not one of"),
    ("theirs.json", b"[1]", "no object"),
    ("theirs.json", b"[" * 100_000, "not one of"), ("theirs.json", b"\xff\xfe", "not one of"),
    ("theirs.json", b"", "empty"), ("theirs.json.gz", b"{}", "not one of"),
    ("theirs.json.gz", gzip.compress(b'{"predictions": ["1"], "targets": ["1"]}', mtime=0)[:-9], "not one of"),
    ("theirs.json.gz", gzip.compress(b"{}", mtime=0)[:12] + b"\0" * 20, "not one of"),
])
def test_damaged_files_are_refused(ours, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        comparison.compare([ours()], [tmp_path / name])


def test_a_missing_file(ours, tmp_path):
    with pytest.raises(UserError, match="nothing.json: not found; make it with `git clone https://github.com/w11wo"):
        comparison.compare([ours()], [tmp_path / "nothing.json"])


# The real files.

@pytest.fixture(scope="module")
def counted(nyc, tmp_path_factory):
    """predictions.jsonl of all real NYC test pairs, as the count of the user's own history ranks them; the prompts."""
    folder, prompts = nyc
    found = baselines.rankings(baselines.read_train(folder / artifacts.split_sample("train")), prompts)
    ranking = found["user-history frequency"]
    store = predictions.Store(tmp_path_factory.mktemp("counted"), "k")
    store.add(prompts, [Ranked(None if rank == np.inf else int(np.ceil(rank)), [(int(top), -1.0)], None)
                        for rank, top in zip(ranking.ranks, ranking.tops)])
    store.finish(prompts, [np.nan] * len(prompts), {})
    return store.folder / artifacts.PREDICTIONS, prompts


@pytest.mark.parametrize("model", REAL)
def test_genup_stands_beside_real_nyc(counted, model):
    path = GENUP / f"{model}-FourSquare-NYC-POI-FourSquare-NYC-POI.json.gz"
    if not path.exists():
        pytest.skip("GenUP's result files are not here")
    ours, prompts = counted
    content = json.loads(gzip.open(path).read())
    answers = list(zip(content["targets"], content["predictions"]))
    assert np.mean([target == prediction for target, prediction in answers]) == pytest.approx(content["accuracy"])

    # Ours once more, from the prompts themselves: those with a current part.
    asked = [prompt for prompt in prompts if re.search("Current trajectory of user", prompt.text)]
    assert sorted(str(prompt.target) for prompt in asked) == sorted(content["targets"])     # the same places
    same = [answer for prompt, answer in zip(asked, answers) if str(prompt.target) == answer[0]]
    text = comparison.compare([path], [ours])
    assert (len(prompts), len(asked), len(same)) == (1447, 1429, 1419)
    assert "1,419 of its 1,429 pairs stand in the same place" in text
    row = comparison.differences([path], [ours])["Acc@1"]
    assert row["n"] == len(same)
    assert row["a"] == pytest.approx(np.mean([target == prediction for target, prediction in same]))
    assert round(row["a"], 4) == REAL[model]


def test_genup_of_another_city_is_refused(counted):
    path = GENUP / "Meta-Llama-3.1-8B-FourSquare-TKY-POI-FourSquare-TKY-POI.json.gz"
    if not path.exists():
        pytest.skip("GenUP's result files are not here")
    with pytest.raises(UserError, match="its 6,980 pairs are not the 1,429 of "):
        comparison.compare([path], [counted[0]])
