"""Ray-triangle intersection against a float64 brute-force oracle, closed forms, closed rooms and Warp's own query."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
import warp as wp

from nrc.bvh import Bvh
from nrc.kernels.bvh_build import MAX_DEPTH
from nrc.kernels.intersect import Accel, ray_closest, ray_occluded
from nrc.launch import launch

wp.set_module_options({"enable_backward": False})

FAR = 1e30
T_TOLERANCE = 2e-5  # relative to the size of the scene: float32 positions, a few roundings
EDGE_MARGIN = 1e-4  # in barycentric units: closer to an edge, float32 and float64 may pick different triangles
BARYCENTRIC_TOLERANCE = 2e-3  # slivers of random soups magnify the rounding of the hit point


@wp.kernel
def trace_closest(
    # Params
    first: int,
    accel: Accel,
    # In
    origins: wp.array[wp.vec3],  # (n,)
    directions: wp.array[wp.vec3],  # (n,) unit
    t_max: wp.array[float],  # (n,)
    # Out
    out_hits: wp.array2d[float],  # (n, 3) t, u, v
    out_faces: wp.array[int],  # (n,)
):
    """Find the closest hit. One thread per ray."""
    i = first + wp.tid()
    hit = ray_closest(accel, origins[i], directions[i], t_max[i])
    out_hits[i, 0] = hit.t
    out_hits[i, 1] = hit.u
    out_hits[i, 2] = hit.v
    out_faces[i] = hit.face


@wp.kernel
def trace_occluded(
    # Params
    first: int,
    accel: Accel,
    # In
    origins: wp.array[wp.vec3],  # (n,)
    directions: wp.array[wp.vec3],  # (n,) unit
    t_max: wp.array[float],  # (n,)
    # Out
    out_occluded: wp.array[int],  # (n,)
):
    """Find whether anything is hit. One thread per ray."""
    i = first + wp.tid()
    out_occluded[i] = 0
    if ray_occluded(accel, origins[i], directions[i], t_max[i]):
        out_occluded[i] = 1


@wp.kernel
def trace_warp(
    # Params
    first: int,
    mesh: wp.uint64,
    # In
    origins: wp.array[wp.vec3],  # (n,)
    directions: wp.array[wp.vec3],  # (n,) unit
    # Out
    out_t: wp.array[float],  # (n,)
):
    """Find the closest hit with Warp's own hierarchy, infinity for a miss. One thread per ray."""
    i = first + wp.tid()
    query = wp.mesh_query_ray(mesh, origins[i], directions[i], FAR)
    out_t[i] = wp.inf
    if query.result:
        out_t[i] = query.t


def trace(bvh, origins, directions, t_max=FAR):
    """Both queries: t, u, v, face of the closest hit, and whether the ray is occluded."""
    device = wp.get_device("cpu")
    n = len(origins)
    rays = [
        wp.array(np.asarray(origins, np.float32), dtype=wp.vec3, device=device),
        wp.array(np.asarray(directions, np.float32), dtype=wp.vec3, device=device),
        wp.array(np.broadcast_to(np.float32(t_max), n).copy(), dtype=float, device=device),
    ]
    hits = wp.full((n, 3), np.nan, dtype=float, device=device)
    faces = wp.full(n, -99, dtype=int, device=device)
    occluded = wp.full(n, -99, dtype=int, device=device)
    launch(trace_closest, n, inputs=[bvh.accel, *rays], outputs=[hits, faces], device=device)
    launch(trace_occluded, n, inputs=[bvh.accel, *rays], outputs=[occluded], device=device)
    return *hits.numpy().T, faces.numpy(), occluded.numpy()


