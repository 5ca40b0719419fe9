"""Training by several processes: the same gradients as by one, and one run in all else.

Processes are forked off this one and joined by gloo, as torchrun does it; where torchrun itself is
what matters, it is run.
"""

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

import train_svi
from benchmarks.durability import (
    differences,
    finish,
    import_once,
    rank_environments,
    same,
    start_ranks,
    survive,
    untimed_entries,
)
from benchmarks.parallel import counted, gradient, part_of_the_noise
from datasets import TrainingBatches
from datasets.images import ColourImages, DynamicallyBinarizedImages, ImageSet
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.evaluation.importance import importance_weighted_bounds
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from ladder_vae.training import data_parallel as parallel
from ladder_vae.training.data_parallel import Clock, Replicas, check_batch, synchronised
from ladder_vae.training.schedule import learning_rate
from ladder_vae.training.signals import Interrupted, Interruption
from ladder_vae.training.svi import SVI
from runtime.distributed import Ranks, joined_ranks
from runtime.errors import UserError
from tests.commands import ROOT, refusal, subprocess_environment

CPU = torch.device("cpu")
SHAPE = (1, 8, 10)
LADDER = (
    "--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --batch-size 36 --dropout 0.2 "
    "--test-batch-size 80 --beta-anneal 5 --lr-warmup 3 --lr-decay none --ema 0.9 --device cpu "
    "--tr-log-interv 3 --ts-log-interv 4 --ll-interv 5 --ll-samples 2 --ll-images 20"
).split()
RESUME = ["--resume", "run", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """For all processes that are forked off this one."""
    import_once()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVAE_DATA", raising=False)


def in_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each of `count` ranks, which are processes of their own."""
    processes = []
    for rank, environment in enumerate(rank_environments(count)):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.environ.update(environment)
                pyro.enable_validation(False)  # as in training
                with joined_ranks() as ranks:
                    torch.save(work(ranks), f"result-{rank}")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        processes.append(process)
    assert [finish(process) for process in processes] == [0] * count
    return [torch.load(f"result-{rank}", weights_only=False) for rank in range(count)]


def train_on(count: int, *arguments: object) -> list[int]:
    """Train in `count` processes, with their output in `log`; returns their exit codes."""
    return [finish(process) for process in start_ranks(count, arguments, Path("log"))]


# --- The same gradients ---


def ladder(batchnorm: bool) -> tuple[Any, SVI, list[list[Tensor]]]:
    """An ELBO module, its SVI, and a list that the gradients of each step are added to."""
    config = RunConfig.of(
        z_dims=[2, 3, 2],
        downsample=[0, 1, 1],
        blocks_per_layer=1,
        n_filters=4,
        dropout=0.0,
        batchnorm=batchnorm,
        skip=True,
        learn_top_prior=True,
    )
    torch.manual_seed(0)
    loss_fn: Any = FreeBitsELBO(0.3)(*build_ladder(config.ladder, SHAPE)).train()
    parameters = list(loss_fn.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    gradients: list[list[Tensor]] = []

    def record(*_: Any) -> None:
        gradients.append([p.grad.clone() for p in parameters])

    optimizer.register_step_pre_hook(record)
    return loss_fn, SVI(loss_fn, optimizer), gradients


def images(step: int) -> Tensor:
    """Twelve binary images."""
    return torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(100 + step)).round()


def three_steps(ranks: Ranks, batchnorm: bool) -> dict[str, Any]:
    """Losses, gradients, logged means and running statistics of three steps."""
    loss_fn, svi, gradients = ladder(batchnorm)
    if ranks.size > 1:
        svi.replicas = Replicas(loss_fn, ranks, CPU)
        svi.replicas.warm_up(images(9)[:6])
    losses = []
    for step in range(3):
        with part_of_the_noise(12, ranks.rank, ranks.size):
            losses.append(svi.step(images(step).chunk(ranks.size)[ranks.rank]))
    means = svi.read()
    assert means is not None
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "means": [means.loss, means.log_likelihood, means.grad_norm, *means.kl],
        "buffers": list(loss_fn.buffers()),
    }


def test_two_ranks_have_the_gradients_and_losses_of_one_process() -> None:
    """At the same batch, with the same noise, without batch normalisation."""
    whole = three_steps(Ranks(), batchnorm=False)
    first, second = in_ranks(2, lambda ranks: three_steps(ranks, batchnorm=False))
    assert same(first, second)  # to the bit, so that weights stay the same
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)
    norms = [torch.cat([g.flatten() for g in step]).norm() for step in whole["gradients"]]
    assert min(norms) > 1  # so that the tolerance means something


def halves(step: int) -> Iterator[tuple[Tensor, Ranks]]:
    for rank in range(2):
        yield images(step).chunk(2)[rank], Ranks(rank, 2)


def test_with_batch_normalisation_each_rank_normalises_by_its_own_part() -> None:
    """Gradients are those of both halves by themselves, averaged; and not those of the whole.

    Running statistics are the averages of the halves' too.
    """
    (found, other) = in_ranks(2, lambda ranks: three_steps(ranks, batchnorm=True))
    assert same(found, other)
    whole = three_steps(Ranks(), batchnorm=True)
    loss_fn, _, _ = ladder(batchnorm=True)
    before = [buffer.clone() for buffer in loss_fn.buffers()]
    losses, moved = [], []
    for x, ranks in halves(0):
        with part_of_the_noise(12, ranks.rank, 2):
            loss = loss_fn(x) / len(x)
        (loss / 2).backward()  # gradients add up
        losses.append(loss.detach())
        moved.append([buffer.clone() for buffer in loss_fn.buffers()])
        for buffer, old in zip(loss_fn.buffers(), before, strict=True):
            buffer.copy_(old)
    gradients = [p.grad for p in loss_fn.parameters()]
    torch.testing.assert_close(found["losses"][0], torch.stack(losses).mean())
    torch.testing.assert_close(found["gradients"][0], gradients, rtol=1e-4, atol=1e-5)
    flat = [torch.cat([g.flatten() for g in step]) for step in (gradients, whole["gradients"][0])]
    assert (flat[0] - flat[1]).norm() / flat[1].norm() > 0.01

    one, _ = in_ranks(2, lambda ranks: first_statistics(ranks))
    for buffer, a, b in zip(one, *moved, strict=True):
        torch.testing.assert_close(buffer, (a + b) / 2 if a.is_floating_point() else a)


def first_statistics(ranks: Ranks) -> list[Tensor]:
    """Running statistics after one step."""
    loss_fn, svi, _ = ladder(batchnorm=True)
    svi.replicas = Replicas(loss_fn, ranks, CPU)
    with part_of_the_noise(12, ranks.rank, 2):
        svi.step(images(0).chunk(2)[ranks.rank])
    return list(loss_fn.buffers())


def test_ranks_begin_with_the_first_one_s_weights_and_with_other_noise() -> None:
    """And a first pass that lays out messages leaves nothing behind."""

    def work(ranks: Ranks) -> Any:
        loss_fn, _, _ = ladder(batchnorm=True)
        with torch.no_grad():
            next(loss_fn.parameters()).add_(ranks.rank)
        parallel.seed_noise(ranks, 1, 2)
        random = torch.get_rng_state()
        replicas = Replicas(loss_fn, ranks, CPU)
        buffers = [buffer.clone() for buffer in loss_fn.buffers()]
        replicas.warm_up(images(0)[:6])
        assert same(buffers, list(loss_fn.buffers()))
        assert all(p.grad is None for p in loss_fn.parameters())
        assert torch.equal(random, torch.get_rng_state())
        return loss_fn.state_dict(), torch.rand(3)

    (weights, noise), (others, other_noise) = in_ranks(2, work)
    expected = ladder(batchnorm=True)[0].state_dict()
    assert same(weights, expected)
    assert same(others, expected)
    assert not torch.equal(noise, other_noise)


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all() -> None:
    def work(ranks: Ranks) -> Any:
        loss_fn, svi, gradients = ladder(batchnorm=True)
        svi.replicas = Replicas(loss_fn, ranks, CPU)
        before = [tensor.clone() for tensor in loss_fn.state_dict().values()]
        x = images(0).chunk(3)[ranks.rank]
        svi.step(torch.full_like(x, torch.nan) if ranks.rank == 1 else x)
        assert same(before, list(loss_fn.state_dict().values()))
        assert gradients == []
        svi.step(x)
        return svi.guard.skipped, list(loss_fn.parameters())

    found = in_ranks(3, work)
    assert [skipped for skipped, _ in found] == [1, 1, 1]
    assert same(found[0][1], found[1][1])
    assert same(found[0][1], found[2][1])


# --- Data ---


def image_sets() -> list[ImageSet]:
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8))
    grey = levels[..., :1].permute(0, 3, 1, 2).contiguous()
    return [
        ColourImages("colour", "train", (3, 4, 4), levels),
        DynamicallyBinarizedImages("grey", "train", (1, 4, 4), grey),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_parts_of_a_batch_make_it_up(number: int) -> None:
    """Their noise too; whatever the number of parts, in steps of any epoch."""
    batches = TrainingBatches(image_sets()[number], 6, seed=3)
    for step in (0, 4):
        whole = batches(step)
        assert not torch.equal(whole, batches(step + 1))
        for parts in (1, 2, 3, 6):
            found = [batches.part(step, i, parts) for i in range(parts)]
            assert {len(part) for part in found} == {6 // parts}
            assert torch.equal(torch.cat(found), whole)


def test_one_rank_makes_a_file_and_the_others_find_it() -> None:
    """On two machines with a folder each: of three ranks the last is on the second machine."""

    def work(ranks: Ranks) -> tuple[str, float]:
        machine = Path("b" if ranks.rank == 2 else "a")
        ranks = replace(ranks, local_rank=0 if ranks.rank == 2 else ranks.rank)

        def make() -> str:
            if (machine / "data").exists():
                return "found"
            time.sleep(0.1)
            machine.mkdir()
            (machine / "data").touch()
            return "made"

        return ranks.in_turns(make), time.monotonic()

    assert [found for found, _ in in_ranks(3, work)] == ["made", "found", "made"]


@pytest.mark.parametrize("where", [0, 1])
def test_what_one_rank_cannot_do_is_refused_on_all(where: int) -> None:
    def work(ranks: Ranks) -> str:
        def make() -> None:
            if ranks.rank == where:
                raise UserError(f"rank {ranks.rank} has no data")

        with pytest.raises(UserError) as refused:
            ranks.in_turns(make)
        return str(refused.value)

    assert in_ranks(2, work) == [f"rank {where} has no data"] * 2


# --- Decisions ---


def test_time_is_the_first_rank_s_and_signals_are_everybody_s() -> None:
    """Time stands still in between, so that all see the same one."""

    def work(ranks: Ranks) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: 100.0 if ranks.is_first else 7.0)
            clock = Clock(ranks)
            seen: list[Any] = [clock.now]
            patch.setattr(time, "monotonic", lambda: 150.0 if ranks.is_first else 999.0)
            seen.append(clock.now)
            seen.append(clock.agree(signal.SIGTERM if ranks.rank == 1 else 0))
        return [*seen, clock.now]

    assert in_ranks(2, work) == [[100.0, 100.0, signal.SIGTERM, 150.0]] * 2


def test_a_signal_counts_once_it_is_agreed_on_and_twice_at_once_is_once() -> None:
    """torchrun passes on a signal that all processes have got already."""
    with Interruption(lambda number: number) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        interruption.check()
        interruption.agree()
        with pytest.raises(Interrupted):
            interruption.check()
    assert interruption.signal == signal.SIGTERM


def test_evaluations_are_shared_and_have_the_digits_of_one_process() -> None:
    loss_fn, _, _ = ladder(batchnorm=True)
    loss_fn.eval()
    some = ColourImages("some", "test", SHAPE, (images(0) * 255).byte().permute(0, 2, 3, 1))

    def work(ranks: Ranks) -> tuple[Tensor, list[int]]:
        told: list[int] = []
        bounds = importance_weighted_bounds(
            *(loss_fn.model, loss_fn.guide, some, torch.arange(11), [1, 3]),
            batch_size=6,
            seed=1,
            ranks=ranks,
            on_images=told.append,
        )
        return bounds.table(), told

    alone, all_told = work(Ranks())
    assert all_told == [2, 2, 2, 2, 2, 1]
    shared = in_ranks(4, work)
    assert [told for _, told in shared] == [[2, 2], [2, 1], [2, 0], [2, 0]]
    for table, _ in shared:
        assert torch.equal(table.nan_to_num(), alone.nan_to_num())


# --- Runs ---


def test_one_run_is_kept_and_told_of_once() -> None:
    """Entries, pictures, checkpoints and lines as of one process; only the noise is another."""
    assert train_on(1, *LADDER, "--steps", 10, "--out", "alone") == [0]
    Path("log").unlink()
    assert train_on(2, *LADDER, "--steps", 10, "--out", "run") == [0, 0]
    files = [
        Counter(re.sub(r"tfevents.*", "tfevents", str(p.relative_to(f))) for p in f.rglob("*"))
        for f in (Path("alone"), Path("run"))
    ]
    assert files[1] == files[0]
    shared, alone = untimed_entries(Path("run")), untimed_entries(Path("alone"))
    assert [entry.keys() for entry in shared] == [entry.keys() for entry in alone]
    assert [entry["step"] for entry in shared] == [3, 4, 5, 6, 8, 9, 10, 10]
    lines = Path("log").read_text().splitlines()
    assert [line for line, count in Counter(lines).items() if count > 1] == []
    assert sum(line.startswith("step 3: ELBO") for line in lines) == 1
    assert "on 2 x cpu" in lines[0]
    assert Run.open(Path("run")).provenance["machine"].startswith("2 x ")
    # Means of the log are the batch's: the first step's noise and its weights differ little.
    for name in ("train/reconstruction", "train/learning_rate"):
        assert shared[0][name] == pytest.approx(alone[0][name], rel=0.05)


def test_with_data_dependent_initialisation_ranks_begin_where_one_process_does() -> None:
    """It looks at the whole first batch."""
    arguments = train_svi.parse_arguments([*LADDER, "--data-dep-init", "--dry-run"])

    def work(ranks: Ranks) -> dict[str, Tensor]:
        training, _ = train_svi.prepare(arguments, ranks)
        return training.loss_fn.state_dict()

    alone = work(Ranks())
    assert all(same(weights, alone) for weights in in_ranks(3, work))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_of_two_whose_one_is_ended_at_random_moments_comes_out_the_same(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Bitwise; the other one ends by itself. benchmarks/durability.py does it twenty times."""
    found = survive(tmp_path, 3, number, seed=2, ranks=2)
    assert found.ended == 3
    assert found.differences == []
    lines = Path("log").read_text().splitlines()
    assert not any("Traceback" in line for line in lines)
    if number == signal.SIGKILL:
        said = [line for line in lines if line.startswith("error")]
        assert said
        assert set(said) == {
            "error: one of 2 processes has died; --resume goes on from the newest checkpoint"
        }


def test_three_ranks_resume_to_the_bit() -> None:
    """Where the order of summation counts."""
    assert train_on(3, *LADDER, "--steps", 8, "--out", "whole") == [0, 0, 0]
    assert train_on(3, *LADDER, "--steps", 8, "--ckpt-interv", 5, "--out", "run") == [0, 0, 0]
    Path("run/checkpoints/8.pt").unlink()
    assert train_on(3, *RESUME) == [0, 0, 0]
    assert differences(Path("whole"), Path("run")) == []


def test_checkpoints_move_between_numbers_of_processes() -> None:
    """One, two, one, three; noise is that of the number of ranks, all else goes on."""
    states: list[dict[str, Any]] = []
    for count, steps in ((1, 3), (2, 6), (1, 9), (3, 12)):
        how = RESUME if states else [*LADDER, "--out", "run"]
        assert train_on(count, *how, "--steps", steps) == [0] * count
        states.append(Run.open(Path("run")).load_checkpoint(steps, CPU))
    assert [len(state.get("ranks", [])) for state in states] == [0, 2, 0, 3]
    entries = untimed_entries(Path("run"))
    assert [e["step"] for e in entries if "train/loss" in e] == [3, 6, 9, 12]
    assert [e["step"] for e in entries if "test/negative_elbo" in e] == [3, 4, 6, 8, 9, 12]
    assert [int(state["average"]["updates"]) for state in states] == [3, 6, 9, 12]


def test_a_resumed_run_of_another_size_draws_the_same_noise_each_time() -> None:
    """From the seed, the step and the rank."""
    assert train_on(2, *LADDER, "--steps", 3, "--out", "run") == [0, 0]
    state = Run.open(Path("run")).load_checkpoint(3, CPU)

    def noise(ranks: Ranks, seed: int = 42) -> Tensor:
        parallel.restore_random_state(state, ranks, CPU, seed)
        return torch.rand(2)

    found = [noise(Ranks(rank, 3)) for rank in (0, 1, 2)]
    assert torch.equal(found[1], noise(Ranks(1, 3)))
    assert len({tuple(value.tolist()) for value in found}) == 3
    assert not torch.equal(found[1], noise(Ranks(1, 3), seed=43))
    kept = [noise(Ranks(rank, 2)) for rank in (0, 1)]
    torch.set_rng_state(state["ranks"][1]["cpu_random_state"])
    assert torch.equal(kept[1], torch.rand(2))
    assert not torch.equal(*kept)


def test_all_ranks_end_by_the_first_one_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, the schedule and the end follow it; the others' clocks run anyhow."""
    ticks = iter(range(100))

    class Time:
        @staticmethod
        def monotonic() -> float:  # a tenth of a minute later each time, on the first rank
            return next(ticks) * 6.0 if os.environ["RANK"] == "0" else -1e9 * next(ticks)

    monkeypatch.setattr(parallel, "time", Time)
    options = "--max-minutes 0.95 --lr-decay cosine --ckpt-interv 0 --checkpoint-minutes 0.25 "
    options += "--ts-log-interv 20 --ll-interv 0 --tr-log-interv 1 --keep-checkpoints 9 --out run"
    assert train_on(2, *LADDER, *options.split()) == [0, 0], Path("log").read_text()
    run = Run.open(Path("run"))
    assert run.checkpoint_steps() == [3, 6, 9, 10]
    rates = [e["train/learning_rate"] for e in untimed_entries(run.path) if "train/loss" in e]
    expected = [learning_rate(run.config, step, step * 0.1 / 0.95) for step in range(10)]
    assert rates == pytest.approx(expected)


# --- The benchmark's counts ---


def test_bytes_and_multiply_adds_are_counted() -> None:
    """Those of the reference's full-size network; a backward pass is nearly two forward ones."""
    with pyro.validation_enabled(False):  # there are no values to look at
        found = counted("mnist-3")
    assert found["gradient_bytes"] == 4 * 3_209_153
    assert found["forward_multiply_adds"] == pytest.approx(521e6, rel=0.001)
    assert found["backward_multiply_adds"] == pytest.approx(2 * 521e6, rel=0.01)


def test_batch_normalisation_by_parts_is_what_ranks_do() -> None:
    """The benchmark's loop over parts, against two ranks."""
    loss_fn, _, _ = ladder(batchnorm=True)
    found, loss = gradient(loss_fn, images(0), 2)

    def work(ranks: Ranks) -> tuple[Tensor, Tensor]:
        loss_fn, svi, gradients = ladder(batchnorm=True)
        svi.replicas = Replicas(loss_fn, ranks, CPU)
        with part_of_the_noise(12, ranks.rank, 2):
            value = svi.step(images(0).chunk(2)[ranks.rank])
        return torch.cat([g.flatten() for g in gradients[0]]), value

    for other, value in in_ranks(2, work):
        torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-5)
        assert value.item() == pytest.approx(loss, rel=1e-5)


