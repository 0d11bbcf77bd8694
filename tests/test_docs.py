"""README.md and docs/: links and files exist, commands parse, pages stay short."""
import argparse
import functools
import glob
import re
import shlex
from pathlib import Path

import pytest
from harness import call
from torch.distributed.run import get_args_parser

from ga_llm.tables import pages
from ga_llm.training import arguments

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")))
MOST_LINES = {"README.md": 200}
MOST_OF_OTHERS = 250
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w.…<>*-]+(/[\w.…<>*-]*)*")
SUFFIXES = (".py", ".yml", ".json", ".jsonl", ".md", ".sh", ".csv", ".txt", ".npy", ".pth", ".png", ".html", ".bin")
PLACEHOLDER = re.compile(r"[<>…]|(^|/)[A-Z](/|$)|(^|/)[A-Z]\.")     # tokens-<key>/, ….settings.json, O/N/, A.npy
BEFORE_A_COMMAND = ("nohup", "srun", "exec", "time")
PROGRAMS = ("python", "torchrun", "make", "bash")
page_mark = pytest.mark.parametrize("page", PAGES)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page):
    return CODE.sub("", text_of(page))


# Pages and links.

@page_mark
def test_pages_are_short(page):
    """What results.py writes into a page beside the README is not counted."""
    text = text_of(page)
    if page != "README.md" and pages.BEGIN in text:
        before, _, rest = text.partition(pages.BEGIN)
        text = before + rest.partition(pages.END)[2]
    assert text.count("\n") <= MOST_LINES.get(page, MOST_OF_OTHERS)


def test_every_page_is_linked_from_the_readme():
    assert {link.partition("#")[0] for link in LINK.findall(text_of("README.md"))} >= set(PAGES) - {"README.md"}


def anchors(page):
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@page_mark
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.resolve().relative_to(ROOT)), link


@page_mark
def test_tables_are_whole(page):
    """Every row has as many cells as its head, or the page shows it otherwise than it is meant."""
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.M):
        cells = [len(re.split(r"(?<!\\)\|", INLINE.sub("", line.strip()))) for line in table.splitlines()]
        assert set(cells) == {cells[0]}, table.splitlines()[0]


# Files.

@functools.cache
def generated():
    """The folders that git ignores, for the commands write there."""
    return tuple(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())


@functools.cache
def written():
    """All that the code says, where the name of a file that it reads or writes must occur."""
    folders = ("", "best_conf/", "data-preprocess/", "data-preprocess/checkins/", "geo_encoder/", "tools/")
    paths = [path for folder in folders for ending in ("py", "yml", "sh") for path in ROOT.glob(f"{folder}*.{ending}")]
    return "".join(path.read_text(encoding="utf-8") for path in [*paths, *ROOT.glob("ga_llm/**/*.py")])


@functools.cache
def names():
    """The names of all files and folders of the repository."""
    tops = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in generated()]
    return {path.name for top in tops for path in (top, *top.rglob("*"))}


def is_file(word):
    return FILE.fullmatch(word) and not word.startswith("-") and (word.endswith(SUFFIXES) or "/" in word)


def is_there(name, page):
    """Whether it is a file or folder of the repository, or one that the commands make (by the rules of this file)."""
    name = name.removeprefix("./")
    if PLACEHOLDER.search(name) or name.startswith(generated()):
        return True
    if "/" not in name.rstrip("/"):
        return name.rstrip("/") in names() or name in written()
    return any(glob.glob(str(folder / name)) for folder in (ROOT, (ROOT / page).parent))


@page_mark
def test_files_exist(page):
    words = [word for code in INLINE.findall(prose(page)) for word in code.split()]
    words += [word for command in commands(page) for word in command]
    assert [word for word in words if is_file(word) and not is_there(word, page)] == []


