"""PAM's embeddings by POI id, its projector's files, and `<POI n>` beside `<GPS n>` through one injection."""
import dataclasses
import json

import numpy as np
import pytest
import torch

from ga_llm.base.artifacts import PAM
from ga_llm.base.cli import UserError
from ga_llm.llm.backbone import load_llm, load_tokenizer
from geo_encoder import alignment, gps_tokens, injection
from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.weights import digest, merged_state_dict, save_encoder

IDS = [i for i in range(1, 14) if i != 4]       # those of the mapping, which stand there in another order
TEXT = "POI id 12 <POI 12> <GPS 5>, then POI id 5 <POI 5> <GPS 12>."


@pytest.fixture
def mapping(mapping_csv):
    return gps_tokens.read_gps_mapping(mapping_csv)


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(14, 128)).astype(np.float32)


@pytest.fixture
def file(tmp_path, rows):
    np.save(tmp_path / "e.npy", rows)
    return tmp_path / "e.npy"


@pytest.fixture
def model(tiny_llama):
    return load_llm(tiny_llama(), 512, "sdpa", torch.float32)


@pytest.fixture
def saved(tmp_path, mapping, file, model):
    """A projector's file, and the projector."""
    torch.manual_seed(0)
    projector = alignment.build_projector(model.config.hidden_size)
    config = alignment.ProjectorConfig(model.config.hidden_size, alignment.read_poi_embeddings(file, mapping).sha256)
    save_encoder(projector.state_dict(), config, tmp_path / PAM.merged, PAM)
    return tmp_path / PAM.merged, projector


def test_row_n_is_poi_n(mapping, file, rows):
    found = alignment.read_poi_embeddings(file, mapping)
    assert sorted(mapping.ids) == IDS and list(mapping.ids) != IDS
    assert all((vector == rows[poi]).all() for poi, vector in zip(mapping.ids, found.vectors, strict=True))


@pytest.mark.parametrize("change, names", [
    (lambda rows: rows[:13], ["13 rows", "POI 13"]), (lambda rows: rows[:, :64], ["(14, 64)"]),
    (lambda rows: rows[0], ["(128,)"]), (lambda rows: rows.astype(int), ["int64"]),
    (lambda rows: np.where(np.arange(14)[:, None] == 7, np.nan, rows), ["POI 7", "not finite"]),
    (lambda rows: np.array([{}] * 14), ["objects"])],
    ids=["no row", "narrow", "flat", "integers", "NaN", "objects"])
def test_embeddings_that_do_not_fit(tmp_path, mapping, rows, change, names):
    np.save(tmp_path / "e.npy", change(rows), allow_pickle=True)
    with pytest.raises(UserError) as error:
        alignment.read_poi_embeddings(tmp_path / "e.npy", mapping)
    assert all(name in str(error.value) for name in ["e.npy", "poi_embeddings.py", *names])


def test_rows_of_no_place_may_hold_anything(tmp_path, mapping, rows):
    rows[[0, 4]] = np.nan
    np.save(tmp_path / "e.npy", rows)
    assert np.isfinite(alignment.read_poi_embeddings(tmp_path / "e.npy", mapping).vectors).all()


def test_both_kinds_of_tokens_through_one_injection(tmp_path, mapping, file, rows, model, saved, tiny_llama):
    """`<POI n>` is the projected row n, `<GPS n>` the encoder's vector of place n, and all else is as before."""
    path, projector = saved
    tokenizer = load_tokenizer(tiny_llama())
    gps, poi = (add(tokenizer, mapping, model) for add in (gps_tokens.add_gps_tokens, gps_tokens.add_poi_tokens))
    assert poi.min() == gps.max() + 1 and len(tokenizer) == model.get_input_embeddings().num_embeddings
    encoder, config = build_encoder(GeoEncoderConfig(model.config.hidden_size)).eval(), GeoEncoderConfig(32)
    save_encoder(encoder.state_dict(), config, tmp_path / "geo.pth")
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    plain = model.get_input_embeddings()(ids)
    found = injection.attach_encoders(model, injection.load_encoders(
        model, mapping, gps, tmp_path / "geo.pth", poi, alignment.read_poi_embeddings(file, mapping), path))
    assert found == {"GCIM": digest(encoder.state_dict()), "PAM": digest(projector.state_dict())}
    assert found["GCIM"] != found["PAM"]
    expected = plain.clone()
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(ids[0])):
        if token.startswith("<POI "):
            expected[0, position] = projector(torch.from_numpy(rows[int(token[5:-1])]))
        elif token.startswith("<GPS "):
            row = mapping.ids.tolist().index(int(token[5:-1]))
            features = injection.gps_injection(encoder, 25, mapping, gps).features[row:row + 1]
            expected[0, position] = encoder(features)[0]
    assert (expected != plain).any(-1).sum() == 4
    torch.testing.assert_close(model.get_input_embeddings()(ids), expected)


