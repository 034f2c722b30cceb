"""Microfacet normal distributions (GGX and Beckmann, anisotropic), their visible-normal sampling, and Fresnel terms.

Directions are unit vectors in the local frame (z = macroscopic normal); `alpha` are the widths along x and y, both at
least ALPHA_MIN; `beckmann` != 0 picks the Beckmann distribution, 0 GGX. Sources: Walter et al. 2007, "Microfacet Models
for Refraction through Rough Surfaces" (D, G1, Jacobians); Heitz 2018, "Sampling the GGX Distribution of Visible
Normals"; Jakob 2014, "An Improved Visible Normal Sampling Routine for the Beckmann Distribution"; Burley 2012 (GTR1).
"""

import warp as wp

from nrc.kernels.sampling import INV_PI, PI, square_to_uniform_disk_concentric

wp.set_module_options({"enable_backward": False})

ALPHA_MIN = wp.constant(1.0e-4)  # below it a surface is perfectly smooth
INV_SQRT_PI = wp.constant(0.564189583547756)
ERF_LIMIT = wp.constant(0.9999998)  # keeps the inverse error function finite


@wp.func
def sqr(x: float) -> float:
    """x * x."""
    return x * x


@wp.func
def reflect(w: wp.vec3, m: wp.vec3) -> wp.vec3:
    """Mirror `w` about the normal `m`; both point away from the surface."""
    return 2.0 * wp.dot(w, m) * m - w


@wp.func
def refract(wo: wp.vec3, m: wp.vec3, cos_t: float, eta: float) -> wp.vec3:
    """Refract `wo` at the facet `m`; `eta` is transmitted over incident, `cos_t` from `fresnel_dielectric`."""
    return m * (wp.dot(wo, m) / eta + cos_t) - wo / eta


@wp.func
def fresnel_dielectric(cos_o: float, ior: float) -> wp.vec2:
    """Unpolarized reflectance and signed cosine of the refracted direction (0 under total internal reflection).

    `ior` is inside over outside; cos_o < 0 arrives from inside.
    """
    eta = wp.where(cos_o >= 0.0, ior, 1.0 / ior)
    c = wp.abs(cos_o)
    cos_t = wp.sqrt(wp.max(0.0, 1.0 - (1.0 - c * c) / (eta * eta)))
    r = 1.0
    if ior == 1.0:
        r = 0.0
    elif c > 0.0:
        r_s = (c - eta * cos_t) / (c + eta * cos_t)
        r_p = (cos_t - eta * c) / (cos_t + eta * c)
        r = 0.5 * (r_s * r_s + r_p * r_p)
    return wp.vec2(r, wp.where(cos_o >= 0.0, -cos_t, cos_t))


@wp.func
def fresnel_conductor(c: float, eta: float, k: float) -> float:
    """Unpolarized reflectance of a conductor with complex index eta + i k (Born & Wolf 1999, section 14.2)."""
    c2 = c * c
    s2 = 1.0 - c2
    t = eta * eta - k * k - s2
    a2b2 = wp.sqrt(t * t + 4.0 * eta * eta * k * k)
    a = wp.sqrt(wp.max(0.0, 0.5 * (a2b2 + t)))
    p = a2b2 + c2
    q = 2.0 * c * a
    r_s = (p - q) / (p + q)
    v = a2b2 * c2 + s2 * s2
    r_p = r_s * (v - q * s2) / (v + q * s2)
    return 0.5 * (r_s + r_p)


@wp.func
def fresnel_diffuse_internal(ior: float) -> float:
    """Mean reflectance of diffuse light arriving from inside: fits of Egan & Hilgeman 1973, d'Eon & Irving 2011."""
    if ior > 1.0:
        e = 1.0 / ior
        return -1.4399 * e * e + 0.7099 * e + 0.6681 + 0.0636 * ior
    return 0.919317 + ior * (-3.4793 + ior * (6.75335 + ior * (-7.80989 + ior * (4.98554 - 1.36881 * ior))))


@wp.func
def schlick_weight(c: float) -> float:
    """(1 - c)^5."""
    m = wp.clamp(1.0 - c, 0.0, 1.0)
    m2 = m * m
    return m2 * m2 * m


@wp.func
def microfacet_d(m: wp.vec3, alpha: wp.vec2, beckmann: int) -> float:
    """Density of microfacet normals (eqs. 25 and 33, Walter et al. 2007; anisotropic as in Heitz 2014)."""
    x = m[0] / alpha[0]
    y = m[1] / alpha[1]
    z2 = m[2] * m[2]
    xy = x * x + y * y
    d = 0.0
    if beckmann != 0:
        d = wp.exp(-xy / z2) * INV_PI / (alpha[0] * alpha[1] * z2 * z2)
    else:
        d = INV_PI / (alpha[0] * alpha[1] * sqr(xy + z2))
    return wp.where(d * m[2] > 1.0e-20, d, 0.0)


