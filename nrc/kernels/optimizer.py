"""Adam and SGD, a debiased moving average of the weights, a decaying learning rate; a step costs what it touches.

A table is large and most of its entries see no gradient in a step. Entries whose gradient is exactly zero are left
alone: each parameter of a table has its own step counter. The moving average of entries that stand still is caught up
in closed form when they are next touched or the average is read: after n steps at constant weights W, E becomes
E + (1 - decay^n) (W - E). Parameters of tables are looked after in blocks of 8 that share the step E stands at.

The kernels here are CUDA's and the readable twin of `optimizer_wide.py`, the CPU path.

Step state on the device, `state`: [go, n_rows, n_steps, n_skipped]. `go` is 1 when the current step is to be taken.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import warp as wp

from .encoding import n_valid_rows
from .network import MAX_GRADIENT

wp.set_module_options({"enable_backward": False, "max_unroll": 8})

GO, N_ROWS, N_STEPS, N_SKIPPED = 0, 1, 2, 3  # places in `state`
UPDATE_BLOCK = 8  # parameters of a table that share a stamp; divides the size of every layer and grid level
MAX_COUNT = 65535  # of a parameter's updates
Block = wp.types.vector(length=UPDATE_BLOCK, dtype=float)
Counts = wp.types.vector(length=UPDATE_BLOCK, dtype=wp.uint16)
UNROLLED = {"enable_backward": False, "max_unroll": UPDATE_BLOCK}  # options of kernels with vectors in registers


@dataclass(frozen=True)
class OptimizerConfig:
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
        if not self.epsilon > 0.0:  # a neuron without gradient would divide 0 by 0
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")
        if self.l2_reg < 0.0:
            raise ValueError(f"l2_reg must not be negative, got {self.l2_reg}")
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
    average_start: wp.array[int]  # (1) steps before the first that the average counts
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
            if gradient != 0.0 and wp.abs(gradient) < MAX_GRADIENT:
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
def restart_average(
    first: int,
    # In
    state: wp.array[int],
    # In/out
    view: OptimizerView,
):
    """Let the moving average begin with the next step. One thread per weight and then per block of the tables."""
    i = first + wp.tid()
    if i == 0:
        view.average_start[0] = state[N_STEPS]
    if i < view.n_matrix:
        view.weights[2, i] = 0.0
    else:
        view.average[i - view.n_matrix] = Block()
        view.stamps[i - view.n_matrix] = state[N_STEPS]


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
    n_averaged = state[N_STEPS] - view.average_start[0]
    average = view.params[i]
    if n_averaged > 0:
        average = view.weights[2, i] / view.ema_weight[wp.min(n_averaged, view.ema_weight.shape[0] - 1)]
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
    n_averaged = n_steps - view.average_start[0]
    last = view.ema_weight.shape[0] - 1
    average = view.params[i]
    if n_averaged > 0:
        block = at // UPDATE_BLOCK
        old = view.average[block][at % UPDATE_BLOCK]
        average = old + view.ema_weight[wp.min(n_steps - view.stamps[block], last)] * (average - old)
        average = average / view.ema_weight[wp.min(n_averaged, last)]
    out_params[i] = average
