"""The Mitsuba reader against Mitsuba itself: rays, lookups, geometry and parameters must be the same numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from nrc.assets.mitsuba import load_mitsuba
from nrc.assets.model import flatten
from nrc.scene import Camera, Checkerboard, Environment, Mesh, Scene, SceneError, Texture

mi = pytest.importorskip("mitsuba", reason="the mitsuba package is not installed")

SINGLE = 2e-5  # relative rounding of a few float32 operations
SENSOR = (
    '<sensor type="perspective"><float name="fov" value="40"/><film type="hdrfilm"><rfilter type="box"/>'
    "</film></sensor>"
)
SHAPE = '<shape type="rectangle"/>'


@pytest.fixture(autouse=True)
def _variant():
    mi.set_variant("scalar_rgb")


def write(folder: Path, body: str, version: str = "3.0.0") -> Path:
    path = folder / "scene.xml"
    path.write_text(f'<scene version="{version}">{body}</scene>')
    return path


def read(folder: Path, body: str, **options) -> Scene:
    return load_mitsuba(write(folder, body), **options)


def find(scene, kind):
    return next(shape for shape in scene.shapes() if isinstance(shape, kind))


# Camera


def pinhole_directions(camera: Camera, width: int, height: int, film: np.ndarray) -> np.ndarray:
    hx, hy = camera.half_extents(width, height)
    local = np.column_stack([(2 * film[:, 0] - 1) * hx, (1 - 2 * film[:, 1]) * hy, -np.ones(len(film))])
    return local @ camera.to_world[:3, :3].T


LOOK = '<transform name="to_world"><lookat origin="1,2,3" target="-0.5,0.5,0.2" up="0.1,1,0"/></transform>'
FIELDS_OF_VIEW = {
    "default": '<float name="fov" value="50"/>',
    "x": '<float name="fov" value="50"/><string name="fov_axis" value="x"/>',
    "y": '<float name="fov" value="35"/><string name="fov_axis" value="y"/>',
    "smaller": '<float name="fov" value="35"/><string name="fov_axis" value="smaller"/>',
    "larger": '<float name="fov" value="70"/><string name="fov_axis" value="larger"/>',
    "diagonal": '<float name="fov" value="70"/><string name="fov_axis" value="diagonal"/>',
    "nothing": "",
    "focal_length": '<string name="focal_length" value="35mm"/>',
}


@pytest.mark.parametrize("size", [(64, 32), (24, 48)])
@pytest.mark.parametrize("field", FIELDS_OF_VIEW)
def test_perspective_rays_are_mitsubas(tmp_path, field, size):
    """Directions through random film positions agree with `Sensor.sample_ray`."""
    width, height = size
    film = (
        f'<film type="hdrfilm"><integer name="width" value="{width}"/><integer name="height" value="{height}"/></film>'
    )
    body = f'<sensor type="perspective">{LOOK}{FIELDS_OF_VIEW[field]}{film}</sensor>{SHAPE}'
    scene = read(tmp_path, body)
    sensor = mi.load_file(str(tmp_path / "scene.xml")).sensors()[0]
    positions = np.random.default_rng(1).random((20, 2))
    expected = np.array([np.array(sensor.sample_ray(0.0, 0.5, tuple(p), (0.5, 0.5))[0].d) for p in positions])
    ours = pinhole_directions(scene.camera, width, height, positions)
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, expected, atol=SINGLE)
    np.testing.assert_allclose(scene.camera.to_world[:3, 3], [1, 2, 3], atol=SINGLE)
    assert (scene.settings.width, scene.settings.height) == size


def test_thinlens_rays_meet_in_the_plane_in_focus(tmp_path):
    """Lens rays start within the aperture and meet where our pinhole ray crosses the focus distance."""
    lens = '<float name="aperture_radius" value="0.2"/><float name="focus_distance" value="3.5"/>'
    body = f'<sensor type="thinlens">{LOOK}<float name="fov" value="50"/>{lens}<film type="hdrfilm"/></sensor>{SHAPE}'
    camera = read(tmp_path, body).camera
    sensor = mi.load_file(str(tmp_path / "scene.xml")).sensors()[0]
    rng = np.random.default_rng(2)
    to_local = np.linalg.inv(camera.to_world)
    radii = []
    for film in rng.random((5, 2)):
        meeting = pinhole_directions(camera, 768, 576, film[None])[0] * camera.focus_distance + camera.to_world[:3, 3]
        for lens_sample in rng.random((8, 2)):
            ray = sensor.sample_ray(0.0, 0.5, tuple(film), tuple(lens_sample))[0]
            o, d = np.array(ray.o, float), np.array(ray.d, float)
            local_o, local_d = to_local[:3, :3] @ o + to_local[:3, 3], to_local[:3, :3] @ d
            at = o + d * (-camera.focus_distance - local_o[2]) / local_d[2]
            np.testing.assert_allclose(at, meeting, atol=1e-4)
            start = local_o - local_d * local_o[2] / local_d[2]
            radii.append(np.linalg.norm(start[:2]))
    assert max(radii) <= camera.aperture_radius * (1 + 1e-3)
    assert max(radii) > 0.8 * camera.aperture_radius


def test_settings_come_from_film_sampler_and_integrator(tmp_path):
    """Size, samples, depth and roulette depth are the file's; without them Mitsuba's defaults hold."""
    sensor = (
        '<sensor type="perspective"><float name="fov" value="40"/><sampler type="independent">'
        '<integer name="sample_count" value="7"/></sampler><film type="hdrfilm"><integer name="width" value="33"/>'
        '<integer name="height" value="21"/><rfilter type="box"/></film></sensor>'
    )
    depths = '<integer name="max_depth" value="9"/><integer name="rr_depth" value="3"/>'
    scene = read(tmp_path, f'<integrator type="path">{depths}</integrator>{sensor}{SHAPE}')
    values = scene.settings
    assert (values.width, values.height, values.spp, values.max_depth, values.rr_depth) == (33, 21, 7, 9, 3)
    assert scene.warnings == ()
    values = read(tmp_path, f'<integrator type="path"/>{SENSOR}{SHAPE}').settings
    assert (values.width, values.height, values.max_depth, values.rr_depth) == (768, 576, -1, 5)


# Textures


def srgb_to_linear(x: np.ndarray) -> np.ndarray:
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def lookup(texture: Texture | Checkerboard, uv: tuple[float, float]) -> np.ndarray:
    """`Texture` and `Checkerboard` as their docstrings define them."""
    u, v = texture.transform @ [*uv, 1.0]
    if isinstance(texture, Checkerboard):
        same = (u - np.floor(u) > 0.5) == (v - np.floor(v) > 0.5)
        return np.array(texture.color0 if same else texture.color1)
    image = texture.image.astype(float) / (255.0 if texture.image.dtype == np.uint8 else 1.0)
    image = srgb_to_linear(image) if texture.srgb else image
    height, width = image.shape[:2]

    def texel(x: int, y: int) -> np.ndarray:
        def wrap(i: int, n: int, mode: str) -> int:
            if mode == "clamp":
                return min(max(i, 0), n - 1)
            if mode == "mirror":
                i %= 2 * n
                return i if i < n else 2 * n - 1 - i
            return i % n

        return image[wrap(y, height, texture.wrap_v), wrap(x, width, texture.wrap_u)]

    if texture.filter == "nearest":
        return texel(int(np.floor(u * width)), int(np.floor(v * height)))
    x, y = u * width - 0.5, v * height - 0.5
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    s, t = x - x0, y - y0
    top = texel(x0, y0) * (1 - s) + texel(x0 + 1, y0) * s
    return top * (1 - t) + (texel(x0, y0 + 1) * (1 - s) + texel(x0 + 1, y0 + 1) * s) * t


def save_image(path: Path, channels: int) -> None:
    from PIL import Image

    texels = np.random.default_rng(channels).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    Image.fromarray(texels[..., 0] if channels == 1 else texels).save(path)


def mitsuba_lookup(texture, uv: tuple[float, float]) -> np.ndarray:
    si = mi.SurfaceInteraction3f()
    si.uv = uv
    return np.array(texture.eval(si), float).ravel()


TO_UV = (
    '<transform name="to_uv"><scale x="1.7" y="2.3"/><rotate z="1" angle="20"/><translate x="0.3" y="-0.2"/>'
    "</transform>"
)


@pytest.mark.parametrize("wrap", ["repeat", "clamp", "mirror"])
@pytest.mark.parametrize("filtering", ["bilinear", "nearest"])
@pytest.mark.parametrize(("channels", "raw"), [(3, False), (3, True), (4, False), (1, False)])
def test_bitmap_lookup_is_mitsubas(tmp_path, wrap, filtering, channels, raw):
    """Row order, texel centres, wrapping, filter, to_uv and sRGB decoding agree at random coordinates."""
    save_image(tmp_path / "t.png", channels)
    texture = (
        f'<texture type="bitmap" name="reflectance"><string name="filename" value="t.png"/>{TO_UV}'
        f'<string name="wrap_mode" value="{wrap}"/><string name="filter_type" value="{filtering}"/>'
        f'<boolean name="raw" value="{str(raw).lower()}"/></texture>'
    )
    scene = read(tmp_path, f'{SENSOR}<shape type="rectangle"><bsdf type="diffuse">{texture}</bsdf></shape>')
    ours = scene.materials[0].base_color_texture
    assert scene.materials[0].base_color == (1.0, 1.0, 1.0)
    theirs = mi.load_dict({
        "type": "bitmap", "filename": str(tmp_path / "t.png"), "raw": raw, "wrap_mode": wrap,
        "filter_type": filtering, "to_uv": to_uv(),
    })  # fmt: skip
    for uv in np.random.default_rng(3).uniform(-1.5, 2.5, (60, 2)):
        expected = mitsuba_lookup(theirs, tuple(uv))
        np.testing.assert_allclose(np.broadcast_to(lookup(ours, uv), 3), expected, atol=1e-4)


def to_uv():
    t = mi.ScalarTransform4f()
    return t.translate([0.3, -0.2, 0]) @ t.rotate([0, 0, 1], 20) @ t.scale([1.7, 2.3, 1])


def test_checkerboard_lookup_is_mitsubas(tmp_path):
    """Which colour is where agrees, for colours (eval) and for single-channel parameters (eval_1)."""
    colours = '<rgb name="color0" value="0.9,0.5,0.1"/><rgb name="color1" value="0.2,0.3,0.4"/>'
    grey = '<float name="color0" value="0.09"/><float name="color1" value="0.64"/>'
    body = (
        f'<bsdf type="roughconductor">'
        f'<texture type="checkerboard" name="specular_reflectance">{colours}{TO_UV}</texture>'
        f'<texture type="checkerboard" name="alpha">{grey}{TO_UV}</texture></bsdf>'
    )
    material = read(tmp_path, f'{SENSOR}<shape type="rectangle">{body}</shape>').materials[0]
    board = {"type": "checkerboard", "to_uv": to_uv()}
    rgb = {"color0": {"type": "rgb", "value": [0.9, 0.5, 0.1]}, "color1": {"type": "rgb", "value": [0.2, 0.3, 0.4]}}
    colour, alpha = mi.load_dict(board | rgb), mi.load_dict(board | {"color0": 0.09, "color1": 0.64})
    si = mi.SurfaceInteraction3f()
    for uv in np.random.default_rng(4).uniform(-2, 2, (60, 2)):
        si.uv = tuple(uv)
        np.testing.assert_allclose(lookup(material.specular_texture, uv), np.array(colour.eval(si)), atol=SINGLE)
        roughness = material.roughness[0] * lookup(material.roughness_texture, uv)[0]
        np.testing.assert_allclose(roughness**2, alpha.eval_1(si), atol=SINGLE)


def test_alpha_texture_holds_square_roots_of_luminance(tmp_path):
    """At every texel centre roughness² is the alpha that Mitsuba's eval_1 gives."""
    save_image(tmp_path / "t.png", 3)
    texture = '<texture type="bitmap" name="alpha"><string name="filename" value="t.png"/></texture>'
    body = f'{SENSOR}<shape type="rectangle"><bsdf type="roughdielectric">{texture}</bsdf></shape>'
    material = read(tmp_path, body).materials[0]
    theirs = mi.load_dict({"type": "bitmap", "filename": str(tmp_path / "t.png")})
    si = mi.SurfaceInteraction3f()
    for y in range(5):
        for x in range(7):
            si.uv = ((x + 0.5) / 7, (y + 0.5) / 5)
            np.testing.assert_allclose(lookup(material.roughness_texture, si.uv)[0] ** 2, theirs.eval_1(si), atol=1e-5)


