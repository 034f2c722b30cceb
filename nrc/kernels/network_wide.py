"""The network on the CPU: C++ with vector types over blocks of samples.

Activations of a block are kept neuron by neuron, the samples of a neuron in consecutive vectors: layers, encodings,
activation functions and losses then work on 16 samples at once without rearranging anything. Every layer is a matrix
product (`matrix_wide.py`). A chunk of rows owns its weight gradient; the chunks are summed in order afterwards, so that
threads neither race nor change the result.
"""

from functools import cache

import warp as wp

from .activation import activate_source, activation_functions, derivative_source, needs_sum
from .encoding import UNIQUE, EncodingConfig, n_valid_rows
from .encoding_wide import BLOCK, check_scratch, encode_columns_source
from .loss import loss_source
from .matrix_wide import LAYER_SOURCE, TRANSPOSE_SOURCE, WEIGHT_GRADIENT_SOURCE
from .network import MAX_GRADIENT, NetworkConfig
from .vectors import VECTOR_SOURCE

wp.set_module_options({"enable_backward": False})

# Whether n values, a multiple of 16, are numbers below MAX_GRADIENT in magnitude
_FINITE_SOURCE = f"""
auto all_finite = [&](const float* values, int n) {{
    i16 wrong = {{}};
    for (int i = 0; i < n; i += 16) {{
        const f16 v = *(const f16*)(values + i);
        wrong |= ~((v < zero + {MAX_GRADIENT!r}f) & (v > zero - {MAX_GRADIENT!r}f));
    }}
    return __builtin_reduce_or(wrong) == 0;
}};
"""


