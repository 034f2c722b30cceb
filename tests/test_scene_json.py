"""Scene JSON: values against numbers known by construction, errors, loading by name, the built-in scenes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nrc.assets import builtin_scenes, load
from nrc.assets.model import flatten
from nrc.image import write_image
from nrc.scene import (
    MATERIAL_KINDS,
    Camera,
    Checkerboard,
    DirectionalLight,
    PointLight,
    Scene,
    SceneError,
    SpotLight,
    Texture,
)

FLOAT32 = 1e-6  # rounding of values of order one in single precision
RECTANGLE = {"shape": "rectangle", "material": "white"}
NAMES = ("ajar_room", "cornell_box", "furnace", "glossy_room", "opening_door", "textured_court")


def scene(folder: Path, **parts: Any) -> Scene:
    """Scene of a JSON file with a white rectangle unless `parts` say otherwise."""
    text = {"materials": {"white": {"base_color": [1, 1, 1]}}, "assets": [RECTANGLE], **parts}
    (folder / "test.json").write_text(json.dumps(text))
    return load(folder / "test.json")


def placed(folder: Path, to_world: Any, **asset: Any) -> np.ndarray:
    """Where `to_world` takes the rectangle's corners (-1, -1), (1, -1), (1, 1), (-1, 1)."""
    return scene(folder, assets=[{**RECTANGLE, "to_world": to_world, **asset}]).meshes[0].positions


@pytest.mark.parametrize(
    ("to_world", "corner"),  # where (1, -1, 0) goes
    [
        ({"translate": [1, 2, 3]}, (2, 1, 3)),
        ({"scale": 2}, (2, -2, 0)),
        ({"scale": [2, 3, 4], "rotate": {"axis": [0, 0, 2], "angle": 90}, "translate": [0, 0, 1]}, (3, 2, 1)),
        ([{"translate": [1, 0, 0]}, {"rotate": {"axis": [0, 1, 0], "angle": 90}}], (0, -1, -2)),
        ([[0, 0, 1, 5], [1, 0, 0, 6], [0, 1, 0, 7], [0, 0, 0, 1]], (5, 7, 6)),
        ({"look_at": {"origin": [0, 5, 0], "target": [0, 0, 0], "up": [0, 0, -1]}}, (-1, 5, 1)),
        ([{"scale": 0.5}, {"look_at": {"origin": [1, 1, 1], "target": [2, 1, 1]}}], (1, 0.5, 0.5)),
    ],
)
def test_transform_moves_points(tmp_path: Path, to_world: Any, corner: tuple[float, ...]) -> None:
    """Steps apply in order, each as scale, rotate, translate; look_at turns +z to the target."""
    np.testing.assert_allclose(placed(tmp_path, to_world)[1], corner, atol=FLOAT32)


def test_flip_normals_turns_the_front(tmp_path: Path) -> None:
    """Winding and normals both turn round; a mirror alone turns neither."""
    for asset, sign in (({"flip_normals": True}, -1.0), ({"to_world": {"scale": [-1, 1, 1]}}, 1.0)):
        mesh = scene(tmp_path, assets=[{**RECTANGLE, **asset}]).meshes[0]
        a, b, c = mesh.positions[mesh.indices[0]]
        assert mesh.normals is not None
        assert np.sign(np.cross(b - a, c - a)[2]) == sign == np.sign(mesh.normals[0, 2])


