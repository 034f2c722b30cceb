"""C++ of matrix products by a warp, with operands that stay in registers: `mma.m16n8k16` of halves, summed in fp32.

A warp holds 32 rows, as two tiles of 16. The accumulators of a product lie where the next product expects its fp16
operand, so a chain of products never leaves the registers.

Everything is done in blocks of 16 x 16, and a block's columns are dealt to the four lanes that share a row so that lane
t owns columns 4t ... 4t + 3 (the instruction deals 2t, 2t + 1, 2t + 8, 2t + 9; a product does not mind in which order
its inner dimension runs). A lane's share of a row is then 8 contiguous bytes. A block of fragments is an array of 8
registers of two halves: register 4 m + 2 s + h holds row 16 m + 8 h + lane / 4, columns 4 (lane % 4) + 2 s + (0, 1).

The second operand is read from memory, where `weight_place` puts every element where its lane reads 8 at a time.

A cast of the form `float (x)` is a macro in Warp's headers: these sources write (float)x.
"""

import warp as wp

from .activation import LEAKY_SLOPE, SHARPNESS

wp.set_module_options({"enable_backward": False})

WARP = 32  # lanes, and rows of a warp

# What differs between a GPU and the emulated warp of the tests. Halves travel in pairs, the first in the lower bits.
PRIMITIVES = """
const int lane = threadIdx.x & 31;
__shared__ alignas(16) unsigned stages[WP_TILE_BLOCK_DIM / 32][512];
unsigned* stage = stages[threadIdx.x >> 5];
auto sync_warp = [] { __syncwarp(); };
auto ballot = [](bool vote) { return __ballot_sync(0xffffffffu, vote); };
auto shuffle_xor = [](float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); };
auto as_uint = [](float value) { return __float_as_uint(value); };
auto as_float = [](unsigned bits) { return __uint_as_float(bits); };
auto fast_exp = [](float x) { return __expf(x); };
auto fast_log = [](float x) { return __logf(x); };
auto fast_sin = [](float x) { return __sinf(x); };
auto fast_cos = [](float x) { return __cosf(x); };
auto fast_reciprocal = [](float x) { return __fdividef(1.0f, x); };
auto pack_half2 = [](float low, float high) {
    unsigned halves;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
    return halves;
};
// Negative values become 0, a NaN stays one
auto pack_half2_relu = [](float low, float high) {
    unsigned halves;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
    return halves;
};
auto low_float = [](unsigned halves) {
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(halves));
    return value;
};
auto high_float = [](unsigned halves) {
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(halves));
    return value;
};
// halves times 1 where kept > 0, times 0 elsewhere
auto where_positive = [](unsigned halves, unsigned kept) {
    unsigned product;
    asm("{ .reg .b32 on; set.gt.f16x2.f16x2 on, %2, %3; mul.rn.f16x2 %0, %1, on; }"
        : "=r"(product) : "r"(halves), "r"(kept), "r"(0u));
    return product;
};
// mark + 0 * halves: stays 0 while all halves are finite, then NaN
auto mark_non_finite = [](unsigned& mark, unsigned halves) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(mark) : "r"(halves), "r"(0u));
};
// Read-only data, 16 bytes
auto load_quad = [](const Quad* from) {
    Quad q;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3]) : "l"(from));
    return q;
};
// c (16 x 8, fp32) += a (16 x 16, fp16) b (16 x 8, fp16), fragments as laid out by the PTX ISA, "mma.m16n8k16"
auto mma_16816 = [](float* c, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
};
// Lane l has row l / 4, columns 2 (l % 4) + (0, 1) of an 8 x 8 matrix and receives those of its transpose
auto transpose_8x8 = [](unsigned halves) {
    unsigned transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(halves));
    return transposed;
};
"""

TYPES = """
struct alignas(8) Pair { unsigned v[2]; };
struct alignas(16) Quad { unsigned v[4]; };
struct alignas(16) FloatQuad { float v[4]; };
"""


def primitives_source() -> str:
    """Types and primitives, read at each call: the tests put an emulated warp in the primitives' place."""
    return TYPES + PRIMITIVES


