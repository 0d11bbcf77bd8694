"""The encoders against torch's own modules and the paper's formulas; LoRA where it must reach."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ga_llm.base.cli import UserError
from geo_encoder.encoder import RELEASED_TARGETS, Dropout, GeoEncoderConfig, HierarchicalEncoder, build_encoder
from geo_encoder.quadkey import quadkeys
from geo_encoder.weights import add_lora, load_encoder, merged_state_dict, save_encoder

DIGITS = torch.from_numpy(quadkeys(np.linspace(40.5, 40.9, 7), np.linspace(-74.2, -73.7, 7)))


# Python ends where the first of these libraries is looked for.
FIRST = """
import os, sys

class End:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("torch", "transformers", "peft", "bitsandbytes"):
            os._exit(3 if "ga_llm" in sys.modules else 1)

sys.meta_path.insert(0, End)
import geo_encoder.weights
"""


def test_ga_llm_comes_before_the_libraries_that_it_prepares():
    """It keeps bitsandbytes quiet, which peft imports; no script that imports geo_encoder first is an exception."""
    result = subprocess.run([sys.executable, "-c", FIRST], cwd=Path(__file__).parents[2], capture_output=True,
                            text=True)
    assert result.returncode == 3, result.stderr


def encoder(kind="hierarchical", width=16, **options):
    torch.manual_seed(0)
    return build_encoder(GeoEncoderConfig(width, kind, **options))


def test_hierarchical_equals_torch_modules():
    """n-grams counted by hand from the quadkey's text, then torch's own transformer encoder."""
    ours = encoder().eval()
    layer = nn.TransformerEncoderLayer(16, nhead=1, dim_feedforward=32, dropout=0.3, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    theirs.load_state_dict(ours.gps_encoder.transformer_encoder.state_dict())
    texts = ["".join(map(str, row.tolist())) for row in DIGITS]
    ngrams = torch.tensor([[int(text[i:i + 6], 4) for i in range(20)] for text in texts])
    embedded = ours.gps_embed_model.gps_embedding(ngrams) * math.sqrt(16)
    torch.testing.assert_close(ours(DIGITS), ours.gps_encoder.norm(theirs(embedded).mean(1)))


def test_parameter_names_are_the_released_codes():
    expected = {"gps_embed_model.gps_embedding.weight", "gps_encoder.norm.weight", "gps_encoder.norm.bias"}
    torch_layer = nn.TransformerEncoderLayer(16, nhead=1, dim_feedforward=32)
    for i in range(2):
        expected |= {f"gps_encoder.transformer_encoder.layers.{i}.{name}" for name in torch_layer.state_dict()}
    assert set(encoder().state_dict()) == expected
    assert encoder().state_dict()["gps_embed_model.gps_embedding.weight"].shape == (4096, 16)


def test_dropout_rates():
    assert {m.p for m in encoder().modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert {m.p for m in encoder("fusion").modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_dropout_of_the_cpu_equals_torchs_in_law():
    """A share of p is zero, also in the gradient, the rest is scaled by 1/(1 − p); nothing happens in eval mode."""
    torch.manual_seed(0)
    x, dropout = torch.full((1000, 1000), 2.0, requires_grad=True), Dropout(0.3)
    out = dropout(x)
    dropped = (out == 0).float().mean().item()
    assert abs(dropped - 0.3) < 5 * math.sqrt(0.3 * 0.7 / out.numel())       # five standard deviations
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([2 / 0.7]))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], out.detach() / 2)
    assert dropout(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(dropout.eval()(x), x)


def test_fourier_formula():
    fourier = encoder("fourier").eval()
    phase = DIGITS.float() @ fourier.frequencies.weight.T
    features = torch.cat([torch.cos(phase), torch.sin(phase)], -1) / 16
    expected = fourier.linear2(nn.functional.gelu(fourier.linear1(features)))
    torch.testing.assert_close(fourier(DIGITS), expected)
    assert fourier.frequencies.weight.shape == (128, 25) and fourier.frequencies.bias is None
    assert abs(fourier.frequencies.weight.std().item() - 0.01) < 0.001


@torch.no_grad()
def test_cells_are_summed_by_level():
    """Cells from the quadkey's text, each with a row of its own in a dictionary: what two places share is theirs alone.

    The hash may put two cells into one row, which these few do not show.
    """
    cells, rows = encoder("cells"), {}
    texts = ["".join(map(str, row.tolist())) for row in DIGITS]
    for text, digits in zip(texts, DIGITS):
        for level in range(10, 19):
            row = (int(text[:level], 4) * 32 + level) * 0x9E3779B97F4A7C15 % 2 ** 64 >> 49
            assert rows.setdefault(text[:level], row) == row
        expected = sum(cells.gps_embedding.weight[rows[text[:level]]] for level in range(10, 19))
        torch.testing.assert_close(cells(digits[None])[0], expected)
    assert len(set(rows.values())) == len(rows) > 40
    far = DIGITS[:1].clone()
    far[0, 18:] = 3 - far[0, 18:]           # below level 18 nothing counts
    assert torch.equal(cells(far), cells(DIGITS[:1]))


def test_cells_of_real_places_seldom_share_a_row():
    """10,000 places in a city, in 40,000 cells: no place has its rows in common with another's of other cells."""
    draw = np.random.default_rng(0)
    digits = torch.from_numpy(quadkeys(40.7 + draw.normal(0, .1, 10000), -74 + draw.normal(0, .1, 10000)))
    vectors = encoder("cells", width=4)(digits).detach()
    own = len(np.unique(digits[:, :18].numpy(), axis=0))
    assert len(torch.unique(vectors, dim=0)) == own


