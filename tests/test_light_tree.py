"""The light tree: bounds against loops and sampled points, choice and density, and that no light is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import warp as wp
from small_scenes import GREY, floor, mean_and_error, render_batches

from nrc.device_scene import DeviceScene
from nrc.kernels.light import light_sample
from nrc.kernels.light_tree import LightNode, light_tree_pmf, light_tree_sample, node_importance
from nrc.kernels.scene import SceneView
from nrc.launch import launch
from nrc.light_table import quads
from nrc.light_tree import LightBounds, light_tree, median_order, triangle_bounds, union
from nrc.scene import Camera, DirectionalLight, Environment, Instance, Material, Mesh, PointLight, Scene, SpotLight

wp.set_module_options({"enable_backward": False})

SQUARE = np.array([(-0.5, 0.0, -0.5), (0.5, 0.0, -0.5), (0.5, 0.0, 0.5), (-0.5, 0.0, 0.5)])  # front towards -y
ERRORS = 4.5  # standard errors that a Monte Carlo mean may be off


@wp.kernel
def weigh(
    first: int,
    # In
    nodes: wp.array[LightNode],  # (n_nodes,)
    p: wp.array[wp.vec3],  # (n_points,)
    n: wp.array[wp.vec3],  # (n_points,)
    # Out
    out: wp.array2d[float],  # (n_points, n_nodes)
):
    """Importance of every node. One thread per point."""
    i = first + wp.tid()
    for k in range(nodes.shape[0]):
        out[i, k] = node_importance(nodes[k], p[i], n[i])


@wp.kernel
def choose(
    first: int,
    # Params
    depth: int,
    # In
    nodes: wp.array[LightNode],  # (2^(depth + 1),)
    p: wp.vec3,
    n: wp.vec3,
    u: wp.array[float],  # (n,)
    # Out
    out_leaf: wp.array[int],  # (n,)
    out_pmf: wp.array[wp.vec2],  # (n,) as drawn, and as found again
    out_rest: wp.array[float],  # (n,)
):
    """Draw a leaf, and ask for its probability. One thread per number."""
    i = first + wp.tid()
    leaf, pmf, rest = light_tree_sample(nodes, depth, p, n, u[i])
    out_leaf[i] = leaf
    out_pmf[i] = wp.vec2(pmf, light_tree_pmf(nodes, depth, leaf, p, n))
    out_rest[i] = rest


@wp.kernel
def gather(
    first: int,
    # Scene
    scene: SceneView,
    # In
    p: wp.vec3,
    n: wp.vec3,
    u: wp.array[wp.vec3],  # (n,)
    # Out
    out: wp.array[float],  # (n,)
):
    """Irradiance through one light sample. One thread per sample."""
    i = first + wp.tid()
    s = light_sample(scene, p, n, u[i][0], wp.vec2(u[i][1], u[i][2]))
    out[i] = 0.0
    if s.pdf > 0.0:
        out[i] = s.value[1] * wp.max(wp.dot(n, s.wi), 0.0) / s.pdf


def importances(nodes: np.ndarray, p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """(points, nodes)."""
    out = wp.full((len(p), len(nodes)), np.nan, dtype=float, device="cpu")
    points, normals = (wp.array(x.astype(np.float32), dtype=wp.vec3, device="cpu") for x in (p, n))
    rows = wp.array(nodes, dtype=LightNode, device="cpu")
    launch(weigh, len(p), inputs=[rows, points, normals], outputs=[out], device=out.device)
    return out.numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_bounds(n: int, seed: int, two_sided: float = 0.5) -> LightBounds:
    """Triangles, some of which emit from both sides, and after them spots and points."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-2.0, 2.0, (n, 1, 3)) + 0.4 * rng.normal(size=(n, 3, 3))
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    bounds = triangle_bounds(corners, normals, 2.0, False)
    bounds.two_sided[:] = rng.random(n) < two_sided
    points = slice(2 * n // 3, n)
    bounds.lower[points] = bounds.upper[points]
    bounds.radius[points], bounds.two_sided[points] = 0.0, False
    m = n - points.start
    bounds.spread[points] = rng.choice([0.05, 0.3, 1.0, np.pi], m)
    bounds.reach[points] = np.where(bounds.spread[points] == np.pi, 0.0, rng.choice([0.001, 0.1, 0.7], m))
    return bounds


# --- bounds ----------------------------------------------------------------------------------------------------------


def looped_union(a: LightBounds, b: LightBounds, i: int) -> tuple[np.ndarray, float]:
    """Cone around two cones, by the cases of the book in words: axis and half angle."""
    u, v = a.axis[i], b.axis[i]
    if (a.two_sided[i] or b.two_sided[i]) and u @ v < 0.0:
        v = -v
    between = np.arccos(np.clip(u @ v, -1.0, 1.0))
    if between + b.spread[i] <= a.spread[i]:
        return u, a.spread[i]
    if between + a.spread[i] <= b.spread[i]:
        return v, b.spread[i]
    spread = (a.spread[i] + between + b.spread[i]) / 2.0
    if spread >= np.pi:
        return u, np.pi
    about = unit(np.cross(u, v))
    turn = spread - a.spread[i]
    return u * np.cos(turn) + np.cross(about, u) * np.sin(turn), spread  # Rodrigues, `about` being perpendicular


def test_union_equals_the_loop():
    """Cones of all cases, boxes and sums."""
    a, b = random_bounds(3000, 1), random_bounds(3000, 2)
    mixed = np.random.default_rng(3).permutation(3000)
    b = b[mixed]
    both = union(a, b)
    for i in range(len(a)):
        axis, spread = looped_union(a, b, i)
        assert both.spread[i] == pytest.approx(spread, abs=1e-6)
        assert spread == np.pi or np.allclose(both.axis[i], axis, atol=1e-6)
    assert len(np.unique(np.round(both.spread, 6))) > 100
    np.testing.assert_array_equal(both.lower, np.minimum(a.lower, b.lower))
    np.testing.assert_array_equal(both.intensity, a.intensity + b.intensity)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 100, 777])
