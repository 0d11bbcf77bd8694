"""The report's numbers against hand counts, on a made-up evaluation and on data whose correlation is known."""
import io
import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from report_folder import NEAR, PROBABILITIES, RANKS, write
from scipy import stats

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import metrics
from ga_llm.report import contents, encoder_views, figures, markup
from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.gps_tokens import GPSMapping


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """(root, evaluation, data folder, mapping, baseline)"""
    root = tmp_path_factory.mktemp("town")
    evaluation = contents.read_evaluation(write(root))
    folder = contents.data_folder(evaluation)
    mapping = contents.read_mapping(evaluation, folder, None, False)
    return root, evaluation, folder, mapping, contents.read_baseline(evaluation, folder, mapping, False)


def test_the_evaluation_is_read(town):
    _, evaluation, *_ = town
    assert evaluation.ranks.tolist() == [np.inf if rank is None else rank for rank in RANKS]
    np.testing.assert_allclose(evaluation.probability, PROBABILITIES, atol=1e-4)
    assert evaluation.km[0] == 0 and (evaluation.km[list(NEAR)] < 1).all() and evaluation.km[3] > 20


def test_the_baseline_by_hand(town):
    """Each user's history is 1, 2, 1, 3, two of the user's own, then 5 and 6 of the trajectory: the guess is 1."""
    *_, mapping, baseline = town
    histories = [[1, 2, 1, 3, 4 + user, 7 + user, 5, 6] for user in range(3)]
    for pair, (top, share) in enumerate(zip(baseline.tops, baseline.share)):
        counts = [histories[pair % 3].count(poi) for poi in range(13)]
        assert counts[top] == max(counts) and share == max(counts) / 8
    assert baseline.tops.tolist() == [1, 1, 1] * 4      # user 1 has been at 5 twice, and at 1 before
    assert baseline.ranks[0] == 1 and baseline.ranks[9] == np.inf
    np.testing.assert_array_equal(baseline.km, metrics.distances([1] * 12, [1 + i for i in range(12)], mapping))


def test_ece_by_hand():
    """0.8 to 0.9: two of three right at 0.85 on average; 0.3 to 0.4: none of one; 1 is in the last bin, with 0.9."""
    stated = np.array([0.80, 0.85, 0.899, 0.30, 1.0, 0.9, np.nan])
    found = contents.reliability(stated, [True, True, False, False, True, False, True])
    assert found.n.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 3, 2]
    np.testing.assert_allclose(found.right[[3, 8, 9]], [0, 2 / 3, 1 / 2])
    np.testing.assert_allclose(found.probability[[3, 8, 9]], [0.3, 2.549 / 3, 0.95])
    assert np.isnan(found.right[0])
    assert found.ece == pytest.approx((1 * 0.3 + 3 * (2.549 / 3 - 2 / 3) + 2 * (0.95 - 0.5)) / 6)


def test_ece_where_the_probabilities_say_what_happens():
    right = np.tile(np.arange(10) < 3, 5)
    assert contents.reliability(np.full(50, 0.3), right).ece == pytest.approx(0)
    with pytest.raises(contents.Absent, match="no log-probabilities"):
        contents.reliability(np.full(3, np.nan), right[:3])


