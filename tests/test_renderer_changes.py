"""A renderer changed in place: other size, settings, camera, scene and split; the cache stays. And what a ray picks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from small_scenes import config, floor, moved, shape
from test_renderer import CACHE, bits, frames, renderer_of

from nrc import assets
from nrc.assets import shapes
from nrc.cache import CacheConfig, RadianceCache
from nrc.debug_views import debug_views
from nrc.renderer import Renderer
from nrc.scene import Camera, Material, Mesh, Scene
from nrc.snapshot import SnapshotError


def learned(renderer: Renderer) -> dict[str, bytes]:
    """The cache's state, also while the path integrator rests it."""
    assert renderer._learned is not None
    return bits(renderer._learned.state())


def last_frame(renderer: Renderer) -> bytes:
    return renderer.film.frame.numpy().tobytes()


# --- size ------------------------------------------------------------------------------------------------------------


def test_resized_renderer_renders_as_one_of_that_size():
    """Path tracing: the next frame is bit for bit that of a renderer made so, and the film holds it alone."""
    renderer = frames(renderer_of(size=16, integrator="path"), 2)
    renderer.resize(20, 12)
    renderer.frame()
    other = Renderer(assets.load("cornell_box"), 20, 12, renderer.config, device="cpu")
    other.frame_index = 2
    other.frame()
    assert renderer.image().shape == (12, 20, 3) and renderer.film.n_frames == 1
    assert renderer.image().tobytes() == other.image().tobytes()


def test_resizing_keeps_the_cache():
    """Weights, moments and counters bit for bit; it goes on learning at every size, and a shrink keeps its buffers."""
    renderer = frames(renderer_of(size=16), 3)
    cache = renderer.cache
    assert cache is not None
    for size in ((48, 40), (8, 8), (16, 16)):
        before = learned(renderer)
        room = cache.max_queries, cache.max_records
        renderer.resize(*size)
        assert renderer.cache is cache and learned(renderer) == before
        assert cache.max_queries >= max(room[0], size[0] * size[1]) and cache.max_records >= room[1]
        assert renderer.frame_index == 3 if size == (48, 40) else renderer.frame_index > 3
        frames(renderer, 2)
        assert learned(renderer) != before and np.isfinite(renderer.image()).all()
    assert {view.shape[:2] for view in debug_views(renderer).values()} == {(16, 16)}
    assert renderer.aovs()["depth"].shape == (16, 16)


def test_size_does_not_leave_traces():
    """There and back: the next frames are those of a renderer that never was of another size."""
    ours, other = frames(renderer_of(), 3), frames(renderer_of(), 3)
    ours.resize(40, 30)
    ours.resize(16, 16)
    other.restart()
    assert bits(frames(ours, 3).state()) == bits(frames(other, 3).state())


def test_invalid_size_changes_nothing():
    """The renderer goes on as it was."""
    renderer = frames(renderer_of(), 2)
    before = bits(renderer.state())
    with pytest.raises(ValueError, match="positive"):
        renderer.resize(0, 10)
    assert bits(renderer.state()) == before
    renderer.frame()


# --- settings --------------------------------------------------------------------------------------------------------


def test_cache_rests_while_paths_are_followed():
    """nrc, then path, then cache: weights and counters wait, and the path frames are the path integrator's."""
    renderer = frames(renderer_of(), 3)
    before = learned(renderer)
    renderer.set_config(replace(renderer.config, integrator="path"))
    assert renderer.cache is None
    with pytest.raises(ValueError, match="path"):
        debug_views(renderer)
    frames(renderer, 2)
    path = renderer_of(integrator="path")
    path.frame_index = 3
    assert renderer.image().tobytes() == frames(path, 2).image().tobytes()
    renderer.set_config(replace(renderer.config, integrator="cache"))
    assert learned(renderer) == before and renderer.cache is not None
    assert frames(renderer, 2).film.n_frames == 2 and learned(renderer) != before
    assert debug_views(renderer)["cache"].shape == (16, 16, 3)


def test_cache_is_made_when_it_is_first_needed():
    """A path tracer that turns to the cache renders what one made for the cache does."""
    renderer = frames(renderer_of(integrator="path"), 2)
    assert renderer._learned is None
    renderer.set_config(replace(renderer.config, integrator="nrc"))
    other = renderer_of()
    other.frame_index = 2
    assert bits(frames(renderer, 3).state()) == bits(frames(other, 3).state())


