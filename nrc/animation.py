"""`Animation`: how a scene changes over time, as frozen host data, and the scene at a moment.

An animation is a list of parts over a tree of moving nodes. A part says what a few fields of one object of the scene
are at a time: a `Placement` where an instance, camera, light or environment stands, a `Deformation` the vertices of a
mesh, a `Value` one number or colour. Everything else of the scene stays the very same objects, so that a renderer can
tell by identity what it has to upload again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from scipy.sparse import csr_matrix

from nrc.scene import Mesh, Scene, SceneError
from nrc.transforms import cofactors, look_at, rigid, trs, turn, unit, vec3

Interpolation = Literal["linear", "step", "cubic"]
Worlds = Sequence[np.ndarray] | Mapping[int, np.ndarray]  # matrix (4, 4) of each node
INTERPOLATIONS = ("linear", "step", "cubic")
BOUNDS_SAMPLES = 33  # poses, evenly spread over the duration, whose boxes make `Animation.bounds`
# What each animated number may be: a cubic swings past its keys
LIMITS = {
    "emission": (0.0, np.inf),
    "intensity": (0.0, np.inf),
    "irradiance": (0.0, np.inf),
    "scale": (0.0, np.inf),
    "fov": (1e-3, 179.0),
    "aperture_radius": (0.0, np.inf),
    "focus_distance": (1e-9, np.inf),
}


# Numbers over time


@dataclass(frozen=True, eq=False)
class Track:
    """A value over time, constant before the first and after the last key.

    Attributes:
        times: (n,) strictly increasing [s].
        values: (n, ...) value at each.
        interpolation: "linear" (the shortest arc at constant speed for rotations), "step" (the value of the key before)
            or "cubic" (Hermite spline, brought to length 1 for rotations; glTF 2.0 appendix C).
        slopes: Derivatives [1/s] that a cubic has before and after each key, (n, ...) each.
        rotation: Whether values are quaternions (x, y, z, w).
    """

    times: np.ndarray
    values: np.ndarray
    interpolation: Interpolation = "linear"
    slopes: tuple[np.ndarray, np.ndarray] | None = None
    rotation: bool = False

    def __post_init__(self) -> None:
        for name in ("times", "values"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), float))
        if self.slopes is not None:
            before, after = self.slopes
            object.__setattr__(self, "slopes", (np.asarray(before, float), np.asarray(after, float)))
        n = np.size(self.times)
        if n == 0 or self.times.shape != (n,) or self.values.shape[:1] != (n,):
            got = f"{self.times.shape} and {self.values.shape}"
            raise ValueError(f"a track needs as many times as values and at least one, got shapes {got}")
        if not np.isfinite(self.times).all() or (np.diff(self.times) <= 0.0).any():
            raise ValueError("the times of a track must increase")
        if not all(np.isfinite(values).all() for values in (self.values, *(self.slopes or ()))):
            raise ValueError("the values and slopes of a track must be finite")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; one of {', '.join(INTERPOLATIONS)}")
        shapes = [slope.shape for slope in self.slopes or ()]
        if self.interpolation == "cubic" and shapes != [self.values.shape] * 2:
            raise ValueError(f"a cubic track needs slopes {self.values.shape} before and after its keys, got {shapes}")

    @staticmethod
    def constant(value: Any, *, rotation: bool = False) -> Track:
        """The same value at all times."""
        return Track(np.zeros(1), np.asarray(value, float)[None], rotation=rotation)

    @staticmethod
    def smooth(times: np.ndarray, values: np.ndarray, *, rotation: bool = False) -> Track:
        """Cubic through the keys with the slopes of a Catmull-Rom spline, in the keys' own spacing.

        The slope at a key is that of the parabola through it and its neighbours (Barry and Goldman 1988).
        """
        times, values = np.asarray(times, float), np.array(values, float)
        if len(times) == 1:
            return Track(times, values, rotation=rotation)
        for i in range(1, len(values) if rotation else 0):  # a quaternion and its negative are the same rotation
            values[i] *= -1.0 if np.dot(values[i - 1], values[i]) < 0.0 else 1.0
        slopes = np.gradient(values, times, axis=0, edge_order=2 if len(times) > 2 else 1)
        return Track(times, values, "cubic", (slopes, slopes), rotation)

    @property
    def end(self) -> float:
        """When the last change is over [s]; 0 for a constant."""
        return float(self.times[-1]) if len(self.times) > 1 else 0.0

    def at(self, time: float) -> np.ndarray:
        """The value at a time [s], of the shape of one of `values`."""
        times, values = self.times, self.values
        i = max(int(np.searchsorted(times, time, side="right")) - 1, 0)
        if i == len(times) - 1 or time <= times[i] or self.interpolation == "step":
            value = values[i]
        else:
            step = float(times[i + 1] - times[i])
            u = (time - float(times[i])) / step
            if self.slopes is not None and self.interpolation == "cubic":
                value = _hermite(u, step, values[i], self.slopes[1][i], values[i + 1], self.slopes[0][i + 1])
            elif self.rotation:
                value = _slerp(u, values[i], values[i + 1])
            else:
                value = values[i] + u * (values[i + 1] - values[i])  # exact between equal keys
        return value / max(math.sqrt(float(np.dot(value, value))), 1e-12) if self.rotation else value


@dataclass(frozen=True, eq=False)
class Turn:
    """A turn around a fixed axis, of any number of revolutions.

    Attributes:
        axis: Unit vector.
        angle: Track of numbers [deg].
    """

    axis: tuple[float, float, float]
    angle: Track

    def __post_init__(self) -> None:
        if not abs(np.linalg.norm(self.axis) - 1.0) < 1e-6:
            raise ValueError(f"the axis of a turn must have length 1, got {self.axis}")

    @property
    def end(self) -> float:
        """When the last change is over [s]."""
        return self.angle.end

    def at(self, time: float) -> np.ndarray:
        """Quaternion at a time [s]."""
        return turn(np.asarray(self.axis), float(self.angle.at(time)))


@dataclass(frozen=True, eq=False)
class Gap:
    """The way from one moving point to another: its direction, or its length as a number."""

    origin: Track
    target: Track
    length: bool = False

    @property
    def end(self) -> float:
        """When the last change is over [s]."""
        return max(self.origin.end, self.target.end)

    def at(self, time: float) -> np.ndarray:
        """Vector (3,), or length, at a time [s]."""
        way = self.target.at(time) - self.origin.at(time)
        return np.asarray(np.linalg.norm(way)) if self.length else way


Curve = Track | Turn | Gap


# The tree of what moves. A node's `parent` is the index of an earlier one, or -1.


@dataclass(frozen=True, eq=False)
class Fixed:
    """A node with one affine (4, 4) matrix."""

    transform: np.ndarray
    parent: int = -1

    @property
    def end(self) -> float:
        """When the last change is over [s]."""
        return 0.0

    def matrix(self, _time: float) -> np.ndarray:
        """To the parent's space, (4, 4)."""
        return self.transform


