"""What holds for all inputs: quadkeys, every step from raw rows to questions, metrics, rankings, spelling.

The steps on check-ins are compared with the plain loops of `naive`, written from the method's description alone.
"""
import csv
import dataclasses
import datetime
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import naive
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from checkins import cells, config, encoding, filters, mapping, questions, readers, splits, trajectories
from ga_llm.base import prompts
from ga_llm.evaluation import baselines, metrics
from ga_llm.llm import backbone
from ga_llm.pairs import sft_data, spelling
from geo_encoder.encoder import GPSEmbedding
from geo_encoder.gps_tokens import GPSMapping
from geo_encoder.quadkey import MAX_LATITUDE, TILE_PIXELS, quadkeys

repeatable = settings(deadline=None, derandomize=True, max_examples=100, database=None,
                      phases=(Phase.explicit, Phase.generate, Phase.shrink),
                      suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
many = settings(repeatable, max_examples=200)
few = settings(repeatable, max_examples=50)

latitudes, longitudes = st.floats(-90, 90), st.floats(-180, 180)
levels = st.integers(1, 29)


# Quadkeys

def tiles(latitude, longitude, level):
    """(x, y) of one point's tile, put together again from the digits."""
    digits = quadkeys([latitude], [longitude], level)[0].astype(int)
    place_values = 2 ** np.arange(level - 1, -1, -1)
    return int((digits % 2 * place_values).sum()), int((digits // 2 * place_values).sum())


def on_map(latitude, longitude):
    """Where the point lies on the square map of width 1, from its north-west corner; as exact fractions of floats."""
    sine = np.sin(np.radians(np.clip(np.float64(latitude), -MAX_LATITUDE, MAX_LATITUDE)))
    y = 0.5 - np.log((1 + sine) / (1 - sine)) / (4 * np.pi)
    return Fraction((longitude + 180.0) / 360.0), Fraction(float(y))


@many
@given(latitudes, longitudes, levels)
@example(90, 180, 25)
@example(-90, -180, 25)
@example(MAX_LATITUDE, 0, 29)
def test_quadkeys_are_pyquadkey2s(latitude, longitude, level):
    quadkey = pytest.importorskip("pyquadkey2.quadkey")
    clipped = min(max(latitude, -MAX_LATITUDE), MAX_LATITUDE)
    expected = quadkey.from_geo((clipped, longitude), level).key
    assert "".join(map(str, quadkeys([latitude], [longitude], level)[0])) == expected


@many
@given(latitudes, longitudes, levels)
def test_the_tile_contains_the_point(latitude, longitude, level):
    """Half a pixel off: the formula rounds to whole pixels, so a tile begins half a pixel (1/512) before its edge."""
    last = 2 ** level - 1
    for tile, place in zip(tiles(latitude, longitude, level), on_map(latitude, longitude)):
        inside = place * 2 ** level + Fraction(1, 2 * TILE_PIXELS) - tile
        assert -Fraction(1, 2**20) < inside < 1 + Fraction(1, 2**20) or tile in (0, last) and -1 < inside < 2


@many
@given(latitudes, longitudes, st.integers(1, 28))
@example(0, (1 - 1.5 / 1024) * 180 - 180, 1)     # where level 1 has the next tile, and level 2 has not
def test_a_level_begins_the_next_one(latitude, longitude, level):
    """Dropping the last digit gives the key of the level above, but where its pixel is rounded over an edge.

    That is so from half a pixel before the edge to half a pixel of the finer level, and there the coarser tile is the
    next one: a 1024th of the places in each direction.
    """
    coarse, fine = tiles(latitude, longitude, level), tiles(latitude, longitude, level + 1)
    for tile, finer, place in zip(coarse, fine, on_map(latitude, longitude)):
        from_edge = 1 - place * 2 ** level % 1
        rounded_over = (Fraction(1, 4 * TILE_PIXELS) < from_edge <= Fraction(1, 2 * TILE_PIXELS)
                        and finer // 2 < 2 ** level - 1)
        near = min(abs(from_edge - Fraction(1, n * TILE_PIXELS)) for n in (2, 4)) < Fraction(1, 2**20)
        assert tile == finer // 2 + rounded_over or near and tile - finer // 2 in (0, 1)


@repeatable
@given(st.lists(st.tuples(latitudes, longitudes), min_size=1, max_size=20), levels)
def test_quadkeys_one_by_one_and_in_order(points, level):
    found = quadkeys(*np.array(points).T, level)
    assert found.shape == (len(points), level) and found.dtype == np.uint8 and found.max(initial=0) <= 3
    for row, (latitude, longitude) in zip(found, points):
        assert (quadkeys([latitude], [longitude], level)[0] == row).all()
        clipped = min(max(latitude, -MAX_LATITUDE), MAX_LATITUDE)
        assert (quadkeys([clipped], [longitude], level)[0] == row).all()
    east = [tiles(0, longitude, level)[0] for longitude in sorted(longitude for _, longitude in points)]
    south = [tiles(latitude, 0, level)[1] for latitude in sorted((latitude for latitude, _ in points), reverse=True)]
    assert east == sorted(east) and south == sorted(south)


@repeatable
@given(st.lists(st.tuples(latitudes, longitudes), min_size=1, max_size=5), st.integers(1, 26), st.integers(1, 7))
def test_ngrams_are_rows_of_the_embedding(points, level, ngram):
    assume(ngram <= level)
    digits = torch.from_numpy(quadkeys(*np.array(points).T, level))
    embedding = GPSEmbedding(1, ngram)
    assert embedding.gps_embedding.num_embeddings == 4 ** ngram
    embedding.gps_embedding = RowNumbers()
    found = embedding(digits)[..., 0]
    expected = [[int("".join(map(str, row[i:i + ngram])), 4) for i in range(level - ngram + 1)]
                for row in digits.tolist()]
    assert found.tolist() == expected and found.max() < 4 ** ngram


class RowNumbers(torch.nn.Module):
    def forward(self, rows):
        return rows.unsqueeze(-1)


# From raw rows to samples

START = datetime.datetime(2012, 4, 3)
# Few users, places and hours, so that equal times, rare places and isolated check-ins all happen.
raw_rows = st.lists(st.tuples(st.integers(1, 4), st.sampled_from("abcd"), st.integers(0, 300)), min_size=1, max_size=40)


def tables(raw):
    """The same check-ins as the code's table and as naive's rows, both in order of time."""
    rows = naive.in_time([naive.Row(i, user, poi, poi, START + datetime.timedelta(hours=hour))
                          for i, (user, poi, hour) in enumerate(raw)])
    frame = pd.DataFrame({"number": [row.number for row in rows], "UserId": [row.user for row in rows],
                          "PoiId": [row.poi for row in rows], "LocalTime": [row.time for row in rows]})
    return frame, rows


def numbers(rows):
    return [row.number for row in rows]


@repeatable
@given(raw_rows, st.integers(0, 6), st.integers(0, 6))
def test_rare_places_and_users(raw, min_poi, min_user):
    frame, rows = tables(raw)
    kept = filters.frequent(frame, min_poi, min_user)
    assert kept["number"].tolist() == numbers(naive.frequent(rows, min_poi, min_user))
    visits = frame["PoiId"].value_counts()
    assert (visits[kept["PoiId"]] > min_poi).all() and (kept["UserId"].value_counts() > min_user).all()
    # A place may become rare only by the users who go; where none does, a second time changes nothing.
    before_users = frame[frame["PoiId"].map(visits) > min_poi]
    if len(before_users) == len(kept):
        pd.testing.assert_frame_equal(filters.frequent(kept, min_poi, min_user), kept)


@repeatable
@given(raw_rows, st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(sorted))
@example([(1, "a", hour) for hour in range(10)], [0.8, 0.9])
def test_split_by_time(raw, shares):
    frame, rows = tables(raw)
    naive.split(rows, shares)
    found = splits.by_time(frame, shares)
    assert found["Split"].tolist() == [row.split for row in rows]
    assert found.drop(columns="Split").equals(frame)
    sizes, n = Counter(found["Split"]), len(frame)
    assert sizes["train"] == int(n * shares[0]) and sizes["train"] + sizes["validate"] == int(n * shares[1])
    assert sum(sizes.values()) == n and found["LocalTime"].is_monotonic_increasing


@repeatable
@given(raw_rows, st.sampled_from([0.5, 1, 1.5, 12, 24]))
def test_isolated_check_ins(raw, hours):
    frame, rows = tables(raw)
    kept = filters.drop_isolated(frame, hours)
    assert kept["number"].tolist() == numbers(naive.without_isolated(rows, hours))
    if not kept["UserId"].isin(kept["UserId"].value_counts().loc[lambda n: n == 1].index).any():
        # Whoever has a near neighbour keeps it, so a second time drops nothing.
        assert len(filters.drop_isolated(kept, hours)) == len(kept)


@repeatable
@given(raw_rows, st.sampled_from([30, 60, 90, 1440]))
def test_trajectories(raw, minutes):
    frame, rows = tables(raw)
    naive.number_trajectories(rows, minutes)
    frame["TrajectoryId"] = trajectories.by_gap(frame, minutes)
    assert frame["TrajectoryId"].tolist() == [row.trajectory for row in rows]
    kept = trajectories.drop_single(frame)
    sizes = Counter(row.trajectory for row in rows)
    assert kept["number"].tolist() == [row.number for row in rows if sizes[row.trajectory] > 1]
    renumbered = {old: new for new, old in enumerate(sorted(old for old, size in sizes.items() if size > 1))}
    assert kept["TrajectoryId"].tolist() == [renumbered[row.trajectory] for row in rows if sizes[row.trajectory] > 1]
    pd.testing.assert_frame_equal(trajectories.drop_single(kept), kept)


@repeatable
@given(st.one_of(st.lists(st.integers(-9, 9), min_size=1), st.lists(st.text(max_size=3), min_size=1)),
       st.integers(0, 1), st.data())
def test_encoding(values, first_id, data):
    fitted = encoding.Encoding.fit(pd.Series(values), first_id)
    others = data.draw(st.lists(st.sampled_from(values) | (st.integers() if isinstance(values[0], int) else st.text())))
    ids = fitted.encode(pd.Series(others, dtype=pd.Series(values).dtype))
    known = sorted(set(values))
    assert fitted.to_json() == {"first_id": first_id, "unseen": 0 if first_id else len(known), "values": known}
    assert fitted.encode(pd.Series(known)).tolist() == list(range(first_id, fitted.last_id + 1))
    for value, found in zip(others, ids.tolist()):
        assert known[found - first_id] == value if value in known else found == fitted.unseen
    assert not first_id <= fitted.unseen <= fitted.last_id


near = st.floats(-1, 1)


@repeatable
@given(st.dictionaries(st.integers(0, 5), st.tuples(st.floats(-83, 83), longitudes, st.lists(
    st.tuples(near, near), min_size=1, max_size=8)), min_size=1))
@example({3: (0, 180, [(0, -0.5), (0, 0.25)])})
def test_mapping_is_the_mean(places):
    """Of check-ins around a place, on whichever side of ±180°."""
    rows = [(poi, latitude + up, (longitude + across + 180) % 360 - 180)
            for poi, (latitude, longitude, offsets) in places.items() for up, across in offsets]
    found = mapping.places(pd.DataFrame(rows, columns=["PoiId", "Latitude", "Longitude"]))
    assert found["GPS_id"].tolist() == sorted(places) and found["Longitude"].between(-180, 180).all()
    for row in found.itertuples():
        latitude, longitude, offsets = places[row.GPS_id]
        up, across = (math.fsum(offset[i] for offset in offsets) / len(offsets) for i in (0, 1))
        assert row.Latitude == pytest.approx(latitude + up, abs=1e-9)
        assert (row.Longitude - longitude - across + 180) % 360 - 180 == pytest.approx(0, abs=1e-9)


@repeatable
@given(st.lists(st.tuples(latitudes, longitudes), min_size=1, max_size=30))
def test_mapping_of_anything_is_on_the_globe(rows):
    found = mapping.places(pd.DataFrame(rows, columns=["Latitude", "Longitude"]).assign(PoiId=1))
    assert found["Latitude"].between(-90, 90).all() and found["Longitude"].between(-180, 180).all()


# Questions

LIMITS = {"max_history": 6, "max_current": 4, "max_current_with_history": 2, "max_similar": 5,
          "max_history_with_similar": 3}
sample_rows = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=30)


def sample(drawn, shift=0):
    """(user, which trajectory, hour) as samples.load gives it, and as naive's rows. Each trajectory has one user."""
    rows = naive.in_time([naive.Row(i, user, 0, 0, START + datetime.timedelta(hours=hour + shift),
                                    trajectory=10 * user + which) for i, (user, which, hour) in enumerate(drawn)])
    return pd.DataFrame({"UserId": [row.user for row in rows], "TrajectoryId": [row.trajectory for row in rows],
                         "Time": pd.Series([row.time for row in rows], dtype="datetime64[s]")}), rows


@pytest.fixture(scope="module")
def limits():
    return dataclasses.replace(config.load(Path(__file__).parents[2] / "best_conf/sample.yml"), **LIMITS)


def same_pairs(limits, train, rows, listed):
    frame = train[0] if rows is train else rows[0]
    found = [(pair.trajectory, pair.similar.tolist(), pair.history.tolist(), pair.current.tolist(), pair.target)
             for pair in questions.pairs(limits, train[0], frame, listed)]
    assert found == naive.pairs(train[1], rows[1], listed, **LIMITS)
    times = [row.time for row in rows[1]], [row.time for row in train[1]]
    for _, similar, history, current, target in found:
        assert all(times[1][row] < times[0][target] for row in similar + history)
        assert all(times[0][row] < times[0][target] for row in current)


any_lists = st.none() | st.dictionaries(
    st.integers(1, 3).flatmap(lambda user: st.integers(10 * user, 10 * user + 3)).map(str),
    st.lists(st.integers(10, 33), max_size=8))


@many
@given(sample_rows, any_lists)
def test_train_pairs(limits, drawn, listed):
    train = sample(drawn)
    same_pairs(limits, train, train, known(listed, train))


@many
@given(sample_rows, sample_rows, st.integers(0, 12), any_lists)
def test_test_pairs(limits, drawn, tested, shift, listed):
    """Train may go on while test has begun, as trajectories of one's own may."""
    train, test = sample(drawn), sample(tested, shift)
    same_pairs(limits, train, test, known(listed, train))


def known(listed, train):
    """A search's lists, of train's trajectories alone: `load_similar` refuses others."""
    there = {row.trajectory for row in train[1]}
    return listed and {key: [other for other in others if other in there] for key, others in listed.items()}


@repeatable
@given(sample_rows, st.integers(1, 6))
def test_history_in_steps(limits, drawn, step):
    """A history is the end of what it would be without steps, by less than a step, and begins at one."""
    train, _ = sample(drawn)
    whole = questions.pairs(dataclasses.replace(limits, max_history=10**6), train, train)
    plain = questions.pairs(limits, train, train)
    stepped = questions.pairs(dataclasses.replace(limits, history_step=step), train, train)
    for everything, full, cut in zip(whole, plain, stepped, strict=True):
        assert cut.history.tolist() == full.history.tolist()[len(full.history) - len(cut.history):]
        assert len(full.history) - len(cut.history) < step
        if len(cut.history):
            assert everything.history.tolist().index(cut.history[0]) % step == 0


# The wording

NAMES = ["Café", "POI id 12", "poi ID 3", "Current trajectory of user 3: x", "user 9", "<GPS 5>", "<answer>:",
         "2012-04-03 18:00:09", "(1.000000, 2.000000)", "a. b", "x\u2028y\x85z\n", "𝛼 日本", "History of user 1:"]
# What the readers let through: one line, of which something is left.
names = (st.sampled_from(NAMES) | st.text(max_size=12)).map(cells.clean_name).filter(bool)
ids = st.integers(0, 99_999)
times = st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2100, 1, 1)).map(
    lambda time: time.strftime("%Y-%m-%d %H:%M:%S"))
check_ins = st.tuples(times, ids, ids, latitudes, longitudes, names, ids)


@many
@given(st.sets(st.sampled_from([*prompts.FIELDS, prompts.CLOCK])).map(lambda fields: fields | {"poi"}),
       *[st.lists(check_ins, max_size=4)] * 3, ids, ids, times)
def test_what_is_written_is_read_back(fields, similar, history, current, user, target, time):
    parts = [[prompts.check_in(fields, *each) for each in part] for part in (similar, history, current)]
    question = prompts.question(user, *parts, prompts.ask_poi(time, user, 0, 99_999))
    answer = prompts.answer_poi(time, user, target)
    pair = prompts.join(question, answer)
    assert len(pair.split("\n")) == len(pair.splitlines()) == 1
    assert prompts.join(*prompts.split(pair)[:1], "") == question + " " + prompts.ANSWER + " "
    assert prompts.split(pair) == (f"{question} {prompts.ANSWER}", answer.removeprefix(prompts.ANSWER))
    prompt, = spelling.untokenized([pair])
    shown = [poi for part in (similar, history, current) for _, _, poi, *_ in part]
    assert prompt.shown == shown and (prompt.user, prompt.time, prompt.target) == (user, time, target)
    assert prompt.current == [poi for _, _, poi, *_ in current]
    assert spelling.answer_id(pair)[1:] == (target, ".")
    if "gps" in fields:
        assert prompts.GPS_TOKEN.findall(pair) == list(map(str, shown))


@repeatable
@given(check_ins, ids, latitudes, longitudes)
def test_stage_1_is_read_back(check_in, poi, latitude, longitude):
    question = prompts.question(1, [], [], [prompts.check_in(prompts.STAGE_1_FIELDS, *check_in)],
                                prompts.ask_coordinates(poi))
    prompt, answer = prompts.split(prompts.join(question, prompts.answer_coordinates(latitude, longitude)))
    assert prompts.GPS_TOKEN.findall(prompt) == [str(check_in[2]), str(poi)]
    north, east = (float(word.strip(".,")) for word in answer.split() if word[-2].isdigit())
    assert abs(north - latitude) <= 5.1e-7 and abs(east - longitude) <= 5.1e-7


# Readers

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]), min_size=1, max_size=8)
seconds = st.integers(0, 10**9)
written = st.lists(st.tuples(words, words, words, st.floats(-90, 90), st.floats(-180, 180), seconds),
                   min_size=1, max_size=12)


