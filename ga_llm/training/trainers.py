"""The Trainers of both stages: their checkpoints are whole or not there, and a run goes on from one exactly.

What lies in a checkpoint is told in `checkpoints`; when a run may go on from one, in `resuming`.
"""
import contextlib
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ga_llm.base.artifacts import GCIM, TRAINABLE_PARAMS, EncoderFiles, question_settings, require
from ga_llm.base.cli import UserError
from ga_llm.base.reading import check_finite, fingerprint, read_json, read_tensors, reason, sha256
from ga_llm.base.sharding import set_up_fsdp
from ga_llm.base.writing import atomic_write, saving
from ga_llm.llm import beside, four_bits, pointing
from ga_llm.llm.backbone import compile_layers, prepare_for_autocast
from ga_llm.training import building, checkpoint_card, finite, flags, losses, preemption, staging
from ga_llm.training.checkpoints import (ADAPTER, AGREEMENT, PATHS, PEFT_PREFIX, is_llms, llms_alone,
                                         load_weights)
from ga_llm.training.run_log import data_sha256
from ga_llm.training.sampling import EpochSampler
from ga_llm.training.validation import ValidatedTrainer
from geo_encoder.gps_tokens import read_gps_mapping
from geo_encoder.weights import digest, merged_state_dict, save_encoder

log = logging.getLogger(__name__)

FASTER = 10     # times the learning rate, for what is looked up in the pointer's tables

# transformers 5.17 has several processes on a CPU read their optimizer back to "cpu:0"; torch knows "cpu" alone.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None)


