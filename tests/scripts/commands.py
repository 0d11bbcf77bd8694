"""The README's commands, as tests run them in a copy of the repository."""
import contextlib
import glob
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy
from torch.utils import cpp_extension

from ga_llm.base import artifacts

ROOT = Path(__file__).parents[2]
CODE = ("best_conf", "data-preprocess", "ds_configs", "ga_llm", "geo_encoder", "tools", "finetune_GCIM.py",
        "finetune_LLM_with_GCIM.py", "finetune_PAM.py", "test_next_gps.py", "export.py", "recommend.py",
        "run_experiment.py", "results.py", "experiments", "report.py")
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
    environment.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)     # set by ga_llm here, not in a user's shell
    result = subprocess.run([str(part) for part in command], cwd=repo, env=environment, capture_output=True, text=True,
                            timeout=600)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def torchrun(repo, script, *flags, processes=1, check=True):
    return run(repo, "torchrun", f"--nproc_per_node={processes}", f"--master_port={free_port()}", script,
               *README_FLAGS, *flags, check=check)


PAIRS = {1: f"{DATA}/train_qa_pairs_kqt_200items_sample_projector_gps_without_sim_stage1.json",
         2: f"{DATA}/train_qa_pairs_kqt_200items_sample_llm_without_sim_gps.json",
         "pam": f"{DATA}/train_qa_pairs_sample_pam.json"}
EMBEDDINGS = f"{DATA}/sample_poi_embeddings.npy"
FLAGS = {1: ["--data_path", PAIRS[1], "--lora_r", "8", "--lora_alpha", "16"],
         2: ["--data_path", PAIRS[2], "--geoencoder_path", "outputs/gcim/6/geo_encoder_merged.pth"],
         "pam": ["--data_path", PAIRS["pam"], "--poi_embedding_path", EMBEDDINGS, "--lora_r", "8", "--lora_alpha",
                 "16"]}
SCRIPTS = {1: "finetune_GCIM.py", 2: "finetune_LLM_with_GCIM.py", "pam": "finetune_PAM.py"}


def stage(repo, number, output, *flags, **options):
    return torchrun(repo, SCRIPTS[number], "--output_dir", output, *FLAGS[number], *flags, **options)


def stage_1(repo, output, *flags, **options):
    return stage(repo, 1, output, *flags, **options)


def stage_2(repo, output, *flags, **options):
    return stage(repo, 2, output, *flags, **options)


def needs_deepspeed():
    """Skip where it is absent or cannot compile, as it does on a CPU.

    The lock of a compilation that was killed, for which the next would wait for ever, is removed.
    """
    pytest.importorskip("deepspeed")
    if not (shutil.which("g++") and shutil.which("ninja", path=f"{sys.exec_prefix}/bin")):
        pytest.skip("DeepSpeed compiles on a CPU: needs g++ and ninja")
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    for lock in Path(folder).resolve().rglob("deepspeed_*/lock"):
        if not held(lock):
            lock.unlink(missing_ok=True)


def held(file):
    """Whether a process has it open."""
    found = set()
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):      # it has closed it, or is another user's
            found.add(os.readlink(link))
    return str(file) in found


def few_pairs(repo, number, count):
    """A question file of `count` pairs for a stage, with stage 2's check-ins: a few steps are several epochs."""
    path = Path(f"few_pairs_{number}_{count}.json")
    if not (repo / path).exists():
        (repo / path).write_text(json.dumps(json.loads((repo / PAIRS[number]).read_text())[:count]))
        if number == 2:
            held = safetensors.numpy.load_file(artifacts.check_ins(repo / PAIRS[number]))
            held["ends"] = held["ends"][:count]
            held["rows"] = held["rows"][:held["ends"][-1]]
            safetensors.numpy.save_file(held, artifacts.check_ins(repo / path), {
                "questions": hashlib.sha256((repo / path).read_bytes()).hexdigest()})
    return str(path)


def evaluation(output, *flags):
    return ["test_next_gps.py", "--batch_size", "8", "--base_model", "models/tiny", "--output_dir", output,
            "--cache_dir", "./cache", "--seq_len", "4096", "--context_size", "4096", "--flash_attn", "True",
            "--model_path", "models/tiny", "--data_path", "datasets", "--dataset_name", "sample", "--test_file",
            "test_qa_pairs_kqt_200items_sample_llm_without_sim_gps.txt", "--gps_mapping_path", MAPPING,
            "--geoencoder_path", "outputs/gcim/6/geo_encoder_merged.pth", "--use_random_projector", "False", *flags]


def evaluate(repo, output, *flags):
    result = run(repo, sys.executable, *evaluation(output, *flags))
    return result, metrics(repo, result.stdout)


def metrics(repo, printed):
    """The metrics that an evaluation says, in its last line, it has written."""
    wrote = printed.strip().splitlines()[-1].split()
    assert wrote[0] == "wrote" and (repo / wrote[3]).name == "predictions.jsonl"
    return json.loads((repo / wrote[1]).read_text())


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
