"""Texts as vectors: an LLM's last hidden layer, the mean over a text's tokens (LLM4POI, Section 3.3).

    vectors-<key>.npy              (texts, hidden) float32, the longest text first
    .vectors-<key>.npy.partial     the same while it is made: its rows so far

The key is made of the texts, the model, the tokenizer and the settings: whatever changes, another file is made. A batch
is kept as soon as it is done, so that a run that was killed goes on where it stopped, and ends with the same bytes.
"""
import functools
import hashlib
import io
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ga_llm.base import reading, writing
from ga_llm.base.cli import UserError, show_progress
from ga_llm.llm import backbone
from ga_llm.pairs import sft_data

log = logging.getLogger(__name__)

FORMAT = 1      # to be raised when the file's layout or its making changes
ROW = "<f4"


class TextVectors:
    """The vectors of texts, in the texts' order: `[row numbers]` gives (rows, hidden) float32, read from the disk."""

    def __init__(self, path: Path, order: np.ndarray):
        """order: the text that each row of the file belongs to. Raises UserError if the file is damaged."""
        try:
            self.rows = np.load(path, mmap_mode="r")
            if self.rows.dtype != ROW or self.rows.ndim != 2 or len(self.rows) != len(order):
                raise ValueError(f"holds {self.rows.dtype} {self.rows.shape}")
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged ({reading.reason(error)}); delete it, and it is made again") from None
        self.places = np.argsort(order)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self.rows[self.places[numbers]]


class TextEncoder:
    """Gives the vectors of texts, none of them empty; the model is loaded when one is missing.

    dtype: the model's; None: bfloat16 on a GPU, else float32. folder: where the vectors are kept; the caller is alone
    there.
    """

    def __init__(self, model: str, max_tokens: int, batch_size: int, dtype: str | None, folder: Path):
        self.path, self.max_tokens, self.batch_size, self.folder = model, max_tokens, batch_size, folder
        self.dtype = dtype or backbone.default_dtype()

    @functools.cached_property
    def tokenizer(self):
        return backbone.load_tokenizer(self.path)

    @functools.cached_property
    def model(self):
        """Without its head: no logits are computed."""
        model = backbone.load_llm(self.path, self.max_tokens, "sdpa", getattr(torch, self.dtype)).base_model
        return model.eval()

    def __call__(self, texts: list[str]) -> TextVectors:
        # By length, so that a batch pads little; the longest first, so that what does not fit fails at once.
        order = np.array(sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i])), dtype=int)
        path = self.folder / f"vectors-{self._key(texts[i] for i in order)}.npy"
        if not path.exists():
            self._make(path, [texts[i] for i in order])
        log.info("%d texts as vectors: %s", len(texts), path)
        return TextVectors(path, order)

    def _key(self, texts) -> str:
        digest = hashlib.sha256()
        for text in texts:
            digest.update(text.encode() + b"\n")
        config = Path(self.path) / "config.json"
        about = {"format": FORMAT, "texts": digest.hexdigest(), "model": reading.fingerprint(self.path) or self.path,
                 "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
                 "tokenizer": hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
                 "max_tokens": self.max_tokens, "batch_size": self.batch_size, "dtype": self.dtype}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def _make(self, path: Path, texts: list[str]) -> None:
        """Write what is missing of the vectors of `texts`, and then let the file take its name."""
        partial, started = path.with_name(f".{path.name}.partial"), time.monotonic()
        hidden = self.model.config.hidden_size
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": ROW, "fortran_order": False, "shape": (len(texts), hidden)})
        head, row = head.getvalue(), hidden * np.dtype(ROW).itemsize
        with writing.naming(partial), open(partial, "a+b", buffering=0) as file:
            file.seek(0)
            if file.read(len(head)) != head:
                file.truncate(0)
                _write(file, head)
            # Whole batches: a text's last bits depend on what it is padded to.
            done = max(0, os.fstat(file.fileno()).st_size - len(head)) // row // self.batch_size * self.batch_size
            file.truncate(len(head) + done * row)
            if done:
                log.info("%s: goes on behind %d of %d texts", partial, done, len(texts))
            for first in tqdm(range(done, len(texts), self.batch_size), unit="batch", disable=not show_progress()):
                _write(file, self._encode(texts[first:first + self.batch_size]).astype(ROW).tobytes())
            os.fsync(file.fileno())
            os.replace(partial, path)
        log.info("%d of %d texts encoded, %.1f s", len(texts) - done, len(texts), time.monotonic() - started)

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> np.ndarray:
        """(texts, hidden) float32: the mean over each text's tokens; of a long text its last `max_tokens`."""
        ids = [torch.tensor(sft_data.truncate(ids, self.max_tokens, self.tokenizer.bos_token_id))
               for ids in self.tokenizer(texts)["input_ids"]]
        # On the right, where no token that counts attends to it.
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(own) for own in ids])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        device = self.model.device
        states = self.model(input_ids=padded.to(device), attention_mask=mask.long().to(device),
                            use_cache=False).last_hidden_state.float()
        means = (states * mask.to(device)[..., None]).sum(1) / lengths.to(device)[:, None]
        if not means.isfinite().all():
            raise UserError(f"{self.path}: gives NaN or infinity for a trajectory in {self.dtype}; give -dtype float32")
        return means.cpu().numpy()


def _write(file, data: bytes) -> None:
    """All of it, or an OSError; a file without a buffer may take a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest):]
