"""Image files and the transfer functions between radiance and pictures.

An image is an array (height, width, channels), first row at the top. Floating-point images hold linear Rec. 709
radiance [W m^-2 sr^-1]; 8-bit images hold sRGB-encoded values, as PNG and JPEG files do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import OpenEXR
from PIL import Image, UnidentifiedImageError

from nrc.files import write_atomically

FLOAT_EXTENSIONS = (".exr", ".hdr", ".pfm")
BYTE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tga", ".tif", ".tiff", ".webp")
WRITE_EXTENSIONS = (".exr", ".hdr", ".png")

# Channel names that compositing programs expect for the layers of a render; other layers are named by their count.
LAYER_CHANNELS = {
    "normal": ("X", "Y", "Z"),
    "position": ("X", "Y", "Z"),
    "depth": ("Z",),
    "material_id": ("ID",),
    "object_id": ("ID",),
}
CHANNELS_BY_COUNT = {1: ("Y",), 2: ("Y", "A"), 3: ("R", "G", "B"), 4: ("R", "G", "B", "A")}
CHANNEL_ORDER = "RGBXYZUVA"  # EXR sorts channels by name; people want them in this order

RGBE_LARGEST = np.float32(255.0 * 2.0**119)  # mantissa 255, exponent byte 255
DECIMAL = rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RLE_WIDTHS = range(8, 32768)  # widths for which Radiance run-length encodes scanlines


class ImageError(ValueError):
    """An image that cannot be read, written or compared; the message names the file and the reason."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """The colour of an image file as (height, width, channels), channels as stored (1 to 4).

    Returns:
        float32, linear, for .exr, .hdr and .pfm; uint8 as stored (usually sRGB) for PNG, JPEG and the like, whose
        palettes are expanded and whose 16-bit values are rounded to 8.

    Raises:
        ImageError: The file is missing, damaged, of an unsupported kind, or has no colour channels.
    """
    path = Path(path)
    extension = path.suffix.lower()
    if extension == ".exr":
        layers = read_layers(path)
        if "color" in layers:
            return layers["color"]
        coloured = [image for image in layers.values() if image.shape[2] >= 3]
        if len(coloured) == 1:
            return coloured[0]
        raise ImageError(f"{path}: no colour channels R, G, B or Y; layers are {', '.join(layers)}")
    if extension == ".hdr":
        return _decode_hdr(_read_bytes(path), path)
    if extension == ".pfm":
        return _decode_pfm(_read_bytes(path), path)
    if extension in BYTE_EXTENSIONS:
        return _read_bytes_image(path)
    supported = ", ".join(FLOAT_EXTENSIONS + BYTE_EXTENSIONS)
    raise ImageError(f"{path}: unsupported image extension '{extension}'; supported: {supported}")


def read_linear(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file as linear RGB (height, width, 3) float32: 8-bit files sRGB-decoded, grey repeated, alpha dropped.

    Raises:
        ImageError: As `read_image`.
    """
    image = read_image(path)
    image = np.repeat(image[:, :, :1], 3, axis=2) if image.shape[2] < 3 else image[:, :, :3]
    if image.dtype == np.uint8:
        return srgb_decode(np.arange(256, dtype=np.float32) / 255.0)[image]
    return np.ascontiguousarray(image)


