"""The types of flags that several scripts share."""
import argparse
from pathlib import Path

import pytest

from ga_llm.base.cli import listed, whole_number


def test_lists_have_commas_between():
    """Of files (--compare), of numbers (--seeds)."""
    assert listed(Path)("a/x,b/x") == [Path("a/x"), Path("b/x")]
    assert listed(whole_number(0))("1,0,23") == [1, 0, 23]
    for text in ("", "a,", "a,,b", "a,b,a"):
        with pytest.raises(argparse.ArgumentTypeError, match="different ones with commas between"):
            listed(Path)(text)
    for text in ("1,x", "1, -2", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 0"):
            listed(whole_number(0))(text)
