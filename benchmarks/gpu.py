"""What holds on this GPU, in about ten minutes: numbers as on a CPU, speed and memory at Llama-2-7B's shape, a result.

    python benchmarks/gpu.py [--minutes 8] [--parts numerics,llama7b,ranking,real,processes] [--dataset_name nyc]

numerics    attention, trees, pointer, ranking, NF4, injection, resuming on the card against fp32 on the CPU
llama7b     a training step of stage 2 at Llama-2-7B's shape (random weights): tokens/s, share of the card's measured
            peak, memory against --dry_run's plan; the same step written plainly with transformers and PEFT
ranking     prompts per second at that shape: exact ranking, sampling one by one, a beam search
real        the paper's recipe with a small real LLM on a real data set, then all test pairs, beside the baselines
processes   DDP, ZeRO-2, ZeRO-3 and FSDP2 with two processes against one, where there are two GPUs

Each row of the table is written to <output_dir>/gpu.json as it comes, so a run that is cut off keeps what it has
measured. A row with a limit says whether it is met; the exit code is 1 if one is missed or a part fails. A part for
which no time or no package is left says so.

`real` needs a base model (--model, by tools/get_smollm2.py) and the data set's raw files; without them it says what
to do. `--device cpu --toy` runs everything at toy sizes, to test this script.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data-preprocess"), str(ROOT / "tools"), str(Path(__file__).parent)]

from ga_llm.base import cli  # noqa: E402 (before transformers)

import torch  # noqa: E402
from transformers.utils import is_liger_kernel_available  # noqa: E402

from card import llama7b, numerics, processes, ranking, real  # noqa: E402
from card.record import Record  # noqa: E402

VARIANTS = ("compile", "liger", "compile+liger")
PARTS = {"numerics": numerics.run, "llama7b": llama7b.run, "ranking": ranking.run, "real": real.run,
         "processes": processes.run}


def arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="parts that would begin later are left out")
    parser.add_argument("--parts", "--part", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes everywhere")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--four_bit", type=cli.boolean, default=True, help="llama7b, ranking: the base in NF4")
    parser.add_argument("--variants", help="llama7b, also with: compile (--torch_compile), liger (--use_liger_kernel), "
                        "compile+liger; comma-separated; default: all that are installed, none at toy sizes")
    parser.add_argument("--profile", action="store_true", help="llama7b: the kernels of a step, in profile.txt")
    parser.add_argument("--dataset_name", default="nyc", help="real")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"), help="real: the base model")
    parser.add_argument("--context", type=cli.token_count, default=32768, help="real: tokens of a prompt at most")
    parser.add_argument("--learning_rate", default="3e-4", help="real")
    args = parser.parse_args()
    args.chosen = args.parts.split(",")
    if args.variants is None:
        args.variants = "" if args.toy else "compile,liger,compile+liger" if is_liger_kernel_available() else "compile"
    args.variants = list(filter(None, args.variants.split(",")))
    for variant in args.variants:
        if variant not in VARIANTS:
            raise cli.UserError(f"--variants {variant}: unknown; choose among {', '.join(VARIANTS)}")
    for part in args.chosen:
        if part not in PARTS:
            raise cli.UserError(f"--parts {part}: unknown; choose among {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch sees no GPU; give --device cpu --toy to try this script without one")
    if args.device == "cpu" and not args.toy:
        raise cli.UserError("--device cpu: goes with --toy, for Llama-2-7B's shape is not for a CPU")
    return args


def main():
    args = arguments()
    record = Record(args.output_dir, args.minutes, args.device)
    for part in args.chosen:
        record.attempt(part, PARTS[part], args)
    print(record.table())
    sys.exit(record.failed)


if __name__ == "__main__":
    cli.run(main)
