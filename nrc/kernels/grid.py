"""Multiresolution grids: levels, vertices and interpolation weights (Müller et al. 2022, sec. 3)."""

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
def grid_coordinate(x: float, scale: float):
    """Place of input x among a level's vertices."""
    clamped = 0.0
    if x > 0.0:  # false for NaN, which must not become an index
        clamped = wp.min(x, 1.0)
    return clamped * scale + 0.5


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
            p = grid_coordinate(point[d], scales[level])
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
