"""glTF reader: small files written here against numbers known by construction; bad files; the sample models."""

from __future__ import annotations

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from nrc.assets import load
from nrc.assets.model import flatten
from nrc.scene import DirectionalLight, PointLight, Scene, SceneError, SpotLight, Texture

CODES = {"int8": 5120, "uint8": 5121, "int16": 5122, "uint16": 5123, "uint32": 5125, "float32": 5126}
TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
TRIANGLE = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0)], np.float32)
FLOAT32 = 1e-6  # rounding of values of order one in single precision


class Gltf:
    """Builds a glTF file with one buffer."""

    def __init__(self, **top: Any) -> None:
        self.json: dict[str, Any] = {"asset": {"version": "2.0"}, "bufferViews": [], "accessors": [], **top}
        self.data = b""

    def view(self, data: bytes, **options: Any) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        self.json["bufferViews"].append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data), **options})
        self.data += data
        return len(self.json["bufferViews"]) - 1

    def accessor(self, values: np.ndarray, **options: Any) -> int:
        values = np.asarray(values)
        width = 1 if values.ndim == 1 else values.shape[1]
        entry = {"componentType": CODES[values.dtype.name], "count": len(values), "type": TYPES[width]}
        self.json["accessors"].append({"bufferView": self.view(values.tobytes()), **entry, **options})
        return len(self.json["accessors"]) - 1

    def mesh(self, primitive: dict[str, Any] | None = None, positions: np.ndarray = TRIANGLE, **attributes: Any) -> int:
        """A mesh of one primitive."""
        arrays = {"POSITION": positions, **attributes}
        places = {k: v if isinstance(v, int) else self.accessor(v) for k, v in arrays.items()}
        meshes = self.json.setdefault("meshes", [])
        meshes.append({"primitives": [{"attributes": places, **(primitive or {})}]})
        return len(meshes) - 1

    def picture(self, texels: np.ndarray) -> int:
        """An image in a buffer view."""
        png = io.BytesIO()
        Image.fromarray(texels).save(png, "PNG")
        images = self.json.setdefault("images", [])
        images.append({"bufferView": self.view(png.getvalue()), "mimeType": "image/png"})
        return len(images) - 1

    def write(self, folder: Path, *, glb: bool = False) -> Path:
        self.json.setdefault("nodes", [{"mesh": 0}])
        path = folder / ("model.glb" if glb else "model.gltf")
        self.data += b"\0" * (-len(self.data) % 4)
        if glb:
            self.json["buffers"] = [{"byteLength": len(self.data)}]
            text = json.dumps(self.json).encode()
            text += b" " * (-len(text) % 4)
            body = struct.pack("<II", len(text), 0x4E4F534A) + text
            body += struct.pack("<II", len(self.data), 0x004E4942) + self.data
            path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)
        else:
            uri = "data:application/octet-stream;base64," + base64.b64encode(self.data).decode()
            self.json["buffers"] = [{"byteLength": len(self.data), "uri": uri}]
            path.write_text(json.dumps(self.json))
        return path

    def load(self, folder: Path, *, glb: bool = False) -> Scene:
        return load(self.write(folder, glb=glb))


def geometric_normal(scene: Scene, mesh: int = 0) -> np.ndarray:
    """Unit normal of a mesh's first triangle by its winding."""
    a, b, c = scene.meshes[mesh].positions[scene.meshes[mesh].indices[0]].astype(float)
    n = np.cross(b - a, c - a)
    return n / np.linalg.norm(n)


def test_node_hierarchy_composes_transforms(tmp_path: Path) -> None:
    """A child's TRS applies before its parent's matrix; the matrix is column-major."""
    half = np.sqrt(0.5)
    nodes = [
        {"children": [1], "matrix": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 10, 20, 30, 1]},
        {"mesh": 0, "translation": [1, 0, 0], "rotation": [0, 0, half, half], "scale": [2, 3, 4]},
    ]
    gltf = Gltf(nodes=nodes, scenes=[{"nodes": [0]}], scene=0)
    gltf.mesh()
    scene = gltf.load(tmp_path)
    # (1, 0, 0) -> scaled (2, 0, 0) -> turned by 90 degrees about z (0, 2, 0) -> moved by (11, 20, 30)
    expected = [(11, 20, 30), (11, 22, 30), (8, 20, 30)]
    np.testing.assert_allclose(scene.meshes[0].positions, expected, atol=1e-5)
    assert scene.meshes[0].normals is None


@pytest.mark.parametrize("glb", [False, True])
def test_negative_scale_keeps_front_and_normals(tmp_path: Path, glb: bool) -> None:
    """A mirrored node keeps the front on the side its normals point to, and mirrors the bitangent."""
    gltf = Gltf(nodes=[{"mesh": 0, "scale": [1, 1, -2]}])
    normals = np.tile(np.float32([0, 0, 1]), (3, 1))
    tangents = np.tile(np.float32([1, 0, 0, 1]), (3, 1))
    slanted = TRIANGLE + np.float32([(0, 0, 0), (0, 0, 1), (0, 0, 0)])
    gltf.mesh(positions=slanted, NORMAL=normals, TANGENT=tangents)
    scene = gltf.load(tmp_path, glb=glb)
    mesh = scene.meshes[0]
    assert mesh.normals is not None and mesh.tangents is not None
    # the surface z = x with front n = (-1, 0, 1) becomes z = -2x whose front is (-2, 0, -1)
    np.testing.assert_allclose(geometric_normal(scene), np.array([-2, 0, -1]) / np.sqrt(5), atol=FLOAT32)
    np.testing.assert_allclose(mesh.normals[0], (0, 0, -1), atol=FLOAT32)
    # tangent x, bitangent y stay in place under a mirror in z: cross(n', t') * w = y asks for w = -1
    np.testing.assert_allclose(np.cross(mesh.normals[0], mesh.tangents[0, :3]) * mesh.tangents[0, 3], (0, 1, 0))


