"""The path tracing megakernel: camera rays to radiance, cache queries and training records.

One path per pixel and frame, with next-event estimation, multiple importance sampling (balance heuristic) and Russian
roulette. A path that ends in the cache leaves a query record. Training paths go on behind it and leave a record for
every vertex, with the coefficients (A, B) of the target's recursion (`records.py`), to be gathered backwards once the
value at the end of the suffix is known (Müller et al. 2021, section 3).
"""

import warp as wp

from nrc.kernels.bsdf import (
    bsdf_albedo,
    bsdf_eval_pdf,
    bsdf_has_smooth_lobe,
    bsdf_roughness,
    bsdf_sample,
)
from nrc.kernels.camera import CameraView, camera_ray
from nrc.kernels.intersect import ray_closest
from nrc.kernels.light import (
    environment_radiance,
    light_pdf_environment,
    light_pdf_triangle,
    light_sample,
)
from nrc.kernels.paths import (
    TrainingTiles,
    has_spread,
    inside_box,
    primary_footprint,
    spread_increment,
    training_slot,
)
from nrc.kernels.records import RecordView, TrainingView, close_path, open_record, store_record
from nrc.kernels.rng import rng_float, rng_init, rng_next, rng_vec2, sobol_key, sobol_vec2
from nrc.kernels.sampling import max_component, to_local, to_world
from nrc.kernels.scene import (
    MAX_ALPHA_LAYERS,
    SHADOW_EPSILON,
    SceneView,
    Surface,
    find_surface,
    hit_opacity,
    is_consistent,
    lit_side,
    offset_origin,
    pass_through,
    rest_position,
    shadow_transmittance,
)

wp.set_module_options({"enable_backward": False})

INTEGRATOR_PATH = wp.constant(0)
INTEGRATOR_NRC = wp.constant(1)
INTEGRATOR_CACHE = wp.constant(2)

# Groups of two dimensions that follow Sobol' points: film, lens, then per vertex the choice of light and BSDF lobe, the
# point on the light, and the direction.
GROUP_FILM = wp.constant(0)
GROUP_LENS = wp.constant(1)
GROUP_FIRST_VERTEX = wp.constant(2)
GROUPS_PER_VERTEX = wp.constant(3)
SOBOL_VERTICES = wp.constant(2)

INFINITE = wp.constant(1.0e30)


@wp.struct
class TraceParams:
    """What stays the same for all paths of a frame."""

    integrator: int
    split: int  # [px] columns left of it follow their paths to the end
    seed: int
    frame: int
    sobol: wp.array2d[wp.uint32]  # (points, 2) in bit-reversed order
    sobol_index: int  # of the frame, bit-reversed
    sobol_round: int  # how often all points have been used
    max_depth: int  # edges from the camera
    rr_depth: int
    spread_threshold: float  # c of Eq. 4, Müller et al. 2021
    min_spread: float  # [scene units] least root of the area spread where a path may end in the cache
    object_space: int  # whether the cache knows points by where they were at rest
    box_lower: wp.vec3  # where the cache is defined
    box_upper: wp.vec3
    tiles: TrainingTiles
    continuation: float  # probability that a training suffix goes on where it could end in the cache
    unbiased_fraction: float  # of training paths that end by Russian roulette alone


@wp.func
def write_record(view: RecordView, i: int, position: wp.vec3, surface: wp.ref[Surface], wo: wp.vec3, wo_local: wp.vec3):
    """Describe the surface point to the cache, which knows it as `position`; `wo_local` is in the shading frame."""
    albedo = bsdf_albedo(surface.bsdf, wo_local)
    roughness = bsdf_roughness(surface.bsdf)
    store_record(view, i, position, wo, surface.frame.n, roughness, albedo.diffuse, albedo.specular)