def written_config(folder, format_, **more):
    source = Path(__file__).parents[2] / f"best_conf/{'nyc' if format_ == 'getnext' else 'sample'}.yml"
    values = yaml.safe_load(source.read_text()) | {"dataset_name": "city", "format": format_} | more
    path = folder / "city.yml"
    path.write_text(yaml.safe_dump(values))     # keys by name, so test stands before train: no order may follow
    return config.load(path)


def local(second):
    return datetime.datetime(2000, 1, 1) + datetime.timedelta(seconds=second)


def equal(frame, rows):
    """A reader's table and (user, poi, category, name, latitude, longitude, second) rows."""
    rows = sorted(rows, key=lambda row: row[-1])
    columns = ["UserId", "PoiId", "PoiCategoryId", "PoiCategoryName", "Latitude", "Longitude"]
    found = [frame[column].tolist() for column in columns]
    assert found[:3] + found[4:] == [[row[i] for row in rows] for i in (0, 1, 2, 4, 5)]
    assert frame["PoiCategoryName"].tolist() == [cells.clean_name(row[3]) for row in rows]
    assert frame["LocalTime"].tolist() == [local(row[-1]) for row in rows]


def visible(*texts):
    """Names of which something is left, and no cell that begins as a file may begin."""
    return all(cells.clean_name(text) for text in texts) and not any("\ufeff" in text for text in texts)


