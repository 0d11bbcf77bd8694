"""How every script talks to its user: boolean flags, one-line errors, log lines."""
import argparse
import logging
import os
import sys


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: the file, the row or flag, and the way out."""


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


def run(main) -> None:
    """Run a script's `main()`; a UserError becomes one line on stderr and exit code 2, without a traceback."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def show_progress() -> bool:
    """Progress bars belong on a terminal; under nohup, log lines are enough."""
    return sys.stderr.isatty()
