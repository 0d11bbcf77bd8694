"""Command lines of the training scripts: the paper's README flags, today's transformers, and this machine.

A flag that transformers has renamed or dropped stays accepted, and what the machine lacks is replaced; either way one
line says so.
"""
import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from ga_llm.base.artifacts import require
from ga_llm.base.cli import LEAST_TOKENS, MOST_TOKENS, UserError, boolean
from ga_llm.pairs import sft_data
from ga_llm.training import building, losses, resuming, validation

log = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",     # a fraction below 1 is a share of all steps there
    "gradient_checkpointing": "activation_checkpointing",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
AT_LEAST = {        # what transformers would divide by, or takes for another value than the one given
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                     "lora_r", "lora_alpha", "save_total_limit", "early_stopping_patience"), 1),
    **dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm", "lora_dropout", "dropout",
                     "dataloader_num_workers", "label_smoothing_factor", "neftune_noise_alpha", "adam_epsilon",
                     "adam_beta1", "adam_beta2", "tree_tokens", "batch_tokens", "seed", "data_seed", "eval_limit",
                     "eval_ranked", "eval_delay"), 0),
}
ABOVE_0 = ("num_train_epochs", "learning_rate", "save_steps", "eval_steps", "logging_steps", "ddp_timeout")
BELOW = {**dict.fromkeys(("lora_dropout", "dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"), 1),
         "seed": 2**32, "data_seed": 2**32}
