"""What training leaves behind is what evaluation loads: equal logits, whichever file they come from."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ga_llm.base.cli import UserError
from ga_llm.llm import backbone
from ga_llm.training import checkpoints, staging
from geo_encoder import gps_tokens, injection, weights

PAIR = "<question>: user 1 POI id 1 <GPS 1>. Where next? <answer>: user 1 will visit POI id 1."


def reload(trainer, tiny_llama, mapping_csv, tmp_path, tied=False, folder="checkpoint-4", encoder_file=None):
    """The model as test_next_gps.py loads it, and the logits of both on one pair."""
    mapping, base = gps_tokens.read_gps_mapping(mapping_csv), tiny_llama(tie_embeddings=tied)
    checkpoint = tmp_path / "stage2" / folder
    source = checkpoint if checkpoints.holds_full_model(checkpoint) else base
    tokenizer = backbone.load_tokenizer(str(source))
    model = backbone.load_llm(str(source), 256, "sdpa", torch.float32)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    injection.attach_encoders(model, injection.load_encoders(model, mapping, token_ids,
                                                             encoder_file or tmp_path / "e/geo_encoder_merged.pth"))
    if source == base:
        model = checkpoints.load_adapter(model, checkpoint, checkpoints.read_agreement(checkpoint))
    batch = tokenizer(PAIR, return_tensors="pt")
    with torch.no_grad():
        return trainer.model.eval()(**batch).logits, model.eval()(**batch).logits


@pytest.mark.parametrize("tied", [False, True])
def test_stage_2_reloads(train, tiny_llama, mapping_csv, tmp_path, tied):
    trained, loaded = reload(train(2, tied), tiny_llama, mapping_csv, tmp_path, tied)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)
    state = load_file(tmp_path / "stage2/checkpoint-4" / checkpoints.TRAINABLE_PARAMS)
    assert set(state) >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert not any("lora" in name for name in state)
    assert not any("embed_tokens" in name for name in load_file(tmp_path / "stage2/checkpoint-4" / checkpoints.ADAPTER))


def weights_of(folder):
    """Everything that a checkpoint's files hold, by name."""
    state = {f"{path.name}:{name}": tensor for path in folder.rglob("*.safetensors")
             for name, tensor in load_file(path).items()}
    for path in (*folder.rglob("optimizer.pt"), *folder.parent.glob(f"{folder.name.split('-')[1]}/*.pth")):
        loaded = torch.load(path, weights_only=True)
        parts = loaded["state"] if "state" in loaded else {"": loaded}
        state.update({f"{path.name}:{part}:{name}": tensor for part in parts for name, tensor in parts[part].items()})
    return state


