"""The exception for a user's mistakes, and how scripts report it."""

import difflib
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

from runtime.output import protect_output
from runtime.signals import raising_interrupted

# The exit code of failures that are neither the user's nor the numbers' fault. 1 means that
# training diverged, and nothing else.
OTHER_FAILURE = 3


class UserError(Exception):
    """A user's mistake. The message is one line: what is wrong, and what would be right."""


def one_line(text: str) -> str:
    """`text` with line breaks and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word that is most like `word`; empty if none is."""
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def run_command(main: Callable[[], int], advice: str = "") -> None:
    """Run a script's `main` and exit with its code.

    A `UserError` becomes one line and code 2, a signal N one line, followed by `advice`, and code
    128 + N, and any other error a traceback and code 3. Output that cannot be written is lost; it
    changes nothing else.
    """
    protect_output()
    try:
        with raising_interrupted():
            code = main()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as stop:
        print(f"interrupted{advice}", file=sys.stderr)
        code = 128 + getattr(stop, "signal", signal.SIGINT)
    except Exception:
        traceback.print_exc()
        code = OTHER_FAILURE
    sys.exit(code)
