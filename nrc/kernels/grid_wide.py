"""Grids on the CPU: C++ with vector types, 16 samples to a vector, one level at a time for many samples.

So one level's table stays in a core's cache while it is used, and what a larger table needs is fetched ahead. The
formulas are those of `grid.py`.
"""

from functools import cache

import warp as wp

from .encoding import UNIQUE, EncodingConfig, Part, n_valid_rows
from .grid import Grid
from .vectors import VECTOR_SOURCE

wp.set_module_options({"enable_backward": False})

GRID_ROWS = 16384  # samples for which a thread reads one grid level before it turns to another
NEAR_BYTES = 1 << 18  # a level's table of that size stays in a core's own cache: nothing to fetch ahead

# One rounding where the processor can, as in tiny-cuda-nn: at a fine level a rounding is a part of a cell
_POSITION_SOURCE = """
auto position = [&](f16 x, float scale) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_elementwise_fma(x, zero + scale, zero + 0.5f);
#else
    return x * scale + 0.5f;
#endif
};
"""


def grid_corners_source(grid: Grid) -> str:
    """C++ lambda `corners(l, point, index, weight)`: entries and weights of the corners for 16 samples of level l.

    Defines the tables `first_entries` and `sizes` of the levels as well. Needs VECTOR_SOURCE.
    """
    n_dims, n_corners = grid.n_dims, grid.n_corners

    def table(kind: str, name: str, values) -> str:
        return f"static const {kind} {name}[] = {{{', '.join(values)}}};\n"

    source = table("float", "scales", [f"{level.scale!r}f" for level in grid.levels])
    source += table("unsigned", "resolutions", [f"{level.resolution}u" for level in grid.levels])
    source += table("unsigned", "sizes", [f"{level.n_entries}u" for level in grid.levels])
    source += table("unsigned", "first_entries", [f"{level.first_entry}u" for level in grid.levels])
    source += table("bool", "hashed", [str(level.hashed).lower() for level in grid.levels])
    source += table("bool", "tiled", [str(level.tiled).lower() for level in grid.levels])
    source += _POSITION_SOURCE + "auto corners = [&](int l, const f16* point, unsigned* index, float* weight) {\n"
    source += "const float scale = scales[l]; const unsigned resolution = resolutions[l], size = sizes[l];\n"
    for d in range(n_dims):
        source += f"f16 p{d} = position(clamp01(point[{d}]), scale); i16 c{d} = to_int(p{d});\n"
        source += f"f16 w{d}1 = p{d} - to_float(c{d});\n"
        if grid.interpolation == "Smoothstep":
            source += f"w{d}1 = w{d}1 * w{d}1 * (3.0f - 2.0f * w{d}1);\n"
        source += f"f16 w{d}0 = 1.0f - w{d}1; (void)w{d}0;\n"
    # The product of the weights, corner by corner; x runs fastest
    for c in range(n_corners):
        factors = " * ".join(f"w{d}{c >> d & 1}" for d in range(n_dims))
        source += f"*(f16*)(weight + {16 * c}) = {factors if n_corners > 1 else 'zero + 1.0f'};\n"
    source += "if (hashed[l]) {\nconst unsigned mask = size - 1;\n"
    for d, prime in enumerate(("", "* 2654435761u", "* 805459861u", "* 3674653429u")[:n_dims]):
        source += f"u16 h{d}0 = (u16)c{d} {prime}, h{d}1 = ((u16)c{d} + 1u) {prime}; (void)h{d}1;\n"
    for c in range(n_corners):
        mixed = " ^ ".join(f"h{d}{c >> d & 1}" for d in range(n_dims))
        source += f"*(u16*)(index + {16 * c}) = ({mixed}) & mask;\n"
    source += "return;\n}\nunsigned stride = 1; (void)resolution;\n"
    for d in range(n_dims):
        source += f"u16 h{d}0 = (u16)c{d} * stride, h{d}1 = h{d}0 + stride; stride *= resolution; (void)h{d}1;\n"
    for c in range(n_corners):
        row_major = " + ".join(f"h{d}{c >> d & 1}" for d in range(n_dims))
        source += f"u16 e{c} = {row_major};\n"
    # The far neighbour at x = 1 lies one row past the end: wrap it (at most one turn, as x is clamped)
    for kind, wrapped in (("tiled[l]", "e{0} % size"), ("!tiled[l]", "e{0} >= size ? e{0} - size : e{0}")):
        source += f"if ({kind}) {{\n"
        source += "".join(f"*(u16*)(index + {16 * c}) = {wrapped.format(c)};\n" for c in range(n_corners)) + "}\n"
    return source + "};\n"


