"""Pictures agree with Mitsuba 3's `path`: Welch t over independent batches, per pixel channel and in the mean.

The per-pixel test sees local errors, the mean of a region sees small ones everywhere. A Welch t of about 60 degrees of
freedom exceeds 3.5 in 0.09 % of all cases; batch means of few samples have heavier tails, hence the 0.3 % (T_FRACTION).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_scenes import config, moved, rectangle, render_batches, shape, welch_t

from nrc import assets
from nrc.assets import shapes
from nrc.scene import (
    Camera,
    Checkerboard,
    DirectionalLight,
    Environment,
    Material,
    PointLight,
    Scene,
    SpotLight,
    Texture,
)

T_LIMIT = 3.5
T_FRACTION = 0.997
T_MEAN_LIMIT = 4.0  # of a mean over a region: one in 16 000 by chance
N_BATCHES = 64


@pytest.fixture(scope="module")
def mi():
    """Mitsuba with its scalar variant active."""
    mitsuba = pytest.importorskip("mitsuba", reason="needs Mitsuba 3 (pip install mitsuba)")
    mitsuba.set_variant("scalar_rgb")
    return mitsuba


def mitsuba_batches(mi, scene: Scene, width: int, height: int, n_batches: int, spp: int, **options) -> np.ndarray:
    """As `render_batches`, by Mitsuba; the exporter must not have approximated anything.

    The alpha test per texel that it names is exact for the nearest filter.
    """
    from nrc.assets.mitsuba_export import to_mitsuba

    settings = config(**options)
    depths = {"max_depth": settings.max_depth, "rr_depth": settings.rr_depth}
    description, approximations = to_mitsuba(scene, width=width, height=height, spp=spp, **depths)
    assert all("alpha test is made per texel" in line for line in approximations), approximations
    loaded = mi.load_dict(description)
    return np.array([np.array(mi.render(loaded, spp=spp, seed=1000 + i))[..., :3] for i in range(n_batches)])


@pytest.fixture
def plain_normals(monkeypatch):
    """Export normal and bump maps without Mitsuba's own repairs of them, which it has since 3.7.1."""
    from nrc.assets.mitsuba_export import _Exporter

    export = _Exporter.bsdf

    def bsdf(self, *arguments):
        made = node = export(self, *arguments)
        while isinstance(node, dict):
            if node["type"] in ("normalmap", "bumpmap"):
                node |= {"flip_invalid_normals": False, "use_shadowing_function": False}
            node = node.get("bsdf")
        return made

    monkeypatch.setattr(_Exporter, "bsdf", bsdf)


def assert_same(mi, scene: Scene, size: int = 24, spp: int = 8, **options) -> None:
    ours = render_batches(scene, size, size, N_BATCHES, spp, **options)
    theirs = mitsuba_batches(mi, scene, size, size, N_BATCHES, spp, **options)
    assert np.isfinite(ours).all() and ours.mean() > 1e-3
    t = np.abs(welch_t(ours, theirs))
    mean_t = np.abs(welch_t(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2))))
    ratio = ours.mean(axis=(0, 1, 2)) / theirs.mean(axis=(0, 1, 2))
    assert mean_t.max() <= T_MEAN_LIMIT, f"mean over Mitsuba's {ratio}, t {mean_t}"
    worst = np.argwhere(t > T_LIMIT)[:10].tolist()
    assert np.mean(t <= T_LIMIT) >= T_FRACTION, f"{np.mean(t > T_LIMIT):.4f} of all channels differ, e.g. {worst}"


# --- materials -------------------------------------------------------------------------------------------------------

