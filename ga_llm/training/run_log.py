"""What a run says while it trains and leaves behind to be read: trainer_log.jsonl, loss.png, run.json.

    O/trainer_log.jsonl   a JSON object per log line, whole at any time, each step once even after resuming; lines of
                          their own have eval_loss, and at the end of stage 2 eval_Acc@1 and eval_MRR
    O/loss.png            at the end: the loss, raw and smoothed, and the validation loss
    O/run.json            {"starts": [...]}: what each start of the run was made of, the first and every resumed one;
                          "best": the checkpoint with the lowest validation loss, once a run has ended

On a terminal there is one progress bar; elsewhere (`nohup`) each log line is a plain line. `--report_to tensorboard`
gets the same numbers.
"""
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ga_llm.base.artifacts import LOSS_PICTURE, RUN, TRAINER_LOG
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json, sha256
from ga_llm.base.writing import append, atomic_write

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "flash-attn")
INPUT_FILES = ("data_path", "eval_data_path", "gps_mapping_path", "geoencoder_path", "projector_path",
               "poi_embedding_path")


# What makes a line of the log, and what it is called where it is shown.
SHOWN = {"loss": "loss", "eval_loss": "validation loss", "eval_Acc@1": "validation Acc@1", "eval_MRR": "MRR"}


class LoggedTrainer(Trainer):
    """Trainer whose log lines also hold tokens per second and the share of padding, kept by a RunLog.

    Both count since the line before: tokens are those that are no padding, of all processes together, over wall time
    (saving included); padding is its share of the batches' positions.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(RunLog(self))
        self._last_line = None      # when the line before was logged, by time.perf_counter
        self._forget()

    def _forget(self) -> None:
        self._tokens = torch.zeros(2, dtype=torch.long, device=self.args.device)    # tokens, positions

    def train(self, *args, **kwargs):
        # Other log lines appear above the progress bar, not in it.
        with contextlib.nullcontext() if self.args.disable_tqdm else logging_redirect_tqdm():
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        if self._last_line is None:
            self._last_line = time.perf_counter()
        positions = inputs["input_ids"].numel()
        mask = inputs.get("attention_mask")
        self._tokens[0] += positions if mask is None else mask.sum().to(self._tokens.device)
        self._tokens[1] += positions
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every process must call it, as Trainer does."""
        if "loss" in logs and self._last_line is not None:
            tokens, positions = self.accelerator.reduce(self._tokens, "sum").tolist()
            now = time.perf_counter()
            logs["tokens_per_second"] = round(tokens / (now - self._last_line), 1)
            logs["padding_share"] = round(1 - tokens / positions, 4)
            self._last_line = now
            self._forget()
        super().log(logs, start_time)


class RunLog(TrainerCallback):
    """Shows the log lines and keeps them; the first process alone does."""

    def __init__(self, trainer: LoggedTrainer):
        self.trainer = trainer
        self.path = Path(trainer.args.output_dir) / TRAINER_LOG
        self.bar = self.began = self.ended = None       # of this training, by time.perf_counter

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.began, self.ended = state.global_step, time.perf_counter(), None
        if not state.is_world_process_zero:
            return
        add_start(Path(args.output_dir) / RUN, describe_start(self.trainer, state.global_step))
        # Steps beyond the checkpoint are trained again, and logged again.
        kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
        with atomic_write(self.path) as file:
            file.writelines(map(_json_line, kept))
        self.earlier_seconds = kept[-1]["elapsed_seconds"] if kept else 0.0
        if not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_begin(self, args, state, control, **kwargs):
        # A resumed run first passes over what it has trained on: that is no guide to the time that is left.
        if state.global_step == self.first_step:
            self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps and args.logging_strategy != "no":
            control.should_log = True       # whatever --logging_steps: the last line tells what all of it took
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not {*SHOWN} & logs.keys():
            return
        if self.began is None:      # of a run that had finished
            seconds, earlier = 0.0, next((line["elapsed_seconds"] for line in reversed(read_log(self.path))), 0.0)
        else:
            seconds, earlier = (self.ended or time.perf_counter()) - self.began, self.earlier_seconds
        line = {"step": state.global_step, **logs, "elapsed_seconds": round(earlier + seconds, 1)}
        append(self.path, _json_line(line))
        if self.bar is not None:
            self.bar.set_postfix_str(_numbers(line))
            return
        if "loss" not in line:
            log.info("step %d/%d epoch %.2f %s", state.global_step, state.max_steps, state.epoch, _numbers(line))
            return
        left = seconds / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
        log.info("step %d/%d epoch %.2f %s eta %s", state.global_step, state.max_steps, state.epoch, _numbers(line),
                 datetime.timedelta(seconds=round(left)))

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.ended = time.perf_counter()
        if state.is_world_process_zero:
            draw_log(args.output_dir)


