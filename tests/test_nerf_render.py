"""Pictures of radiance fields: closed forms of simple fields, metrics, camera paths, meshes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warp as wp
from scipy.spatial.transform import Rotation

from nrc.fit.camera_path import CameraPath, between, read_camera_path, write_frames
from nrc.fit.frame import Placement
from nrc.fit.nerf_render import (
    NerfRenderer,
    depth_picture,
    evaluate_views,
    extract_mesh,
    render_occupancy,
    render_view,
    write_pictures,
)
from nrc.fit.radiance_field import crop_box
from nrc.fit.views import Camera, Views
from nrc.image import read_image
from nrc.kernels.nerf import N_CODE, MarchView
from nrc.kernels.occupancy import N_WORDS
from nrc.scene import SceneError

FULL = np.uint64(0xFFFFFFFFFFFFFFFF)


class StubModel:
    """Stands for a `Field`: a NumPy function of the rows."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], device: wp.Device) -> None:
        self.function, self.device, self.params = function, device, None

    def inference(self, x: Any, out: Any = None, *, params: Any = None, count: Any = None) -> wp.array:
        assert count is None
        rows = self.function(np.asarray(x.numpy() if isinstance(x, wp.array) else x, np.float64)).astype(np.float32)
        if out is None:
            return wp.array(rows, dtype=float, device=self.device)
        out[: len(rows)].assign(rows)
        return out