GONE = {
    "overwrite_output_dir": "an existing --output_dir is continued only with --resume_from_checkpoint",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 always end a run after its step, with a checkpoint",
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
    batch_tokens: int = dataclasses.field(
        default=0, metadata={"help": "tokens of a batch at most, instead of --per_device_train_batch_size pairs"})
    loss_on: Literal["answer", "poi_ids"] = dataclasses.field(
        default="answer", metadata={"help": "the answer (paper), or every POI id of a pair, in its prompt, too"})
    encode_each: bool = dataclasses.field(
        default=False, metadata={"help": "encode every <GPS n> by itself, not each place of a batch once: own dropout"})
    load_in_4bit: bool = dataclasses.field(default=True, metadata={"help": "base in NF4 where bitsandbytes runs"})
    low_rank_training: bool = dataclasses.field(default=True, metadata={"help": "False trains all of the LLM"})
    init_from: str | None = dataclasses.field(
        default=None, metadata={"help": "a checkpoint-N whose weights alone this run starts from"})

    eval_data_path: str | None = dataclasses.field(
        default=None, metadata={"help": "validation questions, with --eval_strategy (default: those of --data_path)"})
    eval_limit: int = dataclasses.field(default=0, metadata={"help": "their loss on so many, drawn; 0: on all"})
    per_device_eval_batch_size: int | None = dataclasses.field(default=None, metadata={"help": "default: training's"})
    early_stopping_patience: int | None = dataclasses.field(
        default=None, metadata={"help": "stop when so many evaluations in a row have not been better"})

    dry_run: bool = dataclasses.field(default=False, metadata={"help": "check, run three steps, print a plan"})

    activation_checkpointing: bool = True
    remove_unused_columns: bool = False
    report_to: str = "none"

    def __post_init__(self):
        # The reentrant kind needs inputs with a gradient, which a frozen base does not have.
        self.activation_checkpointing_kwargs = {"use_reentrant": False}
        if not hasattr(TrainingArguments, "activation_checkpointing"):      # transformers 5.17: it has another name
            self.gradient_checkpointing = self.activation_checkpointing
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        self.ddp_find_unused_parameters = False
        self.dataloader_pin_memory = torch.cuda.is_available()
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        self.evaluates = str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"
        if self.evaluates and not self.eval_steps:      # transformers: --logging_steps, each step in our commands
            self.eval_steps = self.save_steps
        validation.check_steps(self)
        if self.dry_run:    # before DeepSpeed's configuration is filled in
            self.planned_accumulation_steps, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
            self.save_strategy, self.logging_strategy, self.report_to = "no", "no", "none"
            self.eval_strategy, self.load_best_model_at_end = "no", False
        if self.batch_tokens:       # an item of the data is a batch
            self.per_device_train_batch_size = self.per_device_eval_batch_size = 1
        # The layers' parts are compiled by us, one by one: transformers would compile the model as a whole.
        options = {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode}
        self.compile_options = {name: value for name, value in options.items() if value}
        self.compiles_layers = self.torch_compile or bool(self.compile_options)
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if self.use_liger_kernel and not self.liger_kernel_config:
            # Our logits are those of the answer alone, so that the fused loss has nothing to save.
            self.liger_kernel_config = {"fused_linear_cross_entropy": False}
        super().__post_init__()
        if self.deepspeed:
            import deepspeed
            # On a CPU transformers starts torch's processes alone, and ZeRO-3 would count one where it cuts the model.
            deepspeed.init_distributed()


def parse(arguments_class: type[SFTArguments], argv: list[str] | None = None, required: Sequence[str] = ()
          ) -> SFTArguments:
    """Parse a training command line; `required`: flags that this script needs beside those that all do.

    Raises UserError for a flag that is unknown or cannot be honoured.
    """
    flags = _pairs(sys.argv[1:] if argv is None else argv)
    flags = _fit_to_machine(_modernise(flags))
    parser = HfArgumentParser(arguments_class)
    known = {name for action in parser._actions for name in action.option_strings}
    for flag, _ in flags:
        if f"--{flag}" not in known:
            close = difflib.get_close_matches(f"--{flag}", known, n=1)
            raise UserError(f"--{flag}: unknown flag" + (f"; did you mean {close[0]}?" if close else "; see --help"))
    parser.error = _raise
    args = _parse(parser, flags)
    _check(args, required)
    if args.dry_run:
        # Trainer makes its folder; the planned one stays as it is.
        args.scratch = tempfile.TemporaryDirectory(prefix="dry-run-")
        args.planned_output_dir, args.output_dir = args.output_dir, args.scratch.name
    return args


def _parse(parser: HfArgumentParser, flags) -> SFTArguments:
    def parse_these(some):
        return parser.parse_args_into_dataclasses([part for flag, values in some for part in (f"--{flag}", *values)])[0]

    try:
        return parse_these(flags)
    except UserError:
        raise
    except Exception as error:      # transformers seldom says whose: of the flag without which all others pass
        name = "flags"
        for i, (flag, values) in enumerate(flags):
            with contextlib.suppress(Exception):
                parse_these(flags[:i] + flags[i + 1:])
                name = f"--{flag} {' '.join(values)}"
        with building.of_flags(name):
            raise error


def _raise(message: str):
    raise UserError(f"{message}; see python {sys.argv[0]} --help")


def _pairs(argv: list[str]) -> list[tuple[str, list[str]]]:
    """["--a", "1", "--b=2"] to [("a", ["1"]), ("b", ["2"])]."""
    pairs = []
    for part in argv:
        if part.startswith("--"):
            flag, equals, value = part[2:].partition("=")
            pairs.append((flag.replace("-", "_"), [value] if equals else []))
        elif not pairs or re.fullmatch(r"-[a-z]\w*", part):
            _raise(f"{part!r}: flags start with --")
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
            if _is_true(flag, values):
                log.info("--group_by_length is --train_sampling_strategy group_by_length now")
                result.append(("train_sampling_strategy", ["group_by_length"]))
        elif flag == "fsdp" and values and values[0].lower() in ("true", "false"):
            if _is_true(flag, values):
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
        if "RANK" in os.environ:        # torch's own number of threads: without one accelerate warns, and takes as many
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        for flag in ("tf32", "use_liger_kernel"):
            if _is_true(flag, given.pop(flag, ["False"])):
                log.info("--%s is for GPUs: ignored", flag)
        for precision in ("bf16", "fp16"):
            wanted = precision in given and _is_true(precision, given[precision])
            if wanted and not (precision == "bf16" and cpu_has_bf16()):
                log.info("--%s: this CPU has no fast %s, training in fp32", precision, precision)
                given[precision] = ["False"]
    if _is_true("use_liger_kernel", given.get("use_liger_kernel", ["False"])) and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel: liger-kernel is not installed; pip install liger-kernel, or leave the "
                        "flag out")
    for flag in ("deepspeed", "fsdp"):
        if flag in given and "RANK" not in os.environ:
            raise UserError(f"--{flag}: start with `torchrun --nproc_per_node=N finetune_….py …`, not with python")
    if given.get("deepspeed"):
        if "fsdp" in given:
            raise UserError("--deepspeed and --fsdp exclude each other; give one of them")
        _check_deepspeed(given["deepspeed"][0])
        lacks = _deepspeed_lacks()
        if lacks:
            log.info("--deepspeed ignored, plain data parallelism instead: %s", lacks)
            del given["deepspeed"]
    return list(given.items())


