"""Scattering at one surface point: sample, evaluate and factor every material kind.

Conventions. `wo` points towards the viewer, `wi` towards the light; both are unit and point away from the surface, in a
local frame whose z axis is the shading normal. `f` carries no cosine. `pdf` is per solid angle (for a delta lobe: the
probability of picking it). `weight` = f |wi.z| / pdf. Radiance flows from light to viewer, so refraction scales it by
(eta_incident / eta_transmitted)^2, counted from the viewer. `ior` is inside over outside; the normal points outside.

Reflecting kinds scatter only where wo.z > 0 and wi.z > 0 (the caller flips frames of two-sided materials); dielectric
kinds, principled and metallic_roughness with transmission > 0 have two sides. Widths below ALPHA_MIN are perfectly
smooth, except in metallic_roughness and principled, which clamp theirs to 1e-3.

Models: Mitsuba 3's diffuse, (rough)conductor, (rough)dielectric, thindielectric, (rough)plastic and principled;
glTF 2.0 appendix B with KHR_materials_ior, _specular and _transmission. Neither glTF's nor the principled mix of
diffuse and specular conserves energy: a white glTF dielectric of roughness 0.05 returns 1.00 at normal incidence and
1.64 at 86 degrees.
"""

import warp as wp

from nrc.kernels.microfacet import (
    ALPHA_MIN,
    fresnel_conductor,
    fresnel_dielectric,
    fresnel_diffuse_internal,
    gtr1_d,
    gtr1_sample,
    microfacet_d,
    microfacet_g1,
    microfacet_reflection,
    microfacet_sample,
    reflect,
    refract,
    schlick_weight,
    sqr,
)
from nrc.kernels.sampling import INV_PI, luminance, max_component, square_to_cosine_hemisphere

wp.set_module_options({"enable_backward": False})

# Index in nrc.scene.MATERIAL_KINDS.
KIND_DIFFUSE = wp.constant(0)
KIND_CONDUCTOR = wp.constant(1)
KIND_DIELECTRIC = wp.constant(2)
KIND_THIN_DIELECTRIC = wp.constant(3)
KIND_PLASTIC = wp.constant(4)
KIND_METALLIC_ROUGHNESS = wp.constant(5)
KIND_PRINCIPLED = wp.constant(6)

ALPHA_CLAMP = wp.constant(1.0e-3)  # metallic_roughness and principled
PLASTIC_TABLE_SIZE = wp.constant(64)  # entries of the transmittance table, cosines 0 ... 1
SCHLICK_MEAN = wp.constant(1.0 / 21.0)  # cosine-weighted hemisphere mean of (1 - cos)^5
SHEEN_MEAN = wp.constant(0.0116)  # hemispherical mean of the sheen lobe
CLEARCOAT_MEAN = wp.constant(0.04 + 0.96 / 21.0)  # and of the clearcoat's Fresnel term


@wp.struct
class Bsdf:
    """Material at one surface point, textures looked up.

    Fields are those of `nrc.scene.Material`. `alpha` is roughness² along x and y (principled reads x alone).
    `plastic_table` is the device address of a rough plastic's `nrc.plastic.plastic_table`, 0 for other materials.
    """

    kind: int
    base_color: wp.vec3
    specular: wp.vec3
    transmittance: wp.vec3
    alpha: wp.vec2
    beckmann: int
    ior: float
    eta: wp.vec3
    k: wp.vec3
    nonlinear: int
    plastic_table: wp.uint64
    metallic: float
    transmission: float
    specular_factor: float
    spec_tint: float
    anisotropic: float
    sheen: float
    sheen_tint: float
    clearcoat: float
    clearcoat_gloss: float
    flatness: float


@wp.struct
class BsdfSample:
    """Direction drawn by `bsdf_sample`; weight and pdf are 0 where nothing could be drawn.

    `eta` is the index of refraction on wi's side over that on wo's side (1 for reflection).
    """

    wi: wp.vec3
    weight: wp.vec3
    pdf: float
    delta: int
    eta: float


