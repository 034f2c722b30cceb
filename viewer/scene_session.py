"""`SceneSession`: a scene rendered with the radiance cache, which learns while one looks around."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import warp as wp
from scipy.spatial.transform import Rotation

from nrc.cache import CacheConfig
from nrc.debug_views import debug_views
from nrc.display import Display, ToneMapping
from nrc.image import read_linear
from nrc.launch import prepare
from nrc.metrics import relmse
from nrc.pathtracer import Integrator, PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Camera, Light, Material, PointLight, Scene, SpotLight
from nrc.snapshot import SnapshotError
from nrc.temporal import TemporalAccumulation
from nrc.viewer.navigation import same_camera
from nrc.viewer.resolution import Resolution
from nrc.viewer.session import Picture, Request

FIRST_HIT_VIEWS = ("albedo", "normal", "depth")
CACHE_VIEWS = (
    "cache",
    "query_vertex",
    "spread",
    "training_radiance_1",
    "training_radiance_2",
    "training_bounces",
    "loss",
)
VIEWS = ("radiance", *FIRST_HIT_VIEWS, *CACHE_VIEWS)
Compare = Literal["off", "path", "file"]
REST_FRAMES = 8  # accumulated before a reference is rendered beside
STATS_SECONDS = 0.25  # between two readings of the cache's counters on CUDA
COMPARE_SECONDS = 1.0  # between two looks at the error


@dataclass(frozen=True)
class SceneSettings:
    """What the panels change.

    Attributes:
        integrator: Of the picture, right of the split.
        split: Fraction of the width left of which paths are followed to their ends, or None.
        time: Of the animation [s].
        view: One of `VIEWS`; "radiance" is shown where the integrator has no such view.
        train: Whether frames train the cache.
        threshold, min_spread, max_depth: Of `PathTracerConfig`.
        cache: What the cache is made of.
        reproject: Whether a moving picture is averaged with the frames before, along its motion.
        tone: How radiance becomes colours.
        environment_turn: About the vertical axis [deg], on top of the scene's own.
        environment_gain: Factor of the environment's radiance.
        light_gains: Factors of the lights in `SceneSession.light_names`.
        materials: Materials that replace those of meshes, by the mesh's index.
        compare: What the error is measured against: nothing, a path-traced picture that grows while the view rests,
            or the loaded reference.
    """

    integrator: Integrator = "nrc"
    split: float | None = None
    time: float = 0.0
    view: str = "radiance"
    train: bool = True
    threshold: float = 0.01
    min_spread: float = 0.0
    max_depth: int = 16
    cache: CacheConfig = field(default_factory=CacheConfig)
    reproject: bool = True
    tone: ToneMapping = field(default_factory=ToneMapping)
    environment_turn: float = 0.0
    environment_gain: float = 1.0
    light_gains: tuple[float, ...] = ()
    materials: tuple[tuple[int, Material], ...] = ()
    compare: Compare = "off"

    @property
    def views(self) -> tuple[str, ...]:
        """Those of `VIEWS` that there are with the integrator: paths alone have no cache to look at."""
        return VIEWS if self.integrator != "path" else ("radiance", *FIRST_HIT_VIEWS)

    @property
    def shown_view(self) -> str:
        """`view` if there is such a one, else "radiance"."""
        return self.view if self.view in self.views else "radiance"


@dataclass
class _Reference:
    """A picture to compare with, and what the comparison gave."""

    file: np.ndarray | None = None
    renderer: Renderer | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    compared: float = 0.0  # time.perf_counter


class SceneSession:
    """Renders a scene frame by frame at the requested camera and settings, accumulating while neither changes.

    Args:
        scene: What to look at.
        device: Warp device; the first GPU, else the CPU.
        encoding, integrator: To start with.
        seed: Same seed, same pictures.

    Attributes:
        light_names: Lights whose strength can change: punctual ones, then emitting materials.
        has_environment: Whether there is one to turn.
        duration: Of the scene's animation [s]; 0 without one.
        has_moving_camera: Whether it moves the camera.
    """

    kind = "scene"

    def __init__(
        self,
        scene: Scene,
        *,
        device: Any = None,
        integrator: Integrator = "nrc",
        encoding: Literal["hash", "frequency"] = "hash",
        seed: int = 0,
    ) -> None:
        self._base = self._pose = scene
        self.name = scene.name or "scene"
        self.warnings = scene.warnings
        if not scene.has_light:
            self.warnings += ("nothing in this scene emits light; the picture will be black",)
        self._emitters = tuple(i for i, material in enumerate(scene.materials) if material.emits)
        self.light_names = tuple(
            [_light_name(light, i) for i, light in enumerate(scene.lights)]
            + [scene.materials[i].name or f"material {i}" for i in self._emitters]
        )
        self._seed, self._rr_depth = seed, scene.settings.rr_depth
        self.report: Callable[[str], None] = lambda _line: None
        self.settings = SceneSettings(
            integrator=integrator,
            max_depth=scene.settings.max_depth,
            cache=CacheConfig(encoding=encoding),
            light_gains=(1.0,) * len(self.light_names),
        )
        self.has_environment = scene.environment is not None
        self.camera: Camera | None = scene.camera
        self.up = _up(scene.camera)
        self.duration = 0.0 if scene.animation is None else scene.animation.duration
        self.has_moving_camera = scene.animation is not None and scene.animation.moves_camera
        self.bounds = scene.bounds
        self._shown = self.settings
        self._camera = scene.camera
        self._renderer = Renderer(scene, 16, 16, self._config(self.settings), cache=self.settings.cache, device=device)
        self.device = self._renderer.device
        self._display = Display(self.device)
        self._resolution = Resolution()
        self._reference = _Reference()
        self._counters: dict[str, float] = {}  # of the cache, and when they were read
        self._counted = 0.0
        self._moving: TemporalAccumulation | None = None
        self._n_moving = 0  # frames in it
        self._layers: dict[str, np.ndarray] = {}  # of the view on display, where it is not radiance
        self._stages = dict(self._renderer.stage_seconds)

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of the first frame by name."""
        return self._renderer.kernels() | self._display.kernels() | TemporalAccumulation.kernels()

    def frame(self, request: Request) -> Picture:
        """Render one sample per pixel, train the cache with it, and show the mean of what rests."""
        start = time.perf_counter()
        self._follow(request)
        renderer = self._renderer
        renderer.frame()
        self._accumulate(request.settings)
        pixels = self._show(request.settings)
        wp.synchronize_device(self.device)
        width, height = renderer.tracer.width, renderer.tracer.height
        seconds = time.perf_counter() - start
        self._resolution.measure(width, height, seconds)
        stats = self._stats(seconds)
        if request.settings.compare != "off" and request.settings.shown_view == "radiance":
            self._compare(request.settings.compare)
            stats |= self._reference.figures
        return Picture(pixels, width, height, stats, self._camera)

    def image(self) -> np.ndarray:
        """Mean of the accumulated frames, or the layer on display, (height, width, 3) float32."""
        layer = self._layers.get(self._shown.shown_view)
        if layer is None:
            return self._renderer.image()
        return np.ascontiguousarray(np.broadcast_to(layer[..., None], (*layer.shape, 3)) if layer.ndim == 2 else layer)

    def pick(self, x: float, y: float) -> dict[str, Any] | None:
        """Position, depth, mesh and its material in the file at a point of the picture."""
        pick = self._renderer.pick(x, y)
        if pick is None:
            return None
        mesh = self._base.meshes[pick.mesh]
        return {
            "position": pick.position,
            "depth": pick.depth,
            "mesh": pick.mesh,
            "name": mesh.name or f"mesh {pick.mesh}",
            "material": self._base.materials[mesh.material],
        }

    def save(self, path: Path) -> None:
        """Write the cache: weights, moments, averages, counters. Raises SnapshotError."""
        if self._renderer.cache is None:
            raise SnapshotError(f"{path}: there is no cache to save; integrator path has none")
        self._renderer.cache.save(path)

    def load_cache(self, path: Path) -> CacheConfig:
        """Go on with the cache in a file of `save`; its configuration. Raises SnapshotError."""
        return self._renderer.load_cache(path)

    def reset_cache(self) -> None:
        """Forget what was learned, and start the picture over."""
        self._renderer.reset_cache()
        self._renderer.restart()

    def load_reference(self, path: Path) -> tuple[int, int]:
        """Compare with this picture from now on; its width and height [px]. Raises ImageError."""
        image = read_linear(path)
        self._reference.file = image
        self._reference.figures = {}
        return image.shape[1], image.shape[0]

    # --- following a request -----------------------------------------------------------------------------------------

    def _follow(self, request: Request) -> None:
        """Set the renderer to what is asked for. Whatever changes the picture starts it over."""
        renderer, old, new = self._renderer, self._shown, request.settings
        if _scene_part(new) != _scene_part(old):
            self._pose = self._base.at(new.time)
            renderer.set_scene(self._scene(new))
            renderer.set_camera(self._camera)
            if new.time == old.time:
                renderer.cut()  # light or a material changed at once
            self._forget_reference()
        if self._config(new) != self._config(old):
            renderer.set_config(self._config(new))
            self._moving = None
            if new.max_depth != old.max_depth:
                self._forget_reference()
        if new.cache != old.cache:
            renderer.set_cache_config(new.cache)
        if (new.cache, new.integrator) != (old.cache, old.integrator):
            prepare(renderer.kernels(), self.device, report=self.report)
        renderer.train = new.train
        camera = request.camera or self._pose.camera
        if not same_camera(camera, self._camera):
            renderer.set_camera(camera)
            self._camera = camera
            self._forget_reference()
        size = self._resolution.size(request, renderer.film.n_frames)
        if size != (renderer.tracer.width, renderer.tracer.height):
            renderer.resize(*size)
            self._forget_reference()
        renderer.split = 0 if new.split is None else round(new.split * size[0])
        if new.compare != old.compare:
            self._reference.figures = {}
        self._shown = new

    def _config(self, settings: SceneSettings) -> PathTracerConfig:
        return PathTracerConfig(
            integrator=settings.integrator,
            max_depth=settings.max_depth,
            rr_depth=self._rr_depth,
            spread_threshold=settings.threshold,
            min_spread=settings.min_spread,
            seed=self._seed,
        )

    def _scene(self, settings: SceneSettings) -> Scene:
        """The scene of the moment with the panels' changes; what they leave alone is its own data."""
        base = self._pose
        n_lights = len(base.lights)
        lights = tuple(_scaled(light, gain) for light, gain in zip(base.lights, settings.light_gains, strict=False))
        materials = list(base.materials)
        for i, gain in zip(self._emitters, settings.light_gains[n_lights:], strict=True):
            if gain != 1.0:
                red, green, blue = materials[i].emission
                materials[i] = replace(materials[i], emission=(gain * red, gain * green, gain * blue))
        meshes = list(base.meshes)
        for i, material in settings.materials:
            meshes[i] = replace(meshes[i], material=len(materials))
            materials.append(material)
        environment = base.environment
        if environment is not None and (settings.environment_turn, settings.environment_gain) != (0.0, 1.0):
            environment = replace(
                environment,
                to_world=_turn(settings.environment_turn, self.up) @ environment.to_world,
                scale=environment.scale * settings.environment_gain,
            )
        return replace(base, meshes=tuple(meshes), materials=tuple(materials), lights=lights, environment=environment)

    def _accumulate(self, settings: SceneSettings) -> None:
        """Average the frame with those before it where these showed the same from elsewhere."""
        renderer = self._renderer
        if not settings.reproject or settings.split is not None:
            self._moving = None
            return
        tracer, moving = renderer.tracer, self._moving
        if moving is None or (moving.width, moving.height) != (tracer.width, tracer.height):
            moving = self._moving = TemporalAccumulation(tracer.width, tracer.height, self.device)
            self._n_moving = 0
        self._averaged = moving.add(renderer.film.frame, renderer.scene, tracer.camera)
        self._n_moving += 1

    # --- showing -----------------------------------------------------------------------------------------------------

    def _show(self, settings: SceneSettings) -> wp.array:
        renderer, view = self._renderer, settings.shown_view
        if view == "radiance":
            self._layers = {}
            moving, n_frames = self._moving, renderer.film.n_frames
            # The film has more of a view that rests; frames that were seen from elsewhere are in the other.
            if moving is not None and n_frames < min(self._n_moving, 1.0 / moving.config.min_alpha):
                return self._display.show(self._averaged, settings.tone)
            return self._display.show_film(renderer.film, settings.tone)
        if view in FIRST_HIT_VIEWS:
            if renderer.film.n_frames == 1 or view not in self._layers:
                self._layers = renderer.aovs()
            layer = self._layers[view]
        else:
            self._layers = debug_views(renderer)
            layer = self._layers[view]
        if layer.ndim == 2:
            upper = float(np.quantile(layer, 0.99)) or 1.0
            values: Any = wp.array(layer.ravel(), dtype=float, device=self.device)
            return self._display.show_scalars(values, 0.0, upper)
        if view == "normal":
            layer = 0.5 * layer + 0.5
        tone = settings.tone if "radiance" in view or view == "cache" else ToneMapping()
        colors: Any = wp.array(np.ascontiguousarray(layer.reshape(-1, 3)), dtype=wp.vec3, device=self.device)
        return self._display.show(colors, tone)

    def _stats(self, seconds: float) -> dict[str, Any]:
        renderer = self._renderer
        stages = {name: 1e3 * (total - self._stages.get(name, 0.0)) for name, total in renderer.stage_seconds.items()}
        self._stages = dict(renderer.stage_seconds)
        stages["display"] = max(0.0, 1e3 * seconds - sum(stages.values()))
        stats: dict[str, Any] = {"ms": 1e3 * seconds, "stages_ms": stages, "spp": renderer.film.n_frames}
        if renderer.cache is not None:
            now = time.perf_counter()
            if self.device.is_cpu or now - self._counted > STATS_SECONDS:  # reading them back is dear on CUDA
                self._counters, self._counted = renderer.cache.stats(), now
            stats |= self._counters
        return stats

    # --- comparing ---------------------------------------------------------------------------------------------------

    def _forget_reference(self) -> None:
        if self._reference.renderer is not None:
            self._reference.renderer.restart()
        self._reference.figures = {}

    def _compare(self, what: Compare) -> None:
        """Error of the picture against a reference; one that is path traced gets a frame more."""
        renderer, reference = self._renderer, self._reference
        if what == "file":
            target = reference.file
            if target is None:
                return
        else:
            if renderer.film.n_frames < REST_FRAMES:
                return
            target = None
            self._grow_reference()
        now = time.perf_counter()
        if now - reference.compared < COMPARE_SECONDS:
            return
        reference.compared = now
        picture = renderer.image()
        if target is None and reference.renderer is not None:
            target = reference.renderer.image()
            reference.figures["reference_spp"] = reference.renderer.film.n_frames
        if target is not None and target.shape == picture.shape:
            bias = float(picture.mean(dtype=np.float64) / max(target.mean(dtype=np.float64), 1e-12)) - 1.0
            reference.figures |= {"relmse": relmse(picture, target), "mean_bias": bias}
        elif target is not None:
            size = f"{target.shape[1]}x{target.shape[0]}"
            reference.figures = {"reference": f"is {size}; set the picture to that size to compare"}

    def _grow_reference(self) -> None:
        main, reference = self._renderer, self._reference
        defaults = SceneSettings(max_depth=self._shown.max_depth)  # whatever else changes is no matter to full paths
        config = replace(self._config(defaults), integrator="path", seed=self._seed + 1)
        size = (main.tracer.width, main.tracer.height)
        if reference.renderer is None:
            reference.renderer = Renderer(main.scene, *size, config, device=self.device)
        other = reference.renderer
        if other.scene is not main.scene:
            other.set_scene(main.scene)
        if other.config != config:
            other.set_config(config)
        if (other.tracer.width, other.tracer.height) != size:
            other.resize(*size)
        if other.film.n_frames == 0:
            other.set_camera(self._camera)
        other.frame()


