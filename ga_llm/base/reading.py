"""How the files of models and checkpoints are read: they may be a stranger's, or what a full disk left of them.

Nothing in them is executed, and whatever is wrong with one of them is a UserError that names it.
"""
import hashlib
import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ga_llm.base.cli import UserError

WAY_OUT = "copy it again from where it was written, or give another"
SAMPLES, SAMPLE_BYTES = 8, 2**20    # what a fingerprint reads of a file of weights


def read_json(path: Path) -> dict:
    """The JSON object in `path`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({reason(error)}); {WAY_OUT}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; {WAY_OUT}")
    return found


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote, by name; all of them finite."""
    def tensors():
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):        # torch itself does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} is damaged")
        return _load(path)

    found = _read(path, tensors)
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UserError(f"{path}: holds something else than tensors by name; {WAY_OUT}")
    check_finite(found, path)
    return found


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a .safetensors file, from its header alone."""
    def shapes():
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return _read(path, shapes)


def check_pickle(path: Path) -> None:
    """Raises UserError unless torch.load can read `path` and execute nothing; the tensors stay on the disk."""
    _read(path, lambda: _load(path, mmap=zipfile.is_zipfile(path)))


def check_finite(tensors: dict[str, torch.Tensor], path: Path | str) -> None:
    """Raises UserError if one of the tensors of `path` holds NaN or infinity; quantized ones cannot."""
    broken = next((name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.element_size() > 1
                   and not tensor.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{path}: {broken} holds NaN or infinity; {WAY_OUT}")


def listed(index: Path) -> list[Path]:
    """The files of weights that `index` (….index.json) names; each lies beside it, for others are none of its own."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: has no weight_map of file names; {WAY_OUT}")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, which does not lie beside it; {WAY_OUT}")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name}, which is not there; {WAY_OUT}")
    return [index.parent / name for name in sorted(set(names.values()))]


def weights_files(folder: Path | str) -> list[Path]:
    """The files that transformers reads a model's weights from; none if `folder` is not one, but a name on the hub."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (Path(folder) / name).exists():
            return [Path(folder) / name]
        if (Path(folder) / f"{name}.index.json").exists():
            return listed(Path(folder) / f"{name}.index.json")
    return []


def sha256(path: Path | str) -> str:
    """The file's SHA-256, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path | str) -> str | None:
    """What tells the weights in a model's folder from others: of each file its name, size and some samples.

    None if `folder` is a name on the hub.
    """
    digest = hashlib.sha256()
    files = weights_files(folder)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(i * size // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None


def reason(error: Exception) -> str:
    """What a library says of a file, on one line; without its advice to execute the file all the same."""
    text = " ".join(str(error).split()).rstrip(".")
    called = re.search(r"GLOBAL ([\w.]+)", text)
    if called:
        return f"it would call {called[1]}"
    if isinstance(error, pickle.UnpicklingError):
        return "torch.save wrote no such file"
    if "trust_remote_code" in text:
        return "it comes with code of its own, which is not executed"
    if "ignore_mismatched_sizes" in text:
        return "its weights do not have the sizes that config.json gives"
    return text[:200] or type(error).__name__


def _load(path: Path, **options):
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def _read(path: Path, read):
    """What `read` gives. Of what a broken file makes the libraries raise, there is no list."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not' if path.is_dir() else 'no such'} file; {WAY_OUT}")
    try:
        return read()
    except PermissionError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a file of weights ({reason(error)}); {WAY_OUT}") from None
