"""Encodings on the CPU: C++ with vector types, 16 samples to a vector.

`encode_block_source` encodes a block of samples into the network's input. Grids are read beforehand, level by level for
many samples (`make_encode_grid_wide`), so that one level's table stays in a core's cache while it is used. The formulas
are those of `encoding.py`.
"""

from functools import cache

import warp as wp

from .encoding import UNIQUE, Encoding, HashGrid, Identity, OneBlob, Part, TriangleWave, n_valid_rows

wp.set_module_options({"enable_backward": False})

BLOCK = 64  # samples encoded at once
GRID_ROWS = 16384  # samples for which a thread reads one grid level before it turns to another

VECTOR_SOURCE = """
typedef float f16 __attribute__((vector_size(64), aligned(4)));
typedef int i16 __attribute__((vector_size(64), aligned(4)));
typedef unsigned u16 __attribute__((vector_size(64), aligned(4)));
const f16 zero = {};
auto to_float = [](auto v) { return (f16)__builtin_convertvector(v, f16); };
auto to_int = [](f16 v) { return (i16)__builtin_convertvector(v, i16); };
auto clamp01 = [&](f16 v) { v = v > zero ? v : zero; return v < zero + 1.0f ? v : zero + 1.0f; };  // NaN becomes 0
"""


def grid_corners_source(grid: HashGrid) -> str:
    """C++ lambda `corners(l, point, index, weight)`: entries and weights of the corners for 16 samples of level l."""
    n_dims, n_corners = grid.n_dims, 1 << grid.n_dims
    primes = ("", "* 2654435761u", "* 805459861u", "* 3674653429u")

    def table(kind: str, name: str, values) -> str:
        return f"static const {kind} {name}[] = {{{', '.join(values)}}};\n"

    source = table("float", "scales", [f"{level.scale!r}f" for level in grid.levels])
    source += table("unsigned", "resolutions", [f"{level.resolution}u" for level in grid.levels])
    source += table("unsigned", "sizes", [f"{level.n_entries}u" for level in grid.levels])
    source += table("unsigned", "first_entries", [f"{level.first_entry}u" for level in grid.levels])
    source += table("bool", "hashed", [str(level.hashed).lower() for level in grid.levels])
    source += "auto corners = [&](int l, const f16* point, unsigned* index, float* weight) {\n"
    source += "const float scale = scales[l]; const unsigned resolution = resolutions[l], size = sizes[l];\n"
    for d in range(n_dims):
        source += f"f16 p{d} = clamp01(point[{d}]) * scale + 0.5f; i16 c{d} = to_int(p{d});\n"
        source += f"f16 w{d}1 = p{d} - to_float(c{d}), w{d}0 = 1.0f - w{d}1;\n"
    # The product of the weights, corner by corner; x runs fastest
    for c in range(n_corners):
        factors = " * ".join(f"w{d}{c >> d & 1}" for d in range(n_dims))
        source += f"*(f16*)(weight + {16 * c}) = {factors};\n"
    source += "if (hashed[l]) {\nconst unsigned mask = size - 1;\n"
    for d in range(n_dims):
        source += f"u16 h{d}0 = (u16)c{d} {primes[d]}, h{d}1 = ((u16)c{d} + 1u) {primes[d]};\n"
    for c in range(n_corners):
        mixed = " ^ ".join(f"h{d}{c >> d & 1}" for d in range(n_dims))
        source += f"*(u16*)(index + {16 * c}) = ({mixed}) & mask;\n"
    source += "} else {\nunsigned stride = 1; (void)resolution;\n"
    for d in range(n_dims):
        source += f"u16 h{d}0 = (u16)c{d} * stride, h{d}1 = h{d}0 + stride; stride *= resolution;\n"
    # The far neighbour at x = 1 lies one row past the end: wrap it (at most one turn, as x is clamped)
    for c in range(n_corners):
        dense = " + ".join(f"h{d}{c >> d & 1}" for d in range(n_dims))
        source += f"{{ u16 e = {dense}; *(u16*)(index + {16 * c}) = e >= size ? e - size : e; }}\n"
    return source + "}\n};\n"


def encode_block_source(encoding: Encoding) -> str:
    """C++ that encodes rows [row, row + n) of `x` into `code` (BLOCK x n_padded, row-major), n <= BLOCK.

    Rows past n repeat row n - 1. Needs VECTOR_SOURCE and the variables x (Warp array), row, n, code, and for grids
    `features`, the output of `make_encode_grid_wide`, whose row `row_features` belongs to row `row` of x.
    """
    n_padded, n_inputs = encoding.n_padded, encoding.n_input_dims
    source = f"""
    alignas(64) float in[{n_inputs}][{BLOCK}];
    for (int s = 0; s < {BLOCK}; ++s) {{
        const float* from = (const float*)((const char*)x.data + (size_t)(row + (s < n ? s : n - 1)) * x.strides[0]);
        for (int d = 0; d < {n_inputs}; ++d) in[d][s] = from[d];
    }}
    for (int s = 0; s < {BLOCK}; ++s)
        for (int k = {encoding.n_output_dims}; k < {n_padded}; ++k) code[s * {n_padded} + k] = {encoding.pad_value!r}f;
    // Store 16 samples of one output column
    auto put = [&](int s, int column, f16 v) {{
        for (int j = 0; j < 16; ++j) code[(s + j) * {n_padded} + column] = v[j];
    }};
    """
    for part in encoding.parts:
        source += "{\n" + _ENCODE_SOURCE[type(part.config)](part, n_padded, encoding) + "}\n"
    return source


