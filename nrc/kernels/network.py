"""Fully fused multilayer perceptron behind an encoding: inference and backpropagation kernels.

The weights of a layer are a row-major (inputs, outputs) matrix; the layers follow each other in the flat buffer. There
are no biases: the encoding's padding columns are constant. One sample per thread: the CUDA path, and the readable twin
of `network_wide.py`, the CPU path.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import warp as wp

from .encoding import UNIQUE, Encoding, make_encode, make_encode_backward, n_valid_rows
from .loss import make_given_gradient, make_loss

wp.set_module_options({"enable_backward": False})

ACTIVATIONS = ("None", "ReLU", "LeakyReLU")
LEAKY_SLOPE = 0.01
MAX_GRADIENT = 1.0e30  # a larger magnitude counts as non-finite: sums of a batch of these still fit a float


@dataclass(frozen=True)
class Network:
    """`n_hidden_layers` layers of `n_neurons` between `n_inputs` (a multiple of 16) and `n_outputs`."""

    n_inputs: int
    n_outputs: int
    n_neurons: int = 128
    n_hidden_layers: int = 5
    activation: str = "ReLU"
    output_activation: str = "None"

    def __post_init__(self) -> None:
        if self.n_neurons not in (16, 32, 64, 128):
            raise ValueError(f"FullyFusedMLP n_neurons must be 16, 32, 64 or 128, got {self.n_neurons}")
        if not 1 <= self.n_hidden_layers <= 16:
            raise ValueError(f"n_hidden_layers must be 1 ... 16, got {self.n_hidden_layers}")
        if self.n_inputs % 16 or self.n_outputs < 1:
            raise ValueError("a network needs a multiple of 16 inputs and at least one output")

    @property
    def layers(self) -> tuple[tuple[int, int, int], ...]:
        """(first parameter, inputs, outputs) of each layer."""
        widths = [self.n_inputs] + [self.n_neurons] * self.n_hidden_layers + [self.n_outputs]
        layers, first = [], 0
        for n_in, n_out in pairwise(widths):
            layers.append((first, n_in, n_out))
            first += n_in * n_out
        return tuple(layers)

    @property
    def n_params(self) -> int:
        first, n_in, n_out = self.layers[-1]
        return first + n_in * n_out


@cache
def make_activation(name: str):
    """Functions (pre-activation -> value) and (value -> derivative)."""
    slope = {"None": 1.0, "ReLU": 0.0, "LeakyReLU": LEAKY_SLOPE}[name]

    @wp.func
    def activate(v: float):
        if v > 0.0:
            return v
        return slope * v

    @wp.func
    def derivative(v: float):
        if v > 0.0:
            return 1.0
        return slope

    return activate, derivative


@cache
def make_forward(encoding: Encoding, network: Network):
    """Function (x, i, params) -> (code vector, hidden layers as a matrix, output vector) of row i."""
    encode = make_encode(encoding)
    activate, _ = make_activation(network.activation)
    activate_output, _ = make_activation(network.output_activation)
    Hidden = wp.types.matrix(shape=(network.n_hidden_layers, network.n_neurons), dtype=float)
    Output = wp.types.vector(length=network.n_outputs, dtype=float)
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_hidden = network.n_hidden_layers
    first_hidden = n_inputs * n_neurons
    first_output = network.layers[-1][0]

    @wp.func
    def forward(x: wp.array2d[float], i: int, params: wp.array[float]):
        code = encode(x, i, params)
        hidden = Hidden()
        for j in range(n_neurons):
            sum = float(0.0)
            for k in range(n_inputs):
                sum += code[k] * params[k * n_neurons + j]
            hidden[0, j] = activate(sum)
        layer = int(1)
        while layer < n_hidden:
            first = first_hidden + (layer - 1) * n_neurons * n_neurons
            for j in range(n_neurons):
                sum = float(0.0)
                for k in range(n_neurons):
                    sum += hidden[layer - 1, k] * params[first + k * n_neurons + j]
                hidden[layer, j] = activate(sum)
            layer += 1
        output = Output()
        for j in range(n_outputs):
            sum = float(0.0)
            for k in range(n_neurons):
                sum += hidden[n_hidden - 1, k] * params[first_output + k * n_outputs + j]
            output[j] = activate_output(sum)
        return code, hidden, output

    return forward


@cache
def make_infer(encoding: Encoding, network: Network):
    """Kernel that evaluates the network, one thread per sample."""
    forward = make_forward(encoding, network)
    n_outputs = network.n_outputs

    @wp.kernel(module="unique", module_options=UNIQUE)
    def infer(
        first: int,
        # Params
        params: wp.array[float],
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        # Out
        out_y: wp.array2d[float],  # (capacity, n_outputs)
    ):
        """Encode and evaluate one row. One thread per sample."""
        i = first + wp.tid()
        if i < n_valid_rows(n_rows, count):
            _code, _hidden, output = forward(x, i, params)
            for j in range(n_outputs):
                out_y[i, j] = output[j]

    return infer


@cache
def make_backpropagate(encoding: Encoding, network: Network, loss_otype: str | None):
    """Kernel that backpropagates the loss, one thread per sample, and stores what the weight gradients need.

    Without a loss, `y` holds the gradients of the outputs instead of targets.
    """
    forward = make_forward(encoding, network)
    given = loss_otype is None
    loss = make_given_gradient(network.n_outputs) if given else make_loss(loss_otype, network.n_outputs)
    _, derivative = make_activation(network.activation)
    _, output_derivative = make_activation(network.output_activation)
    Hidden = wp.types.matrix(shape=(network.n_hidden_layers, network.n_neurons), dtype=float)
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_hidden = network.n_hidden_layers
    first_hidden = n_inputs * n_neurons
    first_output = network.layers[-1][0]
    backward_code = _make_backward_code(encoding, network)

    @wp.kernel(module="unique", module_options=UNIQUE)
    def backpropagate(
        first: int,
        # Params
        params: wp.array[float],
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        y: wp.array2d[float],  # (capacity, n_outputs)
        # Out
        out_activations: wp.array2d[float],  # (capacity, n_inputs + n_hidden_layers * n_neurons)
        dL_dsums: wp.array2d[float],  # (capacity, n_hidden_layers * n_neurons + n_outputs)
        dL_dgrid: wp.array3d[float],  # (levels, capacity, n_features_per_level)
        out_loss: wp.array[float],  # (capacity)
    ):
        """Store activations, loss and the loss gradients of one row. One thread per sample."""
        i = first + wp.tid()
        n = n_valid_rows(n_rows, count)
        if i < n:
            code, hidden, output = forward(x, i, params)
            norm = float(1.0)
            if wp.static(not given):
                norm = 1.0 / (float(n) * float(n_outputs))
            value, gradient = loss(output, y, i)
            out_loss[i] = value * norm
            for k in range(n_inputs):
                out_activations[i, k] = code[k]
            for layer in range(n_hidden):
                for k in range(n_neurons):
                    out_activations[i, n_inputs + layer * n_neurons + k] = hidden[layer, k]
            delta = Hidden()
            for j in range(n_outputs):
                d = norm * gradient[j] * output_derivative(output[j])
                dL_dsums[i, n_hidden * n_neurons + j] = d
                for k in range(n_neurons):
                    delta[n_hidden - 1, k] += d * params[first_output + k * n_outputs + j]
            layer = int(n_hidden - 1)
            while layer >= 0:
                for j in range(n_neurons):
                    d = delta[layer, j] * derivative(hidden[layer, j])
                    delta[layer, j] = d
                    dL_dsums[i, layer * n_neurons + j] = d
                if layer > 0:
                    at = first_hidden + (layer - 1) * n_neurons * n_neurons
                    for k in range(n_neurons):
                        sum = float(0.0)
                        for j in range(n_neurons):
                            sum += delta[layer, j] * params[at + k * n_neurons + j]
                        delta[layer - 1, k] = sum
                layer -= 1
            backward_code(i, params, delta, dL_dgrid)

    return backpropagate


def _make_backward_code(encoding: Encoding, network: Network):
    """Function that carries the first layer's gradient back to every grid feature of row i."""
    Hidden = wp.types.matrix(shape=(network.n_hidden_layers, network.n_neurons), dtype=float)
    n_neurons = network.n_neurons

    @wp.func
    def backward_none(i: int, params: wp.array[float], delta: Hidden, dL_dgrid: wp.array3d[float]):
        pass

    def then(head, first_column: int, first_row: int, n_levels: int, n_features: int):
        @wp.func
        def backward_grid(i: int, params: wp.array[float], delta: Hidden, dL_dgrid: wp.array3d[float]):
            head(i, params, delta, dL_dgrid)
            for column in range(n_levels * n_features):
                sum = float(0.0)
                for j in range(n_neurons):
                    sum += delta[0, j] * params[(first_column + column) * n_neurons + j]
                dL_dgrid[first_row + column // n_features, i, column % n_features] = sum

        return backward_grid

    backward = backward_none
    for part in encoding.grids:
        grid = part.config
        backward = then(
            backward, part.first_output, encoding.gradient_row(part), grid.n_levels, grid.n_features_per_level
        )
    return backward


@cache
def make_backpropagate_input(encoding: Encoding, network: Network):
    """Kernel that carries the first layer's gradient back to the inputs, one thread per sample."""
    encode_backward = make_encode_backward(encoding)
    Code = wp.types.vector(length=network.n_inputs, dtype=float)
    n_inputs, n_neurons, n_dims = network.n_inputs, network.n_neurons, encoding.n_input_dims

    @wp.kernel(module="unique", module_options=UNIQUE)
    def backpropagate_input(
        first: int,
        # Params
        params: wp.array[float],
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        dL_dsums: wp.array2d[float],  # (capacity, n_hidden_layers * n_neurons + n_outputs)
        # In/out
        dL_dx: wp.array2d[float],  # (capacity, n_input_dims)
    ):
        """Add the loss gradient of one row's inputs. One thread per sample."""
        i = first + wp.tid()
        if i < n_valid_rows(n_rows, count):
            dL_dcode = Code()
            for k in range(n_inputs):
                sum = float(0.0)
                for j in range(n_neurons):
                    sum += dL_dsums[i, j] * params[k * n_neurons + j]
                dL_dcode[k] = sum
            gradient = encode_backward(x, i, params, dL_dcode)
            for d in range(n_dims):
                dL_dx[i, d] = dL_dx[i, d] + gradient[d]

    return backpropagate_input


@cache
def make_accumulate_weight_gradient(encoding: Encoding, network: Network):
    """Kernel that sums the weight gradients of each chunk of rows, one thread per (chunk, weight)."""
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_hidden, n_params = network.n_hidden_layers, network.n_params
    first_hidden = n_inputs * n_neurons
    first_output = network.layers[-1][0]
    n_sums = n_hidden * n_neurons + n_outputs
    n_levels = sum(part.config.n_levels for part in encoding.grids)

    @wp.kernel(module="unique", module_options=UNIQUE)
    def accumulate_weight_gradient(
        first: int,
        # Params
        chunk_size: int,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        activations: wp.array2d[float],  # (capacity, n_inputs + n_hidden_layers * n_neurons)
        dL_dsums: wp.array2d[float],  # (capacity, n_hidden_layers * n_neurons + n_outputs)
        dL_dgrid: wp.array3d[float],  # (levels, capacity, n_features_per_level)
        loss: wp.array[float],  # (capacity)
        # Out
        chunk_gradient: wp.array2d[float],  # (chunks, n_params)
        chunk_loss: wp.array[float],  # (chunks)
        chunk_finite: wp.array[int],  # (chunks)
    ):
        """Sum activation x dL_dsum over a chunk. One thread per (chunk, weight), one more per chunk for its loss."""
        i = first + wp.tid()
        chunk = i // (n_params + 1)
        weight = i % (n_params + 1)
        begin = chunk * chunk_size
        end = wp.min(begin + chunk_size, n_valid_rows(n_rows, count))
        if weight == n_params:
            sum = float(0.0)
            finite = int(1)
            for row in range(begin, end):
                sum += loss[row]
                for k in range(n_sums):
                    if not (wp.abs(dL_dsums[row, k]) < MAX_GRADIENT):
                        finite = 0
                for level in range(n_levels):
                    for f in range(dL_dgrid.shape[2]):
                        if not (wp.abs(dL_dgrid[level, row, f]) < MAX_GRADIENT):
                            finite = 0
            chunk_loss[chunk] = sum
            chunk_finite[chunk] = finite
            return
        from_column = weight // n_neurons
        to_column = weight % n_neurons
        if weight >= first_output:
            from_column = n_inputs + (n_hidden - 1) * n_neurons + (weight - first_output) // n_outputs
            to_column = n_hidden * n_neurons + (weight - first_output) % n_outputs
        elif weight >= first_hidden:
            layer = (weight - first_hidden) // (n_neurons * n_neurons)
            rest = (weight - first_hidden) % (n_neurons * n_neurons)
            from_column = n_inputs + layer * n_neurons + rest // n_neurons
            to_column = (layer + 1) * n_neurons + rest % n_neurons
        sum = float(0.0)
        for row in range(begin, end):
            sum += activations[row, from_column] * dL_dsums[row, to_column]
        chunk_gradient[chunk, weight] = sum

    return accumulate_weight_gradient
