"""The radiance cache by itself: record encoding, shuffling, guards, averages, empty frames, and that it learns."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import warp as wp

from nrc.cache import CacheConfig, RadianceCache
from nrc.kernels.cache import MIN_ALBEDO, N_INPUTS, from_normalised, permute, to_normalised
from nrc.kernels.optimizer import N_SKIPPED, N_STEPS
from nrc.kernels.rng import mix64
from nrc.launch import launch
from nrc.records import FIELDS, Records
from nrc.snapshot import SnapshotError, load_tensors, save_tensors

BOUNDS = (np.array([-1.0, -2.0, 0.0]), np.array([3.0, 1.0, 2.0]))
BATCH = 64
SMALL = CacheConfig(batch_size=BATCH, n_batches=4, radiance_scale=1.0)

wp.set_module_options({"enable_backward": False})


@wp.kernel
def permute_all(first: int, n: int, seed: int, out: wp.array[int]):
    """Place of each index. One thread per index."""
    i = first + wp.tid()
    out[i] = permute(i, n, mix64(wp.uint64(wp.uint32(seed))))


@wp.kernel
def normalise_and_back(
    first: int, y: wp.array[wp.vec3], albedo: wp.array[wp.vec3], scale: float,
    out_radiance: wp.array[wp.vec3], out_y: wp.array[wp.vec3],
):  # fmt: skip
    """Radiance of network outputs, and network targets of that radiance. One thread per record."""
    i = first + wp.tid()
    out_radiance[i] = from_normalised(y[i], albedo[i], scale)
    out_y[i] = to_normalised(out_radiance[i], albedo[i], scale)


def sphere(rng: np.random.Generator, n: int) -> np.ndarray:
    v = rng.normal(size=(n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def random_arrays(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Plausible cache inputs inside `BOUNDS`."""
    rng = np.random.default_rng(seed)
    arrays = {
        "position": rng.uniform(*BOUNDS, (n, 3)),
        "wo": sphere(rng, n),
        "normal": sphere(rng, n),
        "roughness": rng.uniform(0, 1, n),
        "diffuse": rng.uniform(0.1, 0.6, (n, 3)),
        "specular": rng.uniform(0.0, 0.3, (n, 3)),
    }
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def records_of(arrays: dict[str, np.ndarray]) -> Records:
    device = wp.get_device("cpu")
    uploaded = {name: wp.array(arrays[name], dtype=FIELDS[name], device=device) for name in FIELDS}
    return Records(len(arrays["roughness"]), device, **uploaded)


def vectors(values: np.ndarray) -> wp.array:
    return wp.array(np.ascontiguousarray(values, np.float32), dtype=wp.vec3, device="cpu")


def count_of(n: int) -> wp.array:
    return wp.array([n], dtype=int, device="cpu")


def cache_of(config: CacheConfig = SMALL, n: int = 4096) -> RadianceCache:
    return RadianceCache(BOUNDS, config, max_queries=n, max_records=n, device="cpu")


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Bit for bit; of the trainer's counters only those that outlive a step."""

    def bits(state: dict[str, np.ndarray]) -> dict[str, bytes]:
        kept = {"trainer.counters": state["trainer.counters"][[N_STEPS, N_SKIPPED]]}
        return {name: values.tobytes() for name, values in (state | kept).items()}

    return bits(a) == bits(b)


