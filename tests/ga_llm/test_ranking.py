"""The trie's log-probabilities against each answer computed alone."""
import pytest
import torch

from ga_llm import prompts, ranking
from ga_llm.cli import UserError
from ga_llm.llm import load_llm, load_tokenizer

CANDIDATES = [0, 1, 2, 3, 10, 12, 100, 120, 123, 1234, 999]


def pair(history, target, end="."):
    answer = prompts.answer_poi("2012-04-04 09:00:00", 7, target).removesuffix(".") + end
    return prompts.join(prompts.question(7, [], [f"POI id {i}." for i in history], [],
                                         prompts.ask_poi("2012-04-04 09:00:00", 7, 0, 1234)), answer)


@pytest.mark.parametrize("style", ["llama3", "sentencepiece"])
@pytest.mark.parametrize("end", [".", ""])
@torch.inference_mode()
def test_equals_each_answer_alone(tiny_llama, monkeypatch, style, end):
    """Mixed lengths, left padding, chunks smaller than the trie, ids that begin others, two kinds of end."""
    tokenizer = load_tokenizer(tiny_llama(style))
    model = load_llm(tiny_llama(style), 2048, "sdpa", torch.float32).eval()
    spelling = ranking.Spelling(tokenizer, CANDIDATES, end)
    trie = ranking.Trie(list(spelling.tokens.values()))
    monkeypatch.setattr(ranking, "LOGITS_BYTES", 0)
    monkeypatch.setattr(trie, "chunks", lambda size, chunks=trie.chunks: chunks(4))
    pairs = [pair([1, 12, 123], 12, end), pair([5], 1234, end), pair(list(range(20)), 0, end)]
    test_prompts = [spelling.prompt(i, text, 2048) for i, text in enumerate(pairs)]
    got = ranking.log_probabilities(model, [p.input_ids for p in test_prompts], trie, tokenizer.pad_token_id)

    for row, text in zip(got, pairs):
        start, target, _ = ranking.answer_id(text)
        for candidate, value in zip(CANDIDATES, row.tolist()):
            ids = tokenizer(text[:start] + str(candidate) + end)["input_ids"]
            ids += [] if end else [tokenizer.eos_token_id]
            spelled = spelling.tokens[candidate]
            assert ids[-len(spelled):] == spelled
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone = sum(log_probs[i - 1, ids[i]].item() for i in range(len(ids) - len(spelled), len(ids)))
            assert value == pytest.approx(alone, abs=1e-4)


def test_chunk_size_does_not_matter(tiny_llama):
    tokenizer, model = load_tokenizer(tiny_llama()), load_llm(tiny_llama(), 2048, "sdpa", torch.float32).eval()
    spelling = ranking.Spelling(tokenizer, range(300), ".")
    trie = ranking.Trie(list(spelling.tokens.values()))
    ids = [spelling.prompt(0, pair([1], 5), 2048).input_ids]
    whole = ranking.log_probabilities(model, ids, trie, tokenizer.pad_token_id)
    trie_chunks = trie.chunks
    trie.chunks = lambda size: trie_chunks(7)
    chunked = ranking.log_probabilities(model, ids, trie, tokenizer.pad_token_id)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    assert whole.shape == (1, 300) and whole.logsumexp(1).item() <= 1e-4


def test_trie_by_hand():
    trie = ranking.Trie([[1, 9], [1, 2, 9], [3, 9]])
    assert len(trie.parent) == 7 and len(trie.inner) == 3       # 1, 12, 3; three ends; the root
    assert [trie.token[leaf].item() for leaf in trie.leaf] == [9, 9, 9]
    with pytest.raises(ValueError, match="beginning of another"):
        ranking.Trie([[1], [1, 2]])


def test_prompt_does_not_depend_on_the_target(tiny_llama):
    spelling = ranking.Spelling(load_tokenizer(tiny_llama()), CANDIDATES, ".")
    prompts_ = [spelling.prompt(0, pair([1, 2], target), 2048) for target in (1, 123, 999)]
    assert len({tuple(p.input_ids) for p in prompts_}) == 1
    assert prompts_[0].shown == [1, 2] and prompts_[1].target == 123 and prompts_[0].fits


def test_prompts_that_do_not_fit_are_cut_from_the_left(tiny_llama):
    spelling = ranking.Spelling(load_tokenizer(tiny_llama()), CANDIDATES, ".")
    whole, cut = (spelling.prompt(0, pair(range(30), 1), length) for length in (2048, 50))
    assert not cut.fits and cut.tokens == whole.tokens and len(cut.input_ids) == 50
    assert cut.input_ids[1:] == whole.input_ids[-49:]


def test_ties_never_flatter():
    assert ranking.rank_of(torch.tensor([-1.0, -2.0, -1.0]), 0) == 2
    assert ranking.rank_of(torch.tensor([-1.0, -2.0, -1.0]), 1) == 3


def test_sampling_reads_digits(tiny_llama):
    tokenizer, model = load_tokenizer(tiny_llama()), load_llm(tiny_llama(), 2048, "sdpa", torch.float32).eval()
    spelling = ranking.Spelling(tokenizer, CANDIDATES, ".")
    answers = ranking.sample_ids(model, tokenizer, [spelling.prompt(0, pair([1], 5), 2048).input_ids] * 3)
    assert len(answers) == 3 and all(a is None or a >= 0 for a in answers)
    assert [ranking._leading_digits(text) for text in (" 123.", "12 4", "x1", "")] == ["123", "12", "", ""]


def test_answers_must_name_an_id_and_end_alike():
    assert ranking.read_answers([pair([1], 2), pair([1], 3)], "t.txt") == "."
    with pytest.raises(UserError, match="t.txt, line 2: no 'POI id n'"):
        ranking.read_answers([pair([1], 2), "<question>: a <answer>: b"], "t.txt")
    with pytest.raises(UserError, match="line 2: the answer ends in '!'"):
        ranking.read_answers([pair([1], 2), pair([1], 2, "!")], "t.txt")
