"""How files are written: whole or not at all, into a folder that one run has for itself.

No torch here: the preprocessing scripts use this module too.
"""
import atexit
import contextlib
import errno
import fcntl
import logging
import os
import re
import signal
import socket
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from ga_llm.base.cli import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"
UNFINISHED = ".unfinished"      # how the names of files end that are being written


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "w"):
    """Open a hidden file beside `path` that takes its name only once it is complete and on disk.

    What a killed run leaves of it is removed by the next one that is `alone` there.
    """
    with together() as new_file, new_file(path, mode) as file:
        yield file


@contextlib.contextmanager
def together():
    """Let several files appear at once: gives a function to open each with, as by `atomic_write`.

    They take their names when all are complete and on disk, which leaves a kill no more than the renames to fall into.
    """
    hidden = {}         # the name to come -> the file

    @contextlib.contextmanager
    def new_file(path: Path | str, mode: str = "w"):
        path = Path(path)
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with naming(path):
            if path.is_dir():       # found now, not between two renames
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, hidden[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
            with os.fdopen(handle, mode, **text) as file:
                os.fchmod(handle, 0o666 & ~_umask())
                yield file
                file.flush()
                os.fsync(handle)

    try:
        yield new_file
        with _unstopped():
            for path, temporary in hidden.items():
                with naming(path):
                    os.replace(temporary, path)
    except BaseException:
        for temporary in hidden.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise


@contextlib.contextmanager
def _unstopped():
    """Whoever asks this process to stop has it done a moment later. For the main thread, which gets the signals."""
    came = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def append(path: Path | str, content: str | bytes) -> None:
    """Add whole lines to a file, on disk when this returns; where the disk is full none of them, and an OSError."""
    rest = content.encode() if isinstance(content, str) else content
    with naming(path), open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest):]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def to_disk(folder: Path) -> None:
    """A machine that loses its power keeps a folder's new name, perhaps, without the contents of its files."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def naming(path: Path | str):
    """Let an OSError say which file it is about: that of a full disk comes without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(UNFINISHED):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def saving(folder: Path | str):
    """Let safetensors and torch, which write files in `folder`, say of a full disk what everyone else does: OSError."""
    try:
        with naming(folder):
            yield
    except (SafetensorError, RuntimeError) as error:
        number = _of_disk(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _of_disk(error: Exception) -> int | None:
    """The system's number of an error that its library has put into its own words; None if it is about no file."""
    if isinstance(error, SafetensorError):
        found = re.search(r"I/O error: .*\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    if "unexpected pos" in str(error):      # torch's archive ends elsewhere than it wrote to
        return error.__context__.errno if isinstance(error.__context__, OSError) else errno.ENOSPC
    return None


@contextlib.contextmanager
def alone(folder: Path | str):
    """Keep every other run out of `folder`, which is made if need be, and remove what a killed one left unfinished.

    The system lets go of the lock when the process ends, however it does. Raises UserError if another run is there.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK, wait=False):
            for left in folder.glob(f".*{UNFINISHED}"):
                left.unlink(missing_ok=True)
            yield
    finally:
        with contextlib.suppress(OSError):      # something is in it: as it should
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def locked(path: Path, wait: bool):
    """Hold the lock file `path`, which is made, names this process, and is gone afterwards.

    Another process holds it: wait until it lets go, or raise a UserError that names it.
    """
    with naming(path):
        file = _open_locked(path, wait)
    with file:
        _locks.add(file)
        try:
            with contextlib.suppress(OSError):      # a full disk takes the file, if not what it says
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        finally:
            if not file.closed:     # in a forked process it is, and the lock is its parent's
                path.unlink(missing_ok=True)
            _locks.discard(file)


def _open_locked(path: Path, wait: bool):
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "just started"
            file.close()
            raise UserError(f"{path.parent}: another run is writing there ({who}); wait until it has ended, or stop it"
                            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.warning("%s: this file system has no locks; see to it that no other run writes there", path.parent)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()        # whoever held it has removed it in this moment


# A lock lives as long as anyone has its file open: a data loader's process would keep it for a killed run.
_locks = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _locks])


def hold(folder: Path | str) -> None:
    """Be `alone` in `folder` until this process ends."""
    _held.enter_context(alone(folder))


_held = contextlib.ExitStack()
atexit.register(_held.close)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
