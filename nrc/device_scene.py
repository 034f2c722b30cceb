"""`DeviceScene`: a `Scene` uploaded to a device as the arrays that kernels read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import warp as wp

from nrc.bvh import Bvh
from nrc.kernels import scene as ks
from nrc.kernels import texture as kt
from nrc.kernels.bsdf import ALPHA_MIN, Bsdf
from nrc.kernels.bvh_build import build_bvh
from nrc.kernels.camera import CameraView
from nrc.kernels.plastic import integrate_interface
from nrc.launch import prepare, resolve_device
from nrc.plastic import plastic_table
from nrc.scene import (
    MATERIAL_KINDS,
    AnyTexture,
    Camera,
    Checkerboard,
    DirectionalLight,
    Environment,
    Material,
    Mesh,
    PointLight,
    Scene,
    SpotLight,
)

_WRAP = {"repeat": 0, "clamp": 1, "mirror": 2}
_ALPHA = {"opaque": 0, "mask": 1, "blend": 2}
_TEXTURE_FIELDS = tuple(name for name in Material.__dataclass_fields__ if name.endswith("_texture"))
_BSDF_SCALARS = (
    "ior",
    "metallic",
    "transmission",
    "specular_factor",
    "spec_tint",
    "anisotropic",
    "sheen",
    "sheen_tint",
    "clearcoat",
    "clearcoat_gloss",
    "flatness",
)
_BSDF_COLORS = ("base_color", "specular", "transmittance", "eta", "k")
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_NO_ENVIRONMENT = Environment.constant((0.0, 0.0, 0.0))


class DeviceScene:
    """Device arrays of a scene.

    Attributes:
        scene: The host data.
        device: Where the arrays live.
        view: `SceneView` struct to pass to kernels; it keeps the arrays it refers to alive.
        bounds: Lower and upper corner of the geometry, (3,) float each.
    """

    def __init__(self, scene: Scene, device: Any = None) -> None:
        self._upload(scene, resolve_device(device), {})

    def replaced(self, scene: Scene) -> DeviceScene:
        """`scene` on the same device, sharing with this one all that was made from the same host objects.

        Arrays, textures and environments are compared by identity, so a scene made by `dataclasses.replace` keeps what
        it did not replace: other materials, lights, or rotation and scale of the environment leave geometry, hierarchy,
        texels and environment map where they are. Nothing tells it from `DeviceScene(scene, device)` but its cost.
        """
        other = object.__new__(DeviceScene)
        other._upload(scene, self.device, self._parts)
        return other

    def _upload(self, scene: Scene, device: wp.Device, earlier: dict[str, tuple[tuple[Any, ...], Any]]) -> None:
        """Make everything but what `earlier` has from the same host objects."""
        self.scene, self.device = scene, device
        self._earlier = earlier
        self._parts: dict[str, tuple[tuple[Any, ...], Any]] = {}  # sources and what was made of them, by name
        view = ks.SceneView()
        self._upload_geometry(view)
        self._upload_materials(view)
        self._upload_environment(view)
        self._upload_lights(view)
        self.view = view
        self._earlier = {}  # lets go of what is no longer used

    def _part(self, name: str, sources: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returns, or this or an earlier scene's part of that `name` if it was made from the same sources.

        A name stands for one part: a second one would let go of the first, to which kernels may have the address.
        """
        known, part = self._parts.get(name) or self._earlier.get(name, ((), None))
        if part is None or len(known) != len(sources) or any(a is not b for a, b in zip(known, sources, strict=True)):
            part = make()
        self._parts[name] = sources, part
        return part

    def camera_view(self, width: int, height: int, camera: Camera | None = None) -> CameraView:
        """`CameraView` of `camera` (the scene's by default) for a picture of `width` × `height` [px]."""
        camera = camera or self.scene.camera
        view = CameraView()
        matrix = np.asarray(camera.to_world, float)
        axes = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
        view.origin, view.x, view.y, view.z = (wp.vec3(*v) for v in (matrix[:3, 3], *axes.T))
        view.half_width, view.half_height = camera.half_extents(width, height)
        view.aperture_radius = camera.aperture_radius
        view.focus_distance = camera.focus_distance
        view.width = width
        view.height = height
        return view

    def _array(self, values: np.ndarray, dtype: Any) -> wp.array:
        return wp.array(np.ascontiguousarray(values), dtype=dtype, device=self.device)

    def _upload_geometry(self, view: Any) -> None:
        all_positions = tuple(mesh.positions for mesh in self.scene.meshes)
        self.bounds = self._part("bounds", all_positions, lambda: self.scene.bounds)
        numbered = [(i, mesh) for i, mesh in enumerate(self.scene.meshes) if len(mesh.indices)]
        meshes = [mesh for _, mesh in numbered]
        counts = [len(mesh.indices) for mesh in meshes]
        shapes = tuple(array for mesh in meshes for array in (mesh.positions, mesh.indices))
        self._positions, self._indices = self._part("triangles", shapes, lambda: _triangles(meshes))
        self._areas = self._part("areas", shapes, lambda: _areas(self._positions, self._indices))
        self.bvh = self._part("bvh", shapes, self._build_bvh)
        view.accel = self.bvh.accel
        view.positions = self._part("positions", shapes, lambda: self._array(self._positions, wp.vec3))
        view.indices = self._part("indices", shapes, lambda: self._array(self._indices, wp.vec3i))
        for name, width, dtype in (
            ("normals", 3, wp.vec3),
            ("uv0", 2, wp.vec2),
            ("uv1", 2, wp.vec2),
            ("colors", 4, wp.vec4),
            ("tangents", 4, wp.vec4),
        ):
            fallback = "uv0" if name == "uv1" else name
            used = tuple(getattr(mesh, a) for mesh in meshes for a in ("positions", name, fallback))

            def upload(name: str = name, width: int = width, dtype: Any = dtype, fallback: str = fallback) -> wp.array:
                return self._array(_attribute(meshes, name, width, fallback), dtype)

            setattr(view, name, self._part(name, used, upload))
        flags = {"normals": ks.HAS_NORMALS, "uv0": ks.HAS_UV, "colors": ks.HAS_COLORS, "tangents": ks.HAS_TANGENTS}
        attributes = [sum(int(f) for name, f in flags.items() if getattr(mesh, name) is not None) for mesh in meshes]
        view.triangle_attributes = self._array(np.repeat(attributes, counts).astype(np.int32), wp.int32)
        self._triangle_material = np.repeat([mesh.material for mesh in meshes], counts).astype(np.int32)
        view.triangle_material = self._array(self._triangle_material, wp.int32)
        view.triangle_mesh = self._array(np.repeat([i for i, _ in numbered], counts).astype(np.int32), wp.int32)
        lower, upper = self.bounds
        self._center = (lower + upper) / 2.0
        self._radius = max(float(np.linalg.norm(upper - lower)) / 2.0, 1e-6)
        view.center = wp.vec3(*self._center)
        view.radius = self._radius

    def _build_bvh(self) -> Bvh:
        if self.device.is_cpu:
            prepare({"BVH build": build_bvh}, self.device)
        return Bvh(self._positions, self._indices, self.device)

    def _upload_materials(self, view: Any) -> None:
        has_colors = {mesh.material for mesh in self.scene.meshes if mesh.colors is not None}
        textures = _TextureTable()
        materials = [
            _material_view(material, textures, i in has_colors) for i, material in enumerate(self.scene.materials)
        ]
        for material, row in zip(self.scene.materials, materials, strict=True):
            if material.kind == "plastic" and max(material.roughness) > 0.0:
                row.bsdf.plastic_table = self._plastic_table(material).ptr
        view.materials = wp.array(materials, dtype=ks.MaterialView, device=self.device)
        view.textures = wp.array(textures.views or [kt.TextureView()], dtype=kt.TextureView, device=self.device)
        sources = tuple(source for image in textures.images for source in image)
        view.texels = self._part("texels", sources, lambda: self._array(_packed_images(textures.images), wp.uint32))
        code = np.arange(256) / 255.0
        linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
        view.srgb_to_linear = self._part("srgb", (), lambda: self._array(linear.astype(np.float32), wp.float32))
        view.has_alpha = int(any(material.alpha_mode != "opaque" for material in self.scene.materials))

    def _plastic_table(self, material: Material) -> wp.array:
        widths = (max(material.roughness[0] ** 2, ALPHA_MIN), max(material.roughness[1] ** 2, ALPHA_MIN))
        beckmann = material.distribution == "beckmann"

        def make() -> wp.array:
            prepare({"plastic table": integrate_interface}, self.device)
            return self._array(plastic_table(material.ior, widths, beckmann, self.device), wp.float32)

        return self._part(f"plastic {material.ior} {widths} {beckmann}", (), make)

    def _upload_environment(self, view: Any) -> None:
        environment = self.scene.environment or _NO_ENVIRONMENT
        image = environment.image
        view.environment = self._part("environment", (image,), lambda: self._array(image.reshape(-1, 3), wp.vec3))
        view.environment_height, view.environment_width = image.shape[:2]
        view.environment_scale = environment.scale
        view.environment_rows, view.environment_columns = self._part(
            "environment cdfs",
            (image,),
            lambda: [
                self._array(cdf.astype(np.float32).ravel(), wp.float32)
                for cdf in _environment_cdfs(image.astype(np.float64))
            ],
        )
        view.environment_to_world = wp.mat33(*np.asarray(environment.to_world, float).ravel())
        irradiance = self._part("environment irradiance", (image,), lambda: _integrated_luminance(image))
        self._environment_power = irradiance * environment.scale * math.pi * self._radius * self._radius

    def _upload_lights(self, view: Any) -> None:
        """Light table: emissive triangles, punctual lights, environment; chosen in proportion to power [W]."""
        emitted = np.array([self._mean_emission(material) for material in self.scene.materials])
        triangle_power = math.pi * self._areas * emitted[self._triangle_material]
        emissive = np.flatnonzero(triangle_power > 0.0)
        triangle_light = np.full(len(self._indices), -1, np.int32)
        triangle_light[emissive] = np.arange(len(emissive))

        n_punctual = len(self.scene.lights)
        has_environment = self.scene.environment is not None
        light_view: Any = ks.LightView  # wp.struct adds numpy_dtype
        row_type: Any = light_view.numpy_dtype()
        table: Any = np.zeros(len(emissive) + n_punctual + has_environment, row_type)
        table["triangle"] = -1
        table["triangle"][: len(emissive)] = emissive
        power = []  # of all but the triangles
        for i, light in enumerate(self.scene.lights, start=len(emissive)):
            row = table[i]
            if not isinstance(light, DirectionalLight):
                row["position"] = light.position
            if not isinstance(light, PointLight):
                row["direction"] = np.asarray(light.direction) / np.linalg.norm(light.direction)
            if isinstance(light, SpotLight):
                row["kind"] = ks.LIGHT_SPOT
                row["inner_angle"], row["outer_angle"] = light.inner_angle, light.outer_angle
                row["smooth"] = light.falloff == "smooth"
                solid_angle = 2.0 * math.pi * (1.0 - math.cos((light.inner_angle + light.outer_angle) / 2.0))
            else:
                row["kind"] = ks.LIGHT_DIRECTIONAL if isinstance(light, DirectionalLight) else ks.LIGHT_POINT
                solid_angle = 4.0 * math.pi
            if isinstance(light, DirectionalLight):
                row["intensity"] = light.irradiance
                power.append(float(np.dot(light.irradiance, _LUMINANCE)) * math.pi * self._radius**2)
            else:
                row["intensity"] = light.intensity
                power.append(float(np.dot(light.intensity, _LUMINANCE)) * solid_angle)
        if has_environment:
            table[-1]["kind"] = ks.LIGHT_ENVIRONMENT
            power.append(self._environment_power)
        powers = np.concatenate([triangle_power[emissive], power])
        total = float(np.sum(powers))
        view.n_lights = len(table) if total > 0.0 else 0
        pmf = powers / total if total > 0.0 else np.ones(1)
        probability, alias = _alias_table(pmf)
        view.environment_light = len(table) - 1 if has_environment else -1
        if not len(table):
            table = np.zeros(1, row_type)
        view.lights = wp.array(table, dtype=ks.LightView, device=self.device)
        if total <= 0.0:
            pmf = np.zeros(len(table))
        view.light_pmf = self._array(pmf.astype(np.float32), wp.float32)
        view.light_probability = self._array(probability.astype(np.float32), wp.float32)
        view.light_alias = self._array(alias, wp.int32)
        view.triangle_light = self._array(triangle_light, wp.int32)

    def _mean_emission(self, material: Material) -> float:
        """Luminance of the emission, averaged over its texture's texels, counting both sides if both emit."""
        if not material.emits:
            return 0.0
        emission = np.asarray(material.emission, float)
        texture = material.emission_texture
        if texture is not None:
            emission = emission * self._part(f"mean {id(texture)}", (texture,), lambda: _mean_color(texture))
        return float(emission @ _LUMINANCE) * (2.0 if material.emission_two_sided else 1.0)


