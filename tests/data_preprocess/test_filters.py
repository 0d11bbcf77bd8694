"""Filter and isolation against hand counts."""
import pandas as pd

from checkins import filters


def check_ins(rows):
    """(user, poi, hours) rows in time order."""
    frame = pd.DataFrame(rows, columns=["UserId", "PoiId", "hours"])
    return frame.assign(LocalTime=pd.Timestamp("2024-01-01") + pd.to_timedelta(frame["hours"], unit="h"))


def test_keeps_pois_then_users_above_the_thresholds():
    # POI a has 3 check-ins, b has 2; user 1 has 2 at a, user 2 has 1 at a (and 2 at b, which go first).
    frame = check_ins([(1, "a", 0), (1, "a", 1), (2, "a", 2), (2, "b", 3), (2, "b", 4)])
    kept = filters.frequent(frame, min_poi_freq=2, min_user_freq=1)
    assert kept.index.tolist() == [0, 1]


def test_thresholds_are_exclusive():
    frame = check_ins([(1, "a", hour) for hour in range(9)])
    assert filters.frequent(frame, 9, 0).empty and filters.frequent(frame, 0, 9).empty
    assert len(filters.frequent(frame, 8, 8)) == 9


def test_isolated_check_ins():
    # One user: 0 and 24 are near (24 h is not more than 24 h); 60 is far from both; 100 and 101 are near.
    frame = check_ins([(1, "a", hour) for hour in (0, 24, 60, 100, 101)])
    assert filters.drop_isolated(frame, 24)["hours"].tolist() == [0, 24, 100, 101]


def test_first_and_last_count_their_only_neighbour():
    frame = check_ins([(1, "a", hour) for hour in (0, 30, 31, 80)])
    assert filters.drop_isolated(frame, 24)["hours"].tolist() == [30, 31]


def test_an_only_check_in_stays_and_other_users_are_no_neighbours():
    frame = check_ins([(1, "a", 0), (2, "a", 1), (3, "a", 2), (2, "a", 90)])
    assert filters.drop_isolated(frame, 24)["UserId"].tolist() == [1, 3]


def test_two_far_apart_both_go():
    assert filters.drop_isolated(check_ins([(1, "a", 0), (1, "a", 25)]), 24).empty
