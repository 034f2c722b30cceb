"""`nrc bench field`: throughput of a field's training and inference beside `drjit.nn` and plain PyTorch.

All three are the same function: a 2D hash grid and a network without biases, trained with Adam on the mean squared
error of a smooth target. Each baseline runs at the fastest of its settings that was found here, and the three take
turns, so that what else the machine does slows all of them alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import warp as wp

from nrc.field import GRID_INIT, Field
from nrc.launch import prepare, resolve_device, threads
from nrc.trainer import Trainer

N_LEVELS, N_FEATURES, BASE_RESOLUTION, PER_LEVEL_SCALE = 16, 2, 16, 1.5
N_NEURONS, N_OUTPUTS = 64, 3
ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15}
N_BATCHES = 8  # that training and inference go through in turn
N_FIRST_STEPS = 30  # from the initial parameters, before anything is timed; their losses must fall

Say = Callable[[str], None]


class Contestant(Protocol):
    """One implementation; calls may return before the work is done, which `wait` waits for."""

    settings: str  # what was chosen for speed

    def train(self, i: int) -> None: ...
    def infer(self, i: int) -> None: ...
    def loss(self) -> float: ...
    def outputs(self) -> np.ndarray: ...
    def tune(self) -> None: ...
    def wait(self) -> None: ...


def bench_field(
    *,
    batch: int = 65536,
    log2_hashmap_size: int = 19,
    seconds: float = 30.0,
    rounds: int = 5,
    device: Any = None,
    say: Say = print,
) -> dict[str, Any]:
    """Measure training and inference of `nrc.Field`, `drjit.nn` and PyTorch in turn.

    Args:
        batch: Samples of a training step and of an inference call.
        log2_hashmap_size: Largest number of entries of a level, as a power of two.
        seconds: Measured time in all; compilation, first steps and the choice of settings come on top.
        rounds: Turns that each takes; the figures are medians over them.

    Returns:
        `training` and `inference`, each with samples per second of ours (`samples_per_second`), `drjit` and `torch`,
        and `ratio_drjit` and `ratio_torch` (ours over theirs, median over the rounds); `losses` of the first and the
        last of 30 steps; `absent` with the reason for what could not run; `load_before`, cores that were busy before;
        configuration, settings, versions, machine and device.

    Raises:
        ValueError: A number out of range, or an unknown device.
    """
    if batch < 1 or rounds < 1 or not seconds > 0.0:
        raise ValueError(f"batch, rounds and seconds must be positive, got {batch}, {rounds} and {seconds}")
    warp_device = resolve_device(device)
    load = _load()
    if load > 0.5:
        say(f"warning: other processes keep {load:.1f} cores busy; the ratios suffer, not only the rates")
    x, y = _data(batch)
    contestants: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    for name, make in (("ours", _Ours), ("drjit", _DrJit), ("torch", _Torch)):
        try:
            contestants[name] = make(x, y, log2_hashmap_size, warp_device)
        except _Absent as error:
            absent[name] = str(error)
            say(f"{name:6} absent: {error}")
    losses = {name: _first_steps(contestant) for name, contestant in contestants.items()}
    for name, contestant in contestants.items():
        contestant.tune()
        first, last = losses[name]
        say(f"{name:6} loss {first:.5f} -> {last:.5f} in {N_FIRST_STEPS} steps; {contestant.settings}")
    slice_seconds = seconds / (2 * rounds * len(contestants))
    result: dict[str, Any] = {
        task: _take_turns(
            {name: (getattr(c, call), c.wait) for name, c in contestants.items()}, batch, slice_seconds, rounds
        )
        for task, call in (("training", "train"), ("inference", "infer"))
    }
    for task in ("training", "inference"):
        say(_line(task, result[task]))
    return result | {
        "losses": {name: {"first": first, "last": last} for name, (first, last) in losses.items()},
        "absent": absent,
        "configuration": {
            "batch": batch,
            "n_input_dims": 2,
            "n_output_dims": N_OUTPUTS,
            "encoding": _encoding(log2_hashmap_size),
            "network": _network(),
            "loss": {"otype": "L2"},
            "optimizer": _optimizer(),
            "seconds": seconds,
            "rounds": rounds,
        },
        "settings": {name: contestant.settings for name, contestant in contestants.items()},
        "versions": {name: _version(name) for name in ("nrc", "warp-lang", "drjit", "torch", "numpy")},
        "machine": _machine(),
        "load_before": load,
        "device": str(warp_device),
        "threads": threads(),
    }


class _Absent(Exception):
    """A baseline cannot run here; the message says why."""


class _Ours:
    """`nrc.Field` and `nrc.Trainer`."""

    settings = "nrc.Field, nrc.Trainer"

    def __init__(self, x: np.ndarray, y: np.ndarray, log2_hashmap_size: int, device: wp.Device) -> None:
        self._field = Field(2, N_OUTPUTS, _encoding(log2_hashmap_size), _network(), device=device)
        self._trainer = Trainer(self._field, {"otype": "L2"}, _optimizer(), batch_size=x.shape[1])
        prepare({**self._field.kernels(), **self._trainer.kernels()}, device)
        self._x: list[wp.array] = [wp.array(batch, dtype=float, device=device) for batch in x]
        self._y: list[wp.array] = [wp.array(batch, dtype=float, device=device) for batch in y]
        self._out = wp.zeros(y.shape[1:], dtype=float, device=device)
        self._device = device

    def train(self, i: int) -> None:
        self._loss = self._trainer.step(self._x[i % N_BATCHES], self._y[i % N_BATCHES])

    def infer(self, i: int) -> None:
        self._field.inference(self._x[i % N_BATCHES], self._out)

    def loss(self) -> float:
        return float(self._loss.numpy()[0])

    def outputs(self) -> np.ndarray:
        return self._out.numpy()

    def tune(self) -> None:
        """There is nothing to choose."""

    def wait(self) -> None:
        wp.synchronize_device(self._device)


class _DrJit:
    """`drjit.nn`: HashGridEncoding and Linear layers, frozen so that kernels are recorded once.

    Training multiplies matrices as tensors (a GEMM of its own, faster than cooperative vectors on the CPU); table
    gradients are added atomically, or to one copy of the table per thread, whichever is faster. Inference fuses all
    into one kernel through cooperative vectors, or uses tensors.
    """

    settings = ""

    def __init__(self, x: np.ndarray, y: np.ndarray, log2_hashmap_size: int, device: wp.Device) -> None:
        try:
            import drjit as dr
            from drjit import nn
            from drjit.opt import Adam

            if device.is_cuda:
                from drjit import cuda as plain
                from drjit.cuda import ad
            else:
                from drjit import llvm as plain  # type: ignore[no-redef]
                from drjit.llvm import ad  # type: ignore[no-redef]
        except ImportError as error:
            raise _Absent(f"{error} (pip install drjit)") from None
        try:
            dr.eval(plain.Float(0.0) + 1.0)
        except Exception as error:  # drjit raises bare Exceptions where LLVM or CUDA is missing
            library = os.environ.get("DRJIT_LIBLLVM_PATH", "not set")
            reason = str(error).strip().splitlines()[0]
            raise _Absent(f"drjit does not start ({reason}; DRJIT_LIBLLVM_PATH is {library})") from None
        self._dr, self._nn, self._ad, self._plain = dr, nn, ad, plain
        if device.is_cpu:
            dr.set_thread_count(threads())
        rng = dr.rng(seed=1)
        grid = {
            "n_levels": N_LEVELS,
            "n_features_per_level": N_FEATURES,
            "hashmap_size": 1 << log2_hashmap_size,
            "base_resolution": BASE_RESOLUTION,
            "per_level_scale": PER_LEVEL_SCALE,
            "torchngp_compat": True,
            "init_scale": GRID_INIT,
        }
        make_grid: Any = nn.HashGridEncoding  # its type stub lacks the parameters
        self._grid = make_grid(ad.Float, 2, rng=rng, **grid)
        self._plain_grid = make_grid(plain.Float, 2, **grid)
        layers = (
            nn.Linear(N_LEVELS * N_FEATURES, N_NEURONS, bias=False),
            nn.ReLU(),
            nn.Linear(N_NEURONS, N_NEURONS, bias=False),
            nn.ReLU(),
            nn.Linear(N_NEURONS, N_OUTPUTS, bias=False),
        )
        self._network = nn.Sequential(*layers).alloc(ad.TensorXf, rng=rng)
        self._plain_network = nn.Sequential(*layers).alloc(plain.TensorXf)
        self._adam = Adam(
            lr=ADAM["learning_rate"],
            params={**dict(self._network.items()), "grid": self._grid.data},
            beta_1=ADAM["beta1"],
            beta_2=ADAM["beta2"],
            epsilon=ADAM["epsilon"],
        )
        columns = np.ascontiguousarray(x.transpose(0, 2, 1)), np.ascontiguousarray(y.transpose(0, 2, 1))
        self._x = [ad.ArrayXf(batch) for batch in columns[0]]
        self._y = [ad.TensorXf(batch) for batch in columns[1]]
        self._plain_x = [plain.ArrayXf(batch) for batch in columns[0]]
        dr.eval(self._x, self._y, self._plain_x, self._grid.data, self._plain_grid.data)
        self._step = dr.freeze(self._trace_step)
        self._infer_vectors = dr.freeze(self._trace_vectors)
        self._infer_tensors = dr.freeze(self._trace_tensors)
        self._expand = False
        self._vectors = False
        self._copy_weights()

    def _trace_step(self, grid: Any, network: Any, adam: Any, x: Any, y: Any) -> Any:
        dr, ad = self._dr, self._ad
        network.update({name: adam[name] for name in adam if name != "grid"})
        grid.data = adam["grid"]
        features = ad.TensorXf(ad.ArrayXf(grid([x[0], x[1]])))
        loss = dr.mean(dr.square(network(features) - y), axis=None)
        dr.backward(loss)
        adam.step()
        return loss

    def _trace_vectors(self, grid: Any, network: Any, x: Any) -> Any:
        return self._plain.ArrayXf(list(network(self._nn.CoopVec(grid([x[0], x[1]])))))

    def _trace_tensors(self, grid: Any, network: Any, x: Any) -> Any:
        plain = self._plain
        return network(plain.TensorXf(plain.ArrayXf(grid([x[0], x[1]]))))

    def _copy_weights(self) -> None:
        """Bring what was trained to the arrays for inference, which have no derivatives."""
        dr = self._dr
        self._plain_grid.data = dr.detach(self._adam["grid"], preserve_type=False)
        self._plain_network.update(
            {name: dr.detach(self._adam[name], preserve_type=False) for name in self._adam if name != "grid"}
        )
        self._packed_network = self._nn.pack(self._plain_network, layout="inference")

    def train(self, i: int) -> None:
        dr = self._dr
        threshold = dr.expand_threshold()
        dr.set_expand_threshold(1 << 30 if self._expand else 0)
        with dr.scoped_set_flag(dr.JitFlag.ScatterReduceLocal, False):
            self._loss = self._step(
                self._grid, self._network, self._adam, self._x[i % N_BATCHES], self._y[i % N_BATCHES]
            )
        dr.set_expand_threshold(threshold)

    def infer(self, i: int) -> None:
        x = self._plain_x[i % N_BATCHES]
        if self._vectors:
            self._out = self._infer_vectors(self._plain_grid, self._packed_network, x)
        else:
            self._out = self._infer_tensors(self._plain_grid, self._plain_network, x)
        self._dr.eval(self._out)

    def loss(self) -> float:
        return float(np.array(self._loss).ravel()[0])

    def outputs(self) -> np.ndarray:
        return np.array(self._out).T

    def tune(self) -> None:
        self._copy_weights()
        self._expand = _faster(self, "_expand", self.train)
        self._vectors = _faster(self, "_vectors", self.infer)
        self.settings = (
            f"drjit.nn {'LLVM' if self._plain.__name__.endswith('llvm') else 'CUDA'}, frozen; training: tensors, "
            f"{'a table per thread' if self._expand else 'atomics'}; "
            f"inference: {'cooperative vectors' if self._vectors else 'tensors'}"
        )

    def wait(self) -> None:
        self._dr.sync_thread()


class _Torch:
    """PyTorch alone: a table per level read with `gather`, whose gradient is a parallel scatter, and a fused Adam.

    Of embedding_bag, index_select, indexing and gather, on one table or one per level, this was the fastest.
    """

    settings = "torch, eager; gather per level, einsum, fused Adam"

    def __init__(self, x: np.ndarray, y: np.ndarray, log2_hashmap_size: int, device: wp.Device) -> None:
        try:
            import torch
        except ImportError as error:
            raise _Absent(f"{error} (pip install torch)") from None
        if device.is_cuda and not torch.cuda.is_available():
            raise _Absent("this PyTorch has no CUDA device")
        self._torch, self._place = torch, wp.device_to_torch(device)
        if device.is_cpu:
            torch.set_num_threads(threads())
        generator = torch.Generator().manual_seed(1)
        self._levels = [_level(level, 1 << log2_hashmap_size) for level in range(N_LEVELS)]

        def uniform(bound: float, *shape: int) -> Any:
            values = (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound
            return values.to(self._place).requires_grad_()

        self._tables = [uniform(GRID_INIT, size, N_FEATURES) for _, _, size in self._levels]
        widths = [N_LEVELS * N_FEATURES, N_NEURONS, N_NEURONS, N_OUTPUTS]
        self._weights = [uniform((6.0 / (n_in + n_out)) ** 0.5, n_out, n_in) for n_in, n_out in pairwise(widths)]
        self._adam = torch.optim.Adam(
            [*self._tables, *self._weights],
            lr=ADAM["learning_rate"],
            betas=(ADAM["beta1"], ADAM["beta2"]),
            eps=ADAM["epsilon"],
            fused=True,
        )
        self._x = [torch.from_numpy(batch).to(self._place) for batch in x]
        self._y = [torch.from_numpy(batch).to(self._place) for batch in y]

    def _corners(self, x: Any, y: Any, level: int) -> tuple[Any, Any]:
        """Entries and weights of the four corners around each sample, both (4, rows)."""
        torch = self._torch
        scale, resolution, size = self._levels[level]
        px, py = x * scale + 0.5, y * scale + 0.5
        fx, fy = torch.floor(px), torch.floor(py)
        ix, iy = fx.to(torch.int64), fy.to(torch.int64)
        fx, fy = px - fx, py - fy
        if resolution**2 <= size:
            corner = iy * resolution + ix
            entries = torch.stack([corner, corner + 1, corner + resolution, corner + resolution + 1]).remainder_(size)
        else:
            h0 = iy * 2654435761
            h1 = h0 + 2654435761
            entries = torch.stack([ix ^ h0, (ix + 1) ^ h0, ix ^ h1, (ix + 1) ^ h1]).bitwise_and_(size - 1)
        gx, gy = 1.0 - fx, 1.0 - fy
        return entries, torch.stack([gx * gy, fx * gy, gx * fy, fx * fy])

    def _evaluate(self, x: Any) -> Any:
        torch = self._torch
        columns = x[:, 0].contiguous(), x[:, 1].contiguous()
        features = []
        for level, table in enumerate(self._tables):
            with torch.no_grad():
                entries, weights = self._corners(*columns, level)
            values = table.gather(0, entries.view(-1, 1).expand(-1, N_FEATURES)).view(4, -1, N_FEATURES)
            features.append(torch.einsum("kbf,kb->bf", values, weights))
        hidden = torch.cat(features, 1)
        for weight in self._weights[:-1]:
            hidden = torch.relu(torch.nn.functional.linear(hidden, weight))
        return torch.nn.functional.linear(hidden, self._weights[-1])

    def train(self, i: int) -> None:
        self._adam.zero_grad(set_to_none=True)
        prediction = self._evaluate(self._x[i % N_BATCHES])
        self._loss = self._torch.nn.functional.mse_loss(prediction, self._y[i % N_BATCHES])
        self._loss.backward()
        self._adam.step()

    def infer(self, i: int) -> None:
        with self._torch.inference_mode():
            self._out = self._evaluate(self._x[i % N_BATCHES])

    def loss(self) -> float:
        return float(self._loss.detach())

    def outputs(self) -> np.ndarray:
        return self._out.cpu().numpy()

    def tune(self) -> None:
        """The choice was made once, when this was written."""

    def wait(self) -> None:
        if self._torch.device(self._place).type == "cuda":
            self._torch.cuda.synchronize(self._place)


def _level(level: int, hashmap_size: int) -> tuple[float, int, int]:
    """Scale, resolution and number of entries of a level, as tiny-cuda-nn has them."""
    scale = float(BASE_RESOLUTION * PER_LEVEL_SCALE**level - 1.0)
    resolution = int(np.ceil(scale)) + 1
    return scale, resolution, min(-(-(resolution**2) // 8) * 8, hashmap_size)


def _encoding(log2_hashmap_size: int) -> dict[str, Any]:
    return {
        "otype": "HashGrid",
        "n_levels": N_LEVELS,
        "n_features_per_level": N_FEATURES,
        "log2_hashmap_size": log2_hashmap_size,
        "base_resolution": BASE_RESOLUTION,
        "per_level_scale": PER_LEVEL_SCALE,
    }


def _network() -> dict[str, Any]:
    return {"otype": "FullyFusedMLP", "n_neurons": N_NEURONS, "n_hidden_layers": 2, "activation": "ReLU"}


def _optimizer() -> dict[str, Any]:
    return {"otype": "Adam", **ADAM, "l2_reg": 0.0}


def _data(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches of uniform points (n, batch, 2) and the target there (n, batch, 3)."""
    x = np.random.default_rng(0).random((N_BATCHES, batch, 2), dtype=np.float32)
    u, v = x[..., 0], x[..., 1]
    y = np.stack([0.5 + 0.5 * np.sin(6.0 * u + 2.0 * v), 0.5 + 0.5 * np.cos(7.0 * v), u * v], axis=-1)
    return x, y.astype(np.float32)