@pytest.mark.bulk
@pytest.mark.parametrize("stage, interruptions, flags", [
    (1, (2, 4, 7), {}),
    (1, (2, 4, 7), {"train_sampling_strategy": "group_by_length"}),
    (1, (6,), {"low_rank_training": False}),
    (2, (2, 4, 7), {}),
    (2, (2, 4, 7), {"train_sampling_strategy": "group_by_length"}),
    (2, (6,), {"train_sampling_strategy": "group_by_length", "lengths": np.array([9, 5, 7, 3])}),
    (2, (6,), {"low_rank_training": False}),
    (2, (2, 6), {"low_rank_training": False, "train_encoders": True, "dropout": 0.3}),
    (2, (2, 6), {"train_encoders": True, "dropout": 0.3}),
    (2, (1, 3), {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 5, "lr_scheduler_type": "cosine"}),
])
def test_resuming_changes_nothing(train, interrupted, tmp_path, stage, interruptions, flags):
    """An epoch has 4 steps (2 with accumulation): a run stops in one and between two, and goes on, bit for bit."""
    flags = {"max_steps": 10, "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 1, **flags}
    train(stage, output_dir=tmp_path / "whole", **flags)
    for step in interruptions:
        with pytest.raises(interrupted):
            train(stage, output_dir=tmp_path / "parts", resume_from_checkpoint="auto", interrupt_at=step, **flags)
    train(stage, output_dir=tmp_path / "parts", resume_from_checkpoint="auto", **flags)
    whole, parts = (weights_of(tmp_path / name / f"checkpoint-{flags['max_steps']}") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and len(whole) > 20
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]
    start = weights_of(tmp_path / "whole" / f"checkpoint-{flags['max_steps'] - 1}")
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_places_stay_where_they_were(train, tmp_path, tied, mapping_csv):
    trainer = train(2, tied)
    tokens = gps_tokens.read_gps_mapping(mapping_csv).tokens
    ids = torch.tensor(trainer.processing_class.convert_tokens_to_ids(tokens))
    weight = trainer.model.get_input_embeddings().weight
    first = ids.min()
    torch.testing.assert_close(weight[ids], weight[ids[:1]].expand(len(ids), -1))      # all still equal
    assert (weight[:first].mean(0) - weight[first]).abs().max() > 1e-4                 # while the others have moved


def test_low_rank_training_false_is_a_model_folder(train, tiny_llama, mapping_csv, tmp_path):
    trained, loaded = reload(train(2, low_rank_training=False), tiny_llama, mapping_csv, tmp_path)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_rank", [True, False])
def test_encoders_that_stage_2_trains(train, tiny_llama, mapping_csv, tmp_path, low_rank):
    """The checkpoint agrees with the encoder beside it, and with no other; as a model it holds none."""
    trainer = train(2, train_encoders=True, low_rank_training=low_rank)
    trainer.save_final_encoders(trained=True)
    checkpoint, own = tmp_path / "stage2/checkpoint-4", tmp_path / "stage2/4/geo_encoder_merged.pth"
    trained, loaded = reload(trainer, tiny_llama, mapping_csv, tmp_path, encoder_file=own)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)
    before, after, final = (torch.load(path, weights_only=True) for path in (
        tmp_path / "e/geo_encoder_merged.pth", own, tmp_path / "stage2/geo_encoder_final_merged.pth"))
    assert all((before[name] - after[name]).abs().max() > 0 and torch.equal(after[name], final[name]) for name in after)
    found, agreement = {"GCIM": weights.digest(after)}, checkpoints.read_agreement(checkpoint)
    assert agreement["paths"]["geoencoder_path"] == str(own)
    checkpoints.check_agreement(checkpoint, agreement, 256, 2048, encoders=found)
    with pytest.raises(UserError, match="with other weights of GCIM's; give the --geoencoder_path"):
        checkpoints.check_agreement(checkpoint, agreement, 256, 2048, encoders={"GCIM": weights.digest(before)})
    if not low_rank:
        assert not any("injection" in name for name in load_file(checkpoint / "model.safetensors"))
    tokens = gps_tokens.read_gps_mapping(mapping_csv).tokens
    tokens = torch.tensor(trainer.processing_class.convert_tokens_to_ids(tokens))
    rows = trainer.model.get_input_embeddings().weight[tokens]
    torch.testing.assert_close(rows, rows[:1].expand(len(rows), -1))       # no gradient has reached them


@pytest.mark.parametrize("as_folder", [False, True])
def test_zero_to_fp32_output(train, tiny_llama, mapping_csv, tmp_path, as_folder):
    """A file, or a folder with the file in it; names carry PEFT's prefix and the adapter's name. It comes first."""
    trainer = train(2)
    state = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    state["base_model.model.model.norm.weight"] += 1
    target = tmp_path / "stage2/checkpoint-4" / checkpoints.CONVERTED
    if as_folder:
        target.mkdir()
        target = target / "pytorch_model.bin"
    torch.save(state, target)
    trained, loaded = reload(trainer, tiny_llama, mapping_csv, tmp_path)
    assert (loaded - trained).abs().max() > 0.01
    trainer.model.load_state_dict(state, strict=False)
    trained, loaded = reload(trainer, tiny_llama, mapping_csv, tmp_path)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-5)


def test_stage_1_keeps_merged_encoders_and_prunes_them(train, tmp_path):
    trainer = train(1)
    output = tmp_path / "stage1"
    (output / "7").mkdir()      # not ours: no encoder in it
    trainer.save_final_encoders(trained=True)
    assert sorted(p.name for p in output.iterdir() if p.is_dir()) == ["4", "7", "checkpoint-4"]
    merged, _ = weights.load_encoder(output / "4" / "geo_encoder_merged.pth", 32)
    digits = torch.randint(0, 4, (5, 25))
    trained = trainer.trained[0].encoder.eval()
    torch.testing.assert_close(merged.eval()(digits), trained(digits), rtol=1e-4, atol=1e-5)
    assert (output / "geo_encoder_final_merged.pth").exists()
    torch.manual_seed(0)
    moved = [name for name, p in trainer.trained[0].encoder.named_parameters()
             if ("lora_B" in name or "lora_embedding_A" in name) and p.abs().sum() > 0]
    assert len(moved) == 7      # the embedding; out_proj, linear1 and linear2 of two layers


