"""Occupancy cells: Morton order, visibility, the rules of their update, and marching through what is occupied."""

from __future__ import annotations

import numpy as np
import pytest
import reference_nerf as reference
import warp as wp

from nrc.field import Field
from nrc.fit.occupancy import DECAY, MAX_THRESHOLD, MIN_STEP, N_DRAWS, PASSES, Occupancy
from nrc.fit.views import Camera
from nrc.kernels import nerf as kn
from nrc.kernels import occupancy as ko
from nrc.launch import launch

N = ko.N_CELLS
FIELD = Field(
    3,
    16,
    {"otype": "HashGrid", "n_levels": 4, "log2_hashmap_size": 12, "base_resolution": 4},
    {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 1},
    device="cpu",
)
MOST_STEPS = 4096  # of a ray in the marching tests


@wp.kernel(enable_backward=False)
def code_cells(first: int, out_xyz: wp.array[wp.vec3i], out_place: wp.array[int], out_point: wp.array[wp.vec3]):
    """Decode cell i, encode it again, and find its middle. One thread per cell."""
    i = first + wp.tid()
    x, y, z = ko.morton_decode(i)
    out_xyz[i] = wp.vec3i(x, y, z)
    out_place[i] = ko.morton_encode(x, y, z)
    out_point[i] = ko.cell_point(i, wp.vec3(0.5))


@wp.kernel(enable_backward=False)
def collect_steps(
    first: int,
    march: kn.MarchView,
    origin: wp.array[wp.vec3],
    direction: wp.array[wp.vec3],
    out_t: wp.array2d[float],
    out_n: wp.array[int],
    out_range: wp.array[wp.vec2],
):
    """List the steps of a ray. One thread per ray."""
    i = first + wp.tid()
    o = origin[i]
    d = direction[i]
    t, t_end = kn.enter_box(march, o, d)
    out_range[i] = wp.vec2(t, t_end)
    n = int(0)  # noqa: UP018, RUF046 (declares a variable)
    t = kn.march_next(march, o, d, t, t_end)
    while t < t_end and n < out_t.shape[1]:
        out_t[i, n] = t
        n += 1
        t = kn.march_next(march, o, d, t + kn.step_length(march, t), t_end)
    out_n[i] = n


def occupancy_with(bits: np.ndarray, aabb_scale: int) -> Occupancy:
    """Occupancy whose bits are given as they are."""
    occupancy = Occupancy(aabb_scale, wp.get_device("cpu"))
    occupancy.bits.assign(bits)
    return occupancy


def sparse_words(n_words: int, share: float, seed: int) -> np.ndarray:
    """Random words, most of them empty, the others with about a quarter of their bits."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**64, n_words, np.uint64) & rng.integers(0, 2**64, n_words, np.uint64)
    return np.where(rng.random(n_words) < share, words, np.uint64(0))


def test_morton_order_matches_bit_by_bit() -> None:
    """Decoding inverts encoding, which interleaves bits; cascades double in size around the middle."""
    n = 2 * N
    xyz, place = wp.empty(n, dtype=wp.vec3i, device="cpu"), wp.empty(n, dtype=int, device="cpu")
    point = wp.empty(n, dtype=wp.vec3, device="cpu")
    launch(code_cells, n, inputs=[], outputs=[xyz, place, point], device=wp.get_device("cpu"))
    x, y, z = xyz.numpy()[:N].T
    assert (place.numpy()[:N] == np.arange(N)).all()
    assert (reference.morton(x, y, z) == np.arange(N)).all()
    middle = (np.stack([x, y, z], axis=1) + 0.5) / 128
    np.testing.assert_allclose(point.numpy()[:N], middle, atol=1e-6)
    np.testing.assert_allclose(point.numpy()[N:], 2.0 * (middle - 0.5) + 0.5, atol=1e-6)


def test_cells_seen_are_those_in_front_of_a_camera() -> None:
    """Every cell whose middle projects into the image is seen; cells far outside of the image's cone are not."""
    c2w = np.array([[1.0, 0.0, 0.0, 0.3], [0.0, 1.0, 0.0, 0.6], [0.0, 0.0, 1.0, 0.9]])  # looks along -z
    camera = Camera.from_fov(c2w, 64, 48, 0.7)
    occupancy = Occupancy(2, wp.get_device("cpu"))
    occupancy.mark_seen(camera.upload(occupancy.device), 0.1)
    seen = occupancy.thickness.numpy().reshape(2, N) == 0.0
    assert ((occupancy.thickness.numpy() == 0.0) | (occupancy.thickness.numpy() == ko.UNSEEN)).all()
    x, y, z = np.meshgrid(*[np.arange(128)] * 3, indexing="ij")
    for cascade in range(2):
        p = ((np.stack([x, y, z], axis=-1) + 0.5) / 128 - 0.5) * 2.0**cascade + 0.5 - c2w[:, 3]
        depth = -p[..., 2]
        far = np.maximum(depth, 1e-9)
        u, v = np.abs(p[..., 0]) / far, np.abs(p[..., 1]) / far
        tangent = np.tan(0.35)
        inside = (depth > 0.1) & (u < tangent) & (v < 0.75 * tangent)
        found = seen[cascade][reference.morton(x, y, z)]
        assert found[inside].all()
        size = 4 * np.sqrt(3.0) * 2.0**cascade / 128  # a block's diagonal
        outside = (depth < -size) | ((depth > 2 * size) & ((u - tangent) * depth > 3 * size))
        assert inside.sum() > 1000 and outside.sum() > 1000
        assert not found[outside].any()


