"""The steps of a network in Warp's tile language: a tile of rows in shared memory goes through all layers.

The tile's values `h` are of the type of the products' operands (fp16, or fp32 in tests), next to the fp32 `sums` of the
layer at hand. A product runs over blocks of the weights, which `pack_weights` in `network_tile.py` has laid one after
the other.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import warp as wp

from .activation import make_activation, needs_sum
from .network import NetworkConfig

wp.set_module_options({"enable_backward": False})

MAX_BLOCK = 64  # rows and columns of a block of weights
ROW_PAD = 8  # columns that shift the shared rows of `h` against each other in the memory banks
SHARED_MEMORY = 60 * 1024  # bytes that a block of threads takes where it can: older cards have 64 kB
GRADIENT_ROWS = 64  # rows per product of a weight gradient


@dataclass(frozen=True)
class Tiling:
    """How a network's matrices are cut: rows of a tile, blocks of weights, places in the packed weights."""

    network: NetworkConfig
    dtype: Any

    @property
    def block(self) -> int:
        """Rows and columns of a block, of all but the first matrix's rows."""
        return _largest_block(self.network.n_neurons, MAX_BLOCK)

    @property
    def input_block(self) -> int:
        """Rows of a block of the first matrix."""
        return _largest_block(self.network.n_inputs, self.block)

    @property
    def n_outputs(self) -> int:
        """Outputs, padded with zeros to whole blocks."""
        return -(-self.network.n_outputs // self.block) * self.block

    @property
    def width(self) -> int:
        """Columns of a tile: those of the widest layer."""
        return max(self.network.n_inputs, self.network.n_neurons, self.n_outputs)

    @property
    def padded_width(self) -> int:
        """Columns of `h` in shared memory."""
        return self.width + ROW_PAD

    @property
    def rows(self) -> int:
        """Rows of a tile: 128, less where shared memory would not do."""
        rows = 128
        while rows > 32 and self.shared_memory(rows) > SHARED_MEMORY:
            rows //= 2
        return rows

    def shared_memory(self, rows: int) -> int:
        """Bytes of shared memory of a tile: values, sums, and a block of weights."""
        size = wp.types.type_size_in_bytes(self.dtype)
        return rows * (self.padded_width * size + self.width * 4) + self.block * self.block * size

    @property
    def n_packed(self) -> int:
        """Packed weights: every matrix, then every matrix transposed."""
        return 2 * self.last_matrix(self.network.n_hidden_layers - 1) + 2 * self.network.n_neurons * self.n_outputs

    def last_matrix(self, n_hidden_matrices: int) -> int:
        """Place of the matrix behind the first and so many hidden ones, in `params` and in each half of the packed."""
        n_neurons = self.network.n_neurons
        return self.network.n_inputs * n_neurons + n_hidden_matrices * n_neurons * n_neurons

    @property
    def n_delta_columns(self) -> int:
        """Columns of the stored deltas: hidden layers, then the padded outputs."""
        return self.network.n_hidden_layers * self.network.n_neurons + self.n_outputs

    @property
    def n_gradient_blocks(self) -> int:
        """Thread blocks per chunk of `accumulate_weight_gradient_tile`: one per block of weights, one for the loss."""
        n = self.network.n_neurons // self.block
        n_hidden = (self.network.n_hidden_layers - 1) * n * n
        return self.network.n_inputs // self.input_block * n + n_hidden + n * self.n_outputs // self.block + 1


def _largest_block(n: int, limit: int) -> int:
    """The largest multiple of 16 up to `limit` that divides `n`."""
    return max(size for size in range(16, limit + 1, 16) if n % size == 0)


@cache
def make_product(tiling: Tiling, inner_block: int, column_block: int):
    """Function that multiplies `h` with packed weights: (rows, n_inner blocks) x (n_inner, n_columns blocks)."""
    dtype, rows, width, padded_width = tiling.dtype, tiling.rows, tiling.width, tiling.padded_width
    size = wp.types.type_size_in_bytes(dtype)

    @wp.func
    def product(
        h: wp.tile[dtype, rows, padded_width],
        weights: wp.array[dtype],
        first: int,
        n_inner: int,
        n_columns: int,
        sums: wp.tile[float, rows, width],
    ):
        at = first
        for j in range(n_columns):
            columns = wp.tile_view(sums, offset=(0, j * column_block), shape=(rows, column_block))
            for k in range(n_inner):
                matrix = wp.array(
                    ptr=weights.ptr + wp.uint64(at * size), shape=(inner_block, column_block), dtype=dtype
                )
                block = wp.tile_load(matrix, shape=(inner_block, column_block), storage="shared")
                values = wp.tile_view(h, offset=(0, k * inner_block), shape=(rows, inner_block))
                wp.tile_matmul(values, block, columns, beta=wp.where(k == 0, 0.0, 1.0))
                at += inner_block * column_block

    return product


@cache
def make_set_row(tiling: Tiling, length: int):
    """Function that sets the first `length` columns of a row of `h`. Synchronise before others read it."""
    dtype, rows, padded_width = tiling.dtype, tiling.rows, tiling.padded_width
    Row = wp.types.vector(length=length, dtype=dtype)

    @wp.func_native(f"for (int k = 0; k < {length}; ++k) h.data(wp::tile_coord(i, k)) = row[k];")
    def set_row(h: wp.tile[dtype, rows, padded_width], i: int, row: Row): ...

    return Row, set_row


@wp.func_native("WP_TILE_SYNC();")
def synchronize_block(): ...


@cache
def _make_apply(tiling: Tiling, keep: bool):
    """Function that applies the activation to `sums` and places the values in `h`; `keep` stores them as well."""
    network, dtype = tiling.network, tiling.dtype
    rows, width, padded_width, block = tiling.rows, tiling.width, tiling.padded_width, tiling.block
    n_neurons = network.n_neurons
    activate, _ = make_activation(network.activation)
    keep_sums = keep and needs_sum(network.activation)

    @wp.func
    def activate_to(v: float):
        return dtype(activate(v))

    @wp.func
    def convert(v: float):
        return dtype(v)

    @wp.func
    def apply(
        sums: wp.tile[float, rows, width],
        h: wp.tile[dtype, rows, padded_width],
        row: int,
        layer: int,
        activations: wp.array2d[dtype],
        deltas: wp.array2d[dtype],
    ):
        for j in range(n_neurons // block):
            v = wp.tile_view(sums, offset=(0, j * block), shape=(rows, block))
            y = wp.tile_map(activate_to, v)
            wp.tile_assign(h, y, offset=(0, j * block))
            if wp.static(keep):
                at = wp.static(network.n_inputs) + layer * n_neurons + j * block
                wp.tile_store(activations, y, offset=(row, at))
            if wp.static(keep_sums):  # until the delta takes their place
                wp.tile_store(deltas, wp.tile_map(convert, v), offset=(row, layer * n_neurons + j * block))

    return apply


@cache
def make_forward(tiling: Tiling, keep: bool):
    """Function that takes the codes in `h` through all layers and leaves the outputs' pre-activations in `sums`."""
    network, dtype = tiling.network, tiling.dtype
    rows, width, padded_width = tiling.rows, tiling.width, tiling.padded_width
    block, input_block = tiling.block, tiling.input_block
    n_hidden, n_neurons = network.n_hidden_layers, network.n_neurons
    first_hidden, first_output = tiling.last_matrix(0), tiling.last_matrix(n_hidden - 1)
    n_input_blocks, n_blocks, n_output_blocks = (
        network.n_inputs // input_block,
        n_neurons // block,
        tiling.n_outputs // block,
    )
    first_product = make_product(tiling, input_block, block)
    product = make_product(tiling, block, block)
    apply = _make_apply(tiling, keep)

    @wp.func
    def forward(
        h: wp.tile[dtype, rows, padded_width],
        sums: wp.tile[float, rows, width],
        weights: wp.array[dtype],
        row: int,
        activations: wp.array2d[dtype],
        deltas: wp.array2d[dtype],
    ):
        first_product(h, weights, 0, n_input_blocks, n_blocks, sums)
        apply(sums, h, row, 0, activations, deltas)
        layer = int(1)
        while layer < n_hidden:
            at = first_hidden + (layer - 1) * n_neurons * n_neurons
            product(h, weights, at, n_blocks, n_blocks, sums)
            apply(sums, h, row, layer, activations, deltas)
            layer += 1
        product(h, weights, first_output, n_blocks, n_output_blocks, sums)

    return forward


@cache
def _make_apply_derivative(tiling: Tiling):
    """Function that turns `sums`, gradients by a layer's values, into its deltas: in `h` and stored."""
    network, dtype = tiling.network, tiling.dtype
    rows, width, padded_width, block = tiling.rows, tiling.width, tiling.padded_width, tiling.block
    n_inputs, n_neurons = network.n_inputs, network.n_neurons
    _, derivative = make_activation(network.activation)
    from_sums = needs_sum(network.activation)

    @wp.func
    def delta_of(gradient: float, y: dtype, v: dtype):
        delta = gradient * derivative(float(v), float(y))
        if not wp.isfinite(y):
            delta = wp.nan
        return dtype(delta)

    @wp.func
    def apply_derivative(
        sums: wp.tile[float, rows, width],
        h: wp.tile[dtype, rows, padded_width],
        row: int,
        layer: int,
        activations: wp.array2d[dtype],
        deltas: wp.array2d[dtype],
    ):
        for j in range(n_neurons // block):
            at = layer * n_neurons + j * block
            gradient = wp.tile_view(sums, offset=(0, j * block), shape=(rows, block))
            y = wp.tile_load(activations, shape=(rows, block), offset=(row, n_inputs + at))
            if wp.static(from_sums):
                v = wp.tile_load(deltas, shape=(rows, block), offset=(row, at))
                delta = wp.tile_map(delta_of, gradient, y, v)
                wp.tile_assign(h, delta, offset=(0, j * block))
                wp.tile_store(deltas, delta, offset=(row, at))
            else:
                delta = wp.tile_map(delta_of, gradient, y, y)
                wp.tile_assign(h, delta, offset=(0, j * block))
                wp.tile_store(deltas, delta, offset=(row, at))

    return apply_derivative


@cache
def make_backward(tiling: Tiling):
    """Function that takes the outputs' deltas in `h` back to the first layer's."""
    network, dtype = tiling.network, tiling.dtype
    rows, width, padded_width, block = tiling.rows, tiling.width, tiling.padded_width, tiling.block
    n_hidden, n_neurons = network.n_hidden_layers, network.n_neurons
    n_half = tiling.n_packed // 2
    first_hidden, first_output = n_half + tiling.last_matrix(0), n_half + tiling.last_matrix(n_hidden - 1)
    n_blocks, n_output_blocks = n_neurons // block, tiling.n_outputs // block
    product = make_product(tiling, block, block)
    apply_derivative = _make_apply_derivative(tiling)

    @wp.func
    def backward(
        h: wp.tile[dtype, rows, padded_width],
        sums: wp.tile[float, rows, width],
        weights: wp.array[dtype],
        row: int,
        activations: wp.array2d[dtype],
        deltas: wp.array2d[dtype],
    ):
        product(h, weights, first_output, n_output_blocks, n_blocks, sums)
        apply_derivative(sums, h, row, n_hidden - 1, activations, deltas)
        layer = int(n_hidden - 2)
        while layer >= 0:
            product(h, weights, first_hidden + layer * n_neurons * n_neurons, n_blocks, n_blocks, sums)
            apply_derivative(sums, h, row, layer, activations, deltas)
            layer -= 1

    return backward


@cache
def make_sum_products(tiling: Tiling, n_rows: int):
    """Function that stores one block, of `n_rows` rows, of a weight gradient: activations^T x deltas of a chunk."""
    dtype, block = tiling.dtype, tiling.block

    @wp.func
    def sum_products(
        begin: int,
        end: int,
        inv_scale: float,
        activations: wp.array2d[dtype],
        deltas: wp.array2d[dtype],
        from_column: int,
        to_column: int,
        gradient: wp.array2d[float],
        i: int,
        j: int,
    ):
        sums = wp.tile_zeros(shape=(n_rows, block), dtype=float, storage="shared")
        for row in range(begin, end, GRADIENT_ROWS):
            a = wp.tile_load(
                activations, shape=(GRADIENT_ROWS, n_rows), offset=(row, from_column + i), storage="shared"
            )
            d = wp.tile_load(deltas, shape=(GRADIENT_ROWS, block), offset=(row, to_column + j), storage="shared")
            wp.tile_matmul(wp.tile_transpose(a), d, sums)
        wp.tile_store(gradient, sums * inv_scale, offset=(i, j))

    return sum_products
