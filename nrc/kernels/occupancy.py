"""Occupancy of space: cascades of 128³ cells around the unit cube, one bit per cell (Müller et al. 2022, appendix E.2).

Cascade c is the cube of side 2^c around (0.5, 0.5, 0.5). Its cells are in Morton order, x lowest, so that a word of 64
bits is a block of 4³ cells, and a byte of it the eight cells that one cell of the next cascade covers.
"""

import warp as wp

from nrc.kernels.lens import CamerasView, camera_project
from nrc.kernels.rng import rng_float, rng_init, rng_next

wp.set_module_options({"enable_backward": False})

GRID_SIZE = 128  # cells along an axis
N_CELLS = GRID_SIZE**3  # of a cascade
WORD_CELLS = 64
N_WORDS = N_CELLS // WORD_CELLS
SUM_CELLS = 4096  # summed by one thread
UNSEEN = -1.0  # thickness of a cell that no camera sees


@wp.func
def spread_bits(x: int) -> int:
    """Move bit i of a number below 1024 to bit 3 i."""
    x = (x | (x << 16)) & 0x030000FF
    x = (x | (x << 8)) & 0x0300F00F
    x = (x | (x << 4)) & 0x030C30C3
    return (x | (x << 2)) & 0x09249249


@wp.func
def gather_bits(x: int) -> int:
    """Inverse of `spread_bits`; other bits than every third are ignored."""
    x = x & 0x09249249
    x = (x | (x >> 2)) & 0x030C30C3
    x = (x | (x >> 4)) & 0x0300F00F
    x = (x | (x >> 8)) & 0x030000FF
    return (x | (x >> 16)) & 0x000003FF


@wp.func
def morton_encode(x: int, y: int, z: int) -> int:
    """Place of cell (x, y, z), each below 1024, in Morton order."""
    return spread_bits(x) | (spread_bits(y) << 1) | (spread_bits(z) << 2)


@wp.func
def morton_decode(i: int):
    """(x, y, z) of the cell at place `i`."""
    return gather_bits(i), gather_bits(i >> 1), gather_bits(i >> 2)


@wp.func
def cell_point(i_cell: int, u: wp.vec3) -> wp.vec3:
    """Point of cell `i_cell` (cascade * N_CELLS + place) at `u` in [0, 1]³ of the cell, in unit-cube space."""
    cascade = i_cell // N_CELLS
    x, y, z = morton_decode(i_cell % N_CELLS)
    p = (wp.vec3(float(x), float(y), float(z)) + u) / float(GRID_SIZE)
    return (p - wp.vec3(0.5)) * float(1 << cascade) + wp.vec3(0.5)


@wp.func
def count_bits(word: wp.uint64) -> int:
    """Number of bits set."""
    w = word
    n = int(0)
    while w != wp.uint64(0):
        w = w & (w - wp.uint64(1))
        n += 1
    return n


@wp.func
def random_vec3(seed: int, sample: int, index: int) -> wp.vec3:
    """Uniform in [0, 1)³."""
    a = rng_next(rng_init(seed, sample, index))
    b = rng_next(a)
    return wp.vec3(rng_float(a), rng_float(b), rng_float(rng_next(b)))


@wp.func
def sees_ball(cameras: CamerasView, i_image: int, centre: wp.vec3, radius: float, near: float) -> bool:
    """Whether part of a ball may be in a camera's image; the answer errs on the side of seeing it."""
    distance = wp.length(centre - cameras.origin[i_image])
    if distance + radius < near:
        return False
    if distance <= radius:
        return True
    projected = camera_project(cameras, i_image, centre)
    if projected[2] <= 0.0:
        return False
    focal = cameras.focal[i_image]
    # Twice the ball's size seen head-on covers what perspective and distortion add
    margin = 2.0 * wp.max(focal[0], focal[1]) * radius / wp.max(projected[2] - radius, 0.1 * radius)
    size = cameras.size[i_image]
    if projected[0] < -margin or projected[0] > float(size[0]) + margin:
        return False
    return projected[1] >= -margin and projected[1] <= float(size[1]) + margin


