"""Pictures of radiance fields: rays of a view in rounds of a few samples each, until they are opaque or leave the box.

A round marches every ray that is still alive, evaluates the densities of its new samples, weighs them, and evaluates
the colours where enough opacity has come together. Samples of all rays are moved together in between, by scans.
"""

import warp as wp

from nrc.kernels.lens import CamerasView, camera_ray
from nrc.kernels.nerf import (
    MIN_TRANSMITTANCE,
    N_CODE,
    TINY,
    MarchView,
    density_of,
    enter_box,
    field_direction,
    field_position,
    find_cascade,
    march_next,
    step_length,
)
from nrc.kernels.occupancy import GRID_SIZE, N_WORDS, morton_encode

wp.set_module_options({"enable_backward": False})

MIN_WEIGHT = wp.constant(1e-3)  # of a sample whose colour is evaluated; it stands for those skipped in front of it
EMPTY = wp.constant(-15.0)  # log density outside of occupied cells
NUDGE = wp.constant(1e-4)  # of a cell, behind its exit
FAR_GREY = wp.constant(0.1)  # of the farthest depth shown


@wp.struct
class ViewRaysView:
    """Rays of a block of pixels and what they have seen so far."""

    origin: wp.array[wp.vec3]
    direction: wp.array[wp.vec3]
    t: wp.array[float]  # where the next sample may lie
    t_end: wp.array[float]
    transmittance: wp.array[float]  # 0 once below MIN_TRANSMITTANCE
    color: wp.array[wp.vec3]  # of the evaluated samples, times their weights
    shown: wp.array[float]  # sum of these weights
    distance: wp.array[float]  # of all samples, times their weights


