"""What the tests of others' files share: payloads, copies of checkpoints and models, and the runs that read them."""
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import forked
import harness
import torch
from commands import evaluation
from safetensors.torch import load_file, save_file

from ga_llm.base import writing

ADAPTER, CONFIG, TRAINED = "adapter_model.safetensors", "adapter_config.json", "trainable_params.safetensors"


class Payload:
    """Unpickling it makes the folder `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def zipped(path, content):
    torch.save(content, path)


def legacy(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def raw(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


def tar(path, content):
    """As torch wrote before 0.1.10."""
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))


def edit_json(name, **changes):
    """A change of a folder: fields of the JSON in `name` are set, or with None removed."""
    def change(folder):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in {**found, **changes}.items()
                                               if value is not None}))
    return change


def edit_tensors(name, edit):
    """A change of a folder: edit(tensors by name) changes what the safetensors file holds."""
    def change(folder):
        tensors = load_file(folder / name)
        edit(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    return change


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def copy(source: Path, target: Path, change=lambda folder: None) -> Path:
    """`target`, a changed copy of the folder `source`, without the results of evaluations."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("limit4", "predictions.jsonl", "metrics.json"))
    change(target)
    return target


def evaluate(repo, folder, *flags):
    """Four pairs, by test_next_gps.py."""
    try:
        return harness.call(repo, *evaluation(folder, "--limit", "4", *flags))
    finally:
        writing._held.close()       # as the end of a process does


def predictions(folder) -> str:
    return (Path(folder) / "limit4/predictions.jsonl").read_text()


def resume(repo, stage, output, *flags, wanted="auto"):
    """Go on with the checkpoints in `output`, to step 6."""
    return forked.run(repo, forked.training(stage, output, "--resume_from_checkpoint", wanted, *flags),
                      f"{output}.log", **forked.ranks())
