"""Baselines by hand, the Markov chain against a plain sort of exact fractions, the user's history on real NYC."""
from collections import Counter
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from ga_llm.base.cli import UserError
from ga_llm.evaluation import baselines, metrics

INF = np.inf


def train_of(*trajectories, users=None):
    rows = [(users[i] if users else 0, poi, i) for i, pois in enumerate(trajectories) for poi in pois]
    return pd.DataFrame(rows, columns=["UserId", "PoiId", "TrajectoryId"])


def found(ranking):
    return ranking.ranks.tolist(), ranking.tops.tolist()


def test_history_and_popularity_by_hand(make_prompt):
    train = train_of([7, 8, 8], [9, 9, 9], users=[1, 2])
    test_prompts = [make_prompt(0, 1, [7, 5], 7), make_prompt(1, 1, [], 7), make_prompt(2, 1, [5], 9),
                    make_prompt(3, 2, [9], 9), make_prompt(4, 1, [8, 7, 7], 8), make_prompt(5, 3, [], 4)]
    rankings = baselines.rankings(train, test_prompts)
    assert list(rankings) == ["user-history frequency", "popularity", "Markov chain"]
    # Pair 0: 7 and 8 twice each, 7 was first; pair 4: three against three, 7 again; pair 5: an unknown user.
    assert found(rankings["user-history frequency"]) == ([1, 2, INF, 1, 2, INF], [7, 8, 8, 9, 7, -1])
    assert found(rankings["popularity"]) == ([3, 3, 1, 1, 2, INF], [9] * 6)


def test_where_a_prompt_names_no_user_its_check_ins_are_the_history(foreign_prompt):
    assert found(baselines.rankings(train_of([6, 6]), [foreign_prompt])["user-history frequency"]) == ([INF], [4])


def test_markov_chain_by_hand(make_prompt):
    # Check-ins: 1 five times, 2 thrice, 3 thrice, 4 once. From 1: 2, 3, 3, 4. A trajectory's end leads nowhere.
    train = train_of([1, 2], [1, 3, 1, 3, 1], [2, 1, 4], [2, 3])
    targets = [3, 2, 4, 1]
    after_1 = [make_prompt(i, 0, [9, 1], target, history=[4]) for i, target in enumerate(targets)]
    # 3: 2/4; 2 and 4: 1/4 each, 2 is more popular; 1: 0.4 · 5/12.
    assert found(baselines.markov_chain(train, after_1)) == ([1, 2, 3, 4], [3] * 4)
    # After 4, after the unknown 9, and after nothing: by popularity; 2 and 3 are equal, 2 was first.
    for shown in ([4], [9], []):
        alike = [make_prompt(i, 0, shown, target) for i, target in enumerate([1, 2, 3, 4, 8])]
        assert found(baselines.markov_chain(train, alike)) == ([1, 2, 3, 4, INF], [1] * 5)
    # After the history's last where there is no current trajectory: from 3 to 1, both times.
    assert found(baselines.markov_chain(train, [make_prompt(0, 0, [], 1, history=[1, 3])])) == ([1], [1])


def test_a_popular_poi_beats_a_rare_step(make_prompt):
    """Back-off is by score: a POI that never followed may still come before one that did once in thirty times."""
    train = train_of(*[[1, 2]] * 29, [1, 3], [5, 1], [4, 5])
    test_prompts = [make_prompt(i, 0, [1], target) for i, target in enumerate([2, 1, 3, 5, 4])]
    # 2: 29/30; 1: 0.4 · 31/64 = .19; 3: 1/30 = .033; 5: 0.4 · 2/64 = .013; 4: 0.4 · 1/64 = .006.
    assert found(baselines.markov_chain(train, test_prompts)) == ([1, 2, 3, 4, 5], [2] * 5)


def test_markov_chain_against_exact_fractions(make_prompt):
    random = np.random.default_rng(0)
    trajectories = [(random.zipf(1.4, random.integers(1, 9)) % 25).tolist() for _ in range(120)]
    test_prompts = [make_prompt(i, 0, [int(a)], int(b)) for i, (a, b) in enumerate(random.integers(0, 25, (200, 2)))]
    visits = [poi for pois in trajectories for poi in pois]
    count = Counter(visits)
    steps = Counter(step for pois in trajectories for step in zip(pois, pois[1:]))

    def order(last):
        out = sum(times for (start, _), times in steps.items() if start == last)
        score = {poi: Fraction(steps[last, poi], out) if steps[last, poi] else Fraction(2 * count[poi], 5 * len(visits))
                 for poi in count}
        return sorted(count, key=lambda poi: (-score[poi], -count[poi], visits.index(poi)))

    orders = [order(prompt.shown[-1]) for prompt in test_prompts]
    expected = [o.index(p.target) + 1 if p.target in o else INF for o, p in zip(orders, test_prompts)]
    assert found(baselines.markov_chain(train_of(*trajectories), test_prompts)) == (expected, [o[0] for o in orders])
    assert len(set(expected)) > 15


def test_no_pairs():
    for ranking in baselines.rankings(train_of([1, 2]), []).values():
        assert found(ranking) == ([], []) and ranking.tops.dtype == np.int64


@pytest.mark.parametrize("content, message", [
    (None, "not found; make it with `python data-preprocess/run.py"), ("", "empty; make it again with"),
    ("UserId,PoiId\n1,2\n", "TrajectoryId"), ("UserId,PoiId,TrajectoryId\n1,x,2\n", "make it again with")])
def test_bad_train_files(tmp_path, content, message):
    path = tmp_path / "train_sample.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        baselines.read_train(path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_user_history_on_real_nyc(nyc):
    """Spec: Acc@1 .2267, Acc@5 .5190, MRR .3583 on 1,447 pairs."""
    folder, test_prompts = nyc
    ranks = baselines.rankings(baselines.read_train(folder / "train_sample.csv"),
                               test_prompts)["user-history frequency"].ranks
    result = metrics.summary(ranks, np.zeros(len(ranks)), draws=10)
    assert result["n"] == 1447
    assert [round(result[name]["value"], 4) for name in ("Acc@1", "Acc@5", "MRR")] == [0.2267, 0.5190, 0.3583]
    assert np.isinf(ranks).sum() > 0
