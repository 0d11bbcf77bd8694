"""Command lines of the training scripts: the paper's README flags, today's transformers, and this machine.

A flag that transformers has renamed or dropped stays accepted, and what the machine lacks is replaced; either way one
line says so.
"""
import dataclasses
import difflib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_tensorboard_available

from ga_llm import checkpoints
from ga_llm.artifacts import require
from ga_llm.cli import UserError, boolean

log = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",     # a fraction below 1 is a share of all steps there
    "gradient_checkpointing": "activation_checkpointing",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
GONE = {
    "overwrite_output_dir": "an existing --output_dir is continued only with --resume_from_checkpoint",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR instead",
}


@dataclasses.dataclass
class SFTArguments(TrainingArguments):
    """What both stages take beside transformers' own TrainingArguments."""
    model_name_or_path: str = dataclasses.field(default=None, metadata={"help": "folder of the base LLM"})
    data_path: str = dataclasses.field(default=None, metadata={"help": "JSON array of {question, answer}"})
    gps_mapping_path: str = dataclasses.field(default=None, metadata={"help": "<ds>_gps_mapping.csv"})
    cache_dir: str | None = None
    model_max_length: int = dataclasses.field(default=32768, metadata={"help": "tokens; longer pairs lose their start"})
    use_flash_attn: bool = dataclasses.field(default=True, metadata={"help": "flash-attn where it is installed"})
    use_full_attn: bool = dataclasses.field(default=False, metadata={"help": "full attention instead of S²-Attn"})
    shared_prefix: bool = dataclasses.field(default=False, metadata={"help": "pairs that begin alike are one tree"})
    tree_tokens: int = dataclasses.field(
        default=0, metadata={"help": "with --shared_prefix: tokens of a tree at most; 0: twice --model_max_length"})
    load_in_4bit: bool = dataclasses.field(default=True, metadata={"help": "base in NF4 where bitsandbytes runs"})
    low_rank_training: bool = dataclasses.field(default=True, metadata={"help": "False trains all of the LLM"})

    dry_run: bool = dataclasses.field(default=False, metadata={"help": "check, run three steps, print a plan"})

    activation_checkpointing: bool = True
    remove_unused_columns: bool = False
    report_to: str = "none"

    def __post_init__(self):
        # The reentrant kind needs inputs with a gradient, which a frozen base does not have.
        self.activation_checkpointing_kwargs = {"use_reentrant": False}
        self.ddp_find_unused_parameters = False
        self.dataloader_pin_memory = torch.cuda.is_available()
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()
        if self.dry_run:    # before DeepSpeed's configuration is filled in
            self.planned_accumulation_steps, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
            self.save_strategy, self.logging_strategy, self.report_to = "no", "no", "none"
        super().__post_init__()
        if self.deepspeed:
            import deepspeed
            # On a CPU transformers starts torch's processes alone, and ZeRO-3 would count one where it cuts the model.
            deepspeed.init_distributed()


def parse(arguments_class: type[SFTArguments], argv: list[str] | None = None) -> SFTArguments:
    """Parse a training command line. Raises UserError for a flag that is unknown or cannot be honoured."""
    flags = _pairs(sys.argv[1:] if argv is None else argv)
    flags = _fit_to_machine(_modernise(flags))
    parser = HfArgumentParser(arguments_class)
    known = {name for action in parser._actions for name in action.option_strings}
    for flag, _ in flags:
        if f"--{flag}" not in known:
            close = difflib.get_close_matches(f"--{flag}", known, n=1)
            raise UserError(f"--{flag}: unknown flag" + (f"; did you mean {close[0]}?" if close else "; see --help"))
    parser.error = _raise
    try:
        args, = parser.parse_args_into_dataclasses([part for flag, values in flags for part in (f"--{flag}", *values)])
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None
    _check(args)
    if args.dry_run:
        # Trainer makes its folder; the planned one stays as it is.
        args.scratch = tempfile.TemporaryDirectory(prefix="dry-run-")
        args.planned_output_dir, args.output_dir = args.output_dir, args.scratch.name
    return args


def _raise(message: str):
    raise UserError(message)


