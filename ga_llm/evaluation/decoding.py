"""From prompts to ranked POIs, by one of three ways: exact ranking, a beam search, or one sampled answer.

`rank` is this project's; `sample` is what the paper's code does, and `beam` what others do, for comparison.
"""
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from ga_llm.base.cli import UserError, show_progress
from ga_llm.evaluation import ranking
from ga_llm.evaluation.processes import Processes
from ga_llm.evaluation.ranking import Ranked, Trie
from ga_llm.pairs.spelling import TestPrompt

DECODINGS = ("rank", "beam", "sample")
BEAMS = 20


def check_table(decoding: str, full: bool) -> None:
    """Raises UserError if a table of all POIs is asked of what does not rank them all."""
    if full and decoding != "rank":
        raise UserError(f"--full_table True: --decoding {decoding} does not know all POIs; use --decoding rank")


def decode(decoding: str, model, tokenizer, trie: Trie, test_prompts: Sequence[TestPrompt], batch_size: int,
           full: bool = False, done=frozenset(), seed: int = 0, processes: Processes | None = None
           ) -> Iterator[tuple[list[TestPrompt], list[Ranked]]]:
    """Yield (prompts, their results) chunk by chunk, the longest first; pairs in `done` need no result.

    Which prompts share a chunk depends on the prompts, `batch_size` and the kind of device alone, and the random
    numbers on the chunk, so that an interrupted evaluation goes on with the same numbers, and several `processes`,
    which share out groups of chunks, get them, too.
    """
    processes = processes or Processes()
    progress = tqdm(total=len(test_prompts), initial=len(done), disable=not show_progress(), unit="prompt")
    if decoding == "rank":
        ranking.check(model, trie, min(test_prompts, key=lambda prompt: len(prompt.input_ids)))
        tail = ranking.TAIL_TOKENS if model.device.type == "cpu" else ranking.TAIL_TOKENS_GPU
        chunks = (found for group in processes.each(ranking.plan(test_prompts, batch_size, tail))
                  for found in ranking.rank(model, trie, group, full=full, done=done))
    else:
        answer = {"beam": beam, "sample": sample}[decoding]
        by_length = sorted(test_prompts, key=lambda prompt: -len(prompt.input_ids))
        batches = [by_length[i:i + batch_size] for i in range(0, len(by_length), batch_size)]
        chunks = ((batch, answer(model, tokenizer, trie, batch, seed)) for batch in processes.each(batches)
                  if not all(prompt.pair in done for prompt in batch))
    for chunk, results in chunks:
        all_done = len(done) + processes.count(sum(prompt.pair not in done for prompt in chunk))
        progress.update(all_done - progress.n)
        yield chunk, results
    progress.close()


@torch.inference_mode()
def sample(model, tokenizer, trie: Trie, batch: Sequence[TestPrompt], seed: int = 0) -> list[Ranked]:
    """One sampled answer per prompt as in the paper's code: T 0.6, top-k 40, top-p 0.1, at most 4 new tokens.

    Its digits are the answer, so the rank is 1 or none.
    """
    torch.manual_seed(seed + batch[0].pair)
    input_ids, mask = left_pad([prompt.input_ids for prompt in batch], tokenizer.pad_token_id, model.device)
    output = model.generate(input_ids, attention_mask=mask, do_sample=True, temperature=0.6, top_k=40, top_p=0.1,
                            max_new_tokens=4, pad_token_id=tokenizer.pad_token_id, use_cache=True)
    digits = [_leading_digits(text) for text in tokenizer.batch_decode(output[:, input_ids.shape[1]:],
                                                                       skip_special_tokens=True)]
    answers = [int(text) if text else None for text in digits]
    return [Ranked(1 if answer == prompt.target else None, [] if answer is None else [(answer, None)], None)
            for prompt, answer in zip(batch, answers)]


@torch.inference_mode()
def beam(model, tokenizer, trie: Trie, batch: Sequence[TestPrompt], seed: int = 0, beams: int = BEAMS) -> list[Ranked]:
    """Beam search over valid ids: what the beams find, best first, with log-probabilities; a target that they do not
    find has no rank. The trie's ids must all have their end, at which a beam stops.
    """
    ends = sorted(set(trie.token[trie.leaf].tolist()))
    if set(ends) & set(trie.token[(trie.children > 0).nonzero().squeeze(1)[1:]].tolist()):
        raise UserError("--decoding beam needs a token that ends an id and stands in none, which this tokenizer lacks; "
                        "use --decoding rank")
    input_ids, mask = left_pad([prompt.input_ids for prompt in batch], tokenizer.pad_token_id, model.device)
    length = input_ids.shape[1]

    def allowed(_, sequence):
        # Where fewer ids than beams are left, a beam strays (at -inf) and may only end.
        return trie.tokens_after(sequence[length:].tolist()) or ends

    output = model.generate(input_ids, attention_mask=mask, num_beams=beams, num_return_sequences=beams,
                            do_sample=False, length_penalty=0.0, max_new_tokens=int(trie.depth.max()),
                            prefix_allowed_tokens_fn=allowed, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
                            use_cache=True, return_dict_in_generate=True, output_scores=True)
    by_spelling = {tuple(tokens): poi for poi, tokens in trie.spelled.items()}
    found = [{} for _ in batch]
    for i, (tokens, score) in enumerate(zip(output.sequences[:, length:].tolist(), output.sequences_scores.tolist())):
        size = next((n for n, token in enumerate(tokens, start=1) if token in ends), len(tokens))
        poi = by_spelling.get(tuple(tokens[:size]))
        if poi is not None and score > -1e8:
            found[i // beams].setdefault(poi, score)
    results = []
    for prompt, scores in zip(batch, found):
        best = sorted(scores.items(), key=lambda item: -item[1])
        rank = next((i for i, (poi, _) in enumerate(best, start=1) if poi == prompt.target), None)
        results.append(Ranked(rank, best, None))
    return results


def left_pad(sequences: Sequence[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) and attention mask (B, S), padded on the left."""
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, ids in enumerate(sequences):
        input_ids[row, longest - len(ids):] = torch.tensor(ids)
        mask[row, longest - len(ids):] = 1
    return input_ids.to(device), mask.to(device)


def _leading_digits(text: str) -> str:
    text = text.strip()
    return text[:len(text) - len(text.lstrip("0123456789"))]
