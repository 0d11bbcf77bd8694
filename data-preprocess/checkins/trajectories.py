"""Trajectories: a user's check-ins without a long gap. All numbers are given in (user, time) order, over all splits."""
import pandas as pd

MINUTE = pd.Timedelta(minutes=1)


def by_gap(check_ins: pd.DataFrame, minutes: float) -> pd.Series:
    """TrajectoryId of each check-in: a new one at a new user and after a gap of more than `minutes`.

    check_ins: in time order. A trajectory that a split's border cuts keeps one id on both sides.
    """
    by_user = check_ins.sort_values("UserId", kind="stable")
    user, time = by_user["UserId"], by_user["LocalTime"]
    starts = user.ne(user.shift()) | ((time - time.shift()) / MINUTE > minutes)
    return (starts.cumsum() - 1).reindex(check_ins.index)


def by_name(check_ins: pd.DataFrame) -> pd.Series:
    """TrajectoryId from GETNext's trajectory_id.

    The same text in two files is one trajectory that the split has cut (ten in NYC's validation and test files, each
    the same user, the second part after the first).
    """
    by_user = check_ins.sort_values("UserId", kind="stable")
    return by_user.groupby(["UserId", "Trajectory"], sort=False).ngroup().reindex(check_ins.index)


def drop_single(check_ins: pd.DataFrame) -> pd.DataFrame:
    """Drop trajectories of one check-in, counted over all splits, and number the others 0, 1, 2, …"""
    kept = check_ins[check_ins.groupby("TrajectoryId")["TrajectoryId"].transform("size") > 1]
    return kept.assign(TrajectoryId=pd.factorize(kept["TrajectoryId"], sort=True)[0])
