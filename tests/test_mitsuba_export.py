"""The way back: what the reader made of a Mitsuba scene, exported, must be the scene that Mitsuba itself loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nrc.assets.mitsuba import load_mitsuba
from nrc.assets.mitsuba_export import to_mitsuba
from nrc.scene import (
    Camera,
    Checkerboard,
    DirectionalLight,
    Environment,
    Material,
    Mesh,
    PointLight,
    Scene,
    SceneError,
    SpotLight,
    Texture,
)

mi = pytest.importorskip("mitsuba", reason="the mitsuba package is not installed")

SINGLE = 1e-4  # relative: a few float32 operations on either side, in another order
SENSOR = (
    '<sensor type="perspective"><float name="fov" value="40"/><film type="hdrfilm"><rfilter type="box"/>'
    "</film></sensor>"
)


@pytest.fixture(autouse=True)
def _variant():
    mi.set_variant("scalar_rgb")


def read(folder: Path, body: str) -> Scene:
    path = folder / "scene.xml"
    path.write_text(f'<scene version="3.0.0">{SENSOR}{body}</scene>')
    return load_mitsuba(path)


def export(scene: Scene, *, size: int = 16, spp: int = 4, max_depth: int = 5, rr_depth: int = 5):
    return to_mitsuba(scene, width=size, height=size, spp=spp, max_depth=max_depth, rr_depth=rr_depth)


def both_ways(folder: Path, body: str):
    """The scene as Mitsuba loads it, and as it loads what we read and exported."""
    described, approximations = export(read(folder, body))
    assert approximations == []
    return mi.load_file(str(folder / "scene.xml")), mi.load_dict(described)


def quad(material: Material, **attributes) -> Scene:
    """A square facing a camera, lit by a constant environment."""
    positions = np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)], np.float32)
    uv = ((positions[:, :2] + 1) / 2).astype(np.float32)
    indices = np.array([(0, 1, 2), (0, 2, 3)], np.int32)
    normals = np.tile(np.float32([0, 0, 1]), (4, 1))
    mesh = Mesh(positions, indices, 0, normals, uv, **attributes)
    camera = Camera.look_at((0, 0, 3), (0, 0, 0))
    return Scene((mesh,), (material,), camera, environment=Environment.constant((1.0, 1.0, 1.0)))


# BSDFs

TEXTURE = '<texture type="bitmap" name="{}"><string name="filename" value="t.png"/></texture>'
RAW = (
    '<texture type="bitmap" name="{}"><string name="filename" value="t.png"/>'
    '<boolean name="raw" value="true"/></texture>'
)
BOARD = (
    '<texture type="checkerboard" name="{}"><float name="color0" value="0.1"/><float name="color1" value="0.6"/>'
    '<transform name="to_uv"><scale x="3" y="2"/></transform></texture>'
)
GOLD = '<string name="material" value="Au"/>'
PLAIN = (  # the corrections that our normal and bump maps leave out, and name
    '<boolean name="flip_invalid_normals" value="false"/><boolean name="use_shadowing_function" value="false"/>'
)
BSDFS = {
    "diffuse": '<bsdf type="diffuse"><rgb name="reflectance" value="0.1,0.2,0.3"/></bsdf>',
    "diffuse texture": f'<bsdf type="diffuse">{TEXTURE.format("reflectance")}</bsdf>',
    "diffuse board": f'<bsdf type="diffuse">{BOARD.format("reflectance")}</bsdf>',
    "roughconductor": f'<bsdf type="roughconductor">{GOLD}<float name="alpha" value="0.3"/></bsdf>',
    "roughconductor ggx": f'<bsdf type="roughconductor">{GOLD}<float name="alpha" value="0.3"/>'
    '<string name="distribution" value="ggx"/></bsdf>',
    "roughconductor axes": f'<bsdf type="roughconductor">{GOLD}<float name="alpha_u" value="0.4"/>'
    '<float name="alpha_v" value="0.1"/></bsdf>',
    "roughconductor board": f'<bsdf type="roughconductor">{GOLD}{BOARD.format("alpha")}</bsdf>',
    "roughdielectric": '<bsdf type="roughdielectric"><float name="alpha" value="0.2"/></bsdf>',
    "roughdielectric tints": '<bsdf type="roughdielectric"><float name="alpha" value="0.2"/>'
    '<rgb name="specular_reflectance" value="0.9,0.8,0.7"/>'
    '<rgb name="specular_transmittance" value="0.5,0.6,0.7"/></bsdf>',
    "plastic": f'<bsdf type="plastic">{TEXTURE.format("diffuse_reflectance")}</bsdf>',
    "roughplastic": '<bsdf type="roughplastic"><float name="alpha" value="0.3"/>'
    '<boolean name="nonlinear" value="true"/>'
    '<rgb name="diffuse_reflectance" value="0.1,0.5,0.3"/><float name="int_ior" value="1.7"/></bsdf>',
    "principled": '<bsdf type="principled"><rgb name="base_color" value="0.7,0.4,0.2"/>'
    '<float name="metallic" value="0.3"/>'
    '<float name="roughness" value="0.4"/><float name="anisotropic" value="0.5"/><float name="spec_tint" value="0.6"/>'
    '<float name="sheen" value="0.5"/><float name="sheen_tint" value="0.4"/><float name="flatness" value="0.3"/>'
    '<float name="clearcoat" value="0.7"/><float name="clearcoat_gloss" value="0.6"/></bsdf>',
    "principled glass": '<bsdf type="principled"><float name="spec_trans" value="0.7"/><float name="eta" value="1.4"/>'
    '<float name="roughness" value="0.5"/></bsdf>',
    "principled textures": f'<bsdf type="principled">{RAW.format("roughness")}{TEXTURE.format("metallic")}'
    f"{TEXTURE.format('base_color')}</bsdf>",
    "twosided": '<bsdf type="twosided"><bsdf type="plastic"/></bsdf>',
    "mask": f'<bsdf type="mask">{RAW.format("opacity")}<bsdf type="diffuse"/></bsdf>',
    "mask number": '<bsdf type="mask"><float name="opacity" value="0.3"/><bsdf type="twosided">'
    '<bsdf type="diffuse"/></bsdf></bsdf>',
    "normalmap": f'<bsdf type="normalmap">{PLAIN}{RAW.format("normalmap")}<bsdf type="roughplastic"/></bsdf>',
    "bumpmap": f'<bsdf type="bumpmap">{PLAIN}{RAW.format("bump")}<float name="scale" value="0.05"/>'
    f'<bsdf type="diffuse"/></bsdf>',
    "null": '<bsdf type="null"/>',
}


@pytest.mark.parametrize("name", BSDFS)
def test_bsdf_values_survive_reading_and_export(tmp_path, name):
    """f·cos of the re-exported BSDF equals the original's at random points and directions, on both sides."""
    from PIL import Image

    ramp = np.linspace(0, 1, 8)
    smooth = np.stack(
        [0.5 + 0.4 * np.outer(ramp, ramp), 0.4 + 0.2 * np.outer(ramp, 1 - ramp), 0.9 - 0.2 * np.outer(ramp, ramp)], -1
    )
    Image.fromarray((255 * smooth).astype(np.uint8)).save(tmp_path / "t.png")
    theirs, ours = both_ways(tmp_path, f'<shape type="rectangle">{BSDFS[name]}</shape>')
    rng = np.random.default_rng(1)
    context = mi.BSDFContext()
    values = []
    # Square roots of alpha are interpolated where Mitsuba interpolates alpha; a board has one value per cell.
    for _ in range(60):
        x, y = rng.uniform(-1, 1, 2)
        points = [s.ray_intersect(mi.Ray3f((x, y, 4), (0, 0, -1))) for s in (theirs, ours)]
        wi, wo = rng.normal(size=(2, 3))
        if rng.random() < 0.5:  # into the lobe
            wo = wi * [-1, -1, 1] + 0.2 * wo
        pair = []
        for si in points:
            bsdf = si.bsdf()
            si.wi = mi.Vector3f(*(wi / np.linalg.norm(wi)))
            if name.startswith(("mask", "null")):
                pair.append(np.array(bsdf.eval_null_transmission(si), float))
            else:
                pair.append(np.array(bsdf.eval(context, si, mi.Vector3f(*(wo / np.linalg.norm(wo)))), float))
        np.testing.assert_allclose(pair[1], pair[0], rtol=5e-3, atol=2e-4)
        values.append(pair[0])
    assert np.max(values) > 0.01


