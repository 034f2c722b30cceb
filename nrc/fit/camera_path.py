"""Camera paths: keyframes from a JSON file, a smooth path through them, and its frames as pictures.

Three kinds of files are read:

    {"keyframes": [{"transform_matrix": 4x4, "fov": degrees, "time": seconds}, ...]}, or the array alone
        Poses in the data's own world, as in transforms.json; fields of view are horizontal, 50 where missing; times are
        0, 1, 2, ... where missing.
    {"path": [{"R": quaternion x, y, z, w, "T": position, "fov": degrees}, ...]}
        instant-ngp's `base_cam.json`: in its unit cube, whose axes are the world's y, z, x; vertical fields of view.
    {"camera_path": [{"camera_to_world": 16 numbers, "fov": degrees}, ...]}
        nerfstudio's: poses are taken to be in the data's own world; vertical fields of view.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation, Slerp

from nrc.assets.fields import Field
from nrc.fit.frame import Placement, rigid
from nrc.fit.views import Camera
from nrc.image import write_image
from nrc.scene import SceneError

DEFAULT_FOV = 50.0  # degrees
FOV_RANGE = (1e-3, 179.0)  # degrees


@dataclass(frozen=True)
class CameraPath:
    """Keyframes of a camera in unit-cube space.

    Attributes:
        times: (n,) strictly increasing.
        c2w: (n, 3, 4): columns right, up, backwards (orthonormal), position.
        fov: (n,) field of view [rad].
        vertical: Whether `fov` is across the picture's height instead of its width.
    """

    times: np.ndarray
    c2w: np.ndarray
    fov: np.ndarray
    vertical: bool = False

    def camera(self, time: float, width: int, height: int) -> Camera:
        """The camera at a time, clamped to the first and the last keyframe.

        Positions and fields of view follow a Catmull-Rom spline through the keyframes (with the keyframes' own spacing
        in time; Barry and Goldman 1988), rotations the shortest arc between neighbours at constant speed.
        """
        t = float(np.clip(time, self.times[0], self.times[-1]))
        c2w, fov = self.c2w[0], float(self.fov[0])
        if len(self.times) > 1:
            values = np.concatenate([self.c2w[:, :, 3], self.fov[:, None]], axis=1)
            spline = CubicHermiteSpline(self.times, values, _slopes(self.times, values))(t)
            rotation = Slerp(self.times, Rotation.from_matrix(self.c2w[:, :, :3]))(t).as_matrix()
            c2w, fov = np.concatenate([rotation, spline[:3, None]], axis=1), float(spline[3])
        fov = float(np.clip(fov, *np.radians(FOV_RANGE)))
        if self.vertical:
            fov = 2.0 * math.atan(width / height * math.tan(0.5 * fov))
        return Camera.from_fov(c2w, width, height, fov)

    def cameras(self, n: int, width: int, height: int) -> list[Camera]:
        """`n` cameras evenly spread in time, the first and the last keyframe included."""
        return [self.camera(time, width, height) for time in np.linspace(self.times[0], self.times[-1], n)]


def read_camera_path(path: str | os.PathLike[str], placement: Placement) -> CameraPath:
    """The keyframes of a file, in unit-cube space.

    Args:
        placement: Of the data's world, `Views.placement`.

    Raises:
        SceneError: The file cannot be read, is of none of the three kinds, or holds a wrong type or an impossible pose;
            the message names the file and the field.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SceneError(f"{path}: {error.strerror}") from error
    if text.lstrip()[:1] == b"[":
        text = b'{"keyframes": ' + text + b"}"
    root = Field.parse(text, str(path))
    for key, read in (("keyframes", _own), ("path", _instant_ngp), ("camera_path", _nerfstudio)):
        entries = root.get(key)
        if entries is None:
            continue
        fields = entries.list()
        if not fields:
            raise entries.error("is empty")
        poses, fovs, times = zip(*(read(field, placement) for field in fields), strict=True)
        stamps = np.array([i if time is None else time for i, time in enumerate(times)], np.float64)
        late = np.flatnonzero(np.diff(stamps) <= 0.0)
        if len(late):
            raise fields[int(late[0]) + 1].error("its time does not come after the one before")
        return CameraPath(stamps, np.stack(poses), np.radians(fovs), vertical=key != "keyframes")
    raise SceneError(f"{path}: holds no keyframes, path (instant-ngp) or camera_path (nerfstudio)")


