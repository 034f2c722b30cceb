"""`SdfRenderer`: what a camera sees of a learned distance field, by sphere tracing (Hart 1996).

A round evaluates the field once for every ray that is still on its way and moves these together. How many they are
stays on the device; the CPU looks at it after every round, a GPU after several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import warp as wp

from nrc.config import one_of
from nrc.field import Field
from nrc.kernels import sdf
from nrc.launch import launch
from nrc.scene import Camera

MAX_STEPS, CLOSE = 96, 2e-4  # of sphere tracing
# Of quick pictures: part of a pixel's size that also counts as close, rounds, and share of the rays that is left alone
QUICK_CLOSE, QUICK_STEPS, QUICK_REST = 0.1, 40, 1 / 256
NORMAL_STEP = 5e-4  # of the differences that normals come from
BACKGROUND = 0.75  # linear
BACKGROUND_NORMAL = 1.0
IN_FRONT = 0.4  # opacity of the surface in front of a slice
ROUNDS_CUDA = 6  # rounds between two looks at the number of rays
TO_LIGHT = np.array([-0.9 * np.tan(np.radians(15.0)), 1.6 * np.tan(np.radians(15.0)), 1.0])  # right, up, backwards
SHOWS = ("shaded", "normals", "slice")

Show = Literal["shaded", "normals", "slice"]


@dataclass(frozen=True)
class Slice:
    """An axis-aligned plane through the box: distances on it are shown as colours, and hide what lies behind.

    Attributes:
        axis: Of its normal, 0, 1 or 2.
        offset: Of the plane along the box, 0 at its lower and 1 at its upper side.
    """

    axis: int = 1
    offset: float = 0.5

    def __post_init__(self) -> None:
        if self.axis not in (0, 1, 2) or not 0.0 <= self.offset <= 1.0:
            raise ValueError(f"a slice needs an axis 0, 1 or 2 and an offset in [0, 1], got {self.axis}, {self.offset}")


@dataclass(frozen=True)
class TracedSurface:
    """What the rays of a picture met, row by row; arrays on the device that the next picture overwrites.

    Attributes:
        color: (n,) vec3, linear, shaded by a light that goes with the camera.
        normal: (n,) vec3, unit, of what was hit, else 0.
        t: (n,) float, distance from the eye [unit cube].
        state: (n,) int, `nrc.kernels.sdf.HIT` where the surface was hit.
        on_plane: (n,) int, 1 where the ray meets the slice.
        n_evaluations: Of the field, as far as the host knows: on CUDA an upper bound.
    """

    color: wp.array
    normal: wp.array
    t: wp.array
    state: wp.array
    on_plane: wp.array
    n_evaluations: int


class SdfRenderer:
    """Renders the zero level of a distance field inside a box; working memory is kept between pictures.

    Args:
        field: 3 inputs, one output.
        lower, upper: Corners of the box in the unit cube.
        params: To look at the field with; its own by default. May be replaced between pictures.

    Attributes:
        seen: What the last picture's rays met.
    """

    def __init__(self, field: Field, lower: np.ndarray, upper: np.ndarray, params: wp.array | None = None) -> None:
        self.field, self.params, self.device = field, params, field.device
        self.lower, self.upper = np.asarray(lower, float), np.asarray(upper, float)
        self.seen: TracedSurface | None = None
        self._n_rounds = 1 if self.device.is_cpu else ROUNDS_CUDA
        self._capacity = 0
        self._reserve(1)

    def _reserve(self, n: int) -> None:
        if n <= self._capacity:
            return
        self._capacity = n

        def empty(*shape: int, dtype: Any = float) -> Any:
            return wp.empty(shape, dtype=dtype, device=self.device)

        self._direction, self._color, self._normal = (empty(n, dtype=wp.vec3) for _ in range(3))
        self._t, self._t_end = empty(n), empty(n)
        self._state, self._on_plane, self._alive, self._end = (empty(n, dtype=int) for _ in range(4))
        self._ray, self._next_ray = empty(n, dtype=int), empty(n, dtype=int)
        self._x, self._distance = empty(n, dtype=wp.vec3), empty(n, 1)
        self._corners, self._corner_distance = empty(0, dtype=wp.vec3), empty(0, 1)

    def render(
        self,
        camera: Camera,
        width: int,
        height: int,
        *,
        show: Show = "shaded",
        plane: Slice | None = None,
        window: tuple[int, int] | None = None,
        quick: bool = False,
    ) -> wp.array:
        """A picture of the surface: (height * width,) vec3 on the device, overwritten by the next.

        Args:
            show: "shaded" and "slice" are linear colours, "normals" (n + 1) / 2.
            plane: Of "slice", the middle of the box across y by default. What is in front of it shines through.
            camera, width, height, window, quick: As of `trace`.
        """
        one_of(show, SHOWS, "view of a distance")
        plane = (plane or Slice()) if show == "slice" else None
        seen = self.trace(camera, width, height, plane=plane, window=window, quick=quick)
        if show == "normals":
            launch(
                sdf.show_normals,
                width * height,
                inputs=[BACKGROUND_NORMAL, seen.state, seen.normal],
                outputs=[seen.color],
                device=self.device,
            )
        return seen.color

    def trace(
        self,
        camera: Camera,
        width: int,
        height: int,
        *,
        plane: Slice | None = None,
        window: tuple[int, int] | None = None,
        quick: bool = False,
    ) -> TracedSurface:
        """Send a ray through every pixel's centre and shade what it meets.

        Args:
            camera: Pinhole, in unit-cube space.
            width, height: [px]
            plane: A plane to show distances on; rays end there.
            window: Size [px] of what the picture is scaled to, which the camera's field of view is of.
            quick: Rays also arrive within a tenth of a pixel of the surface, and the few that take long, which graze
                it, are taken to have met it.
        """
        n, device = width * height, self.device
        self._reserve(n)
        half_x, half_y = camera.half_extents(*(window or (width, height)))
        view, pixel = _pinhole(camera, half_x, half_y, width, height), 2.0 * half_y / height
        lower, upper = (wp.vec3(*(float(x) for x in corner)) for corner in (self.lower, self.upper))
        cut = sdf.SliceView()
        cut.axis = -1
        if plane is not None:
            cut.axis = plane.axis
            low, high = self.lower[plane.axis], self.upper[plane.axis]
            cut.level = float(low + plane.offset * (high - low))
        launch(
            sdf.start_rays,
            n,
            inputs=[view, lower, upper, cut],
            outputs=[self._direction, self._t, self._t_end, self._state, self._on_plane, self._alive],
            device=device,
        )
        n_evaluations = self._march(view.eye, n, pixel, quick)
        self._color[:n].fill_(wp.vec3(BACKGROUND))
        self._normal[:n].zero_()
        launch(sdf.mark_hits, n, inputs=[int(quick)], outputs=[self._state, self._alive], device=device)
        n_hits = self._gather(view.eye, self._alive, self._t, n)
        if n_hits:
            self._shade(camera, n_hits)
        if plane is not None:
            n_met = self._gather(view.eye, self._on_plane, self._t_end, n)
            if n_met:
                self._evaluate(n_met, None)
                launch(
                    sdf.shade_slice,
                    n_met,
                    inputs=[pixel, IN_FRONT, self._ray, self._distance, self._t_end, self._state],
                    outputs=[self._color],
                    device=device,
                )
            n_evaluations += n_met
        self.seen = TracedSurface(
            self._color[:n],
            self._normal[:n],
            self._t[:n],
            self._state[:n],
            self._on_plane[:n],
            n_evaluations + 4 * n_hits,
        )
        return self.seen

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        return {"sphere tracing": sdf.start_rays} | self.field.kernels()

    def _march(self, eye: wp.vec3, n: int, pixel: float, quick: bool) -> int:
        """Move the rays until all have arrived or left the box; how often the field was evaluated."""
        n_rounds = self._n_rounds
        spread, n_steps = (QUICK_CLOSE * pixel, QUICK_STEPS) if quick else (0.0, MAX_STEPS)
        bound, rest, rays, n_evaluations = n, 0, None, 0
        for step in range(n_steps):
            wp.utils.array_scan(self._alive[:bound], self._end[:bound], inclusive=True)
            count = self._end[bound - 1 : bound]
            slots = bound
            if step % n_rounds == 0:
                bound = int(count.numpy()[0])
                if bound <= rest:
                    break
                if quick and step == 0:
                    rest = int(QUICK_REST * bound)
            launch(
                sdf.gather_points,
                slots,
                inputs=[eye, rays, self._alive, self._end, self._direction, self._t],
                outputs=[self._next_ray, self._x],
                device=self.device,
            )
            self._ray, self._next_ray = self._next_ray, self._ray
            rays, known = self._ray, step % n_rounds == 0
            self._evaluate(bound, None if known else count)
            launch(
                sdf.advance_rays,
                bound,
                inputs=[CLOSE, spread, None if known else count, rays, self._distance, self._t_end],
                outputs=[self._t, self._state, self._alive],
                device=self.device,
            )
            n_evaluations += bound
        return n_evaluations

    def _evaluate(self, n: int, count: wp.array | None) -> None:
        self.field.inference(self._x[:n], self._distance[:n], params=self.params, count=count)

    def _gather(self, eye: wp.vec3, marked: wp.array, t: wp.array, n: int) -> int:
        """Move the marked ones of all rays together, with their points at distance `t`; how many they are."""
        wp.utils.array_scan(marked[:n], self._end[:n], inclusive=True)
        launch(
            sdf.gather_points,
            n,
            inputs=[eye, None, marked, self._end, self._direction, t],
            outputs=[self._ray, self._x],
            device=self.device,
        )
        return int(self._end[n - 1 : n].numpy()[0])

    def _shade(self, camera: Camera, n: int) -> None:
        """Colours and normals of the `n` rays gathered."""
        if self._corners.shape[0] < 4 * n:
            self._corners = wp.empty(4 * n, dtype=wp.vec3, device=self.device)
            self._corner_distance = wp.empty((4 * n, 1), dtype=float, device=self.device)
        corners, distance = self._corners[: 4 * n], self._corner_distance[: 4 * n]
        launch(sdf.place_corners, 4 * n, inputs=[NORMAL_STEP, self._x], outputs=[corners], device=self.device)
        self.field.inference(corners, distance, params=self.params)
        to_light = camera.to_world[:3, :3] @ TO_LIGHT
        launch(
            sdf.shade_points,
            n,
            inputs=[wp.vec3(*(to_light / np.linalg.norm(to_light))), self._ray, distance],
            outputs=[self._normal, self._color],
            device=self.device,
        )


def _pinhole(camera: Camera, half_x: float, half_y: float, width: int, height: int) -> Any:
    axes = camera.to_world[:3, :3]
    view = sdf.PinholeView()
    view.eye = wp.vec3(*camera.to_world[:3, 3])
    view.right, view.up = wp.vec3(*(half_x * axes[:, 0])), wp.vec3(*(half_y * axes[:, 1]))
    view.forward = wp.vec3(*-axes[:, 2])
    view.width, view.height = width, height
    return view
