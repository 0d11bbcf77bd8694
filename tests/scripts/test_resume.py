"""Runs that are killed again and again end as if nothing had happened, and never show half a checkpoint."""
import glob
import json
import random
import signal
import time

import forked
import pytest
import torch
from commands import few_pairs
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from ga_llm import staging
from ga_llm.artifacts import FINAL_ENCODER, MERGED_ENCODER, TRAINABLE_PARAMS
from ga_llm.checkpoints import ADAPTER

pytestmark = pytest.mark.slow
KILLS, STEPS = 8, 20
# 6 pairs are at most 3 steps an epoch; dropout is on, as in the README's commands.
FLAGS = ["--max_steps", STEPS, "--save_steps", "1", "--per_device_train_batch_size", "2"]
ORDER = {1: ["--shared_prefix", "True", "--use_full_attn", "True"], 2: ["--train_sampling_strategy", "group_by_length"]}


def contents(folder, number):
    """Everything in checkpoint-N, and in stage 1's N/, read as those read it who use it; by name."""
    checkpoint = staging.checkpoint(folder, number)
    files = {name: load_file(checkpoint / name) for name in (ADAPTER, TRAINABLE_PARAMS)}
    files["optimizer"] = {f"{index} {name}": tensor for index, state in torch.load(
        checkpoint / "optimizer.pt", weights_only=True)["state"].items() for name, tensor in state.items()}
    files["schedule"] = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    with safe_globals():
        files["random"] = {"cpu": torch.load(checkpoint / "rng_state.pth", weights_only=True)["cpu"]}
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == number
    if (folder / str(number)).exists():
        files["encoder"] = torch.load(folder / str(number) / MERGED_ENCODER, weights_only=True)
    return {f"{file} {name}": tensor for file, state in files.items() for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor)}


def whole(folder, stage):
    """Check what is visible; returns the steps."""
    for number in staging.steps(folder):
        assert ("encoder gps_encoder.norm.weight" in contents(folder, number)) == (stage == 1)
    assert len(staging.steps(folder)) <= 3      # two, and one more between appearing and pruning
    if (folder / FINAL_ENCODER).exists():
        torch.load(folder / FINAL_ENCODER, weights_only=True)
    return staging.steps(folder)


def kill(process, folder, chance):
    """SIGKILL some checkpoints on, at a random moment or while one is written; returns whether one was."""
    goal = max(staging.steps(folder), default=0) + chance.randint(0, 3)
    in_saving = chance.random() < 0.5

    def being_written():
        return glob.glob(f"{staging.staging(folder)}/checkpoint-*")     # pathlib's trips over a folder that vanishes

    while process.is_alive() and (max(staging.steps(folder), default=0) < goal or in_saving and not being_written()):
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.04 if in_saving else 0.5))
    process.kill()
    process.join()
    return bool(being_written())


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_at_random_moments(repo, stage):
    flags = [*FLAGS, *ORDER[stage], "--data_path", few_pairs(repo, stage, 6), "--resume_from_checkpoint", "auto"]
    undisturbed, folder = repo / f"outputs/undisturbed_{stage}", repo / f"outputs/killed_{stage}"
    forked.train(repo, stage, f"outputs/{undisturbed.name}", *flags)
    chance, killed, in_saving, seen = random.Random(0), 0, 0, set()
    for _ in range(KILLS):
        process, = forked.start(repo, stage, f"outputs/{folder.name}", *flags, pause=0.05)
        in_saving += kill(process, folder, chance)
        killed += process.exitcode == -signal.SIGKILL
        seen |= set(whole(folder, stage))
    forked.train(repo, stage, f"outputs/{folder.name}", *flags)
    assert killed >= KILLS // 2 and in_saving >= 1 and len(seen) >= 3

    one, other = contents(undisturbed, STEPS), contents(folder, STEPS)
    assert one.keys() == other.keys() and not [name for name in one if not torch.equal(one[name], other[name])]
    assert {path.name for path in folder.glob("*/")} == {path.name for path in undisturbed.glob("*/")}
    assert not staging.staging(folder).exists()
    if stage == 1:
        final, expected = (torch.load(path / FINAL_ENCODER, weights_only=True) for path in (folder, undisturbed))
        assert all(torch.equal(final[name], expected[name]) for name in expected)
        assert all(torch.equal(final[name], other[f"encoder {name}"]) for name in final)
