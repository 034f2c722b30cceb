"""Replay of past records: what is stored and dealt against a NumPy twin, and that it keeps what is no longer seen."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import warp as wp

import nrc.launch
from nrc.cache import CacheConfig, RadianceCache
from nrc.records import FIELDS, Records
from nrc.replay import MEAN_AGE, ROOM
from nrc.snapshot import SnapshotError, load_tensors, save_tensors

BOUNDS = (np.array([-1.0, -1.0, -1.0]), np.array([1.0, 1.0, 1.0]))
BATCH, N_BATCHES = 64, 4
BUDGET = BATCH * N_BATCHES
TINY = CacheConfig(
    batch_size=BATCH,
    n_batches=N_BATCHES,
    replay=0.25,
    radiance_scale=1.0,
    n_levels=2,
    log2_hashmap_size=8,
    n_neurons=16,
    n_hidden_layers=1,
)
N = 400
SCRATCH = slice(0, 2)  # of the optimizer's counters: what the last step was given
MASK = (1 << 64) - 1
DRAW_SALT, STORE_SALT = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def mix64(x: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    z = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def permute(i: int, n: int, key: int) -> int:
    """Four Feistel rounds over the next even power of two, walked until the result is below n."""
    half = 1
    while (1 << (2 * half)) < n:
        half += 1
    mask = (1 << half) - 1
    while True:
        for r in range(4):
            left, right = i >> half, i & mask
            i = (right << half) | (left ^ (mix64((key + right + (r << 40)) & MASK) >> 40 & mask))
        if i < n:
            return i


class Twin:
    """Numbers of the records that a cache stores and deals, round by round."""

    def __init__(self, config: CacheConfig) -> None:
        self.seed, self.n_replay = config.seed, int(config.replay * BUDGET)
        self.room, self.round, self.stored = ROOM * BUDGET, 0, []
        self.n_kept = self.room // MEAN_AGE

    def deal(self, numbers: list[int]) -> list[int]:
        """What is dealt of a round's valid records and of the stored ones, in the order of dealing."""
        if not numbers:
            return []
        self.round += 1
        key, n = mix64((self.seed << 32) + self.round), len(numbers)
        order = [0] * n
        for i, number in enumerate(numbers):
            order[permute(i, n, key)] = number
        n_fresh, n_replayed, before = min(n, BUDGET), 0, len(self.stored)
        if self.stored:
            n_fresh = min(n, BUDGET - self.n_replay)
            n_replayed = min(n_fresh * self.n_replay // (BUDGET - self.n_replay), before)
        draw = mix64((key + DRAW_SALT) & MASK)
        dealt = order[:n_fresh] + [self.stored[permute(i, before, draw)] for i in range(n_replayed)]
        for i, number in enumerate(order[: self.n_kept]):
            if before + i < self.room:
                self.stored.append(number)
            else:
                self.stored[permute(before + i - self.room, before, mix64((key + STORE_SALT) & MASK))] = number
        return dealt


def cache_of(config: CacheConfig = TINY, n: int = N) -> RadianceCache:
    return RadianceCache(BOUNDS, config, max_queries=n, max_records=n, device="cpu")


def records_of(position: np.ndarray) -> Records:
    """Diffuse surfaces that face up."""
    n = len(position)
    up = np.tile(np.float32([0.0, 0.0, 1.0]), (n, 1))
    albedos = {"diffuse": np.full((n, 3), 0.75, np.float32), "specular": np.full((n, 3), 0.25, np.float32)}
    arrays = {"position": position.astype(np.float32), "wo": up, "normal": up, "roughness": np.ones(n, np.float32)}
    return Records.of(**arrays, **albedos)


def numbered(first: int, n: int) -> tuple[Records, np.ndarray]:
    """Records whose target is their number + 1, and whose position follows from it."""
    numbers = np.arange(first, first + n)
    return records_of(place_of(numbers)), np.repeat(numbers[:, None] + 1.0, 3, axis=1).astype(np.float32)


def place_of(numbers: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(numbers), np.cos(numbers), np.sin(0.1 * numbers)], axis=1)


def train(cache: RadianceCache, seed: int, count: int = N) -> None:
    """One round on random records whose light depends on the place."""
    records = records_of(np.random.default_rng(seed).uniform(-1.0, 1.0, (N, 3)))
    cache.train(records, 1.0 + records.position.numpy() ** 2, wp.array([count], dtype=int, device="cpu"))


def trained(config: CacheConfig = TINY, rounds: int = 6) -> RadianceCache:
    cache = cache_of(config)
    for seed in range(rounds):
        train(cache, seed)
    return cache


def state_of(cache: RadianceCache) -> dict[str, bytes]:
    """Bits of everything that outlives a step."""
    state = cache.state()
    state["trainer.counters"][SCRATCH] = 0
    return {name: values.tobytes() for name, values in state.items()}


