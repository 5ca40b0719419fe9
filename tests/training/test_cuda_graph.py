"""A recorded training step, simulated on the CPU.

A CUDA graph replays the kernels of a step on the memory that they were recorded with, and nothing
else. The simulation records the operations of one step with the tensors that they read and wrote,
and repeats them. If a number comes from the host, or a tensor is replaced instead of changed in
place, the following steps differ.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elbo import FreeBitsELBO, ImportanceWeightedELBO
from guide import build_ladder
from ladder_vae.networks import LadderConfig
from ladder_vae.training.cuda_graph import CudaRecorder, StepGraph
from ladder_vae.training.device_step import DeviceSVI
from ladder_vae.training.moving_average import MovingAverage
from ladder_vae.training.svi import SVI

HAS_GPU = torch.cuda.is_available()


class Recording(TorchDispatchMode):
    """The operations of what runs inside, to be repeated on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # A view, or what is changed in place, is where it was.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class Rehearsal(CudaRecorder):
    """Records steps on the CPU; `changed` returns the tensors that a step changes.

    While a GPU records a step, they do not change.
    """

    def __init__(self, changed: Callable[[], list[Tensor]] = list) -> None:
        super().__init__()
        self.changed = changed
        self.recordings: list[Recording] = []

    def warm_up(self, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return step(x)

    def record(
        self, step: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Callable[[], object], Tensor]:
        tensors, noise = self.changed(), torch.get_rng_state()
        before = [tensor.detach().clone() for tensor in tensors]
        with Recording() as recording:
            result = step(x)
        for tensor, value in zip(tensors, before, strict=True):
            tensor.detach().copy_(value)
        torch.set_rng_state(noise)
        self.recordings.append(recording)
        return recording.replay, result


def make_svi(recorder: CudaRecorder | None = None) -> DeviceSVI:
    torch.manual_seed(0)
    config = LadderConfig(
        z_dims=[2, 3], downsample=[0, 1], n_filters=4, blocks_per_layer=1, dropout=0.3,
        skip=True, gated=True, learn_top_prior=True, initial_downscaling=False,
    )  # fmt: skip
    loss_fn: Any = FreeBitsELBO(0.5)(*build_ladder(config, (1, 8, 8)))
    optimizer = torch.optim.Adamax(loss_fn.parameters(), lr=1e-3, weight_decay=1e-3)
    average = MovingAverage(loss_fn, 0.9)
    return DeviceSVI(
        loss_fn, optimizer, recorder=recorder, clip_norm=50.0, skip_norm=1e6, average=average
    )


def images(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.rand((6, 1, 8, 8), generator=generator).round()
    return x * torch.nan if step == 9 else x


def tensors(svi: SVI) -> list[Tensor]:
    """All tensors that a step changes."""
    assert svi.average is not None
    state = [value for entry in svi.optimizer.state.values() for value in entry.values()]
    guard = [value for value in vars(svi.guard).values() if isinstance(value, Tensor)]
    kept = [*svi.loss_fn.parameters(), *svi.loss_fn.buffers(), *svi.average.module.parameters()]
    totals = [] if svi.sums.totals is None else [svi.sums.totals]
    return [*kept, *svi.average.module.buffers(), svi.average.updates, *state, *guard, *totals]


def take_steps(svi: SVI, first: int, last: int) -> list[Tensor]:
    losses = []
    with pyro.validation_enabled(False):
        for step in range(first, last):
            svi.schedule(learning_rate=1e-2 / (step + 1), kl_weight=min(1.0, step / 8))
            losses.append(svi.step(images(step)).clone())
    return losses


@pytest.mark.usefixtures("adamax_anywhere")
def test_a_recorded_step_goes_the_way_of_one_that_is_not() -> None:
    """Bit for bit, with new noise, learning rate and KL weight at each step, and a skipped step."""
    rehearsal = Rehearsal()
    plain, recorded = make_svi(), make_svi(rehearsal)
    torch.manual_seed(1)
    losses = take_steps(plain, 0, 14)
    rehearsal.changed = lambda: tensors(recorded)
    torch.manual_seed(1)
    found = take_steps(recorded, 0, 14)
    assert len(rehearsal.recordings) == 1
    torch.testing.assert_close(found, losses, rtol=0, atol=0, equal_nan=True)
    assert len({loss.item() for loss in found}) == 14
    for ours, theirs in zip(tensors(recorded), tensors(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert recorded.sums.read() == plain.sums.read()
    assert recorded.guard.skipped == 1


@pytest.mark.usefixtures("adamax_anywhere")
def test_another_objective_is_recorded_anew() -> None:
    """The graph holds the old objective, and the KL weight belongs to it."""
    rehearsal = Rehearsal()
    plain, recorded = make_svi(), make_svi(rehearsal)
    rehearsal.changed = lambda: tensors(recorded)
    for svi in (plain, recorded):
        torch.manual_seed(1)
        take_steps(svi, 0, 8)
        svi.maximise(ImportanceWeightedELBO(2))
        take_steps(svi, 8, 16)
    assert len(rehearsal.recordings) == 2
    for ours, theirs in zip(tensors(recorded), tensors(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("adamax_anywhere")
def test_nothing_in_a_step_asks_for_a_number() -> None:
    """On a GPU the host would wait for it, and a graph cannot be recorded."""
    svi = make_svi()
    take_steps(svi, 0, 2)
    with Recording() as recording:
        take_steps(svi, 2, 4)
    asked = {str(func) for func, *_ in recording.calls} & {
        "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default",
        "aten.is_nonzero.default", "aten.masked_select.default",
    }  # fmt: skip
    assert asked == set()
    with Recording() as recording:  # which would notice
        assert svi.guard.skipped == 0
    assert "aten._local_scalar_dense.default" in {str(func) for func, *_ in recording.calls}


@pytest.mark.usefixtures("adamax_anywhere")
def test_the_state_moves_to_a_host_that_decides_and_back() -> None:
    """Checkpoints of a GPU are read on a CPU, and those of a CPU on a GPU."""
    svi = make_svi()
    take_steps(svi, 0, 3)
    state = svi.state_dict()
    assert all(type(group["lr"]) is float for group in state["optimizer"]["param_groups"])
    loss_fn = make_svi().loss_fn
    loss_fn.elbo.kl_weight = 1.0
    host = SVI(loss_fn, torch.optim.Adamax(loss_fn.parameters(), lr=1e-3))
    host.load_state_dict(state)
    (group,) = host.optimizer.param_groups
    assert not group["capturable"]
    host.schedule(0.25, 1.0)
    assert group["lr"] == 0.25
    again = make_svi()
    again.load_state_dict(host.state_dict())
    again.schedule(0.25, 0.5)
    (group,) = again.optimizer.param_groups
    assert group["capturable"]
    assert group["lr"].item() == 0.25
    assert float(again.elbo.kl_weight) == 0.5
    assert again.sums.peek() == host.sums.peek() == svi.sums.peek()


class Refusal(Rehearsal):
    """Fails as a GPU does, after running through the step."""

    def record(
        self, step: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Callable[[], object], Tensor]:
        super().record(step, x)
        raise RuntimeError("CUDA error: operation not permitted\nCompile with a flag.")


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line says why, once."""
    seen: list[float] = []

    def step(x: Tensor) -> Tensor:
        seen.append(x.item())
        return x + 1

    graph = StepGraph(step, Refusal())
    assert [graph(torch.tensor(float(i))).item() for i in range(8)] == [*range(1, 9)]
    assert seen == [0, 1, 2, 3, 4, 5, 5, 6, 7]  # the sixth was tried, and nothing done on a GPU
    assert capsys.readouterr().err == (
        "warning: cannot record the step as a CUDA graph (CUDA error: operation not permitted); "
        "training continues without\n"
    )


def test_a_batch_of_another_size_is_not_replayed() -> None:
    graph = StepGraph(lambda x: x.sum(), Rehearsal())
    results = [graph(torch.full((n,), 2.0)).item() for n in (4, 4, 4, 4, 4, 4, 3, 4)]
    assert results == [8, 8, 8, 8, 8, 8, 6, 8]


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_on_a_gpu_replays_follow_the_steps_and_wait_for_nothing() -> None:
    """The same weights but for rounding, and no synchronisation of host and device."""
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        config = LadderConfig(z_dims=[2, 3], downsample=[0, 1], n_filters=8, dropout=0.0, skip=True)
        loss_fn: Any = FreeBitsELBO(0.5, analytic_kl=True)(*build_ladder(config, (1, 28, 28)))
        loss_fn = loss_fn.cuda()
        optimizer = torch.optim.Adamax(loss_fn.parameters(), lr=1e-3)
        svi = DeviceSVI(
            loss_fn,
            optimizer,
            recorder=CudaRecorder() if recorded else None,
            average=MovingAverage(loss_fn, 0.9),
        )
        x = torch.rand(8, 1, 28, 28, device="cuda").round()
        torch.manual_seed(1)
        with pyro.validation_enabled(False):
            for step in range(20):
                svi.schedule(1e-3 / (step + 1), 1.0)
                torch.cuda.set_sync_debug_mode("error" if step > 6 else "default")
                svi.step(x)
        torch.cuda.set_sync_debug_mode("default")
        means = svi.sums.read()
        assert means is not None
        found.append(means.loss)
    assert found[0] == pytest.approx(found[1], rel=0.05)  # their noise is not the same
