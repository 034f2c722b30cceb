"""Pictures of radiance fields: views, depth, test metrics and meshes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc import metrics
from nrc.fit.camera_path import between
from nrc.fit.radiance_field import RadianceField
from nrc.fit.surface import Surface, extract_surface
from nrc.fit.views import Camera, Views
from nrc.image import write_image
from nrc.kernels import nerf_render as kr
from nrc.kernels.lens import CamerasView
from nrc.kernels.nerf import N_CODE, N_COLOR_INPUTS
from nrc.launch import heavy_range, launch

BLOCK_RAYS = 1 << 16  # rays worked on at once, on the CPU and on CUDA devices
BLOCK_RAYS_CUDA = 1 << 19
SAMPLES_PER_RAY = 8  # room for samples in a round
MOST_SAMPLES = 8  # of a ray in a round: more would lie behind opaque ones
# Of a round with few rays, in which that costs less than another round: of a ray, and of all together
MOST_SAMPLES_FEW, FEW_SAMPLES = 32, 1 << 17
SURFACE_OPACITY = 0.5  # of a step of 1/128 at a mesh's surface, by default
MESH_POINTS = 1 << 18  # evaluated at once
PICTURE_DEPTHS = (0.02, 0.98)  # quantiles of the depths that a depth picture spans


@dataclass(frozen=True)
class RenderedView:
    """What a camera sees of a radiance field.

    Attributes:
        color: (height, width, 3) float32 in the encoding of the photographs, premultiplied by alpha.
        alpha: (height, width) float32.
        depth: (height, width) float32, mean distance along the ray [unit cube] of what it sees; 0 where alpha is 0.
        n_samples: Density evaluations that it took.
    """

    color: np.ndarray
    alpha: np.ndarray
    depth: np.ndarray
    n_samples: int

    def over(self, background: Any) -> np.ndarray:
        """(height, width, 3) colour in front of a background, number or three, clipped to [0, 1]."""
        rest = (1.0 - self.alpha)[:, :, None] * np.asarray(background, np.float32)
        return np.clip(self.color + rest, 0.0, 1.0)


@dataclass(frozen=True)
class TracedView:
    """As `RenderedView`, row by row on the device; the next picture overwrites it.

    Attributes:
        color: (height * width,) vec3. alpha, depth: (height * width,) float.
    """

    color: wp.array
    alpha: wp.array
    depth: wp.array
    n_samples: int


class NerfRenderer:
    """Renders views of one radiance field; working memory is kept between pictures, whatever their size.

    Args:
        field: What to look at, with the parameters its `density_params` and `color_params` name at each call.
        block_rays: Rays worked on at once.
    """

    def __init__(self, field: RadianceField, *, block_rays: int | None = None) -> None:
        self.field, self.device = field, field.device
        n = block_rays or (BLOCK_RAYS if self.device.is_cpu else BLOCK_RAYS_CUDA)
        self.block_rays, self.capacity = n, n * SAMPLES_PER_RAY

        def empty(*shape: int, dtype: Any = float) -> Any:
            return wp.empty(shape, dtype=dtype, device=self.device)

        self._rays = rays = kr.ViewRaysView()
        rays.origin, rays.direction, rays.color = (empty(n, dtype=wp.vec3) for _ in range(3))
        rays.t, rays.t_end, rays.transmittance, rays.shown, rays.distance = (empty(n) for _ in range(5))
        self._ray, self._next_ray, self._alive = (empty(n, dtype=int) for _ in range(3))
        self._n, self._end, self._n_kept, self._end_kept = (empty(n, dtype=int) for _ in range(4))
        self._t, self._weight = empty(self.capacity), empty(self.capacity)
        self._x, self._code = empty(self.capacity, dtype=wp.vec3), empty(self.capacity, N_CODE)
        self._color_x, self._color = empty(self.capacity, N_COLOR_INPUTS), empty(self.capacity, 3)
        self._out_color, self._out_alpha, self._out_depth = empty(0, dtype=wp.vec3), empty(0), empty(0)

    def render(self, camera: Camera, *, crop: tuple[Any, Any] | None = None) -> RenderedView:
        """The view of a camera, block by block of rays.

        Args:
            camera: In unit-cube space; its size is the picture's.
            crop: Lower and upper corner of the part to look at, in unit-cube space; the field's own by default.
        """
        width, height = camera.size
        traced = self.trace(camera, crop=crop)
        # On the CPU these are the arrays themselves, which the next picture overwrites
        color, alpha, depth = (np.array(part.numpy()) for part in (traced.color, traced.alpha, traced.depth))
        shape = (height, width)
        return RenderedView(color.reshape(*shape, 3), alpha.reshape(shape), depth.reshape(shape), traced.n_samples)

    def trace(self, camera: Camera, *, crop: tuple[Any, Any] | None = None) -> TracedView:
        """As `render`, left on the device."""
        width, height = camera.size
        color, alpha, depth = self._outputs(width * height)
        cameras, march = camera.upload(self.device), self.field.march_view(crop)
        n_samples = 0
        for begin in range(0, width * height, self.block_rays):
            n = min(self.block_rays, width * height - begin)
            n_samples += self._trace_block(cameras, march, begin, n, width)
            outputs = [array[begin : begin + n] for array in (color, alpha, depth)]
            launch(kr.finish_view_rays, n, inputs=[self._rays], outputs=outputs, device=self.device)
        return TracedView(color, alpha, depth, n_samples)

    def trace_occupancy(self, camera: Camera, *, crop: tuple[Any, Any] | None = None) -> TracedView:
        """The first occupied cell along each ray, as `render_occupancy` shows it, left on the device."""
        n = camera.size[0] * camera.size[1]
        color, alpha, depth = self._outputs(n)
        launch(
            kr.trace_occupancy,
            n,
            inputs=[camera.upload(self.device), self.field.march_view(crop), 0, camera.size[0]],
            outputs=[color, alpha, depth],
            device=self.device,
            range_size=heavy_range(n),
        )
        return TracedView(color, alpha, depth, 0)

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        return {"radiance field pictures": kr.march_rays}

    def _outputs(self, n: int) -> tuple[wp.array, wp.array, wp.array]:
        """Colour, alpha and depth of `n` pixels."""
        if self._out_alpha.shape[0] < n:
            self._out_color = wp.empty(n, dtype=wp.vec3, device=self.device)
            self._out_alpha, self._out_depth = (wp.empty(n, dtype=float, device=self.device) for _ in range(2))
        return self._out_color[:n], self._out_alpha[:n], self._out_depth[:n]

    def _trace_block(self, cameras: CamerasView, march: Any, begin: int, n: int, width: int) -> int:
        """Leave the sums of `n` pixels in `_rays`; the number of samples taken."""
        rays, device = self._rays, self.device
        launch(
            kr.begin_view_rays,
            n,
            inputs=[cameras, march, 0, begin, width],
            outputs=[rays, self._alive],
            device=device,
            range_size=heavy_range(n),
        )
        n_alive, n_samples = self._gather(None, n), 0
        while n_alive:
            n_samples += self._march_round(march, n_alive)
            n_alive = self._gather(self._ray, n_alive)
        return n_samples

    def _gather(self, ray: wp.array | None, n: int) -> int:
        """Move the rays that `_alive` marks to the front; their number."""
        n_alive = _scan(self._alive, self._end, n)
        launch(
            kr.gather_alive,
            n,
            inputs=[ray, self._alive, self._end],
            outputs=[self._next_ray],
            device=self.device,
        )
        self._ray, self._next_ray = self._next_ray, self._ray
        return n_alive

    def _march_round(self, march: Any, n: int) -> int:
        """A few samples more for each of `n` rays; the number of all."""
        field, rays, device = self.field, self._rays, self.device
        most = min(max(MOST_SAMPLES, min(MOST_SAMPLES_FEW, FEW_SAMPLES // n)), self.capacity // n)
        slots, size = [self._ray, self._n, self._end], heavy_range(n)
        launch(
            kr.march_rays,
            n,
            inputs=[march, most, self._ray],
            outputs=[rays, self._t, self._n],
            device=device,
            range_size=size,
        )
        n_samples = _scan(self._n, self._end, n)
        if n_samples == 0:
            self._alive.zero_()
            return 0
        launch(
            kr.write_positions,
            n,
            inputs=[march, most, self._ray, self._t, self._n, self._end, rays],
            outputs=[self._x],
            device=device,
        )
        field.density.inference(self._x[:n_samples], self._code, params=field.density_params)
        launch(
            kr.weigh_samples,
            n,
            inputs=[march, most, self._ray, self._t, self._n, self._end, self._code],
            outputs=[rays, self._weight, self._n_kept, self._alive],
            device=device,
        )
        n_kept = _scan(self._n_kept, self._end_kept, n)
        if n_kept:
            shared = [*slots, self._end_kept, self._weight]
            launch(kr.write_color_inputs, n, inputs=[*shared, self._code, rays], outputs=[self._color_x], device=device)
            field.color.inference(self._color_x[:n_kept], self._color, params=field.color_params)
            launch(kr.add_colors, n, inputs=[*shared, self._color], outputs=[rays], device=device)
        return n_samples


def render_view(field: RadianceField, camera: Camera, *, crop: tuple[Any, Any] | None = None) -> RenderedView:
    """One view of a radiance field; see `NerfRenderer`, which renders many without allocating anew."""
    n = camera.size[0] * camera.size[1]
    block_rays = BLOCK_RAYS if field.device.is_cpu else BLOCK_RAYS_CUDA
    return NerfRenderer(field, block_rays=min(n, block_rays)).render(camera, crop=crop)


def render_occupancy(field: RadianceField, camera: Camera, crop: tuple[Any, Any] | None = None) -> RenderedView:
    """The first occupied cell along each ray of a camera: its colour tells cascade and face, its depth where it is.

    Arguments as of `NerfRenderer.render`.
    """
    width, height = camera.size
    traced = NerfRenderer(field, block_rays=1).trace_occupancy(camera, crop=crop)
    color, alpha, depth = (part.numpy() for part in (traced.color, traced.alpha, traced.depth))
    shape = (height, width)
    return RenderedView(color.reshape(*shape, 3), alpha.reshape(shape), depth.reshape(shape), traced.n_samples)


def evaluate_views(
    field: RadianceField,
    views: Views,
    *,
    renderer: NerfRenderer | None = None,
    report: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """How well a radiance field predicts photographs.

    Args:
        views: Photographs it was not trained with.
        renderer: One to use; a new one by default.
        report: Called after each view with its index and metrics.

    Returns:
        `psnr` [dB] and `ssim`, means over the views of pictures and photographs composited on white in the photographs'
        own encoding; `psnr_black` [dB], on black, where the views have alpha; `images`: the same for each view, and its
        `name`. Views without alpha fill their frame, and the picture is taken on black.
    """
    renderer = renderer or NerfRenderer(field)
    images = []
    for i, name in enumerate(views.names):
        rendered = renderer.render(views.camera(i))
        row: dict[str, Any] = {"name": name}
        if views.has_alpha:
            row["psnr"] = metrics.psnr(rendered.over(1.0), photograph(views, i, 1.0))
            row["psnr_black"] = metrics.psnr(rendered.over(0.0), photograph(views, i, 0.0))
            row["ssim"] = metrics.ssim(rendered.over(1.0), photograph(views, i, 1.0))
        else:
            row["psnr"] = metrics.psnr(rendered.over(0.0), photograph(views, i, 0.0))
            row["ssim"] = metrics.ssim(rendered.over(0.0), photograph(views, i, 0.0))
        images.append(row)
        if report is not None:
            report(i, row)
    keys = [key for key in ("psnr", "psnr_black", "ssim") if key in images[0]]
    return {**{key: float(np.mean([row[key] for row in images])) for key in keys}, "images": images}


def photograph(views: Views, i: int, background: float) -> np.ndarray:
    """(height, width, 3) float32 photograph in front of a grey background, in its own encoding."""
    image = views.image(i).astype(np.float32) / 255.0
    return image[:, :, :3] * image[:, :, 3:] + background * (1.0 - image[:, :, 3:])


def write_pictures(
    field: RadianceField, views: Views, folder: Path, *, renderer: NerfRenderer | None = None
) -> dict[str, Path]:
    """Pictures to look at: a test view beside its photograph, its depth, and a view from between two cameras.

    Returns:
        Paths of the files `test_view.png` (picture left, photograph right), `depth.png` and `novel_view.png`.
    """
    renderer = renderer or NerfRenderer(field)
    background = 1.0 if views.has_alpha else 0.0
    rendered = renderer.render(views.camera(0))
    beside = np.concatenate([rendered.over(background), photograph(views, 0, background)], axis=1)
    novel = renderer.render(_between_neighbours(views))
    pictures = {
        "test_view": to_bytes(beside),
        "depth": depth_picture(rendered.depth, rendered.alpha),
        "novel_view": to_bytes(novel.over(background)),
    }
    for name, picture in pictures.items():
        write_image(folder / f"{name}.png", picture)
    return {name: folder / f"{name}.png" for name in pictures}


def to_bytes(image: np.ndarray) -> np.ndarray:
    """uint8 pixels of values in [0, 1] that are encoded already."""
    return (255.0 * np.clip(image, 0.0, 1.0) + 0.5).astype(np.uint8)


def depth_picture(depth: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8: near is bright, far is dark, what is not there is black."""
    span = depth_span(depth, alpha)
    if span is None:
        return np.zeros((*depth.shape, 3), np.uint8)
    near, far = span
    grey = 1.0 - 0.9 * np.clip((depth - near) / max(far - near, 1e-9), 0.0, 1.0)
    return np.repeat(to_bytes(grey * alpha)[:, :, None], 3, axis=2)


