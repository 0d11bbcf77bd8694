"""The chain that trains the pointer alone: what it is made of, and that it leaves the data set's own files alone."""
import shutil
from pathlib import Path

import pytest

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.tables import chain, pointer_training

ROOT = Path(__file__).parents[3]
SAMPLES = ("train_sample.csv", "validate_sample.csv", "test_sample.csv", "town_gps_mapping.csv")


@pytest.fixture
def town(tmp_path, monkeypatch):
    """A preprocessed folder of a data set without a row, with questions of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    folder = artifacts.preprocessed("town", "mine")
    folder.mkdir(parents=True)
    for name in (*SAMPLES, artifacts.questions("test", "town", 2, use_sim=False)):
        (folder / name).write_text(f"head\n{name}\n")
    return folder


def test_the_steps_begin_with_the_samples_that_are_there(town):
    tests = pointer_training.steps(town, "work")
    assert list(tests) == ["test", "validate"] and all(
        test.command[test.command.index("--test_file") + 1].startswith(f"{split}_") for split, test in tests.items())
    steps = {step.id: step for test in tests.values() for step in chain.in_order(test)}.values()
    assert [step.name for step in steps] == ["samples", "questions", "model", "stage2", "test", "test"]
    samples, questions, model, trained, *_ = steps
    samples.run()
    copied = artifacts.preprocessed("town", samples.out)
    assert sorted(path.name for path in copied.iterdir()) == sorted(SAMPLES)
    assert all((copied / name).read_bytes() == (town / name).read_bytes() for name in SAMPLES)
    command = " ".join(part if isinstance(part, str) else part.name for part in questions.command)
    assert "-dataset_name town -datasets {out}" in command and "moment,gps" in command and "-validate True" in command
    assert "--layers 0" in " ".join(map(str, model.command)) and "--pointer True" in " ".join(map(str, trained.command))
    # Samples that changed are others, and what was made of these is not taken for theirs.
    (town / "train_sample.csv").write_text("head\nanother\n")
    assert not {step.id for step in chain.in_order(pointer_training.steps(town, "work")["test"])} & {
        step.id for step in steps}


def test_without_validation_pairs(town):
    for content in ("head\n", None):
        if content is None:
            (town / "validate_sample.csv").unlink()
        else:
            (town / "validate_sample.csv").write_text(content)
        test, = pointer_training.steps(town, "work").values()
        questions = next(step for step in chain.in_order(test) if step.name == "questions")
        assert questions.command[questions.command.index("-validate") + 1] == "False"


def test_a_missing_sample_is_told(town):
    (town / "test_sample.csv").unlink()
    with pytest.raises(UserError, match="test_sample.csv: not found; make it with `python data-preprocess/run.py"):
        pointer_training.train(town)
    assert not Path("runs").exists()
    shutil.rmtree("mine")
