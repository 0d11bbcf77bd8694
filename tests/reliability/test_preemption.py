"""Trainings that SIGTERM or SIGUSR1 tell to stop: whole, with exit code 0, and what follows is as if undisturbed."""
import functools
import signal
import sys

import forked
import pytest
from commands import few_pairs, needs_deepspeed, run
from safetensors.torch import load_file

from ga_llm.base.artifacts import FINAL_ENCODER, FINAL_PROJECTOR, TRAINER_LOG
from ga_llm.training import run_log, staging
from ga_llm.training.checkpoints import ADAPTER

pytestmark = pytest.mark.bulk

# 12 pairs in batches of 2 are 6 batches an epoch, 3 with two processes; dropout is on.
STEPS = 8
FLAGS = ["--max_steps", STEPS, "--save_steps", "4", "--per_device_train_batch_size", "2"]
AUTO = ["--resume_from_checkpoint", "auto"]
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
FINAL = {1: [FINAL_ENCODER], 2: [], "pam": [FINAL_PROJECTOR]}
STEP = "ga_llm.training.trainers:GATrainer.training_step"
LOAD, PUBLISH = "ga_llm.llm.backbone:load_llm", "ga_llm.training.staging:publish"


@pytest.fixture(scope="module")
def trained(repo):
    """trained(stage, *flags, processes=1): the folder of an undisturbed run."""
    made = {}

    def make(stage, *flags, processes=1):
        key = (stage, processes, *flags)
        if key not in made:
            if stage == "pam" and "pam" not in str(made):
                for script in ("poi_embeddings.py", "process_pam_stage1.py"):
                    run(repo, sys.executable, f"data-preprocess/{script}", "-dataset_name", "sample")
            made[key] = f"outputs/undisturbed_{len(made)}"
            forked.train(repo, stage, made[key], *all_flags(repo, stage, *flags), processes=processes)
        return repo / made[key]
    return make


def all_flags(repo, stage, *flags):
    return [*FLAGS, "--data_path", few_pairs(repo, stage, 12), *flags]


def stopped(repo, stage, folder, *flags, processes=1, hooks, word):
    """Train until told to stop; returns the steps at which there are checkpoints."""
    log = folder.with_name(folder.name + ".log")
    log.unlink(missing_ok=True)
    started = forked.start(repo, stage, folder, *all_flags(repo, stage, *flags), processes=processes, hooks=hooks)
    for process in started:
        process.join(300)
    text = log.read_text()
    assert [process.exitcode for process in started] == [0] * processes and "Traceback" not in text, text
    lines = [line.partition(" ")[2] for line in text.splitlines() if "told to stop" in line]
    assert len(lines) == 1 and lines[0].startswith("told to stop by ") and word in lines[0]
    assert lines[0].endswith("go on by the same command with --resume_from_checkpoint auto")
    assert not staging.staging(folder).exists() and not [name for name in FINAL[stage] if (folder / name).exists()]
    return staging.steps(folder)


def go_on(repo, stage, folder, *flags, processes=1):
    forked.train(repo, stage, folder, *all_flags(repo, stage, *flags), *AUTO, processes=processes)


