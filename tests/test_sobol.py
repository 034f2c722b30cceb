"""Sobol' points against SciPy's, and their shuffled use in kernels."""

import numpy as np
import pytest
import warp as wp
from scipy.stats import kstest
from scipy.stats.qmc import Sobol

from nrc.kernels.rng import sobol_key, sobol_vec2
from nrc.launch import launch
from nrc.sobol import bit_reversed, sobol_points

BITS = 10


def test_points_are_those_of_scipy():
    """The same set of points as SciPy's unscrambled sequence (which orders them by Gray code)."""
    theirs = (Sobol(2, scramble=False, bits=32).random_base2(BITS) * 2.0**32).astype(np.uint32)
    gray = np.arange(2**BITS) ^ (np.arange(2**BITS) >> 1)
    np.testing.assert_array_equal(sobol_points(BITS)[gray], theirs)


@pytest.mark.parametrize("n_bits", [-1, 33])
def test_sizes_out_of_range_are_refused(n_bits):
    """No more bits than a coordinate has."""
    with pytest.raises(ValueError, match="bits"):
        sobol_points(n_bits)


def test_bit_reversal_is_its_own_inverse():
    """As for the written-out numbers."""
    reversed_index = bit_reversed(5)
    assert list(reversed_index) == [int(f"{i:05b}"[::-1], 2) for i in range(32)]
    np.testing.assert_array_equal(reversed_index[reversed_index], np.arange(32))


@wp.kernel(enable_backward=False)
def draw(
    first: int,
    points: wp.array2d[wp.uint32],
    index: wp.array[int],
    out_u: wp.array2d[float],
):
    """Groups 0 and 3 of path 7 in frame i, then group 0 of path i in frame 5. One thread per row."""
    i = first + wp.tid()
    a = sobol_vec2(points, index[i], 0, sobol_key(1, 0, 7))
    b = sobol_vec2(points, index[i], 3, sobol_key(1, 0, 7))
    c = sobol_vec2(points, index[5], 0, sobol_key(1, 0, i))
    out_u[i, 0] = a[0]
    out_u[i, 1] = a[1]
    out_u[i, 2] = b[0]
    out_u[i, 3] = b[1]
    out_u[i, 4] = c[0]
    out_u[i, 5] = c[1]


def test_frames_are_stratified_and_groups_and_paths_independent(device):
    """Frames of one path form (0, 2)-nets in each group; groups and paths are uncorrelated and uniform."""
    n = 2**BITS
    points = wp.array(sobol_points(BITS)[bit_reversed(BITS)], dtype=wp.uint32, device=device)
    index = wp.array(bit_reversed(BITS), dtype=int, device=device)
    u = wp.full((n, 6), float("nan"), dtype=float, device=device)
    launch(draw, n, inputs=[points, index], outputs=[u], device=device)
    u = u.numpy()
    assert (u >= 0).all() and (u < 1).all()
    for group in (u[:, 0:2], u[:, 2:4]):
        for count in (16, 64, 256, 1024):  # every prefix of a power of two has one point in each elementary interval
            for bits in range(count.bit_length()):
                columns, rows = 2**bits, count // 2**bits
                histogram = np.histogram2d(*group[:count].T, bins=(columns, rows), range=((0, 1), (0, 1)))[0]
                assert (histogram == 1).all()
    limit = 5 / np.sqrt(n)
    assert abs(np.corrcoef(u[:, 0], u[:, 2])[0, 1]) < limit
    assert abs(np.corrcoef(u[:, 4], u[:, 5])[0, 1]) < limit
    assert abs(np.corrcoef(u[:-1, 4], u[1:, 4])[0, 1]) < limit
    assert kstest(u[:, 4], "uniform").pvalue > 1e-4
    assert kstest(u[:, 5], "uniform").pvalue > 1e-4