@wp.kernel
def mark_seen_cells(
    first: int,
    # In
    cameras: CamerasView,
    near: float,  # distance from a camera where its view begins
    # Out
    out_thickness: wp.array[float],  # (cascades * N_CELLS)
):
    """Set cells of thickness 0 where a camera sees part of them, else UNSEEN. One thread per word of cells."""
    word = first + wp.tid()
    # The block's bounding ball decides for all its cells
    i_first = word * WORD_CELLS
    centre = cell_point(i_first, wp.vec3(2.0))
    radius = 2.0 * wp.sqrt(3.0) * float(1 << (word // N_WORDS)) / float(GRID_SIZE)
    seen = bool(False)
    camera = int(0)
    while camera < cameras.n_images and not seen:
        seen = sees_ball(cameras, camera, centre, radius, near)
        camera += 1
    for j in range(WORD_CELLS):
        out_thickness[i_first + j] = wp.where(seen, 0.0, UNSEEN)


@wp.kernel
def draw_cells(
    first: int,
    # Params
    seed: int,
    update: int,
    stride: int,
    offset: int,
    aabb_lower: float,
    inverse_size: float,
    # Out
    out_cell: wp.array[int],
    out_x: wp.array[wp.vec3],  # in [0, 1]³ of the scene's box
):
    """Draw a point in every `stride`-th cell from cell `offset` on. One thread per point."""
    i = first + wp.tid()
    cell = i * stride + offset
    out_cell[i] = cell
    p = cell_point(cell, random_vec3(seed, update, cell))
    out_x[i] = (p - wp.vec3(aabb_lower)) * inverse_size


@wp.kernel
def draw_occupied_cells(
    first: int,
    # Params
    seed: int,
    update: int,
    n_draws: int,
    n_words: int,
    aabb_lower: float,
    inverse_size: float,
    # In
    bits: wp.array[wp.uint64],  # (n_words)
    n_before: wp.array[int],  # (n_words) occupied cells up to and with each word
    # Out
    out_cell: wp.array[int],  # (n_draws)
    out_x: wp.array[wp.vec3],  # (n_draws) in [0, 1]³ of the scene's box
    out_count: wp.array[int],  # (1) points drawn: as many as cells are occupied, at most n_draws
):
    """Draw a point in each of `n_draws` occupied cells, evenly chosen and all different. One thread per point."""
    i = first + wp.tid()
    n_occupied = n_before[n_words - 1]
    n = wp.min(n_draws, n_occupied)
    if i == 0:
        out_count[0] = n
    if i >= n:
        return
    start = rng_float(rng_next(rng_init(seed, update, -1)))
    rank = wp.min(int((wp.float64(i) + wp.float64(start)) * wp.float64(n_occupied) / wp.float64(n)), n_occupied - 1)
    low = int(0)
    high = n_words - 1
    while low < high:  # the first word with more than `rank` occupied cells up to and with it
        middle = (low + high) // 2
        if n_before[middle] > rank:
            high = middle
        else:
            low = middle + 1
    w = bits[low]
    for _ in range(rank - (n_before[low] - count_bits(w))):
        w = w & (w - wp.uint64(1))
    lowest = w & (~w + wp.uint64(1))
    cell = low * WORD_CELLS + count_bits(lowest - wp.uint64(1))
    out_cell[i] = cell
    p = cell_point(cell, random_vec3(seed, update, cell))
    out_x[i] = (p - wp.vec3(aabb_lower)) * inverse_size


@wp.kernel
def count_occupied(
    first: int,
    # In
    bits: wp.array[wp.uint64],  # (words)
    # Out
    out_n: wp.array[int],  # (words)
):
    """Count the occupied cells of each word. One thread per word."""
    i = first + wp.tid()
    out_n[i] = count_bits(bits[i])


@wp.kernel
def update_cells(
    first: int,
    # Params
    decay: float,
    min_step: float,
    # In
    count: wp.array[int],  # (1) or empty
    cell: wp.array[int],  # (draws) all different
    log_density: wp.array2d[float],  # (draws, outputs) the field's first output
    # In/out
    thickness: wp.array[float],  # (cascades * N_CELLS)
):
    """Let cells decay or raise them to the thickness sampled in them. One thread per point."""
    i = first + wp.tid()
    if count.shape[0] > 0:
        if i >= count[0]:
            return
    old = thickness[cell[i]]
    if old >= 0.0:
        density = wp.exp(wp.clamp(log_density[i, 0], -15.0, 15.0))
        thickness[cell[i]] = wp.max(old * decay, density * min_step)


@wp.kernel
def sum_thickness(
    first: int,
    # In
    thickness: wp.array[float],  # of the finest cascade first
    # Out
    out_sum: wp.array[float],  # (N_CELLS / SUM_CELLS)
):
    """Add up the cells of the finest cascade that some camera sees. One thread per SUM_CELLS cells."""
    i = first + wp.tid()
    sum = float(0.0)
    for j in range(SUM_CELLS):
        sum += wp.max(thickness[i * SUM_CELLS + j], 0.0)
    out_sum[i] = sum


@wp.kernel
def choose_threshold(
    first: int,
    # Params
    max_threshold: float,
    # In
    sums: wp.array[float],  # (N_CELLS / SUM_CELLS)
    # Out
    out_threshold: wp.array[float],  # (1)
):
    """Take the mean thickness of the finest cascade, at most `max_threshold`. A single thread."""
    sum = float(0.0)
    for i in range(sums.shape[0]):
        sum += sums[i]
    out_threshold[0] = wp.min(max_threshold, sum / float(N_CELLS))


@wp.kernel
def set_bits(
    first: int,
    # In
    thickness: wp.array[float],  # (cascades * N_CELLS)
    threshold: wp.array[float],  # (1)
    # Out
    out_bits: wp.array[wp.uint64],  # (cascades * N_WORDS)
):
    """Mark the cells that are thicker than the threshold. One thread per word."""
    i = first + wp.tid()
    word = wp.uint64(0)
    for j in range(WORD_CELLS):
        if thickness[i * WORD_CELLS + j] > threshold[0]:
            word = word | (wp.uint64(1) << wp.uint64(j))
    out_bits[i] = word


@wp.kernel
def join_finer_bits(
    first: int,
    # Params
    cascade: int,  # > 0
    # In/out
    bits: wp.array[wp.uint64],  # (cascades * N_WORDS)
):
    """Mark the cells of a cascade with marked cells of the next finer one inside. One thread per finer 8³ cells."""
    i = first + wp.tid()
    x, y, z = morton_decode(i)
    # The finer cascade fills the middle half: blocks 8 ... 23 of 32 along each axis
    place = cascade * N_WORDS + morton_encode(x + 8, y + 8, z + 8)
    word = bits[place]
    for k in range(8):
        finer = bits[(cascade - 1) * N_WORDS + i * 8 + k]
        for j in range(8):
            if ((finer >> wp.uint64(8 * j)) & wp.uint64(255)) != wp.uint64(0):
                word = word | (wp.uint64(1) << wp.uint64(8 * k + j))
    bits[place] = word
