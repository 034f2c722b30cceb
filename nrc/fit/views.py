"""Photographs with known cameras, ready for training: pixels, intrinsics and poses in the unit cube.

Colours are kept as the photographs hold them (usually sRGB-encoded, 8 bits), alpha straight. The scene's middle is the
unit cube; `aabb_scale` is the side of the box around it that training covers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import warp as wp

from nrc.fit.colmap import find_model, read_colmap
from nrc.fit.frame import NO_DISTORTION, PINHOLE, Frame, FrameSet, Placement
from nrc.fit.transforms import DEFAULT_SCALE, read_transforms
from nrc.image import ImageError, read_image, to_srgb8
from nrc.kernels.lens import CamerasView, vec6
from nrc.launch import threads
from nrc.scene import Camera as SceneCamera
from nrc.scene import SceneError

DEFAULT_HOLDOUT = 8
TRANSFORMS_FILES = ("transforms_train.json", "transforms.json")
CAMERA_DISTANCE = 4.0 * DEFAULT_SCALE  # mean, in the unit cube, of cameras whose scale is unknown: as in NeRF-synthetic
DEFAULT_AABB_SCALE = 16  # of scenes whose scale is unknown
POINTS_INSIDE = 0.98  # of a scene's points that its box must hold
LEAST_PARALLAX = 1e-3  # smallest eigenvalue of the mean projector: below it optical axes count as parallel
NEAR = 0.1  # as in instant-ngp
LARGEST_PIXELS = 2**31 - 1  # kernels index with int32


@dataclass(frozen=True)
class Camera:
    """One camera in the unit cube's space."""

    c2w: np.ndarray
    """(3, 4): columns right, up, backwards (orthonormal), position."""
    focal: tuple[float, float]
    """[px]"""
    center: tuple[float, float]
    """Principal point [px]; the first pixel's centre is (0.5, 0.5)."""
    size: tuple[int, int]
    """Width, height [px]."""
    model: int = PINHOLE
    """nrc.kernels.lens.PINHOLE, OPENCV or OPENCV_FISHEYE."""
    distortion: tuple[float, float, float, float, float, float] = NO_DISTORTION
    """k1, k2, k3, k4, p1, p2."""

    @staticmethod
    def from_fov(c2w: np.ndarray, width: int, height: int, fov: float) -> Camera:
        """Pinhole camera with square pixels and horizontal field of view `fov` [rad]."""
        focal = 0.5 * width / np.tan(0.5 * fov)
        return Camera(np.asarray(c2w), (focal, focal), (0.5 * width, 0.5 * height), (width, height))

    @staticmethod
    def from_scene(camera: SceneCamera, width: int, height: int, window: tuple[int, int] | None = None) -> Camera:
        """A scene's camera without its lens.

        Args:
            window: Size [px] of what the picture is scaled to, which the field of view is of; the picture's by default.
        """
        half_x, half_y = camera.half_extents(*(window or (width, height)))
        focal = (0.5 * width / half_x, 0.5 * height / half_y)
        return Camera(camera.to_world[:3], focal, (0.5 * width, 0.5 * height), (width, height))

    def to_scene(self) -> SceneCamera:
        """This camera as a scene's, the vertical field of view kept: without distortion, looking at its middle."""
        to_world = np.eye(4)
        to_world[:3] = self.c2w
        fov = np.degrees(2.0 * np.arctan(0.5 * self.size[1] / self.focal[1]))
        return SceneCamera(to_world, fov=float(fov), fov_axis="y")

    def resized(self, width: int, height: int) -> Camera:
        """The same camera with another number of pixels."""
        x, y = width / self.size[0], height / self.size[1]
        focal, center = (self.focal[0] * x, self.focal[1] * y), (self.center[0] * x, self.center[1] * y)
        return replace(self, focal=focal, center=center, size=(width, height))

    def upload(self, device: wp.Device) -> CamerasView:
        """A view of this one camera, without pixels."""
        return _upload(
            np.zeros(1, np.uint32),
            np.zeros(1, np.int64),
            np.array([self.size]),
            np.asarray(self.c2w, np.float32)[None],
            np.array([self.focal]),
            np.array([self.center]),
            np.array([self.distortion]),
            np.array([self.model]),
            device=device,
        )


