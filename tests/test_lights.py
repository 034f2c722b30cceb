"""Random numbers, warps, selection tables and light sampling, by χ² against their densities and by closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import warp as wp
from scipy import stats
from small_scenes import GREY, floor, looking_down, mean_and_error, rectangle, render_batches

from nrc.device_scene import DeviceScene
from nrc.kernels.camera import CameraView, camera_ray
from nrc.kernels.intersect import Hit
from nrc.kernels.light import light_pdf_environment, light_pdf_triangle, light_sample, sample_environment
from nrc.kernels.rng import rng_float, rng_init, rng_next
from nrc.kernels.sampling import (
    cdf_search,
    square_to_cosine_hemisphere,
    square_to_cosine_hemisphere_pdf,
    square_to_uniform_disk_concentric,
    square_to_uniform_sphere,
    square_to_uniform_triangle,
)
from nrc.kernels.scene import SceneView
from nrc.launch import launch
from nrc.scene import (
    Camera,
    DirectionalLight,
    Environment,
    Material,
    Mesh,
    PointLight,
    Scene,
    SpotLight,
    Texture,
)

P_LIMIT = 1e-3 / 30  # of a χ² test; one false alarm in a thousand runs of all of them
ERRORS = 4.5  # standard errors that a Monte Carlo mean may be off: one in 150 000 by chance

wp.set_module_options({"enable_backward": False})


@wp.kernel
def draw_random(first: int, seed: int, sample: int, n: int, out: wp.array2d[float]):
    """`n` numbers of the stream of each index. One thread per stream."""
    i = first + wp.tid()
    state = rng_init(seed, sample, i)
    for k in range(n):
        state = rng_next(state)
        out[i, k] = rng_float(state)


@wp.kernel
def warp_square(first: int, which: int, u: wp.array[wp.vec2], out_w: wp.array[wp.vec3], out_pdf: wp.array[float]):
    """Warp number `which` of each point. One thread per point."""
    i = first + wp.tid()
    if which == 0:
        p = square_to_uniform_disk_concentric(u[i])
        out_w[i] = wp.vec3(p[0], p[1], 0.0)
        out_pdf[i] = 1.0 / 3.14159265
    elif which == 1:
        w = square_to_cosine_hemisphere(u[i])
        out_w[i] = w
        out_pdf[i] = square_to_cosine_hemisphere_pdf(w)
    elif which == 2:
        out_w[i] = square_to_uniform_sphere(u[i])
        out_pdf[i] = 0.25 / 3.14159265
    else:
        b = square_to_uniform_triangle(u[i])
        out_w[i] = wp.vec3(b[0], b[1], 0.0)
        out_pdf[i] = 2.0


@wp.kernel
def select(
    first: int,
    cdf: wp.array[float],
    u: wp.array[float],
    out: wp.array[int],
):
    """Index by bisection. One thread per number."""
    i = first + wp.tid()
    out[i] = cdf_search(cdf, 3, cdf.shape[0] - 4, u[i])


@wp.kernel
def draw_environment(
    first: int, scene: SceneView, u: wp.array[wp.vec2], out_d: wp.array[wp.vec3], out_pdf: wp.array[float]
):
    """Directions towards the environment and their densities. One thread per sample."""
    i = first + wp.tid()
    d = sample_environment(scene, u[i])
    out_d[i] = d
    out_pdf[i] = light_pdf_environment(scene, d)


@wp.kernel
def density_of_environment(first: int, scene: SceneView, d: wp.array[wp.vec3], out_pdf: wp.array[float]):
    """Density of given directions. One thread per direction."""
    i = first + wp.tid()
    out_pdf[i] = light_pdf_environment(scene, d[i])


@wp.kernel
def draw_light(
    first: int,
    scene: SceneView,
    p: wp.vec3,
    u: wp.array[wp.vec3],
    out_point: wp.array[wp.vec3],
    out_value: wp.array[wp.vec3],
    out_pdf: wp.array[float],
    out_pdf_again: wp.array[float],
):
    """Light samples seen from `p`, and the density that `light_pdf_triangle` gives them. One thread per sample."""
    i = first + wp.tid()
    n = wp.vec3(0.0, 0.0, 0.0)
    s = light_sample(scene, p, n, u[i][0], wp.vec2(u[i][1], u[i][2]))
    out_point[i] = p + s.distance * s.wi
    out_value[i] = s.value
    out_pdf[i] = s.pdf
    hit = Hit()
    hit.face = int(wp.where(out_point[i][0] > 0.0, 1, 0))
    hit.instance = -1
    out_pdf_again[i] = light_pdf_triangle(scene, hit, s.distance, s.wi, p, n)


@wp.kernel
def draw_lens(first: int, camera: CameraView, u: wp.array[wp.vec2], out_o: wp.array[wp.vec3], out_d: wp.array[wp.vec3]):
    """Rays through the middle of pixel (0, 0). One thread per ray."""
    i = first + wp.tid()
    ray = camera_ray(camera, 0, 0, wp.vec2(0.5, 0.5), u[i])
    out_o[i] = ray.o
    out_d[i] = ray.d


def points(n: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 2)).astype(np.float32)


def blank(n: int, dtype=wp.vec3) -> wp.array:
    """Room for results, filled with NaN (-1 for integers)."""
    return wp.full(n, -1 if dtype is wp.int32 else dtype(math.nan), dtype=dtype, device="cpu")


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """χ² test of counts against expected frequencies; bins with fewer than five expected are pooled."""
    counts, expected = counts.ravel().astype(float), expected.ravel() * (counts.sum() / expected.sum())
    rare = expected < 5.0
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    if expected[-1] == 0.0:
        assert counts[-1] == 0.0, "samples where the density is zero"
        counts, expected = counts[:-1], expected[:-1]
    return float(stats.chi2.sf(np.sum((counts - expected) ** 2 / expected), len(counts) - 1))


# --- random numbers --------------------------------------------------------------------------------------------------


def streams(seed: int, sample: int, n_streams: int, n: int) -> np.ndarray:
    out = wp.full((n_streams, n), math.nan, dtype=float, device="cpu")
    launch(draw_random, n_streams, inputs=[seed, sample, n], outputs=[out], device=out.device)
    return out.numpy().astype(np.float64)


@pytest.mark.parametrize(("n_streams", "n"), [(4, 200_000), (100_000, 8)])
def test_rng_is_uniform_and_uncorrelated(n_streams, n):
    """Range, mean, variance, χ² and lag-1 correlation, along a few long streams and across many short ones."""
    x = streams(5, 11, n_streams, n)
    count = x.size
    assert x.min() >= 0.0 and x.max() < 1.0
    assert abs(x.mean() - 0.5) < ERRORS * math.sqrt(1.0 / 12.0 / count)
    assert abs(x.var() - 1.0 / 12.0) < ERRORS * math.sqrt(1.0 / 180.0 / count)
    assert p_value(np.histogram(x, 256, (0, 1))[0], np.ones(256)) > P_LIMIT
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:])):
        assert abs(np.mean((a - 0.5) * (b - 0.5))) * 12.0 < ERRORS / math.sqrt(a.size)


def test_rng_streams_are_distinct():
    """Pixels, frames and seeds next to each other start in different places; the same ones in the same."""
    first = [streams(seed, sample, 64, 4) for seed, sample in ((0, 0), (0, 1), (1, 0), (2**31 - 1, 7))]
    assert len(np.unique(np.concatenate(first), axis=0)) == 4 * 64
    assert np.array_equal(first[1], streams(0, 1, 64, 4))


# --- warps -----------------------------------------------------------------------------------------------------------


def warped(which: int, n: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
    w, pdf = blank(n), blank(n, wp.float32)
    u = wp.array(points(n), dtype=wp.vec2, device="cpu")
    launch(warp_square, n, inputs=[which, u], outputs=[w, pdf], device=w.device)
    return w.numpy().astype(np.float64), pdf.numpy()


def test_disk_is_uniform():
    """Equal areas in radius² and azimuth get equal counts."""
    w, _ = warped(0)
    r2, phi = np.sum(w**2, axis=1), np.arctan2(w[:, 1], w[:, 0])
    assert r2.max() <= 1.0 + 1e-6
    assert p_value(np.histogram2d(r2, phi, (10, 20), ((0, 1), (-np.pi, np.pi)))[0], np.ones(200)) > P_LIMIT


def test_cosine_hemisphere_follows_its_density():
    """z² is uniform where the density is z / π; the reported density is that one."""
    w, pdf = warped(1)
    assert np.allclose(np.linalg.norm(w, axis=1), 1.0, atol=1e-6) and w[:, 2].min() >= 0.0
    phi = np.arctan2(w[:, 1], w[:, 0])
    assert p_value(np.histogram2d(w[:, 2] ** 2, phi, (10, 20), ((0, 1), (-np.pi, np.pi)))[0], np.ones(200)) > P_LIMIT
    assert np.allclose(pdf, w[:, 2] / np.pi, atol=1e-6)


def test_sphere_is_uniform():
    """z and azimuth are uniform."""
    w, _ = warped(2)
    assert np.allclose(np.linalg.norm(w, axis=1), 1.0, atol=1e-6)
    phi = np.arctan2(w[:, 1], w[:, 0])
    assert p_value(np.histogram2d(w[:, 2], phi, (10, 20), ((-1, 1), (-np.pi, np.pi)))[0], np.ones(200)) > P_LIMIT


def test_triangle_is_uniform():
    """Barycentrics fall into equal sub-triangles equally often."""
    w, _ = warped(3)
    b1, b2 = w[:, 0], w[:, 1]
    assert b1.min() >= 0.0 and b2.min() >= -1e-7 and (b1 + b2).max() <= 1.0 + 1e-6
    cells = 8
    i, j = (np.minimum((x * cells).astype(int), cells - 1) for x in (b1, b2))
    upper = (b1 * cells - i) + (b2 * cells - j) > 1.0
    counts = np.bincount((i * cells + j) * 2 + upper, minlength=2 * cells * cells).reshape(cells, cells, 2)
    k, m = np.mgrid[:cells, :cells]
    inside = np.stack([k + m <= cells - 1, k + m <= cells - 2], axis=-1)
    assert p_value(counts[inside], np.ones(inside.sum())) > P_LIMIT


# --- selection -------------------------------------------------------------------------------------------------------

TABLES = {
    "one": np.array([1.0]),
    "equal": np.ones(7) / 7,
    "skewed": np.array([0.9, 0.0, 1e-3, 0.05, 0.049]),
    "many": np.random.default_rng(2).pareto(1.0, 300),
}


@pytest.mark.parametrize("name", TABLES)
def test_selection_follows_the_mass_function(name):
    """Bisection of the CDF draws each entry with its probability."""
    pmf = TABLES[name] / TABLES[name].sum()
    n = len(pmf)
    cdf = np.concatenate([[9.0, 9.0, 9.0, 0.0], np.cumsum(pmf)])  # `cdf_search` starts at an offset
    cdf[-1] = 1.0
    u = wp.array(np.random.default_rng(8).random(100_000).astype(np.float32), dtype=float, device="cpu")
    chosen = blank(u.shape[0], wp.int32)
    launch(select, u.shape[0], inputs=[wp.array(cdf, dtype=float, device="cpu"), u], outputs=[chosen], device=u.device)
    counts = np.bincount(chosen.numpy(), minlength=n)
    assert len(counts) == n
    assert n == 1 or p_value(counts, pmf) > P_LIMIT


# --- environment -----------------------------------------------------------------------------------------------------

TURN = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])


def uneven_sky() -> Environment:
    image = np.random.default_rng(4).uniform(0.0, 1.0, (8, 16, 3)).astype(np.float32) ** 3
    image[2, 5] = 40.0
    image[5:7, 9:12] = 0.0
    return Environment(image, to_world=TURN)


def sky_scene(environment: Environment, *lights) -> DeviceScene:
    return DeviceScene(looking_down(floor(), materials=(GREY,), environment=environment, lights=lights), "cpu")


@pytest.mark.parametrize("environment", [uneven_sky(), Environment.constant((1.0, 2.0, 3.0))], ids=["map", "constant"])
def test_environment_sampling_follows_its_density(environment):
    """χ² of sampled directions against `light_pdf_environment`, whose integral is the selection's probability."""
    scene = sky_scene(environment, PointLight((0, 1, 0), (1, 1, 1)))
    pmf = float(np.diff(scene.view.light_cdf.numpy())[-1])
    assert 0.01 < pmf < 0.999
    n = 400_000
    d, pdf = blank(n), blank(n, wp.float32)
    u = wp.array(points(n), dtype=wp.vec2, device="cpu")
    launch(draw_environment, n, inputs=[scene.view, u], outputs=[d, pdf], device=scene.device)
    assert np.isfinite(pdf.numpy()).all() and pdf.numpy().min() > 0.0

    # Density by midpoints, in bins of the map's own coordinates: texels times 4 x 4, where it is almost constant.
    rows, columns, fine = 16, 32, 12
    v = (np.arange(rows * fine) + 0.5) / (rows * fine) * np.pi
    a = (np.arange(columns * fine) + 0.5) / (columns * fine) * 2.0 * np.pi
    theta, phi = np.meshgrid(v, a, indexing="ij")
    local = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), -np.sin(theta) * np.cos(phi)], axis=-1)
    to_world = np.asarray(environment.to_world)
    grid = wp.array((local.reshape(-1, 3) @ to_world.T).astype(np.float32), dtype=wp.vec3, device="cpu")
    density = blank(grid.shape[0], wp.float32)
    launch(density_of_environment, grid.shape[0], inputs=[scene.view, grid], outputs=[density], device=scene.device)
    cell = np.pi / (rows * fine) * 2.0 * np.pi / (columns * fine) * np.sin(theta)
    mass = density.numpy().astype(np.float64).reshape(theta.shape) * cell
    assert mass.sum() == pytest.approx(pmf, rel=1e-3)  # midpoint rule

    drawn = d.numpy().astype(np.float64) @ to_world
    azimuth = np.arctan2(drawn[:, 0], -drawn[:, 2]) % (2.0 * np.pi)
    polar = np.arccos(np.clip(drawn[:, 1], -1, 1))
    counts = np.histogram2d(polar, azimuth, (rows, columns), ((0, np.pi), (0, 2.0 * np.pi)))[0]
    expected = mass.reshape(rows, fine, columns, fine).sum(axis=(1, 3))
    assert p_value(counts, expected) > P_LIMIT


