"""Matrix products of the CPU's blocks: C++ lambdas over vectors of 16 floats. Rows of a matrix lie one after the other.

A tile of a product stays in registers over the whole of the summed dimension: 16 vectors with the 32 large registers of
AVX-512, 4 with smaller or fewer ones. All need VECTOR_SOURCE.
"""

import warp as wp

from .encoding_wide import BLOCK

wp.set_module_options({"enable_backward": False})

# c[i, j] = store(sum_k a[i, k] b[k, j], i ldc + j) for a tile that starts at c[at]; a's strides are free
_TILE_SOURCE = """
struct one { enum { value = 1 }; };
struct two { enum { value = 2 }; };
struct four { enum { value = 4 }; };
struct eight { enum { value = 8 }; };
struct sixteen { enum { value = 16 }; };
auto tile = [&](auto rows, auto vectors, float* c, int at, int ldc, const float* a, int row, int step,
                const float* b, int ldb, int n_k, auto store) __attribute__((always_inline)) {
    constexpr int r = decltype(rows)::value, w = decltype(vectors)::value;
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
        for (int j = 0; j < w; ++j)
            *(f16*)(c + at + i * ldc + 16 * j) = store(sum[i][j], at + i * ldc + 16 * j);
};
"""

# layer: c (m x BLOCK) = store(a (m x n_k, free strides) b (n_k x BLOCK)), neurons by samples
LAYER_SOURCE = f"""
{_TILE_SOURCE}
#ifdef __AVX512F__
typedef four layer_vectors;
#else
typedef one layer_vectors;
#endif
auto layer = [&](float* c, const float* a, int row, int step, const float* b, int m, int n_k, auto store)
        __attribute__((always_inline)) {{
    for (int j = 0; j < {BLOCK}; j += 16 * layer_vectors::value) {{
        auto rows = [&](auto r, int i) __attribute__((always_inline)) {{
            tile(r, layer_vectors{{}}, c, i * {BLOCK} + j, {BLOCK}, a + i * row, row, step, b + j, {BLOCK}, n_k, store);
        }};
        int i = 0;
        for (; i + 4 <= m; i += 4) rows(four{{}}, i);
        for (; i < m; ++i) rows(one{{}}, i);
    }}
}};
"""

# add_weight_gradient: c (m x n) += a (m x BLOCK) b (BLOCK x n), a sum over samples; m and n are multiples of 16
WEIGHT_GRADIENT_SOURCE = f"""
auto add_weight_gradient = [&](float* c, const float* a, const float* b, int m, int n)
        __attribute__((always_inline)) {{
    auto add = [&](f16 v, int at) {{ return v + *(const f16*)(c + at); }};
    auto columns = [&](auto rows, auto vectors, int j) __attribute__((always_inline)) {{
        for (int i = 0; i < m; i += decltype(rows)::value)
            tile(rows, vectors, c, i * n + j, n, a + i * {BLOCK}, {BLOCK}, 1, b + j, n, {BLOCK}, add);
    }};
    int j = 0;
#ifdef __AVX512F__
    for (; j + 64 <= n; j += 64) columns(four{{}}, four{{}}, j);
    for (; j + 32 <= n; j += 32) columns(eight{{}}, two{{}}, j);
    for (; j < n; j += 16) columns(sixteen{{}}, one{{}}, j);
#else
    for (; j < n; j += 16) columns(four{{}}, one{{}}, j);
#endif
}};
"""

# transpose: to (n x m) from `from` (m x n), both multiples of 16
TRANSPOSE_SOURCE = """
auto transpose = [&](float* to, const float* from, int m, int n) __attribute__((noinline)) {
    for (int i = 0; i < m; i += 16)
        for (int j = 0; j < n; j += 16) {
            f16 a[16], b[16];
            #pragma unroll
            for (int k = 0; k < 16; ++k) a[k] = *(const f16*)(from + (i + k) * n + j);
            // Interleaving row k with row k + 8, four times over, turns rows into columns
            #pragma unroll
            for (int turn = 0; turn < 4; ++turn) {
                #pragma unroll
                for (int k = 0; k < 8; ++k) {
                    b[2 * k] = __builtin_shufflevector(a[k], a[k + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                                       7, 23);
                    b[2 * k + 1] = __builtin_shufflevector(a[k], a[k + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                                           29, 14, 30, 15, 31);
                }
                #pragma unroll
                for (int k = 0; k < 16; ++k) a[k] = b[k];
            }
            #pragma unroll
            for (int k = 0; k < 16; ++k) *(f16*)(to + (j + k) * m + i) = a[k];
        }
};
"""
