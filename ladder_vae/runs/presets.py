"""Named sets of options: one for each row of the likelihood table, and `digits` for `make demo`."""

from typing import Any

# The networks of the original implementation's likelihood table. Like it, they are trained on the
# training and the validation images, and evaluations during training use the test images.
_FULL_SIZE: dict[str, Any] = {
    "blocks_per_layer": 4,
    "gated": True,
    "skip": True,
    "learn_top_prior": True,
    "data_dep_init": True,
}

# Halvings before each layer, for images of 28x28 and 32x32; the top feature map is 2x2.
_DOWNSAMPLE = {
    3: [1, 1, 1],
    6: [1, 0, 1, 0, 1, 0],
    12: [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0],
    15: [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
}


def _full_size(dataset: str, downsample: list[int]) -> dict[str, Any]:
    depth = len(downsample)
    return _FULL_SIZE | {
        "dataset": dataset,
        "train_split": "train+valid",
        "z_dims": [32] * depth,
        "downsample": downsample,
        "free_bits": 1.0 if depth > 6 else 0.5,
    }


# Networks and a recipe for two hours on two cores; see docs/laptop.md.
_LAPTOP: dict[str, Any] = {
    "train_split": "train+valid",
    "blocks_per_layer": 1,
    "gated": True,
    "skip": True,
    "dropout": 0.0,
    "learn_top_prior": True,
    "pixel_shuffle": True,  # the decoder's blocks at full resolution are most of the work
    "data_dep_init": True,
    "optimizer": "muon",
    "lr": 8e-3,
    "lr_warmup": 50,
    "lr_decay": "cosine",
    "ema": 0.998,
    "free_bits": 1.0,
    "precision": "auto",
    "max_minutes": 120.0,
    "ll_interv": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Small enough to learn legible digits in two minutes on a laptop. Trained like the others.
    "digits": {
        "dataset": "digits",
        "train_split": "train+valid",
        "z_dims": [16, 16, 16],
        "downsample": [1, 1, 1],
        "blocks_per_layer": 1,
        "n_filters": 32,
        "gated": True,
        "skip": True,
        "dropout": 0.05,
        "learn_top_prior": True,
        "initial_downscaling": False,
        "data_dep_init": True,
        "free_bits": 0.5,
        "beta_anneal": 400,
        "batch_size": 128,
        "lr": 5e-3,
        "lr_decay": "cosine",
        "ema": 0.99,
        "steps": 800,
        "ts_log_interv": 400,
        "ll_interv": 0,
        "ckpt_interv": 400,
    },
    "mnist-laptop": _LAPTOP
    | {
        "dataset": "static_mnist",
        "z_dims": [16] * 4,
        "downsample": [1, 0, 1, 1],
        "analytical_kl": True,
    },
    "cifar10-laptop": _LAPTOP
    | {"dataset": "cifar10", "z_dims": [16] * 5, "downsample": [0, 1, 0, 1, 1]},
    "multi-dsprites-laptop": _LAPTOP
    | {"dataset": "multi_dsprites", "z_dims": [16] * 5, "downsample": [1, 1, 0, 1, 1]},
    "mnist-3": _full_size("static_mnist", _DOWNSAMPLE[3]),
    "mnist-6": _full_size("static_mnist", _DOWNSAMPLE[6]),
    "mnist-12": _full_size("static_mnist", _DOWNSAMPLE[12]),
    "multi-dsprites-12": _full_size("multi_dsprites", [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
    "svhn-15": _full_size("svhn", _DOWNSAMPLE[15]),
    "cifar10-3": _full_size("cifar10", _DOWNSAMPLE[3]),
    "cifar10-6": _full_size("cifar10", _DOWNSAMPLE[6]),
    "cifar10-15": _full_size("cifar10", _DOWNSAMPLE[15]),
    "celeba-20": _full_size("celeba", [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]),
}

# The rows of the likelihood table, in the order to reproduce them.
ROWS = (
    *("mnist-3", "mnist-12", "mnist-6", "cifar10-15", "cifar10-3", "cifar10-6"),
    *("multi-dsprites-12", "svhn-15", "celeba-20"),
)
# The presets for two hours on two cores, whose results stand in the table too.
LAPTOPS = ("mnist-laptop", "cifar10-laptop", "multi-dsprites-laptop")

# The same networks with a recipe for a short time budget; see docs/reproduce.md.
_FAST: dict[str, Any] = {
    "batch_size": 256,
    "lr": 5e-3,
    "lr_warmup": 500,
    "lr_decay": "cosine",
    "ema": 0.999,
    "epochs": 200,
    "precision": "bf16",
}
PRESETS |= {f"{row}-fast": PRESETS[row] | _FAST for row in ROWS}
# The original implementation evaluates CelebA on the validation images: do not train on them.
PRESETS["celeba-20-fast"]["train_split"] = "train"
