"""What a fit is made of: encoding, networks, loss, optimizer and batch, by task, with the paper's comparators.

Defaults are Instant-NGP's (Müller et al. 2022, section 5 and its configuration files) on CUDA. A CPU takes thousands of
steps where a GPU takes tens of thousands, so its batches are smaller and its learning rate falls sooner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import warp as wp

from nrc.config import one_of, parse_encoding

Task = Literal["image", "sdf", "nerf"]
ENCODINGS = ("hash", "none", "frequency", "dense", "dense-multi")
GRID_KEYS = ("n_levels", "n_features_per_level", "log2_hashmap_size")  # that a sweep varies
BASE_RESOLUTION = 16
KNOWN_BLOCKS = ("encoding", "network", "loss", "optimizer", "dir_encoding", "rgb_network", "batch_size")


@dataclass(frozen=True)
class FitConfig:
    """Complete settings of a fit, in tiny-cuda-nn's words.

    Attributes:
        encoding: Of positions, or of pixels; grids have their `per_level_scale`.
        network: Behind it; a NeRF's density network.
        loss: Of the outputs; a NeRF's, of a pixel's colour.
        optimizer: Of all parameters.
        batch_size: Pixels, points, or samples along rays of a step.
        dir_encoding, rgb_network: NeRF alone: encoding of directions, and the network that turns it and the density
            network's outputs into colour.
    """

    encoding: dict[str, Any]
    network: dict[str, Any]
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    batch_size: int
    dir_encoding: dict[str, Any] | None = None
    rgb_network: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True)
class _Defaults:
    log2_hashmap_size: int
    loss: str
    learning_rate: float
    decay: tuple[int, int]  # steps after which the rate falls to a third, and how often from then on
    decay_cpu: tuple[int, int]
    batch_size: int
    batch_size_cpu: int
    ema: float | None
    n_hidden_layers: int
    learning_rate_cpu: float | None = None


_TASKS: dict[str, _Defaults] = {
    "image": _Defaults(19, "L2", 1e-2, (20000, 10000), (1000, 2000), 1 << 18, 1 << 16, 0.95, 2),
    "sdf": _Defaults(19, "MAPE", 1e-4, (10000, 5000), (600, 400), 1 << 18, 1 << 15, 0.95, 2, 3e-4),
    "nerf": _Defaults(19, "Huber", 1e-2, (20000, 10000), (4000, 2000), 1 << 18, 1 << 15, 0.95, 1),
}


def make_config(
    task: Task,
    *,
    n_input_dims: int,
    finest: float,
    device: wp.Device,
    encoding: str = "hash",
    config: Mapping[str, Any] | None = None,
    grid: Mapping[str, int] | None = None,
    log2_hashmap_size: int | None = None,
    batch_size: int | None = None,
) -> FitConfig:
    """Settings of a fit: the task's defaults, the blocks of `config` over them, the options over both.

    Args:
        n_input_dims: 2 for images, 3 for space.
        finest: Resolution of the finest level: where a grid says no `per_level_scale`, it is chosen to end there.
        device: Batch and schedule are a CPU's or a GPU's.
        encoding: "hash", or one that the paper compares with: "none" (coordinates as they are), "frequency" (as in
            NeRF, 8 x 256 network), "dense" (one level of 128 vertices a side, 16 features; in 2D as many entries),
            "dense-multi" (8 levels from 16 to 173 a side, 2 features; in 2D as many entries).
        config: Blocks of an Instant-NGP or tiny-cuda-nn file, as `nrc.load_config` reads them, and `batch_size`.
        grid: `n_levels`, `n_features_per_level`, `log2_hashmap_size` of the hash grid, over all others.
        log2_hashmap_size: Default of the table's size, where the task knows better than this module.
        batch_size: Rows of a step, over all others.

    Raises:
        ValueError: An unknown encoding, key or value.
    """
    defaults, config, grid = _TASKS[task], config or {}, grid or {}
    one_of(encoding, ENCODINGS, "encoding")
    if encoding != "hash" and "encoding" in config:
        raise ValueError(f"--encoding {encoding} and the configuration's own encoding contradict each other")
    if grid and (encoding != "hash" or not set(grid) <= set(GRID_KEYS)):
        raise ValueError(f"only {', '.join(GRID_KEYS)} of a hash grid can be set, got {', '.join(grid)} of {encoding}")
    table = log2_hashmap_size or defaults.log2_hashmap_size
    blocks: dict[str, Any] = {
        "encoding": _encoding(encoding, n_input_dims, table),
        "network": _network(encoding, task, defaults),
        "loss": {"otype": defaults.loss},
        "optimizer": _optimizer(defaults, device, encoding),
        "dir_encoding": {"otype": "SphericalHarmonics", "degree": 4} if task == "nerf" else None,
        "rgb_network": _layers("FullyFusedMLP", 64, 2) if task == "nerf" else None,
    }
    for name in set(blocks) & set(config):
        if not isinstance(config[name], Mapping):
            raise ValueError(f"{name} must be a JSON object, got {config[name]!r}")
        blocks[name] = deepcopy(dict(config[name]))
    blocks["encoding"] |= grid
    parse_encoding(blocks["encoding"], n_input_dims, 0)  # before anything is computed from it
    _end_at(blocks["encoding"], finest)
    if batch_size is None:
        batch_size = config.get("batch_size", defaults.batch_size_cpu if device.is_cpu else defaults.batch_size)
    check_batch_size(batch_size)
    return FitConfig(**blocks, batch_size=batch_size)


def check_batch_size(batch_size: Any) -> None:
    """Raise ValueError unless `batch_size` is a positive whole number."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive whole number, got {batch_size!r}")


