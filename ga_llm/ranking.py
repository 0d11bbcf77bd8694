"""Exact ranking: the log-probability of every POI, from one forward of the prompt and one tree of spelled ids.

An id is spelled in tokens, "12." or "123.", so all ids form a trie. The prompt goes through the LLM once; the trie's
inner nodes follow over the same key-value cache, each attending to the prompt and to its own ancestors. The product of
the probabilities along an id's path is the probability of that answer: no sampling, no beams, no ids that do not exist.
"""
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache

from ga_llm import prompts
from ga_llm.cli import UserError
from ga_llm.sft_data import truncate

LOGITS_BYTES = 2 ** 28      # what the logits of one chunk of the trie may take


@dataclasses.dataclass
class TestPrompt:
    """One test pair, up to where the POI id is to be spelled."""
    pair: int               # line of the test file, from 0
    text: str               # question and answer up to the id
    target: int             # encoded POI id
    input_ids: list[int]    # the text's tokens, cut from the left to what the model takes
    tokens: int             # how many there were before cutting
    fits: bool              # whether nothing was cut

    @property
    def shown(self) -> list[int]:
        """The POI ids of the prompt's check-ins, in its order."""
        return _poi_ids(prompts.split(self.text)[0])

    @property
    def current(self) -> list[int]:
        """Those of the current trajectory alone; in another wording than ours, all."""
        return _poi_ids(prompts.split(self.text)[0].rpartition(prompts.CURRENT)[2])

    @property
    def user(self) -> int | None:
        """The encoded user, where the answer names one as ours does."""
        match = prompts.USER.search(prompts.split(self.text)[1])
        return int(match[1]) if match else None


def _poi_ids(text: str) -> list[int]:
    return [int(poi) for poi in prompts.POI_ID.findall(text)]


class Spelling:
    """How a tokenizer spells the POI ids in an answer, each with its end, so that 12 and 123 differ.

    lead: what stands before the id in the answer ("… POI id "); end: what stands behind (".", else EOS ends it).
    """

    LEAD = "POI id "

    def __init__(self, tokenizer, candidates: Sequence[int], end: str):
        self.tokenizer, self.end = tokenizer, end
        texts = [f"{self.LEAD}{poi}{end}" for poi in candidates]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        last = [] if end else [tokenizer.eos_token_id]
        self.tokens = {}
        for poi, ids, offsets in zip(candidates, encoded["input_ids"], encoded["offset_mapping"]):
            self.tokens[poi] = ids[_first_after(offsets, len(self.LEAD)):] + last

    def prompt(self, pair: int, text: str, max_length: int) -> TestPrompt:
        """Cut a joined pair before its answer's id. Raises UserError if the id is not spelled there as it is alone."""
        start, target, _ = answer_id(text)
        encoded = self.tokenizer(text[:start] + str(target) + self.end, return_offsets_mapping=True)
        cut = _first_after(encoded["offset_mapping"], start)
        ids = encoded["input_ids"][:cut]
        spelled, tail, eos = self.tokens.get(target), encoded["input_ids"][cut:], self.tokenizer.eos_token_id
        tail = tail[:-1] if tail and tail[-1] == eos else tail
        if spelled is not None and tail + ([] if self.end else [eos]) != spelled:
            raise UserError(f"line {pair + 1}: the tokenizer spells {target} otherwise in this answer than behind "
                            f"'{self.LEAD}'; the answer must hold '{self.LEAD}{target}{self.end}'")
        kept = truncate(ids, max_length, self.tokenizer.bos_token_id)
        return TestPrompt(pair, text[:start], target, kept, len(ids), len(ids) <= max_length)


def read_answers(pairs: Sequence[str], source) -> str:
    """Check that every answer names a POI id; return what follows the id, the same in all ("." in our wording)."""
    ends = {}
    for line, pair in enumerate(pairs, start=1):
        try:
            ends.setdefault(answer_id(pair)[2], line)
        except ValueError as error:
            raise UserError(f"{source}, line {line}: {error}; make it again with process_llm_gps.py") from None
    if len(ends) > 1:
        first, second = list(ends.items())[:2]
        raise UserError(f"{source}, line {second[1]}: the answer ends in {second[0]!r} behind its POI id, but in "
                        f"{first[0]!r} on line {first[1]}; all answers must end alike")
    return next(iter(ends))


def answer_id(text: str) -> tuple[int, int, str]:
    """Where the answer's last POI id begins in a joined pair, the id, and what follows it (stripped).

    Raises ValueError if the answer names none.
    """
    prompt, answer = prompts.split(text)
    matches = list(prompts.POI_ID.finditer(answer))
    if not matches:
        raise ValueError("no 'POI id n' in the answer")
    match = matches[-1]
    return len(prompt) + match.start(1), int(match.group(1)), answer[match.end(1):].strip()


def _first_after(offsets, position: int) -> int:
    """The first token that reaches beyond `position` of the text."""
    return next((i for i, (_, end) in enumerate(offsets) if end > position), len(offsets))


