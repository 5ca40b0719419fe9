"""Runs commands for the tests, in this process or in another one, and returns their results."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from runtime.errors import run_command

ROOT = Path(__file__).parent.parent


def words(line: str) -> list[str]:
    """The arguments in a line."""
    return line.split()


@dataclass(frozen=True)
class Result:
    """A command's exit code and output."""

    code: int
    out: str
    err: str


def run(main: Callable[[Sequence[str]], int], *arguments: object) -> Result:
    """Run a command's `main` in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
        run_command(lambda: main([str(argument) for argument in arguments]))
    code = exit.value.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def is_one_line_error(result: Result) -> bool:
    return (
        result.code == 2
        and re.fullmatch(r"error: [^\n]+\n", result.err) is not None
        and result.err[:-1].isprintable()  # and no terminal colours
    )


def refusal(main: Callable[[Sequence[str]], int], *arguments: object) -> str:
    """The one-line error of a command, which must fail and print nothing else."""
    result = run(main, *arguments)
    assert is_one_line_error(result), result
    assert result.out == ""
    return result.err


def subprocess_environment(**changes: str) -> dict[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | changes
    environment.pop("LVAE_DATA", None)
    return environment


def script(name: str, *arguments: object, **changes: str) -> Result:
    """Run a script in a process of its own."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=subprocess_environment(**changes), timeout=300
    )
    return Result(done.returncode, done.stdout, done.stderr)


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
