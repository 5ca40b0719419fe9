"""scikit-learn's 8x8 handwritten digits, statically binarized: for first trials and tests.

E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998: the
1,797 images of its test set. They come with scikit-learn, so neither a file nor a network is
needed. Pixels 0 ... 16 are divided by 16 and drawn once as Bernoulli, like static MNIST; then the
images are shuffled and split. Draws and shuffle are fixed.
"""

from pathlib import Path

import numpy as np

from datasets.images import ImageSet, PackedImages, Shape
from runtime import random as draws

SHAPE: Shape = (1, 8, 8)
BINARY = True
_ROWS = {
    "train": slice(0, 1200),
    "valid": slice(1200, 1500),
    "test": slice(1500, 1797),
    "train+valid": slice(0, 1500),
}
_SEED = 0
_BINARIZATION, _SHUFFLE = 0, 1


def load(split: str, data_dir: Path) -> ImageSet:
    """One split: 1,200 training, 300 validation and 297 test images."""
    return PackedImages.pack("digits", split, _binary_images()[_ROWS[split]])


def _binary_images() -> np.ndarray:
    """All images, shuffled: bool (1797, 1, 8, 8)."""
    from sklearn.datasets import load_digits

    grey = load_digits().images / 16.0
    binary = draws.bernoulli(grey, _SEED, _BINARIZATION)
    return binary[draws.permutation(len(binary), _SEED, _SHUFFLE)].reshape(-1, *SHAPE)
