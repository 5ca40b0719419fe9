"""Keyed random numbers: NumPy's streams, fixed values and distributions."""

import numpy as np

from runtime import random as draws

# If these draws change, the data sets change.
PINNED_PERMUTATION = [3, 2, 1, 6, 0, 7, 4, 5]
PINNED_TORCH_SEED = 9247832928889101276


def test_draws_are_numpys_and_never_change() -> None:
    sequence = np.random.SeedSequence(5, spawn_key=(1, 2))
    reference = np.random.Generator(np.random.PCG64(sequence)).random(1000)
    np.testing.assert_array_equal(draws.uniform(1000, 5, 1, 2), reference)
    assert draws.permutation(8, 0).tolist() == PINNED_PERMUTATION
    assert draws.torch_seed(0, 1, 2) == PINNED_TORCH_SEED


def test_each_part_of_a_key_changes_the_draw() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 2**32), (2**32,)]
    assert len({draws.torch_seed(*key) for key in keys}) == len(keys)
    assert len({draws.uniform(1, *key).item() for key in keys}) == len(keys)


def test_whole_numbers_are_drawn_equally_often() -> None:
    drawn = draws.integers(7, 70_000, 3, 1)
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn)
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 6 + 4 * 12**0.5


def test_bernoulli_draws_have_their_probabilities() -> None:
    p = np.repeat([0.0, 0.1, 0.5, 0.9, 1.0], 10_000).reshape(5, -1)
    drawn = draws.bernoulli(p, 6)
    assert drawn.shape == p.shape
    counts = drawn.sum(1)
    assert (counts[0], counts[4]) == (0, 10_000)
    deviations = (counts - p.sum(1))[1:4] / np.sqrt((p * (1 - p)).sum(1))[1:4]
    assert np.abs(deviations).max() < 4
