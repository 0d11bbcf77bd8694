"""Metrics by hand, and against scikit-learn's and scipy's; intervals against the binomial formula."""
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import ndcg_score
from sklearn.metrics.pairwise import haversine_distances

from geo_encoder.gps_tokens import GPSMapping
from ga_llm.evaluation import metrics

NAN = math.nan


def values(result):
    return {name: metric["value"] for name, metric in result.items() if name != "n"}


def test_metrics_by_hand():
    result = metrics.summary([1, 2, 5, 6, 25, math.inf], [0, 1, 1.5, 4, NAN, 8])
    assert result["n"] == 6
    assert values(result) == pytest.approx({
        "Acc@1": 1 / 6, "Acc@5": 3 / 6, "Acc@10": 4 / 6, "Acc@20": 4 / 6,
        "MRR": (1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 25) / 6, "MRR@5": (1 + 1 / 2 + 1 / 5) / 6,
        "MRR@10": (1 + 1 / 2 + 1 / 5 + 1 / 6) / 6,
        "NDCG@10": (1 + 1 / math.log2(3) + 1 / math.log2(6) + 1 / math.log2(7)) / 6,
        "mean km": 14.5 / 5, "median km": 1.5, "share within 1 km": 2 / 6})


def test_no_pairs_and_no_distances():
    assert metrics.summary([], []) == {"n": 0}
    result = metrics.summary([math.inf, math.inf], [NAN, NAN])
    assert "mean km" not in result and "median km" not in result
    assert result["share within 1 km"] == result["Acc@1"] == {"value": 0, "low": 0, "high": 0}


def test_ndcg_is_scikit_learns():
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(40.0), (30, 1)), axis=1)
    target = np.arange(30)
    ranks = (scores > scores[target, target, None]).sum(axis=1) + 1
    ours = metrics.summary(ranks, np.zeros(30))["NDCG@10"]["value"]
    assert ours == pytest.approx(ndcg_score(np.eye(40)[target], scores, k=10))


def test_distances_are_scikit_learns():
    random = np.random.default_rng(0)
    ids = random.permutation(50)[:40]
    mapping = GPSMapping(ids, random.uniform(-90, 90, 40), random.uniform(-180, 180, 40))
    mapping.latitude[:2], mapping.longitude[:2] = (30, -30), (20, -160)     # opposite ends of the earth
    tops, targets = np.append(random.choice(ids, 60), ids[0]), np.append(random.choice(ids, 60), ids[1])
    places = np.radians([mapping.latitude, mapping.longitude]).T
    row = {poi: i for i, poi in enumerate(ids.tolist())}
    expected = [haversine_distances(places[[row[a]]], places[[row[b]]])[0, 0] * 6371.0088
                for a, b in zip(tops.tolist(), targets.tolist())]
    found = metrics.distances(tops, targets, mapping)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[-1] == pytest.approx(math.pi * 6371.0088)
    unknown = next(i for i in range(50) if i not in row)
    assert np.isnan(metrics.distances([-1, unknown, ids[0]], [ids[0], ids[0], unknown], mapping)).all()
    assert metrics.distances([ids[0]], [ids[0]], mapping) == 0
    assert len(metrics.distances([], [], mapping)) == 0


def test_distances_across_180_degrees_and_at_the_pole():
    mapping = GPSMapping(np.arange(5), np.array([0, 0, 89.9, 89.9, 90]), np.array([179.9, -179.9, 30, -150, 77]))
    a_degree = math.pi / 180 * 6371.0088
    np.testing.assert_allclose(metrics.distances([0, 2, 2], [1, 3, 4], mapping), np.array([.2, .2, .1]) * a_degree)


