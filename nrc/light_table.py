"""The table of everything that emits, with what decides how often each entry is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nrc.kernels import scene as ks
from nrc.light_tree import LightBounds, concatenated, triangle_bounds, union
from nrc.scene import DirectionalLight, Light, PointLight, SpotLight
from nrc.transforms import unit

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
FLATNESS = 1e-6  # by which the cosine between the triangles of a quad may be less than 1
ANGLE_MARGIN = 1e-3  # [rad] by which the bounds of a spot are wider than its light


@dataclass(frozen=True, eq=False)
class EmissiveTriangles:
    """Triangles of one mesh, or of one instance of it.

    Attributes:
        faces: (n,) their numbers in the scene.
        corners: (n, 3, 3) in world space.
        normals: (n, 3) there, towards their fronts, with the length of twice the area [scene units²].
        quads: First of each two triangles that make a quad, as `quads` finds them.
        radiance: Mean luminance that one side emits [W m^-2 sr^-1].
        two_sided: Whether both sides do.
        instance: Index of the instance, -1 in world space.
    """

    faces: np.ndarray
    corners: np.ndarray
    normals: np.ndarray
    quads: np.ndarray
    radiance: float
    two_sided: bool
    instance: int = -1


@dataclass(frozen=True, eq=False)
class LightTable:
    """Everything that emits.

    Attributes:
        rows: Of `LightView`: triangles, points and spots, parallel light, the environment if any.
        n_placed: How many of them are somewhere, the first ones.
        leaves: (n,) first light of each leaf of a tree over those; the two triangles of a quad are one leaf.
        bounds: Of the leaves.
        powers: (1 + others,) [W] of the lights with a place together, and of each of the others.
    """

    rows: Any
    n_placed: int
    leaves: np.ndarray
    bounds: LightBounds
    powers: np.ndarray


def light_table(
    emitters: Sequence[EmissiveTriangles], lights: Sequence[Light], environment_power: float | None, radius: float
) -> LightTable:
    """Rows, bounds and powers of what emits: triangles in the order given, then `lights`, then the environment.

    Args:
        environment_power: Of the environment [W]; None without one.
        radius: Of the scene's bounding sphere, which parallel light crosses.
    """
    placed = [light for light in lights if not isinstance(light, DirectionalLight)]
    parallel = [light for light in lights if isinstance(light, DirectionalLight)]
    n_triangles = sum(len(emitter.faces) for emitter in emitters)
    n_placed = n_triangles + len(placed)
    light_view: Any = ks.LightView  # wp.struct adds numpy_dtype
    rows: Any = np.zeros(n_placed + len(parallel) + (environment_power is not None), light_view.numpy_dtype())
    powers = np.zeros(1 + len(rows) - n_placed)
    rows["triangle"] = rows["instance"] = -1
    rows["share"] = 1.0
    begins = np.cumsum([0, *(len(emitter.faces) for emitter in emitters)])[:-1]
    for emitter, begin in zip(emitters, begins, strict=True):
        some = slice(begin, begin + len(emitter.faces))
        rows["triangle"][some] = emitter.faces
        rows["instance"][some] = emitter.instance
        area = float(np.linalg.norm(emitter.normals, axis=1).sum()) / 2.0
        powers[0] += math.pi * area * emitter.radiance * (1 + emitter.two_sided)
    for i, light in enumerate(placed, start=n_triangles):
        row = rows[i]
        row["kind"] = ks.LIGHT_POINT
        row["position"], row["intensity"] = light.position, light.intensity
        solid_angle = 4.0 * math.pi
        if isinstance(light, SpotLight):
            row["kind"] = ks.LIGHT_SPOT
            row["direction"] = unit(np.array(light.direction))
            row["inner_angle"], row["outer_angle"] = light.inner_angle, light.outer_angle
            row["smooth"] = light.falloff == "smooth"
            solid_angle = 2.0 * math.pi * (1.0 - math.cos((light.inner_angle + light.outer_angle) / 2.0))
        powers[0] += float(np.dot(light.intensity, LUMINANCE)) * solid_angle
    for i, sun in enumerate(parallel, start=n_placed):
        row = rows[i]
        row["kind"] = ks.LIGHT_DIRECTIONAL
        row["direction"], row["intensity"] = unit(np.array(sun.direction)), sun.irradiance
        powers[1 + i - n_placed] = float(np.dot(sun.irradiance, LUMINANCE)) * math.pi * radius**2
    if environment_power is not None:
        rows[-1]["kind"] = ks.LIGHT_ENVIRONMENT
        powers[-1] = environment_power
    each = [triangle_bounds(e.corners, e.normals, e.radiance, e.two_sided) for e in emitters]
    bounds = concatenated([*each, _bounds(placed)])
    pairs = [emitter.quads + begin for emitter, begin in zip(emitters, begins, strict=True)]
    first = np.concatenate([np.zeros(0, int), *pairs])
    first = first[bounds.intensity[first] > 0.0]
    both = union(bounds[first], bounds[first + 1])
    rows["share"][first] = bounds.intensity[first] / both.intensity
    rows["share"][first + 1] = 1.0 - rows["share"][first]
    for name, values in vars(both).items():
        getattr(bounds, name)[first] = values
    leaves = np.delete(np.arange(n_placed), first + 1)
    return LightTable(rows, n_placed, leaves, bounds[leaves], powers)


def quads(corners: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """First of each two triangles, of (n, 3, 3), one after the other, that share an edge and lie in one plane."""
    a, b = corners[:-1], corners[1:]
    same = (a[:, :, None] == b[:, None]).all(axis=3)  # corner of the first, corner of the second
    edge = same.any(axis=2).sum(axis=1) == 2
    cosine = np.einsum("ij,ij->i", normals[:-1], normals[1:])
    length = np.linalg.norm(normals, axis=1)
    joined = np.flatnonzero(edge & (cosine >= (1.0 - FLATNESS) * length[:-1] * length[1:]))
    # Of a run of such neighbours every second one.
    new_run = np.flatnonzero(np.diff(joined, prepend=-2) > 1)
    place = np.arange(len(joined)) - np.repeat(new_run, np.diff(np.append(new_run, len(joined))))
    return joined[place % 2 == 0]


def _bounds(lights: Sequence[PointLight | SpotLight]) -> LightBounds:
    """Bounds of lights without extent."""
    n = len(lights)
    position = np.array([light.position for light in lights], float).reshape(n, 3)
    axis, spread, reach = np.tile((0.0, 0.0, 1.0), (n, 1)), np.full(n, math.pi), np.zeros(n)
    for i, light in enumerate(lights):
        if isinstance(light, SpotLight):
            axis[i] = unit(np.array(light.direction))
            outer = min(light.outer_angle + ANGLE_MARGIN, math.pi)
            spread[i] = max(light.inner_angle, outer - math.pi / 2.0)
            reach[i] = outer - spread[i]
    intensity = np.array([np.dot(light.intensity, LUMINANCE) for light in lights], float)
    return LightBounds(position, position, np.zeros(n), axis, spread, reach, np.zeros(n, bool), intensity)


def integrated_luminance(image: np.ndarray) -> float:
    """Luminance of an environment map, integrated over all directions."""
    height, width = image.shape[:2]
    theta = (np.arange(height) + 0.5) / height * math.pi
    solid_angle = np.sin(theta)[:, None] / (np.sin(theta).sum() * width) * 4.0 * math.pi
    return float(((image.astype(np.float64) @ LUMINANCE) * solid_angle).sum())


def environment_cdfs(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marginal CDF over rows (height + 1,) and conditional CDFs over columns (height, width + 1).

    A texel's weight is the mean luminance of its 3×3 neighbourhood, because bilinear lookup spreads texels that far,
    times the sine of its polar angle.
    """
    height, width = image.shape[:2]
    value = image @ LUMINANCE
    value = (np.roll(value, 1, axis=1) + 2.0 * value + np.roll(value, -1, axis=1)) / 4.0
    padded = np.pad(value, ((1, 1), (0, 0)), mode="edge")
    value = (padded[:-2] + 2.0 * padded[1:-1] + padded[2:]) / 4.0
    value *= np.sin((np.arange(height) + 0.5) / height * math.pi)[:, None]
    per_row = value.sum(axis=1)
    uniform = np.arange(width + 1) / width
    columns = np.zeros((height, width + 1))
    columns[:, 1:] = np.cumsum(value, axis=1)
    columns = np.where(per_row[:, None] > 0.0, columns / np.maximum(per_row[:, None], 1e-300), uniform)
    total = per_row.sum()
    rows = np.concatenate([[0.0], np.cumsum(per_row)]) / total if total > 0.0 else np.arange(height + 1) / height
    columns[:, -1] = rows[-1] = 1.0
    return rows, columns