def depth_span(depth: np.ndarray, alpha: np.ndarray) -> tuple[float, float] | None:
    """The depths that a picture shows brightest and darkest; None where nothing is seen."""
    seen = alpha > 0.5
    if not seen.any():
        return None
    near, far = np.quantile(depth[seen], PICTURE_DEPTHS)
    return float(near), float(far)


def extract_mesh(
    field: RadianceField,
    *,
    resolution: int = 256,
    density: float = -128.0 * float(np.log(1.0 - SURFACE_OPACITY)),
    crop: tuple[Any, Any] | None = None,
) -> Surface:
    """The surface where a radiance field has some density, with the colours seen along its normals.

    Args:
        resolution: Cells along the longest side of the box.
        density: At the surface [1 / unit of the unit cube].
        crop: Lower and upper corner of the box in unit-cube space; the field's own by default.

    Returns:
        Triangles in unit-cube space (`Views.placement` leads back to the data's world); none where nothing is dense.
    """
    march = field.march_view(crop)
    floor = min(float(kr.EMPTY), float(np.log(density)) - 1.0)

    def minus_log_density(points: np.ndarray) -> np.ndarray:
        return -_look(field, march, points, floor)[0]

    surface = extract_surface(
        minus_log_density,
        level=-float(np.log(density)),
        lower=tuple(march.lower),
        upper=tuple(march.upper),
        resolution=resolution,
        device=field.device,
    )
    if not len(surface.faces):
        return surface
    _, code = _look(field, march, surface.vertices, floor, codes=True)
    assert code is not None
    inputs = np.concatenate([code, 0.5 * (1.0 - _vertex_normals(surface))], axis=1).astype(np.float32)
    colors = np.concatenate(
        [
            field.color.inference(inputs[i : i + MESH_POINTS], params=field.color_params).numpy()
            for i in range(0, len(inputs), MESH_POINTS)
        ]
    )
    return Surface(surface.vertices, surface.faces, to_bytes(colors), surface.warnings)


