"""What tests of kills, disks and runs at once share: commands that take a second, run undisturbed and otherwise."""
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest
from commands import DATA, MAPPING, evaluation
from harness import ROOT, Result

from ga_llm.base.artifacts import METRICS

EARLIER = b"of an earlier run\n"
QUESTIONS = ["-dataset_name", "sample", "-use_sim", "False", "-max_history", "20"]
CASES = {       # name: the command, the folder that it writes to
    "raw": (["data-preprocess/make_sample_raw.py", "-users", "100", "-overwrite", "True", "-out", "raw/sample"],
            "raw/sample"),
    "samples": (["data-preprocess/run.py", "-f", "best_conf/sample.yml"], DATA),
    "keys": (["data-preprocess/traj_qk.py", "-dataset_name", "sample"], DATA),
    "questions 1": (["data-preprocess/process_projector_gps_stage1.py", *QUESTIONS], DATA),
    "questions 2": (["data-preprocess/process_llm_gps.py", *QUESTIONS], DATA),
    "tokens": (["tests/reliability/build_tokens.py", "models/tiny", MAPPING, "few_pairs_2_800.json", "caches/tokens"],
               "caches/tokens"),
    "evaluation": (evaluation("results/evaluated"), "results/evaluated"),
    "full table": (evaluation("results/evaluated", "--full_table", "True"), "results/evaluated"),
}
TRAININGS = {f"stage {stage}": (forked.training(stage, "trained/here"), "trained/here") for stage in (1, 2)}
TOGETHER = {"raw", "samples", "keys", "questions 1", "questions 2", "evaluation"}    # whose files appear at once


ROOM, PAGE = 2**28, 4096


class Disk:
    """A file system of its own, if `mounted`."""

    def __init__(self, folder: Path, mounted: bool):
        self.folder, self.mounted = folder, mounted

    def remount(self, options):
        if not self.mounted:
            pytest.skip("file systems may not be mounted here")
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    @contextlib.contextmanager
    def room(self, size):
        """So many bytes are free."""
        state = os.statvfs(self.folder)
        self.remount(f"size={(state.f_blocks - state.f_bfree) * state.f_frsize + max(PAGE, int(size))}")
        try:
            yield
        finally:
            self.remount(f"size={ROOM}")

    @contextlib.contextmanager
    def read_only(self):
        self.remount("ro")
        try:
            yield
        finally:
            self.remount("rw")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def visible(files):
    """Without hidden files and those in hidden folders; metrics.json without the speed."""
    files = {name: text for name, text in files.items() if not any(part[0] == "." for part in Path(name).parts)}
    if files.get(METRICS, EARLIER) != EARLIER:
        files[METRICS] = {**json.loads(files[METRICS]), "prompts_per_second": None}
    return files


class Trial:
    """A case in a folder of its own. `measure` finds out what it makes when undisturbed, in which time."""

    def __init__(self, name, root, logs, city, repo):
        self.name, self.root, self.log, self.trace = name, root, logs / "log", logs / "trace"
        self.command, self.output = {**CASES, **TRAININGS}[name]
        self.folder, self.together = root / self.output, name in TOGETHER
        evaluates = name in ("evaluation", "full table")
        for link, target in (("best_conf", ROOT / "best_conf"), ("models", repo / "models"),
                             ("few_pairs_2_800.json", city / "few_pairs_2_800.json"),
                             ("data-preprocess", city / "data-preprocess"), ("outputs/gcim", repo / "outputs/gcim"),
                             ("datasets", (repo if evaluates or name in TRAININGS else city) / "datasets")):
            if link != Path(self.output).parts[0]:
                (root / link).parent.mkdir(parents=True, exist_ok=True)
                (root / link).symlink_to(target)
        self.inputs, self.made, self.environment = {}, {}, dict
        if name in TRAININGS:
            self.environment = forked.ranks
        elif evaluates:
            self.inputs = contents(repo / "outputs/llm/checkpoint-6")
        elif name not in ("raw", "samples", "tokens"):
            self.inputs = {file: text for file, text in contents(city / DATA).items() if "_qa_" not in file}
        self.begin(earlier=False)

    def measure(self):
        """Run it undisturbed."""
        self.succeed()
        self.made = {file: text for file, text in contents(self.folder).items() if file not in self.inputs}
        self.begin(earlier=False)
        started = time.monotonic()
        self.succeed(functools.partial(forked.watch, str(self.folder), str(self.trace)))
        self.seconds, self.operations = time.monotonic() - started, len(self.trace.read_text().splitlines())

    def begin(self, earlier):
        """The folder as it is before the command: with its inputs alone, or with files of an earlier run, too."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for file, text in {**self.inputs, **dict.fromkeys(self.made if earlier else (), EARLIER)}.items():
            (self.folder / file).parent.mkdir(exist_ok=True)
            (self.folder / file).write_bytes(text)

    def launch(self, *hooks):
        for log in (self.log, Path(f"{self.log}.out")):
            log.unlink(missing_ok=True)
        return forked.launch(self.root, self.command, self.log, *hooks, **self.environment())

    def run(self, *hooks) -> Result:
        return self.end(self.launch(*hooks))

    def end(self, process) -> Result:
        return forked.end(process, self.log)

    def succeed(self, *hooks):
        """Run the command to its end, and check that it leaves what it should."""
        self.check_success(self.run(*hooks))

    def check_success(self, result):
        assert result.code == 0, result.err
        found = contents(self.folder)
        assert [file for file in found if any(part[0] == "." for part in Path(file).parts)] == []
        assert not self.made or visible(found) == visible({**self.inputs, **self.made})

    def at_random(self, chance, sends=signal.SIGKILL):
        """A hook: before a random change of a file the process gets a signal."""
        return functools.partial(forked.watch, str(self.folder), str(self.trace), chance.randint(1, self.operations),
                                 sends)

    def check(self, earlier):
        """Every file is absent, old or new, and those that appear together are all old or all new, or all on disk.

        Returns whether anything is half done.
        """
        found = contents(self.folder) if self.folder.exists() else {}
        shown, old = visible(found), dict.fromkeys(self.made if earlier else (), EARLIER)
        assert shown.keys() <= {*self.inputs, *self.made} and {**shown, **self.inputs} == shown
        new = {file for file, text in visible(self.made).items() if shown.get(file) == text}
        assert all(file in new or shown.get(file) == old.get(file) for file in self.made)
        if self.together and new:
            for file in self.made.keys() - new:
                beside = [text for name, text in found.items() if re.fullmatch(
                    rf"\.{re.escape(file)}\..*\.unfinished", name)]
                assert [visible({file: text}) for text in beside] == [visible({file: self.made[file]})]
        return shown.keys() != found.keys() or 0 < len(new) < len(self.made)
