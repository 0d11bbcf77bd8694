"""The LLM: tokenizer, weights (4-bit where possible), longer context, attention, LoRA."""
import importlib.util
import logging
import math
import os
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from ga_llm.base.cli import UserError, show_progress
from ga_llm.base.reading import check_finite, reason, weights_files
from ga_llm.llm.plan import Model
from ga_llm.llm.right_padding import RIGHT_PADDED
from ga_llm.llm.shared_prefix import SHARED_PREFIX
from ga_llm.llm.shifted_attention import SHIFTED_SPARSE
from geo_encoder.encoder import Dropout

log = logging.getLogger(__name__)

if not show_progress():
    transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")      # PEFT calls it by its old name

# What may be trained beside the LLM: by the names of the modules, what they are called.
PARTS = {"gps_injection": "GPS encoder", "poi_injection": "projector", "moment_injection": "times",
         "place_rows": "rows of places", "pointer": "pointer"}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}   # package -> module

MODEL_WAY_OUT = "give any Hugging Face folder, or make one with `python tools/get_smollm2.py`"


def _from_hub(load, path: str, **options):
    """Call a `from_pretrained`, which executes no code of the model's; a missing or broken folder is one line."""
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"{path}: no such model folder; {MODEL_WAY_OUT}")
    try:
        return load(path, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:      # of what a broken file makes the libraries raise, there is no list
        raise UserError(f"{path}: not a usable model folder ({reason(error)}); {MODEL_WAY_OUT}") from None


def _check_folder(path: str, config) -> None:
    """Raises UserError where a model's local folder is not what transformers would take it for."""
    if (Path(path) / "adapter_config.json").exists():       # transformers would load that, and what it names
        raise UserError(f"{path}: holds an adapter (adapter_config.json), not a model alone; {MODEL_WAY_OUT}")
    files, shape = weights_files(path), Model.of(config)
    if min(shape.heads, shape.layers + 1, shape.hidden, config.max_position_embeddings) < 1:
        raise UserError(f"{path}: config.json gives a size below 1; {MODEL_WAY_OUT}")
    size = sum(file.stat().st_size for file in files)
    if files and shape.parameters > 8 * size:       # no weight takes less than one bit
        raise UserError(f"{path}: config.json describes {shape.parameters:.2g} weights, which do not fit into the "
                        f"{size:.2g} bytes of its files; {MODEL_WAY_OUT}")


def load_tokenizer(path: str, cache_dir: str | None = None):
    """The base model's tokenizer; padding is EOS where the tokenizer has none.

    Departure from the released code: no [PAD] row is added to the vocabulary, since padding is masked by position.
    """
    missing = [package for package, module in SENTENCEPIECE.items() if not _installed(module)]
    if missing and (Path(path) / "tokenizer.model").is_file() and not (Path(path) / "tokenizer.json").exists():
        raise _no_pieces(path, missing)
    try:
        tokenizer = _from_hub(AutoTokenizer.from_pretrained, path, cache_dir=cache_dir)
    except UserError as error:
        if "tiktoken" in str(error):    # what transformers asks for where it could not read a tokenizer.model
            raise _no_pieces(path, missing) from None
        raise
    if not tokenizer.is_fast:
        raise UserError(f"{path}: no fast tokenizer (tokenizer.json); save it with "
                        "AutoTokenizer.from_pretrained(…, use_fast=True), or give another model")
    if tokenizer.eos_token is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Prompts longer than this are cut by our own code, which keeps the answer.
    tokenizer.model_max_length = int(1e9)
    return tokenizer


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:     # nor is what it is a part of
        return False


def _no_pieces(path: str, missing: list[str]) -> UserError:
    """What to do about a tokenizer.model that cannot be read."""
    return UserError(f"{path}: has no tokenizer.json, and its tokenizer.model " + (
        f"needs {' and '.join(missing)}, not installed; pip install {' '.join(missing)}" if missing else
        f"is none of SentencePiece's; {MODEL_WAY_OUT}"))


def rope_factor(length: int, native_context: int) -> int:
    """By how much positions must be scaled for `length` tokens; 1: not at all."""
    return max(1, math.ceil(length / native_context))


def extend_context(config, length: int) -> None:
    """Linear RoPE scaling by ceil(length / the model's own context), where the context must grow.

    Raises UserError where it must and positions are scaled otherwise already (llama3, yarn, longrope, dynamic).
    """
    limit = config.max_position_embeddings
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = "another way in each kind of layer" if any(isinstance(part, dict) for part in rope.values()) else (
        rope.get("rope_type", "default"))
    if kind == "linear":
        limit = int(limit * rope["factor"])
    if kind == "yarn":      # Qwen's way to write it leaves max_position_embeddings at what it was before
        limit = max(limit, int(rope["factor"] * (rope.get("original_max_position_embeddings") or limit)))
    if length <= limit:
        return
    if not rope or kind not in ("default", "linear"):
        raise UserError(f"{config.name_or_path or 'the model'}: its context is {limit} tokens, and its positions "
                        f"({kind}) cannot be scaled linearly; give at most {limit} for --model_max_length or "
                        "--context_size")
    factor = rope_factor(length, config.max_position_embeddings)
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": float(factor)}
    log.info("RoPE scaled by %d: context %d -> %d", factor, config.max_position_embeddings, length)


def flash_attention_available() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def training_attention(use_flash: bool, full: bool, shared_prefix: bool = False) -> str:
    """S²-Attn by default, full attention if asked for, of trees or not; flash-attn where it is installed."""
    if shared_prefix:       # through SDPA, which has a flash kernel of its own
        return SHARED_PREFIX
    if use_flash and not flash_attention_available():
        log.info("attention runs through SDPA: %s", "flash-attn is not installed; pip install flash-attn "
                 "--no-build-isolation" if torch.cuda.is_available() else "flash-attn needs a GPU")
    if not full:
        return SHIFTED_SPARSE
    return "flash_attention_2" if use_flash and flash_attention_available() else RIGHT_PADDED


def quantization(wanted: bool) -> BitsAndBytesConfig | None:
    """NF4 with double quantization and bf16 compute, where bitsandbytes is installed."""
    if not wanted:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        log.info("bitsandbytes is not installed: the base model is not quantized to 4 bits; pip install bitsandbytes")
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def default_dtype() -> str:
    """Of a model that is asked and not trained."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def load_llm(path: str, length: int, attention: str, dtype: torch.dtype, four_bit: bool = False,
             cache_dir: str | None = None):
    """Load a causal LM for contexts of `length` tokens, on this process's GPU if there is one."""
    config = _from_hub(AutoConfig.from_pretrained, path, cache_dir=cache_dir)
    _check_folder(path, config)
    extend_context(config, length)
    window = getattr(config, "sliding_window", None)
    if window and window < length:
        log.info("attention: a token sees no more than the %d last ones, as %s was made", window, path)
    device_map = None
    if torch.cuda.is_available() and not is_deepspeed_zero3_enabled():
        device_map = {"": int(os.environ.get("LOCAL_RANK", 0))}
    model, found = _from_hub(AutoModelForCausalLM.from_pretrained, path, config=config, dtype=dtype,
                             device_map=device_map, attn_implementation=attention, cache_dir=cache_dir,
                             quantization_config=quantization(four_bit), output_loading_info=True)
    if found["missing_keys"]:       # transformers would draw them at random
        raise UserError(f"{path}: {min(found['missing_keys'])} is missing from its weights; {MODEL_WAY_OUT}")
    check_finite(dict(model.named_parameters()), path)
    model.config.use_cache = False
    for module in model.modules():
        # On such a CPU bitsandbytes repacks the weights at the first forward without gradient, after which training
        # gives LoRA no gradient, without an error.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(model, r: int, alpha: int, dropout: float):
    """LoRA on the attention's projections; all else is frozen, but for LoRA that an attached encoder already has."""
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, bias="none",
                        task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA finds no {', '.join(LORA_TARGETS)} in {type(model).__name__} ({error})") from None


def add_dropout(model, share: float) -> None:
    """Drop a `share` of the embeddings, and of what every layer's attention and feed-forward add, while training.

    None inside the attention, where a CPU would leave its fast path. Attach encoders before, so that their vectors are
    dropped, too. Raises UserError where the model's layers have other names than Llama's.
    """
    dropout = Dropout(share)
    inside = [module for name, module in model.named_modules() if name.endswith((".self_attn", ".mlp"))]
    if not inside and getattr(getattr(model, "config", None), "num_hidden_layers", 1):      # a model may have none
        raise UserError(f"--dropout: {type(model).__name__} has no layers of self_attn and mlp; leave it out")

    def drop(module, _, output):
        if not module.training:
            return output
        return (dropout(output[0]), *output[1:]) if isinstance(output, tuple) else dropout(output)

    for module in (model.get_input_embeddings(), *inside):
        module.register_forward_hook(drop)


def prepare_for_autocast(model) -> None:
    """Let LoRA take what comes in as it is: PEFT would cast it to LoRA's fp32 each time, and autocast back to bf16."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def round_norms(model) -> None:
    """Under autocast, let the norms in front of attention and feed-forward give bf16, which the maps behind them read.

    The residual stream is fp32 where embeddings are trained, and each map would round it anew.
    """
    def round_output(module, _, output):
        kind = output.device.type
        return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output

    for layer in (module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")):
        if hasattr(layer, "post_feedforward_layernorm"):    # norms behind, whose output is added to the stream
            continue
        for name in ("input_layernorm", "post_attention_layernorm"):
            if hasattr(layer, name):
                getattr(layer, name).register_forward_hook(round_output)


def compile_layers(model, **options) -> None:
    """Compile each layer's attention, feed-forward and norms in place (--torch_compile); parameters keep their names.

    Not the layer as a whole, which is checkpointed, nor S²-Attn and trees, whose groups and blocks follow from the
    lengths. options: of torch.compile.
    """
    for name, module in model.named_modules():
        if name.endswith((".self_attn", ".mlp", "_layernorm")):
            module.compile(**options)


def train_by_name(model, parts: str) -> None:
    """Make all parameters trainable whose name contains one of the comma-separated `parts` ("embed,norm").

    Raises UserError for a part that no name contains.
    """
    wanted = [part for part in parts.split(",") if part]
    names = [name for name, _ in model.named_parameters() if "lora_" not in name]
    for part in wanted:
        if not any(part in name for name in names):
            raise UserError(f"--trainable_params {part}: no parameter has that in its name; give parts of names such "
                            f"as {names[0]}, or '' for LoRA alone")
    for name, parameter in model.named_parameters():
        if any(part in name for part in wanted) and "lora_" not in name:
            parameter.requires_grad_(True)


def trainable_to_fp32(model) -> None:
    """Steps of 2e-5 round to nothing in bf16 weights, so what is trained is kept in fp32; autocast does the rest."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def describe_trainable(model) -> str:
    """One line: how many parameters are trained, by group."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for module, part in PARTS.items() if f"{module}." in name), "LLM")
            kinds = {"lora_": "LoRA", "embed": "embeddings", "norm": "norms", "": "rest"}
            kind = next(kind for key, kind in kinds.items() if key in name)
            count = getattr(parameter, "ds_numel", parameter.numel())
            kind = kind if part == "LLM" or kind == "LoRA" else "weights"
            groups[f"{part} {kind}"] = groups.get(f"{part} {kind}", 0) + count
    return ", ".join(f"{group} {count:,}" for group, count in groups.items()) or "nothing"
