"""Steps that are run once: each has a folder of its own, named by what goes into it, and goes on where it was stopped.

    <work_dir>/steps/<step>-<key>/out/         what the step makes
    <work_dir>/steps/<step>-<key>/log.txt      what it said
    <work_dir>/steps/<step>-<key>/step.json    written last: command, start, seconds, git commit, machine, inputs

The key is made of the command line, of the contents of all files that it names or reads, and of the keys of the steps
it builds on. So changed inputs are another folder, and whoever asks for the same inputs finds the step done. The code
is not in the key: step.json tells the commit.
"""
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ga_llm.base import reading, writing
from ga_llm.base.cli import UserError

log = logging.getLogger("chain")

OUT, LOG, DONE = "out", "log.txt", "step.json"
LAST_CHECKPOINT = "checkpoint-*"        # as the name of what a step makes: the last of them
# A model's folder holds more than its weights; these decide what it says, too.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One command. In `command`, a Made is a file that another step makes, and OWN stands for the folder to make.

    links: (Made, name in OWN): files that are there, as if the step had made them itself, before it starts.
    reads: files that the command reads and does not name.
    """
    name: str
    command: tuple
    root: Path
    links: tuple = ()
    reads: tuple = ()

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """{file: hash of its contents}, of all files from outside."""
        named = [part for part in self.command if isinstance(part, str) and not part.endswith(".py")
                 and (_is_file(part) or _is_model(part))]
        return {str(path): _contents(path) for path in (*named, *self.reads)}

    @functools.cached_property
    def key(self) -> str:
        def text(part):
            return f"{part.step.id}/{part.name}" if isinstance(part, Made) else self.inputs.get(part, part)

        reads = sorted((Path(path).name, self.inputs[str(path)]) for path in self.reads)
        links = [(text(made), name) for made, name in self.links]
        parts = json.dumps([[text(part) for part in self.command], reads, links])
        return hashlib.sha256(parts.encode()).hexdigest()[:12]

    @property
    def id(self) -> str:
        return f"{self.name}-{self.key}"

    @property
    def folder(self) -> Path:
        return self.root / self.id

    @property
    def out(self) -> Path:
        return self.folder / OUT

    @property
    def done(self) -> bool:
        return (self.folder / DONE).is_file()

    def shown(self) -> str:
        """The command for a shell, preceded by those that put the linked files in their places."""
        links = [f"mkdir -p {shlex.quote(str(self.out / name))} && cp -rlf {made.shown()}/. "
                 f"{shlex.quote(str(self.out / name))}/" for made, name in self.links]
        return "\n".join([*links, " ".join(part.shown() if isinstance(part, Made) else shlex.quote(self._own(part))
                                           for part in self.command)])

    def _own(self, part: str) -> str:
        return part.replace(OWN, str(self.out))

    def run(self) -> None:
        """Run the step unless it is done. Another run of it that is under way is waited for.

        Raises UserError that names the log if the command fails.
        """
        if self.done:
            return log.info("%s: done before", self.id)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self):
            if self.done:
                return log.info("%s: done by the other run", self.id)
            for made, name in self.links:
                _link(made.path, self.out / name)
            command = [str(part.path) if isinstance(part, Made) else self._own(part) for part in self.command]
            started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            began = time.perf_counter()
            log.info("%s: started, see %s", self.id, self.folder / LOG)
            code = _call(command, self.folder / LOG)
            seconds = time.perf_counter() - began
            if code:
                raise UserError(f"{self.id}: failed with exit code {code} after {seconds:.0f} s: "
                                f"{_last_words(self.folder / LOG)}; see {self.folder / LOG}, the command was "
                                f"`{shlex.join(command)}`")
            self._check_ended()
            self._finish(command, started, seconds)
            log.info("%s: done in %.1f s", self.id, seconds)

    def _check_ended(self) -> None:
        """A training that is told to stop succeeds, too, and is not at its end. Raises UserError."""
        if self.command[0] == "torchrun":
            from ga_llm.training import resuming, staging     # as below
            last = staging.last_checkpoint(self.out)
            state = last and resuming.read_state(last)
            if not state or state.global_step < state.max_steps:
                when = f"after step {state.global_step}" if state else "early"
                raise UserError(f"{self.id}: told to stop {when}, see {self.folder / LOG}; run it again, and it goes "
                                "on")

    def _finish(self, command: list[str], started: str, seconds: float) -> None:
        from ga_llm.training import run_log      # here, for it takes seconds to import, which --plan need not wait for
        written = {"step": self.name, "key": self.key, "command": shlex.join(command), "started": started,
                   "seconds": round(seconds, 2), "git": run_log.git_state(run_log.ROOT),
                   "machine": f"{platform.node()}: {run_log.cpu_name()}, {os.cpu_count()} cores",
                   "inputs": self.inputs, "steps": sorted(made.step.id for made in self.made)}
        with writing.atomic_write(self.folder / DONE) as file:
            json.dump(written, file, indent=1)

    @property
    def made(self) -> list["Made"]:
        """What it takes of other steps."""
        return [part for part in self.command if isinstance(part, Made)] + [made for made, _ in self.links]


OWN = "{out}"


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Step):
    """Files that are there, `reads`, for steps to build on as if another had made them: copied to a folder in OUT,
    which is all of `command`."""

    def run(self) -> None:
        if self.done:
            return log.info("%s: copied before", self.id)
        (self.out / self.command[0]).mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self):
            for path in self.reads:
                shutil.copy2(path, self.out / self.command[0])
            self._finish(["copy", *map(str, self.reads)], datetime.datetime.now().astimezone().isoformat(), 0.0)


@dataclasses.dataclass(frozen=True)
class Made:
    """A file or folder that `step` makes; name: within its folder."""
    step: Step
    name: str = "."

    @property
    def path(self) -> Path:
        """Raises UserError if it is not there, although the step has run."""
        path = self.step.out / self.name
        if self.name == LAST_CHECKPOINT:
            from ga_llm.training import staging      # as above
            path = staging.last_checkpoint(self.step.out) or path
        if not path.exists():
            raise UserError(f"{path}: {self.step.id} has left none; move {self.step.folder} away, and it runs again")
        return path

    def shown(self) -> str:
        if self.name == LAST_CHECKPOINT and not self.step.done:
            return f"$(ls -dv {shlex.quote(str(self.step.out))}/checkpoint-* | tail -1)"
        return shlex.quote(str(self.path if self.step.done else self.step.out / self.name))


def in_order(step: Step) -> list[Step]:
    """`step` and all it builds on, each once, behind what it builds on itself."""
    found = {}

    def visit(step):
        for made in step.made:
            visit(made.step)
        found.setdefault(step.id, step)

    visit(step)
    return list(found.values())


def plan(steps: Iterable[Step]) -> str:
    """For a person: each step, whether it is done, and its command to copy and paste."""
    return "\n\n".join(f"# {step.id}: {'done' if step.done else 'to do'}\n{step.shown()}" for step in steps)


def _one_at_a_time(step: Step):
    """Raises nothing if the step is being run elsewhere, but waits."""
    lock = step.folder / writing.LOCK
    held = writing.locked(lock, wait=False)
    stack = contextlib.ExitStack()
    try:
        stack.enter_context(held)
    except UserError as error:
        log.info("%s: waiting, for %s", step.id, str(error).partition(": ")[2].partition(";")[0])
        stack.enter_context(writing.locked(lock, wait=True))
    return stack


def _call(command: Sequence[str], log_file: Path) -> int:
    """The exit code. What the command says goes to the log; whoever stops us stops it, too."""
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[command[0]]
    with open(log_file, "a", encoding="utf-8") as file, _stopping():
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        with subprocess.Popen([*program, *command[1:]], stdin=subprocess.DEVNULL, stdout=file, stderr=file) as process:
            try:
                return process.wait()
            except BaseException:
                process.terminate()     # torchrun hands it on to its processes
                process.wait()
                raise


@contextlib.contextmanager
def _stopping():
    """SIGTERM ends us as Ctrl-C does. For the main thread, which gets the signals."""
    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_words(log_file: Path) -> str:
    """What a log says of the failure: our error, else Python's, else its last line; torchrun adds a report of its own.
    """
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in
             log_file.read_text(encoding="utf-8", errors="replace").rpartition("$ ")[2].splitlines()[1:]]
    lines = [line for line in lines if line.strip("=-")] or ["it said nothing"]
    for pattern in (r"error: ", r"(?!torch\.distributed\.)[\w.]+(Error|Exception|Interrupt)\b"):
        found = [line for line in lines if re.match(pattern, line)]
        if found:
            return found[-1].removeprefix("error: ").rstrip(".")[:500]
    return lines[-1][:500]


def _link(source: Path, target: Path) -> None:
    """The files of `source` under `target`, without a copy where the disk allows it.

    Our scripts never change a file, they replace it: so nobody writes to what another step has made.
    """
    def link(one, other):
        if not os.path.exists(other):
            try:
                os.link(one, other)
            except OSError:
                shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("tokens-*", "*.lock", f"*{writing.UNFINISHED}"))


def _is_file(text: str) -> bool:
    return len(text) < 4096 and Path(text).is_file()


def _is_model(text: str) -> bool:
    return len(text) < 4096 and (Path(text) / "config.json").is_file()


def _contents(path: Path | str) -> str:
    """A hash of a file's contents; of a model's folder, of its weights' samples and its small files."""
    path = Path(path)
    if not path.is_dir():
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    small = sorted(file for pattern in SMALL_FILES for file in path.glob(pattern))
    parts = [str(reading.fingerprint(path)), *(f"{file.name} {_contents(file)}" for file in small)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.lru_cache(maxsize=None)
def _sha256(path: Path, size: int, time_ns: int) -> str:
    """Size and time are only there to notice that a file has changed since it was read last."""
    with writing.naming(path):
        return reading.sha256(path)
