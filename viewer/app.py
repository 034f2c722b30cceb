"""`Viewer`: what the window shows and what its events do. Panels call its methods; the worker computes."""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
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
from nrc.viewer.opening import holds_cache, open_source
from nrc.viewer.playback import Export, Playback, to_rgb8
from nrc.viewer.scene_session import SceneSession
from nrc.viewer.session import Picture, Request, Session
from nrc.viewer.timeline import Timeline
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
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 1 << 20  # of mallopt, malloc.h
HISTORY = 400  # frames that plots show

log = logging.getLogger("nrc.viewer")


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
        start_time, play: Where the first source's animation begins [s], and whether it plays from there.
        open_options: Of `open_source`, for every source opened.

    Attributes:
        session, settings, navigation, image_navigation: What is looked at, and how; None before the first is open.
        picked: What `Session.pick` said of the last click.
        playback: The camera path.
        timeline: The animation of a scene.
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
        start_time: float | None = None,
        play: bool = False,
        **open_options: Any,
    ) -> None:
        return_freed_memory()
        self.window, self.worker = window, Worker()
        self.fps, self.size, self.show_panels = fps or FPS_CPU, size, panels
        self.show_help = False
        self.close_popups = False  # when the window is drawn next
        self.session: Session | None = None
        self.settings: Any = None
        self.navigation: Navigation | None = None
        self.image_navigation: ImageNavigation | None = None
        self.picked: dict[str, Any] | None = None
        self.was_picked = False  # just now: its panel opens
        self.playback, self.timeline = Playback(), Timeline()
        self.show_cameras, self.camera_index = False, 0  # of a radiance field's photographs
        self.history = History()
        self.messages: list[tuple[Message, float]] = []
        self.stats: dict[str, Any] = {}
        self.picture: Picture | None = None
        self.opened_at = time.perf_counter()
        self.first_picture_seconds: float | None = None
        self._fps_asked = fps
        self._start_time, self._play = start_time, play  # until the first source is open
        self._open_options = open_options
        self._texture: Any = None
        self._n_shown = 0
        self._asked: Request | None = None
        self._drawn = 0.0
        self._ticked = time.perf_counter()
        self._changed = self._ticked  # when the request did, apart from its aim
        self._rounds = 0
        self._pending: Path | None = None  # screenshot of the window
        self._controls: Controls | None = None
        if isinstance(window, Window):
            from nrc.viewer.controls import Controls

            self._controls = window.handler = Controls(self)

    # --- what can be done --------------------------------------------------------------------------------------------

    def open(self, source: str) -> None:
        """Look at another scene, image, mesh, folder or snapshot; a cache's snapshot goes into the scene on display."""
        path = Path(source)
        if self.session is not None and self.session.kind == "scene" and holds_cache(path):
            self.load_cache(path)
            return
        self.opened_at = time.perf_counter()
        options, self._open_options = self._open_options, _for_any(self._open_options)
        if isinstance(self.session, SceneSession):
            options = {**options, "integrator": self.settings.integrator}
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

    def reset_cache(self) -> None:
        """Empty the cache of a scene."""
        if self.session is not None and self.session.kind == "scene":
            self.worker.call(lambda session: session.reset_cache())

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
            linear = path.suffix.lower() in (".exr", ".hdr")
            write_image(path, session.image() if linear else to_rgb8(picture))

        self.worker.call(write, lambda _: self.say(f"wrote {path}"), what="writing")

    def pick(self, x: float, y: float) -> None:
        """Find what lies at a position in the window."""
        place = self._fractions(x, y)
        if place is None or self.session is None or self.session.kind == "image":
            return

        def picked(result: dict[str, Any] | None) -> None:
            self.picked, self.was_picked = result, result is not None

        self.worker.call(lambda session: session.pick(*place), picked, what="picking")

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
            self.take_control()
            self.navigation.set_camera(camera)

    def load_reference(self, path: Path) -> None:
        """Compare a scene's pictures with this one; they take its size."""

        def loaded(size: tuple[int, int]) -> None:
            self.change(compare="file")
            self.size = size

        def load(session: Session | None) -> tuple[int, int]:
            if not isinstance(session, SceneSession):
                raise ValueError(f"{path}: there is no scene to compare with it")
            return session.load_reference(path)

        self.worker.call(load, loaded, what=f"loading {path.name}")

    def save_path(self, path: Path) -> None:
        """Write the camera path and the kept views."""
        views = self.navigation.views if self.navigation is not None else {}
        self._try(lambda: self.playback.path.write(path, views), f"wrote {path}")

    def load_path(self, path: Path) -> None:
        """Read a camera path and views."""

        def read() -> None:
            keyframes, views = CameraPath.read(path)
            self.playback.set_path(keyframes)
            if self.navigation is not None:
                self.navigation.views.update(views)

        self._try(read, f"loaded {path}")

    def export_frames(self, folder: Path) -> None:
        """Write the camera path's frames as numbered pictures."""
        playback, request = self.playback, self._asked
        if request is None or len(playback.path.keyframes) < 2:
            self.say("a camera path needs two keyframes", is_error=True)
            return
        cameras = playback.path.cameras(round(playback.path.duration * playback.fps) + 1)
        export = playback.export = Export(len(cameras))
        width, height = playback.size
        request = replace(request, size=playback.size, width=width, height=height)

        def done(n: int) -> None:
            self.say(f"{'cancelled after' if export.cancelled else 'wrote'} {n} frames in {folder}")

        self.worker.call(
            lambda session: playback.write_frames(session, request, cameras, folder, export, self.worker.publish),
            done,
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
        if self.navigation is not None:
            self.playback.advance(seconds, self.navigation.camera)
        if self.timeline.duration > 0.0:
            self.timeline.advance(seconds)
            self.change(time=self.timeline.time)
        if self._controls is not None and self._controls.fly(seconds):
            self.window.has_input = True
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
        """Stop the worker, and frames being written; give the window back."""
        if self.playback.export is not None:
            self.playback.export.cancelled = True
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
        self.timeline = Timeline()
        if isinstance(session, SceneSession):
            self.timeline = Timeline(session.duration, session.has_moving_camera)
        self.first_picture_seconds = None
        self.messages = [(message, at) for message, at in self.messages if not message.is_error]
        self._asked, self._changed = None, self._ticked
        for warning in session.warnings:
            self.say(warning)
        self._start_animation()
        self.window.set_title(f"{session.name} - nrc")

    def _start_animation(self) -> None:
        """Stand or play as was asked for the first source."""
        start_time, play = self._start_time, self._play
        self._start_time, self._play = None, False
        if start_time is None and not play:
            return
        if self.timeline.duration <= 0.0 and self.session is not None:
            self.say(f"--time and --play need an animated scene: nothing moves in {self.session.name}", is_error=True)
            return
        self.timeline.seek(start_time or 0.0)
        if play:
            self.timeline.toggle()

    def _ask(self) -> None:
        session = self.session
        if session is None:
            return
        left, top, right, bottom = self.frame_box
        ratio = self.window.pixel_ratio
        width, height = max(round((right - left) * ratio), 1), max(round((bottom - top) * ratio), 1)
        window = None
        if self.image_navigation is not None:
            self.image_navigation.resize(width, height)
            window = self.image_navigation.window
        request = Request(
            camera=self.camera,
            window=window,
            width=width,
            height=height,
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
        """Where one looks from: on the path while it plays; None for images, and through an animated camera."""
        if self.navigation is None or (self.timeline.follows_camera and self.playback.camera is None):
            return None
        return self.playback.camera or self.navigation.camera

    def take_control(self) -> None:
        """Leave the camera path, or the scene's animated camera where it stands."""
        self.playback.stop()
        if self.timeline.follows_camera and self.navigation is not None:
            self.timeline.follows_camera = False
            if self.picture is not None and self.picture.camera is not None:
                self.navigation.set_camera(self.picture.camera)

    @property
    def viewport(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the picture's part of the window, in units of mouse positions."""
        width, height = self.window.size
        panel = PANEL_WIDTH if self.show_panels else 0
        return 0, 0, max(width - panel, LEAST_VIEWPORT), max(height, LEAST_VIEWPORT)

    @property
    def frame_box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of where pictures will be: the viewport, or what a fixed size takes of it."""
        return self._box(self.size)

    @property
    def picture_box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the picture in the viewport: as large as its shape allows."""
        return self.frame_box if self.picture is None else self._box((self.picture.width, self.picture.height))

    def _box(self, shape: tuple[int, int] | None) -> tuple[float, float, float, float]:
        """The largest box of a shape in the middle of the viewport; the viewport for None."""
        left, top, width, height = self.viewport
        if shape is None:
            return left, top, left + width, top + height
        scale = min(width / shape[0], height / shape[1])
        x, y = left + (width - scale * shape[0]) / 2.0, top + (height - scale * shape[1]) / 2.0
        return x, y, x + scale * shape[0], y + scale * shape[1]

    def _take_picture(self) -> None:
        """Bring the worker's newest picture to the window."""
        with self.worker.lock:
            picture, n = self.worker.picture, self.worker.n_pictures
            if picture is None or n == self._n_shown:
                return
            if self.picture is None or picture.pixels is not self.picture.pixels:  # what rests is published again
                self._texture = self.window.show(picture)
            self.picture, self._n_shown = picture, n
        now = time.perf_counter()
        if self.first_picture_seconds is None:
            self.first_picture_seconds = now - self.opened_at
        self.stats = picture.stats
        self.history.add(picture.stats)
        self.history.seconds.append(now)

    def _draw(self) -> None:
        pending, self._pending = self._pending, None
        try:
            self.window.draw(self._build, screenshot=pending)
        except ValueError as error:  # the screenshot could not be written
            self.say(str(error), is_error=True)
        else:
            if pending is not None:
                self.say(f"wrote {pending}")

    def _build(self) -> None:
        """Say to ImGui what is in the window; what a panel raises becomes a message, once."""
        from nrc.viewer.panels import draw_window

        try:
            draw_window(self, self._texture)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if all(message.text != text for message, _ in self.messages):
                log.error("in the panels", exc_info=error)
                self.say(text, is_error=True)

    # --- places ------------------------------------------------------------------------------------------------------

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


def return_freed_memory() -> None:
    """Let glibc map every array of a megabyte or more for itself, so that its memory goes back when it is freed.

    By default the threshold grows to 32 MiB with what is freed, and sessions that come and go leave holes in the heap.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def _for_any(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the first source that hold for any."""
    return {name: value for name, value in options.items() if name not in ("kind", "defines")}
