"""Train, validation and test by time."""
import numpy as np
import pandas as pd

from ga_llm.base.artifacts import SPLITS


def by_time(check_ins: pd.DataFrame, split_at: list[float]) -> pd.DataFrame:
    """Add the column Split: of n check-ins in time order, train ends at int(n·0.8), validation at int(n·0.9).

    check_ins: in (time, raw-file) order. split_at: the two shares, (0.8, 0.9) in the paper.
    """
    n = len(check_ins)
    cuts = [int(n * share) for share in split_at]
    return check_ins.assign(Split=np.repeat(SPLITS, np.diff([0, *cuts, n])))
