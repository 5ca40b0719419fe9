"""What a config.json says of a ladder. Reading it needs no data set and no other options."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ladder_vae.networks import LadderConfig
from ladder_vae.runs.checkpoint import FORMAT
from runtime.errors import UserError


@dataclass(frozen=True)
class Description:
    """The architecture of a ladder and the shape of its images, from a config.json."""

    ladder: LadderConfig
    image_shape: tuple[int, int, int]
    content: dict[str, Any]  # of the whole file

    @classmethod
    def of(cls, content: Any, file: Path) -> Self:
        """From what was read from `file`; raises `UserError` if it is invalid."""
        with describing(file):
            if content["format"] != FORMAT:
                raise UserError(
                    f"{file} was written by another version of this project (format "
                    f"{content['format']}; this version reads format {FORMAT})"
                )
            channels, height, width = content["image_shape"]
            if not all(type(size) is int and size > 0 for size in (channels, height, width)):
                raise ValueError(f"`image_shape` is {content['image_shape']}")
            ladder = LadderConfig(**content["config"]["ladder"])
            return cls(ladder, (channels, height, width), content)


@contextmanager
def describing(file: Path) -> Iterator[None]:
    """Turn the errors of an invalid description into a `UserError` that names its file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{file} does not describe a run: it has no {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} does not describe a run: {error}") from None
