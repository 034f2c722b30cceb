"""Fully fused multilayer perceptron behind an encoding: inference and backpropagation kernels.

The weights of a layer are a row-major (inputs, outputs) matrix; the layers follow each other in the flat buffer. There
are no biases: the encoding's padding columns are constant. Each kernel exists twice. The plain one takes one sample per
thread: it runs on CUDA and is the readable twin. The wide one is C++ with vector types over a block of samples, where
every layer is a matrix product whose 4 x 64 tiles stay in registers: it runs on the CPU.
"""

from dataclasses import dataclass
from functools import cache

import warp as wp

from .encoding import BLOCK, UNIQUE, VECTOR_SOURCE, Encoding, encode_block_source, make_encode, n_valid_rows
from .loss import loss_source, make_loss

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
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            layers.append((first, n_in, n_out))
            first += n_in * n_out
        return tuple(layers)

    @property
    def n_params(self) -> int:
        first, n_in, n_out = self.layers[-1]
        return first + n_in * n_out


# One sample per thread, in Warp


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
            code, hidden, output = forward(x, i, params)
            for j in range(n_outputs):
                out_y[i, j] = output[j]

    return infer


@cache
def make_backpropagate(encoding: Encoding, network: Network, loss_otype: str):
    """Kernel that backpropagates the loss, one thread per sample, and stores what the weight gradients need."""
    forward = make_forward(encoding, network)
    loss = make_loss(loss_otype, network.n_outputs)
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


# Blocks of samples, in C++ with vector types

# c[i, j] = store(sum_k a[i, k] b[k, j]) for i < m, j < n; a's strides are free, rows of b and c are contiguous.
# A tile of r rows x 16 w columns stays in registers over the whole of k.
_PRODUCT_SOURCE = """
struct one { enum { value = 1 }; };
struct two { enum { value = 2 }; };
struct four { enum { value = 4 }; };
auto tile = [&](auto rows, auto width, float* c, int ldc, const float* a, int row, int step,
                const float* b, int ldb, int n_k, auto store) __attribute__((always_inline)) {
    constexpr int r = decltype(rows)::value, w = decltype(width)::value;
    f16 sum[r][w];
    #pragma unroll
    for (int i = 0; i < r; ++i)
        #pragma unroll
        for (int j = 0; j < w; ++j) sum[i][j] = zero;
    for (int k = 0; k < n_k; ++k) {
        #pragma unroll
        for (int i = 0; i < r; ++i)
            #pragma unroll
            for (int j = 0; j < w; ++j) sum[i][j] += a[i * row + k * step] * *(const f16*)(b + k * ldb + 16 * j);
    }
    #pragma unroll
    for (int i = 0; i < r; ++i)
        #pragma unroll
        for (int j = 0; j < w; ++j) *(f16*)(c + i * ldc + 16 * j) = store(sum[i][j], c + i * ldc + 16 * j);
};
auto product = [&](float* c, int ldc, const float* a, int row, int step, const float* b, int ldb,
                   int m, int n, int n_k, auto store) __attribute__((always_inline)) {
    int j = 0;
    auto columns = [&](auto width) __attribute__((always_inline)) {
        int i = 0;
        for (; i + 4 <= m; i += 4)
            tile(four{}, width, c + i * ldc + j, ldc, a + i * row, row, step, b + j, ldb, n_k, store);
        for (; i < m; ++i) tile(one{}, width, c + i * ldc + j, ldc, a + i * row, row, step, b + j, ldb, n_k, store);
    };
    for (; j + 64 <= n; j += 64) columns(four{});
    if (j + 32 <= n) { columns(two{}); j += 32; }
    if (j < n) columns(one{});
};
auto sum16 = [](f16 v) {
    auto a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    auto b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[1]) + (b[2] + b[3]);
};
"""


def _slope_source(name: str) -> str:
    return {"None": "1.0f", "ReLU": "0.0f", "LeakyReLU": f"{LEAKY_SLOPE!r}f"}[name]


def _setup_source(network: Network) -> str:
    """Scratch of a block and the transposed output layer."""
    n_neurons, n_outputs = network.n_neurons, network.n_outputs
    return f"""
    alignas(64) float code[{BLOCK * network.n_inputs}];
    alignas(64) float hidden[{network.n_hidden_layers}][{BLOCK * n_neurons}];
    alignas(64) float output[{BLOCK}][{n_outputs}];
    alignas(64) float output_weights[{n_outputs}][{n_neurons}];
    for (int k = 0; k < {n_neurons}; ++k)
        for (int j = 0; j < {n_outputs}; ++j)
            output_weights[j][k] = params.data[{network.layers[-1][0]} + k * {n_outputs} + j];
    auto activate = [&](f16 v, const float*) {{ return v > zero ? v : v * {_slope_source(network.activation)}; }};
    """


