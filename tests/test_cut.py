"""`RadianceCache.cut`, `Renderer.cut`: how many steps follow, what the average forgets, and that runs go on from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import warp as wp
from small_scenes import furnace

import nrc.launch
from nrc.cache import BURN_IN_PASSES, CacheConfig, RadianceCache
from nrc.pathtracer import PathTracerConfig
from nrc.records import Records
from nrc.renderer import Renderer
from nrc.snapshot import SnapshotError, load_tensors, save_tensors

BOUNDS = (np.array([-1.0, -1.0, -1.0]), np.array([1.0, 1.0, 1.0]))
TINY = CacheConfig(
    batch_size=64, n_batches=3, radiance_scale=1.0, n_levels=2, log2_hashmap_size=8, n_neurons=16, n_hidden_layers=1
)
N = 192
SCRATCH = slice(0, 2)  # of the optimizer's counters: what the last step was given


def cache_of(config: CacheConfig = TINY) -> RadianceCache:
    return RadianceCache(BOUNDS, config, max_queries=N, max_records=N, device="cpu")


def records_of(seed: int) -> Records:
    """Random records on diffuse surfaces."""
    rng = np.random.default_rng(seed)
    up = np.tile(np.float32([0.0, 0.0, 1.0]), (N, 1))
    position = rng.uniform(-1.0, 1.0, (N, 3)).astype(np.float32)
    albedos = {"diffuse": np.full((N, 3), 0.5, np.float32), "specular": np.full((N, 3), 0.1, np.float32)}
    return Records.of(position=position, wo=up, normal=up, roughness=np.ones(N, np.float32), **albedos)


def train(cache: RadianceCache, seed: int, count: int = N) -> None:
    """One round on random records whose light depends on the place."""
    records = records_of(seed)
    targets = 0.6 * (1.0 + records.position.numpy() ** 2)
    cache.train(records, targets, wp.array([count], dtype=int, device="cpu"))


def trained(rounds: int = 4) -> RadianceCache:
    cache = cache_of()
    for seed in range(rounds):
        train(cache, seed)
    return cache


def state_of(cache: RadianceCache) -> dict[str, bytes]:
    """Bits of everything that outlives a step."""
    state = cache.state()
    state["trainer.counters"][SCRATCH] = 0
    return {name: values.tobytes() for name, values in state.items()}


def steps_of(cache: RadianceCache) -> int:
    return int(cache.trainer.n_steps.numpy()[0])


@pytest.mark.parametrize("n_frames", [0, 1, 3])
def test_cut_takes_more_steps_for_its_frames(n_frames: int):
    """Four passes over the batches in each of the frames asked for, one pass in every other."""
    cache, n_batches = trained(), TINY.n_batches
    cache.cut(n_frames)
    for frame in range(5):
        assert cache.burn_in == max(0, n_frames - frame)
        before = steps_of(cache)
        train(cache, 10 + frame)
        assert steps_of(cache) - before == n_batches * (BURN_IN_PASSES if frame < n_frames else 1)
    assert cache.stats()["rounds"] == 9  # a frame is one round, however many passes it takes


def test_burn_in_repeats_the_batches():
    """The same bits as the trainer gives that is handed the frame's batches four times."""
    cache, twin = trained(), trained()
    cache.cut(1)
    train(cache, 10)
    twin.cut(0)
    train(twin, 10)
    for _ in range(BURN_IN_PASSES - 1):
        for x, y, count, _ in twin._batches:
            twin.trainer.step(x, y, count=count)
    assert state_of(cache) == state_of(twin)


def test_cut_forgets_the_average_alone():
    """The averaged weights are those being trained at once; weights, moments and counters stay bit for bit."""
    cache = trained()
    before = cache.state()
    assert not np.array_equal(cache.trainer.ema_params.numpy(), cache.field.params.numpy())
    cache.cut(5)
    np.testing.assert_array_equal(cache.trainer.ema_params.numpy(), cache.field.params.numpy())
    after = cache.state()
    np.testing.assert_array_equal(after["trainer.weights"][:2], before["trainer.weights"][:2])
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"trainer.{name}" for name in ("weights", "average", "stamps", "average_start")} | {"burn_in"}


def test_average_after_a_cut_is_that_of_the_steps_since():
    """Debiased recurrence in double precision over the weights after every step."""
    cache = cache_of(replace(TINY, n_batches=1))
    for seed in range(5):
        train(cache, seed)
    cache.cut(0)
    expected = np.zeros(cache.field.n_params)
    for n in range(1, 6):
        train(cache, 10 + n)
        w = cache.field.params.numpy().astype(np.float64)
        expected = (0.01 * w + 0.99 * (1.0 - 0.99 ** (n - 1)) * expected) / (1.0 - 0.99**n)
        np.testing.assert_allclose(cache.trainer.ema_params.numpy(), expected, rtol=1e-5, atol=1e-8)


def test_empty_frames_of_a_burn_in_change_nothing():
    """No step, no average; only the frame is counted."""
    cache = trained()
    cache.cut(3)
    before = state_of(cache)
    train(cache, 10, count=0)
    assert cache.burn_in == 2
    assert state_of(cache) | {"burn_in": before["burn_in"]} == before


