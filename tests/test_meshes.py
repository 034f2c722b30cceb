"""OBJ with MTL, PLY, STL and the procedural shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from nrc.assets import load, shapes
from nrc.scene import Material, Mesh, Scene, SceneError, Texture

FLOAT32 = 1e-6  # rounding of values of order one in single precision

SQUARE = """
mtllib square.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
vt 0 0
vt 1 0
vt 1 0.75
vt 0 1
vn 0 0 2
usemtl paint
"""


def obj(folder: Path, text: str, mtl: str | None = "newmtl paint\nKd 0.2 0.4 0.6\n") -> Scene:
    """Scene of an OBJ text with the library square.mtl."""
    if mtl is not None:
        (folder / "square.mtl").write_text(mtl)
    (folder / "square.obj").write_text(text)
    return load(folder / "square.obj")


def material(folder: Path, mtl: str) -> Material:
    """The material `paint` with statements `mtl`."""
    return obj(folder, SQUARE + "f 1 2 3\n", "newmtl paint\n" + mtl).materials[0]


def corners(mesh: Mesh) -> np.ndarray:
    """Positions (m, 3, 3) of the triangles' corners."""
    return mesh.positions[mesh.indices]


@pytest.mark.parametrize("face", ["f 1/1/1 2/2/1 3/3/1 4/4/1", "f -4/-4/-1 -3/-3/-1 -2/-2/-1 -1/-1/-1"])
def test_obj_polygon_becomes_fan(tmp_path: Path, face: str) -> None:
    """A quad with absolute or relative indices: two triangles, unit normals, v measured from the top."""
    scene = obj(tmp_path, SQUARE + face)
    mesh = scene.meshes[0]
    expected = [[(0, 0, 0), (1, 0, 0), (1, 1, 0)], [(0, 0, 0), (1, 1, 0), (0, 1, 0)]]
    np.testing.assert_array_equal(corners(mesh), expected)
    assert mesh.uv0 is not None and mesh.normals is not None
    np.testing.assert_allclose(mesh.uv0[mesh.indices[0]], [(0, 1), (1, 1), (1, 0.25)])
    np.testing.assert_allclose(mesh.normals, np.tile((0, 0, 1), (4, 1)))
    assert scene.materials[mesh.material].base_color == (0.2, 0.4, 0.6)


def test_obj_splits_vertices_by_corner(tmp_path: Path) -> None:
    """One position with two texture coordinates becomes two vertices; shared corners stay one."""
    mesh = obj(tmp_path, SQUARE + "f 1/1 2/2 3/3\nf 1/2 3/3 4/4\n").meshes[0]
    assert len(mesh.positions) == 5
    assert mesh.normals is None


def test_obj_groups_by_material(tmp_path: Path) -> None:
    """Faces of two materials become two meshes; an undefined material and unknown statements are named."""
    scene = obj(tmp_path, SQUARE + "f 1 2 3\nusemtl missing\nf 1 3 4\nl 1 2\n")
    assert [scene.materials[mesh.material].name for mesh in scene.meshes] == ["paint", "missing"]
    assert any("'missing' is not defined" in w for w in scene.warnings)
    assert any("statements not drawn: l" in w for w in scene.warnings)


def test_obj_without_library_is_grey(tmp_path: Path) -> None:
    """A missing MTL file is a warning, not an error."""
    scene = obj(tmp_path, SQUARE + "f 1 2 3\n", mtl=None)
    assert any("square.mtl" in w for w in scene.warnings)
    assert scene.materials[0].kind == "diffuse" and scene.materials[0].two_sided


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v 0 0 x\n", r"square.obj: line 1: cannot read 'v 0 0 x'"),
        ("v 0 0\nv 1 0\nv 1 1\nf 1 2 3\n", r"square.obj: a vertex has fewer than three coordinates"),
        ("v 0 0 0\nf 1 2 3\n", r"square.obj: a face refers to element 2 of 1"),
        ("v 0 0 0\nf 1/9 1 1\n", r"square.obj: a face refers to element 9 of 0"),
        ("v 0 0 0\nf 1 1 nan\n", r"square.obj: line 2: cannot read"),
        ("v 0 0 inf\nv 0 1 0\nv 1 0 0\nf 1 2 3\n", r"square.obj: .*not finite"),
        ("v 0 0 0\n", r"square: has no triangles|square.obj"),
    ],
)
def test_bad_obj_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    """Faults are one SceneError naming file and line or cause."""
    with pytest.raises(SceneError, match=message):
        obj(tmp_path, text)


