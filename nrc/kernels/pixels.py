"""Pixels of an image as training samples, and windows of an image and of what was learned of it for the screen.

Strata all get one pixel per step, and each pixel comes once per epoch.

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
    pitch_x: wp.float64,
    pitch_y: wp.float64,
    inverse_size: wp.float64,
    # Out
    out_x: wp.array2d[float],  # (pixels, 2) in [0, 1]
):
    """Write centres of pixels a pitch apart, `width` in a row, from the corner (x0, y0). One thread per pixel."""
    i = first + wp.tid()
    half = wp.float64(0.5)
    out_x[i, 0] = coordinate(x0 + (wp.float64(i % width) + half) * pitch_x, inverse_size)
    out_x[i, 1] = coordinate(y0 + (wp.float64(i / width) + half) * pitch_y, inverse_size)


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


FITTED, ORIGINAL, ERROR = 0, 1, 2  # what a window shows


@wp.struct
class WindowView:
    """A rectangle of an image that pixels of a picture show, each by `fine` x `fine` samples."""

    x0: wp.float64  # upper left corner in the image [px]
    y0: wp.float64
    pitch_x: wp.float64  # image pixels per pixel of the picture
    pitch_y: wp.float64
    width: int  # of the picture [px]
    height: int
    image_width: int  # [px]
    image_height: int
    fine: int


@wp.func
def as_color(r: float, g: float, b: float, n_colors: int) -> wp.vec3:
    """A colour of one or three channels."""
    if n_colors == 1:
        return wp.vec3(r, r, r)
    return wp.vec3(r, g, b)


@wp.kernel
def average_samples(
    first: int,
    # Params
    window: WindowView,
    n_colors: int,  # 1 or 3
    # In
    values: wp.array2d[float],  # (samples, channels) as a grid of (height * fine, width * fine)
    # Out
    out_color: wp.array[wp.vec3],  # (height * width)
):
    """Average the samples of each pixel. One thread per pixel."""
    i = first + wp.tid()
    column = (i % window.width) * window.fine
    row = (i / window.width) * window.fine
    total = wp.vec3()
    for j in range(window.fine):
        for k in range(window.fine):
            s = (row + j) * window.width * window.fine + column + k
            second = wp.min(1, n_colors - 1)
            total += as_color(values[s, 0], values[s, second], values[s, n_colors - 1], n_colors)
    out_color[i] = total / float(window.fine * window.fine)


@functools.cache
def make_read_window(dtype: type):
    """Kernel that reads a window from pixels of `dtype`, integers scaled to [0, 1]."""
    unit = {wp.uint8: 1.0 / 255.0, wp.uint16: 1.0 / 65535.0}.get(dtype, 1.0)

    @wp.kernel(module_options={"enable_backward": False}, module="unique")
    def read_window(
        first: int,
        # Params
        window: WindowView,
        n_colors: int,  # 1 or 3
        # In
        pixels: wp.array3d[dtype],  # (image_height, image_width, stored channels)
        # Out
        out_color: wp.array[wp.vec3],  # (height * width)
    ):
        """Average the image's pixels nearest to the samples of each pixel. One thread per pixel."""
        i = first + wp.tid()
        total = wp.vec3()
        n = int(0)
        for j in range(window.fine):
            for k in range(window.fine):
                u = (wp.float64(k) + wp.float64(0.5)) / wp.float64(window.fine)
                v = (wp.float64(j) + wp.float64(0.5)) / wp.float64(window.fine)
                x = int(wp.floor(window.x0 + (wp.float64(i % window.width) + u) * window.pitch_x))
                y = int(wp.floor(window.y0 + (wp.float64(i / window.width) + v) * window.pitch_y))
                if x >= 0 and y >= 0 and x < window.image_width and y < window.image_height:
                    second = wp.min(1, n_colors - 1)
                    total += as_color(
                        float(pixels[y, x, 0]), float(pixels[y, x, second]), float(pixels[y, x, n_colors - 1]), n_colors
                    )
                    n += 1
        out_color[i] = total * (wp.static(unit) / float(wp.max(n, 1)))

    return read_window


@wp.func
def clip(c: wp.vec3) -> wp.vec3:
    """Colour as a display shows it, within [0, 1]."""
    return wp.min(wp.max(c, wp.vec3(0.0)), wp.vec3(1.0))


@wp.kernel
def compose_window(
    first: int,
    # Params
    window: WindowView,
    show: int,  # FITTED, ORIGINAL or ERROR
    split: int,  # columns on the left that show the original; negative for no line
    error_gain: float,
    background: float,
    # In
    fitted: wp.array[wp.vec3],  # (height * width), may be empty where it is not shown
    original: wp.array[wp.vec3],
    # Out
    out_color: wp.array[wp.vec3],  # (height * width) sRGB-encoded
):
    """Choose what each pixel shows, with a line at the split, and a background around the image. One per pixel."""
    i = first + wp.tid()
    column = i % window.width
    half = wp.float64(0.5)
    x = window.x0 + (wp.float64(column) + half) * window.pitch_x
    y = window.y0 + (wp.float64(i / window.width) + half) * window.pitch_y
    inside = x >= wp.float64(0.0) and y >= wp.float64(0.0)
    inside = inside and x < wp.float64(window.image_width) and y < wp.float64(window.image_height)
    color = wp.vec3(background)
    if inside:
        if show == wp.static(ORIGINAL) or column < split:
            color = original[i]
        elif show == wp.static(FITTED):
            color = fitted[i]
        else:
            difference = clip(fitted[i]) - clip(original[i])
            color = clip(error_gain * wp.vec3(wp.abs(difference[0]), wp.abs(difference[1]), wp.abs(difference[2])))
    if column == split:
        color = wp.vec3(1.0)
    out_color[i] = color


@wp.func
def encode_srgb(x: float) -> float:
    """sRGB transfer function (IEC 61966-2-1) of a linear value that is not negative."""
    if x <= 0.0031308:
        return 12.92 * x
    return 1.055 * wp.pow(x, 1.0 / 2.4) - 0.055


@wp.kernel
def pack_colors(
    first: int,
    # Params
    is_linear: int,  # 1: to be sRGB-encoded
    # In
    color: wp.array[wp.vec3],  # (n)
    # Out
    out_packed: wp.array[wp.uint32],  # (n) RGBA, 8 bits each, red lowest
):
    """Round colours to opaque pixels of a display. One thread per pixel."""
    i = first + wp.tid()
    word = wp.uint32(255) << wp.uint32(24)
    c = clip(color[i])
    for k in range(3):
        value = c[k]
        if is_linear != 0:
            value = encode_srgb(value)
        word |= wp.uint32(255.0 * value + 0.5) << wp.uint32(8 * k)
    out_packed[i] = word
