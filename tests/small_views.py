"""Photographs of a sphere from all around, in NeRF-synthetic's files: the smallest scene a radiance field can learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

N_VIEWS = 24
SIZE, FOV = 32, 0.9  # of the pictures [px], [rad]
RADIUS, DISTANCE = 1.0, 3.5  # of the sphere, and of the cameras from its centre


def look_at(position: np.ndarray) -> np.ndarray:
    """Camera at `position` that looks at the origin, z up: a 4x4 matrix of columns right, up, backwards."""
    back = position / np.linalg.norm(position)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(back, right), back, position], axis=1)
    return matrix


def sphere_picture(c2w: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE, 4) uint8: a sphere whose colour is its normal, antialiased into alpha by 4 x 4 samples."""
    n = 4 * SIZE
    focal = 0.5 * n / np.tan(0.5 * FOV)
    u, v = np.meshgrid((np.arange(n) + 0.5 - n / 2) / focal, (np.arange(n) + 0.5 - n / 2) / focal)
    d = np.stack([u, -v, -np.ones_like(u)], axis=-1) @ c2w[:3, :3].T
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    o = c2w[:3, 3]
    b = d @ o
    disc = b**2 - (o @ o - RADIUS**2)
    hit = disc > 0.0
    p = o + d * (-b - np.sqrt(np.maximum(disc, 0.0)))[..., None]
    color = np.where(hit[..., None], 0.5 * (p / RADIUS + 1.0), 0.0)
    boxes = np.concatenate([color, hit[..., None]], axis=-1).reshape(SIZE, 4, SIZE, 4, 4).mean(axis=(1, 3))
    boxes[..., :3] /= np.maximum(boxes[..., 3:], 1e-9)
    return (255.0 * boxes + 0.5).astype(np.uint8)


def write_sphere_views(folder: Path) -> Path:
    """Write views of the sphere from all around to train with and two others to test with; returns the folder."""
    height = 1.0 - (2.0 * np.arange(N_VIEWS) + 1.0) / N_VIEWS  # along a spiral
    turn = 2.39996 * np.arange(N_VIEWS)
    side = np.sqrt(1.0 - height**2)
    around = np.stack([side * np.cos(turn), side * np.sin(turn), height], axis=1)
    between = np.array([[1.0, 1.0, 0.6], [-1.0, 0.5, -1.0]])
    for split, directions in (("train", around), ("test", between)):
        frames = []
        for i, direction in enumerate(directions):
            matrix = look_at(DISTANCE * direction / np.linalg.norm(direction))
            Image.fromarray(sphere_picture(matrix)).save(folder / f"{split}_{i}.png")
            frames.append({"file_path": f"./{split}_{i}", "transform_matrix": matrix.tolist()})
        content = {"camera_angle_x": FOV, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(content))
    return folder
