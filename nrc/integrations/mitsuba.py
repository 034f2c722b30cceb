"""The radiance cache as a Mitsuba 3 integrator: importing this module makes `<integrator type="nrc"/>` known.

The import works before and after `mi.set_variant`, and for every variant that is set later. Mitsuba's shapes, BSDFs,
emitters, sensors and samplers do all the transport, on llvm_ad_rgb or cuda_ad_rgb; arrays cross between Dr.Jit and Warp
without copies::

    import mitsuba as mi
    import nrc.integrations.mitsuba

    mi.set_variant("llvm_ad_rgb")
    scene = mi.load_file("scene.xml", integrator="nrc")
    image = mi.render(scene, spp=256)  # trains the cache with every pass, and on in the next call
    print(scene.integrator().cache.stats())
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import drjit
import mitsuba
import numpy as np
import warp as wp

from nrc.cache import CacheConfig, RadianceCache
from nrc.integrations import mitsuba_paths as paths
from nrc.launch import prepare, resolve_device
from nrc.records import FIELDS, Records
from nrc.sobol import bit_reversed, sobol_points

dr: Any = drjit  # type checkers see neither the active variant nor what Dr.Jit makes of the code
mi: Any = mitsuba

WARM_UP = 128  # training passes before the first picture
WAVEFRONT = 2**18  # paths of a pass at most, where a pixel needs several samples for as many
MIN_PASSES = 16
MOST_RECORDINGS = 8  # sizes of wavefronts that are kept recorded
RECORDS_PER_PATH = 4.0  # first guess
BOX_MARGIN = 0.01  # of the scene's extent
UNLIMITED_DEPTH = 2**30

VARIANTS = ("llvm_ad_rgb", "cuda_ad_rgb")
_registered: set[str] = set()


def as_warp(values: Any, dtype: Any, device: wp.Device) -> wp.array:
    """The memory of a flat Dr.Jit array as a Warp array of floats, ints or vec3; no copy."""
    if dtype is wp.vec3:
        values = mi.TensorXf(values, (dr.width(values) // 3, 3))
    array: Any = wp.from_dlpack(values, dtype=dtype)
    assert array.device == device, f"Mitsuba computes on {array.device}, the cache on {device}"
    return array


def as_drjit(array: wp.array) -> Any:
    """The memory of a Warp array of floats as a flat Dr.Jit array; no copy."""
    return mi.Float(array.flatten())


def as_records(fields: tuple[Any, ...], device: wp.Device) -> Records:
    """The memory of record buffers (`mitsuba_paths.FIELDS`) as `Records`."""
    arrays = {name: as_warp(values, FIELDS[name], device) for name, values in zip(paths.FIELDS, fields, strict=True)}
    return Records(arrays["position"].shape[0], device, **arrays)


def refuse_media(scene: Any, sensor: Any) -> None:
    """Raise RuntimeError if there are participating media, also in instances."""
    nodes = [node for root in (scene, sensor) for node in mi.traverse(root).hierarchy]
    if any(isinstance(node, mi.Medium) for node in nodes):
        raise RuntimeError("nrc: participating media are not supported; this scene needs volpath or another integrator")


def parameter(props: Any, name: str, default: Any) -> Any:
    """A plugin parameter of the type of `default`; RuntimeError, with its name, for another type.

    Whole numbers pass where a float is expected, as in Mitsuba's own plugins.
    """
    value = props.get(name, default)
    expected = type(default)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise RuntimeError(f"nrc: {name} must be {kinds[expected]}, got {value!r}")
    return value


def spp_per_pass(spp: int, n_pixels: int) -> int:
    """Largest divisor of `spp` with which passes have at most `WAVEFRONT` paths and there are `MIN_PASSES` of them."""
    limit = min(WAVEFRONT // n_pixels, spp // MIN_PASSES)
    return max((n for n in range(1, limit + 1) if spp % n == 0), default=1)


@lru_cache
def integrator_class(variant: str) -> Any:
    """The integrator for the active variant, whose name is `variant`; each variant has base classes of its own."""

    class RadianceCacheIntegrator(mi.ad.integrators.common.ADIntegrator):
        """Path tracing that ends in a neural radiance cache, trained online (Müller et al. 2021).

        A render traces training paths and takes four optimizer steps per pass, the first one `warm_up` times before.
        `max_depth` bounds the paths, those that train included, but not the light in an answer. The cache does not know
        how long the path is that asks: it answers with the mean over training paths that reached the point after any
        number of bounces, and whose tails are such answers again. A low `max_depth` of at least 3 therefore gives means
        that differ from those of `path` by some percent. 1 and 2 never ask the cache, nor does any with
        `spread_threshold` 1e30: those agree.

        Inside `aov`, which takes its colours from `render`, the plugin works as any other. Integrators that call
        `sample` for each ray, like `moment`, get Mitsuba's `path` from it, without the cache.

        Plugin parameters:
            max_depth: Longest path in edges; -1, the default, is unlimited. As of `path`, but see above.
            rr_depth: Edges after which Russian roulette may end a path, 5 by default. As of `path`.
            hide_emitters: Whether the camera sees no emitters. As of `path`.
            spread_threshold: c of the termination test a > c a_0, 0.01 by default; a huge one never asks the cache.
            encoding: "hash" (default) or "frequency", see `CacheConfig`.
            training_records: Records per pass that train the cache. 0, the default, means `CacheConfig`'s: 8192 on a
                CPU, 65536 on CUDA.
            warm_up: Training passes that the cache has had before it first answers for a picture, 128 by default. They
                take some seconds of the first render on a CPU. With 0 pictures include its first answers, which are
                off.
            spp_per_pass: Samples per pixel between two training passes, a divisor of their number. 0, the default,
                means as many as give 2^18 paths, at most a 16th of all. Some samplers round the number of samples up,
                as for `path`: `orthogonal` to the square of a prime.
            sobol: Whether Sobol' points replace an `independent` sampler's numbers on the film and at the first two
                vertices, false by default: Mitsuba's sampler draws everything. Others always draw for themselves.

        Attributes:
            cache: The `RadianceCache`; None before the first render.
            n_passes: Training passes since it was made or reset.
            records_per_path: Training records that a path leaves, a running mean.
        """

        def __init__(self, props: Any) -> None:
            depths = {name: parameter(props, name, default) for name, default in (("max_depth", -1), ("rr_depth", 5))}
            for name, depth in depths.items():
                props[name] = depth
            super().__init__(props)
            self.cache: RadianceCache | None = None
            self.recorded: dict[tuple[int, ...], RecordedPaths] = {}  # by the sizes of wavefront and film
            self._path = mi.load_dict({"type": "path", "hide_emitters": self.hide_emitters, **depths})
            self._encoding = parameter(props, "encoding", "hash")
            self._spread_threshold = parameter(props, "spread_threshold", 0.01)
            self._training_records = parameter(props, "training_records", 0)
            self._warm_up = parameter(props, "warm_up", WARM_UP)
            self._spp_per_pass = parameter(props, "spp_per_pass", 0)
            self._sobol = parameter(props, "sobol", False)
            self.n_passes = 0
            self.records_per_path = RECORDS_PER_PATH
            if self._encoding not in ("hash", "frequency"):
                raise RuntimeError(f'nrc: encoding must be "hash" or "frequency", got "{self._encoding}"')
            if not self._spread_threshold >= 0.0:
                raise RuntimeError(f"nrc: spread_threshold must be >= 0, got {self._spread_threshold}")
            for name in ("training_records", "warm_up", "spp_per_pass"):
                if getattr(self, f"_{name}") < 0:
                    raise RuntimeError(f"nrc: {name} must not be negative, got {getattr(self, f'_{name}')}")

        def render(
            self,
            scene: Any,
            sensor: Any = 0,
            seed: Any = 0,
            spp: int = 0,
            develop: bool = True,
            evaluate: bool = True,
        ) -> Any:
            """Render and train; the picture as other integrators return it."""
            if isinstance(sensor, int):
                sensor = scene.sensors()[sensor]
            refuse_media(scene, sensor)
            with dr.suspend_grad():
                Pass(self, scene, sensor, int(mi.UInt32(seed)[0]), spp).render()
                picture = sensor.film().develop() if develop else mi.TensorXf()
                if evaluate:
                    dr.eval(picture)
                return picture

        def sample(
            self, mode: Any, scene: Any, sampler: Any, ray: Any, **arguments: Any
        ) -> tuple[Any, Any, list, None]:
            """What integrators around this one ask for: radiance along rays, as `path` finds it without the cache."""
            if mode != dr.ADMode.Primal:
                raise NotImplementedError("nrc: there are no derivatives; use prb or another integrator")
            L, valid, _ = self._path.sample(scene, sampler, ray, None, arguments.get("active", True))
            return L, valid, [], None

        def reset_cache(self) -> None:
            """Forget what was learned."""
            if self.cache is not None:
                self.cache.reset()
                self.n_passes, self.records_per_path = 0, RECORDS_PER_PATH

        def to_string(self) -> str:
            depth = "unlimited" if self.max_depth >= UNLIMITED_DEPTH else self.max_depth
            return (
                f"RadianceCacheIntegrator[max_depth = {depth}, rr_depth = {self.rr_depth}, "
                f"encoding = {self._encoding}, spread_threshold = {self._spread_threshold}]"
            )

        def settings(self, sampler: Any) -> paths.PathSettings:
            """How paths are traced with this sampler."""
            return paths.PathSettings(
                max_depth=min(self.max_depth, UNLIMITED_DEPTH),
                rr_depth=self.rr_depth,
                hide_emitters=self.hide_emitters,
                spread_threshold=self._spread_threshold,
                sobol=self._sobol and sampler.class_name() == "IndependentSampler",
            )

        def prepare_cache(self, scene: Any) -> RadianceCache:
            """The cache for this scene, a new one where the scene does not lie in the box of the present one."""
            bbox = scene.bbox()
            lower, upper = np.array(bbox.min, float).ravel(), np.array(bbox.max, float).ravel()
            if not (np.isfinite([lower, upper]).all() and np.max(upper - lower) > 0.0):
                raise RuntimeError("nrc: the scene has no surfaces of finite extent")
            cache = self.cache
            if cache is not None and (np.any(lower < cache.bounds[0]) or np.any(upper > cache.bounds[1])):
                mi.Log(mi.LogLevel.Warn, "nrc: the scene lies outside of the cache's box; a new cache is made for it")
                cache = None
            if cache is None:
                margin = BOX_MARGIN * np.max(upper - lower)
                device = resolve_device("cuda:0" if mi.variant().startswith("cuda") else "cpu")
                config = CacheConfig(encoding=self._encoding)
                if self._training_records:
                    batch_size = max(1, self._training_records // config.n_batches)
                    config = CacheConfig(encoding=self._encoding, batch_size=batch_size)
                cache = RadianceCache(
                    (lower - margin, upper + margin), config, max_queries=1, max_records=1, device=device
                )
                prepare(cache.kernels(), device)
                self.cache, self.n_passes, self.records_per_path = cache, 0, RECORDS_PER_PATH
            return cache

    return RadianceCacheIntegrator


class Recorded:
    """A function of wavefronts, recorded by Dr.Jit at its first call and replayed later, or traced anew if that fails.

    Tracing takes longer than running: 0.2 s for the paths through a scene of 30 materials.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._frozen: Any = dr.freeze(function, warn_after=1000, limit=16)

    def __call__(self, *arguments: Any) -> Any:
        if self._frozen is not None:
            try:
                return self._frozen(*arguments)
            except RuntimeError as error:
                if "record" not in str(error):
                    raise
                name = self._function.__name__
                mi.Log(mi.LogLevel.Info, f"nrc: Dr.Jit cannot record {name} here; every pass will trace it anew")
                self._frozen = None
        return self._function(*arguments)


