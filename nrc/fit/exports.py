"""`export`: what `nrc export` writes from a snapshot: crops of images, meshes, pictures, frames along a camera path."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from nrc.fit import sdf
from nrc.fit.camera_path import read_camera_path, write_frames
from nrc.fit.fitted_image import FittedImage
from nrc.fit.frame import Placement
from nrc.fit.job import FitError
from nrc.fit.nerf_render import NerfRenderer, extract_mesh, to_bytes
from nrc.fit.radiance_field import RadianceField
from nrc.fit.run import read_snapshot
from nrc.fit.surface import WRITE_EXTENSIONS, Surface, write_surface
from nrc.fit.views import load_views
from nrc.image import FLOAT_EXTENSIONS, srgb_decode, write_exr, write_image
from nrc.launch import resolve_device

DEFAULT_RESOLUTION = 256  # cells of a mesh's grid along its longest side
DEFAULT_SIZE = (640, 480)  # of frames [px]


def export(
    snapshot: str | PathLike[str], out: str | PathLike[str], *, device: Any = None, **options: Any
) -> dict[str, Any]:
    """Write something to look at, or to use elsewhere, from a snapshot of a fit.

    Args:
        snapshot: File that a fit wrote, or the folder of its run.
        out: Where to write. Of an image: .png, .exr, .hdr. Of a distance: a mesh (.ply, .obj, .glb), or the shaded
            picture (.png). Of a radiance field: a mesh, a picture of a view (.png, or .exr with alpha and depth), or,
            with `camera_path`, a folder of numbered frames.
        options: Those of `export_image`, `export_sdf` or `export_nerf`.

    Returns:
        `out`, and what there is to say about it.

    Raises:
        ValueError: A snapshot, option or file that cannot be used.
    """
    path, config = read_snapshot(snapshot)
    out = Path(out)
    fit = config.get("fit")
    kind = str(fit.get("kind")) if isinstance(fit, dict) else "no fit"
    writers: dict[str, Callable[..., dict[str, Any]]] = {"image": export_image, "sdf": export_sdf, "nerf": export_nerf}
    if kind not in writers:
        raise FitError(f"{path}: fit: not a snapshot that can be exported, but of {kind!r}")
    known = inspect.signature(writers[kind]).parameters
    for name in options:
        if name not in known:
            raise FitError(f"{name} does not apply to a snapshot of kind {kind}, {path}")
    return {"kind": kind, "out": str(out), **writers[kind](path, out, resolve_device(device), **options)}


def export_image(
    path: Path, out: Path, device: Any, *, region: tuple[int, int, int, int] | None = None, zoom: float = 1.0
) -> dict[str, Any]:
    """A crop of a fitted image at any zoom; arguments as of `FittedImage.reconstruct`."""
    fitted = FittedImage.load(path, device)
    if out.suffix.lower() in FLOAT_EXTENSIONS:
        fitted.dtype = np.dtype(np.float32)
    picture = fitted.reconstruct(region, zoom)
    if picture.dtype == np.uint16:
        picture = (picture / 257.0 + 0.5).astype(np.uint8)
    write_image(out, picture)
    return {"width": picture.shape[1], "height": picture.shape[0]}


def export_sdf(path: Path, out: Path, device: Any, *, resolution: int = DEFAULT_RESOLUTION) -> dict[str, Any]:
    """The zero level as a mesh in the coordinates of the file that was fitted, or its shaded picture.

    Args:
        resolution: Cells of the grid along the mesh's longest side.
    """
    field, fit = sdf.load_fit(path, device)
    lower, upper = (np.array(fit[name], np.float64) for name in ("lower", "upper"))
    if out.suffix.lower() == ".png":
        write_image(out, sdf.draw(field, field.params, lower, upper)[0])
        return {}
    surface = sdf.zero_level(field, field.params, lower, upper, resolution)
    vertices = (surface.vertices.astype(np.float64) - np.array(fit["offset"])) / fit["scale"]
    return _write_mesh(out, Surface(vertices.astype(np.float32), surface.faces))


def export_nerf(
    path: Path,
    out: Path,
    device: Any,
    *,
    resolution: int = DEFAULT_RESOLUTION,
    view: int | None = None,
    camera_path: str | PathLike[str] | None = None,
    frames: int = 60,
    width: int | None = None,
    height: int | None = None,
    crop: Any = None,
    background: float = 1.0,
    source: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """A mesh, one view, or the frames along a camera path of a radiance field.

    Args:
        resolution: Of a mesh: cells of the grid along the longest side of the box.
        view: Of a picture: number of the test view whose camera to use.
        camera_path: Keyframes, as `nrc.fit.camera_path` reads them; `out` is a folder then.
        frames: Along the path.
        width, height: Of pictures [px]; by default a test view's own, and 640 x 480 on a path.
        crop: Lower and upper corner of the part of space to look at, (2, 3), in the unit cube.
        background: Grey behind what is not opaque; in .exr files there is alpha instead.
        source: Where the views are now, by default where they were when the fit began.
    """
    field = RadianceField.load(path, device)
    fit = RadianceField.load_fit(path)
    placement = Placement(fit["scale"], tuple(fit["offset"]), np.array(fit["rotation"], np.float64))
    if out.suffix.lower() in WRITE_EXTENSIONS:
        surface = extract_mesh(field, resolution=resolution, crop=crop)
        vertices = placement.to_world(surface.vertices.astype(np.float64)).astype(np.float32)
        return _write_mesh(out, Surface(vertices, surface.faces, surface.colors))
    renderer = NerfRenderer(field)
    if camera_path is not None:
        if out.suffix:
            raise FitError(f"{out}: frames along a camera path are numbered pictures; name a folder for them")
        size = width or DEFAULT_SIZE[0], height or DEFAULT_SIZE[1]
        cameras = read_camera_path(camera_path, placement).cameras(frames, *size)
        files = write_frames(cameras, lambda camera: to_bytes(renderer.render(camera, crop=crop).over(background)), out)
        return {"frames": len(files), "width": size[0], "height": size[1]}
    views = load_views(
        fit["source"] if source is None else source,
        split="test",
        holdout=fit["holdout"],
        downscale=fit["downscale"],
    )
    number = 0 if view is None else view
    if not 0 <= number < len(views):
        raise FitError(f"view {number}: there are {len(views)} test views, 0 ... {len(views) - 1}")
    camera = views.camera(number)
    if width or height:
        width = width or max(1, math.floor(0.5 + height * camera.size[0] / camera.size[1]))  # type: ignore[operator]
        height = height or max(1, math.floor(0.5 + width * camera.size[1] / camera.size[0]))
        camera = camera.resized(width, height)
    rendered = renderer.render(camera, crop=crop)
    if out.suffix.lower() == ".exr":
        color = srgb_decode(rendered.color / np.maximum(rendered.alpha, 1e-6)[:, :, None]) * rendered.alpha[:, :, None]
        rgba = np.concatenate([color, rendered.alpha[:, :, None]], axis=2).astype(np.float32)
        write_exr(out, {"color": rgba, "depth": rendered.depth})
    else:
        write_image(out, to_bytes(rendered.over(background)))
    return {"view": views.names[number], "width": camera.size[0], "height": camera.size[1]}


def _write_mesh(out: Path, surface: Surface) -> dict[str, Any]:
    write_surface(out, surface)
    return {"vertices": len(surface.vertices), "triangles": len(surface.faces)}