def _numbers(line: dict) -> str:
    """The part of a log line that the bar and the plain lines share."""
    parts = [f"{shown} {line[name]:.4g}" for name, shown in SHOWN.items() if name in line]
    if "learning_rate" in line:
        parts.append(f"lr {line['learning_rate']:.3g}")
    if "tokens_per_second" in line:
        parts += [f"{line['tokens_per_second']:.0f} tok/s", f"{100 * line['padding_share']:.0f} % padding"]
    return " ".join(parts)


def _json_line(line: dict) -> str:
    """JSON knows no NaN and no infinity, which a gradient's norm may be: null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in line.items()}
    return json.dumps(finite) + "\n"


def read_log(path: Path | str) -> list[dict]:
    """The lines of a trainer_log.jsonl, none if there is no file.

    A last line that a killed run left unfinished is passed over. Raises UserError for any other that is none of ours.
    """
    path = Path(path)
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"]), "elapsed_seconds": float(line["elapsed_seconds"])})
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: not a line of a training's log; remove the file or that line"
                            ) from None
    return lines


def draw_log(output_dir: Path | str) -> None:
    """Make loss.png of the trainer_log.jsonl beside it."""
    draw_loss(read_log(Path(output_dir) / TRAINER_LOG), Path(output_dir) / LOSS_PICTURE)


def draw_loss(lines: list[dict], path: Path | str) -> None:
    """A picture of `plot_loss`; nothing for fewer than two lines with a loss."""
    if len(_curve(lines, "loss")) < 2:
        return
    from matplotlib.figure import Figure    # here, for it takes long to import, and every start would wait for it
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    plot_loss(figure.subplots(), lines)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def plot_loss(axes, lines: list[dict]) -> None:
    """Plot the loss over the steps, raw and as a running mean, and the validation loss. lines: at least two with a
    loss."""
    loss, validation = _curve(lines, "loss"), _curve(lines, "eval_loss")
    window = max(3, len(loss) // 20)
    axes.plot(loss.index, loss, color="0.7", linewidth=0.8, label="as logged")
    axes.plot(loss.index, loss.rolling(window, center=True, min_periods=1).mean(), color="black", linewidth=1.8,
              label=f"mean of {window} log lines")
    if len(validation):
        axes.plot(validation.index, validation, color="tab:blue", linewidth=1.4, marker="o", markersize=4,
                  label=f"validation; lowest {validation.min():.4g} at step {validation.idxmin()}")
    ranked = next((line for line in reversed(lines) if "eval_MRR" in line), None)
    if ranked is not None:
        axes.set_title(f"step {ranked['eval_ranked_step']}, {ranked['eval_ranked']} validation questions: Acc@1 "
                       f"{ranked['eval_Acc@1']:.4f}, MRR {ranked['eval_MRR']:.4f}", fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"{'' if len(validation) else 'training '}loss (nats per token that counts)")
    axes.grid(color="0.9")
    axes.legend()


def _curve(lines: list[dict], name: str) -> pd.Series:
    """That number of the lines that have it, by their steps."""
    found = [line for line in lines if line.get(name) is not None]
    return pd.Series([line[name] for line in found], [line["step"] for line in found], dtype=float)


def note_best(output_dir: Path | str, best: dict) -> None:
    """Write into run.json which checkpoint has the lowest validation loss. Its next start forgets it."""
    path = Path(output_dir) / RUN
    with atomic_write(path) as file:
        json.dump((read_json(path) if path.exists() else {}) | {"best": best}, file, indent=1)


def add_start(path: Path, start: dict) -> None:
    """Append to the list of starts in run.json."""
    starts = read_json(path).get("starts") if path.exists() else []
    if not isinstance(starts, list):
        raise UserError(f"{path}: no list of starts, so not a training's; remove it, or give another --output_dir")
    with atomic_write(path) as file:
        json.dump({"starts": [*starts, start]}, file, indent=1, default=str)


def read_start(path: Path, step: int | None = None) -> dict:
    """Of run.json: what the start was made of that came to `step` (None: the last one); empty if it is not told."""
    starts = read_json(path).get("starts") if path.is_file() else None
    starts = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    before = [start for start in starts if step is None or type(start.get("from_step")) is not int
              or start["from_step"] < step]
    return before[-1] if before else {}


def step_of(folder: Path | str) -> int | None:
    """N of the checkpoint-N that `folder` is or lies in."""
    found = (re.fullmatch(r"checkpoint-(\d{1,15})", name) for name in reversed(Path(folder).parts))
    return next((int(match[1]) for match in found if match), None)


def describe_start(trainer: Trainer, step: int) -> dict:
    """What a start of a run was made of, as far as it decides what comes out."""
    args = trainer.args
    files = {name: Path(getattr(args, name)) for name in INPUT_FILES if getattr(args, name, None)}
    if getattr(args, "init_from", None):
        files |= {f"init_from/{path.name}": path for path in Path(args.init_from).glob("*.safetensors")}
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "from_step": step,
        "command": shlex.join(sys.orig_argv),
        "seed": args.seed,
        "arguments": args.to_dict(),
        "versions": versions(),
        "git": git_state(ROOT),
        "files": {name: {"path": str(path), "sha256": data_sha256(trainer) if name == "data_path" else sha256(path)}
                  for name, path in files.items()},
        "base_model": describe_model_folder(args.model_name_or_path, trainer.model.config),
        "machine": {**machine(), "world_size": args.world_size},
    }


def data_sha256(trainer: Trainer) -> str:
    """That of --data_path, as it was when its tokens were cached: of the data set, or of that of its trees or batches.
    """
    dataset = trainer.train_dataset
    while not hasattr(dataset, "sha256") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return getattr(dataset, "sha256", None) or sha256(trainer.args.data_path)


def describe_evaluation(processes: int = 1) -> dict:
    """What a figure must be given with: when it was measured, by which command and code, and on what."""
    return {"date": datetime.date.today().isoformat(), "command": shlex.join(["python", *sys.argv]),
            "git": git_state(ROOT), "machine": {**machine(), "world_size": processes}}


def machine() -> dict:
    return {"cpu": cpu_name(), "cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["torch"] = torch.__version__      # names its build, too: +cpu, +cu130
    return found


def git_state(folder: Path) -> dict | None:
    """The commit of the code in `folder`, and whether a tracked file differs from it; None outside git."""
    def git(*command):
        return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True).stdout

    try:
        # A copy of the code inside another repository is not of that repository's commit.
        git("ls-files", "--error-unmatch", "ga_llm/training/run_log.py")
        return {"commit": git("rev-parse", "HEAD").strip(),
                "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ".").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_model_folder(path: str, config) -> dict:
    """Which base model it was: its config.json, and a hash of its files' names and sizes; of the hub, the commit."""
    folder = Path(path)
    if not folder.is_dir():
        return {"path": path, "commit": getattr(config, "_commit_hash", None)}
    listing = sorted(f"{file.name} {file.stat().st_size}" for file in folder.iterdir() if file.is_file())
    return {"path": path, "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
            "files_sha256": hashlib.sha256("\n".join(listing).encode()).hexdigest()}


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
