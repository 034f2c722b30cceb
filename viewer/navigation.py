"""`Navigation`: motions of a camera in three dimensions. What a drag or a key means is said elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nrc.scene import Camera

ORBIT = math.pi  # [rad] for a drag across the viewport's height
WHEEL = 0.9  # factor of the distance to the pivot per notch
MOST_NOTCHES = 50.0  # at once
STEEPEST = math.radians(89.0)  # above and below the horizon
DISTANCES = (1e-6, 1e3)  # least and largest distance to the pivot, relative to the scene's size
FOVS = (1e-3, 179.0)  # [deg]
SPEED = 0.25  # of the scene's size per second
FAST = 4.0  # factor of the speed
LEVEL = 1e-6  # [rad] of roll that is none


class Navigation:
    """Moves a camera about a scene. For one thread.

    The camera looks at a pivot from some distance. Its turn is a yaw about `up`, an elevation above the horizon and a
    roll, which no motion changes: a level camera stays level, another keeps its tilt without a jump. A camera that
    mirrors the picture goes on mirroring it. Drags go right and down, in the units of the viewport's `width` and
    `height`. Where `width` is left out the viewport counts as square, which is wrong for `look` and `pan` unless the
    field of view is along y.

    Args:
        camera: To start from.
        bounds: Lower and upper corner of the scene, (3,) each. Their diagonal is the scale of speed and distances.
        up: (3,), the axis that stays vertical.

    Attributes:
        version: Grows when the camera changes; one that is exactly equal is no change.
        speed: Factor of the speed of flight, 1 by default.
        views: Saved cameras by name.
    """

    def __init__(
        self,
        camera: Camera,
        bounds: tuple[np.ndarray, np.ndarray],
        up: Sequence[float] | np.ndarray = (0.0, 1.0, 0.0),
    ) -> None:
        self.version, self.speed = 0, 1.0
        self.views: dict[str, Camera] = {}
        self._distances: dict[str, tuple[Camera, float]] = {}  # saved views and how far their pivots were
        self._bounds = np.asarray(bounds[0], float), np.asarray(bounds[1], float)
        self._up, self._east, self._north = _upright(np.asarray(up, float))
        size = float(np.linalg.norm(self._bounds[1] - self._bounds[0]))
        if not (math.isfinite(size) and size > 0.0):
            away = float(np.linalg.norm(self._bounds[0] - camera.to_world[:3, 3]))
            size = away if math.isfinite(away) and away > 0.0 else camera.focus_distance
        self._size = size
        self._initial = self._camera = camera
        self._pivot, self._distance = np.zeros(3), 1.0
        self._yaw = self._elevation = self._roll = 0.0  # [rad]
        self._mirror = 1.0  # -1 where the picture is mirrored
        self._take_pose(None)

    @property
    def camera(self) -> Camera:
        """The camera now; the same object as long as it does not change."""
        return self._camera

    @property
    def pivot(self) -> np.ndarray:
        """(3,) the point that the camera looks at and turns about."""
        return self._pivot.copy()

    @property
    def distance(self) -> float:
        """Of the camera from the pivot."""
        return self._distance

    # --- motions -----------------------------------------------------------------------------------------------------

    def orbit(self, dx: float, dy: float, height: float) -> None:
        """Turn about the pivot: the scene's near side follows a drag, half a turn for the viewport's height."""
        self._turn(dx, dy, -ORBIT / height)

    def look(self, dx: float, dy: float, height: float, width: float | None = None) -> None:
        """Turn about the eye: what is in the middle of the picture follows a drag."""
        eye, per_unit = self._eye, self._per_unit(height, width)
        self._turn(dx, dy, per_unit, eye)

    def pan(self, dx: float, dy: float, height: float, width: float | None = None) -> None:
        """Move across the view: what is as deep as the pivot follows a drag exactly."""
        axes, per_unit = self._axes, self._distance * self._per_unit(height, width)
        self._shift(-dx * per_unit * axes[:, 0] + dy * per_unit * axes[:, 1])

    def dolly(self, notches: float) -> None:
        """Move towards the pivot, or away where negative: each notch by the same factor, fractions too."""
        if not math.isfinite(notches) or notches == 0.0:
            return
        distance = self._distance * WHEEL ** min(max(notches, -MOST_NOTCHES), MOST_NOTCHES)
        least, largest = DISTANCES
        least, largest = min(least * self._size, self._distance), max(largest * self._size, self._distance)
        self._distance = min(max(distance, least), largest)
        self._place()

    def fly(self, right: float, up: float, forward: float, seconds: float, *, fast: bool = False) -> None:
        """Move along the view's axes for some time; a direction longer than 1 is shortened to 1."""
        direction = np.array([right, up, -forward])
        direction = direction / max(1.0, float(np.linalg.norm(direction)))
        self._shift(self.speed * (FAST if fast else 1.0) * SPEED * self._size * seconds * (self._axes @ direction))

    def focus(self, point: Sequence[float] | np.ndarray) -> None:
        """Turn to a point, make it the pivot, and focus the lens on it; nothing if it is not finite or at the eye."""
        target, eye = np.asarray(point, float), self._eye
        back = eye - target
        distance = float(np.linalg.norm(back))
        if not (math.isfinite(distance) and distance > 1e-12 * (self._size + float(np.abs(eye).max()))):
            return
        self._yaw, self._elevation = self._angles(back / distance, self._yaw)
        self._pivot, self._distance = target.copy(), distance
        self._place(focus_distance=distance)

    # --- lens --------------------------------------------------------------------------------------------------------

    def set_fov(self, degrees: float) -> None:
        """Field of view along the camera's own axis, held within 0.001...179 degrees."""
        if math.isfinite(degrees):
            self._show(replace(self._camera, fov=min(max(float(degrees), FOVS[0]), FOVS[1])))

    def set_aperture(self, radius: float) -> None:
        """Radius of the lens in scene units; 0 or less is a pinhole."""
        if math.isfinite(radius):
            self._show(replace(self._camera, aperture_radius=max(float(radius), 0.0)))

    def set_focus_distance(self, distance: float) -> None:
        """Depth of the plane in focus in scene units; nothing if it is not positive."""
        if math.isfinite(distance) and distance > 0.0:
            self._show(replace(self._camera, focus_distance=float(distance)))

    # --- whole cameras -----------------------------------------------------------------------------------------------

    def set_camera(self, camera: Camera) -> None:
        """Go to another camera; its pivot is found as the first one's was."""
        self._show(camera)
        self._take_pose(None)

    def reset(self) -> None:
        """Go back to the first camera."""
        self.set_camera(self._initial)

    def save(self, name: str) -> None:
        """Keep the camera under a name, in place of an older one."""
        self.views[name], self._distances[name] = self._camera, (self._camera, self._distance)

    def recall(self, name: str) -> None:
        """Go to a saved camera. Raises KeyError."""
        camera = self.views[name]
        self._show(camera)
        saved, distance = self._distances.get(name, (None, None))
        self._take_pose(distance if saved is camera else None)

    def delete(self, name: str) -> None:
        """Forget a saved camera. Raises KeyError."""
        del self.views[name]
        self._distances.pop(name, None)

    # --- pose --------------------------------------------------------------------------------------------------------

    @property
    def _axes(self) -> np.ndarray:
        """(3, 3): columns right (of the picture, mirrored where that is), up, backwards."""
        axes = self._rotation
        axes[:, 0] *= self._mirror
        return axes

    @property
    def _rotation(self) -> np.ndarray:
        sin, cos = math.sin(self._yaw), math.cos(self._yaw)
        level, flat = cos * self._north - sin * self._east, cos * self._east + sin * self._north
        back = math.cos(self._elevation) * flat + math.sin(self._elevation) * self._up
        top = math.cos(self._elevation) * self._up - math.sin(self._elevation) * flat
        sin, cos = math.sin(self._roll), math.cos(self._roll)
        return np.stack([cos * level + sin * top, cos * top - sin * level, back], axis=1)

    @property
    def _eye(self) -> np.ndarray:
        return self._pivot + self._distance * self._rotation[:, 2]

    def _per_unit(self, height: float, width: float | None) -> float:
        """Tangent of the angle that a unit of a drag covers in the middle of the picture."""
        half_height = self._camera.half_extents(height if width is None else width, height)[1]  # type: ignore[arg-type]
        return 2.0 * half_height / height

    def _turn(self, dx: float, dy: float, angle: float, eye: np.ndarray | None = None) -> None:
        """Turn by `angle` [rad] per unit, left for a drag to the right, up for one down; about the pivot or `eye`."""
        if not (math.isfinite(dx) and math.isfinite(dy)) or dx == dy == 0.0:
            return
        sin, cos = math.sin(self._roll), math.cos(self._roll)
        dx *= self._mirror
        along, down = cos * dx + sin * dy, cos * dy - sin * dx  # the horizon
        self._yaw = math.remainder(self._yaw + angle * along, 2.0 * math.pi)
        # A camera that is steeper may stay so
        least, largest = min(-STEEPEST, self._elevation), max(STEEPEST, self._elevation)
        self._elevation = min(max(self._elevation - angle * down, least), largest)
        if eye is not None:
            self._pivot = eye - self._distance * self._rotation[:, 2]
        self._place()

    def _shift(self, offset: np.ndarray) -> None:
        if np.isfinite(offset).all() and offset.any():
            self._pivot = self._pivot + offset
            self._place()

    def _place(self, **lens: float) -> None:
        to_world = np.eye(4)
        to_world[:3, :3], to_world[:3, 3] = self._axes, self._eye
        self._show(replace(self._camera, to_world=to_world, **lens))  # type: ignore[arg-type]

    def _show(self, camera: Camera) -> None:
        if not same_camera(camera, self._camera):
            self._camera = camera
            self.version += 1

    def _take_pose(self, distance: float | None) -> None:
        """Pivot, distance and angles of the camera, whose axes may be scaled, skewed a little, or mirrored."""
        matrix = np.asarray(self._camera.to_world, float)
        back = matrix[:3, 2] / (np.linalg.norm(matrix[:3, 2]) or 1.0)
        right = np.cross(matrix[:3, 1], back)
        right /= np.linalg.norm(right) or 1.0
        top = np.cross(back, right)
        self._mirror = -1.0 if float(right @ matrix[:3, 0]) < 0.0 else 1.0
        steep = math.atan2(-float(top @ self._north), -float(top @ self._east))  # of a camera that looks straight down
        self._yaw, self._elevation = self._angles(back, steep if float(back @ self._up) > 0.0 else steep + math.pi)
        self._roll = 0.0
        level = self._rotation
        roll = math.atan2(float(right @ level[:, 1]), float(right @ level[:, 0]))
        self._roll = roll if abs(roll) > LEVEL else 0.0
        eye = matrix[:3, 3]
        self._distance = distance or self._pivot_distance(eye, -back)
        self._pivot = eye - self._distance * back

    def _angles(self, back: np.ndarray, steep: float) -> tuple[float, float]:
        """Yaw and elevation [rad] of a unit vector; the yaw is `steep` where the vector is vertical."""
        x, y, z = (float(back @ axis) for axis in (self._east, self._north, self._up))
        flat = math.hypot(x, y)
        return (math.atan2(y, x) if flat > 1e-9 else steep), math.atan2(z, flat)

    def _pivot_distance(self, eye: np.ndarray, forward: np.ndarray) -> float:
        """Half-way through the scene's box along the view; beside the box, the depth of its middle."""
        low, high = self._bounds
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return self._size
        with np.errstate(divide="ignore", invalid="ignore"):
            crossings = np.array([(low - eye) / forward, (high - eye) / forward])
        near = max(0.0, float(np.nanmax(crossings.min(axis=0))))
        far = float(np.nanmin(crossings.max(axis=0)))
        depth = 0.5 * (near + far) if far > near else float((0.5 * (low + high) - eye) @ forward)
        return depth if math.isfinite(depth) and depth > 1e-3 * self._size else self._size


def same_camera(a: Camera, b: Camera) -> bool:
    """Whether two cameras are exactly equal."""
    if a is b:
        return True
    lens = [(c.fov, c.fov_axis, c.aperture_radius, c.focus_distance) for c in (a, b)]
    return lens[0] == lens[1] and np.array_equal(a.to_world, b.to_world)


def _upright(up: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`up`, (0, 1, 0) if it has no direction, and two horizontal axes: right-handed as (second, third, first)."""
    length = float(np.linalg.norm(up))
    unit = up / length if math.isfinite(length) and length > 0.0 else np.array([0.0, 1.0, 0.0])
    east = np.eye(3)[int(np.argmin(np.abs(unit)))]
    east = east - (east @ unit) * unit
    east /= np.linalg.norm(east)
    return unit, east, np.cross(unit, east)
