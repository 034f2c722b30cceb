"""Photographs for a radiance field from a scene of your own: views around a point, rendered with the radiance cache.

    python examples/photograph_scene.py textured_court court_views --views 40
    nrc fit nerf court_views

Writes numbered PNG files and `transforms.json` with their cameras, in instant-ngp's format.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

import nrc
from nrc.image import write_image

GOLDEN = 0.618033988749895


def cameras_around(camera: nrc.Camera, distance: float, n: int, spread: float) -> list[nrc.Camera]:
    """`n` cameras within `spread` degrees of `camera`, all looking at the point `distance` ahead of it."""
    right, up, back, eye = camera.to_world[:3].T
    target = eye - distance * back
    cameras = []
    for i in range(n):
        across = math.radians(spread) * (2.0 * (i + 0.5) / n - 1.0)
        along = 0.4 * math.radians(spread) * (2.0 * ((i * GOLDEN) % 1.0) - 1.0)
        direction = math.cos(across) * math.cos(along) * back + math.sin(across) * right + math.sin(along) * up
        origin = target + distance * direction / np.linalg.norm(direction)
        cameras.append(nrc.Camera.look_at(tuple(origin), tuple(target), tuple(up), fov=camera.fov))
    return cameras


def write_transforms(folder: Path, cameras: list[nrc.Camera], distance: float) -> None:
    """Write the cameras of `0000.png`, `0001.png`, ...; what they look at is the middle of the unit cube."""
    _, _, back, eye = cameras[0].to_world[:3].T
    scale = 0.5 / distance
    about = {
        "camera_angle_x": math.radians(cameras[0].fov),
        "aabb_scale": 4,
        "scale": scale,
        "offset": (0.5 - scale * (eye - distance * back)).tolist(),
        "frames": [
            {"file_path": f"{i:04d}.png", "transform_matrix": camera.to_world.tolist()}
            for i, camera in enumerate(cameras)
        ],
    }
    (folder / "transforms.json").write_text(json.dumps(about, indent=1))


def main() -> None:
    """Photograph a scene."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scene", help="built-in name or file with a camera whose field of view is horizontal")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--views", type=int, default=40)
    parser.add_argument("--distance", type=float, default=5.0, help="from the scene's camera to what all look at")
    parser.add_argument("--spread", type=float, default=35.0, help="of the cameras [deg]")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--height", type=int, default=200)
    parser.add_argument("--spp", type=int, default=64)
    args = parser.parse_args()
    scene = nrc.load(args.scene)
    args.folder.mkdir(parents=True, exist_ok=True)
    cameras = cameras_around(scene.camera, args.distance, args.views, args.spread)
    for i, camera in enumerate(cameras):
        renderer = nrc.Renderer(replace(scene, camera=camera), args.width, args.height)
        renderer.prepare()
        for _ in range(args.spp):
            renderer.frame()
        write_image(args.folder / f"{i:04d}.png", renderer.image())
        print(f"view {i + 1} of {len(cameras)}")
    write_transforms(args.folder, cameras, args.distance)


if __name__ == "__main__":
    main()
