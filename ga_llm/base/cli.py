"""How every script talks to its user: boolean flags, one-line errors, log lines."""
import argparse
import difflib
import errno
import importlib.util
import logging
import math
import os
import sys

WAYS_OUT = {        # what the system may say of a file, and what to do about it
    errno.ENOSPC: "make room there", errno.EDQUOT: "make room there", errno.EFBIG: "files may not be so large there",
    errno.EROFS: "give a folder that can be written to", errno.EACCES: "see to its permissions",
    errno.EPERM: "see to its permissions", errno.ENOENT: "give one that is there",
    errno.EISDIR: "give a file, not a folder", errno.ENOTDIR: "give a folder, not a file",
    errno.EEXIST: "remove it, or give another name", errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle", errno.EIO: "the disk fails to read or write it",
    errno.ESTALE: "the disk is gone; mount it again", errno.ENOTEMPTY: "remove it, or give another name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}

LEAST_TOKENS, MOST_TOKENS = 16, 2**24     # of a question and its answer; of what any model takes


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: the file, the row or flag, and the way out."""


def needed(package: str, by: str) -> None:
    """Raises UserError if a package that most commands do without is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{by}: needs {package}, which is not installed; pip install {package}")


def boolean(text: str) -> bool:
    """Parse `True`/`False` (also yes/no, 1/0) for argparse.

    Departure from the released code: there `type=bool` turns the text "False" into True.
    """
    value = text.strip().lower()
    if value in {"true", "yes", "y", "1", "t"}:
        return True
    if value in {"false", "no", "n", "0", "f"}:
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def whole_number(least: int, most: int = 2**63 - 1):
    """A type for argparse: whole numbers from `least` to `most`."""
    def parse_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return number
    return parse_number


def listed(kind):
    """A type for argparse: different values, each of a type for argparse, with commas between."""
    def parse_list(text: str) -> list:
        parts = text.split(",")
        if not all(parts) or len(set(parts)) < len(parts):
            raise argparse.ArgumentTypeError(f"expected different ones with commas between, got {text!r}")
        return list(map(kind, parts))
    return parse_list


def share(text: str) -> float:
    """A type for argparse: numbers from 0 to below 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return number


token_count = whole_number(LEAST_TOKENS, MOST_TOKENS)


class Parser(argparse.ArgumentParser):
    """A script's flags, under its docstring; a mistake is a UserError, not argparse's usage and exit."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def _get_option_tuples(self, option_string: str) -> list:
        """No abbreviations: allow_abbrev=False spares those of `-flags`."""
        return []

    def parse_args(self, args=None, namespace=None):
        """Of an unknown flag it says what it looks like: data-preprocess/'s have one dash, the others' two."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f", perhaps for {near[0]}" if near else ""))
        return found

    def error(self, message: str):
        raise UserError(f"{message}; see python {sys.argv[0]} --help")


def run(main) -> None:
    """Run a script's `main()`; a UserError becomes one line on stderr and exit code 2, without a traceback.

    So does what the system says of a file: the disk is full, the folder may not be written to.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                              # started with it closed
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")   # a terminal that knows no "–" is no reason to fail
    sys.stdout.reconfigure(write_through=False)     # so that it is _flush that writes, whatever PYTHONUNBUFFERED says
    level = logging.INFO if _is_first() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        try:
            main()
        finally:
            _flush()
    except UserError as error:
        _say(str(error))
        sys.exit(2)
    except BrokenPipeError:         # whoever read our output has stopped to
        sys.exit(1)
    except OSError as error:
        if error.errno not in WAYS_OUT or error.filename is None:
            raise
        _say(f"{error.filename}: {error.strerror.lower()}; {WAYS_OUT[error.errno]}")
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _say(error: str) -> None:
    """One line, although a name may hold a line's end; in one piece, for torchrun's processes write at once."""
    sys.stderr.write("error: " + " ".join(error.split()) + "\n")


def _flush() -> None:
    """Now, for when Python ends, a reader who is gone or a full disk would be a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "standard output"
        raise


def show_progress() -> bool:
    """Progress bars belong on a terminal, those of the first process; under nohup, log lines are enough."""
    return sys.stderr.isatty() and _is_first()


def _is_first() -> bool:
    """Of torchrun's processes."""
    return os.environ.get("RANK", "0") == "0"
