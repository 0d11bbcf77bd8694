"""What stage 2 may train beside the LLM, and a checkpoint holds with it: `<TIME n>`, places' rows, the pointer.

All three go beyond the paper. A checkpoint's ga_llm.json says under `beside` which there are and how they are built,
its trainable_params.safetensors holds their weights.
"""
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ga_llm.base.cli import UserError
from ga_llm.base.reading import WAY_OUT
from ga_llm.llm import pointing
from ga_llm.llm.pointer import Pointer, PointerConfig
from geo_encoder import gps_tokens, injection, moment, place_rows
from geo_encoder.gps_tokens import GPSMapping
from geo_encoder.weights import first_mismatch

MOMENTS = "moment_injection"
MODULES = (MOMENTS, place_rows.MODULE, pointing.MODULE)
CONFIGS = {place_rows.MODULE: place_rows.PlaceRowsConfig, pointing.MODULE: PointerConfig}


def is_beside(name: str) -> bool:
    """Whether a weight of that name belongs to one of these modules."""
    return any(part in MODULES for part in name.split("."))


def add_moments(llm, token_ids: np.ndarray) -> None:
    """Let `<TIME n>` be vectors that are trained with `llm`. After LoRA, as all here."""
    gps_tokens.keep_rows(llm.get_input_embeddings().weight, token_ids)
    injection.attach(llm, moment.moment_injection(llm.get_input_embeddings().embedding_dim, token_ids), MOMENTS)


def describe(llm) -> dict:
    """Which of the modules `llm` has, for ga_llm.json: {name: how it is built}."""
    found = {name: dataclasses.asdict(getattr(llm, name).config) for name in CONFIGS if hasattr(llm, name)}
    return found | ({MOMENTS: {}} if hasattr(llm, MOMENTS) else {})


@dataclasses.dataclass
class Beside:
    """The modules of a checkpoint, with their weights."""
    moments: injection.Injection | None = None
    rows: place_rows.PlaceRows | None = None
    pointer: Pointer | None = None

    def settle(self, llm) -> None:
        """Let `llm`, whose own weights are loaded, be asked with them: what they say of tokens becomes plain rows."""
        if self.moments is not None:
            injection.attach_table(llm, self.moments)
        if self.rows is not None:
            place_rows.fold(llm, self.rows)
        if self.pointer is not None:
            setattr(llm, pointing.MODULE, self.pointer.to(llm.device).eval())


def read(described: dict, state: dict[str, torch.Tensor], path: Path, mapping: GPSMapping, width: int,
         token_ids: np.ndarray, time_token_ids: np.ndarray | None) -> Beside:
    """The modules that `describe` has told of, from the weights of the file `path`; width: the LLM's.

    Raises UserError if they do not fit.
    """
    found = Beside()
    for name, fields in described.items():
        try:
            if name == MOMENTS and time_token_ids is not None:
                module = found.moments = moment.moment_injection(width, time_token_ids)
            elif name == place_rows.MODULE:
                module = found.rows = place_rows.PlaceRows(place_rows.PlaceRowsConfig(**fields), mapping, token_ids)
            elif name == pointing.MODULE:
                config = PointerConfig(**{"trajectory": False, **fields})       # of before there was one
                module = found.pointer = Pointer(config, mapping)
            else:
                raise ValueError("unknown")
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {str(name)[:60]} cannot be built ({error}); {WAY_OUT}") from None
        _load(module, name, state, path)
    return found


def _load(module: nn.Module, name: str, state: dict[str, torch.Tensor], path: Path) -> None:
    own = {key.split(f"{name}.", 1)[1]: tensor for key, tensor in state.items() if f"{name}." in key}
    expected = module.state_dict()
    whole = {key for key, tensor in expected.items() if not tensor.is_floating_point()}
    mismatch = first_mismatch(*({key: tensor for key, tensor in part.items() if key not in whole}
                                for part in (expected, own)))
    for key in whole:
        if mismatch is None and (key not in own or own[key].shape != expected[key].shape
                                 or own[key].is_floating_point()):
            mismatch = f"no {key} as expected"
    if mismatch:
        raise UserError(f"{path}: {name} does not fit ({mismatch}); give the --gps_mapping_path of the training")
    module.load_state_dict(own)