def _padded(n: int) -> int:
    return -(-n // 16) * 16


def _functions_source(network: NetworkConfig) -> str:
    """C++ that both passes need before anything else."""
    return (
        "#pragma clang fp contract(fast)\n"  # multiply and add in one instruction where the processor has it
        + VECTOR_SOURCE
        + activation_functions(network.activation, network.output_activation)
        + LAYER_SOURCE
    )


def _forward_source(encoding: EncodingConfig, network: NetworkConfig, keep: bool) -> str:
    """C++ for rows [row, row + n): fills code, hidden, output and, to `keep` what backpropagation needs, sums.

    All are (neurons x BLOCK). Without `keep`, `hidden` holds two layers that take turns.
    """
    n_neurons, n_hidden, n_outputs = network.n_neurons, network.n_hidden_layers, network.n_outputs
    turn = "" if keep else " % 2"
    sums = "*(f16*)(hidden_sums[i] + at) = v;" if keep and needs_sum(network.activation) else ""
    output_sums = "*(f16*)(output_sums + at) = v;" if keep and needs_sum(network.output_activation) else ""
    return f"""
    {{
    {encode_columns_source(encoding)}
    }}
    for (int i = 0; i < {n_hidden}; ++i) {{
        const float* weights = params.data + (i > 0 ? {network.n_inputs * n_neurons}
            + (i - 1) * {n_neurons * n_neurons} : 0);
        layer(hidden[i{turn}], weights, 1, {n_neurons}, i > 0 ? hidden[(i - 1){turn}] : code, {n_neurons},
            i > 0 ? {n_neurons} : {network.n_inputs}, [&](f16 v, int at) __attribute__((always_inline)) {{
            {sums}
            return (f16)({activate_source(network.activation)});
        }});
    }}
    layer(output, params.data + {network.layers[-1][0]}, 1, {n_outputs}, hidden[{n_hidden - 1}{turn}], {n_outputs},
        {n_neurons}, [&](f16 v, int at) __attribute__((always_inline)) {{
        {output_sums}
        return (f16)({activate_source(network.output_activation)});
    }});
    """


@cache
def make_infer_wide(encoding: EncodingConfig, network: NetworkConfig):
    """CPU kernel that evaluates the network for a block of rows per index. Raises ValueError if it is too wide."""
    n_outputs = network.n_outputs
    n_columns = encoding.n_input_dims + network.n_inputs + 2 * network.n_neurons + n_outputs
    check_scratch(n_columns, f"a network of {network.n_inputs} inputs and {n_outputs} outputs")
    source = f"""
    {_functions_source(network)}
    alignas(64) float code[{network.n_inputs * BLOCK}];
    alignas(64) float hidden[2][{network.n_neurons * BLOCK}];
    alignas(64) float output[{n_outputs * BLOCK}];
    {_forward_source(encoding, network, keep=False)}
    for (int s = 0; s < n; ++s) {{
        float* to = (float*)((char*)y.data + (size_t)(row + s) * y.strides[0]);
        for (int j = 0; j < {n_outputs}; ++j) to[j] = output[j * {BLOCK} + s];
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
def make_backpropagate_wide(
    encoding: EncodingConfig, network: NetworkConfig, loss_otype: str | None, input_gradient: bool
):
    """CPU kernel that backpropagates a chunk of rows and sums its weight gradients, one chunk per index.

    Without a loss, `y` holds the gradients of the outputs instead of targets and nothing is normalised. With
    `input_gradient` the gradient of the encoded inputs is written, too. Raises ValueError for a network whose
    activations of a block do not fit a thread's stack.
    """

    @wp.func_native(_backpropagate_source(encoding, network, loss_otype, input_gradient))
    def backpropagate_chunk(
        begin: int,
        end: int,
        n_total: int,
        chunk: int,
        params: wp.array[float],
        x: wp.array2d[float],
        y: wp.array2d[float],
        pdf: wp.array[float],
        features: wp.array3d[float],
        code_gradient: wp.array2d[float],
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
        y: wp.array2d[float],  # (capacity, n_outputs), targets or dL/doutput
        pdf: wp.array[float],  # (capacity), density each row was drawn with, or empty
        # In/out
        features: wp.array3d[float],  # grid features; their gradients on return (levels, capacity, n_features)
        # Out
        dL_dcode: wp.array2d[float],  # (capacity, n_inputs), or empty without input_gradient
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
                begin,
                end,
                n_total,
                chunk,
                params,
                x,
                y,
                pdf,
                features,
                dL_dcode,
                chunk_gradient,
                chunk_loss,
                chunk_finite,
            )

    return backpropagate_wide


def _backpropagate_source(
    encoding: EncodingConfig, network: NetworkConfig, loss_otype: str | None, input_gradient: bool
) -> str:
    """C++ for rows [begin, end) of a chunk, a block at a time."""
    n_neurons, n_outputs = network.n_neurons, network.n_outputs
    n_padded, first_output = _padded(n_outputs), network.layers[-1][0]
    norm = "1.0f" if loss_otype is None else f"1.0f / ((float)n_total * {n_outputs}.0f)"
    return f"""
    {_functions_source(network)}
    {WEIGHT_GRADIENT_SOURCE}
    {TRANSPOSE_SOURCE}
    {_FINITE_SOURCE}
    {_scratch_source(network, encoding.n_input_dims)}
    float* weight_gradient = chunk_gradient.data + (size_t)chunk * {network.n_params};
    for (int i = 0; i < {network.n_params}; ++i) weight_gradient[i] = 0.0f;
    const float norm = {norm};
    float value = 0.0f;
    bool finite = true;
    for (int row = begin; row < end; row += {BLOCK}) {{
        const int n = end - row < {BLOCK} ? end - row : {BLOCK}, row_features = row;
        {_forward_source(encoding, network, keep=True)}
        {_output_backward_source(network, loss_otype)}
        {_layers_backward_source(network)}
        {_code_backward_source(encoding, network, input_gradient)}
    }}
    for (int k = 0; k < {n_neurons}; ++k)
        for (int j = 0; j < {n_outputs}; ++j)
            weight_gradient[{first_output} + k * {n_outputs} + j] = output_gradient[k * {n_padded} + j];
    chunk_loss.data[chunk] = value;
    chunk_finite.data[chunk] = finite && all_finite(weight_gradient, {network.n_params});
    """


def _scratch_source(network: NetworkConfig, n_inputs: int) -> str:
    """What a block keeps between forward and backward, all (neurons x BLOCK) but the weights' output_gradient."""
    n_hidden, n_neurons, n_padded = network.n_hidden_layers, network.n_neurons, _padded(network.n_outputs)
    widest = max(n_neurons, network.n_inputs, n_padded)
    arrays = {
        "code": network.n_inputs,
        "hidden": n_hidden * n_neurons,
        "hidden_sums": n_hidden * n_neurons if needs_sum(network.activation) else 0,
        "output": n_padded,
        "output_sums": n_padded if needs_sum(network.output_activation) else 0,
        "dL_doutput": n_padded,
        "delta": 2 * widest,  # gradient by the sums of one layer and of the next
        "delta_rows": widest,  # sample by sample
    }
    n_columns = n_inputs + sum(arrays.values()) + n_neurons * n_padded // BLOCK
    check_scratch(n_columns, f"training {n_hidden} layers of {n_neurons} neurons, activation {network.activation},")
    layers = {"hidden": n_hidden, "hidden_sums": n_hidden, "delta": 2}
    source = f"alignas(64) float output_gradient[{n_neurons * n_padded}] = {{}};\n"
    for name, n_rows in arrays.items():
        if n_rows > 0:
            n_layers = layers.get(name, 1)
            layer = f"[{n_layers}]" if name in layers else ""
            source += f"alignas(64) float {name}{layer}[{n_rows // n_layers * BLOCK}];\n"
    return source


def _output_backward_source(network: NetworkConfig, loss_otype: str | None) -> str:
    """C++ that adds the block's loss to `value` and sets dL_doutput, the gradient by the sums of the outputs."""
    n_neurons, n_outputs, n_padded = network.n_neurons, network.n_outputs, _padded(network.n_outputs)
    with_sum = "const f16 v = *(const f16*)(output_sums + at);" if needs_sum(network.output_activation) else ""
    return f"""
    for (int s = 0; s < {BLOCK}; ++s) {{
        float prediction[{n_outputs}], gradient[{n_padded}] = {{}};
        if (s < n) {{
            for (int j = 0; j < {n_outputs}; ++j) prediction[j] = output[j * {BLOCK} + s];
            const float* target = (const float*)((const char*)y.data + (size_t)(row + s) * y.strides[0]);
            const float weight = pdf.shape[0] > 0 ? norm / pdf.data[row + s] : norm;
            {loss_source(loss_otype, n_outputs)}
        }}
        for (int j = 0; j < {n_padded}; ++j) dL_doutput[j * {BLOCK} + s] = gradient[j];
    }}
    for (int at = 0; at < {n_outputs * BLOCK}; at += 16) {{
        const f16 y = *(const f16*)(output + at);
        {with_sum}
        (void)y;
        *(f16*)(dL_doutput + at) *= {derivative_source(network.output_activation)};
    }}
    transpose(delta_rows, dL_doutput, {n_padded}, {BLOCK});
    add_weight_gradient(output_gradient, hidden[{network.n_hidden_layers - 1}], delta_rows, {n_neurons}, {n_padded});
    """


def _layers_backward_source(network: NetworkConfig) -> str:
    """C++ that adds to the hidden layers' weight gradients and leaves the gradient by the first sums in delta[0]."""
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    last, n_weights = network.n_hidden_layers - 1, network.n_neurons**2
    with_sum = "const f16 v = *(const f16*)(hidden_sums[i] + at);" if needs_sum(network.activation) else ""
    return f"""
    for (int i = {last}; i >= 0; --i) {{
        auto through = [&](f16 gradient, int at) __attribute__((always_inline)) {{
            const f16 y = *(const f16*)(hidden[i] + at);
            {with_sum}
            (void)y;
            return gradient * {derivative_source(network.activation)};
        }};
        const float* after = params.data + {n_inputs * n_neurons} + i * {n_weights};  // weights of the next layer
        if (i == {last})
            layer(delta[i % 2], after, {n_outputs}, 1, dL_doutput, {n_neurons}, {n_outputs}, through);
        else
            layer(delta[i % 2], after, {n_neurons}, 1, delta[(i + 1) % 2], {n_neurons}, {n_neurons}, through);
        transpose(delta_rows, delta[i % 2], {n_neurons}, {BLOCK});
        add_weight_gradient(weight_gradient + (i > 0 ? {n_inputs * n_neurons} + (i - 1) * {n_weights} : 0),
                       i > 0 ? hidden[i - 1] : code, delta_rows, i > 0 ? {n_neurons} : {n_inputs}, {n_neurons});
    }}
    """


def _code_backward_source(encoding: EncodingConfig, network: NetworkConfig, input_gradient: bool) -> str:
    """C++ that turns delta[0] into the gradients of the code and of the grid features, where they are wanted."""
    if not encoding.grids and not input_gradient:
        return ""
    n_inputs = network.n_inputs
    source = f"""
    float* dL_dcode = delta[1];
    layer(dL_dcode, params.data, {network.n_neurons}, 1, delta[0], {n_inputs}, {network.n_neurons},
          [](f16 v, int) __attribute__((always_inline)) {{ return v; }});
    finite &= all_finite(dL_dcode, {n_inputs * BLOCK});
    """
    if input_gradient:
        source += f"""
        for (int s = 0; s < n; ++s) {{
            float* to = (float*)((char*)code_gradient.data + (size_t)(row + s) * code_gradient.strides[0]);
            for (int k = 0; k < {n_inputs}; ++k) to[k] = dL_dcode[k * {BLOCK} + s];
        }}
        """
    for part in encoding.grids:
        n_features = part.config.n_features_per_level
        source += f"""
        for (int l = 0; l < {part.config.n_levels}; ++l) {{
            float* to = (float*)((char*)features.data
                + ({encoding.gradient_row(part)} + l) * (size_t)features.strides[0]);
            const size_t stride = features.shape[2];
            for (int s = 0; s < n; ++s)
                for (int f = 0; f < {n_features}; ++f)
                    to[(row + s) * stride + f] = dL_dcode[({part.first_output} + l * {n_features} + f) * {BLOCK} + s];
        }}
        """
    return source