def test_black_environment_selects_nothing():
    """With no light at all nothing is sampled and the picture is black, not NaN."""
    scene = looking_down(floor(), materials=(GREY,), environment=Environment.constant((0, 0, 0)))
    assert DeviceScene(scene, "cpu").view.n_lights == 0
    assert np.array_equal(render_batches(scene, 4, 4, 2, 1), np.zeros((2, 4, 4, 3)))


# --- emissive triangles ----------------------------------------------------------------------------------------------


def test_triangle_light_sampling_follows_its_density():
    """Two lamps of unequal power: uniform on each, and the reported density is the true one."""
    lamp = Material(emission=(2.0, 2.0, 2.0))
    bright = Material(emission=(6.0, 6.0, 6.0))
    corners = np.array([(-2, 1, 0), (-1, 1, 0), (-2, 1, 1), (1, 1, 0), (3, 1, 0), (1, 1, 1)], np.float32)

    meshes = tuple(
        Mesh(corners[3 * i : 3 * i + 3], np.array([[0, 1, 2]], np.int32), i) for i in range(2)
    )  # front towards -y
    scene = DeviceScene(Scene(meshes, (lamp, bright), Camera.look_at((0, 0, 5), (0, 0, 0))), "cpu")
    assert np.allclose(scene.view.light_nodes.numpy()["intensity"][1:], [7.0, 1.0, 6.0])  # area × radiance
    n = 200_000
    rng = np.random.default_rng(1)
    u = wp.array(rng.random((n, 3)).astype(np.float32), dtype=wp.vec3, device="cpu")
    point, value = blank(n), blank(n)
    pdf, again = blank(n, wp.float32), blank(n, wp.float32)
    eye = np.array([0.3, -0.5, 0.2])
    launch(
        draw_light, n, inputs=[scene.view, wp.vec3(*eye), u], outputs=[point, value, pdf, again], device=scene.device
    )
    x = point.numpy().astype(np.float64)
    assert np.allclose(x[:, 1], 1.0, atol=1e-5)
    i = (x[:, 0] > 0.0).astype(int)
    pmf = np.bincount(i) / n
    assert pmf.min() > 0.05
    assert np.array_equal(value.numpy()[:, 0], np.where(i == 1, 6.0, 2.0).astype(np.float32))
    offset = x - eye
    distance = np.linalg.norm(offset, axis=1)
    area = np.where(i == 1, 1.0, 0.5)
    expected = pmf[i] * distance**2 / (offset[:, 1] / distance * area)
    of_choice = pdf.numpy() / expected  # the true probability over that found
    assert all(np.ptp(of_choice[i == k]) < 4e-4 for k in range(2))  # float32 cancellation in p_light - p
    assert abs(of_choice[i == 1].mean() - 1.0) * pmf[1] < ERRORS * math.sqrt(pmf[0] * pmf[1] / n)
    assert np.allclose(again.numpy(), pdf.numpy(), rtol=2e-4)
    b1 = np.where(i == 1, (x[:, 0] - 1.0) / 2.0, x[:, 0] + 2.0)
    b2 = x[:, 2]
    for k in range(2):
        linear = 1.0 - (np.arange(20) + 0.5) / 20  # the triangle's width along the second barycentric
        assert p_value(np.histogram(b1[i == k], 20, (0, 1))[0], linear) > P_LIMIT
        ratio = b2[i == k] / np.maximum(1.0 - b1[i == k], 1e-9)
        assert p_value(np.histogram(ratio, 20, (-1e-6, 1 + 1e-6))[0], np.ones(20)) > P_LIMIT


