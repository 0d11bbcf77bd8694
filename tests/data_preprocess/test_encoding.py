"""Ids of both schemes, and the mapping by id."""
import pandas as pd

from checkins import mapping
from checkins.encoding import Encoding


def test_ids_from_zero():
    encoding = Encoding.fit(pd.Series(["b", "c", "a", "b"]), first_id=0)
    assert encoding.encode(pd.Series(["a", "b", "c", "zoo"])).tolist() == [0, 1, 2, 3]
    assert (encoding.unseen, encoding.last_id) == (3, 2)


def test_ids_from_one():
    encoding = Encoding.fit(pd.Series([30, 4, 100]), first_id=1)
    assert encoding.encode(pd.Series([4, 30, 100, 5])).tolist() == [1, 2, 3, 0]    # numbers sort as numbers
    assert (encoding.unseen, encoding.last_id) == (0, 3)
    assert encoding.to_json() == {"first_id": 1, "unseen": 0, "values": [4, 30, 100]}


def test_mapping_is_the_mean_of_each_pois_check_ins():
    train = pd.DataFrame({"PoiId": [2, 1, 2], "Latitude": [40.0, 10.0, 41.0], "Longitude": [-73.0, 5.0, -74.0]})
    places = mapping.places(train)
    assert places.to_numpy().tolist() == [[1, 10.0, 5.0], [2, 40.5, -73.5]]
    assert places.columns.tolist() == ["GPS_id", "Latitude", "Longitude"]
