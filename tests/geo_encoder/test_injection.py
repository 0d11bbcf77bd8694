"""`<GPS n>` by id, and its vector in the LLM: with gradient in stage 1, from a table in stage 2."""
import numpy as np
import pytest
import torch

from ga_llm.base.cli import UserError
from ga_llm.llm.backbone import add_lora, load_llm, load_tokenizer
from geo_encoder import gps_tokens, injection
from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.quadkey import quadkeys
from geo_encoder.weights import save_encoder

TEXT = "12 <GPS 5> then <GPS 1>, back at <GPS 5>."


def mapping_file(tmp_path, ids):
    path = tmp_path / "m.csv"
    path.write_text("GPS_id,Latitude,Longitude\n" + "".join(f"{i},{40 + i / 100},{-74 - i / 100}\n" for i in ids))
    return path


@pytest.fixture
def setup(tiny_llama, mapping_csv):
    mapping = gps_tokens.read_gps_mapping(mapping_csv)
    tokenizer = load_tokenizer(tiny_llama())
    model = load_llm(tiny_llama(), 512, "sdpa", torch.float32)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    torch.manual_seed(1)
    encoder = build_encoder(GeoEncoderConfig(model.config.hidden_size)).eval()
    return mapping, tokenizer, model, token_ids, encoder


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [1, 2, 3, 4], [3, 1, 2, 40]], ids=["nyc", "tky and ca", "any order"])
def test_token_to_place_by_id(tiny_llama, tmp_path, ids):
    """Whatever the id scheme, `<GPS n>` is injected with the coordinates of the row whose GPS_id is n."""
    mapping = gps_tokens.read_gps_mapping(mapping_file(tmp_path, ids))
    tokenizer = load_tokenizer(tiny_llama())
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping)
    layer = injection.gps_injection(torch.nn.Identity(), 25, mapping, token_ids)
    for n in ids:
        tokens = tokenizer(f"<GPS {n}>", add_special_tokens=False)["input_ids"]
        assert len(tokens) == 1
        row = layer.rows[tokens[0]]
        assert layer.features[row].tolist() == quadkeys([40 + n / 100], [-74 - n / 100])[0].tolist()


@pytest.mark.parametrize("style", ["llama3", "sentencepiece"])
def test_tokens_of_places_cost_the_same_each(tiny_llama, mapping_csv, tmp_path, style):
    """None stands in transformers' list of extra special tokens, through which it looks for each, now and at each load;
    and yet they are special, in the same place, when what was saved is loaded."""
    mapping, tokenizer = gps_tokens.read_gps_mapping(mapping_csv), load_tokenizer(tiny_llama(style))
    known, listed = len(tokenizer), list(tokenizer.extra_special_tokens)
    ids = [gps_tokens.add_gps_tokens(tokenizer, mapping), gps_tokens.add_poi_tokens(tokenizer, mapping)]
    assert np.concatenate(ids).tolist() == list(range(known, known + 2 * len(mapping.ids)))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    for one in (tokenizer, loaded):
        assert list(one.extra_special_tokens) == listed and len(one) == known + 2 * len(mapping.ids)
        tokens = one("at <GPS 5><POI 5>, <GPS 1>.")["input_ids"]
        assert [token for token in tokens if token >= known] == [
            ids[kind][mapping.ids.tolist().index(n)] for kind, n in ((0, 5), (1, 5), (0, 1))]
        assert one.decode(tokens, skip_special_tokens=True).replace(" ", "") == "at,."
    again = [gps_tokens.add_gps_tokens(loaded, mapping), gps_tokens.add_poi_tokens(loaded, mapping)]
    assert np.array_equal(again, ids) and len(loaded) == len(tokenizer)


def test_injected_embeddings(setup):
    mapping, tokenizer, model, token_ids, encoder = setup
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    plain = model.get_input_embeddings()(ids)
    handle = injection.attach(model, injection.gps_injection(encoder, 25, mapping, token_ids))
    injected = model.get_input_embeddings()(ids)
    expected = plain.clone()
    for position, token in enumerate(ids[0].tolist()):
        if token in token_ids:
            row = int(np.flatnonzero(token_ids == token)[0])
            digits = torch.from_numpy(quadkeys(mapping.latitude[row:row + 1], mapping.longitude[row:row + 1]))
            expected[0, position] = encoder(digits)[0]
    assert (expected != plain).any(-1).sum() == 3
    torch.testing.assert_close(injected, expected)
    handle.remove()
    torch.testing.assert_close(model.get_input_embeddings()(ids), plain)


def test_table_equals_encoder_also_in_generate(setup, tmp_path):
    mapping, tokenizer, model, token_ids, encoder = setup
    batch = tokenizer([TEXT], return_tensors="pt")
    plain = model(**batch).logits
    handle = injection.attach(model, injection.gps_injection(encoder, 25, mapping, token_ids))
    encoded = model(**batch).logits
    handle.remove()
    save_encoder(encoder.state_dict(), GeoEncoderConfig(model.config.hidden_size), tmp_path / "e.pth")
    injection.attach_encoders(model, injection.load_encoders(model, mapping, token_ids, tmp_path / "e.pth"))
    torch.testing.assert_close(model(**batch).logits, encoded, rtol=1e-4, atol=1e-5)
    assert (encoded - plain).abs().max() > 1e-3
    first = model.generate(**batch, max_new_tokens=1, do_sample=False)[0, -1]
    assert first == encoded[0, -1].argmax()


