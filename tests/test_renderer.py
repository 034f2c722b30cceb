"""Path tracer, cache and film together: furnaces with a learned cache, determinism, film guards, checkpoints."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import warp as wp
from small_scenes import config, furnace, mean_and_error

from nrc import assets, launch
from nrc.cache import CacheConfig
from nrc.debug_views import debug_views
from nrc.film import Film
from nrc.pathtracer import PathTracer, PathTracerConfig
from nrc.render_job import Budget, CheckpointError, RenderJob, describe
from nrc.renderer import Renderer
from nrc.scene import PointLight, Scene

CACHE = CacheConfig(batch_size=128)


def renderer_of(scene: Scene | None = None, size: int = 16, cache: CacheConfig = CACHE, **options) -> Renderer:
    settings = config(**{"integrator": "nrc", "max_depth": 8, **options})
    return Renderer(scene or assets.load("cornell_box"), size, size, settings, cache=cache, device="cpu")


def frames(renderer: Renderer, n: int) -> Renderer:
    for _ in range(n):
        renderer.frame()
    return renderer


def bits(state: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in state.items()}


# --- pictures --------------------------------------------------------------------------------------------------------

# What a trained cache may be off in the furnace. Self-training feeds the cache's own error back with a gain of ρ = 0.5,
# a relative loss pulls its mean low on noisy targets, and Adam at a constant rate keeps moving.
FURNACE_BIAS = {"nrc": 0.02, "cache": 0.02}


@pytest.mark.slow
@pytest.mark.parametrize(("integrator", "encoding"), [("nrc", "hash"), ("cache", "hash"), ("cache", "frequency")])
def test_furnace_with_a_learned_cache_is_one(integrator, encoding):
    """Closed sphere, Kd = Le = 0.5, unlimited depth: 1 everywhere, after some frames of learning."""
    renderer = renderer_of(
        furnace(), 24, CacheConfig(encoding=encoding, batch_size=256), integrator=integrator, max_depth=-1
    )
    frames(renderer, 120)
    renderer.restart()
    picture = frames(renderer, 40).image()
    assert abs(picture.mean() - 1.0) < FURNACE_BIAS[integrator]
    assert np.percentile(np.abs(picture - 1.0), 95) < 0.1
    assert renderer.film.stats()["invalid_samples"] == 0 and renderer.cache.stats()["skipped_steps"] == 0


@pytest.mark.slow
def test_cache_picture_approaches_path_tracing():
    """Cornell box: the accumulated picture with the cache has the mean of the path tracer's, within 5 %."""
    path = frames(renderer_of(size=24, integrator="path"), 1000).image()
    renderer = frames(renderer_of(size=24, cache=CacheConfig(batch_size=256)), 120)
    renderer.restart()
    ours = frames(renderer, 100).image()
    assert abs(ours.mean() / path.mean() - 1.0) < 0.05
    assert np.median(np.abs(ours - path) / (path + 0.05)) < 0.08


def test_infinite_threshold_renders_the_path_tracers_frames():
    """With nothing to ask the cache for, each frame is the path integrator's, bit for bit, training or not."""
    ours, path = renderer_of(spread_threshold=math.inf), renderer_of(integrator="path")
    for _ in range(3):
        ours.frame()
        path.frame()
        assert ours.film.frame.numpy().max() > 0.0
        assert ours.film.frame.numpy().tobytes() == path.film.frame.numpy().tobytes()
    assert ours.n_records > 0
    assert np.array_equal(ours.image(), path.image())


def test_cache_follows_when_the_light_goes_out():
    """A closed room goes dark: nothing is reset and the cache forgets within tens of frames."""
    room = furnace(replace(furnace().materials[0], emission=(0, 0, 0)))
    lit = replace(room, lights=(PointLight((0.3, 0.2, 0.1), (1.0, 1.0, 1.0)),))
    renderer = renderer_of(lit, integrator="cache", max_depth=-1, cache=CacheConfig(batch_size=256))
    frames(renderer, 60)
    before = renderer.film.frame.numpy().mean()
    dark = replace(room, lights=(PointLight((0.3, 0.2, 0.1), (0.0, 0.0, 0.0)),))
    after = renderer_of(dark, integrator="cache", max_depth=-1, cache=CacheConfig(batch_size=256))
    after.cache.load_state(renderer.cache.state())
    after.frame_index = renderer.frame_index
    frames(after, 100)
    assert before > 0.05
    assert after.film.frame.numpy().mean() < 0.1 * before


