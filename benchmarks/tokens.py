"""Loading a training file as tokens: the first start, which tokenizes, and every later one; time and peak memory.

    python benchmarks/tokens.py --model models/smollm2-135m

Makes a file of the size of Gowalla's CA in a temporary folder (36,374 pairs of about 10,000 tokens; users whose prompts
repeat their history as real ones do), then opens it twice, each time in a fresh process, and tokenizes every so manieth
pair as a whole, which is what loading each prompt by itself costs, and compares the ids. The limits that
docs/measured.md claims: peak memory of either start 1 GB, the second in under 5 s. The exit code is 1 if one is missed.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "data-preprocess")]

from ga_llm.base import artifacts, prompts  # noqa: E402
from ga_llm.llm import backbone  # noqa: E402
from ga_llm.pairs import sft_data, token_cache  # noqa: E402
from checkins.questions import write_json_array  # noqa: E402
from geo_encoder import gps_tokens  # noqa: E402

import numpy as np  # noqa: E402

PEAK_MB, SECOND_START_SECONDS = 1024, 5
PLACES, TRAJECTORIES, CHECK_INS = 9_690, 46, (6, 7)     # places in the city; of each user; in a trajectory


def records(pairs: int, seed: int = 0):
    """Question-answer pairs of users with growing histories, as process_llm_gps.py writes them."""
    draw = np.random.default_rng(seed)
    start = np.datetime64("2010-01-01T00:00:00")
    for user in range(1, pairs // TRAJECTORIES + 2):
        history, moment = [], start
        for _ in range(min(TRAJECTORIES, pairs)):
            current = []
            for _ in range(draw.choice(CHECK_INS)):
                moment = moment + int(draw.integers(600, 40_000))
                place = int(draw.integers(1, PLACES + 1))
                time_ = str(moment).replace("T", " ")
                name = ["Coffee Shop", "Home", "State Park", "Café"][place % 4]
                latitude, longitude = 33 + place / 1e3, -118 - place / 1e4
                current.append(prompts.check_in(prompts.FIELDS, time_, user, place, latitude, longitude, name,
                                                place % 300))
            yield {"question": prompts.question(user, [], history, current[:-1],
                                                prompts.ask_poi(time_, user, 1, PLACES)),
                   "answer": prompts.answer_poi(time_, user, place)}
            history, moment, pairs = history + current, moment + 86_400, pairs - 1


def write_city(folder: Path, pairs: int) -> None:
    with (folder / "train.json").open("wb") as file:
        write_json_array(file, records(pairs))
    rows = "".join(f"{place},{33 + place / 1e3:.6f},{-118 - place / 1e4:.6f}\n" for place in range(1, PLACES + 1))
    (folder / "mapping.csv").write_text(",".join(artifacts.GPS_COLUMNS) + "\n" + rows)


def tokenizer_of(model: str, folder: Path):
    tokenizer = backbone.load_tokenizer(model)
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(folder / "mapping.csv"))
    return tokenizer


def load(model: str, folder: Path) -> None:
    """What a fresh process does: print seconds of loading, peak memory of the process (MB), pairs and tokens."""
    tokenizer = tokenizer_of(model, folder)
    started = time.perf_counter()
    data = token_cache.load(folder / "train.json", tokenizer, 32768, folder / "mapping.csv")
    seconds = time.perf_counter() - started
    peak = next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
    print(json.dumps([seconds, int(peak) / 1024, len(data), int(data.tokens.sum())]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--pairs", type=int, default=36_374)
    parser.add_argument("--every", type=int, default=100, help="so manieth pairs are tokenized as wholes")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.model, args.load)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_city(folder, args.pairs)
        print(f"{args.pairs} pairs, {(folder / 'train.json').stat().st_size / 1e6:.0f} MB of text")
        print(f"{'':40}{'tokens':>12}{'seconds':>9}{'process s':>11}{'peak MB':>9}{'tokens/s':>12}", flush=True)
        found = {}
        for name in ("first start: each check-in once", "second start"):
            started = time.perf_counter()
            command = [sys.executable, __file__, "--model", args.model, "--load", str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            seconds, peak, pairs, tokens = json.loads(output)
            assert pairs == args.pairs
            found[name] = seconds, peak, tokens / seconds
            print(f"{name:40}{tokens:12,}{seconds:9.2f}{time.perf_counter() - started:11.2f}{peak:9.0f}"
                  f"{tokens / seconds:12,.0f}", flush=True)
        cache = sum(file.stat().st_size for file in folder.glob("tokens-*/*"))
        tokenizer = tokenizer_of(args.model, folder)
        some = {i: pair for i, pair in enumerate(sft_data.iterate_pairs(folder / "train.json")) if i % args.every == 0}
        started = time.perf_counter()
        encoded = {i: sft_data.encode(tokenizer, pair)[0] for i, pair in some.items()}
        seconds = time.perf_counter() - started
        whole = sum(map(len, encoded.values()))
        data = token_cache.load(folder / "train.json", tokenizer, 32768, folder / "mapping.csv")
        assert all(data[i]["input_ids"].tolist() == ids for i, ids in encoded.items()), "not the full text's tokens"
        print(f"{f'every {args.every}th prompt as a whole':40}{whole:12,}{seconds:9.2f}{'':20}{whole / seconds:12,.0f}")
    (first, second), peak = (found[name] for name in found), max(value[1] for value in found.values())
    print(f"\non disk: {cache / 1e6:.0f} MB. First start: {first[2] * seconds / whole:.1f} times faster than "
          "tokenizing every prompt as a whole once, which each epoch would do; the second start does not at all")
    met = peak <= PEAK_MB and second[0] <= SECOND_START_SECONDS
    print(f"limits: {PEAK_MB} MB, second start {SECOND_START_SECONDS} s: {'met' if met else 'missed'}")
    sys.exit(not met)


if __name__ == "__main__":
    main()