def test_distinct_places_are_encoded_once_with_gradient(setup):
    mapping, tokenizer, model, token_ids, encoder = setup
    sizes = []
    encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    injection.attach(model, injection.gps_injection(encoder, 25, mapping, token_ids))
    batch = tokenizer([TEXT, "<GPS 1>" * 9], return_tensors="pt", padding=True)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert sizes == [2]
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_encode_each_draws_a_dropout_for_every_token(setup):
    """TEXT has <GPS 5> twice. As a rule both have one vector; with `each`, as in the released code, two while training,
    and in evaluation one again, that of the encoder without dropout."""
    mapping, tokenizer, model, token_ids, encoder = setup
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    embeddings, place = model.get_input_embeddings()(ids), tokenizer.convert_tokens_to_ids("<GPS 5>")
    layer = injection.gps_injection(encoder, 25, mapping, token_ids)

    def both(each, training):
        layer.each = each
        return layer.train(training)(ids, embeddings)[0, ids[0] == place]

    for each, training, alike in ((False, True, True), (True, True, False), (True, False, True)):
        first, second = both(each, training)
        assert torch.equal(first, second) == alike, (each, training)
    torch.testing.assert_close(both(True, False), both(False, False))


def test_batch_without_a_place_still_gives_gradients(setup):
    mapping, tokenizer, model, token_ids, encoder = setup
    injection.attach(model, injection.gps_injection(encoder, 25, mapping, token_ids))
    batch = tokenizer(["no place"], return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in encoder.parameters())


def test_gradient_equals_one_by_one(setup):
    """Scattering distinct places accumulates the gradient that encoding each token by itself gives."""
    mapping, tokenizer, model, token_ids, encoder = setup
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    layer = injection.gps_injection(encoder, 25, mapping, token_ids)
    embeddings, weights = model.get_input_embeddings()(ids), torch.randn(ids.shape[1], model.config.hidden_size)
    (layer(ids, embeddings)[0] * weights).sum().backward()
    together = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    for position, token in enumerate(ids[0].tolist()):
        if token in token_ids:
            (encoder(layer.features[layer.rows[token]][None])[0] * weights[position]).sum().backward()
    for mine, expected in zip(together, encoder.parameters()):
        torch.testing.assert_close(mine, expected.grad, rtol=1e-3, atol=1e-5)


def test_peft_keeps_the_encoders_lora_trainable(setup):
    from geo_encoder.weights import add_lora as add_encoder_lora
    mapping, tokenizer, model, token_ids, encoder = setup
    add_encoder_lora(encoder, 4, 8)
    peft = add_lora(model, 4, 8, dropout=0.0)
    injection.attach(model, injection.gps_injection(encoder, 25, mapping, token_ids))
    batch = tokenizer([TEXT], return_tensors="pt")
    peft(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any("gps_injection" in name for name in trained) and any("q_proj" in name for name in trained)
    assert all(p.grad is not None for p in peft.parameters() if p.requires_grad)


def test_rows_of_places_get_no_gradient_when_tied(tiny_llama, mapping_csv):
    mapping = gps_tokens.read_gps_mapping(mapping_csv)
    folder = tiny_llama(tie_embeddings=True)
    tokenizer = load_tokenizer(folder)
    model = load_llm(folder, 512, "sdpa", torch.float32)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    weight = model.get_input_embeddings().weight
    injection.attach_table(model, injection.gps_injection(build_encoder(GeoEncoderConfig(32)), 25, mapping, token_ids))
    batch = tokenizer([TEXT], return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.get_output_embeddings().weight is weight
    assert weight.grad[torch.from_numpy(token_ids)].abs().sum() == 0 and weight.grad[10:60].abs().sum() > 0


def test_new_rows_are_the_mean_of_the_old(setup):
    _, tokenizer, model, token_ids, _ = setup
    first = token_ids.min()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        expected = layer.weight[:first].mean(0).expand(len(token_ids), -1)
        torch.testing.assert_close(layer.weight[torch.from_numpy(token_ids)], expected)


@pytest.mark.parametrize("content, message", [
    ("GPS_id,Latitude\n1,2\n", "no column Longitude"),
    ("GPS_id,Latitude,Longitude\n", "no rows"),
    ("GPS_id,Latitude,Longitude\n1,40,-74\n1,41,-74\n", "line 3: GPS_id stands twice"),
    ("GPS_id,Latitude,Longitude\n1,40,-74\nx,41,-74\n", "line 3: GPS_id is not"),
    ("GPS_id,Latitude,Longitude\n1,-74,40\n2,91,40\n", "line 3: Latitude"),
    ("GPS_id,Latitude,Longitude\n1,40,\n", "line 2: Longitude"),
    ("", "empty"),
])
def test_bad_mappings(tmp_path, content, message):
    path = tmp_path / "m.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        gps_tokens.read_gps_mapping(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
