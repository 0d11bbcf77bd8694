"""What training leaves behind, and how it is read back: adapter, trainable parameters, merged encoder.

    O/checkpoint-N/adapter_model.safetensors        LoRA (PEFT)
    O/checkpoint-N/trainable_params.safetensors     what is trained beside LoRA: embeddings, norms
    O/checkpoint-N/ga_llm.json                      what evaluation must agree with
    O/checkpoint-N/model.safetensors, config.json   instead of the first two, with --low_rank_training False
    O/N/geo_encoder_merged.pth                      stage 1: the encoder, LoRA merged in
    O/geo_encoder_final_merged.pth                  stage 1: that of the last step

Beside these stands what a run needs to go on: optimizer, schedule, random states, DeepSpeed's or FSDP's files.
"""
import json
import logging
import pickle
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ga_llm import staging
from ga_llm.artifacts import FINAL_ENCODER, MERGED_ENCODER, TRAINABLE_PARAMS, require
from ga_llm.cli import UserError
from ga_llm.llm import rope_factor
from ga_llm.run_log import LoggedTrainer
from ga_llm.sampling import EpochSampler
from ga_llm.sharding import set_up_fsdp
from ga_llm.writing import atomic_write
from geo_encoder.encoder import GeoEncoderConfig
from geo_encoder.weights import CONFIG, MADE_BY, merged_state_dict, save_encoder

log = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_MODEL = ("model.safetensors", "model.safetensors.index.json")
CONVERTED = "pytorch_model.bin"     # the README's name for zero_to_fp32.py's output: a file, or a folder of files
AGREEMENT = "ga_llm.json"
PEFT_PREFIX = "base_model.model."


