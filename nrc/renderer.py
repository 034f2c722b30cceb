"""`Renderer`: path tracer, radiance cache and film; one `frame()` traces, asks, learns and accumulates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import warp as wp

from nrc.cache import CacheConfig, RadianceCache
from nrc.device_scene import DeviceScene
from nrc.film import Film
from nrc.kernels import aov as ka
from nrc.kernels import film as kf
from nrc.launch import heavy_range, launch, prepare
from nrc.pathtracer import PathTracer, PathTracerConfig
from nrc.scene import Scene

# A picture that is accumulated from an untrained cache counts the cache's first answers less: they are the darkest,
# since light travels a few bounces per frame through self-training.
SETTLING_FRAMES = 128
STAGES = ("trace", "query", "tails", "train", "film")


class Renderer:
    """Renders a scene frame by frame, one sample per pixel each.

    Args:
        scene: Host scene, or one already uploaded.
        width, height: Picture size [px].
        config: How paths are traced; its integrator decides whether there is a cache.
        cache: What the cache is made of.
        clamp: Largest component that one frame may add to a pixel; 0 for none. A clamp loses energy: see `Film.stats`.
        device: Warp device; ignored for an uploaded scene.

    Attributes:
        tracer, cache, film: The parts; `cache` is None for the path integrator.
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
        self.config = config or PathTracerConfig()
        self.scene = scene if isinstance(scene, DeviceScene) else DeviceScene(scene, device)
        self.device = self.scene.device
        cache_config = cache or CacheConfig()
        with_cache = self.config.integrator != "path"
        budget = cache_config.batch_size_on(self.device) * cache_config.n_batches
        n_paths = min(width * height, budget)
        self.tracer = PathTracer(self.scene, width, height, self.config, max_training_paths=n_paths)
        self.cache: RadianceCache | None = None
        if with_cache:
            self.cache = RadianceCache(
                self.scene.bounds,
                cache_config,
                max_queries=max(self.tracer.queries.capacity, self.tracer.records.capacity),
                max_records=self.tracer.records.capacity,
                device=self.device,
            )
        self.film = Film(self.tracer, clamp=clamp)
        self.train = True
        self.frame_index = 0
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.n_records = 0
        self._n_timed = 0
        self._cache_age = 0  # frames that trained it since it was empty
        self._records_per_path = 4.0  # running estimate that sizes the training tiles

    def prepare(self) -> float:
        """Compile what frames need; seconds it took."""
        kernels = {**PathTracer.kernels(self.config), "film": kf.accumulate}
        if self.cache is not None:
            kernels |= self.cache.kernels()
        return prepare(kernels, self.device)

    def frame(self) -> None:
        """Trace one path per pixel, complete the picture from the cache, train the cache, add to the film."""
        tracer, cache = self.tracer, self.cache
        n_paths = self.n_training_paths() if self.train else 0
        with self._stage("trace"):
            tracer.trace(self.frame_index, n_training_paths=n_paths)
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

        The film starts over; the cache keeps what it learned and adapts. Its box stays: geometry outside is traced on.
        """
        self.scene = scene if isinstance(scene, DeviceScene) else DeviceScene(scene, self.device)
        self.tracer.set_scene(self.scene)
        self.restart()

    def restart(self) -> None:
        """Clear the film; the cache keeps what it learned."""
        self.film.clear()

    def reset_cache(self) -> None:
        """Empty the cache; the film keeps its frames."""
        if self.cache is not None:
            self.cache.reset()
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
        """First-hit layers: albedo, normal, position (h, w, 3), depth (h, w), material_id (h, w)."""
        tracer = self.tracer
        n, shape = tracer.n_pixels, (tracer.height, tracer.width)
        arrays = {
            "albedo": wp.zeros(n, dtype=wp.vec3, device=self.device),
            "normal": wp.zeros(n, dtype=wp.vec3, device=self.device),
            "depth": wp.zeros(n, dtype=float, device=self.device),
            "position": wp.zeros(n, dtype=wp.vec3, device=self.device),
            "material_id": wp.zeros(n, dtype=int, device=self.device),
        }
        prepare({"first-hit layers": ka.trace_first_hits}, self.device)
        launch(
            ka.trace_first_hits,
            n,
            inputs=[self.scene.view, tracer.camera],
            outputs=list(arrays.values()),
            device=self.device,
            range_size=heavy_range(n),
        )
        layers = {name: array.numpy() for name, array in arrays.items()}
        return {name: value.reshape(*shape, *value.shape[1:]).astype(np.float32) for name, value in layers.items()}

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