@pytest.mark.parametrize("bsdf", ["conductor", "dielectric", "thindielectric"])
def test_smooth_bsdfs_sample_the_same(tmp_path, bsdf):
    """Directions and weights sampled from delta lobes agree for the same random numbers."""
    theirs, ours = both_ways(tmp_path, f'<shape type="rectangle"><bsdf type="{bsdf}"/></shape>')
    rng = np.random.default_rng(2)
    for _ in range(40):
        numbers, wi = rng.random(), rng.normal(size=3)
        samples = []
        for scene in (theirs, ours):
            si = scene.ray_intersect(mi.Ray3f((0.1, 0.2, 4), (0, 0, -1)))
            si.wi = mi.Vector3f(*(wi / np.linalg.norm(wi)))
            sample, weight = si.bsdf().sample(mi.BSDFContext(), si, numbers, (0.3, 0.6))
            samples.append((np.array(sample.wo), np.array(weight), sample.eta))
        for a, b in zip(*samples, strict=True):
            np.testing.assert_allclose(b, a, rtol=SINGLE, atol=SINGLE)


# Lights, environment, camera

AIM = '<transform name="to_world"><lookat origin="1,2,3" target="1.5,0,3.3" up="0,0,1"/></transform>'
LIGHTS = {
    "point": '<emitter type="point"><point name="position" x="1" y="2" z="3"/>'
    '<rgb name="intensity" value="4,5,6"/></emitter>',
    "spot": f'<emitter type="spot">{AIM}<rgb name="intensity" value="7,8,9"/>'
    f'<float name="cutoff_angle" value="50"/></emitter>',
    "directional": f'<emitter type="directional">{AIM}<rgb name="irradiance" value="1,2,3"/></emitter>',
    "constant": '<emitter type="constant"><rgb name="radiance" value="0.1,0.2,0.3"/></emitter>',
}