def test_mtl_kinds(tmp_path: Path) -> None:
    """Phong, mirror, glass and PBR statements map to the documented kinds."""
    assert material(tmp_path, "Kd .5 .5 .5\nKs 0 0 0\nillum 2").kind == "diffuse"
    assert material(tmp_path, "Kd .5 .5 .5\nKs .3 .3 .3\nillum 1").kind == "diffuse"
    shiny = material(tmp_path, "Kd .5 .5 .5\nKs .3 .2 .1\nNs 30\nNi 1.4\nillum 2")
    assert (shiny.kind, shiny.specular, shiny.ior) == ("plastic", (0.3, 0.2, 0.1), 1.4)
    alpha = np.sqrt(2 / 32)
    np.testing.assert_allclose(shiny.roughness, np.sqrt(alpha))
    assert material(tmp_path, "Kd 0 0 0\nKs .9 .8 .7\nNs 100").kind == "conductor"
    mirror = material(tmp_path, "Kd 0.01 0 0\nKs .9 .8 .7\nNs 100\nillum 5")
    assert (mirror.kind, mirror.roughness, mirror.specular) == ("conductor", (0.0, 0.0), (0.9, 0.8, 0.7))
    glass = material(tmp_path, "Kd 0 0 0\nKs 1 1 1\nTf 0.25 1 0.81\nNi 1.33\nillum 7\nd 0.2")
    assert (glass.kind, glass.ior, glass.alpha_mode) == ("dielectric", 1.33, "opaque")
    np.testing.assert_allclose(glass.transmittance, (0.5, 1.0, 0.9))
    pbr = material(tmp_path, "Kd 1 .8 .2\nPr 0.3\nPm 1")
    assert (pbr.kind, pbr.roughness, pbr.metallic) == ("metallic_roughness", (0.3, 0.3), 1.0)


def test_mtl_emission_and_opacity(tmp_path: Path) -> None:
    """Ke emits; d and Tr = 1 - d give the opacity; unknown statements are named."""
    scene = obj(tmp_path, SQUARE + "f 1 2 3\n", "newmtl paint\nKe 17 12 4\nPe 10\nTr 0.75\n")
    lamp = scene.materials[0]
    assert (lamp.emission, lamp.base_color, lamp.emits) == ((17.0, 12.0, 4.0), (0.0, 0.0, 0.0), True)
    assert (lamp.opacity, lamp.alpha_mode) == (0.25, "blend")
    assert scene.environment is None
    assert any("ignored: pe" in w for w in scene.warnings)
    assert material(tmp_path, "Kd 1 1 1\nd 0.5").opacity == 0.5
    assert material(tmp_path, "Kd 1 1 1\nd 1.0").alpha_mode == "opaque"


def test_mtl_maps(tmp_path: Path) -> None:
    """Maps with options: scale and offset act on v from the bottom; a bluish bump map is a normal map."""
    Image.new("RGB", (2, 2), (10, 20, 30)).save(tmp_path / "my colour.png")
    Image.new("L", (2, 2), 90).save(tmp_path / "height.png")
    Image.new("RGB", (2, 2), (128, 128, 255)).save(tmp_path / "blue.png")
    paint = material(tmp_path, "map_Kd -s 2 4 1 -o 0.25 0.5 -clamp on my colour.png\nbump -bm 0.1 height.png\nKd 0 0 0")
    texture = paint.base_color_texture
    assert isinstance(texture, Texture) and texture.srgb and texture.wrap_u == "clamp"
    assert paint.base_color == (1.0, 1.0, 1.0)
    u, v_up = 0.3, 0.2
    looked_up = texture.transform @ (u, 1.0 - v_up, 1.0)
    np.testing.assert_allclose(looked_up, (2 * u + 0.25, 1.0 - (4 * v_up + 0.5)), atol=1e-12)
    assert isinstance(paint.bump_texture, Texture) and paint.bump_scale == 0.1 and not paint.bump_texture.srgb
    bumped = material(tmp_path, "Kd 1 1 1\nmap_Bump blue.png")
    assert bumped.normal_texture is not None and bumped.bump_texture is None
    scene = obj(tmp_path, SQUARE + "f 1 2 3\n", "newmtl paint\nmap_Kd lost.png\n")
    assert any("'lost.png' does not exist" in w for w in scene.warnings)


