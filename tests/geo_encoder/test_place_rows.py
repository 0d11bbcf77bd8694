"""Places' rows as sums, `<TIME n>` as a sum of tables: what the LLM reads and answers with them."""
import dataclasses
import datetime

import numpy as np
import pytest
import torch

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.llm import beside
from ga_llm.llm.backbone import add_lora, load_llm, load_tokenizer, train_by_name
from geo_encoder import gps_tokens, moment, place_rows
from geo_encoder.encoder import GeoEncoderConfig


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def world(request, tiny_llama, mapping_csv):
    """(mapping, LLM, token ids of its places, rows)"""
    mapping = gps_tokens.read_gps_mapping(mapping_csv)
    base = tiny_llama(tie_embeddings=request.param)
    tokenizer, llm = load_tokenizer(base), load_llm(base, 512, "sdpa", torch.float32)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, llm)
    torch.manual_seed(0)
    width = llm.config.hidden_size
    config = place_rows.PlaceRowsConfig(width, 3, dataclasses.asdict(GeoEncoderConfig(width, "cells")))
    rows = place_rows.PlaceRows(config, mapping, token_ids)
    rows.categories.copy_(torch.arange(len(token_ids)) % 3)
    for parameter in rows.parameters():
        parameter.data.normal_(std=.3)
    return mapping, llm, token_ids, rows


def test_they_are_added_where_a_place_is_read_and_answered(world):
    _, llm, token_ids, rows = world
    ids = torch.tensor([[5, int(token_ids[2]), 7, int(token_ids[0])]])
    plain, head = llm.get_input_embeddings()(ids).detach(), llm.get_output_embeddings().weight.detach().clone()
    place_rows.attach(llm, rows)
    added = rows()
    read = llm.get_input_embeddings()(ids)
    torch.testing.assert_close(read - plain, torch.stack([0 * added[0], added[2], 0 * added[0], added[0]])[None])
    output = llm(ids, output_hidden_states=True)
    head[torch.from_numpy(token_ids)] += added
    torch.testing.assert_close(output.logits, output.hidden_states[-1] @ head.T, rtol=1e-4, atol=1e-4)
    output.logits[..., token_ids].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in rows.parameters())


@torch.no_grad()
def test_folded_they_are_plain_rows(world):
    mapping, llm, token_ids, rows = world
    ids = torch.tensor([[5, int(token_ids[2]), 7, int(token_ids[0])]])
    place_rows.attach(llm, rows)
    expected = llm(ids).logits
    state = {f"{place_rows.MODULE}.{name}": tensor for name, tensor in rows.state_dict().items()}
    described = {place_rows.MODULE: dataclasses.asdict(rows.config)}
    hooked = llm.get_output_embeddings()
    llm.get_input_embeddings()._forward_hooks.clear()
    del hooked.forward
    beside.read(described, state, "file", mapping, llm.config.hidden_size, token_ids, None).settle(llm)
    torch.testing.assert_close(llm(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="place_rows does not fit"):
        beside.read(described, {name: tensor[:1] for name, tensor in state.items()}, "file", mapping,
                    llm.config.hidden_size, token_ids, None)
    with pytest.raises(UserError, match="cannot be built"):
        beside.read({"something": {}}, state, "file", mapping, llm.config.hidden_size, token_ids, None)


def test_a_moment_is_the_sum_of_its_tables():
    """By Python's calendar: hour of the week, half hour of a workday or a weekend's day, step since the one before."""
    found = moment.moment_injection(8, np.arange(prompts.MOMENTS) + 50)
    times = [datetime.datetime(2012, 4, 3) + datetime.timedelta(hours=7.6 * n) for n in range(40)]
    numbers = prompts.moments([int(time.replace(tzinfo=datetime.timezone.utc).timestamp()) for time in times])
    vectors = found.encoder(found.features[numbers])
    for n, (time, vector) in enumerate(zip(times, vectors)):
        half = time.hour * 2 + time.minute // 30 + 48 * (time.weekday() >= 5)
        gap = list(prompts.STEPS).index(240) if n else 16        # 7.6 hours: at least 4, less than 8
        torch.testing.assert_close(vector, found.encoder.hour.weight[time.weekday() * 24 + time.hour]
                                   + found.encoder.half_hour.weight[half] + found.encoder.gap.weight[gap])


def test_moments_learn_and_their_rows_do_not(tiny_llama, mapping_csv):
    tokenizer, llm = load_tokenizer(tiny_llama()), load_llm(tiny_llama(), 512, "sdpa", torch.float32)
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv), llm)
    times = gps_tokens.add_time_tokens(tokenizer, llm)
    assert len(times) == 7 * 48 * 17
    assert tokenizer("<TIME 5><GPS 1>", add_special_tokens=False)["input_ids"][0] == times[5]
    model = add_lora(llm, 4, 8, 0.0)
    train_by_name(model, "embed")
    beside.add_moments(llm, times)
    model(torch.tensor([[5, int(times[100]), 6, int(times[3])]])).logits.square().sum().backward()
    assert llm.get_input_embeddings().weight.grad[torch.from_numpy(times)].abs().sum() == 0
    assert llm.get_input_embeddings().weight.grad[5].abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in llm.moment_injection.parameters())
