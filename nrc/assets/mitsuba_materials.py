"""BSDFs and textures of a Mitsuba scene as the fields of a `Material`."""

from __future__ import annotations

from typing import Any

import numpy as np

from nrc.assets.mitsuba_document import Document, Node, plain
from nrc.scene import AnyTexture, Checkerboard, SceneError, Texture, Vec3

BAKED_SIZE = 128  # texels along each side of a texture that is sampled because there is no equivalent
LUMINANCE = np.array([0.212671, 0.715160, 0.072169], np.float32)  # Rec. 709, as Mitsuba weighs it
IGNORED = ("sample_visible", "diffuse_reflectance_sampling_rate", "main_specular_sampling_rate")
WHITE = (1.0, 1.0, 1.0)
VERTEX_COLORS = "vertex_colors"  # not a field of Material: name and scale of the mesh attribute that is its base colour


class Materials:
    """Converts BSDF nodes; keeps textures that are used more than once."""

    def __init__(self, document: Document) -> None:
        self.document, self.mi = document, document.mi
        self._textures: dict[tuple[int, str], AnyTexture] = {}
        self._images: dict[tuple[str, bool, str], tuple[np.ndarray, bool]] = {}
        self._converters = {
            "diffuse": self._diffuse,
            "conductor": self._conductor,
            "roughconductor": self._conductor,
            "dielectric": self._dielectric,
            "roughdielectric": self._dielectric,
            "thindielectric": self._dielectric,
            "plastic": self._plastic,
            "roughplastic": self._plastic,
            "pplastic": self._plastic,
            "phong": self._phong,
            "principled": self._principled,
            "principledthin": self._principled,
            "twosided": self._twosided,
            "mask": self._mask,
            "bumpmap": self._bumpmap,
            "normalmap": self._normalmap,
            "blendbsdf": self._blend,
            "null": self._null,
        }

    def convert(self, node: Node) -> dict[str, Any]:
        """Fields of the `Material` for a BSDF node, and VERTEX_COLORS if the mesh has to supply its colour."""
        node.ignore(*IGNORED)
        converter = self._converters.get(node.plugin)
        if converter is not None:
            fields = {"name": "", **converter(node)}
            return fields | {"name": node.id or fields["name"]}
        node.warn("substituted by diffuse grey 0.5")
        return {"name": node.id, "kind": "diffuse"}

    # Plugins

    def _diffuse(self, node: Node) -> dict[str, Any]:
        return {"kind": "diffuse", **self._colour(node, "reflectance", "base_color", 0.5)}

    def _conductor(self, node: Node) -> dict[str, Any]:
        if node.has("eta") or node.has("k"):
            node.ignore("material")
            eta, k = (
                self._uniform(node, name, default, "unbounded_texture") for name, default in (("eta", 0), ("k", 1))
            )
        else:
            node.get("material")
            params = self.mi.traverse(self.document.instantiate(node, frozenset()))
            eta, k = (_three(params[f"{name}.value"]) for name in ("eta", "k"))
        fields = {"kind": "conductor", "eta": eta, "k": k}
        fields |= self._colour(node, "specular_reflectance", "specular", 1.0)
        return fields | (self._microfacets(node) if node.plugin.startswith("rough") else {})

    def _dielectric(self, node: Node) -> dict[str, Any]:
        fields = {
            "kind": "thin_dielectric" if node.plugin == "thindielectric" else "dielectric",
            "ior": self._ior(node),
        }
        fields |= self._colour(node, "specular_reflectance", "specular", 1.0)
        fields |= self._colour(node, "specular_transmittance", "transmittance", 1.0)
        return fields | (self._microfacets(node) if node.plugin.startswith("rough") else {})

    def _plastic(self, node: Node) -> dict[str, Any]:
        fields = {"kind": "plastic", "ior": self._ior(node), "nonlinear": bool(node.get("nonlinear", False))}
        fields |= self._colour(node, "diffuse_reflectance", "base_color", 0.5)
        fields |= self._colour(node, "specular_reflectance", "specular", 1.0)
        if node.plugin == "pplastic":
            node.warn("substituted by roughplastic (polarisation is not simulated)")
        return fields | ({} if node.plugin == "plastic" else self._microfacets(node))

    def _phong(self, node: Node) -> dict[str, Any]:
        """Mitsuba 0.x's Phong lobe, absent from Mitsuba 3, as plastic of a comparable highlight."""
        for old, new in (
            ("diffuseReflectance", "diffuse_reflectance"),
            ("specularReflectance", "specular_reflectance"),
        ):
            if node.has(old) and not node.has(new):
                raise node.error(f"{old}: expected {new} (scene version 2 or later)")
        exponent = node.number("exponent", 30.0)
        specular = self._uniform(node, "specular_reflectance", 0.2)
        node.warn("substituted by plastic (Mitsuba 3 has no Phong lobe)")
        return {
            "kind": "plastic",
            "specular": tuple(min(c / 0.04, 1.0) for c in specular),  # ior 1.5 reflects 0.04 head-on
            "roughness": (float((2.0 / (exponent + 2.0)) ** 0.25),)
            * 2,  # alpha² = 2 / (exponent + 2), Walter et al. 2007
            "distribution": "beckmann",
            **self._colour(node, "diffuse_reflectance", "base_color", 0.5),
        }

    def _principled(self, node: Node) -> dict[str, Any]:
        fields: dict[str, Any] = {"kind": "principled"} | self._colour(node, "base_color", "base_color", 0.5)
        names = ("anisotropic", "spec_tint", "sheen", "sheen_tint", "flatness", "clearcoat", "clearcoat_gloss")
        for name in names:
            fields[name] = float(np.mean(self._uniform(node, name, 0.0)))
        if node.has("eta"):
            fields["ior"] = float(np.mean(self._uniform(node, "eta", 1.5)))
        else:
            fields["ior"] = 2.0 / (1.0 - np.sqrt(0.08 * node.number("specular", 0.5))) - 1.0
        fields |= self._factor(node, "roughness", 0.5)
        fields["roughness"] = (fields["roughness"],) * 2
        fields |= self._factor(node, "spec_trans", 0.0, "transmission")
        metallic = node.colour("metallic", 0.0)
        if isinstance(metallic, Node):
            texture = self.texture(metallic, "metallic")
            fields |= {"metallic": 1.0} | ({"metallic_roughness_texture": texture} if texture else {})
        else:
            fields["metallic"] = metallic[0]
        node.ignore("clearcoat_sampling_rate", "spec_sampling_rate", "spec_reflect_sampling_rate")
        node.ignore("spec_trans_sampling_rate", "diffuse_trans_sampling_rate")
        if node.plugin == "principledthin":
            node.warn("approximated by an opaque two-sided principled material (diff_trans and spec_trans are lost)")
            node.ignore("diff_trans")
            fields = {key: value for key, value in fields.items() if not key.startswith("transmission")}
            fields["two_sided"] = True
        return fields

    def _twosided(self, node: Node) -> dict[str, Any]:
        nested = self._nested(node)
        if len(nested) > 1 and nested[1].index != nested[0].index:
            node.warn(f"its back {nested[1]} is substituted by its front {nested[0]}")
        return self.convert(nested[0]) | {"two_sided": True}

    def _mask(self, node: Node) -> dict[str, Any]:
        fields = self.convert(self._nested(node)[0])
        opacity = self._factor(node, "opacity", 0.5)
        if fields.get("alpha_mode") == "blend":
            if "opacity_texture" in opacity and "opacity_texture" in fields:
                node.warn("a mask within a mask: the inner texture is left out")
            opacity["opacity"] *= fields["opacity"]
        return fields | opacity | {"alpha_mode": "blend"}

    def _bumpmap(self, node: Node) -> dict[str, Any]:
        fields = self.convert(self._nested(node)[0])
        texture = self._only_texture(node)
        scale = node.number("scale", 1.0)
        if texture is None or texture.constant() is not None:
            return fields
        self._warn_of_map_corrections(node)
        return fields | {"bump_texture": self.texture(texture, "scalar"), "bump_scale": scale}

    def _normalmap(self, node: Node) -> dict[str, Any]:
        fields = self.convert(self._nested(node)[0])
        texture = self._only_texture(node)
        node.ignore("use_shading_frame")
        if texture is None or texture.constant() is not None:
            node.warn("a normal map without a bitmap is left out")
            return fields
        self._warn_of_map_corrections(node)
        return fields | {"normal_texture": self.texture(texture, "colour")}

    @staticmethod
    def _warn_of_map_corrections(node: Node) -> None:
        left_out = [name for name in ("flip_invalid_normals", "use_shadowing_function") if node.get(name, True)]
        if left_out:
            node.warn(f"used without {' and '.join(left_out)}")

    def _blend(self, node: Node) -> dict[str, Any]:
        nested = self._nested(node)
        weight = node.colour("weight", 0.5)
        mean = 0.5 if isinstance(weight, Node) else float(np.mean(weight))
        if isinstance(weight, Node):
            self.texture(weight, "scalar")
        chosen = nested[1] if mean > 0.5 and len(nested) > 1 else nested[0]
        for other in nested:
            if other is not chosen:
                self.convert(other)
        node.warn(f"substituted by its {chosen}, the one with the larger weight")
        return self.convert(chosen)

    def _null(self, node: Node) -> dict[str, Any]:
        return {"kind": "diffuse", "base_color": (0.0, 0.0, 0.0), "opacity": 0.0, "alpha_mode": "blend"}

    # Properties

    def _nested(self, node: Node) -> list[Node]:
        nested = [child for _, child in node.children("BSDF")]
        if not nested:
            raise node.error("expected a nested BSDF")
        return nested

    def _only_texture(self, node: Node) -> Node | None:
        textures = [child for _, child in node.children("Texture")]
        return textures[0] if textures else None

    def _ior(self, node: Node) -> float:
        node.ignore("int_ior", "ext_ior", "eta")
        made = self.mi.traverse(self.document.instantiate(node, frozenset()))
        return float(np.mean(_three(made["eta"])))

    def _uniform(self, node: Node, name: str, default: float, role: str = "texture") -> Vec3:
        """A colour where a `Material` has no texture; a texture is replaced by its mean."""
        value = node.colour(name, default, role)
        if not isinstance(value, Node):
            return value
        node.warn(f"the texture of {name} is substituted by its mean")
        value.seen.update(value.names)
        return _three(np.mean(self._sample(self.document.instantiate(value), 16), axis=(0, 1)))

    def _colour(self, node: Node, name: str, field: str, default: float) -> dict[str, Any]:
        value = node.colour(name, default)
        if not isinstance(value, Node):
            return {field: value}
        if value.plugin == "mesh_attribute" and field == "base_color":
            return {field: WHITE, VERTEX_COLORS: (str(value.get("name")), value.number("scale", 1.0))}
        texture = self.texture(value, "colour")
        return {field: WHITE, f"{field}_texture": texture} if texture else {field: (default,) * 3}

    def _factor(self, node: Node, name: str, default: float, field: str | None = None) -> dict[str, Any]:
        """A number or a texture's luminance, for the `Material` field of the same name or `field`."""
        field = field or name
        value = node.colour(name, default)
        if not isinstance(value, Node):
            return {field: _luminance(value)}
        texture = self.texture(value, "scalar")
        return {field: 1.0, f"{field}_texture": texture} if texture else {field: default}

    def _microfacets(self, node: Node) -> dict[str, Any]:
        """Roughness = sqrt(alpha) per axis; a texture holds the square roots of its texels."""
        distribution = str(node.get("distribution", "beckmann"))
        if distribution not in ("ggx", "beckmann"):
            node.warn(f"distribution {distribution!r} substituted by beckmann")
            distribution = "beckmann"
        axes = ("alpha_u", "alpha_v") if node.has("alpha_u") or node.has("alpha_v") else ("alpha", "alpha")
        values = [node.colour(name, 0.1) for name in axes]
        fields: dict[str, Any] = {"distribution": distribution}
        textured = [value for value in values if isinstance(value, Node)]
        if not textured:
            alphas = [value[0] for value in values if not isinstance(value, Node)]
            return fields | {"roughness": tuple(float(np.sqrt(max(alpha, 0.0))) for alpha in alphas)}
        if len({value.index if isinstance(value, Node) else -1 for value in values}) > 1:
            node.warn("alpha_u and alpha_v differ and are textured: one texture serves both")
        return fields | {"roughness": (1.0, 1.0), "roughness_texture": self.texture(textured[0], "roughness")}

    # Textures

    def texture(self, node: Node, use: str) -> AnyTexture | None:
        """A texture for `use`: "colour", "scalar" (luminance), "roughness" (its square root), "metallic" (in B).

        None where nothing can stand for it, which has been said in a warning.
        """
        key = (node.index, use)
        if key in self._textures:
            return self._textures[key]
        texture: AnyTexture | None = None
        if node.plugin == "bitmap":
            texture = self._bitmap(node, use)
        elif node.plugin == "checkerboard":
            texture = self._checkerboard(node, use)
        elif node.plugin == "mesh_attribute":
            node.seen.update(node.names)
            node.warn("a mesh attribute is understood as a base colour only; here it is left out")
            return None
        if texture is None:
            texture = self._baked(node, use)
        self._textures[key] = texture
        return texture

    def _bitmap(self, node: Node, use: str) -> Texture:
        filename, raw = str(node.get("filename", "")), bool(node.get("raw", False))
        node.ignore("format", "accel")
        path = str(self.mi.file_resolver().resolve(filename))
        key = (path, raw, use)
        if key not in self._images:
            try:
                self._images[key] = prepare_image(*read_image(self.mi, path, raw), use)
            except (RuntimeError, SceneError) as error:
                raise node.error(f"{filename}: {plain(error)}") from None
        image, srgb = self._images[key]
        wrap, filter_type = str(node.get("wrap_mode", "repeat")), str(node.get("filter_type", "bilinear"))
        if wrap not in ("repeat", "clamp", "mirror") or filter_type not in ("bilinear", "nearest"):
            raise node.error(f"wrap_mode {wrap!r} or filter_type {filter_type!r} does not exist")
        return Texture(
            image=image,
            srgb=srgb,
            transform=uv_transform(node),
            wrap_u=wrap,  # type: ignore[arg-type]
            wrap_v=wrap,  # type: ignore[arg-type]
            filter=filter_type,  # type: ignore[arg-type]
            name=filename,
        )

    def _checkerboard(self, node: Node, use: str) -> Checkerboard | None:
        first, second = node.colour("color0", 0.4), node.colour("color1", 0.2)
        if use == "metallic" or isinstance(first, Node) or isinstance(second, Node):
            return None
        if use == "colour":
            return Checkerboard(first, second, uv_transform(node))
        # Mitsuba 3's eval_1 has the two colours the other way round from its eval.
        values = [_luminance(colour) for colour in (second, first)]
        if use == "roughness":
            values = [float(np.sqrt(max(value, 0.0))) for value in values]
        return Checkerboard(_three(values[0]), _three(values[1]), uv_transform(node))

    def _baked(self, node: Node, use: str) -> Texture:
        """A texture without equivalent, sampled over the unit square."""
        node.seen.update(node.names)
        node.warn(f"substituted by {BAKED_SIZE} x {BAKED_SIZE} samples of the unit square")
        image = self._sample(self.document.instantiate(node), BAKED_SIZE)
        return Texture(prepare_image(image, False, use)[0], name=node.id or node.plugin)

    def _sample(self, texture: Any, size: int) -> np.ndarray:
        centres = (np.arange(size) + 0.5) / size
        texels = [[self.document.evaluate(texture, (u, v)) for u in centres] for v in centres]
        return np.array(texels, np.float32)


