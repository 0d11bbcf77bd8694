"""The README's commands in a copy of the repository: raw check-ins to Acc@k, with a tiny random Llama."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
CODE = ("best_conf", "data-preprocess", "ds_configs", "ga_llm", "geo_encoder", "tools", "finetune_GCIM.py",
        "finetune_LLM_with_GCIM.py", "test_next_gps.py")
DATA = "datasets/sample/preprocessed"
MAPPING = f"{DATA}/sample_gps_mapping.csv"
README_FLAGS = f"""--model_name_or_path models/tiny --bf16 True --gps_mapping_path {MAPPING} --model_max_length 4096
    --use_flash_attn True --low_rank_training True --num_train_epochs 1 --max_steps 6 --per_device_train_batch_size 2
    --per_device_eval_batch_size 2 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
    --save_steps 2 --save_total_limit 2 --learning_rate 2e-3 --weight_decay 0.0 --warmup_steps 2
    --lr_scheduler_type constant_with_warmup --logging_steps 1 --tf32 True""".split()


def run(repo, *command, check=True):
    """Run a command from the repository's root, as a user would."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PATH": path}
    result = subprocess.run([str(part) for part in command], cwd=repo, env=environment, capture_output=True, text=True,
                            timeout=600)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result


def torchrun(repo, script, *flags, processes=1, port=29611, check=True):
    return run(repo, "torchrun", f"--nproc_per_node={processes}", f"--master_port={port}", script, *README_FLAGS,
               *flags, check=check)


def stage_1(repo, output, *flags, **options):
    return torchrun(repo, "finetune_GCIM.py", "--output_dir", output, "--data_path",
                    f"{DATA}/train_qa_pairs_kqt_200items_sample_projector_gps_without_sim_stage1.json",
                    "--lora_r", "8", "--lora_alpha", "16", *flags, **options)


def stage_2(repo, output, *flags, **options):
    return torchrun(repo, "finetune_LLM_with_GCIM.py", "--output_dir", output, "--data_path",
                    f"{DATA}/train_qa_pairs_kqt_200items_sample_llm_without_sim_gps.json", "--geoencoder_path",
                    "outputs/gcim/6/geo_encoder_merged.pth", *flags, **options)


def evaluation(output, *flags):
    return ["test_next_gps.py", "--batch_size", "8", "--base_model", "models/tiny", "--output_dir", output,
            "--cache_dir", "./cache", "--seq_len", "4096", "--context_size", "4096", "--flash_attn", "True",
            "--model_path", "models/tiny", "--data_path", "datasets", "--dataset_name", "sample", "--test_file",
            "test_qa_pairs_kqt_200items_sample_llm_without_sim_gps.txt", "--gps_mapping_path", MAPPING,
            "--geoencoder_path", "outputs/gcim/6/geo_encoder_merged.pth", "--use_random_projector", "False", *flags]


