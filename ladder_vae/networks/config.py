"""The architecture of a ladder, and the sizes that it implies."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from ladder_vae.networks.blocks import ACTIVATIONS, MERGE_TYPES, RESIDUAL_TYPES, BlockStyle
from ladder_vae.networks.likelihoods import LIKELIHOODS
from ladder_vae.networks.normals import SCALES

# A function that returns whether a value is valid, and a description of the valid values.
Check = tuple[Callable[[Any], bool], str]

# The upper limits only reject networks that fit into no machine's memory.
CHANNELS: Check = (lambda value: 1 <= value <= 4096, "at least 1 and at most 4096")
BLOCKS: Check = (lambda value: 1 <= value <= 64, "at least 1 and at most 64")
NOT_NEGATIVE: Check = (lambda value: 0 <= value < math.inf, "finite and not negative")
FRACTION: Check = (lambda value: 0 <= value < 1, "at least 0 and below 1")


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    check: Check | None = None,
    group: str = "network",
) -> Any:
    """A dataclass field with a help text, and with valid values for `check_settings`."""
    metadata = {"help": help, "choices": tuple(choices), "check": check, "group": group}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(config: Any) -> None:
    """Raise `ValueError` for the first `setting` of a dataclass instance that is invalid."""
    for field in dataclasses.fields(config):
        if "check" in field.metadata:
            _check(field, getattr(config, field.name))


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    if not _has_type(value, field.type):
        raise ValueError(f"`{field.name}` is {value!r}; it must be {_type_name(field.type)}")
    choices, check = field.metadata["choices"], field.metadata["check"]
    if choices and value not in choices:
        raise ValueError(f"`{field.name}` is {value!r}; it must be one of {', '.join(choices)}")
    for item in value if isinstance(value, list) else [value]:
        # Neither tensors nor floats can hold larger integers.
        if type(item) is int and abs(item) >= 2**63:
            raise ValueError(f"`{field.name}` is too large; it must be below 2**63")
        if check is not None and not check[0](item):
            raise ValueError(f"`{field.name}` is {item}; it must be {check[1]}")


def _has_type(value: Any, expected: Any) -> bool:
    if get_origin(expected) is list:
        of_type = get_args(expected)[0]
        return isinstance(value, list) and value != [] and all(type(v) is of_type for v in value)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is expected


def _type_name(expected: Any) -> str:
    if get_origin(expected) is list:
        return "a list of whole numbers"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[expected]


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The architecture of a ladder. Lists are ordered from the bottom layer to the top.

    The defaults are those of the original implementation. Raises `ValueError` for invalid values,
    with the field's name in backticks.
    """

    z_dims: list[int] = setting(
        [32, 32, 32], "latent channels of each stochastic layer", check=CHANNELS
    )
    downsample: list[int] = setting(
        [1, 1, 1], "halvings of the feature map before each stochastic layer", check=NOT_NEGATIVE
    )
    blocks_per_layer: int = setting(2, "residual blocks between stochastic layers", check=BLOCKS)
    n_filters: int = setting(64, "channels of all deterministic feature maps", check=CHANNELS)
    nonlin: str = setting("elu", "activation", choices=tuple(ACTIVATIONS))
    residual_type: str = setting(
        "bacdbacd",
        "order of the layers in a residual block: a = activation, b = batch norm, "
        "c = convolution, d = dropout",
        choices=RESIDUAL_TYPES,
    )
    merge_layers: str = setting(
        "residual", "merge of bottom-up and top-down features", choices=MERGE_TYPES
    )
    gated: bool = setting(False, "gated residual blocks")
    skip: bool = setting(False, "skip connections from the layers above in the generative model")
    batchnorm: bool = setting(True, "batch normalisation")
    dropout: float = setting(0.2, "channel dropout probability", check=FRACTION)
    learn_top_prior: bool = setting(False, "learn the prior of the top layer")
    initial_downscaling: bool = setting(True, "halve the image's size before the first layer")
    pixel_shuffle: bool = setting(
        False,
        "decoder at half the image's size; a sub-pixel convolution makes the pixels' parameters",
    )
    scales: str = setting(
        "exp",
        "standard deviations of priors and posteriors: exp of half the log-variance; softplus, "
        "which grows linearly; bounded, with mean and log-scale softly clamped to +-5",
        choices=tuple(SCALES),
    )
    likelihood: str = setting("bernoulli", "distribution of x given z", choices=tuple(LIKELIHOODS))

    def __post_init__(self) -> None:
        check_settings(self)
        # Copy the lists, which the caller may change later.
        object.__setattr__(self, "z_dims", list(self.z_dims))
        object.__setattr__(self, "downsample", list(self.downsample))
        if len(self.z_dims) != len(self.downsample):
            raise ValueError(
                f"`z_dims` lists {len(self.z_dims)} layers but `downsample` "
                f"{len(self.downsample)}; they need one number for each layer, bottom to top"
            )
        if max(self.downsample) > self.blocks_per_layer:
            raise ValueError(
                f"`downsample` asks for {max(self.downsample)} halvings in one layer but "
                f"`blocks_per_layer` is {self.blocks_per_layer}; each halving needs a block"
            )
        if self.pixel_shuffle and not self.initial_downscaling:
            raise ValueError(
                "`pixel_shuffle` doubles the size of the last feature map, which is the image's if "
                "`initial_downscaling` is off; switch one of them"
            )
        if self.downscaling > 1024:
            raise ValueError(
                f"`downsample` asks for {sum(self.downsample)} halvings in all; it must be at "
                f"most {10 - self.initial_downscaling}"
            )

    @property
    def downscaling(self) -> int:
        """The ratio of the padded image's size to the top feature map's."""
        return 2 ** (sum(self.downsample) + self.initial_downscaling)

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the padded image, the next multiples of `downscaling`."""
        height, width = (math.ceil(s / self.downscaling) * self.downscaling for s in image_size)
        return height, width

    def latent_sizes(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each layer's latents, bottom to top."""
        height, width = self.padded_size(image_size)
        factor = 1 + self.initial_downscaling
        sizes = []
        for halvings in self.downsample:
            factor *= 2**halvings
            sizes.append((height // factor, width // factor))
        return sizes

    def block_style(self) -> BlockStyle:
        """The settings that all residual blocks share."""
        return BlockStyle(
            channels=self.n_filters,
            residual_type=self.residual_type,
            activation=self.nonlin,
            batchnorm=self.batchnorm,
            dropout=self.dropout,
            gated=self.gated,
        )
