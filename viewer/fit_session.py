"""`FitSession`: what sessions of images, distances and radiance fields have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.fit.live import LiveTraining
from nrc.image import srgb_decode
from nrc.kernels import pixels as px
from nrc.launch import launch
from nrc.scene import Camera
from nrc.snapshot import SnapshotError
from nrc.viewer.resolution import Resolution
from nrc.viewer.session import Picture, Request

TRAIN_SHARE = 0.5  # of a frame's time
LONGEST_TRAINING = 1.0  # seconds between two pictures that take longer than they should
STILL_SECONDS = 0.5  # that a picture of what rests may take
STILL_GROWTH = 2.0**0.5  # of its sides, from one picture to the next


class FitSession:
    """A fit that one watches and looks around in; a frame trains for half its time, then draws.

    Where neither the fit nor the request changes, pictures grow to the viewport's size, as far as they are drawn within
    half a second, and then stay.

    Args:
        name: For the title.
        device: Where the fit is.
        warnings: What was left out of the source.
        training: The fit in progress; None for one that is finished.
    """

    kind: str
    settings: Any
    camera: Camera | None = None
    up: tuple[float, float, float] = (0.0, 1.0, 0.0)
    bounds: tuple[np.ndarray, np.ndarray]
    report: Callable[[str], None]

    def __init__(self, name: str, device: wp.Device, warnings: tuple[str, ...], training: LiveTraining | None) -> None:
        self.name, self.device, self.warnings = name, device, warnings
        self.training = training
        self._resolution = Resolution()
        self._request: Request | None = None  # of the last picture
        self._picture: Picture | None = None
        self._color: Any = None  # of the last picture, (height * width,) vec3 on the device
        self._is_linear = False
        self._drawn = 0.0  # [s] that the last picture took

    def draw(self, request: Request, width: int, height: int) -> tuple[wp.array, bool]:
        """What the request wants to see: (height * width,) vec3 on the device, and whether it is linear."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """Of the last picture, for the panels."""
        return {}

    def frame(self, request: Request) -> Picture:
        """Train a little, and draw what has changed. Raises ValueError for settings that cannot be used."""
        trained = 0.0
        if self.training is not None and request.settings.train:
            # Where pictures take longer than they should, training is not to wait for them
            trained = self.training.train(max(TRAIN_SHARE * request.seconds, min(self._drawn, LONGEST_TRAINING)))
        size, still = self._resolution.size(request), False
        picture = self._picture
        if picture is not None and trained == 0.0 and self._request is not None and same_view(request, self._request):
            size, still = self._still_size(request, picture), True
            if size == (picture.width, picture.height):
                return replace(picture, stats=picture.stats | {"idle": True})
        start = time.perf_counter()
        width, height = size
        color, is_linear = self.draw(request, width, height)
        # A new array: the window may still read the last one
        packed: Any = wp.empty(width * height, dtype=wp.uint32, device=self.device)
        launch(px.pack_colors, width * height, inputs=[int(is_linear), color], outputs=[packed], device=self.device)
        wp.synchronize_device(self.device)
        self._drawn = time.perf_counter() - start
        if not still:
            self._resolution.measure(width, height, trained + self._drawn)
        self._request, self._color, self._is_linear = request, color, is_linear
        stats = self.training.stats() if self.training is not None else {}
        stats |= self.figures()
        stats["stages_ms"] = {"train": 1e3 * trained, "draw": 1e3 * self._drawn}
        stats["idle"] = False
        pixels = packed.numpy().view(np.uint8).reshape(height, width, 4) if self.device.is_cpu else packed
        self._picture = Picture(pixels, width, height, stats)
        return self._picture

    def image(self) -> np.ndarray:
        """The last picture, (height, width, 3) float32, linear. Raises ValueError before the first."""
        if self._picture is None:
            raise ValueError(f"{self.name}: nothing has been drawn yet")
        color = np.array(self._color.numpy()).reshape(self._picture.height, self._picture.width, 3)
        return color if self._is_linear else srgb_decode(color).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write the fit as a snapshot. Raises SnapshotError."""
        if self.training is None:
            raise SnapshotError(f"{path}: not written: {self.name} is a snapshot already, and was not trained on")
        self.training.save(path)

    def pixel_at(self, x: float, y: float) -> int | None:
        """Index of the last picture's pixel at fractions of its width and height; None outside of it."""
        if self._picture is None or not (0.0 <= x < 1.0 and 0.0 <= y < 1.0):
            return None
        return int(y * self._picture.height) * self._picture.width + int(x * self._picture.width)

    def ray_of(self, pixel: int) -> tuple[np.ndarray, np.ndarray]:
        """Origin and unit direction of the ray through a pixel of the last picture."""
        request, picture = self._request, self._picture
        assert request is not None and request.camera is not None and picture is not None
        half_x, half_y = request.camera.half_extents(request.width, request.height)
        row, column = divmod(pixel, picture.width)
        x = half_x * (2.0 * (column + 0.5) / picture.width - 1.0)
        y = half_y * (1.0 - 2.0 * (row + 0.5) / picture.height)
        direction = request.camera.to_world[:3, :3] @ np.array([x, y, -1.0])
        return request.camera.to_world[:3, 3], direction / np.linalg.norm(direction)

    def _still_size(self, request: Request, picture: Picture) -> tuple[int, int]:
        """Size of the next picture of what rests: the present one where that is as large as may be."""
        if request.size is not None:
            return request.size
        scale = min(STILL_GROWTH * picture.width / request.width, 1.0)
        size = max(round(scale * request.width), 1), max(round(scale * request.height), 1)
        growth = size[0] * size[1] / (picture.width * picture.height)
        grows = growth > 1.0 and growth * picture.stats["stages_ms"]["draw"] <= 1e3 * STILL_SECONDS
        return size if grows else (picture.width, picture.height)


def same_view(a: Request, b: Request) -> bool:
    """Whether two requests want the same picture."""
    if (a.window, a.width, a.height, a.size, a.settings) != (b.window, b.width, b.height, b.size, b.settings):
        return False
    if a.camera is None or b.camera is None:
        return a.camera is b.camera
    same_lens = (a.camera.fov, a.camera.fov_axis) == (b.camera.fov, b.camera.fov_axis)
    return same_lens and np.array_equal(a.camera.to_world, b.camera.to_world)