def _first_steps(contestant: Contestant) -> tuple[float, float]:
    """Loss of the first and the last of the first steps."""
    contestant.train(0)
    first = contestant.loss()
    for i in range(1, N_FIRST_STEPS):
        contestant.train(i)
    return first, contestant.loss()


def _faster(contestant: Any, flag: str, call: Callable[[int], None], n_calls: int = 3) -> bool:
    """Whether `call` is faster with `contestant.flag` set; a setting that fails to run is not."""
    seconds = {}
    for value in (False, True):
        setattr(contestant, flag, value)
        try:
            seconds[value] = _seconds(call, contestant.wait, n_calls)
        except RuntimeError:  # not supported by this backend
            seconds[value] = float("inf")
    return seconds[True] < seconds[False]


def _seconds(call: Callable[[int], None], wait: Callable[[], None], n_calls: int) -> float:
    """Seconds per call, after two calls to warm up."""
    for i in range(2):
        call(i)
    wait()
    start = time.perf_counter()
    for i in range(n_calls):
        call(i)
    wait()
    return (time.perf_counter() - start) / n_calls


def _take_turns(
    calls: Mapping[str, tuple[Callable[[int], None], Callable[[], None]]],
    batch: int,
    slice_seconds: float,
    rounds: int,
) -> dict[str, Any]:
    """Samples per second of each contestant, median over rounds in which they take turns."""
    n_calls = {name: max(1, round(slice_seconds / _seconds(call, wait, 1))) for name, (call, wait) in calls.items()}
    per_second: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, wait) in calls.items():
            start = time.perf_counter()
            for i in range(n_calls[name]):
                call(i)
            wait()
            per_second[name].append(batch * n_calls[name] / (time.perf_counter() - start))
    result: dict[str, Any] = {"samples_per_second": statistics.median(per_second["ours"])}
    for name in [name for name in per_second if name != "ours"]:
        result[name] = statistics.median(per_second[name])
        result[f"ratio_{name}"] = statistics.median(
            ours / theirs for ours, theirs in zip(per_second["ours"], per_second[name], strict=True)
        )
    result["rounds"] = per_second
    return result


def _line(task: str, figures: Mapping[str, Any]) -> str:
    others = [
        f"{name} {figures[name] / 1e6:.2f} M (ratio {figures[f'ratio_{name}']:.2f})"
        for name in ("drjit", "torch")
        if name in figures
    ]
    return ", ".join([f"{task:9} {figures['samples_per_second'] / 1e6:.2f} M samples/s", *others])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _load() -> float:
    """Cores that were busy over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _machine() -> str:
    """Processor and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        models = []
    return f"{models[0] if models else name}, {os.cpu_count()} cores"
