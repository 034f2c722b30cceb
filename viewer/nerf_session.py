"""`NerfSession`: a radiance field that is being fitted to photographs, its depth, and the cells it fills."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import warp as wp

from nrc.config import one_of
from nrc.fit.live import LiveTraining
from nrc.fit.nerf import NerfTask
from nrc.fit.nerf_render import NerfRenderer, TracedView, depth_span
from nrc.fit.radiance_field import RadianceField
from nrc.fit.views import Camera as ViewCamera
from nrc.fit.views import Views, load_views
from nrc.image import ImageError
from nrc.kernels import nerf_render as kr
from nrc.kernels import pixels as px
from nrc.launch import launch
from nrc.scene import Camera, SceneError
from nrc.viewer.fit_session import FitSession
from nrc.viewer.session import Request

SHOWS = ("colour", "depth", "occupancy")
SPAN_PIXELS = 1 << 14  # that the depths shown brightest and darkest are taken from
DISTANCE = 1.6  # of the first camera from the middle of the unit cube, where no photographs are known

Corner = tuple[float, float, float]


@dataclass(frozen=True)
class NerfSettings:
    """What the panels change.

    Attributes:
        train: Whether frames train the fit.
        show: "colour", "depth" (near is bright), or "occupancy": the cells that rays look into.
        crop: Lower and upper corner of the part to look at, in the unit cube; None for all.
        background: Behind what is not opaque, "white" or "black".
    """

    train: bool = True
    show: Literal["colour", "depth", "occupancy"] = "colour"
    crop: tuple[Corner, Corner] | None = None
    background: Literal["white", "black"] = "white"


class NerfSession(FitSession):
    """Fits a radiance field while one looks around in it, in unit-cube space.

    Args:
        source: As of `NerfTask`.
        device: Warp device; the first GPU, else the CPU.
        options: Of `NerfTask`.

    Attributes:
        training_cameras: Cameras of the photographs, without distortion; empty where they are not known.
        photograph_sizes: (width, height) of each [px].

    Raises:
        SceneError, ImageError, ValueError: The source or an option cannot be used; the message names it.
    """

    kind = "nerf"

    def __init__(self, source: str | os.PathLike[str], *, device: Any = None, **options: Any) -> None:
        self.task = NerfTask(source, device=device, **options)
        name, task = Path(source).resolve().name, self.task
        self._set_up(name, task.model, task.views, task.warnings, LiveTraining(task))

    @classmethod
    def from_snapshot(cls, path: str | os.PathLike[str], device: Any = None) -> NerfSession:
        """The field in a snapshot of a `NerfTask`, which is not trained further. Raises SnapshotError."""
        fit = RadianceField.load_fit(path)
        field = RadianceField.load(path, device)
        views: Views | None = None
        warnings: tuple[str, ...] = ()
        try:
            views = load_views(fit["source"], holdout=fit["holdout"], downscale=fit["downscale"])
            warnings = views.warnings
        except (SceneError, ImageError) as error:
            warnings = (f"there are no photographs to compare with: {error}",)
        session = cls.__new__(cls)
        session._set_up(Path(path).name, field, views, warnings, None)
        return session

    def _set_up(
        self,
        name: str,
        field: RadianceField,
        views: Views | None,
        warnings: tuple[str, ...],
        training: LiveTraining | None,
    ) -> None:
        super().__init__(name, field.device, warnings, training)
        self._field, self._views = field, views
        self._renderer = NerfRenderer(field)
        self._seen: TracedView | None = None
        self._shown: Any = wp.empty(0, dtype=wp.vec3, device=self.device)
        self.settings = NerfSettings(background="white" if views is None or views.has_alpha else "black")
        self.bounds = _middle(field.crop)
        self.up = (0.0, 0.0, 1.0) if views is None else _up(views)
        n_views = 0 if views is None else len(views)
        cameras = [views.camera(i) for i in range(n_views)] if views is not None else []
        self.training_cameras: list[Camera] = [camera.to_scene() for camera in cameras]
        self.photograph_sizes = [camera.size for camera in cameras]
        self.camera = self.training_cameras[0] if cameras else _first_camera()

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of the first frame by name, for `nrc.launch.prepare`."""
        training = self.task.kernels() if self.training is not None else {}
        return training | self._field.kernels() | self._renderer.kernels() | {"display": px.pack_colors}

    def photograph(self, i: int) -> np.ndarray:
        """(height, width, 4) uint8, sRGB-encoded RGBA with straight alpha, of training camera `i`."""
        if self._views is None or not 0 <= i < len(self._views):
            raise ValueError(f"{self.name}: there is no photograph {i}")
        return self._views.image(i)

    def draw(self, request: Request, width: int, height: int) -> tuple[wp.array, bool]:
        """The field as the request's settings show it."""
        settings: NerfSettings = request.settings
        one_of(settings.show, SHOWS, "view of a radiance field")
        if self.training is not None:
            self.task.use_average()
        scene_camera = request.camera or self.camera
        assert scene_camera is not None
        camera = ViewCamera.from_scene(scene_camera, width, height, (request.width, request.height))
        n = width * height
        if settings.show == "occupancy":
            seen = self._renderer.trace_occupancy(camera, crop=settings.crop)
        else:
            seen = self._renderer.trace(camera, crop=settings.crop)
        if self._shown.shape[0] < n:
            self._shown = wp.empty(n, dtype=wp.vec3, device=self.device)
        shown, self._seen = self._shown[:n], seen
        if settings.show == "depth":
            stride = -(-n // SPAN_PIXELS)
            span = depth_span(seen.depth[::stride].numpy(), seen.alpha[::stride].numpy()) or (0.0, 1.0)
            inputs = [*span, seen.depth, seen.alpha]
            launch(kr.shade_depth, n, inputs=inputs, outputs=[shown], device=self.device)
        else:
            background = 1.0 if settings.background == "white" else 0.0
            inputs = [background, seen.color, seen.alpha]
            launch(kr.put_over, n, inputs=inputs, outputs=[shown], device=self.device)
        return shown, False

    def figures(self) -> dict[str, Any]:
        """Samples that the picture took, photographs, and rays of a training step."""
        figures: dict[str, Any] = {"samples": self._seen.n_samples if self._seen else 0}
        if self.training is not None:
            figures["rays_per_step"] = self.task.n_rays
        return figures

    def pick(self, x: float, y: float) -> dict[str, Any] | None:
        """Position in the unit cube of what the last picture shows there, and its opacity."""
        pixel = self.pixel_at(x, y)
        if pixel is None or self._seen is None or self._request is None or self._request.camera is None:
            return None
        alpha = float(self._seen.alpha.numpy()[pixel])
        if alpha < 0.5:
            return None
        origin, direction = self.ray_of(pixel)
        return {"position": origin + float(self._seen.depth.numpy()[pixel]) * direction, "alpha": alpha}


def _middle(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a box and the unit cube, where the scene's middle is, have in common; the box where that is nothing."""
    lower, upper = np.clip(box, 0.0, 1.0)
    return (lower, upper) if (lower < upper).all() else (box[0], box[1])


def _up(views: Views) -> Corner:
    """The axis nearest to the cameras' mean up; z where they agree on none."""
    mean = views.c2w[:, :, 1].mean(axis=0)
    up = np.array([0.0, 0.0, 1.0])
    if np.linalg.norm(mean) > 0.1:
        axis = int(np.abs(mean).argmax())
        up = np.sign(mean[axis]) * np.eye(3)[axis]
    x, y, z = (float(value) + 0.0 for value in up)
    return x, y, z


def _first_camera() -> Camera:
    direction = np.array([0.6, -1.0, 0.5])
    x, y, z = 0.5 + DISTANCE * direction / np.linalg.norm(direction)
    return Camera.look_at((x, y, z), (0.5, 0.5, 0.5), (0.0, 0.0, 1.0), fov=40.0, fov_axis="y")
