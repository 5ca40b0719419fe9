"""OMNIGLOT: handwritten characters of 50 alphabets, 28x28.

B. Lake, R. Salakhutdinov and J. Tenenbaum, "Human-level concept learning through probabilistic
program induction", Science 350, 2015; the images and the split of Y. Burda, R. Grosse and
R. Salakhutdinov, "Importance weighted autoencoders", ICLR 2016. Cached as `omniglot.npz`: `train`
(24345, 28, 28) and `test` (8070, 28, 28) uint8 in the published order, the published reals in
[0, 1] rounded to 256 levels. Binarized as MNIST is; `omniglot_grey` keeps the levels.
"""

from pathlib import Path

import numpy as np

from datasets.cache import Contents, load_arrays
from datasets.download import PublishedFile, published
from datasets.grey import binarized
from datasets.images import ImageSet, Shape
from runtime import random as draws

SHAPE: Shape = (1, 28, 28)
BINARY = True
FILE = PublishedFile(
    ["https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/chardata.mat"],
    "21ecaf34373511aa7691cf2e0802aa3d",
)
CONTENTS = {
    "train": Contents((24345, 28, 28), None),
    "test": Contents((8070, 28, 28), None),
}
VALID_IMAGES = 1_345  # random training images, because the file is sorted by alphabet
_SEED = 0


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from `DATA_DIR/omniglot.npz`.

    A missing `omniglot.npz` is made from the published `chardata.mat`, which is downloaded unless
    it is in `data_dir`. `valid` is a fixed random choice of 1,345 training images, `train` the
    other 23,000.

    Raises:
        UserError: a file has other contents, or cannot be downloaded, read or written.
    """
    return binarized("omniglot", split, grey(split, data_dir))


def grey(split: str, data_dir: Path) -> np.ndarray:
    """The grey levels of one split: uint8 (N, 28, 28)."""
    path = data_dir / "omniglot.npz"
    source = "test" if split == "test" else "train"
    images = load_arrays(path, CONTENTS, [source], lambda: _published(path))[source]
    order = draws.permutation(len(images), _SEED)
    if split == "train":
        return images[np.sort(order[VALID_IMAGES:])]
    if split == "valid":
        return images[np.sort(order[:VALID_IMAGES])]
    return images


def _published(path: Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat  # type: ignore[import-untyped]

    with published(path, [FILE]) as files:
        matrices = loadmat(files[FILE.name], appendmat=False)
    # `data` is (784, N), each column an image by columns.
    return {
        split: np.rint(255 * matrices[name].T.reshape(-1, 28, 28).transpose(0, 2, 1)).astype(
            np.uint8
        )
        for split, name in (("train", "data"), ("test", "testdata"))
    }
