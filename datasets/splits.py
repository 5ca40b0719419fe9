"""The splits of own images: those that the user names, and shares by hash for the others."""

import hashlib
from collections.abc import Collection

ORDER = ("train", "valid", "test")  # of the rows in a prepared file
# The user's names of a split, and ours.
NAMES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
# Valid and test each take this share of the training images if the user does not name them.
SHARE = 0.1


def by_hash(name: str, missing: Collection[str]) -> str:
    """The split of a training image called `name`, if the splits `missing` take their shares.

    It depends on the name alone, so it stays when other images are added or removed.
    """
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    if draw < SHARE:
        return "valid" if "valid" in missing else "train"
    if draw < 2 * SHARE:
        return "test" if "test" in missing else "train"
    return "train"