def walk_level_source(part: Part, row: str, begin: str, end: str, body: str) -> str:
    """C++ that runs `body` for samples [begin, end) of one level, 16 at a time and the next 16's entries on their way.

    Sample s lies in row `row` + s of x. `body` sees `s`, the number `n` <= 16 of samples, and their `index` and
    `weight`, lane j of corner c at [16 c + j]. Needs `grid_corners_source`, the variables x and level, and `table`, the
    level's first entry, which is `feature[]`.
    """
    grid = part.config
    n_features, n_corners = grid.n_features_per_level, grid.n_corners
    return f"""
    typedef float feature __attribute__((vector_size({4 * n_features}), aligned(4)));
    alignas(64) unsigned indices[2][{16 * n_corners}];
    alignas(64) float weights[2][{16 * n_corners}];
    const bool far = sizes[level] > {NEAR_BYTES // (4 * n_features)}u;
    auto locate = [&](int s, int slot) {{
        const int n = {end} - s < 16 ? {end} - s : 16;
        f16 point[{grid.n_dims}];
        {gather_points_source(part, f"{row} + s")}
        corners(level, point, indices[slot], weights[slot]);
        if (far)
            for (int c = 0; c < {n_corners}; c += 2)  // its neighbour along x mostly shares the cache line
                for (int j = 0; j < 16; ++j)
                    __builtin_prefetch(table + (size_t)indices[slot][16 * c + j] * {n_features});
    }};
    if ({begin} < {end}) locate({begin}, 0);
    for (int s = {begin}, slot = 0; s < {end}; s += 16, slot ^= 1) {{
        if (s + 16 < {end}) locate(s + 16, slot ^ 1);
        const unsigned* index = indices[slot];
        const float* weight = weights[slot];
        const int n = {end} - s < 16 ? {end} - s : 16;
        {body}
    }}
    """


def gather_points_source(part: Part, row: str) -> str:
    """C++ that fills `point` with the positions of 16 rows from `row` on; rows past n repeat row n - 1."""
    return f"""
    for (int j = 0; j < 16; ++j) {{
        const float* from = (const float*)((const char*)x.data
            + (size_t)({row} + (j < n ? j : n - 1)) * x.strides[0]) + {part.first_input};
        for (int d = 0; d < {part.config.n_dims}; ++d) point[d][j] = from[d];
    }}
    """