class StubField:
    """Stands for a `RadianceField` on the unit cube: density and colour are functions of position and direction.

    The colour network sees the position through the density network's outputs 1, 2, 3.
    """

    def __init__(
        self,
        device: wp.Device,
        density: Callable[[np.ndarray], np.ndarray],
        color: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda p, d: np.full((len(p), 3), 0.5),
        bits: np.ndarray | None = None,
        step: float = 1.0 / 1024.0,
    ) -> None:
        def code(x: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore"):
                log_density = np.log(density(x))
            return np.concatenate([np.maximum(log_density, -50.0)[:, None], x, np.zeros((len(x), N_CODE - 4))], axis=1)

        def shade(rows: np.ndarray) -> np.ndarray:
            return color(rows[:, 1:4], 2.0 * rows[:, N_CODE:] - 1.0)

        self.device, self.step = device, step
        self.density, self.color = StubModel(code, device), StubModel(shade, device)
        self.density_params = self.color_params = None
        self.bits = wp.array(np.full(N_WORDS, FULL) if bits is None else bits, dtype=wp.uint64, device=device)

    def march_view(self, crop: Any = None) -> Any:
        view = MarchView()
        view.bits, view.n_cascades = self.bits, 1
        box = crop_box(np.array([[0.0] * 3, [1.0] * 3]), crop)
        view.lower, view.upper, view.scene_lower = wp.vec3(*box[0]), wp.vec3(*box[1]), wp.vec3(0.0)
        view.inverse_size, view.near, view.cone = 1.0, 0.0, 0.0
        view.min_step = view.max_step = self.step
        return view


def camera_along_z(width: int = 24, height: int = 16, fov: float = 0.4) -> Camera:
    """A camera at (0.5, 0.5, 2.5) that looks along -z at the cube."""
    return Camera.from_fov(np.array([[1, 0, 0, 0.5], [0, 1, 0, 0.5], [0, 0, 1, 2.5]], np.float64), width, height, fov)


def slant(camera: Camera) -> np.ndarray:
    """(height, width): length of a ray per unit of depth."""
    x, y = (np.arange(n) + 0.5 - 0.5 * n for n in camera.size)
    return np.sqrt(1.0 + (x / camera.focal[0]) ** 2 + (y[:, None] / camera.focal[1]) ** 2)


@pytest.mark.parametrize("sigma", [0.02, 0.7, 5.0])
def test_render_slab_has_the_closed_form(sigma: float, device: wp.Device) -> None:
    """Constant density between two planes: alpha = 1 - exp(-sigma length), colour, and mean depth."""
    field = StubField(device, lambda x: np.where((x[:, 2] > 0.25) & (x[:, 2] < 0.75), sigma, 0.0))
    camera = camera_along_z()
    seen = render_view(field, camera)  # type: ignore[arg-type]
    length = 0.5 * slant(camera)
    alpha = 1.0 - np.exp(-sigma * length)
    tolerance = 1.5 * sigma * field.step  # of a step more or less
    np.testing.assert_allclose(seen.alpha, alpha, atol=tolerance)
    np.testing.assert_allclose(seen.color, np.repeat(0.5 * seen.alpha[:, :, None], 3, axis=2), rtol=1e-5)
    # Mean distance: the integral of t sigma exp(-sigma (t - t0)) from t0 = 1.75 to the other side
    depth = 1.75 * slant(camera) + 1.0 / sigma - length * (1.0 - alpha) / alpha
    np.testing.assert_allclose(seen.depth, depth, atol=2.0 * field.step)
    np.testing.assert_allclose(seen.over((1.0, 0.0, 1.0))[..., 0], 0.5 * seen.alpha + 1.0 - seen.alpha, atol=1e-5)


def test_render_composites_front_to_back(device: wp.Device) -> None:
    """A red half-transparent slab in front of a green opaque one: the volume rendering integral, term by term."""
    front = (0.6, 0.8)

    def density(x: np.ndarray) -> np.ndarray:
        return np.where((x[:, 2] > front[0]) & (x[:, 2] < front[1]), 4.0, np.where(x[:, 2] < 0.3, 1e4, 0.0))

    def color(p: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.where(p[:, 2:] > 0.5, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])

    field, camera = StubField(device, density, color), camera_along_z()
    seen = render_view(field, camera)  # type: ignore[arg-type]
    through = np.exp(-4.0 * 0.2 * slant(camera))
    np.testing.assert_allclose(seen.color[..., 0], 1.0 - through, atol=4.0 * 1.5 * field.step)
    np.testing.assert_allclose(seen.color[..., 1], through, atol=4.0 * 1.5 * field.step)
    np.testing.assert_array_equal(seen.alpha, 1.0)  # a ray that stopped sees no background


def test_render_passes_directions_to_the_color_network(device: wp.Device) -> None:
    """Colours are those of the ray's direction, mapped to [0, 1]."""
    field = StubField(device, lambda x: np.full(len(x), 1e5), lambda p, d: 0.5 + 0.5 * d)
    camera = camera_along_z()
    seen = render_view(field, camera)  # type: ignore[arg-type]
    x, y = np.meshgrid(*(np.arange(n) + 0.5 - 0.5 * n for n in camera.size))
    d = np.stack([x / camera.focal[0], -y / camera.focal[1], np.full_like(x, -1.0)], axis=2)
    d /= np.linalg.norm(d, axis=2, keepdims=True)
    np.testing.assert_allclose(seen.color, 0.5 + 0.5 * d, atol=1e-5)


def test_render_skips_empty_cells_and_the_crop(device: wp.Device) -> None:
    """Nothing is seen in cells whose bits are 0, nor outside of the crop; the number of samples says so."""
    bits = np.zeros(N_WORDS, np.uint64)
    bits[: N_WORDS // 8] = FULL  # Morton order: the octant below 0.5
    field, camera = StubField(device, lambda x: np.full(len(x), 50.0), bits=bits), camera_along_z(32, 32, 0.5)
    seen = render_view(field, camera)  # type: ignore[arg-type]
    width = 16  # of a quarter of the picture
    assert (seen.alpha[:width, :] == 0.0).all() and (seen.alpha[:, width:] == 0.0).all()
    assert (seen.depth[:width, :] == 0.0).all()
    assert (seen.alpha[width:, :width] > 0.0).any()
    cropped = render_view(field, camera, crop=((0.0, 0.0, 0.0), (1.0, 0.25, 1.0)))  # type: ignore[arg-type]
    assert 0 < (cropped.alpha > 0.0).sum() < (seen.alpha > 0.0).sum()
    assert 0 < cropped.n_samples < seen.n_samples
    nothing = render_view(field, camera, crop=((0.6, 0.6, 0.6), (1.0, 1.0, 1.0)))  # type: ignore[arg-type]
    assert nothing.n_samples == 0 and (nothing.alpha == 0.0).all() and (nothing.color == 0.0).all()


def test_render_does_not_depend_on_the_blocks(device: wp.Device) -> None:
    """Blocks of 7 and of 384 rays, with more rounds each: the same picture, bit for bit."""

    def density(x: np.ndarray) -> np.ndarray:
        return 30.0 * (1.0 + np.sin(40.0 * x).prod(axis=1))

    field, camera = StubField(device, density, lambda p, d: p, step=1.0 / 128.0), camera_along_z()
    one = NerfRenderer(field, block_rays=384).render(camera)  # type: ignore[arg-type]
    other = NerfRenderer(field, block_rays=7).render(camera)  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.color, other.color)
    np.testing.assert_array_equal(one.depth, other.depth)


def ball(x: np.ndarray) -> np.ndarray:
    """Density of a solid ball of radius 0.3 around the middle, with a smooth rim."""
    distance = np.linalg.norm(x - 0.5, axis=1)
    return 2000.0 / (1.0 + np.exp(np.clip((distance - 0.3) * 200.0, -60.0, 60.0)))


def photographs(device: wp.Device, *, alpha: bool) -> tuple[StubField, Views]:
    """A ball and three photographs of it, which the renderer itself took and rounded to bytes."""
    field = StubField(device, ball, lambda p, d: np.clip(2.0 * p - 0.5, 0.0, 1.0), step=1.0 / 256.0)
    c2w, pixels = [], []
    for a in (0.0, 0.3, 2.0):
        c, s = math.cos(a), math.sin(a)
        pose = np.array([[-s, 0.0, c, 0.5 + 1.3 * c], [c, 0.0, s, 0.5 + 1.3 * s], [0.0, 1.0, 0.0, 0.5]])
        seen = render_view(field, Camera.from_fov(pose, 32, 24, 0.6))  # type: ignore[arg-type]
        straight = seen.color / np.maximum(seen.alpha, 1e-6)[:, :, None] if alpha else seen.over(0.0)
        opacity = seen.alpha if alpha else np.ones_like(seen.alpha)
        image = np.concatenate([straight, opacity[:, :, None]], axis=2)
        pixels.append((255.0 * np.clip(image, 0.0, 1.0) + 0.5).astype(np.uint8).view(np.uint32).ravel())
        c2w.append(pose)
    camera = Camera.from_fov(c2w[0], 32, 24, 0.6)
    views = Views(
        names=("a", "b", "c"),
        pixels=np.concatenate(pixels),
        first_pixel=np.arange(3) * 32 * 24,
        sizes=np.array([[32, 24]] * 3, np.int32),
        has_alpha=alpha,
        c2w=np.stack(c2w).astype(np.float32),
        focal=np.array([camera.focal] * 3, np.float32),
        center=np.array([camera.center] * 3, np.float32),
        distortion=np.zeros((3, 6), np.float32),
        model=np.zeros(3, np.int32),
        aabb_scale=1,
        scale=1.0,
        offset=np.zeros(3),
        rotation=np.eye(3),
        warnings=(),
    )
    return field, views


@pytest.mark.parametrize("alpha", [True, False])
def test_evaluate_views_measures_rounding_alone_for_its_own_pictures(alpha: bool, device: wp.Device) -> None:
    """PSNR of bytes against what they were rounded from is at least that of uniform rounding; SSIM is 1."""
    field, views = photographs(device, alpha=alpha)
    reports: list[int] = []
    result = evaluate_views(field, views, report=lambda i, row: reports.append(i))  # type: ignore[arg-type]
    keys = {"psnr", "psnr_black", "ssim", "images"} if alpha else {"psnr", "ssim", "images"}
    assert result.keys() == keys and reports == [0, 1, 2]
    assert [row["name"] for row in result["images"]] == ["a", "b", "c"]
    rounding = 10.0 * math.log10(12.0 * 255.0**2)  # 58.9 dB
    for key in keys - {"images", "ssim"}:
        assert min(row[key] for row in result["images"]) > rounding - 1.0
        np.testing.assert_allclose(result[key], np.mean([row[key] for row in result["images"]]))
    assert result["ssim"] > 0.999


def test_evaluate_views_separates_white_from_black(device: wp.Device) -> None:
    """Where a photograph is transparent and the field opaque black, the error shows on white alone."""
    field, views = photographs(device, alpha=True)
    field = StubField(device, lambda x: np.full(len(x), 1e4), lambda p, d: np.zeros((len(p), 3)), step=1.0 / 64.0)
    views.pixels[:] = 0
    result = evaluate_views(field, views)  # type: ignore[arg-type]
    assert math.isinf(result["psnr_black"]) and result["psnr"] < 10.0


def test_write_pictures_are_what_they_say(tmp_path: Path, device: wp.Device) -> None:
    """Picture and photograph side by side agree; depth is brightest at the ball's middle; the novel view differs."""
    field, views = photographs(device, alpha=True)
    paths = write_pictures(field, views, tmp_path)  # type: ignore[arg-type]
    assert set(paths) == {"test_view", "depth", "novel_view"}
    beside = read_image(paths["test_view"]).astype(int)
    assert beside.shape == (24, 64, 3)
    assert np.abs(beside[:, :32] - beside[:, 32:]).max() <= 2
    depth = read_image(paths["depth"])
    assert depth.shape == (24, 32, 3) and depth[12, 16, 0] > 230 and depth[0, 0, 0] == 0
    novel = read_image(paths["novel_view"]).astype(int)
    assert novel.shape == (24, 32, 3) and np.abs(novel - beside[:, :32]).max() > 10


@pytest.mark.parametrize("aabb_scale", [1, 4])
def test_occupancy_shows_the_first_cell_of_each_ray(aabb_scale: int, device: wp.Device) -> None:
    """Depth, face and cascade are those of the first occupied interval between a ray's crossings of all grid planes."""
    n_cascades = (aabb_scale - 1).bit_length() + 1
    rng = np.random.default_rng(3)
    words = rng.integers(0, 2**64, n_cascades * N_WORDS, np.uint64)
    bits = np.where(rng.random(len(words)) < 0.01, words, np.uint64(0))
    low = 0.5 - 0.5 * aabb_scale

    class Cells(StubField):
        def march_view(self, crop: Any = None) -> Any:
            view = super().march_view()
            view.n_cascades, view.scene_lower, view.inverse_size = n_cascades, wp.vec3(low), 1.0 / aabb_scale
            box = crop_box(np.array([[low] * 3, [low + aabb_scale] * 3]), crop)
            view.lower, view.upper = wp.vec3(*box[0]), wp.vec3(*box[1])
            return view

    field = Cells(device, lambda x: np.zeros(len(x)), bits=bits)
    eye, (width, height) = np.array([0.3, 0.45, 0.5 + 0.8 * aabb_scale]), (20, 15)
    turn = Rotation.from_euler("xyz", [0.21, 0.13, 0.3]).as_matrix()
    camera = Camera.from_fov(np.concatenate([turn, eye[:, None]], axis=1), width, height, 0.8)
    crop = ((low + 0.1, low, low), (low + aabb_scale,) * 3)
    seen = render_occupancy(field, camera, crop)  # type: ignore[arg-type]
    n_hit = n_same = 0
    cascades, faces = set(), set()
    for row in range(height):
        for column in range(width):
            x, y = (column + 0.5 - 0.5 * width) / camera.focal[0], (0.5 * height - row - 0.5) / camera.focal[1]
            d = turn @ (np.array([x, y, -1.0]) / np.linalg.norm([x, y, -1.0]))
            depth, cascade, face, chess = first_cell(bits, n_cascades, eye, d, np.array(crop))
            n_hit += cascade >= 0
            alpha = float(seen.alpha[row, column])
            if (alpha > 0.5) != (cascade >= 0) or abs(seen.depth[row, column] - depth) > 1e-3:
                continue  # a corner cut, see below
            if cascade >= 0:
                cascades.add(cascade)
                faces.add(face)
                base = [(0.75, 0.79, 0.85), (0.95, 0.68, 0.35), (0.45, 0.75, 0.50)][cascade]
                light = {0: 0.66, 1: 0.82, 2: 1.0}[face] * (0.9 if chess else 1.0)
                n_same += bool(np.abs(seen.color[row, column] - light * np.array(base)).max() < 1e-5)
            else:
                n_same += bool((seen.color[row, column] == 0.0).all())
    assert n_hit > 50 and len(cascades) == n_cascades and len(faces) >= 2
    # Rays go on 1e-4 of a cell behind each exit: corners closer than that are cut
    assert n_same >= 0.99 * width * height


def first_cell(
    bits: np.ndarray, n_cascades: int, o: np.ndarray, d: np.ndarray, box: np.ndarray
) -> tuple[float, int, int, int]:
    """Distance, cascade, face and chessboard colour of the first occupied cell; (0, -1, -1, 0) where there is none."""
    slabs = np.sort((box - o) / d, axis=0)
    enter, leave = max(0.0, slabs[0].max()), slabs[1].min()
    if enter >= leave:
        return 0.0, -1, -1, 0
    crossings, axes = [np.array([enter])], [np.array([slabs[0].argmax()])]
    for cascade in range(n_cascades):
        planes = (np.arange(129) / 128.0 - 0.5) * 2.0**cascade + 0.5
        for axis in range(3):
            crossings.append((planes - o[axis]) / d[axis])
            axes.append(np.full(129, axis))
    t, axis_of = np.concatenate(crossings), np.concatenate(axes)
    inside = (t >= enter) & (t < leave)
    order = np.argsort(t[inside], kind="stable")
    t, axis_of = t[inside][order], axis_of[inside][order]
    ends = np.append(t[1:], leave)
    for begin, end, face in zip(t, ends, axis_of, strict=True):
        if end - begin < 1e-9:
            continue
        p = o + 0.5 * (begin + end) * d - 0.5
        cascade = max(0, math.ceil(math.log2(2.0 * np.abs(p).max())))
        x, y, z = (int(c) for c in np.floor(p / 2.0**cascade * 128.0 + 64.0))
        word = sum(((c >> 2 >> k) & 1) << (3 * k + a) for a, c in enumerate((x, y, z)) for k in range(5))
        bit = sum(((c >> k) & 1) << (3 * k + a) for a, c in enumerate((x, y, z)) for k in range(2))
        if int(bits[cascade * N_WORDS + word]) >> bit & 1:
            return float(begin), cascade, int(face), (x + y + z) & 1
    return 0.0, -1, -1, 0


def test_depth_picture_of_nothing_is_black() -> None:
    """No pixel is opaque enough to have a depth."""
    assert not depth_picture(np.zeros((2, 3)), np.zeros((2, 3))).any()


def test_extract_mesh_of_a_ball_has_its_surface_and_colors(device: wp.Device) -> None:
    """Vertices at the radius where the rim has the density, colours of the function; nothing where nothing is."""
    field = StubField(device, ball, lambda p, d: np.clip(0.5 - 0.5 * d, 0.0, 1.0))
    mesh = extract_mesh(field, resolution=64, density=1000.0)  # type: ignore[arg-type]
    radii = np.linalg.norm(mesh.vertices - 0.5, axis=1)
    np.testing.assert_allclose(radii, 0.3, atol=4e-3)  # a quarter of a cell: the rim is curved in between
    assert mesh.volume == pytest.approx(4.0 / 3.0 * math.pi * 0.3**3, rel=0.02)
    assert mesh.colors is not None
    normals = (mesh.vertices - 0.5) / radii[:, None]  # seen along -n, the colour is (1 + n) / 2
    assert np.abs(mesh.colors[:, :3] / 255.0 - (0.5 + 0.5 * normals)).max() < 0.1
    empty = extract_mesh(field, resolution=16, crop=((0.0, 0.0, 0.0), (0.1, 0.1, 0.1)))  # type: ignore[arg-type]
    assert len(empty.faces) == 0


# Camera paths


def pose(angle: float, position: tuple[float, float, float]) -> np.ndarray:
    """A pose turned about z."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0, position[0]], [s, c, 0.0, position[1]], [0.0, 0.0, 1.0, position[2]]])


def test_camera_path_passes_through_its_keyframes() -> None:
    """At the keyframes' times, and clamped before the first and behind the last; velocity is continuous."""
    times = np.array([0.0, 1.0, 3.0, 3.5])
    poses = np.stack([pose(a, p) for a, p in zip(times, [(0, 0, 0), (1, 2, 0), (3, 1, 1), (4, 4, 4)], strict=True)])
    path = CameraPath(times, poses, np.radians([40.0, 50.0, 60.0, 30.0]))
    for i, time in enumerate(times):
        camera = path.camera(time, 80, 60)
        np.testing.assert_allclose(camera.c2w, poses[i], atol=1e-12)
        assert camera.focal[0] == pytest.approx(40.0 / math.tan(0.5 * path.fov[i]))
    np.testing.assert_allclose(path.camera(-5.0, 8, 6).c2w, poses[0], atol=1e-12)
    np.testing.assert_allclose(path.camera(99.0, 8, 6).c2w, poses[3], atol=1e-12)
    h = 1e-5
    for time in times[1:-1]:
        before, at, after = (path.camera(time + k * h, 8, 6).c2w[:, 3] for k in (-1, 0, 1))
        np.testing.assert_allclose((at - before) / h, (after - at) / h, atol=1e-3)
    cameras = path.cameras(8, 80, 60)
    assert len(cameras) == 8 and cameras[0].size == (80, 60)
    np.testing.assert_allclose(cameras[-1].c2w, poses[3], atol=1e-12)


def test_camera_path_is_straight_and_even_where_keyframes_are() -> None:
    """Keyframes on a line at constant speed and turn: so is the path between them."""
    times = np.array([0.0, 1.0, 2.5, 3.0])
    path = CameraPath(times, np.stack([pose(0.4 * t, (t, 2 * t, 0)) for t in times]), np.full(4, 0.8))
    for time in np.linspace(0.0, 3.0, 13):
        np.testing.assert_allclose(path.camera(time, 8, 6).c2w, pose(0.4 * time, (time, 2 * time, 0)), atol=1e-9)
    np.testing.assert_allclose(between(pose(0.0, (0, 0, 0)), pose(1.0, (2, 4, 0)), 0.25), pose(0.25, (0.5, 1, 0)))


def test_read_camera_path_reads_its_three_formats(tmp_path: Path) -> None:
    """One pose, written in each format, comes out the same in the unit cube."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn *= np.linalg.det(turn)
    placement = Placement(0.33)
    world = np.concatenate([turn, rng.normal(size=(3, 1))], axis=1)
    expected = placement.apply(world)
    square = np.concatenate([world, [[0.0, 0.0, 0.0, 1.0]]])
    # instant-ngp: y and z flipped, axes y, z, x of the world
    ngp = (expected * (1.0, -1.0, -1.0, 1.0))[[1, 2, 0]]
    quaternion = Rotation.from_matrix(ngp[:, :3]).as_quat()
    frame = {"R": quaternion.tolist(), "T": ngp[:, 3].tolist(), "fov": 40.0, "slice": 0.0, "scale": 1.0}
    files = {
        "own": {"keyframes": [{"transform_matrix": square.tolist(), "fov": 40.0, "time": 2.0}]},
        "list": [{"transform_matrix": square.tolist(), "fov": 40.0}],
        "ngp": {"path": [frame, frame], "time": 0.5},
        "studio": {"camera_path": [{"camera_to_world": square.ravel().tolist(), "fov": 40.0, "aspect": 1.0}]},
    }
    for name, content in files.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        path = read_camera_path(file, placement)
        np.testing.assert_allclose(path.c2w[0], expected, atol=1e-6)
        camera = path.camera(0.0, 80, 60)
        side = 40.0 if name in ("own", "list") else 30.0  # across the width; instant-ngp and nerfstudio: the height
        assert camera.focal[0] == pytest.approx(side / math.tan(math.radians(20.0)))
    turned = Placement(2.0, (1.0, 2.0, 3.0), turn)
    moved = read_camera_path(tmp_path / "own.json", turned).c2w[0]
    np.testing.assert_allclose(moved[:, :3], turn @ world[:, :3], atol=1e-9)
    np.testing.assert_allclose(turned.to_world(moved[None, :, 3]), world[None, :, 3], atol=1e-9)


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "holds no keyframes, path"),
        ({"keyframes": []}, "keyframes: is empty"),
        ({"keyframes": [{}]}, r"keyframes\[0\]: transform_matrix is missing"),
        (
            {"keyframes": [{"transform_matrix": np.zeros((4, 4)).tolist()}]},
            r"keyframes\[0\]\.transform_matrix: is not inv",
        ),
        (
            {"keyframes": [{"transform_matrix": np.eye(4).tolist(), "fov": 0}]},
            r"keyframes\[0\]\.fov: expected a number bet",
        ),
        (
            {"keyframes": [{"transform_matrix": np.eye(4).tolist(), "time": 0}] * 2},
            r"keyframes\[1\]: its time does not",
        ),
        ({"path": [{"R": [0, 0, 0, 0], "T": [0, 0, 0]}]}, r"path\[0\]\.R: expected a quaternion"),
        ({"camera_path": [{"camera_to_world": [1, 2]}]}, r"camera_path\[0\]\.camera_to_world: expected 16 numbers"),
    ],
)
def test_read_camera_path_names_the_wrong_field(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line with the file and the field."""
    file = tmp_path / "path.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SceneError, match=message) as caught:
        read_camera_path(file, Placement(1.0))
    assert "path.json" in str(caught.value) and "\n" not in str(caught.value)


def test_write_frames_numbers_its_pictures(tmp_path: Path, device: wp.Device) -> None:
    """One PNG per camera, in order, of what was rendered."""
    field = StubField(device, ball, lambda p, d: p, step=1.0 / 64.0)
    renderer = NerfRenderer(field, block_rays=64)  # type: ignore[arg-type]
    cameras = [camera_along_z(8, 6, fov) for fov in (0.4, 0.5, 0.6)]

    def picture(camera: Camera) -> np.ndarray:
        return (255.0 * renderer.render(camera).over(1.0) + 0.5).astype(np.uint8)

    paths = write_frames(cameras, picture, tmp_path / "frames")
    assert [path.name for path in paths] == ["frame_0000.png", "frame_0001.png", "frame_0002.png"]
    for camera, path in zip(cameras, paths, strict=True):
        np.testing.assert_array_equal(read_image(path), picture(camera))
