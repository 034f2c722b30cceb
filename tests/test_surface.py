"""Surfaces: reading and repairing mesh files, marching cubes in slabs, Chamfer distance and overlap."""

import numpy as np
import pytest
import trimesh

from nrc.fit import surface as surfaces
from nrc.fit.surface import (
    Surface,
    SurfaceError,
    chamfer,
    extract_surface,
    mesh_iou,
    open_edges,
    read_surface,
    write_surface,
)

CENTRE = np.array([0.5, 0.45, 0.55])


def sphere_distance(points, radius=0.3):
    """Distance to a sphere about CENTRE."""
    return np.linalg.norm(points - CENTRE, axis=1) - radius


def icosphere(radius=1.0, subdivisions=4):
    """A fine sphere as a surface."""
    mesh = trimesh.creation.icosphere(subdivisions, radius)
    return Surface(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32))


def box(lower, upper):
    """An axis-aligned box as a surface."""
    mesh = trimesh.creation.box(bounds=[lower, upper])
    return Surface(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32))


def write_obj(path, vertices, faces):
    """An OBJ file of what may be broken."""
    lines = [f"v {x} {y} {z}" for x, y, z in vertices] + [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_marching_cubes_of_a_sphere():
    """Volume and area agree with the closed form to the grid's second order; the surface is closed and faces out."""
    found = extract_surface(sphere_distance, resolution=64, device="cpu")
    step = 1 / 64  # a chord of length c lies c² / (8 r) inside: relative errors of a few (step / r)²
    assert found.volume == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=2 * (step / 0.3) ** 2)
    assert found.areas.sum() == pytest.approx(4 * np.pi * 0.3**2, rel=2 * (step / 0.3) ** 2)
    assert open_edges(found.faces) == 0
    assert len(found.vertices) - len(found.faces) / 2 == 2  # Euler characteristic of a sphere
    assert np.abs(sphere_distance(found.vertices.astype(float))).max() < step**2


def test_marching_cubes_in_other_boxes():
    """A box of unequal sides gets cells of one size, and positions are those of the function."""
    lower, upper = (-1.0, 2.0, 0.0), (3.0, 3.0, 1.5)

    def plane(points):
        return points[:, 0] + 2.0 * points[:, 2] - 1.333

    found = extract_surface(plane, lower=lower, upper=upper, resolution=40, device="cpu")
    np.testing.assert_allclose(plane(found.vertices), 0.0, atol=2e-6)
    np.testing.assert_allclose(found.vertices.min(axis=0), (-1.0, 2.0, 0.0), atol=1e-6)
    edges = np.linalg.norm(found.vertices[found.faces[:, 0]] - found.vertices[found.faces[:, 1]], axis=1)
    assert edges.max() < 0.1 * np.sqrt(3) + 1e-5  # no edge longer than a cell's diagonal
    density = extract_surface(lambda p: -plane(p), lower=lower, upper=upper, resolution=40, device="cpu")
    for surface, sign in ((found, 1.0), (density, -1.0)):  # faces towards larger values
        a, b, c = surface.vertices[surface.faces].transpose(1, 0, 2)
        normals = np.cross(b - a, c - a)
        assert (sign * normals @ (1.0, 0.0, 2.0) >= 0.0).all()


