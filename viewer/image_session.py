"""`ImageSession`: an image that is being fitted, beside its original, at any zoom."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.fit.fitted_image import FittedImage, check_same_image, load_fit
from nrc.fit.image import ImageTask
from nrc.fit.image_window import ERROR_GAIN, Show, Window, WindowRenderer
from nrc.fit.live import LiveTraining
from nrc.fit.pixels import PixelSource
from nrc.image import ImageError
from nrc.kernels import pixels as px
from nrc.viewer.fit_session import FitSession
from nrc.viewer.session import ImageWindow, Request


@dataclass(frozen=True)
class ImageSettings:
    """What the panels change.

    Attributes:
        train: Whether frames train the fit.
        show: "fitted", "original", or "error": the absolute difference of the two.
        split: Fraction of the width left of which the original is shown, or None.
        error_gain: Factor of the difference.
    """

    train: bool = True
    show: Show = "fitted"
    split: float | None = None
    error_gain: float = ERROR_GAIN


class ImageSession(FitSession):
    """Fits an image while one moves over it; a position is (x, y, 0) in the image's pixels, y down.

    Args:
        source: As of `ImageTask`.
        device: Warp device; the first GPU, else the CPU.
        options: Of `ImageTask`.

    Attributes:
        has_original: Whether there is an original to show: a snapshot's may be gone. Without it the fit is shown.

    Raises:
        ImageError, ValueError: The source or an option cannot be used; the message names it.
    """

    kind = "image"

    def __init__(self, source: str | os.PathLike[str], *, device: Any = None, **options: Any) -> None:
        self.task = ImageTask(source, device=device, **options)
        self._set_up(Path(source).name, self.task.fitted, self.task.source, self.task.warnings, LiveTraining(self.task))

    @classmethod
    def from_snapshot(cls, path: str | os.PathLike[str], device: Any = None) -> ImageSession:
        """The image in a snapshot of an `ImageTask`, which is not trained further. Raises SnapshotError."""
        fitted, fit = load_fit(path, device)
        source: PixelSource | None = None
        warnings: tuple[str, ...] = ()
        try:
            source = PixelSource(fit["source"])
            check_same_image(fitted, source)
        except ImageError as error:
            source, warnings = None, (f"there is no original to compare with: {error}",)
        session = cls.__new__(cls)
        session._set_up(Path(path).name, fitted, source, warnings, None)
        return session

    def _set_up(
        self,
        name: str,
        fitted: FittedImage,
        source: PixelSource | None,
        warnings: tuple[str, ...],
        training: LiveTraining | None,
    ) -> None:
        super().__init__(name, fitted.field.device, warnings, training)
        self.settings = ImageSettings()
        self.bounds = np.zeros(3), np.array([fitted.width, fitted.height, 0.0])
        self.has_original = source is not None
        self._fitted, self._source = fitted, source
        self._renderer = WindowRenderer(fitted, source)

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of the first frame by name, for `nrc.launch.prepare`."""
        training = self.task.kernels() if self.training is not None else {}
        return training | self._renderer.kernels() | {"display": px.pack_colors}

    def draw(self, request: Request, width: int, height: int) -> tuple[wp.array, bool]:
        """The part of the image that the request's window shows; the whole image without one."""
        settings: ImageSettings = request.settings
        if self.training is not None:
            self._fitted = self.task.fitted
        view = self._window(request)
        window = Window.around(view.x, view.y, view.zoom, (request.width, request.height), (width, height))
        show, split = (settings.show, settings.split) if self.has_original else ("fitted", None)
        return self._renderer.draw(window, show=show, split=split, error_gain=settings.error_gain), False

    def figures(self) -> dict[str, Any]:
        """Size of the image [px]."""
        return {"image_size": (self._fitted.width, self._fitted.height)}

    def pick(self, x: float, y: float) -> dict[str, Any] | None:
        """Position [px], and what the fit and the original (or None) show there, sRGB-encoded channels."""
        if self._request is None or not (0.0 <= x < 1.0 and 0.0 <= y < 1.0):
            return None
        view = self._window(self._request)
        px_x = view.x + (x - 0.5) * self._request.width / view.zoom
        px_y = view.y + (y - 0.5) * self._request.height / view.zoom
        if not (0.0 <= px_x < self._fitted.width and 0.0 <= px_y < self._fitted.height):
            return None
        original = None
        if self._source is not None:
            original = self._source.shown(self._source.pixels[int(px_y), int(px_x)])
        fitted = np.array(self._fitted.sample(px_x - 0.5, px_y - 0.5, 1, 1, 1.0).numpy()[0])
        return {"position": np.array([px_x, px_y, 0.0]), "fitted": fitted, "original": original}

    def _window(self, request: Request) -> ImageWindow:
        if request.window is not None:
            return request.window
        width, height = self._fitted.width, self._fitted.height
        return ImageWindow(0.5 * width, 0.5 * height, min(request.width / width, request.height / height))
