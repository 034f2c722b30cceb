"""`PixelSource`: the pixels of an image file of any size, for reading at random.

Files are decoded once, strip by strip, into an array or, if that is large, into a memory-mapped temporary file without
a name, which the system removes with the process however it ends. TIFF (any compression, tiles or strips, BigTIFF),
PNG and JPEG are read through GDAL (rasterio), EXR through OpenEXR's scanlines; other formats, and EXR files of several
parts or with colour in a layer, are decoded whole. A progressive JPEG needs all its coefficients at once and is refused
where these exceed GDAL's limit of 500 MB, which the error message tells how to lift.

Pixels are as stored: an orientation in the metadata is not applied, which `warnings` says for JPEG. Palettes, 1-bit and
other shallow integers are expanded to 8 or 16 bits, CMYK is converted to RGB without its colour profile, a transparent
colour (PNG's tRNS without palette) is ignored. An alpha channel is kept where it is not 1 everywhere.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import Imath
import numpy as np
import OpenEXR
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from nrc.image import BYTE_EXTENSIONS, FLOAT_EXTENSIONS, ImageError, read_image, srgb_encode

RASTER_DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
GDAL_SETTINGS = {
    "GDAL_CACHEMAX": 32 << 20,  # bytes of decoded blocks; GDAL's own default is a share of the memory
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a truncated JPEG is an error, not grey pixels
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,  # which takes a truncated PNG for black where rows are missing
    "GDAL_PAM_ENABLED": False,  # neither read nor write side-car files
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
}
STRIP_BYTES = 16 << 20  # decoded at once, as far as the file's blocks allow
IN_MEMORY_BYTES = 256 << 20  # of pixels; more go to a temporary file
ORIENTATION_UPRIGHT = ("", "1")


class PixelSource:
    """An image file, decoded.

    Args:
        path: .png, .jpg, .tif, .exr, .hdr, or another extension that `nrc.image.read_image` knows.
        scratch: Folder of the temporary file for large images; by default TMPDIR, else /var/tmp where there is one,
            which is on a disk where /tmp may be memory.

    Attributes:
        pixels: (height, width, stored channels) sRGB-encoded values, of which the first `n_channels` count: uint8 or
            uint16 as in the file; float32 with 1 for white where the file is linear, values over 1 following the curve,
            negative ones 0, alpha not encoded.
        width, height: Size [px].
        n_channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        linear: Whether the file holds linear values, as floating-point files do.
        warnings: What was ignored or changed, in sentences.
        n_bytes, sha256: Size and digest of the file.

    Raises:
        ImageError: A file that is missing, damaged, truncated, of an unsupported kind or with pixels that are not
            finite, or no room for its pixels.
    """

    def __init__(self, path: str | os.PathLike[str], *, scratch: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path)
        self.sha256, self.n_bytes = _digest(self.path)
        with _decoder(self.path) as decoder:
            self.height, self.width, n_stored = decoder.shape
            self.linear = decoder.dtype.kind == "f"
            self.warnings = list(decoder.warnings)
            check = _Check(decoder)
            self.pixels = _store(self.path, decoder, check.strips(), scratch)
        check.report(self.path, self.warnings)
        self.n_channels = n_stored - check.is_opaque

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is alpha."""
        return self.n_channels in (2, 4)

    @property
    def n_colors(self) -> int:
        """Channels but for alpha."""
        return self.n_channels - self.has_alpha

    def shown(self, pixels: np.ndarray) -> np.ndarray:
        """The colours of some of `pixels` as a display shows them: float32 (..., n_colors) clipped to [0, 1]."""
        colors = pixels[..., : self.n_colors]
        if self.linear:
            return np.clip(colors, 0.0, 1.0)
        return colors.astype(np.float32) / np.float32(np.iinfo(colors.dtype).max)


