"""`DeviceScene`: a `Scene` uploaded to a device as the arrays that kernels read."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import warp as wp

from nrc.bvh import Bvh, InstanceBvh
from nrc.kernels import scene as ks
from nrc.kernels import texture as kt
from nrc.kernels.bsdf import ALPHA_MIN, Bsdf
from nrc.kernels.camera import CameraView
from nrc.kernels.intersect import Accel, InstanceView
from nrc.kernels.light_tree import LightNode
from nrc.kernels.plastic import integrate_interface
from nrc.launch import prepare, resolve_device
from nrc.light_table import (
    LUMINANCE,
    EmissiveTriangles,
    environment_cdfs,
    integrated_luminance,
    light_table,
    quads,
)
from nrc.light_tree import light_tree
from nrc.plastic import plastic_table
from nrc.scene import (
    MATERIAL_KINDS,
    AnyTexture,
    Camera,
    Checkerboard,
    Environment,
    Material,
    Mesh,
    Scene,
    SceneError,
    transformed_boxes,
)
from nrc.texture_table import TextureTable, packed_images
from nrc.transforms import affine, cofactors, is_singular

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
LARGEST = 1e37  # coordinate of an instance, with room for sums in single precision
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
        self._upload(scene, resolve_device(device), None)

    def replaced(self, scene: Scene) -> DeviceScene:
        """`scene` on the same device, sharing with this one all that was made from the same host objects.

        Arrays, textures and environments are compared by identity, so a scene made by `dataclasses.replace` or
        `Scene.at` keeps what it did not replace: other materials, lights, places of instances, or rotation and scale of
        the environment leave hierarchies, vertices, texels and environment map where they are. The hierarchy of a mesh
        that instances place, and whose triangles join the same vertices in other positions, is refitted in place: then
        this scene, and others made of it, must not be traced any more. Nothing else tells the result from
        `DeviceScene(scene, device)` but its cost, and `record_space="object"`, which knows points by their place in the
        first of a chain of scenes.
        """
        other = object.__new__(DeviceScene)
        other._upload(scene, self.device, self)
        return other

    def _upload(self, scene: Scene, device: wp.Device, earlier: DeviceScene | None) -> None:
        """Make everything but what `earlier` has from the same host objects."""
        self.scene, self.device = scene, device
        self._earlier: dict[str, tuple[tuple[Any, ...], Any]] = earlier._parts if earlier else {}
        self._parts: dict[str, tuple[tuple[Any, ...], Any]] = {}  # sources and what was made of them, by name
        view = ks.SceneView()
        self._number_meshes()
        self._upload_geometry(view, earlier)
        self._upload_materials(view)
        self._upload_environment(view)
        first_light = self._upload_lights(view)
        self._upload_instances(view, first_light, earlier)
        self.view = view
        self._earlier = {}  # lets go of what is no longer used

    def _part(self, name: str, sources: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returns, or this or an earlier scene's part of that `name` if it was made from the same sources.

        Numbers are the same if they are equal, all else if it is identical. A name stands for one part: a second one
        would let go of the first, to which kernels may have the address.
        """
        known, part = self._parts.get(name) or self._earlier.get(name, ((), None))
        if part is None or not _same(known, sources):
            part = make()
        self._parts[name] = sources, part
        return part

    def memory_bytes(self) -> int:
        """Device memory of arrays and hierarchies [B]; on CUDA without the nodes that Warp allocates itself."""
        fields = [getattr(self.view, name) for name in ks.SceneView.vars]  # type: ignore[attr-defined]
        arrays = {x.ptr: x.capacity for x in (*fields, self.view.accel.instances) if isinstance(x, wp.array)}
        bvhs = [self.bvh, *(part for name, (_, part) in self._parts.items() if name.startswith("bvh "))]
        return sum(arrays.values()) + sum(bvh.n_bytes for bvh in bvhs)

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

    def _number_meshes(self) -> None:
        """Order of the meshes that have triangles: those in world space first, whose hierarchy numbers them alike."""
        placed = {instance.mesh for instance in self.scene.instances}
        order = [i for i, mesh in enumerate(self.scene.meshes) if len(mesh.indices)]
        self._order = [i for i in order if i not in placed] + [i for i in order if i in placed]
        self._n_still = sum(i not in placed for i in order)
        self._meshes = [self.scene.meshes[i] for i in self._order]
        self._first_face = np.cumsum([0] + [len(mesh.indices) for mesh in self._meshes])
        self._vertex_counts = [len(mesh.positions) for mesh in self._meshes]

    def _upload_geometry(self, view: Any, earlier: DeviceScene | None) -> None:
        self.bounds = lower, upper = self.scene.bounds
        self._center = (lower + upper) / 2.0
        self._radius = max(float(np.linalg.norm(upper - lower)) / 2.0, 1e-6)
        view.center = wp.vec3(*self._center)
        view.radius = self._radius
        meshes = self._meshes
        still = tuple(array for mesh in meshes[: self._n_still] for array in (mesh.positions, mesh.indices))
        self.bvh = self._part("bvh", still, lambda: Bvh(*_triangles(meshes[: self._n_still]), self.device))
        same_layout = earlier is not None and earlier._vertex_counts == self._vertex_counts
        for name, width, dtype in (
            ("positions", 3, wp.vec3),
            ("normals", 3, wp.vec3),
            ("uv0", 2, wp.vec2),
            ("uv1", 2, wp.vec2),
            ("colors", 4, wp.vec4),
            ("tangents", 4, wp.vec4),
        ):
            setattr(view, name, self._vertex_array(name, width, dtype, same_layout))
        view.rest_positions = earlier.view.rest_positions if earlier and same_layout else view.positions
        faces = tuple(x for mesh in meshes for x in (mesh.indices, len(mesh.positions)))
        view.indices = self._part("indices", faces, lambda: self._array(_triangles(meshes)[1], wp.vec3i))
        flags = {"normals": ks.HAS_NORMALS, "uv0": ks.HAS_UV, "colors": ks.HAS_COLORS, "tangents": ks.HAS_TANGENTS}
        attributes = [sum(int(f) for name, f in flags.items() if getattr(mesh, name) is not None) for mesh in meshes]
        view.triangle_attributes = self._per_triangle("attributes", attributes)
        view.triangle_material = self._per_triangle("material", [mesh.material for mesh in meshes])
        view.triangle_mesh = self._per_triangle("mesh", self._order)

    def _vertex_array(self, name: str, width: int, dtype: Any, same_layout: bool) -> wp.array:
        """A vertex attribute of all meshes; what an earlier scene of the same layout has is copied on the device."""
        values = tuple(_attribute(mesh, name) for mesh in self._meshes)
        known, before = self._earlier.get(name, ((), None))
        changed = [i for i, value in enumerate(values) if i >= len(known) or value is not known[i]]
        n = sum(self._vertex_counts)
        if all(value is None for value in values):
            return self._part(name, (), lambda: self._array(np.zeros((1, width), np.float32), dtype))
        if not (same_layout and before is not None and before.shape[0] == n and 0 < len(changed) < len(values)):
            return self._part(name, values, lambda: self._array(_joined(values, self._vertex_counts, width), dtype))
        array = wp.clone(before)
        first = np.cumsum([0, *self._vertex_counts])
        for i in changed:
            rows = self._array(_joined(values[i : i + 1], self._vertex_counts[i : i + 1], width), dtype)
            wp.copy(array, rows, dest_offset=int(first[i]), count=self._vertex_counts[i])
        return self._part(name, values, lambda: array)

    def _per_triangle(self, name: str, values: list[int]) -> wp.array:
        """A number of each mesh, (triangles,) int."""
        counts = np.diff(self._first_face)
        sources = (*values, *(int(count) for count in counts))
        return self._part(
            f"triangle {name}", sources, lambda: self._array(np.repeat(values, counts).astype(np.int32), wp.int32)
        )

    def _upload_instances(self, view: Any, first_light: dict[int, int], earlier: DeviceScene | None) -> None:
        """Hierarchies of meshes that instances place, and the one over the instances."""
        accel: Any = Accel()
        accel.mesh, accel.nodes, accel.blocks = self.bvh.accel.mesh, self.bvh.accel.nodes, self.bvh.accel.blocks
        instances = self.scene.instances
        self._placed = [instance.mesh for instance in instances]
        self._rest_to_world = np.zeros((0, 4, 4))
        if instances:
            self._fill_instances(accel, first_light, earlier)
        view.accel = accel

    def _fill_instances(self, accel: Any, first_light: dict[int, int], earlier: DeviceScene | None) -> None:
        instances = self.scene.instances
        to_world = np.array([instance.to_world for instance in instances], float)
        usable = ~is_singular(to_world)
        placed = np.array(self._placed)
        boxes = self._instance_boxes(to_world, placed, usable)
        same = earlier is not None and earlier._placed == self._placed
        self._rest_to_world = earlier._rest_to_world if earlier and same else to_world
        instance_view: Any = InstanceView  # wp.struct adds numpy_dtype
        rows: Any = np.zeros(len(instances), instance_view.numpy_dtype())
        rows["to_world"], rows["rest_to_world"] = to_world, self._rest_to_world
        rows["to_object"][usable] = np.linalg.inv(to_world[usable])
        rows["facing"] = np.where(np.linalg.det(to_world[:, :3, :3]) < 0.0, -1.0, 1.0)
        rows["first_light"] = [first_light.get(i, 0) for i in range(len(instances))]
        for place, i in enumerate(self._order[self._n_still :], start=self._n_still):
            bvh = self._mesh_bvh(i)
            shown = np.flatnonzero((placed == i) & usable)
            rows["first_face"][shown] = self._first_face[place]
            for name in ("mesh", "nodes", "blocks"):
                rows[name][shown] = getattr(bvh.accel, name)
        self._instance_bvh = InstanceBvh(boxes, self.device)
        self._instance_bvh.fill(accel)
        accel.instances = wp.array(rows, dtype=InstanceView, device=self.device)

    def _instance_boxes(self, to_world: np.ndarray, placed: np.ndarray, usable: np.ndarray) -> np.ndarray:
        """Boxes (instances, 2, 3) around what instances place, of no size where that cannot be hit."""
        boxes = np.zeros((len(placed), 2, 3))
        for i in self._order[self._n_still :]:
            shown = (placed == i) & usable
            boxes[shown] = transformed_boxes(self.scene.meshes[i].box, to_world[shown])
        too_far = np.flatnonzero((np.abs(boxes) > LARGEST).any(axis=(1, 2)))
        if len(too_far):
            name = self.scene.instances[too_far[0]].name
            raise SceneError(f"instance {name!r}: reaches beyond {LARGEST:g} scene units")
        return boxes

    def _mesh_bvh(self, i: int) -> Bvh:
        """Hierarchy of a mesh in its own space, refitted where only its vertices have moved."""
        mesh = self.scene.meshes[i]
        sources = mesh.indices, len(mesh.positions)
        bvh: Bvh = self._part(f"bvh {i}", sources, lambda: Bvh(mesh.positions, mesh.indices, self.device))
        if bvh.positions is not mesh.positions:  # whichever scene sharing it was the last to fit it
            bvh.refit(mesh.positions)
        return bvh

    def _upload_materials(self, view: Any) -> None:
        has_colors = {mesh.material for mesh in self.scene.meshes if mesh.colors is not None}
        textures = TextureTable()
        materials = [
            _material_view(material, textures, i in has_colors) for i, material in enumerate(self.scene.materials)
        ]
        for material, row in zip(self.scene.materials, materials, strict=True):
            if material.kind == "plastic" and max(material.roughness) > 0.0:
                row.bsdf.plastic_table = self._plastic_table(material).ptr
        view.materials = wp.array(materials, dtype=ks.MaterialView, device=self.device)
        view.textures = wp.array(textures.views or [kt.TextureView()], dtype=kt.TextureView, device=self.device)
        sources = tuple(source for image in textures.images for source in image)
        view.texels = self._part("texels", sources, lambda: self._array(packed_images(textures.images), wp.uint32))
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
                for cdf in environment_cdfs(image.astype(np.float64))
            ],
        )
        view.environment_to_world = wp.mat33(*np.asarray(environment.to_world, float).ravel())
        irradiance = self._part("environment irradiance", (image,), lambda: integrated_luminance(image))
        self._environment_power = irradiance * environment.scale * math.pi * self._radius * self._radius

    def _upload_lights(self, view: Any) -> dict[int, int]:
        """Light table, and what chooses from it; returns the first entry of each emissive instance."""
        emitters, per_mesh = self._emissive_triangles()
        first_light, n = {}, 0
        for emitter in emitters:
            if emitter.instance >= 0:
                first_light[emitter.instance] = n
            n += len(emitter.faces)
        environment_power = None if self.scene.environment is None else self._environment_power
        table = light_table(emitters, self.scene.lights, environment_power, self._radius)
        rows, total = table.rows, float(table.powers.sum())
        view.n_lights = len(rows) if total > 0.0 else 0
        view.n_placed_lights = table.n_placed
        view.environment_light = len(rows) - 1 if environment_power is not None else -1
        cdf = np.concatenate([[0.0], np.cumsum(table.powers) / max(total, 1e-300)])
        cdf[-1] = 1.0
        view.light_cdf = self._array(cdf.astype(np.float32), wp.float32)
        nodes, leaves, view.light_depth = light_tree(table.bounds)
        used = np.flatnonzero(leaves >= 0)
        leaf_lights = np.full(len(leaves), -1, np.int32)
        leaf_lights[used] = first = table.leaves[leaves[used]]
        rows["leaf"][first] = used
        partnered = first[rows["share"][first] < 1.0]
        rows["leaf"][partnered + 1] = rows["leaf"][partnered]
        view.lights = wp.array(rows if len(rows) else np.zeros(1, rows.dtype), dtype=ks.LightView, device=self.device)
        view.light_nodes = wp.array(nodes, dtype=LightNode, device=self.device)
        view.leaf_lights = self._array(leaf_lights, wp.int32)

        def number() -> wp.array:
            light = np.full(self._first_face[-1], -1, np.int32)
            next_light = 0
            for place, faces in per_mesh.items():
                light[faces] = np.arange(len(faces))
                if place < self._n_still:
                    light[faces] += next_light
                    next_light += len(faces)
            return self._array(light, wp.int32)

        counts = (x for place, faces in per_mesh.items() for x in (place, faces))
        view.triangle_light = self._part("triangle light", (int(self._first_face[-1]), *counts), number)
        return first_light

    def _emissive_triangles(self) -> tuple[list[EmissiveTriangles], dict[int, np.ndarray]]:
        """What emits, that in world space first, and the faces that do of each mesh by its place in the order."""
        emitters, per_mesh = [], {}
        for place, (i, mesh) in enumerate(zip(self._order, self._meshes, strict=True)):
            material = self.scene.materials[mesh.material]
            radiance, two_sided = self._mean_emission(material), material.emission_two_sided
            if radiance <= 0.0:
                continue
            first = int(self._first_face[place])
            sources = mesh.positions, mesh.indices, first
            corners, normals, pairs, faces = self._part(f"emitter {i}", sources, partial(_emitter, mesh, first))
            if not len(faces):
                continue
            per_mesh[place] = faces
            if place < self._n_still:
                emitters.append(EmissiveTriangles(faces, corners, normals, pairs, radiance, two_sided))
                continue
            for k, instance in enumerate(self.scene.instances):
                matrix = np.asarray(instance.to_world, float)
                # A singular one is hidden, though what it flattens along another axis would keep an area.
                if instance.mesh != i or is_singular(matrix):
                    continue
                moved = affine(matrix, corners)
                facing = -1.0 if np.linalg.det(matrix[:3, :3]) < 0.0 else 1.0
                turned = facing * normals @ cofactors(matrix[:3, :3]).T
                emitters.append(EmissiveTriangles(faces, moved, turned, pairs, radiance, two_sided, k))
        return emitters, per_mesh

    def _mean_emission(self, material: Material) -> float:
        """Luminance of the emission of one side, averaged over its texture's texels."""
        if not material.emits:
            return 0.0
        emission = np.asarray(material.emission, float)
        texture = material.emission_texture
        if texture is not None:
            emission = emission * self._part(f"mean {id(texture)}", (texture,), lambda: _mean_color(texture))
        return float(emission @ LUMINANCE)


