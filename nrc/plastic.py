"""The table a rough plastic needs: how much light its coat lets through, and how much it keeps inside."""

from __future__ import annotations

import numpy as np
import warp as wp

from nrc.kernels.bsdf import PLASTIC_TABLE_SIZE
from nrc.kernels.plastic import integrate_interface
from nrc.launch import launch

OUTER_NODES = 32
INNER_NODES = 128  # total internal reflection makes the integrand discontinuous


def plastic_table(ior: float, alpha: tuple[float, float], beckmann: bool, device: wp.Device) -> np.ndarray:
    """Constants of a rough plastic coat, by Gauss-Legendre quadrature over visible normals.

    Args:
        ior: Index of refraction inside over outside.
        alpha: Microfacet widths (roughness²), both positive.
        beckmann: Beckmann instead of GGX.
        device: Where to integrate.

    Returns:
        (1 + PLASTIC_TABLE_SIZE,) float32: the mean reflectance of diffuse light from inside, then the transmittance of
        light from outside at cosines i / (PLASTIC_TABLE_SIZE - 1), the quantities of Mitsuba 3's `roughplastic`.
    """
    cosines = np.maximum(np.linspace(0.0, 1.0, PLASTIC_TABLE_SIZE), 1e-6)
    _, transmittance = _integrate(ior, alpha, beckmann, cosines, OUTER_NODES, device)
    reflectance, _ = _integrate(1.0 / ior, alpha, beckmann, cosines, INNER_NODES, device)
    return np.concatenate([[2.0 * np.mean(reflectance * cosines)], transmittance]).astype(np.float32)


def _integrate(
    ior: float, alpha: tuple[float, float], beckmann: bool, cosines: np.ndarray, n_nodes: int, device: wp.Device
) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance and transmittance at `cosines`."""
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    n = len(cosines)
    reflectance = wp.empty(n, dtype=float, device=device)
    transmittance = wp.empty(n, dtype=float, device=device)
    launch(
        integrate_interface,
        n,
        inputs=[
            ior,
            wp.vec2(*alpha),
            int(beckmann),
            wp.array(cosines, dtype=float, device=device),
            wp.array(0.5 * nodes + 0.5, dtype=float, device=device),
            wp.array(0.5 * weights, dtype=float, device=device),
        ],
        outputs=[reflectance, transmittance],
        device=device,
        range_size=4,
    )
    return reflectance.numpy(), transmittance.numpy()
