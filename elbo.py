"""The objectives of a ladder, for Pyro: the free-bits ELBO and the importance-weighted bound.

Per image, in nats, with KL_i the divergence between posterior and prior of layer i:

    ELBO      = log p(x | z) - sum_i KL_i                                (reported)
    objective = log p(x | z) - kl_weight * sum_i max(KL_i, free_bits)    (maximised)

KL_i is the one-sample estimate log q(z_i) - log p(z_i), or with `analytic_kl` the closed form given
z_{>i}. Free bits (Kingma et al., 2016) set a floor for the KL of each layer and image: a KL below
it has no gradient, so training does not reduce it further.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

# The ladder's own plate, `images`; vectorized particles are a plate to the left of it.
_PLATES = 1


class Terms(NamedTuple):
    """The terms of the ELBO per image, in nats; with K particles, (K, N) and (K, N, L)."""

    log_likelihood: Tensor  # (N,)
    kl: Tensor  # (N, L), layers bottom to top

    @property
    def elbo(self) -> Tensor:
        """(N,); the log importance weight, if KL is the one-sample estimate."""
        return self.log_likelihood - self.kl.sum(-1)


class FreeBitsELBO(ELBO):
    """ELBO with free bits per layer and image; a drop-in for `pyro.infer.Trace_ELBO`.

    As everywhere in Pyro, losses are sums over the images of the batch, and means over particles.
    Latents must be reparameterised and drawn from top to bottom. With `free_bits` 0 and `kl_weight`
    1 the objective is the negative ELBO. Scaled log-probabilities (`poutine.scale`, subsampling
    plates) scale the free bits too; masked images contribute nothing.

    After each pass, `terms` holds its per-image terms, detached and averaged over particles.

    Args:
        free_bits: in nats, per layer and image.
        analytic_kl: KL in closed form given the layers above, instead of the one-sample estimate.
        kl_weight: weight of the KL in the objective.
        **options: as for `pyro.infer.ELBO`, such as `num_particles` and `vectorize_particles`.
    """

    def __init__(
        self,
        free_bits: float = 0.0,
        *,
        analytic_kl: bool = False,
        kl_weight: float | Tensor = 1.0,
        **options: Any,
    ) -> None:
        if options.get("vectorize_particles"):  # otherwise Pyro runs the pair once to find out
            options.setdefault("max_plate_nesting", _PLATES)
        super().__init__(**options)
        self.free_bits = free_bits
        self.analytic_kl = analytic_kl
        self.kl_weight = kl_weight
        self.terms: Terms | None = None
        self._least_kl: Any = free_bits  # with the scale and mask of the last pass

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def compute_terms(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Terms:
        """Run guide and model, once per particle, and return the per-image terms of the ELBO."""
        particles = [self._terms(*pair) for pair in self._get_traces(model, guide, args, kwargs)]
        if len(particles) == 1:
            terms = particles[0]
        else:
            terms = Terms(*(torch.stack(parts) for parts in zip(*particles, strict=True)))
        self._keep(terms)
        return terms

    def _keep(self, terms: Terms) -> None:
        log_likelihood, kl = terms.log_likelihood.detach(), terms.kl.detach()
        if self.num_particles > 1:
            log_likelihood, kl = log_likelihood.mean(0), kl.mean(0)
        self.terms = Terms(log_likelihood, kl)

    def _terms(self, model_trace: Trace, guide_trace: Trace) -> Terms:
        # Deterministic sites count as observed, with log-probability zero.
        log_likelihood = sum(
            model_trace.nodes[name]["log_prob"] for name in model_trace.observation_nodes
        )
        # Sites come in the order of sampling, from the top; terms are listed from the bottom.
        pairs = [
            (guide_trace.nodes[name], model_trace.nodes[name])
            for name in reversed(guide_trace.stochastic_nodes)
        ]
        kl = torch.stack([self._kl(q, p) for q, p in pairs], dim=-1)
        if self.free_bits > 0:
            self._least_kl = self._free_bits(kl, pairs[0][0])
        return Terms(log_likelihood, kl)

    def _kl(self, q: dict[str, Any], p: dict[str, Any]) -> Tensor:
        if self.analytic_kl:
            kl = kl_divergence(q["fn"], p["fn"])
            return scale_and_mask(kl, scale=q["scale"], mask=q["mask"])
        return q["log_prob"] - p["log_prob"]

    def _free_bits(self, kl: Tensor, q: dict[str, Any]) -> Tensor | float:
        """Free bits with scale and mask, which handlers of images give to all layers alike."""
        if not isinstance(q["scale"], Tensor) and q["mask"] is None:
            return self.free_bits * q["scale"]
        one = torch.full_like(kl[..., 0].detach(), self.free_bits)
        return scale_and_mask(one, scale=q["scale"], mask=q["mask"]).unsqueeze(-1)

    def objective(self, terms: Terms) -> Tensor:
        """The negative objective, summed over the images, averaged over particles."""
        kl = terms.kl.clamp(min=self._least_kl) if self.free_bits > 0 else terms.kl
        return (self.kl_weight * kl.sum() - terms.log_likelihood.sum()) / self.num_particles

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The negative objective, to differentiate (a 0-dimensional tensor on the device)."""
        return self.objective(self.compute_terms(model, guide, *args, **kwargs))

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The true negative ELBO, without free bits or KL weight."""
        with torch.no_grad():
            terms = self.compute_terms(model, guide, *args, **kwargs)
            return -terms.elbo.sum().item() / self.num_particles

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Compute the gradient of the negative objective; returns the latter."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


class ImportanceWeightedELBO(FreeBitsELBO):
    """The importance-weighted bound with K samples (Burda et al., 2016), for training.

        L_K = E[log (1/K) sum_k w_k],   w_k = p(x, z_k) / q(z_k | x),  z_k ~ q

    The gradient is the doubly reparameterised one of Tucker et al. (2019), "Doubly Reparameterized
    Gradient Estimators for Monte Carlo Objectives", equation 8. With v_k = w_k / sum_j w_j, and the
    latents z_k of all layers as a function of noise and the posteriors' parameters, it is

        sum_k v_k d log p(x, z_k)                   with z_k held fixed, and
        sum_k v_k^2 (d log w_k / d z_k) d z_k       with the densities' own parameters held fixed.

    As K grows, the signal-to-noise ratio of the guide's plain gradient falls; that of this one does
    not. Networks that model and guide share take part in both sums.

    Args:
        num_particles: K, at least 2. All particles pass through the networks together.
    """

    def __init__(self, num_particles: int) -> None:
        if num_particles < 2:
            raise ValueError(f"`particles` is {num_particles}; iwae needs at least 2")
        super().__init__(num_particles=num_particles, vectorize_particles=True)

    def objective(self, terms: Terms) -> Tensor:
        """The negative bound, summed over the images."""
        return -(terms.elbo.logsumexp(0) - math.log(self.num_particles)).sum()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative bound."""
        with torch.no_grad():
            return self.objective(self.compute_terms(model, guide, *args, **kwargs)).item()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The negative bound, whose gradient is the doubly reparameterised one."""
        with _Gates() as gates:
            model_trace, guide_trace = next(self._get_traces(model, guide, args, kwargs))
        terms = self._terms(model_trace, guide_trace)
        self._keep(terms)
        log_w = terms.elbo  # (K, N)
        v = log_w.detach().softmax(0)
        latents = guide_trace.stochastic_nodes
        log_p = sum((model_trace.nodes[z]["log_prob"] for z in latents), terms.log_likelihood)
        surrogate = (v * log_p).sum()
        with gates.closed():
            # The second sum, less what the first one sends into z, in one backward pass.
            into_z = torch.autograd.grad(
                (v**2 * log_w - v * log_p).sum(), gates.latents, retain_graph=True
            )
        for z, gradient in zip(gates.latents, into_z, strict=True):
            surrogate = surrogate + (z * gradient).sum()
        return self.objective(terms).detach() - surrogate + surrogate.detach()


class _Gates(Messenger):
    """Puts a gate behind each latent as it is drawn: closed, no gradient reaches the draw."""

    def __init__(self) -> None:
        super().__init__()
        self.latents: list[Tensor] = []  # behind their gates
        self.is_closed = False

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"].startswith("z_"):
            msg["value"] = _Gate.apply(msg["value"], self)
            self.latents.append(msg["value"])

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Close the gates for gradients that are computed inside."""
        self.is_closed = True
        try:
            yield
        finally:
            self.is_closed = False


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gates: _Gates) -> Tensor:
        ctx.gates = gates
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.gates.is_closed else gradient), None
