"""`Viewer`: what the window shows and what its events do. Panels call its methods; the worker computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nrc.image import write_image
from nrc.scene import Camera
from nrc.viewer.camera_path import CameraPath
from nrc.viewer.image_navigation import ImageNavigation
from nrc.viewer.navigation import Navigation
from nrc.viewer.opening import open_source
from nrc.viewer.playback import Export, Playback, to_rgb8
from nrc.viewer.session import Picture, Request, Session
from nrc.viewer.window import NullWindow, Window
from nrc.viewer.worker import Message, Worker

PANEL_WIDTH = 340  # [px]
LEAST_VIEWPORT = 64  # [px]
FPS_CPU, FPS_CUDA = 10.0, 60.0  # frames per second to aim at
REDRAW_SECONDS = 0.1  # without anything new: text cursors blink, progress is said
REST_AFTER = 0.7  # seconds without a change, after which pictures may take longer and become finer
REST_FPS = 4.0
SLEEP_SECONDS = 0.003  # between two looks at the events
FIRST_ROUNDS = 3  # ImGui settles the size of its windows in the first frames
HISTORY = 400  # frames that plots show


@dataclass
class History:
    """Figures of the last frames, for the plots."""

    loss: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    error: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    stages: dict[str, deque[float]] = field(default_factory=dict)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=16))

    def add(self, stats: dict[str, Any]) -> None:
        """Take in the figures of a picture."""
        for name, values in (("loss", self.loss), ("relmse", self.error)):
            value = stats.get(name)
            if value is not None and np.isfinite(value) and value > 0.0:
                values.append(float(value))
        for name, ms in stats.get("stages_ms", {}).items():
            self.stages.setdefault(name, deque(maxlen=HISTORY)).append(float(ms))

    @property
    def fps(self) -> float:
        """Pictures per second lately."""
        if len(self.seconds) < 2:
            return 0.0
        return (len(self.seconds) - 1) / max(self.seconds[-1] - self.seconds[0], 1e-9)


class Viewer:
    """Connects a window, a worker and what the user does.

    Args:
        window: To draw in.
        fps: Frames per second to aim at; by default 10 on a CPU, 60 on CUDA. Where nothing has changed for a while,
            pictures become finer until there are four per second.
        size: Fixed size of pictures [px]; by default they adapt to the frame rate.
        panels: Whether the panels are open.
        open_options: Of `open_source`, for every source opened.

    Attributes:
        session, settings, navigation, image_navigation: What is looked at, and how; None before the first is open.
        picked: What `Session.pick` said of the last click.
        playback: The camera path.
        stats, history: Figures of the last picture, and of those before.
        first_picture_seconds: From opening the source to its first picture in the window.
    """

    def __init__(
        self,
        window: Window | NullWindow,
        *,
        fps: float | None = None,
        size: tuple[int, int] | None = None,
        panels: bool = True,
        **open_options: Any,
    ) -> None:
        self.window, self.worker = window, Worker()
        self.fps, self.size, self.show_panels = fps or FPS_CPU, size, panels
        self.show_help = False
        self.session: Session | None = None
        self.settings: Any = None
        self.navigation: Navigation | None = None
        self.image_navigation: ImageNavigation | None = None
        self.picked: dict[str, Any] | None = None
        self.playback = Playback()
        self.show_cameras, self.camera_index = False, 0  # of a radiance field's photographs
        self.history = History()
        self.messages: list[tuple[Message, float]] = []
        self.stats: dict[str, Any] = {}
        self.picture: Picture | None = None
        self.opened_at = time.perf_counter()
        self.first_picture_seconds: float | None = None
        self._fps_asked = fps
        self._open_options = open_options
        self._texture: Any = None
        self._n_shown = 0
        self._asked: Request | None = None
        self._drawn = 0.0
        self._ticked = time.perf_counter()
        self._changed = self._ticked  # when the request did, apart from its aim
        self._rounds = 0
        self._keys: set[str] = set()
        self._press: tuple[float, float] | None = None
        self._pending: Path | None = None  # screenshot of the window
        window.handler = self

    # --- what can be done --------------------------------------------------------------------------------------------

    def open(self, source: str) -> None:
        """Look at another scene, image, mesh, folder or snapshot; a cache's snapshot goes into the scene on display."""
        self.opened_at, self.first_picture_seconds = time.perf_counter(), None
        path = Path(source)
        if self.session is not None and self.session.kind == "scene" and path.suffix == ".safetensors":
            self.load_cache(path)
            return
        options, self._open_options = self._open_options, _for_any(self._open_options)
        self.worker.open(lambda: open_source(source, **options), self._start, what=path.name or source)

    def load_cache(self, path: Path) -> None:
        """Go on with a saved cache in the scene on display."""

        def loaded(config: Any) -> None:
            self.change(cache=config)
            self._asked = None  # ask again, even for the same
            self.say(f"loaded {path}")

        self.worker.call(lambda session: session.load_cache(path), loaded, what=f"loading {path.name}", settled=True)

    def change(self, **settings: Any) -> None:
        """Change settings of the session; the next frame follows what differs."""
        self.settings = replace(self.settings, **settings)

    def say(self, text: str, *, is_error: bool = False) -> None:
        """Show a message in the window."""
        self.messages.append((Message(text, is_error), time.perf_counter()))

    def save(self, path: Path) -> None:
        """Write the session's snapshot."""
        self.worker.call(lambda session: session.save(path), lambda _: self.say(f"wrote {path}"), what="saving")

    def screenshot(self, path: Path) -> None:
        """Write the window, panels and all, when it is drawn next."""
        self._pending = path

    def viewport_screenshot(self, path: Path) -> None:
        """Write the picture alone: as it is shown, or linear where the file is an EXR or HDR."""

        def write(session: Session) -> None:
            picture = self.worker.picture
            if picture is None:
                raise ValueError(f"{path}: there is no picture yet")
            linear = path.suffix.lower() in (".exr", ".hdr", ".pfm")
            write_image(path, session.image() if linear else to_rgb8(picture))

        self.worker.call(write, lambda _: self.say(f"wrote {path}"), what="writing")

    def pick(self, x: float, y: float, then: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Find what lies at a position in the window."""
        place = self._fractions(x, y)
        if place is None or self.session is None or self.session.kind == "image":
            return

        def picked(result: dict[str, Any] | None) -> None:
            self.picked = result
            if result is not None and then is not None:
                then(result)

        self.worker.call(lambda session: session.pick(*place), picked)

    def focus(self) -> None:
        """Turn to the picked point, orbit it from now on, and focus the lens on it."""
        if self.picked is not None and self.navigation is not None:
            self.navigation.focus(np.asarray(self.picked["position"], float))

    def reset_camera(self) -> None:
        """Go back to where the session began."""
        if self.navigation is not None:
            self.navigation.reset()
        if self.image_navigation is not None:
            self.image_navigation.fit()

    def look_through(self, camera: Camera) -> None:
        """Look from where another camera does."""
        if self.navigation is not None:
            self.playback.stop()
            self.navigation.set_camera(camera)

    def load_reference(self, path: Path) -> None:
        """Compare a scene's pictures with this one; they take its size."""

        def loaded(size: tuple[int, int]) -> None:
            self.change(compare="file")
            self.size = size

        self.worker.call(lambda session: session.load_reference(path), loaded, what=f"loading {path.name}")

    def save_path(self, path: Path) -> None:
        """Write the camera path and the kept views."""
        views = self.navigation.views if self.navigation is not None else {}
        self._try(lambda: self.playback.path.write(path, views), f"wrote {path}")

    def load_path(self, path: Path) -> None:
        """Read a camera path and views."""

        def read() -> None:
            self.playback.path, views = CameraPath.read(path)
            if self.navigation is not None:
                self.navigation.views.update(views)

        self._try(read, f"loaded {path}")

    def export_frames(self, folder: Path) -> None:
        """Write the camera path's frames as numbered pictures."""
        playback, request = self.playback, self._asked
        if request is None or len(playback.path.keyframes) < 2:
            self.say("a camera path needs two keyframes", is_error=True)
            return
        export = Export(round(playback.path.duration * playback.fps) + 1)
        playback.export = export
        picture = self.picture
        if request.size is None and picture is not None:
            request = replace(request, size=(picture.width, picture.height))

        self.worker.call(
            lambda session: playback.write_frames(session, request, folder, export, self.worker.publish),
            lambda n: self.say(f"wrote {n} frames into {folder}"),
            what=f"writing frames into {folder}",
        )

    def _try(self, action: Callable[[], Any], done: str) -> None:
        """Do something with files on this thread, and say how it went."""
        try:
            action()
        except (ValueError, OSError) as error:
            self.say(str(error), is_error=True)
        else:
            self.say(done)

    def set_fps(self, fps: float) -> None:
        """Aim at so many frames per second."""
        self.fps = self._fps_asked = fps

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self, *, n_pictures: int | None = None) -> None:
        """Until the window is closed, or so many pictures of an opened session are shown."""
        self.worker.limit = n_pictures
        while not self.window.closed:
            drawn = self.tick()
            if n_pictures is not None and not self.worker.is_busy:
                failed = self.session is None or any(message.is_error for message, _ in self.messages)
                if failed or self._n_shown >= n_pictures:
                    return
            if not drawn:
                time.sleep(SLEEP_SECONDS)

    def settle(self) -> None:
        """Go on until nothing that was begun is left to do."""
        while self.worker.is_busy or self._pending is not None:
            if not self.tick():
                time.sleep(SLEEP_SECONDS)

    def tick(self) -> bool:
        """Take events, pass on what changed, draw if there is something new; whether it drew."""
        now = time.perf_counter()
        seconds, self._ticked = now - self._ticked, now
        self.window.poll()
        for message in self.worker.take_results():
            self.say(message.text, is_error=message.is_error)
        self._move(seconds)
        self._ask()
        is_new = self.worker.n_pictures != self._n_shown
        due = now - self._drawn > REDRAW_SECONDS or self._rounds < FIRST_ROUNDS
        if not (is_new or self.window.has_input or due or self._pending):
            return False
        self.window.has_input = False
        self._take_picture()
        self._draw()
        self._drawn = time.perf_counter()
        self._rounds += 1
        return True

    def close(self) -> None:
        """Stop the worker and give the window back."""
        self.worker.stop()
        self.window.close()

    def _start(self, session: Session) -> None:
        """Look at a session that has just been opened."""
        self.session, self.settings = session, session.settings
        self.navigation = self.image_navigation = None
        if session.camera is not None:
            self.navigation = Navigation(session.camera, session.bounds, session.up)
        else:
            width, height = session.bounds[1][:2]
            self.image_navigation = ImageNavigation(float(width), float(height))
        self.fps = self._fps_asked or (FPS_CPU if session.device.is_cpu else FPS_CUDA)
        self.picked, self.playback, self.history = None, Playback(), History()
        self._asked, self._changed = None, self._ticked
        for warning in session.warnings:
            self.say(warning)
        self.window.set_title(f"{session.name} - nrc")

    def _ask(self) -> None:
        session = self.session
        if session is None:
            return
        _, _, width, height = self.viewport
        ratio = self.window.pixel_ratio
        window = None
        if self.image_navigation is not None:
            self.image_navigation.resize(round(width * ratio), round(height * ratio))
            window = self.image_navigation.window
        request = Request(
            camera=self.camera,
            window=window,
            width=round(width * ratio),
            height=round(height * ratio),
            seconds=1.0 / self.aim,
            size=self.size,
            settings=self.settings,
        )
        if self._asked is not None and replace(request, seconds=self._asked.seconds) != self._asked:
            self._changed = self._ticked
        if request != self._asked:
            self._asked = request
            self.worker.ask(request)

    @property
    def aim(self) -> float:
        """Frames per second to aim at now: fewer, and finer ones, while nothing changes."""
        return min(self.fps, REST_FPS) if self._ticked - self._changed > REST_AFTER else self.fps

    @property
    def camera(self) -> Camera | None:
        """Where one looks from: on the path while it plays."""
        if self.navigation is None:
            return None
        return self.playback.camera or self.navigation.camera

    @property
    def viewport(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the picture's part of the window, in units of mouse positions."""
        width, height = self.window.size
        panel = PANEL_WIDTH if self.show_panels else 0
        return 0, 0, max(width - panel, LEAST_VIEWPORT), max(height, LEAST_VIEWPORT)

    @property
    def picture_box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the picture in the viewport: as large as its shape allows."""
        left, top, width, height = self.viewport
        if self.picture is None:
            return left, top, left + width, top + height
        scale = min(width / self.picture.width, height / self.picture.height)
        shown = scale * self.picture.width, scale * self.picture.height
        x, y = left + (width - shown[0]) / 2.0, top + (height - shown[1]) / 2.0
        return x, y, x + shown[0], y + shown[1]

    def _take_picture(self) -> None:
        """Bring the worker's newest picture to the window."""
        with self.worker.lock:
            picture, n = self.worker.picture, self.worker.n_pictures
            if picture is None or n == self._n_shown:
                return
            self._texture = self.window.show(picture)
            self.picture, self._n_shown = picture, n
        now = time.perf_counter()
        if self.first_picture_seconds is None:
            self.first_picture_seconds = now - self.opened_at
        self.stats = picture.stats
        self.history.add(picture.stats)
        self.history.seconds.append(now)

    def _draw(self) -> None:
        from nrc.viewer.panels import draw_window

        pending, self._pending = self._pending, None
        try:
            self.window.draw(lambda: draw_window(self, self._texture), screenshot=pending)
        except ValueError as error:  # the screenshot could not be written
            self.say(str(error), is_error=True)
        else:
            if pending is not None:
                self.say(f"wrote {pending}")

    def _move(self, seconds: float) -> None:
        """Fly while keys are held; let the camera path go on."""
        if self.navigation is None:
            return
        self.playback.advance(seconds, self.navigation.camera)
        if self._keys:
            axes = [sum(sign for key, sign in pair if key in self._keys) for pair in FLY_KEYS]
            if any(axes):
                self.navigation.fly(*axes, min(seconds, 0.1), fast="LSHIFT" in self._keys)
                self.window.has_input = True

    # --- events, by pyglet's names; y is up there --------------------------------------------------------------------

    def on_mouse_press(self, x: int, y: int, button: int, modifiers: int) -> None:
        self._press = (x, y)

    def on_mouse_drag(self, x: int, y: int, dx: int, dy: int, buttons: int, modifiers: int) -> None:
        from pyglet.window import key, mouse

        if self._press is None:
            return
        self.playback.stop()
        _, _, width, height = self.viewport
        pans = buttons & (mouse.RIGHT | mouse.MIDDLE) or modifiers & key.MOD_SHIFT
        if self.image_navigation is not None:
            ratio = self.window.pixel_ratio
            self.image_navigation.pan(dx * ratio, -dy * ratio)
        elif self.navigation is not None and pans:
            self.navigation.pan(dx, -dy, height, width)
        elif self.navigation is not None and modifiers & key.MOD_ALT:
            self.navigation.look(dx, -dy, height, width)
        elif self.navigation is not None:
            self.navigation.orbit(dx, -dy, height)

    def on_mouse_release(self, x: int, y: int, button: int, modifiers: int) -> None:
        from pyglet.window import mouse

        press, self._press = self._press, None
        if press is None or button != mouse.LEFT or abs(x - press[0]) + abs(y - press[1]) > 3:
            return
        top = self.window.size[1] - y
        self.pick(x, top)

    def on_mouse_scroll(self, x: int, y: int, scroll_x: float, scroll_y: float) -> None:
        if self.image_navigation is not None:
            ratio = self.window.pixel_ratio
            self.image_navigation.zoom(scroll_y, x * ratio, (self.window.size[1] - y) * ratio)
        elif self.navigation is not None:
            self.navigation.dolly(scroll_y)

    def on_key_press(self, symbol: int, modifiers: int) -> None:
        from pyglet.window import key

        name = key.symbol_string(symbol)
        self._keys.add(name)
        if modifiers & (key.MOD_CTRL | key.MOD_COMMAND):
            self._keys.discard(name)
            name = f"CTRL+{name}"
        action = ACTIONS.get(name)
        if action is not None and (self.session is not None or name in ("TAB", "F1", "H")):
            action(self)

    def on_key_release(self, symbol: int, modifiers: int) -> None:
        from pyglet.window import key

        self._keys.discard(key.symbol_string(symbol))

    def on_file_drop(self, x: int, y: int, paths: list[str]) -> None:
        if paths:
            self.open(paths[0])

    def project(self, point: np.ndarray) -> tuple[float, float] | None:
        """Where a point of the session's world is in the window; None behind the camera or outside the picture."""
        camera = self.camera
        if camera is None or self.picture is None:
            return None
        matrix = np.asarray(camera.to_world, float)
        axes = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
        x, y, z = (point - matrix[:3, 3]) @ axes
        half = camera.half_extents(self.picture.width, self.picture.height)
        if z >= -1e-9:
            return None
        u, v = 0.5 + 0.5 * x / (-z * half[0]), 0.5 - 0.5 * y / (-z * half[1])
        left, top, right, bottom = self.picture_box
        if not (-0.5 <= u <= 1.5 and -0.5 <= v <= 1.5):
            return None
        return left + u * (right - left), top + v * (bottom - top)

    def _fractions(self, x: float, y: float) -> tuple[float, float] | None:
        """A position in the window as fractions of the picture; None outside."""
        left, top, right, bottom = self.picture_box
        u, v = (x - left) / max(right - left, 1.0), (y - top) / max(bottom - top, 1.0)
        return (u, v) if 0.0 <= u < 1.0 and 0.0 <= v < 1.0 else None

    def _set_integrator(self, name: str) -> None:
        if self.session is not None and self.session.kind == "scene":
            self.change(integrator=name)

    def _toggle_training(self) -> None:
        self.change(train=not self.settings.train)

    def _toggle_split(self) -> None:
        if hasattr(self.settings, "split"):
            self.change(split=None if self.settings.split is not None else 0.5)

    def _toggle_panels(self) -> None:
        self.show_panels = not self.show_panels

    def _toggle_help(self) -> None:
        self.show_help = not self.show_help

    def _dismiss(self) -> None:
        self.show_help, self.messages = False, []
        self.playback.stop()

    def _reset_cache(self) -> None:
        if self.session is not None and self.session.kind == "scene":
            self.worker.call(lambda session: session.reset_cache())

    def _save_screenshot(self) -> None:
        self.viewport_screenshot(next_free(Path.cwd(), self._stem, ".png"))

    def _save_snapshot(self) -> None:
        self.save(next_free(Path.cwd(), self._stem, ".safetensors"))

    @property
    def _stem(self) -> str:
        return Path(self.session.name).stem if self.session is not None else "view"


# Axes of flying: right, up, forward; keys with their signs
FLY_KEYS = ((("D", 1), ("A", -1)), (("E", 1), ("Q", -1)), (("W", 1), ("S", -1)))
ACTIONS: dict[str, Callable[[Viewer], None]] = {
    "_1": lambda viewer: viewer._set_integrator("path"),
    "_2": lambda viewer: viewer._set_integrator("nrc"),
    "_3": lambda viewer: viewer._set_integrator("cache"),
    "SPACE": Viewer._toggle_training,
    "X": Viewer._toggle_split,
    "F": Viewer.focus,
    "R": Viewer.reset_camera,
    "HOME": Viewer.reset_camera,
    "C": Viewer._reset_cache,
    "TAB": Viewer._toggle_panels,
    "H": Viewer._toggle_help,
    "F1": Viewer._toggle_help,
    "ESCAPE": Viewer._dismiss,
    "P": Viewer._save_screenshot,
    "CTRL+S": Viewer._save_snapshot,
}
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
    ("Space", "training on or off"),
    ("C", "empty the cache"),
    ("P", "screenshot of the picture"),
    ("Ctrl + S", "save a snapshot"),
    ("Tab", "panels"),
    ("H, F1", "this help"),
    ("Esc", "close help and messages"),
    ("drop a file", "open it"),
)


def next_free(folder: Path, stem: str, suffix: str) -> Path:
    """The first of STEM_0001SUFFIX, STEM_0002SUFFIX, ... that does not exist."""
    i = 1
    while (path := folder / f"{stem}_{i:04}{suffix}").exists():
        i += 1
    return path


def _for_any(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the first source that hold for any."""
    return {name: value for name, value in options.items() if name not in ("kind", "defines")}
