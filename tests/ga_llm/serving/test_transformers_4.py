"""Exports are the same model to transformers 5, which writes them, and to 4.57."""
import numpy as np
import pytest
import stock
import torch
from families import FAMILIES, Family, qwen, write
from make_tiny_llama import sample_prompts, words_tokenizer
from transformers import LlamaConfig, Qwen2Config

from ga_llm.llm import backbone
from ga_llm.serving import export, transformers_4
from geo_encoder import gps_tokens

OLDER = ("transformers==4.57.*", "tokenizers>=0.22,<=0.23", "huggingface_hub>=0.34,<1.0")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
TEXT = "<question>: POI id 12 <GPS 5>, then  POI id 1234 Café (40.5, -74.1).\n<GPS 12>  At 9 <answer>: POI id 7."


def named():
    """With extra special tokens, as the published Qwen 2.5 has them."""
    tokenizer = qwen()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


BASES = FAMILIES | {
    "words": Family(lambda: words_tokenizer(sample_prompts(0, 60), 3000), LlamaConfig, {}),
    "yarn": Family(named, Qwen2Config, {"rope_parameters": YARN})}
LEARNED = ("llama-3.2", "yarn")     # whose positions are scaled already


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A folder with transformers 4.57, which goes before ours; torch is ours."""
    return stock.installed(tmp_path_factory.mktemp("transformers_4"), *OLDER, options=["--no-deps"])


@pytest.mark.slow
def test_both_read_the_same_model(older, tmp_path):
    """Each family's positions, as they are and four times longer, and each kind of tokenizer."""
    ids = np.arange(1, 21)
    mapping = gps_tokens.GPSMapping(ids, 40 + ids / 100, -74 + ids / 50)
    expected = {}
    for name, family in BASES.items():
        base = tmp_path / f"{name}-base"
        write(family, base)
        for length in (512, 2048)[:1 if name in LEARNED else 2]:
            tokenizer, model = backbone.load_tokenizer(str(base)), backbone.load_llm(str(base), length, "sdpa",
                                                                                     torch.float32)
            gps_tokens.add_gps_tokens(tokenizer, mapping, model)
            folder = tmp_path / f"{name}-{length}"
            folder.mkdir()
            asked = tokenizer(TEXT, return_tensors="pt")
            with torch.no_grad():
                expected[str(folder)] = (asked["input_ids"][0].tolist(), model.eval()(**asked).logits, tokenizer,
                                         length)
            export.save(export.plain(model, torch.float32), tokenizer, length, folder)
    new = stock.read(TEXT, expected, tmp_path / "new.pt")
    old = stock.read(TEXT, expected, tmp_path / "old.pt", older)
    for folder, (ids, logits, tokenizer, length) in expected.items():
        before, after = old[folder], new[folder]
        assert before.pop("version").startswith("4.57.") and after.pop("version").startswith("5.")
        for found in (before, after):
            assert (found.pop("logits") - logits).abs().max() < 1e-4 < logits.abs().max() / 1000, folder
        assert before == after, folder
        assert after["ids"] == ids and after["text"] == tokenizer.decode(ids, skip_special_tokens=True), folder
        assert after["dtype"] == "torch.float32" and after["length"] == length, folder


@pytest.mark.parametrize("rope, older_keys", [
    ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
    ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
     {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    (YARN, {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                "original_max_position_embeddings": 128}}),
    ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
     {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5}),
    ({"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {}),
    (None, {})])
def test_positions(rope, older_keys):
    assert transformers_4.positions({"rope_parameters": rope}) == older_keys


def test_special_tokens():
    found = transformers_4.tokenizer({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
    assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"],
                     "model_input_names": ["input_ids", "attention_mask"]}
    named_ones = {"extra_special_tokens": {"image_token": "<image>"}}
    assert transformers_4.tokenizer(named_ones).items() >= named_ones.items()