def test_material_fields_are_read(tmp_path: Path) -> None:
    """Every kind and sort of field; textures with transform, wrap and sRGB; the checkerboard."""
    Image.new("RGB", (3, 2), (200, 100, 50)).save(tmp_path / "t.png")
    write_image(tmp_path / "t.exr", np.full((2, 2, 3), 0.25, np.float32))
    file = {"file": "t.png", "scale": [2, 3], "offset": [0.5, 0.25], "wrap": "mirror", "filter": "nearest", "uv_set": 1}
    materials = {
        "metal": {"kind": "conductor", "eta": [0.2, 0.9, 1.1], "k": [3, 2, 1], "roughness": [0.2, 0.4]},
        "paint": {"kind": "plastic", "base_color_texture": file, "roughness": 0.3, "distribution": "beckmann"},
        "relief": {"normal_texture": {"file": "t.png"}, "normal_scale": -2, "two_sided": False},
        "lamp": {"emission_texture": {"file": "t.exr"}, "emission": [2, 3, 4], "emission_two_sided": True},
        "board": {"base_color_texture": {"checkerboard": {"color0": [1, 0, 0]}, "scale": 4}, "alpha_mode": "blend"},
    }
    result = scene(tmp_path, materials=materials, assets=[{"shape": "disk", "material": "lamp"}])
    metal, paint, relief, lamp, board = result.materials
    assert (metal.eta, metal.k, metal.roughness) == ((0.2, 0.9, 1.1), (3.0, 2.0, 1.0), (0.2, 0.4))
    assert metal.two_sided and not relief.two_sided and relief.normal_scale == -2.0
    texture = paint.base_color_texture
    assert isinstance(texture, Texture) and texture.image.shape == (2, 3, 3)
    np.testing.assert_allclose(texture.transform @ (1, 1, 1), (2.5, 3.25))
    assert (texture.srgb, texture.wrap_v, texture.filter, texture.uv_set) == (True, "mirror", "nearest", 1)
    assert paint.base_color == (1.0, 1.0, 1.0) and paint.roughness == (0.3, 0.3) and paint.distribution == "beckmann"
    assert isinstance(relief.normal_texture, Texture) and not relief.normal_texture.srgb
    assert isinstance(lamp.emission_texture, Texture) and not lamp.emission_texture.srgb
    assert lamp.emission == (2.0, 3.0, 4.0) and lamp.emission_two_sided
    checker = board.base_color_texture
    assert isinstance(checker, Checkerboard) and checker.color0 == (1.0, 0.0, 0.0)
    assert checker.color1 == (0.2, 0.2, 0.2) and board.alpha_mode == "blend"
    assert result.meshes[0].material == 3
    assert result.environment is None  # a textured lamp is light enough


@pytest.mark.parametrize("kind", MATERIAL_KINDS)
def test_material_kinds_are_accepted(tmp_path: Path, kind: str) -> None:
    """Each kind of `nrc.scene.Material` can be written."""
    assert scene(tmp_path, materials={"white": {"kind": kind}}).materials[0].kind == kind


def test_file_asset_materials_can_be_overridden(tmp_path: Path) -> None:
    """Fields of a file's material change, the others stay; a name replaces it; `material` replaces all."""
    (tmp_path / "m.mtl").write_text("newmtl a\nKd 0.1 0.2 0.3\nNi 1.4\nKs 1 1 1\nnewmtl b\nKd 0 0 1\n")
    faces = "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl a\nf 1 2 3\nusemtl b\nf 1 2 3\n"
    (tmp_path / "m.obj").write_text(faces)
    asset = {"file": "m.obj", "to_world": {"translate": [0, 0, 7]}}
    changed = scene(tmp_path, assets=[{**asset, "materials": {"a": {"ior": 2.0}, "b": "white"}}])
    a, b = (changed.materials[mesh.material] for mesh in changed.meshes)
    assert (a.name, a.kind, a.ior, a.base_color) == ("a", "plastic", 2.0, (0.1, 0.2, 0.3))
    assert b.name == "white"
    np.testing.assert_array_equal(changed.meshes[0].positions[:, 2], 7.0)
    assert any("approximated" in w for w in changed.warnings)
    whole = scene(tmp_path, assets=[{**asset, "material": {"kind": "dielectric", "ior": 1.7}}])
    assert {whole.materials[mesh.material].ior for mesh in whole.meshes} == {1.7}
    with pytest.raises(
        SceneError, match=r"test.json: assets\[0\].materials.c: no such material in m.obj; it has: a, b"
    ):
        scene(tmp_path, assets=[{**asset, "materials": {"c": {}}}])


def test_lights_are_read(tmp_path: Path) -> None:
    """Point, spot (degrees, target) and directional lights."""
    lights = [
        {"kind": "point", "position": [1, 2, 3], "intensity": [4, 5, 6], "name": "bulb"},
        {
            "kind": "spot",
            "position": [0, 2, 0],
            "target": [0, 0, 0],
            "intensity": [1, 1, 1],
            "outer_angle": 30,
            "inner_angle": 15,
            "falloff": "smooth",
        },
        {"kind": "directional", "direction": [0, -3, 0], "irradiance": [1, 2, 3]},
    ]
    result = scene(tmp_path, lights=lights)
    assert result.lights == (
        PointLight((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), "bulb"),
        SpotLight((0, 2, 0), (0, -1, 0), (1, 1, 1), math.radians(15), math.radians(30), "smooth", "lights[1]"),
        DirectionalLight((0, -1, 0), (1, 2, 3), "lights[2]"),
    )
    assert result.environment is None