def write_frames(
    cameras: list[Camera],
    render: Callable[[Camera], np.ndarray],
    folder: str | os.PathLike[str],
    report: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write what `render` makes of each camera, (height, width, 3) uint8, as `frame_0000.png`, `frame_0001.png`, ...

    Args:
        report: Called after each frame with its number.

    Raises:
        ImageError: A file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, camera in enumerate(cameras):
        paths.append(folder / f"frame_{i:04d}.png")
        write_image(paths[-1], render(camera))
        if report is not None:
            report(i)
    return paths


def between(a: np.ndarray, b: np.ndarray, u: float) -> np.ndarray:
    """The pose (3, 4) at `u` in [0, 1] on the straight way from pose `a` to `b`, turning at constant speed."""
    rotation = Slerp([0.0, 1.0], Rotation.from_matrix(np.stack([a[:, :3], b[:, :3]])))(u).as_matrix()
    return np.concatenate([rotation, (1.0 - u) * a[:, 3:] + u * b[:, 3:]], axis=1)


def _slopes(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Derivatives of the non-uniform Catmull-Rom spline: of the parabola through each keyframe and its neighbours."""
    steps = np.diff(times)[:, None]
    secants = np.diff(values, axis=0) / steps
    if len(times) == 2:
        return np.repeat(secants, 2, axis=0)
    inner = (secants[:-1] * steps[1:] + secants[1:] * steps[:-1]) / (steps[:-1] + steps[1:])
    return np.concatenate([2.0 * secants[:1] - inner[:1], inner, 2.0 * secants[-1:] - inner[-1:]])


def _own(field: Field, placement: Placement) -> tuple[np.ndarray, float, float | None]:
    rows = field.need("transform_matrix")
    matrix = np.array([row.vector(4) for row in _n_rows(rows)])
    fov, time = field.get("fov"), field.get("time")
    return (
        _placed(matrix, placement, rows),
        DEFAULT_FOV if fov is None else fov.number(*FOV_RANGE),
        None if time is None else time.number(),
    )


def _n_rows(rows: Field) -> list[Field]:
    found = rows.list()
    if len(found) not in (3, 4):
        raise rows.wrong("4 rows of 4 numbers")
    return found[:3]


def _instant_ngp(field: Field, placement: Placement) -> tuple[np.ndarray, float, None]:
    quaternion = np.array(field.need("R").vector(4))
    if not np.linalg.norm(quaternion) > 1e-6:
        raise field.child("R").wrong("a quaternion")
    # Its cameras look along +z with y down; its axes are the world's y, z, x (NerfDataset::nerf_matrix_to_ngp)
    rotation = Rotation.from_quat(quaternion).as_matrix() * (1.0, -1.0, -1.0)
    position = np.array(field.need("T").vec3())[:, None]
    c2w = np.concatenate([rotation, position], axis=1)[[2, 0, 1]]
    fov = field.get("fov")
    return c2w, DEFAULT_FOV if fov is None else fov.number(*FOV_RANGE), None


def _nerfstudio(field: Field, placement: Placement) -> tuple[np.ndarray, float, None]:
    member = field.need("camera_to_world")
    matrix = np.array(member.vector(16)).reshape(4, 4)
    fov = field.get("fov")
    return _placed(matrix[:3], placement, member), DEFAULT_FOV if fov is None else fov.number(*FOV_RANGE), None


def _placed(matrix: np.ndarray, placement: Placement, field: Field) -> np.ndarray:
    return placement.apply(rigid(matrix, f"{field.file}: {field.path}"))