def test_interval_is_that_of_a_binomial():
    hits = [1] * 300 + [9] * 700
    metric = metrics.summary(hits, [0] * 300 + [NAN] * 700, draws=5000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    for name in ("Acc@1", "share within 1 km"):
        assert metric[name]["value"] == 0.3
        assert (metric[name]["low"], metric[name]["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)


@pytest.mark.parametrize("name, statistic", [("mean km", np.mean), ("median km", np.median)])
def test_interval_is_scipys(name, statistic):
    km = np.random.default_rng(3).lognormal(1, 1, 400)
    expected = stats.bootstrap((km,), statistic, n_resamples=5000, method="percentile", rng=1).confidence_interval
    found = metrics.summary([1.0] * 500, [*km, *[NAN] * 100], draws=5000)[name]
    assert found["value"] == pytest.approx(statistic(km))
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=0.03)


def test_every_metric_sees_the_same_draws(monkeypatch):
    rows = np.arange(30.0)
    monkeypatch.setattr(metrics, "BLOCK_DRAWS", 100)
    found = metrics.resampled(np.stack([rows, 2 * rows]), draws=50)
    assert found.shape == (2, 50) and len(np.unique(found[0])) > 10
    np.testing.assert_allclose(found[1], 2 * found[0])


def test_prompt_parts(make_prompt, foreign_prompt):
    p = make_prompt(0, 3, [4, 5], 6, history=[1, 2])
    assert (p.user, p.time, p.shown, p.current) == (3, "2012-04-03 18:00:09", [1, 2, 4, 5], [4, 5])
    assert (foreign_prompt.user, foreign_prompt.time, foreign_prompt.current) == (None, None, [4])


def trajectories(counts):
    """Train with so many trajectories for each user, of two check-ins at POI 0 each."""
    users = np.repeat(list(counts), list(counts.values()))
    rows = pd.DataFrame({"UserId": users, "PoiId": 0, "TrajectoryId": np.arange(len(users))})
    return pd.concat([rows, rows], ignore_index=True)


def pairs_in(group):
    return {name: np.flatnonzero(pairs).tolist() for name, pairs in group.items()}


def test_groups_by_hand(make_prompt, foreign_prompt):
    # Eleven users with 1 … 11 trajectories: the 30 % quantile is 4, the 70 % quantile 8. User 99 is not in train.
    train = trajectories({user: user for user in range(1, 12)})
    users = [1, 4, 5, 7, 8, 11, 99]
    test_prompts = [make_prompt(i, user, [3] * i, 3) for i, user in enumerate(users)] + [foreign_prompt]
    found = metrics.groups(test_prompts, train)
    assert pairs_in(found["user activity"]) == {"very active": [4, 5], "normal": [2, 3], "inactive": [0, 1]}
    # Check-ins: 1 2 3 4 5 6 7 2, sorted 1 2 2 3 4 5 6 7: quantiles at 2.1 and 4.9 of 0 … 7.
    assert pairs_in(found["trajectory length"]) == {"long": [4, 5, 6], "middle": [2, 3], "short": [0, 1, 7]}
    assert pairs_in(found["target in the user's history"]) == {"seen": [1, 2, 3, 4, 5, 6], "unseen": [0, 7]}
    assert pairs_in(found["target in prompt"]) == {"in prompt": [1, 2, 3, 4, 5, 6], "not in prompt": [0, 7]}


def test_history_is_trains_though_the_prompt_shows_less(make_prompt):
    test_prompts = [make_prompt(0, 1, [5], 0), make_prompt(1, 1, [5], 0, history=[0]), make_prompt(2, 2, [5], 0)]
    found = metrics.groups(test_prompts, trajectories({1: 1, 3: 1}))
    assert pairs_in(found["target in the user's history"]) == {"seen": [0, 1], "unseen": [2]}
    assert pairs_in(found["target in prompt"]) == {"in prompt": [1], "not in prompt": [0, 2]}


def test_whoever_is_at_both_quantiles_is_low(make_prompt):
    found = metrics.groups([make_prompt(i, i, [3], 3) for i in (1, 2)], trajectories({1: 4, 2: 4}))
    assert pairs_in(found["user activity"]) == {"very active": [], "normal": [], "inactive": [0, 1]}
    assert pairs_in(found["trajectory length"]) == {"long": [], "middle": [], "short": [0, 1]}


PLACES = GPSMapping(np.array([7, 8]), np.array([40.0, 40.0]), np.array([-74.0, -74.1]))
APART = math.radians(0.1) * math.cos(math.radians(40)) * 6371.0088     # along the parallel: here a fair 8.5 km


def made_report(make_prompt, decoding="rank", fits=(True, False), pairs=2, released=None):
    test_prompts = [make_prompt(0, 1, [7], 7, fits=fits[0]), make_prompt(1, 1, [7], 8, fits=fits[1])][:pairs]
    model = metrics.Ranking(np.array([1, math.inf])[:pairs], np.array([7, 7])[:pairs])
    baseline = metrics.Ranking(np.array([2.0, 1.0])[:pairs], np.array([8, 8])[:pairs])
    train = pd.DataFrame({"UserId": [1, 1], "PoiId": [7, 7], "TrajectoryId": [0, 0]})
    return metrics.report(test_prompts, model, {"popularity": baseline}, train, PLACES, 0.5, "ga-llm", decoding,
                          released if released is None else np.array(released))


def test_report(make_prompt):
    report = made_report(make_prompt)
    assert (report["protocol"], report["decoding"], report["n"], report["target_time_given"]) == (
        "ga-llm", "rank", 2, 2)
    assert report["all"]["model"]["Acc@1"]["value"] == 0.5 and report["fits"]["model"]["Acc@1"]["value"] == 1.0
    assert report["fits"]["popularity"]["n"] == 1 and report["target_in_prompt"] == 0.5
    assert report["prompts_per_second"] == 0.5
    assert report["all"]["model"]["mean km"]["value"] == pytest.approx(APART / 2, rel=1e-3)
    assert report["all"]["popularity"]["share within 1 km"]["value"] == 0.5
    group = report["groups"]["target in prompt"]
    assert group["in prompt"]["model"]["Acc@1"]["value"] == group["not in prompt"]["popularity"]["MRR"]["value"] == 1
    assert group["not in prompt"]["model"]["MRR"]["value"] == 0
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_text(make_prompt):
    """Metrics below each other, methods side by side, in 80 columns."""
    text = metrics.text(made_report(make_prompt))
    assert text.startswith("protocol ga-llm, n = 2, the target's time is given in 2 of 2 questions (GA-LLM's\n")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[lines.index("all pairs: the model's value [95 % interval], and others' values") + 1].split() == [
        "model", "popularity"]
    assert "Acc@1              0.5000 [0.0000, 1.0000]      0.5000" in lines
    median = next(line for line in lines if line.startswith("median km")).split()
    assert median[2:5] == [f"{APART / 2:.2f}", "[0.00,", f"{APART:.2f}]"]
    for metric in ("Acc@1", "Acc@5", "Acc@10", "Acc@20", "MRR", "MRR@5", "MRR@10", "NDCG@10", "mean km", "median km",
                   "share within 1 km"):
        assert sum(line.startswith(f"{metric}  ") for line in lines) == (
            1 + (metric in metrics.SHORT) + (metric in metrics.COMPARED))
    assert [line.split()[2] for line in lines if line.split()[1:2] == ["popularity"] and "[" in line] == [
        "+0.0000", "-0.2500"]
    assert "the pairs whose prompt fits --seq_len: 1 of 2" in lines
    assert "  not in prompt       1  0.0000 [0.0000, 0.0000]    1.0000      0.0000    1.0000" in lines
    assert "  normal              0  -                               -           -         -" in lines
    fitting = metrics.text(made_report(make_prompt, fits=(True, True)))
    assert "every prompt fits --seq_len" in fitting and fitting.count("[0.0000, 1.0000]") < text.count("[")


def test_many_methods_stand_below_each_other(make_prompt):
    """Two of a name's words are two lines; the first method has its interval, and no line is longer than 80."""
    found = made_report(make_prompt)["all"]
    rows = {"model": found["model"], **{f"another baseline {i}": found["popularity"] for i in range(6)}}
    lines = metrics.narrow(rows, ("Acc@1", "mean km")).splitlines()
    assert max(map(len, lines)) <= 80
    heads = [i for i, line in enumerate(lines) if line.split()[:2] == ["another", "another"]]
    assert len(heads) == 2 and sum(line.count("another") for line in lines) == 6
    assert [line.split()[0] for line in lines].count("Acc@1") == 2
    assert lines[heads[0] + 3].startswith("Acc@1    0.5000 [0.0000, 1.0000]    0.5000")
    assert lines[heads[1] + 3].startswith("Acc@1      0.5000")


def test_published_number_of_pairs(make_prompt):
    text = metrics.text(made_report(make_prompt) | {"published_n": 1447})
    assert text.startswith("protocol ga-llm, n = 2 (published: 1447), the target's time")


def test_a_third_denominator(make_prompt):
    """The pairs that the released code would count, whether or not they fit here; null where that is not known."""
    found = made_report(make_prompt, fits=(True, True), released=(False, True))
    assert found["fits_released"]["model"]["n"] == 1 and found["fits"]["model"]["n"] == 2
    assert found["fits_released"]["popularity"]["Acc@1"]["value"] == 1
    told = "in the released code's wording: 1 of 2"
    assert told in metrics.text(found) and made_report(make_prompt)["fits_released"] is None
    assert "released" not in metrics.text(made_report(make_prompt, released=(True, True)))


def test_a_sampled_answer_has_no_second_best(make_prompt):
    report = made_report(make_prompt, decoding="sample")
    for methods in (report["all"], report["fits"], report["groups"]["target in prompt"]["in prompt"]):
        assert set(methods["model"]) == {"n", "Acc@1", "mean km", "median km", "share within 1 km"}
        assert set(methods["popularity"]) > {"MRR"}
    line = next(line for line in metrics.text(report).splitlines() if line.startswith("MRR  "))
    assert line.split() == ["MRR", "-", f"{report['all']['popularity']['MRR']['value']:.4f}"]


def test_report_of_no_pairs(make_prompt):
    report = made_report(make_prompt, pairs=0)
    assert report["n"] == report["all"]["model"]["n"] == 0 and report["target_in_prompt"] is None
    assert "n = 0" in metrics.text(report)


def test_rare_targets(make_prompt):
    train = pd.DataFrame({"UserId": 1, "PoiId": np.repeat([0, 1, 2, 3, 4], [1, 2, 3, 9, 10]), "TrajectoryId": 0})
    found = metrics.groups([make_prompt(i, 1, [3], target) for i, target in enumerate([0, 1, 2, 3, 4, 9])], train)
    assert pairs_in(found["target's check-ins in train"]) == {
        "at most 2": [0, 1, 5], "3 to 9": [2, 3], "10 or more": [4]}


def test_a_prompt_without_a_current_part_has_no_current_check_ins(make_prompt):
    """Its history is no current trajectory, and is not counted twice among the user's visits."""
    prompt = make_prompt(0, 3, [], 6, history=[1, 2])
    assert (prompt.shown, prompt.current) == ([1, 2], [])
    train = pd.DataFrame({"UserId": [3, 3], "PoiId": [1, 2], "TrajectoryId": 0})
    assert list(metrics.histories([prompt], train)) == [[1, 2]]
