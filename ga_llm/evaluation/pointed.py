"""Ranking with a pointer: the states that it reads, and the mixture of its probabilities with the LLM's.

    P(place) = g · P_LLM(place) + (1 - g) · P_pointer(place)
"""
import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ga_llm.base.cli import UserError
from ga_llm.llm import pointing
from ga_llm.llm.pointer import Pointer
from ga_llm.pairs import check_ins
from ga_llm.pairs.spelling import TestPrompt
from geo_encoder.gps_tokens import places_of_tokens

log = logging.getLogger(__name__)


def prepare(args, model, test_prompts: Sequence[TestPrompt], mapping, tokenizer) -> list[TestPrompt]:
    """The prompts of `args`' test file as they are, or for a model with a pointer with their check-ins.

    With --pointer False the model loses its pointer.
    """
    if getattr(model, pointing.MODULE, None) is None:
        return test_prompts
    if not args.pointer:
        pointing.remove(model)
        return test_prompts
    if args.decoding != "rank":
        log.info("--decoding %s asks the LLM alone, without its pointer", args.decoding)
    token_ids = np.asarray(tokenizer.convert_tokens_to_ids(mapping.tokens))
    shown = check_ins.read(args.test_file, mapping.ids)
    return [dataclasses.replace(prompt, check_ins=shown.shown(prompt.pair, places, at))
            for prompt, at, places in positions(test_prompts, token_ids)]


def positions(test_prompts: Sequence[TestPrompt], token_ids: np.ndarray) -> Iterator[tuple[TestPrompt, np.ndarray,
                                                                                          np.ndarray]]:
    """(prompt, where its `<GPS n>` stand, rows of the mapping). token_ids: (places,), the `<GPS n>` of each place."""
    highest = max(max(prompt.input_ids, default=0) for prompt in test_prompts)
    row = places_of_tokens(token_ids, highest)
    for prompt in test_prompts:
        yield prompt, *pointing.place_tokens(np.asarray(prompt.input_ids, dtype=np.int64), row)


class States:
    """The last states of the tokens in the LLM's cache, slot by slot, where the LLM has a pointer; else nothing."""

    def __init__(self, model):
        self.pointer: Pointer | None = getattr(model, pointing.MODULE, None)
        self.decoder = model.get_decoder() if self.pointer is not None else None
        self.parts = []

    @contextlib.contextmanager
    def kept(self):
        """A context in which what the model reads is added."""
        if self.pointer is None:
            yield
            return
        hook = self.decoder.register_forward_hook(
            lambda module, inputs, output: self.parts.append(output.last_hidden_state[0]))
        try:
            yield
        finally:
            hook.remove()

    def crop(self, slots: int) -> None:
        if self.pointer is not None:
            self.parts = [self._joined()[:slots]]

    def of(self, slots: np.ndarray) -> torch.Tensor:
        """(n, hidden size), of these slots."""
        states = self._joined()
        return states[torch.from_numpy(slots).to(states.device)]

    def _joined(self) -> torch.Tensor:
        """All of them, which are copied when the model has read more, and not for each prompt that asks."""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]


@dataclasses.dataclass
class Mixture:
    """log_gate: (prompts, 1), of g; log_share: (prompts, nodes), the pointer's largest share at or below each node."""
    log_gate: torch.Tensor
    log_share: torch.Tensor

    def bounds(self, log_p: torch.Tensor) -> torch.Tensor:
        """log_p: (prompts, nodes), the LLM's, -inf where unknown. A leaf's is the mixture's own."""
        return torch.logaddexp(log_p + self.log_gate, self.log_share).masked_fill(log_p == -torch.inf, -torch.inf)


def mixture(states: States, trie, chunk: Sequence[TestPrompt], trunk: int, tails: Sequence[tuple[int, int]]
            ) -> Mixture | None:
    """What the pointer says of a chunk's prompts, whose tails stand in these slots behind the trunk; None without one.

    Raises UserError for prompts that do not tell their check-ins.
    """
    pointer = states.pointer
    if pointer is None:
        return None
    log_gates, shares = [], torch.zeros(len(chunk), len(trie.candidates))
    for row, (prompt, (first, last)) in enumerate(zip(chunk, tails)):
        shown = prompt.check_ins
        if shown is None:
            raise UserError(f"pair {prompt.pair}: the model has a pointer, which needs the times of its check-ins; "
                            "make the questions with process_llm_gps.py")
        slots = np.where(shown.at < trunk, shown.at, first + shown.at)
        device = pointer.gates.weight.device
        second, place, since = (torch.from_numpy(np.asarray(values, dtype=np.int64))[None].to(device)
                                for values in (shown.second, shown.place, shown.first))
        keys = torch.nn.functional.pad(states.of(slots), (0, 0, 0, 1))[None]         # nothing points to the target
        found = pointer(states.of(np.array([trunk + last - 1]))[None].to(pointer.gates.weight.dtype),
                        keys.to(pointer.gates.weight.dtype), second, place, since,
                        torch.tensor([[len(shown.at)]], device=device))
        log_gates.append(found.log_gate[0].cpu())
        columns = torch.tensor([trie.place.get(poi, -1) for poi in pointer.ids[shown.place[:-1]].tolist()],
                               dtype=torch.long)
        own = found.share[0, 0, :-1].float().cpu()
        shares[row].index_add_(0, columns[columns >= 0], own[columns >= 0])
    return Mixture(torch.stack(log_gates), trie.largest_below(shares.log()))
