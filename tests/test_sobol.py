"""Sobol' points against SciPy's, and their shifted use in kernels."""

import numpy as np
import pytest
import warp as wp
from scipy.stats import kstest
from scipy.stats.qmc import Sobol

from nrc.kernels.rng import sobol_float, sobol_key
from nrc.launch import launch
from nrc.sobol import MAX_DIMENSIONS, sobol_points


def test_points_are_those_of_scipy():
    """The same set of points as SciPy's unscrambled sequence (which orders them by Gray code)."""
    ours = sobol_points(10, MAX_DIMENSIONS)
    theirs = (Sobol(MAX_DIMENSIONS, scramble=False, bits=32).random_base2(10) * 2.0**32).astype(np.uint32)
    gray = np.arange(1024) ^ (np.arange(1024) >> 1)
    np.testing.assert_array_equal(ours[gray], theirs)


@pytest.mark.parametrize(("n_bits", "n_dimensions"), [(-1, 2), (33, 2), (4, 0), (4, MAX_DIMENSIONS + 1)])
def test_sizes_out_of_range_are_refused(n_bits, n_dimensions):
    """Neither more bits than a coordinate has nor more dimensions than the table."""
    with pytest.raises(ValueError, match="dimensions"):
        sobol_points(n_bits, n_dimensions)


@wp.kernel(enable_backward=False)
def shift_points(first: int, points: wp.array2d[wp.uint32], out_u: wp.array2d[float]):
    """Coordinate 0 and 3 of point i for path 7, then of point 5 for path i. One thread per row."""
    i = first + wp.tid()
    key = sobol_key(1, 0, 7)
    out_u[i, 0] = sobol_float(points, i, 0, key)
    out_u[i, 1] = sobol_float(points, i, 3, key)
    out_u[i, 2] = sobol_float(points, 5, 0, sobol_key(1, 0, i))
    out_u[i, 3] = sobol_float(points, 5, 3, sobol_key(1, 0, i))


def test_shifted_points_stay_stratified_and_paths_independent(device):
    """A path's 256 points have one in each of 256 strata; one point over paths is uniform and uncorrelated."""
    n = 4096
    points = wp.array(sobol_points(12, 4), dtype=wp.uint32, device=device)
    u = wp.full((n, 4), float("nan"), dtype=float, device=device)
    launch(shift_points, n, inputs=[points], outputs=[u], device=device)
    u = u.numpy()
    assert (u >= 0).all() and (u < 1).all()
    counts = np.histogram(u[:256, 0], bins=256, range=(0, 1))[0]
    assert (counts == 1).all()
    for column in (2, 3):
        assert kstest(u[:, column], "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u[:, 2], u[:, 3])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(u[:-1, 2], u[1:, 2])[0, 1]) < 5 / np.sqrt(n)
