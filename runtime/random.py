"""Keyed random numbers: a pure function of their key, on every machine and in every version.

A key is a random seed followed by integers that name the purpose of the draw. NumPy guarantees the
streams of `SeedSequence` and `PCG64`, but not how `Generator` turns them into a shuffle. Fixed
splits and resumed runs need that guarantee, so this module does not use `Generator`.
"""

import numpy as np


def words(count: int, seed: int, *key: int) -> np.ndarray:
    """``count`` uint64 draws, all 64 bits random."""
    return np.random.PCG64(_sequence(seed, key)).random_raw(count)


def uniform(count: int, seed: int, *key: int) -> np.ndarray:
    """``count`` float64 draws, uniform on [0, 1)."""
    return (words(count, seed, *key) >> np.uint64(11)) * 2.0**-53


def integers(below: int, count: int, seed: int, *key: int) -> np.ndarray:
    """``count`` whole numbers from 0 to ``below`` - 1, int64."""
    return (uniform(count, seed, *key) * below).astype(np.int64)


def permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """The numbers below ``count`` in random order, int64."""
    return np.argsort(uniform(count, seed, *key), kind="stable")


def bernoulli(probabilities: np.ndarray, seed: int, *key: int) -> np.ndarray:
    """One draw for each probability: bool, of the same shape."""
    return uniform(probabilities.size, seed, *key).reshape(probabilities.shape) < probabilities


def torch_seed(seed: int, *key: int) -> int:
    """A 64-bit seed for a `torch.Generator`; similar keys give unrelated seeds."""
    return int(_sequence(seed, key).generate_state(1, np.uint64)[0])


def _sequence(seed: int, key: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=key)
