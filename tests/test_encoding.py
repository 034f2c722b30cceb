"""Encodings against NumPy twins, drjit's verified hash grid, SciPy's harmonics and their own defining properties."""

import numpy as np
import pytest
import reference_encoding as reference
import warp as wp

from nrc.config import parse_encoding
from nrc.kernels import encoding as enc
from nrc.kernels import encoding_wide, grid_wide
from nrc.kernels.encoding_wide import BLOCK, encode_columns_source
from nrc.kernels.grid_cuda import make_accumulate_grid_cuda
from nrc.kernels.vectors import VECTOR_SOURCE

GRID = {
    "otype": "HashGrid",
    "n_levels": 8,
    "n_features_per_level": 2,
    "log2_hashmap_size": 12,
    "base_resolution": 5,
    "per_level_scale": 1.51,
}
TILED = GRID | {"otype": "TiledGrid", "base_resolution": 6}
DENSE = GRID | {"otype": "DenseGrid", "n_levels": 4}
FEW, SMOOTH, NEAREST = {"n_levels": 3}, {"interpolation": "Smoothstep"}, {"interpolation": "Nearest"}


def array(values):
    """A float array on the CPU."""
    return wp.array(np.ascontiguousarray(values, np.float32), dtype=float, device="cpu")


def empty(*shape):
    """A float array of NaN on the CPU."""
    return wp.full(shape, wp.nan, dtype=float, device="cpu")


def run(kernel, n, inputs, outputs):
    """Launch a kernel whose first parameter is the first index."""
    wp.launch(kernel, n, inputs=[0, *inputs], outputs=outputs, device="cpu")


