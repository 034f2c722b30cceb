"""Radiance fields in double precision: compositing along one ray with its gradients, and marching without shortcuts."""

from __future__ import annotations

import numpy as np

GRID_SIZE = 128
MIN_TRANSMITTANCE = 1e-4


def transmittances(log_density: np.ndarray, dt: np.ndarray) -> np.ndarray:
    """Transmittance before each sample and behind the last, (n + 1,). Max 1995."""
    thickness = np.exp(log_density.astype(np.float64)) * dt
    return np.exp(-np.concatenate([[0.0], np.cumsum(thickness)]))


def composite(
    log_density: np.ndarray, dt: np.ndarray, color: np.ndarray, background: np.ndarray, gain: np.ndarray | float = 1.0
) -> np.ndarray:
    """Colour of a ray, (3,): the background shows where it was not stopped."""
    t = transmittances(log_density, dt)
    total = gain * ((t[:-1] - t[1:]) @ color.astype(np.float64))
    return total + (t[-1] * background if t[-1] >= MIN_TRANSMITTANCE else 0.0)


def composite_backward(
    log_density: np.ndarray,
    dt: np.ndarray,
    color: np.ndarray,
    background: np.ndarray,
    dL_dtotal: np.ndarray,
    gain: np.ndarray | float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients by log densities (n,), colours (n, 3) and logarithm of the gain (3,), term by term of the sums.

    The colour is sum_i (T_i - T_{i+1}) c_i + T_n b with T_i = exp(-sum_{j<i} thickness_j), so thickness_j scales every
    T_i with i > j by -1.
    """
    t = transmittances(log_density, dt)
    seen = t[-1] >= MIN_TRANSMITTANCE
    thickness = np.exp(log_density.astype(np.float64)) * dt
    n = len(dt)
    dL_dcolor = (t[:-1] - t[1:])[:, None] * (gain * dL_dtotal)
    dL_dlog_density = np.zeros(n)
    for j in range(n):
        dT = np.where(np.arange(n + 1) > j, -t, 0.0)
        dtotal = gain * ((dT[:-1] - dT[1:]) @ color.astype(np.float64)) + (dT[-1] * background if seen else 0.0)
        dL_dlog_density[j] = thickness[j] * (dtotal @ dL_dtotal)
    light = (t[:-1] - t[1:]) @ color.astype(np.float64)
    return dL_dlog_density, dL_dcolor, gain * light * dL_dtotal


def morton(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Place in Morton order, bit by bit."""
    code = np.zeros_like(x)
    for bit in range(10):
        for axis, value in enumerate((x, y, z)):
            code |= ((value >> bit) & 1) << (3 * bit + axis)
    return code


def cells_of(p: np.ndarray, dt: np.ndarray, n_cascades: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell (index over all cascades in Morton order) of points (n, 3) and their distance to its faces in cells."""
    extent = np.abs(p - 0.5).max(axis=1)
    cascade = np.zeros(len(p), int)
    for _ in range(n_cascades - 1):
        half, cell = 0.5 * 2.0**cascade, 2.0**cascade / GRID_SIZE
        cascade += (cascade < n_cascades - 1) & ((extent >= half) | (cell < dt))
    q = ((p - 0.5) / 2.0 ** cascade[:, None] + 0.5) * GRID_SIZE
    x, y, z = np.clip(q.astype(int), 0, GRID_SIZE - 1).T
    margin = np.minimum(q - np.floor(q), np.ceil(q) - q).min(axis=1)
    return cascade * GRID_SIZE**3 + morton(x, y, z), margin


def is_occupied(bits: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Bits of cells."""
    return ((bits[cell // 64] >> (cell % 64).astype(np.uint64)) & np.uint64(1)).astype(bool)
