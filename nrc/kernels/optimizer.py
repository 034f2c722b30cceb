"""Adam with one step counter per parameter, a debiased moving average of the weights, and a decaying learning rate.

A hash table is large and most of its entries see no gradient in a step, so a step costs what it touches. Parameters are
updated in blocks of 8. A block without gradient is passed over; its moving average, which would have moved towards
weights that stand still, is caught up in closed form when the block is next touched or the average is read:
after n steps at constant weights W, E becomes E + (1 - decay^n) (W - E).

Step state on the device, `state`: [go, n_rows, n_steps, n_skipped]. `go` is 1 when the current step is to be taken.
"""

from dataclasses import dataclass
from functools import cache

import warp as wp

from .encoding import UNIQUE, Encoding, Part, n_valid_rows
from .grid_wide import gather_points_source, grid_corners_source
from .vectors import VECTOR_SOURCE

wp.set_module_options({"enable_backward": False, "max_unroll": 4})

GO, N_ROWS, N_STEPS, N_SKIPPED = 0, 1, 2, 3  # places in `state`
UPDATE_BLOCK = 8  # parameters that share a stamp; divides the size of every layer and grid level
Block = wp.types.vector(length=UPDATE_BLOCK, dtype=float)
Counts = wp.types.vector(length=UPDATE_BLOCK, dtype=wp.uint16)
DEBIAS_CHUNK = 8192  # parameters per index of the CPU's EMA kernel


@dataclass(frozen=True)
class Optimizer:
    """Adam (Kingma and Ba 2015), the learning rate's schedule, the weights' average; tiny-cuda-nn's defaults."""

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

    def __post_init__(self) -> None:
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("beta1", "beta2"):
            # The 16-bit step counters must outlast the bias correction
            if not 0.0 <= getattr(self, name) <= 0.9997:
                raise ValueError(f"{name} must be in [0, 0.9997], got {getattr(self, name)}")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay <= 0.9999:
            raise ValueError(f"EMA decay must be in [0, 0.9999], got {self.ema_decay}")
        if self.epsilon < 0.0 or self.l2_reg < 0.0:
            raise ValueError("epsilon and l2_reg must not be negative")
        if self.decay_interval < 1 or self.decay_start < 0 or self.decay_base < 0.0:
            raise ValueError("decay_interval must be positive, decay_start and decay_base not negative")


@wp.struct
class AdamBlock:
    """State of 8 consecutive parameters: two cache lines, so that a touched entry costs two misses and not five."""

    m: Block  # first moments
    v: Block  # second moments
    ema: Block  # moving average of the weights before debiasing
    steps: Counts  # updates of each parameter, saturating where the bias correction is 1
    stamp: int  # step at which the average is up to date
    padding: wp.vec3i