def brute_force(positions, indices, origins, directions, t_max=np.inf):
    """Möller-Trumbore in float64 over all pairs: t, u, v, face, and how far the ray stays from every edge and tie."""
    a, b, c = positions.astype(np.float64)[indices].transpose(1, 0, 2)
    o, d = (np.asarray(x, np.float32).astype(np.float64)[:, None] for x in (origins, directions))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.cross(d, c - a)
        det = np.sum((b - a) * p, axis=2)
        s = o - a
        u = np.sum(s * p, axis=2) / det
        q = np.cross(s, b - a)
        v = np.sum(d * q, axis=2) / det
        t = np.sum((c - a) * q, axis=2) / det
        least = np.minimum(np.minimum(u, v), 1 - u - v)
    hit = (least >= 0) & (t > 0) & (t < t_max)
    distance = np.where(hit, t, np.inf)
    face = distance.argmin(axis=1)
    rows = np.arange(len(face))
    nearest = distance[rows, face]
    margin = np.nanmin(np.abs(least), axis=1)
    distance[rows, face] = np.inf
    found = np.isfinite(nearest)
    margin[found] = np.minimum(margin[found], distance[found].min(axis=1) - nearest[found])
    return nearest, u[rows, face], v[rows, face], np.where(found, face, -1), margin


def random_directions(rng, n):
    d = rng.normal(size=(n, 3))
    return (d / np.linalg.norm(d, axis=1, keepdims=True)).astype(np.float32)


def assert_matches_oracle(positions, indices, origins, directions, t_max=FAR, least_decided=0.9):
    """Compare both queries with `brute_force` where float64 says that the answer is not a close call."""
    t, u, v, face, occluded = trace(Bvh(positions, indices, "cpu"), origins, directions, t_max)
    expected_t, expected_u, expected_v, expected_face, margin = brute_force(
        positions, indices, origins, directions, t_max
    )
    decided = margin > EDGE_MARGIN
    assert decided.mean() > least_decided
    np.testing.assert_array_equal(face[decided], expected_face[decided])
    np.testing.assert_array_equal(occluded[decided], expected_face[decided] >= 0)
    found = decided & (expected_face >= 0)
    size = np.ptp(positions, axis=0).max()
    np.testing.assert_allclose(t[found], expected_t[found], rtol=T_TOLERANCE, atol=T_TOLERANCE * size)
    np.testing.assert_allclose(u[found], expected_u[found], atol=BARYCENTRIC_TOLERANCE)
    np.testing.assert_allclose(v[found], expected_v[found], atol=BARYCENTRIC_TOLERANCE)
    return found


@pytest.mark.parametrize("n_faces", [1, 7, 8, 9, 64, 65, 700])
def test_soup_matches_brute_force(n_faces):
    """Distance, face and barycentrics agree with the float64 oracle on random triangles, for any fill of the leaves."""
    rng = np.random.default_rng(n_faces)
    centres = rng.uniform(-1, 1, (n_faces, 1, 3))
    positions = (centres + rng.normal(scale=0.3, size=(n_faces, 3, 3))).reshape(-1, 3).astype(np.float32)
    indices = rng.permutation(3 * n_faces).reshape(-1, 3).astype(np.int32)
    origins = rng.uniform(-1.5, 1.5, (1500, 3)).astype(np.float32)
    targets = positions[indices[rng.integers(n_faces, size=1500)]].mean(axis=1)
    directions = targets + rng.normal(scale=0.1, size=(1500, 3)) - origins
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = assert_matches_oracle(positions, indices, origins, directions.astype(np.float32), least_decided=0.7)
    assert found.sum() > 50


@pytest.mark.parametrize("t_max", [0.05, 0.5, 2.0])
def test_soup_matches_brute_force_within_t_max(t_max):
    """Hits beyond t_max do not count, neither for the closest hit nor for occlusion."""
    rng = np.random.default_rng(5)
    positions = rng.uniform(-1, 1, (300, 1, 3)) + rng.normal(scale=0.2, size=(300, 3, 3))
    positions = positions.reshape(-1, 3).astype(np.float32)
    indices = np.arange(900, dtype=np.int32).reshape(-1, 3)
    origins = rng.uniform(-1, 1, (2000, 3))
    found = assert_matches_oracle(positions, indices, origins, random_directions(rng, 2000), t_max)
    assert 0 < found.sum() < 2000


def test_axis_aligned_rays_match_brute_force():
    """Directions with one or two zero components, of either sign, agree with the oracle."""
    rng = np.random.default_rng(6)
    positions = rng.uniform(-1, 1, (200, 1, 3)) + rng.normal(scale=0.2, size=(200, 3, 3))
    positions = positions.reshape(-1, 3).astype(np.float32)
    indices = np.arange(600, dtype=np.int32).reshape(-1, 3)
    signs = [
        (x, y, z)
        for x in (-1, 0, 1)
        for y in (-1, 0, 1)
        for z in (-1, 0, 1)
        if 0 in (x, y, z) and (x, y, z) != (0, 0, 0)
    ]
    directions = np.repeat(np.array(signs, float), 100, axis=0)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions[::2] = np.where(directions[::2] == 0, -0.0, directions[::2])
    origins = rng.uniform(-1, 1, directions.shape)
    found = assert_matches_oracle(positions, indices, origins, directions)
    assert found.sum() > 200


