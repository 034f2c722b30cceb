"""Image files as texels, for textures and environment maps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from nrc.image import FLOAT_EXTENSIONS, read_image, srgb_decode
from nrc.scene import SceneError


def read_texels(source: Path | bytes, what: str) -> np.ndarray:
    """Texels (height, width, 1...4) of an image file or of its bytes: uint8, or float32 for 16 bits and radiance files.

    `what` names file and field in errors. Raises SceneError if the image is missing or cannot be decoded.
    """
    if isinstance(source, Path) and not source.is_file():
        raise SceneError(f"{what}: image file {str(source)!r} does not exist")
    if isinstance(source, Path) and source.suffix.lower() in FLOAT_EXTENSIONS:
        try:
            texels = read_image(source)
        except (OSError, ValueError) as error:
            raise SceneError(f"{what}: cannot read image {source.name!r}: {error}") from None
        return np.ascontiguousarray(texels, np.float32)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return _texels(picture)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        name = source.name if isinstance(source, Path) else f"{len(source)} bytes"
        raise SceneError(f"{what}: cannot read image ({name}): {error}") from None


def _texels(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I") or picture.mode == "F":
        scale = 1.0 if picture.mode == "F" else 65535.0
        return (np.asarray(picture, np.float32) / np.float32(scale))[:, :, None]
    if picture.mode not in ("L", "LA", "RGB", "RGBA"):
        transparent = picture.mode in ("PA", "RGBa") or "transparency" in picture.info
        picture = picture.convert("RGBA" if transparent else "L" if picture.mode == "1" else "RGB")
    elif picture.mode in ("L", "RGB") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    texels = np.array(picture, np.uint8)
    return texels[:, :, None] if texels.ndim == 2 else texels


def read_radiance(path: Path, what: str) -> np.ndarray:
    """Radiance (height, width, 3) float32 of a latitude-longitude map; 8-bit images are decoded from sRGB.

    Negative and non-finite values become 0. Raises SceneError as `read_texels` does.
    """
    texels = read_texels(path, what)
    if texels.dtype == np.uint8:
        texels = srgb_decode(texels.astype(np.float32) / 255.0)
    rgb = texels[:, :, :3] if texels.shape[2] >= 3 else np.repeat(texels[:, :, :1], 3, axis=2)
    rgb = np.nan_to_num(rgb, nan=0.0, posinf=0.0, neginf=0.0)
    return np.ascontiguousarray(np.maximum(rgb, 0.0), np.float32)