def test_nodes_bound_the_lights_below_them(n):
    """Spheres, cones, reach and intensity of every node, over the lights of its leaves; each light has one leaf."""
    bounds = random_bounds(n, n)
    nodes, lights, depth = light_tree(bounds)
    assert sorted(lights[lights >= 0]) == list(range(n)) and len(lights) == 1 << depth < 2 * n
    for k in range(1, 2 << depth):
        level = k.bit_length() - 1
        size = 1 << (depth - level)
        below = lights[k * size - (1 << depth) :][:size]
        below = below[below >= 0]
        node = nodes[k]
        assert node["intensity"] == pytest.approx(bounds.intensity[below].sum(), rel=1e-5)
        if not len(below):
            continue
        middle = (bounds.lower[below] + bounds.upper[below]) / 2.0
        assert (np.linalg.norm(middle - node["center"], axis=1) <= node["radius"] + bounds.radius[below] + 1e-5).all()
        cosine = bounds.axis[below] @ node["axis"]
        angle = np.arccos(np.clip(np.abs(cosine) if node["two_sided"] else cosine, -1.0, 1.0))
        spread = np.arctan2(node["sin_axis"], node["cos_axis"])
        assert (angle + bounds.spread[below] <= spread + 2e-3).all() or spread > 3.14
        assert (np.cos(bounds.reach[below]) >= node["cos_emission"] - 1e-6).all()
        assert node["two_sided"] == bounds.two_sided[below].any()


def test_order_halves_space():
    """Every leaf of a grid's tree that has all its points is a cell: the boxes of a level do not overlap."""
    grid = np.stack(np.meshgrid(*(np.arange(4.0),) * 3), axis=-1).reshape(-1, 3)
    points = grid[np.random.default_rng(1).permutation(64)]
    cells = points[median_order(points)].reshape(8, 8, 3)
    assert (np.ptp(cells, axis=1) == 1.0).all()
    assert sorted(median_order(points[:50])) == list(range(50))


