"""The tree's log-probabilities against each answer computed alone, and what pruning must not change."""
import dataclasses
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, Qwen2Config

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import ranking
from ga_llm.llm.backbone import load_llm, load_tokenizer
from ga_llm.llm.tree_attention import TREE
from ga_llm.pairs import spelling
from ga_llm.pairs.spelling import Spelling, answer_id
from geo_encoder import encoder, gps_tokens, injection

CANDIDATES = [0, 1, 2, 3, 10, 12, 100, 120, 123, 1234, 999]


def pair(history, target, end=".", user=7):
    answer = prompts.answer_poi("2012-04-04 09:00:00", user, target).removesuffix(".") + end
    return prompts.join(prompts.question(user, [], [f"POI id {i}." for i in history], [],
                                         prompts.ask_poi("2012-04-04 09:00:00", user, 0, 1234)), answer)


def shared(history, current, target, user=7):
    """A pair with the same history as its user's others."""
    visits = [[f"POI id {i}." for i in part] for part in (history, current)]
    return prompts.join(prompts.question(user, [], *visits, prompts.ask_poi("2012-04-04 09:00:00", user, 0, 1234)),
                        prompts.answer_poi("2012-04-04 09:00:00", user, target))


def alone(model, ids, spelled):
    """log P of one answer, from a plain forward of prompt and answer."""
    log_probs = model(torch.tensor([ids + spelled])).logits[0].log_softmax(-1)
    return sum(log_probs[len(ids) + i - 1, token].item() for i, token in enumerate(spelled))


def ranked(model, trie, test_prompts, batch_size=8, **options):
    """{pair: Ranked}"""
    return {prompt.pair: result for group in ranking.plan(test_prompts, batch_size)
            for chunk, results in ranking.rank(model, trie, group, **options) for prompt, result in zip(chunk, results)}


HISTORY = list(range(30))
PAIRS = [shared(HISTORY, [1, 12, 123], 12), shared(HISTORY, [5], 1234), pair([5], 1234), shared(HISTORY, [], 0),
         pair(list(range(20)), 0, user=9), pair(list(range(8)), 100, user=8)]


def ready(folder, texts, end=".", candidates=CANDIDATES, always_end=False, attention=TREE):
    spelled = Spelling(load_tokenizer(folder), candidates, end, always_end)
    return (load_llm(folder, 2048, attention, torch.float32).eval(), ranking.Trie(spelled.tokens),
            spelled.prompts(texts, 2048))


@pytest.mark.parametrize("style", ["llama3", "sentencepiece"])
@pytest.mark.parametrize("end", [".", ""])
@pytest.mark.parametrize("always_end", [False, True])
@torch.inference_mode()
def test_equals_each_answer_alone(tiny_llama, monkeypatch, style, end, always_end):
    """Every POI, for prompts of mixed lengths, with and without a shared history, ids that begin others, small passes.

    With `always_end` each log-probability is that of the full answer.
    """
    monkeypatch.setattr(ranking, "LOGITS_BYTES", 0)
    texts = [text.removesuffix(".") + end for text in PAIRS]
    model, trie, test_prompts = ready(tiny_llama(style), texts, end, always_end=always_end)
    groups = ranking.plan(test_prompts, 8)
    assert sorted(len(chunk) for group in groups for chunk in group.chunks) == [3, 3]   # a user's, and the others
    tokenizer, results = load_tokenizer(tiny_llama(style)), ranked(model, trie, test_prompts, full=True)
    for prompt, text in zip(test_prompts, texts):
        start = answer_id(text)[0]
        for candidate, value in zip(trie.candidates, results[prompt.pair].log_probs.tolist(), strict=True):
            ids = tokenizer(text[:start] + str(candidate) + end)["input_ids"]
            ids += [] if end else [tokenizer.eos_token_id]
            answer = ids[len(prompt.input_ids):]
            ended = always_end or candidate in (1, 10, 12, 123)     # others begin with them
            assert trie.spelled[candidate] == answer[:None if ended else -1]
            assert value == pytest.approx(alone(model, prompt.input_ids, trie.spelled[candidate]), abs=1e-4)


FAMILIES = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=1024),
    "mistral with a window": MistralConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                           num_key_value_heads=2, intermediate_size=64, sliding_window=24),
    "qwen2 with a window in some layers": Qwen2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "gemma2": Gemma2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           intermediate_size=64, head_dim=8, sliding_window=24),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_other_architectures(tiny_llama, family):
    """Learned positions, grouped queries, sliding windows: the tree follows each, trained on or not."""
    _, trie, test_prompts = ready(tiny_llama(), PAIRS)
    config = FAMILIES[family]
    config.vocab_size = len(load_tokenizer(tiny_llama()))
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    sharpen(model)
    results = ranked(model, trie, test_prompts, full=True)
    for prompt in test_prompts:
        expected = [alone(model, prompt.input_ids, trie.spelled[poi]) for poi in trie.candidates]
        assert results[prompt.pair].log_probs.tolist() == pytest.approx(expected, abs=1e-4)
        ranking.check(model, trie, prompt)


