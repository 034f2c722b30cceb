"""Encodings against NumPy twins, drjit's verified hash grid, and their own defining properties."""

import numpy as np
import pytest
import reference_learning as reference
import warp as wp

from nrc.config import parse_encoding
from nrc.kernels.encoding import UNIQUE, make_encode, make_encode_backward
from nrc.kernels.encoding_wide import BLOCK, encode_block_source
from nrc.kernels.grid_wide import make_encode_grid_wide
from nrc.kernels.vectors import VECTOR_SOURCE

TOLERANCE = 2e-6  # a few roundings of values of order one
GRID = {
    "otype": "HashGrid",
    "n_levels": 8,
    "n_features_per_level": 2,
    "log2_hashmap_size": 12,
    "base_resolution": 5,
    "per_level_scale": 1.51,
}


def encode_rows(encoding, x, params):
    """Encode the rows of `x` one by one and in blocks; both results."""
    encode, n_padded = make_encode(encoding), encoding.n_padded

    @wp.func_native(
        VECTOR_SOURCE
        + f"alignas(64) float code[{BLOCK * n_padded}];\n{encode_block_source(encoding)}\n"
        + f"for (int i = 0; i < n * {n_padded}; ++i) y.data[row * {n_padded} + i] = code[i];"
    )
    def encode_block(
        row: int, row_features: int, n: int, x: wp.array2d[float], features: wp.array3d[float], y: wp.array2d[float]
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def run(
        x: wp.array2d[float],
        params: wp.array[float],
        features: wp.array3d[float],
        y: wp.array2d[float],
        blocks: wp.array2d[float],
    ):
        i = wp.tid()
        code = encode(x, i, params)
        for k in range(n_padded):
            y[i, k] = code[k]
        if i % BLOCK == 0:
            encode_block(i, i, wp.min(BLOCK, x.shape[0] - i), x, features, blocks)

    x, params = wp.array(x, dtype=float, device="cpu"), wp.array(params, dtype=float, device="cpu")
    n = x.shape[0]
    features = wp.full((64, n, 8), wp.nan, dtype=float, device="cpu")
    for part in encoding.grids:
        kernel = make_encode_grid_wide(encoding, part)
        inputs = [0, params, 0, n, None, x]
        wp.launch(kernel, part.config.n_levels, inputs=inputs, outputs=[features], device="cpu")
    outputs = [wp.full((n, n_padded), wp.nan, dtype=float, device="cpu") for _ in range(2)]
    wp.launch(run, n, inputs=[x, params, features], outputs=outputs, device="cpu")
    return [out.numpy() for out in outputs]


EVERY_ENCODING = pytest.mark.parametrize(
    "config, n_dims",
    [
        ({"otype": "Identity", "scale": 2.0, "offset": -1.0}, 5),
        ({"otype": "TriangleWave", "n_frequencies": 12}, 3),
        ({"otype": "OneBlob", "n_bins": 4}, 3),
        ({"otype": "OneBlob", "n_bins": 8, "wrap": False}, 2),
        (GRID, 2),
        (GRID, 3),
        (GRID | {"n_features_per_level": 1, "n_levels": 16}, 3),
        (GRID | {"n_features_per_level": 4}, 3),
        (GRID | {"n_features_per_level": 8, "n_levels": 2}, 4),
    ],
)


@EVERY_ENCODING
def test_encoding_matches_twin(config, n_dims):
    """Every encoding agrees with NumPy, for one sample and for blocks, at corners of the domain too."""
    encoding = parse_encoding(config, n_dims, 0)
    rng = np.random.default_rng(1)
    x = rng.random((150, n_dims), dtype=np.float32)
    x[0], x[1], x[2, 0] = 0.0, 1.0, 1.0
    params = rng.uniform(-1, 1, encoding.n_params).astype(np.float32)
    expected = reference.encode(x, config, params)
    # Octave k of the triangle wave multiplies the rounding of x * 2^(k-1)
    tolerance = 1e-3 if config["otype"] == "TriangleWave" else 8 * TOLERANCE
    for code in encode_rows(encoding, x, params):
        if config["otype"] == "HashGrid":  # a position on a cell face may round to either side; both interpolate alike
            np.testing.assert_allclose(code, expected, atol=2e-4)
            assert np.mean(np.abs(code - expected)) < 2e-6
        else:
            np.testing.assert_allclose(code, expected, atol=tolerance)


def input_gradient(encoding, x, params, dL_dcode):
    """dL_dx of the rows of `x` for given gradients of their codes."""
    encode_backward, n_padded, n_dims = make_encode_backward(encoding), encoding.n_padded, encoding.n_input_dims
    Code = wp.types.vector(length=n_padded, dtype=float)

    @wp.kernel(module="unique", module_options=UNIQUE)
    def run(x: wp.array2d[float], params: wp.array[float], dL_dcode: wp.array2d[float], dL_dx: wp.array2d[float]):
        i = wp.tid()
        upstream = Code()
        for k in range(n_padded):
            upstream[k] = dL_dcode[i, k]
        gradient = encode_backward(x, i, params, upstream)
        for d in range(n_dims):
            dL_dx[i, d] = gradient[d]

    inputs = [wp.array(a, dtype=float, device="cpu") for a in (x, params, dL_dcode)]
    dL_dx = wp.full(x.shape, wp.nan, dtype=float, device="cpu")
    wp.launch(run, len(x), inputs=inputs, outputs=[dL_dx], device="cpu")
    return dL_dx.numpy()


@EVERY_ENCODING
def test_encoding_gradient_matches_finite_differences(config, n_dims):
    """The inputs' gradient agrees with central differences of the twin, away from kinks, for random upstream."""
    encoding = parse_encoding(config, n_dims, 0)
    rng = np.random.default_rng(6)
    levels = encoding.parts[0].config.levels if encoding.grids else ()
    # The twin rounds grid positions to single precision, so its steps are long, and exact; waves need short ones
    step = 2.0**-22
    if levels:
        step = 2.0**-13 if levels[-1].scale < 100 else 2.0**-16
    x = np.round(rng.uniform(0.01, 0.99, (400, n_dims)) * 2**13) / 2**13 + 2.0**-16  # off the waves' turns
    params = rng.uniform(-1, 1, encoding.n_params).astype(np.float32)
    dL_dcode = rng.normal(size=(len(x), encoding.n_padded)).astype(np.float32)
    dL_dx = input_gradient(encoding, x, params, dL_dcode)
    away = np.ones(x.shape, bool)
    for level in levels:  # further than a step from a cell's face
        position = x * level.scale + 0.5
        away &= np.abs(position - np.round(position)) > 1.01 * step * level.scale
    expected = np.empty_like(x)
    for d in range(n_dims):
        move = step * np.eye(n_dims)[d]
        change = reference.encode(x + move, config, params) - reference.encode(x - move, config, params)
        expected[:, d] = (change * dL_dcode).sum(axis=1) / (2 * step)
    assert away.mean() > 0.7
    dL_dx, expected = dL_dx[away].astype(np.float64), expected[away]
    assert np.percentile(np.abs(dL_dx - expected) / np.abs(expected).max(), 99) < 1e-3
    assert dL_dx @ expected / np.linalg.norm(dL_dx) / np.linalg.norm(expected) > 0.99999


def test_grid_gradient_is_zero_where_clamped():
    """An input outside [0, 1] or NaN does not move the code: no gradient by it, but by the others."""
    encoding = parse_encoding(GRID, 3, 0)
    rng = np.random.default_rng(7)
    params = rng.uniform(-1, 1, encoding.n_params).astype(np.float32)
    dL_dcode = rng.normal(size=(3, encoding.n_padded)).astype(np.float32)
    wild = np.array([[-0.1, 0.3, 0.7], [0.3, 1.1, 0.7], [0.3, 0.7, np.nan]], np.float32)
    tame = np.array([[0.0, 0.3, 0.7], [0.3, 1.0, 0.7], [0.3, 0.7, 0.0]], np.float32)
    outside = wild != tame
    gradient = input_gradient(encoding, wild, params, dL_dcode)
    assert (gradient[outside] == 0.0).all()
    np.testing.assert_array_equal(gradient[~outside], input_gradient(encoding, tame, params, dL_dcode)[~outside])
    assert (gradient[~outside] != 0.0).all()


def test_composite_places_parts_and_pads_through_last():
    """A composite concatenates its parts and pads with the last one's constant: 1 for identity, 0 for a grid."""
    one_blob = {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 2}
    x = np.random.default_rng(2).random((70, 4), dtype=np.float32)
    grid = GRID | {"n_levels": 3}
    for config in (
        {"otype": "Composite", "nested": [one_blob, {"otype": "Identity"}]},
        {"otype": "Composite", "nested": [one_blob, grid]},
        {"otype": "Composite", "nested": [grid, one_blob]},
    ):
        encoding = parse_encoding(config, 4, 0)
        params = np.random.default_rng(3).uniform(-1, 1, encoding.n_params).astype(np.float32)
        expected = reference.encode(x, config, params)
        assert encoding.n_padded == expected.shape[1]
        for code in encode_rows(encoding, x, params):
            np.testing.assert_allclose(code, expected, atol=2e-5)


def test_one_blob_wraps_only_when_asked():
    """Wrapping gives 0 and 1 one code; without it they are mirror images, and bins always sum to one."""
    x = np.linspace(0, 1, 33, dtype=np.float32)[:, None]
    for wrap in (True, False):
        code = encode_rows(parse_encoding({"otype": "OneBlob", "n_bins": 4, "wrap": wrap}, 1, 0), x, np.zeros(1))[0]
        np.testing.assert_allclose(code[:, :4].sum(axis=1), 1.0, atol=TOLERANCE)
        if wrap:
            np.testing.assert_allclose(code[0], code[-1], atol=TOLERANCE)
        else:
            np.testing.assert_allclose(code[0, :4], code[-1, 3::-1], atol=TOLERANCE)
            assert code[0, 0] == 1.0 and code[-1, 3] == 1.0


def test_grid_reads_in_bounds_for_any_input():
    """Inputs outside [0, 1] are clamped to it, and NaN is read as 0."""
    encoding = parse_encoding(GRID, 3, 0)
    params = np.random.default_rng(4).uniform(-1, 1, encoding.n_params).astype(np.float32)
    wild = np.array([[-5, 0.5, 2], [np.nan, np.inf, -np.inf], [1e30, -1e30, 0.25]], np.float32)
    tame = np.array([[0, 0.5, 1], [0, 1, 0], [1, 0, 0.25]], np.float32)
    for a, b in zip(encode_rows(encoding, wild, params), encode_rows(encoding, tame, params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_grid_levels_follow_tiny_cuda_nn():
    """Level sizes of Instant-NGP's default 3D grid: 16^3 dense entries up to 2^19 hashed ones."""
    grid = parse_encoding({"otype": "HashGrid", "per_level_scale": 1.3819}, 3, 0).parts[0].config
    resolutions = [level.resolution for level in grid.levels]
    assert resolutions[:5] == [16, 23, 31, 43, 59]
    assert [level.n_entries for level in grid.levels][:3] == [4096, 12168, 29792]
    assert all(level.n_entries == 2**19 and level.hashed for level in grid.levels[6:])


@pytest.mark.parametrize("n_dims, per_level_scale", [(2, 1.5), (3, 1.4), (3, 2.0)])
def test_grid_matches_drjit(n_dims, per_level_scale):
    """Features agree with drjit's torchngp-compatible hash grid, which is verified against tiny-cuda-nn."""
    nn = pytest.importorskip("drjit.nn")
    llvm = pytest.importorskip("drjit.llvm.ad")
    config = GRID | {"per_level_scale": per_level_scale, "base_resolution": 16}
    encoding = parse_encoding(config, n_dims, 0)
    try:
        oracle = nn.HashGridEncoding(
            llvm.Float32,
            n_dims,
            n_levels=8,
            n_features_per_level=2,
            hashmap_size=2**12,
            base_resolution=16,
            per_level_scale=per_level_scale,
            torchngp_compat=True,
        )
    except RuntimeError as error:  # drjit found no LLVM library
        pytest.skip(f"drjit's LLVM backend is not available: {error}")
    rng = np.random.default_rng(5)
    theirs = rng.uniform(-1, 1, oracle.n_params).astype(np.float32)
    # drjit rounds level sizes to a multiple of the features instead of 8: move the tables level by level
    ours = np.zeros(encoding.n_params, np.float32)
    first = 0
    for level in encoding.parts[0].config.levels:
        n_entries = level.n_entries if level.hashed else -(-(level.resolution**n_dims) // 2) * 2
        ours[level.first_entry * 2 : (level.first_entry + n_entries) * 2] = theirs[first : first + n_entries * 2]
        first += n_entries * 2
    assert first == oracle.n_params
    oracle.set_params(llvm.Float32(theirs))
    # Below the last half cell, where indices wrap at the level's size
    x = rng.uniform(0, 0.96, (200, n_dims)).astype(np.float32)
    expected = np.array(oracle(llvm.ArrayXf(x.T.copy()))).T
    for code in encode_rows(encoding, x, ours):
        np.testing.assert_allclose(code[:, :16], expected, atol=2e-4)
        assert np.mean(np.abs(code[:, :16] - expected)) < 5e-6


@pytest.mark.parametrize(
    "config, message",
    [
        ({"otype": "Fourier"}, "HashGrid, TriangleWave, OneBlob, Identity"),
        ({"otype": "HashGrid", "n_level": 3}, "n_levels"),
        ({"otype": "OneBlob", "n_bins": 5}, "power of two"),
        ({"otype": "OneBlob", "n_bins": "4"}, "must be int"),
        ({"otype": "Composite", "nested": [{"otype": "Identity", "n_dims_to_encode": 2}]}, "unused"),
        ({"otype": "Composite", "nested": [{"otype": "Identity", "n_dims_to_encode": 9}]}, "reads inputs"),
    ],
)
def test_encoding_errors_name_what_is_allowed(config, message):
    """An unknown otype, key or value is refused with the list of allowed ones."""
    with pytest.raises(ValueError, match=message):
        parse_encoding(config, 3, 0)