# --- lens ------------------------------------------------------------------------------------------------------------


def test_lens_is_a_uniform_disk_in_focus():
    """Origins fill the lens disk evenly and all rays of a film point meet in the plane of focus."""
    radius, focus = 0.25, 3.0
    camera = Camera.look_at((1, 2, 3), (0, 1, -2), fov=30.0, aperture_radius=radius, focus_distance=focus)
    scene = DeviceScene(looking_down(floor(), materials=(GREY,)), "cpu")
    n = 100_000
    o, d = blank(n), blank(n)
    u = wp.array(points(n), dtype=wp.vec2, device="cpu")
    launch(draw_lens, n, inputs=[scene.camera_view(3, 2, camera), u], outputs=[o, d], device=scene.device)
    frame, eye = camera.to_world[:3, :3], camera.to_world[:3, 3]
    lens = (o.numpy().astype(np.float64) - eye) @ frame
    assert np.abs(lens[:, 2]).max() < 1e-5
    r2, phi = np.sum(lens[:, :2] ** 2, axis=1) / radius**2, np.arctan2(lens[:, 1], lens[:, 0])
    assert r2.max() <= 1.0 + 1e-4
    assert p_value(np.histogram2d(r2, phi, (10, 20), ((0, 1.0001), (-np.pi, np.pi)))[0], np.ones(200)) > P_LIMIT
    local = d.numpy().astype(np.float64) @ frame
    meeting = lens + local * (focus / -local[:, 2])[:, None]
    assert np.ptp(meeting, axis=0).max() < 1e-4  # float32 at coordinates of 3
    half = math.tan(math.radians(15.0))
    assert np.allclose(meeting.mean(axis=0)[:2], [-2 / 3 * half * focus, 1 / 2 * half * 2 / 3 * focus], atol=1e-4)


