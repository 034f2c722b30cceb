"""`Film`: the sum of frames, and the picture they make."""

from __future__ import annotations

import numpy as np
import warp as wp

from nrc.kernels import film as kf
from nrc.launch import launch
from nrc.pathtracer import PathTracer


class Film:
    """Accumulates frames of `tracer` with compensated sums.

    What paths found themselves and what the cache answered are averaged apart, because frames of a cache that still
    learns may count less while everything else counts fully.

    Attributes:
        n_frames, cache_weight: Frames added since the last `clear`, and the sum of their cache weights.
        frame: (pixels,) vec3, the last frame alone.
    """

    def __init__(self, tracer: PathTracer, *, clamp: float = 0.0) -> None:
        self.tracer, self.clamp = tracer, clamp
        n, device = tracer.n_pixels, tracer.device
        self._sums = wp.zeros(n, dtype=wp.vec3, device=device)
        self._errors = wp.zeros(n, dtype=wp.vec3, device=device)
        n_cache = tracer.query_vertex.shape[0]
        self._cache_sums = wp.zeros(n_cache, dtype=wp.vec3, device=device)
        self._cache_errors = wp.zeros(n_cache, dtype=wp.vec3, device=device)
        self.frame = wp.zeros(n, dtype=wp.vec3, device=device)
        self._clamped = wp.zeros(n, dtype=wp.vec3, device=device)
        self._n_invalid = wp.zeros(n, dtype=int, device=device)
        self._mean = wp.zeros(n, dtype=wp.vec3, device=device)
        self._no_cache = wp.zeros((1, 3), dtype=float, device=device)
        self.n_frames = 0
        self.cache_weight = 0.0

    def add(self, cache_radiance: wp.array | None = None, *, cache_weight: float = 1.0) -> None:
        """Add the tracer's last frame.

        Args:
            cache_radiance: (queries, 3), completes the paths that ended in the cache.
            cache_weight: Of this frame among the cache's answers, positive.
        """
        tracer = self.tracer
        launch(
            kf.accumulate,
            tracer.n_pixels,
            inputs=[
                cache_weight,
                self.clamp,
                tracer.radiance,
                tracer.query_vertex,
                tracer.query_weight,
                tracer.query_place,
                self._no_cache if cache_radiance is None else cache_radiance,
            ],
            outputs=[
                self._sums,
                self._errors,
                self._cache_sums,
                self._cache_errors,
                self._clamped,
                self._n_invalid,
                self.frame,
            ],
            device=tracer.device,
        )
        self.n_frames += 1
        self.cache_weight += cache_weight

    def clear(self) -> None:
        """Start over."""
        for array in self._arrays().values():
            array.zero_()
        self.n_frames = 0
        self.cache_weight = 0.0

    def state(self) -> dict[str, np.ndarray]:
        """Everything `load_state` needs to go on as if nothing had happened."""
        arrays = {name: array.numpy().copy() for name, array in self._arrays().items()}
        return {**arrays, "n_frames": np.array([self.n_frames]), "cache_weight": np.array([self.cache_weight])}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state`."""
        for name, array in self._arrays().items():
            array.assign(state[name])
        self.n_frames = int(state["n_frames"][0])
        self.cache_weight = float(state["cache_weight"][0])

    def image(self) -> np.ndarray:
        """Mean of the frames, (height, width, 3) float32 [W m^-2 sr^-1]; zeros before the first."""
        mean = (self._sums.numpy().astype(np.float64) - self._errors.numpy()) / max(self.n_frames, 1)
        if self.cache_weight > 0.0:
            mean = mean + (self._cache_sums.numpy().astype(np.float64) - self._cache_errors.numpy()) / self.cache_weight
        return mean.astype(np.float32).reshape(self.tracer.height, self.tracer.width, 3)

    def mean(self) -> wp.array:
        """The picture of `image` on the device: (pixels,) vec3, overwritten by the next call."""
        launch(
            kf.average_frames,
            self.tracer.n_pixels,
            inputs=[
                1.0 / max(self.n_frames, 1),
                1.0 / self.cache_weight if self.cache_weight > 0.0 else 0.0,
                self._sums,
                self._errors,
                self._cache_sums,
                self._cache_errors,
            ],
            outputs=[self._mean],
            device=self.tracer.device,
        )
        return self._mean

    def stats(self) -> dict[str, float]:
        """invalid_samples: left out for not being finite or negative. clamped_fraction: energy the clamp took."""
        clamped = float(self._clamped.numpy().sum(dtype=np.float64))
        kept = float(self.image().sum(dtype=np.float64)) * self.n_frames
        return {
            "invalid_samples": int(self._n_invalid.numpy().sum()),
            "clamped_fraction": clamped / (clamped + kept) if clamped > 0.0 else 0.0,
        }

    def _arrays(self) -> dict[str, wp.array]:
        return {
            "sums": self._sums,
            "errors": self._errors,
            "cache_sums": self._cache_sums,
            "cache_errors": self._cache_errors,
            "clamped": self._clamped,
            "n_invalid": self._n_invalid,
        }
