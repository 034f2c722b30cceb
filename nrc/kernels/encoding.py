"""Input encodings put together: the columns and parameters of their parts, their functions of one sample, kernels.

Each encoding is a frozen config (`encoding_parts.py`, `grid.py`). `make_encode` turns their composite into a Warp
function for one sample, `make_encode_backward` into its derivative by the inputs: the CUDA path, and the readable twin
of `encoding_wide.py`, the CPU path.

Inputs live in [0, 1]; grids clamp what lies outside. Semantics, names and defaults are those of tiny-cuda-nn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import warp as wp

from . import encoding_parts as parts
from . import grid
from .encoding_parts import Part, SphericalHarmonics

wp.set_module_options({"enable_backward": False})

UNIQUE = {"enable_backward": False, "max_unroll": 4}  # options of every kernel made by a factory

# Factories of a part's functions (forward, backward)
_FUNCTIONS = {
    parts.Identity: (parts.make_encode_identity, parts.make_backward_identity),
    parts.Frequency: (parts.make_encode_frequency, parts.make_backward_frequency),
    parts.TriangleWave: (parts.make_encode_triangle_wave, parts.make_backward_triangle_wave),
    parts.OneBlob: (parts.make_encode_one_blob, parts.make_backward_one_blob),
    SphericalHarmonics: (parts.make_encode_spherical_harmonics, parts.make_backward_spherical_harmonics),
    grid.Grid: (grid.make_encode_grid, grid.make_backward_grid),
}


@dataclass(frozen=True)
class EncodingConfig:
    """Concatenated parts in `n_padded` columns, a multiple of 16. Made by `compose`."""

    parts: tuple[Part, ...]
    n_padded: int

    @property
    def n_input_dims(self) -> int:
        return max(p.first_input + p.config.n_dims for p in self.parts)

    @property
    def n_output_dims(self) -> int:
        """Columns without the final padding."""
        return self.n_padded - self.final_padding[1]

    @property
    def final_padding(self) -> tuple[int, int]:
        """(first column, number) of the constant columns that fill up to `n_padded`."""
        last = self.parts[-1]
        if isinstance(last.config, SphericalHarmonics):
            first = self.parts[-2].end_output if len(self.parts) > 1 else 0
            return first, last.first_output - first
        return last.end_output, self.n_padded - last.end_output

    @property
    def gaps(self) -> tuple[tuple[int, int, float], ...]:
        """(first column, end, value) of the constant columns between the parts and behind them."""
        gaps, column, owner = [], 0, self.parts[0]
        for part in self.parts:
            if part.first_output > column:
                owner = part if isinstance(part.config, SphericalHarmonics) else owner
                gaps.append((column, part.first_output, owner.config.pad_value))
            column, owner = part.end_output, part
        if self.n_padded > column:
            gaps.append((column, self.n_padded, owner.config.pad_value))
        return tuple(gaps)

    @property
    def first_param(self) -> int:
        return self.parts[0].first_param

    @property
    def n_params(self) -> int:
        return sum(p.config.n_params for p in self.parts)

    @property
    def grids(self) -> tuple[Part, ...]:
        return tuple(p for p in self.parts if isinstance(p.config, grid.Grid))

    def gradient_row(self, part: Part) -> int:
        """First row of `part`'s levels in the dL_dgrid buffer, which holds one row of samples per grid level."""
        return sum(p.config.n_levels for p in self.grids if p.first_output < part.first_output)