def sharpen(model):
    """Far from uniform attention, or a wrong mask would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)


def peaked(model):
    """A random model's answers are nearly uniform; larger weights make it sure of itself, as a trained one is."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    return model


@pytest.mark.parametrize("style", ["llama3", "sentencepiece"])
@pytest.mark.parametrize("sure", [False, True])
def test_pruning_changes_neither_rank_nor_top(tiny_llama, style, sure):
    random.seed(1)
    texts = [shared(HISTORY, random.sample(range(900), 3), random.randrange(900), user=user)
             for user in (1, 2, 3) for _ in range(4)]
    model, trie, test_prompts = ready(tiny_llama(style), texts, candidates=range(900), always_end=True)
    if sure:
        best = ranked(peaked(model), trie, test_prompts, top=5)
        test_prompts = [dataclasses.replace(p, target=best[p.pair].top[p.pair % 5][0]) for p in test_prompts]
    fed = []
    embedding = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: fed.append(output.shape[1]))
    pruned, fed_pruned = ranked(model, trie, test_prompts), sum(fed)
    fed.clear()
    whole, fed_whole = ranked(model, trie, test_prompts, full=True), sum(fed)
    embedding.remove()
    for prompt in test_prompts:
        a, b = pruned[prompt.pair], whole[prompt.pair]
        row = torch.from_numpy(b.log_probs)
        assert row.exp().sum() <= 1 + 1e-4
        assert abs(a.rank - b.rank) <= int(((row - row[trie.place[prompt.target]]).abs() < 1e-4).sum()) - 1
        assert [poi for poi, _ in a.top] == [poi for poi, _ in b.top]
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)
        assert [p for _, p in b.top] == pytest.approx(sorted(row.tolist(), reverse=True)[:20])
        assert a.log_probs is None
    if sure:
        assert fed_pruned < fed_whole / 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_does_not_matter(tiny_llama, attention):
    ours, other = (ranked(peaked(model), trie, test_prompts) for model, trie, test_prompts in (
        ready(tiny_llama(), PAIRS, attention=kind) for kind in (TREE, attention)))
    for pair_, result in ours.items():
        assert result.top == [(poi, pytest.approx(value, abs=1e-4)) for poi, value in other[pair_].top]


def test_batch_size_does_not_matter(tiny_llama):
    model, trie, test_prompts = ready(tiny_llama(), PAIRS)
    one, many = (ranked(peaked(model) if i == 0 else model, trie, test_prompts, batch_size=size)
                 for i, size in enumerate((1, 8)))
    for pair_, result in one.items():
        assert result.rank == many[pair_].rank and result.top == [
            (poi, pytest.approx(value, abs=1e-4)) for poi, value in many[pair_].top]


@torch.inference_mode()
def test_four_bit_weights(tiny_llama):
    pytest.importorskip("bitsandbytes")
    _, trie, test_prompts = ready(tiny_llama(), PAIRS)
    model = load_llm(tiny_llama(), 2048, TREE, torch.bfloat16, four_bit=True).eval()
    assert any("4bit" in type(module).__name__ for module in model.modules())
    results = ranked(model, trie, test_prompts, full=True)
    for prompt in test_prompts:
        expected = [alone(model, prompt.input_ids, trie.spelled[poi]) for poi in trie.candidates]
        assert results[prompt.pair].log_probs.tolist() == pytest.approx(expected, abs=0.1)      # bf16


@torch.inference_mode()
def test_gps_vectors_are_seen_in_trunk_and_tails(tiny_llama, mapping_csv):
    tokenizer = load_tokenizer(tiny_llama())
    model = load_llm(tiny_llama(), 2048, "sdpa", torch.float32).eval()
    mapping = gps_tokens.read_gps_mapping(mapping_csv)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    torch.manual_seed(0)
    config = encoder.GeoEncoderConfig(32)
    injection.attach_table(model, injection.gps_injection(encoder.build_encoder(config), config.level, mapping,
                                                          token_ids))
    ids = mapping.ids.tolist()
    places = [f"POI id {i} {prompts.gps_token(i)}." for i in ids]
    texts = [prompts.join(prompts.question(7, [], places, places[i:i + 2], "Where next?"), prompts.answer_poi(
        "2012-04-04 09:00:00", 7, ids[i])) for i in range(4)]
    spelled = Spelling(tokenizer, ids, ".")
    test_prompts = spelled.prompts(texts, 2048)
    results = ranked(model, ranking.Trie(spelled.tokens), test_prompts, full=True)
    for prompt in test_prompts:
        expected = [alone(model, prompt.input_ids, spelled.tokens[poi]) for poi in ids]
        assert results[prompt.pair].log_probs.tolist() == pytest.approx(expected, abs=1e-4)


