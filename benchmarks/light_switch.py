"""How many frames the cache needs after a light is switched off, with nothing reset.

    python benchmarks/light_switch.py glossy_room --frames 200 --json

Renders until the cache has settled, switches off the brightest emissive material or, with --all, all light, and counts
the frames until the error mean |nrc - path| over the mean before the switch falls below 10 % of its value right after.
Both pictures are averaged over blocks of 16 x 16 pixels first, so that the figure is about the cache and not about the
noise of a single frame.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np

from nrc import assets
from nrc.device_scene import DeviceScene
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Scene

BLOCK = 16  # [px]


def switch_off(scene: Scene, everything: bool) -> Scene:
    """The scene without its brightest emitter, or without any."""
    emitting = [i for i, material in enumerate(scene.materials) if material.emits]
    if not emitting:
        raise SystemExit("this scene has no emissive material")
    power = [
        sum(scene.materials[i].emission) * sum(len(mesh.indices) for mesh in scene.meshes if mesh.material == i)
        for i in emitting
    ]
    off = set(emitting) if everything else {emitting[int(np.argmax(power))]}
    materials = tuple(
        replace(material, emission=(0.0, 0.0, 0.0)) if i in off else material
        for i, material in enumerate(scene.materials)
    )
    if everything:
        return replace(scene, materials=materials, lights=(), environment=None)
    return replace(scene, materials=materials)


def blocks(image: np.ndarray) -> np.ndarray:
    """Means over BLOCK x BLOCK pixels."""
    h, w = (n // BLOCK for n in image.shape[:2])
    return image[: h * BLOCK, : w * BLOCK].reshape(h, BLOCK, w, BLOCK, 3).mean(axis=(1, 3))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scene", nargs="?", default="glossy_room")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=144)
    parser.add_argument("--before", type=int, default=192, help="frames before the switch")
    parser.add_argument("--frames", type=int, default=200, help="frames after it")
    parser.add_argument("--reference-spp", type=int, default=256)
    parser.add_argument("--all", action="store_true", help="switch off every light")
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    lit = assets.load(arguments.scene)
    size = (arguments.width, arguments.height)
    config = PathTracerConfig(max_depth=lit.settings.max_depth)
    on = DeviceScene(lit, arguments.device)
    off = DeviceScene(switch_off(lit, arguments.all), arguments.device)

    path = Renderer(off, *size, replace(config, integrator="path"))
    path.prepare()
    for _ in range(arguments.reference_spp):
        path.frame()
    reference = blocks(path.image())

    renderer = Renderer(on, *size, config)
    renderer.prepare()
    for _ in range(arguments.before):
        renderer.frame()
    mean_before = float(renderer.image().mean())
    renderer.set_scene(off)
    errors = []
    for _ in range(arguments.frames):
        renderer.frame()
        frame = renderer.film.frame.numpy().reshape(arguments.height, arguments.width, 3)
        errors.append(float(np.abs(blocks(frame) - reference).mean()) / mean_before)
    below = np.flatnonzero(np.asarray(errors) < 0.1 * errors[0])
    half = np.flatnonzero(np.asarray(errors) < 0.5 * errors[0])
    result = {
        "scene": arguments.scene,
        "all_lights": arguments.all,
        "frames_to_10_percent": int(below[0]) if len(below) else None,
        "frames_to_50_percent": int(half[0]) if len(half) else None,
        "error_at_switch": errors[0],
        "error_at_end": float(np.mean(errors[-8:])),
        "errors": [round(e, 5) for e in errors],
    }
    print(f"error {errors[0]:.3f} at the switch, below half after {result['frames_to_50_percent']} frames,")
    print(f"below a tenth after {result['frames_to_10_percent']}, {result['error_at_end']:.4f} at the end")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