GOLD = {"eta": (0.143, 0.375, 1.442), "k": (3.983, 2.386, 1.603)}
MATERIALS = (
    Material(name="diffuse", base_color=(0.6, 0.3, 0.2)),
    Material(name="conductor", kind="conductor", **GOLD),
    Material(name="conductor ggx", kind="conductor", roughness=(0.55, 0.55), **GOLD),
    Material(name="conductor beckmann", kind="conductor", roughness=(0.55, 0.55), distribution="beckmann", **GOLD),
    Material(name="conductor anisotropic", kind="conductor", roughness=(0.7, 0.35), **GOLD),
    Material(name="dielectric", kind="dielectric", ior=1.5, transmittance=(0.9, 0.95, 1.0)),
    Material(name="dielectric ggx", kind="dielectric", ior=1.5, roughness=(0.5, 0.5)),
    Material(name="dielectric beckmann", kind="dielectric", ior=1.3, roughness=(0.5, 0.5), distribution="beckmann"),
    Material(name="thin dielectric", kind="thin_dielectric", ior=1.5),
    Material(name="plastic", kind="plastic", base_color=(0.2, 0.5, 0.3), ior=1.49),
    Material(name="plastic nonlinear", kind="plastic", base_color=(0.7, 0.5, 0.3), ior=1.49, nonlinear=True),
    Material(name="plastic ggx", kind="plastic", base_color=(0.2, 0.3, 0.6), ior=1.49, roughness=(0.45, 0.45)),
    Material(
        name="plastic beckmann",
        kind="plastic",
        base_color=(0.2, 0.3, 0.6),
        ior=1.49,
        roughness=(0.45, 0.45),
        distribution="beckmann",
    ),
    Material(name="principled", kind="principled", base_color=(0.6, 0.4, 0.2), roughness=(0.4, 0.4), metallic=0.3),
    Material(
        name="principled coats",
        kind="principled",
        base_color=(0.3, 0.4, 0.6),
        roughness=(0.6, 0.6),
        clearcoat=0.8,
        clearcoat_gloss=0.3,
        sheen=0.7,
        sheen_tint=0.5,
        spec_tint=0.5,
        anisotropic=0.5,
    ),
    Material(
        name="principled glass", kind="principled", base_color=(0.9, 0.8, 0.9), roughness=(0.5, 0.5), transmission=1.0
    ),
)
CELLS = 4  # spheres along each axis
CELL = 12  # [px]
SPHERE_T_FRACTION = 0.98  # of one cell's 432 channels: by chance two pixels may fail with all their channels