# Moving rows between lanes and fragments, through the 2 KB of shared memory that a warp has. Places in it are permuted
# so that no two lanes meet in a bank.
BLOCKS_SOURCE = """
const int g = lane >> 2, t = lane & 3;
// 16 values of this lane's row -> block of fragments
auto rows_to_block = [&](const float* row, unsigned* block) {
    #pragma unroll
    for (int c = 0; c < 2; ++c) {
        Quad q;
        #pragma unroll
        for (int e = 0; e < 4; ++e) q.v[e] = pack_half2(row[8 * c + 2 * e], row[8 * c + 2 * e + 1]);
        ((Quad*)stage)[2 * lane + (c ^ (lane >> 2 & 1))] = q;
    }
    sync_warp();
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int r = 8 * i + g;
        const Pair p = ((const Pair*)stage)[4 * r + 2 * (t >> 1 ^ (r >> 2 & 1)) + (t & 1)];
        block[4 * (i >> 1) + (i & 1)] = p.v[0];
        block[4 * (i >> 1) + (i & 1) + 2] = p.v[1];
    }
    sync_warp();
};
// 16 columns of accumulators -> this lane's row
auto accumulators_to_row = [&](const float* c, float* row) {
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float* d = c + 8 * (i >> 1) + 2 * (i & 1);
        const int r = 8 * i + g;
        ((FloatQuad*)stage)[4 * r + (t ^ (r >> 1 & 3))] = FloatQuad{{d[0], d[1], d[4], d[5]}};
    }
    sync_warp();
    #pragma unroll
    for (int q = 0; q < 4; ++q) {
        const FloatQuad f = ((const FloatQuad*)stage)[4 * lane + (q ^ (lane >> 1 & 3))];
        #pragma unroll
        for (int e = 0; e < 4; ++e) row[4 * q + e] = f.v[e];
    }
    sync_warp();
};
"""

# Writing a block of fragments and reading it back. `mark` remembers rows that are not finite. Needs this lane's row
# `i`, the number of rows `n`, and `unsigned mark[4]`.
STORE_SOURCE = """
const int first_row = i - lane;
auto mark_block = [&](const unsigned* block) {
    #pragma unroll
    for (int k = 0; k < 8; ++k) mark_non_finite(mark[2 * (k >> 2) + (k & 1)], block[k]);
};
// As it is: 32 rows after the other, 16 columns after the other, 1 KB for the registers of all lanes
auto place_of = [&](const wp::array_t<wp::float16>& matrix, int n_columns, int column) {
    return (Quad*)matrix.data + (size_t)(first_row >> 5) * (4 * n_columns) + 4 * column + lane;
};
auto store_block = [&](const wp::array_t<wp::float16>& matrix, int n_columns, int column, const unsigned* block) {
    mark_block(block);
    Quad* to = place_of(matrix, n_columns, column);
    #pragma unroll
    for (int m = 0; m < 2; ++m)
        to[32 * m] = Quad{{block[4 * m], block[4 * m + 1], block[4 * m + 2], block[4 * m + 3]}};
};
// What this lane has stored
auto load_block = [&](const wp::array_t<wp::float16>& matrix, int n_columns, int column, unsigned* block) {
    const Quad* from = place_of(matrix, n_columns, column);
    #pragma unroll
    for (int m = 0; m < 2; ++m) {
        const Quad q = from[32 * m];
        #pragma unroll
        for (int e = 0; e < 4; ++e) block[4 * m + e] = q.v[e];
    }
};
// To a row-major matrix, rows below n alone
auto store_rows = [&](const wp::array_t<wp::float16>& matrix, int column, const unsigned* block) {
    mark_block(block);
    #pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int row = first_row + 8 * k + g, at = 4 * (k >> 1) + (k & 1);
        if (row < n)
            *(Pair*)((char*)matrix.data + (size_t)row * matrix.strides[0] + 2 * (column + 4 * t)) =
                Pair{{block[at], block[at + 2]}};
    }
};
"""
# Whether everything was finite that the lanes wrote of this lane's row
FINITE_SOURCE = """
unsigned lanes = 0;
#pragma unroll
for (int k = 0; k < 4; ++k) {
    const unsigned marked = ballot((mark[k] & 0x7fff7fffu) != 0);
    if (k == lane >> 3) lanes = marked >> 4 * (lane & 7) & 15u;
}
return lanes == 0;
"""


