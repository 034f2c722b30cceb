"""glTF 2.0 materials and textures, with the KHR_materials extensions listed in `EXTENSIONS`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from nrc.assets.fields import Field
from nrc.assets.gltf_buffers import GltfFile
from nrc.assets.model import Model
from nrc.assets.pictures import read_texels
from nrc.scene import Material, Texture, Wrap

EXTENSIONS = (
    "KHR_materials_emissive_strength",
    "KHR_materials_ior",
    "KHR_materials_specular",
    "KHR_materials_transmission",
    "KHR_materials_unlit",
    "KHR_texture_transform",
)
WRAPS: dict[int, Wrap] = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
NEAREST = 9728


class GltfMaterials:
    """Materials of a file; decodes each image once."""

    def __init__(self, file: GltfFile, model: Model) -> None:
        self._file, self._model = file, model
        self._images: dict[int, np.ndarray] = {}

    def read(self, field: Field) -> Material:
        """One element of `materials`."""
        pbr = field.get("pbrMetallicRoughness") or Field({}, field.file, field.path)
        base = [element.number(0.0) for element in pbr.list("baseColorFactor")] or [1.0] * 4
        if len(base) != 4:
            raise pbr.need("baseColorFactor").wrong("4 numbers")
        metallic = _number(pbr, "metallicFactor", 1.0, 1.0)
        roughness = _number(pbr, "roughnessFactor", 1.0, 1.0)
        double_sided = field.get("doubleSided")
        alpha_mode = field.get("alphaMode")
        normal, emissive = field.get("normalTexture"), field.get("emissiveFactor")
        base_texture = self._texture(pbr.get("baseColorTexture"), srgb=True)
        emission = emissive.vec3(0.0) if emissive else (0.0, 0.0, 0.0)
        mode = alpha_mode.string(("OPAQUE", "MASK", "BLEND")).lower() if alpha_mode else "opaque"
        name_field = field.get("name")
        material = Material(
            name=name_field.string() if name_field else field.path,
            kind="metallic_roughness",
            base_color=(base[0], base[1], base[2]),
            base_color_texture=base_texture,
            metallic=metallic,
            roughness=(roughness, roughness),
            metallic_roughness_texture=self._texture(pbr.get("metallicRoughnessTexture"), srgb=False),
            normal_texture=self._texture(normal, srgb=False),
            normal_scale=_number(normal, "scale", 1.0) if normal else 1.0,
            emission=emission,
            emission_texture=self._texture(field.get("emissiveTexture"), srgb=True),
            emission_two_sided=double_sided.boolean() if double_sided else False,
            opacity=base[3],
            opacity_from_base_color=base_texture is not None,
            alpha_mode=mode,  # type: ignore[arg-type]
            alpha_cutoff=_number(field, "alphaCutoff", 0.5),
            two_sided=True,
        )
        return replace(material, **self._extensions(field, material))

    def _extensions(self, field: Field, material: Material) -> dict[str, Any]:
        """Changes that the material's extensions make."""
        changes: dict[str, Any] = {}
        extensions = field.get("extensions")
        for name, extension in extensions.members().items() if extensions else ():
            if name == "KHR_materials_emissive_strength":
                strength = _number(extension, "emissiveStrength", 1.0)
                changes["emission"] = tuple(strength * value for value in material.emission)
            elif name == "KHR_materials_ior":
                ior = _number(extension, "ior", 1.5)
                if 0.0 < ior < 1.0:
                    raise extension.need("ior").wrong("0 or a number of at least 1")
                changes["ior"] = ior if ior > 0.0 else 1e4  # 0 asks for total reflection at every angle
            elif name == "KHR_materials_transmission":
                changes["transmission"] = _number(extension, "transmissionFactor", 0.0, 1.0)
                changes["transmission_texture"] = self._texture(extension.get("transmissionTexture"), srgb=False)
            elif name == "KHR_materials_specular":
                color = extension.get("specularColorFactor")
                changes["specular_factor"] = _number(extension, "specularFactor", 1.0, 1.0)
                changes["specular_factor_texture"] = self._texture(extension.get("specularTexture"), srgb=False)
                changes["specular"] = color.vec3(0.0) if color else (1.0, 1.0, 1.0)
                changes["specular_texture"] = self._texture(extension.get("specularColorTexture"), srgb=True)
            elif name == "KHR_materials_unlit":
                self._model.warn(f"material {material.name!r}: KHR_materials_unlit becomes emission of its base colour")
                return {
                    "kind": "diffuse",
                    "base_color": (0.0, 0.0, 0.0),
                    "emission": material.base_color,
                    "emission_texture": material.base_color_texture,
                }
        return changes

    def _texture(self, info: Field | None, *, srgb: bool) -> Texture | None:
        """Texture of a textureInfo object."""
        if info is None:
            return None
        texture = self._file.element("textures", info.need("index"))
        transform, uv_set = _texture_transform(info)
        if uv_set > 1:
            self._model.warn(
                f"{info.path}: texture coordinate set {uv_set} is not supported (0 or 1): no texture there"
            )
            return None
        source = texture.get("source")
        if source is None:
            others = texture.get("extensions")
            names = ", ".join(others.members()) if others else "no source"
            self._model.warn(f"{texture.path}: no image in a format this reader knows ({names}): no texture there")
            return None
        wrap_u, wrap_v, nearest = self._sampler(texture.get("sampler"))
        image = self._file.element("images", source)
        name_field = image.get("name") or image.get("uri")
        name = name_field.string() if name_field else ""
        return Texture(
            image=self._image(source, image),
            srgb=srgb,
            transform=transform,
            uv_set=uv_set,
            wrap_u=wrap_u,
            wrap_v=wrap_v,
            filter="nearest" if nearest else "bilinear",
            name=image.path if not name or name.startswith("data:") else name,
        )

    def _sampler(self, index: Field | None) -> tuple[Wrap, Wrap, bool]:
        if index is None:
            return "repeat", "repeat", False
        sampler = self._file.element("samplers", index)
        wraps: list[Wrap] = []
        for key in ("wrapS", "wrapT"):
            code = sampler.get(key)
            if code is not None and code.integer() not in WRAPS:
                raise code.wrong(f"one of {', '.join(map(str, WRAPS))}")
            wraps.append(WRAPS[code.value] if code else "repeat")
        magnify = sampler.get("magFilter")
        return wraps[0], wraps[1], magnify is not None and magnify.integer() == NEAREST

    def _image(self, index: Field, image: Field) -> np.ndarray:
        number = index.integer()
        if number not in self._images:
            if (uri := image.get("uri")) is not None:
                data = self._file.resource(uri)
            else:
                data = bytes(self._file.view(image.need("bufferView"))[0])
            self._images[number] = read_texels(data, f"{image.file}: {image.path}")
        return self._images[number]


def _number(field: Field, key: str, default: float, high: float = math.inf) -> float:
    member = field.get(key)
    return member.number(-math.inf if key == "scale" else 0.0, high) if member is not None else default


def _texture_transform(info: Field) -> tuple[np.ndarray, int]:
    """Matrix (2, 3) and texture coordinate set of a textureInfo with KHR_texture_transform: T · R · S."""
    coordinate = info.get("texCoord")
    extensions = info.get("extensions")
    extension = extensions.get("KHR_texture_transform") if extensions else None
    if extension is None:
        return np.eye(2, 3), coordinate.integer() if coordinate else 0
    coordinate = extension.get("texCoord") or coordinate
    offset, rotation, scale = (extension.get(key) for key in ("offset", "rotation", "scale"))
    angle = rotation.number() if rotation else 0.0
    c, s = math.cos(angle), math.sin(angle)
    su, sv = scale.vector(2) if scale else (1.0, 1.0)
    tu, tv = offset.vector(2) if offset else (0.0, 0.0)
    matrix = np.array([[c * su, s * sv, tu], [-s * su, c * sv, tv]])
    return matrix, coordinate.integer() if coordinate else 0