def sphere_wall() -> Scene:
    """Spheres of all materials before a grey wall, lit by a large area light and a soft environment."""
    ball = shapes.sphere(16, 32)
    meshes = [
        shape(ball, i, moved((2.0 * (i % CELLS) - CELLS + 1.0, CELLS - 1.0 - 2.0 * (i // CELLS), 0.0), 0.8))
        for i in range(CELLS * CELLS)
    ]
    wall = Material(name="wall", base_color=(0.5, 0.5, 0.5))
    lamp = Material(name="lamp", base_color=(0, 0, 0), emission=(3, 3, 2.5))
    n = len(meshes)
    meshes.append(rectangle(n, (0, 0, -1.5), (6, 0, 0), (0, 6, 0)))
    meshes.append(rectangle(n + 1, (0, 7, 4), (5, 0, 0), (0, 1.4, -1.4)))
    fov = float(2.0 * np.degrees(np.arctan(CELLS / 20.0)))
    camera = Camera.look_at((0, 0, 20), (0, 0, 0), fov=fov)
    light = Environment.constant((0.3, 0.35, 0.4))
    return Scene(tuple(meshes), (*MATERIALS, wall, lamp), camera, environment=light)


@pytest.fixture(scope="module")
def spheres(mi) -> tuple[np.ndarray, np.ndarray]:
    """Batches of the wall of spheres by both renderers."""
    scene, size = sphere_wall(), CELLS * CELL
    ours = render_batches(scene, size, size, N_BATCHES, 8, max_depth=8)
    return ours, mitsuba_batches(mi, scene, size, size, N_BATCHES, 8, max_depth=8)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(MATERIALS)), ids=[m.name.replace(" ", "-") for m in MATERIALS])
def test_material_matches_mitsuba(spheres, i):
    """A sphere of each material both have: its pixels and its mean."""
    y, x = CELL * (i // CELLS), CELL * (i % CELLS)
    ours, theirs = (batches[:, y : y + CELL, x : x + CELL] for batches in spheres)
    ratio = ours.mean(axis=(0, 1, 2)) / theirs.mean(axis=(0, 1, 2))
    mean_t = np.abs(welch_t(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2))))
    assert mean_t.max() <= T_MEAN_LIMIT, f"mean over Mitsuba's {ratio}, t {mean_t}"
    t = np.abs(welch_t(ours, theirs))
    assert np.mean(t <= T_LIMIT) >= SPHERE_T_FRACTION, f"{np.mean(t > T_LIMIT):.4f} of all channels differ"


@pytest.mark.slow
def test_material_wall_matches_mitsuba(spheres):
    """The whole picture of all materials, interreflection included."""
    t = np.abs(welch_t(*spheres))
    assert np.mean(t <= T_LIMIT) >= T_FRACTION, f"{np.mean(t > T_LIMIT):.4f} of all channels differ"


# --- lights, cameras, textures ---------------------------------------------------------------------------------------


def still_life(**changes) -> Scene:
    """A box and a glossy ball on a floor; `changes` replace the scene's fields."""
    materials = (
        Material(name="floor", base_color=(0.6, 0.55, 0.5)),
        Material(name="box", base_color=(0.3, 0.5, 0.7)),
        Material(name="ball", kind="conductor", roughness=(0.5, 0.5), **GOLD),
    )
    meshes = (
        rectangle(0, (0, 0, 0), (3, 0, 0), (0, 0, -3)),
        shape(shapes.cube(), 1, moved((-0.8, 0.5, 0), 0.5), flat=True),
        shape(shapes.sphere(16, 32), 2, moved((0.8, 0.6, 0.2), 0.6)),
    )
    camera = Camera.look_at((0, 2.2, 5), (0, 0.5, 0), fov=35.0)
    return replace(Scene(meshes, materials, camera), **changes)


def sky() -> Environment:
    """A turned sky with a bright spot and a bright horizon texel next to the seam."""
    image = np.random.default_rng(5).uniform(0.1, 0.6, (8, 16, 3)).astype(np.float32)
    image[2, 5] = (30, 25, 20)
    image[3, 0] = (2, 6, 8)
    angle = 0.7
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])
    return Environment(image, to_world=turn @ tilt, scale=1.5)


SMOOTH_NOISE = np.random.default_rng(7).uniform(0.1, 0.9, (6, 5, 3)).astype(np.float32)
SCALED = np.array([[2.0, 0.5, 0.1], [-0.3, 3.0, 0.2]])


def textured(**fields) -> Scene:
    """Floor of one textured material under a lamp and a sky; the other shapes stay."""
    scene = still_life(environment=sky())
    return replace(scene, materials=(replace(scene.materials[0], **fields), *scene.materials[1:]))


def normal_map() -> Texture:
    rng = np.random.default_rng(11)
    n = np.dstack([rng.uniform(-0.4, 0.4, (6, 6)), rng.uniform(-0.4, 0.4, (6, 6)), np.ones((6, 6))])
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    return Texture((0.5 * n + 0.5).astype(np.float32))