# --- torchrun ---


def torchrun(*arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*launcher, *map(str, arguments)]


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_torchrun_starts_a_run_again_where_it_was() -> None:
    """One rank is killed; the next attempt goes on from the newest checkpoint, to the bit."""
    options = "--ckpt-interv 5 --steps 60 --ts-log-interv 0 --ll-interv 0".split()
    script = [ROOT / "train_svi.py", *LADDER, *options]
    command = torchrun("--max-restarts", 1, *script, "--out", "run")
    environment = subprocess_environment()
    with (
        Path("torchrun.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as launcher,
    ):
        deadline = time.monotonic() + 120
        while not list(Path("run/checkpoints").glob("*.pt")):
            assert launcher.poll() is None, Path("torchrun.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(children(launcher.pid)[1], signal.SIGKILL)
        assert launcher.wait(120) == 0, Path("torchrun.log").read_text()
    said = Path("torchrun.log").read_text().splitlines()
    assert sum(line.startswith("run folder run") for line in said) == 2
    assert sum(line.startswith("error: one of 2 processes has died") for line in said) <= 1
    assert not any("Traceback" in line for line in said)
    assert train_on(2, *LADDER, *options, "--out", "whole") == [0, 0]
    assert differences(Path("whole"), Path("run")) == []


def test_torchrun_s_mistakes_are_refused_in_one_line() -> None:
    """By one of the processes; what torchrun says beside it is its own."""
    script = [ROOT / "train_svi.py", *LADDER, "--steps", 1, "--out", "run"]
    command = torchrun(*script, "--batch-size", 5)
    done = subprocess.run(
        command, env=subprocess_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    own = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert own == ["error: --batch-size is 5, which 2 processes cannot share evenly; give 4 or 6"]
    assert done.stdout == ""
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("size", "ranks", "advice"), [(64, 3, "give 63 or 66"), (2, 4, "give 4"), (7, 2, "give 6 or 8")]
)
def test_a_batch_that_cannot_be_shared_evenly_is_refused(
    size: int, ranks: int, advice: str
) -> None:
    with pytest.raises(UserError, match=rf"--batch-size is {size}, which {ranks} .*; {advice}$"):
        check_batch(size, Ranks(0, ranks))
    check_batch(size * ranks, Ranks(0, ranks))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sync-bn"], "--sync-bn needs GPUs"),
        (["--device", "cuda:1"], "--device is cuda:1 for 2 processes, which need a GPU each"),
        (["--batch-size", "2", "--downsample", "1", "1"], None),
        (["--downsample", "1", "2", "--blocks-per-layer", "2", "--batch-size", "2"], "1x1"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_options_that_do_not_suit_several_ranks_are_refused(
    options: Sequence[str], said: str | None
) -> None:
    codes = train_on(2, *LADDER, "--steps", 1, *options, "--out", "run")
    lines = [x for x in Path("log").read_text().splitlines() if x.startswith("error")]
    if said is None:
        assert codes == [0, 0], lines
        return
    assert codes == [2, 2]
    assert len(lines) == 1
    assert said in lines[0]
    assert not Path("run").exists()


def test_synchronised_batch_normalisation_needs_several_processes() -> None:
    assert "this is one" in refusal(train_svi.main, *LADDER, "--sync-bn", "--out", "run")
    with pytest.raises(UserError, match="--sync-bn does nothing with --no-bn"):
        RunConfig.of(sync_bn=True, batchnorm=False)
    assert not Path("run").exists()


def test_synchronised_batch_normalisation_keeps_names_and_weights() -> None:
    """What it computes is for a GPU to show; its checkpoints are those of every other network."""
    loss_fn, _, _ = ladder(batchnorm=True)
    before = {name: tensor.clone() for name, tensor in loss_fn.state_dict().items()}
    assert synchronised(loss_fn, Ranks(), CPU) is loss_fn
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in loss_fn.modules())
    converted = synchronised(loss_fn, Ranks(0, 2), torch.device("cuda"))
    kinds = {type(m) for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    assert same(dict(converted.state_dict()), before)


def test_a_run_with_synchronised_batch_normalisation_goes_on_in_one_process() -> None:
    """Where it has the whole batch anyway."""
    assert train_on(1, *LADDER, "--steps", 2, "--out", "run") == [0]
    run = Run.open(Path("run"))
    replace(run, config=replace(run.config, sync_bn=True)).write_config()
    assert train_on(1, *RESUME, "--steps", 4) == [0]
    assert train_on(1, *LADDER, "--steps", 4, "--out", "whole") == [0]
    assert {"metrics.jsonl", "log"} >= set(differences(Path("whole"), Path("run")))


def restarted(monkeypatch: pytest.MonkeyPatch, attempt: int, name: str) -> None:
    """As torchrun --max-restarts 2 tells its processes."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)


def test_restarts_need_a_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    restarted(monkeypatch, 0, "a")
    said = refusal(train_svi.main, *LADDER, "--steps", 1)
    assert "--max-restarts needs a run folder to go on in: give --out RUN" in said
    assert not Path("runs").exists()


def test_another_attempt_goes_on_with_its_own_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was there before is refused in every attempt; a finished one is left as it is."""
    command = [*LADDER, "--steps", "2", "--out", "run"]
    restarted(monkeypatch, 0, "a")
    assert train_svi.main(command) == 0
    entries = untimed_entries(Path("run"))
    for attempt in (0, 1):
        restarted(monkeypatch, attempt, "b")
        assert "run holds another run" in refusal(train_svi.main, *command)
    restarted(monkeypatch, 1, "a")
    assert train_svi.main(command) == 0
    assert untimed_entries(Path("run")) == entries
    Path("run/checkpoints/2.pt").unlink()
    restarted(monkeypatch, 2, "a")
    assert train_svi.main(command) == 0
    assert untimed_entries(Path("run")) == entries


def test_machines_that_are_listed_by_hand_have_no_name_but_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun gives them all the name "none"."""
    command = [*LADDER, "--steps", "1", "--out", "run"]
    for folder, attempt in (("x", 0), ("x", 1), ("y", 1)):
        restarted(monkeypatch, attempt, "none")
        error = f"/tmp/torchelastic_1/none_{folder}/attempt_{attempt}/0/error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error)
        if folder == "x":
            assert train_svi.main(command) == 0
        else:
            assert "run holds another run" in refusal(train_svi.main, *command)
