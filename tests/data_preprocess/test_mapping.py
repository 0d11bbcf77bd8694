"""Where a POI lies: the mean of its check-ins on a globe, also where degrees jump."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from checkins import mapping

HEADER = "user,poi,category,lat,lon,time\n"


def mean(*points: tuple[float, float]) -> list[float]:
    """Of one POI's check-ins (latitude, longitude)."""
    train = pd.DataFrame(points, columns=["Latitude", "Longitude"]).assign(PoiId=7)
    return mapping.places(train)[["Latitude", "Longitude"]].iloc[0].tolist()


@pytest.mark.parametrize("longitudes, expected", [
    ([179.9, -179.9, -179.7], -179.9), ([-179.9, 179.9, 179.7], 179.9), ([-179.5] * 3 + [178.5], 180 - 0.0),
    ([180, -180], 180), ([180, 180], 180), ([-0.3, 0.1], -0.1), ([100, -100], 180), ([170, -175], 177.5)])
def test_across_180_degrees(longitudes, expected):
    latitude, longitude = mean(*((-17.0, longitude) for longitude in longitudes))
    assert latitude == -17 and -180 <= longitude <= 180
    assert (longitude - expected + 180) % 360 - 180 == pytest.approx(0, abs=1e-9)


def test_at_the_poles():
    for pole in (90, -90):
        latitude, _ = mean(*((pole * 0.9999, longitude) for longitude in (0, 90, 180, -90)))
        assert latitude == pytest.approx(pole, abs=1e-6)
    latitude, longitude = mean((89.9, 0), (89.9, 90))      # halfway along the great circle, not along the parallel
    assert longitude == pytest.approx(45)
    assert np.tan(np.radians(90 - latitude)) == pytest.approx(np.tan(np.radians(0.1)) * np.cos(np.pi / 4))


def test_the_mean_turns_with_the_globe():
    """Wherever the globe's seam lies, and whichever order the check-ins come in."""
    random = np.random.default_rng(0)
    train = pd.DataFrame({"PoiId": random.integers(0, 50, 2000)})
    train["Latitude"] = train["PoiId"] - 25 + random.normal(0, 0.01, 2000)
    train["Longitude"] = 3.0 * train["PoiId"] + random.normal(0, 0.5, 2000)
    plain = train.groupby("PoiId")[["Latitude", "Longitude"]].mean()
    assert mapping.places(train)[["Latitude", "Longitude"]].to_numpy().tolist() == plain.to_numpy().tolist()
    for angle in range(0, 360, 7):
        moved = train.assign(Longitude=(train["Longitude"] + angle + 180) % 360 - 180).sample(frac=1, random_state=1)
        found = mapping.places(moved)
        assert found["Longitude"].between(-180, 180).all()
        np.testing.assert_allclose(found["Latitude"], plain["Latitude"], atol=1e-9)
        apart = (found["Longitude"].to_numpy() - plain["Longitude"].to_numpy() - angle + 180) % 360 - 180
        np.testing.assert_allclose(apart, 0, atol=1e-9)


def test_the_mapping_that_run_writes(settings, script):
    start = pd.Timestamp("2024-01-01")
    rows = [f"u,p,k,-16.8,{'179.999' if hour % 2 else '-179.999'},{start + hour * pd.Timedelta('1h')}"
            for hour in range(40)]
    Path("raw.csv").write_text(HEADER + "\n".join(rows) + "\n")
    script("run.py", "-f", str(settings("csv")))
    place, = pd.read_csv("datasets/city/preprocessed/city_gps_mapping.csv").to_dict("records")
    assert place["GPS_id"] == 1 and abs(place["Longitude"]) == pytest.approx(180) and place["Latitude"] == -16.8
