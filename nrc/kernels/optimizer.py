"""Adam and SGD, a debiased moving average of the weights, a decaying learning rate; a step costs what it touches.

A table is large and most of its entries see no gradient in a step. Entries whose gradient is exactly zero are left
alone: each parameter of a table has its own step counter. The moving average of entries that stand still is caught up
in closed form when they are next touched or the average is read: after n steps at constant weights W, E becomes
E + (1 - decay^n) (W - E). Parameters of tables are looked after in blocks of 8 that share the step E stands at.

On the CPU a thread takes a table's level, sums its gradient in a buffer that no other level needs at that time, marks
the blocks it touches in a bitmap, and updates those: no gradient of a whole table exists, and none is searched.

Step state on the device, `state`: [go, n_rows, n_steps, n_skipped]. `go` is 1 when the current step is to be taken.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import warp as wp

from .encoding import UNIQUE, Encoding, Part, n_valid_rows
from .grid_wide import grid_corners_source, scatter_level_source
from .vectors import VECTOR_SOURCE

wp.set_module_options({"enable_backward": False, "max_unroll": 8})

GO, N_ROWS, N_STEPS, N_SKIPPED = 0, 1, 2, 3  # places in `state`
UPDATE_BLOCK = 8  # parameters of a table that share a stamp; divides the size of every layer and grid level
WORD_PARAMS = 512  # parameters to a word of the bitmap of touched blocks
MAX_COUNT = 65535  # of a parameter's updates
WIDTH = 16  # weights of a network that the CPU updates together; divides their number
Block = wp.types.vector(length=UPDATE_BLOCK, dtype=float)
Counts = wp.types.vector(length=UPDATE_BLOCK, dtype=wp.uint16)
DEBIAS_CHUNK = 8192  # parameters per index of the CPU's EMA kernel
UNROLLED = {"enable_backward": False, "max_unroll": UPDATE_BLOCK}  # options of kernels with vectors in registers


@dataclass(frozen=True)
class Optimizer:
    """Adam (Kingma and Ba 2015) or SGD, the learning rate's schedule, the weights' average; tiny-cuda-nn's defaults."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    l2_reg: float = 1e-8
    ema_decay: float | None = None
    decay_base: float = 1.0
    decay_start: int = 10000
    decay_interval: int = 10000
    decay_end: int = 10000000
    otype: Literal["Adam", "SGD"] = "Adam"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("beta1", "beta2"):
            # Beyond, the bias correction outlasts the 16-bit step counters by more than a thousandth
            if not 0.0 <= getattr(self, name) <= 0.9999:
                raise ValueError(f"{name} must be in [0, 0.9999], got {getattr(self, name)}")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay <= 0.9999:
            raise ValueError(f"EMA decay must be in [0, 0.9999], got {self.ema_decay}")
        if self.epsilon < 0.0 or self.l2_reg < 0.0:
            raise ValueError("epsilon and l2_reg must not be negative")
        if self.decay_interval < 1 or self.decay_start < 0 or self.decay_base < 0.0:
            raise ValueError("decay_interval must be positive, decay_start and decay_base not negative")
        if self.otype not in ("Adam", "SGD"):
            raise ValueError(f"unknown optimizer {self.otype!r}; allowed: Adam, SGD")


@wp.struct
class Moments:
    """First and second moments of 8 consecutive parameters of a table: one cache line."""

    m: Block
    v: Block


@wp.struct
class OptimizerView:
    """Parameters with their state, and the constants of the update. What an optimizer does not need is empty."""

    params: wp.array[float]  # (n_params): the network's n_matrix weights, then the tables
    weights: wp.array2d[float]  # (3, n_matrix): first and second moments, average before debiasing
    moments: wp.array[Moments]  # (blocks of the tables)
    steps: wp.array[Counts]  # (blocks) updates of each parameter, saturating where the bias correction is 1
    average: wp.array[Block]  # (blocks) moving average before debiasing
    stamps: wp.array[int]  # (blocks) step at which the average is up to date
    bias_correction: wp.array[float]  # sqrt(1 - beta2^n) / (1 - beta1^n)
    ema_weight: wp.array[float]  # 1 - decay^n
    learning_rate: wp.array[float]  # (1)
    beta1: float
    beta2: float
    epsilon: float
    l2_reg: float  # of the network's weights alone
    n_matrix: int


