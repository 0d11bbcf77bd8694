"""Split by time and trajectories against hand counts."""
import pandas as pd

from checkins import splits, trajectories


def check_ins(rows, **columns):
    frame = pd.DataFrame(rows, columns=["UserId", "minutes"])
    return frame.assign(LocalTime=pd.Timestamp("2024-01-01") + pd.to_timedelta(frame["minutes"], unit="min"), **columns)


def test_split_cuts_at_int_of_the_shares():
    for n, expected in ((10, [8, 1, 1]), (11, [8, 1, 2]), (4, [3, 0, 1])):    # int(8.8), int(9.9); int(3.2), int(3.6)
        split = splits.by_time(pd.DataFrame({"row": range(n)}), [0.8, 0.9])["Split"]
        assert [int((split == name).sum()) for name in ("train", "validate", "test")] == expected
        assert split.tolist() == sorted(split, key=["train", "validate", "test"].index)


def test_a_gap_above_the_limit_or_another_user_starts_a_trajectory():
    # In time order; user 1: 0, 1440 (gap 1440: the same), 2881 (gap 1441: new); user 2: 5, 10.
    frame = check_ins([(1, 0), (2, 5), (2, 10), (1, 1440), (1, 2881)])
    assert trajectories.by_gap(frame, 1440).tolist() == [0, 2, 2, 0, 1]


def test_numbers_follow_user_then_time():
    frame = check_ins([(7, 0), (3, 1), (7, 5000), (3, 9000)])
    assert trajectories.by_gap(frame, 1440).tolist() == [2, 0, 3, 1]


def test_one_name_in_two_files_is_one_trajectory():
    frame = check_ins([(2, 0), (1, 1), (2, 2), (1, 3), (1, 4)], Trajectory=["2_1", "1_1", "2_1", "1_2", "1_2"])
    assert trajectories.by_name(frame).tolist() == [2, 0, 2, 1, 1]


def test_single_check_ins_are_counted_over_all_splits():
    frame = check_ins([(1, 0), (1, 1), (2, 2), (3, 3), (3, 4)], TrajectoryId=[0, 0, 1, 2, 2],
                      Split=["train", "train", "train", "train", "test"])
    kept = trajectories.drop_single(frame)
    assert kept["UserId"].tolist() == [1, 1, 3, 3]
    assert kept["TrajectoryId"].tolist() == [0, 0, 1, 1]
