"""Wavefront OBJ reader: polygons, per-corner normals and texture coordinates, vertex colours, material groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nrc.assets.model import Model
from nrc.assets.mtl import read_mtl
from nrc.image import srgb_decode
from nrc.scene import Material, Mesh, SceneError
from nrc.transforms import unit

DRAWN = ("v", "vt", "vn", "f", "g", "o", "usemtl", "mtllib", "s")
Corner = tuple[int, int, int]


def read_obj(path: Path) -> Model:
    """What an OBJ file and its MTL files hold; one mesh for each run of faces of one group and material.

    Polygons become fans; faces without normals are flat. Vertex colours are taken as sRGB.
    """
    return _Reader(path).read()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = Model(name=path.stem)
        self.v: list[list[float]] = []
        self.vt: list[list[float]] = []
        self.vn: list[list[float]] = []
        self.groups: dict[tuple[str, str], list[list[Corner]]] = {}
        self.library: dict[str, Material] = {}

    def read(self) -> Model:
        group, material = "", ""
        faces: list[list[Corner]] | None = None
        others: set[str] = set()
        text = self.path.read_text("utf-8", "replace").replace("\\\n", " ")
        for number, line in enumerate(text.split("\n"), 1):
            words = line.split()
            if not words or words[0][0] == "#":
                continue
            key = words[0]
            try:
                if key == "v":
                    self.v.append([float(word) for word in words[1:]])
                elif key == "vt":
                    self.vt.append([float(word) for word in words[1:3]])
                elif key == "vn":
                    self.vn.append([float(word) for word in words[1:4]])
                elif key == "f":
                    if faces is None:
                        faces = self.groups.setdefault((group, material), [])
                    faces.append([self._corner(word) for word in words[1:] if word[0] != "#"])
                elif key in ("g", "o"):
                    group, faces = " ".join(words[1:]), None
                elif key == "usemtl":
                    material, faces = " ".join(words[1:]), None
                elif key == "mtllib":
                    self._library(line.strip()[len("mtllib") :].strip())
                elif key not in DRAWN:
                    others.add(key)
            except (ValueError, IndexError) as error:
                if isinstance(error, SceneError):
                    raise
                raise SceneError(f"{self.path.name}: line {number}: cannot read {line.strip()[:60]!r}") from None
        if others:
            self.model.warn(f"OBJ statements not drawn: {', '.join(sorted(others))}")
        self._build()
        return self.model

    def _corner(self, word: str) -> Corner:
        """Indices from 0 of position, texture coordinate and normal; -1 where there is none."""
        parts = word.split("/")
        result = []
        for part, values in zip(parts + [""] * (3 - len(parts)), (self.v, self.vt, self.vn), strict=True):
            index = int(part) if part else 0
            index = index - 1 if index > 0 else index + len(values) if index < 0 else -1
            if part and not 0 <= index < len(values):
                raise SceneError(f"{self.path.name}: a face refers to element {part} of {len(values)}")
            result.append(index)
        if result[0] < 0:
            raise ValueError(word)
        return result[0], result[1], result[2]

    def _library(self, text: str) -> None:
        names = [text] if (self.path.parent / text).is_file() else text.split()
        for name in names:
            file = self.path.parent / name.replace("\\", "/")
            if file.is_file():
                self.library.update(read_mtl(file, self.model))
            else:
                self.model.warn(f"material file {name!r} does not exist")

    def _build(self) -> None:
        indices: dict[str, int] = {}
        positions, colors = self._vertices()
        for (group, material), faces in self.groups.items():
            if material not in indices:
                indices[material] = len(self.model.materials)
                self.model.materials.append(self._material(material, colors is not None))
            triangles = [
                (face[0], face[i], face[i + 1]) for face in faces for i in range(1, len(face) - 1) if len(face) >= 3
            ]
            if not triangles:
                continue
            corners = np.array(triangles, np.int64).reshape(-1, 3)
            unique, inverse = np.unique(corners, axis=0, return_inverse=True)
            at, uv_at, n_at = unique.T
            normals = _chosen(self.vn, n_at, 3)
            uv = _chosen(self.vt, uv_at, 2)
            if uv is not None:
                uv[:, 1] = 1.0 - uv[:, 1]
            mesh = Mesh(
                positions=positions[at].astype(np.float32),
                indices=inverse.reshape(-1, 3).astype(np.int32),
                material=indices[material],
                normals=None if normals is None else unit(normals).astype(np.float32),
                uv0=None if uv is None else uv.astype(np.float32),
                colors=None if colors is None else colors[at],
                name=group or material or self.path.stem,
            )
            self.model.meshes.append(mesh)

    def _vertices(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Positions (n, 3), and colours (n, 4) if every vertex has one."""
        if any(len(vertex) < 3 for vertex in self.v):
            raise SceneError(f"{self.path.name}: a vertex has fewer than three coordinates")
        positions = np.array([vertex[:3] for vertex in self.v], float).reshape(-1, 3)
        if not self.v or any(len(vertex) < 6 for vertex in self.v):
            return positions, None
        rgb = srgb_decode(np.array([vertex[3:6] for vertex in self.v], float))
        return positions, np.column_stack([rgb, np.ones(len(rgb))]).astype(np.float32)

    def _material(self, name: str, colored: bool) -> Material:
        if name in self.library:
            return self.library[name]
        if name:
            self.model.warn(f"material {name!r} is not defined: grey diffuse in its place")
        grey = 1.0 if colored else 0.6
        return Material(name=name or "default", base_color=(grey, grey, grey), two_sided=True)


def _chosen(values: list[list[float]], at: np.ndarray, width: int) -> np.ndarray | None:
    """Rows `at` of `values` padded with zeros to `width`, or None unless every corner has one."""
    if at.min() < 0:
        return None
    return np.array([(values[i] + [0.0] * width)[:width] for i in at], float)
