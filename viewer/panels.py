"""What is drawn over and beside the picture with Dear ImGui: panels, figures, messages, help."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from imgui_bundle import ImVec2, ImVec4, imgui, implot

from nrc.viewer.controls import HELP
from nrc.viewer.fit_panels import draw_image_panel, draw_nerf_overlay, draw_nerf_panel, draw_sdf_panel
from nrc.viewer.scene_panels import draw_animation_panel, draw_cache_panel, draw_scene_panel
from nrc.viewer.scene_session import SceneSession
from nrc.viewer.widgets import (
    button,
    checkbox,
    draw_split,
    explain,
    section,
    size_input,
    slider,
    slider_int,
    text_input,
)

if TYPE_CHECKING:
    from nrc.viewer.app import Viewer

MESSAGE_SECONDS = 8.0
MOST_MESSAGES = 6
PLOT_HEIGHT = 130.0
LINE_COLOR = 0xFF80C8FF
RED, GREY = ImVec4(1.0, 0.45, 0.4, 1.0), ImVec4(0.7, 0.7, 0.7, 1.0)
ANY_POPUP = imgui.PopupFlags_.any_popup_id | imgui.PopupFlags_.any_popup_level
FIXED = imgui.WindowFlags_.no_move | imgui.WindowFlags_.no_resize | imgui.WindowFlags_.no_collapse
PLAIN = (
    imgui.WindowFlags_.no_decoration
    | imgui.WindowFlags_.no_inputs
    | imgui.WindowFlags_.always_auto_resize
    | imgui.WindowFlags_.no_focus_on_appearing
    | imgui.WindowFlags_.no_nav
)


def draw_window(viewer: Viewer, texture: Any) -> None:
    """Everything in the window."""
    if viewer.close_popups and imgui.is_popup_open("", ANY_POPUP):
        imgui.internal.close_popup_to_level(0, False)
    viewer.close_popups = False
    left, top, right, bottom = viewer.picture_box
    if texture is not None and viewer.picture is not None:
        imgui.get_background_draw_list().add_image(texture, ImVec2(left, top), ImVec2(right, bottom))
    session = viewer.session
    if session is not None and session.kind == "nerf":
        draw_nerf_overlay(viewer)
    if session is not None and getattr(viewer.settings, "split", None) is not None:
        draw_split(viewer)
    _draw_pick(viewer)
    _draw_hud(viewer)
    _draw_messages(viewer)
    if viewer.show_panels:
        _draw_panels(viewer)
    if viewer.show_help:
        _draw_help(viewer)


def _draw_panels(viewer: Viewer) -> None:
    x, _, width, height = viewer.viewport
    imgui.set_next_window_pos(ImVec2(x + width, 0.0))
    imgui.set_next_window_size(ImVec2(viewer.window.size[0] - width, height))
    imgui.begin("nrc", None, FIXED | imgui.WindowFlags_.no_title_bar)
    imgui.push_item_width(-130.0)
    session = viewer.session
    _draw_file(viewer)
    if session is not None:
        if isinstance(session, SceneSession):
            draw_animation_panel(viewer)
            draw_cache_panel(viewer, session)
            _draw_plots(viewer)
            draw_scene_panel(viewer, session)
        else:
            {"image": draw_image_panel, "sdf": draw_sdf_panel, "nerf": draw_nerf_panel}[session.kind](viewer)
            _draw_plots(viewer)
        if viewer.navigation is not None:
            _draw_camera(viewer)
        _draw_output(viewer)
    imgui.pop_item_width()
    imgui.end()


def _draw_file(viewer: Viewer) -> None:
    if viewer.session is not None:
        imgui.text(f"{viewer.session.name}  ({viewer.session.kind}, {viewer.session.device})")
    path, entered = text_input("open", "cornell_box")
    explain("scene (file or built-in name), image, mesh, folder of photographs, snapshot")
    imgui.same_line()
    if imgui.button("open") or entered:
        viewer.open(path)
    fps = slider("frames/s aim", viewer.fps, 1.0, 120.0, "%.0f", logarithmic=True)
    if fps != viewer.fps:
        viewer.set_fps(fps)
    if checkbox("fixed picture size", viewer.size is not None) != (viewer.size is not None):
        picture = viewer.picture
        viewer.size = (picture.width, picture.height) if viewer.size is None and picture is not None else None
    if viewer.size is not None:
        viewer.size = size_input("size [px]", viewer.size)


def _draw_plots(viewer: Viewer) -> None:
    if not section("plots"):
        return
    history = viewer.history
    if len(history.loss):
        _plot("loss", {"loss": history.loss}, log=True)
    _plot("frame [ms]", history.stages, stacked=True)
    if len(history.error):
        _plot("relMSE", {"relMSE": history.error}, log=True)


def _plot(title: str, lines: dict[str, Iterable[float]], *, log: bool = False, stacked: bool = False) -> None:
    flags = implot.Flags_.no_menus | implot.Flags_.no_box_select | implot.Flags_.no_mouse_text | implot.Flags_.no_title
    if not implot.begin_plot(f"##{title}", ImVec2(-1.0, PLOT_HEIGHT), flags):
        return
    axis = implot.AxisFlags_
    implot.setup_axes("", title, axis.no_tick_labels | axis.auto_fit, axis.auto_fit)
    if log:
        implot.setup_axis_scale(implot.ImAxis_.y1, implot.Scale_.log10)
    legend = implot.LegendFlags_
    if len(lines) > 1:
        implot.setup_legend(implot.Location_.south, legend.horizontal | legend.outside)
    else:
        implot.setup_legend(implot.Location_.north_west, legend.none)
    total: Any = 0.0
    for name, values in lines.items():
        series = np.fromiter(values, float)
        if not len(series):
            continue
        if stacked:
            n = len(series) if isinstance(total, float) else min(len(series), len(total))
            total = series[-n:] + (total if isinstance(total, float) else total[-n:])
            series = total
        implot.plot_line(name, np.ascontiguousarray(series))
    implot.end_plot()


def _draw_camera(viewer: Viewer) -> None:
    navigation = viewer.navigation
    if navigation is None or not section("camera", opened=False):
        return
    camera = navigation.camera
    fov = slider("field of view", camera.fov, 5.0, 120.0, "%.1f deg")
    extent = float(np.max(np.subtract(viewer.session.bounds[1], viewer.session.bounds[0]))) if viewer.session else 1.0
    radius = slider("lens radius", camera.aperture_radius, 0.0, 0.05 * extent, "%.4f", logarithmic=True)
    distance = slider("focus distance", camera.focus_distance, 1e-3 * extent, 4.0 * extent, logarithmic=True)
    if fov != camera.fov:
        navigation.set_fov(fov)
    if radius != camera.aperture_radius:
        navigation.set_aperture(radius)
    if distance != camera.focus_distance:
        navigation.set_focus_distance(distance)
    if button("focus on picked", enabled=viewer.picked is not None):
        viewer.focus()
    imgui.same_line()
    if imgui.button("reset"):
        viewer.reset_camera()
    name, entered = text_input("view", f"view {len(navigation.views) + 1}")
    imgui.same_line()
    if imgui.button("keep view") or entered:
        navigation.save(name)
    for name in list(navigation.views):
        if imgui.button(f"{name}##recall"):
            navigation.recall(name)
        imgui.same_line()
        if imgui.button(f"x##{name}"):
            navigation.delete(name)
    _draw_path(viewer)


def _draw_path(viewer: Viewer) -> None:
    playback, navigation = viewer.playback, viewer.navigation
    path = playback.path
    assert navigation is not None
    imgui.separator_text("camera path")
    imgui.text(f"{len(path.keyframes)} keyframes, {path.duration:.1f} s")
    if imgui.button("add"):
        path.add(navigation.camera)
    imgui.same_line()
    if imgui.button("stop" if playback.is_recording else "record"):
        playback.record(navigation.camera)
    imgui.same_line()
    if imgui.button("clear"):
        playback.set_path(type(path)())
    imgui.same_line()
    is_path = len(path.keyframes) > 1
    if button("play", enabled=is_path):
        playback.play()
    imgui.begin_disabled(not is_path)
    at = slider("time", playback.time or 0.0, 0.0, max(path.duration, 1e-3), "%.2f s")
    imgui.end_disabled()
    if at != (playback.time or 0.0):
        playback.seek(at)
    file, _ = text_input("path file", "path.json")
    imgui.same_line()
    if imgui.button("save##path"):
        viewer.save_path(Path(file))
    imgui.same_line()
    if imgui.button("load##path"):
        viewer.load_path(Path(file))
    if playback.export is None:
        folder, _ = text_input("frames into", "frames")
        playback.size = size_input("size of frames", playback.size)
        playback.fps = slider("frames/s", playback.fps, 1.0, 60.0, "%.0f")
        playback.spp = slider_int("samples", playback.spp, 1, 1024, logarithmic=True)
        if button("export frames", enabled=is_path):
            viewer.export_frames(Path(folder))
    else:
        imgui.progress_bar(playback.export.n_done / playback.export.n_frames, ImVec2(-60.0, 0.0))
        imgui.same_line()
        if imgui.button("cancel"):
            playback.export.cancelled = True


def _draw_output(viewer: Viewer) -> None:
    if not section("output", opened=False):
        return
    file, _ = text_input("picture", "picture.png")
    explain(".png as it is shown, .exr or .hdr linear; of the picture's size, which can be fixed above")
    if imgui.button("save picture"):
        viewer.viewport_screenshot(Path(file))
    imgui.same_line()
    if imgui.button("save window"):
        viewer.screenshot(Path(file))
    file, _ = text_input("snapshot", "snapshot.safetensors")
    if imgui.button("save snapshot"):
        viewer.save(Path(file))
    imgui.same_line()
    if imgui.button("load snapshot"):
        viewer.open(file)


def _draw_pick(viewer: Viewer) -> None:
    """A ring around the picked point."""
    if viewer.picked is None:
        return
    place = viewer.project(np.asarray(viewer.picked["position"], float))
    if place is not None:
        lines = imgui.get_background_draw_list()
        lines.add_circle(ImVec2(*place), 6.0, 0xFF000000, 0, 3.0)
        lines.add_circle(ImVec2(*place), 6.0, LINE_COLOR, 0, 1.5)


def _draw_hud(viewer: Viewer) -> None:
    lines = hud_lines(viewer)
    imgui.set_next_window_pos(ImVec2(8.0, 8.0))
    imgui.set_next_window_bg_alpha(0.55)
    imgui.begin("figures", None, PLAIN)
    for line in lines:
        imgui.text(line)
    imgui.end()


def hud_lines(viewer: Viewer) -> list[str]:
    """What the corner of the picture says: size, rate, samples, and what takes time."""
    lines = []
    stats, picture = viewer.stats, viewer.picture
    if picture is not None:
        how = "fixed size" if viewer.size is not None else f"adapts to {viewer.aim:.3g} frames/s"
        lines.append(f"{picture.width} x {picture.height}, {viewer.history.fps:.1f} frames/s ({how})")
        figures = [f"{name} {stats[key]:{form}}" for key, name, form in HUD_FIGURES if stats.get(key) is not None]
        lines.extend(", ".join(figures[i : i + 3]) for i in range(0, len(figures), 3))
        if "reference" in stats:
            lines.append(f"reference {stats['reference']}")
    if viewer.worker.activity:
        lines.append(f"{viewer.worker.activity} ({viewer.worker.activity_seconds:.0f} s)")
    elif viewer.session is None and not lines:
        lines.append("drop a scene, image, mesh, folder of photographs or snapshot here")
    return lines


HUD_FIGURES = (
    ("spp", "samples/px", "d"),
    ("steps", "step", "d"),
    ("records", "records", "d"),
    ("loss", "loss", ".3g"),
    ("psnr", "PSNR", ".2f"),
    ("iou", "IoU", ".4f"),
    ("relmse", "relMSE", ".3g"),
    ("mean_bias", "mean", "+.2%"),
    ("reference_spp", "reference samples/px", "d"),
)


def _draw_messages(viewer: Viewer) -> None:
    now = time.perf_counter()
    viewer.messages = [
        (message, at) for message, at in viewer.messages if message.is_error or now - at < MESSAGE_SECONDS
    ][-MOST_MESSAGES:]
    if not viewer.messages:
        return
    left, top, width, height = viewer.viewport
    imgui.set_next_window_pos(ImVec2(left + 8.0, top + height - 8.0), 0, ImVec2(0.0, 1.0))
    imgui.set_next_window_size_constraints(ImVec2(0.0, 0.0), ImVec2(width - 16.0, height))
    imgui.set_next_window_bg_alpha(0.8)
    flags = PLAIN & ~imgui.WindowFlags_.no_inputs
    imgui.begin("messages", None, flags)
    imgui.push_text_wrap_pos(width - 60.0)
    for message, _ in viewer.messages:
        imgui.text_colored(RED if message.is_error else GREY, message.text)
    imgui.pop_text_wrap_pos()
    if any(message.is_error for message, _ in viewer.messages) and imgui.small_button("dismiss (Esc)"):
        viewer.messages = []
    imgui.end()


def _draw_help(viewer: Viewer) -> None:
    left, top, width, height = viewer.viewport
    imgui.set_next_window_pos(ImVec2(left + width / 2.0, top + height / 2.0), 0, ImVec2(0.5, 0.5))
    imgui.begin("Keys and mouse", None, FIXED | imgui.WindowFlags_.always_auto_resize)
    if imgui.begin_table("keys", 2):
        for keys, what in HELP:
            imgui.table_next_row()
            imgui.table_next_column()
            imgui.text_colored(ImVec4(0.55, 0.8, 1.0, 1.0), keys)
            imgui.table_next_column()
            imgui.text(what)
        imgui.end_table()
    imgui.end()
