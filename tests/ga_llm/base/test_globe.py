"""Longitudes where they jump, and maps against the great circle."""
import numpy as np
import pytest

from ga_llm.base import globe
from ga_llm.evaluation import metrics
from geo_encoder.gps_tokens import GPSMapping


def test_turned_and_wrapped_by_hand():
    assert globe.turned(np.array([-179.0, 179, 10, -20]), 170).tolist() == [181, 179, 10, 340]
    assert globe.wrapped(np.array([181.0, -181, 180, -180, 540, 0.1])).tolist() == [-179, 179, 180, -180, -180, 0.1]


@pytest.mark.parametrize("west, east, inside", [
    (-10, 20, [-10, 0, 20]), (170, -170, [170, 180, -180, -170]), (20, -10, [-10, 20, 170, 180, -180, -170]),
    (-180, 180, [-10, 0, 20, 170, 180, -180, -170])])
def test_in_a_box(west, east, inside):
    longitude = np.array([-10.0, 0, 20, 170, 180, -180, -170])
    assert longitude[globe.in_box(np.zeros(7), longitude, -1, west, 1, east)].tolist() == inside
    assert globe.in_box(np.array([-1.01, -1, 1, 1.01]), np.zeros(4), -1, -10, 1, 20).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("longitude, expected", [
    ([7], 7), ([0, 10], 5), ([-10, 10], 0), ([170, -170], 180), ([179.9, -179.7], -179.9), ([0, 90, 180, -100], 130),
    ([180, -180], 180), ([-180, 180, -170], -175)])
def test_the_middle_of_the_shortest_arc(longitude, expected):
    found = globe.middle(np.array(longitude, dtype=float))
    assert (found - expected + 180) % 360 - 180 == pytest.approx(0, abs=1e-9) and -180 <= found <= 180


@pytest.mark.parametrize("latitude, longitude", [(40.7, -74), (-16.8, 180), (66, -179.9), (89.99, 12), (-89.995, 0),
                                                 (90, 0), (0, 0)])
def test_a_flat_map_keeps_distances_in_a_town(latitude, longitude):
    random = np.random.default_rng(0)
    north = latitude + random.uniform(-0.01, 0.01, 30)
    east = longitude + random.uniform(-0.01, 0.01, 30) / np.cos(np.radians(min(abs(latitude), 89.99)))
    over = np.abs(north) > 90       # beyond the pole it is the other side
    north, east = np.where(over, np.sign(north) * 180 - north, north), np.where(over, east + 180, east)
    points = np.column_stack([globe.wrapped(east), north])
    x, y = (globe.flat(points)(points) * np.radians(1) * metrics.EARTH_RADIUS_KM).T
    one, other = np.triu_indices(30, k=1)
    km = metrics.distances(one, other, GPSMapping(np.arange(30), points[:, 1], points[:, 0]))
    assert km.max() < 10
    np.testing.assert_allclose(np.hypot(x[one] - x[other], y[one] - y[other]), km, rtol=2e-3, atol=1e-6)


def test_a_flat_map_of_nothing_and_of_what_has_no_place():
    nothing = np.array([[np.nan, np.nan]])
    assert np.isnan(globe.flat(nothing)(nothing)).all()
    found = globe.flat(np.array([[10.0, 60], [np.nan, np.nan]]))(np.array([[10.0, 60], [np.nan, 1]]))
    assert found[0] == pytest.approx([5, 60]) and np.isnan(found[1, 0])
