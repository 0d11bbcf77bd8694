"""The tiny Llama is a base model like any other, with either tokenizer."""
import make_tiny_llama as tool
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from ga_llm.base import prompts
from ga_llm.base.cli import UserError

TEXT = ("<question>: Current trajectory of user 17: 2012-04-03 18:00:09 user 17 POI id 4980 (40.719810, -74.002581) "
        "Caf\u00e9 \u6771\u4eac, category id 75. Which?")


@pytest.fixture(scope="module", params=tool.STYLES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / request.param
    tool.make_tiny_llama(path, style=request.param)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_round_trip(tokenizer):
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_bos_comes_first_once_and_eos_does_not_come(tokenizer):
    ids = tokenizer(TEXT).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.bos_token_id not in tokenizer(TEXT, add_special_tokens=False).input_ids


@pytest.mark.parametrize("number", ["7", "42", "4980", "1234567890"])
@pytest.mark.parametrize("frame", ["POI id {}.", "({}, -{})", "user {}", "<GPS {}>", "{}:{}"])
def test_a_number_is_one_token_a_digit(tokenizer, frame, number):
    text = frame.format(number, number)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


def test_no_piece_of_the_vocabulary_joins_digits(tokenizer):
    pieces = [t for t in tokenizer.get_vocab() if not (t.startswith("<0x") and t.endswith(">"))]
    assert not [t for t in pieces if len(t) > 1 and any(c.isdigit() for c in t)]


def test_gps_tokens_can_be_added(tokenizer, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": [prompts.gps_token(i) for i in range(20)]})
    ids = tokenizer("at <GPS 12> and <GPS 1>.", add_special_tokens=False).input_ids
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.startswith("<GPS")] == ["<GPS 12>", "<GPS 1>"]


def test_the_model_runs_and_its_sizes_are_those_asked_for(tmp_path):
    tool.make_tiny_llama(tmp_path / "m", hidden=32, layers=3, heads=4, kv_heads=2, max_position=512,
                         tie_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
            config.max_position_embeddings) == (32, 3, 4, 2, 512)
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loss = model(**(batch := tokenizer(TEXT, return_tensors="pt")), labels=batch.input_ids).loss
    assert abs(loss.item() - torch.log(torch.tensor(float(len(tokenizer)))).item()) < 0.5  # random: uniform guessing


@pytest.mark.parametrize("style", tool.STYLES)
def test_same_seed_same_folder(tmp_path, style):
    state = torch.get_rng_state()
    for name in ("a", "b"):
        tool.make_tiny_llama(tmp_path / name, style=style, seed=3)
    for file in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert torch.equal(torch.get_rng_state(), state)


def test_sentencepiece_style_is_llama_2s_class_with_bytes_for_what_it_does_not_know(tmp_path):
    tool.make_tiny_llama(tmp_path / "m", style="sentencepiece")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert isinstance(tokenizer, LlamaTokenizer) and tokenizer.pad_token is None
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert "<0xE6>" in tokenizer.convert_ids_to_tokens(tokenizer("\u6771").input_ids)


def test_a_corpus_shapes_the_vocabulary(tmp_path):
    (tmp_path / "corpus.txt").write_text("zyxwvut zyxwvut\n" * 50, encoding="utf-8")
    tool.make_tiny_llama(tmp_path / "m", corpus=tool.read_corpus(tmp_path / "corpus.txt"), vocab_size=300)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").tokenize("zyxwvut") == ["zyxwvut"]


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--hidden 30"):
        tool.make_tiny_llama(tmp_path / "m", hidden=30)
    with pytest.raises(UserError, match="--corpus .*No such file"):
        tool.read_corpus(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no text"):
        tool.read_corpus(tmp_path / "empty.txt")