def test_settings_of_the_tracer_take_effect():
    """Threshold and depth of a renderer made so, on the cache as it is."""
    renderer = renderer_of()
    changed = replace(renderer.config, spread_threshold=math.inf, max_depth=3)
    renderer.set_config(changed)
    other = renderer_of(spread_threshold=math.inf, max_depth=3)
    assert bits(frames(renderer, 2).state()) == bits(frames(other, 2).state())
    assert renderer.config is changed


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 1e-3}, {"n_batches": 2}, {"batch_size": 64}, {"seed": 5}, {"ema_decay": 0.9}, {"beta2": 0.999}],
    ids=str,
)
@pytest.mark.parametrize("integrator", ["nrc", "path"])
def test_what_was_learned_survives_other_training_settings(changes, integrator):
    """Weights and moments bit for bit, and the answers too; the settings hold from the next frame on."""
    renderer = frames(renderer_of(), 5)
    if integrator == "path":
        renderer.set_config(replace(renderer.config, integrator="path"))
    before, age = learned(renderer), renderer._cache_age
    average = renderer._learned.trainer.ema_params.numpy().copy()
    renderer.set_cache_config(replace(CACHE, **changes))
    after = learned(renderer)
    same = {name for name in before if before[name] == after[name]}
    assert {"scale", "round", "trainer.params", "trainer.moments", "trainer.steps", "trainer.counters"} <= same
    if "ema_decay" not in changes:
        assert same == before.keys()
    assert np.allclose(renderer._learned.trainer.ema_params.numpy(), average, rtol=1e-6, atol=1e-9)
    assert renderer._cache_age == age == 5 and renderer.cache_config == replace(CACHE, **changes)
    renderer.set_config(replace(renderer.config, integrator="nrc"))
    frames(renderer, 1)
    assert learned(renderer) != after and renderer.film.n_frames == 1
    assert np.isfinite(renderer._learned.trainer.ema_params.numpy()).all()


@pytest.mark.parametrize(
    "changes",
    [{"log2_hashmap_size": 13}, {"n_neurons": 32}, {"per_level_scale": 1.9}, {"encoding": "frequency"}],
    ids=str,
)
def test_what_means_something_else_starts_empty(changes):
    """Another encoding or network, also one whose arrays happen to have the same shapes: a fresh cache, wholly."""
    renderer = frames(renderer_of(), 3)
    renderer.set_cache_config(replace(CACHE, **changes))
    fresh = RadianceCache(renderer.scene.bounds, replace(CACHE, **changes), max_queries=4, max_records=4, device="cpu")
    assert learned(renderer) == bits(fresh.state()) and renderer._cache_age == 0
    frames(renderer, 2)


def test_invalid_cache_settings_change_nothing():
    """A width that no network has: ValueError, and the cache is the one before."""
    renderer = frames(renderer_of(), 2)
    before = bits(renderer.state())
    with pytest.raises(ValueError):
        renderer.set_cache_config(replace(CACHE, n_neurons=17))
    assert bits(renderer.state()) == before and renderer.cache_config == CACHE
    renderer.frame()


def test_clamp_survives_every_change():
    """It is a setting of the film, which is replaced."""
    renderer = Renderer(assets.load("cornell_box"), 8, 8, config(), clamp=2.0, device="cpu")
    renderer.resize(9, 8)
    renderer.set_config(config(max_depth=4))
    assert renderer.film.clamp == 2.0


# --- camera and scene ------------------------------------------------------------------------------------------------


def test_camera_stays_through_other_changes():
    """Set once, it is looked through after a resize and other settings; a scene brings its own."""
    scene = assets.load("cornell_box")
    camera = Camera.look_at((0.3, 1.2, 2.0), (0.0, 1.0, 0.0), fov=50.0)
    renderer = frames(renderer_of(scene, integrator="path"), 1)
    renderer.set_camera(camera)
    assert renderer.film.n_frames == 0
    renderer.resize(12, 10)
    renderer.set_config(replace(renderer.config, max_depth=4))
    other = Renderer(replace(scene, camera=camera), 12, 10, renderer.config, device="cpu")
    other.frame_index = renderer.frame_index
    assert frames(renderer, 1).image().tobytes() == frames(other, 1).image().tobytes()
    assert renderer.aovs()["depth"].tobytes() == other.aovs()["depth"].tobytes()
    renderer.set_scene(scene)
    assert renderer.camera is scene.camera


def test_host_scene_shares_the_uploaded_geometry():
    """`set_scene` with other materials renders as a renderer of that scene, on the same hierarchy."""
    scene = assets.load("cornell_box")
    red = replace(scene, materials=tuple(replace(m, base_color=(0.6, 0.1, 0.1)) for m in scene.materials))
    renderer = frames(renderer_of(scene, integrator="path"), 2)
    bvh = renderer.scene.bvh
    renderer.set_scene(red)
    other = renderer_of(red, integrator="path")
    other.frame_index = 2
    assert renderer.scene.bvh is bvh and renderer.scene.scene is red
    assert frames(renderer, 1).image().tobytes() == frames(other, 1).image().tobytes()


# --- split -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["nrc", "cache"])
def test_split_over_the_whole_picture_is_path_tracing(integrator):
    """split = width: the path integrator's frames bit for bit, and the cache is not asked."""
    ours, path = renderer_of(integrator=integrator), renderer_of(integrator="path")
    ours.train = False
    ours.split = 16
    for _ in range(3):
        ours.frame()
        path.frame()
        assert last_frame(ours) == last_frame(path)
        assert ours.tracer.query_vertex.numpy().max() == 0
    assert ours.image().tobytes() == path.image().tobytes()