def test_target_that_is_no_candidate_has_no_rank(tiny_llama):
    model, trie, test_prompts = ready(tiny_llama(), [pair([1, 2], 5), pair([3], 1)])
    results = ranked(model, trie, test_prompts)
    assert results[0].rank is None and len(results[0].top) == len(CANDIDATES)
    assert 1 <= results[1].rank <= len(CANDIDATES)


def test_done_pairs_are_left_out(tiny_llama):
    model, trie, test_prompts = ready(tiny_llama(), PAIRS)
    whole = ranked(model, trie, test_prompts, batch_size=2)
    done = {chunk[0].pair for group in ranking.plan(test_prompts, 2) for chunk in group.chunks[:1] if len(chunk) == 1}
    done |= {p.pair for group in ranking.plan(test_prompts, 2)[:1] for p in group.chunks[0]}
    rest = ranked(model, trie, test_prompts, batch_size=2, done=done)
    assert rest and set(rest).isdisjoint(done) and all(rest[i] == whole[i] for i in rest)      # to the last bit
    assert not ranked(model, trie, test_prompts, done=set(whole))


def test_plan_by_hand():
    def prompt(i, ids):
        return spelling.TestPrompt(i, "", 0, list(ids), len(ids), True)

    def shape(groups):
        return [(len(group.trunk), [[p.pair for p in chunk] for chunk in group.chunks], group.tokens)
                for group in groups]

    history, other = list(range(100, 200)), list(range(500, 540))
    test_prompts = [prompt(0, history + [1, 2]), prompt(1, other + [3]), prompt(2, history + [1, 3, 4]),
                    prompt(3, [7, 8]), prompt(4, history + [5]), prompt(5, [7, 9, 9])]
    assert shape(ranking.plan(test_prompts, 8)) == [(100, [[0, 2, 4]], 106), (0, [[1, 5, 3]], 46)]
    assert shape(ranking.plan(test_prompts, 2)) == [(100, [[0, 2], [4]], 106), (0, [[1, 5]], 44), (1, [[3]], 2)]
    assert shape(ranking.plan(test_prompts, 8, tail_tokens=4))[1:] == [(40, [[1]], 41), (2, [[5]], 3), (1, [[3]], 2)]
    # The same prompt twice keeps a token of its own; a short common beginning is not worth giving up a long one.
    assert shape(ranking.plan([prompt(0, history), prompt(1, history)], 8)) == [(99, [[0, 1]], 101)]
    short = [prompt(0, history[:40] + [1]), *(prompt(i, history + [i]) for i in (1, 2, 3))]
    assert shape(ranking.plan(short, 8)) == [(100, [[1, 2, 3]], 103), (40, [[0]], 41)]


def test_trie_by_hand():
    trie = ranking.Trie({5: [1, 9], 6: [1, 2, 9], 7: [3, 9]})
    assert trie.parent.tolist() == [-1, 0, 0, 1, 1, 2, 3] and trie.token.tolist() == [0, 1, 3, 2, 9, 9, 9]
    assert trie.inner.tolist() == [True, True, True, True, False, False, False]         # the root, 1, 3, 12
    assert [trie.token[leaf].item() for leaf in trie.leaf] == [9, 9, 9]
    assert [trie.token[trie.path(poi)].tolist() for poi in trie.candidates] == [[1, 9], [1, 2, 9], [3, 9]]
    assert trie.keeps.nonzero().squeeze(1).tolist() == [0, trie.path(6)[0]]
    with pytest.raises(ValueError, match="beginning of another"):
        ranking.Trie({1: [1], 2: [1, 2]})


def test_ties_never_flatter():
    assert ranking.rank_of(torch.tensor([-1.0, -2.0, -1.0]), 0) == 2
    assert ranking.rank_of(torch.tensor([-1.0, -2.0, -1.0]), 1) == 3


def test_a_model_that_ignores_the_mask_is_refused(tiny_llama):
    model, trie, test_prompts = ready(tiny_llama(), PAIRS)
    sharpen(model)
    ranking.check(model, trie, test_prompts[0])
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match="cannot be ranked exactly.*--decoding"):
        ranking.check(model, trie, test_prompts[0])
