"""Runs killed at any moment: nothing half-written takes a name, and the same command then ends as if undisturbed.

Half of the kills come at a random time, half before a random change of a file. The soak part has more of them.
"""
import functools
import json
import random
import shutil
import signal
import time

import forked
import numpy as np
import pytest
import torch
from commands import few_pairs, losses
from safetensors.torch import load_file
from trials import CASES, TRAININGS, contents, visible

from ga_llm.base.artifacts import FINAL_ENCODER, LOSS_PICTURE, MERGED_ENCODER, RUN, TRAINABLE_PARAMS, TRAINER_LOG
from ga_llm.base.cli import UserError
from ga_llm.training import run_log, staging
from ga_llm.training.checkpoints import ADAPTER

KILLS = [pytest.param(3, id="short"), pytest.param(20, id="long", marks=pytest.mark.soak)]


@pytest.mark.bulk
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kills", KILLS)
def test_killed(name, kills, trial):
    trial, chance = trial(name), random.Random(name)
    killed, half_done = 0, 0
    for attempt in range(4 * kills):
        earlier = name != "tokens" and chance.random() < 0.5
        trial.begin(earlier)
        process = trial.launch(*[trial.at_random(chance)] if attempt % 2 == 0 else ())
        if attempt % 2:
            time.sleep(chance.uniform(0, trial.seconds))
            process.kill()
        if trial.end(process).code == -signal.SIGKILL:
            killed += 1
            half_done += trial.check(earlier)
        trial.succeed()
        if killed == kills:
            break
    print(f"{name}: {killed} kills, {half_done} with something half done; {trial.seconds:.2f} s of work, "
          f"{trial.operations} operations")
    assert killed == kills and half_done >= kills // 3


@pytest.mark.bulk
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("times", [pytest.param(1, id="short"), pytest.param(10, id="long", marks=pytest.mark.soak)])
def test_stopped(name, times, trial):
    """SIGINT, as Ctrl-C sends it, is one word; nor does a SIGTERM leave more than a kill does."""
    trial, chance = trial(name), random.Random(name)
    for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)] * times:
        earlier = name != "tokens" and chance.random() < 0.5
        trial.begin(earlier)
        result = trial.run(trial.at_random(chance, number))
        assert result.code in (code, 0) and "Traceback" not in result.err
        if result.code:         # else the moment was its last
            assert number == signal.SIGTERM or result.err.splitlines()[-1] == "interrupted"
            trial.check(earlier)
        trial.succeed()


# Training goes on from its last checkpoint. 6 pairs are at most 3 steps an epoch; dropout is on, as in the README's
# commands.
STEPS = 12
FLAGS = ["--max_steps", STEPS, "--save_steps", "1", "--per_device_train_batch_size", "2", "--resume_from_checkpoint",
         "auto"]
NUMPY = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np._core.multiarray._reconstruct]     # of its random state
ORDER = {1: ["--shared_prefix", "True", "--use_full_attn", "True"], 2: ["--train_sampling_strategy", "group_by_length"]}


def trained(folder, number):
    """Everything in checkpoint-N, and in stage 1's N/, read as those read it who use it; by name."""
    checkpoint = staging.checkpoint(folder, number)
    files = {name: load_file(checkpoint / name) for name in (ADAPTER, TRAINABLE_PARAMS)}
    files["optimizer"] = {f"{index} {name}": tensor for index, state in torch.load(
        checkpoint / "optimizer.pt", weights_only=True)["state"].items() for name, tensor in state.items()}
    files["schedule"] = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    with torch.serialization.safe_globals(NUMPY):
        files["random"] = {"cpu": torch.load(checkpoint / "rng_state.pth", weights_only=True)["cpu"]}
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == number
    if (folder / str(number)).exists():
        files["encoder"] = torch.load(folder / str(number) / MERGED_ENCODER, weights_only=True)
    return {f"{file} {name}": tensor for file, state in files.items() for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor)}


def check_whole(folder, stage):
    """What is visible can be read; returns the steps."""
    for number in staging.steps(folder):
        assert ("encoder gps_encoder.norm.weight" in trained(folder, number)) == (stage == 1)
    assert len(staging.steps(folder)) <= 3      # two, and one more between appearing and pruning
    if (folder / FINAL_ENCODER).exists():
        torch.load(folder / FINAL_ENCODER, weights_only=True)
    assert not (folder / RUN).exists() or json.loads((folder / RUN).read_text())["starts"]
    log = run_log.read_log(folder / TRAINER_LOG)
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    return staging.steps(folder)


def check_alike(folder, undisturbed, stage):
    """What a run leaves at its end is what the undisturbed one leaves, bit for bit."""
    assert check_whole(folder, stage) == check_whole(undisturbed, stage) == [STEPS - 1, STEPS]
    one, other = trained(undisturbed, STEPS), trained(folder, STEPS)
    assert one.keys() == other.keys() and not [name for name in one if not torch.equal(one[name], other[name])]
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}
    assert [[(line["step"], line["loss"]) for line in run_log.read_log(path / TRAINER_LOG)]
            for path in (folder, undisturbed)] == [[(n + 1, other) for n, other in enumerate(losses(staging.checkpoint(
                undisturbed, STEPS)))]] * 2
    if stage == 1:
        final, expected = (torch.load(path / FINAL_ENCODER, weights_only=True) for path in (folder, undisturbed))
        assert all(torch.equal(final[name], expected[name]) for name in expected)
        assert all(torch.equal(final[name], other[f"encoder {name}"]) for name in final)


