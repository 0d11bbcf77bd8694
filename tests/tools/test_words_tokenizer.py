"""A tokenizer of whole words: few tokens, the same in check-in and answer, and an exact ranking all the same."""
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

FIELDS = ("week", "poi", "gps")
PLACES = [1, 2, 3, 5, 6, 7, 10, 12]     # of mapping_csv


def pairs(fields=FIELDS, count=12):
    draw, found = np.random.default_rng(0), []
    for user in range(count):
        visits = [prompts.check_in(fields, f"2012-04-{1 + i:02} {draw.integers(24):02}:10:00", user,
                                   int(draw.choice(PLACES)), 40.5, -73.5, "St. Mark's", 3) for i in range(9)]
        time = f"2012-05-01 {user:02}:30:00"
        question = prompts.question(user, [], visits[:6], visits[6:], prompts.ask_poi(time, user, 1, 13))
        found.append(prompts.join(question, prompts.answer_poi(time, user, PLACES[user % 8], fields)))
    return found


@pytest.fixture
def folder(tmp_path):
    make_tiny_llama(tmp_path / "m", style="words", corpus=pairs(), vocab_size=2000, hidden=32, heads=4, layers=2,
                    tie_embeddings=True)
    return tmp_path / "m"


@pytest.fixture
def tokenizer(folder, mapping_csv):
    tokenizer = load_tokenizer(str(folder))
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv))
    return tokenizer


def test_a_check_in_is_its_time_its_id_and_its_place(tokenizer):
    text = ("<question>: History of user 3: Tue 18h POI id 12 <GPS 12>. Sun 07h POI id 5 <GPS 5>. Current trajectory "
            "of user 3: Mon 00h POI id 7 <GPS 7>. " + prompts.ask_poi("2012-05-01 03:30:00", 3, 1, 13) + " "
            + prompts.answer_poi("2012-05-01 03:30:00", 3, 5, FIELDS))
    hours = {f" {prompts.week(f'2012-04-{d:02} {h:02}:00:00')} POI id ": h for d in range(1, 8) for h in range(24)}
    pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
    expected = ["<question>: History of ", "user 3:", " Tue 18h POI id ", "12", "<GPS 12>", " Sun 07h POI id ", "5",
                "<GPS 5>", " Current trajectory of ", "user 3:", " Mon 00h POI id ", "7", "<GPS 7>", " Tue 03h POI id ",
                "5", "."]
    assert "".join(pieces) == "".join(expected)     # of an hour that the corpus has not: in bytes
    known = set(hours) & {tokenizer.decode([i]) for i in range(len(tokenizer))}
    assert known and all(pieces.count(piece) == expected.count(piece) for piece in expected if piece in known)
    for piece in ("12", "<GPS 12>", "user 3:", "<question>: History of "):
        assert piece in pieces


