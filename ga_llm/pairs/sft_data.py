"""Question-answer pairs as training batches: reading, tokens, where the loss is, padding on the right.

The loss is on the answer alone (paper), or, where a pair has `targets`, on these: every POI id, the prompt's too.
"""
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
import torch

from ga_llm.base import json_text, prompts
from ga_llm.base.artifacts import require
from ga_llm.base.cli import UserError

IGNORED = -100      # the label that the loss passes over
LINES = ".txt"      # how test's and validation's questions end, a pair a line
AGAIN = "make it again with data-preprocess/process_….py"


def iterate_pairs(path: Path | str) -> Iterator[str]:
    """The joined pairs of a training file (JSON array of {question, answer}), as they are read; or of a file of lines
    (.txt, `read_test_pairs`).

    Raises UserError at the first that is none, and for a file without any.
    """
    path, i = Path(path), -1
    if path.suffix == LINES:
        yield from read_test_pairs(path, "data-preprocess/process_….py")
        return
    try:
        for i, record in enumerate(json_text.records(path)):
            question, answer = record.get("question"), record.get("answer")
            if not (isinstance(question, str) and isinstance(answer, str)):
                raise UserError(f"{path}, pair {i}: expected texts under the keys question and answer; {AGAIN}")
            pair = prompts.join(question, answer)
            if prompts.ANSWER not in pair:
                raise UserError(f"{path}, pair {i}: no {prompts.ANSWER} in question or answer; {AGAIN}")
            yield pair
    except ValueError as error:
        raise UserError(f"{path}, pair {i + 1}: not JSON ({str(error).splitlines()[0].strip()}); {AGAIN}") from None
    if i < 0:
        raise UserError(f"{path}: expected a JSON array of {{question, answer}} with at least one pair; {AGAIN}")


def read_test_pairs(path: Path | str, made_by: str) -> list[str]:
    """The joined pairs of a test file, one per line; empty lines at its end do not count.

    A line ends at "\\n" or "\\r\\n" and nowhere else: a category's name may hold what Unicode calls a line's end.
    """
    path = require(path, made_by)
    try:
        text = path.read_bytes().decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); make it again with `{made_by}`") from None
    if not text:
        raise UserError(f"{path}: no pairs; make it again with `{made_by}`")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    for i, line in enumerate(lines, start=1):
        if prompts.ANSWER not in line:
            raise UserError(f"{path}, line {i}: no {prompts.ANSWER}; make it again with `{made_by}`")
    return lines


def check_places(pairs: list[str], known: Container[str], source: Path | str, mapping: Path | str) -> None:
    """Every `<GPS n>` and `<POI n>` must be `known`. Raises UserError naming the first pair where one is not."""
    for i, pair in enumerate(pairs):
        token = prompts.unknown_place(pair, known)
        if token:
            raise unknown(token, f"{source}, pair {i}", mapping)


def unknown(token: str, where: str, mapping: Path | str) -> UserError:
    """What to do about a place's token that stands for nothing."""
    if prompts.POI_TOKEN.fullmatch(token):
        return UserError(f"{where}: {token} stands for nothing; give --poi_embedding_path (and a mapping that has this "
                         "POI), or make the questions without -use_pam")
    if prompts.TIME_TOKEN.fullmatch(token):
        return UserError(f"{where}: {token} stands for nothing; such questions are for models that were trained on "
                         "them, and the file .settings.json that process_llm_gps.py writes must lie beside them")
    return UserError(f"{where}: {token} has no row in {mapping}; give the mapping that run.py wrote for this data set")


def encode(tokenizer, pair: str) -> tuple[list[int], int]:
    """Tokens of prompt, answer and EOS, and the index at which the answer begins.

    The text is tokenized as a whole, as evaluation does; token_cache.Pieces gives the same, faster.
    """
    prompt, _ = prompts.split(pair)
    encoding = tokenizer(pair, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    start = first_after(encoding["offset_mapping"], len(prompt))
    return ids if ids[-1] == tokenizer.eos_token_id else ids + [tokenizer.eos_token_id], start


def drawn(count: int, some: int) -> list[int]:
    """Which of `count` pairs stand for all, in order: `some` of them, always the same; 0, or no fewer: all."""
    if not 0 < some < count:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, some, replace=False).tolist())


def first_after(offsets, position: int) -> int:
    """The first token that reaches beyond `position` of the text."""
    return next((i for i, (_, end) in enumerate(offsets) if end > position), len(offsets))


def truncate(ids: list[int], max_length: int, bos: int | None) -> list[int]:
    """The last `max_length` tokens, so that the most recent check-ins survive, with BOS in front if there was one."""
    return ids if len(ids) <= max_length else cut(ids, max_length, keep_first=ids[0] == bos)


def cut(tokens, max_length: int, keep_first: bool):
    """The last `max_length` of more tokens, in whose place the very first one stays if it is to be kept."""
    last = tokens[len(tokens) - max_length + keep_first:]
    return tokens[:1] + last if keep_first else last


def first_target(item: dict) -> int:
    """The first token of a pair that the loss counts."""
    return int(np.argmax(item["targets"])) if "targets" in item else item["answer_start"]


class AnswerCollator:
    """Batches padded on the right; the LLM computes logits from the first target of the batch on, and no others.

    Returns input_ids and attention_mask (B, S); labels and shift_labels (B, K), the last K positions, where
    shift_labels holds the token that comes next or -100; logits_to_keep = K.
    """

    def __init__(self, pad_token_id: int):
        self.pad = pad_token_id

    def __call__(self, batch: list[dict]) -> dict:
        longest = max(len(item["input_ids"]) for item in batch)
        input_ids = torch.full((len(batch), longest), self.pad)
        attention_mask = torch.zeros((len(batch), longest), dtype=torch.long)
        labels = torch.full((len(batch), longest + 1), IGNORED)
        for row, item in enumerate(batch):
            ids, start = torch.tensor(item["input_ids"]), item["answer_start"]
            input_ids[row, :len(ids)] = ids
            attention_mask[row, :len(ids)] = 1
            if "targets" in item:
                counted = torch.from_numpy(item["targets"])
                labels[row, :len(ids)][counted] = ids[counted]
            else:
                labels[row, start:len(ids)] = ids[start:]
        keep = longest - min(map(first_target, batch)) + 1
        first = longest - keep
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels[:, first:-1].contiguous(),
                "shift_labels": labels[:, first + 1:].contiguous(), "logits_to_keep": keep}