def test_unequal_scale_keeps_normals_perpendicular(tmp_path: Path) -> None:
    """Normals move by the inverse transpose."""
    positions = np.float32([(0, 0, 0), (1, -1, 0), (0, 0, 1)])
    normal = np.float32([-1, -1, 0]) / np.sqrt(np.float32(2))
    gltf = Gltf(nodes=[{"mesh": 0, "scale": [3, 1, 1]}])
    gltf.mesh(positions=positions, NORMAL=np.tile(normal, (3, 1)))
    scene = gltf.load(tmp_path)
    assert scene.meshes[0].normals is not None
    np.testing.assert_allclose(scene.meshes[0].normals[0], geometric_normal(scene), atol=FLOAT32)


def test_quantized_attributes_are_normalised(tmp_path: Path) -> None:
    """KHR_mesh_quantization: integers as they are, normalised ones by c / 127, c / 255, c / 65535, floored at -1."""
    gltf = Gltf(extensionsUsed=["KHR_mesh_quantization"], extensionsRequired=["KHR_mesh_quantization"])
    positions = np.array([(0, 0, 0), (200, 0, 0), (0, -100, 0)], np.int16)
    padded = np.zeros((3, 4), np.int8)
    padded[:, 2] = -128
    view = gltf.view(padded.tobytes(), byteStride=4)
    entry = {"componentType": 5120, "count": 3, "type": "VEC3", "normalized": True, "bufferView": view}
    gltf.json["accessors"].append(entry)
    colors = gltf.accessor(np.array([(255, 0, 51, 102)] * 3, np.uint8), normalized=True)
    uv = gltf.accessor(np.array([(0, 65535), (32768, 0), (0, 0)], np.uint16), normalized=True)
    gltf.mesh(positions=gltf.accessor(positions), NORMAL=0, COLOR_0=colors, TEXCOORD_0=uv)  # type: ignore[arg-type]
    mesh = gltf.load(tmp_path).meshes[0]
    assert mesh.normals is not None and mesh.colors is not None and mesh.uv0 is not None
    np.testing.assert_array_equal(mesh.positions, positions)
    np.testing.assert_allclose(mesh.normals, np.tile((0, 0, -1), (3, 1)))
    np.testing.assert_allclose(mesh.colors[0], (1, 0, 0.2, 0.4), atol=FLOAT32)
    np.testing.assert_allclose(mesh.uv0, [(0, 1), (32768 / 65535, 0), (0, 0)], atol=FLOAT32)


def test_sparse_accessor_replaces_elements(tmp_path: Path) -> None:
    """A sparse accessor overwrites listed elements, of a buffer view or of zeros."""
    gltf = Gltf()
    where = gltf.view(np.array([2, 1], np.uint16).tobytes())
    what = gltf.view(np.float32([(7, 8, 9), (1, 0, 0)]).tobytes())
    sparse = {"count": 2, "indices": {"bufferView": where, "componentType": 5123}, "values": {"bufferView": what}}
    over = gltf.accessor(TRIANGLE, sparse=sparse)
    gltf.json["accessors"].append({"componentType": 5126, "count": 3, "type": "VEC3", "sparse": sparse})
    gltf.mesh(positions=over)  # type: ignore[arg-type]
    gltf.mesh(positions=over + 1)  # type: ignore[arg-type]
    gltf.json["nodes"] = [{"mesh": 0}, {"mesh": 1}]
    scene = gltf.load(tmp_path)
    for mesh in scene.meshes:
        np.testing.assert_array_equal(mesh.positions, [(0, 0, 0), (1, 0, 0), (7, 8, 9)])


@pytest.mark.parametrize(
    ("mode", "indices", "triangles"),
    [
        (4, [0, 1, 2, 2, 1, 3], [(0, 1, 2), (2, 1, 3)]),
        (5, [0, 1, 2, 3, 4], [(0, 1, 2), (1, 3, 2), (2, 3, 4)]),
        (6, [0, 1, 2, 3], [(1, 2, 0), (2, 3, 0)]),
    ],
)
def test_primitive_modes_become_triangles(tmp_path: Path, mode: int, indices: list[int], triangles: list) -> None:
    """Lists, strips and fans give the triangles of section 3.7.2.1 of the specification."""
    gltf = Gltf()
    positions = np.float32([(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0)])
    gltf.mesh({"mode": mode, "indices": gltf.accessor(np.array(indices, np.uint8))}, positions=positions)
    np.testing.assert_array_equal(gltf.load(tmp_path).meshes[0].indices, triangles)


def test_points_and_lines_are_named(tmp_path: Path) -> None:
    """Primitives without triangles are left out and named."""
    gltf = Gltf(nodes=[{"mesh": 0}, {"mesh": 1}, {"mesh": 2}])
    gltf.mesh()
    gltf.mesh({"mode": 0})
    gltf.mesh({"mode": 3})
    scene = gltf.load(tmp_path)
    assert len(scene.meshes) == 1
    assert [w for w in scene.warnings if "points" in w] and [w for w in scene.warnings if "lines" in w]


def test_instancing_places_each_copy(tmp_path: Path) -> None:
    """EXT_mesh_gpu_instancing and two nodes of one mesh give instances of it, under the node's transform."""
    gltf = Gltf(extensionsUsed=["EXT_mesh_gpu_instancing"])
    gltf.mesh()
    translation = gltf.accessor(np.float32([(1, 0, 0), (0, 5, 0)]))
    scale = gltf.accessor(np.float32([(1, 1, 1), (2, 2, 2)]))
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": translation, "SCALE": scale}}}
    gltf.json["nodes"] = [{"mesh": 0, "translation": [0, 0, 3], "extensions": extension}, {"mesh": 0}]
    scene = gltf.load(tmp_path)
    assert len(scene.meshes) == 1 and [instance.mesh for instance in scene.instances] == [0, 0, 0]
    corners = [mesh.positions[1].tolist() for mesh in flatten(scene).meshes]
    assert corners == [[2, 0, 3], [2, 5, 3], [1, 0, 0]] and scene.animation is None


