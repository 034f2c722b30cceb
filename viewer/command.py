"""`view`: what the command `nrc view` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nrc.viewer.app import Viewer
from nrc.viewer.opening import kind_of
from nrc.viewer.window import NullWindow, Window, WindowError


def view(
    source: str,
    *,
    window_size: tuple[int, int] = (1280, 720),
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    n_pictures: int | None = None,
    screenshot: Path | None = None,
    viewport_screenshot: Path | None = None,
    reference: Path | None = None,
    headless: bool = False,
    panels: bool = True,
    start_time: float | None = None,
    play: bool = False,
    say: Callable[[str], None],
    **open_options: Any,
) -> dict[str, Any]:
    """Open a window on `source` and run until it is closed.

    Args:
        window_size: [px].
        size, fps: Of pictures; see `Viewer`.
        n_pictures: End after so many.
        screenshot, viewport_screenshot: Pictures of the window and of what it shows, written at the end.
        reference: Picture to compare a scene's pictures with; its size is the default for theirs.
        start_time, play: Where the animation of the scene begins [s], and whether it plays from there.
        headless: Use EGL, and no window at all where that fails.
        say: Receives lines for the terminal.
        open_options: Of `nrc.viewer.opening.open_source`.

    Returns:
        Figures of the last picture, `first_picture_seconds`, `pictures`, the files written.

    Raises:
        ValueError: No window, or with `n_pictures` anything that went wrong: there is nobody to read it in the window.
    """
    if open_options.get("kind") is None:
        kind_of(source)  # a wrong name is said before a window opens
    window: Window | NullWindow
    try:
        window = Window(*window_size, "nrc", headless=headless)
    except WindowError as error:
        if not headless:
            raise WindowError(f"{error}; --headless --frames N does without a display") from error
        if screenshot is not None:
            raise WindowError(f"--screenshot {screenshot}: {error}; --viewport-screenshot needs no window") from error
        say(f"{error}; going on without a window")
        window = NullWindow(*window_size)
    viewer = Viewer(window, size=size, fps=fps, panels=panels, start_time=start_time, play=play, **open_options)
    try:
        viewer.open(source)
        if reference is not None:
            viewer.load_reference(reference)
        viewer.run(n_pictures=n_pictures)
        if viewport_screenshot is not None:
            viewer.viewport_screenshot(viewport_screenshot)
        if screenshot is not None:
            viewer.screenshot(screenshot)
        if n_pictures is not None:
            viewer.settle()
        errors = [message.text for message, _ in viewer.messages if message.is_error]
        if errors and n_pictures is not None:
            raise ViewError("; ".join(errors))
        return _figures(viewer, say, screenshot, viewport_screenshot)
    finally:
        viewer.close()


class ViewError(ValueError):
    """What went wrong while nobody watched."""


def _figures(viewer: Viewer, say: Callable[[str], None], *files: Path | None) -> dict[str, Any]:
    picture, session = viewer.picture, viewer.session
    if picture is None or session is None:
        return {}
    figures: dict[str, Any] = {
        "name": session.name,
        "kind": session.kind,
        "device": str(session.device),
        "pictures": viewer.worker.n_pictures,
        "width": picture.width,
        "height": picture.height,
        "frames_per_second": viewer.history.fps,
        "first_picture_seconds": viewer.first_picture_seconds,
        "files": [str(file) for file in files if file is not None],
        **picture.stats,
        "stages_ms": {name: sum(values) / len(values) for name, values in viewer.history.stages.items()},
    }
    first = viewer.first_picture_seconds
    for file in figures["files"]:
        say(f"wrote {file}")
    say(
        f"{session.name}: {picture.width}x{picture.height}, {viewer.history.fps:.1f} frames/s"
        + (f", first picture after {first:.1f} s" if first is not None else "")
    )
    return figures
