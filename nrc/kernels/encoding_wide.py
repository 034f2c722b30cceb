"""Encodings on the CPU: C++ with vector types, 16 samples to a vector.

`encode_columns_source` encodes a block of samples into the network's input. Grids are read beforehand, level by level
for many samples (`grid_wide.py`). The formulas are those of `encoding.py`.
"""

from functools import cache

import warp as wp

from .encoding import UNIQUE, EncodingConfig, n_valid_rows
from .encoding_parts import Frequency, Identity, OneBlob, Part, SphericalHarmonics, TriangleWave
from .grid import Grid
from .vectors import SIN_SOURCE, VECTOR_SOURCE

wp.set_module_options({"enable_backward": False})

BLOCK = 64  # samples encoded at once
MAX_SCRATCH = 6 << 20  # bytes of a thread's stack that a block may take


def encode_columns_source(encoding: EncodingConfig) -> str:
    """C++ that encodes rows [row, row + n) of `x` into `code` (n_padded x BLOCK): column by column, n <= BLOCK.

    Rows past n repeat row n - 1, without grid features. Needs VECTOR_SOURCE and the variables x (Warp array), row, n,
    code, and for grids `features`, the output of `make_encode_grid_wide`, whose row `row_features` belongs to row `row`
    of x.
    """
    n_inputs = encoding.n_input_dims
    source = f"""
    alignas(64) float in[{n_inputs}][{BLOCK}];
    for (int s = 0; s < {BLOCK}; ++s) {{
        const float* from = (const float*)((const char*)x.data + (size_t)(row + (s < n ? s : n - 1)) * x.strides[0]);
        for (int d = 0; d < {n_inputs}; ++d) in[d][s] = from[d];
    }}
    auto floor = [](f16 v) {{ return __builtin_elementwise_floor(v); }};
    // Store 16 samples of one output column
    auto put = [&](int s, int column, f16 v) {{ *(f16*)(code + column * {BLOCK} + s) = v; }};
    """
    for begin, end, value in encoding.gaps:
        source += f"for (int i = {begin * BLOCK}; i < {end * BLOCK}; ++i) code[i] = {value!r}f;\n"
    for part in encoding.parts:
        source += "{\n" + _ENCODE_SOURCE[type(part.config)](part, encoding) + "}\n"
    return source


def _identity_source(part: Part, encoding: EncodingConfig) -> str:
    config = part.config
    return f"""
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; s += 16)
            put(s, {part.first_output} + d, {config.scale!r}f * *(f16*)&in[{part.first_input} + d][s]
                + {config.offset!r}f);
    """


def _frequency_source(part: Part, encoding: EncodingConfig) -> str:
    config = part.config
    return f"""
    {SIN_SOURCE}
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; s += 16) {{
            f16 v = *(f16*)&in[{part.first_input} + d][s];
            for (int k = 0; k < {config.n_frequencies}; ++k, v = v + v) {{
                // Less the nearest even number: sin(pi v) keeps its precision at high frequencies
                f16 angle = 3.14159265f * (v - 2.0f * floor(0.5f * v + 0.5f));
                const int column = {part.first_output} + (d * {config.n_frequencies} + k) * 2;
                put(s, column, sine(angle));
                put(s, column + 1, cosine(angle));
            }}
        }}
    """


def _triangle_wave_source(part: Part, encoding: EncodingConfig) -> str:
    config = part.config
    return f"""
    for (int d = 0; d < {config.n_dims}; ++d)
        for (int s = 0; s < {BLOCK}; s += 16) {{
            f16 v = *(f16*)&in[{part.first_input} + d][s];
            float frequency = 0.5f;
            for (int k = 0; k < {config.n_frequencies}; ++k, frequency *= 2.0f) {{
                f16 u = v * frequency + 0.25f * k;
                f16 f = u - floor(u) - 0.5f;
                put(s, {part.first_output} + d * {config.n_frequencies} + k, 4.0f * (f > zero ? f : -f) - 1.0f);
            }}
        }}
    """


def _one_blob_source(part: Part, encoding: EncodingConfig) -> str:
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


def _spherical_harmonics_source(part: Part, encoding: EncodingConfig) -> str:
    config = part.config
    return f"""
    static const float factors[] = {{{", ".join(f"{f!r}f" for f in config.normalizations)}}};
    for (int s = 0; s < {BLOCK}; s += 16) {{
        const f16 x = 2.0f * *(f16*)&in[{part.first_input}][s] - 1.0f;
        const f16 y = 2.0f * *(f16*)&in[{part.first_input + 1}][s] - 1.0f;
        const f16 z = 2.0f * *(f16*)&in[{part.first_input + 2}][s] - 1.0f;
        f16 re = zero + 1.0f, im = zero;  // of (x + i y)^m
        for (int m = 0; m < {config.degree}; ++m) {{
            f16 p = zero + 1.0f, p_before = zero;  // polynomial in z by Legendre's recurrence over l
            for (int l = m; l < {config.degree}; ++l) {{
                const int at = l * l + l;
                put(s, {part.first_output} + at - m, factors[at + m] * p * im);
                put(s, {part.first_output} + at + m, factors[at + m] * p * re);
                const f16 p_next = ((2 * l + 1.0f) * z * p - (l + m + 0.0f) * p_before) / (l + 1.0f - m);
                p_before = p;
                p = p_next;
            }}
            const f16 re_next = re * x - im * y;
            im = re * y + im * x;
            re = re_next;
        }}
    }}
    """


