"""Triangle surfaces: reading, writing, marching cubes, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
import warp as wp
from warp.geometry import IsoSurfaceMarchingCubes

from nrc.files import write_atomically
from nrc.kernels.sdf import query_distance
from nrc.launch import heavy_range, launch, resolve_device

READ_EXTENSIONS = (".obj", ".stl", ".ply", ".glb", ".gltf")
WRITE_EXTENSIONS = (".ply", ".obj", ".glb")
SLIVER = 2e-6  # twice the area over the sum of the squared edges, below which Warp's queries skip a triangle
SLAB_POINTS = 1 << 21  # of the grid evaluated at once


class SurfaceError(ValueError):
    """A mesh that cannot be read, written or used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Surface:
    """Triangles, counter-clockwise seen from outside.

    Attributes:
        vertices: (n, 3) float32.
        faces: (m, 3) int32 vertex indices.
        colors: (n, 3) uint8 sRGB of the vertices, or None.
        warnings: What was dropped or repaired while reading, a line each.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray | None = None
    warnings: tuple[str, ...] = ()

    @property
    def areas(self) -> np.ndarray:
        """(m,) float64 area of each triangle."""
        a, b, c = self.vertices.astype(np.float64)[self.faces].transpose(1, 0, 2)
        return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)

    @property
    def volume(self) -> float:
        """Enclosed volume by the divergence theorem; negative where the triangles face inwards."""
        a, b, c = self.vertices.astype(np.float64)[self.faces].transpose(1, 0, 2)
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6.0)


def read_surface(path: str | PathLike[str]) -> Surface:
    """All triangles of an OBJ, STL, PLY, GLB or glTF file in one surface, its scene's transforms applied.

    Vertices at the same place become one. Degenerate triangles are dropped, with a warning that counts them.

    Raises:
        SurfaceError: The file is missing, damaged or of another kind, a coordinate is not finite, or no triangle with
            an area is left.
    """
    path = Path(path)
    if path.suffix.lower() not in READ_EXTENSIONS:
        raise SurfaceError(f"{path}: cannot read '{path.suffix}' as a mesh; known: {', '.join(READ_EXTENSIONS)}")
    try:
        with path.open("rb"):
            pass
        vertices, faces = _triangles(trimesh.load(path, force="scene", process=False, skip_materials=True))
    except OSError as error:
        raise SurfaceError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # trimesh raises whatever its parsing trips over
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SurfaceError(f"{path}: not a readable {path.suffix[1:].upper()} file ({reason})") from None
    if not len(faces):
        raise SurfaceError(f"{path}: has no triangles")
    if not (faces.min() >= 0 and faces.max() < len(vertices)):
        raise SurfaceError(f"{path}: a triangle refers to a vertex outside 0...{len(vertices) - 1}")
    used = np.unique(faces)
    if n_bad := int(np.count_nonzero(~np.isfinite(vertices[used]).all(axis=1))):
        raise SurfaceError(f"{path}: {n_bad} of {len(used)} vertices are not finite")
    vertices, faces = merge_vertices(vertices, faces)
    kept = ~_degenerate(vertices, faces)
    warnings = []
    if not kept.all():
        warnings.append(f"{path.name}: {len(kept) - kept.sum()} of {len(kept)} triangles are degenerate, dropped")
    # Open edges are counted with slivers: they have no area, but close what is around them
    if n_open := open_edges(faces[_distinct(faces)]):
        warnings.append(f"{path.name}: not closed, {n_open} boundary edges")
    if not kept.any():
        raise SurfaceError(f"{path}: all {len(kept)} triangles are degenerate")
    return Surface(vertices, np.ascontiguousarray(faces[kept]), None, tuple(warnings))


def _triangles(scene: Any) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (n, 3) float32 and faces (m, 3) of all meshes of a trimesh scene, where its graph puts them."""
    all_vertices, all_faces = [np.empty((0, 3), np.float32)], [np.empty((0, 3), np.int64)]
    n = 0
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        mesh = scene.geometry[name]
        if not isinstance(mesh, trimesh.Trimesh):  # points and lines enclose nothing
            continue
        faces = np.asarray(mesh.faces, np.int64)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
            placed = np.asarray(mesh.vertices, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
            all_vertices.append(placed.astype(np.float32))
        all_faces.append(n + (faces[:, ::-1] if np.linalg.det(matrix[:3, :3]) < 0.0 else faces))  # fronts stay fronts
        n += len(mesh.vertices)
    return np.concatenate(all_vertices), np.concatenate(all_faces)


def merge_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices without duplicates (bit for bit, -0 as 0) and the faces that refer to them."""
    keys = np.ascontiguousarray(vertices + np.float32(0.0), np.float32)
    rows = keys.view(np.dtype((np.void, 12))).ravel()
    _, at, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(at)  # vertices stay in the order of the file
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return keys[at[order]], place[inverse.ravel()][faces].astype(np.int32)


def open_edges(faces: np.ndarray) -> int:
    """Edges that triangles do not run along equally often in both directions; 0 for a closed, oriented surface."""
    a, b = faces.astype(np.int64).ravel(), np.roll(faces, -1, axis=1).astype(np.int64).ravel()
    forward = a < b
    keys = np.where(forward, a, b) * (int(faces.max(initial=0)) + 1) + np.where(forward, b, a)
    _, inverse = np.unique(keys, return_inverse=True)
    return int(np.count_nonzero(np.bincount(inverse.ravel(), np.where(forward, 1.0, -1.0))))


def write_surface(path: str | PathLike[str], surface: Surface) -> None:
    """Write a surface, with its vertex colours where it has any, replacing the file only once it is complete.

    Raises:
        SurfaceError: The extension is not .ply, .obj or .glb, the surface is empty, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in WRITE_EXTENSIONS:
        raise SurfaceError(f"{path}: cannot write '{path.suffix}'; supported: {', '.join(WRITE_EXTENSIONS)}")
    if not len(surface.faces):
        raise SurfaceError(f"{path}: the surface has no triangles to write")
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, vertex_colors=surface.colors, process=False)
    data: Any = mesh.export(file_type=kind[1:])
    content = data.encode() if isinstance(data, str) else data
    write_atomically(path, lambda temporary: temporary.write_bytes(content), SurfaceError)