@pytest.mark.parametrize("kind", ["hierarchical", "fourier", "fusion", "cells"])
def test_batched_equals_one_by_one(kind):
    model = encoder(kind).eval()
    together = model(DIGITS)
    assert together.shape == (7, 16)
    torch.testing.assert_close(together, torch.cat([model(row[None]) for row in DIGITS]))


def test_an_encoder_without_a_layer_for_lora_is_told_in_one_line():
    with pytest.raises(UserError, match="Embedding .*LORA_TARGETS.*--encoder_training full"):
        add_lora(nn.Embedding(3, 4), 2, 4)


@pytest.mark.parametrize("kind, layers", [("hierarchical", ["gps_embedding", "out_proj", "linear1", "linear2"]),
                                          ("fusion", ["gps_embedding", "out_proj", "linear1", "linear2",
                                                      "projection"]), ("cells", ["gps_embedding"])])
@pytest.mark.parametrize("training", [True, False])
def test_lora_reaches_every_target(kind, layers, training):
    """Gradients arrive at the half of LoRA that starts at zero, in every target, in train and in eval mode, and that
    half changes the output once it is not zero. (In PEFT that is B in a linear layer, A in an embedding.)"""
    model = add_lora(encoder(kind), r=4, alpha=8).train(training)
    targets = {name for name, module in model.named_modules() if hasattr(module, "lora_dropout")}
    assert {name.rsplit(".", 1)[-1] for name in targets} == set(layers)
    loss_weights = torch.randn(7, 16)
    (model(DIGITS) * loss_weights).sum().backward()
    zero_halves = {name: parameter for name, parameter in model.named_parameters()
                   if "lora_B" in name or "lora_embedding_A" in name}
    assert len(zero_halves) == len(targets)
    for name, parameter in zero_halves.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    model.eval()
    with torch.no_grad():
        for name, parameter in zero_halves.items():
            before = model(DIGITS)
            parameter.normal_()
            assert (model(DIGITS) - before).abs().max() > 1e-4, name
            parameter.zero_()


@pytest.mark.parametrize("kind", ["hierarchical", "fusion", "cells"])
def test_merged_equals_unmerged(kind, tmp_path):
    model = add_lora(encoder(kind, width=12), r=4, alpha=8).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        expected = model(DIGITS)
    file = tmp_path / "7" / "geo_encoder_merged.pth"
    save_encoder(merged_state_dict(model), GeoEncoderConfig(12, kind), file)
    merged, config = load_encoder(file, 12)
    assert config.kind == kind and not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged.eval()(DIGITS), expected, rtol=1e-4, atol=1e-5)
    assert (expected - encoder(kind, width=12).eval()(DIGITS)).abs().max() > 0.01


def test_files_of_the_released_code_load(tmp_path):
    """They have torch's parameter names and no configuration beside them; n and width come from the shapes."""
    reference = HierarchicalEncoder(8, ngram=5)
    torch.save(reference.state_dict(), tmp_path / "geo_encoder_merged.pth")
    loaded, config = load_encoder(tmp_path / "geo_encoder_merged.pth", 8)
    assert (config.ngram, config.level, config.hidden_size) == (5, 25, 8)
    torch.testing.assert_close(loaded.eval()(DIGITS), reference.eval()(DIGITS))


