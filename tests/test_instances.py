"""Instances and moved vertices: a two-level scene shows what the flattened one does, and reuses what did not move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import warp as wp
from small_scenes import GREY, config, floor, render_batches, shape, welch_t

from nrc.assets import shapes
from nrc.assets.model import flatten, transform_mesh
from nrc.bvh import Bvh, InstanceBvh
from nrc.device_scene import DeviceScene
from nrc.kernels.bvh_build import WIDTH
from nrc.kernels.intersect import Accel, Hit, InstanceView, ray_closest, ray_occluded
from nrc.kernels.light import light_pdf_triangle, light_sample
from nrc.kernels.scene import LIGHT_POINT, SceneView, hit_position, rest_position
from nrc.launch import launch
from nrc.renderer import Renderer
from nrc.scene import Camera, Checkerboard, Instance, Material, Mesh, PointLight, Scene

wp.set_module_options({"enable_backward": False})

RNG = np.random.default_rng(11)
FAR = 1e30
ROUNDING = 3e-5  # of positions of size 3 that went through two float32 transforms
UNEQUAL_SCALE = 0.02  # normals of coarse balls, interpolated before or after they are scaled unequally
FRACTION_OF_EDGES = 0.01  # rays that meet another triangle because they pass an edge at that distance
Z_LIMIT = 5.0  # of 16 blocks x 3 channels


def placed(turn_about=(0.0, 1.0, 0.0), angle=0.0, scale=(1.0, 1.0, 1.0), at=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Scale, then a turn about an axis, then a translation, (4, 4)."""
    axis = np.asarray(turn_about, float) / np.linalg.norm(turn_about)
    k = np.cross(np.eye(3), axis)
    matrix = np.eye(4)
    matrix[:3, :3] = (np.eye(3) - np.sin(angle) * k + (1 - np.cos(angle)) * k @ k) @ np.diag(scale)
    matrix[:3, 3] = at
    return matrix


PLACES = {
    "identity": np.eye(4),
    "turned": placed((1.0, 2.0, 0.5), 0.8, at=(-0.9, 0.7, 0.2)),
    "mirrored": placed((0.3, 1.0, 0.0), 0.4, (-0.8, 0.8, 0.8), (0.9, 0.6, -0.2)),
    "squeezed": placed((0.0, 0.0, 1.0), 0.6, (0.4, 1.2, 0.7), (0.0, 1.9, -0.6)),
}


def scene() -> Scene:
    """Instances of a textured ball with normals and tangents, and of a glowing square, over a floor."""
    ball = shape(shapes.sphere(12, 24), 1)
    tangents = np.tile(np.array([1.0, 0.0, 0.0, 1.0], np.float32), (len(ball.positions), 1))
    ball = replace(ball, tangents=tangents, uv0=ball.uv0 * np.float32(4.0))
    lamp = replace(floor(2, 0.2), name="lamp")
    check = Checkerboard((0.8, 0.2, 0.2), (0.2, 0.2, 0.8))
    return Scene(
        (floor(0, 4.0), ball, lamp),
        (
            GREY,
            Material(
                kind="metallic_roughness",
                base_color=(1.0, 1.0, 1.0),
                base_color_texture=check,
                roughness=(0.5, 0.7),
                two_sided=True,
                bump_texture=check,
                bump_scale=0.01,
            ),
            replace(GREY, emission=(9.0, 7.0, 5.0)),
        ),
        Camera.look_at((0.5, 2.5, 5.0), (0.0, 0.8, 0.0), fov=45.0),
        lights=(PointLight((0.0, 4.0, 3.0), (8.0, 8.0, 8.0)),),
        instances=(
            *(Instance(1, placed(scale=(0.6,) * 3) if name == "identity" else m, name) for name, m in PLACES.items()),
            Instance(2, placed((1.0, 0.0, 0.0), np.pi, at=(-1.2, 3.0, 0.3))),
            Instance(2, placed((1.0, 0.0, 0.3), 2.5, (1.5, -1.0, 0.7), (1.4, 2.6, 0.0))),
        ),
    )