class _TextureTable:
    """Textures of all materials; images are stored once however many textures look them up.

    Attributes:
        views: One for each texture.
        images: The images in the order of their texels, each with whether its floats are sRGB-encoded.
    """

    def __init__(self) -> None:
        self.views: list[Any] = []
        self.images: list[tuple[np.ndarray, bool]] = []
        self._offset = 0
        self._by_texture: dict[int, int] = {}
        self._by_image: dict[tuple[int, bool], int] = {}

    def index(self, texture: AnyTexture | None) -> int:
        if texture is None:
            return -1
        if id(texture) not in self._by_texture:
            self._by_texture[id(texture)] = len(self.views)
            self.views.append(self._view(texture))
        return self._by_texture[id(texture)]

    def _view(self, texture: AnyTexture) -> Any:
        view = kt.TextureView()
        view.uv_set = texture.uv_set
        view.row_u, view.row_v = (wp.vec3(*row) for row in np.asarray(texture.transform, float))
        if isinstance(texture, Checkerboard):
            view.kind = kt.TEXTURE_CHECKERBOARD
            view.width = view.height = 1024  # step of bump differences
            view.color0, view.color1 = wp.vec3(*texture.color0), wp.vec3(*texture.color1)
            return view
        image = texture.image
        if image.dtype == np.uint8:
            view.kind = kt.TEXTURE_SRGB8 if texture.srgb else kt.TEXTURE_LINEAR8
        else:
            view.kind = kt.TEXTURE_FLOAT
        view.height, view.width = image.shape[:2]
        view.wrap_u, view.wrap_v = _WRAP[texture.wrap_u], _WRAP[texture.wrap_v]
        view.nearest = int(texture.filter == "nearest")
        encoded = bool(texture.srgb and image.dtype == np.float32)
        key = (id(image), encoded)
        if key not in self._by_image:
            self._by_image[key] = self._offset
            self.images.append((image, encoded))
            self._offset += image.shape[0] * image.shape[1] * (1 if image.dtype == np.uint8 else 4)
        view.offset = self._by_image[key]
        return view


