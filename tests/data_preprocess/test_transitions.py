"""Transitions, neighbours, the graph of both, and PAM's questions: against hand counts and brute force."""
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from checkins import config, questions, samples, transitions
from ga_llm.base import artifacts, prompts

FOLDER = Path("datasets/city/preprocessed")


def train_of(*rows):
    """(trajectory, POI) or (trajectory, POI, category, its name) rows, in order of time."""
    columns = ["TrajectoryId", "PoiId", "PoiCategoryId", "PoiCategoryName"]
    return pd.DataFrame([(*row, 1, "food")[:4] for row in rows], columns=columns)


def counted(*rows):
    return [tuple(row) for row in transitions.count(train_of(*rows)).to_numpy().tolist()]


@pytest.mark.parametrize("rows, expected", [
    ([(0, 5), (0, 3), (0, 5), (0, 3), (0, 9)], [(3, 5, 1), (3, 9, 1), (5, 3, 2)]),
    ([(0, 2), (0, 2), (0, 2)], [(2, 2, 2)]),                                # the same place again is a step, too
    ([(0, 1), (1, 7), (0, 2), (1, 8), (0, 3)], [(1, 2, 1), (2, 3, 1), (7, 8, 1)]),      # two people at a time
    ([(0, 1), (0, 2), (1, 3), (1, 1), (2, 1), (2, 2)], [(1, 2, 2), (3, 1, 1)]),         # not from 2 to 3
    ([(0, 1), (1, 2), (2, 3)], [])])
def test_transitions_stay_within_a_trajectory(rows, expected):
    assert counted(*rows) == expected


def test_successors_by_count_then_by_id():
    steps = pd.DataFrame([(1, 9, 2), (1, 4, 2), (1, 7, 3), (1, 1, 1), (1, 3, 1), (1, 2, 1), (5, 6, 1)],
                         columns=["PoiId", "NextId", "Count"]).sample(frac=1, random_state=0)
    assert transitions.successors(steps) == {1: [7, 4, 9, 1, 2], 5: [6]}
    assert transitions.successors(steps, most=2) == {1: [7, 4], 5: [6]}


def test_categories_by_count_then_by_id():
    found = transitions.categories(train_of((0, 1, 8, "Bar"), (0, 1, 3, "Pub"), (0, 1, 8, "Wine Bar"), (0, 2, 8, "Bar"),
                                            (1, 2, 3, "Pub")))
    assert found.index.tolist() == [1, 2]
    assert list(found.itertuples(index=False, name=None)) == [(8, "Bar"), (3, "Pub")]


def haversine(one, other):
    """Kilometres, by the formula."""
    (a, b), (c, d) = np.radians(one), np.radians(other)
    return 2 * 6371 * math.asin(math.sqrt(math.sin((c - a) / 2) ** 2
                                          + math.cos(a) * math.cos(c) * math.sin((d - b) / 2) ** 2))


@pytest.mark.parametrize("k", [1, 4, 29, 100])
def test_neighbours_against_brute_force(k):
    """Far north, where a degree of longitude is short, and on both sides of the date line."""
    random = np.random.default_rng(k)
    points = np.column_stack([random.uniform(55, 75, 30), random.choice([-1, 1], 30) * random.uniform(170, 180, 30)])
    expected = np.zeros((30, 30))
    for i in range(30):
        nearest = sorted((other for other in range(30) if other != i), key=lambda j: haversine(points[i], points[j]))
        expected[i, nearest[:k]] = 1
    found = transitions.neighbours(pd.DataFrame(points, columns=["Latitude", "Longitude"]), k)
    np.testing.assert_array_equal(found.toarray(), np.maximum(expected, expected.T))


@pytest.mark.parametrize("count, k", [(1, 3), (2, 0), (6, 2), (30, 3)])
def test_places_at_one_point_are_neighbours_but_not_their_own(count, k):
    found = transitions.neighbours(pd.DataFrame({"Latitude": [40.5] * count, "Longitude": [-74.] * count}), k).toarray()
    assert (found.diagonal() == 0).all() and ((found == 0) | (found == 1)).all() and (found == found.T).all()
    assert (found.sum(axis=1) >= min(k, count - 1)).all()


def test_the_graph_by_hand():
    """Places 1 to 4 on a line; 2 lies next to 1, and 4 next to 3; 1, 3 and 4 are of one category."""
    places = pd.DataFrame({"Latitude": [0., 1, 10, 11.5], "Longitude": 0.}, index=[1, 2, 3, 4])
    steps = pd.DataFrame([(1, 2, 7), (4, 4, 2)], columns=["PoiId", "NextId", "Count"])
    categories = pd.Series({1: 6, 3: 6, 4: 6, 2: 5})
    w = transitions.NEIGHBOUR_WEIGHT

    def weights(geo, category):
        found = transitions.graph(steps, places, categories, geo, category).tocoo()
        return {(int(i), int(j)): value for i, j, value in zip(found.row, found.col, found.data)}

    near, alike = [(1, 2), (2, 1), (3, 4), (4, 3)], [(1, 3), (3, 1), (3, 4), (4, 3)]
    assert weights(0, 0) == {(1, 2): 7, (4, 4): 2}
    assert weights(1, 0) == pytest.approx({(1, 2): 7 + w, (4, 4): 2, **dict.fromkeys(near[1:], w)})
    assert weights(0, 1) == pytest.approx({(1, 2): 7, (4, 4): 2, **dict.fromkeys(alike, w)})
    assert weights(1, 1) == pytest.approx({(1, 2): 7 + w, (4, 4): 2, (2, 1): w, (1, 3): w, (3, 1): w,
                                           (3, 4): 2 * w, (4, 3): 2 * w})


