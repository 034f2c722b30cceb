"""`SdfSession`: a signed distance that is being fitted, as a surface or cut open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.field import Field
from nrc.fit import sdf
from nrc.fit.live import LiveTraining
from nrc.fit.mesh_distance import MeshDistance
from nrc.fit.sdf_render import SdfRenderer, Show, Slice
from nrc.fit.surface import SurfaceError
from nrc.kernels import pixels as px
from nrc.kernels.sdf import HIT
from nrc.viewer.fit_session import FitSession
from nrc.viewer.session import Request


@dataclass(frozen=True)
class SdfSettings:
    """What the panels change.

    Attributes:
        train: Whether frames train the fit.
        show: "shaded", "normals", or "slice": the distances on a plane, through the surface in front of it.
        axis: Of the plane's normal, 0, 1 or 2.
        offset: Of the plane along the box, 0 at its lower and 1 at its upper side.
    """

    train: bool = True
    show: Show = "shaded"
    axis: int = 1
    offset: float = 0.5


class SdfSession(FitSession):
    """Fits the signed distance of a mesh while one looks around it, in the unit cube that the mesh is scaled into.

    Args:
        source: As of `SdfTask`.
        device: Warp device; the first GPU, else the CPU.
        options: Of `SdfTask`.

    Raises:
        SurfaceError, ValueError: The source or an option cannot be used; the message names it.
    """

    kind = "sdf"

    def __init__(self, source: str | os.PathLike[str], *, device: Any = None, **options: Any) -> None:
        self.task = sdf.SdfTask(source, device=device, **options)
        target = self.task.target
        box = target.lower, target.upper
        self._place(target.scale, target.offset)
        self._set_up(Path(source).name, self.task.field, box, target, self.task.warnings, LiveTraining(self.task))

    @classmethod
    def from_snapshot(cls, path: str | os.PathLike[str], device: Any = None) -> SdfSession:
        """The distance in a snapshot of an `SdfTask`, which is not trained further. Raises SnapshotError."""
        field, fit = sdf.load_fit(path, device)
        target: MeshDistance | None = None
        warnings: tuple[str, ...] = ()
        try:
            target = MeshDistance(fit["source"], field.device, fit["seed"])
            if target.sha256 != fit["sha256"]:
                raise SurfaceError(f"{fit['source']}: has changed since")
        except SurfaceError as error:
            target, warnings = None, (f"there is no mesh to compare with: {error}",)
        session = cls.__new__(cls)
        session._place(fit["scale"], np.array(fit["offset"]))
        box = np.array(fit["lower"]), np.array(fit["upper"])
        session._set_up(Path(path).name, field, box, target, warnings, None)
        return session

    def _place(self, scale: float, offset: np.ndarray) -> None:
        self._scale, self._offset = scale, offset

    def _set_up(
        self,
        name: str,
        field: Field,
        box: tuple[np.ndarray, np.ndarray],
        target: MeshDistance | None,
        warnings: tuple[str, ...],
        training: LiveTraining | None,
    ) -> None:
        super().__init__(name, field.device, warnings, training)
        self.settings = SdfSettings()
        self.bounds = box
        corners = np.stack(np.meshgrid(*zip(*box, strict=True)), axis=-1).reshape(-1, 3)
        frame = corners if target is None else target.to_cube().vertices
        self.camera = sdf.framing_camera(np.array(sdf.VIEW), frame)
        self._target, self._renderer = target, SdfRenderer(field, *box)

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of the first frame by name, for `nrc.launch.prepare`."""
        training = self.task.kernels() if self.training is not None else {}
        return training | self._renderer.kernels() | {"display": px.pack_colors}

    def draw(self, request: Request, width: int, height: int) -> tuple[wp.array, bool]:
        """The surface as the request's settings show it."""
        settings: SdfSettings = request.settings
        if self.training is not None:
            self._renderer.params = self.task.trainer.ema_params
        camera = request.camera or self.camera
        assert camera is not None
        color = self._renderer.render(
            camera,
            width,
            height,
            show=settings.show,
            plane=Slice(settings.axis, settings.offset),
            window=(request.width, request.height),
            quick=True,
        )
        return color, settings.show != "normals"

    def figures(self) -> dict[str, Any]:
        """Evaluations of the field that the picture took."""
        return {"evaluations": self._renderer.seen.n_evaluations if self._renderer.seen else 0}

    def pick(self, x: float, y: float) -> dict[str, Any] | None:
        """Position in the unit cube and in the mesh's file, the fit's distance there, the mesh's where it is known."""
        pixel = self.pixel_at(x, y)
        seen = self._renderer.seen
        if pixel is None or seen is None or self._request is None or self._request.camera is None:
            return None
        origin, direction = self.ray_of(pixel)
        if seen.state.numpy()[pixel] == HIT:
            position = origin + float(seen.t.numpy()[pixel]) * direction
        elif self._request.settings.show == "slice" and seen.on_plane.numpy()[pixel]:
            axis, offset = self._request.settings.axis, self._request.settings.offset
            level = self.bounds[0][axis] + offset * (self.bounds[1][axis] - self.bounds[0][axis])
            position = origin + (level - origin[axis]) / direction[axis] * direction
        else:
            return None
        field, point = self._renderer.field, position[None].astype(np.float32)
        found = {
            "position": position,
            "file_position": (position - self._offset) / self._scale,
            "distance": float(field.inference(point, params=self._renderer.params).numpy()[0, 0]),
        }
        if self._target is not None:
            found["mesh_distance"] = float(self._target.distances(point)[0])
        return found
