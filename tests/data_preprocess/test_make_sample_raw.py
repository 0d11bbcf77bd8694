"""The synthetic city: its files parse as the real ones do, and it has the structure it promises."""
import csv
import datetime
import json
import sys

import make_sample_raw as tool
import numpy as np
import pandas as pd
import pytest
from synthetic.city import CATEGORIES, EXPLORABLE, FORMATS, City, Format
from synthetic.people import DAY, generate
from synthetic.raw_files import Times

from ga_llm.base.cli import UserError

USERS, DAYS = 60, 60
TSMC_COLUMNS = ["user", "venue", "category_id", "category", "latitude", "longitude", "offset", "utc"]


def make(monkeypatch, out, *flags):
    monkeypatch.setattr(sys, "argv", ["make_sample_raw.py", "-users", str(USERS), "-days", str(DAYS), "-out", str(out),
                                      *flags])
    tool.main()
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    with pytest.MonkeyPatch.context() as patch:
        return {form: make(patch, root / form, "-format", form) for form in FORMATS}


@pytest.fixture(scope="module")
def tky(folders):
    table = pd.read_csv(folders["tky"] / "dataset_TSMC2014_SAMPLE.txt", sep="\t", header=None, encoding="latin-1",
                        names=TSMC_COLUMNS)
    utc = pd.to_datetime(table.utc, format="%a %b %d %H:%M:%S +0000 %Y")
    return table.assign(local=utc + pd.to_timedelta(table.offset, unit="min"))


@pytest.fixture(scope="module")
def nyc(folders):
    return {name: pd.read_csv(folders["nyc"] / f"NYC_{name}.csv") for name in ("train", "val", "test")}


@pytest.fixture(scope="module")
def gowalla(folders):
    return pd.read_csv(folders["ca"] / "loc-gowalla_totalCheckins.txt", sep="\t", header=None,
                       names=["user", "time", "latitude", "longitude", "spot"])


def test_same_seed_same_bytes_and_another_seed_others(monkeypatch, tmp_path, folders):
    for form, folder in folders.items():
        again = make(monkeypatch, tmp_path / form, "-format", form)
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in again.iterdir())
        for path in folder.iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes()
    other = make(monkeypatch, tmp_path / "other", "-seed", "1") / "dataset_TSMC2014_SAMPLE.txt"
    assert other.read_bytes() != (folders["tky"] / other.name).read_bytes()


def test_tky_format(folders, tky):
    raw = (folders["tky"] / "dataset_TSMC2014_SAMPLE.txt").read_bytes()
    assert b"\tCaf\xe9\t" in raw and b"\r" not in raw  # latin-1, as the original
    assert all(line.count(b"\t") == 7 for line in raw.splitlines())
    assert tky.local.is_monotonic_increasing
    assert (tky.offset == 540).all() and tky.user.nunique() == USERS
    assert tky.venue.str.fullmatch("[0-9a-f]{24}").all() and tky.category_id.str.fullmatch("[0-9a-f]{24}").all()
    by_venue = tky.groupby("venue")[["category", "latitude", "longitude"]].nunique()
    assert (by_venue == 1).all(axis=None)
    assert (tky.groupby("category").category_id.nunique() == 1).all() and \
        (tky.groupby("category_id").category.nunique() == 1).all()
    assert tky.local.min() >= pd.Timestamp("2012-04-03")
    assert tky.local.max() < pd.Timestamp("2012-04-03") + pd.Timedelta(days=DAYS)


def test_every_format_tells_the_same_local_times(folders, tky, nyc):
    """Same seed and one centre: nyc's people do what tky's do."""
    rows = pd.concat(nyc.values())
    assert sorted(zip(rows.user_id, rows.local_time.str[:19], strict=True)) == \
        sorted(zip(tky.user, tky.local.astype(str).str[:19], strict=True))


def test_nyc_columns_and_split(folders, nyc, tky):
    header = ("user_id,POI_id,POI_catid,POI_catid_code,POI_catname,latitude,longitude,timezone,UTC_time,local_time,"
              "day_of_week,norm_in_day_time,trajectory_id,norm_day_shift,norm_relative_time")
    for name, table in nyc.items():
        assert ",".join(table.columns) == header, name
        assert not table.isna().any(axis=None), name
    n = len(tky)
    assert [len(nyc[s]) for s in ("train", "val", "test")] == [int(n * .8), int(n * .9) - int(n * .8), n - int(n * .9)]
    assert nyc["train"].local_time.max() <= nyc["val"].local_time.min() <= nyc["test"].local_time.min()


