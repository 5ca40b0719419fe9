"""A scoring that is killed, resumed, damaged or shared by processes gives the same digits."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evaluate
from datasets import ImageSet
from datasets.images import ColourImages, DynamicallyBinarizedImages, PackedImages
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.evaluation.importance import Bounds, ImportanceSampler
from ladder_vae.evaluation.metrics import curve_samples
from ladder_vae.evaluation.scoring import ProgressFile, fingerprint, score
from ladder_vae.networks import LadderConfig
from ladder_vae.runs.checkpoint import weights_only
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.runs.run import Run
from runtime.distributed import Ranks
from tests.commands import ROOT, subprocess_environment
from tests.made_data import refusal


class Groups:
    """Records the groups that samplers compute, and can interrupt before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: list[int] = []
        self.interrupt_before: int | None = None
        original = ImportanceSampler.group

        def group(sampler: ImportanceSampler, number: int) -> Bounds:
            if number == self.interrupt_before:
                raise KeyboardInterrupt
            self.numbers.append(number)
            return original(sampler, number)

        monkeypatch.setattr(ImportanceSampler, "group", group)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Groups:
    return Groups(monkeypatch)


# --- The progress file ---


@pytest.fixture
def ladder() -> tuple[Any, Any]:
    config = LadderConfig(
        z_dims=[2, 2],
        downsample=[0, 1],
        n_filters=4,
        blocks_per_layer=1,
        initial_downscaling=False,
    )
    model, guide = build_ladder(config, (1, 4, 4))
    return model.eval(), guide.eval()


def binary_images(seed: int = 1, **names: str) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 2, (7, 1, 4, 4), np.uint8)
    return PackedImages.pack(names.get("name", "made"), names.get("split", "test"), pixels)


def sampler_of(ladder: tuple[Any, Any], **changes: Any) -> ImportanceSampler:
    """Four groups, the last one smaller."""
    settings: dict[str, Any] = {
        "images": binary_images(),
        "index": torch.arange(7),
        "samples": [1, 3],
        "batch_size": 6,
        "seed": 0,
    }
    return ImportanceSampler(*ladder, **(settings | changes))


def scored(sampler: ImportanceSampler, folder: Path, key: str = "key") -> Tensor:
    """The table of all images."""
    return score(sampler, ProgressFile(folder, key, sampler), Ranks()).table()


def same_digits(one: Tensor, other: Tensor) -> bool:
    return np.array_equal(one.numpy(), other.numpy(), equal_nan=True)


def test_an_interrupted_scoring_resumes(
    ladder: tuple[Any, Any], tmp_path: Path, groups: Groups
) -> None:
    """Interrupted before the third group of four, and again before the last."""
    uninterrupted = scored(sampler_of(ladder), tmp_path / "uninterrupted")
    assert groups.numbers == [0, 1, 2, 3]
    for interrupt_before, computed in ((2, [0, 1]), (3, [2]), (None, [3]), (None, [])):
        groups.numbers, groups.interrupt_before = [], interrupt_before
        try:
            resumed = scored(sampler_of(ladder), tmp_path / "interrupted")
        except KeyboardInterrupt:
            assert interrupt_before is not None
        assert groups.numbers == computed
    assert same_digits(resumed, uninterrupted)


