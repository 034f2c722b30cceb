"""Input encodings: hash grid, triangle wave, one-blob, identity, and their composite.

Each encoding is a frozen config with three renderings of the same formula:

- `make_encode(encoding)`, a Warp function for one sample: the CUDA path and the readable twin;
- `make_accumulate_grid(part)`, the gradient of a grid's table, also one sample at a time;
- `encode_block_source(encoding)`, C++ with vector types for a block of samples: the CPU path. There grids are read
  beforehand, level by level for many samples (`make_encode_grid_wide`), so that one level's table stays in a core's
  cache while it is used.

Inputs live in [0, 1]; grids clamp what lies outside. Semantics, names and defaults are those of tiny-cuda-nn.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import warp as wp

wp.set_module_options({"enable_backward": False})

# Spatial hash of Teschner et al. 2003 as used in Eq. 4, Müller et al. 2022
PRIME_1 = wp.constant(wp.uint32(2654435761))
PRIME_2 = wp.constant(wp.uint32(805459861))
PRIME_3 = wp.constant(wp.uint32(3674653429))

UNIQUE = {"enable_backward": False, "max_unroll": 4}  # options of every kernel made by a factory
BLOCK = 64  # samples a CPU block encodes at once
GRID_ROWS = 16384  # samples for which a CPU thread reads one grid level before it turns to another


@dataclass(frozen=True)
class Level:
    """One resolution level of a grid. Entries count vertices, each `n_features_per_level` parameters."""

    scale: float
    resolution: int
    first_entry: int
    n_entries: int
    hashed: bool


@dataclass(frozen=True)
class HashGrid:
    """Multiresolution hash grid (Müller et al. 2022) over `n_dims` inputs."""

    n_dims: int
    n_levels: int = 16
    n_features_per_level: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 2.0
    pad_value = 0.0

    def __post_init__(self) -> None:
        if self.n_dims not in (2, 3, 4):
            raise ValueError(f"HashGrid encodes 2, 3 or 4 dimensions, got {self.n_dims}")
        if self.n_features_per_level not in (1, 2, 4, 8):
            raise ValueError(f"n_features_per_level must be 1, 2, 4 or 8, got {self.n_features_per_level}")
        if not 1 <= self.n_levels <= 64:
            raise ValueError(f"n_levels must be 1 ... 64, got {self.n_levels}")
        if not 3 <= self.log2_hashmap_size <= 27:
            raise ValueError(f"log2_hashmap_size must be 3 ... 27, got {self.log2_hashmap_size}")
        if self.base_resolution < 2 or self.per_level_scale < 1.0:
            raise ValueError("base_resolution must be at least 2 and per_level_scale at least 1")
        if self.levels[-1].scale > 2.0**30:
            raise ValueError(f"the finest level's resolution {self.levels[-1].scale:.3g} exceeds 2^30")

    @property
    def n_output_dims(self) -> int:
        return self.n_levels * self.n_features_per_level

    @property
    def levels(self) -> tuple[Level, ...]:
        return _grid_levels(self)

    @property
    def n_params(self) -> int:
        last = self.levels[-1]
        return (last.first_entry + last.n_entries) * self.n_features_per_level


@dataclass(frozen=True)
class TriangleWave:
    """Triangle waves of `n_frequencies` octaves per input, a cheap sine (Müller et al. 2021, sec. 5)."""

    n_dims: int
    n_frequencies: int = 12
    n_params = 0
    pad_value = 1.0

    @property
    def n_output_dims(self) -> int:
        return self.n_dims * self.n_frequencies


@dataclass(frozen=True)
class OneBlob:
    """Quartic blob spread over `n_bins` bins per input (Müller et al. 2019).

    `wrap` joins the ends of [0, 1], as tiny-cuda-nn does; without it the tails fall into the end bins.
    """

    n_dims: int
    n_bins: int = 16
    wrap: bool = True
    n_params = 0
    pad_value = 1.0

    def __post_init__(self) -> None:
        if self.n_bins < 1 or self.n_bins & (self.n_bins - 1):
            raise ValueError(f"n_bins must be a power of two, got {self.n_bins}")

    @property
    def n_output_dims(self) -> int:
        return self.n_dims * self.n_bins


@dataclass(frozen=True)
class Identity:
    """The inputs themselves: `scale` * x + `offset`."""

    n_dims: int
    scale: float = 1.0
    offset: float = 0.0
    n_params = 0
    pad_value = 1.0

    @property
    def n_output_dims(self) -> int:
        return self.n_dims


@dataclass(frozen=True)
class Part:
    """An encoding at its place: first input column, first output column, first parameter of the flat buffer."""

    config: HashGrid | TriangleWave | OneBlob | Identity
    first_input: int
    first_output: int
    first_param: int


@dataclass(frozen=True)
class Encoding:
    """Concatenated parts, padded to a multiple of 16 columns with the last part's pad value."""

    parts: tuple[Part, ...]

    @property
    def n_input_dims(self) -> int:
        return max(p.first_input + p.config.n_dims for p in self.parts)

    @property
    def n_output_dims(self) -> int:
        return self.parts[-1].first_output + self.parts[-1].config.n_output_dims

    @property
    def n_padded(self) -> int:
        return -(-self.n_output_dims // 16) * 16

    @property
    def pad_value(self) -> float:
        return self.parts[-1].config.pad_value

    @property
    def n_params(self) -> int:
        return sum(p.config.n_params for p in self.parts)

    @property
    def grids(self) -> tuple[Part, ...]:
        return tuple(p for p in self.parts if isinstance(p.config, HashGrid))

    def gradient_row(self, part: Part) -> int:
        """First row of `part`'s levels in the dL_dgrid buffer, which holds one row of samples per grid level."""
        return sum(p.config.n_levels for p in self.grids if p.first_output < part.first_output)


@cache
def _grid_levels(grid: HashGrid) -> tuple[Level, ...]:
    """Scale, resolution and size of each level in single precision, as tiny-cuda-nn computes them."""
    levels = []
    first = 0
    log2_scale = _f32(math.log2(_f32(grid.per_level_scale)))
    for i in range(grid.n_levels):
        scale = _f32(_f32(_f32(2.0 ** _f32(i * log2_scale)) * grid.base_resolution) - 1.0)
        resolution = math.ceil(scale) + 1
        n_vertices = resolution**grid.n_dims
        n_entries = min(-(-n_vertices // 8) * 8, 1 << grid.log2_hashmap_size)
        levels.append(Level(scale, resolution, first, n_entries, n_vertices > n_entries))
        first += n_entries
    return tuple(levels)


def _f32(x: float) -> float:
    return ctypes.c_float(x).value


@wp.func
def n_valid_rows(n_rows: int, count: wp.array[int]):
    """Rows to evaluate: all, or the number on the device where `count` is given."""
    if count.shape[0] > 0:
        return wp.clamp(count[0], 0, n_rows)
    return n_rows


# One sample at a time, in Warp


@cache
def make_encode(encoding: Encoding):
    """Function (x, i, params) -> vector of `n_padded` encoded values of row i."""
    Code = wp.types.vector(length=encoding.n_padded, dtype=float)
    pad_value = float(encoding.pad_value)

    @wp.func
    def start(x: wp.array2d[float], i: int, params: wp.array[float]):
        return Code(pad_value)

    encode = start
    for part in encoding.parts:
        encode = _then(encode, _ENCODE[type(part.config)](part, Code))
    return encode


def _then(head, tail):
    @wp.func
    def encode(x: wp.array2d[float], i: int, params: wp.array[float]):
        return tail(x, i, params, head(x, i, params))

    return encode


def _make_encode_identity(part: Part, Code):
    n_dims, scale, offset = part.config.n_dims, float(part.config.scale), float(part.config.offset)
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def encode_identity(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        for d in range(n_dims):
            y[first_output + d] = scale * x[i, first_input + d] + offset
        return y

    return encode_identity


def _make_encode_triangle_wave(part: Part, Code):
    n_dims, n_frequencies = part.config.n_dims, part.config.n_frequencies
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def encode_triangle_wave(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        for d in range(n_dims):
            frequency = float(0.5)
            for k in range(n_frequencies):
                v = x[i, first_input + d] * frequency + 0.25 * float(k)
                y[first_output + d * n_frequencies + k] = 4.0 * wp.abs(v - wp.floor(v) - 0.5) - 1.0
                frequency = 2.0 * frequency
        return y

    return encode_triangle_wave


@wp.func
def quartic_cdf(x: float, inv_radius: float):
    """Integral of the quartic kernel 15/16 (1 - u²)² up to u = x * inv_radius."""
    u = x * inv_radius
    u2 = u * u
    return wp.clamp(15.0 / 16.0 * u * (1.0 - 2.0 / 3.0 * u2 + 0.2 * u2 * u2) + 0.5, 0.0, 1.0)


@wp.func
def wrapped_cdf(x: float, inv_radius: float):
    return quartic_cdf(x, inv_radius) + quartic_cdf(x - 1.0, inv_radius) + quartic_cdf(x + 1.0, inv_radius)


def _make_encode_one_blob(part: Part, Code):
    n_dims, n_bins, wrap = part.config.n_dims, part.config.n_bins, part.config.wrap
    first_input, first_output = part.first_input, part.first_output
    inv_radius = float(n_bins)

    @wp.func
    def encode_one_blob(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        for d in range(n_dims):
            v = x[i, first_input + d]
            left = float(0.0)
            if wp.static(wrap):
                left = wrapped_cdf(-v, inv_radius)
            for k in range(n_bins):
                boundary = float(k + 1) / inv_radius
                right = float(1.0)
                if wp.static(wrap):
                    right = wrapped_cdf(boundary - v, inv_radius)
                else:
                    if k < n_bins - 1:
                        right = quartic_cdf(boundary - v, inv_radius)
                y[first_output + d * n_bins + k] = right - left
                left = right
        return y

    return encode_one_blob


@cache
def make_grid_corner(grid: HashGrid):
    """Function (x row as vector, level, corner) -> (entry within the level, interpolation weight)."""
    n_dims, n_levels = grid.n_dims, grid.n_levels
    Point = wp.types.vector(length=n_dims, dtype=float)
    Floats = wp.types.vector(length=n_levels, dtype=float)
    Ints = wp.types.vector(length=n_levels, dtype=wp.int32)
    scales = wp.constant(Floats(*[level.scale for level in grid.levels]))
    resolutions = wp.constant(Ints(*[level.resolution for level in grid.levels]))
    sizes = wp.constant(Ints(*[level.n_entries for level in grid.levels]))
    hashed = wp.constant(Ints(*[int(level.hashed) for level in grid.levels]))

    @wp.func
    def grid_corner(point: Point, level: int, corner: int):
        weight = float(1.0)
        stride = wp.uint32(1)
        dense = wp.uint32(0)
        mixed = wp.uint32(0)
        for d in range(n_dims):
            clamped = 0.0
            if point[d] > 0.0:  # false for NaN, which must not become an index
                clamped = wp.min(point[d], 1.0)
            p = clamped * scales[level] + 0.5
            cell = wp.floor(p)
            vertex = wp.uint32(cell)
            if ((corner >> d) & 1) == 1:
                vertex += wp.uint32(1)
                weight = weight * (p - cell)
            else:
                weight = weight * (1.0 - (p - cell))
            dense += vertex * stride
            stride = stride * wp.uint32(resolutions[level])
            if d == 1:
                vertex = vertex * PRIME_1
            if d == 2:
                vertex = vertex * PRIME_2
            if d == 3:
                vertex = vertex * PRIME_3
            mixed = mixed ^ vertex
        entry = dense
        if hashed[level] != 0:
            entry = mixed
        return int(entry % wp.uint32(sizes[level])), weight

    return grid_corner


def _make_encode_grid(part: Part, Code):
    grid = part.config
    grid_corner = make_grid_corner(grid)
    n_dims, n_levels, n_features = grid.n_dims, grid.n_levels, grid.n_features_per_level
    n_corners = 1 << n_dims
    first_input, first_output, first_param = part.first_input, part.first_output, part.first_param
    Point = wp.types.vector(length=n_dims, dtype=float)
    Ints = wp.types.vector(length=n_levels, dtype=wp.int32)
    first_entries = wp.constant(Ints(*[level.first_entry for level in grid.levels]))

    @wp.func
    def encode_grid(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        point = Point()
        for d in range(n_dims):
            point[d] = x[i, first_input + d]
        for level in range(n_levels):
            for f in range(n_features):
                y[first_output + level * n_features + f] = 0.0
            for corner in range(n_corners):
                entry, weight = grid_corner(point, level, corner)
                at = first_param + (first_entries[level] + entry) * n_features
                for f in range(n_features):
                    y[first_output + level * n_features + f] += weight * params[at + f]
        return y

    return encode_grid


_ENCODE = {
    Identity: _make_encode_identity,
    TriangleWave: _make_encode_triangle_wave,
    OneBlob: _make_encode_one_blob,
    HashGrid: _make_encode_grid,
}


@cache
def make_accumulate_grid(encoding: Encoding, part: Part):
    """Kernel that adds the table gradient of one grid for all samples."""
    grid = part.config
    grid_corner = make_grid_corner(grid)
    n_dims, n_features = grid.n_dims, grid.n_features_per_level
    n_corners = 1 << n_dims
    first_input, first_param, first_row = part.first_input, part.first_param, encoding.gradient_row(part)
    Point = wp.types.vector(length=n_dims, dtype=float)
    Ints = wp.types.vector(length=grid.n_levels, dtype=wp.int32)
    first_entries = wp.constant(Ints(*[level.first_entry for level in grid.levels]))

    @wp.kernel(module="unique", module_options=UNIQUE)
    def accumulate_grid_gradient(
        first: int,
        # Params
        n_lanes: int,
        # In
        state: wp.array[int],  # [go, n_rows, ...], see optimizer.py
        x: wp.array2d[float],  # (capacity, n_input_dims)
        dL_dgrid: wp.array3d[float],  # (levels, capacity, n_features_per_level)
        # In/out
        dL_dparams: wp.array[float],
    ):
        """Scatter dL_dgrid into the table. One thread per (level, lane); a lane takes every n_lanes-th sample.

        On the CPU n_lanes is 1, so that each level has one writer.
        """
        i = first + wp.tid()
        level = i // n_lanes
        if state[0] == 0:
            return
        for s in range(i % n_lanes, state[1], n_lanes):
            point = Point()
            for d in range(n_dims):
                point[d] = x[s, first_input + d]
            for corner in range(n_corners):
                entry, weight = grid_corner(point, level, corner)
                at = first_param + (first_entries[level] + entry) * n_features
                for f in range(n_features):
                    wp.atomic_add(dL_dparams, at + f, weight * dL_dgrid[first_row + level, s, f])

    return accumulate_grid_gradient


# Blocks of samples, in C++ with vector types

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
            + ({encoding.gradient_row(part)} + l) * (size_t)features.strides[0] + row_features * (size_t)features.strides[1]);
        for (int s = 0; s < n; ++s)
            for (int f = 0; f < {n_features}; ++f)
                code[s * {n_padded} + {part.first_output} + l * {n_features} + f] = from[s * features.shape[2] + f];
        for (int s = n; s < {BLOCK}; ++s)
            for (int f = 0; f < {n_features}; ++f) code[s * {n_padded} + {part.first_output} + l * {n_features} + f] = 0.0f;
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
