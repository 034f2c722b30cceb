"""The network on the CPU: C++ with vector types over blocks of samples.

Every layer is a matrix product whose tiles of 4 samples x 64 neurons stay in registers. A chunk of rows owns its weight
gradient; the chunks are summed in order afterwards, so that threads neither race nor change the result.
"""

from functools import cache

import warp as wp

from .encoding import UNIQUE, Encoding, n_valid_rows
from .encoding_wide import BLOCK, encode_block_source
from .loss import loss_source
from .network import LEAKY_SLOPE, MAX_GRADIENT, Network
from .vectors import VECTOR_SOURCE

wp.set_module_options({"enable_backward": False})

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
                sum += *(f16*)&hidden[{network.n_hidden_layers - 1}][s * {n_neurons} + k]
                    * *(f16*)&output_weights[j][k];
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
        features: wp.array3d[
            float
        ],  # grid features; their gradients on return (levels, capacity, n_features_per_level)
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
    alignas(64) float delta[2][{BLOCK * n_neurons}];  // of this layer and the next
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
    source += f"""
    for (int row = begin; row < end; row += {BLOCK}) {{
    const int n = end - row < {BLOCK} ? end - row : {BLOCK}, row_features = row;
    """
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
            else f"delta[{(layer + 1) % 2}], {n_neurons}, 1, transposed_{layer + 1}, {n_neurons}, "
            f"{BLOCK}, {n_neurons}, {n_neurons}"
        )
        before = "code" if layer == 0 else f"hidden[{layer - 1}]"
        source += f"""
        product(delta[{layer % 2}], {n_neurons}, {after}, [&](f16 v, const float* c) {{
            f16 h = *(const f16*)(hidden[{layer}] + (c - delta[{layer % 2}]));
            return h > zero ? v : v * {_slope_source(network.activation)};
        }});
        product(weight_gradient + {first}, {n_neurons}, {before}, 1, {n_in}, delta[{layer % 2}], {n_neurons},
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
            float* to = (float*)((char*)features.data
                + ({encoding.gradient_row(part)} + l) * (size_t)features.strides[0]);
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
