"""Paths through a Mitsuba scene that end in the radiance cache or train it, as Dr.Jit wavefronts.

The algorithm is that of `nrc.kernels.trace` with Mitsuba's shapes, BSDFs, emitters and samplers. `trace_picture`
follows camera paths until their footprint has spread and leaves a query record of each; `trace_training` follows fewer
paths further and leaves a record per vertex, with the coefficients of T_i = A_i + B_i T_{i+1} (Müller et al. 2021,
section 3), which `gather_targets` completes.

Records are tuples of flat arrays in the order of `FIELDS`, the components of a row side by side: the layout of
`nrc.Records`. All functions need an active JIT variant of Mitsuba with RGB colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import drjit
import mitsuba

dr: Any = drjit  # type checkers see neither the active variant nor what Dr.Jit makes of the code
mi: Any = mitsuba

# Groups of two dimensions that follow Sobol' points: film, lens, then per vertex light, lobe and direction.
GROUP_FILM, GROUP_LENS, GROUP_FIRST_VERTEX, GROUPS_PER_VERTEX = 0, 1, 2, 3
SOBOL_BITS = 14  # 2^14 points; later samples of a pixel use them again
SOBOL_VERTICES = 2

MIN_COS = 1.0e-3  # bounds a vertex' footprint at grazing incidence
MIN_REFLECTANCE = 0.02  # where there are other lobes than diffuse ones: the albedo estimate may have missed them
# Where a BSDF is sampled to estimate its albedo: lobe, then direction. Always the same points, so that the cache sees
# the same albedo whenever it is asked about a point.
ALBEDO_POINTS = ((0.25, (0.35, 0.2)), (0.75, (0.65, 0.7)))
FIELDS = {"position": 3, "wo": 3, "normal": 3, "roughness": 1, "diffuse": 3, "specular": 3}
NO_PLACE = 0xFFFFFFFF


@dataclass(frozen=True)
class PathSettings:
    """How paths are traced, by the names of `nrc.pathtracer.PathTracerConfig`.

    Attributes:
        sobol: The first vertices' random numbers are Sobol' points instead of the sampler's.
    """

    max_depth: int
    rr_depth: int
    hide_emitters: bool
    spread_threshold: float
    sobol: bool
    max_records: int = 8
    continuation: float = 0.7
    unbiased_fraction: float = 1.0 / 16.0


def sobol_sample(table: Any, index: Any, key: Any, group: Any) -> Any:
    """Point2f: sample `index` of the pixel with `key` in a group of dimensions.

    A nested uniform shuffle and digital shifts by hashing (Burley 2020, "Practical Hash-based Owen Scrambling", section
    4). `table` holds the points flat, in bit-reversed order of their indices.
    """
    seed, shift_x = mi.sample_tea_32(key, mi.UInt32(2 * group))
    shift_y, _ = mi.sample_tea_32(key, mi.UInt32(2 * group + 1))
    x = dr.brev(index) >> (32 - SOBOL_BITS)
    x ^= x * 0x3D20ADEA
    x += seed
    x *= (seed >> 16) | 1
    x ^= x * 0x05526C56
    x ^= x * 0x53A22864
    row = 2 * (x & (2**SOBOL_BITS - 1))
    u = dr.gather(mi.UInt32, table, row) ^ shift_x
    v = dr.gather(mi.UInt32, table, row + 1) ^ shift_y
    return mi.Point2f(mi.Float(u >> 8), mi.Float(v >> 8)) * 2.0**-24


def inside(box: Any, p: Any) -> Any:
    """Whether the cache is defined at `p`; `box` is its two corners."""
    return dr.all((p >= box[0]) & (p <= box[1]))


def power_heuristic(pdf: Any, other: Any) -> Any:
    """Weight of a sample drawn with density `pdf` where another technique has `other` (Veach 1997, Eq. 9.13)."""
    a, b = dr.square(pdf), dr.square(other)
    return dr.select(a > 0.0, a / (a + b), 0.0)


def reflectance(bsdf: Any, si: Any, active: Any) -> tuple[Any, Any, Any]:
    """Diffuse and specular albedo and roughness of one BSDF, for the cache; to be dispatched.

    Mitsuba's BSDFs know neither albedo nor roughness. Where there are other lobes than diffuse reflection the albedo is
    estimated by sampling at fixed points: it needs to be bounded, the same whenever the point is asked about, and not 0
    where the surface scatters, for the cache predicts radiance over albedo. Roughness is that of a GGX lobe with the
    highest sampled density in its centre.
    """
    if bsdf is None:
        return mi.Spectrum(0.0), mi.Spectrum(0.0), mi.Float(1.0)
    diffuse = bsdf.eval_diffuse_reflectance(si, active)
    diffuse = dr.clip(dr.select(dr.isfinite(diffuse), diffuse, 0.0), 0.0, 1.0)
    sides = int(mi.BSDFFlags.FrontSide) | int(mi.BSDFFlags.BackSide) | int(mi.BSDFFlags.SpatiallyVarying)
    if bsdf.flags() & ~sides == int(mi.BSDFFlags.DiffuseReflection):
        return diffuse, mi.Spectrum(0.0), mi.Float(1.0)
    total, roughness = mi.Spectrum(0.0), mi.Float(1.0)
    for lobe, direction in ALBEDO_POINTS:
        sample, weight = bsdf.sample(mi.BSDFContext(), si, mi.Float(lobe), mi.Point2f(direction), active)
        total += dr.select(dr.isfinite(weight), weight, 0.0)
        alpha = dr.rsqrt(dr.maximum(4.0 * dr.pi * sample.pdf, 1.0))  # of pdf = D / 4, where D = 1 / (π α²)
        roughness = dr.minimum(roughness, dr.sqrt(alpha))
    total = dr.clip(total / len(ALBEDO_POINTS), MIN_REFLECTANCE, 1.0)
    diffuse = dr.minimum(diffuse, total)
    return diffuse, total - diffuse, roughness


def describe(si: Any, bsdf: Any, d: Any, active: Any) -> tuple[Any, ...]:
    """The fields of a record: what the cache is told about a point that a ray of direction `d` has hit."""
    diffuse, specular, roughness = dr.dispatch(bsdf, reflectance, si, active)
    n = si.sh_frame.n
    return si.p, -d, dr.select(dr.dot(n, d) > 0.0, -n, n), roughness, diffuse, specular


def scatter_record(buffers: tuple[Any, ...], record: tuple[Any, ...], place: Any, active: Any) -> None:
    """Write row `place` of the flat buffers."""
    for buffer, value in zip(buffers, record, strict=True):
        dr.scatter(buffer, value, place, active)


def gather_record(buffers: tuple[Any, ...], place: Any) -> tuple[Any, ...]:
    """Read row `place` of the flat buffers."""
    types = (mi.Vector3f if width == 3 else mi.Float for width in FIELDS.values())
    return tuple(dr.gather(dtype, buffer, place) for dtype, buffer in zip(types, buffers, strict=True))


def empty_records(n: int) -> tuple[Any, ...]:
    """Flat buffers for `n` records."""
    return tuple(dr.empty(mi.Float, n * width) for width in FIELDS.values())


@dr.syntax
def follow(
    scene: Any,
    sampler: Any,
    ray: Any,
    box: Any,
    table: Any,
    index: Any,
    key: Any,
    settings: PathSettings,
    active: Any,
    staged: Any,
) -> Any:
    """Trace paths to their end in the cache, or where they end otherwise.

    Args:
        box: Corners of where the cache is defined.
        table, index, key: See `sobol_sample`; a picture's paths only.
        active: Which paths to trace.
        staged: Buffers of training paths (records, offset, factor), `max_records` rows per path; None for a picture.

    Returns:
        Radiance found, whether the path hit anything, throughput, whether it ended in the cache, the ray and the
        intersection where it did, and the number of records.
    """
    training = staged is not None
    context = mi.BSDFContext()
    ray = mi.Ray3f(ray)
    L, beta, eta = mi.Spectrum(0.0), mi.Spectrum(1.0), mi.Float(1.0)
    depth, roulette_start = mi.UInt32(0), mi.UInt32(0)
    active, valid, ends = mi.Bool(active), mi.Bool(False), mi.Bool(False)
    previous = dr.zeros(mi.SurfaceInteraction3f)
    previous.p = ray.o
    pdf, delta = mi.Float(1.0), mi.Bool(True)
    footprint, spread = mi.Float(0.0), mi.Float(0.0)  # a_0, and the square root of the path's spread
    slot = dr.arange(mi.UInt32, dr.width(ray))
    suffix, unbiased = mi.Bool(False), mi.Bool(False)
    A, B, n_records = mi.Spectrum(0.0), mi.Spectrum(0.0), mi.UInt32(0)
    if dr.hint(training, mode="scalar"):
        unbiased = sampler.next_1d() < settings.unbiased_fraction
    pi = scene.ray_intersect_preliminary(ray, coherent=True, active=active)
    while dr.hint(active, label="nrc", exclude=[settings, staged, context]):
        si = pi.compute_surface_interaction(ray, ray_flags=mi.RayFlags.All, active=active)
        bsdf = si.bsdf(ray)
        hit = active & si.is_valid()
        going = mi.Bool(hit)
        hidden = mi.Bool(False)
        emitting = mi.Bool(active)
        if dr.hint(settings.hide_emitters, mode="scalar"):  # as if there were none, for the camera's rays
            hidden = hit & (depth == 0) & (si.shape.emitter() != None)  # noqa: E711
            emitting = active & (depth > 0)

        # Emission, with the weight of having found it by BSDF sampling.
        ds = mi.DirectionSample3f(scene, si=si, ref=previous)
        light_pdf = scene.pdf_emitter_direction(previous, ds, emitting & ~delta)
        value = ds.emitter.eval(si, emitting) * dr.select(delta, 1.0, power_heuristic(pdf, light_pdf))
        value = dr.select(emitting, value, 0.0)
        if dr.hint(training, mode="scalar"):
            A += B * value
        else:
            L += beta * value
            valid |= emitting & ~hit & (ds.emitter != None)  # noqa: E711
        going &= (depth + 1 < settings.max_depth) & ~hidden

        # The path's area spread and the decision to end it in the cache.
        distance = dr.norm(si.p - previous.p)
        cos_arrival = dr.maximum(dr.abs_dot(si.n, ray.d), MIN_COS)
        footprint = dr.select(depth == 0, dr.square(distance) / (4.0 * dr.pi * cos_arrival), footprint)
        step = distance * dr.rsqrt(dr.maximum(pdf * cos_arrival, 1.0e-20))
        spread = dr.select(delta, spread, spread + step)
        smooth = mi.has_flag(bsdf.flags(), mi.BSDFFlags.Smooth)
        cacheable = going & smooth & inside(box, si.p)
        wide = cacheable & (depth > 0) & (dr.square(spread) > settings.spread_threshold * footprint)
        if dr.hint(training, mode="scalar"):
            first = wide & ~suffix
            again = wide & suffix & ~unbiased
            ends = again & (sampler.next_1d() >= settings.continuation)
            spread = dr.select(first | again, 0.0, spread)
            beta = dr.select(first, 1.0, beta)
            eta = dr.select(first, 1.0, eta)
            roulette_start = dr.select(first, depth, roulette_start)
            suffix |= first
        else:
            ends = mi.Bool(wide)
        going &= ~ends

        if dr.hint(training, mode="scalar"):
            records, offset, factor = staged
            opens = going & cacheable & (n_records < settings.max_records)
            place = slot * settings.max_records + n_records
            dr.scatter(offset, A, place - 1, opens & (n_records > 0))
            dr.scatter(factor, B, place - 1, opens & (n_records > 0))
            scatter_record(records, describe(si, bsdf, ray.d, opens), place, opens)
            n_records = dr.select(opens, n_records + 1, n_records)
            A = dr.select(opens, 0.0, A)
            B = dr.select(opens, 1.0, B)

        # Light sampling and the next direction.
        on_light, lobe, direction = sampler.next_2d(), sampler.next_1d(), sampler.next_2d()
        if dr.hint(settings.sobol and not training, mode="scalar"):
            early = depth < SOBOL_VERTICES
            group = GROUP_FIRST_VERTEX + GROUPS_PER_VERTEX * depth
            on_light = dr.select(early, sobol_sample(table, index, key, group), on_light)
            lobe = dr.select(early, sobol_sample(table, index, key, group + 1).x, lobe)
            direction = dr.select(early, sobol_sample(table, index, key, group + 2), direction)
        lit = going & smooth
        ds, light = scene.sample_emitter_direction(si, on_light, True, lit)
        lit &= ds.pdf != 0.0
        wi = si.to_local(ds.d)
        f, f_pdf, bounce, weight = bsdf.eval_pdf_sample(context, si, wi, lobe, direction, going)
        value = f * light * dr.select(ds.delta, 1.0, power_heuristic(ds.pdf, f_pdf))
        value = dr.select(lit, value, 0.0)
        if dr.hint(training, mode="scalar"):
            A += B * value
        else:
            L += beta * value
            valid |= hit & ~hidden & ~mi.has_flag(bounce.sampled_type, mi.BSDFFlags.Null)
        ray_next = si.spawn_ray(dr.select(hidden, ray.d, si.to_world(bounce.wo)))
        beta[going] *= weight
        B[going] *= weight
        eta[going] *= bounce.eta
        if dr.hint(training, mode="scalar"):  # what the camera sees black must not darken the records behind it
            beta = dr.select(dr.max(beta) > 0.0, beta, B)
        going &= dr.max(beta) > 0.0

        # Russian roulette.
        survival = dr.minimum(dr.max(beta) * dr.square(eta), 0.95)
        roulette = depth + 1 >= settings.rr_depth + roulette_start
        survives = sampler.next_1d() < survival
        going &= ~roulette | survives
        scale = dr.select(going & roulette, dr.rcp(survival), 1.0)
        beta *= scale
        B *= scale

        previous[going] = si
        pdf[going] = bounce.pdf
        delta[going] = mi.has_flag(bounce.sampled_type, mi.BSDFFlags.Delta)
        depth[going] += 1
        active = going | hidden
        pi_next = scene.ray_intersect_preliminary(ray_next, coherent=False, active=active)
        ray[active] = ray_next
        pi[active] = pi_next
    if dr.hint(training, mode="scalar"):
        records, offset, factor = staged
        place = slot * settings.max_records + n_records - 1
        dr.scatter(offset, A, place, n_records > 0)
        dr.scatter(factor, dr.select(ends, B, 0.0), place, n_records > 0)
    return L, valid, beta, ends, ray, pi, n_records


def compact(ray: Any, pi: Any, ends: Any) -> tuple[Any, ...]:
    """Records of the paths that end in the cache, their number, and each path's row (`NO_PLACE` for the others).

    Rows are sorted by shape: neighbours that share shape and BSDF are described several times faster.
    """
    n = dr.width(ends)
    lane = dr.arange(mi.UInt32, n)
    order = dr.argsort(dr.select(ends, dr.reinterpret_array(mi.UInt32, pi.shape), NO_PLACE))
    place = dr.empty(mi.UInt32, n)
    dr.scatter(place, lane, order)
    count = dr.sum(dr.select(ends, mi.UInt32(1), mi.UInt32(0)))
    active = lane < count
    ray, pi = dr.gather(mi.Ray3f, ray, order, active), dr.gather(type(pi), pi, order, active)
    si = pi.compute_surface_interaction(ray, ray_flags=mi.RayFlags.All, active=active)
    records = empty_records(n)
    scatter_record(records, describe(si, si.bsdf(ray), ray.d, active), lane, active)
    return records, mi.Int32(count), dr.select(ends, place, NO_PLACE)


class FilmPoints:
    """What `ADIntegrator.sample_rays` draws from instead of a sampler: Sobol' points, one group after the other."""

    def __init__(self, sampler: Any, n_samples: int, table: Any, index: Any, key: Any) -> None:
        self._sampler, self._n_samples = sampler, n_samples
        self._points = table, index, key
        self._group = GROUP_FILM

    def sample_count(self) -> int:
        return self._n_samples

    def next_1d(self) -> Any:
        return self._sampler.next_1d()

    def next_2d(self) -> Any:
        group = mi.UInt32(self._group)
        self._group += 1
        return sobol_sample(*self._points, group)


