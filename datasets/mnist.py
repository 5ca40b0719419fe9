"""MNIST in grey: dynamically binarized to train on, one fixed draw of it to be scored on.

Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits". Cached as
``mnist.npz``: ``train`` (60000, 28, 28), ``test`` (10000, 28, 28), ``train_labels`` (60000,) and
``test_labels`` (10000,), all uint8 and in MNIST's own order.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from runtime import random as draws
from runtime.errors import UserError
from runtime.files import writing

from .cache import Contents, load_arrays
from .download import NETWORK_ERRORS, require_md5
from .images import DynamicallyBinarizedImages, ImageSet, PackedImages, Shape

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
_SEED = 0
_BINARIZATION = {"valid": 0, "test": 1}


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from ``DATA_DIR/mnist.npz``, which is made first if it is missing.

    ``train`` and ``train+valid`` draw each pixel as Bernoulli(grey / 255) at every reading;
    ``valid`` and ``test`` were drawn so once, at a fixed seed.

    Raises:
        UserError: the file is damaged or another, or cannot be downloaded, read or written.
    """
    path = data_dir / "mnist.npz"
    source = "test" if split == "test" else "train"
    grey = load_arrays(path, CONTENTS, [source], lambda: _published(path))[source]
    images = _rows(grey, split)[:, np.newaxis]
    if split in _BINARIZATION:
        binary = draws.bernoulli(images / 255, _SEED, _BINARIZATION[split])
        return PackedImages.pack("mnist", split, binary)
    return DynamicallyBinarizedImages("mnist", split, SHAPE, torch.from_numpy(images))


def _rows(grey: np.ndarray, split: str) -> np.ndarray:
    if split == "train":
        return grey[:-VALID_IMAGES]
    if split == "valid":
        return grey[-VALID_IMAGES:]
    return grey


def _published(path: Path) -> dict[str, np.ndarray]:
    """The four published files, through torchvision, which checks their MD5."""
    from torchvision.datasets import MNIST

    with writing(path), tempfile.TemporaryDirectory(prefix=".mnist-", dir=path.parent) as folder:
        _take_own_files(path.parent, Path(folder, "MNIST", "raw"))
        try:
            train, test = (MNIST(folder, train=train, download=True) for train in (True, False))
        except (RuntimeError, *NETWORK_ERRORS) as error:
            reason = " ".join(str(error).split())
            files = ", ".join(name for name, _ in MNIST.resources)
            raise UserError(
                f"{path} is missing and cannot be made, as a download failed ({reason}): put "
                f"{files} into {path.parent} by hand"
            ) from error
        return {
            "train": train.data.numpy(),
            "test": test.data.numpy(),
            "train_labels": train.targets.numpy().astype(np.uint8),
            "test_labels": test.targets.numpy().astype(np.uint8),
        }


def _take_own_files(source: Path, raw: Path) -> None:
    """Copy the published files that the user has put into the data folder to torchvision's."""
    from torchvision.datasets import MNIST

    raw.mkdir(parents=True)
    for name, md5 in MNIST.resources:
        if (source / name).exists():
            require_md5(source / name, md5)
            shutil.copyfile(source / name, raw / name)