@wp.struct
class Albedo:
    """Approximate reflectances that factor outgoing radiance: never 0 where f can be positive."""

    diffuse: wp.vec3
    specular: wp.vec3


@wp.func
def mean3(c: wp.vec3) -> float:
    """Mean of the components."""
    return (c[0] + c[1] + c[2]) / 3.0


@wp.func
def vec4_of(f: wp.vec3, pdf: float) -> wp.vec4:
    """(f, pdf) packed."""
    return wp.vec4(f[0], f[1], f[2], pdf)


@wp.func
def bsdf_is_smooth(b: Bsdf) -> bool:
    """Microfacet widths stand for a perfectly smooth interface."""
    return wp.max(b.alpha[0], b.alpha[1]) < ALPHA_MIN


@wp.func
def bsdf_alpha(b: Bsdf) -> wp.vec2:
    """Microfacet widths of a rough interface."""
    return wp.vec2(wp.max(b.alpha[0], ALPHA_MIN), wp.max(b.alpha[1], ALPHA_MIN))


@wp.func
def conductor_fresnel(b: Bsdf, c: float) -> wp.vec3:
    """Tinted reflectance of the conductor."""
    return wp.vec3(
        b.specular[0] * fresnel_conductor(c, b.eta[0], b.k[0]),
        b.specular[1] * fresnel_conductor(c, b.eta[1], b.k[1]),
        b.specular[2] * fresnel_conductor(c, b.eta[2], b.k[2]),
    )


# --- interface between two dielectrics -------------------------------------------------------------------------------


@wp.struct
class Interface:
    """Microfacet terms of a direction pair that reflects or refracts; valid == 0: no facet connects them."""

    valid: int
    m: wp.vec3
    o_m: float
    i_m: float
    fresnel: float
    cos_t: float
    value: float  # D G times the reflection or refraction Jacobian; f without Fresnel and radiance scale
    pdf: float  # density of wi given the lobe
    eta: float  # wi's side over wo's, 1 for reflection


@wp.func
def interface_terms(wo: wp.vec3, wi: wp.vec3, ior: float, alpha: wp.vec2, beckmann: int) -> Interface:
    """Eqs. 20, 21, 24, Walter et al. 2007."""
    t = Interface()
    t.valid = 0
    side = wo[2] * wi[2]
    if side == 0.0:
        return t
    t.eta = 1.0
    if side < 0.0:
        t.eta = wp.where(wo[2] > 0.0, ior, 1.0 / ior)
    m = wo + wi * t.eta
    length = wp.length(m)
    if length == 0.0:
        return t
    m = m * (wp.where(m[2] >= 0.0, 1.0, -1.0) / length)
    t.m = m
    t.o_m = wp.dot(wo, m)
    t.i_m = wp.dot(wi, m)
    if t.o_m * wo[2] <= 0.0 or t.i_m * wi[2] <= 0.0:
        return t
    f = fresnel_dielectric(t.o_m, ior)
    t.fresnel = f[0]
    t.cos_t = f[1]
    visible = microfacet_d(m, alpha, beckmann) * microfacet_g1(wo, t.o_m, alpha, beckmann) / wp.abs(wo[2])
    jacobian = 0.25
    if side < 0.0:
        jacobian = wp.abs(t.o_m * t.i_m) * sqr(t.eta / (t.o_m + t.eta * t.i_m))
    t.pdf = visible * jacobian
    t.value = t.pdf * microfacet_g1(wi, t.i_m, alpha, beckmann) / wp.abs(wi[2])
    t.valid = 1
    return t