# --- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["path", "nrc", "cache"])
def test_same_seed_gives_the_same_bits_for_every_number_of_threads(integrator):
    """Picture, weights, moments and counters after several frames: one thread, two, three, and two again."""
    states = []
    try:
        for n_threads in (1, 2, 3, 2):
            launch.set_threads(n_threads)
            states.append(bits(frames(renderer_of(integrator=integrator, size=24), 6).state()))
    finally:
        launch.set_threads(0)
    for other in states[1:]:
        assert states[0] == other


def test_another_seed_gives_another_picture():
    """And frames differ from each other."""
    first, second = (frames(renderer_of(seed=seed, integrator="path"), 2) for seed in (0, 1))
    assert not np.array_equal(first.image(), second.image())
    assert not np.array_equal(2.0 * first.film.frame.numpy(), first.film._sums.numpy())


def test_restart_clears_the_picture_and_keeps_the_cache():
    """The film starts over; frames go on counting, so no random number is used twice."""
    renderer = frames(renderer_of(), 3)
    cache = bits(renderer.cache.state())
    renderer.restart()
    assert renderer.film.n_frames == 0 and renderer.frame_index == 3
    assert np.array_equal(renderer.image(), np.zeros((16, 16, 3)))
    assert bits(renderer.cache.state()) == cache


def test_tails_ask_the_primary_weights_and_pixels_the_average(monkeypatch):
    """One call of each kind per frame, training between them, with the records each is for."""
    renderer = renderer_of()
    calls = []
    for name in ("query", "query_primary", "train"):
        call = getattr(renderer.cache, name)

        def noted(*arguments, name=name, call=call):
            calls.append((name, arguments[0]))
            return call(*arguments)

        monkeypatch.setattr(renderer.cache, name, noted)
    renderer.frame()
    tracer = renderer.tracer
    expected = [("query_primary", tracer.tails), ("train", tracer.records), ("query", tracer.queries)]
    assert [(name, id(records)) for name, records in calls] == [(name, id(records)) for name, records in expected]


def test_training_can_be_switched_off():
    """`train = False` asks the cache but leaves its weights alone."""
    renderer = frames(renderer_of(), 3)
    before = bits(renderer.cache.state())
    renderer.train = False
    frames(renderer, 2)
    assert bits(renderer.cache.state()) == before
    assert renderer.film.n_frames == 5


def test_debug_views_change_nothing():
    """Their extra frame reaches neither film nor weights, and every view has the picture's size."""
    renderer = frames(renderer_of(), 4)
    before = bits(renderer.state())
    views = debug_views(renderer)
    assert bits(renderer.state()) == before
    assert all(view.shape[:2] == (16, 16) and np.isfinite(view).all() for view in views.values())
    assert views["query_vertex"].max() >= 2 and views["training_bounces"].max() >= 1
    assert (views["spread"][views["query_vertex"] > 0] > renderer.config.spread_threshold).all()
    with pytest.raises(ValueError, match="path"):
        debug_views(renderer_of(integrator="path"))


# --- film ------------------------------------------------------------------------------------------------------------


def film_of(size: int = 4, **options) -> tuple[PathTracer, Film]:
    tracer = renderer_of(size=size, integrator="path").tracer
    return tracer, Film(tracer, **options)


def test_film_leaves_out_what_is_not_finite_or_negative():
    """Such samples count as black and are counted; the other pixels are untouched."""
    tracer, film = film_of()
    values = np.ones((16, 3), np.float32)
    values[1, 0], values[2, 1], values[3, 2], values[4, 0] = math.nan, math.inf, -math.inf, -1e-3
    tracer.radiance.assign(values)
    film.frame.fill_(math.nan)
    film.add()
    tracer.radiance.assign(np.ones((16, 3), np.float32))
    film.add()
    expected = np.ones((16, 3))
    expected[1:5] = 0.5
    assert np.array_equal(film.image().reshape(-1, 3), expected)
    assert film.stats() == {"invalid_samples": 4, "clamped_fraction": 0.0}


def test_film_adds_the_caches_answer_where_it_was_asked():
    """radiance + weight × answer, from the row that the scan gave the pixel."""
    tracer = renderer_of(size=4).tracer
    film = Film(tracer)
    rng = np.random.default_rng(2)
    radiance, weight, answer = rng.random((3, 16, 3)).astype(np.float32)
    vertex = rng.integers(0, 3, 16).astype(np.int32)
    place = np.cumsum(vertex > 0) - (vertex > 0)
    answer[(vertex > 0).sum() :] = math.nan  # must not be read
    for array, values in (
        (tracer.radiance, radiance),
        (tracer.query_weight, weight),
        (tracer.query_vertex, vertex),
        (tracer.query_place, place.astype(np.int32)),
    ):
        array.assign(values)
    film.add(wp.array(answer, dtype=float, device="cpu"))
    expected = radiance + np.where((vertex > 0)[:, None], weight * answer[place], 0.0)
    assert np.allclose(film.image().reshape(-1, 3), expected, rtol=1e-6)
    assert film.stats()["invalid_samples"] == 0


