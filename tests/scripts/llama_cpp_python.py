"""llama.cpp, by the package llama-cpp-python, which is compiled for minutes: in a Python of its own, or not at all.

    python -m venv V && V/bin/pip install llama-cpp-python && GA_LLM_LLAMA_CPP=V/bin/python python -m pytest …
"""
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

READ = """
import json, sys
import llama_cpp, numpy
out, texts = sys.argv[1], json.loads(sys.stdin.read())
found = {}
for i, (path, prompts) in enumerate(texts.items()):
    llm = llama_cpp.Llama(path, n_ctx=1024, logits_all=True, verbose=False, n_threads=1)
    for j, prompt in enumerate(prompts):
        tokens = llm.tokenize(prompt.encode(), add_bos=True, special=True)
        llm.reset()
        llm.eval(tokens)
        found[f"{i} {j} tokens"], found[f"{i} {j} logits"] = tokens, llm.scores[:len(tokens)].copy()
        answer = llm.create_completion(prompt, max_tokens=8, temperature=0)
        found[f"{i} {j} answer"] = answer["choices"][0]["text"]
numpy.savez(out, **found)
"""


def read(texts: dict[str, list[str]], out) -> dict[str, list[tuple[list[int], np.ndarray, str]]]:
    """{GGUF file: (tokens, logits at each, greedy answer) of each of its prompts}, by way of the file `out`.

    Skips where the package is not to be had.
    """
    python = os.environ.get("GA_LLM_LLAMA_CPP") or (importlib.util.find_spec("llama_cpp") and sys.executable)
    if not python:
        pytest.skip("llama-cpp-python is not here: GA_LLM_LLAMA_CPP names no Python that has it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", READ, out], input=json.dumps(texts), text=True, check=True, env=environment)
    found = np.load(out)
    return {path: [(found[f"{i} {j} tokens"].tolist(), found[f"{i} {j} logits"], str(found[f"{i} {j} answer"]))
                   for j in range(len(prompts))] for i, (path, prompts) in enumerate(texts.items())}


def rounding(mine: np.ndarray, theirs: np.ndarray) -> float:
    """How far two tables of logits lie apart, as a share of their spread (both as root mean squares)."""
    return float(np.sqrt(np.mean((mine - theirs) ** 2)) / theirs.std())


# What rounding costs at most, of the logits' spread. f16 rounds a number by 2^-12 of it (root mean square: half), q8_0
# one of a block of 32 by 1/254 of the largest, so about 0.5 %, weights and what meets them: some ten roundings add up.
MOST = {"f16": 0.005, "q8_0": 0.05}
