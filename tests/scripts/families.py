"""Llama 2 and 3, Qwen 2.5 and 3, Mistral and SmolLM2: tiny random models and tokenizers that behave like each family's.

What differs between them: digits one by one or up to three in a token, BOS or none, tied embeddings, rows without a
token, scaled positions, a sliding window, biases, norms of queries and keys, heads wider than hidden size / heads.
"""
import dataclasses
import functools
import json

import torch
from make_tiny_llama import byte_level_tokenizer, sample_prompts, sentencepiece_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2Tokenizer, Qwen3Config)

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64, "rope_theta": 5e5}


# Tokenizers.

@functools.cache
def trained():
    """Vocabulary and merges of a byte-level BPE in which no token joins digits."""
    model = json.loads(byte_level_tokenizer(sample_prompts(0, 60), 700).backend_tokenizer.to_str())["model"]
    return {token: i for i, token in enumerate(model["vocab"])}, [tuple(pair) for pair in model["merges"]]


def llama_2():
    return sentencepiece_tokenizer(sample_prompts(0, 60), 700)


def llama_3():
    """Up to three digits are one token, from the left, and all such tokens are in the vocabulary."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    vocab, merges = trained()
    for number in (f"{i:0{width}}" for width in (1, 2, 3) for i in range(10 ** width)):
        vocab = {**vocab, number: vocab.get(number, len(vocab))} if len(number) == 1 else vocab
        vocab.setdefault(number, len(vocab))
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer.add_special_tokens([begin, end])
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


def qwen():
    vocab, merges = trained()
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def smollm2():
    """EOS is also BOS, which it does not put in front."""
    vocab, merges = trained()
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


# Families.

@dataclasses.dataclass
class Family:
    tokenizer: callable
    config: callable
    options: dict
    rows: int = 0           # of the embeddings, beyond the tokenizer's
    digits: int = 1         # at most so many in a token
    bos: bool = False


FAMILIES = {
    "llama-2": Family(llama_2, LlamaConfig, {}, bos=True),
    "llama-3": Family(llama_3, LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, digits=3,
                      bos=True),
    "llama-3.2": Family(llama_3, LlamaConfig, {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}, digits=3,
                        bos=True),
    "qwen2.5": Family(qwen, Qwen2Config, {"tie_word_embeddings": True}, rows=5),       # fewer than there are places
    "qwen3": Family(qwen, Qwen3Config, {"tie_word_embeddings": True, "head_dim": 32}, rows=40),
    "mistral-0.1": Family(llama_2, MistralConfig, {"sliding_window": 24}, bos=True),
    "mistral-0.3": Family(llama_2, MistralConfig, {"sliding_window": None}, bos=True),
    "smollm2": Family(smollm2, LlamaConfig, {"tie_word_embeddings": True, "num_attention_heads": 3,
                                             "num_key_value_heads": 1, "hidden_size": 96}),
}


def write(family, path):
    tokenizer = family.tokenizer()
    config = family.config(**{
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": len(tokenizer) + family.rows,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None, **family.options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():       # far from uniform attention, or a wrong mask would not show; biases and norms, too
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            else:
                parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
