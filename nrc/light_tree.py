"""Host side of `nrc.kernels.light_tree`: bounds of lights, and the tree over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nrc.kernels.light_tree import LightNode

ROUNDING = 2.0**-21  # of coordinates in float32, by which spheres are larger; relative


@dataclass(frozen=True, eq=False)
class LightBounds:
    """Where lights are and where they shine, (n, ...) float64 each.

    Attributes:
        lower, upper: (n, 3) corners of the boxes around them.
        radius: Of the spheres around the boxes' centres that hold them.
        axis: (n, 3) unit; middle of the directions of emission.
        spread: Half angle of the cone around `axis` that holds the axes of all emission [rad].
        reach: Angle to such an axis up to which light goes [rad], at most pi / 2.
        two_sided: (n,) bool. Whether it goes the opposite way as well.
        intensity: Largest luminance-weighted radiant intensity [W sr^-1]; where it is 0 all else has no meaning.
    """

    lower: np.ndarray
    upper: np.ndarray
    radius: np.ndarray
    axis: np.ndarray
    spread: np.ndarray
    reach: np.ndarray
    two_sided: np.ndarray
    intensity: np.ndarray

    def __len__(self) -> int:
        return len(self.intensity)

    def __getitem__(self, rows: Any) -> LightBounds:
        return LightBounds(*(getattr(self, name)[rows] for name in LightBounds.__dataclass_fields__))


def triangle_bounds(corners: np.ndarray, normals: np.ndarray, radiance: float, two_sided: bool) -> LightBounds:
    """Bounds of triangles that emit evenly.

    Args:
        corners: (n, 3, 3).
        normals: (n, 3) towards their fronts, with the length of twice the area.
        radiance: Luminance of one side [W m^-2 sr^-1].
    """
    n = len(corners)
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    lower, upper = np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)
    length = _length(normals)
    center = (lower + upper) / 2.0
    return LightBounds(
        lower,
        upper,
        np.sqrt(np.maximum.reduce([_dot(x, x) for x in (a - center, b - center, c - center)])),
        normals / np.maximum(length, 1e-300)[:, None],
        np.zeros(n),
        np.full(n, np.pi / 2.0),
        np.full(n, two_sided),
        radiance * length / 2.0,
    )


def concatenated(bounds: list[LightBounds]) -> LightBounds:
    """All of them in order."""
    return LightBounds(
        *(np.concatenate([getattr(b, name) for b in bounds]) for name in LightBounds.__dataclass_fields__)
    )


def union(a: LightBounds, b: LightBounds) -> LightBounds:
    """Bounds that hold both, row by row (Pharr, Jakob and Humphreys 2023, sections 3.8.4 and 12.6.3).

    The axis of `b` may be taken for its mirror image where the result shines both ways.
    """
    two_sided = a.two_sided | b.two_sided
    dot = _dot(a.axis, b.axis)
    other = np.where(two_sided & (dot < 0.0), -1.0, 1.0)[:, None] * b.axis
    between = np.arctan2(_length(np.cross(a.axis, b.axis)), np.where(two_sided, np.abs(dot), dot))
    spread = np.minimum((a.spread + between + b.spread) / 2.0, np.pi)
    turn = np.clip(spread - a.spread, 0.0, between)  # of the axis of `a` towards that of `b`
    axis = np.sin(between - turn)[:, None] * a.axis + np.sin(turn)[:, None] * other
    length = _length(axis)
    axis /= np.maximum(length, 1e-300)[:, None]
    vague = length < 1e-9  # the axes are the same or opposite
    axis[vague], spread[vague] = a.axis[vague], np.pi
    a_holds, b_holds = between + b.spread <= a.spread, between + a.spread <= b.spread
    axis[b_holds], spread[b_holds] = other[b_holds], b.spread[b_holds]
    axis[a_holds], spread[a_holds] = a.axis[a_holds], a.spread[a_holds]

    lower, upper = np.minimum(a.lower, b.lower), np.maximum(a.upper, b.upper)
    center = (lower + upper) / 2.0
    around = [_length((x.lower + x.upper) / 2.0 - center) + x.radius for x in (a, b)]
    radius = np.minimum(_length(upper - lower) / 2.0, np.maximum(*around))
    reach, intensity = np.maximum(a.reach, b.reach), a.intensity + b.intensity
    return LightBounds(lower, upper, radius, axis, spread, reach, two_sided, intensity)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(_dot(vectors, vectors))


def median_order(points: np.ndarray) -> np.ndarray:
    """Order of (n, 3) points in the leaves of a tree that halves them along the longest side of the box around them.

    The first half takes a power of two of them, so that all boxes but the last of a level are halved alike.
    """
    points = points.astype(np.float32)
    order = np.arange(len(points))
    for k in range(max(len(points) - 1, 0).bit_length() - 1, 0, -1):
        half, size = 1 << k, 2 << k
        n_full = len(points) // size * size
        for begin, end in ((0, n_full), (n_full, len(points))):
            if end - begin > half:
                rows = order[begin:end].reshape(-1, min(size, end - begin))
                boxed = points[rows]
                lower = upper = boxed
                while lower.shape[1] > 1:  # pairwise, many times faster than NumPy's minimum over a short axis
                    m = (lower.shape[1] + 1) // 2
                    lower = np.minimum(lower[:, :m], lower[:, -m:])
                    upper = np.maximum(upper[:, :m], upper[:, -m:])
                axis = (upper - lower)[:, 0].argmax(axis=1)
                along = np.take_along_axis(boxed, axis[:, None, None], axis=2)[..., 0]
                order[begin:end] = np.take_along_axis(rows, along.argpartition(half, axis=1), axis=1).ravel()
    return order


def light_tree(bounds: LightBounds) -> tuple[np.ndarray, np.ndarray, int]:
    """A perfectly balanced tree over lights.

    Returns:
        Rows of `LightNode`, (2^(depth + 1),), the first of which is not used; the light of each leaf, (2^depth,), -1
        for leaves without one; and the depth.
    """
    lit = np.flatnonzero(bounds.intensity > 0.0)
    depth = max(len(lit) - 1, 0).bit_length()
    n = 1 << depth
    lights = np.full(n, -1, np.int32)
    node_view: Any = LightNode  # wp.struct adds numpy_dtype
    nodes: Any = np.zeros(2 * n, node_view.numpy_dtype())
    if not len(lit):
        return nodes, lights, depth
    order = lit[median_order((bounds.lower[lit] + bounds.upper[lit]) / 2.0)]
    lights[: len(order)] = order
    level = bounds[order]
    for k in range(depth, -1, -1):
        if k < depth:
            pairs = union(level[0 : len(level) // 2 * 2 : 2], level[1::2])
            level = concatenated([pairs, level[-1:]]) if len(level) % 2 else pairs
        write_nodes(nodes[1 << k : (1 << k) + len(level)], level)
    return nodes, lights, depth


def write_nodes(rows: Any, bounds: LightBounds) -> None:
    """Fill rows of `LightNode`; spheres grow by the rounding of their centres."""
    center = (bounds.lower + bounds.upper) / 2.0
    rows["center"] = center
    rows["radius"] = bounds.radius + ROUNDING * _length(center)
    rows["axis"] = bounds.axis
    rows["cos_axis"], rows["sin_axis"] = np.cos(bounds.spread), np.sin(bounds.spread)
    rows["cos_emission"] = np.maximum(np.cos(bounds.reach), 0.0)
    rows["intensity"] = bounds.intensity
    rows["two_sided"] = bounds.two_sided
