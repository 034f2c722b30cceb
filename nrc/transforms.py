"""Affine (4, 4) matrices: made of translation, rotation and scale, taken apart again, and applied.

Quaternions are (x, y, z, w), as in glTF.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

LARGEST_SHEAR = 1e-4  # cosine between the axes of a matrix that rounding explains


def affine(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 3) moved by a (4, 4) matrix."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) at length 1; those without a direction become +z."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    good = (length > 1e-20) & np.isfinite(length)
    return np.where(good, vectors / np.where(good, length, 1.0), (0.0, 0.0, 1.0))


def vec3(values: np.ndarray) -> tuple[float, float, float]:
    """Three plain floats."""
    x, y, z = (float(v) for v in values)
    return x, y, z


def cofactors(linear: np.ndarray) -> np.ndarray:
    """Cofactor matrices of (..., 3, 3): they move normals as the matrices move the surfaces, reflections included."""
    a, b, c = (linear[..., i] for i in range(3))  # columns
    return np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=-1)


def is_singular(matrices: np.ndarray) -> np.ndarray:
    """Whether affine (..., 4, 4) matrices flatten volumes to nothing, so that what they place cannot be seen."""
    linear = np.asarray(matrices, float)[..., :3, :3]
    return np.abs(np.linalg.det(linear)) <= 1e-12 * np.prod(np.linalg.norm(linear, axis=-2), axis=-1)


def rigid(matrix: np.ndarray) -> np.ndarray:
    """A (4, 4) affine matrix without its scale, shear and reflection: -z and the plane of y are kept.

    Where the matrix is singular some rotation comes out.
    """
    return _facing(matrix[:3, 3], unit(matrix[:3, 2]), matrix[:3, 1])


def trs(translation: np.ndarray, rotation: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Translation · rotation (a quaternion of any length) · scale, (4, 4)."""
    x, y, z, w = np.asarray(rotation) / max(math.sqrt(float(np.dot(rotation, rotation))), 1e-12)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - z * w), 2.0 * (x * z + y * w)],
        [2.0 * (x * y + z * w), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - x * w)],
        [2.0 * (x * z - y * w), 2.0 * (y * z + x * w), 1.0 - 2.0 * (x * x + y * y)],
    ]
    matrix[:3, :3] *= scale
    matrix[:3, 3] = translation
    return matrix


def decompose(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Translation (3,), rotation (quaternion) and scale (3,) of an affine (4, 4) matrix, so that `trs` makes it again.

    A reflection becomes a negative scale in x. Raises ValueError where the matrix is singular or has shear.
    """
    linear = np.asarray(matrix, float)[:3, :3]
    if is_singular(matrix):
        raise ValueError("is singular")
    scale = np.linalg.norm(linear, axis=0)
    scale[0] *= np.sign(np.linalg.det(linear))
    axes = linear / scale
    if np.abs(axes.T @ axes - np.eye(3)).max() > LARGEST_SHEAR:
        raise ValueError("has shear: it is no translation, rotation and scale")
    return np.array(matrix[:3, 3], float), Rotation.from_matrix(axes).as_quat(), scale


def turn(axis: np.ndarray, degrees: float) -> np.ndarray:
    """Quaternion of a turn around a unit axis, counter-clockwise seen against the axis."""
    half = math.radians(degrees) / 2.0
    return np.array([*(math.sin(half) * np.asarray(axis)), math.cos(half)])


def look_at(origin: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Matrix (4, 4) that moves the origin to `origin` and turns +z to `target` and +y towards `up`.

    Where `up` says nothing, being parallel to the view, some other direction takes its place.
    """
    return _facing(origin, unit(np.asarray(target, float) - origin), up)


def _facing(origin: np.ndarray, forward: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rigid matrix (4, 4) to `origin` whose +z is the unit vector `forward` and whose +y is near `up`."""
    right = np.cross(up, forward)
    if np.linalg.norm(right) <= 1e-8 * np.linalg.norm(up):
        right = np.cross(np.eye(3)[np.abs(forward).argmin()], forward)
    right = unit(right)
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2], matrix[:3, 3] = right, np.cross(forward, right), forward, origin
    return matrix
