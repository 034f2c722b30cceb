"""What instances and moving geometry cost: memory, milliseconds of an update, and of the rays that follow.

    python benchmarks/moving_geometry.py --json

A ball of about 100,000 triangles stands 1, 10 and 1,000 times on a floor: device memory, the first upload, and the
update where every instance moves. Ten of them are traced as instances and as one flattened mesh. Then the ball's
vertices swell and twist: refit against a new upload, and the rays through the refitted hierarchy against those through
a new one.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import warp as wp

from nrc.assets import shapes
from nrc.assets.model import flatten
from nrc.device_scene import DeviceScene
from nrc.launch import resolve_device
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Camera, Environment, Instance, Material, Mesh, Scene

RINGS = 224  # of the ball: 2 x 224 x 224 triangles
SIZE = 256, 144  # of traced frames [px]
FRAMES = 8


def ball() -> Mesh:
    """A ball in its own space, which stands on y = 0."""
    made = shapes.sphere(RINGS, RINGS)
    positions = (made.positions + np.array([0.0, 1.0, 0.0])).astype(np.float32)
    return Mesh(positions, made.indices, 1, normals=made.normals, name="ball")


def crowd(n: int, mesh: Mesh, time: float = 0.0) -> Scene:
    """`n` instances of a mesh on a square grid, each turned by `time`, under a white sky."""
    side = int(np.ceil(np.sqrt(n)))
    plane = shapes.rectangle()
    half = 1.5 * side
    corners = plane.positions[:, [0, 2, 1]] * np.array([half, 0.0, -half])
    floor = Mesh(corners.astype(np.float32), plane.indices, 0, name="floor")
    instances = []
    for i in range(n):
        angle, matrix = time + i, np.eye(4)
        matrix[:3, :3] = [
            [np.cos(angle), 0.0, np.sin(angle)],
            [0.0, 1.0, 0.0],
            [-np.sin(angle), 0.0, np.cos(angle)],
        ]
        matrix[[0, 2], 3] = 2.5 * (i % side - (side - 1) / 2.0), 2.5 * (i // side - (side - 1) / 2.0)
        instances.append(Instance(1, matrix))
    materials = Material(base_color=(0.6, 0.6, 0.6), two_sided=True), Material(base_color=(0.7, 0.4, 0.3))
    camera = Camera.look_at((0.0, 1.2 * half, 1.8 * half), (0.0, 0.0, 0.0), fov=45.0)
    sky = Environment.constant((1.0, 1.0, 1.0))
    return Scene((floor, mesh), materials, camera, environment=sky, instances=tuple(instances))


def bent(mesh: Mesh, time: float) -> Mesh:
    """The mesh twisted about the vertical axis and swollen, which keeps its triangles."""
    p = mesh.positions.astype(float)
    angle = np.sin(time) * p[:, 1]
    wide = 1.0 + 0.2 * np.sin(3.0 * p[:, 1] + time)
    x = wide * (np.cos(angle) * p[:, 0] + np.sin(angle) * p[:, 2])
    z = wide * (np.cos(angle) * p[:, 2] - np.sin(angle) * p[:, 0])
    return replace(mesh, positions=np.column_stack([x, p[:, 1], z]).astype(np.float32))


def timed(action: Any) -> tuple[Any, float]:
    """What an action returns, and the milliseconds it took."""
    start = time.perf_counter()
    result = action()
    wp.synchronize()
    return result, 1e3 * (time.perf_counter() - start)


def frame_ms(*scenes: DeviceScene) -> list[float]:
    """Median milliseconds of a path-traced frame of each scene, taken in turn."""
    config = PathTracerConfig(integrator="path", max_depth=4)
    renderers = [Renderer(scene, *SIZE, config) for scene in scenes]
    renderers[0].prepare()
    rows = [[timed(renderer.frame)[1] for renderer in renderers] for _ in range(FRAMES + 1)]
    return [float(x) for x in np.median(rows[1:], axis=0)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    mesh = ball()
    DeviceScene(crowd(1, shapes_warm_up()), device)  # compiles
    instances = []
    for n in (1, 10, 1000):
        uploaded, first = timed(lambda n=n: DeviceScene(crowd(n, mesh), device))
        n_bytes, updates = uploaded.memory_bytes(), []
        for i in range(5):
            host = crowd(n, mesh, 0.1 * (i + 1))
            moved = replace(uploaded.scene, instances=host.instances)
            uploaded, update = timed(lambda s=uploaded, m=moved: s.replaced(m))
            updates.append(update)
        instances.append(
            {"instances": n, "MiB": n_bytes / 2**20, "upload_ms": first, "update_ms": float(np.median(updates))}
        )
    two_level = crowd(10, mesh)
    uploaded = DeviceScene(two_level, device)
    flat = DeviceScene(flatten(two_level), device)
    frames = frame_ms(uploaded, flat)

    refits, uploads = [], []
    for i in range(5):
        host = replace(two_level, meshes=(two_level.meshes[0], bent(mesh, 0.3 * (i + 1))))
        uploaded, refit = timed(lambda s=uploaded, h=host: s.replaced(h))
        fresh, upload = timed(lambda h=host: DeviceScene(h, device))
        refits.append(refit)
        uploads.append(upload)
    after = frame_ms(uploaded, fresh)
    result = {
        "device": str(device),
        "triangles": len(mesh.indices),
        "instances": instances,
        "frame_ms": {"instances": frames[0], "flattened": frames[1]},
        "flattened_MiB": flat.memory_bytes() / 2**20,
        "deformed": {"update_ms": float(np.median(refits)), "new_upload_ms": float(np.median(uploads))},
        "frame_ms_after": {"refitted": after[0], "new": after[1]},
    }
    print(json.dumps(result, indent=None if arguments.json else 1))


def shapes_warm_up() -> Mesh:
    """A small ball."""
    made = shapes.sphere(8, 8)
    return Mesh(made.positions, made.indices, 1, normals=made.normals)


if __name__ == "__main__":
    main()