@wp.func
def dielectric_sample(b: Bsdf, wo: wp.vec3, u: wp.vec3) -> BsdfSample:
    """Facet, then reflection or refraction by Fresnel; smooth interfaces have the macroscopic normal as facet."""
    s = BsdfSample()
    s.eta = 1.0
    if wo[2] == 0.0:
        return s
    smooth = bsdf_is_smooth(b)
    alpha = bsdf_alpha(b)
    side = wp.where(wo[2] > 0.0, 1.0, -1.0)
    m = wp.vec3(0.0, 0.0, 1.0)
    if not smooth:
        m = microfacet_sample(side * wo, alpha, b.beckmann, wp.vec2(u[1], u[2]))
    o_m = wp.dot(wo, m)
    f = fresnel_dielectric(o_m, b.ior)
    jacobian = 1.0
    tint = b.specular
    pick = f[0]
    if u[0] <= f[0]:
        s.wi = reflect(wo, m)
        jacobian = 0.25 / wp.abs(o_m)
    else:
        s.eta = wp.where(o_m >= 0.0, b.ior, 1.0 / b.ior)
        s.wi = refract(wo, m, f[1], s.eta)
        i_m = wp.dot(s.wi, m)
        jacobian = wp.abs(i_m) * sqr(s.eta / (o_m + s.eta * i_m))
        tint = b.transmittance / (s.eta * s.eta)
        pick = 1.0 - f[0]
    if smooth:
        s.delta = 1
        s.pdf = pick
        s.weight = tint
        return s
    d = microfacet_d(m, alpha, b.beckmann) * microfacet_g1(wo, o_m, alpha, b.beckmann) * wp.abs(o_m / wo[2])
    pdf = pick * d * jacobian
    g = microfacet_g1(s.wi, wp.dot(s.wi, m), alpha, b.beckmann)
    # A facet may send light to the wrong side of the surface.
    if g > 0.0 and pdf > 0.0 and wp.isfinite(pdf) and (s.eta == 1.0 or s.wi[2] * wo[2] < 0.0):
        s.pdf = pdf
        s.weight = g * tint
    return s


@wp.func
def dielectric_eval_pdf(b: Bsdf, wo: wp.vec3, wi: wp.vec3) -> wp.vec4:
    """Rough interface; smooth ones have only delta lobes."""
    if bsdf_is_smooth(b):
        return wp.vec4(0.0)
    t = interface_terms(wo, wi, b.ior, bsdf_alpha(b), b.beckmann)
    if t.valid == 0:
        return wp.vec4(0.0)
    if wo[2] * wi[2] > 0.0:
        return vec4_of(b.specular * (t.fresnel * t.value), t.fresnel * t.pdf)
    through = 1.0 - t.fresnel
    return vec4_of(b.transmittance * (through * t.value / (t.eta * t.eta)), through * t.pdf)


@wp.func
def thin_dielectric_sample(b: Bsdf, wo: wp.vec3, u: wp.vec3) -> BsdfSample:
    """Parallel slab, all inner reflections summed: mirror or straight through."""
    s = BsdfSample()
    s.eta = 1.0
    s.delta = 1
    r = fresnel_dielectric(wp.abs(wo[2]), b.ior)[0]
    r = 2.0 * r / (1.0 + r)
    if u[0] <= r:
        s.wi = wp.vec3(-wo[0], -wo[1], wo[2])
        s.weight = b.specular
        s.pdf = r
    else:
        s.wi = -wo
        s.weight = b.transmittance
        s.pdf = 1.0 - r
    return s


# --- plastic: diffuse base under a dielectric coat -------------------------------------------------------------------


@wp.func
def plastic_table(b: Bsdf) -> wp.array[float]:
    """The material's precomputed reflectance and transmittances."""
    return wp.array(ptr=b.plastic_table, shape=(1 + PLASTIC_TABLE_SIZE,), dtype=float)


@wp.func
def plastic_transmittance(b: Bsdf, c: float) -> float:
    """Fraction of light from direction cosine `c` that enters the coat."""
    if bsdf_is_smooth(b):
        return 1.0 - fresnel_dielectric(c, b.ior)[0]
    table = plastic_table(b)
    x = c * float(PLASTIC_TABLE_SIZE - 1)
    i = wp.min(int(x), PLASTIC_TABLE_SIZE - 2)
    return wp.lerp(table[i + 1], table[i + 2], x - float(i))


@wp.func
def plastic_specular_probability(b: Bsdf, transmitted: float) -> float:
    """Probability of sampling the coat, from its reflectance and the mean colours of both layers."""
    s = (1.0 - transmitted) * mean3(b.specular)
    d = transmitted * mean3(b.base_color)
    if s + d <= 0.0:
        return 1.0
    return s / (s + d)