@pytest.mark.parametrize("kind", ["sphere", "noise"])
def test_slabs_make_no_difference(kind, monkeypatch):
    """Vertices on the planes between slabs are shared: the same surface, closed, whatever the slabs."""
    grid = np.random.default_rng(0).random((33, 20, 24)).astype(np.float32)
    for axis in range(3):
        np.moveaxis(grid, axis, 0)[[0, -1]] = 1.0
    results = []
    for points in (1 << 21, 33 * 20 * 24 // 5, 1):
        monkeypatch.setattr(surfaces, "SLAB_POINTS", points)
        if kind == "sphere":
            results.append(extract_surface(sphere_distance, resolution=33, device="cpu"))
        else:
            results.append(extract_surface(grid, level=0.5, device="cpu"))
    for found in results:
        assert open_edges(found.faces) == 0
        assert len(found.vertices) == len(results[0].vertices)
        assert len(found.faces) == len(results[0].faces)
        assert found.volume == pytest.approx(results[0].volume, rel=1e-6)


def test_marching_cubes_without_a_surface():
    """A level that is never crossed gives no triangles; bad grids are refused."""
    assert len(extract_surface(lambda p: np.ones(len(p)), resolution=8, device="cpu").faces) == 0
    with pytest.raises(SurfaceError, match="not finite"):
        extract_surface(lambda p: np.full(len(p), np.nan), resolution=8, device="cpu")
    with pytest.raises(SurfaceError, match="2 nodes"):
        extract_surface(np.zeros((1, 4, 4), np.float32), device="cpu")


def test_chamfer_of_concentric_spheres():
    """The distance of concentric spheres is the difference of their radii, in either order."""
    a, b = icosphere(1.0), icosphere(1.2)
    assert chamfer(a, b, n_points=4000, device="cpu") == pytest.approx(0.2, abs=3e-3)  # facets: 0.2 % of the radius
    assert chamfer(b, a, n_points=4000, device="cpu") == pytest.approx(0.2, abs=3e-3)
    assert chamfer(a, a, n_points=4000, device="cpu") < 1e-6


def test_chamfer_averages_both_ways():
    """A small square beside a large one: each way is a mean by area, computed here on a fine grid."""
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    large, small = Surface(vertices, faces), Surface(vertices * np.float32([0.5, 1, 1]), faces)
    # Towards the small one: 0 on its half, x - 1/2 on the other, mean 1/8; the other way 0
    assert chamfer(large, small, n_points=20000, device="cpu") == pytest.approx(1 / 16, abs=2e-3)


def test_overlap_of_boxes():
    """Intersection over union of two boxes is that of their volumes, to the noise of the points."""
    a, b = box((0, 0, 0), (2, 1, 1)), box((1, 0, 0), (3, 1, 1))
    n = 1 << 15
    assert mesh_iou(a, b, n_points=n, device="cpu") == pytest.approx(1 / 3, abs=4 / np.sqrt(n))
    assert mesh_iou(a, a, n_points=n, device="cpu") == 1.0
    assert mesh_iou(a, box((5, 0, 0), (6, 1, 1)), n_points=n, device="cpu") == 0.0


@pytest.mark.parametrize("kind", [".ply", ".obj", ".glb"])
def test_written_surfaces_are_read_back(kind, tmp_path):
    """Every format that is written keeps triangles and places."""
    there = icosphere(2.0, 2)
    write_surface(tmp_path / f"a{kind}", there)
    back = read_surface(tmp_path / f"a{kind}")
    assert back.volume == pytest.approx(there.volume, rel=1e-6)
    assert (len(back.vertices), len(back.faces)) == (len(there.vertices), len(there.faces))
    assert back.warnings == ()


@pytest.mark.parametrize("kind", [".ply", ".obj", ".glb"])
def test_written_colors_are_kept(kind, tmp_path):
    """Vertex colours reach the file as they are."""
    there = icosphere(1.0, 1)
    colors = np.random.default_rng(1).integers(0, 256, (len(there.vertices), 3)).astype(np.uint8)
    write_surface(tmp_path / f"a{kind}", Surface(there.vertices, there.faces, colors))
    back = trimesh.load(tmp_path / f"a{kind}", process=False, force="mesh")
    np.testing.assert_allclose(np.asarray(back.vertices), there.vertices, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back.visual.vertex_colors)[:, :3], colors)