@wp.kernel
def find(
    first: int,
    # Scene
    scene: SceneView,
    # In
    origins: wp.array[wp.vec3],  # (n,)
    directions: wp.array[wp.vec3],  # (n,) unit
    # Out
    out_t: wp.array[float],  # (n,)
    out_position: wp.array[wp.vec3],  # (n,)
    out_rest: wp.array[wp.vec3],  # (n,)
    out_ids: wp.array2d[int],  # (n, 3) mesh, instance, occluded
):
    """Find the closest hit. One thread per ray."""
    i = first + wp.tid()
    hit = ray_closest(scene.accel, origins[i], directions[i], FAR)
    out_t[i] = hit.t
    out_ids[i, 0] = -1
    out_ids[i, 1] = hit.instance
    out_ids[i, 2] = int(ray_occluded(scene.accel, origins[i], directions[i], FAR))
    if hit.face >= 0:
        out_ids[i, 0] = scene.triangle_mesh[hit.face]
        out_position[i] = hit_position(scene, hit)
        out_rest[i] = rest_position(scene, hit)


def hits(uploaded: DeviceScene, n: int = 20_000):
    """Distance, position, position at rest, mesh, instance and occlusion along the same random rays."""
    rng = np.random.default_rng(5)
    origins = rng.uniform((-2.0, 0.1, -2.0), (2.0, 3.0, 3.0), (n, 3)).astype(np.float32)
    directions = rng.normal(size=(n, 3))
    directions = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
    rays = [wp.array(x, dtype=wp.vec3, device="cpu") for x in (origins, directions)]
    t = wp.full(n, np.nan, dtype=float, device="cpu")
    points = [wp.full(n, wp.vec3(np.nan), dtype=wp.vec3, device="cpu") for _ in range(2)]
    ids = wp.full((n, 3), -99, dtype=int, device="cpu")
    launch(find, n, inputs=[uploaded.view, *rays], outputs=[t, *points, ids], device=t.device)
    return t.numpy(), *(point.numpy() for point in points), *ids.numpy().T


def test_rays_meet_what_the_flattened_scene_shows():
    """Same distance, position and occlusion as with every instance a mesh of its own; mesh and instance are named."""
    two_level = scene()
    t, p, _, mesh, instance, occluded = hits(DeviceScene(two_level, "cpu"))
    flat = flatten(two_level)
    flat_t, flat_p, _, flat_mesh, flat_instance, flat_occluded = hits(DeviceScene(flat, "cpu"))
    assert (flat_instance == -1).all() and set(instance) == {-1, 0, 1, 2, 3, 4, 5}
    expected_mesh = np.where(flat_mesh < 1, flat_mesh, np.array([0, 1, 1, 1, 1, 2, 2])[flat_mesh])
    expected_instance = np.where(flat_mesh < 1, -1, flat_mesh - 1)
    same = (mesh == expected_mesh) & (instance == expected_instance)
    assert same.mean() > 1.0 - FRACTION_OF_EDGES
    np.testing.assert_allclose(t[same], flat_t[same], rtol=1e-4, atol=ROUNDING)
    found = same & (mesh >= 0)
    np.testing.assert_allclose(p[found], flat_p[found], atol=1e-3)
    assert (occluded == (mesh >= 0)).all() and (occluded == flat_occluded).mean() > 1.0 - FRACTION_OF_EDGES


def test_layers_equal_those_of_the_flattened_scene():
    """Normals, albedo and depth of first hits: texture, bump map, tangents and reflections included."""
    two_level = scene()
    a, b = (Renderer(s, 96, 64, config(), device="cpu").aovs() for s in (two_level, flatten(two_level)))
    assert len(np.unique(a["object_id"])) >= 3
    for name in ("normal", "albedo", "depth", "position"):
        difference = np.abs(a[name] - b[name]).reshape(96 * 64, -1).max(axis=1)
        bound = UNEQUAL_SCALE if name == "normal" else 2e-3
        assert (difference < bound).mean() > 1.0 - FRACTION_OF_EDGES, name


