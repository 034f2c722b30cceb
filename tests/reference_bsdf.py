"""NumPy twin of the metallic_roughness material, written from glTF 2.0 appendix B, not from the kernels.

With KHR_materials_ior, KHR_materials_specular and KHR_materials_transmission (thin wall, blurred by the
microfacets, no refraction).
"""

import numpy as np


def ggx_d(n_dot_h: np.ndarray, alpha: float) -> np.ndarray:
    """Appendix B.3.2, distribution term D."""
    a2 = alpha * alpha
    return a2 / (np.pi * (n_dot_h**2 * (a2 - 1.0) + 1.0) ** 2)


def ggx_v(n_dot_l: np.ndarray, n_dot_v: np.ndarray, alpha: float) -> np.ndarray:
    """Appendix B.3.2, visibility term G / (4 n.l n.v)."""

    def one(c: np.ndarray) -> np.ndarray:
        return 1.0 / (c + np.sqrt(alpha**2 + (1.0 - alpha**2) * c**2))

    return one(n_dot_l) * one(n_dot_v)


def metallic_roughness_f(
    wo: np.ndarray,
    wi: np.ndarray,
    base_color: np.ndarray,
    metallic: float,
    roughness: float,
    ior: float = 1.5,
    specular_factor: float = 1.0,
    specular: np.ndarray | tuple[float, ...] = (1.0, 1.0, 1.0),
    transmission: float = 0.0,
) -> np.ndarray:
    """f without cosine, (n, 3), for (n, 3) directions in the local frame; zero for wo below an opaque surface."""
    base, specular = np.asarray(base_color, float), np.asarray(specular, float)
    alpha = roughness**2
    n_dot_v, n_dot_l = wo[:, 2].copy(), wi[:, 2].copy()
    same_side = n_dot_v * n_dot_l > 0.0
    lit = same_side | (transmission > 0.0)
    if transmission == 0.0:
        lit &= n_dot_v > 0.0
    # Half vector of the reflection, or of the light mirrored to the viewer's side.
    v, light = wo.copy(), wi.copy()
    v[:, 2], light[:, 2] = np.abs(n_dot_v), np.abs(n_dot_l)
    h = v + light
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    v_dot_h = np.sum(v * h, axis=1)
    specular_brdf = ggx_v(light[:, 2], v[:, 2], alpha) * ggx_d(h[:, 2], alpha)
    schlick = ((1.0 - np.abs(v_dot_h)) ** 5)[:, None]
    f0 = np.minimum(((1.0 - ior) / (1.0 + ior)) ** 2 * specular, 1.0)
    fresnel = f0 + (1.0 - f0) * schlick
    metal = specular_brdf[:, None] * (base + (1.0 - base) * schlick)
    through = 1.0 - specular_factor * fresnel.max(axis=1, keepdims=True)
    diffuse = through * base / np.pi
    btdf = through * base * specular_brdf[:, None]
    dielectric = specular_factor * fresnel * specular_brdf[:, None] + (1.0 - transmission) * diffuse
    reflected = (1.0 - metallic) * dielectric + metallic * metal
    transmitted = (1.0 - metallic) * transmission * btdf
    return np.where(lit[:, None], np.where(same_side[:, None], reflected, transmitted), 0.0)