# --- irradiance of every light ---------------------------------------------------------------------------------------

GREY_05 = Material(base_color=(0.5, 0.5, 0.5))


def assert_radiance(scene: Scene, expected: float, *, exact: bool = False) -> None:
    """Radiance of the floor at the origin: within `ERRORS` standard errors, or to rounding where nothing is random."""
    batches = render_batches(scene, 4, 4, 16, 1 if exact else 64, max_depth=2)
    mean, error = mean_and_error(batches)
    # 1e-3: the picture is 1 degree wide, over which the irradiance changes by less
    assert abs(mean - expected) <= (ERRORS * error if not exact else 0.0) + 1e-3 * expected
    assert expected == 0.0 or exact or error < 0.02 * expected  # the test is able to fail


def test_irradiance_of_a_point_light():
    """E = I cos θ / r², L = ρ E / π."""
    position = np.array([1.0, 2.0, 0.5])
    r2 = float(position @ position)
    expected = 0.5 / math.pi * 10.0 * (2.0 / math.sqrt(r2)) / r2
    light = PointLight(tuple(position), (10.0, 10.0, 10.0))
    assert_radiance(looking_down(floor(half=0.5), materials=(GREY_05,), lights=(light,)), expected, exact=True)


@pytest.mark.parametrize("falloff", ["linear", "smooth"])
@pytest.mark.parametrize("off_axis", [0.0, 0.15, 0.25, 0.35, 0.5])
def test_irradiance_of_a_spot_light(falloff, off_axis):
    """Full inside the inner cone, none outside the outer one, and the documented curve between them."""
    inner, outer = 0.2, 0.4
    direction = (math.sin(off_axis), -math.cos(off_axis), 0.0)
    light = SpotLight((0.0, 2.0, 0.0), direction, (8.0, 8.0, 8.0), inner, outer, falloff)
    if falloff == "linear":
        attenuation = np.clip((outer - off_axis) / (outer - inner), 0.0, 1.0)
    else:
        t = (math.cos(off_axis) - math.cos(outer)) / (math.cos(inner) - math.cos(outer))
        attenuation = np.clip(t, 0.0, 1.0) ** 2
    expected = 0.5 / math.pi * 8.0 / 4.0 * float(attenuation)
    camera = Camera.look_at((0, 3, 0), (0, 0, 0), up=(0, 0, -1), fov=0.01)
    scene = Scene((floor(half=0.5),), (GREY_05,), camera, lights=(light,))
    picture = render_batches(scene, 4, 4, 2, 16, max_depth=2)
    assert picture.mean() == pytest.approx(expected, rel=3e-3, abs=1e-6)  # float32 angles near 0.35 rad, picture's size


