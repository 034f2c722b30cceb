"""Panels of fits: images, signed distances, radiance fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from imgui_bundle import ImVec2, imgui

from nrc.scene import Camera
from nrc.viewer.widgets import checkbox, choice, section, slider

if TYPE_CHECKING:
    from nrc.viewer.app import Viewer

CAMERA_COLOR, BOX_COLOR = 0xC0FFFFFF, 0xFF40C0FF
FRUSTUM = 0.04  # depth of a training camera's pyramid, of the box's diagonal
EDGES = tuple((a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit)  # of a box, by bits of its corners
AXES = ("x", "y", "z")


def draw_image_panel(viewer: Viewer) -> None:
    """Which picture, and the zoom."""
    if not section("image"):
        return
    settings = viewer.settings
    changes: dict[str, Any] = _training(viewer) | {
        "show": choice("show", settings.show, ("fitted", "original", "error"))
    }
    if checkbox("split: original | fitted", settings.split is not None) != (settings.split is not None):
        changes["split"] = 0.5 if settings.split is None else None
    changes["error_gain"] = slider("error gain", settings.error_gain, 1.0, 100.0, "%.0f", logarithmic=True)
    navigation = viewer.image_navigation
    if navigation is not None:
        zoom = slider("zoom", navigation.window.zoom, 0.01, 256.0, "%.2f", logarithmic=True)
        if zoom != navigation.window.zoom:
            navigation.set_zoom(zoom)
        if imgui.button("whole image"):
            navigation.fit()
        imgui.same_line()
        if imgui.button("1 : 1"):
            navigation.set_zoom(1.0)
    viewer.change(**changes)


def _training(viewer: Viewer) -> dict[str, Any]:
    """Whether to train; nothing where the fit is a snapshot."""
    if getattr(viewer.session, "training", None) is None:
        imgui.text_disabled("a snapshot: nothing trains")
        return {}
    return {"train": checkbox("train", viewer.settings.train)}


def draw_sdf_panel(viewer: Viewer) -> None:
    """Which picture, and where the slice is."""
    if not section("signed distance"):
        return
    settings = viewer.settings
    changes = _training(viewer)
    changes["show"] = choice("show", settings.show, ("shaded", "normals", "slice"))
    if settings.show == "slice":
        changes["axis"] = AXES.index(choice("slice across", AXES[settings.axis], AXES))
        changes["offset"] = slider("slice at", settings.offset, 0.0, 1.0)
    viewer.change(**changes)


def draw_nerf_panel(viewer: Viewer) -> None:
    """Which picture, the crop box and the training cameras."""
    if not section("radiance field") or viewer.session is None:
        return
    settings, session = viewer.settings, viewer.session
    changes: dict[str, Any] = _training(viewer) | {
        "show": choice("show", settings.show, ("colour", "depth", "occupancy")),
        "background": choice("background", settings.background, ("white", "black")),
    }
    viewer.show_cameras = checkbox("training cameras", viewer.show_cameras)
    cameras = session.training_cameras  # type: ignore[attr-defined]
    if cameras:
        i = min(viewer.camera_index, len(cameras) - 1)
        _, viewer.camera_index = imgui.input_int("camera", i)
        viewer.camera_index = min(max(viewer.camera_index, 0), len(cameras) - 1)
        if imgui.button("look through") and viewer.navigation is not None:
            viewer.look_through(cameras[viewer.camera_index])
    lower, upper = (np.asarray(corner, float) for corner in session.bounds)
    is_cropped = checkbox("crop box", settings.crop is not None)
    if not is_cropped:
        changes["crop"] = None
    else:
        low, high = (list(corner) for corner in settings.crop or (lower.tolist(), upper.tolist()))
        least = 1e-3 * (upper - lower)
        for a, name in enumerate(AXES):
            low[a] = min(slider(f"{name} from", low[a], lower[a], upper[a]), high[a] - least[a])
            high[a] = max(slider(f"{name} to", high[a], lower[a], upper[a]), low[a] + least[a])
        changes["crop"] = (tuple(low), tuple(high))
    viewer.change(**changes)


def draw_nerf_overlay(viewer: Viewer) -> None:
    """Lines of the crop box and of the training cameras over the picture."""
    session, crop = viewer.session, viewer.settings.crop
    if session is None:
        return
    if crop is not None:
        corners = np.array([[crop[(i >> a) & 1][a] for a in range(3)] for i in range(8)])
        _draw_lines(viewer, corners[np.array(EDGES)], BOX_COLOR)
    if viewer.show_cameras:
        depth = FRUSTUM * float(np.linalg.norm(np.subtract(session.bounds[1], session.bounds[0])))
        views = zip(session.training_cameras, session.photograph_sizes, strict=True)  # type: ignore[attr-defined]
        lines = [frustum(camera, size, depth) for camera, size in views]
        if lines:
            _draw_lines(viewer, np.concatenate(lines), CAMERA_COLOR)


def frustum(camera: Camera, size: tuple[int, int], depth: float) -> np.ndarray:
    """(8, 2, 3) edges of the pyramid that a camera sees, for a picture of that size."""
    half = depth * np.array(camera.half_extents(*size))
    tips = np.array([[x * half[0], y * half[1], -depth] for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
    matrix = np.asarray(camera.to_world, float)
    world = tips @ matrix[:3, :3].T + matrix[:3, 3]
    eye = np.broadcast_to(matrix[:3, 3], world.shape)
    return np.concatenate([np.stack([eye, world], axis=1), np.stack([world, np.roll(world, -1, axis=0)], axis=1)])


def _draw_lines(viewer: Viewer, lines: np.ndarray, color: int) -> None:
    draw_list = imgui.get_background_draw_list()
    for a, b in lines:
        start, end = viewer.project(a), viewer.project(b)
        if start is not None and end is not None:
            draw_list.add_line(ImVec2(*start), ImVec2(*end), color, 1.0)