@pytest.mark.parametrize("right, n", [(0, 5), (3, 10), (10, 10), (40, 100)])
def test_wilson_is_scipys(right, n):
    low, high = stats.binomtest(right, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(contents.wilson(np.array(right / n), np.array(n)), (low, high), rtol=1e-5, atol=1e-12)


def test_the_difference_is_paired(town):
    _, evaluation, *_, baseline = town
    ours, theirs = evaluation.ranks == 1, baseline.ranks == 1
    one = metrics.difference(np.stack([theirs, ours]).astype(float), 1)
    assert one["difference"] == pytest.approx(ours.mean() - theirs.mean())
    assert one["low"] <= one["difference"] <= one["high"]
    same = metrics.difference(np.stack([ours, ours]).astype(float), 1)
    assert {key: same[key] for key in ("difference", "low", "high")} == {"difference": 0, "low": 0, "high": 0}


def grid(n, step=0.01):
    """n × n places on the equator, where degrees of latitude and longitude are alike, row by row."""
    up, across = (axis.ravel() * step for axis in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    return GPSMapping(np.arange(n * n), up, across)


def test_correlation_of_vectors_that_are_the_map():
    """All pairs, as there are few. On a grid many distances are equal but for the rounding, which moves their ranks."""
    mapping = grid(6)
    table = np.stack([mapping.latitude, mapping.longitude], axis=1) * 7
    found = encoder_views.embeddings(table, mapping)
    assert len(found.km) == 36 * 35 // 2 and found.pearson > 0.9999 and found.spearman > 0.99
    assert found.explained == pytest.approx(1) and found.colours.shape == (36, 3)
    assert (found.colours[:, 2] == 0.5).all()       # two dimensions have no third component
    np.testing.assert_allclose(found.distance[:5], 0.07 * np.arange(1, 6), rtol=1e-6)


def test_correlation_by_hand_and_by_scipy():
    km, distance = np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3])
    assert encoder_views.correlation(km, distance) == pytest.approx(0.6) == stats.pearsonr(km, distance)[0]
    assert np.isnan(encoder_views.correlation(km, np.ones(4)))
    random = np.random.default_rng(0)
    mapping = grid(8)
    found = encoder_views.embeddings(random.normal(size=(64, 5)), mapping)
    assert abs(found.pearson) < 0.1
    assert found.spearman == pytest.approx(stats.spearmanr(found.km, found.distance)[0])


def test_an_encoder_that_tells_no_places_apart():
    found = encoder_views.embeddings(np.ones((36, 4), dtype=np.float32), grid(6))
    assert np.isnan(found.pearson) and np.isnan(found.spearman) and np.isfinite(found.colours).all()
    assert figures.distances(found.km, found.distance).startswith(b"\x89PNG")
    assert markup.number(found.pearson) == markup.percent(found.explained) == "–"


def test_pairs_of_many_places_are_drawn_and_are_pairs():
    one, other = encoder_views.place_pairs(1000)
    assert len(one) == encoder_views.PAIRS and (one != other).all() and other.max() < 1000
    np.testing.assert_array_equal(one, encoder_views.place_pairs(1000)[0])
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_colours_are_the_principal_components():
    """Of three clusters along one line: the first component orders them, whatever its sign."""
    table = np.repeat([[0.0, 0, 0, 0], [1, 1, 0, 0], [5, 5, 0, 0]], 12, axis=0)
    table += np.random.default_rng(0).normal(scale=0.01, size=table.shape)
    first = encoder_views.embeddings(table, grid(6)).colours[:, 0].reshape(3, 12).mean(1)
    assert abs(first[2] - first[0]) > 0.9 and abs(first[1] - first[0]) == pytest.approx(0.2, abs=0.05)


def test_the_untrained_encoder_is_another_and_always_the_same(town):
    _, evaluation, _, mapping, _ = town
    views = encoder_views.read_encoder(evaluation, mapping)
    with torch.random.fork_rng():
        torch.manual_seed(contents.SEED)
        untrained = build_encoder(GeoEncoderConfig(8, ngram=4))
    expected = encoder_views.embeddings(encoder_views.vectors(untrained, views.config, mapping), mapping)
    assert views.before.pearson == expected.pearson != views.after.pearson
    assert views.places == 12 and views.config == GeoEncoderConfig(8, ngram=4)


def test_no_more_places_than_a_cpu_takes(monkeypatch):
    monkeypatch.setattr(encoder_views, "MOST_PLACES", 10)
    shown = encoder_views.some_places(grid(5))
    assert len(shown.ids) == 10 == len(set(shown.ids.tolist()))
    np.testing.assert_array_equal(shown.latitude, grid(5).latitude[shown.ids])


def test_the_choice_of_examples(town):
    """Two of each kind, at one and two thirds: of the right ones 0, 2, 5, 7, 9, 11, of the near ones 1, 6, 8."""
    _, evaluation, *_ = town
    assert contents.choose(evaluation) == [("right", 5), ("right", 9), ("near miss", 6), ("near miss", 8),
                                         ("far miss", 4), ("far miss", 10)]