def test_mtl_bad_number_is_an_error(tmp_path: Path) -> None:
    """A statement that is no number names file, material and statement."""
    with pytest.raises(SceneError, match=r"square.mtl: material 'paint': kd: not a number"):
        material(tmp_path, "Kd red")


@pytest.mark.parametrize("encoding", ["binary_little_endian", "ascii"])
def test_ply_attributes_are_read(tmp_path: Path, encoding: str) -> None:
    """Normals, texture coordinates and sRGB colours of vertices; polygons of a quad become two triangles."""
    header = "ply\nformat {} 1.0\nelement vertex 4\n" + "".join(
        f"property {kind} {name}\n"
        for kind, names in (("float", "x y z nx ny nz s t"), ("uchar", "red green blue"))
        for name in names.split()
    )
    header = header.format(encoding) + "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    dtype = np.dtype([("f", "<f4", 8), ("c", "u1", 3)])
    rows = np.zeros(4, dtype)
    rows["f"][:, :2] = [(0, 0), (1, 0), (1, 1), (0, 1)]
    rows["f"][:, 5] = 1.0
    rows["f"][:, 6:] = [(0, 0), (1, 0), (1, 1), (0, 1)]
    rows["c"] = (255, 188, 0)
    if encoding == "ascii":
        lines = [" ".join(map(str, [*map(float, r["f"]), *map(int, r["c"])])) for r in rows]
        body = ("\n".join(lines) + "\n4 0 1 2 3\n").encode()
    else:
        body = rows.tobytes() + b"\4" + np.arange(4, dtype="<i4").tobytes()
    (tmp_path / "quad.ply").write_bytes(header.encode() + body)
    scene = load(tmp_path / "quad.ply")
    mesh = scene.meshes[0]
    assert len(mesh.indices) == 2
    assert mesh.normals is not None and mesh.uv0 is not None and mesh.colors is not None
    np.testing.assert_allclose(mesh.normals, np.tile((0, 0, 1), (4, 1)))
    np.testing.assert_allclose(mesh.uv0, [(0, 1), (1, 1), (1, 0), (0, 0)])
    linear = ((188 / 255 + 0.055) / 1.055) ** 2.4
    np.testing.assert_allclose(mesh.colors[0], (1, linear, 0, 1), atol=FLOAT32)
    assert scene.materials[0].base_color == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["stl", "stl_ascii", "ply"])
def test_exported_mesh_reads_back(tmp_path: Path, kind: str) -> None:
    """A mesh written by trimesh keeps its triangles; without normals in the file it is flat."""
    ball = trimesh.creation.icosphere(subdivisions=1)
    path = tmp_path / ("ball." + kind[:3])
    ball.export(path, file_type=kind)
    mesh = load(path).meshes[0]
    np.testing.assert_allclose(corners(mesh), ball.triangles, atol=FLOAT32)
    assert mesh.normals is None


@pytest.mark.parametrize("name", ["cut.ply", "cut.stl"])
def test_bad_mesh_file_is_an_error(tmp_path: Path, name: str) -> None:
    """A file cut short, and one of rubbish, give SceneError naming the file."""
    path = tmp_path / name
    trimesh.creation.box().export(path)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"rubbish", b""):
        path.write_bytes(broken)
        with pytest.raises(SceneError, match=name):
            load(path)


SHAPES: list[tuple[Callable[[], shapes.Shape], float]] = [  # shape, exact area
    (shapes.rectangle, 4.0),
    (shapes.cube, 24.0),
    (shapes.sphere, 4.0 * np.pi),
    (shapes.disk, np.pi),
    (shapes.cylinder, 2.0 * np.pi),
]


