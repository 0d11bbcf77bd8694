"""Test prompts: each test pair up to where its POI id is to be spelled, and how the tokenizer spells the ids."""
import dataclasses
import functools
from collections.abc import Iterator, Sequence

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.pairs import token_cache
from ga_llm.pairs.check_ins import Shown
from ga_llm.pairs.sft_data import first_after, truncate


CHECKED_EVERY = 100     # prompts; of these one is tokenized in two ways


@dataclasses.dataclass
class TestPrompt:
    """One test pair, up to where the POI id is to be spelled."""
    pair: int               # line of the test file, from 0
    text: str               # question and answer up to the id
    target: int             # encoded POI id
    input_ids: list[int]    # the text's tokens, cut from the left to what the model takes
    tokens: int             # how many there were before cutting
    fits: bool              # whether nothing was cut
    check_ins: Shown | None = None      # what it shows, for a model with a pointer

    @functools.cached_property
    def shown(self) -> list[int]:
        """The POI ids of the prompt's check-ins, in its order."""
        return _poi_ids(prompts.split(self.text)[0])

    @functools.cached_property
    def current(self) -> list[int]:
        """Those of the current trajectory alone, if there is one; in another wording than ours, all."""
        _, heading, current = prompts.split(self.text)[0].rpartition(prompts.CURRENT)
        is_ours = self.user is not None and self.time is not None
        return [] if is_ours and not heading else _poi_ids(current)

    @functools.cached_property
    def user(self) -> int | None:
        """The encoded user, where the answer names one as ours does."""
        match = prompts.USER.search(prompts.split(self.text)[1])
        return int(match[1]) if match else None

    @functools.cached_property
    def time(self) -> str | None:
        """The target's local time, `YYYY-MM-DD HH:MM:SS`, where the answer names it as ours does."""
        match = prompts.TIME.search(prompts.split(self.text)[1])
        return match[0] if match else None


def _until_id(ids, marks) -> tuple[list[int], int]:
    """A text's tokens, and the first of its last POI id, whose digits `marks` tells."""
    first = int(marks.nonzero()[0][-1])
    while first > 0 and marks[first - 1]:
        first -= 1
    return ids.tolist(), first


def _poi_ids(text: str) -> list[int]:
    return [int(poi) for poi in prompts.POI_ID.findall(text)]


