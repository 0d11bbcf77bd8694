"""What others have answered to our test pairs: the result files that GenUP has published, aligned with our predictions.

W. Wongso, H. Xue, F. D. Salim, GenUP, arXiv 2410.20643; the files are in `results/` of https://github.com/w11wo/GenUP.
"""
import gzip
import re
import zlib
from pathlib import Path

from ga_llm.base import json_text
from ga_llm.base.artifacts import require
from ga_llm.base.cli import UserError

MADE_BY = "git clone https://github.com/w11wo/GenUP"
SUFFIXES = (".json", ".json.gz")
ABOUT = ("GenUP's answers (arXiv 2410.20643) are sampled, one a pair. Its prompts show the current trajectory and a "
         "profile of the\nuser that an LLM wrote from the train check-ins, but not these check-ins: other prompts are "
         "compared, not models alone.")
METRICS = ("Acc@1",)    # there is no second best, and a km needs a place
# Of NYC's 1,429 pairs 1,419 stand in the same place, and the others are the same targets in another order of a user's
# trajectories. Another data set or encoding of its ids has hardly one.
LEAST_SAME = 0.95


def is_published(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def note(aligned: tuple[int, int] | None) -> str:
    """Behind a published file's name: how many of its pairs align, and of how many; nothing behind another's."""
    return "" if aligned is None else (
        f" (published; {aligned[0]:,} of its {aligned[1]:,} pairs stand in the same place as ours, the others are left "
        "out)")


def align(path: Path, ours: dict[tuple, dict], source: Path) -> tuple[dict[tuple, dict], int]:
    """({key: {"rank": 1 or None, "km": None, "top": []}} of the pairs in the same place, how many the file has).

    ours: {(pair, user, time, target): record} of `source`, as `comparison.read` gives it. GenUP left out the pairs
    that have no check-in before the target in its trajectory, and kept the order of the others. Of these, the i-th is
    in the same place if its target is that of the file's i-th.
    Raises UserError if the file is missing or damaged, or if its pairs are not ours.
    """
    predictions, targets = _read(path)
    keys = sorted(ours, key=lambda key: key[0])
    if any(ours[key]["current"] is None for key in keys):
        raise UserError(f"{source}: does not tell how many check-ins stand before each target ('current'), by which "
                        f"{path} is aligned; make it again with `python test_next_gps.py …`")
    asked = [key for key in keys if ours[key]["current"]]
    same = {key: {"rank": 1 if prediction == target else None, "km": None, "top": []}
            for key, prediction, target in zip(asked, predictions, targets) if int(target) == key[-1]}
    if len(asked) != len(targets) or len(same) < LEAST_SAME * len(targets):
        raise UserError(f"{path}: its {len(targets):,} pairs are not the {len(asked):,} of {source} that have a "
                        f"check-in before the target: {len(same):,} stand in the same place; give predictions of all "
                        "test pairs of the same data set (--protocol ga-llm, no --limit)")
    return same, len(targets)


def _read(path: Path) -> tuple[list[str], list[str]]:
    """(predictions, targets): a POI id's digits for each pair; a prediction is empty where the answer had no digit."""
    require(path, MADE_BY)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            found = json_text.loads(file.read())
        lists = [found.get(name) if isinstance(found, dict) else None for name in ("predictions", "targets")]
        if not all(isinstance(one, list) and one for one in lists) or len(lists[0]) != len(lists[1]):
            raise ValueError("no object with as many 'predictions' as 'targets'")
        for name, one, digits in zip(("predictions", "targets"), lists, ("[0-9]*", "[0-9]{1,18}")):
            for number, value in enumerate(one):
                if not (isinstance(value, str) and re.fullmatch(digits, value)):
                    raise ValueError(f"{name}[{number}] is {value!r:.40}, not a POI id in digits")
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not one of GenUP's result files ({error}); fetch it again with `{MADE_BY}`") from None
    return lists[0], lists[1]
