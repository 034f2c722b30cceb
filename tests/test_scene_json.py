"""Scene JSON: values against numbers known by construction, errors, loading by name, the built-in scenes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nrc.assets import builtin_scenes, load
from nrc.image import write_image
from nrc.scene import (
    MATERIAL_KINDS,
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
NAMES = ("ajar_room", "cornell_box", "furnace", "glossy_room", "textured_court")


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