class Spelling:
    """How a tokenizer spells the POI ids in an answer, and where it ends them, so that 12 and 123 differ.

    lead: what stands before the id in the answer ("… POI id "); end: what stands behind (".", else EOS ends it). Where
    that begins with ">", the answer is the token `<GPS n>`, and nothing stands before.
    full: {POI id: the tokens of the id and its end}. tokens: {POI id: those that tell it from all others}: the end is
    left out where no other id begins with this one, as nothing but the end can follow there; `always_end` keeps it.
    """

    LEAD = "POI id "

    def __init__(self, tokenizer, candidates: Sequence[int], end: str, always_end: bool = False):
        self.tokenizer, self.end = tokenizer, end
        self.as_token = end.startswith(">")
        self.lead, self.before_id = ("", "<GPS ") if self.as_token else (self.LEAD, "")
        self.full, bare = {}, {}
        for poi, ids, digits in self._spell(candidates, self.lead):
            self.full[poi] = ids
            bare[poi] = ids[:1 if self.as_token else digits]
        # In lexicographic order an id is followed by those that begin with it.
        order = sorted(candidates, key=bare.get)
        begins_another = {poi for poi, other in zip(order, order[1:]) if bare[other][:len(bare[poi])] == bare[poi]}
        self.tokens = {poi: self.full[poi] if always_end or poi in begins_another else bare[poi] for poi in candidates}

    def _spell(self, candidates: Sequence[int], before: str) -> Iterator[tuple[int, list[int], int]]:
        """For each candidate behind the text `before`: the tokens of its id and end, and how many are the id's."""
        encoded = self.tokenizer([f"{before}{self.before_id}{poi}{self.end}" for poi in candidates],
                                 add_special_tokens=False, return_offsets_mapping=True)
        for poi, ids, offsets in zip(candidates, encoded["input_ids"], encoded["offset_mapping"]):
            first = first_after(offsets, len(before))
            beyond = len(before) + len(f"{self.before_id}{poi}")
            last = first_after(offsets, beyond)
            if last < len(ids) and offsets[last][0] < beyond:       # one token holds a digit and the end: "12."
                last = len(ids)
            yield poi, ids[first:] + ([] if self.end else [self.tokenizer.eos_token_id]), last - first

    def prompts(self, pairs: Sequence[str], max_length: int, source="the test file", tried: bool = False
                ) -> list[TestPrompt]:
        """Cut joined pairs before their answers' ids. source: the file they are from, for error messages.

        Raises UserError if ids are not spelled there as they are alone: every candidate is tried in the first answer,
        unless an earlier call has `tried` them, and in each answer its own target.
        """
        if pairs and not tried:
            start, _, _ = answer_id(pairs[0])
            before = prompts.split(pairs[0][:start])[1]
            for poi, ids, _ in self._spell(list(self.full), before):
                if ids != self.full[poi]:
                    raise self._otherwise(source, 0, poi)
        found = [answer_id(pair) for pair in pairs]
        texts = [f"{pair[:start]}{self.before_id}{target}{self.end}" for pair, (start, target, _) in zip(pairs, found)]
        encoded = self._encoded(texts, [start for start, _, _ in found])
        return [self._prompt(i, pair[:start], target, ids, cut, max_length, source)
                for i, (pair, (start, target, _), (ids, cut)) in enumerate(zip(pairs, found, encoded))]

    def _encoded(self, texts: list[str], starts: list[int]) -> Iterator[tuple[list[int], int]]:
        """The tokens of each text, and the first that reaches beyond `start` of its characters, where its id begins.

        As training does it, each distinct piece of text is tokenized once; some texts are tokenized as wholes, too, and
        all are if one of those differs.
        """
        def whole(text, start):
            encoding = self.tokenizer(text, return_offsets_mapping=True)
            ids = encoding["input_ids"]
            return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id], (
                first_after(encoding["offset_mapping"], start))

        if len(texts) == 1:     # recommend.py's; there is no piece that comes twice
            return map(whole, texts, starts)
        checked = {i: whole(texts[i], starts[i]) for i in range(0, len(texts), CHECKED_EVERY)}
        try:
            pieces = token_cache.Pieces(self.tokenizer, "uint32", mark=True)
            encoded = [_until_id(ids, marks) for first in range(0, len(texts), token_cache.PAIRS_AT_ONCE)
                       for ids, _, marks in pieces.encode(texts[first:first + token_cache.PAIRS_AT_ONCE])]
            if all(encoded[i] == expected for i, expected in checked.items()):
                return iter(encoded)
        except token_cache.UnknownPlace:        # is text here, and refused where that is wrong
            pass
        return map(whole, texts, starts)

    def _prompt(self, pair: int, text: str, target: int, ids: list[int], cut: int, max_length: int,
                source) -> TestPrompt:
        tail, eos = ids[cut:-1], self.tokenizer.eos_token_id
        if target in self.full and tail + ([] if self.end else [eos]) != self.full[target]:
            raise self._otherwise(source, pair, target)
        kept = truncate(ids[:cut], max_length, self.tokenizer.bos_token_id)
        return TestPrompt(pair, text, target, kept, cut, cut <= max_length)

    def _otherwise(self, source, pair: int, poi: int) -> UserError:
        return UserError(f"{source}, line {pair + 1}: the tokenizer spells {poi} otherwise in this answer than behind "
                         f"'{self.lead}'; the answer must hold '{self.lead}{self.before_id}{poi}{self.end}'")


def read_answers(pairs: Sequence[str], source) -> str:
    """Check the pairs' POI ids, and that every answer names one; return what follows that, the same in all.

    "." in our wording.
    """
    ends = {}
    for line, pair in enumerate(pairs, start=1):
        try:
            too_long = next((poi for poi in prompts.POI_ID.findall(pair) if len(poi) > prompts.LONGEST_ID), None)
            if too_long:
                raise ValueError(f"POI id {too_long[:prompts.LONGEST_ID]}… has more than {prompts.LONGEST_ID} digits")
            ends.setdefault(answer_id(pair)[2], line)
        except ValueError as error:
            raise UserError(f"{source}, line {line}: {error}; make it again with process_llm_gps.py") from None
    if len(ends) > 1:
        first, second = list(ends.items())[:2]
        raise UserError(f"{source}, line {second[1]}: the answer ends in {second[0]!r} behind its POI id, but in "
                        f"{first[0]!r} on line {first[1]}; all answers must end alike")
    return next(iter(ends))


def untokenized(pairs: Sequence[str]) -> list[TestPrompt]:
    """Test prompts without tokens, for what reads their text alone."""
    found = ((i, pair, *answer_id(pair)) for i, pair in enumerate(pairs))
    return [TestPrompt(i, pair[:start], target, [], 0, True) for i, pair, start, target, _ in found]


def answer_id(text: str) -> tuple[int, int, str]:
    """Where the answer's last POI id begins in a joined pair, the id, and what follows it (stripped).

    Of `<GPS n>` behind a `<TIME n>` the token begins there, and what follows begins with its ">". Raises ValueError if
    the answer names none.
    """
    prompt, answer = prompts.split(text)
    matches = list(prompts.POI_ID.finditer(answer))
    if not matches:
        raise ValueError("no 'POI id n' in the answer")
    match = matches[-1]
    start = match.start(1) - len("<GPS ") * match[0].startswith("<")
    return len(prompt) + start, int(match.group(1)), answer[match.end(1):].strip()
