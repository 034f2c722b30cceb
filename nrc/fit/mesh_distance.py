"""`MeshDistance`: a mesh in the unit cube and exact signed distances to it."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.fit.surface import Surface, SurfaceError, device_mesh, open_edges, read_surface
from nrc.kernels import sdf
from nrc.launch import heavy_range, launch

SIDE = 0.9  # of the unit cube that the mesh's longest side takes; the rest is margin
NOISE = 1 / 1024  # standard deviation of points near the surface, in bounding radii
LOGISTIC = np.sqrt(3.0) / np.pi  # scale of a logistic distribution of standard deviation 1
N_PROBES = 1 << 13
DIFFERING = 1e-3  # share of signs near the surface that may differ where the faster way is taken
PROBE_SAMPLE = -3  # of the generator


class MeshDistance:
    """A mesh inside the unit cube and exact signed distances to it.

    Args:
        path: OBJ, STL, PLY or GLB file.
        device: Warp device of the queries.
        seed: Of the points that tell whether the mesh has an inside.

    Attributes:
        surface: The mesh as it is in the file, faces outwards.
        lower, upper: Corners of its box in the unit cube, with a margin on every side as wide as on the longest.
        scale, offset: A point p of the file is at scale * p + offset in the cube.
        radius: Of the mesh's bounding sphere about the box's centre, in units of the cube.
        noise: Scale of the logistic distribution of points near the surface.
        view: What kernels read.
        warnings: What was repaired.
        sha256: Of the file, and of the triangles where these are in others.

    Raises:
        SurfaceError: The file cannot be read, or the mesh encloses nothing.
    """

    def __init__(self, path: str | PathLike[str], device: wp.Device, seed: int = 1337) -> None:
        surface = read_surface(path)
        self.device = device
        low, high = surface.vertices.min(axis=0).astype(np.float64), surface.vertices.max(axis=0).astype(np.float64)
        self.scale = float(SIDE / (high - low).max())
        self.offset = 0.5 - 0.5 * self.scale * (low + high)
        vertices = self.scale * surface.vertices + self.offset
        half = 0.5 * self.scale * (high - low) + 0.5 * (1.0 - SIDE)
        self.lower, self.upper = 0.5 - half, 0.5 + half
        self.radius = float(np.linalg.norm(vertices - 0.5, axis=1).max())
        self.noise = float(NOISE * LOGISTIC * self.radius)
        self.warnings = list(surface.warnings)
        digest = hashlib.sha256(Path(path).read_bytes())
        if Path(path).suffix.lower() == ".gltf":  # its triangles are in other files
            digest.update(surface.vertices.tobytes() + surface.faces.tobytes())
        self.sha256 = digest.hexdigest()
        self.seed = seed & 0x7FFFFFFF

        def view_of(faces: np.ndarray) -> Any:
            scaled = Surface(vertices.astype(np.float32), faces)
            self._mesh = device_mesh(scaled.vertices, faces, device)
            cumulated = np.cumsum(scaled.areas)
            view = sdf.MeshView()
            view.mesh = self._mesh.id
            shares = np.minimum(cumulated / cumulated[-1] * 2.0**32, 2.0**32 - 1.0).astype(np.uint32)
            view.area_cdf = wp.array(shares, dtype=wp.uint32, device=device)
            return view

        faces = surface.faces[_along_curve(vertices[surface.faces].mean(axis=1))]
        self.view = view_of(faces)
        closed = open_edges(faces) == 0
        n_inside, n_differing = self._probe(closed)
        if not n_inside:  # perhaps it is inside out
            self.view = view_of(np.ascontiguousarray(faces[:, ::-1]))
            n_inside, n_differing = self._probe(closed)
            if n_inside:
                faces = np.ascontiguousarray(faces[:, ::-1])
                self.warnings.append(f"{Path(path).name}: faces inwards, turned inside out")
        if not n_inside:
            reason = "" if closed else f" and has {open_edges(faces)} boundary edges"
            raise SurfaceError(
                f"{path}: the mesh encloses nothing: no probe has a winding number over 1/2{reason}; it has no inside"
            )
        self.view.normals_tell_sides = int(closed and n_differing <= DIFFERING * N_PROBES)
        self.surface = Surface(surface.vertices, faces, None, surface.warnings)

    def _probe(self, closed: bool) -> tuple[int, int]:
        """How many probes are inside, and at how many near the surface the two ways to tell the side differ.

        Near the surface of an open mesh the winding number is over 1/2 somewhere whatever its shape, so that says
        nothing about it.
        """
        _, distance = self.uniform(N_PROBES, PROBE_SAMPLE)
        n_inside = int(np.count_nonzero(distance.numpy() < 0.0))
        differs, inside = (wp.empty(N_PROBES, dtype=int, device=self.device) for _ in range(2))
        launch(
            sdf.compare_signs,
            N_PROBES,
            inputs=[self.view, self.seed, N_PROBES, self.noise],
            outputs=[differs, inside],
            device=self.device,
            range_size=heavy_range(N_PROBES),
        )
        if closed:
            n_inside += int(inside.numpy().sum())
        return n_inside, int(differs.numpy().sum())

    def uniform(self, n: int, sample: int) -> tuple[wp.array, wp.array]:
        """Set `sample` of n uniform points in the box, and their signed distances, float32 (n,)."""
        x, distance = (wp.empty(n, dtype=dtype, device=self.device) for dtype in (wp.vec3, float))
        launch(
            sdf.draw_uniform,
            n,
            inputs=[self.view, self.seed, sample, wp.vec3(*self.lower), wp.vec3(*(self.upper - self.lower)), 0],
            outputs=[x, distance],
            device=self.device,
            range_size=heavy_range(n),
        )
        return x, distance

    def distances(self, x: np.ndarray) -> np.ndarray:
        """Signed distances (n,) at points (n, 3) of the cube."""
        points: Any = wp.array(np.ascontiguousarray(x, np.float32), dtype=wp.vec3, device=self.device)
        distance = wp.empty(len(x), dtype=float, device=self.device)
        launch(
            sdf.query_distance,
            len(x),
            inputs=[self.view.mesh, 1, points],
            outputs=[distance],
            device=self.device,
            range_size=heavy_range(len(x)),
        )
        return distance.numpy()

    def to_file(self, surface: Surface) -> Surface:
        """A surface in the cube, in the coordinates of the mesh's file."""
        vertices = (surface.vertices - self.offset) / self.scale
        return Surface(vertices.astype(np.float32), surface.faces)

    def to_cube(self) -> Surface:
        """The mesh in the cube."""
        return Surface((self.scale * self.surface.vertices + self.offset).astype(np.float32), self.surface.faces)


def _along_curve(points: np.ndarray) -> np.ndarray:
    """Order of points in the unit cube along a Morton curve: what is drawn together is close together."""
    keys = np.zeros(len(points), np.uint64)
    cells = np.clip(points * 1024.0, 0.0, 1023.0).astype(np.uint64)
    for bit in range(10):
        for axis in range(3):
            keys |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(3 * bit + axis)
    return np.argsort(keys, kind="stable")
