"""What the pointer costs: a stage-2 step with it against the same step without, at SmolLM2-135M's shape.

    python benchmarks/pointer.py

Random weights; check-ins in two tokens, the loss on every check-in's place, forward and backward in bf16 autocast where
the CPU has it. Both sides take turns in one run, the median of the steps counts. The limit that docs/pointer.md claims:
10 % more time. The exit code is 1 if it is missed.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import ga_llm  # noqa: E402, F401 (before transformers, which it prepares for)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import send_to_device  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from ga_llm.llm import pointing  # noqa: E402
from ga_llm.llm.pointer import Pointer, PointerConfig  # noqa: E402
from ga_llm.pairs.check_ins import Shown  # noqa: E402
from ga_llm.pairs.sft_data import AnswerCollator  # noqa: E402
from ga_llm.training.arguments import cpu_has_bf16  # noqa: E402
from geo_encoder.gps_tokens import GPSMapping  # noqa: E402

LIMIT = 1.1
PLACES, WORDS = 5000, 49152
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def check_in_pairs(count: int, check_ins: int, words: int, places: int, seed: int = 0) -> list[dict]:
    """As `PointedPairs` gives them: <TIME n><GPS n> for each check-in, the last one's place being the answer."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        place = draw.integers(0, places, check_ins)
        ids = np.stack([draw.integers(0, words, check_ins), words + place], axis=1).ravel()
        targets = np.tile([False, True], check_ins)
        second = 1333476009 + draw.exponential(30000, check_ins).astype(np.int64).cumsum()
        at = np.arange(1, 2 * check_ins - 1, 2)
        found.append({"input_ids": ids, "answer_start": len(ids) - 1, "targets": targets,
                      "shown": Shown.of(second, place, np.arange(check_ins) // 5, at),
                      "asked": pointing.asked(targets, at)})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--check_ins", type=int, default=128, help="of each pair")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--layers", type=int, default=30, help="fewer, for a look")
    args = parser.parse_args()
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "num_hidden_layers": args.layers}, vocab_size=WORDS + PLACES))
    draw = np.random.default_rng(1)
    mapping = GPSMapping(np.arange(PLACES), 40 + draw.random(PLACES), -74 + draw.random(PLACES))
    pointing.attach(llm, Pointer(PointerConfig(llm.config.hidden_size), mapping))
    llm.train().to(args.device)
    batch = pointing.PointedCollator(AnswerCollator(0), PLACES)(
        check_in_pairs(args.pairs, args.check_ins, WORDS, PLACES))
    batch = send_to_device(batch, args.device)
    sides = {"without the pointer": {name: value for name, value in batch.items() if name != "pointer"},
             "with the pointer": batch}
    seconds = {name: [] for name in sides}
    for step in range(args.steps + 1):
        for name, inputs in sides.items():
            llm.zero_grad()
            began = time.perf_counter()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda" or cpu_has_bf16()):
                loss = llm(**inputs).loss
            loss.backward()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if step:        # the first warms up
                seconds[name].append(time.perf_counter() - began)
    tokens = batch["input_ids"].numel()
    print(f"{args.layers} layers of SmolLM2-135M's width, {args.pairs} pairs of {args.check_ins} check-ins, {tokens} "
          f"tokens; median of {args.steps} steps in turn, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        print(f"{name:24}{statistics.median(values):8.2f} s {tokens / statistics.median(values):10,.0f} tokens/s")
    plain, pointed = (statistics.median(values) for values in seconds.values())
    print(f"ratio {pointed / plain:.3f}, limit {LIMIT}: {'met' if pointed / plain <= LIMIT else 'missed'}")
    sys.exit(pointed / plain > LIMIT)


if __name__ == "__main__":
    main()