@dataclass(frozen=True, eq=False)
class Trs:
    """A node that is scaled, then turned (quaternions or `Turn`), then moved."""

    translation: Track = field(default_factory=lambda: Track.constant((0.0, 0.0, 0.0)))
    rotation: Track | Turn = field(default_factory=lambda: Track.constant((0.0, 0.0, 0.0, 1.0), rotation=True))
    scale: Track = field(default_factory=lambda: Track.constant((1.0, 1.0, 1.0)))
    parent: int = -1

    @property
    def end(self) -> float:
        """When the last change is over [s]."""
        return max(self.translation.end, self.rotation.end, self.scale.end)

    def matrix(self, time: float) -> np.ndarray:
        """To the parent's space at a time [s], (4, 4)."""
        return trs(self.translation.at(time), self.rotation.at(time), self.scale.at(time))


@dataclass(frozen=True, eq=False)
class LookAt:
    """A node at `origin` whose +z points to `target` and +y towards `up`."""

    origin: Track
    target: Track
    up: tuple[float, float, float] = (0.0, 1.0, 0.0)
    parent: int = -1

    @property
    def end(self) -> float:
        """When the last change is over [s]."""
        return max(self.origin.end, self.target.end)

    def matrix(self, time: float) -> np.ndarray:
        """To the parent's space at a time [s], (4, 4)."""
        return look_at(self.origin.at(time), self.target.at(time), np.asarray(self.up))


Node = Fixed | Trs | LookAt


# What moves

Placed = Literal["instance", "camera", "light", "environment"]
Valued = Literal["camera", "light", "environment", "material"]