@pytest.mark.parametrize("kind", LIGHTS)
def test_lights_survive_reading_and_export(tmp_path, kind):
    """Direction and strength at random points equal the original's."""
    theirs, ours = (scene.emitters()[0] for scene in both_ways(tmp_path, f'<shape type="rectangle"/>{LIGHTS[kind]}'))
    rng = np.random.default_rng(3)
    lit = 0
    for _ in range(40):
        it = mi.Interaction3f()
        it.p = mi.Point3f(*rng.uniform(-2, 2, 3))
        (a, spec_a), (b, spec_b) = (emitter.sample_direction(it, (0.3, 0.6)) for emitter in (theirs, ours))
        np.testing.assert_allclose(np.array(b.d), np.array(a.d), atol=SINGLE)
        np.testing.assert_allclose(np.array(spec_b), np.array(spec_a), rtol=2e-3, atol=SINGLE)
        lit += np.max(np.array(spec_a)) > 0
    assert lit > 5


def test_environment_export_is_exact():
    """Radiance in random directions is what `Environment` defines, to float32."""
    rng = np.random.default_rng(4)
    image = rng.random((6, 12, 3)).astype(np.float32)
    rotation = np.array(mi.ScalarTransform4f().rotate([0.6, 0.0, 0.8], 50).matrix)[:3, :3]
    environment = Environment(image, rotation, 1.7)
    scene = mi.load_dict(export(replace(quad(Material()), environment=environment))[0])
    emitter = scene.environment()
    for direction in rng.normal(size=(200, 3)):
        direction /= np.linalg.norm(direction)
        si = mi.SurfaceInteraction3f()
        si.wi = mi.Vector3f(*(-direction))
        d = rotation.T @ direction
        x = np.arctan2(d[0], -d[2]) / (2 * np.pi) % 1.0 * 12 - 0.5
        y = np.clip(np.arccos(np.clip(d[1], -1, 1)) / np.pi * 6 - 0.5, 0, 5)
        x0, y0 = int(np.floor(x)), min(int(y), 4)
        rows = image[y0 : y0 + 2, x0 % 12] * (1 - x + x0) + image[y0 : y0 + 2, (x0 + 1) % 12] * (x - x0)
        expected = (rows[0] * (1 - y + y0) + rows[1] * (y - y0)) * 1.7
        np.testing.assert_allclose(np.array(emitter.eval(si)), expected, atol=1e-3)


@pytest.mark.parametrize("aperture", [0.0, 0.2])
@pytest.mark.parametrize(
    ("axis", "size"), [("x", (32, 20)), ("y", (32, 20)), ("smaller", (20, 32)), ("larger", (20, 32))]
)
def test_camera_export_keeps_rays(axis, size, aperture):
    """Sensor rays pass through the point of the focal plane that our pinhole ray hits."""
    width, height = size
    lens = {"aperture_radius": aperture, "focus_distance": 2.5}
    camera = Camera.look_at((1, 2, 3), (0, 0.5, 0.2), fov=50.0, fov_axis=axis, **lens)
    scene = replace(quad(Material()), camera=camera)
    described, _ = to_mitsuba(scene, width=width, height=height, spp=1, max_depth=2, rr_depth=5)
    sensor = mi.load_dict(described["sensor"])
    hx, hy = camera.half_extents(width, height)
    for film in np.random.default_rng(5).random((20, 2)):
        ray = sensor.sample_ray(0.0, 0.5, tuple(film), (0.2, 0.9))[0]
        local = np.array([(2 * film[0] - 1) * hx, (1 - 2 * film[1]) * hy, -1.0, 0.4]) * 2.5
        target = (camera.to_world @ local)[:3]
        o, d = np.array(ray.o, float), np.array(ray.d, float)
        assert np.linalg.norm(np.cross(target - o, d)) < 2e-4 * np.linalg.norm(target - o)