# Environment


def environment_lookup(environment: Environment, direction: np.ndarray) -> np.ndarray:
    """`Environment` as its docstring defines it."""
    d = environment.to_world.T @ direction
    u, v = np.arctan2(d[0], -d[2]) / (2 * np.pi) % 1.0, np.arccos(np.clip(d[1], -1, 1)) / np.pi
    height, width = environment.image.shape[:2]
    x, y = u * width - 0.5, np.clip(v * height - 0.5, 0, height - 1)
    x0, y0 = int(np.floor(x)), min(int(y), height - 2)
    s, t = x - x0, y - y0
    rows = environment.image[y0 : y0 + 2].astype(float)
    row = rows[:, x0 % width] * (1 - s) + rows[:, (x0 + 1) % width] * s
    return (row[0] * (1 - t) + row[1] * t) * environment.scale


def test_envmap_lookup_is_mitsubas(tmp_path):
    """Radiance from random directions agrees up to the bends between rows that resampling cuts."""
    height, width = 24, 32
    image = np.random.default_rng(5).random((height, width, 3)).astype(np.float32)
    mi.Bitmap(image).write(str(tmp_path / "env.exr"))
    turn = '<transform name="to_world"><rotate x="1" angle="30"/><rotate y="1" angle="110"/></transform>'
    envmap = (
        f'<emitter type="envmap"><string name="filename" value="env.exr"/>'
        f'<float name="scale" value="2.5"/>{turn}</emitter>'
    )
    environment = read(tmp_path, SENSOR + SHAPE + envmap).environment
    emitter = mi.load_file(str(tmp_path / "scene.xml")).environment()
    second_difference = np.abs(np.diff(image, 2, axis=0)).max() * 2.5
    errors = []
    for direction in np.random.default_rng(6).normal(size=(400, 3)):
        direction /= np.linalg.norm(direction)
        si = mi.SurfaceInteraction3f()
        si.wi = mi.Vector3f(*(-direction))
        errors.append(np.abs(environment_lookup(environment, direction) - np.array(emitter.eval(si), float)).max())
    assert max(errors) <= second_difference / 8 + 1e-3
    assert np.quantile(errors, 0.3) < 1e-4  # half of the directions are away from the bends: float32 angles remain


