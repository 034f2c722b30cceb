"""Readers: each turns a file into a `Scene`."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from nrc.assets.model import Model
from nrc.scene import Scene, SceneError

FORMATS = (".gltf", ".glb", ".obj", ".ply", ".stl", ".json", ".xml")


def load(source: str | Path, *, defines: dict[str, str] | None = None) -> Scene:
    """Scene of a file (glTF, GLB, OBJ, PLY, STL, scene JSON, Mitsuba 3 XML) or of a built-in scene's name.

    Args:
        source: Path, or a key of `builtin_scenes()`. A file of that name in the current folder goes first.
        defines: Values of an XML file's `$name` parameters.

    Raises:
        SceneError: The file is missing, broken or of an unknown format. What is only substituted or left out is listed
            in `Scene.warnings` instead.
    """
    path = Path(source)
    if not path.is_file() and str(source) in builtin_scenes():
        path = _builtin_folder() / f"{source}.json"
    suffix = path.suffix.lower()
    if not path.exists():
        hint = "" if path.suffix else f"; built-in scenes: {', '.join(builtin_scenes())}"
        raise SceneError(f"{source}: no such file{hint}")
    if suffix not in FORMATS or not path.is_file():
        raise SceneError(f"{source}: cannot read this; known formats: {', '.join(FORMATS)}")
    if defines and suffix != ".xml":
        raise SceneError(f"{source}: parameters ({', '.join(defines)}) are understood in Mitsuba XML files only")
    try:
        if suffix == ".xml":
            from nrc.assets.mitsuba import load_mitsuba

            return load_mitsuba(path, defines or {})
        if suffix == ".json":
            from nrc.assets.scene_json import read_scene_json

            return read_scene_json(path).to_scene()
        return read_model(path).to_scene()
    except SceneError as error:
        if path.name in str(error):
            raise
        raise SceneError(f"{path.name}: {error}") from None
    except OSError as error:
        raise SceneError(f"{path.name}: cannot read: {error.strerror or error}") from None


def read_model(path: Path) -> Model:
    """What a glTF, GLB, OBJ, PLY or STL file holds, without defaults for what it does not."""
    if path.suffix.lower() in (".gltf", ".glb"):
        from nrc.assets.gltf import read_gltf

        return read_gltf(path)
    from nrc.assets.meshes import read_mesh_file

    return read_mesh_file(path)


def builtin_scenes() -> dict[str, str]:
    """Names of the scenes that ship with the package, each with its description."""
    files = sorted(path for path in _builtin_folder().iterdir() if path.suffix == ".json")
    return {path.stem: json.loads(path.read_text("utf-8")).get("description", "") for path in files}


def _builtin_folder() -> Path:
    return Path(str(resources.files("nrc.scenes")))