def test_ids_are_single_tokens_and_ranked_exactly(tokenizer, folder, mapping_csv):
    """Against the softmax of a plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    mapping = gps_tokens.read_gps_mapping(mapping_csv)
    gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    spelled = Spelling(tokenizer, PLACES, ".")
    assert all(len(ids) == 1 for ids in spelled.tokens.values())
    test_prompts = spelled.prompts(pairs(), 4096)
    trie = ranking.Trie(spelled.tokens)
    for group in ranking.plan(test_prompts, 4):
        for chunk, results in ranking.rank(model, trie, group, full=True):
            for prompt, result in zip(chunk, results):
                logits = model(torch.tensor([prompt.input_ids])).logits[0, -1].log_softmax(-1)
                expected = torch.stack([logits[spelled.tokens[poi][0]] for poi in trie.candidates])
                torch.testing.assert_close(torch.from_numpy(result.log_probs), expected, rtol=1e-4, atol=1e-4)
                assert result.rank == 1 + int((expected > expected[trie.place[prompt.target]]).sum())


@pytest.mark.parametrize("fields", [FIELDS, ("week", "poi"), ("week", "poi", "gps", "category"), prompts.FIELDS])
def test_tokens_of_the_training_are_those_of_the_whole_text(tokenizer, tmp_path, caplog, fields):
    path, texts = tmp_path / "pairs.json", pairs(fields)
    path.write_text(json.dumps([dict(zip(("question", "answer"), prompts.split(pair))) for pair in texts]))
    with caplog.at_level("INFO"):
        data = token_cache.load(path, tokenizer, 4096, "m.csv", poi_ids=True)
    for item, pair in zip(data, sft_data.iterate_pairs(path), strict=True):
        ids, start = sft_data.encode(tokenizer, pair)
        assert (item["input_ids"].tolist(), item["answer_start"]) == (ids, start)
        marked = tokenizer.convert_ids_to_tokens(item["input_ids"][item["targets"]])
        assert "".join(marked) == "".join(prompts.POI_ID.findall(pair))


def test_words_beyond_the_vocabulary_are_spelled(tmp_path):
    make_tiny_llama(tmp_path / "m", style="words", corpus=pairs(), vocab_size=300)
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    assert len(tokenizer) == 300
    for text in ("POI id 98765", "user 4321: Café", "Mon 25h"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_flags(tmp_path, monkeypatch):
    import make_tiny_llama as tool
    words = ["x", "--words", str(tmp_path / "no.json"), "--output_dir", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="no.json: not found; make it with `python data-preprocess/process_llm_gps.py`"):
        tool.main()
    (tmp_path / "no.json").write_text(json.dumps([{"question": "<question>: a", "answer": "<answer>: POI id 1."}]))
    monkeypatch.setattr("sys.argv", [*words, "--corpus", str(tmp_path / "no.json")])
    with pytest.raises(UserError, match="--words, --corpus: exclude each other"):
        tool.main()


def test_ids_of_near_places_begin_alike(tmp_path):
    """Three places: two in one block, one in another state; the rest of the model is as without."""
    mapping = gps_tokens.GPSMapping(np.array([5, 1, 2]), np.array([40.7127, 37.77, 40.7128]),
                                    np.array([-74.0060, -122.42, -74.0059]))
    options = {"style": "words", "corpus": pairs(), "vocab_size": 2000, "hidden": 256, "heads": 4,
               "tie_embeddings": True}
    plain = make_tiny_llama(tmp_path / "plain", **options).state_dict()
    model = make_tiny_llama(tmp_path / "places", **options, places=mapping)
    tokenizer = load_tokenizer(str(tmp_path / "places"))
    one, other, far, absent = tokenizer.convert_tokens_to_ids(["5", "2", "1", "7"])
    rows = model.get_input_embeddings().weight

    def cosine(a, b):
        return torch.cosine_similarity(rows[a], rows[b], dim=0).item()

    assert cosine(one, other) > 0.5 and abs(cosine(one, far)) < 0.3
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(rows[absent], plain["model.embed_tokens.weight"][absent])
    assert load_tokenizer(str(tmp_path / "plain")).get_vocab() == tokenizer.get_vocab()


def test_ids_of_a_category_begin_alike(tmp_path):
    """Of three places far from each other, two are of one category; the third of none that train knows, as 7's is."""
    mapping = gps_tokens.GPSMapping(np.array([1, 2, 5]), np.array([40.7, 20.5, -30.1]), np.array([-74.0, 10.5, 100.0]))
    options = {"style": "words", "corpus": pairs(), "vocab_size": 2000, "hidden": 256, "heads": 4, "places": mapping}
    plain, alike = (make_tiny_llama(tmp_path / name, **options, category_of=of).get_input_embeddings().weight
                    for name, of in (("plain", None), ("alike", {1: 9, 2: 9, 5: -1})))
    tokenizer = load_tokenizer(str(tmp_path / "alike"))
    one, other, third, absent = tokenizer.convert_tokens_to_ids(["1", "2", "5", "7"])
    added = (alike - plain).detach()
    assert torch.allclose(added[one], added[other], atol=1e-6) and added[one].std() > 0.01
    assert not torch.allclose(added[one], added[third], atol=1e-2) and not added[absent].any()


def test_how_long_after_is_a_token(tmp_path):
    corpus = ["<question>: user 3: after 2h Sun 07h POI id 5."]
    make_tiny_llama(tmp_path / "m", style="words", corpus=corpus)
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    found = [tokenizer.decode([i]) for i in tokenizer("user 3: after 2h Sun 07h POI id 5 <GPS 5>.")["input_ids"]]
    assert found[:4] == ["user 3:", " after 2h", " Sun 07h POI id ", "5"]


def test_categories_need_places(tmp_path, monkeypatch):
    import make_tiny_llama as tool
    monkeypatch.setattr("sys.argv", ["x", "--categories", "t.csv", "--output_dir", str(tmp_path / "o")])
    with pytest.raises(UserError, match="--categories: goes with --places"):
        tool.main()


def test_places_need_words(tmp_path, monkeypatch):
    import make_tiny_llama as tool
    monkeypatch.setattr("sys.argv", ["x", "--places", "g.csv", "--output_dir", str(tmp_path / "o")])
    with pytest.raises(UserError, match="--places: goes with --words"):
        tool.main()