def _scene_part(settings: SceneSettings) -> tuple[Any, ...]:
    lights = settings.environment_turn, settings.environment_gain, settings.light_gains
    return (settings.time, *lights, settings.materials)


def _light_name(light: Light, i: int) -> str:
    return light.name or f"{type(light).__name__.removesuffix('Light').lower()} light {i}"


def _scaled(light: Light, gain: float) -> Light:
    if gain == 1.0:
        return light
    if isinstance(light, PointLight | SpotLight):
        red, green, blue = light.intensity
        return replace(light, intensity=(gain * red, gain * green, gain * blue))
    red, green, blue = light.irradiance
    return replace(light, irradiance=(gain * red, gain * green, gain * blue))


def _turn(degrees: float, up: tuple[float, float, float]) -> np.ndarray:
    """Rotation (3, 3) about the vertical axis."""
    return Rotation.from_rotvec(np.radians(degrees) * np.asarray(up)).as_matrix()


def _up(camera: Camera) -> tuple[float, float, float]:
    """The axis of the world that points up most in the camera's view."""
    up = np.asarray(camera.to_world, float)[:3, 1]
    axis = int(np.argmax(np.abs(up)))
    result = [0.0, 0.0, 0.0]
    result[axis] = float(np.sign(up[axis])) or 1.0
    return (result[0], result[1], result[2])
