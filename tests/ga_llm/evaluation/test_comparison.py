"""The bootstrap over pairs and runs against what is certain (equal files) and against the normal approximation."""
import json
import math

import numpy as np
import pytest
from scipy import stats

from ga_llm.base.cli import UserError
from ga_llm.evaluation import comparison


@pytest.fixture
def write(tmp_path):
    """Writes predictions.jsonl from ranks (None: unranked) and km; `change` is applied to every line's object."""
    def write(name, ranks, km=None, change=lambda record: record):
        path = tmp_path / name
        records = [{"pair": i, "user": 3, "time": "2012-04-03 18:00:09", "target": 5, "fits": True, "rank": rank,
                    "top": [[5, -0.5], [6, -1.5]], "km": distance}
                   for i, (rank, distance) in enumerate(zip(ranks, km or [0.0] * len(ranks)))]
        path.write_text("".join(json.dumps(change(record)) + "\n" for record in records))
        return path
    return write


def test_equal_files(write):
    ranks, km = [1, 4, None, 30] * 25, [0.0, 2.5, None, 9.0] * 25
    found = comparison.differences([write("a", ranks, km)], [write("b", ranks, km)])
    assert list(found) == ["Acc@1", "Acc@5", "Acc@10", "Acc@20", "MRR", "MRR@5", "MRR@10", "NDCG@10",
                           "share within 1 km", "mean km"]
    for metric, row in found.items():
        assert row["n"] == (75 if metric == "mean km" else 100) and row["a"] == row["b"]
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_values_by_hand(write):
    found = comparison.differences([write("a", [1, None, 4, 2], [0, None, 3, 2])],
                                   [write("b", [1, 2, 2, 1], [0, 1, 2, None])])
    expected = {"Acc@1": (4, 1 / 4, 2 / 4), "Acc@5": (4, 3 / 4, 1), "MRR": (4, 1.75 / 4, 3 / 4),
                "mean km": (2, 3 / 2, 2 / 2), "share within 1 km": (4, 1 / 4, 2 / 4)}
    for metric, (n, a, b) in expected.items():
        row = found[metric]
        assert (row["n"], row["a"], row["b"], row["difference"]) == pytest.approx((n, a, b, b - a))


def test_a_clear_difference(write):
    found = comparison.differences([write("a", [9] * 200)], [write("b", [1] * 199 + [9])])["Acc@1"]
    assert found["low"] > 0.98 and found["difference"] == 0.995
    assert found["p"] == 2 / 10_001      # no draw is at or below 0
    back = comparison.differences([write("a", [1] * 199 + [9])], [write("b", [9] * 200)])["Acc@1"]
    assert back["difference"] == -0.995 and back["p"] == 2 / 10_001


def test_acc_is_the_normal_approximation_of_mcnemar(write):
    """b pairs that B alone has right, c that A alone has: var(difference) = (b + c - (b - c)²/n)/n²."""
    n, both, b, c = 1000, 200, 60, 40
    first = [1] * (both + c) + [9] * (n - both - c)
    second = [1] * both + [9] * c + [1] * b + [9] * (n - both - b - c)
    found = comparison.differences([write("a", first)], [write("b", second)])["Acc@1"]
    deviation = math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert found["difference"] == pytest.approx((b - c) / n)
    assert (found["low"], found["high"]) == pytest.approx(((b - c) / n - 1.96 * deviation,
                                                           (b - c) / n + 1.96 * deviation), abs=0.0015)
    # The +1/2 is for the draws at exactly 0: the difference is a whole number of pairs.
    assert found["p"] == pytest.approx(2 * stats.norm.sf((b - c - 0.5) / n / deviation), abs=0.006)


def test_pairs_make_it_narrower_than_the_difference_of_two_samples(write):
    """A and B agree but on 10 of 1,000 pairs; were they different pairs, the variances of both would add up."""
    found = comparison.differences([write("a", [1] * 500 + [9] * 500)], [write("b", [1] * 510 + [9] * 490)])["Acc@1"]
    unpaired = 2 * 1.96 * math.sqrt(2 * 0.5 * 0.5 / 1000)
    assert found["high"] - found["low"] < unpaired / 5
    assert found["low"] > 0 and found["p"] < 0.001