# Geometry

OBJ = "v 0 0 0\nv 2 0 0\nv 0 1 0\nv 0 0 1.5\nvt 0 0\nvt 1 0\nvt 0 0.25\nvn 0 0 1\nvn 0.6 0 0.8\n"
OBJ += "f 1/1/1 2/2/2 3/3/1\nf 1/1/2 3/2/1 4/3/2\n"
STRETCH = '<transform name="to_world"><scale x="1.5" y="0.5"/><rotate x="1" angle="25"/></transform>'
TRANSFORM = (
    '<transform name="to_world"><scale value="1.5"/><rotate y="1" angle="40"/>'
    '<translate x="0.3" y="1" z="-2"/></transform>'
)
MIRROR = '<transform name="to_world"><scale x="-1.5" y="1.5" z="1.5"/><translate x="0.3" y="1" z="-2"/></transform>'
FLIP = '<boolean name="flip_normals" value="true"/>'
FACE = '<boolean name="face_normals" value="true"/>'
MESHES = {
    "obj": '<shape type="obj"><string name="filename" value="m.obj"/>{}</shape>',
    "ply": '<shape type="ply"><string name="filename" value="m.ply"/>{}</shape>',
    "cube": '<shape type="cube">{}</shape>',
    "rectangle": '<shape type="rectangle">{}</shape>',
}
CURVED = {
    "sphere": '<shape type="sphere"><point name="center" x="0.2" y="-0.1" z="0.4"/>'
    '<float name="radius" value="0.8"/>{}</shape>',
    "disk": '<shape type="disk">{}</shape>',
    "cylinder": '<shape type="cylinder"><point name="p0" x="0.1" y="0" z="-1"/><point name="p1" x="0.5" y="1" z="1"/>'
    '<float name="radius" value="0.7"/>{}</shape>',
}