def test_broken_instancing_is_named(tmp_path: Path) -> None:
    """NaN names the node and the attribute."""
    gltf = Gltf(extensionsUsed=["EXT_mesh_gpu_instancing"])
    gltf.mesh()
    attributes = {"TRANSLATION": gltf.accessor(np.float32([(1, np.nan, 0)]))}
    gltf.json["nodes"] = [{"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": attributes}}}]
    with pytest.raises(SceneError, match=r"nodes\[0\]\..*\.TRANSLATION: accessors\[.*not finite"):
        gltf.load(tmp_path)


def test_skin_bends_vertices(tmp_path: Path) -> None:
    """Skinned vertices are blends of joint matrices times inverse bind matrices, without the node's own transform."""
    gltf = Gltf()
    bind = np.stack([np.eye(4), np.eye(4)])
    bind[1, :3, 3] = (-1, 0, 0)
    joints = np.zeros((3, 4), np.uint8)
    joints[:, 1] = 1
    weights = np.float32([(1, 0, 0, 0), (0, 1, 0, 0), (0.5, 0.5, 0, 0)])
    gltf.mesh(JOINTS_0=joints, WEIGHTS_0=weights)
    inverse = gltf.accessor(bind.transpose(0, 2, 1).reshape(2, 16).astype(np.float32))
    gltf.json["skins"] = [{"joints": [1, 2], "inverseBindMatrices": inverse}]
    gltf.json["nodes"] = [
        {"mesh": 0, "skin": 0, "translation": [100, 0, 0]},
        {"translation": [0, 0, 1]},
        {"translation": [1, 0, 4]},
    ]
    positions = gltf.load(tmp_path).meshes[0].positions
    np.testing.assert_allclose(positions, [(0, 0, 1), (1, 0, 4), (0, 1, 2.5)], atol=FLOAT32)


def test_material_reads_every_core_field(tmp_path: Path) -> None:
    """Factors, textures, alpha and sidedness of a material arrive where `Material` documents them."""
    gltf = Gltf()
    texels = np.array([[(255, 0, 0, 128), (0, 255, 0, 255)]], np.uint8)
    gltf.picture(texels)
    gltf.json["samplers"] = [{"wrapS": 33071, "wrapT": 33648, "magFilter": 9728}]
    gltf.json["textures"] = [{"source": 0, "sampler": 0}, {"source": 0}]
    gltf.json["materials"] = [
        {
            "name": "paint",
            "pbrMetallicRoughness": {
                "baseColorFactor": [0.1, 0.2, 0.3, 0.4],
                "metallicFactor": 0.25,
                "roughnessFactor": 0.75,
                "baseColorTexture": {"index": 0},
                "metallicRoughnessTexture": {"index": 1, "texCoord": 1},
            },
            "normalTexture": {"index": 1, "scale": -0.5},
            "occlusionTexture": {"index": 1},
            "emissiveFactor": [1, 0.5, 0],
            "emissiveTexture": {"index": 1},
            "alphaMode": "MASK",
            "alphaCutoff": 0.3,
            "doubleSided": True,
        },
        {},
    ]
    gltf.mesh({"material": 0})
    paint, plain = gltf.load(tmp_path).materials
    assert (paint.name, paint.kind) == ("paint", "metallic_roughness")
    assert paint.base_color == (0.1, 0.2, 0.3) and paint.opacity == 0.4 and paint.opacity_from_base_color
    assert paint.metallic == 0.25 and paint.roughness == (0.75, 0.75) and paint.normal_scale == -0.5
    assert paint.emission == (1.0, 0.5, 0.0) and paint.emission_two_sided and paint.two_sided
    assert (paint.alpha_mode, paint.alpha_cutoff) == ("mask", 0.3)
    base, packed = paint.base_color_texture, paint.metallic_roughness_texture
    assert isinstance(base, Texture) and isinstance(packed, Texture)
    assert (base.srgb, base.wrap_u, base.wrap_v, base.filter, base.uv_set) == (True, "clamp", "mirror", "nearest", 0)
    assert (packed.srgb, packed.wrap_u, packed.filter, packed.uv_set) == (False, "repeat", "bilinear", 1)
    np.testing.assert_array_equal(base.image, texels)
    assert isinstance(paint.emission_texture, Texture) and paint.emission_texture.srgb
    assert isinstance(paint.normal_texture, Texture) and not paint.normal_texture.srgb
    assert (plain.base_color, plain.metallic, plain.roughness) == ((1.0, 1.0, 1.0), 1.0, (1.0, 1.0))
    assert plain.alpha_mode == "opaque" and plain.two_sided and not plain.emission_two_sided


def test_material_extensions_are_read(tmp_path: Path) -> None:
    """emissive_strength, ior, transmission, specular and unlit change the fields they stand for."""
    gltf = Gltf()
    gltf.picture(np.full((1, 1, 4), 200, np.uint8))
    gltf.json["textures"] = [{"source": 0}]
    extensions = {
        "KHR_materials_emissive_strength": {"emissiveStrength": 8.0},
        "KHR_materials_ior": {"ior": 1.33},
        "KHR_materials_transmission": {"transmissionFactor": 0.9, "transmissionTexture": {"index": 0}},
        "KHR_materials_specular": {
            "specularFactor": 0.5,
            "specularTexture": {"index": 0},
            "specularColorFactor": [0.2, 1.0, 2.0],
            "specularColorTexture": {"index": 0},
        },
    }
    unlit = {"pbrMetallicRoughness": {"baseColorFactor": [0.2, 0.4, 0.6, 1]}, "name": "sign"}
    gltf.json["materials"] = [
        {"emissiveFactor": [1, 0.5, 0.25], "extensions": extensions},
        {**unlit, "extensions": {"KHR_materials_unlit": {}}},
    ]
    gltf.mesh({"material": 0})
    scene = gltf.load(tmp_path)
    rich, sign = scene.materials
    assert rich.emission == (8.0, 4.0, 2.0) and rich.ior == 1.33 and rich.transmission == 0.9
    assert rich.specular_factor == 0.5 and rich.specular == (0.2, 1.0, 2.0)
    textures = (rich.transmission_texture, rich.specular_factor_texture, rich.specular_texture)
    assert [isinstance(t, Texture) and t.srgb for t in textures] == [False, False, True]
    assert all(isinstance(t, Texture) for t in textures)
    assert sign.emission == (0.2, 0.4, 0.6) and sign.base_color == (0.0, 0.0, 0.0)
    assert any("KHR_materials_unlit" in w and "sign" in w for w in scene.warnings)


