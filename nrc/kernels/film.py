"""Film: adds frames up with compensated sums; what is not finite or negative stays out and is counted."""

import warp as wp

from nrc.kernels.sampling import is_finite3, max_component

wp.set_module_options({"enable_backward": False})


@wp.func
def add_compensated(sums: wp.array[wp.vec3], errors: wp.array[wp.vec3], i: int, value: wp.vec3):
    """Kahan summation (Kahan 1965): thousands of frames lose nothing to rounding."""
    y = value - errors[i]
    total = sums[i] + y
    errors[i] = (total - sums[i]) - y
    sums[i] = total


@wp.func
def is_valid(c: wp.vec3) -> bool:
    """Finite and nowhere negative."""
    return is_finite3(c) and wp.min(c[0], wp.min(c[1], c[2])) >= 0.0


@wp.kernel
def accumulate(
    first: int,
    # Params
    cache_weight: float,  # of this frame's cache values among those of all frames
    clamp: float,  # largest component a frame may add to a pixel, 0 for none
    # In
    radiance: wp.array[wp.vec3],  # (pixels,)
    query_vertex: wp.array[int],  # (pixels,) 0 where no cache value is to be added; (1,) without cache
    query_weight: wp.array[wp.vec3],
    query_place: wp.array[int],
    cache_radiance: wp.array2d[float],  # (queries, 3)
    # In/out
    sums: wp.array[wp.vec3],  # (pixels,)
    errors: wp.array[wp.vec3],  # (pixels,)
    cache_sums: wp.array[wp.vec3],  # (pixels,) as query_vertex
    cache_errors: wp.array[wp.vec3],
    clamped: wp.array[wp.vec3],  # (pixels,) radiance removed by the clamp
    n_invalid: wp.array[int],  # (pixels,)
    # Out
    out_frame: wp.array[wp.vec3],  # (pixels,) this frame alone
):
    """Finish a frame's pixel and add what its path found, and what the cache answered, to the film.

    The two are averaged apart: their expectations add up, and frames of a cache that still learns can count less. One
    thread per pixel.
    """
    i = first + wp.tid()
    found = radiance[i]
    cached = wp.vec3(0.0, 0.0, 0.0)
    has_query = bool(False)
    if query_vertex.shape[0] == radiance.shape[0]:
        has_query = query_vertex[i] > 0
    if has_query:
        row = query_place[i]
        answer = wp.vec3(cache_radiance[row, 0], cache_radiance[row, 1], cache_radiance[row, 2])
        cached = wp.cw_mul(query_weight[i], answer)
    if not is_valid(found) or not is_valid(cached):
        n_invalid[i] = n_invalid[i] + 1
        found = wp.vec3(0.0, 0.0, 0.0)
        cached = found
    if clamp > 0.0:
        excess = max_component(found + cached) / clamp
        if excess > 1.0:
            clamped[i] = clamped[i] + (found + cached) * (1.0 - 1.0 / excess)
            found = found / excess
            cached = cached / excess
    out_frame[i] = found + cached
    add_compensated(sums, errors, i, found)
    if has_query:
        add_compensated(cache_sums, cache_errors, i, cache_weight * cached)


@wp.kernel
def average_frames(
    first: int,
    # Params
    frame_weight: float,  # 1 / frames
    cache_weight: float,  # 1 / sum of the frames' cache weights, 0 without
    # In
    sums: wp.array[wp.vec3],  # (pixels,)
    errors: wp.array[wp.vec3],  # (pixels,)
    cache_sums: wp.array[wp.vec3],  # (pixels,), or (1,) without cache
    cache_errors: wp.array[wp.vec3],
    # Out
    out_mean: wp.array[wp.vec3],  # (pixels,) [W m^-2 sr^-1]
):
    """Mean of the frames in a film. One thread per pixel."""
    i = first + wp.tid()
    mean = frame_weight * (sums[i] - errors[i])
    if cache_weight > 0.0 and cache_sums.shape[0] == sums.shape[0]:
        mean += cache_weight * (cache_sums[i] - cache_errors[i])
    out_mean[i] = mean
