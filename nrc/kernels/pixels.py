"""Pixels of an image as training samples: strata that all get one pixel per step, and each pixel once per epoch.

The pixels of a window are put in an order that keeps neighbours together (bands of rows, walked column by column) and
cut into as many strata as a batch has rows. A stratum yields its pixels in a random order that is drawn anew whenever
all of them were used. What a step draws depends on the seed and the step alone.
"""

import functools

import warp as wp

from .rng import rng_init

wp.set_module_options({"enable_backward": False})

MIX_A = wp.constant(wp.uint32(0xCC9E2D51))
MIX_B = wp.constant(wp.uint32(0x85EBCA6B))


@wp.struct
class Strata:
    """Where rows `first_row` ... `first_row + n_rows - 1` of a batch are drawn from."""

    seed: int
    first_row: int
    n_rows: int
    n_strata: int  # fewer than rows only in a window of fewer pixels, whose rows go through them in turn
    x0: int  # window [px]
    y0: int
    width: int
    height: int
    band_height: int  # rows of pixels that are walked together
    length: int  # pixels of a stratum; the first `n_longer` have one more
    n_longer: int


@wp.func
def scramble(x: wp.uint32, mask: wp.uint32, shift: wp.uint32, a: wp.uint32, b: wp.uint32) -> wp.uint32:
    """A permutation of 0 ... mask: each step can be undone modulo mask + 1, a power of two."""
    y = (x ^ a) & mask
    y = (y * (b | wp.uint32(1))) & mask
    y ^= y >> shift
    y = ((y + b) * MIX_A) & mask
    y ^= y >> shift
    y = ((y ^ (a >> wp.uint32(16))) * MIX_B) & mask
    return y ^ (y >> shift)


@wp.func
def permute(i: wp.uint32, n: wp.uint32, key: wp.uint64) -> wp.uint32:
    """Where a permutation of 0 ... n-1, picked by `key`, puts `i`: one of the next power of two, followed until inside.

    Cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
    """
    mask = n - wp.uint32(1)
    for k in range(5):
        mask |= mask >> (wp.uint32(1) << wp.uint32(k))
    shift = wp.where(mask < wp.uint32(256), wp.uint32(3), wp.uint32(7))
    a = wp.uint32(key & wp.uint64(0xFFFFFFF)) * MIX_B
    b = wp.uint32(key >> wp.uint64(32))
    x = scramble(i, mask, shift, a, b)
    while x >= n:
        x = scramble(x, mask, shift, a, b)
    return x


@wp.func
def stratum_pixel(i: int, step: int, strata: Strata) -> wp.vec2i:
    """Pixel of stratum `i` in a step."""
    begin = wp.float64(i) * wp.float64(strata.length) + wp.float64(wp.min(i, strata.n_longer))
    n = strata.length
    if i < strata.n_longer:
        n += 1
    key = rng_init(strata.seed, step / n, i)
    place = begin + wp.float64(permute(wp.uint32(step % n), wp.uint32(n), key))
    band_pixels = wp.float64(strata.band_height) * wp.float64(strata.width)
    band = wp.floor(place / band_pixels)  # exact below 2^52, and faster than dividing 64-bit integers
    y = int(band) * strata.band_height
    within = int(place - band * band_pixels)
    rows = wp.min(strata.band_height, strata.height - y)  # the last band may be lower
    return wp.vec2i(strata.x0 + within / rows, strata.y0 + y + within % rows)


@wp.func
def coordinate(position: wp.float64, inverse_size: wp.float64) -> float:
    """Where a position [px] is in [0, 1]."""
    return float(position * inverse_size)


@wp.kernel
def place_pixels(
    first: int,
    # Params
    width: int,
    x0: wp.float64,
    y0: wp.float64,
    pitch: wp.float64,
    inverse_size: wp.float64,
    # Out
    out_x: wp.array2d[float],  # (pixels, 2) in [0, 1]
):
    """Write centres of pixels `pitch` apart, `width` in a row, from the corner (x0, y0). One thread per pixel."""
    i = first + wp.tid()
    half = wp.float64(0.5)
    out_x[i, 0] = coordinate(x0 + (wp.float64(i % width) + half) * pitch, inverse_size)
    out_x[i, 1] = coordinate(y0 + (wp.float64(i / width) + half) * pitch, inverse_size)


@functools.cache
def make_draw_pixels(dtype: type, n_channels: int):
    """Kernel that draws a batch from pixels of `dtype`, integers scaled to [0, 1]."""
    unit = {wp.uint8: 1.0 / 255.0, wp.uint16: 1.0 / 65535.0}.get(dtype, 1.0)

    @wp.kernel(module_options={"enable_backward": False}, module="unique")
    def draw_pixels(
        first: int,
        # Params
        strata: Strata,
        step: int,
        inverse_size: wp.float64,
        # In
        pixels: wp.array3d[dtype],  # (height, width, stored channels)
        # Out
        out_x: wp.array2d[float],  # (rows, 2) in [0, 1]
        out_y: wp.array2d[float],  # (rows, n_channels)
    ):
        """Write the coordinates and values of a stratum's pixel. One thread per row."""
        i = first + wp.tid()
        turn = wp.int64(step) * wp.int64(strata.n_rows) + wp.int64(i)
        p = stratum_pixel(int(turn % wp.int64(strata.n_strata)), step, strata)
        row = strata.first_row + i
        out_x[row, 0] = coordinate(wp.float64(p[0]) + wp.float64(0.5), inverse_size)
        out_x[row, 1] = coordinate(wp.float64(p[1]) + wp.float64(0.5), inverse_size)
        for c in range(wp.static(n_channels)):
            out_y[row, c] = float(pixels[p[1], p[0], c]) * wp.static(unit)

    return draw_pixels
