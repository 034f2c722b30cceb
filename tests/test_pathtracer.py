"""The path tracer: furnaces, an independent oracle, and what it hands to the cache (design: the cache's contracts)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import warp as wp
from reference_pathtracer import trace as trace_slowly
from small_scenes import (
    config,
    floor,
    furnace,
    in_white,
    looking_down,
    mean_and_error,
    moved,
    rectangle,
    render_batches,
    shape,
    welch_t,
)

from nrc import assets
from nrc.assets import shapes
from nrc.device_scene import DeviceScene
from nrc.pathtracer import PathTracer, PathTracerConfig
from nrc.scene import Camera, DirectionalLight, Environment, Material, Scene

ERRORS = 4.5  # standard errors that a Monte Carlo mean may be off: one in 150 000 by chance
MIRROR = Material(name="mirror", kind="conductor")  # eta 0, k 1: reflects everything


def tracer_of(scene: Scene, width: int = 16, height: int = 16, *, box=None, n_paths: int = 64, **options) -> PathTracer:
    settings = config(**{"integrator": "nrc", **options})
    return PathTracer(DeviceScene(scene, "cpu"), width, height, settings, max_training_paths=n_paths, box=box)


def queries_of(tracer: PathTracer) -> dict[str, np.ndarray]:
    """The frame's query records as arrays, with the pixel each is of."""
    n = int(tracer.n_queries.numpy()[0])
    asked = np.flatnonzero(tracer.query_vertex.numpy())
    assert len(asked) == n and np.array_equal(tracer.query_place.numpy()[asked], np.arange(n))
    fields = ("position", "wo", "normal", "roughness", "diffuse", "specular")
    return {"pixel": asked, **{name: getattr(tracer.queries, name).numpy()[:n] for name in fields}}


def records_of(tracer: PathTracer, tail: float = 0.0) -> dict[str, np.ndarray]:
    """The frame's training records with targets, every tail answered by `tail`."""
    tracer.gather_targets(wp.full((tracer.tails.capacity, 3), tail, dtype=float, device="cpu"))
    n = int(tracer.n_records.numpy()[0])
    fields = {"position": tracer.records.position, "diffuse": tracer.records.diffuse, "target": tracer.targets}
    fields |= {"index": tracer.vertex_index, "slot": tracer.record_slot, "normal": tracer.records.normal}
    return {name: array.numpy()[:n] for name, array in fields.items()}


# --- pictures --------------------------------------------------------------------------------------------------------


def test_furnace_is_one():
    """A closed sphere that reflects and emits 0.5 shows 1 everywhere, at unlimited depth and through roulette."""
    batches = render_batches(furnace(), 16, 16, 32, 16, rr_depth=3)
    mean, error = mean_and_error(batches)
    assert abs(mean - 1.0) < ERRORS * error
    assert error < 1e-3
    t = (batches.mean(axis=0) - 1.0) / (batches.std(axis=0, ddof=1) / math.sqrt(32))
    assert np.abs(t).max() < 5.5  # Student, 31 degrees of freedom, 768 channels


@pytest.mark.parametrize("max_depth", [1, 2, 3, 7])
def test_furnace_of_limited_depth(max_depth):
    """d edges collect Le (1 + ρ + … + ρ^(d-1))."""
    mean, error = mean_and_error(render_batches(furnace(), 16, 16, 16, 16, max_depth=max_depth, rr_depth=100))
    assert abs(mean - (1.0 - 0.5**max_depth)) < ERRORS * error + 1e-6