@wp.kernel
def decide_step(
    first: int,
    # Params
    base_learning_rate: float,
    decay_base: float,
    decay_start: int,
    decay_interval: int,
    decay_end: int,
    chunk_size: int,
    # In
    n_rows: int,
    count: wp.array[int],  # (1) or empty
    chunk_loss: wp.array[float],  # (chunks)
    chunk_finite: wp.array[int],  # (chunks)
    # In/out
    state: wp.array[int],
    # Out
    out_learning_rate: wp.array[float],  # (1)
    out_loss: wp.array[float],  # (1)
):
    """Sum the loss and decide whether the step is taken: rows present, gradient finite. A single thread."""
    n = n_valid_rows(n_rows, count)
    state[GO] = 0
    state[N_ROWS] = n
    if n == 0:
        return
    loss = float(0.0)
    finite = int(1)
    n_chunks = (n + chunk_size - 1) // chunk_size
    for group in range(0, n_chunks, UPDATE_BLOCK):
        loads = Block()  # in flight together
        for k in range(UPDATE_BLOCK):
            if group + k < n_chunks:
                loads[k] = chunk_loss[group + k]
                finite = wp.min(finite, chunk_finite[group + k])
        for k in range(UPDATE_BLOCK):
            loss += loads[k]
    out_loss[0] = loss
    if finite == 0 or not wp.isfinite(loss):
        state[N_SKIPPED] = state[N_SKIPPED] + 1
        return
    step = wp.min(state[N_STEPS], decay_end)
    rate = base_learning_rate
    if step >= decay_start:
        rate = rate * wp.pow(decay_base, float((step - decay_start) // decay_interval + 1))
    out_learning_rate[0] = rate
    state[N_STEPS] = state[N_STEPS] + 1
    state[GO] = 1


@wp.kernel
def take_rows(
    first: int,
    # In
    n_rows: int,
    count: wp.array[int],  # (1) or empty
    # Out
    state: wp.array[int],
):
    """Set the rows whose gradients count, with no condition on them. A single thread."""
    state[N_ROWS] = n_valid_rows(n_rows, count)
    state[GO] = 1


@wp.kernel
def reduce_weight_gradient(
    first: int,
    # Params
    chunk_size: int,
    # In
    state: wp.array[int],
    chunk_gradient: wp.array2d[float],  # (chunks, n_matrix)
    # In/out
    dL_dparams: wp.array[float],
):
    """Add the chunks' gradients in order. One thread per block of 8 weights."""
    begin = (first + wp.tid()) * UPDATE_BLOCK
    if state[GO] == 0:
        return
    sum = Block()
    for chunk in range((state[N_ROWS] + chunk_size - 1) // chunk_size):
        for j in range(UPDATE_BLOCK):
            sum[j] += chunk_gradient[chunk, begin + j]
    for j in range(UPDATE_BLOCK):
        dL_dparams[begin + j] = dL_dparams[begin + j] + sum[j]


@cache
def _make_change(otype: str):
    """Function (gradient, moments, update's number) -> (new moments, what to subtract from the parameter)."""

    @wp.func
    def change_adam(view: OptimizerView, gradient: float, m: float, v: float, n: int):
        new_m = view.beta1 * m + (1.0 - view.beta1) * gradient
        new_v = view.beta2 * v + (1.0 - view.beta2) * gradient * gradient
        rate = view.learning_rate[0] * view.bias_correction[n]
        return new_m, new_v, rate / (wp.sqrt(new_v) + view.epsilon) * new_m

    @wp.func
    def change_sgd(view: OptimizerView, gradient: float, m: float, v: float, n: int):
        return m, v, view.learning_rate[0] * gradient

    return change_adam if otype == "Adam" else change_sgd


@cache
def make_update_weights(otype: str, average: bool):
    """Kernel that updates the network's weights."""
    change = _make_change(otype)

    @wp.kernel(module="unique", module_options=UNROLLED)
    def update_weights(
        first: int,
        # Params
        chunk_size: int,
        # In
        state: wp.array[int],
        chunk_gradient: wp.array2d[float],  # (chunks, n_matrix)
        # In/out
        view: OptimizerView,
    ):
        """Add the chunks' gradients in order, update the weights and their average. One thread per weight."""
        i = first + wp.tid()
        if state[GO] == 0:
            return
        n_chunks = (state[N_ROWS] + chunk_size - 1) // chunk_size
        before = view.params[i]
        gradient = float(0.0)
        for group in range(0, n_chunks, UPDATE_BLOCK):
            loads = Block()  # in flight together
            for k in range(UPDATE_BLOCK):
                if group + k < n_chunks:
                    loads[k] = chunk_gradient[group + k, i]
            for k in range(UPDATE_BLOCK):
                gradient += loads[k]
        gradient += view.l2_reg * before
        n = wp.min(state[N_STEPS], view.bias_correction.shape[0] - 1)
        m, v, difference = change(view, gradient, view.weights[0, i], view.weights[1, i], n)
        after = before - difference
        view.weights[0, i] = m
        view.weights[1, i] = v
        view.params[i] = after
        if wp.static(average):
            old = view.weights[2, i]
            view.weights[2, i] = old + view.ema_weight[1] * (after - old)

    return update_weights


@cache
def make_update_tables(otype: str, average: bool, dtype: Any):
    """Kernel that updates all tables from their gradient of type `dtype`."""
    change = _make_change(otype)
    n_words = UPDATE_BLOCK * wp.types.type_size_in_bytes(dtype) // 8

    @wp.kernel(module="unique", module_options=UNROLLED)
    def update_tables(
        first: int,
        # Params
        inverse_loss_scale: float,
        # In
        state: wp.array[int],
        dL_dtable_words: wp.array[wp.uint64],  # the same memory as dL_dtable
        # In/out
        dL_dtable: wp.array[dtype],  # (blocks * 8) of all tables, times the loss scale
        view: OptimizerView,
    ):
        """Update the entries whose gradient is not zero, and clear it. One thread per block of 8 parameters."""
        block = first + wp.tid()
        if state[GO] == 0:
            return
        some = wp.uint64(0)
        for k in range(n_words):
            some = some | dL_dtable_words[block * n_words + k]
        if some == wp.uint64(0):
            return
        n_last = view.bias_correction.shape[0] - 1
        moments = Moments()
        steps = Counts()
        averages = Block()
        gap = int(0)
        if wp.static(otype == "Adam"):
            moments = view.moments[block]
            steps = view.steps[block]
        if wp.static(average):
            averages = view.average[block]
            gap = wp.min(state[N_STEPS] - 1 - view.stamps[block], view.ema_weight.shape[0] - 1)
        for j in range(UPDATE_BLOCK):
            at = block * UPDATE_BLOCK + j
            gradient = float(dL_dtable[at]) * inverse_loss_scale
            dL_dtable[at] = dtype(0.0)
            before = view.params[view.n_matrix + at]
            after = before
            if gradient != 0.0 and wp.isfinite(gradient):
                n = wp.min(int(steps[j]) + 1, n_last)
                m, v, difference = change(view, gradient, moments.m[j], moments.v[j], n)
                steps[j] = wp.uint16(n)
                moments.m[j] = m
                moments.v[j] = v
                after = before - difference
                view.params[view.n_matrix + at] = after
            if wp.static(average):
                old = averages[j] + view.ema_weight[gap] * (before - averages[j])
                averages[j] = old + view.ema_weight[1] * (after - old)
        if wp.static(otype == "Adam"):
            view.moments[block] = moments
            view.steps[block] = steps
        if wp.static(average):
            view.average[block] = averages
            view.stamps[block] = state[N_STEPS]

    return update_tables


@wp.kernel
def debias_weights(
    first: int,
    # In
    state: wp.array[int],
    view: OptimizerView,
    # Out
    out_params: wp.array[float],  # (n_params)
):
    """Write the debiased moving average of the network's weights. One thread per weight."""
    i = first + wp.tid()
    n_steps = state[N_STEPS]
    average = view.params[i]
    if n_steps > 0:
        average = view.weights[2, i] / view.ema_weight[wp.min(n_steps, view.ema_weight.shape[0] - 1)]
    out_params[i] = average


@wp.kernel
def debias_tables(
    first: int,
    # In
    state: wp.array[int],
    view: OptimizerView,
    # Out
    out_params: wp.array[float],  # (n_params)
):
    """Write the debiased moving average of the tables as of the last step. One thread per parameter."""
    at = first + wp.tid()
    i = view.n_matrix + at
    n_steps = state[N_STEPS]
    last = view.ema_weight.shape[0] - 1
    average = view.params[i]
    if n_steps > 0:
        block = at // UPDATE_BLOCK
        old = view.average[block][at % UPDATE_BLOCK]
        average = old + view.ema_weight[wp.min(n_steps - view.stamps[block], last)] * (average - old)
        average = average / view.ema_weight[wp.min(n_steps, last)]
    out_params[i] = average


# The same in C++ with vector types, for the CPU

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
        const i8 some = (g != zero8) & (g - g == zero8);  // neither zero nor an overflow
        const f8 before = *(f8*)(params + 8 * block);
        {change}
        *(f8*)(params + 8 * block) = some ? after : before;
    }};
    """
    )


@cache
def make_update_weights_wide(otype: str, average: bool):
    """CPU twin of `make_update_weights`."""
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
def make_update_grid_wide(encoding: Encoding, part: Part, otype: str, average: bool):
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
    """CPU twin of `debias_tables`, one chunk of parameters per index."""
    source = (
        _VECTOR8_SOURCE
        + """
    const int n_steps = state.data[2], last = view.ema_weight.shape[0] - 1;
    const float weight = n_steps > 0 ? view.ema_weight.data[n_steps < last ? n_steps : last] : 1.0f;
    const float* params = view.params.data + view.n_matrix;
    for (size_t i = begin; i < (size_t)end; i += 8) {
        f8 average = *(f8*)(params + i);
        if (n_steps > 0) {
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