def test_quads_are_found():
    """A square's triangles, in a row of triangles that meet at an edge but are bent, or lie flat without an edge."""
    a, b = SQUARE[[0, 1, 2]], SQUARE[[0, 2, 3]]
    bent = np.array([SQUARE[0], SQUARE[3], (-1.0, 1.0, 0.0)])
    corners = np.array([a, b, bent, a + 5.0, a, b, b + 1.0])
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert quads(corners, normals).tolist() == [0, 4]
    far = SQUARE[2] - 0.1 * np.arange(6)[:, None] * np.eye(3)[0]
    fan = np.stack([np.tile(SQUARE[0], (5, 1)), far[:-1], far[1:]], axis=1)
    assert quads(fan, np.cross(fan[:, 1] - fan[:, 0], fan[:, 2] - fan[:, 0])).tolist() == [0, 2]


def test_importance_is_positive_where_light_arrives():
    """Points on lights and directions to them: every node above a light that contributes has importance."""
    rng = np.random.default_rng(7)
    n_lights, n_points = 60, 400
    corners = rng.uniform(-1.0, 1.0, (n_lights, 1, 3)) + 0.3 * rng.normal(size=(n_lights, 3, 3))
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    bounds = triangle_bounds(corners, normals, 1.0, False)
    bounds.two_sided[::3] = True
    spots = slice(40, 60)
    for x in (bounds.lower, bounds.upper):
        x[spots] = corners[spots, 0]
    bounds.radius[spots], bounds.two_sided[spots] = 0.0, False
    bounds.spread[spots], bounds.reach[spots] = 0.2, 0.3
    nodes, lights, depth = light_tree(bounds)
    p = rng.uniform(-1.5, 1.5, (n_points, 3))
    n = unit(rng.normal(size=(n_points, 3)))
    n[::4] = 0.0
    weights = importances(nodes, p, n)
    assert np.isfinite(weights).all() and (weights[:, 0] == 0.0).all()
    b = rng.dirichlet((0.3, 0.3, 0.3), (n_points, n_lights))  # often near edges and corners
    x = np.einsum("pli,lij->plj", b, corners)
    x[:, spots] = corners[spots, 0]
    to_light = unit(x - p[:, None])
    cos_out = -np.einsum("plj,lj->pl", to_light, bounds.axis)
    cos_out = np.where(bounds.two_sided, np.abs(cos_out), cos_out)
    shines = cos_out > np.where(np.arange(n_lights) < 40, 1e-6, np.cos(0.5))
    cos_in = np.einsum("plj,pj->pl", to_light, n)
    arrives = shines & ((cos_in > 1e-6) | ~n.any(axis=1)[:, None])
    assert 0.1 < arrives.mean() < 0.9
    leaf = np.argsort(lights)[lights.tolist().count(-1) :]  # of each light
    for level in range(depth + 1):
        above = ((1 << depth) + leaf) >> level
        assert (weights[:, above][arrives] > 0.0).all()
    certain = weights[:, (1 << depth) + leaf] == 0.0
    assert certain.mean() > 0.2  # and lights that are turned away are known


# --- choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 100, 1000])
def test_leaves_are_drawn_with_their_probability(n):
    """Evenly spread numbers fall into each leaf in proportion; the density found again is that of the draw, exactly."""
    nodes, lights, depth = light_tree(random_bounds(n, 5))
    m = 1 << 18
    u = wp.array(((np.arange(m) + 0.5) / m).astype(np.float32), dtype=float, device="cpu")
    p, normal = wp.vec3(0.3, -0.2, 0.4), wp.vec3(0.6, 0.8, 0.0)
    rows = wp.array(nodes, dtype=LightNode, device="cpu")
    leaf = wp.full(m, -1, dtype=int, device="cpu")
    pmf = wp.full(m, wp.vec2(np.nan), dtype=wp.vec2, device="cpu")
    rest = wp.full(m, np.nan, dtype=float, device="cpu")
    launch(choose, m, inputs=[depth, rows, p, normal, u], outputs=[leaf, pmf, rest], device=u.device)
    drawn, again = pmf.numpy().T
    np.testing.assert_array_equal(drawn, again)
    found = drawn > 0.0
    leaves = leaf.numpy()[found]
    assert (lights[leaves] >= 0).all()
    of_leaf = np.zeros(1 << depth)
    of_leaf[leaves] = drawn[found]
    share = np.bincount(leaves, minlength=1 << depth) / m
    np.testing.assert_allclose(share, of_leaf, atol=2.0 / m * (depth + 1) + 2e-6 * depth)
    assert rest.numpy().min() >= 0.0 and rest.numpy().max() < 1.0