LOSSLESS = {
    "mirror": MIRROR,
    "dielectric": Material(kind="dielectric", ior=1.5),
    "thin dielectric": Material(kind="thin_dielectric", ior=1.5),
    "white": Material(base_color=(1, 1, 1), two_sided=True),
}
LOSSY = {
    "conductor ggx": replace(MIRROR, roughness=(0.6, 0.6)),
    "conductor beckmann": replace(MIRROR, roughness=(0.6, 0.3), distribution="beckmann"),
    "dielectric ggx": Material(kind="dielectric", ior=1.5, roughness=(0.5, 0.5)),
    "plastic": Material(kind="plastic", base_color=(1, 1, 1), ior=1.5),
    "plastic rough": Material(kind="plastic", base_color=(1, 1, 1), ior=1.5, roughness=(0.4, 0.4), nonlinear=True),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_furnace_of_lossless_materials(name):
    """In light of the same radiance from everywhere a surface that absorbs nothing is invisible.

    Flat facets: with interpolated normals a few reflections go below the facet and are lost. Late roulette: light that
    is caught in the glass for hundreds of bounces comes out of few paths with large weights.
    """
    batches = render_batches(in_white(LOSSLESS[name], flat=True), 16, 16, 16, 32, rr_depth=1000)
    mean, error = mean_and_error(batches)
    assert abs(mean - 1.0) < ERRORS * error + 1e-5
    assert error < 1e-4 or name == "white"  # of these only the diffuse one has noise


@pytest.mark.parametrize("name", LOSSY)
def test_furnace_of_lossy_materials(name):
    """Single-scattering microfacets and coats lose a little energy and gain none."""
    mean, error = mean_and_error(render_batches(in_white(LOSSY[name]), 16, 16, 16, 32, rr_depth=20))
    assert 0.8 < mean < 1.0 + ERRORS * error


def diffuse_room() -> Scene:
    """Two boxes on a floor under a lamp and a dim sky, everything diffuse."""
    materials = (
        Material(base_color=(0.6, 0.5, 0.4), two_sided=True),
        Material(base_color=(0.3, 0.6, 0.7), two_sided=True),
        Material(base_color=(0.2, 0.2, 0.2), emission=(3.0, 2.5, 2.0), two_sided=True),
    )
    meshes = (
        rectangle(0, (0, 0, 0), (1.5, 0, 0), (0, 0, -1.5)),
        rectangle(1, (0, 1, -1.5), (1.5, 0, 0), (0, 1, 0)),
        shape(shapes.cube(), 1, moved((-0.4, 0.3, 0.2), 0.3), flat=True),
        rectangle(2, (0.3, 1.8, 0), (0.7, 0, 0), (0, 0.2, 0.7)),
    )
    camera = Camera.look_at((0, 1.2, 4), (0, 0.8, 0), fov=40.0)
    return Scene(meshes, materials, camera, environment=Environment.constant((0.2, 0.25, 0.3)))


@pytest.mark.slow
@pytest.mark.parametrize("max_depth", [2, 5])
def test_picture_matches_readable_twin(max_depth):
    """Light sampling, MIS and roulette change the noise, not the picture: a tracer without any of them agrees."""
    scene, n_batches = diffuse_room(), 24
    twin = np.array([trace_slowly(scene, 12, 12, 32, max_depth, seed) for seed in range(n_batches)])
    ours = render_batches(scene, 12, 12, n_batches, 32, max_depth=max_depth, rr_depth=1)
    assert np.abs(welch_t(ours.mean(axis=(1, 2)), twin.mean(axis=(1, 2)))).max() < ERRORS
    assert np.mean(np.abs(welch_t(ours, twin)) <= 3.5) >= 0.997  # 0.1 % by chance, 46 degrees of freedom
    assert np.median(ours.std(axis=0)) < 0.7 * np.median(twin.std(axis=0))  # and it does lower the noise


def test_roulette_keeps_the_mean():
    """Roulette from the first bounce on, and none at all, agree."""
    scene = diffuse_room()
    early, late = (render_batches(scene, 12, 12, 32, 32, max_depth=12, rr_depth=d) for d in (1, 100))
    assert np.abs(welch_t(early.mean(axis=(1, 2)), late.mean(axis=(1, 2)))).max() < ERRORS


def test_thin_lens_blurs_to_a_disk_of_the_right_size():
    """A small spot at depth z has a circle of confusion of radius R |1/f - 1/z| on the image plane at distance 1."""
    radius, focus, z, half_spot = 0.2, 2.0, 5.0, 0.05
    spot = rectangle(0, (0, 0, -z), (half_spot, 0, 0), (0, half_spot, 0))
    lamp = Material(base_color=(0, 0, 0), emission=(1.0, 1.0, 1.0))
    camera = Camera.look_at((0, 0, 0), (0, 0, -1), fov=12.0, aperture_radius=radius, focus_distance=focus)
    size = 64
    picture = render_batches(Scene((spot,), (lamp,), camera), size, size, 1, 400, max_depth=1)[0, :, :, 0]
    half = math.tan(math.radians(6.0))
    x = ((np.arange(size) + 0.5) / size * 2.0 - 1.0) * half
    r2 = x[None, :] ** 2 + x[:, None] ** 2
    blur, pixel = radius * abs(1.0 / focus - 1.0 / z), 2.0 * half / size
    assert math.sqrt(r2[picture > 0.0].max()) < blur + math.sqrt(2.0) * half_spot / z + 2.0 * pixel
    # Mean r²: R² / 2 of a uniform disk, and the variances of the square spot and of a pixel; 15 000 hits leave 0.5 %.
    expected = blur**2 / 2.0 + 2.0 / 3.0 * (half_spot / z) ** 2 + pixel**2 / 6.0
    assert np.sum(r2 * picture) / picture.sum() == pytest.approx(expected, rel=0.03)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"integrator": "bdpt"},
        {"max_depth": 0},
        {"max_depth": -2},
        {"rr_depth": 0},
        {"spread_threshold": -1.0},
        {"spread_threshold": math.nan},
        {"min_spread": -0.1},
        {"max_records": 0},
        {"continuation": -0.1},
        {"continuation": 1.5},
        {"unbiased_fraction": -0.1},
        {"unbiased_fraction": 1.1},
    ],
)
def test_config_rejects(options):
    """Each wrong setting is named in the message."""
    with pytest.raises(ValueError, match=next(iter(options))):
        PathTracerConfig(**options)