def test_camera_and_settings_are_read(tmp_path: Path) -> None:
    """look_at puts the target in the middle of the picture, in focus; to_world sheds scale; settings keep defaults."""
    camera = {
        "look_at": {"origin": [1, 2, 3], "target": [1, 2, -7]},
        "fov": 33,
        "fov_axis": "y",
        "aperture_radius": 0.1,
    }
    result = scene(tmp_path, camera=camera, settings={"width": 640, "height": 360, "max_depth": -1})
    expected = np.eye(4)
    expected[:3, 3] = (1, 2, 3)
    np.testing.assert_allclose(result.camera.to_world, expected, atol=1e-12)
    assert (result.camera.fov, result.camera.fov_axis, result.camera.aperture_radius) == (33.0, "y", 0.1)
    assert result.camera.focus_distance == pytest.approx(10.0)
    assert (result.settings.width, result.settings.height, result.settings.max_depth) == (640, 360, -1)
    assert (result.settings.spp, result.settings.rr_depth) == (64, 5)
    assert not any("no camera" in w for w in result.warnings)
    scaled = scene(tmp_path, camera={"to_world": {"scale": 3, "translate": [0, 0, 4]}})
    np.testing.assert_allclose(scaled.camera.to_world[:3, :3], np.eye(3), atol=1e-12)


def test_environment_is_read(tmp_path: Path) -> None:
    """A constant, and a file turned about y by 90 degrees: local -z then points to -x; explicit black stays black."""
    constant = scene(tmp_path, environment={"radiance": [1, 2, 3], "scale": 0.5}).environment
    assert constant is not None and constant.is_constant and constant.scale == 0.5
    write_image(tmp_path / "sky.exr", np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 4, 3))
    rotate = {"axis": [0, 1, 0], "angle": 90}
    turned = scene(tmp_path, environment={"file": "sky.exr", "rotate": rotate}).environment
    assert turned is not None and turned.image.shape == (2, 4, 3)
    np.testing.assert_allclose(turned.to_world @ (0, 0, -1), (-1, 0, 0), atol=1e-12)
    black = scene(tmp_path, environment={"radiance": [0, 0, 0]})
    assert not black.has_light and not any("default environment" in w for w in black.warnings)


