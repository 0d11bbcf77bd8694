"""How a value from a stranger's file is shown in a message of one line."""
import reprlib

import numpy as np


class _Short(reprlib.Repr):
    """Like repr, but never long, whatever is inside what."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict = 2, 4, 4
        self.maxstring = self.maxother = 80

    def repr_int(self, value, level):
        return repr(value) if abs(value) < 10 ** 40 else "a huge number"     # Python refuses to write the hugest


def short(value) -> str:
    """`value` as Python writes it, cut to at most some hundred characters."""
    return _SHORT.repr(value.item() if isinstance(value, np.generic) else value)


_SHORT = _Short()