def test_film_clamp_reports_the_energy_it_takes():
    """Off by default; where it is on it keeps the colour, and kept plus removed energy is what came in."""
    tracer, film = film_of(clamp=2.0)
    values = np.full((16, 3), 1.0, np.float32)
    values[3] = [10.0, 1.0, 3.0]
    tracer.radiance.assign(values)
    for _ in range(2):
        film.add()
    assert np.allclose(film.image().reshape(-1, 3)[3], [2.0, 0.2, 0.6], rtol=1e-6)
    assert film.stats()["clamped_fraction"] == pytest.approx((14.0 - 2.8) / values.sum(), rel=1e-5)
    assert Film(tracer).clamp == 0.0


def test_film_sums_lose_nothing_to_rounding():
    """A thousand small frames on top of a large one, as exact as one float32 can say."""
    tracer, film = film_of()
    values = [1e5, *[1e-3] * 1000]
    for value in values:
        tracer.radiance.fill_(value)
        film.add()
    expected = np.sum(np.float32(values), dtype=np.float64) / 1001
    assert np.allclose(film.image(), expected, rtol=1e-7)
    assert abs(np.float32(1e5) + np.float32(1e-3) - 1e5) == 0.0  # a plain sum would lose them all


def test_film_weighs_the_caches_answers_only():
    """Answers of weight w count w times among the answers; what paths found counts once per frame."""
    tracer = renderer_of(size=4).tracer
    film = Film(tracer)
    tracer.query_weight.fill_(1.0)
    tracer.query_vertex.fill_(1)
    tracer.query_place.assign(np.arange(16, dtype=np.int32))
    for found, answer, weight in ((1.0, 8.0, 0.25), (5.0, 3.0, 1.0)):
        tracer.radiance.fill_(found)
        film.add(wp.full((16, 3), answer, dtype=float, device="cpu"), cache_weight=weight)
    assert np.allclose(film.image(), 3.0 + (0.25 * 8.0 + 3.0) / 1.25)
    film.clear()
    assert np.array_equal(film.image(), np.zeros((4, 4, 3)))


# --- first-hit layers ------------------------------------------------------------------------------------------------


def test_aovs_of_a_known_scene():
    """Inside the furnace: depth and position on the sphere, normals towards the viewer, albedo and material."""
    renderer = renderer_of(furnace(n_theta=48), 16, integrator="path")
    layers = renderer.aovs()
    eye = np.array([0.2, 0.1, 0.3])
    assert layers["albedo"].shape == (16, 16, 3) and layers["depth"].shape == (16, 16)
    assert np.allclose(np.linalg.norm(layers["position"], axis=2), 1.0, atol=5e-3)  # an inscribed polyhedron
    assert np.allclose(layers["albedo"], 0.5, atol=1e-6)
    assert (layers["material_id"] == 0).all()
    to_eye = eye - layers["position"]
    assert (np.sum(layers["normal"] * to_eye, axis=2) > 0.0).all()
    assert np.allclose(np.linalg.norm(layers["normal"], axis=2), 1.0, atol=1e-5)
    distance = np.linalg.norm(to_eye, axis=2)
    forward = np.array([-0.2, -0.1, -1.3]) / np.linalg.norm([-0.2, -0.1, -1.3])
    along = np.sum(-to_eye * forward, axis=2)
    assert np.allclose(layers["depth"], distance, rtol=1e-4) or np.allclose(layers["depth"], along, rtol=1e-4)


# --- jobs ------------------------------------------------------------------------------------------------------------


def job_of(path, **options) -> RenderJob:
    renderer = renderer_of(**options)
    return RenderJob(renderer, describe(renderer), path)


@pytest.mark.parametrize("integrator", ["path", "nrc"])
def test_resumed_job_continues_bit_for_bit(tmp_path, integrator):
    """Eight frames in one go, and five, a checkpoint, and three more in another renderer, are the same."""
    whole = job_of(None, integrator=integrator)
    whole.run(Budget(spp=8), progress=False)
    path = tmp_path / "a.checkpoint"
    first = job_of(path, integrator=integrator)
    first.run(Budget(spp=5), progress=False)
    second = job_of(path, integrator=integrator)
    second.resume()
    assert second.renderer.film.n_frames == 5 and second.seconds == first.seconds > 0.0
    second.run(Budget(spp=8), progress=False)
    assert second.renderer.film.n_frames == 8
    assert np.array_equal(second.renderer.image(), whole.renderer.image())
    a, b = whole.renderer.state(), second.renderer.state()
    for state in (a, b):  # the step's scratch counters are not part of what was learned
        state.pop("cache.trainer.counters", None)
    assert bits(a) == bits(b)


