"""Make the textures and the sky of `textured_court` and `ajar_room`: `python scenes/make_textures.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import OpenEXR
from PIL import Image
from scipy.ndimage import gaussian_filter

FOLDER = Path(__file__).parent
SIZE = 512


def noise(seed: int, sigma: float | tuple[float, float]) -> np.ndarray:
    """Smooth periodic noise (SIZE, SIZE) of mean 0 and deviation 1."""
    values = gaussian_filter(np.random.default_rng(seed).standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return (values - values.mean()) / values.std()


def save(name: str, rgb: np.ndarray, colors: int | None = 96) -> None:
    """Write (h, w, 3) values in [0, 1] as PNG, reduced to a palette of `colors`."""
    picture = Image.fromarray((np.clip(rgb, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))
    if colors is not None:
        picture = picture.quantize(colors, dither=Image.Dither.NONE)
    picture.save(FOLDER / name, optimize=True)


def bricks() -> None:
    """Running-bond brick wall, 8 courses of 4: colour and tangent-space normals."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    course = np.floor(y * 8)
    column = x * 4 + 0.5 * (course % 2)
    u, v = column % 1, (y * 8) % 1
    distance = np.minimum(np.minimum(u, 1 - u) / 4, np.minimum(v, 1 - v) / 8)
    stone = np.clip((distance - 0.006) / 0.008, 0.0, 1.0)
    tint = np.random.default_rng(1).uniform(-1.0, 1.0, (8, 4))[course.astype(int) % 8, np.floor(column).astype(int) % 4]
    grain = 0.03 * noise(2, 1.5) + 0.04 * noise(3, 12.0)
    brick = np.array([0.66, 0.36, 0.27]) * (1.0 + 0.22 * tint + grain)[..., None]
    mortar = np.array([0.72, 0.69, 0.63]) * (1.0 + grain)[..., None]
    save("bricks.png", mortar + (brick - mortar) * stone[..., None])
    height = 0.006 * gaussian_filter(stone, 1.5, mode="wrap") + 0.0006 * noise(4, 4.0)
    slope_x = (np.roll(height, -1, 1) - np.roll(height, 1, 1)) * SIZE / 2.0
    slope_y = (np.roll(height, 1, 0) - np.roll(height, -1, 0)) * SIZE / 2.0  # +y of a normal map points up the image
    normals = np.stack([-slope_x, -slope_y, np.ones_like(slope_x)], axis=-1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    save("bricks_normal.png", normals * 0.5 + 0.5, 128)


def tiles() -> None:
    """Square stone tiles, 4 by 4, of two greys with veins."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    u, v = (x * 4) % 1, (y * 4) % 1
    joint = np.clip((np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v)) - 0.012) / 0.02, 0.0, 1.0)
    dark = (np.floor(x * 4) + np.floor(y * 4)) % 2
    veins = np.exp(-6.0 * np.abs(noise(5, 10.0) + 0.5 * noise(6, 4.0)))
    light_stone = np.array([0.80, 0.77, 0.71]) * (1.0 - 0.18 * veins)[..., None]
    dark_stone = np.array([0.38, 0.40, 0.42]) * (1.0 + 0.35 * veins)[..., None]
    stone = light_stone + (dark_stone - light_stone) * dark[..., None]
    save("tiles.png", 0.3 + (stone - 0.3) * joint[..., None], 64)


def planks() -> None:
    """Wooden floor boards along u, 6 across, with staggered ends and grain."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    board = np.floor(y * 6).astype(int)
    shift = np.random.default_rng(7).uniform(0.0, 1.0, 6)[board % 6]
    along = (x + shift) % 1
    across = (y * 6) % 1
    half = np.floor(along * 2).astype(int)
    ends = np.minimum(along * 2 % 1, 1 - along * 2 % 1) / 2
    joint = np.clip((np.minimum(np.minimum(across, 1 - across) / 6, ends) - 0.0008) / 0.003, 0.0, 1.0)
    tint = np.random.default_rng(8).uniform(-1.0, 1.0, (6, 2))[board % 6, half % 2]
    grain = 0.08 * noise(9, (1.0, 40.0)) + 0.05 * noise(10, (5.0, 60.0))
    wood = np.array([0.62, 0.43, 0.28]) * (1.0 + 0.16 * tint + grain)[..., None]
    save("planks.png", wood * (0.35 + 0.65 * joint[..., None]), 64)


def sky() -> None:
    """Late-afternoon sky, 256 × 128, latitude-longitude: gradient, soft clouds and a sun two texels wide."""
    height, width = 128, 256
    theta = np.pi * (np.arange(height) + 0.5)[:, None] / height
    phi = 2.0 * np.pi * (np.arange(width) + 0.5)[None, :] / width
    direction = np.stack(
        [np.sin(theta) * np.sin(phi), np.cos(theta) + 0.0 * phi, -np.sin(theta) * np.cos(phi)], axis=-1
    )
    up = direction[..., 1:2]
    rise = np.clip(up, 0.0, 1.0) ** 0.5
    color = np.array([0.95, 0.88, 0.80]) * (1.0 - rise) + np.array([0.22, 0.42, 0.85]) * rise
    field = (
        noise(11, (10.0, 24.0))[:: SIZE // height, :: SIZE // width]
        + 0.5 * noise(12, (3.0, 8.0))[:: SIZE // height, :: SIZE // width]
    )
    clouds = np.clip(0.9 * field - 0.35, 0.0, 1.0)[..., None] * np.clip(4.0 * up, 0.0, 1.0)
    color = color + (np.array([1.15, 1.12, 1.08]) - color) * 0.8 * clouds
    ground = np.array([0.22, 0.20, 0.17])
    color = np.where(up > 0.0, color, ground + (color - ground) * np.exp(12.0 * np.minimum(up, 0.0)))
    sun = np.array([0.62, 0.62, 0.48]) / np.linalg.norm([0.62, 0.62, 0.48])
    cosine = (direction @ sun)[..., None]
    color = color + np.array([1.0, 0.86, 0.66]) * (
        900.0 * np.exp(1800.0 * (cosine - 1.0)) + np.exp(20.0 * (cosine - 1.0))
    )
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    channels = {"RGB": np.ascontiguousarray(color, np.float16)}
    OpenEXR.File(header, channels).write(str(FOLDER / "court_sky.exr"))


if __name__ == "__main__":
    bricks()
    tiles()
    planks()
    sky()
