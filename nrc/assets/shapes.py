"""Procedural shapes as triangles, with the texture parameterisation of Mitsuba 3's shapes of the same names.

Planar shapes are exact. Curved ones are inscribed: their vertices lie on the surface and carry its exact normals. All
triangles wind counter-clockwise seen from the side the normals point to.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Triangles: positions (n, 3), normals (n, 3) and uv (n, 2) float32, indices (m, 3) int32."""

    positions: np.ndarray
    indices: np.ndarray
    normals: np.ndarray
    uv: np.ndarray


def _shape(positions: np.ndarray, indices: np.ndarray, normals: np.ndarray, uv: np.ndarray) -> Shape:
    floats = [np.ascontiguousarray(values, np.float32) for values in (positions, normals, uv)]
    return Shape(floats[0], np.ascontiguousarray(indices, np.int32), floats[1], floats[2])


def rectangle() -> Shape:
    """The square [-1, 1]² at z = 0 facing +z; uv = (x + 1, y + 1) / 2."""
    xy = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    positions = np.column_stack([xy, np.zeros(4)])
    return _shape(positions, np.array([(0, 1, 2), (0, 2, 3)]), np.tile([0.0, 0.0, 1.0], (4, 1)), (xy + 1.0) / 2.0)


def cube() -> Shape:
    """The cube [-1, 1]³ facing outwards; each face has the whole unit square as uv."""
    faces = (  # normal, direction of +u, direction of +v
        ((0, -1, 0), (0, 0, 1), (1, 0, 0)),
        ((0, 1, 0), (-1, 0, 0), (0, 0, -1)),
        ((1, 0, 0), (0, 1, 0), (0, 0, -1)),
        ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
        ((-1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((0, 0, -1), (0, -1, 0), (1, 0, 0)),
    )
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], float)
    positions, normals, indices = [], [], []
    for i, face in enumerate(faces):
        n, du, dv = np.array(face, float)
        positions.append(n + (2.0 * corners[:, :1] - 1.0) * du + (2.0 * corners[:, 1:] - 1.0) * dv)
        normals.append(np.tile(n, (4, 1)))
        outward = np.cross(du, dv) @ n > 0.0
        indices.append(4 * i + np.array([(0, 1, 2), (0, 2, 3)] if outward else [(0, 2, 1), (0, 3, 2)]))
    return _shape(np.concatenate(positions), np.concatenate(indices), np.concatenate(normals), np.tile(corners, (6, 1)))


def sphere(n_theta: int = 64, n_phi: int = 128) -> Shape:
    """Unit sphere around the origin facing outwards; uv = (azimuth from +x towards +y / 2π, angle from +z / π)."""
    phi = np.arange(n_phi + 1) / n_phi
    theta = np.arange(n_theta + 1) / n_theta
    v, u = np.meshgrid(theta, phi, indexing="ij")
    u = u.copy()
    u[[0, -1]] += 0.5 / n_phi  # each triangle at a pole gets the azimuth of its middle there
    sin_theta, cos_theta = np.sin(np.pi * v), np.cos(np.pi * v)
    sin_theta[[0, -1]] = 0.0
    cos_phi, sin_phi = np.cos(2.0 * np.pi * phi), np.sin(2.0 * np.pi * phi)
    cos_phi[-1], sin_phi[-1] = cos_phi[0], sin_phi[0]  # close the seam exactly
    normals = np.stack([sin_theta * cos_phi, sin_theta * sin_phi, cos_theta], axis=-1).reshape(-1, 3)
    row, column = np.meshgrid(np.arange(n_theta), np.arange(n_phi), indexing="ij")
    a = row * (n_phi + 1) + column  # a-b is the upper edge of a cell, c-d the lower one
    b, c, d = a + 1, a + n_phi + 1, a + n_phi + 2
    first, second = np.stack([a, c, d], axis=-1), np.stack([a, d, b], axis=-1)
    last = np.stack([a, c, b], axis=-1)[-1]  # cells at the poles are one triangle
    indices = np.concatenate([first[:-1].reshape(-1, 3), second[1:-1].reshape(-1, 3), last])
    return _shape(normals, indices, normals, np.stack([u, v], axis=-1).reshape(-1, 2))


def disk(n: int = 64) -> Shape:
    """Unit disk at z = 0 facing +z, an inscribed polygon of `n` corners; uv = (radius, azimuth from +x / 2π)."""
    phi = np.arange(n + 1) / n
    rim = np.column_stack([np.cos(2.0 * np.pi * phi), np.sin(2.0 * np.pi * phi), np.zeros(n + 1)])
    rim[-1] = rim[0]
    k = np.arange(n)
    indices = np.column_stack([n + 1 + k, k, k + 1])  # its own centre vertex for each triangle
    positions = np.concatenate([rim, np.zeros((n, 3))])
    uv = np.concatenate(
        [
            np.column_stack([np.ones(n + 1), phi]),
            np.column_stack([np.zeros(n), phi[:-1] + 0.5 / n]),
        ]
    )
    return _shape(positions, indices, np.tile([0.0, 0.0, 1.0], (len(positions), 1)), uv)


def cylinder(n: int = 128) -> Shape:
    """Open tube of radius 1 around z from 0 to 1 facing outwards, `n` sides; uv = (azimuth from +x / 2π, z)."""
    phi = np.arange(n + 1) / n
    ring = np.column_stack([np.cos(2.0 * np.pi * phi), np.sin(2.0 * np.pi * phi), np.zeros(n + 1)])
    ring[-1] = ring[0]
    positions = np.concatenate([ring, ring + np.array([0.0, 0.0, 1.0])])
    a = np.arange(n)
    b, c, d = a + 1, a + n + 1, a + n + 2
    indices = np.concatenate([np.column_stack([a, b, d]), np.column_stack([a, d, c])])
    uv = np.column_stack([np.tile(phi, 2), np.repeat([0.0, 1.0], n + 1)])
    return _shape(positions, indices, np.concatenate([ring, ring]), uv)
