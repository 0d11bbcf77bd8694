"""A place's row as a sum, where its `<GPS n>` is what the LLM reads and what it answers: own + encoder + category.

Not in the paper, whose encoders stand in the place of the input row alone. For models that are trained from scratch and
answer by `<GPS n>` (`-answer token`): what they learn of a place is then known of its neighbours and its kind, where it
is read and where it is asked for. Afterwards the sums are plain rows (`fold`).
"""
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.gps_tokens import GPSMapping
from geo_encoder.quadkey import quadkeys

MODULE = "place_rows"       # what it is called as a module of an LLM


@dataclasses.dataclass(frozen=True)
class PlaceRowsConfig:
    """What must be known to build them; a checkpoint's `ga_llm.json` holds it. encoder: a GeoEncoderConfig's fields."""
    hidden_size: int
    kinds: int                      # categories
    encoder: dict | None = None

    def __post_init__(self):
        if type(self.hidden_size) is not int or type(self.kinds) is not int or self.hidden_size < 1 or self.kinds < 1:
            raise ValueError(f"hidden_size {self.hidden_size!r} or kinds {self.kinds!r} is impossible")
        if self.encoder is not None and GeoEncoderConfig(**self.encoder).hidden_size != self.hidden_size:
            raise ValueError("its encoder is of another width")


class PlaceRows(nn.Module):
    """What is added to the rows of `<GPS n>`: () to (places, hidden size).

    token_ids: (places,), the `<GPS n>` of each place of the mapping. categories, (places,), are kept with the weights.
    """

    def __init__(self, config: PlaceRowsConfig, mapping: GPSMapping, token_ids: np.ndarray):
        super().__init__()
        self.config, self.encoder, self.vectors = config, None, None
        self.category = nn.Embedding(config.kinds, config.hidden_size)
        nn.init.normal_(self.category.weight, std=.02)
        self.register_buffer("categories", torch.zeros(len(token_ids), dtype=torch.long))
        self.register_buffer("token_ids", torch.from_numpy(token_ids), persistent=False)
        if config.encoder is not None:
            encoder = GeoEncoderConfig(**config.encoder)
            self.encoder = build_encoder(encoder)
            digits = torch.from_numpy(quadkeys(mapping.latitude, mapping.longitude, encoder.level))
            self.register_buffer("digits", digits, persistent=False)

    def forward(self) -> torch.Tensor:
        rows = self.category(self.categories)
        return rows if self.encoder is None else rows + self.encoder(self.digits)


def attach(llm, rows: PlaceRows) -> None:
    """Let `llm` read and answer with `rows` added to its own, and be trained with them. After the LLM's LoRA."""
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    rows.to(embedding.weight.device)
    setattr(llm, MODULE, rows)
    place = torch.full((embedding.num_embeddings,), -1, device=rows.token_ids.device)
    place[rows.token_ids] = torch.arange(len(rows.token_ids), device=place.device)

    def read(module, inputs, output):
        rows.vectors = rows()       # the output's, too, of this forward pass
        of_token = place[inputs[0]].unsqueeze(-1)
        added = F.embedding(of_token.squeeze(-1).clamp(min=0), rows.vectors).to(output.dtype)
        return torch.where(of_token >= 0, output + added, output)       # which may have others' vectors elsewhere

    def answer(states):
        vectors, rows.vectors = rows.vectors.to(head.weight.dtype), None
        return F.linear(states, head.weight.index_add(0, rows.token_ids, vectors), head.bias)

    embedding.register_forward_hook(read)
    head.forward = answer


@torch.no_grad()
def fold(llm, rows: PlaceRows) -> None:
    """Add them to `llm`'s own rows, input and output, for good."""
    rows = rows.to(llm.device).eval()
    weights = {id(layer.weight): layer.weight for layer in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    for weight in weights.values():
        weight[rows.token_ids] += rows().to(weight.dtype)