@pytest.mark.parametrize("way", ["state", "file", "other settings"])
def test_burn_in_goes_on_elsewhere(way: str, tmp_path: Path):
    """A cache that takes over in the middle trains to the same bits."""
    ours = trained()
    ours.cut(3)
    train(ours, 10)
    other = cache_of()
    if way == "state":
        other.load_state(ours.state())
    elif way == "file":
        ours.save(tmp_path / "c.safetensors")
        other = RadianceCache.load(tmp_path / "c.safetensors", max_queries=N, max_records=N, device="cpu")
    else:
        assert other.continue_from(ours)
    assert other.burn_in == 2 and state_of(other) == state_of(ours)
    for seed in range(20, 24):
        train(ours, seed)
        train(other, seed)
        assert state_of(other) == state_of(ours)
        np.testing.assert_array_equal(other.trainer.ema_params.numpy(), ours.trainer.ema_params.numpy())


def test_other_decay_after_a_cut_keeps_the_average():
    """The value of an average that was restarted is what a cache with another decay goes on from."""
    before = trained()
    before.cut(0)
    train(before, 10)
    average = before.trainer.ema_params.numpy()
    after = cache_of(replace(TINY, ema_decay=0.5))
    assert after.continue_from(before)
    np.testing.assert_allclose(after.trainer.ema_params.numpy(), average, rtol=1e-5, atol=1e-9)


def test_older_files_have_no_cut(tmp_path: Path):
    """Without the burn-in and the average's start a file is one of a cache that was never cut."""
    cache, path = trained(), tmp_path / "c.safetensors"
    cache.save(path)
    tensors, described = load_tensors(path, kind="nrc.cache")
    del tensors["burn_in"], tensors["trainer.average_start"]
    save_tensors(path, tensors, described, kind="nrc.cache")
    other = RadianceCache.load(path, max_queries=N, max_records=N, device="cpu")
    assert state_of(other) == state_of(cache)


@pytest.mark.parametrize(("name", "value"), [("burn_in", -1), ("trainer.average_start", 10**6)])
def test_impossible_counts_in_files_are_refused(tmp_path: Path, name: str, value: int):
    """Frames below none, an average that begins after the last step."""
    cache, path = trained(), tmp_path / "c.safetensors"
    cache.save(path)
    tensors, described = load_tensors(path, kind="nrc.cache")
    save_tensors(path, tensors | {name: np.int32([value])}, described, kind="nrc.cache")
    with pytest.raises(SnapshotError, match=name):
        RadianceCache.load(path, max_queries=N, max_records=N, device="cpu")


def test_reset_ends_a_burn_in():
    """And the average's start is the beginning again."""
    cache, fresh = trained(), cache_of()
    cache.cut()
    train(cache, 10)
    cache.reset()
    assert state_of(cache) == state_of(fresh)


def test_threads_do_not_change_a_cut():
    """One, two and five CPU threads give the same bits."""
    results = []
    for n_threads in (1, 2, 5):
        nrc.launch.set_threads(n_threads)
        try:
            cache = trained()
            cache.cut(2)
            for seed in range(10, 13):
                train(cache, seed)
            results.append((state_of(cache), cache.trainer.ema_params.numpy().tobytes()))
        finally:
            nrc.launch.set_threads(0)
    assert results[0] == results[1] == results[2]


def test_negative_frames_are_refused():
    """By name, and nothing changes."""
    cache = trained()
    before = state_of(cache)
    with pytest.raises(ValueError, match="n_frames"):
        cache.cut(-1)
    assert state_of(cache) == before


def test_adapts_faster_after_a_cut():
    """All light gone: after eight frames the answers have come further down than without, by more than half."""
    answers = []
    for cut in (False, True):
        cache, queries = trained(40), records_of(99)
        if cut:
            cache.cut()
        for seed in range(50, 58):
            cache.train(records_of(seed), np.zeros((N, 3), np.float32))
        answers.append(float(cache.query(queries).numpy()[:N].mean()))
    assert answers[1] < 0.5 * answers[0]


# --- the renderer ----------------------------------------------------------------------------------------------------


def test_renderer_cut_starts_the_film_over_and_goes_on_from_its_state():
    """The cache is burnt in, and a second renderer that loads the state renders the same bits."""
    config = PathTracerConfig(max_depth=4)
    renderers = [Renderer(furnace(), 12, 8, config, cache=TINY, device="cpu") for _ in range(2)]
    ours, other = renderers
    for _ in range(3):
        ours.frame()
    ours.cut()
    assert ours.cache is not None and ours.film.n_frames == 0 and ours.cache.burn_in == 16
    ours.frame()
    assert ours.cache.burn_in == 15
    other.load_state(ours.state())
    for _ in range(2):
        for renderer in renderers:
            renderer.frame()
        np.testing.assert_array_equal(ours.image(), other.image())


def test_renderer_without_a_cache_can_be_cut():
    """Integrator "path": the film alone."""
    renderer = Renderer(furnace(), 8, 8, PathTracerConfig("path"), device="cpu")
    renderer.frame()
    renderer.cut()
    assert renderer.film.n_frames == 0
