"""`Bvh`: builds the acceleration structure that `nrc.kernels.intersect` traverses."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import warp as wp

from nrc.kernels.bvh_build import MAX_DEPTH, NODE_FLOATS, WIDTH, build_bvh
from nrc.kernels.intersect import BLOCK_FLOATS, Accel
from nrc.launch import launch

CACHE_LINE = 64  # bytes
DEGENERATE = 1e-7  # twice the area over the longest edge squared, below which float32 cannot tell the sides apart


class Bvh:
    """Bounding volume hierarchy over a triangle mesh; degenerate triangles are never hit.

    Args:
        positions: (n, 3) float32 vertices [scene units].
        indices: (m, 3) int32 vertex indices.
        device: Warp device to build for.

    Attributes:
        accel: Filled `Accel` struct; valid as long as this object lives.
        depth: Levels of the hierarchy (CPU only).
        build_seconds: Wall-clock time of the build.

    Raises:
        ValueError: Wrong shape or dtype, or an index outside the vertices.
    """

    def __init__(self, positions: np.ndarray, indices: np.ndarray, device: Any) -> None:
        _check(positions, indices)
        start = time.perf_counter()
        self.accel = Accel()
        triangles = positions[indices]  # (m, 3 vertices, 3)
        usable = _usable(triangles)
        if wp.get_device(device).is_cpu:
            self._nodes, self._blocks, self.depth = _build(triangles, np.flatnonzero(usable).astype(np.int32))
            self.accel.nodes = wp.uint64(self._nodes.ctypes.data)
            self.accel.blocks = wp.uint64(self._blocks.ctypes.data)
        elif len(indices):
            kept = np.where(usable[:, None], indices, indices[:, :1])  # three equal vertices are never hit
            finite = np.where(np.isfinite(positions), positions, np.float32(0.0))
            self._mesh = wp.Mesh(
                wp.array(finite, dtype=wp.vec3, device=device),
                wp.array(kept.ravel(), dtype=int, device=device),
                bvh_constructor="sah",
            )
            self.accel.mesh = self._mesh.id
        self.build_seconds = time.perf_counter() - start


def _check(positions: np.ndarray, indices: np.ndarray) -> None:
    for name, array, dtype in (("positions", positions, np.float32), ("indices", indices, np.int32)):
        if array.ndim != 2 or array.shape[1] != 3 or array.dtype != dtype:
            raise ValueError(
                f"{name} must be (n, 3) {np.dtype(dtype).name}, got shape {array.shape} and dtype {array.dtype}"
            )
    if indices.size and not (indices.min() >= 0 and indices.max() < len(positions)):
        raise ValueError(f"indices must be in [0, {len(positions)}), got {indices.min()} ... {indices.max()}")


def _usable(triangles: np.ndarray) -> np.ndarray:
    """Which of (m, 3, 3) triangles are finite and have an area."""
    finite = np.isfinite(triangles).all(axis=(1, 2))
    a, b, c = np.where(finite[:, None, None], triangles, 0.0).astype(np.float64).transpose(1, 0, 2)
    double_area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    longest = np.max([np.sum((p - q) ** 2, axis=1) for p, q in ((a, b), (b, c), (c, a))], axis=0)
    return finite & (double_area > DEGENERATE * longest)


def _build(triangles: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Nodes, leaf blocks and depth of the hierarchy over `triangles[order]`."""
    n = len(order)
    boxes = _aligned(n, 8).reshape(n, 2, 4)
    kept = triangles[order]
    padding = np.finfo(np.float32).eps * np.abs(kept).max(initial=0.0)  # a ray along a face of a box still meets it
    boxes[:, 0, :3] = kept.min(axis=1) - padding
    boxes[:, 1, :3] = kept.max(axis=1) + padding
    boxes[:, :, 3] = 0.0
    nodes = _aligned(n + 1, NODE_FLOATS)
    leaves = np.empty((n, 2), np.int32)
    counts = np.empty(3, np.int32)
    addresses = [array.ctypes.data for array in (boxes, order, nodes, leaves, counts)]
    launch(build_bvh, 1, inputs=[n, *addresses], device=wp.get_device("cpu"))
    n_nodes, n_leaves, depth = counts.tolist()
    if depth > MAX_DEPTH:
        raise RuntimeError(f"hierarchy is {depth} levels deep, the traversal stack holds {MAX_DEPTH}")

    blocks = _aligned(n_leaves, BLOCK_FLOATS)
    lane = np.arange(WIDTH)
    begin, count = leaves[:n_leaves].T[:, :, None]
    filled = lane < count
    face = order[np.where(filled, begin + lane, 0)] if n else np.empty((0, WIDTH), np.int32)
    corners = np.where(filled[:, :, None, None], triangles[face], 0.0)  # three equal vertices are never hit
    blocks[:, : 9 * WIDTH] = corners.transpose(0, 2, 3, 1).reshape(n_leaves, 9 * WIDTH)
    blocks[:, 9 * WIDTH :] = face.view(np.float32)
    used = _aligned(n_nodes, NODE_FLOATS)
    used[:] = nodes[:n_nodes]
    return used, blocks, depth


def _aligned(rows: int, columns: int) -> np.ndarray:
    """Uninitialised (rows, columns) float32 array that starts on a cache line."""
    raw = np.empty(rows * columns * 4 + CACHE_LINE, np.uint8)
    offset = -raw.ctypes.data % CACHE_LINE
    return raw[offset : offset + rows * columns * 4].view(np.float32).reshape(rows, columns)
