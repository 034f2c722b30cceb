"""Small scenes and render loops shared by the tests of path tracer, cache, renderer and command."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nrc.assets import shapes
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Camera, Environment, Material, Mesh, Scene, Vec3

GREY = Material(name="grey", base_color=(0.5, 0.5, 0.5), two_sided=True)


def shape(made: shapes.Shape, material: int, matrix: Any = None, *, flip: bool = False, flat: bool = False) -> Mesh:
    """A procedural shape moved by the (4, 4) `matrix` (rotation, scale of one sign, translation)."""
    matrix = np.eye(4) if matrix is None else np.asarray(matrix, float)
    positions = made.positions @ matrix[:3, :3].T + matrix[:3, 3]
    normals = made.normals @ np.linalg.inv(matrix[:3, :3])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    indices, normals = (made.indices[:, ::-1], -normals) if flip else (made.indices, normals)
    return Mesh(
        positions.astype(np.float32),
        np.ascontiguousarray(indices),
        material,
        normals=None if flat else normals.astype(np.float32),
        uv0=made.uv,
    )


def rectangle(material: int, centre: Vec3, u: Vec3, v: Vec3) -> Mesh:
    """Parallelogram centre ± u ± v with its front towards u × v; the image of a texture is upright, v runs along -v."""
    c, e, f = (np.asarray(x, float) for x in (centre, u, v))
    positions = np.array([c - e - f, c + e - f, c + e + f, c - e + f], np.float32)
    uv = np.array([(0, 1), (1, 1), (1, 0), (0, 0)], np.float32)
    return Mesh(positions, np.array([(0, 1, 2), (0, 2, 3)], np.int32), material, uv0=uv)


def floor(material: int = 0, half: float = 1.0) -> Mesh:
    """Square in y = 0 facing +y."""
    return rectangle(material, (0, 0, 0), (half, 0, 0), (0, 0, -half))


def moved(translate: Vec3 = (0, 0, 0), scale: float = 1.0) -> np.ndarray:
    """(4, 4) matrix of a uniform scale followed by a translation."""
    matrix = np.diag([scale, scale, scale, 1.0])
    matrix[:3, 3] = translate
    return matrix


def furnace(material: Material | None = None, *, n_theta: int = 24) -> Scene:
    """The inside of a closed sphere; Kd = Le = 0.5 unless said otherwise, so that L = 1 everywhere."""
    material = material or Material(base_color=(0.5, 0.5, 0.5), emission=(0.5, 0.5, 0.5))
    mesh = shape(shapes.sphere(n_theta, 2 * n_theta), 0, flip=True, flat=True)
    return Scene((mesh,), (material,), Camera.look_at((0.2, 0.1, 0.3), (0, 0, -1), fov=60.0))


def in_white(material: Material, *, flat: bool = False) -> Scene:
    """One sphere under light of radiance 1 from everywhere."""
    mesh = shape(shapes.sphere(32, 64), 0, flat=flat)
    camera = Camera.look_at((0, 0, 4), (0, 0, 0), fov=25.0)
    return Scene((mesh,), (material,), camera, environment=Environment.constant((1.0, 1.0, 1.0)))


def looking_down(
    *meshes: Mesh, materials: tuple[Material, ...], height: float = 3.0, fov: float = 1.0, **rest: Any
) -> Scene:
    """Scene seen from above by a camera that sees almost only the origin."""
    camera = Camera.look_at((0, height, 0), (0, 0, 0), up=(0, 0, -1), fov=fov)
    return Scene(meshes, materials, camera, **rest)


def config(**options: Any) -> PathTracerConfig:
    """Path tracing of unlimited depth unless said otherwise."""
    return replace(PathTracerConfig(integrator="path", max_depth=-1), **options)


def render(scene: Scene, width: int, height: int, spp: int, **options: Any) -> np.ndarray:
    """Mean of `spp` frames, (height, width, 3); options are those of PathTracerConfig."""
    renderer = Renderer(scene, width, height, config(**options), device="cpu")
    for _ in range(spp):
        renderer.frame()
    return renderer.image()


def render_batches(scene: Scene, width: int, height: int, n_batches: int, spp: int, **options: Any) -> np.ndarray:
    """Independent pictures of `spp` frames each, (n_batches, height, width, 3)."""
    renderer = Renderer(scene, width, height, config(**options), device="cpu")
    pictures = []
    for _ in range(n_batches):
        renderer.restart()
        for _ in range(spp):
            renderer.frame()
        pictures.append(renderer.image())
    return np.array(pictures)


def mean_and_error(samples: np.ndarray) -> tuple[float, float]:
    """Mean of independent samples along axis 0, averaged over the rest, and its standard error."""
    per_batch = samples.reshape(len(samples), -1).mean(axis=1, dtype=np.float64)
    return float(per_batch.mean()), float(per_batch.std(ddof=1) / np.sqrt(len(per_batch)))


def welch_t(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Welch's t of the means along axis 0; 0 where equal to rounding, infinite where constant and not equal."""
    difference = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    variance = a.var(axis=0, ddof=1, dtype=np.float64) / len(a) + b.var(axis=0, ddof=1, dtype=np.float64) / len(b)
    rounding = 1e-4 * np.abs(a.mean(axis=0, dtype=np.float64)) + 1e-7  # float32 sums in two programs
    excess = np.where(np.abs(difference) <= rounding, 0.0, difference)
    return np.divide(excess, np.sqrt(variance), out=np.where(excess == 0.0, 0.0, np.inf), where=variance > 0.0)
