"""tiny-cuda-nn's PyTorch modules on `nrc`: `import nrc.integrations.torch as tcnn` instead of `import tinycudann`.

`Encoding`, `Network` and `NetworkWithInputEncoding` are `torch.nn.Module`s with one flat float32 parameter, `params`,
whose memory is that of the `nrc.Field` inside: what an optimizer of torch changes is what the next call reads. They run
on the CPU and on CUDA, wherever `params` lies, and launch on torch's current stream. Without a GPU a script also has to
name the device "cpu".
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast
from weakref import WeakSet

import torch
import warp as wp

from .. import field as fields
from ..field_cuda import LOSS_SCALE, CudaPasses
from ..launch import resolve_device

ALIGNMENT = 16  # floats; what a parameter's place in its storage must be a multiple of to be read there

_modules: WeakSet[Module] = WeakSet()  # that hold working memory


class Module(torch.nn.Module):
    """What the three modules share: parameters, evaluation, derivatives of first order by inputs and parameters.

    Calls share working memory: one thread at a time. Nothing is kept between forward and backward but inputs and
    parameters, so any number of forwards may precede their backwards. Copies, pickles and `state_dict` work as of any
    module; after a move to another device the first call compiles and allocates there.

    Attributes:
        params: (n,) float32 parameter, laid out as `nrc.Field.params`.
        n_input_dims, n_output_dims: Columns of inputs, which live in [0, 1], and of outputs.
        seed: Of the initial parameters, those of an `nrc.Field` with the same seed.
        dtype: Of the outputs: float32 unless asked for float16.
        jit_fusion: Accepted and ignored: kernels are always compiled for their configuration.
    """

    n_input_dims: int
    n_output_dims: int

    def __init__(self, seed: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        if dtype not in (None, torch.float32, torch.float16):
            raise ValueError(f"unknown dtype {dtype}; allowed: torch.float32, torch.float16")
        self.seed, self.dtype = seed, dtype or torch.float32
        self.jit_fusion = False
        self._loss_scale: float | None = None
        self._field: fields.Model | None = None
        self._stream: Any = None  # that the last call ran on
        self._n_reserved = 0  # rows that working memory was made for
        on_cuda = torch.cuda.is_available() and wp.is_cuda_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        self._field = self._make(resolve_device(device))
        self.n_output_dims = self._field.n_output_dims
        # Torch's memory, so that it lives by torch's rules
        self.params = torch.nn.Parameter(torch.tensor(self._field.params.numpy(), device=device))
        self._bind(self.params)

    def _make(self, device: wp.Device) -> fields.Model:
        """The field, network or encoding on `device`. Raises ValueError for what it does not understand."""
        raise NotImplementedError

    @property
    def field(self) -> Any:
        """The `nrc.Field`, `Network` or `Encoding` over the memory of `params`; what it writes there torch cannot know.

        Ask for it again after `params` was moved or given other memory.
        """
        return self._bind(self.params)

    @property
    def loss_scale(self) -> float:
        """What gradients of the outputs are multiplied by in half precision: 128 on CUDA, 1 where all is float32.

        Assign another, best a power of two, where gradients are smaller than 1e-9 or larger than 500.
        """
        return _loss_scale(self.field) if self._loss_scale is None else self._loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._loss_scale = float(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate any number of rows.

        Args:
            x: (rows, n_input_dims) of any real type, in [0, 1]; converted to float32, and with a warning moved, where
                type and device are others. Rows are read in place where their columns are contiguous.

        Returns:
            (rows, n_output_dims) of `dtype` on the device of `params`.

        Raises:
            ValueError: Wrong shape, or a device that Warp does not run on.
        """
        if not isinstance(x, torch.Tensor) or x.ndim != 2 or x.shape[1] != self.n_input_dims or x.is_complex():
            got = f"{x.dtype}{list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"x must be a real tensor of shape (rows, {self.n_input_dims}), got {got}")
        params: torch.Tensor = self.params
        if x.device != params.device:
            warnings.warn(f"x is moved from {x.device} to {params.device} in every call", stacklevel=4)
        x = x.to(params.device, torch.float32)
        if x.stride(1) != 1:
            x = x.contiguous()
        params = params.to(torch.float32).contiguous()  # itself, unless someone converted the module
        if params.storage_offset() % ALIGNMENT:
            params = params.clone()
        y = _Evaluate.apply(x, params, self)
        return y.to(self.dtype)

    def _evaluate(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """(rows, n_output_dims) float32 at `x`, both float32 on the device of `params`."""
        y = torch.empty((x.shape[0], self.n_output_dims), dtype=torch.float32, device=x.device)
        if x.shape[0]:
            field = self._bind(params)
            with self._on_stream(x.device):
                field.forward(_array(x), _array(y))
        return y

    def _differentiate(
        self, dL_dy: torch.Tensor, x: torch.Tensor, params: torch.Tensor, by_x: bool, by_params: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients by `x` and `params`, those that are wanted, all float32 on the device of `params`."""
        dL_dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if by_x else None
        dL_dparams = torch.zeros_like(params) if by_params else None
        if x.shape[0] == 0 or not (by_x or by_params):
            return dL_dx, dL_dparams
        field = self._bind(params)
        factor = 1.0 if self._loss_scale is None else self._loss_scale / _loss_scale(field)  # on top of the field's
        scaled = dL_dy.contiguous() if factor == 1.0 else dL_dy.contiguous() * factor
        results = {"dL_dx": dL_dx, "dL_dparams": dL_dparams}
        with self._on_stream(x.device):
            if x.is_cuda and x.shape[0] > self._n_reserved:
                torch.cuda.current_stream(x.device).synchronize()  # Warp frees what is outgrown without asking torch
            self._n_reserved = max(self._n_reserved, x.shape[0])
            field.backward(
                _array(x), _array(scaled), **{name: _array(t) for name, t in results.items() if t is not None}
            )
        if factor != 1.0:
            for gradient in results.values():
                if gradient is not None:
                    gradient /= factor
        return dL_dx, dL_dparams

    def _bind(self, params: torch.Tensor) -> fields.Model:
        """The field over the memory of `params`, on their device."""
        device = resolve_device(params.device)
        if self._field is None or self._field.device != device:
            self._drop()
            self._field = self._make(device)
        if params.data_ptr() != (self._field.params.ptr or 0):
            self._field.params = _array(params)
        _modules.add(self)
        return self._field

    @contextmanager
    def _on_stream(self, device: torch.device) -> Iterator[None]:
        """Launch on torch's current stream, after what this module launched on another."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream.device == stream.device and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream
        with wp.ScopedStream(wp.stream_from_torch(stream)):
            yield

    def _drop(self, *, working_memory_alone: bool = False) -> None:
        """Free the field, or what it works in, once the device is done with it."""
        field = self._field
        if field is None:
            return
        if field.device.is_cuda:
            wp.synchronize_device(field.device)
        self._n_reserved, self._stream = 0, None
        if working_memory_alone:
            field.passes = type(field.passes)(field.encoding, field.network, field.device)
        else:
            self._field = None

    def _apply(self, fn: Any, recurse: bool = True) -> Module:
        super()._apply(fn, recurse)
        if self._field is not None and self._field.params.ptr != self.params.data_ptr():
            if wp.device_to_torch(self._field.device) == str(self.params.device) and self.params.dtype == torch.float32:
                self._bind(self.params)
            else:
                self._drop()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_field": None, "_stream": None, "_n_reserved": 0}

    def extra_repr(self) -> str:
        configs = {name: getattr(self, name) for name in ("encoding_config", "network_config") if hasattr(self, name)}
        values = {
            "n_input_dims": self.n_input_dims,
            "n_output_dims": self.n_output_dims,
            "seed": self.seed,
            "dtype": self.dtype,
        } | configs
        return ", ".join(f"{name}={value}" for name, value in values.items())


class NetworkWithInputEncoding(Module):
    """An encoding followed by a network: `nrc.Field`, whose arguments and errors these are.

    Args:
        n_input_dims, n_output_dims: Columns of inputs and outputs.
        encoding_config, network_config: tiny-cuda-nn's dictionaries.
        seed: Of the initial parameters.
        dtype: Of the outputs, float32 (None) or float16.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding_config: Mapping[str, Any],
        network_config: Mapping[str, Any],
        seed: int = 1337,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.encoding_config, self.network_config = deepcopy(encoding_config), deepcopy(network_config)
        super().__init__(seed, dtype)

    def _make(self, device: wp.Device) -> fields.Model:
        return fields.Field(
            self.n_input_dims, self.n_output_dims, self.encoding_config, self.network_config, self.seed, device
        )


class Network(Module):
    """A network alone: `nrc.Network`. Arguments as of `NetworkWithInputEncoding`."""

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        network_config: Mapping[str, Any],
        seed: int = 1337,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.network_config = deepcopy(network_config)
        super().__init__(seed, dtype)

    def _make(self, device: wp.Device) -> fields.Model:
        return fields.Network(self.n_input_dims, self.n_output_dims, self.network_config, self.seed, device)


class Encoding(Module):
    """An encoding alone: `nrc.Encoding`, which says how many columns it has. Arguments as of the others."""

    def __init__(
        self, n_input_dims: int, encoding_config: Mapping[str, Any], seed: int = 1337, dtype: torch.dtype | None = None
    ) -> None:
        self.n_input_dims = n_input_dims
        self.encoding_config = deepcopy(encoding_config)
        super().__init__(seed, dtype)

    def _make(self, device: wp.Device) -> fields.Model:
        return fields.Encoding(self.n_input_dims, self.encoding_config, self.seed, device)


def free_temporary_memory() -> None:
    """Free the working memory of all modules; the next calls allocate it anew. CUDA graphs captured before break."""
    gc.collect()
    for module in list(_modules):
        module._drop(working_memory_alone=True)


def supports_jit_fusion(device: Any = None) -> bool:
    """False: there is nothing to turn on, since kernels are always compiled for their configuration."""
    return False


class _Evaluate(torch.autograd.Function):
    """y of (x, params, module).

    With its context in `forward`: a `setup_context` costs 0.1 ms per call.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, params: torch.Tensor, module: Module) -> torch.Tensor:
        ctx.save_for_backward(x, params)
        ctx.module = module
        return module._evaluate(x, params)

    @staticmethod
    def backward(ctx: Any, dL_dy: torch.Tensor) -> Any:
        return *_Differentiate.apply(dL_dy, *ctx.saved_tensors, ctx.module, *ctx.needs_input_grad[:2]), None


class _Differentiate(torch.autograd.Function):
    """(dL_dx, dL_dparams) of (dL_dy, x, params, module, whether each is wanted), with no derivatives of their own."""

    @staticmethod
    def forward(
        ctx: Any, dL_dy: torch.Tensor, x: torch.Tensor, params: torch.Tensor, module: Module, *wanted: bool
    ) -> Any:
        return module._differentiate(dL_dy, x, params, *wanted)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("the modules of nrc.integrations.torch have first derivatives alone, no second ones")


def _loss_scale(field: fields.Model) -> float:
    """What `field.backward` scales half-precision gradients by."""
    return LOSS_SCALE if isinstance(field.passes, CudaPasses) and field.passes.dtype == wp.float16 else 1.0


def _array(tensor: torch.Tensor) -> wp.array:
    """The tensor's memory as a Warp array, which keeps it alive."""
    return cast(wp.array, wp.from_torch(tensor.detach(), requires_grad=False))
