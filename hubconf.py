"""Entry points for torch.hub.

    import torch
    ladder = torch.hub.load("PATH/TO/THIS/FOLDER", "ladder", "runs/mnist-12", source="local")

Both return a `ladder.Ladder` and take the options of `Ladder.load`.
"""

from typing import Any

from ladder import Ladder

dependencies = ["torch", "pyro", "numpy", "safetensors"]


def ladder(path: str, **options: Any) -> Ladder:
    """The trained ladder in a run folder, a published folder or a published file."""
    return Ladder.load(path, **options)


def from_pretrained(name: str, **options: Any) -> Ladder:
    """The published ladder OWNER/NAME of the Hugging Face hub."""
    return Ladder.from_pretrained(name, **options)
