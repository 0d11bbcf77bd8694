"""A Llama of Llama-2-7B's shape with random weights, drawn on the device, in NF4 as it is drawn; nothing on disk."""
import importlib.util

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ga_llm.llm import backbone
from geo_encoder.gps_tokens import GPSMapping

WORDS, PLACES = 32000, 4980     # Llama-2's tokens; NYC's places, each a <GPS n> behind them
STD = 0.02


def config(toy: bool, length: int) -> LlamaConfig:
    """Llama-2-7B's configuration, its context grown to `length` as training grows it."""
    sizes = (dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192) if toy else
             dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008))
    words, places = (300, 40) if toy else (WORDS, PLACES)
    found = LlamaConfig(vocab_size=words + places, max_position_embeddings=256 if toy else 4096, rms_norm_eps=1e-5,
                        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, **sizes)
    backbone.extend_context(found, length)
    return found


def places(toy: bool) -> tuple[GPSMapping, np.ndarray]:
    """Random places of a city, and the tokens that stand for them: the last ones."""
    words, count = (300, 40) if toy else (WORDS, PLACES)
    random = np.random.default_rng(0)
    mapping = GPSMapping(np.arange(count), random.uniform(40.5, 41, count), random.uniform(-74.3, -73.7, count))
    return mapping, words + np.arange(count)


def has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


@torch.no_grad()
def draw(shape: LlamaConfig, device: str, attention: str, four_bit: bool) -> LlamaForCausalLM:
    """The model, in bf16; with `four_bit` the layers' linear maps in NF4, double quantization, bf16 compute."""
    shape._attn_implementation = attention
    with torch.device("meta"):
        model = LlamaForCausalLM(shape).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(shape).to(device)
    for name, module in list(model.named_modules()):
        if four_bit and isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _quantized(module, device))
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value.fill_(1) if parameter.dim() == 1 else value.normal_(std=STD)
            setattr(module, own, nn.Parameter(value, requires_grad=False))
    model.config.use_cache = False
    # What transformers sets when it loads in 4 bits, and PEFT goes by.
    model.is_loaded_in_4bit = model.is_quantized = four_bit
    return model


def _quantized(linear: nn.Linear, device: str):
    import bitsandbytes as bnb
    with torch.device("meta"):
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                                 compute_dtype=torch.bfloat16, compress_statistics=True)
    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=STD)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True,
                                    module=made).to(device)
    if getattr(made, "support_avx512bf16_for_cpu", False):
        made.support_avx512bf16_for_cpu = False     # as backbone.load_llm does
    return made
