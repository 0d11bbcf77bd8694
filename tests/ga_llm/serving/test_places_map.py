"""The map of recommended places."""
import json
import re

import pytest

pytest.importorskip("folium")

from ga_llm.serving import places_map  # noqa: E402


def place(longitude: float, rank: int = 1) -> dict:
    return {"rank": rank, "id": "1", "category": "Bar", "probability": 0.5, "km": 1.0, "latitude": -17.0,
            "longitude": longitude, "time": "2012"}


def drawn(found, past) -> tuple[list, list]:
    """The corners of the view, and where markers and circles stand."""
    page = places_map.draw(found, past, "Where?")
    corners, = re.findall(r"fitBounds\(\s*(\[\[.*?\]\])", page, re.DOTALL)
    return json.loads(corners), [json.loads(at) for at in re.findall(r"L\.(?:circleM|m)arker\(\s*(\[.*?\])", page)]


@pytest.mark.parametrize("past, found", [(179.99, -179.98), (-179.98, 179.99), (180.0, -180.0)])
def test_neighbours_across_180_degrees_stand_side_by_side(past, found):
    ((_, west), (_, east)), points = drawn([place(found), place(past, 2)], [place(past)])
    assert 0 <= east - west < 0.031 and sorted({longitude for _, longitude in points}) == sorted({west, east})
    assert sorted(longitude % 360 for _, longitude in points[1:]) == pytest.approx(sorted([past % 360, found % 360]))


def test_elsewhere_nothing_is_turned():
    corners, points = drawn([place(-73.9)], [place(-74.1)])
    assert corners == [[-17, -74.1], [-17, -73.9]] and points == [[-17, -74.1], [-17, -73.9]]
