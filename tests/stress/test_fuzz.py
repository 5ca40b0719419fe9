"""Generated input: damaged files and wrong command lines are errors of one line, and run no code.

Hypothesis generates the same cases each time. The samples of `make test` are in
tests/scripts/test_fuzz.py.
"""

import copy
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import train_svi
from datasets import digits
from ladder_vae.runs.command_line import OPTIONS, flag
from ladder_vae.runs.run import Run
from runtime.errors import run_command
from tests.file_kinds import CHECKED, READERS, make_run, whole_files
from tests.scripts.test_fuzz import LADDER, payloads
from tools import export_weights, import_reference, inpaint, score_images


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], cases: int) -> None:
    """Call `check` with generated values; `UserError` is the only error it may raise."""
    seen = 0

    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(value: Any) -> None:
        nonlocal seen
        seen += 1
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            run_command(lambda: succeeds(check, value))
        assert end.value.code in (0, 2), err.getvalue()
        if end.value.code == 2:
            *_, line = err.getvalue().splitlines(keepends=True)
            assert line.startswith("error: ")
            assert line.endswith("\n")
            assert line[:-1].isprintable()

    each()
    assert seen >= cases // 2


def succeeds(check: Callable[[Any], None], value: Any) -> int:
    """The exit code of a command that does what `check` does."""
    check(value)
    return 0


@pytest.fixture(autouse=True)
def digits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binarize the digits only once."""
    images = digits._binary_images()
    monkeypatch.setattr(digits, "_binary_images", lambda: images)


# Command lines

NUMBERS = ["-1", "0", "1", "2", "3", "0.5", "1e-3", "nan", "inf", "-inf", "1e400", "1_0", "0x2"]
HUGE = [str(2**31), str(2**63), str(-(2**63)), "9" * 30, "9" * 5000]
WORDS = ["", " ", "x", "-", "--", "--x", "١", "é\udcff", "a\nb", "\x1b[31m", "auto", "elu"]
CHOICES = sorted({c for field in OPTIONS.values() for c in field.metadata["choices"]} - {"celeba"})


def command_lines(*flags: str) -> st.SearchStrategy[list[str]]:
    """Options with none to three values each, which may be valid or not."""
    value = st.one_of(*map(st.sampled_from, (NUMBERS, HUGE, WORDS, CHOICES)), st.text(max_size=6))
    option = st.tuples(st.sampled_from(flags), st.lists(value, max_size=3))
    options = st.lists(option, max_size=3).map(lambda given: [w for f, v in given for w in (f, *v)])
    return options.filter(lambda words: not {"-h", "--help"} & set(words))


def test_command_lines_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def check(words: list[str]) -> None:
        train_svi.prepare(train_svi.parse_arguments([*LADDER, *words, "-d", "digits"]))

    flags = [*map(flag, OPTIONS), "--out", "--resume", "--device", "--preset", "--nocuda"]
    fuzz(command_lines(*flags), check, 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (evaluate.main, ["run"]),
        (inpaint.main, ["run", "--mask", "top"]),
        (score_images.main, ["run", "test"]),
        (export_weights.main, ["run", "--out", "weights"]),
        (import_reference.main, ["nothing.pt", "--out", "run"]),
    ],
)
def test_command_lines_of_other_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[list[str]], int],
    arguments: list[str],
) -> None:
    """Without a run or weights, no command line succeeds, and none writes a file."""
    monkeypatch.chdir(tmp_path)

    def check(words: list[str]) -> None:
        main([*arguments, *words])

    flags = "--checkpoint --samples --limit --split --batch-size --seed --device --step --out "
    flags += "run --zdims --nfilters --lr --chains --sweeps --prior-layers --against --temperature"
    fuzz(command_lines(*flags.split()), check, 200)
    assert list(tmp_path.iterdir()) == []


# Files

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, "9" * 50]),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(CHOICES),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def test_configurations(tmp_path: Path) -> None:
    """config.json with other values, or with another structure."""
    run = make_run(tmp_path / "run")
    original = run.description()
    places: list[tuple[str, ...]] = [(name,) for name in original]
    places += [("config", name) for name in (*original["config"], "colour", "a\nb")]
    places += [("config", "ladder", name) for name in (*original["config"]["ladder"], "colour")]

    def check(change: tuple[tuple[str, ...], Any]) -> None:
        place, value = change
        content = copy.deepcopy(original)
        holder = content
        for name in place[:-1]:
            holder = holder[name]
        holder[place[-1]] = value
        (run.path / "config.json").write_text(json.dumps(content))
        Run.open(run.path)

    def check_whole(content: Any) -> None:
        (run.path / "config.json").write_text(json.dumps(content))
        Run.open(run.path)

    fuzz(st.tuples(st.sampled_from(places), JSON), check, 600)
    fuzz(JSON, check_whole, 100)


def test_log_entries(tmp_path: Path) -> None:
    """metrics.jsonl with any JSON values as its lines."""
    lines = st.lists(JSON, max_size=3).map(lambda v: "".join(f"{json.dumps(x)}\n" for x in v))
    fuzz(lines.map(str.encode), lambda content: READERS["metrics.jsonl"](tmp_path, content), 300)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """`whole` cut short, or with some bytes changed, inserted or removed; or other bytes."""
    places = st.integers(0, len(whole) - 1)

    def spliced(case: tuple[int, int, bytes]) -> bytes:
        start, length, new = case
        return whole[:start] + new + whole[start + length :]

    return st.one_of(
        places.map(lambda end: whole[:end]),
        st.tuples(places, st.integers(0, 8), st.binary(max_size=8)).map(spliced),
        st.binary(max_size=64),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    return whole_files(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(whole: dict[str, list[bytes]], tmp_path: Path, kind: str) -> None:
    """Damage is an error of one line, or harmless; checked files are read unchanged."""
    expected = READERS[kind](tmp_path, whole[kind][0])

    def check(content: bytes) -> None:
        found = READERS[kind](tmp_path, content)
        assert found == expected or kind not in CHECKED

    fuzz(st.one_of(*map(damaged, whole[kind])), check, 400)


@pytest.mark.parametrize("kind", READERS)
def test_payloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Pickles that would run code, whole or damaged: no reader runs any."""
    monkeypatch.chdir(tmp_path)

    def check(content: bytes) -> None:
        try:
            READERS[kind](tmp_path, content)
        finally:
            assert not (tmp_path / "executed").exists()

    fuzz(st.one_of(*(st.just(p) | damaged(p) for p in payloads())), check, 200)