def plane_grid(n):
    """(n x n) unit cells of two triangles in the plane z = 0."""
    x, y = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    positions = np.stack([x, y, np.zeros_like(x)], axis=2).reshape(-1, 3).astype(np.float32)
    a = (np.arange(n)[:, None] * (n + 1) + np.arange(n)).ravel()
    indices = np.concatenate([np.stack([a, a + n + 1, a + n + 2], 1), np.stack([a, a + n + 2, a + 1], 1)])
    return positions, indices.astype(np.int32)


def test_rays_through_vertices_and_edges_hit():
    """Rays that meet a flat grid exactly in a vertex or an edge, with flat boxes, hit it at the exact distance."""
    positions, indices = plane_grid(20)
    edges = (positions[indices[:, [0, 1, 2]]] + positions[indices[:, [1, 2, 0]]]).reshape(-1, 3) / 2
    points = np.concatenate([positions, edges])
    origins = points + np.array([0, 0, 2])
    t, _, _, face, occluded = trace(
        Bvh(positions, indices, "cpu"), origins, np.tile([0.0, 0.0, -1.0], (len(points), 1))
    )
    assert (face >= 0).all() and (occluded == 1).all()
    np.testing.assert_array_equal(t, 2.0)


def test_single_triangle_closed_form():
    """A triangle is hit from both sides at the point that its barycentrics name."""
    positions = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    indices = np.array([[0, 1, 2]], np.int32)
    origins = [[0.2, 0.3, 1.0], [0.2, 0.3, -2.0], [0.7, 0.7, 1.0], [0.2, 0.3, 1.0]]
    directions = [[0, 0, -1], [0, 0, 1], [0, 0, -1], [0, 0, 1]]
    t, u, v, face, occluded = trace(Bvh(positions, indices, "cpu"), origins, directions)
    np.testing.assert_array_equal(face, [0, 0, -1, -1])
    np.testing.assert_array_equal(occluded, [1, 1, 0, 0])
    np.testing.assert_allclose(t[:2], [1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(u[:2], 0.2, rtol=1e-6)
    np.testing.assert_allclose(v[:2], 0.3, rtol=1e-6)


def test_t_max_is_exclusive():
    """A hit counts where 0 < t < t_max: not at t_max itself, not behind the origin."""
    positions = np.array([[-1, -1, 0], [1, -1, 0], [0, 1, 0]], np.float32)
    bvh = Bvh(positions, np.array([[0, 1, 2]], np.int32), "cpu")
    t_max = np.array([1.0, np.nextafter(np.float32(1.0), np.float32(2.0)), 0.5, 0.0, -1.0, np.inf], np.float32)
    origins = np.tile([0.0, 0.0, 1.0], (6, 1))
    *_, face, occluded = trace(bvh, origins, np.tile([0.0, 0.0, -1.0], (6, 1)), t_max)
    np.testing.assert_array_equal(face, [-1, 0, -1, -1, -1, 0])
    np.testing.assert_array_equal(occluded, [0, 1, 0, 0, 0, 1])
    *_, face, occluded = trace(bvh, origins, np.tile([0.0, 0.0, 1.0], (6, 1)), t_max)
    assert (face == -1).all() and (occluded == 0).all()


def test_empty_mesh_is_missed():
    """A mesh without triangles is never hit, and t is t_max."""
    bvh = Bvh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32), "cpu")
    directions = random_directions(np.random.default_rng(0), 1000)
    t, _, _, face, occluded = trace(bvh, np.zeros((1000, 3)), directions, 5.0)
    assert (face == -1).all() and (occluded == 0).all() and (t == 5.0).all()