@dataclass(frozen=True)
class Views:
    """Photographs and their cameras, in file order."""

    names: tuple[str, ...]
    pixels: np.ndarray
    """Flat uint32: RGBA, 8 bits each, red lowest, alpha straight; images one after the other, rows from the top."""
    first_pixel: np.ndarray
    """(n,) int64"""
    sizes: np.ndarray
    """(n, 2) int32: width, height [px]."""
    has_alpha: bool
    """Whether any pixel is transparent."""
    c2w: np.ndarray
    """(n, 3, 4) float32 in the unit cube: columns right, up, backwards (orthonormal), position."""
    focal: np.ndarray
    """(n, 2) float32 [px]"""
    center: np.ndarray
    """(n, 2) float32 [px]; the first pixel's centre is (0.5, 0.5)."""
    distortion: np.ndarray
    """(n, 6) float32: k1, k2, k3, k4, p1, p2."""
    model: np.ndarray
    """(n,) int32: nrc.kernels.lens.PINHOLE, OPENCV or OPENCV_FISHEYE."""
    aabb_scale: int
    """Side of the scene's box around the unit cube's middle, a power of two."""
    scale: float
    offset: np.ndarray
    """(3,)"""
    rotation: np.ndarray
    """(3, 3). A point x of the data's world is at scale * rotation @ x + offset in the unit cube."""
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def placement(self) -> Placement:
        """Of the data's world in the unit cube."""
        x, y, z = (float(value) for value in self.offset)
        return Placement(self.scale, (x, y, z), self.rotation)

    @property
    def near(self) -> float:
        """Distance from the cameras [unit cube] in front of which nothing is assumed: photographers keep theirs."""
        return 0.0 if self.aabb_scale == 1 else NEAR

    def image(self, i: int) -> np.ndarray:
        """(height, width, 4) uint8 pixels of view i; shares memory."""
        width, height = (int(side) for side in self.sizes[i])
        first = int(self.first_pixel[i])
        return self.pixels[first : first + width * height].view(np.uint8).reshape(height, width, 4)

    def camera(self, i: int) -> Camera:
        """Camera of view i."""
        width, height = (int(side) for side in self.sizes[i])
        fx, fy = (float(value) for value in self.focal[i])
        cx, cy = (float(value) for value in self.center[i])
        k1, k2, k3, k4, p1, p2 = (float(value) for value in self.distortion[i])
        model = int(self.model[i])
        return Camera(self.c2w[i], (fx, fy), (cx, cy), (width, height), model, (k1, k2, k3, k4, p1, p2))

    def upload(self, device: wp.Device) -> CamerasView:
        """All arrays on `device`, pixels included."""
        return _upload(
            self.pixels,
            self.first_pixel,
            self.sizes,
            self.c2w,
            self.focal,
            self.center,
            self.distortion,
            self.model,
            device=device,
        )