def reflectance(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return arrays["diffuse"] + arrays["specular"]


# --- inputs and outputs ----------------------------------------------------------------------------------------------


def test_encoding_of_records_matches_twin():
    """Position in the cube around the box, spherical coordinates side by side, 1 - e^-r, albedos: all in [0, 1]."""
    cache, arrays = cache_of(), random_arrays(1000)
    arrays["normal"][:4] = [(0, 0, 1), (0, 0, -1), (-1, 0, 0), (0, -1, 0)]
    arrays["position"][:2] = BOUNDS
    cache._query_x.fill_(math.nan)
    cache.query(records_of(arrays))
    x = cache._query_x.numpy()[:1000]

    def azimuth(v: np.ndarray) -> np.ndarray:
        return (np.arctan2(v[:, 1], v[:, 0]) / (2.0 * np.pi)) % 1.0

    def polar(v: np.ndarray) -> np.ndarray:
        return np.arccos(np.clip(v[:, 2], -1, 1)) / np.pi

    a = {name: values.astype(np.float64) for name, values in arrays.items()}
    centre, extent = (BOUNDS[0] + BOUNDS[1]) / 2.0, 4.0 * 1.01  # the longest side and its margin
    expected = np.column_stack(
        [
            (a["position"] - centre) / extent + 0.5,
            azimuth(a["wo"]),
            azimuth(a["normal"]),
            polar(a["wo"]),
            polar(a["normal"]),
            1.0 - np.exp(-a["roughness"]),
            a["diffuse"],
            a["specular"],
        ]
    )
    assert x.shape[1] == int(N_INPUTS) == expected.shape[1]
    difference = np.abs(x - expected)
    difference[:, 3:5] = np.minimum(difference[:, 3:5], 1.0 - difference[:, 3:5])  # azimuth 0 is azimuth 1
    assert difference.max() < 1e-4  # float32 arc cosines near the poles
    assert x.min() >= 0.0 and x.max() <= 1.0


def test_albedo_guard_is_the_same_in_both_directions():
    """Output to radiance and back is the identity for lit channels, 0 both ways for black ones, and never negative."""
    rng = np.random.default_rng(1)
    n = 3000
    y = rng.normal(size=(n, 3)).astype(np.float32)
    albedo = rng.choice([0.0, 0.5 * MIN_ALBEDO, 2.0 * MIN_ALBEDO, 0.3, 1.4], (n, 3)).astype(np.float32)
    out = [wp.full(n, wp.vec3(math.nan), dtype=wp.vec3, device="cpu") for _ in range(2)]
    launch(normalise_and_back, n, inputs=[vectors(y), vectors(albedo), 3.7], outputs=out, device=out[0].device)
    radiance, back = (array.numpy() for array in out)
    lit = albedo > MIN_ALBEDO
    positive = np.maximum(y, 0.0)
    assert np.allclose(radiance, np.where(lit, positive * albedo * np.float32(3.7), 0.0), rtol=1e-5)
    assert np.allclose(back, np.where(lit, positive, 0.0), rtol=1e-5)
    assert radiance.min() >= 0.0


def test_black_channels_answer_black():
    """A channel that reflects nothing is 0 from the first query on, and a whole black surface too."""
    arrays = random_arrays(300)
    arrays["diffuse"][:, 1] = arrays["specular"][:, 1] = 0.0
    cache = cache_of()
    records = records_of(arrays)
    for _ in range(3):
        cache.train(records, vectors(np.full((300, 3), 2.0)))
    for answer in (cache.query(records).numpy()[:300], cache.query_primary(records).numpy()[:300]):
        assert np.isfinite(answer).all() and answer.min() >= 0.0
        assert (answer[:, 1] == 0.0).all() and answer[:, 0].max() > 0.0


def test_query_answers_only_its_count():
    """Rows from the count on keep what they held."""
    cache = cache_of()
    records = records_of(random_arrays(50))
    cache.train(records, vectors(np.ones((50, 3))))
    cache._radiance.fill_(-7.0)
    answer = cache.query(records, count_of(20)).numpy()
    assert (answer[:20] >= 0.0).all() and (answer[20:] == -7.0).all()


# --- shuffling -------------------------------------------------------------------------------------------------------


def permutation(n: int, seed: int) -> np.ndarray:
    out = wp.full(n, -1, dtype=int, device="cpu")
    launch(permute_all, n, inputs=[n, seed], outputs=[out], device=out.device)
    return out.numpy()


def test_permutation_is_a_bijection():
    """Every n from 1 to 300 and some large ones, powers of four and their neighbours among them."""
    for n in [*range(1, 301), 1023, 1024, 1025, 4095, 4096, 4097, 65536, 100_003]:
        assert np.array_equal(np.sort(permutation(n, n)), np.arange(n)), n


def test_permutation_is_random():
    """Uniform places, no order kept, another one for another key."""
    n = 4096
    p = [permutation(n, seed) for seed in range(8)]
    for a in p:
        assert abs(np.corrcoef(np.arange(n), a)[0, 1]) < 4.5 / math.sqrt(n)
        assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 4.5 / math.sqrt(n)
        first_half = np.mean(a[: n // 2] < n // 2)
        assert abs(first_half - 0.5) < 4.5 * 0.5 / math.sqrt(n // 2)
    for a, b in itertools.pairwise(p):
        assert np.mean(a == b) < 0.01


def numbered(n: int, invalid: np.ndarray | None = None) -> tuple[Records, wp.array]:
    """Records of reflectance 1 whose target is their number + 1, which the network then sees as it is."""
    arrays = random_arrays(n)
    arrays["diffuse"][:], arrays["specular"][:] = 0.75, 0.25
    targets = np.repeat(np.arange(n, dtype=np.float32)[:, None] + 1.0, 3, axis=1)
    if invalid is not None:
        targets[invalid] = math.nan
    return records_of(arrays), vectors(targets)


def dealt(cache: RadianceCache, records: Records, targets: wp.array, count: int) -> list[np.ndarray]:
    """Numbers of the records in each batch of a training round."""
    cache._x.fill_(math.nan)
    cache._y.fill_(math.nan)
    cache.train(records, targets, count_of(count))
    x, y, counts = cache._x.numpy(), cache._y.numpy(), cache._counts.numpy().ravel()
    batches = []
    for b, n in enumerate(counts):
        rows = slice(b * BATCH, b * BATCH + n)
        assert n <= BATCH and np.isfinite(x[rows]).all() and np.isfinite(y[rows]).all()
        assert np.isnan(y[b * BATCH + n : (b + 1) * BATCH]).all()
        batches.append(np.round(y[rows, 0]).astype(int) - 1)
        position = x[rows, :3]
        expected = records.position.numpy()[batches[-1]]
        assert np.allclose((position - 0.5) * 4.04 + [1.0, -0.5, 1.0], expected, atol=1e-5)  # inputs go with targets
    return batches


@pytest.mark.parametrize("n", [1, 3, 4, 5, 100, 255, 256])
def test_every_record_is_dealt_once(n):
    """A partial pool makes smaller batches of nearly equal size that hold all valid records, each once."""
    batches = dealt(cache_of(), *numbered(300), n)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(n))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1


def test_invalid_records_are_not_dealt():
    """The valid ones of a pool with holes land in batches, each once."""
    invalid = np.arange(0, 300, 3)
    cache = cache_of()
    batches = dealt(cache, *numbered(300, invalid), 300)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.setdiff1d(np.arange(300), invalid))
    assert cache.stats()["dropped_records"] == 100 and cache.stats()["records"] == 200


def test_overfull_pool_drops_at_random():
    """Which records stay has nothing to do with their order, and changes from round to round."""
    cache, n = cache_of(), 2000
    records, targets = numbered(n)
    rounds = [np.concatenate(dealt(cache, records, targets, n)) for _ in range(24)]
    for kept in rounds:
        assert len(kept) == 4 * BATCH == len(np.unique(kept))
    kept = np.concatenate(rounds)
    assert abs(kept.mean() - (n - 1) / 2) < 4.5 * n / math.sqrt(12 * len(kept))
    expected = len(kept) / 8
    counts = np.bincount(kept // (n // 8), minlength=8)
    assert np.sum((counts - expected) ** 2 / expected) < 32.0  # χ² of 7 degrees of freedom: one in 25 000
    assert len(np.intersect1d(rounds[0], rounds[1])) < 80  # 33 by chance
    batch = [np.mean(r[:BATCH]) for r in rounds]
    assert abs(np.mean(batch) - (n - 1) / 2) < 4.5 * n / math.sqrt(12 * 24 * BATCH)


# --- what must not change it -----------------------------------------------------------------------------------------


def trained(config: CacheConfig = SMALL, rounds: int = 3) -> RadianceCache:
    cache = cache_of(config)
    for i in range(rounds):
        arrays = random_arrays(256, seed=i)
        cache.train(records_of(arrays), vectors(reflectance(arrays)))
    return cache


def test_empty_frame_changes_nothing():
    """No record: no Adam step, no average, no schedule, no round; the weights stay bit for bit."""
    cache = trained()
    before = cache.state()
    records = records_of(random_arrays(256))
    for _ in range(2):
        cache.train(records, vectors(np.ones((256, 3))), count_of(0))
    assert same_state(before, cache.state())
    assert cache.stats()["records"] == 0
    cache.train(records, vectors(np.ones((256, 3))), count_of(1))
    assert not same_state(before, cache.state())


def test_frame_of_invalid_records_changes_nothing():
    """Records that are all dropped are an empty frame, but counted."""
    cache = trained()
    before = cache.state()
    cache.train(records_of(random_arrays(256)), vectors(np.full((256, 3), math.inf)))
    assert same_state(before, cache.state())
    assert cache.stats()["dropped_records"] == 256


@pytest.mark.parametrize("field", [*FIELDS, "target"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_records_are_dropped_and_counted(field, value):
    """Whatever of a record is not finite, it never reaches the weights."""
    arrays = random_arrays(100)
    target = reflectance(arrays)
    changed = target if field == "target" else arrays[field]
    changed.reshape(100, -1)[7, -1] = value
    cache = cache_of()
    cache.train(records_of(arrays), vectors(target))
    stats = cache.stats()
    assert stats["dropped_records"] == 1 and stats["records"] == 99 and stats["skipped_steps"] == 0
    assert all(np.isfinite(array).all() for array in cache.state().values() if array.dtype == np.float32)


def test_negative_targets_are_dropped_and_counted():
    """Radiance cannot be negative; zero can be learned."""
    arrays = random_arrays(100)
    target = reflectance(arrays)
    target[:5, 2] = -1e-3
    target[5:10] = 0.0
    cache = cache_of()
    cache.train(records_of(arrays), vectors(target))
    assert cache.stats()["dropped_records"] == 5 and cache.stats()["records"] == 95


def test_non_finite_answers_are_black_and_counted():
    """Broken weights give 0, not NaN, and `stats` says how often."""
    cache = trained()
    cache.trainer.field.params.fill_(math.nan)
    records = records_of(random_arrays(50))
    answer = cache.query_primary(records, count_of(40)).numpy()[:40]
    assert np.array_equal(answer, np.zeros((40, 3)))
    assert cache.stats()["invalid_queries"] == 40


# --- averages and learning -------------------------------------------------------------------------------------------


def test_display_reads_the_average_and_tails_the_primary_weights():
    """`query` and `query_primary` are the network with either set of weights, and these differ after training."""
    cache = trained(rounds=8)
    records = records_of(random_arrays(200, seed=9))
    shown, primary = cache.query(records).numpy()[:200].copy(), cache.query_primary(records).numpy()[:200].copy()
    assert np.abs(shown - primary).max() > 1e-3
    albedo = reflectance(random_arrays(200, seed=9))
    for answer, params in ((shown, cache.trainer.ema_params), (primary, cache.trainer.field.params)):
        y = wp.full((200, 3), math.nan, dtype=float, device="cpu")
        x = wp.array(cache._query_x.numpy()[:200], dtype=float, device="cpu")
        cache.field.inference(x, y, params=params)
        assert np.allclose(answer, np.maximum(y.numpy(), 0.0) * albedo, rtol=1e-5, atol=1e-6)


def test_average_follows_slowly():
    """After a change of the world the primary weights are ahead of the average."""
    cache = trained(rounds=60)
    arrays = random_arrays(256, seed=77)
    records = records_of(arrays)
    for _ in range(10):
        cache.train(records, vectors(4.0 * reflectance(arrays)))
    shown, primary = (
        np.mean(f(records).numpy()[:256] / reflectance(arrays)) for f in (cache.query, cache.query_primary)
    )
    assert 1.0 < shown < primary < 5.0


@pytest.mark.parametrize("encoding", ["hash", "frequency"])
@pytest.mark.parametrize("level", [1.0, 250.0, 1e-3])
def test_learns_a_constant_field(encoding, level):
    """Radiance = level × reflectance from noisy targets, at any scale: 3 % off at most in the mean, 15 % at a point."""
    cache = cache_of(CacheConfig(encoding=encoding, batch_size=256))
    rng = np.random.default_rng(0)
    for i in range(120):
        arrays = random_arrays(1024, seed=i)
        noise = rng.gamma(4.0, 0.25, (1024, 1)).astype(np.float32)  # mean 1, standard deviation 1/2
        cache.train(records_of(arrays), vectors(level * reflectance(arrays) * noise))
    arrays = random_arrays(2000, seed=999)
    ratio = cache.query(records_of(arrays)).numpy()[:2000] / (level * reflectance(arrays))
    assert abs(ratio.mean() - 1.0) < 0.03  # the gradient of a relative loss is noisy: measured 0.01
    assert np.percentile(np.abs(ratio - 1.0), 95) < 0.15
    assert cache.stats()["radiance_scale"] == pytest.approx(level, rel=0.1)


def test_learns_a_varying_field():
    """Radiance that depends on the position and on the direction, better than its mean does."""
    cache = cache_of(CacheConfig(batch_size=512))

    def field(a: dict[str, np.ndarray]) -> np.ndarray:
        light = 1.0 + np.sin(3.0 * a["position"][:, :1]) * np.where(a["wo"][:, 2:] > 0.0, 0.9, 0.3)
        return light * reflectance(a) * [1.0, 0.5, 0.25]

    for i in range(120):
        arrays = random_arrays(2048, seed=i)
        cache.train(records_of(arrays), vectors(field(arrays)))
    arrays = random_arrays(2000, seed=999)
    answer, truth = cache.query(records_of(arrays)).numpy()[:2000], field(arrays)
    error = np.mean((answer - truth) ** 2)
    per_albedo = (truth / reflectance(arrays)).mean(axis=0) * reflectance(arrays)
    assert error < 0.1 * np.mean((per_albedo - truth) ** 2)


def test_radiance_scale_is_estimated_once():
    """The mean of the first lit records over their reflectance; later frames do not move it, a configured one stays."""
    arrays = random_arrays(200)
    records, targets = records_of(arrays), 40.0 * reflectance(arrays)
    cache = cache_of(CacheConfig(batch_size=BATCH))
    cache.train(records, vectors(np.zeros((200, 3))))
    assert cache.stats()["radiance_scale"] == 0.0
    assert np.array_equal(cache.query(records).numpy()[:200], np.zeros((200, 3)))
    cache.train(records, vectors(targets))
    assert cache.stats()["radiance_scale"] == pytest.approx(40.0, rel=1e-4)
    cache.train(records, vectors(9.0 * targets))
    assert cache.stats()["radiance_scale"] == pytest.approx(40.0, rel=1e-4)
    fixed = cache_of(SMALL)
    fixed.train(records, vectors(targets))
    assert fixed.stats()["radiance_scale"] == 1.0


@pytest.mark.parametrize("encoding", ["hash", "frequency"])
def test_reset_restores_the_first_state(encoding):
    """Everything learned is gone, and learning it again gives the same bits."""
    config = CacheConfig(encoding=encoding, batch_size=BATCH)
    fresh, cache = cache_of(config), cache_of(config)
    first = fresh.state()
    assert same_state(first, cache.state())

    def learn() -> dict[str, np.ndarray]:
        for i in range(3):
            arrays = random_arrays(256, seed=i)
            cache.train(records_of(arrays), vectors(reflectance(arrays)))
        return cache.state()

    learned = learn()
    assert not same_state(first, learned)
    cache.reset()
    assert same_state(first, cache.state())
    assert cache.stats() == fresh.stats()
    assert same_state(learned, learn())


def test_state_goes_on_as_if_nothing_had_happened():
    """A second cache that loads the state trains to the same bits."""
    a, b = trained(rounds=5), cache_of()
    b.load_state(a.state())
    arrays = random_arrays(256, seed=50)
    for cache in (a, b):
        cache.train(records_of(arrays), vectors(reflectance(arrays)))
    assert same_state(a.state(), b.state())
    records = records_of(random_arrays(100, seed=51))
    assert np.array_equal(a.query(records).numpy()[:100], b.query(records).numpy()[:100])


def test_seed_decides_the_weights():
    """Same seed, same cache; another seed, another one."""
    first, again = (trained().state() for _ in range(2))
    other = trained(CacheConfig(batch_size=BATCH, n_batches=4, radiance_scale=1.0, seed=4)).state()
    assert same_state(first, again) and not same_state(first, other)


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "octree"},
        {"batch_size": 0},
        {"n_batches": 0},
        {"radiance_scale": 0.0},
        {"radiance_scale": -1.0},
        {"replay": -0.1},
        {"replay": 0.6},
        {"replay": math.nan},
    ],
)
def test_config_rejects(options):
    """Each wrong setting is named in the message."""
    with pytest.raises(ValueError, match=next(iter(options))):
        CacheConfig(**options)


@pytest.mark.parametrize("bounds", [((0, 0, 0), (0, 0, 0)), ((0, 0, 0), (1, math.nan, 1)), ((0, 0), (1, 1))])
def test_bounds_must_be_a_box(bounds):
    """Two finite corners with some extent."""
    with pytest.raises(ValueError, match="bounds"):
        RadianceCache(bounds, SMALL, max_queries=4, max_records=4, device="cpu")


def test_too_many_records_are_refused():
    """The message says how many there were and for how many there is room."""
    cache = cache_of(n=64)
    records = records_of(random_arrays(65))
    for call in (lambda: cache.query(records), lambda: cache.train(records, vectors(np.ones((65, 3))))):
        with pytest.raises(ValueError, match=r"65 .*64"):
            call()
    with pytest.raises(ValueError, match=r"50 .*40"):
        cache.train(records_of(random_arrays(50)), vectors(np.ones((40, 3))))


def test_records_refuse_other_arrays(device):
    """A misspelt field, a wrong length and a wrong type are errors, not zeros."""
    with pytest.raises(TypeError, match="normals"):
        Records(4, device, normals=wp.zeros(4, dtype=wp.vec3, device=device))
    with pytest.raises(ValueError, match="normal: expected"):
        Records(4, device, normal=wp.zeros(5, dtype=wp.vec3, device=device))
    with pytest.raises(ValueError, match="roughness: expected"):
        Records(4, device, roughness=wp.zeros(4, dtype=wp.vec3, device=device))


def test_primary_answers_leave_the_others_alone():
    """Both kinds of query may be asked before either answer is used."""
    cache = cache_of()
    records = records_of(random_arrays(50))
    cache.train(records, vectors(np.ones((50, 3))))
    answers = cache.query(records)
    before = answers.numpy()[:50].copy()
    primary = cache.query_primary(records).numpy()[:50]
    np.testing.assert_array_equal(answers.numpy()[:50], before)
    assert not np.array_equal(primary, before)


# --- room ------------------------------------------------------------------------------------------------------------


def test_more_room_changes_nothing():
    """State, counters and answers stay; more records fit afterwards, and asking for less changes nothing."""
    ours, other = trained(), trained()
    bad = random_arrays(20)
    bad["position"][3] = math.nan
    for cache in (ours, other):
        cache.train(records_of(bad), vectors(np.ones((20, 3))))
    ours.reserve(5000, 6000)
    assert (ours.max_queries, ours.max_records) == (5000, 6000)
    assert same_state(ours.state(), other.state()) and ours.stats() == other.stats()
    ours.reserve(10, 10)
    assert (ours.max_queries, ours.max_records) == (5000, 6000)
    arrays = random_arrays(5000, seed=9)
    ours.query(records_of(arrays))
    few = records_of({name: values[:300] for name, values in arrays.items()})
    assert np.array_equal(ours.query(few).numpy()[:300], other.query(few).numpy()[:300])
    for cache in (ours, other):
        cache.train(few, vectors(np.ones((300, 3))))
    assert same_state(ours.state(), other.state()) and ours.stats() == other.stats()


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_trainers_of_every_batch():
    """What `Trainer.step` returned for each batch, their mean in `stats`, and 0 before any and after a reset."""
    cache = cache_of()
    assert cache.loss.shape == (4,) and cache.stats()["loss"] == 0.0
    noted = []
    step = cache.trainer.step

    def noting(*arguments, **options):
        loss = step(*arguments, **options)
        noted.append(float(loss.numpy()[0]))
        return loss

    cache.trainer.step = noting
    for i in range(3):
        cache.train(records_of(random_arrays(256, seed=i)), vectors(np.ones((256, 3))))
        assert cache.loss.numpy().tolist() == noted[-4:] and min(noted) > 0.0
        assert cache.stats()["loss"] == pytest.approx(np.mean(noted[-4:]), rel=1e-6)
    before = cache.loss.numpy()
    cache.train(records_of(random_arrays(256)), vectors(np.ones((256, 3))), count_of(0))
    assert before[-1] == cache.loss.numpy()[-1]
    cache.reset()
    assert cache.stats()["loss"] == 0.0


def test_loss_falls_while_it_learns():
    """Constant scattered radiance: a tenth of the first round's after fifty."""
    arrays = random_arrays(256)
    cache = cache_of()
    losses = []
    for _ in range(50):
        cache.train(records_of(arrays), vectors(reflectance(arrays)))
        losses.append(cache.stats()["loss"])
    assert losses[-1] < 0.1 * losses[0]


# --- other settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 3])
def test_average_goes_on_with_another_decay(rounds):
    """Its value stays, and new weights count as the new decay says: both tables and network against the recurrence."""
    before = trained(rounds=rounds)
    average = before.trainer.ema_params.numpy().astype(np.float64)
    after = cache_of(replace(SMALL, ema_decay=0.5))
    assert after.continue_from(before)
    np.testing.assert_allclose(after.trainer.ema_params.numpy(), average, rtol=1e-6, atol=1e-10)
    for i in range(2):
        n = int(after.trainer.n_steps.numpy()[0])
        arrays = random_arrays(64, seed=40 + i)
        after.train(records_of(arrays), vectors(reflectance(arrays)), count_of(1))  # one batch has the record
        assert after.trainer.n_steps.numpy()[0] == n + 1
        eta, previous = 1.0 - 0.5 ** (n + 1), 1.0 - 0.5**n
        average = (0.5 * after.field.params.numpy() + 0.5 * previous * average) / eta
        np.testing.assert_allclose(after.trainer.ema_params.numpy(), average, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "change", [{"per_level_scale": 1.9}, {"n_neurons": 32}, {"radiance_scale": 2.0}, None], ids=str
)
def test_what_means_something_else_is_not_taken_over(change):
    """Another encoding, network or unit, or other bounds, even where the arrays would fit: the cache is as it was."""
    bounds = (BOUNDS[0], BOUNDS[1] + (0.0 if change else 1.0))
    other = RadianceCache(bounds, replace(SMALL, **(change or {})), max_queries=4, max_records=4, device="cpu")
    before = other.state()
    assert not other.continue_from(trained())
    assert same_state(before, other.state())


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [SMALL, CacheConfig("frequency", batch_size=BATCH), CacheConfig(learning_rate=1, ema_decay=0.5, n_hidden_layers=1)],
    ids=["hash", "frequency", "other"],
)
def test_saved_cache_goes_on_bit_for_bit(tmp_path, config):
    """Answers, and the state after more training, are those of the cache that was saved."""
    ours = trained(config)
    path = tmp_path / "cache.safetensors"
    ours.save(path)
    other = RadianceCache.load(path, max_queries=4096, max_records=4096, device="cpu")
    assert other.config == config and np.array_equal(other.bounds, ours.bounds)
    assert same_state(ours.state(), other.state())
    queries = records_of(random_arrays(500, seed=77))
    for _ in range(3):
        assert ours.query(queries).numpy()[:500].tobytes() == other.query(queries).numpy()[:500].tobytes()
        assert (
            ours.query_primary(queries).numpy()[:500].tobytes() == other.query_primary(queries).numpy()[:500].tobytes()
        )
        for cache in (ours, other):
            cache.train(records_of(random_arrays(256, seed=9)), vectors(np.ones((256, 3))))
        assert same_state(ours.state(), other.state())


def test_broken_cache_is_not_saved(tmp_path):
    """Weights that are not finite: SnapshotError, and no file."""
    cache = trained()
    cache.field.params.fill_(math.nan)
    with pytest.raises(SnapshotError, match=r"c\.safetensors: trainer\.params"):
        cache.save(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


TINY = replace(SMALL, n_levels=2, log2_hashmap_size=8, n_neurons=16, n_hidden_layers=1)


def refused(path, *named: str) -> None:
    """Loading raises a SnapshotError that names the file and every one of `named`."""
    with pytest.raises(SnapshotError) as caught:
        RadianceCache.load(path, max_queries=4, max_records=4, device="cpu")
    assert all(text in str(caught.value) for text in (path.name, *named)), str(caught.value)


def test_damaged_cache_files_are_refused(tmp_path):
    """Cut anywhere, with a flipped bit, empty, missing, or of another kind: one SnapshotError each."""
    path = tmp_path / "c.safetensors"
    refused(path, "no such file")
    trained(TINY).save(path)
    whole, rng = path.read_bytes(), random.Random(1)
    for i in range(200):
        data = bytearray(whole)
        if i % 2:
            del data[rng.randrange(len(whole)) :]
        else:
            data[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        refused(path)
    path.write_bytes(b"")
    refused(path)
    trained(TINY).field.save(path)
    refused(path, "format", "nrc.cache")


def test_cache_files_that_do_not_fit_are_refused(tmp_path):
    """Whole files whose arrays, configuration or bounds are not a cache's: the message names the field."""
    path = tmp_path / "c.safetensors"
    trained(TINY).save(path)
    tensors, described = load_tensors(path, kind="nrc.cache")
    params = tensors["trainer.params"]
    broken = params.copy()
    broken[5] = math.nan
    for name, values in (
        ("scale", np.float32([-1.0])),
        ("scale", np.float32([math.inf])),
        ("scale", np.zeros(2, np.float32)),
        ("round", np.int32([-1])),
        ("round", np.float32([1.0])),
        ("trainer.params", params[:-1]),
        ("trainer.params", params.astype(np.float64)),
        ("trainer.params", broken),
        ("trainer.weights", tensors["trainer.weights"][:2]),
        ("trainer.stamps", tensors["trainer.stamps"] + 10**6),
        ("trainer.counters", -1 - tensors["trainer.counters"]),
    ):
        save_tensors(path, tensors | {name: values}, described, kind="nrc.cache")
        refused(path, name)
    for name in tensors.keys() - {"burn_in", "trainer.average_start"}:  # older files have neither
        save_tensors(path, {n: v for n, v in tensors.items() if n != name}, described, kind="nrc.cache")
        refused(path, name)
    save_tensors(path, tensors, described | {"config": asdict(replace(TINY, n_neurons=32))}, kind="nrc.cache")
    refused(path, "trainer.params")
    for name, value in (
        ("bounds", None),
        ("bounds", [[0, 0, 0]]),
        ("bounds", [[0, 0, 0], [0, 0, 0]]),
        ("bounds", [[0, 0], [1, 1]]),
        ("bounds", [["a", 0, 0], [1, 1, 1]]),
        ("config", None),
        ("config", {"encoding": "hash"}),
        *(
            ("config", asdict(TINY) | change)
            for change in (
                {"n_levels": "many"},
                {"n_levels": 10**9},
                {"n_levels": 2.0},
                {"log2_hashmap_size": 60},
                {"n_neurons": True},
                {"encoding": "octree"},
                {"encoding": 3},
                {"batch_size": 0},
                {"batch_size": 10**12},
                {"learning_rate": None},
                {"learning_rate": -1.0},
                {"ema_decay": 2.0},
                {"radiance_scale": -1.0},
                {"extra": 1},
            )
        ),
    ):
        save_tensors(path, tensors, described | {name: value}, kind="nrc.cache")
        refused(path, name)