@wp.func
def plastic_eval_pdf(b: Bsdf, wo: wp.vec3, wi: wp.vec3) -> wp.vec4:
    """Rough coat (a smooth one is a delta lobe) plus the diffuse base seen through it."""
    t_o = plastic_transmittance(b, wo[2])
    p = plastic_specular_probability(b, t_o)
    f = wp.vec3(0.0)
    pdf = (1.0 - p) * INV_PI * wi[2]
    inner = 0.0
    if bsdf_is_smooth(b):
        inner = fresnel_diffuse_internal(b.ior)
    else:
        inner = plastic_table(b)[0]
        r = microfacet_reflection(wo, wi, bsdf_alpha(b), b.beckmann)
        f = b.specular * (fresnel_dielectric(r[2], b.ior)[0] * r[0])
        pdf += p * r[1]
    c = b.base_color
    scale = INV_PI * t_o * plastic_transmittance(b, wi[2]) / (b.ior * b.ior)
    if b.nonlinear != 0:
        f += scale * wp.vec3(c[0] / (1.0 - c[0] * inner), c[1] / (1.0 - c[1] * inner), c[2] / (1.0 - c[2] * inner))
    else:
        f += (scale / (1.0 - inner)) * c
    return vec4_of(f, pdf)


# --- metallic_roughness: glTF 2.0 appendix B -------------------------------------------------------------------------


@wp.func
def clamped_alpha(b: Bsdf) -> wp.vec2:
    """Widths of metallic_roughness, which has no delta lobes."""
    return wp.vec2(wp.max(b.alpha[0], ALPHA_CLAMP), wp.max(b.alpha[1], ALPHA_CLAMP))


@wp.func
def metallic_roughness_f0(b: Bsdf) -> wp.vec3:
    """Dielectric reflectance at normal incidence before specular_factor (KHR_materials_ior, _specular)."""
    r = sqr((b.ior - 1.0) / (b.ior + 1.0))
    return wp.vec3(wp.min(r * b.specular[0], 1.0), wp.min(r * b.specular[1], 1.0), wp.min(r * b.specular[2], 1.0))


@wp.func
def metallic_roughness_fresnel(b: Bsdf, weight: float) -> wp.vec4:
    """Reflectance of metal and dielectric mixed, and the non-metal fraction that enters; `weight` is Schlick's."""
    f0 = metallic_roughness_f0(b)
    dielectric = b.specular_factor * (f0 * (1.0 - weight) + wp.vec3(weight))
    metal = b.base_color * (1.0 - weight) + wp.vec3(weight)
    f = b.metallic * metal + (1.0 - b.metallic) * dielectric
    return vec4_of(f, (1.0 - b.metallic) * (1.0 - max_component(dielectric)))


@wp.func
def metallic_roughness_lobes(b: Bsdf, cos_o: float) -> wp.vec3:
    """Probabilities of reflection, diffuse and transmission, from their albedos at the viewing angle."""
    f = metallic_roughness_fresnel(b, schlick_weight(cos_o))
    specular = f[0] + f[1] + f[2]
    under = f[3] * (b.base_color[0] + b.base_color[1] + b.base_color[2])
    total = specular + under
    if total <= 0.0:
        return wp.vec3(1.0, 0.0, 0.0)
    return wp.vec3(specular, under * (1.0 - b.transmission), under * b.transmission) / total


@wp.func
def metallic_roughness_eval_pdf(b: Bsdf, wo: wp.vec3, wi: wp.vec3) -> wp.vec4:
    """Both directions already on wo's side up; wi.z < 0 is the thin-walled transmission lobe, mirrored."""
    p = metallic_roughness_lobes(b, wo[2])
    r = microfacet_reflection(wo, wp.vec3(wi[0], wi[1], wp.abs(wi[2])), clamped_alpha(b), 0)
    f = metallic_roughness_fresnel(b, schlick_weight(r[2]))
    if wi[2] < 0.0:
        return vec4_of(b.base_color * (f[3] * b.transmission * r[0]), p[2] * r[1])
    value = wp.vec3(f[0], f[1], f[2]) * r[0] + b.base_color * (f[3] * (1.0 - b.transmission) * INV_PI)
    return vec4_of(value, p[0] * r[1] + p[1] * INV_PI * wi[2])


