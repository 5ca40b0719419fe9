"""Every option of a training run: its default, description and valid values."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import DataSet
from datasets.own_images import OwnImages
from ladder_vae.networks import LadderConfig
from ladder_vae.networks.config import FRACTION, NOT_NEGATIVE, Check, check_settings, setting
from ladder_vae.networks.precision import COMPILE, PRECISIONS
from runtime.errors import did_you_mean

SEED: Check = (lambda value: 0 <= value < 2**63, "at least 0 and below 2**63")
AT_LEAST_ONE: Check = (lambda value: value >= 1, "at least 1")
PRINTABLE: Check = (str.isprintable, "printable text on one line")
IMAGE_SIZE: Check = (lambda value: 0 <= value <= 4096, "at least 1 and at most 4096")
POSITIVE: Check = (lambda value: 0 < value < math.inf, "finite and positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run: architecture, data, objective, optimisation and monitoring.

    The defaults are those of the original implementation, except that it trains on `train+valid`.
    Raises `ValueError` for invalid values.
    """

    ladder: LadderConfig = dataclasses.field(default_factory=LadderConfig)

    dataset: str = setting(
        "static_mnist",
        f"data set: {', '.join(datasets.NAMES)}; or your own images: a folder of pictures, a .npy "
        "or a .npz file",
        group="data",
    )
    image_size: list[int] = setting(
        [0, 0],
        "height and width to which your own images are cropped and resized; 0 0 for the size that "
        "all of them have",
        check=IMAGE_SIZE,
        group="data",
    )
    flip: bool = setting(False, "flip training images horizontally at random", group="data")
    train_split: str = setting(
        "train",
        "images to train on; evaluations during training use the validation images or, with "
        "train+valid, the test images",
        choices=("train", "train+valid"),
        group="data",
    )
    # What is recorded of the user's own images; None for a data set with a name.
    own: OwnImages | None = None

    objective: str = setting(
        "elbo",
        "elbo, or iwae: the importance-weighted bound with --particles samples",
        choices=("elbo", "iwae"),
        group="objective",
    )
    particles: int = setting(
        1,
        "samples of the latents per image and training step",
        check=AT_LEAST_ONE,
        group="objective",
    )
    elbo_share: float = setting(
        0.0,
        "with iwae: fraction of the run, at its start, that maximises the ELBO with one sample",
        check=FRACTION,
        group="objective",
    )
    free_bits: float = setting(
        0.0,
        "free bits: KL of each layer and image, in nats, below which it is not penalised",
        check=NOT_NEGATIVE,
        group="objective",
    )
    analytical_kl: bool = setting(
        False, "KL in closed form instead of the one-sample estimate", group="objective"
    )
    beta_anneal: int = setting(
        0,
        "steps over which the KL weight increases from 0 to 1",
        check=NOT_NEGATIVE,
        group="objective",
    )

    batch_size: int = setting(
        64, "images per training step", check=AT_LEAST_ONE, group="optimisation"
    )
    optimizer: str = setting(
        "adamax",
        "adamax; or muon, which orthogonalises the momentum of convolutions and leaves the other "
        "weights to Adamax",
        choices=("adamax", "muon"),
        group="optimisation",
    )
    lr: float = setting(3e-4, "learning rate", check=POSITIVE, group="optimisation")
    weight_decay: float = setting(0.0, "weight decay", check=NOT_NEGATIVE, group="optimisation")
    lr_warmup: int = setting(
        0, "steps of linear learning-rate warm-up", check=NOT_NEGATIVE, group="optimisation"
    )
    lr_decay: str = setting(
        "none",
        "learning-rate decay over the run's length",
        choices=("none", "cosine"),
        group="optimisation",
    )
    ema: float = setting(
        0.0,
        "decay of a moving average of the weights, which evaluations then use; 0 for none",
        check=FRACTION,
        group="optimisation",
    )
    grad_clip: float = setting(
        0.0,
        "clip the gradient to this global norm; 0 to never clip",
        check=NOT_NEGATIVE,
        group="optimisation",
    )
    grad_skip: float = setting(
        0.0,
        "skip updates whose gradient norm is above this; 0 for never",
        check=NOT_NEGATIVE,
        group="optimisation",
    )
    grad_spike: float = setting(
        100.0,
        "skip updates whose gradient norm is more than this many times the median of the last 100; "
        "0 for never",
        check=NOT_NEGATIVE,
        group="optimisation",
    )
    data_dep_init: bool = setting(
        False, "data-dependent initialisation of the weights", group="optimisation"
    )
    scale_branches: bool = setting(
        False,
        "divide the last convolution of each residual branch by the square root of the number of "
        "branches, at the start",
        group="optimisation",
    )
    seed: int = setting(42, "random seed", check=SEED, group="optimisation")

    precision: str = setting(
        "float32",
        "precision of the networks; tf32 (on a GPU) and bf16 are faster and less precise; auto: "
        "bf16 on devices with instructions for it; evaluations during training do not use bf16",
        choices=("auto", *PRECISIONS),
        group="speed",
    )
    compile: str = setting(
        "auto",
        "compile the residual blocks, which takes a minute at the start; auto: on a GPU",
        choices=COMPILE,
        group="speed",
    )
    sync_bn: bool = setting(
        False,
        "batch normalisation over the whole batch when several GPUs share it",
        group="speed",
    )

    steps: int = setting(
        0, "stop after this many steps; 0 for no limit", check=NOT_NEGATIVE, group="length"
    )
    epochs: int = setting(
        0, "stop after this many epochs; 0 for no limit", check=NOT_NEGATIVE, group="length"
    )
    max_minutes: float = setting(
        0.0, "stop after this many minutes; 0 for no limit", check=NOT_NEGATIVE, group="length"
    )

    tr_log_interv: int = setting(
        100, "steps between training log entries", check=AT_LEAST_ONE, group="monitoring"
    )
    ts_log_interv: int = setting(
        5000,
        "steps between evaluations with pictures; 0 for only at the end",
        check=NOT_NEGATIVE,
        group="monitoring",
    )
    ll_interv: int = setting(
        50000,
        "steps between importance-weighted bounds; 0 for never",
        check=NOT_NEGATIVE,
        group="monitoring",
    )
    ll_samples: int = setting(
        100, "importance samples for these bounds", check=AT_LEAST_ONE, group="monitoring"
    )
    ll_images: int = setting(
        0,
        "number of random images to compute these bounds on; 0 for all",
        check=NOT_NEGATIVE,
        group="monitoring",
    )
    test_batch_size: int = setting(
        500,
        "images (or images times samples) per evaluation pass",
        check=AT_LEAST_ONE,
        group="monitoring",
    )
    ckpt_interv: int = setting(
        5000,
        "steps between checkpoints; 0 for only at the end",
        check=NOT_NEGATIVE,
        group="monitoring",
    )
    checkpoint_minutes: float = setting(
        30.0,
        "minutes after which a checkpoint is also due; 0 for never",
        check=NOT_NEGATIVE,
        group="monitoring",
    )
    keep_checkpoints: int = setting(
        3,
        "number of newest checkpoints to keep, in addition to the best one",
        check=AT_LEAST_ONE,
        group="monitoring",
    )
    descr: str = setting(
        "", "a few words about the run, added to its name", check=PRINTABLE, group="monitoring"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "image_size", list(self.image_size))
        self._check_data()
        if self.ladder.likelihood == "bernoulli" and not datasets.is_binary(self.data):
            raise ValueError(
                f"`likelihood` is bernoulli but the images of {self.dataset} are not binary; "
                "it must be one of discr_log_mix, discr_log, gaussian"
            )
        if self.sync_bn and not self.ladder.batchnorm:
            raise ValueError(
                "`sync_bn` has no effect if `batchnorm` is off; switch off `sync_bn`, too"
            )
        self._check_objective()
        has_length = self.steps or self.epochs or self.max_minutes
        for name in ("lr_decay", "elbo_share"):
            if getattr(self, name) not in ("none", 0) and not has_length:
                raise ValueError(
                    f"`{name}` needs the run's length: give `steps`, `epochs` or `max_minutes`"
                )

    def _check_objective(self) -> None:
        if self.objective != "iwae":
            if self.elbo_share:
                raise ValueError(
                    "`elbo_share` has no effect without iwae: set it to 0, or `objective` to iwae"
                )
            return
        if self.particles < 2:
            raise ValueError(f"`particles` is {self.particles}; iwae needs at least 2")
        for name in ("free_bits", "beta_anneal", "analytical_kl"):
            if getattr(self, name) and not self.elbo_share:
                raise ValueError(f"`{name}` has no effect with iwae, whose bound has no KL term")

    def _check_data(self) -> None:
        if self.own is None and self.dataset not in datasets.NAMES:
            raise ValueError(
                f"`dataset` is {self.dataset!r}; it must be one of {', '.join(datasets.NAMES)}, or "
                f"the path of your own images{did_you_mean(self.dataset, datasets.NAMES)}"
            )
        if len(self.image_size) != 2 or (0 in self.image_size and any(self.image_size)):
            raise ValueError(
                f"`image_size` is {self.image_size}; it must be a height and a width, at least 1"
            )
        if self.own is None and any(self.image_size):
            raise ValueError(
                f"`image_size` is for your own images; those of {self.dataset} have one size"
            )

    @classmethod
    def of(cls, *, own: OwnImages | None = None, **options: Any) -> "RunConfig":
        """A configuration from options by name, architecture included.

        `likelihood` "auto", the default, means bernoulli for binary images, discr_log_mix for
        8-bit RGB ones and discr_log for 8-bit grey ones. `own` describes the images if `dataset`
        is a path. Raises `ValueError` for invalid values, `TypeError` for unknown names.
        """
        names = {field.name for field in dataclasses.fields(LadderConfig)}
        ladder = {name: value for name, value in options.items() if name in names}
        others = {name: value for name, value in options.items() if name not in names}
        if ladder.get("likelihood", "auto") == "auto":
            dataset = own or options.get("dataset", cls.dataset)
            # An unknown data set is reported below, with the other options.
            known = own is not None or dataset in datasets.NAMES
            ladder["likelihood"] = _likelihood(dataset) if known else "bernoulli"
        return cls(ladder=LadderConfig(**ladder), own=own, **others)

    @property
    def data(self) -> str | DataSet:
        """The argument of the functions in `datasets`."""
        return self.own or self.dataset

    @property
    def held_out_split(self) -> str:
        """The split for evaluations during training: valid if it is not trained on, else test."""
        return "valid" if self.train_split == "train" else "test"

    def options(self) -> dict[str, Any]:
        """All options by name, architecture included: the arguments of `of` besides `own`."""
        values = self.to_dict()
        del values["own"]
        return values.pop("ladder") | values

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON, with the architecture under `ladder`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """The configuration from the result of `to_dict`.

        Raises `KeyError`, `TypeError` or `ValueError` if the dictionary is invalid.
        """
        built = values | {"ladder": LadderConfig(**values["ladder"])}
        if built.get("own") is not None:
            built["own"] = OwnImages.from_dict(built["own"])
        return cls(**built)


def _likelihood(dataset: str | DataSet) -> str:
    """The likelihood that suits the images."""
    if datasets.is_binary(dataset):
        return "bernoulli"
    return "discr_log" if datasets.image_shape(dataset)[0] == 1 else "discr_log_mix"
