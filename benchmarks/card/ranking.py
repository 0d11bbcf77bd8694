"""Prompts per second at Llama-2-7B's shape: every POI ranked exactly, one answer sampled, a beam search."""
import time

import numpy as np
import torch

from card import shape
from card.record import free, wait
from geo_encoder import injection
from ga_llm.evaluation import decoding
from ga_llm.evaluation.ranking import Trie
from ga_llm.llm.tree_attention import TREE
from ga_llm.pairs.spelling import TestPrompt

PART = "ranking"
USERS, PROMPTS, SHARED, OWN = 6, 3, 7000, 800       # NYC's test: 3.3 prompts a user, 7,900 Llama-2 tokens on average
SAMPLED, BEAMED = 4, 1                              # prompts of the slow ways
DIGITS, END = range(10, 20), 20                     # tokens


class Tokenizer:
    """What decoding asks of a tokenizer; a random model's answers are not read."""
    pad_token_id = 0

    def batch_decode(self, ids, **_):
        return [""] * len(ids)


def run(record, args) -> None:
    torch.manual_seed(0)
    shared, own = (200, 40) if args.toy else (SHARED, OWN)
    config = shape.config(args.toy, shared + own + 8)
    model = shape.draw(config, args.device, TREE, args.four_bit and shape.has_bitsandbytes())
    mapping, places = shape.places(args.toy)
    with torch.device(args.device):
        injection.attach_untrained(model, mapping, places)
    model.lm_head.register_forward_hook(peaked)
    model.eval()
    trie = Trie({poi: [DIGITS[int(digit)] for digit in str(poi)] + [END] for poi in mapping.ids.tolist()})
    prompts = drawn(places, shared, own, len(mapping.ids))
    where = f"{USERS} users x {PROMPTS} prompts of {shared + own:,} tokens"
    decoded(args, model, trie, "rank", prompts[:1])     # warm up
    ours = decoded(args, model, trie, "rank", prompts)
    record.add(PART, f"exact ranking, {where}", ours, "prompts/s")
    model.set_attn_implementation("sdpa")
    few = prompts[::max(1, len(prompts) // SAMPLED)][:SAMPLED]
    for name, decoding_, chosen, batch in (("sampling, one by one", "sample", few, 1),
                                           (f"{decoding.BEAMS} beams", "beam", few[:BEAMED], 1)):
        if record.left <= 0:
            return record.note(PART, name, "no minutes left")
        try:
            speed = decoded(args, model, trie, decoding_, chosen, batch)
        except torch.OutOfMemoryError:
            free(args.device)
            record.note(PART, name, "does not fit this card: it keeps a copy of the prompt for every beam")
            continue
        record.add(PART, name, speed, "prompts/s")
        record.add(PART, f"exact ranking against {name}", ours / speed, "times", **({} if args.toy else {"least": 1}))


def peaked(module, inputs, logits: torch.Tensor) -> torch.Tensor:
    """Nearly all probability on digits and the id's end, as in a trained model's answer: some 4 nats an id.

    A random model holds all ids for almost equal, so that no search could leave any out.
    """
    bias = torch.zeros(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    bias[[*DIGITS, END]] = 30
    return 2 * logits + bias


def drawn(places: np.ndarray, shared: int, own: int, pois: int) -> list[TestPrompt]:
    """Random prompts; those of a user begin alike, as with one history."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(USERS):
        begin = random.integers(30, places[-1] + 1, shared).tolist()
        for _ in range(PROMPTS):
            ids = begin + random.integers(30, places[-1] + 1, own).tolist()
            found.append(TestPrompt(len(found), "", int(random.integers(pois)), ids, len(ids), True))
    return found


def decoded(args, model, trie: Trie, how: str, prompts: list[TestPrompt], batch: int = 8) -> float:
    """Prompts per second."""
    wait(args.device)
    began = time.perf_counter()
    found = sum(len(chunk) for chunk, _ in decoding.decode(how, model, Tokenizer(), trie, prompts, batch))
    wait(args.device)
    assert found == len(prompts)
    return len(prompts) / (time.perf_counter() - began)
