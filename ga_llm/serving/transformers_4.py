"""What transformers 4.5x, and servers built on it, look for in an exported folder beside what transformers 5 writes.

Without it they read `rope_parameters` over (positions unscaled, theta 10,000), know no tokenizer class
"TokenizersBackend", and stop at a list of `extra_special_tokens`. Transformers 5 reads these keys, too, and alike.
"""
import json
from pathlib import Path

CLASS = "PreTrainedTokenizerFast"       # in both: what tokenizer.json says, and nothing else
INPUTS = ["input_ids", "attention_mask"]        # 4.5x would add token types, which an LLM does not take


def readable(folder: Path) -> None:
    """Add those keys to config.json and tokenizer_config.json of an exported `folder`."""
    _edit(folder / "config.json", lambda config: config | positions(config) | {"torch_dtype": config["dtype"]})
    _edit(folder / "tokenizer_config.json", tokenizer)


def positions(config: dict) -> dict:
    """`rope_parameters` in the older keys; none where kinds of layers differ in them, or the model has no RoPE."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return {}
    found = {"rope_theta": rope.pop("rope_theta")}
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    return found | {"rope_scaling": None if rope.get("rope_type", "default") == "default" else rope}


def tokenizer(config: dict) -> dict:
    """The tokenizer's settings in keys that both read."""
    config = config | {"tokenizer_class": CLASS, "model_input_names": INPUTS}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _edit(file: Path, change) -> None:
    found = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
