"""The house: which room imports which, that data-preprocess/ starts without torch, and how long a module may be."""
import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = ("base", "pairs", "geo_encoder", "llm", "training", "evaluation", "tables", "serving", "report")
MAY = {room: set(ORDER[:number]) for number, room in enumerate(ORDER)}      # import whom: what stands before it
MAY |= {"geo_encoder": {"base"}, "serving": MAY["serving"] - {"tables"}, "data-preprocess": {"base"}}
LAZILY = "data-preprocess", "ga_llm.llm.text_vectors"       # for `traj_sim.py -encoder llm` alone
SLOW = ("torch", "transformers", "peft", "geo_encoder", "ga_llm.base.sharding")
FOLDERS = ("ga_llm", "geo_encoder", "data-preprocess")
MODULES = {path: path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
SCRIPTS = {path: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.py"), *ROOT.glob("data-preprocess/*.py"))}


def imports():
    """(file, its room, module, whether it is imported when the file is); `from a import b` is a.b."""
    for path, text in MODULES.items():
        folder, *inner = path.relative_to(ROOT).parts
        tree = ast.parse(text)
        inside = {node for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.Lambda))
                  for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    yield str(path), inner[0] if folder == "ga_llm" else folder, before + alias.name, node not in inside


def test_imports_run_upwards():
    wrong = []
    for path, room, name, at_once in imports():
        package, _, inner = f"{name}.".partition(".")
        other = {"ga_llm": inner.partition(".")[0], "geo_encoder": "geo_encoder"}.get(package)
        lazy = not at_once and room == LAZILY[0] and f"{name}.".startswith(f"{LAZILY[1]}.")
        if other and other not in {room, *MAY.get(room, ())} and not lazy or (
                room == "data-preprocess" and at_once and f"{name}.".startswith(tuple(f"{one}." for one in SLOW))):
            wrong.append(f"{path}: {name}")
    assert not wrong


def test_modules_scripts_and_lines_are_short():
    folders = (*FOLDERS, "benchmarks", "tests", "tools")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert not [path for path in files if max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0) > 120]
    assert not [path for path, text in MODULES.items() if text.count("\n") >= 400]
    assert not [path for path, text in SCRIPTS.items() if text.count("\n") >= 150]