def compose(configs: Sequence[tuple[Any, int]], first_param: int) -> EncodingConfig:
    """Put (config, first input column) pairs side by side, their parameters one after the other from `first_param` on.

    As in tiny-cuda-nn, an encoding is padded so that the next one starts at a multiple of its `alignment`, and the last
    one to a multiple of 16. Raises ValueError if the parameters cannot be counted in 32 bits.
    """
    placed = []
    column, param = 0, first_param
    for i, (config, first_input) in enumerate(configs):
        alignment = configs[i + 1][0].alignment if i + 1 < len(configs) else 16
        end = -(-(column + config.n_output_dims) // alignment) * alignment
        padded_first = isinstance(config, SphericalHarmonics)
        first_output = end - config.n_output_dims if padded_first else column
        placed.append(Part(config, first_input, first_output, param))
        column, param = end, param + config.n_params
    if param > grid.MAX_PARAMS:
        raise ValueError(f"{param} parameters are more than 2^31 - 1")
    return EncodingConfig(tuple(placed), column)


@wp.func
def n_valid_rows(n_rows: int, count: wp.array[int]):
    """Rows to evaluate: all, or the number on the device where `count` is given."""
    if count.shape[0] > 0:
        return wp.clamp(count[0], 0, n_rows)
    return n_rows


@cache
def make_encode(encoding: EncodingConfig):
    """Function (x, i, params) -> vector of `n_padded` encoded values of row i."""
    Code = wp.types.vector(length=encoding.n_padded, dtype=float)
    values = [0.0] * encoding.n_padded
    for begin, end, value in encoding.gaps:
        values[begin:end] = [value] * (end - begin)
    padding = wp.constant(Code(*values))

    @wp.func
    def start(x: wp.array2d[float], i: int, params: wp.array[float]):
        return padding

    encode = start
    for part in encoding.parts:
        encode = _then(encode, _FUNCTIONS[type(part.config)][0](part, Code))
    return encode


def _then(head, tail):
    @wp.func
    def encode(x: wp.array2d[float], i: int, params: wp.array[float]):
        return tail(x, i, params, head(x, i, params))

    return encode


@cache
def make_encode_backward(encoding: EncodingConfig):
    """Function (x, i, params, dL_dcode vector of `n_padded`) -> dL_dx of row i, vector of `n_input_dims`."""
    Code = wp.types.vector(length=encoding.n_padded, dtype=float)
    Input = wp.types.vector(length=encoding.n_input_dims, dtype=float)

    @wp.func
    def start(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code):
        return Input()

    backward = start
    for part in encoding.parts:
        backward = _then_backward(backward, _FUNCTIONS[type(part.config)][1](part, Code, Input), Code)
    return backward


def _then_backward(head, tail, Code):
    @wp.func
    def backward(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code):
        return tail(x, i, params, dL_dcode, head(x, i, params, dL_dcode))

    return backward


# Kernels. Codes in memory come with the final padding's columns or without: without, the columns behind it move up.


@cache
def make_encode_rows(encoding: EncodingConfig):
    """Kernel that encodes rows of `x`."""
    encode, n_padded = make_encode(encoding), encoding.n_padded
    padding_begin, n_padding = encoding.final_padding

    @wp.kernel(module="unique", module_options=UNIQUE)
    def encode_rows(
        first: int,
        # Params
        params: wp.array[float],
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        # Out
        out_code: wp.array2d[float],  # (capacity, n_output_dims)
    ):
        """Encode one row, without the final padding. One thread per row."""
        i = first + wp.tid()
        if i >= n_valid_rows(n_rows, count):
            return
        code = encode(x, i, params)
        for k in range(padding_begin):
            out_code[i, k] = code[k]
        for k in range(padding_begin + n_padding, n_padded):
            out_code[i, k - n_padding] = code[k]

    return encode_rows


@cache
def make_input_gradient(encoding: EncodingConfig, dtype: type):
    """Kernel that carries gradients of codes, of type `dtype`, on to the inputs."""
    encode_backward, n_padded, n_dims = make_encode_backward(encoding), encoding.n_padded, encoding.n_input_dims
    padding_begin, n_padding = encoding.final_padding
    Code = wp.types.vector(length=n_padded, dtype=float)

    @wp.kernel(module="unique", module_options=UNIQUE)
    def accumulate_input_gradient(
        first: int,
        # Params
        params: wp.array[float],
        gradient_scale: float,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        dL_dcode: wp.array2d[dtype],  # (capacity, n_padded or n_output_dims)
        # In/out
        dL_dx: wp.array2d[float],  # (capacity, n_input_dims)
    ):
        """Add gradient_scale times the gradient of the inputs. One thread per row."""
        i = first + wp.tid()
        if i >= n_valid_rows(n_rows, count):
            return
        moved = n_padded - dL_dcode.shape[1]
        upstream = Code()
        for k in range(padding_begin):
            upstream[k] = float(dL_dcode[i, k])
        for k in range(padding_begin + n_padding, n_padded):
            upstream[k] = float(dL_dcode[i, k - moved])
        gradient = encode_backward(x, i, params, upstream)
        for d in range(n_dims):
            dL_dx[i, d] = dL_dx[i, d] + gradient_scale * gradient[d]

    return accumulate_input_gradient


@cache
def make_split_gradient(encoding: EncodingConfig):
    """Kernel that sorts the grid columns of gradients of codes by level, as the tables' gradients need them."""
    padding_end, n_padded = sum(encoding.final_padding), encoding.n_padded
    n_levels = sum(part.config.n_levels for part in encoding.grids)
    columns, widths = [0] * max(1, n_levels), [0] * max(1, n_levels)
    for part in encoding.grids:
        for level in range(part.config.n_levels):
            row, width = encoding.gradient_row(part) + level, part.config.n_features_per_level
            columns[row], widths[row] = part.first_output + level * width, width
    first_column, n_columns = grid.make_int_table(tuple(columns)), grid.make_int_table(tuple(widths))

    @wp.kernel(module="unique", module_options=UNIQUE)
    def split_gradient(
        first: int,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        dL_dcode: wp.array2d[float],  # (capacity, n_padded or n_output_dims)
        # Out
        out_dL_dgrid: wp.array3d[float],  # (levels, capacity, n_features_per_level)
    ):
        """Copy the gradients of a row's grid features. One thread per row."""
        i = first + wp.tid()
        if i >= n_valid_rows(n_rows, count):
            return
        for level in range(n_levels):
            column = first_column(level)
            if column >= padding_end:
                column -= n_padded - dL_dcode.shape[1]
            for f in range(n_columns(level)):
                out_dL_dgrid[level, i, f] = dL_dcode[i, column + f]

    return split_gradient
