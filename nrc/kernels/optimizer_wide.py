"""Optimizers on the CPU: C++ with vector types, 16 weights of the network or 8 parameters of a table at a time.

A thread takes a level of a table, sums its gradient in a buffer that no other level needs at that time, marks the
blocks it touches in a bitmap, and updates those: no gradient of a whole table exists, and none is searched. The
formulas are those of `optimizer.py`.
"""

from functools import cache

import warp as wp

from .encoding import UNIQUE, EncodingConfig, Part
from .grid_wide import grid_corners_source, scatter_level_source
from .network import MAX_GRADIENT
from .optimizer import GO, N_ROWS, UPDATE_BLOCK, OptimizerView
from .vectors import VECTOR_SOURCE

wp.set_module_options({"enable_backward": False})

WORD_PARAMS = 512  # parameters to a word of the bitmap of touched blocks
WIDTH = 16  # weights of a network that the CPU updates together; divides their number
DEBIAS_CHUNK = 8192  # parameters per index of the CPU's EMA kernel

_VECTOR8_SOURCE = """
typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int i8 __attribute__((vector_size(32), aligned(4)));
typedef unsigned short s8 __attribute__((vector_size(16), aligned(2)));
const f8 zero8 = {};
struct moments8 { f8 m, v; };
"""


def _update_block_source(otype: str, average: bool) -> str:
    """C++ lambdas `fetch(block)` and `update(block, gradient)`. Need `params`, the first parameter of block 0."""
    adam = otype == "Adam"
    source = "const float rate0 = view.learning_rate.data[0];\nconst int n_steps = state.data[2];\n"
    fetch = "__builtin_prefetch(params + 8 * block, 1);\n"
    change = "f8 after = before - rate0 * g;\n"
    if adam:
        source += """
        const float beta1 = view.beta1, beta2 = view.beta2, epsilon = view.epsilon;
        const float* bias_correction = view.bias_correction.data;
        const int n_last = view.bias_correction.shape[0] - 1;
        moments8* moments = (moments8*)view.moments.data;
        s8* steps = (s8*)view.steps.data;
        """
        fetch += "__builtin_prefetch(moments + block, 1); __builtin_prefetch(steps + block, 1);\n"
        change = """
        const i8 n_old = __builtin_convertvector(steps[block], i8);
        i8 n = n_old + 1;
        n = n < n_last ? n : n - n + n_last;
        f8 rate;
        for (int j = 0; j < 8; ++j) rate[j] = bias_correction[n[j]];
        const moments8 old = moments[block];
        const f8 m = beta1 * old.m + (1.0f - beta1) * g;
        const f8 v = beta2 * old.v + (1.0f - beta2) * g * g;
        f8 after = before - rate0 * rate / (__builtin_elementwise_sqrt(v) + epsilon) * m;
        steps[block] = __builtin_convertvector(some ? n : n_old, s8);
        moments[block].m = some ? m : old.m;
        moments[block].v = some ? v : old.v;
        """
    if average:
        source += """
        const int last_gap = view.ema_weight.shape[0] - 1;
        const float* ema_weight = view.ema_weight.data;
        f8* averages = (f8*)view.average.data;
        int* stamps = view.stamps.data;
        """
        fetch += "__builtin_prefetch(averages + block, 1); __builtin_prefetch(stamps + block, 1);\n"
        change += """
        const int gap = n_steps - 1 - stamps[block];
        f8 e = averages[block];
        e = e + ema_weight[gap < last_gap ? gap : last_gap] * (before - e);
        averages[block] = e + ema_weight[1] * ((some ? after : before) - e);
        stamps[block] = n_steps;
        """
    return (
        source
        + f"""
    auto fetch = [&](size_t block) {{
        {fetch}
    }};
    auto update = [&](size_t block, f8 g) {{
        const i8 some = (g != zero8) & (g < zero8 + {MAX_GRADIENT!r}f) & (g > zero8 - {MAX_GRADIENT!r}f);
        const f8 before = *(f8*)(params + 8 * block);
        {change}
        *(f8*)(params + 8 * block) = some ? after : before;
    }};
    """
    )