def test_job_stops_at_its_budget(tmp_path):
    """Samples, seconds, or whichever comes first; a budget already spent renders nothing."""
    job = job_of(None, integrator="path")
    job.run(Budget(spp=3), progress=False)
    job.run(Budget(spp=3), progress=False)
    assert job.renderer.film.n_frames == 3
    job.run(Budget(spp=10_000, seconds=job.seconds + 0.05), progress=False)
    assert 3 < job.renderer.film.n_frames < 10_000
    assert not job.interrupted


@pytest.mark.parametrize(
    ("options", "named"),
    [({"size": 8}, "height"), ({"seed": 5}, "tracer"), ({"integrator": "path"}, "cache"), ({"max_depth": 3}, "tracer")],
)
def test_checkpoint_of_another_job_is_refused(tmp_path, options, named):
    """The message names the file and what differs."""
    path = tmp_path / "a.checkpoint"
    job_of(path).run(Budget(spp=1), progress=False)
    with pytest.raises(CheckpointError, match=rf"a\.checkpoint.*{named}"):
        job_of(path, **options).resume()


def test_broken_checkpoints_are_refused(tmp_path):
    """Missing, empty, cut off or another file: CheckpointError with the name, and the renderer unchanged."""
    path = tmp_path / "a.checkpoint"
    job = job_of(path, integrator="path")
    with pytest.raises(CheckpointError, match=r"a\.checkpoint"):
        job.resume()
    job.run(Budget(spp=2), progress=False)
    whole = path.read_bytes()
    fresh = job_of(path, integrator="path")
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"{}" * 100, json.dumps({"a": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.checkpoint"):
            fresh.resume()
        assert fresh.renderer.film.n_frames == 0
    path.write_bytes(whole)
    fresh.resume()
    assert fresh.renderer.film.n_frames == 2


def test_interrupt_finishes_the_frame(tmp_path):
    """The first Ctrl-C ends the job after its frame, with a checkpoint; the signal's handler is restored."""
    job = job_of(tmp_path / "a.checkpoint", integrator="path")
    frame, before = job.renderer.frame, signal.getsignal(signal.SIGINT)

    def interrupted_frame() -> None:
        frame()
        if job.renderer.film.n_frames == 2:
            signal.raise_signal(signal.SIGINT)

    job.renderer.frame = interrupted_frame
    job.run(Budget(spp=100), progress=False)
    assert job.interrupted and job.renderer.film.n_frames == 2
    assert signal.getsignal(signal.SIGINT) is before
    again = job_of(tmp_path / "a.checkpoint", integrator="path")
    again.resume()
    assert again.renderer.film.n_frames == 2


def test_furnace_frames_are_independent():
    """Frame means scatter as independent samples do: no frame repeats another."""
    renderer = renderer_of(furnace(), 16, integrator="path", max_depth=-1)
    means = []
    for _ in range(64):
        renderer.frame()
        means.append(renderer.film.frame.numpy().mean(axis=1))
    mean, error = mean_and_error(np.array(means))
    assert abs(mean - 1.0) < 4.5 * error
    per_frame = np.array(means).mean(axis=1)
    pixels = np.array(means).std(axis=0).mean() / math.sqrt(256)
    assert 0.7 < per_frame.std() / pixels < 1.4


def test_warm_up_trains_and_leaves_no_samples():
    """The film is empty and of the same size after it, the cache is trained, and its first pictures are bright."""
    scene = assets.load("cornell_box")
    path = Renderer(scene, 48, 48, PathTracerConfig(integrator="path"), device="cpu")
    path.warm_up()
    assert path.frame_index == 0 and path.cache is None
    for _ in range(200):
        path.frame()
    renderer = Renderer(scene, 48, 48, PathTracerConfig(), device="cpu")
    renderer.warm_up(48)
    assert renderer.film.n_frames == 0 and renderer.image().shape == (48, 48, 3)
    assert renderer.cache.stats()["rounds"] == 48
    for _ in range(8):
        renderer.frame()
    assert renderer.image().mean() == pytest.approx(path.image().mean(), rel=0.1)