def _material_view(material: Material, textures: TextureTable, has_colors: bool) -> Any:
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


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two tuples hold equal numbers and identical objects."""
    return len(a) == len(b) and all(
        x is y or (isinstance(x, int) and isinstance(y, int) and x == y) for x, y in zip(a, b, strict=True)
    )


def _triangles(meshes: list[Mesh]) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of all meshes."""
    first = np.cumsum([0] + [len(mesh.positions) for mesh in meshes])
    positions = [mesh.positions for mesh in meshes]
    indices = [mesh.indices + offset for mesh, offset in zip(meshes, first[:-1], strict=True)]
    return (
        np.concatenate([np.zeros((0, 3), np.float32), *positions]),
        np.concatenate([np.zeros((0, 3), np.int32), *indices]).astype(np.int32),
    )


def _emitter(mesh: Mesh, first_face: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Corners, normals and quads of the triangles that have an area as `EmissiveTriangles` has them, and their numbers.

    In the mesh's own space, float64.
    """
    corners = mesh.positions[mesh.indices].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    faces = np.flatnonzero(normals.any(axis=1))
    corners, normals = corners[faces], normals[faces]
    return corners, normals, quads(corners, normals), faces + first_face


def _attribute(mesh: Mesh, name: str) -> np.ndarray | None:
    """A vertex attribute; for the second texture coordinates the first where there are no others."""
    value = getattr(mesh, name)
    return mesh.uv0 if value is None and name == "uv1" else value


def _joined(values: tuple[np.ndarray | None, ...], counts: list[int], width: int) -> np.ndarray:
    """A vertex attribute over meshes, zeros where one lacks it."""
    rows = [
        np.zeros((n, width), np.float32) if value is None else value for value, n in zip(values, counts, strict=True)
    ]
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
