"""Block styles, feature maps and fixed noise for the tests of the networks."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ladder_vae.networks.blocks import (
    BlockStyle,
)
from ladder_vae.runs.options import RunConfig


def style(**options: Any) -> BlockStyle:
    """A block style with everything but the gate."""
    defaults: dict[str, Any] = {
        "channels": 4,
        "residual_type": "bacdbacd",
        "activation": "elu",
        "batchnorm": True,
        "dropout": 0.2,
        "gated": False,
    }
    return BlockStyle(**(defaults | options))


def feature_map(n: int = 2, channels: int = 4, size: tuple[int, int] = (6, 5)) -> Tensor:
    return torch.randn(n, channels, *size)


def settled(module: nn.Module) -> Any:
    """The module in evaluation mode, with random parameters and running statistics."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
    return module.eval()


MakePair = Callable[..., tuple[Any, Any]]
MakeConfig = Callable[..., RunConfig]


class Noise(Messenger):
    """Draws each latent as mean + scale * eps, with eps given by name."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.noise:
            normal = msg["fn"].base_dist
            msg["value"] = normal.loc + normal.scale * self.noise[msg["name"]]
            msg["done"] = True


def noise_for(model: Any, n: int) -> dict[str, Tensor]:
    """Standard normal noise for the latents of n images."""
    sites = poutine.trace(model).get_trace(n=n).nodes
    return {
        name: torch.randn_like(site["value"]) for name, site in sites.items() if name[:2] == "z_"
    }
