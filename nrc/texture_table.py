"""Textures of all materials as one table, and their texels as one array."""

from __future__ import annotations

from typing import Any

import numpy as np
import warp as wp

from nrc.kernels import texture as kt
from nrc.scene import AnyTexture, Checkerboard

_WRAP = {"repeat": 0, "clamp": 1, "mirror": 2}


class TextureTable:
    """Textures of all materials; images are stored once however many textures look them up.

    Attributes:
        views: One for each texture.
        images: The images in the order of their texels, each with whether its floats are sRGB-encoded.
    """

    def __init__(self) -> None:
        self.views: list[Any] = []
        self.images: list[tuple[np.ndarray, bool]] = []
        self._offset = 0
        self._by_texture: dict[int, int] = {}
        self._by_image: dict[tuple[int, bool], int] = {}

    def index(self, texture: AnyTexture | None) -> int:
        if texture is None:
            return -1
        if id(texture) not in self._by_texture:
            self._by_texture[id(texture)] = len(self.views)
            self.views.append(self._view(texture))
        return self._by_texture[id(texture)]

    def _view(self, texture: AnyTexture) -> Any:
        view = kt.TextureView()
        view.uv_set = texture.uv_set
        view.row_u, view.row_v = (wp.vec3(*row) for row in np.asarray(texture.transform, float))
        if isinstance(texture, Checkerboard):
            view.kind = kt.TEXTURE_CHECKERBOARD
            view.width = view.height = 1024  # step of bump differences
            view.color0, view.color1 = wp.vec3(*texture.color0), wp.vec3(*texture.color1)
            return view
        image = texture.image
        if image.dtype == np.uint8:
            view.kind = kt.TEXTURE_SRGB8 if texture.srgb else kt.TEXTURE_LINEAR8
        else:
            view.kind = kt.TEXTURE_FLOAT
        view.height, view.width = image.shape[:2]
        view.wrap_u, view.wrap_v = _WRAP[texture.wrap_u], _WRAP[texture.wrap_v]
        view.nearest = int(texture.filter == "nearest")
        encoded = bool(texture.srgb and image.dtype == np.float32)
        key = (id(image), encoded)
        if key not in self._by_image:
            self._by_image[key] = self._offset
            self.images.append((image, encoded))
            self._offset += image.shape[0] * image.shape[1] * (1 if image.dtype == np.uint8 else 4)
        view.offset = self._by_image[key]
        return view


def packed_images(images: list[tuple[np.ndarray, bool]]) -> np.ndarray:
    """The texels of all images, one after the other."""
    texels = np.concatenate([_packed_texels(*image) for image in images]) if images else np.zeros(1, np.uint32)
    if len(texels) >= 2**31:
        raise ValueError(f"textures hold {len(texels)} texels; at most 2^31 - 1 fit")
    return texels


def _packed_texels(image: np.ndarray, encoded: bool) -> np.ndarray:
    """RGBA of every texel as uint32: four bytes in one, or four floats, sRGB-decoded where they are `encoded`."""
    channels = image.shape[2]
    opaque = 255 if image.dtype == np.uint8 else 1.0
    rgba = np.full((*image.shape[:2], 4), opaque, image.dtype)
    rgba[..., :3] = image[..., :3] if channels >= 3 else image[..., :1]
    if channels in (2, 4):
        rgba[..., 3] = image[..., -1]
    if encoded:
        c = rgba[..., :3]
        rgba[..., :3] = np.where(c <= 0.04045, c / 12.92, ((np.maximum(c, 0.0) + 0.055) / 1.055) ** 2.4)
    return np.ascontiguousarray(rgba).view(np.uint32).ravel()
