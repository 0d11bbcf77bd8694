"""What needs a package that is absent says so in one line; all else runs."""
import os
import subprocess
import sys

import pytest
from commands import ROOT

PACKAGES = ("bitsandbytes", "deepspeed", "flash_attn", "orjson", "ijson", "shapely", "folium", "gguf",
            "sentencepiece")
NEEDS = {"checkins.gowalla": "shapely", "ga_llm.serving.places_map": "folium"}      # modules that cannot do without
SCRIPTS = ("finetune_GCIM.py", "finetune_LLM_with_GCIM.py", "finetune_PAM.py", "test_next_gps.py", "export.py",
           "recommend.py", "run_experiment.py", "results.py", "report.py", "tools/get_smollm2.py",
           "tools/make_tiny_llama.py",
           *sorted(f"data-preprocess/{path.name}" for path in (ROOT / "data-preprocess").glob("*.py")))
# Each part runs in a process forked from one in which the packages cannot be found and all modules are imported.
HIDDEN = """
import contextlib, importlib, io, logging, os, runpy, sys, traceback
from importlib.machinery import PathFinder

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {packages} else super().find_spec(name, path, target)

sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
sys.path[:0] = [{root!r}, {root!r} + "/data-preprocess", {root!r} + "/tools"]

def script(path, *arguments):
    sys.argv = [path, *arguments]
    runpy.run_path({root!r} + "/" + path, run_name="__main__")

def forked(what, *arguments):
    \"\"\"(exit code, what it printed)\"\"\"
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(write, 1), os.dup2(write, 2)
        os.close(read), os.close(write)
        code = 0
        try:
            what(*arguments)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read) as file:
        printed = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed
"""


MODULES = sorted(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                 for root, folder in ((ROOT, "ga_llm"), (ROOT, "geo_encoder"), (ROOT / "data-preprocess", "checkins"))
                 for path in (root / folder).rglob("*.py"))
TRIALS = """
for name in {modules}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print("absent", name, error.name, sep="|")
for path in {scripts}:
    code, text = forked(script, path, "--help")
    print("help", path, code, "usage: " in text, "Traceback" in text, sep="|")

import torch
from ga_llm.base import cli
from ga_llm.llm import backbone
from ga_llm.training import arguments
os.environ["RANK"] = "0"
logging.basicConfig(level=logging.INFO, format="%(message)s")
flags = "--model_name_or_path M --data_path D.json --gps_mapping_path G.csv --output_dir O --deepspeed ds.json".split()

def folium():
    cli.run(lambda: cli.needed("folium", "--map"))

def sentencepiece():
    cli.run(lambda: backbone.load_tokenizer("llama2"))

def flash_attention():
    torch.cuda.is_available = lambda: True      # where it counts
    backbone.training_attention(True, True)

for name, what, *given in (("shapely", script, "data-preprocess/generate_ca_raw.py"), ("folium", folium),
                           ("gguf", script, "tools/get_smollm2.py", "--output_dir", "new"),
                           ("deepspeed", arguments.parse, arguments.SFTArguments, flags),
                           ("bitsandbytes", backbone.quantization, True), ("sentencepiece", sentencepiece),
                           ("flash-attn", flash_attention)):
    code, text = forked(what, *given)
    *_, told = [line for line in text.splitlines() if name in line]
    print("told", name, code, told, "Traceback" in text, sep="|")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{kind: {module, script or package: what came of it}}, from a Python that finds none of the packages."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "best_conf").symlink_to(ROOT / "best_conf")
    for name in ("D.json", "G.csv", "ds.json"):
        (folder / name).write_text("{}")
    (folder / "llama2").mkdir()     # as Llama 2 is given out: a tokenizer.model, and no tokenizer.json
    for name, text in (("config.json", '{"model_type": "llama"}'), ("tokenizer.model", "pieces"),
                       ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}')):
        (folder / "llama2" / name).write_text(text)
    code = HIDDEN + TRIALS
    for name, value in {"packages": PACKAGES, "root!r": str(ROOT), "modules": MODULES, "scripts": SCRIPTS}.items():
        code = code.replace(f"{{{name}}}", repr(value))
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (folder / "new").exists()
    kinds = {"absent": {}, "help": {}, "told": {}}
    for kind, name, *rest in (line.split("|") for line in result.stdout.splitlines()):
        kinds[kind][name] = rest
    return kinds


def test_every_other_module_is_imported(found):
    assert NEEDS.keys() < set(MODULES) and "ga_llm.training.common" in MODULES
    assert found["absent"] == {name: [package] for name, package in NEEDS.items()}


def test_every_script_tells_its_flags(found):
    assert found["help"] == {path: ["0", "True", "False"] for path in SCRIPTS}


@pytest.mark.parametrize("package, code", [("shapely", 2), ("folium", 2), ("gguf", 2), ("sentencepiece", 2),
                                           ("deepspeed", 0), ("bitsandbytes", 0), ("flash-attn", 0)])
def test_what_needs_a_package_names_it_in_one_line(found, package, code):
    """Four cannot be done without and end with 2; for the others there is another way."""
    ended, told, traceback = found["told"][package]
    assert (ended, traceback) == (str(code), "False") and f"pip install {package}" in told


@pytest.mark.parametrize("made", ["before", "later"])
@pytest.mark.parametrize("installed", [False, True])
def test_the_data_folder_is_not_the_library_of_its_name(tmp_path, made, installed):
    if made == "before":
        (tmp_path / "datasets").mkdir()
    library = tmp_path / "site" / "datasets" / "__init__.py"
    if installed:
        library.parent.mkdir(parents=True)
        library.touch()
    code = ("import importlib.util, os, ga_llm; os.makedirs('datasets', exist_ok=True); importlib.invalidate_caches(); "
            "print(getattr(importlib.util.find_spec('datasets'), 'origin', 'no library'))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")])}
    command = [sys.executable, "-S", "-c", code]        # without whatever is installed here
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == (str(library) if installed else "no library"), found.stderr
