"""What a file holds before defaults fill its gaps: the common product of all readers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from nrc.assets.defaults import default_environment, framing_camera
from nrc.scene import (
    Camera,
    DirectionalLight,
    Environment,
    Light,
    Material,
    Mesh,
    RenderSettings,
    Scene,
    SceneError,
    SpotLight,
    Vec3,
)


@dataclass
class Model:
    """Parts of a scene; `to_scene` makes it complete.

    Attributes:
        decorative_emission: Textured emission is no light source: glTF models are made for viewers that bring their own
            light, and glow only here and there.

    The others are those of `Scene`.
    """

    name: str
    meshes: list[Mesh] = field(default_factory=list)
    materials: list[Material] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    camera: Camera | None = None
    environment: Environment | None = None
    settings: RenderSettings = field(default_factory=RenderSettings)
    warnings: list[str] = field(default_factory=list)
    decorative_emission: bool = False

    def warn(self, message: str) -> None:
        """Note `message` once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def to_scene(self) -> Scene:
        """The complete scene: a default environment if nothing lights it, a framing camera if there is none."""
        if not any(len(mesh.indices) for mesh in self.meshes):
            raise SceneError(f"{self.name}: has no triangles")
        emitters = [self.materials[mesh.material] for mesh in self.meshes if self.materials[mesh.material].emits]
        lamps = [lamp for lamp in emitters if not (self.decorative_emission and lamp.emission_texture)]
        environment, camera = self.environment, self.camera
        if environment is None and not self.lights and not lamps:
            environment = default_environment()
            found = "no lights in file but textured emission" if emitters else "no lights in file"
            self.warn(f"{found}: using the default environment (soft grey sky with a broad light in front)")
        if camera is None:
            camera = framing_camera(self.meshes)
            self.warn("no camera in file: using one that frames the geometry")
        return Scene(
            meshes=tuple(self.meshes),
            materials=tuple(self.materials),
            camera=camera,
            lights=tuple(self.lights),
            environment=environment,
            settings=self.settings,
            name=self.name,
            warnings=tuple(self.warnings),
        )


def affine(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (n, 3) moved by a (4, 4) matrix."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, 3) at length 1; those without a direction become +z."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    good = (length > 1e-20) & np.isfinite(length)
    return np.where(good, vectors / np.where(good, length, 1.0), (0.0, 0.0, 1.0))


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
        a, b, c = linear.T  # columns
        cofactor = np.column_stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)])
        normals = unit(normals @ cofactor.T * (-1.0 if mirrored else 1.0)).astype(np.float32)
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


def rigid(matrix: np.ndarray) -> np.ndarray:
    """A (4, 4) affine matrix without its scale, shear and reflection: -z and the plane of y are kept."""
    back = unit(matrix[:3, 2])
    right = unit(np.cross(matrix[:3, 1], back))
    result = np.eye(4)
    result[:3, 0], result[:3, 1], result[:3, 2], result[:3, 3] = right, np.cross(back, right), back, matrix[:3, 3]
    return result


def vec3(values: np.ndarray) -> Vec3:
    """Three plain floats."""
    x, y, z = (float(v) for v in values)
    return x, y, z