@dataclass(frozen=True, eq=False)
class Placement:
    """An object that stands on a node.

    Attributes:
        target: "instance", "camera" (kept rigid), "light" (its origin and -z) or "environment" (its rotation).
        index: Into the scene's tuple of these.
        node: Into the animation's nodes.
        offset: (4, 4), from the object's space to the node's.
        above: A node whose matrix comes last, or -1: where a whole file is placed.
    """

    target: Placed
    index: int
    node: int
    offset: np.ndarray = field(default_factory=lambda: np.eye(4))
    above: int = -1

    def __post_init__(self) -> None:
        if self.target not in get_args(Placed):
            raise ValueError(f"a placement of {self.target!r}; one of {', '.join(get_args(Placed))}")

    @property
    def nodes(self) -> tuple[int, ...]:
        """Those of the animation that it refers to."""
        return (self.node, self.above) if self.above != -1 else (self.node,)

    @property
    def end(self) -> float:
        """When the last change is over [s], but for the nodes'."""
        return 0.0

    def fields(self, _time: float, worlds: Worlds) -> dict[str, Any]:
        """What the object's fields are on nodes with the matrices `worlds`."""
        world = worlds[self.node] @ self.offset
        if self.above >= 0:
            world = worlds[self.above] @ world
        if self.target == "instance":
            return {"to_world": world}
        if self.target == "camera":
            return {"to_world": rigid(world)}
        if self.target == "light":
            return {"position": vec3(world[:3, 3]), "direction": vec3(unit(-world[:3, 2]))}
        return {"to_world": rigid(world)[:3, :3]}


@dataclass(frozen=True, eq=False)
class Morph:
    """Morph targets: what is added to the vertices of a mesh of n vertices.

    Attributes:
        weights: Track of (targets,) weights.
        positions, normals, tangents: (targets, n, 3) float32 differences, or None.
    """

    weights: Track
    positions: np.ndarray | None = None
    normals: np.ndarray | None = None
    tangents: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Skin:
    """Joints that carry the vertices of a mesh of n vertices, blended linearly.

    Attributes:
        joints: Nodes of the animation.
        inverse: (joints, 4, 4) from the mesh's space to the joint's where the mesh is at rest.
        which: (n, k) indices into `joints` for each vertex.
        weights: (n, k) shares of these. Their sum counts as 1; where it is 0 the vertex follows its first joint.
    """

    joints: tuple[int, ...]
    inverse: np.ndarray
    which: np.ndarray
    weights: np.ndarray

    @cached_property
    def shares(self) -> csr_matrix:
        """(n, joints): the share of each joint in each vertex."""
        n, k = self.which.shape
        weights = np.where(self.weights.sum(axis=1, keepdims=True) > 0.0, self.weights, np.eye(1, k))
        weights = weights / weights.sum(axis=1, keepdims=True)
        rows = np.repeat(np.arange(n), k)
        return csr_matrix((weights.ravel(), (rows, self.which.ravel())), shape=(n, len(self.joints)))

    def blends(self, worlds: Worlds) -> np.ndarray:
        """Matrices (n, 3, 4) of the vertices for the nodes' matrices."""
        matrices = np.stack([worlds[joint] for joint in self.joints]) @ self.inverse
        return (self.shares @ matrices[:, :3].reshape(-1, 12)).reshape(-1, 3, 4)