def test_scene_transforms_are_applied(tmp_path):
    """The nodes of a GLB become one surface in the coordinates of the scene."""
    scene = trimesh.Scene()
    for k in range(3):
        matrix = trimesh.transformations.translation_matrix((3.0 * k, 0, 0)) @ np.diag([1.0 + k, 1, 1, 1])
        scene.add_geometry(trimesh.creation.box((1, 1, 1)), transform=matrix)
    scene.export(tmp_path / "boxes.glb")
    found = read_surface(tmp_path / "boxes.glb")
    assert found.volume == pytest.approx(1 + 2 + 3, rel=1e-6)
    np.testing.assert_allclose(found.vertices.max(axis=0), (7.5, 0.5, 0.5), atol=1e-6)


def test_stl_vertices_are_merged(tmp_path):
    """STL repeats the vertices of each triangle; the surface shares them and is closed."""
    trimesh.creation.icosphere(2).export(tmp_path / "ball.stl")
    found = read_surface(tmp_path / "ball.stl")
    assert (len(found.vertices), len(found.faces), open_edges(found.faces)) == (162, 320, 0)


def test_degenerate_triangles_are_dropped_and_counted(tmp_path):
    """A repeated vertex and three vertices in a line have no area; what they close stays closed."""
    vertices = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0, 0)]
    # The edge 0-1 of the front is split by vertex 4, the sliver 0 1 4 joins it to the unsplit one below
    faces = [(0, 2, 1), (0, 4, 3), (4, 1, 3), (0, 1, 4), (0, 3, 2), (1, 2, 3), (2, 2, 1)]
    found = read_surface(write_obj(tmp_path / "a.obj", vertices, faces))
    assert found.warnings == ("a.obj: 2 of 7 triangles are degenerate, dropped",)
    assert found.volume == pytest.approx(1 / 6)


def test_open_edges_are_counted(tmp_path):
    """A tetrahedron without one side has three, one with a side turned around three, a whole one none."""
    vertices = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    faces = [(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)]
    assert open_edges(np.array(faces)) == 0
    assert open_edges(np.array([*faces[:3], (1, 3, 2)])) == 3
    assert open_edges(np.array(faces[:3])) == 3
    found = read_surface(write_obj(tmp_path / "a.obj", vertices, faces[:3]))
    assert found.warnings == ("a.obj: not closed, 3 boundary edges",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.obj", "", "a.obj: has no triangles"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "a.obj: all 1 triangles are degenerate"),
        ("a.obj", "v 0 0 0\nv 1 nan 0\nv 0 1 0\nf 1 2 3\n", "a.obj: .*not finite"),
        ("a.obj", "v 0 0 0\nf 1 2 3\n", "a.obj: not a readable OBJ file .*out of bounds"),
        ("a.stl", "solid", "a.stl: "),
        ("a.ply", "ply\nformat ascii 1.0\nelement", "a.ply: "),
        ("a.glb", "glTF", "a.glb: "),
        ("a.xyz", "0 0 0", "a.xyz: cannot read '.xyz' as a mesh"),
    ],
)
def test_bad_files_are_one_line(name, content, message, tmp_path):
    """Empty, broken and unknown files: one line that names the file."""
    (tmp_path / name).write_text(content)
    with pytest.raises(SurfaceError, match=message) as caught:
        read_surface(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_bad_targets_are_named(tmp_path):
    """Files that are not there or cannot be written."""
    with pytest.raises(SurfaceError, match=r"none\.obj: No such file"):
        read_surface(tmp_path / "none.obj")
    with pytest.raises(SurfaceError, match=r"cannot write '\.stl'"):
        write_surface(tmp_path / "a.stl", icosphere(1.0, 1))
    with pytest.raises(SurfaceError, match="no folder"):
        write_surface(tmp_path / "none" / "a.ply", icosphere(1.0, 1))
    with pytest.raises(SurfaceError, match="no triangles"):
        write_surface(tmp_path / "a.ply", Surface(np.empty((0, 3), np.float32), np.empty((0, 3), np.int32)))