@pytest.mark.parametrize(("make", "area"), SHAPES)
def test_shape_is_exact_and_faces_outwards(make: Callable[[], shapes.Shape], area: float) -> None:
    """Area as the smooth shape's (planar: to rounding, curved: 0.2 %), winding and normals agree, sphere closed."""
    shape = make()
    a, b, c = (shape.positions[shape.indices[:, i]].astype(float) for i in range(3))
    n = np.cross(b - a, c - a)
    doubled = np.linalg.norm(n, axis=1)
    assert doubled.min() > 0.0
    tolerance = 1e-6 if make in (shapes.rectangle, shapes.cube) else 2e-3
    assert doubled.sum() / 2.0 == pytest.approx(area, rel=tolerance)
    for corner in range(3):
        cosine = np.einsum("ij,ij->i", n, shape.normals[shape.indices[:, corner]]) / doubled
        assert cosine.min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(shape.normals, axis=1), 1.0, atol=FLOAT32)
    if make in (shapes.cube, shapes.sphere):
        assert trimesh.Trimesh(shape.positions, shape.indices).is_watertight


@pytest.mark.parametrize("name", ["rectangle", "cube", "sphere", "disk", "cylinder"])
def test_shape_matches_mitsuba_parameterisation(name: str) -> None:
    """Position, normal and uv of random rays' hits agree with Mitsuba's shape of the same name."""
    mi = pytest.importorskip("mitsuba")
    mi.set_variant("scalar_rgb")
    shape = getattr(shapes, name)()
    theirs = mi.load_dict({"type": "scene", "shape": {"type": name}})
    ours = trimesh.Trimesh(shape.positions, shape.indices, process=False)
    rng = np.random.default_rng(0)
    origins = rng.standard_normal((200, 3)) * 4.0 + (0.0, 0.0, 3.0)
    targets = rng.uniform(-0.7, 0.7, (200, 3))
    triangles, compared = ours.triangles, 0
    for origin, target in zip(origins, targets, strict=True):
        direction = (target - origin) / np.linalg.norm(target - origin)
        hit = theirs.ray_intersect(mi.Ray3f(origin, direction))
        if not hit.is_valid():
            continue
        point = np.array(hit.p)
        near = np.argsort(((ours.triangles_center - point) ** 2).sum(axis=1))[:16]
        barycentric = trimesh.triangles.points_to_barycentric(triangles[near], np.tile(point, (len(near), 1)))
        inside = np.flatnonzero((barycentric > -0.02).all(axis=1))
        normal = np.array(hit.sh_frame.n)
        inside = [i for i in inside if ours.face_normals[near[i]] @ normal > 0.9]
        if not inside:
            continue
        weights, triangle = barycentric[inside[0]], shape.indices[near[inside[0]]]
        uv, theirs_uv = weights @ shape.uv[triangle], np.array(hit.uv)
        distances = {"sphere": min(theirs_uv[1], 1.0 - theirs_uv[1]), "disk": theirs_uv[0]}
        if distances.get(name, 1.0) < 0.1:
            continue  # the azimuth is singular at poles and centre
        np.testing.assert_allclose(uv, theirs_uv, atol=0.012)  # two thirds of a cell
        np.testing.assert_allclose(weights @ shape.positions[triangle], point, atol=0.003)
        compared += 1
    assert compared > 30


BOXES = [  # triangles and kinds of special materials of the McGuire Cornell boxes
    ("CornellBox-Original", 36, {}),
    ("CornellBox-Empty-CO", 12, {}),
    ("CornellBox-Empty-RG", 12, {}),
    ("CornellBox-Empty-White", 12, {}),
    ("CornellBox-Empty-Squashed", 12, {}),
    ("CornellBox-Glossy", 1112, {"sphere": "plastic", "floor": "plastic"}),
    ("CornellBox-Mirror", 36, {"tallBox": "conductor"}),
    ("CornellBox-Sphere", 2188, {"leftSphere": "conductor", "rightSphere": "dielectric"}),
    ("CornellBox-Water", 7088, {"leftSphere": "conductor", "rightSphere": "dielectric", "water": "dielectric"}),
]


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "triangles", "kinds"), BOXES)
def test_mcguire_box_loads(data: Path, name: str, triangles: int, kinds: dict[str, str]) -> None:
    """The boxes load with a light that faces down and no default environment."""
    scene = load(data / "scenes" / "mcguire-cornellbox" / f"{name}.obj")
    assert sum(len(mesh.indices) for mesh in scene.meshes) == triangles
    assert {m.name: m.kind for m in scene.materials if m.kind != "diffuse"} == kinds
    assert scene.environment is None
    lamps = [mesh for mesh in scene.meshes if scene.materials[mesh.material].emits]
    assert len(lamps) == 1
    a, b, c = corners(lamps[0])[0].astype(float)
    assert np.cross(b - a, c - a)[1] < 0.0