def test_an_example(town):
    _, evaluation, folder, mapping, baseline = town
    found = contents.examples(evaluation, baseline, mapping, folder)
    near = found[2]
    assert (near["kind"], near["pair"], near["user"], near["time"], near["rank"]) == (
        "near miss", 6, 0, "2012-05-07 15:00:00", 3)
    assert [(row["time"], row["poi"]) for row in near["check_ins"]] == [("2012-05-07 10:00:00", 5),
                                                                         ("2012-05-07 12:00:00", 6)]
    assert near["target"]["poi"] == 7 and near["target"]["category"] == "Café 7" and near["hidden"] == 0
    first, *others = near["top"]
    assert first["poi"] == 8 and first["probability"] == pytest.approx(0.35, abs=1e-4) and 0.3 < first["km"] < 0.5
    assert len(others) == 4 and others[1]["poi"] == 7 and near["history"]["poi"] == 1
    assert near["history"]["km"] == pytest.approx(63.88, abs=0.1)       # 0.75° · cos(40°) · 111.19 km


def test_without_the_test_sample_the_prompt_tells_the_trajectory(town, monkeypatch):
    _, evaluation, folder, mapping, baseline = town
    monkeypatch.setattr(contents, "read_trajectories", lambda path: {})
    one = contents.examples(evaluation, baseline, mapping, folder)[0]
    assert [(row["time"], row["poi"]) for row in one["check_ins"]] == [(None, 5), (None, 6)]


def test_trajectories_show_nothing_of_the_targets_second(tmp_path):
    path = tmp_path / "test_sample.csv"
    path.write_text("UserId,PoiId,TrajectoryId,LocalTime\n1,4,9,2012-01-01 10:00:00\n1,5,9,2012-01-01 11:00:00\n"
                    "1,6,9,2012-01-01 11:00:00\n")
    assert contents.read_trajectories(path) == {(1, "2012-01-01 11:00:00", 6): [("2012-01-01 10:00:00", 4)]}
    assert contents.read_trajectories(tmp_path / "none.csv") == {}


def test_losses_of_both_stages(town):
    root, evaluation, *_ = town
    found = contents.read_losses(evaluation)
    assert list(found) == ["stage 1: the geo-encoder (GCIM)", "stage 2: the LLM"]
    assert [line["loss"] for line in found["stage 2: the LLM"]][:2] == [3, 1.5]
    # An encoder that stage 2 trained further lies in its folder: its log is shown once, and stage 1's from run.json.
    own = root / "stage2/4/geo_encoder_merged.pth"
    evaluation.settings["geoencoder_path"], before = str(own), evaluation.settings["geoencoder_path"]
    try:
        assert list(contents.read_losses(evaluation)) == ["stage 2: the LLM"]
        start = {"files": {"geoencoder_path": {"path": before}}}
        (root / "stage2/run.json").write_text(json.dumps({"starts": [start]}))
        assert len(contents.read_losses(evaluation)) == 2
    finally:
        evaluation.settings["geoencoder_path"] = before
        (root / "stage2/run.json").unlink(missing_ok=True)


def test_validation_lines_go_with_the_losses(town):
    root, evaluation, *_ = town
    log = root / "stage2" / artifacts.TRAINER_LOG
    before, whole = contents.read_losses(evaluation)["stage 2: the LLM"], log.read_text()
    try:
        log.write_text(whole + "".join(json.dumps({"step": 20, name: 1.5, "elapsed_seconds": 1200.0}) + "\n"
                                       for name in ("eval_loss", "eval_MRR")))
        lines = contents.read_losses(evaluation)["stage 2: the LLM"]
        assert lines[:-1] == before and lines[-1]["eval_loss"] == 1.5
        assert imread(io.BytesIO(figures.losses(lines))).shape == imread(io.BytesIO(figures.losses(before))).shape
    finally:
        log.write_text(whole)


