"""What Pyro computes for a ladder, written out from the outputs of its networks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn import functional as F

from elbo import FreeBitsELBO

MakePair = Callable[..., tuple[Any, Any]]
Test = Callable[..., None]

LATENTS = ("z_1", "z_2", "z_3")
SHAPES = {"z_1": (2, 4, 8), "z_2": (3, 2, 4), "z_3": (2, 1, 2)}  # of one image, in `make_pair`


def row(*entry_points: str) -> Callable[[Test], Test]:
    """Marks the test of rows in the table of docs/pyro.md, by their first cell.

    `test_pyro_table.py` compares the marks with the table.
    """

    def mark(test: Test) -> Test:
        test.__dict__["rows"] = entry_points
        return test

    return mark


def normal_log_prob(value: Tensor, mean_log_variance: Tensor) -> Tensor:
    """Log-density of a diagonal Normal per image, written out."""
    mean, log_variance = mean_log_variance.chunk(2, dim=1)
    squares = (value - mean) ** 2 / log_variance.exp()
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).flatten(1).sum(1)


def decode(model: Any, z: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the networks of p on z: the priors' parameters by layer, and the logits of x."""
    depth = len(model.layers)
    top = model.top_prior.mean_log_variance.expand(len(z["z_1"]), -1, -1, -1)
    parameters = {f"z_{depth}": top}
    h = model.layers[-1](z[f"z_{depth}"], None)
    for i in range(depth - 1, 0, -1):
        parameters[f"z_{i}"] = model.priors[i - 1].conv(h)
        h = model.layers[i - 1](z[f"z_{i}"], h)
    return parameters | {"x": model.likelihood.conv(model.decoder(h))}


def log_probs(model: Any, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Log-probability of every site per image, from the networks' outputs."""
    parameters = decode(model, z)
    logits = parameters.pop("x")
    found = {name: normal_log_prob(z[name], value) for name, value in parameters.items()}
    loss = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return found | {"x": -loss.flatten(1).sum(1)}


def log_joint(model: Any, z: dict[str, Tensor], x: Tensor) -> Tensor:
    """log p(x, z) per image."""
    return torch.stack(list(log_probs(model, z, x).values())).sum(0)


def log_posterior(model: Any, guide: Any, z: dict[str, Tensor], x: Tensor) -> Tensor:
    """log q(z | x) per image, from the networks of guide and model."""
    d = guide.bottom_up(x)
    total = normal_log_prob(z["z_3"], guide.top_posterior.conv(d[2]))
    h = model.layers[2](z["z_3"], None)
    for i in (2, 1):
        posterior = guide.posteriors[i - 1]
        parameters = posterior.conv(posterior.merge(d[i - 1], h))
        total = total + normal_log_prob(z[f"z_{i}"], parameters)
        h = model.layers[i - 1](z[f"z_{i}"], h)
    return total


def latents(sites: dict[str, Tensor], particle: int | None = None) -> dict[str, Tensor]:
    """The latents among the values of all sites; of one particle, if they have that dimension."""
    return {name: sites[name] if particle is None else sites[name][particle] for name in LATENTS}


def prior_draw(model: Any, n: int) -> dict[str, Tensor]:
    """Latents for n images, drawn from the prior."""
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(n=n)
    return {name: trace.nodes[name]["value"] for name in LATENTS}


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one, which are then cleared."""
    found = {}
    for i, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"{i}.{name}"] = parameter.grad.clone()
                parameter.grad = None
    return found


def parameters(*modules: nn.Module) -> dict[str, Tensor]:
    """A copy of all trainable parameters."""
    return {
        f"{i}.{name}": parameter.detach().clone()
        for i, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def particles(model: Any, guide: Any, x: Tensor, k: int, seed: int) -> Tensor:
    """Log weights log p(x, z) - log q(z | x) of k draws, one after another, (k, N)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        draws = [FreeBitsELBO().compute_terms(model, guide, x).elbo for _ in range(k)]
    return torch.stack(draws)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """The logarithm of the mean of weights (K, ...) over K."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def double_pair(make_pair: MakePair, **options: Any) -> tuple[Any, Any]:
    """A pair in float64 and evaluation mode."""
    model, guide = make_pair(**options)
    return model.double().eval(), guide.double().eval()


class DrawnLogits(Messenger):
    """Writes down the logits of x each time the model comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == "x":
            fn = msg["fn"]
            while hasattr(fn, "base_dist"):
                fn = fn.base_dist
            self.logits.append(fn.logits)


class FixedNoise(Messenger):
    """Draws each latent as mean + scale * noise, from noise by the site's name."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.noise and not msg["done"]:
            fn = msg["fn"]
            while not hasattr(fn, "loc"):
                fn = fn.base_dist
            msg["value"] = fn.loc + fn.scale * self.noise[msg["name"]]
            msg["done"] = True