def extract_surface(
    values: np.ndarray | Callable[[np.ndarray], np.ndarray],
    *,
    level: float = 0.0,
    lower: Any = (0.0, 0.0, 0.0),
    upper: Any = (1.0, 1.0, 1.0),
    resolution: int = 256,
    device: Any = None,
) -> Surface:
    """The surface where a function equals `level`, by marching cubes; inside is where it is smaller.

    For a density, whose inside is where it is larger, pass it and the level with their signs changed. The surface is
    open where it leaves the box. Grids of any size are worked on in slabs: memory grows with the surface and one slab.

    Args:
        values: (nx, ny, nz) values on the nodes of a regular grid over the box, the corners included; or a function of
            (n, 3) float32 points that returns their n values, evaluated on such a grid.
        lower, upper: Corners of the box.
        resolution: For a function: cells along the longest side of the box; the others have cells of about the same
            size.
        device: Warp device for the marching cubes; the first GPU, else the CPU.

    Returns:
        The surface, vertices merged, faces counter-clockwise from outside; without faces if the level is not crossed.

    Raises:
        SurfaceError: A grid of fewer than two nodes along an axis, or values that are not finite.
    """
    low, high = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    if callable(values):
        shape = tuple(int(n) + 1 for n in np.maximum(1, np.ceil(resolution * (high - low) / (high - low).max() - 1e-9)))
    else:
        shape = values.shape
    if len(shape) != 3 or min(shape) < 2 or not (high > low).all():
        raise SurfaceError(f"marching cubes need at least 2 nodes along each of three axes and a box, got {shape}")
    spacing = (high - low) / (np.array(shape) - 1)
    run = resolve_device(device)
    n_layers = max(1, SLAB_POINTS // (shape[1] * shape[2]))
    plane = np.stack(np.meshgrid(*[low[k] + spacing[k] * np.arange(shape[k]) for k in (1, 2)], indexing="ij"), axis=-1)

    def layers(begin: int, end: int) -> np.ndarray:
        if not callable(values):
            part = np.asarray(values[begin:end], np.float32)
        else:
            points = np.empty((end - begin, *shape[1:], 3), np.float32)
            points[..., 1:] = plane
            points[..., 0] = (low[0] + spacing[0] * np.arange(begin, end))[:, None, None]
            part = np.asarray(values(points.reshape(-1, 3)), np.float32).reshape(end - begin, *shape[1:])
        if not np.isfinite(part).all():
            raise SurfaceError("marching cubes: the function has values that are not finite")
        return part

    all_vertices, all_faces, n_vertices = [], [], 0
    seam = np.empty(0, np.int64)  # indices of the vertices on the plane shared with the slab before
    last = layers(0, 1)
    for begin in range(0, shape[0] - 1, n_layers):
        end = min(begin + n_layers, shape[0] - 1)  # cells begin ... end - 1, planes begin ... end
        slab = np.concatenate([last, layers(begin + 1, end + 1)])
        last = slab[-1:]
        if not (slab.min() < level <= slab.max()):
            seam = seam[:0]
            continue
        grid: Any = wp.array(slab, dtype=float, device=run)
        found, corners = IsoSurfaceMarchingCubes.extract(grid, level)
        known, n_on_last = _edges_on_first(slab >= level), np.count_nonzero(_crossed(slab[-1] >= level))
        vertices = found.numpy().astype(np.float64)
        vertices[:, 0] += begin
        index = np.empty(len(vertices), np.int64)
        new = np.ones(len(vertices), bool)
        if begin:
            index[known] = seam
            new[known] = False
        index[new] = n_vertices + np.arange(np.count_nonzero(new))
        n_vertices += int(np.count_nonzero(new))
        all_vertices.append(vertices[new])
        all_faces.append(index[corners.numpy().reshape(-1, 3)])
        seam = index[len(index) - n_on_last :]
    if not all_faces:
        return Surface(np.empty((0, 3), np.float32), np.empty((0, 3), np.int32))
    faces = np.concatenate(all_faces)
    positions = low + spacing * np.concatenate(all_vertices)
    return Surface(positions.astype(np.float32), np.ascontiguousarray(faces[_distinct(faces)], np.int32))


def sample_surface(surface: Surface, n_points: int, seed: int = 0) -> np.ndarray:
    """(n_points, 3) float32 points on the surface, uniform by area."""
    rng = np.random.default_rng(seed)
    cumulated = np.cumsum(surface.areas)
    face = np.searchsorted(cumulated, rng.random(n_points) * cumulated[-1], side="right")
    a, b, c = surface.vertices[surface.faces[np.minimum(face, len(surface.faces) - 1)]].transpose(1, 0, 2)
    u, v = rng.random((2, n_points, 1))
    root = np.sqrt(u)
    return (a * (1.0 - root) + b * (root * (1.0 - v)) + c * (root * v)).astype(np.float32)


def chamfer(a: Surface, b: Surface, *, n_points: int = 1 << 17, seed: int = 0, device: Any = None) -> float:
    """Chamfer distance: the mean distance of points on `a` to the nearest point of `b`, averaged with the reverse.

    Distances are not squared, points are uniform by area, nearest points are exact (anywhere on the other's triangles).

    Args:
        n_points: On each of the two.
        seed: Of the points.
        device: Warp device for the queries; the first GPU, else the CPU.

    Raises:
        SurfaceError: One of them has no triangles.
    """
    run = resolve_device(device)
    low, size = _cube(a, b, "Chamfer distance")
    means = []
    for source, target in ((a, b), (b, a)):
        mesh = device_mesh((target.vertices - low) / size, target.faces, run)
        points = (sample_surface(source, n_points, seed) - low) / size
        means.append(float(_distances(mesh, points, run, signed=False).mean(dtype=np.float64)))
    return 0.5 * size * (means[0] + means[1])


def mesh_iou(a: Surface, b: Surface, *, n_points: int = 1 << 18, seed: int = 0, device: Any = None) -> float:
    """Volume of the intersection over that of the union, on uniform points in the box around both.

    Inside is where the winding number is over 1/2. 0 where no point is inside of either.

    Raises:
        SurfaceError: One of them has no triangles.
    """
    run = resolve_device(device)
    low, size = _cube(a, b, "intersection over union")
    corners = np.concatenate([a.vertices, b.vertices])
    extent = (corners.max(axis=0) - low) / size
    points = (np.random.default_rng(seed).random((n_points, 3)) * extent).astype(np.float32)
    inside = []
    for surface in (a, b):
        mesh = device_mesh((surface.vertices - low) / size, surface.faces, run)
        inside.append(_distances(mesh, points, run, signed=True) < 0.0)
    return overlap(inside[0], inside[1])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two sets of points given as booleans; 0 if both are empty."""
    n_union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / n_union) if n_union else 0.0


def device_mesh(vertices: np.ndarray, faces: np.ndarray, device: wp.Device) -> wp.Mesh:
    """Vertices (n, 3) and faces (m, 3) as a Warp mesh for closest-point queries with winding numbers."""
    return wp.Mesh(
        wp.array(np.ascontiguousarray(vertices, np.float32), dtype=wp.vec3, device=device),
        wp.array(np.ascontiguousarray(faces, np.int32).ravel(), dtype=int, device=device),
        support_winding_number=True,
        bvh_constructor="sah" if device.is_cpu else "lbvh",
        bvh_leaf_size=4,
    )


def _distances(mesh: wp.Mesh, points: np.ndarray, device: wp.Device, *, signed: bool) -> np.ndarray:
    n = len(points)
    x: Any = wp.array(np.ascontiguousarray(points, np.float32), dtype=wp.vec3, device=device)
    distance = wp.empty(n, dtype=float, device=device)
    arguments: dict[str, Any] = {"device": device, "range_size": heavy_range(n)}
    launch(query_distance, n, inputs=[mesh.id, int(signed), x], outputs=[distance], **arguments)
    return distance.numpy()


def _cube(a: Surface, b: Surface, what: str) -> tuple[np.ndarray, float]:
    """Lower corner and longest side of the box around both surfaces that `what` compares in the unit cube."""
    if not len(a.faces) or not len(b.faces):
        raise SurfaceError(f"{what}: a surface has no triangles")
    corners = np.concatenate([a.vertices, b.vertices])
    low = corners.min(axis=0)
    return low, float(max((corners.max(axis=0) - low).max(), np.finfo(np.float32).tiny))


def _distinct(faces: np.ndarray) -> np.ndarray:
    """Which faces have three different vertices."""
    a, b, c = faces.T
    return (a != b) & (b != c) & (c != a)


def _degenerate(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Which faces have no area that queries could tell from zero."""
    a, b, c = vertices.astype(np.float64)[faces].transpose(1, 0, 2)
    double_area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    squares = sum(np.sum((p - q) ** 2, axis=1) for p, q in ((a, b), (b, c), (c, a)))
    return ~(double_area > SLIVER * squares)


def _crossed(above: np.ndarray) -> np.ndarray:
    """(ny, nz, 2) which edges of a plane's nodes, to the next node along y and along z, cross the level."""
    crossed = np.zeros((*above.shape, 2), bool)
    crossed[:-1, :, 0] = above[1:] != above[:-1]
    crossed[:, :-1, 1] = above[:, 1:] != above[:, :-1]
    return crossed


def _edges_on_first(above: np.ndarray) -> np.ndarray:
    """Indices of the vertices on the first plane of a slab, in the order in which they end the slab before.

    Marching cubes number the crossed edges by their lower node, then by axis.
    """
    edges = np.concatenate([(above[0] != above[1])[:, :, None], _crossed(above[0])], axis=2)
    in_plane = np.broadcast_to(np.array([False, True, True]), edges.shape)[edges]
    return np.flatnonzero(in_plane)