class Released(nn.Module):
    """The released code's Fourier encoder of 25 digits and, with a width, its fusion encoder, by torch's own modules
    under its names; forward: (N, 25) digits, (N, 20) n-grams to (N, out)."""

    def __init__(self, out, width=None, fourier_width=None):
        super().__init__()
        self.width, fourier = width, nn.Module()
        fourier.Wr = nn.Linear(25, 128, bias=False)
        fourier.mlp = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, fourier_width or out))
        if width is None:
            self.pos_encoder = fourier
            return
        layer = nn.TransformerEncoderLayer(width, nhead=1, dim_feedforward=2 * width, dropout=0.1, batch_first=True)
        self.fourier_encoder, self.gps_embed_model, self.gps_encoder = nn.Module(), nn.Module(), nn.Module()
        self.fourier_encoder.pos_encoder = fourier
        self.gps_embed_model.gps_embedding = nn.Embedding(4096, width)
        self.gps_encoder.transformer_encoder = nn.TransformerEncoder(layer, 2)
        self.gps_encoder.norm = nn.LayerNorm(width)
        self.final_linear = nn.Linear(width + fourier_width, out)

    def forward(self, digits, ngrams):
        fourier = self.pos_encoder if self.width is None else self.fourier_encoder.pos_encoder
        phase = fourier.Wr(digits.float())
        of_digits = fourier.mlp(torch.cat([phase.cos(), phase.sin()], -1) / math.sqrt(256))
        if self.width is None:
            return of_digits
        embedded = self.gps_embed_model.gps_embedding(ngrams) * math.sqrt(self.width)
        of_ngrams = self.gps_encoder.norm(self.gps_encoder.transformer_encoder(embedded).mean(1))
        return self.final_linear(torch.cat([of_ngrams, of_digits], -1))


@pytest.mark.parametrize("sizes", [(16,), (16, 128, 128), (16, 40, 24)], ids=["Fourier", "fusion", "other widths"])
def test_released_fourier_and_fusion_files_load(tmp_path, sizes):
    """Names are mapped, sizes come from the file, and what it says is the same; a name more or less is refused."""
    torch.manual_seed(0)
    reference, path = Released(*sizes).eval(), tmp_path / "geo_encoder_merged.pth"
    torch.save(reference.state_dict(), path)
    loaded, config = load_encoder(path, 16)
    assert (config.kind, config.hidden_size, config.level) == ("fusion" if sizes[1:] else "fourier", 16, 25)
    assert not sizes[1:] or (config.width, config.fourier_width) == sizes[1:]
    ngrams = (DIGITS.long().unfold(1, 6, 1) * 4 ** torch.arange(5, -1, -1)).sum(-1)
    torch.testing.assert_close(loaded.eval()(DIGITS), reference(DIGITS, ngrams))
    save_encoder(loaded.state_dict(), config, tmp_path / "ours" / "geo_encoder_merged.pth")     # and again, as ours
    assert load_encoder(tmp_path / "ours" / "geo_encoder_merged.pth", 16)[1] == config
    prefix = "fourier_encoder." * bool(sizes[1:])
    for change in ({"pos_encoder.Wr.bias": torch.zeros(128)}, {f"{prefix}pos_encoder.mlp.2.bias": None}):
        state = {name: tensor for name, tensor in (reference.state_dict() | change).items() if tensor is not None}
        torch.save(state, path)
        with pytest.raises(UserError, match="do not match"):
            load_encoder(path, 16)


@pytest.mark.parametrize("kind, layers", [("hierarchical", ["gps_embedding"]), ("fourier", ["frequencies"]), (
    "fusion", ["frequencies", "gps_embedding", "projection"])])
def test_where_the_released_codes_lora_is(kind, layers):
    model = add_lora(encoder(kind), r=4, alpha=8, targets=RELEASED_TARGETS)
    assert sorted(name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_dropout")
                  ) == layers
    merged = merged_state_dict(model)
    assert set(merged) == set(encoder(kind).state_dict())


@pytest.mark.parametrize("kind, level", [("fourier", 24), ("fusion", 25)])
def test_configuration_from_shapes(tmp_path, kind, level):
    torch.save(encoder(kind, level=level).state_dict(), tmp_path / "e.pth")
    assert load_encoder(tmp_path / "e.pth", 16)[1] == GeoEncoderConfig(16, kind, 6, level)


def write_pickle(path: Path):
    path.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")


@pytest.mark.parametrize("write, message", [
    (lambda path: None, "not found"),
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_bytes(b"not weights at all"), "not a file of weights"),
    (write_pickle, "not a file of weights"),
    (lambda path: torch.save(["a"], path), "something else than tensors"),
    (lambda path: torch.save({"a": torch.ones(1)}, path), "holds no geo-encoder"),
    (lambda path: torch.save(HierarchicalEncoder(8).state_dict(), path), "width 8, this one has 16"),
    (lambda path: torch.save({k: v for k, v in HierarchicalEncoder(16).state_dict().items() if "norm2" not in k}, path),
     "do not match"),
])
def test_bad_encoder_files(tmp_path, write, message):
    path = tmp_path / "geo_encoder_merged.pth"
    write(path)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(path, 16)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not Path("hacked").exists()
