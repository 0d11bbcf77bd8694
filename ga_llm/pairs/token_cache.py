"""A question file as token ids on disk: built once, memory-mapped by every later start.

    tokens-<key>/ids.bin       the tokens of all pairs, one pair behind the other, cut to what the model takes
    tokens-<key>/poi_ids.bin   of each of these, whether it spells a POI id (only where the loss is to be on them)
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

from ga_llm.base import prompts, writing
from ga_llm.base.cli import UserError
from ga_llm.base.reading import sha256
from ga_llm.pairs import sft_data

log = logging.getLogger(__name__)

FORMAT = 1              # to be raised when the files' layout or their reading changes
IDS, POI_IDS, INDEX, ABOUT = "ids.bin", "poi_ids.bin", "index.npy", "about.json"
PAIRS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2**20      # an encoding takes about a hundred bytes a token while it exists
REMEMBERED = 300_000            # pieces; about 600 bytes each
CHECKED_EVERY = 500             # pairs, of which one is tokenized as a whole to compare


class TokenDataset(Dataset):
    """The pairs of a built folder: {"input_ids": (tokens,) int64, "answer_start": index of the answer's first token},
    and where they were marked, "targets": (tokens,) bool, the tokens of every POI id but what no token stands before.

    tokens, lengths, answer_starts: (pairs,) int64, of each pair before cutting, after it, and its answer's beginning.
    sha256: of the question file. answers_alone: no targets in front of the answer.
    Raises UserError if the folder's files are damaged or do not fit each other.
    """

    def __init__(self, folder: Path | str, answers_alone: bool = False):
        self.folder, self.answers_alone = Path(folder), answers_alone
        try:
            about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
            self.sha256, dtype = about["file"], np.dtype(about["dtype"])
            self.ends, self.tokens, self.answer_starts = self._index().T
            self.lengths = np.diff(self.ends, prepend=0)
            self.ids = np.memmap(self.folder / IDS, dtype=dtype, mode="r")
            self.targets = np.memmap(self.folder / POI_IDS, dtype=bool, mode="r") if about.get("poi_ids") else None
            fits = len(self.ids) == self.ends[-1] and (self.lengths <= self.tokens).all() and (
                (self.answer_starts > 0) & (self.answer_starts < self.lengths)).all() and (
                self.targets is None or len(self.targets) == len(self.ids))
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
        return TokenDataset, (self.folder, self.answers_alone)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict:
        where = slice(self.ends[index] - self.lengths[index], self.ends[index])
        item = {"input_ids": self.ids[where].astype(np.int64), "answer_start": int(self.answer_starts[index])}
        if self.targets is not None:
            item["targets"] = np.array(self.targets[where])
            # Nothing stands before the first that could predict it.
            item["targets"][:item["answer_start"] if self.answers_alone else 1] = False
        return item


def load(path: Path | str, tokenizer, max_length: int, mapping: Path | str, cache_dir: Path | str | None = None,
         poi_ids: bool = False, answers_alone: bool = False) -> TokenDataset:
    """The pairs of the question file `path` as tokens, from beside it or from `cache_dir`; built there if need be.

    mapping: the GPS mapping whose tokens the tokenizer has, for error messages. poi_ids: mark what spells a POI id, or
    with answers_alone, what does in the answer. Of several processes one builds and the others wait. Raises UserError
    for a bad file, naming the pair.
    """
    path = Path(path)
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"
    about = {"format": FORMAT, "file": sha256(path),
             "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
             "special": [tokenizer.bos_token_id, tokenizer.eos_token_id], "template": prompts.ANSWER,
             "max_length": max_length, "dtype": dtype, **({"poi_ids": True} if poi_ids else {})}
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
    return TokenDataset(folder, answers_alone)


def _build(path: Path, tokenizer, max_length: int, mapping, about: dict, folder: Path) -> None:
    started = time.monotonic()
    try:
        index, tokenized = _tokenize(path, tokenizer, max_length, mapping, about, folder)
    except UserError:       # a file that is refused leaves nothing behind
        shutil.rmtree(folder)
        raise
    np.save(folder / INDEX, index)
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    log.info("tokenized %d pairs of %s: %d tokens, %d of them tokenized, %.1f s", len(index), path.name,
             index[:, 1].sum(), tokenized, time.monotonic() - started)


def _tokenize(path: Path, tokenizer, max_length: int, mapping, about: dict, folder: Path) -> tuple[np.ndarray, int]:
    """Write the tokens of all pairs; return the index, and how many tokens the tokenizer has really made."""
    options = {"dtype": about["dtype"], "mark": "poi_ids" in about}
    pieces = Pieces(tokenizer, **options)
    try:
        index = _write(path, pieces, max_length, mapping, folder)
    except _Unlike as pair:
        log.info("pair %s of %s: in pieces its tokens are others; the texts are tokenized as wholes", pair, path.name)
        pieces = Pieces(tokenizer, **options, in_pieces=False)
        index = _write(path, pieces, max_length, mapping, folder)
    return index, pieces.tokenized


def _write(path: Path, pieces: "Pieces", max_length: int, mapping, folder: Path) -> np.ndarray:
    """Write the tokens of all pairs, and their marks if `pieces` makes them, and return the index."""
    tokenizer, index, end = pieces.tokenizer, [], 0
    pairs = sft_data.iterate_pairs(path)
    with (folder / IDS).open("wb") as file, (
            (folder / POI_IDS).open("wb") if pieces.mark else contextlib.nullcontext()) as marks_file:
        while block := list(itertools.islice(pairs, PAIRS_AT_ONCE)):
            try:
                encoded = pieces.encode(block)
            except UnknownPlace as error:
                raise sft_data.unknown(error.token, f"{path}, pair {len(index) + error.pair}", mapping) from None
            for text, (ids, start, marks) in zip(block, encoded):
                if len(index) % CHECKED_EVERY == 0 and (ids.tolist(), start) != sft_data.encode(tokenizer, text):
                    raise _Unlike(len(index))
                whole = len(ids)
                if whole > max_length:
                    keep_first = bool(ids[0] == tokenizer.bos_token_id)
                    ids, marks = (np.array(sft_data.cut(part.tolist(), max_length, keep_first), part.dtype)
                                  for part in (ids, marks))
                start -= whole - len(ids)
                if start < 1:
                    raise UserError(f"{path}, pair {len(index)}: the answer alone has {len(ids) - start} tokens; raise "
                                    f"--model_max_length (now {max_length})")
                file.write(ids)
                if marks_file is not None:
                    marks_file.write(marks)
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
    tokenized: how many tokens the tokenizer has really made. mark: also tell which tokens spell a POI id; `<GPS n>` is
    one where it stands directly behind a `<TIME n>`.
    """

    def __init__(self, tokenizer, dtype: str, in_pieces: bool = True, mark: bool = False):
        self.tokenizer, self.backend, self.dtype, self.mark = tokenizer, tokenizer.backend_tokenizer, dtype, mark
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
        self.known, self.marks, self.tokenized = {}, {}, 0

    def _never_joined(self) -> bool:
        return not any(joined in token for token in self.tokenizer.get_vocab() for joined in (". ", ".Ġ", ".▁"))

    def _bytes(self, ids: list[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, int, np.ndarray]]:
        """For each text its tokens, EOS at the end, the index at which the answer begins, and of each token whether it
        spells a POI id (all False without `mark`). Raises UnknownPlace."""
        if len(self.known) > REMEMBERED:
            self.known, self.marks = {}, {}
        self.known.update(self.places)
        split = [self._split(i, text) for i, text in enumerate(texts)]
        unseen = {before + piece: before for pieces, _ in split for before, piece in pieces[:-1]
                  if before + piece not in self.known}
        encode_batch = self.backend.encode_batch if self.mark else self.backend.encode_batch_fast
        for (piece, before), encoding in zip(unseen.items(), self._encodings(unseen, encode_batch)):
            self.known[piece] = self._bytes(encoding.ids[self.lengths[before]:])
            if self.mark:
                self.marks[piece] = self._marks(piece, encoding, self.lengths[before])
        # The last piece holds the answer, whose beginning is found by the offsets.
        last = [before + piece for pieces, _ in split for before, piece in pieces[-1:]]
        result = []
        for (pieces, answer), encoding in zip(split, self._encodings(last, self.backend.encode_batch)):
            before, piece = pieces[-1]
            skip, beyond = self.lengths[before], len(before) + len(piece) - len(answer)
            start = sft_data.first_after(encoding.offsets, beyond)
            known = [before + piece for before, piece in pieces[:-1]]       # before a place's token stands nothing
            ids = self.prefix + b"".join([self.known[piece] for piece in known])
            first = len(ids) // len(self.eos)
            ids += self._bytes(encoding.ids[skip:]) + self.suffix
            ids = np.frombuffer(ids if ids.endswith(self.eos) else ids + self.eos, self.dtype)
            marks = np.zeros(len(ids), dtype=bool)
            if self.mark:
                behind = itertools.chain([""], known)
                found = b"".join([self.marks[piece] if piece in self.marks else self._of_place(last, piece)
                                  for last, piece in zip(behind, known)])       # a place is one token
                found = np.frombuffer(found + self._marks(before + piece, encoding, skip), dtype=bool)
                at = len(self.prefix) // len(self.eos)
                marks[at:at + len(found)] = found
            result.append((ids, first + start - skip, marks))
        return result

    @staticmethod
    def _marks(text: str, encoding, skip: int) -> bytes:
        """Of each token of `text` behind the first `skip`, whether it holds a digit of a POI id."""
        is_digit = np.zeros(len(text) + 1, dtype=np.int64)      # how many of the characters before are
        for match in prompts.POI_ID.finditer(text):
            is_digit[match.start(1) + 1:match.end(1) + 1] = 1
        counts = np.cumsum(is_digit)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[skip:]
        return (counts[offsets[:, 1]] > counts[offsets[:, 0]]).tobytes()

    @staticmethod
    def _of_place(last: str, token: str) -> bytes:
        """The mark of a place's token behind the piece `last`."""
        return b"\1" if token.startswith("<GPS ") and last.startswith("<TIME ") else b"\0"

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