def test_degenerate_triangles_are_never_hit():
    """Points, lines and non-finite triangles are skipped; the triangle among them is still found with its own index."""
    rng = np.random.default_rng(3)
    a, direction = rng.uniform(-1, 1, (50, 1, 3)), rng.normal(size=(50, 1, 3))
    lines = a + direction * np.array([0.0, 0.3, 1.0])[:, None]
    points = np.repeat(rng.uniform(-1, 1, (50, 1, 3)), 3, axis=1)
    repeated = rng.uniform(-1, 1, (50, 3, 3))
    repeated[:, 2] = repeated[:, 1]
    broken = rng.uniform(-1, 1, (4, 3, 3))
    broken[0, 0, 0], broken[1, 1, 1], broken[2, 2, 2], broken[3] = np.nan, np.inf, -np.inf, np.nan
    bad = np.concatenate([lines, points, repeated, broken])
    good = np.array([[[-9, -9, 2], [9, -9, 2], [0, 9, 2]]])
    for triangles, expected_face in ((bad, -1), (np.concatenate([bad, good]), len(bad))):
        positions = triangles.reshape(-1, 3).astype(np.float32)
        indices = np.arange(len(positions), dtype=np.int32).reshape(-1, 3)
        # Aim at the degenerate triangles themselves, then on through the good one.
        targets = np.concatenate([lines, points, repeated]).mean(axis=1)
        origins = targets - [0, 0, 3]
        t, u, v, face, occluded = trace(Bvh(positions, indices, "cpu"), origins, np.tile([0.0, 0.0, 1.0], (150, 1)))
        assert (face == expected_face).all() and (occluded == (expected_face >= 0)).all()
        assert np.isfinite([t, u, v]).all()


def sphere_room():
    """Closed sphere of 20480 triangles around the origin."""
    mesh = trimesh.creation.icosphere(subdivisions=5)
    return mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32)


def box_room():
    """Closed cuboid of 6 x 2 x 40^2 triangles, shared vertices, edge lengths 1, 2 and 0.03, away from the origin."""
    n = 40
    plane, cells = plane_grid(n)
    # Uneven cells, the same on every wall, so that walls share their vertices.
    stops = np.concatenate([[0.0], np.cumsum(np.random.default_rng(1).uniform(0.2, 1.8, n))])
    plane = stops[plane.astype(int)] / stops[-1]
    plane[:, 2] = 0.0
    walls = [np.roll(plane + np.array([0, 0, side]), axis, axis=1) for axis in range(3) for side in (0, 1)]
    positions = (np.concatenate(walls) * [1.0, 2.0, 0.03] + [10.0, -7.0, 3.0]).astype(np.float32)
    indices = np.concatenate([cells + i * len(plane) for i in range(6)])
    return positions, indices.astype(np.int32)


