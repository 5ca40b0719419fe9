"""Training by several processes: the gradients, noise and metrics of one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.durability import same
from benchmarks.parallel import part_of_the_noise
from datasets import TrainingBatches
from datasets.images import ColourImages, DynamicallyBinarizedImages, ImageSet
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.evaluation.importance import importance_weighted_bounds
from ladder_vae.runs.options import RunConfig
from ladder_vae.training import data_parallel as parallel
from ladder_vae.training.data_parallel import Replicas, check_batch_size, synchronised
from ladder_vae.training.svi import SVI
from runtime.distributed import Ranks
from tests.processes import in_processes

CPU = torch.device("cpu")
SHAPE = (1, 8, 10)
pytestmark = pytest.mark.usefixtures("own_folder")


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
        replicas = Replicas(loss_fn, ranks, CPU)
        replicas.warm_up(images(9)[:6])
        replicas.attach(svi)
    losses = []
    for step in range(3):
        with part_of_the_noise(12, ranks.rank, ranks.size):
            losses.append(svi.step(images(step).chunk(ranks.size)[ranks.rank]))
    means = svi.sums.read()
    assert means is not None
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "means": [means.loss, means.log_likelihood, means.grad_norm, *means.kl],
        "buffers": list(loss_fn.buffers()),
    }


def test_two_processes_have_the_gradients_and_losses_of_one() -> None:
    """For the same batch and noise, without batch normalisation."""
    whole = three_steps(Ranks(), batchnorm=False)
    first, second = in_processes(2, lambda ranks: three_steps(ranks, batchnorm=False))
    assert same(first, second)  # bit for bit, so that the weights stay equal
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)
    norms = [torch.cat([g.flatten() for g in step]).norm() for step in whole["gradients"]]
    assert min(norms) > 1  # large compared to the tolerance


def halves(step: int) -> Iterator[tuple[Tensor, Ranks]]:
    for rank in range(2):
        yield images(step).chunk(2)[rank], Ranks(rank, 2)


def test_with_batch_normalisation_each_process_normalises_by_its_own_part() -> None:
    """Gradients and running statistics are the averages of those of the two halves."""
    (found, other) = in_processes(2, lambda ranks: three_steps(ranks, batchnorm=True))
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

    one, _ = in_processes(2, lambda ranks: first_statistics(ranks))
    for buffer, a, b in zip(one, *moved, strict=True):
        torch.testing.assert_close(buffer, (a + b) / 2 if a.is_floating_point() else a)


def first_statistics(ranks: Ranks) -> list[Tensor]:
    """Running statistics after one step."""
    loss_fn, svi, _ = ladder(batchnorm=True)
    Replicas(loss_fn, ranks, CPU).attach(svi)
    with part_of_the_noise(12, ranks.rank, 2):
        svi.step(images(0).chunk(2)[ranks.rank])
    return list(loss_fn.buffers())


def test_processes_start_with_the_same_weights_and_different_noise() -> None:
    """The warm-up pass changes neither weights nor statistics."""

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

    (weights, noise), (others, other_noise) = in_processes(2, work)
    expected = ladder(batchnorm=True)[0].state_dict()
    assert same(weights, expected)
    assert same(others, expected)
    assert not torch.equal(noise, other_noise)


def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all() -> None:
    def work(ranks: Ranks) -> Any:
        loss_fn, svi, gradients = ladder(batchnorm=True)
        Replicas(loss_fn, ranks, CPU).attach(svi)
        before = [tensor.clone() for tensor in loss_fn.state_dict().values()]
        x = images(0).chunk(3)[ranks.rank]
        svi.step(torch.full_like(x, torch.nan) if ranks.rank == 1 else x)
        assert same(before, list(loss_fn.state_dict().values()))
        assert gradients == []
        svi.step(x)
        return svi.guard.skipped, list(loss_fn.parameters())

    found = in_processes(3, work)
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
def test_the_parts_of_a_batch_make_up_the_batch(number: int) -> None:
    """Noise included, for any number of parts, in any epoch."""
    batches = TrainingBatches(image_sets()[number], 6, seed=3)
    for step in (0, 4):
        whole = batches(step)
        assert not torch.equal(whole, batches(step + 1))
        for parts in (1, 2, 3, 6):
            found = [batches.part(step, i, parts) for i in range(parts)]
            assert {len(part) for part in found} == {6 // parts}
            assert torch.equal(torch.cat(found), whole)


# --- Evaluations ---


def test_shared_evaluations_give_the_digits_of_one_process() -> None:
    loss_fn, _, _ = ladder(batchnorm=True)
    loss_fn.eval()
    some = ColourImages("some", "test", SHAPE, (images(0) * 255).byte().permute(0, 2, 3, 1))

    def work(ranks: Ranks) -> tuple[Tensor, list[int]]:
        reported: list[int] = []
        bounds = importance_weighted_bounds(
            *(loss_fn.model, loss_fn.guide, some, torch.arange(11), [1, 3]),
            batch_size=6,
            seed=1,
            ranks=ranks,
            on_images=reported.append,
        )
        return bounds.table(), reported

    alone, all_reported = work(Ranks())
    assert all_reported == [2, 2, 2, 2, 2, 1]
    shared = in_processes(4, work)
    assert [reported for _, reported in shared] == [[2, 2], [2, 1], [2, 0], [2, 0]]
    for table, _ in shared:
        assert torch.equal(table.nan_to_num(), alone.nan_to_num())


# --- Options ---


@pytest.mark.parametrize(
    ("size", "ranks", "advice"), [(64, 3, "use 63 or 66"), (2, 4, "use 4"), (7, 2, "use 6 or 8")]
)
def test_batches_must_be_shared_evenly(size: int, ranks: int, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"`batch_size` is {size}, which {ranks} .*; {advice}$"):
        check_batch_size(size, Ranks(0, ranks))
    check_batch_size(size * ranks, Ranks(0, ranks))


def test_synchronised_batch_normalisation_keeps_names_and_weights() -> None:
    """So checkpoints fit networks with and without it. (What it computes needs GPUs to test.)"""
    loss_fn, _, _ = ladder(batchnorm=True)
    before = {name: tensor.clone() for name, tensor in loss_fn.state_dict().items()}
    assert synchronised(loss_fn, Ranks(), CPU) is loss_fn
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in loss_fn.modules())
    converted = synchronised(loss_fn, Ranks(0, 2), torch.device("cuda"))
    kinds = {type(m) for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    assert same(dict(converted.state_dict()), before)
