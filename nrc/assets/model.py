"""What a file holds before defaults fill its gaps: the common product of all readers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from nrc.animation import Animation, Deformation, Fixed, Node, Part, Placement, Value
from nrc.assets.defaults import default_environment, framing_camera
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
from nrc.transforms import affine, cofactors, is_singular, look_at, rigid, unit, vec3

FRAMED_POSES = 5  # evenly spread over an animation, that the framing camera sees


@dataclass
class Model:
    """Parts of a scene; `to_scene` makes it complete.

    Attributes:
        decorative_emission: Textured emission is no light source: glTF models are made for viewers that bring their own
            light, and glow only here and there.
        nodes, motions: Of the animation.

    The others are those of `Scene`.
    """

    name: str
    meshes: list[Mesh] = field(default_factory=list)
    materials: list[Material] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    camera: Camera | None = None
    environment: Environment | None = None
    settings: RenderSettings = field(default_factory=RenderSettings)
    nodes: list[Node] = field(default_factory=list)
    motions: list[Part] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    decorative_emission: bool = False

    def warn(self, message: str) -> None:
        """Note `message` once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def add_node(self, node: Node) -> int:
        """Index of a new node of the animation."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def add(self, part: Model, matrix: np.ndarray, node: int = -1, *, flip: bool = False) -> None:
        """Take in all of `part` but its materials, to which its meshes refer as to this model's own already.

        Args:
            matrix: (4, 4), where `part` stands to begin with.
            node: What carries it, or -1 where it stays.
            flip: Turn the other side of its meshes to the front.
        """
        above = self.add_node(Fixed(matrix)) if node < 0 and part.motions else node
        starts = {"mesh": len(self.meshes), "instance": len(self.instances), "light": len(self.lights), "camera": 0}
        n_nodes, takes_camera = len(self.nodes), self.camera is None and part.camera is not None
        self.nodes += [replace(item, parent=item.parent + n_nodes if item.parent >= 0 else -1) for item in part.nodes]
        moving: set[tuple[str, int]] = set()
        for motion in part.motions:
            moving.add((motion.target, motion.index))
            if motion.target != "camera" or takes_camera:
                self.motions.append(_moved(motion, starts[motion.target], n_nodes, above, flip))

        placed = {instance.mesh for instance in part.instances}
        for i, mesh in enumerate(part.meshes):
            mesh = flip_mesh(mesh) if flip else mesh
            self.meshes.append(mesh if i in placed or node >= 0 else transform_mesh(mesh, matrix))
        loose = [Instance(i, np.eye(4), part.meshes[i].name) for i in range(len(part.meshes)) if i not in placed]
        for i, instance in enumerate(part.instances + (loose if node >= 0 else [])):
            if node >= 0 and ("instance", i) not in moving:
                self.motions.append(Placement("instance", len(self.instances), node, instance.to_world))
            to_world = matrix @ instance.to_world
            self.instances.append(replace(instance, mesh=starts["mesh"] + instance.mesh, to_world=to_world))
        for i, light in enumerate(part.lights):
            if node >= 0 and ("light", i) not in moving:
                self.motions.append(Placement("light", len(self.lights), node, _light_matrix(light)))
            self.lights.append(transform_light(light, matrix))
        if part.camera is not None and takes_camera:
            if node >= 0 and ("camera", 0) not in moving:
                self.motions.append(Placement("camera", 0, node, part.camera.to_world))
            self.camera = replace(part.camera, to_world=rigid(matrix @ part.camera.to_world))

    def to_scene(self) -> Scene:
        """The complete scene: a default environment if nothing lights it, a framing camera if there is none."""
        if not any(len(mesh.indices) for mesh in self.meshes):
            raise SceneError(f"{self.name}: has no triangles")
        lit = {motion.index for motion in self.motions if motion.target == "material"}  # at some time
        used = {mesh.material for mesh in self.meshes}
        emitters = [self.materials[i] for i in used if self.materials[i].emits or i in lit]
        lamps = [lamp for lamp in emitters if not (self.decorative_emission and lamp.emission_texture)]
        environment = self.environment
        if environment is None and not self.lights and not lamps:
            environment = default_environment()
            found = "no lights in file but textured emission" if emitters else "no lights in file"
            self.warn(f"{found}: using the default environment (soft grey sky with a broad light in front)")
        if self.camera is None:
            self.warn("no camera in file: using one that frames the geometry")
        scene = Scene(
            meshes=tuple(self.meshes),
            materials=tuple(self.materials),
            camera=self.camera or Camera(np.eye(4)),
            lights=tuple(self.lights),
            environment=environment,
            settings=self.settings,
            name=self.name,
            warnings=tuple(self.warnings),
            instances=tuple(self.instances),
            animation=Animation(tuple(self.nodes), tuple(self.motions)) if self.motions else None,
        ).at(0.0)
        return scene if self.camera is not None else replace(scene, camera=_framing_camera(scene))


def _moved(motion: Part, start: int, n_nodes: int, above: int, flip: bool) -> Part:
    """The motion of a model's part for a model where its object's and its nodes' indices begin later."""
    if isinstance(motion, Placement):
        return replace(motion, index=motion.index + start, node=motion.node + n_nodes, above=above)
    if isinstance(motion, Value):
        return replace(motion, index=motion.index + start)
    skin, morph, rest = motion.skin, motion.morph, motion.rest
    if skin is not None:
        skin = replace(skin, joints=tuple(joint + n_nodes for joint in skin.joints))
    if flip:
        rest = flip_mesh(rest)
        morph = replace(morph, normals=-morph.normals) if morph is not None and morph.normals is not None else morph
    return Deformation(motion.mesh + start, rest, morph, skin)