@wp.func
def metallic_roughness_sample_wi(b: Bsdf, wo: wp.vec3, u: wp.vec3) -> wp.vec3:
    """Direction from the mixture of lobes."""
    p = metallic_roughness_lobes(b, wo[2])
    if u[0] < p[1]:
        return square_to_cosine_hemisphere(wp.vec2(u[1], u[2]))
    wi = reflect(wo, microfacet_sample(wo, clamped_alpha(b), 0, wp.vec2(u[1], u[2])))
    if wi[2] <= 0.0:
        return wp.vec3(0.0)
    if u[0] < p[1] + p[2]:
        wi = wp.vec3(wi[0], wi[1], -wi[2])
    return wi


# --- principled: Burley 2012, 2015 as in Mitsuba 3 -------------------------------------------------------------------


@wp.func
def principled_alpha(b: Bsdf) -> wp.vec2:
    """Widths from roughness and anisotropy (Burley 2012)."""
    aspect = wp.sqrt(1.0 - 0.9 * b.anisotropic)
    return wp.vec2(wp.max(ALPHA_CLAMP, b.alpha[0] / aspect), wp.max(ALPHA_CLAMP, b.alpha[0] * aspect))


@wp.func
def principled_tint(c: wp.vec3) -> wp.vec3:
    """Hue and saturation of `c` at unit luminance."""
    y = luminance(c)
    if y > 0.0:
        return c / y
    return wp.vec3(1.0)


@wp.func
def principled_reflectance(b: Bsdf, dielectric: float, weight: float) -> wp.vec3:
    """Front-side Fresnel blend from the true dielectric reflectance and Schlick's `weight`."""
    metal = b.base_color * (1.0 - weight) + wp.vec3(weight)
    f = b.metallic * metal + wp.vec3((1.0 - b.metallic) * (1.0 - b.spec_tint) * dielectric)
    if b.spec_tint > 0.0:
        f0 = sqr((b.ior - 1.0) / (b.ior + 1.0)) * principled_tint(b.base_color)
        f += ((1.0 - b.metallic) * b.spec_tint) * (f0 * (1.0 - weight) + wp.vec3(weight))
    return f


@wp.func
def principled_diffuse(b: Bsdf, cos_o: float, cos_i: float, cos_d: float, brdf: float) -> wp.vec3:
    """Diffuse, retro-reflection, flattened subsurface and sheen of the front side."""
    f_i = schlick_weight(cos_i)
    f_o = schlick_weight(cos_o)
    rr = 2.0 * wp.sqrt(b.alpha[0]) * cos_d * cos_d
    diffuse = (1.0 - 0.5 * f_i) * (1.0 - 0.5 * f_o) + rr * (f_o + f_i + f_o * f_i * (rr - 1.0))
    if b.flatness > 0.0:
        ss = wp.lerp(1.0, 0.5 * rr, f_o) * wp.lerp(1.0, 0.5 * rr, f_i)
        diffuse = wp.lerp(diffuse, 1.25 * (ss * (1.0 / (cos_o + cos_i) - 0.5) + 0.5), b.flatness)
    f = b.base_color * (brdf * INV_PI * diffuse)
    if b.sheen > 0.0:
        tint = wp.lerp(wp.vec3(1.0), principled_tint(b.base_color), b.sheen_tint)
        f += (b.sheen * (1.0 - b.metallic) * schlick_weight(wp.abs(cos_d))) * tint
    return f


