"""Which test pairs are asked: GA-LLM's, or those of them that LLM4POI or STHGCN ask.

Results of one protocol must not stand beside those of another: the pairs differ, and so does how hard they are.
"""
from pathlib import Path

from ga_llm.base.cli import UserError, whole_number
from ga_llm.base.reading import read_json
from ga_llm.evaluation.baselines import COLUMNS, read_check_ins, read_known
from ga_llm.pairs.sft_data import drawn
from ga_llm.pairs.spelling import TestPrompt

PUBLISHED = {"ga-llm": "trajectories"}      # what stats.json calls a protocol's number of pairs, if not by its name
PROTOCOLS = {
    "ga-llm": "every test trajectory",
    "llm4poi": "those with a history and a check-in before the target (LLM4POI, GenUP)",
    "sthgcn": "STHGCN's sample: those whose last check-in is of a user and a POI that train has behind a trajectory's "
              "first check-in",
}


def add_flags(parser) -> None:
    """The flags that say which pairs are asked."""
    parser.add_argument("--protocol", choices=PROTOCOLS, default="ga-llm",
                        help="; ".join(f"{name}: {asked}" for name, asked in PROTOCOLS.items()))
    parser.add_argument("--limit", type=whole_number(1), help="only the first so many pairs")
    parser.add_argument("--draw", type=whole_number(1), help="only so many pairs, drawn, always the same")


def draw(test_prompts: list[TestPrompt], some: int | None) -> list[TestPrompt]:
    """`some` of the prompts, as --draw says; None: all."""
    return [test_prompts[i] for i in drawn(len(test_prompts), some or 0)]


def select(protocol: str, test_prompts: list[TestPrompt], sample_path: Path) -> list[TestPrompt]:
    """The prompts that `protocol`, one of `PROTOCOLS`, asks. sample_path: the data set's sample.csv.

    Raises UserError if a sample of these is asked for and a prompt does not name its user and time, or the file is
    missing.
    """
    if protocol == "ga-llm":
        return list(test_prompts)
    asked = {"llm4poi": llm4poi_sample, "sthgcn": sthgcn_sample}[protocol](sample_path)
    return [prompt for prompt in test_prompts if _key(prompt, protocol) in asked]


def published(stats: Path, protocol: str, split: str) -> int | None:
    """How many pairs others have published results of, by the data set's stats.json; None where that does not say."""
    if not stats.exists():
        return None
    found = read_json(stats).get("published")
    counts = found.get(split) if isinstance(found, dict) else None
    return counts.get(PUBLISHED.get(protocol, protocol)) if isinstance(counts, dict) else None


def llm4poi_sample(sample_path: Path) -> set[tuple[int, str, int]]:
    """(user, local time, POI) of the targets in LLM4POI's and GenUP's files: its pairs have both parts in the prompt.

    So a trajectory has a check-in before its target, and its user one in train before it begins.
    """
    rows = read_known(sample_path, ["LocalTime"])
    known_since = rows[rows["Split"] == "train"].groupby("UserId")["LocalTime"].min()
    rows = rows[rows["Split"] != "train"]
    part = rows.groupby(["TrajectoryId", "Split"], sort=False)
    is_last = ~rows.duplicated(["TrajectoryId", "Split"], keep="last")
    begins, count = part["LocalTime"].transform("first"), part["LocalTime"].transform("size")
    asked = rows[is_last & (count > 1) & (rows["UserId"].map(known_since) < begins)]
    return set(zip(asked["UserId"].tolist(), asked["LocalTime"].tolist(), asked["PoiId"].tolist()))


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


def _key(prompt: TestPrompt, protocol: str) -> tuple[int, str, int]:
    key = (prompt.user, prompt.time, prompt.target)
    if None in key:
        raise UserError(f"line {prompt.pair + 1} of the test file names no user or no time, which --protocol "
                        f"{protocol} needs; make the questions with process_llm_gps.py")
    return key
