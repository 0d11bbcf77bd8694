"""Stock servers answer from an exported folder as recommend.py's LLM does: `transformers serve`, llama.cpp, vLLM.

vLLM in a Python of its own, whose package for CPUs goes with our torch, or not at all: GA_LLM_VLLM=V/bin/python.
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import forked
import llama_cpp_python
import numpy as np
import pandas as pd
import pytest
import stock
import torch
from commands import DATA, free_port
from harness import call
from llama_cpp_python import MOST, rounding
from make_tiny_llama import make_tiny_llama

from ga_llm.llm import backbone, tree_attention
from ga_llm.pairs import spelling
from ga_llm.serving import gguf_file, recommendation
from ga_llm.serving.check_in_files import CheckIn, read_time
from ga_llm.serving.places import read_places

pytestmark = pytest.mark.slow
QUESTIONS = 50
# Short questions, from which a tiny model learns in seconds to answer by an id.
TRAINING = ["--bf16", "False", "--use_full_attn", "True", "--low_rank_training", "False", "--load_in_4bit", "False",
            "--max_steps", "400", "--save_steps", "400", "--per_device_train_batch_size", "8", "--learning_rate",
            "3e-3", "--warmup_steps", "10", "--lr_scheduler_type", "linear"]


@pytest.fixture(scope="module")
def exported(repo, tmp_path_factory):
    """(folder of a model that has learned to answer, its data sets' root)."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(repo / DATA, root / "sample/preprocessed")
    data = root / "sample/preprocessed"
    result = call(repo, "data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-datasets", str(root),
                  "-fields", "poi", "-max_history", "3")
    assert result.code == 0, result.err
    make_tiny_llama(root / "tiny", hidden=32, heads=1)      # vLLM has no narrower heads on a CPU
    forked.train(repo, 2, "outputs/served", *TRAINING, "--model_name_or_path", root / "tiny", "--data_path",
                 next(data.glob("train_qa_*_llm_*_gps.json")), "--gps_mapping_path", data / "sample_gps_mapping.csv")
    folder = root / "exported"
    result = call(repo, "export.py", "--output_dir", "outputs/served/checkpoint-400", "--dtype", "float32",
                  "--export_dir", folder, "--gguf", "q8_0")
    assert result.code == 0, result.err
    return folder, root


@pytest.fixture(scope="module")
def asked(exported):
    """[(a prompt up to its id, the id that recommend.py's LLM answers greedily)]: as it loads it and cuts the text."""
    folder, root = exported
    asking = recommendation.read_asking(folder)
    places = read_places("sample", str(root), asking.places, asking.dataset)
    tokenizer = backbone.load_tokenizer(str(folder))
    model = backbone.load_llm(str(folder), asking.context, tree_attention.TREE, torch.float32).eval()
    spelled = spelling.Spelling(tokenizer, places.mapping.ids.tolist(), recommendation.END)
    pairs = [recommendation.pair(past, at, user, places, asking)
             for user, at, past in histories(root / "sample/preprocessed")][-QUESTIONS:]
    found = []
    for prompt in spelled.prompts(pairs, asking.context):
        ids = torch.tensor([prompt.input_ids])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found.append((prompt.text, answered_id(tokenizer.decode(answer[0, ids.shape[1]:], skip_special_tokens=True))))
        assert prompt.fits
    known = [poi for _, poi in found if poi in places.mapping.ids]
    assert len(found) == QUESTIONS and len(known) > QUESTIONS / 2 and len(set(known)) > 3
    return found


def histories(folder):
    """(encoded user, time of the last check-in, those before it) of the trajectories, by time."""
    rows = pd.concat([pd.read_csv(folder / f"{split}_sample.csv") for split in ("train", "validate", "test")])
    rows = rows.sort_values("LocalTime", kind="stable")
    for (user, _), at in rows.groupby(["UserId", "TrajectoryId"])["LocalTime"].max().sort_values().items():
        before = rows[(rows["UserId"] == user) & (rows["LocalTime"] < at)].tail(20)
        if len(before):
            yield user, read_time(at), [
                CheckIn(read_time(row.LocalTime), row.PoiId)
                for row in before.itertuples()]


def answered_id(text: str) -> int | None:
    digits = text.strip().partition(".")[0]
    return int(digits) if digits.isdecimal() else None


def test_transformers_serve(exported, asked, tmp_path):
    folder, _ = exported
    packages = stock.installed(tmp_path / "packages", "fastapi", "uvicorn", "openai", "starlette", "rich",
                               modules=("fastapi", "uvicorn", "openai"))
    with served(folder, tmp_path / "log", packages) as address:
        answers = [complete(address, folder.name, prompt) for prompt, _ in asked]
    assert [answered_id(answer) for answer in answers] == [poi for _, poi in asked]


@contextlib.contextmanager
def served(folder, log, packages):
    """The address of a server of that model, which runs until the block ends."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(packages or "")}
    port = free_port()
    with open(log, "w") as file:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder.name, "--port", str(port)]
        server = subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def complete(address, model, prompt):
    """As the card says."""
    body = json.dumps({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["text"]


def test_llama_cpp(exported, asked, tmp_path):
    """The prompts' tokens, the logits within the weights' rounding, and in f16 every greedy id."""
    folder, _ = exported
    tokenizer = backbone.load_tokenizer(str(folder))
    model = backbone.load_llm(str(folder), 4096, "sdpa", torch.float32).eval()
    files = {kind: str(tmp_path / gguf_file.name(kind)) for kind in gguf_file.TYPES}
    gguf_file.write(model, tokenizer, 4096, files["f16"], "f16")
    shutil.copy(folder / gguf_file.name("q8_0"), files["q8_0"])
    prompts = [prompt for prompt, _ in asked]
    found = llama_cpp_python.read(dict.fromkeys(files.values(), prompts), tmp_path / "found.npz")
    told = []
    for kind, file in files.items():
        theirs = []
        for (tokens, mine, _), prompt in zip(found[file], prompts, strict=True):
            assert tokens == tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                theirs.append((mine, model(torch.tensor([tokens])).logits[0].numpy()))
        share = rounding(*map(np.concatenate, zip(*theirs)))
        same = [answered_id(answer) == poi for (*_, answer), (_, poi) in zip(found[file], asked)]
        told.append(f"{kind}: logits {share:.2%} of their spread apart, {sum(same)} of {len(same)} ids alike")
        assert share < MOST[kind] and (all(same) or kind == "q8_0"), told      # 8 bits may turn a close decision
    print("\n".join(told))


VLLM = """
import json, sys
if __name__ == "__main__":      # it starts processes that import this
    from vllm import LLM, SamplingParams
    folder, out = sys.argv[1:]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_num_seqs=4)
    answers = llm.generate(json.load(sys.stdin), SamplingParams(temperature=0, max_tokens=8, logprobs=1))
    with open(out, "w") as file:
        json.dump({"length": llm.model_config.max_model_len,
                   "tokens": [list(answer.prompt_token_ids) for answer in answers],
                   "text": [answer.outputs[0].text for answer in answers]}, file)
"""


def test_vllm(exported, asked, tmp_path):
    """The prompts' tokens, every greedy id, and the length that it finds by itself: positions are scaled by two."""
    python = os.environ.get("GA_LLM_VLLM")
    if not python:
        pytest.skip("vLLM is not here: GA_LLM_VLLM names no Python that has it")
    folder, prompts = exported[0], [prompt for prompt, _ in asked]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    (tmp_path / "ask.py").write_text(VLLM)
    subprocess.run([python, tmp_path / "ask.py", folder, tmp_path / "out.json"], input=json.dumps(prompts), text=True,
                   check=True, env=environment)
    found, tokenizer = json.loads((tmp_path / "out.json").read_text()), backbone.load_tokenizer(str(folder))
    assert found["tokens"] == tokenizer(prompts)["input_ids"] and found["length"] == 4096
    assert [answered_id(text) for text in found["text"]] == [poi for _, poi in asked]
