"""`transforms.json`: cameras of photographs as NeRF-synthetic, instant-ngp and nerfstudio write them.

Keys read, at the top or in a frame, where a frame's own win:

    file_path           image, relative to the JSON file; `.png` and other extensions are tried where it has none
    transform_matrix    4x4 camera to world: columns right, up, backwards, position
    camera_angle_x, camera_angle_y [rad], fl_x, fl_y, cx, cy [px], w, h [px]
    k1, k2, k3, k4, p1, p2              distortion; k1...k4 of the fisheye model where `is_fisheye` or the model says so
    camera_model        SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV, OPENCV_FISHEYE
    aabb_scale, scale, offset, aabb     instant-ngp's placement in the unit cube
    train_filenames, test_filenames     nerfstudio's split

A file with any of instant-ngp's placement keys is placed as they say (scale 0.33, offset 0.5, aabb_scale 1 where one
is missing); so is one with nothing but fields of view, as NeRF-synthetic has. Others have an unknown scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nrc.assets.fields import Field
from nrc.fit.frame import OPENCV, OPENCV_FISHEYE, PINHOLE, Frame, FrameSet, Placement, rigid
from nrc.image import BYTE_EXTENSIONS, FLOAT_EXTENSIONS
from nrc.scene import SceneError

DEFAULT_SCALE = 0.33  # instant-ngp's NERF_SCALE: NeRF-synthetic's box of size 3 fits into the unit cube
LARGEST_AABB_SCALE = 128
PLACEMENT_KEYS = ("aabb_scale", "scale", "offset", "aabb")
PINHOLE_MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")
FOREIGN_LENSES = ("ftheta_p0", "latlong", "equirectangular", "orthographic")  # instant-ngp's other lenses
UNUSED_KEYS = ("mask_path", "rolling_shutter", "envmap", "white_transparent", "black_transparent", "render_aabb")
TRY_EXTENSIONS = (*BYTE_EXTENSIONS, *FLOAT_EXTENSIONS)


def read_transforms(path: Path) -> FrameSet:
    """Frames of a transforms file, and of `transforms_test.json` beside it.

    Raises:
        SceneError: A file cannot be read, is no JSON, lacks a key, or holds a wrong type, an unsupported lens or a
            matrix that is no camera's; the message names file and field.
    """
    root = _parse(path)
    warnings: list[str] = []
    frames = _frames(root, path, warnings)
    test_path = path.with_name("transforms_test.json")
    test_frames: Iterable[Frame] | None = None
    if test_path.is_file() and test_path != path:
        test_frames = _frames(_parse(test_path), test_path, warnings)
    elif root.get("test_filenames") is not None:
        test_names = {_clean(field.string()) for field in root.list("test_filenames")}
        train_names = {_clean(field.string()) for field in root.list("train_filenames")}
        test_frames = [frame for frame in frames if frame.name in test_names]
        kept = [frame for frame in frames if frame.name not in test_names]
        frames = [frame for frame in kept if frame.name in train_names] if train_names else kept
    return FrameSet(
        source=path,
        frames=tuple(frames),
        test_frames=None if test_frames is None else tuple(test_frames),
        placement=_placement(root, frames),
        aabb_scale=_aabb_scale(root),
        warnings=tuple(warnings),
    )


def _parse(path: Path) -> Field:
    try:
        return Field.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise SceneError(f"{path}: {error.strerror}") from error


def _frames(root: Field, path: Path, warnings: list[str]) -> list[Frame]:
    entries = root.need("frames").list()
    if not entries:
        raise SceneError(f"{path}: frames: is empty")
    frames = [_Scopes(field, root).frame(path) for field in entries]
    for key in UNUSED_KEYS:
        n = sum(bool(field.value.get(key)) for field in (root, *entries))
        if n:
            warnings.append(f"{path}: {key} is ignored" + (f" (of {n} frames)" if n > 1 else ""))
    return frames


def _clean(file_path: str) -> str:
    return file_path.replace("\\", "/").removeprefix("./")


def _image_path(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file() or path.suffix.lower() in TRY_EXTENSIONS:
        return path
    candidates = [path.with_name(path.name + extension) for extension in (".png", *TRY_EXTENSIONS)]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


class _Scopes:
    """A frame and the top of its file, looked through in this order."""

    def __init__(self, field: Field, root: Field) -> None:
        field.check_object()
        self.field, self.scopes = field, (field, root)

    def get(self, key: str) -> Field | None:
        return next((member for scope in self.scopes if (member := scope.get(key)) is not None), None)

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        field = self.get(key)
        return None if field is None else field.number(low, high)

    def positive(self, key: str) -> float | None:
        return self.number(key, low=1e-30)

    def frame(self, path: Path) -> Frame:
        field = self.field
        name = _clean(field.need("file_path").string())
        if not Path(name).name:
            raise field.child("file_path").wrong("the path of an image")
        matrix = field.need("transform_matrix")
        focal, angle = self._focal()
        cx, cy = self.number("cx"), self.number("cy")
        model, distortion = self._lens()
        return Frame(
            name=name,
            path=_image_path(path.parent, name),
            c2w=rigid(_matrix(matrix), f"{path}: {matrix.path}"),
            where=f"{path}: {field.path}",
            focal=focal,
            angle=angle,
            center=None if cx is None or cy is None else (cx, cy),
            size=self._size(),
            model=model,
            distortion=distortion,
        )

    def _size(self) -> tuple[int, int] | None:
        sizes = []
        for key in ("w", "h"):
            field = self.get(key)
            if field is None:
                return None
            number = field.number(1.0)
            if number != int(number):
                raise field.wrong("a whole number of pixels")
            sizes.append(int(number))
        return sizes[0], sizes[1]

    def _focal(self) -> tuple[tuple[float, float] | None, tuple[float, float | None] | None]:
        for scope in self.scopes:
            one = _Scopes(scope, scope)
            fx, fy = one.positive("fl_x"), one.positive("fl_y")
            if fx is not None or fy is not None:
                first, second = fx if fx is not None else fy, fy if fy is not None else fx
                assert first is not None and second is not None
                return (first, second), None
            angle_x = one.number("camera_angle_x", 1e-6, math.pi - 1e-6)
            if angle_x is not None:
                return None, (angle_x, one.number("camera_angle_y", 1e-6, math.pi - 1e-6))
        raise self.field.error("fl_x or camera_angle_x is missing, here and at the top of the file")

    def _lens(self) -> tuple[int, tuple[float, float, float, float, float, float]]:
        for key in FOREIGN_LENSES:
            field = self.get(key)
            if field is not None and field.value is not False:
                raise field.error("this lens is not supported; pinhole, OPENCV and OPENCV_FISHEYE are")
        field = self.get("camera_model")
        name = None if field is None else field.string((*PINHOLE_MODELS, "OPENCV_FISHEYE"))
        k1, k2, k3, k4, p1, p2 = (self.number(key) or 0.0 for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
        is_fisheye = self.get("is_fisheye")
        if name == "OPENCV_FISHEYE" or (name is None and is_fisheye is not None and is_fisheye.boolean()):
            return OPENCV_FISHEYE, (k1, k2, k3, k4, 0.0, 0.0)
        distortion = (k1, k2, k3, k4, p1, p2)
        return (OPENCV if any(distortion) else PINHOLE), distortion


def _matrix(field: Field) -> np.ndarray:
    rows = field.list()
    if len(rows) not in (3, 4):
        raise field.wrong("4 rows of 4 numbers")
    matrix = np.array([row.vector(4) for row in rows])
    if len(rows) == 4 and not np.allclose(matrix[3], (0.0, 0.0, 0.0, 1.0), atol=1e-6):
        raise rows[3].wrong("[0, 0, 0, 1]")
    return matrix


def _placement(root: Field, frames: list[Frame]) -> Placement | None:
    given = any(root.get(key) is not None for key in PLACEMENT_KEYS)
    synthetic = root.get("camera_model") is None and all(frame.focal is None for frame in frames)
    if not (given or synthetic):
        return None
    box = root.get("aabb")
    if box is not None:  # mapped to the unit cube's middle, its longest side to 1
        corners = box.list()
        if len(corners) != 2:
            raise box.wrong("two corners of 3 numbers")
        low, high = (np.array(corner.vec3()) for corner in corners)
        longest = float(np.abs(high - low).max())
        if longest <= 0.0:
            raise box.error("has no size")
        x, y, z = 0.5 - 0.5 * (low + high) / longest
        return Placement(1.0 / longest, (float(x), float(y), float(z)))
    scale = _Scopes(root, root).positive("scale")
    offset = root.get("offset")
    placed = (0.5, 0.5, 0.5)
    if offset is not None:
        placed = offset.vec3() if isinstance(offset.value, list) else (offset.number(),) * 3
    return Placement(DEFAULT_SCALE if scale is None else scale, placed)


def _aabb_scale(root: Field) -> int | None:
    field = root.get("aabb_scale")
    if field is None:
        return None
    scale = field.number()
    if scale not in [2**i for i in range(8)]:
        raise field.wrong(f"a power of two from 1 to {LARGEST_AABB_SCALE}")
    return int(scale)
