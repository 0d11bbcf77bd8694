"""Test prompts and spelled ids, in tokenizers that give each digit a token and in one that joins digits."""
import pytest

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.llm.backbone import load_tokenizer
from ga_llm.pairs.spelling import Spelling, answer_id, read_answers

CANDIDATES = [0, 1, 2, 3, 10, 12, 100, 120, 123, 1234, 999]


def pair(history, target, end="."):
    time = "2012-04-04 09:00:00"
    answer = prompts.answer_poi(time, 7, target).removesuffix(".") + end
    return prompts.join(prompts.question(7, [], [f"POI id {i}." for i in history], [],
                                         prompts.ask_poi(time, 7, 0, 1234)), answer)


def test_prompt_does_not_depend_on_the_target(tiny_llama):
    spelled = Spelling(load_tokenizer(tiny_llama()), CANDIDATES, ".")
    test_prompts = spelled.prompts([pair([1, 2], target) for target in (1, 123, 999)], 2048)
    assert len({tuple(p.input_ids) for p in test_prompts}) == 1
    assert test_prompts[0].shown == [1, 2] and test_prompts[1].target == 123 and test_prompts[0].fits
    assert (test_prompts[0].user, test_prompts[0].time) == (7, "2012-04-04 09:00:00")


def test_prompts_that_do_not_fit_are_cut_from_the_left(tiny_llama):
    spelled = Spelling(load_tokenizer(tiny_llama()), CANDIDATES, ".")
    (whole,), (cut,) = (spelled.prompts([pair(range(30), 1)], length) for length in (2048, 50))
    assert not cut.fits and cut.tokens == whole.tokens and len(cut.input_ids) == 50
    assert cut.input_ids[1:] == whole.input_ids[-49:]


@pytest.mark.parametrize("style", ["llama3", "sentencepiece"])
@pytest.mark.parametrize("end", [".", ""])
def test_prompts_in_pieces_have_the_tokens_of_the_whole_text(tiny_llama, style, end):
    tokenizer = load_tokenizer(tiny_llama(style))
    tokenizer.add_special_tokens({"extra_special_tokens": [prompts.gps_token(i) for i in CANDIDATES]})
    texts = [pair([f"{poi} {prompts.gps_token(poi)}" for poi in CANDIDATES[:n]], CANDIDATES[n], end)
             for n in range(1, len(CANDIDATES))]
    found = Spelling(tokenizer, CANDIDATES, end).prompts(texts, 2048)
    for prompt, text in zip(found, texts):
        start, _, _ = answer_id(text)
        encoded = tokenizer(text, return_offsets_mapping=True)
        cut = next(i for i, (_, stop) in enumerate(encoded["offset_mapping"]) if stop > start)
        assert prompt.input_ids == encoded["input_ids"][:cut]


@pytest.mark.parametrize("style", ["llama3", "sentencepiece"])
@pytest.mark.parametrize("end", [".", ""])
def test_ids_end_where_others_begin_with_them(tiny_llama, style, end):
    tokenizer = load_tokenizer(tiny_llama(style))
    some, all_ = (Spelling(tokenizer, CANDIDATES, end, always_end=always) for always in (False, True))
    final = tokenizer("1" + end, add_special_tokens=False)["input_ids"][-1] if end else tokenizer.eos_token_id
    for poi in CANDIDATES:
        others = [other for other in CANDIDATES if other != poi]
        bare = all_.full[poi][:-1]
        assert all_.tokens[poi] == all_.full[poi] == some.full[poi] == [*bare, final]
        begins_another = any(all_.full[other][:len(bare)] == bare for other in others)
        assert some.tokens[poi] == (all_.full[poi] if begins_another else bare)
    for spelled in (some, all_):                # no answer begins another, so their probabilities can be compared
        tokens = list(spelled.tokens.values())
        assert not any(a == b[:len(a)] for a in tokens for b in tokens if a is not b)


def test_ids_must_be_spelled_in_the_answer_as_they_are_alone(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama())
    spelled = Spelling(tokenizer, CANDIDATES, ".")
    spelled.full[999] = spelled.full[999][::-1] + [5]
    with pytest.raises(UserError, match="line 1: the tokenizer spells 999 otherwise"):
        spelled.prompts([pair([1], 2)], 2048)
    with pytest.raises(UserError, match="line 2: the tokenizer spells 999 otherwise.*'POI id 999.'"):
        text = pair([1], 999)
        (ids, cut), = spelled._encoded([text], [text.rindex("999")])
        spelled._prompt(1, text, 999, ids, cut, 2048, "the test file")


def test_answers_must_name_an_id_and_end_alike():
    assert read_answers([pair([1], 2), pair([1], 3)], "t.txt") == "."
    with pytest.raises(UserError, match="t.txt, line 2: no 'POI id n'"):
        read_answers([pair([1], 2), "<question>: a <answer>: b"], "t.txt")
    with pytest.raises(UserError, match="line 2: the answer ends in '!'"):
        read_answers([pair([1], 2), pair([1], 2, "!")], "t.txt")
    assert answer_id(pair([1], 2))[1:] == (2, ".")
