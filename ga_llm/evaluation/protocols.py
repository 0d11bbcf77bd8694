"""Which test pairs are asked: GA-LLM's, or STHGCN's sample of them.

Results of one protocol must not stand beside those of another: the pairs differ, and so does how hard they are.
"""
from pathlib import Path

from ga_llm.base.cli import UserError
from ga_llm.evaluation.baselines import COLUMNS, read_check_ins
from ga_llm.pairs.spelling import TestPrompt

PROTOCOLS = {
    "ga-llm": "every test trajectory (GA-LLM, LLM4POI)",
    "sthgcn": "STHGCN's sample: those whose last check-in is of a user and a POI that train has behind a trajectory's "
              "first check-in",
}


def select(protocol: str, test_prompts: list[TestPrompt], sample_path: Path) -> list[TestPrompt]:
    """The prompts that `protocol`, one of `PROTOCOLS`, asks. sample_path: the data set's sample.csv.

    Raises UserError if STHGCN's sample is asked for and a prompt does not name its user and time, or the file is
    missing.
    """
    if protocol == "ga-llm":
        return list(test_prompts)
    asked = sthgcn_sample(sample_path)
    return [prompt for prompt in test_prompts if _key(prompt) in asked]


def sthgcn_sample(sample_path: Path) -> set[tuple[int, str, int]]:
    """(user, local time, POI) of STHGCN's test targets.

    It trains and tests on check-ins that have one before them in their trajectory; in test, on a trajectory's last
    alone, and only if its user and its POI are among what it trains on. A trajectory is one of the raw data: where
    the split has cut it, what lies before the cut counts, as do check-ins of POIs that train does not have.
    """
    rows = read_check_ins(sample_path, [*COLUMNS, "LocalTime", "Split"])
    is_first = ~rows.duplicated("TrajectoryId")
    is_last = ~rows.duplicated("TrajectoryId", keep="last")
    trained = rows[(rows["Split"] == "train") & ~is_first]
    asked = rows[(rows["Split"] == "test") & is_last & ~is_first
                 & rows["UserId"].isin(trained["UserId"]) & rows["PoiId"].isin(trained["PoiId"])]
    return set(zip(asked["UserId"].tolist(), asked["LocalTime"].tolist(), asked["PoiId"].tolist()))


def _key(prompt: TestPrompt) -> tuple[int, str, int]:
    key = (prompt.user, prompt.time, prompt.target)
    if None in key:
        raise UserError(f"line {prompt.pair + 1} of the test file names no user or no time, which --protocol sthgcn "
                        "needs; make the questions with process_llm_gps.py")
    return key
