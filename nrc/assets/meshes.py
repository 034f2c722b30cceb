"""Readers of mesh formats without scene data: OBJ (`nrc.assets.obj`), PLY and STL (through trimesh)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from trimesh.exchange.ply import load_ply
from trimesh.exchange.stl import load_stl
from trimesh.geometry import triangulate_quads

from nrc.assets.model import Model
from nrc.assets.obj import read_obj
from nrc.image import srgb_decode
from nrc.scene import Material, Mesh, SceneError
from nrc.transforms import unit


def read_mesh_file(path: Path) -> Model:
    """What an .obj, .ply or .stl file holds. Raises SceneError if it cannot be read.

    PLY vertices may have normals, texture coordinates (v from the bottom) and colours (sRGB); STL is flat. Both are
    grey diffuse.
    """
    suffix = path.suffix.lower()
    if suffix == ".obj":
        return read_obj(path)
    model = Model(name=path.stem)
    with path.open("rb") as file:
        try:
            if suffix == ".ply":
                parts = load_ply(file, fix_texture=False, skip_materials=True)
                attributes = _ply_attributes(parts, model)
            else:
                parts, attributes = load_stl(file), {}
            triangles = _triangles(parts, path)
        except SceneError:
            raise
        except Exception as error:  # trimesh raises whatever its parsing trips over
            raise SceneError(f"{path.name}: not a readable {suffix[1:].upper()} file: {error}") from None
    grey = 1.0 if "colors" in attributes else 0.6
    model.materials = [Material(name="default", base_color=(grey, grey, grey), two_sided=True)]
    positions = np.ascontiguousarray(parts["vertices"], np.float32)
    model.meshes = [Mesh(positions, triangles, 0, name=path.stem, **attributes)]
    return model


def _triangles(parts: dict[str, Any], path: Path) -> np.ndarray:
    faces = parts.get("faces")
    if faces is None and "geometry" in parts and parts["geometry"]:
        solids = list(parts["geometry"].values())  # ASCII STL of several solids
        counts = np.cumsum([0] + [len(solid["vertices"]) for solid in solids])
        parts["vertices"] = np.concatenate([solid["vertices"] for solid in solids])
        faces = np.concatenate([solid["faces"] + start for solid, start in zip(solids, counts, strict=False)])
    if faces is None or len(faces) == 0:
        raise SceneError(f"{path.name}: has no triangles")
    return np.ascontiguousarray(triangulate_quads(faces), np.int32)


def _ply_attributes(parts: dict[str, Any], model: Model) -> dict[str, np.ndarray]:
    """Normals, uv0 and colors that the vertices of a PLY file have."""
    elements = parts["metadata"]["_ply_raw"]
    result: dict[str, np.ndarray] = {}
    if "vertex" not in elements or not elements["vertex"]["length"]:
        return result
    data = elements["vertex"]["data"]
    names = set(data.keys() if isinstance(data, dict) else data.dtype.names)
    if {"nx", "ny", "nz"} <= names:
        result["normals"] = unit(np.column_stack([data[key] for key in ("nx", "ny", "nz")])).astype(np.float32)
    for u, v in (("u", "v"), ("s", "t"), ("texture_u", "texture_v")):
        if {u, v} <= names:
            result["uv0"] = np.column_stack([data[u], 1.0 - np.asarray(data[v])]).astype(np.float32)
            break
    if {"red", "green", "blue"} <= names:
        channels = [np.asarray(data[key]) for key in ("red", "green", "blue")]
        opaque = np.ones(len(channels[0]))
        # ASCII columns arrive as whatever parsed: the property's declared type tells integers from fractions
        declared = str(elements["vertex"]["properties"]["red"])
        scale = 1.0 if "f" in declared else 65535.0 if "2" in declared else 255.0
        rgb = srgb_decode(np.column_stack(channels).astype(float) / scale)
        alpha = np.asarray(data["alpha"]).astype(float) / scale if "alpha" in names else opaque
        result["colors"] = np.column_stack([rgb, alpha]).astype(np.float32)
    faces = elements.get("face", {}).get("data")
    face_names = (
        faces.keys() if isinstance(faces, dict) else getattr(getattr(faces, "dtype", None), "names", None) or ()
    )
    if left_out := sorted({"texcoord", "red"} & set(face_names)):
        model.warn(f"PLY face properties not used: {', '.join(left_out)}")
    return result