def test_picture_equals_that_of_the_flattened_scene():
    """Path-traced means agree in every block, emission and light sampling of instances included."""
    two_level = scene()
    blocks = [
        render_batches(s, 48, 48, 24, 4, max_depth=4, seed=seed).reshape(24, 4, 12, 4, 12, 3).mean(axis=(2, 4))
        for s, seed in ((two_level, 1), (flatten(two_level), 2))
    ]
    assert blocks[0].mean() > 0.05
    assert np.abs(welch_t(*blocks)).max() < Z_LIMIT


@wp.kernel
def draw(
    first: int,
    # Scene
    scene: SceneView,
    # In
    u: wp.array[wp.vec3],  # (n,)
    # Out
    out_pdf: wp.array[wp.vec2],  # (n,) of the sample, and of the same direction found by a ray
    out_emitted: wp.array[float],  # (n,) green
):
    """Sample a light from a point that sees all of them and shoot a ray there. One thread per sample."""
    i = first + wp.tid()
    p = wp.vec3(0.0, 2.2, 2.5)
    n = wp.vec3(0.0, 0.0, 0.0)
    light = light_sample(scene, p, n, u[i][0], wp.vec2(u[i][1], u[i][2]))
    out_pdf[i] = wp.vec2(-1.0, -1.0)
    if light.delta == 0 and light.pdf > 0.0:
        hit = ray_closest(scene.accel, p, light.wi, FAR)
        again = 0.0
        if hit.face >= 0 and wp.abs(hit.t - light.distance) < 1.0e-3:
            again = light_pdf_triangle(scene, hit, hit.t, light.wi, p, n)
        out_pdf[i] = wp.vec2(light.pdf, again)
        out_emitted[i] = light.value[1]


def test_light_on_an_instance_has_the_density_it_is_drawn_with():
    """`light_pdf_triangle` of the point that a ray finds equals the sample's density; both instances are drawn."""
    uploaded = DeviceScene(scene(), "cpu")
    n = 20_000
    u = wp.array(RNG.random((n, 3)).astype(np.float32), dtype=wp.vec3, device="cpu")
    pdf = wp.full(n, wp.vec2(np.nan), dtype=wp.vec2, device="cpu")
    emitted = wp.zeros(n, dtype=float, device="cpu")
    launch(draw, n, inputs=[uploaded.view, u], outputs=[pdf, emitted], device=u.device)
    drawn, again = pdf.numpy().T
    seen = drawn > 0.0
    assert seen.sum() > 500
    missed = again[seen] == 0.0  # rays along an edge
    assert missed.mean() < FRACTION_OF_EDGES
    np.testing.assert_allclose(again[seen][~missed], drawn[seen][~missed], rtol=2e-3)
    lights = uploaded.view.lights.numpy()
    assert sorted(lights["instance"][lights["triangle"] >= 0]) == [4, 4, 5, 5]
    # The second lamp is 1.5 x 0.7 times the first one's area.
    leaves = uploaded.view.light_nodes.numpy()["intensity"][1 << uploaded.view.light_depth :]
    of_lamp = leaves[lights["leaf"][:4]]
    assert of_lamp[2:].sum() / of_lamp[:2].sum() == pytest.approx(1.05, rel=1e-5)


@pytest.mark.parametrize("axis", range(3))
def test_singular_instance_is_hidden(axis):
    """An instance scaled to nothing is not hit and does not emit, nor does a flat one that keeps its area."""
    before = scene()
    gone = np.eye(4)
    gone[axis, axis] = 0.0
    instances = tuple(replace(x, to_world=gone) if x.mesh == 2 else x for x in before.instances)
    after = replace(before, instances=instances)
    uploaded = DeviceScene(after, "cpu")
    assert set(hits(uploaded)[4]) == {-1, 0, 1, 2, 3}
    lights = uploaded.view.lights.numpy()
    assert lights["kind"][uploaded.view.leaf_lights.numpy()].tolist() == [LIGHT_POINT]


