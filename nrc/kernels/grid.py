"""Multiresolution grids: levels, vertices and interpolation weights (Müller et al. 2022, sec. 3).

The readable twin of `grid_wide.py`, the CPU path. Level sizes, indices and interpolation are tiny-cuda-nn's.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import warp as wp

wp.set_module_options({"enable_backward": False})

GRID_TYPES = ("Hash", "Dense", "Tiled")
INTERPOLATIONS = ("Nearest", "Linear", "Smoothstep")
MAX_PARAMS = 2**31 - 1  # parameters are counted in 32 bits

# Spatial hash of Teschner et al. 2003 as used in Eq. 4, Müller et al. 2022
PRIME_1 = wp.constant(wp.uint32(2654435761))
PRIME_2 = wp.constant(wp.uint32(805459861))
PRIME_3 = wp.constant(wp.uint32(3674653429))


@dataclass(frozen=True)
class Level:
    """One resolution level of a grid. Entries count vertices, each `n_features_per_level` parameters."""

    scale: float
    resolution: int
    first_entry: int
    n_entries: int
    hashed: bool
    tiled: bool  # fewer entries than vertices, and not hashed: entries repeat in row-major order


@dataclass(frozen=True)
class Grid:
    """Multiresolution grid over `n_dims` inputs in [0, 1], which it clamps.

    Attributes:
        type: Hash: at most 2^log2_hashmap_size entries per level, found by hashing where vertices outnumber them.
            Dense: one entry per vertex. Tiled: at most base_resolution^n_dims entries per level, repeated; its
            row-major index is computed modulo 2^32 (tiny-cuda-nn reads entry 0 alone where it would be larger).
        interpolation: Linear; Smoothstep, whose weights are 3 w^2 - 2 w^3; Nearest, which has no derivative by inputs.

    Raises:
        ValueError: Option out of range, or 2^31 and more parameters.
    """

    n_dims: int
    n_levels: int = 16
    n_features_per_level: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 2.0
    type: str = "Hash"
    interpolation: str = "Linear"
    pad_value = 0.0

    def __post_init__(self) -> None:
        if self.type not in GRID_TYPES:
            raise ValueError(f"unknown grid type {self.type!r}; allowed: {', '.join(GRID_TYPES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
        if self.n_dims not in (2, 3, 4):
            raise ValueError(f"a grid encodes 2, 3 or 4 dimensions, got {self.n_dims}")
        if self.n_features_per_level not in (1, 2, 4, 8):
            raise ValueError(f"n_features_per_level must be 1, 2, 4 or 8, got {self.n_features_per_level}")
        if not 1 <= self.n_levels <= 128:
            raise ValueError(f"n_levels must be 1 ... 128, got {self.n_levels}")
        if not 3 <= self.log2_hashmap_size <= 27:
            raise ValueError(f"log2_hashmap_size must be 3 ... 27, got {self.log2_hashmap_size}")
        if not 1 <= self.base_resolution <= 2**30 or not 1.0 <= self.per_level_scale < math.inf:
            raise ValueError("base_resolution must be 1 ... 2^30 and per_level_scale at least 1")
        # In powers of two first: the last level's resolution need not be a float
        log2_resolution = math.log2(self.base_resolution) + (self.n_levels - 1) * math.log2(self.per_level_scale)
        if log2_resolution > 30.0:
            raise ValueError(f"the finest level's resolution 2^{log2_resolution:.1f} exceeds 2^30")
        if self.n_params > MAX_PARAMS:
            raise ValueError(
                f"the {self.type} grid has {self.n_params} parameters, more than 2^31 - 1: choose fewer or smaller "
                f"levels (finest resolution {self.levels[-1].resolution})"
            )
        if self.type == "Tiled" and self.levels[-1].n_entries * self.n_features_per_level % 8:
            raise ValueError(
                "a Tiled grid needs base_resolution^n_dims * n_features_per_level to be a multiple of 8, "
                f"got {self.base_resolution}^{self.n_dims} * {self.n_features_per_level}"
            )

    @property
    def n_output_dims(self) -> int:
        return self.n_levels * self.n_features_per_level

    @property
    def alignment(self) -> int:
        """Its first output column is a multiple of this, as in tiny-cuda-nn."""
        return self.n_features_per_level

    @property
    def n_corners(self) -> int:
        """Vertices that a sample reads in each level."""
        return 1 if self.interpolation == "Nearest" else 1 << self.n_dims

    @property
    def levels(self) -> tuple[Level, ...]:
        return _grid_levels(self)

    @property
    def n_params(self) -> int:
        last = self.levels[-1]
        return (last.first_entry + last.n_entries) * self.n_features_per_level


@cache
def _grid_levels(grid: Grid) -> tuple[Level, ...]:
    """Scale, resolution and size of each level in single precision, as tiny-cuda-nn computes them."""
    levels = []
    first = 0
    log2_scale = _f32(math.log2(_f32(grid.per_level_scale)))
    for i in range(grid.n_levels):
        scale = _f32(_f32(_f32(2.0 ** _f32(i * log2_scale)) * grid.base_resolution) - 1.0)
        resolution = math.ceil(scale) + 1
        n_vertices = resolution**grid.n_dims
        n_entries = -(-n_vertices // 8) * 8
        if grid.type == "Hash":
            n_entries = min(n_entries, 1 << grid.log2_hashmap_size)
        elif grid.type == "Tiled":
            n_entries = min(n_entries, grid.base_resolution**grid.n_dims)
        fewer = n_vertices > n_entries
        hashed = grid.type == "Hash" and fewer
        levels.append(Level(scale, resolution, first, n_entries, hashed, fewer and not hashed))
        first += n_entries
    return tuple(levels)


def _f32(x: float) -> float:
    return ctypes.c_float(x).value


# Functions (i) -> values[i]. The table lies in constant memory; a thread that reads it does not build it first.


@cache
def make_int_table(values: tuple[int, ...]):
    @wp.func_native(f"static const int table[] = {{{', '.join(map(str, values))}}};\nreturn table[i];")
    def whole_number(i: int) -> int: ...

    return whole_number


@cache
def make_float_table(values: tuple[float, ...]):
    @wp.func_native(
        f"static const float table[] = {{{', '.join(f'{float(v)!r}f' for v in values)}}};\nreturn table[i];"
    )
    def number(i: int) -> float: ...

    return number


# One rounding where the processor can, as in tiny-cuda-nn: at a fine level a rounding is a part of a cell
@wp.func_native("""
#if defined(__CUDA_ARCH__)
    return fmaf(x, scale, 0.5f);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(x, scale, 0.5f);
