"""Warps from the unit square, their densities, local frames, and the bisection of tables.

Directions are unit vectors; densities are per solid angle or per area, as named. Sources: Shirley & Chiu 1997
(concentric disk), Pharr, Jakob & Humphreys 2023, appendix A.
"""

import warp as wp

wp.set_module_options({"enable_backward": False})

PI = wp.constant(3.14159265358979)
INV_PI = wp.constant(0.318309886183791)


@wp.func
def square_to_uniform_disk_concentric(u: wp.vec2) -> wp.vec2:
    """Unit disk, area-preserving and without a seam; density 1 / pi."""
    x = 2.0 * u[0] - 1.0
    y = 2.0 * u[1] - 1.0
    if x == 0.0 and y == 0.0:
        return wp.vec2(0.0, 0.0)
    r = x
    phi = 0.25 * PI * (y / x)
    if wp.abs(x) < wp.abs(y):
        r = y
        phi = 0.5 * PI - 0.25 * PI * (x / y)
    return wp.vec2(r * wp.cos(phi), r * wp.sin(phi))


@wp.func
def square_to_cosine_hemisphere(u: wp.vec2) -> wp.vec3:
    """Cosine-weighted hemisphere around +z."""
    p = square_to_uniform_disk_concentric(u)
    return wp.vec3(p[0], p[1], wp.sqrt(wp.max(0.0, 1.0 - p[0] * p[0] - p[1] * p[1])))


@wp.func
def square_to_cosine_hemisphere_pdf(w: wp.vec3) -> float:
    """Density per solid angle."""
    return INV_PI * wp.max(0.0, w[2])


@wp.func
def square_to_uniform_sphere(u: wp.vec2) -> wp.vec3:
    """Uniform directions; density 1 / (4 pi)."""
    z = 1.0 - 2.0 * u[0]
    r = wp.sqrt(wp.max(0.0, 1.0 - z * z))
    phi = 2.0 * PI * u[1]
    return wp.vec3(r * wp.cos(phi), r * wp.sin(phi), z)


@wp.func
def square_to_uniform_triangle(u: wp.vec2) -> wp.vec2:
    """Barycentrics (b1, b2) of a uniformly distributed point; density 1 / area."""
    root = wp.sqrt(u[0])
    return wp.vec2(1.0 - root, u[1] * root)


@wp.struct
class Frame:
    """Orthonormal basis (s, t, n)."""

    s: wp.vec3
    t: wp.vec3
    n: wp.vec3


@wp.func
def frame_from_normal(n: wp.vec3) -> Frame:
    """Any basis around unit `n`, continuous except at n = -z (Duff et al. 2017)."""
    frame = Frame()
    sign = wp.where(n[2] >= 0.0, 1.0, -1.0)
    a = -1.0 / (sign + n[2])
    b = n[0] * n[1] * a
    frame.s = wp.vec3(1.0 + sign * n[0] * n[0] * a, sign * b, -sign * n[0])
    frame.t = wp.vec3(b, sign + n[1] * n[1] * a, -n[1])
    frame.n = n
    return frame


@wp.func
def frame_from_tangent(n: wp.vec3, tangent: wp.vec3) -> Frame:
    """Basis around unit `n` whose s is `tangent` made perpendicular; any basis where they are parallel."""
    s = tangent - n * wp.dot(n, tangent)
    length = wp.length(s)
    if length < 1.0e-8:
        return frame_from_normal(n)
    frame = Frame()
    frame.s = s / length
    frame.t = wp.cross(n, frame.s)
    frame.n = n
    return frame


@wp.func
def to_local(frame: Frame, v: wp.vec3) -> wp.vec3:
    """World vector in the frame's coordinates."""
    return wp.vec3(wp.dot(v, frame.s), wp.dot(v, frame.t), wp.dot(v, frame.n))


@wp.func
def to_world(frame: Frame, v: wp.vec3) -> wp.vec3:
    """Frame coordinates as a world vector."""
    return frame.s * v[0] + frame.t * v[1] + frame.n * v[2]


@wp.func
def cdf_search(cdf: wp.array[float], first: int, n: int, u: float) -> int:
    """Largest i in [0, n) with cdf[first + i] <= u, where cdf[first] = 0 and n + 1 entries rise to 1."""
    low = int(0)
    high = int(n)
    while high - low > 1:
        middle = (low + high) // 2
        if cdf[first + middle] <= u:
            low = middle
        else:
            high = middle
    return low


@wp.func
def luminance(c: wp.vec3) -> float:
    """Relative luminance of linear Rec. 709 RGB."""
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]


@wp.func
def max_component(c: wp.vec3) -> float:
    """Largest of the three."""
    return wp.max(c[0], wp.max(c[1], c[2]))


@wp.func
def is_finite3(c: wp.vec3) -> bool:
    """All three components are finite."""
    return wp.isfinite(c[0]) and wp.isfinite(c[1]) and wp.isfinite(c[2])