def _pairs(argv: list[str]) -> list[tuple[str, list[str]]]:
    """["--a", "1", "--b=2"] to [("a", ["1"]), ("b", ["2"])]."""
    pairs = []
    for part in argv:
        if part.startswith("--"):
            flag, equals, value = part[2:].partition("=")
            pairs.append((flag, [value] if equals else []))
        elif not pairs:
            raise UserError(f"{part!r}: flags start with --, see --help")
        else:
            pairs[-1][1].append(part)
    return pairs


def _modernise(flags):
    result = []
    for flag, values in flags:
        if flag in RENAMED:
            log.info("--%s is --%s in this version of transformers", flag, RENAMED[flag])
            result.append((RENAMED[flag], values))
        elif flag in GONE:
            log.info("--%s no longer exists: %s", flag, GONE[flag])
        elif flag == "group_by_length":
            if _is_true(values):
                log.info("--group_by_length is --train_sampling_strategy group_by_length now")
                result.append(("train_sampling_strategy", ["group_by_length"]))
        elif flag == "fsdp" and values and values[0].lower() in ("true", "false"):
            if _is_true(values):
                result.append((flag, []))       # to transformers a flag without a value, or a name
        else:
            result.append((flag, values))
    return result


def _fit_to_machine(flags):
    """Drop or replace what this machine cannot do, with one line each."""
    if any(flag in ("help", "h") for flag, _ in flags):
        return flags
    given = dict(flags)
    if not torch.cuda.is_available():
        log.info("no GPU: training on the CPU")
        # Without it torchrun's processes would each train the whole job into one folder.
        given["use_cpu"] = ["True"]
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if _is_true(given.pop("tf32", ["False"])):
            log.info("--tf32 is for GPUs: ignored")
        for precision in ("bf16", "fp16"):
            if precision in given and _is_true(given[precision]) and not (precision == "bf16" and _cpu_has_bf16()):
                log.info("--%s: this CPU has no fast %s, training in fp32", precision, precision)
                given[precision] = ["False"]
    for flag in ("deepspeed", "fsdp"):
        if flag in given and "RANK" not in os.environ:
            raise UserError(f"--{flag}: start with `torchrun --nproc_per_node=N finetune_….py …`, not with python")
    if given.get("deepspeed"):
        if "fsdp" in given:
            raise UserError("--deepspeed and --fsdp: give one of them")
        lacks = _deepspeed_lacks()
        if lacks:
            log.info("--deepspeed ignored, plain data parallelism instead: %s", lacks)
            del given["deepspeed"]
    return list(given.items())


def _is_true(values: list[str]) -> bool:
    return not values or boolean(values[0])


def _cpu_has_bf16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _deepspeed_lacks() -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if not torch.cuda.is_available() and not (shutil.which("g++") and shutil.which("ninja")):
        return "on a CPU it compiles its communication, which needs g++ and ninja"
    return None


def _check(args: SFTArguments) -> None:
    """Everything that can be known to be wrong before the model is loaded."""
    for flag in ("model_name_or_path", "data_path", "gps_mapping_path", "output_dir"):
        if not getattr(args, flag):
            raise UserError(f"--{flag} is required")
    require(args.data_path, "python data-preprocess/process_projector_gps_stage1.py (stage 1) or process_llm_gps.py")
    require(args.gps_mapping_path, "python data-preprocess/run.py -f best_conf/<name>.yml")
    if "tensorboard" in args.report_to and not is_tensorboard_available():
        raise UserError("--report_to tensorboard: it is not installed; pip install tensorboard, or leave the flag out")
    if args.model_max_length < 16:
        raise UserError(f"--model_max_length {args.model_max_length}: too short for a question and its answer")
    if args.shared_prefix and not args.use_full_attn:
        raise UserError("--shared_prefix True: S²-Attn's groups follow from where each prompt ends, so prompts cannot "
                        "share theirs; add --use_full_attn True")
    if args.tree_tokens and not (args.shared_prefix and args.tree_tokens >= args.model_max_length):
        raise UserError(f"--tree_tokens {args.tree_tokens}: goes with --shared_prefix True, and a tree must hold a "
                        f"prompt of --model_max_length {args.model_max_length}")
    checkpoints.check_output(args)
