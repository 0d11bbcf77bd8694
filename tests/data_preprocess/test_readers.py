"""Each raw format read from a hand-written file, and what each mistake in one says."""
import gzip
from pathlib import Path

import pandas as pd
import pytest

from checkins import config, readers
from ga_llm.base.cli import UserError

GETNEXT_HEADER = ("user_id,POI_id,POI_catid,POI_catid_code,POI_catname,latitude,longitude,timezone,UTC_time,local_time,"
                  "day_of_week,norm_in_day_time,trajectory_id,norm_day_shift,norm_relative_time\n")
TSMC = "7\tv1\tc1\tCaf\xe9  Bar\t35.7\t139.7\t540\tTue Apr 03 18:00:09 +0000 2012\n"
CSV = "user,poi,category,lat,lon,time\n"


def getnext_row(user=3, poi="p", time="2012-04-03 14:00:09+00:00", trajectory="3_1", lat=40.7):
    return (f"{user},{poi},k,5,Home (private),{lat},-74.0,-240,2012-04-03 18:00:09+00:00,{time},1,0.5,{trajectory},"
            "0,0.5\n")


def write_getnext(train, validate="", test=""):
    for name, rows in (("train", train), ("val", validate), ("test", test)):
        Path(f"{name}.csv").write_text(GETNEXT_HEADER + (rows or getnext_row(time="2013-01-01 00:00:00+00:00")))