def test_projector_learns_and_the_tokens_rows_do_not(mapping, file, model, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama())
    tokens = gps_tokens.add_poi_tokens(tokenizer, mapping, model)
    projector = alignment.build_projector(model.config.hidden_size)
    layer = injection.poi_injection(projector, alignment.read_poi_embeddings(file, mapping), tokens)
    injection.attach(model, layer, "poi_injection")
    model(**tokenizer([TEXT], return_tensors="pt")).logits.square().mean().backward()
    assert projector.weight.grad.abs().sum() > 0 and projector.bias.grad.abs().sum() > 0
    assert {name for name, _ in model.named_parameters() if "poi_injection" in name} == {
        "poi_injection.encoder.weight", "poi_injection.encoder.bias"}
    assert model.get_input_embeddings().weight.grad[tokens].abs().sum() == 0


@pytest.mark.parametrize("kind, layers", [("linear", [""]), ("gelu", ["0.", "2."])])
def test_projectors_of_the_released_code(tmp_path, mapping, file, kind, layers):
    """One layer or two with GELU; through LoRA alone the layers stay, and what is merged says what was trained."""
    torch.manual_seed(0)
    projector = alignment.build_projector(32, kind)
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    assert list(before) == [f"{layer}{part}" for layer in layers for part in ("weight", "bias")]
    vectors = torch.randn(5, 128)
    by_hand = vectors @ before[f"{layers[0]}weight"].T + before[f"{layers[0]}bias"]
    if kind == "gelu":
        by_hand = torch.nn.functional.gelu(by_hand) @ before["2.weight"].T + before["2.bias"]
    torch.testing.assert_close(projector(vectors), by_hand)
    adapted = alignment.add_lora(projector, 4, 8).train()
    adapted(vectors).square().sum().backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(layers) and all("lora_" in name for name in trained)
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in trained.items() if "lora_B" in name)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    merged = merged_state_dict(adapted.eval())
    assert [name for name in before if not torch.equal(merged[name], before[name])] == [f"{n}weight" for n in layers]
    embeddings = alignment.read_poi_embeddings(file, mapping)
    save_encoder(merged, alignment.ProjectorConfig(32, embeddings.sha256), tmp_path / PAM.merged, PAM)
    loaded = alignment.load_projector(tmp_path / PAM.merged, embeddings, 32)
    torch.testing.assert_close(loaded(vectors), adapted(vectors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, names", [
    (lambda folder: edit(folder, hidden_size=64), ["width 64", "has 32"]),
    (lambda folder: edit(folder, embeddings="0" * 64), ["other POI embeddings", "--poi_embedding_path"]),
    (lambda folder: edit(folder, width=3), [PAM.config, "width"]),
    (lambda folder: (folder / PAM.config).unlink(), [PAM.config, "not found", "finetune_PAM.py"]),
    (lambda folder: torch.save({"weight": torch.zeros(32, 128)}, folder / PAM.merged), ["no bias"]),
    (lambda folder: torch.save({"weight": torch.zeros(32, 64), "bias": torch.zeros(32)}, folder / PAM.merged),
     ["(32, 64)"]),
    (lambda folder: (folder / PAM.merged).unlink(), ["not found", "finetune_PAM.py"])],
    ids=["another LLM", "other embeddings", "a key more", "no configuration", "no bias", "narrow", "no file"])
def test_projectors_that_do_not_fit(tmp_path, mapping, file, saved, change, names):
    path, projector = saved
    embeddings = alignment.read_poi_embeddings(file, mapping)
    assert digest(alignment.load_projector(path, embeddings, 32).state_dict()) == digest(projector.state_dict())
    change(tmp_path)
    with pytest.raises(UserError) as error:
        alignment.load_projector(path, embeddings, 32)
    assert all(name in str(error.value) for name in names), error.value


def edit(folder, **changes):
    path = folder / PAM.config
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_configuration_beside_the_weights(saved, tmp_path):
    found = alignment.ProjectorConfig(**json.loads((tmp_path / PAM.config).read_text()))
    assert dataclasses.asdict(found) == {"hidden_size": 32, "embeddings": found.embeddings}
    assert len(found.embeddings) == 64
