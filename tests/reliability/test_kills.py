"""Runs that are killed at any moment: nothing half-written takes a name, and the same command then ends as if undisturbed.

Half of the kills come at a random time, half before a random change of a file. The soak part has more of them.
"""
import functools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
import torch
from commands import DATA, MAPPING, evaluation, few_pairs, losses
from harness import ROOT, call
from safetensors.torch import load_file

from ga_llm import run_log, staging
from ga_llm.artifacts import FINAL_ENCODER, MERGED_ENCODER, METRICS, RUN, TRAINABLE_PARAMS, TRAINER_LOG
from ga_llm.checkpoints import ADAPTER

EARLIER = b"of an earlier run\n"
KILLS = [pytest.param(3, id="short"), pytest.param(30, id="long", marks=pytest.mark.soak)]
QUESTIONS = ["-dataset_name", "sample", "-use_sim", "False", "-max_history", "20"]
CASES = {       # name: the command, the folder that it writes to
    "samples": (["data-preprocess/run.py", "-f", "best_conf/sample.yml"], DATA),
    "keys": (["data-preprocess/traj_qk.py", "-dataset_name", "sample"], DATA),
    "questions 1": (["data-preprocess/process_projector_gps_stage1.py", *QUESTIONS], DATA),
    "questions 2": (["data-preprocess/process_llm_gps.py", *QUESTIONS], DATA),
    "tokens": (["tests/reliability/build_tokens.py", "models/tiny", MAPPING, "few_pairs_2_800.json", "cache"], "cache"),
    "evaluation": (evaluation("outputs/evaluated"), "outputs/evaluated"),
    "full table": (evaluation("outputs/evaluated", "--full_table", "True"), "outputs/evaluated"),
}
TOGETHER = {"samples", "keys", "questions 1", "questions 2"}     # their files appear at once


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A larger sample city than that of `repo`, up to its questions."""
    city = tmp_path_factory.mktemp("city")
    shutil.copytree(ROOT / "best_conf", city / "best_conf")
    raw = ["data-preprocess/make_sample_raw.py", "-users", "300", "-out", "data-preprocess/data/sample/raw"]
    for command in (raw, *(CASES[name][0] for name in ("samples", "questions 2"))):
        result = call(city, *command)
        assert result.code == 0, result.err
    few_pairs(city, 2, 800)
    return city


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def visible(files):
    """Without hidden files and those in hidden folders; metrics.json without the speed."""
    files = {name: text for name, text in files.items() if not any(part[0] == "." for part in Path(name).parts)}
    if files.get(METRICS, EARLIER) != EARLIER:
        files[METRICS] = {**json.loads(files[METRICS]), "prompts_per_second": None}
    return files


class Trial:
    """A case in a folder of its own; `made`, what it leaves when undisturbed, in `seconds` by `operations`."""

    def __init__(self, name, root, city, repo):
        (self.command, output), self.root, self.folder = CASES[name], root, root / CASES[name][1]
        self.log, self.trace, self.together = root / "log", root / "trace", name in TOGETHER
        evaluates = name in ("evaluation", "full table")
        for link, target in (("best_conf", ROOT / "best_conf"), ("models", repo / "models"),
                             ("few_pairs_2_800.json", city / "few_pairs_2_800.json"),
                             ("data-preprocess", city / "data-preprocess"), ("outputs/gcim", repo / "outputs/gcim"),
                             ("datasets", (repo if evaluates else city) / "datasets")):
            if link != Path(output).parts[0]:
                (root / link).parent.mkdir(exist_ok=True)
                (root / link).symlink_to(target)
        inputs = {} if name in ("samples", "tokens") else contents(repo / "outputs/llm/checkpoint-6") if evaluates else {
            file: text for file, text in contents(city / DATA).items() if "_qa_" not in file}
        self.inputs, self.made = inputs, {}
        self.begin(earlier=False)
        self.run()
        self.made = {file: text for file, text in contents(self.folder).items() if file not in inputs}
        self.begin(earlier=False)
        started = time.monotonic()
        self.run(functools.partial(forked.watch, str(self.folder), str(self.trace)))
        self.seconds, self.operations = time.monotonic() - started, len(self.trace.read_text().splitlines())

    def begin(self, earlier):
        """The folder as it is before the command: with its inputs alone, or with files of an earlier run, too."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for file, text in {**self.inputs, **dict.fromkeys(self.made if earlier else (), EARLIER)}.items():
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_bytes(text)

    def launch(self, *hooks):
        for log in (self.log, Path(f"{self.log}.out")):
            log.unlink(missing_ok=True)
        return forked.launch(self.root, self.command, self.log, *hooks)

    def run(self, *hooks):
        """Run the command to its end, and check that it leaves what it should."""
        process = self.launch(*hooks)
        process.join(300)
        assert process.exitcode == 0, self.log.read_text()
        found = contents(self.folder)
        assert [file for file in found if any(part[0] == "." for part in Path(file).parts)] == []
        assert not self.made or visible(found) == visible({**self.inputs, **self.made})

    def stop(self, chance, at_operation, sends=signal.SIGKILL):
        """Run the command and send it a signal; returns how it ended."""
        if at_operation:
            process = self.launch(functools.partial(forked.watch, str(self.folder), str(self.trace),
                                                    chance.randint(1, self.operations), sends))
        else:
            process = self.launch()
            time.sleep(chance.uniform(0, self.seconds))
            os.kill(process.pid, sends)
        process.join(300)
        return process.exitcode

    def check(self, earlier):
        """Every file is absent, old or new, and those that appear together are all old or all new, or all on disk.

        Returns whether anything is half done.
        """
        found = contents(self.folder) if self.folder.exists() else {}
        shown, old = visible(found), dict.fromkeys(self.made if earlier else (), EARLIER)
        assert shown.keys() <= {*self.inputs, *self.made} and {**shown, **self.inputs} == shown
        new = {file for file, text in visible(self.made).items() if shown.get(file) == text}
        assert all(file in new or shown.get(file) == old.get(file) for file in self.made)
        if self.together and new:
            for file in self.made.keys() - new:
                beside = [text for name, text in found.items() if re.fullmatch(
                    rf"\.{re.escape(file)}\..*\.unfinished", name)]
                assert beside == [self.made[file]]
        return shown.keys() != found.keys() or 0 < len(new) < len(self.made)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kills", KILLS)
