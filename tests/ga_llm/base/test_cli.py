"""The types of flags that several scripts share."""
import argparse
from pathlib import Path

import pytest

from ga_llm.base.cli import Parser, UserError, listed, whole_number


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


@pytest.mark.parametrize("given, said", [
    ("--use_sim False", "unrecognized arguments: --use_sim False, perhaps for -use_sim; see python "),
    ("-use_sim False -usepam True", "unrecognized arguments: -usepam True, perhaps for -use_pam; see python "),
    ("-use_sim False nyc", "unrecognized arguments: nyc; see python ")])
def test_an_unknown_flag_is_told_with_the_one_that_it_looks_like(given, said):
    parser = Parser("a script")
    parser.add_argument("-use_sim")
    parser.add_argument("-use_pam")
    with pytest.raises(UserError) as error:
        parser.parse_args(given.split())
    assert str(error.value).startswith(said)