def lamps(n: int, emission: float = 3.0, two_sided: bool = False) -> tuple[Mesh, Material]:
    """Squares at random places above the floor, each of two triangles."""
    rng = np.random.default_rng(n)
    turn = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    place = rng.uniform((-1.5, 0.6, -1.5), (1.5, 2.0, 1.5), (n, 3))
    corners = (0.2 * SQUARE) @ turn + place[:, None]
    indices = (4 * np.arange(n)[:, None, None] + np.array([(0, 1, 2), (0, 2, 3)])).reshape(-1, 3)
    material = Material(base_color=(0, 0, 0), emission=(emission,) * 3, emission_two_sided=two_sided)
    return Mesh(corners.reshape(-1, 3).astype(np.float32), indices.astype(np.int32), 1), material


def lit_scene(**lights) -> Scene:
    mesh, material = lamps(30)
    camera = Camera.look_at((0.0, 1.0, 3.0), (0.0, 0.5, 0.0))
    return Scene((floor(0, 2.0), mesh), (GREY, material), camera, **lights)


def irradiance(corners: np.ndarray, p: np.ndarray, n: np.ndarray, facing: float = 1.0, both: bool = False) -> float:
    """At `p` from (n, 3, 3) triangles of radiance 1, by midpoints of 1600 parts of each."""
    k = 40
    s, t = (x.ravel() for x in np.meshgrid((np.arange(k) + 0.5) / k, (np.arange(k) + 0.5) / k))
    above = s + t > 1.0
    s, t = np.where(above, 1.0 - s, s), np.where(above, 1.0 - t, t)
    e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    to_light = corners[:, None, 0] + s[:, None] * e1[:, None] + t[:, None] * e2[:, None] - p
    normal = facing * np.cross(e1, e2)
    d = np.linalg.norm(to_light, axis=2)
    cos_out = -np.einsum("kij,kj->ki", to_light, unit(normal)) / d
    cos_out = np.abs(cos_out) if both else np.maximum(cos_out, 0.0)
    cos_in = np.maximum(to_light @ n / d, 0.0)
    return float((np.linalg.norm(normal, axis=1) / 2.0 * (cos_out * cos_in / d**2).mean(axis=1)).sum())


MIRROR = np.diag([-1.3, 1.1, 0.9, 1.0])


