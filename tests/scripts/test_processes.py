"""Two processes train what one does: DDP, ZeRO-2, ZeRO-3, FSDP2; each saves, goes on from there, and is converted."""
import re
import shutil
import sys

import forked
import pytest
import torch
from commands import few_pairs, held, losses, needs_deepspeed, run, stage
from safetensors.torch import load_file

from ga_llm.base.artifacts import FINAL_ENCODER, MERGED_ENCODER, TRAINABLE_PARAMS
from ga_llm.llm import backbone
from ga_llm.training import checkpoints
from geo_encoder import gps_tokens

STACKS = {"ddp": [], "zero2": ["--deepspeed", "ds_configs/stage2.json"],
          "zero3": ["--deepspeed", "ds_configs/stage3.json"], "fsdp2": ["--fsdp", "True"]}
LEAVES = {"ddp": "optimizer.pt", "zero2": "latest", "zero3": "latest", "fsdp2": "pytorch_model_fsdp.bin"}
CUT_UP = [pytest.param(stack, marks=pytest.mark.slow) for stack in STACKS if stack != "ddp"]
# 12 pairs in steps of 4 are 3 steps an epoch; checkpoint-4 lies in the second.
STEPS = ["--max_steps", "6", "--save_steps", "2", "--load_in_4bit", "False", "--bf16", "False"]
NO_DROPOUT = {1: ["--geo_encoder", "fourier", "--encoder_training", "full"], 2: ["--lora_dropout", "0"]}