def test_killed(name, kills, tmp_path, city, repo):
    trial, chance, killed, half_done = Trial(name, tmp_path, city, repo), random.Random(name), 0, 0
    for attempt in range(4 * kills):
        earlier = name != "tokens" and chance.random() < 0.5
        trial.begin(earlier)
        if trial.stop(chance, at_operation=attempt % 2 == 0) == -signal.SIGKILL:
            killed += 1
            half_done += trial.check(earlier)
        trial.run()
        if killed == kills:
            break
    print(f"{name}: {killed} kills, {half_done} with something half done; {trial.seconds:.2f} s of work, "
          f"{trial.operations} operations")
    assert killed == kills and half_done >= kills // 3


# Training goes on from its last checkpoint. 6 pairs are at most 3 steps an epoch; dropout is on, as in the README's
# commands.
STEPS = 12
FLAGS = ["--max_steps", STEPS, "--save_steps", "1", "--per_device_train_batch_size", "2", "--resume_from_checkpoint",
         "auto"]
ORDER = {1: ["--shared_prefix", "True", "--use_full_attn", "True"], 2: ["--train_sampling_strategy", "group_by_length"]}


def trained(folder, number):
    """Everything in checkpoint-N, and in stage 1's N/, read as those read it who use it; by name."""
    checkpoint = staging.checkpoint(folder, number)
    files = {name: load_file(checkpoint / name) for name in (ADAPTER, TRAINABLE_PARAMS)}
    files["optimizer"] = {f"{index} {name}": tensor for index, state in torch.load(
        checkpoint / "optimizer.pt", weights_only=True)["state"].items() for name, tensor in state.items()}
    files["schedule"] = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    files["random"] = {"cpu": torch.load(checkpoint / "rng_state.pth", weights_only=False)["cpu"]}
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kills", [pytest.param(6, id="short"), pytest.param(30, id="long", marks=pytest.mark.soak)])
def test_training_killed(repo, tmp_path, stage, kills):
    flags = [*FLAGS, *ORDER[stage], "--data_path", few_pairs(repo, stage, 6)]
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