@contextmanager
def quiet_raster() -> Iterator[None]:
    """GDAL with little memory, no side-car files, and no warning that a picture is not a map."""
    with rasterio.Env(**GDAL_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@dataclass(frozen=True)
class _Decoder:
    """An open file: `read(y0, y1)` gives rows (y1 - y0, width, channels) of `dtype`, linear where that is a float."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    strip_rows: int
    read: Callable[[int, int], np.ndarray]
    warnings: tuple[str, ...] = ()


class _Check:
    """What all strips of a file are looked through for."""

    def __init__(self, decoder: _Decoder) -> None:
        self.decoder = decoder
        self.is_opaque = decoder.shape[2] in (2, 4)
        self.n_bad = self.n_negative = 0
        self.first_bad = ""

    def strips(self) -> Iterator[np.ndarray]:
        """All rows, from the top."""
        decoder = self.decoder
        is_linear = decoder.dtype.kind == "f"
        opaque = 1.0 if is_linear else np.iinfo(decoder.dtype).max
        for y in range(0, decoder.shape[0], decoder.strip_rows):
            strip = decoder.read(y, min(decoder.shape[0], y + decoder.strip_rows))
            self.is_opaque = self.is_opaque and bool((strip[:, :, -1] == opaque).all())
            if is_linear:
                self._count_faults(strip, y)
                strip = _encode(strip)
            yield strip

    def _count_faults(self, strip: np.ndarray, y: int) -> None:
        bad = ~np.isfinite(strip).all(axis=2)
        if bad.any() and not self.n_bad:
            row, x = np.argwhere(bad)[0]
            self.first_bad = f"x {x}, y {y + row}"
        self.n_bad += int(np.count_nonzero(bad))
        self.n_negative += int(np.count_nonzero(strip < 0.0))

    def report(self, path: Path, notes: list[str]) -> None:
        """Raise ImageError for pixels that are not finite; add what is changed to `notes`."""
        if self.n_bad:
            raise ImageError(f"{path}: {self.n_bad} pixels are NaN or infinite, the first at {self.first_bad}")
        if self.n_negative:
            notes.append(f"{path}: {self.n_negative} negative values are taken for 0")


@contextmanager
def _decoder(path: Path) -> Iterator[_Decoder]:
    extension = path.suffix.lower()
    if extension in RASTER_DRIVERS:
        with _raster(path, RASTER_DRIVERS[extension]) as decoder:
            yield decoder
    elif extension == ".exr" and (scanlines := _exr_scanlines(path)) is not None:
        yield scanlines
    elif extension in FLOAT_EXTENSIONS + BYTE_EXTENSIONS:
        image = read_image(path)
        yield _Decoder(image.shape, image.dtype, image.shape[0], lambda y0, y1: image[y0:y1])
    else:
        supported = ", ".join(sorted({*RASTER_DRIVERS, *FLOAT_EXTENSIONS, *BYTE_EXTENSIONS}))
        raise ImageError(f"{path}: unsupported image extension '{path.suffix}'; supported: {supported}")


@contextmanager
def _raster(path: Path, driver: str) -> Iterator[_Decoder]:
    """A file that GDAL reads block by block."""
    try:
        with quiet_raster(), rasterio.open(path.resolve(), driver=driver) as file:
            yield _raster_decoder(path, file)
    except (RasterioError, MemoryError) as error:
        raise ImageError(f"{path}: not readable as {driver}, or truncated ({_first_cause(error)})") from error


def _raster_decoder(path: Path, file: Any) -> _Decoder:
    names = tuple(band.name for band in file.colorinterp)
    stored = np.dtype(file.dtypes[0])
    if len(set(file.dtypes)) > 1 or stored.name not in ("uint8", "uint16", "float16", "float32", "float64"):
        kinds = ", ".join(sorted(set(file.dtypes)))
        raise ImageError(f"{path}: channels of {kinds} are not supported, only uint8, uint16 and float")
    if file.count > 4 or (file.count in (2, 4) and names[-1] != "alpha"):
        raise ImageError(
            f"{path}: {file.count} channels ({', '.join(names)}) are not grey or RGB, with or without alpha"
        )
    table = _palette(file) if names[0] == "palette" else _shallow(file, stored)
    dtype = np.dtype(np.float32) if stored == np.float64 else stored
    n_channels = file.count
    if table is not None and table.ndim == 2:
        dtype, n_channels = table.dtype, table.shape[1]

    def read(y0: int, y1: int) -> np.ndarray:
        strip = file.read(window=Window(0, y0, file.width, y1 - y0))
        if table is not None and table.ndim == 2:
            return table[strip[0]]
        strip = strip if table is None else table[strip]
        return strip.transpose(1, 2, 0).astype(dtype, copy=False)

    orientation = file.tags().get("EXIF_Orientation", "")  # of JPEG: GDAL tells no other format's
    notes = []
    if orientation not in ORIENTATION_UPRIGHT:
        notes.append(f"{path}: orientation {orientation} of the metadata is not applied, pixels are taken as stored")
    block_rows = max(rows for rows, _ in file.block_shapes)
    row_bytes = file.width * file.count * stored.itemsize
    n_blocks = max(1, STRIP_BYTES // (row_bytes * block_rows))
    return _Decoder((file.height, file.width, n_channels), dtype, n_blocks * block_rows, read, tuple(notes))


def _palette(file: Any) -> np.ndarray:
    """Colours by index, (256 or 65536, channels): grey, RGB or RGBA, whichever holds them all."""
    entries = file.colormap(1)
    table = np.zeros((1 << (8 * np.dtype(file.dtypes[0]).itemsize), 4), np.uint8)
    table[:, 3] = 255
    for index, color in entries.items():
        table[index] = color
    used = table[sorted(entries)]
    if (used[:, 3] < 255).any():
        return table
    return table[:, :1] if (used[:, :1] == used[:, 1:3]).all() else table[:, :3]


def _shallow(file: Any, stored: np.dtype) -> np.ndarray | None:
    """Values of 1...7 or 9...15 bits, scaled to all of the type's; None where all bits are used."""
    n_bits = int(file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8 * stored.itemsize))
    if stored.kind == "f" or n_bits == 8 * stored.itemsize:
        return None
    full = np.iinfo(stored).max
    values = np.arange(full + 1, dtype=np.float64) * full / ((1 << n_bits) - 1)
    return np.minimum(values + 0.5, full).astype(stored)


