"""`Controls`: what mouse, keys and dropped files do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyglet.window import key, mouse

if TYPE_CHECKING:
    from nrc.viewer.app import Viewer

CLICK = 3  # [px] that the mouse may move in a click
LONGEST_FLIGHT = 0.1  # seconds that one look at the keys may fly for
# Axes of flying: right, up, forward; keys with their signs
FLY_KEYS = (((key.D, 1), (key.A, -1)), ((key.E, 1), (key.Q, -1)), ((key.W, 1), (key.S, -1)))
FAST_KEYS = (key.LSHIFT, key.RSHIFT)


class Controls:
    """Receives the events of the window by pyglet's names, where y is up, and acts on the viewer."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._keys: set[int] = set()
        self._press: tuple[float, float] | None = None
        self._actions: dict[int, Callable[[], None]] = {
            key._1: lambda: self._set_integrator("path"),
            key._2: lambda: self._set_integrator("nrc"),
            key._3: lambda: self._set_integrator("cache"),
            key.SPACE: self._toggle_training,
            key.X: self._toggle_split,
            key.T: lambda: viewer.timeline.toggle(),
            key.F: viewer.focus,
            key.R: viewer.reset_camera,
            key.HOME: viewer.reset_camera,
            key.C: viewer.reset_cache,
            key.P: lambda: viewer.viewport_screenshot(self._next_free(".png")),
            key.TAB: self._toggle_panels,
            key.H: self._toggle_help,
            key.F1: self._toggle_help,
            key.ESCAPE: self._dismiss,
        }

    def fly(self, seconds: float) -> bool:
        """Move the camera while keys are held; whether it did."""
        navigation = self._viewer.navigation
        axes = [sum(sign for symbol, sign in pair if symbol in self._keys) for pair in FLY_KEYS]
        if navigation is None or not any(axes):
            return False
        self._viewer.take_control()
        navigation.fly(*axes, min(seconds, LONGEST_FLIGHT), fast=not self._keys.isdisjoint(FAST_KEYS))
        return True

    def on_mouse_press(self, x: int, y: int, button: int, modifiers: int) -> None:
        self._press = (x, y)

    def on_mouse_drag(self, x: int, y: int, dx: int, dy: int, buttons: int, modifiers: int) -> None:
        viewer = self._viewer
        if self._press is None:
            return
        viewer.take_control()
        left, top, right, bottom = viewer.frame_box
        width, height = right - left, bottom - top
        if viewer.image_navigation is not None:
            ratio = viewer.window.pixel_ratio
            viewer.image_navigation.pan(dx * ratio, -dy * ratio)
        elif viewer.navigation is None:
            return
        elif buttons & (mouse.RIGHT | mouse.MIDDLE) or modifiers & key.MOD_SHIFT:
            viewer.navigation.pan(dx, -dy, height, width)
        elif modifiers & key.MOD_ALT:
            viewer.navigation.look(dx, -dy, height, width)
        else:
            viewer.navigation.orbit(dx, -dy, height)

    def on_mouse_release(self, x: int, y: int, button: int, modifiers: int) -> None:
        press, self._press = self._press, None
        if press is not None and button == mouse.LEFT and abs(x - press[0]) + abs(y - press[1]) <= CLICK:
            self._viewer.pick(x, self._viewer.window.size[1] - y)

    def on_mouse_scroll(self, x: int, y: int, scroll_x: float, scroll_y: float) -> None:
        viewer = self._viewer
        if viewer.image_navigation is not None:
            ratio = viewer.window.pixel_ratio
            left, top, _, _ = viewer.frame_box
            viewer.image_navigation.zoom(scroll_y, (x - left) * ratio, (viewer.window.size[1] - y - top) * ratio)
        elif viewer.navigation is not None:
            viewer.take_control()
            viewer.navigation.dolly(scroll_y)

    def on_key_press(self, symbol: int, modifiers: int) -> None:
        viewer = self._viewer
        if modifiers & (key.MOD_CTRL | key.MOD_COMMAND):
            if symbol == key.S and viewer.session is not None:
                viewer.save(self._next_free(".safetensors"))
            return
        self._keys.add(symbol)
        always = (key.TAB, key.H, key.F1, key.ESCAPE)
        if symbol in self._actions and (viewer.session is not None or symbol in always):
            self._actions[symbol]()

    def on_key_release(self, symbol: int, modifiers: int) -> None:
        self._keys.discard(symbol)

    def on_deactivate(self) -> None:
        self._keys.clear()  # their releases go elsewhere

    def on_file_drop(self, x: int, y: int, paths: list[str]) -> None:
        if paths:
            self._viewer.open(paths[0])

    def _set_integrator(self, name: str) -> None:
        viewer = self._viewer
        if viewer.session is not None and viewer.session.kind == "scene":
            viewer.change(integrator=name, split=None if name == "path" else viewer.settings.split)

    def _toggle_training(self) -> None:
        if getattr(self._viewer.session, "training", True) is not None:
            self._viewer.change(train=not self._viewer.settings.train)

    def _toggle_split(self) -> None:
        settings = self._viewer.settings
        if hasattr(settings, "split") and getattr(settings, "integrator", None) != "path":
            self._viewer.change(split=None if settings.split is not None else 0.5)

    def _toggle_panels(self) -> None:
        self._viewer.show_panels = not self._viewer.show_panels

    def _toggle_help(self) -> None:
        self._viewer.show_help = not self._viewer.show_help

    def _dismiss(self) -> None:
        self._viewer.show_help, self._viewer.messages = False, []
        self._viewer.close_popups = True
        self._viewer.playback.stop()

    def _next_free(self, suffix: str) -> Path:
        """The first of NAME_0001SUFFIX, NAME_0002SUFFIX, ... that does not exist in the working folder."""
        session = self._viewer.session
        stem, i = Path(session.name).stem if session is not None else "view", 1
        while (path := Path.cwd() / f"{stem}_{i:04}{suffix}").exists():
            i += 1
        return path


HELP = (
    ("left drag", "orbit (image: move)"),
    ("right or shift + left drag", "pan"),
    ("alt + left drag", "look around"),
    ("wheel", "dolly (image: zoom at the cursor)"),
    ("W A S D, Q E", "fly; with shift faster"),
    ("click", "pick a point and its object"),
    ("F", "focus on the picked point"),
    ("R, Home", "back to the first view"),
    ("1, 2, 3", "integrator path, nrc, cache"),
    ("X", "split view; drag its line"),
    ("T", "play or pause the animation"),
    ("Space", "training on or off"),
    ("C", "empty the cache"),
    ("P", "screenshot of the picture"),
    ("Ctrl + S", "save a snapshot"),
    ("Tab", "panels"),
    ("H, F1", "this help"),
    ("Esc", "close help and messages"),
    ("drop a file", "open it"),
)
