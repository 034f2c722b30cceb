"""`Records`: surface points that a cache is asked about or trained with; `TrainingPaths`: where these arise."""

from __future__ import annotations

from typing import Any

import numpy as np
import warp as wp

from nrc.arrays import describe, in_place, read_in_place
from nrc.kernels import records as kr
from nrc.kernels.paths import TrainingTiles
from nrc.kernels.records import RecordView
from nrc.launch import launch, resolve_device
from nrc.scan import ExclusiveScan

FIELDS = {
    "position": wp.vec3,
    "wo": wp.vec3,
    "normal": wp.vec3,
    "roughness": wp.float32,
    "diffuse": wp.vec3,
    "specular": wp.vec3,
}
UNIT_TOLERANCE = 1e-2  # of the lengths that `Records.check` accepts
DOES_NOT_FACE = -1e-3  # cosine between normal and wo


class Records:
    """Room for `capacity` records on `device`, structure of arrays; `arrays` are used as they are, the others are made.

    `Records.of` is for arrays that exist already. Either reads and writes nothing itself: fill the arrays in place, as
    often as you like; every call that takes the records sees what they hold then.

    Raises TypeError for an unknown field, ValueError for an array of another shape, type, layout or device.

    Attributes:
        position: (capacity,) vec3, world space [scene units].
        wo: (capacity,) vec3, unit, towards the previous vertex.
        normal: (capacity,) vec3, unit shading normal on wo's side.
        roughness: (capacity,) float, perceptual, 0...1.
        diffuse, specular: (capacity,) vec3, albedos.
        view: The same arrays as the struct that kernels take.
    """

    position: wp.array
    wo: wp.array
    normal: wp.array
    roughness: wp.array
    diffuse: wp.array
    specular: wp.array

    def __init__(self, capacity: int, device: Any = None, **arrays: Any) -> None:
        unknown = sorted(arrays.keys() - FIELDS.keys())
        if unknown:
            raise TypeError(f"unknown record fields {', '.join(unknown)}; a record has {', '.join(FIELDS)}")
        self.capacity = capacity
        self.device = resolve_device(device)
        self.view = RecordView()
        for name, dtype in FIELDS.items():
            if name in arrays:
                array = in_place(name, arrays[name], dtype, capacity, self.device)
            else:
                array = wp.zeros(capacity, dtype=dtype, device=self.device)
            setattr(self, name, array)
            setattr(self.view, name, array)

    @classmethod
    def of(
        cls, *, position: Any, wo: Any, normal: Any, roughness: Any, diffuse: Any, specular: Any, device: Any = None
    ) -> Records:
        """Records in arrays of any library: Warp, torch, CuPy, DrJit, JAX (DLPack or CUDA array interface), NumPy.

        Nothing is copied, so the arrays may be filled anew before every call. They must be float32, (n, 3) with the
        three components side by side (rows may lie apart) or (n,) vec3, `roughness` (n,), all on one device.

        Args:
            position: World space [scene units].
            wo: Unit, from the point towards where the path came from.
            normal: Unit shading normal on wo's side.
            roughness: Perceptual, 0...1: alpha is its square.
            diffuse: Diffuse albedo.
            specular: Reflectance at normal incidence (F0).
            device: Where they lie; by default where `position` lies.

        Raises:
            ValueError: An array of another shape, type, layout or device, by name and with what it is.
        """
        wp.init()  # DLPack arrays may be the first that Warp sees
        first = read_in_place("position", position)
        arrays = {"position": position, "wo": wo, "normal": normal, "roughness": roughness}
        arrays |= {"diffuse": diffuse, "specular": specular}
        if first.ndim != 2 or first.shape[1] != 3:
            raise ValueError(f"position: expected (rows, 3) float32 or (rows,) vec3, got {describe(first)}")
        n = first.shape[0]
        return cls(n, first.device if device is None else device, **arrays)

    def check(self, count: int | None = None, bounds: tuple[np.ndarray, np.ndarray] | None = None) -> list[str]:
        """What is wrong with the first `count` records, one line per kind; empty where nothing is.

        For finding a mistake, not for frames: reads everything back. A record that fails still gets an answer, but a
        direction of another length is encoded with a wrong polar angle, and a point outside the bounds as one on them.

        Args:
            count: Records to look at, a number; all by default.
            bounds: The cache's, to look for points outside.

        Raises:
            ValueError: More records than there are, or bounds that are not two finite corners in order.
        """
        n = self.capacity if count is None else count
        if not isinstance(n, int | np.integer) or not 0 <= n <= self.capacity:
            raise ValueError(f"count must be a number from 0 to {self.capacity}, the capacity, got {count!r}")
        if bounds is not None:
            bounds = _corners(bounds)
        values = {name: getattr(self, name).numpy()[:n].reshape(n, -1) for name in FIELDS}
        finite = np.all([np.isfinite(v).all(axis=1) for v in values.values()], axis=0)
        values = {name: v.astype(np.float64) for name, v in values.items()}
        wrong = {"are not finite": ~finite}
        for name in ("wo", "normal"):
            length = np.linalg.norm(values[name], axis=1)
            wrong[f"have a {name} that is not of length 1"] = ~(np.abs(length - 1.0) < UNIT_TOLERANCE)
        cosine = np.sum(values["wo"] * values["normal"], axis=1)
        wrong["have a normal on the other side of wo"] = cosine < DOES_NOT_FACE
        roughness = values["roughness"][:, 0]
        wrong["have a roughness outside [0, 1]"] = (roughness < 0.0) | (roughness > 1.0)
        for name in ("diffuse", "specular"):
            wrong[f"have a {name} albedo outside [0, 1]"] = ((values[name] < 0.0) | (values[name] > 1.0)).any(axis=1)
        black = (values["diffuse"] + values["specular"]).max(axis=1, initial=0.0) <= 0.0
        wrong["reflect nothing (both albedos 0), which the cache answers with 0"] = black
        if bounds is not None:
            outside = (values["position"] < bounds[0]) | (values["position"] > bounds[1])
            wrong["lie outside the bounds"] = outside.any(axis=1)
        wrong = {text: flags if text == "are not finite" else flags & finite for text, flags in wrong.items()}
        return [f"{flags.sum()} of {n} records {text}" for text, flags in wrong.items() if flags.any()]