def train(repo, stage, output, *flags, processes=2, start=forked.train):
    if "--deepspeed" in flags:
        needs_deepspeed()
    start(repo, stage, output, *STEPS, "--data_path", few_pairs(repo, stage, 12), "--per_device_train_batch_size",
          str(4 // processes), *flags, processes=processes)
    return repo / output


def resume(repo, stage, output, *flags):
    """Go on from checkpoint-4 of `output` alone, in another folder."""
    resumed = f"{output}_resumed"
    shutil.copytree(repo / output / "checkpoint-4", repo / resumed / "checkpoint-4")
    return train(repo, stage, resumed, *flags, "--resume_from_checkpoint", "auto")


def trained(folder):
    """What stage 2 learned, by name."""
    return {**load_file(folder / checkpoints.ADAPTER), **load_file(folder / TRAINABLE_PARAMS)}


def close(one, other, tolerance):
    """The largest difference between two sets of tensors."""
    assert one.keys() == other.keys() and one
    return max((one[name] - other[name]).abs().max().item() for name in one) <= tolerance


@pytest.fixture(scope="module")
def one_process(repo):
    made = {}

    def make(stage):
        if stage not in made:
            made[stage] = train(repo, stage, f"outputs/one_{stage}", *NO_DROPOUT[stage], processes=1)
        return made[stage]
    return make


@pytest.mark.parametrize("stack", ["ddp", *CUT_UP])
def test_stage_2(repo, one_process, stack):
    reference, output = one_process(2), f"outputs/{stack}_2"
    start = stage if stack == "zero2" else forked.train       # stage: by torchrun
    checkpoint = train(repo, 2, output, *NO_DROPOUT[2], *STACKS[stack], start=start) / "checkpoint-6"
    assert (checkpoint / LEAVES[stack]).exists()
    assert losses(checkpoint) == pytest.approx(losses(reference / "checkpoint-6"), rel=1e-3)
    assert close(trained(checkpoint), trained(reference / "checkpoint-6"), 1e-4)
    assert not close(trained(checkpoint), trained(checkpoint.with_name("checkpoint-4")), 1e-3)
    resumed = resume(repo, 2, output, *NO_DROPOUT[2], *STACKS[stack])
    assert close(trained(resumed / "checkpoint-6"), trained(checkpoint), 0)
    assert sorted(path.name for path in resumed.glob("[!.]*/")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["zero3", "fsdp2"])
def test_stage_1(repo, one_process, stack):
    """Where parameters are cut up: the encoder that is saved is whole."""
    reference, output = one_process(1), repo / f"outputs/{stack}_1"
    train(repo, 1, output, *NO_DROPOUT[1], *STACKS[stack])
    assert losses(output / "checkpoint-6") == pytest.approx(losses(reference / "checkpoint-6"), rel=1e-3)
    encoder, before, final, expected = (torch.load(path, weights_only=True) for path in (
        output / "6" / MERGED_ENCODER, output / "4" / MERGED_ENCODER, output / FINAL_ENCODER,
        reference / "6" / MERGED_ENCODER))
    assert close(encoder, expected, 1e-4) and close(encoder, final, 0) and not close(encoder, before, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["zero3", "fsdp2"])
def test_stage_1_resumes(repo, stack):
    """LoRA on the encoder, and each process's own dropout."""
    output = train(repo, 1, f"outputs/{stack}_1_lora", *STACKS[stack])
    resumed = resume(repo, 1, f"outputs/{stack}_1_lora", *STACKS[stack])
    one, other = (torch.load(path / FINAL_ENCODER, weights_only=True) for path in (output, resumed))
    assert close(one, other, 0)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["zero3", "fsdp2"])
def test_bf16_and_4_bits(repo, stack):
    """The README's precision: the loss is as fine as with DDP, which the checks above compare in fp32."""
    precise = ["--load_in_4bit", "True", "--bf16", "True", "--max_steps", "2"]
    expected, output = repo / "outputs/ddp_4_bit", repo / f"outputs/{stack}_4_bit"
    if not expected.exists():
        train(repo, 2, expected, *NO_DROPOUT[2], *precise)
    train(repo, 2, output, *NO_DROPOUT[2], *precise, *STACKS[stack])
    assert losses(output / "checkpoint-2") == pytest.approx(losses(expected / "checkpoint-2"), rel=1e-4)


def test_the_lock_of_a_compilation_that_was_killed_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / name / "lock" for name in ("deepspeed_gone", "py/deepspeed_there")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    with locks[1].open():
        needs_deepspeed()
        assert [lock.exists() for lock in locks] == [held(lock) for lock in locks] == [False, True]


@pytest.mark.slow
def test_tied_embeddings_are_not_trained_in_pieces(repo):
    run(repo, sys.executable, "tools/make_tiny_llama.py", "--output_dir", "models/tied", "--hidden", "32",
        "--kv_heads", "2", "--tie_embeddings", "True")
    flags = [*STEPS, "--model_name_or_path", "models/tied", *STACKS["fsdp2"]]
    started = forked.start(repo, 2, "outputs/tied", *flags, processes=2)
    for process in started:
        process.join(300)
    assert {process.exitcode for process in started} <= {2, -15} and not (repo / "outputs/tied/checkpoint-2").exists()
    lines = (repo / "outputs/tied.log").read_text().splitlines()
    assert any(line.startswith("error: ") and "use --deepspeed ds_configs/stage2.json" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_weights_alone(repo, one_process, stack):
    """A step that is too small to be seen leaves, in every piece, the weights of the checkpoint that it starts from."""
    source = one_process(2) / "checkpoint-6"
    output = train(repo, 2, f"outputs/{stack}_from", *NO_DROPOUT[2], *STACKS[stack], "--learning_rate", "1e-12",
                   "--max_steps", "2", "--init_from", source)
    assert close(trained(output / "checkpoint-2"), trained(source), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_divergence_stops_all_processes(repo, stack):
    """At the same step, with what was finite before it."""
    output = f"outputs/{stack}_diverged"
    flags = ["--learning_rate", "1e20", "--save_steps", "1", "--save_total_limit", "1", *STACKS[stack]]
    with pytest.raises(AssertionError, match="not finite, the training has diverged"):
        train(repo, 2, output, *flags)
    lines = [line for line in (repo / f"{output}.log").read_text().splitlines() if line.startswith("error: ")]
    step = int(re.match("error: step ([0-9]+): ", lines[0])[1])
    assert len(set(lines)) == 1 and 1 < step < 6
    assert [path.name for path in (repo / output).glob("*/")] == [f"checkpoint-{step - 1}"]
    state = trained(repo / output / f"checkpoint-{step - 1}")
    assert state and all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["zero2", "zero3"])
def test_conversion(repo, stack):
    """zero_to_fp32.py, from the checkpoint's place, gives what the checkpoint holds, and test_next_gps.py reads it."""
    checkpoint = f"outputs/{stack}_2/checkpoint-6"
    if not (repo / checkpoint).exists():        # where test_stage_2 has not run, or has skipped it
        train(repo, 2, f"outputs/{stack}_2", *NO_DROPOUT[2], *STACKS[stack])
    run(repo, sys.executable, f"{checkpoint}/zero_to_fp32.py", checkpoint, f"{checkpoint}/pytorch_model.bin")

    def loaded(folder):
        mapping = gps_tokens.read_gps_mapping(repo / "datasets/sample/preprocessed/sample_gps_mapping.csv")
        model = backbone.load_llm(str(repo / "models/tiny"), 4096, "sdpa", torch.float32)
        gps_tokens.add_gps_tokens(backbone.load_tokenizer(str(repo / "models/tiny")), mapping, model)
        return checkpoints.load_adapter(model, folder, checkpoints.read_agreement(folder)).state_dict()

    shutil.copytree(repo / checkpoint, repo / f"outputs/{stack}_direct",
                    ignore=shutil.ignore_patterns("pytorch_model.bin", "global_step*"))
    assert close(loaded(repo / checkpoint), loaded(repo / f"outputs/{stack}_direct"), 0)
    result, metrics = forked.evaluate(repo, checkpoint, "--limit", "4")
    assert f"weights from {checkpoint}/pytorch_model.bin" in result.err
    assert metrics["all"]["model"]["n"] == 4
