"""LoRA on the encoder, and the encoder's files: `geo_encoder_merged.pth` with its configuration beside it."""
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ga_llm.base.artifacts import GCIM, EncoderFiles, require
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json, read_tensors
from ga_llm.base.sharding import unsharded
from ga_llm.base.writing import atomic_write
from geo_encoder.encoder import LEVEL, LORA_TARGETS, GeoEncoderConfig, build_encoder

# What parameters of the released code's files are called here: of Fourier encoders, and of fusions, which have the
# first's behind `fourier_encoder.`, and a hierarchical encoder's beside them.
FOURIER_NAMES = {"pos_encoder.Wr.": "frequencies.", "pos_encoder.mlp.0.": "linear1.", "pos_encoder.mlp.2.": "linear2."}
FUSION_NAMES = {"gps_embed_model.": "hierarchical.gps_embed_model.", "gps_encoder.": "hierarchical.gps_encoder.",
                "final_linear.": "projection.",
                **{f"fourier_encoder.{theirs}": f"fourier.{ours}" for theirs, ours in FOURIER_NAMES.items()}}


def add_lora(encoder: nn.Module, r: int, alpha: int, targets: str = LORA_TARGETS) -> nn.Module:
    """Put LoRA on the encoder's embedding, attention output and feed-forward layers, dropout 0.1 (paper, stage 1).

    targets: a regular expression of the layers' names. Raises UserError where the encoder has none of these.
    """
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.1, target_modules=targets, bias="none")
    try:
        inject_adapter_in_model(config, encoder)
    except ValueError as error:
        raise UserError(f"LoRA finds no layer in {type(encoder).__name__} that LORA_TARGETS in geo_encoder/encoder.py "
                        f"names ({error}); add its layers there, or give --encoder_training full") from None
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return encoder


@torch.no_grad()
def merged_state_dict(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder's weights with its LoRA merged in, fp32 on the CPU, named as without LoRA; nothing is changed."""
    with unsharded(encoder):
        merged = {name.replace("base_layer.", ""): tensor.float().cpu().clone()
                  for name, tensor in encoder.state_dict().items() if "lora_" not in name}
        for name, module in encoder.named_modules():
            if isinstance(module, LoraLayer):
                merged[f"{name}.weight".removeprefix(".")] += module.get_delta_weight("default").float().cpu()
    return merged


def save_encoder(state_dict: dict[str, torch.Tensor], config, path: Path | str, files: EncoderFiles = GCIM) -> None:
    """Write the weights to `path` and the configuration, a dataclass, beside them."""
    path = Path(path)
    with atomic_write(path.with_name(files.config)) as file:
        json.dump(dataclasses.asdict(config), file, indent=2)
    with atomic_write(path, "wb") as file:
        torch.save(state_dict, file)


def digest(state_dict: dict[str, torch.Tensor]) -> str:
    """What tells an encoder's weights from others, whatever their file is called."""
    found = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        found.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def load_encoder(path: Path | str, hidden_size: int | None = None) -> tuple[nn.Module, GeoEncoderConfig]:
    """Load an encoder, ours or the released code's, for an LLM of width `hidden_size` (None: any); strictly.

    Raises UserError if the file is missing, damaged, or of another width.
    """
    path = require(path, GCIM.made_by)
    return encoder_of(read_tensors(path), path, hidden_size)


def encoder_of(state_dict: dict[str, torch.Tensor], path: Path, hidden_size: int | None = None
               ) -> tuple[nn.Module, GeoEncoderConfig]:
    """The encoder of these weights, which the file `path` holds, as `load_encoder` gives it."""
    state_dict = in_our_names(state_dict)
    config = read_config(path, state_dict)
    if hidden_size is not None and config.hidden_size != hidden_size:
        raise UserError(f"{path}: made for an LLM of width {config.hidden_size}, this one has {hidden_size}; give the "
                        "encoder that stage 1 trained with the same --model_name_or_path")
    with torch.device("meta"):      # which could be large
        expected = build_encoder(config).state_dict()
    mismatch = first_mismatch(expected, state_dict)
    if mismatch:
        raise UserError(f"{path}: weights do not match a {config.kind} encoder of n-gram {config.ngram} and level "
                        f"{config.level} ({mismatch}); give a geo_encoder_merged.pth, with the {GCIM.config} that "
                        "was written beside it")
    encoder = build_encoder(config)
    encoder.load_state_dict(state_dict)
    return encoder, config


def in_our_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a file, of the released code's too, under the names that they have here."""
    names = FUSION_NAMES if "final_linear.weight" in state_dict else FOURIER_NAMES

    def ours(name):
        return next((names[start] + name.removeprefix(start) for start in names if str(name).startswith(start)), name)

    return {ours(name): tensor for name, tensor in state_dict.items()}


def read_config(path: Path, state_dict: dict[str, torch.Tensor]) -> GeoEncoderConfig:
    """From the JSON beside the weights, else (the released code's files) from the weights' shapes."""
    beside = path.with_name(GCIM.config)
    if beside.exists():
        try:
            return GeoEncoderConfig(**read_json(beside))
        except (ValueError, TypeError) as error:
            raise UserError(f"{beside}: {error}; delete it if the encoder is the released code's") from None

    def shape(name):
        return tuple(state_dict[name].shape)

    try:
        if "projection.weight" in state_dict:
            ngrams, width = shape("hierarchical.gps_embed_model.gps_embedding.weight")
            return GeoEncoderConfig(shape("projection.weight")[0], "fusion", _base4(ngrams),
                                    shape("fourier.frequencies.weight")[1], width, shape("fourier.linear2.weight")[0])
        if "frequencies.weight" in state_dict:
            return GeoEncoderConfig(shape("linear2.weight")[0], "fourier", level=shape("frequencies.weight")[1])
        if "gps_embedding.weight" in state_dict:
            return GeoEncoderConfig(shape("gps_embedding.weight")[1], "cells")
        ngrams, width = shape("gps_embed_model.gps_embedding.weight")
        return GeoEncoderConfig(width, "hierarchical", _base4(ngrams), LEVEL)
    except (KeyError, ValueError, IndexError):      # names that are missing, shapes that are of no encoder
        raise UserError(f"{path}: holds no geo-encoder (first key: {next(iter(state_dict), 'none')!r}); give a "
                        "geo_encoder_merged.pth") from None


def _base4(rows: int) -> int:
    return round(math.log(rows, 4))


def first_mismatch(expected: dict[str, torch.Tensor], state_dict: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with the weights of a file, by the names and shapes that are expected."""
    expected = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name in expected | state_dict:
        if name not in state_dict:
            return f"no {name}"
        if name not in expected:
            return f"no place for {name}"
        if tuple(state_dict[name].shape) != expected[name]:
            return f"{name} is {tuple(state_dict[name].shape)}, not {expected[name]}"
        if not state_dict[name].is_floating_point():
            return f"{name} holds {state_dict[name].dtype}"
    return None
