"""A run goes on with the flags that it was trained with: what decides its result stands in its checkpoints.

Departure from transformers, which takes some of them (rate, weight decay) from the checkpoint's optimizer, others
(clipping, accumulation) from the command line, and says nothing.
"""
import json
import logging
from pathlib import Path

from ga_llm.base.cli import UserError
from ga_llm.base.reading import WAY_OUT

log = logging.getLogger(__name__)

# Every flag decides the result but for these. Files are compared by what they hold, and 4 bits by what came of them.
FILES = ("output_dir", "model_name_or_path", "data_path", "gps_mapping_path", "geoencoder_path", "projector_path",
         "poi_embedding_path", "cache_dir", "load_in_4bit")
SAYS = ("logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "include_", "dry_run")
SAVES = ("save_", "push_to_hub", "hub_", "resume_from_checkpoint", "restore_callback_states", "enable_jit_checkpoint")
EVALUATES = ("eval_", "per_device_eval_", "prediction_loss_only", "batch_eval_metrics", "label_names", "bf16_full_eval",
             "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "do_",
             "early_stopping_")
RUNS = ("use_cpu", "local_rank", "ddp_", "fsdp", "debug", "skip_memory_metrics", "activation_checkpointing",
        "gradient_checkpointing", "torch_compile", "torch_empty_cache", "use_cache", "remove_unused_columns",
        "length_column_name", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "liger_kernel_config")
PASSED_OVER = (*FILES, *SAYS, *SAVES, *EVALUATES, *RUNS)    # names, or how they begin
# These take effect from the checkpoint on: other roundings, or as they say.
FROM_HERE_ON = ("bf16", "fp16", "tf32", "use_flash_attn", "use_liger_kernel", "full_determinism", "ignore_data_skip")
TRAINING = "training"
LENGTH = ("max_steps", "num_train_epochs")
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")      # schedules that know of no last step


def deciding(args) -> dict:
    """The flags of a run that decide its result, as JSON knows them, and of which training they are."""
    found = json.loads(json.dumps(args.to_dict(), default=str))
    found = {name: value for name, value in found.items() if not name.startswith(PASSED_OVER)}
    if args.dry_run:
        found["gradient_accumulation_steps"] = args.planned_accumulation_steps
    return found | {"deepspeed": _deepspeed(args.deepspeed), TRAINING: type(args).__name__}


def _deepspeed(config: dict | str | None) -> dict | None:
    """What a configuration of DeepSpeed's decides beside the flags."""
    if isinstance(config, str):
        config = json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))
    return {name: value for name, value in (config or {}).items()
            if name in ("optimizer", "scheduler", "gradient_clipping") and value != "auto"} or None


def check(before: dict | None, args, path: Path) -> None:
    """Raises UserError unless `args` are the flags of the training, of which `path` holds those `before`.

    A constant schedule may be made longer or shorter. None: of a version that kept no flags.
    """
    if before is None:
        log.info("%s: tells no flags of the training, so they are not compared; give the same", path)
        return
    now = deciding(args)
    if before.get(TRAINING, now[TRAINING]) != now[TRAINING]:
        raise UserError(f"{path}: does not fit this training ({now[TRAINING]}), it is of another "
                        f"({before[TRAINING]}); give a checkpoint of the same script")
    differ = [name for name in before if name in now and before[name] != now[name]]
    for name in FROM_HERE_ON:
        if name in differ:
            log.info("--%s %s from here on, %s before", name, now[name], before[name])
    differ = [name for name in differ if name not in (*FROM_HERE_ON, *LENGTH)]
    try:
        lengths = [_length(flags) for flags in (before, now)]
        shown = [] if lengths[0] == lengths[1] or _endless(before) else lengths
    except (KeyError, TypeError):
        raise UserError(f"{path}: flags are none of a training's; {WAY_OUT}") from None
    if differ or shown:
        was, wanted = (" ".join([*(f"--{name} {flags[name]}" for name in differ), *shown[i:i + 1]])
                       for i, flags in enumerate((before, now)))
        why = f", on which its {before['lr_scheduler_type']} schedule depends" if shown else ""
        raise UserError(f"{path}: trained with {was}, not {wanted}{why}; start a new folder, if you like from these "
                        f"weights (--init_from {path.parent}), or give {was}")


def _length(flags: dict) -> str:
    name = "max_steps" if flags["max_steps"] > 0 else "num_train_epochs"
    return f"--{name} {flags[name]}"


def _endless(flags: dict) -> bool:
    """Whether each step's rate is the same however many there will be; a warm-up below 1 is a share of all."""
    return flags["lr_scheduler_type"] in ENDLESS and (flags["warmup_steps"] >= 1 or flags["warmup_steps"] == 0)