class PassSampler(FilmPoints):
    """The same from the scene's own sampler, for the samples of one pass."""

    def next_2d(self) -> Any:
        return self._sampler.next_2d()


def picture_rays(
    sensor: Any, sampler: Any, n_samples: int, n_paths: int, sobol: bool, table: Any, first_sample: Any, seed: Any
) -> Any:
    """Camera rays, `n_samples` through each pixel.

    Args:
        n_paths: Pixels, with the film's border where it samples that, times `n_samples`.
        sobol, table: Whether to use Sobol' points on film and lens, and which.
        first_sample: (1,) how many samples each pixel has had.
        seed: (1,) of the render call.

    Returns:
        Rays, their weights and positions on the film, and the arguments `index` and `key` of `sobol_sample`.
    """
    lane = dr.arange(mi.UInt32, n_paths)
    pixel = lane // n_samples
    index = first_sample + (lane - pixel * n_samples)
    key, _ = mi.sample_tea_32(pixel, seed + (index >> SOBOL_BITS) * 0x9E3779B9)
    draw = (FilmPoints if sobol else PassSampler)(sampler, n_samples, table, index, key)
    ray, weight, position = mi.ad.integrators.common.ADIntegrator.sample_rays(
        None, scene=None, sensor=sensor, sampler=draw
    )
    sampler.schedule_state()
    return mi.Ray3f(ray), weight, position, index, key