@pytest.mark.parametrize("break_it, message", [
    (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda folder: (folder / checkpoints.TRAINABLE_PARAMS).unlink(), "run zero_to_fp32.py"),
    (lambda folder: (folder / checkpoints.CONVERTED).mkdir(), "an empty folder"),
    (lambda folder: (folder / checkpoints.CONVERTED).write_bytes(b"cos\nsystem\n(S'touch x'\ntR."),
     "would call os.system"),
    (lambda folder: save_file({"model.norm.weight": torch.ones(9)}, folder / checkpoints.TRAINABLE_PARAMS), "not fit"),
    (lambda folder: save_file({"other": torch.ones(1)}, folder / checkpoints.TRAINABLE_PARAMS), "no place for"),
])
def test_broken_checkpoints(train, tiny_llama, mapping_csv, tmp_path, break_it, message):
    trainer = train(2)
    break_it(tmp_path / "stage2/checkpoint-4")
    with pytest.raises(UserError, match=message) as error:
        reload(trainer, tiny_llama, mapping_csv, tmp_path)
    assert "\n" not in str(error.value)


def test_positions_must_be_scaled_as_in_training(tmp_path):
    (tmp_path / checkpoints.AGREEMENT).write_text('{"model_max_length": 32768}')
    found = checkpoints.read_agreement(tmp_path)
    checkpoints.check_agreement(tmp_path, found, 32768, native_context=4096)
    checkpoints.check_agreement(tmp_path, found, 30000, native_context=4096)       # the same factor of 8
    with pytest.raises(UserError, match="give --context_size 32768"):
        checkpoints.check_agreement(tmp_path, found, 4096, native_context=4096)


def test_an_earlier_run_is_not_written_over(train, tmp_path):
    train(1, max_steps=2)
    with pytest.raises(UserError, match="holds checkpoint-2 of an earlier run; go on with it by --resume_from"):
        train(1, max_steps=2)
    for wanted, reason in ((tmp_path / "nothing", "no such folder"), (tmp_path, "no trainer_state.json in it")):
        with pytest.raises(UserError, match=reason):
            train(1, max_steps=4, resume_from_checkpoint=wanted)


def test_a_run_without_its_optimizer_is_not_resumed(train, tmp_path):
    train(2, max_steps=2, lr_scheduler_type="constant")
    checkpoint = tmp_path / "stage2/checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="no optimizer.pt, so no optimizer to go on with; resume with the flags"):
        train(2, max_steps=4, lr_scheduler_type="constant", resume_from_checkpoint="auto")
    (checkpoint / "latest").write_text("global_step2")
    with pytest.raises(UserError, match="it was saved with DeepSpeed; resume with the flags"):
        train(2, max_steps=4, lr_scheduler_type="constant", resume_from_checkpoint=checkpoint)


def test_the_final_encoder_of_a_finished_run(train, tmp_path):
    """It is the last checkpoint's, also if the run was once shorter, and what another process left is swept."""
    flags = {"lr_scheduler_type": "constant"}
    trainer = train(1, max_steps=2, **flags)
    trainer.save_final_encoders(trained=True)
    trainer = train(1, max_steps=4, resume_from_checkpoint="auto", **flags)     # killed before it saved the final one
    (tmp_path / "stage1/.incomplete/final").mkdir(parents=True)
    trainer = train(1, max_steps=4, resume_from_checkpoint="auto", **flags)
    trainer.save_final_encoders(trained=False)
    final, last = (torch.load(tmp_path / "stage1" / name, weights_only=True) for name in
                   ("geo_encoder_final_merged.pth", "4/geo_encoder_merged.pth"))
    assert all(torch.equal(final[name], last[name]) for name in last)
    (tmp_path / "stage1/4/geo_encoder_merged.pth").unlink()
    with pytest.raises(UserError, match="geo_encoder_merged.pth: not found"):
        trainer.save_final_encoders(trained=False)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("flags, steps", [
    ({"save_strategy": "no"}, [3]), ({"save_strategy": "no", "max_steps": -1, "num_train_epochs": 2}, [2]),
    ({"save_strategy": "epoch", "per_device_train_batch_size": 2}, [2, 3]), ({"save_steps": 2}, [2, 3]),
    ({"save_steps": 100}, [3])], ids=["no", "no, epochs", "epoch", "steps", "more steps than there are"])
def test_the_last_step_is_always_saved(train, tmp_path, stage, flags, steps):
    """Epochs of two steps or one; whole, so that the run may go on from there."""
    flags = {"max_steps": 3, "save_steps": 100, "lr_scheduler_type": "constant", "save_total_limit": 3, **flags}
    train(stage, **flags)
    folder = tmp_path / f"stage{stage}"
    assert staging.steps(folder) == steps
    train(stage, **{**flags, "max_steps": 5}, resume_from_checkpoint="auto")
    assert staging.steps(folder)[-1] == 5