# Whole pictures

CHECKER = Checkerboard((0.9, 0.1, 0.2), (0.1, 0.8, 0.3), np.array([[4.0, 0, 0], [0, 4.0, 0]]))
GRADIENT = Texture(np.random.default_rng(6).random((8, 8, 3)).astype(np.float32))
RGBA = Texture(np.random.default_rng(7).integers(0, 256, (8, 8, 4), dtype=np.uint8), srgb=True)
FLAT_NORMALS = Texture(np.tile(np.uint8([128, 128, 255]), (4, 4, 1)))
MATERIALS = {
    "diffuse": Material(base_color=(0.2, 0.5, 0.7)),
    "diffuse texture": Material(base_color=(0.5, 1.0, 1.0), base_color_texture=GRADIENT),
    "diffuse checker": Material(base_color=(1.0, 1.0, 1.0), base_color_texture=CHECKER),
    "conductor": Material(kind="conductor"),
    "rough conductor": Material(kind="conductor", roughness=(0.5, 0.3), roughness_texture=GRADIENT),
    "dielectric": Material(kind="dielectric"),
    "rough dielectric": Material(kind="dielectric", roughness=(0.4, 0.4), specular_texture=GRADIENT),
    "thin dielectric": Material(kind="thin_dielectric"),
    "plastic": Material(kind="plastic", base_color_texture=RGBA),
    "rough plastic": Material(kind="plastic", roughness=(0.4, 0.4), two_sided=True),
    "principled": Material(kind="principled", roughness=(0.4, 0.4), metallic=0.5, metallic_roughness_texture=GRADIENT),
    "normal map": Material(normal_texture=FLAT_NORMALS, normal_scale=0.5),
    "bump map": Material(bump_texture=GRADIENT, bump_scale=0.1),
    "blend": Material(alpha_mode="blend", opacity=0.5),
    "blend texture": Material(alpha_mode="blend", opacity_from_base_color=True, base_color_texture=RGBA),
    "blend checker": Material(alpha_mode="blend", opacity_texture=CHECKER),
    "emission": Material(emission=(3.0, 2.0, 1.0), emission_texture=GRADIENT),
}


@pytest.mark.parametrize("name", MATERIALS)
def test_every_material_renders(name):
    """The exported square renders finite and non-black; only a filtered roughness texture is an approximation."""
    described, approximations = export(quad(MATERIALS[name]))
    assert [note.split(": ")[1] for note in approximations] == (
        ["roughness texture is squared per texel, before its interpolation"] if name == "rough conductor" else []
    )
    picture = np.array(mi.render(mi.load_dict(described)))
    assert picture.shape == (16, 16, 3) and np.isfinite(picture).all()
    assert picture.max() > 0.01


APPROXIMATED = {
    "glTF": (Material(kind="metallic_roughness", roughness=(0.5, 0.5)), "approximated by principled"),
    "mask": (Material(alpha_mode="mask", opacity_from_base_color=True, base_color_texture=RGBA), "per texel"),
    "two-sided emission": (Material(emission=(1.0, 1.0, 1.0), emission_two_sided=True), "front side only"),
    "anisotropic plastic": (Material(kind="plastic", roughness=(0.5, 0.2)), "mean"),
    "wrap": (Material(base_color_texture=replace(GRADIENT, wrap_u="clamp")), "one wrap mode"),
}


@pytest.mark.parametrize("name", APPROXIMATED)
def test_approximations_are_named_and_render(name):
    """What Mitsuba cannot say exactly is one entry that names the material."""
    material, text = APPROXIMATED[name]
    described, approximations = export(quad(replace(material, name="thing")))
    assert len(approximations) == 1 and "'thing'" in approximations[0] and text in approximations[0]
    assert np.isfinite(np.array(mi.render(mi.load_dict(described)))).all()


