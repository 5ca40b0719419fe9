"""The estimates of benchmarks/parallel.py."""

from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from benchmarks.parallel import counted, gradient, part_of_the_noise
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.networks import LadderConfig
from ladder_vae.training.data_parallel import Replicas
from ladder_vae.training.svi import SVI
from runtime.distributed import Ranks
from tests.processes import in_processes

SHAPE = (1, 8, 10)


def test_bytes_and_multiply_adds_are_counted() -> None:
    """For the full-size network; a backward pass costs nearly as much as two forward passes."""
    with pyro.validation_enabled(False):  # there are no values to check
        found = counted("mnist-3")
    assert found["gradient_bytes"] == 4 * 3_209_153
    assert found["forward_multiply_adds"] == pytest.approx(521e6, rel=0.001)
    assert found["backward_multiply_adds"] == pytest.approx(2 * 521e6, rel=0.01)


def ladder() -> Any:
    config = LadderConfig(
        z_dims=[2, 3, 2], downsample=[0, 1, 1], blocks_per_layer=1, n_filters=4, dropout=0.0
    )
    torch.manual_seed(0)
    return FreeBitsELBO(0.3)(*build_ladder(config, SHAPE)).train()


@pytest.mark.usefixtures("own_folder")
def test_batch_normalisation_by_parts_is_what_processes_do() -> None:
    """The loop over the parts of a batch, compared with two processes."""
    x = torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(100)).round()
    found, loss = gradient(ladder(), x, 2)

    def work(ranks: Ranks) -> tuple[Tensor, Tensor]:
        loss_fn = ladder()
        parameters = [p for p in loss_fn.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(
            lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        )
        svi = SVI(loss_fn, optimizer)
        Replicas(loss_fn, ranks, torch.device("cpu")).attach(svi)
        with part_of_the_noise(12, ranks.rank, 2):
            value = svi.step(x.chunk(2)[ranks.rank])
        return gradients[0], value

    for other, value in in_processes(2, work):
        torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-5)
        assert value.item() == pytest.approx(loss, rel=1e-5)