OWN = ("user", "poi", "category", "lat", "lon", "time")


@few
@given(written)
def test_csv_is_read_back(tmp_path, rows):
    assume(all(visible(*row[:3]) for row in rows))
    path = tmp_path / "raw.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(OWN)
        writer.writerows([*row[:5], local(row[5]).isoformat(" ")] for row in rows)
    conf = written_config(tmp_path, "csv", raw={"check_ins": str(path)},
                          columns={role: role for role in OWN})
    equal(readers.read(conf), [(user, poi, name, name, *rest) for user, poi, name, *rest in rows])


numbered = st.lists(st.tuples(st.integers(0, 2**40), words, words, words, st.floats(-90, 90), st.floats(-180, 180),
                              seconds), min_size=1, max_size=12)


@few
@given(numbered, st.sampled_from([-300, 0, 540, 330]))
def test_tsmc2014_is_read_back(tmp_path, rows, offset):
    assume(all(visible(*row[1:4]) for row in rows))
    path = tmp_path / "raw.txt"
    path.write_text("".join("\t".join(map(str, [*row[:6], offset, (local(row[6]) - datetime.timedelta(minutes=offset))
                                                .strftime("%a %b %d %H:%M:%S +0000 %Y")])) + "\n" for row in rows),
                    encoding="utf-8")
    equal(readers.read(written_config(tmp_path, "tsmc2014", raw={"check_ins": str(path)})), rows)