@cache
def make_update_weights_wide(otype: str, average: bool):
    """CPU kernel that updates the network's weights."""
    change = "const f16 after = before - rate0 * g;"
    if otype == "Adam":
        change = """
        const int last = view.bias_correction.shape[0] - 1;
        const float rate = rate0 * view.bias_correction.data[state.data[2] < last ? state.data[2] : last];
        f16& m = *(f16*)weights;
        f16& v = *(f16*)(weights + n_matrix);
        m = view.beta1 * m + (1.0f - view.beta1) * g;
        v = view.beta2 * v + (1.0f - view.beta2) * g * g;
        const f16 after = before - rate / (__builtin_elementwise_sqrt(v) + view.epsilon) * m;
        """
    if average:
        change += """
        f16& e = *(f16*)(weights + 2 * n_matrix);
        e += view.ema_weight.data[1] * (after - e);
        """
    source = f"""
    {VECTOR_SOURCE}
    const size_t n_matrix = view.n_matrix;
    const float rate0 = view.learning_rate.data[0];
    float *params = view.params.data + i, *weights = view.weights.data + i;
    f16 g = zero;
    for (int chunk = 0; chunk < n_chunks; ++chunk) g += *(const f16*)(chunk_gradient.data + chunk * n_matrix + i);
    const f16 before = *(f16*)params;
    g += view.l2_reg * before;
    {change}
    *(f16*)params = after;
    """

    @wp.func_native(source)
    def update_sixteen(
        i: int, n_chunks: int, state: wp.array[int], chunk_gradient: wp.array2d[float], view: OptimizerView
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def update_weights_wide(
        first: int,
        # Params
        chunk_size: int,
        # In
        state: wp.array[int],
        chunk_gradient: wp.array2d[float],  # (chunks, n_matrix)
        # In/out
        view: OptimizerView,
    ):
        """Add the chunks' gradients in order, update the weights and their average. One thread per 16 weights."""
        begin = (first + wp.tid()) * WIDTH
        if state[GO] != 0:
            update_sixteen(begin, (state[N_ROWS] + chunk_size - 1) // chunk_size, state, chunk_gradient, view)

    return update_weights_wide


@cache
def make_update_grid_wide(encoding: EncodingConfig, part: Part, otype: str, average: bool):
    """CPU kernel that sums the gradient of one grid's levels and updates the entries it touches."""
    grid = part.config
    n_features, n_levels = grid.n_features_per_level, grid.n_levels
    first_block = (part.first_param - encoding.first_param) // UPDATE_BLOCK
    source = VECTOR_SOURCE + grid_corners_source(grid) + _VECTOR8_SOURCE
    source += f"""
    const int n_rows = state.data[1];
    float* table = (float*)((char*)lane_gradient.data + lane * (size_t)lane_gradient.strides[0]);
    unsigned long long* touched =
        (unsigned long long*)((char*)lane_touched.data + lane * (size_t)lane_touched.strides[0]);
    auto touch = [&](size_t entry) {{
        touched[entry * {n_features} / 512] |= 1ull << (entry * {n_features} / 8 % 64);
    }};
    float* params = view.params.data + {encoding.first_param};
    {_update_block_source(otype, average)}
    // The finest levels cost most: they come first
    for (int taken; (taken = __atomic_fetch_add(next_level.data, 1, __ATOMIC_RELAXED)) < {n_levels};) {{
        const int level = {n_levels - 1} - taken;
        {{ {scatter_level_source(encoding, part)} }}
        // Fetch a group of touched blocks while the one before is updated
        const size_t first_block = {first_block} + (size_t)first_entries[level] * {n_features} / 8;
        const size_t n_words = ((size_t)sizes[level] * {n_features} + 511) / 512;
        size_t word = 0, groups[2][8];
        unsigned long long bits = 0;
        auto next_group = [&](size_t* group) {{
            for (int n = 0; n < 8; ++n) {{
                while (!bits) {{
                    if (word == n_words) return n;
                    bits = touched[word];
                    touched[word++] = 0;
                }}
                group[n] = 64 * (word - 1) + __builtin_ctzll(bits);
                bits &= bits - 1;
                __builtin_prefetch(table + 8 * group[n], 1);
                fetch(first_block + group[n]);
            }}
            return 8;
        }};
        int n = next_group(groups[0]);
        for (int slot = 0; n; slot ^= 1) {{
            const int n_next = next_group(groups[slot ^ 1]);
            for (int k = 0; k < n; ++k) {{
                f8& gradient = *(f8*)(table + 8 * groups[slot][k]);
                update(first_block + groups[slot][k], gradient);
                gradient = zero8;
            }}
            n = n_next;
        }}
    }}
    """

    @wp.func_native(source)
    def update_levels(
        lane: int,
        state: wp.array[int],
        x: wp.array2d[float],
        dL_dgrid: wp.array3d[float],
        view: OptimizerView,
        next_level: wp.array[int],
        lane_gradient: wp.array2d[float],
        lane_touched: wp.array2d[wp.uint64],
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def update_grid_wide(
        first: int,
        # In
        state: wp.array[int],
        x: wp.array2d[float],  # (capacity, n_input_dims)
        dL_dgrid: wp.array3d[float],  # (levels, capacity, n_features_per_level)
        # In/out
        view: OptimizerView,
        next_level: wp.array[int],  # (1) 0 at first
        lane_gradient: wp.array2d[float],  # (lanes, parameters of the largest level) 0 at first and last
        lane_touched: wp.array2d[wp.uint64],  # (lanes, a bit for each 8 parameters) 0 at first and last
    ):
        """Sum the gradient of a level, update what it touches, take the next level. One thread per lane."""
        if state[GO] != 0:
            update_levels(first + wp.tid(), state, x, dL_dgrid, view, next_level, lane_gradient, lane_touched)

    return update_grid_wide


@cache
def make_debias_tables_wide():
    """CPU kernel that writes the debiased moving average of the tables."""
    source = (
        _VECTOR8_SOURCE
        + """
    const int n_steps = state.data[2], last = view.ema_weight.shape[0] - 1;
    const int n_averaged = n_steps - view.average_start.data[0];
    const float weight = n_averaged > 0 ? view.ema_weight.data[n_averaged < last ? n_averaged : last] : 1.0f;
    const float* params = view.params.data + view.n_matrix;
    for (size_t i = begin; i < (size_t)end; i += 8) {
        f8 average = *(f8*)(params + i);
        if (n_averaged > 0) {
            const f8 old = ((const f8*)view.average.data)[i / 8];
            const int gap = n_steps - view.stamps.data[i / 8];
            average = (old + view.ema_weight.data[gap < last ? gap : last] * (average - old)) / weight;
        }
        *(f8*)(out.data + view.n_matrix + i) = average;
    }
    """
    )

    @wp.func_native(source)
    def debias_range(begin: int, end: int, state: wp.array[int], view: OptimizerView, out: wp.array[float]): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def debias_tables_wide(
        first: int,
        # In
        state: wp.array[int],
        view: OptimizerView,
        # Out
        out_params: wp.array[float],  # (n_params)
    ):
        """Write the debiased moving average of the tables. One thread per DEBIAS_CHUNK parameters."""
        begin = (first + wp.tid()) * DEBIAS_CHUNK
        end = wp.min(begin + DEBIAS_CHUNK, out_params.shape[0] - view.n_matrix)
        debias_range(begin, end, state, view, out_params)

    return debias_tables_wide
