"""From linear radiance and from scalars to the bytes that a screen shows: tone mapping, sRGB encoding, false colours.

A pixel is one uint32 whose bytes in memory are R, G, B and A = 255.
"""

import warp as wp

from nrc.kernels.sampling import luminance

wp.set_module_options({"enable_backward": False})

TONE_NONE = wp.constant(0)
TONE_REINHARD = wp.constant(1)
TONE_ACES = wp.constant(2)
TONE_AGX = wp.constant(3)

OPAQUE = wp.constant(wp.uint32(0xFF000000))
BRIGHTEST = wp.constant(1.0e9)  # radiance beyond looks the same and would overflow in the curves' squares

# Academy Color Encoding System, the fit of the reference rendering and sRGB output transforms by Stephen Hill
# (BakingLab, ACES.hlsl): sRGB to the curve's space, and back.
ACES_INPUT = wp.constant(wp.mat33(0.59719, 0.35458, 0.04823, 0.07600, 0.90834, 0.01566, 0.02840, 0.13383, 0.83777))
ACES_OUTPUT = wp.constant(
    wp.mat33(1.60475, -0.53108, -0.07367, -0.10208, 1.10813, -0.00605, -0.00327, -0.07276, 1.07602)
)

# AgX by Troy Sobotka without a look; matrices, range and polynomial of Benjamin Wrensch's approximation ("Minimal AgX
# Implementation", iolite-engine.com/blog_posts/minimal_agx_implementation).
AGX_INSET = wp.constant(
    wp.mat33(
        0.842479062253094,
        0.0784335999999992,
        0.0792237451477643,
        0.0423282422610123,
        0.878468636469772,
        0.0791661274605434,
        0.0423756549057051,
        0.0784336,
        0.879142973793104,
    )
)
AGX_OUTSET = wp.constant(
    wp.mat33(
        1.19687900512017,
        -0.0980208811401368,
        -0.0990297440797205,
        -0.0528968517574562,
        1.15190312990417,
        -0.0989611768448433,
        -0.0529716355144438,
        -0.0980434501171241,
        1.15107367264116,
    )
)
AGX_MIN_EV = wp.constant(-12.47393)  # [stops] where the curve starts and ends
AGX_MAX_EV = wp.constant(4.026069)


@wp.func
def displayable(x: float) -> float:
    """`x` between 0 and BRIGHTEST; 0 for NaN."""
    return wp.where(x > 0.0, wp.min(x, BRIGHTEST), 0.0)


@wp.func
def tone_reinhard(c: wp.vec3) -> wp.vec3:
    """L / (1 + L) on the luminance L (Eq. 3, Reinhard et al. 2002); saturated colours may still exceed 1."""
    return c / (1.0 + luminance(c))


@wp.func
def aces_curve(v: float) -> float:
    """Stephen Hill's rational fit."""
    return (v * (v + 0.0245786) - 0.000090537) / (v * (0.983729 * v + 0.4329510) + 0.238081)


@wp.func
def tone_aces(c: wp.vec3) -> wp.vec3:
    """ACES reference rendering and output transform."""
    v = ACES_INPUT * c
    return ACES_OUTPUT * wp.vec3(aces_curve(v[0]), aces_curve(v[1]), aces_curve(v[2]))


@wp.func
def agx_curve(v: float) -> float:
    """AgX's sigmoid of a radiance, over its range in stops; display-encoded with exponent 2.2."""
    x = (wp.clamp(wp.log2(wp.max(v, 1.0e-10)), AGX_MIN_EV, AGX_MAX_EV) - AGX_MIN_EV) / (AGX_MAX_EV - AGX_MIN_EV)
    return (((((15.5 * x - 40.14) * x + 31.96) * x - 6.868) * x + 0.4298) * x + 0.1191) * x - 0.00232


@wp.func
def tone_agx(c: wp.vec3) -> wp.vec3:
    """AgX base, linear."""
    v = AGX_INSET * c
    v = AGX_OUTSET * wp.vec3(agx_curve(v[0]), agx_curve(v[1]), agx_curve(v[2]))
    return wp.vec3(wp.pow(wp.max(v[0], 0.0), 2.2), wp.pow(wp.max(v[1], 0.0), 2.2), wp.pow(wp.max(v[2], 0.0), 2.2))


@wp.func
def srgb_byte(x: float) -> wp.uint32:
    """Code value of a linear component, clamped to [0, 1] (IEC 61966-2-1)."""
    v = wp.clamp(x, 0.0, 1.0)
    encoded = 12.92 * v
    if v > 0.0031308:
        encoded = 1.055 * wp.pow(v, 1.0 / 2.4) - 0.055
    return wp.uint32(255.0 * encoded + 0.5)


@wp.kernel
def map_radiance(
    first: int,
    # Params
    operation: int,  # TONE_*
    factor: float,  # 2^exposure
    # In
    radiance: wp.array[wp.vec3],  # (pixels,) linear [W m^-2 sr^-1]
    # Out
    out_pixels: wp.array[wp.uint32],  # (pixels,)
):
    """Expose, map the tones and encode; what is NaN or negative becomes 0. One thread per pixel."""
    i = first + wp.tid()
    c = factor * radiance[i]
    c = wp.vec3(displayable(c[0]), displayable(c[1]), displayable(c[2]))
    if operation == TONE_REINHARD:
        c = tone_reinhard(c)
    elif operation == TONE_ACES:
        c = tone_aces(c)
    elif operation == TONE_AGX:
        c = tone_agx(c)
    green = srgb_byte(c[1]) << wp.uint32(8)
    blue = srgb_byte(c[2]) << wp.uint32(16)
    out_pixels[i] = srgb_byte(c[0]) | green | blue | OPAQUE


@wp.kernel
def map_scalars(
    first: int,
    # Params
    lower: float,  # shown in the first colour, as everything below
    upper: float,  # shown in the last colour, as everything above
    # In
    colors: wp.array[wp.uint32],  # of evenly spaced values
    values: wp.array[float],  # (pixels,)
    # Out
    out_pixels: wp.array[wp.uint32],  # (pixels,)
):
    """False colours of numbers, black where they are NaN. One thread per pixel."""
    i = first + wp.tid()
    value = values[i]
    last = colors.shape[0] - 1
    color = wp.uint32(OPAQUE)
    if value >= upper:
        color = colors[last]
    elif value > lower:
        color = colors[int((value - lower) / (upper - lower) * float(last) + 0.5)]
    elif value <= lower:
        color = colors[0]
    out_pixels[i] = color