@wp.func
def principled_eval_pdf(b: Bsdf, wo: wp.vec3, wi: wp.vec3) -> wp.vec4:
    """All lobes."""
    brdf = (1.0 - b.metallic) * (1.0 - b.transmission)
    bsdf = (1.0 - b.metallic) * b.transmission
    front = wo[2] > 0.0
    reflects = wo[2] * wi[2] > 0.0
    if bsdf <= 0.0 and not (front and reflects):
        return wp.vec4(0.0)
    t = interface_terms(wo, wi, b.ior, principled_alpha(b), 0)
    through = 1.0 - t.fresnel
    if not front:
        if t.valid == 0:
            return wp.vec4(0.0)
        if reflects:
            return vec4_of(wp.vec3(bsdf * t.fresnel * t.value), t.fresnel * t.pdf)
        value = bsdf * through * t.value / (t.eta * t.eta)
        return vec4_of(principled_transmission_color(b) * value, through * t.pdf)
    total = 1.0 + 0.25 * b.clearcoat + brdf
    if not reflects:
        if t.valid == 0:
            return wp.vec4(0.0)
        value = bsdf * through * t.value / (t.eta * t.eta)
        return vec4_of(principled_transmission_color(b) * value, bsdf * through * t.pdf / total)
    f = wp.vec3(0.0)
    pdf = brdf * INV_PI * wi[2]
    if t.valid != 0:
        weight = schlick_weight(wp.where(b.ior > 1.0, t.o_m, wp.abs(t.cos_t)))
        f = principled_reflectance(b, t.fresnel, weight) * t.value
        pdf += (1.0 - bsdf * through) * t.pdf
        if b.clearcoat > 0.0:
            d = gtr1_d(t.m[2], wp.lerp(0.1, 0.001, b.clearcoat_gloss))
            a = wp.vec2(0.25, 0.25)
            g = microfacet_g1(wo, t.o_m, a, 0) * microfacet_g1(wi, t.i_m, a, 0)
            f += wp.vec3(0.25 * b.clearcoat * wp.lerp(0.04, 1.0, weight) * d * g)
            pdf += 0.25 * b.clearcoat * d * t.m[2] * 0.25 / t.i_m
    if brdf > 0.0:
        f += principled_diffuse(b, wo[2], wi[2], t.i_m, brdf)
    return vec4_of(f, pdf / total)


@wp.func
def principled_transmission_color(b: Bsdf) -> wp.vec3:
    """Tint of one crossing: two of them give base_color."""
    c = b.base_color
    return wp.vec3(wp.sqrt(c[0]), wp.sqrt(c[1]), wp.sqrt(c[2]))


@wp.func
def principled_sample_wi(b: Bsdf, wo: wp.vec3, u: wp.vec3) -> wp.vec3:
    """Direction from the mixture of diffuse, clearcoat, transmission and reflection; 0 where a lobe misses."""
    brdf = (1.0 - b.metallic) * (1.0 - b.transmission)
    bsdf = (1.0 - b.metallic) * b.transmission
    v = wp.vec2(u[1], u[2])
    x = u[0]
    side = -1.0
    if wo[2] > 0.0:
        side = 1.0
        # Split off the lobes whose probability does not depend on the facet.
        x = x * (1.0 + 0.25 * b.clearcoat + brdf)
        if x < brdf:
            return square_to_cosine_hemisphere(v)
        x = x - brdf
        if x < 0.25 * b.clearcoat:
            return principled_side(wo, reflect(wo, gtr1_sample(wp.lerp(0.1, 0.001, b.clearcoat_gloss), v)), 1.0)
        x = x - 0.25 * b.clearcoat
    elif bsdf <= 0.0:
        return wp.vec3(0.0)
    m = microfacet_sample(side * wo, principled_alpha(b), 0, v)
    o_m = wp.dot(wo, m)
    f = fresnel_dielectric(o_m, b.ior)
    if x < wp.where(side > 0.0, bsdf, 1.0) * (1.0 - f[0]):
        return principled_side(wo, refract(wo, m, f[1], wp.where(o_m >= 0.0, b.ior, 1.0 / b.ior)), -1.0)
    return principled_side(wo, reflect(wo, m), 1.0)


@wp.func
def principled_side(wo: wp.vec3, wi: wp.vec3, side: float) -> wp.vec3:
    """`wi` if it lies on wo's side (side > 0) or the other one, else 0."""
    if wo[2] * wi[2] * side > 0.0:
        return wi
    return wp.vec3(0.0)


