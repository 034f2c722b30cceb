"""`Playback`: a camera path that is recorded, played, and written out as frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import warp as wp

from nrc.image import write_image
from nrc.scene import Camera
from nrc.viewer.camera_path import CameraPath
from nrc.viewer.session import Picture, Request, Session

RECORD_SECONDS = 0.1  # between keyframes of a recording


@dataclass
class Export:
    """Frames being written.

    Attributes:
        n_frames, n_done: How many there are to be, and are.
        cancelled: Set by the window to stop; the frame under way is not written.
    """

    n_frames: int
    n_done: int = 0
    cancelled: bool = False


class Playback:
    """State of the camera path.

    Attributes:
        path: Keyframes; replaced by `set_path`.
        time: On the path [s] while it plays or is scrubbed; None where the camera is free.
        is_playing, is_recording: Whether time goes on by itself, and whether the camera is being recorded.
        export: Frames being written, or None.
        fps, spp, size: Of exported frames: how many per second, samples accumulated for each, width and height [px].
    """

    def __init__(self) -> None:
        self.path = CameraPath()
        self.time: float | None = None
        self.is_playing = self.is_recording = False
        self.export: Export | None = None
        self.fps, self.spp, self.size = 24.0, 16, (640, 360)
        self._recorded = 0.0  # [s] since recording began

    def play(self) -> None:
        """From the beginning."""
        if len(self.path.keyframes) > 1:
            self.time, self.is_playing, self.is_recording = 0.0, True, False

    def seek(self, time: float) -> None:
        """Stand still at a time of the path."""
        self.time, self.is_playing = time, False

    def set_path(self, path: CameraPath) -> None:
        """Take another path; playing and recording end."""
        self.stop()
        self.path, self.is_recording = path, False

    def stop(self) -> None:
        """Set the camera free."""
        self.time, self.is_playing = None, False

    def record(self, camera: Camera) -> None:
        """Begin a new path at the camera, or end the recording."""
        if self.is_recording:
            self.is_recording = False
        else:
            self.set_path(CameraPath())
            self.is_recording, self._recorded = True, 0.0
            self.path.add(camera, 0.0)

    def advance(self, seconds: float, camera: Camera) -> None:
        """Let time pass."""
        if self.is_recording:
            self._recorded += seconds
            if self._recorded - self.path.duration >= RECORD_SECONDS:
                self.path.add(camera, self._recorded)
        if self.is_playing and self.time is not None:
            self.time += seconds
            if self.time > self.path.duration:
                self.stop()

    @property
    def camera(self) -> Camera | None:
        """The path's camera at its time; None where the camera is free."""
        return None if self.time is None else self.path.camera(self.time)

    def write_frames(
        self,
        session: Session,
        request: Request,
        cameras: list[Camera],
        folder: Path,
        export: Export,
        show: Callable[[Picture], None],
    ) -> int:
        """Render what each camera sees as frame_0000.png, ... into `folder`; the number written.

        Args:
            request: What each frame is of, but for its camera.
            show: Receives each picture.

        Raises:
            ImageError, OSError: A file cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i, camera in enumerate(cameras):
                framed = replace(request, camera=camera)
                for _ in range(self.spp):
                    if export.cancelled:
                        return export.n_done
                    picture = session.frame(framed)
                write_image(folder / f"frame_{i:04}.png", to_rgb8(picture))
                show(picture)
                export.n_done = i + 1
        finally:
            self.export = None
        return export.n_done


def to_rgb8(picture: Picture) -> np.ndarray:
    """(height, width, 3) uint8 of a picture."""
    pixels = picture.pixels
    if isinstance(pixels, wp.array):
        pixels = pixels.numpy()[: picture.width * picture.height].view(np.uint8)
    return np.ascontiguousarray(pixels.reshape(picture.height, picture.width, 4)[:, :, :3])