@pytest.mark.parametrize(
    "light",
    [
        PointLight((0, 0, 2), (4, 5, 6)),
        SpotLight((0, 0, 2), (0, 0, -1), (4, 5, 6), 0.3, 0.5),
        DirectionalLight((0, 0, -1), (1, 2, 3)),
    ],
    ids=["point", "spot", "directional"],
)
def test_every_light_gives_its_irradiance(light):
    """Radiance of a white diffuse square's centre is irradiance / π: I / 4 for lights at distance 2."""
    scene = replace(quad(Material(base_color=(1.0, 1.0, 1.0))), environment=None, lights=(light,))
    picture = np.array(mi.render(mi.load_dict(export(scene, size=17, max_depth=2)[0])))
    expected = (
        np.array(light.irradiance if isinstance(light, DirectionalLight) else np.array(light.intensity) / 4) / np.pi
    )
    np.testing.assert_allclose(picture[8, 8], expected, rtol=0.01)


def test_flat_meshes_have_face_normals():
    """A mesh without normals is shaded flat in Mitsuba too."""
    rng = np.random.default_rng(8)
    scene = quad(Material())
    bent = replace(scene.meshes[0], normals=None, positions=rng.normal(size=(4, 3)).astype(np.float32))
    described, _ = export(replace(scene, meshes=(bent,)))
    assert described["mesh_0"].has_face_normals() and not described["mesh_0"].has_vertex_normals()


def test_vertex_colours_are_exported():
    """Red vertices reflect red only."""
    colours = np.tile(np.float32([1, 0, 0, 1]), (4, 1))
    scene = quad(Material(base_color=(0.8, 0.8, 0.8)), colors=colours)
    described, approximations = export(scene, spp=64, max_depth=2)
    assert approximations == []
    picture = np.array(mi.render(mi.load_dict(described)))
    np.testing.assert_allclose(picture[5:11, 5:11].mean(axis=(0, 1)), [0.8, 0, 0], atol=0.02)


def test_round_trip_through_mesh_and_texture_keeps_orientation():
    """A texture whose top-left texel alone is white brightens the corner at uv (0, 0)."""
    image = np.zeros((4, 4, 3), np.float32)
    image[0, 0] = 1.0
    texture = Texture(image, filter="nearest")
    scene = quad(Material(base_color=(1.0, 1.0, 1.0), base_color_texture=texture))
    described, _ = export(scene, size=32, spp=16, max_depth=2)
    picture = np.array(mi.render(mi.load_dict(described)))[..., 0]
    square = np.argwhere(np.abs(picture - 1.0) > 1e-6)  # the rest is the environment
    low, high = square.min(axis=0), square.max(axis=0)
    inside = picture[low[0] : high[0] + 1, low[1] : high[1] + 1]
    size = len(inside) // 4
    bright = inside[-size + 1 : -1, 1 : size - 1]  # uv (0, 0) is at (-1, -1): bottom left
    assert bright.min() > 0.5
    assert inside[1 : size - 1, 1 : size - 1].max() < 0.05


def test_wrong_variant_is_a_scene_error():
    """The export needs an RGB variant and says so."""
    mi.set_variant("scalar_spectral")
    with pytest.raises(SceneError, match="RGB variant"):
        export(quad(Material()))


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["cornell-box", "veach-mis"])
def test_exported_scenes_render_the_same_picture(data, name):
    """Read and exported, a scene renders the picture that Mitsuba renders from the file, per pixel within noise."""
    path = data / "scenes" / name / "scene.xml"
    defines = {"resx": "16", "resy": "16", "max_depth": "4", "spp": "64"}
    described, approximations = export(load_mitsuba(path, defines), spp=64, max_depth=4)
    assert approximations == []
    theirs, ours = mi.load_file(str(path), **defines), mi.load_dict(described)
    batches = [
        np.stack([np.array(mi.render(s, spp=32, seed=10 * k + i)) for i in range(8)])
        for k, s in enumerate((theirs, ours))
    ]
    means = [batch.mean(axis=0) for batch in batches]
    error = np.sqrt(sum(batch.var(axis=0, ddof=1) / len(batch) for batch in batches)) + 1e-3 * means[0] + 1e-4
    assert (np.abs(means[0] - means[1]) <= 6 * error).mean() >= 0.99  # t with 14 degrees of freedom
    # One float32 sample in a thousand may be a highlight: compare the means of the clipped pictures.
    clipped = [np.minimum(mean, 2.0).mean() for mean in means]
    assert clipped[1] == pytest.approx(clipped[0], rel=0.02)
