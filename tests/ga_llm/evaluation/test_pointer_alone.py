"""The pointer alone as a baseline: the same pairs of any question file, or none of them and a line that says why."""
import json
import logging

import numpy as np
import pytest

from ga_llm.base import artifacts
from ga_llm.evaluation import baselines, pointer_alone, protocols
from ga_llm.pairs import sft_data, spelling

SPLITS = ("test", "validate")


def prompts_of(folder, split="test"):
    path = folder / artifacts.questions(split, "sample", 2, use_sim=False)
    return spelling.untokenized(sft_data.read_test_pairs(path, "…"))


def answers(prompts, first=0):
    """Records of predictions.jsonl: every third pair without a rank, every fifth without a guess."""
    return [{"pair": prompt.pair, "user": prompt.user, "time": prompt.time, "target": prompt.target,
             "rank": None if i % 3 == 2 else 1 + i, "top": [[first + i, -0.5]] * (i % 5 != 4)}
            for i, prompt in enumerate(prompts)]


@pytest.fixture
def city(asked_city, tmp_path, monkeypatch):
    """The city's folders, and a file of made-up answers, of test and validation, in "tokens"."""
    monkeypatch.chdir(tmp_path)     # no other data sets
    records = [record for split in SPLITS for record in answers(prompts_of(asked_city / "tokens", split),
                                                                100 * SPLITS.index(split))]
    path = pointer_alone.write(asked_city / "tokens", records, scale="a scale")
    yield asked_city, records
    path.unlink(missing_ok=True)


def test_pairs_are_found_in_their_order(city):
    folder, records = city[0] / "tokens", city[1]
    asked = prompts_of(folder)
    found = pointer_alone.ranking(folder, asked[::-1])
    expected = records[:len(asked)][::-1]
    assert found.ranks.tolist() == [record["rank"] or np.inf for record in expected] and np.isinf(found.ranks).any()
    assert found.tops.tolist() == [record["top"][0][0] if record["top"] else -1 for record in expected]
    assert found.tops.dtype == np.int64 and len(asked) > 5


@pytest.mark.parametrize("kind", ["moments", "text"])
@pytest.mark.parametrize("split", SPLITS)
def test_other_questions_of_the_same_pairs(city, kind, split):
    """Of other fields, answers and folders: their order is the same, so their ranks must be."""
    root, _ = city
    (root / "tokens" / artifacts.POINTER_ALONE).rename(root / kind / artifacts.POINTER_ALONE)
    try:
        found = pointer_alone.ranking(root / kind, prompts_of(root / kind, split))
    finally:
        (root / kind / artifacts.POINTER_ALONE).unlink()
    expected = answers(prompts_of(root / "tokens", split), 100 * SPLITS.index(split))
    assert found.ranks.tolist() == [record["rank"] or np.inf for record in expected]
    assert found.tops.tolist() == [record["top"][0][0] if record["top"] else -1 for record in expected]


def test_protocols_and_drawn_pairs(city):
    root, records = city
    asked = protocols.select("sthgcn", prompts_of(root / "tokens"), root / "tokens" / artifacts.SAMPLE)
    for some in (asked, protocols.draw(asked, 3)):
        found = pointer_alone.ranking(root / "tokens", some)
        assert found.ranks.tolist() == [records[prompt.pair]["rank"] or np.inf for prompt in some]
    assert len(asked) > len(some) == 3


def test_it_stands_among_the_baselines(city):
    root, records = city
    train, asked = baselines.read_train(root / "tokens/train_sample.csv"), prompts_of(root / "tokens")
    found = baselines.rankings(train, asked, root / "tokens")
    assert list(found) == ["user-history frequency", pointer_alone.NAME, "popularity", "Markov chain"]
    assert found[pointer_alone.NAME].ranks[0] == records[0]["rank"]
    assert list(baselines.rankings(train, asked)) == list(baselines.rankings(train, asked, root / "text")) == [
        name for name in found if name != pointer_alone.NAME]