@wp.struct
class AdamView:
    """Parameters with their state, and the constants of the update."""

    params: wp.array[float]  # (n_params)
    blocks: wp.array[AdamBlock]  # (n_params / 8)
    bias_correction: wp.array[float]  # sqrt(1 - beta2^n) / (1 - beta1^n)
    ema_weight: wp.array[float]  # 1 - decay^n, empty without a moving average
    learning_rate: wp.array[float]  # (1)
    beta1: float
    beta2: float
    epsilon: float
    l2_reg: float
    n_matrix_params: int  # the network's weights come first; only they have L2 regularisation


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
    for chunk in range((n + chunk_size - 1) // chunk_size):
        loss += chunk_loss[chunk]
        finite = wp.min(finite, chunk_finite[chunk])
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
    chunk_gradient: wp.array2d[float],  # (chunks, n_matrix_params)
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


@wp.kernel
def update_params(
    first: int,
    # In
    state: wp.array[int],
    # In/out
    adam: AdamView,
    dL_dparams: wp.array[float],
):
    """Adam and moving average, and clear the gradient. One thread per block of 8 parameters.

    A table entry whose gradient is exactly zero is left alone, a weight never.
    """
    block = first + wp.tid()
    begin = block * UPDATE_BLOCK
    if state[GO] == 0:
        return
    touched = begin < adam.n_matrix_params
    for i in range(begin, begin + UPDATE_BLOCK):
        if dL_dparams[i] != 0.0:
            touched = True
    if not touched:
        return
    state_of = adam.blocks[block]
    last_gap = adam.ema_weight.shape[0] - 1
    for j in range(UPDATE_BLOCK):
        i = begin + j
        before = adam.params[i]
        after = before
        gradient = dL_dparams[i]
        dL_dparams[i] = 0.0
        if i < adam.n_matrix_params or gradient != 0.0:
            if i < adam.n_matrix_params:
                gradient += adam.l2_reg * before
            n = wp.min(int(state_of.steps[j]) + 1, adam.bias_correction.shape[0] - 1)
            m = adam.beta1 * state_of.m[j] + (1.0 - adam.beta1) * gradient
            v = adam.beta2 * state_of.v[j] + (1.0 - adam.beta2) * gradient * gradient
            rate = adam.learning_rate[0] * adam.bias_correction[n] / (wp.sqrt(v) + adam.epsilon)
            after = before - rate * m
            state_of.steps[j] = wp.uint16(n)
            state_of.m[j] = m
            state_of.v[j] = v
            adam.params[i] = after
        if last_gap >= 0:
            gap = wp.min(state[N_STEPS] - 1 - state_of.stamp, last_gap)
            average = state_of.ema[j] + adam.ema_weight[gap] * (before - state_of.ema[j])
            state_of.ema[j] = average + adam.ema_weight[1] * (after - average)
    state_of.stamp = state[N_STEPS]
    adam.blocks[block] = state_of


@wp.kernel
def debias_ema(
    first: int,
    # In
    state: wp.array[int],
    adam: AdamView,
    # Out
    out_params: wp.array[float],  # (n_params)
):
    """Write the debiased moving average of the weights as of the last step. One thread per parameter."""
    i = first + wp.tid()
    n_steps = state[N_STEPS]
    last = adam.ema_weight.shape[0] - 1
    average = adam.params[i]
    if n_steps > 0:
        state_of = adam.blocks[i // UPDATE_BLOCK]
        ema = state_of.ema[i % UPDATE_BLOCK]
        average = ema + adam.ema_weight[wp.min(n_steps - state_of.stamp, last)] * (average - ema)
        average = average / adam.ema_weight[wp.min(n_steps, last)]
    out_params[i] = average


# The same in C++ with vector types, for the CPU

_VECTOR8_SOURCE = """
typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int i8 __attribute__((vector_size(32), aligned(4)));
typedef unsigned short s8 __attribute__((vector_size(16), aligned(2)));
const f8 zero8 = {};
struct block8 { f8 m, v, ema; s8 steps; int stamp, padding[3]; };  // AdamBlock
static_assert(sizeof(block8) == sizeof(*adam.blocks.data), "");
"""

_UPDATE_SOURCE = (
    _VECTOR8_SOURCE
    + """
const int n_steps = state.data[2], last_step = adam.bias_correction.shape[0] - 1;
const int last_gap = adam.ema_weight.shape[0] - 1;
const bool ema = last_gap >= 0;
const float rate0 = adam.learning_rate.data[0], beta1 = adam.beta1, beta2 = adam.beta2, epsilon = adam.epsilon;
const float* bias_correction = adam.bias_correction.data;
const float new_weight = ema ? adam.ema_weight.data[1] : 0.0f;
block8* blocks = (block8*)adam.blocks.data;
// List a group's touched blocks and fetch them ahead, then update them: neither branches nor memory are predictable
for (size_t group = update_begin; group < update_end; group += 512) {
size_t touched[64];
int n_touched = 0;
for (size_t i = group; i < (group + 512 < update_end ? group + 512 : update_end); i += 8) {
    touched[n_touched] = i;
    if (__builtin_reduce_or(*(f8*)(dL_dparams.data + i) != zero8)) {
        ++n_touched;
        __builtin_prefetch(&blocks[i / 8].m, 1);
        __builtin_prefetch(&blocks[i / 8].ema, 1);
        __builtin_prefetch(adam.params.data + i, 1);
    }
}
for (int t = 0; t < n_touched; ++t) {
    const size_t i = touched[t];
    f8 g = *(f8*)(dL_dparams.data + i);
    i8 some = g != zero8;
    *(f8*)(dL_dparams.data + i) = zero8;
    block8& block = blocks[i / 8];
    i8 n_old = __builtin_convertvector(block.steps, i8), n = n_old + 1;
    n = n < last_step ? n : n - n + last_step;
    f8 rate;
    for (int j = 0; j < 8; ++j) rate[j] = bias_correction[n[j]];
    f8 before = *(f8*)(adam.params.data + i);
    f8 m = beta1 * block.m + (1.0f - beta1) * g;
    f8 v = beta2 * block.v + (1.0f - beta2) * g * g;
    f8 after = before - rate0 * rate / (__builtin_elementwise_sqrt(v) + epsilon) * m;
    after = some ? after : before;
    block.steps = __builtin_convertvector(some ? n : n_old, s8);
    block.m = some ? m : block.m;
    block.v = some ? v : block.v;
    *(f8*)(adam.params.data + i) = after;
    if (ema) {
        const int gap = n_steps - 1 - block.stamp;
        f8 e = block.ema + adam.ema_weight.data[gap < last_gap ? gap : last_gap] * (before - block.ema);
        block.ema = e + new_weight * (after - e);
        block.stamp = n_steps;
    }
}
}
"""
)


@cache
def make_update_grid_wide(encoding: Encoding, part: Part):
    """CPU kernel that accumulates one grid level's gradient and updates its entries, one level per index."""
    grid = part.config
    n_features, n_corners = grid.n_features_per_level, 1 << grid.n_dims
    source = VECTOR_SOURCE + grid_corners_source(grid)
    source += f"""
    typedef float feature __attribute__((vector_size({4 * n_features}), aligned(4)));
    const size_t update_begin = {part.first_param} + (size_t)first_entries[level] * {n_features};
    const size_t update_end = update_begin + (size_t)sizes[level] * {n_features};
    float* table = dL_dparams.data + update_begin;
    const int n_rows = state.data[1];
    const float* dL_dfeature =
        (const float*)((const char*)dL_dgrid.data
            + ({encoding.gradient_row(part)} + level) * (size_t)dL_dgrid.strides[0]);
    const size_t stride = dL_dgrid.shape[2];
    for (int s = 0; s < n_rows; s += 16) {{
        const int n = n_rows - s < 16 ? n_rows - s : 16;
        alignas(64) unsigned index[{16 * n_corners}];
        alignas(64) float weight[{16 * n_corners}];
        f16 point[{grid.n_dims}];
        {gather_points_source(part, "s")}
        corners(level, point, index, weight);
        for (int j = 0; j < n; ++j) {{
            const feature d = *(const feature*)(dL_dfeature + (s + j) * stride);
            for (int c = 0; c < {n_corners}; ++c)
                *(feature*)(table + (size_t)index[16 * c + j] * {n_features}) += weight[16 * c + j] * d;
        }}
    }}
    """

    @wp.func_native(source + _UPDATE_SOURCE)
    def update_level(
        level: int,
        state: wp.array[int],
        x: wp.array2d[float],
        dL_dgrid: wp.array3d[float],
        adam: AdamView,
        dL_dparams: wp.array[float],
    ): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def update_grid_wide(
        first: int,
        # In
        state: wp.array[int],
        x: wp.array2d[float],  # (capacity, n_input_dims)
        dL_dgrid: wp.array3d[float],  # (levels, capacity, n_features_per_level)
        # In/out
        adam: AdamView,
        dL_dparams: wp.array[float],
    ):
        """Accumulate a level's gradient, update its touched entries, clear the gradient. One thread per level."""
        level = first + wp.tid()
        if state[GO] != 0:
            update_level(level, state, x, dL_dgrid, adam, dL_dparams)

    return update_grid_wide


@cache
def make_debias_ema_wide():
    """CPU twin of `debias_ema`, one chunk of parameters per index."""
    source = (
        _VECTOR8_SOURCE
        + """
    const int n_steps = state.data[2], last = adam.ema_weight.shape[0] - 1;
    const float weight = n_steps > 0 ? adam.ema_weight.data[n_steps < last ? n_steps : last] : 1.0f;
    for (size_t i = begin; i < (size_t)end; i += 8) {
        f8 average = *(f8*)(adam.params.data + i);
        if (n_steps > 0) {
            const block8& block = ((const block8*)adam.blocks.data)[i / 8];
            const int gap = n_steps - block.stamp;
            average = (block.ema + adam.ema_weight.data[gap < last ? gap : last] * (average - block.ema)) / weight;
        }
        *(f8*)(out.data + i) = average;
    }
    """
    )

    @wp.func_native(source)
    def debias_range(begin: int, end: int, state: wp.array[int], adam: AdamView, out: wp.array[float]): ...

    @wp.kernel(module="unique", module_options=UNIQUE)
    def debias_ema_wide(
        first: int,
        # In
        state: wp.array[int],
        adam: AdamView,
        # Out
        out_params: wp.array[float],  # (n_params)
    ):
        """Write the debiased moving average of the weights. One thread per DEBIAS_CHUNK parameters."""
        begin = (first + wp.tid()) * DEBIAS_CHUNK
        debias_range(begin, wp.min(begin + DEBIAS_CHUNK, out_params.shape[0]), state, adam, out_params)

    return debias_ema_wide
