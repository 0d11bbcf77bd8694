"""STHGCN's sample: a small data set by hand, and its size on real NYC."""
import pytest

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import protocols
from ga_llm.pairs.sft_data import drawn

HEADER = "UserId,PoiId,PoiCategoryId,PoiCategoryName,Latitude,Longitude,LocalTime,TrajectoryId,Split\n"


def minute(i):
    return f"2012-04-03 18:{i:02}:00"


@pytest.fixture
def sample(tmp_path):
    """Writes (user, POI, trajectory, split) rows, one a minute."""
    def write(rows):
        path = tmp_path / artifacts.SAMPLE
        path.write_text(HEADER + "".join(f"{user},{poi},0,Bar,40.0,-74.0,{minute(i)},{trajectory},{split}\n"
                                         for i, (user, poi, trajectory, split) in enumerate(rows)))
        return path
    return write


TRAIN = [(1, 10, 0, "train"), (1, 11, 0, "train"), (1, 12, 0, "train"), (2, 12, 1, "train"), (2, 10, 1, "train")]


@pytest.mark.parametrize("test_rows, asked", [
    ([(1, 10, 5, "test"), (1, 11, 5, "test")], [6]),                            # the last, not the first
    ([(1, 10, 5, "test"), (1, 11, 5, "test"), (1, 12, 5, "test")], [7]),        # the last, not the one before
    ([(1, 13, 5, "test"), (1, 11, 5, "test")], [6]),                            # a check-in of an unseen POI counts
    ([(1, 11, 5, "test"), (1, 13, 5, "test")], []),                             # the last is at an unseen POI
    ([(3, 11, 5, "test"), (3, 12, 5, "test")], []),                             # an unseen user
    ([(1, 11, 5, "validate"), (1, 12, 5, "test")], [6]),                        # the split has cut it
    ([(1, 11, 5, "validate"), (1, 12, 5, "validate")], []),
    ([(1, 11, 5, "test")], []),                                                 # nothing before it
    ([(1, 11, 5, "test"), (2, 10, 6, "test"), (1, 12, 5, "test"), (2, 10, 6, "test")], [7, 8]),
])
def test_sample_by_hand(sample, test_rows, asked):
    rows = TRAIN + test_rows
    found = protocols.sthgcn_sample(sample(rows))
    assert found == {(rows[i][0], minute(i), rows[i][1]) for i in asked}


def test_train_counts_from_its_second_check_in(sample):
    """POI 20 and user 3 are in train as the first of a trajectory alone; each pair of theirs is left out."""
    rows = TRAIN + [(1, 20, 2, "train"), (1, 11, 2, "train"), (3, 11, 3, "train"), (3, 13, 3, "validate"),
                    (1, 11, 5, "test"), (1, 20, 5, "test"), (3, 11, 6, "test"), (3, 12, 6, "test")]
    assert protocols.sthgcn_sample(sample(rows)) == set()


@pytest.mark.parametrize("test_rows, asked", [
    ([(1, 10, 5, "test"), (1, 11, 5, "test")], [6]),
    ([(1, 10, 5, "test"), (1, 11, 5, "test"), (1, 12, 5, "test")], [7]),
    ([(1, 11, 5, "test")], []),                                                 # the target alone
    ([(1, 13, 5, "test"), (1, 11, 5, "test")], []),                             # the other one is at an unseen POI
    ([(1, 11, 5, "test"), (1, 12, 5, "test"), (1, 13, 5, "test")], [6]),        # the last that can be asked for
    ([(3, 11, 5, "test"), (3, 12, 5, "test")], []),                             # an unseen user
    ([(1, 11, 5, "validate"), (1, 12, 5, "test")], []),                         # a part of one split alone
    ([(1, 11, 5, "validate"), (1, 12, 5, "validate")], [6])])
def test_llm4poi_by_hand(sample, test_rows, asked):
    rows = TRAIN + test_rows
    assert protocols.llm4poi_sample(sample(rows)) == {(rows[i][0], minute(i), rows[i][1]) for i in asked}


def test_published_pairs(tmp_path):
    path = tmp_path / artifacts.STATS
    assert protocols.published(path, "ga-llm", "test") is None
    path.write_text('{"published": {"test": {"trajectories": 9, "llm4poi": 8}}}')
    found = [protocols.published(path, protocol, "test") for protocol in protocols.PROTOCOLS]
    assert found == [9, 8, None] and protocols.published(path, "ga-llm", "validate") is None


def test_select_matches_user_time_and_target(sample, make_prompt, tmp_path):
    path = sample(TRAIN + [(1, 10, 5, "test"), (1, 11, 5, "test")])
    right = make_prompt(0, 1, [10], 11, time=minute(6))
    others = [make_prompt(1, 2, [10], 11, time=minute(6)), make_prompt(2, 1, [10], 11, time=minute(5)),
              make_prompt(3, 1, [10], 10, time=minute(6))]
    assert protocols.select("sthgcn", [others[0], right, *others[1:]], path) == [right]
    assert protocols.select("sthgcn", [], path) == []
    assert protocols.select("ga-llm", [*others, right], tmp_path / "not needed") == [*others, right]


def test_drawn_prompts_are_the_same_each_time(make_prompt):
    asked = [make_prompt(pair, 1, [1], 2) for pair in range(50)]
    some = protocols.draw(asked, 8)
    assert some == protocols.draw(asked, 8) == [asked[i] for i in drawn(50, 8)] != asked[:8] and len(some) == 8
    assert protocols.draw(asked, None) == protocols.draw(asked, 50) == asked
    assert artifacts.results({"split": "validate", "draw": 8}) == "validate_draw8"


def test_mistakes(sample, make_prompt, foreign_prompt, tmp_path):
    with pytest.raises(UserError, match="line 1 of the test file.*sthgcn needs; make the questions with process_"):
        protocols.select("sthgcn", [foreign_prompt], sample(TRAIN))
    with pytest.raises(UserError, match="nowhere.csv: not found; make it with `python data-preprocess/run.py -f best_"):
        protocols.select("sthgcn", [make_prompt(0, 1, [1], 2)], tmp_path / "nowhere.csv")


@pytest.mark.slow
def test_sthgcn_on_real_nyc(nyc):
    """STHGCN's paper has 1,347; our train file is not quite the original (spec, section 2)."""
    folder, test_prompts = nyc
    assert len(protocols.select("sthgcn", test_prompts, folder / artifacts.SAMPLE)) == 1348
    assert len(protocols.sthgcn_sample(folder / artifacts.SAMPLE)) == 1348


@pytest.mark.slow
def test_llm4poi_on_real_nyc(nyc):
    """As many as LLM4POI's and GenUP's files have, and the published numbers of pairs beside ours."""
    folder, test_prompts = nyc
    asked = protocols.select("llm4poi", test_prompts, folder / artifacts.SAMPLE)
    assert asked == [prompt for prompt in test_prompts if prompt.current]
    others = [protocols.published(folder / artifacts.STATS, protocol, "test") for protocol in protocols.PROTOCOLS]
    assert others == [1447, 1429, 1347] and (len(test_prompts), len(asked)) == tuple(others[:2])
