"""Starting a run from trained weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ladder_vae.networks import LadderConfig
from ladder_vae.runs.command_line import flag
from ladder_vae.runs.trained import Source, load_trained
from runtime.errors import UserError

# The architecture's options that fine-tuning may change: they have no weights.
_FREE = {"dropout"}


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from."""

    source: Source
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "InitialWeights":
        """From a run folder, a published folder or a published file; `UserError` for others."""
        return cls(*load_trained(path))

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a run that starts from the weights, `given` ones included, by name.

        Architecture and data set are those of the weights, and the options for random initial
        weights are off. Raises `UserError` if a given option asks for another architecture.
        """
        described = self.source.description
        ladder = asdict(described.ladder)
        for name in {field.name for field in fields(LadderConfig)} - _FREE:
            value = given.get(name, ladder[name])
            if value != ladder[name] and (name, value) != ("likelihood", "auto"):
                raise UserError(
                    f"{flag(name)} is {_shown(value)} but the weights in {self.source.path} are of "
                    f"a ladder with {_shown(ladder[name])}: omit it, or start without --init-from"
                )
        free = {name: given[name] for name in _FREE if name in given}
        dataset = {"dataset": described.content["config"]["dataset"]}
        initial = {"data_dep_init": False, "scale_branches": False}
        return dataset | dict(given) | ladder | free | initial

    def check_images(self, shape: tuple[int, int, int]) -> None:
        """Raise `UserError` unless the weights are for images of this shape."""
        expected = self.source.description.image_shape
        if shape != expected:
            raise UserError(
                f"the weights in {self.source.path} are for images {expected}, but those of the "
                f"data set are {shape}"
            )

    def provenance(self) -> dict[str, Any]:
        """The entry of a run's provenance that says what it started from."""
        source = self.source
        origin = {"path": str(source.path), "step": source.step, "weights": source.weights}
        return {"initial_weights": origin}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