def test_gltf_light_and_camera_come_along(tmp_path: Path) -> None:
    """Lights and camera of a glTF asset move with it; the scene's own camera wins."""
    gltf = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": 36, "uri": "t.bin"}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "extensions": {"KHR_lights_punctual": {"lights": [{"type": "point"}]}},
        "cameras": [{"type": "perspective", "perspective": {"yfov": 1.0}}],
        "nodes": [{"mesh": 0, "camera": 0, "extensions": {"KHR_lights_punctual": {"light": 0}}}],
    }
    (tmp_path / "t.bin").write_bytes(np.float32([(0, 0, 0), (1, 0, 0), (0, 1, 0)]).tobytes())
    (tmp_path / "t.gltf").write_text(json.dumps(gltf))
    asset = {"file": "t.gltf", "to_world": {"scale": 2, "translate": [1, 2, 3]}}
    result = scene(tmp_path, assets=[asset])
    assert isinstance(result.lights[0], PointLight) and result.lights[0].position == (1.0, 2.0, 3.0)
    np.testing.assert_allclose(result.camera.to_world[:3, 3], (1, 2, 3))
    assert result.camera.fov == pytest.approx(math.degrees(1.0))
    own = scene(tmp_path, assets=[asset], camera={"look_at": {"origin": [0, 0, 9], "target": [0, 0, 0]}})
    assert own.camera.to_world[2, 3] == 9.0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"material": {}}, r"test.json: material: unknown key; allowed here: name, description, materials"),
        ({"materials": {"white": {"base_colour": [1, 1, 1]}}}, r"materials.white.base_colour: unknown key; allowed"),
        ({"materials": {"white": {"base_color": [1, 1]}}}, r"materials.white.base_color: expected 3 numbers"),
        ({"materials": {"white": {"base_color": [1, -1, 1]}}}, r"materials.white.base_color\[1\]: expected a number"),
        ({"materials": {"white": {"kind": "metal"}}}, r"materials.white.kind: expected one of diffuse, conductor"),
        ({"materials": {"white": {"two_sided": 1}}}, r"materials.white.two_sided: expected true or false"),
        ({"materials": {"white": {"base_color_texture": {}}}}, r"base_color_texture: needs either file or checker"),
        (
            {"materials": {"white": {"base_color_texture": {"file": "no.png"}}}},
            r"_texture.file: no such file: 'no.png'",
        ),
        ({"materials": []}, r"materials: expected an object"),
        ({"assets": {}}, r"assets: expected an array"),
        ({"assets": []}, r"test: has no triangles|test.json"),
        ({"assets": [{"shape": "teapot", "material": "white"}]}, r"assets\[0\].shape: expected one of rectangle"),
        ({"assets": [{"shape": "cube"}]}, r"assets\[0\]: material is missing"),
        ({"assets": [{"shape": "cube", "material": "red"}]}, r"no material 'red'; there are: white"),
        ({"assets": [{"file": "x.json"}]}, r"assets\[0\].file: no such file: 'x.json'"),
        ({"assets": [{"file": "test.json"}]}, r"assets\[0\].file: expected a file of a format among"),
        ({"assets": [{**RECTANGLE, "to_world": {"scale": 0}}]}, r"assets\[0\].to_world: the transform is singular"),
        ({"assets": [{**RECTANGLE, "to_world": [[1, 0, 0, 0]]}]}, r"to_world: expected four rows"),
        ({"assets": [{**RECTANGLE, "to_world": {"rotate": {"axis": [0, 0, 0], "angle": 1}}}]}, r"axis: gives no dir"),
        ({"lights": [{"kind": "area"}]}, r"lights\[0\].kind: expected one of point, spot, directional"),
        ({"lights": [{"kind": "point", "position": [0, 0, 0]}]}, r"lights\[0\]: intensity is missing"),
        ({"environment": {}}, r"environment: needs either file or radiance"),
        ({"camera": {"fov": 40}}, r"camera: needs either look_at or to_world"),
        (
            {"camera": {"look_at": {"origin": [0, 1, 0], "target": [0, 0, 0]}}},
            r"look_at: up must not be parallel",
        ),
        ({"settings": {"width": 0}}, r"settings.width: expected an integer from 1"),
        ({"settings": {"width": 64.5}}, r"settings.width: expected an integer"),
    ],
)
def test_bad_field_names_file_and_field(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    """Each fault is one SceneError with file and field."""
    with pytest.raises(SceneError, match=message) as caught:
        scene(tmp_path, **parts)
    assert "test.json" in str(caught.value) and "\n" not in str(caught.value)


# --- animation -------------------------------------------------------------------------------------------------------


def keyed(*keys: tuple[float, Any], interpolation: str = "linear") -> dict[str, Any]:
    """A value that changes."""
    return {"keyframes": [list(key) for key in keys], "interpolation": interpolation}


def corners(scene: Scene, time: float) -> np.ndarray:
    """Where the last mesh's vertices are at a time."""
    return flatten(scene.at(time)).meshes[-1].positions


@pytest.mark.parametrize(
    ("interpolation", "angles"),  # at 0, 0.5, 1, 1.5, 2 s for keys 0, 60, 90 at 0, 1, 2 s
    [("linear", (0, 30, 60, 75, 90)), ("step", (0, 0, 60, 60, 90)), ("cubic", (0, 33.75, 60, 78.75, 90))],
)
def test_door_turns_on_its_hinge(tmp_path: Path, interpolation: str, angles: tuple[float, ...]) -> None:
    """The closed leaf, moved to the hinge, turned by a keyframed angle: a rigid motion around the hinge's axis."""
    angle = keyed((0, 0), (1, 60), (2, 90), interpolation=interpolation)
    leaf = {"scale": [0.5, 1, 1], "translate": [0.5, 0, 0]}
    hinge = {"rotate": {"axis": [0, 1, 0], "angle": angle}, "translate": [3, 0, -2]}
    result = scene(tmp_path, assets=[{**RECTANGLE, "to_world": [leaf, hinge]}])
    assert len(result.instances) == 1 and result.animation is not None and result.animation.duration == 2.0
    np.testing.assert_array_equal(result.meshes[0].positions[1], (1, -1, 0))
    for time, degrees in zip((0.0, 0.5, 1.0, 1.5, 2.0), angles, strict=True):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        expected = [(3, -1, -2), (3 + c, -1, -2 - s), (3 + c, 1, -2 - s), (3, 1, -2)]
        np.testing.assert_allclose(corners(result, time), expected, atol=FLOAT32)


def test_every_part_of_a_step_can_move(tmp_path: Path) -> None:
    """Scale, translation and look_at inside steps, in their order; still steps around them."""
    steps = [
        {"scale": keyed((0, 1), (1, 3)), "translate": keyed((0, [0, 0, 0]), (2, [0, 2, 0]))},
        {"look_at": {"origin": keyed((0, [0, 0, 0]), (1, [1, 0, 0])), "target": [1, 0, -9]}},
        {"translate": [10, 0, 0]},
    ]
    result = scene(tmp_path, assets=[{**RECTANGLE, "to_world": steps, "flip_normals": True}])
    # at 1 s: scaled by 3, moved by (0, 1, 0), +z turned to -z and +x to -x, moved by (1, 0, 0) and (10, 0, 0)
    np.testing.assert_allclose(corners(result, 1.0)[1], (11 - 3, -3 + 1, 0), atol=FLOAT32)
    mesh = flatten(result.at(1.0)).meshes[0]
    a, b, c = mesh.positions[mesh.indices[0]]
    assert np.cross(b - a, c - a)[2] > 0.0  # flipped from -z


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_whole_transforms_can_be_keyframes(tmp_path: Path, interpolation: str) -> None:
    """Matrices and steps as values: between two, translation and scale are means and the turn is half of it."""
    half_turn = [[0, -2, 0, 4], [2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]
    to_world = keyed((0, {"scale": 4}), (2, half_turn), interpolation=interpolation)
    matrix = scene(tmp_path, assets=[{**RECTANGLE, "to_world": to_world}]).at(1.0).instances[0].to_world
    r = 3.0 * math.sqrt(0.5)
    np.testing.assert_allclose(matrix, [[r, -r, 0, 2], [r, r, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]], atol=1e-9)


def test_camera_lights_environment_and_emission_move(tmp_path: Path) -> None:
    """Every field that may be keyframed has its value of the time, and at 0 that of the scene."""
    result = scene(
        tmp_path,
        materials={"white": {}, "lamp": {"emission": keyed((1, [1, 2, 3]), (2, [3, 2, 1]))}},
        assets=[RECTANGLE, {"shape": "disk", "material": "lamp"}],
        lights=[
            {"kind": "point", "position": keyed((0, [0, 0, 0]), (2, [2, 4, 6])), "intensity": [1, 1, 1]},
            {
                "kind": "spot",
                "position": [0, 3, 0],
                "target": keyed((0, [0, 0, 0]), (2, [6, 3, 0])),
                "intensity": keyed((0, [0, 0, 0]), (2, [2, 2, 2])),
                "outer_angle": 30,
            },
            {"kind": "directional", "direction": keyed((0, [0, -1, 0]), (2, [1, 0, 0])), "irradiance": [1, 1, 1]},
        ],
        environment={
            "radiance": [1, 1, 1],
            "scale": keyed((0, 1), (2, 0)),
            "rotate": {"axis": [0, 1, 0], "angle": keyed((0, 0), (2, 180))},
        },
        camera={
            "look_at": {"origin": keyed((0, [0, 0, 5]), (2, [0, 0, 9])), "target": [0, 0, 0]},
            "fov": keyed((0, 40), (2, 60)),
        },
    )
    assert result.materials[1].emission == (1, 2, 3) and result.camera.fov == 40.0 and result.environment is not None
    posed = result.at(1.0)
    point, spot, sun = posed.lights
    assert isinstance(point, PointLight) and isinstance(spot, SpotLight) and isinstance(sun, DirectionalLight)
    assert posed.materials[1].emission == (1, 2, 3) and result.at(1.5).materials[1].emission == (2, 2, 2)
    assert point.position == (1, 2, 3) and spot.intensity == (1, 1, 1) and spot.outer_angle == math.radians(30)
    np.testing.assert_allclose(spot.direction, np.array([3, -1.5, 0]) / math.hypot(3, 1.5))
    np.testing.assert_allclose(sun.direction, np.array([1, -1, 0]) / math.sqrt(2))
    assert posed.environment is not None and posed.environment.scale == 0.5
    np.testing.assert_allclose(posed.environment.to_world @ (0, 0, -1), (-1, 0, 0), atol=1e-9)
    np.testing.assert_allclose(posed.camera.to_world, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 7], [0, 0, 0, 1]])
    assert posed.camera.fov == 50.0 and posed.camera.focus_distance == pytest.approx(7.0)
    assert posed.meshes is result.meshes and not result.instances


