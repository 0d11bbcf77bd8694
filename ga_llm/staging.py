"""A checkpoint is complete or invisible: it is written in a hidden folder and renamed once all of it is on disk.

    O/.incomplete/      what is being written, and what is being deleted
    O/checkpoint-N/     whole
    O/N/                stage 1's encoder of that checkpoint: there before checkpoint-N appears, and gone after it

Departure from transformers, which writes checkpoint-N file by file and deletes it file by file: a run that is killed
meanwhile leaves a folder that --resume_from_checkpoint auto would take for a checkpoint.
"""
import os
import re
import shutil
import tempfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ga_llm.artifacts import MERGED_ENCODER
from ga_llm.cli import UserError
from ga_llm.writing import to_disk


def staging(output_dir: Path | str) -> Path:
    return Path(output_dir) / ".incomplete"


def checkpoint(output_dir: Path | str, step: int | str) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def steps(output_dir: Path | str) -> list[int]:
    """The steps at which there are checkpoints, in order."""
    found = (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*/"))
    return sorted(int(match[1]) for match in found if match)


def last_checkpoint(output_dir: Path | str) -> Path | None:
    """That of the highest step."""
    return next((checkpoint(output_dir, step) for step in reversed(steps(output_dir))), None)


def publish(output_dir: Path | str, step: int, keep: int | None) -> None:
    """Let the checkpoint of `step` appear, then remove all but the last `keep` up to it (None or 0: keep all).

    One process must call it, when all have written. Checkpoints beyond `step`, left by a run that went further, stay.
    """
    hidden, visible = checkpoint(staging(output_dir), step), checkpoint(output_dir, step)
    to_disk(staging(output_dir))
    _hide(visible)      # one of the same number, of an earlier run
    if (staging(output_dir) / str(step)).exists():
        move_files(staging(output_dir) / str(step), Path(output_dir) / str(step))
    os.rename(hidden, visible)
    older = [number for number in steps(output_dir) if number <= step]
    for number in older[:-keep] if keep else []:
        _hide(checkpoint(output_dir, number))
    sweep(output_dir)


def move_files(source: Path, target: Path) -> None:
    """Move the files of the folder `source`, one by one in the order of their names, into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        os.replace(file, target / file.name)
    source.rmdir()


def sweep(output_dir: Path | str) -> None:
    """Remove what a run left unfinished, and encoders N/ whose checkpoint-N is gone; nothing that is not ours.

    Raises UserError if the hidden folder is a link, for what it leads to is not ours.
    """
    folder = staging(output_dir)
    if folder.is_symlink():
        raise UserError(f"{folder}: a link; remove it, checkpoints are written there before they appear")
    if not Path(output_dir).is_dir():
        return
    for encoder in Path(output_dir).iterdir():
        is_ours = encoder.name.isdigit() and not encoder.is_symlink() and (encoder / MERGED_ENCODER).exists()
        if is_ours and not checkpoint(output_dir, encoder.name).exists():
            _hide(encoder)
    if folder.exists():
        shutil.rmtree(folder)       # does not follow links


def _hide(folder: Path) -> None:
    """Take `folder`, if there is one, out of sight at once; `sweep` deletes it. Of a link, the link alone."""
    if folder.exists() or folder.is_symlink():
        hidden = staging(folder.parent)
        hidden.mkdir(exist_ok=True)
        os.rename(folder, Path(tempfile.mkdtemp(dir=hidden)) / folder.name)
