"""Grids on the CPU: C++ with vector types, 16 samples to a vector, one level at a time for many samples.

So one level's table stays in a core's cache while it is used. The formulas are those of `grid.py`.
"""

from functools import cache

import warp as wp

from .encoding import UNIQUE, Encoding, Part, n_valid_rows
from .grid import HashGrid
from .vectors import VECTOR_SOURCE

wp.set_module_options({"enable_backward": False})

GRID_ROWS = 16384  # samples for which a thread reads one grid level before it turns to another


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
