"""Scene description: frozen host data that readers produce and renderers upload.

Conventions. World space is right-handed, lengths in scene units. Geometry is in world space, but for meshes that
instances place; a triangle's front side is the one from which its vertices wind counter-clockwise. Texture coordinates
have v = 0 at the top row of the image. Colours are linear Rec. 709 RGB; radiance in [W m^-2 sr^-1].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

MATERIAL_KINDS = (
    "diffuse",
    "conductor",
    "dielectric",
    "thin_dielectric",
    "plastic",
    "metallic_roughness",
    "principled",
)
MaterialKind = Literal[
    "diffuse", "conductor", "dielectric", "thin_dielectric", "plastic", "metallic_roughness", "principled"
]
Vec3 = tuple[float, float, float]
Wrap = Literal["repeat", "clamp", "mirror"]


class SceneError(ValueError):
    """A scene or asset file that cannot be used; the message names the file and the field."""


@dataclass(frozen=True, eq=False)
class Texture:
    """An image looked up at a surface point.

    Attributes:
        image: (height, width, 1...4) uint8 or float32, first row at v = 0. Two channels are luminance and alpha.
        srgb: Whether colour channels are sRGB-encoded (alpha never is).
        transform: (2, 3) matrix applied to (u, v, 1) before the lookup.
        uv_set: Texture coordinate set of the mesh, 0 or 1.
        wrap_u, wrap_v: What happens outside [0, 1].
        filter: Reconstruction between texels.
        name: For messages.
    """

    image: np.ndarray
    srgb: bool = False
    transform: np.ndarray = field(default_factory=lambda: np.eye(2, 3))
    uv_set: int = 0
    wrap_u: Wrap = "repeat"
    wrap_v: Wrap = "repeat"
    filter: Literal["bilinear", "nearest"] = "bilinear"
    name: str = ""

    def __post_init__(self) -> None:
        image = self.image
        if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4) or 0 in image.shape:
            raise SceneError(f"texture {self.name!r}: expected an image (height, width, 1...4), got {image.shape}")
        if image.dtype not in (np.uint8, np.float32):
            raise SceneError(f"texture {self.name!r}: expected uint8 or float32 texels, got {image.dtype}")
        if self.uv_set not in (0, 1):
            raise SceneError(f"texture {self.name!r}: texture coordinate set {self.uv_set} is not supported (0 or 1)")


@dataclass(frozen=True, eq=False)
class Checkerboard:
    """Procedural 2×2 checker over the unit square: `color0` where both or neither of frac(u), frac(v) exceed 1/2."""

    color0: Vec3 = (0.4, 0.4, 0.4)
    color1: Vec3 = (0.2, 0.2, 0.2)
    transform: np.ndarray = field(default_factory=lambda: np.eye(2, 3))
    uv_set: int = 0


AnyTexture = Texture | Checkerboard


@dataclass(frozen=True, eq=False)
class Material:
    """A surface: how it scatters, emits and lets light pass. Every textured quantity is factor × texture.

    Which fields a kind reads:

    - diffuse: base_color.
    - conductor: eta, k, specular, roughness, distribution.
    - dielectric: ior, specular (reflection tint), transmittance (transmission tint), roughness, distribution.
    - thin_dielectric: ior, specular, transmittance.
    - plastic: base_color, ior, specular, roughness, distribution, nonlinear.
    - metallic_roughness: base_color, metallic, roughness, ior, transmission, specular_factor, specular
      (glTF 2.0 with KHR_materials_ior, _transmission and _specular; always GGX).
    - principled: base_color, metallic, roughness, ior, spec_tint, anisotropic, sheen, sheen_tint, clearcoat,
      clearcoat_gloss, flatness, transmission (Mitsuba 3 `principled`; always GGX).

    Attributes:
        roughness: Perceptual, along tangent and bitangent: microfacet width alpha = roughness². 0 is perfectly smooth.
        ior: Index of refraction inside over outside (outside is where the normal points).
        eta, k: Complex index of refraction of a conductor, real and imaginary part, per channel.
        emission: Emitted radiance [W m^-2 sr^-1]; on the front side unless `emission_two_sided`.
        opacity: Alpha factor, multiplied with base_color_texture's alpha if `opacity_from_base_color` and with
            opacity_texture's first channel.
        alpha_mode: "opaque" ignores opacity, "mask" tests it against alpha_cutoff, "blend" lets 1 - opacity pass.
        two_sided: Both sides scatter as the front does. Otherwise the back of a reflecting surface is black
            (dielectrics always have two sides).
        normal_texture: Tangent-space normals, 0...1 encoded, scaled in x and y by normal_scale.
        bump_texture: Displacement along the normal in scene units, times bump_scale.
        metallic_roughness_texture: glTF packing: roughness factor in G, metallic factor in B.
        roughness_texture: First channel multiplies roughness (both axes).
    """

    name: str = ""
    kind: MaterialKind = "diffuse"
    base_color: Vec3 = (0.5, 0.5, 0.5)
    base_color_texture: AnyTexture | None = None
    specular: Vec3 = (1.0, 1.0, 1.0)
    specular_texture: AnyTexture | None = None
    transmittance: Vec3 = (1.0, 1.0, 1.0)
    transmittance_texture: AnyTexture | None = None
    roughness: tuple[float, float] = (0.0, 0.0)
    roughness_texture: AnyTexture | None = None
    distribution: Literal["ggx", "beckmann"] = "ggx"
    ior: float = 1.5
    eta: Vec3 = (0.0, 0.0, 0.0)
    k: Vec3 = (1.0, 1.0, 1.0)
    nonlinear: bool = False
    metallic: float = 0.0
    metallic_roughness_texture: AnyTexture | None = None
    transmission: float = 0.0
    transmission_texture: AnyTexture | None = None
    specular_factor: float = 1.0
    specular_factor_texture: AnyTexture | None = None  # alpha channel, as KHR_materials_specular packs it
    spec_tint: float = 0.0
    anisotropic: float = 0.0
    sheen: float = 0.0
    sheen_tint: float = 0.0
    clearcoat: float = 0.0
    clearcoat_gloss: float = 0.0
    flatness: float = 0.0
    emission: Vec3 = (0.0, 0.0, 0.0)
    emission_texture: AnyTexture | None = None
    emission_two_sided: bool = False
    opacity: float = 1.0
    opacity_from_base_color: bool = False
    opacity_texture: AnyTexture | None = None
    alpha_mode: Literal["opaque", "mask", "blend"] = "opaque"
    alpha_cutoff: float = 0.5
    two_sided: bool = False
    normal_texture: AnyTexture | None = None
    normal_scale: float = 1.0
    bump_texture: AnyTexture | None = None
    bump_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in MATERIAL_KINDS:
            raise SceneError(f"material {self.name!r}: unknown kind {self.kind!r}; one of {', '.join(MATERIAL_KINDS)}")
        for name in ("base_color", "specular", "transmittance", "emission", "eta", "k"):
            value = getattr(self, name)
            if len(value) != 3 or not np.all(np.isfinite(value)) or min(value) < 0.0:
                raise SceneError(f"material {self.name!r}: {name} must be three finite numbers >= 0, got {value}")
        if not (self.ior > 0.0 and np.isfinite(self.ior)):
            raise SceneError(f"material {self.name!r}: ior must be positive, got {self.ior}")

    @property
    def emits(self) -> bool:
        return max(self.emission) > 0.0


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles in world space, or in a space of their own where instances place them.

    Attributes:
        positions: (n, 3) float32.
        indices: (m, 3) int32 into the vertices.
        material: Index into `Scene.materials`.
        normals: (n, 3) float32 unit shading normals, or None for flat shading.
        uv0, uv1: (n, 2) float32 texture coordinates, or None.
        colors: (n, 4) float32 linear vertex colours that multiply base_color and opacity, or None.
        tangents: (n, 4) float32 unit tangents with the bitangent's sign in w, or None (derived from uv0 where needed).
        name: For messages.
    """

    positions: np.ndarray
    indices: np.ndarray
    material: int
    normals: np.ndarray | None = None
    uv0: np.ndarray | None = None
    uv1: np.ndarray | None = None
    colors: np.ndarray | None = None
    tangents: np.ndarray | None = None
    name: str = ""

    def __post_init__(self) -> None:
        n = len(self.positions)
        shapes = {"positions": 3, "normals": 3, "uv0": 2, "uv1": 2, "colors": 4, "tangents": 4}
        for attribute, width in shapes.items():
            value = getattr(self, attribute)
            if value is None:
                continue
            if value.shape != (n, width) or value.dtype != np.float32:
                raise SceneError(
                    f"mesh {self.name!r}: {attribute} must be ({n}, {width}) float32, got {value.shape} {value.dtype}"
                )
            if not np.isfinite(value).all():
                raise SceneError(f"mesh {self.name!r}: {attribute} has values that are not finite")
        if self.indices.ndim != 2 or self.indices.shape[1] != 3 or self.indices.dtype != np.int32:
            raise SceneError(f"mesh {self.name!r}: indices must be (m, 3) int32, got {self.indices.shape}")
        if self.indices.size and (self.indices.min() < 0 or self.indices.max() >= n):
            raise SceneError(f"mesh {self.name!r}: a triangle refers to a vertex outside 0...{n - 1}")

    @cached_property
    def box(self) -> np.ndarray:
        """Lower and upper corner in the mesh's own space, (2, 3); of no vertices infinity and minus infinity."""
        return np.array([self.positions.min(axis=0, initial=np.inf), self.positions.max(axis=0, initial=-np.inf)])