@dataclass(frozen=True, eq=False)
class Deformation:
    """A mesh whose vertices move: first by morph targets, then by a skin.

    Attributes:
        mesh: Index into `Scene.meshes`.
        rest: The mesh before both.
    """

    mesh: int
    rest: Mesh
    morph: Morph | None = None
    skin: Skin | None = None

    target = "mesh"

    @property
    def index(self) -> int:
        """The mesh's."""
        return self.mesh

    @property
    def nodes(self) -> tuple[int, ...]:
        """Those of the animation that it refers to."""
        return () if self.skin is None else self.skin.joints

    @property
    def end(self) -> float:
        """When the last change is over [s], but for the nodes'."""
        return 0.0 if self.morph is None else self.morph.weights.end

    def fields(self, time: float, worlds: Worlds) -> dict[str, Any]:
        """Positions, normals and tangents of the mesh at a time [s]."""
        rest = self.rest
        positions = rest.positions.astype(float)
        normals = None if rest.normals is None else rest.normals.astype(float)
        tangents = None if rest.tangents is None else rest.tangents[:, :3].astype(float)
        if self.morph is not None:
            weights = self.morph.weights.at(time)
            for i in np.flatnonzero(weights):
                for values, change in (
                    (positions, self.morph.positions),
                    (normals, self.morph.normals),
                    (tangents, self.morph.tangents),
                ):
                    if values is not None and change is not None:
                        values += weights[i] * change[i]
        if self.skin is not None:
            blends = self.skin.blends(worlds)
            linear = blends[:, :, :3]
            positions = np.einsum("nrc,nc->nr", linear, positions) + blends[:, :, 3]
            if normals is not None:
                normals = np.einsum("nrc,nc->nr", cofactors(linear), normals)
            if tangents is not None:
                tangents = np.einsum("nrc,nc->nr", linear, tangents)
        result = {"positions": positions.astype(np.float32)}
        if normals is not None:
            result["normals"] = unit(normals).astype(np.float32)
        if tangents is not None and rest.tangents is not None:
            result["tangents"] = np.column_stack([unit(tangents), rest.tangents[:, 3]]).astype(np.float32)
        return result


@dataclass(frozen=True, eq=False)
class Value:
    """A field of an object that is a number or a colour over time.

    Attributes:
        target: "camera", "light", "environment" or "material".
        index: Into the scene's tuple of these.
        field: Name of the attribute. A direction is brought to length 1, the numbers of `LIMITS` are kept within.
        curve: What it is.
    """

    target: Valued
    index: int
    field: str
    curve: Curve
    nodes = ()

    def __post_init__(self) -> None:
        if self.target not in get_args(Valued):
            raise ValueError(f"a value of {self.target!r}; one of {', '.join(get_args(Valued))}")

    @property
    def end(self) -> float:
        """When the last change is over [s]."""
        return self.curve.end

    def fields(self, time: float, _worlds: Worlds) -> dict[str, Any]:
        """The field's value at a time [s]."""
        value = np.clip(self.curve.at(time), *LIMITS.get(self.field, (-np.inf, np.inf)))
        if self.field == "direction":
            value = unit(value)
        return {self.field: float(value) if value.ndim == 0 else vec3(value)}


Part = Placement | Deformation | Value
LISTS = {"instance": "instances", "light": "lights", "material": "materials", "mesh": "meshes"}  # of a scene


