"""C++ of the native functions of `network_mma.py`: a warp's forward pass, backward pass and weight gradients."""

from .activation import needs_sum
from .mma import FINITE_SOURCE, STORE_SOURCE, for_registers, primitives_source, product_source, setup_source
from .network import NetworkConfig

TILE_BLOCKS = 4  # blocks of 16 along each side of a warp's tile of a weight gradient


def padded(n: int) -> int:
    """`n` rounded up to a multiple of 16."""
    return -(-n // 16) * 16


def packed_size(network: NetworkConfig) -> int:
    """Halves of the packed weights: every layer for the forward pass, then every layer transposed."""
    return 2 * sum(n_in * padded(n_out) for _, n_in, n_out in network.layers)


def delta_columns(network: NetworkConfig) -> int:
    """Columns of the stored gradients by pre-activations: hidden layers, then the outputs padded to 16 with zeros."""
    return network.n_hidden_layers * network.n_neurons + padded(network.n_outputs)


def weight_gradient_warps(network: NetworkConfig) -> int:
    """Warps per chunk of rows that `accumulate_weight_gradient_mma` needs: one per tile, one for the loss."""
    return sum(n_rows * n_columns for _, _, n_rows, n_columns in _tiles(network)) + 1


def state_size(network: NetworkConfig) -> int:
    """What a lane keeps from the forward to the backward pass: four marks, its row's outputs, their derivatives."""
    return 4 + 2 * network.n_outputs


def forward_source(network: NetworkConfig, keep: bool) -> str:
    """C++ from `code` to the outputs, or (keep) to the state for the backward pass."""
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_hidden = network.n_hidden_layers
    first_hidden, last = n_inputs * n_neurons, network.layers[-1][0]
    stored = n_inputs + n_hidden * n_neurons

    def hidden(layer: str, to: str) -> str:
        """Activate accumulators into block j of `to`, and keep what the backward pass needs."""
        activated = "pack_half2(activate(from[0]), activate(from[1]))"
        if network.activation == "ReLU":
            activated = "pack_half2_relu(from[0], from[1])"
        finish = for_registers(f"{to}[8 * j + at] = {activated};")
        if not keep:
            return finish
        finish += (
            f"store_block(out_activations, {stored}, {n_inputs} + ({layer}) * {n_neurons} + 16 * j, {to} + 8 * j);"
        )
        if needs_sum(network.activation):  # the derivative waits where the delta will be
            finish += "unsigned slope[8];" + for_registers(
                "slope[at] = pack_half2(derivative(from[0], 0.0f), derivative(from[1], 0.0f));"
            )
            finish += f"store_block(out_deltas, {delta_columns(network)}, ({layer}) * {n_neurons} + 16 * j, slope);"
        return finish

    source = setup_source(network.activation, network.output_activation)
    if keep:
        source += f"wp::vec_t<{state_size(network)}, wp::uint32> state;\nunsigned mark[4] = {{}};\n" + STORE_SOURCE
    source += f"""
    unsigned input[{n_inputs // 2}], a[{n_neurons // 2}];
    sync_warp();
    #pragma unroll
    for (int k = 0; k < {n_inputs // 16}; ++k) {{
        rows_to_block(code.c + 16 * k, input + 8 * k);
        {f"store_block(out_activations, {stored}, 16 * k, input + 8 * k);" if keep else ""}
    }}
    """
    source += product_source(n_inputs, n_neurons, "0", "input", hidden("0", "a"))
    if n_hidden > 1:
        weights = f"{first_hidden} + (layer - 1) * {n_neurons * n_neurons}"
        source += f"""
        #pragma unroll 1
        for (int layer = 1; layer < {n_hidden}; ++layer) {{
            unsigned next[{n_neurons // 2}];
            {product_source(n_neurons, n_neurons, weights, "a", hidden("layer", "next"))}
            #pragma unroll
            for (int e = 0; e < {n_neurons // 2}; ++e) a[e] = next[e];
        }}
        """
    take = "state.c[4 + 16 * j + e] = as_uint(y);" if keep else "output.c[16 * j + e] = y;"
    if keep:
        take += f"state.c[{4 + n_outputs} + 16 * j + e] = as_uint(output_derivative(row[e], y));"
    else:
        source += f"wp::vec_t<{n_outputs}, float> output;\n"
    source += product_source(
        n_neurons,
        padded(n_outputs),
        f"{last}",
        "a",
        f"""
        float row[16];
        accumulators_to_row(c, row);
        #pragma unroll
        for (int e = 0; e < 16; ++e)
            if (16 * j + e < {n_outputs}) {{
                const float y = activate_output(row[e]);
                {take}
            }}
        """,
    )
    if not keep:
        return source + "return output;\n"
    return (
        source
        + """
    #pragma unroll
    for (int k = 0; k < 4; ++k) state.c[k] = mark[k];
    return state;
    """
    )


def prediction_source(network: NetworkConfig) -> str:
    """C++ that takes the outputs from the state."""
    return (
        primitives_source()
        + f"""
    wp::vec_t<{network.n_outputs}, float> prediction;
    #pragma unroll
    for (int j = 0; j < {network.n_outputs}; ++j) prediction.c[j] = as_float(state.c[4 + j]);
    return prediction;
    """
    )


def backward_source(network: NetworkConfig) -> str:
    """C++ from the gradients of the outputs and the kept state to those of all sums and of the code."""
    n_inputs, n_neurons, n_outputs = network.n_inputs, network.n_neurons, network.n_outputs
    n_hidden = network.n_hidden_layers
    transposed = packed_size(network) // 2
    first_hidden, last = transposed + n_inputs * n_neurons, transposed + network.layers[-1][0]
    stored, stored_deltas = n_inputs + n_hidden * n_neurons, delta_columns(network)

    def delta(layer: str, to: str) -> str:
        """Accumulators times the activation's derivative into block j of `to`."""
        low, high = "derivative(0.0f, low_float(kept[at]))", "derivative(0.0f, high_float(kept[at]))"
        load = f"load_block(out_activations, {stored}, {n_inputs} + ({layer}) * {n_neurons} + 16 * j, kept);"
        if needs_sum(network.activation):
            low, high = "low_float(kept[at])", "high_float(kept[at])"
            load = f"load_block(out_deltas, {stored_deltas}, ({layer}) * {n_neurons} + 16 * j, kept);"
        product = f"pack_half2(from[0] * {low}, from[1] * {high})"
        if network.activation == "ReLU":
            product = "where_positive(pack_half2(from[0], from[1]), kept[at])"
        return (
            f"unsigned kept[8];\n{load}"
            + for_registers(f"{to}[8 * j + at] = {product};")
            + f"store_block(out_deltas, {stored_deltas}, ({layer}) * {n_neurons} + 16 * j, {to} + 8 * j);"
        )

    source = setup_source(network.activation, network.output_activation)
    source += f"""
    unsigned mark[4];
    #pragma unroll
    for (int k = 0; k < 4; ++k) mark[k] = state.c[k];
    {STORE_SOURCE}
    unsigned output[{padded(n_outputs) // 2}], a[{n_neurons // 2}];
    sync_warp();
    #pragma unroll
    for (int j = 0; j < {padded(n_outputs) // 16}; ++j) {{
        float row[16] = {{}};
        #pragma unroll
        for (int e = 0; e < 16; ++e)
            if (16 * j + e < {n_outputs})
                row[e] = gradient.c[16 * j + e] * as_float(state.c[{4 + n_outputs} + 16 * j + e]);
        rows_to_block(row, output + 8 * j);
        store_block(out_deltas, {stored_deltas}, {n_hidden * n_neurons} + 16 * j, output + 8 * j);
    }}
    """
    source += product_source(padded(n_outputs), n_neurons, f"{last}", "output", delta(f"{n_hidden - 1}", "a"))
    if n_hidden > 1:
        weights = f"{first_hidden} + layer * {n_neurons * n_neurons}"
        source += f"""
        #pragma unroll 1
        for (int layer = {n_hidden - 2}; layer >= 0; --layer) {{
            unsigned next[{n_neurons // 2}];
            {product_source(n_neurons, n_neurons, weights, "a", delta("layer", "next"))}
            #pragma unroll
            for (int e = 0; e < {n_neurons // 2}; ++e) a[e] = next[e];
        }}
        """
    store_code = (
        "unsigned block[8];\n"
        + for_registers("block[at] = pack_half2(from[0], from[1]);")
        + "store_rows(out_dL_dcode, 16 * j, block);"
    )
    return (
        source
        + f"""
    if (out_dL_dcode.shape[0] > 0) {{
        {product_source(n_neurons, n_inputs, f"{transposed}", "a", store_code)}
    }}
    """
        + FINITE_SOURCE
    )


def _tiles(network: NetworkConfig) -> list[tuple[int, int, int, int]]:
    """Each layer's matrix in tiles: blocks of 16 along a tile's rows and columns, tiles along both."""

    def side(n: int) -> int:
        return max(b for b in range(1, TILE_BLOCKS + 1) if n // 16 % b == 0)

    tiles = []
    for _, n_in, n_out in network.layers:
        rows, columns = side(n_in), side(padded(n_out))
        tiles.append((rows, columns, n_in // 16 // rows, padded(n_out) // 16 // columns))
    return tiles


def weight_gradient_source(network: NetworkConfig) -> str:
    """C++ of one warp's tile: activations transposed, times deltas, over the rows [begin, end)."""
    n_inputs, n_neurons, n_hidden = network.n_inputs, network.n_neurons, network.n_hidden_layers
    tiles = _tiles(network)
    stored, stored_deltas = n_inputs + n_hidden * n_neurons, delta_columns(network)
    # Layers of the same shape share code
    kinds = [(0, 1, tiles[0]), (1, n_hidden - 1, tiles[1]), (n_hidden, 1, tiles[-1])]
    source = (
        primitives_source()
        + """
    const int g = lane >> 2, t = lane & 3;
    // This lane's registers of 16 rows, 16 columns
    auto load_fragments = [&](const wp::array_t<wp::float16>& matrix, int n_columns, int row, int column) {
        return ((const Quad*)matrix.data)[(size_t)(row >> 5) * (4 * n_columns) + 4 * column + 2 * (row & 16) + lane];
    };
    """
    )
    for first_layer, n_layers, (rows, columns, n_rows, n_columns) in kinds:
        if n_layers == 0:
            continue
        first, _, n_out = network.layers[first_layer]
        n_tiles = n_rows * n_columns
        first_activation = n_inputs + (first_layer - 1) * n_neurons if first_layer else 0
        aligned = n_out % 16 == 0
        value = "FloatQuad{{d[0] * inv_scale, d[1] * inv_scale, d[4] * inv_scale, d[5] * inv_scale}}"
        store = (
            f"*(FloatQuad*)(to + r * {n_out} + o) = {value};"
            if aligned
            else f"""
            const FloatQuad f = {value};
            #pragma unroll
            for (int e = 0; e < 4; ++e)
                if (o + e < {n_out}) to[r * {n_out} + o + e] = f.v[e];
            """
        )
        source += f"""
    if (tile < {n_layers * n_tiles}) {{
        const int in_column = {16 * rows} * (tile % {n_tiles} / {n_columns});
        const int out_column = {16 * columns} * (tile % {n_columns});
        const int from = {first_activation} + (tile / {n_tiles}) * {n_neurons} + in_column;
        const int delta = {first_layer * n_neurons} + (tile / {n_tiles}) * {n_neurons} + out_column;
        float* to = (float*)((char*)chunk_gradient.data + (size_t)chunk * chunk_gradient.strides[0])
            + {first} + tile / {n_tiles} * {n_neurons * n_neurons};
        float c[{rows * columns * 8}] = {{}};
        Quad a[{rows}], b[{columns}];
        auto load = [&](int row) {{
            if (row >= end) return;
            #pragma unroll
            for (int m = 0; m < {rows}; ++m) a[m] = load_fragments(activations, {stored}, row, from + 16 * m);
            #pragma unroll
            for (int j = 0; j < {columns}; ++j) b[j] = load_fragments(deltas, {stored_deltas}, row, delta + 16 * j);
        }};
        load(begin);
        #pragma unroll 1
        for (int row = begin; row < end; row += 16) {{
            unsigned at[{rows}][4], bt[{columns}][4];
            #pragma unroll
            for (int k = 0; k < 4; ++k) {{
                #pragma unroll
                for (int m = 0; m < {rows}; ++m) at[m][k] = transpose_8x8(a[m].v[2 * (k & 1) + (k >> 1)]);
                #pragma unroll
                for (int j = 0; j < {columns}; ++j) bt[j][k] = transpose_8x8(b[j].v[k]);
            }}
            load(row + 16);  // while the tensor cores work
            #pragma unroll
            for (int m = 0; m < {rows}; ++m)
                #pragma unroll
                for (int j = 0; j < {columns}; ++j) {{
                    mma_16816(c + 8 * (m * {columns} + j), at[m], bt[j][0], bt[j][1]);
                    mma_16816(c + 8 * (m * {columns} + j) + 4, at[m], bt[j][2], bt[j][3]);
                }}
        }}
        // Accumulator row 8 s + g is input 4 (g / 2) + g % 2 + 2 s; two tiles hold outputs 4 t ... 4 t + 3
        #pragma unroll
        for (int m = 0; m < {rows}; ++m)
            #pragma unroll
            for (int j = 0; j < {columns}; ++j)
                #pragma unroll
                for (int s = 0; s < 2; ++s) {{
                    const float* d = c + 8 * (m * {columns} + j) + 2 * s;
                    const int r = in_column + 16 * m + 4 * (g >> 1) + (g & 1) + 2 * s;
                    const int o = out_column + 16 * j + 4 * t;
                    {store}
                }}
        return;
    }}
    tile -= {n_layers * n_tiles};
    """
    return source
