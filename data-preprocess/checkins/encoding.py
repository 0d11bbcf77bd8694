"""Raw users, POIs and categories → ids."""
import dataclasses

import numpy as np
import pandas as pd


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The distinct values of one column in sorted order; value i has the id `first_id + i`.

    first_id 0 (nyc): ids 0…n-1, unseen values n. first_id 1 (tky, ca): ids 1…n, unseen values 0.
    """

    values: pd.Index
    first_id: int

    @classmethod
    def fit(cls, column: pd.Series, first_id: int) -> "Encoding":
        return cls(pd.Index(column.unique()).sort_values(), first_id)

    @property
    def unseen(self) -> int:
        return len(self.values) if self.first_id == 0 else 0

    @property
    def last_id(self) -> int:
        return self.first_id + len(self.values) - 1

    def encode(self, column: pd.Series) -> np.ndarray:
        """Ids (int64), in the column's order."""
        position = self.values.get_indexer(column)
        return np.where(position < 0, self.unseen, position + self.first_id)

    def to_json(self) -> dict:
        return {"first_id": self.first_id, "unseen": self.unseen, "values": self.values.tolist()}
