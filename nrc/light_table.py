"""The table of everything that emits, and how often each entry is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nrc.kernels import scene as ks
from nrc.scene import DirectionalLight, Light, PointLight, SpotLight

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True, eq=False)
class EmissiveTriangles:
    """Triangles of one mesh, or of one instance of it.

    Attributes:
        faces: (n,) their numbers in the scene.
        areas: (n,) in world space [scene units²].
        radiance: Mean luminance that they emit, counting both sides if both emit [W m^-2 sr^-1].
        instance: Index of the instance, -1 in world space.
    """

    faces: np.ndarray
    areas: np.ndarray
    radiance: float
    instance: int = -1


def light_table(
    emitters: Sequence[EmissiveTriangles], lights: Sequence[Light], environment_power: float | None, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `LightView`, and the power [W] of each: triangles in the order given, `lights`, the environment if any.

    Args:
        environment_power: Of the environment [W]; None without one.
        radius: Of the scene's bounding sphere, which parallel light crosses.
    """
    n_triangles = sum(len(emitter.faces) for emitter in emitters)
    light_view: Any = ks.LightView  # wp.struct adds numpy_dtype
    table: Any = np.zeros(n_triangles + len(lights) + (environment_power is not None), light_view.numpy_dtype())
    powers = np.zeros(len(table))
    table["triangle"] = table["instance"] = -1
    begin = 0
    for emitter in emitters:
        rows = slice(begin, begin + len(emitter.faces))
        table["triangle"][rows] = emitter.faces
        table["instance"][rows] = emitter.instance
        powers[rows] = math.pi * emitter.areas * emitter.radiance
        begin = rows.stop
    for i, light in enumerate(lights, start=n_triangles):
        row = table[i]
        if not isinstance(light, DirectionalLight):
            row["position"] = light.position
        if not isinstance(light, PointLight):
            row["direction"] = np.asarray(light.direction) / np.linalg.norm(light.direction)
        if isinstance(light, SpotLight):
            row["kind"] = ks.LIGHT_SPOT
            row["inner_angle"], row["outer_angle"] = light.inner_angle, light.outer_angle
            row["smooth"] = light.falloff == "smooth"
            solid_angle = 2.0 * math.pi * (1.0 - math.cos((light.inner_angle + light.outer_angle) / 2.0))
        else:
            row["kind"] = ks.LIGHT_DIRECTIONAL if isinstance(light, DirectionalLight) else ks.LIGHT_POINT
            solid_angle = 4.0 * math.pi
        if isinstance(light, DirectionalLight):
            row["intensity"] = light.irradiance
            powers[i] = float(np.dot(light.irradiance, LUMINANCE)) * math.pi * radius**2
        else:
            row["intensity"] = light.intensity
            powers[i] = float(np.dot(light.intensity, LUMINANCE)) * solid_angle
    if environment_power is not None:
        table[-1]["kind"] = ks.LIGHT_ENVIRONMENT
        powers[-1] = environment_power
    return table, powers


def alias_table(pmf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker's alias table of a probability mass function, (n,): acceptance probability and alias of each entry.

    Entries below the mean are filled up by those above it in order, each of which becomes an entry below the mean that
    the next one fills up. Sums of the two kinds meet like the two lists of a merge, so that a binary search replaces
    the sequential construction (Vose 1991; Hübschle-Schneider and Sanders 2019, section 4.2).
    """
    share = pmf * len(pmf)
    probability, alias = np.ones(len(pmf)), np.arange(len(pmf), dtype=np.int32)
    light, heavy = np.flatnonzero(share < 1.0), np.flatnonzero(share >= 1.0)
    if not len(light) or not len(heavy):
        return probability, alias
    needed = np.concatenate([[0.0], np.cumsum(1.0 - share[light])])  # before each of `light`, and in all
    given = np.cumsum(share[heavy] - 1.0)  # up to and with each of `heavy`
    giver = np.minimum(np.searchsorted(given, needed[:-1], side="right"), len(heavy) - 1)
    probability[light], alias[light] = share[light], heavy[giver]
    overdrawn = needed[np.minimum(np.searchsorted(needed, given), len(light))]
    probability[heavy[:-1]] = np.clip(1.0 + given - overdrawn, 0.0, 1.0)[:-1]
    alias[heavy[:-1]] = heavy[1:]
    return probability, alias


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
