"""The network on CUDA (sm_80 and later): tensor-core products whose operands stay in a warp's registers.

A warp evaluates 32 rows, one per lane while encoding and taking the loss, and as fragments of two tiles of 16 rows in
between (`mma.py`). Hidden layers never leave the registers; only codes and outputs change hands between lanes.

`pack_weights` writes the weights in the order in which the lanes read them, once per pass; `infer_mma` and
`backpropagate_mma` run a pass, and `accumulate_weight_gradient_mma` multiplies what the latter stores.

The kernels need a whole warp at each call of a native function: launch a multiple of 32 threads, in blocks of their
module's `block_dim`. Lanes past the last row compute on that row's inputs. Activations and deltas (gradients by the
sums of a layer; `delta_columns` of them) are stored in fragments, see `STORE_SOURCE` in `mma.py`: their capacity is a
multiple of 32 rows, and rows that complete the last 32 have the delta 0.
"""

from functools import cache

import warp as wp

from .encoding import UNIQUE, EncodingConfig, make_encode, n_valid_rows
from .loss import make_given_gradient, make_loss, row_weight
from .mma import WARP, primitives_source, weight_place
from .network import MAX_GRADIENT, NetworkConfig
from .network_mma_source import (
    backward_source,
    forward_source,
    packed_size,
    padded,
    prediction_source,
    state_size,
    weight_gradient_source,
    weight_gradient_warps,
)
from .network_mma_source import delta_columns as delta_columns

wp.set_module_options({"enable_backward": False})

THREADS = 128  # per block
OPTIONS = {**UNIQUE, "block_dim": THREADS}


def _launch_bounds(network: NetworkConfig) -> tuple[int, int]:
    """Threads per block, and blocks that share a multiprocessor: a thread gets 128 or 255 registers."""
    return THREADS, 4 if network.n_neurons <= 64 else 2


@cache
def make_pack_weights(network: NetworkConfig):
    """Kernel that rounds the weights to half precision, in the order in which the lanes read them."""
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_padded = padded(n_outputs)
    n_first = n_inputs * n_neurons
    n_before_last = network.layers[-1][0]
    half_size = packed_size(network) // 2

    @wp.kernel(module="unique", module_options=UNIQUE)
    def pack_weights(
        first: int,
        # In
        params: wp.array[float],
        # Out
        out_weights: wp.array[wp.float16],  # (packed_size)
    ):
        """Fetch one weight, zero where it is padding. One thread per packed half."""
        i = first + wp.tid()
        transposed = i >= half_size
        place = i % half_size
        layer_first = int(0)
        n_in = int(n_inputs)
        n_out = int(n_neurons)
        n_columns = int(n_neurons)  # of the layer's matrix; n_out without padding
        if place >= n_before_last:
            layer_first = n_before_last
            n_in = n_neurons
            n_out = n_padded
            n_columns = n_outputs
        elif place >= n_first:
            layer_first = n_first + (place - n_first) // (n_neurons * n_neurons) * (n_neurons * n_neurons)
            n_in = n_neurons
        row, column = weight_place(place - layer_first, wp.where(transposed, n_out, n_in))
        if transposed:
            swap = row
            row = column
            column = swap
        weight = float(0.0)
        if column < n_columns:
            weight = params[layer_first + row * n_columns + column]
        out_weights[i] = wp.float16(weight)

    return pack_weights


@cache
def make_infer_mma(encoding: EncodingConfig, network: NetworkConfig):
    """Kernel that evaluates the network, one thread per sample, 32 samples per warp."""
    encode = make_encode(encoding)
    Code = wp.types.vector(length=network.n_inputs, dtype=float)
    Output = wp.types.vector(length=network.n_outputs, dtype=float)
    n_outputs = network.n_outputs

    @wp.func_native(forward_source(network, keep=False))
    def evaluate(code: Code, weights: wp.array[wp.float16]) -> Output: ...

    @wp.kernel(module="unique", module_options=OPTIONS, launch_bounds=_launch_bounds(network))
    def infer_mma(
        first: int,
        # Params
        weights: wp.array[wp.float16],  # packed
        params: wp.array[float],
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        # Out
        out_y: wp.array2d[float],  # (capacity, n_outputs)
    ):
        """Encode and evaluate one row. One thread per sample, whole warps."""
        i = first + wp.tid()
        n = n_valid_rows(n_rows, count)
        if i // WARP * WARP >= n:
            return
        code = encode(x, wp.min(i, n - 1), params)
        output = evaluate(code, weights)
        if i < n:
            for j in range(n_outputs):
                out_y[i, j] = output[j]

    return infer_mma