def test_lamp_that_begins_dark_is_a_light(tmp_path: Path) -> None:
    """No default environment takes the place of light that comes on later."""
    lamp = {"emission": keyed((0, [0, 0, 0]), (2, [5, 5, 5]))}
    result = scene(tmp_path, materials={"lamp": lamp}, assets=[{"shape": "disk", "material": "lamp"}])
    assert result.environment is None and not result.has_light and result.at(1.0).has_light


def test_animated_file_keeps_its_motion_under_the_asset(tmp_path: Path) -> None:
    """A glTF's moving node, skin, light and camera below a turning asset; its still mesh turns with the asset."""
    triangle = np.float32([(0, 0, 0), (1, 0, 0), (0, 1, 0)])
    arrays = [
        triangle,
        np.float32([0, 2]),
        np.float32([(0, 0, 0), (4, 0, 0)]),
        np.zeros((3, 4), np.uint8),
        np.tile(np.float32([1, 0, 0, 0]), (3, 1)),
    ]
    data = b"".join(array.tobytes() for array in arrays)
    offsets = np.cumsum([0, *(array.nbytes for array in arrays)]).tolist()
    kinds = [(5126, "VEC3"), (5126, "SCALAR"), (5126, "VEC3"), (5121, "VEC4"), (5126, "VEC4")]
    gltf = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": len(data), "uri": "t.bin"}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": offset, "byteLength": array.nbytes}
            for offset, array in zip(offsets, arrays, strict=False)
        ],
        "accessors": [
            {"bufferView": i, "componentType": component, "count": len(arrays[i]), "type": kind}
            for i, (component, kind) in enumerate(kinds)
        ],
        "meshes": [
            {"primitives": [{"attributes": {"POSITION": 0}}]},
            {"primitives": [{"attributes": {"POSITION": 0, "JOINTS_0": 3, "WEIGHTS_0": 4}}]},
            {"primitives": [{"attributes": {"POSITION": 0}}]},
        ],
        "skins": [{"joints": [3]}],
        "extensions": {"KHR_lights_punctual": {"lights": [{"type": "point"}]}},
        "cameras": [{"type": "perspective", "perspective": {"yfov": 1.0}}],
        "nodes": [
            {"mesh": 0, "camera": 0, "extensions": {"KHR_lights_punctual": {"light": 0}}},
            {"mesh": 1, "skin": 0},
            {"mesh": 2, "translation": [0, 0, 1]},
            {"translation": [0, 5, 0]},
        ],
        "animations": [
            {
                "samplers": [{"input": 1, "output": 2}],
                "channels": [{"sampler": 0, "target": {"node": node, "path": "translation"}} for node in (0, 3)],
            }
        ],
    }
    (tmp_path / "t.bin").write_bytes(data)
    (tmp_path / "t.gltf").write_text(json.dumps(gltf))
    turning = {"rotate": {"axis": [0, 1, 0], "angle": keyed((0, 0), (1, 90))}, "translate": [0, 0, 7]}
    for to_world in (turning, {"rotate": {"axis": [0, 1, 0], "angle": 90}, "translate": [0, 0, 7]}):
        moving = to_world is turning
        result = scene(tmp_path, assets=[RECTANGLE, {"file": "t.gltf", "to_world": to_world}])
        posed = result.at(1.0)  # half of the file's motion: x = 2; then x turns to -z and z to x
        firsts = {tuple(np.round(mesh.positions[0], 5) + 0.0) for mesh in flatten(posed).meshes[1 if moving else 0 :]}
        assert {(0.0, 0.0, 5.0), (1.0, 0.0, 7.0)} <= firsts
        skinned = [mesh for mesh in flatten(posed).meshes if "meshes[1]" in mesh.name]
        np.testing.assert_allclose(skinned[0].positions, [(0, 0, 5), (0, 0, 4), (0, 1, 5)], atol=FLOAT32)
        assert isinstance(posed.lights[0], PointLight)
        np.testing.assert_allclose(posed.lights[0].position, (0, 0, 5), atol=FLOAT32)
        np.testing.assert_allclose(posed.camera.to_world[:3, 3], (0, 0, 5), atol=FLOAT32)
        np.testing.assert_allclose(posed.camera.to_world[:3, 2], (1, 0, 0), atol=FLOAT32)
    own = scene(
        tmp_path,
        assets=[{"file": "t.gltf", "to_world": turning}],
        camera={"look_at": {"origin": [0, 0, 9], "target": [0, 0, 0]}},
    )
    assert own.at(1.0).camera is own.camera


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"camera": {"look_at": {"origin": [0, 0, 5], "target": [0, 0, 0]}, "fov": keyed()}},
            r"fov.keyframes: is empty",
        ),
        (
            {"environment": {"radiance": [1, 1, 1], "scale": keyed((0, 1), (0, 2))}},
            r"environment.scale.keyframes\[1\]\[0\]: its time does not come after the one before",
        ),
        (
            {"environment": {"radiance": [1, 1, 1], "scale": keyed((-1, 1))}},
            r"keyframes\[0\]\[0\]: expected a number >=",
        ),
        (
            {"environment": {"radiance": [1, 1, 1], "scale": keyed((0, -1))}},
            r"keyframes\[0\]\[1\]: expected a number >=",
        ),
        (
            {"environment": {"radiance": [1, 1, 1], "scale": {"keyframes": [[0]]}}},
            r"keyframes\[0\]: expected \[time, value\]",
        ),
        (
            {"environment": {"radiance": [1, 1, 1], "scale": keyed((0, 1), interpolation="smooth")}},
            r"scale.interpolation: expected one of linear, step, cubic",
        ),
        (
            {"environment": {"radiance": [1, 1, 1], "scale": {"keyframes": [[0, 1]], "loop": True}}},
            r"scale.loop: unknown key",
        ),
        (
            {"assets": [{**RECTANGLE, "to_world": keyed((0, {"scale": 0}))}]},
            r"keyframes\[0\]\[1\]: the transform is sing",
        ),
        (
            {
                "assets": [
                    {**RECTANGLE, "to_world": keyed((0, [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))}
                ]
            },
            r"keyframes\[0\]\[1\]: the transform has shear",
        ),
        (
            {"assets": [{**RECTANGLE, "to_world": keyed((0, {"scale": keyed((0, 1), (1, 2))}))}]},
            r"keyframes\[0\]\[1\]: keyframes within keyframes",
        ),
        (
            {"camera": {"look_at": {"origin": [0, 0, 0], "target": keyed((0, [0, 0, 1]), (2, [0, 1, 0]))}}},
            r"look_at: up must not be parallel to the direction from origin to target at 2 s",
        ),
        (
            {
                "lights": [
                    {
                        "kind": "spot",
                        "position": [0, 1, 0],
                        "target": keyed((0, [0, 0, 0]), (1, [0, 1, 0])),
                        "intensity": [1, 1, 1],
                        "outer_angle": 9,
                    }
                ]
            },
            r"lights\[0\].target: gives no direction",
        ),
        ({"materials": {"white": {"base_color": keyed((0, [1, 1, 1]))}}}, r"base_color: cannot change over time"),
        ({"settings": {"spp": keyed((0, 1))}}, r"settings.spp: cannot change over time"),
        (
            {"camera": {"look_at": {"origin": [0, 0, 5], "target": [0, 0, 0], "up": keyed((0, [0, 1, 0]))}}},
            r"look_at.up: cannot change over time",
        ),
    ],
)
def test_bad_keyframes_name_file_and_field(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    """Each fault is one SceneError with file and field."""
    with pytest.raises(SceneError, match=r"test\.json: .*" + message):
        scene(tmp_path, **parts)


# --- loading and the built-in scenes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"assets": NaN}', '{"name": "a", "name": "b"}', "\xff\xfe"])
def test_bad_json_names_the_file(tmp_path: Path, text: str) -> None:
    """What is no JSON object is one SceneError."""
    (tmp_path / "test.json").write_text(text, encoding="latin-1")
    with pytest.raises(SceneError, match=r"test\.json: "):
        load(tmp_path / "test.json")


def test_load_rejects_what_it_cannot_read(tmp_path: Path) -> None:
    """Missing files, unknown names and formats, folders and misplaced parameters are one clear line."""
    (tmp_path / "a.blend").write_text("x")
    (tmp_path / "folder.obj").mkdir()
    cases = [
        (tmp_path / "none.obj", {}, r"none\.obj: no such file$"),
        ("cornel_box", {}, r"cornel_box: no such file; built-in scenes: ajar_room, cornell_box"),
        (tmp_path / "a.blend", {}, r"a\.blend: cannot read this; known formats: \.gltf"),
        (tmp_path / "folder.obj", {}, r"folder\.obj: cannot read this"),
        ("cornell_box", {"spp": "4"}, r"cornell_box: parameters \(spp\) are understood in Mitsuba XML files only"),
    ]
    for source, defines, message in cases:
        with pytest.raises(SceneError, match=message):
            load(source, defines=defines)


def test_builtin_scenes_are_described() -> None:
    """The scenes that ship, each with a description."""
    scenes = builtin_scenes()
    assert tuple(scenes) == NAMES
    assert all(scenes.values())


@pytest.mark.parametrize("name", NAMES)
def test_builtin_scene_is_complete(name: str) -> None:
    """Built-in scenes bring light and camera and load without a warning; every material is used."""
    result = load(name)
    assert result.name == name and result.warnings == () and result.has_light
    assert {mesh.material for mesh in result.meshes} == set(range(len(result.materials)))


def escapes(scene: Scene, n: int, seed: int) -> float:
    """Share of `n` rays in random directions, from the camera and from below each light, that meet no surface.

    Only walls and boxes count where a scene has them: balls in between cannot close a gap.
    """
    walls = [mesh for mesh in scene.meshes if len(mesh.indices) <= 12] or list(scene.meshes)
    a, b, c = (np.concatenate([mesh.positions[mesh.indices[:, i]] for mesh in walls]).astype(float) for i in range(3))
    lamps = [mesh for mesh in walls if scene.materials[mesh.material].emits and len(mesh.indices) == 2]
    origins = [scene.camera.to_world[:3, 3], *(mesh.positions.mean(axis=0) - (0.0, 0.05, 0.0) for mesh in lamps)]
    rng = np.random.default_rng(seed)
    missed = 0
    for i in range(n):  # Möller and Trumbore 1997
        origin, d = origins[i % len(origins)], rng.standard_normal(3)
        e1, e2, t = b - a, c - a, origin - a
        p, q = np.cross(d, e2), np.cross(t, e1)
        determinant = np.einsum("ij,ij->i", e1, p)
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.einsum("ij,ij->i", t, p) / determinant
            v = q @ d / determinant
            distance = np.einsum("ij,ij->i", e2, q) / determinant
        missed += not ((u >= 0.0) & (v >= 0.0) & (u + v <= 1.0) & (distance > 0.0)).any()
    return missed / n


@pytest.mark.parametrize(("name", "n"), [("furnace", 200), ("ajar_room", 3000), ("glossy_room", 3000)])
def test_closed_room_has_no_leak(name: str, n: int) -> None:
    """No ray from the camera or a light leaves a closed room."""
    assert escapes(load(name), n, 1) == 0.0


@pytest.mark.parametrize("time", [0.0, 3.1, 8.0])
def test_opening_door_has_no_leak(time: float) -> None:
    """Neither of its rooms leaks at any time, seen from the camera and from the other room."""
    room = flatten(load("opening_door").at(time))
    other = Camera.look_at((-0.9, 1.0, -3.4), (0, 1, -9))
    assert escapes(room, 700, 1) == 0.0 and escapes(replace(room, camera=other), 700, 2) == 0.0


def test_opening_door_moves_what_it_says() -> None:
    """Over 8 s, 240 frames at 30 per second: the leaf swings, the lamp and the turntable move, the walls do not."""
    scene = load("opening_door")
    assert scene.animation is not None and scene.animation.duration == 8.0
    before, after = scene.at(0.0), scene.at(3.0)
    assert after.meshes is before.meshes and after.materials is before.materials and after.camera is not before.camera
    moved = {b.name for a, b in zip(before.instances, after.instances, strict=True) if a is not b}
    assert {"door leaf", "lamp", "red box", "turntable top"} <= moved and "floor" not in moved
    leaf = next(instance.to_world for instance in after.instances if instance.name == "door leaf")
    hinge = (-0.435 / 0.45, -1.0465 / 1.0385, 0, 1)  # in the space of the leaf's cube
    np.testing.assert_allclose(leaf @ hinge, (-1.6, 0, -2.5, 1), atol=1e-9)


@pytest.mark.parametrize("name", ["cornell_box", "textured_court"])
def test_leak_test_sees_openings(name: str) -> None:
    """The open front of the Cornell box and the sky of the court count as leaks."""
    assert escapes(load(name), 500, 1) > 0.1


@pytest.mark.parametrize("name", ["cornell_box", "ajar_room", "glossy_room"])
def test_builtin_lights_face_the_room(name: str) -> None:
    """The emitting side of each area light faces the middle of the floor area, not the wall behind it."""
    result = load(name)
    lower, upper = result.bounds
    lamps = [mesh for mesh in result.meshes if result.materials[mesh.material].emits]
    assert lamps
    for mesh in lamps:
        a, b, c = mesh.positions[mesh.indices[0]].astype(float)
        middle = np.array([mesh.positions[:, 0].mean(), lower[1], mesh.positions[:, 2].mean()])
        towards = (middle + (lower + upper) / 2.0) / 2.0 - mesh.positions.mean(axis=0)
        assert np.cross(b - a, c - a) @ towards > 0.0, mesh.name


def test_builtin_scene_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name does not depend on the current folder."""
    monkeypatch.chdir(tmp_path)
    assert load("cornell_box").name == "cornell_box"
