"""The explorer's data against the predictions and hand counts, its size; its page loads nothing. No browser here."""
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from commands import ROOT
from harness import call, refusal
from report_folder import NEAR, PROBABILITIES, RANKS, rewritten, write

from ga_llm.base.cli import UserError
from ga_llm.evaluation import baselines, metrics
from ga_llm.report import contents, explorer, figures
from geo_encoder.gps_tokens import GPSMapping

sys.path.append(str(ROOT / "benchmarks"))

import explorer as benchmark  # noqa: E402

HOSTILE = '</script><script src="https://evil.example/{}.js">x()</script><!--\u202e&amp;'


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """(evaluation, data folder, mapping, baseline, the data)"""
    evaluation = contents.read_evaluation(write(tmp_path_factory.mktemp("town")))
    folder = contents.data_folder(evaluation)
    mapping = contents.read_mapping(evaluation, folder, None, False)
    baseline = contents.read_baseline(evaluation, folder, mapping, False)
    return evaluation, folder, mapping, baseline, explorer.gather([evaluation], mapping, baseline, folder)


def test_the_data_are_the_predictions(town):
    evaluation, *_, data = town
    run, = data["runs"]
    ids, pairs = data["places"]["id"], data["pairs"]
    for row, record in enumerate(evaluation.records):
        assert pairs["pair"][row] == record["pair"] and run["rank"][row] == (record["rank"] or 0)
        assert data["users"][pairs["user"][row]]["id"] == record["user"]
        assert ids[pairs["target"][row]] == record["target"]
        assert str(pd.Timestamp(pairs["second"][row], unit="s")) == record["time"]
        assert [ids[place] for place in run["top"][row]] == [poi for poi, _ in record["top"]]
        np.testing.assert_allclose(run["share"][row], 1e4 * np.exp([value for _, value in record["top"]]), atol=0.51)
        assert run["km"][row] == pytest.approx(1000 * record["km"], abs=1)
        outcome = "right" if RANKS[row] == 1 else "near miss" if row in NEAR else "far miss"
        assert data["outcomes"][run["outcome"][row]] == outcome
    assert [share[0] for share in run["share"]] == pytest.approx([1e4 * chance for chance in PROBABILITIES], abs=1)
    assert data["order"] == list(range(len(RANKS))) and data["dataset"] == "town"


def test_places_by_hand(town):
    """Place 4 is at 40 degrees north, -73.75: the second of the second pair of places. `Café 4` is its name."""
    *_, data = town
    places = data["places"]
    row = places["id"].index(4)
    assert (places["y"][row], places["x"][row]) == (4_000_000, -7_375_000)
    assert places["categories"][places["category"][row]] == "Café 4"


def test_history_trajectory_and_baselines_by_hand(town):
    """As report_folder writes them: user 1 goes 1, 2, 1, 3, 5, 8; each trajectory is at 5 and 6, then at the target."""
    evaluation, _, _, baseline, data = town
    ids = data["places"]["id"]
    user = data["users"][1]
    assert user["id"] == 1
    assert {ids[place]: n for place, n in zip(user["places"], user["visits"])} == {1: 2, 2: 1, 3: 1, 5: 1, 8: 1}
    assert user["visits"] == sorted(user["visits"], reverse=True)
    for row, second in enumerate(data["pairs"]["second"]):
        assert [ids[place] for place in data["current"]["place"][row]] == [5, 6]
        assert data["current"]["second"][row] == [second - 5 * 3600, second - 3 * 3600]
    history = next(one for one in data["baselines"] if one["name"] == contents.HISTORY)
    assert [ids[place] for place in history["top"]] == baseline.tops.tolist()
    assert history["rank"] == [0 if np.isinf(rank) else rank for rank in baseline.ranks]
    assert [one["name"] for one in data["baselines"]] == [name for name in evaluation.metrics["all"] if name != "model"]
    assert {one["name"]: one["sign"] for one in data["baselines"]} == {
        contents.HISTORY: "□", baselines.POPULARITY: "◇", baselines.MARKOV_CHAIN: "△"}


def test_each_method_has_a_sign_of_its_own():
    """The page's beside a name are those of the pictures; a method that is not known has a cross."""
    signs = [figures.sign(name) for name in figures.STYLES if name != figures.MODEL]
    assert len(set(signs)) == len(signs) == 4 and figures.sign("another") == "×"


def test_groups_are_those_of_the_metrics(town):
    evaluation, *_, data = town
    counts = {one["name"]: {group: one["of"].count(i) for i, group in enumerate(one["groups"])}
              for one in data["groups"]}
    assert counts == {name: {group: methods["model"]["n"] for group, methods in groups.items()}
                      for name, groups in evaluation.metrics["groups"].items()}


