"""A `Scene` as a dictionary that `mitsuba.load_dict` understands."""

from __future__ import annotations

from typing import Any

import numpy as np

from nrc.assets.mitsuba_document import import_mitsuba
from nrc.assets.model import flatten
from nrc.scene import (
    AnyTexture,
    Camera,
    Checkerboard,
    DirectionalLight,
    Environment,
    Light,
    Material,
    Mesh,
    PointLight,
    Scene,
    SceneError,
    Texture,
    Vec3,
)

FROM_OURS = np.diag([-1.0, 1.0, -1.0, 1.0])  # Mitsuba's camera has +x left and looks along +z
_PLAIN_MAPPING = {"flip_invalid_normals": False, "use_shadowing_function": False}  # as ours: no such corrections


def to_mitsuba(
    scene: Scene, *, width: int, height: int, spp: int, max_depth: int, rr_depth: int
) -> tuple[dict[str, Any], list[str]]:
    """Dictionary for `mitsuba.load_dict` in the active variant, and what it only approximates, one entry each.

    The picture is `width` × `height` [px], box-filtered float32 RGB, by the `path` integrator with `spp` samples per
    pixel and the given `max_depth` and `rr_depth` (as in `RenderSettings`). Instances become meshes of their own.

    Raises:
        SceneError: If `mitsuba` is not installed or no RGB variant is active.
    """
    mi = import_mitsuba(scene.name or "scene")
    if mi.variant() is None or not mi.variant().endswith("_rgb"):
        raise SceneError(f"set an RGB variant of Mitsuba before the export; active: {mi.variant()}")
    scene = flatten(scene)
    exporter = _Exporter(mi, scene)
    result: dict[str, Any] = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": max_depth, "rr_depth": rr_depth},
        "sensor": exporter.sensor(scene.camera, width, height, spp),
    }
    for i, mesh in enumerate(scene.meshes):
        if len(mesh.indices):
            result[f"mesh_{i}"] = exporter.mesh(mesh)
    for i, light in enumerate(scene.lights):
        result[f"light_{i}"] = exporter.light(light)
    if scene.environment is not None:
        result["environment"] = exporter.environment(scene.environment)
    return result, list(exporter.approximations)


