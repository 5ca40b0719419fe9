"""Made-up input: whatever a file or a command line holds, it is taken or refused in one line.

Cases are made by Hypothesis, the same ones each time. None may end in a traceback, and none may run
what it brings along.
"""

import copy
import io
import json
import os
import pickle
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import train_svi
from datasets import celeba, digits
from datasets.cache import Contents, load_arrays
from datasets.folder import load_folder
from ladder_vae.evaluation.inpainting import read_mask
from ladder_vae.runs import published
from ladder_vae.runs.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from ladder_vae.runs.command_line import flag_names
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from runtime.errors import UserError, run_command
from tools import import_reference as reference_checkpoint

CPU = torch.device("cpu")
LADDER = (
    "--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --batch-size 32 --device cpu"
).split()


def fuzz(
    strategy: st.SearchStrategy[Any],
    check: Callable[[Any], None],
    record: Callable[[str, object], None],
    cases: int,
) -> None:
    """Run `check` on so many made-up values, which it may refuse with `UserError` alone."""
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
    record("cases", seen)


def succeeds(check: Callable[[Any], None], value: Any) -> int:
    """The exit code of a script that goes well, where `check` raises nothing."""
    check(value)
    return 0


@pytest.fixture(autouse=True)
def digits_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images are made once."""
    images = digits._binary_images()
    monkeypatch.setattr(digits, "_binary_images", lambda: images)


# --- Command lines ---

NUMBERS = ["-1", "0", "1", "2", "3", "0.5", "1e-3", "nan", "inf", "-inf", "1e400", "1_0", "0x2"]
HUGE = [str(2**31), str(2**63), str(-(2**63)), "9" * 30, "9" * 5000]
WORDS = ["", " ", "x", "-", "--", "--x", "١", "é\udcff", "a\nb", "\x1b[31m", "auto", "elu"]
CHOICES = sorted({c for field in fields(RunConfig) for c in field.metadata["choices"]} - {"celeba"})


def command_lines(*flags: str) -> st.SearchStrategy[list[str]]:
    """Options, each with none to three values that may suit it or not."""
    value = st.one_of(*map(st.sampled_from, (NUMBERS, HUGE, WORDS, CHOICES)), st.text(max_size=6))
    option = st.tuples(st.sampled_from(flags), st.lists(value, max_size=3))
    return st.lists(option, max_size=3).map(lambda given: [w for f, v in given for w in (f, *v)])


def takes(parse: Callable[[list[str]], Any], words: list[str]) -> Any:
    """What a parser makes of words; --help is not a case."""
    return None if {"-h", "--help"} & set(words) else parse(words)


def test_command_lines_of_training(
    tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = [flag for field in fields(RunConfig) for flag in flag_names(field)]

    def check(words: list[str]) -> None:
        arguments = takes(train_svi.parse_arguments, [*LADDER, "--dry-run", *words])
        if arguments is not None and (arguments.dataset or "digits") == "digits":
            train_svi.prepare(arguments)

    flags = [*own, "--out", "--resume", "--device", "--preset", "--nocuda"]
    fuzz(command_lines(*flags).map(lambda w: [*w, "-d", "digits"]), check, record_property, 150)
    assert list(tmp_path.iterdir()) == []


def test_command_lines_of_other_scripts(
    tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def check(case: tuple[str, list[str]]) -> None:
        name, words = case
        if name == "evaluate":
            takes(evaluate.parse_arguments, ["run", *words])
        elif name == "published":
            takes(published.parse_arguments, words)
            if words[:1] == ["export"] and not {"-h", "--help"} & set(words):
                published.main(words)
        elif not {"-h", "--help"} & set(words):
            reference_checkpoint.main([*LADDER[:-2], "nothing.pt", "--out", "run", *words])

    flags = "--checkpoint --samples --limit --split --batch-size --seed --device --step --out "
    flags += "export import run --zdims --nfilters --lr"
    names = st.sampled_from(["evaluate", "published", "reference_checkpoint"])
    fuzz(st.tuples(names, command_lines(*flags.split())), check, record_property, 250)


# --- Run folders ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    train_svi.main([*LADDER, "--steps", "2", "--tr-log-interv", "1", "--out", str(folder)])
    return folder


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


def resume_and_load(folder: Path) -> None:
    """Resume a run up to where training would begin, and load it for an evaluation."""
    run = Run.open(folder)
    if run.config.dataset != "digits":
        return  # its images are not here
    evaluate.Trained.load(run, None, CPU, average=True)
    arguments = ["--resume", str(folder), "--device", "cpu", "--steps", "9"]
    train_svi.prepare(train_svi.parse_arguments(arguments))


def test_configurations(trained: Path, record_property: Callable[[str, object], None]) -> None:
    """config.json with other values in its places, or of another make altogether."""
    path = trained / "config.json"
    original = json.loads(path.read_text())
    names = st.sampled_from([f.name for f in fields(RunConfig)] + ["colour", "a\nb"])

    def changed(change: tuple[str, str, Any]) -> Any:
        where, name, value = change
        content = copy.deepcopy(original)
        if where == "config":
            content["config"][name] = value
        elif where == "top":
            content["image_shape" if name < "m" else "format"] = value
        else:
            return value
        return content

    change = st.tuples(st.sampled_from(["config"] * 8 + ["top", "whole"]), names, JSON)

    def check(content: Any) -> None:
        path.write_text(json.dumps(content))
        try:
            resume_and_load(trained)
        finally:
            path.write_text(json.dumps(original))

    fuzz(change.map(changed), check, record_property, 250)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes cut short, or with some of them changed, put in or taken out; or any other."""
    places = st.integers(0, len(whole) - 1)
    piece = st.binary(max_size=8)

    def spliced(case: tuple[int, int, bytes]) -> bytes:
        start, length, new = case
        return whole[:start] + new + whole[start + length :]

    return st.one_of(
        places.map(lambda end: whole[:end]),
        st.tuples(places, st.integers(0, 8), piece).map(spliced),
        st.binary(max_size=64),
    )