def read_image(mi: Any, path: str, raw: bool) -> tuple[np.ndarray, bool]:
    """Image file as Mitsuba sees it: (height, width, 1 or 3) uint8 or float32, and whether it is sRGB-encoded.

    8-bit images keep their texels; others come out linear. Alpha is left out, as Mitsuba does.
    """
    bitmap = mi.Bitmap(path)
    if raw:
        bitmap.set_srgb_gamma(False)
    formats = mi.Bitmap.PixelFormat
    luminance = bitmap.pixel_format() in (formats.Y, formats.YA)
    if bitmap.component_format() == mi.Struct.Type.UInt8 and bitmap.pixel_format() in (
        formats.Y, formats.YA, formats.RGB, formats.RGBA
    ):  # fmt: skip
        image = np.array(bitmap)
        image = image.reshape(*image.shape[:2], -1)
        return np.ascontiguousarray(image[..., : 1 if luminance else 3]), bool(bitmap.srgb_gamma())
    bitmap = bitmap.convert(formats.Y if luminance else formats.RGB, mi.Struct.Type.Float32, srgb_gamma=False)
    image = np.array(bitmap, dtype=np.float32)
    return np.ascontiguousarray(image.reshape(*image.shape[:2], -1)), False


def prepare_image(image: np.ndarray, srgb: bool, use: str) -> tuple[np.ndarray, bool]:
    """Texels as `Materials.texture` promises them for a `use`, and whether they are still sRGB-encoded."""
    if use == "colour":
        return image, srgb
    linear = image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
    if srgb:
        linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    value = linear @ LUMINANCE if linear.shape[2] == 3 else linear[..., 0]
    if use == "roughness":
        value = np.sqrt(np.maximum(value, 0.0))
    value = value.astype(np.float32)[..., None]
    return (
        (np.concatenate([np.ones_like(value), np.ones_like(value), value], axis=2), False)
        if use == "metallic"
        else (
            value,
            False,
        )
    )


def uv_transform(node: Node) -> np.ndarray:
    """A texture's `to_uv` as (2, 3)."""
    return node.matrix("to_uv")[np.ix_([0, 1], [0, 1, 3])]


def _luminance(colour: Vec3) -> float:
    return float(np.dot(LUMINANCE, colour))


def _three(value: Any) -> Vec3:
    values = np.array(value, dtype=np.float64).ravel()
    x, y, z = (float(c) for c in np.broadcast_to(values, 3))
    return x, y, z
