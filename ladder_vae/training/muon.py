"""Muon: orthogonalised momentum for convolutions, and Adamax for the other weights.

Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon. A convolution's weight (O, I, k, k) counts as a matrix of
O rows, as proposed there.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The coefficients of the Newton-Schulz iteration, and the number of iterations, as proposed.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95
# The root mean square of an update at learning rate 1, so that one learning rate suits all weights.
# Liu et al. (2025), "Muon is scalable for LLM training", section 2.2, match Adam by 0.2. Adamax,
# whose denominator is a maximum, takes smaller steps.
_RMS = 0.05


class Muon(torch.optim.Optimizer):
    """Muon for the weights of `convolutions`, Adamax for `others`.

    Args:
        convolutions: weights of two dimensions or more, of which the first one makes the rows.
        others: all other weights.
        lr: the learning rate of both.
        weight_decay: weight of the L2 penalty, for both.
        dtype: of the orthogonalisation; bfloat16 is precise enough.
    """

    def __init__(
        self,
        convolutions: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._adamax = torch.optim.Adamax(others, lr=lr, weight_decay=weight_decay)
        self._dtype = dtype
        # `capturable` says that the learning rate may be a tensor on the device.
        settings = {"lr": lr, "weight_decay": weight_decay, "capturable": False}
        matrices = {"params": list(convolutions), **settings}
        super().__init__([matrices, *self._adamax.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights by their gradients."""
        matrices, others = self.param_groups
        # Loading a state replaces groups and state.
        self._adamax.param_groups, self._adamax.state = [others], self.state
        self._adamax.step()
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in matrices["params"]:
            if weight.grad is not None:
                by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
        for weights in by_shape.values():  # those of one shape together, which is faster
            momenta = torch.stack([m.flatten(1) for m in self._momenta(weights, matrices)])
            updates = orthogonalised(momenta.to(self._dtype)).float()
            updates *= -_RMS * math.sqrt(max(updates.shape[1:])) * matrices["lr"]
            for weight, update in zip(weights, updates, strict=True):
                weight.add_(update.view(weight.shape))

    def _momenta(self, weights: list[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
        """Nesterov's momentum of each weight."""
        gradients = [w.grad for w in weights if w.grad is not None]
        if group["weight_decay"]:
            decay = group["weight_decay"]
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        for weight in weights:
            if weight not in self.state:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        return torch._foreach_lerp(gradients, momenta, _MOMENTUM)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with their singular values replaced by numbers close to 1.

    The quintic Newton-Schulz iteration of Jordan et al. moves them to between about 0.7 and 1.2.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x if wide is matrices else x.mT


def hidden_convolutions(model: Any, guide: Any) -> list[Tensor]:
    """The weights of all convolutions of a ladder but the first and the last.

    As Jordan et al. advise, the convolution of the image and that to the likelihood's parameters
    are left out.
    """
    outer = {guide.bottom_up.stem[0], model.likelihood.conv}
    return [
        m.weight
        for m in (*model.modules(), *guide.modules())
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m not in outer
    ]