def test_times_of_the_validation_split(town):
    """Its trajectories are in validate_sample.csv."""
    evaluation, folder, mapping, baseline, data = town
    evaluation.metrics["split"] = "validate"
    try:
        without = explorer.gather([evaluation], mapping, baseline, folder)
        assert without["current"]["second"] == [[None, None]] * len(RANKS)      # what the prompts show stays
        assert without["current"]["place"] == data["current"]["place"]
        shutil.copy(folder / "test_sample.csv", folder / "validate_sample.csv")
        assert explorer.gather([evaluation], mapping, baseline, folder) == data
    finally:
        del evaluation.metrics["split"]
        (folder / "validate_sample.csv").unlink(missing_ok=True)


def another(evaluation, ranks):
    """The same evaluation with other ranks: where one is 1, the target comes first; else place 12."""
    records = [record | {"rank": rank, "top": [[record["target"] if rank == 1 else 12, -0.5]]}
               for record, rank in zip(evaluation.records, ranks)]
    tops = np.array([record["top"][0][0] for record in records])
    return contents.Evaluation(evaluation.folder / "b", {}, evaluation.settings, records,
                               np.array([rank or np.inf for rank in ranks]), tops, evaluation.km,
                               evaluation.probability)


def test_pairs_in_which_two_runs_differ_come_first(town):
    """By the difference of 1/rank. Pairs 1 and 3 have other first guesses and the same rank; the rest are alike."""
    evaluation, *_ = town
    ranks = list(RANKS)
    ranks[2], ranks[5], ranks[4] = 4, None, 1       # of 1, 1, None: differences 3/4, 1, 1
    other = another(evaluation, ranks)
    order = explorer.order([evaluation, other])
    assert order[:3] == [4, 5, 2]
    same = [row for row in range(len(RANKS)) if evaluation.tops[row] == other.tops[row]]
    assert order[3:] == [row for row in range(len(RANKS)) if row not in (2, 4, 5, *same)] + [
        row for row in same if row not in (2, 4, 5)]
    assert len(order) - len(same) > 3


def test_two_runs_are_aligned_by_their_pairs(town):
    evaluation, folder, mapping, baseline, _ = town
    other = another(evaluation, RANKS)
    turned = contents.Evaluation(other.folder, {}, other.settings, other.records[::-1], other.ranks[::-1],
                                 other.tops[::-1], other.km[::-1], other.probability[::-1])
    aligned = explorer.align(turned, evaluation)
    assert aligned.records == other.records and aligned.ranks.tolist() == other.ranks.tolist()
    data = explorer.gather([evaluation, aligned], mapping, baseline, folder)
    assert data["runs"][0]["rank"] == data["runs"][1]["rank"] and data["runs"][1]["name"].endswith("/b")


@pytest.mark.slow
def test_a_large_test_stays_small(tmp_path):
    """10,000 pairs of two runs, 20 guesses each, at 5,000 places: under 15 MB, on two maps."""
    runs, mapping, baseline = benchmark.city(10_000, 5_000, 1_000)
    page = explorer.page(explorer.gather(runs, mapping, baseline, tmp_path))
    assert len(page.encode()) < benchmark.LIMIT_MB * 1e6
    data = data_of(page)
    assert len(data["order"]) == 10_000 and [len(top) for top in data["runs"][1]["top"]] == [20] * 10_000


# The page.

