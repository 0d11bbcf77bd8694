"""Full attention with right padding: SDPA by causality alone (`RIGHT_PADDED`, as stage 2 trains) against with a mask.

    python benchmarks/right_padding.py

A forward and backward of a random Llama with SmolLM2-135M's heads, of fewer layers, under bf16 autocast, on batches of
4,096 tokens at most, of which 7 % are padding. Both sides run in turn; the ratio is of their median times.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaModel  # noqa: E402

from ga_llm.llm.right_padding import RIGHT_PADDED  # noqa: E402

TOKENS, PADDING = 4096, 0.07
SIDES = {"with a mask": "sdpa", "by causality": RIGHT_PADDED}


def batch(length: int, device: str):
    """Token ids (B, S), the longest pair of `length` tokens, and its mask."""
    mask = torch.ones(TOKENS // length, length, dtype=torch.long, device=device)
    shorter = mask[1:] if len(mask) > 1 else mask       # the longest pair has no padding, unless it is alone
    shorter[:, length - round(PADDING * mask.numel() / len(shorter)):] = 0
    return torch.randint(100, mask.shape, device=device), mask


def seconds(model, tokens, mask) -> float:
    started = time.perf_counter()
    with torch.autocast(tokens.device.type, torch.bfloat16):
        model(tokens, attention_mask=mask).last_hidden_state[mask.bool()].sum().backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = LlamaModel(LlamaConfig(vocab_size=100, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                                   num_key_value_heads=3, num_hidden_layers=args.layers, use_cache=False))
    model.to(args.device).train()
    print(f"{'pairs of':>10}{'with a mask s':>15}{'by causality s':>16}{'ratio':>8}")
    for length in args.lengths:
        tokens, mask = batch(length, args.device)
        took = {side: [] for side in SIDES}
        for turn in range(args.rounds + 1):
            for side in list(SIDES)[::-1 if turn % 2 else 1]:
                model.set_attn_implementation(SIDES[side])
                took[side].append(seconds(model, tokens, mask))
        masked, causal = (statistics.median(took[side][1:]) for side in SIDES)      # the first of each warms up
        print(f"{length:10}{masked:15.3f}{causal:16.3f}{masked / causal:8.2f}", flush=True)


if __name__ == "__main__":
    main()
