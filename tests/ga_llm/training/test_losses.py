"""The loss that is trained on is the one that the flags say, for pairs one by one and as trees."""
import argparse
import json

import pytest
import torch

from ga_llm.base.cli import UserError
from ga_llm.llm import backbone
from ga_llm.pairs import sft_data, token_cache
from ga_llm.training import arguments, common, losses, trainers
from geo_encoder import gps_tokens

# A trunk of 60 tokens and more without a POI id: trees count the ids of what pairs share once.
BEGINNING = "<question>: " + "user 7 was at a bar, a shop, a park and a bar. " * 3
PAIRS = [(f"{BEGINNING}At POI id {i} <GPS {i}>. Where next?", f"<answer>: user 7 will visit POI id {j}.")
         for i, j in ((1, 2), (3, 5), (12, 1), (7, 13))]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([dict(zip(("question", "answer"), pair)) for pair in PAIRS]))
    return path


@pytest.fixture
def train(tiny_llama, mapping_csv, data, tmp_path):
    """train(folder, **flags): a trainer that has made one step with all pairs, as stage 2 without an encoder."""
    def run(folder, **flags):
        size = 1 if flags.get("shared_prefix") else len(PAIRS)
        options = {"model_name_or_path": tiny_llama(), "data_path": data, "gps_mapping_path": mapping_csv,
                   "output_dir": tmp_path / folder, "model_max_length": 256, "load_in_4bit": False, "max_steps": 1,
                   "use_full_attn": True, "per_device_train_batch_size": size, "logging_steps": 1,
                   "learning_rate": 0.01, "optim": "sgd", "max_grad_norm": 0, **flags}
        args = arguments.parse(arguments.SFTArguments, [p for k, v in options.items() for p in (f"--{k}", str(v))])
        setup = common.set_up(args)
        model = backbone.add_lora(setup.model, 8, 16, 0.0)
        backbone.train_by_name(model, "embed,norm")
        trainer = trainers.GATrainer(model=model, args=args, train_dataset=setup.train_dataset,
                                     data_collator=setup.collator, processing_class=setup.tokenizer)
        trainer.train()
        assert not flags.get("shared_prefix") or len(setup.train_dataset) == 1
        return trainer
    return run


def by_hand(model_folder, mapping_csv, data, poi_ids, smoothing):
    """Each pair by itself through the base model: the mean over all counted tokens."""
    tokenizer = backbone.load_tokenizer(model_folder)
    model = backbone.load_llm(model_folder, 256, "sdpa", torch.float32)
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv), model)
    terms = []
    for pair in token_cache.load(data, tokenizer, 256, mapping_csv, poi_ids=poi_ids):
        ids = torch.tensor(pair["input_ids"]).long()
        counted = torch.arange(len(ids)) >= pair["answer_start"]
        if poi_ids:
            counted = torch.from_numpy(pair["targets"].copy())
        with torch.no_grad():
            probabilities = model.eval()(ids[None]).logits[0].log_softmax(-1)
        for i in counted.nonzero().flatten().tolist():
            row = probabilities[i - 1]
            terms.append((smoothing - 1) * row[ids[i]].item() - smoothing * row.mean().item())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("loss_on", ["answer", "poi_ids"])
@pytest.mark.parametrize("smoothing", [0, 1e-9, 0.3])
def test_label_smoothing(train, tiny_llama, mapping_csv, data, loss_on, smoothing):
    expected = by_hand(tiny_llama(), mapping_csv, data, loss_on == "poi_ids", smoothing)
    state, gradients = {}, {}
    for name, flags in {"plain": {}, "trees": {"shared_prefix": True},
                        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}}.items():
        trainer = train(name, loss_on=loss_on, label_smoothing_factor=smoothing, **flags)
        line = trainer.state.log_history[0]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        state[name] = {key: p.detach() for key, p in trainer.model.named_parameters() if p.requires_grad}
        gradients[name] = line["grad_norm"]
    assert gradients["trees"] == pytest.approx(gradients["plain"], rel=1e-4)
    assert gradients["accumulated"] == pytest.approx(gradients["plain"], rel=1e-4)
    for key, weight in state["plain"].items():
        torch.testing.assert_close(state["trees"][key], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags", [{"use_cache": True}, {"label_names": "labels"},
                                   {"train_sampling_strategy": "group_by_length"}, {"prediction_loss_only": True},
                                   {"average_tokens_across_devices": False}, {"include_num_input_tokens_seen": True}])
def test_options_that_leave_the_loss_what_it_was(train, tiny_llama, mapping_csv, data, flags):
    expected = by_hand(tiny_llama(), mapping_csv, data, False, 0)
    found = train("one", **flags).state.log_history[0]["loss"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("flags, message", [
    ({"neftune_noise_alpha": 5, "shared_prefix": True}, "--neftune_noise_alpha: .* or --shared_prefix"),
    ({"remove_unused_columns": True}, "--remove_unused_columns True: .*; leave it out"),
    ({"accelerator_config": '{"dispatch_batches": true}'}, "dispatch_batches .*; leave it out"),
    ({"label_smoothing_factor": 1}, "must be less than 1"), ({"label_smoothing_factor": -0.1}, "must be at least 0")])
def test_options_that_are_refused(train, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train("one", **flags)
    assert not (tmp_path / "one").exists()


def test_smoothing_knows_no_pointer():
    args = argparse.Namespace(label_smoothing_factor=0.1, pointer=True)
    with pytest.raises(UserError, match="--label_smoothing_factor: .* pointer's loss; leave out one"):
        losses.check(args)


def test_smoothing_shifts_nothing():
    """Two tokens, as the collators give them: the label of each stands where its logits are."""
    logits = torch.tensor([[[2.0, 0, 0], [0, 3.0, 0]]])
    labels = torch.tensor([[0, sft_data.IGNORED]])
    found = losses.AlignedSmoother(0.0)({"logits": logits}, labels, shift_labels=True, num_items_in_batch=1)
    assert found.item() == pytest.approx(-logits[0, 0].log_softmax(-1)[0].item())
