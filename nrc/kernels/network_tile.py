"""The network on CUDA in Warp's tile language: the readable twin of `network_mma.py`, and what older cards run.

A thread block passes a tile of rows through all layers (`tile.py`). Backpropagation stores activations and deltas
(gradients by pre-activations, times the loss scale), of which `accumulate_weight_gradient_tile` takes the products.
What is not finite spreads: a sum over a row with an infinity or NaN is not finite either, so the first layer's deltas
show whether the row's others are.

A block of any number of threads does: rows are dealt to them where a row is one thread's work.
"""

from functools import cache
from typing import Any

import warp as wp

from .activation import make_activation
from .encoding import UNIQUE, EncodingConfig, make_encode, n_valid_rows
from .loss import make_given_gradient, make_loss, row_weight
from .network import NetworkConfig
from .tile import Tiling, make_backward, make_forward, make_product, make_set_row, make_sum_products, synchronize_block

wp.set_module_options({"enable_backward": False})

GRADIENT_THREADS = 128  # per block of a weight gradient


@cache
def make_pack_weights_tile(network: NetworkConfig, dtype: Any):
    """Kernel that converts the weights and lays them out in blocks, in the order in which products take them.

    The blocks of one block of columns follow each other.
    """
    tiling = Tiling(network, dtype)
    n_inputs, n_neurons, n_outputs, n_padded = network.n_inputs, network.n_neurons, network.n_outputs, tiling.n_outputs
    block, input_block = tiling.block, tiling.input_block
    first_hidden, first_output = tiling.last_matrix(0), tiling.last_matrix(network.n_hidden_layers - 1)
    n_half = tiling.n_packed // 2

    @wp.kernel(module="unique", module_options=UNIQUE)
    def pack_weights(
        first: int,
        # Params
        params: wp.array[float],
        # Out
        out_weights: wp.array[dtype],  # (n_packed)
    ):
        """Place one weight. One thread per packed weight."""
        i = first + wp.tid()
        place = i % n_half
        matrix = int(0)
        n_in, n_out, n_columns = int(n_inputs), int(n_neurons), int(n_neurons)  # n_columns are padded outputs
        in_block = int(input_block)
        if place >= first_hidden:
            matrix = first_hidden + (place - first_hidden) // (n_neurons * n_neurons) * (n_neurons * n_neurons)
            n_in = n_neurons
            in_block = block
        if place >= first_output:
            matrix = first_output
            n_out = n_outputs
            n_columns = n_padded
        place -= matrix
        place_in_block = place % (in_block * block)
        place = place // (in_block * block)
        row = int(0)
        column = int(0)
        if i < n_half:
            n_inner = n_in // in_block
            row = place % n_inner * in_block + place_in_block // block
            column = place // n_inner * block + place_in_block % block
        else:
            n_inner = n_columns // block
            row = place // n_inner * in_block + place_in_block % in_block
            column = place % n_inner * block + place_in_block // in_block
        weight = float(0.0)
        if column < n_out:
            weight = params[matrix + row * n_out + column]
        out_weights[i] = dtype(weight)

    return pack_weights


@cache
def make_infer_tile(encoding: EncodingConfig, network: NetworkConfig, dtype: Any = wp.float16, gemm: bool = True):
    """Kernel that evaluates the network, one thread block per tile of rows.

    `gemm` leaves products on CUDA to cuBLASDx, which needs a minute to compile, several for older cards than sm_80.
    """
    tiling = Tiling(network, dtype)
    encode = make_encode(encoding)
    forward = make_forward(tiling, False)
    Row, set_row = make_set_row(tiling, network.n_inputs)
    activate_output, _ = make_activation(network.output_activation)
    rows, width, padded_width, n_outputs = tiling.rows, tiling.width, tiling.padded_width, network.n_outputs

    @wp.kernel(module="unique", module_options={**UNIQUE, "block_dim": rows, "enable_mathdx_gemm": gemm})
    def infer_tile(
        first: int,
        # Params
        weights: wp.array[dtype],  # packed
        params: wp.array[float],
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        # Out
        out_y: wp.array2d[float],  # (capacity, n_outputs)
    ):
        """Encode and evaluate a tile of rows. One thread block per tile."""
        i = first + wp.tid()
        lane = i % wp.block_dim()
        row = i // wp.block_dim() * rows
        n = n_valid_rows(n_rows, count)
        if row >= n:
            return
        h = wp.tile_zeros(shape=(rows, padded_width), dtype=dtype, storage="shared")
        sums = wp.tile_zeros(shape=(rows, width), dtype=float, storage="shared")
        for r in range(lane, rows, wp.block_dim()):
            set_row(h, r, Row(encode(x, wp.min(row + r, n - 1), params)))
        synchronize_block()
        nothing = wp.array(ptr=weights.ptr, shape=(0, 0), dtype=dtype)
        forward(h, sums, weights, row, nothing, nothing)
        for r in range(lane, rows, wp.block_dim()):
            if row + r < n:
                for j in range(n_outputs):
                    out_y[row + r, j] = activate_output(sums[r, j])

    return infer_tile