def test_order_of_lines_is_nothing(write, tmp_path):
    ranks = np.random.default_rng(0).integers(1, 9, 50).tolist()
    a = write("a", ranks)
    turned = tmp_path / "turned"
    turned.write_text("".join(reversed(a.read_text().splitlines(keepends=True))))
    found = comparison.differences([a], [turned])
    assert all(row["p"] == 1 and row["low"] == row["high"] == 0 for row in found.values())


def test_a_sampled_answer_has_no_second_best(write):
    sampled = write("b", [1, None], change=lambda record: record | {"top": [[5, None]]})
    assert set(comparison.differences([write("a", [1, 2])], [sampled])) == {"Acc@1", "share within 1 km", "mean km"}


def test_without_any_distance(write):
    assert "mean km" not in comparison.differences([write("a", [1, 2], [None, 1.0])], [write("b", [1, 2], [1.0, None])])


def test_text(write):
    a, b = write("a", [1, 9], [0.0, 3.0]), write("b", [1, 1], [0.0, 0.0])
    text = comparison.compare([a], [b])
    assert text.startswith(f"A: {a}\nB: {b}\n")
    assert f"{'Acc@1':17}  {2:>6}    0.5000    1.0000  +0.5000 [+0.0000, +1.0000]   " in text
    assert f"{'mean km':17}  {2:>6}      1.50      0.00  -1.50 [-3.00, +0.00]" in text and "(less is better)" in text
    assert max(map(len, text.splitlines()[2:])) <= 120


def test_means_of_runs_by_hand(write):
    found = comparison.differences([write("a1", [1, None, 4, 2], [0, None, 3, 2]), write("a2", [1, 1, 1, 2])],
                                   [write("b", [1, 2, 2, 1], [0, 1, 2, None])])
    expected = {"Acc@1": (4, (1 + 3) / 8, 2 / 4), "MRR": (4, (1.75 + 3.5) / 8, 3 / 4),
                "mean km": (2, (0 + 3 + 0 + 0) / 4, (0 + 2) / 2)}
    for metric, (n, a, b) in expected.items():
        row = found[metric]
        assert (row["n"], row["a"], row["b"], row["difference"]) == pytest.approx((n, a, b, b - a))


def test_equal_runs_are_as_one(write):
    """Each draw takes the same pairs of all runs: whichever are drawn, what is equal stays equal."""
    ranks = np.random.default_rng(0).integers(1, 9, 50).tolist()
    one, *others = (write(name, ranks) for name in "abc")
    other = write("d", ranks[::-1])
    for row in comparison.differences([one], others).values():
        assert (row["difference"], row["low"], row["high"], row["p"]) == pytest.approx((0, 0, 0, 1), abs=1e-12)
    alone, many = comparison.differences([one], [other]), comparison.differences([one, *others], [other])
    for metric, row in alone.items():
        assert many[metric] == pytest.approx(row, abs=1e-9)


def test_few_runs_by_hand(write):
    """One of three runs is always wrong: of two drawn, both are that one in 1 of 9 draws."""
    a, *b = (write(name, [rank] * 10) for name, rank in (("a", 9), ("b1", 9), ("b2", 1), ("b3", 1)))
    row = comparison.differences([a], b)["Acc@1"]
    assert row["difference"] == pytest.approx(2 / 3) and (row["low"], row["high"]) == (0, 1)
    assert row["p"] == pytest.approx(2 / 9, abs=0.02)
    back = comparison.differences(b, [a])["Acc@1"]
    assert back["p"] == pytest.approx(2 / 9, abs=0.02) and (back["low"], back["high"]) == (-1, 0)


