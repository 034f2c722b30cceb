"""`Renderer`: path tracer, radiance cache and film; one `frame()` traces, asks, learns and accumulates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import warp as wp

from nrc.cache import CacheConfig, RadianceCache
from nrc.device_scene import DeviceScene
from nrc.film import Film
from nrc.kernels import aov as ka
from nrc.kernels import film as kf
from nrc.kernels.camera import CameraView
from nrc.launch import heavy_range, launch, prepare
from nrc.pathtracer import PathTracer, PathTracerConfig
from nrc.scene import Camera, Scene

# A picture that is accumulated from an untrained cache counts the cache's first answers less: they are the darkest,
# since light travels a few bounces per frame through self-training.
SETTLING_FRAMES = 128
WARM_UP_FRAMES = 64
WARM_UP_PATHS = 0.5  # of a warm-up frame, over the records it may train with: every second pixel's is a training path
STAGES = ("trace", "query", "tails", "train", "film")


@dataclass(frozen=True, eq=False)
class Pick:
    """What a point of the picture shows.

    Attributes:
        position: (3,) world space [scene units].
        normal: (3,) unit shading normal on the camera's side.
        depth: Distance from the camera along the ray [scene units].
        mesh, material: Indices into the scene's meshes and materials.
    """

    position: np.ndarray
    normal: np.ndarray
    depth: float
    mesh: int
    material: int


class Renderer:
    """Renders a scene frame by frame, one sample per pixel each.

    `warm_up` trains the cache before the first picture.

    Args:
        scene: Host scene, or one already uploaded.
        width, height: Picture size [px].
        config: How paths are traced; its integrator decides whether there is a cache.
        cache: What the cache is made of.
        clamp: Largest component that one frame may add to a pixel; 0 for none. A clamp loses energy: see `Film.stats`.
        device: Warp device; ignored for an uploaded scene.

    Attributes:
        scene: The uploaded scene; its `scene` is the host's.
        config, cache_config: As given, or set since.
        camera: What the picture is seen through; the scene's to begin with.
        tracer, film: The parts for the present picture size and configuration, replaced with them.
        train: Whether frames train the cache.
        n_records: Training records that the last frame's paths left.
        stage_seconds: Wall-clock seconds per stage of `STAGES`, summed over frames.
    """

    def __init__(
        self,
        scene: Scene | DeviceScene,
        width: int,
        height: int,
        config: PathTracerConfig | None = None,
        *,
        cache: CacheConfig | None = None,
        clamp: float = 0.0,
        device: Any = None,
    ) -> None:
        self.scene = scene if isinstance(scene, DeviceScene) else DeviceScene(scene, device)
        self.device = self.scene.device
        self.camera = self.scene.scene.camera
        self._split = 0
        self._build((width, height), config or PathTracerConfig(), cache or CacheConfig(), clamp, None)
        self.train = True
        self.frame_index = 0
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.n_records = 0
        self._n_timed = 0
        self._cache_age = 0  # frames that trained it since it was empty
        self._records_per_path = 4.0  # running estimate that sizes the training tiles

    def _build(
        self,
        size: tuple[int, int],
        config: PathTracerConfig,
        cache_config: CacheConfig,
        clamp: float,
        learned: RadianceCache | None,
    ) -> None:
        """Make tracer and film for these settings, and the cache or room in it; where that fails nothing changes."""
        bounds = self.scene.bounds
        if config.integrator != "path":
            bounds = self.scene.scene.bounds_over_time if learned is None else learned.bounds
        budget = cache_config.batch_size_on(self.device) * cache_config.n_batches
        n_paths = min(size[0] * size[1], budget)
        tracer = PathTracer(self.scene, *size, config, max_training_paths=n_paths, box=bounds)
        tracer.set_camera(self.camera)
        film = Film(tracer, clamp=clamp)
        if config.integrator != "path":
            n_records = tracer.records.capacity
            room = {"max_queries": max(tracer.queries.capacity, n_records), "max_records": n_records}
            if learned is None:
                learned = RadianceCache(bounds, cache_config, **room, device=self.device)
            else:
                learned.reserve(**room)
        self.config, self.cache_config = config, cache_config
        self.tracer, self.film = tracer, film
        self._learned = learned  # also while the path integrator does not use it

    @property
    def cache(self) -> RadianceCache | None:
        """What frames ask and train; None for the path integrator."""
        return None if self.config.integrator == "path" else self._learned

    @property
    def split(self) -> int:
        """Columns left of it [px] follow their paths to the end, as integrator "path" does; 0 by default.

        Another split starts the film over.
        """
        return self._split

    @split.setter
    def split(self, columns: int) -> None:
        if columns != self._split:
            self._split = columns
            self.restart()

    def resize(self, width: int, height: int) -> None:
        """Render pictures of another size [px] from the next frame on. The film starts over, the cache stays."""
        self._build((width, height), self.config, self.cache_config, self.film.clamp, self._learned)

    def set_config(self, config: PathTracerConfig) -> None:
        """Trace as `config` says from the next frame on.

        The film starts over. The cache stays, through the path integrator too, and is made when it is first needed.
        """
        self._build(self._size(), config, self.cache_config, self.film.clamp, self._learned)

    def set_cache_config(self, cache: CacheConfig) -> None:
        """Learn as `cache` says from the next frame on; the film starts over.

        What was learned stays where only learning rate, beta2, averaging, batches, replay or seed change. With another
        encoding, network or radiance scale the cache starts empty.
        """
        learned, kept = self._learned, True
        if learned is not None:
            room = {"max_queries": learned.max_queries, "max_records": learned.max_records}
            after = RadianceCache(learned.bounds, cache, **room, device=self.device)
            kept, learned = after.continue_from(learned), after
        self._build(self._size(), self.config, cache, self.film.clamp, learned)
        if not kept:
            self._cache_age = 0

    def set_camera(self, camera: Camera) -> None:
        """Look through `camera` from the next frame on; the film starts over."""
        self.camera = camera
        self.tracer.set_camera(camera)
        self.restart()

    def load_cache(self, path: str | PathLike[str]) -> CacheConfig:
        """Go on with the cache that `RadianceCache.save` wrote, with its configuration and box; the film starts over.

        Returns:
            The cache's configuration.

        Raises:
            SnapshotError: The file is missing or damaged, or holds something else; then nothing changes.
        """
        learned = RadianceCache.load(path, max_queries=1, max_records=1, device=self.device)
        self._build(self._size(), self.config, learned.config, self.film.clamp, learned)
        self._cache_age = int(learned.stats()["rounds"])
        return learned.config

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels to compile before the first frame, by the name to announce."""
        kernels = {**PathTracer.kernels(self.config), "film": kf.accumulate}
        return kernels if self.cache is None else kernels | self.cache.kernels()

    def prepare(self) -> float:
        """Compile what frames need; seconds it took."""
        return prepare(self.kernels(), self.device)

    def frame(self) -> None:
        """Trace one path per pixel, complete the picture from the cache, train the cache, add to the film."""
        tracer, cache = self.tracer, self.cache
        n_paths = self.n_training_paths() if self.train else 0
        with self._stage("trace"):
            tracer.trace(self.frame_index, n_training_paths=n_paths, split=self.split)
        radiance = None
        if cache is not None:
            if n_paths > 0:
                self._train_cache(cache)
            with self._stage("query"):
                radiance = cache.query(tracer.queries, tracer.n_queries)
        with self._stage("film"):
            self.film.add(radiance, cache_weight=self._cache_weight())
        self.frame_index += 1
        self._cache_age += int(n_paths > 0)
        self._n_timed += 1

    def n_training_paths(self) -> int:
        """How many training paths fill the cache's record budget, judging by the frames so far; 0 without a cache."""
        if self.cache is None:
            return 0
        wanted = max(1.0, self.cache.n_training_records / self._records_per_path)
        return int(2.0 ** (math.floor(16.0 * math.log2(wanted)) / 16.0))  # in steps, so that tiles rarely change

    def image(self) -> np.ndarray:
        """Mean of the accumulated frames, (height, width, 3) float32 [W m^-2 sr^-1]."""
        return self.film.image()

    def stages_ms(self) -> dict[str, float]:
        """Mean wall-clock milliseconds per frame and stage."""
        n = max(self._n_timed, 1)
        return {name: 1e3 * seconds / n for name, seconds in self.stage_seconds.items() if seconds > 0.0}

    def set_scene(self, scene: Scene | DeviceScene) -> None:
        """Render `scene` from the next frame on, for instance the same one with other lights.

        A host scene shares the device arrays of what did not change: see `DeviceScene.replaced`. The camera becomes the
        scene's and the film starts over; the cache keeps what it learned and adapts. Its box stays: geometry outside is
        traced on.
        """
        scene = scene if isinstance(scene, DeviceScene) else self.scene.replaced(scene)
        self.tracer.set_scene(scene)
        self.scene, self.camera = scene, scene.scene.camera
        self.restart()

    def restart(self) -> None:
        """Clear the film; the cache keeps what it learned."""
        self.film.clear()

    def cut(self, *, keep_records: bool = False) -> None:
        """Start the film over and let the cache adapt fast: call it where light, scene or view change at once.

        For some frames training takes longer: see `RadianceCache.cut`. `keep_records` where the view alone changes.
        """
        if self.cache is not None:
            self.cache.cut(keep_records=keep_records)
        self.restart()

    def warm_up(self, n_frames: int = WARM_UP_FRAMES) -> None:
        """Train the cache on the scene as it stands before the first picture; the film starts over.

        An untrained cache answers with too little light for a hundred frames or more where light arrives after many
        bounces. These frames trace no more paths than they train with, and train as after a `cut`. Nothing happens
        without a cache.
        """
        if self.cache is None:
            return
        width, height = size = self._size()
        shrink = min(1.0, math.sqrt(WARM_UP_PATHS * self.cache.n_training_records / (width * height)))
        self.resize(max(1, round(shrink * width)), max(1, round(shrink * height)))
        self.cache.cut(n_frames)
        for _ in range(n_frames):
            self.frame()
        self.resize(*size)

    def reset_cache(self) -> None:
        """Empty the cache; the film keeps its frames."""
        if self._learned is not None:
            self._learned.reset()
            self._cache_age = 0

    def state(self) -> dict[str, np.ndarray]:
        """Everything `load_state` needs to render on as if nothing had happened."""
        parts: dict[str, Any] = {"film": self.film}
        if self.cache is not None:
            parts["cache"] = self.cache
        state = {f"{part}.{name}": value for part, owner in parts.items() for name, value in owner.state().items()}
        state["frame_index"] = np.array([self.frame_index])
        state["cache_age"] = np.array([self._cache_age])
        state["records_per_path"] = np.array([self._records_per_path])
        return state

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state` of a renderer with the same configuration."""
        parts: dict[str, Any] = {"film": self.film}
        if self.cache is not None:
            parts["cache"] = self.cache
        for part, owner in parts.items():
            owner.load_state({name.removeprefix(f"{part}."): value for name, value in state.items()})
        self.frame_index = int(state["frame_index"][0])
        self._cache_age = int(state["cache_age"][0])
        self._records_per_path = float(state["records_per_path"][0])

    def aovs(self) -> dict[str, np.ndarray]:
        """First-hit layers: albedo, normal, position (h, w, 3), depth, material_id, object_id (h, w), all float32.

        Both ids are indices into the scene, -1 where nothing is hit.
        """
        width, height = self._size()
        layers = self._first_hits(self.tracer.camera)
        return {
            name: value.reshape(height, width, *value.shape[1:]).astype(np.float32) for name, value in layers.items()
        }

    def pick(self, x: float, y: float) -> Pick | None:
        """What lies at a point of the picture, given from its upper left corner in widths and heights: [0, 1) each.

        Traces one ray. Returns None where it hits nothing.
        """
        camera: Any = self.scene.camera_view(*self._size(), self.camera)
        # A picture of one pixel, whose centre is that point: an axis that is turned there, of any length.
        across = (2.0 * x - 1.0) * camera.half_width
        up = (1.0 - 2.0 * y) * camera.half_height
        camera.z = camera.z - camera.x * across - camera.y * up
        camera.width = camera.height = 1
        found = {name: value[0] for name, value in self._first_hits(camera).items()}
        if found["object_id"] < 0:
            return None
        return Pick(
            position=found["position"],
            normal=found["normal"],
            depth=float(found["depth"]),
            mesh=int(found["object_id"]),
            material=int(found["material_id"]),
        )

    def _first_hits(self, camera: CameraView) -> dict[str, np.ndarray]:
        """Layers of all pixels of `camera`, by name, (pixels, ...)."""
        n = camera.width * camera.height
        types: dict[str, Any] = {"albedo": wp.vec3, "normal": wp.vec3, "depth": wp.float32, "position": wp.vec3}
        types |= {"material_id": wp.int32, "object_id": wp.int32}
        arrays = {name: wp.zeros(n, dtype=dtype, device=self.device) for name, dtype in types.items()}
        prepare({"first-hit layers": ka.trace_first_hits}, self.device)
        launch(
            ka.trace_first_hits,
            n,
            inputs=[self.scene.view, camera],
            outputs=list(arrays.values()),
            device=self.device,
            range_size=heavy_range(n),
        )
        return {name: array.numpy() for name, array in arrays.items()}

    def _size(self) -> tuple[int, int]:
        return self.tracer.width, self.tracer.height

    def _cache_weight(self) -> float:
        """Weight of this frame's cache answers in the picture: rises while a cache that started empty settles."""
        return min(1.0, (self._cache_age + 1) / SETTLING_FRAMES)

    def _train_cache(self, cache: RadianceCache) -> None:
        tracer = self.tracer
        with self._stage("tails"):
            tails = cache.query_primary(tracer.tails, tracer.n_tails)
            tracer.gather_targets(tails)
        with self._stage("train"):
            cache.train(tracer.records, tracer.targets, tracer.n_records)
        self.n_records = int(tracer.n_records.numpy()[0])
        if self.n_records and tracer.n_training_paths:
            measured = max(self.n_records / tracer.n_training_paths, 0.25)
            self._records_per_path += 0.1 * (measured - self._records_per_path)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        wp.synchronize_device(self.device)
        self.stage_seconds[name] += time.perf_counter() - start
