"""`Display`: pictures on the device as a screen wants them, one packed RGBA word per pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import warp as wp

from nrc.film import Film
from nrc.kernels import display as kd
from nrc.launch import launch, resolve_device

Operator = Literal["none", "reinhard", "aces", "agx"]
_OPERATORS = {"none": kd.TONE_NONE, "reinhard": kd.TONE_REINHARD, "aces": kd.TONE_ACES, "agx": kd.TONE_AGX}
MAX_EXPOSURE = 64.0
COLOR_MAP = "viridis"  # of even lightness steps


@dataclass(frozen=True)
class ToneMapping:
    """How radiance becomes what a screen can show; the sRGB encoding follows.

    Attributes:
        operator: "none" clamps; "reinhard" compresses the luminance (Eq. 3, Reinhard et al. 2002); "aces" is Stephen
            Hill's fit of the ACES transforms; "agx" is Troy Sobotka's AgX without a look, in Benjamin Wrensch's fit.
        exposure: Stops; radiance is multiplied by 2^exposure before.

    Raises:
        ValueError: Unknown operator, or an exposure beyond 64 stops.
    """

    operator: Operator = "none"
    exposure: float = 0.0

    def __post_init__(self) -> None:
        if self.operator not in _OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(_OPERATORS)}, got {self.operator!r}")
        if not (math.isfinite(self.exposure) and abs(self.exposure) <= MAX_EXPOSURE):
            raise ValueError(f"exposure must lie within {MAX_EXPOSURE:g} stops, got {self.exposure}")


class Display:
    """Maps pictures to (pixels,) uint32, whose bytes in memory are sRGB-encoded R, G, B and 255.

    Two buffers take turns and grow with the largest picture: what a call returns stays as it is during the next call,
    so that another thread may still read it, and is overwritten by the one after.
    """

    def __init__(self, device: Any = None) -> None:
        self.device = resolve_device(device)
        self._buffers = [wp.zeros(0, dtype=wp.uint32, device=self.device) for _ in range(2)]
        self._colors: wp.array | None = None

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels to compile before the first call, by the name to announce."""
        return {"display": kd.map_radiance}

    def show_film(self, film: Film, tone: ToneMapping = ToneMapping()) -> wp.array:
        """The mean of the frames in `film`. Nothing is read back."""
        return self.show(film.mean(), tone)

    def show(self, radiance: wp.array, tone: ToneMapping = ToneMapping()) -> wp.array:
        """Linear radiance, (pixels,) vec3 [W m^-2 sr^-1]. What is NaN or negative counts as 0."""
        pixels = self._next_buffer(radiance.shape[0])
        launch(
            kd.map_radiance,
            radiance.shape[0],
            inputs=[_OPERATORS[tone.operator], 2.0**tone.exposure, radiance],
            outputs=[pixels],
            device=self.device,
        )
        return pixels

    def show_scalars(self, values: wp.array, lower: float, upper: float) -> wp.array:
        """(pixels,) float in false colours from `lower` to `upper`, those outside as the nearer end; NaN is black.

        Raises ValueError unless lower <= upper, both finite.
        """
        if not (math.isfinite(lower) and math.isfinite(upper) and lower <= upper):
            raise ValueError(f"expected finite lower <= upper, got {lower} and {upper}")
        if self._colors is None:
            self._colors = wp.array(_color_table(), dtype=wp.uint32, device=self.device)
        pixels = self._next_buffer(values.shape[0])
        launch(
            kd.map_scalars,
            values.shape[0],
            inputs=[lower, upper, self._colors, values],
            outputs=[pixels],
            device=self.device,
        )
        return pixels

    def _next_buffer(self, n: int) -> wp.array:
        buffer = self._buffers.pop(0)
        if buffer.shape[0] < n:
            buffer = wp.zeros(n, dtype=wp.uint32, device=self.device)
        self._buffers.append(buffer)
        return buffer[:n]


def _color_table() -> np.ndarray:
    """(256,) uint32 of the colour map."""
    from matplotlib import colormaps  # takes a while to import

    return colormaps[COLOR_MAP](np.arange(256), bytes=True).view("<u4").ravel()
