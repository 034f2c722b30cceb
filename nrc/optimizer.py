"""`Optimizer`: state and step of Adam or SGD with schedule and moving average, from the gradients of any loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import warp as wp

from .arrays import as_count, as_rows, as_written_rows
from .config import parse_optimizer
from .field import Model
from .field_cpu import CpuPasses
from .gradients import Gradients
from .kernels import optimizer as opt
from .kernels import optimizer_wide
from .launch import heavy_range, launch, threads
from .snapshot import SnapshotError, check_finite, take_tensor


class Optimizer:
    """Steps `field.params` along gradients: those of a `Trainer`'s loss, or of a loss of the caller's own::

        y = field.forward(x)
        optimizer.step(x, dL_dy)  # dL_dy computed from y

    Tables are updated where their gradient is not zero, each parameter with its own step count; what a step costs grows
    with the rows, not with the tables. L2 regularisation acts on the network's weights, as part of the gradient. A sum
    of table gradients that overflows leaves its entry alone.

    Args:
        field: The field, network or encoding whose parameters to train.
        config: Dictionary with `otype` Adam or SGD, possibly nested in Ema and ExponentialDecay, in any order.
        batch_size: Rows to reserve working memory for. By default it grows with the largest batch so far.

    Attributes:
        config: The parsed dictionary.

    Raises:
        ValueError: Unknown otype, key or value; the message lists what is allowed.
    """

    def __init__(self, field: Model, config: Mapping[str, Any], *, batch_size: int | None = None) -> None:
        self.field = field
        self.config = parse_optimizer(config)
        self.device = field.device
        encoding = field.encoding
        otype, average = self.config.otype, self.config.ema_decay is not None
        self._n_matrix = field.n_params - encoding.n_params
        self._n_blocks = encoding.n_params // opt.UPDATE_BLOCK
        make_update_weights = optimizer_wide.make_update_weights_wide if self.device.is_cpu else opt.make_update_weights
        self._update_weights = make_update_weights(otype, average)
        self._weights_per_thread = optimizer_wide.WIDTH if self.device.is_cpu else 1
        self._debias_tables = optimizer_wide.make_debias_tables_wide() if self.device.is_cpu else opt.debias_tables
        self._update_grids: list[wp.Kernel] = []
        self._update_tables: wp.Kernel | None = None  # where the tables' gradients are not summed level by level
        if isinstance(field.passes, CpuPasses):
            self._update_grids = [
                optimizer_wide.make_update_grid_wide(encoding, part, otype, average) for part in encoding.grids
            ]
            self._next_level = self._zeros(1, dtype=int)
            self._lane_gradient: Any = self._zeros(0, 0)
            self._reserve_lanes()
        elif encoding.n_params:
            dtype = field.passes.table_dtype
            self._update_tables = opt.make_update_tables(otype, average, dtype)
            self._dL_dtable: Any = self._zeros(encoding.n_params, dtype=dtype)
            n_words = encoding.n_params * wp.types.type_size_in_bytes(dtype) // 8
            self._words = self._plain(self._dL_dtable, wp.uint64, n_words)
        self._state = self._zeros(4, dtype=int)
        self._loss = self._zeros(1)
        self._view = self._make_view()
        self._ema_params = wp.empty(field.n_params, dtype=float, device=self.device) if average else field.params
        self.reset()
        if batch_size is not None:
            field.passes.reserve(batch_size)

    def _make_view(self) -> Any:
        config, n_blocks = self.config, self._n_blocks
        n_moments = n_blocks if config.otype == "Adam" else 0
        n_averages = n_blocks if config.ema_decay is not None else 0
        view = opt.OptimizerView()
        view.params = self.field.params
        view.weights = self._zeros(3, self._n_matrix)
        view.moments = self._zeros(n_moments, dtype=opt.Moments)
        view.steps = self._zeros(n_moments, dtype=opt.Counts)
        view.average = self._zeros(n_averages, dtype=opt.Block)
        view.stamps = self._zeros(n_averages, dtype=int)
        view.average_start = self._zeros(1, dtype=int)
        view.bias_correction = wp.array(_bias_correction(config), dtype=float, device=self.device)
        view.ema_weight = wp.array(_ema_weight(config.ema_decay), dtype=float, device=self.device)
        view.learning_rate = self._zeros(1)
        view.beta1, view.beta2, view.epsilon, view.l2_reg = config.beta1, config.beta2, config.epsilon, config.l2_reg
        view.n_matrix = self._n_matrix
        # Warp's vectors and structs as plain numbers, for `state_arrays`
        self._state_arrays: dict[str, Any] = {"params": view.params, "weights": view.weights}
        if n_moments:
            self._state_arrays["moments"] = self._plain(view.moments, float, n_blocks, 2 * opt.UPDATE_BLOCK)
            self._state_arrays["steps"] = self._plain(view.steps, wp.uint16, n_blocks, opt.UPDATE_BLOCK)
        if n_averages:
            self._state_arrays["average"] = self._plain(view.average, float, n_blocks, opt.UPDATE_BLOCK)
            self._state_arrays |= {"stamps": view.stamps, "average_start": view.average_start}
        self._state_arrays |= {"counters": self._state, "learning_rate": view.learning_rate}
        return view

    def _plain(self, array: wp.array, dtype: Any, *shape: int) -> wp.array:
        view: Any = wp.array(ptr=array.ptr, dtype=dtype, shape=shape, device=self.device)
        view._ref = array  # whose memory must outlive the view
        return view

    def _zeros(self, *shape: int, dtype: Any = float) -> Any:
        return wp.zeros(shape, dtype=dtype, device=self.device)

    def _reserve_lanes(self) -> None:
        """CPU only: room in which each thread sums the gradient of a level; `set_threads` may have asked for more."""
        grids = [part.config for part in self.field.encoding.grids]
        n_params = max((n.n_entries * grid.n_features_per_level for grid in grids for n in grid.levels), default=0)
        n_lanes = max((min(threads(), grid.n_levels) for grid in grids), default=0)
        if n_lanes <= self._lane_gradient.shape[0]:
            return
        self._lane_gradient = self._zeros(n_lanes, n_params)
        self._lane_touched = self._zeros(n_lanes, -(-n_params // optimizer_wide.WORD_PARAMS), dtype=wp.uint64)

    @property
    def ema_params(self) -> wp.array:
        """The debiased moving average of the parameters as of the last step; the parameters themselves without an EMA.

        Reading it brings the array up to date on the device (and is captured in a CUDA graph as such).
        """
        if self.config.ema_decay is not None:
            arguments: dict[str, Any] = {
                "inputs": [self._state, self._view],
                "outputs": [self._ema_params],
                "device": self.device,
            }
            launch(opt.debias_weights, self._n_matrix, **arguments)
            n, range_size = self.field.encoding.n_params, None
            if self.device.is_cpu:
                n, range_size = -(-n // optimizer_wide.DEBIAS_CHUNK), 8
            launch(self._debias_tables, n, range_size=range_size, **arguments)
        return self._ema_params

    @property
    def n_steps(self) -> wp.array:
        """Steps taken, one int32 on the device."""
        return self._state[opt.N_STEPS : opt.N_STEPS + 1]

    @property
    def skipped_steps(self) -> wp.array:
        """Steps skipped for a non-finite gradient, one int32 on the device."""
        return self._state[opt.N_SKIPPED : opt.N_SKIPPED + 1]

    @property
    def learning_rate(self) -> wp.array:
        """Learning rate of the last step, one float32 on the device."""
        return self._view.learning_rate

    def reset(self) -> None:
        """Forget moments, averages and step counts. The parameters stay: see `Field.reset`."""
        view = self._view
        for array in (view.weights, view.moments, view.steps, view.average, view.stamps, self._state, self._loss):
            array.zero_()
        view.average_start.zero_()
        view.learning_rate.fill_(self.config.learning_rate)

    def restart_average(self) -> None:
        """Forget what the moving average has seen: it counts the steps from the next one on, and is theirs at once."""
        if self.config.ema_decay is not None:
            n = self._n_matrix + self._n_blocks
            launch(opt.restart_average, n, inputs=[self._state, self._view], device=self.device)

    def state_arrays(self) -> dict[str, wp.array]:
        """The device arrays that training changes, by name: parameters, moments, averages and counters."""
        return dict(self._state_arrays)

    def continue_from(self, other: Optimizer) -> None:
        """Take over parameters and state of `other`, whose field has the same parameters.

        An average of another decay goes on from its present value: what is kept of it is scaled to the new debiasing.
        """
        arrays = other.state_arrays()
        for name, array in self._state_arrays.items():
            wp.copy(array, arrays[name])
        decay = self.config.ema_decay
        if decay is not None and decay != other.config.ema_decay:
            n_steps = int(self.n_steps.numpy()[0])
            n_averaged = n_steps - int(self._view.average_start.numpy()[0])
            average = other.ema_params.numpy() * np.float32(1.0 - decay**n_averaged)
            weights = self._state_arrays["weights"].numpy()
            weights[2] = average[: self._n_matrix]
            self._state_arrays["weights"].assign(weights)
            tables = average[self._n_matrix :].reshape(self._state_arrays["average"].shape)
            self._state_arrays["average"].assign(tables)
            self._state_arrays["stamps"].fill_(n_steps)

    def step(self, x: Any, dL_dy: Any, *, dL_dx: Any = None, count: Any = None) -> None:
        """Take one step along the gradient of a scalar L by the outputs at `x`, which `Field.forward` gives.

        Args:
            x: (rows, n_input_dims) inputs.
            dL_dy: (rows, n_output_dims).
            dL_dx: (rows, n_input_dims) float32 to add L's gradient by the inputs to, taken before the step: what the
                field in front of this one trains on. Rows that are not used keep their content.
            count: Number of rows to use, an int32 array of length 1 on the device; all rows by default.

        Raises:
            ValueError: Wrong shape, type or device.
        """
        field = self.field
        x = as_rows("x", x, field.n_input_dims, self.device)
        dL_dy = as_rows("dL_dy", dL_dy, field.n_output_dims, self.device, x.shape[0])
        count = as_count(count, self.device)
        if dL_dx is not None:
            dL_dx = as_written_rows("dL_dx", dL_dx, field.n_input_dims, self.device, x.shape[0])
        gradients = field.passes.backpropagate(
            field.params, x, dL_dy, count, loss=None, pdf=None, input_gradient=dL_dx is not None
        )
        if dL_dx is not None:
            field.add_input_gradient(gradients, x, count, dL_dx)
        self.apply(gradients, x, x.shape[0], count)

    def apply(self, gradients: Gradients, x: wp.array, n_rows: int, count: wp.array | None) -> wp.array:
        """Take one step. Without rows nothing changes; with a non-finite gradient the step is skipped and counted.

        Args:
            gradients: Of a loss by the parameters, from `field.passes.backpropagate` at `x`.
            x: (rows, n_input_dims) float32 inputs.
            n_rows: Rows of `x`.
            count: Number of rows to use, an int32 array of length 1 on the device; all rows by default.

        Returns:
            The loss before the step, a float32 array of length 1 on the device, overwritten by the next step.
        """
        config, device = self.config, self.device
        launch(
            opt.decide_step,
            1,
            inputs=[
                config.learning_rate,
                config.decay_base,
                config.decay_start,
                config.decay_interval,
                config.decay_end,
                gradients.chunk_size,
                n_rows,
                count,
                gradients.chunk_loss,
                gradients.chunk_finite,
                self._state,
            ],
            outputs=[self._view.learning_rate, self._loss],
            device=device,
        )
        n_groups = self._n_matrix // self._weights_per_thread
        launch(
            self._update_weights,
            n_groups,
            inputs=[gradients.chunk_size, self._state, gradients.chunk_gradient, self._view],
            device=device,
            range_size=heavy_range(n_groups),
        )
        if self._update_grids:
            self._update_touched(gradients, x)
        elif self._update_tables is not None:
            passes = self.field.passes
            passes.accumulate_grids(x, self._state, gradients, self._dL_dtable)
            launch(
                self._update_tables,
                self._n_blocks,
                inputs=[1.0 / gradients.loss_scale, self._state, self._words, self._dL_dtable, self._view],
                device=device,
            )
        return self._loss

    def _update_touched(self, gradients: Gradients, x: wp.array) -> None:
        self._reserve_lanes()
        for update, part in zip(self._update_grids, self.field.encoding.grids, strict=True):
            self._next_level.zero_()
            launch(
                update,
                min(threads(), part.config.n_levels),
                inputs=[
                    self._state,
                    x,
                    gradients.dL_dgrid,
                    self._view,
                    self._next_level,
                    self._lane_gradient,
                    self._lane_touched,
                ],
                device=self.device,
                range_size=1,
            )

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        kernels = {"step decision": opt.decide_step, "weight update": self._update_weights}
        if self._update_tables is not None:
            kernels["table update"] = self._update_tables
        kernels |= {f"grid update {i}": kernel for i, kernel in enumerate(self._update_grids)}
        if self.config.ema_decay is not None:
            kernels["moving average"] = self._debias_tables
        return kernels


def restore(path: str | PathLike[str], state: Mapping[str, np.ndarray], arrays: Mapping[str, wp.array]) -> None:
    """Fill arrays that training changes, `state_arrays` of optimizers among them, from the state in the file `path`.

    Raises:
        SnapshotError: A name is missing, shapes or types differ, numbers are not finite or counts impossible. Then
            nothing is changed.
    """
    taken = {}
    for name, array in arrays.items():
        like = array.numpy()  # vectors as one more dimension
        if name.endswith("average_start") and name not in state:  # a file from before averages could start over
            taken[name] = np.zeros_like(like)
            continue
        values = taken[name] = take_tensor(path, state, name, like.shape, like.dtype)
        if like.dtype.kind == "f":
            check_finite(path, name, values)
        elif (values < 0).any():
            raise SnapshotError(f"{path}: {name} has negative counts")
    for name in taken:  # the moving average of an optimizer reads what lies as many steps back
        for steps in ("stamps", "average_start"):
            counters = f"{name.removesuffix(steps)}counters"
            if name.endswith(steps) and (taken[name] > taken[counters][opt.N_STEPS]).any():
                raise SnapshotError(f"{path}: {name} has steps beyond those taken")
    for name, array in arrays.items():
        array.assign(taken[name])


def _bias_correction(config: opt.OptimizerConfig) -> np.ndarray:
    """sqrt(1 - beta2^n) / (1 - beta1^n) for n = 0, 1, ... until it is 1 in single precision (entry 0 is unused).

    Where the step counters end before that, the last entry is 1, which is off by less than a thousandth.
    """
    if config.otype == "SGD":
        return np.empty(0, np.float32)
    n_steps = 2
    for beta in (config.beta1, config.beta2):
        if beta > 0.0:
            n_steps = max(n_steps, math.ceil(math.log(2.0**-25) / math.log(beta)) + 1)
    n_steps = min(n_steps, opt.MAX_COUNT)
    n = np.arange(n_steps + 1, dtype=np.float64)
    n[0] = 1.0
    correction = np.sqrt(1.0 - config.beta2**n) / (1.0 - config.beta1**n)
    correction[-1] = 1.0
    return correction.astype(np.float32)


def _ema_weight(decay: float | None) -> np.ndarray:
    """1 - decay^n for n = 0, 1, ... until it is 1 in single precision."""
    if decay is None:
        return np.empty(0, np.float32)
    if decay == 0.0:
        return np.array([0.0, 1.0], np.float32)
    n = np.arange(math.ceil(math.log(2.0**-25) / math.log(decay)) + 2, dtype=np.float64)
    return (1.0 - decay**n).astype(np.float32)