class GATrainer(LoggedTrainer):
    """Trainer whose checkpoints are whole or not there, hold what is trained beside LoRA, and are gone on from exactly.

    Its checkpoints are kept by their step: transformers' --load_best_model_at_end has no evaluation to choose by here.
    """

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
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            staging.publish(self.args.output_dir, self.state.global_step, self.args.save_total_limit)
            log.info("saved: %s", staging.checkpoint(self.args.output_dir, self.state.global_step))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Write the model's part of a checkpoint; rank 0 alone has something to write."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            output_dir = Path(output_dir or self.args.output_dir)
            state_dict = state_dict if state_dict is not None else self.model.state_dict()
            # PEFT would add both embedding matrices, for they were resized; they stand in TRAINABLE_PARAMS if trained.
            self.model.save_pretrained(str(output_dir), state_dict=state_dict, save_embedding_layers=False)
            names = {name for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name}
            save_file({name.removeprefix(PEFT_PREFIX): state_dict[name].contiguous() for name in sorted(names)},
                      output_dir / TRAINABLE_PARAMS)
            self.processing_class.save_pretrained(str(output_dir))
        if self.args.should_save:
            with atomic_write(Path(output_dir or self.args.output_dir) / AGREEMENT) as file:
                json.dump({"model_max_length": self.args.model_max_length}, file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # FSDP's own file, read above, holds all that is trained.
        if isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            load_trainable(self.model, load_file(Path(resume_from_checkpoint) / TRAINABLE_PARAMS))


class GCIMTrainer(GATrainer):
    """Stage 1: beside every checkpoint-N stands N/, the encoder with its LoRA merged in."""

    def __init__(self, *args, encoder: torch.nn.Module, encoder_config: GeoEncoderConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoder, self.encoder_config = encoder, encoder_config

    def save_encoder(self, path: Path) -> None:
        """Every rank must call it, for ZeRO-3 and FSDP gather the weights; rank 0 writes."""
        merged = merged_state_dict(self.encoder)
        if self.args.should_save:
            save_encoder(merged, self.encoder_config, path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if output_dir and Path(output_dir).parent == staging.staging(self.args.output_dir):
            self.save_encoder(Path(output_dir).parent / str(self.state.global_step) / MERGED_ENCODER)

    def save_final_encoder(self, trained: bool) -> None:
        """Every rank must call it at the end; the file appears whole. Not `trained` now: it is the last checkpoint's.

        Raises UserError if that has been deleted.
        """
        output_dir, hidden = Path(self.args.output_dir), staging.staging(self.args.output_dir) / "final"
        if trained:
            self.save_encoder(hidden / FINAL_ENCODER)
        elif self.args.should_save:
            hidden.mkdir(parents=True)
            last = output_dir / str(self.state.global_step)
            shutil.copyfile(require(last / CONFIG, MADE_BY), hidden / CONFIG)
            shutil.copyfile(require(last / MERGED_ENCODER, MADE_BY), hidden / FINAL_ENCODER)
        if self.args.should_save:
            staging.move_files(hidden, output_dir)
            staging.sweep(output_dir)
            log.info("saved: %s", output_dir / FINAL_ENCODER)


def check_output(args) -> None:
    """What can be known to be wrong with --output_dir and --resume_from_checkpoint. Raises UserError."""
    last = staging.last_checkpoint(args.output_dir)
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
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= args.num_train_epochs


def train(trainer: Trainer) -> bool:
    """Train from the start or from where --resume_from_checkpoint says; returns whether anything was left to train.

    transformers itself takes one more step when it resumes a run that had finished.
    """
    check_tied(trainer)
    if trainer.args.should_save:
        staging.sweep(trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()
    checkpoint = resume_point(trainer.args)
    if checkpoint and finished(checkpoint, trainer.args):
        log.info("%s: this run has finished, nothing is left to train", checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        return False
    if checkpoint:
        check_resumable(Path(checkpoint), trainer)
        log.info("resuming from %s", checkpoint)
    elif _resumes(trainer.args):
        log.info("resuming from nothing: no checkpoint yet")
    trainer.train(resume_from_checkpoint=checkpoint)
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
    """transformers starts with a fresh optimizer, and says nothing, where it does not find one. Raises UserError."""
    kinds = {"latest": "DeepSpeed", "optimizer.bin": "FSDP", "optimizer.pt": "neither DeepSpeed nor FSDP"}
    name = "latest" if trainer.is_deepspeed_enabled else "optimizer.bin" if trainer.is_fsdp_enabled else "optimizer.pt"
    if not (checkpoint / name).exists():
        by = next((f", it was saved with {kind}" for other, kind in kinds.items() if (checkpoint / other).exists()), "")
        raise UserError(f"{checkpoint}: no {name}, so no optimizer to go on with{by}; resume with the flags that it "
                        "was trained with")
    count, rank = trainer.args.world_size, trainer.args.process_index
    own = checkpoint / ("rng_state.pth" if count == 1 else f"rng_state_{rank}.pth")
    if not own.exists() or (checkpoint / f"rng_state_{count}.pth").exists():
        message = f"{checkpoint}: saved by another number of processes than {count}"
        if trainer.is_deepspeed_enabled:
            raise UserError(f"{message}: DeepSpeed's files do not fit; start as many as before")
        log.warning("%s: the steps to come hold other pairs than they would have", message)


def holds_full_model(folder: Path | str) -> bool:
    """Whether stage 2 ran with --low_rank_training False: the checkpoint is then a model folder of its own."""
    return any((Path(folder) / name).exists() for name in FULL_MODEL)


def load_adapter(llm, folder: Path | str):
    """Put on `llm` what stage 2 learned: the adapter and the trainable parameters of `folder` (checkpoint-N).

    If zero_to_fp32.py has been run there, its output is read instead, whether it wrote a file or a folder.
    Raises UserError if something is missing or belongs to another base model.
    """
    folder = Path(folder)
    for name in (ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no {name}; --output_dir takes the checkpoint-N folder that "
                            "finetune_LLM_with_GCIM.py wrote")
    try:
        model = PeftModel.from_pretrained(llm, str(folder))
        converted = read_converted(folder / CONVERTED)
        if converted is not None:
            log.info("weights from %s", folder / CONVERTED)
            load_trainable(model, converted)
        elif (folder / TRAINABLE_PARAMS).exists():
            load_trainable(model, load_file(folder / TRAINABLE_PARAMS))
        else:
            raise UserError(f"{folder}: neither {TRAINABLE_PARAMS} nor {CONVERTED}; run zero_to_fp32.py there")
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: does not fit the base model ({reason}); give the --base_model and the "
                        "--gps_mapping_path of the training") from None
    return model


def read_converted(path: Path) -> dict[str, torch.Tensor] | None:
    """The state dict that zero_to_fp32.py wrote; None if it was not run. Pickles are not executed."""
    if not path.exists():
        return None
    files = sorted(path.glob("*.bin")) + sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: an empty folder; delete it or run zero_to_fp32.py again")
    state = {}
    for file in files:
        state.update(load_file(file) if file.suffix == ".safetensors" else
                     torch.load(file, map_location="cpu", weights_only=True))
    return state


def load_trainable(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Load weights by name, with or without PEFT's prefix; every one of them must have its place."""
    state = {name if name.startswith(PEFT_PREFIX) else PEFT_PREFIX + name: tensor for name, tensor in state.items()}
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"no place for {unexpected[0]}")


def check_agreement(folder: Path | str, context_size: int, native_context: int) -> None:
    """Evaluation must scale positions as training did. Raises UserError if --context_size says otherwise."""
    path = Path(folder) / AGREEMENT
    if not path.exists():       # a checkpoint of the released code
        return
    trained = json.loads(path.read_text(encoding="utf-8"))["model_max_length"]
    if rope_factor(trained, native_context) != rope_factor(context_size, native_context):
        raise UserError(f"{path}: trained with --model_max_length {trained}, whose positions --context_size "
                        f"{context_size} would scale differently; give --context_size {trained}")
