"""Texture lookup against a NumPy twin, and opacity, tint and two-sidedness by closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import warp as wp
from small_scenes import floor, looking_down, mean_and_error, rectangle, render, render_batches

from nrc.device_scene import DeviceScene
from nrc.kernels.scene import SceneView, scene_texture
from nrc.launch import launch
from nrc.scene import Camera, Checkerboard, DirectionalLight, Environment, Material, Mesh, PointLight, Scene, Texture

wp.set_module_options({"enable_backward": False})


@wp.kernel
def look_up(
    first: int, scene: SceneView, i_texture: int, uv0: wp.array[wp.vec2], uv1: wp.array[wp.vec2], out: wp.array[wp.vec4]
):
    """Texture at each coordinate. One thread per coordinate."""
    i = first + wp.tid()
    out[i] = scene_texture(scene, i_texture, uv0[i], uv1[i])


def lookup(texture, uv0: np.ndarray, uv1: np.ndarray | None = None) -> np.ndarray:
    """RGBA of `texture` as kernels see it, behind another texture in the texel buffer."""
    other = Texture(np.full((3, 5, 3), 7, np.uint8), srgb=True)
    materials = (Material(base_color_texture=other), Material(base_color_texture=texture))
    scene = DeviceScene(looking_down(floor(), floor(1), materials=materials), "cpu")
    out = wp.full(len(uv0), wp.vec4(math.nan), dtype=wp.vec4, device="cpu")
    coordinates = [wp.array(x, dtype=wp.vec2, device="cpu") for x in (uv0, uv0 if uv1 is None else uv1)]
    index = int(scene.view.materials.numpy()["base_color_texture"][1])
    launch(look_up, len(uv0), inputs=[scene.view, index, *coordinates], outputs=[out], device=scene.device)
    return out.numpy()


# --- NumPy twin ------------------------------------------------------------------------------------------------------


def linear_texels(texture: Texture) -> np.ndarray:
    """(h, w, 4) linear RGBA."""
    image = texture.image / (255.0 if texture.image.dtype == np.uint8 else 1.0)
    n = image.shape[2]
    rgb = image[..., :3] if n >= 3 else np.repeat(image[..., :1], 3, axis=2)
    alpha = image[..., -1:] if n in (2, 4) else np.ones((*image.shape[:2], 1))
    if texture.srgb:
        rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.concatenate([rgb, alpha], axis=2)


def wrapped(i: np.ndarray, n: int, mode: str) -> np.ndarray:
    if mode == "clamp":
        return np.clip(i, 0, n - 1)
    if mode == "repeat":
        return i % n
    return np.minimum(i % (2 * n), 2 * n - 1 - i % (2 * n))


def twin(texture: Texture, uv: np.ndarray) -> np.ndarray:
    texels = linear_texels(texture)
    h, w = texels.shape[:2]
    uv = np.column_stack([uv, np.ones(len(uv))]).astype(np.float64) @ np.asarray(texture.transform).T
    x, y = uv[:, 0] * w, uv[:, 1] * h

    def texel(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return texels[wrapped(j.astype(int), h, texture.wrap_v), wrapped(i.astype(int), w, texture.wrap_u)]

    if texture.filter == "nearest":
        return texel(np.floor(x), np.floor(y))
    x, y = x - 0.5, y - 0.5
    i, j = np.floor(x), np.floor(y)
    fx, fy = (x - i)[:, None], (y - j)[:, None]
    top = (1 - fx) * texel(i, j) + fx * texel(i + 1, j)
    return (1 - fy) * top + fy * ((1 - fx) * texel(i, j + 1) + fx * texel(i + 1, j + 1))


def random_image(channels: int, dtype=np.uint8, shape=(7, 10)) -> np.ndarray:
    rng = np.random.default_rng(channels)
    if dtype == np.uint8:
        return rng.integers(0, 256, (*shape, channels), dtype=np.uint8)
    return rng.uniform(0.0, 4.0, (*shape, channels)).astype(np.float32)


def coordinates(n: int = 4000) -> np.ndarray:
    return np.random.default_rng(9).uniform(-3.0, 4.0, (n, 2)).astype(np.float32)


SHEAR = np.array([[1.5, -0.4, 0.3], [0.2, -2.0, -0.7]])
TEXTURES = {
    "bytes": Texture(random_image(3)),
    "srgb": Texture(random_image(4), srgb=True),
    "grey": Texture(random_image(1), srgb=True),
    "grey-alpha": Texture(random_image(2), srgb=True),
    "float": Texture(random_image(3, np.float32)),
    "float-alpha": Texture(random_image(4, np.float32)),
    "float-srgb": Texture(np.minimum(random_image(3, np.float32), 1.0), srgb=True),
    "clamp": Texture(random_image(3), wrap_u="clamp", wrap_v="clamp"),
    "mirror": Texture(random_image(3), wrap_u="mirror", wrap_v="mirror"),
    "mixed": Texture(random_image(3), wrap_u="clamp", wrap_v="mirror"),
    "transformed": Texture(random_image(3), transform=SHEAR, wrap_v="mirror"),
    "pixel": Texture(random_image(3, shape=(1, 1)), srgb=True),
    "row": Texture(random_image(3, shape=(1, 9)), wrap_u="mirror", wrap_v="clamp"),
}


@pytest.mark.parametrize("name", TEXTURES)
@pytest.mark.parametrize("reconstruction", ["bilinear", "nearest"])
def test_lookup_matches_twin(name, reconstruction):
    """Formats, sRGB decoding, wrap modes, transforms and both filters."""
    texture = replace(TEXTURES[name], filter=reconstruction)
    uv = coordinates()
    ours, expected = lookup(texture, uv), twin(texture, uv)
    assert np.isfinite(ours).all()
    error = np.abs(ours - expected).max(axis=1)
    # float32 coordinates times 10 texels are off by 1e-5, which bilinear interpolation turns into 1e-4 of a value;
    # nearest picks the neighbour where a coordinate falls on an edge within that
    if reconstruction == "bilinear":
        assert error.max() < 2e-4 * max(1.0, expected.max())
    else:
        assert np.mean(error > 1e-6) < 1e-3


def test_lookup_meets_texels_exactly():
    """Texel centres give texels, without neighbours; v = 0 is the top row."""
    image = random_image(3)
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w]
    uv = np.stack([(x.ravel() + 0.5) / w, (y.ravel() + 0.5) / h], axis=1).astype(np.float32)
    assert np.allclose(lookup(Texture(image), uv)[:, :3], image.reshape(-1, 3) / 255.0, atol=2e-5)


def test_lookup_uses_the_named_coordinate_set():
    """uv_set 1 reads the second set."""
    image = random_image(3)
    a, b = coordinates(100), coordinates(200)[100:]
    for uv_set, uv in ((0, a), (1, b)):
        texture = Texture(image, uv_set=uv_set)
        assert np.allclose(lookup(texture, a, b), twin(texture, uv), atol=2e-4)


@pytest.mark.parametrize("uv", [(1e30, 0.5), (-1e30, 1e20), (math.nan, 0.5), (math.inf, -math.inf)])
@pytest.mark.parametrize("reconstruction", ["bilinear", "nearest"])
def test_lookup_survives_any_coordinate(uv, reconstruction):
    """Coordinates of broken files read some texel, not memory elsewhere."""
    texture = Texture(np.full((2, 3, 3), 51, np.uint8), filter=reconstruction)
    value = lookup(texture, np.array([uv], np.float32))[0, :3]
    assert np.isnan(value).all() or np.allclose(value, 0.2, atol=1e-3)


def test_checkerboard_matches_twin():
    """Which square a coordinate falls into, after the transform."""
    board = Checkerboard((0.9, 0.1, 0.2), (0.3, 0.4, 0.5), transform=SHEAR)
    uv = coordinates()
    p = np.column_stack([uv, np.ones(len(uv))]) @ SHEAR.T
    frac = p - np.floor(p)
    inside = np.abs(frac[..., None] - [0.0, 0.5, 1.0]).min(axis=(1, 2)) > 1e-5
    second = (frac[:, 0] > 0.5) != (frac[:, 1] > 0.5)
    expected = np.where(second[:, None], board.color1, board.color0)
    assert inside.mean() > 0.99
    assert np.allclose(lookup(board, uv)[inside, :3], expected[inside])


def test_shared_images_are_stored_once():
    """Two textures of one image share texels, unless they decode it differently."""
    image = random_image(3, np.float32)
    materials = tuple(Material(base_color_texture=Texture(image, srgb=srgb)) for srgb in (False, False, True))
    scene = DeviceScene(looking_down(*(floor(i) for i in range(3)), materials=materials), "cpu")
    assert scene.view.texels.shape[0] == 2 * 4 * 70


# --- opacity ---------------------------------------------------------------------------------------------------------

WHITE = Environment.constant((1.0, 1.0, 1.0))


def pane(opacity: float = 1.0, mode: str = "blend", **fields) -> Material:
    """A surface that stops light but reflects none."""
    return Material(base_color=(0, 0, 0), opacity=opacity, alpha_mode=mode, two_sided=True, **fields)


@pytest.mark.parametrize("integrator", ["path", "cache"])
def test_blend_multiplies_transmittances_for_the_camera(integrator):
    """Black layers of opacities a, b before a white sky leave (1 - a)(1 - b) of it."""
    layers = (rectangle(0, (0, 1, 0), (1, 0, 0), (0, 0, -1)), rectangle(1, (0, 0.5, 0), (1, 0, 0), (0, 0, -1)))
    scene = looking_down(*layers, materials=(pane(0.3), pane(0.6)), environment=WHITE)
    batches = render_batches(scene, 16, 16, 16, 16, integrator=integrator)
    mean, error = mean_and_error(batches)
    assert abs(mean - 0.7 * 0.4) < 4.5 * error
    assert error < 0.005


def test_blend_multiplies_transmittances_for_shadows():
    """Light that passes two layers on its way to the floor keeps (1 - a)(1 - b), without noise."""
    layers = (rectangle(1, (0, 1, 0), (1, 0, 0), (0, 0, -1)), rectangle(2, (0, 0.5, 0), (1, 0, 0), (0, 0, -1)))
    light = DirectionalLight((0.0, -1.0, 0.0), (math.pi, math.pi, math.pi))
    camera = Camera.look_at((3, 0.3, 0), (0, 0, 0), fov=0.5)  # from below the layers
    materials = (Material(base_color=(0.5, 0.5, 0.5)), pane(0.3), pane(0.6))
    scene = Scene((floor(half=0.2), *layers), materials, camera, lights=(light,))
    assert np.allclose(render(scene, 4, 4, 1, max_depth=2), 0.5 * 0.7 * 0.4, rtol=1e-5)


@pytest.mark.parametrize("cutoff", [0.2, 0.5, 0.8])
def test_mask_passes_all_or_nothing(cutoff):
    """Below the cutoff a texel is a hole, for the camera and for shadows; at and above it stops light."""
    alpha = np.array([[0.1, 0.3], [0.6, 0.9]])
    image = np.dstack([np.zeros((2, 2, 3)), alpha]).astype(np.float32)
    texture = Texture(image, filter="nearest")
    mask = Material(
        base_color=(1, 1, 1), base_color_texture=texture, opacity_from_base_color=True, alpha_mode="mask",
        alpha_cutoff=cutoff, two_sided=True,
    )  # fmt: skip
    screen = rectangle(0, (0, 1, 0), (1, 0, 0), (0, 0, -1))
    holes = np.array([[alpha[0, 0], alpha[0, 1]], [alpha[1, 0], alpha[1, 1]]]) < cutoff
    camera = Camera.look_at((0, 3, 0), (0, 0, 0), up=(0, 0, -1), fov=2.0 * math.degrees(math.atan(0.5)))
    seen = render(Scene((screen,), (mask,), camera, environment=WHITE), 2, 2, 2, max_depth=1)
    assert np.array_equal(seen[..., 0] > 0.5, holes)

    ground = rectangle(1, (0, 0, 0), (1, 0, 0), (0, 0, 1))
    sun = DirectionalLight((0, -1, 0), (math.pi, math.pi, math.pi))
    glow = Material(base_color=(0.5, 0.5, 0.5), two_sided=True)
    for (row, column), hole in np.ndenumerate(holes):
        target = (-0.5 + column, 0.0, -0.5 + row)  # each quadrant of the floor, from beside the screen
        eye = (target[0] * 6, 0.4, target[2] * 6)
        scene = Scene((ground, screen), (mask, glow), Camera.look_at(eye, target, fov=0.2), lights=(sun,))
        assert np.allclose(render(scene, 2, 2, 1, max_depth=2), 0.5 * hole, atol=1e-5)


def test_opaque_ignores_opacity():
    """glTF's OPAQUE shows the surface whatever its alpha."""
    scene = looking_down(floor(), materials=(pane(0.0, "opaque"),), environment=WHITE)
    assert np.array_equal(render(scene, 2, 2, 2), np.zeros((2, 2, 3)))


