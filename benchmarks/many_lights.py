"""What choosing among many lights costs, and how good the choice is.

    python benchmarks/many_lights.py --triangles 10 1000 100000 --json

A closed room is lit by that many emissive triangles of equal radiance and the same total area: small squares at random
places and angles. For each number: the nanoseconds of one light sample (with the choice, the point and its density),
the milliseconds of a frame of direct light, its relMSE after equal samples per pixel against many more of them, what of
that is the reference's own, and the milliseconds that a change of emission and a change of place cost before the next
frame. Direct light is the picture of two edges less that of one, from the same film samples, so that lamps which the
camera sees do not count.
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
from nrc.assets.model import flip_mesh, transform_mesh
from nrc.device_scene import DeviceScene
from nrc.kernels.light import light_sample
from nrc.kernels.scene import SceneView
from nrc.launch import launch, resolve_device
from nrc.metrics import relmse
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Camera, Instance, Material, Mesh, Scene

TOTAL_AREA = 0.5  # of all emitters [scene units²]
SAMPLES = 1 << 20  # light samples that are timed

wp.set_module_options({"enable_backward": False})


@wp.kernel
def draw_lights(
    first: int,
    # Scene
    scene: SceneView,
    # In
    points: wp.array[wp.vec3],  # (n,)
    normals: wp.array[wp.vec3],  # (n,)
    u: wp.array[wp.vec3],  # (n,)
    # Out
    out_pdf: wp.array[float],  # (n,)
):
    """Draw one light sample for each point. One thread per sample."""
    i = first + wp.tid()
    out_pdf[i] = light_sample(scene, points[i], normals[i], u[i][0], wp.vec2(u[i][1], u[i][2])).pdf


def room(n_triangles: int, seed: int = 1) -> Scene:
    """Closed box of 4 x 3 x 4 with squares that emit from both sides; a grey ball and a glossy one on the floor."""
    rng = np.random.default_rng(seed)
    n = max(1, n_triangles // 2)
    side = np.sqrt(TOTAL_AREA / n)
    centre = rng.uniform((-1.8, 0.1, -1.8), (1.8, 2.9, 1.8), (n, 1, 3))
    axes = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    corner = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]) * side
    positions = (centre + corner @ axes[:, :2]).reshape(-1, 3).astype(np.float32)
    indices = (4 * np.arange(n)[:, None, None] + np.array([(0, 1, 2), (0, 2, 3)])).reshape(-1, 3).astype(np.int32)
    lamps = Mesh(positions, indices, 1, name="lamps")
    walls, ball = shapes.cube(), shapes.sphere(24, 48)
    box = Mesh(walls.positions, walls.indices, 0, normals=walls.normals, name="walls")
    placed = flip_mesh(transform_mesh(box, np.array([[2.0, 0, 0, 0], [0, 1.5, 0, 1.5], [0, 0, 2.0, 0], [0, 0, 0, 1]])))
    balls = []
    for x, material in ((-0.8, 0), (0.8, 2)):
        matrix = np.diag([0.5, 0.5, 0.5, 1.0])
        matrix[:3, 3] = x, 0.5, 0.0
        balls.append(transform_mesh(Mesh(ball.positions, ball.indices, material, normals=ball.normals), matrix))
    return Scene(
        (placed, lamps, *balls),
        (
            Material(name="grey", base_color=(0.6, 0.6, 0.6), two_sided=True),
            Material(name="lamp", base_color=(0.0, 0.0, 0.0), emission=(20.0, 20.0, 20.0), emission_two_sided=True),
            Material(name="gloss", kind="metallic_roughness", base_color=(0.8, 0.6, 0.4), roughness=(0.4, 0.4)),
        ),
        Camera.look_at((0.0, 1.6, 1.9), (0.0, 0.9, 0.0), fov=70.0),
    )


def sample_ns(scene: DeviceScene) -> float:
    """Nanoseconds of one light sample at random points of the room; the best of five launches."""
    rng = np.random.default_rng(3)
    points: Any = wp.array(rng.uniform((-2, 0, -2), (2, 3, 2), (SAMPLES, 3)), dtype=wp.vec3, device=scene.device)
    n = rng.normal(size=(SAMPLES, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    normals: Any = wp.array(n, dtype=wp.vec3, device=scene.device)
    u: Any = wp.array(rng.random((SAMPLES, 3)), dtype=wp.vec3, device=scene.device)
    pdf: Any = wp.zeros(SAMPLES, dtype=float, device=scene.device)
    seconds = []
    for _ in range(6):
        wp.synchronize_device(scene.device)
        start = time.perf_counter()
        launch(draw_lights, SAMPLES, inputs=[scene.view, points, normals, u], outputs=[pdf], device=scene.device)
        wp.synchronize_device(scene.device)
        seconds.append(time.perf_counter() - start)
    return 1e9 * min(seconds[1:]) / SAMPLES


def change_ms(scene: DeviceScene) -> tuple[float, float]:
    """Milliseconds until the scene is ready with other emission, and with the lamps moved as one instance."""
    host = scene.scene
    dimmed = replace(host.materials[1], emission=(10.0, 15.0, 20.0))
    instanced = DeviceScene(replace(host, instances=(Instance(1, np.eye(4)),)), scene.device)
    emission, place = [], []
    for i in range(5):
        start = time.perf_counter()
        scene.replaced(replace(host, materials=(host.materials[0], dimmed, host.materials[2])))
        emission.append(time.perf_counter() - start)
        moved = np.eye(4)
        moved[1, 3] = 0.01 * i
        start = time.perf_counter()
        instanced.replaced(replace(instanced.scene, instances=(Instance(1, moved),)))
        place.append(time.perf_counter() - start)
    return 1e3 * float(np.median(emission)), 1e3 * float(np.median(place))


def direct_light(scene: DeviceScene, size: tuple[int, int], seed: int, spp: int) -> tuple[np.ndarray, float]:
    """Light that surfaces reflect at once, (height, width, 3), and the median seconds of a frame of it."""
    pictures, seconds = [], []
    for max_depth in (1, 2):
        renderer = Renderer(scene, *size, PathTracerConfig(integrator="path", max_depth=max_depth, seed=seed))
        renderer.prepare()
        seconds = []
        for _ in range(spp):
            start = time.perf_counter()
            renderer.frame()
            seconds.append(time.perf_counter() - start)
        pictures.append(renderer.image())
    return pictures[1] - pictures[0], float(np.median(seconds))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triangles", type=int, nargs="+", default=[10, 1000, 100_000])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--spp", type=int, default=64)
    parser.add_argument("--reference-spp", type=int, default=2048)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    size = arguments.width, arguments.height
    rows = []
    for n in arguments.triangles:
        uploaded = DeviceScene(room(n), device)
        halves = [direct_light(uploaded, size, seed, arguments.reference_spp // 2)[0] for seed in (2, 3)]
        picture, seconds = direct_light(uploaded, size, 1, arguments.spp)
        reference = (halves[0] + halves[1]) / 2.0
        emission, place = change_ms(uploaded)
        rows.append(
            {
                "triangles": n,
                "light_sample_ns": sample_ns(uploaded),
                "frame_ms": 1e3 * seconds,
                "relmse": relmse(picture, reference),
                "reference_relmse": relmse(reference + (halves[0] - halves[1]) / 2.0, reference),
                "emission_change_ms": emission,
                "move_ms": place,
            }
        )
        if not arguments.json:
            print(", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    if arguments.json:
        print(json.dumps({"device": str(device), "spp": arguments.spp, "size": size, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
