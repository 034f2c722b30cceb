"""`TemporalAccumulation`: frames of a moving camera or scene, averaged along the motion of what they show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import warp as wp

from nrc.device_scene import DeviceScene
from nrc.kernels import temporal as kt
from nrc.kernels.camera import CameraView
from nrc.kernels.intersect import Hit
from nrc.launch import heavy_range, launch, resolve_device

_CAMERA_FIELDS = ("origin", "x", "y", "z", "half_width", "half_height")


@dataclass(frozen=True)
class TemporalConfig:
    """What is taken from the frames before.

    Attributes:
        min_alpha: Least weight of a new frame. A pixel is the plain mean of its first 1 / min_alpha frames and an
            exponential mean from then on.
        normal_angle: Largest angle between the normals of one surface [rad].
        plane_distance: Largest distance between a surface's tangent plane and the same surface in a neighbouring pixel,
            over its distance from the camera.
        mirror_history: Longest history of a mirror while what it reflects moves [frames]; glossy surfaces have more,
            in proportion to the width of their lobe over the reflection's turn per frame.
        t_keep, t_drop: The statistic of the test for changed light, at most 11, up to which all history is kept and
            from which on none is. An infinite t_drop never drops any.

    Raises:
        ValueError: A value out of range.
    """

    min_alpha: float = 1.0 / 32.0
    normal_angle: float = math.radians(25.0)
    plane_distance: float = 0.01
    mirror_history: float = 2.0
    t_keep: float = 2.5
    t_drop: float = 3.5

    def __post_init__(self) -> None:
        if not 0.0 < self.min_alpha <= 1.0:
            raise ValueError(f"min_alpha must lie in (0, 1], got {self.min_alpha}")
        if not 0.0 <= self.normal_angle <= math.pi:
            raise ValueError(f"normal_angle must lie between 0 and pi, got {self.normal_angle}")
        if not self.plane_distance > 0.0:
            raise ValueError(f"plane_distance must be positive, got {self.plane_distance}")
        if not self.mirror_history >= 1.0:
            raise ValueError(f"mirror_history must be at least 1, got {self.mirror_history}")
        if not 0.0 <= self.t_keep < self.t_drop:
            raise ValueError(f"expected 0 <= t_keep < t_drop, got {self.t_keep} and {self.t_drop}")


class TemporalAccumulation:
    """Averages frames for display, each pixel with what the same surface looked like in the frames before.

    The first half of SVGF (Schied et al. 2017; Yang, Liu and Salvi 2020 survey the field). The first hit at a pixel's
    centre is followed to where its triangle was a frame ago, in the scene and through the camera of then. The four
    pixels around are its history where they show the same object, normal and plane. Colours are divided by the pixel's
    mean albedo and emission before, so that textures and the edges of lamps stay sharp. Where a reflection moves,
    history is as long as it stays in the lobe.

    Where light changes history is dropped: over a window of pixels, a test compares the new frame's luminance with the
    history's. It asks whether they differ by more than the noise, so that noise alone drops little; a clamp to the
    colours of a window, the usual remedy, makes a noisy picture 5 to 10 % too dark. In the place of what is dropped
    comes the mean of the new frame over the same surface in 5 × 5 pixels, which counts three frames.

    Pixels at the edge of an object hold its light. A pixel that shows nothing but background takes none from them, but
    what the background is known to be.

    Args:
        width, height: Picture size [px].
        device: Warp device.
        config: What is taken from the frames before.
    """

    def __init__(self, width: int, height: int, device: Any = None, config: TemporalConfig = TemporalConfig()) -> None:
        if width < 1 or height < 1:
            raise ValueError(f"picture size must be positive, got {width}x{height}")
        self.width, self.height, self.config = width, height, config
        self.device = resolve_device(device)
        n = width * height
        self._guides = [self._guide(n), self._guide(n)]  # of the last frame and of the one before
        self._kept, self._reprojected = self._history(n), self._history(n)
        self._hits = wp.zeros(n, dtype=Hit, device=self.device)
        self._lobe = wp.zeros(n, dtype=wp.vec2, device=self.device)
        self._centre = wp.zeros(n, dtype=wp.vec3, device=self.device)
        self._own = wp.zeros(n, dtype=wp.vec3, device=self.device)
        self._terms = wp.zeros(n, dtype=wp.vec3, device=self.device)
        self._row_sums = wp.zeros(n, dtype=wp.vec3, device=self.device)
        self._shown = wp.zeros(n, dtype=wp.vec3, device=self.device)
        params: Any = kt.TemporalParams()
        params.min_alpha = config.min_alpha
        params.cos_normal = math.cos(config.normal_angle)
        params.plane_distance = config.plane_distance
        params.mirror_history = config.mirror_history
        params.t_keep = config.t_keep
        params.t_drop = config.t_drop
        self._params = params
        self._scene: DeviceScene | None = None
        self._camera: Any = None

    @staticmethod
    def kernels() -> dict[str, wp.Kernel]:
        """Kernels to compile before the first frame, by the name to announce."""
        return {"temporal accumulation": kt.reproject_history}

    @property
    def history_length(self) -> wp.array:
        """(pixels,) float, how many frames each pixel of the last picture averages; at least 1.

        What takes the place of a dropped history counts three.
        """
        return self._kept.length

    def add(self, colour: wp.array, scene: DeviceScene, camera: CameraView) -> wp.array:
        """The picture after another frame.

        Allocates nothing and reads nothing back. The scene of the call before must still be what it was then.

        Args:
            colour: (pixels,) vec3, the frame's radiance [W m^-2 sr^-1]. A pixel that is not finite or negative counts
                as not seen.
            scene: What the frame shows, `Renderer.scene`. A scene with another number of triangles or vertices starts
                over.
            camera: Through what, `Renderer.tracer.camera` or made by `DeviceScene.camera_view`; of a thin lens the
                centre.

        Returns:
            (pixels,) vec3 [W m^-2 sr^-1], overwritten by the next call.

        Raises:
            TypeError: A host scene, camera or picture.
            ValueError: The picture has another size, or lies on another device.
        """
        if not isinstance(scene, DeviceScene):
            raise TypeError(f"expected an uploaded scene (`Renderer.scene`), got {type(scene).__name__}")
        struct: Any = CameraView
        if not isinstance(camera, struct.cls):
            raise TypeError(f"expected a `CameraView` (`Renderer.tracer.camera`), got {type(camera).__name__}")
        if not isinstance(colour, wp.array):
            raise TypeError(f"expected a Warp array (`Renderer.film.frame`), got {type(colour).__name__}")
        view: Any = camera
        if (view.width, view.height) != (self.width, self.height) or colour.shape != (self.width * self.height,):
            got = f"{colour.shape[0]} of a {view.width}x{view.height} view"
            raise ValueError(f"expected {self.width}x{self.height} pixels, got {got}")
        if scene.device != self.device or colour.device != self.device:
            raise ValueError(f"accumulates on {self.device}, got a scene on {scene.device}, colour on {colour.device}")
        if self._scene is not None and not _same_triangles(self._scene, scene):
            self.reset()
        history = self._kept
        if scene is not self._scene or not _same_camera(view, self._camera):
            self._reproject(scene, camera)
            history = self._reprojected
        self._blend(colour, history)
        return self._shown

    def reset(self) -> None:
        """Forget all frames, as after a cut."""
        self._scene, self._camera = None, None
        self._kept.length.zero_()

    def rejected_fraction(self) -> float:
        """Fraction of the last picture's pixels that show one frame alone. Reads the lengths back."""
        return float(np.mean(self.history_length.numpy() <= 1.0))

    def _reproject(self, scene: DeviceScene, camera: CameraView) -> None:
        """Find every pixel's surface and its history."""
        previous, guide = self._guides
        n = self.width * self.height
        for kernel, inputs, outputs in (
            (kt.trace_centres, [], [self._hits, guide, self._centre, self._lobe]),
            (kt.average_own_color, [guide, self._centre], [self._own, guide.border]),
        ):
            launch(
                kernel,
                n,
                inputs=[scene.view, camera, *inputs],
                outputs=outputs,
                device=self.device,
                range_size=heavy_range(n),
            )
        launch(
            kt.reproject_history,
            n,
            inputs=[
                camera,
                scene.view if self._scene is None else self._scene.view,
                camera if self._camera is None else self._camera,
                self._params,
                int(self._scene is not None),
                int(self._scene is not None and not _same_pose(self._scene, scene)),
                self._hits,
                guide,
                self._lobe,
                self._centre,
                self._own,
                previous,
                self._kept,
            ],
            outputs=[self._reprojected],
            device=self.device,
        )
        self._guides = [guide, previous]
        self._scene, self._camera = scene, _copied(camera)

    def _blend(self, colour: wp.array, history: Any) -> None:
        """Mix the frame with its history, in the proportion that the test for changed light finds."""
        n = self.width * self.height
        launch(
            kt.compare_history,
            n,
            inputs=[colour, self._own, history],
            outputs=[self._terms],
            device=self.device,
        )
        launch(
            kt.sum_rows,
            n,
            inputs=[self.width, self._terms],
            outputs=[self._row_sums],
            device=self.device,
        )
        launch(
            kt.blend_history,
            n,
            inputs=[
                self._params,
                self.width,
                self.height,
                self._camera.origin,
                colour,
                self._own,
                self._guides[0],
                history,
                self._row_sums,
            ],
            outputs=[self._kept, self._shown],
            device=self.device,
        )

    def _guide(self, n: int) -> Any:
        view: Any = kt.GuideView()
        view.position = wp.zeros(n, dtype=wp.vec3, device=self.device)
        view.normal = wp.zeros(n, dtype=wp.vec3, device=self.device)
        view.object = wp.zeros(n, dtype=int, device=self.device)
        view.instance = wp.zeros(n, dtype=int, device=self.device)
        view.border = wp.zeros(n, dtype=int, device=self.device)
        return view

    def _history(self, n: int) -> Any:
        view: Any = kt.HistoryView()
        view.color = wp.zeros(n, dtype=wp.vec3, device=self.device)
        view.moments = wp.zeros(n, dtype=wp.vec2, device=self.device)
        view.length = wp.zeros(n, dtype=float, device=self.device)
        return view


def _same_triangles(a: DeviceScene, b: DeviceScene) -> bool:
    """Whether numbers of triangles and instances mean the same in both, as far as their counts tell."""
    x: Any = a.view
    y: Any = b.view
    counts = [(v.indices.shape, v.positions.shape) for v in (x, y)]
    return counts[0] == counts[1] and len(a.scene.instances) == len(b.scene.instances)


def _same_pose(a: DeviceScene, b: DeviceScene) -> bool:
    """Whether nothing moved from one to the other."""
    x: Any = a.view
    y: Any = b.view
    still = x.positions.ptr == y.positions.ptr and x.normals.ptr == y.normals.ptr
    return still and all(i is j for i, j in zip(a.scene.instances, b.scene.instances, strict=True))


def _same_camera(a: Any, b: Any) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in _CAMERA_FIELDS)


def _copied(camera: CameraView) -> CameraView:
    """A camera that stays as it is."""
    copy: Any = CameraView()
    copy.assign(camera)
    return copy
