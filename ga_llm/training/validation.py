"""Validation while training (--eval_strategy): the loss on questions that nothing is trained on, the best checkpoint by
it, early stopping.

The loss is that of the training, in nats per token that counts, without dropout or smoothed labels, and with full
attention where the training has S²-Attn's, as the test has it. With --loss_on poi_ids it is on the answers' ids alone:
what the prompts show besides is train's history. All decisions follow from the log that a checkpoint keeps, so a run
that goes on decides as one that was never interrupted. Nothing here draws a random number.
"""
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json
from ga_llm.pairs.sft_data import IGNORED, LINES, drawn
from ga_llm.training import finite, staging
from ga_llm.training.run_log import LoggedTrainer, note_best

log = logging.getLogger(__name__)

LOSS, TOKENS = "eval_loss", "eval_tokens"       # in a line of the log: nats per token, and of how many


def check(args) -> None:
    """What can be known to be wrong with the flags, and where the questions lie. Raises UserError."""
    if args.save_strategy == "best":
        raise UserError("--save_strategy best: a run could not go on from its last step; give --save_strategy "
                        "steps --load_best_model_at_end True, which keeps the best beside the last")
    if args.eval_on_start:
        raise UserError("--eval_on_start True: a run that goes on would evaluate once more; leave it out, and run "
                        "test_next_gps.py --test_type projector")
    if not args.evaluates:
        given = next((name for name in ("eval_data_path", "eval_limit", "early_stopping_patience",
                                        "load_best_model_at_end") if getattr(args, name)), None)
        if given:
            raise UserError(f"--{given}: goes with validation; add --eval_strategy steps or epoch")
        return
    for flag in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, flag):
            raise UserError(f"--{flag}: the validation loss is computed as the training's is; leave it out")
    if args.metric_for_best_model not in (None, "loss", LOSS) or args.greater_is_better:
        raise UserError(f"--metric_for_best_model {args.metric_for_best_model}: the best has the lowest {LOSS}; leave "
                        "out --metric_for_best_model and --greater_is_better")
    if getattr(args.lr_scheduler_type, "value", "") in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(f"--lr_scheduler_type {args.lr_scheduler_type.value}: its rate would depend on which questions "
                        "are validated on, and when; give one that follows from the step")
    args.eval_data_path = str(questions(args))
    _check_alike(args)
    if getattr(args, "eval_ranked", 0):     # days later it would be too late
        if not (args.eval_data_path.endswith(LINES) and artifacts.dataset_of(args.gps_mapping_path)):
            raise UserError(f"--eval_ranked {args.eval_ranked}: ranking wants questions as lines (.txt), and the "
                            "mapping in datasets/<name>/preprocessed, where process_llm_gps.py and run.py write them; "
                            "give --eval_ranked 0 for the loss alone")
        artifacts.require(Path(args.gps_mapping_path).with_name(artifacts.split_sample("train")),
                          "python data-preprocess/run.py -f best_conf/<name>.yml")


def check_steps(args) -> None:
    """Before transformers says the same in words of its own. Raises UserError."""
    if args.load_best_model_at_end and args.eval_strategy == "steps" and args.eval_steps != args.save_steps:
        raise UserError(f"--load_best_model_at_end True: each evaluation needs its checkpoint, and each checkpoint its "
                        f"evaluation; give --eval_steps {args.save_steps:g}, as --save_steps, or leave it out")


def questions(args) -> Path:
    """The validation questions: those given, or those that were made with --data_path's. Raises UserError."""
    train = Path(args.data_path)
    settings = artifacts.question_settings(train)
    found = read_json(settings) if settings.is_file() else {}
    script = "process_projector_gps_stage1.py" if found.get("stage") == 1 else "process_llm_gps.py"
    mapped = artifacts.dataset_of(args.gps_mapping_path)
    elsewhere = f" -datasets {mapped[1]}" if mapped and mapped[1] != artifacts.DATASETS else ""
    made_by = f"python data-preprocess/{script} -dataset_name {found.get('dataset', '…')}{elsewhere} -validate True"
    if args.eval_data_path:
        path = artifacts.require(args.eval_data_path, f"{made_by}, and the training questions' other flags,")
        if path.name.startswith("test_"):
            raise UserError(f"--eval_data_path {path}: questions of the test split, on which nothing may be chosen; "
                            "give validation questions")
        if path.samefile(train):
            raise UserError(f"--eval_data_path {path}: the questions that it is trained on; give validation questions")
        return path
    if not train.name.startswith("train_") or found.get("stage") == "pam":
        raise UserError(f"--eval_strategy: {train} has no validation questions beside it; give --eval_data_path")
    path = train.with_name(train.name.replace("train_", "validate_", 1)).with_suffix(LINES)
    if not path.is_file():
        raise UserError(f"--eval_strategy: {path} not found; make it with `{made_by}` and the training questions' "
                        "other flags, or give --eval_data_path")
    return artifacts.require(path, made_by)


def _check_alike(args) -> None:
    """Raises UserError if both question files tell how they show a check-in, and it is not the same."""
    files = [Path(args.data_path), Path(args.eval_data_path)]
    settings = [artifacts.question_settings(path) for path in files]
    if not all(path.is_file() for path in settings):
        return
    ours, theirs = map(read_json, settings)
    for name, what in (("stage", "are of stage"), ("fields", "show"), ("answer", "are answered by")):
        if ours.get(name) != theirs.get(name):
            raise UserError(f"{files[1]}: its questions {what} {theirs.get(name)}, those of --data_path "
                            f"{ours.get(name)}; make both with the same flags")