def test_irradiance_of_a_directional_light():
    """L = ρ E cos θ / π."""
    light = DirectionalLight((1.0, -2.0, 0.5), (3.0, 3.0, 3.0))
    expected = 0.5 / math.pi * 3.0 * 2.0 / math.sqrt(1.0 + 4.0 + 0.25)
    assert_radiance(looking_down(floor(half=0.5), materials=(GREY_05,), lights=(light,)), expected, exact=True)


def test_irradiance_of_a_constant_environment():
    """E = π L, so the floor shows ρ L."""
    scene = looking_down(floor(half=0.5), materials=(GREY_05,), environment=Environment.constant((2.0, 2.0, 2.0)))
    assert_radiance(scene, 1.0)


def test_irradiance_of_an_environment_map():
    """E is the cosine-weighted integral of the bilinear map over the upper hemisphere, here by quadrature."""
    environment = uneven_sky()
    n = 720
    theta, phi = np.meshgrid((np.arange(n) + 0.5) / n * np.pi, (np.arange(2 * n) + 0.5) / n * np.pi, indexing="ij")
    image = environment.image.mean(axis=2).astype(np.float64)
    height, width = image.shape
    x, y = phi / (2 * np.pi) * width - 0.5, np.clip(theta / np.pi * height - 0.5, 0, height - 1)
    x0, y0 = np.floor(x).astype(int), np.minimum(np.floor(y).astype(int), height - 2)
    fx, fy = x - x0, y - y0
    top = (1 - fx) * image[y0, x0 % width] + fx * image[y0, (x0 + 1) % width]
    bottom = (1 - fx) * image[y0 + 1, x0 % width] + fx * image[y0 + 1, (x0 + 1) % width]
    local = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), -np.sin(theta) * np.cos(phi)], axis=-1)
    up = np.maximum((local @ TURN.T)[..., 1], 0.0)
    irradiance = np.sum(((1 - fy) * top + fy * bottom) * up * np.sin(theta)) * (np.pi / n) ** 2
    scene = looking_down(floor(half=0.5), materials=(GREY_05,), environment=environment)
    mean, error = mean_and_error(render_batches(scene, 8, 8, 32, 64, max_depth=2))
    assert abs(mean - 0.5 / np.pi * irradiance) < ERRORS * error + 1e-3 * mean
    assert error < 0.01 * mean


