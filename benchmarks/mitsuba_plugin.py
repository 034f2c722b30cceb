"""The cache as a Mitsuba integrator against Mitsuba's own `path` on the same scene, at equal time.

    python benchmarks/mitsuba_plugin.py scene.xml -D resx=320 -D resy=180 --reference reference.exr
    python benchmarks/mitsuba_plugin.py builtin --json

The cache starts untrained; short renders with another seed compile for each of the two and tell how many samples fit
into the time, which the plugin's training before the first picture counts to. `path` then gets the time that the plugin
took: wall-clock time, or with --cpu the process' CPU time, for a machine that has other jobs. Both use
the scene's sampler; with --sobol the plugin replaces an `independent` one by Sobol' points at the first two vertices.
"builtin" is a scene of plugins that only Mitsuba reads, with a long render by `path` as reference.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mitsuba as mi
import numpy as np
import warp as wp

import nrc.integrations.mitsuba  # noqa: F401 registers the plugin
from nrc.image import read_linear, write_exr
from nrc.metrics import mean_bias, relmse

SEED, WARM_UP_SEED, REFERENCE_SEED = 1, 1_000_000, 2_000_000
PATH_SPP = 16  # of a `path` render
SHORT_SPP = 64  # of the plugin's short renders: as many samples per pass as later


def builtin_scene(width: int, height: int, folder: Path) -> dict[str, Any]:
    """Objects under a dim sky and a lamp: blended, bump-mapped and thin materials, instances, B-splines, an SDF grid.

    Args:
        folder: Where the curves' file is written.
    """
    transform = mi.ScalarTransform4f
    curves = folder / "curves.txt"
    strands = (
        "\n".join(f"{0.08 * i - 1.2} {0.2 * k - 0.2} {0.1 * np.sin(i + 0.7 * k) - 0.6} 0.02" for k in range(8))
        for i in range(8)
    )
    curves.write_text("\n\n".join(strands) + "\n")
    axis = np.linspace(-1.0, 1.0, 24, dtype=np.float32)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    torus = np.hypot(np.hypot(x, y) - 0.6, z) - 0.25
    noise = np.random.default_rng(0).random((32, 32, 1), dtype=np.float32)
    metal = {
        "type": "bumpmap",
        "id": "metal",
        "arbitrary": {"type": "bitmap", "bitmap": mi.Bitmap(noise), "raw": True},
        "scale": 0.02,
        "bsdf": {"type": "roughconductor", "material": "Cu", "alpha": 0.3},
    }
    gray = {"type": "diffuse", "reflectance": {"type": "rgb", "value": [0.6, 0.55, 0.5]}}
    return {
        "type": "scene",
        "sensor": {
            "type": "thinlens",
            "fov": 40.0,
            "aperture_radius": 0.02,
            "focus_distance": 5.0,
            "to_world": transform().look_at(origin=[0.5, 1.8, 4.8], target=[0.0, 0.4, 0.0], up=[0, 1, 0]),
            "film": {"type": "hdrfilm", "width": width, "height": height, "rfilter": {"type": "gaussian"}},
            "sampler": {"type": "multijitter", "sample_count": 64},
        },
        "sky": {"type": "constant", "radiance": {"type": "rgb", "value": [0.05, 0.06, 0.08]}},
        "lamp": {
            "type": "rectangle",
            "to_world": transform().translate([-2.5, 2.5, 1.0]).look_at([0, 0, 0], [2.5, -2.5, -1.0], [0, 1, 0]),
            "emitter": {"type": "area", "radiance": {"type": "rgb", "value": [6.0, 5.0, 4.0]}},
        },
        "metal": metal,
        "floor": {
            "type": "rectangle",
            "to_world": transform().rotate([1, 0, 0], -90).scale(4.0),
            "bsdf": {"type": "blendbsdf", "weight": 0.4, "first": gray, "second": {"type": "ref", "id": "metal"}},
        },
        "wall": {"type": "rectangle", "to_world": transform().translate([0, 1, -1.5]).scale(4.0), "bsdf": gray},
        "curves": {"type": "bsplinecurve", "filename": str(curves), "bsdf": {"type": "principled", "roughness": 0.4}},
        "torus": {
            "type": "sdfgrid",
            "grid": mi.TensorXf(torus[..., None]),
            "to_world": transform().translate([0.1, 0.2, 0.0]).scale(0.9),
            "bsdf": {"type": "roughplastic", "diffuse_reflectance": {"type": "rgb", "value": [0.2, 0.4, 0.6]}},
        },
        "group": {
            "type": "shapegroup",
            "ball": {"type": "sphere", "radius": 0.3, "bsdf": {"type": "ref", "id": "metal"}},
            "sheet": {
                "type": "disk",
                "to_world": transform().translate([0, 0.5, 0]).scale(0.4),
                "bsdf": {"type": "principledthin", "diff_trans": 0.8, "roughness": 0.5},
            },
        },
        "left": {
            "type": "instance",
            "to_world": transform().translate([-0.9, 0.3, 0.9]),
            "shapes": {"type": "ref", "id": "group"},
        },
        "right": {
            "type": "instance",
            "to_world": transform().translate([1.5, 0.45, 0.3]).scale(1.5),
            "shapes": {"type": "ref", "id": "group"},
        },
    }


def timed(render: Callable[[], Any], cpu: bool) -> tuple[np.ndarray, float]:
    """(height, width, 3) picture and seconds."""
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    picture = np.array(render(), np.float32)[..., :3]
    seconds = clock() - start
    return picture, seconds / (os.cpu_count() or 1) if cpu else seconds


def compare(scene: Any, depths: dict[str, int], reference: np.ndarray, arguments: argparse.Namespace) -> dict[str, Any]:
    """Render with both; figures of each and the ratio of their errors."""
    cpu = arguments.cpu
    plugin = mi.load_dict({"type": "nrc", "sobol": arguments.sobol, **depths})
    path = mi.load_dict({"type": "path", **depths})

    def short() -> float:
        return timed(lambda: mi.render(scene, integrator=plugin, seed=WARM_UP_SEED, spp=SHORT_SPP), cpu)[1]

    for _ in range(2):
        timed(lambda: mi.render(scene, integrator=path, seed=WARM_UP_SEED, spp=PATH_SPP), cpu)
    short()  # compiles
    trained = short()
    plugin.reset_cache()
    untrained = short()
    plugin.reset_cache()
    left = max(arguments.seconds - (untrained - trained), 0.0)
    spp = max(1, round(left / trained * SHORT_SPP / PATH_SPP)) * PATH_SPP
    pictures, figures = {}, {}
    pictures["nrc"], seconds = timed(lambda: mi.render(scene, integrator=plugin, seed=SEED, spp=spp), cpu)
    figures["nrc"] = {"spp": spp, "seconds": seconds, "training_passes": plugin.n_passes}
    total, used, n = np.zeros_like(pictures["nrc"], np.float64), 0.0, 0
    while used < seconds:
        picture, elapsed = timed(lambda n=n: mi.render(scene, integrator=path, seed=SEED + n, spp=PATH_SPP), cpu)
        total, used, n = total + picture, used + elapsed, n + 1
    pictures["path"] = (total / n).astype(np.float32)
    figures["path"] = {"spp": n * PATH_SPP, "seconds": used}
    for name, picture in pictures.items():
        figures[name] |= {"relmse": relmse(picture, reference), "mean_bias": mean_bias(picture, reference)}
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_exr(arguments.out / f"{name}.exr", {"color": picture})
    return {**figures, "ratio": figures["path"]["relmse"] / figures["nrc"]["relmse"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="The cache as a Mitsuba integrator against `path`, at equal time")
    parser.add_argument("scene", help='Mitsuba XML file, or "builtin"')
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--reference", type=Path, help="converged EXR; by default `path` renders one")
    parser.add_argument("--reference-spp", type=int, default=16384, help="of the reference that `path` renders")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--cpu", action="store_true", help="count CPU time over the number of cores")
    parser.add_argument("--sobol", action="store_true", help="Sobol' points instead of an independent sampler")
    parser.add_argument("--max-depth", type=int, default=65)
    parser.add_argument("--variant", default="llvm_ad_rgb")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING
    mi.set_variant(arguments.variant)
    if arguments.scene == "builtin":
        with tempfile.TemporaryDirectory() as folder:
            scene = mi.load_dict(builtin_scene(256, 192, Path(folder)))
    else:
        scene = mi.load_file(arguments.scene, **dict(text.split("=", 1) for text in arguments.defines))
    depths = {"max_depth": arguments.max_depth, "rr_depth": 5}
    if arguments.reference is not None:
        reference = read_linear(arguments.reference)
    else:
        reference = long_render(scene, depths, arguments.reference_spp)
    result = {
        "scene": arguments.scene,
        "size": list(reference.shape[1::-1]),
        "clock": "cpu" if arguments.cpu else "wall",
        "mitsuba": mi.__version__,
        "variant": mi.variant(),
        **compare(scene, depths, reference, arguments),
    }
    for name in ("path", "nrc"):
        f = result[name]
        bias = f"mean {100.0 * f['mean_bias']:+.2f} %"
        print(f"{name:5} {f['spp']:5d} spp in {f['seconds']:.1f} s: relMSE {f['relmse']:.6f}, {bias}")
    print(f"relMSE of path over nrc: {result['ratio']:.2f}")
    if arguments.json:
        print(json.dumps(result))


def long_render(scene: Any, depths: dict[str, int], spp: int, spp_per_render: int = 256) -> np.ndarray:
    """Mean of `path` renders."""
    path = mi.load_dict({"type": "path", **depths})
    n = max(1, spp // spp_per_render)
    pictures = (
        np.array(mi.render(scene, integrator=path, seed=REFERENCE_SEED + i, spp=spp_per_render))[..., :3]
        for i in range(n)
    )
    return sum(picture.astype(np.float64) / n for picture in pictures).astype(np.float32)  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
