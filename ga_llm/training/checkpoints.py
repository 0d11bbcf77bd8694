"""What training leaves behind, and how it is read back: adapter, trainable parameters, merged encoder.

    O/checkpoint-N/adapter_model.safetensors        LoRA (PEFT)
    O/checkpoint-N/trainable_params.safetensors     what is trained beside LoRA: embeddings, norms
    O/checkpoint-N/ga_llm.json                      what evaluation must agree with, and the paths it finds all else by
    O/checkpoint-N/model.safetensors, config.json   instead of the first two, with --low_rank_training False; encoders
                                                    that are trained with the model stand in the second all the same
    O/N/geo_encoder_merged.pth                      stage 1: the encoder, LoRA merged in (PAM: poi_projector.pth);
                                                    stage 2, too, with --train_encoders True
    O/geo_encoder_final_merged.pth                  that of the last step (PAM: poi_projector_final.pth)

Beside these stands what a run needs to go on: optimizer, schedule, random states, DeepSpeed's or FSDP's files.
"""
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ga_llm.base.artifacts import TRAINABLE_PARAMS
from ga_llm.base.cli import LEAST_TOKENS, MOST_TOKENS, UserError
from ga_llm.base.reading import WAY_OUT, fingerprint, listed, read_json, read_shapes, read_tensors, reason
from ga_llm.llm import beside, four_bits
from ga_llm.llm.backbone import rope_factor
from geo_encoder.injection import INJECTIONS

log = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FULL_MODEL = ("model.safetensors", "model.safetensors.index.json")
CONVERTED = "pytorch_model.bin"     # the README's name for zero_to_fp32.py's output: a file, or a folder of files
AGREEMENT = "ga_llm.json"
# A training's flags that its checkpoint remembers, as they were given; nobody has to agree with them.
PATHS = ("model_name_or_path", "data_path", "gps_mapping_path", "geoencoder_path", "projector_path",
         "poi_embedding_path")
PEFT_PREFIX = "base_model.model."
LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules")
# The released code's: its stage 2 trains the geo-encoder, too, as a part of the embeddings, and its adapter holds it.
RELEASED_ENCODER, RELEASED_PARAMS = "embed_tokens.geo_encoder.", "trainable_params.bin"
NOTES = ("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


def holds_full_model(folder: Path | str) -> bool:
    """Whether stage 2 ran with --low_rank_training False: the checkpoint is then a model folder of its own."""
    return any((Path(folder) / name).exists() for name in FULL_MODEL)


def require_checkpoint(folder: Path) -> None:
    """Raises UserError unless `folder` holds what stage 2 writes."""
    for name in () if holds_full_model(folder) else (ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no {name}; --output_dir takes the checkpoint-N folder that "
                            "finetune_LLM_with_GCIM.py wrote")


def load_adapter(llm, folder: Path | str, agreement: dict, norms: bool = True):
    """Put on `llm` what stage 2 learned: the adapter and the trainable parameters of `folder` (checkpoint-N).

    agreement: as `read_agreement` finds it there. norms: False leaves the base model's, as the released test does.
    If zero_to_fp32.py has been run there, its output is read instead, whether it wrote a file or a folder.
    Raises UserError if something is missing, broken, or belongs to another base model.
    """
    folder = Path(folder)
    require_checkpoint(folder)
    lora = read_tensors(folder / ADAPTER)
    of_released = any(RELEASED_ENCODER in name or name.endswith("embed_tokens.weight") for name in lora)
    config = adapter_config(folder, {name: tuple(tensor.shape) for name, tensor in lora.items()})
    try:
        model = get_peft_model(llm, config)
    except ValueError as error:
        raise _unfit(folder / ADAPTER_CONFIG, reason(error)) from None
    load_weights(model, llms_alone(lora), folder / ADAPTER, [name for name in model.state_dict() if "lora_" in name])
    trained = [in_model(name) for name in agreement.get("trained", []) if is_llms(name)]
    own_norms = {} if norms else {name: tensor.clone() for name, tensor in model.state_dict().items() if "norm" in name}
    if (folder / CONVERTED).exists():
        log.info("weights from %s", folder / CONVERTED)
        needed = [*(in_model(name) for name in lora if "lora_" in name), *trained]
        state = read_converted(folder / CONVERTED)
        load_weights(model, llms_alone(state), folder / CONVERTED, needed)
    elif (folder / TRAINABLE_PARAMS).exists():
        state = read_tensors(folder / TRAINABLE_PARAMS)
        load_weights(model, llms_alone(state), folder / TRAINABLE_PARAMS, trained)
    elif (folder / RELEASED_PARAMS).exists():
        state = llms_alone(read_tensors(folder / RELEASED_PARAMS))
        load_weights(model, {name: tensor for name, tensor in state.items() if "lora_" not in name},
                     folder / RELEASED_PARAMS, [])
    elif of_released:
        log.info("%s: no %s, as the released README leaves it: norms are the base model's", folder, RELEASED_PARAMS)
    else:
        raise UserError(f"{folder}: neither {TRAINABLE_PARAMS} nor {CONVERTED}; run zero_to_fp32.py there")
    if own_norms:
        model.load_state_dict(own_norms, strict=False)
    return model


def of_encoder(name: str) -> bool:
    """Whether a parameter is an encoder's that was trained with the LLM, and is read from N/ beside the checkpoint."""
    return RELEASED_ENCODER in name or any(f"{module}." in name for module in INJECTIONS.values())


def released_encoder(folder: Path | str) -> dict[str, torch.Tensor]:
    """The weights of the geo-encoder in the adapter of a checkpoint of the released code; none in ours."""
    path = Path(folder) / ADAPTER
    if holds_full_model(folder) or not path.exists() or not any(RELEASED_ENCODER in name for name in read_shapes(path)):
        return {}
    return {name.partition(RELEASED_ENCODER)[2]: tensor for name, tensor in read_tensors(path).items()
            if RELEASED_ENCODER in name}


def is_llms(name: str) -> bool:
    """Whether a weight is the LLM's own or its LoRA's, not of a module that was trained with it."""
    return not of_encoder(name) and not beside.is_beside(name)


def llms_alone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if is_llms(name)}


