"""What training leaves behind, and how it is read back: adapter, trainable parameters, merged encoder.

    O/checkpoint-N/adapter_model.safetensors        LoRA (PEFT)
    O/checkpoint-N/trainable_params.safetensors     what is trained beside LoRA: embeddings, norms
    O/checkpoint-N/ga_llm.json                      what evaluation must agree with
    O/checkpoint-N/model.safetensors, config.json   instead of the first two, with --low_rank_training False
    O/N/geo_encoder_merged.pth                      stage 1: the encoder, LoRA merged in
"""
import json
import logging
import pickle
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ga_llm.artifacts import FINAL_ENCODER, MERGED_ENCODER, TRAINABLE_PARAMS, atomic_write
from ga_llm.cli import UserError
from ga_llm.llm import rope_factor
from geo_encoder.encoder import GeoEncoderConfig
from geo_encoder.weights import merged_state_dict, save_encoder

log = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_MODEL = ("model.safetensors", "model.safetensors.index.json")
CONVERTED = "pytorch_model.bin"     # the README's name for zero_to_fp32.py's output: a file, or a folder of files
AGREEMENT = "ga_llm.json"
PEFT_PREFIX = "base_model.model."


class GATrainer(Trainer):
    """Trainer that also saves and restores what is trained beside LoRA."""

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
        if isinstance(self.model, PeftModel):
            load_trainable(self.model, load_file(Path(resume_from_checkpoint) / TRAINABLE_PARAMS))


class GCIMTrainer(GATrainer):
    """Stage 1: beside every checkpoint-N stands N/, the encoder with its LoRA merged in."""

    def __init__(self, *args, encoder: torch.nn.Module, encoder_config: GeoEncoderConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoder, self.encoder_config = encoder, encoder_config

    def save_encoder(self, path: Path) -> None:
        """Every rank must call it, for ZeRO-3 gathers the weights; rank 0 writes."""
        merged = merged_state_dict(self.encoder)
        if self.args.should_save:
            save_encoder(merged, self.encoder_config, path)
            log.info("encoder saved: %s", path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if output_dir and Path(output_dir).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self.save_encoder(Path(self.args.output_dir) / str(self.state.global_step) / MERGED_ENCODER)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            prune_encoders(Path(self.args.output_dir))

    @property
    def final_encoder(self) -> Path:
        return Path(self.args.output_dir) / FINAL_ENCODER


def prune_encoders(output_dir: Path) -> None:
    """Remove N/ where --save_total_limit has removed checkpoint-N. Nothing but our own encoder folders is touched."""
    for folder in output_dir.iterdir():
        is_folder = folder.name.isdigit() and folder.is_dir() and not folder.is_symlink()
        checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{folder.name}"
        if is_folder and (folder / MERGED_ENCODER).exists() and not checkpoint.exists():
            shutil.rmtree(folder)


def resume_point(args) -> str | None:
    """The checkpoint to go on from: --resume_from_checkpoint names one, or says `auto` (or True): the last."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() in ("auto", "true"):
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        log.info("resuming from %s", last or "nothing: no checkpoint yet")
        return last
    if not Path(wanted).is_dir():
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder; name a checkpoint-N, or say auto")
    return wanted


def finished(checkpoint: Path | str, args) -> bool:
    """Whether the run that wrote `checkpoint` had reached its end, and `args` ask for no more."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= args.num_train_epochs


def train(trainer: Trainer) -> bool:
    """Train from the start or from where --resume_from_checkpoint says; returns whether anything was left to train.

    transformers itself takes one more step when it resumes a run that had finished.
    """
    checkpoint = resume_point(trainer.args)
    if checkpoint and finished(checkpoint, trainer.args):
        log.info("%s: this run has finished, nothing is left to train", checkpoint)
        trainer._load_from_checkpoint(checkpoint)
        return False
    trainer.train(resume_from_checkpoint=checkpoint)
    return True


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