def test_instances_share_their_mesh():
    """A thousand instances of a mesh need little more memory on the device than one."""
    ball = shape(shapes.sphere(64, 128), 0)
    places = [placed((0, 1, 0), 0.1 * i, at=(i % 32, 0.0, i // 32)) for i in range(1000)]
    one, many = (
        Scene((floor(), ball), (GREY,), scene().camera, instances=tuple(Instance(1, m) for m in places[:n]))
        for n in (1, 1000)
    )
    uploaded = [DeviceScene(s, "cpu") for s in (one, many)]
    assert uploaded[0].view.positions.shape == uploaded[1].view.positions.shape
    assert uploaded[0].view.indices.shape == uploaded[1].view.indices.shape
    n_bytes = [s.memory_bytes() for s in uploaded]
    assert n_bytes[1] - n_bytes[0] < 1000 * 512


@pytest.mark.parametrize("n", [1, 7, 8, 9, 300])
def test_hierarchy_over_boxes_names_every_instance(n):
    """Rays down a row of squares meet each of them, whatever their number."""
    square = floor(0, 0.4)
    matrices = [placed(at=(float(i), 0.5 * i, 0.0)) for i in range(n)]
    uploaded = DeviceScene(Scene((square,), (GREY,), scene().camera, instances=tuple(Instance(0, m) for m in matrices)))
    rays = [
        wp.array(np.array([(i, 1000.0, 0.1) for i in range(n)], np.float32), dtype=wp.vec3, device="cpu"),
        wp.full(n, wp.vec3(0.0, -1.0, 0.0), dtype=wp.vec3, device="cpu"),
    ]
    t = wp.zeros(n, dtype=float, device="cpu")
    points = [wp.zeros(n, dtype=wp.vec3, device="cpu") for _ in range(2)]
    ids = wp.zeros((n, 3), dtype=int, device="cpu")
    launch(find, n, inputs=[uploaded.view, *rays], outputs=[t, *points, ids], device=t.device)
    assert ids.numpy()[:, 1].tolist() == list(range(n))
    np.testing.assert_allclose(t.numpy(), 1000.0 - 0.5 * np.arange(n), rtol=1e-6)


# --- what moves ------------------------------------------------------------------------------------------------------


def moved_on(before: Scene) -> Scene:
    """Another pose: the second instance elsewhere, the ball's vertices bent."""
    ball = before.meshes[1]
    bent = ball.positions * (1.0 + 0.4 * np.sin(3.0 * ball.positions[:, 1:2])).astype(np.float32)
    instances = list(before.instances)
    instances[1] = replace(instances[1], to_world=placed((0.0, 1.0, 1.0), 1.4, at=(-1.4, 0.9, -0.3)))
    instances[4] = replace(instances[4], to_world=placed((1.0, 0.0, 0.0), np.pi, at=(-0.2, 3.3, 0.3)))
    meshes = (before.meshes[0], replace(ball, positions=bent), before.meshes[2])
    return replace(before, meshes=meshes, instances=tuple(instances))


def test_moved_scene_renders_as_a_fresh_one():
    """Refitted hierarchies, moved instances and lights: the rays meet what they meet in a new upload."""
    first = DeviceScene(scene(), "cpu")
    after = moved_on(first.scene)
    fresh = hits(DeviceScene(after, "cpu"))
    moved = hits(first.replaced(after))
    for i in (0, 1, 3, 4, 5):
        np.testing.assert_array_equal(moved[i], fresh[i])
    back = hits(first.replaced(after).replaced(first.scene))
    np.testing.assert_array_equal(back[0], hits(DeviceScene(scene(), "cpu"))[0])


def test_only_what_moved_is_uploaded():
    """The hierarchy of what stands still and untouched attributes are shared; the moved mesh's is refitted."""
    first = DeviceScene(scene(), "cpu")
    after = first.replaced(moved_on(first.scene))
    assert after.bvh is first.bvh
    for name in ("indices", "normals", "uv0", "tangents", "triangle_material", "triangle_light", "texels"):
        assert getattr(after.view, name).ptr == getattr(first.view, name).ptr, name
    assert after._parts["bvh 1"][1] is first._parts["bvh 1"][1]
    assert after.view.positions.ptr != first.view.positions.ptr
    np.testing.assert_array_equal(after.view.rest_positions.numpy(), first.view.positions.numpy())


def test_scenes_that_share_a_hierarchy_find_it_fitted_to_them():
    """Two scenes made of one by bending its mesh; what is made of the first after the second shows the first's bend."""
    base = scene()
    ball = base.meshes[1]
    bent = [
        replace(base, meshes=(base.meshes[0], replace(ball, positions=ball.positions * np.float32(k)), base.meshes[2]))
        for k in (1.5, 0.3)
    ]
    start = DeviceScene(base, "cpu")
    first, _ = (start.replaced(pose) for pose in bent)
    again = first.replaced(replace(bent[0], lights=()))
    for i, (found, expected) in enumerate(zip(hits(again), hits(DeviceScene(bent[0], "cpu")), strict=True)):
        if i != 2:  # at rest the one's ball is not bent
            np.testing.assert_array_equal(found, expected)


def test_rest_position_is_that_of_the_first_upload():
    """Points of moved and bent objects are known by where they were; a closed form from their barycentrics."""
    first = DeviceScene(scene(), "cpu")
    after = first.replaced(moved_on(first.scene))
    _, p, rest, mesh, instance, _ = hits(after)
    still = (instance == -1) & (mesh >= 0)
    np.testing.assert_allclose(rest[still], p[still], atol=1e-5)
    lamp = instance == 4
    assert lamp.any()
    np.testing.assert_allclose(rest[lamp], p[lamp] + [-1.0, -0.3, 0.0], atol=1e-4)
    ball = instance == 1
    local = (rest[ball] - PLACES["turned"][:3, 3]) @ PLACES["turned"][:3, :3]
    assert np.abs(np.linalg.norm(local, axis=1) - 1.0).max() < 0.05  # on the ball of 12 x 24 facets, not the bent one


def soup(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centre = rng.uniform(-1.0, 1.0, (n, 1, 3))
    positions = (centre + rng.normal(0.0, 0.05, (n, 3, 3))).reshape(-1, 3).astype(np.float32)
    return positions, np.arange(3 * n, dtype=np.int32).reshape(-1, 3)


@wp.kernel
def closest(first: int, accel: Accel, o: wp.array[wp.vec3], d: wp.array[wp.vec3], out: wp.array[Hit]):
    """Find the closest hit. One thread per ray."""
    i = first + wp.tid()
    out[i] = ray_closest(accel, o[i], d[i], FAR)


@pytest.mark.parametrize("change", ["a little", "much", "from nothing"])
def test_refitted_hierarchy_finds_what_a_new_one_finds(change):
    """Whether refitted or, where it has become bad or a triangle appears, built anew; bit for bit."""
    rng = np.random.default_rng(2)
    positions, indices = soup(3000, rng)
    if change == "from nothing":
        positions[:30] = positions[0]  # ten triangles without area
    after, _ = soup(3000, np.random.default_rng(2 if change != "much" else 3))
    after = after + 0.01 * np.sin(5.0 * after)
    bvh = Bvh(positions, indices, "cpu")
    nodes = bvh.accel.nodes
    bvh.refit(after)
    assert (bvh.accel.nodes == nodes) == (change == "a little")
    n = 5000
    o = wp.array(rng.uniform(-1.5, 1.5, (n, 3)).astype(np.float32), dtype=wp.vec3, device="cpu")
    d = rng.normal(size=(n, 3))
    d = wp.array((d / np.linalg.norm(d, axis=1, keepdims=True)).astype(np.float32), dtype=wp.vec3, device="cpu")
    found = []
    for tree in (bvh, Bvh(after, indices, "cpu")):
        out = wp.zeros(n, dtype=Hit, device="cpu")
        launch(closest, n, inputs=[tree.accel, o, d], outputs=[out], device=out.device)
        found.append(out.numpy())
    assert (found[0]["face"] >= 0).sum() > 500
    np.testing.assert_array_equal(found[0]["face"], found[1]["face"])
    np.testing.assert_array_equal(found[0]["t"], found[1]["t"])


def test_refit_rejects_another_number_of_vertices():
    """Fewer vertices than the triangles refer to."""
    positions, indices = soup(10, RNG)
    with pytest.raises(ValueError, match="indices must be in"):
        Bvh(positions, indices, "cpu").refit(positions[:-3])


def test_object_space_records_stay_with_what_moves():
    """Records of a moved object have its place at rest, those in world space its present one; queries likewise."""
    first = DeviceScene(scene(), "cpu")
    seen = {}
    for space in ("world", "object"):
        renderer = Renderer(first.scene, 48, 32, config(integrator="cache", record_space=space), device="cpu")
        renderer.set_scene(moved_on(first.scene))
        renderer.frame()
        n = int(renderer.tracer.n_queries.numpy()[0])
        seen[space] = renderer.tracer.queries.position.numpy()[:n]
    moved = np.abs(seen["world"] - seen["object"]).max(axis=1) > 1e-6
    assert 0.02 < moved.mean() < 0.9
    lower, upper = first.bounds
    assert (seen["object"] > lower - 1e-3).all() and (seen["object"] < upper + 1e-3).all()


@pytest.mark.gpu
def test_instances_on_cuda_equal_the_cpu():
    """First hits of the moved and refitted scene on both devices."""
    layers = []
    for device in ("cpu", "cuda:0"):
        uploaded = DeviceScene(scene(), device)
        layers.append(Renderer(uploaded.replaced(moved_on(uploaded.scene)), 96, 64, config()).aovs())
    for name in ("normal", "depth", "position"):
        difference = np.abs(layers[0][name] - layers[1][name]).reshape(96 * 64, -1).max(axis=1)
        assert (difference < 2e-3).mean() > 1.0 - FRACTION_OF_EDGES, name


def test_broken_instances_are_refused():
    """A mesh that does not exist, and matrices that are not affine or not finite."""
    base = scene()
    with pytest.raises(ValueError, match="instance 'x': mesh 3 of 3 does not exist"):
        replace(base, instances=(Instance(3, np.eye(4), "x"),))
    for matrix in (np.eye(3), np.full((4, 4), np.nan), np.ones((4, 4))):
        with pytest.raises(ValueError, match="instance 'x': to_world must be a finite affine"):
            Instance(0, matrix, "x")


def test_instance_beyond_single_precision_is_refused():
    """Its boxes would be infinite."""
    base = scene()
    huge = Instance(1, np.diag([1e39, 1e39, 1e39, 1.0]), "x")
    with pytest.raises(ValueError, match=r"instance 'x': reaches beyond 1e\+37"):
        DeviceScene(replace(base, instances=(*base.instances, huge)), "cpu")


def test_hierarchy_over_huge_coordinates_is_built():
    """Sums of two corners overflow single precision; every triangle is still in the hierarchy."""
    positions, indices = soup(300, np.random.default_rng(1))
    tree = Bvh(positions * np.float32(3e38 / np.abs(positions).max()), indices, "cpu")
    faces = tree._blocks[:, 9 * WIDTH :].view(np.int32)
    assert sorted(faces[faces >= 0]) == list(range(300))


def test_bounds_hold_every_vertex():
    """The scene's box with instances contains that of the flattened scene, and equals it without turns."""
    two_level = scene()
    lower, upper = two_level.bounds
    flat_lower, flat_upper = flatten(two_level).bounds
    assert (lower <= flat_lower + 1e-6).all() and (upper >= flat_upper - 1e-6).all()
    mesh = transform_mesh(Mesh(*soup(5, RNG), material=0), np.eye(4))
    shifted = Scene((mesh,), (GREY,), two_level.camera, instances=(Instance(0, placed(at=(1.0, 2.0, 3.0))),))
    np.testing.assert_allclose(shifted.bounds, mesh.box + np.array([1.0, 2.0, 3.0]), atol=1e-6)


def test_instance_bvh_reserves_nothing_for_what_it_lacks():
    """An `Accel` without instances keeps its zeros; one with them has nodes on the CPU only."""
    accel = Accel()
    assert accel.instance_nodes == 0 and accel.instance_bvh == 0
    bvh = InstanceBvh(np.array([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]), "cpu")
    bvh.fill(accel)
    assert accel.instance_nodes != 0 and accel.instance_bvh == 0 and InstanceView().nodes == 0