#else
    return x * scale + 0.5f;
#endif
""")
def grid_position(x: float, scale: float) -> float:
    """Place of input x in [0, 1] among a level's vertices."""


@cache
def make_grid_cell(grid: Grid):
    """Function (point, level) -> (lowest vertex of its cell, weight of the far vertex per axis, its derivative)."""
    n_dims, interpolation = grid.n_dims, grid.interpolation
    Point = wp.types.vector(length=n_dims, dtype=float)
    Vertex = wp.types.vector(length=n_dims, dtype=wp.uint32)
    scale_of = make_float_table(tuple(level.scale for level in grid.levels))

    @wp.func
    def grid_cell(point: Point, level: int):
        vertex = Vertex()
        weight = Point()
        slope = Point()
        scale = scale_of(level)
        for d in range(n_dims):
            x = point[d]
            clamped = float(0.0)
            inside = float(0.0)  # the weight is constant where the input is clamped
            if x >= 0.0:  # false for NaN, which must not become an index
                clamped = wp.min(x, 1.0)
                if x <= 1.0:
                    inside = scale
            position = grid_position(clamped, scale)
            cell = wp.floor(position)
            vertex[d] = wp.uint32(cell)
            w = position - cell
            if wp.static(interpolation == "Linear"):
                weight[d] = w
                slope[d] = inside
            if wp.static(interpolation == "Smoothstep"):
                weight[d] = w * w * (3.0 - 2.0 * w)
                slope[d] = inside * 6.0 * w * (1.0 - w)
        return vertex, weight, slope

    return grid_cell


@cache
def make_first_entry(grid: Grid):
    """Function (level) -> first entry of the level."""
    return make_int_table(tuple(level.first_entry for level in grid.levels))


