"""Annealed importance sampling (AIS) of log p(x), starting from the guide, and its reverse.

Neal (2001), "Annealed importance sampling"; Wu, Burda, Salakhutdinov and Grosse (2017), "On the
quantitative analysis of decoder-based generative models"; Grosse, Ghahramani and Adams (2015),
"Sandwiching the marginal likelihood using bidirectional Monte Carlo".

The chains move in the guide's noise. The latents z(eps) are those that the guide makes of standard
normal noise eps: z_i = m_i + s_i eps_i from the top down, with m_i and s_i the mean and standard
deviation of q(z_i | z_{>i}, x). In this space the path from q(z | x) at beta = 0 to p(z | x) at
beta = 1 is

    f_beta(eps) = N(eps; 0, I) w(eps)^beta,   w(eps) = p(x, z(eps)) / q(z(eps) | x),

which is the geometric path of Wu et al. (equation 6), because the Jacobian of z(eps) cancels. With
inverse temperatures 0 = beta_0 < ... < beta_T = 1, eps_0 ~ q and a transition to eps_t that leaves
f_{beta_t} invariant, the log weight of a chain is

    log W = sum_{t=1}^{T} (beta_t - beta_{t-1}) log w(eps_{t-1}),   E[W] = p(x).

A reverse chain starts from an exact sample of p(z | x), which is known for an image that the ladder
has generated, and visits the same distributions in the opposite order. There E[1 / W] = 1 / p(x),
so that log W is an upper bound in expectation (Grosse et al., section 3).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ladder_vae.evaluation.interfaces import Guide
from ladder_vae.evaluation.kl import layers, sampled_terms

# Wu et al., section 4.1, adapt the step size to the acceptance rate that is optimal for HMC in many
# dimensions.
TARGET_ACCEPTANCE = 0.65
# Transitions follow a trajectory of this many steps.
LEAPFROG_STEPS = 2
# Without a likelihood, steps of this size take the noise to independent noise.
_LARGEST_STEP = math.pi / (2 * LEAPFROG_STEPS)
_FIRST_STEP = 0.2
# By how much a transition of the pilot run changes the logarithm of the step size, at most.
_GAIN = 0.5
# The pilot run has a quarter of the temperatures, but enough to find a step size.
_PILOT_SHARE, _LEAST_PILOT = 0.25, 30
# The slope of the schedule in the middle; Wu et al., appendix.
_DELTA = 4.0


def schedule(temperatures: int) -> list[float]:
    """The inverse temperatures beta_0 = 0, ..., beta_T = 1 of T `temperatures`.

    They are dense at both ends: beta_t is the sigmoid of points that are equally spaced from -4 to
    4, shifted and scaled to [0, 1] (Wu et al.).
    """
    return [_sigmoid(t / temperatures) for t in range(temperatures + 1)]


def _sigmoid(share: float) -> float:
    def logistic(u: float) -> float:
        return 1 / (1 + math.exp(-_DELTA * u))

    return (logistic(2 * share - 1) - logistic(-1)) / (logistic(1) - logistic(-1))


def pilot_temperatures(temperatures: int) -> int:
    """The number of temperatures of the pilot run."""
    return min(temperatures, max(_LEAST_PILOT, round(_PILOT_SHARE * temperatures)))


class Draws(Messenger):
    """A Pyro handler around a guide that takes each latent from `value`, not at random.

    Args:
        value: a function of the latent's name and its posterior, a Normal (N, Z, h, w).
    """

    def __init__(self, value: Callable[[str, Any], Tensor]) -> None:
        super().__init__()
        self.value = value

    def _pyro_sample(self, site: dict[str, Any]) -> None:
        if site["name"].startswith("z_"):
            site["value"] = self.value(site["name"], site["fn"].base_dist)
            site["done"] = True


class LogWeight:
    """log w(eps) and its gradient, for the images of N chains.

    Args:
        guide: a guide in evaluation mode, which runs its model.
        x: the image of each chain (N, C, H, W).
        features: the result of `bottom_up(x)`.

    Raises `ValueError` if the likelihood has no gradient in the latents.
    """

    def __init__(self, guide: Guide, x: Tensor, features: Sequence[Tensor]) -> None:
        self._guide = guide
        self._x = x
        self._features = features
        self._shapes = self._shapes_of_layers()  # bottom to top
        self.dimensions = sum(shape.numel() for shape in self._shapes)

    def __call__(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """log w (N,) in nats and its gradient (N, D), at noise (N, D)."""
        # A trajectory that leaves the numbers must not raise an error: its end is rejected.
        with torch.enable_grad(), pyro.validation_enabled(False):
            eps = eps.detach().requires_grad_()
            maps = self._maps(eps)
            with Draws(lambda name, q: q.loc + q.scale * maps[name]):
                self._guide(self._x, self._features)
            log_likelihood, kl = sampled_terms(self._guide)
            log_w = log_likelihood - kl.sum(1)
            (gradient,) = torch.autograd.grad(log_w.sum(), eps)
        return log_w.detach(), gradient

    def _shapes_of_layers(self) -> list[torch.Size]:
        """(Z, h, w) of each layer; checks that the likelihood has a gradient in the latents."""
        drawn: list[Tensor] = []

        def draw(_: str, q: Any) -> Tensor:
            drawn.append(q.loc.detach().requires_grad_())
            return drawn[-1]

        with torch.enable_grad(), Draws(draw):
            self._guide(self._x[:1], [d[:1] for d in self._features])
            log_likelihood, _ = sampled_terms(self._guide)
            gradients = torch.autograd.grad(log_likelihood.sum(), drawn, allow_unused=True)
        if not any(gradient is not None and gradient.any() for gradient in gradients):
            raise ValueError(
                "annealed importance sampling needs a likelihood with a gradient in the latents; "
                "this one has none"
            )
        return [z.shape[1:] for z in reversed(drawn)]

    def noise(self, z: dict[str, Tensor]) -> Tensor:
        """The noise (N, D) of which the guide makes the latents `z`, by site name."""
        with torch.no_grad(), Draws(lambda name, _: z[name]):
            self._guide(self._x, self._features)
        found = []
        for layer in layers(self._guide):
            q = layer.posterior.base_dist
            found.append(((layer.z - q.loc) / q.scale).flatten(1))
        return torch.cat(found, 1)

    def _maps(self, eps: Tensor) -> dict[str, Tensor]:
        """Noise (N, D) as feature maps (N, Z, h, w), by site name."""
        parts = eps.split([shape.numel() for shape in self._shapes], 1)
        return {
            f"z_{i + 1}": part.unflatten(1, shape)
            for i, (part, shape) in enumerate(zip(parts, self._shapes, strict=True))
        }


class Chains:
    """N Markov chains in the noise of a guide, moved by Hamiltonian Monte Carlo."""

    def __init__(self, log_weight: LogWeight, eps: Tensor) -> None:
        self._log_weight = log_weight
        self.eps = eps  # (N, D)
        self.log_w, self._gradient = log_weight(eps)

    def move(self, beta: float, step: Tensor) -> Tensor:
        """A transition that leaves f_beta invariant, with step sizes (N,); (N,) acceptance.

        The Hamiltonian is |eps|^2 / 2 + |p|^2 / 2 - beta log w(eps), with momentum p. A step of
        size h rotates (eps, p) by h, which follows the first two terms exactly, between two half
        steps along the gradient of the last (Shahbaba et al., 2014, "Split Hamiltonian Monte
        Carlo"). Noise that the image says nothing about thus needs no small steps.
        """
        h = step[:, None]
        cos, sin = h.cos(), h.sin()
        eps, log_w, gradient = self.eps, self.log_w, self._gradient
        p = torch.randn_like(eps)
        before = _energy(eps, p, beta, log_w)
        for _ in range(LEAPFROG_STEPS):
            p = p + h / 2 * beta * gradient
            eps, p = cos * eps + sin * p, cos * p - sin * eps
            log_w, gradient = self._log_weight(eps)
            p = p + h / 2 * beta * gradient
        change = before - _energy(eps, p, beta, log_w)
        # A trajectory that leaves the numbers has a change of nan, and is rejected.
        accepted = torch.rand_like(change).log() < change
        self.eps = torch.where(accepted[:, None], eps, self.eps)
        self.log_w = torch.where(accepted, log_w, self.log_w)
        self._gradient = torch.where(accepted[:, None], gradient, self._gradient)
        return change.exp().clamp(max=1).nan_to_num(0).to(eps.dtype)


def _energy(eps: Tensor, p: Tensor, beta: float, log_w: Tensor) -> Tensor:
    """(N,) in double precision, because the difference of two energies is small against both."""
    squares = (eps.double().square() + p.double().square()).sum(1)
    return squares / 2 - beta * log_w.double()


class Path(NamedTuple):
    """The inverse temperatures of a run, and the step sizes of its transitions."""

    betas: list[float]  # T + 1
    steps: Tensor  # (P, N), of the P transitions of the pilot run

    @classmethod
    def tuned(cls, log_weight: LogWeight, eps: Tensor, temperatures: int, chains: int) -> "Path":
        """Step sizes from a pilot run of the chains that start at `eps` (N, D).

        The step size of an image follows the mean acceptance of its `chains`, which are adjacent.
        The pilot run's noise is independent of that of the run that uses the steps. So the
        transitions of the latter are fixed in advance, as E[W] = p(x) requires.
        """
        moved = Chains(log_weight, eps)
        log_step = eps.new_full((len(eps) // chains,), math.log(_FIRST_STEP))
        steps = []
        for beta in schedule(pilot_temperatures(temperatures))[1:]:
            steps.append(log_step.exp().repeat_interleave(chains))
            acceptance = moved.move(beta, steps[-1]).unflatten(0, (-1, chains)).mean(1)
            log_step = log_step + _GAIN * (acceptance - TARGET_ACCEPTANCE)
            log_step = log_step.clamp(max=math.log(_LARGEST_STEP))
        return cls(schedule(temperatures), torch.stack(steps))

    def step(self, t: int) -> Tensor:
        """The step sizes (N,) of the transition at beta_t, for t from 1 to T."""
        share = t / (len(self.betas) - 1)
        return self.steps[round(share * len(self.steps)) - 1]


def anneal(chains: Chains, path: Path, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """log W (N,) of chains that start from q, or with `reverse` from p(z | x); and acceptance (N,).

    log W is in nats and double precision; the acceptance is the mean over transitions.
    """
    betas = path.betas
    log_weights = torch.zeros_like(chains.log_w, dtype=torch.float64)
    acceptance = torch.zeros_like(chains.log_w)
    order = range(len(betas) - 1, 0, -1) if reverse else range(1, len(betas))
    for t in order:
        log_weights += (betas[t] - betas[t - 1]) * chains.log_w.double()
        following = t - 1 if reverse else t
        if 0 < following < len(betas) - 1:
            acceptance += chains.move(betas[following], path.step(following))
    return log_weights, acceptance / (len(betas) - 2)
