"""Small pieces of Dear ImGui that several panels use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imgui_bundle import ImVec2, imgui

if TYPE_CHECKING:
    from nrc.viewer.app import Viewer

GRIP = 6.0  # half the width of the split's handle [px]
SPLIT_COLOR = 0xFFFFFFFF
MOST_PIXELS = 8192  # on a side of a picture

_texts: dict[str, str] = {}  # what is typed into the fields, as ImGui itself keeps the state of its widgets


def section(title: str, *, opened: bool = True) -> bool:
    """A header that folds; whether what is below shall be drawn."""
    flags = imgui.TreeNodeFlags_.default_open.value if opened else 0
    return imgui.collapsing_header(title, flags)


def text_input(label: str, default: str) -> tuple[str, bool]:
    """A field for text; what it holds, the default where that is nothing, and whether Enter was hit in it."""
    flags = imgui.InputTextFlags_.enter_returns_true.value
    entered, _texts[label] = imgui.input_text_with_hint(f"##{label}", default, _texts.get(label, ""), flags)
    return _texts[label].strip() or default, entered


def button(label: str, *, enabled: bool = True) -> bool:
    """A button, grey where it could do nothing; whether it was hit."""
    imgui.begin_disabled(not enabled)
    hit = imgui.button(label)
    imgui.end_disabled()
    return hit


def explain(text: str) -> None:
    """A tooltip for the widget before."""
    imgui.set_item_tooltip(text)


def choice(label: str, value: str, options: Sequence[str]) -> str:
    """A list to choose from; the choice."""
    names = [option.replace("_", " ") for option in options]
    _, i = imgui.combo(label, options.index(value), names)
    return options[i]


def slider(
    label: str, value: float, lower: float, upper: float, form: str = "%.3f", *, logarithmic: bool = False
) -> float:
    """A slider; the value itself unless it is moved (ImGui rounds to single precision)."""
    flags = imgui.SliderFlags_.logarithmic.value if logarithmic else 0
    changed, moved = imgui.slider_float(label, value, lower, upper, form, flags)
    return min(max(moved, lower), upper) if changed else value


def slider_int(label: str, value: int, lower: int, upper: int, *, logarithmic: bool = False) -> int:
    """A slider of whole numbers."""
    flags = imgui.SliderFlags_.logarithmic.value if logarithmic else 0
    changed, moved = imgui.slider_int(label, value, lower, upper, "%d", flags)
    return min(max(moved, lower), upper) if changed else value


def color(label: str, value: tuple[float, float, float]) -> tuple[float, float, float]:
    """A linear colour; the value itself unless it is changed."""
    flags = imgui.ColorEditFlags_.float.value | imgui.ColorEditFlags_.hdr.value
    changed, edited = imgui.color_edit3(label, list(value), flags)
    return (edited[0], edited[1], edited[2]) if changed else value


def size_input(label: str, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height [px] to type."""
    changed, typed = imgui.input_int2(label, list(size))
    return (min(max(typed[0], 1), MOST_PIXELS), min(max(typed[1], 1), MOST_PIXELS)) if changed else size


def checkbox(label: str, value: bool) -> bool:
    """A box to tick; whether it is."""
    return imgui.checkbox(label, value)[1]


def draw_split(viewer: Viewer) -> None:
    """The line of the split view, which can be dragged."""
    left, top, right, bottom = viewer.picture_box
    x = left + viewer.settings.split * (right - left)
    imgui.get_background_draw_list().add_line(ImVec2(x, top), ImVec2(x, bottom), SPLIT_COLOR, 1.5)
    imgui.set_next_window_pos(ImVec2(x - GRIP, top))
    imgui.set_next_window_size(ImVec2(2.0 * GRIP, bottom - top))
    imgui.push_style_var(imgui.StyleVar_.window_padding, ImVec2(0.0, 0.0))
    imgui.push_style_var(imgui.StyleVar_.window_min_size, ImVec2(1.0, 1.0))
    flags = imgui.WindowFlags_
    imgui.begin("split", None, flags.no_decoration | flags.no_background | flags.no_move | flags.no_nav)
    imgui.invisible_button("line", ImVec2(2.0 * GRIP, max(bottom - top, 1.0)))
    if imgui.is_item_hovered() or imgui.is_item_active():
        imgui.set_mouse_cursor(imgui.MouseCursor_.resize_ew)
    if imgui.is_item_active():
        share = (imgui.get_mouse_pos().x - left) / max(right - left, 1.0)
        viewer.change(split=min(max(share, 0.0), 1.0))
    imgui.end()
    imgui.pop_style_var(2)