class LastStep(TrainerCallback):
    """--save_strategy no: the last step is saved all the same. transformers would leave nothing of the training."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.save_strategy == SaveStrategy.NO and state.global_step >= state.max_steps and not args.dry_run:
            control.should_save = True


class GATrainer(ValidatedTrainer):
    """Trainer whose checkpoints are whole or not there, hold what is trained beside LoRA, and are gone on from exactly.

    encoders: of stage 2, what tells the frozen encoders apart (`injection.attach_encoders`); none are if all are
    trained.
    """

    def __init__(self, *args, encoders: dict[str, str] | None = None, **kwargs):
        with building.of_flags("flags"):
            super().__init__(*args, **kwargs)
        self.encoders, self.flags = encoders, flags.deciding(self.args)
        self.args.logging_nan_inf_filter = False        # such a loss ends the run
        if self.label_smoother is not None:
            self.label_smoother = losses.AlignedSmoother(self.label_smoother.epsilon)
        if self.args.bf16 or self.args.fp16:
            prepare_for_autocast(self.model)
        if self.args.compiles_layers:
            with building.of_flags(f"--torch_compile {self.args.compile_options}"):
                compile_layers(self.model, **self.args.compile_options)
        self.preemption = preemption.Preemption()
        self.add_callback(self.preemption)
        self.add_callback(LastStep)

    def get_train_dataloader(self):
        with building.of_flags("--dataloader_…"):
            return super().get_train_dataloader()

    def create_scheduler(self, *args, **kwargs):
        with building.of_flags(building.schedule(self.args)):
            return super().create_scheduler(*args, **kwargs)

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

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.label_smoother is not None:
            inputs = {**inputs, "labels": inputs["shift_labels"]}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        finite.check_step(self, tr_loss, grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        with saving(self.args.output_dir):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            staging.publish(self.args.output_dir, self.state.global_step, self.args.save_total_limit, self.kept())
            log.info("saved: %s", staging.checkpoint(self.args.output_dir, self.state.global_step))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Write the model's part of a checkpoint; rank 0 alone has something to write."""
        if not isinstance(self.model, PeftModel):
            # What is trained with the LLM is no part of it, for those who load the folder as a model.
            state_dict = state_dict if state_dict is not None else self.model.state_dict()
            super()._save(output_dir, llms_alone(state_dict))
            others = {name: tensor.contiguous() for name, tensor in state_dict.items() if not is_llms(name)}
            if others and self.args.should_save:
                save_file(others, Path(output_dir or self.args.output_dir) / TRAINABLE_PARAMS)
        elif self.args.should_save:
            output_dir = Path(output_dir or self.args.output_dir)
            state_dict = state_dict if state_dict is not None else self.model.state_dict()
            # PEFT would add both embedding matrices, for they were resized; they stand in TRAINABLE_PARAMS if trained.
            self.model.save_pretrained(str(output_dir), state_dict=state_dict, save_embedding_layers=False)
            kept = {name: state_dict[name].contiguous() for name in self._beside_lora()} | {
                name: tensor for name, tensor in self.model.named_buffers() if name in state_dict and not is_llms(name)}
            save_file({name.removeprefix(PEFT_PREFIX): tensor for name, tensor in kept.items()},
                      output_dir / TRAINABLE_PARAMS)
            self.processing_class.save_pretrained(str(output_dir))
        if self.args.should_save:
            folder, agreement = Path(output_dir or self.args.output_dir), self.agreement | {"paths": self.paths}
            with atomic_write(folder / AGREEMENT) as file:
                json.dump(agreement | self.saved_with, file)
            checkpoint_card.write(folder, agreement, self.state.global_step, isinstance(self.model, PeftModel))

    @property
    def saved_with(self) -> dict:
        """What evaluation must agree with, too, and changes while training."""
        return {}

    @property
    def paths(self) -> dict[str, str]:
        """Where evaluation finds what it needs beside the checkpoint, relative to where the training was started."""
        found = {name: getattr(self.args, name, None) for name in PATHS}
        return {name: str(path) for name, path in found.items() if path}

    @property
    def llm(self):
        """The model without PEFT around it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def create_optimizer(self, *args, **kwargs):
        """What stands beside the LLM may have a rate of its own. The pointer's tables learn faster than all else, and
        do not decay."""
        is_new = self.optimizer is None
        with building.of_flags(building.optimizer(self.args)):
            optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "beside_learning_rate", 0.0)
        pointer = getattr(self.llm, pointing.MODULE, None)
        biases = [] if pointer is None else pointer.biases
        if is_new and rate:
            own = [p for name, p in self.llm.named_parameters() if beside.is_beside(name) and p.requires_grad]
            _move(optimizer, [p for p in own if all(p is not bias for bias in biases)], lr=rate)
        if is_new and biases:
            _move(optimizer, biases, lr=FASTER * (rate or self.args.learning_rate), weight_decay=0.0)
        return optimizer

    def _beside_lora(self) -> list[str]:
        return sorted(name for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name)

    @functools.cached_property
    def agreement(self) -> dict:
        """What those who go on from a checkpoint must agree with."""
        found = {"model_max_length": self.args.model_max_length,
                 "base_model": fingerprint(self.args.model_name_or_path),
                 "encoders": self.encoders, "questions": self._questions(), "flags": self.flags,
                 "beside": beside.describe(self.llm) or None,
                 "places": read_gps_mapping(self.args.gps_mapping_path).digest,
                 "quantization": four_bits.kind(self.model),
                 "files": {"data_path": data_sha256(self), "gps_mapping_path": sha256(self.args.gps_mapping_path)},
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


def _move(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], **options) -> None:
    """Let `parameters` be a group of their own."""
    moved = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    optimizer.add_param_group({"params": parameters, **options})


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
        if self.encoders is None:
            return {}
        return {"encoders": {one.files.module: digest(merged) for one, merged in zip(self.trained, self.merged)}}

    @property
    def paths(self) -> dict[str, str]:
        """Of stage 2, its own encoders."""
        folder = Path(self.args.output_dir) / str(self.state.global_step)
        own = {} if self.encoders is None else {one.files.flag: str(folder / one.files.merged) for one in self.trained}
        return super().paths | own

    def gather(self) -> None:
        """Merge the weights as they are now. Every rank must call it, for ZeRO-3 and FSDP gather them."""
        self.merged = [merged_state_dict(one.encoder) for one in self.trained]
        finite.check_merged(self, self.merged)

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
        """Every rank must call it at the end; files appear whole. Not `trained` now, or not those of the last step
        (`conclude`): they are a checkpoint's.

        A run that was told to stop has none. Raises UserError if that checkpoint has been deleted.
        """
        if self.preemption.stopped:
            return
        output_dir, hidden = Path(self.args.output_dir), staging.staging(self.args.output_dir) / "final"
        if trained and self.result_step == self.state.global_step:
            with saving(output_dir):
                self.gather()
                self.save_encoders(hidden, final=True)
        elif self.args.should_save:
            hidden.mkdir(parents=True)
            result = output_dir / str(self.result_step)
            for files in (one.files for one in self.trained):
                shutil.copyfile(require(result / files.config, files.made_by), hidden / files.config)
                shutil.copyfile(require(result / files.merged, files.made_by), hidden / files.final)
        if self.args.should_save:
            staging.move_files(hidden, output_dir)
            staging.sweep(output_dir)
            for one in self.trained:
                log.info("saved: %s", output_dir / one.files.final)
