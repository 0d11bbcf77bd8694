"""Folders that appear whole, and the deletion of nothing that is not ours."""
import pytest

from ga_llm.base.artifacts import MERGED_ENCODER
from ga_llm.base.cli import UserError
from ga_llm.training import staging


def write(output, step, content="x", encoder=True):
    hidden = staging.staging(output)
    shard, weights = staging.checkpoint(hidden, step) / "global_step1/shard", hidden / str(step) / MERGED_ENCODER
    for path in (shard, weights) if encoder else (shard,):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def names(output):
    return sorted(path.name for path in output.iterdir())


def test_the_last_ones_stay(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step)
        staging.publish(tmp_path, step, keep=2)
        assert staging.last_checkpoint(tmp_path).name == f"checkpoint-{step}"
    assert names(tmp_path) == ["100", "15", "checkpoint-100", "checkpoint-15"]


@pytest.mark.parametrize("keep", [None, 0])
def test_no_limit(tmp_path, keep):
    for step in (1, 2, 3):
        write(tmp_path, step, encoder=False)
        staging.publish(tmp_path, step, keep)
    assert staging.steps(tmp_path) == [1, 2, 3]


def test_a_run_that_went_further_is_left_alone_until_overtaken(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step, "old")
        staging.publish(tmp_path, step, keep=None)
    write(tmp_path, 4, "new")       # gone back to 2
    staging.publish(tmp_path, 4, keep=1)
    assert staging.steps(tmp_path) == [4, 6]
    assert (tmp_path / "checkpoint-4/global_step1/shard").read_text() == (tmp_path / "4" / MERGED_ENCODER).read_text()
    assert (tmp_path / "4" / MERGED_ENCODER).read_text() == "new"


def test_what_a_killed_run_left_is_swept_and_nothing_else(tmp_path):
    output, outside = tmp_path / "output", tmp_path / "outside"
    outside.mkdir()
    (outside / MERGED_ENCODER).write_text("not ours")
    write(output, 3)
    staging.publish(output, 3, keep=None)
    write(output, 7)                                            # killed while it was written,
    write(output, 5)
    staging.move_files(staging.staging(output) / "5", output / "5")     # or between the two renames
    (output / "9").mkdir()                                      # a folder of the user's
    (output / "11").symlink_to(outside)
    (output / "notes.txt").write_text("mine")
    (staging.staging(output) / "link").symlink_to(outside)
    staging.sweep(output)
    assert names(output) == ["11", "3", "9", "checkpoint-3", "notes.txt"]
    assert (outside / MERGED_ENCODER).read_text() == "not ours"
    staging.sweep(output)
    staging.sweep(tmp_path / "nowhere")
    assert names(output) == ["11", "3", "9", "checkpoint-3", "notes.txt"] and not (tmp_path / "nowhere").exists()


def test_a_hidden_folder_that_is_a_link_is_refused(tmp_path):
    output, outside = tmp_path / "output", tmp_path / "outside"
    output.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("x")
    staging.staging(output).symlink_to(outside)
    with pytest.raises(UserError, match="a link; remove it"):
        staging.sweep(output)
    assert (outside / "precious").exists()


def test_a_link_to_a_checkpoint_elsewhere_is_pruned_as_a_link(tmp_path):
    output, outside = tmp_path / "output", tmp_path / "elsewhere"
    write(output, 1, encoder=False)
    staging.publish(output, 1, keep=None)
    (output / "checkpoint-1").rename(outside)
    (output / "checkpoint-1").symlink_to(outside)
    write(output, 2, encoder=False)
    staging.publish(output, 2, keep=1)
    assert names(output) == ["checkpoint-2"] and (outside / "global_step1/shard").exists()