def intersect(mesh: Mesh, o: np.ndarray, d: np.ndarray):
    """Nearest hit: distance, geometric normal by winding, shading normal, uv; None if there is none."""
    a, b, c = (mesh.positions[mesh.indices[:, i]].astype(float) for i in range(3))
    e1, e2 = b - a, c - a
    p = np.cross(d, e2)
    det = np.einsum("ij,ij->i", e1, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        s = o - a
        u = np.einsum("ij,ij->i", s, p) / det
        q = np.cross(s, e1)
        v = q @ d / det
        t = np.einsum("ij,ij->i", e2, q) / det
        t = np.where((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 1e-6), t, np.inf)
    i = int(np.argmin(t))
    if not np.isfinite(t[i]):
        return None
    weights = np.array([1 - u[i] - v[i], u[i], v[i]])
    ng = np.cross(e1[i], e2[i])
    n = ng if mesh.normals is None else weights @ mesh.normals[mesh.indices[i]]
    uv = None if mesh.uv0 is None else weights @ mesh.uv0[mesh.indices[i]]
    return t[i], ng / np.linalg.norm(ng), n / np.linalg.norm(n), uv


def write_meshes(folder: Path) -> None:
    (folder / "m.obj").write_text(OBJ)
    mi.load_dict({"type": "obj", "filename": str(folder / "m.obj")}).write_ply(str(folder / "m.ply"))


PLACEMENTS = [TRANSFORM, MIRROR, FLIP, FLIP + MIRROR]
FOR_MESHES = [STRETCH, FACE + STRETCH, FACE + FLIP, FACE + MIRROR]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind in (*MESHES, *CURVED) for options in PLACEMENTS + FOR_MESHES * (kind in MESHES)],
)
def test_shapes_are_hit_where_and_how_mitsuba_hits_them(tmp_path, kind, options):
    """Distance, uv and normals of random rays agree, and the winding's front is Mitsuba's front."""
    write_meshes(tmp_path)
    mesh = read(tmp_path, SENSOR + (MESHES | CURVED)[kind].format(options)).meshes[0]
    scene = mi.load_file(str(tmp_path / "scene.xml"))
    low, high = np.array(scene.bbox().min), np.array(scene.bbox().max)
    rng = np.random.default_rng(7)
    exact = kind in MESHES
    n_hits = n_disagreed = 0
    for _ in range(80):
        target = rng.uniform(low, high)
        if kind in ("disk", "rectangle", "obj", "ply"):
            target = rng.dirichlet([1, 1, 1]) @ mesh.positions[mesh.indices[rng.integers(len(mesh.indices))]]
        d = rng.normal(size=3)
        d /= np.linalg.norm(d)
        o = target - 6 * d
        si = scene.ray_intersect(mi.Ray3f(mi.Point3f(*o), mi.Vector3f(*d)))
        ours = intersect(mesh, o, d)
        if not si.is_valid() or ours is None:
            n_disagreed += si.is_valid() != (ours is not None)
            continue
        t, ng, n, uv = ours
        front = np.array(si.sh_frame.n, float)
        if not exact and (abs(front @ d) < 0.3 or min(uv[0], 1 - uv[0]) < 0.02):
            continue  # grazing rays magnify the tessellation; uv jumps at the seam
        n_hits += 1
        np.testing.assert_allclose(t, si.t, atol=1e-4 if exact else 5e-3)
        np.testing.assert_allclose(n, front, atol=1e-4 if exact else 5e-3)
        assert ng @ front > 0
        if uv is not None and (exact or kind == "disk" or abs(uv[1] - 0.5) < 0.4):
            np.testing.assert_allclose(uv, np.array(si.uv), atol=1e-4 if exact else 5e-3)
    assert n_hits > 15
    assert n_disagreed <= 2


@pytest.mark.parametrize("kind", ["obj", "ply"])
def test_mesh_vertices_are_mitsubas(tmp_path, kind):
    """Positions, normals and texture coordinates are bit-identical to the loaded Mitsuba mesh."""
    write_meshes(tmp_path)
    mesh = read(tmp_path, SENSOR + MESHES[kind].format(TRANSFORM)).meshes[0]
    theirs = find(mi.load_file(str(tmp_path / "scene.xml")), mi.Mesh)
    params = mi.traverse(theirs)
    np.testing.assert_array_equal(mesh.positions.ravel(), np.array(params["vertex_positions"]))
    np.testing.assert_array_equal(mesh.normals.ravel(), np.array(params["vertex_normals"]))
    np.testing.assert_array_equal(mesh.uv0.ravel(), np.array(params["vertex_texcoords"]))
    np.testing.assert_array_equal(np.sort(mesh.indices), np.sort(np.array(params["faces"]).reshape(-1, 3)))


def test_instances_share_the_meshes_of_their_group(tmp_path):
    """Each instance of a shape group is hit where Mitsuba hits it, also when mirrored; the group is there once."""
    write_meshes(tmp_path)
    group = f'<shape type="shapegroup" id="g">{MESHES["obj"].format(FACE)}{MESHES["cube"].format("")}</shape>'
    placed = "".join(f'<shape type="instance"><ref id="g"/>{where}</shape>' for where in (TRANSFORM, MIRROR))
    scene = read(tmp_path, SENSOR + group + placed)
    assert len(scene.meshes) == 2 and [instance.mesh for instance in scene.instances] == [0, 1, 0, 1]
    scene = flatten(scene)
    theirs = mi.load_file(str(tmp_path / "scene.xml"))
    rng = np.random.default_rng(8)
    n_hits = 0
    for _ in range(100):
        d = rng.normal(size=3)
        d /= np.linalg.norm(d)
        o = rng.uniform([-1.5, -0.5, -3.5], [2, 2.5, -0.5]) - 8 * d
        si = theirs.ray_intersect(mi.Ray3f(mi.Point3f(*o), mi.Vector3f(*d)))
        hits = [hit for mesh in scene.meshes if (hit := intersect(mesh, o, d)) is not None]
        assert si.is_valid() == bool(hits)
        if hits:
            t, _, n, _ = min(hits, key=lambda hit: hit[0])
            np.testing.assert_allclose(t, si.t, atol=1e-3)
            assert n @ np.array(si.sh_frame.n, float) > 0.999
            n_hits += 1
    assert n_hits > 20