def test_update_follows_the_rules() -> None:
    """A full look: a cell becomes max(old * decay, density * step), unseen ones stay; the threshold is the mean."""
    occupancy = Occupancy(1, wp.get_device("cpu"))
    rng = np.random.default_rng(1)
    before = rng.uniform(0.0, 4e-3, N).astype(np.float32)
    before[::7] = ko.UNSEEN
    occupancy.thickness.assign(before)
    occupancy.update(FIELD, FIELD.params, seed=3, update=5, passes=PASSES, occupied_passes=0)
    after = occupancy.thickness.numpy()
    assert (after[::7] == ko.UNSEEN).all()
    rest = np.delete(np.arange(N), np.arange(0, N, 7))
    # Density differs within a cell, by little in this smooth field: compare with the middle's
    x, y, z = np.meshgrid(*[np.arange(128)] * 3, indexing="ij")
    points = (np.stack([x, y, z], axis=-1).reshape(-1, 3) + 0.5) / 128
    density = np.empty(N)
    density[reference.morton(x, y, z).ravel()] = np.exp(FIELD.inference(points.astype(np.float32)).numpy()[:, 0])
    expected = np.maximum(before[rest] * DECAY, density[rest] * MIN_STEP)
    np.testing.assert_allclose(after[rest], expected, rtol=2e-3)
    mean = np.maximum(after, 0.0).mean(dtype=np.float64)
    threshold = min(MAX_THRESHOLD, mean)
    assert threshold < MAX_THRESHOLD
    clear = np.abs(after - threshold) > 1e-4 * threshold  # the mean is summed in single precision
    bits = reference.is_occupied(occupancy.bits.numpy(), np.arange(N))
    assert (bits == (after > threshold))[clear].all()
    assert 0.1 < occupancy.fraction() == bits.mean() < 0.9


def test_threshold_is_bounded() -> None:
    """Where the mean is large, MAX_THRESHOLD decides."""
    occupancy = Occupancy(1, wp.get_device("cpu"))
    occupancy.thickness.assign(np.where(np.arange(N) % 2, 1.0, 0.5 * MAX_THRESHOLD).astype(np.float32))
    occupancy.set_bits()
    assert (occupancy.bits.numpy() == np.uint64(0xAAAAAAAAAAAAAAAA)).all()


def test_coarser_cascades_contain_finer_ones() -> None:
    """A coarse cell is occupied by itself or where one of the eight finer cells inside is."""
    occupancy = Occupancy(4, wp.get_device("cpu"))
    assert occupancy.n_cascades == 3
    rng = np.random.default_rng(2)
    thickness = np.where(rng.random(3 * N) < 0.01, 1.0, 0.0).astype(np.float32)
    occupancy.thickness.assign(thickness)
    occupancy.set_bits()
    x, y, z = np.meshgrid(*[np.arange(128)] * 3, indexing="ij")
    place = reference.morton(x, y, z)
    finer = np.zeros((128, 128, 128), bool)
    bits = reference.is_occupied(occupancy.bits.numpy(), np.arange(3 * N)).reshape(3, N)
    for cascade in range(3):
        expected = (thickness.reshape(3, N)[cascade] > 0.5)[place]
        if cascade:
            expected[32:96, 32:96, 32:96] |= finer.reshape(64, 2, 64, 2, 64, 2).any(axis=(1, 3, 5))
        finer = bits[cascade][place]
        assert (finer == expected).all()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.9])
