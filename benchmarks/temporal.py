"""Temporal accumulation of one-sample frames: error, flicker and cost in motion, and how long a light switch lingers.

    python benchmarks/temporal.py glossy_room --json

A camera sways through the scene and back. Every frame, one path per pixel, is compared as it is and accumulated: relMSE
against a path traced reference at some frames, and flicker, the mean of |change of the picture - change of the
reference| over one frame, over the reference's mean. Then the camera stands still and the brightest emissive material
goes out: frames until the error of 16 x 16 blocks stays below 10 % of the light that went. The cache learns beforehand,
and its own adaptation counts.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import warp as wp
from adaptation import blocks, switch_off

from nrc import assets
from nrc.device_scene import DeviceScene
from nrc.image import write_image
from nrc.launch import prepare
from nrc.metrics import mean_bias, relmse
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Camera, Scene
from nrc.temporal import TemporalAccumulation, TemporalConfig

WARM_UP = 160  # frames that train the cache before anything counts
SWAY, YAW = 0.06, np.radians(8.0)  # of the scene's radius, sideways; to each side


def swayed(scene: Scene, phase: float) -> Camera:
    """The scene's camera moved sideways and turned, back where it was at whole phases."""
    lower, upper = scene.bounds
    amount = np.sin(2.0 * np.pi * phase)
    matrix = np.array(scene.camera.to_world, float)
    matrix[:3, 3] += matrix[:3, 0] * (SWAY * amount * np.linalg.norm(upper - lower) / 2.0)
    c, s = np.cos(YAW * amount), np.sin(YAW * amount)
    matrix[:3, :3] = np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]]) @ matrix[:3, :3]
    return replace(scene.camera, to_world=matrix)


