"""The free-bits ELBO (Kingma et al., 2016) of a ladder, for Pyro.

Per image, in nats, with KL_i the divergence between posterior and prior of layer i:

    ELBO      = log p(x | z) - sum_i KL_i                                (reported)
    objective = log p(x | z) - kl_weight * sum_i max(KL_i, free_bits)    (maximised)

KL_i is the one-sample estimate log q(z_i) - log p(z_i), or with `analytic_kl` the closed form given
z_{>i}. Free bits set a floor for the KL of each layer and image: a KL below it has no gradient, so
training does not reduce it further.
"""

from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.params import param_with_module_name
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence


class Terms(NamedTuple):
    """The terms of the ELBO, per image, in nats."""

    log_likelihood: Tensor  # (N,)
    kl: Tensor  # (N, L), layers bottom to top

    @property
    def elbo(self) -> Tensor:
        """(N,); the log importance weight, if KL is the one-sample estimate."""
        return self.log_likelihood - self.kl.sum(-1)


class FreeBitsELBO(ELBO):
    """ELBO with free bits per layer and image; a drop-in for `pyro.infer.Trace_ELBO`.

    As everywhere in Pyro, losses are sums over the images of the batch. Latents must be
    reparameterised and drawn from top to bottom in one plate. With `free_bits` 0 and `kl_weight` 1
    the objective is the negative ELBO.

    After each pass, `terms` holds its per-image terms, detached, for logging.
    """

    def __init__(
        self, free_bits: float = 0.0, *, analytic_kl: bool = False, kl_weight: float | Tensor = 1.0
    ) -> None:
        super().__init__()
        self.free_bits = free_bits
        self.analytic_kl = analytic_kl
        self.kl_weight = kl_weight
        self.terms: Terms | None = None

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def compute_terms(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Terms:
        """Run guide and model once and return the per-image terms of the ELBO."""
        model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
        # Deterministic sites count as observed, with log-probability zero.
        log_likelihood = sum(
            model_trace.nodes[name]["log_prob"] for name in model_trace.observation_nodes
        )
        # Sites come in the order of sampling, from the top; terms are listed from the bottom.
        kl = [
            self._kl(guide_trace.nodes[name], model_trace.nodes[name])
            for name in reversed(guide_trace.stochastic_nodes)
        ]
        terms = Terms(log_likelihood, torch.stack(kl, dim=-1))
        self.terms = Terms(*(term.detach() for term in terms))
        return terms

    def _kl(self, q: dict[str, Any], p: dict[str, Any]) -> Tensor:
        if self.analytic_kl:
            kl = kl_divergence(q["fn"], p["fn"])
            return scale_and_mask(kl, scale=q["scale"], mask=q["mask"])
        return q["log_prob"] - p["log_prob"]

    def objective(self, terms: Terms) -> Tensor:
        """The negative objective, summed over the images."""
        kl = terms.kl.clamp(min=self.free_bits) if self.free_bits > 0 else terms.kl
        return self.kl_weight * kl.sum() - terms.log_likelihood.sum()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The negative objective, to differentiate (a 0-dimensional tensor on the device)."""
        return self.objective(self.compute_terms(model, guide, *args, **kwargs))

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The true negative ELBO, without free bits or KL weight."""
        with torch.no_grad():
            return -self.compute_terms(model, guide, *args, **kwargs).elbo.sum().item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Backpropagate the negative objective; returns its value.

        `pyro.infer.SVI` calls this method, and trains the parameters that are registered during
        the call. Neither model nor guide registers itself, so this method does.
        """
        for name, module in (("model", model), ("guide", guide)):
            if isinstance(module, nn.Module):
                _register(name, module)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


def _register(name: str, module: nn.Module) -> None:
    """Register a module's parameters with Pyro.

    Parameters of another module under the same names are replaced: otherwise Pyro would continue to
    train those.
    """
    store = pyro.get_param_store()
    registered = dict(store.named_parameters())
    for key, parameter in module.named_parameters():
        full_name = param_with_module_name(name, key)
        if registered.get(full_name, parameter) is not parameter:
            del store[full_name]
    pyro.module(name, module)
