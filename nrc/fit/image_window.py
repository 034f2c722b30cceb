"""`WindowRenderer`: any window of a fitted image, of its original, or of their difference, in the same pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import warp as wp

from nrc.config import one_of
from nrc.fit.fitted_image import FittedImage, check_same_image
from nrc.fit.pixels import PixelSource
from nrc.image import ImageError
from nrc.kernels import pixels as px
from nrc.launch import launch

SHOWS = ("fitted", "original", "error")
FINE, FINE_ORIGINAL = 2, 4  # samples per pixel and axis, at most: with the field, and of the original alone
BACKGROUND = 0.15  # around the image, sRGB-encoded
ERROR_GAIN = 10.0

Show = Literal["fitted", "original", "error"]


@dataclass(frozen=True)
class Window:
    """A picture of `width` x `height` pixels of a rectangle in an image.

    Attributes:
        x0, y0: Upper left corner of the rectangle [px of the image]; it may reach beyond the image.
        pitch_x, pitch_y: Image pixels per pixel of the picture.
    """

    x0: float
    y0: float
    pitch_x: float
    pitch_y: float
    width: int
    height: int

    def __post_init__(self) -> None:
        values = (self.x0, self.y0, self.pitch_x, self.pitch_y)
        if not all(math.isfinite(v) for v in values) or min(values[2:]) <= 0.0 or min(self.width, self.height) < 1:
            raise ImageError(f"a window needs a finite corner, positive pitches and a size, got {self}")

    @staticmethod
    def around(x: float, y: float, zoom: float, viewport: tuple[int, int], size: tuple[int, int]) -> Window:
        """What a viewport shows that has (x, y) [px of the image] in its middle.

        Args:
            zoom: Viewport pixels per image pixel.
            viewport: Width, height [px].
            size: Of the picture that fills the viewport [px].
        """
        if not (math.isfinite(zoom) and zoom > 0.0):
            raise ImageError(f"zoom must be positive, got {zoom}")
        wide, high = viewport[0] / zoom, viewport[1] / zoom
        return Window(x - 0.5 * wide, y - 0.5 * high, wide / size[0], high / size[1], *size)


class WindowRenderer:
    """Draws windows of a fitted image and of its original.

    Each pixel shows the mean of as many samples as it covers pixels of the image, at most 2 x 2 where the field is
    evaluated and 4 x 4 where the original is shown alone. Of the original a sample is the nearest pixel. Alpha is left
    out. Values are sRGB-encoded; those of floating-point images may be above 1.

    Args:
        fitted: The field; its `params` are read at each call.
        source: The original, of the same size, or None.

    Raises:
        ImageError: The source has another size or other channels than what was fitted.
    """

    def __init__(self, fitted: FittedImage, source: PixelSource | None = None) -> None:
        if source is not None:
            check_same_image(fitted, source)
        self.fitted, self.source, self.device = fitted, source, fitted.field.device
        self._n_colors = fitted.n_channels - (fitted.n_channels in (2, 4))
        self._colors: list[Any] = [wp.empty(0, dtype=wp.vec3, device=self.device) for _ in range(3)]
        if source is not None:
            room = self.device.free_memory // 2 if self.device.is_cuda else 0
            self._reader = self.device if source.pixels.nbytes <= room else wp.get_device("cpu")
            self._pixels: Any = wp.array(source.pixels, device=self._reader, copy=False)
            self._read = px.make_read_window(self._pixels.dtype)

    def draw(
        self, window: Window, *, show: Show = "fitted", split: float | None = None, error_gain: float = ERROR_GAIN
    ) -> wp.array:
        """A picture: (height * width,) vec3 on the device, sRGB-encoded, overwritten by the next.

        Args:
            show: The fit, the original, or the absolute difference of what a display shows of both, clipped to [0, 1]
                and multiplied by `error_gain`.
            split: Left of this fraction of the width the original is shown, with a white line between; None for none.

        Raises:
            ImageError: There is no original to show.
        """
        one_of(show, SHOWS, "view of an image")
        n_split = -1 if split is None else min(max(round(split * window.width), 0), window.width - 1)
        needs_original = show != "fitted" or n_split > 0
        if needs_original and self.source is None:
            raise ImageError("the original image is not there to be shown")
        view = self._view(window, FINE if show != "original" else FINE_ORIGINAL)
        n = window.width * window.height
        fitted, original, color = (self._room(k, n) for k in range(3))
        if show != "original":
            self._evaluate(window, view, fitted)
        if needs_original:
            self._look_up(view, original)
        launch(
            px.compose_window,
            n,
            inputs=[view, SHOWS.index(show), n_split, error_gain, BACKGROUND, fitted, original],
            outputs=[color],
            device=self.device,
        )
        return color

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        kernels = self.fitted.field.kernels() | {"windows": px.compose_window}
        return kernels if self.source is None else kernels | {"original": self._read}

    def _view(self, window: Window, finest: int) -> Any:
        view: Any = px.WindowView()
        view.x0, view.y0, view.pitch_x, view.pitch_y = window.x0, window.y0, window.pitch_x, window.pitch_y
        view.width, view.height = window.width, window.height
        view.image_width, view.image_height = self.fitted.width, self.fitted.height
        view.fine = min(max(1, math.ceil(max(window.pitch_x, window.pitch_y) - 1e-6)), finest)
        return view

    def _evaluate(self, window: Window, view: Any, out: wp.array) -> None:
        fine = view.fine
        values = self.fitted.sample(
            window.x0,
            window.y0,
            window.width * fine,
            window.height * fine,
            window.pitch_x / fine,
            window.pitch_y / fine,
        )
        inputs = [view, self._n_colors, values]
        launch(px.average_samples, out.shape[0], inputs=inputs, outputs=[out], device=self.device)

    def _look_up(self, view: Any, out: wp.array) -> None:
        there = out if self._reader == self.device else wp.empty_like(out, device=self._reader, pinned=True)
        inputs = [view, self._n_colors, self._pixels]
        launch(self._read, out.shape[0], inputs=inputs, outputs=[there], device=self._reader)
        if there is not out:
            wp.copy(out, there)
            wp.synchronize_device(self.device)  # before the pinned memory goes

    def _room(self, k: int, n: int) -> wp.array:
        if self._colors[k].shape[0] < n:
            self._colors[k] = wp.empty(n, dtype=wp.vec3, device=self.device)
        return self._colors[k][:n]