class Trie:
    """The spelled candidates as nodes in depth-first order: node 0 is the prompt's end, each other node a token.

    parent, token, depth: (nodes,); inner: node ids with children; leaf: (candidates,), the node that ends each.
    """

    def __init__(self, spelled: Sequence[Sequence[int]]):
        self.parent, self.token, self.depth = [-1], [-1], [0]
        children = {}
        self.leaf = torch.zeros(len(spelled), dtype=torch.long)
        for candidate in sorted(range(len(spelled)), key=lambda i: list(spelled[i])):
            node = 0
            for token in spelled[candidate]:
                if (node, token) not in children:
                    children[node, token] = len(self.parent)
                    self.parent.append(node)
                    self.token.append(token)
                    self.depth.append(self.depth[node] + 1)
                node = children[node, token]
            self.leaf[candidate] = node
        self.inner = sorted({parent for parent in self.parent if parent > 0})
        if set(self.inner) & set(self.leaf.tolist()) or len(set(self.leaf.tolist())) < len(self.leaf):
            raise ValueError("one candidate's spelling is the beginning of another's")
        self.parent, self.token, self.depth = (torch.tensor(x) for x in (self.parent, self.token, self.depth))

    def chunks(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inner nodes in runs of about `size`, each with its ancestors: (nodes (M,), attended (M, M) bool)."""
        for first in range(0, len(self.inner), size):
            nodes = set(self.inner[first:first + size])
            for node in list(nodes):
                while (node := int(self.parent[node])) > 0:
                    nodes.add(node)
            nodes = torch.tensor(sorted(nodes))
            place = {int(node): i for i, node in enumerate(nodes)}
            attended = torch.eye(len(nodes), dtype=torch.bool)
            for i, node in enumerate(nodes):        # ancestors come before, so their rows are complete
                parent = int(self.parent[node])
                if parent > 0:
                    attended[i] |= attended[place[parent]]
            yield nodes, attended


def left_pad(sequences: Sequence[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) and attention mask (B, S), padded on the left."""
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, ids in enumerate(sequences):
        input_ids[row, longest - len(ids):] = torch.tensor(ids)
        mask[row, longest - len(ids):] = 1
    return input_ids.to(device), mask.to(device)


@torch.inference_mode()
def log_probabilities(model, sequences: Sequence[Sequence[int]], trie: Trie, pad: int) -> torch.Tensor:
    """log P(candidate | prompt), (B, candidates) fp32 on the CPU, for a batch of prompts as token ids."""
    input_ids, mask = left_pad(sequences, pad, model.device)
    batch, length = input_ids.shape
    lengths = mask.sum(1, keepdim=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = model(input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                   logits_to_keep=1).logits[:, -1:]

    step = torch.zeros(batch, len(trie.parent))     # log P(node's token | its parent)
    _fill(step, logits, torch.tensor([0]), trie)
    smallest = torch.finfo(model.dtype).min
    size = max(16, LOGITS_BYTES // (batch * logits.shape[-1] * 4))
    for nodes, attended in trie.chunks(size):
        tokens, depth = trie.token[nodes].to(model.device), trie.depth[nodes].to(model.device)
        seen = torch.cat([mask.bool()[:, None, None, :].expand(batch, 1, len(nodes), length),
                          attended.to(model.device).expand(batch, 1, -1, -1)], dim=-1)
        bias = torch.zeros(seen.shape, dtype=model.dtype, device=model.device).masked_fill(~seen, smallest)
        logits = model(tokens.expand(batch, -1), attention_mask=bias, position_ids=lengths + depth - 1,
                       past_key_values=cache, use_cache=True).logits
        cache.crop(-len(nodes))
        _fill(step, logits, nodes, trie)

    total = torch.zeros_like(step)
    for depth in range(1, int(trie.depth.max()) + 1):
        level = (trie.depth == depth).nonzero().squeeze(1)
        total[:, level] = total[:, trie.parent[level]] + step[:, level]
    return total[:, trie.leaf]


def _fill(step: torch.Tensor, logits: torch.Tensor, nodes: torch.Tensor, trie: Trie) -> None:
    """Write log P of every child of `nodes`, whose logits are (B, M, vocabulary)."""
    row = torch.full((len(trie.parent),), -1)
    row[nodes] = torch.arange(len(nodes))
    child = ((row[trie.parent.clamp(min=0)] >= 0) & (trie.parent >= 0)).nonzero().squeeze(1)
    log_probs = logits.float().log_softmax(-1)
    step[:, child] = log_probs[:, row[trie.parent[child]], trie.token[child]].cpu()


def rank_of(log_probs: torch.Tensor, target: int) -> int:
    """The target's rank, 1 is best; candidates with an equal probability count as better, so ties never flatter."""
    return int((log_probs >= log_probs[target]).sum())


@torch.inference_mode()
def sample_ids(model, tokenizer, sequences: Sequence[Sequence[int]]) -> list[int | None]:
    """One sampled answer per prompt as in the paper's code: T 0.6, top-k 40, top-p 0.1, at most 4 new tokens."""
    input_ids, mask = left_pad(sequences, tokenizer.pad_token_id, model.device)
    output = model.generate(input_ids, attention_mask=mask, do_sample=True, temperature=0.6, top_k=40, top_p=0.1,
                            max_new_tokens=4, pad_token_id=tokenizer.pad_token_id, use_cache=True)
    answers = tokenizer.batch_decode(output[:, input_ids.shape[1]:], skip_special_tokens=True)
    return [int(digits) if (digits := _leading_digits(answer)) else None for answer in answers]


def _leading_digits(text: str) -> str:
    text = text.strip()
    return text[:len(text) - len(text.lstrip("0123456789"))]