@pytest.mark.parametrize("kind", ["squares", "two-sided", "mirrored instance", "spots", "with parallel light and sky"])
def test_samples_add_up_to_the_irradiance(kind):
    """The mean over light samples is the sum over all lights, each by its own quadrature, occlusion left out."""
    scene = lit_scene()
    mesh = scene.meshes[1]
    corners = mesh.positions[mesh.indices].astype(np.float64)
    p, n = np.array([0.2, 0.0, -0.1]), unit(np.array([0.2, 1.0, 0.1]))
    facing, both, expected = 1.0, kind == "two-sided", 0.0
    if both:
        scene = replace(scene, materials=(GREY, replace(scene.materials[1], emission_two_sided=True)))
    if kind == "mirrored instance":
        scene = replace(scene, instances=(Instance(1, MIRROR),))
        corners, facing = corners @ MIRROR[:3, :3].T, -1.0
    if kind == "spots":
        rng = np.random.default_rng(4)
        places = rng.uniform((-1, 0.5, -1), (1, 2, 1), (12, 3))
        aims = p - places + 0.3 * rng.normal(size=(12, 3))
        spots = [SpotLight(tuple(x), tuple(d), (2.0, 2.0, 2.0), 0.2, 0.5) for x, d in zip(places, aims, strict=True)]
        scene = replace(scene, lights=(*spots, PointLight((0.5, 0.7, 0.2), (0.4, 0.4, 0.4))))
        for light in scene.lights:
            to_light = np.array(light.position) - p
            d = np.linalg.norm(to_light)
            fall = 1.0
            if isinstance(light, SpotLight):
                angle = np.arccos(np.clip(-unit(np.array(light.direction)) @ to_light / d, -1, 1))
                fall = np.clip((light.outer_angle - angle) / (light.outer_angle - light.inner_angle), 0.0, 1.0)
            expected += light.intensity[1] * fall * max(n @ to_light / d, 0.0) / d**2
    if kind == "with parallel light and sky":
        sky, sun = Environment.constant((0.2, 0.2, 0.2)), DirectionalLight((0.1, -1.0, 0.2), (0.7, 0.7, 0.7))
        scene = replace(scene, environment=sky, lights=(sun,))
        expected += 0.2 * np.pi + 0.7 * max(-unit(np.array(sun.direction)) @ n, 0.0)

    expected += 3.0 * irradiance(corners, p, n, facing, both)
    uploaded = DeviceScene(scene, "cpu")
    m = 400_000
    u = wp.array(np.random.default_rng(9).random((m, 3)).astype(np.float32), dtype=wp.vec3, device="cpu")
    out = wp.full(m, np.nan, dtype=float, device="cpu")
    launch(gather, m, inputs=[uploaded.view, wp.vec3(*p), wp.vec3(*n), u], outputs=[out], device=u.device)
    mean, error = mean_and_error(out.numpy())
    assert abs(mean - expected) < ERRORS * error + 1e-4 * expected
    assert error < 0.01 * expected


def test_quad_is_one_leaf():
    """Thirty squares have thirty leaves, whose triangles share them by area."""
    view = DeviceScene(lit_scene(), "cpu").view
    lights = view.lights.numpy()
    assert len(lights) == 60 and (view.leaf_lights.numpy() >= 0).sum() == 30
    np.testing.assert_allclose(lights["share"], 0.5, atol=1e-5)
    np.testing.assert_array_equal(lights["leaf"][0::2], lights["leaf"][1::2])
    np.testing.assert_array_equal(view.leaf_lights.numpy()[lights["leaf"][0::2]], np.arange(0, 60, 2))


def test_path_tracer_weighs_both_ways_of_finding_a_light():
    """A floor between two layers of lamps of many sizes, one of them behind it: the weights add up to 1."""
    rng = np.random.default_rng(2)
    x, z = (c.ravel() for c in np.meshgrid(np.linspace(-0.9, 0.9, 10), np.linspace(-0.9, 0.9, 8)))
    half = rng.uniform(0.02, 0.1, len(x))
    corners = 2.0 * half[:, None, None] * SQUARE + np.stack([x, np.full(len(x), 0.4), z], axis=-1)[:, None]
    corners = np.concatenate([corners, corners * (1.0, -1.0, 1.0)])
    indices = (4 * np.arange(2 * len(x))[:, None, None] + np.array([(0, 1, 2), (0, 2, 3)])).reshape(-1, 3)
    mesh = Mesh(corners.reshape(-1, 3).astype(np.float32), indices.astype(np.int32), 1)
    lamp = Material(base_color=(0, 0, 0), emission=(3.0, 3.0, 3.0), emission_two_sided=True)
    camera = Camera.look_at((1.5, 0.35, 0), (0, 0, 0), fov=0.1)  # below the upper lamps
    pictures = render_batches(Scene((floor(0, 0.1), mesh), (GREY, lamp), camera), 4, 4, 16, 64, max_depth=2)
    mean, error = mean_and_error(pictures)
    expected = (
        0.5 / np.pi * 3.0 * irradiance(mesh.positions[mesh.indices].astype(float), np.zeros(3), np.eye(3)[1], both=True)
    )
    assert expected > 0.1
    assert abs(mean - expected) < ERRORS * error + 1e-3 * expected  # the picture is 0.1 degree wide
    assert error < 0.005 * expected