def evaluate(repo, output, *flags, check=True):
    result = run(repo, sys.executable, *evaluation(output, *flags), check=check)
    if not check:
        return result, None
    wrote = result.stdout.strip().splitlines()[-1].split()
    assert wrote[0] == "wrote" and (repo / wrote[3]).name == "predictions.jsonl"
    return result, json.loads((repo / wrote[1]).read_text())


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    """A copy of the code, then every step up to a trained stage 2."""
    repo = tmp_path_factory.mktemp("repo")
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, repo / name, **({"ignore": shutil.ignore_patterns("data", "__pycache__")}
                                          if copy is shutil.copytree else {}))
    for command in (["data-preprocess/make_sample_raw.py", "-users", "30", "-days", "60"],
                    ["data-preprocess/run.py", "-f", "best_conf/sample.yml"],
                    ["data-preprocess/traj_qk.py", "-dataset_name", "sample"],
                    ["data-preprocess/process_projector_gps_stage1.py", "-dataset_name", "sample", "-use_sim", "False"],
                    ["data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-use_sim", "False",
                     "-max_history", "10"],
                    ["tools/make_tiny_llama.py", "--output_dir", "models/tiny", "--hidden", "32", "--kv_heads", "2"]):
        run(repo, sys.executable, *command)
    stage_1(repo, "outputs/gcim")
    stage_2(repo, "outputs/llm")
    return repo


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_golden_run(repo):
    """Each step leaves what the next one reads, and the numbers at the end are over every test question."""
    gcim, llm = repo / "outputs/gcim", repo / "outputs/llm"
    assert sorted(p.name for p in gcim.iterdir() if p.is_dir()) == ["4", "6", "checkpoint-4", "checkpoint-6"]
    assert (gcim / "geo_encoder_final_merged.pth").exists()
    for stage in (gcim, llm):
        assert losses(stage / "checkpoint-6")[-1] < losses(stage / "checkpoint-6")[0]
    adapter = load_file(llm / "checkpoint-6/adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)

    result, metrics = evaluate(repo, "outputs/llm/checkpoint-6", "--test_type", "llm")
    lines = (repo / DATA / "test_qa_pairs_kqt_200items_sample_llm_without_sim_gps.txt").read_text().splitlines()
    places = (repo / MAPPING).read_text().count("\n") - 1
    assert f"protocol ga-llm, n = {len(lines)}" in result.stdout
    for name in ("model", "user-history frequency", "popularity", "Markov chain"):
        assert metrics["all"][name]["n"] == metrics["fits"][name]["n"] == len(lines) > 20
        assert f"{name:22}  {len(lines):>6}  {metrics['all'][name]['Acc@1']['value']:.4f}" in result.stdout
    predictions = [json.loads(line) for line in (repo / "outputs/llm/checkpoint-6/predictions.jsonl").open()]
    assert [p["pair"] for p in predictions] == list(range(len(lines)))
    assert all(p["rank"] is None or 1 <= p["rank"] <= places for p in predictions)
    assert all(len({poi for poi, _ in p["top"]}) == 20 and p["top"] == sorted(p["top"], key=lambda x: -x[1])
               for p in predictions)
    assert all((p["rank"] <= 20) == (p["target"] in [poi for poi, _ in p["top"]]) for p in predictions if p["rank"])
    ranked = [p["rank"] for p in predictions]
    assert metrics["all"]["model"]["Acc@5"]["value"] == sum(r is not None and r <= 5 for r in ranked) / len(ranked)


@pytest.mark.parametrize("flags, same", [(["--test_type", "base"], False), (["--test_type", "projector"], False),
                                         (["--test_type", "llm", "--batch_size", "3"], True)])
def test_types_of_test(repo, flags, same):
    """base and projector leave the adapter out, so they rank otherwise; the batch size changes nothing."""
    def predictions(result):
        return [json.loads(line) for line in (repo / result.stdout.split()[-1]).open()]

    reference = predictions(evaluate(repo, "outputs/llm/checkpoint-6", "--test_type", "llm")[0])
    other = predictions(evaluate(repo, "outputs/llm/checkpoint-6", *flags)[0])
    difference = max(abs(a["top"][0][1] - b["top"][0][1]) for a, b in zip(reference, other))
    assert (difference < 1e-3) == same


@pytest.mark.parametrize("how", ["sample", "beam"])
def test_other_decodings(repo, how):
    result, metrics = evaluate(repo, "outputs/llm/checkpoint-6", "--decoding", how, "--limit", "12")
    assert f"outputs/llm/checkpoint-6/{how}_limit12/" in result.stdout
    assert metrics["all"]["model"]["n"] == metrics["all"]["popularity"]["n"] == 12
    assert ("Acc@5" in metrics["all"]["model"]) == (how == "beam") and "Acc@1" in metrics["all"]["model"]


def test_protocol_and_comparison(repo):
    output = "outputs/llm/checkpoint-6"
    _, whole = evaluate(repo, output)
    result, sample = evaluate(repo, output, "--protocol", "sthgcn")
    assert whole["protocol"] == "ga-llm" and sample["protocol"] == "sthgcn" and 0 < sample["n"] <= whole["n"]
    files = [f"{output}/predictions.jsonl", f"{output}/sthgcn/predictions.jsonl"]
    assert f"protocol sthgcn, n = {sample['n']}" in result.stdout and (repo / files[1]).exists()
    same = run(repo, sys.executable, "test_next_gps.py", "--compare", files[0], files[0])
    assert "Acc@1" in same.stdout and "MRR" in same.stdout
    alone = run(repo, sys.executable, "tools/baselines.py", "-dataset_name", "sample")     # needs no model
    for line in result.stdout.split("by group")[0].splitlines():
        assert not line.startswith(("user-history", "popularity", "Markov")) or line in alone.stdout.splitlines()
    unlike = run(repo, sys.executable, "test_next_gps.py", "--compare", *files, check=False)
    assert (unlike.returncode == 0) == (sample["n"] == whole["n"])


def test_killed_evaluation_ends_with_the_same_files(repo):
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

    process = subprocess.Popen([sys.executable, *evaluation("outputs/llm/checkpoint-6", *flags)], cwd=repo,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        partial = list(folder.glob(".predictions.jsonl.*.partial"))
        if partial and partial[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = partial[0].read_bytes().count(b"\n")
    assert 3 <= done < len(records)
    for name in names:
        (folder / name).unlink()
    result, _ = evaluate(repo, "outputs/llm/checkpoint-6", *flags)
    assert f"going on behind {done} pairs" in result.stderr
    assert {name: (folder / name).read_bytes() for name in names} == whole
    assert not list(folder.glob(".*partial"))


def test_prompts_that_do_not_fit_are_a_denominator_of_their_own(repo):
    _, metrics = evaluate(repo, "outputs/llm/checkpoint-6", "--seq_len", "300")
    assert 0 <= metrics["fits"]["model"]["n"] < metrics["all"]["model"]["n"]


def test_full_training_of_a_small_model(repo):
    stage_2(repo, "outputs/full", "--low_rank_training", "False")
    assert losses(repo / "outputs/full/checkpoint-6")[-1] < losses(repo / "outputs/full/checkpoint-6")[0]
    _, metrics = evaluate(repo, "outputs/full/checkpoint-6", "--test_type", "llm")
    assert metrics["all"]["model"]["n"] > 20


def test_resume(repo):
    stage_1(repo, "outputs/resumed", "--max_steps", "2")
    result = stage_1(repo, "outputs/resumed", "--resume_from_checkpoint", "auto")
    assert "resuming from outputs/resumed/checkpoint-2" in result.stderr
    assert len(losses(repo / "outputs/resumed/checkpoint-6")) == 6
    one, two = (torch.load(repo / f"outputs/{name}/6/geo_encoder_merged.pth", weights_only=True)
                for name in ("gcim", "resumed"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3)


def test_a_finished_run_is_left_as_it_is(repo):
    """Resuming it trains no further; a final encoder that is missing is written from the checkpoint."""
    final = repo / "outputs/gcim/geo_encoder_final_merged.pth"
    before = torch.load(final, weights_only=True)
    final.unlink()
    result = stage_1(repo, "outputs/gcim", "--resume_from_checkpoint", "auto")
    assert "nothing is left to train" in result.stderr
    assert sorted(p.name for p in (repo / "outputs/gcim").iterdir() if p.is_dir()) == ["4", "6", "checkpoint-4",
                                                                                       "checkpoint-6"]
    after = torch.load(final, weights_only=True)
    for name in before:
        torch.testing.assert_close(after[name], before[name])
    result = stage_2(repo, "outputs/llm", "--resume_from_checkpoint", "auto")
    assert "nothing is left to train" in result.stderr and not (repo / "outputs/llm/checkpoint-7").exists()


@pytest.mark.slow
def test_two_processes(repo):
    """Both ranks train one model: half the steps for the same pairs, and every checkpoint is whole."""
    stage_1(repo, "outputs/ddp1", "--max_steps", "-1", "--save_steps", "1000", processes=2)
    state = json.loads(next((repo / "outputs/ddp1").glob("checkpoint-*/trainer_state.json")).read_text())
    pairs = (repo / DATA / "train_qa_pairs_kqt_200items_sample_projector_gps_without_sim_stage1.json").read_text()
    count = pairs.count('{"question"')
    assert abs(state["global_step"] - count / 4) <= 1


@pytest.mark.slow
def test_deepspeed_and_its_conversion(repo):
    """The README's --deepspeed and zero_to_fp32.py; what it writes is what the checkpoint holds in bf16."""
    pytest.importorskip("deepspeed")
    if not (shutil.which("g++") and shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("DeepSpeed compiles on a CPU: needs g++ and ninja")
    stage_2(repo, "outputs/ds", "--deepspeed", "ds_configs/stage2.json")
    checkpoint = "outputs/ds/checkpoint-6"
    _, direct = evaluate(repo, checkpoint)
    run(repo, sys.executable, f"{checkpoint}/zero_to_fp32.py", checkpoint, f"{checkpoint}/pytorch_model.bin")
    result, converted = evaluate(repo, checkpoint)
    assert "weights from outputs/ds/checkpoint-6/pytorch_model.bin" in result.stderr
    for metric, values in direct["all"]["model"].items():
        if metric not in ("n", "mean km", "median km"):     # shares
            assert converted["all"]["model"][metric]["value"] == pytest.approx(values["value"], abs=0.1)


@pytest.mark.parametrize("change, message", [
    (["--geoencoder_path", "outputs/nowhere.pth"], "outputs/nowhere.pth: not found; make it with"),
    (["--test_file", "nothing.txt"], "nothing.txt: not found; make it with `python data-preprocess/process_llm_gps.py"),
    (["--dataset_name", "venus"], "venus"),
    (["--context_size", "2048"], "give --context_size 4096"),
    (["--output_dir", "outputs/gcim"], "no adapter_config.json"),
])
def test_mistakes_are_one_line(repo, change, message):
    before = (repo / "outputs/llm/checkpoint-6/predictions.jsonl")
    kept = before.read_bytes() if before.exists() else None
    result, _ = evaluate(repo, "outputs/llm/checkpoint-6", *change, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and message in result.stderr
    assert kept is None or before.read_bytes() == kept


def test_stage_2_refuses_an_encoder_of_another_width(repo):
    run(repo, sys.executable, "tools/make_tiny_llama.py", "--output_dir", "models/wide", "--hidden", "48")
    result = stage_2(repo, "outputs/wide", "--model_name_or_path", "models/wide", check=False)
    assert result.returncode != 0
    assert "made for an LLM of width 32, this one has 48" in result.stderr
    assert not (repo / "outputs/wide").exists() or not any((repo / "outputs/wide").iterdir())