def test_texture_transform_matches_specification(tmp_path: Path) -> None:
    """KHR_texture_transform: offset + R · (scale · uv), R turning by -rotation in (u right, v down); its texCoord wins.

    The direction is the one in which the arrow of the TextureTransformTest sample points at its green mark.
    """
    gltf = Gltf()
    gltf.picture(np.zeros((1, 1, 3), np.uint8))
    gltf.json["textures"] = [{"source": 0}]
    transform = {"offset": [0.1, 0.2], "rotation": np.pi / 2, "scale": [2, 3], "texCoord": 1}
    info = {"index": 0, "texCoord": 0, "extensions": {"KHR_texture_transform": transform}}
    gltf.json["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": info}}]
    gltf.mesh({"material": 0})
    texture = gltf.load(tmp_path).materials[0].base_color_texture
    assert isinstance(texture, Texture) and texture.uv_set == 1
    np.testing.assert_allclose(texture.transform @ (1, 0, 1), (0.1, 0.2 - 2), atol=1e-12)
    np.testing.assert_allclose(texture.transform @ (0, 1, 1), (0.1 + 3, 0.2), atol=1e-12)


def test_lights_and_camera_are_placed(tmp_path: Path) -> None:
    """KHR_lights_punctual and the first perspective camera, under a node that turns -z to +x and scales."""
    lights = [
        {"type": "point", "color": [1, 0.5, 0], "intensity": 10},
        {"type": "spot", "intensity": 2, "spot": {"innerConeAngle": 0.1, "outerConeAngle": 0.4}},
        {"type": "directional", "intensity": 3},
        {"type": "spot", "spot": {}},
    ]
    half = np.sqrt(0.5)
    turned = {"rotation": [0, -half, 0, half], "scale": [2, 2, 2], "translation": [1, 2, 3]}
    nodes = [{"mesh": 0}, {**turned, "camera": 0}, {"camera": 1}]
    nodes += [{**turned, "extensions": {"KHR_lights_punctual": {"light": i}}} for i in range(4)]
    gltf = Gltf(nodes=nodes, extensions={"KHR_lights_punctual": {"lights": lights}})
    gltf.json["cameras"] = [{"type": "perspective", "perspective": {"yfov": 0.5, "znear": 0.1}}] * 2
    gltf.mesh()
    scene = gltf.load(tmp_path)
    point, spot, sun, plain = scene.lights
    assert isinstance(point, PointLight) and isinstance(spot, SpotLight)
    assert isinstance(sun, DirectionalLight) and isinstance(plain, SpotLight)
    assert point.position == (1.0, 2.0, 3.0) and point.intensity == (10.0, 5.0, 0.0)
    np.testing.assert_allclose(spot.direction, (1, 0, 0), atol=1e-12)
    assert (spot.inner_angle, spot.outer_angle, spot.falloff) == (0.1, 0.4, "smooth")
    np.testing.assert_allclose(sun.direction, (1, 0, 0), atol=1e-12)
    assert sun.irradiance == (3.0, 3.0, 3.0)
    assert (plain.inner_angle, plain.outer_angle) == (0.0, np.pi / 4)
    np.testing.assert_allclose(scene.camera.to_world[:3, 2], (-1, 0, 0), atol=1e-12)
    np.testing.assert_allclose(scene.camera.to_world[:3, 3], (1, 2, 3))
    np.testing.assert_allclose(np.linalg.det(scene.camera.to_world), 1.0)
    assert scene.camera.fov_axis == "y" and scene.camera.fov == pytest.approx(np.degrees(0.5))
    assert scene.environment is None
    assert any("several cameras" in w for w in scene.warnings)


def test_unlit_model_gets_light_and_camera(tmp_path: Path) -> None:
    """Without lights and camera both are supplied and announced; textured emission is no light."""
    gltf = Gltf()
    gltf.picture(np.zeros((1, 1, 3), np.uint8))
    gltf.json["textures"] = [{"source": 0}]
    gltf.json["materials"] = [{"emissiveFactor": [1, 1, 1], "emissiveTexture": {"index": 0}}]
    gltf.mesh({"material": 0}, positions=TRIANGLE + np.float32([50, 0, 0]))
    scene = gltf.load(tmp_path)
    assert scene.environment is not None and scene.environment.image.min() > 0.0
    assert any("default environment" in w for w in scene.warnings) and any("no camera" in w for w in scene.warnings)
    # every vertex is inside the picture
    local = (scene.meshes[0].positions - scene.camera.to_world[:3, 3]) @ scene.camera.to_world[:3, :3]
    half = np.array(scene.camera.half_extents(512, 512))
    assert (local[:, 2] < 0.0).all() and (np.abs(local[:, :2] / -local[:, 2:]) < half).all()


def test_unknown_extensions_are_named(tmp_path: Path) -> None:
    """Used: one warning with all names. Required: an error."""
    gltf = Gltf(extensionsUsed=["KHR_materials_sheen", "KHR_materials_clearcoat", "KHR_materials_ior"])
    gltf.mesh()
    assert [w for w in gltf.load(tmp_path).warnings if "KHR_materials_clearcoat, KHR_materials_sheen" in w]
    gltf.json["extensionsRequired"] = ["KHR_draco_mesh_compression"]
    with pytest.raises(SceneError, match=r"model.gltf: extensionsRequired: .*KHR_draco_mesh_compression"):
        gltf.load(tmp_path)


