"""glTF 2.0 and GLB reader (Khronos specification 2.0.1).

Understood: metallic-roughness materials with every texture but occlusion, alpha modes, vertex colours, samplers, both
texture coordinate sets, node hierarchies, sparse and normalised accessors, triangle strips and fans, animations of
nodes and morph weights, skins, perspective cameras, and `EXTENSIONS`. Everything else the file uses is named in
`Model.warnings`; an unknown `extensionsRequired` is an error.

A mesh that one node uses and nothing moves lies in world space. One that moves, bends or stands in several places is
kept once, in its own space, with an instance for each place; a skin's mesh is in world space already.

Every material scatters on both sides whatever `doubleSided` says: a path tracer sees the backs of open models, and a
black back helps nobody. Emission keeps to the front unless `doubleSided`. Photometric light units (candela, lux) are
taken as radiometric ones.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from nrc.animation import Deformation, Fixed, Placement, Track, Trs
from nrc.assets.fields import Field
from nrc.assets.gltf_animation import Target, read_tracks
from nrc.assets.gltf_buffers import GltfFile
from nrc.assets.gltf_deformation import read_change, read_morph, read_skin
from nrc.assets.gltf_materials import EXTENSIONS as MATERIAL_EXTENSIONS
from nrc.assets.gltf_materials import GltfMaterials
from nrc.assets.model import Model, transform_light, transform_mesh
from nrc.scene import Camera, DirectionalLight, Instance, Light, Material, Mesh, PointLight, SpotLight
from nrc.transforms import decompose, rigid, trs, unit

EXTENSIONS = (*MATERIAL_EXTENSIONS, "KHR_lights_punctual", "EXT_mesh_gpu_instancing", "KHR_mesh_quantization")
POINTS, TRIANGLES, STRIP, FAN = 0, 4, 5, 6


def read_gltf(path: Path) -> Model:
    """What a .gltf or .glb file holds. Raises SceneError naming file and field."""
    return _Reader(path).read()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.file = GltfFile(path)
        self.root = self.file.root
        self.model = Model(name=path.stem, decorative_emission=True)
        self.worlds: dict[int, np.ndarray] = {}
        self.parents: dict[int, int] = {}
        self.tracks: dict[Target, Track] = {}
        self.moving: set[int] = set()
        self.uses: Counter[tuple[int, tuple[float, ...]]] = Counter()
        self.shared: dict[tuple[int, tuple[float, ...]], list[int]] = {}
        self.nodes: dict[int, int] = {}
        self.default_material: int | None = None

    def read(self) -> Model:
        self._check_extensions()
        materials = GltfMaterials(self.file, self.model)
        self.model.materials = [materials.read(field) for field in self.root.list("materials")]
        order = self._visit_nodes()
        self._read_animations(order)
        for index in order:
            self._read_node(index)
        return self.model

    def _check_extensions(self) -> None:
        required = [field.string() for field in self.root.list("extensionsRequired")]
        used = [field.string() for field in self.root.list("extensionsUsed")]
        if missing := sorted(set(required) - set(EXTENSIONS)):
            raise self.root.need("extensionsRequired").error(f"not supported: {', '.join(missing)}")
        if unknown := sorted(set(used) - {*EXTENSIONS, "KHR_animation_pointer"}):  # whose channels warn themselves
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
        stack = [(root, -1) for root in reversed(roots)]
        while stack:
            field, parent = stack.pop()
            index = field.index(len(nodes), "nodes")
            if index in self.worlds:
                raise field.error(f"node {index} has two parents or is its own ancestor")
            local = _local_matrix(nodes[index])
            self.worlds[index] = local if parent < 0 else self.worlds[parent] @ local
            self.parents[index] = parent
            order.append(index)
            stack += [(child, index) for child in reversed(nodes[index].list("children"))]
        return order

    def _read_animations(self, order: list[int]) -> None:
        """Fill `tracks`, the `moving` nodes, and `uses`: how often each mesh stands somewhere."""
        nodes = self.root.list("nodes")
        n_targets = {}
        for index in order:
            if (mesh := nodes[index].get("mesh")) is not None:
                primitives = self.file.element("meshes", mesh).need("primitives").list()
                n_targets[index] = max((len(primitive.list("targets")) for primitive in primitives), default=0)
        with_targets = {index: n for index, n in n_targets.items() if n}
        self.tracks = read_tracks(self.file, self.model, self.worlds, with_targets)
        for index in order:
            own = any((index, path) in self.tracks for path in ("translation", "rotation", "scale"))
            if own or self.parents[index] in self.moving:
                self.moving.add(index)
            if index in n_targets and not self._is_deformed(index):
                node = nodes[index]
                key = (node.need("mesh").integer(), tuple(self._weights(node)))
                self.uses[key] += 1 if self._instancing(node) is None else 2

    def _is_deformed(self, index: int) -> bool:
        """Whether the mesh of a node bends over time, so that no other can share it."""
        node = self.root.list("nodes")[index]
        if (index, "weights") in self.tracks:
            return True
        skin = node.get("skin")
        if skin is None:
            return False
        joints = self.file.element("skins", skin).need("joints").list()
        return any(joint.value in self.moving for joint in joints)

    def _node(self, index: int) -> int:
        """The animation's node for a node of the file."""
        missing = []  # it and what it hangs from; no recursion, which deep files would exhaust
        i = index
        while i >= 0 and i not in self.nodes:
            missing.append(i)
            i = self.parents[i] if i in self.moving else -1
        for i in reversed(missing):
            made: Fixed | Trs = Fixed(self.worlds[i])
            if i in self.moving:
                made = replace(self._trs(i), parent=self.nodes.get(self.parents[i], -1))
            self.nodes[i] = self.model.add_node(made)
        return self.nodes[index]

    def _trs(self, index: int) -> Trs | Fixed:
        """A node with its tracks, and what it has at rest where there are none."""
        node = self.root.list("nodes")[index]
        matrix = _local_matrix(node)
        tracks = [self.tracks.get((index, path)) for path in ("translation", "rotation", "scale")]
        if not any(tracks):
            return Fixed(matrix)
        try:
            at_rest = decompose(matrix) if "matrix" in node.value else _trs_values(node)
        except ValueError as error:
            raise node.need("matrix").error(f"an animated node's matrix {error}") from None
        translation, rotation, scale = at_rest
        return Trs(
            tracks[0] or Track.constant(translation),
            tracks[1] or Track.constant(rotation, rotation=True),
            tracks[2] or Track.constant(scale),
        )

    def _read_node(self, index: int) -> None:
        node = self.root.list("nodes")[index]
        if (mesh := node.get("mesh")) is not None:
            self._place_mesh(index, node, mesh)
        if (camera := node.get("camera")) is not None:
            self._place_camera(self.file.element("cameras", camera), index)
        extensions = node.get("extensions")
        if extensions and (light := extensions.get("KHR_lights_punctual")):
            self._place_light(light.need("light"), index)

    # Geometry

    def _place_mesh(self, index: int, node: Field, mesh: Field) -> None:
        field = self.file.element("meshes", mesh)
        name_field = field.get("name") or node.get("name")
        name = name_field.string() if name_field else field.path
        weights = self._weights(node)
        key = (mesh.integer(), tuple(weights))
        deformed, skin = self._is_deformed(index), node.get("skin")
        primitives = field.need("primitives").list()
        if deformed or skin is not None:
            for primitive in primitives:
                self._place_primitive(index, node, primitive, name, weights)
        elif index in self.moving or self.uses[key] > 1:
            if key not in self.shared:
                self.shared[key] = self._add_meshes([self._read_primitive(item, name, weights) for item in primitives])
            for i in self.shared[key]:
                self._add_instances(i, index, node, name)
        else:
            read = [self._read_primitive(item, name, weights) for item in primitives]
            self._add_meshes([transform_mesh(item, self.worlds[index]) for item in read if item is not None])

    def _place_primitive(self, index: int, node: Field, primitive: Field, name: str, weights: list[float]) -> None:
        """A primitive of a mesh that bends, or might."""
        animated, targets = self.tracks.get((index, "weights")), primitive.list("targets")
        mesh = self._read_primitive(primitive, name, weights if animated is None or not targets else [])
        if mesh is None:
            return
        morph = (
            read_morph(self.file, targets, animated, len(mesh.positions)) if animated is not None and targets else None
        )
        attributes = primitive.need("attributes")
        skin_index = node.get("skin")
        if skin_index is None or "JOINTS_0" not in attributes.value:
            (i,) = self._add_meshes([mesh])
            self._add_instances(i, index, node, name)
            if morph is not None:
                self.model.motions.append(Deformation(i, mesh, morph))
            return
        skin = read_skin(self.file, attributes, skin_index, len(mesh.positions), self.worlds)
        if morph is None and not any(joint in self.moving for joint in skin.joints):
            self._add_meshes([replace(mesh, **Deformation(0, mesh, None, skin).fields(0.0, self.worlds))])
            return
        (i,) = self._add_meshes([mesh])
        skin = replace(skin, joints=tuple(self._node(joint) for joint in skin.joints))
        self.model.instances.append(Instance(i, np.eye(4), name))  # the node's own transform does not count (3.7.3.3)
        self.model.motions.append(Deformation(i, mesh, morph, skin))

    def _add_meshes(self, meshes: list[Mesh | None] | list[Mesh]) -> list[int]:
        """Indices of new meshes, without those that have no triangles."""
        start = len(self.model.meshes)
        self.model.meshes += [mesh for mesh in meshes if mesh is not None]
        return list(range(start, len(self.model.meshes)))

    def _add_instances(self, mesh: int, index: int, node: Field, name: str) -> None:
        """Place a mesh wherever a node places it."""
        offsets = self._instancing(node)
        for offset in [np.eye(4)] if offsets is None else offsets:
            if index in self.moving:
                placement = Placement("instance", len(self.model.instances), self._node(index), offset)
                self.model.motions.append(placement)
            self.model.instances.append(Instance(mesh, self.worlds[index] @ offset, name))

    def _weights(self, node: Field) -> list[float]:
        """Morph weights of a node at rest."""
        mesh = self.file.element("meshes", node.need("mesh"))
        return [weight.number() for weight in node.list("weights") or mesh.list("weights")]

    def _instancing(self, node: Field) -> list[np.ndarray] | None:
        """Matrices (4, 4) of EXT_mesh_gpu_instancing, or None."""
        extensions = node.get("extensions")
        extension = extensions.get("EXT_mesh_gpu_instancing") if extensions else None
        if extension is None:
            return None
        attributes = extension.need("attributes")
        columns = {}
        for key, kind in (("TRANSLATION", "VEC3"), ("ROTATION", "VEC4"), ("SCALE", "VEC3")):
            if (accessor := attributes.get(key)) is not None:
                columns[key] = self.file.accessor(accessor, (kind,))
                if not np.isfinite(columns[key]).all():
                    raise accessor.error(f"accessors[{accessor.value}]: has values that are not finite")
        counts = {len(values) for values in columns.values()}
        if len(counts) != 1:
            raise attributes.error("needs TRANSLATION, ROTATION or SCALE, all of the same count")
        n = counts.pop()
        translation = columns.get("TRANSLATION", np.zeros((n, 3)))
        rotation = columns.get("ROTATION", np.tile([0.0, 0.0, 0.0, 1.0], (n, 1)))
        scale = columns.get("SCALE", np.ones((n, 3)))
        return [trs(*values) for values in zip(translation, rotation, scale, strict=True)]

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
        return values + weight * read_change(self.file, delta, len(values))

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

    def _place_camera(self, camera: Field, index: int) -> None:
        if self.model.camera is not None:
            self.model.warn("the file has several cameras: the first one is used")
            return
        if camera.need("type").string(("perspective", "orthographic")) == "orthographic":
            self.model.warn(f"{camera.path}: orthographic cameras are not supported")
            return
        yfov = camera.need("perspective").need("yfov").number(1e-4, math.pi - 1e-4)
        self.model.camera = Camera(to_world=rigid(self.worlds[index]), fov=math.degrees(yfov), fov_axis="y")
        if index in self.moving:
            self.model.motions.append(Placement("camera", 0, self._node(index)))

    def _place_light(self, reference: Field, index: int) -> None:
        lights = self.root.need("extensions").need("KHR_lights_punctual").need("lights").list()
        light = lights[reference.index(len(lights), "lights")]
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
        if index in self.moving:
            self.model.motions.append(Placement("light", len(self.model.lights), self._node(index)))
        self.model.lights.append(transform_light(placed, self.worlds[index]))


def _local_matrix(node: Field) -> np.ndarray:
    """Matrix (4, 4) of a node from `matrix` or from translation, rotation and scale."""
    if (matrix := node.get("matrix")) is not None:
        affine = np.array(matrix.vector(16)).reshape(4, 4).T
        affine[3] = (0.0, 0.0, 0.0, 1.0)  # whatever rounding left there
        return affine
    return trs(*_trs_values(node))


def _trs_values(node: Field) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    translation, rotation, scale = (node.get(key) for key in ("translation", "rotation", "scale"))
    return (
        np.array(translation.vec3() if translation else (0.0, 0.0, 0.0)),
        np.array(rotation.vector(4) if rotation else (0.0, 0.0, 0.0, 1.0)),
        np.array(scale.vec3() if scale else (1.0, 1.0, 1.0)),
    )