def _packed_images(images: list[tuple[np.ndarray, bool]]) -> np.ndarray:
    """The texels of all images, one after the other."""
    texels = np.concatenate([_packed_texels(*image) for image in images]) if images else np.zeros(1, np.uint32)
    if len(texels) >= 2**31:
        raise ValueError(f"textures hold {len(texels)} texels; at most 2^31 - 1 fit")
    return texels


def _packed_texels(image: np.ndarray, encoded: bool) -> np.ndarray:
    """RGBA of every texel as uint32: four bytes in one, or four floats, sRGB-decoded where they are `encoded`."""
    channels = image.shape[2]
    opaque = 255 if image.dtype == np.uint8 else 1.0
    rgba = np.full((*image.shape[:2], 4), opaque, image.dtype)
    rgba[..., :3] = image[..., :3] if channels >= 3 else image[..., :1]
    if channels in (2, 4):
        rgba[..., 3] = image[..., -1]
    if encoded:
        c = rgba[..., :3]
        rgba[..., :3] = np.where(c <= 0.04045, c / 12.92, ((np.maximum(c, 0.0) + 0.055) / 1.055) ** 2.4)
    return np.ascontiguousarray(rgba).view(np.uint32).ravel()


def _material_view(material: Material, textures: _TextureTable, has_colors: bool) -> Any:
    view = ks.MaterialView()
    bsdf = Bsdf()
    bsdf.kind = MATERIAL_KINDS.index(material.kind)
    for name in _BSDF_SCALARS:
        setattr(bsdf, name, float(getattr(material, name)))
    for name in _BSDF_COLORS:
        setattr(bsdf, name, wp.vec3(*getattr(material, name)))
    bsdf.alpha = wp.vec2(material.roughness[0] ** 2, material.roughness[1] ** 2)
    bsdf.beckmann = int(material.distribution == "beckmann")
    bsdf.nonlinear = int(material.nonlinear)
    view.bsdf = bsdf
    for name in _TEXTURE_FIELDS:
        setattr(view, name, textures.index(getattr(material, name)))
    view.is_textured = int(has_colors or any(getattr(material, name) is not None for name in _TEXTURE_FIELDS))
    view.needs_tangent = int(
        material.normal_texture is not None
        or material.bump_texture is not None
        or material.roughness[0] != material.roughness[1]
        or material.anisotropic != 0.0
    )
    view.emission = wp.vec3(*material.emission)
    view.emission_two_sided = int(material.emission_two_sided)
    view.opacity = material.opacity
    view.opacity_from_base_color = int(material.opacity_from_base_color)
    view.alpha_mode = _ALPHA[material.alpha_mode]
    view.alpha_cutoff = material.alpha_cutoff
    refracts = material.kind in ("dielectric", "thin_dielectric") or (
        material.kind == "principled" and material.transmission > 0.0
    )
    view.two_sided = int(material.two_sided and not refracts)
    view.normal_scale = material.normal_scale
    view.bump_scale = material.bump_scale
    return view


