"""The GGUF file of an export holds the model: as transformers' own reader of such files finds it, and llama.cpp."""
import logging

import llama_cpp_python
import numpy as np
import pytest
import torch
from families import FAMILIES, write
from llama_cpp_python import MOST, rounding
from make_tiny_llama import sample_prompts, words_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, MistralConfig, Qwen2Config

from ga_llm.base.cli import UserError
from ga_llm.llm import backbone
from ga_llm.serving import export, gguf_file
from geo_encoder import gps_tokens

pytest.importorskip("gguf")
TEXT = "<question>: POI id 12 <GPS 5>, then POI id 1234 Café. At <GPS 12>. for <GPS 7> <answer>: POI id "


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A family's tokenizer with places, and a model for contexts of that length, made once."""
    made, ids = {}, np.arange(1, 21)
    mapping = gps_tokens.GPSMapping(ids, 40 + ids / 100, -74 + ids / 50)

    def make(family, length=512):
        if (family, length) not in made:
            base = tmp_path_factory.mktemp("gguf") / family
            write(FAMILIES[family], base)
            tokenizer, model = backbone.load_tokenizer(str(base)), backbone.load_llm(str(base), length, "sdpa",
                                                                                     torch.float32)
            gps_tokens.add_gps_tokens(tokenizer, mapping, model)
            made[family, length] = tokenizer, export.plain(model, torch.float32).eval()
        return made[family, length]
    return make


def logits(model, tokenizer) -> np.ndarray:
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits[0].numpy()


# Whose positions transformers' reader of GGUF files understands.
@pytest.mark.parametrize("kind", gguf_file.TYPES)
@pytest.mark.parametrize("family", ["llama-2", "llama-3", "qwen2.5", "smollm2"])
def test_transformers_reads_it(ready, tmp_path, family, kind, caplog):
    caplog.set_level(logging.INFO)
    tokenizer, model = ready(family)
    gguf_file.write(model, tokenizer, 512, tmp_path / gguf_file.name(kind), kind)
    assert not [record for record in caplog.records if record.name.startswith("gguf")]
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf_file.name(kind))
    assert rounding(logits(read, tokenizer), logits(model, tokenizer)) < MOST[kind]
    assert read.config.max_position_embeddings == 512
    if family == "llama-2":     # of the others it does not learn how they cut text
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf_file.name(kind))
        assert theirs(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@pytest.mark.slow
def test_llama_cpp_reads_it(ready, tmp_path):
    """Each family's tokens and positions, as they are and four times longer."""
    expected, texts = {}, {}
    for family in FAMILIES:
        for length in (512, 2048)[:1 if family == "llama-3.2" else 2]:
            tokenizer, model = ready(family, length)
            for kind in gguf_file.TYPES if family != "mistral-0.1" else ():
                path = str(tmp_path / f"{family}-{length}-{kind}.gguf")
                gguf_file.write(model, tokenizer, length, path, kind)
                expected[path] = kind, tokenizer(TEXT)["input_ids"], logits(model, tokenizer)
                texts[path] = [" " * gguf_file.needs_space(tokenizer) + TEXT]
    found = llama_cpp_python.read(texts, tmp_path / "found.npz")
    for path, (kind, tokens, theirs) in expected.items():
        (read, mine, _), = found[path]
        assert read == tokens and rounding(mine, theirs) < MOST[kind], path
    assert len(expected) == 26


def test_pairs_together():
    """A head of width 4 after the other: its rows 0 and 2, 1 and 3 are turned together."""
    assert gguf_file.pairs_together(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf_file.pairs_together(np.arange(16).reshape(8, 2), 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]


def test_how_text_is_cut(ready):
    names = {family: gguf_file.how_text_is_cut(ready(family)[0])["pre"] for family in FAMILIES}
    assert names == {"llama-2": "default", "llama-3": "llama-bpe", "llama-3.2": "llama-bpe", "qwen2.5": "qwen2",
                     "qwen3": "qwen2", "mistral-0.1": "default", "mistral-0.3": "default", "smollm2": "smollm"}
    assert gguf_file.needs_space(ready("llama-2")[0]) and not gguf_file.needs_space(ready("smollm2")[0])


@pytest.mark.parametrize("config, names", [
    (MistralConfig(sliding_window=24), "sliding window (24)"), (Gemma3TextConfig(), "not of gemma3_text"),
    (Qwen2Config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512,
                                  "rope_theta": 1e4}), "not yarn")])
def test_models_that_are_refused(ready, config, names):
    with pytest.raises(UserError) as caught:
        gguf_file.check(config, ready("smollm2")[0], 512)
    assert names in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_refused():
    with pytest.raises(UserError, match="cuts text as this one"):
        gguf_file.how_text_is_cut(words_tokenizer(sample_prompts(0, 20), 2000))