def read_layers(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All layers of an EXR file, each (height, width, channels) float32 on the file's display window.

    Channels without a layer name form the layer `color` if they are R, G, B, A or Y, else one layer each under their
    own name. Layers of the second and later parts carry the part's name in front. Pixels that the data window leaves
    out are 0.

    Raises:
        ImageError: The file is missing or damaged, or holds deep or subsampled channels.
    """
    path = Path(path)
    _check_readable(path)
    try:
        with OpenEXR.File(str(path), separate_channels=True) as file:
            channels = _exr_channels(file, path)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path}: not a readable EXR file ({error})") from error
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, pixels in channels.items():
        layer, _, channel = name.rpartition(".")
        if not layer:
            layer = "color" if channel in ("R", "G", "B", "A", "Y") else channel
        groups.setdefault(layer, {})[channel] = pixels
    layers = {}
    for layer, group in groups.items():
        missing = {"R", "G", "B"} - group.keys()
        if 0 < len(missing) < 3:
            raise ImageError(f"{path}: layer '{layer}' has no channel {', '.join(sorted(missing))}")
        names = sorted(group, key=lambda name: (CHANNEL_ORDER + name).index(name))
        layers[layer] = np.stack([group[name] for name in names], axis=2)
    return layers


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write an image in the format its extension names, replacing the file only once it is complete.

    Args:
        path: .exr keeps float32; .hdr keeps 8 bits of mantissa per pixel, negative values become 0; .png is
            sRGB-encoded and clamped (see `to_srgb8`).
        image: (height, width, 1...4) float, linear; for .png also uint8, written as it is. .hdr wants 3 channels.

    Raises:
        ImageError: Unsupported extension, shape or type, or the file cannot be written.
    """
    path = Path(path)
    image = _checked(image, path)
    extension = path.suffix.lower()
    if extension == ".exr":
        write_exr(path, {"color": image})
    elif extension == ".hdr":
        if image.shape[2] != 3:
            raise ImageError(f"{path}: .hdr holds 3 channels, got {image.shape[2]}")
        encoded = _encode_hdr(image)
        write_atomically(path, lambda temporary: temporary.write_bytes(encoded), ImageError)
    elif extension == ".png":
        pixels = image if image.dtype == np.uint8 else to_srgb8(image)
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        write_atomically(path, lambda temporary: picture.save(temporary), ImageError)
    else:
        raise ImageError(f"{path}: cannot write '{extension}'; supported: {', '.join(WRITE_EXTENSIONS)}")


def write_exr(
    path: str | os.PathLike[str], layers: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write layers of one size into one EXR file of float32 channels, replacing the file only once it is complete.

    Args:
        layers: (height, width, 1...4) or (height, width) arrays by name. `color` becomes the channels R, G, B, A or Y;
            the others `<layer>.<channel>`, where `normal` and `position` have X, Y, Z, `depth` has Z and
            `material_id` and `object_id` have ID.
        metadata: Header attributes: strings, ints, floats.

    Raises:
        ImageError: Sizes differ, a shape or type is unsupported, or the file cannot be written.
    """
    path = Path(path)
    if not layers:
        raise ImageError(f"{path}: no layers to write")
    channels = {}
    size: tuple[int, int] | None = None
    for layer, array in layers.items():
        image = _checked(array, path, f"layer '{layer}'")
        if image.dtype == np.uint8:
            raise ImageError(f"{path}: layer '{layer}' is 8-bit; EXR holds linear floats")
        size = size or image.shape[:2]
        if image.shape[:2] != size:
            raise ImageError(f"{path}: layer '{layer}' is {_size(image.shape)}, the others are {_size(size)}")
        names = LAYER_CHANNELS.get(layer, CHANNELS_BY_COUNT[image.shape[2]])
        if len(names) != image.shape[2]:
            raise ImageError(f"{path}: layer '{layer}' wants {len(names)} channels, got {image.shape[2]}")
        for i, name in enumerate(names):
            full_name = name if layer == "color" else f"{layer}.{name}"
            channels[full_name] = np.ascontiguousarray(image[:, :, i], dtype=np.float32)
    header = {**(metadata or {}), "compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    write_atomically(path, lambda temporary: OpenEXR.File(header, channels).write(str(temporary)), ImageError)


def srgb_encode(linear: np.ndarray) -> np.ndarray:
    """Linear values to sRGB-encoded ones, IEC 61966-2-1; negative values become 0, values over 1 follow the curve."""
    x = np.maximum(linear, 0.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.power(x, 1.0 / 2.4) - 0.055)


def srgb_decode(encoded: np.ndarray) -> np.ndarray:
    """sRGB-encoded values to linear ones, IEC 61966-2-1; the inverse of `srgb_encode`."""
    x = np.maximum(encoded, 0.0)
    return np.where(x <= 0.04045, x / 12.92, np.power((x + 0.055) / 1.055, 2.4))


def to_srgb8(image: np.ndarray, exposure: float = 0.0) -> np.ndarray:
    """A linear float image as sRGB uint8 of the same shape: scaled, clamped to [0, 1], encoded, rounded.

    Args:
        image: (height, width, channels); with 2 or 4 channels the last is alpha and only clamped.
        exposure: Stops; the image is multiplied by 2^exposure. NaN becomes 0.
    """
    linear = np.nan_to_num(image.astype(np.float64), nan=0.0)
    encoded = srgb_encode(np.clip(linear * 2.0**exposure, 0.0, 1.0))
    if image.ndim == 3 and image.shape[2] in (2, 4):
        encoded[:, :, -1] = np.clip(linear[:, :, -1], 0.0, 1.0)
    return (255.0 * encoded + 0.5).astype(np.uint8)


def _checked(image: np.ndarray, path: Path, what: str = "image") -> np.ndarray:
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.size == 0 or image.shape[2] not in CHANNELS_BY_COUNT:
        raise ImageError(f"{path}: {what} must have shape (height, width, 1...4) and no zero size, got {image.shape}")
    if image.dtype != np.uint8 and image.dtype.kind not in "fiu":
        raise ImageError(f"{path}: {what} must hold real numbers, got {image.dtype}")
    return image


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _check_readable(path: Path) -> None:
    """Raise the operating system's reason for a file that cannot be opened, which decoders report poorly."""
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error


def _read_bytes(path: Path) -> bytes:
    _check_readable(path)
    return path.read_bytes()


def _read_bytes_image(path: Path) -> np.ndarray:
    _check_readable(path)
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I"):  # 16-bit grey
                grey = np.asarray(picture, dtype=np.float64)
                return np.clip(grey / 257.0 + 0.5, 0.0, 255.0).astype(np.uint8)[:, :, None]
            mode = picture.mode if picture.mode in ("L", "LA", "RGB", "RGBA") else "RGB"
            if picture.mode in ("P", "PA") and (picture.mode == "PA" or "transparency" in picture.info):
                mode = "RGBA"
            elif picture.mode == "1":
                mode = "L"
            pixels = np.asarray(picture.convert(mode))
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a readable {path.suffix[1:].upper()} file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: damaged or truncated ({error})") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _exr_channels(file: OpenEXR.File, path: Path) -> dict[str, np.ndarray]:
    """Every channel of every part, float32 on the display window."""
    if not file.parts:
        raise ImageError(f"{path}: damaged or truncated, no part of it can be read")
    found: dict[str, np.ndarray] = {}
    shape: tuple[int, int] | None = None
    for i, part in enumerate(file.parts):
        if part.type() in (OpenEXR.deepscanline, OpenEXR.deeptile):
            raise ImageError(f"{path}: deep EXR files are not supported")
        header = part.header
        data_low, data_high = (np.asarray(corner, dtype=int) for corner in header["dataWindow"])
        low, high = (np.asarray(corner, dtype=int) for corner in header["displayWindow"])
        width, height = high - low + 1
        shape = shape or (height, width)
        if (height, width) != shape:
            raise ImageError(f"{path}: part {i} is {width}x{height}, part 0 is {_size(shape)}")
        (x0, y0), (x1, y1) = np.maximum(low, data_low), np.minimum(high, data_high) + 1  # where both windows are
        inside = (slice(y0 - low[1], y1 - low[1]), slice(x0 - low[0], x1 - low[0]))
        source = (slice(y0 - data_low[1], y1 - data_low[1]), slice(x0 - data_low[0], x1 - data_low[0]))
        for name, channel in part.channels.items():
            if channel.xSampling != 1 or channel.ySampling != 1:
                raise ImageError(f"{path}: channel '{name}' is subsampled; luminance-chroma files are not supported")
            image = np.zeros((height, width), dtype=np.float32)
            if x0 < x1 and y0 < y1:
                image[inside] = channel.pixels[source]
            prefixed = i == 0 or name.startswith(f"{part.name()}.")
            found[name if prefixed else f"{part.name()}.{name}"] = image
    return found


def _decode_pfm(data: bytes, path: Path) -> np.ndarray:
    """Portable float map: PF (3 channels) or Pf (1), rows from the bottom, byte order by the sign of the scale."""
    match = re.match(rb"(PF|Pf)\s+(\d+)\s+(\d+)\s+(" + DECIMAL + rb")\s", data)
    if match is None:
        raise ImageError(f"{path}: not a PFM file")
    width, height, n_channels = int(match[2]), int(match[3]), 3 if match[1] == b"PF" else 1
    n = width * height * n_channels
    if n == 0:
        raise ImageError(f"{path}: has zero size")
    if len(data) - match.end() < 4 * n:
        raise ImageError(f"{path}: truncated, {len(data) - match.end()} of {4 * n} bytes of pixels")
    pixels = np.frombuffer(data, dtype="<f4" if float(match[4]) < 0.0 else ">f4", count=n, offset=match.end())
    return np.ascontiguousarray(pixels.reshape(height, width, n_channels)[::-1], dtype=np.float32)


def _decode_hdr(data: bytes, path: Path) -> np.ndarray:
    """Radiance RGBE. Ward, "Real Pixels", Graphics Gems II (1991), and the Radiance file format notes.

    A pixel is mantissa * 2^(exponent - 136); the header's EXPOSURE lines are divided out, as the format asks.
    """
    blank = re.search(rb"\n\r?\n", data)
    if blank is None or not data.startswith(b"#?"):
        raise ImageError(f"{path}: not a Radiance HDR file")
    header = data[: blank.end()]
    if b"FORMAT=32-bit_rle_xyze" in header:
        raise ImageError(f"{path}: XYZE pixels are not supported, only RGBE")
    exposure = np.prod([float(value) for value in re.findall(rb"\nEXPOSURE=[ \t]*(" + DECIMAL + rb")", header)])
    if exposure <= 0.0:
        raise ImageError(f"{path}: EXPOSURE must be positive, got {exposure:g}")
    pixels_start = data.find(b"\n", blank.end()) + 1
    resolution = re.fullmatch(rb"([-+])Y (\d+) ([-+])X (\d+)\r?\n", data[blank.end() : pixels_start])
    if resolution is None:
        raise ImageError(f"{path}: no resolution line of the form '-Y height +X width'")
    height, width = int(resolution[2]), int(resolution[4])
    if height * width == 0:
        raise ImageError(f"{path}: has zero size")
    body = np.frombuffer(data, dtype=np.uint8)[pixels_start:]
    rows = []
    position = 0
    for y in range(height):
        row, position = _decode_scanline(body, position, width, f"{path}: row {y} of {height}")
        rows.append(row)
    rgbe = np.stack(rows)
    linear = np.ldexp(rgbe[:, :, :3].astype(np.float32), rgbe[:, :, 3:].astype(np.int32) - 136)
    linear[rgbe[:, :, 3] == 0] = 0.0
    if exposure != 1.0:
        linear /= np.float32(exposure)
    return np.ascontiguousarray(linear[:: 1 if resolution[1] == b"-" else -1, :: 1 if resolution[3] == b"+" else -1])


def _decode_scanline(body: np.ndarray, start: int, width: int, where: str) -> tuple[np.ndarray, int]:
    """One row (width, 4) uint8 of RGBE bytes and the position after it; run-length encoded by component, or flat."""
    head = body[start : start + 4]
    encoded_width = int(head[2]) << 8 | int(head[3]) if len(head) == 4 else -1
    if width not in RLE_WIDTHS or encoded_width != width or head[0] != 2 or head[1] != 2:
        end = start + 4 * width
        if end > len(body):
            raise ImageError(f"{where} is truncated")
        flat = body[start:end].reshape(width, 4)
        if (flat[:, :3] == 1).all(axis=1).any():
            raise ImageError(f"{where} uses the run-length encoding of before 1991, which is not supported")
        return flat, end
    # Walk from count byte to count byte; everything else is array work.
    stream = body[start + 4 : start + 4 + 8 * width].tobytes()  # no row is longer: two bytes per value at worst
    codes, n, p = [], 0, 0
    while n < 4 * width and p < len(stream):
        code = stream[p]
        codes.append(p)
        n += code - 128 if code > 128 else code
        p += 2 if code > 128 else code + 1
        if code == 0:
            raise ImageError(f"{where} is damaged (empty run)")
    if n < 4 * width or p > len(stream):
        raise ImageError(f"{where} is truncated")
    if n > 4 * width:
        raise ImageError(f"{where} is damaged (run past the end of the row)")
    at = np.asarray(codes)
    code = np.frombuffer(stream, dtype=np.uint8)[at].astype(np.int64)
    is_run = code > 128
    count = np.where(is_run, code - 128, code)
    within = np.arange(n) - np.repeat(np.cumsum(count) - count, count)
    source = np.repeat(at + 1, count) + within * np.repeat(~is_run, count)
    planes = np.frombuffer(stream, dtype=np.uint8)[source].reshape(4, width)
    return planes.T, start + 4 + p


def _encode_hdr(image: np.ndarray) -> bytes:
    """Radiance RGBE with flat scanlines: normalised pixels cannot be mistaken for the marks of a run."""
    linear = np.clip(np.nan_to_num(image.astype(np.float32), nan=0.0), 0.0, RGBE_LARGEST)
    _, exponent = np.frexp(linear.max(axis=2, keepdims=True))
    exponent += np.rint(np.ldexp(linear, 8 - exponent)).max(axis=2, keepdims=True) > 255.0  # rounding up carries
    rgbe = np.concatenate([np.rint(np.ldexp(linear, 8 - exponent)), exponent + 128], axis=2)
    rgbe[rgbe[:, :, 3] <= 0.0] = 0.0
    rgbe[linear.max(axis=2) == 0.0] = 0.0
    height, width = image.shape[:2]
    header = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {height} +X {width}\n"
    return header.encode() + rgbe.astype(np.uint8).tobytes()
