"""Trees of pairs: loss and gradients of the pairs one by one, from fewer tokens."""
import json

import numpy as np
import pytest
import torch

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.llm import shared_prefix
from ga_llm.llm.backbone import add_lora, load_llm, load_tokenizer, train_by_name
from ga_llm.pairs import sft_data, token_cache
from geo_encoder import gps_tokens, injection

PLACES = [1, 2, 3, 5, 6, 7]     # of mapping_csv


class Pairs:
    """A data set from token lists, as far as trees need one."""

    def __init__(self, pairs, starts=None):
        self.ids, self.lengths = np.concatenate([np.array(pair) for pair in pairs]), np.array([len(p) for p in pairs])
        self.ends = self.lengths.cumsum()
        self.answer_starts = starts or [len(pair) - 1 for pair in pairs]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return {"input_ids": self.ids[self.ends[i] - self.lengths[i]:self.ends[i]],
                "answer_start": self.answer_starts[i]}


A, B, C = ([1, 2, 3, 4, 9], [1, 2, 3, 4, 5, 6, 8], [1, 2, 3, 4, 5, 6, 7, 7])


def test_plan_by_hand(monkeypatch):
    monkeypatch.setattr(shared_prefix, "LEAST", 1)
    assert shared_prefix.plan(Pairs([A, B, C]), 99) == [shared_prefix.Tree(0, (4, 6, 6), 6 + 1 + 1 + 2)]
    # A pair that shares less than those before it shortens what they share, so it begins a tree of its own.
    other = [8, 8, 8]
    assert shared_prefix.plan(Pairs([A, B, other, other]), 99) == [shared_prefix.Tree(0, (4, 4), 8),
                                                                  shared_prefix.Tree(2, (3, 3), 3)]
    assert shared_prefix.plan(Pairs([A, B, C]), 9) == [shared_prefix.Tree(0, (4, 4), 8), shared_prefix.Tree(2, (0,), 8)]
    assert shared_prefix.plan(Pairs([A]), 2) == [shared_prefix.Tree(0, (0,), 5)]


def test_every_pair_is_in_one_tree():
    draw = np.random.default_rng(0)
    history = draw.integers(0, 9, 500)
    pairs = [np.concatenate([history[:n], draw.integers(0, 9, draw.integers(1, 50))]).tolist()
             for n in sorted(draw.integers(1, 500, 60).tolist())]
    for limit in (0, 700, 10**9):
        trees = shared_prefix.TreeDataset(Pairs(pairs), limit)
        found = [pair["input_ids"].tolist() for tree in trees for pair in tree["pairs"]]
        assert found == pairs
        for tree, length in zip(trees, trees.lengths):
            batch = shared_prefix.TreeCollator()([tree])
            assert batch["input_ids"].shape == batch["position_ids"].shape == (1, length)
            assert length <= max(limit, max(len(pair["input_ids"]) for pair in tree["pairs"]))


def test_collator_by_hand():
    tree = {"pairs": [{"input_ids": np.array(ids), "answer_start": start} for ids, start in zip((A, B, C), (4, 5, 7))],
            "shared": (4, 6, 6)}
    alone = {"pairs": [{"input_ids": np.array([1, 2, 3]), "answer_start": 2}], "shared": (0,)}
    batch = shared_prefix.TreeCollator()([tree, alone])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 9, 8, 7, 7, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 4, 6, 6, 7, 0, 1, 2]]
    # B's answer begins in the trunk: its token 6 comes next behind the trunk's 5.
    assert batch["logits_to_keep"].tolist() == [3, 4, 5, 8, 11]
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [[9, 6, 8, 7, 3]]
    assert batch["layout"] == shared_prefix.Layout(blocks=[6, 1, 1, 2, 3], parts=[4, 2, 1, 1, 2, 3],
                                                   sees=[[0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [5]])


def user_pairs(tokenizer, tmp_path, max_length):
    """Two users' pairs, one with a twin that differs in the answer alone, as the token cache gives them."""
    records = []
    for user in (7, 12):
        visits = [prompts.check_in(prompts.FIELDS, f"2012-04-{1 + i:02} 18:00:09", user, PLACES[i * user % 6], 40.5,
                                   -73.5, "Bar", 1) for i in range(12)]
        for n in (1, 2, 2, 3):
            time = "2012-05-01 09:00:00"
            records.append({"question": prompts.question(user, [], visits[:3 * n], visits[3 * n:3 * n + 3],
                                                         prompts.ask_poi(time, user, 1, 13)),
                            "answer": prompts.answer_poi(time, user, PLACES[len(records) % 6])})
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(records))
    return token_cache.load(path, tokenizer, max_length, "m.csv")


