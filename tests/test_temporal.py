"""Temporal accumulation against closed forms and a NumPy twin: means, reprojection, motion, changed light, cuts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import warp as wp
from small_scenes import floor, moved, rectangle, shape

from nrc import launch
from nrc.assets import shapes
from nrc.device_scene import DeviceScene
from nrc.kernels.temporal import RESTART_FRAMES
from nrc.scene import Camera, Environment, Instance, Material, Scene
from nrc.temporal import TemporalAccumulation, TemporalConfig

DEVICE = "cpu"
GREY = Material(base_color=(0.5, 0.5, 0.5), two_sided=True)
RED = Material(base_color=(0.8, 0.1, 0.05), two_sided=True)
SKY = Environment.constant((1.0, 1.0, 1.0))
STEADY = TemporalConfig(t_drop=math.inf)  # no test for changed light: for frames that are made up
PROJECTION = 0.1  # [px] how far off a reprojected point may be, the bound
EXACT = 1e-5  # single against double precision, for values around 1


def colours(values: np.ndarray) -> wp.array:
    """(h, w, 3) or (h, w) as a picture on the device."""
    values = np.asarray(values, np.float32)
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    return wp.array(values.reshape(-1, 3), dtype=wp.vec3, device=DEVICE)


class Film:
    """A `TemporalAccumulation` that speaks (h, w, 3) arrays and host cameras."""

    def __init__(self, width: int, height: int, config: TemporalConfig = STEADY) -> None:
        self.shape = height, width
        self.accumulation = TemporalAccumulation(width, height, DEVICE, config)

    def add(self, values: np.ndarray | float, scene: DeviceScene, camera: Camera | None = None) -> np.ndarray:
        height, width = self.shape
        values = np.full(self.shape, values, np.float32) if np.isscalar(values) else values
        picture = self.accumulation.add(colours(values), scene, scene.camera_view(width, height, camera))
        return picture.numpy().reshape(height, width, 3).copy()

    @property
    def length(self) -> np.ndarray:
        return self.accumulation.history_length.numpy().reshape(self.shape).copy()


def scene_of(*meshes, materials: tuple[Material, ...] = (GREY, RED), camera: Camera | None = None) -> DeviceScene:
    camera = camera or Camera.look_at((0, 0, 4), (0, 0, 0), fov=50.0)
    return DeviceScene(Scene(meshes, materials, camera, environment=SKY), DEVICE)


def wall(z: float = 0.0, half: float = 10.0, material: int = 0, x: float = 0.0):
    """Square that faces +z."""
    return rectangle(material, (x, 0, z), (half, 0, 0), (0, half, 0))


def ball(x: float = 0.0, z: float = 1.0, material: int = 1):
    return shape(shapes.sphere(16, 32), material, moved((x, 0.0, z), 0.6))


def noise(seed: int, height: int, width: int, *, heavy: bool = True) -> np.ndarray:
    """Frames of a path tracer's kind: mean 1, mostly dark, sometimes far too bright."""
    rng = np.random.default_rng(seed)
    return (
        rng.exponential(1.0, (height, width)) ** 2 / 2.0 if heavy else 1.0 + 0.1 * rng.standard_normal((height, width))
    )


# --- one view --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(16, 9), (1, 1), (7, 13), (33, 2)])
def test_still_frames_are_averaged(width, height):
    """The plain mean of the first 1 / min_alpha frames, an exponential one from then on, for any size."""
    film, scene = Film(width, height, replace(STEADY, min_alpha=1 / 8)), scene_of(wall(), ball())
    expected = np.zeros((height, width))
    for k in range(20):
        frame = noise(k, height, width)
        expected += (frame - expected) / min(k + 1, 8)
        picture = film.add(frame, scene)
        assert np.allclose(picture, expected[..., None], rtol=EXACT, atol=EXACT)
        assert (film.length == min(k + 1, 8)).all()
    assert film.accumulation.rejected_fraction() == 0.0


def test_a_scene_uploaded_again_changes_nothing():
    """Other lights in the same geometry: every pixel finds itself, up to rounding of its position."""
    meshes = wall(), ball()
    first = scene_of(*meshes)
    again = first.replaced(replace(first.scene, environment=Environment.constant((2.0, 2.0, 2.0))))
    film, kept = Film(24, 16), Film(24, 16)
    for k in range(6):
        frame = noise(k, 16, 24)
        moving, still = film.add(frame, (first, again)[k % 2]), kept.add(frame, first)
    assert np.abs(moving / still - 1.0).max() < 1e-2 and (film.length > 5.99).all()


