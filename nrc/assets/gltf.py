"""glTF 2.0 and GLB reader (Khronos specification 2.0.1).

Understood: metallic-roughness materials with every texture but occlusion, alpha modes, vertex colours, samplers, both
texture coordinate sets, node hierarchies, sparse and normalised accessors, triangle strips and fans, skins at their
rest pose, morph targets at their default weights, perspective cameras, and `EXTENSIONS`. Everything else the file uses
is named in `Model.warnings`; an unknown `extensionsRequired` is an error.

Every material scatters on both sides whatever `doubleSided` says: a path tracer sees the backs of open models, and a
black back helps nobody. Emission keeps to the front unless `doubleSided`. Photometric light units (candela, lux) are
taken as radiometric ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from nrc.assets.fields import Field
from nrc.assets.gltf_buffers import GltfFile
from nrc.assets.gltf_materials import EXTENSIONS as MATERIAL_EXTENSIONS
from nrc.assets.gltf_materials import GltfMaterials
from nrc.assets.model import Model, rigid, transform_light, transform_mesh, unit
from nrc.scene import Camera, DirectionalLight, Light, Material, Mesh, PointLight, SpotLight

EXTENSIONS = (*MATERIAL_EXTENSIONS, "KHR_lights_punctual", "EXT_mesh_gpu_instancing", "KHR_mesh_quantization")
POINTS, TRIANGLES, STRIP, FAN = 0, 4, 5, 6


def read_gltf(path: Path) -> Model:
    """What a .gltf or .glb file holds, flattened to world space. Raises SceneError naming file and field."""
    return _Reader(path).read()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.file = GltfFile(path)
        self.root = self.file.root
        self.model = Model(name=path.stem, decorative_emission=True)
        self.worlds: dict[int, np.ndarray] = {}
        self.default_material: int | None = None

    def read(self) -> Model:
        self._check_extensions()
        materials = GltfMaterials(self.file, self.model)
        self.model.materials = [materials.read(field) for field in self.root.list("materials")]
        for index in self._visit_nodes():
            self._read_node(index)
        if self.root.list("animations"):
            self.model.warn("animations are ignored: the file is shown as it stands at rest")
        return self.model

    def _check_extensions(self) -> None:
        required = [field.string() for field in self.root.list("extensionsRequired")]
        used = [field.string() for field in self.root.list("extensionsUsed")]
        if missing := sorted(set(required) - set(EXTENSIONS)):
            raise self.root.need("extensionsRequired").error(f"not supported: {', '.join(missing)}")
        if unknown := sorted(set(used) - set(EXTENSIONS)):
            self.model.warn(f"glTF extensions not understood and ignored: {', '.join(unknown)}")

    def _visit_nodes(self) -> list[int]:
        """Nodes of the default scene in depth-first order; fills `worlds` with their (4, 4) matrices."""
        nodes = self.root.list("nodes")
        scenes = self.root.list("scenes")
        if scenes:
            chosen = self.root.get("scene")
            scene = scenes[chosen.index(len(scenes), "scenes")] if chosen else scenes[0]
            roots = scene.list("nodes")
        else:
            children = {child.integer() for node in nodes for child in node.list("children")}
            roots = [Field(i, self.root.file, f"nodes[{i}]") for i in range(len(nodes)) if i not in children]
        order: list[int] = []
        stack = [(root, np.eye(4)) for root in reversed(roots)]
        while stack:
            field, parent = stack.pop()
            index = field.index(len(nodes), "nodes")
            if index in self.worlds:
                raise field.error(f"node {index} has two parents or is its own ancestor")
            world = parent @ _local_matrix(nodes[index])
            self.worlds[index] = world
            order.append(index)
            stack += [(child, world) for child in reversed(nodes[index].list("children"))]
        return order

    def _read_node(self, index: int) -> None:
        node, world = self.root.list("nodes")[index], self.worlds[index]
        if (mesh := node.get("mesh")) is not None:
            self._place_mesh(node, mesh, world)
        if (camera := node.get("camera")) is not None:
            self._place_camera(self.file.element("cameras", camera), world)
        extensions = node.get("extensions")
        if extensions and (light := extensions.get("KHR_lights_punctual")):
            self._place_light(light.need("light"), world)

    # Geometry

    def _place_mesh(self, node: Field, index: Field, world: np.ndarray) -> None:
        field = self.file.element("meshes", index)
        name_field = field.get("name") or node.get("name")
        name = name_field.string() if name_field else field.path
        weights = [weight.number() for weight in node.list("weights") or field.list("weights")]
        places = [world @ instance for instance in self._instances(node)]
        for primitive in field.need("primitives").list():
            mesh = self._read_primitive(primitive, name, weights)
            if mesh is None:
                continue
            if (skin := node.get("skin")) is not None and "JOINTS_0" in primitive.need("attributes").value:
                self.model.meshes.append(self._skinned(mesh, primitive.need("attributes"), skin))
                continue
            self.model.meshes += [transform_mesh(mesh, place) for place in places]

    def _instances(self, node: Field) -> list[np.ndarray]:
        """Matrices (4, 4) of EXT_mesh_gpu_instancing, or one identity."""
        extensions = node.get("extensions")
        extension = extensions.get("EXT_mesh_gpu_instancing") if extensions else None
        if extension is None:
            return [np.eye(4)]
        attributes = extension.need("attributes")
        columns = {}
        for key, kind in (("TRANSLATION", "VEC3"), ("ROTATION", "VEC4"), ("SCALE", "VEC3")):
            if (accessor := attributes.get(key)) is not None:
                columns[key] = self.file.accessor(accessor, (kind,))
        counts = {len(values) for values in columns.values()}
        if len(counts) != 1:
            raise attributes.error("needs TRANSLATION, ROTATION or SCALE, all of the same count")
        n = counts.pop()
        translation = columns.get("TRANSLATION", np.zeros((n, 3)))
        rotation = columns.get("ROTATION", np.tile([0.0, 0.0, 0.0, 1.0], (n, 1)))
        scale = columns.get("SCALE", np.ones((n, 3)))
        return [_trs(*values) for values in zip(translation, rotation, scale, strict=True)]

    def _read_primitive(self, primitive: Field, name: str, weights: list[float]) -> Mesh | None:
        """One primitive in the space of its mesh; None if it has no triangles."""
        mode_field = primitive.get("mode")
        mode = mode_field.integer(0, 6) if mode_field else TRIANGLES
        if mode < TRIANGLES:
            self.model.warn(f"mesh {name!r}: {'points' if mode == POINTS else 'lines'} are not drawn")
            return None
        attributes = primitive.need("attributes")
        if attributes.get("POSITION") is None:
            self.model.warn(f"mesh {name!r}: a primitive without POSITION is not drawn")
            return None
        positions = self.file.accessor(attributes.need("POSITION"), ("VEC3",))
        n = len(positions)

        def attribute(key: str, *types: str) -> np.ndarray | None:
            field = attributes.get(key)
            if field is None:
                return None
            values = self.file.accessor(field, types)
            if len(values) != n:
                raise field.error(f"has {len(values)} elements, POSITION has {n}")
            return values

        normals, tangents = attribute("NORMAL", "VEC3"), attribute("TANGENT", "VEC4")
        uv0, uv1 = attribute("TEXCOORD_0", "VEC2"), attribute("TEXCOORD_1", "VEC2")
        colors = attribute("COLOR_0", "VEC3", "VEC4")
        if colors is not None and colors.shape[1] == 3:
            colors = np.column_stack([colors, np.ones(n)])
        for target, weight in zip(primitive.list("targets"), weights, strict=False):
            positions = self._morphed(positions, target.get("POSITION"), weight)
            normals = self._morphed(normals, target.get("NORMAL"), weight) if normals is not None else None
        if normals is None:
            tangents = None  # flat shading: the specification has tangents ignored
        if tangents is not None:
            sign = np.where(tangents[:, 3:] < 0.0, -1.0, 1.0)
            tangents = np.column_stack([unit(tangents[:, :3]), sign])
        return Mesh(
            positions=positions.astype(np.float32),
            indices=self._triangles(primitive, mode, n),
            material=self._material(primitive),
            normals=None if normals is None else unit(normals).astype(np.float32),
            uv0=None if uv0 is None else uv0.astype(np.float32),
            uv1=None if uv1 is None else uv1.astype(np.float32),
            colors=None if colors is None else colors.astype(np.float32),
            tangents=None if tangents is None else tangents.astype(np.float32),
            name=name,
        )

    def _morphed(self, values: np.ndarray, delta: Field | None, weight: float) -> np.ndarray:
        if delta is None or weight == 0.0:
            return values
        change = self.file.accessor(delta, ("VEC3",))
        if len(change) != len(values):
            raise delta.error(f"has {len(change)} elements, the mesh has {len(values)}")
        return values + weight * change

    def _triangles(self, primitive: Field, mode: int, n: int) -> np.ndarray:
        """Indices (m, 3) int32 of a primitive with `n` vertices."""
        field = primitive.get("indices")
        if field is None:
            order = np.arange(n)
        else:
            values = self.file.accessor(field, ("SCALAR",), convert=False)[:, 0]
            if not np.issubdtype(values.dtype, np.unsignedinteger):
                raise field.error(f"accessors[{field.value}] must hold unsigned integers")
            order = values.astype(np.int64)
            if order.max() >= n:
                raise field.error(f"index {order.max()} of {n} vertices")
        if mode == TRIANGLES:
            if len(order) % 3:
                raise primitive.error(f"{len(order)} indices are not whole triangles")
            triangles = order.reshape(-1, 3)
        elif mode == STRIP:
            i = np.arange(max(len(order) - 2, 0))
            odd = i % 2
            triangles = np.column_stack([order[i], order[i + 1 + odd], order[i + 2 - odd]])
        else:
            i = np.arange(max(len(order) - 2, 0))
            triangles = np.column_stack([order[i + 1], order[i + 2], order[np.zeros_like(i)]])
        return np.ascontiguousarray(triangles, np.int32)

    def _skinned(self, mesh: Mesh, attributes: Field, skin_index: Field) -> Mesh:
        """The mesh bent by its joints as they stand; the node's own transform does not count (section 3.7.3.3)."""
        skin = self.file.element("skins", skin_index)
        joints = skin.need("joints").list()
        binds = skin.get("inverseBindMatrices")
        inverse = self.file.accessor(binds, ("MAT4",)) if binds else np.tile(np.eye(4).ravel(), (len(joints), 1))
        if len(inverse) < len(joints):
            raise skin.error(f"{len(inverse)} inverse bind matrices for {len(joints)} joints")
        n_nodes = len(self.root.list("nodes"))
        matrices = np.empty((len(joints), 4, 4))
        for i, joint in enumerate(joints):
            index = joint.index(n_nodes, "nodes")
            if index not in self.worlds:
                raise joint.error(f"node {index} is not in the scene")
            matrices[i] = self.worlds[index] @ inverse[i].reshape(4, 4).T
        which = self.file.accessor(attributes.need("JOINTS_0"), ("VEC4",), convert=False).astype(np.int64)
        weights = self.file.accessor(attributes.need("WEIGHTS_0"), ("VEC4",))
        if which.shape != (len(mesh.positions), 4) or weights.shape != which.shape:
            raise attributes.error("JOINTS_0 and WEIGHTS_0 must have one element for each vertex")
        if which.min() < 0 or which.max() >= len(joints):
            raise attributes.need("JOINTS_0").error(f"joint {which.max()} of {len(joints)}")
        if "JOINTS_1" in attributes.value:
            self.model.warn(f"mesh {mesh.name!r}: only the first four joints of a vertex count")
        blend = np.einsum("nj,njrc->nrc", weights, matrices[which])
        positions = np.einsum("nrc,nc->nr", blend[:, :3, :3], mesh.positions) + blend[:, :3, 3]
        bent = {"positions": positions.astype(np.float32)}
        if mesh.normals is not None:
            bent["normals"] = unit(np.einsum("nrc,nc->nr", blend[:, :3, :3], mesh.normals)).astype(np.float32)
        if mesh.tangents is not None:
            direction = unit(np.einsum("nrc,nc->nr", blend[:, :3, :3], mesh.tangents[:, :3]))
            bent["tangents"] = np.column_stack([direction, mesh.tangents[:, 3]]).astype(np.float32)
        return replace(mesh, **bent)

    def _material(self, primitive: Field) -> int:
        index = primitive.get("material")
        if index is not None:
            return index.index(len(self.root.list("materials")), "materials")
        if self.default_material is None:
            self.default_material = len(self.model.materials)
            self.model.materials.append(
                Material(
                    name="default",
                    kind="metallic_roughness",
                    base_color=(1.0, 1.0, 1.0),
                    metallic=1.0,
                    roughness=(1.0, 1.0),
                    two_sided=True,
                )
            )
        return self.default_material

    # Cameras and lights

    def _place_camera(self, camera: Field, world: np.ndarray) -> None:
        if self.model.camera is not None:
            self.model.warn("the file has several cameras: the first one is used")
            return
        if camera.need("type").string(("perspective", "orthographic")) == "orthographic":
            self.model.warn(f"{camera.path}: orthographic cameras are not supported")
            return
        yfov = camera.need("perspective").need("yfov").number(1e-4, math.pi - 1e-4)
        self.model.camera = Camera(to_world=rigid(world), fov=math.degrees(yfov), fov_axis="y")

    def _place_light(self, index: Field, world: np.ndarray) -> None:
        lights = self.root.need("extensions").need("KHR_lights_punctual").need("lights").list()
        light = lights[index.index(len(lights), "lights")]
        kind = light.need("type").string(("point", "spot", "directional"))
        name_field, color_field, intensity_field = (light.get(key) for key in ("name", "color", "intensity"))
        name = name_field.string() if name_field else light.path
        strength = intensity_field.number(0.0) if intensity_field else 1.0
        r, g, b = color_field.vec3(0.0) if color_field else (1.0, 1.0, 1.0)
        intensity = (r * strength, g * strength, b * strength)
        forward, origin = (0.0, 0.0, -1.0), (0.0, 0.0, 0.0)
        placed: Light
        if kind == "directional":
            placed = DirectionalLight(forward, intensity, name)
        elif kind == "point":
            placed = PointLight(origin, intensity, name)
        else:
            spot = light.need("spot")
            inner_field, outer_field = spot.get("innerConeAngle"), spot.get("outerConeAngle")
            outer = outer_field.number(0.0, math.pi / 2.0) if outer_field else math.pi / 4.0
            inner = inner_field.number(0.0, outer) if inner_field else 0.0
            placed = SpotLight(origin, forward, intensity, inner, outer, "smooth", name)
        if "range" in light.value:
            self.model.warn(f"light {name!r}: range is ignored, light falls off with the square of the distance alone")
        self.model.lights.append(transform_light(placed, world))


def _local_matrix(node: Field) -> np.ndarray:
    """Matrix (4, 4) of a node from `matrix` or from translation, rotation and scale."""
    if (matrix := node.get("matrix")) is not None:
        return np.array(matrix.vector(16)).reshape(4, 4).T
    translation, rotation, scale = (node.get(key) for key in ("translation", "rotation", "scale"))
    return _trs(
        np.array(translation.vec3() if translation else (0.0, 0.0, 0.0)),
        np.array(rotation.vector(4) if rotation else (0.0, 0.0, 0.0, 1.0)),
        np.array(scale.vec3() if scale else (1.0, 1.0, 1.0)),
    )


def _trs(translation: np.ndarray, rotation: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Translation · rotation (quaternion x, y, z, w) · scale."""
    x, y, z, w = rotation / max(float(np.linalg.norm(rotation)), 1e-12)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - z * w), 2.0 * (x * z + y * w)],
        [2.0 * (x * y + z * w), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - x * w)],
        [2.0 * (x * z - y * w), 2.0 * (y * z + x * w), 1.0 - 2.0 * (x * x + y * y)],
    ]
    matrix[:3, :3] *= scale
    matrix[:3, 3] = translation
    return matrix