@cache
def make_backpropagate_tile(
    encoding: EncodingConfig, network: NetworkConfig, loss_otype: str | None, dtype: Any = wp.float16, gemm: bool = True
):
    """Kernel that backpropagates the loss, one thread block per tile of rows, and stores what weight gradients need.

    All gradients are stored times `loss_scale`. A row of which something is not finite in `dtype` gets the loss NaN.
    Without a loss, `y` holds the gradients of the outputs instead of targets.
    """
    tiling = Tiling(network, dtype)
    encode = make_encode(encoding)
    given = loss_otype is None
    loss = make_given_gradient(network.n_outputs) if given else make_loss(loss_otype, network.n_outputs)
    activate_output, output_derivative = make_activation(network.output_activation)
    Output = wp.types.vector(length=network.n_outputs, dtype=float)
    Row, set_row = make_set_row(tiling, network.n_inputs)
    OutputRow, set_output_row = make_set_row(tiling, tiling.n_outputs)
    forward = make_forward(tiling, True)
    backward = make_backward(tiling)
    input_product = make_product(tiling, tiling.block, tiling.input_block)
    rows, width, padded_width = tiling.rows, tiling.width, tiling.padded_width
    block, input_block = tiling.block, tiling.input_block
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_activation_columns, n_delta_columns = n_inputs + network.n_hidden_layers * n_neurons, tiling.n_delta_columns
    n_half, n_padded = tiling.n_packed // 2, tiling.n_outputs

    @wp.func
    def convert(v: float):
        return dtype(v)

    @wp.kernel(module="unique", module_options={**UNIQUE, "block_dim": rows, "enable_mathdx_gemm": gemm})
    def backpropagate_tile(
        first: int,
        # Params
        weights: wp.array[dtype],  # packed
        params: wp.array[float],
        loss_scale: float,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        y: wp.array2d[float],  # (capacity, n_outputs)
        pdf: wp.array[float],  # (capacity) or empty
        # Out
        out_activations: wp.array2d[dtype],  # (capacity, n_inputs + n_hidden_layers * n_neurons)
        out_deltas: wp.array2d[dtype],  # (capacity, n_delta_columns)
        out_dL_dcode: wp.array2d[dtype],  # (capacity, n_inputs), or empty where it is not wanted
        out_loss: wp.array[float],  # (capacity)
    ):
        """Store activations, loss and the loss gradients of a tile of rows. One thread block per tile."""
        i = first + wp.tid()
        lane = i % wp.block_dim()
        row = i // wp.block_dim() * rows
        n = n_valid_rows(n_rows, count)
        if row >= n:
            return
        h = wp.tile_zeros(shape=(rows, padded_width), dtype=dtype, storage="shared")
        sums = wp.tile_zeros(shape=(rows, width), dtype=float, storage="shared")
        # Up to the last row: tiles are cut there
        activations = wp.array(ptr=out_activations.ptr, shape=(n, n_activation_columns), dtype=dtype)
        deltas = wp.array(ptr=out_deltas.ptr, shape=(n, n_delta_columns), dtype=dtype)

        for r in range(lane, rows, wp.block_dim()):
            code = Row(encode(x, wp.min(row + r, n - 1), params))
            for k in range(n_inputs):
                if not wp.isfinite(code[k]):  # an infinity could saturate an activation and go unnoticed
                    code[k] = dtype(wp.nan)
            set_row(h, r, code)
        synchronize_block()
        wp.tile_store(activations, wp.tile_view(h, offset=(0, 0), shape=(rows, n_inputs)), offset=(row, 0))
        forward(h, sums, weights, row, activations, deltas)

        for r in range(lane, rows, wp.block_dim()):
            at = wp.min(row + r, n - 1)
            prediction = Output()
            for j in range(n_outputs):
                prediction[j] = activate_output(sums[r, j])
            norm = row_weight(pdf, at)
            if wp.static(not given):
                norm = norm / (float(n) * float(n_outputs))
            value, gradient = loss(prediction, y, at)
            if row + r < n:
                out_loss[at] = value * norm
            delta = OutputRow()
            for j in range(n_outputs):
                d = gradient[j] * norm * loss_scale
                delta[j] = dtype(d * output_derivative(sums[r, j], prediction[j]))
            set_output_row(h, r, delta)
        synchronize_block()
        outputs = wp.tile_view(h, offset=(0, 0), shape=(rows, n_padded))
        wp.tile_store(deltas, outputs, offset=(row, n_delta_columns - n_padded))
        backward(h, sums, weights, row, activations, deltas)

        if out_dL_dcode.shape[0] > 0:
            dL_dcode = wp.array(ptr=out_dL_dcode.ptr, shape=(n, n_inputs), dtype=dtype)
            input_product(h, weights, n_half, n_neurons // block, n_inputs // input_block, sums)
            for j in range(n_inputs // input_block):
                columns = wp.tile_view(sums, offset=(0, j * input_block), shape=(rows, input_block))
                wp.tile_store(dL_dcode, wp.tile_map(convert, columns), offset=(row, j * input_block))
        for r in range(lane, rows, wp.block_dim()):
            finite = bool(True)
            # Each row starts at another column, to spread over the memory banks
            for k in range(n_neurons):
                finite = finite and wp.isfinite(h[r, (k + r) % n_neurons])
            if out_dL_dcode.shape[0] > 0:
                for k in range(n_inputs):
                    finite = finite and wp.isfinite(dtype(sums[r, (k + r) % n_inputs]))
            if row + r < n and not finite:
                out_loss[row + r] = wp.nan

    return backpropagate_tile


@cache
def make_accumulate_weight_gradient_tile(network: NetworkConfig, dtype: Any = wp.float16, gemm: bool = True):
    """Kernel that sums the weight gradients of each chunk of rows, one thread block per (chunk, block of weights)."""
    tiling = Tiling(network, dtype)
    block, input_block = tiling.block, tiling.input_block
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_hidden, n_params = network.n_hidden_layers, network.n_params
    first_output = tiling.last_matrix(n_hidden - 1)
    n_activation_columns, n_delta_columns = n_inputs + n_hidden * n_neurons, tiling.n_delta_columns
    n_gradient_blocks = tiling.n_gradient_blocks
    n_across, n_output_across = n_neurons // block, tiling.n_outputs // block
    n_first, n_hidden_blocks = n_inputs // input_block * n_across, (n_hidden - 1) * n_across * n_across
    sum_first_products = make_sum_products(tiling, input_block)
    sum_products = make_sum_products(tiling, block)

    @wp.kernel(module="unique", module_options={**UNIQUE, "block_dim": GRADIENT_THREADS, "enable_mathdx_gemm": gemm})
    def accumulate_weight_gradient_tile(
        first: int,
        # Params
        chunk_size: int,
        loss_scale: float,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        activations: wp.array2d[dtype],  # (capacity, n_inputs + n_hidden_layers * n_neurons)
        deltas: wp.array2d[dtype],  # (capacity, n_delta_columns)
        loss: wp.array[float],  # (capacity)
        # Out
        chunk_gradient: wp.array2d[float],  # (chunks, n_params)
        chunk_loss: wp.array[float],  # (chunks)
        chunk_finite: wp.array[int],  # (chunks)
    ):
        """Sum activation x delta over a chunk. One thread block per (chunk, block), one more per chunk for its loss."""
        i = (first + wp.tid()) // wp.block_dim()
        lane = (first + wp.tid()) % wp.block_dim()
        chunk = i // n_gradient_blocks
        b = i % n_gradient_blocks
        begin = chunk * chunk_size
        end = wp.min(begin + chunk_size, n_valid_rows(n_rows, count))
        if begin >= end:
            return
        if b == n_gradient_blocks - 1:
            sum = float(0.0)
            for row in range(begin + lane, end, wp.block_dim()):
                sum += loss[row]
            total = wp.tile_sum(wp.tile(sum))[0]
            if lane == 0:
                chunk_loss[chunk] = total
                chunk_finite[chunk] = int(wp.isfinite(total))
            return
        # Up to the chunk's last row: tiles read zeros behind it
        a = wp.array(ptr=activations.ptr, shape=(end, n_activation_columns), dtype=dtype)
        d = wp.array(ptr=deltas.ptr, shape=(end, n_delta_columns), dtype=dtype)
        gradient = chunk_gradient.ptr + wp.uint64(chunk) * wp.uint64(n_params * 4)
        if b < n_first:
            dL_dw = wp.array(ptr=gradient, shape=(n_inputs, n_neurons), dtype=float)
            at = b // n_across * input_block
            to = b % n_across * block
            sum_first_products(begin, end, 1.0 / loss_scale, a, d, 0, 0, dL_dw, at, to)
            return
        b -= n_first
        layer = b // (n_across * n_across)
        n_out = int(n_neurons)
        across = int(n_across)
        matrix = n_inputs * n_neurons + layer * n_neurons * n_neurons
        if b >= n_hidden_blocks:
            layer = n_hidden - 1
            n_out = n_outputs
            across = n_output_across
            matrix = first_output
            b -= n_hidden_blocks
        else:
            b = b % (n_across * n_across)
        dL_dw = wp.array(ptr=gradient + wp.uint64(matrix * 4), shape=(n_neurons, n_out), dtype=float)
        from_column = n_inputs + layer * n_neurons
        to_column = (layer + 1) * n_neurons
        at = b // across * block
        to = b % across * block
        sum_products(begin, end, 1.0 / loss_scale, a, d, from_column, to_column, dL_dw, at, to)

    return accumulate_weight_gradient_tile