def load_views(
    path: str | os.PathLike[str],
    *,
    split: Literal["train", "test"] = "train",
    holdout: int | None = None,
    downscale: int = 1,
) -> Views:
    """Photographs and cameras of a data set.

    Args:
        path: A transforms file (see `nrc.fit.transforms`), a folder with `transforms_train.json` or `transforms.json`,
            or a COLMAP model folder (see `nrc.fit.colmap`). Where the data have no scale of their own (nerfstudio,
            COLMAP), the unit cube's middle is the point nearest to all optical axes, the cameras' mean up is +z and
            their mean distance 1.32; `aabb_scale` follows from COLMAP's points, else it is 16.
        split: "test" are the views the data name (`transforms_test.json`, nerfstudio's `test_filenames`), else every
            `holdout`-th of those whose image exists, the first included; "train" the others.
        holdout: None holds out every 8th view where the data name no test views; a number n every n-th whatever the
            data name; 0 none.
        downscale: Average boxes of this many pixels squared; incomplete ones at the right and the bottom are dropped.

    Raises:
        SceneError: A file is missing, malformed, or describes an impossible camera; no image exists, or the split is
            empty. The message names the file and the field.
        ImageError: An image is damaged or holds non-finite values.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if (holdout is not None and holdout < 0) or downscale < 1:
        raise ValueError(f"holdout must be >= 0 and downscale >= 1, got {holdout} and {downscale}")
    described = _read_frames(Path(path))
    warnings = list(described.warnings)
    placement = described.placement
    if placement is None:
        placement = _place(described.frames, warnings)
        warnings.append(
            f"{described.source}: no scale given: cameras turned upright and scaled by {placement.scale:.4g} "
            f"to mean distance {CAMERA_DISTANCE:g}"
        )
    aabb_scale = described.aabb_scale
    if aabb_scale is None:
        aabb_scale = _box_side(described, placement) if described.placement is None else 1
    frames = _split(described, split, holdout, warnings)
    return _load(frames, placement, aabb_scale, downscale, warnings)


def _read_frames(path: Path) -> FrameSet:
    if path.is_file():
        return read_transforms(path)
    if not path.is_dir():
        raise SceneError(f"{path}: no such file or folder")
    for name in TRANSFORMS_FILES:
        if (path / name).is_file():
            return read_transforms(path / name)
    model = find_model(path)
    if model is not None:
        return read_colmap(model)
    raise SceneError(
        f"{path}: holds no {' or '.join(TRANSFORMS_FILES)} and no COLMAP model (cameras.bin or cameras.txt)"
    )


def _split(described: FrameSet, split: str, holdout: int | None, warnings: list[str]) -> list[Frame]:
    """Frames of one split whose images exist, in file order."""
    if described.test_frames is not None and holdout is None:
        frames = described.frames if split == "train" else described.test_frames
        return _existing(frames, described.source, f"{split} images", warnings)
    every = DEFAULT_HOLDOUT if holdout is None else holdout
    existing = _existing(described.frames, described.source, "images", warnings)
    held_out = set(range(0, len(existing), every)) if every else set()
    chosen = [frame for i, frame in enumerate(existing) if (i in held_out) == (split == "test")]
    if not chosen:
        which = f"every {every}th is held out for tests" if every else "none is held out (holdout 0)"
        raise SceneError(f"{described.source}: no {split} views: of {len(existing)} images {which}")
    return chosen


def _existing(frames: Sequence[Frame], source: Path, what: str, warnings: list[str]) -> list[Frame]:
    existing = [frame for frame in frames if frame.path.is_file()]
    n_missing = len(frames) - len(existing)
    if not existing:
        first = f"; the first is {frames[0].path}" if frames else ""
        raise SceneError(f"{source}: none of its {len(frames)} {what} exists{first}")
    if n_missing:
        warnings.append(f"{source}: {n_missing} of {len(frames)} {what} are missing and skipped")
    return existing


def _place(frames: tuple[Frame, ...], warnings: list[str]) -> Placement:
    """Unit cube for cameras in a world of unknown scale, in the spirit of instant-ngp's colmap2nerf.py."""
    c2w = np.stack([frame.c2w for frame in frames])
    up = c2w[:, :, 1].mean(axis=0)
    rotation = _rotation_to_z(up / np.linalg.norm(up)) if np.linalg.norm(up) > 0.1 else np.eye(3)
    axes, positions = c2w[:, :, 2], c2w[:, :, 3]
    projectors = np.eye(3) - axes[:, :, None] * axes[:, None, :]  # onto the plane across each optical axis
    center = positions.mean(axis=0)
    if np.linalg.eigvalsh(projectors.mean(axis=0))[0] > LEAST_PARALLAX:
        center = np.linalg.solve(projectors.sum(axis=0), np.einsum("nij,nj->i", projectors, positions))
    else:
        warnings.append(
            f"{frames[0].where}: all cameras look the same way; the middle of their positions is the centre"
        )
    distance = float(np.linalg.norm(positions - center, axis=1).mean())
    scale = CAMERA_DISTANCE / distance if distance > 0.0 else 1.0
    x, y, z = 0.5 - scale * rotation @ center
    return Placement(scale, (float(x), float(y), float(z)), rotation)


def _rotation_to_z(unit: np.ndarray) -> np.ndarray:
    """The smallest rotation that turns a unit vector to +z (Rodrigues' formula)."""
    x, y, z = unit
    if z < -1.0 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    cross = np.array([[0.0, 0.0, -x], [0.0, 0.0, -y], [x, y, 0.0]])  # of unit x z-axis
    return np.eye(3) + cross + cross @ cross / (1.0 + z)


def _box_side(described: FrameSet, placement: Placement) -> int:
    """Power of two: the box around the unit cube's middle that holds the cameras and nearly all points."""
    if described.points is None:
        return DEFAULT_AABB_SCALE
    assert placement.rotation is not None
    offset = np.array(placement.offset)
    points = placement.scale * described.points @ placement.rotation.T + offset
    cameras = np.stack([placement.scale * placement.rotation @ frame.c2w[:, 3] + offset for frame in described.frames])
    reach = np.quantile(np.abs(points - 0.5).max(axis=1), POINTS_INSIDE)
    side = 2.0 * max(float(reach), float(np.abs(cameras - 0.5).max()))
    return int(2 ** np.clip(np.ceil(np.log2(side)), 0, np.log2(DEFAULT_AABB_SCALE)))


@dataclass(frozen=True)
class _Photo:
    pixels: np.ndarray  # (height, width, 4) uint8, downscaled
    full_size: tuple[int, int]  # width, height [px] of the file
    is_float: bool


