"""A checkpoint as the released code's stage 2 leaves it: its encoder is a part of the embeddings and the adapter."""
import argparse

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ga_llm.base.cli import UserError
from ga_llm.evaluation import trained
from ga_llm.llm import backbone
from ga_llm.training import checkpoints
from geo_encoder import encoder, gps_tokens, injection

TEXT = "<question>: user 1 POI id 5 <GPS 5>, POI id 3 <GPS 3>. Where next? <answer>: user 1 will visit POI id 5."


@pytest.fixture
def released(tiny_llama, mapping_csv, tmp_path):
    """(folder, logits of the model that was saved there), saved by PEFT itself; what is trained has moved."""
    torch.manual_seed(0)
    mapping, tokenizer = gps_tokens.read_gps_mapping(mapping_csv), backbone.load_tokenizer(tiny_llama())
    model = backbone.load_llm(tiny_llama(), 256, "sdpa", torch.float32)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    geo = encoder.build_encoder(encoder.GeoEncoderConfig(model.config.hidden_size))
    model.get_input_embeddings().geo_encoder = geo
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM",
                                            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    injected = injection.gps_injection(geo, 25, mapping, token_ids)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: injected(inputs[0], output))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path / "checkpoint-9"
    peft.save_pretrained(folder, save_embedding_layers=True)
    with torch.no_grad():
        return folder, peft.eval()(**tokenizer(TEXT, return_tensors="pt")).logits


@pytest.fixture
def load(released, tiny_llama, mapping_csv):
    """load(**flags): (model, logits) as test_next_gps.py has them."""
    def load(**flags):
        args = argparse.Namespace(**{
            "output_dir": str(released[0]), "base_model": tiny_llama(), "cache_dir": None, "context_size": 256,
            "gps_mapping_path": mapping_csv, "geoencoder_path": None, "projector_path": None,
            "poi_embedding_path": None, "load_in_4bit": False,
            "dtype": "float32", **flags})
        model, tokenizer = trained.load(args, checkpoints.read_agreement(args.output_dir),
                                        gps_tokens.read_gps_mapping(mapping_csv), "sdpa")
        with torch.no_grad():
            return model, model(**tokenizer(TEXT, return_tensors="pt")).logits
    return load


def test_it_is_evaluated_as_it_was_saved(released, load, caplog):
    names = list(load_file(released[0] / checkpoints.ADAPTER))
    assert sum(checkpoints.RELEASED_ENCODER in name for name in names) == 27
    assert any(name.endswith("embed_tokens.weight") for name in names)
    assert not any("model.norm" in name for name in names)
    with caplog.at_level("INFO"):
        torch.testing.assert_close(load()[1], released[1], rtol=1e-4, atol=1e-5)
    assert "norms are the base model's" in caplog.text and "takes the place of any other" in caplog.text


@pytest.mark.parametrize("name", [checkpoints.RELEASED_PARAMS, checkpoints.CONVERTED])
def test_its_trained_norms_count_where_they_are_there(released, load, name):
    """trainable_params.bin, which its README never makes, and what zero_to_fp32.py makes, hold all that is trained."""
    adapter = load_file(released[0] / checkpoints.ADAPTER)
    state = {key: tensor for key, tensor in adapter.items() if "lm_head" not in key}
    state["base_model.model.model.norm.weight"] = torch.full((32,), 2.0)
    torch.save(state, released[0] / name)
    model, found = load()
    assert (dict(model.named_parameters())["base_model.model.model.norm.weight"] == 2).all()
    torch.testing.assert_close(found, 2 * released[1], rtol=1e-3, atol=1e-4)       # the last norm's weight was 1
    torch.testing.assert_close(load(base_norms=True)[1], released[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, names", [
    (lambda state, key: state.pop(key), ["do not match", "no gps_encoder.norm.bias"]),
    (lambda state, key: state.update({key: torch.zeros(33)}), ["do not match", "(33,)"]),
    (lambda state, key: state.update({key + "s": torch.zeros(3)}), ["do not match", "no place for"])],
    ids=["one is missing", "another size", "one too many"])
def test_its_encoder_is_read_as_strictly_as_a_file(released, load, change, names):
    path = released[0] / checkpoints.ADAPTER
    state = load_file(path)
    change(state, next(name for name in state if name.endswith("geo_encoder.gps_encoder.norm.bias")))
    save_file(state, path)
    with pytest.raises(UserError) as error:
        load()
    assert all(name in str(error.value) for name in [str(path), *names])