def error(path) -> str:
    with pytest.raises(UserError) as caught:
        readers.read(config.load(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_getnext(settings):
    write_getnext(getnext_row(), test=getnext_row(user=9, trajectory="9_4", time="2012-12-31 23:59:59+00:00"))
    rows = readers.read(config.load(settings("getnext")))
    assert rows["UserId"].tolist() == [3, 9, 3] and rows["Split"].tolist() == ["train", "test", "validate"]
    assert rows["Trajectory"].tolist() == ["3_1", "9_4", "3_1"]
    assert rows["LocalTime"][0] == pd.Timestamp("2012-04-03 14:00:09")
    assert rows["PoiCategoryName"][0] == "Home (private)"


def test_tsmc2014_local_time_is_utc_plus_offset(settings):
    Path("raw.txt").write_text(TSMC, encoding="latin-1")
    row = readers.read(config.load(settings("tsmc2014"))).iloc[0]
    assert row["LocalTime"] == pd.Timestamp("2012-04-04 03:00:09")
    assert (row["UserId"], row["PoiId"], row["PoiCategoryId"], row["PoiCategoryName"]) == (7, "v1", "c1", "Café Bar")
    assert (row["Latitude"], row["Longitude"]) == (35.7, 139.7)


def test_tsmc2014_quotes_are_text(settings):
    Path("raw.txt").write_text(TSMC.replace("Caf\xe9", '"Caf\xe9') * 2, encoding="latin-1")
    assert readers.read(config.load(settings("tsmc2014")))["PoiCategoryName"].tolist() == ['"Café Bar'] * 2


def test_gowalla_category_name(settings):
    Path("ca.csv").write_text("UserId,PoiId,PoiCategoryId,Latitude,Longitude,UTCTime\n"
                              "5,22847,\"[{'url': '/categories/89', 'name': 'Craftsman'}]\",37.6,-122.4,"
                              "2010-10-19T23:55:27Z\n")
    row = readers.read(config.load(settings("gowalla"))).iloc[0]
    assert row["PoiCategoryName"] == "Craftsman" and row["PoiId"] == 22847
    assert row["LocalTime"] == pd.Timestamp("2010-10-19 23:55:27")


def test_csv_of_ones_own(settings, caplog):
    Path("mine.csv").write_text("when,who,lat,lon,place,kind,extra\n"
                                "2024-05-01T10:00:00Z,007,1.5,2.5,A,<question>: tea  house,0\n"
                                "2024-05-01 09:00,7,1.5,2.5,B,tea house,0\n"
                                "2024-05-01T11:00:00+09:00,7,1.5,2.5,B,NA,0\n")
    columns = {"user": "who", "poi": "place", "category": "kind", "lat": "lat", "lon": "lon", "time": "when"}
    rows = readers.read(config.load(settings("csv", raw={"check_ins": "mine.csv"}, columns=columns)))
    assert rows["UserId"].tolist() == ["7", "007", "7"]
    assert rows["PoiCategoryName"].tolist() == ["tea house", "question : tea house", "NA"]
    assert rows["LocalTime"].dt.hour.tolist() == [9, 10, 11]
    assert "offsets" in caplog.text and "ignored" in caplog.text


OWN = "who,where,lat,lon,when"
OWN_COLUMNS = {"user": "who", "poi": "where", "lat": "lat", "lon": "lon", "time": "when"}


def test_a_csv_without_categories(settings, caplog):
    Path("raw.csv").write_text(f"{OWN}\nann,A,1.5,2.5,2024-05-01 10:00\n")
    caplog.set_level("INFO")
    row = readers.read(config.load(settings("csv", columns=OWN_COLUMNS))).iloc[0]
    assert row["PoiCategoryId"] == row["PoiCategoryName"] == "place"
    assert "-fields time,user,poi,coordinates,gps leaves it out" in caplog.text


@pytest.mark.parametrize("times, changes, hours", [
    (["1714557600", "1714561200"], {}, [10, 11]), (["1714557600000", "1714561200000"], {}, [10, 11]),
    (["Wed May 01 10:00:00 +0000 2024", "Wed May 01 11:00:00 +0000 2024"], {}, [10, 11]),
    (["1714557600", "1714561200"], {"time_zone": "America/New_York"}, [6, 7]),
    (["2024-05-01T10:00:00Z", "2024-05-01T13:00:00+02:00"], {"time_zone": "Asia/Tokyo"}, [19, 20]),
    (["2024-05-01 10:00", "2024-05-01 11:00"], {"time_zone": "Asia/Kolkata"}, [15, 16]),
    (["1714557600", "1714561200"], {"columns": OWN_COLUMNS | {"offset": "off"}}, [7, 13]),
    (["2024-05-01 10:00Z", "2024-05-01 11:00Z"], {"columns": OWN_COLUMNS | {"offset": "off"}}, [7, 13])])
def test_times_of_a_csv_that_are_utc(settings, caplog, times, changes, hours):
    rows = [f"ann,A,1.5,2.5,{time},{offset}\n" for time, offset in zip(times, (-180, 120))]
    Path("raw.csv").write_text(f"{OWN},off\n{''.join(rows)}")
    found = readers.read(config.load(settings("csv", **{"columns": OWN_COLUMNS, **changes})))
    assert found["LocalTime"].dt.hour.tolist() == hours
    assert ("UTC, which counts as local time; give time_zone, or an offset" in caplog.text) == (not changes)


def test_daylight_saving(settings):
    """Half an hour before and after New York's clocks go back, an hour apart in UTC, half past one both times."""
    Path("raw.csv").write_text(f"{OWN}\nann,A,1,2,2024-11-03 05:30\nann,B,1,2,2024-11-03 06:30\n")
    found = readers.read(config.load(settings("csv", columns=OWN_COLUMNS, time_zone="America/New_York")))
    assert found["LocalTime"].tolist() == [pd.Timestamp("2024-11-03 01:30")] * 2
    assert found["PoiId"].tolist() == ["A", "B"]


# The files as they go round: other names, separators, headers, orders of columns, times.

PORTAL = ["userId", "venueId", "venueCategoryId", "venueCategory", "latitude", "longitude", "timezoneOffset",
          "utcTimestamp"]     # as data portals spread the files of TSMC 2014
VISIT = ["7", "v1", "c1", "Café Bar", "35.7", "139.7", "540", "Tue Apr 03 18:00:09 +0000 2012"]
UTC = ["2012-04-03 18:00:09", "2012-04-03T18:00:09Z", "2012-04-03T18:00:09.75+00:00", "2012-04-04 03:00:09+0900",
       "2012-04-03T13:30:09-04:30", "1333476009", "1333476009.5", "1333476009750"]


def lines(separator: str, *rows) -> str:
    return "".join(separator.join(row) + "\n" for row in rows)


def reordered(order, *rows):
    return [[row[i] for i in order] for row in rows]


TSMC_VARIANTS = {
    "portals' CSV": lines(",", PORTAL, VISIT), "semicolons": lines(";", PORTAL, VISIT),
    "bars": lines("|", PORTAL, VISIT),
    "commas, no header": lines(",", VISIT), "a header and tabs": lines("\t", PORTAL, VISIT),
    "other order": lines(",", *reordered([7, 3, 5, 4, 6, 2, 0, 1], PORTAL, VISIT)),
    "more columns": lines(",", ["", *PORTAL, "place"], ["0", *VISIT, "x"]),
    "no category id": lines(",", *reordered([0, 1, 3, 4, 5, 6, 7], PORTAL, VISIT)).replace("Café", "c1 is not"),
    "other names": lines(",", ["user_id", "POI_id", "POI_catid", "POI_catname", "lat", "lng", "timezone", "UTC_time"],
                         VISIT),
    "byte order mark, blank lines": "\ufeff\n" + lines(",", PORTAL) + "\n" + lines(",", VISIT),
    **{f"time {time}": lines(",", PORTAL, [*VISIT[:7], time]) for time in UTC},
    **{f"no header, time {time}": lines("\t", [*VISIT[:7], time]) for time in UTC[:2]},
}


@pytest.mark.parametrize("text", TSMC_VARIANTS.values(), ids=TSMC_VARIANTS)
def test_tsmc2014_as_it_goes_round(settings, text):
    Path("raw.txt").write_text(text)
    row = readers.read(config.load(settings("tsmc2014"))).iloc[0]
    assert row["LocalTime"] == pd.Timestamp("2012-04-04 03:00:09")
    name = "c1 is not Bar" if "is not" in text else "Café Bar"
    assert row.tolist()[:6] == [7, "v1", name if "is not" in text else "c1", name, 35.7, 139.7]


@pytest.mark.parametrize("name", ["raw.txt.gz", "raw.csv", "raw.csv.gz", "raw.tsv"])
def test_a_file_by_its_other_names(settings, name, caplog):
    packed = gzip.compress(lines(",", PORTAL, VISIT).encode()) if name.endswith("gz") else None
    Path(name).write_bytes(packed or lines(",", PORTAL, VISIT).encode())
    caplog.set_level("INFO")
    assert readers.read(config.load(settings("tsmc2014")))["UserId"].tolist() == [7]
    assert (f"raw.txt: not found; {name} is read" in caplog.text) == (name != "raw.txt.gz")
    assert f"{name}: columns by other names: user = userId, venue = venueId, " in caplog.text
    Path("raw.txt").write_text(lines("\t", ["8", *VISIT[1:]]))     # the name that the YAML gives goes first
    assert readers.read(config.load("best_conf/city.yml"))["UserId"].tolist() == [8]


def test_own_check_ins_have_the_name_that_the_yaml_gives(settings):
    Path("raw.txt").write_text(CSV + GOOD)
    assert error(settings("csv")) == "raw.csv: not found; put it there"


GETNEXT_UTC = ["2012-04-03 18:00:09+00:00", "2012-04-03T18:00:09Z", "1333476009", "1333476009000"]


@pytest.mark.parametrize("text", [
    getnext_row(time="2012-04-03T14:00:09-04:00"), getnext_row(time="2012-04-03 14:00:09"),
    *(("UTC_time,trajectory_id,timezone,POI_id,POI_catname,latitude,longitude,user_id\n",
       f"{utc},3_1,-240,p,Home (private),40.7,-74.0,3\n") for utc in GETNEXT_UTC),
    ("user;poi;category;lat;lng;datetime;tz;pseudo_session_trajectory_id\n",
     "3.0;p;Home (private);40.7;-74.0;2012-04-03 18:00:09;-240;3_1\n")])
def test_getnext_as_it_goes_round(settings, text):
    header, row = text if isinstance(text, tuple) else (GETNEXT_HEADER, text)
    for name in ("train", "val", "test"):
        Path(f"{name}.csv").write_text(header + row)
    row = readers.read(config.load(settings("getnext"))).iloc[0]
    assert row["LocalTime"] == pd.Timestamp("2012-04-03 14:00:09")
    assert row[["UserId", "PoiId", "PoiCategoryName", "Latitude", "Longitude", "Trajectory"]].tolist() == [
        3, "p", "Home (private)", 40.7, -74.0, "3_1"]
    assert row["PoiCategoryId"] == ("k" if header == GETNEXT_HEADER else "Home (private)")


@pytest.mark.parametrize("time", ["2010-10-19T23:55:27Z", "2010-10-19 23:55:27", "1287532527", "1287532527000"])
def test_gowalla_as_it_goes_round(settings, time):
    category = "\"[{'url': '/categories/89', 'name': 'Craftsman'}]\""
    for header, row in ((",user_id,location_id,category_id,lat,lng,datetime",
                         f"0,5,22847,{category},37.6,-122.4,{time}"),
                        ("UTCTime;PoiId;PoiCategoryId;Latitude;Longitude;UserId",
                         f"{time};22847;{category};37.6;-122.4;5")):
        Path("ca.csv").write_text(f"{header}\n{row}\n")
        row = readers.read(config.load(settings("gowalla"))).iloc[0]
        assert (row["UserId"], row["PoiId"], row["Latitude"], row["Longitude"]) == (5, 22847, 37.6, -122.4)
        assert row["PoiCategoryName"] == "Craftsman" and row["LocalTime"] == pd.Timestamp("2010-10-19 23:55:27")


@pytest.mark.parametrize("text, words", [
    (lines(",", PORTAL[:7], VISIT[:7]), ["no column UTC time (utctime, ", "its header has 'userId, venueId"]),
    (lines(",", PORTAL, VISIT, [*VISIT[:7], "1333476009"]), ["line 3", "UTC time '1333476009' is no time such as Tue"]),
    (lines(",", PORTAL, [*VISIT[:7], "1333476009"], [*VISIT[:7], "1333476009000"]), ["line 3", "such as 1333476009"]),
    (lines(",", PORTAL, [*VISIT[:7], "4102444800000000"]), ["line 2", "'4102444800000000' is no time"]),
    (lines(",", PORTAL, [*VISIT[:7], "2012-04-03T18:00:09+99:00"]), ["line 2", "+99:00' is no time such as 2012"]),
    (lines(",", PORTAL, [*VISIT[:7], "9999999999"]), ["line 2", "is not between 1970 and 2100"]),
    (lines(",", [*PORTAL, "user id"], [*VISIT, "8"]), ["two columns user"]),
    (lines(",", PORTAL, VISIT, VISIT[:7]), ["line 3", "UTC time is empty", "7 of 8 columns"]),
    (lines(",", PORTAL, ["x7", *VISIT[1:]]), ["line 2", "user 'x7'"]),
])
def test_mistakes_in_a_variant(settings, text, words):
    Path("raw.txt").write_text(text)
    message = error(settings("tsmc2014"))
    assert all(word in message for word in ["raw.txt", *words]), message


def test_equal_times_keep_the_files_order(settings):
    times = ["10:00:00", "09:00:00", "10:00:00", "09:00:00"] * 10
    Path("raw.csv").write_text(CSV + "".join(f"u,p{i},k,1,2,2024-01-01 {time}\n" for i, time in enumerate(times)))
    pois = readers.read(config.load(settings("csv")))["PoiId"].tolist()
    assert pois == [f"p{i}" for i in range(1, 40, 2)] + [f"p{i}" for i in range(0, 40, 2)]


def test_gz_stands_in_and_blank_lines_do_not_count_as_rows(settings):
    with gzip.open("raw.csv.gz", "wt", encoding="utf-8-sig") as file:
        file.write(CSV + "\nu,p,k,1,2,2024-01-01 10:00:00\n\n")
    assert len(readers.read(config.load(settings("csv")))) == 1


GOOD = "u,p,k,1,2,2024-01-01 10:00:00\n"


@pytest.mark.parametrize("text, words", [
    ("", ["raw.csv: empty", "put it there"]),
    (CSV, ["raw.csv", "no rows"]),
    ("user,poi,category,lat,time\nu,p,k,1,2024-01-01\n", ["raw.csv: no column lon", "user, poi"]),
    (CSV + GOOD + "u,p,k,1,2,yesterday\n", ["raw.csv, line 3", "time", "'yesterday'"]),
    (CSV + GOOD + "\nu,p,k,91,2,2024-01-01\n", ["raw.csv, line 4", "lat 91", "-90 and 90"]),
    (CSV + GOOD + "u,p,k,1,-180.5,2024-01-01\n", ["raw.csv, line 3", "lon -180.5", "-180 and 180"]),
    (CSV + GOOD + "u,p,k,nan,2,2024-01-01\n", ["raw.csv, line 3", "lat 'nan'"]),
    (CSV + GOOD + "u,p,k,north,2,2024-01-01\n", ["raw.csv, line 3", "lat 'north'"]),
    (CSV + GOOD + "u,,k,1,2,2024-01-01\n", ["raw.csv, line 3", "poi is empty"]),
    (CSV + GOOD + "u,p,k,1,2\n", ["raw.csv, line 3", "time is empty"]),
    (CSV + GOOD + "u,p,k,1,2,2024-01-01,more\n", ["raw.csv, line 3", "more than 6 columns"]),
    (CSV + GOOD.replace("\n", ",more\n"), ["raw.csv, line 2", "more than 6 columns"]),
    (CSV + GOOD + "u,p,k,1,2,2024-01-01,more,and more\n", ["raw.csv, line 3", "8 columns, expected 6"]),
    (CSV + GOOD.replace("u", "\udcff"), ["raw.csv", "utf-8"]),
])
def test_mistakes_in_a_csv(settings, text, words):
    Path("raw.csv").write_text(text, errors="surrogateescape")
    message = error(settings("csv"))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text, words", [
    ("x" + TSMC, ["line 1", "user 'x7'", "no whole number"]),
    (TSMC + TSMC.replace("Tue Apr 03", "2012-04-03"), ["line 2", "UTC time", "Tue Apr 03"]),
    (TSMC + TSMC.replace("7\tv1", "7.5\tv1"), ["line 2", "user 7.5", "whole number"]),
    (TSMC.replace("\t540", ""), ["line 1", "7 of 8 columns"]),
    (TSMC + TSMC.replace("\t540", ""), ["line 2", "UTC time is empty", "7 of 8 columns"]),
    (TSMC + TSMC.replace("\t540", "\t540\t1"), ["line 2", "more than 8 columns"]),
    (TSMC.replace("\t540", "\t5400"), ["line 1", "timezone offset 5400"]),
])
def test_mistakes_in_tsmc2014(settings, text, words):
    Path("raw.txt").write_text(text, encoding="latin-1")
    message = error(settings("tsmc2014"))
    assert all(word in message for word in ["raw.txt", *words]), message


def test_mistakes_in_getnext_name_the_file(settings):
    write_getnext(getnext_row(), validate=getnext_row() + getnext_row(lat="?"))
    assert "val.csv, line 3: latitude '?'" in error(settings("getnext"))
    Path("test.csv").unlink()
    write_getnext(getnext_row(), validate=getnext_row())
    Path("test.csv").unlink()
    assert error(settings("getnext")) == "test.csv: not found; put it there"


def test_a_category_without_a_name(settings):
    Path("ca.csv").write_text("UserId,PoiId,PoiCategoryId,Latitude,Longitude,UTCTime\n"
                              "5,1,[],1,2,2010-10-19T23:55:27Z\n")
    message = error(settings("gowalla"))
    assert "ca.csv, line 2: category '[]' has no name" in message
    Path("ca.csv").unlink()
    assert "generate_ca_raw.py" in error(Path("best_conf/city.yml"))


@pytest.mark.parametrize("cut", [20, -8])
def test_a_truncated_gz(settings, cut):
    data = gzip.compress((CSV + GOOD * 5000).encode())
    Path("raw.csv.gz").write_bytes(data[:cut])
    assert "raw.csv.gz: cannot be read to its end" in error(settings("csv"))