@wp.kernel
def begin_view_rays(
    first: int,
    # Scene
    cameras: CamerasView,
    march: MarchView,
    # Params
    i_image: int,
    first_pixel: int,
    width: int,
    # Out
    rays: ViewRaysView,
    out_alive: wp.array[int],  # 1 where the ray meets an occupied cell
):
    """Aim rays at the centres of pixels first_pixel + i of a view, row by row. One thread per ray."""
    i = first + wp.tid()
    pixel = first_pixel + i
    o, d = camera_ray(cameras, i_image, wp.vec2(float(pixel % width) + 0.5, float(pixel // width) + 0.5))
    t, t_end = enter_box(march, o, d)
    t = march_next(march, o, d, t + 0.5 * step_length(march, t), t_end)
    rays.origin[i] = o
    rays.direction[i] = d
    rays.t[i] = t
    rays.t_end[i] = t_end
    rays.transmittance[i] = 1.0
    rays.color[i] = wp.vec3()
    rays.shown[i] = 0.0
    rays.distance[i] = 0.0
    out_alive[i] = wp.where(t < t_end, 1, 0)


@wp.kernel
def gather_alive(
    first: int,
    # In
    ray: wp.array[int],  # (slots) ray of each slot; the slot's own number where empty
    alive: wp.array[int],  # (slots)
    end: wp.array[int],  # (slots) inclusive scan of `alive`
    # Out
    out_ray: wp.array[int],
):
    """Move the rays that are alive together. One thread per slot."""
    i = first + wp.tid()
    if alive[i] == 1:
        r = i
        if ray:
            r = ray[i]
        out_ray[end[i] - 1] = r


@wp.kernel
def march_rays(
    first: int,
    # Scene
    march: MarchView,
    # Params
    max_samples: int,
    # In
    ray: wp.array[int],  # (slots)
    # In/out
    rays: ViewRaysView,
    # Out
    out_t: wp.array[float],  # (slots * max_samples)
    out_n: wp.array[int],  # (slots)
):
    """Find up to `max_samples` further samples in occupied cells. One thread per slot."""
    i = first + wp.tid()
    r = ray[i]
    o = rays.origin[r]
    d = rays.direction[r]
    t = rays.t[r]
    t_end = rays.t_end[r]
    n = int(0)
    while t < t_end and n < max_samples:
        out_t[i * max_samples + n] = t
        n += 1
        t = march_next(march, o, d, t + step_length(march, t), t_end)
    rays.t[r] = t
    out_n[i] = n


@wp.kernel
def write_positions(
    first: int,
    # Scene
    march: MarchView,
    # Params
    max_samples: int,
    # In
    ray: wp.array[int],  # (slots)
    t: wp.array[float],  # (slots * max_samples)
    n: wp.array[int],  # (slots)
    end: wp.array[int],  # (slots) inclusive scan of `n`
    rays: ViewRaysView,
    # Out
    out_x: wp.array[wp.vec3],  # (samples)
):
    """Write the density network's inputs, all rays' samples one after the other. One thread per slot."""
    i = first + wp.tid()
    r = ray[i]
    o = rays.origin[r]
    d = rays.direction[r]
    begin = end[i] - n[i]
    for j in range(n[i]):
        out_x[begin + j] = field_position(march, o + d * t[i * max_samples + j])


@wp.kernel
def weigh_samples(
    first: int,
    # Scene
    march: MarchView,
    # Params
    max_samples: int,
    # In
    ray: wp.array[int],  # (slots)
    t: wp.array[float],  # (slots * max_samples)
    n: wp.array[int],  # (slots)
    end: wp.array[int],  # (slots)
    code: wp.array2d[float],  # (samples, N_CODE) log density first
    # In/out
    rays: ViewRaysView,
    # Out
    out_weight: wp.array[float],  # (samples) of those whose colour is evaluated, 0 of the others
    out_n_kept: wp.array[int],  # (slots) samples whose colour is evaluated
    out_alive: wp.array[int],  # (slots) 1 where the ray goes on
):
    """Weigh samples by opacity and what is in front (Max 1995, eq. 3), and end opaque rays. One thread per slot."""
    i = first + wp.tid()
    r = ray[i]
    begin = end[i] - n[i]
    transmittance = rays.transmittance[r]
    distance = rays.distance[r]
    shown = rays.shown[r]
    kept = int(0)
    for j in range(n[i]):
        s = begin + j
        t_sample = t[i * max_samples + j]
        after = transmittance * wp.exp(-density_of(code[s, 0]) * step_length(march, t_sample))
        after = wp.where(after < MIN_TRANSMITTANCE, 0.0, after)
        distance += (transmittance - after) * t_sample
        transmittance = after
        weight = 1.0 - transmittance - shown
        out_weight[s] = 0.0
        if weight > MIN_WEIGHT:
            out_weight[s] = weight
            shown += weight
            kept += 1
    rays.transmittance[r] = transmittance
    rays.distance[r] = distance
    rays.shown[r] = shown
    out_n_kept[i] = kept
    out_alive[i] = wp.where(transmittance > 0.0 and rays.t[r] < rays.t_end[r], 1, 0)


@wp.kernel
def write_color_inputs(
    first: int,
    # In
    ray: wp.array[int],  # (slots)
    n: wp.array[int],  # (slots)
    end: wp.array[int],  # (slots)
    end_kept: wp.array[int],  # (slots) inclusive scan of `n_kept`
    weight: wp.array[float],  # (samples)
    code: wp.array2d[float],  # (samples, N_CODE)
    rays: ViewRaysView,
    # Out
    out_color_x: wp.array2d[float],  # (kept samples, N_COLOR_INPUTS)
):
    """Write the colour network's inputs of the samples that have a weight. One thread per slot."""
    i = first + wp.tid()
    direction = field_direction(rays.direction[ray[i]])
    to = int(0)
    if i > 0:
        to = end_kept[i - 1]
    for s in range(end[i] - n[i], end[i]):
        if weight[s] > 0.0:
            for k in range(N_CODE):
                out_color_x[to, k] = code[s, k]
            for k in range(3):
                out_color_x[to, N_CODE + k] = direction[k]
            to += 1


@wp.kernel
def add_colors(
    first: int,
    # In
    ray: wp.array[int],  # (slots)
    n: wp.array[int],  # (slots)
    end: wp.array[int],  # (slots)
    end_kept: wp.array[int],  # (slots)
    weight: wp.array[float],  # (samples)
    color: wp.array2d[float],  # (kept samples, 3)
    # In/out
    rays: ViewRaysView,
):
    """Add the weighted colours. One thread per slot."""
    i = first + wp.tid()
    r = ray[i]
    total = rays.color[r]
    at = int(0)
    if i > 0:
        at = end_kept[i - 1]
    for s in range(end[i] - n[i], end[i]):
        if weight[s] > 0.0:
            total += weight[s] * wp.vec3(color[at, 0], color[at, 1], color[at, 2])
            at += 1
    rays.color[r] = total


@wp.kernel
def finish_view_rays(
    first: int,
    # In
    rays: ViewRaysView,
    # Out
    out_color: wp.array[wp.vec3],  # (rays) premultiplied by alpha
    out_alpha: wp.array[float],
    out_depth: wp.array[float],  # mean distance of what the ray sees, 0 where it sees nothing
):
    """Turn sums into colour, opacity and depth. One thread per ray."""
    i = first + wp.tid()
    alpha = 1.0 - rays.transmittance[i]
    color = rays.color[i]
    depth = float(0.0)
    if alpha > 0.0:
        depth = rays.distance[i] / alpha
    if rays.shown[i] > 0.0:
        color *= alpha / rays.shown[i]  # for the samples behind the last evaluated one
    out_color[i] = color
    out_alpha[i] = alpha
    out_depth[i] = depth


@wp.kernel
def find_occupied(
    first: int,
    # Scene
    march: MarchView,
    # In
    p: wp.array[wp.vec3],  # unit-cube space
    # Out
    out_x: wp.array[wp.vec3],  # as the fields take it
    out_occupied: wp.array[int],
):
    """Say whether a point lies in an occupied cell. One thread per point."""
    i = first + wp.tid()
    cascade = find_cascade(march, p[i], 0.0)
    q = (p[i] - wp.vec3(0.5)) * (float(GRID_SIZE) / float(1 << cascade)) + wp.vec3(0.5 * float(GRID_SIZE))
    x = wp.clamp(int(q[0]), 0, GRID_SIZE - 1)
    y = wp.clamp(int(q[1]), 0, GRID_SIZE - 1)
    z = wp.clamp(int(q[2]), 0, GRID_SIZE - 1)
    word = march.bits[cascade * N_WORDS + morton_encode(x >> 2, y >> 2, z >> 2)]
    out_occupied[i] = int((word >> wp.uint64(morton_encode(x & 3, y & 3, z & 3))) & wp.uint64(1))
    out_x[i] = field_position(march, p[i])


@wp.func
def cascade_color(cascade: int) -> wp.vec3:
    """Colour of the cells of a cascade, sRGB-encoded: repeated every six."""
    k = cascade % 6
    if k == 0:
        return wp.vec3(0.75, 0.79, 0.85)
    if k == 1:
        return wp.vec3(0.95, 0.68, 0.35)
    if k == 2:
        return wp.vec3(0.45, 0.75, 0.50)
    if k == 3:
        return wp.vec3(0.40, 0.62, 0.92)
    if k == 4:
        return wp.vec3(0.85, 0.48, 0.62)
    return wp.vec3(0.66, 0.54, 0.85)


@wp.func
def face_light(axis: int) -> float:
    """Brightness of a cell's face by the axis of its normal; of a cell that the ray begins in, axis -1, the lowest."""
    return wp.where(axis == 2, 1.0, wp.where(axis == 1, 0.82, wp.where(axis == 0, 0.66, 0.5)))


@wp.kernel
def trace_occupancy(
    first: int,
    # Scene
    cameras: CamerasView,
    march: MarchView,
    # Params
    i_image: int,
    width: int,
    # Out
    out_color: wp.array[wp.vec3],  # (rays) sRGB-encoded, black where no cell is met
    out_alpha: wp.array[float],  # 1 where a cell is met, else 0
    out_depth: wp.array[float],  # distance of the face met, 0 without one
):
    """Follow rays through pixels' centres cell by cell to the first occupied one. One thread per ray.

    The cells are those of the finest cascade around each point. Their colour says which cascade, the face met and,
    like a chessboard, where one cell ends and the next begins.
    """
    i = first + wp.tid()
    o, d = camera_ray(cameras, i_image, wp.vec2(float(i % width) + 0.5, float(i // width) + 0.5))
    t, t_end = enter_box(march, o, d)
    face = int(-1)  # axis of the face that the ray came through
    for a in range(3):
        near = wp.where(d[a] > 0.0, march.lower[a], march.upper[a])
        if t > march.near and wp.abs(o[a] + d[a] * t - near) < 1.0e-5 * (1.0 + wp.abs(near)):
            face = a
    color = wp.vec3()
    alpha = float(0.0)
    depth = float(0.0)
    while t < t_end and alpha == 0.0:
        # A point on a face belongs to either side, one behind it to the next cell, perhaps of another cascade
        inside = t + NUDGE * float(1 << find_cascade(march, o + d * t, 0.0)) / float(GRID_SIZE)
        cascade = find_cascade(march, o + d * inside, 0.0)
        cells = float(GRID_SIZE) / float(1 << cascade)  # per unit of space
        q = (o + d * inside - wp.vec3(0.5)) * cells + wp.vec3(0.5 * float(GRID_SIZE))
        x = wp.clamp(int(q[0]), 0, GRID_SIZE - 1)
        y = wp.clamp(int(q[1]), 0, GRID_SIZE - 1)
        z = wp.clamp(int(q[2]), 0, GRID_SIZE - 1)
        word = march.bits[cascade * N_WORDS + morton_encode(x >> 2, y >> 2, z >> 2)]
        size = int(4)
        if word != wp.uint64(0):
            size = 1
            if ((word >> wp.uint64(morton_encode(x & 3, y & 3, z & 3))) & wp.uint64(1)) != wp.uint64(0):
                alpha = 1.0
                depth = t
                chess = wp.where(((x + y + z) & 1) == 0, 1.0, 0.9)
                color = face_light(face) * chess * cascade_color(cascade)
        if alpha == 0.0:
            cell = wp.vec3(float(x // size * size), float(y // size * size), float(z // size * size))
            distance = float(1e10)  # to the cell's or the block's exit, in cells
            for a in range(3):
                exit = float(1e10)
                if d[a] > TINY:
                    exit = (cell[a] + float(size) - q[a]) / d[a]
                elif d[a] < -TINY:
                    exit = (cell[a] - q[a]) / d[a]
                if exit < distance:
                    distance = exit
                    face = a
            t = inside + wp.max(distance, 0.0) / cells
    out_color[i] = color
    out_alpha[i] = alpha
    out_depth[i] = depth


@wp.kernel
def put_over(
    first: int,
    # Params
    background: float,
    # In
    color: wp.array[wp.vec3],  # (rays) premultiplied by alpha
    alpha: wp.array[float],
    # Out
    out_color: wp.array[wp.vec3],
):
    """Put a picture over a grey background. One thread per pixel."""
    i = first + wp.tid()
    out_color[i] = color[i] + (1.0 - alpha[i]) * wp.vec3(background)


@wp.kernel
def shade_depth(
    first: int,
    # Params
    near: float,
    far: float,
    # In
    depth: wp.array[float],  # (rays)
    alpha: wp.array[float],
    # Out
    out_color: wp.array[wp.vec3],
):
    """Show depth as grey: near is bright, far is dark, what is not there is black. One thread per pixel."""
    i = first + wp.tid()
    place = wp.clamp((depth[i] - near) / wp.max(far - near, 1.0e-9), 0.0, 1.0)
    out_color[i] = wp.vec3((1.0 - (1.0 - FAR_GREY) * place) * alpha[i])