def rectangle_form_factor(a: float, b: float) -> float:
    """From an element to a parallel rectangle a × b at distance 1, a corner above it (Howell's configuration B-3)."""
    f = a / math.sqrt(1 + a * a) * math.atan(b / math.sqrt(1 + a * a))
    f += b / math.sqrt(1 + b * b) * math.atan(a / math.sqrt(1 + b * b))
    return f / (2.0 * math.pi)


def test_irradiance_of_a_rectangle():
    """Four corner rectangles make the form factor; L = ρ F Le, by both light and BSDF sampling at once."""
    height, half = 0.5, 0.4
    lamp = Material(base_color=(0, 0, 0), emission=(4.0, 4.0, 4.0))
    meshes = (floor(half=0.1), rectangle(1, (0.0, height, 0.0), (half, 0, 0), (0, 0, half)))
    scene = looking_down(*meshes, materials=(GREY_05, lamp))
    camera = Camera.look_at((0.9, 0.4, 0), (0, 0, 0), fov=0.1)  # from under the lamp's edge
    scene = Scene(scene.meshes, scene.materials, camera)
    form = 4.0 * rectangle_form_factor(half / height, half / height)
    assert_radiance(scene, 0.5 * form * 4.0)


@pytest.mark.parametrize(
    ("front_up", "two_sided", "share"), [(False, False, 1.0), (True, False, 0.0), (True, True, 1.0)]
)
def test_irradiance_of_an_emissive_triangle(front_up, two_sided, share):
    """Lambert's polygon formula; the back emits only if the material says so."""
    corners = np.array([(-0.3, 0.5, -0.2), (0.5, 0.6, 0.0), (0.0, 0.4, 0.5)])
    unit = corners / np.linalg.norm(corners, axis=1, keepdims=True)
    form = 0.0
    for a, b in zip(unit, np.roll(unit, -1, axis=0), strict=True):
        normal = np.cross(a, b)
        form += math.acos(a @ b) * normal[1] / np.linalg.norm(normal)
    form = abs(form) / (2.0 * math.pi)

    down = np.cross(corners[1] - corners[0], corners[2] - corners[0])[1] < 0.0
    order = [0, 1, 2] if down != front_up else [0, 2, 1]
    mesh = Mesh(corners.astype(np.float32), np.array([order], np.int32), 1)
    lamp = Material(base_color=(0, 0, 0), emission=(4.0, 4.0, 4.0), emission_two_sided=two_sided)
    camera = Camera.look_at((2.0, 0.3, 0.3), (0, 0, 0), fov=0.05)
    scene = Scene((floor(half=0.1), mesh), (GREY_05, lamp), camera)
    assert_radiance(scene, 0.5 * form * 4.0 * share)