def test_size_must_be_positive():
    """No picture of zero pixels."""
    with pytest.raises(ValueError, match="0x4"):
        tracer_of(furnace(), 0, 4)


@pytest.mark.parametrize("size", [(16, 16), (37, 5), (1, 50), (640, 360), (9, 9)])
@pytest.mark.parametrize("n_paths", [1, 7, 64, 10_000])
def test_tiles_cover_the_picture_within_the_budget(size, n_paths):
    """No more tiles than training paths, and no pixel outside them."""
    tracer = PathTracer(
        DeviceScene(furnace(n_theta=4), "cpu"), *size, config(integrator="nrc"), max_training_paths=4000
    )
    tile_width, tile_height = tracer.tile_size(n_paths)
    assert 1 <= tile_width <= size[0] and 1 <= tile_height <= size[1]
    n_tiles = -(-size[0] // tile_width) * -(-size[1] // tile_height)
    assert n_tiles <= min(n_paths, 4000, size[0] * size[1])
    assert n_tiles >= 0.3 * min(n_paths, size[0] * size[1], 4000)


# --- where paths end in the cache ------------------------------------------------------------------------------------


def two_planes() -> Scene:
    """A floor and a wall that meet; what the floor reflects towards the wall reaches it."""
    grey = Material(base_color=(0.5, 0.5, 0.5), two_sided=True)
    meshes = (rectangle(0, (0, 0, 0), (4, 0, 0), (0, 0, -4)), rectangle(0, (0, 4, -1), (4, 0, 0), (0, 4, 0)))
    return Scene(meshes, (grey,), Camera.look_at((0, 2, 3), (0, 0, 0.5), fov=15.0))


def spread_at_the_wall(queries: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area spread of `two_planes`' queries by hand, the footprint, and where rounding of the origins allows it."""
    x2, back = queries["position"].astype(np.float64), queries["wo"].astype(np.float64)
    on_wall = np.abs(x2[:, 2] + 1.0) < 1e-4
    assert on_wall.sum() > 100
    x1 = x2 + back * (-x2[:, 1] / back[:, 1])[:, None]  # where the edge leaves the floor y = 0
    first = np.linalg.norm(x1 - [0, 2, 3], axis=1)
    cos_first = 2.0 / first
    footprint = first**2 / (4.0 * np.pi * cos_first)
    length = np.linalg.norm(x1 - x2, axis=1)
    pdf = -back[:, 1] / np.pi
    spread = length**2 / (pdf * np.abs(back[:, 2]))
    # Rays start 4e-4 off the surface, by which x1 is off at right angles and more at grazing ones.
    keep = on_wall & (np.minimum(np.abs(back[:, 2]), -back[:, 1]) > 0.1) & (length > 0.5)
    assert keep.sum() > 100
    return spread, footprint, keep


def test_spread_matches_hand_computation():
    """At the second vertex: |x1 - x2|² / (p cos θ2) over |x0 - x1|² / (4π cos θ1), p = cos θ / π (Eqs. 3-4)."""
    tracer = tracer_of(two_planes(), 32, 32, spread_threshold=0.0)
    tracer.trace(0)
    queries = queries_of(tracer)
    assert (tracer.query_vertex.numpy()[queries["pixel"]] == 2).all()  # never the first vertex in nrc mode
    spread, footprint, keep = spread_at_the_wall(queries)
    ours = tracer.query_spread.numpy()[queries["pixel"]]
    assert np.allclose(ours[keep], (spread / footprint)[keep], rtol=1e-2)


@pytest.mark.parametrize("min_spread", [0.6, 1.2])
def test_paths_end_where_they_have_spread_over_a_minimum(min_spread):
    """The second vertex is asked exactly where the root of its hand-computed spread is above a fraction of the box."""
    scene = two_planes()
    tracer, limited = (tracer_of(scene, 32, 32, spread_threshold=0.0, min_spread=s) for s in (0.0, min_spread))
    for one in (tracer, limited):
        one.trace(0)
    queries = queries_of(tracer)
    spread, _, keep = spread_at_the_wall(queries)
    wide = np.sqrt(spread) / (8.0 * min_spread)  # the longest side is 8
    keep &= np.abs(wide - 1.0) > 0.02
    asked = limited.query_vertex.numpy()[queries["pixel"]] == 2
    assert 20 < (wide > 1.0)[keep].sum() < keep.sum() - 20
    assert np.array_equal(asked[keep], (wide > 1.0)[keep])


def test_paths_end_where_the_spread_exceeds_the_threshold():
    """Every query's spread is above the threshold; a higher threshold lets paths go on."""
    scene = furnace()
    mean_vertex = []
    for threshold in (0.0, 100.0, 1000.0):
        tracer = tracer_of(scene, spread_threshold=threshold, max_depth=6, rr_depth=100)
        tracer.trace(0)
        pixel = queries_of(tracer)["pixel"]
        assert len(pixel) > 200 and (tracer.query_spread.numpy()[pixel] > threshold).all()
        mean_vertex.append(tracer.query_vertex.numpy()[pixel].mean())
        assert tracer.query_vertex.numpy().max() <= 5  # the last vertex only shows its emission
    assert mean_vertex[0] == 2.0 and mean_vertex[0] < mean_vertex[1] < mean_vertex[2]


def test_cache_mode_asks_the_first_vertex():
    """Before any light sampling: the throughput is 1 and the path itself found only the emission of what it sees."""
    light = DirectionalLight((0, -1, 0), (1, 1, 1))
    lamp = Material(base_color=(0.5, 0.5, 0.5), emission=(0.25, 0.5, 1.0))
    scene = looking_down(floor(), materials=(lamp,), lights=(light,))
    tracer = tracer_of(scene, 8, 8, integrator="cache")
    tracer.trace(0)
    assert np.array_equal(tracer.query_vertex.numpy(), np.ones(64))
    assert np.array_equal(tracer.query_weight.numpy(), np.ones((64, 3)))
    assert np.array_equal(tracer.radiance.numpy(), np.tile(np.float32([0.25, 0.5, 1.0]), (64, 1)))
    queries = queries_of(tracer)
    assert np.allclose(queries["normal"], [0, 1, 0], atol=1e-6)
    assert np.allclose(queries["position"][:, 1], 0.0, atol=1e-6)
    assert (
        (queries["roughness"] == 1.0).all() and (queries["diffuse"] == 0.5).all() and (queries["specular"] == 0).all()
    )


@pytest.mark.parametrize("integrator", ["nrc", "cache"])
def test_delta_bounces_make_no_record_and_add_no_spread(integrator):
    """Behind a mirror the wall counts as if it were seen: asked in cache mode, one more bounce away in nrc mode."""
    grey = Material(base_color=(0.5, 0.5, 0.5), two_sided=True)
    room = shape(shapes.cube(), 0, moved(scale=4.0), flip=True, flat=True)
    mirror = rectangle(1, (0, 0, -2), (3, 0, 0), (0, 3, 0))
    scene = Scene((room, mirror), (grey, MIRROR), Camera.look_at((0, 0, 2), (0, 0, -2), fov=30.0))
    tracer = tracer_of(scene, integrator=integrator, spread_threshold=0.0, rr_depth=100, unbiased_fraction=0.0)
    tracer.trace(3, n_training_paths=64)
    vertex = tracer.query_vertex.numpy()
    # camera, mirror (vertex 1), wall (vertex 2); only a bounce off the wall (vertex 3) has spread
    if integrator == "cache":
        assert (vertex == 2).all()
    else:
        assert (vertex >= 3).all() and (vertex == 3).mean() > 0.6  # more where that bounce meets the mirror again
    assert np.array_equal(tracer.radiance.numpy(), np.zeros((256, 3)))
    for points in (queries_of(tracer)["position"], records_of(tracer)["position"]):
        assert len(points) > 0
        on_mirror = (np.abs(points[:, 2] + 2) < 1e-3) & (np.abs(points[:, :2]).max(axis=1) < 3.0)
        assert not on_mirror.any()


@pytest.mark.parametrize("integrator", ["nrc", "cache"])
def test_positions_outside_the_box_are_traced_on(integrator):
    """With a box around half the room no query, tail or record lies outside, and those paths go on instead."""
    scene = assets.load("cornell_box")
    box = (np.array([-1.0, 0.0, -1.0]), np.array([0.0, 2.0, 1.0]))
    options = {"integrator": integrator, "max_depth": 8}
    tracer, everywhere = tracer_of(scene, 24, 24, box=box, **options), tracer_of(scene, 24, 24, **options)
    for frame in range(4):
        for each in (tracer, everywhere):
            each.trace(frame, n_training_paths=64)
        n_tails = int(tracer.n_tails.numpy()[0])
        found = [queries_of(tracer)["position"], records_of(tracer)["position"]]
        found.append(tracer.tails.position.numpy()[:n_tails])
        for points in found:
            assert len(points) > 0
            assert (points >= box[0] - 0.003).all() and (points <= box[1] + 0.003).all()  # the margin is 0.002
        assert len(found[0]) < 0.8 * len(queries_of(everywhere)["position"])
        moved_on = (tracer.query_vertex.numpy() != everywhere.query_vertex.numpy()).reshape(24, 24)
        assert moved_on[:, 14:].mean() > 2.0 * moved_on[:, :10].mean()


def test_infinite_threshold_is_path_tracing():
    """No path ends in the cache, and every path's radiance is the path integrator's, bit for bit."""
    scene = DeviceScene(assets.load("cornell_box"), "cpu")
    ours = PathTracer(scene, 24, 24, config(integrator="nrc", spread_threshold=math.inf), max_training_paths=64)
    path = PathTracer(scene, 24, 24, config())
    for frame in range(3):
        ours.trace(frame, n_training_paths=64)
        path.trace(frame)
        assert np.array_equal(ours.radiance.numpy(), path.radiance.numpy())
        assert int(ours.n_queries.numpy()[0]) == 0 and path.radiance.numpy().max() > 0.0


@pytest.mark.parametrize("integrator", ["nrc", "cache"])
def test_training_does_not_change_the_picture(integrator):
    """What a training path does behind its query vertex leaves radiance, throughput and queries as they were."""
    scene = assets.load("cornell_box")
    with_training, without = (tracer_of(scene, 24, 24, integrator=integrator, max_depth=10) for _ in range(2))
    for frame in range(3):
        with_training.trace(frame, n_training_paths=64)
        without.trace(frame)
        assert with_training.n_training_paths > 0 and without.n_training_paths == 0
        for name in ("radiance", "query_vertex", "query_weight", "query_place"):
            assert np.array_equal(getattr(with_training, name).numpy(), getattr(without, name).numpy()), name
        a, b = queries_of(with_training), queries_of(without)
        assert all(np.array_equal(a[name], b[name]) for name in a)


# --- training records ------------------------------------------------------------------------------------------------


def test_targets_match_twin():
    """T_i = A_i + B_i T_{i+1} backwards in float64, in the compacted order, for random counts and tails."""
    tracer = tracer_of(furnace(n_theta=4), 40, 40, n_paths=50, max_records=6)
    n_slots, n_records = tracer.max_training_paths, 6
    rng = np.random.default_rng(6)
    count = rng.integers(0, n_records + 1, n_slots).astype(np.int32)
    has_tail = ((count > 0) & (rng.random(n_slots) < 0.6)).astype(np.int32)
    offset, factor = rng.random((2, n_slots * n_records, 3)).astype(np.float32)
    last = np.arange(n_slots) * n_records + np.maximum(count - 1, 0)
    factor[last] *= has_tail[:, None]
    position = rng.random((n_slots * n_records, 3)).astype(np.float32)
    staged = tracer._paths.view
    for array, values in (
        (staged.count, count),
        (staged.has_tail, has_tail),
        (staged.offset, offset),
        (staged.factor, factor),
        (tracer._paths.staged_records.position, position),
    ):
        array.assign(values)
    tracer._paths.compact_tails()
    assert int(tracer.n_tails.numpy()[0]) == has_tail.sum()
    tails = rng.random((n_slots, 3)).astype(np.float32)
    tails[has_tail.sum() :] = np.nan  # must not be read
    tracer.n_training_paths = n_slots
    tracer.targets.fill_(math.nan)
    tracer.gather_targets(wp.array(tails, dtype=float, device="cpu"))

    expected, where, slots = [], [], []
    n_seen = 0
    for slot in range(n_slots):
        target = np.zeros(3)
        if has_tail[slot]:
            target = tails[n_seen].astype(np.float64)
            n_seen += 1
        path = []
        for k in reversed(range(count[slot])):
            i = slot * n_records + k
            target = offset[i] + factor[i].astype(np.float64) * target
            path.append((target, position[i], k))
        for target, p, k in reversed(path):
            expected.append(target)
            where.append(p)
            slots.append((slot, k))
    n = int(tracer.n_records.numpy()[0])
    assert n == count.sum()
    assert np.allclose(tracer.targets.numpy()[:n], expected, rtol=1e-5)
    assert np.array_equal(tracer.records.position.numpy()[:n], np.array(where))
    assert np.array_equal(np.stack([tracer.record_slot.numpy(), tracer.vertex_index.numpy()], 1)[:n], slots)


@pytest.mark.parametrize("integrator", ["nrc", "cache"])
@pytest.mark.parametrize(
    ("options", "tail"),
    [
        ({"unbiased_fraction": 1.0}, math.nan),
        ({"unbiased_fraction": 0.0, "continuation": 0.0}, 0.5),
        ({"unbiased_fraction": 0.1, "continuation": 0.7}, 0.5),
        ({"unbiased_fraction": 0.5, "max_records": 2, "rr_depth": 2}, 0.5),
    ],
    ids=["roulette", "perfect-tail", "continued", "few-records"],
)
def test_targets_are_unbiased_in_the_furnace(integrator, options, tail):
    """Scattered radiance is ρ L = 0.5 at every vertex, whether roulette or a perfect cache ends the suffix."""
    tracer = tracer_of(furnace(), 32, 32, n_paths=1024, **{"integrator": integrator, **options})
    means, by_index = [], [[], []]
    for frame in range(24):
        tracer.trace(frame, n_training_paths=1024)
        records = records_of(tracer, tail)
        means.append(records["target"].mean())
        for k in range(2):
            if (records["index"] == k).any():
                by_index[k].append(records["target"][records["index"] == k].mean())
    for sample in (means, *(each for each in by_index if each)):
        mean, error = mean_and_error(np.array(sample))
        assert abs(mean - 0.5) < ERRORS * error + 1e-6
        assert error < 0.01


def test_direct_light_enters_once():
    """A floor under a sun: the record's target is exactly ρ E / π; where the cache is asked nothing is added."""
    light = DirectionalLight((0, -1, 0), (math.pi, math.pi, math.pi))
    scene = looking_down(floor(), materials=(Material(base_color=(0.5, 0.25, 0.0)),), lights=(light,))
    for integrator, own in (("cache", 0.0), ("nrc", 1.0)):
        tracer = tracer_of(scene, 8, 8, integrator=integrator)
        tracer.trace(0, n_training_paths=64)
        records = records_of(tracer)
        assert len(records["target"]) == 64
        assert np.allclose(records["target"], [0.5, 0.25, 0.0], rtol=1e-5)
        assert np.allclose(tracer.radiance.numpy(), own * np.array([0.5, 0.25, 0.0]), rtol=1e-5)
        assert int(tracer.n_queries.numpy()[0]) == (64 if integrator == "cache" else 0)


def test_a_perfect_cache_gives_the_furnace():
    """Emission first, then the question: Le plus weight times ρ L is 1 in the mean, and exactly in cache mode."""
    tracer = tracer_of(furnace(), 32, 32, spread_threshold=0.01)
    sums = []
    for frame in range(32):
        tracer.trace(frame)
        asked = tracer.query_vertex.numpy()[:, None] > 0
        sums.append((tracer.radiance.numpy() + np.where(asked, tracer.query_weight.numpy() * 0.5, 0.0)).mean())
        assert asked.mean() > 0.9
    mean, error = mean_and_error(np.array(sums))
    assert abs(mean - 1.0) < ERRORS * error + 1e-6
    first = tracer_of(furnace(), 8, 8, integrator="cache")
    first.trace(0)
    assert np.allclose(first.radiance.numpy() + 0.5 * first.query_weight.numpy(), 1.0, atol=1e-6)


@pytest.mark.parametrize("continuation", [0.0, 0.7])
def test_training_paths_end_as_often_as_configured(continuation):
    """In a closed sphere, without roulette: vertex 2 is asked, each of 3 ... 7 ends the suffix with 1 - continuation.

    Paths chosen to be unbiased never end in the cache, and which these are changes from frame to frame.
    """
    fraction = 1 / 16
    settings = {"spread_threshold": 0.0, "rr_depth": 100, "max_depth": 8, "unbiased_fraction": fraction}
    tracer = tracer_of(furnace(), 32, 32, n_paths=1024, continuation=continuation, **settings)
    without = []
    for frame in range(16):
        tracer.trace(frame, n_training_paths=1024)
        without.append(tracer._paths.view.has_tail.numpy() == 0)
    expected = fraction + (1.0 - fraction) * continuation**5
    assert abs(np.mean(without) - expected) < ERRORS * math.sqrt(expected * (1.0 - expected) / np.size(without))
    assert np.max(np.mean(without, axis=0)) < 0.8  # 16 frames: no slot is chosen always


def test_spread_restarts_at_the_query_vertex():
    """In a sphere every bounce adds about the same: where two are needed to ask, two more end the suffix."""
    settings = {"spread_threshold": 150.0, "continuation": 0.0, "unbiased_fraction": 0.0, "rr_depth": 100}
    tracer = tracer_of(furnace(), 16, 16, n_paths=256, max_depth=10, **settings)
    tracer.trace(0, n_training_paths=256)
    # One bounce spreads to 80 ... 115 a_0, two to four times that; one that grazes a facet does not follow this.
    assert np.mean(tracer.query_vertex.numpy() == 3) > 0.97
    records = records_of(tracer)
    # vertices 1 ... 4, the fifth is the tail
    assert np.mean(np.bincount(records["slot"], minlength=256) == 4) > 0.97
    assert int(tracer.n_tails.numpy()[0]) == 256


def test_every_tile_trains_one_path():
    """One pixel of each tile, at an offset that changes from frame to frame, fills its slot."""
    tracer = tracer_of(furnace(), 32, 24, n_paths=48)
    offsets = set()
    for frame in range(8):
        tracer.trace(frame, n_training_paths=48)
        assert tracer.n_training_paths == 48 and tracer.tile[0] * tracer.tile[1] == 16
        assert len(np.unique(records_of(tracer)["slot"])) == 48
        offsets.add((tracer._params.tiles.offset_x, tracer._params.tiles.offset_y))
    assert len(offsets) > 3


def test_empty_frame_has_no_records():
    """A camera that sees nothing: no queries, no records, and the sky's radiance."""
    scene = looking_down(floor(), materials=(MIRROR,), environment=Environment.constant((1.0, 2.0, 3.0)))
    tracer = tracer_of(replace(scene, camera=Camera.look_at((0, 1, 0), (0, 2, 0), up=(1, 0, 0))), 8, 8)
    tracer.trace(0, n_training_paths=64)
    assert len(records_of(tracer)["target"]) == 0
    assert int(tracer.n_queries.numpy()[0]) == 0 and int(tracer.n_tails.numpy()[0]) == 0
    assert np.array_equal(tracer.radiance.numpy(), np.tile(np.float32([1, 2, 3]), (64, 1)))


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seed_out_of_range_is_refused(seed):
    """Before anything compiles."""
    with pytest.raises(ValueError, match="seed"):
        PathTracerConfig(seed=seed)