def _look(
    field: RadianceField, march: Any, points: np.ndarray, floor: float, *, codes: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Log density at points, `floor` outside of occupied cells, and with `codes` the density network's outputs."""
    device = field.device
    log_density = np.full(len(points), floor, np.float32)
    all_codes = np.empty((len(points), N_CODE), np.float32) if codes else None
    for begin in range(0, len(points), MESH_POINTS):
        part = np.ascontiguousarray(points[begin : begin + MESH_POINTS], np.float32)
        p: wp.array = wp.array(part, dtype=wp.vec3, device=device)
        x, occupied = wp.empty_like(p), wp.empty(len(part), dtype=int, device=device)
        launch(kr.find_occupied, len(part), inputs=[march, p], outputs=[x, occupied], device=device)
        chosen = np.arange(len(part)) if codes else np.flatnonzero(occupied.numpy())
        if not len(chosen):
            continue
        code = field.density.inference(x.numpy()[chosen], params=field.density_params).numpy()
        log_density[begin + chosen] = np.maximum(code[:, 0], floor)
        if all_codes is not None:
            all_codes[begin + chosen] = code
    return log_density, all_codes


def _vertex_normals(surface: Surface) -> np.ndarray:
    """(n, 3) unit normals, outwards: means over the triangles around, weighted by area."""
    a, b, c = surface.vertices.astype(np.float64)[surface.faces].transpose(1, 0, 2)
    cross = np.cross(b - a, c - a)
    normals = np.stack(
        [
            np.bincount(surface.faces.ravel(), np.repeat(cross[:, k], 3), minlength=len(surface.vertices))
            for k in range(3)
        ],
        axis=1,
    )
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)


def _between_neighbours(views: Views) -> Camera:
    """A camera half way between the first view and the nearest other one that differs; the first if it is alone."""
    first = views.camera(0)
    distance = np.linalg.norm(views.c2w[:, :, 3] - views.c2w[0, :, 3], axis=1)
    others = np.flatnonzero(distance > 1e-4)
    if not len(others):
        return first
    nearest = int(others[np.argmin(distance[others])])
    return Camera(
        between(views.c2w[0], views.c2w[nearest], 0.5),
        first.focal,
        first.center,
        first.size,
        first.model,
        first.distortion,
    )


def _scan(values: wp.array, out: wp.array, n: int) -> int:
    """Inclusive scan of the first n values; their sum, read back."""
    wp.utils.array_scan(values[:n], out[:n], inclusive=True)
    return int(out[n - 1 : n].numpy()[0])
