"""A checkpoint is complete or invisible: it is written in a hidden folder and renamed once all of it is on disk.

    O/.incomplete/      what is being written, and what is being deleted
    O/checkpoint-N/     whole
    O/N/                stage 1's encoder (PAM's projector) of it: there before checkpoint-N appears, gone after it

Departure from transformers, which writes checkpoint-N file by file and deletes it file by file: a run that is killed
meanwhile leaves a folder that --resume_from_checkpoint auto would take for a checkpoint.
"""
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ga_llm.base.artifacts import GCIM, PAM
from ga_llm.base.cli import UserError
from ga_llm.base.writing import to_disk


def staging(output_dir: Path | str) -> Path:
    return Path(output_dir) / ".incomplete"


def checkpoint(output_dir: Path | str, step: int | str) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def steps(output_dir: Path | str) -> list[int]:
    """The steps at which there are checkpoints, in order."""
    return sorted(_steps(Path(output_dir).glob("*/")))


def _steps(paths: Iterable[Path]) -> set[int]:
    """N of those that are called checkpoint-N; checkpoint-007 is not ours."""
    found = (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)", path.name) for path in paths)
    return {int(match[1]) for match in found if match}


def last_checkpoint(output_dir: Path | str) -> Path | None:
    """That of the highest step."""
    return next((checkpoint(output_dir, step) for step in reversed(steps(output_dir))), None)


def publish(output_dir: Path | str, step: int, keep: int | None, best: int | None = None) -> None:
    """Let the checkpoint of `step` appear, then remove all but the last `keep` up to it (None or 0: keep all) and that
    of the step `best`.

    One process must call it, when all have written. Checkpoints beyond `step`, left by a run that went further, stay.
    """
    hidden, visible = checkpoint(staging(output_dir), step), checkpoint(output_dir, step)
    to_disk(staging(output_dir))
    _hide(visible)      # one of the same number, of an earlier run
    if (staging(output_dir) / str(step)).exists():
        encoder = Path(output_dir) / str(step)
        if encoder.is_symlink():        # what it leads to is not ours to write to
            _hide(encoder)
        move_files(staging(output_dir) / str(step), encoder)
    os.rename(hidden, visible)
    older = [number for number in steps(output_dir) if number <= step]
    for number in older[:-keep] if keep else []:
        if number != best:
            _hide(checkpoint(output_dir, number))
    sweep(output_dir)


def move_files(source: Path, target: Path) -> None:
    """Move the files of the folder `source`, one by one in the order of their names, into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        os.replace(file, target / file.name)
    source.rmdir()


def sweep(output_dir: Path | str) -> None:
    """Remove what a run left unfinished, and encoders N/ whose checkpoint-N is hidden; nothing that is not ours.

    An encoder whose checkpoint somebody else has deleted stays: it is all that is left of it. Raises UserError if the
    hidden folder is a link, for what it leads to is not ours.
    """
    folder = staging(output_dir)
    if folder.is_symlink():
        raise UserError(f"{folder}: a link; remove it, checkpoints are written there before they appear")
    for step in _hidden(output_dir):
        encoder = Path(output_dir) / str(step)
        if any((encoder / files.merged).exists() for files in (GCIM, PAM)) and not encoder.is_symlink():
            _hide(encoder)
    if folder.exists():
        shutil.rmtree(folder)       # does not follow links


def left_alone(output_dir: Path | str) -> list[Path]:
    """Encoders of an earlier run, N/ and the final one, if there is no checkpoint any more to go on from."""
    if steps(output_dir):
        return []
    hidden = {str(step) for step in _hidden(output_dir)}
    folder = Path(output_dir)
    encoders = [path for files in (GCIM, PAM) for path in folder.glob(f"*/{files.merged}")
                if path.parent.name.isdecimal() and path.parent.name not in hidden]
    return [*sorted(encoders), *(path for files in (GCIM, PAM) for path in folder.glob(files.final))]


def _hidden(output_dir: Path | str) -> set[int]:
    """The steps whose checkpoints are hidden: a run was stopped while it wrote, replaced or removed them."""
    hidden = staging(output_dir)
    return _steps([*hidden.glob("*"), *hidden.glob("*/*")]) - set(steps(output_dir))


def _hide(folder: Path) -> None:
    """Take `folder`, if there is one, out of sight at once; `sweep` deletes it. Of a link, the link alone.

    Raises UserError if it is a file, which is not ours.
    """
    if folder.is_file() and not folder.is_symlink():
        raise UserError(f"{folder}: a file, where a checkpoint's folder should be; move it away")
    if folder.exists() or folder.is_symlink():
        hidden = staging(folder.parent)
        hidden.mkdir(exist_ok=True)
        os.rename(folder, Path(tempfile.mkdtemp(dir=hidden)) / folder.name)