def test_the_data_sets_own_folder_is_looked_into(city, tmp_path):
    """As for the questions of a row of a table, whose samples are a copy."""
    root, records = city
    own = artifacts.preprocessed("sample", tmp_path / "datasets")
    own.mkdir(parents=True)
    (root / "tokens" / artifacts.POINTER_ALONE).rename(own / artifacts.POINTER_ALONE)
    elsewhere = artifacts.preprocessed("sample", tmp_path / "runs")
    elsewhere.mkdir(parents=True)
    (elsewhere / "train_sample.csv").write_bytes((root / "tokens/train_sample.csv").read_bytes())
    found = pointer_alone.ranking(elsewhere, prompts_of(root / "tokens")[:3])
    assert found.ranks.tolist() == [records[i]["rank"] or np.inf for i in range(3)]


def pair(**what):
    """Columns of a file of one pair."""
    one = {"user": 1, "time": "t", "target": 1, "rank": 1, "guess": 1} | what
    return {name: [value] for name, value in one.items()}


def change(path, **what):
    path.write_text(json.dumps(json.loads(path.read_text()) | what))


@pytest.mark.parametrize("spoil, why", [
    (lambda folder: (folder / "train_sample.csv").open("a").write("\n"), "of another train split than"),
    (lambda folder: (folder / "pointer_alone.json").write_text("{"), "damaged"),
    (lambda folder: change(folder / "pointer_alone.json", rank=[1]), "damaged"),
    (lambda folder: change(folder / "pointer_alone.json", user=None), "damaged"),
    (lambda folder: change(folder / "pointer_alone.json", **pair(guess="x")), "damaged"),
    (lambda folder: change(folder / "pointer_alone.json", **pair(guess=10**30)), "damaged"),
    (lambda folder: change(folder / "pointer_alone.json", **pair(rank=0)), "damaged"),
    (lambda folder: change(folder / "pointer_alone.json", user=[], time=[], target=[], rank=[], guess=[]),
     "lacks 5 of these 5 pairs")],
    ids=["another train split", "no JSON", "columns", "no list", "no number", "a large number", "rank 0", "no pairs"])
def test_a_file_that_will_not_do_is_not_shown(city, tmp_path, caplog, spoil, why):
    root, _ = city
    folder = artifacts.preprocessed("town", tmp_path)
    folder.mkdir(parents=True)
    for name in ("train_sample.csv", artifacts.POINTER_ALONE):
        (folder / name).write_bytes((root / "tokens" / name).read_bytes())
    asked = prompts_of(root / "tokens")[:5]
    assert pointer_alone.ranking(folder, asked) is not None
    spoil(folder)
    with caplog.at_level(logging.INFO):
        assert pointer_alone.ranking(folder, asked) is None
    line, = caplog.messages
    assert line.startswith(f"{folder / artifacts.POINTER_ALONE}: {why}") and "\n" not in line
    assert f"`python tools/baselines.py -dataset_name town -data_path {tmp_path} -pointer True`" in line


def test_never_on_fewer_pairs(city, caplog, foreign_prompt, make_prompt):
    """One that it does not know, of another wording, or that it gives two answers for: the others are not shown."""
    root, records = city
    asked = prompts_of(root / "tokens")
    for stranger in (foreign_prompt, make_prompt(9, 10**6, [], 5)):
        with caplog.at_level(logging.INFO):
            assert pointer_alone.ranking(root / "tokens", [*asked, stranger]) is None
        assert f"lacks 1 of these {len(asked) + 1} pairs" in caplog.messages[-1]
    twice = {**records[0], "rank": 7}
    pointer_alone.write(root / "tokens", [*records, twice, records[1]])
    assert pointer_alone.ranking(root / "tokens", asked[:1]) is None
    assert pointer_alone.ranking(root / "tokens", asked[1:2]).ranks.tolist() == [records[1]["rank"]]
