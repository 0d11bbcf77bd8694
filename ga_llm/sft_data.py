"""Question-answer pairs as training batches: tokens, loss on the answer alone, padding on the right."""
import logging
from pathlib import Path

import numpy as np
import orjson
import torch
from torch.utils.data import Dataset

from ga_llm import prompts
from ga_llm.artifacts import require
from ga_llm.cli import UserError

log = logging.getLogger(__name__)

IGNORED = -100      # the label that the loss passes over


def read_pairs(path: Path | str) -> list[str]:
    """The joined pairs of a training file (JSON array of {question, answer})."""
    path = Path(path)
    try:
        records = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno} column {error.colno}: not JSON ({error.msg}); make it again with "
                        "data-preprocess/process_….py") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: expected a JSON array of {{question, answer}} with at least one pair")
    pairs = []
    for i, record in enumerate(records):
        try:
            pair = prompts.join(record["question"], record["answer"])
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{path}, pair {i}: expected texts under the keys question and answer") from None
        if prompts.ANSWER not in pair:
            raise UserError(f"{path}, pair {i}: no {prompts.ANSWER} in question or answer")
        pairs.append(pair)
    return pairs


def read_test_pairs(path: Path | str, made_by: str) -> list[str]:
    """The joined pairs of a test file, one per line."""
    path = require(path, made_by)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); make it again with `{made_by}`") from None
    for i, line in enumerate(lines, start=1):
        if prompts.ANSWER not in line:
            raise UserError(f"{path}, line {i}: no {prompts.ANSWER}; make it again with `{made_by}`")
    return lines


def check_gps_ids(pairs: list[str], known: np.ndarray, source: Path | str, mapping: Path | str) -> None:
    """Every `<GPS n>` must have a row in the mapping. Raises UserError naming the first pair where one has none."""
    known = set(known.tolist())
    for i, pair in enumerate(pairs):
        unknown = {int(n) for n in prompts.GPS_TOKEN.findall(pair)} - known
        if unknown:
            raise UserError(f"{source}, pair {i}: {prompts.gps_token(min(unknown))} has no row in {mapping}; give the "
                            "mapping that run.py wrote for this data set")


def encode(tokenizer, pair: str, max_length: int) -> tuple[list[int], int]:
    """Tokens of prompt, answer and EOS, and the index at which the answer begins.

    The text is tokenized as a whole, as evaluation does. What exceeds `max_length` is cut from the left, behind BOS,
    so that the most recent check-ins survive.
    """
    prompt, _ = prompts.split(pair)
    encoding = tokenizer(pair, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    start = next((i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt)), len(ids))
    if ids[-1] != tokenizer.eos_token_id:
        ids = ids + [tokenizer.eos_token_id]
    cut = truncate(ids, max_length, tokenizer.bos_token_id)
    return cut, start - (len(ids) - len(cut))


def truncate(ids: list[int], max_length: int, bos: int | None) -> list[int]:
    """The last `max_length` tokens, with BOS kept in front if there was one."""
    if len(ids) <= max_length:
        return ids
    if ids[0] == bos:
        return ids[:1] + ids[len(ids) - max_length + 1:]
    return ids[len(ids) - max_length:]


class PairDataset(Dataset):
    """Tokenized pairs: {"input_ids": list of token ids, "answer_start": index of the answer's first token}."""

    def __init__(self, pairs: list[str], tokenizer, max_length: int):
        self.pairs, self.tokenizer, self.max_length = pairs, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        ids, start = encode(self.tokenizer, self.pairs[index], self.max_length)
        if start < 1:
            raise UserError(f"pair {index}: the answer alone has {len(ids) - start} tokens; raise --model_max_length "
                            f"(now {self.max_length})")
        return {"input_ids": ids, "answer_start": start}


class AnswerCollator:
    """Batches padded on the right; the LLM computes logits from the first answer of the batch on, and no others.

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
            labels[row, start:len(ids)] = ids[start:]
        keep = longest - min(item["answer_start"] for item in batch) + 1
        first = longest - keep
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels[:, first:-1].contiguous(),
                "shift_labels": labels[:, first + 1:].contiguous(), "logits_to_keep": keep}
