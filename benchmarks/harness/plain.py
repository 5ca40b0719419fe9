"""A training step in plain PyTorch: a loop over the ladder's modules, without Pyro.

The networks are those of model.py and guide.py. The loop does without everything that Pyro and
svi.py add: effect handlers, traces, sites, gradient norm, update guard and logging. From the same
random state it draws the same noise and gives the same losses and gradients.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.optim import Optimizer

from guide import LadderGuide
from model import LadderModel


def ladder_terms(model: LadderModel, guide: LadderGuide, x: Tensor) -> tuple[Tensor, Tensor]:
    """One pass on images x (N, C, H, W): log p(x | z) (N,), and KL by layer (N, L), bottom to top.

    KL is the one-sample estimate: log p(x | z) minus its sum is the log importance weight.
    """
    features = guide.bottom_up(x)
    depth = len(features)
    kl: list[Tensor] = []
    h = None
    for i in range(depth, 0, -1):
        if h is None:
            prior = model.top_prior(len(x))
            posterior = guide.top_posterior(features[i - 1])
        else:
            prior = model.priors[i - 1](h)
            posterior = guide.posteriors[i - 1](features[i - 1], h)
        z = posterior.rsample()
        kl.append(posterior.log_prob(z) - prior.log_prob(z))
        h = model.layers[i - 1](z, h)
    log_likelihood = model.likelihood(model.decoder(h)).log_prob(x)
    return log_likelihood, torch.stack(kl[::-1], dim=-1)


def free_bits_loss(
    model: LadderModel, guide: LadderGuide, x: Tensor, free_bits: float = 0.0
) -> Tensor:
    """The negative objective in nats per image, with free bits per layer and image."""
    log_likelihood, kl = ladder_terms(model, guide, x)
    return (kl.clamp(min=free_bits).sum(-1) - log_likelihood).mean()


def training_step(
    model: LadderModel,
    guide: LadderGuide,
    optimizer: Optimizer,
    x: Tensor,
    free_bits: float = 0.0,
    *,
    autocast: AbstractContextManager[object] | None = None,
) -> Tensor:
    """One gradient step on images x; returns the loss, on the device."""
    with autocast or nullcontext():
        loss = free_bits_loss(model, guide, x, free_bits)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
