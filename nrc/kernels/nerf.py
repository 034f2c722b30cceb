"""Radiance fields: rays through photographs, marching through occupied space, compositing and its gradients.

All happens in unit-cube space. The field's inputs are positions in the scene's box, mapped to [0, 1]³, and directions
as (d + 1) / 2. A density network turns a position into `N_CODE` numbers, the first of them the logarithm of the
density [1 / unit of space]; a colour network turns these and the direction into red, green, blue. Müller et al. 2022,
section 5.4 and appendix E.

To march along a ray::

    t, t_end = enter_box(march, o, d)
    t = march_next(march, o, d, t, t_end)
    while t < t_end:
        dt = step_length(march, t)  # the sample at o + d t stands for [t, t + dt)
        ...
        t = march_next(march, o, d, t + dt, t_end)
"""

from functools import cache

import warp as wp

from nrc.kernels.lens import CamerasView, camera_pixel, camera_ray
from nrc.kernels.loss import make_loss
from nrc.kernels.occupancy import GRID_SIZE, N_WORDS, morton_encode
from nrc.kernels.rng import rng_float, rng_init, rng_next, rng_uint

wp.set_module_options({"enable_backward": False})

N_CODE = 16  # outputs of the density network
N_COLOR_INPUTS = N_CODE + 3
MIN_TRANSMITTANCE = wp.constant(1e-4)  # where a ray stops
MAX_LOG_DENSITY = wp.constant(15.0)
TINY = wp.constant(1e-12)
FARTHEST_STEP = wp.constant(4194304.0)  # 2^22: the shortest steps from there on are rounded to half their length
MAX_SAMPLES = 1024  # of a ray in training
DROPPED = -1
SUM_RAYS = 256  # whose losses one thread adds up


@wp.struct
class MarchView:
    """Where rays march: the occupied cells inside a box, with steps that grow with distance in large scenes."""

    bits: wp.array[wp.uint64]  # (cascades * N_WORDS) as in `nrc.kernels.occupancy`
    n_cascades: int
    lower: wp.vec3  # corners of the box to stay in: the scene's, cropped
    upper: wp.vec3
    scene_lower: wp.vec3  # corner of the scene's box, which the fields cover
    inverse_size: float  # 1 / its side
    near: float  # distance at which rays begin
    min_step: float
    max_step: float
    cone: float  # step length per distance


@wp.struct
class RaysView:
    """A batch of rays and what they should see."""

    origin: wp.array[wp.vec3]
    direction: wp.array[wp.vec3]
    background: wp.array[wp.vec3]
    target: wp.array2d[float]  # (rays, 3)
    image: wp.array[int]
    t_first: wp.array[float]  # of the first sample
    n_marched: wp.array[int]  # samples in occupied cells, DROPPED where they do not fit
    end_marched: wp.array[int]  # their inclusive scan
    n_kept: wp.array[int]  # samples until the ray is opaque
    end_kept: wp.array[int]


@wp.func
def enter_box(march: MarchView, o: wp.vec3, d: wp.vec3):
    """Distances at which a ray enters and leaves the box; the first is not below the second where it misses.

    A box so far away that steps would be lost in rounding is missed.
    """
    t0 = march.near
    t1 = float(1e10)
    for a in range(3):
        inverse = 1.0 / wp.where(wp.abs(d[a]) > TINY, d[a], TINY)
        ta = (march.lower[a] - o[a]) * inverse
        tb = (march.upper[a] - o[a]) * inverse
        t0 = wp.max(t0, wp.min(ta, tb))
        t1 = wp.min(t1, wp.max(ta, tb))
    if t1 > FARTHEST_STEP * march.min_step:
        t1 = t0
    return t0, t1


@wp.func
def step_length(march: MarchView, t: float) -> float:
    """Length of the step at distance `t`."""
    return wp.clamp(t * march.cone, march.min_step, march.max_step)


@wp.func
def field_position(march: MarchView, p: wp.vec3) -> wp.vec3:
    """Position in the scene's box as the fields take it, in [0, 1]³."""
    return (p - march.scene_lower) * march.inverse_size


@wp.func
def field_direction(d: wp.vec3) -> wp.vec3:
    """Direction as the colour network's encoding takes it, in [0, 1]³."""
    return 0.5 * (d + wp.vec3(1.0))


