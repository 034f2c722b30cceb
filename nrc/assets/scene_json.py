"""Scene JSON reader: this project's own scene description.

Every key is optional unless said otherwise; an unknown key is an error. Paths are relative to the JSON file.

    name, description   strings
    materials           {name: material}
    assets              [asset], required
    lights              [light]
    environment         {file | radiance: [r, g, b], scale: 1, rotate}
    camera              {look_at: {origin, target, up: [0, 1, 0]} | to_world, fov: 40, fov_axis: "x" | "y" | "smaller" |
                        "larger", aperture_radius: 0, focus_distance}
    settings            {width: 512, height: 512, spp: 64, max_depth: 16, rr_depth: 5}

asset: `file` (glTF, GLB, OBJ, PLY, STL) or `shape` (rectangle, cube, sphere, disk, cylinder: see `nrc.assets.shapes`)
is required. `material` is a name from `materials` or an inline material; required for a shape, for a file it replaces
all of the file's. `materials` overrides a file's materials by their names: a name from `materials` replaces one, an
object changes the fields it has. `to_world` places it; `flip_normals: true` turns its other side to the front; `name`.
Lights inside a glTF file come along; its camera is used if the scene has none.

material: the fields of `nrc.scene.Material` under the same names and with the same defaults, except that `two_sided` is
true, that a colour is white where only its texture is given, and that `roughness` may be one number.

texture: {file | checkerboard: {color0, color1}, scale: [1, 1] or one number, offset: [0, 0], uv_set: 0,
wrap: "repeat" | "clamp" | "mirror", filter: "bilinear" | "nearest", srgb}. A texture coordinate is multiplied by scale,
then offset is added. `srgb` is true by default for 8-bit images of colours and emission.

light: {kind: "point", position, intensity}, {kind: "spot", position, target | direction, intensity, outer_angle,
inner_angle [degrees], falloff: "linear" | "smooth"} or {kind: "directional", direction, irradiance}; `name`.

to_world: a (4, 4) matrix as four rows, or one step or an array of steps, the first applied first. A step is
{scale: 2 | [x, y, z], rotate: {axis, angle [degrees]}, translate: [x, y, z]}, applied in this order, or
{look_at: {origin, target, up}}, which moves the origin to `origin` and turns +z to `target`.

Animation: {keyframes: [[seconds, value], ...], interpolation: "linear" | "step" | "cubic"} in the place of a value
makes it change over time, "linear" if nothing is said; "cubic" is a Catmull-Rom spline through the values. It may stand
for `scale`, `angle`, `translate`, `origin` and `target` of a transform, for a whole `to_world` (translation, rotation
and scale of the values then change each for itself), for `fov`, `aperture_radius` and `focus_distance` of the camera,
`position`, `direction`, `target`, `intensity` and `irradiance` of lights, `scale` of the environment and the `angle` of
its `rotate`, and `emission` of materials. Before the first and after the last keyframe nothing changes. Animations
inside a glTF file come along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nrc.animation import Curve, Gap, Node, Placement, Trs, Value
from nrc.assets import read_model, shapes
from nrc.assets.fields import Field
from nrc.assets.keyframes import read_direction, read_look_at, read_track, read_transform, read_turn
from nrc.assets.model import Model
from nrc.assets.pictures import read_radiance, read_texels
from nrc.scene import (
    MATERIAL_KINDS,
    AnyTexture,
    Camera,
    Checkerboard,
    DirectionalLight,
    Environment,
    Light,
    Material,
    Mesh,
    PointLight,
    RenderSettings,
    SceneError,
    SpotLight,
    Texture,
    Vec3,
)
from nrc.transforms import rigid

SHAPES: dict[str, Callable[[], shapes.Shape]] = {
    "rectangle": shapes.rectangle,
    "cube": shapes.cube,
    "sphere": shapes.sphere,
    "disk": shapes.disk,
    "cylinder": shapes.cylinder,
}
ASSET_FORMATS = (".gltf", ".glb", ".obj", ".ply", ".stl")
COLORS = ("base_color", "specular", "transmittance", "emission", "eta", "k")
CHOICES = {"kind": MATERIAL_KINDS, "distribution": ("ggx", "beckmann"), "alpha_mode": ("opaque", "mask", "blend")}
FLAGS = ("nonlinear", "emission_two_sided", "opacity_from_base_color", "two_sided")
SIGNED = ("normal_scale", "bump_scale", "spec_tint", "flatness")
MATERIAL_KEYS = tuple(item.name for item in dataclass_fields(Material) if item.name != "name")


def read_scene_json(path: Path) -> Model:
    """What a scene JSON file describes. Raises SceneError naming file and field."""
    return _Reader(path).read()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = Field.parse(path.read_bytes(), path.name)
        self.model = Model(name=path.stem)
        self.indices: dict[str, int] = {}
        self.images: dict[Path, np.ndarray] = {}

    def read(self) -> Model:
        root, model = self.root, self.model
        root.check_object(("name", "description", "materials", "assets", "lights", "environment", "camera", "settings"))
        if (name := root.get("name")) is not None:
            model.name = name.string()
        if (description := root.get("description")) is not None:
            description.string()
        materials = root.get("materials")
        for key, field in materials.members().items() if materials else ():
            self.indices[key] = self._new_material(field, key)
        for field in root.need("assets").list():
            self._asset(field)
        for field in root.list("lights"):
            self._light(field)
        if (environment := root.get("environment")) is not None:
            model.environment = self._environment(environment)
        if (camera := root.get("camera")) is not None:
            model.camera = self._camera(camera)
        if (settings := root.get("settings")) is not None:
            model.settings = _settings(settings)
        return model

    # Assets

    def _asset(self, field: Field) -> None:
        field.check_object(("name", "file", "shape", "material", "materials", "to_world", "flip_normals"))
        if ("file" in field.value) == ("shape" in field.value):
            raise field.error("needs either file or shape")
        to_world, flip = field.get("to_world"), field.get("flip_normals")
        matrix, node = self._place(read_transform(to_world)) if to_world else (np.eye(4), -1)
        part = self._shape(field) if "shape" in field.value else self._file(field)
        if "camera" in self.root.value:  # which is this scene's
            part.camera = None
            part.motions = [motion for motion in part.motions if motion.target != "camera"]
        self.model.add(part, matrix, node, flip=flip is not None and flip.boolean())

    def _place(self, nodes: list[Node]) -> tuple[np.ndarray, int]:
        """Matrix (4, 4) of a transform at time 0, and its node in the animation, -1 if it stands still."""
        matrix, node = np.eye(4), -1
        moves = any(item.end > 0.0 for item in nodes)
        for item in nodes:
            matrix = matrix @ item.matrix(0.0)
            if moves:
                node = self.model.add_node(replace(item, parent=node))
        return matrix, node

    def _follow(
        self, target: Literal["camera", "light", "environment", "material"], index: int, name: str, curve: Curve
    ) -> Any:
        """The value of a curve at time 0, as a field `name` that follows it from then on has it."""
        value = Value(target, index, name, curve)
        if value.end > 0.0:
            self.model.motions.append(value)
        return value.fields(0.0, ())[name]

    def _shape(self, field: Field) -> Model:
        kind = field.need("shape").string(tuple(SHAPES))
        if "materials" in field.value:
            raise field.child("materials").error("is for files; a shape has one material")
        shape = SHAPES[kind]()
        name = field.get("name")
        mesh = Mesh(
            shape.positions,
            shape.indices,
            self._material_index(field.need("material")),
            normals=shape.normals,
            uv0=shape.uv,
            name=name.string() if name else f"{field.path} ({kind})",
        )
        return Model(name=kind, meshes=[mesh])

    def _file(self, field: Field) -> Model:
        """The file's model with its materials moved into this scene's list."""
        file = field.need("file")
        path = self._existing(file)
        if path.suffix.lower() not in ASSET_FORMATS:
            raise file.wrong(f"a file of a format among {', '.join(ASSET_FORMATS)}")
        try:
            part = read_model(path)
        except SceneError as error:
            raise file.error(str(error)) from None
        self.model.decorative_emission |= part.decorative_emission
        for warning in part.warnings:
            self.model.warn(warning if path.name in warning else f"{path.name}: {warning}")
        own, overrides = field.get("material"), field.get("materials")
        if own is not None:
            index = self._material_index(own)
            part.meshes = [replace(mesh, material=index) for mesh in part.meshes]
            return part
        places = [self._add_material(material) for material in part.materials]
        names = [material.name for material in part.materials]
        for name, override in overrides.members().items() if overrides else ():
            if name not in names:
                raise override.error(f"no such material in {path.name}; it has: {', '.join(names)}")
            for i in [i for i, other in enumerate(names) if other == name]:
                if isinstance(override.value, str):
                    places[i] = self._material_index(override)
                else:
                    self._set_material(places[i], override, part.materials[i])
        part.meshes = [replace(mesh, material=places[mesh.material]) for mesh in part.meshes]
        return part

    def _existing(self, field: Field) -> Path:
        path = self.path.parent / field.string()
        if not path.is_file():
            raise field.error(f"no such file: {field.value!r}")
        return path

    # Materials

    def _add_material(self, material: Material) -> int:
        self.model.materials.append(material)
        return len(self.model.materials) - 1

    def _material_index(self, field: Field) -> int:
        """Index of a material given by name or inline."""
        if not isinstance(field.value, str):
            return self._new_material(field, field.path)
        if field.value not in self.indices:
            raise field.error(f"no material {field.value!r}; there are: {', '.join(self.indices)}")
        return self.indices[field.value]

    def _new_material(self, field: Field, name: str) -> int:
        base = Material(name=name, two_sided=True)
        index = self._add_material(base)
        self._set_material(index, field, base)
        return index

    def _set_material(self, index: int, field: Field, base: Material) -> None:
        """Make material `index` of `base` with the fields that the object has."""
        field.check_object(MATERIAL_KEYS)
        changes: dict[str, Any] = {}
        for key, value in field.members().items():
            if key.endswith("_texture"):
                changes[key] = self._texture(value, color=key.removesuffix("_texture") in COLORS)
                if key.removesuffix("_texture") in ("base_color", "emission"):
                    changes.setdefault(key.removesuffix("_texture"), (1.0, 1.0, 1.0))
            elif key == "emission":
                changes[key] = self._follow("material", index, key, read_track(value, _color))
            elif key in COLORS:
                changes[key] = value.vec3(0.0)
            elif key in CHOICES:
                changes[key] = value.string(CHOICES[key])
            elif key in FLAGS:
                changes[key] = value.boolean()
            elif key == "roughness":
                pair = value.vector(2, 0.0, 1.0) if isinstance(value.value, list) else (value.number(0.0, 1.0),) * 2
                changes[key] = pair
            elif key == "ior":
                changes[key] = value.number(1e-3)
            else:
                changes[key] = value.number(-math.inf if key in SIGNED else 0.0)
        try:
            self.model.materials[index] = replace(base, **changes)
        except SceneError as error:
            raise field.error(str(error)) from None

    def _texture(self, field: Field, *, color: bool) -> AnyTexture:
        field.check_object(("file", "checkerboard", "scale", "offset", "uv_set", "wrap", "filter", "srgb"))
        if ("file" in field.value) == ("checkerboard" in field.value):
            raise field.error("needs either file or checkerboard")
        scale, offset, uv_set = field.get("scale"), field.get("offset"), field.get("uv_set")
        su, sv = 1.0, 1.0
        if scale is not None:
            su, sv = scale.vector(2) if isinstance(scale.value, list) else (scale.number(),) * 2
        tu, tv = offset.vector(2) if offset else (0.0, 0.0)
        matrix = np.array([[su, 0.0, tu], [0.0, sv, tv]])
        coordinates = uv_set.integer(0, 1) if uv_set else 0
        if (checker := field.get("checkerboard")) is not None:
            checker.check_object(("color0", "color1"))
            first, second = checker.get("color0"), checker.get("color1")
            return Checkerboard(
                first.vec3(0.0) if first else (0.4, 0.4, 0.4),
                second.vec3(0.0) if second else (0.2, 0.2, 0.2),
                transform=matrix,
                uv_set=coordinates,
            )
        file = field.need("file")
        wrap, interpolation, srgb = (field.get(key) for key in ("wrap", "filter", "srgb"))
        path = self._existing(file)
        if path not in self.images:
            self.images[path] = read_texels(path, f"{file.file}: {file.path}")
        image = self.images[path]
        wrapping = wrap.string(("repeat", "clamp", "mirror")) if wrap else "repeat"
        return Texture(
            image,
            srgb=srgb.boolean() if srgb else color and image.dtype == np.uint8,
            transform=matrix,
            uv_set=coordinates,
            wrap_u=wrapping,  # type: ignore[arg-type]
            wrap_v=wrapping,  # type: ignore[arg-type]
            filter=interpolation.string(("bilinear", "nearest")) if interpolation else "bilinear",  # type: ignore[arg-type]
            name=path.name,
        )

    def _environment(self, field: Field) -> Environment:
        field.check_object(("file", "radiance", "scale", "rotate"))
        if ("file" in field.value) == ("radiance" in field.value):
            raise field.error("needs either file or radiance")
        scale, rotate = field.get("scale"), field.get("rotate")
        if (file := field.get("file")) is not None:
            path = self._existing(file)
            image = read_radiance(path, f"{file.file}: {file.path}")
        else:
            image = np.array(field.need("radiance").vec3(0.0), np.float32).reshape(1, 1, 3)
        rotation = np.eye(3)
        if rotate is not None:
            matrix, node = self._place([Trs(rotation=read_turn(rotate))])
            rotation = matrix[:3, :3]
            if node >= 0:
                self.model.motions.append(Placement("environment", 0, node))
        strength = self._follow("environment", 0, "scale", read_track(scale, _positive)) if scale else 1.0
        return Environment(image, rotation, strength)

    # Lights and camera

    def _light(self, field: Field) -> None:
        kind = field.need("kind").string(("point", "spot", "directional"))
        keys: dict[str, tuple[str, ...]] = {
            "point": ("position", "intensity"),
            "spot": ("position", "target", "direction", "intensity", "outer_angle", "inner_angle", "falloff"),
            "directional": ("direction", "irradiance"),
        }
        field.check_object(("kind", "name", *keys[kind]))
        name_field = field.get("name")
        name = name_field.string() if name_field else field.path
        values = {
            key: self._follow("light", len(self.model.lights), key, read_track(field.need(key), read))
            for key, read in (("position", Field.vec3), ("intensity", _color), ("irradiance", _color))
            if key in keys[kind]
        }
        if kind != "point":
            values["direction"] = self._direction(field, kind)
        light: Light
        if kind == "point":
            light = PointLight(**values, name=name)
        elif kind == "directional":
            light = DirectionalLight(**values, name=name)
        else:
            outer = field.need("outer_angle").number(1e-3, 90.0)
            inner, falloff = field.get("inner_angle"), field.get("falloff")
            light = SpotLight(
                **values,
                inner_angle=math.radians(inner.number(0.0, outer)) if inner else 0.0,
                outer_angle=math.radians(outer),
                falloff=falloff.string(("linear", "smooth")) if falloff else "linear",  # type: ignore[arg-type]
                name=name,
            )
        self.model.lights.append(light)

    def _direction(self, field: Field, kind: str) -> Vec3:
        """Where a light shines, along a direction or, from its position, to a target."""
        if kind == "spot" and ("target" in field.value) == ("direction" in field.value):
            raise field.error("needs either target or direction")
        if "target" not in field.value:
            curve: Curve = read_track(field.need("direction"), read_direction)
        else:
            target = field.need("target")
            curve = Gap(read_track(field.need("position"), Field.vec3), read_track(target, Field.vec3))
            for time in sorted({0.0, *curve.origin.times, *curve.target.times}):
                if np.linalg.norm(curve.at(time)) < 1e-12:
                    raise target.error("gives no direction: the vector has no length")
        return self._follow("light", len(self.model.lights), "direction", curve)

    def _camera(self, field: Field) -> Camera:
        field.check_object(("look_at", "to_world", "fov", "fov_axis", "aperture_radius", "focus_distance"))
        if ("look_at" in field.value) == ("to_world" in field.value):
            raise field.error("needs either look_at or to_world")
        turned, distance = np.eye(4), 1.0
        if (look_at := field.get("look_at")) is not None:
            matrix, node = self._place([read_look_at(look_at)])
            turned = np.diag([-1.0, 1.0, -1.0, 1.0])
            origin, target = (read_track(look_at.need(key), Field.vec3) for key in ("origin", "target"))
            if "focus_distance" not in field.value:
                distance = self._follow("camera", 0, "focus_distance", Gap(origin, target, length=True))
        else:
            matrix, node = self._place(read_transform(field.need("to_world")))
        if node >= 0:
            self.model.motions.append(Placement("camera", 0, node, turned))
        values = {
            key: self._follow("camera", 0, key, read_track(field.child(key), read))
            for key, read in (("fov", _fov), ("aperture_radius", _positive), ("focus_distance", _distance))
            if key in field.value
        }
        axis = field.get("fov_axis")
        return Camera(
            rigid(matrix @ turned),
            fov_axis=axis.string(("x", "y", "smaller", "larger")) if axis else "x",  # type: ignore[arg-type]
            **{"focus_distance": distance, **values},
        )


def _color(field: Field) -> Vec3:
    return field.vec3(0.0)


def _positive(field: Field) -> float:
    return field.number(0.0)


def _distance(field: Field) -> float:
    return field.number(1e-9)


def _fov(field: Field) -> float:
    return field.number(1e-3, 179.0)


def _settings(field: Field) -> RenderSettings:
    lowest = {"width": 1, "height": 1, "spp": 1, "max_depth": -1, "rr_depth": 0}
    field.check_object(lowest)
    return RenderSettings(**{key: value.integer(lowest[key], 2**31 - 1) for key, value in field.members().items()})
