"""What takes the place of lights or a camera that a file does not have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nrc.scene import Camera, Environment, Mesh


def default_environment() -> Environment:
    """A neutral studio-like sky: bright overhead, dim below, and one broad soft light from the upper left front (+z).

    Radiance goes from 0.25 below through 0.7 at the horizon to 1 overhead; the soft light adds up to 4.
    """
    height, width = 64, 128
    theta = np.pi * (np.arange(height) + 0.5) / height
    phi = 2.0 * np.pi * (np.arange(width) + 0.5) / width
    sin_theta = np.sin(theta)[:, None]
    direction = np.stack(
        [sin_theta * np.sin(phi), np.cos(theta)[:, None] * np.ones(width), -sin_theta * np.cos(phi)], axis=-1
    )
    up = direction[..., 1]
    sky = np.where(up > 0.0, 0.7 + 0.3 * np.sqrt(np.abs(up)), 0.25 + 0.45 * np.exp(8.0 * np.minimum(up, 0.0)))
    key = np.array([-0.55, 0.65, 0.55]) / np.linalg.norm([-0.55, 0.65, 0.55])
    lobe = 4.0 * np.exp(18.0 * (direction @ key - 1.0))
    radiance = sky[..., None] * [0.97, 1.0, 1.04] + lobe[..., None] * [1.0, 0.97, 0.92]
    return Environment(radiance.astype(np.float32))


def framing_camera(meshes: Sequence[Mesh]) -> Camera:
    """A camera that sees all of `meshes`, from the front (+z), somewhat right and above; y is up.

    It frames the sphere around the centre of the bounding box that holds every vertex in use.
    """
    points = np.concatenate([mesh.positions[np.unique(mesh.indices)] for mesh in meshes]).astype(float)
    centre = (points.min(axis=0) + points.max(axis=0)) / 2.0
    radius = max(float(np.linalg.norm(points - centre, axis=1).max()), 1e-6)
    fov = 35.0
    towards = np.array([0.5, 0.35, 1.0]) / np.linalg.norm([0.5, 0.35, 1.0])
    distance = 1.05 * radius / np.sin(np.radians(fov) / 2.0)
    eye, target = tuple(centre + distance * towards), tuple(centre)
    return Camera.look_at(eye, target, fov=fov, fov_axis="smaller", focus_distance=float(distance))