def _grid_source(part: Part, encoding: EncodingConfig) -> str:
    grid = part.config
    n_features = grid.n_features_per_level
    # Vectors of consecutive features, sorted by feature in log2(n_features) turns
    even, odd = (", ".join(str(2 * j + k) for j in range(16)) for k in range(2))
    sort, names = "", [f"a{f}" for f in range(n_features)]
    for f, name in enumerate(names):
        sort += f"const f16 {name} = *(const f16*)(from + s * {n_features} + {16 * f});\n"
    turn = n_features
    while turn > 1:
        after = []
        for k in range(n_features // turn):
            group = names[k * turn : (k + 1) * turn]
            for tail, lanes in (("e", even), ("o", odd)):
                for left, right in zip(group[::2], group[1::2], strict=True):
                    after.append(f"{left}{tail}")
                    sort += f"const f16 {left}{tail} = __builtin_shufflevector({left}, {right}, {lanes});\n"
        names, turn = after, turn // 2
    # The even ones of the even ones, and so on: features in the order of their reversed bits
    n_bits = n_features.bit_length() - 1
    for k, name in enumerate(names):
        feature = sum((k >> b & 1) << (n_bits - 1 - b) for b in range(n_bits))
        sort += f"put(s, column + {feature}, {name});\n"
    return f"""
    const size_t stride = features.shape[2];
    for (int l = 0; l < {grid.n_levels}; ++l) {{
        const float* from = (const float*)((const char*)features.data
            + ({encoding.gradient_row(part)} + l) * (size_t)features.strides[0]
            + row_features * (size_t)features.strides[1]);
        const int column = {part.first_output} + l * {n_features};
        if (n == {BLOCK} && stride == {n_features}) {{
            for (int s = 0; s < {BLOCK}; s += 16) {{
                {sort}
            }}
            continue;
        }}
        for (int f = 0; f < {n_features}; ++f)
            for (int s = 0; s < {BLOCK}; ++s)
                code[(column + f) * {BLOCK} + s] = s < n ? from[s * stride + f] : 0.0f;
    }}
    """


_ENCODE_SOURCE = {
    Identity: _identity_source,
    Frequency: _frequency_source,
    TriangleWave: _triangle_wave_source,
    OneBlob: _one_blob_source,
    SphericalHarmonics: _spherical_harmonics_source,
    Grid: _grid_source,
}


def check_scratch(n_columns: int, what: str) -> None:
    """Raise ValueError if a block of so many columns does not fit a thread's stack."""
    size = 4 * BLOCK * n_columns
    if size > MAX_SCRATCH:
        raise ValueError(
            f"{what} needs {size >> 20} MB of a thread's stack on the CPU; at most {MAX_SCRATCH >> 20} MB are used"
        )


@cache
def make_encode_wide(encoding: EncodingConfig):
    """CPU kernel that encodes a block of rows per index. Raises ValueError if it has too many columns."""
    check_scratch(encoding.n_input_dims + encoding.n_padded, f"an encoding of {encoding.n_padded} columns")
    padding_begin, n_padding = encoding.final_padding
    n_padded = encoding.n_padded
    source = f"""
    {VECTOR_SOURCE}
    alignas(64) float code[{BLOCK * n_padded}];
    {encode_columns_source(encoding)}
    for (int s = 0; s < n; ++s) {{
        float* to = (float*)((char*)out.data + (size_t)(row + s) * out.strides[0]);
        for (int k = 0; k < {padding_begin}; ++k) to[k] = code[k * {BLOCK} + s];
        for (int k = {padding_begin + n_padding}; k < {n_padded}; ++k) to[k - {n_padding}] = code[k * {BLOCK} + s];
    }}
    """

    @wp.func_native(source)
    def encode_block(
        row: int,
        row_features: int,
        n: int,
        x: wp.array2d[float],
        features: wp.array3d[float],
        out: wp.array2d[float],
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def encode_wide(
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
        out_code: wp.array2d[float],  # (capacity, n_output_dims)
    ):
        """Encode a block of rows [first_row, first_row + n_rows) less the final padding. One thread per BLOCK rows."""
        begin = (first + wp.tid()) * BLOCK
        row = first_row + begin
        n = wp.min(wp.min(BLOCK, n_rows - begin), n_valid_rows(x.shape[0], count) - row)
        if n > 0:
            encode_block(row, begin, n, x, features, out_code)

    return encode_wide
