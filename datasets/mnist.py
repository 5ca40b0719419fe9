"""MNIST, binarized dynamically for training and statically for evaluation.

Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits". Cached as
`mnist.npz`: `train` (60000, 28, 28), `test` (10000, 28, 28), `train_labels` (60000,) and
`test_labels` (10000,), all uint8 and in MNIST's own order.
"""

from pathlib import Path

import numpy as np

from datasets.cache import Contents, load_arrays
from datasets.grey import binarized, published_idx, rows_of
from datasets.images import ImageSet, Shape

SHAPE: Shape = (1, 28, 28)
BINARY = True
CONTENTS = {
    "train": Contents(
        (60000, 28, 28), "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"
    ),
    "test": Contents(
        (10000, 28, 28), "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"
    ),
    "train_labels": Contents(
        (60000,), "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13"
    ),
    "test_labels": Contents(
        (10000,), "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5"
    ),
}
VALID_IMAGES = 10_000  # the last of the training images


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from `DATA_DIR/mnist.npz`.

    A missing `mnist.npz` is made from the four published files, which are downloaded unless they
    are in `data_dir`. `train` and `train+valid` draw each pixel from Bernoulli(grey / 255) every
    time a batch is read; `valid` and `test` are one such draw with a fixed seed.

    Raises:
        UserError: a file has unexpected contents, or cannot be downloaded, read or written.
    """
    return binarized("mnist", split, grey(split, data_dir))


def grey(split: str, data_dir: Path) -> np.ndarray:
    """The grey levels of one split: uint8 (N, 28, 28)."""
    path = data_dir / "mnist.npz"
    source = "test" if split == "test" else "train"
    images = load_arrays(path, CONTENTS, [source], lambda: published_idx(path, "MNIST"))[source]
    return rows_of(images, split, VALID_IMAGES)
