"""One photograph and its camera as a file describes them, before its pixels are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nrc.kernels.lens import OPENCV, OPENCV_FISHEYE, PINHOLE
from nrc.scene import SceneError

NO_DISTORTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
LARGEST_SKEW = 0.01  # relative difference of a camera matrix's singular values that rounding explains

__all__ = [
    "NO_DISTORTION",
    "OPENCV",
    "OPENCV_FISHEYE",
    "PINHOLE",
    "Frame",
    "FrameSet",
    "Placement",
    "rigid",
]


@dataclass(frozen=True)
class Frame:
    """A camera in the data's own world and the image file it took."""

    name: str
    path: Path
    c2w: np.ndarray
    """(3, 4) float64, camera to world: columns right, up, backwards (orthonormal), position."""
    where: str
    """File and field, for error messages."""
    focal: tuple[float, float] | None = None
    """[px]; or `angle` is given."""
    angle: tuple[float, float | None] | None = None
    """Horizontal and vertical field of view [rad]; without the vertical one pixels are square."""
    center: tuple[float, float] | None = None
    """Principal point [px]; the middle of the image by default."""
    size: tuple[int, int] | None = None
    """Width and height [px] that `focal` and `center` refer to; the image's own by default."""
    model: int = PINHOLE
    distortion: tuple[float, float, float, float, float, float] = NO_DISTORTION
    """k1, k2, k3, k4, p1, p2."""

    def intrinsics(self, width: int, height: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Focal lengths and principal point [px] for an image of this size; SceneError if `size` has another aspect."""
        scale_x = scale_y = 1.0
        if self.size is not None and self.size != (width, height):
            scale_x, scale_y = width / self.size[0], height / self.size[1]
            slack = 1.0 / min(width, height, *self.size)  # of rounding to whole pixels
            if abs(scale_x / scale_y - 1.0) > slack:
                w, h = self.size
                raise SceneError(f"{self.where}: w and h are {w}x{h}, {self.path.name} is {width}x{height}")
        if self.focal is not None:
            focal = self.focal[0] * scale_x, self.focal[1] * scale_y
        else:
            assert self.angle is not None
            fx = 0.5 * width / math.tan(0.5 * self.angle[0])
            focal = fx, fx if self.angle[1] is None else 0.5 * height / math.tan(0.5 * self.angle[1])
        if self.center is None:
            return focal, (0.5 * width, 0.5 * height)
        return focal, (self.center[0] * scale_x, self.center[1] * scale_y)


@dataclass(frozen=True)
class Placement:
    """Unit cube from the data's world: scale * rotation @ x + offset."""

    scale: float
    offset: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rotation: np.ndarray | None = None
    """(3, 3); None turns nothing."""

    def apply(self, c2w: np.ndarray) -> np.ndarray:
        """Cameras (..., 3, 4) of the data's world in the unit cube."""
        placed = c2w.copy() if self.rotation is None else self.rotation @ c2w
        placed[..., 3] = self.scale * placed[..., 3] + np.array(self.offset)
        return placed

    def to_world(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 3) of the unit cube in the data's world."""
        moved = (points - np.array(self.offset)) / self.scale
        return moved if self.rotation is None else moved @ self.rotation


@dataclass(frozen=True)
class FrameSet:
    """All frames that a folder describes."""

    source: Path
    """File or folder read, for messages."""
    frames: tuple[Frame, ...]
    test_frames: tuple[Frame, ...] | None = None
    """Where the data names its test views itself."""
    placement: Placement | None = None
    """Where the data says it or has a known scale; else the cameras decide."""
    aabb_scale: int | None = None
    points: np.ndarray | None = None
    """(n, 3) points of the scene in its world, where known."""
    warnings: tuple[str, ...] = ()


def rigid(matrix: np.ndarray, where: str) -> np.ndarray:
    """The rotation and position (3, 4) of a camera matrix, a uniform scale and rounding errors removed.

    Raises:
        SceneError: The matrix is not finite, not invertible, mirrors, or shears by more than rounding explains.
    """
    matrix = np.asarray(matrix, np.float64)
    if not np.isfinite(matrix).all():
        raise SceneError(f"{where}: holds numbers that are not finite")
    u, s, vt = np.linalg.svd(matrix[:3, :3])
    if s[2] <= 1e-6 * s[0]:
        raise SceneError(f"{where}: is not invertible")
    if np.linalg.det(u @ vt) < 0.0:
        raise SceneError(f"{where}: mirrors (its determinant is negative)")
    if s[0] > (1.0 + LARGEST_SKEW) * s[2]:
        raise SceneError(f"{where}: is not orthonormal (its axes scale by {s[0]:.4g} and {s[2]:.4g})")
    return np.concatenate([u @ vt, matrix[:3, 3:4]], axis=1)
