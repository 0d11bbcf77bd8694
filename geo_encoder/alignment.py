"""PAM, the POI Alignment Module: embeddings of POI-to-POI transitions, and the projector that aligns them with the LLM.

The embeddings are given (paper, Section 3.3; data-preprocess/poi_embeddings.py, or an external model's); the projector,
one linear layer to the LLM's width (in a variant of the released code two), is what PAM's stage 1 trains.
"""
import dataclasses
from pathlib import Path

import numpy as np
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ga_llm.base.artifacts import PAM, POI_WIDTH, require
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json, read_tensors, sha256
from geo_encoder.gps_tokens import GPSMapping
from geo_encoder.weights import first_mismatch

KINDS = ("linear", "gelu")
MADE_BY = "python data-preprocess/poi_embeddings.py -dataset_name <name>"


@dataclasses.dataclass
class POIEmbeddings:
    """vectors: (places, 128) float32, in the mapping's order; sha256: of the file."""
    vectors: np.ndarray
    sha256: str


@dataclasses.dataclass
class ProjectorConfig:
    """What must be known to use a projector; saved beside its weights."""
    hidden_size: int        # width of the LLM's embeddings
    embeddings: str         # sha256 of the file of embeddings that it was trained on


def read_poi_embeddings(path: Path | str, mapping: GPSMapping) -> POIEmbeddings:
    """Read `<ds>_poi_embeddings.npy`, whose row n is POI n's. Raises UserError if it does not fit the places."""
    path = require(path, MADE_BY)
    try:
        rows = np.load(path, allow_pickle=False, mmap_mode="r")      # mapped: never larger than the file
        if rows.ndim != 2 or rows.shape[1] != POI_WIDTH or not np.issubdtype(rows.dtype, np.floating):
            raise ValueError(f"holds {rows.dtype} {rows.shape}, not a float (POIs, {POI_WIDTH})")
        if mapping.ids.max() >= len(rows):
            raise ValueError(f"has {len(rows)} rows, and none for POI {mapping.ids.max()}")
        vectors = np.asarray(rows[mapping.ids], dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise ValueError(f"the row of POI {mapping.ids[~np.isfinite(vectors).all(axis=1)][0]} is not finite")
    except (ValueError, EOFError, AttributeError, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}; make it again with `{MADE_BY}`") from None
    return POIEmbeddings(vectors, sha256(path))


def build_projector(hidden_size: int, kind: str = KINDS[0]) -> nn.Module:
    """A freshly initialised projector of one of `KINDS`: (N, 128) to (N, hidden size)."""
    first = nn.Linear(POI_WIDTH, hidden_size)
    return first if kind == KINDS[0] else nn.Sequential(first, nn.GELU(), nn.Linear(hidden_size, hidden_size))


def add_lora(projector: nn.Module, r: int, alpha: int) -> nn.Module:
    """The projector with LoRA, dropout 0.1, on each of its layers, which stay as they began (the released code's PAM).

    Departure from the paper, where the projector itself is trained.
    """
    holder = nn.Sequential(projector)       # LoRA takes the place of a layer within a module
    layers = [name for name, layer in holder.named_modules() if isinstance(layer, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.1, target_modules=layers, bias="none"),
                            holder)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return holder[0]


def load_projector(path: Path | str, embeddings: POIEmbeddings, hidden_size: int) -> nn.Module:
    """Load PAM's projector for an LLM of width `hidden_size`.

    Raises UserError if the file is missing, damaged, of another width, or trained on other embeddings.
    """
    path = require(path, PAM.made_by)
    state_dict, beside = read_tensors(path), path.with_name(PAM.config)
    try:
        config = ProjectorConfig(**read_json(require(beside, PAM.made_by)))
    except TypeError as error:
        raise UserError(f"{beside}: not a projector's ({error}); give the one that was written with {path.name}"
                        ) from None
    if config.hidden_size != hidden_size:
        raise UserError(f"{path}: made for an LLM of width {config.hidden_size}, this one has {hidden_size}; give the "
                        "projector that finetune_PAM.py trained with the same --model_name_or_path")
    if config.embeddings != embeddings.sha256:
        raise UserError(f"{path}: trained on other POI embeddings; give the --poi_embedding_path of its training")
    projector = build_projector(hidden_size, KINDS["0.weight" in state_dict])
    mismatch = first_mismatch(projector.state_dict(), state_dict)
    if mismatch:
        raise UserError(f"{path}: not a projector's weights ({mismatch}); give a {PAM.merged}")
    projector.load_state_dict(state_dict)
    return projector
