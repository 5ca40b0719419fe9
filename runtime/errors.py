"""The exception for a user's mistakes, and how scripts report it."""

import difflib
import signal
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A user's mistake. The message is one line: what is wrong, and what would be right."""


def one_line(text: str) -> str:
    """`text` with line breaks and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word that is most like `word`; empty if none is."""
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def run_command(main: Callable[[], int]) -> None:
    """Run a script's `main` and exit with its code; a `UserError` becomes one line and code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)
