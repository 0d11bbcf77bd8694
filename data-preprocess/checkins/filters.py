"""Which check-ins are left out: rare POIs, rare users, and check-ins alone in time."""
import pandas as pd

HOUR = pd.Timedelta(hours=1)


def frequent(check_ins: pd.DataFrame, min_poi_freq: int, min_user_freq: int) -> pd.DataFrame:
    """Keep POIs with more than `min_poi_freq` check-ins; then, of what is left, users with more than `min_user_freq`.

    Departure from the released code: there an inverted comparison, left in for debugging, keeps the rare ones.
    """
    check_ins = check_ins[check_ins.groupby("PoiId")["PoiId"].transform("size") > min_poi_freq]
    return check_ins[check_ins.groupby("UserId")["UserId"].transform("size") > min_user_freq]


def drop_isolated(check_ins: pd.DataFrame, hours: float) -> pd.DataFrame:
    """Drop check-ins whose neighbours of the same user are both more than `hours` away.

    check_ins: in time order. The neighbours are the user's previous and next check-in in the whole data, whatever
    their split; a user's first (last) check-in has only a next (previous) one; a user's only check-in stays.
    """
    by_user = check_ins.sort_values("UserId", kind="stable")
    user, time = by_user["UserId"], by_user["LocalTime"]
    since_previous, until_next = ((time - time.shift()) / HOUR, (time.shift(-1) - time) / HOUR)
    same_as_previous, same_as_next = user.eq(user.shift()), user.eq(user.shift(-1))
    near_previous = same_as_previous & (since_previous <= hours)
    near_next = same_as_next & (until_next <= hours)
    alone = ~same_as_previous & ~same_as_next
    keep = near_previous | near_next | alone
    return check_ins[keep.reindex(check_ins.index)]