@wp.func
def density_of(log_density: float) -> float:
    """Density of the density network's first output."""
    return wp.exp(wp.clamp(log_density, -MAX_LOG_DENSITY, MAX_LOG_DENSITY))


@wp.func
def find_cascade(march: MarchView, p: wp.vec3, dt: float) -> int:
    """The finest cascade that contains `p` and whose cells are not shorter than the step."""
    q = p - wp.vec3(0.5)
    extent = wp.max(wp.max(wp.abs(q[0]), wp.abs(q[1])), wp.abs(q[2]))
    half = float(0.5)
    cell = 1.0 / float(GRID_SIZE)
    cascade = int(0)
    while cascade < march.n_cascades - 1 and (extent >= half or cell < dt):
        half *= 2.0
        cell *= 2.0
        cascade += 1
    return cascade


@wp.func
def march_next(march: MarchView, o: wp.vec3, d: wp.vec3, t_start: float, t_end: float) -> float:
    """Distance of the first step from `t_start` on that begins in an occupied cell; at least `t_end` if none does.

    Whole steps are skipped in empty cells, in blocks of 4³ empty cells at a time.
    """
    t = t_start
    while t < t_end:
        dt = step_length(march, t)
        p = o + d * t
        cascade = find_cascade(march, p, dt)
        cells = float(GRID_SIZE) / float(1 << cascade)  # per unit of space
        q = (p - wp.vec3(0.5)) * cells + wp.vec3(0.5 * float(GRID_SIZE))
        x = wp.clamp(int(q[0]), 0, GRID_SIZE - 1)
        y = wp.clamp(int(q[1]), 0, GRID_SIZE - 1)
        z = wp.clamp(int(q[2]), 0, GRID_SIZE - 1)
        word = march.bits[cascade * N_WORDS + morton_encode(x >> 2, y >> 2, z >> 2)]
        size = int(4)
        if word != wp.uint64(0):
            if ((word >> wp.uint64(morton_encode(x & 3, y & 3, z & 3))) & wp.uint64(1)) != wp.uint64(0):
                return t
            size = 1
        cell = wp.vec3(float(x // size * size), float(y // size * size), float(z // size * size))
        distance = float(1e10)  # to the cell's or the block's exit, in cells
        for a in range(3):
            if d[a] > TINY:
                distance = wp.min(distance, (cell[a] + float(size) - q[a]) / d[a])
            elif d[a] < -TINY:
                distance = wp.min(distance, (cell[a] - q[a]) / d[a])
        t += wp.max(1.0, wp.ceil(distance / (cells * dt))) * dt
    return t


@wp.func
def first_image(seed: int, step: int, n_images: int) -> int:
    """The image of a step's first rays."""
    return wp.min(int(rng_float(rng_next(rng_init(seed, step, -1))) * float(n_images)), n_images - 1)


@wp.func
def first_ray(part: int, n_images: int, n_rays: int) -> int:
    """The first ray i with i * n_images // n_rays == part; the rays of a part are those of one image."""
    return int((wp.int64(part) * wp.int64(n_rays) + wp.int64(n_images - 1)) / wp.int64(n_images))


@wp.func
def draw_pixel(cameras: CamerasView, seed: int, step: int, i: int, n_rays: int):
    """Image and pixel (column, row) of ray `i`: rays are spread evenly over the images, and over each image.

    They begin with an image at random: none is always left out, where there are more images than rays, or where the
    last rays do not fit. An image's rays lie in equal parts of a Morton curve, so that neighbours in the batch pass
    near each other.
    """
    n_images = cameras.n_images
    part = int(wp.int64(i) * wp.int64(n_images) / wp.int64(n_rays))
    begin = first_ray(part, n_images, n_rays)
    end = first_ray(part + 1, n_images, n_rays)
    u = rng_float(rng_next(rng_init(seed, step, i)))
    place = (float(i - begin) + u) / float(end - begin)
    # 20 bits of the curve from the ray's part, and 10 + 10 more at random
    code = wp.min(int(place * 1048576.0), 1048575)
    fine = int(rng_uint(rng_next(rng_next(rng_init(seed, step, i)))) >> wp.uint32(12))
    x = float((gather_even(code) << 10) | (fine & 1023)) / 1048576.0
    y = float((gather_even(code >> 1) << 10) | (fine >> 10)) / 1048576.0
    image = (part + first_image(seed, step, n_images)) % n_images
    width = cameras.size[image][0]
    height = cameras.size[image][1]
    return image, wp.min(int(x * float(width)), width - 1), wp.min(int(y * float(height)), height - 1)


@wp.func
def gather_even(code: int) -> int:
    """Bits 0, 2, 4, ... of 20, moved together."""
    x = code & 0x55555
    x = (x | (x >> 1)) & 0x33333
    x = (x | (x >> 2)) & 0x0F0F0F
    x = (x | (x >> 4)) & 0x00FF00FF
    return (x | (x >> 8)) & 0x3FF


@wp.kernel
def begin_rays(
    first: int,
    # Scene
    cameras: CamerasView,
    march: MarchView,
    # Params
    seed: int,
    step: int,
    n_rays: int,  # of the step
    begin: int,  # the first of them to draw
    fixed_background: float,  # grey behind transparent pixels; negative for a colour at random
    # Out
    rays: RaysView,
):
    """Draw pixels with a background and count their samples in occupied cells. One thread per ray."""
    i = first + wp.tid()
    image, column, row = draw_pixel(cameras, seed, step, begin + i, n_rays)
    color = camera_pixel(cameras, image, column, row)
    state = rng_next(rng_next(rng_next(rng_init(seed, step, begin + i))))
    background = wp.vec3()
    for c in range(3):
        background[c] = rng_float(state)
        state = rng_next(state)
        if fixed_background >= 0.0:
            background[c] = fixed_background
        # Composited in the space of the photographs
        rays.target[i, c] = color[c] * color[3] + background[c] * (1.0 - color[3])
    rays.background[i] = background
    rays.image[i] = image
    o, d = camera_ray(cameras, image, wp.vec2(float(column) + 0.5, float(row) + 0.5))
    rays.origin[i] = o
    rays.direction[i] = d
    t, t_end = enter_box(march, o, d)
    t += rng_float(state) * step_length(march, t)
    t = march_next(march, o, d, t, t_end)
    rays.t_first[i] = t
    n = int(0)
    while t < t_end and n < MAX_SAMPLES:
        n += 1
        t = march_next(march, o, d, t + step_length(march, t), t_end)
    rays.n_marched[i] = n


@wp.kernel
def write_samples(
    first: int,
    # Scene
    march: MarchView,
    # Params
    n_rays: int,
    capacity: int,
    # In
    rays: RaysView,
    # Out
    out_x: wp.array[wp.vec3],  # (capacity) in [0, 1]³
    out_dt: wp.array[float],  # (capacity)
    out_count: wp.array[int],  # (1) samples of the rays that fit
):
    """Write positions and lengths of the samples of the rays that fit. One thread per ray."""
    i = first + wp.tid()
    n = rays.n_marched[i]
    end = rays.end_marched[i]
    if end > capacity:
        rays.n_marched[i] = DROPPED
        if i == 0:
            out_count[0] = 0
        return
    if i + 1 == n_rays:
        out_count[0] = end
    elif rays.end_marched[i + 1] > capacity:
        out_count[0] = end
    o = rays.origin[i]
    d = rays.direction[i]
    _, t_end = enter_box(march, o, d)
    t = rays.t_first[i]
    for j in range(end - n, end):
        dt = step_length(march, t)
        out_x[j] = field_position(march, o + d * t)
        out_dt[j] = wp.where(t < t_end, dt, 0.0)  # should this pass round otherwise than the one that counted
        if j + 1 < end:
            t = march_next(march, o, d, t + dt, t_end)


@wp.kernel
def count_kept(
    first: int,
    # In
    code: wp.array2d[float],  # (samples, N_CODE) log density first
    dt: wp.array[float],  # (samples)
    # In/out
    rays: RaysView,
):
    """Count the samples until transmittance falls below MIN_TRANSMITTANCE. One thread per ray."""
    i = first + wp.tid()
    n = rays.n_marched[i]
    begin = rays.end_marched[i] - n
    transmittance = float(1.0)
    kept = int(0)
    while kept < n and transmittance >= MIN_TRANSMITTANCE:
        transmittance *= wp.exp(-density_of(code[begin + kept, 0]) * dt[begin + kept])
        kept += 1
    rays.n_kept[i] = kept


@wp.kernel
def keep_samples(
    first: int,
    # Params
    n_rays: int,
    capacity: int,
    # In
    x: wp.array[wp.vec3],  # (samples)
    dt: wp.array[float],  # (samples)
    code: wp.array2d[float],  # (samples, N_CODE)
    # In/out
    rays: RaysView,
    # Out
    out_x: wp.array[wp.vec3],  # (capacity)
    out_dt: wp.array[float],  # (capacity)
    out_color_x: wp.array2d[float],  # (capacity, N_COLOR_INPUTS)
    out_count: wp.array[int],  # (1) samples of the rays that fit
):
    """Move the kept samples together and make the colour network's inputs. One thread per ray."""
    i = first + wp.tid()
    n = rays.n_kept[i]
    end = rays.end_kept[i]
    if end > capacity:
        rays.n_kept[i] = 0
        rays.n_marched[i] = DROPPED
        if i == 0:
            out_count[0] = 0
        return
    if i + 1 == n_rays:
        out_count[0] = end
    elif rays.end_kept[i + 1] > capacity:
        out_count[0] = end
    direction = field_direction(rays.direction[i])
    source = rays.end_marched[i] - rays.n_marched[i]
    for j in range(n):
        to = end - n + j
        out_x[to] = x[source + j]
        out_dt[to] = dt[source + j]
        for k in range(N_CODE):
            out_color_x[to, k] = code[source + j, k]
        for k in range(3):
            out_color_x[to, N_CODE + k] = direction[k]


@cache
def make_composite(loss_otype: str):
    """Kernel that composites rays and takes the gradients of a loss of their colours."""
    loss = make_loss(loss_otype, 3)

    @wp.kernel(module="unique", module_options={"enable_backward": False})
    def composite(
        first: int,
        # Params
        scale: float,  # of the gradients
        log_gain: wp.array2d[float],  # (images, 3) exposure, or empty
        # In
        rays: RaysView,
        color_x: wp.array2d[float],  # (samples, N_COLOR_INPUTS) log density first
        dt: wp.array[float],  # (samples)
        color: wp.array2d[float],  # (samples, 3)
        # Out
        out_loss: wp.array[float],  # (rays)
        out_dL_dcolor: wp.array2d[float],  # (samples, 3)
        out_dL_dcolor_x: wp.array2d[float],  # (samples, N_COLOR_INPUTS)
        out_dL_dlog_gain: wp.array2d[float],  # (rays, 3), or empty
    ):
        """Loss of each ray, and its gradients by the colours and log densities of its samples. One thread per ray."""
        i = first + wp.tid()
        n = rays.n_kept[i]
        out_loss[i] = 0.0
        if rays.n_marched[i] < 0:
            return
        begin = rays.end_kept[i] - n
        light = wp.vec3()
        transmittance = float(1.0)
        for j in range(begin, begin + n):
            after = transmittance * wp.exp(-density_of(color_x[j, 0]) * dt[j])
            light += (transmittance - after) * wp.vec3(color[j, 0], color[j, 1], color[j, 2])
            transmittance = after
        gain = wp.vec3(1.0)
        if log_gain.shape[0] > 0:
            for k in range(3):
                gain[k] = wp.exp(log_gain[rays.image[i], k])
        total = wp.cw_mul(gain, light)
        if transmittance >= MIN_TRANSMITTANCE:  # a ray that stopped early does not see the background
            total += transmittance * rays.background[i]
        value, dL_dtotal = loss(total, rays.target, i)
        out_loss[i] = value / 3.0
        # The loss is a mean over rays and channels
        g = (scale / 3.0) * wp.vec3(dL_dtotal[0], dL_dtotal[1], dL_dtotal[2])
        if log_gain.shape[0] > 0:
            for k in range(3):
                out_dL_dlog_gain[i, k] = g[k] * gain[k] * light[k]
        # dC/dsigma_i = dt_i (T_{i+1} c_i - what comes behind sample i): derivative of Max 1995, eq. 3
        behind = total
        transmittance = float(1.0)
        for j in range(begin, begin + n):
            density = density_of(color_x[j, 0])
            after = transmittance * wp.exp(-density * dt[j])
            c = wp.cw_mul(gain, wp.vec3(color[j, 0], color[j, 1], color[j, 2]))
            weight = transmittance - after
            behind -= weight * c
            transmittance = after
            dL_dlog_density = density * dt[j] * wp.dot(g, after * c - behind)
            if wp.abs(color_x[j, 0]) > MAX_LOG_DENSITY:
                dL_dlog_density = 0.0
            for k in range(3):
                out_dL_dcolor[j, k] = weight * g[k] * gain[k]
            out_dL_dcolor_x[j, 0] = dL_dlog_density
            for k in range(1, N_COLOR_INPUTS):
                out_dL_dcolor_x[j, k] = 0.0

    return composite


@wp.kernel
def sum_loss(
    first: int,
    # Params
    n_rays: int,
    # In
    rays: RaysView,
    loss: wp.array[float],  # (rays)
    # Out
    out_sums: wp.array[wp.vec2],  # (ceil(n_rays / SUM_RAYS)) of losses, and number, of the rays that fit
):
    """Add up the losses of the rays that fit. One thread per SUM_RAYS rays."""
    k = first + wp.tid()
    sum = wp.vec2()
    for i in range(k * SUM_RAYS, wp.min((k + 1) * SUM_RAYS, n_rays)):
        if rays.n_marched[i] >= 0:
            sum += wp.vec2(loss[i], 1.0)
    out_sums[k] = sum


@wp.kernel
def mean_loss(
    first: int,
    # Params
    n_sums: int,
    # In
    sums: wp.array[wp.vec2],  # (n_sums) as of `sum_loss`
    # Out
    out_loss: wp.array[float],  # (1)
):
    """Mean loss of the rays that fit. A single thread."""
    sum = wp.vec2()
    for k in range(n_sums):
        sum += sums[k]
    out_loss[0] = sum[0] / wp.max(sum[1], 1.0)


@wp.kernel
def adjust_exposure(
    first: int,
    # Params
    seed: int,
    step: int,  # from 0
    n_rays: int,
    learning_rate: float,
    # In
    rays: RaysView,
    dL_dlog_gain: wp.array2d[float],  # (rays, 3)
    # In/out
    moments: wp.array2d[float],  # (images, 6)
    log_gain: wp.array2d[float],  # (images, 3)
):
    """Step an image's exposure with Adam (beta 0.9, 0.99), along the sum over its rays. One thread per image."""
    image = first + wp.tid()
    n_images = log_gain.shape[0]
    part = (image + n_images - first_image(seed, step, n_images)) % n_images
    gradient = wp.vec3()
    for i in range(first_ray(part, n_images, n_rays), first_ray(part + 1, n_images, n_rays)):
        if rays.n_marched[i] >= 0:
            gradient += wp.vec3(dL_dlog_gain[i, 0], dL_dlog_gain[i, 1], dL_dlog_gain[i, 2])
    n = float(step + 1)
    correction = wp.sqrt(1.0 - wp.pow(0.99, n)) / (1.0 - wp.pow(0.9, n))
    for k in range(3):
        m = 0.9 * moments[image, k] + 0.1 * gradient[k]
        v = 0.99 * moments[image, 3 + k] + 0.01 * gradient[k] * gradient[k]
        moments[image, k] = m
        moments[image, 3 + k] = v
        log_gain[image, k] = log_gain[image, k] - learning_rate * correction * m / (wp.sqrt(v) + 1e-15)


@wp.kernel
def centre_exposure(
    first: int,
    # In/out
    log_gain: wp.array2d[float],  # (images, 3)
):
    """Make the gains of the images 1 on (geometric) average, which the field's colours refer to. Thread: channel."""
    k = first + wp.tid()
    mean = float(0.0)
    for image in range(log_gain.shape[0]):
        mean += log_gain[image, k]
    mean = mean / float(log_gain.shape[0])
    for image in range(log_gain.shape[0]):
        log_gain[image, k] = log_gain[image, k] - mean