class Drawn(Dataset):
    """`some` of a data set's pairs, which stand for all (`sft_data.drawn`). lengths: (some,) tokens of each."""

    def __init__(self, dataset, some: int):
        self.dataset, self.members = dataset, drawn(len(dataset), some)
        self.lengths = dataset.lengths[self.members]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[self.members[index]]


class ValidatedTrainer(LoggedTrainer):
    """Trainer that evaluates as this module says. eval_dataset: pairs, or batches or trees of them, with `lengths`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Validation())

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The loss, the tokens that it is the mean of, and the seconds that it took. Every process must call it.

        Departure from transformers, which takes the mean over batches, whatever they hold, and whose DataLoader draws
        from the random numbers of the training.
        """
        began, model = time.perf_counter(), self._wrap_model(self.model, training=False)
        for part in (model, self.optimizer):
            if callable(getattr(part, "eval", None)):       # some optimizers keep other weights for that
                part.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for items, counts in shares(self.eval_dataset.lengths, self.args):
            inputs = self._prepare_inputs(self.data_collator([self.eval_dataset[i] for i in items]))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**inputs, use_cache=False, num_items_in_batch=1).loss
            total += counts * torch.stack([loss.double(), (inputs["shift_labels"] != IGNORED).sum().double()])
        loss, tokens = self.accelerator.reduce(total, "sum").tolist()
        seconds = time.perf_counter() - began
        if self._last_line is not None:     # the training's tokens per second are not about this
            self._last_line += seconds
        if not math.isfinite(loss):
            raise finite.diverged(self, "validation loss")
        found = {LOSS: loss / tokens, TOKENS: int(tokens), "eval_runtime": round(seconds, 3)}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _determine_best_metric(self, metrics, trial) -> bool:
        """`best` does: transformers forgets that a checkpoint has moved, or never was."""
        return False

    def kept(self) -> int | None:
        """The best step up to now of those with a checkpoint, this one counted. For the process that writes them."""
        found = best(self.state.log_history, {*staging.steps(self.args.output_dir), self.state.global_step})
        return found and found["step"]

    def conclude(self) -> None:
        """At the end: which step's checkpoint is the result, and on the first process, a word on it. All must call it.
        """
        self.result_step = self.state.global_step
        if not self.args.evaluates:
            return
        self.accelerator.wait_for_everyone()        # the last checkpoint has its name
        found = best(self.state.log_history, set(staging.steps(self.args.output_dir)))
        if found is None:
            return
        self.result_step = found["step"] if self.args.load_best_model_at_end else self.result_step
        folder = staging.checkpoint(self.args.output_dir, found["step"])
        if self.args.should_save:
            note_best(self.args.output_dir, {"checkpoint": folder.name, "step": found["step"], LOSS: found[LOSS]})
        log.info("best validation loss of the checkpoints: %.4f, %s%s", found[LOSS], folder,
                 "" if self.result_step == found["step"] else
                 f"; the result is the last, checkpoint-{self.result_step}, without --load_best_model_at_end True")


def shares(lengths: np.ndarray, args) -> Iterator[tuple[list[int], bool]]:
    """(items, whether they count): this process's batches, the longest first. All processes get as many, for where
    weights are shared out they need each other: one that has none left gets one that does not count."""
    order, size = np.argsort(-np.asarray(lengths), kind="stable").tolist(), args.per_device_eval_batch_size
    batches = [order[i:i + size] for i in range(0, len(order), size)]
    for first in range(0, len(batches), args.world_size):
        own = first + args.process_index
        yield batches[own if own < len(batches) else first], own < len(batches)


def evaluations(history: Iterable[dict]) -> list[dict]:
    """The evaluations in a log, with their step and loss; of those on other questions than the last, none."""
    found = [line for line in history if isinstance(line, dict) and type(line.get(LOSS)) in (int, float)
             and type(line.get("step")) is int]
    return [line for line in found if line.get(TOKENS) == found[-1].get(TOKENS)]


def best(history: Iterable[dict], steps: set[int]) -> dict | None:
    """Of the evaluations at one of `steps` the one with the lowest loss, the earliest among equals."""
    return min((line for line in evaluations(history) if line["step"] in steps), key=lambda line: line[LOSS],
               default=None)


def stopped(history: Sequence[dict], patience: int | None) -> bool:
    """Whether the last `patience` evaluations have all been no better than the best before them; None: never."""
    losses = [line[LOSS] for line in evaluations(history)]
    return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


class Validation(TrainerCallback):
    """When to evaluate, beside transformers' own rules; and when to stop early, with a checkpoint.

    An epoch's evaluation is made at the end of its last step, before anything is saved there: a run that goes on from
    that checkpoint has it. transformers makes it afterwards.
    """

    def __init__(self):
        self.stopped_at = None

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch and (
                state.epoch == int(state.epoch) or state.global_step >= state.max_steps):
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, **kwargs):
        if stopped(state.log_history, args.early_stopping_patience) and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_training_stop = control.should_save = True
            log.info("stopped at step %d of %d: the validation loss has not fallen for %d evaluation(s) "
                     "(--early_stopping_patience)", state.global_step, state.max_steps, args.early_stopping_patience)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = False
        if self.stopped_at is not None:
            control.should_save = False     # --save_strategy epoch: it is saved already
