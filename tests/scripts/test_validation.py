"""Validation while the scripts train: one process and two, its best checkpoint, and the ranking at the end."""
import functools
import json
import shutil
import signal

import forked
import numpy as np
import pytest
from commands import DATA, PAIRS, few_pairs, free_port, needs_deepspeed
from harness import call
from test_processes import STACKS

from ga_llm.base import artifacts
from ga_llm.pairs import sft_data
from ga_llm.training import run_log, staging

FOLDER = "validated/sample/preprocessed"
FLAGS = ["--data_path", PAIRS[2].replace(DATA, FOLDER), "--gps_mapping_path", f"{FOLDER}/sample_gps_mapping.csv",
         "--load_in_4bit", "False", "--bf16", "False", "--max_steps", "4", "--save_steps", "2", "--eval_strategy",
         "steps", "--load_best_model_at_end", "True", "--learning_rate", "1e-3"]
RANKED = ["--lora_dropout", "0", "--eval_ranked", "5"]


@pytest.fixture(scope="module")
def validated(repo):
    """The repository with both stages' questions of the validation split, too, in a folder of their own."""
    shutil.copytree(repo / DATA, repo / FOLDER)
    for stage in ("projector_gps_stage1", "llm_gps"):
        result = call(repo, f"data-preprocess/process_{stage}.py", "-dataset_name", "sample", "-datasets", "validated",
                      "-use_sim", "False", "-max_history", "10", "-validate", "True")
        assert result.code == 0, result.err
    return repo


def log(repo, output):
    return run_log.read_log(repo / output / artifacts.TRAINER_LOG)


def evaluations(repo, output):
    return [(line["step"], line["eval_loss"], line["eval_tokens"]) for line in log(repo, output) if "eval_loss" in line]


@pytest.fixture(scope="module")
def one_process(validated):
    forked.train(validated, 2, "outputs/validated", *FLAGS, *RANKED, "--report_to", "tensorboard")
    return "outputs/validated"


def test_what_is_ranked_at_the_end_is_what_the_test_ranks(validated, one_process, tmp_path):
    """The figures are those of the drawn ones among all pairs that `--split validate` ranks."""
    (first, at_2, _), (last, at_4, _) = evaluations(validated, one_process)
    assert (first, last) == (2, 4) and at_4 < at_2
    best = json.loads((validated / one_process / artifacts.RUN).read_text())["best"]
    assert best == {"checkpoint": "checkpoint-4", "step": 4, "eval_loss": at_4}

    checkpoint = f"{one_process}/checkpoint-4"
    result = forked.run(validated, ["test_next_gps.py", "--output_dir", checkpoint, "--split", "validate"],
                        tmp_path / "log")
    assert result.code == 0, result.err
    everyone = [json.loads(line) for line in (validated / checkpoint / "validate" / artifacts.PREDICTIONS).open()]
    ranks = np.array([everyone[i]["rank"] for i in sft_data.drawn(len(everyone), 5)], dtype=float)
    line, = (line for line in log(validated, one_process) if "eval_MRR" in line)
    assert len(everyone) > 5 == line["eval_ranked"] and line["step"] == line["eval_ranked_step"] == 4
    assert (line["eval_Acc@1"], line["eval_MRR"]) == (np.mean(ranks == 1), pytest.approx(np.mean(1 / ranks)))
    drawn = json.loads((validated / checkpoint / "validate_draw5" / artifacts.METRICS).read_text())
    assert drawn["n"] == 5 and drawn["split"] == "validate"
    assert drawn["all"]["model"]["MRR"]["value"] == line["eval_MRR"]

    # The training's output has one line of it, and none of the test's tables.
    printed, out = ((validated / f"{one_process}.log{suffix}").read_text() for suffix in ("", ".out"))
    history = drawn["all"]["user-history frequency"]
    assert len([said for said in printed.splitlines() if (
        f"5 validation questions ranked: Acc@1 {line['eval_Acc@1']:.4f} (user-history frequency: "
        f"{history['Acc@1']['value']:.4f}), MRR {line['eval_MRR']:.4f} (user-history frequency: "
        f"{history['MRR']['value']:.4f}); all metrics are in ") in said and said.endswith(
            f"checkpoint-4/validate_draw5/{artifacts.METRICS}")]) == 1
    assert "all pairs" not in printed + out and "NDCG" not in printed + out

    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars = events.EventAccumulator(str(next((validated / one_process / "runs").iterdir()))).Reload()
    assert [event.value for event in scalars.Scalars("eval/MRR")] == [pytest.approx(line["eval_MRR"])]


