"""Camera paths of scenes: keyframes that are added or recorded, a smooth way through them, and their JSON files.

A file holds keyframes as `nrc.fit.camera_path` reads them, with the lens, and saved views:

    {"keyframes": [{"transform_matrix": 4x4, "fov": degrees, "fov_axis": "x", "time": seconds, "aperture_radius": 0,
                    "focus_distance": 1}, ...],
     "views": {"name": {"transform_matrix": 4x4, ...}, ...}}

All but `transform_matrix` may be missing: fields of view are 50 degrees along x, times 0, 1, 2, ...; an array of
keyframes alone is a file too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation, Slerp

from nrc.assets.fields import SINGLE, Field
from nrc.files import write_atomically
from nrc.fit.camera_path import DEFAULT_FOV, FOV_RANGE
from nrc.fit.frame import rigid
from nrc.scene import Camera, SceneError

SPACING = 1.0  # [s] between keyframes added without a time
AXES = ("x", "y", "smaller", "larger")


@dataclass(frozen=True, eq=False)
class Keyframe:
    """A camera at a time [s] from the path's beginning."""

    camera: Camera
    time: float


class CameraPath:
    """Keyframes in order of time, the first at 0, and the cameras between them.

    Attributes:
        keyframes: Read it; `add` and `remove` change it.
    """

    def __init__(self, keyframes: list[Keyframe] | None = None) -> None:
        self.keyframes: list[Keyframe] = []
        self._curve: _Curve | None = None
        for keyframe in keyframes or []:
            self.add(keyframe.camera, keyframe.time)
        self._rebase()

    @property
    def times(self) -> list[float]:
        """Of the keyframes [s]."""
        return [keyframe.time for keyframe in self.keyframes]

    @property
    def duration(self) -> float:
        """Time [s] of the last keyframe; 0 without any."""
        return self.keyframes[-1].time if self.keyframes else 0.0

    def add(self, camera: Camera, time: float | None = None) -> None:
        """Append a keyframe, a second after the last by default. Raises ValueError unless its time comes after that."""
        if time is None:
            time = self.duration + SPACING if self.keyframes else 0.0
        if not math.isfinite(time) or (self.keyframes and time <= self.duration):
            raise ValueError(f"a keyframe at {time:g} s does not come after the one at {self.duration:g} s")
        self.keyframes.append(Keyframe(camera, float(time)))
        self._curve = None

    def remove(self, i: int) -> None:
        """Take out keyframe `i`; the path then begins with the first that is left. Raises IndexError."""
        del self.keyframes[i]
        self._rebase()

    def camera(self, time: float) -> Camera:
        """The camera at a time [s], clamped to the first and the last keyframe.

        Positions and lenses follow a Catmull-Rom spline through the keyframes (with the keyframes' own spacing in time;
        Barry and Goldman 1988), rotations the shortest arc between neighbours at constant speed. The axis of the field
        of view and whether the picture is mirrored are those of the keyframe before. The same time gives the same
        object again. Raises ValueError without keyframes.
        """
        if not self.keyframes:
            raise ValueError("a camera path without keyframes")
        times = self.times
        i = int(np.searchsorted(times, time, side="right")) - 1
        if i < 0 or i >= len(times) - 1 or time == times[i]:
            return self.keyframes[min(max(i, 0), len(times) - 1)].camera
        if self._curve is None:
            self._curve = _Curve(self.keyframes)
        return self._curve.camera(time, self.keyframes[i].camera)

    def cameras(self, n: int) -> list[Camera]:
        """`n` cameras evenly spread in time, the first and the last keyframe included."""
        return [self.camera(float(time)) for time in np.linspace(0.0, self.duration, n)]

    @staticmethod
    def read(file: str | os.PathLike[str]) -> tuple[CameraPath, dict[str, Camera]]:
        """The path and the saved views in a file.

        Raises:
            SceneError: The file cannot be read, holds neither, or holds a wrong type or an impossible pose; the message
                names the file and the field.
        """
        file = Path(file)
        try:
            text = file.read_bytes()
        except OSError as error:
            raise SceneError(f"{file}: {error.strerror}") from error
        if text.lstrip()[:1] == b"[":
            text = b'{"keyframes": ' + text + b"}"
        root = Field.parse(text, str(file))
        entries, views = root.get("keyframes"), root.get("views")
        if entries is None and views is None:
            raise SceneError(f"{file}: holds neither keyframes nor views")
        keyframes: list[Keyframe] = []
        for i, field in enumerate(entries.list() if entries is not None else []):
            stamp = field.get("time")
            time = float(i) if stamp is None else stamp.number()
            if keyframes and time <= keyframes[-1].time:
                raise field.error("its time does not come after the one before")
            keyframes.append(Keyframe(_read_camera(field), time))
        found = {} if views is None else {name: _read_camera(field) for name, field in views.members().items()}
        return CameraPath(keyframes), found

    def write(self, file: str | os.PathLike[str], views: Mapping[str, Camera] | None = None) -> None:
        """Write the path and saved views, in one step. Raises SceneError where the file cannot be written."""
        content: dict[str, Any] = {
            "keyframes": [_camera_json(keyframe.camera) | {"time": keyframe.time} for keyframe in self.keyframes],
            "views": {name: _camera_json(camera) for name, camera in (views or {}).items()},
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomically(Path(file), lambda temporary: temporary.write_text(text, encoding="utf-8"), SceneError)

    def _rebase(self) -> None:
        if self.keyframes and self.keyframes[0].time != 0.0:
            first = self.keyframes[0].time
            self.keyframes = [Keyframe(keyframe.camera, keyframe.time - first) for keyframe in self.keyframes]
        self._curve = None


class _Curve:
    """What is interpolated between two keyframes or more."""

    def __init__(self, keyframes: list[Keyframe]) -> None:
        times = np.array([keyframe.time for keyframe in keyframes])
        cameras = [keyframe.camera for keyframe in keyframes]
        values = np.array([[*c.to_world[:3, 3], c.fov, c.aperture_radius, c.focus_distance] for c in cameras])
        # Slopes of the parabola through a keyframe and its neighbours are those of the Catmull-Rom spline
        slopes = np.gradient(values, times, axis=0, edge_order=2 if len(times) > 2 else 1)
        self._values = CubicHermiteSpline(times, values, slopes)
        self._last: tuple[float, Camera] | None = None
        self._low, self._high = values.min(axis=0), values.max(axis=0)
        self._rotation = Slerp(times, Rotation.from_matrix(np.stack([_rotation(c.to_world)[0] for c in cameras])))

    def camera(self, time: float, before: Camera) -> Camera:
        if self._last is None or self._last[0] != time:
            self._last = (time, self._between(time, before))
        return self._last[1]

    def _between(self, time: float, before: Camera) -> Camera:
        values = self._values(time)
        _, fov, aperture_radius, focus_distance = values[2:]
        to_world = np.eye(4)
        to_world[:3, :3] = self._rotation(time).as_matrix() * (_rotation(before.to_world)[1], 1.0, 1.0)
        to_world[:3, 3] = values[:3]
        return Camera(
            to_world,
            fov=float(np.clip(fov, *FOV_RANGE)),
            fov_axis=before.fov_axis,
            aperture_radius=float(np.clip(aperture_radius, self._low[4], self._high[4])),
            focus_distance=float(np.clip(focus_distance, self._low[5], self._high[5])),
        )


def _camera_json(camera: Camera) -> dict[str, Any]:
    rotation, mirror = _rotation(camera.to_world)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation * (mirror, 1.0, 1.0), camera.to_world[:3, 3]
    return {
        "transform_matrix": matrix.tolist(),
        "fov": float(camera.fov),
        "fov_axis": camera.fov_axis,
        "aperture_radius": float(camera.aperture_radius),
        "focus_distance": float(camera.focus_distance),
    }


def _read_camera(field: Field) -> Camera:
    rows = field.need("transform_matrix")
    found = rows.list()
    if len(found) not in (3, 4):
        raise rows.wrong("4 rows of 4 numbers")
    matrix = np.array([row.vector(4) for row in found[:3]])
    mirror = -1.0 if np.linalg.det(matrix[:, :3]) < 0.0 else 1.0
    to_world = np.eye(4)
    to_world[:3] = rigid(matrix * (mirror, 1.0, 1.0, 1.0), f"{rows.file}: {rows.path}") * (mirror, 1.0, 1.0, 1.0)
    fov, axis, aperture, focus = (field.get(key) for key in ("fov", "fov_axis", "aperture_radius", "focus_distance"))
    return Camera(
        to_world,
        fov=DEFAULT_FOV if fov is None else fov.number(*FOV_RANGE),
        fov_axis="x" if axis is None else axis.string(AXES),  # type: ignore[arg-type]
        aperture_radius=0.0 if aperture is None else aperture.number(0.0, SINGLE),
        focus_distance=1.0 if focus is None else focus.number(1e-30, SINGLE),
    )


def _rotation(to_world: np.ndarray) -> tuple[np.ndarray, float]:
    """Axes of a camera as a rotation (3, 3), after a factor of the first, -1 where the picture is mirrored."""
    axes = np.asarray(to_world, float)[:3, :3]
    axes = axes / np.linalg.norm(axes, axis=0)
    mirror = -1.0 if np.linalg.det(axes) < 0.0 else 1.0
    return axes * (mirror, 1.0, 1.0), mirror