def test_occupied_cells_are_drawn_once_and_evenly(share: float) -> None:
    """Only occupied cells are drawn, none twice, and their ranks are evenly spread; points lie in their cells."""
    occupancy = occupancy_with(sparse_words(2 * ko.N_WORDS, share, 4), 2)
    occupied = np.flatnonzero(reference.is_occupied(occupancy.bits.numpy(), np.arange(2 * N)))
    occupancy._draw_occupied(5, 6)
    n = int(occupancy._count.numpy()[0])
    assert n == min(len(occupied), N_DRAWS)
    cell, x = occupancy._cell.numpy()[:n], occupancy._x.numpy()[:n]
    rank = np.searchsorted(occupied, cell)
    assert (occupied[np.minimum(rank, len(occupied) - 1)] == cell).all() if n else True
    spacing = len(occupied) / max(n, 1)
    assert ((np.diff(rank) >= np.floor(spacing)) & (np.diff(rank) <= np.ceil(spacing))).all()
    p = x.astype(np.float64) * 2.0 - 0.5
    cascade = cell // N
    q = ((p - 0.5) / 2.0 ** cascade[:, None] + 0.5) * 128
    back = reference.morton(*np.floor(q).astype(int).T)
    inside = np.abs(q - np.round(q)).min(axis=1, initial=1.0) > 1e-3
    assert (back == cell % N)[inside].all()


@pytest.mark.parametrize(("aabb_scale", "share"), [(1, 0.1), (1, 1.0), (4, 0.1), (4, 0.0)])
def test_marching_visits_exactly_the_occupied_cells(aabb_scale: int, share: float) -> None:
    """Each step begins in an occupied cell, and no occupied cell that a ray crosses for a step or more is missed."""
    n_cascades = (aabb_scale - 1).bit_length() + 1
    occupancy = occupancy_with(sparse_words(n_cascades * ko.N_WORDS, share, 7), aabb_scale)
    march = kn.MarchView()
    march.bits, march.n_cascades = occupancy.bits, n_cascades
    low = 0.5 - 0.5 * aabb_scale
    march.lower, march.upper = wp.vec3(low), wp.vec3(low + aabb_scale)
    march.scene_lower, march.inverse_size, march.near = wp.vec3(low), 1.0 / aabb_scale, 0.05
    march.min_step, march.max_step = MIN_STEP, MIN_STEP * aabb_scale
    march.cone = 1.0 / 256.0 if aabb_scale > 1 else 0.0
    rng = np.random.default_rng(8)
    n = 60
    origin = rng.uniform(low - 0.5, low + aabb_scale + 0.5, (n, 3)).astype(np.float32)
    direction = rng.normal(size=(n, 3))
    direction[:6] = np.concatenate([np.eye(3), -np.eye(3)])
    origin[:6] = rng.uniform(0.1, 0.9, (6, 3))
    direction = (direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)
    t = wp.full((n, MOST_STEPS), wp.nan, dtype=float, device="cpu")
    count, reach = wp.zeros(n, dtype=int, device="cpu"), wp.zeros(n, dtype=wp.vec2, device="cpu")
    views = [wp.array(values, dtype=wp.vec3, device="cpu") for values in (origin, direction)]
    launch(collect_steps, n, inputs=[march, *views], outputs=[t, count, reach], device=wp.get_device("cpu"))
    bits, n_checked = occupancy.bits.numpy(), 0
    for i in range(n):
        o, d = origin[i].astype(np.float64), direction[i].astype(np.float64)
        near, far = reach.numpy()[i].astype(np.float64)
        # The box by slabs in double precision
        slabs = np.sort((np.array([[low], [low + aabb_scale]]) - o) / np.where(d == 0.0, 1e-30, d), axis=0)
        enter, leave = max(0.05, slabs[0].max()), slabs[1].min()
        if enter >= leave:
            assert near >= far or near == pytest.approx(far, abs=1e-4)
            assert count.numpy()[i] == 0
            continue
        assert (near, far) == pytest.approx((enter, leave), abs=1e-4)
        steps = t.numpy()[i, : count.numpy()[i]].astype(np.float64)
        lengths = np.clip(steps * march.cone, march.min_step, march.max_step)
        assert count.numpy()[i] < MOST_STEPS
        assert (np.diff(steps) > lengths[:-1] * (1.0 - 1e-3)).all()
        cell, margin = reference.cells_of(o + steps[:, None] * d, lengths, n_cascades)
        assert reference.is_occupied(bits, cell)[margin > 1e-3].all()
        # Fine points along the ray: runs in one occupied cell longer than a step hold a step
        fine = np.arange(enter, leave, 0.05 * march.min_step)
        cell, _ = reference.cells_of(
            o + fine[:, None] * d, np.clip(fine * march.cone, march.min_step, march.max_step), n_cascades
        )
        starts = np.flatnonzero(np.diff(cell, prepend=-1))
        ends = np.append(starts[1:], len(fine))
        for begin, end in zip(starts, ends, strict=True):
            a, b = fine[begin], fine[end - 1]
            step = np.clip(b * march.cone, march.min_step, march.max_step)
            if reference.is_occupied(bits, cell[begin : begin + 1])[0] and b - a > 1.05 * step:
                assert ((steps > a - 0.1 * step) & (steps < b + 0.1 * step)).any()
                n_checked += 1
    assert n_checked > 50 or share == 0.0
