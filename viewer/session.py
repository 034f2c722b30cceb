"""What the window and the worker hand to each other: requests, pictures, and the sessions that turn one into the other.

The window's thread writes a `Request`, the worker's thread answers with a `Picture`; neither reads the other's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import warp as wp

from nrc.scene import Camera


@dataclass(frozen=True)
class ImageWindow:
    """Which part of an image fills the viewport: position [px] of its centre, viewport pixels per image pixel."""

    x: float
    y: float
    zoom: float


@dataclass(frozen=True)
class Request:
    """What the window wants to see.

    Attributes:
        camera: In the session's world; None for images, and for the scene's own, which its animation may move.
        window: Part of the image; None in three dimensions.
        width, height: Viewport [px].
        seconds: That a frame should take.
        size: Of the picture [px]; None lets the session choose one that takes `seconds`.
        settings: The session's own dataclass, frozen.
    """

    camera: Camera | None
    window: ImageWindow | None
    width: int
    height: int
    seconds: float
    size: tuple[int, int] | None
    settings: Any


@dataclass(frozen=True)
class Picture:
    """An answer to a request.

    Attributes:
        pixels: sRGB-encoded RGBA: (height, width, 4) uint8 on the host, or (height * width,) uint32 on a device.
        width, height: [px].
        stats: Figures for the panels.
        camera: Of a scene's picture, what it was seen through.
    """

    pixels: np.ndarray | wp.array
    width: int
    height: int
    stats: dict[str, Any] = field(default_factory=dict)
    camera: Camera | None = None


class Session(Protocol):
    """Something that is trained and looked at. Used by one thread at a time.

    Attributes:
        kind: "scene", "image", "sdf" or "nerf".
        name: For the title.
        warnings: What was left out or substituted in the source.
        settings: To start from; the window's edits of it travel in requests.
        camera: To start from; None for images.
        up: (3,) which way is up in the session's world.
        bounds: Lower and upper corner of what there is to see, (3,) each; of images (0, 0, 0) and (width, height, 0).
        report: Receives a line about what takes long within a frame.
    """

    kind: str
    name: str
    device: wp.Device
    warnings: tuple[str, ...]
    settings: Any
    camera: Camera | None
    up: tuple[float, float, float]
    bounds: tuple[np.ndarray, np.ndarray]
    report: Callable[[str], None]

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of the first frame by name, for `nrc.launch.prepare`."""
        ...

    def frame(self, request: Request) -> Picture:
        """Train a little, and draw."""
        ...

    def image(self) -> np.ndarray:
        """The last picture, (height, width, 3) float32, linear."""
        ...

    def pick(self, x: float, y: float) -> dict[str, Any] | None:
        """What lies at a point of the last picture, as fractions of its width and height from the upper left corner.

        Returns:
            At least `position`, (3,) in the session's world; None where there is nothing.
        """
        ...

    def save(self, path: Path) -> None:
        """Write what was learned. Raises SnapshotError."""
        ...