def test_variance_of_runs_and_pairs_adds_up(write):
    """Of runs whose Acc@1 varies, each over pairs that are right or wrong by chance alone."""
    random, runs, n = np.random.default_rng(1), 12, 300
    right = random.random((runs, n)) < np.linspace(0.3, 0.6, runs)[:, None]
    b = [write(f"b{run}", [1 if one else 9 for one in row]) for run, row in enumerate(right)]
    row = comparison.differences([write("a", [9] * n)], b)["Acc@1"]
    # Between runs, drawn one fewer; between pairs, of the runs' mean; and, drawn twice, of a run's own in a pair.
    own = right - right.mean(axis=0) - right.mean(axis=1, keepdims=True) + right.mean()
    variance = right.mean(axis=1).var(ddof=1) / runs + right.mean(axis=0).var() / n + own.var() / (runs - 1) / n
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)


def test_runs_make_it_wider(write):
    ranks = [[1] * right + [9] * (100 - right) for right in (20, 30, 40)]
    b = [write(f"b{run}", one) for run, one in enumerate(ranks)]
    a = write("a", [9] * 100)
    alone, all_three = (comparison.differences([a], runs)["Acc@1"] for runs in (b[1:2], b))
    assert alone["difference"] == pytest.approx(all_three["difference"])
    assert all_three["high"] - all_three["low"] > alone["high"] - alone["low"]


def test_text_of_runs(write):
    a, b = [write("a", [1, 9])], [write("b1", [1, 1]), write("b2", [9, 1])]
    lines = comparison.compare(a, b).splitlines()
    assert lines[:3] == [f"A: {a[0]}", f"B: {b[0]}", f"B: {b[1]}"]
    assert lines[3].endswith("by bootstrap over pairs and runs (1 of A, 2 of B)") and len(lines[3]) <= 120


def test_every_run_has_the_same_pairs(write):
    a, b = [write("a1", [1, 2]), write("a2", [1, 2])], [write("b1", [1, 2]), write("b2", [1])]
    with pytest.raises(UserError, match="b2: has no pair 1 .*which .*a1 has"):
        comparison.compare(a, b)


@pytest.mark.parametrize("ranks, change, message", [
    ([1, 2], lambda r: r, r"b: has no pair 2 \(user 3, 2012-04-03 18:00:09, POI 5\), which .*a has"),
    ([1, 2, 3, 4], lambda r: r, r"a: has no pair 3 \(user 3, 2012-04-03 18:00:09, POI 5\), which .*b has"),
    ([1, 2, 3], lambda r: r | {"target": 5 + (r["pair"] == 1)}, "has no pair 1 "),
    ([1, 2, 3], lambda r: r | {"user": None, "time": None}, "has no pair 0 "),
])
def test_only_the_same_pairs_can_be_compared(write, ranks, change, message):
    a, b = write("a", [1, 2, 3]), write("b", ranks, change=change)
    reason = r".*only the same pairs can be compared \(same --test_file, --protocol, --limit\)"
    with pytest.raises(UserError, match=message + reason):
        comparison.compare([a], [b])


@pytest.mark.parametrize("change, message", [
    ({"rank": 0}, "rank is 0, less than 1"), ({"rank": True}, "rank is True"), ({"rank": "1"}, "rank is '1'"),
    ({"km": -1}, "km is -1"), ({"pair": 0}, "pair 0 stands twice"), ({"top": [5]}, "top holds"),
    ({"target": None}, "target is None"), ({"current": -1}, "current is -1"), ({"current": "1"}, "current is '1'")])
def test_bad_values(write, change, message):
    a = write("a", [1, 2])
    b = write("b", [1, 2], change=lambda record: record | (change if record["pair"] == 1 else {}))
    with pytest.raises(UserError, match=f"b, line 2: {message}.*make it again with"):
        comparison.compare([a], [b])


@pytest.mark.parametrize("line, message", [('{"pair": 1, "us', "not JSON"), ("[1]", "not an object"), ("", "not JSON"),
                                           ('{"pair": 1, "target": 5, "rank": 1, "top": []}', "no 'user'")])
def test_bad_lines(write, line, message):
    a, b = write("a", [1, 2]), write("b", [1])
    b.write_text(b.read_text() + line + "\n")
    with pytest.raises(UserError, match=f"b, line 2: {message}"):
        comparison.compare([a], [b])


def test_missing_file(write, tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl: not found; make it with `python test_next_gps.py"):
        comparison.compare([write("a", [1])], [tmp_path / "nothing.jsonl"])