# --- against the twin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_rounds_match_the_twin(share: float):
    """Full, partial, empty and invalid frames, until places are used again: batches and reservoir, record by record."""
    config = replace(TINY, replay=share)
    cache, twin = cache_of(config), Twin(config)
    n_rounds = MEAN_AGE + 40
    for frame in range(n_rounds):
        n = (N, 150, 3, 0, N)[frame % 5]
        records, targets = numbered(frame * N, N)
        targets[frame % 7 : n : 11] = np.nan
        valid = [frame * N + i for i in range(n) if np.isfinite(targets[i, 0])]
        watched = frame < 10 or frame > n_rounds - 6
        cache._x.fill_(np.nan)
        cache._y.fill_(np.nan)
        cache.train(records, targets, wp.array([n], dtype=int, device="cpu"))
        expected = twin.deal(valid)
        if watched:
            y, x, counts = cache._y.numpy(), cache._x.numpy(), cache._counts.numpy().ravel()
            rows = [(d % N_BATCHES) * BATCH + d // N_BATCHES for d in range(len(expected))]
            assert counts.sum() == len(expected) and max(counts) - min(counts) <= 1
            np.testing.assert_array_equal(y[rows, 0] - 1.0, expected)
            np.testing.assert_allclose(
                (x[rows, :3] - 0.5) * 2.02, place_of(np.array(expected, float)).reshape(-1, 3), atol=1e-5
            )
            assert np.isnan(np.delete(y, rows, axis=0)).all()
            n_stored = int(cache.state()["replay.n_stored"][0])
            assert n_stored == len(twin.stored)
            stored = cache.state()["replay.targets"][:n_stored, 0] - 1.0
            np.testing.assert_array_equal(stored, twin.stored)
    assert len(twin.stored) > 0.7 * twin.room and len(twin.stored) <= twin.room


def test_stored_records_are_whole():
    """Every field of a stored record is that of the record with its target."""
    cache = trained()
    state = cache.state()
    n = int(state["replay.n_stored"][0])
    position, target = state["replay.position"][:n], state["replay.targets"][:n]
    assert n == 6 * ROOM * BUDGET // MEAN_AGE
    np.testing.assert_allclose(target, 1.0 + position**2, rtol=1e-6)
    one = records_of(np.zeros((1, 3)))
    for name in FIELDS.keys() - {"position"}:
        np.testing.assert_array_equal(state[f"replay.{name}"][:n], np.repeat(getattr(one, name).numpy(), n, axis=0))


def test_ages_are_exponential():
    """After many mean ages the stored rounds' ages have the mean and the median of the geometric distribution."""
    config = replace(TINY, batch_size=16, n_batches=2)
    twin, room = Twin(config), 8 * 32
    twin.room, twin.n_kept, twin.n_replay = room, 1, 8
    n_rounds = 8 * MEAN_AGE
    for frame in range(n_rounds):
        twin.deal([frame])
    ages = n_rounds - 1 - np.array(twin.stored)
    assert len(ages) == room
    assert abs(ages.mean() - room) < 4.5 * room / np.sqrt(room)
    assert abs(np.mean(ages > room * np.log(2.0)) - 0.5) < 4.5 * 0.5 / np.sqrt(room)


# --- off, empty, elsewhere -------------------------------------------------------------------------------------------


def test_without_replay_nothing_is_stored():
    """Off by default, no memory for it, and the same bits whatever the reservoir could hold."""
    assert CacheConfig().replay == 0.0
    cache = trained(replace(TINY, replay=0.0))
    assert not any(name.startswith("replay") for name in cache.state())
    more = trained().memory_bytes["total"] - cache.memory_bytes["total"]
    assert more == ROOM * BUDGET * (4 * (3 * 6 + 1))


def test_first_round_is_the_one_without_replay():
    """Before anything is stored the weights are those of a cache without, bit for bit."""
    with_replay, without = (trained(replace(TINY, replay=share), rounds=1) for share in (0.25, 0.0))
    assert with_replay.field.params.numpy().tobytes() == without.field.params.numpy().tobytes()
    train(with_replay, 1)
    train(without, 1)
    assert with_replay.field.params.numpy().tobytes() != without.field.params.numpy().tobytes()


def test_empty_frames_change_nothing():
    """Neither weights nor the reservoir, and nothing is replayed."""
    cache = trained()
    before = state_of(cache)
    train(cache, 10, count=0)
    empty = records_of(np.zeros((0, 3)))
    cache.train(empty, np.zeros((0, 3), np.float32))
    assert state_of(cache) == before and cache.stats()["records"] == 0


@pytest.mark.parametrize("way", ["state", "file", "other settings"])
def test_replay_goes_on_elsewhere(way: str, tmp_path: Path):
    """A cache that takes over trains to the same bits."""
    ours, other = trained(), cache_of()
    if way == "state":
        other.load_state(ours.state())
    elif way == "file":
        ours.save(tmp_path / "c.safetensors")
        other = RadianceCache.load(tmp_path / "c.safetensors", max_queries=N, max_records=N, device="cpu")
        assert other.config == ours.config
    else:
        assert other.continue_from(ours)
    for seed in range(20, 24):
        train(ours, seed)
        train(other, seed)
        assert state_of(other) == state_of(ours)


def test_reservoirs_of_other_sizes_start_empty():
    """Weights are taken over, records are not."""
    other = cache_of(replace(TINY, batch_size=32))
    assert other.continue_from(trained()) and other.state()["replay.n_stored"][0] == 0


def test_older_files_have_no_replay(tmp_path: Path):
    """A configuration without the setting is one that replays nothing."""
    cache, path = trained(replace(TINY, replay=0.0)), tmp_path / "c.safetensors"
    cache.save(path)
    tensors, described = load_tensors(path, kind="nrc.cache")
    config = asdict(cache.config)
    del config["replay"]
    save_tensors(path, tensors, described | {"config": config}, kind="nrc.cache")
    other = RadianceCache.load(path, max_queries=N, max_records=N, device="cpu")
    assert other.config == cache.config and state_of(other) == state_of(cache)


@pytest.mark.parametrize(
    ("name", "values"),
    [("replay.n_stored", np.int32([ROOM * BUDGET + 1])), ("replay.n_stored", np.int32([-1])), ("replay.wo", None)],
)
def test_impossible_reservoirs_in_files_are_refused(tmp_path: Path, name: str, values: np.ndarray | None):
    """More records than there is room for, fewer than none, or a field that is missing."""
    cache, path = trained(), tmp_path / "c.safetensors"
    cache.save(path)
    tensors, described = load_tensors(path, kind="nrc.cache")
    if values is None:
        del tensors[name]
    else:
        tensors[name] = values
    save_tensors(path, tensors, described, kind="nrc.cache")
    with pytest.raises(SnapshotError, match=name):
        RadianceCache.load(path, max_queries=N, max_records=N, device="cpu")


@pytest.mark.parametrize("keep", [True, False])
def test_cut_empties_the_reservoir_unless_told(keep: bool):
    """After a change of the light what is stored is wrong; after one of the view it is what must not be forgotten."""
    cache = trained()
    n = cache.state()["replay.n_stored"][0]
    cache.cut(0, keep_records=keep)
    assert n > 0 and cache.state()["replay.n_stored"][0] == (n if keep else 0)


def test_reset_empties_the_reservoir():
    """Bit for bit the first state."""
    cache = trained()
    cache.reset()
    assert state_of(cache) == state_of(cache_of())


def test_threads_do_not_change_what_is_replayed():
    """One, two and five CPU threads give the same bits, also where there are enough records to split."""
    results = []
    for n_threads in (1, 2, 5):
        nrc.launch.set_threads(n_threads)
        try:
            cache = cache_of(replace(TINY, batch_size=1024), 6000)
            for seed in range(4):
                position = np.random.default_rng(seed).uniform(-1.0, 1.0, (6000, 3))
                cache.train(records_of(position), (1.0 + position**2).astype(np.float32))
            results.append(state_of(cache))
        finally:
            nrc.launch.set_threads(0)
    assert results[0] == results[1] == results[2]


# --- what it is for --------------------------------------------------------------------------------------------------


def test_replay_keeps_what_is_no_longer_seen():
    """After 100 rounds of a room's bright half alone its dark half is off by less than half of what it is without."""
    errors = []
    for share in (0.0, 0.25):
        cache, rng = cache_of(CacheConfig(batch_size=BATCH, replay=share)), np.random.default_rng(0)
        for frame in range(200):
            position = rng.uniform(-1.0, 1.0, (N, 3))
            if frame >= 100:
                position[:, 0] = np.abs(position[:, 0])
            light = np.where(position[:, :1] < 0.0, 0.2 + 0.1 * position[:, 1:2], 10.0)
            noise = rng.gamma(4.0, 0.25, (N, 1))
            cache.train(records_of(position), np.repeat(light * noise, 3, axis=1).astype(np.float32))
        position = rng.uniform(-1.0, 1.0, (N, 3))
        position[:, 0] = -np.abs(position[:, 0])
        answer = cache.query(records_of(position)).numpy()[:N]
        errors.append(np.abs(answer - (0.2 + 0.1 * position[:, 1:2])).mean())
    assert errors[1] < 0.5 * errors[0]