def _is_true(flag: str, values: list[str]) -> bool:
    try:
        return not values or boolean(values[0])
    except argparse.ArgumentTypeError as error:
        _raise(f"--{flag}: {error}")


def cpu_has_bf16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _check_deepspeed(path: str) -> None:
    """Raises UserError unless the file (or the text itself) is a JSON object, also where DeepSpeed is not used."""
    try:
        found = json.loads(path if path.startswith("{") else Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: not JSON ({error}); give one such as ds_configs/stage2.json") from None
    if not isinstance(found, dict):
        raise UserError(f"--deepspeed {path}: no JSON object; give one such as ds_configs/stage2.json")


def _deepspeed_lacks() -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed; pip install deepspeed"
    if not torch.cuda.is_available() and not (shutil.which("g++") and shutil.which("ninja")):
        return "on a CPU it compiles its communication, which needs g++ and ninja"
    return None


def _check(args: SFTArguments, required: Sequence[str]) -> None:
    """Everything that can be known to be wrong before the model is loaded."""
    for flag in ("model_name_or_path", "data_path", "gps_mapping_path", "output_dir", *required):
        if not getattr(args, flag):
            _raise(f"--{flag} is required")
    _check_numbers(args)
    require(args.data_path, "python data-preprocess/process_projector_gps_stage1.py (stage 1) or process_llm_gps.py")
    if args.data_path.endswith(sft_data.LINES):
        raise UserError(f"--data_path {args.data_path}: questions to be tested on, a pair a line; give the .json of "
                        "train's, and these by --eval_data_path")
    require(args.gps_mapping_path, "python data-preprocess/run.py -f best_conf/<name>.yml")
    for name in args.report_to:
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report_to {name}: unknown or not installed; pip install {name}, or leave the flag out")
    validation.check(args)
    if not args.model_max_length >= LEAST_TOKENS:
        raise UserError(f"--model_max_length {args.model_max_length}: too short for a question and its answer; give at "
                        f"least {LEAST_TOKENS}")
    if args.model_max_length > MOST_TOKENS:
        raise UserError(f"--model_max_length {args.model_max_length}: no model takes so many tokens; give at most "
                        f"{MOST_TOKENS}")
    if args.shared_prefix and not args.use_full_attn:
        raise UserError("--shared_prefix True: S²-Attn's groups follow from where each prompt ends, so prompts cannot "
                        "share theirs; add --use_full_attn True")
    if args.batch_tokens and args.shared_prefix:
        raise UserError("--batch_tokens, --shared_prefix True: exclude each other; give one of them")
    if args.tree_tokens and not (args.shared_prefix and args.tree_tokens >= args.model_max_length):
        raise UserError(f"--tree_tokens {args.tree_tokens}: goes with --shared_prefix True, and a tree must hold a "
                        f"prompt of --model_max_length {args.model_max_length}; give as many, or leave it out")
    losses.check(args)
    building.check(args)
    resuming.check_output(args)


def _check_numbers(args: SFTArguments) -> None:
    """Raises UserError for a number that parses and yet says nothing: no pair a batch, an infinite rate."""
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        wrong = ("a finite number" if not math.isfinite(value) else
                 f"at least {AT_LEAST[name]}" if value < AT_LEAST.get(name, value) else
                 "more than 0" if name in ABOVE_0 and value <= 0 else
                 f"less than {BELOW[name]}" if value >= BELOW.get(name, math.inf) else
                 "at least 1, or left out" if name == "max_steps" and value < 1 and value != -1 else None)
        if wrong:
            raise UserError(f"--{name} {value}: must be {wrong}; see python {sys.argv[0]} --help")