def _identity_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    config = part.config
    return f"""
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; ++s)
            code[s * {n_padded} + {part.first_output} + d] =
                {config.scale!r}f * in[{part.first_input} + d][s] + {config.offset!r}f;
    """


def _triangle_wave_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    config = part.config
    return f"""
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; s += 16) {{
            f16 v = *(f16*)&in[{part.first_input} + d][s];
            float frequency = 0.5f;
            for (int k = 0; k < {config.n_frequencies}; ++k, frequency *= 2.0f) {{
                f16 u = v * frequency + 0.25f * k;
                f16 whole = to_float(to_int(u));
                f16 f = u - (whole > u ? whole - 1.0f : whole) - 0.5f;
                put(s, {part.first_output} + d * {config.n_frequencies} + k, 4.0f * (f > zero ? f : -f) - 1.0f);
            }}
        }}
    """


def _one_blob_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    config = part.config
    n_bins = config.n_bins
    wrapped = "quartic({0}) + quartic({0} - 1.0f) + quartic({0} + 1.0f)"
    left = wrapped.format("(-v)") if config.wrap else "zero"
    right = wrapped.format("(boundary - v)") if config.wrap else "quartic(boundary - v)"
    last = right if config.wrap else "zero + 1.0f"
    return f"""
    auto quartic = [&](f16 t) {{
        f16 u = t * {float(n_bins)!r}f;
        f16 u2 = u * u;
        return clamp01((15.0f / 16.0f) * u * (1.0f - (2.0f / 3.0f) * u2 + 0.2f * u2 * u2) + 0.5f);
    }};
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; s += 16) {{
            f16 v = *(f16*)&in[{part.first_input} + d][s];
            f16 left = {left};
            for (int k = 0; k < {n_bins}; ++k) {{
                const float boundary = (k + 1) * {1.0 / n_bins!r}f;
                f16 right = k < {n_bins - 1} ? {right} : {last};
                put(s, {part.first_output} + d * {n_bins} + k, right - left);
                left = right;
            }}
        }}
    """


def _grid_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    grid = part.config
    n_features = grid.n_features_per_level
    return f"""
    for (int l = 0; l < {grid.n_levels}; ++l) {{
        const float* from = (const float*)((const char*)features.data
            + ({encoding.gradient_row(part)} + l) * (size_t)features.strides[0]
            + row_features * (size_t)features.strides[1]);
        for (int s = 0; s < {BLOCK}; ++s)
            for (int f = 0; f < {n_features}; ++f)
                code[s * {n_padded} + {part.first_output} + l * {n_features} + f] =
                    s < n ? from[s * features.shape[2] + f] : 0.0f;
    }}
    """


@cache
def make_encode_grid_wide(encoding: Encoding, part: Part):
    """CPU kernel that interpolates one grid level for up to GRID_ROWS samples per index."""
    grid = part.config
    n_features, n_corners = grid.n_features_per_level, 1 << grid.n_dims
    source = f"""
    {VECTOR_SOURCE}
    {grid_corners_source(grid)}
    typedef float feature __attribute__((vector_size({4 * n_features}), aligned(4)));
    const float* table = params.data + {part.first_param} + (size_t)first_entries[level] * {n_features};
    float* to = (float*)((char*)out.data + ({encoding.gradient_row(part)} + level) * (size_t)out.strides[0]);
    const size_t stride = out.shape[2];
    for (int s = begin; s < end; s += 16) {{
        const int n = end - s < 16 ? end - s : 16;
        alignas(64) unsigned index[{16 * n_corners}];
        alignas(64) float weight[{16 * n_corners}];
        f16 point[{grid.n_dims}];
        {gather_points_source(part, "row + s")}
        corners(level, point, index, weight);
        for (int j = 0; j < n; ++j) {{
            feature sum = {{}};
            for (int c = 0; c < {n_corners}; ++c)
                sum += weight[16 * c + j] * *(const feature*)(table + (size_t)index[16 * c + j] * {n_features});
            *(feature*)(to + (s + j) * stride) = sum;
        }}
    }}
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


def gather_points_source(part: Part, row: str) -> str:
    """C++ that fills `point` with the positions of 16 rows from `row` on; rows past n repeat row n - 1."""
    return f"""
    for (int j = 0; j < 16; ++j) {{
        const float* from = (const float*)((const char*)x.data
            + (size_t)({row} + (j < n ? j : n - 1)) * x.strides[0]) + {part.first_input};
        for (int d = 0; d < {part.config.n_dims}; ++d) point[d][j] = from[d];
    }}
    """


_ENCODE_SOURCE = {
    Identity: _identity_source,
    TriangleWave: _triangle_wave_source,
    OneBlob: _one_blob_source,
    HashGrid: _grid_source,
}
