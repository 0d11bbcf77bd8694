"""The paper's three geo-encoders: hierarchical (the default), Fourier, and their fusion (its full GCIM); and cells.

All take quadkey digits, (N, level) integers 0-3, and return (N, hidden size) vectors that stand for `<GPS n>` in the
LLM. Parameter names of the hierarchical one are those of the released code's files; `weights` maps those of the others.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

NGRAM = 6
LEVEL = 25
MAX_NGRAM = 10      # whose table has a million rows
MAX_LEVEL = 30      # tiles of 4 cm, finer than coordinates are given
KINDS = ("hierarchical", "fourier", "fusion", "cells")
# Where stage 1 puts LoRA. One regular expression, since PEFT reads a *list* as suffixes.
# Departure from the released code: its list of patterns, read as suffixes, adapts `gps_embedding` alone.
LORA_TARGETS = r"(.*\.)?(gps_embedding|self_attn\.out_proj|linear1|linear2|projection)"
RELEASED_TARGETS = r"(.*\.)?(gps_embedding|frequencies|projection)"     # what that comes to, in its fusion encoder too
FUSED = 128     # width of each of the two that are fused


@dataclasses.dataclass
class GeoEncoderConfig:
    """What must be known to build an encoder; saved beside its weights."""
    hidden_size: int            # width of the LLM's embeddings
    kind: str = "hierarchical"
    ngram: int = NGRAM
    level: int = LEVEL
    width: int = FUSED          # of the hierarchical part of a fusion, of which the released code has two variants
    fourier_width: int = FUSED

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"geo encoder {self.kind!r} is none of {', '.join(KINDS)}")
        for name in ("hidden_size", "ngram", "level", "width", "fourier_width"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} {getattr(self, name)!r} is not a whole number")
        if min(self.width, self.fourier_width) < 1:
            raise ValueError(f"width {self.width} or fourier_width {self.fourier_width} is impossible")
        if self.hidden_size < 1 or not 1 <= self.level <= MAX_LEVEL:
            raise ValueError(f"hidden_size {self.hidden_size} or level {self.level} (1 to {MAX_LEVEL}) is impossible")
        if not 1 <= self.ngram <= min(self.level, MAX_NGRAM):
            raise ValueError(f"n-gram {self.ngram} does not fit a quadkey of level {self.level}, or has more than "
                             f"{MAX_NGRAM} digits")


class SelfAttention(nn.Module):
    """Single-head self-attention with the parameters of `nn.MultiheadAttention`.

    Departure from the released code: `nn.MultiheadAttention` reads `out_proj.weight` without calling `out_proj`, so
    that a LoRA there never runs and never learns. Here the module is called, in training and in eval.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.dropout = dropout
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, n-grams, width) to the same shape."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout))


class Dropout(nn.Dropout):
    """Dropout for a CPU, where torch draws the mask in one thread, one Bernoulli number at a time.

    Uniform numbers make the same distribution in a third of the time, which was a quarter of the encoder's.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        scaled = torch.rand(x.shape).ge_(self.p).mul_(1 / (1 - self.p))
        return x * scaled.to(x.dtype)


class TransformerEncoderLayer(nn.Module):
    """Post-norm transformer layer: 1 head, feed-forward 2·width, ReLU; the same function as torch's."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.self_attn = SelfAttention(width, dropout)
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class GPSEmbedding(nn.Module):
    """Overlapping n-grams of a quadkey, each a base-4 number, to rows of an embedding; × √width."""

    def __init__(self, width: int, ngram: int):
        super().__init__()
        self.ngram = ngram
        self.gps_embedding = nn.Embedding(4 ** ngram, width)
        self.register_buffer("place_values", 4 ** torch.arange(ngram - 1, -1, -1), persistent=False)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        """(N, level) digits to (N, level − n + 1, width)."""
        ngrams = (digits.long().unfold(-1, self.ngram, 1) * self.place_values).sum(-1)
        vectors = self.gps_embedding(ngrams)
        return vectors * math.sqrt(vectors.shape[-1])