def grid_features(encoding, x, params):
    """Features (levels, rows, features) of all grids of the encoding."""
    grids = [part.config for part in encoding.grids]
    width = max([grid.n_features_per_level for grid in grids], default=1)
    features = empty(max(1, sum(grid.n_levels for grid in grids)), x.shape[0], width)
    n_parts = -(-x.shape[0] // grid_wide.GRID_ROWS)
    for part in encoding.grids:
        kernel = grid_wide.make_encode_grid_wide(encoding, part)
        run(kernel, part.config.n_levels * n_parts, [params, 0, x.shape[0], None, x], [features])
    return features


def encode_both(encoding, x, params):
    """Codes without final padding, one row per thread and in blocks of rows."""
    x, params = array(x), array(params)
    n = x.shape[0]
    rows, blocks = (empty(n, encoding.n_output_dims) for _ in range(2))
    run(enc.make_encode_rows(encoding), n, [params, n, None, x], [rows])
    kernel = encoding_wide.make_encode_wide(encoding)
    features = grid_features(encoding, x, params)
    run(kernel, -(-n // BLOCK), [params, 0, n, None, x, features], [blocks])
    return rows.numpy(), blocks.numpy()


def padded_codes(encoding, x, params):
    """Codes with all padding, row by row and in blocks of rows."""
    encode, n_padded = enc.make_encode(encoding), encoding.n_padded

    @wp.func_native(
        VECTOR_SOURCE
        + f"alignas(64) float code[{BLOCK * n_padded}];\n{encode_columns_source(encoding)}\n"
        + f"for (int s = 0; s < n; ++s) for (int k = 0; k < {n_padded}; ++k)"
        + f" y.data[(row + s) * {n_padded} + k] = code[k * {BLOCK} + s];"
    )
    def encode_block(
        row: int, row_features: int, n: int, x: wp.array2d[float], features: wp.array3d[float], y: wp.array2d[float]
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def encode_padded(
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

    x, params = array(x), array(params)
    outputs = [empty(x.shape[0], n_padded) for _ in range(2)]
    inputs = [x, params, grid_features(encoding, x, params)]
    wp.launch(encode_padded, x.shape[0], inputs=inputs, outputs=outputs, device="cpu")
    return [out.numpy() for out in outputs]


EVERY_ENCODING = pytest.mark.parametrize(
    "config, n_dims",
    [
        ({"otype": "Identity", "scale": 2.0, "offset": -1.0}, 5),
        ({"otype": "Frequency", "n_frequencies": 1}, 2),
        ({"otype": "Frequency", "n_frequencies": 12}, 3),
        ({"otype": "TriangleWave", "n_frequencies": 12}, 3),
        ({"otype": "OneBlob", "n_bins": 4}, 3),
        ({"otype": "OneBlob", "n_bins": 1}, 2),
        ({"otype": "OneBlob", "n_bins": 8, "wrap": False}, 2),
        ({"otype": "SphericalHarmonics", "degree": 1}, 3),
        ({"otype": "SphericalHarmonics", "degree": 4}, 3),
        ({"otype": "SphericalHarmonics", "degree": 8}, 3),
        (GRID, 2),
        (GRID, 3),
        (GRID | {"n_features_per_level": 1, "n_levels": 16}, 3),
        (GRID | {"n_features_per_level": 4}, 3),
        (GRID | {"n_features_per_level": 8, "n_levels": 2}, 4),
        (GRID | SMOOTH | {"n_features_per_level": 4}, 2),
        (GRID | SMOOTH | {"n_features_per_level": 8}, 3),
        (GRID | NEAREST, 2),
        (GRID | NEAREST | {"n_features_per_level": 1}, 3),
        (DENSE | {"n_features_per_level": 8}, 2),
        (DENSE | SMOOTH | {"n_features_per_level": 1}, 2),
        (DENSE | SMOOTH, 3),
        (DENSE | NEAREST | {"n_features_per_level": 4}, 3),
        (TILED, 2),
        (TILED | {"n_features_per_level": 4}, 3),
        (TILED | SMOOTH | {"base_resolution": 8, "n_features_per_level": 1}, 3),
        (TILED | NEAREST | {"n_features_per_level": 8}, 2),
        (GRID | {"base_resolution": 1, "n_levels": 3}, 3),
    ],
)


def sample(config, n_dims, n, rng):
    """Inputs off the cells' faces and the waves' turns, where single precision may take either side."""
    x = rng.random((8 * n, n_dims), dtype=np.float32)
    if reference.is_grid(config):
        x = x[~reference.near_face(x, config)]
    if config["otype"] == "TriangleWave":  # 2^-20 is far from a turn in units of x
        turns = np.float64(x) * 2.0 ** config["n_frequencies"]
        x = x[(np.abs(turns - np.round(turns)) > 2.0**-6).all(axis=1)]
    assert len(x) >= n
    return x[:n]


@EVERY_ENCODING
def test_encoding_matches_twin(config, n_dims):
    """Every encoding agrees with NumPy, for one sample and for blocks, at corners of the domain too."""
    encoding = parse_encoding(config, n_dims, 0)
    rng = np.random.default_rng(1)
    x = sample(config, n_dims, 150, rng)
    if config.get("interpolation") != "Nearest":  # there the value jumps where the corner's cell begins
        x[0], x[1], x[2, 0] = 0.0, 1.0, 1.0
    params = rng.uniform(-1, 1, encoding.n_params).astype(np.float32)
    expected = reference.encode(x, config, params, alignment=1)
    tolerance = 1e-5
    if config["otype"] in ("TriangleWave", "Frequency"):  # octave k multiplies the rounding of its argument
        tolerance = 1e-3 if config["otype"] == "TriangleWave" else 2e-6
    if reference.is_grid(config):  # rounding of a position, at a scale of up to 100 (16 levels: 2400)
        tolerance = 5e-5 if config["n_levels"] <= 8 else 1e-3
    for code in encode_both(encoding, x, params):
        np.testing.assert_allclose(code, expected, atol=tolerance)
        if reference.is_grid(config) and config["n_levels"] <= 8:
            assert np.mean(np.abs(code - expected)) < 3e-6


@EVERY_ENCODING
def test_encoding_gradients_match_twin(config, n_dims):
    """Gradients of inputs and of the table agree with the twin's for random upstream gradients, and are added."""
    encoding = parse_encoding(config, n_dims, 64)
    rng = np.random.default_rng(6)
    x = sample(config, n_dims, 150, rng)
    params = rng.uniform(-1, 1, encoding.n_params).astype(np.float32)
    flat = np.concatenate([np.full(64, np.nan, np.float32), params])  # its first parameter is not the first of all
    dL_dcode = rng.normal(size=(len(x), encoding.n_padded)).astype(np.float32)
    begin, n_padding = encoding.final_padding
    bare = np.delete(dL_dcode, np.arange(begin, begin + n_padding), axis=1)
    jacobian = reference.encode_with_jacobian(x, config, params, alignment=1)[1]
    expected = 1.0 + 0.5 * np.einsum("nk,nkd->nd", np.float64(bare), jacobian)
    for upstream in (dL_dcode, bare):  # with padding columns and without
        dL_dx = array(np.ones_like(x))
        kernel = enc.make_input_gradient(encoding, float)
        run(kernel, len(x), [array(flat), 0.5, len(x), None, array(x), array(upstream)], [dL_dx])
        np.testing.assert_allclose(dL_dx.numpy(), expected, atol=2e-5 * max(1.0, np.abs(expected).max()))
    if not encoding.grids:
        return
    expected = 1.0 + reference.grid_gradient(x, config, bare)
    dL_dgrid = empty(config["n_levels"], len(x), config["n_features_per_level"])
    run(enc.make_split_gradient(encoding), len(x), [len(x), None, array(bare)], [dL_dgrid])
    state = wp.array([1, len(x), 0, 0], dtype=int, device="cpu")
    part = encoding.grids[0]
    wide, rows = (array(np.ones(encoding.n_params)) for _ in range(2))
    run(grid_wide.make_accumulate_grid_wide(encoding, part), config["n_levels"], [state, array(x), dL_dgrid], [wide])
    kernel = make_accumulate_grid_cuda(encoding, part, float, float)
    run(kernel, config["n_levels"] * len(x), [1.0, len(x), state, array(x), array(dL_dcode)], [rows])
    for gradient in (wide.numpy(), rows.numpy()):
        np.testing.assert_allclose(gradient, expected, atol=1e-4 if config["n_levels"] <= 8 else 2e-3)


@pytest.mark.parametrize("dtype", [wp.float16, wp.float32])
def test_input_gradient_takes_either_precision(dtype):
    """Gradients of codes may come in half precision; rows beyond the count keep what they hold."""
    config = {"otype": "OneBlob", "n_bins": 4}
    encoding = parse_encoding(config, 3, 0)
    rng = np.random.default_rng(8)
    x = rng.random((20, 3), dtype=np.float32)
    upstream = wp.array(rng.normal(size=(20, 16)), dtype=dtype, device="cpu")
    dL_dx, count = array(np.zeros_like(x)), wp.array([13], dtype=int, device="cpu")
    run(enc.make_input_gradient(encoding, dtype), 20, [array([]), 1.0, 20, count, array(x), upstream], [dL_dx])
    jacobian = reference.encode_with_jacobian(x, config, None)[1]
    expected = np.einsum("nk,nkd->nd", np.float64(upstream.numpy()), jacobian)
    expected[13:] = 0.0
    np.testing.assert_allclose(dL_dx.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
def test_grid_gradient_is_zero_where_clamped(interpolation):
    """An input outside [0, 1] or NaN does not move the code: no gradient by it, but by the others."""
    encoding = parse_encoding(GRID | {"interpolation": interpolation}, 3, 0)
    rng = np.random.default_rng(7)
    params = rng.uniform(-1, 1, encoding.n_params)
    dL_dcode = rng.normal(size=(3, encoding.n_padded))
    wild = np.array([[-0.1, 0.3, 0.7], [0.3, 1.1, 0.7], [0.3, 0.7, np.nan]], np.float32)
    tame = np.array([[0.0, 0.3, 0.7], [0.3, 1.0, 0.7], [0.3, 0.7, 0.0]], np.float32)
    outside = wild != tame
    gradients = []
    for x in (wild, tame):
        dL_dx = array(np.zeros_like(x))
        kernel = enc.make_input_gradient(encoding, float)
        run(kernel, 3, [array(params), 1.0, 3, None, array(x), array(dL_dcode)], [dL_dx])
        gradients.append(dL_dx.numpy())
    assert (gradients[0][outside] == 0.0).all()
    np.testing.assert_array_equal(gradients[0][~outside], gradients[1][~outside])
    assert (gradients[0][~outside] != 0.0).all()


ONE_BLOB = {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 2}
HARMONICS = {"otype": "SphericalHarmonics", "degree": 3, "n_dims_to_encode": 3}
IDENTITY = {"otype": "Identity", "n_dims_to_encode": 1}
COARSE = GRID | FEW | {"n_dims_to_encode": 2}


@pytest.mark.parametrize(
    "nested, n_dims",
    [
        ([ONE_BLOB, {"otype": "Identity"}], 4),
        ([ONE_BLOB, GRID | FEW], 4),
        ([GRID | FEW, ONE_BLOB], 4),
        ([HARMONICS], 3),  # padding first
        ([IDENTITY, HARMONICS], 4),  # between the two
        ([HARMONICS, {"otype": "Identity"}], 3),  # nothing left for the last
        ([IDENTITY, COARSE | {"n_features_per_level": 8}], 3),  # aligned to its features
        ([IDENTITY, HARMONICS, COARSE | {"n_features_per_level": 4}, IDENTITY], 7),
        ([COARSE | {"n_features_per_level": 1}, COARSE | {"n_features_per_level": 4, "otype": "TiledGrid"}], 4),
        ([COARSE | {"dims_to_encode_begin": 1}, COARSE | {"dims_to_encode_begin": 0}], 3),
    ],
)
def test_composite_places_parts_and_padding(nested, n_dims):
    """Parts follow each other, each padded for the next and the last to 16, with its own constant; gradients too."""
    config = {"otype": "Composite", "nested": nested}
    if any(entry.get("otype") == "TiledGrid" for entry in nested):
        nested[1]["base_resolution"] = 6
    rng = np.random.default_rng(3)
    x = rng.random((70, n_dims), dtype=np.float32)
    encoding = parse_encoding(config, n_dims, 0)
    params = rng.uniform(-1, 1, encoding.n_params).astype(np.float32)
    expected, jacobian = reference.encode_with_jacobian(x, config, params)
    assert encoding.n_padded == expected.shape[1]
    for code in padded_codes(encoding, x, params):
        np.testing.assert_allclose(code, expected, atol=2e-5)
    begin, n_padding = encoding.final_padding
    bare = np.delete(expected, np.arange(begin, begin + n_padding), axis=1)
    assert bare.shape[1] == encoding.n_output_dims == reference.encode_width(n_dims, config)
    for code in encode_both(encoding, x, params):
        np.testing.assert_allclose(code, bare, atol=2e-5)
    near = np.zeros(len(x), bool)
    for entry, part in zip([e for e in nested if reference.is_grid(e)], encoding.grids, strict=True):
        near |= reference.near_face(x[:, part.first_input : part.first_input + 2], entry)
    upstream = rng.normal(size=expected.shape)
    dL_dx = array(np.zeros_like(x))
    kernel = enc.make_input_gradient(encoding, float)
    run(kernel, len(x), [array(params), 1.0, len(x), None, array(x), array(upstream)], [dL_dx])
    expected = np.einsum("nk,nkd->nd", upstream, jacobian)
    np.testing.assert_allclose(dL_dx.numpy()[~near], expected[~near], atol=1e-3)
    if not encoding.grids:
        return
    n_levels = sum(part.config.n_levels for part in encoding.grids)
    dL_dgrid = empty(n_levels, len(x), 8)
    run(enc.make_split_gradient(encoding), len(x), [len(x), None, array(upstream)], [dL_dgrid])
    for part in encoding.grids:
        for level in range(part.config.n_levels):
            width = part.config.n_features_per_level
            first = part.first_output + level * width
            row = dL_dgrid.numpy()[encoding.gradient_row(part) + level, :, :width]
            np.testing.assert_array_equal(row, np.float32(upstream[:, first : first + width]))


def test_accumulation_needs_permission():
    """Nothing is added to the table's gradient when the step is not to be taken."""
    encoding = parse_encoding(GRID, 2, 0)
    state, gradient = wp.array([0, 5, 0, 0], dtype=int, device="cpu"), array(np.ones(encoding.n_params))
    kernel = grid_wide.make_accumulate_grid_wide(encoding, encoding.grids[0])
    run(kernel, 8, [state, array(np.full((5, 2), 0.3)), array(np.ones((8, 5, 2)))], [gradient])
    assert (gradient.numpy() == 1.0).all()


def test_one_blob_wraps_only_when_asked():
    """Wrapping gives 0 and 1 one code; without it they are mirror images, and bins always sum to one."""
    x = np.linspace(0, 1, 33, dtype=np.float32)[:, None]
    for wrap in (True, False):
        encoding = parse_encoding({"otype": "OneBlob", "n_bins": 4, "wrap": wrap}, 1, 0)
        for code in encode_both(encoding, x, np.zeros(1)):
            np.testing.assert_allclose(code.sum(axis=1), 1.0, atol=2e-6)
            if wrap:
                np.testing.assert_allclose(code[0], code[-1], atol=2e-6)
            else:
                np.testing.assert_allclose(code[0], code[-1, ::-1], atol=2e-6)
                assert code[0, 0] == 1.0 and code[-1, 3] == 1.0


def test_grid_reads_in_bounds_for_any_input():
    """Inputs outside [0, 1] are clamped to it, and NaN is read as 0."""
    wild = np.array([[-5, 0.5, 2], [np.nan, np.inf, -np.inf], [1e30, -1e30, 0.25]], np.float32)
    tame = np.array([[0, 0.5, 1], [0, 1, 0], [1, 0, 0.25]], np.float32)
    for config in (GRID, TILED, DENSE | NEAREST):
        encoding = parse_encoding(config, 3, 0)
        params = np.random.default_rng(4).uniform(-1, 1, encoding.n_params)
        codes = zip(encode_both(encoding, wild, params), encode_both(encoding, tame, params), strict=True)
        for a, b in codes:
            np.testing.assert_array_equal(a, b)


def test_encoding_reads_only_counted_rows():
    """Rows at and beyond the count keep their content, on a slice of the rows too."""
    encoding = parse_encoding(GRID, 2, 0)
    rng = np.random.default_rng(9)
    x, params = array(rng.random((200, 2))), array(rng.normal(size=encoding.n_params))
    count = wp.array([170], dtype=int, device="cpu")
    out, features = empty(200, 16), empty(8, 120, 2)
    for row, n_rows in ((0, 120), (120, 80)):
        kernel = grid_wide.make_encode_grid_wide(encoding, encoding.grids[0])
        run(kernel, 8, [params, row, n_rows, count, x], [features])
        kernel = encoding_wide.make_encode_wide(encoding)
        run(kernel, 2, [params, row, n_rows, count, x, features], [out])
    np.testing.assert_allclose(out.numpy()[:170], encode_both(encoding, x.numpy(), params.numpy())[1][:170], atol=0)
    assert np.isnan(out.numpy()[170:]).all()


def test_spherical_harmonics_match_scipy():
    """On unit vectors the columns are SciPy's real spherical harmonics with the sign (-1)^m, and orthonormal."""
    special = pytest.importorskip("scipy.special")
    if not hasattr(special, "sph_harm_y"):
        pytest.skip("this SciPy has no sph_harm_y")
    rng = np.random.default_rng(10)
    v = rng.normal(size=(200, 3))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    theta, phi = np.arccos(v[:, 2]), np.arctan2(v[:, 1], v[:, 0])
    columns = []
    for band in range(8):
        for m in range(-band, band + 1):
            y = special.sph_harm_y(band, abs(m), theta, phi)  # has the sign (-1)^m already
            columns.append(y.real if m == 0 else np.sqrt(2) * (y.imag if m < 0 else y.real))
    encoding = parse_encoding({"otype": "SphericalHarmonics", "degree": 8}, 3, 0)
    for code in encode_both(encoding, (v + 1) / 2, np.zeros(1)):
        np.testing.assert_allclose(code, np.stack(columns, 1), atol=3e-5)  # x in single precision, degree 7


@pytest.mark.parametrize(
    "config, n_dims, n_entries",
    [
        # tiny-cuda-nn's config_hash.json: resolutions 16, 24, 36, 54, 81, 122, 183, then 2^15 entries each
        (
            {"otype": "HashGrid", "log2_hashmap_size": 15, "per_level_scale": 1.5},
            2,
            [256, 576, 1296, 2920, 6568, 14888] + [32768] * 10,
        ),
        # Instant-NGP's NeRF table for a scene of 2048 vertices: 16^3, 23^3, 31^3, 43^3, 59^3, 81^3 > 2^19
        (
            {"otype": "HashGrid", "per_level_scale": 1.3819},
            3,
            [4096, 12168, 29792, 79512, 205384] + [524288] * 11,
        ),
        # A dense grid's levels end at 256 vertices a side where nothing else is said: 16, 64, 256
        ({"otype": "DenseGrid", "n_levels": 3}, 3, [4096, 262144, 16777216]),
        # A tiled grid repeats its first level's vertices
        ({"otype": "TiledGrid", "n_levels": 4, "base_resolution": 12}, 2, [144, 144, 144, 144]),
        ({"otype": "Grid", "type": "Tiled", "n_levels": 2, "base_resolution": 8}, 3, [512, 512]),
        # 24 parameters of all levels, 3 of 8
        ({"otype": "HashGrid", "n_features": 24, "n_features_per_level": 8, "base_resolution": 4}, 2, [16, 64, 256]),
    ],
)
def test_grid_levels_follow_tiny_cuda_nn(config, n_dims, n_entries):
    """Entries per level, offsets and parameter counts are those of tiny-cuda-nn's formulas, worked out by hand."""
    grid = parse_encoding(config, n_dims, 0).parts[0].config
    assert [level.n_entries for level in grid.levels] == n_entries
    assert [level.first_entry for level in grid.levels] == [sum(n_entries[:i]) for i in range(len(n_entries))]
    assert grid.n_params == sum(n_entries) * grid.n_features_per_level


def test_largest_tables_are_counted_in_32_bits():
    """16 levels of 2^24 entries are allowed, what has more than 2^31 - 1 parameters is refused with its size."""
    grid = parse_encoding({"otype": "HashGrid", "log2_hashmap_size": 24}, 3, 0).parts[0].config
    assert grid.levels[-1].n_entries == 2**24 and 2**28 < grid.n_params < 2**29
    with pytest.raises(ValueError, match=r"Dense grid has .* parameters, more than"):
        parse_encoding({"otype": "DenseGrid", "n_levels": 8, "per_level_scale": 2.0}, 3, 0)
    with pytest.raises(ValueError, match=r"more than 2.31 - 1"):
        parse_encoding({"otype": "HashGrid", "log2_hashmap_size": 24, "n_features_per_level": 4}, 3, 2**31 - 2**29)


SHOW = [
    (n_dims, per_level_scale, log2_hashmap_size, n_features)
    for n_dims in (2, 3)
    for per_level_scale, log2_hashmap_size, n_features in ((1.26, 12, 2), (1.5, 12, 2), (2.0, 19, 2), (1.4, 16, 4))
]


@pytest.mark.parametrize("n_dims, per_level_scale, log2_hashmap_size, n_features", SHOW)
def test_grid_matches_drjit(n_dims, per_level_scale, log2_hashmap_size, n_features):
    """Features agree with drjit's torchngp-compatible hash grid, which is verified against tiny-cuda-nn."""
    nn = pytest.importorskip("drjit.nn")
    llvm = pytest.importorskip("drjit.llvm.ad")
    config = {
        "otype": "HashGrid",
        "n_levels": 8,
        "n_features_per_level": n_features,
        "log2_hashmap_size": log2_hashmap_size,
        "per_level_scale": per_level_scale,
    }
    encoding = parse_encoding(config, n_dims, 0)
    levels = encoding.parts[0].config.levels
    try:
        oracle = nn.HashGridEncoding(
            llvm.Float32,
            n_dims,
            n_levels=8,
            n_features_per_level=n_features,
            hashmap_size=2**log2_hashmap_size,
            base_resolution=16,
            per_level_scale=per_level_scale,
            torchngp_compat=True,
        )
    except RuntimeError as error:  # drjit found no LLVM library
        pytest.skip(f"drjit's LLVM backend is not available: {error}")
    rng = np.random.default_rng(5)
    theirs = rng.normal(size=oracle.n_params).astype(np.float32)
    # drjit rounds level sizes to a multiple of the features instead of 8: move the tables level by level
    ours = np.zeros(encoding.n_params, np.float32)
    first = 0
    for level in levels:
        n_entries = level.n_entries if level.hashed else -(-(level.resolution**n_dims) // n_features) * n_features
        begin, size = level.first_entry * n_features, n_entries * n_features
        ours[begin : begin + size] = theirs[first : first + size]
        first += size
    assert first == oracle.n_params
    assert not levels[0].hashed and (levels[-1].hashed or log2_hashmap_size > 12)
    oracle.set_params(llvm.Float32(theirs))
    x = rng.random((2000, n_dims), dtype=np.float32)
    codes = encode_both(encoding, x, ours)
    # Theirs computes a level's scale in double precision, tiny-cuda-nn and ours in single
    scale_rounding = [abs(oracle._level_scale(i) - level.scale) for i, level in enumerate(levels)]
    for same_scale in (False, True):
        if same_scale:
            oracle._level_scale = lambda i: levels[i].scale
        expected = np.array(oracle(llvm.ArrayXf(x.T.copy()))).T
        for code in codes:
            difference = np.abs(code - expected).reshape(len(x), 8, n_features)
            for i, level in enumerate(levels):
                # Not in a dense level's last half cell, where indices wrap at its size
                inside = level.hashed | (np.float64(x) * level.scale + 0.5 < level.resolution - 1).all(axis=1)
                # A second rounding of x scale + 0.5, where the processor cannot do with one, moves a sample by a part
                # of its cell, and so does the scale's; slopes are those of 2^d normal values
                moved = 2.0**-24 * level.scale + (0.0 if same_scale else scale_rounding[i])
                assert (difference[inside, i] < 1e-5 + 16.0 * moved).all()
                assert np.percentile(difference[inside, i], 99.8) < 1e-5 + (0.0 if same_scale else 6.0 * moved)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"otype": "Fourier"}, "TiledGrid, Frequency, TriangleWave, OneBlob, Spher"),
        ({"otype": "HashGrid", "n_level": 3}, "n_levels"),
        ({"otype": "HashGrid", "n_features_per_level": 3}, "1, 2, 4 or 8"),
        ({"otype": "HashGrid", "interpolation": "Cubic"}, "Nearest, Linear, Smoothstep"),
        ({"otype": "HashGrid", "type": "Sparse"}, "Hash, Dense, Tiled"),
        ({"otype": "HashGrid", "hash": "Rng"}, "allowed: CoherentPrime"),
        ({"otype": "HashGrid", "stochastic_interpolation": True}, "allowed: False"),
        ({"otype": "HashGrid", "n_features": 7}, "no multiple"),
        ({"otype": "HashGrid", "n_features": 8, "n_levels": 4}, "give one of them"),
        ({"otype": "HashGrid", "per_level_scale": 1e10}, "exceeds 2.30"),
        ({"otype": "TiledGrid", "base_resolution": 5, "n_levels": 2}, "multiple of 8"),
        ({"otype": "OneBlob", "n_bins": 5}, "power of two"),
        ({"otype": "OneBlob", "n_bins": "4"}, "must be int"),
        ({"otype": "Frequency", "n_frequencies": 0}, "1 ... 64"),
        ({"otype": "SphericalHarmonics", "degree": 9}, "1 ... 8"),
        ({"otype": "Identity", "n_dims_to_encode": 2}, "belong to the nested"),
        ({"otype": "Composite", "nested": []}, "at least one entry"),
        ({"otype": "Composite", "reduction": "Sum", "nested": [{}]}, "allowed: Concatenation"),
        ({"otype": "Composite", "nested": [{"otype": "Identity", "n_dims_to_encode": 2}]}, "unused"),
        ({"otype": "Composite", "nested": [{"otype": "Identity", "n_dims_to_encode": 9}]}, "reads inputs"),
        ({"otype": "Composite", "nested": [{"otype": "Identity"}, {"otype": "OneBlob"}]}, "only one entry"),
        ({"otype": "Composite", "nested": [{"otype": "Identity", "dims_to_encode_begin": 1}]}, "every entry"),
        ({"otype": "Composite", "nested": [{"otype": "Composite", "nested": [{}]}]}, "nested encoding 0"),
        ({"otype": "Composite", "nested": ["Identity"]}, "expected a dictionary"),
    ],
)
def test_encoding_errors_name_what_is_allowed(config, message):
    """An unknown otype, key or value is refused with the list of allowed ones."""
    with pytest.raises(ValueError, match=message):
        parse_encoding(config, 3, 0)


def test_spherical_harmonics_need_three_inputs():
    """Directions have three components."""
    with pytest.raises(ValueError, match="3 dimensions"):
        parse_encoding({"otype": "SphericalHarmonics"}, 2, 0)
