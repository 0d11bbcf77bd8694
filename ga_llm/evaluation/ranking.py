"""Exact ranking: the log-probability of every POI, at about the cost of reading each distinct token once.

An id is spelled in tokens, "12." or "123.", so all ids form a trie, and the product of the probabilities along an id's
path is the probability of that answer: no sampling, no beams, no ids that do not exist. Three things make it cheap:

- Prompts that begin with the same tokens (a user's history) are a group: the trunk goes through the LLM once, and what
  follows it, the prompts' own tails, branch off its key-value cache as one tree. Nothing is padded.
- The trie's nodes are further branches of the same tree, each attending to its prompt and its own ancestors.
- A node's log-probability bounds all below it. The target's exact rank and the exact best k need only the nodes above
  the smaller of the target's log-probability, which is read along with the prompt, and that of the k-th best.

A model with a pointer (`llm.pointer`) mixes these probabilities with the pointer's. It reads the same states, so it
costs no pass; a node is then bounded by its own probability, times the gate, and the pointer's largest share below it.
"""
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from ga_llm.base.cli import UserError
from ga_llm.evaluation import pointed
from ga_llm.evaluation.trie import Trie
from ga_llm.pairs.spelling import TestPrompt

TOP = 20                    # how many of the best candidates are given exactly
LOGITS_BYTES = 2 ** 28      # what the logits of one pass over trie nodes may take
# Of one pass over several prompts' tails: bounds its attention mask.
TAIL_TOKENS, TAIL_TOKENS_GPU = 2048, 8192
CHECKED = 256               # tokens of the prompt that the check before an evaluation reads
LEAST_SHARED = 32           # tokens; a shorter common beginning is not worth a group
WIDTH = 16                  # nodes of a prompt that are tried at a time while its best k are not certain
# Or more, up to so many in all prompts: a pass over fewer takes hardly less time.
PASS_NODES, PASS_NODES_GPU = 96, 1024


@dataclasses.dataclass
class Group:
    """Prompts that begin with the same tokens, in chunks that go through the LLM together."""
    trunk: list[int]                    # the shared token ids; may be empty
    chunks: list[list[TestPrompt]]

    @property
    def tokens(self) -> int:
        """Distinct tokens of the prompts: what the LLM has to read."""
        return len(self.trunk) + sum(len(p.input_ids) - len(self.trunk) for chunk in self.chunks for p in chunk)


def plan(test_prompts: Sequence[TestPrompt], batch_size: int, tail_tokens: int = TAIL_TOKENS) -> list[Group]:
    """Group the prompts by what they share, the longest first. At most `batch_size` prompts make a chunk.

    The order, and with it every chunk, depends on the prompts alone, so that an interrupted run finds its place again.
    """
    groups, single = [], []
    for members, shared in _common_beginnings(test_prompts):
        if len(members) == 1:
            single += members
        else:
            groups.append(Group(members[0].input_ids[:shared], _chunks(members, shared, batch_size, tail_tokens)))
    for chunk in _chunks(sorted(single, key=lambda p: -len(p.input_ids)), 0, batch_size, tail_tokens):
        # A prompt alone is its own trunk: that pass needs no mask.
        groups.append(Group(chunk[0].input_ids[:-1] if len(chunk) == 1 else [], [chunk]))
    return sorted(groups, key=lambda group: -max(len(p.input_ids) for p in group.chunks[0]))


def _common_beginnings(test_prompts) -> Iterator[tuple[list[TestPrompt], int]]:
    """(prompts, the number of tokens that they share), such that the tokens shared are the most that they can be."""
    # Neighbours in lexicographic order share the most, so groups are runs of them; best[j]: what the first j can save.
    prompts = sorted(test_prompts, key=lambda p: p.input_ids)
    common = [_common(a.input_ids, b.input_ids) for a, b in zip(prompts, prompts[1:])]
    best, start = [0], []
    for end in range(1, len(prompts) + 1):
        choices, shared = [(best[end - 1], end - 1)], np.inf
        for first in range(end - 2, -1, -1):
            shared = min(shared, common[first])
            if shared < LEAST_SHARED:
                break
            choices.append((best[first] + (end - first - 1) * shared, first))
        value, first = max(choices)
        best.append(value)
        start.append(first)
    end = len(prompts)
    while end > 0:
        first = start[end - 1]
        yield prompts[first:end], min(common[first:end - 1], default=0)
        end = first


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two prompts share at their beginning, leaving each at least one of its own."""
    length = min(len(a), len(b)) - 1
    different = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(different.argmax()) if different.any() else length


def _chunks(prompts, shared: int, batch_size: int, tail_tokens: int) -> list[list[TestPrompt]]:
    chunks, room = [], 0
    for prompt in prompts:
        tail = len(prompt.input_ids) - shared
        if not chunks or len(chunks[-1]) == batch_size or tail > room:
            chunks.append([])
            room = tail_tokens
        chunks[-1].append(prompt)
        room -= tail
    return chunks


@dataclasses.dataclass
class Ranked:
    """One prompt's result."""
    rank: int | None                            # the target's, 1 is best; None if it has none
    top: list[tuple[int, float | None]]         # the best POIs with their log-probabilities
    log_probs: np.ndarray | None                # (candidates,) of all, if asked for


