"""Slow, readable path tracer in NumPy: diffuse two-sided surfaces, no light sampling, no MIS, no Russian roulette."""

from __future__ import annotations

import numpy as np

from nrc.scene import Scene


def closest(triangles: np.ndarray, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance (infinite for none) and index of the closest of (m, 3, 3) triangles (Möller & Trumbore 1997)."""
    best, index = np.full(len(o), np.inf), np.full(len(o), -1)
    for i, (a, b, c) in enumerate(triangles):
        e1, e2 = b - a, c - a
        p = np.cross(d, e2)
        det = p @ e1
        with np.errstate(divide="ignore", invalid="ignore"):
            s = o - a
            u = np.sum(s * p, axis=1) / det
            q = np.cross(s, e1)
            v = np.sum(d * q, axis=1) / det
            t = q @ e2 / det
        hit = (u >= 0.0) & (v >= 0.0) & (u + v <= 1.0) & (t > 1e-6) & (t < best)
        best, index = np.where(hit, t, best), np.where(hit, i, index)
    return best, index


def trace(scene: Scene, width: int, height: int, spp: int, max_depth: int, seed: int) -> np.ndarray:
    """Mean of `spp` paths per pixel with at most `max_depth` edges, (height, width, 3)."""
    triangles = np.concatenate([mesh.positions[mesh.indices] for mesh in scene.meshes]).astype(np.float64)
    material = np.repeat([mesh.material for mesh in scene.meshes], [len(mesh.indices) for mesh in scene.meshes])
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    albedo = np.array([m.base_color for m in scene.materials])[material]
    emission = np.array([m.emission for m in scene.materials])[material]
    sky = np.zeros(3) if scene.environment is None else scene.environment.image[0, 0].astype(np.float64)

    rng = np.random.default_rng(seed)
    y, x = (np.repeat(i.ravel(), spp) for i in np.mgrid[:height, :width])
    half_width, half_height = scene.camera.half_extents(width, height)
    px = (2.0 * (x + rng.random(len(x))) / width - 1.0) * half_width
    py = (1.0 - 2.0 * (y + rng.random(len(x))) / height) * half_height
    d = np.stack([px, py, -np.ones(len(x))], axis=1) @ scene.camera.to_world[:3, :3].T
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    o = np.tile(scene.camera.to_world[:3, 3], (len(x), 1))
    radiance, beta, alive = np.zeros((len(x), 3)), np.ones((len(x), 3)), np.arange(len(x))
    for _ in range(max_depth):
        t, i = closest(triangles, o, d)
        missed = i < 0
        radiance[alive[missed]] += beta[missed] * sky
        o, d, beta, alive, t, i = (values[~missed] for values in (o, d, beta, alive, t, i))
        n = normals[i]
        front = np.sum(n * d, axis=1) < 0.0
        radiance[alive] += beta * emission[i] * front[:, None]
        n = np.where(front[:, None], n, -n)
        # Cosine-distributed: a uniform point of the unit sphere around the tip of the normal.
        z = rng.uniform(-1.0, 1.0, len(i))
        phi = rng.uniform(0.0, 2.0 * np.pi, len(i))
        r = np.sqrt(1.0 - z * z)
        o = o + t[:, None] * d
        d = n + np.stack([r * np.cos(phi), r * np.sin(phi), z], axis=1)
        d /= np.linalg.norm(d, axis=1, keepdims=True)
        beta = beta * albedo[i]
    return radiance.reshape(height, width, spp, 3).mean(axis=2)