class Tags(HTMLParser):
    """(tag, its attributes) of a page; what stands in scripts and styles is none."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def check_self_contained(page):
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 3
    assert not {tag for tag, _ in tags} & {"link", "iframe", "img", "object", "embed", "base"}
    assert not [name for _, attributes in tags for name in attributes if name in ("src", "href", "srcset", "action")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    policy = next(attributes["content"] for tag, attributes in tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "script-src 'unsafe" not in policy
    style = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert "url(" not in style and "@import" not in style
    assert "BSD 2-Clause License" in page and "Volodymyr Agafonkin" in page


def test_the_page_loads_nothing_and_takes_no_name_for_a_tag(tmp_path):
    evaluation = contents.read_evaluation(write(tmp_path, category=HOSTILE))
    folder = contents.data_folder(evaluation)
    mapping = contents.read_mapping(evaluation, folder, None, False)
    page = explorer.page(explorer.gather([evaluation], mapping, None, folder, absent=["<b>"]))
    check_self_contained(page)
    assert "evil.example/7.js" in page and "\u202e" not in page and "<script src" not in page
    assert any("</script>" in name for name in data_of(page)["places"]["categories"])


def test_the_scripts_ask_nobody():
    for name in ("explorer.js", "leaflet/leaflet.js"):
        text = (explorer.WEB / name).read_text(encoding="utf-8")
        assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|importScripts|sendBeacon)\b|\beval\(", text)
        assert "</script" not in text and "<!--" not in text
    for name in ("explorer.html", "explorer.css", "explorer.js"):
        text = (explorer.WEB / name).read_text(encoding="utf-8")
        assert "://" not in text and "innerHTML" not in text


# report.py writes it.

def test_beside_the_report(tmp_path, no_pictures):
    checkpoint = write(tmp_path)
    result = call(tmp_path, "report.py", "--output_dir", checkpoint)
    assert result.code == 0, result.err
    page = (checkpoint / "report/explorer.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert f"wrote {checkpoint / 'report/explorer.html'}" in result.out and data_of(page)["absent"] == []
    assert call(tmp_path, "report.py", "--output_dir", checkpoint).code == 0
    assert (checkpoint / "report/explorer.html").read_text(encoding="utf-8") == page


def test_two_runs(tmp_path, no_pictures):
    checkpoint, other = write(tmp_path), rewritten(tmp_path / "stage2/checkpoint-4", tmp_path / "other", {0: 2, 3: 1})
    result = call(tmp_path, "report.py", "--output_dir", checkpoint, "--against", other)
    assert result.code == 0, result.err
    data = data_of((checkpoint / "report/explorer.html").read_text(encoding="utf-8"))
    assert [run["name"] for run in data["runs"]] == [str(checkpoint), str(other)]
    assert data["order"][:2] == [3, 0] and data["runs"][1]["rank"][3] == 1      # 8/9 and 1/2


def test_without_the_questions(tmp_path, no_pictures):
    """The predictions on the map all the same, and a line for what is left out."""
    checkpoint = write(tmp_path)
    next(tmp_path.rglob("test_qa_*")).unlink()
    assert call(tmp_path, "report.py", "--output_dir", checkpoint).code == 0
    data = data_of((checkpoint / "report/explorer.html").read_text(encoding="utf-8"))
    line, = data["absent"]
    assert "the test questions are not at" in line and "give --data_path" in line
    assert data["baselines"] == data["groups"] == [] and not any(user["places"] for user in data["users"])
    assert len(data["runs"][0]["top"]) == len(RANKS)


def test_without_a_mapping_there_is_no_explorer_and_no_older_one(tmp_path, no_pictures):
    checkpoint = write(tmp_path)
    assert call(tmp_path, "report.py", "--output_dir", checkpoint).code == 0
    next(tmp_path.rglob("town_gps_mapping.csv")).unlink()
    result = call(tmp_path, "report.py", "--output_dir", checkpoint)
    assert result.code == 0, result.err
    assert "no explorer.html: the GPS mapping is not at" in result.out and "give --gps_mapping_path" in result.out
    assert not (checkpoint / "report/explorer.html").exists() and (checkpoint / "report/report.html").exists()


def test_places_that_the_mapping_lacks(town):
    """They are named, and stand nowhere on the map."""
    evaluation, folder, mapping, baseline, _ = town
    some = GPSMapping(mapping.ids[:6], mapping.latitude[:6], mapping.longitude[:6])
    data = explorer.gather([evaluation], some, baseline, folder)
    assert data["places"]["id"] == list(range(1, 13)) and data["places"]["y"][6:] == [None] * 6
    assert data["pairs"]["target"] == [poi - 1 for poi in range(1, 13)]


def test_a_test_that_names_neither_users_nor_times(town):
    evaluation, folder, mapping, _, _ = town
    records = [record | {"user": None, "time": time, "top": [[record["top"][0][0], None]]}
               for record, time in zip(evaluation.records, [None, "2012-13-45 00:00:00"] * 6)]
    unnamed = contents.Evaluation(evaluation.folder, {}, evaluation.settings, records, evaluation.ranks,
                                  evaluation.tops, evaluation.km, evaluation.probability)
    data = explorer.gather([unnamed], mapping, None, folder)
    assert [user["id"] for user in data["users"]] == [None] and set(data["pairs"]["second"]) == {None}
    assert data["runs"][0]["share"] == [[None]] * len(RANKS)


@pytest.mark.parametrize("spoil, names", [
    (lambda other: shutil.rmtree(other), ["--against", "no such folder"]),
    (lambda other: (other / "predictions.jsonl").write_text("{}\n"), ["predictions.jsonl, line 1"]),
    (lambda other: shorten(other), ["--against", "no pair 0 of user 0"]),
    (lambda other: shorten(other.parent / "stage2/checkpoint-4"), ["--against", "12 pairs, not 11"]),
    (lambda other: (other / "predictions.jsonl").write_text(
        (other / "predictions.jsonl").read_text().replace('"pair": 3', '"pair": 99')), ["--against", "no pair 3"])],
    ids=["no folder", "no predictions", "fewer pairs", "more pairs", "other pairs"])
def test_a_wrong_other_run_is_one_line(tmp_path, no_pictures, spoil, names):
    checkpoint, other = write(tmp_path), rewritten(tmp_path / "stage2/checkpoint-4", tmp_path / "other", {})
    spoil(other)
    refusal(call(tmp_path, "report.py", "--output_dir", checkpoint, "--against", other), *names)
    assert not (checkpoint / "report").exists()


def shorten(folder):
    """A whole evaluation of one pair less."""
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)[1:]
    (folder / "predictions.jsonl").write_text("".join(lines))
    found = json.loads((folder / "metrics.json").read_text())
    found["all"]["model"]["n"] = len(lines)
    found["all"]["model"]["Acc@1"]["value"] = np.mean([json.loads(line)["rank"] == 1 for line in lines])
    (folder / "metrics.json").write_text(json.dumps(found))


# Shapes.

def geojson(*coordinates, kind="Polygon"):
    return json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "properties": {}, "geometry": {"type": kind, "coordinates": part}}
        for part in coordinates]})


SQUARE = [[-74, 40], [-73, 40], [-73, 41], [-73, 41.00001], [-74, 40]]
FAR = [[10, 50], [11, 50], [11, 51], [10, 50]]


def test_shapes_near_the_places_are_kept(tmp_path, town):
    """In whole 1e-5 degrees, north first, to 1e-4; what lies elsewhere, and points that add nothing, are left out."""
    evaluation, folder, mapping, baseline, _ = town
    path = tmp_path / "shapes.json"
    path.write_text(geojson([SQUARE], [FAR]))
    lines = explorer.read_shapes("town", path)
    assert len(lines) == 2
    data = explorer.gather([evaluation], mapping, baseline, folder, lines)
    assert data["shapes"] == [[[4000000, -7400000], [4000000, -7300000], [4100000, -7300000], [4000000, -7400000]]]


def test_shapes_across_180_degrees(tmp_path):
    """As the places, which run on: Fiji's at 180 and -179.9 lie side by side, and so does the coast at -179.95."""
    mapping = GPSMapping(np.array([1, 2]), np.array([-17.0, -17.1]), np.array([179.95, -179.9]))
    coast = [np.array([[-179.95, -17.0], [-179.9, -17.05]])]
    (first, second), = explorer._lines(coast, mapping)
    places = explorer._places([1, 2], mapping, tmp_path)
    west, east = sorted(places["x"])
    assert east - west == 15_000 and west < first[1] <= east and first[1] < second[1]


