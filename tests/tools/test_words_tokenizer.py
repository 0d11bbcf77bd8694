"""A tokenizer of whole words, for check-ins of two tokens: few tokens, and an exact ranking all the same."""
import json

import numpy as np
import pytest
import torch
from make_tiny_llama import make_tiny_llama
from transformers import AutoModelForCausalLM

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import ranking
from ga_llm.llm.backbone import load_tokenizer
from ga_llm.pairs import sft_data, token_cache
from ga_llm.pairs.spelling import Spelling
from geo_encoder import gps_tokens

PLACES = [1, 2, 3, 5, 6, 7, 10, 12]     # of mapping_csv
NOW = "2012-05-01 03:30:00"


def pair(user, history, current, poi):
    """history, current: (moment, POI id) of check-ins; the target's moment is 9."""
    parts = ([prompts.time_token(moment) + prompts.gps_token(place) for moment, place in part]
             for part in (history, current))
    question = prompts.question(user, [], *(["".join(part)] for part in parts), prompts.ask_poi(NOW, user, 1, 13))
    return prompts.join(question, prompts.answer_poi(NOW, user, poi, prompts.time_token(9), as_token=True))


def pairs(count=12):
    draw = np.random.default_rng(0)
    visits = [[(int(draw.integers(prompts.MOMENTS)), int(draw.choice(PLACES))) for _ in range(9)] for _ in range(count)]
    return [pair(user, own[:6], own[6:], PLACES[user % 8]) for user, own in enumerate(visits)]


@pytest.fixture
def folder(tmp_path):
    make_tiny_llama(tmp_path / "m", style="words", corpus=pairs(), vocab_size=2000, hidden=32, heads=4, layers=2,
                    tie_embeddings=True)
    return tmp_path / "m"


@pytest.fixture
def tokenizer(folder, mapping_csv):
    tokenizer = load_tokenizer(str(folder))
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv))
    gps_tokens.add_time_tokens(tokenizer)
    return tokenizer


def test_a_check_in_is_its_time_and_its_place(tokenizer):
    """The question's and the answer's sentences are passed over."""
    text = pair(3, [(700, 12), (40, 5)], [(2, 7)], 5)
    assert [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]] == [
        "<question>: History of ", "user 3:", "<TIME 700>", "<GPS 12>", "<TIME 40>", "<GPS 5>",
        " Current trajectory of ", "user 3:", "<TIME 2>", "<GPS 7>", "<TIME 9>", "<GPS 5>", "."]


@torch.inference_mode()
def test_places_are_ranked_exactly(tokenizer, folder, mapping_csv):
    """Against the softmax of a plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv), model)
    gps_tokens.add_time_tokens(tokenizer, model)
    spelled = Spelling(tokenizer, PLACES, ">.")
    assert all(len(ids) == 1 for ids in spelled.tokens.values())
    test_prompts = spelled.prompts(pairs(), 4096)
    trie, ranked = ranking.Trie(spelled.tokens), 0
    for group in ranking.plan(test_prompts, 4):
        for chunk, results in ranking.rank(model, trie, group, full=True):
            for prompt, result in zip(chunk, results):
                logits = model(torch.tensor([prompt.input_ids])).logits[0, -1].log_softmax(-1)
                expected = torch.stack([logits[spelled.tokens[poi][0]] for poi in trie.candidates])
                torch.testing.assert_close(torch.from_numpy(result.log_probs), expected, rtol=1e-4, atol=1e-4)
                assert result.rank == 1 + int((expected > expected[trie.place[prompt.target]]).sum())
                ranked += 1
    assert ranked == len(pairs())


def test_tokens_of_the_training_are_those_of_the_whole_text(tokenizer, tmp_path):
    path, texts = tmp_path / "pairs.json", pairs()
    path.write_text(json.dumps([dict(zip(("question", "answer"), prompts.split(text))) for text in texts]))
    data = token_cache.load(path, tokenizer, 4096, "m.csv", poi_ids=True)
    for item, text in zip(data, sft_data.iterate_pairs(path), strict=True):
        ids, start = sft_data.encode(tokenizer, text)
        assert (item["input_ids"].tolist(), item["answer_start"]) == (ids, start)
        marked = tokenizer.convert_ids_to_tokens(item["input_ids"][item["targets"]])
        assert marked == [prompts.gps_token(poi) for poi in prompts.POI_ID.findall(text)] and len(marked) == 10


def test_words_beyond_the_vocabulary_are_spelled(tmp_path):
    make_tiny_llama(tmp_path / "m", style="words", corpus=pairs(60), vocab_size=300)
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    assert len(tokenizer) == 300
    for text in ("POI id 98765", "user 4321: Café", "Which?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_flags(tmp_path, monkeypatch):
    import make_tiny_llama as tool
    words = ["x", "--words", str(tmp_path / "no.json"), "--output_dir", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="no.json: not found; make it with `python data-preprocess/process_llm_gps.py`"):
        tool.main()
    texts = [pairs()[0], "<question>: POI id 3 <GPS 3>. <answer>: POI id 1."]
    (tmp_path / "no.json").write_text(json.dumps([dict(zip(("question", "answer"), prompts.split(text)))
                                                  for text in texts]))
    with pytest.raises(UserError, match="no.json, pair 1: shows a POI's id as text; .* -answer token"):
        tool.main()
    assert not (tmp_path / "o").exists()
    monkeypatch.setattr("sys.argv", [*words, "--corpus", str(tmp_path / "no.json")])
    with pytest.raises(UserError, match="--words, --corpus: exclude each other"):
        tool.main()