@pytest.mark.parametrize("max_length", [5000, 520], ids=["whole", "left truncation"])
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full training"])
@pytest.mark.parametrize("checkpointing, copies", [(True, 0), (True, 2**30), (False, 0), (False, 2**30)])
def test_loss_and_gradients_are_those_of_separate_prompts(tiny_llama, mapping_csv, tmp_path, monkeypatch, max_length,
                                                          lora, checkpointing, copies):
    """LoRA, frozen GPS vectors, grouped queries, tied or untied; several trees in a row; relative difference 1e-4."""
    monkeypatch.setattr(shared_prefix, "COPIES", copies)
    mapping, folder = gps_tokens.read_gps_mapping(mapping_csv), tiny_llama(tie_embeddings=not lora)
    results = []
    for attention in ("sdpa", shared_prefix.SHARED_PREFIX):
        tokenizer, model = load_tokenizer(folder), load_llm(folder, 8192, attention, torch.float32)
        token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
        torch.manual_seed(0)
        injection.attach_untrained(model, mapping, token_ids)
        if lora:
            model = add_lora(model, 4, 8, dropout=0.0)
            train_by_name(model, "embed,norm")
            for name, parameter in model.named_parameters():        # B starts at zero: A would get no gradient
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        data = user_pairs(tokenizer, tmp_path, max_length)
        trees = shared_prefix.TreeDataset(data, 4000)
        answers = int((data.lengths - data.answer_starts).sum())
        if attention == "sdpa":
            collate = sft_data.AnswerCollator(tokenizer.pad_token_id)
            batches = [collate([data[i]]) for i in range(len(data))]
        else:
            batches = [shared_prefix.TreeCollator()([trees[i], trees[(i + 1) % len(trees)]] if i == 0 else [trees[i]])
                       for i in range(len(trees)) if i != 1]
        loss = sum(model(**batch, num_items_in_batch=answers).loss for batch in batches)
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (separate, expected), (shared, gradients) = results
    assert (data.tokens > data.lengths).any() == (max_length == 520)
    assert trees.lengths.sum() < (0.65 if max_length == 5000 else 0.95) * data.lengths.sum()
    assert shared == pytest.approx(separate, rel=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() and expected[name].norm() > 0, name


def test_attention_of_a_model_that_needs_more_is_refused():
    module, x = torch.nn.Module(), torch.zeros(1, 2, 3, 8)
    with pytest.raises(UserError, match="sliding_window"):
        shared_prefix.shared_prefix_attention(module, x, x, x, None, sliding_window=4)


def test_queries_and_keys_that_autocast_leaves_in_float32():
    """RoPE multiplies by a float32 cosine, where all of an fp32 model is trained in bf16; values come as bf16."""
    query, key, value = (torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    layout = shared_prefix.Layout([5, 3], [5, 3], [[0], [0, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = shared_prefix.shared_prefix_attention(torch.nn.Module(), query, key, value.bfloat16(), None,
                                                       layout=layout)
    exact, _ = shared_prefix.shared_prefix_attention(torch.nn.Module(), query, key, value, None, layout=layout)
    assert out.dtype == torch.bfloat16 and (out - exact).abs().max() < 0.03


def test_targets_of_the_trunk_count_once():
    marks = [np.array([False, True, False, True, True]), np.array([False, True, False, True, False, True, False]),
             np.array([False, True, False, True, False, True, False, True])]
    tree = {"pairs": [{"input_ids": np.array(ids), "answer_start": start, "targets": targets}
                      for ids, start, targets in zip((A, B, C), (4, 5, 7), marks)], "shared": (4, 6, 6)}
    batch = shared_prefix.TreeCollator()([tree])
    # A's own 9; of the trunk 2, 4 and 6, which C counts, and C's last 7. Positions are those of the token before.
    assert sorted(zip(batch["logits_to_keep"].tolist(), batch["labels"][0].tolist())) == [
        (0, 2), (2, 4), (3, 9), (4, 6), (8, 7)]


def test_pairs_that_share_nothing_have_the_loss_of_a_padded_batch(tiny_llama, mapping_csv, tmp_path):
    """On every POI id, in one row of trees and in a padded batch."""
    tokenizer = load_tokenizer(tiny_llama())
    tokens = gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv))
    ask = prompts.ask_poi("2012-04-04 09:00:00", 7, 1, 13)
    pairs = [prompts.join(prompts.question(user, [], [f"POI id {i} <GPS {i}>." for i in PLACES[:1 + user]], [], ask),
                          prompts.answer_poi("2012-04-04 09:00:00", user, PLACES[user])) for user in range(3)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([dict(zip(("question", "answer"), prompts.split(pair))) for pair in pairs]))
    data = token_cache.load(path, tokenizer, 512, mapping_csv, poi_ids=True)
    losses = []
    for attention, collate, items in (
            ("sdpa", sft_data.AnswerCollator(tokenizer.pad_token_id), list(data)),
            (shared_prefix.SHARED_PREFIX, shared_prefix.TreeCollator(),
             [{"pairs": [item], "shared": (0,)} for item in data])):
        model = load_llm(tiny_llama(), 512, attention, torch.float32)
        gps_tokens.add_rows(model, len(tokenizer), tokens)
        losses.append(model(**collate(items)).loss)
    torch.testing.assert_close(*losses)
    assert sum(len(prompts.POI_ID.findall(pair)) for pair in pairs) == 9
    assert sum(int(item["targets"].sum()) for item in data) == 9       # ids of one digit, one token each