def _load(frames: list[Frame], placement: Placement, aabb_scale: int, downscale: int, warnings: list[str]) -> Views:
    with ThreadPoolExecutor(threads()) as pool:
        read = list(pool.map(lambda frame: _read_photo(frame, downscale), frames))
    n_floats = sum(photo.is_float for photo in read)
    if n_floats:
        warnings.append(f"{n_floats} images of linear radiance are clipped to [0, 1] and sRGB-encoded to 8 bits")
    sizes = np.array([photo.pixels.shape[1::-1] for photo in read], np.int32)
    counts = sizes.astype(np.int64).prod(axis=1)
    first_pixel = np.cumsum(counts) - counts
    if counts.sum() > LARGEST_PIXELS:
        raise SceneError(
            f"{frames[0].where}: {counts.sum() / 1e9:.1f} billion pixels are too many; use a larger downscale"
        )
    pixels = np.empty(int(counts.sum()), np.uint32)
    intrinsics = [frame.intrinsics(*photo.full_size) for frame, photo in zip(frames, read, strict=True)]
    has_alpha = False
    for i in range(len(frames)):
        image = read[i].pixels
        read[i] = read[-1]  # its memory goes as its copy comes
        pixels[first_pixel[i] : first_pixel[i] + counts[i]] = image.view("<u4").reshape(-1)
        has_alpha = has_alpha or bool((image[:, :, 3] < 255).any())
    rotation = np.eye(3) if placement.rotation is None else placement.rotation
    c2w = placement.apply(np.stack([frame.c2w for frame in frames]))
    return Views(
        names=tuple(frame.name for frame in frames),
        pixels=pixels,
        first_pixel=first_pixel,
        sizes=sizes,
        has_alpha=has_alpha,
        c2w=c2w.astype(np.float32),
        focal=np.array([focal for focal, _ in intrinsics], np.float32) / downscale,
        center=np.array([center for _, center in intrinsics], np.float32) / downscale,
        distortion=np.array([frame.distortion for frame in frames], np.float32),
        model=np.array([frame.model for frame in frames], np.int32),
        aabb_scale=aabb_scale,
        scale=placement.scale,
        offset=np.array(placement.offset),
        rotation=rotation,
        warnings=tuple(warnings),
    )


def _read_photo(frame: Frame, downscale: int) -> _Photo:
    image = read_image(frame.path)
    is_float = image.dtype != np.uint8
    if is_float:
        if not np.isfinite(image).all():
            raise ImageError(f"{frame.path}: holds values that are not finite")
        image = to_srgb8(image)
    height, width, n_channels = image.shape
    alpha = image[:, :, -1:] if n_channels in (2, 4) else np.full((height, width, 1), 255, np.uint8)
    color = image[:, :, :3] if n_channels >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    pixels = np.concatenate([color, alpha], axis=2)
    if downscale > 1:
        if min(width, height) < downscale:
            raise ImageError(f"{frame.path}: {width}x{height} pixels are too few to downscale by {downscale}")
        pixels = _box_average(pixels, downscale)
    return _Photo(np.ascontiguousarray(pixels), (width, height), is_float)


def _box_average(pixels: np.ndarray, n: int) -> np.ndarray:
    """(height, width, 4) uint8 with straight alpha, averaged over boxes of n x n; colours weigh by their alpha."""
    height, width = pixels.shape[0] // n, pixels.shape[1] // n
    boxes = pixels[: height * n, : width * n].reshape(height, n, width, n, 4).astype(np.float32)
    alpha = boxes[..., 3:].sum(axis=(1, 3))
    color = (boxes[..., :3] * boxes[..., 3:]).sum(axis=(1, 3)) / np.maximum(alpha, 1.0)
    return (np.concatenate([color, alpha / n**2], axis=2) + 0.5).astype(np.uint8)


def _upload(
    pixels: np.ndarray,
    first_pixel: np.ndarray,
    sizes: np.ndarray,
    c2w: np.ndarray,
    focal: np.ndarray,
    center: np.ndarray,
    distortion: np.ndarray,
    model: np.ndarray,
    *,
    device: wp.Device,
) -> CamerasView:
    def array(values: np.ndarray, dtype: object) -> wp.array:
        kind = np.int32 if dtype in (int, wp.vec2i) else np.float32
        return wp.array(np.ascontiguousarray(values, kind), dtype=dtype, device=device)

    view = CamerasView()
    view.pixels = wp.array(pixels, dtype=wp.uint32, device=device, copy=False)  # shared on the CPU
    view.first_pixel = wp.array(np.asarray(first_pixel, np.int64), dtype=wp.int64, device=device)
    view.size = array(sizes, wp.vec2i)
    view.origin = array(c2w[:, :, 3], wp.vec3)
    view.rotation = array(c2w[:, :, :3], wp.mat33)
    view.focal = array(focal, wp.vec2)
    view.center = array(center, wp.vec2)
    view.distortion = array(distortion, vec6)
    view.model = array(model, int)
    view.n_images = len(first_pixel)
    return view
