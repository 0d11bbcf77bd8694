"""What training leaves behind, and how it is read back: adapter, trainable parameters, merged encoder.

    O/checkpoint-N/adapter_model.safetensors        LoRA (PEFT)
    O/checkpoint-N/trainable_params.safetensors     what is trained beside LoRA: embeddings, norms
    O/checkpoint-N/ga_llm.json                      what evaluation must agree with, and the paths it finds all else by
    O/checkpoint-N/model.safetensors, config.json   instead of the first two, with --low_rank_training False; encoders
                                                    that are trained with the model stand in the second all the same
    O/N/geo_encoder_merged.pth                      stage 1: the encoder, LoRA merged in (PAM: poi_projector.pth);
                                                    stage 2, too, with --train_encoders True
    O/geo_encoder_final_merged.pth                  that of the last step (PAM: poi_projector_final.pth)

Beside these stands what a run needs to go on: optimizer, schedule, random states, DeepSpeed's or FSDP's files.
"""
import contextlib
import dataclasses
import functools
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ga_llm.base.artifacts import GCIM, TRAINABLE_PARAMS, EncoderFiles, question_settings, require
from ga_llm.base.cli import LEAST_TOKENS, MOST_TOKENS, UserError
from ga_llm.base.reading import (WAY_OUT, check_finite, check_pickle, fingerprint, listed, read_json, read_shapes,
                            read_tensors, reason, weights_files)
from ga_llm.base.sharding import set_up_fsdp
from ga_llm.base.writing import atomic_write, saving
from ga_llm.llm.backbone import compile_layers, prepare_for_autocast, rope_factor
from ga_llm.training import preemption, staging
from ga_llm.training.run_log import LoggedTrainer, draw_log
from ga_llm.training.sampling import EpochSampler
from geo_encoder.injection import INJECTIONS
from geo_encoder.weights import digest, merged_state_dict, save_encoder

log = logging.getLogger(__name__)

# transformers 5.17 has several processes on a CPU read their optimizer back to "cpu:0"; torch knows "cpu" alone.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None)

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_MODEL = ("model.safetensors", "model.safetensors.index.json")
CONVERTED = "pytorch_model.bin"     # the README's name for zero_to_fp32.py's output: a file, or a folder of files
AGREEMENT = "ga_llm.json"
# A training's flags that its checkpoint remembers, as they were given; nobody has to agree with them.
PATHS = ("model_name_or_path", "data_path", "gps_mapping_path", "geoencoder_path", "projector_path",
         "poi_embedding_path")