def test_the_log_of_an_experiments_step(tmp_path):
    """The test's own folder holds links to the checkpoint; step.json names the training's."""
    tested = tmp_path / "steps/test-1/out/checkpoint"
    tested.mkdir(parents=True)
    assert contents.training_folder(tested) is None
    trained = tmp_path / "steps/stage2-abc/out"
    trained.mkdir(parents=True)
    (trained / "trainer_log.jsonl").touch()
    (tmp_path / "steps/test-1/step.json").write_text(json.dumps({"steps": ["gcim-1", "stage2-abc"]}))
    assert contents.training_folder(tested) == trained
    assert contents.training_folder(trained / "checkpoint-4") == trained


@pytest.mark.parametrize("change, why", [
    (lambda record: record | {"top": [["8", -1.0]]}, "top holds something else"),
    (lambda record: record | {"top": [[8, "x"]]}, "top holds something else"),
    (lambda record: record | {"rank": 1}, "is not what metrics.json")],
    ids=["an id", "a log-probability", "other ranks"])
def test_predictions_that_are_none(town, tmp_path, change, why):
    _, evaluation, *_ = town
    (tmp_path / "metrics.json").write_text((evaluation.folder / "metrics.json").read_text())
    lines = [json.loads(line) for line in (evaluation.folder / "predictions.jsonl").open()]
    lines[1] = change(lines[1])
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=why):
        contents.read_evaluation(tmp_path)


def test_no_result_without_the_baseline(town, tmp_path):
    _, evaluation, *_ = town
    found = json.loads((evaluation.folder / "metrics.json").read_text())
    del found["all"][contents.HISTORY]
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="has no user-history frequency"):
        contents.read_evaluation(tmp_path)


@pytest.mark.parametrize("text, shown", [
    ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"), ("a\u202eb\x07", "a\ufffdb\ufffd"),
    ("\"'&", "&quot;&#x27;&amp;"), ("one\ntwo", "one two"), (7, "7")])
def test_text_is_nothing_else(text, shown):
    assert markup.safe(text) == shown


def test_names_in_pictures_are_no_formulas():
    """A group's name out of metrics.json: `$` begins a formula in matplotlib, and a broken one an error."""
    cells = {"model": [None, (0.5, 0.4, 0.6)]}
    png = figures.intervals([r"$\frac{", r"$x^$"], cells, "Acc@1", headings=[0])
    assert png == figures.intervals([r"$\frac{", r"$x^$"], cells, "Acc@1", headings=[0])
    assert imread(io.BytesIO(png)).shape[1] == int(figures.WIDTH * figures.DPI)


def test_the_scale_of_distance_is_readable_in_greyscale():
    """Light to dark, step by step."""
    luminance = figures.FAR(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all() and luminance[0] - luminance[-1] > 0.6


def moved(mapping: GPSMapping, east: float) -> GPSMapping:
    return GPSMapping(mapping.ids, mapping.latitude, (mapping.longitude + east + 180) % 360 - 180)


@pytest.mark.parametrize("latitude", [-16.8, 89.99])
def test_a_map_does_not_depend_on_where_180_degrees_lie(latitude):
    """The same town elsewhere is the same picture, but for the rounding of an edge; at a pole it is turned."""
    random = np.random.default_rng(0)
    here = GPSMapping(np.arange(40), latitude + random.uniform(-.009, .009, 40), random.uniform(-.02, .02, 40))
    there = moved(here, 180)
    assert there.longitude.max() - there.longitude.min() > 359

    def pictures(mapping):
        points = np.column_stack([mapping.longitude, mapping.latitude])
        true, guessed = points[:20], points[20:]
        yield figures.colour_map(mapping, np.linspace(0, 1, 120).reshape(40, 3))
        yield figures.error_map(mapping, true, guessed, np.arange(1.0, 21), np.arange(20) < 5, 20.0)
        yield figures.example(mapping, points[:6], points[6], points[7:12], points[12])
        yield figures.example(mapping, points[:0], points[6], np.full((1, 2), np.nan), None)

    for one, other in zip(pictures(here), pictures(there)):
        one, other = (imread(io.BytesIO(png)) for png in (one, other))
        assert (one[..., :3] < .5).any()
        if latitude < 85:
            assert one.shape == other.shape and (np.abs(one - other) > .1).mean() < .002