class _Exporter:
    def __init__(self, mi: Any, scene: Scene) -> None:
        self.mi, self.scene = mi, scene
        self.approximations: dict[str, None] = {}
        self._bsdfs: dict[tuple[int, bool], Any] = {}

    def note(self, subject: Material | Mesh | Light, message: str) -> None:
        self.approximations[f"{type(subject).__name__.lower()} {subject.name!r}: {message}"] = None

    def transform(self, matrix: np.ndarray) -> Any:
        return self.mi.ScalarTransform4f(np.ascontiguousarray(matrix, dtype=np.float64).tolist())

    # Geometry

    def mesh(self, mesh: Mesh) -> Any:
        mi, material = self.mi, self.scene.materials[mesh.material]
        coloured = mesh.colors is not None and material.base_color_texture is None
        if mesh.colors is not None and not coloured:
            self.note(mesh, "vertex colours on a textured material are left out")
        if mesh.colors is not None and mesh.colors[:, 3].min() < 1.0:
            self.note(mesh, "the alpha of vertex colours is left out")
        props = mi.Properties()
        key = (mesh.material, coloured)
        if key not in self._bsdfs:
            self._bsdfs[key] = mi.load_dict(self.bsdf(material, coloured))
        props["bsdf"] = self._bsdfs[key]
        if material.emits:
            props["emitter"] = mi.load_dict(self.area(material))
        if mesh.normals is None:
            props["face_normals"] = True
        uv = self.uv(mesh, material)
        name = mesh.name or "mesh"
        made = mi.Mesh(name, len(mesh.positions), len(mesh.indices), props, mesh.normals is not None, uv is not None)
        if coloured:
            rgb = mesh.colors[:, :3] * np.asarray(material.base_color, np.float32)  # type: ignore[index]
            made.add_attribute("vertex_color", 3, np.ascontiguousarray(rgb, np.float32).ravel())
        params = mi.traverse(made)
        params["vertex_positions"] = mesh.positions.ravel()
        params["faces"] = mesh.indices.astype(np.uint32).ravel()
        if mesh.normals is not None:
            params["vertex_normals"] = mesh.normals.ravel()
        if uv is not None:
            params["vertex_texcoords"] = uv.ravel()
        params.update()
        return made

    def uv(self, mesh: Mesh, material: Material) -> np.ndarray | None:
        """The one set of texture coordinates that Mitsuba keeps."""
        textures = [value for value in vars(material).values() if isinstance(value, (Texture, Checkerboard))]
        sets = {texture.uv_set for texture in textures}
        if sets == {0, 1}:
            self.note(mesh, "textures use two sets of texture coordinates; all get the first")
        if material.normal_texture is not None and mesh.tangents is not None and mesh.tangents[:, 3].min() < 0.0:
            self.note(mesh, "Mitsuba knows no mirrored tangent frames")
        return mesh.uv1 if sets == {1} else mesh.uv0

    # Materials

    def bsdf(self, material: Material, coloured: bool) -> dict[str, Any]:
        build = {
            "diffuse": self._diffuse,
            "conductor": self._conductor,
            "dielectric": self._dielectric,
            "thin_dielectric": self._dielectric,
            "plastic": self._plastic,
            "metallic_roughness": self._principled,
            "principled": self._principled,
        }[material.kind]
        bsdf = build(material, {"type": "mesh_attribute", "name": "vertex_color"} if coloured else None)
        if isinstance(material.normal_texture, Texture):
            normals = self._normals(material, material.normal_texture)
            bsdf = {"type": "normalmap", "normalmap": normals, "bsdf": bsdf, **_PLAIN_MAPPING}
        elif material.normal_texture is not None:
            self.note(material, "a checkerboard as normal map is left out")
        if material.bump_texture is not None:
            bump = self.scalar(material, material.bump_texture, 1.0)
            bsdf = {"type": "bumpmap", "height": bump, "scale": material.bump_scale, "bsdf": bsdf, **_PLAIN_MAPPING}
        transmits = material.kind in ("dielectric", "thin_dielectric") or material.transmission > 0.0
        if material.two_sided and not transmits:
            bsdf = {"type": "twosided", "bsdf": bsdf}
        if material.alpha_mode != "opaque":
            bsdf = {"type": "mask", "opacity": self._opacity(material), "bsdf": bsdf}
        return bsdf

    def _diffuse(self, material: Material, vertex: dict[str, Any] | None) -> dict[str, Any]:
        return {"type": "diffuse", "reflectance": vertex or self.colour(material, "base_color")}

    def _conductor(self, material: Material, _: dict[str, Any] | None) -> dict[str, Any]:
        bsdf = {"eta": _rgb(material.eta), "k": _rgb(material.k)}
        bsdf |= {"specular_reflectance": self.colour(material, "specular")}
        return self._microfacets(material, "conductor") | bsdf

    def _dielectric(self, material: Material, _: dict[str, Any] | None) -> dict[str, Any]:
        thin = material.kind == "thin_dielectric"
        bsdf = {"int_ior": material.ior, "ext_ior": 1.0}
        bsdf |= {"specular_reflectance": self.colour(material, "specular")}
        bsdf |= {"specular_transmittance": self.colour(material, "transmittance")}
        return ({"type": "thindielectric"} if thin else self._microfacets(material, "dielectric")) | bsdf

    def _plastic(self, material: Material, vertex: dict[str, Any] | None) -> dict[str, Any]:
        bsdf: dict[str, Any] = {"type": "plastic", "int_ior": material.ior, "ext_ior": 1.0}
        bsdf |= {"nonlinear": material.nonlinear, "specular_reflectance": self.colour(material, "specular")}
        bsdf |= {"diffuse_reflectance": vertex or self.colour(material, "base_color")}
        if material.roughness_texture is None and max(material.roughness) == 0.0:
            return bsdf
        if material.roughness_texture is not None or material.roughness[0] != material.roughness[1]:
            self.note(material, "roughplastic has one constant alpha: the mean is used")
        mean = (
            1.0
            if material.roughness_texture is None
            else float(np.mean(self.texels(material.roughness_texture)[..., 0]))
        )
        alpha = (float(np.mean(material.roughness)) * mean) ** 2
        return bsdf | {"type": "roughplastic", "alpha": alpha, "distribution": material.distribution}

    def _microfacets(self, material: Material, plugin: str) -> dict[str, Any]:
        texture = material.roughness_texture
        if texture is None and max(material.roughness) == 0.0:
            return {"type": plugin}
        bsdf: dict[str, Any] = {"type": f"rough{plugin}", "distribution": material.distribution}
        if isinstance(texture, Texture) and texture.filter == "bilinear":
            self.note(material, "roughness texture is squared per texel, before its interpolation")
        for axis, roughness in zip(("alpha_u", "alpha_v"), material.roughness, strict=True):
            bsdf[axis] = roughness**2 if texture is None else self.scalar(material, texture, roughness, power=2.0)
        return bsdf

    def _principled(self, material: Material, vertex: dict[str, Any] | None) -> dict[str, Any]:
        bsdf: dict[str, Any] = {"type": "principled", "base_color": vertex or self.colour(material, "base_color")}
        bsdf |= {"eta": material.ior, "spec_trans": material.transmission}
        packed = material.metallic_roughness_texture
        roughness, metallic = material.roughness[0], material.metallic
        bsdf |= {"roughness": roughness, "metallic": metallic}
        if material.roughness_texture is not None:
            bsdf["roughness"] = self.scalar(material, material.roughness_texture, roughness)
        if packed is not None:
            bsdf["metallic"] = self.scalar(material, packed, metallic, channel=2)
            if material.roughness_texture is None:
                bsdf["roughness"] = self.scalar(material, packed, roughness, channel=1)
            elif self.texels(packed)[..., 1].min() < 1.0:
                self.note(material, "of two roughness textures the packed one is left out")
        if material.transmission_texture is not None:
            bsdf["spec_trans"] = self.scalar(material, material.transmission_texture, material.transmission)
        if material.kind == "metallic_roughness":
            self.note(material, "glTF metallic-roughness approximated by principled")
            return bsdf
        if material.roughness[0] != material.roughness[1]:
            self.note(material, "principled has one roughness: the first axis is used")
        names = ("anisotropic", "spec_tint", "sheen", "sheen_tint", "flatness", "clearcoat", "clearcoat_gloss")
        return bsdf | {name: value for name in names if (value := getattr(material, name)) > 0.0}

    def _normals(self, material: Material, texture: Texture) -> dict[str, Any]:
        linear = self.texels(texture)
        scaled = (linear[..., :3] - 0.5) * [material.normal_scale, material.normal_scale, 1.0] + 0.5
        return self.bitmap(texture, scaled)

    def _opacity(self, material: Material) -> Any:
        texture, channel = material.opacity_texture, 0
        if material.opacity_from_base_color and isinstance(material.base_color_texture, Texture):
            alpha = material.base_color_texture.image.shape[2] - 1
            if alpha in (1, 3):
                if texture is not None:
                    self.note(material, "of two opacity textures only the base colour's alpha is used")
                texture, channel = material.base_color_texture, alpha
        if texture is None:
            opaque = material.opacity >= material.alpha_cutoff
            return material.opacity if material.alpha_mode == "blend" else float(opaque)
        if material.alpha_mode == "blend":
            return self.scalar(material, texture, material.opacity, channel=channel)
        self.note(material, "the alpha test is made per texel, without interpolation")
        return self.scalar(material, texture, material.opacity, channel=channel, cutoff=material.alpha_cutoff)

    def area(self, material: Material) -> dict[str, Any]:
        if material.emission_two_sided:
            self.note(material, "emits on its front side only")
        return {"type": "area", "radiance": self.colour(material, "emission")}

    # Textures

    def colour(self, material: Material, field: str) -> Any:
        """Factor × texture."""
        factor: Vec3 = getattr(material, field)
        texture: AnyTexture | None = getattr(material, f"{field}_texture")
        if texture is None:
            return _rgb(factor)
        if isinstance(texture, Checkerboard):
            return self.checkerboard(
                texture, *(tuple(np.multiply(c, factor)) for c in (texture.color0, texture.color1))
            )
        if texture.wrap_u != texture.wrap_v:
            self.note(material, f"{field} texture: one wrap mode for both axes, {texture.wrap_u}")
        if factor == (1.0, 1.0, 1.0) and texture.image.dtype == np.uint8 and texture.image.shape[2] in (1, 3):
            return self.bitmap(texture, texture.image)
        linear = self.texels(texture)
        return self.bitmap(texture, linear[..., :3] * np.asarray(factor, np.float32))

    def scalar(
        self,
        material: Material,
        texture: AnyTexture,
        factor: float,
        *,
        channel: int = 0,
        power: float = 1.0,
        cutoff: float | None = None,
    ) -> dict[str, Any]:
        """For a single-channel parameter: (factor × channel)^power, or whether factor × channel reaches `cutoff`."""

        def value(x: np.ndarray) -> np.ndarray:
            x = factor * x
            return (x >= cutoff).astype(np.float32) if cutoff is not None else x**power

        if isinstance(texture, Checkerboard):
            colours = (value(np.asarray(c)[[min(channel, 2)] * 3]) for c in (texture.color1, texture.color0))
            return self.checkerboard(texture, *colours)  # swapped: Mitsuba's eval_1 has them the other way round
        if texture.wrap_u != texture.wrap_v:
            self.note(material, f"texture {texture.name!r}: one wrap mode for both axes, {texture.wrap_u}")
        linear = self.texels(texture)
        bitmap = self.bitmap(texture, value(linear[..., min(channel, linear.shape[2] - 1)][..., None]))
        return bitmap if cutoff is None else bitmap | {"filter_type": "nearest"}

    def texels(self, texture: AnyTexture) -> np.ndarray:
        """Linear float32 texels: three channels of colour, then alpha if there is one."""
        if isinstance(texture, Checkerboard):
            return np.array([[texture.color0, texture.color1], [texture.color1, texture.color0]], np.float32)
        image = texture.image.astype(np.float32) / np.float32(255.0 if texture.image.dtype == np.uint8 else 1.0)
        n = image.shape[2]
        n_colour = n if n in (1, 3) else n - 1
        colour = image[..., :n_colour]
        if texture.srgb:
            colour = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        if colour.shape[2] == 1:
            colour = np.repeat(colour, 3, axis=2)
        return np.concatenate([colour, image[..., n_colour:]], axis=2).astype(np.float32)

    def bitmap(self, texture: Texture, image: np.ndarray) -> dict[str, Any]:
        encoded = image.dtype == np.uint8 and texture.srgb
        texels = np.ascontiguousarray(image if image.dtype == np.uint8 else image.astype(np.float32))
        bitmap = self.mi.Bitmap(texels)
        bitmap.set_srgb_gamma(encoded)
        return {
            "type": "bitmap",
            "bitmap": bitmap,
            "raw": not encoded,
            "filter_type": texture.filter,
            "wrap_mode": texture.wrap_u,
            "to_uv": self.uv_transform(texture.transform),
        }

    def checkerboard(self, texture: Checkerboard, color0: Any, color1: Any) -> dict[str, Any]:
        board = {"type": "checkerboard", "color0": _rgb(color0), "color1": _rgb(color1)}
        return board | {"to_uv": self.uv_transform(texture.transform)}

    def uv_transform(self, transform: np.ndarray) -> Any:
        matrix = np.eye(4)
        matrix[np.ix_([0, 1], [0, 1, 3])] = transform
        return self.transform(matrix)

    # Lights and camera

    def light(self, light: Light) -> dict[str, Any]:
        if isinstance(light, PointLight):
            return {"type": "point", "position": list(light.position), "intensity": _rgb(light.intensity)}
        if isinstance(light, DirectionalLight):
            return {"type": "directional", "direction": list(light.direction), "irradiance": _rgb(light.irradiance)}
        if light.falloff != "linear":
            self.note(light, "smooth falloff approximated by a linear one")
        frame = np.eye(4)
        z = np.asarray(light.direction, float) / np.linalg.norm(light.direction)
        x = np.cross(np.eye(3)[np.argmin(np.abs(z))], z)
        x /= np.linalg.norm(x)
        frame[:3] = np.column_stack([x, np.cross(z, x), z, light.position])
        cutoff = float(np.degrees(light.outer_angle))
        beam = min(float(np.degrees(light.inner_angle)), cutoff * (1.0 - 1e-4))
        spot = {"type": "spot", "to_world": self.transform(frame), "intensity": _rgb(light.intensity)}
        return spot | {"cutoff_angle": cutoff, "beam_width": beam}

    def environment(self, environment: Environment) -> dict[str, Any]:
        if environment.is_constant:
            return {"type": "constant", "radiance": _rgb(environment.image[0, 0] * environment.scale)}
        frame = np.eye(4)
        frame[:3, :3] = environment.to_world
        rows = _texels_to_mitsuba_rows(environment.image)
        envmap = {"type": "envmap", "bitmap": self.mi.Bitmap(rows), "scale": environment.scale}
        return envmap | {"to_world": self.transform(frame)}

    def sensor(self, camera: Camera, width: int, height: int, spp: int) -> dict[str, Any]:
        low, high = self.scene.bounds
        size = float(np.linalg.norm(high - low))
        away = float(np.linalg.norm(camera.to_world[:3, 3] - (low + high) / 2.0))
        sensor = {
            "type": "perspective",
            "fov": camera.fov,
            "fov_axis": camera.fov_axis,
            "near_clip": max(min(1e-2, 1e-4 * size), 1e-6),
            "far_clip": max(1e4, 2.0 * (size + away)),
            "to_world": self.transform(camera.to_world @ FROM_OURS),
            "film": {
                "type": "hdrfilm",
                "width": width,
                "height": height,
                "pixel_format": "rgb",
                "component_format": "float32",
                "rfilter": {"type": "box"},
            },
            "sampler": {"type": "independent", "sample_count": spp},
        }
        if camera.aperture_radius > 0.0:
            sensor |= {"type": "thinlens", "aperture_radius": camera.aperture_radius}
            sensor |= {"focus_distance": camera.focus_distance}
        return sensor


def _rgb(colour: Any) -> dict[str, Any]:
    return {"type": "rgb", "value": [float(c) for c in colour]}


def _texels_to_mitsuba_rows(image: np.ndarray) -> np.ndarray:
    """The map with rows at v = i / (height - 1), as Mitsuba has them, from rows at v = (i + 1/2) / height; exact.

    2 height + 1 rows have one at every texel centre, where the piecewise linear function bends, and one between them.
    """
    height = image.shape[0]
    rows = np.empty((2 * height + 1, *image.shape[1:]), np.float32)
    rows[1::2] = image
    rows[2:-1:2] = (image[:-1] + image[1:]) / 2.0
    rows[0], rows[-1] = image[0], image[-1]
    return rows