def test_vertex_colours_come_from_mesh_attributes(tmp_path):
    """A mesh_attribute as reflectance becomes the mesh's colours."""
    mesh = mi.Mesh("m", 3, 1)
    params = mi.traverse(mesh)
    params["vertex_positions"], params["faces"] = [0, 0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 2]
    params.update()
    colours = np.random.default_rng(9).random((3, 3)).astype(np.float32)
    mesh.add_attribute("vertex_color", 3, colours.ravel())
    mesh.write_ply(str(tmp_path / "c.ply"))
    texture = '<texture type="mesh_attribute" name="reflectance"><string name="name" value="vertex_color"/></texture>'
    bsdf = f'<bsdf type="twosided"><bsdf type="diffuse">{texture}</bsdf></bsdf>'
    scene = read(tmp_path, f'{SENSOR}<shape type="ply"><string name="filename" value="c.ply"/>{bsdf}</shape>')
    np.testing.assert_allclose(scene.meshes[0].colors, np.column_stack([colours, np.ones(3)]), atol=1e-6)
    assert scene.materials[0].base_color == (1.0, 1.0, 1.0)


def test_normal_mapped_meshes_get_mitsubas_tangents(tmp_path):
    """Tangents point along dp/du of the triangle hit."""
    save_image(tmp_path / "t.png", 3)
    write_meshes(tmp_path)
    texture = (
        '<texture type="bitmap" name="normalmap"><string name="filename" value="t.png"/>'
        '<boolean name="raw" value="true"/></texture>'
    )
    bsdf = f'<bsdf type="normalmap">{texture}<bsdf type="diffuse"/></bsdf>'
    scene = read(tmp_path, SENSOR + MESHES["obj"].format(TRANSFORM + bsdf))
    mesh = scene.meshes[0]
    assert scene.materials[0].normal_texture is not None and not scene.materials[0].normal_texture.srgb
    theirs = mi.load_file(str(tmp_path / "scene.xml"))
    for triangle in mesh.indices:
        centre = mesh.positions[triangle].mean(axis=0).astype(float)
        n = np.cross(*(mesh.positions[triangle[1:]] - mesh.positions[triangle[0]]).astype(float))
        n /= np.linalg.norm(n)
        si = theirs.ray_intersect(mi.Ray3f(mi.Point3f(*(centre + n)), mi.Vector3f(*(-n))))
        dp_du = np.array(si.dp_du, float)
        tangents = mesh.tangents[triangle, :3]
        np.testing.assert_allclose(tangents, np.tile(dp_du / np.linalg.norm(dp_du), (3, 1)), atol=1e-4)
        assert (mesh.tangents[triangle, 3] == 1).all()


# Emission

EMITTER = '<emitter type="area">{}</emitter>'
RADIANCE = {
    "rgb": '<rgb name="radiance" value="17,12,4"/>',
    "uniform": '<spectrum name="radiance" value="5000"/>',
    "spectrum": '<spectrum name="radiance" value="400:1,500:3,700:9"/>',
    "d65": '<spectrum name="radiance" type="d65"><float name="scale" value="3"/></spectrum>',
}


@pytest.mark.parametrize("kind", RADIANCE)
def test_radiance_is_mitsubas(tmp_path, kind):
    """Emitted radiance equals `Emitter.eval`, however it is given."""
    body = f'{SENSOR}<shape type="rectangle">{EMITTER.format(RADIANCE[kind])}</shape>'
    material = read(tmp_path, body).materials[0]
    emitter = mi.load_file(str(tmp_path / "scene.xml")).emitters()[0]
    si = mi.SurfaceInteraction3f()
    si.wi = (0, 0, 1)
    np.testing.assert_allclose(material.emission, np.array(emitter.eval(si), float), rtol=1e-5)
    assert material.base_color == (0.0, 0.0, 0.0)  # as Mitsuba has it for an emitter without BSDF


