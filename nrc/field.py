"""`Field`: encoding and network behind one flat parameter buffer, made from tiny-cuda-nn style dictionaries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import warp as wp

from .config import parse_encoding, parse_network
from .kernels import encoding as enc
from .kernels import encoding_wide, grid_wide, network_wide
from .kernels import network as net
from .kernels import optimizer as opt
from .launch import heavy_range, launch, resolve_device

SLICE_ROWS = 65536  # rows the CPU evaluates at once; their grid features are kept between two launches
BACKWARD_CHUNK = 256  # rows whose weight gradients `backward` sums in one go; fixed, so that results are too
GRID_INIT = 1e-4  # table entries start uniform in +-GRID_INIT


class Field:
    """A learned function R^n_input_dims -> R^n_output_dims.

    `params` holds the network's weights first (each layer a row-major inputs x outputs matrix, in order), then the
    encodings' parameters from `encoding_offset` on (grid tables in the order of the composite, level by level).

    Args:
        n_input_dims, n_output_dims: Columns of the inputs, which live in [0, 1], and of the outputs.
        encoding: Dictionary with `otype` HashGrid, TriangleWave, OneBlob, Identity or Composite and its options.
        network: Dictionary with `otype` FullyFusedMLP and its options.
        seed: Seed of the initial parameters.
        device: Warp device; the first GPU, else the CPU.

    Raises:
        ValueError: Unknown otype, key or value; the message lists what is allowed.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding: Mapping[str, Any],
        network: Mapping[str, Any],
        *,
        seed: int = 1337,
        device: Any = None,
    ) -> None:
        self.device = resolve_device(device)
        self.encoding_config = dict(encoding)
        self.network_config = dict(network)
        self.seed = seed
        n_padded = parse_encoding(encoding, n_input_dims, 0).n_padded
        self.network = parse_network(network, n_padded, n_output_dims)
        self.encoding_offset = self.network.n_params
        self.encoding = parse_encoding(encoding, n_input_dims, self.encoding_offset)
        self.n_input_dims = n_input_dims
        self.n_output_dims = n_output_dims
        self.n_params = self.encoding_offset + self.encoding.n_params
        self.wide = wide(self.device)
        make_infer = network_wide.make_infer_wide if self.wide else net.make_infer
        self._infer = make_infer(self.encoding, self.network)
        self._encode_grids = [
            grid_wide.make_encode_grid_wide(self.encoding, part) for part in self.encoding.grids if self.wide
        ]
        self._features = self.allocate_features(SLICE_ROWS if self.wide else 1)
        self._allocate_backward(0)
        self.params = wp.empty(self.n_params, dtype=float, device=self.device)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Draw the parameters anew: Glorot uniform weights, table entries uniform in +-1e-4."""
        if seed is not None:
            self.seed = seed
        rng = np.random.default_rng(self.seed)
        params = np.empty(self.n_params, np.float32)
        for first, n_in, n_out in self.network.layers:
            bound = math.sqrt(6.0 / (n_in + -(-n_out // 16) * 16))  # tiny-cuda-nn pads the outputs to 16
            params[first : first + n_in * n_out] = rng.uniform(-bound, bound, n_in * n_out)
        params[self.encoding_offset :] = rng.uniform(-GRID_INIT, GRID_INIT, self.encoding.n_params)
        self.params.assign(params)

    def set_params(self, params: Any) -> None:
        """Overwrite the parameters with `n_params` finite floats (NumPy or Warp array)."""
        values = np.asarray(params.numpy() if isinstance(params, wp.array) else params, np.float32)
        if values.shape != (self.n_params,):
            raise ValueError(f"expected {self.n_params} parameters, got an array of shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("parameters must be finite")
        self.params.assign(values)

    def inference(
        self, x: wp.array, out: wp.array, *, params: wp.array | None = None, count: wp.array | None = None
    ) -> None:
        """Evaluate rows of `x` into `out`.

        Args:
            x: (capacity, n_input_dims) float32 inputs.
            out: (capacity, n_output_dims) float32; rows that are not evaluated keep their content.
            params: Parameters to use instead of `self.params`, for instance their moving average.
            count: Number of rows to evaluate, an int32 array of length 1 on the device; all rows by default.

        Raises:
            ValueError: Wrong shape, type or device.
        """
        check_rows("x", x, self.n_input_dims, self.device)
        check_rows("out", out, self.n_output_dims, self.device)
        check_count(count, self.device)
        if out.shape[0] < x.shape[0]:
            raise ValueError(f"out has {out.shape[0]} rows, x has {x.shape[0]}")
        if params is None:
            params = self.params
        else:
            check_params("params", params, self.n_params, self.device)
        if not self.wide:
            launch(self._infer, x.shape[0], inputs=[params, x.shape[0], count, x], outputs=[out], device=self.device)
            return
        for row in range(0, x.shape[0], SLICE_ROWS):
            n_rows = min(SLICE_ROWS, x.shape[0] - row)
            self.encode_grids(params, row, n_rows, count, x, self._features)
            n_blocks = -(-n_rows // encoding_wide.BLOCK)
            launch(
                self._infer,
                n_blocks,
                inputs=[params, row, n_rows, count, x, self._features],
                outputs=[out],
                device=self.device,
                range_size=heavy_range(n_blocks),
            )

    def backward(
        self,
        x: wp.array,
        dL_dy: wp.array,
        *,
        dL_dx: wp.array | None = None,
        dL_dparams: wp.array | None = None,
        count: wp.array | None = None,
    ) -> None:
        """Add the gradients of a scalar L by inputs and parameters, given its gradient by the outputs at `x`.

        Both are added to what the arrays hold, so that the terms of a loss can share them: clear them first. The values
        are those of `self.params`. At a kink (a ReLU at 0, the face of a grid's cell) the derivative is one side's; an
        input that a grid clamps to [0, 1] has none there. Non-finite values pass through.

        Working memory for the largest number of rows so far is kept, 4 bytes per row for each input of the network and
        8 for each neuron. The same one-thread-per-row kernels run on the CPU and on CUDA, where the order of the sums
        of table gradients varies.

        Args:
            x: (capacity, n_input_dims) float32 inputs.
            dL_dy: (capacity, n_output_dims) float32.
            dL_dx: (capacity, n_input_dims) float32 to add to; rows that are not evaluated keep their content.
            dL_dparams: (n_params,) float32 to add to.
            count: Number of rows to use, an int32 array of length 1 on the device; all rows by default.

        Raises:
            ValueError: Wrong shape, type or device, or nothing to compute.
        """
        check_rows("x", x, self.n_input_dims, self.device)
        check_rows("dL_dy", dL_dy, self.n_output_dims, self.device)
        check_count(count, self.device)
        n_rows, device = x.shape[0], self.device
        if dL_dx is None and dL_dparams is None:
            raise ValueError("backward needs dL_dx or dL_dparams to add to")
        if dL_dx is not None:
            check_rows("dL_dx", dL_dx, self.n_input_dims, device)
        if dL_dparams is not None:
            check_params("dL_dparams", dL_dparams, self.n_params, device)
        for name, array in (("dL_dy", dL_dy), ("dL_dx", dL_dx)):
            if array is not None and array.shape[0] < n_rows:
                raise ValueError(f"{name} has {array.shape[0]} rows, x has {n_rows}")
        if n_rows > self._backward_rows:
            self._allocate_backward(n_rows)
        kernels = self.backward_kernels()
        launch(
            kernels["backpropagation"],
            n_rows,
            inputs=[self.params, n_rows, count, x, dL_dy],
            outputs=self._stored,
            device=device,
        )
        _, dL_dsums, dL_dgrid, _ = self._stored
        if dL_dx is not None:
            launch(
                kernels["input gradient"],
                n_rows,
                inputs=[self.params, n_rows, count, x, dL_dsums],
                outputs=[dL_dx],
                device=device,
            )
        if dL_dparams is None:
            return
        launch(opt.take_rows, 1, inputs=[n_rows, count], outputs=[self._state], device=device)
        launch(
            kernels["weight gradient"],
            -(-n_rows // BACKWARD_CHUNK) * (self.network.n_params + 1),
            inputs=[BACKWARD_CHUNK, n_rows, count, *self._stored],
            outputs=self._chunks,
            device=device,
        )
        launch(
            opt.reduce_weight_gradient,
            self.network.n_params // opt.UPDATE_BLOCK,
            inputs=[BACKWARD_CHUNK, self._state, self._chunks[0]],
            outputs=[dL_dparams],
            device=device,
        )
        for i, part in enumerate(self.encoding.grids):
            n_lanes = 1 if device.is_cpu else n_rows
            launch(
                kernels[f"grid gradient {i}"],
                part.config.n_levels * n_lanes,
                inputs=[n_lanes, self._state, x, dL_dgrid, dL_dparams],
                device=device,
                range_size=1,
            )

    def backward_kernels(self) -> dict[str, wp.Kernel]:
        """Kernels that the first call of `backward` compiles, by name, for `nrc.launch.prepare`."""
        encoding, network = self.encoding, self.network
        kernels = {
            "backpropagation": net.make_backpropagate(encoding, network, None),
            "input gradient": net.make_backpropagate_input(encoding, network),
            "weight gradient": net.make_accumulate_weight_gradient(encoding, network),
        }
        for i, part in enumerate(encoding.grids):
            kernels[f"grid gradient {i}"] = enc.make_accumulate_grid(encoding, part)
        return kernels

    def _allocate_backward(self, n_rows: int) -> None:
        n_hidden = self.network.n_hidden_layers * self.network.n_neurons
        n_chunks = -(-n_rows // BACKWARD_CHUNK)

        def zeros(*shape: int, dtype: Any = float) -> wp.array:
            return wp.zeros(shape, dtype=dtype, device=self.device)

        self._backward_rows = n_rows
        self._state = zeros(4, dtype=int)  # as in optimizer.py
        # Activations, dL_dsums, dL_dgrid and loss of each row
        self._stored = [
            zeros(n_rows, self.network.n_inputs + n_hidden),
            zeros(n_rows, n_hidden + self.n_output_dims),
            self.allocate_features(n_rows),
            zeros(n_rows),
        ]
        # Weight gradient, loss and finiteness of each chunk
        self._chunks = [zeros(n_chunks, self.network.n_params), zeros(n_chunks), zeros(n_chunks, dtype=int)]

    def allocate_features(self, n_rows: int) -> wp.array:
        """Room for the grid features of `n_rows` rows: (grid levels, n_rows, n_features_per_level)."""
        grids = [part.config for part in self.encoding.grids]
        n_levels = max(1, sum(grid.n_levels for grid in grids))
        n_features = max([grid.n_features_per_level for grid in grids], default=1)
        return wp.zeros((n_levels, n_rows, n_features), dtype=float, device=self.device)

    def encode_grids(
        self, params: wp.array, row: int, n_rows: int, count: wp.array | None, x: wp.array, out: wp.array
    ) -> None:
        """CPU only: write the grid features of rows [row, row + n_rows) of `x`, level by level, into `out`."""
        n_parts = -(-n_rows // grid_wide.GRID_ROWS)
        for part, encode in zip(self.encoding.grids, self._encode_grids, strict=True):
            launch(
                encode,
                part.config.n_levels * n_parts,
                inputs=[params, row, n_rows, count, x],
                outputs=[out],
                device=self.device,
                range_size=heavy_range(part.config.n_levels * n_parts),
            )

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        kernels = {"field inference": self._infer}
        return kernels | {f"grid encoding {i}": kernel for i, kernel in enumerate(self._encode_grids)}


def wide(device: wp.Device) -> bool:
    """Whether `device` runs the kernels written for a CPU's vector registers, else one thread per sample."""
    return device.is_cpu


def describe(array: Any) -> str:
    """Shape, type and device of `array` for an error message."""
    if isinstance(array, wp.array):
        return f"{wp.types.type_repr(array.dtype)}{list(array.shape)} on {array.device}"
    return repr(type(array))


def check_rows(name: str, array: Any, n_columns: int, device: wp.Device) -> None:
    """Raise ValueError unless `array` is (rows, n_columns) float32 on `device` with contiguous rows."""
    ok = isinstance(array, wp.array) and array.ndim == 2 and array.dtype == wp.float32 and array.device == device
    if not ok or array.shape[1] != n_columns or (array.shape[0] > 0 and array.strides[1] != 4):
        raise ValueError(
            f"{name} must be float32 (rows, {n_columns}) with contiguous rows on {device}, got {describe(array)}"
        )


def check_params(name: str, array: Any, n_params: int, device: wp.Device) -> None:
    """Raise ValueError unless `array` is (n_params,) contiguous float32 on `device`."""
    ok = isinstance(array, wp.array) and array.dtype == wp.float32 and array.device == device and array.is_contiguous
    if not ok or array.shape != (n_params,):
        raise ValueError(f"{name} must be {n_params} contiguous float32 on {device}, got {describe(array)}")


def check_count(count: Any, device: wp.Device) -> None:
    """Raise ValueError unless `count` is None or one int32 on `device`."""
    if count is None:
        return
    if not isinstance(count, wp.array) or count.shape != (1,) or count.dtype != wp.int32 or count.device != device:
        raise ValueError(f"count must be one int32 on {device}, got {describe(count)}")
