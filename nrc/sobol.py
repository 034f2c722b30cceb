"""Sobol' points: the sample positions that the first vertices of paths share over frames."""

from __future__ import annotations

import numpy as np

# Degree, coefficients of the primitive polynomial and initial direction numbers of dimensions 2 ... 16, from the search
# for good two-dimensional projections by Joe & Kuo 2008, "Constructing Sobol' Sequences with Better Two-Dimensional
# Projections" (set D6).
_JOE_KUO = (
    (1, 0, (1,)),
    (2, 1, (1, 3)),
    (3, 1, (1, 3, 1)),
    (3, 2, (1, 1, 1)),
    (4, 1, (1, 1, 3, 3)),
    (4, 4, (1, 3, 5, 13)),
    (5, 2, (1, 1, 5, 5, 17)),
    (5, 4, (1, 1, 5, 5, 5)),
    (5, 7, (1, 1, 7, 11, 19)),
    (5, 11, (1, 1, 5, 1, 1)),
    (5, 13, (1, 1, 1, 3, 11)),
    (5, 14, (1, 3, 5, 5, 31)),
    (6, 1, (1, 3, 3, 9, 7, 49)),
    (6, 13, (1, 1, 1, 15, 21, 21)),
    (6, 16, (1, 3, 1, 13, 27, 49)),
)
MAX_DIMENSIONS = 1 + len(_JOE_KUO)


def sobol_points(n_bits: int, n_dimensions: int) -> np.ndarray:
    """The first 2^n_bits Sobol' points, not scrambled, in the order of the binary index.

    Args:
        n_bits: 0...32.
        n_dimensions: 1...16.

    Returns:
        (2^n_bits, n_dimensions) uint32, coordinates in units of 2^-32.
    """
    if not 0 <= n_bits <= 32 or not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"expected 0...32 bits and 1...{MAX_DIMENSIONS} dimensions, got {n_bits} and {n_dimensions}")
    index = np.arange(2**n_bits, dtype=np.uint64)
    points = np.zeros((len(index), n_dimensions), np.uint32)
    for dimension in range(n_dimensions):
        for bit, direction in enumerate(_directions(dimension, n_bits)):
            points[:, dimension] ^= np.where(index >> np.uint64(bit) & np.uint64(1), direction, 0).astype(np.uint32)
    return points


def _directions(dimension: int, n: int) -> list[int]:
    """Direction numbers v_1 ... v_n as 32-bit fractions (Bratley & Fox 1988)."""
    if dimension == 0:
        return [1 << (31 - i) for i in range(n)]
    degree, coefficients, m = _JOE_KUO[dimension - 1]
    v = [m[i] << (31 - i) for i in range(min(degree, n))]
    for i in range(degree, n):
        value = v[i - degree] ^ (v[i - degree] >> degree)
        for k in range(1, degree):
            if coefficients >> (degree - 1 - k) & 1:
                value ^= v[i - k]
        v.append(value)
    return v
