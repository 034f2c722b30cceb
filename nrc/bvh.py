"""Builds and refits the acceleration structures that `nrc.kernels.intersect` traverses."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import warp as wp

from nrc.kernels.bvh_build import BLOCK_FLOATS, LEAF_BIT, MAX_DEPTH, NODE_FLOATS, WIDTH, build_bvh, refit_bvh
from nrc.kernels.intersect import Accel
from nrc.launch import launch, prepare

CACHE_LINE = 64  # bytes
DEGENERATE = 1e-7  # twice the area over the longest edge squared, below which float32 cannot tell the sides apart
WORN_OUT = 1.5  # a refitted hierarchy whose boxes' areas have grown by more than this factor is built anew


class Bvh:
    """Bounding volume hierarchy over a triangle mesh; degenerate triangles are never hit.

    Args:
        positions: (n, 3) float32 vertices [scene units].
        indices: (m, 3) int32 vertex indices.
        device: Warp device to build for.

    Attributes:
        accel: Filled `Accel` struct of this mesh alone; valid as long as this object lives and is not refitted.
        positions: The vertices that it was built for or fitted to last.
        depth: Levels of the hierarchy (CPU only).
        build_seconds: Wall-clock time of the build.

    Raises:
        ValueError: Wrong shape or dtype, or an index outside the vertices.
    """

    def __init__(self, positions: np.ndarray, indices: np.ndarray, device: Any) -> None:
        _check(positions, indices)
        self._device = wp.get_device(device)
        if self._device.is_cpu:
            prepare({"BVH build": build_bvh}, self._device)
        self._build(positions, indices)

    def _build(self, positions: np.ndarray, indices: np.ndarray) -> None:
        start = time.perf_counter()
        self.positions = positions
        self._indices = np.ascontiguousarray(indices)
        self.accel = Accel()
        triangles = positions[indices]  # (m, 3 vertices, 3)
        usable = _usable(triangles)
        self._left_out = np.flatnonzero(~usable)
        if self._device.is_cpu:
            self._nodes, self._blocks, self.depth = _build(triangles, np.flatnonzero(usable).astype(np.int32))
            self._built_cost = _cost(self._nodes)
            self.accel.nodes = wp.uint64(self._nodes.ctypes.data)
            self.accel.blocks = wp.uint64(self._blocks.ctypes.data)
        elif len(indices):
            kept = np.where(usable[:, None], indices, indices[:, :1])  # three equal vertices are never hit
            finite = np.where(np.isfinite(positions), positions, np.float32(0.0))
            self._mesh = wp.Mesh(
                wp.array(finite, dtype=wp.vec3, device=self._device),
                wp.array(kept.ravel(), dtype=int, device=self._device),
                bvh_constructor="sah",
            )
            self.accel.mesh = self._mesh.id
        self.build_seconds = time.perf_counter() - start

    @property
    def n_bytes(self) -> int:
        """Memory of nodes and leaves; on CUDA of the mesh's copy alone, Warp's nodes are not counted."""
        if self._device.is_cpu:
            return self._nodes.nbytes + self._blocks.nbytes
        return self._mesh.points.capacity + self._mesh.indices.capacity if self.accel.mesh else 0

    def refit(self, positions: np.ndarray) -> None:
        """Follow moved vertices, (n, 3) float32 and finite, in place; what was built for the old ones is gone.

        The hierarchy keeps its shape, and is built anew where a triangle that had no area has one now or, on the CPU,
        that has become too bad.
        """
        _check(positions, self._indices)
        self.positions = positions
        if _usable(positions[self._indices[self._left_out]]).any():
            self._build(positions, self._indices)
        elif not self._device.is_cpu:
            self._mesh.points.assign(positions)
            self._mesh.refit()
        else:
            positions = np.ascontiguousarray(positions)
            counts = len(self._nodes), len(self._blocks)
            launch(
                refit_bvh,
                1,
                inputs=[*counts, positions.ctypes.data, self._indices.ctypes.data],
                outputs=[self._nodes.ctypes.data, self._blocks.ctypes.data],
                device=self._device,
            )
            if _cost(self._nodes) > WORN_OUT * self._built_cost:
                self._build(positions, self._indices)


class InstanceBvh:
    """Hierarchy over the boxes of instances.

    Args:
        boxes: (n, 2, 3) lower and upper corners [scene units], n > 0.
        device: Warp device to build for.
    """

    def __init__(self, boxes: np.ndarray, device: Any) -> None:
        device = wp.get_device(device)
        padding = np.finfo(np.float32).eps * np.abs(boxes).max()  # a ray along a face of a box still meets it
        boxes = (boxes + padding * np.array([[-1.0], [1.0]])).astype(np.float32)
        if device.is_cpu:
            prepare({"BVH build": build_bvh}, device)
            self._nodes = _instance_nodes(boxes)
        else:
            lower, upper = (wp.array(boxes[:, i], dtype=wp.vec3, device=device) for i in range(2))  # type: Any, Any
            self._bvh = wp.Bvh(lower, upper)

    def fill(self, accel: Any) -> None:
        """Enter this hierarchy into an `Accel`, which is valid as long as this object lives."""
        if hasattr(self, "_nodes"):
            accel.instance_nodes = wp.uint64(self._nodes.ctypes.data)
        else:
            accel.instance_bvh = self._bvh.id


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
    """Nodes, leaf blocks and depth of the hierarchy over `triangles[order]`; reorders `order`."""
    kept = triangles[order]
    nodes, leaves, depth = _hierarchy(kept.min(axis=1), kept.max(axis=1), order)
    face, filled = _leaf_lanes(leaves, order)
    blocks = _aligned(len(leaves), BLOCK_FLOATS)
    corners = np.where(filled[:, :, None, None], triangles[face], 0.0)  # three equal vertices are never hit
    blocks[:, : 9 * WIDTH] = corners.transpose(0, 2, 3, 1).reshape(len(leaves), 9 * WIDTH)
    blocks[:, 9 * WIDTH :] = np.where(filled, face, np.int32(-1)).view(np.float32)
    return nodes, blocks, depth


def _instance_nodes(boxes: np.ndarray) -> np.ndarray:
    """Nodes over (n, 2, 3) boxes whose leaves are the boxes' indices: every leaf of the builder becomes a node."""
    order = np.arange(len(boxes), dtype=np.int32)
    inner, leaves, _ = _hierarchy(boxes[:, 0], boxes[:, 1], order)
    nodes = _aligned(len(inner) + len(leaves), NODE_FLOATS)
    nodes[: len(inner)] = inner
    children = nodes.view(np.uint32)[:, 6 * WIDTH : 7 * WIDTH]
    used = nodes[: len(inner), :WIDTH] <= nodes[: len(inner), 3 * WIDTH : 4 * WIDTH]
    is_leaf = used & (children[: len(inner)] & LEAF_BIT != 0)
    children[: len(inner)][is_leaf] += np.uint32(len(inner) + LEAF_BIT)  # modulo 2^32: clears the bit
    index, filled = _leaf_lanes(leaves, order)
    for corner, nothing in ((0, np.inf), (1, -np.inf)):
        rows = np.where(filled[:, :, None], boxes[index, corner], nothing)
        first = 3 * WIDTH * corner
        nodes[len(inner) :, first : first + 3 * WIDTH] = rows.transpose(0, 2, 1).reshape(len(leaves), 3 * WIDTH)
    children[len(inner) :] = index.astype(np.uint32) | np.uint32(LEAF_BIT)
    return nodes