SCENES = {
    "point": lambda: still_life(lights=(PointLight((1.0, 3.0, 2.0), (20.0, 18.0, 15.0)),)),
    "spot": lambda: still_life(lights=(SpotLight((1.0, 4.0, 2.0), (-0.2, -1.0, -0.4), (40.0, 40.0, 30.0), 0.2, 0.5),)),
    "directional": lambda: still_life(lights=(DirectionalLight((-0.5, -1.0, -0.3), (2.0, 2.0, 1.5)),)),
    "environment": lambda: still_life(environment=sky()),
    "all lights": lambda: still_life(
        environment=sky(),
        lights=(
            PointLight((1.0, 3.0, 2.0), (5.0, 4.0, 3.0)),
            DirectionalLight((-0.5, -1.0, -0.3), (1.0, 1.0, 0.7)),
        ),
    ),
    "thin lens": lambda: still_life(
        environment=sky(),
        camera=Camera.look_at((0, 2.2, 5), (0, 0.5, 0), fov=35.0, aperture_radius=0.3, focus_distance=4.0),
    ),
    "bilinear repeat": lambda: textured(base_color_texture=Texture(SMOOTH_NOISE, transform=SCALED)),
    "nearest mirror": lambda: textured(
        base_color_texture=Texture(SMOOTH_NOISE, transform=SCALED, filter="nearest", wrap_u="mirror", wrap_v="mirror")
    ),
    "srgb clamp": lambda: textured(
        base_color=(1.0, 1.0, 1.0),
        base_color_texture=Texture(
            (255 * SMOOTH_NOISE).astype(np.uint8), srgb=True, transform=SCALED, wrap_u="clamp", wrap_v="clamp"
        ),
    ),
    "checkerboard": lambda: textured(
        base_color=(1.0, 0.9, 0.8),
        base_color_texture=Checkerboard(
            (0.8, 0.2, 0.1), (0.1, 0.3, 0.6), transform=np.array([[3.0, 0, 0], [0, 2.0, 0]])
        ),
    ),
    "normal map": lambda: textured(normal_texture=normal_map()),
    "bump map": lambda: textured(bump_texture=Texture(SMOOTH_NOISE[..., :1].copy()), bump_scale=0.4),
    "rough texture": lambda: textured(
        kind="conductor",
        roughness=(0.9, 0.9),
        roughness_texture=Texture(SMOOTH_NOISE[..., :1].copy(), filter="nearest"),  # the export squares texels
        **GOLD,
    ),
}


def blended() -> Scene:
    """Half transparent screens between camera, floor and a sky without sun, one of them textured."""
    scene = still_life(environment=Environment(np.minimum(sky().image, 2.0)))
    n = len(scene.materials)
    screen = Material(name="screen", base_color=(0.7, 0.3, 0.3), opacity=0.4, alpha_mode="blend", two_sided=True)
    texture = Texture(SMOOTH_NOISE[..., :1].copy())
    holes = Material(
        name="holes", base_color=(0.3, 0.7, 0.3), opacity_texture=texture, alpha_mode="blend", two_sided=True
    )
    meshes = (
        rectangle(n, (0, 1.5, 2), (1.2, 0, 0), (0, 0.8, 0)),
        rectangle(n + 1, (0.3, 2.2, 0.5), (1.5, 0, 0), (0, 0, -1.0)),
    )
    return replace(scene, meshes=scene.meshes + meshes, materials=(*scene.materials, screen, holes))


@pytest.mark.parametrize("name", SCENES)
def test_scene_matches_mitsuba(mi, plain_normals, name):
    """Every light, camera and texture feature both renderers have."""
    assert_same(mi, SCENES[name](), max_depth=6)


def test_blend_matches_mitsuba(mi):
    """Alpha-blended screens. Unlimited depth, because Mitsuba counts a pass through one as a bounce and casts opaque
    shadows behind it, which BSDF sampling makes up for."""
    assert_same(mi, blended(), max_depth=-1)


def test_mask_matches_mitsuba(mi):
    """A screen with square holes; unlimited depth as for alpha blending."""
    scene = still_life(environment=Environment(np.minimum(sky().image, 2.0)))
    texture = Texture(SMOOTH_NOISE[..., :1].copy(), filter="nearest", transform=SCALED)
    screen = Material(base_color=(0.7, 0.3, 0.3), opacity_texture=texture, alpha_mode="mask", two_sided=True)
    mesh = rectangle(len(scene.materials), (0, 1.5, 2), (1.2, 0, 0), (0, 0.8, 0))
    assert_same(mi, replace(scene, meshes=(*scene.meshes, mesh), materials=(*scene.materials, screen)), max_depth=-1)


def test_cornell_box_matches_mitsuba(mi):
    """The default scene with its own settings."""
    assert_same(mi, assets.load("cornell_box"), size=32, max_depth=16)


@pytest.mark.parametrize("max_depth", [1, 2, 3])
def test_max_depth_matches_mitsuba(mi, max_depth):
    """1 shows emitters only, 2 adds direct light, 3 one bounce more."""
    assert_same(mi, assets.load("cornell_box"), size=24, max_depth=max_depth)