def broken(change: str) -> Gltf:
    """A file with one fault."""
    gltf = Gltf(materials=[{}])
    indices = gltf.accessor(np.array([0, 1, 7 if change == "vertex" else 2], np.uint16))
    gltf.mesh({"material": 3 if change == "material" else 0, "indices": indices})
    if change == "accessor range":
        gltf.json["accessors"][1]["count"] = 300
    elif change == "accessor index":
        gltf.json["meshes"][0]["primitives"][0]["attributes"]["POSITION"] = 9
    elif change == "accessor type":
        gltf.json["accessors"][1]["type"] = "VEC2"
    elif change == "view range":
        gltf.json["bufferViews"][1]["byteLength"] = 10**6
    elif change == "component":
        gltf.json["accessors"][1]["componentType"] = 5130
    elif change == "json type":
        gltf.json["materials"][0]["pbrMetallicRoughness"] = {"roughnessFactor": "rough"}
    elif change == "vector":
        gltf.json["materials"][0]["emissiveFactor"] = [1, 2]
    elif change == "cycle":
        gltf.json.update(nodes=[{"children": [1]}, {"children": [0]}], scenes=[{"nodes": [0]}])
    elif change == "version":
        gltf.json["asset"] = {"version": "1.0"}
    elif change == "nan":
        gltf.data = gltf.data[:8] + np.float32([np.nan] * 3).tobytes() + gltf.data[20:]
    elif change == "picture":
        gltf.json["images"] = [{"bufferView": 0, "mimeType": "image/png"}]
        gltf.json["textures"] = [{"source": 0}]
        gltf.json["materials"][0]["emissiveTexture"] = {"index": 0}
    return gltf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vertex", r"model.gltf: meshes\[0\].primitives\[0\].indices: index 7 of 3 vertices"),
        ("material", r"model.gltf: meshes\[0\].primitives\[0\].material: materials\[3\] does not exist"),
        ("accessor range", r"model.gltf: accessors\[1\]: ends at byte 3600 of bufferViews\[1\], which has 36"),
        ("accessor index", r"model.gltf: .*attributes.POSITION: accessors\[9\] does not exist"),
        ("accessor type", r"model.gltf: .*POSITION: accessors\[1\] has type VEC2, expected VEC3"),
        ("view range", r"model.gltf: bufferViews\[1\]: ends at byte"),
        ("component", r"model.gltf: accessors\[1\].componentType: expected one of"),
        ("json type", r"model.gltf: materials\[0\].pbrMetallicRoughness.roughnessFactor: expected a number"),
        ("vector", r"model.gltf: materials\[0\].emissiveFactor: expected 3 numbers"),
        ("cycle", r"model.gltf: nodes\[1\].children\[0\]: node 0 has two parents or is its own ancestor"),
        ("version", r"model.gltf: asset.version: glTF 1.0"),
        ("nan", r"model.gltf: .*not finite"),
        ("picture", r"model.gltf: images\[0\]: cannot read image"),
    ],
)
def test_bad_file_names_file_and_field(tmp_path: Path, change: str, message: str) -> None:
    """Each fault is one SceneError with file and field."""
    with pytest.raises(SceneError, match=message):
        broken(change).load(tmp_path)


def test_sound_file_loads_with_no_change(tmp_path: Path) -> None:
    """The base of the faulty files is sound, so that each fault alone is what fails."""
    assert len(broken("none").load(tmp_path).meshes) == 1