class TrainingPaths:
    """What a frame's training paths leave behind, and the records and targets that become of it.

    A kernel fills `view`; `RadianceCache.train_paths` does the rest::

        paths.clear()
        launch_your_kernel(paths.view)
        cache.train_paths(paths)

    Args:
        n_paths: Most training paths of a frame.
        max_records: Records per path.
        device: Warp device.

    Attributes:
        view: `TrainingView` for kernels: slot i has the places i * max_records ... of `view.records`.
        tails, n_tails: Records at the ends of suffixes after `compact_tails`, and their number (device, (1,) int).
        records, targets, n_records: Records and targets after `gather_targets`, and their number.
        vertex_index, record_slot: Of each of those: which record of its path it is, from 0, and of which path.
    """

    def __init__(self, n_paths: int, max_records: int, device: Any = None) -> None:
        self.n_paths, self.max_records, self.device = n_paths, max_records, resolve_device(device)
        device, n_staged = self.device, n_paths * max_records
        self.staged_records, self.staged_tails = Records(n_staged, device), Records(n_paths, device)
        self.view: Any = kr.TrainingView()
        self.view.max_records = max_records
        self.view.records, self.view.tail = self.staged_records.view, self.staged_tails.view
        self.view.offset = wp.zeros(n_staged, dtype=wp.vec3, device=device)
        self.view.factor = wp.zeros(n_staged, dtype=wp.vec3, device=device)
        self.view.count = wp.zeros(n_paths, dtype=int, device=device)
        self.view.has_tail = wp.zeros(n_paths, dtype=int, device=device)
        self._scan = ExclusiveScan(n_paths, device)
        self._record_place = wp.zeros(n_paths, dtype=int, device=device)
        self._tail_place = wp.zeros(n_paths, dtype=int, device=device)
        self.tails, self.n_tails = Records(n_paths, device), wp.zeros(1, dtype=int, device=device)
        self.records, self.n_records = Records(n_staged, device), wp.zeros(1, dtype=int, device=device)
        self.targets = wp.zeros(n_staged, dtype=wp.vec3, device=device)
        self.vertex_index = wp.zeros(n_staged, dtype=int, device=device)
        self.record_slot = wp.zeros(n_staged, dtype=int, device=device)

    def clear(self) -> None:
        """Forget the frame before: no slot has records. Call it before the kernel."""
        self.view.count.zero_()
        self.view.has_tail.zero_()

    def compact_tails(self) -> None:
        """Move the tails to the front of `tails`."""
        compact(self.staged_tails, self.view.has_tail, self._tail_place, self._scan, self.tails, self.n_tails)

    def gather_targets(self, tail_radiance: wp.array, n_paths: int | None = None) -> None:
        """Complete the frame's `records` and `targets`.

        Args:
            tail_radiance: (tails, 3) float, the cache's answer for `tails`.
            n_paths: Slots in use; all by default.
        """
        self._scan(self.n_paths, self.view.count, self._record_place, self.n_records)
        launch(
            kr.gather_targets,
            self.n_paths if n_paths is None else n_paths,
            inputs=[self.view, self._record_place, self._tail_place, tail_radiance],
            outputs=[self.records.view, self.targets, self.vertex_index, self.record_slot],
            device=self.device,
        )


