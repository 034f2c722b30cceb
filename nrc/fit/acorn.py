"""`AcornTask`: fits an image with an adaptive block-coordinate network, as a measured row beside the hash grid.

After Martel et al. 2021, "ACORN: Adaptive Coordinate Networks for Neural Scene Representation": a quadtree over the
image has a fixed budget of blocks. An encoder network turns a block's centre and level into a grid of features, a point
interpolates its block's grid, a small decoder makes the colour. Every so many steps blocks of large error are split and
quiet ones merged. The paper solves an integer program for that; here the choice is greedy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import warp as wp

from nrc.config import parse_optimizer, parse_options
from nrc.field import Field, Network
from nrc.fit.fitted_image import FittedImage, checked_entry, measure
from nrc.fit.image import ImageTask
from nrc.fit.job import TASK_STEPS, steps_of
from nrc.fit.pixels import PixelSource
from nrc.fit.settings import FitConfig, check_batch_size
from nrc.kernels import acorn as kernels
from nrc.launch import heavy_range, launch, resolve_device
from nrc.optimizer import Optimizer, restore
from nrc.snapshot import SnapshotError, check_finite, load_tensors, save_tensors, take_tensor

SNAPSHOT_KIND = "nrc.acorn"
ENCODING = {  # settings and defaults
    "max_blocks": 512,
    "grid_resolution": 16,  # cells of a block along each side; even
    "n_neurons": 128,  # of the encoder, like the next two
    "n_hidden_layers": 4,
    "n_frequencies": 10,
    "points_per_side": 16,  # a step reads the square of this many points of a block
    "refine_every": 50,  # steps
}
NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 64, "n_hidden_layers": 2}  # the decoder
OPTIMIZER = {
    "otype": "ExponentialDecay",
    "decay_start": 2000,
    "decay_interval": 4000,
    "decay_base": 0.33,
    "nested": {"otype": "Adam", "learning_rate": 3e-3, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 0.0},
}
BATCH_SIZE, BATCH_SIZE_CPU = 1 << 17, 1 << 15
ERROR_FACTOR = 4.0  # by which a split is taken to divide a block's error, and a merge to multiply that of the four


class Quadtree:
    """Square blocks that cover a rectangle: leaves of trees whose roots stand side by side.

    Args:
        width, height: Of the rectangle [px].
        max_blocks: Budget.
        smallest: Side of the smallest allowed block [px].

    Attributes:
        blocks: (n, 3) int: level, column, row, sorted by Morton code.
        depth: Deepest level.
        root: Side of a level-0 block, as a share of the longer side.
    """

    def __init__(self, width: int, height: int, *, max_blocks: int, smallest: int) -> None:
        longer, shorter = max(width, height), min(width, height)
        # As many roots along the shorter side as leave the least outside
        n_short = min(range(1, 5), key=lambda n: (math.ceil(n * longer / shorter) / n, n))
        n_long = math.ceil(n_short * longer / shorter)
        if n_short * n_long > max_blocks:
            raise ValueError(f"max_blocks must be at least {n_short * n_long} for {width}x{height} pixels")
        self.root = shorter / (n_short * longer)
        self.shape = (n_long, n_short) if width >= height else (n_short, n_long)
        self.max_blocks = max_blocks
        self.depth = max(0, min(10, int(math.log2(max(1.0, longer * self.root / smallest)))))
        columns, rows = np.meshgrid(np.arange(self.shape[0]), np.arange(self.shape[1]))
        self.blocks = self._sorted(np.stack([0 * columns, columns, rows], axis=-1).reshape(-1, 3))
        while len(self.blocks) * 4 <= max_blocks // 4 and self.blocks[0, 0] < self.depth:  # all alike at first
            self._replace(np.arange(len(self.blocks)), [])

    def corners(self) -> np.ndarray:
        """(n, 3) float64: x and y of each block's corner and its side, in units of the longer side."""
        sides = self.root / 2.0 ** self.blocks[:, 0]
        return np.stack([self.blocks[:, 1] * sides, self.blocks[:, 2] * sides, sides], axis=1)

    def positions(self) -> np.ndarray:
        """(n, 3) float32 in [0, 1]: what the encoder reads of a block, its centre and level."""
        corners = self.corners()
        level = self.blocks[:, :1] / max(1, self.depth)
        return np.concatenate([corners[:, :2] + 0.5 * corners[:, 2:], level], axis=1).astype(np.float32)

    def keys(self) -> np.ndarray:
        """(n,) Morton code of the first of the finest blocks that each block covers: sorted, a binary search's keys."""
        return self._keys(self.blocks)

    def refine(self, errors: np.ndarray) -> int:
        """Split the blocks of largest error as far as the budget allows, merging fours of little error to make room.

        Args:
            errors: (n,) of each block, summed over its area.

        Returns:
            Number of splits. The same errors give the same blocks.
        """
        parents: dict[tuple[int, ...], list[int]] = {}
        for i, (level, column, row) in enumerate(self.blocks.tolist()):
            if level > 0:
                parents.setdefault((level, column // 2, row // 2), []).append(i)
        merges = sorted((float(errors[four].sum()), four) for four in parents.values() if len(four) == 4)
        split: list[int] = []
        merged: list[list[int]] = []
        for i in np.argsort(-errors, kind="stable"):
            if errors[i] <= 0.0:
                break
            if self.blocks[i, 0] == self.depth:
                continue
            if len(self.blocks) + 3 * (len(split) - len(merged) + 1) > self.max_blocks:
                # A group with a block that has been split sums to more than this block's error
                if len(merged) == len(merges) or ERROR_FACTOR * merges[len(merged)][0] >= errors[i]:
                    break
                merged.append(merges[len(merged)][1])
            split.append(int(i))
        self._replace(np.array(split, int), merged)
        return len(split)

    def set_blocks(self, blocks: np.ndarray) -> None:
        """Take these blocks (n, 3) instead. Raises ValueError unless they are sorted, in budget and cover all once."""
        ok = blocks.ndim == 2 and blocks.shape[1] == 3 and 0 < len(blocks) <= self.max_blocks and (blocks >= 0).all()
        ok = ok and (blocks[:, 0] <= self.depth).all()
        if ok:
            areas, keys = 1 << 2 * (self.depth - blocks[:, 0]), self._keys(blocks)
            inside = (blocks[:, 1:] < np.array(self.shape) << blocks[:, :1]).all()
            ok = inside and areas.sum() == self.shape[0] * self.shape[1] << 2 * self.depth
            ok = ok and (keys[:-1] + areas[:-1] <= keys[1:]).all()
        if not ok:
            raise ValueError("blocks do not partition the image")
        self.blocks = blocks

    def _replace(self, split: np.ndarray, merged: list[list[int]]) -> None:
        gone = np.concatenate([split, *(np.array(four) for four in merged)]).astype(int)
        level, column, row = self.blocks[split].T
        children = [np.stack([level + 1, 2 * column + i % 2, 2 * row + i // 2], axis=1) for i in range(4)]
        parents = [self.blocks[four[:1]] // [[1, 2, 2]] - [[1, 0, 0]] for four in merged]
        kept = np.delete(self.blocks, gone, axis=0)
        self.blocks = self._sorted(np.concatenate([kept, *children, *parents]))

    def _sorted(self, blocks: np.ndarray) -> np.ndarray:
        return blocks[np.argsort(self._keys(blocks))]

    def _keys(self, blocks: np.ndarray) -> np.ndarray:
        columns, rows = (blocks[:, axis] << (self.depth - blocks[:, 0]) for axis in (1, 2))
        bits = np.arange(15)
        spread = [((values[:, None] >> bits & 1) << 2 * bits).sum(axis=1) for values in (columns, rows)]
        return spread[0] | spread[1] << 1


class AcornModel:
    """Encoder, its last layer and decoder, with their optimizers.

    Args:
        tree: Blocks of the image; `set_tree` takes over its changes.
        n_output_dims: Colours.
        config: `encoding` with the keys of ENCODING, the decoder's `network`, `optimizer` and `batch_size`.

    Attributes:
        n_rows, n_points: Blocks of a batch, and points of each.
    """

    def __init__(self, tree: Quadtree, n_output_dims: int, config: FitConfig, seed: int, device: wp.Device) -> None:
        self.device, self.n_output_dims = device, n_output_dims
        settings = config.encoding
        self.resolution, n_hidden = settings["grid_resolution"], settings["n_neurons"]
        self.n_points = settings["points_per_side"] ** 2
        self.n_rows = n_rows = max(1, config.batch_size // self.n_points)
        self.n_chunks = self.resolution**2 // kernels.CELLS
        hidden = {"otype": "MLP", "n_neurons": n_hidden, "n_hidden_layers": settings["n_hidden_layers"] - 1}
        frequency = {"otype": "Frequency", "n_frequencies": settings["n_frequencies"]}
        self.encoder = Field(3, n_hidden, frequency, hidden | {"output_activation": "ReLU"}, seed, device)
        self.decoder = Network(kernels.N_FEATURES, n_output_dims, config.network, seed + 1, device)
        self.encoder_optimizer = Optimizer(self.encoder, config.optimizer, batch_size=n_rows)
        self.optimizer = Optimizer(self.decoder, config.optimizer, batch_size=n_rows * self.n_points)
        self.weights, self._weights = self._chunks(self.n_chunks, n_hidden)
        self.m, self._m = self._chunks(self.n_chunks, n_hidden)
        self.v, self._v = self._chunks(self.n_chunks, n_hidden)
        bound = math.sqrt(6.0 / (n_hidden + kernels.N_FEATURES * self.resolution**2))
        initial = np.random.default_rng([seed, 2]).uniform(-bound, bound, self.weights.numpy().shape)
        self.weights.assign(initial.astype(np.float32))
        n_expansion = n_hidden * self.resolution**2 * kernels.N_FEATURES
        self.n_params = self.encoder.n_params + n_expansion + self.decoder.n_params

        self._grids, self._chunk_grids = self._chunks(n_rows, self.n_chunks)
        self._dL_dgrids, self._dL_dchunks = self._chunks(n_rows, self.n_chunks)
        self._hidden, self._dL_dhidden = (self._zeros(n_rows, n_hidden) for _ in range(2))
        self._features, self._dL_dfeatures = (self._zeros(n_rows * self.n_points, kernels.N_FEATURES) for _ in range(2))
        self._dL_dcells = self._view(self._dL_dfeatures, kernels.Cell, n_rows * self.n_points)
        self._all_hidden = self._zeros(tree.max_blocks, n_hidden)
        self._all_grids, self._all_chunks = self._chunks(tree.max_blocks, self.n_chunks)
        self._read_features = self._zeros(0, kernels.N_FEATURES)
        self._is_stale = True  # the grids of all blocks
        self.set_tree(tree)

    def set_tree(self, tree: Quadtree) -> None:
        """Use the tree's blocks from now on."""
        self.n_blocks, self.finest = len(tree.blocks), tree.root / 2.0**tree.depth
        self.shape = tuple(n << tree.depth for n in tree.shape)
        self._corners: Any = wp.array(tree.corners().astype(np.float32), dtype=float, device=self.device)
        self._keys: Any = wp.array(tree.keys().astype(np.int32), dtype=int, device=self.device)
        self._positions: Any = wp.array(tree.positions(), dtype=float, device=self.device)
        self._is_stale = True

    def inference(self, x: wp.array, out: wp.array | None = None, *, params: Any = None) -> wp.array:
        """Colours at points x (n, 2) of the image in units of its longer side. There are no `params` but its own."""
        if self._is_stale:
            self._expand(self._positions, self._all_hidden, self._all_chunks)
            self._is_stale = False
        n = x.shape[0]
        if self._read_features.shape[0] < n:
            self._read_features = self._zeros(n, kernels.N_FEATURES)
        features = self._read_features[:n]
        blocks = [self.n_blocks, self._keys, self._corners, self._all_grids]
        inputs = [self.resolution, *self.shape, self.finest, *blocks, x]
        self._launch(kernels.interpolate_anywhere, n, inputs, [features])
        return self.decoder.inference(features, out)

    def step(self, positions: wp.array, local: wp.array, target: wp.array) -> wp.array:
        """Take one step on the mean squared error of points of a batch's blocks.

        Args:
            positions: (n_rows, 3) of the blocks, for the encoder.
            local: (n_rows n_points, 2) in their blocks, [0, 1].
            target: (n_rows n_points, n_output_dims).

        Returns:
            The loss, one float32 on the device, overwritten by the next step.
        """
        n_rows, decoder, features, adam = self.n_rows, self.decoder, self._features, self.optimizer.config
        n_hidden = self._hidden.shape[1]
        self._expand(positions, self._hidden, self._chunk_grids)
        inputs = [self.resolution, self.n_points, self._grids, local]
        self._launch(kernels.interpolate_points, local.shape[0], inputs, [features])
        gradients = decoder.passes.backpropagate(
            decoder.params, features, target, None, loss="L2", pdf=None, input_gradient=True
        )
        self._dL_dfeatures.zero_()
        decoder.add_input_gradient(gradients, features, None, self._dL_dfeatures)
        loss = self.optimizer.apply(gradients, features, features.shape[0], None)
        inputs = [self.resolution, self.n_points, local, self._dL_dcells]
        self._launch(kernels.interpolate_points_backward, n_rows, inputs, [self._dL_dgrids])
        inputs = [n_rows, self.weights, self._dL_dgrids]
        self._launch(kernels.expand_backward, n_hidden // 4 * n_rows, inputs, [self._dL_dhidden])
        schedule = [self.optimizer.learning_rate, self.optimizer.state_arrays()["counters"], self.optimizer.n_steps]
        inputs = [adam.beta1, adam.beta2, adam.epsilon, *schedule, n_rows, self._hidden, self._dL_dchunks]
        outputs = [self._weights, self._m, self._v]
        self._launch(kernels.update_expansion, self.n_chunks * n_hidden, inputs, outputs)
        self.encoder_optimizer.step(positions, self._dL_dhidden)
        self._is_stale = True
        return loss

    def arrays(self) -> dict[str, wp.array]:
        """All that training changes, by name."""
        named: dict[str, wp.array] = {"expansion.weights": self.weights, "expansion.m": self.m, "expansion.v": self.v}
        for name, optimizer in (("encoder", self.encoder_optimizer), ("decoder", self.optimizer)):
            named |= {f"{name}.{key}": array for key, array in optimizer.state_arrays().items()}
        return named

    def _expand(self, positions: wp.array, hidden: wp.array, chunks: wp.array) -> None:
        self.encoder.inference(positions, hidden)
        n_rows = positions.shape[0]
        self._launch(kernels.expand, self.n_chunks * n_rows, [n_rows, self._weights, hidden], [chunks])

    def _launch(self, kernel: wp.Kernel, n: int, inputs: list[Any], outputs: list[Any]) -> None:
        launch(kernel, n, inputs=inputs, outputs=outputs, device=self.device, range_size=heavy_range(n))

    def _zeros(self, *shape: int) -> wp.array:
        return wp.zeros(shape, dtype=float, device=self.device)

    def _chunks(self, n_rows: int, n_columns: int) -> tuple[Any, Any]:
        """Zeros (n_rows, n_columns + 1) of cells and of chunks over the same memory.

        The unused column keeps rows of 2^n bytes from competing for the same lines of a cache.
        """
        cells = wp.zeros((n_rows, n_columns + 1, kernels.CELLS), dtype=kernels.Cell, device=self.device)
        return cells, self._view(cells, kernels.Chunk, (n_rows, n_columns + 1))

    def _view(self, array: wp.array, dtype: Any, shape: Any) -> wp.array:
        view: Any = wp.array(ptr=array.ptr, dtype=dtype, shape=shape, device=self.device)
        view._ref = array  # whose memory must outlive the view
        return view


class AcornTask(ImageTask):
    """`ImageTask` with an `AcornModel`: the same pixels, values and measures.

    A step draws `batch_size / points_per_side^2` blocks, all alike, and one pixel from each part of them.

    Args:
        source, seed, device, batch_size, scratch: As of `ImageTask`.
        config: `encoding` with keys of ENCODING, `network` (the decoder), `optimizer`: over the defaults.
    """

    kind = "acorn"

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        seed: int = 1337,
        device: Any = None,
        config: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.config = acorn_config(self.device, config, batch_size)
        self.source = PixelSource(source, scratch=scratch)
        self.warnings = tuple(self.source.warnings)
        self.seed, self.n_steps = seed, 0
        width, height = self.source.width, self.source.height
        self.tree, self.model = _make_model(width, height, self.source.n_channels, self.config, seed, self.device)
        self.field = cast(Any, self.model)  # `inference` is all that `ImageTask` needs of it
        self.n_params = self.model.n_params
        self.samples_per_step = self.model.n_rows * self.model.n_points
        self._fitted = FittedImage(self.field, width, height, self.source.pixels.dtype.name)
        self._probe_x, self._probe_y = self._draw_probe()
        self._snapshot_bytes = 4 * self.n_params
        n = self.samples_per_step
        self._positions = wp.empty((self.model.n_rows, 3), dtype=float, device=self.device)
        self._local = wp.empty((n, 2), dtype=float, device=self.device)
        self._target = wp.empty((n, self.source.n_channels), dtype=float, device=self.device)

    def step(self) -> wp.array:
        """Take one step, refining the tree before it when that is due."""
        if self.n_steps and self.n_steps % self.config.encoding["refine_every"] == 0:
            self.tree.refine(self.block_errors())
            self.model.set_tree(self.tree)
        rng = np.random.default_rng([self.seed, self.n_steps])
        n, n_blocks = self.model.n_rows, len(self.tree.blocks)
        chosen = np.minimum((np.arange(n) + rng.random(n)) / n * n_blocks, n_blocks - 1).astype(int)
        _, local, target = self._draw_pixels(rng, chosen)
        self._positions.assign(self.tree.positions()[chosen])
        self._local.assign(local)
        self._target.assign(target)
        self.n_steps += 1
        return self.model.step(self._positions, self._local, self._target)

    def block_errors(self) -> np.ndarray:
        """(n,) squared error of each block, estimated from as many of its pixels as a step reads, times its area."""
        n, size = len(self.tree.blocks), self._size
        rng = np.random.default_rng([self.seed, self.n_steps, 1])
        x, _, target = self._draw_pixels(rng, np.arange(n))
        on_device: Any = wp.array(x.astype(np.float32), dtype=float, device=self.device)
        error = np.square(self.model.inference(on_device).numpy() - target).reshape(n, -1).mean(axis=1)
        corners = self.tree.corners() * size.max()
        extent = np.clip(np.minimum(corners[:, :2] + corners[:, 2:], size) - corners[:, :2], 0.0, None)
        return error * extent.prod(axis=1)

    @property
    def _size(self) -> np.ndarray:
        return np.array([self.source.width, self.source.height])

    def _draw_pixels(self, rng: np.random.Generator, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A pixel from each part of the chosen blocks: position in the image, in the block, encoded value."""
        side, size = self.config.encoding["points_per_side"], self._size
        corners = self.tree.corners()[chosen, None] * size.max()  # [px]
        begin, extent = corners[..., :2], corners[..., 2:]
        parts = np.stack(np.divmod(np.arange(side * side), side)[::-1], axis=1)
        place = begin + extent * ((parts + rng.random((len(chosen), side * side, 2))) / side)
        first, last = np.ceil(begin - 0.5), np.ceil(begin + extent - 0.5) - 1.0  # whose centres are inside
        pixel = np.clip(np.clip(np.floor(place), first, last), 0, size - 1)
        local = (pixel + 0.5 - begin) / extent
        i = pixel.reshape(-1, 2).astype(np.intp)
        values = self.source.pixels[i[:, 1], i[:, 0], : self.source.n_channels].astype(np.float32)
        if not self.source.linear:
            values /= np.iinfo(self.source.pixels.dtype).max
        return (i + 0.5) / size.max(), local.reshape(-1, 2).astype(np.float32), values

    def _inference_params(self) -> Any:
        return None  # there is no average

    def state(self) -> dict[str, np.ndarray]:
        """All that training changes, by name."""
        tensors = {name: array.numpy() for name, array in self.model.arrays().items()}
        return tensors | {"blocks": self.tree.blocks, TASK_STEPS: np.array([self.n_steps], np.int64)}

    def load_state(self, path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` gave and the file `path` held. Raises SnapshotError."""
        n_steps = steps_of(path, state)
        _load_blocks(path, state, self.tree)
        restore(path, state, self.model.arrays())
        self.model.set_tree(self.tree)
        self.n_steps = n_steps

    def save(self, path: str | os.PathLike[str], training: Mapping[str, Any]) -> None:
        """Write the snapshot: blocks, weights and what they show; `training` says what is behind it."""
        arrays = self.model.arrays()
        tensors = {name: arrays[name].numpy() for name in WEIGHTS} | {"blocks": self.tree.blocks}
        for name in WEIGHTS:
            check_finite(path, name, tensors[name])
        fit = {
            "kind": self.kind,
            "source": str(self.source.path.resolve()),
            "width": self.source.width,
            "height": self.source.height,
            "n_channels": self.source.n_channels,
            "dtype": self._fitted.dtype.name,
            "config": self.config.as_dict(),
        }
        save_tensors(path, tensors, {"fit": fit | dict(training)}, kind=SNAPSHOT_KIND)
        self._snapshot_bytes = Path(path).stat().st_size

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of training and evaluation by name, for `nrc.launch.prepare`."""
        kernels_of = {"blocks": kernels.expand}
        for name, field in (("encoder", self.model.encoder), ("decoder", self.model.decoder)):
            training = field.passes.training_kernels(None, input_gradient=name == "decoder")
            kernels_of |= {f"{name} {key}": kernel for key, kernel in (field.kernels() | training).items()}
        return kernels_of | self.model.optimizer.kernels() | self.model.encoder_optimizer.kernels()


WEIGHTS = ("encoder.params", "expansion.weights", "decoder.params")  # of a snapshot


def acorn_config(
    device: wp.Device, config: Mapping[str, Any] | None = None, batch_size: int | None = None
) -> FitConfig:
    """Settings of an `AcornTask`: ENCODING, NETWORK and OPTIMIZER under the blocks of `config`. Raises ValueError."""
    config = config or {}
    encoding = parse_options(config.get("encoding", {}), ENCODING, "Acorn encoding")
    for name, value in encoding.items():
        if value < 1:
            raise ValueError(f"Acorn encoding: {name} must be a positive whole number, got {value!r}")
    optimizer = config.get("optimizer", OPTIMIZER)
    parsed = parse_optimizer(optimizer)
    if parsed.otype != "Adam" or parsed.ema_decay is not None:
        raise ValueError("Acorn optimizer: must be Adam, without a moving average")
    if encoding["grid_resolution"] % 2:
        raise ValueError(f"Acorn encoding: grid_resolution must be even, got {encoding['grid_resolution']}")
    if encoding["n_hidden_layers"] < 2:
        raise ValueError("Acorn encoding: n_hidden_layers must be at least 2")
    if batch_size is None:
        batch_size = config.get("batch_size", BATCH_SIZE_CPU if device.is_cpu else BATCH_SIZE)
    check_batch_size(batch_size)
    return FitConfig(
        encoding={"otype": "Acorn", **encoding},
        network=dict(config.get("network", NETWORK)),
        loss={"otype": "L2"},
        optimizer=dict(optimizer),
        batch_size=batch_size,
    )


def evaluate_snapshot(
    path: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None, device: Any = None
) -> dict[str, Any]:
    """Measures of a snapshot, as `AcornTask.evaluate` gives them. Raises SnapshotError, ImageError."""
    tensors, config = load_tensors(path, kind=SNAPSHOT_KIND)
    fit = checked_entry(path, config, "acorn")
    width, height, dtype = (fit[name] for name in ("width", "height", "dtype"))
    run_on = resolve_device(device)
    try:
        tree, model = _make_model(width, height, fit["n_channels"], acorn_config(run_on, fit["config"]), 0, run_on)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SnapshotError(f"{path}: fit: not the snapshot of an ACORN image ({error})") from error
    _load_blocks(path, tensors, tree)
    arrays = model.arrays()
    restore(path, tensors, {name: arrays[name] for name in WEIGHTS})
    model.set_tree(tree)
    pixels = PixelSource(fit["source"] if source is None else source)
    measures = measure(FittedImage(cast(Any, model), width, height, dtype), pixels)
    sizes = {"snapshot_bytes": Path(path).stat().st_size, "source_bytes": pixels.n_bytes}
    return measures | sizes


def _make_model(
    width: int, height: int, n_channels: int, config: FitConfig, seed: int, device: wp.Device
) -> tuple[Quadtree, AcornModel]:
    settings = config.encoding
    tree = Quadtree(width, height, max_blocks=settings["max_blocks"], smallest=settings["grid_resolution"])
    return tree, AcornModel(tree, n_channels, config, seed, device)


def _load_blocks(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], tree: Quadtree) -> None:
    try:
        tree.set_blocks(take_tensor(path, tensors, "blocks").astype(int))
    except ValueError as error:
        raise SnapshotError(f"{path}: {error}") from error
