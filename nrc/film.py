"""`Film`: the sum of frames, and the picture they make."""

from __future__ import annotations

import numpy as np
import warp as wp

from nrc.kernels import film as kf
from nrc.launch import launch
from nrc.pathtracer import PathTracer


class Film:
    """Accumulates frames of `tracer` with compensated sums.

    Attributes:
        n_frames, weight: Frames added since the last `clear`, and the sum of their weights.
        frame: (pixels,) vec3, the last frame alone.
    """

    def __init__(self, tracer: PathTracer, *, clamp: float = 0.0) -> None:
        self.tracer, self.clamp = tracer, clamp
        n, device = tracer.n_pixels, tracer.device
        self.sums = wp.zeros(n, dtype=wp.vec3, device=device)
        self.errors = wp.zeros(n, dtype=wp.vec3, device=device)
        self.frame = wp.zeros(n, dtype=wp.vec3, device=device)
        self._clamped = wp.zeros(n, dtype=wp.vec3, device=device)
        self._n_invalid = wp.zeros(n, dtype=int, device=device)
        self._no_cache = wp.zeros((1, 3), dtype=float, device=device)
        self.n_frames = 0
        self.weight = 0.0

    def add(self, cache_radiance: wp.array | None = None, *, weight: float = 1.0) -> None:
        """Add the tracer's last frame.

        Args:
            cache_radiance: (queries, 3), completes the paths that ended in the cache.
            weight: Of this frame in the mean, positive.
        """
        tracer = self.tracer
        launch(
            kf.accumulate,
            tracer.n_pixels,
            inputs=[
                weight,
                self.clamp,
                tracer.radiance,
                tracer.query_vertex,
                tracer.query_weight,
                tracer.query_place,
                self._no_cache if cache_radiance is None else cache_radiance,
            ],
            outputs=[self.sums, self.errors, self._clamped, self._n_invalid, self.frame],
            device=tracer.device,
        )
        self.n_frames += 1
        self.weight += weight

    def clear(self) -> None:
        """Start over."""
        for array in self._arrays().values():
            array.zero_()
        self.n_frames = 0
        self.weight = 0.0

    def state(self) -> dict[str, np.ndarray]:
        """Everything `load_state` needs to go on as if nothing had happened."""
        arrays = {name: array.numpy() for name, array in self._arrays().items()}
        return {**arrays, "n_frames": np.array([self.n_frames]), "weight": np.array([self.weight])}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state`."""
        for name, array in self._arrays().items():
            array.assign(state[name])
        self.n_frames = int(state["n_frames"][0])
        self.weight = float(state["weight"][0])

    def image(self) -> np.ndarray:
        """Weighted mean of the frames, (height, width, 3) float32 [W m^-2 sr^-1]; zeros before the first."""
        total = self.sums.numpy().astype(np.float64) - self.errors.numpy()
        mean = total / (self.weight or 1.0)
        return mean.astype(np.float32).reshape(self.tracer.height, self.tracer.width, 3)

    def stats(self) -> dict[str, float]:
        """invalid_samples: left out for not being finite or negative. clamped_fraction: energy the clamp took."""
        clamped = float(self._clamped.numpy().sum(dtype=np.float64))
        kept = float(self.sums.numpy().sum(dtype=np.float64))
        return {
            "invalid_samples": int(self._n_invalid.numpy().sum()),
            "clamped_fraction": clamped / (clamped + kept) if clamped > 0.0 else 0.0,
        }

    def _arrays(self) -> dict[str, wp.array]:
        return {"sums": self.sums, "errors": self.errors, "clamped": self._clamped, "n_invalid": self._n_invalid}