def _triangles(meshes: list[Mesh]) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of all meshes."""
    first = np.cumsum([0] + [len(mesh.positions) for mesh in meshes])
    indices = [mesh.indices + offset for mesh, offset in zip(meshes, first[:-1], strict=True)]
    return np.concatenate([mesh.positions for mesh in meshes]), np.concatenate(indices).astype(np.int32)


def _areas(positions: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Area of each triangle, float64."""
    corners = positions[indices].astype(np.float64)
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2.0


def _attribute(meshes: list[Mesh], name: str, width: int, fallback: str) -> np.ndarray:
    """A vertex attribute over all meshes, its fallback or zeros where a mesh lacks it; one row where all do."""
    if all(getattr(mesh, name) is None for mesh in meshes):
        return np.zeros((1, width), np.float32)
    rows = []
    for mesh in meshes:
        value = getattr(mesh, name)
        if value is None:
            value = getattr(mesh, fallback)
        rows.append(np.zeros((len(mesh.positions), width), np.float32) if value is None else value)
    return np.concatenate(rows)


def _mean_color(texture: AnyTexture) -> np.ndarray:
    """Mean of a texture's colours, (3,) or (1,) where it is grey; only a selection probability depends on it."""
    if isinstance(texture, Checkerboard):
        return (np.asarray(texture.color0) + np.asarray(texture.color1)) / 2.0
    n_colors = 3 if texture.image.shape[2] >= 3 else 1
    image = texture.image[..., :n_colors].reshape(-1, n_colors).astype(np.float64)
    if texture.image.dtype == np.uint8:
        image /= 255.0
    if texture.srgb:
        image = image**2.2
    return image.mean(axis=0)


