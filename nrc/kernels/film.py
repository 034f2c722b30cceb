"""Film: adds frames up with compensated sums; what is not finite or negative stays out and is counted."""

import warp as wp

from nrc.kernels.sampling import is_finite3

wp.set_module_options({"enable_backward": False})


@wp.func
def add_compensated(sums: wp.array[wp.vec3], errors: wp.array[wp.vec3], i: int, value: wp.vec3):
    """Kahan summation (Kahan 1965): thousands of frames lose nothing to rounding."""
    y = value - errors[i]
    total = sums[i] + y
    errors[i] = (total - sums[i]) - y
    sums[i] = total


@wp.kernel
def accumulate(
    first: int,
    # Params
    weight: float,  # of this frame
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
    clamped: wp.array[wp.vec3],  # (pixels,) radiance removed by the clamp
    n_invalid: wp.array[int],  # (pixels,)
    # Out
    out_frame: wp.array[wp.vec3],  # (pixels,) this frame alone
):
    """Finish a frame's pixel and add it to the film with its weight. One thread per pixel."""
    i = first + wp.tid()
    value = radiance[i]
    if query_vertex.shape[0] == radiance.shape[0]:
        if query_vertex[i] > 0:
            row = query_place[i]
            cached = wp.vec3(cache_radiance[row, 0], cache_radiance[row, 1], cache_radiance[row, 2])
            value += wp.cw_mul(query_weight[i], cached)
    if not is_finite3(value) or wp.min(value[0], wp.min(value[1], value[2])) < 0.0:
        n_invalid[i] = n_invalid[i] + 1
        value = wp.vec3(0.0, 0.0, 0.0)
    if clamp > 0.0:
        limited = wp.vec3(wp.min(value[0], clamp), wp.min(value[1], clamp), wp.min(value[2], clamp))
        clamped[i] = clamped[i] + weight * (value - limited)
        value = limited
    out_frame[i] = value
    add_compensated(sums, errors, i, weight * value)
