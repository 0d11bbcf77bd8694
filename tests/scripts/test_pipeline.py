"""The README's commands in a copy of the repository: raw check-ins to Acc@k, with a tiny random Llama."""
import json
import re
import time

import commands
import forked
import numpy as np
import pytest
import torch
from commands import DATA, MAPPING, evaluation, losses
from forked import evaluate
from harness import call
from safetensors.torch import load_file

from ga_llm.evaluation.metrics import BLOCKS, table


def test_golden_run(repo):
    """Each step leaves what the next one reads, and the numbers at the end are over every test question."""
    gcim, llm = repo / "outputs/gcim", repo / "outputs/llm"
    assert sorted(p.name for p in gcim.iterdir() if p.is_dir()) == ["4", "6", "checkpoint-4", "checkpoint-6"]
    assert (gcim / "geo_encoder_final_merged.pth").exists()
    for stage in (gcim, llm):
        assert losses(stage / "checkpoint-6")[-1] < losses(stage / "checkpoint-6")[0]
    adapter = load_file(llm / "checkpoint-6/adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)

    result, metrics = commands.evaluate(repo, "outputs/llm/checkpoint-6", "--test_type", "llm")
    lines = (repo / DATA / "test_qa_pairs_kqt_200items_sample_llm_without_sim_gps.txt").read_text().splitlines()
    places = (repo / MAPPING).read_text().count("\n") - 1
    assert f"protocol ga-llm, n = {len(lines)}" in result.stdout and "Failed to load" not in result.stderr
    printed = next(line for line in result.stdout.splitlines() if line.startswith("Acc@1  "))
    for name in ("model", "user-history frequency", "popularity", "Markov chain"):
        assert metrics["all"][name]["n"] == metrics["fits"][name]["n"] == len(lines) > 20
        assert 0 < metrics["fits_released"][name]["n"] < len(lines)      # whose history is not cut to 10 check-ins
        assert f" {metrics['all'][name]['Acc@1']['value']:.4f}" in printed
    predictions = [json.loads(line) for line in (repo / "outputs/llm/checkpoint-6/predictions.jsonl").open()]
    assert [p["pair"] for p in predictions] == list(range(len(lines)))
    assert all(p["rank"] is None or 1 <= p["rank"] <= places for p in predictions)
    assert all(len({poi for poi, _ in p["top"]}) == 20 and p["top"] == sorted(p["top"], key=lambda x: -x[1])
               for p in predictions)
    assert all((p["rank"] <= 20) == (p["target"] in [poi for poi, _ in p["top"]]) for p in predictions if p["rank"])
    ranked = [p["rank"] for p in predictions]
    assert metrics["all"]["model"]["Acc@5"]["value"] == sum(r is not None and r <= 5 for r in ranked) / len(ranked)


@pytest.mark.bulk
@pytest.mark.parametrize("flags, same", [(["--test_type", "base"], False), (["--test_type", "projector"], False),
                                         (["--test_type", "llm", "--batch_size", "3"], True)])
def test_types_of_test(repo, flags, same):
    """base and projector leave the adapter out, so they rank otherwise; the batch size changes nothing."""
    def predictions(result):
        return [json.loads(line) for line in (repo / result.out.split()[-1]).open()]

    reference = predictions(evaluate(repo, "outputs/llm/checkpoint-6", "--test_type", "llm")[0])
    other = predictions(evaluate(repo, "outputs/llm/checkpoint-6", *flags)[0])
    difference = max(abs(a["top"][0][1] - b["top"][0][1]) for a, b in zip(reference, other))
    assert (difference < 1e-3) == same


@pytest.mark.bulk
@pytest.mark.parametrize("how", ["sample", "beam"])
def test_other_decodings(repo, how):
    result, metrics = evaluate(repo, "outputs/llm/checkpoint-6", "--decoding", how, "--limit", "3", "--batch_size", "2")
    assert f"outputs/llm/checkpoint-6/{how}_limit3/" in result.out
    assert metrics["all"]["model"]["n"] == metrics["all"]["popularity"]["n"] == 3
    assert ("Acc@5" in metrics["all"]["model"]) == (how == "beam") and "Acc@1" in metrics["all"]["model"]


def test_another_file_does_not_replace_the_tests_figures(repo):
    """Its results lie in a folder that is named by it, and tell whose questions they are."""
    output, folder = "outputs/llm/checkpoint-6", repo / "outputs/llm/checkpoint-6"
    _, whole = evaluate(repo, output)
    before = (folder / "metrics.json").read_bytes()
    name = "test_qa_pairs_kqt_200items_sample_llm_without_sim_gps.txt"
    lines = (repo / DATA / name).read_text().splitlines()[:3]
    for other, named in ((name.replace("test", "validate"), "validate"), ("mine.txt", "mine")):
        (repo / DATA / other).write_text("\n".join(lines) + "\n")
        result, metrics = evaluate(repo, output, "--test_file", other)
        assert f"{output}/{named}/metrics.json" in result.out and metrics["split"] == named and metrics["n"] == 3
        (repo / DATA / other).unlink()      # others are refused where there are validation questions
    assert (folder / "metrics.json").read_bytes() == before and whole["split"] == "test" and whole["n"] > 3


def test_protocol_and_comparison(repo):
    output = "outputs/llm/checkpoint-6"
    _, whole = evaluate(repo, output)
    result, sample = evaluate(repo, output, "--protocol", "sthgcn")
    assert whole["protocol"] == "ga-llm" and sample["protocol"] == "sthgcn" and 0 < sample["n"] <= whole["n"]
    files = [f"{output}/predictions.jsonl", f"{output}/sthgcn/predictions.jsonl"]
    assert f"protocol sthgcn, n = {sample['n']}" in result.out and (repo / files[1]).exists()
    same = call(repo, "test_next_gps.py", "--compare", files[0], files[0])
    assert same.code == 0 and "Acc@1" in same.out and "MRR" in same.out
    (repo / "again.jsonl").write_bytes((repo / files[0]).read_bytes())
    runs = call(repo, "test_next_gps.py", "--compare", files[0], f"{files[0]},again.jsonl")
    assert runs.code == 0 and "(1 of A, 2 of B)" in runs.out
    alone = call(repo, "tools/baselines.py", "-dataset_name", "sample")     # needs no model
    assert alone.code == 0
    others = {name: found for name, found in sample["all"].items() if name != "model"}
    for columns in BLOCKS:
        assert set(table(others, columns).splitlines()) <= set(alone.out.splitlines())
    unlike = call(repo, "test_next_gps.py", "--compare", *files)
    assert (unlike.code == 0) == (sample["n"] == whole["n"])


def test_killed_evaluation_ends_with_the_same_files(repo, tmp_path):
    flags = ["--batch_size", "1", "--full_table", "True"]
    folder = repo / "outputs/llm/checkpoint-6"
    evaluate(repo, "outputs/llm/checkpoint-6", *flags)
    names = ("predictions.jsonl", "log_probabilities.npy")
    whole = {name: (folder / name).read_bytes() for name in names}
    places = (repo / MAPPING).read_text().count("\n") - 1
    table, records = np.load(folder / names[1]), [json.loads(line) for line in whole[names[0]].splitlines()]
    assert table.shape == (len(records), places)
    for row, record in zip(table, records):
        assert sorted(row)[-20:][::-1] == pytest.approx([value for _, value in record["top"]], abs=1e-3)

    process = forked.launch(repo, evaluation("outputs/llm/checkpoint-6", *flags), tmp_path / "log")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        partial = list(folder.glob(".predictions.jsonl.*.partial"))
        if partial and partial[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.01)
    process.kill()
    process.join(120)
    done = partial[0].read_bytes().count(b"\n")
    assert 3 <= done < len(records)
    for name in names:
        (folder / name).unlink()
    result, _ = evaluate(repo, "outputs/llm/checkpoint-6", *flags)
    assert f"going on behind {done} pairs" in result.err
    assert {name: (folder / name).read_bytes() for name in names} == whole
    assert not list(folder.glob(".*partial"))


def test_prompts_that_do_not_fit_are_a_denominator_of_their_own(repo):
    _, metrics = evaluate(repo, "outputs/llm/checkpoint-6", "--seq_len", "300")
    assert 0 <= metrics["fits"]["model"]["n"] < metrics["all"]["model"]["n"]


def test_full_training_of_a_small_model(repo):
    forked.train(repo, 2, "outputs/full", "--low_rank_training", "False")
    assert losses(repo / "outputs/full/checkpoint-6")[-1] < losses(repo / "outputs/full/checkpoint-6")[0]
    _, metrics = evaluate(repo, "outputs/full/checkpoint-6", "--test_type", "llm")
    assert metrics["all"]["model"]["n"] > 20


def test_shared_prefix(repo):
    """Both stages train on trees; what stage 2 leaves is evaluated like any other."""
    flags = ["--shared_prefix", "True", "--use_full_attn", "True"]
    for stage, output in ((1, "outputs/gcim_trees"), (2, "outputs/trees")):
        forked.train(repo, stage, output, *flags)
        told = re.search(r"(\d+) pairs in (\d+) trees.*: (\d+) tokens instead of (\d+)",
                         (repo / f"{output}.log").read_text())
        pairs, trees, tokens, instead = map(int, told.groups())
        assert trees < pairs and tokens < instead
        assert losses(repo / output / "checkpoint-6")[-1] < losses(repo / output / "checkpoint-6")[0]
    _, metrics = evaluate(repo, "outputs/trees/checkpoint-6", "--test_type", "llm")
    assert metrics["all"]["model"]["n"] > 20


def test_a_finished_run_is_left_as_it_is(repo):
    """Resuming it trains no further; a final encoder that is missing is written from the checkpoint."""
    final = repo / "outputs/gcim/geo_encoder_final_merged.pth"
    before = torch.load(final, weights_only=True)
    final.unlink()
    forked.train(repo, 1, "outputs/gcim", "--resume_from_checkpoint", "auto")
    assert "nothing is left to train" in (repo / "outputs/gcim.log").read_text()
    assert sorted(p.name for p in (repo / "outputs/gcim").iterdir() if p.is_dir()) == ["4", "6", "checkpoint-4",
                                                                                       "checkpoint-6"]
    after = torch.load(final, weights_only=True)
    for name in before:
        torch.testing.assert_close(after[name], before[name])
    forked.train(repo, 2, "outputs/llm", "--resume_from_checkpoint", "auto")
    assert "nothing is left to train" in (repo / "outputs/llm.log").read_text()
    assert not (repo / "outputs/llm/checkpoint-7").exists()


@pytest.mark.bulk
@pytest.mark.parametrize("change, message", [
    (["--geoencoder_path", "outputs/nowhere.pth"], "outputs/nowhere.pth: not found; make it with"),
    (["--test_file", "nothing.txt"], "nothing.txt: not found; make it with `python data-preprocess/process_llm_gps.py"),
    (["--dataset_name", "venus"], "venus"),
    (["--context_size", "2048"], "give --context_size 4096"),
    (["--output_dir", "outputs/gcim"], "no adapter_config.json"),
])
def test_mistakes_are_one_line(repo, tmp_path, change, message):
    before = (repo / "outputs/llm/checkpoint-6/predictions.jsonl")
    kept = before.read_bytes() if before.exists() else None
    result = forked.run(repo, evaluation("outputs/llm/checkpoint-6", *change), tmp_path / "log")
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.strip().splitlines()[-1].startswith("error: ") and message in result.err
    assert kept is None or before.read_bytes() == kept


def test_stage_2_refuses_an_encoder_of_another_width(repo, tmp_path):
    assert call(repo, "tools/make_tiny_llama.py", "--output_dir", "models/width48", "--hidden", "48").code == 0
    command = forked.training(2, "outputs/wide", "--model_name_or_path", "models/width48")
    result = forked.run(repo, command, tmp_path / "log", **forked.ranks())
    assert result.code == 2
    assert "made for an LLM of width 32, this one has 48" in result.err
    assert not (repo / "outputs/wide").exists()
