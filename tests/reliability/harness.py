"""What the tests of reliability share: calling a script in this process, what a refusal is, what lies in a folder."""
import contextlib
import dataclasses
import hashlib
import io
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from ga_llm.training import preemption

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


def call(folder: Path, script: str, *arguments) -> Result:
    """Run a script of the repository in this process, as from the command line in `folder`."""
    before, argv, code = os.getcwd(), sys.argv, 0
    handlers = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    os.chdir(folder)
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except Exception:
                traceback.print_exc()
                code = 1
    finally:
        os.chdir(before)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for stream in (out, err):
        stream.flush()
    return Result(code, *(stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)))


def refusal(result, *names: str) -> str:
    """Check that a command has ended as a user's mistake should, and return its line.

    That is: exit code 1 or 2, no traceback, and a last line of stderr that says `error: `, has each of `names` in it (a
    file, a line, a flag) and, behind a ";" or in backquotes, the way out.
    """
    code = getattr(result, "code", getattr(result, "returncode", None))
    text = getattr(result, "err", getattr(result, "stderr", None))
    lines = text.strip().splitlines()
    assert code in (1, 2) and "Traceback" not in text and lines, (code, text)
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], text
    assert ";" in lines[-1] or "`" in lines[-1], lines[-1]
    assert [name for name in names if name not in lines[-1]] == [], lines[-1]
    return lines[-1]


def snapshot(folder: Path) -> dict[str, str]:
    """{path within `folder`: a hash of the file's contents, or where the link leads, or that it is a folder}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found