PEFT_PREFIX = "base_model.model."
LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules")
NOTES = ("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


class GATrainer(LoggedTrainer):
    """Trainer whose checkpoints are whole or not there, hold what is trained beside LoRA, and are gone on from exactly.

    Its checkpoints are kept by their step: transformers' --load_best_model_at_end has no evaluation to choose by here.
    encoders: of stage 2, what tells the frozen encoders apart (`injection.attach_encoders`); none are if all are trained.
    """

    def __init__(self, *args, encoders: dict[str, str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoders = encoders
        if self.args.bf16 or self.args.fp16:
            prepare_for_autocast(self.model)
        if self.args.compiles_layers:
            compile_layers(self.model, **self.args.compile_options)
        self.preemption = preemption.Preemption()
        self.add_callback(self.preemption)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = set_up_fsdp(self.accelerator, self.args)

    def _get_train_sampler(self, train_dataset=None):
        """The data set's `lengths`, if it has them, save tokenizing all of it to group pairs by length."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not grouped and self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        lengths = getattr(dataset, "lengths", None)
        if grouped and lengths is None:
            lengths = [len(item["input_ids"]) for item in dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(len(dataset), seed, lengths if grouped else None,
                                     self.args.train_batch_size * self.args.gradient_accumulation_steps)
        return self._sampler

    def _run_epoch(self, model, epoch, *args, **kwargs):
        if isinstance(getattr(self, "_sampler", None), EpochSampler):
            self._sampler.set_epoch(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        """Where checkpoints are written; whole, they are renamed into --output_dir."""
        return str(staging.staging(self.args.output_dir))

    def _save_checkpoint(self, model, trial):
        with saving(self.args.output_dir):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            staging.publish(self.args.output_dir, self.state.global_step, self.args.save_total_limit)
            log.info("saved: %s", staging.checkpoint(self.args.output_dir, self.state.global_step))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Write the model's part of a checkpoint; rank 0 alone has something to write."""
        if not isinstance(self.model, PeftModel):
            # What is trained with the LLM is no part of it, for those who load the folder as a model.
            state_dict = state_dict if state_dict is not None else self.model.state_dict()
            super()._save(output_dir, without_encoders(state_dict))
            beside = {name: tensor.contiguous() for name, tensor in state_dict.items() if of_encoder(name)}
            if beside and self.args.should_save:
                save_file(beside, Path(output_dir or self.args.output_dir) / TRAINABLE_PARAMS)
        elif self.args.should_save:
            output_dir = Path(output_dir or self.args.output_dir)
            state_dict = state_dict if state_dict is not None else self.model.state_dict()
            # PEFT would add both embedding matrices, for they were resized; they stand in TRAINABLE_PARAMS if trained.
            self.model.save_pretrained(str(output_dir), state_dict=state_dict, save_embedding_layers=False)
            save_file({name.removeprefix(PEFT_PREFIX): state_dict[name].contiguous() for name in self._beside_lora()},
                      output_dir / TRAINABLE_PARAMS)
            self.processing_class.save_pretrained(str(output_dir))
        if self.args.should_save:
            with atomic_write(Path(output_dir or self.args.output_dir) / AGREEMENT) as file:
                json.dump(self.agreement | {"paths": self.paths} | self.saved_with, file)

    @property
    def saved_with(self) -> dict:
        """What evaluation must agree with, too, and changes while training."""
        return {}

    @property
    def paths(self) -> dict[str, str]:
        """Where evaluation finds what it needs beside the checkpoint, relative to where the training was started."""
        found = {name: getattr(self.args, name, None) for name in PATHS}
        return {name: str(path) for name, path in found.items() if path}

    def _beside_lora(self) -> list[str]:
        return sorted(name for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name)

    @functools.cached_property
    def agreement(self) -> dict:
        """What those who go on from a checkpoint must agree with."""
        found = {"model_max_length": self.args.model_max_length,
                 "base_model": fingerprint(self.args.model_name_or_path),
                 "encoders": self.encoders, "questions": self._questions(),
                 "trained": [name.removeprefix(PEFT_PREFIX) for name in self._beside_lora()]}
        return {name: value for name, value in found.items() if value is not None}

    def _questions(self) -> dict | None:
        """What the questions show, for whoever asks the trained model more of them."""
        settings = question_settings(self.args.data_path)
        return read_json(settings) if settings.exists() else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        """FSDP's own file holds all that is trained, and a model folder all of the model.

        Departure from transformers, which passes over missing weights, and which reads what zero_to_fp32.py has
        written, or adapters in folders beside, instead of ours.
        """
        if self.is_fsdp_enabled or not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            beside = Path(resume_from_checkpoint) / TRAINABLE_PARAMS
            if not self.is_fsdp_enabled:
                if beside.exists():
                    self.model.load_state_dict(read_tensors(beside), strict=False)
                check_finite(dict(self.model.named_parameters()), resume_from_checkpoint)
            return
        for file in (ADAPTER, TRAINABLE_PARAMS):
            path = Path(resume_from_checkpoint) / file
            load_weights(self.model, read_tensors(path), path, [])      # check_resumable has seen that none is missing

    def _issue_warnings_after_load(self, load_result):
        """None: check_resumable has seen what is there, and the encoders' weights come from a file of their own."""

    def _load_rng_state(self, checkpoint):
        with _restoring(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _restoring(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)


@contextlib.contextmanager
def _restoring(checkpoint: str | None):
    """Where transformers does nothing but read a state back, whatever fails is for what the files hold."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint}: optimizer, schedule or random states do not fit ({reason(error)}); resume with "
                        "the flags that it was trained with, or from another checkpoint") from None


@dataclasses.dataclass
class Trained:
    """A module that is trained, GCIM's encoder or PAM's projector; config: a dataclass; files: what they are called."""
    encoder: torch.nn.Module
    config: object
    files: EncoderFiles = GCIM


class EncoderTrainer(GATrainer):
    """Beside every checkpoint-N stands N/: the encoder with its LoRA merged in, PAM's projector, or both."""

    def __init__(self, *args, trained: Iterable[Trained], **kwargs):
        super().__init__(*args, **kwargs)
        self.trained, self.merged = list(trained), []

    @functools.cached_property
    def agreement(self) -> dict:
        """The seed, too: what lies below the encoder's LoRA is drawn from it, and is not saved."""
        found = {name: value for name, value in super().agreement.items() if name != "encoders"}
        return {**found, "seed": self.args.seed,
                "encoder": {one.files.module: dataclasses.asdict(one.config) for one in self.trained}}

    @property
    def saved_with(self) -> dict:
        """Of stage 2, which gives `encoders`, those that the model was saved with."""
        return {} if self.encoders is None else {"encoders": {one.files.module: digest(merged) for one, merged in zip(self.trained, self.merged)}}

    @property
    def paths(self) -> dict[str, str]:
        """Of stage 2, its own encoders."""
        folder = Path(self.args.output_dir) / str(self.state.global_step)
        own = {} if self.encoders is None else {one.files.flag: str(folder / one.files.merged) for one in self.trained}
        return super().paths | own

    def gather(self) -> None:
        """Merge the weights as they are now. Every rank must call it, for ZeRO-3 and FSDP gather them."""
        self.merged = [merged_state_dict(one.encoder) for one in self.trained]

    def save_encoders(self, folder: Path, final: bool = False) -> None:
        """Write what was gathered, on rank 0."""
        for one, merged in zip(self.trained, self.merged) if self.args.should_save else ():
            save_encoder(merged, one.config, folder / (one.files.final if final else one.files.merged), one.files)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        self.gather()
        super().save_model(output_dir, _internal_call)
        if output_dir and Path(output_dir).parent == staging.staging(self.args.output_dir):
            self.save_encoders(Path(output_dir).parent / str(self.state.global_step))

    def save_final_encoders(self, trained: bool) -> None:
        """Every rank must call it at the end; files appear whole. Not `trained` now: they are the last checkpoint's.

        A run that was told to stop has none. Raises UserError if that checkpoint has been deleted.
        """
        if self.preemption.stopped:
            return
        output_dir, hidden = Path(self.args.output_dir), staging.staging(self.args.output_dir) / "final"
        if trained:
            with saving(output_dir):
                self.gather()
                self.save_encoders(hidden, final=True)
        elif self.args.should_save:
            hidden.mkdir(parents=True)
            last = output_dir / str(self.state.global_step)
            for files in (one.files for one in self.trained):
                shutil.copyfile(require(last / files.config, files.made_by), hidden / files.config)
                shutil.copyfile(require(last / files.merged, files.made_by), hidden / files.final)
        if self.args.should_save:
            staging.move_files(hidden, output_dir)
            staging.sweep(output_dir)
            for one in self.trained:
                log.info("saved: %s", output_dir / one.files.final)


def check_output(args) -> None:
    """What can be known to be wrong with --output_dir and --resume_from_checkpoint. Raises UserError."""
    last, left = staging.last_checkpoint(args.output_dir), staging.left_alone(args.output_dir)
    if left:
        raise UserError(f"{left[0]}: of an earlier run, whose checkpoints are gone; move it away, or give another "
                        "--output_dir")
    if _resumes(args):
        resume_point(args)
    elif last is not None:
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


def finished(checkpoint: Path | str, args) -> bool:
    """Whether the run that wrote `checkpoint` had reached its end, and `args` ask for no more."""
    state = read_state(checkpoint)
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

    Told to stop, it leaves a checkpoint and says how to go on. transformers itself takes one more step when it resumes a
    run that had finished.
    """
    check_tied(trainer)
    if trainer.args.should_save:
        staging.sweep(trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()
    checkpoint = resume_point(trainer.args)
    if checkpoint and finished(checkpoint, trainer.args):
        log.info("%s: this run has finished, nothing is left to train", checkpoint)
        trainer.state = read_state(checkpoint)
        if trainer.args.should_save:
            draw_log(trainer.args.output_dir)       # a kill may have come between the last checkpoint and the picture
        return False
    if checkpoint:
        check_resumable(Path(checkpoint), trainer)
        log.info("resuming from %s", checkpoint)
    elif _resumes(trainer.args):
        log.info("resuming from nothing: no checkpoint yet")
    if not trainer.preemption.before_training(trainer.args):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.preemption.report(trainer.args, trainer.state)
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


def check_resumable(checkpoint: Path, trainer: Trainer) -> None:
    """Whether `checkpoint` is whole, of this model and this stage, and can be gone on from. Raises UserError if not.

    transformers starts with a fresh optimizer, and says nothing, where it does not find one; nor does it say that
    weights are missing.
    """
    before = read_agreement(checkpoint)
    check_agreement(checkpoint, before, trainer.args.model_max_length, trainer.model.config.max_position_embeddings,
                    trainer.args.model_name_or_path)
    for name in {"seed", "encoder", "encoders"} & before.keys() & trainer.agreement.keys():
        if before[name] != trainer.agreement[name]:
            raise UserError(f"{checkpoint / AGREEMENT}: trained with {name} {before[name]}, not "
                            f"{trainer.agreement[name]}; resume with the flags that it was trained with")
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
    extra = min(beside.keys() - set(trained), default=None)
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


def holds_full_model(folder: Path | str) -> bool:
    """Whether stage 2 ran with --low_rank_training False: the checkpoint is then a model folder of its own."""
    return any((Path(folder) / name).exists() for name in FULL_MODEL)


def require_checkpoint(folder: Path) -> None:
    """Raises UserError unless `folder` holds what stage 2 writes."""
    for name in () if holds_full_model(folder) else (ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no {name}; --output_dir takes the checkpoint-N folder that "
                            "finetune_LLM_with_GCIM.py wrote")


def load_adapter(llm, folder: Path | str, agreement: dict):
    """Put on `llm` what stage 2 learned: the adapter and the trainable parameters of `folder` (checkpoint-N).

    agreement: as `read_agreement` finds it there.
    If zero_to_fp32.py has been run there, its output is read instead, whether it wrote a file or a folder.
    Raises UserError if something is missing, broken, or belongs to another base model.
    """
    folder = Path(folder)
    require_checkpoint(folder)
    lora = read_tensors(folder / ADAPTER)
    config = adapter_config(folder, {name: tuple(tensor.shape) for name, tensor in lora.items()})
    try:
        model = get_peft_model(llm, config)
    except ValueError as error:
        raise _unfit(folder / ADAPTER_CONFIG, reason(error)) from None
    load_weights(model, lora, folder / ADAPTER, [name for name in model.state_dict() if "lora_" in name])
    trained = [in_model(name) for name in agreement.get("trained", []) if not of_encoder(name)]
    if (folder / CONVERTED).exists():
        log.info("weights from %s", folder / CONVERTED)
        state, needed = read_converted(folder / CONVERTED), [*map(in_model, lora), *trained]
        load_weights(model, without_encoders(state), folder / CONVERTED, needed)
    elif (folder / TRAINABLE_PARAMS).exists():
        state = read_tensors(folder / TRAINABLE_PARAMS)
        load_weights(model, without_encoders(state), folder / TRAINABLE_PARAMS, trained)
    else:
        raise UserError(f"{folder}: neither {TRAINABLE_PARAMS} nor {CONVERTED}; run zero_to_fp32.py there")
    return model


def of_encoder(name: str) -> bool:
    """Whether a parameter is an encoder's that was trained with the LLM, and is read from N/ beside the checkpoint."""
    return any(f"{module}." in name for module in INJECTIONS.values())


def without_encoders(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not of_encoder(name)}


def adapter_config(folder: Path, shapes: dict[str, tuple[int, ...]]) -> LoraConfig:
    """The LoRA that the adapter_config.json of `folder` describes, and whose weights have these `shapes` by name.

    Departure from PEFT's own reading: what neither we nor the released code write is refused, so that the file cannot
    name modules to import, another method, or sizes that are not those of the weights.
    """
    path, usual = folder / ADAPTER_CONFIG, LoraConfig().to_dict()
    found = read_json(path)

    def refuse(name):
        raise UserError(f"{path}: {name} is {str(found.get(name))[:100]!r}, which finetune_LLM_with_GCIM.py does not "
                        f"write; {WAY_OUT}")

    for name, value in found.items():
        if name not in (*LORA_FIELDS, *NOTES) and value and value != usual.get(name):
            refuse(name)
    if found.get("peft_type") != "LORA":
        refuse("peft_type")
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    if type(found.get("r")) is not int or ranks != {found["r"]}:
        raise UserError(f"{path}: r is {str(found.get('r'))[:100]!r}, and the weights in {ADAPTER} have rank "
                        f"{', '.join(map(str, sorted(ranks))) or 'none'}; {WAY_OUT}")
    for name in ("lora_alpha", "lora_dropout"):
        if type(found.get(name)) not in (int, float) or not 0 <= found[name] < (1 if "dropout" in name else math.inf):
            refuse(name)
    targets = found.get("target_modules")       # as a text it would be a regular expression
    if not isinstance(targets, list) or not targets or not all(
            isinstance(target, str) and re.fullmatch(r"[\w.]+", target) for target in targets):
        refuse("target_modules")
    return LoraConfig(**{name: found[name] for name in LORA_FIELDS}, bias="none", task_type="CAUSAL_LM",
                      inference_mode=True)


def read_converted(path: Path) -> dict[str, torch.Tensor]:
    """The state dict that zero_to_fp32.py wrote: a file, or a folder of files, perhaps with an index of them."""
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        files = listed(indices[0]) if indices else [*sorted(path.glob("*.bin")), *sorted(path.glob("*.safetensors"))]
    else:
        files = [path]
    if not files:
        raise UserError(f"{path}: an empty folder; delete it or run zero_to_fp32.py again")
    state = {}
    for file in files:
        state.update(read_tensors(file))
    return state


def in_model(name: str) -> str:
    """A trained parameter's name in the model with LoRA: files may leave out PEFT's prefix and the adapter's name."""
    name = name if name.startswith(PEFT_PREFIX) else PEFT_PREFIX + name
    return re.sub(r"\.(lora_\w+)(\.weight)?$", r".\1.default\2", name)


def load_weights(model: PeftModel, state: dict[str, torch.Tensor], path: Path, needed: Iterable[str]) -> None:
    """Load weights of the file `path` by name. Raises UserError if one has no place or one of `needed` is missing."""
    state = {in_model(name): tensor for name, tensor in state.items()}
    check_fits(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, path, needed)
    model.load_state_dict(state, strict=False)


def check_fits(model, shapes: dict[str, tuple[int, ...]], path: Path, needed: Iterable[str]) -> None:
    """Raises UserError unless what `path` holds has its places in the model, and each of the `needed` is there."""
    own = {name: tuple(getattr(tensor, "ds_shape", tensor.shape))      # the whole of what ZeRO-3 has cut up
           for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, shape in shapes.items():
        if name not in own:
            raise _unfit(path, f"no place for {name}")
        if shape != own[name]:
            raise _unfit(path, f"{name} is {shape} in the file, {own[name]} in the model")
    missing = next((name for name in needed if name not in shapes), None)
    if missing is not None:
        raise _unfit(path, f"{missing} is missing")


def _unfit(path: Path, why: str) -> UserError:
    return UserError(f"{path}: does not fit the base model ({why}); give the base model and the --gps_mapping_path of "
                     "the training")


def read_agreement(folder: Path | str) -> dict:
    """What the training wrote down for those who go on from its checkpoint; nothing in the released code's."""
    path = Path(folder) / AGREEMENT
    found = read_json(path) if path.exists() else {}
    kinds = {"model_max_length": int, "base_model": str, "trained": list, "encoders": dict, "questions": dict,
             "paths": dict}
    for name, value in found.items():
        if name in kinds and type(value) is not kinds[name]:
            raise UserError(f"{path}: {name} is {str(value)[:100]!r}; {WAY_OUT}")
    length = found.get("model_max_length", LEAST_TOKENS)
    if not LEAST_TOKENS <= length <= MOST_TOKENS:
        raise UserError(f"{path}: model_max_length is {str(length)[:100]}; {WAY_OUT}")
    if not all(isinstance(name, str) for name in found.get("trained", [])):
        raise UserError(f"{path}: trained is no list of names; {WAY_OUT}")
    for name, value in found.get("paths", {}).items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{path}: paths: {name[:100]!r} is {str(value)[:100]!r}; {WAY_OUT}")
    return found


def check_agreement(folder: Path | str, found: dict, context_size: int, native_context: int,
                    base_model: str | None = None, encoders: dict[str, str] | None = None) -> None:
    """The model must be the one that was trained, its positions scaled as they were. Raises UserError if not.

    found: as `read_agreement` finds it in `folder`. A base model by its name on the hub is not looked at. encoders: as
    of `injection.attach_encoders`, must be those of the training; None: whatever they are.
    """
    path = Path(folder) / AGREEMENT
    trained = found.get("model_max_length", context_size)
    if rope_factor(trained, native_context) != rope_factor(context_size, native_context):
        raise UserError(f"{path}: trained with --model_max_length {trained}, whose positions --context_size "
                        f"{context_size} would scale differently; give --context_size {trained}")
    present = fingerprint(base_model) if base_model and "base_model" in found else None
    if present is not None and present != found["base_model"]:
        raise UserError(f"{path}: trained on other weights than {base_model} holds; give the base model of the training"
                        f", or if it is that in other files, delete base_model from {path.name}")
    if encoders is None or "encoders" not in found:
        return
    for name, flag in (("GCIM", "--geoencoder_path"), ("PAM", "--projector_path and --poi_embedding_path")):
        was, now = found["encoders"].get(name), encoders.get(name)
        if was != now:
            how = (f"without {name}; leave out {flag}" if was is None else f"with {name}; give {flag}" if now is None
                   else f"with other weights of {name}'s; give the {flag} of the training")
            raise UserError(f"{path}: trained {how}")