def test_checkpoints(trained: Path, record_property: Callable[[str, object], None]) -> None:
    """Bytes of a checkpoint; a damaged one is never taken for whole."""
    run = Run.open(trained)
    path = run.checkpoint_path(2)
    whole = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read_checkpoint(path, CPU)
            assert content == whole
        finally:
            path.write_bytes(whole)

    fuzz(damaged(whole), check, record_property, 400)


def test_states(
    trained: Path,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole checkpoints that hold other things than a state of training."""
    path = Run.open(trained).checkpoint_path(2)
    original = read_checkpoint(path, CPU)
    inner = [(k, i) for k in ("optimizer", "log", "average") for i in original[k]]
    guard = [("log", "guard", name) for name in original["log"]["guard"]]
    # Of each rank where there are several.
    several = [("ranks",), ("ranks", 0, "cpu_random_state")]
    original["ranks"] = [{k: original[k] for k in ("cpu_random_state", "cuda_random_state")}]
    places = st.sampled_from([*((k,) for k in original), *inner, *guard, *several])
    tensors = st.sampled_from([torch.zeros(2), torch.tensor(1), torch.zeros(0), torch.ones(3, 2)])
    run = Run.open(trained)
    options = ["--resume", str(trained), "--device", "cpu", "--steps", "9"]
    training, _ = train_svi.prepare(train_svi.parse_arguments(options))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes most of the time

    def check(case: tuple[tuple[Any, ...], Any]) -> None:
        (*outer, last), value = case
        content = copy.deepcopy(original)
        holder = content
        for name in outer:
            holder = holder[name]
        holder[last] = value
        write_checkpoint(path, content)
        training.load_state(run.load_checkpoint(2, CPU))

    fuzz(st.tuples(places, JSON | tensors), check, record_property, 100)
    write_checkpoint(path, original)


class Payload:
    """Unpickling this makes a folder `executed`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_payloads(
    tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles that would run code, whole or damaged, wherever a file is read."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "step": 1, "weights": Payload()}, buffer)
    array = io.BytesIO()
    np.savez(array, train=np.array([Payload()], dtype=object))
    kinds = [buffer.getvalue(), pickle.dumps(Payload()), array.getvalue()]
    contents = st.one_of(*(st.just(kind) | damaged(kind) for kind in kinds))
    expected = {"train": Contents((1,), None)}

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for read in (
            lambda: read_checkpoint(path, CPU),
            lambda: reference_checkpoint.read_weights(path),
            lambda: published.read_published(path),
            lambda: load_arrays(path, expected, ["train"], dict),
        ):
            with pytest.raises(UserError):
                read()
        assert not (tmp_path / "executed").exists()

    fuzz(contents, check, record_property, 300)


def test_metrics(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Lines of metrics.jsonl."""
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "time": 2.0, "train/loss": null}\n{"step": 2, "time": 3.5}\n'
    lines = st.lists(JSON, max_size=3).map(lambda v: "".join(f"{json.dumps(x)}\n" for x in v))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        assert all(isinstance(entry["step"], int) for entry in read_entries(path))

    fuzz(damaged(whole) | lines.map(str.encode), check, record_property, 300)


def test_published_weights(
    trained: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Bytes of a published file; a damaged one is never taken for whole."""
    path = tmp_path / "weights.safetensors"
    published.export_weights(Run.open(trained), None, path)
    whole = path.read_bytes()
    weights = published.read_published(path)[1]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        _, read = published.read_published(path)
        assert all(torch.equal(read[name], weights[name]) for name in weights | read)

    fuzz(damaged(whole), check, record_property, 300)


# --- Data ---


def test_data_files(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Bytes of a data set's npz file, packed or not; what is taken is what was put in."""
    path = tmp_path / "data.npz"
    train = np.arange(48, dtype=np.uint8).reshape(4, 12)
    expected = {"train": Contents(train.shape, None)}
    contents = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, allow_pickle=False, train=train)
        contents.append(buffer.getvalue())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        np.testing.assert_array_equal(load_arrays(path, expected, ["train"], dict)["train"], train)

    fuzz(st.one_of(*map(damaged, contents)), check, record_property, 400)


def test_images(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Bytes of one of CelebA's images."""
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    kinds = []
    for name in ("jpeg", "png"):
        buffer = io.BytesIO()
        gradient = np.arange(218 * 178 * 3).reshape(218, 178, 3).astype(np.uint8)
        Image.fromarray(gradient).save(buffer, format=name)
        kinds.append(buffer.getvalue())

    def check(content: bytes) -> None:
        (folder / "1.jpg").write_bytes(content)
        (image,) = celeba._prepared(tmp_path, ["1.jpg"])
        assert image.shape == (64, 64, 3)

    fuzz(st.one_of(*map(damaged, kinds)), check, record_property, 200)


def test_masks_and_pictures_to_score(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Bytes of a mask's file, and of a picture in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = folder / "1.png"
    kinds = []
    for name in ("png", "gif", "bmp", "tiff", "jpeg", "webp"):
        buffer = io.BytesIO()
        half = np.arange(80).reshape(8, 10).astype(np.uint8) // 40 * 255
        Image.fromarray(half).save(buffer, format=name)
        kinds.append(buffer.getvalue())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        mask = read_mask(str(path), (8, 10))
        assert 0 < mask.sum() < 80
        images, names = load_folder(folder, (1, 8, 10), binary=True)
        assert (len(images), names) == (1, ["1.png"])

    fuzz(st.one_of(*map(st.just, kinds), *map(damaged, kinds)), check, record_property, 200)
