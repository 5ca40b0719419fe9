"""Output that cannot be printed is lost and changes nothing else; programs end with their codes."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

# Prints on both streams before and after `ready`, and ends with code 7.
PROGRAM = """
import sys
from runtime.errors import run_command

def main():
    for stream in (sys.stdout, sys.stderr):
        print("0.5 \\xb1 0.1 caf\\udce9", file=stream, flush=True)
    with open("written", "w") as file:
        file.write("complete")
    sys.stdin.readline()
    print("more" * 10000)
    print("more" * 10000, file=sys.stderr)
    assert not sys.stdout.isatty() or sys.stdout.fileno() == 1
    return 7

run_command(main)
"""


def start(
    folder: Path,
    redirection: str = "",
    *,
    env: dict[str, str] = {},  # noqa: B006
    stdout: int | None = None,
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """The program in a process of its own; `redirection` is in the shell's language."""
    return subprocess.Popen(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PROGRAM],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
    )


@pytest.mark.parametrize(
    "redirection",
    [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"],
)
def test_output_that_cannot_be_written_is_lost(redirection: str, tmp_path: Path) -> None:
    process = start(tmp_path, redirection, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(b"\n")
    code = 3 if redirection.startswith("<") else 7  # there, the program itself cannot read
    assert process.returncode == code
    assert b"Exception ignored" not in err
    assert b"No space" not in err
    assert (tmp_path / "written").read_text() == "complete"  # and no message
    assert bool(out) == (redirection.startswith("2"))


def test_output_to_a_closed_pipe_is_lost(tmp_path: Path) -> None:
    process = start(tmp_path, "2>&1", stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 7


def test_output_to_a_terminal_that_is_gone_is_lost(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    process = start(tmp_path, stdout=end, stderr=end)
    assert process.stdin is not None
    os.close(end)
    while b"\n" not in os.read(terminal, 1000):
        pass
    os.close(terminal)
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 7


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"0.5 \\xb1 0.1 caf\\udce9\n"),
        (
            {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
            b"0.5 \\xb1 0.1 caf\\udce9\n",
        ),
        ({"PYTHONUTF8": "1"}, "0.5 ± 0.1 caf\\udce9\n".encode()),
    ],
)
def test_characters_that_the_encoding_lacks_are_escaped(
    environment: dict[str, str], expected: bytes, tmp_path: Path
) -> None:
    process = start(tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(b"\n")
    assert process.returncode == 7
    assert out.startswith(expected)
    assert err.startswith(expected)


def ended(main: str, tmp_path: Path) -> tuple[int, str]:
    """Exit code and messages of a program whose `main` is a single expression."""
    program = f"from runtime.errors import *\nimport os\nrun_command(lambda: {main}, '; go on')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    return done.returncode, done.stderr


def test_code_1_is_for_the_numbers_alone(tmp_path: Path) -> None:
    """A bug is another failure; `main` returns 1 if training diverged."""
    code, err = ended("1 // 0", tmp_path)
    assert code == 3
    assert err.endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert ended("1", tmp_path) == (1, "")


@pytest.mark.parametrize("number", [1, 2, 10, 15])
def test_signals_end_a_program_with_its_advice(number: int, tmp_path: Path) -> None:
    """SIGHUP, SIGINT, SIGUSR1 and SIGTERM."""
    found = ended(f"os.kill(os.getpid(), {number})", tmp_path)
    assert found == (128 + number, "interrupted; go on\n")


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    program = (
        "from runtime.errors import *\nimport os\nrun_command(lambda: os.kill(os.getpid(), 1) or 5)"
    )
    done = subprocess.run(
        ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 5


def test_streams_of_the_caller_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """Notebooks and tests replace them."""
    from runtime.output import protect_output

    before = sys.stdout, sys.stderr
    protect_output()
    assert (sys.stdout, sys.stderr) == before
