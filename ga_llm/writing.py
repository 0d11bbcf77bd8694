"""How files are written: whole or not at all, into a folder that one run has for itself.

No torch here: the preprocessing scripts use this module too.
"""
import atexit
import contextlib
import errno
import fcntl
import logging
import os
import socket
import tempfile
from pathlib import Path

from ga_llm.cli import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"
UNFINISHED = ".unfinished"      # how the names of files end that are being written


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "w"):
    """Open a hidden file beside `path` that takes its name only once it is complete and on disk.

    What a killed run leaves of it is removed by the next one that is `alone` there.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        try:
            with os.fdopen(handle, mode, **text) as file:
                os.fchmod(handle, 0o666 & ~_umask())
                yield file
                file.flush()
                os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


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
def alone(folder: Path | str):
    """Keep every other run out of `folder`, which is made if need be, and remove what a killed one left unfinished.

    The system lets go of the lock when the process ends, however it does. Raises UserError if another run is there.
    """
    folder = Path(folder)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder / LOCK), contextlib.ExitStack() as stack:
        file = stack.enter_context(_locked(folder))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for left in folder.glob(f".*{UNFINISHED}"):
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if not existed:
                with contextlib.suppress(OSError):      # something is in it: as it should
                    folder.rmdir()


def _locked(folder: Path):
    """The open lock file of `folder`, locked."""
    while True:
        file = open(folder / LOCK, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "just started"
            file.close()
            raise UserError(f"{folder}: another run is writing there ({who}); wait until it has ended, or stop it"
                            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.warning("%s: this file system has no locks; see to it that no other run writes there", folder)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        file.close()        # the run before removed it in this moment


def hold(folder: Path | str) -> None:
    """Be `alone` in `folder` until this process ends."""
    _held.enter_context(alone(folder))


_held = contextlib.ExitStack()
atexit.register(_held.close)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
