"""What a stranger reads from an exported folder: transformers alone, of another version if wanted."""
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

# An import of a module that is None fails.
READ = """
import sys
sys.modules.update(dict.fromkeys(("ga_llm", "geo_encoder", "peft")))
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found, out, text, *folders = {}, *sys.argv[1:]
for folder in folders:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer(text, return_tensors="pt")
    ids = asked["input_ids"][0]
    with torch.no_grad():
        found[folder] = {"version": transformers.__version__, "ids": ids.tolist(), "logits": model(**asked).logits,
                         "dtype": str(model.dtype), "text": tokenizer.decode(ids, skip_special_tokens=True),
                         "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
                         "length": tokenizer.model_max_length,
                         "answer": model.generate(**asked, max_new_tokens=8)[0, len(ids):].tolist()}
torch.save(found, out)
"""


def read(text, folders, out, packages=None) -> dict[str, dict]:
    """{folder: what READ finds in it}, by way of the file `out`. packages: a folder of packages that go before ours."""
    environment = os.environ | ({"PYTHONPATH": str(packages)} if packages else {})
    subprocess.run([sys.executable, "-c", READ, str(out), text, *map(str, folders)], check=True, cwd=out.parent,
                   env=environment)
    return torch.load(out, weights_only=True)


def installed(folder, *requirements, modules=(), options=()):
    """A folder to go before our packages, with these by pip; None where the `modules` are there. Skips without pip."""
    if modules and all(importlib.util.find_spec(module) for module in modules):
        return None
    made = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", folder,
                           *requirements], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"pip cannot install {' '.join(requirements)}: {made.stderr.strip().splitlines()[-1]}")
    return folder