class RecordedPaths:
    """The functions of `mitsuba_paths` that an integrator calls in every pass."""

    def __init__(self) -> None:
        self.picture_rays, self.trace_picture = Recorded(paths.picture_rays), Recorded(paths.trace_picture)
        self.training_rays, self.trace_training = Recorded(paths.training_rays), Recorded(paths.trace_training)
        self.gather_targets, self.add_samples = Recorded(paths.gather_targets), Recorded(paths.add_samples)


class Pass:
    """What all passes of a render call share."""

    def __init__(self, integrator: Any, scene: Any, sensor: Any, seed: int, spp: int) -> None:
        self.integrator, self.scene, self.sensor, self.seed = integrator, scene, sensor, seed
        self.film, self.sampler = sensor.film(), sensor.sampler().clone()
        if spp:
            self.sampler.set_sample_count(spp)
        n_drawn = self.sampler.sample_count()
        border = 2 * self.film.rfilter().border_size() if self.film.sample_border() else 0
        n_pixels = int((self.film.crop_size()[0] + border) * (self.film.crop_size()[1] + border))
        self.n_samples = integrator._spp_per_pass or spp_per_pass(n_drawn, n_pixels)
        if n_drawn % self.n_samples:
            rounded = "" if spp in (0, n_drawn) else f", what this sampler makes of {spp}"
            raise RuntimeError(
                f"nrc: spp_per_pass ({self.n_samples}) does not divide {n_drawn} samples per pixel{rounded}"
            )
        self.n_passes, self.n_paths = n_drawn // self.n_samples, n_pixels * self.n_samples
        self.sampler.set_samples_per_wavefront(self.n_samples)
        self.sampler.seed(seed, self.n_paths)
        self.film.prepare([])
        self.cache = integrator.prepare_cache(scene)
        self.settings = integrator.settings(self.sampler)
        self.n_slots = max(1, self.cache.n_training_records // 2)
        self.cache.reserve(max(self.n_paths, self.n_slots), self.n_slots * self.settings.max_records)
        self.box = mi.Point3f(self.cache.bounds[0]), mi.Point3f(self.cache.bounds[1])
        self.table = mi.UInt32(sobol_points(paths.SOBOL_BITS)[bit_reversed(paths.SOBOL_BITS)].ravel())
        self.rng = np.random.default_rng(seed)
        self.training_sampler = mi.load_dict({"type": "independent"})
        self.training_sampler.seed(int(self.rng.integers(2**32)), self.n_slots)
        # One recording replayed for wavefronts of several sizes in turn crashes Dr.Jit 1.5
        border = self.film.rfilter().border_size()
        sizes = (self.n_paths, self.n_samples, self.n_slots, *(int(n) for n in self.film.crop_size()), border)
        self.recorded = integrator.recorded.setdefault(sizes, RecordedPaths())
        while len(integrator.recorded) > MOST_RECORDINGS:
            integrator.recorded.pop(next(size for size in integrator.recorded if size != sizes))
        self.has_alpha = mi.has_flag(self.film.flags(), mi.FilmFlags.Alpha)
        self.block = self.film.create_block()

    def render(self) -> None:
        """Trace, train and ask the cache pass by pass, and fill the film."""
        integrator = self.integrator
        n_trained = max(integrator.n_passes, int(self.cache.stats()["rounds"]))  # more of a cache that was loaded
        for _ in range(n_trained, integrator._warm_up):
            self.learn(*self.gather())
        for i in range(self.n_passes):
            batch = self.gather()
            position, weight, found, records, count = self.trace(i)
            self.learn(*batch)  # while Dr.Jit traces: Warp's short launches alone leave cores idle
            radiance = self.ask(records, count)
            self.recorded.add_samples(self.block, self.has_alpha, position, weight, *found, radiance)
            dr.eval(self.block.tensor())
            dr.sync_thread()  # before the cache writes its answers again
        self.film.put_block(self.block)

    def trace(self, i: int) -> tuple[Any, ...]:
        """Start to trace the picture's pass `i`.

        Returns:
            Positions on the film and their weights, what `add_samples` takes, records to ask about and their number.
        """
        ray, weight, position, index, key = self.recorded.picture_rays(
            self.sensor,
            self.sampler,
            self.n_samples,
            self.n_paths,
            self.settings.sobol,
            self.table,
            dr.opaque(mi.UInt32, i * self.n_samples),
            dr.opaque(mi.UInt32, self.seed),
        )
        L, alpha, beta, place, records, count = self.recorded.trace_picture(
            self.scene, self.sampler, ray, self.box, self.table, index, key, self.settings
        )
        self.sampler.advance()
        dr.eval(position, weight, L, alpha, beta, place, records, count)
        return position, weight, (L, alpha, beta, place), records, count

    def ask(self, records: Any, count: Any) -> Any:
        """The cache's flat answers for the first `count` records."""
        device = self.cache.device
        dr.sync_thread()
        answers = self.cache.query(as_records(records, device), as_warp(count, wp.int32, device))
        wp.synchronize_device(device)
        return as_drjit(answers[: self.n_paths])

    def gather(self) -> tuple[Any, Any, Any, int]:
        """Trace training paths.

        Returns:
            Records, their targets and number, and the number of paths.
        """
        cache, device = self.cache, self.cache.device
        n_paths = max(1, min(self.n_slots, int(cache.n_training_records / self.integrator.records_per_path)))
        recorded, sampler = self.recorded, self.training_sampler
        shift = mi.Point2f(*(dr.opaque(mi.Float, x) for x in self.rng.random(2)))
        ray = recorded.training_rays(self.sensor, sampler, self.n_slots, shift)
        staged, count, tail_place, tails, n_tails = recorded.trace_training(
            self.scene, sampler, ray, self.n_slots, dr.opaque(mi.UInt32, n_paths), self.box, self.settings
        )
        dr.eval(staged, count, tail_place, tails, n_tails)
        dr.sync_thread()
        answers = cache.query_primary(as_records(tails, device), as_warp(n_tails, wp.int32, device))
        wp.synchronize_device(device)
        records, total, targets = recorded.gather_targets(
            staged, count, tail_place, as_drjit(answers[: self.n_slots]), self.settings.max_records
        )
        dr.eval(records, total, targets)
        dr.sync_thread()
        return records, targets, total, n_paths

    def learn(self, records: Any, targets: Any, total: Any, n_paths: int) -> None:
        """Train the cache with what `gather` returned."""
        cache, integrator, device = self.cache, self.integrator, self.cache.device
        cache.train(as_records(records, device), as_warp(targets, wp.vec3, device), as_warp(total, wp.int32, device))
        wp.synchronize_device(device)
        per_path = max(int(total[0]) / n_paths, 0.25)
        integrator.records_per_path += 0.1 * (per_path - integrator.records_per_path)
        integrator.n_passes += 1


def register(old: str | None, new: str) -> None:
    """Make the plugin known to variant `new`, which has just become active."""
    if new not in _registered:
        mi.register_integrator("nrc", create_integrator)
        _registered.add(new)


def create_integrator(props: Any) -> Any:
    """The plugin's instance for the active variant. Raises RuntimeError for one that is not supported."""
    variant = mi.variant()
    if variant not in VARIANTS:
        raise RuntimeError(f"nrc: runs on {' and '.join(VARIANTS)}, not on {variant}")
    return integrator_class(variant)(props)


mi.detail.add_variant_callback(register)
if mi.variant() is not None:
    register(None, mi.variant())
