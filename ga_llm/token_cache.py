"""A question file as token ids on disk: built once, memory-mapped by every later start.

    tokens-<key>/ids.bin       the tokens of all pairs, one pair behind the other, cut to what the model takes
    tokens-<key>/index.npy     (pairs, 3) int64: where a pair ends, its tokens before cutting, where its answer begins
    tokens-<key>/about.json    what the key was made of

The key is made of the file's content, the tokenizer, the template's marker and the length: whatever changes, another
folder is built. The prompts of one user repeat each other's check-ins, so a check-in is tokenized once, not once for
every prompt that it stands in; the ids are those of tokenizing the full text.
"""
import contextlib
import hashlib
import itertools
import json
import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ga_llm import prompts, sft_data, writing
from ga_llm.cli import UserError

log = logging.getLogger(__name__)

FORMAT = 1              # to be raised when the files' layout or their reading changes
IDS, INDEX, ABOUT = "ids.bin", "index.npy", "about.json"
PAIRS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2**20      # an encoding takes about a hundred bytes a token while it exists
REMEMBERED = 300_000            # pieces; about 600 bytes each
CHECKED_EVERY = 500             # pairs, of which one is tokenized as a whole to compare


class TokenDataset(Dataset):
    """The pairs of a built folder: {"input_ids": (tokens,) int64, "answer_start": index of the answer's first token}.

    tokens, lengths, answer_starts: (pairs,) int64, of each pair before cutting, after it, and its answer's beginning.
    sha256: of the question file. Raises UserError if the folder's files are damaged or do not fit each other.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
            self.sha256, dtype = about["file"], np.dtype(about["dtype"])
            self.ends, self.tokens, self.answer_starts = self._index().T
            self.lengths = np.diff(self.ends, prepend=0)
            self.ids = np.memmap(self.folder / IDS, dtype=dtype, mode="r")
            fits = len(self.ids) == self.ends[-1] and (self.lengths <= self.tokens).all() and (
                (self.answer_starts > 0) & (self.answer_starts < self.lengths)).all()
        except FileNotFoundError as error:
            raise self._damaged(f"no {Path(error.filename).name}") from None
        except (ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
            raise self._damaged(" ".join(str(error).split())) from None
        if not fits:
            raise self._damaged(f"{IDS} and {INDEX} do not fit each other")

    def _index(self) -> np.ndarray:
        index = np.array(np.load(self.folder / INDEX, mmap_mode="r"))     # mapped first: never larger than the file
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 3 or not len(index):
            raise ValueError(f"{INDEX} holds {index.dtype} {index.shape}")
        return index

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.folder}: damaged ({what}); delete it, and the tokens are made again")

    def __reduce__(self):       # a worker maps the file by itself; pickling would copy all of it
        return TokenDataset, (self.folder,)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[self.ends[index] - self.lengths[index]:self.ends[index]]
        return {"input_ids": ids.astype(np.int64), "answer_start": int(self.answer_starts[index])}


def load(path: Path | str, tokenizer, max_length: int, mapping: Path | str, cache_dir: Path | str | None = None
         ) -> TokenDataset:
    """The pairs of the training file `path` as tokens, from beside it or from `cache_dir`; built there if need be.

    mapping: the GPS mapping whose tokens the tokenizer has, for error messages. Of several processes one builds and
    the others wait. Raises UserError for a bad file, naming the pair.
    """
    path = Path(path)
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"
    with path.open("rb") as file:
        about = {"format": FORMAT, "file": hashlib.file_digest(file, "sha256").hexdigest(),
                 "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
                 "special": [tokenizer.bos_token_id, tokenizer.eos_token_id], "template": prompts.ANSWER,
                 "max_length": max_length, "dtype": dtype}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache_dir or path.parent)
    folder, partial = root / f"tokens-{key}", root / f".tokens-{key}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f".tokens-{key}.lock"
        if folder.exists():
            with contextlib.suppress(OSError):      # a folder that cannot be written to is good enough to read from
                lock.unlink(missing_ok=True)        # that of a process killed after its work
        else:
            with writing.locked(lock, wait=True):
                if not folder.exists():         # else another process has built it meanwhile
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    _build(path, tokenizer, max_length, mapping, about, partial)
                    writing.to_disk(partial)
                    partial.rename(folder)
    except OSError as error:
        raise UserError(f"{root}: the tokens of {path.name} cannot be kept there ({error.strerror}); make room, or "
                        "give another folder with --cache_dir") from None
    log.info("tokens of %s: %s", path.name, folder)
    return TokenDataset(folder)


def _build(path: Path, tokenizer, max_length: int, mapping, about: dict, folder: Path) -> None:
    started = time.monotonic()
    try:
        index, tokenized = _tokenize(path, tokenizer, max_length, mapping, about["dtype"], folder / IDS)
    except UserError:       # a file that is refused leaves nothing behind
        shutil.rmtree(folder)
        raise
    np.save(folder / INDEX, index)
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    log.info("tokenized %d pairs of %s: %d tokens, %d of them tokenized, %.1f s", len(index), path.name,
             index[:, 1].sum(), tokenized, time.monotonic() - started)


def _tokenize(path: Path, tokenizer, max_length: int, mapping, dtype: str, ids_file: Path) -> tuple[np.ndarray, int]:
    """Write the tokens of all pairs; return the index, and how many tokens the tokenizer has really made."""
    pieces = Pieces(tokenizer, dtype)
    try:
        index = _write(path, pieces, max_length, mapping, ids_file)
    except _Unlike as pair:
        log.info("pair %s of %s: in pieces its tokens are others; the texts are tokenized as wholes", pair, path.name)
        pieces = Pieces(tokenizer, dtype, in_pieces=False)
        index = _write(path, pieces, max_length, mapping, ids_file)
    return index, pieces.tokenized


def _write(path: Path, pieces: "Pieces", max_length: int, mapping, ids_file: Path) -> np.ndarray:
    """Write the tokens of all pairs and return the index."""
    tokenizer, index, end = pieces.tokenizer, [], 0
    pairs = sft_data.iterate_pairs(path)
    with ids_file.open("wb") as file:
        while block := list(itertools.islice(pairs, PAIRS_AT_ONCE)):
            try:
                encoded = pieces.encode(block)
            except UnknownPlace as error:
                raise sft_data.unknown(error.token, f"{path}, pair {len(index) + error.pair}", mapping) from None
            for text, (ids, start) in zip(block, encoded):
                if len(index) % CHECKED_EVERY == 0 and (ids.tolist(), start) != sft_data.encode(tokenizer, text):
                    raise _Unlike(len(index))
                whole = len(ids)
                if whole > max_length:
                    ids = np.array(sft_data.truncate(ids.tolist(), max_length, tokenizer.bos_token_id), ids.dtype)
                start -= whole - len(ids)
                if start < 1:
                    raise UserError(f"{path}, pair {len(index)}: the answer alone has {len(ids) - start} tokens; raise "
                                    f"--model_max_length (now {max_length})")
                file.write(ids)
                end += len(ids)
                index.append((end, whole, start))
    return np.array(index, dtype=np.int64)


class _Unlike(Exception):
    """A pair's tokens in pieces are not those of its full text."""