def test_the_progress_bar_shows_the_bound_so_far(
    ladder: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the largest K, including the images that an earlier process scored."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    sampler = sampler_of(ladder)
    bound = score(sampler, ProgressFile(tmp_path, "key", sampler), Ranks()).importance_weighted[3]
    assert f", {-bound.mean():.2f} nats, K = 3" in capsys.readouterr().err
    score(sampler, ProgressFile(tmp_path, "key", sampler), Ranks())
    assert "7/7" in capsys.readouterr().err


def test_a_permuted_index_resumes_the_same_scoring(
    ladder: tuple[Any, Any], tmp_path: Path, groups: Groups
) -> None:
    ordered = scored(sampler_of(ladder), tmp_path)
    index = torch.tensor([5, 0, 6, 2, 1, 3, 4])
    groups.numbers = []
    permuted = scored(sampler_of(ladder, index=index), tmp_path)
    assert groups.numbers == []
    assert same_digits(permuted, ordered[index])


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


# Each record is 12 bytes and a table of 9 columns for two images, one for the last group.
RECORD = 12 + 2 * 9 * 8
LAST = 3 * RECORD


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda content: content[:-1], [3]),
        (lambda content: content[: LAST + 5], [3]),  # in the middle of the header
        (lambda content: flipped(content, LAST + 20), [3]),
        (lambda content: flipped(content, LAST + 9), [3]),  # the checksum
        (lambda content: flipped(content, RECORD), [1, 2, 3]),  # another group's number
        (lambda content: flipped(content, RECORD + 7), [1, 2, 3]),  # no group's number
        (lambda content: flipped(content, LAST + 1), [3]),
        (lambda content: content[RECORD:], [0]),
        (lambda content: b"\0" * len(content), [0, 1, 2, 3]),
        (lambda content: b"", [0, 1, 2, 3]),
        (lambda content: content + b"\xff" * 1000, []),
    ],
)
def test_damaged_records_are_computed_again(
    damage: Callable[[bytes], bytes],
    missing: list[int],
    ladder: tuple[Any, Any],
    tmp_path: Path,
    groups: Groups,
) -> None:
    whole = scored(sampler_of(ladder), tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert len(content) == LAST + 12 + 9 * 8
    file.write_bytes(damage(content))
    groups.numbers = []
    assert same_digits(scored(sampler_of(ladder), tmp_path), whole)
    assert groups.numbers == missing
    groups.numbers = []
    assert same_digits(scored(sampler_of(ladder), tmp_path), whole)
    assert groups.numbers == []  # the groups computed again are in another file


def test_each_scoring_has_its_own_progress_files(ladder: tuple[Any, Any], tmp_path: Path) -> None:
    """Each of two scorings in a folder removes its own files, and the last one the folder."""
    folder = tmp_path / ".progress"
    first, second = sampler_of(ladder), sampler_of(ladder, seed=1)
    tables = scored(first, folder, "a"), scored(second, folder, "b")
    assert not same_digits(*tables)
    ProgressFile(folder, "a", first).remove()
    assert ProgressFile(folder, "a", first).read() == {}
    assert list(ProgressFile(folder, "b", second).read()) == [0, 1, 2, 3]
    ProgressFile(folder, "b", second).remove()
    assert not folder.exists()


def test_groups_that_cannot_be_read_are_computed_again(
    ladder: tuple[Any, Any], tmp_path: Path, groups: Groups
) -> None:
    """Files that cannot be removed stay."""
    (tmp_path / "key.folder").mkdir()
    scored(sampler_of(ladder), tmp_path)
    assert groups.numbers == [0, 1, 2, 3]
    ProgressFile(tmp_path, "key", sampler_of(ladder)).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["key.folder"]


# --- The fingerprint ---


def key(ladder: tuple[Any, Any], code: str = "1", **changes: Any) -> str:
    return fingerprint(nn.ModuleList(ladder), sampler_of(ladder, **changes), {"code": code})


def test_the_same_scoring_has_the_same_fingerprint(ladder: tuple[Any, Any]) -> None:
    found = key(ladder)
    assert found == key(ladder)
    assert len(found) == 24
    assert found == key(ladder, index=torch.arange(7).flip(0))
    assert found == key(ladder, images=binary_images())


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "2"},
        {"seed": 1},
        {"samples": [1, 4]},
        {"samples": [3]},
        {"batch_size": 3},
        {"from_prior": 1},
        {"index": torch.arange(6)},
        {"index": torch.tensor([0, 1, 2, 3, 4, 5, 5])},
        {"images": binary_images(split="valid")},
        {"images": binary_images(name="others")},
        {"images": binary_images(seed=2)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_another_scoring_has_another_fingerprint(
    changes: dict[str, Any], ladder: tuple[Any, Any]
) -> None:
    assert key(ladder, **changes) != key(ladder)


def test_each_weight_is_part_of_the_fingerprint(ladder: tuple[Any, Any]) -> None:
    """By one unit in the last place."""
    before = key(ladder)
    for module in ladder:
        parameter = list(module.parameters())[-1]
        value = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1:].copy_(value.view(-1)[-1:].nextafter(torch.tensor(9.0)))
        assert key(ladder) != before
        with torch.no_grad():
            parameter.copy_(value)
    assert key(ladder) == before


def test_the_levels_of_images_are_part_of_the_fingerprint(ladder: tuple[Any, Any]) -> None:
    """By one level of one pixel."""
    levels = torch.randint(1, 200, (7, 4, 4, 1), dtype=torch.uint8)
    changed = levels.clone()
    changed[6, 3, 0, 0] += 1
    first, again, other = (
        key(ladder, images=ColourImages("made", "test", (1, 4, 4), stored))
        for stored in (levels, levels.clone(), changed)
    )
    assert first == again
    assert first != other


def test_images_binarized_at_each_reading_have_one_fingerprint(
    ladder: tuple[Any, Any],
) -> None:
    levels = torch.randint(1, 200, (7, 1, 4, 4), dtype=torch.uint8)
    first, again, other = (
        key(ladder, images=DynamicallyBinarizedImages("made", "test", (1, 4, 4), stored))
        for stored in (levels, levels.clone(), 255 - levels)
    )
    assert first == again
    assert first != other


# --- From the command line ---