def load_beside(folder: Path | str, agreement: dict, mapping, width: int, token_ids, time_token_ids) -> beside.Beside:
    """The modules that were trained with the LLM, and are part of its checkpoint (`llm.beside`)."""
    described, folder = agreement.get("beside", {}), Path(folder)
    if not described:
        return beside.Beside()
    path = next((folder / name for name in (CONVERTED, TRAINABLE_PARAMS) if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: no {TRAINABLE_PARAMS}, which holds what was trained beside the LLM; {WAY_OUT}")
    state = read_converted(path) if path.name == CONVERTED else read_tensors(path)
    if path.name == CONVERTED and (folder / TRAINABLE_PARAMS).exists():     # which has no buffers
        state = read_tensors(folder / TRAINABLE_PARAMS) | state
    return beside.read(described, state, path, mapping, width, token_ids, time_token_ids)


def adapter_config(folder: Path, shapes: dict[str, tuple[int, ...]]) -> LoraConfig:
    """The LoRA that the adapter_config.json of `folder` describes, and whose weights have these `shapes` by name.

    Departure from PEFT's own reading: what neither we nor the released code write is refused, so that the file cannot
    name modules to import, another method, or sizes that are not those of the weights.
    """
    path, usual = folder / ADAPTER_CONFIG, LoraConfig().to_dict()
    found = read_json(path)

    def refuse(name):
        raise UserError(f"{path}: {name} is {str(found.get(name))[:100]!r}, which finetune_LLM_with_GCIM.py does not "
                        f"write; {WAY_OUT}")

    for name, value in found.items():
        if name not in (*LORA_FIELDS, *NOTES) and value and value != usual.get(name):
            refuse(name)
    if found.get("peft_type") != "LORA":
        refuse("peft_type")
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    if type(found.get("r")) is not int or ranks != {found["r"]}:
        raise UserError(f"{path}: r is {str(found.get('r'))[:100]!r}, and the weights in {ADAPTER} have rank "
                        f"{', '.join(map(str, sorted(ranks))) or 'none'}; {WAY_OUT}")
    for name in ("lora_alpha", "lora_dropout"):
        if type(found.get(name)) not in (int, float) or not 0 <= found[name] < (1 if "dropout" in name else math.inf):
            refuse(name)
    targets = found.get("target_modules")       # as a text it would be a regular expression
    if not isinstance(targets, list) or not targets or not all(
            isinstance(target, str) and re.fullmatch(r"[\w.]+", target) for target in targets):
        refuse("target_modules")
    return LoraConfig(**{name: found[name] for name in LORA_FIELDS}, bias="none", task_type="CAUSAL_LM",
                      inference_mode=True)


def read_converted(path: Path) -> dict[str, torch.Tensor]:
    """The state dict that zero_to_fp32.py wrote: a file, or a folder of files, perhaps with an index of them."""
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        files = listed(indices[0]) if indices else [*sorted(path.glob("*.bin")), *sorted(path.glob("*.safetensors"))]
    else:
        files = [path]
    if not files:
        raise UserError(f"{path}: an empty folder; delete it or run zero_to_fp32.py again")
    state = {}
    for file in files:
        state.update(read_tensors(file))
    return state


def in_model(name: str) -> str:
    """A trained parameter's name in the model with LoRA: files may leave out PEFT's prefix and the adapter's name."""
    name = name if name.startswith(PEFT_PREFIX) else PEFT_PREFIX + name
    return re.sub(r"\.(lora_\w+)(\.weight)?$", r".\1.default\2", name)


def load_weights(model: PeftModel, state: dict[str, torch.Tensor], path: Path, needed: Iterable[str]) -> None:
    """Load weights of the file `path` by name. Raises UserError if one has no place or one of `needed` is missing."""
    state = {in_model(name): tensor for name, tensor in state.items()}
    check_fits(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, path, needed)
    model.load_state_dict(state, strict=False)


def check_fits(model, shapes: dict[str, tuple[int, ...]], path: Path, needed: Iterable[str]) -> None:
    """Raises UserError unless what `path` holds has its places in the model, and each of the `needed` is there."""
    own = {name: tuple(getattr(tensor, "ds_shape", tensor.shape))      # the whole of what ZeRO-3 has cut up
           for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, shape in shapes.items():
        if name not in own:
            raise _unfit(path, f"no place for {name}")
        if shape != own[name]:
            raise _unfit(path, f"{name} is {shape} in the file, {own[name]} in the model")
    missing = next((name for name in needed if name not in shapes), None)
    if missing is not None:
        raise _unfit(path, f"{missing} is missing")


def _unfit(path: Path, why: str) -> UserError:
    return UserError(f"{path}: does not fit the base model ({why}); give the base model and the --gps_mapping_path of "
                     "the training")


def read_agreement(folder: Path | str) -> dict:
    """What the training wrote down for those who go on from its checkpoint; nothing in the released code's."""
    path = Path(folder) / AGREEMENT
    found = read_json(path) if path.exists() else {}
    kinds = {"model_max_length": int, "base_model": str, "trained": list, "encoders": dict, "questions": dict,
             "paths": dict, "beside": dict, "flags": dict, "files": dict, "quantization": str,
             "places": str}
    for name, value in found.items():
        if name in kinds and type(value) is not kinds[name]:
            raise UserError(f"{path}: {name} is {str(value)[:100]!r}; {WAY_OUT}")
    length = found.get("model_max_length", LEAST_TOKENS)
    if not LEAST_TOKENS <= length <= MOST_TOKENS:
        raise UserError(f"{path}: model_max_length is {str(length)[:100]}; {WAY_OUT}")
    if not all(isinstance(name, str) for name in found.get("trained", [])):
        raise UserError(f"{path}: trained is no list of names; {WAY_OUT}")
    if found.get("quantization", four_bits.NONE) not in (four_bits.NONE, four_bits.NF4):
        raise UserError(f"{path}: quantization is {found['quantization'][:100]!r}; {WAY_OUT}")
    for name, value in found.get("paths", {}).items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{path}: paths: {name[:100]!r} is {str(value)[:100]!r}; {WAY_OUT}")
    return found


def check_places(folder: Path | str, found: dict, mapping, path: Path | str) -> None:
    """The places must be those of the training: ids and coordinates. Raises UserError if not.

    found: as `read_agreement` finds it; mapping: a GPSMapping, of the file `path`.
    """
    if found.get("places", mapping.digest) != mapping.digest:
        raise UserError(f"{path}: other places than those of {Path(folder) / AGREEMENT}'s training; leave out "
                        "--gps_mapping_path, or give the training's")


def check_agreement(folder: Path | str, found: dict, context_size: int, native_context: int,
                    base_model: str | None = None, encoders: dict[str, str] | None = None) -> None:
    """The model must be the one that was trained, its positions scaled as they were. Raises UserError if not.

    found: as `read_agreement` finds it in `folder`. A base model by its name on the hub is not looked at. encoders: as
    of `injection.attach_encoders`, must be those of the training; None: whatever they are.
    """
    path = Path(folder) / AGREEMENT
    trained = found.get("model_max_length", context_size)
    if rope_factor(trained, native_context) != rope_factor(context_size, native_context):
        raise UserError(f"{path}: trained with --model_max_length {trained}, whose positions --context_size "
                        f"{context_size} would scale differently; give --context_size {trained}")
    present = fingerprint(base_model) if base_model and "base_model" in found else None
    if present is not None and present != found["base_model"]:
        raise UserError(f"{path}: trained on other weights than {base_model} holds; give the base model of the training"
                        f", or if it is that in other files, delete base_model from {path.name}")
    if encoders is None or "encoders" not in found:
        return
    for name, flag in (("GCIM", "--geoencoder_path"), ("PAM", "--projector_path and --poi_embedding_path")):
        was, now = found["encoders"].get(name), encoders.get(name)
        if was != now:
            how = (f"without {name}; leave out {flag}" if was is None else f"with {name}; give {flag}" if now is None
                   else f"with other weights of {name}'s; give the {flag} of the training")
            raise UserError(f"{path}: trained {how}")