def _light_matrix(light: Light) -> np.ndarray:
    """A (4, 4) matrix that takes a light from the origin, where it shines along -z, to where it is."""
    origin = np.zeros(3) if isinstance(light, DirectionalLight) else np.array(light.position)
    direction = np.array((0.0, 0.0, -1.0) if isinstance(light, PointLight) else light.direction)
    return look_at(origin, origin - direction, np.array((0.0, 1.0, 0.0)))


def _framing_camera(scene: Scene) -> Camera:
    """`framing_camera` of the scene, or of some of its poses."""
    if scene.animation is None:
        return framing_camera(flatten(scene).meshes)
    times = np.linspace(0.0, scene.animation.duration, FRAMED_POSES)
    return framing_camera([mesh for time in times for mesh in flatten(scene.at(time)).meshes])


def flatten(scene: Scene) -> Scene:
    """The scene as it stands, with its instances as meshes of their own in world space, after the others.

    Instances whose transform is singular are left out, and so is the animation. A scene without either is returned
    itself. Raises SceneError where no triangle is left.
    """
    if not scene.instances and scene.animation is None:
        return scene
    placed = {instance.mesh for instance in scene.instances}
    meshes = [mesh for i, mesh in enumerate(scene.meshes) if i not in placed]
    for instance in scene.instances:
        if not is_singular(instance.to_world):
            mesh = transform_mesh(scene.meshes[instance.mesh], instance.to_world)
            meshes.append(replace(mesh, name=instance.name or mesh.name))
    return replace(scene, meshes=tuple(meshes), instances=(), animation=None)


@np.errstate(over="ignore", invalid="ignore")  # the mesh refuses what is not finite
def transform_mesh(mesh: Mesh, matrix: np.ndarray) -> Mesh:
    """The mesh moved by an affine (4, 4) matrix.

    Normals move by the cofactor matrix, so that they stay normal under unequal scale and on their own side under a
    reflection; a reflection reverses the winding and the sign of the bitangents, so that fronts stay fronts.
    """
    linear = matrix[:3, :3].astype(float)
    mirrored = np.linalg.det(linear) < 0.0
    normals, tangents = mesh.normals, mesh.tangents
    if normals is not None:
        normals = unit(normals @ cofactors(linear).T * (-1.0 if mirrored else 1.0)).astype(np.float32)
    if tangents is not None:
        direction = unit(tangents[:, :3] @ linear.T)
        tangents = np.column_stack([direction, tangents[:, 3] * (-1.0 if mirrored else 1.0)]).astype(np.float32)
    positions = affine(matrix, mesh.positions.astype(float)).astype(np.float32)
    return replace(
        mesh,
        positions=positions,
        indices=np.ascontiguousarray(mesh.indices[:, ::-1]) if mirrored else mesh.indices,
        normals=normals,
        tangents=tangents,
    )


def flip_mesh(mesh: Mesh) -> Mesh:
    """The mesh with its other side in front."""
    return replace(
        mesh,
        indices=np.ascontiguousarray(mesh.indices[:, ::-1]),
        normals=None if mesh.normals is None else -mesh.normals,
        tangents=None if mesh.tangents is None else mesh.tangents * np.array([1.0, 1.0, 1.0, -1.0], np.float32),
    )


def transform_light(light: Light, matrix: np.ndarray) -> Light:
    """The light moved by an affine (4, 4) matrix; its strength does not change with scale."""
    if isinstance(light, DirectionalLight):
        return replace(light, direction=vec3(unit(matrix[:3, :3] @ light.direction)))
    position = vec3(affine(matrix, np.asarray([light.position]))[0])
    if isinstance(light, SpotLight):
        return replace(light, position=position, direction=vec3(unit(matrix[:3, :3] @ light.direction)))
    return replace(light, position=position)