# 60 groups of one image, three passes each.
OPTIONS = "--samples 1 24 --batch-size 8 --limit 60 --seed 3 --device cpu".split()
GROUPS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an untrained ladder."""
    path = tmp_path_factory.mktemp("scoring") / "run"
    small = {"z_dims": [2, 2], "downsample": [0, 1], "n_filters": 4}
    config = RunConfig.of(**(PRESETS["digits"] | small))
    stored = Run.create(path, config, (1, 8, 8), {})
    torch.manual_seed(0)
    module: Any = FreeBitsELBO()(*build_ladder(config.ladder, (1, 8, 8)))
    stored.save_checkpoint(1, weights_only(module.state_dict()))
    return path


def per_image(folder: Path) -> dict[str, np.ndarray]:
    """All columns of per_image.npz."""
    with np.load(folder / "per_image.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def uninterrupted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The results of one process without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    evaluate.main([str(run), *OPTIONS, "--out", str(folder)])
    return per_image(folder)


def assert_same_digits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values, equal_nan=True), name


def rank_environments(count: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [subprocess_environment(**address, RANK=str(i), LOCAL_RANK=str(i)) for i in range(count)]


def finished(folder: Path) -> list[int]:
    """The number of complete records in each progress file."""
    columns = 5 + len(curve_samples([1, 24])) + 2
    files = (folder / ".progress").glob("*")
    return [file.stat().st_size // (12 + 8 * columns) for file in files]


def test_a_killed_scoring_resumes(
    run: Path, uninterrupted: dict[str, np.ndarray], tmp_path: Path, groups: Groups
) -> None:
    """SIGKILL to both processes when each has finished a group; one process does the rest."""
    arguments = [str(run), *OPTIONS, "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
    deadline = time.monotonic() + 120
    with ExitStack() as stack:
        processes = []
        for variables in rank_environments(2):
            process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        while (done := finished(tmp_path)).count(0) or len(done) < 2:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {-signal.SIGKILL}
    assert [path.name for path in tmp_path.iterdir()] == [".progress"]
    done = finished(tmp_path)

    evaluate.main(arguments)
    assert len(groups.numbers) == GROUPS - sum(done)
    assert 0 < len(groups.numbers) < GROUPS
    assert_same_digits(per_image(tmp_path), uninterrupted)
    assert not (tmp_path / ".progress").exists()


def test_two_processes_of_torchrun_give_the_same_digits(
    run: Path, uninterrupted: dict[str, np.ndarray], tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc-per-node", "2", str(ROOT / "evaluate.py"), str(run), *OPTIONS]
    result = subprocess.run(
        [*launcher, *script, "--out", str(tmp_path)],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("negative bound") == 1  # one of them prints
    assert_same_digits(per_image(tmp_path), uninterrupted)
    assert not (tmp_path / ".progress").exists()


def on_full_disk(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[Path], bool]) -> None:
    """Write the new files that `is_full` selects to a device that is always full."""
    original: Any = Path.open

    def open_file(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "xb" and is_full(self):
            return original(Path("/dev/full"), "wb", *args, **kwargs)
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_file)


FEW: Sequence[str] = "--samples 1 --limit 8 --batch-size 2 --device cpu".split()


def test_a_full_disk_is_reported_on_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file has a final name then."""
    on_full_disk(monkeypatch, lambda path: path.parent.name == ".progress")
    out = tmp_path / "out"
    line = refusal(lambda: evaluate.main([str(run), *FEW, "--out", str(out)]))
    assert line.startswith(f"cannot write {out / '.progress'}")
    assert "No space left on device" in line
    assert [path for path in out.rglob("*") if path.is_file()] == []


def test_results_that_could_not_be_written_are_not_computed_again(
    run: Path, tmp_path: Path, groups: Groups
) -> None:
    """The progress file stays until everything is written."""
    arguments = [str(run), *FEW, "--out", str(tmp_path)]
    for name in ("bound.png", "metrics.json", "report.html"):
        with pytest.MonkeyPatch.context() as full:
            on_full_disk(full, lambda path, name=name: path.name.startswith(f".{name}."))  # type: ignore[misc]
            line = refusal(lambda: evaluate.main(arguments))
        assert name in line
        assert not (tmp_path / name).exists()
        assert (tmp_path / "metrics.json").exists() == (name == "report.html")
        assert not list(tmp_path.glob(".*.part"))
    evaluate.main(arguments)
    assert groups.numbers == [0, 1, 2, 3]  # each of them once
    assert (tmp_path / "metrics.json").exists()
    assert not (tmp_path / ".progress").exists()


def test_another_evaluation_does_not_resume_this_one(
    run: Path, tmp_path: Path, groups: Groups
) -> None:
    """The interrupted evaluation resumes with its own command."""
    arguments = [str(run), *FEW, "--out", str(tmp_path)]
    groups.interrupt_before = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments)
    groups.numbers, groups.interrupt_before = [], None
    evaluate.main([*arguments, "--seed", "4"])
    assert groups.numbers == [0, 1, 2, 3]
    assert len(list((tmp_path / ".progress").iterdir())) == 1
    groups.numbers = []
    evaluate.main([*arguments, "--overwrite"])
    assert groups.numbers == [2, 3]
    assert not (tmp_path / ".progress").exists()
