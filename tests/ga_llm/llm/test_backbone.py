"""Longer context, 4-bit on a CPU, what is trained, a tokenizer of SentencePiece's own."""
import json

import numpy as np
import pytest
import torch
from make_tiny_llama import sample_prompts
from transformers import LlamaConfig

from ga_llm.base.cli import UserError
from ga_llm.llm import backbone
from geo_encoder import gps_tokens
from geo_encoder.gps_tokens import GPSMapping


@pytest.mark.parametrize("length, factor", [(4096, None), (4097, 2), (8192, 2), (32768, 8)])
def test_rope_scaling(length, factor):
    config = LlamaConfig(max_position_embeddings=4096)
    backbone.extend_context(config, length)
    rope = config.rope_parameters
    assert (rope["rope_type"], rope.get("factor")) == (("linear", factor) if factor else ("default", None))


def test_rope_scaling_is_not_applied_twice():
    config = LlamaConfig(max_position_embeddings=4096)
    backbone.extend_context(config, 32768)
    backbone.extend_context(config, 32768)
    assert config.rope_parameters["factor"] == 8
    backbone.extend_context(config, 65536)
    assert config.rope_parameters["factor"] == 16


def test_scaled_positions_are_divided(tiny_llama):
    """Linear scaling by 2 gives position 2p the angles that position p had."""
    plain, scaled = (backbone.load_llm(tiny_llama(), n, "sdpa", torch.float32) for n in (2048, 4096))
    x = torch.zeros(1, 1, 32)
    for a, b in zip(plain.model.rotary_emb(x, torch.tensor([[7]])), scaled.model.rotary_emb(x, torch.tensor([[14]]))):
        torch.testing.assert_close(a, b)


def test_other_rope_is_refused():
    config = LlamaConfig(max_position_embeddings=4096)
    config.rope_parameters = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="cannot be scaled linearly"):
        backbone.extend_context(config, 32768)


def test_four_bit_trains_after_evaluation(tiny_llama):
    """A forward without gradient must not cost LoRA its gradient afterwards."""
    pytest.importorskip("bitsandbytes")
    model = backbone.load_llm(tiny_llama(hidden=64), 256, "sdpa", torch.bfloat16, four_bit=True)
    model = backbone.add_lora(model, 4, 8, 0.0)
    assert any(type(m).__name__ == "Linear4bit" for m in model.modules())
    ids = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        model.eval()(ids)
    model.train()(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == 8 and all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_what_stage_2_trains(tiny_llama):
    model = backbone.add_lora(backbone.load_llm(tiny_llama(), 256, "sdpa", torch.bfloat16), 8, 16, 0.1)
    backbone.train_by_name(model, "embed,norm")
    backbone.trainable_to_fp32(model)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "embed" in name or "norm" in name for name in trained)
    assert {dtype for dtype in trained.values()} == {torch.float32}
    assert sum("norm" in name for name in trained) == 5 and sum("embed" in name for name in trained) == 1
    assert not any("lm_head" in name for name in trained)
    assert backbone.describe_trainable(model).startswith("LLM embeddings")