def test_questions_by_hand():
    """Of POI 3 nobody comes further; POI 4 has five successors that are told, of six."""
    rows = [(0, 4, 2, "Bar"), (0, 3, 5, "Bus Stop"), *((t, poi, 2, "Bar") for t, last in enumerate((9, 8, 7, 6, 5), 1)
                                                     for poi in (4, last)), (9, 4, 2, "Bar"), (9, 7, 2, "Bar")]
    found = [(pair["question"], pair["answer"]) for pair in transitions.records(train_of(*rows))]
    assert found[:5] == [
        ("<question>: Which POI is <POI 3>?", "<answer>: POI id 3."),
        ("<question>: Of which category is <POI 3>?", "<answer>: Bus Stop, category id 5."),
        ("<question>: Which POI is <POI 4>?", "<answer>: POI id 4."),
        ("<question>: Of which category is <POI 4>?", "<answer>: Bar, category id 2."),
        ("<question>: Where do people go most often after <POI 4>?",
         "<answer>: POI id 7, POI id 3, POI id 5, POI id 6, POI id 8.")]
    assert [question for question, _ in found[5:]] == [
        f"<question>: {ask}" for poi in (5, 6, 7, 8, 9) for ask in (prompts.ask_id(poi), prompts.ask_category(poi))]


def test_the_question_file(small_city, script):
    script("run.py", "-f", str(small_city))
    script("process_pam_stage1.py", "-dataset_name", "city")
    path = FOLDER / artifacts.alignment_questions("city")
    found = json.loads(path.read_text())
    assert found == list(transitions.records(samples.load(config.load(small_city), "train")))
    # Everyone goes w, x, y, z (ids 1 to 4) and pauses: so 4 has no successor.
    assert len(found) == 4 * 2 + 3
    assert [pair["answer"] for pair in found if "after" in pair["question"]] == [
        f"<answer>: POI id {poi}." for poi in (2, 3, 4)]
    assert [pair["answer"] for pair in found if "category" in pair["question"]] == [
        f"<answer>: {name}, category id {number}." for name, number in (("shop", 2), ("food", 1)) * 2]
    assert json.loads(artifacts.question_settings(path).read_text()) == {"dataset": "city", "stage": "pam"}


@pytest.mark.parametrize("fields, shown, last", [
    ([], "time user poi poi_token category", ("Which POI is <POI {0}>?", "<answer>: POI id {0}.")),
    (["-fields", "poi,gps"], "poi poi_token gps", (
        "Which POI is <POI {0}>? What are the coordinates of <GPS {0}>?",
        "<answer>: POI id {0}. Latitude {1:.6f}, longitude {2:.6f}."))], ids=["PAM", "GCIM and PAM"])
def test_questions_behind_the_history(small_city, script, fields, shown, last):
    """As the released code asks: one pair for each trajectory, the check-ins those of stage 2's questions."""
    script("run.py", "-f", str(small_city))
    script("process_pam_stage1.py", "-dataset_name", "city", "-history", "True", *fields)
    path = FOLDER / artifacts.alignment_questions("city")
    found, conf = json.loads(path.read_text()), config.load(small_city)
    train, places = samples.load(conf, "train"), samples.load_places(conf)
    pairs = list(questions.pairs(conf, train, train))
    assert len(found) == len(pairs) == train["TrajectoryId"].nunique()
    texts = questions.texts(train, shown.split())
    for record, pair in zip(found, pairs):
        assert all(texts[row] in record["question"] for row in (*pair.history, *pair.current))
        assert record["question"].count("<POI ") == len(pair.history) + len(pair.current) + 1
        poi = train["PoiId"].iloc[pair.target]
        about = (poi, places.loc[poi, "Latitude"], places.loc[poi, "Longitude"])
        assert record["question"].endswith(" " + last[0].format(*about)) and record["answer"] == last[1].format(*about)
    assert json.loads(artifacts.question_settings(path).read_text()) == {
        "dataset": "city", "stage": "pam", "fields": shown.split()}


def test_elsewhere(small_city, script):
    """-datasets: read there and written there."""
    script("run.py", "-f", str(small_city), "-datasets", "other")
    for name in ("process_pam_stage1.py", "poi_embeddings.py"):
        script(name, "-dataset_name", "city", "-datasets", "other")
    made = {path.name for path in Path("other/city/preprocessed").iterdir()}
    assert made >= {"city_poi_embeddings.npy", "city_poi_embeddings.json", "train_qa_pairs_city_pam.json"}
    assert not Path("datasets").exists()


def test_neighbours_across_180_degrees_and_over_the_pole():
    places = pd.DataFrame({"Latitude": [0, 0, 0, 0, 89.9, 89.9, 89.9],
                           "Longitude": [179.9, -179.8, 179, -170, 0, 179, 140]})
    near = transitions.neighbours(places, 1).toarray()
    expected = np.zeros((7, 7))
    for one, other in ((0, 1), (2, 0), (3, 1), (5, 6), (4, 6)):     # 4 to 6: over the pole it is 140° east, not 179
        expected[one, other] = expected[other, one] = 1
    assert near.tolist() == expected.tolist()