def test_invalid_pixels_count_as_not_seen():
    """NaN, infinite and negative colours leave the history as it is, and black where there is none."""
    film, scene = Film(8, 8), scene_of(wall())
    bad = np.ones((8, 8, 3), np.float32)
    bad[0, 0], bad[3, 4, 1], bad[7, 7, 2] = math.nan, math.inf, -1.0
    places = ([0, 3, 7], [0, 4, 7])
    assert (film.add(bad, scene)[places] == 0.0).all()
    film.accumulation.reset()
    film.add(3.0, scene)
    picture = film.add(bad, scene)
    assert np.allclose(picture[places], 3.0) and np.allclose(picture[1, 1], 2.0)


# --- a moving camera -------------------------------------------------------------------------------------------------


def panned(shift: float, distance: float = 4.0) -> Camera:
    """Looks at the wall z = 0 straight on, moved sideways."""
    return Camera.look_at((shift, 0, distance), (shift, 0, 0), fov=50.0)


def gathered(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear lookup at positions [px], in double precision; NaN where a tap is outside."""
    height, width = picture.shape
    x, y = x - 0.5, y - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    out = np.zeros(x.shape)
    for dx in (0, 1):
        for dy in (0, 1):
            c, r = x0 + dx, y0 + dy
            inside = (c >= 0) & (r >= 0) & (c < width) & (r < height)
            w = (1 - np.abs(x - c)) * (1 - np.abs(y - r))
            out += w * np.where(inside, picture[r.clip(0, height - 1), c.clip(0, width - 1)], math.nan)
    return out


@pytest.mark.parametrize("step", [0.031, -0.2, 0.4])
def test_pan_over_a_wall_is_the_twins(step):
    """Several frames of a pan: the picture of a NumPy twin that knows the shift in closed form."""
    width, height, n = 40, 24, 6
    film, scene = Film(width, height), scene_of(wall())
    pixels_per_unit = 0.5 * width / (math.tan(math.radians(25.0)) * 4.0)
    ys, xs = np.mgrid[:height, :width] + 0.5
    expected = None
    for k in range(n):
        frame = noise(k, height, width, heavy=False)
        picture = film.add(frame, scene, panned(k * step))[..., 0]
        if expected is not None:
            history = gathered(expected, xs + step * pixels_per_unit, ys)
            known = np.isfinite(history)
            frame = np.where(known, history + (frame - history) / (k + 1), math.nan)
        expected = frame
        known = np.isfinite(expected)
        assert known.mean() > 0.2
        assert np.abs(picture - expected)[known].max() < 1e-4


@pytest.mark.parametrize("angle", [0.7, 7.0])
def test_reprojection_is_exact(angle):
    """A turned and moved camera: a history that holds its own pixel coordinates comes back as the closed form's."""
    width, height = 48, 30
    scene = scene_of(wall(), wall(1.0, 0.8, 1))
    before = Camera.look_at((0, 0, 4), (0, 0, 0), fov=50.0)
    turn = math.radians(angle)
    after = Camera.look_at((0.3, 0.1, 3.7), (0.3 + 4 * math.sin(turn), -0.1, 3.7 - 4 * math.cos(turn)), fov=50.0)
    ys, xs = np.mgrid[:height, :width] + 0.5
    film = Film(width, height)
    film.add(np.stack([xs, ys, np.ones_like(xs)], axis=2), scene, before)
    # With nothing new (an invalid frame) the picture is the history.
    picture = film.add(np.full((height, width), math.nan), scene, after)

    half = math.tan(math.radians(25.0))
    forward, right, up = -after.to_world[:3, 2], after.to_world[:3, 0], after.to_world[:3, 1]
    d = forward + ((2 * xs / width - 1) * half)[..., None] * right
    d = d + ((1 - 2 * ys / height) * half * height / width)[..., None] * up
    origin = after.to_world[:3, 3]
    near, far = (origin + ((z - origin[2]) / d[..., 2])[..., None] * d for z in (1.0, 0.0))
    on_near = (np.abs(near[..., :2]) <= 0.8).all(axis=2)
    p = np.where(on_near[..., None], near, far)
    depth = 4.0 - p[..., 2]
    x = width / 2 * (1 + p[..., 0] / (depth * half))
    y = height / 2 - width / 2 * p[..., 1] / (depth * half)
    # Taps on one surface alone interpolate coordinates exactly.
    inner = (film.length > 1.0 - 1e-6) & (np.abs(picture[..., 2] - 1.0) < 1e-6)
    for surface in (on_near & (np.abs(near[..., :2]) <= 0.7).all(axis=2), ~on_near & (np.abs(p[..., 0]) > 1.2)):
        inside = surface & inner & (x > 1) & (y > 1) & (x < width - 1) & (y < height - 1)
        assert inside.sum() > 50
        assert np.abs(picture[..., 0] - x)[inside].max() < PROJECTION
        assert np.abs(picture[..., 1] - y)[inside].max() < PROJECTION


def test_disoccluded_pixels_start_over():
    """Two planes in closed form: what the near one hid a frame ago has no history, all else that was in view has."""
    width, height, step = 120, 8, 0.5
    near_z, far_z, half = 2.0, -2.0, 0.5
    scene = scene_of(wall(far_z), wall(near_z, half, 1))
    film = Film(width, height)
    film.add(1.0, scene, panned(0.0))
    film.add(1.0, scene, panned(step))
    tangent = math.tan(math.radians(25.0))
    xs = np.arange(width) + 0.5
    slope = (2 * xs / width - 1) * tangent  # of the rays
    at_near = step + slope * (4 - near_z)
    at_far = step + slope * (4 - far_z)
    is_near = np.abs(at_near) < half
    hidden = ~is_near & (np.abs(at_far * (4 - near_z) / (4 - far_z)) < half)
    seen_at = width / 2 * (1 + np.where(is_near, at_near / (4 - near_z), at_far / (4 - far_z)) / tangent)
    outside = (seen_at < 0) | (seen_at > width)
    lost = film.length[height // 2] <= 1.0
    expected = hidden | outside
    # Within a pixel of an edge the taps decide.
    edge = np.zeros(width, bool)
    for i in np.flatnonzero(np.diff(expected.astype(int))):
        edge[i : i + 2] = True
    assert hidden.sum() > 5 and outside.sum() > 5
    assert np.array_equal(lost[~edge], expected[~edge])
    assert abs(film.accumulation.rejected_fraction() - expected.mean()) < 0.06


def test_sky_follows_the_cameras_rotation():
    """Where nothing is hit, directions are looked up: a moved camera keeps all of them, a turned one a known part."""
    width, height = 64, 8
    scene = scene_of(wall(-50.0, 0.1))
    film = Film(width, height)
    away = Camera.look_at((0, 0, 4), (0, 0, 8), fov=50.0)
    film.add(1.0, scene, away)
    film.add(1.0, scene, replace(away, to_world=moved((30, 2, 0)) @ away.to_world))
    assert (film.length > 1.99).all()
    turned = Camera.look_at((30, 2, 4), (30 - 4 * math.sin(0.2), 2, 4 + 4 * math.cos(0.2)), fov=50.0)
    film.add(1.0, scene, turned)
    assert film.length.min() == 1.0
    kept = (film.length > 2.0)[height // 2].mean()
    half = math.tan(math.radians(25.0))
    expected = 0.5 + math.tan(math.radians(25.0) - 0.2) / (2 * half)
    assert abs(kept - expected) < 1.5 / width


def covered(shift: float, half: float, width: int, height: int) -> np.ndarray:
    """(h, w) part of each pixel of `panned(shift)` that the square of z = 0 around the origin covers."""
    scale = 0.5 * width / (math.tan(math.radians(25.0)) * 4.0)  # pixels per unit

    def overlap(n: int, middle: float) -> np.ndarray:
        first = np.arange(n)
        return (np.minimum(first + 1, middle + half * scale) - np.maximum(first, middle - half * scale)).clip(0.0, 1.0)

    return np.outer(overlap(height, height / 2), overlap(width, width / 2 - shift * scale))


@pytest.mark.parametrize("sky", [0.0, 0.25])
@pytest.mark.parametrize("step", [0.013, 0.11])
def test_no_trail_in_the_background_of_a_moving_edge(step, sky):
    """A square moves over the sky: pixels without any part of it show the sky at once, and keep their history."""
    width, height, half = 48, 32, 0.8
    square = wall(0.0, half)
    environment = Environment.constant((sky, sky, sky)) if sky > 0.0 else None
    scene = DeviceScene(Scene((square,), (GREY,), panned(0.0), environment=environment), DEVICE)
    film = Film(width, height)
    uncovered = np.zeros((height, width), bool)
    for k in range(12):
        part = covered(step * k, half, width, height)
        frame = part + (1.0 - part) * sky
        picture = film.add(np.repeat(frame[..., None], 3, axis=2), scene, panned(step * k))
        empty = part < 1e-6
        assert np.abs(picture[empty] - sky).max() <= sky * EXACT
        uncovered |= part > 1e-3
    assert (uncovered & empty).sum() > 10
    assert (film.length[~uncovered] > 11.99).all()


def test_mirrors_forget_sooner_while_the_camera_moves():
    """A mirror's history is short in motion, and as long as any when all is still."""
    mirror = Material(kind="conductor", k=(1.0, 1.0, 1.0), specular=(1.0, 1.0, 1.0))
    scene = scene_of(wall(), wall(1.0, 0.5, 1), materials=(GREY, mirror))
    film = Film(32, 32)
    for k in range(12):
        film.add(1.0, scene, panned(0.01 * k))
    assert abs(film.length[16, 16] - (STEADY.mirror_history + 1)) < 1e-3 and film.length[2, 16] > 11.0
    for _ in range(5):
        film.add(1.0, scene, panned(0.11))
    assert film.length[16, 16] > 7.0


# --- moving objects --------------------------------------------------------------------------------------------------


def test_a_moving_ball_leaves_no_ghost_and_keeps_its_history():
    """A bright ball over a dark wall: the picture is each frame's exactly, though all but its trail averages many."""
    film = Film(60, 40)
    scene = scene_of(wall(), ball(-1.0), materials=(GREY, GREY))
    on_ball = np.zeros((40, 60), bool)
    for k in range(12):
        scene = scene.replaced(replace(scene.scene, meshes=(scene.scene.meshes[0], ball(-1.0 + 0.13 * k))))
        before, on_ball = on_ball, hit_mesh(scene, 60, 40) == 1
        frame = np.where(on_ball[..., None], (5.0, 4.0, 3.0), (0.1, 0.1, 0.2))
        assert np.abs(film.add(frame, scene) - frame).max() < 1e-5
    assert film.length[on_ball].mean() > 11.0
    trail = before & ~on_ball
    assert trail.sum() > 10 and (film.length[trail] <= 1.0).mean() > 0.8


def hit_mesh(scene: DeviceScene, width: int, height: int) -> np.ndarray:
    """(h, w) mesh at each pixel's centre."""
    from nrc.renderer import Renderer

    return Renderer(scene, width, height, device=DEVICE).aovs()["object_id"].astype(int)


def test_a_deforming_mesh_carries_its_history():
    """A floor that is sheared, its triangles the same: values painted on it in the first frame stay where they were."""
    down = Camera.look_at((0, 4, 0), (0, 0, 0), up=(0, 0, -1), fov=50.0)
    still = scene_of(floor(half=1.5), camera=down)
    mesh = still.scene.meshes[0]
    shear = np.array([[1, 0, 0.25], [0, 1, 0], [0, 0, 1]], np.float32)
    sheared = still.replaced(
        replace(still.scene, meshes=(replace(mesh, positions=np.ascontiguousarray(mesh.positions @ shear.T)),))
    )
    size = 64
    ys, xs = np.mgrid[:size, :size] + 0.5
    film = Film(size, size)
    film.add(np.stack([xs, ys, np.ones_like(xs)], axis=2), still)
    picture = film.add(np.full((size, size), math.nan), sheared)
    scale = size / (8 * math.tan(math.radians(25.0)))  # pixels per unit
    expected = xs - 0.25 * (ys - size / 2)
    known = (
        (picture[..., 2] > 0.999) & (np.abs(expected - size / 2) < 1.4 * scale) & (np.abs(ys - size / 2) < 1.4 * scale)
    )
    assert known.sum() > 800
    assert np.abs(picture[..., 0] - expected)[known].max() < PROJECTION
    assert np.abs(picture[..., 1] - ys)[known].max() < PROJECTION


def test_a_turning_instance_carries_its_history():
    """Two instances of one square: each pixel of the turning one finds itself, and never the other."""
    size, angle = 64, 0.15
    square = rectangle(1, (0, 0, 0), (0.8, 0, 0), (0, 0.8, 0))
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    places = [
        (Instance(0, to_world @ moved((-0.9, 0, 0))), Instance(0, moved((0.9, 0, 0)))) for to_world in (np.eye(4), turn)
    ]
    camera = Camera.look_at((0, 0, 4), (0, 0, 0), fov=50.0)
    before = DeviceScene(Scene((square,), (GREY, RED), camera, environment=SKY, instances=places[0]), DEVICE)
    after = before.replaced(replace(before.scene, instances=places[1]))
    ys, xs = np.mgrid[:size, :size] + 0.5
    film = Film(size, size)
    film.add(np.stack([xs, ys, xs < size / 2], axis=2), before)
    picture = film.add(np.full((size, size), math.nan), after)
    c, s = math.cos(angle), math.sin(angle)
    x, y = xs - size / 2, size / 2 - ys
    expected_x, expected_y = size / 2 + c * x + s * y, size / 2 - (c * y - s * x)
    scale = size / (8 * math.tan(math.radians(25.0)))  # pixels per unit
    left = (np.abs(expected_x - size / 2 + 0.9 * scale) < 0.7 * scale) & (np.abs(expected_y - size / 2) < 0.7 * scale)
    assert left.sum() > 300 and (film.length[left] > 1.99).all()
    assert np.abs(picture[..., 0] - expected_x)[left].max() < PROJECTION
    assert np.abs(picture[..., 1] - expected_y)[left].max() < PROJECTION
    assert np.allclose(picture[..., 2][left], 1.0)


def test_another_topology_starts_over():
    """Triangle numbers mean nothing in a scene with other triangles."""
    film = Film(16, 16)
    film.add(1.0, scene_of(wall()))
    film.add(1.0, scene_of(wall(), ball()))
    assert film.accumulation.rejected_fraction() == 1.0


def test_history_takes_the_new_texture():
    """A wall of another colour at once shows it: histories hold light, not the surface's colour."""
    film, scene = Film(16, 16), scene_of(wall())
    for _ in range(8):
        film.add(0.5, scene)
    materials = (replace(GREY, base_color=(0.25, 0.25, 0.25)), RED)
    picture = film.add(0.25, scene.replaced(replace(scene.scene, materials=materials)))
    assert np.allclose(picture, 0.25) and film.length.min() > 8.9


# --- cuts and changed light ------------------------------------------------------------------------------------------


def test_a_cut_resets_everything():
    """`reset`, and a camera that sees other places alone, show the new frame and nothing else."""
    scene = scene_of(wall(), ball())
    for cut in ("reset", "camera"):
        film = Film(20, 12)
        for _ in range(5):
            film.add(7.0, scene)
        if cut == "reset":
            film.accumulation.reset()
        camera = panned(8.0) if cut == "camera" else None
        frame = noise(0, 12, 20)
        assert np.allclose(film.add(frame, scene, camera), frame[..., None], rtol=EXACT)
        assert (film.length == 1.0).all() and film.accumulation.rejected_fraction() == 1.0


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_a_light_switch_is_seen_at_once(factor):
    """Noise of a path tracer's kind drops little history; a tenth, or five times, of the light nearly all at once."""
    film, scene = Film(64, 64, TemporalConfig()), scene_of(wall())
    dropped, before = [], np.zeros((64, 64))
    for k in range(40):
        film.add(noise(k, 64, 64), scene)
        dropped.append((film.length < np.minimum(before + 1, 32)).mean())
        before = film.length
    assert np.mean(dropped) < 0.03 and film.length.mean() > 25.0
    for k in range(2):
        picture = film.add(factor * noise(100 + k, 64, 64), scene)
    assert abs(picture.mean() / factor - 1.0) < 0.2
    assert np.mean(film.length <= RESTART_FRAMES + 3.0) > 0.8


def test_a_dropped_history_restarts_from_the_square_around():
    """Where history is dropped the new frame's 5 x 5 mean counts three frames beside the pixel's own path."""
    film, scene = Film(32, 32, TemporalConfig()), scene_of(wall())
    for k in range(8):
        film.add(noise(k, 32, 32, heavy=False), scene)
    frame = 5.0 * (np.random.default_rng(9).random((32, 32)) < 0.5)  # half of the paths are black
    picture = film.add(frame, scene)[..., 0]
    assert (film.length == RESTART_FRAMES + 1.0).all()
    padded = np.pad(frame, 2, constant_values=math.nan)
    around = np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, (5, 5)), axis=(2, 3))
    assert np.allclose(picture, (RESTART_FRAMES * around + frame) / (RESTART_FRAMES + 1.0), rtol=1e-4)
    assert (frame == 0.0).mean() > 0.4 and picture.min() > 0.5


def test_a_dropped_history_restarts_from_the_same_surface_alone():
    """Another object's light does not come in where light changes."""
    film = Film(40, 30, TemporalConfig())
    scene = scene_of(wall(), ball(), materials=(GREY, GREY))
    on_ball = hit_mesh(scene, 40, 30) == 1
    for _ in range(8):
        film.add(1.0, scene)
    frame = np.where(on_ball[..., None], (5.0, 4.0, 3.0), (0.1, 0.1, 0.2))
    picture = film.add(frame, scene)
    dropped = film.length == RESTART_FRAMES + 1.0
    assert dropped[on_ball].any() and dropped[~on_ball].any()
    assert np.abs(picture - frame)[dropped].max() < 1e-5


def test_a_single_firefly_drops_no_history():
    """However bright, one pixel makes the statistic 1 at most."""
    film, scene = Film(32, 32, TemporalConfig()), scene_of(wall())
    for k in range(8):
        film.add(noise(k, 32, 32, heavy=False), scene)
    frame = noise(9, 32, 32, heavy=False)
    frame[16, 16] = 1e6
    before = film.length
    film.add(frame, scene)
    assert (film.length == before + 1.0)[11:22, 11:22].all()  # the windows that hold it


# --- calls -----------------------------------------------------------------------------------------------------------


def test_threads_do_not_matter():
    """Same bits for one thread, two, and three, camera and scene in motion."""
    results = []
    try:
        for n_threads in (1, 2, 3):
            launch.set_threads(n_threads)
            film, scene = Film(80, 60, TemporalConfig()), scene_of(wall(), ball())
            for k in range(5):
                scene = scene.replaced(replace(scene.scene, meshes=(scene.scene.meshes[0], ball(0.1 * k))))
                picture = film.add(noise(k, 60, 80), scene, panned(0.02 * k))
            results.append(picture.tobytes() + film.length.tobytes())
    finally:
        launch.set_threads(0)
    assert results[0] == results[1] == results[2]


def test_wrong_pictures_are_refused():
    """The message says what was expected."""
    scene = scene_of(wall())
    accumulation = TemporalAccumulation(8, 4, DEVICE)
    with pytest.raises(ValueError, match="8x4"):
        accumulation.add(colours(np.ones((4, 8))), scene, scene.camera_view(4, 8))
    with pytest.raises(ValueError, match="8x4"):
        accumulation.add(colours(np.ones((4, 9))), scene, scene.camera_view(8, 4))
    with pytest.raises(ValueError, match="positive"):
        TemporalAccumulation(0, 4, DEVICE)
    picture, view = colours(np.ones((4, 8))), scene.camera_view(8, 4)
    for arguments, expected in (
        ((picture, scene.scene, view), r"Renderer\.scene.*got Scene"),
        ((picture, scene, scene.scene.camera), r"Renderer\.tracer\.camera.*got Camera"),
        ((picture.numpy(), scene, view), r"Renderer\.film\.frame.*got ndarray"),
    ):
        with pytest.raises(TypeError, match=expected):
            accumulation.add(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"min_alpha": 0.0},
        {"min_alpha": 1.5},
        {"normal_angle": -0.1},
        {"plane_distance": 0.0},
        {"mirror_history": 0.5},
        {"t_keep": 5.0, "t_drop": 5.0},
        {"t_keep": math.nan},
    ],
)
def test_invalid_configurations_are_refused(options):
    """The message names the field."""
    with pytest.raises(ValueError, match=next(iter(options))):
        TemporalConfig(**options)
