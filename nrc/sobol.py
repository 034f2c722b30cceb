"""Sobol' points in two dimensions: the sample positions of the first vertices of paths."""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def sobol_points(n_bits: int) -> np.ndarray:
    """The first 2^n_bits points of the two-dimensional Sobol' sequence, a (0, 2)-sequence in base 2 (Sobol' 1967).

    Returns:
        (2^n_bits, 2) uint32 in the order of the binary index, coordinates in units of 2^-32.

    Raises:
        ValueError: n_bits is not in 0...32.
    """
    if not 0 <= n_bits <= 32:
        raise ValueError(f"expected 0...32 bits, got {n_bits}")
    index = np.arange(2**n_bits, dtype=np.uint64)
    points = np.zeros((len(index), 2), np.uint32)
    direction = 1 << 31
    for bit in range(n_bits):
        is_set = (index >> np.uint64(bit) & np.uint64(1)).astype(bool)
        points[is_set, 0] ^= np.uint32(1 << (31 - bit))  # van der Corput
        points[is_set, 1] ^= np.uint32(direction)
        direction ^= direction >> 1  # of the primitive polynomial x + 1
    return points


@cache
def bit_reversed(n_bits: int) -> np.ndarray:
    """(2^n_bits,) indices whose n_bits bits are those of 0, 1, 2, ... in reverse order."""
    index = np.zeros(1, np.int64)
    for _ in range(n_bits):
        index = np.concatenate([2 * index, 2 * index + 1])
    return index