@pytest.mark.slow
def test_started_again_it_ranks_what_is_not_ranked(validated, one_process):
    """A kill may come between the last checkpoint and the ranking's line; its line comes once."""
    output = validated / one_process
    path, again = output / artifacts.TRAINER_LOG, [*FLAGS, *RANKED, "--resume_from_checkpoint", "auto"]
    whole = path.read_text()
    forked.train(validated, 2, one_process, *again)
    assert path.read_text() == whole
    path.write_text("".join(line for line in whole.splitlines(True) if "eval_MRR" not in line))
    results = output / "checkpoint-4/validate_draw5"
    shutil.rmtree(results)
    told = functools.partial(forked.tell, "ga_llm.training.ranked:release", 1, signal.SIGUSR1)
    forked.train(validated, 2, one_process, *again, hooks=[told])
    assert not results.exists() and "eval_MRR" not in path.read_text()
    forked.train(validated, 2, one_process, *again)
    lines = [[{**line, "elapsed_seconds": 0} for line in map(json.loads, text.splitlines())]
             for text in (path.read_text(), whole)]
    assert lines[0] == lines[1] and (results / artifacts.METRICS).is_file()


# Each ranks in a process of its own, which costs most. ZeRO-2 has whole weights, as DDP, and is DeepSpeed, as ZeRO-3.
@pytest.mark.slow
@pytest.mark.parametrize("stack", ["ddp", pytest.param("zero2", marks=pytest.mark.soak), "zero3", "fsdp2"])
def test_two_processes_find_the_same_loss(validated, one_process, stack):
    if stack.startswith("zero"):
        needs_deepspeed()
    output = f"outputs/validated_{stack}"
    forked.train(validated, 2, output, *FLAGS, *RANKED, "--eval_ranked", "3", "--per_device_train_batch_size", "1",
                 "--per_device_eval_batch_size", "3", *STACKS[stack], processes=2)
    for (step, loss, tokens), expected in zip(evaluations(validated, output), evaluations(validated, one_process),
                                              strict=True):
        assert (step, tokens) == (expected[0], expected[2]) and loss == pytest.approx(expected[1], rel=1e-3)
    line, = (line for line in log(validated, output) if "eval_MRR" in line)
    assert line["eval_ranked"] == 3 and staging.steps(validated / output) == [2, 4]


@pytest.mark.slow
def test_stage_1(validated):
    """The loss alone: its final encoder is the best checkpoint's."""
    pairs = PAIRS[1].replace(DATA, FOLDER)
    forked.train(validated, 1, "outputs/validated_1", *FLAGS[2:], "--data_path", pairs, "--eval_limit", "5",
                 "--early_stopping_patience", "9")
    found = evaluations(validated, "outputs/validated_1")
    assert [step for step, _, _ in found] == [2, 4] and found[0][1] != found[1][1]
    best = min(found, key=lambda line: line[1])[0]
    folder = validated / "outputs/validated_1"
    assert (folder / artifacts.FINAL_ENCODER).read_bytes() == (
        folder / f"{best}/{artifacts.MERGED_ENCODER}").read_bytes()


@pytest.mark.slow
def test_pam(validated):
    """On questions of one's own, for there are none of the validation split."""
    for script in ("poi_embeddings.py", "process_pam_stage1.py"):
        assert call(validated, f"data-preprocess/{script}", "-dataset_name", "sample").code == 0
    flags = FLAGS[FLAGS.index("--load_in_4bit"):]
    process, = forked.start(validated, "pam", "outputs/validated_pam", *flags)
    process.join(300)
    assert process.exitcode == 2
    assert "give --eval_data_path" in (validated / "outputs/validated_pam.log").read_text().splitlines()[-1]
    forked.train(validated, "pam", "outputs/validated_pam", *flags, "--eval_data_path", few_pairs(validated, "pam", 9))
    assert [step for step, *_ in evaluations(validated, "outputs/validated_pam")] == [2, 4]


@pytest.mark.parametrize("flags, message", [
    (["--eval_ranked", "-1"], "--eval_ranked -1: must be at least 0"),
    (["--gps_mapping_path", f"{DATA}/../mapping.csv"], "--eval_ranked 200: ranking wants"),
    (["--data_path", PAIRS[2]], "--eval_strategy: "), (["--eval_data_path", "nowhere.txt"], "nowhere.txt: not found"),
    (["--eval_data_path", f"{DATA}/{artifacts.questions('test', 'sample', 2, False)}"], "questions of the test split"),
    (["--eval_data_path", FLAGS[1]], "the questions that it is trained on")])
def test_mistakes(validated, tmp_path, flags, message):
    shutil.copy(validated / f"{DATA}/sample_gps_mapping.csv", validated / f"{DATA}/../mapping.csv")
    result = forked.run(validated, forked.training(2, tmp_path / "O", *FLAGS, *flags), tmp_path / "log",
                        **forked.ranks(port=free_port()))
    assert result.code == 2 and message in result.err.splitlines()[-1] and not (tmp_path / "O").exists()