class Sequence:
    """Frames of one integrator, as they are and accumulated."""

    def __init__(
        self, device_scene: DeviceScene, size: tuple[int, int], integrator: str, config: TemporalConfig
    ) -> None:
        settings = device_scene.scene.settings
        tracing = PathTracerConfig(max_depth=settings.max_depth, integrator=integrator)  # type: ignore[arg-type]
        self.renderer = Renderer(device_scene, *size, tracing)
        self.renderer.prepare()
        self.accumulation = TemporalAccumulation(*size, device_scene.device, config)
        prepare(self.accumulation.kernels(), device_scene.device)
        self.size = size
        self.seconds = {"frame": 0.0, "accumulation": 0.0}

    def frame(self, camera: Camera | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(height, width, 3) each."""
        renderer = self.renderer
        if camera is not None:
            renderer.set_camera(camera)
        start = time.perf_counter()
        renderer.frame()
        middle = time.perf_counter()
        picture = self.accumulation.add(renderer.film.frame, renderer.scene, renderer.tracer.camera)
        wp.synchronize_device(renderer.device)
        self.seconds["frame"] += middle - start
        self.seconds["accumulation"] += time.perf_counter() - middle
        shape = (*self.size[::-1], 3)
        return renderer.film.frame.numpy().reshape(shape).copy(), picture.numpy().reshape(shape).copy()


def path_traced(device_scene: DeviceScene, size: tuple[int, int], spp: int, cameras: list[Camera]) -> list[np.ndarray]:
    """References; all use the same random numbers, so that their noise is not taken for flicker."""
    max_depth = device_scene.scene.settings.max_depth
    renderer = Renderer(device_scene, *size, PathTracerConfig(integrator="path", max_depth=max_depth, seed=1))
    pictures = []
    for camera in cameras:
        renderer.set_camera(camera)
        renderer.frame_index = 0
        for _ in range(spp):
            renderer.frame()
        pictures.append(renderer.image())
    return pictures


def flicker(before: np.ndarray, after: np.ndarray, reference: tuple[np.ndarray, np.ndarray]) -> float:
    """Change of the picture that is none of the reference, over the reference's mean."""
    return float(np.abs((after - before) - (reference[1] - reference[0])).mean() / reference[0].mean())


def frames_to_follow(pictures: list[np.ndarray], before: np.ndarray, after: np.ndarray) -> int | None:
    """Frames until the pictures' blocks differ from `after` by less than a tenth of what the light was, and stay so."""
    went = np.abs(blocks(before) - blocks(after)).mean()
    late = [np.abs(blocks(picture) - blocks(after)).mean() > 0.1 * went for picture in pictures]
    return None if late[-1] else len(late) - late[::-1].index(True) if True in late else 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scene", nargs="?", default="glossy_room")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=144)
    parser.add_argument("--frames", type=int, default=64, help="of the moving camera")
    parser.add_argument("--switch-frames", type=int, default=64, help="after the light switch")
    parser.add_argument("--reference-spp", type=int, default=256)
    parser.add_argument("--pictures", type=Path, help="folder for one frame: as it is, accumulated, reference")
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    scene = assets.load(arguments.scene)
    size, n = (arguments.width, arguments.height), arguments.frames
    lit = DeviceScene(scene, arguments.device)
    unlit = lit.replaced(switch_off(scene, False))
    compared = [k for middle in (3 * n // 8, 3 * n // 4) for k in (middle, middle + 1)]
    references = path_traced(lit, size, arguments.reference_spp, [swayed(scene, k / n) for k in compared])
    on, off = (path_traced(s, size, arguments.reference_spp, [scene.camera])[0] for s in (lit, unlit))

    results = []
    for integrator in ("path", "nrc"):
        sequence = Sequence(lit, size, integrator, TemporalConfig())
        for _ in range(WARM_UP if integrator == "nrc" else 0):
            sequence.renderer.frame()
        rejected = []
        pictures = []
        for k in range(n):
            pictures.append(sequence.frame(swayed(scene, k / n)))
            rejected.append(sequence.accumulation.rejected_fraction())
        milliseconds = {name: 1e3 * seconds / n for name, seconds in sequence.seconds.items()}
        sequence.renderer.set_camera(scene.camera)
        for _ in range(n):
            sequence.frame()
        steady = sequence.frame()
        sequence.renderer.set_scene(unlit)
        switched = [sequence.frame() for _ in range(arguments.switch_frames)]
        for i, name in enumerate(("as it is", "accumulated")):
            shown = [pictures[k][i] for k in compared]
            pairs = [(0, 1), (2, 3)]
            results.append(
                {
                    "integrator": integrator,
                    "picture": name,
                    "relmse": float(np.mean([relmse(a, r) for a, r in zip(shown, references, strict=True)])),
                    "bias": float(np.mean([mean_bias(a, r) for a, r in zip(shown, references, strict=True)])),
                    "flicker": float(
                        np.mean([flicker(shown[a], shown[b], (references[a], references[b])) for a, b in pairs])
                    ),
                    "still_relmse": relmse(steady[i], on),
                    "lag_frames": frames_to_follow([pair[i] for pair in switched], on, off),
                    "relmse_after_switch": [round(relmse(switched[k][i], off), 4) for k in (0, 1, 3, 7, 15, 31)],
                    "rejected": float(np.mean(rejected[1:])) if i else None,
                    "ms": milliseconds["accumulation"] if i else milliseconds["frame"],
                }
            )
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            row = np.concatenate([*pictures[compared[-1]], references[-1]], axis=1)
            write_image(arguments.pictures / f"temporal_{arguments.scene}_{integrator}.png", row)
    for row in results:
        print(
            f"{row['integrator']:5} {row['picture']:12} relMSE {row['relmse']:.4f} ({row['bias']:+.1%}), still "
            f"{row['still_relmse']:.4f}, flicker {row['flicker']:.4f}, light switch {row['lag_frames']} frames, "
            f"{row['ms']:.1f} ms"
        )
    if arguments.json:
        print(json.dumps({"scene": arguments.scene, "device": str(lit.device), "results": results}))


if __name__ == "__main__":
    main()