def trace_picture(
    scene: Any, sampler: Any, ray: Any, box: Any, table: Any, index: Any, key: Any, settings: PathSettings
) -> Any:
    """Trace paths to where they end in the cache, or otherwise; the arguments are those of `follow`.

    Returns:
        Radiance found, alpha, weight of the cache's answer and its place, and the records to ask the cache about with
        their number.
    """
    L, valid, beta, ends, ray, pi, _ = follow(scene, sampler, ray, box, table, index, key, settings, True, None)
    sampler.schedule_state()  # otherwise the next kernel would trace all paths again for it
    dr.eval(L, valid, beta, ends, ray, pi)
    records, count, place = compact(ray, pi, ends)
    return L, dr.select(valid, mi.Float(1.0), mi.Float(0.0)), beta, place, records, count


def training_rays(sensor: Any, sampler: Any, n: int, shift: Any) -> Any:
    """`n` camera rays through points of a lattice on the film, shifted by the Point2f `shift` in [0, 1)²."""
    lane = dr.arange(mi.UInt32, n)
    # The lattice of Roberts 2018, "The unreasonable effectiveness of quasirandom sequences", in units of 2^-32.
    film = mi.Point2f(mi.Float(lane * 3242174889), mi.Float(lane * 2447445414)) * 2.0**-32 + shift
    film -= dr.floor(film)
    aperture = sampler.next_2d() if sensor.needs_aperture_sample() else mi.Point2f(0.5)
    time = sensor.shutter_open() + sampler.next_1d() * sensor.shutter_open_time()
    ray, _ = sensor.sample_ray(time, 0.0, film, aperture)
    sampler.schedule_state()
    return ray


