"""`Field`, `Network` and `Encoding`: learned functions with one flat parameter buffer, from tiny-cuda-nn configs."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from copy import deepcopy
from os import PathLike
from typing import Any

import numpy as np
import warp as wp

from .arrays import as_count, as_rows, as_values, as_written_rows, as_written_values
from .config import parse_encoding, parse_network
from .field_cpu import CpuPasses
from .field_cuda import CudaPasses
from .gradients import Gradients
from .kernels import encoding as enc
from .kernels import network as net
from .kernels import optimizer as opt
from .launch import launch, resolve_device
from .snapshot import SnapshotError, check_finite, load_tensors, save_tensors, take_tensor

SNAPSHOT_KIND = "nrc.field"
GRID_INIT = 1e-4  # table entries start uniform in +-GRID_INIT
DRAWN = 1 << 20  # entries drawn at once


class Model:
    """What `Field`, `Network` and `Encoding` share: parameters, evaluation and gradients, with checked arrays.

    Arrays may come from NumPy, Warp, or any library with DLPack or the CUDA array interface. Where device, type and
    layout match they are used in place. Results are Warp arrays, which NumPy and DLPack read without a copy.

    `params` holds the network's weights first (each layer a row-major inputs x outputs matrix, in order), then the
    encodings' parameters (grid tables in the order of the composite, level by level).

    Calls share working memory: one thread, and on CUDA one stream, at a time.

    Attributes:
        n_input_dims, n_output_dims: Columns of inputs, which live in [0, 1], and of outputs.
        n_params: Length of `params`, the flat float32 parameters on `device`.
        encoding, network: Parsed configurations; `network` is None in an `Encoding`.
        passes: Kernels and working memory of the device.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding: enc.EncodingConfig,
        network: net.NetworkConfig | None,
        seed: int,
        device: wp.Device,
    ) -> None:
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.encoding, self.network = encoding, network
        self.seed, self.device = seed, device
        self.n_matrix_params = network.n_params if network else 0
        self.n_params = self.n_matrix_params + encoding.n_params
        self.passes: CpuPasses | CudaPasses = (CpuPasses if device.is_cpu else CudaPasses)(encoding, network, device)
        self._state = wp.zeros(4, dtype=int, device=device)  # as in kernels/optimizer.py
        self.params = wp.empty(self.n_params, dtype=float, device=device)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Draw the parameters anew: Glorot uniform weights, table entries uniform in +-1e-4."""
        if seed is not None:
            self.seed = seed
        rng = np.random.default_rng(self.seed)
        params = np.empty(self.n_params, np.float32)
        for first, n_in, n_out in self.network.layers if self.network else ():
            bound = math.sqrt(6.0 / (n_in + -(-n_out // 16) * 16))  # tiny-cuda-nn pads the outputs to 16
            params[first : first + n_in * n_out] = rng.uniform(-bound, bound, n_in * n_out)
        for first in range(self.n_matrix_params, self.n_params, DRAWN):
            part = params[first : first + DRAWN]
            part[:] = rng.uniform(-GRID_INIT, GRID_INIT, part.size)
        self.params.assign(params)

    def set_params(self, params: Any) -> None:
        """Overwrite the parameters with `n_params` finite floats.

        A moving average that follows them takes the new ones for old: reset the optimizer as well.
        """
        values = as_values("params", params, self.n_params, self.device)
        if not np.isfinite(values.numpy()).all():
            raise ValueError("parameters must be finite")
        self.params.assign(values)

    def forward(self, x: Any, out: Any = None, *, count: Any = None) -> wp.array:
        """As `inference`, always with the parameters being trained: the values whose derivatives `backward` gives."""
        return self.inference(x, out, count=count)

    def inference(self, x: Any, out: Any = None, *, params: Any = None, count: Any = None) -> wp.array:
        """Evaluate rows of `x`, however many.

        Args:
            x: (capacity, n_input_dims) inputs, in [0, 1].
            out: (capacity, n_output_dims) float32 to write to; rows that are not evaluated keep their content. A new
                array by default.
            params: Parameters to use instead of `self.params`, for instance their moving average.
            count: Number of rows to evaluate, an int32 array of length 1 on the device; all rows by default.

        Returns:
            (capacity, n_output_dims) float32 on the device: the memory of `out` where it was given. In a new array,
            rows from `count` on hold anything.

        Raises:
            ValueError: Wrong shape, type or device.
        """
        x = as_rows("x", x, self.n_input_dims, self.device)
        count = as_count(count, self.device)
        if out is None:
            out = wp.empty((x.shape[0], self.n_output_dims), dtype=float, device=self.device)
        out = as_written_rows("out", out, self.n_output_dims, self.device, x.shape[0])
        params = self.params if params is None else as_values("params", params, self.n_params, self.device)
        self.passes.evaluate(params, x, out, count)
        return out

    def backward(
        self,
        x: Any,
        dL_dy: Any,
        *,
        dL_dx: Any = None,
        dL_dparams: Any = None,
        count: Any = None,
    ) -> None:
        """Add the gradients of a scalar L by inputs and parameters, given its gradient by the outputs at `x`.

        Both are added to what the arrays hold, so that the terms of a loss can share them: clear them first. The values
        are those of `self.params`. At a kink (a ReLU at 0, the face of a grid's cell) the derivative is one side's; an
        input that a grid clamps to [0, 1] has none there. Non-finite values pass through. Working memory for the
        largest number of rows so far is kept.

        Args:
            x: (capacity, n_input_dims) inputs.
            dL_dy: (capacity, n_output_dims).
            dL_dx: (capacity, n_input_dims) float32 to add to; rows that are not evaluated keep their content.
            dL_dparams: (n_params,) float32 to add to.
            count: Number of rows to use, an int32 array of length 1 on the device; all rows by default.

        Raises:
            ValueError: Wrong shape, type or device, or nothing to compute.
        """
        x = as_rows("x", x, self.n_input_dims, self.device)
        dL_dy = as_rows("dL_dy", dL_dy, self.n_output_dims, self.device, x.shape[0])
        count = as_count(count, self.device)
        if dL_dx is None and dL_dparams is None:
            raise ValueError("backward needs dL_dx or dL_dparams to add to")
        if dL_dx is not None:
            dL_dx = as_written_rows("dL_dx", dL_dx, self.n_input_dims, self.device, x.shape[0])
        if dL_dparams is not None:
            dL_dparams = as_written_values("dL_dparams", dL_dparams, self.n_params, self.device)
        gradients = self.passes.backpropagate(
            self.params, x, dL_dy, count, loss=None, pdf=None, input_gradient=dL_dx is not None
        )
        if dL_dx is not None:
            self.add_input_gradient(gradients, x, count, dL_dx)
        if dL_dparams is not None:
            launch(opt.take_rows, 1, inputs=[x.shape[0], count], outputs=[self._state], device=self.device)
            if self.n_matrix_params:
                launch(
                    opt.reduce_weight_gradient,
                    self.n_matrix_params // opt.UPDATE_BLOCK,
                    inputs=[gradients.chunk_size, self._state, gradients.chunk_gradient],
                    outputs=[dL_dparams],
                    device=self.device,
                )
            if self.encoding.n_params:
                self.passes.accumulate_grids(x, self._state, gradients, dL_dparams[self.n_matrix_params :])

    def add_input_gradient(self, gradients: Gradients, x: wp.array, count: wp.array | None, dL_dx: wp.array) -> None:
        """Add the inputs' part of `gradients`, of `passes.backpropagate` with `input_gradient` at `x`, to `dL_dx`."""
        launch(
            self.passes.input_gradient_kernel,
            x.shape[0],
            inputs=[self.params, 1.0 / gradients.loss_scale, x.shape[0], count, x, gradients.dL_dcode],
            outputs=[dL_dx],
            device=self.device,
        )

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of `inference` by name, for `nrc.launch.prepare`."""
        return self.passes.kernels()


class Field(Model):
    """A learned function R^n_input_dims -> R^n_output_dims: an encoding followed by a network.

    Args:
        n_input_dims, n_output_dims: Columns of the inputs, which live in [0, 1], and of the outputs.
        encoding: Dictionary with `otype` HashGrid, DenseGrid, TiledGrid, Frequency, TriangleWave, OneBlob,
            SphericalHarmonics, Identity or Composite and its options (tiny-cuda-nn's names and defaults).
        network: Dictionary with `otype` FullyFusedMLP or MLP and its options.
        seed: Seed of the initial parameters.
        device: Warp device; the first GPU, else the CPU.

    Raises:
        ValueError: Unknown otype, key or value; the message lists what is allowed.
    """

    network: net.NetworkConfig

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding: Mapping[str, Any],
        network: Mapping[str, Any],
        seed: int = 1337,
        device: Any = None,
    ) -> None:
        n_input_dims, n_output_dims = _whole("n_input_dims", n_input_dims), _whole("n_output_dims", n_output_dims)
        self.encoding_config, self.network_config = deepcopy(encoding), deepcopy(network)
        n_padded = parse_encoding(encoding, n_input_dims, 0).n_padded
        parsed = parse_network(network, n_padded, n_output_dims)
        super().__init__(
            n_input_dims,
            n_output_dims,
            parse_encoding(encoding, n_input_dims, parsed.n_params),
            parsed,
            seed,
            resolve_device(device),
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments but for the device, as JSON can hold them."""
        return {
            "n_input_dims": self.n_input_dims,
            "n_output_dims": self.n_output_dims,
            "encoding": self.encoding_config,
            "network": self.network_config,
            "seed": self.seed,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write configuration and parameters as safetensors, replacing the file only once it is complete.

        The parameters are those being trained, not their moving average; `Trainer.save` adds the optimizer's state.
        Raises SnapshotError (a ValueError): parameters that are not finite, a file that cannot be written.
        """
        params = self.params.numpy()
        check_finite(path, "params", params)
        save_tensors(path, {"params": params}, self.config(), kind=SNAPSHOT_KIND)

    @staticmethod
    def load(path: str | PathLike[str], device: Any = None) -> Field:
        """The field in a file that `save` or `Trainer.save` wrote, on `device` (the first GPU, else the CPU).

        A `Network` comes back as the `Field` that it is.

        Raises:
            SnapshotError: A file that is missing, damaged or of another kind, or whose configuration does not fit the
                parameters; the message names the file and the entry. A ValueError.
        """
        tensors, config = load_tensors(path, kind=SNAPSHOT_KIND)
        n_params = _n_params(path, config, take_tensor(path, tensors, "params").size)
        params = take_tensor(path, tensors, "params", (n_params,), np.float32)
        check_finite(path, "params", params)
        names = ("n_input_dims", "n_output_dims", "encoding", "network", "seed")
        field = Field(**{name: config[name] for name in names}, device=device)
        field.set_params(params)
        return field


class Network(Field):
    """A network alone: a `Field` that reads its inputs as they are, padded with ones to a multiple of 16.

    Arguments and errors as of `Field`.
    """

    def __init__(
        self, n_input_dims: int, n_output_dims: int, network: Mapping[str, Any], seed: int = 1337, device: Any = None
    ) -> None:
        super().__init__(n_input_dims, n_output_dims, {"otype": "Identity"}, network, seed, device)


class Encoding(Model):
    """An encoding alone, without the columns that pad it for a network. Arguments and errors as of `Field`."""

    def __init__(self, n_input_dims: int, encoding: Mapping[str, Any], seed: int = 1337, device: Any = None) -> None:
        n_input_dims = _whole("n_input_dims", n_input_dims)
        self.encoding_config = deepcopy(encoding)
        parsed = parse_encoding(encoding, n_input_dims, 0)
        super().__init__(n_input_dims, parsed.n_output_dims, parsed, None, seed, resolve_device(device))


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def check_same_field(path: str | PathLike[str], config: Mapping[str, Any], field: Field) -> None:
    """Raise SnapshotError unless a snapshot's configuration describes `field`, however it is spelled."""
    _n_params(path, config, field.n_params)
    here = field.config()
    encoding = parse_encoding(config["encoding"], config["n_input_dims"], field.n_matrix_params)
    network = parse_network(config["network"], encoding.n_padded, config["n_output_dims"])
    for name, same in (
        ("n_input_dims", config["n_input_dims"] == field.n_input_dims),
        ("n_output_dims", config["n_output_dims"] == field.n_output_dims),
        ("encoding", encoding == field.encoding),
        ("network", network == field.network),
    ):
        if not same:
            raise SnapshotError(f"{path}: {name} is {config[name]} in the file, {here[name]} in the field")


def _n_params(path: str | PathLike[str], config: Mapping[str, Any], n_stored: int) -> int:
    """Number of parameters of the field that a snapshot describes, known before anything is allocated for it."""
    for name in ("n_input_dims", "n_output_dims", "seed"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "seed" else 1):
            raise SnapshotError(f"{path}: {name} must be a positive whole number, got {value!r}")
        if name != "seed" and value > n_stored:  # a network has more weights than inputs or outputs
            raise SnapshotError(f"{path}: {name} is {value}, more than the {n_stored} parameters stored")
    for name in ("encoding", "network"):
        if not isinstance(config.get(name), dict):
            raise SnapshotError(f"{path}: {name} must be a JSON object, got {config.get(name)!r}")
    name = "encoding"
    try:
        encoding = parse_encoding(config["encoding"], config["n_input_dims"], 0)
        name = "network"
        network = parse_network(config["network"], encoding.n_padded, config["n_output_dims"])
    except (ValueError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise SnapshotError(f"{path}: {name}: {error}") from error
    return network.n_params + encoding.n_params
