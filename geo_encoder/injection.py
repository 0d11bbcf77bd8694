"""Injection: the LLM sees an encoder's vector in place of the embedding of every `<GPS n>`, a projector's of `<POI n>`.

A forward hook on the input embedding does it, so any Hugging Face causal LM works, in training, in `generate` and
below PEFT, DDP or DeepSpeed, without a patched forward.
"""
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ga_llm.base.artifacts import GCIM, PAM, EncoderFiles, require
from ga_llm.base.cli import UserError
from geo_encoder import alignment
from geo_encoder.alignment import POIEmbeddings
from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.gps_tokens import GPSMapping, keep_rows
from geo_encoder.quadkey import quadkeys
from geo_encoder.weights import LORA_TARGETS, add_lora, digest, encoder_of, load_encoder


class Injection(nn.Module):
    """Token ids and their embeddings in, the embeddings with the places' vectors in.

    encoder: (N, features) to (N, hidden size), or None once frozen.
    features: (places, features), what the encoder knows of each place.
    token_ids: (places,), the token that stands for each place.
    each: every token is encoded by itself while training, with a dropout of its own, as in the released code.
    """

    def __init__(self, encoder: nn.Module, features: torch.Tensor, token_ids: np.ndarray):
        super().__init__()
        self.encoder, self.token_ids, self.each = encoder, token_ids, False
        rows = torch.full((int(max(token_ids)) + 1,), -1)
        rows[torch.as_tensor(token_ids)] = torch.arange(len(token_ids))
        # Not persistent: checkpoints hold what was learned, not what the mapping file already says.
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("table", None, persistent=False)

    def forward(self, input_ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """input_ids (B, S), embeddings (B, S, hidden size) to (B, S, hidden size)."""
        rows = self.rows[input_ids.clamp(max=len(self.rows) - 1)]
        is_place = (rows >= 0) & (input_ids < len(self.rows))
        if self.table is not None:
            return torch.where(is_place.unsqueeze(-1), self.table[rows.clamp(min=0)], embeddings)
        # Each distinct place of the batch is encoded once, however often it was visited.
        # Departure from the released code: there each time, so that dropout differs from one visit to another (`each`).
        if self.each and self.training:
            distinct, where = rows[is_place], slice(None)
        else:
            distinct, where = torch.unique(rows[is_place], return_inverse=True)
        if distinct.numel() == 0:
            # DDP waits for a gradient of every parameter, also from a batch without a place.
            return embeddings + 0 * self.encoder(self.features[:1]).sum().to(embeddings.dtype)
        vectors = self.encoder(self.features[distinct]).to(embeddings.dtype)
        return embeddings.masked_scatter(is_place.unsqueeze(-1), vectors[where])

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype, batch: int = 1024) -> None:
        """Evaluate the encoder once for all places and keep the (places, hidden size) table alone."""
        self.encoder.eval()
        self.table = torch.cat([self.encoder(part) for part in self.features.split(batch)]).to(dtype)
        self.encoder = None


def gps_injection(encoder: nn.Module, level: int, mapping: GPSMapping, token_ids: np.ndarray) -> Injection:
    """Injection of `<GPS n>` tokens by a geo-encoder of quadkeys of `level`."""
    return Injection(encoder, torch.from_numpy(quadkeys(mapping.latitude, mapping.longitude, level)), token_ids)


def new_gps_injection(config: GeoEncoderConfig, mapping: GPSMapping, token_ids: np.ndarray,
                      lora: tuple[int, int] | None = None, targets: str = LORA_TARGETS) -> Injection:
    """The same by an encoder that has learned nothing (torch's random numbers); lora: rank and alpha of its LoRA, on
    the `targets`.
    """
    encoder = build_encoder(config)
    if lora:
        add_lora(encoder, *lora, targets)
    return gps_injection(encoder, config.level, mapping, token_ids)


def poi_injection(projector: nn.Module, embeddings: POIEmbeddings, token_ids: np.ndarray) -> Injection:
    """Injection of `<POI n>` tokens by a projector of `embeddings`."""
    return Injection(projector, torch.from_numpy(embeddings.vectors), token_ids)