@cache
def make_encode_grid_wide(encoding: EncodingConfig, part: Part):
    """CPU kernel that interpolates one grid level for up to GRID_ROWS samples per index."""
    grid = part.config
    n_features, n_corners = grid.n_features_per_level, grid.n_corners
    body = f"""
    for (int j = 0; j < n; ++j) {{
        feature sum = {{}};
        for (int c = 0; c < {n_corners}; ++c)
            sum += weight[16 * c + j] * *(const feature*)(table + (size_t)index[16 * c + j] * {n_features});
        *(feature*)(to + (s + j) * stride) = sum;
    }}
    """
    source = f"""
    {VECTOR_SOURCE}
    {grid_corners_source(grid)}
    const float* table = params.data + {part.first_param} + (size_t)first_entries[level] * {n_features};
    float* to = (float*)((char*)out.data + ({encoding.gradient_row(part)} + level) * (size_t)out.strides[0]);
    const size_t stride = out.shape[2];
    {walk_level_source(part, "row", "begin", "end", body)}
    """

    @wp.func_native(source)
    def encode_level(
        level: int,
        row: int,
        begin: int,
        end: int,
        params: wp.array[float],
        x: wp.array2d[float],
        out: wp.array3d[float],
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def encode_grid_wide(
        first: int,
        # Params
        params: wp.array[float],
        # In
        row: int,
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        # Out
        out_features: wp.array3d[float],  # (levels, rows from `row` on, n_features_per_level)
    ):
        """Interpolate rows [row, row + n_rows). One thread per (level, GRID_ROWS rows), a level's indices together."""
        i = first + wp.tid()
        n_parts = (n_rows + GRID_ROWS - 1) // GRID_ROWS
        level = i // n_parts
        begin = (i % n_parts) * GRID_ROWS
        end = wp.min(wp.min(begin + GRID_ROWS, n_rows), n_valid_rows(x.shape[0], count) - row)
        if begin < end:
            encode_level(level, row, begin, end, params, x, out_features)

    return encode_grid_wide


def scatter_level_source(encoding: EncodingConfig, part: Part) -> str:
    """C++ that adds the gradient of one level's table, sample after sample.

    Needs `grid_corners_source(part.config)` and the variables level, n_rows, x, dL_dgrid, `float* table` (the gradient
    of the level's first entry) and a lambda `touch(unsigned entry)`, called before each addition to an entry.
    """
    n_features, n_corners = part.config.n_features_per_level, part.config.n_corners
    body = f"""
    for (int j = 0; j < n; ++j) {{
        const feature d = *(const feature*)(dL_dfeature + (s + j) * stride);
        for (int c = 0; c < {n_corners}; ++c) {{
            touch(index[16 * c + j]);
            *(feature*)(table + (size_t)index[16 * c + j] * {n_features}) += weight[16 * c + j] * d;
        }}
    }}
    """
    return f"""
    const float* dL_dfeature =
        (const float*)((const char*)dL_dgrid.data
            + ({encoding.gradient_row(part)} + level) * (size_t)dL_dgrid.strides[0]);
    const size_t stride = dL_dgrid.shape[2];
    {walk_level_source(part, "0", "0", "n_rows", body)}
    """


@cache
def make_accumulate_grid_wide(encoding: EncodingConfig, part: Part):
    """CPU kernel that adds the gradient of one grid level's table per index."""
    n_features = part.config.n_features_per_level
    source = f"""
    {VECTOR_SOURCE}
    {grid_corners_source(part.config)}
    const int n_rows = state.data[1];
    float* table = dL_dtable.data + {part.first_param - encoding.first_param}
        + (size_t)first_entries[level] * {n_features};
    auto touch = [](unsigned) {{}};
    {scatter_level_source(encoding, part)}
    """

    @wp.func_native(source)
    def accumulate_level(
        level: int,
        state: wp.array[int],
        x: wp.array2d[float],
        dL_dgrid: wp.array3d[float],
        dL_dtable: wp.array[float],
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def accumulate_grid_wide(
        first: int,
        # In
        state: wp.array[int],  # [go, n_rows, ...], see optimizer.py
        x: wp.array2d[float],  # (capacity, n_input_dims)
        dL_dgrid: wp.array3d[float],  # (levels, capacity, n_features_per_level)
        # In/out
        dL_dtable: wp.array[float],  # gradient of the encoding's parameters
    ):
        """Scatter the gradients of a level's features into the table's. One thread per level."""
        level = first + wp.tid()
        if state[0] != 0:
            accumulate_level(level, state, x, dL_dgrid, dL_dtable)

    return accumulate_grid_wide
