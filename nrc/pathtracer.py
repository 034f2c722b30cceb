"""`PathTracer`: camera rays to radiance, and the records that a radiance cache consumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import warp as wp

from nrc.device_scene import DeviceScene
from nrc.kernels import records as kr
from nrc.kernels import trace as kt
from nrc.launch import heavy_range, launch
from nrc.records import Records, TrainingPaths, compact, place_tiles, tile_size
from nrc.scan import ExclusiveScan
from nrc.scene import Camera
from nrc.sobol import bit_reversed, sobol_points

Integrator = Literal["path", "nrc", "cache"]
_INTEGRATORS = {"path": kt.INTEGRATOR_PATH, "nrc": kt.INTEGRATOR_NRC, "cache": kt.INTEGRATOR_CACHE}
UNLIMITED_DEPTH = 2**30
SOBOL_BITS = 14  # 2^14 points; later frames use them again with other shifts


@dataclass(frozen=True)
class PathTracerConfig:
    """How paths are traced.

    Attributes:
        integrator: "path" follows every path to its end; "nrc" ends it in the cache where its footprint has spread
            (Müller et al. 2021); "cache" asks the cache at the first vertex that is not a mirror.
        max_depth: Longest path in edges from the camera: 1 shows emitters only, 2 adds direct light; -1 is unlimited.
        rr_depth: Edges after which Russian roulette may end a path.
        spread_threshold: c of the termination test a > c a_0.
        min_spread: Least width sqrt(a) of a path's footprint where it may end in the cache, as a fraction of the box's
            longest side. 0 is the paper's; more keeps contact shadows in close-up views, whose footprints are finer
            than what the cache resolves. See docs/cache.md.
        max_records: Training records per path at most; longer paths go on unrecorded.
        continuation: Probability that a training suffix goes on where its footprint would let it end in the cache. 0 is
            the paper's; more lets light reach rooms that the camera does not see in fewer frames, with less noise than
            more unbiased paths.
        unbiased_fraction: Fraction of training paths that end by Russian roulette alone.
        record_space: "world" gives the cache positions as they are (Müller et al. 2021), "object" where the point was
            when the scene was uploaded first, so that what moves takes along what was learned on it.
        seed: Same seed, same picture.
    """

    integrator: Integrator = "nrc"
    max_depth: int = 16
    rr_depth: int = 5
    spread_threshold: float = 0.01
    min_spread: float = 0.0
    max_records: int = 8
    continuation: float = 0.7
    unbiased_fraction: float = 1.0 / 16.0
    record_space: Literal["world", "object"] = "world"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.integrator not in _INTEGRATORS:
            raise ValueError(f"integrator must be one of {', '.join(_INTEGRATORS)}, got {self.integrator!r}")
        if self.max_depth == 0 or self.max_depth < -1:
            raise ValueError(f"max_depth must be positive, or -1 for unlimited, got {self.max_depth}")
        if self.rr_depth < 1:
            raise ValueError(f"rr_depth must be at least 1, got {self.rr_depth}")
        for name in ("spread_threshold", "min_spread"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in 0...2^31 - 1, got {self.seed}")
        if self.max_records < 1:
            raise ValueError(f"max_records must be at least 1, got {self.max_records}")
        if self.record_space not in ("world", "object"):
            raise ValueError(f"record_space must be 'world' or 'object', got {self.record_space!r}")
        for name in ("continuation", "unbiased_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


class PathTracer:
    """Traces one path per pixel and call.

    Args:
        scene: Uploaded scene.
        width, height: Picture size [px].
        config: How to trace.
        max_training_paths: Most training paths of a frame.
        box: Lower and upper corner of where the cache is defined; the scene's bounds by default. Vertices outside are
            traced on.

    Attributes:
        radiance: (pixels,) vec3, what the last frame's paths found themselves [W m^-2 sr^-1].
        query_vertex: (pixels,) int, at which vertex (from 1) a path ended in the cache, 0 where it did not.
        query_spread: (pixels,) float, area spread of the path there over its primary footprint.
        query_weight: (pixels,) vec3 throughput up to there.
        query_place: (pixels,) int, row of the pixel's record in `queries`.
        queries, n_queries: Records to ask the cache about, and their number (device, (1,) int).
        tile, n_training_paths: Size [px] of the last frame's tiles, and their number; one training path each.
        tails, n_tails: Records at the ends of training suffixes.
        records, targets, vertex_index, record_slot, n_records: Training records after `gather_targets`.
    """

    def __init__(
        self,
        scene: DeviceScene,
        width: int,
        height: int,
        config: PathTracerConfig,
        *,
        max_training_paths: int = 1,
        box: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        if width < 1 or height < 1:
            raise ValueError(f"picture size must be positive, got {width}x{height}")
        self.scene, self.device = scene, scene.device
        self.width, self.height, self.config = width, height, config
        self.camera = scene.camera_view(width, height)
        device = self.device
        with_cache = config.integrator != "path"
        n_pixels = width * height
        self.n_pixels = n_pixels
        self.max_training_paths = max_training_paths if with_cache else 1
        self.radiance = wp.zeros(n_pixels, dtype=wp.vec3, device=device)
        n_queries = n_pixels if with_cache else 1
        self.query_vertex = wp.zeros(n_queries, dtype=int, device=device)
        self.query_spread = wp.zeros(n_queries, dtype=float, device=device)
        self.query_weight = wp.zeros(n_queries, dtype=wp.vec3, device=device)
        self.query_place = wp.zeros(n_queries, dtype=int, device=device)
        self._query_flag = wp.zeros(n_queries, dtype=int, device=device)
        self._pixel_queries = Records(n_queries, device)
        self.queries = Records(n_queries, device)
        self.n_queries = wp.zeros(1, dtype=int, device=device)

        self._scan = ExclusiveScan(n_queries, device)

        paths = TrainingPaths(self.max_training_paths, config.max_records, device)
        self._paths = paths
        self.tails, self.n_tails = paths.tails, paths.n_tails
        self.records, self.targets, self.n_records = paths.records, paths.targets, paths.n_records
        self.vertex_index, self.record_slot = paths.vertex_index, paths.record_slot
        self.n_training_paths = 0
        self.tile = (width, height)
        self._tile_limit = 0

        lower, upper = (np.asarray(corner, float) for corner in (scene.bounds if box is None else box))
        margin = 1e-3 * float(np.max(upper - lower))  # rounding and flat scenes stay inside
        self._params: Any = kt.TraceParams()
        self._params.seed = config.seed
        points: Any = wp.array(sobol_points(SOBOL_BITS)[bit_reversed(SOBOL_BITS)], dtype=wp.uint32, device=device)
        self._params.sobol = points
        self._params.max_depth = UNLIMITED_DEPTH if config.max_depth < 0 else config.max_depth
        self._params.rr_depth = config.rr_depth
        self._params.spread_threshold = config.spread_threshold
        self._params.min_spread = config.min_spread * float(np.max(upper - lower))
        self._params.continuation = config.continuation
        self._params.unbiased_fraction = config.unbiased_fraction
        self._params.object_space = int(config.record_space == "object")
        self._params.box_lower = wp.vec3(*(lower - margin))
        self._params.box_upper = wp.vec3(*(upper + margin))

    @staticmethod
    def kernels(config: PathTracerConfig) -> dict[str, wp.Kernel]:
        """Kernels to compile before the first frame, by the name to announce."""
        kernels = {"path tracer": kt.trace_paths}
        if config.integrator != "path":
            kernels["record compaction"] = kr.gather_targets
        return kernels

    def set_scene(self, scene: DeviceScene) -> None:
        """Trace `scene`, on the same device, from the next frame on; the camera becomes the scene's."""
        if scene.device != self.device:
            raise ValueError(f"this tracer runs on {self.device}, the scene lies on {scene.device}")
        self.scene = scene
        self.camera = scene.camera_view(self.width, self.height)

    def set_camera(self, camera: Camera) -> None:
        """Look through `camera` from the next frame on."""
        self.camera = self.scene.camera_view(self.width, self.height, camera)

    def tile_size(self, n_training_paths: int) -> tuple[int, int]:
        """Width and height [px] of the tiles; at most `n_training_paths`, and the capacity, cover the picture."""
        limit = max(1, min(n_training_paths, self.max_training_paths))
        if limit == self._tile_limit:
            return self.tile
        return tile_size(self.width, self.height, limit)

    def trace(
        self, frame: int, *, n_training_paths: int = 0, integrator: Integrator | None = None, split: int = 0
    ) -> None:
        """Trace one path through every pixel.

        Args:
            frame: Number of the frame, which selects its random numbers.
            n_training_paths: About how many paths also collect training records.
            integrator: "nrc" or "cache" for this frame instead of the other one.
            split: Columns left of it [px] follow their paths to the end, as "path" does; training paths too, all of
                whose records then have unbiased targets.

        Raises:
            ValueError: The tracer was made for "path" and shall use a cache, or the other way round.
        """
        if integrator is not None and (integrator == "path") != (self.config.integrator == "path"):
            raise ValueError(f"this tracer was made for {self.config.integrator!r} and cannot trace {integrator!r}")
        params = self._params
        params.integrator = _INTEGRATORS[integrator or self.config.integrator]
        params.split = split
        params.frame = frame
        params.sobol_index = int(f"{frame % 2**SOBOL_BITS:0{SOBOL_BITS}b}"[::-1], 2)
        params.sobol_round = frame // 2**SOBOL_BITS
        tiles = params.tiles
        tiles.width = n_slots = 0
        if n_training_paths > 0 and self.config.integrator != "path":
            self.tile = self.tile_size(n_training_paths)
            self._tile_limit = max(1, min(n_training_paths, self.max_training_paths))
            tiles.width, tiles.height = self.tile
            tiles.columns = -(-self.width // tiles.width)
            n_slots = tiles.columns * -(-self.height // tiles.height)
            place_tiles(tiles, frame, self.config.seed)
        if self.config.integrator != "path":
            self._paths.clear()
        launch(
            kt.trace_paths,
            self.n_pixels,
            inputs=[self.scene.view, self.camera, params],
            outputs=[
                self.radiance,
                self._pixel_queries.view,
                self.query_weight,
                self.query_vertex,
                self.query_spread,
                self._paths.view,
            ],
            device=self.device,
            range_size=heavy_range(self.n_pixels),
        )
        if self.config.integrator == "path":
            return
        launch(
            kr.mark_queries, self.n_pixels, inputs=[self.query_vertex], outputs=[self._query_flag], device=self.device
        )
        compact(self._pixel_queries, self._query_flag, self.query_place, self._scan, self.queries, self.n_queries)
        self.n_training_paths = n_slots
        if n_slots:
            self._paths.compact_tails()

    def gather_targets(self, tail_radiance: wp.array) -> None:
        """Complete the frame's training records; `tail_radiance` is (tails, 3), the cache's answer for `tails`."""
        if self.n_training_paths == 0:
            self.n_records.zero_()
        else:
            self._paths.gather_targets(tail_radiance, self.n_training_paths)