def test_nyc_times(nyc):
    for table in nyc.values():
        local = pd.to_datetime(table.local_time.str[:19])
        utc = pd.to_datetime(table.UTC_time.str[:19])
        assert ((local - utc) == pd.to_timedelta(table.timezone, unit="min")).all()
        assert (table.local_time.str[19:] == "+00:00").all()  # the original's misnomer
        assert (local.dt.day_of_week == table.day_of_week).all()
        half_hours = (local.dt.hour * 2 + local.dt.minute // 30) / 48
        assert np.allclose(half_hours, table.norm_in_day_time)
        first_day = local.groupby(table.trajectory_id).transform("min").dt.normalize()
        assert ((local.dt.normalize() - first_day).dt.days == table.norm_day_shift).all()
        assert np.allclose(table.norm_day_shift + table.norm_in_day_time, table.norm_relative_time)


def test_nyc_trajectories_are_cut_at_gaps_of_more_than_a_day(nyc):
    seen = set()
    for table in nyc.values():
        table = table.assign(time=pd.to_datetime(table.local_time.str[:19]))
        table = table.sort_values(["user_id", "time"], kind="stable")
        gap = table.groupby("user_id").time.diff()
        cut = gap.isna() | (gap > pd.Timedelta(days=1))
        assert (cut.to_numpy() == (table.trajectory_id != table.trajectory_id.shift()).to_numpy()).all()
        assert (table.trajectory_id.str.split("_").str[0].astype(int) == table.user_id).all()
        assert not seen & set(table.trajectory_id)
        seen |= set(table.trajectory_id)


def test_gowalla_files(folders, gowalla):
    assert gowalla.time.str.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ").all()
    assert (gowalla.user.diff().dropna() >= 0).all()
    newest_first = pd.to_datetime(gowalla.time).groupby(gowalla.user).diff().dropna()
    assert (newest_first <= pd.Timedelta(0)).all()
    with (folders["ca"] / "gowalla_spots_subset1.csv").open(newline="") as file:
        spots = {int(row["id"]): row for row in csv.DictReader(file)}
    assert {"id", "lng", "lat", "spot_categories"} <= set(next(iter(spots.values())))
    assert all("'name': '" in row["spot_categories"] for row in spots.values())
    listed = gowalla.spot.isin(list(spots))
    assert .9 < listed.mean() < 1  # some check-ins are at places that the spots file does not have
    row = gowalla[listed].iloc[0]
    assert (float(spots[row.spot]["lat"]), float(spots[row.spot]["lng"])) == (row.latitude, row.longitude)


def test_gowalla_check_ins_lie_in_three_states(folders, gowalla):
    states = json.loads((folders["ca"] / "us_state_polygon_json.json").read_text())["features"]
    shapely = pytest.importorskip("shapely")
    points = shapely.points(gowalla.longitude, gowalla.latitude)
    inside = {s["properties"]["name"]: shapely.intersects(shapely.from_geojson(json.dumps(s["geometry"])), points)
              for s in states}
    share = {name: mask.mean() for name, mask in inside.items()}
    assert share["California"] > .5 and share["Nevada"] > .03 and share["Arizona"] > .03
    assert np.sum(list(inside.values()), axis=0).max() == 1 and sum(share.values()) > .99


def test_opening_hours(tky):
    hours = {c.name: (c.opens * 60, c.closes * 60) for c in CATEGORIES}
    opens, closes = (tky.category.map({name: pair[i] for name, pair in hours.items()}) for i in (0, 1))
    minute = tky.local.dt.hour * 60 + tky.local.dt.minute + tky.local.dt.second / 60
    assert (((opens <= minute) & (minute < closes)) | (minute + 1440 < closes)).all()


def test_hops_are_short(tky):
    """Distance decay: an hour or so later, people are much nearer than two random check-ins are."""
    tky = tky.sort_values(["user", "local"], kind="stable")

    def km(a, b):
        north, east = a.latitude - b.latitude, (a.longitude - b.longitude) * np.cos(np.radians(35.7))
        return np.hypot(north, east) * 111.32

    before = tky.shift()
    public = tky.category.isin([c.name for c in CATEGORIES if c.kind in EXPLORABLE])
    soon = (tky.user == before.user) & (tky.local - before.local < pd.Timedelta(hours=6)) & public
    others = tky[public].sample(int(soon.sum()), random_state=0, replace=True).reset_index(drop=True)
    more = tky[public].sample(int(soon.sum()), random_state=1, replace=True).reset_index(drop=True)
    assert km(tky[soon], before[soon]).median() < .6 * km(others, more).median()


def test_popularity_has_a_long_tail(tky):
    counts = tky.venue.value_counts()
    assert counts.iloc[:len(counts) // 10].sum() > .25 * counts.sum()
    assert counts.median() < counts.mean()


def test_weekdays_differ_from_weekends(tky):
    weekend = tky.local.dt.day_of_week >= 5
    work = tky.category.isin(["Office", "University"])
    assert not (work & weekend).any() and (work & ~weekend).sum() > .05 * len(tky)


def test_pauses_cut_trajectories_of_several_check_ins(tky):
    tky = tky.sort_values(["user", "local"], kind="stable")
    gap = tky.groupby("user").local.diff()
    length = len(tky) / (gap.isna() | (gap > pd.Timedelta(days=1))).sum()
    per_day = len(tky) / tky.groupby("user").local.apply(lambda t: t.dt.date.nunique()).sum()
    assert 4 < length < 8 and 2 < per_day < 3
    assert tky.user.value_counts().min() < .6 * tky.user.value_counts().median()  # some are seldom there


def test_the_hour_tells_more_than_the_count(tky):
    """What the demo's model can learn: a user's usual place at this hour beats the user's usual place."""
    cut = tky.local.quantile(.9)
    past, future = tky[tky.local < cut], tky[tky.local >= cut]
    hour = past.local.dt.hour.rename("hour")
    usual = past.groupby("user").venue.agg(lambda v: v.mode()[0])
    usual_then = past.groupby(["user", hour]).venue.agg(lambda v: v.mode()[0])
    by_count = (future.user.map(usual) == future.venue).mean()
    keys = pd.MultiIndex.from_arrays([future.user, future.local.dt.hour])
    by_hour = (usual_then.reindex(keys).to_numpy() == future.venue.to_numpy()).mean()
    assert by_count < .45 and by_hour > by_count + .25


def test_two_thousand_users_and_more_than_one_block():
    city = City(FORMATS["tky"], 4000, seed=0)
    rows = generate(city, 2100, 20, seed=0)
    assert len(np.unique(rows.user)) > 2000 and rows.user.max() < 2100
    assert 10 < len(rows.user) / 2100 < 60
    order = np.lexsort((rows.seconds, rows.user))
    assert (order == np.arange(len(order))).all()
    assert rows.seconds.min() >= 0 and rows.seconds.max() < 20 * DAY


def test_a_file_with_other_contents_is_kept_unless_told(monkeypatch, tmp_path):
    real = tmp_path / "NYC_val.csv"
    real.write_text("real check-ins")
    with pytest.raises(UserError, match="-overwrite True"):
        make(monkeypatch, tmp_path, "-format", "nyc")
    assert [p.name for p in tmp_path.iterdir()] == ["NYC_val.csv"] and real.read_text() == "real check-ins"
    make(monkeypatch, tmp_path, "-format", "nyc", "-overwrite", "True")
    assert real.read_text().startswith("user_id,")


def test_the_same_files_again_are_left_alone_and_a_missing_one_comes_back(monkeypatch, tmp_path):
    make(monkeypatch, tmp_path, "-format", "nyc")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    (tmp_path / "NYC_test.csv").unlink()
    make(monkeypatch, tmp_path, "-format", "nyc")
    assert (tmp_path / "NYC_test.csv").read_bytes() == before["NYC_test.csv"][1]
    assert (tmp_path / "NYC_train.csv").stat().st_mtime_ns == before["NYC_train.csv"][0]
    (tmp_path / "NYC_val.csv").write_bytes(before["NYC_val.csv"][1] + b"one more line\n")
    with pytest.raises(UserError, match="NYC_val.csv"):
        make(monkeypatch, tmp_path, "-format", "nyc")


@pytest.mark.parametrize("flags, folder", [
    ([], "sample"), (["-format", "tky", "-dataset_name", "tky"], "tky"), (["-format", "ca"], "ca"),
    (["-format", "nyc"], "nyc"), (["-format", "nyc", "-dataset_name", "mine"], "mine")])
def test_where_the_files_go(monkeypatch, tmp_path, flags, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_sample_raw.py", "-users", "5", "-days", "20", *flags])
    tool.main()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.parent for p in files} == {tmp_path / "data-preprocess" / "data" / folder / "raw"}
    if folder == "tky":
        assert files[0].name == "dataset_TSMC2014_TKY.txt"


@pytest.mark.parametrize("flags", [["-users", "0"], ["-pois", "10"], ["-days", "-1"], ["-seed", "-1"]])
def test_senseless_numbers_are_one_line(monkeypatch, tmp_path, flags):
    with pytest.raises(UserError, match=flags[0]):
        make(monkeypatch, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_times_across_midnight_and_the_year():
    times = Times(datetime.date(2012, 12, 31), np.array([3 * 86400]), "%a %b %d {} +0000 %Y")
    assert times(np.array([-1, 0, 86399, 86400])).tolist() == [
        "Sun Dec 30 23:59:59 +0000 2012", "Mon Dec 31 00:00:00 +0000 2012", "Mon Dec 31 23:59:59 +0000 2012",
        "Tue Jan 01 00:00:00 +0000 2013"]


def test_a_city_across_180_degrees_and_none_at_a_pole():
    def at(latitude, longitude):
        return City(Format(datetime.date(2012, 4, 3), 720, ((latitude, longitude, 1.),)), 400, seed=0)

    city, fiji = at(-16.8, 10), at(-16.8, 180)
    assert fiji.longitude.min() < -179 and fiji.longitude.max() > 179 and np.abs(fiji.longitude).max() <= 180
    np.testing.assert_allclose((fiji.longitude - 180) % 360, (city.longitude - 10) % 360, atol=2e-6)
    with pytest.raises(AssertionError, match="pole"):
        at(89.99, 0)