@dataclass(frozen=True, eq=False)
class Instance:
    """A mesh placed in the world; any number of instances share one.

    Attributes:
        mesh: Index into `Scene.meshes`.
        to_world: (4, 4) affine transform. A reflection keeps fronts in front; a singular one hides the mesh.
        name: For messages.
    """

    mesh: int
    to_world: np.ndarray
    name: str = ""

    def __post_init__(self) -> None:
        matrix = np.asarray(self.to_world)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or (matrix[3] != (0.0, 0.0, 0.0, 1.0)).any():
            raise SceneError(f"instance {self.name!r}: to_world must be a finite affine (4, 4) matrix")


@dataclass(frozen=True)
class PointLight:
    """Isotropic point; `intensity` is radiant intensity [W sr^-1]."""

    position: Vec3
    intensity: Vec3
    name: str = ""


@dataclass(frozen=True)
class SpotLight:
    """Cone around `direction` with axial `intensity` [W sr^-1].

    Full within `inner_angle`, zero beyond `outer_angle` [rad].

    `falloff` between the angles: "linear" in the angle (Mitsuba's) or "smooth", squared in the cosine
    (KHR_lights_punctual's).
    """

    position: Vec3
    direction: Vec3
    intensity: Vec3
    inner_angle: float
    outer_angle: float
    falloff: Literal["linear", "smooth"] = "linear"
    name: str = ""


