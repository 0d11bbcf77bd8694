"""A trained model as a plain Hugging Face folder, which needs nothing of this project.

    E/config.json, model.safetensors, tokenizer…, generation_config.json    what transformers 5 and 4.5x, and vLLM, read
    E/README.md                                                             the model card
    E/ga_llm.json                                                           how it is asked, for recommend.py
    E/model-q8_0.gguf                                                       the model for llama.cpp, if asked for
    E/pointer.safetensors                                                   the pointer, if there is one, for it alone
"""
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

from ga_llm.base import artifacts, writing
from ga_llm.base.cli import UserError
from ga_llm.base.prompts import ORDER
from ga_llm.base.reading import WAY_OUT, read_json
from ga_llm.llm import pointing
from ga_llm.serving import gguf_file, hub, transformers_4
from ga_llm.training import run_log
from ga_llm.training.checkpoints import AGREEMENT

ANSWER_TOKENS = 64      # more than an answer takes, one token a digit
DAY = 24 * 60           # minutes: what ends a trajectory where the data set's YAML does not say it
QUESTION_KINDS = {"fields": list, "use_sim": bool, "max_history": int}      # for recommend.py; history_step beside


@torch.no_grad()
def plain(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Merge LoRA, and let the input embedding hold what the LLM saw: the places' vectors in their tokens' rows.

    model: as `trained.load` gives it, in fp32. The rows are asked of the embedding itself, with all that acts on it.
    Where input and output embeddings were one, the output keeps the rows that it had, as its own weights.
    """
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    hooked = model.get_input_embeddings()
    rows = hooked(torch.arange(hooked.num_embeddings, device=hooked.weight.device))
    model.set_input_embeddings(nn.Embedding(*rows.shape, padding_idx=hooked.padding_idx, _weight=rows.clone()))
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}        # what transformers leaves out when it saves
    model.config.use_cache = True
    model.requires_grad_(False)
    return model.to(dtype)


def save(model: nn.Module, tokenizer, context: int, folder: Path, pointer: nn.Module | None = None,
         gguf: str | None = None) -> None:
    """Write what transformers reads, the pointer in fp32, and a GGUF file of that kind.

    model: a `plain` one; context: tokens.
    """
    # What the base brings for chats (a template, sampling) is not what was trained.
    tokenizer.chat_template = None
    tokenizer.model_max_length = context
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        do_sample=False, max_new_tokens=ANSWER_TOKENS)
    with writing.saving(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if pointer is not None:
            state = {f"{pointing.MODULE}.{name}": tensor.contiguous() for name, tensor in pointer.state_dict().items()}
            save_file(state, folder / artifacts.POINTER)
        transformers_4.readable(folder)
        if gguf:
            gguf_file.write(model, tokenizer, context, folder / gguf_file.name(gguf), gguf)
    for file in folder.glob("*.safetensors"):       # which only this user may read
        shutil.copymode(folder / "config.json", file)


def reads_prefix(tokenizer, prompt: str, answer: str) -> bool:
    """Whether the prompt by itself has the tokens that it has in front of the answer."""
    alone, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    return whole[:len(alone)] == alone


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, which takes its name when all in it is on disk; what a killed run left is removed.

    Raises UserError if `path` is there, or another run is writing it.
    """
    check_new(path)
    path = Path(os.path.abspath(path))
    hidden = path.with_name(f".{path.name}{writing.UNFINISHED}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing.locked(path.with_name(f".{path.name}{writing.LOCK}"), wait=False):
        _remove(hidden)
        hidden.mkdir()
        try:
            yield hidden
            writing.to_disk(hidden)
            check_new(path)
            os.rename(hidden, path)
        except BaseException:
            _remove(hidden)
            raise


def check_new(path: Path) -> None:
    """Raises UserError if `path` is there."""
    if os.path.lexists(path):
        raise UserError(f"--export_dir {path}: exists; remove it, or give another name")


def _remove(folder: Path) -> None:
    """Remove an unfinished folder, in which there are files alone; of a link, the link."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def question_settings(checkpoint: Path, agreement: dict, given: Path | None) -> dict:
    """What the training's questions showed: as the checkpoint's `agreement` says, else the file `given`.

    Raises UserError if neither says it, or they differ.
    """
    found, where = agreement.get("questions"), checkpoint / AGREEMENT
    if given is not None:
        other, where = read_json(given), given
        if found is not None and found != other:
            raise UserError(f"{given}: not what {checkpoint / AGREEMENT} says of the training's questions; leave out "
                            "--questions")
        found = other
    if found is None:
        raise UserError(f"{where}: does not say what the questions showed, as of an earlier version; give --questions "
                        "FILE.settings.json, which process_llm_gps.py writes beside the question file")
    check_questions(found, where)
    return found


def check_questions(found: dict, where: Path) -> None:
    """Raises UserError unless `found` says how to ask: `QUESTION_KINDS`, and perhaps history_step."""
    for name, kind in QUESTION_KINDS.items():
        if type(found.get(name)) is not kind or kind is int and found[name] < 0:
            raise UserError(f"{where}: {name} is {str(found.get(name))[:100]!r}; {WAY_OUT}")
    step = found.get("history_step")
    if step is not None and (type(step) is not int or step < 1):
        raise UserError(f"{where}: history_step is {str(step)[:100]!r}; {WAY_OUT}")
    if not {"poi"} <= set(map(str, found["fields"])) <= set(ORDER):
        raise UserError(f"{where}: fields are {str(found['fields'])[:100]}; {WAY_OUT}")


def base_name(path: str) -> str:
    """A base model as a card may name it: by the hub's name, or of a local folder by the last part alone."""
    return hub.name_on_hub(path) or (Path(path).resolve().name if Path(path).is_dir() else path)


def read_counts(folder: Path) -> dict[str, dict[str, int]]:
    """{split: {kind: number}} of a data set's preprocessed folder; {} if it has no stats.json, or of another make."""
    path = folder / artifacts.STATS
    found = read_json(path) if path.exists() else {}
    counts = {split: found.get(split) for split in artifacts.SPLITS}
    whole = all(isinstance(kinds, dict) and all(type(n) is int for n in kinds.values()) for kinds in counts.values())
    return counts if whole else {}


def read_run(checkpoint: Path) -> dict | None:
    """How the training that came to `checkpoint` was started, from the run.json above it; None if it is not told."""
    folder = checkpoint.resolve()
    start = run_log.read_start(folder.parent / artifacts.RUN, run_log.step_of(folder))
    return start if isinstance(start.get("arguments"), dict) else None


def read_metrics(checkpoint: Path) -> dict | None:
    """The evaluation beside the checkpoint, None if there is none; one of another make counts as none."""
    path = checkpoint / artifacts.METRICS
    found = read_json(path) if path.exists() else {}
    return found if isinstance(found.get("all"), dict) and isinstance(found["all"].get("model"), dict) else None
