"""`FittedImage`: a field that learned an image, at any crop and zoom, measured and drawn strip by strip."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import warp as wp

from nrc.field import SNAPSHOT_KIND, Field
from nrc.files import write_atomically
from nrc.fit.pixels import PixelSource, quiet_raster
from nrc.image import ImageError, srgb_decode, write_image
from nrc.kernels import pixels as px
from nrc.launch import launch
from nrc.metrics import RELMSE_EPSILON, ssim
from nrc.snapshot import SnapshotError, load_tensors

STRIP_PIXELS = 1 << 19  # evaluated at once
FINEST_SAMPLES = 8  # per pixel and axis of a picture that is scaled down
SSIM_PIXELS = 1 << 24  # SSIM is measured up to this size: it takes longer than all else
SSIM_MARGIN = 10  # rows that a strip needs beyond those whose SSIM it gives
WHOLE_PNG_PIXELS = 1 << 26  # larger pictures are written strip by strip, as TIFF
WHOLE_EXR_PIXELS = 1 << 24
ERROR_WIDTH = 1024  # of `error_picture`, at most [px]
ERROR_WHITE = 0.1  # the difference that it shows white


class FittedImage:
    """A field that learned an image, as an image.

    Args:
        field: 2 inputs, and 1 to 4 channels of sRGB-encoded values.
        width, height: Size of the image [px].
        dtype: "uint8", "uint16" or "float32": what pictures hold, the latter linear values.
        params: Parameters to use; the field's own by default.
    """

    def __init__(self, field: Field, width: int, height: int, dtype: str, params: wp.array | None = None) -> None:
        self.field, self.width, self.height, self.dtype = field, width, height, np.dtype(dtype)
        self.params = params
        self._x = wp.empty((0, 2), dtype=float, device=field.device)
        self._y = wp.empty((0, field.n_output_dims), dtype=float, device=field.device)

    @staticmethod
    def load(path: str | os.PathLike[str], device: Any = None) -> FittedImage:
        """The image in a snapshot of an `ImageTask`. Raises SnapshotError."""
        return load_fit(path, device)[0]

    @property
    def n_channels(self) -> int:
        """1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
        return self.field.n_output_dims

    @property
    def inverse_size(self) -> float:
        """Coordinates per pixel."""
        return 1.0 / max(self.width, self.height)

    def reconstruct(self, region: tuple[int, int, int, int] | None = None, zoom: float = 1.0) -> np.ndarray:
        """A crop of the image at any zoom, as a file of the source's kind holds it.

        Args:
            region: (x0, y0, x1, y1) [px] of the source, x1 and y1 excluded; the whole image by default.
            zoom: Pixels of the result per pixel of the source. Below 1 each is the mean of as many samples as it
                covers pixels, at most 8 x 8; above 1 the field is read between the pixels it learned.

        Returns:
            (round((y1 - y0) * zoom), round((x1 - x0) * zoom), n_channels), at least one pixel each way: uint8 or uint16
            sRGB-encoded, or float32 linear.

        Raises:
            ImageError: A region that is empty or not inside the image, a zoom that is not positive, or a picture that
                does not fit into memory.
        """
        x0, y0, x1, y1 = region = checked_region(region, self.width, self.height)
        if not (math.isfinite(zoom) and zoom > 0.0):
            raise ImageError(f"zoom must be positive, got {zoom}")
        width, height = max(1, round((x1 - x0) * zoom)), max(1, round((y1 - y0) * zoom))
        try:
            image = np.empty((height, width, self.n_channels), self.dtype)
        except (MemoryError, ValueError) as error:  # the latter where not even NumPy can count the values
            raise ImageError(f"a picture of {width}x{height} pixels does not fit into memory") from error
        for y, strip in self._strips(region, width, height, zoom):
            image[y : y + len(strip)] = self.decode(strip)
        return image

    def strips(self, n_rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """First row and sRGB-encoded values (rows, width, n_channels) of strips of the whole image, from the top."""
        return self._strips((0, 0, self.width, self.height), self.width, self.height, 1.0, n_rows)

    def _strips(
        self, region: tuple[int, int, int, int], width: int, height: int, zoom: float, n_rows: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        fine = min(max(1, math.ceil(1.0 / zoom)), FINEST_SAMPLES)  # samples per pixel and axis
        pitch = 1.0 / (zoom * fine)
        n_rows = n_rows or max(1, STRIP_PIXELS // (width * fine * fine))
        for y in range(0, height, n_rows):
            rows = min(n_rows, height - y)
            values = self._values(region[0], region[1] + y * fine * pitch, width * fine, rows * fine, pitch)
            if fine > 1:
                values = values.reshape(rows, fine, width, fine, -1).mean(axis=(1, 3), dtype=np.float32)
            yield y, values

    def sample(
        self, x0: float, y0: float, width: int, height: int, pitch_x: float, pitch_y: float | None = None
    ) -> wp.array:
        """Encoded values in a rectangle of the image or around it: height rows of width samples, a pitch apart.

        Args:
            x0, y0: Upper left corner [px of the source]. Samples are in the middle of their cells.
            pitch_x, pitch_y: Distance of neighbours [px of the source]; the same both ways by default.

        Returns:
            (height * width, n_channels) float32 on the device, overwritten by the next call.
        """
        n, device = width * height, self.field.device
        if self._x.shape[0] < n:
            self._x = wp.empty((n, 2), dtype=float, device=device)
            self._y = wp.empty((n, self.n_channels), dtype=float, device=device)
        x, y = self._x[:n], self._y[:n]
        pitch_y = pitch_x if pitch_y is None else pitch_y
        inputs = [width, x0, y0, pitch_x, pitch_y, self.inverse_size]
        launch(px.place_pixels, n, inputs=inputs, outputs=[x], device=device)
        return self.field.inference(x, y, params=self.params)

    def _values(self, x0: float, y0: float, width: int, height: int, pitch: float) -> np.ndarray:
        """What `sample` gives, (height, width, n_channels)."""
        values = np.array(self.sample(x0, y0, width, height, pitch).numpy())  # the next strip reuses the memory
        return values.reshape(height, width, self.n_channels)

    def decode(self, encoded: np.ndarray) -> np.ndarray:
        """Values of the field as `dtype`: linear floats, not negative, or integers clipped to their range."""
        if self.dtype.kind == "f":
            decoded = srgb_decode(encoded).astype(np.float32)
            if self.n_channels in (2, 4):
                decoded[..., -1] = encoded[..., -1]
            return decoded
        full = np.iinfo(self.dtype).max
        return (np.clip(encoded, 0.0, 1.0) * np.float32(full) + np.float32(0.5)).astype(self.dtype)

    def write(self, folder: Path, name: str) -> Path:
        """Write the whole image into `folder` and return its path.

        PNG for 8 bits up to 64 megapixels, EXR for floats up to 16, else TIFF, strip by strip. Raises ImageError.
        """
        most = {"uint8": WHOLE_PNG_PIXELS, "float32": WHOLE_EXR_PIXELS}.get(self.dtype.name, 0)
        if self.width * self.height > most:
            path = folder / f"{name}.tif"
            write_atomically(path, self._write_tiff, ImageError)
        else:
            path = folder / (f"{name}.png" if self.dtype == np.uint8 else f"{name}.exr")
            write_image(path, self.reconstruct())
        return path

    def _write_tiff(self, path: Path) -> None:
        with (
            quiet_raster(),
            rasterio.open(
                path,
                "w",
                driver="GTiff",
                width=self.width,
                height=self.height,
                count=self.n_channels,
                dtype=self.dtype.name,
                compress="deflate",
                predictor=3 if self.dtype.kind == "f" else 2,
                interleave="pixel",
                bigtiff="if_safer",
                blockysize=16,
                alpha="yes" if self.n_channels in (2, 4) else "no",
            ) as file,
        ):
            n_rows = 16 * max(1, STRIP_PIXELS // (16 * self.width))
            for y, strip in self.strips(n_rows):
                window = rasterio.windows.Window(0, y, self.width, len(strip))
                file.write(self.decode(strip).transpose(2, 0, 1), window=window)


def measure(fitted: FittedImage, source: PixelSource) -> dict[str, float]:
    """How well a fit shows its image, over every pixel, strip by strip; alpha is left out.

    Returns:
        `psnr` [dB] of values as a display shows them, clipped to [0, 1] and sRGB-encoded; `ssim` of the same up to
        16 megapixels; `relmse` of the linear values where the source is linear.

    Raises:
        ImageError: The source has another size or other channels than what was fitted.
    """
    check_same_image(fitted, source)
    n_colors = source.n_colors
    with_ssim = source.width * source.height <= SSIM_PIXELS
    error = relative_error = similarity = 0.0
    n_similar = 0
    above: list[np.ndarray] = []  # the last rows of the strip above, shown by fit and source
    n_rows = max(2 * SSIM_MARGIN, STRIP_PIXELS // source.width)
    for y, encoded in fitted.strips(n_rows):
        pixels = source.pixels[y : y + len(encoded)]
        shown = [np.clip(encoded[..., :n_colors], 0.0, 1.0), source.shown(pixels)]
        error += float(np.sum(np.square(shown[0] - shown[1]), dtype=np.float64))
        if source.linear:
            reference, found = (srgb_decode(image[..., :n_colors]).astype(np.float64) for image in (pixels, encoded))
            relative_error += float(np.sum(np.square(found - reference) / (np.square(reference) + RELMSE_EPSILON)))
        if with_ssim:
            both = [np.concatenate(pair) for pair in zip(above, shown, strict=True)] if above else shown
            if source.height <= SSIM_MARGIN or len(both[0]) > SSIM_MARGIN:
                n = max(1, len(both[0]) - SSIM_MARGIN)
                similarity += n * ssim(both[0], both[1])
                n_similar += n
                above = [image[-SSIM_MARGIN:] for image in both]
            else:
                above = both
    n_values = source.width * source.height * n_colors
    result = {"psnr": psnr_of(error / n_values)}
    if with_ssim:
        result["ssim"] = similarity / n_similar
    if source.linear:
        result["relmse"] = relative_error / n_values
    return result


def error_picture(fitted: FittedImage, source: PixelSource) -> np.ndarray:
    """Root mean square difference of shown values (rows, at most 1024, 1) uint8, in squares of pixels; 0.1 is white."""
    side = -(-source.width // ERROR_WIDTH)
    n_rows = side * max(1, STRIP_PIXELS // (side * source.width))
    rows = []
    columns = np.arange(0, source.width, side)
    for y, encoded in fitted.strips(n_rows):
        shown = [np.clip(encoded[..., : source.n_colors], 0.0, 1.0), source.shown(source.pixels[y : y + len(encoded)])]
        square = np.square(shown[0] - shown[1]).mean(axis=2)
        starts = np.arange(0, len(square), side)
        sums = np.add.reduceat(np.add.reduceat(square, starts, axis=0), columns, axis=1)
        counts = np.outer(np.diff([*starts, len(square)]), np.diff([*columns, source.width]))
        rows.append(np.sqrt(sums / counts))
    scaled = np.clip(np.concatenate(rows) / ERROR_WHITE, 0.0, 1.0)
    return (255.0 * scaled + 0.5).astype(np.uint8)[:, :, None]


def load_fit(path: str | os.PathLike[str], device: Any = None) -> tuple[FittedImage, dict[str, Any]]:
    """The image in a snapshot of an `ImageTask`, and what the snapshot says of the fit. Raises SnapshotError."""
    _, config = load_tensors(path, kind=SNAPSHOT_KIND)
    fit = checked_entry(path, config, "image")
    field = Field.load(path, device)
    if field.n_input_dims != 2 or not 1 <= field.n_output_dims <= 4:
        raise SnapshotError(
            f"{path}: the field of an image has 2 inputs and 1 to 4 outputs, "
            f"this one {field.n_input_dims} and {field.n_output_dims}"
        )
    return FittedImage(field, fit["width"], fit["height"], fit["dtype"]), fit


def checked_entry(path: str | os.PathLike[str], config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The entry `fit` of a snapshot of that kind: source, size and type of its image. Raises SnapshotError."""
    fit = config.get("fit")
    if not isinstance(fit, dict) or fit.get("kind") != kind:
        raise SnapshotError(f"{path}: fit: not the snapshot of an image")
    for name in ("width", "height"):
        if not isinstance(fit.get(name), int) or isinstance(fit[name], bool) or fit[name] < 1:
            raise SnapshotError(f"{path}: fit: {name} must be a positive whole number, got {fit.get(name)!r}")
    if not isinstance(fit.get("source"), str) or fit.get("dtype") not in ("uint8", "uint16", "float32"):
        raise SnapshotError(f"{path}: fit: source or dtype is missing or wrong")
    return fit


def check_same_image(fitted: FittedImage, source: PixelSource) -> None:
    """Raise ImageError where the source has another size or other channels than what was fitted."""
    if (fitted.width, fitted.height, fitted.n_channels) != (source.width, source.height, source.n_channels):
        raise ImageError(
            f"{source.path}: is {source.width}x{source.height} with {source.n_channels} channels, "
            f"the fit {fitted.width}x{fitted.height} with {fitted.n_channels}"
        )


def checked_region(region: Any, width: int, height: int) -> tuple[int, int, int, int]:
    """`region`, or the whole image for None. Raises ImageError unless it is inside and not empty."""
    if region is None:
        return 0, 0, width, height
    values = tuple(region)
    whole = len(values) == 4 and all(isinstance(v, int | np.integer) for v in values)
    if not whole or not (0 <= values[0] < values[2] <= width and 0 <= values[1] < values[3] <= height):
        raise ImageError(
            f"region must be x0, y0, x1, y1 inside {width}x{height} with x0 < x1 and y0 < y1, got {region}"
        )
    x0, y0, x1, y1 = (int(v) for v in values)
    return x0, y0, x1, y1


def psnr_of(mse: float) -> float:
    """Peak signal-to-noise ratio [dB] of a mean squared error; infinite without one."""
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)