def test_vertex_colours_multiply_colour_and_opacity():
    """A corner gradient of colour and alpha, seen at the middle."""
    colors = np.array([(1, 0, 0, 1), (1, 1, 0, 1), (0, 1, 0, 0.5), (0, 0, 0, 0.5)], np.float32)
    flat = floor(half=0.2)
    mesh = Mesh(flat.positions, flat.indices, 0, colors=colors)
    material = Material(base_color=(0.5, 0.4, 0.3), opacity=0.8, alpha_mode="blend")
    light = DirectionalLight((0, -1, 0), (math.pi, math.pi, math.pi))
    camera = Camera.look_at((0, 3, 0), (0, 0, 0), up=(0, 0, -1), fov=0.01)
    scene = Scene((mesh,), (material,), camera, lights=(light,))
    picture = render_batches(scene, 32, 32, 4, 16, max_depth=2)
    # the diagonal from corner 0 to corner 2: (0.5, 0.5, 0) and alpha 0.75
    expected = np.array([0.5 * 0.5, 0.4 * 0.5, 0.0]) * 0.8 * 0.75
    assert np.allclose(picture.mean(axis=(0, 1, 2)), expected, atol=4.5 * 0.25 * 0.5 / math.sqrt(65536))


@pytest.mark.parametrize(("two_sided", "expected"), [(False, 0.0), (True, 0.5)])
def test_back_of_a_reflecting_surface(two_sided, expected):
    """Seen and lit from its back, a surface is black unless two-sided."""
    material = Material(base_color=(0.5, 0.5, 0.5), two_sided=two_sided)
    camera = Camera.look_at((0, -3, 0), (0, 0, 0), up=(0, 0, -1), fov=1.0)
    light = PointLight((0.0, -2.0, 0.0), (4.0 * math.pi, 4.0 * math.pi, 4.0 * math.pi))
    scene = Scene((floor(),), (material,), camera, lights=(light,))
    assert np.allclose(render(scene, 4, 4, 1, max_depth=2), expected, atol=1e-3)