def _integrated_luminance(image: np.ndarray) -> float:
    """Luminance of an environment map, integrated over all directions."""
    height, width = image.shape[:2]
    theta = (np.arange(height) + 0.5) / height * math.pi
    solid_angle = np.sin(theta)[:, None] / (np.sin(theta).sum() * width) * 4.0 * math.pi
    return float(((image.astype(np.float64) @ _LUMINANCE) * solid_angle).sum())


def _environment_cdfs(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marginal CDF over rows (height + 1,) and conditional CDFs over columns (height, width + 1).

    A texel's weight is the mean luminance of its 3×3 neighbourhood, because bilinear lookup spreads texels that far,
    times the sine of its polar angle.
    """
    height, width = image.shape[:2]
    value = image @ _LUMINANCE
    value = (np.roll(value, 1, axis=1) + 2.0 * value + np.roll(value, -1, axis=1)) / 4.0
    padded = np.pad(value, ((1, 1), (0, 0)), mode="edge")
    value = (padded[:-2] + 2.0 * padded[1:-1] + padded[2:]) / 4.0
    value *= np.sin((np.arange(height) + 0.5) / height * math.pi)[:, None]
    per_row = value.sum(axis=1)
    uniform = np.arange(width + 1) / width
    columns = np.zeros((height, width + 1))
    columns[:, 1:] = np.cumsum(value, axis=1)
    columns = np.where(per_row[:, None] > 0.0, columns / np.maximum(per_row[:, None], 1e-300), uniform)
    total = per_row.sum()
    rows = np.concatenate([[0.0], np.cumsum(per_row)]) / total if total > 0.0 else np.arange(height + 1) / height
    columns[:, -1] = rows[-1] = 1.0
    return rows, columns


def _alias_table(pmf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker alias table of a probability mass function (Vose 1991): acceptance probability and alias per entry."""
    n = len(pmf)
    probability = (pmf * n).tolist()  # lists: the loop below is several times faster on them
    alias = list(range(n))
    small = [i for i in range(n) if probability[i] < 1.0]
    large = [i for i in range(n) if probability[i] >= 1.0]
    while small and large:
        i, j = small.pop(), large[-1]
        alias[i] = j
        probability[j] -= 1.0 - probability[i]
        if probability[j] < 1.0:
            small.append(large.pop())
    for i in small + large:
        probability[i] = 1.0
    return np.array(probability), np.array(alias, np.int32)