@cache
def make_backpropagate_mma(encoding: EncodingConfig, network: NetworkConfig, loss_otype: str | None):
    """Kernel that backpropagates the loss, one thread per sample, and stores what the weight gradients need.

    All gradients are stored times `loss_scale`, in half precision. A row of which something is not finite there gets
    the loss NaN. Without a loss, `y` holds the gradients of the outputs instead of targets.
    """
    encode = make_encode(encoding)
    given = loss_otype is None
    loss = make_given_gradient(network.n_outputs) if given else make_loss(loss_otype, network.n_outputs)
    Code = wp.types.vector(length=network.n_inputs, dtype=float)
    Output = wp.types.vector(length=network.n_outputs, dtype=float)
    State = wp.types.vector(length=state_size(network), dtype=wp.uint32)
    n_outputs = network.n_outputs

    @wp.func_native(forward_source(network, keep=True))
    def evaluate(
        code: Code,
        weights: wp.array[wp.float16],
        out_activations: wp.array2d[wp.float16],
        out_deltas: wp.array2d[wp.float16],
        i: int,
        n: int,
    ) -> State: ...

    @wp.func_native(prediction_source(network))
    def predict(state: State) -> Output: ...

    @wp.func_native(backward_source(network))
    def backpropagate(
        state: State,
        gradient: Output,
        weights: wp.array[wp.float16],
        out_activations: wp.array2d[wp.float16],
        out_deltas: wp.array2d[wp.float16],
        out_dL_dcode: wp.array2d[wp.float16],
        i: int,
        n: int,
    ) -> bool: ...

    @wp.kernel(module="unique", module_options=OPTIONS, launch_bounds=_launch_bounds(network))
    def backpropagate_mma(
        first: int,
        # Params
        weights: wp.array[wp.float16],  # packed
        params: wp.array[float],
        loss_scale: float,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        y: wp.array2d[float],  # (capacity, n_outputs)
        pdf: wp.array[float],  # (capacity) or empty
        # Out
        out_activations: wp.array2d[wp.float16],  # fragments of (capacity, n_inputs + n_hidden_layers * n_neurons)
        out_deltas: wp.array2d[wp.float16],  # fragments of (capacity, delta_columns)
        out_dL_dcode: wp.array2d[wp.float16],  # (capacity, n_inputs), or empty where it is not wanted
        out_loss: wp.array[float],  # (capacity)
    ):
        """Store activations, loss and the loss gradients of one row. One thread per sample, whole warps."""
        i = first + wp.tid()
        n = n_valid_rows(n_rows, count)
        if i // WARP * WARP >= n:
            return
        row = wp.min(i, n - 1)
        code = encode(x, row, params)
        state = evaluate(code, weights, out_activations, out_deltas, i, n)
        prediction = predict(state)
        norm = row_weight(pdf, row)
        if wp.static(not given):
            norm = norm / (float(n) * float(n_outputs))
        value, gradient = loss(prediction, y, row)
        scale = norm * loss_scale
        for j in range(n_outputs):
            gradient[j] = gradient[j] * scale
            if i >= n:
                gradient[j] = 0.0
        finite = backpropagate(state, gradient, weights, out_activations, out_deltas, out_dL_dcode, i, n)
        if i < n:
            value = value * norm
            if not finite:
                value = wp.nan
            out_loss[i] = value

    return backpropagate_mma


@cache
def make_accumulate_weight_gradient_mma(network: NetworkConfig):
    """Kernel that sums the weight gradients of each chunk of rows, one warp per (chunk, tile of weights)."""
    n_warps = weight_gradient_warps(network)

    @wp.func_native(weight_gradient_source(network))
    def accumulate(
        tile: int,
        begin: int,
        end: int,
        inv_scale: float,
        activations: wp.array2d[wp.float16],
        deltas: wp.array2d[wp.float16],
        chunk: int,
        chunk_gradient: wp.array2d[float],
    ): ...

    @wp.func_native(primitives_source() + "return ballot(vote) == 0xffffffffu;")
    def all_lanes(vote: bool) -> bool: ...

    @wp.func_native(
        primitives_source() + "for (int mask = 16; mask > 0; mask >>= 1) x += shuffle_xor(x, mask);\nreturn x;"
    )
    def sum_lanes(x: float) -> float: ...

    @wp.kernel(module="unique", module_options=OPTIONS)
    def accumulate_weight_gradient_mma(
        first: int,
        # Params
        chunk_size: int,  # a multiple of 32
        loss_scale: float,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        activations: wp.array2d[wp.float16],  # fragments
        deltas: wp.array2d[wp.float16],  # fragments
        loss: wp.array[float],  # (capacity)
        # Out
        chunk_gradient: wp.array2d[float],  # (chunks, n_params)
        chunk_loss: wp.array[float],  # (chunks)
        chunk_finite: wp.array[int],  # (chunks)
    ):
        """Sum activation x delta over a chunk. One warp per (chunk, tile), one more per chunk for its loss."""
        i = first + wp.tid()
        chunk = i // WARP // n_warps
        tile = i // WARP % n_warps
        begin = chunk * chunk_size
        end = wp.min(begin + chunk_size, n_valid_rows(n_rows, count))
        if tile < n_warps - 1:
            accumulate(tile, begin, end, 1.0 / loss_scale, activations, deltas, chunk, chunk_gradient)
        else:
            sum = float(0.0)
            finite = bool(True)
            for row in range(begin + i % WARP, end, WARP):
                sum += loss[row]
                if not (wp.abs(loss[row]) < MAX_GRADIENT):
                    finite = False
            sum = sum_lanes(sum)
            finite = all_lanes(finite)
            if i % WARP == 0:
                chunk_loss[chunk] = sum
                chunk_finite[chunk] = int(finite)

    return accumulate_weight_gradient_mma