@pytest.mark.parametrize("path", ["./missing", "/missing/folder"])
def test_missing_model(path):
    with pytest.raises(UserError, match="no such model folder.*get_smollm2.py"):
        backbone.load_tokenizer(path)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="not a usable model folder") as error:
        backbone.load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_flash_attention_falls_back(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(backbone, "flash_attention_available", lambda: False)
    assert backbone.training_attention(use_flash=True, full=True) == backbone.RIGHT_PADDED
    assert backbone.training_attention(use_flash=True, full=False) == backbone.SHIFTED_SPARSE
    assert caplog.text.count("attention runs through SDPA: flash-attn needs a GPU") == 2
    monkeypatch.setattr(backbone, "flash_attention_available", lambda: True)
    assert backbone.training_attention(use_flash=True, full=True) == "flash_attention_2"


def test_dropout_acts_while_training_alone(tiny_llama):
    """At a share of almost all, layers add nothing but now and then, and embeddings are zeros, or scaled up."""
    model = backbone.load_llm(tiny_llama(), 64, "sdpa", torch.float32)
    ids = torch.arange(3, 23)[None]
    before = model.eval()(ids).logits
    backbone.add_dropout(model, 0.5)
    torch.testing.assert_close(model.eval()(ids).logits, before)
    model.train()
    rows = model.get_input_embeddings()(ids)
    plain = model.get_input_embeddings().weight[ids]
    kept = rows != 0
    torch.testing.assert_close(rows[kept], 2 * plain[kept])
    assert 0.35 < kept.float().mean() < 0.65
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert (first - second).abs().max() > 1e-3
    with pytest.raises(UserError, match="--dropout"):
        backbone.add_dropout(torch.nn.Linear(2, 2), 0.5)


def lora_step(path, dtype, *prepare):
    """Loss and gradients of LoRA and norms after a step with one of `prepare`'s changes to the model."""
    torch.manual_seed(0)
    model = backbone.load_llm(path, 256, backbone.SHIFTED_SPARSE, torch.float32)
    if backbone.round_norms in prepare:
        backbone.round_norms(model)
    model = backbone.add_lora(model, 4, 8, 0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    backbone.train_by_name(model, "embed,norm")
    for change in prepare:
        if change is not backbone.round_norms:
            change(model)
    ids = torch.arange(64)[None] + 5
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_rounding_once_is_as_good_as_at_each_map(tiny_llama):
    """What norms give is rounded once under autocast, and LoRA takes it as it is; without autocast nothing changes."""
    changes = backbone.round_norms, backbone.prepare_for_autocast
    loss, exact = lora_step(tiny_llama(), torch.float32)
    same_loss, same = lora_step(tiny_llama(), torch.float32, *changes)
    assert same_loss == loss and torch.equal(same, exact)
    (loss, each), (once_loss, once) = (lora_step(tiny_llama(), torch.bfloat16, *made) for made in ((), changes))
    assert once_loss == loss
    assert (once - exact).norm() <= 1.2 * (each - exact).norm()


def test_norms_behind_a_layer_are_left_alone():
    layer = torch.nn.Module()
    layer.self_attn, layer.mlp, layer.post_feedforward_layernorm = (torch.nn.Linear(4, 4) for _ in range(3))
    layer.post_attention_layernorm = torch.nn.Linear(4, 4)
    backbone.round_norms(layer)
    assert not layer.post_attention_layernorm._forward_hooks


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tiny_llama):
    """--torch_compile: attention, feed-forward and norms, compiled once for all layers, with the same names."""
    torch._dynamo.reset()
    plain = lora_step(tiny_llama(layers=3), torch.float32)
    loss, gradient = lora_step(tiny_llama(layers=3), torch.float32, backbone.compile_layers)
    assert loss == pytest.approx(plain[0], rel=1e-5)
    assert (gradient - plain[1]).norm() <= 1e-4 * plain[1].norm()
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 8


@pytest.fixture
def llama2(tmp_path):
    """A folder as Llama 2's originals: SentencePiece's tokenizer.model, and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_prompts(0, 60)), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=700, byte_fallback=True, split_digits=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, max_sentence_length=100_000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 700}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "legacy": False}))
    return tmp_path


def test_a_tokenizer_model_without_a_tokenizer_json(llama2, tmp_path):
    """Read as SentencePiece reads it; with the places' tokens, and saved, it stays so."""
    import sentencepiece
    reference = sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model"))
    texts = [*sample_prompts(1, 5), "Café 東京 \U0001f363, 40.7"]
    tokenizer = backbone.load_tokenizer(str(llama2))
    assert tokenizer.is_fast and tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer(texts).input_ids == [[reference.bos_id(), *reference.encode(text)] for text in texts]
    mapping = GPSMapping(np.arange(3), np.zeros(3), np.zeros(3))
    assert gps_tokens.add_gps_tokens(tokenizer, mapping).tolist() == [700, 701, 702]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = backbone.load_tokenizer(str(tmp_path / "saved"))
    assert again(texts).input_ids == tokenizer(texts).input_ids and again("<GPS 1>").input_ids[-1] == 701


def test_a_tokenizer_model_that_is_none(llama2):
    """As git leaves it where Git LFS is not installed."""
    (llama2 / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:9e\nsize 499\n")
    with pytest.raises(UserError) as error:
        backbone.load_tokenizer(str(llama2))
    assert "tokenizer.model is none of SentencePiece's; " in str(error.value) and "\n" not in str(error.value)
