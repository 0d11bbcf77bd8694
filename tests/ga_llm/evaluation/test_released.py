"""The pairs that the released code would count: its prompts, written out as wholes and tokenized, against the sums."""
import numpy as np
import pandas as pd
import pytest

from ga_llm.base import prompts
from ga_llm.evaluation import released
from ga_llm.llm.backbone import load_tokenizer
from ga_llm.pairs import spelling

START = pd.Timestamp("2012-04-01")
TARGET = 9


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama())


def sample(tmp_path, train, test, others=3):
    """sample.csv of a user 1 with so many train check-ins and a test trajectory of so many, the target included, beside
    `others` of a user 2, which are as old as user 1's; and one at a POI that train lacks, which no prompt shows."""
    kinds = [(1, "train", train), (2, "train", others), (1, "test", test)]
    rows = [(user, TARGET if i == count - 1 and (user, split) != (1, "train") else 3 + i % 4, i % 5, "Café", 40.5,
             -73.9, str(START + pd.Timedelta(days=365 * (split == "test"), hours=i)), f"{user}{split}", split)
            for user, split, count in kinds for i in range(count)]
    rows = pd.DataFrame(rows, columns=["UserId", "PoiId", "PoiCategoryId", "PoiCategoryName", "Latitude", "Longitude",
                                       "LocalTime", "TrajectoryId", "Split"])
    rows["TrajectoryId"] = rows["TrajectoryId"].map({"1train": 0, "2train": 1, "1test": 2})
    unseen = rows[-1:].assign(PoiId=TARGET + 1, LocalTime=str(pd.Timestamp(rows.iloc[-1]["LocalTime"])
                                                              + pd.Timedelta(minutes=1)))
    pd.concat([rows.sort_values("LocalTime", kind="stable"), unseen]).to_csv(tmp_path / "sample.csv", index=False)
    return rows


def whole(tokenizer, rows, history, current):
    """The number of tokens of the whole prompt, with the last so many check-ins of each part."""
    of = rows[rows["UserId"] == 1]
    parts = [of[of["Split"] == "train"], of[of["Split"] == "test"][:-1]]
    target = rows.iloc[-1]
    text = [prompts.QUESTION]
    for heading, part, count in zip((released.HISTORY, released.CURRENT), parts, (history, current)):
        if count or heading is released.CURRENT:
            text += [heading.format(1), *map(released._check_in, part[len(part) - count:].itertuples())]
    text += [released.ASK.format(target["LocalTime"], 1, TARGET), prompts.ANSWER,
             released.ANSWERED.format(target["LocalTime"], 1)]
    return len(tokenizer(" ".join(text))["input_ids"])


@pytest.mark.parametrize("train, test, history, current", [
    (5, 4, 5, 3), (5, 1, 5, 0), (700, 3, 600, 2), (5, 200, 5, 199), (5, 201, 0, 200), (5, 600, 0, 499)],
    ids=["both", "no current part", "600 of history", "200 with the target", "201", "the last 500"])
def test_a_pair_counts_up_to_its_length(tmp_path, tokenizer, make_prompt, train, test, history, current):
    rows = sample(tmp_path, train, test)
    asked = [make_prompt(0, 1, [], TARGET, time=rows.iloc[-1]["LocalTime"])]
    length = whole(tokenizer, rows, history, current)
    slack = 2 + (history + current) // 50       # how pieces join: a space, an end
    found = [released.fitting(asked, tokenizer, limit, tmp_path / "sample.csv").tolist()
             for limit in (length - slack, length + slack)]
    assert found == [[False], [True]]


def test_their_check_in_is_longer_than_ours(tmp_path, tokenizer):
    rows = sample(tmp_path, 20, 3)
    ours = [prompts.check_in(prompts.FIELDS, row.LocalTime, row.UserId, row.PoiId, row.Latitude, row.Longitude,
                             row.PoiCategoryName, row.PoiCategoryId) for row in rows.itertuples()]
    theirs = [released._check_in(row) for row in rows.itertuples()]
    assert all(len(tokenizer(a)["input_ids"]) + 5 < len(tokenizer(b)["input_ids"]) for a, b in zip(ours, theirs))


def test_what_the_sample_does_not_know_counts_as_it_is(tmp_path, tokenizer, make_prompt, foreign_prompt):
    rows = sample(tmp_path, 5, 4)
    known, stranger = (make_prompt(i, user, [], TARGET, time=rows.iloc[-1]["LocalTime"], fits=False)
                       for i, user in enumerate((1, 7)))
    found = released.fitting([known, stranger, foreign_prompt], tokenizer, 10_000, tmp_path / "sample.csv")
    assert np.array_equal(found, [True, False, True])
    assert released.fitting([known], tokenizer, 10_000, tmp_path / "no.csv") is None


def test_the_released_tests_spaces():
    """What is asked has them; the user, the time and the id that are read from it are the same."""
    time = "2012-04-03 18:00:09"
    pair = prompts.join(prompts.question(4, [], [], ["POI id 2."], prompts.ask_poi(time, 4, 0, 9)),
                        prompts.answer_poi(time, 4, 7))
    ours, theirs = (spelling.untokenized([text])[0] for text in (pair, released.asked(pair)))
    assert ours.text.endswith(f"{prompts.ANSWER} At {time}, user 4 will visit POI id ")
    assert theirs.text.endswith(f"{prompts.ANSWER}At {time},  user 4 will visit POI id ")
    assert len(theirs.text) == len(ours.text)       # one space less, one more
    for name in ("user", "time", "target", "shown"):
        assert getattr(theirs, name) == getattr(ours, name)
    foreign = f"{prompts.QUESTION} was at POI id 4 {prompts.ANSWER} goes to POI id 6"
    assert released.asked(foreign) == foreign.replace(f"{prompts.ANSWER} ", prompts.ANSWER)