def test_truncated_glb_is_an_error(tmp_path: Path) -> None:
    """A GLB cut anywhere raises SceneError naming the file, and nothing else."""
    gltf = Gltf()
    gltf.mesh()
    path = gltf.write(tmp_path, glb=True)
    data = path.read_bytes()
    assert len(load(path).meshes) == 1
    for length in (0, 3, 11, 19, 40, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(SceneError, match=r"model\.glb: "):
            load(path)


def test_missing_buffer_file_is_an_error(tmp_path: Path) -> None:
    """An external buffer that does not exist or is too short is named."""
    gltf = Gltf()
    gltf.mesh()
    path = gltf.write(tmp_path)
    gltf.json["buffers"][0]["uri"] = "the%20data.bin"
    path.write_text(json.dumps(gltf.json))
    with pytest.raises(SceneError, match=r"model.gltf: buffers\[0\].uri: cannot read 'the%20data.bin'"):
        load(path)
    (tmp_path / "the data.bin").write_bytes(gltf.data)
    assert len(load(path).meshes) == 1
    (tmp_path / "the data.bin").write_bytes(gltf.data[:-4])
    with pytest.raises(SceneError, match=r"model.gltf: buffers\[0\]: has \d+ bytes, byteLength says"):
        load(path)


# --- animation -------------------------------------------------------------------------------------------------------


def animated(gltf: Gltf, *channels: tuple[int, str, np.ndarray, np.ndarray], interpolation: str = "LINEAR") -> Gltf:
    """Add an animation of channels (node, path, times, values)."""
    samplers, entries = [], []
    for node, path, times, values in channels:
        samplers.append(
            {
                "input": gltf.accessor(np.asarray(times, np.float32)),
                "output": gltf.accessor(np.asarray(values)),
                "interpolation": interpolation,
            }
        )
        entries.append({"sampler": len(samplers) - 1, "target": {"node": node, "path": path}})
    gltf.json.setdefault("animations", []).append({"samplers": samplers, "channels": entries})
    return gltf


HALF = np.sqrt(0.5)
ZERO_ONE = np.float32([0, 1])
ALONG_X = np.float32([(0, 0, 0), (2, 0, 0)])


def test_animated_nodes_move_instances(tmp_path: Path) -> None:
    """A mesh below an animated node is an instance in its own space; one elsewhere stays in world space."""
    gltf = Gltf(
        nodes=[
            {"children": [1], "rotation": [0, 0, HALF, HALF]},
            {"mesh": 0, "scale": [2, 2, 2]},
            {"mesh": 1, "translation": [0, 0, 5]},
        ]
    )
    gltf.mesh()
    gltf.mesh()
    animated(gltf, (0, "translation", ZERO_ONE, ALONG_X), (1, "scale", [0, 3], np.float32([(2, 2, 2), (5, 5, 5)])))
    scene = gltf.load(tmp_path)
    assert scene.animation is not None and scene.animation.duration == 3.0
    moving, still = scene.meshes
    np.testing.assert_array_equal(moving.positions, TRIANGLE)
    np.testing.assert_array_equal(still.positions, TRIANGLE + np.float32([0, 0, 5]))
    assert [instance.mesh for instance in scene.instances] == [0]
    for time, factor, x in ((0.0, 2.0, 0.0), (1.0, 3.0, 2.0), (9.0, 5.0, 2.0)):
        # vertex 1 at (factor, 0, 0), turned about z to (0, factor, 0), moved by x
        flat = flatten(scene.at(time))
        np.testing.assert_allclose(flat.meshes[1].positions[1], (x, factor, 0), atol=FLOAT32)
        np.testing.assert_array_equal(flat.meshes[0].positions, still.positions)


def test_moving_nodes_may_nest_deep(tmp_path: Path) -> None:
    """A chain of nodes longer than Python's recursion limit, each one unit beyond its parent."""
    n = 1200
    nodes: list[dict] = [{"children": [i + 1], "translation": [0, 1, 0]} for i in range(n - 1)]
    gltf = Gltf(nodes=[*nodes, {"mesh": 0}])
    gltf.mesh()
    animated(gltf, (0, "translation", ZERO_ONE, ALONG_X))
    scene = gltf.load(tmp_path)
    np.testing.assert_allclose(scene.at(1.0).instances[0].to_world[:3, 3], (2.0, n - 2, 0.0))


@pytest.mark.parametrize(
    ("interpolation", "values", "expected"),  # at 0.25 of the way from 0 to 4
    [("LINEAR", [0, 4], 1.0), ("STEP", [0, 4], 0.0), ("CUBICSPLINE", [9, 0, 8, -4, 4, 9], 3.25)],
)
def test_interpolations_are_read(tmp_path: Path, interpolation: str, values: list[float], expected: float) -> None:
    """Cubic values are slope before, value, slope after: 2 · 9/64 · 8 + 10/64 · 4 + 2 · 3/64 · 4 over 2 s."""
    gltf = Gltf(nodes=[{"mesh": 0}])
    gltf.mesh()
    rows = np.zeros((len(values), 3), np.float32)
    rows[:, 1] = values
    animated(gltf, (0, "translation", np.float32([1, 3]), rows), interpolation=interpolation)
    scene = gltf.load(tmp_path)
    assert scene.at(1.5).instances[0].to_world[1, 3] == pytest.approx(expected)


def test_normalised_integer_rotations_turn(tmp_path: Path) -> None:
    """Quaternions of signed shorts, along the shorter arc."""
    gltf = Gltf(nodes=[{"mesh": 0}])
    gltf.mesh()
    quaternions = np.array([(0, 0, 0, 32767), (0, 0, -23170, -23170)], np.int16)
    animated(gltf, (0, "rotation", ZERO_ONE, quaternions))
    gltf.json["accessors"][-1]["normalized"] = True
    angle = np.radians(45)
    matrix = gltf.load(tmp_path).at(0.5).instances[0].to_world
    np.testing.assert_allclose(matrix[:2, 0], (np.cos(angle), np.sin(angle)), atol=1e-4)


def test_moving_skin_bends_at_each_time(tmp_path: Path) -> None:
    """Joint matrices at the time times inverse bind matrices; the instance stands still, the triangles are shared."""
    gltf = Gltf()
    joints = np.zeros((3, 4), np.uint8)
    joints[:, 1] = 1
    weights = np.float32([(1, 0, 0, 0), (0, 1, 0, 0), (0.5, 0.5, 0, 0)])
    gltf.mesh(JOINTS_0=joints, WEIGHTS_0=weights, NORMAL=np.tile(np.float32([0, 0, 1]), (3, 1)))
    gltf.json["skins"] = [{"joints": [1, 2]}]
    gltf.json["nodes"] = [{"mesh": 0, "skin": 0, "translation": [100, 0, 0]}, {"children": [2]}, {}]
    animated(gltf, (2, "translation", ZERO_ONE, ALONG_X), (1, "translation", ZERO_ONE, -ALONG_X[:, ::-1]))
    scene = gltf.load(tmp_path)
    np.testing.assert_array_equal(scene.instances[0].to_world, np.eye(4))
    posed = scene.at(0.5).meshes[0]
    # joint 1 at (0, 0, -1), joint 2 at (1, 0, -1)
    np.testing.assert_allclose(posed.positions, [(0, 0, -1), (2, 0, -1), (0.5, 1, -1)], atol=FLOAT32)
    assert posed.indices is scene.meshes[0].indices and posed.normals is not None
    np.testing.assert_allclose(posed.normals, np.tile((0, 0, 1), (3, 1)), atol=FLOAT32)
    np.testing.assert_array_equal(scene.meshes[0].positions, TRIANGLE)


def test_morph_weights_are_animated(tmp_path: Path) -> None:
    """Two targets with weights over time, on a node that moves too; normals follow; other nodes keep the mesh's own."""
    gltf = Gltf()
    up = np.float32([(0, 0, 0), (0, 0, 1), (0, 0, 0)])
    tilt = np.tile(np.float32([1, 0, 0]), (3, 1))
    targets = [{"POSITION": gltf.accessor(up), "NORMAL": gltf.accessor(tilt)}, {"POSITION": gltf.accessor(-2 * up)}]
    gltf.mesh({"targets": targets}, NORMAL=np.tile(np.float32([0, 0, 1]), (3, 1)))
    gltf.json["meshes"][0]["weights"] = [0.0, 1.0]
    gltf.json["nodes"] = [{"mesh": 0, "translation": [1, 0, 0]}, {"mesh": 0}]
    animated(gltf, (0, "weights", ZERO_ONE, np.float32([0, 0, 1, 0.25])))
    scene = gltf.load(tmp_path)
    posed = flatten(scene.at(1.0))
    still, moving = posed.meshes
    np.testing.assert_allclose(still.positions[1], (1, 0, -2))
    np.testing.assert_allclose(moving.positions[1], (2, 0, 0.5))
    assert moving.normals is not None
    np.testing.assert_allclose(moving.normals[0], (HALF, 0, HALF), atol=FLOAT32)


def test_cubic_morph_weights_have_three_rows_a_key(tmp_path: Path) -> None:
    """Slopes before, values, slopes after of all targets."""
    gltf = Gltf(nodes=[{"mesh": 0}])
    change = gltf.accessor(np.float32([(0, 0, 1)] * 3))
    gltf.mesh({"targets": [{"POSITION": change}, {"POSITION": change}]})
    keys = np.float32([(0, 0), (1, 10), (0, 0), (0, 0), (2, 20), (0, 0)])
    animated(gltf, (0, "weights", ZERO_ONE, keys.ravel()), interpolation="CUBICSPLINE")
    assert gltf.load(tmp_path).at(0.5).meshes[0].positions[0, 2] == pytest.approx(16.5)


def test_moving_camera_lights_and_instancing(tmp_path: Path) -> None:
    """All hang on a node that moves; instances of EXT_mesh_gpu_instancing share one mesh."""
    gltf = Gltf(
        extensionsUsed=["EXT_mesh_gpu_instancing"],
        extensions={"KHR_lights_punctual": {"lights": [{"type": "spot", "spot": {}}]}},
        cameras=[{"type": "perspective", "perspective": {"yfov": 1.0}}],
    )
    gltf.mesh()
    offsets = gltf.accessor(np.float32([(0, 0, 0), (0, 7, 0)]))
    gltf.json["nodes"] = [
        {"children": [1, 2]},
        {"camera": 0, "extensions": {"KHR_lights_punctual": {"light": 0}}, "translation": [0, 0, 1]},
        {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": offsets}}}},
    ]
    animated(
        gltf,
        (0, "translation", ZERO_ONE, ALONG_X),
        (0, "rotation", ZERO_ONE, np.float32([(0, 0, 0, 1), (0, HALF, 0, HALF)])),
    )
    scene = gltf.load(tmp_path)
    posed = scene.at(1.0)
    np.testing.assert_allclose(posed.camera.to_world[:3, 3], (3, 0, 0), atol=FLOAT32)
    np.testing.assert_allclose(posed.camera.to_world[:3, 2], (1, 0, 0), atol=FLOAT32)
    spot = posed.lights[0]
    assert isinstance(spot, SpotLight)
    np.testing.assert_allclose((spot.position, spot.direction), ((3, 0, 0), (-1, 0, 0)), atol=FLOAT32)
    assert len(posed.meshes) == 1 and posed.meshes is scene.meshes
    corners = [mesh.positions[0] for mesh in flatten(posed).meshes]
    np.testing.assert_allclose(corners, [(2, 0, 0), (2, 7, 0)], atol=FLOAT32)


def test_disjoint_animations_play_together(tmp_path: Path) -> None:
    """The first plays, and those that move other things; one that moves the same is named."""
    gltf = Gltf(nodes=[{"mesh": 0}, {"mesh": 0}])
    gltf.mesh()
    for node, far in ((0, 1.0), (1, 2.0), (0, 3.0)):
        animated(gltf, (node, "translation", ZERO_ONE, far * ALONG_X))
    gltf.json["animations"][2]["name"] = "run"
    scene = gltf.load(tmp_path)
    assert [instance.to_world[0, 3] for instance in scene.at(1.0).instances] == [2.0, 4.0]
    assert [w for w in scene.warnings if "run" in w] and not [w for w in scene.warnings if "animations[1]" in w]


def test_animation_of_another_scene_is_named(tmp_path: Path) -> None:
    """Nodes outside the scene that is shown move nothing; pointers and channels without node neither."""
    gltf = Gltf(nodes=[{"mesh": 0}, {"mesh": 0}], scenes=[{"nodes": [0]}, {"nodes": [1]}], scene=0)
    gltf.json["extensionsUsed"] = ["KHR_animation_pointer"]
    gltf.mesh()
    animated(gltf, (1, "translation", ZERO_ONE, ALONG_X))
    channels = gltf.json["animations"][0]["channels"]
    channels += [{"sampler": 0, "target": {"path": "pointer"}}, {"sampler": 0, "target": {"path": "scale"}}]
    scene = gltf.load(tmp_path)
    assert scene.animation is None and not scene.instances
    assert [w for w in scene.warnings if "outside the scene" in w]
    assert len([w for w in scene.warnings if "pointer" in w]) == 1


def broken_animation(change: str) -> Gltf:
    """An animated file with one fault."""
    gltf = Gltf(nodes=[{"mesh": 0}])
    gltf.mesh()
    times, values, path = ZERO_ONE, ALONG_X, "translation"
    if change == "times":
        times = np.float32([1, 1])
    elif change == "negative time":
        times = np.float32([-1, 1])
    elif change == "count":
        values = ALONG_X[[0, 1, 1]]
    elif change == "nan":
        values = ALONG_X * np.float32(np.nan)
    elif change == "path":
        path = "colour"
    elif change == "type":
        values = np.float32([(0, 0, 0, 1)] * 2)
    elif change == "weights":
        path, values = "weights", ZERO_ONE
    elif change == "quaternion":
        path, values = "rotation", np.zeros((2, 4), np.float32)
    elif change == "matrix":
        gltf.json["nodes"][0]["matrix"] = [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    node = 7 if change == "node" else 0
    animated(gltf, (node, path, times, values))
    animation = gltf.json["animations"][0]
    if change == "sampler":
        animation["channels"][0]["sampler"] = 3
    elif change == "interpolation":
        animation["samplers"][0]["interpolation"] = "BEZIER"
    elif change == "twice":
        animation["channels"] *= 2
    return gltf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("times", r"animations\[0\].samplers\[0\].input: accessors\[1\]: times must begin at 0 or later and increase"),
        ("negative time", r"samplers\[0\].input: accessors\[1\]: times must"),
        ("count", r"samplers\[0\].output: accessors\[2\] has 3 elements, 2 keys need 2"),
        ("nan", r"samplers\[0\].output: accessors\[2\]: has values that are not finite"),
        ("path", r"channels\[0\].target.path: expected one of translation, rotation, scale, weights"),
        ("type", r"samplers\[0\].output: accessors\[2\] has type VEC4, expected VEC3"),
        ("weights", r"channels\[0\].target: nodes\[0\] has no mesh with morph targets"),
        ("quaternion", r"samplers\[0\].output: accessors\[2\]: a quaternion has no length"),
        ("matrix", r"nodes\[0\].matrix: an animated node's matrix has shear"),
        ("node", r"channels\[0\].target.node: nodes\[7\] does not exist"),
        ("sampler", r"channels\[0\].sampler: animations\[0\].samplers\[3\] does not exist"),
        ("interpolation", r"samplers\[0\].interpolation: expected one of LINEAR, STEP, CUBICSPLINE"),
        ("twice", r"channels\[1\].target: nodes\[0\].translation is moved twice"),
    ],
)
def test_bad_animation_names_file_and_field(tmp_path: Path, change: str, message: str) -> None:
    """Each fault is one SceneError with file and field."""
    with pytest.raises(SceneError, match=r"model\.gltf: .*" + message):
        broken_animation(change).load(tmp_path)


def test_sound_animation_loads_with_no_change(tmp_path: Path) -> None:
    """The base of the faulty animations is sound."""
    assert broken_animation("none").load(tmp_path).animation is not None


def test_framing_camera_sees_the_whole_motion(tmp_path: Path) -> None:
    """Without a camera every pose lies within the picture."""
    gltf = Gltf(nodes=[{"mesh": 0}])
    gltf.mesh()
    scene = animated(gltf, (0, "translation", ZERO_ONE, 10 * ALONG_X)).load(tmp_path)
    half = np.array(scene.camera.half_extents(512, 512))
    for time in (0.0, 0.5, 1.0):
        points = flatten(scene.at(time)).meshes[0].positions
        local = (points - scene.camera.to_world[:3, 3]) @ scene.camera.to_world[:3, :3]
        assert (local[:, 2] < 0.0).all() and (np.abs(local[:, :2] / -local[:, 2:]) < half).all()


# --- sample models ----------------------------------------------------------------------------------------------------


# Triangles, materials, lights and phrases of warnings of the Khronos sample models; trimesh does not know instancing
SAMPLES: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "AlphaBlendModeTest.glb": (61, 6, 0, ()),
    "BoxTextured.glb": (12, 1, 0, ()),
    "ClearCoatTest.glb": (37116, 19, 0, ("KHR_materials_clearcoat",)),
    "DamagedHelmet.glb": (15452, 1, 0, ("textured emission",)),
    "EmissiveStrengthTest.glb": (90, 6, 0, ()),
    "LightsPunctualLamp.gltf": (6000, 3, 5, ()),
    "MetalRoughSpheresNoTextures.glb": (1040409, 99, 0, ()),  # with the default material
    "NegativeScaleTest.glb": (7724, 6, 0, ()),
    "NormalTangentTest.glb": (7774, 1, 0, ()),
    "SheenChair.gltf": (39936, 6, 0, ("KHR_materials_sheen",)),
    "SimpleInstancing.glb": (1500, 1, 0, ()),
    "TextureCoordinateTest.glb": (10, 5, 0, ()),
    "TextureTransformTest.gltf": (24, 9, 0, ()),
    "TransmissionRoughnessTest.glb": (77792, 9, 0, ("KHR_materials_volume",)),
    "TransmissionTest.glb": (128775, 14, 0, ("KHR_xmp",)),
    "VertexColorTest.glb": (36, 2, 0, ()),
}