@cache
def make_grid_entry(grid: Grid):
    """Function (lowest vertex of a cell, level, corner) -> entry of that corner within the level."""
    n_dims = grid.n_dims
    Vertex = wp.types.vector(length=n_dims, dtype=wp.uint32)
    resolution_of = make_int_table(tuple(level.resolution for level in grid.levels))
    size_of = make_int_table(tuple(level.n_entries for level in grid.levels))
    kind_of = make_int_table(tuple(1 if level.hashed else 2 if level.tiled else 0 for level in grid.levels))

    @wp.func
    def grid_entry(cell: Vertex, level: int, corner: int):
        resolution = wp.uint32(resolution_of(level))
        size = wp.uint32(size_of(level))
        kind = kind_of(level)
        stride = wp.uint32(1)
        row_major = wp.uint32(0)
        mixed = wp.uint32(0)
        for d in range(n_dims):
            vertex = cell[d] + wp.uint32((corner >> d) & 1)
            row_major += vertex * stride
            stride = stride * resolution
            if d == 1:
                vertex = vertex * PRIME_1
            if d == 2:
                vertex = vertex * PRIME_2
            if d == 3:
                vertex = vertex * PRIME_3
            mixed = mixed ^ vertex
        if kind == 1:
            return int(mixed & (size - wp.uint32(1)))  # a power of two
        if kind == 2:
            return int(row_major % size)
        # The far neighbour at x = 1 lies one row past the end: wrap it (at most one turn, as x is clamped)
        if row_major >= size:
            row_major -= size
        return int(row_major)

    return grid_entry


@cache
def make_corner_weight(grid: Grid):
    """Functions (axis weights, corner) -> weight and (axis weights, slopes, corner, d) -> its derivative by input d."""
    n_dims = grid.n_dims
    Point = wp.types.vector(length=n_dims, dtype=float)

    @wp.func
    def corner_weight(weight: Point, corner: int):
        product = float(1.0)
        for d in range(n_dims):
            if ((corner >> d) & 1) == 1:
                product = product * weight[d]
            else:
                product = product * (1.0 - weight[d])
        return product

    @wp.func
    def corner_slope(weight: Point, slope: Point, corner: int, d: int):
        factors = weight
        factors[d] = float((corner >> d) & 1)  # leaves the product of the others
        product = corner_weight(factors, corner) * slope[d]
        if ((corner >> d) & 1) == 0:
            product = -product
        return product

    return corner_weight, corner_slope


def make_encode_grid(part: Any, Code):
    grid = part.config
    grid_cell, grid_entry = make_grid_cell(grid), make_grid_entry(grid)
    corner_weight, _ = make_corner_weight(grid)
    n_dims, n_levels, n_features, n_corners = grid.n_dims, grid.n_levels, grid.n_features_per_level, grid.n_corners
    first_input, first_output, first_param = part.first_input, part.first_output, part.first_param
    Point = wp.types.vector(length=n_dims, dtype=float)
    first_entry = make_first_entry(grid)

    @wp.func
    def encode_grid(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        point = Point()
        for d in range(n_dims):
            point[d] = x[i, first_input + d]
        for level in range(n_levels):
            for f in range(n_features):
                y[first_output + level * n_features + f] = 0.0
            cell, axis_weights, _slopes = grid_cell(point, level)
            for corner in range(n_corners):
                at = first_param + (first_entry(level) + grid_entry(cell, level, corner)) * n_features
                weight = corner_weight(axis_weights, corner)
                for f in range(n_features):
                    y[first_output + level * n_features + f] += weight * params[at + f]
        return y

    return encode_grid


def make_backward_grid(part: Any, Code, Input):
    grid = part.config
    if grid.interpolation == "Nearest":
        return _no_gradient(Code, Input)
    grid_cell, grid_entry = make_grid_cell(grid), make_grid_entry(grid)
    _, corner_slope = make_corner_weight(grid)
    n_dims, n_levels, n_features, n_corners = grid.n_dims, grid.n_levels, grid.n_features_per_level, grid.n_corners
    first_input, first_output, first_param = part.first_input, part.first_output, part.first_param
    Point = wp.types.vector(length=n_dims, dtype=float)
    first_entry = make_first_entry(grid)

    @wp.func
    def backward_grid(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        point = Point()
        for d in range(n_dims):
            point[d] = x[i, first_input + d]
        for level in range(n_levels):
            cell, weights, slopes = grid_cell(point, level)
            for corner in range(n_corners):
                at = first_param + (first_entry(level) + grid_entry(cell, level, corner)) * n_features
                dL_dweight = float(0.0)
                for f in range(n_features):
                    dL_dweight += dL_dcode[first_output + level * n_features + f] * params[at + f]
                for d in range(n_dims):
                    g[first_input + d] += corner_slope(weights, slopes, corner, d) * dL_dweight
        return g

    return backward_grid


def _no_gradient(Code, Input):
    @wp.func
    def backward_constant(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        return dL_dx

    return backward_constant