# --- every kind ------------------------------------------------------------------------------------------------------


@wp.func
def bsdf_has_smooth_lobe(b: Bsdf) -> bool:
    """Whether `bsdf_eval_pdf` can be positive: worth a light sample and a cache record."""
    if b.kind == KIND_THIN_DIELECTRIC:
        return False
    if b.kind == KIND_CONDUCTOR or b.kind == KIND_DIELECTRIC:
        return not bsdf_is_smooth(b)
    return True


@wp.func
def bsdf_transmits(b: Bsdf) -> bool:
    """Whether light from behind the surface, seen from the viewer, can reach him by a lobe that is not a delta lobe."""
    if b.kind == KIND_METALLIC_ROUGHNESS or b.kind == KIND_PRINCIPLED:
        return b.transmission > 0.0
    return b.kind == KIND_DIELECTRIC


@wp.func
def bsdf_roughness(b: Bsdf) -> float:
    """Perceptual roughness in [0, 1]; 1 for diffuse."""
    if b.kind == KIND_DIFFUSE:
        return 1.0
    if b.kind == KIND_THIN_DIELECTRIC:
        return 0.0
    return wp.min(wp.sqrt(wp.sqrt(b.alpha[0] * b.alpha[1])), 1.0)


@wp.func
def bsdf_albedo(b: Bsdf, wo: wp.vec3) -> Albedo:
    """Diffuse albedo and specular reflectance (with transmission), independent of wo but for its interface."""
    a = Albedo()
    if b.kind == KIND_DIFFUSE:
        a.diffuse = b.base_color
        return a
    if b.kind == KIND_CONDUCTOR:
        a.specular = conductor_fresnel(b, 1.0)
        return a
    f0 = sqr((b.ior - 1.0) / (b.ior + 1.0))
    f = f0 + (1.0 - f0) * SCHLICK_MEAN
    if b.kind == KIND_DIELECTRIC or b.kind == KIND_THIN_DIELECTRIC:
        a.specular = f * b.specular + (1.0 - f) * b.transmittance
    elif b.kind == KIND_PLASTIC:
        a.diffuse = b.base_color
        a.specular = f * b.specular
    elif b.kind == KIND_METALLIC_ROUGHNESS:
        r = metallic_roughness_fresnel(b, SCHLICK_MEAN)
        a.diffuse = b.base_color * ((1.0 - b.metallic) * (1.0 - b.transmission))
        a.specular = wp.vec3(r[0], r[1], r[2]) + b.base_color * ((1.0 - b.metallic) * b.transmission)
    else:
        dielectric = 1.0 - b.metallic
        a.diffuse = b.base_color * (dielectric * (1.0 - b.transmission))
        if b.sheen > 0.0:
            tint = wp.lerp(wp.vec3(1.0), principled_tint(b.base_color), b.sheen_tint)
            a.diffuse += (b.sheen * dielectric * SHEEN_MEAN) * tint
        a.specular = principled_reflectance(b, f, SCHLICK_MEAN) + wp.vec3(0.25 * b.clearcoat * CLEARCOAT_MEAN)
        a.specular += principled_transmission_color(b) * (dielectric * b.transmission)
    return a


@wp.func
def bsdf_eval_pdf(b: Bsdf, wo: wp.vec3, wi: wp.vec3) -> wp.vec4:
    """f (rgb, without cosine) and the density with which `bsdf_sample` draws `wi`; delta lobes contribute nothing."""
    if b.kind == KIND_DIELECTRIC:
        return dielectric_eval_pdf(b, wo, wi)
    if b.kind == KIND_THIN_DIELECTRIC:
        return wp.vec4(0.0)
    if b.kind == KIND_PRINCIPLED:
        return principled_eval_pdf(b, wo, wi)
    side = 1.0
    if b.kind == KIND_METALLIC_ROUGHNESS and b.transmission > 0.0:
        # Thin wall: both sides alike.
        side = wp.where(wo[2] < 0.0, -1.0, 1.0)
        if wo[2] * wi[2] == 0.0:
            return wp.vec4(0.0)
        return metallic_roughness_eval_pdf(b, wo * side, wi * side)
    if wo[2] <= 0.0 or wi[2] <= 0.0:
        return wp.vec4(0.0)
    if b.kind == KIND_DIFFUSE:
        return vec4_of(b.base_color * INV_PI, INV_PI * wi[2])
    if b.kind == KIND_CONDUCTOR:
        if bsdf_is_smooth(b):
            return wp.vec4(0.0)
        r = microfacet_reflection(wo, wi, bsdf_alpha(b), b.beckmann)
        return vec4_of(conductor_fresnel(b, r[2]) * r[0], r[1])
    if b.kind == KIND_PLASTIC:
        return plastic_eval_pdf(b, wo, wi)
    return metallic_roughness_eval_pdf(b, wo, wi)


