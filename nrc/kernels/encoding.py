"""Input encodings: hash grid, triangle wave, one-blob, identity, and their composite.

Each encoding is a frozen config. `make_encode` turns it into a Warp function for one sample, `make_encode_backward`
into its derivative by the inputs and `make_accumulate_grid` into the gradient of a grid's table: the CUDA path, and the
readable twin of `encoding_wide.py`, the CPU path.

Inputs live in [0, 1]; grids clamp what lies outside. Semantics, names and defaults are those of tiny-cuda-nn.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import warp as wp

from .grid import HashGrid, grid_coordinate, make_grid_corner

wp.set_module_options({"enable_backward": False})

UNIQUE = {"enable_backward": False, "max_unroll": 4}  # options of every kernel made by a factory


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

    config: Any  # HashGrid, TriangleWave, OneBlob or Identity
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


# Derivatives by the inputs. At a kink (a triangle wave's turn, a cell's face) they are those of one side.


@cache
def make_encode_backward(encoding: Encoding):
    """Function (x, i, params, dL_dcode vector of `n_padded`) -> dL_dx of row i, vector of `n_input_dims`."""
    Code = wp.types.vector(length=encoding.n_padded, dtype=float)
    Input = wp.types.vector(length=encoding.n_input_dims, dtype=float)

    @wp.func
    def start(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code):
        return Input()

    backward = start
    for part in encoding.parts:
        backward = _then_backward(backward, _ENCODE_BACKWARD[type(part.config)](part, Code, Input), Code)
    return backward


def _then_backward(head, tail, Code):
    @wp.func
    def backward(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code):
        return tail(x, i, params, dL_dcode, head(x, i, params, dL_dcode))

    return backward


def _make_backward_identity(part: Part, Code, Input):
    n_dims, scale = part.config.n_dims, float(part.config.scale)
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def backward_identity(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        for d in range(n_dims):
            g[first_input + d] += scale * dL_dcode[first_output + d]
        return g

    return backward_identity


def _make_backward_triangle_wave(part: Part, Code, Input):
    n_dims, n_frequencies = part.config.n_dims, part.config.n_frequencies
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def backward_triangle_wave(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        for d in range(n_dims):
            frequency = float(0.5)
            for k in range(n_frequencies):
                v = x[i, first_input + d] * frequency + 0.25 * float(k)
                slope = 4.0 * frequency
                if v - wp.floor(v) < 0.5:
                    slope = -slope
                g[first_input + d] += slope * dL_dcode[first_output + d * n_frequencies + k]
                frequency = 2.0 * frequency
        return g

    return backward_triangle_wave


@wp.func
def quartic_pdf(x: float, inv_radius: float):
    """Derivative of `quartic_cdf` by x."""
    u = x * inv_radius
    rest = wp.max(1.0 - u * u, 0.0)
    return 15.0 / 16.0 * inv_radius * rest * rest


@wp.func
def wrapped_pdf(x: float, inv_radius: float):
    return quartic_pdf(x, inv_radius) + quartic_pdf(x - 1.0, inv_radius) + quartic_pdf(x + 1.0, inv_radius)


def _make_backward_one_blob(part: Part, Code, Input):
    n_dims, n_bins, wrap = part.config.n_dims, part.config.n_bins, part.config.wrap
    first_input, first_output = part.first_input, part.first_output
    inv_radius = float(n_bins)

    @wp.func
    def backward_one_blob(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        for d in range(n_dims):
            v = x[i, first_input + d]
            left = float(0.0)
            if wp.static(wrap):
                left = wrapped_pdf(-v, inv_radius)
            for k in range(n_bins):
                boundary = float(k + 1) / inv_radius
                right = float(0.0)
                if wp.static(wrap):
                    right = wrapped_pdf(boundary - v, inv_radius)
                else:
                    if k < n_bins - 1:
                        right = quartic_pdf(boundary - v, inv_radius)
                g[first_input + d] += (left - right) * dL_dcode[first_output + d * n_bins + k]
                left = right
        return g

    return backward_one_blob


def _make_backward_grid(part: Part, Code, Input):
    grid = part.config
    grid_corner = make_grid_corner(grid)
    n_dims, n_levels, n_features = grid.n_dims, grid.n_levels, grid.n_features_per_level
    n_corners = 1 << n_dims
    first_input, first_output, first_param = part.first_input, part.first_output, part.first_param
    Point = wp.types.vector(length=n_dims, dtype=float)
    Floats = wp.types.vector(length=n_levels, dtype=float)
    Ints = wp.types.vector(length=n_levels, dtype=wp.int32)
    scales = wp.constant(Floats(*[level.scale for level in grid.levels]))
    first_entries = wp.constant(Ints(*[level.first_entry for level in grid.levels]))

    @wp.func
    def backward_grid(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        point = Point()
        for d in range(n_dims):
            point[d] = x[i, first_input + d]
        for level in range(n_levels):
            for corner in range(n_corners):
                entry, _weight = grid_corner(point, level, corner)
                at = first_param + (first_entries[level] + entry) * n_features
                dL_dweight = float(0.0)
                for f in range(n_features):
                    dL_dweight += dL_dcode[first_output + level * n_features + f] * params[at + f]
                for d in range(n_dims):
                    if point[d] >= 0.0 and point[d] <= 1.0:  # constant where clamped
                        slope = scales[level]  # of this input's factor of the weight, times the other factors
                        for e in range(n_dims):
                            p = grid_coordinate(point[e], scales[level])
                            fraction = p - wp.floor(p)
                            if e == d:
                                if ((corner >> e) & 1) == 0:
                                    slope = -slope
                            elif ((corner >> e) & 1) == 1:
                                slope = slope * fraction
                            else:
                                slope = slope * (1.0 - fraction)
                        g[first_input + d] += slope * dL_dweight
        return g

    return backward_grid


_ENCODE_BACKWARD = {
    Identity: _make_backward_identity,
    TriangleWave: _make_backward_triangle_wave,
    OneBlob: _make_backward_one_blob,
    HashGrid: _make_backward_grid,
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