class UnknownPlace(Exception):
    """`<GPS n>` or `<POI n>` that the tokenizer does not have; pair: which of the given texts holds it."""

    def __init__(self, pair: int, token: str):
        super().__init__(token)
        self.pair, self.token = pair, token


class Pieces:
    """Encodes joined pairs as sft_data.encode does, but each distinct piece of text once.

    A text is cut at `<GPS n>` and `<POI n>`, where every tokenizer cuts it too, and between "." and " " if no token of
    the vocabulary holds both, for then none can lie across. A piece is encoded behind what tells the tokenizer where it
    stands: nothing at the beginning of the text, a place's token, or that and the ".". Ids are bytes, which join fast.
    tokenized: how many tokens the tokenizer has really made.
    """

    def __init__(self, tokenizer, dtype: str, in_pieces: bool = True):
        self.tokenizer, self.backend, self.dtype = tokenizer, tokenizer.backend_tokenizer, dtype
        alone, whole = (tokenizer(".", add_special_tokens=added)["input_ids"] for added in (False, True))
        first = next(i for i in range(len(whole)) if whole[i:i + len(alone)] == alone)
        self.prefix, self.suffix = self._bytes(whole[:first]), self._bytes(whole[first + len(alone):])
        self.eos = self._bytes([tokenizer.eos_token_id])
        self.places = {token: self._bytes([token_id]) for token, token_id in tokenizer.get_added_vocab().items()
                       if prompts.PLACE_TOKEN.fullmatch(token)}
        self.in_pieces = in_pieces and bool(self.places)
        cut = prompts.PLACE_TOKEN.pattern
        self.cut = re.compile(rf"({cut})|(?<=\.)(?= )" if self._never_joined() else f"({cut})")
        self.place = next(iter(self.places), "")
        self.lengths = {before: len(self.backend.encode(before, add_special_tokens=False).ids)
                        for before in ("", self.place, self.place + ".")}
        self.known, self.tokenized = {}, 0

    def _never_joined(self) -> bool:
        return not any(joined in token for token in self.tokenizer.get_vocab() for joined in (". ", ".Ġ", ".▁"))

    def _bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        """For each text its tokens, EOS at the end, and the index at which the answer begins. Raises UnknownPlace."""
        if len(self.known) > REMEMBERED:
            self.known = {}
        self.known.update(self.places)
        split = [self._split(i, text) for i, text in enumerate(texts)]
        unseen = {before + piece: before for pieces, _ in split for before, piece in pieces[:-1]
                  if before + piece not in self.known}
        for (piece, before), encoding in zip(unseen.items(), self._encodings(unseen, self.backend.encode_batch_fast)):
            self.known[piece] = self._bytes(encoding.ids[self.lengths[before]:])
        # The last piece holds the answer, whose beginning is found by the offsets.
        last = [before + piece for pieces, _ in split for before, piece in pieces[-1:]]
        result = []
        for (pieces, answer), encoding in zip(split, self._encodings(last, self.backend.encode_batch)):
            before, piece = pieces[-1]
            skip, beyond = self.lengths[before], len(before) + len(piece) - len(answer)
            start = sft_data.first_after(encoding.offsets, beyond)
            ids = self.prefix + b"".join([self.known[before + piece] for before, piece in pieces[:-1]])
            start += len(ids) // len(self.eos) - skip
            ids += self._bytes(encoding.ids[skip:]) + self.suffix
            result.append((np.frombuffer(ids if ids.endswith(self.eos) else ids + self.eos, self.dtype), start))
        return result

    def _split(self, pair: int, text: str) -> tuple[list[tuple[str, str]], str]:
        """The pieces of a joined pair, each behind what it is encoded behind, and the answer, which ends the last."""
        unknown = prompts.unknown_place(text, self.places)
        if unknown:
            raise UnknownPlace(pair, unknown)
        prompt, answer = prompts.split(text)
        if not self.in_pieces:
            return [("", text)], answer
        pieces, before = [], ""
        for piece in filter(None, self.cut.split(prompt)):
            is_place = piece in self.places
            pieces.append(("" if is_place else before, piece))
            before = self.place if is_place else self.place + "."
        before, piece = pieces.pop()
        return [*pieces, (before, piece + answer)], answer

    def _encodings(self, texts: Iterable[str], encode_batch) -> Iterator:
        """The encodings of texts, a few at a time, on all cores."""
        some, characters = [], 0
        for text in itertools.chain(texts, [None]):
            if some and (text is None or characters > CHARACTERS_AT_ONCE):
                for encoding in encode_batch(some, add_special_tokens=False):
                    self.tokenized += len(encoding.ids)
                    yield encoding
                some, characters = [], 0
            if text is not None:
                some.append(text)
                characters += len(text)