@pytest.mark.parametrize("kind", CURVED)
def test_emitting_curved_shapes_keep_their_area(tmp_path, kind):
    """Triangles of an emitting sphere, disk and cylinder have the true area within 1e-5, so flux is right."""
    mesh = read(tmp_path, SENSOR + CURVED[kind].format(EMITTER.format(RADIANCE["rgb"]))).meshes[0]
    shape = mi.load_file(str(tmp_path / "scene.xml")).shapes()[0]
    a, b, c = (mesh.positions[mesh.indices[:, i]].astype(float) for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    np.testing.assert_allclose(area, shape.surface_area(), rtol=1e-5)


def test_textured_radiance_becomes_a_texture(tmp_path):
    """An HDR bitmap as radiance keeps its values."""
    image = np.random.default_rng(10).uniform(0, 20, (4, 6, 3)).astype(np.float32)
    mi.Bitmap(image).write(str(tmp_path / "e.exr"))
    texture = '<texture type="bitmap" name="radiance"><string name="filename" value="e.exr"/></texture>'
    material = read(tmp_path, f'{SENSOR}<shape type="rectangle">{EMITTER.format(texture)}</shape>').materials[0]
    assert material.emission == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(material.emission_texture.image, image, rtol=1e-3)  # half floats in the file


def test_lights_keep_place_direction_and_strength(tmp_path):
    """point, spot, directional and constant come through with Mitsuba's meaning of each parameter."""
    aim = '<transform name="to_world"><lookat origin="1,2,3" target="1,0,3" up="0,0,1"/></transform>'
    body = (
        '<emitter type="point"><point name="position" x="1" y="2" z="3"/><rgb name="intensity" value="4,5,6"/>'
        "</emitter>"
        f'<emitter type="spot">{aim}<rgb name="intensity" value="7,8,9"/><float name="cutoff_angle" value="40"/>'
        f"</emitter>"
        '<emitter type="directional"><vector name="direction" x="0" y="-2" z="0"/>'
        '<rgb name="irradiance" value="1,2,3"/></emitter>'
        '<emitter type="constant"><rgb name="radiance" value="0.1,0.2,0.3"/></emitter>'
    )
    scene = read(tmp_path, SENSOR + SHAPE + body)
    point, spot, directional = scene.lights
    assert point.position == (1, 2, 3) and point.intensity == (4, 5, 6)
    np.testing.assert_allclose(spot.direction, [0, -1, 0], atol=1e-6)
    np.testing.assert_allclose(np.degrees([spot.inner_angle, spot.outer_angle]), [30, 40])
    assert spot.falloff == "linear" and spot.intensity == (7, 8, 9)
    assert directional.direction == (0, -1, 0) and directional.irradiance == (1, 2, 3)
    np.testing.assert_allclose(scene.environment.image.ravel(), [0.1, 0.2, 0.3], rtol=1e-6)


def test_blackbody_is_plancks_law(tmp_path):
    """5800 K has the Sun's luminance within 5 % (about 1.9e9 cd/m², 683 lm/W) and a hotter body is bluer."""

    def emission(kelvin: float) -> np.ndarray:
        radiance = f'<spectrum name="radiance" type="blackbody"><float name="temperature" value="{kelvin}"/></spectrum>'
        body = f'{SENSOR}<shape type="rectangle">{EMITTER.format(radiance)}</shape>'
        return np.array(read(tmp_path, body).materials[0].emission)

    sun = emission(5800) @ [0.2126, 0.7152, 0.0722] * 106.7502593994140625 * 683
    assert sun == pytest.approx(1.95e9, rel=0.05)
    assert emission(9000)[2] / emission(9000)[0] > emission(3000)[2] / emission(3000)[0]


# Materials


def material_of(folder: Path, bsdf: str):
    return read(folder, f'{SENSOR}<shape type="rectangle">{bsdf}</shape>').materials[0]


TABLE = {
    '<bsdf type="diffuse"><rgb name="reflectance" value="0.1,0.2,0.3"/></bsdf>': {
        "kind": "diffuse", "base_color": (0.1, 0.2, 0.3), "two_sided": False
    },
    '<bsdf type="diffuse"/>': {"base_color": (0.5, 0.5, 0.5)},
    '<bsdf type="twosided"><bsdf type="diffuse"/></bsdf>': {"kind": "diffuse", "two_sided": True},
    '<bsdf type="conductor"/>': {"kind": "conductor", "eta": (0, 0, 0), "k": (1, 1, 1), "roughness": (0, 0)},
    '<bsdf type="roughconductor"><float name="alpha" value="0.25"/><rgb name="eta" value="1.5,2,3"/>'
    '<rgb name="k" value="4,5,6"/></bsdf>': {
        "kind": "conductor", "eta": (1.5, 2, 3), "k": (4, 5, 6), "roughness": (0.5, 0.5), "distribution": "beckmann"
    },
    '<bsdf type="roughconductor"><float name="alpha_u" value="0.25"/><float name="alpha_v" value="0.04"/>'
    '<string name="distribution" value="ggx"/></bsdf>': {"roughness": (0.5, 0.2), "distribution": "ggx"},
    '<bsdf type="dielectric"><float name="int_ior" value="1.5"/><float name="ext_ior" value="1.2"/>'
    '<rgb name="specular_transmittance" value="0.9,0.8,0.7"/></bsdf>': {
        "kind": "dielectric", "ior": 1.25, "transmittance": (0.9, 0.8, 0.7), "specular": (1, 1, 1)
    },
    '<bsdf type="roughdielectric"><float name="alpha" value="0.09"/>'
        '</bsdf>': {"kind": "dielectric", "roughness": (0.3, 0.3)},
    '<bsdf type="thindielectric"/>': {"kind": "thin_dielectric", "roughness": (0, 0)},
    '<bsdf type="plastic"><rgb name="diffuse_reflectance" value="0.2,0.3,0.4"/><boolean name="nonlinear" value="true"/>'
    '<float name="int_ior" value="1.9"/><float name="ext_ior" value="1"/></bsdf>': {
        "kind": "plastic", "base_color": (0.2, 0.3, 0.4), "nonlinear": True, "ior": 1.9, "roughness": (0, 0)
    },
    '<bsdf type="roughplastic"><float name="alpha" value="0.16"/><string name="distribution" value="ggx"/></bsdf>': {
        "kind": "plastic", "roughness": (0.4, 0.4), "distribution": "ggx", "base_color": (0.5, 0.5, 0.5)
    },
    '<bsdf type="principled"><rgb name="base_color" value="0.1,0.2,0.3"/><float name="roughness" value="0.3"/>'
    '<float name="metallic" value="0.6"/><float name="spec_trans" value="0.2"/>'
        '<float name="clearcoat" value="0.7"/></bsdf>': {
        "kind": "principled", "base_color": (0.1, 0.2, 0.3), "roughness": (0.3, 0.3), "metallic": 0.6,
        "transmission": 0.2, "clearcoat": 0.7, "ior": 1.5
    },
    '<bsdf type="mask"><float name="opacity" value="0.3"/><bsdf type="twosided"><bsdf type="diffuse"/></bsdf></bsdf>': {
        "opacity": 0.3, "alpha_mode": "blend", "two_sided": True
    },
    '<bsdf type="null"/>': {"opacity": 0.0, "alpha_mode": "blend"},
}  # fmt: skip


@pytest.mark.parametrize("bsdf", TABLE)
def test_bsdf_parameters(tmp_path, bsdf):
    """XML in, `Material` fields out."""
    material = material_of(tmp_path, bsdf)
    for name, expected in TABLE[bsdf].items():
        value = getattr(material, name)
        assert value == (expected if isinstance(expected, (str, bool)) else pytest.approx(expected, rel=1e-5)), name


@pytest.mark.parametrize("metal", ["Cu", "Au", "Al", "none"])
def test_conductor_presets_are_mitsubas(tmp_path, metal):
    """eta and k of a named metal are what Mitsuba's RGB variant uses."""
    material = material_of(tmp_path, f'<bsdf type="conductor"><string name="material" value="{metal}"/></bsdf>')
    params = mi.traverse(mi.load_dict({"type": "conductor", "material": metal}))
    for name in ("eta", "k"):
        expected = np.broadcast_to(np.array(params[f"{name}.value"], float).ravel(), 3)
        np.testing.assert_allclose(getattr(material, name), expected, rtol=1e-6)


def test_named_refractive_indices_are_resolved(tmp_path):
    """bk7 over air is 1.5046 / 1.000277."""
    names = '<string name="int_ior" value="bk7"/><string name="ext_ior" value="air"/>'
    assert material_of(tmp_path, f'<bsdf type="dielectric">{names}</bsdf>').ior == pytest.approx(1.5046 / 1.000277)


def test_equal_materials_are_shared(tmp_path):
    """Two BSDFs with the same values are one material; an emitter makes another."""
    bsdf = '<bsdf type="diffuse"><rgb name="reflectance" value="0.1,0.2,0.3"/></bsdf>'
    shape = f'<shape type="rectangle">{bsdf}</shape>'
    light = f'<shape type="rectangle">{bsdf}{EMITTER.format(RADIANCE["rgb"])}</shape>'
    scene = read(tmp_path, SENSOR + shape + shape + light)
    assert [mesh.material for mesh in scene.meshes] == [0, 0, 1]


# What is said

ANNOUNCED = {
    "'gaussian' filter": (
        '<sensor type="perspective"><float name="fov" value="40"/><film type="hdrfilm">'
            '<rfilter type="gaussian"/></film></sensor>'
        + SHAPE,
        "reconstruction filter gaussian substituted by box",
    ),
    "crop": (
        '<sensor type="perspective"><float name="fov" value="40"/><film type="hdrfilm">'
            '<integer name="crop_width" value="4"/>'
        '<rfilter type="box"/></film></sensor>' + SHAPE,
        "crop_width ignored",
    ),
    "phong": (
        SENSOR + '<shape type="rectangle"><bsdf type="phong"><float name="exponent" value="50"/></bsdf></shape>',
        "'phong': substituted by plastic",
    ),
    "hair": (SENSOR + '<shape type="rectangle"><bsdf type="hair"/></shape>', "'hair': substituted by diffuse"),
    "two sides": (
        SENSOR + '<shape type="rectangle"><bsdf type="twosided"><bsdf type="diffuse"/><bsdf type="plastic"/>'
            '</bsdf></shape>',
        "its back bsdf 'plastic' is substituted by its front",
    ),
    "blend": (
        SENSOR + '<shape type="rectangle"><bsdf type="blendbsdf"><float name="weight" value="0.8"/>'
            '<bsdf type="diffuse"/>'
        '<bsdf type="plastic"/></bsdf></shape>',
        "substituted by its bsdf 'plastic'",
    ),
    "light": (SENSOR + SHAPE + '<emitter type="sunsky"/>', "emitter 'sunsky': left out"),
    "property": (
        SENSOR + '<shape type="rectangle"><bsdf type="diffuse"><float name="shine" value="1"/></bsdf></shape>',
        "ignored properties: bsdf 'diffuse'.shine",
    ),
    "no sensor": (SHAPE, "there is no sensor"),
    "integrator": ('<integrator type="volpath"/>' + SENSOR + SHAPE, "integrator 'volpath': substituted by path"),
    "sampler": (
        '<sensor type="perspective"><float name="fov" value="40"/><sampler type="ldsampler"/><film type="hdrfilm">'
        '<rfilter type="box"/></film></sensor>' + SHAPE,
        "'ldsampler': substituted by independent",
    ),
    "second sensor": (SENSOR + SENSOR + SHAPE, "the first sensor is used"),
}  # fmt: skip


@pytest.mark.parametrize("what", ANNOUNCED)
def test_substitutions_are_announced_once(tmp_path, what):
    """Each substitution is one entry in `Scene.warnings` and the scene is still read."""
    body, text = ANNOUNCED[what]
    scene = read(tmp_path, body)
    assert len(scene.warnings) == 1, scene.warnings
    assert text in scene.warnings[0]


def test_textures_without_equivalent_are_sampled(tmp_path):
    """A checkerboard of bitmaps is sampled and announced; its lookup agrees with Mitsuba's away from the edges."""
    save_image(tmp_path / "t.png", 3)
    nested = '<texture type="bitmap" name="color0"><string name="filename" value="t.png"/></texture>'
    texture = f'<texture type="checkerboard" name="reflectance">{nested}</texture>'
    scene = read(tmp_path, f'{SENSOR}<shape type="rectangle"><bsdf type="diffuse">{texture}</bsdf></shape>')
    assert "samples of the unit square" in scene.warnings[0]
    bitmap = {"type": "bitmap", "filename": str(tmp_path / "t.png")}
    theirs = mi.load_dict({"type": "checkerboard", "color0": bitmap})
    for uv in [(0.2, 0.3), (0.7, 0.2), (0.8, 0.9), (0.1, 0.8)]:
        expected = mitsuba_lookup(theirs, uv)
        np.testing.assert_allclose(lookup(scene.materials[0].base_color_texture, uv), expected, atol=0.03)


# Bad files

BAD = {
    '<shape type="obj"><string name="filename" value="nope.obj"/></shape>': "nope.obj",
    '<shape type="blob"/>': "shape 'blob': Mitsuba has no such plugin",
    '<shape type="rectangle"><bsdf type="blob"/></shape>': "bsdf 'blob': Mitsuba has no such plugin",
    '<shape type="rectangle"/><emitter type="blob"/>': "emitter 'blob': Mitsuba has no such plugin",
    '<shape type="rectangle"><bsdf type="diffuse"><texture type="bitmap" name="reflectance">'
    '<string name="filename" value="nope.png"/></texture></bsdf></shape>': "nope.png",
    '<shape type="rectangle"/><emitter type="envmap"><string name="filename" value="nope.exr"/></emitter>': "nope.exr",
    '<shape type="rectangle"><ref id="nothing"/></shape>': "nothing",
    '<shape typ="rectangle"/>': "typ",
    '<shape type="rectangle">': "scene.xml",
    '<integrator type="path"/>': "no shapes",
    '<integrator type="blob"/><shape type="rectangle"/>': "integrator 'blob': Mitsuba has no such plugin",
    '<sensor type="orthographic"/><shape type="rectangle"/>': "only perspective and thinlens",
    '<shape type="rectangle"><bsdf type="twosided"/></shape>': "expected a nested BSDF",
}


@pytest.mark.parametrize("body", BAD)
def test_bad_files_name_file_and_fault(tmp_path, body):
    """A fault is one SceneError, on one line, with the file's name."""
    with pytest.raises(SceneError) as caught:
        read(tmp_path, body)
    assert BAD[body] in str(caught.value)
    assert "scene.xml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_package_is_a_scene_error(tmp_path, monkeypatch):
    """Without mitsuba the error says how to get it."""
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(SceneError, match=r"pip install mitsuba"):
        read(tmp_path, SENSOR + SHAPE)


def test_unused_definitions_are_not_warned_about(tmp_path):
    """A BSDF and a texture nobody refers to are neither read nor reported."""
    texture = '<texture type="bitmap" id="t"><string name="filename" value="nope.png"/></texture>'
    scene = read(tmp_path, f'{SENSOR}<bsdf type="plastic" id="p"/>{texture}{SHAPE}')
    assert scene.warnings == () and len(scene.materials) == 1


def test_missing_file_is_a_scene_error(tmp_path):
    """A path that does not exist is named."""
    with pytest.raises(SceneError, match=r"absent\.xml: no such file"):
        load_mitsuba(tmp_path / "absent.xml")


def test_defines_replace_parameters(tmp_path):
    """`-D` values override defaults; a name the file does not have is an error."""
    film = '<film type="hdrfilm"><integer name="width" value="$resx"/><rfilter type="box"/></film>'
    body = (
        f'<default name="resx" value="20"/><sensor type="perspective">'
        f'<float name="fov" value="9"/>{film}</sensor>{SHAPE}'
    )
    assert read(tmp_path, body).settings.width == 20
    assert read(tmp_path, body, defines={"resx": "31"}).settings.width == 31
    with pytest.raises(SceneError, match="resz"):
        read(tmp_path, body, defines={"resz": "31"})


@pytest.mark.parametrize("bad", [False, True])
def test_variant_and_file_resolver_stay(tmp_path, bad):
    """Reading, also when it fails, leaves the active variant and the file resolver as they were."""
    mi.set_variant("scalar_spectral")
    before = str(mi.file_resolver())
    try:
        read(tmp_path, SENSOR + SHAPE + ('<emitter type="blob"/>' if bad else ""))
    except SceneError:
        assert bad
    assert mi.variant() == "scalar_spectral"
    assert str(mi.file_resolver()) == before


def test_old_versions_are_upgraded(tmp_path):
    """Version 0.4's camelCase names are understood."""
    body = (
        '<integrator type="path"><integer name="maxDepth" value="4"/></integrator><sensor type="perspective">'
        '<float name="fov" value="33"/><string name="fovAxis" value="y"/></sensor><shape type="rectangle">'
        '<transform name="toWorld"><translate x="2"/></transform><bsdf type="plastic">'
        '<rgb name="diffuseReflectance" value="0.1 0.2 0.3"/></bsdf></shape>'
    )
    scene = load_mitsuba(write(tmp_path, body, "0.4.0"))
    assert scene.settings.max_depth == 4 and scene.camera.fov_axis == "y"
    np.testing.assert_allclose(scene.meshes[0].positions.mean(axis=0), [2, 0, 0])
    assert scene.materials[0].base_color == pytest.approx((0.1, 0.2, 0.3))


# Real scenes


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["cornell-box/scene.xml", "veach-mis/scene.xml", "veach-ajar/scene.xml", "sponza/sponza.xml"]
)
def test_real_scenes_are_hit_where_mitsuba_hits_them(data, name):
    """First hits of camera rays agree in position; nothing is substituted but Sponza's filter and sampler."""
    path = data / "scenes" / name
    scene = load_mitsuba(path)
    assert len(scene.warnings) == (2 if "sponza" in name else 0), scene.warnings
    theirs = mi.load_file(str(path))
    for position in np.random.default_rng(11).random((6, 2)):
        ray = theirs.sensors()[0].sample_ray(0.0, 0.5, tuple(position), (0.5, 0.5))[0]
        si = theirs.ray_intersect(ray)
        d = pinhole_directions(scene.camera, scene.settings.width, scene.settings.height, position[None])[0]
        d /= np.linalg.norm(d)
        eye = scene.camera.to_world[:3, 3]
        hits = [hit[0] for mesh in scene.meshes if (hit := intersect(mesh, eye, d)) is not None]
        assert si.is_valid() == bool(hits)
        if hits:
            assert np.linalg.norm(eye + min(hits) * d - np.array(si.p, float)) < 1e-3 * min(hits)
