"""What to look at: the session for a scene, an image, a mesh, a folder of photographs or a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nrc import assets
from nrc.cache import SNAPSHOT_KIND as CACHE_KIND
from nrc.fit.fitted_image import SNAPSHOT_KIND as FIELD_KIND
from nrc.fit.radiance_field import SNAPSHOT_KIND as NERF_KIND
from nrc.snapshot import SnapshotError, format_of, load_tensors
from nrc.viewer.session import Session

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".exr", ".hdr", ".pfm", ".webp", ".bmp")
MESHES = (".obj", ".ply", ".stl")
SCENES = tuple(suffix for suffix in assets.FORMATS if suffix not in MESHES)


class OpenError(ValueError):
    """A source that no session is for; the message names it."""


def kind_of(source: str) -> str:
    """ "scene", "image", "sdf", "nerf" or "snapshot": by name, suffix and, for OBJ, whether it names materials.

    Raises OpenError.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        return "snapshot" if (path / "snapshot.safetensors").is_file() else "nerf"
    if path.is_file():
        if suffix == ".safetensors":
            return "snapshot"
        if suffix == ".obj":
            return "scene" if _names_materials(path) else "sdf"
        for kind, suffixes in (("sdf", MESHES), ("scene", SCENES), ("image", IMAGES)):
            if suffix in suffixes:
                return kind
        known = ", ".join((*SCENES, *MESHES, *IMAGES, ".safetensors"))
        raise OpenError(f"{source}: cannot view this; known formats: {known}, and folders of photographs")
    if source in assets.builtin_scenes():
        return "scene"
    raise OpenError(f"{source}: no such file or folder; built-in scenes: {', '.join(assets.builtin_scenes())}")


def open_source(source: str, *, kind: str | None = None, device: Any = None, **scene_options: Any) -> Session:
    """The session for `source`, not compiled yet.

    Args:
        kind: "scene", "image", "sdf" or "nerf"; by default what `kind_of` says.
        scene_options: `defines` of an XML file; `integrator`, `encoding`, `seed` of `SceneSession`.

    Raises:
        ValueError: A source that cannot be used; the message names the file and what is wrong.
    """
    kind = kind or kind_of(source)
    if kind == "scene":
        from nrc.viewer.scene_session import SceneSession

        scene = assets.load(source, defines=scene_options.pop("defines", None))
        session = SceneSession(scene, device=device, **scene_options)
        session.name = _title(Path(source), "scene")
        return session
    snapshot = None
    if kind == "snapshot":
        path = Path(source)
        snapshot = path / "snapshot.safetensors" if path.is_dir() else path
        kind = _kind_of_snapshot(snapshot)
    if snapshot is None:
        return _fit_session(kind)(source, device=device)
    session = _fit_session(kind).from_snapshot(snapshot, device=device)
    session.name = _title(snapshot, "snapshot")
    return session


def holds_cache(path: Path) -> bool:
    """Whether a file is a radiance cache that was saved."""
    return path.suffix.lower() == ".safetensors" and format_of(path) == CACHE_KIND


def _title(path: Path, common: str) -> str:
    """Name of a file without its suffix, of its folder where the file is called what many are."""
    path = path.resolve()
    return path.parent.name if path.stem == common else path.stem


def _fit_session(kind: str) -> Any:
    if kind == "image":
        from nrc.viewer.image_session import ImageSession

        return ImageSession
    if kind == "sdf":
        from nrc.viewer.sdf_session import SdfSession

        return SdfSession
    from nrc.viewer.nerf_session import NerfSession

    return NerfSession


def _kind_of_snapshot(path: Path) -> str:
    """The kind of fit in a snapshot. Raises SnapshotError."""
    _, config = load_tensors(path, kind=(FIELD_KIND, NERF_KIND, CACHE_KIND))
    fit = config.get("fit")
    kind = fit.get("kind") if isinstance(fit, dict) else None
    if kind not in ("image", "sdf", "nerf"):
        raise SnapshotError(f"{path}: holds no fit to look at; open a cache's scene first, then drop the file onto it")
    return str(kind)


def _names_materials(path: Path) -> bool:
    with path.open("rb") as file:
        return any(line.lstrip().startswith(b"mtllib") for line in file)
