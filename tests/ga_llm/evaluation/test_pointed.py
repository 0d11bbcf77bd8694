"""Ranking with a pointer: every POI's probability is that of the mixture, however it is searched for."""
import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import pointed, ranking
from ga_llm.llm import backbone, beside, pointing
from ga_llm.llm.pointer import Pointer, PointerConfig
from ga_llm.llm.tree_attention import TREE
from ga_llm.pairs import sft_data, spelling
from ga_llm.pairs.check_ins import CheckIns
from geo_encoder import gps_tokens

TEST = artifacts.questions("test", "sample", 2, False)


class Asked:
    """A tiny LLM with a pointer, and test prompts of a kind of question."""

    def __init__(self, folder, tiny, kind, count=6):
        folder = folder / kind
        self.mapping = gps_tokens.read_gps_mapping(folder / "sample_gps_mapping.csv")
        self.tokenizer = backbone.load_tokenizer(tiny)
        self.llm = backbone.load_llm(tiny, 2048, TREE, torch.float32).eval()
        token_ids = gps_tokens.add_gps_tokens(self.tokenizer, self.mapping, self.llm)
        torch.manual_seed(0)
        self.llm.get_input_embeddings().weight.data += .05 * torch.randn_like(self.llm.get_input_embeddings().weight)
        made = Pointer(PointerConfig(self.llm.config.hidden_size, 4), self.mapping)
        for parameter in made.parameters():
            parameter.data += .3 * torch.randn(parameter.shape)
        modules = beside.Beside(pointer=made)
        if kind != "text":
            times = gps_tokens.add_time_tokens(self.tokenizer, self.llm)
            modules.moments = beside.moment.moment_injection(self.llm.config.hidden_size, times)
        modules.settle(self.llm)
        path = folder / TEST
        pairs = sft_data.read_test_pairs(path, "")
        spelled = spelling.Spelling(self.tokenizer, sorted(self.mapping.ids.tolist()),
                                    spelling.read_answers(pairs, path))
        self.trie = ranking.Trie(spelled.tokens)
        check_ins = CheckIns(path, hashlib.sha256(path.read_bytes()).hexdigest(), self.mapping.ids)
        prompts = spelled.prompts(pairs, 2048)
        self.plain = prompts[::max(1, len(prompts) // count)]
        self.prompts = [dataclasses.replace(prompt, check_ins=check_ins.shown(prompt.pair, places, at))
                        for prompt, at, places in pointed.positions(self.plain, token_ids)]

    def ranked(self, prompts, **options):
        return {prompt.pair: result for group in ranking.plan(prompts, 4)
                for chunk, results in ranking.rank(self.llm, self.trie, group, **options)
                for prompt, result in zip(chunk, results)}

    def one_by_one(self, prompt):
        """{POI: log-probability}, from a plain forward for each."""
        ids, shown = prompt.input_ids, prompt.check_ins
        states = self.llm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        keys = torch.cat([states[shown.at], torch.zeros(1, states.shape[1])])
        found = self.llm.pointer(states[None, -1:], keys[None], *(
            torch.from_numpy(np.asarray(part, dtype=np.int64))[None] for part in (
                shown.second, shown.place, shown.first)), torch.tensor([[len(shown.at)]]))
        values = {}
        for poi, spelled in self.trie.spelled.items():
            log_p = self.llm(torch.tensor([ids + list(spelled)])).logits[0].log_softmax(-1)
            log_llm = sum(log_p[len(ids) + i - 1, token].item() for i, token in enumerate(spelled))
            row = self.mapping.ids.tolist().index(poi)
            visits = [j for j, place in enumerate(shown.place[:-1].tolist()) if place == row]
            share = float(found.share[0, 0, visits[-1]]) if visits else 0.0
            values[poi] = math.log(math.exp(float(found.log_gate) + log_llm) + share)
        return values


@torch.inference_mode()
@pytest.mark.parametrize("style, kind", [*[("llama3", kind) for kind in ("tokens", "names", "moments", "text")],
                                         ("sentencepiece", "tokens"), ("sentencepiece", "moments")])
def test_every_poi_has_the_probability_of_the_mixture(asked_city, tiny_llama, monkeypatch, style, kind):
    asked = Asked(asked_city, tiny_llama(style), kind)
    whole = asked.ranked(asked.prompts, full=True)
    for prompt in asked.prompts:
        expected = asked.one_by_one(prompt)
        assert whole[prompt.pair].log_probs.tolist() == pytest.approx(
            [expected[poi] for poi in asked.trie.candidates], abs=2e-4)
    monkeypatch.setattr(ranking, "WIDTH", 2)
    monkeypatch.setattr(ranking, "PASS_NODES", 2)
    pruned = asked.ranked(asked.prompts, top=5)
    for pair, result in pruned.items():
        table = torch.from_numpy(whole[pair].log_probs)
        target = asked.trie.place[next(p.target for p in asked.prompts if p.pair == pair)]
        assert result.rank == ranking.rank_of(table, target)
        assert [poi for poi, _ in result.top] == [asked.trie.candidates[i] for i in table.topk(5).indices.tolist()]


@torch.inference_mode()
def test_without_the_pointers_share_nothing_changes(asked_city, tiny_llama):
    asked = Asked(asked_city, tiny_llama(), "text")
    asked.llm.pointer.gates.weight.zero_()
    asked.llm.pointer.gates.bias.copy_(torch.tensor([60.] + [0.] * 4))
    with_pointer = asked.ranked(asked.prompts, full=True)
    del asked.llm.pointer
    without = asked.ranked(asked.plain, full=True)
    for pair, result in without.items():
        assert with_pointer[pair].rank == result.rank
        assert with_pointer[pair].log_probs.tolist() == pytest.approx(result.log_probs.tolist(), abs=1e-6)


@torch.inference_mode()
def test_the_check_of_attention_asks_the_llm_alone(asked_city, tiny_llama):
    asked = Asked(asked_city, tiny_llama(), "text")
    ranking.check(asked.llm, asked.trie, asked.prompts[0])


def test_prompts_without_times_are_refused(asked_city, tiny_llama):
    asked = Asked(asked_city, tiny_llama(), "text")
    with pytest.raises(UserError, match="the model has a pointer, which needs the times of its check-ins"):
        asked.ranked(asked.plain)
    assert pointing.MODULE == "pointer"
