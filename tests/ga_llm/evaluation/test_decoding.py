"""Sampling reads digits; beams that keep everything find what exact ranking finds."""
import pytest
import torch

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import decoding, ranking
from ga_llm.llm.backbone import load_llm, load_tokenizer
from ga_llm.pairs.spelling import Spelling

CANDIDATES = [0, 1, 2, 10, 12, 123, 999]


def pair(history, target):
    time = "2012-04-04 09:00:00"
    visits = [f"POI id {i}." for i in history]
    return prompts.join(prompts.question(7, [], visits, [], prompts.ask_poi(time, 7, 0, 999)),
                        prompts.answer_poi(time, 7, target))


@pytest.fixture
def ready(tiny_llama):
    tokenizer, model = load_tokenizer(tiny_llama()), load_llm(tiny_llama(), 2048, "sdpa", torch.float32).eval()
    spelled = Spelling(tokenizer, CANDIDATES, ".", always_end=True)
    texts = [pair([1, 12], 12), pair([5], 999), pair(list(range(20)), 0), pair([], 5)]
    return model, tokenizer, ranking.Trie(spelled.tokens), spelled.prompts(texts, 2048)


def test_beams_find_the_exact_ranking(ready):
    """Mixed lengths, padded on the left: the beams' scores are the answers' log-probabilities."""
    model, tokenizer, trie, test_prompts = ready
    found = decoding.beam(model, tokenizer, trie, test_prompts, beams=20)
    exact = {p.pair: r for chunk, results in decoding.decode("rank", model, tokenizer, trie, test_prompts, 8)
             for p, r in zip(chunk, results)}
    for prompt, beams in zip(test_prompts, found):
        assert beams.rank == exact[prompt.pair].rank
        assert beams.top == [(poi, pytest.approx(value, abs=1e-4)) for poi, value in exact[prompt.pair].top]
    few = decoding.beam(model, tokenizer, trie, test_prompts, beams=2)
    assert all(1 <= len(result.top) <= 2 for result in few)


def test_sampling_gives_one_answer(ready):
    model, tokenizer, trie, test_prompts = ready
    for prompt, result in zip(test_prompts, decoding.sample(model, tokenizer, trie, test_prompts)):
        assert len(result.top) <= 1 and result.rank in (1, None)
        assert (result.rank == 1) == (result.top == [(prompt.target, None)])
    assert [decoding._leading_digits(text) for text in (" 123.", "12 4", "x1", "")] == ["123", "12", "", ""]


@pytest.mark.parametrize("how", decoding.DECODINGS)
def test_goes_on_with_the_same_numbers(ready, how):
    model, tokenizer, trie, test_prompts = ready

    def results(done=frozenset()):
        return {p.pair: r for chunk, found in decoding.decode(how, model, tokenizer, trie, test_prompts, 2, done=done)
                for p, r in zip(chunk, found)}

    whole = results()
    assert set(whole) == {0, 1, 2, 3}
    first = next(iter(whole))
    rest = results(done={first, list(whole)[1]})
    assert 0 < len(rest) < 4 and all(rest[i] == whole[i] for i in rest)


def test_beams_need_an_end(ready):
    model, tokenizer, _, test_prompts = ready
    with pytest.raises(UserError, match="--decoding rank"):
        decoding.beam(model, tokenizer, ranking.Trie({1: [5, 6], 2: [6, 7]}), test_prompts)


def test_tokens_after():
    trie = ranking.Trie({5: [1, 9], 6: [1, 2, 9], 7: [3, 9]})
    assert [trie.tokens_after(tokens) for tokens in ([], [1], [1, 2], [1, 9], [4])] == [[1, 3], [2, 9], [9], [], []]