@pytest.mark.parametrize("room", [sphere_room, box_room])
def test_closed_room_does_not_leak(room):
    """A million random rays inside a closed room, some aimed at its vertices and edges, all hit a wall."""
    positions, indices = room()
    rng = np.random.default_rng(2)
    n = 1_000_000
    centre, half = positions.mean(axis=0), np.ptp(positions, axis=0) / 2
    origins = (centre + half * rng.uniform(-0.55, 0.55, (n, 3))).astype(np.float32)
    directions = random_directions(rng, n)
    corner = positions[indices[rng.integers(len(indices), size=n // 4)]]
    aimed = np.concatenate([corner[: n // 8, 0], corner[n // 8 :, :2].mean(axis=1)]) - origins[: n // 4]
    directions[: n // 4] = aimed / np.linalg.norm(aimed, axis=1, keepdims=True)
    t, u, v, face, occluded = trace(Bvh(positions, indices, "cpu"), origins, directions)
    assert (face < 0).sum() == 0
    assert (occluded != 1).sum() == 0
    weights = np.stack([1 - u - v, u, v], axis=1)
    assert weights.min() > -1e-5
    size = np.linalg.norm(half) + np.linalg.norm(centre)
    named = np.einsum("nk,nkd->nd", weights, positions[indices[face]])
    np.testing.assert_allclose(named, origins + t[:, None] * directions, atol=T_TOLERANCE * size)


def test_nested_scales_and_copies_fit_the_stack():
    """Triangles over 60 binary orders of magnitude and thousands of copies stay within the depth that queries allow."""
    base = np.array([[-1, -1, 1], [1, -1, 1], [0, 1, 1]], float)
    nested = base * 2.0 ** np.arange(-30, 30, 0.1)[:, None, None]
    copies = np.repeat(base[None] * 2.0**31, 5000, axis=0)
    positions = np.concatenate([nested, copies]).reshape(-1, 3).astype(np.float32)
    indices = np.arange(len(positions), dtype=np.int32).reshape(-1, 3)
    order = np.random.default_rng(4).permutation(len(indices))
    bvh = Bvh(positions, indices[order], "cpu")
    assert bvh.depth <= MAX_DEPTH
    start = 2.0 ** np.arange(-30, 30, 0.1)[5:-5:10] * 1.01
    t, _, _, face, occluded = trace(
        bvh, np.stack([0 * start, 0 * start, start], 1), np.tile([0, 0, 1], (len(start), 1))
    )
    np.testing.assert_array_equal(order[face], 5 + 10 * np.arange(len(start)) + 1)
    assert (occluded == 1).all()
    np.testing.assert_allclose(t, start / 1.01 * 2**0.1 - start, rtol=1e-4)


@pytest.mark.realdata
def test_real_mesh_agrees_with_warp():
    """Random rays around a scanned model meet it where Warp's own hierarchy says."""
    folder = Path(os.environ.get("NRC_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = folder / "sdf" / "armadillo.obj"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set NRC_DATA")
    model = trimesh.load(path, process=False, force="mesh")
    positions, indices = np.asarray(model.vertices, np.float32), np.asarray(model.faces, np.int32)
    rng = np.random.default_rng(7)
    n = 200_000
    lower, extent = positions.min(axis=0), np.ptp(positions, axis=0)
    origins = (lower + extent * rng.uniform(-0.2, 1.2, (n, 3))).astype(np.float32)
    directions = lower + extent * rng.uniform(0.3, 0.7, (n, 3)) - origins
    directions = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
    t, _, _, face, occluded = trace(Bvh(positions, indices, "cpu"), origins, directions)
    mesh = wp.Mesh(wp.array(positions, dtype=wp.vec3, device="cpu"), wp.array(indices.ravel(), dtype=int, device="cpu"))
    warp_t = wp.full(n, np.nan, dtype=float, device="cpu")
    rays = [wp.array(x, dtype=wp.vec3, device="cpu") for x in (origins, directions)]
    launch(trace_warp, n, inputs=[mesh.id, *rays], outputs=[warp_t], device=wp.get_device("cpu"))
    expected = warp_t.numpy()
    np.testing.assert_array_equal(occluded, face >= 0)
    # A silhouette can be grazed by one and missed by the other.
    differs = np.isfinite(expected) != (face >= 0)
    both = np.isfinite(expected) & (face >= 0)
    differs[both] = np.abs(t[both] - expected[both]) > T_TOLERANCE * extent.max()
    assert differs.mean() < 1e-4
    assert both.mean() > 0.5


@pytest.mark.parametrize(
    ("positions", "indices", "message"),
    [
        (np.zeros((3, 3)), np.array([[0, 1, 2]], np.int32), "positions must be .* float32"),
        (np.zeros((3, 2), np.float32), np.array([[0, 1, 2]], np.int32), "positions must be"),
        (np.zeros((3, 3), np.float32), np.array([[0, 1, 2]]), "indices must be .* int32"),
        (np.zeros((3, 3), np.float32), np.array([0, 1, 2], np.int32), "indices must be"),
        (np.zeros((3, 3), np.float32), np.array([[0, 1, 3]], np.int32), r"indices must be in \[0, 3\)"),
        (np.zeros((3, 3), np.float32), np.array([[0, -1, 2]], np.int32), r"indices must be in \[0, 3\)"),
    ],
)
def test_bvh_rejects_wrong_arrays(positions, indices, message):
    """Wrong shapes, dtypes and indices raise a ValueError that says what was expected."""
    with pytest.raises(ValueError, match=message):
        Bvh(positions, indices, "cpu")


def test_queries_compile_for_cuda(tmp_path):
    """Both queries assemble to sm_90 machine code without a GPU."""
    wp.compile_aot_module(sys.modules[__name__], arch=90, module_dir=tmp_path, use_ptx=False)
    assert any(path.stat().st_size > 1000 for path in tmp_path.rglob("*.cubin"))
