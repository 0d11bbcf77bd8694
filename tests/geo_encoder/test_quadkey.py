"""Quadkeys against an independent library, and at the map's edges."""
import numpy as np
import pytest

from geo_encoder.quadkey import quadkeys

pyquadkey2 = pytest.importorskip("pyquadkey2.quadkey")


def texts(latitude, longitude, level):
    return ["".join(map(str, row)) for row in quadkeys(latitude, longitude, level)]


@pytest.mark.parametrize("level", [1, 6, 24, 25, 26])
def test_equal_to_pyquadkey2_on_random_points(level):
    random = np.random.default_rng(level)
    latitude, longitude = random.uniform(-85, 85, 2000), random.uniform(-180, 180, 2000)
    expected = [pyquadkey2.from_geo((lat, lon), level).key for lat, lon in zip(latitude, longitude)]
    assert texts(latitude, longitude, level) == expected


def test_poles_and_antimeridian():
    latitude, longitude = [90, -90, 85.05112878, -85.05112878, 0, 0, 0], [0, 0, 180, -180, 180, -180, 0]
    keys = texts(latitude, longitude, 25)
    expected = [pyquadkey2.from_geo((np.clip(lat, -85.05112878, 85.05112878), lon), 25).key
                for lat, lon in zip(latitude, longitude)]
    assert keys == expected
    assert keys[0][0] in "01" and keys[1][0] in "23"     # north is up
    assert keys[4][0] in "13" and keys[5][0] in "02"   # 180° east, 180° west


def test_documented_example():
    """Bing Maps' documentation: tile (3, 5) of level 3 has the quadkey 213."""
    longitude = (3 + 0.5) / 8 * 360 - 180
    latitude = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * (5 + 0.5) / 8))))
    assert texts([latitude], [longitude], 3) == ["213"]


def test_shape_and_type():
    digits = quadkeys(np.zeros(4), np.zeros(4))
    assert digits.shape == (4, 25) and digits.dtype == np.uint8
