"""The optimizer of a run."""

from typing import Any

import torch

from ladder_vae.runs.options import RunConfig
from ladder_vae.training.muon import Muon, hidden_convolutions


def make_optimizer(config: RunConfig, loss_fn: Any, precision: str) -> torch.optim.Optimizer:
    """An optimizer of all trained weights of an ELBO module; `precision` is that of the passes."""
    trained = [p for p in loss_fn.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamax":
        return torch.optim.Adamax(trained, **settings)
    matrices = hidden_convolutions(loss_fn.model, loss_fn.guide)
    kept = set(map(id, matrices))
    others = [p for p in trained if id(p) not in kept]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(matrices, others, **settings, dtype=dtype)
