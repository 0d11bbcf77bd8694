"""The loss of a model with a pointer: against loops over the places that are asked for, pair by pair."""
import math

import numpy as np
import pytest
import torch

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.llm import backbone, beside, pointing, shared_prefix
from ga_llm.llm.pointer import Pointer, PointerConfig
from ga_llm.pairs import check_ins, sft_data, token_cache
from ga_llm.pairs.check_ins import CheckIns
from ga_llm.training import batches
from geo_encoder import gps_tokens

TRAIN = artifacts.questions("train", "sample", 2, False)


class World:
    """A tiny LLM with a pointer, and the pairs of a kind of question."""

    def __init__(self, folder, tiny, kind, every, max_length=1024, attention="sdpa", pairs=12):
        folder = folder / kind
        self.mapping = gps_tokens.read_gps_mapping(folder / "sample_gps_mapping.csv")
        self.tokenizer = backbone.load_tokenizer(tiny)
        self.token_ids = gps_tokens.add_gps_tokens(self.tokenizer, self.mapping)
        times = gps_tokens.add_time_tokens(self.tokenizer) if kind != "text" else None
        self.path = folder / TRAIN
        dataset = token_cache.load(self.path, self.tokenizer, max_length, "", poi_ids=True)
        self.check_ins = CheckIns(self.path, dataset.sha256, self.mapping.ids)
        self.pairs = pointing.PointedPairs(dataset, self.check_ins, self.token_ids, every)
        self.llm = backbone.load_llm(tiny, max_length, attention, torch.float32)
        gps_tokens.add_rows(self.llm, len(self.tokenizer), self.token_ids)
        if times is not None:
            beside.add_moments(self.llm, times)
        torch.manual_seed(0)
        self.llm.get_input_embeddings().weight.data += .05 * torch.randn_like(self.llm.get_input_embeddings().weight)
        self.pointer = Pointer(PointerConfig(self.llm.config.hidden_size, 4), self.mapping)
        self.pointer.categories.copy_(torch.from_numpy(self.check_ins.categories(len(self.mapping.ids))))
        for parameter in self.pointer.parameters():
            parameter.data += .3 * torch.randn(parameter.shape)
        pointing.attach(self.llm, self.pointer)
        self.some = [self.pairs[i] for i in range(0, len(self.pairs), max(1, len(self.pairs) // pairs))]

    @property
    def collator(self):
        base = sft_data.AnswerCollator(self.tokenizer.pad_token_id)
        return pointing.PointedCollator(base, len(self.mapping.ids))


def one_by_one(world, every):
    """(sum of all log-probabilities, their tokens) from plain forwards, and the pointer asked for one place at a time.

    Places of a pair that end before its token "since" are left out.
    """
    total, count = 0.0, 0
    for pair in world.some:
        ids, shown = pair["input_ids"], pair["shown"]
        output = world.llm(torch.from_numpy(ids)[None], output_hidden_states=True)
        log_p, states = output.logits[0].float().log_softmax(-1), output.hidden_states[-1][0]
        spelled = world_marks(world, pair)
        counted = spelled if every else np.arange(len(ids)) >= pair["answer_start"]
        i = 1
        while i < len(ids):
            if not counted[i]:
                i += 1
                continue
            last = i
            while spelled[i] and last + 1 < len(ids) and spelled[last + 1]:
                last += 1
            if last < pair.get("since", 0):
                i = last + 1
                continue
            log_llm = sum(log_p[j - 1, ids[j]] for j in range(i, last + 1))
            if spelled[i]:
                n = int((shown.at < i).sum())        # check-ins that stand before
                m = min(n + 2, len(shown.second))           # the next tells whether the target ends its trajectory
                keys = torch.cat([states[shown.at[:n]], torch.zeros(m - n, states.shape[1])])
                found = world.pointer(states[None, i - 1:i], keys[None], *(
                    torch.from_numpy(part[:m].astype(np.int64))[None] for part in (
                        shown.second, shown.place, shown.first)), torch.tensor([[n]]))
                pointed = float((found.share[0, 0] * torch.from_numpy(shown.place[:m] == shown.place[n])).sum())
                log_llm = math.log(math.exp(float(found.log_gate) + float(log_llm)) + pointed)
            total, count = total + float(log_llm), count + last + 1 - i
            i = last + 1
    return total, count


def world_marks(world, pair):
    """Which tokens spell a place: digits behind "POI id", or <GPS n> behind <TIME n>; from their texts."""
    texts = [token.replace("Ġ", " ").replace("▁", " ") for token in
             world.tokenizer.convert_ids_to_tokens(pair["input_ids"].tolist())]
    marks, spelled = [], ""
    for before, text in zip(["", *texts], texts):
        spelled += text
        digits = text.strip().isdigit() and spelled.rstrip("0123456789").rstrip().endswith("POI id")
        marks.append(digits or text.startswith("<GPS") and before.startswith("<TIME"))
    return np.array(marks)


@torch.no_grad()
@pytest.mark.parametrize("style, kind", [*[("llama3", kind) for kind in ("tokens", "names", "moments", "text")],
                                         ("sentencepiece", "tokens"), ("sentencepiece", "moments")])
@pytest.mark.parametrize("every", [True, False])
def test_the_loss_is_that_of_the_mixture(asked_city, tiny_llama, style, kind, every):
    world = World(asked_city, tiny_llama(style), kind, every)
    total, count = one_by_one(world, every)
    batch = world.collator(world.some)
    loss = world.llm(**batch).loss
    assert loss.item() == pytest.approx(-total / count, rel=1e-4)
    whole = world.llm(**batch, num_items_in_batch=torch.tensor(2 * count)).loss
    assert whole.item() == pytest.approx(-total / count / 2, rel=1e-4)
    together = batches.Unpacked(world.collator)([world.some[:3], world.some[3:]])
    assert world.llm(**together).loss.item() == pytest.approx(loss.item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind, every", [("tokens", True), ("text", True), ("text", False)])
def test_trees_have_the_loss_of_their_pairs(asked_city, tiny_llama, monkeypatch, kind, every):
    monkeypatch.setattr(shared_prefix, "LEAST", 1)
    world = World(asked_city, tiny_llama(), kind, every, attention=shared_prefix.SHARED_PREFIX)
    trees = shared_prefix.TreeDataset(world.pairs, 4096)
    chosen = sorted(trees.trees, key=lambda tree: -len(tree.shared))[:2]
    assert len(chosen[0].shared) > 2
    batch = shared_prefix.TreeCollator(len(world.mapping.ids))([trees[trees.trees.index(tree)] for tree in chosen])
    world.some = []
    for tree in chosen:     # of a beginning that is shared, a place counts once: in the last pair that has it
        world.some += [{**world.pairs[tree.first + i], "since": shared if every and i < len(tree.shared) - 1 else 0}
                       for i, shared in enumerate(tree.shared)]
    total, count = one_by_one(world, every)
    assert count == batch["labels"].numel()
    assert world.llm(**batch).loss.item() == pytest.approx(-total / count, rel=1e-4)


@torch.no_grad()
def test_without_the_pointers_share_it_is_the_llms_loss(asked_city, tiny_llama):
    world = World(asked_city, tiny_llama(), "text", True)
    world.pointer.gates.weight.zero_()
    world.pointer.gates.bias.copy_(torch.tensor([50.] + [0.] * 4))
    batch = world.collator(world.some)
    plain = {name: value for name, value in batch.items() if name != "pointer"}
    assert world.llm(**batch).loss.item() == pytest.approx(world.llm(**plain).loss.item(), rel=1e-5)


def test_every_weight_of_the_pointer_learns(asked_city, tiny_llama):
    world = World(asked_city, tiny_llama(), "tokens", True)
    world.llm(**world.collator(world.some)).loss.backward()
    for name, parameter in world.pointer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad.abs().sum() > 0 for p in world.llm.moment_injection.parameters())


@torch.no_grad()
def test_a_cut_pair_keeps_its_latest_check_ins(asked_city, tiny_llama):
    world = World(asked_city, tiny_llama(), "text", True, max_length=160)
    cut = [pair for pair, tokens in zip(world.pairs, world.pairs.tokens) if tokens > 160]
    assert cut
    world.some = cut[:4]
    total, count = one_by_one(world, True)
    # A place whose first digits were cut off is spelled by what is left, at a token that no check-in stands before.
    batch = world.collator(world.some)
    assert world.llm(**batch).loss.item() == pytest.approx(-total / count, rel=1e-3)


def test_check_ins_of_other_questions_are_refused(asked_city, tiny_llama, tmp_path):
    world = World(asked_city, tiny_llama(), "text", True)
    with pytest.raises(UserError, match="not of .* as it is now; make both again"):
        CheckIns(world.path, "0" * 64, world.mapping.ids)
    with pytest.raises(UserError, match="has no row in the GPS mapping"):
        CheckIns(world.path, world.pairs.sha256, world.mapping.ids[:3])
    pair = world.some[5]
    with pytest.raises(UserError, match="pair 0 has other check-ins than the question shows"):
        world.check_ins.shown(0, np.roll(pair["shown"].place[:-1], 1) + 1, pair["shown"].at)
    (tmp_path / TRAIN).write_bytes(world.path.read_bytes())
    artifacts.question_settings(tmp_path / TRAIN).write_text('{"fields": ["time", "poi"]}')
    with pytest.raises(UserError, match="its check-ins show no <GPS n> .time, poi."):
        check_ins.read(tmp_path / TRAIN, world.mapping.ids)
    with pytest.raises(UserError, match="not found; make it with"):
        CheckIns(tmp_path / TRAIN, world.pairs.sha256, world.mapping.ids)
    beside_it = artifacts.check_ins(tmp_path / TRAIN)
    content = artifacts.check_ins(world.path).read_bytes()
    for damaged in (content[:50], content[:-8], b"\0" * 64):
        beside_it.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            CheckIns(tmp_path / TRAIN, world.pairs.sha256, world.mapping.ids)