@wp.func
def weight_place(i: int, n_inner: int):
    """Row and column of half i of a packed matrix with `n_inner` rows.

    A 16 x 16 block is 256 contiguous halves, 8 for each lane: 4 (n8 tile) + 2 (register) + (half of it). The blocks
    below each other follow each other.
    """
    block = i // 256
    lane = i % 256 // 8
    e = i % 8
    row = block % (n_inner // 16) * 16 + 4 * (lane % 4) + e % 4
    column = block // (n_inner // 16) * 16 + 4 * (lane // 8) + lane // 4 % 2 + 2 * (e // 4)
    return row, column


def product_source(n_inner: int, n_columns: int, weights: str, a: str, finish: str) -> str:
    """`a` times the packed matrix at `weights`, one block of columns j after the other.

    `finish` finds block j as accumulators c[8 m + 4 (n8 tile) + r].
    """
    return f"""
    #pragma unroll
    for (int j = 0; j < {n_columns // 16}; ++j) {{
        float c[16] = {{}};
        #pragma unroll
        for (int k = 0; k < {n_inner // 16}; ++k) {{
            const Quad b = load_quad(
                (const Quad*)weights.data + ({weights}) / 8 + (j * {n_inner // 16} + k) * {WARP} + lane);
            #pragma unroll
            for (int m = 0; m < 2; ++m) {{
                mma_16816(c + 8 * m, {a} + 8 * k + 4 * m, b.v[0], b.v[1]);
                mma_16816(c + 8 * m + 4, {a} + 8 * k + 4 * m, b.v[2], b.v[3]);
            }}
        }}
        {finish}
    }}
    """


def for_registers(body: str) -> str:
    """Loop over the registers `at` of a block; `from` points to the two accumulators that belong to one."""
    return f"""
    #pragma unroll
    for (int at = 0; at < 8; ++at) {{
        const float* from = c + 8 * (at >> 2) + 4 * (at >> 1 & 1) + 2 * (at & 1);
        {body}
    }}
    """


# Activations: value at v; derivative from the value y, or from v where that does not do (`activation.needs_sum`)
ACTIVATION_SOURCE = {
    "None": ("v", "1.0f"),
    "ReLU": ("(v > 0.0f ? v : 0.0f * v)", "(y > 0.0f ? 1.0f : 0.0f)"),  # 0 * v: a NaN stays one
    "LeakyReLU": (f"(v > 0.0f ? v : {LEAKY_SLOPE!r}f * v)", f"(y > 0.0f ? 1.0f : {LEAKY_SLOPE!r}f)"),
    "SiLU": ("v * sigmoid(v)", "sigmoid(v) * (1.0f + v * (1.0f - sigmoid(v)))"),
    "Exponential": ("fast_exp(v)", "y"),
    "Sine": ("fast_sin(reduce_angle(v))", "fast_cos(reduce_angle(v))"),
    "Sigmoid": ("sigmoid(v)", "y * (1.0f - y)"),
    "Squareplus": ("squareplus(v)", "squareplus_derivative(y)"),
    "Softplus": ("softplus(v)", f"1.0f - fast_exp({-SHARPNESS!r}f * y)"),
    "Tanh": ("2.0f * sigmoid(2.0f * v) - 1.0f", "1.0f - y * y"),
}
_FUNCTIONS_SOURCE = f"""
auto sigmoid = [&](float v) {{ return fast_reciprocal(1.0f + fast_exp(-v)); }};
auto reduce_angle = [](float v) {{  // modulo 2 pi, which is the sum of two floats
    const float turns = rintf(v * 0.15915494f);
    return (v - turns * 6.28318548f) + turns * 1.74845553e-7f;
}};
auto squareplus = [&](float v) {{
    const float u = {SHARPNESS!r}f * (v > 0.0f ? v : -v), sum = u + sqrtf(u * u + 4.0f);
    return v > 0.0f ? {0.5 / SHARPNESS!r}f * sum : {2.0 / SHARPNESS!r}f * fast_reciprocal(sum);  // without cancellation
}};
auto squareplus_derivative = [&](float y) {{
    const float u = {SHARPNESS!r}f * y;
    return u * u * fast_reciprocal(u * u + 1.0f);
}};
auto softplus = [&](float v) {{
    const float u = {SHARPNESS!r}f * v;
    return {1.0 / SHARPNESS!r}f * ((u > 0.0f ? u : 0.0f) + fast_log(1.0f + fast_exp(u > 0.0f ? -u : u)));
}};
"""


def activation_source(name: str, activate: str, derivative: str) -> str:
    """Functions `activate`(v) and `derivative`(v, y) under these names."""
    value, slope = ACTIVATION_SOURCE[name]
    return f"""
    auto {activate} = [&](float v) {{ return {value}; }};
    auto {derivative} = [&](float v, float y) {{ return {slope}; }};
    """


def setup_source(activation: str, output_activation: str) -> str:
    """Everything that the C++ of a network's pass needs to begin."""
    return (
        primitives_source()
        + BLOCKS_SOURCE
        + _FUNCTIONS_SOURCE
        + activation_source(activation, "activate", "derivative")
        + activation_source(output_activation, "activate_output", "output_derivative")
    )