def check_alike(folder, undisturbed):
    """The last checkpoint, byte by byte but for the notes about the run itself; the losses; the final files."""
    def contents(root):
        paths = [*staging.checkpoint(root, STEPS).rglob("*"), *root.glob(f"{STEPS}/*"), *root.glob("*_final*")]
        return {path.relative_to(root): path.read_bytes() for path in paths
                if path.is_file() and path.name not in ("trainer_state.json", "training_args.bin")}

    ours, theirs = contents(folder), contents(undisturbed)
    assert ours.keys() == theirs.keys() and len(ours) >= 6
    assert [name for name in ours if ours[name] != theirs[name]] == []
    losses = [[(line["step"], line["loss"]) for line in run_log.read_log(root / TRAINER_LOG)]
              for root in (folder, undisturbed)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stage, number", [(1, TERM), (2, USR1), ("pam", USR1)])
def test_stops_after_the_step_and_goes_on(repo, tmp_path, trained, stage, number):
    undisturbed, folder = trained(stage), tmp_path / "stopped"
    hook = functools.partial(forked.tell, STEP, 3, number)
    assert stopped(repo, stage, folder, hooks=[hook], word=f"by {number.name}: step 3 of 8 was the last, saved") == [3]
    go_on(repo, stage, folder)
    check_alike(folder, undisturbed)


@pytest.mark.slow
def test_within_accumulated_steps_and_again_and_again(repo, tmp_path, trained):
    """Told in the first of a step's two batches: the second is read. Each start is told anew, twice at once."""
    flags = ["--gradient_accumulation_steps", "2", "--save_strategy", "epoch"]
    undisturbed, folder = trained(2, *flags), tmp_path / "stopped"
    for start, (numbers, last) in enumerate([((USR1, USR1), 2), ((TERM, USR1), 4), ((TERM, TERM), 6)]):
        assert last in stopped(repo, 2, folder, *flags, *AUTO * bool(start), word=f"step {last} of 8",
                               hooks=[functools.partial(forked.tell, STEP, 3, *numbers)])
    go_on(repo, 2, folder, *flags)
    check_alike(folder, undisturbed)


@pytest.mark.parametrize("hook, word, steps", [
    ((LOAD, 1, USR1), "by SIGUSR1: before the first step", []),
    ((PUBLISH, 1, TERM), "by SIGTERM: step 4 of 8", [4]),
    ((PUBLISH, 1, USR1, USR1, TERM), "step 4 of 8", [4]),
    ((STEP, 4, USR1), "step 4 of 8", [4])], ids=["loading", "saving", "saving, thrice", "before saving"])
def test_at_other_moments(repo, tmp_path, hook, word, steps):
    assert stopped(repo, 1, tmp_path / "stopped", hooks=[functools.partial(forked.tell, *hook)], word=word) == steps


@pytest.mark.parametrize("hook", [
    (STEP, STEPS, USR1), (PUBLISH, 2, TERM),
    ("ga_llm.training.trainers:EncoderTrainer.save_final_encoders", 1, USR1, TERM),
    ("ga_llm.base.sharding:leave", 1, TERM)], ids=["last step", "last checkpoint", "final files", "end"])
def test_too_late_it_is_done(repo, tmp_path, trained, hook):
    folder = tmp_path / "done"
    forked.train(repo, 1, folder, *all_flags(repo, 1), hooks=[functools.partial(forked.tell, *hook)])
    assert "told to stop" not in folder.with_name("done.log").read_text()
    check_alike(folder, trained(1))


@pytest.mark.parametrize("hooks, last", [
    ([(STEP, 3, USR1, 1), (STEP, 5, USR1, 0)], 3), ([(PUBLISH, 1, USR1, 0)], 4), ([(LOAD, 1, TERM, 1)], None),
    pytest.param([(STEP, 3, USR1, 0)], 3, marks=pytest.mark.soak),
    pytest.param([(STEP, 3, TERM, None)], 3, marks=pytest.mark.soak)],
    ids=["at different steps", "saving", "loading", "first", "both"])
def test_two_processes_stop_at_one_step(repo, tmp_path, hooks, last):
    """Whichever of them are told, and when."""
    hooks = [functools.partial(forked.tell, *hook, rank=rank) for *hook, rank in hooks]
    word = "before the first step" if last is None else f"step {last} of 8"
    assert stopped(repo, 1, tmp_path / "stopped", processes=2, hooks=hooks, word=word) == [last] * bool(last)


@pytest.mark.slow
def test_two_processes_go_on(repo, tmp_path, trained):
    """The second alone is told."""
    folder = tmp_path / "stopped"
    hook = functools.partial(forked.tell, STEP, 3, USR1, rank=1)
    assert stopped(repo, 1, folder, processes=2, hooks=[hook], word="step 3 of 8") == [3]
    go_on(repo, 1, folder, processes=2)
    check_alike(folder, trained(1, processes=2))


STACKS = {"zero2": ["--deepspeed", "ds_configs/stage2.json"], "zero3": ["--deepspeed", "ds_configs/stage3.json"],
          "fsdp2": ["--fsdp", "True"]}


@pytest.mark.slow
@pytest.mark.parametrize("stack", [pytest.param("zero2", marks=pytest.mark.soak), "zero3", "fsdp2"])
def test_cut_up_among_two_processes(repo, tmp_path, trained, stack):
    """One is told, in the first of a step's two batches."""
    if stack != "fsdp2":
        needs_deepspeed()
    flags = [*STACKS[stack], "--gradient_accumulation_steps", "2", "--load_in_4bit", "False", "--bf16", "False"]
    undisturbed, folder = trained(2, *flags, processes=2), tmp_path / "stopped"
    hook = functools.partial(forked.tell, STEP, 4, USR1, rank=1)
    assert stopped(repo, 2, folder, *flags, processes=2, hooks=[hook], word="step 3 of 8") == [3]
    go_on(repo, 2, folder, *flags, processes=2)
    one, other = (load_file(staging.checkpoint(root, STEPS) / ADAPTER) for root in (folder, undisturbed))
    assert all((one[name] == other[name]).all() for name in other)