@wp.func
def microfacet_g1(v: wp.vec3, v_dot_m: float, alpha: wp.vec2, beckmann: int) -> float:
    """Smith masking of `v` for facets with v . m = `v_dot_m` (eqs. 27, 34, Walter et al. 2007)."""
    if v_dot_m * v[2] <= 0.0:
        return 0.0
    xy = sqr(alpha[0] * v[0]) + sqr(alpha[1] * v[1])
    if xy == 0.0:
        return 1.0
    t = xy / (v[2] * v[2])
    if beckmann != 0:
        a = 1.0 / wp.sqrt(t)
        if a >= 1.6:
            return 1.0
        return (3.535 * a + 2.181 * a * a) / (1.0 + 2.276 * a + 2.577 * a * a)
    return 2.0 / (1.0 + wp.sqrt(1.0 + t))


@wp.func
def beckmann_slope(cos_o: float, u: wp.vec2) -> wp.vec2:
    """Visible slope for alpha = 1 and a direction in the xz plane: Newton steps in the erf domain (Jakob 2014)."""
    tan_o = wp.max(wp.sqrt(wp.max(0.0, 1.0 - cos_o * cos_o)) / cos_o, 1.0e-6)
    cot_o = 1.0 / tan_o
    u0 = wp.clamp(u[0], 1.0e-6, 1.0 - 1.0e-6)
    u1 = wp.clamp(u[1], 1.0e-6, 1.0 - 1.0e-6)
    top = wp.erf(cot_o)
    # First guess: the solution at grazing incidence.
    x = top - (top + 1.0) * wp.erf(wp.sqrt(-wp.log(u0)))
    target = u0 * (1.0 + top + INV_SQRT_PI * tan_o * wp.exp(-cot_o * cot_o))
    for _ in range(3):
        slope = wp.erfinv(wp.clamp(x, -ERF_LIMIT, ERF_LIMIT))
        value = 1.0 + x + INV_SQRT_PI * tan_o * wp.exp(-slope * slope) - target
        x = x - value / (1.0 - slope * tan_o)
    return wp.vec2(wp.erfinv(wp.clamp(x, -ERF_LIMIT, ERF_LIMIT)), wp.erfinv(2.0 * u1 - 1.0))


@wp.func
def microfacet_sample(wo: wp.vec3, alpha: wp.vec2, beckmann: int, u: wp.vec2) -> wp.vec3:
    """Normal with density D(m) G1(wo) |wo . m| / wo.z; needs wo.z > 0."""
    # Stretch to alpha = 1.
    v = wp.normalize(wp.vec3(alpha[0] * wo[0], alpha[1] * wo[1], wo[2]))
    cos_phi = 1.0
    sin_phi = 0.0
    sin_theta = wp.sqrt(v[0] * v[0] + v[1] * v[1])
    if sin_theta > 0.0:
        cos_phi = v[0] / sin_theta
        sin_phi = v[1] / sin_theta
    # Hemisphere normal (x towards wo's azimuth), not normalized.
    h = wp.vec3(0.0, 0.0, 1.0)
    if beckmann != 0:
        slope = beckmann_slope(v[2], u)
        h = wp.vec3(-slope[0], -slope[1], 1.0)
    else:
        p = square_to_uniform_disk_concentric(u)
        s = 0.5 * (1.0 + v[2])
        y = (1.0 - s) * wp.sqrt(wp.max(0.0, 1.0 - p[0] * p[0])) + s * p[1]
        z = wp.sqrt(wp.max(0.0, 1.0 - p[0] * p[0] - y * y))
        h = wp.vec3(sin_theta * z - v[2] * y, -p[0], wp.max(1.0e-7, sin_theta * y + v[2] * z))
    # Rotate to the azimuth and undo the stretch.
    return wp.normalize(
        wp.vec3(alpha[0] * (cos_phi * h[0] - sin_phi * h[1]), alpha[1] * (sin_phi * h[0] + cos_phi * h[1]), h[2])
    )


@wp.func
def microfacet_reflection(wo: wp.vec3, wi: wp.vec3, alpha: wp.vec2, beckmann: int) -> wp.vec3:
    """(D G / (4 wo.z wi.z), density of wi = reflect(wo, sampled normal), wo . m); needs wo.z > 0 and wi.z > 0."""
    m = wp.normalize(wo + wi)
    c = wp.dot(wo, m)
    if c <= 0.0:
        return wp.vec3(0.0, 0.0, 0.0)
    pdf = microfacet_d(m, alpha, beckmann) * microfacet_g1(wo, c, alpha, beckmann) / (4.0 * wo[2])
    return wp.vec3(pdf * microfacet_g1(wi, c, alpha, beckmann) / wi[2], pdf, c)


@wp.func
def gtr1_d(cos_m: float, alpha: float) -> float:
    """Generalized Trowbridge-Reitz distribution with exponent 1 (Burley 2012, appendix B)."""
    a2 = alpha * alpha
    return (a2 - 1.0) * INV_PI / (wp.log(a2) * (1.0 + (a2 - 1.0) * cos_m * cos_m))


@wp.func
def gtr1_sample(alpha: float, u: wp.vec2) -> wp.vec3:
    """Normal with density D(m) m.z."""
    a2 = alpha * alpha
    cos2 = wp.clamp((1.0 - wp.pow(a2, 1.0 - u[1])) / (1.0 - a2), 0.0, 1.0)
    s = wp.sqrt(1.0 - cos2)
    phi = 2.0 * PI * u[0]
    return wp.vec3(s * wp.cos(phi), s * wp.sin(phi), wp.sqrt(cos2))
