"""Mitsuba 3 scene files, read through the optional `mitsuba` package.

Mitsuba parses the file (all versions since 0.4, which it upgrades) and loads the meshes, so that geometry is exactly
its own. Spheres, disks and cylinders become triangles: 64 × 128, 128 and 128 of them around, with exact normals, within
0.03 % of the radius of the true surface; emitting ones are scaled to have the true area. Every file is rendered by a
path tracer with a box filter. Whatever is substituted or ignored is named in `Scene.warnings`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nrc.assets import shapes
from nrc.assets.defaults import framing_camera
from nrc.assets.mitsuba_document import Document, Node, import_mitsuba, mitsuba_session, plain
from nrc.assets.mitsuba_materials import VERTEX_COLORS, Materials, read_image
from nrc.assets.model import flatten, flip_mesh, transform_mesh
from nrc.scene import (
    Camera,
    DirectionalLight,
    Environment,
    Instance,
    Light,
    Material,
    Mesh,
    PointLight,
    RenderSettings,
    Scene,
    SceneError,
    SpotLight,
)

MAX_DOUBLED_ROWS = 2048  # environment maps with more rows keep their size
SHAPE_PROPERTIES = (
    *("to_world", "flip_normals", "face_normals", "silhouette_sampling_weight", "filename", "shape_index"),
    *("flip_tex_coords", "radius", "center", "p0", "p1"),
)
TO_OURS = np.diag([-1.0, 1.0, -1.0, 1.0])  # Mitsuba's camera has +x left and looks along +z


def load_mitsuba(path: Path | str, defines: dict[str, str] | None = None) -> Scene:
    """Scene in a Mitsuba XML file; `defines` replaces its `$parameters`, as `mitsuba -D name=value` does.

    The active Mitsuba variant stays as it was (`scalar_rgb` if there was none).

    Raises:
        SceneError: If `mitsuba` is not installed, the file or one it refers to is missing or wrong, a plugin does not
            exist, or a parameter in `defines` does not occur in the file. The message names file and element.
    """
    path = Path(path)
    mi = import_mitsuba(path)
    if not path.is_file():
        raise SceneError(f"{path}: no such file")
    with mitsuba_session(mi, path.resolve().parent):
        return _Reader(Document(mi, path, dict(defines or {}))).scene()


class _Reader:
    def __init__(self, document: Document) -> None:
        self.document, self.mi = document, document.mi
        self.bsdfs = Materials(document)
        self.materials: list[Material] = []
        self.colours: list[tuple[str, float] | None] = []  # per material: mesh attribute that is its base colour
        self.meshes: list[Mesh] = []
        self.groups: dict[int, range] = {}  # meshes of each shape group in use
        self.instances: list[Instance] = []
        self.lights: list[Light] = []
        self.environment: Environment | None = None
        self._material_of: dict[tuple[int, int], int] = {}

    def scene(self) -> Scene:
        root = self.document.node(0)
        self.document.check_plugins()
        if root.kind != "Scene":
            raise root.error("expected a <scene>")
        for _, shape in root.children("Shape"):
            self.add_shape(shape)
        for _, emitter in root.children("Emitter"):
            self.add_emitter(emitter)
        for kind in ("BSDF", "Texture"):
            root.children(kind)  # definitions; those in use have been reached through what refers to them
        if not self.meshes:
            raise SceneError(f"{self.document.path}: the scene has no shapes")
        settings = RenderSettings()
        camera: Camera | None = None
        sensors = [child for _, child in root.children("Sensor")]
        if sensors:
            camera, settings = self.sensor(sensors[0], settings)
        for other in sensors[1:]:
            other.seen.update(other.names)
            other.warn("ignored; the first sensor is used")
        for _, integrator in root.children("Integrator"):
            settings = self.integrator(integrator, settings)
        for _, child in root.children():
            if child.kind not in ("Shape", "Emitter", "BSDF", "Texture", "Sensor", "Integrator"):
                child.warn("ignored")
        if camera is None:
            self.document.warn("there is no sensor: the camera frames the scene")
        scene = Scene(
            meshes=tuple(self.meshes),
            materials=tuple(self.materials),
            camera=camera or Camera(np.eye(4)),
            instances=tuple(self.instances),
            lights=tuple(self.lights),
            environment=self.environment,
            settings=settings,
            name=self.document.path.stem,
            warnings=self.document.collected_warnings(),
        )
        return scene if camera is not None else replace(scene, camera=framing_camera(flatten(scene).meshes))

    # Shapes

    def add_shape(self, node: Node) -> None:
        """Append the meshes or instances of a shape."""
        if node.plugin == "shapegroup":  # seen through its instances only
            return
        if node.plugin == "instance":
            for _, group in node.children("Shape"):
                self.instances += [Instance(i, node.matrix(), node.id) for i in self.add_group(group)]
            return
        if node.plugin == "merge":
            for _, child in node.children("Shape"):
                self.add_shape(child)
            return
        node.ignore(*SHAPE_PROPERTIES)
        material = self.material(node)
        shape = self.document.instantiate(node, frozenset({"Texture"}))
        if shape.is_mesh():
            mesh = self.triangles(node, shape, material)
        elif node.plugin in ("sphere", "disk", "cylinder", "rectangle"):
            mesh = self.tessellated(node, shape, material)
        else:
            node.warn("left out: no such shape here")
            return
        for _, child in node.children():
            if child.kind not in ("BSDF", "Emitter"):
                child.warn(f"ignored on {node}")
        self.meshes.append(_with_tangents(mesh) if self.materials[material].normal_texture is not None else mesh)

    def add_group(self, group: Node) -> range:
        """Indices of the meshes of a shape group, in its own space; appended once."""
        if group.index not in self.groups:
            first = len(self.meshes)
            for _, child in group.children("Shape"):
                self.add_shape(child)
            self.groups[group.index] = range(first, len(self.meshes))
        return self.groups[group.index]

    def triangles(self, node: Node, shape: Any, material: int) -> Mesh:
        """Triangles of a Mitsuba mesh."""
        positions = np.array(shape.vertex_positions_buffer(), dtype=np.float32).reshape(-1, 3)
        indices = np.array(shape.faces_buffer(), dtype=np.int64).astype(np.int32).reshape(-1, 3)
        normals = uv = colors = None
        if shape.has_vertex_normals():
            normals = np.array(shape.vertex_normals_buffer(), dtype=np.float32).reshape(-1, 3)
        if shape.has_vertex_texcoords():
            uv = np.array(shape.vertex_texcoords_buffer(), dtype=np.float32).reshape(-1, 2)
        if self.colours[material] is not None:
            colors = self.vertex_colors(node, shape, *self.colours[material])  # type: ignore[misc]
        mesh = Mesh(positions, indices, material, normals, uv, colors=colors, name=node.id or node.plugin)
        return _facing(flip_mesh(mesh) if node.get("flip_normals", False) else mesh)

    def vertex_colors(self, node: Node, shape: Any, attribute: str, scale: float) -> np.ndarray | None:
        if not attribute.startswith("vertex_") or not shape.has_attribute(attribute):
            node.warn(f"has no vertex attribute {attribute!r}; its colour is 1")
            return None
        values = np.array(shape.attribute_buffer(attribute), dtype=np.float32).reshape(shape.vertex_count(), -1)
        rgb = np.broadcast_to(values[:, :3] if values.shape[1] >= 3 else values[:, :1], (len(values), 3))
        return np.column_stack([rgb * np.float32(scale), np.ones(len(values), np.float32)])

    def tessellated(self, node: Node, shape: Any, material: int) -> Mesh:
        """Triangles of a curved shape, in the parameterisation Mitsuba gives it."""
        matrix = np.array(self.mi.traverse(shape)["to_world"].matrix, dtype=np.float64).reshape(4, 4)
        if (
            node.plugin == "sphere"
            and np.ptp(np.linalg.norm(matrix[:3, :3], axis=0)) > 1e-3 * np.abs(matrix[:3, :3]).max()
        ):
            node.warn("scaled differently along its axes: an ellipsoid here, which Mitsuba does not have")
        local = {
            "sphere": shapes.sphere,
            "disk": lambda: shapes.disk(128),
            "cylinder": shapes.cylinder,
            "rectangle": shapes.rectangle,
        }[node.plugin]()
        positions = local.positions.astype(np.float64)
        if self.materials[material].emits and node.plugin != "rectangle":
            grow = _equal_area(node.plugin, positions, local.indices)
            positions *= (grow, grow, grow if node.plugin == "sphere" else 1.0)
        mesh = Mesh(
            positions.astype(np.float32), local.indices, material, local.normals, local.uv, name=node.id or node.plugin
        )
        inward = bool(node.get("flip_normals", False))
        if node.plugin == "sphere":  # Mitsuba turns a mirrored sphere inside out, unlike the others
            inward ^= bool(np.linalg.det(matrix[:3, :3]) < 0.0)
        elif node.plugin in ("disk", "rectangle"):  # their to_world contains the flip
            inward = False
        if self.colours[material] is not None:
            node.warn("has no vertex attributes; its colour is 1")
        mesh = transform_mesh(mesh, matrix)
        return flip_mesh(mesh) if inward else mesh

    def material(self, shape: Node) -> int:
        """Index of the material a shape has: its BSDF together with its emission."""
        bsdfs = [child for _, child in shape.children("BSDF")]
        emitters = [child for _, child in shape.children("Emitter")]
        key = (bsdfs[0].index if bsdfs else -1, emitters[0].index if emitters else -1)
        if key in self._material_of:
            return self._material_of[key]
        fields: dict[str, Any] = {"kind": "diffuse", "name": shape.id}
        if bsdfs:
            converted = self.bsdfs.convert(bsdfs[0])
            fields = converted | {"name": converted["name"] or shape.id}
        elif emitters:
            fields["base_color"] = (0.0, 0.0, 0.0)  # Mitsuba's default for a shape that emits
        colours = fields.pop(VERTEX_COLORS, None)
        if emitters:
            fields |= self.area_emission(emitters[0])
        material = Material(**fields)
        known = zip(self.materials, self.colours, strict=True)
        same = [i for i, (other, c) in enumerate(known) if c == colours and _same_surface(material, other)]
        if not same:
            self.materials.append(material)
            self.colours.append(colours)
        self._material_of[key] = same[0] if same else len(self.materials) - 1
        return self._material_of[key]

    # Emitters

    def area_emission(self, node: Node) -> dict[str, Any]:
        if node.plugin != "area":
            node.warn("left out: no such light here")
            node.seen.update(node.names)
            return {}
        node.ignore("sampling_weight")
        radiance = node.colour("radiance", 1.0, "emissive_texture")
        if not isinstance(radiance, Node):
            return {"emission": radiance}
        texture = self.bsdfs.texture(radiance, "colour")
        return {"emission": (1.0, 1.0, 1.0), "emission_texture": texture} if texture else {}

    def add_emitter(self, node: Node) -> None:
        node.ignore("sampling_weight")
        matrix = node.matrix()
        direction = _tuple(matrix[:3, 2] / np.linalg.norm(matrix[:3, 2]))
        if node.plugin == "point":
            position = node.get("position")
            place = matrix[:3, 3] if position is None else np.array(position, dtype=np.float64)
            self.lights.append(PointLight(_tuple(place), self.uniform(node, "intensity"), node.id))
        elif node.plugin == "spot":
            cutoff = node.number("cutoff_angle", 20.0)
            beam = node.number("beam_width", cutoff * 3.0 / 4.0)
            if node.has("texture"):
                node.warn("the texture is left out")
                node.get("texture").seen.update(node.get("texture").names)
            angles = float(np.radians(beam)), float(np.radians(cutoff))
            self.lights.append(
                SpotLight(_tuple(matrix[:3, 3]), direction, self.uniform(node, "intensity"), *angles, "linear", node.id)
            )
        elif node.plugin == "directional":
            given = node.get("direction")
            if given is not None:
                along = np.array(given, dtype=np.float64)
                direction = _tuple(along / np.linalg.norm(along))
            self.lights.append(DirectionalLight(direction, self.uniform(node, "irradiance"), node.id))
        elif node.plugin in ("constant", "envmap"):
            if self.environment is not None:
                raise node.error("only one environment emitter is possible")
            self.environment = (
                Environment.constant(self.uniform(node, "radiance")) if node.plugin == "constant" else self.envmap(node)
            )
        else:
            node.warn("left out: no such light here")
            node.seen.update(node.names)

    def uniform(self, node: Node, name: str) -> tuple[float, float, float]:
        value = node.colour(name, 1.0, "emissive_texture")
        if isinstance(value, Node):
            node.warn(f"the texture of {name} is left out")
            value.seen.update(value.names)
            return (1.0, 1.0, 1.0)
        return value

    def envmap(self, node: Node) -> Environment:
        node.ignore("mis_compensation")
        filename = str(node.get("filename", ""))
        try:
            image, srgb = read_image(self.mi, str(self.mi.file_resolver().resolve(filename)), False)
        except RuntimeError as error:
            raise node.error(f"{filename}: {plain(error)}") from None
        linear = image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
        if srgb:
            linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4).astype(np.float32)
        rgb = np.broadcast_to(linear, (*linear.shape[:2], 3))
        rotation = node.matrix()[:3, :3]
        lengths = np.linalg.norm(rotation, axis=0)
        if not np.allclose(rotation.T @ rotation, np.diag(lengths**2), atol=1e-5) or np.ptp(lengths) > 1e-4:
            raise node.error("to_world must be a rotation")
        rows = _mitsuba_rows_to_texels(rgb)
        if not np.isfinite(rows).all() or rows.min() < 0.0:
            node.warn("values that are negative or not finite are set to 0")
            rows = np.where(np.isfinite(rows), np.maximum(rows, 0.0), 0.0).astype(np.float32)
        return Environment(np.ascontiguousarray(rows), rotation / lengths, node.number("scale", 1.0))

    # Camera and settings

    def sensor(self, node: Node, settings: RenderSettings) -> tuple[Camera, RenderSettings]:
        if node.plugin not in ("perspective", "thinlens"):
            raise node.error("only perspective and thinlens sensors are supported")
        node.ignore("near_clip", "far_clip", "shutter_open", "shutter_close", "srf")
        for _, film in node.children("Film"):
            settings = self.film(film, settings)
        for _, sampler in node.children("Sampler"):
            settings = replace(settings, spp=int(sampler.number("sample_count", 4)))
            sampler.ignore("seed")
            if sampler.plugin != "independent":
                sampler.warn("substituted by independent samples")
                sampler.ignore("jitter", "strength")
        if any(node.number(f"principal_point_offset_{axis}", 0.0) for axis in "xy"):
            node.warn("the principal point offset is ignored")
        axis = str(node.get("fov_axis", "x"))
        if axis == "diagonal" or not node.has("fov"):  # the focal length is 50 mm if not given
            node.ignore("focal_length", "fov")
            made = self.document.instantiate(node, frozenset({"Film"}))
            fov, axis = float(np.array(self.mi.traverse(made)["x_fov"]).ravel()[0]), "x"
        else:
            fov = node.number("fov", 40.0)
        if axis not in ("x", "y", "smaller", "larger"):
            raise node.error(f"fov_axis {axis!r} does not exist")
        to_world = node.matrix()
        if not np.allclose(np.linalg.norm(to_world[:3, :3], axis=0), 1.0, atol=1e-3):
            raise node.error("to_world of a camera must not scale")
        lens: dict[str, float] = {}
        if node.plugin == "thinlens":
            lens = {"aperture_radius": node.number("aperture_radius", 0.0)}
            lens["focus_distance"] = node.number("focus_distance", 1.0)
        return Camera(to_world @ TO_OURS, fov, axis, **lens), settings  # type: ignore[arg-type]

    def film(self, node: Node, settings: RenderSettings) -> RenderSettings:
        node.ignore("file_format", "pixel_format", "component_format", "banner", "compensate", "sample_border")
        if node.plugin != "hdrfilm":
            node.warn("substituted by an RGB film")
        crop = [name for name in node.names if name.startswith("crop_")]
        if crop:
            node.ignore(*crop)
            node.warn(f"{', '.join(crop)} ignored: the whole picture is rendered")
        filters = [child for _, child in node.children("ReconstructionFilter")]
        if not filters or filters[0].plugin != "box":
            name = filters[0].plugin if filters else "gaussian (Mitsuba's default)"
            node.warn(f"reconstruction filter {name} substituted by box")
        for child in filters:
            child.seen.update(child.names)
        return replace(settings, width=int(node.number("width", 768)), height=int(node.number("height", 576)))

    def integrator(self, node: Node, settings: RenderSettings) -> RenderSettings:
        nested = [child for _, child in node.children("Integrator")]
        if nested:
            node.seen.update(node.names)
            node.warn(f"substituted by its {nested[0]}")
            return self.integrator(nested[0], settings)
        if node.plugin != "path":
            node.warn("substituted by path")
        if node.get("hide_emitters", False):
            node.warn("hide_emitters is ignored: emitters are visible")
        if node.plugin == "direct":
            return replace(settings, max_depth=2)
        depths = {"max_depth": node.number("max_depth", -1), "rr_depth": node.number("rr_depth", 5)}
        return replace(settings, **{name: int(value) for name, value in depths.items()})


def _facing(mesh: Mesh) -> Mesh:
    """Mesh whose triangles wind so that their front is the side of their vertex normals, which Mitsuba goes by."""
    if mesh.normals is None:
        return mesh
    a, b, c = (mesh.positions[mesh.indices[:, i]].astype(np.float64) for i in range(3))
    mean = mesh.normals[mesh.indices].astype(np.float64).sum(axis=1)
    away = np.einsum("ij,ij->i", np.cross(b - a, c - a), mean) < 0.0
    indices = np.where(away[:, None], mesh.indices[:, ::-1], mesh.indices).astype(np.int32)
    return replace(mesh, indices=np.ascontiguousarray(indices))


def _with_tangents(mesh: Mesh) -> Mesh:
    """Mesh with its own vertices for each triangle and Mitsuba's frame there: s along dp/du, t = n × s."""
    if mesh.uv0 is None:
        return mesh
    corners = mesh.indices.ravel()
    arrays = {name: getattr(mesh, name) for name in ("positions", "normals", "uv0", "colors")}
    split = {name: np.ascontiguousarray(value[corners]) for name, value in arrays.items() if value is not None}
    p = split["positions"].reshape(-1, 3, 3).astype(np.float64)
    uv = split["uv0"].reshape(-1, 3, 2).astype(np.float64)
    e1, e2, d1, d2 = p[:, 1] - p[:, 0], p[:, 2] - p[:, 0], uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    det = d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]
    dp_du = (e1 * d2[:, 1:] - e2 * d1[:, 1:]) * np.where(det < 0.0, -1.0, 1.0)[:, None]
    length = np.linalg.norm(dp_du, axis=1, keepdims=True)
    dp_du = np.where(length > 0.0, dp_du / np.maximum(length, 1e-300), [1.0, 0.0, 0.0])
    tangents = np.column_stack([np.repeat(dp_du, 3, axis=0), np.ones(len(corners))]).astype(np.float32)
    indices = np.arange(len(corners), dtype=np.int32).reshape(-1, 3)
    return replace(mesh, **split, indices=indices, tangents=tangents)  # type: ignore[arg-type]


