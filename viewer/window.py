"""`Window`: a pyglet window with Dear ImGui, and a texture for the picture. The only file that knows OpenGL.

`headless=True` uses pyglet's EGL path, which needs no display but a GL driver.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.image import write_image
from nrc.viewer.session import Picture

FONT, FONT_SIZE = "assets/fonts/DroidSans.ttf", 15.0  # of imgui-bundle


class WindowError(ValueError):
    """No window can be opened; the message says what was tried."""


class Window:
    """A window of `width` × `height` [px].

    Attributes:
        handler: Receives pyglet's events by their names (`on_mouse_press`, ...), unless ImGui wants them.
        has_input: Whether events came since it was last cleared.
        closed: Whether the user closed it.
    """

    def __init__(self, width: int, height: int, title: str, *, headless: bool = False) -> None:
        if headless:  # PyOpenGL's EGL platform would break X
            os.environ["PYOPENGL_PLATFORM"] = "egl"
        import pyglet

        pyglet.options.headless = headless
        pyglet.options.shadow_window = False
        try:
            options: dict[str, Any] = {} if headless else {"resizable": True, "file_drops": True, "vsync": False}
            self._window = pyglet.window.Window(width, height, title, **options)
        except Exception as error:  # pyglet raises whatever the platform does: ImportError, NoSuchDisplayException, ...
            where = "without a display (EGL)" if headless else "on this display"
            raise WindowError(f"no OpenGL window can be opened {where}: {type(error).__name__}: {error}") from error
        import imgui_bundle
        from imgui_bundle import imgui, implot
        from imgui_bundle.python_backends.pyglet_backend import create_renderer  # type: ignore[attr-defined]
        from pyglet import gl

        self._gl, self._imgui, self._pyglet = gl, imgui, pyglet
        self._contexts = imgui.create_context(), implot.create_context()
        io = imgui.get_io()
        io.set_ini_filename("")
        io.config_error_recovery_enable_assert = io.config_error_recovery_enable_tooltip = False  # `build` may raise
        io.fonts.add_font_from_file_ttf(str(Path(imgui_bundle.__file__).parent / FONT), FONT_SIZE)
        if headless:
            io.config_flags |= imgui.ConfigFlags_.no_mouse_cursor_change.value
        self._renderer = create_renderer(self._window)
        self._watch_events()
        self.handler: Any = None
        self.has_input = True
        self.closed = False
        self._drawn = time.perf_counter()
        self._texture = gl.GLuint(0)
        self._texture_size = (0, 0)
        self._buffer: wp.RegisteredGLBuffer | None = None
        self._buffer_id = gl.GLuint(0)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in units of mouse positions."""
        return self._window.get_size()

    @property
    def pixel_ratio(self) -> float:
        """Pixels per unit of mouse positions."""
        return self._window.get_framebuffer_size()[0] / max(1, self._window.get_size()[0])

    @property
    def native(self) -> Any:
        """The pyglet window."""
        return self._window

    def set_title(self, title: str) -> None:
        self._window.set_caption(title)

    def resize(self, width: int, height: int) -> None:
        self._window.set_size(width, height)

    def poll(self) -> None:
        """Take the events that wait."""
        self._pyglet.clock.tick()
        self._window.switch_to()
        self._window.dispatch_events()

    def draw(self, build: Callable[[], None], *, screenshot: Path | None = None) -> None:
        """Draw a frame of what `build` says to ImGui, and write it as a picture file too.

        Raises ImageError, or what `build` raises; the next frame may be drawn all the same.
        """
        imgui, now = self._imgui, time.perf_counter()
        self._window.switch_to()
        imgui.get_io().delta_time = max(now - self._drawn, 1e-4)
        self._drawn = now
        imgui.new_frame()
        try:
            build()
        finally:
            imgui.render()
        self._window.clear()
        self._renderer.render(imgui.get_draw_data())
        if screenshot is not None:
            write_image(screenshot, self._read())
        self._window.flip()

    def show(self, picture: Picture) -> Any:
        """Copy a picture into the texture; a reference to it for ImGui. Pixels of a CUDA device stay there."""
        gl = self._gl
        self._window.switch_to()
        size = (picture.width, picture.height)
        if size != self._texture_size:
            self._allocate(*size)
        gl.glBindTexture(gl.GL_TEXTURE_2D, self._texture)
        pixels: Any = picture.pixels
        if not isinstance(pixels, np.ndarray) and pixels.device.is_cuda:
            self._copy_on_device(pixels, size)
            source = None
        else:
            host = np.ascontiguousarray(pixels if isinstance(pixels, np.ndarray) else pixels.numpy())
            source = host.ctypes.data
        gl.glPixelStorei(gl.GL_UNPACK_ALIGNMENT, 4)
        gl.glTexSubImage2D(gl.GL_TEXTURE_2D, 0, 0, 0, *size, gl.GL_RGBA, gl.GL_UNSIGNED_BYTE, source)
        if source is None:
            gl.glBindBuffer(gl.GL_PIXEL_UNPACK_BUFFER, 0)
        gl.glBindTexture(gl.GL_TEXTURE_2D, 0)
        return self._imgui.ImTextureRef(self._texture.value)

    def close(self) -> None:
        """Give back all that the window holds."""
        from imgui_bundle import implot

        self._buffer = None  # unregisters it
        self._window.switch_to()
        self._renderer.shutdown()
        implot.destroy_context(self._contexts[1])
        self._imgui.destroy_context(self._contexts[0])
        self._window.close()

    def _read(self) -> np.ndarray:
        """(height, width, 3) uint8 of the frame that is drawn but not shown yet."""
        gl = self._gl
        width, height = self._window.get_framebuffer_size()
        pixels = np.empty((height, width, 4), np.uint8)
        gl.glReadBuffer(gl.GL_BACK)
        gl.glPixelStorei(gl.GL_PACK_ALIGNMENT, 4)
        gl.glReadPixels(0, 0, width, height, gl.GL_RGBA, gl.GL_UNSIGNED_BYTE, pixels.ctypes.data)
        return np.ascontiguousarray(pixels[::-1, :, :3])

    def _allocate(self, width: int, height: int) -> None:
        gl = self._gl
        if not self._texture.value:
            gl.glGenTextures(1, self._texture)
        gl.glBindTexture(gl.GL_TEXTURE_2D, self._texture)
        for name in (gl.GL_TEXTURE_MIN_FILTER, gl.GL_TEXTURE_MAG_FILTER):
            gl.glTexParameteri(gl.GL_TEXTURE_2D, name, gl.GL_LINEAR)
        for name in (gl.GL_TEXTURE_WRAP_S, gl.GL_TEXTURE_WRAP_T):
            gl.glTexParameteri(gl.GL_TEXTURE_2D, name, gl.GL_CLAMP_TO_EDGE)
        gl.glTexImage2D(gl.GL_TEXTURE_2D, 0, gl.GL_RGBA8, width, height, 0, gl.GL_RGBA, gl.GL_UNSIGNED_BYTE, None)
        self._texture_size = (width, height)
        self._buffer = None

    def _copy_on_device(self, pixels: wp.array, size: tuple[int, int]) -> None:
        """Copy device pixels into a registered buffer, and leave that bound as the source of texture uploads."""
        gl, n = self._gl, size[0] * size[1]
        if self._buffer is None:
            if not self._buffer_id.value:
                gl.glGenBuffers(1, self._buffer_id)
            gl.glBindBuffer(gl.GL_PIXEL_UNPACK_BUFFER, self._buffer_id)
            gl.glBufferData(gl.GL_PIXEL_UNPACK_BUFFER, 4 * n, None, gl.GL_STREAM_DRAW)
            gl.glBindBuffer(gl.GL_PIXEL_UNPACK_BUFFER, 0)
            self._buffer = wp.RegisteredGLBuffer(
                self._buffer_id.value, pixels.device, flags=wp.RegisteredGLBuffer.WRITE_DISCARD
            )
        mapped = self._buffer.map(dtype=wp.uint32, shape=(n,))
        wp.copy(mapped, pixels, count=n)
        self._buffer.unmap()
        gl.glBindBuffer(gl.GL_PIXEL_UNPACK_BUFFER, self._buffer_id)

    def _watch_events(self) -> None:
        """Hand events on to `handler`: mouse events unless ImGui wants the mouse, keys unless it wants the keyboard."""
        mouse = ("on_mouse_press", "on_mouse_scroll")
        keys = ("on_key_press",)
        always = (
            "on_mouse_release", "on_mouse_drag", "on_mouse_motion", "on_key_release", "on_deactivate", "on_file_drop",
            "on_resize",
        )  # fmt: skip

        def forward(name: str) -> Callable[..., None]:
            def handle(*arguments: Any) -> None:
                self.has_input = True
                io = self._imgui.get_io()
                wanted = (name in mouse and io.want_capture_mouse) or (name in keys and io.want_text_input)
                if not wanted and self.handler is not None and hasattr(self.handler, name):
                    getattr(self.handler, name)(*arguments)

            return handle

        def on_close() -> bool:
            self.closed = True
            return True  # keeps pyglet from destroying the context under us

        self._window.push_handlers(on_close=on_close, **{name: forward(name) for name in (*mouse, *keys, *always)})
        self._window.on_key_press = lambda *_: None  # pyglet's own closes the window on Escape


class NullWindow:
    """Stands for a window where there is neither display nor EGL: pictures are computed, nothing is drawn."""

    handler: Any = None
    has_input = False
    closed = False
    pixel_ratio = 1.0

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)

    def set_title(self, title: str) -> None:
        """Nothing to write it on."""

    def poll(self) -> None:
        """No events come."""

    def draw(self, _build: Callable[[], None], *, screenshot: Path | None = None) -> None:
        """Draw nothing. Raises WindowError for a screenshot: there is nothing to take a picture of."""
        if screenshot is not None:
            raise WindowError(f"{screenshot}: there is no window to take a picture of")

    def show(self, _picture: Picture) -> Any:
        """Nothing to show it in."""

    def close(self) -> None:
        """Nothing to give back."""