@torch.inference_mode()
def rank(model, trie: Trie, group: Group, top: int = TOP, full: bool = False, done=frozenset()
         ) -> Iterator[tuple[list[TestPrompt], list[Ranked]]]:
    """Rank all candidates for each prompt of a group: yields (prompts, their results) chunk by chunk.

    full: the log-probability of every candidate, without pruning. done: pairs that need no result; a chunk is left out
    if it has no others.
    """
    chunks = [chunk for chunk in group.chunks if not all(p.pair in done for p in chunk)]
    if not chunks:
        return
    tree = Tree(model, group.trunk)
    for chunk in chunks:
        yield chunk, _Search(tree, trie, chunk, top, full).results()
        tree.crop(len(group.trunk))


class Tree:
    """What stands in the LLM's key-value cache: a trunk that all see, and slots that some see. alone: no pointer."""

    def __init__(self, model, trunk: Sequence[int], alone: bool = False):
        self.model, self.cache = model, DynamicCache()
        self.trunk = len(trunk)
        self.positions = torch.arange(self.trunk)           # (slots,) of all slots, on the CPU as all bookkeeping
        self.states = pointed.States(None if alone else model)
        if trunk:
            self._forward(torch.tensor([trunk]), None, self.positions, torch.tensor([self.trunk - 1]))

    def grow(self, tokens: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, keep: torch.Tensor):
        """Add tokens (M,) that see the trunk and, of the slots behind it and themselves, seen (M, slots + M) bool.

        Returns the logits (1, K, vocabulary) of the K tokens that `keep` (K,) names.
        """
        self.positions = torch.cat([self.positions, positions])
        return self._forward(tokens[None], self._mask(seen, positions), positions, keep)

    def crop(self, slots: int) -> None:
        """Keep the first `slots` slots alone."""
        if slots < len(self.positions):
            if slots:
                self.cache.crop(slots - len(self.positions))
            else:
                self.cache = DynamicCache()
            self.positions = self.positions[:slots]
            self.states.crop(slots)

    def _forward(self, tokens, mask, positions, keep):
        device = self.model.device
        with self.states.kept():
            return self.model(tokens.to(device), attention_mask=mask, position_ids=positions[None].to(device),
                              past_key_values=self.cache, use_cache=True, logits_to_keep=keep.to(device)).logits

    def _mask(self, seen, positions):
        """The additive mask (1, 1, M, trunk and slots), one for each kind of layer where a model has windows."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if window is None:
            return self._additive(seen)
        seen = torch.cat([torch.ones(len(seen), self.trunk, dtype=torch.bool), seen], dim=1)
        near = self._additive(seen & (positions[:, None] - self.positions[None] < window))
        if "full_attention" in (getattr(config, "layer_types", None) or ()):
            return {"full_attention": self._additive(seen), "sliding_attention": near}
        return near

    def _additive(self, seen):
        """Of the last columns of the cache that `seen` tells of; those before are seen."""
        dtype, device = self.model.dtype, self.model.device
        bias = torch.zeros(len(seen), len(self.positions), dtype=dtype, device=device)
        bias[:, len(self.positions) - seen.shape[1]:].masked_fill_(~seen.to(device), torch.finfo(dtype).min)
        return bias[None, None]


class _Search:
    """The search of one chunk: which trie nodes are known for which prompt, and which are still needed.

    mixture: what a pointer adds, if there is one.
    log_p: (prompts, nodes), that of a node's spelling, -inf while unknown; slot: (prompts, nodes), where a node's keys
    lie in the cache, counted behind the trunk; own: (prompts, slots), which slots hold a prompt's tail.
    """

    def __init__(self, tree: Tree, trie: Trie, chunk: list[TestPrompt], top: int, full: bool):
        self.tree, self.trie, self.full = tree, trie, full
        self.top = min(top, len(trie.candidates))
        nodes = len(trie.parent)
        self.log_p = torch.full((len(chunk), nodes), -torch.inf)
        self.log_p[:, 0] = 0
        self.expanded = torch.zeros(len(chunk), nodes, dtype=torch.bool)
        self.slot = torch.full((len(chunk), nodes), -1)
        self.lengths = torch.tensor([len(p.input_ids) for p in chunk])
        self.target = [trie.place.get(p.target) for p in chunk]
        self.mixture = None
        self._read(chunk)

    def results(self) -> list[Ranked]:
        while len(needed := self._needed().nonzero()):
            self._expand(needed)
        leaves = self._bounds()[:, self.trie.leaf]
        results = []
        for row, target in zip(leaves, self.target):
            best = row.topk(self.top)
            rank = None if target is None else rank_of(row, target)
            results.append(Ranked(rank, [(self.trie.candidates[i], value) for i, value in
                                         zip(best.indices.tolist(), best.values.tolist())],
                                  row.numpy() if self.full else None))
        return results

    def _bounds(self) -> torch.Tensor:
        """(prompts, nodes): no candidate at or below a node is more probable; a leaf is as probable. -inf: unknown."""
        return self.log_p if self.mixture is None else self.mixture.bounds(self.log_p)

    def _read(self, chunk) -> None:
        """Send the prompts' tails through the LLM, with each the nodes that spell its target and the first ones."""
        tokens, positions, seen, keep, prompts, nodes, tails, at = [], [], [], [], [], [], [], 0
        for i, prompt in enumerate(chunk):
            tail = prompt.input_ids[self.tree.trunk:]
            path = self.trie.path(prompt.target)[:-1] if self.target[i] is not None else []
            branches = path + [node for node in self.trie.first_nodes(WIDTH) if node not in path]
            chain, part = len(tail) + len(path), len(tail) + len(branches)
            sees = torch.ones(part, part, dtype=torch.bool).tril()
            sees[chain:, len(tail):] = torch.eye(part, dtype=torch.bool)[chain:, len(tail):]
            seen.append(sees)
            tokens += tail + self.trie.token[branches].tolist()
            positions += [torch.arange(self.tree.trunk, len(prompt.input_ids)),
                          len(prompt.input_ids) + self.trie.depth[branches] - 1]
            keep += range(at + len(tail) - 1, at + part)
            prompts += [i] * (len(branches) + 1)
            nodes += [0, *branches]
            self.slot[i, branches] = torch.arange(at + len(tail), at + part)
            tails.append((at, at + len(tail)))
            at += part
        self.own = torch.zeros(len(chunk), at, dtype=torch.bool)
        for i, (first, last) in enumerate(tails):
            self.own[i, first:last] = True
        logits = self.tree.grow(torch.tensor(tokens), torch.cat(positions), torch.block_diag(*seen), torch.tensor(keep))
        self._fill(torch.tensor(prompts), torch.tensor(nodes), logits)
        self.mixture = pointed.mixture(self.tree.states, self.trie, chunk, self.tree.trunk, tails)

    def _needed(self) -> torch.Tensor:
        """Which nodes (prompts, nodes) are to be expanded next; none: the rank and the best k are exact."""
        open_ = self.trie.inner & ~self.expanded & (self.log_p > -torch.inf)
        if self.full:
            return open_
        bounds = self._bounds()
        leaves = bounds[:, self.trie.leaf]
        kth = leaves.topk(self.top).values[:, -1:]              # -inf while fewer are known
        goal = torch.tensor([[torch.inf if t is None else leaves[i, t]] for i, t in enumerate(self.target)])
        # All that may beat the target is needed for its rank. For the best k it is what beats the k-th best so far;
        # as that grows with every leaf, a few nodes at a time spare the others.
        open_ &= bounds >= torch.minimum(kth, goal)
        size = PASS_NODES if self.tree.model.device.type == "cpu" else PASS_NODES_GPU
        width = max(WIDTH, size // max(1, int(open_.any(1).sum())))
        best = torch.where(open_, bounds, -torch.inf).topk(min(width, bounds.shape[1]))
        among_best = torch.zeros_like(open_).scatter_(1, best.indices, True)
        return open_ & ((bounds >= goal) | among_best)

    def _expand(self, needed: torch.Tensor) -> None:
        """Read the logits of nodes, (M, 2) as (prompt, node). Those with inner children stay in the cache."""
        size = max(16, LOGITS_BYTES // (4 * self.tree.model.config.get_text_config().vocab_size))
        needed = needed[self.trie.keeps[needed[:, 1]].long().argsort(descending=True, stable=True)]
        for prompts, nodes in (part.unbind(1) for part in needed.split(size)):
            seen = self.own[prompts]
            above = self.trie.parent[nodes]
            while (above > 0).any():
                rows = (above > 0).nonzero().squeeze(1)
                seen[rows, self.slot[prompts[rows], above[rows]]] = True
                above = torch.where(above > 0, self.trie.parent[above], above)
            slots = seen.shape[1]
            seen = torch.cat([seen, torch.eye(len(nodes), dtype=torch.bool)], dim=1)
            logits = self.tree.grow(self.trie.token[nodes], self.lengths[prompts] + self.trie.depth[nodes] - 1, seen,
                                    torch.arange(len(nodes)))
            self._fill(prompts, nodes, logits)
            kept = int(self.trie.keeps[nodes].sum())
            self.slot[prompts[:kept], nodes[:kept]] = torch.arange(slots, slots + kept)
            self.own = torch.nn.functional.pad(self.own, (0, kept))
            self.tree.crop(self.tree.trunk + slots + kept)

    def _fill(self, prompts: torch.Tensor, nodes: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the log-probabilities of the children of nodes, whose logits are (1, M, vocabulary)."""
        self.expanded[prompts, nodes] = True
        count = self.trie.children[nodes]
        row = torch.arange(len(nodes)).repeat_interleave(count)
        child = torch.arange(len(row)) - (count.cumsum(0) - count)[row] + self.trie.first_child[nodes][row]
        device, token = logits.device, self.trie.token[child]
        normal = torch.cat([part.float().logsumexp(-1) for part in logits[0].split(256)])
        step = (logits[0][row.to(device), token.to(device)].float() - normal[row.to(device)]).clamp(max=0).cpu()
        # In depth order, so that a target's path, given at once, finds its parents written.
        for depth in self.trie.depth[nodes].unique().tolist():
            here = self.trie.depth[nodes][row] == depth
            p, n, c = prompts[row][here], nodes[row][here], child[here]
            self.log_p[p, c] = self.log_p[p, n] + step[here]


def rank_of(log_probs: torch.Tensor, target: int) -> int:
    """The target's rank, 1 is best; candidates with an equal probability count as better, so ties never flatter."""
    return int((log_probs >= log_probs[target]).sum())


@torch.inference_mode()
def check(model, trie: Trie, prompt: TestPrompt) -> None:
    """Compare one answer's log-probability with that of the plain forward. Raises UserError if they differ.

    They agree for every model whose attention follows the mask and the positions that it is given.
    """
    prompt = dataclasses.replace(prompt, input_ids=prompt.input_ids[-CHECKED:])
    poi = prompt.target if prompt.target in trie.place else trie.candidates[0]
    spelled = list(trie.spelled[poi])
    ids = torch.tensor([prompt.input_ids + spelled], device=model.device)
    logits = model(ids, use_cache=False, logits_to_keep=len(spelled) + 1).logits[0, :-1].float()
    plain = logits.log_softmax(-1).gather(1, ids[0, -len(spelled):, None]).sum().item()
    # A logit of 20 that bf16 holds in 8 bits is off by up to .08, at each token anew.
    rounding = len(spelled) * logits.abs().max().item() * torch.finfo(model.dtype).eps
    half = len(prompt.input_ids) // 2
    other = dataclasses.replace(prompt, input_ids=prompt.input_ids[:half] + prompt.input_ids[:half - 1:-1])
    search = _Search(Tree(model, prompt.input_ids[:half], alone=True), trie,
                     [other, dataclasses.replace(prompt, target=poi)], 1, False)
    ranked = search.log_p[1, trie.leaf[trie.place[poi]]].item()
    if not abs(plain - ranked) <= max(1e-4 * max(1.0, abs(plain)), rounding):
        raise UserError(f"{type(model).__name__}: its attention does not follow a mask, so POIs cannot be ranked "
                        f"exactly (log P {ranked:.4f}, alone {plain:.4f}); use --decoding beam or sample")
