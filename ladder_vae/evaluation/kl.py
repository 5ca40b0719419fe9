"""Terms of the ELBO by layer, from the traces of a guide's last pass.

Layers are listed from the bottom. Put model and guide in evaluation mode first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ladder_vae.evaluation.interfaces import Guide, Images

# A latent channel is active if its KL, averaged over images, exceeds this many nats.
ACTIVE_KL = 0.01


class Layer(NamedTuple):
    """One stochastic layer in the guide's last pass over N images."""

    posterior: Any  # q(z_i | z_{>i}, x), batch shape (N,), event shape (Z, h, w)
    prior: Any  # p(z_i | z_{>i})
    z: Tensor  # (N, Z, h, w), drawn from the posterior


def layers(guide: Guide) -> list[Layer]:
    """The stochastic layers of the guide's last pass, bottom to top."""
    model_trace, guide_trace = guide.get_traces()
    names = reversed(guide_trace.stochastic_nodes)  # sampled from the top
    return [
        Layer(guide_trace.nodes[n]["fn"], model_trace.nodes[n]["fn"], guide_trace.nodes[n]["value"])
        for n in names
    ]


def sampled_terms(guide: Guide) -> tuple[Tensor, Tensor]:
    """log p(x | z) (N,) and the one-sample KL (N, L) of the guide's last pass, in nats.

    log p(x | z) minus the KL summed over layers is the log importance weight.
    """
    model_trace, _ = guide.get_traces()
    x = model_trace.nodes["x"]
    log_likelihood = x["fn"].log_prob(x["value"])
    kl = [posterior.log_prob(z) - prior.log_prob(z) for posterior, prior, z in layers(guide)]
    return log_likelihood, torch.stack(kl, -1)


@torch.no_grad()
def mean_kl(guide: Guide, images: Images, index: Tensor, batch_size: int) -> list[Tensor]:
    """The KL in closed form given z_{>i}, averaged over the images at `index`.

    Returns (Z, h, w) for each layer, bottom to top, in nats per image, on the CPU.
    """
    totals: list[Tensor] = []
    for part in index.split(batch_size):
        guide(images.batch(part.to(images.index_device)))
        sums = [
            kl_divergence(layer.posterior.base_dist, layer.prior.base_dist).sum(0)
            for layer in layers(guide)
        ]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [(total / len(index)).cpu() for total in totals]


def by_channel(kl: list[Tensor]) -> list[Tensor]:
    """The result of `mean_kl` summed over positions: (Z,) for each layer."""
    return [layer.sum((1, 2)) for layer in kl]


def by_position(kl: list[Tensor]) -> list[Tensor]:
    """The result of `mean_kl` summed over channels: (h, w) for each layer."""
    return [layer.sum(0) for layer in kl]