@pytest.mark.parametrize("alpha_mode", ["blend", "mask"])
def test_irradiance_of_a_lamp_with_holes(alpha_mode):
    """Emission counts as far as the lamp is opaque, by light sampling as by BSDF sampling."""
    height, half, opacity = 0.5, 0.4, 0.3
    lamp = Material(base_color=(0, 0, 0), emission=(4.0, 4.0, 4.0), opacity=opacity, alpha_mode=alpha_mode)
    meshes = (floor(half=0.1), rectangle(1, (0.0, height, 0.0), (half, 0, 0), (0, 0, half)))
    camera = Camera.look_at((0.9, 0.4, 0), (0, 0, 0), fov=0.1)
    form = 4.0 * rectangle_form_factor(half / height, half / height)
    share = opacity if alpha_mode == "blend" else 0.0  # the mask's cutoff is 0.5
    assert_radiance(Scene(meshes, (GREY_05, lamp), camera), 0.5 * form * 4.0 * share)


def test_emission_texture_with_two_channels_is_grey():
    """A luminance-alpha texture on a lamp uploads and weighs the lamp by its luminance."""
    texture = Texture(np.full((2, 2, 2), 128, np.uint8))
    lamp = Material(base_color=(0, 0, 0), emission=(4.0, 4.0, 4.0), emission_texture=texture)
    meshes = (floor(half=0.1), rectangle(1, (0.0, 0.5, 0.0), (0.4, 0, 0), (0, 0, 0.4)))
    camera = Camera.look_at((0.9, 0.4, 0), (0, 0, 0), fov=0.1)
    form = 4.0 * rectangle_form_factor(0.8, 0.8)
    assert_radiance(Scene(meshes, (GREY_05, lamp), camera), 0.5 * form * 4.0 * 128 / 255)