def test_shapes_of_a_configured_data_set(tmp_path, monkeypatch):
    """best_conf/ca.yml names the states that ca is cut out by; where the file is not, and for other data sets, none."""
    monkeypatch.chdir(tmp_path)
    assert explorer.read_shapes("ca", None) == []
    shutil.copytree(ROOT / "best_conf", tmp_path / "best_conf")
    assert explorer.read_shapes("ca", None) == explorer.read_shapes("nyc", None) == []
    path = tmp_path / "data-preprocess/data/ca/raw/us_state_polygon_json.json"
    path.parent.mkdir(parents=True)
    path.write_text(geojson([[SQUARE], [FAR]], kind="MultiPolygon"))
    assert [line.tolist() for line in explorer.read_shapes("ca", None)] == [SQUARE, FAR]


@pytest.mark.parametrize("text", ["{", "[]", "{}", geojson([]), geojson([[["x", 1]]]), geojson([[[1e999, 1]]]),
                                  '{"features": [{"geometry": null}]}', '{"features": 1}'])
def test_what_is_no_geojson_is_one_line(tmp_path, text):
    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(UserError, match="shapes.json"):
        explorer.read_shapes("town", path)


def test_distances_agree_with_leaflets():
    """The page measures km on Leaflet's sphere, of 6,371.0 km; the metrics' has 9 m more."""
    assert abs(metrics.EARTH_RADIUS_KM - 6371.0) / 6371 < 1e-5
    assert "R:6371e3" in (explorer.WEB / "leaflet/leaflet.js").read_text(encoding="utf-8")