def _exr_scanlines(path: Path) -> _Decoder | None:
    """The colour of an EXR file, row by row; None where its first part has none under the plain names."""
    try:
        # The interface of OpenEXR that reads some rows; its newer one decodes files whole.
        file = OpenEXR.InputFile(str(path))
        header = file.header()
    except OSError:
        return None  # several parts or damaged: `read_image` says which
    channels = header["channels"]
    names = [name for name in ("R", "G", "B") if name in channels] or [name for name in ("Y",) if name in channels]
    kinds = {channels[name].type.v for name in names}
    plain = all(channels[name].xSampling == channels[name].ySampling == 1 for name in names)
    if len(names) not in (1, 3) or Imath.PixelType.UINT in kinds or not plain:
        return None
    if not file.isComplete():
        raise ImageError(f"{path}: truncated, rows are missing")
    names += ["A"] if "A" in channels else []
    is_half = {channels[name].type.v for name in names} == {Imath.PixelType.HALF}
    kind = Imath.PixelType(Imath.PixelType.HALF if is_half else Imath.PixelType.FLOAT)
    dtype = np.dtype(np.float16 if is_half else np.float32)
    shown, stored = header["displayWindow"], header["dataWindow"]
    width, height = shown.max.x - shown.min.x + 1, shown.max.y - shown.min.y + 1
    left, right = max(shown.min.x, stored.min.x), min(shown.max.x, stored.max.x) + 1
    stored_width = stored.max.x - stored.min.x + 1

    def read(y0: int, y1: int) -> np.ndarray:
        strip = np.zeros((y1 - y0, width, len(names)), dtype)
        top, bottom = max(shown.min.y + y0, stored.min.y), min(shown.min.y + y1 - 1, stored.max.y)
        if top > bottom or left >= right:
            return strip
        try:
            rows = file.channels(names, kind, top, bottom)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ImageError(f"{path}: damaged or truncated at rows {y0}...{y1 - 1} ({error})") from error
        inside = (
            slice(top - shown.min.y - y0, bottom + 1 - shown.min.y - y0),
            slice(left - shown.min.x, right - shown.min.x),
        )
        for c, data in enumerate(rows):
            plane = np.frombuffer(data, dtype).reshape(bottom + 1 - top, stored_width)
            strip[(*inside, c)] = plane[:, left - stored.min.x : right - stored.min.x]
        return strip

    row_bytes = stored_width * len(names) * dtype.itemsize
    strip_rows = max(1, STRIP_BYTES // (256 * row_bytes)) * 256  # no compression's blocks are higher
    return _Decoder((height, width, len(names)), dtype, strip_rows, read)


def _encode(linear: np.ndarray) -> np.ndarray:
    """A strip's colours by the sRGB curve, its alpha as it is, float32."""
    encoded = srgb_encode(np.nan_to_num(linear, posinf=0.0, neginf=0.0).astype(np.float32)).astype(np.float32)
    if linear.shape[2] in (2, 4):
        encoded[:, :, -1] = linear[:, :, -1]
    return encoded


def _store(
    path: Path, decoder: _Decoder, strips: Iterator[np.ndarray], scratch: str | os.PathLike[str] | None
) -> np.ndarray:
    """The pixels: an array, or the map of a temporary file that has no name."""
    dtype = np.dtype(np.float32) if decoder.dtype.kind == "f" else decoder.dtype
    size = math.prod(decoder.shape) * dtype.itemsize
    if size <= IN_MEMORY_BYTES:
        pixels = np.empty(decoder.shape, dtype)
        y = 0
        for strip in strips:
            pixels[y : y + len(strip)] = strip
            y += len(strip)
        return pixels
    on_disk = "/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir()
    folder = Path(scratch or os.environ.get("TMPDIR") or on_disk)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for strip in strips:
                file.write(np.ascontiguousarray(strip).data)
            file.flush()
            return np.memmap(file, dtype, "r+", shape=decoder.shape)
    except RasterioError:  # some are OSErrors, of the source
        raise
    except OSError as error:
        raise ImageError(f"{path}: no room for {size >> 20} MiB of pixels in {folder} ({error.strerror})") from error


def _digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a file."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return digest.hexdigest(), size


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)
