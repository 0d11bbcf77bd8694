"""A run that is started, or goes on from a checkpoint: which one, whether it fits this run, whether it had finished."""
import logging
import re
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ga_llm.base.artifacts import TRAINABLE_PARAMS
from ga_llm.base.cli import UserError
from ga_llm.base.reading import (WAY_OUT, check_pickle, read_json, read_shapes, read_tensors, reason,
                                 weights_files)
from ga_llm.base.sharding import gathered
from ga_llm.llm import four_bits
from ga_llm.training import flags, staging, validation
from ga_llm.training.checkpoints import (ADAPTER, ADAPTER_CONFIG, AGREEMENT, CONVERTED, FULL_MODEL, adapter_config,
                                         check_agreement, check_fits, holds_full_model, in_model, read_agreement)
from ga_llm.training.run_log import draw_log
from ga_llm.training.trainers import GATrainer

log = logging.getLogger(__name__)


def check_output(args) -> None:
    """What can be known to be wrong with --output_dir and --resume_from_checkpoint. Raises UserError."""
    last, left = staging.last_checkpoint(args.output_dir), staging.left_alone(args.output_dir)
    if left:
        raise UserError(f"{left[0]}: of an earlier run, whose checkpoints are gone; move it away, or give another "
                        "--output_dir")
    checkpoint = resume_point(args)
    if checkpoint:
        flags.check(read_agreement(checkpoint).get("flags"), args, Path(checkpoint) / AGREEMENT)
    elif args.init_from:
        require_initial(args)
    if not _resumes(args) and last is not None:
        raise UserError(f"--output_dir {args.output_dir}: holds {last.name} of an earlier run; go on with it by "
                        "--resume_from_checkpoint auto, or give another folder")


def _resumes(args) -> bool:
    return args.resume_from_checkpoint is not None and str(args.resume_from_checkpoint).lower() != "false"


def resume_point(args) -> str | None:
    """The checkpoint to go on from: --resume_from_checkpoint names one, or says `auto` (or True): the last."""
    if not _resumes(args):
        return None
    wanted = args.resume_from_checkpoint
    if str(wanted).lower() in ("auto", "true"):
        last = staging.last_checkpoint(args.output_dir)
        return None if last is None else str(last)
    if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        what = f"no {TRAINER_STATE_NAME} in it" if Path(wanted).is_dir() else "no such folder"
        raise UserError(f"--resume_from_checkpoint {wanted}: {what}; name a checkpoint-N, or say auto")
    return wanted


def require_initial(args) -> None:
    """Raises UserError unless --init_from names a checkpoint-N."""
    folder = Path(args.init_from)
    if not (holds_full_model(folder) or (folder / ADAPTER).is_file()):
        what = f"no {ADAPTER} in it" if folder.is_dir() else "no such folder"
        raise UserError(f"--init_from {folder}: {what}; name a checkpoint-N of the same stage")


def finished(checkpoint: Path | str, args) -> bool:
    """Whether the run that wrote `checkpoint` had reached its end, and `args` ask for no more."""
    state = read_state(checkpoint)
    if validation.stopped(state.log_history, args.early_stopping_patience):
        return True
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs


def read_state(checkpoint: Path | str) -> TrainerState:
    """Where the run that wrote `checkpoint` stood."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    found = read_json(path)
    for name, kind in {"global_step": int, "max_steps": int, "num_train_epochs": int, "log_history": list}.items():
        value = found.get(name)
        if type(value) is not kind or kind is int and value < 0:
            raise UserError(f"{path}: {name} is {str(value)[:100]!r}; {WAY_OUT}")
    try:
        return TrainerState(**found)
    except TypeError as error:      # a field that it does not know
        raise UserError(f"{path}: not transformers' ({reason(error)}); {WAY_OUT}") from None


def train(trainer: GATrainer) -> bool:
    """Train from the start or from where --resume_from_checkpoint says; returns whether anything was left to train.

    Told to stop, it leaves a checkpoint and says how to go on. transformers itself takes one more step when it resumes
    a run that had finished.
    """
    check_tied(trainer)
    if trainer.args.should_save:
        staging.sweep(trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()
    checkpoint = resume_point(trainer.args)
    if checkpoint and finished(checkpoint, trainer.args):
        log.info("%s: this run has finished, nothing is left to train", checkpoint)
        trainer.state = read_state(checkpoint)
        trainer.conclude()
        if trainer.args.should_save:
            draw_log(trainer.args.output_dir)       # a kill may have come between the last checkpoint and the picture
        return False
    if checkpoint:
        check_resumable(Path(checkpoint), trainer)
        log.info("resuming from %s", checkpoint)
    elif _resumes(trainer.args):
        log.info("resuming from nothing: no checkpoint yet")
    if trainer.args.init_from and not checkpoint:
        start_from(Path(trainer.args.init_from), trainer)
    if not trainer.preemption.before_training(trainer.args):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.preemption.report(trainer.args, trainer.state)
    trainer.conclude()
    return True


def check_tied(trainer: Trainer) -> None:
    """Raises UserError where embeddings that serve as output, too, would be trained in pieces.

    Measured: FSDP moves the rows of <GPS n>, for it replaces the parameter that `keep_rows` hooks; ZeRO-3 trains other
    embeddings than one process does, with another gradient norm from the first step on.
    """
    zero = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 0
    embedding = trainer.model.get_input_embeddings().weight
    if (zero == 3 or trainer.is_fsdp_enabled) and trainer.model.config.tie_word_embeddings and embedding.requires_grad:
        raise UserError("this model's input and output embeddings are one, and cannot be trained in pieces: use "
                        "--deepspeed ds_configs/stage2.json, or leave them out by --trainable_params norm")


def start_from(folder: Path, trainer: Trainer) -> None:
    """--init_from: the weights of the checkpoint `folder`, and nothing else of it. Raises UserError if they do not fit.
    """
    was, now = check_same(folder, trainer).get("quantization"), four_bits.kind(trainer.model)
    if was not in (None, now):
        log.info("%s: trained on a base %s, which is %s here", folder, four_bits.describe(was), four_bits.describe(now))
    check_weights(folder, trainer)
    model, is_adapter = trainer.model, isinstance(trainer.model, PeftModel)
    for file in [folder / ADAPTER] if is_adapter else weights_files(folder):
        _load(model, file)
    if is_adapter or (folder / TRAINABLE_PARAMS).exists():
        _load(model, folder / TRAINABLE_PARAMS)
    log.info("starting from the weights of %s, with a schedule of its own", folder)


def _load(model, file: Path) -> None:
    tensors = {in_model(name) if isinstance(model, PeftModel) else name: tensor
               for name, tensor in read_tensors(file).items()}
    with gathered([p for name, p in model.named_parameters() if name in tensors], write=True):
        model.load_state_dict(tensors, strict=False)


def check_same(checkpoint: Path, trainer: Trainer) -> dict:
    """Whether `checkpoint` belongs to this model and encoder; returns its agreement. Raises UserError if not."""
    before = read_agreement(checkpoint)
    check_agreement(checkpoint, before, trainer.args.model_max_length, trainer.model.config.max_position_embeddings,
                    trainer.args.model_name_or_path)
    for name in {"seed", "encoder", "encoders", "beside"} & before.keys() & trainer.agreement.keys():
        if before[name] != trainer.agreement[name]:
            raise UserError(f"{checkpoint / AGREEMENT}: trained with {name} {before[name]}, not "
                            f"{trainer.agreement[name]}; start with the flags that it was trained with")
    return before


def check_resumable(checkpoint: Path, trainer: Trainer) -> None:
    """Whether `checkpoint` is whole, of this model and this stage, and can be gone on from. Raises UserError if not.

    transformers starts with a fresh optimizer, and says nothing, where it does not find one; nor does it say that
    weights are missing.
    """
    before = check_same(checkpoint, trainer)
    kinds = {"latest": "DeepSpeed", "optimizer.bin": "FSDP", "optimizer.pt": "neither DeepSpeed nor FSDP"}
    name = "latest" if trainer.is_deepspeed_enabled else "optimizer.bin" if trainer.is_fsdp_enabled else "optimizer.pt"
    if not (checkpoint / name).exists():
        by = next((f", it was saved with {kind}" for other, kind in kinds.items() if (checkpoint / other).exists()), "")
        raise UserError(f"{checkpoint}: no {name}, so no optimizer to go on with{by}; resume with the flags that it "
                        "was trained with")
    if not trainer.is_deepspeed_enabled and not (checkpoint / SCHEDULER_NAME).exists():
        raise UserError(f"{checkpoint}: no {SCHEDULER_NAME}, without which the optimizer is not read; {WAY_OUT}")
    count, rank = trainer.args.world_size, trainer.args.process_index
    own = checkpoint / ("rng_state.pth" if count == 1 else f"rng_state_{rank}.pth")
    if not own.exists() or (checkpoint / f"rng_state_{count}.pth").exists():
        message = f"{checkpoint}: saved by another number of processes than {count}"
        if trainer.is_deepspeed_enabled:
            raise UserError(f"{message}: DeepSpeed's files do not fit; start as many as before")
        log.warning("%s: the steps to come hold other pairs than they would have", message)
    check_weights(checkpoint, trainer)
    four_bits.check(checkpoint / AGREEMENT, before.get("quantization"), trainer.model)
    for name, found in before.get("files", {}).items():
        if found != trainer.agreement["files"].get(name, found):
            raise UserError(f"{checkpoint / AGREEMENT}: trained on another file than --{name} "
                            f"{getattr(trainer.args, name)}; give that of the training, or start a new folder, if you "
                            f"like from these weights (--init_from {checkpoint})")
    check_states(checkpoint, trainer)


def check_weights(checkpoint: Path, trainer: Trainer) -> None:
    """What the checkpoint holds of the model is what this run trains. Raises UserError if not."""
    model = trainer.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not isinstance(model, PeftModel):
        files = weights_files(checkpoint)
        if not files:
            raise UserError(f"{checkpoint}: no {FULL_MODEL[0]}, as --low_rank_training False writes it; resume with "
                            "the flags that it was trained with")
        beside = [checkpoint / TRAINABLE_PARAMS] if (checkpoint / TRAINABLE_PARAMS).exists() else []
        shapes = {name: shape for file in [*files, *beside] for name, shape in read_shapes(file).items()}
        return check_fits(model, shapes, checkpoint, trained)
    adapter, beside = ({in_model(name): shape for name, shape in read_shapes(checkpoint / file).items()}
                       for file in (ADAPTER, TRAINABLE_PARAMS))
    config, own = adapter_config(checkpoint, adapter), model.peft_config["default"]
    for name in ("r", "lora_alpha"):
        if getattr(config, name) != getattr(own, name):
            raise UserError(f"{checkpoint / ADAPTER_CONFIG}: trained with {name} {getattr(config, name)}, not "
                            f"{getattr(own, name)}; give --lora_r {config.r} --lora_alpha {config.lora_alpha}")
    check_fits(model, adapter, checkpoint / ADAPTER, [name for name in trained if "lora_" in name])
    check_fits(model, beside, checkpoint / TRAINABLE_PARAMS, [name for name in trained if "lora_" not in name])
    kept = {name for name, _ in model.named_buffers()}
    extra = min(beside.keys() - set(trained) - kept, default=None)
    if extra is not None:
        raise UserError(f"{checkpoint / TRAINABLE_PARAMS}: holds {extra}, which this run does not train; resume with "
                        "the flags that it was trained with")


def check_states(checkpoint: Path, trainer: Trainer) -> None:
    """What torch.save wrote beside the weights is whole, and executes nothing. Raises UserError if not."""
    folders, harmless = [checkpoint], [np.ndarray, np.dtype, np.dtypes.UInt32DType, np._core.multiarray._reconstruct]
    if trainer.is_deepspeed_enabled:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
        harmless += [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        latest = (checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip()
        folders.append(checkpoint / latest)
        if not re.fullmatch(r"global_step\d+", latest) or not folders[-1].is_dir():
            raise UserError(f"{checkpoint / 'latest'}: names {latest[:100]!r}, no folder of DeepSpeed's there; "
                            f"{WAY_OUT}")
    torch.serialization.add_safe_globals(harmless)      # the classes that a genuine checkpoint is made of
    for file in sorted(file for folder in folders for file in folder.iterdir()):
        if file.suffix in (".pt", ".pth", ".bin") and file.name not in (TRAINING_ARGS_NAME, CONVERTED):
            check_pickle(file)