def _forward_source(encoding: Encoding, network: Network) -> str:
    """C++ for rows [row, row + n): fills code, hidden and output."""
    n_neurons = network.n_neurons
    source = "{\n" + encode_block_source(encoding) + "}\n"
    for layer, (first, n_in, n_out) in enumerate(network.layers[:-1]):
        before = "code" if layer == 0 else f"hidden[{layer - 1}]"
        source += f"""
        product(hidden[{layer}], {n_out}, {before}, {n_in}, 1, params.data + {first}, {n_out},
                {BLOCK}, {n_out}, {n_in}, activate);
        """
    source += f"""
    for (int s = 0; s < {BLOCK}; ++s)
        for (int j = 0; j < {network.n_outputs}; ++j) {{
            f16 sum = zero;
            for (int k = 0; k < {n_neurons}; k += 16)
                sum += *(f16*)&hidden[{network.n_hidden_layers - 1}][s * {n_neurons} + k] * *(f16*)&output_weights[j][k];
            const float v = sum16(sum);
            output[s][j] = v > 0.0f ? v : v * {_slope_source(network.output_activation)};
        }}
    """
    return source


@cache
def make_infer_wide(encoding: Encoding, network: Network):
    """CPU kernel that evaluates the network for a block of rows per index."""
    source = VECTOR_SOURCE + _PRODUCT_SOURCE + _setup_source(network) + _forward_source(encoding, network)
    source += f"""
    for (int s = 0; s < n; ++s) {{
        float* to = (float*)((char*)y.data + (size_t)(row + s) * y.strides[0]);
        for (int j = 0; j < {network.n_outputs}; ++j) to[j] = output[s][j];
    }}
    """

    @wp.func_native(source)
    def infer_block(
        row: int,
        row_features: int,
        n: int,
        params: wp.array[float],
        x: wp.array2d[float],
        features: wp.array3d[float],
        y: wp.array2d[float],
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def infer_wide(
        first: int,
        # Params
        params: wp.array[float],
        # In
        first_row: int,
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        features: wp.array3d[float],  # (levels, rows from first_row on, n_features_per_level)
        # Out
        out_y: wp.array2d[float],  # (capacity, n_outputs)
    ):
        """Encode and evaluate one block of rows [first_row, first_row + n_rows). One thread per BLOCK samples."""
        begin = (first + wp.tid()) * BLOCK
        row = first_row + begin
        n = wp.min(wp.min(BLOCK, n_rows - begin), n_valid_rows(x.shape[0], count) - row)
        if n > 0:
            infer_block(row, begin, n, params, x, features, out_y)

    return infer_wide


@cache
def make_backpropagate_wide(encoding: Encoding, network: Network, loss_otype: str):
    """CPU kernel that backpropagates a chunk of rows and sums its weight gradients, one chunk per index."""

    @wp.func_native(_backpropagate_source(encoding, network, loss_otype))
    def backpropagate_chunk(
        begin: int,
        end: int,
        n_total: int,
        chunk: int,
        params: wp.array[float],
        x: wp.array2d[float],
        y: wp.array2d[float],
        features: wp.array3d[float],
        chunk_gradient: wp.array2d[float],
        chunk_loss: wp.array[float],
        chunk_finite: wp.array[int],
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def backpropagate_wide(
        first: int,
        # Params
        params: wp.array[float],
        chunk_size: int,
        # In
        n_rows: int,
        count: wp.array[int],  # (1) or empty
        x: wp.array2d[float],  # (capacity, n_input_dims)
        y: wp.array2d[float],  # (capacity, n_outputs)
        # In/out
        features: wp.array3d[float],  # grid features; their gradients on return (levels, capacity, n_features_per_level)
        # Out
        chunk_gradient: wp.array2d[float],  # (chunks, n_params)
        chunk_loss: wp.array[float],  # (chunks)
        chunk_finite: wp.array[int],  # (chunks)
    ):
        """Turn one chunk's grid features into gradients, store its loss and weight gradient. One thread per chunk."""
        chunk = first + wp.tid()
        n_total = n_valid_rows(n_rows, count)
        begin = chunk * chunk_size
        end = wp.min(begin + chunk_size, n_total)
        if begin < end:
            backpropagate_chunk(
                begin, end, n_total, chunk, params, x, y, features, chunk_gradient, chunk_loss, chunk_finite
            )

    return backpropagate_wide


def _backpropagate_source(encoding: Encoding, network: Network, loss_otype: str) -> str:
    n_neurons, n_outputs, n_hidden = network.n_neurons, network.n_outputs, network.n_hidden_layers
    last = network.layers[-1][0]
    source = VECTOR_SOURCE + _PRODUCT_SOURCE + _setup_source(network)
    source += f"""
    float* weight_gradient = chunk_gradient.data + (size_t)chunk * {network.n_params};
    for (int i = 0; i < {network.n_params}; ++i) weight_gradient[i] = 0.0f;
    alignas(64) float output_gradient[{n_outputs}][{n_neurons}] = {{}};
    alignas(64) float delta[{n_hidden}][{BLOCK * n_neurons}];
    alignas(64) float dL_dcode[{BLOCK * network.n_inputs}];
    alignas(64) float dL_doutput[{BLOCK}][{n_outputs}];
    auto add = [](f16 v, const float* c) {{ return v + *(const f16*)c; }};
    auto keep = [](f16 v, const float*) {{ return v; }};
    const float norm = 1.0f / ((float)n_total * {n_outputs}.0f);
    float value = 0.0f;
    bool finite = true;
    """
    for layer, (first, n_in, n_out) in enumerate(network.layers[:-1]):
        if layer > 0 or encoding.grids:
            source += f"""
            alignas(64) float transposed_{layer}[{n_in * n_out}];
            for (int k = 0; k < {n_in}; k += 16)
                for (int j = 0; j < {n_out}; ++j)
                    for (int i = 0; i < 16; ++i)
                        transposed_{layer}[j * {n_in} + k + i] = params.data[{first} + (k + i) * {n_out} + j];
            """
    source += f"for (int row = begin; row < end; row += {BLOCK}) {{\nconst int n = end - row < {BLOCK} ? end - row : {BLOCK}, row_features = row;\n"
    source += _forward_source(encoding, network)
    source += f"""
    for (int s = 0; s < {BLOCK}; ++s) {{
        float* gradient = dL_doutput[s];
        if (s >= n) {{
            for (int j = 0; j < {n_outputs}; ++j) gradient[j] = 0.0f;
            continue;
        }}
        const float* prediction = output[s];
        const float* target = (const float*)((const char*)y.data + (size_t)(row + s) * y.strides[0]);
        {loss_source(loss_otype, n_outputs)}
        for (int j = 0; j < {n_outputs}; ++j)
            gradient[j] *= norm * (prediction[j] > 0.0f ? 1.0f : {_slope_source(network.output_activation)});
    }}
    product(output_gradient[0], {n_neurons}, dL_doutput[0], 1, {n_outputs}, hidden[{n_hidden - 1}], {n_neurons},
            {n_outputs}, {n_neurons}, {BLOCK}, add);
    """
    for layer in reversed(range(n_hidden)):
        first, n_in, _ = network.layers[layer]
        after = (
            f"dL_doutput[0], {n_outputs}, 1, output_weights[0], {n_neurons}, {BLOCK}, {n_neurons}, {n_outputs}"
            if layer == n_hidden - 1
            else f"delta[{layer + 1}], {n_neurons}, 1, transposed_{layer + 1}, {n_neurons}, "
            f"{BLOCK}, {n_neurons}, {n_neurons}"
        )
        before = "code" if layer == 0 else f"hidden[{layer - 1}]"
        source += f"""
        product(delta[{layer}], {n_neurons}, {after}, [&](f16 v, const float* c) {{
            f16 h = *(const f16*)(hidden[{layer}] + (c - delta[{layer}]));
            return h > zero ? v : v * {_slope_source(network.activation)};
        }});
        product(weight_gradient + {first}, {n_neurons}, {before}, 1, {n_in}, delta[{layer}], {n_neurons},
                {n_in}, {n_neurons}, {BLOCK}, add);
        """
    if encoding.grids:
        source += f"""
        product(dL_dcode, {network.n_inputs}, delta[0], {n_neurons}, 1, transposed_0, {network.n_inputs},
                {BLOCK}, {network.n_inputs}, {n_neurons}, keep);
        """
    for part in encoding.grids:
        n_features = part.config.n_features_per_level
        source += f"""
        for (int l = 0; l < {part.config.n_levels}; ++l) {{
            float* to = (float*)((char*)features.data + ({encoding.gradient_row(part)} + l) * (size_t)features.strides[0]);
            const size_t stride = features.shape[2];
            for (int s = 0; s < n; ++s)
                for (int f = 0; f < {n_features}; ++f) {{
                    const float d = dL_dcode[s * {network.n_inputs} + {part.first_output} + l * {n_features} + f];
                    finite &= d < {MAX_GRADIENT!r}f && d > -{MAX_GRADIENT!r}f;
                    to[(row + s) * stride + f] = d;
                }}
        }}
        """
    return (
        source
        + f"""
    }}
    for (int k = 0; k < {n_neurons}; ++k)
        for (int j = 0; j < {n_outputs}; ++j) weight_gradient[{last} + k * {n_outputs} + j] = output_gradient[j][k];
    for (int i = 0; i < {network.n_params}; ++i)
        finite &= weight_gradient[i] < {MAX_GRADIENT!r}f && weight_gradient[i] > -{MAX_GRADIENT!r}f;
    chunk_loss.data[chunk] = value * norm;
    chunk_finite.data[chunk] = finite;
    """
    )