def ignored_blocks(config: Mapping[str, Any]) -> list[str]:
    """Blocks of a configuration file that no fit reads, such as Instant-NGP's `envmap` and `distortion_map`."""
    return [name for name in config if name not in KNOWN_BLOCKS]


def _encoding(name: str, n_dims: int, log2_hashmap_size: int) -> dict[str, Any]:
    """The encodings of table 2 of Müller et al. 2022, at equal numbers of entries in two and three dimensions."""
    per_side = 3 / n_dims  # entries per side, as a power of the paper's
    if name == "none":
        return {"otype": "Identity"}
    if name == "frequency":
        return {"otype": "Frequency", "n_frequencies": 10}
    if name == "dense":  # two tables of 8 features at one resolution make 16
        side = round(128**per_side)
        return _grid("DenseGrid", n_levels=2, n_features_per_level=8, base_resolution=side, per_level_scale=1.0)
    if name == "dense-multi":
        coarse, fine = 16**per_side, 173**per_side
        scale = (fine / coarse) ** (1 / 7)
        return _grid(
            "DenseGrid", n_levels=8, n_features_per_level=2, base_resolution=round(coarse), per_level_scale=scale
        )
    return _grid(
        "HashGrid",
        n_levels=16,
        n_features_per_level=2,
        log2_hashmap_size=log2_hashmap_size,
        base_resolution=BASE_RESOLUTION,
    )


def _grid(otype: str, **options: Any) -> dict[str, Any]:
    return {"otype": otype, **options}


def _layers(otype: str, n_neurons: int, n_hidden_layers: int) -> dict[str, Any]:
    return {"otype": otype, "n_neurons": n_neurons, "n_hidden_layers": n_hidden_layers}


def _network(encoding: str, task: str, defaults: _Defaults) -> dict[str, Any]:
    if encoding in ("none", "frequency"):  # NeRF's: Mildenhall et al. 2020
        return _layers("MLP", 256, 8)
    return _layers("FullyFusedMLP", 64, defaults.n_hidden_layers)


def _optimizer(defaults: _Defaults, device: wp.Device, encoding: str) -> dict[str, Any]:
    start, interval = defaults.decay_cpu if device.is_cpu else defaults.decay
    rate = defaults.learning_rate
    if device.is_cpu and defaults.learning_rate_cpu is not None:
        rate = defaults.learning_rate_cpu
    if encoding in ("none", "frequency"):  # deep networks alone want less
        rate = min(rate, 1e-3)
    adam = {"otype": "Adam", "learning_rate": rate, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 1e-6}
    decay = {
        "otype": "ExponentialDecay",
        "decay_start": start,
        "decay_interval": interval,
        "decay_base": 0.33,
        "nested": adam,
    }
    return decay if defaults.ema is None else {"otype": "Ema", "decay": defaults.ema, "nested": decay}


def _end_at(encoding: dict[str, Any], finest: float) -> None:
    """Let a grid that says no `per_level_scale` end at resolution `finest`, in place."""
    if "grid" not in str(encoding.get("otype", "")).lower() or "per_level_scale" in encoding:
        return
    n_levels = encoding.get("n_levels", 16)
    for alias in ("n_features", "n_grid_features"):  # of all levels together
        if alias in encoding:
            n_levels = encoding[alias] // encoding.get("n_features_per_level", 2)
    base = encoding.get("base_resolution", BASE_RESOLUTION)
    if n_levels > 1 and base > 0:  # the grid itself refuses others
        encoding["per_level_scale"] = math.exp(math.log(max(finest, base) / base) / (n_levels - 1))