@wp.kernel
def trace_paths(
    first: int,
    # Scene
    scene: SceneView,
    camera: CameraView,
    # Params
    params: TraceParams,
    # Out
    out_radiance: wp.array[wp.vec3],  # (pixels,) found before the path ended [W m^-2 sr^-1]
    out_query: RecordView,  # (pixels,)
    out_query_weight: wp.array[wp.vec3],  # (pixels,) throughput up to the query
    out_query_vertex: wp.array[int],  # (pixels,) index of the queried vertex from 1, 0 for none
    out_query_spread: wp.array[float],  # (pixels,) the path's area spread there over the primary footprint
    out_training: TrainingView,
):
    """Trace one path through each pixel. One thread per path."""
    i = first + wp.tid()
    x = i % camera.width
    y = i // camera.width
    rng = rng_init(params.seed, params.frame, i)
    key = sobol_key(params.seed, params.sobol_round, i)
    film = sobol_vec2(params.sobol, params.sobol_index, GROUP_FILM, key)
    lens = wp.vec2(0.0, 0.0)
    if camera.aperture_radius > 0.0:
        lens = sobol_vec2(params.sobol, params.sobol_index, GROUP_LENS, key)
    ray = camera_ray(camera, x, y, film, lens)
    o = ray.o
    d = ray.d
    previous = ray.o
    previous_n = wp.vec3(0.0, 0.0, 0.0)  # for which lights were chosen there

    L = wp.vec3(0.0, 0.0, 0.0)
    beta = wp.vec3(1.0, 1.0, 1.0)
    eta = float(1.0)
    pdf = float(0.0)  # of the direction d; meaningless after a delta bounce
    delta = int(1)
    footprint = float(0.0)  # a_0
    spread = float(0.0)  # square root of the path's spread
    suffix = int(0)  # 1 behind the query vertex
    query_vertex = int(0)
    roulette_start = int(0)

    integrator = params.integrator
    if x < params.split:
        integrator = INTEGRATOR_PATH
    slot = training_slot(params.tiles, x, y)
    unbiased = int(0)
    n_records = int(0)
    A = wp.vec3(0.0, 0.0, 0.0)
    B = wp.vec3(0.0, 0.0, 0.0)
    tail = int(0)
    if slot >= 0:
        if rng_float(rng_init(params.seed, params.frame, -1 - slot)) < params.unbiased_fraction:
            unbiased = 1

    surface = Surface()
    vertex = int(0)
    while vertex < params.max_depth:
        hit = ray_closest(scene.accel, o, d, INFINITE)
        if scene.has_alpha != 0:
            for _ in range(MAX_ALPHA_LAYERS):
                if hit.face >= 0:
                    opacity = hit_opacity(scene, hit)
                    if opacity < 1.0:
                        rng = rng_next(rng)
                        if rng_float(rng) >= opacity:
                            o = pass_through(scene, hit, o, d)
                            hit = ray_closest(scene.accel, o, d, INFINITE)
                        else:
                            break
                    else:
                        break
                else:
                    break
        if hit.face < 0:
            if scene.environment_light >= 0:
                value = environment_radiance(scene, d)
                if delta == 0:
                    value *= pdf / (pdf + light_pdf_environment(scene, d))
                if suffix == 0:
                    L += wp.cw_mul(beta, value)
                A += wp.cw_mul(B, value)
            break

        find_surface(scene, hit, d, surface)
        wo = -d
        distance = wp.length(surface.p - previous)
        cos_arrival = wp.abs(wp.dot(surface.ng, d))

        # Emission, with the weight of having found it by BSDF sampling.
        if max_component(surface.emission) > 0.0:
            value = surface.emission
            if delta == 0:
                value *= pdf / (pdf + light_pdf_triangle(scene, hit, distance, d, previous, previous_n))
            if suffix == 0:
                L += wp.cw_mul(beta, value)
            A += wp.cw_mul(B, value)
        if vertex + 1 >= params.max_depth:
            break

        # The path's area spread and the decision to end it in the cache.
        if vertex == 0:
            footprint = primary_footprint(distance, cos_arrival)
        elif delta == 0:
            spread += spread_increment(distance, pdf, cos_arrival)
        wo_local = to_local(surface.frame, wo)
        flip = float(1.0)
        if surface.two_sided != 0 and wo_local[2] < 0.0:
            flip = -1.0
            wo_local = wp.vec3(wo_local[0], wo_local[1], -wo_local[2])
        smooth = bsdf_has_smooth_lobe(surface.bsdf)
        position = surface.p
        if params.object_space != 0:
            position = rest_position(scene, hit)
        cacheable = smooth and inside_box(position, params.box_lower, params.box_upper)
        if integrator != INTEGRATOR_PATH and cacheable:
            wide = has_spread(spread, footprint, params.spread_threshold)
            if suffix == 0:
                if (wide and vertex > 0 and spread >= params.min_spread) or integrator == INTEGRATOR_CACHE:
                    write_record(out_query, i, position, surface, wo, wo_local)
                    out_query_weight[i] = beta
                    out_query_spread[i] = spread * spread / footprint
                    query_vertex = vertex + 1
                    if slot < 0:
                        break
                    suffix = 1
                    spread = float(0.0)
                    beta = wp.vec3(1.0, 1.0, 1.0)
                    eta = float(1.0)
                    roulette_start = vertex
            elif wide and unbiased == 0:
                rng = rng_next(rng)
                if rng_float(rng) >= params.continuation:
                    write_record(out_training.tail, slot, position, surface, wo, wo_local)
                    tail = 1
                    break
                spread = float(0.0)

        # Russian roulette.
        if vertex - roulette_start >= params.rr_depth:
            q = wp.min(max_component(beta) * eta * eta, 0.95)
            rng = rng_next(rng)
            if rng_float(rng) >= q:
                break
            beta = beta / q
            B = B / q

        if slot >= 0 and cacheable and n_records < out_training.max_records:
            place = open_record(out_training, slot, n_records, A, B)
            write_record(out_training.records, place, position, surface, wo, wo_local)
            n_records += 1
            A = wp.vec3(0.0, 0.0, 0.0)
            B = wp.vec3(1.0, 1.0, 1.0)

        # Next-event estimation.
        n = lit_side(surface, wo)
        choice = wp.vec2(0.0, 0.0)  # of the light and of the BSDF lobe
        on_light = wp.vec2(0.0, 0.0)
        direction = wp.vec2(0.0, 0.0)
        if vertex < SOBOL_VERTICES:
            group = GROUP_FIRST_VERTEX + GROUPS_PER_VERTEX * vertex
            choice = sobol_vec2(params.sobol, params.sobol_index, group, key)
            on_light = sobol_vec2(params.sobol, params.sobol_index, group + 1, key)
            direction = sobol_vec2(params.sobol, params.sobol_index, group + 2, key)
        else:
            choice, rng = rng_vec2(rng)
            on_light, rng = rng_vec2(rng)
            direction, rng = rng_vec2(rng)
        if smooth:
            light = light_sample(scene, surface.p, n, choice[0], on_light)
            if light.pdf > 0.0 and max_component(light.value) > 0.0:
                wi_local = to_local(surface.frame, light.wi)
                wi_local = wp.vec3(wi_local[0], wi_local[1], flip * wi_local[2])
                f_pdf = bsdf_eval_pdf(surface.bsdf, wo_local, wi_local)
                f = wp.vec3(f_pdf[0], f_pdf[1], f_pdf[2])
                if max_component(f) > 0.0 and is_consistent(surface, light.wi, flip * wi_local[2]):
                    origin = offset_origin(surface.p, surface.ng, light.wi)
                    to_light = surface.p + light.distance * light.wi - origin
                    length = wp.length(to_light)
                    visible = shadow_transmittance(scene, origin, to_light / length, length * (1.0 - SHADOW_EPSILON))
                    if visible > 0.0:
                        weight = visible * wp.abs(wi_local[2]) / light.pdf
                        if light.delta == 0:
                            weight *= light.pdf / (light.pdf + f_pdf[3])
                        value = wp.cw_mul(f, light.value) * weight
                        if suffix == 0:
                            L += wp.cw_mul(beta, value)
                        A += wp.cw_mul(B, value)

        # Next direction.
        bounce = bsdf_sample(surface.bsdf, wo_local, wp.vec3(choice[1], direction[0], direction[1]))
        if max_component(bounce.weight) <= 0.0:
            break
        d = wp.normalize(to_world(surface.frame, wp.vec3(bounce.wi[0], bounce.wi[1], flip * bounce.wi[2])))
        if not is_consistent(surface, d, flip * bounce.wi[2]):
            break
        pdf = bounce.pdf
        delta = bounce.delta
        eta *= bounce.eta
        beta = wp.cw_mul(beta, bounce.weight)
        B = wp.cw_mul(B, bounce.weight)
        previous = surface.p
        previous_n = n
        o = offset_origin(surface.p, surface.ng, d)
        vertex += 1

    out_radiance[i] = L
    if params.integrator != INTEGRATOR_PATH:
        out_query_vertex[i] = query_vertex
        close_path(out_training, slot, n_records, A, B, tail)
