"""Texture lookup: bitmaps in one texel buffer, and checkerboards."""

import warp as wp

wp.set_module_options({"enable_backward": False})

TEXTURE_LINEAR8 = wp.constant(0)  # one uint32 per texel, R in the low byte
TEXTURE_SRGB8 = wp.constant(1)  # the same with R, G, B sRGB-encoded
TEXTURE_FLOAT = wp.constant(2)  # four float32 per texel, as bit patterns
TEXTURE_CHECKERBOARD = wp.constant(3)

WRAP_REPEAT = wp.constant(0)
WRAP_CLAMP = wp.constant(1)
WRAP_MIRROR = wp.constant(2)


@wp.struct
class TextureView:
    """One texture as materials refer to it: texels plus how to look them up."""

    kind: int
    offset: int  # first uint32 of the image in the texel buffer
    width: int  # [texel]
    height: int  # [texel]
    wrap_u: int
    wrap_v: int
    nearest: int
    uv_set: int
    row_u: wp.vec3  # (u', v') = (row_u, row_v) · (u, v, 1)
    row_v: wp.vec3
    color0: wp.vec3  # checkerboard
    color1: wp.vec3


@wp.func
def _wrap(i: int, n: int, mode: int) -> int:
    """Texel index inside [0, n)."""
    if mode == WRAP_CLAMP:
        return wp.clamp(i, 0, n - 1)
    period = n
    if mode == WRAP_MIRROR:
        period = 2 * n
    j = i % period
    if j < 0:
        j += period
    if j >= n:
        j = period - 1 - j
    return j


@wp.func
def _texel(
    view: wp.ref[TextureView], texels: wp.array[wp.uint32], srgb_to_linear: wp.array[float], x: int, y: int
) -> wp.vec4:
    """Linear RGBA of one texel."""
    i = _wrap(y, view.height, view.wrap_v) * view.width + _wrap(x, view.width, view.wrap_u)
    if view.kind == TEXTURE_FLOAT:
        j = view.offset + 4 * i
        return wp.vec4(
            wp.cast(texels[j], float),
            wp.cast(texels[j + 1], float),
            wp.cast(texels[j + 2], float),
            wp.cast(texels[j + 3], float),
        )
    packed = texels[view.offset + i]
    r = int(packed & wp.uint32(255))
    g = int((packed >> wp.uint32(8)) & wp.uint32(255))
    b = int((packed >> wp.uint32(16)) & wp.uint32(255))
    a = float(packed >> wp.uint32(24)) * (1.0 / 255.0)
    if view.kind == TEXTURE_SRGB8:
        return wp.vec4(srgb_to_linear[r], srgb_to_linear[g], srgb_to_linear[b], a)
    return wp.vec4(float(r) * (1.0 / 255.0), float(g) * (1.0 / 255.0), float(b) * (1.0 / 255.0), a)


@wp.func
def texture_eval(
    view: wp.ref[TextureView], texels: wp.array[wp.uint32], srgb_to_linear: wp.array[float], uv0: wp.vec2, uv1: wp.vec2
) -> wp.vec4:
    """Filtered linear RGBA at the surface point with texture coordinates `uv0`, `uv1`."""
    uv = uv0
    if view.uv_set == 1:
        uv = uv1
    p = wp.vec3(uv[0], uv[1], 1.0)
    u = wp.dot(view.row_u, p)
    v = wp.dot(view.row_v, p)
    if view.kind == TEXTURE_CHECKERBOARD:
        c = view.color0
        if (u - wp.floor(u) > 0.5) != (v - wp.floor(v) > 0.5):
            c = view.color1
        return wp.vec4(c[0], c[1], c[2], 1.0)
    # Keep the integer conversion in range whatever the coordinates are.
    x = wp.clamp(u * float(view.width), -1.0e9, 1.0e9)
    y = wp.clamp(v * float(view.height), -1.0e9, 1.0e9)
    if view.nearest != 0:
        return _texel(view, texels, srgb_to_linear, int(wp.floor(x)), int(wp.floor(y)))
    x -= 0.5
    y -= 0.5
    x0 = wp.floor(x)
    y0 = wp.floor(y)
    fx = x - x0
    fy = y - y0
    result = wp.vec4(0.0, 0.0, 0.0, 0.0)
    for i in range(4):
        dx = i & 1
        dy = i >> 1
        weight = wp.where(dx == 1, fx, 1.0 - fx) * wp.where(dy == 1, fy, 1.0 - fy)
        result += weight * _texel(view, texels, srgb_to_linear, int(x0) + dx, int(y0) + dy)
    return result