def check_paths(args) -> None:
    """The files of the encoders that --geoencoder_path, --projector_path and --poi_embedding_path name.

    Raises UserError if one is missing, or PAM's two are not given together.
    """
    for path, files in ((args.geoencoder_path, GCIM), (args.projector_path, PAM)):
        if path:
            require(path, files.made_by)
    if bool(args.projector_path) != bool(args.poi_embedding_path):
        given, other = (("projector_path", "poi_embedding_path") if args.projector_path else
                        ("poi_embedding_path", "projector_path"))
        raise UserError(f"--{given} goes with --{other}: <POI n> is the embedding, projected; give both or neither")


@dataclasses.dataclass
class Loaded:
    """One of stage 1's modules, read back: what it injects, its configuration and the kind of its files."""
    injection: Injection
    config: object
    files: EncoderFiles


def load_encoders(model, mapping: GPSMapping, token_ids: np.ndarray, geoencoder_path: Path | str | None = None,
                  poi_token_ids: np.ndarray | None = None, embeddings: POIEmbeddings | None = None,
                  projector_path: Path | str | None = None) -> list[Loaded]:
    """GCIM's encoder and PAM's projector, of those that are given, for `model`; the same in stage 2 and evaluation."""
    found, width = [], model.get_input_embeddings().embedding_dim
    if geoencoder_path:
        encoder, config = load_encoder(geoencoder_path, width)
        found.append(Loaded(gps_injection(encoder, config.level, mapping, token_ids), config, GCIM))
    if projector_path:
        projector = alignment.load_projector(projector_path, embeddings, width)
        config = alignment.ProjectorConfig(width, embeddings.sha256)
        found.append(Loaded(poi_injection(projector, embeddings, poi_token_ids), config, PAM))
    return found


def trained_encoder(model, mapping: GPSMapping, token_ids: np.ndarray, state_dict: dict, path: Path) -> Loaded:
    """The geo-encoder that the released code's stage 2 trains with the LLM, by the weights in its adapter `path`."""
    encoder, config = encoder_of(state_dict, path, model.get_input_embeddings().embedding_dim)
    return Loaded(gps_injection(encoder, config.level, mapping, token_ids), config, GCIM)


def new_encoder(model, mapping: GPSMapping, token_ids: np.ndarray, kind: str) -> Loaded:
    """A geo-encoder that has learned nothing, as if it were loaded, to be trained with the LLM."""
    config = GeoEncoderConfig(model.get_input_embeddings().embedding_dim, kind)
    return Loaded(new_gps_injection(config, mapping, token_ids), config, GCIM)


def attach_encoders(model, loaded: Iterable[Loaded]) -> dict[str, str]:
    """Let them act frozen on `model`.

    Returns {"GCIM" or "PAM": what tells it from others}, which stage 2 and evaluation must agree in.
    """
    found = {one.files.module: digest(one.injection.encoder.state_dict()) for one in loaded}
    for one in loaded:
        attach_table(model, one.injection)
    return found


def attach_trained(model, loaded: Iterable[Loaded], each: bool = False) -> None:
    """Let them act on `model` as modules that are trained with it. After the LLM's LoRA, as `attach`.

    each: as of `Injection`.
    """
    for one in loaded:
        one.injection.each = each
        keep_rows(model.get_input_embeddings().weight, one.injection.token_ids)
        attach(model, one.injection, INJECTIONS[one.files])


def attach_untrained(model, mapping: GPSMapping, token_ids: np.ndarray):
    """The same with an encoder that has learned nothing, of the default kind."""
    config = GeoEncoderConfig(model.get_input_embeddings().embedding_dim)
    return attach_table(model, new_gps_injection(config, mapping, token_ids))


def attach_table(model, injection: Injection):
    """Let `injection`'s encoder, evaluated once for every place, act on `model`."""
    embedding = model.get_input_embeddings()
    injection.to(embedding.weight.device).freeze(embedding.weight.dtype)
    keep_rows(embedding.weight, injection.token_ids)
    return attach(model, injection)


INJECTIONS = {GCIM: "gps_injection", PAM: "poi_injection"}      # what they are called as modules of an LLM


def attach(model, injection: Injection, name: str = INJECTIONS[GCIM]):
    """Let `injection` act on `model`'s input embeddings; returns the hook's handle (`.remove()` undoes it).

    An unfrozen injection becomes a submodule of that `name`, so that Trainer, DDP and DeepSpeed find its parameters.
    Attach it after the LLM's LoRA, which would freeze it.
    """
    embedding = model.get_input_embeddings()
    injection.to(embedding.weight.device)
    if injection.encoder is not None:
        setattr(model, name, injection)
    return embedding.register_forward_hook(lambda module, inputs, output: injection(inputs[0], output))
