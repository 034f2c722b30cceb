"""A moving scene with the cache and without, at equal time per frame.

    python benchmarks/animation.py opening_door --frames 0 239 --fps 30 --seconds 0.25 --out animation/

Every method renders the whole animation in order, its cache learning on from frame to frame after a warm-up on the
first. At evenly spread frames, and the frames after these, pictures are compared with path-traced references (kept in
the folder, and used again): relMSE, mean error, and flicker: relMSE of the change from one frame to the next against
the reference's change. Writes figures.json, a plot over time, and three of the frames, one below the other: the
reference, then each method.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tqdm import tqdm

from nrc import assets
from nrc.image import read_linear, write_image
from nrc.launch import resolve_device
from nrc.metrics import relmse
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Scene
from nrc.temporal import TemporalAccumulation

ENLARGED = 2  # pixels of frames.png per pixel of a frame
METHODS = {
    "path": PathTracerConfig(integrator="path"),
    "nrc": PathTracerConfig(integrator="nrc"),
    "nrc-object": PathTracerConfig(integrator="nrc", record_space="object"),
}


def references(
    scene: Scene, frames: list[int], fps: float, size: tuple[int, int], spp: int, folder: Path, device: Any
) -> tuple[dict[int, np.ndarray], float]:
    """Path-traced pictures of frames by number, and the relMSE that their own noise makes.

    Each is the mean of two of half the samples and different seeds, whose difference says how noisy the mean is.
    """
    config = replace(METHODS["path"], max_depth=scene.settings.max_depth)
    renderer: Renderer | None = None
    pictures, noise = {}, []
    for frame in tqdm(frames, desc="references"):
        halves = []
        for seed in (1, 2):
            path = folder / f"reference_{size[0]}x{size[1]}_{fps:g}_{spp}_{frame:04}_{seed}.exr"
            if not path.exists():
                renderer = renderer or Renderer(scene, *size, config, device=device)
                renderer.set_config(replace(config, seed=1000 + seed))
                renderer.set_scene(scene.at(frame / fps))
                for _ in range(spp // 2):
                    renderer.frame()
                write_image(path, renderer.image())
            halves.append(read_linear(path))
        noise.append(relmse(halves[0], halves[1]) / 4.0)
        pictures[frame] = (halves[0] + halves[1]) / 2.0
    return pictures, float(np.mean(noise))


def play(
    scene: Scene,
    config: PathTracerConfig,
    frames: range,
    fps: float,
    size: tuple[int, int],
    seconds: float,
    kept: set[int],
    device: Any,
    *,
    temporal: bool,
) -> tuple[dict[int, np.ndarray], dict[str, float]]:
    """Render all frames in order, each within `seconds`; those kept, and what they took.

    A frame's time begins with its pose, and ends where another sample per pixel would exceed it by more than half.
    """
    renderer = Renderer(scene, *size, replace(config, max_depth=scene.settings.max_depth), device=device)
    renderer.prepare()
    renderer.set_scene(scene.at(frames[0] / fps))
    start = time.perf_counter()
    renderer.warm_up()
    warm_up = time.perf_counter() - start
    accumulation = TemporalAccumulation(*size, device=renderer.device) if temporal else None
    pictures, samples, elapsed, moving = {}, [], [], []
    for frame in tqdm(frames, desc="frames"):
        start = time.perf_counter()
        renderer.set_scene(scene.at(frame / fps))
        moving.append(time.perf_counter() - start)
        while True:
            before = time.perf_counter()
            renderer.frame()
            now = time.perf_counter()
            if now - start + 0.5 * (now - before) > seconds:
                break
        mean = renderer.film.mean()
        if accumulation is not None:
            mean = accumulation.add(mean, renderer.scene, renderer.tracer.camera)
        if frame in kept:
            pictures[frame] = mean.numpy().reshape(size[1], size[0], 3).copy()
        elapsed.append(time.perf_counter() - start)
        samples.append(renderer.film.n_frames)
    figures = {
        "warm_up_seconds": warm_up,
        "seconds": np.mean(elapsed),
        "spp": np.mean(samples),
        "move_ms": 1e3 * np.median(moving),
    }
    return pictures, {name: float(value) for name, value in figures.items()}


def compared(pictures: dict[int, np.ndarray], truth: dict[int, np.ndarray], frames: list[int]) -> dict[str, Any]:
    """Errors at `frames`, and of the change from each to the next."""
    errors = [relmse(pictures[f], truth[f]) for f in frames]
    bias = [float(pictures[f].mean(dtype=np.float64) / truth[f].mean(dtype=np.float64)) - 1.0 for f in frames]
    flicker = []
    for f in frames:
        change = (pictures[f + 1] - pictures[f]) - (truth[f + 1] - truth[f])
        flicker.append(relmse(truth[f] + change, truth[f]))
    return {
        "relmse": errors,
        "mean_relmse": float(np.mean(errors)),
        "mean_error": bias,
        "flicker": flicker,
        "mean_flicker": float(np.mean(flicker)),
    }


def plot(path: Path, rows: dict[str, Any], frames: list[int], fps: float) -> None:
    """relMSE and flicker of all methods over time."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, key in zip(axes, ("relmse", "flicker"), strict=True):
        for name, row in rows.items():
            axis.semilogy(np.array(frames) / fps, row[key], marker="o", markersize=3, label=name)
        axis.set(xlabel="time [s]", title=key)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure, plot and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scene", nargs="?", default="opening_door")
    parser.add_argument("--frames", type=int, nargs=2, default=[0, 239], help="first and last")
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=0.25, help="per frame")
    parser.add_argument("--references", type=int, default=12)
    parser.add_argument("--reference-spp", type=int, default=4096)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--height", type=int, default=54)
    parser.add_argument(
        "--methods",
        nargs="*",
        default=["path", "nrc", "nrc-object", "path+temporal", "nrc+temporal"],
        help="none renders the references alone",
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("animation"))
    arguments = parser.parse_args()
    device, size = resolve_device(arguments.device), (arguments.width, arguments.height)
    first, last = arguments.frames
    frames = range(first, last + 1)
    scene = assets.load(arguments.scene)
    at = [first + round((i + 0.5) * (last - first - 1) / arguments.references) for i in range(arguments.references)]
    kept = sorted({*at, *(f + 1 for f in at)})
    arguments.out.mkdir(parents=True, exist_ok=True)
    truth, noise = references(scene, kept, arguments.fps, size, arguments.reference_spp, arguments.out, device)
    rows: dict[str, Any] = {}
    shown = at[0], at[len(at) // 2], at[-1]
    columns = [np.concatenate([truth[frame] for frame in shown])]
    for method in arguments.methods:
        name, _, suffix = method.partition("+")
        pictures, figures = play(
            scene,
            METHODS[name],
            frames,
            arguments.fps,
            size,
            arguments.seconds,
            set(kept),
            device,
            temporal=suffix == "temporal",
        )
        rows[method] = {**figures, **compared(pictures, truth, at)}
        row = rows[method]
        print(
            f"{method}: {row['spp']:.1f} spp in {row['seconds']:.3f} s (pose {row['move_ms']:.1f} ms), "
            f"relMSE {row['mean_relmse']:.4f}, flicker {row['mean_flicker']:.4f}, "
            f"mean {100 * np.mean(row['mean_error']):+.2f} %",
            flush=True,
        )
        columns.append(np.concatenate([pictures[frame] for frame in shown]))
    if rows:
        strip = np.concatenate(columns, axis=1)
        write_image(arguments.out / "frames.png", strip.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1))
        plot(arguments.out / "animation.png", rows, at, arguments.fps)
    result = {
        "scene": arguments.scene,
        "device": str(device),
        "size": size,
        "fps": arguments.fps,
        "frames": [first, last],
        "compared": at,
        "reference_relmse": noise,
        "methods": rows,
    }
    (arguments.out / "figures.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "methods"}))


if __name__ == "__main__":
    main()
