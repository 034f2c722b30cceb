"""`Trainer`: loss, backpropagation, Adam, moving average and schedule for a `Field`, one optimizer step at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import warp as wp

from .config import one_of, otype_of, parse_optimizer, parse_options
from .field import Field, check_count, check_rows
from .kernels import encoding as enc
from .kernels import loss as losses
from .kernels import network as net
from .kernels import network_wide
from .kernels import optimizer as opt
from .launch import heavy_range, launch, threads

MIN_CHUNK, MAX_CHUNK = 64, 256  # rows that share a weight-gradient block; fixed by batch_size, so results are too


class Trainer:
    """Fits `field.params` by stochastic gradient descent. Allocates everything here, nothing in a step.

    Args:
        field: The field to train.
        loss: Dictionary with `otype` L2 or RelativeL2Luminance.
        optimizer: Dictionary with `otype` Adam, possibly nested in Ema and ExponentialDecay.
        batch_size: Largest number of rows of a step.

    Raises:
        ValueError: Unknown otype, key or value; the message lists what is allowed.
    """

    def __init__(self, field: Field, loss: Mapping[str, Any], optimizer: Mapping[str, Any], *, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.field = field
        self.batch_size = batch_size
        self.loss_otype = one_of(otype_of(loss, "L2"), losses.LOSSES, "loss otype")
        parse_options(loss, {}, f"{self.loss_otype} loss")
        if self.loss_otype == "RelativeL2Luminance" and field.n_output_dims != 3:
            raise ValueError(f"RelativeL2Luminance needs 3 outputs, the field has {field.n_output_dims}")
        self.optimizer = parse_optimizer(optimizer)
        self._make_kernels()
        self._allocate()
        self.reset()

    def _make_kernels(self) -> None:
        field = self.field
        encoding, network = field.encoding, field.network
        if field.wide:
            self._backpropagate = network_wide.make_backpropagate_wide(encoding, network, self.loss_otype)
            self._update_grids = [opt.make_update_grid_wide(encoding, part) for part in encoding.grids]
            self._debias = opt.make_debias_ema_wide()
        else:
            self._backpropagate = net.make_backpropagate(encoding, network, self.loss_otype)
            self._accumulate_weights = net.make_accumulate_weight_gradient(encoding, network)
            self._accumulate_grids = [enc.make_accumulate_grid(encoding, part) for part in encoding.grids]
            self._debias = opt.debias_ema

    def _allocate(self) -> None:
        field, batch = self.field, self.batch_size
        device, n_params = field.device, field.n_params
        self.chunk_size = min(MAX_CHUNK, max(MIN_CHUNK, 1 << max(0, (batch // 32).bit_length() - 1)))
        n_chunks = -(-batch // self.chunk_size)

        def zeros(*shape: int, dtype: Any = float) -> wp.array:
            return wp.zeros(shape, dtype=dtype, device=device)

        self._dL_dgrid = field.allocate_features(batch)
        self._chunk_gradient = zeros(n_chunks, field.network.n_params)
        self._chunk_loss = zeros(n_chunks)
        self._chunk_finite = zeros(n_chunks, dtype=int)
        self._dL_dparams = zeros(n_params)
        if not field.wide:
            n_hidden = field.network.n_hidden_layers * field.network.n_neurons
            self._activations = zeros(batch, field.network.n_inputs + n_hidden)
            self._dL_dsums = zeros(batch, n_hidden + field.n_output_dims)
            self._row_loss = zeros(batch)
        self._loss = zeros(1)
        self._state = zeros(4, dtype=int)
        ema = self.optimizer.ema_decay is not None
        adam = opt.AdamView()
        adam.params = field.params
        adam.blocks = zeros(n_params // opt.UPDATE_BLOCK, dtype=opt.AdamBlock)
        adam.bias_correction = wp.array(_bias_correction(self.optimizer), dtype=float, device=device)
        adam.ema_weight = wp.array(_ema_weight(self.optimizer.ema_decay), dtype=float, device=device)
        adam.learning_rate = zeros(1)
        adam.beta1, adam.beta2 = self.optimizer.beta1, self.optimizer.beta2
        adam.epsilon, adam.l2_reg = self.optimizer.epsilon, self.optimizer.l2_reg
        adam.n_matrix_params = field.network.n_params
        self._adam = adam
        # The blocks' bytes as plain integers, for `state_arrays`
        words = wp.types.type_size_in_bytes(opt.AdamBlock) // 4
        self._adam_words: wp.array = wp.array(
            ptr=adam.blocks.ptr, dtype=wp.uint32, shape=(adam.blocks.shape[0], words), device=device
        )
        self._ema_params = wp.empty(n_params, dtype=float, device=device) if ema else field.params

    @property
    def params(self) -> wp.array:
        """The primary weights, the same array as `field.params`."""
        return self.field.params

    @property
    def ema_params(self) -> wp.array:
        """The debiased moving average of the weights as of the last step; the primary weights without an EMA.

        Reading it brings the array up to date on the device (and is captured in a CUDA graph as such).
        """
        if self.optimizer.ema_decay is not None:
            n, range_size = self.field.n_params, None
            if self.field.wide:
                n, range_size = -(-n // opt.DEBIAS_CHUNK), 8
            launch(
                self._debias,
                n,
                inputs=[self._state, self._adam],
                outputs=[self._ema_params],
                device=self.field.device,
                range_size=range_size,
            )
        return self._ema_params

    @property
    def n_steps(self) -> wp.array:
        """Optimizer steps taken, one int32 on the device."""
        return self._state[opt.N_STEPS : opt.N_STEPS + 1]

    @property
    def skipped_steps(self) -> wp.array:
        """Steps skipped for a non-finite gradient, one int32 on the device."""
        return self._state[opt.N_SKIPPED : opt.N_SKIPPED + 1]

    @property
    def learning_rate(self) -> wp.array:
        """Learning rate of the last step, one float32 on the device."""
        return self._adam.learning_rate

    def reset(self) -> None:
        """Forget moments, averages and step counts. The parameters stay: see `Field.reset`."""
        adam = self._adam
        for array in (adam.blocks, self._state, self._loss, self._dL_dparams):
            array.zero_()
        adam.learning_rate.fill_(self.optimizer.learning_rate)

    def state_arrays(self) -> dict[str, wp.array]:
        """The device arrays that training changes, by name: parameters, moments, averages and counters."""
        return {
            "params": self.params,
            "adam": self._adam_words,
            "counters": self._state,
            "learning_rate": self._adam.learning_rate,
        }

    def step(self, x: wp.array, y: wp.array, *, count: wp.array | None = None) -> wp.array:
        """Take one optimizer step on the mean loss over rows x outputs.

        Without rows nothing changes; with a non-finite gradient the step is skipped and counted in `skipped_steps`.

        Args:
            x: (rows <= batch_size, n_input_dims) float32 inputs.
            y: (rows, n_output_dims) float32 targets.
            count: Number of rows to use, an int32 array of length 1 on the device; all rows by default.

        Returns:
            The loss before the step, a float32 array of length 1 on the device, overwritten by the next step.

        Raises:
            ValueError: Wrong shape, type or device.
        """
        field = self.field
        check_rows("x", x, field.n_input_dims, field.device)
        check_rows("y", y, field.n_output_dims, field.device)
        check_count(count, field.device)
        if x.shape[0] > self.batch_size or y.shape[0] < x.shape[0]:
            raise ValueError(
                f"x has {x.shape[0]} rows and y {y.shape[0]}; expected equally many, at most {self.batch_size}"
            )
        rows = (x.shape[0], count)
        if field.wide:
            self._backpropagate_wide(x, y, rows)
        else:
            self._backpropagate_rows(x, y, rows)
        self._decide(rows)
        self._update(x)
        return self._loss

    def _backpropagate_wide(self, x: wp.array, y: wp.array, rows: tuple[int, wp.array | None]) -> None:
        n_chunks = -(-x.shape[0] // self.chunk_size)
        # The features' buffer becomes their gradients'
        self.field.encode_grids(self.field.params, 0, *rows, x, self._dL_dgrid)
        launch(
            self._backpropagate,
            n_chunks,
            inputs=[self.field.params, self.chunk_size, *rows, x, y],
            outputs=[self._dL_dgrid, self._chunk_gradient, self._chunk_loss, self._chunk_finite],
            device=self.field.device,
            range_size=heavy_range(n_chunks),
        )

    def _backpropagate_rows(self, x: wp.array, y: wp.array, rows: tuple[int, wp.array | None]) -> None:
        n_rows = x.shape[0]
        stored = [self._activations, self._dL_dsums, self._dL_dgrid, self._row_loss]
        launch(
            self._backpropagate,
            n_rows,
            inputs=[self.field.params, *rows, x, y],
            outputs=stored,
            device=self.field.device,
        )
        launch(
            self._accumulate_weights,
            -(-n_rows // self.chunk_size) * (self.field.network.n_params + 1),
            inputs=[self.chunk_size, *rows, *stored],
            outputs=[self._chunk_gradient, self._chunk_loss, self._chunk_finite],
            device=self.field.device,
        )

    def _decide(self, rows: tuple[int, wp.array | None]) -> None:
        o = self.optimizer
        launch(
            opt.decide_step,
            1,
            inputs=[
                o.learning_rate,
                o.decay_base,
                o.decay_start,
                o.decay_interval,
                o.decay_end,
                self.chunk_size,
                *rows,
                self._chunk_loss,
                self._chunk_finite,
                self._state,
            ],
            outputs=[self._adam.learning_rate, self._loss],
            device=self.field.device,
        )

    def _update(self, x: wp.array) -> None:
        field, device = self.field, self.field.device
        n_blocks = field.network.n_params // opt.UPDATE_BLOCK
        range_size = -(-n_blocks // threads())
        launch(
            opt.reduce_weight_gradient,
            n_blocks,
            inputs=[self.chunk_size, self._state, self._chunk_gradient],
            outputs=[self._dL_dparams],
            device=device,
            range_size=range_size,
        )
        if field.wide:
            for part, update in zip(field.encoding.grids, self._update_grids, strict=True):
                launch(
                    update,
                    part.config.n_levels,
                    inputs=[self._state, x, self._dL_dgrid, self._adam, self._dL_dparams],
                    device=device,
                    range_size=heavy_range(part.config.n_levels),
                )
        else:
            for part, accumulate in zip(field.encoding.grids, self._accumulate_grids, strict=True):
                n_lanes = 1 if device.is_cpu else x.shape[0]
                launch(
                    accumulate,
                    part.config.n_levels * n_lanes,
                    inputs=[n_lanes, self._state, x, self._dL_dgrid, self._dL_dparams],
                    device=device,
                    range_size=1,
                )
            n_blocks = field.n_params // opt.UPDATE_BLOCK
            range_size = -(-n_blocks // threads())
        launch(
            opt.update_params,
            n_blocks,
            inputs=[self._state, self._adam, self._dL_dparams],
            device=device,
            range_size=range_size,
        )

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        kernels = {"backpropagation": self._backpropagate, "optimizer": opt.update_params}
        if self.field.wide:
            kernels |= {f"grid update {i}": kernel for i, kernel in enumerate(self._update_grids)}
        else:
            kernels["weight gradient"] = self._accumulate_weights
            kernels |= {f"grid gradient {i}": kernel for i, kernel in enumerate(self._accumulate_grids)}
        if self.optimizer.ema_decay is not None:
            kernels["moving average"] = self._debias
        return kernels


def _bias_correction(optimizer: opt.Optimizer) -> np.ndarray:
    """sqrt(1 - beta2^n) / (1 - beta1^n) for n = 0, 1, ... until it is 1 in single precision (entry 0 is unused)."""
    n_steps = 2
    for beta in (optimizer.beta1, optimizer.beta2):
        if beta > 0.0:
            n_steps = max(n_steps, math.ceil(math.log(2.0**-25) / math.log(beta)) + 1)
    n = np.arange(n_steps + 1, dtype=np.float64)
    n[0] = 1.0
    correction = np.sqrt(1.0 - optimizer.beta2**n) / (1.0 - optimizer.beta1**n)
    return correction.astype(np.float32)


def _ema_weight(decay: float | None) -> np.ndarray:
    """1 - decay^n for n = 0, 1, ... until it is 1 in single precision."""
    if decay is None:
        return np.empty(0, np.float32)
    if decay == 0.0:
        return np.array([0.0, 1.0], np.float32)
    n = np.arange(math.ceil(math.log(2.0**-25) / math.log(decay)) + 2, dtype=np.float64)
    return (1.0 - decay**n).astype(np.float32)