def _corners(bounds: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner, (3,) each. Raises ValueError for anything else."""
    try:
        lower, upper = (np.asarray(corner, float) for corner in bounds)
    except (TypeError, ValueError):
        lower = upper = np.empty(0)
    if lower.shape != (3,) or upper.shape != (3,) or not np.isfinite([lower, upper]).all() or np.any(lower > upper):
        raise ValueError(f"bounds must be two finite corners of 3 numbers, the lower one first, got {bounds!r}")
    return lower, upper


def compact(
    source: Records, flags: wp.array, places: wp.array, scan: ExclusiveScan, target: Records, total: wp.array
) -> None:
    """Move the records whose flag is 1 to the front of `target`, in order.

    Args:
        flags: (source.capacity,) int, 0 or 1.
        places: (source.capacity,) int, becomes where each record went.
        scan: For as many values.
        total: (1,) int, becomes their number.
    """
    scan(source.capacity, flags, places, total)
    launch(
        kr.compact_records,
        source.capacity,
        inputs=[source.view, places, flags],
        outputs=[target.view],
        device=source.device,
    )


def training_tiles(width: int, height: int, n_paths: int, frame: int, seed: int = 0) -> TrainingTiles:
    """Nearly square tiles, at most `n_paths`, that cover a picture [px], and the pixel of each that trains in `frame`.

    A struct for kernels: see `training_slot` in `nrc.kernels.paths`. Slots are below `n_paths`; with 0 nothing trains.
    """
    tiles: Any = TrainingTiles()
    if n_paths == 0:
        return tiles
    tiles.width, tiles.height = tile_size(width, height, n_paths)
    tiles.columns = -(-width // tiles.width)
    place_tiles(tiles, frame, seed)
    return tiles


def place_tiles(tiles: Any, frame: int, seed: int = 0) -> None:
    """Choose the pixel of each tile that trains in `frame`."""
    offset = np.random.default_rng((seed, frame)).integers(0, (tiles.width, tiles.height))
    tiles.offset_x, tiles.offset_y = int(offset[0]), int(offset[1])


def tile_size(width: int, height: int, n_tiles: int) -> tuple[int, int]:
    """Width and height [px] of nearly square tiles of which at most `n_tiles` cover a picture."""
    candidates = []
    for tile_height in range(1, height + 1):
        rows = -(-height // tile_height)
        columns = n_tiles // rows
        if columns >= 1:
            tile_width = -(-width // columns)
            n = rows * -(-width // tile_width)
            aspect = max(tile_width, tile_height) / min(tile_width, tile_height)
            candidates.append((aspect, -n, tile_width, tile_height))
    # Of nearly square tiles the ones that use the budget best.
    square = [c for c in candidates if c[0] <= 2.0] or [min(candidates)]
    return min(square, key=lambda c: (c[1], c[0]))[2:]