@dataclass(frozen=True)
class DirectionalLight:
    """Parallel light travelling along `direction`; `irradiance` on a facing plane [W m^-2]."""

    direction: Vec3
    irradiance: Vec3
    name: str = ""


Light = PointLight | SpotLight | DirectionalLight


@dataclass(frozen=True, eq=False)
class Environment:
    """Light from infinitely far away.

    Attributes:
        image: (height, width, 3) float32 radiance [W m^-2 sr^-1], latitude-longitude; (1, 1, 3) is constant. Row 0 is
            the zenith (local +y). Column position u = 0...1 has azimuth: local direction d,
            u = atan2(d.x, -d.z) / (2 pi) (wrapped into [0, 1)), v = acos(d.y) / pi. Texel centres sit at
            (i + 1/2) / size, bilinear between them.
        to_world: (3, 3) rotation from the map's local frame to the world.
        scale: Multiplies the image.
    """

    image: np.ndarray
    to_world: np.ndarray = field(default_factory=lambda: np.eye(3))
    scale: float = 1.0

    def __post_init__(self) -> None:
        image = self.image
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.float32:
            raise SceneError(f"environment: expected (height, width, 3) float32, got {image.shape} {image.dtype}")
        if not np.isfinite(image).all() or image.min() < 0.0:
            raise SceneError("environment: radiance must be finite and >= 0")

    @property
    def is_constant(self) -> bool:
        return self.image.shape[:2] == (1, 1)

    @staticmethod
    def constant(radiance: Vec3) -> Environment:
        """Environment of the same `radiance` [W m^-2 sr^-1] from everywhere."""
        return Environment(np.asarray(radiance, np.float32).reshape(1, 1, 3))


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole or thin-lens camera.

    Attributes:
        to_world: (4, 4) rigid transform; the camera looks along its -z, +y is up, +x right (OpenGL, glTF).
        fov: Full field of view [deg] along `fov_axis`.
        fov_axis: "x", "y", or "smaller" / "larger" of the two.
        aperture_radius: Lens radius in scene units; 0 is a pinhole.
        focus_distance: Distance of the plane in focus along -z, in scene units.
    """

    to_world: np.ndarray
    fov: float = 40.0
    fov_axis: Literal["x", "y", "smaller", "larger"] = "x"
    aperture_radius: float = 0.0
    focus_distance: float = 1.0

    def __post_init__(self) -> None:
        if self.to_world.shape != (4, 4) or not np.isfinite(self.to_world).all():
            raise SceneError("camera: to_world must be a finite (4, 4) matrix")
        if not 0.0 < self.fov < 180.0:
            raise SceneError(f"camera: fov must lie between 0 and 180 degrees, got {self.fov}")
        if self.aperture_radius < 0.0 or self.focus_distance <= 0.0:
            raise SceneError("camera: aperture_radius must be >= 0 and focus_distance > 0")

    @staticmethod
    def look_at(origin: Vec3, target: Vec3, up: Vec3 = (0.0, 1.0, 0.0), **options: float | str) -> Camera:
        """Camera at `origin` looking at `target`; `options` are the other attributes."""
        eye = np.asarray(origin, float)
        back = eye - np.asarray(target, float)
        back /= np.linalg.norm(back)
        right = np.cross(np.asarray(up, float), back)
        length = np.linalg.norm(right)
        if length < 1e-8:
            raise SceneError("camera: up must not be parallel to the viewing direction")
        right /= length
        to_world = np.eye(4)
        to_world[:3, 0], to_world[:3, 1], to_world[:3, 2], to_world[:3, 3] = right, np.cross(back, right), back, eye
        return Camera(to_world=to_world, **options)  # type: ignore[arg-type]

    def half_extents(self, width: int, height: int) -> tuple[float, float]:
        """Half width and height of the image plane at distance 1, for a picture of `width` × `height` [px]."""
        axis = self.fov_axis
        if axis in ("smaller", "larger"):
            axis = "x" if (width > height) == (axis == "larger") else "y"
        half = float(np.tan(np.radians(self.fov) / 2.0))
        return (half, half * height / width) if axis == "x" else (half * width / height, half)


@dataclass(frozen=True)
class RenderSettings:
    """What the file says about rendering; the command line overrides it.

    Attributes:
        width, height: Picture size [px].
        spp: Samples per pixel.
        max_depth: Longest path in edges from the camera: 1 shows emitters only, 2 adds direct light; -1 is unlimited.
        rr_depth: Edges after which Russian roulette may end a path.
    """

    width: int = 512
    height: int = 512
    spp: int = 64
    max_depth: int = 16
    rr_depth: int = 5


class Motion(Protocol):
    """How a scene changes: `nrc.animation.Animation`, which knows scenes while scenes do not know it."""

    @property
    def duration(self) -> float:
        """When the last change is over [s]."""
        ...

    @property
    def moves_camera(self) -> bool:
        """Whether the scene's camera changes."""
        ...

    def pose(self, scene: Scene, time: float) -> Scene:
        """`scene` as it stands at `time` [s], sharing all that stands still."""
        ...

    def bounds(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner, (3,) each, of the geometry of all poses."""
        ...


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything a picture needs.

    Attributes:
        meshes: A mesh to which instances refer is drawn where they place it and nowhere else.
        animation: How the scene changes; the other fields are the pose at its start.
        warnings: What the reader substituted or did not understand, one entry each.
    """

    meshes: tuple[Mesh, ...]
    materials: tuple[Material, ...]
    camera: Camera
    lights: tuple[Light, ...] = ()
    environment: Environment | None = None
    settings: RenderSettings = RenderSettings()
    name: str = ""
    warnings: tuple[str, ...] = ()
    instances: tuple[Instance, ...] = ()
    animation: Motion | None = None

    def __post_init__(self) -> None:
        if not any(len(mesh.indices) for mesh in self.meshes):
            raise SceneError(f"scene {self.name!r} has no triangles")
        for mesh in self.meshes:
            if not 0 <= mesh.material < len(self.materials):
                raise SceneError(
                    f"mesh {mesh.name!r}: material {mesh.material} of {len(self.materials)} does not exist"
                )
        for instance in self.instances:
            if not 0 <= instance.mesh < len(self.meshes):
                raise SceneError(
                    f"instance {instance.name!r}: mesh {instance.mesh} of {len(self.meshes)} does not exist"
                )

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner of the geometry, (3,) each; of an instance the box around its mesh's box counts."""
        placed = {instance.mesh for instance in self.instances}
        boxes = [mesh.box[None] for i, mesh in enumerate(self.meshes) if i not in placed]
        for i in placed:
            if len(self.meshes[i].positions):
                matrices = np.array([instance.to_world for instance in self.instances if instance.mesh == i])
                boxes.append(transformed_boxes(self.meshes[i].box, matrices))
        lower, upper = np.concatenate(boxes).transpose(1, 0, 2)
        return lower.min(axis=0), upper.max(axis=0)

    @property
    def bounds_over_time(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner of the geometry of all poses, (3,) each."""
        return self.bounds if self.animation is None else self.animation.bounds(self)

    @property
    def has_light(self) -> bool:
        """Whether anything emits."""
        if self.lights or (self.environment is not None and self.environment.image.max() * self.environment.scale > 0):
            return True
        return any(self.materials[mesh.material].emits for mesh in self.meshes)

    def at(self, time: float) -> Scene:
        """The scene as it stands at `time` [s] of its animation; itself without one."""
        return self if self.animation is None else self.animation.pose(self, time)

    def with_settings(self, **changes: int) -> Scene:
        """The same scene with other render settings."""
        return replace(self, settings=replace(self.settings, **changes))


def transformed_boxes(box: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Boxes (n, 2, 3) around a box (2, 3) moved by each of n affine (4, 4) matrices (Arvo 1990)."""
    center, half = (box[0] + box[1]) / 2.0, (box[1] - box[0]) / 2.0
    moved = matrices[:, :3, :3] @ center + matrices[:, :3, 3]
    reach = np.abs(matrices[:, :3, :3]) @ half
    return np.stack([moved - reach, moved + reach], axis=1)
