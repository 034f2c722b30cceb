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

SETTLING_PASSES = 128  # while an untrained cache settles, its answers count less
WAVEFRONT = 2**15  # paths of a pass at most, where a pixel needs several samples for as many
MIN_PASSES = 32
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


def spp_per_pass(spp: int, n_pixels: int) -> int:
    """Largest divisor of `spp` with which passes have at most `WAVEFRONT` paths and there are `MIN_PASSES` of them."""
    limit = min(WAVEFRONT // n_pixels, spp // MIN_PASSES)
    return max((n for n in range(1, limit + 1) if spp % n == 0), default=1)


@lru_cache
def integrator_class(variant: str) -> Any:
    """The integrator for the active variant, whose name is `variant`; each variant has base classes of its own."""

    class RadianceCacheIntegrator(mi.ad.integrators.common.ADIntegrator):
        """Path tracing that ends in a neural radiance cache, trained online (Müller et al. 2021).

        Plugin parameters:
            max_depth: Longest path in edges; -1, the default, is unlimited. As of `path`.
            rr_depth: Edges after which Russian roulette may end a path, 5 by default. As of `path`.
            hide_emitters: Whether the camera sees no emitters. As of `path`.
            spread_threshold: c of the termination test a > c a_0, 0.01 by default; a huge one never asks the cache.
            encoding: "hash" (default) or "frequency", see `CacheConfig`.
            training_records: Records per pass that train the cache. 0, the default, means `CacheConfig`'s: 8192 on a
                CPU, 65536 on CUDA.
            spp_per_pass: Samples per pixel between two training steps, a divisor of their number. 0, the default,
                means one, or more for pictures of few pixels.
            sobol: Whether Sobol' points replace an `independent` sampler's numbers on the film and at the first two
                vertices, false by default: Mitsuba's sampler draws everything. Others always draw for themselves.

        Attributes:
            cache: The `RadianceCache`; None before the first render.
            n_passes: Passes that trained it.
            records_per_path: Training records that a path leaves, a running mean.
        """

        def __init__(self, props: Any) -> None:
            if "max_depth" not in props:
                props["max_depth"] = -1
            super().__init__(props)
            self.cache: RadianceCache | None = None
            self.recorded: dict[tuple[int, ...], RecordedPaths] = {}  # by the sizes of wavefront and film
            self._encoding = props.get("encoding", "hash")
            self._spread_threshold = float(props.get("spread_threshold", 0.01))
            self._training_records = int(props.get("training_records", 0))
            self._spp_per_pass = int(props.get("spp_per_pass", 0))
            self._sobol = bool(props.get("sobol", False))
            self.n_passes = 0
            self.records_per_path = RECORDS_PER_PATH
            if self._encoding not in ("hash", "frequency"):
                raise RuntimeError(f'nrc: encoding must be "hash" or "frequency", got "{self._encoding}"')
            if not self._spread_threshold >= 0.0:
                raise RuntimeError(f"nrc: spread_threshold must be >= 0, got {self._spread_threshold}")
            if self._training_records < 0 or self._spp_per_pass < 0:
                raise RuntimeError("nrc: training_records and spp_per_pass must not be negative")

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
        spp = self.sampler.sample_count()
        border = 2 * self.film.rfilter().border_size() if self.film.sample_border() else 0
        n_pixels = int((self.film.crop_size()[0] + border) * (self.film.crop_size()[1] + border))
        self.n_samples = integrator._spp_per_pass or spp_per_pass(spp, n_pixels)
        if spp % self.n_samples:
            raise RuntimeError(f"nrc: spp_per_pass ({self.n_samples}) does not divide {spp} samples per pixel")
        self.n_passes, self.n_paths = spp // self.n_samples, n_pixels * self.n_samples
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
        self.found, self.answered = self.film.create_block(), self.film.create_block()

    def render(self) -> None:
        """Trace, train and ask the cache pass by pass, and fill the film."""
        recorded = self.recorded
        for i in range(self.n_passes):
            ray, weight, position, index, key = recorded.picture_rays(
                self.sensor,
                self.sampler,
                self.n_samples,
                self.n_paths,
                self.settings.sobol,
                self.table,
                dr.opaque(mi.UInt32, i * self.n_samples),
                dr.opaque(mi.UInt32, self.seed),
            )
            L, alpha, beta, place, records, count = recorded.trace_picture(
                self.scene, self.sampler, ray, self.box, self.table, index, key, self.settings
            )
            self.sampler.advance()
            dr.eval(L, alpha, beta, place, records, count)
            self.train()
            radiance = self.ask(records, count)
            # A picture counts the first answers of an untrained cache less: they are the darkest.
            trust = dr.opaque(mi.Float, min(1.0, self.integrator.n_passes / SETTLING_PASSES))
            recorded.add_samples(
                self.found, self.answered, self.has_alpha, position, weight, L, alpha, beta, place, radiance, trust
            )
            dr.eval(self.found.tensor(), self.answered.tensor())
            dr.sync_thread()  # before the cache writes its answers again
        put_sum(self.film, self.found, self.answered)

    def ask(self, records: Any, count: Any) -> Any:
        """The cache's flat answers for the first `count` records."""
        device = self.cache.device
        dr.sync_thread()
        answers = self.cache.query(as_records(records, device), as_warp(count, wp.int32, device))
        wp.synchronize_device(device)
        return as_drjit(answers[: self.n_paths])

    def train(self) -> None:
        """Trace training paths and train the cache with their records."""
        cache, integrator, device = self.cache, self.integrator, self.cache.device
        n_paths = max(1, min(self.n_slots, int(cache.n_training_records / integrator.records_per_path)))
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
        cache.train(as_records(records, device), as_warp(targets, wp.vec3, device), as_warp(total, wp.int32, device))
        wp.synchronize_device(device)
        per_path = max(int(total[0]) / n_paths, 0.25)
        integrator.records_per_path += 0.1 * (per_path - integrator.records_per_path)
        integrator.n_passes += 1


def put_sum(film: Any, found: Any, answered: Any) -> None:
    """Put into the film what paths found plus what the cache answered, each divided by its own weights."""
    a, b = found.tensor(), answered.tensor()
    n_channels = a.shape[2]
    i = dr.arange(mi.UInt32, dr.width(a.array))
    last = i - i % n_channels + (n_channels - 1)
    weight, trust = dr.gather(mi.Float, a.array, last), dr.gather(mi.Float, b.array, last)
    is_color = i % n_channels < 3
    answer = dr.select(is_color & (trust != 0.0), b.array * weight / trust, 0.0)
    a[:] = mi.TensorXf(a.array + answer, a.shape)
    film.put_block(found)


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