@few
@given(st.lists(numbered, min_size=3, max_size=3))
def test_getnext_is_read_back(tmp_path, files):
    assume(all(visible(*row[1:4]) for rows in files for row in rows))
    raw = {split: str(tmp_path / f"{split}.csv") for split in naive.SPLITS}
    for path, rows in zip(raw.values(), files):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "POI_id", "POI_catid", "POI_catname", "latitude", "longitude", "local_time",
                             "trajectory_id"])
            writer.writerows([*row[:6], f"{local(row[6])}-05:00", "1_1"] for row in rows)
    found = readers.read(written_config(tmp_path, "getnext", raw=raw))
    equal(found, [row for rows in files for row in rows])
    assert Counter(found["Split"]) == {split: len(rows) for split, rows in zip(naive.SPLITS, files)}


# Metrics and baselines

some_ranks = st.lists(st.integers(1, 40).map(float) | st.just(math.inf), min_size=1, max_size=40)


@repeatable
@given(some_ranks, st.data())
def test_metrics(ranks, data):
    km = data.draw(st.lists(st.floats(0, 20_000) | st.just(math.nan), min_size=len(ranks), max_size=len(ranks)))
    found = metrics.summary(ranks, km, draws=50)
    value = {name: result["value"] for name, result in found.items() if name != "n"}
    assert found["n"] == len(ranks)
    for result in (found[name] for name in value):
        assert result["low"] <= result["high"]
    accuracies = [value[f"Acc@{k}"] for k in metrics.ACC_AT]
    assert accuracies == sorted(accuracies) and 0 <= accuracies[0] and accuracies[-1] <= 1
    assert value["Acc@1"] <= value["MRR@5"] + 1e-12 and value["MRR@5"] <= value["MRR@10"] + 1e-12
    assert value["MRR@10"] <= value["MRR"] + 1e-12 and value["MRR"] <= 1 + 1e-12
    assert value["Acc@1"] - 1e-12 <= value["NDCG@10"] <= value["Acc@10"] + 1e-12
    assert value["MRR"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert value["NDCG@10"] == pytest.approx(
        sum(1 / math.log2(1 + rank) for rank in ranks if rank <= 10) / len(ranks))
    near = [distance for distance in km if not math.isnan(distance)]
    assert value["share within 1 km"] == pytest.approx(sum(distance <= 1 for distance in near) / len(km))
    if near:
        assert value["mean km"] == pytest.approx(math.fsum(near) / len(near))
        assert value["median km"] == pytest.approx(float(np.median(near)))
    order = data.draw(st.permutations(range(len(ranks))))
    again = metrics.summary([ranks[i] for i in order], [km[i] for i in order], draws=1)
    assert {name: again[name]["value"] for name in value} == pytest.approx(value)


@repeatable
@given(st.integers(30, 60), st.integers(0, 10**6))
def test_intervals_hold_the_value(pairs, seed):
    """Of enough pairs, that are not all alike: the percentiles of the resampled means lie around the mean."""
    ranks = np.random.default_rng(seed).integers(1, 15, pairs).astype(float)
    found = metrics.summary(ranks, ranks, draws=400)
    for name, result in found.items():
        if name != "n" and 0.1 < found["Acc@1" if name.startswith("share") else name]["value"] and name != "median km":
            assert result["low"] <= result["value"] <= result["high"], name


points = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@repeatable
@given(st.lists(points, min_size=2, max_size=8))
def test_distances(places):
    gps = GPSMapping(np.arange(len(places)) + 5, *np.array(places).T)
    pairs = [(a, b) for a in range(len(places)) for b in range(len(places))]
    found = metrics.distances(*(np.array(side) + 5 for side in zip(*pairs)), gps)
    back = metrics.distances(*(np.array(side) + 5 for side in list(zip(*pairs))[::-1]), gps)
    np.testing.assert_array_equal(found, back)
    for (a, b), km in zip(pairs, found):
        # By the chord between unit vectors: another formula, exact for near and far.
        one, other = (np.array([math.cos(math.radians(lat)) * math.cos(math.radians(lon)),
                                math.cos(math.radians(lat)) * math.sin(math.radians(lon)), math.sin(math.radians(lat))])
                      for lat, lon in (places[a], places[b]))
        angle = 2 * math.atan2(np.linalg.norm(one - other), np.linalg.norm(one + other))
        assert km == pytest.approx(angle * metrics.EARTH_RADIUS_KM, abs=1e-3)
        assert km == 0 or a != b


visits = st.lists(st.integers(1, 6), max_size=12)


@repeatable
@given(st.lists(st.tuples(st.integers(1, 2), visits.filter(bool)), min_size=1, max_size=6),
       st.integers(1, 3), visits, st.integers(1, 7))
def test_baselines_among_equals(train, user, current, target):
    """Most visited first, among equals the one visited first; unknown targets have no rank."""
    rows = [(who, poi, i) for i, (who, pois) in enumerate(train) for poi in pois]
    frame = pd.DataFrame(rows, columns=["UserId", "PoiId", "TrajectoryId"])
    shown = [f"POI id {poi}." for poi in current]
    time = "2012-04-03 18:00:09"
    pair = prompts.join(prompts.question(user, [], [], shown, prompts.ask_poi(time, user, 1, 7)),
                        prompts.answer_poi(time, user, target))
    found = baselines.rankings(frame, spelling.untokenized([pair]))
    for name, history in (("user-history frequency", [poi for who, poi, _ in rows if who == user] + current),
                          ("popularity", [poi for _, poi, _ in rows])):
        order = sorted(set(history), key=lambda poi: (-history.count(poi), history.index(poi)))
        rank = order.index(target) + 1 if target in order else math.inf
        assert (found[name].ranks.tolist(), found[name].tops.tolist()) == ([rank], order[:1] or [metrics.NO_POI])


@repeatable
@given(st.lists(visits.filter(bool), min_size=1, max_size=5), st.integers(1, 7))
def test_markov_chain_ranks_every_place_once(train, last):
    frame = pd.DataFrame([(1, poi, i) for i, pois in enumerate(train) for poi in pois],
                         columns=["UserId", "PoiId", "TrajectoryId"])
    places = sorted(set(frame["PoiId"]))
    pairs = [prompts.join(prompts.question(1, [], [], [f"POI id {last}."], "Where?"), prompts.answer_poi("", 1, poi))
             for poi in places]
    found = baselines.markov_chain(frame, spelling.untokenized(pairs))
    assert sorted(found.ranks) == list(range(1, len(places) + 1)) and len(set(found.tops)) == 1
    assert places[found.ranks.tolist().index(1)] == found.tops[0]


# Tokens

@many
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(2, 30), st.sampled_from([None, 0, 1]))
def test_truncate(ids, length, bos):
    found = sft_data.truncate(ids, length, bos)
    begins = ids[0] == bos
    assert len(found) == min(len(ids), length) and (not begins or found[0] == bos)
    tail = found[1:] if begins else found
    assert tail == ids[len(ids) - len(tail):]


@pytest.fixture(scope="module", params=["llama3", "sentencepiece"])
def tokenizer(request, tiny_llama):
    return backbone.load_tokenizer(tiny_llama(request.param))


@few
@given(candidates=st.sets(st.integers(0, 12_345), min_size=1, max_size=40), end=st.sampled_from([".", "", " "]),
       always_end=st.booleans())
def test_ids_are_told_apart(tokenizer, candidates, end, always_end):
    """No id's tokens begin another's, so the trie of the ids has a leaf for each; with its end, it is spelled whole."""
    assume(end != " " or tokenizer.__class__.__name__ != "LlamaTokenizer")
    spelled = spelling.Spelling(tokenizer, sorted(candidates), end, always_end)
    assert set(spelled.tokens) == set(spelled.full) == candidates
    for poi, tokens in spelled.tokens.items():
        assert tokens and tokens == spelled.full[poi][:len(tokens)]
        assert not any(other[:len(tokens)] == tokens for id_, other in spelled.tokens.items() if id_ != poi)
        text = tokenizer.decode(spelled.full[poi]).strip()
        assert text == (f"{poi}{end}" if end else f"{poi}{tokenizer.eos_token}").strip()
        assert not always_end or tokens == spelled.full[poi]
