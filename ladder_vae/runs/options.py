"""Every option of a training run: its default, description and valid values."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import datasets
from ladder_vae.networks import LadderConfig
from ladder_vae.networks.config import FRACTION, NOT_NEGATIVE, Check, check_settings, setting
from ladder_vae.networks.precision import COMPILE, PRECISIONS

SEED: Check = (lambda value: 0 <= value < 2**63, "at least 0 and below 2**63")
AT_LEAST_ONE: Check = (lambda value: value >= 1, "at least 1")
PRINTABLE: Check = (str.isprintable, "printable text on one line")
POSITIVE: Check = (lambda value: 0 < value < math.inf, "finite and positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run: architecture, data, objective, optimisation and monitoring.

    The defaults are those of the original implementation. Raises `ValueError` for invalid values.
    """

    ladder: LadderConfig = dataclasses.field(default_factory=LadderConfig)

    dataset: str = setting("static_mnist", "data set", choices=datasets.NAMES, group="data")
    train_split: str = setting(
        "train+valid",
        "images to train on; with `train`, evaluations during training use the validation images",
        choices=("train", "train+valid"),
        group="data",
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
    lr: float = setting(3e-4, "learning rate of Adamax", check=POSITIVE, group="optimisation")
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
    seed: int = setting(42, "random seed", check=SEED, group="optimisation")

    precision: str = setting(
        "float32",
        "precision of the networks; tf32 (on a GPU) and bf16 are faster and less precise; "
        "evaluations during training do not use bf16",
        choices=PRECISIONS,
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
        if self.ladder.likelihood == "bernoulli" and not datasets.is_binary(self.dataset):
            raise ValueError(
                f"`likelihood` is bernoulli but the images of {self.dataset} are not binary; "
                "it must be one of discr_log_mix, discr_log, gaussian"
            )
        if self.sync_bn and not self.ladder.batchnorm:
            raise ValueError(
                "`sync_bn` has no effect if `batchnorm` is off; switch off `sync_bn`, too"
            )
        if self.lr_decay != "none" and not (self.steps or self.epochs or self.max_minutes):
            raise ValueError(
                "`lr_decay` needs the run's length: give `steps`, `epochs` or `max_minutes`"
            )

    @classmethod
    def of(cls, **options: Any) -> "RunConfig":
        """A configuration from options by name, architecture included.

        `likelihood` "auto", the default, means bernoulli for binary images and discr_log_mix for
        8-bit ones. Raises `ValueError` for invalid values, `TypeError` for unknown names.
        """
        names = {field.name for field in dataclasses.fields(LadderConfig)}
        ladder = {name: value for name, value in options.items() if name in names}
        others = {name: value for name, value in options.items() if name not in names}
        if ladder.get("likelihood", "auto") == "auto":
            dataset = options.get("dataset", cls.dataset)
            # An unknown data set is reported below, with the other options.
            binary = dataset not in datasets.NAMES or datasets.is_binary(dataset)
            ladder["likelihood"] = "bernoulli" if binary else "discr_log_mix"
        return cls(ladder=LadderConfig(**ladder), **others)

    @property
    def held_out_split(self) -> str:
        """The split for evaluations during training: valid if it is not trained on, else test."""
        return "valid" if self.train_split == "train" else "test"

    def options(self) -> dict[str, Any]:
        """All options by name, architecture included: the arguments of `of`."""
        values = dataclasses.asdict(self)
        return values.pop("ladder") | values

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON, with the architecture under `ladder`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """The configuration from the result of `to_dict`.

        Raises `KeyError`, `TypeError` or `ValueError` if the dictionary is invalid.
        """
        return cls(**(values | {"ladder": LadderConfig(**values["ladder"])}))