def test_a_file_that_is_not_there_is_found_out():
    assert is_file("ga_llm/no.py") and not is_there("ga_llm/no.py", "README.md")
    assert is_file("no_such.jsonl") and not is_there("no_such.jsonl", "README.md")
    assert is_file("no_such/") and not is_there("no_such/", "README.md")
    assert is_there("metrics.json", "README.md") and is_there("experiments/ngram_*_nyc.yml", "README.md")


# Commands.

def commands(page):
    """The words of each command, of blocks of code and of lines of prose; variables are put in, as the shell does.

    Not of whole scripts: those for Slurm are run by tests/scripts/test_slurm.py.
    """
    found, variables = [], {}
    blocks = [block for kind, block in CODE.findall(text_of(page)) if kind == "bash" and not block.startswith("#!")]
    lines = [line for block in blocks for line in whole_lines(block)]
    lines += [code for code in INLINE.findall(prose(page)) if re.match(rf"({'|'.join(PROGRAMS)}) ", code)]
    for line in lines:
        words = shlex.split(line, comments=True)
        if len(words) == 1 and re.match(r"\w+=", words[0]):
            name, _, value = words[0].partition("=")
            variables[name] = put_in(value, variables)
            continue
        words = [part for word in words for part in put_in(word, variables).split(" " if "$" in word else "\n")]
        while words and (words[0] in BEFORE_A_COMMAND or re.match(r"\w+=", words[0])):
            words = words[1:]
        end = next((i for i, word in enumerate(words) if word in (">", "2>&1", "&", "|", ";")), len(words))
        if words and words[0] in PROGRAMS:
            found.append([word for word in words[:end] if word not in ("…", "")])
    return found


def whole_lines(block):
    """Lines with what a backslash or an open quote continues."""
    lines = []
    for line in block.replace("\\\n", " ").splitlines():
        if lines and lines[-1].count('"') % 2:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return lines


def put_in(word, variables):
    return re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), word)


@pytest.fixture
def parses(monkeypatch):
    """parses(words): an error, or nothing if the script that they name takes the flags; the script stops there."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(self, *given, **options):
        _, unknown = parse(self, *given, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise SystemExit(0)

    def check(words):
        program, *rest = words
        if program == "torchrun":
            found = get_args_parser().parse_args(rest)
            script, *rest = found.training_script, *found.training_script_args
        elif program == "make":
            return next((f"no target {name}" for name in rest
                         if "=" not in name and not re.search(rf"^{name}:", text_of("Makefile"), re.M)), None)
        elif program == "bash" or rest[0] == "-m" or not (ROOT / rest[0]).exists():
            return None         # another's program, or DeepSpeed's in a checkpoint; files are looked for above
        else:
            script, *rest = rest
        with monkeypatch.context() as patch:
            patch.syspath_prepend(ROOT / Path(script).parent)
            patch.setattr(arguments, "_fit_to_machine", lambda flags: flags)    # what the machine lacks is not asked
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
            result = call(ROOT, script, *rest)
        return result.err if result.code else None
    return check


@page_mark
def test_commands_parse(page, parses):
    for words in commands(page):
        assert not parses(words), shlex.join(words)


@pytest.mark.parametrize("command, error", [
    ("python test_next_gps.py --no_such 1", "--no_such"),
    ("torchrun --nproc_per_node=1 finetune_GCIM.py --no_such 1", "--no_such"),
    ("python data-preprocess/process_llm_gps.py -use_sim False", "-dataset_name"), ("make no_such", "no_such"),
    ("python benchmarks/similar.py -no_such", "-no_such")])
def test_a_command_that_does_not_parse_is_found_out(parses, command, error):
    assert error in parses(shlex.split(command))


def test_variables_are_put_in(monkeypatch):
    page = ('# A\n```bash\nD=a/b\nF="--x $D/c\n    --y 1"\nnohup python run.py $F \\\n    --z "1 2" > out 2>&1 &\n```\n'
            "`make …`, `make`\n")
    monkeypatch.setitem(globals(), "text_of", lambda _: page)
    assert commands("") == [["python", "run.py", "--x", "a/b/c", "--y", "1", "--z", "1 2"], ["make"]]
