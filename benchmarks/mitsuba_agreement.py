"""Path tracing against Mitsuba 3 on the same scene: ratio of the means, and Welch's t per pixel channel over batches.

    python benchmarks/mitsuba_agreement.py cornell_box --size 64 --batches 64 --spp 16
    python benchmarks/mitsuba_agreement.py scene.xml --json

Both render independent batches of the scene as this package reads it (`to_mitsuba` exports it), with the same depth and
roulette. Two renderers that agree have |t| <= 3.5 in 99.9 % of all channels. An XML file can be rendered by Mitsuba as
it is (--original), which then tests the reader too: film size, reconstruction filter and integrator are still ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc import assets, launch
from nrc.assets.mitsuba_export import to_mitsuba
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Scene

T_LIMIT = 3.5


def choose_variant(mi: Any) -> str:
    """llvm_ad_rgb where LLVM is found, else scalar_rgb."""
    try:
        mi.set_variant("llvm_ad_rgb")
        import drjit as dr

        dr.eval(mi.Float(0.0) + 1.0)
    except Exception as error:  # drjit raises bare Exceptions
        print(f"llvm_ad_rgb does not start ({error}); using scalar_rgb", file=sys.stderr)
        mi.set_variant("scalar_rgb")
    return str(mi.variant())


def our_batches(scene: Scene, width: int, height: int, arguments: argparse.Namespace) -> np.ndarray:
    """(batches, height, width, 3) pictures by the path integrator."""
    settings = scene.settings
    config = PathTracerConfig(integrator="path", max_depth=settings.max_depth, rr_depth=settings.rr_depth)
    renderer = Renderer(scene, width, height, config, device=arguments.device)
    renderer.prepare()
    pictures = []
    for _ in range(arguments.batches):
        renderer.restart()
        for _ in range(arguments.spp):
            renderer.frame()
        pictures.append(renderer.image())
    return np.array(pictures)


def mitsuba_batches(mi: Any, scene: Scene, width: int, height: int, arguments: argparse.Namespace) -> np.ndarray:
    """The same by Mitsuba."""
    settings = scene.settings
    depths = {"max_depth": settings.max_depth, "rr_depth": settings.rr_depth}
    description, approximations = to_mitsuba(scene, width=width, height=height, spp=arguments.spp, **depths)
    for line in approximations:
        print(f"approximated in the export: {line}", file=sys.stderr)
    loaded = mi.load_dict(description)
    sensor, integrator = loaded.sensors()[0], loaded.integrator()
    if arguments.original:
        loaded = mi.load_file(str(arguments.scene), **dict(text.split("=", 1) for text in arguments.defines))
    pictures = [
        np.array(mi.render(loaded, sensor=sensor, integrator=integrator, spp=arguments.spp, seed=i + 1))[..., :3]
        for i in range(arguments.batches)
    ]
    return np.array(pictures)


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Ratio of the means with its standard error, and the distribution of Welch's t."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    variance = a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b)
    difference = a.mean(axis=0) - b.mean(axis=0)
    difference[np.abs(difference) <= 1e-4 * np.abs(b.mean(axis=0)) + 1e-7] = 0.0  # float32 sums in two programs
    t = np.divide(difference, np.sqrt(variance), out=np.where(difference == 0.0, 0.0, np.inf), where=variance > 0.0)
    means = [x.mean(axis=(1, 2, 3)) for x in (a, b)]
    relative = [m.std(ddof=1) / np.sqrt(len(m)) / m.mean() for m in means]
    return {
        "mean_ratio": float(means[0].mean() / means[1].mean()),
        "mean_ratio_error": float(np.hypot(*relative)),
        "fraction_within": float(np.mean(np.abs(t) <= T_LIMIT)),
        "t_limit": T_LIMIT,
        "t_percentiles": {str(p): float(np.percentile(np.abs(t), p)) for p in (50, 99, 99.9)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Path tracing against Mitsuba 3 on the same scene")
    parser.add_argument("scene", help="built-in name or scene file")
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--size", type=int, default=64, help="width [px]; the height keeps the scene's aspect ratio")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--spp", type=int, default=16, help="samples per pixel and batch")
    parser.add_argument("--original", action="store_true", help="let Mitsuba render the XML file itself")
    parser.add_argument("--device", help="ours (default: the first CUDA device, else the CPU)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    import mitsuba as mi

    wp.config.log_level = wp.LOG_WARNING
    variant = choose_variant(mi)
    scene = assets.load(arguments.scene, defines=dict(text.split("=", 1) for text in arguments.defines) or None)
    width = arguments.size
    height = max(1, round(width * scene.settings.height / scene.settings.width))
    figures = compare(
        our_batches(scene, width, height, arguments), mitsuba_batches(mi, scene, width, height, arguments)
    )
    result = {
        "scene": arguments.scene,
        "width": width,
        "height": height,
        "batches": arguments.batches,
        "spp": arguments.spp,
        "mitsuba": mi.__version__,
        "variant": variant,
        "device": str(launch.resolve_device(arguments.device)),
        **figures,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"mean ratio    {figures['mean_ratio']:.5f} ± {figures['mean_ratio_error']:.5f}")
    print(f"|t| <= {T_LIMIT}    {100.0 * figures['fraction_within']:.3f} % of pixel channels")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