@pytest.mark.realdata
@pytest.mark.parametrize("name", list(SAMPLES))
def test_sample_model_loads(data: Path, name: str) -> None:
    """Khronos samples load as trimesh loads them (triangles, bounds), and normals agree with the winding."""
    shared = load(data / "gltf" / Path(name).stem / name)
    scene = flatten(shared)
    assert (shared.bounds[0] <= scene.bounds[0] + 1e-5).all() and (shared.bounds[1] >= scene.bounds[1] - 1e-5).all()
    triangles, materials, lights, phrases = SAMPLES[name]
    assert sum(len(mesh.indices) for mesh in scene.meshes) == triangles
    assert (len(scene.materials), len(scene.lights)) == (materials, lights)
    for phrase in phrases:
        assert any(phrase in warning for warning in scene.warnings)
    if name != "SimpleInstancing.glb":
        other = trimesh.load_scene(data / "gltf" / Path(name).stem / name, process=False)
        assert other.triangles.shape[0] == triangles
        np.testing.assert_allclose(scene.bounds, other.bounds, rtol=1e-5, atol=1e-6)
    for mesh in scene.meshes:
        if mesh.normals is None:
            continue
        a, b, c = (mesh.positions[mesh.indices[:, i]].astype(float) for i in range(3))
        n = np.cross(b - a, c - a)
        kept = np.linalg.norm(n, axis=1) > 1e-14
        agree = np.einsum("ij,ij->i", n, mesh.normals[mesh.indices].mean(axis=1))[kept] > 0.0
        assert agree.mean() > 0.95, mesh.name
