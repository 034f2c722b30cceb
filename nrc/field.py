"""`Field`: encoding and network behind one flat parameter buffer, made from tiny-cuda-nn style dictionaries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import warp as wp

from .kernels import encoding as enc
from .kernels import encoding_wide, network_wide
from .kernels import network as net
from .launch import launch, resolve_device, threads

SLICE_ROWS = 65536  # rows the CPU evaluates at once; their grid features are kept between two launches
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
            encoding_wide.make_encode_grid_wide(self.encoding, part) for part in self.encoding.grids if self.wide
        ]
        self._features = self.allocate_features(SLICE_ROWS if self.wide else 1)
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
        elif params.shape != (self.n_params,) or params.dtype != wp.float32 or params.device != self.device:
            raise ValueError(f"params must be {self.n_params} float32 on {self.device}, got {describe(params)}")
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
        n_parts = -(-n_rows // encoding_wide.GRID_ROWS)
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


def heavy_range(n: int) -> int:
    """Indices per CPU launch where each index is much work: four launches per thread even out their differences."""
    return max(1, n // (4 * threads()))


def parse_encoding(config: Mapping[str, Any], n_dims: int, first_param: int) -> enc.Encoding:
    """Turn a tiny-cuda-nn style dictionary over `n_dims` inputs into an `Encoding` whose parameters start there.

    A nested entry of a Composite takes `n_dims_to_encode` inputs from `dims_to_encode_begin` on (by default those that
    follow the previous entry's); the one entry without a count takes what the others leave. Raises ValueError.
    """
    if otype_of(config, "OneBlob").lower() != "composite":
        if "n_dims_to_encode" in config:
            raise ValueError("n_dims_to_encode belongs to the nested encodings of a Composite")
        component = _component(config, n_dims, "encoding")
        return enc.Encoding((enc.Part(component, 0, 0, first_param),))
    parse_options(config, {"nested": []}, "Composite encoding")
    nested = list(config.get("nested", []))
    if not nested:
        raise ValueError("a Composite encoding needs at least one entry in 'nested'")
    open_entries = [entry for entry in nested if "n_dims_to_encode" not in entry]
    rest = n_dims - sum(int(entry.get("n_dims_to_encode", 0)) for entry in nested)
    if len(open_entries) > 1:
        raise ValueError("only one entry of a Composite encoding may omit n_dims_to_encode")
    parts: list[enc.Part] = []
    next_input = 0
    for i, entry in enumerate(nested):
        n = int(entry.get("n_dims_to_encode", rest))
        begin = int(entry.get("dims_to_encode_begin", next_input))
        if n < 1 or begin < 0 or begin + n > n_dims:
            raise ValueError(f"nested encoding {i} reads inputs {begin} ... {begin + n - 1} of {n_dims}")
        next_input = begin + n
        options = {k: v for k, v in entry.items() if k not in ("n_dims_to_encode", "dims_to_encode_begin")}
        component = _component(options, n, f"nested encoding {i}")
        before = enc.Encoding(tuple(parts)) if parts else None
        first_output = before.n_output_dims if before else 0
        parts.append(enc.Part(component, begin, first_output, first_param + (before.n_params if before else 0)))
    covered = {d for p in parts for d in range(p.first_input, p.first_input + p.config.n_dims)}
    if covered != set(range(n_dims)):
        raise ValueError(f"the Composite encoding leaves inputs {sorted(set(range(n_dims)) - covered)} unused")
    return enc.Encoding(tuple(parts))


def parse_network(config: Mapping[str, Any], n_inputs: int, n_outputs: int) -> net.Network:
    """Turn a tiny-cuda-nn style dictionary into a `Network`. Raises ValueError."""
    otype = otype_of(config, "FullyFusedMLP")
    if otype.lower() != "fullyfusedmlp":
        raise ValueError(f"unknown network otype {otype!r}; allowed: FullyFusedMLP")
    defaults = {
        "n_neurons": 128,
        "n_hidden_layers": 5,
        "activation": "ReLU",
        "output_activation": "None",
    }
    options = parse_options(config, defaults, "FullyFusedMLP network")
    for key in ("activation", "output_activation"):
        options[key] = one_of(options[key], net.ACTIVATIONS, key)
    return net.Network(n_inputs, n_outputs, **options)


def one_of(value: Any, allowed: tuple[str, ...], what: str) -> str:
    """The member of `allowed` that equals `value` up to case. Raises ValueError listing them."""
    for name in allowed:
        if isinstance(value, str) and name.lower() == value.lower():
            return name
    raise ValueError(f"unknown {what} {value!r}; allowed: {', '.join(allowed)}")


_COMPONENTS: dict[str, tuple[type, dict[str, Any]]] = {
    "HashGrid": (
        enc.HashGrid,
        {
            "n_levels": 16,
            "n_features_per_level": 2,
            "log2_hashmap_size": 19,
            "base_resolution": 16,
            "per_level_scale": 2.0,
        },
    ),
    "TriangleWave": (enc.TriangleWave, {"n_frequencies": 12}),
    "OneBlob": (enc.OneBlob, {"n_bins": 16, "wrap": True}),
    "Identity": (enc.Identity, {"scale": 1.0, "offset": 0.0}),
}


def _component(config: Mapping[str, Any], n_dims: int, what: str) -> Any:
    otype = one_of(otype_of(config, "OneBlob"), tuple(_COMPONENTS), f"otype of {what}")
    make, defaults = _COMPONENTS[otype]
    return make(n_dims, **parse_options(config, defaults, f"{otype} encoding"))


def otype_of(config: Mapping[str, Any], default: str) -> str:
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a dictionary with 'otype', got {config!r}")
    return str(config.get("otype", default))


def parse_options(config: Mapping[str, Any], defaults: dict[str, Any], what: str) -> dict[str, Any]:
    """`defaults` overridden by `config`, whose values must be of the defaults' types."""
    options = dict(defaults)
    for key, value in config.items():
        if key == "otype":
            continue
        if key not in defaults:
            raise ValueError(f"unknown key {key!r} in {what}; allowed: otype, {', '.join(defaults)}")
        kind = type(defaults[key])
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{key} in {what} must be {kind.__name__}, got {value!r}")
        options[key] = value
    return options


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


def check_count(count: Any, device: wp.Device) -> None:
    """Raise ValueError unless `count` is None or one int32 on `device`."""
    if count is None:
        return
    if not isinstance(count, wp.array) or count.shape != (1,) or count.dtype != wp.int32 or count.device != device:
        raise ValueError(f"count must be one int32 on {device}, got {describe(count)}")
