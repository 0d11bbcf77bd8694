"""An exported model as one GGUF file, which llama.cpp and what is built on it serve (`export.py --gguf`).

What llama.cpp expects of Llama, Mistral, Qwen 2 and Qwen 3: the names of the package `gguf`, the rows of q and k in the
order of llama.cpp's RoPE (pairs side by side; Qwen's are left as they are), the frequencies' factors of Llama 3 as a
tensor, and the tokenizer as arrays of tokens with their kinds. It cuts text in ways of its own, which are known by
name; a tokenizer that cuts otherwise is refused.
"""
import json
import logging
from pathlib import Path

import numpy as np
import torch

from ga_llm.base.cli import UserError, needed
from geo_encoder.gps_tokens import GPS_TOKEN, POI_TOKEN

TYPES = ("f16", "q8_0")
# model_type -> what llama.cpp calls it
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SHARED = ("('s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|", "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
          "\\s+(?!\\S)|\\s+")
PRE = {digits.join(SHARED).replace("('s", "(?i:'s", 1): name for digits, name in (
    ("\\p{N}{1,3}", "llama-bpe"), ("\\p{N}", "qwen2"))}
WAY_OUT = "leave --gguf out, and serve the folder"


def name(kind: str) -> str:
    """Of the file, in an exported folder."""
    return f"model-{kind}.gguf"


def write(model, tokenizer, context: int, path: Path, kind: str) -> None:
    """Write `model` (a `plain` one) to `path`; kind: one of `TYPES`, of all weights but the norms and biases.

    Raises UserError for an architecture, positions or a tokenizer that llama.cpp has nothing alike for.
    """
    needed("gguf", "--gguf")
    import gguf         # which most exports do without
    logging.getLogger("gguf").setLevel(logging.WARNING)     # else it tells which file it writes
    architecture = check(model.config, tokenizer, context)
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    _describe(writer, model.config, context, gguf)
    _add_tokens(writer, tokenizer, model.config.vocab_size, gguf)
    wanted = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    writer.add_file_type({"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    factors = _factors(model.config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in model.state_dict().items():
        values = tensor.float().cpu().numpy()
        if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            values = pairs_together(values, model.config.num_attention_heads if ".q_proj." in name
                                    else model.config.num_key_value_heads)
        type_ = wanted[kind] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        if values.shape[-1] % 32 and type_ == gguf.GGMLQuantizationType.Q8_0:       # which are in blocks of 32
            type_ = gguf.GGMLQuantizationType.F16
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quants.quantize(values, type_),
                          raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(config, tokenizer, context: int) -> str:
    """llama.cpp's name of the architecture. Raises UserError for what it has nothing alike for."""
    window = getattr(config, "sliding_window", None)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "none that all layers share")
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"--gguf: only of {', '.join(ARCHITECTURES)}, not of {config.model_type}; {WAY_OUT}")
    if window and window < context:
        raise UserError(f"--gguf: llama.cpp has no sliding window ({window}) for {config.model_type}; {WAY_OUT}")
    if rope not in ("default", "linear", "llama3"):
        raise UserError(f"--gguf: only with default, linear or llama3 positions, not {rope}; {WAY_OUT}")
    how_text_is_cut(tokenizer)
    return ARCHITECTURES[config.model_type]


def how_text_is_cut(tokenizer) -> dict:
    """{"model": "llama" or "gpt2", "pre": name, "add_space_prefix": bool}, as llama.cpp calls it.

    Raises UserError for a tokenizer that cuts otherwise.
    """
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, before = found["normalizer"], found["pre_tokenizer"]
    parts = [before] if before and before["type"] != "Sequence" else (before or {}).get("pretokenizers", [])
    kinds = [part["type"] for part in parts]
    bytes_ = parts and kinds[-1] == "ByteLevel" and not parts[-1]["add_prefix_space"]
    if bytes_ and normalizer in (None, {"type": "NFC"}):
        if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
            return {"model": "gpt2", "pre": "gpt-2"}
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return {"model": "gpt2", "pre": "smollm"}
        if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
            pre = PRE.get(parts[0]["pattern"].get("Regex"))
            if pre and parts[0]["behavior"] == "Isolated":
                return {"model": "gpt2", "pre": pre}
    if found["model"]["type"] == "BPE" and found["model"].get("byte_fallback"):
        if kinds == ["Metaspace"] and parts[0]["prepend_scheme"] == "first" and normalizer is None:
            return {"model": "llama", "pre": "default", "add_space_prefix": False}
        steps = (normalizer or {}).get("normalizers", [])
        if not parts and [step["type"] for step in steps] == ["Prepend", "Replace"]:
            return {"model": "llama", "pre": "default", "add_space_prefix": True}
    raise UserError(f"--gguf: llama.cpp has no tokenizer that cuts text as this one; {WAY_OUT}")


def needs_space(tokenizer) -> bool:
    """Whether llama.cpp must be given a space in front of the prompt, which the tokenizer itself would put there."""
    return how_text_is_cut(tokenizer).get("add_space_prefix") is False


def pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, (heads * width, …), in another order: llama.cpp's RoPE turns rows 2i and 2i + 1 of a head.

    Transformers' turns i and i + width / 2.
    """
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _describe(writer, config, context: int, gguf) -> None:
    rope = config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _factors(config) -> np.ndarray | None:
    """By what Llama 3 divides each frequency, (width / 2,); None of other positions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(len(scaled)) / len(scaled))
    return (plain / scaled).float().numpy()


def _add_tokens(writer, tokenizer, rows: int, gguf) -> None:
    """Tokens, their kinds, and how they are joined; rows without a token get one that no text has."""
    found, how = json.loads(tokenizer.backend_tokenizer.to_str()), how_text_is_cut(tokenizer)
    kinds = gguf.TokenType
    tokens, types = [f"[unused {row}]" for row in range(rows)], [kinds.UNUSED] * rows
    for token, row in found["model"]["vocab"].items():
        tokens[row], types[row] = token, kinds.NORMAL
        if how["model"] == "llama" and len(token) == 6 and token.startswith("<0x"):
            types[row] = kinds.BYTE
    for added in found["added_tokens"]:
        token, row = added["content"], added["id"]
        place = GPS_TOKEN.fullmatch(token) or POI_TOKEN.fullmatch(token)
        # Those of places are read, and written in answers, whatever a server thinks of special tokens.
        tokens[row], types[row] = token, kinds.CONTROL if added["special"] and not place else kinds.USER_DEFINED
    if tokenizer.unk_token_id is not None and how["model"] == "llama":
        types[tokenizer.unk_token_id] = kinds.UNKNOWN
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    writer.add_tokenizer_model(how["model"])
    writer.add_tokenizer_pre(how["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if how["model"] == "llama":     # joins what has the highest score: what is merged first
        rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(token, -float(len(merges))) for token in tokens])
        writer.add_add_space_prefix(how["add_space_prefix"])
    else:
        writer.add_token_merges(merges)
    for token_id, add in ((tokenizer.bos_token_id, writer.add_bos_token_id),
                          (tokenizer.eos_token_id, writer.add_eos_token_id),
                          (tokenizer.pad_token_id, writer.add_pad_token_id),
                          (tokenizer.unk_token_id, writer.add_unk_token_id)):
        if token_id is not None:
            add(token_id)
    begin = tokenizer("0")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and begin == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
