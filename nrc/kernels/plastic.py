"""Directional-hemispherical reflectance and transmittance of a rough dielectric interface (for rough plastic)."""

import warp as wp

from nrc.kernels.microfacet import fresnel_dielectric, microfacet_g1, microfacet_sample, reflect, refract

wp.set_module_options({"enable_backward": False})


@wp.kernel
def integrate_interface(
    first: int,
    # Params
    ior: float,
    alpha: wp.vec2,
    beckmann: int,
    # In
    cosines: wp.array[float],  # (n,) of the arriving direction
    nodes: wp.array[float],  # (m,) quadrature nodes in [0, 1]
    weights: wp.array[float],  # (m,) summing to 1
    # Out
    out_reflectance: wp.array[float],  # (n,)
    out_transmittance: wp.array[float],  # (n,)
):
    """Integrate Fresnel times masking over the visible normals, m × m nodes. One thread per direction."""
    i = first + wp.tid()
    z = cosines[i]
    wo = wp.vec3(wp.sqrt(1.0 - z * z), 0.0, z)
    reflected = float(0.0)
    transmitted = float(0.0)
    for j in range(nodes.shape[0]):
        row_reflected = float(0.0)
        row_transmitted = float(0.0)
        for k in range(nodes.shape[0]):
            m = microfacet_sample(wo, alpha, beckmann, wp.vec2(nodes[k], nodes[j]))
            o_m = wp.dot(wo, m)
            f = fresnel_dielectric(o_m, ior)
            wi = reflect(wo, m)
            if wi[2] > 0.0:
                row_reflected += weights[k] * f[0] * microfacet_g1(wi, o_m, alpha, beckmann)
            wi = refract(wo, m, f[1], ior)
            if wi[2] < 0.0:
                row_transmitted += weights[k] * (1.0 - f[0]) * microfacet_g1(wi, wp.dot(wi, m), alpha, beckmann)
        reflected += weights[j] * row_reflected
        transmitted += weights[j] * row_transmitted
    out_reflectance[i] = reflected
    out_transmittance[i] = transmitted