@dataclass(frozen=True, eq=False)
class Animation:
    """How a scene changes.

    Attributes:
        nodes: Parents before their children.
        parts: What moves. Of two parts that say the same field of the same object the later one counts.
    """

    nodes: tuple[Node, ...]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        for i, node in enumerate(self.nodes):
            if not -1 <= node.parent < i:
                raise ValueError(f"animation: node {i} has parent {node.parent}, not an earlier node or -1")
        for part in self.parts:
            for i in part.nodes:
                if not 0 <= i < len(self.nodes):
                    raise ValueError(f"animation: {part.target} {part.index} is moved by node {i} of {len(self.nodes)}")
        # The last scene and pose: what has stood still since stays the same object. It changes no value.
        object.__setattr__(self, "_last", (None, None))

    @cached_property
    def duration(self) -> float:
        """When the last change is over [s]."""
        return max([0.0, *(item.end for item in (*self.nodes, *self.parts))])

    @property
    def moves_camera(self) -> bool:
        """Whether the scene's camera changes."""
        return any(part.target == "camera" for part in self.parts)

    def worlds(self, time: float) -> list[np.ndarray]:
        """Matrices (4, 4) of all nodes at a time [s]."""
        worlds: list[np.ndarray] = []
        for node in self.nodes:
            matrix = node.matrix(time)
            worlds.append(matrix if node.parent < 0 else worlds[node.parent] @ matrix)
        return worlds

    def pose(self, scene: Scene, time: float) -> Scene:
        """`scene` as it stands at a time [s], which is clamped to the animation's.

        Values depend on the time alone. Objects that have the same values in `scene`, or had them in the last pose of
        it, stay these objects; deformed meshes keep their triangles, texture coordinates and colours.

        Raises:
            SceneError: The scene has not what the animation moves.
            ValueError: The time is not a number.
        """
        if math.isnan(time):
            raise ValueError(f"a scene's time must be a number of seconds, got {time}")
        base, last = self._last  # type: ignore[attr-defined]
        if base is not scene:
            self._check(scene)
            last = scene
        changes: dict[tuple[str, int], dict[str, Any]] = {}
        worlds = self.worlds(time)
        for part in self.parts:
            changes.setdefault((part.target, part.index), {}).update(part.fields(time, worlds))
        replaced: dict[str, Any] = {}
        for (target, i), fields in changes.items():
            if target in LISTS:
                name = LISTS[target]
                items = replaced.setdefault(name, list(getattr(scene, name)))
                items[i] = _changed(items[i], getattr(last, name)[i], fields)
            else:
                replaced[target] = _changed(getattr(scene, target), getattr(last, target), fields)
        for name, value in replaced.items():
            replaced[name] = _kept(tuple(value), scene, last, name) if isinstance(value, list) else value
        posed = scene
        for known in (scene, last):
            if all(getattr(known, name) is value for name, value in replaced.items()):
                posed = known
                break
        else:
            posed = replace(scene, **replaced)
        object.__setattr__(self, "_last", (scene, posed))
        return posed

    def bounds(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner, (3,) each, of the box around `Scene.bounds` of all poses.

        The poses are `BOUNDS_SAMPLES`, evenly spread over the duration with both ends: what swings out between two of
        them may stick out a little.
        """
        boxes = [self.pose(scene, time).bounds for time in np.linspace(0.0, self.duration, BOUNDS_SAMPLES)]
        lower, upper = np.array(boxes).transpose(1, 0, 2)
        return lower.min(axis=0), upper.max(axis=0)

    def _check(self, scene: Scene) -> None:
        for part in self.parts:
            item = getattr(scene, LISTS.get(part.target, part.target))
            items = item if part.target in LISTS else () if item is None else (item,)
            if not 0 <= part.index < len(items):
                raise SceneError(f"animation: moves {part.target} {part.index}, scene {scene.name!r} has {len(items)}")
            if isinstance(part, Value):
                _check_value(part, items[part.index])


def _check_value(part: Value, item: Any) -> None:
    """Raise SceneError unless `item` has the field, with values of the curve's shape."""
    what = f"animation: {part.target} {part.index} ({type(item).__name__})"
    now = np.asarray(getattr(item, part.field, None))
    if now.dtype.kind not in "if" or now.shape not in ((), (3,)):
        raise SceneError(f"{what} has no number or colour {part.field!r}")
    if (shape := np.shape(part.curve.at(0.0))) != now.shape:
        kinds = {(): "a number", (3,): "three numbers"}
        raise SceneError(f"{what}: {part.field} is {kinds[now.shape]}, its curve gives {kinds.get(shape, shape)}")


def _changed(item: Any, last: Any, fields: Mapping[str, Any]) -> Any:
    """`item` with those of `fields` that it has; `item` or `last` itself where that has these values already."""
    own = {name: value for name, value in fields.items() if hasattr(item, name)}
    for known in (item, last):
        if all(np.array_equal(getattr(known, name), value) for name, value in own.items()):
            return known
    return replace(item, **own)


def _kept(items: tuple[Any, ...], scene: Scene, last: Scene, name: str) -> tuple[Any, ...]:
    """The tuple of `scene` or `last` where it holds the same objects, else `items`."""
    for known in (getattr(scene, name), getattr(last, name)):
        if all(a is b for a, b in zip(items, known, strict=True)):
            return known
    return items


def _hermite(
    u: float, step: float, a: np.ndarray, slope_a: np.ndarray, b: np.ndarray, slope_b: np.ndarray
) -> np.ndarray:
    """Cubic at `u` in [0, 1] of an interval of length `step` from its ends and the slopes there."""
    u2, u3 = u * u, u * u * u
    bend = (u3 - 2.0 * u2 + u) * slope_a + (u3 - u2) * slope_b
    return a + (3.0 * u2 - 2.0 * u3) * (b - a) + step * bend


def _slerp(u: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quaternion at `u` in [0, 1] on the shorter arc from unit quaternion `a` to `b` (Shoemake 1985)."""
    cosine = float(np.dot(a, b))
    if cosine < 0.0:
        b, cosine = -b, -cosine
    across = b - cosine * a
    sine = math.sqrt(float(np.dot(across, across)))
    angle = math.atan2(sine, cosine)
    if sine < 1e-9:
        return a
    return math.cos(u * angle) * a + math.sin(u * angle) / sine * across