@wp.func
def bsdf_sample(b: Bsdf, wo: wp.vec3, u: wp.vec3) -> BsdfSample:
    """Draw `wi`: u[0] picks the lobe, (u[1], u[2]) the direction."""
    if b.kind == KIND_DIELECTRIC:
        return dielectric_sample(b, wo, u)
    if b.kind == KIND_THIN_DIELECTRIC:
        return thin_dielectric_sample(b, wo, u)
    s = BsdfSample()
    s.eta = 1.0
    v = wp.vec2(u[1], u[2])
    side = 1.0
    if wo[2] <= 0.0:
        if b.kind != KIND_PRINCIPLED and not (b.kind == KIND_METALLIC_ROUGHNESS and b.transmission > 0.0):
            return s
        if b.kind == KIND_METALLIC_ROUGHNESS:
            side = -1.0
        if wo[2] == 0.0:
            return s
    if b.kind == KIND_DIFFUSE:
        s.wi = square_to_cosine_hemisphere(v)
        s.pdf = INV_PI * s.wi[2]
        if s.pdf > 0.0:
            s.weight = b.base_color
        return s
    if b.kind == KIND_CONDUCTOR:
        m = wp.vec3(0.0, 0.0, 1.0)
        if bsdf_is_smooth(b):
            s.wi = reflect(wo, m)
            s.delta = 1
            s.pdf = 1.0
            s.weight = conductor_fresnel(b, wo[2])
            return s
        alpha = bsdf_alpha(b)
        m = microfacet_sample(wo, alpha, b.beckmann, v)
        o_m = wp.dot(wo, m)
        s.wi = reflect(wo, m)
        if s.wi[2] > 0.0 and o_m > 0.0:
            d = microfacet_d(m, alpha, b.beckmann) * microfacet_g1(wo, o_m, alpha, b.beckmann)
            s.pdf = d / (4.0 * wo[2])
            if s.pdf > 0.0:
                s.weight = conductor_fresnel(b, o_m) * microfacet_g1(s.wi, o_m, alpha, b.beckmann)
        return s
    if b.kind == KIND_PLASTIC:
        p = plastic_specular_probability(b, plastic_transmittance(b, wo[2]))
        if u[0] < p:
            if bsdf_is_smooth(b):
                s.wi = wp.vec3(-wo[0], -wo[1], wo[2])
                s.delta = 1
                s.pdf = p
                s.weight = b.specular * (fresnel_dielectric(wo[2], b.ior)[0] / p)
                return s
            s.wi = reflect(wo, microfacet_sample(wo, bsdf_alpha(b), b.beckmann, v))
        else:
            s.wi = square_to_cosine_hemisphere(v)
    elif b.kind == KIND_METALLIC_ROUGHNESS:
        s.wi = metallic_roughness_sample_wi(b, wo * side, u) * side
    else:
        s.wi = principled_sample_wi(b, wo, u)
        if s.wi[2] * wo[2] < 0.0:
            s.eta = wp.where(wo[2] > 0.0, b.ior, 1.0 / b.ior)
    e = bsdf_eval_pdf(b, wo, s.wi)
    if e[3] > 0.0 and wp.isfinite(e[3]):
        s.pdf = e[3]
        s.weight = wp.vec3(e[0], e[1], e[2]) * (wp.abs(s.wi[2]) / e[3])
    return s