def _hierarchy(lower: np.ndarray, upper: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Nodes (k, NODE_FLOATS), leaves (m, 2) as first place in `order` and count, and depth, over n boxes.

    Reorders `order`, (n,) int32, what each box stands for.
    """
    n = len(order)
    boxes = _aligned(n, 8).reshape(n, 2, 4)
    padding = np.finfo(np.float32).eps * max(np.abs(lower).max(initial=0.0), np.abs(upper).max(initial=0.0))
    boxes[:, 0, :3] = lower - padding  # a ray along a face of a box still meets it
    boxes[:, 1, :3] = upper + padding
    boxes[:, :, 3] = 0.0
    nodes = _aligned(n + 1, NODE_FLOATS)
    leaves = np.empty((n, 2), np.int32)
    counts = np.empty(3, np.int32)
    addresses = [array.ctypes.data for array in (boxes, order, nodes, leaves, counts)]
    launch(build_bvh, 1, inputs=[n, *addresses], device=wp.get_device("cpu"))
    n_nodes, n_leaves, depth = counts.tolist()
    if depth > MAX_DEPTH:
        raise RuntimeError(f"hierarchy is {depth} levels deep, the traversal stack holds {MAX_DEPTH}")
    used = _aligned(n_nodes, NODE_FLOATS)
    used[:] = nodes[:n_nodes]
    return used, leaves[:n_leaves], depth


def _leaf_lanes(leaves: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What lies in the lanes of each leaf, (m, WIDTH) int32, and which of them are filled."""
    begin, count = leaves.T[:, :, None]
    lane = np.arange(WIDTH)
    filled = lane < count
    return (order[np.where(filled, begin + lane, 0)] if len(order) else np.empty((0, WIDTH), np.int32)), filled


@np.errstate(over="ignore", invalid="ignore")  # NaN for areas beyond single precision, which compares as not worn out
def _cost(nodes: np.ndarray) -> float:
    """Summed area of all boxes over that of the root: about what a random ray visits."""
    lower = nodes[:, : 3 * WIDTH].reshape(-1, 3, WIDTH)
    upper = nodes[:, 3 * WIDTH : 6 * WIDTH].reshape(-1, 3, WIDTH)
    used = lower[:, 0] <= upper[:, 0]
    extent = np.where(used[:, None], upper, 0.0) - np.where(used[:, None], lower, 0.0)
    area = (extent * np.roll(extent, 1, axis=1)).sum(axis=1, dtype=np.float64)
    root = upper[0].max(axis=1) - lower[0].min(axis=1)
    return float(area.sum() / max((root * np.roll(root, 1)).sum(), 1e-300))


def _aligned(rows: int, columns: int) -> np.ndarray:
    """Uninitialised (rows, columns) float32 array that starts on a cache line."""
    raw = np.empty(rows * columns * 4 + CACHE_LINE, np.uint8)
    offset = -raw.ctypes.data % CACHE_LINE
    return raw[offset : offset + rows * columns * 4].view(np.float32).reshape(rows, columns)