def test_split_divides_the_picture():
    """Left of it the path integrator's pixels, also while the cache learns; right of it those without a split."""
    ours, path, whole = renderer_of(), renderer_of(integrator="path"), renderer_of()
    for renderer in (ours, whole):
        frames(renderer, 3)
        renderer.train = False
    path.frame_index = 3
    ours.split = 6
    ours.cache.load_state(whole.cache.state())
    frames(ours, 1)
    whole.restart()
    frames(whole, 1)
    frames(path, 1)
    assert ours.film.n_frames == 1
    left = ours.film.frame.numpy().reshape(16, 16, 3)
    assert np.array_equal(left[:, :6], path.film.frame.numpy().reshape(16, 16, 3)[:, :6])
    assert np.array_equal(left[:, 6:], whole.film.frame.numpy().reshape(16, 16, 3)[:, 6:])
    ours.train = True
    before = learned(ours)
    path.frame()
    ours.frame()
    assert np.array_equal(
        ours.film.frame.numpy().reshape(16, 16, 3)[:, :6], path.film.frame.numpy().reshape(16, 16, 3)[:, :6]
    )
    assert learned(ours) != before and ours.n_records > 0


def test_no_split_changes_nothing():
    """0 is the default; set and taken back it leaves pictures, weights and counters as they were."""
    ours, other = renderer_of(), renderer_of()
    assert ours.split == 0
    ours.split = 5
    ours.split = 0
    assert bits(frames(ours, 4).state()) == bits(frames(other, 4).state())


# --- a cache from a file ---------------------------------------------------------------------------------------------


def test_renderer_goes_on_with_a_saved_cache(tmp_path):
    """What another renderer learned, with its settings; a broken file changes nothing."""
    teacher = frames(renderer_of(cache=CacheConfig(batch_size=64, learning_rate=3e-3)), 4)
    path = tmp_path / "cache.safetensors"
    teacher.cache.save(path)
    renderer = frames(renderer_of(size=24), 2)
    assert renderer.load_cache(path) == teacher.cache_config == renderer.cache_config
    assert learned(renderer) == learned(teacher) and renderer._cache_age == 4
    frames(renderer, 2)
    before = bits(renderer.state())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SnapshotError, match=r"cache\.safetensors"):
        renderer.load_cache(path)
    assert bits(renderer.state()) == before


# --- picking ---------------------------------------------------------------------------------------------------------

EMPTY = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32), 0, name="empty")


def three_objects(**camera) -> Scene:
    """Floor (mesh 1) and two balls (3 and 4) among meshes without triangles, against nothing."""
    balls = [shape(shapes.sphere(12, 24), i, moved((x, 0.5, 0.0), 0.5)) for i, x in ((2, -0.7), (1, 0.7))]
    materials = (Material(), Material(base_color=(0.8, 0.2, 0.2)), Material(kind="dielectric"))
    view = Camera.look_at((0.4, 1.5, 4.0), (0.0, 0.3, 0.0), fov=50.0, **camera)
    return Scene((EMPTY, floor(0, 1.5), EMPTY, *balls), materials, view)


def test_object_ids_are_the_scenes_meshes():
    """Meshes without triangles count; -1 where nothing is hit; the material is the mesh's."""
    scene = three_objects()
    layers = renderer_of(scene, 24, integrator="path").aovs()
    ids = layers["object_id"].astype(int)
    assert set(np.unique(ids)) == {-1, 1, 3, 4}
    assert np.array_equal(ids == -1, layers["depth"] == 0.0)
    material = np.array([mesh.material for mesh in scene.meshes])
    assert np.array_equal(layers["material_id"][ids >= 0], material[ids[ids >= 0]])


@pytest.mark.parametrize("lens", [{}, {"aperture_radius": 0.1, "focus_distance": 3.0}], ids=["pinhole", "lens"])
@pytest.mark.parametrize("integrator", ["path", "nrc"])
def test_pick_agrees_with_the_layers(lens, integrator):
    """Through the centre of every pixel, after a resize and another camera."""
    scene = three_objects()
    renderer = renderer_of(scene, 8, integrator=integrator)
    renderer.resize(14, 10)
    renderer.set_camera(three_objects(**lens).camera)
    layers = renderer.aovs()
    frame_before = bits(renderer.state())
    n_hits = 0
    for row, column in np.ndindex(10, 14):
        pick = renderer.pick((column + 0.5) / 14, (row + 0.5) / 10)
        if pick is None:
            assert layers["object_id"][row, column] == -1
            continue
        n_hits += 1
        assert (pick.mesh, pick.material) == (layers["object_id"][row, column], layers["material_id"][row, column])
        assert np.allclose(pick.position, layers["position"][row, column], atol=1e-4)
        assert np.allclose(pick.normal, layers["normal"][row, column], atol=1e-3)
        assert pick.depth == pytest.approx(layers["depth"][row, column], rel=1e-4)
    assert 20 < n_hits < 140
    assert bits(renderer.state()) == frame_before
