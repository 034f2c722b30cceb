"""Encodings on the CPU: C++ with vector types, 16 samples to a vector.

`encode_block_source` encodes a block of samples into the network's input. Grids are read beforehand, level by level for
many samples (`grid_wide.py`). The formulas are those of `encoding.py`.
"""

import warp as wp

from .encoding import Encoding, Identity, OneBlob, Part, TriangleWave
from .grid import HashGrid

wp.set_module_options({"enable_backward": False})

BLOCK = 64  # samples encoded at once


def encode_block_source(encoding: Encoding) -> str:
    """C++ that encodes rows [row, row + n) of `x` into `code` (BLOCK x n_padded, row-major), n <= BLOCK.

    Rows past n repeat row n - 1. Needs VECTOR_SOURCE and the variables x (Warp array), row, n, code, and for grids
    `features`, the output of `make_encode_grid_wide`, whose row `row_features` belongs to row `row` of x.
    """
    n_padded, n_inputs = encoding.n_padded, encoding.n_input_dims
    source = f"""
    alignas(64) float in[{n_inputs}][{BLOCK}];
    for (int s = 0; s < {BLOCK}; ++s) {{
        const float* from = (const float*)((const char*)x.data + (size_t)(row + (s < n ? s : n - 1)) * x.strides[0]);
        for (int d = 0; d < {n_inputs}; ++d) in[d][s] = from[d];
    }}
    for (int s = 0; s < {BLOCK}; ++s)
        for (int k = {encoding.n_output_dims}; k < {n_padded}; ++k) code[s * {n_padded} + k] = {encoding.pad_value!r}f;
    // Store 16 samples of one output column
    auto put = [&](int s, int column, f16 v) {{
        for (int j = 0; j < 16; ++j) code[(s + j) * {n_padded} + column] = v[j];
    }};
    """
    for part in encoding.parts:
        source += "{\n" + _ENCODE_SOURCE[type(part.config)](part, n_padded, encoding) + "}\n"
    return source


def _identity_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    config = part.config
    return f"""
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; ++s)
            code[s * {n_padded} + {part.first_output} + d] =
                {config.scale!r}f * in[{part.first_input} + d][s] + {config.offset!r}f;
    """


def _triangle_wave_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    config = part.config
    return f"""
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; s += 16) {{
            f16 v = *(f16*)&in[{part.first_input} + d][s];
            float frequency = 0.5f;
            for (int k = 0; k < {config.n_frequencies}; ++k, frequency *= 2.0f) {{
                f16 u = v * frequency + 0.25f * k;
                f16 whole = to_float(to_int(u));
                f16 f = u - (whole > u ? whole - 1.0f : whole) - 0.5f;
                put(s, {part.first_output} + d * {config.n_frequencies} + k, 4.0f * (f > zero ? f : -f) - 1.0f);
            }}
        }}
    """


def _one_blob_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    config = part.config
    n_bins = config.n_bins
    wrapped = "quartic({0}) + quartic({0} - 1.0f) + quartic({0} + 1.0f)"
    left = wrapped.format("(-v)") if config.wrap else "zero"
    right = wrapped.format("(boundary - v)") if config.wrap else "quartic(boundary - v)"
    last = right if config.wrap else "zero + 1.0f"
    return f"""
    auto quartic = [&](f16 t) {{
        f16 u = t * {float(n_bins)!r}f;
        f16 u2 = u * u;
        return clamp01((15.0f / 16.0f) * u * (1.0f - (2.0f / 3.0f) * u2 + 0.2f * u2 * u2) + 0.5f);
    }};
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; s += 16) {{
            f16 v = *(f16*)&in[{part.first_input} + d][s];
            f16 left = {left};
            for (int k = 0; k < {n_bins}; ++k) {{
                const float boundary = (k + 1) * {1.0 / n_bins!r}f;
                f16 right = k < {n_bins - 1} ? {right} : {last};
                put(s, {part.first_output} + d * {n_bins} + k, right - left);
                left = right;
            }}
        }}
    """


def _grid_source(part: Part, n_padded: int, encoding: Encoding) -> str:
    grid = part.config
    n_features = grid.n_features_per_level
    return f"""
    for (int l = 0; l < {grid.n_levels}; ++l) {{
        const float* from = (const float*)((const char*)features.data
            + ({encoding.gradient_row(part)} + l) * (size_t)features.strides[0]
            + row_features * (size_t)features.strides[1]);
        for (int s = 0; s < {BLOCK}; ++s)
            for (int f = 0; f < {n_features}; ++f)
                code[s * {n_padded} + {part.first_output} + l * {n_features} + f] =
                    s < n ? from[s * features.shape[2] + f] : 0.0f;
    }}
    """


_ENCODE_SOURCE = {
    Identity: _identity_source,
    TriangleWave: _triangle_wave_source,
    OneBlob: _one_blob_source,
    HashGrid: _grid_source,
}
