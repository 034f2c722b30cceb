"""Values and transforms of scene JSON that may change over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nrc.animation import INTERPOLATIONS, Fixed, LookAt, Node, Track, Trs, Turn
from nrc.assets.fields import Field
from nrc.scene import Vec3
from nrc.transforms import decompose, is_singular, look_at, unit, vec3


def is_keyframed(field: Field) -> bool:
    """Whether the value is an object with keyframes."""
    return isinstance(field.value, dict) and "keyframes" in field.value


def read_track(field: Field, read: Callable[[Field], Any]) -> Track:
    """Track of what `read` makes of the value or of each keyframe's."""
    if not is_keyframed(field):
        return Track.constant(read(field))
    times, values, interpolation = _keyframes(field)
    return _track(times, np.array([read(value) for value in values], float), interpolation)


def _keyframes(field: Field) -> tuple[np.ndarray, list[Field], str]:
    """Times, values and interpolation of an object with keyframes."""
    field.check_object(("keyframes", "interpolation"))
    kind, keyframes = field.get("interpolation"), field.need("keyframes")
    times, values = [], []
    for keyframe in keyframes.list():
        pair = keyframe.list()
        if len(pair) != 2:
            raise keyframe.wrong("[time, value]")
        times.append(pair[0].number(0.0))
        if len(times) > 1 and times[-1] <= times[-2]:
            raise pair[0].error("its time does not come after the one before")
        values.append(pair[1])
    if not times:
        raise keyframes.error("is empty")
    return np.array(times), values, kind.string(INTERPOLATIONS) if kind else "linear"


def _track(times: np.ndarray, values: np.ndarray, interpolation: str, *, rotation: bool = False) -> Track:
    if interpolation == "cubic":
        return Track.smooth(times, values, rotation=rotation)
    return Track(times, values, "step" if interpolation == "step" else "linear", rotation=rotation)


# Transforms


def read_transform(field: Field) -> list[Node]:
    """Nodes of a `to_world` value, each the child of the one before; one `Fixed` where nothing moves."""
    value = field.value
    if is_keyframed(field):
        return [_matrices(field)]
    if isinstance(value, list) and not (value and isinstance(value[0], list)):
        nodes = [_step(step) for step in reversed(field.list())]
        if not any(node.end > 0.0 for node in nodes):
            matrix = np.eye(4)
            for node in nodes:
                matrix = matrix @ node.matrix(0.0)
            nodes = [Fixed(matrix)]
    else:
        nodes = [Fixed(_matrix(field)) if isinstance(value, list) else _step(field)]
    if len(nodes) == 1 and nodes[0].end == 0.0 and is_singular(nodes[0].matrix(0.0)):
        raise field.error("the transform is singular")
    return nodes


def _matrix(field: Field) -> np.ndarray:
    """Matrix (4, 4) from its rows."""
    matrix = np.array([row.vector(4) for row in field.list()])
    if matrix.shape != (4, 4):
        raise field.wrong("four rows of four numbers")
    if not np.array_equal(matrix[3], [0.0, 0.0, 0.0, 1.0]):
        raise field.error("the last row of a transform must be 0 0 0 1")
    return matrix


def _matrices(field: Field) -> Trs:
    """Whole transforms as keyframes: their translations, rotations and scales change, each for itself."""
    times, values, interpolation = _keyframes(field)
    parts = []
    for value in values:
        matrix = np.eye(4)
        for node in read_transform(value):
            if node.end > 0.0:
                raise value.error("keyframes within keyframes")
            matrix = matrix @ node.matrix(0.0)
        try:
            parts.append(decompose(matrix))
        except ValueError as error:
            raise value.error(f"the transform {error}") from None
    translations, rotations, scales = (np.array(column) for column in zip(*parts, strict=True))
    return Trs(
        _track(times, translations, interpolation),
        _track(times, rotations, interpolation, rotation=True),
        _track(times, scales, interpolation),
    )


def _step(field: Field) -> Node:
    if isinstance(field.value, dict) and "look_at" in field.value:
        field.check_object(("look_at",))
        return read_look_at(field.child("look_at"))
    field.check_object(("scale", "rotate", "translate", "look_at"))
    scale, rotate, translate = field.get("scale"), field.get("rotate"), field.get("translate")
    node = Trs(
        translation=read_track(translate, Field.vec3) if translate else Track.constant((0.0, 0.0, 0.0)),
        rotation=read_turn(rotate) if rotate else Track.constant((0.0, 0.0, 0.0, 1.0), rotation=True),
        scale=read_track(scale, _scale) if scale else Track.constant((1.0, 1.0, 1.0)),
    )
    return node if node.end > 0.0 else Fixed(node.matrix(0.0))


def _scale(field: Field) -> Vec3:
    return field.vec3() if isinstance(field.value, list) else (field.number(),) * 3


def read_turn(field: Field) -> Turn:
    """{axis, angle [degrees]}."""
    field.check_object(("axis", "angle"))
    return Turn(vec3(read_direction(field.need("axis"))), read_track(field.need("angle"), Field.number))


def read_look_at(field: Field) -> Node:
    """{origin, target, up}: +z to `target`."""
    field.check_object(("origin", "target", "up"))
    origin, target = read_track(field.need("origin"), Field.vec3), read_track(field.need("target"), Field.vec3)
    up_field = field.get("up")
    up = np.array(up_field.vec3() if up_field else (0.0, 1.0, 0.0))
    for time in sorted({0.0, *origin.times, *target.times}):
        forward = target.at(time) - origin.at(time)
        when = f" at {time:g} s" if max(origin.end, target.end) > 0.0 else ""
        if np.linalg.norm(forward) < 1e-12:
            raise field.need("target").error(f"gives no direction{when}: the vector has no length")
        if np.linalg.norm(np.cross(up, unit(forward))) < 1e-8:
            raise field.error(f"up must not be parallel to the direction from origin to target{when}")
    node = LookAt(origin, target, vec3(up))
    return node if node.end > 0.0 else Fixed(look_at(origin.at(0.0), target.at(0.0), up))


def read_direction(field: Field, origin: Vec3 = (0.0, 0.0, 0.0)) -> np.ndarray:
    """Unit vector (3,) from `origin` to a point."""
    vector = np.array(field.vec3()) - origin
    if np.linalg.norm(vector) < 1e-12:
        raise field.error("gives no direction: the vector has no length")
    return unit(vector)