class GPSEncoder(nn.Module):
    """Two transformer layers over the n-grams, their mean, a LayerNorm."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.transformer_encoder = nn.Module()
        self.transformer_encoder.layers = nn.ModuleList(TransformerEncoderLayer(width, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.transformer_encoder.layers:
            x = layer(x)
        return self.norm(x.mean(dim=1))


class HierarchicalEncoder(nn.Module):
    """Quadkey n-grams through a small transformer (paper, Section 3.2, hierarchical encoding)."""

    def __init__(self, hidden_size: int, ngram: int = NGRAM, dropout: float = 0.3):
        super().__init__()
        self.gps_embed_model = GPSEmbedding(hidden_size, ngram)
        self.gps_encoder = GPSEncoder(hidden_size, dropout)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        return self.gps_encoder(self.gps_embed_model(digits))


class FourierEncoder(nn.Module):
    """Learnable Fourier features of the quadkey's digits (paper, Section 3.2, Fourier encoding)."""

    FEATURES = 256
    GAMMA = 10.0

    def __init__(self, hidden_size: int, level: int = LEVEL):
        super().__init__()
        self.frequencies = nn.Linear(level, self.FEATURES // 2, bias=False)
        nn.init.normal_(self.frequencies.weight, std=self.GAMMA ** -2)
        self.linear1 = nn.Linear(self.FEATURES, 128)
        self.linear2 = nn.Linear(128, hidden_size)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        phase = self.frequencies(digits.to(self.frequencies.weight.dtype))
        features = torch.cat([phase.cos(), phase.sin()], dim=-1) / math.sqrt(self.FEATURES)
        return self.linear2(F.gelu(self.linear1(features)))


class FusionEncoder(nn.Module):
    """Hierarchical and Fourier side by side, then a linear layer to the LLM's width."""

    def __init__(self, hidden_size: int, ngram: int = NGRAM, level: int = LEVEL, width: int = FUSED,
                 fourier_width: int = FUSED):
        super().__init__()
        self.hierarchical = HierarchicalEncoder(width, ngram, dropout=0.1)
        self.fourier = FourierEncoder(fourier_width, level)
        self.projection = nn.Linear(width + fourier_width, hidden_size)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        return self.projection(torch.cat([self.hierarchical(digits), self.fourier(digits)], dim=-1))


class CellsEncoder(nn.Module):
    """The sum of a learned vector for each quadkey cell that a place lies in, of levels 10 (30 km) to 18 (100 m).

    Not in the paper. The more cells two places share, the more alike they are, so that what is learned of one place is
    known of its neighbours; a few check-ins suffice. The cells of all levels share one table, by a hash of level and
    cell, as in multi-resolution hash encodings (Mueller et al., arXiv 2201.05989).
    """

    LEVELS = range(10, 19)
    ROWS = 2 ** 15
    GOLDEN = -7046029254386353131       # 2^64 / golden ratio, as a signed number: Fibonacci hashing (Knuth, TAOCP 3)

    def __init__(self, hidden_size: int, level: int = LEVEL):
        super().__init__()
        self.levels = [cell for cell in self.LEVELS if cell <= level] or [level]
        self.gps_embedding = nn.Embedding(self.ROWS, hidden_size)
        nn.init.normal_(self.gps_embedding.weight, std=.02)

    def forward(self, digits: torch.Tensor) -> torch.Tensor:
        digits, rows = digits.long(), []
        for level in self.levels:
            cell = (digits[:, :level] * 4 ** torch.arange(level - 1, -1, -1, device=digits.device)).sum(-1)
            rows.append(((cell * 32 + level) * self.GOLDEN >> 49) % self.ROWS)      # the product's upper 15 bits
        return self.gps_embedding(torch.stack(rows, dim=-1)).sum(1)


def build_encoder(config: GeoEncoderConfig) -> nn.Module:
    """A freshly initialised encoder: (N, level) digits to (N, hidden size)."""
    if config.kind == "hierarchical":
        return HierarchicalEncoder(config.hidden_size, config.ngram)
    if config.kind == "fourier":
        return FourierEncoder(config.hidden_size, config.level)
    if config.kind == "cells":
        return CellsEncoder(config.hidden_size, config.level)
    return FusionEncoder(config.hidden_size, config.ngram, config.level, config.width, config.fourier_width)