def wait_for_step(process, folder, step):
    while process.is_alive() and max(staging.steps(folder), default=0) < step:
        time.sleep(0.0005)


@pytest.mark.bulk
@pytest.mark.parametrize("stage, beside", [(1, []), (2, []), (2, ["--pointer", "True"])], ids=["1", "2", "pointer"])
@pytest.mark.parametrize("kills", [pytest.param(6, id="short"), pytest.param(20, id="long", marks=pytest.mark.soak)])
def test_training_killed(repo, tmp_path, stage, beside, kills):
    flags = [*FLAGS, *ORDER[stage], "--data_path", few_pairs(repo, stage, 6), *beside]
    undisturbed, folder, trace = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "trace"
    forked.train(repo, stage, undisturbed, *flags, hooks=[functools.partial(forked.watch, undisturbed, trace)])
    operations = len(trace.read_text().splitlines())
    chance, killed, half_done, seen = random.Random(stage), 0, 0, set()
    while killed < kills:
        if killed % 2:
            at = functools.partial(forked.watch, folder, trace, chance.randint(1, operations // 3))
            process, = forked.start(repo, stage, folder, *flags, hooks=[at])
        else:
            goal = max(staging.steps(folder), default=0) + chance.randint(0, 3)
            process, = forked.start(repo, stage, folder, *flags)
            wait_for_step(process, folder, goal)
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        process.join(300)
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            half_done += staging.staging(folder).exists()
            seen |= set(check_whole(folder, stage))
        else:                   # it has reached its end: begin anew
            check_alike(folder, undisturbed, stage)
            shutil.rmtree(folder)
    forked.train(repo, stage, folder, *flags)
    check_alike(folder, undisturbed, stage)
    print(f"stage {stage}: {killed} kills, {half_done} with a checkpoint half written; {operations} operations")
    assert half_done >= kills // 4 and len(seen) >= 3


@pytest.mark.bulk
@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("number, code, steps, words", [
    (signal.SIGINT, 130, [2], "interrupted"), (signal.SIGTERM, 0, [2, 4], "told to stop by SIGTERM: step 4 of 6"),
    (signal.SIGUSR1, 0, [2, 4], "told to stop by SIGUSR1: step 4 of 6")])
def test_training_stopped(name, number, code, steps, words, trial, tmp_path):
    """While its second checkpoint is written: SIGINT at once, those that ask for good order when it is."""
    trial = trial(name)
    trial.begin(earlier=False)
    second = staging.checkpoint(staging.staging(trial.folder), 4)
    process = trial.launch(functools.partial(forked.watch, str(second), str(tmp_path / "trace"), 2, number))
    result = trial.end(process)
    assert result.code == code and "Traceback" not in result.err and staging.steps(trial.folder) == steps
    assert words in result.err.splitlines()[-1] and not (trial.folder / FINAL_ENCODER).exists()
    check_whole(trial.folder, int(name[-1]))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_stopped_between_two_renames(number, code, trial):
    """All files have their names before the process ends."""
    trial = trial("questions 2")
    trial.begin(earlier=True)
    trial.succeed(functools.partial(forked.watch, str(trial.folder), str(trial.trace)))
    renames = [at for at, line in enumerate(trial.trace.read_text().splitlines(), 1) if line.startswith("os.rename")]
    assert len(renames) == len(trial.made) == 6     # two question files, beside each its settings and check-ins
    trial.begin(earlier=True)
    result = trial.run(functools.partial(forked.watch, str(trial.folder), str(trial.trace), renames[1], number))
    assert result.code == code
    assert visible(contents(trial.folder)) == visible({**trial.inputs, **trial.made})


def test_killed_between_the_last_checkpoint_and_the_picture(trial):
    trial = trial("stage 2")
    trial.begin(earlier=False)
    assert trial.run().code == 0
    picture = (trial.folder / LOSS_PICTURE).read_bytes()
    (trial.folder / LOSS_PICTURE).unlink()
    resumed = forked.run(trial.root, [*trial.command, "--resume_from_checkpoint", "auto"], trial.log, **forked.ranks())
    assert resumed.code == 0 and (trial.folder / LOSS_PICTURE).read_bytes() == picture


def test_tokens_killed_after_their_work(trial):
    """Their lock is left; whoever reads them removes it."""
    trial = trial("tokens")
    trial.begin(earlier=False)
    trial.succeed()
    folder, = trial.folder.iterdir()
    (trial.folder / f".{folder.name}.lock").touch()
    trial.succeed()


@pytest.mark.parametrize("file, text, names", [
    ("run.json", "{", ["not JSON"]), ("run.json", "[]", ["no JSON object"]), ("run.json", "{}", ["no list of starts"]),
    ("trainer_log.jsonl", '{"step": 1, "elapsed_seconds": 1}\nNaN\n', ["line 2"]),
    ("trainer_log.jsonl", '{"step": 1}\n', ["line 1"]), ("trainer_log.jsonl", "\0\n", ["line 1"])])
def test_damaged_logs(tmp_path, file, text, names):
    """What a stranger, or a disk, has left in the output folder is one line."""
    (tmp_path / file).write_text(text)
    read = functools.partial(run_log.add_start, start={}) if file == "run.json" else run_log.read_log
    with pytest.raises(UserError) as caught:
        read(tmp_path / file)
    assert all(name in str(caught.value) for name in [file, *names]) and ";" in str(caught.value)