def trace_training(scene: Any, sampler: Any, ray: Any, n: int, n_paths: Any, box: Any, settings: PathSettings) -> Any:
    """Trace the first `n_paths`, (1,), of `n` training paths.

    Returns:
        Staged records (`max_records` per path) with offsets and factors, the number of records of each path, the place
        of its tail (`NO_PLACE` for none), and the tails' records with their number.
    """
    n_rows = n * settings.max_records
    staged = empty_records(n_rows), dr.empty(mi.Float, 3 * n_rows), dr.empty(mi.Float, 3 * n_rows)
    active = dr.arange(mi.UInt32, n) < n_paths
    unused = mi.UInt32(0)
    _, _, _, ends, ray, pi, count = follow(scene, sampler, ray, box, unused, unused, unused, settings, active, staged)
    ends &= count > 0
    sampler.schedule_state()
    dr.eval(ends, ray, pi, count)
    tails, n_tails, tail_place = compact(ray, pi, ends)
    return staged, count, tail_place, tails, n_tails


@dr.syntax
def gather_targets(staged: Any, count: Any, tail_place: Any, tail_radiance: Any, max_records: int) -> Any:
    """Walk training paths backwards, T_i = A_i + B_i T_{i+1}.

    Args:
        tail_radiance: Flat answers of the cache for the tails.

    Returns:
        Records side by side, their number and flat targets [W m^-2 sr^-1].
    """
    records, offset, factor = staged
    n_paths = dr.width(count)
    end = dr.cumsum(count)
    gathered, targets = empty_records(n_paths * max_records), dr.empty(mi.Float, 3 * n_paths * max_records)
    slot = dr.arange(mi.UInt32, n_paths)
    target = dr.gather(mi.Spectrum, tail_radiance, tail_place, tail_place != NO_PLACE)
    k = mi.UInt32(0)
    while k < count:
        k += 1
        source, place = slot * max_records + count - k, end - k
        target = dr.gather(mi.Spectrum, offset, source) + dr.gather(mi.Spectrum, factor, source) * target
        dr.scatter(targets, target, place)
        scatter_record(gathered, gather_record(records, source), place, True)
    total = mi.Int32(dr.gather(mi.UInt32, end, n_paths - 1))
    return gathered, total, targets


def add_samples(
    block: Any,
    has_alpha: bool,
    position: Any,
    weight: Any,
    L: Any,
    alpha: Any,
    beta: Any,
    place: Any,
    radiance: Any,
) -> None:
    """Put a pass into its image block: what paths found, and the cache's flat answers."""
    L += beta * dr.gather(mi.Spectrum, radiance, place, place != NO_PLACE)
    block.put(position, [*(L * weight), *([alpha] if has_alpha else []), mi.Float(1.0)])