def _equal_area(shape: str, positions: np.ndarray, indices: np.ndarray) -> float:
    """Factor on the radius that gives a tessellation the area of the unit sphere, disk or cylinder."""
    a, b, c = (positions[indices[:, i]] for i in range(3))
    area = float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2.0)
    ratio = {"sphere": 4.0 * np.pi, "disk": np.pi, "cylinder": 2.0 * np.pi}[shape] / area
    return float(ratio if shape == "cylinder" else np.sqrt(ratio))


def _mitsuba_rows_to_texels(image: np.ndarray) -> np.ndarray:
    """Resample a map whose rows Mitsuba puts at v = i / (height - 1) to rows at v = (i + 1/2) / height.

    Columns agree already. Twice the rows keep the piecewise linear function but for its bends, which are cut by an
    eighth of the second difference.
    """
    height = image.shape[0]
    if height == 1:
        return image.astype(np.float32)
    rows = min(2 * (height - 1), max(height, MAX_DOUBLED_ROWS))
    y = (np.arange(rows) + 0.5) / rows * (height - 1)
    first = np.minimum(y.astype(int), height - 2)
    t = (y - first)[:, None, None]
    return (image[first] * (1.0 - t) + image[first + 1] * t).astype(np.float32)


def _same_surface(a: Material, b: Material) -> bool:
    """Whether two materials differ in their names at most."""
    return all(x is y or x == y for name, x in vars(a).items() if name != "name" for y in (getattr(b, name),))


def _tuple(vector: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(c) for c in vector)
    return x, y, z
