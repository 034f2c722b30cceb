"""The `nrc` command."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nrc import assets, cli_fit, cli_view, launch
from nrc.cli_arguments import UsageError, add_device, parse_defines, positive_float, positive_int, say, use_threads
from nrc.image import read_linear, to_srgb8, write_exr, write_image
from nrc.metrics import compare, difference_picture
from nrc.scene import Scene

PICTURE_FORMATS = (".exr", ".png", ".hdr")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a mistake in arguments or files, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        result = arguments.run(arguments)
    except (ValueError, OSError) as error:  # SceneError, ImageError, CheckpointError and UsageError are ValueErrors
        print(f"nrc: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"nrc: not enough memory for this{f' ({error})' if str(error) else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nrc: interrupted", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(_jsonable(result)), flush=True)
    return 130 if result.get("interrupted") else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nrc", description="Path tracing with a neural radiance cache that learns while it renders."
    )
    parser.add_argument("--version", action="version", version=version("nrc"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    render = commands.add_parser("render", help="render a scene")
    _add_scene(render)
    _add_render_options(render)
    render.add_argument("--integrator", choices=("path", "nrc", "cache"), default="nrc", help="default: nrc")
    render.add_argument("--spp", type=positive_int, help="samples per pixel (default: the scene's)")
    render.add_argument(
        "--seconds",
        type=positive_float,
        help="stop after this long in all, compilation excluded",
    )
    render.add_argument("--aov", action="store_true", help="add first-hit layers and views of the cache (EXR only)")
    render.add_argument("--out", type=Path, help=".exr, .png or .hdr (default: SCENE.exr); an EXR gets a PNG too")
    render.add_argument("--reference", type=Path, help="picture to compare with; its size is the default")
    render.add_argument("--resume", action="store_true", help="continue from OUT.checkpoint")
    render.set_defaults(run=_render)

    scenes = commands.add_parser("scenes", help="list the built-in scenes")
    scenes.set_defaults(run=_scenes)

    compared = commands.add_parser("compare", help="compare picture A with reference B")
    compared.add_argument("a", type=Path)
    compared.add_argument("b", type=Path)
    compared.add_argument("--out", type=Path, help="picture of the relative difference (.png)")
    compared.set_defaults(run=_compare)

    info = commands.add_parser("info", help="devices, versions and where compiled kernels are kept")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="measure on this machine").add_subparsers(required=True, metavar="WHAT")
    cache = bench.add_parser("cache", help="path tracing and the cache, from untrained, for equal time")
    _add_scene(cache)
    _add_render_options(cache)
    cache.add_argument("--seconds", type=positive_float, default=20.0, help="for each of the two (default: 20)")
    cache.add_argument("--reference", type=Path, required=True, help="converged picture of the same size")
    cache.add_argument("--out", type=Path, help="folder for path.exr and nrc.exr")
    cache.add_argument("--mitsuba", action="store_true", help="also Mitsuba's path integrator (llvm_ad_rgb), same time")
    cache.set_defaults(run=_bench_cache)
    rays = bench.add_parser("rays", help="path tracing throughput beside Mitsuba's")
    _add_scene(rays)
    _add_render_options(rays)
    rays.add_argument("--seconds", type=positive_float, default=10.0, help="for each of the two (default: 10)")
    rays.set_defaults(run=_bench_rays)

    field = bench.add_parser("field", help="training and inference of a field beside drjit.nn and PyTorch")
    field.add_argument("--batch", type=positive_int, default=65536, help="samples per step (default: 65536)")
    field.add_argument("--log2-hashmap-size", type=positive_int, default=19, help="entries of a level (default: 19)")
    field.add_argument("--seconds", type=positive_float, default=30.0, help="measured, in all (default: 30)")
    field.add_argument("--rounds", type=positive_int, default=5, help="turns that each takes (default: 5)")
    add_device(field)
    field.set_defaults(run=_bench_field)

    view = cli_view.add_command(commands)
    for command in (render, view, scenes, compared, info, cache, rays, field, *cli_fit.add_commands(commands)):
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _add_scene(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "scene", nargs="?", default="cornell_box", help="built-in name, glTF, GLB, OBJ, PLY, STL, JSON or Mitsuba XML"
    )
    parser.add_argument(
        "-D",
        dest="defines",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of a Mitsuba XML file; may be repeated",
    )


def _add_render_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive_int, help="[px]")
    parser.add_argument("--height", type=positive_int, help="[px]")
    parser.add_argument("--max-depth", type=int, help="longest path in edges, -1 for no limit (default: the scene's)")
    parser.add_argument("--rr-depth", type=int, help="edges before Russian roulette (default: the scene's)")
    parser.add_argument("--threshold", type=float, default=0.01, help="spread c that ends a path in the cache (0.01)")
    parser.add_argument("--encoding", choices=("hash", "frequency"), default="hash", help="of the cache (hash)")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)


def _load(arguments: argparse.Namespace) -> Scene:
    scene = assets.load(arguments.scene, defines=parse_defines(arguments.defines))
    for warning in scene.warnings:
        print(f"nrc: warning: {warning}", file=sys.stderr)
    if not scene.has_light:
        print("nrc: warning: nothing in this scene emits light; the picture will be black", file=sys.stderr)
    return scene


def _size(arguments: argparse.Namespace, scene: Scene, reference: np.ndarray | None) -> tuple[int, int]:
    """Width and height: as asked, else the reference's, else the scene's with its aspect ratio kept."""
    width, height = arguments.width, arguments.height
    settings = scene.settings
    if reference is not None:
        size = (reference.shape[1], reference.shape[0])
        asked = (width or size[0], height or size[1])
        if asked != size:
            raise UsageError(
                f"--reference {arguments.reference} is {size[0]}x{size[1]}, the picture would be {asked[0]}x{asked[1]}"
            )
        return size
    if width and not height:
        height = max(1, round(width * settings.height / settings.width))
    if height and not width:
        width = max(1, round(height * settings.width / settings.height))
    return width or settings.width, height or settings.height


def _tracer_config(arguments: argparse.Namespace, scene: Scene, integrator: Any) -> Any:
    from nrc.pathtracer import PathTracerConfig

    settings = scene.settings
    return PathTracerConfig(
        integrator=integrator,
        max_depth=settings.max_depth if arguments.max_depth is None else arguments.max_depth,
        rr_depth=settings.rr_depth if arguments.rr_depth is None else arguments.rr_depth,
        spread_threshold=arguments.threshold,
        seed=arguments.seed,
    )


def _render(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.cache import CacheConfig
    from nrc.debug_views import debug_views
    from nrc.render_job import Budget, RenderJob, describe
    from nrc.renderer import Renderer

    start = time.perf_counter()
    use_threads(arguments)
    scene = _load(arguments)
    reference = None if arguments.reference is None else read_linear(arguments.reference)
    width, height = _size(arguments, scene, reference)
    out = arguments.out or Path(f"{Path(arguments.scene).stem}.exr")
    if out.suffix.lower() not in PICTURE_FORMATS:
        raise UsageError(f"--out {out}: cannot write '{out.suffix}'; one of {', '.join(PICTURE_FORMATS)}")
    if arguments.aov and out.suffix.lower() != ".exr":
        raise UsageError(f"--aov needs an .exr to hold its layers, --out is {out}")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK) or not _accepts_files(out.parent):
        raise UsageError(f"--out {out}: cannot write into folder {out.parent}")
    renderer = Renderer(
        scene,
        width,
        height,
        _tracer_config(arguments, scene, arguments.integrator),
        cache=CacheConfig(encoding=arguments.encoding),
        device=arguments.device,
    )
    renderer.prepare()
    job = RenderJob(renderer, describe(renderer), out.with_name(out.name + ".checkpoint"))
    if arguments.resume:
        job.resume()
    spp = arguments.spp or (None if arguments.seconds else scene.settings.spp)
    say(
        f"{scene.name or arguments.scene}: {width}x{height}, {arguments.integrator} on {renderer.device}, "
        f"ready after {time.perf_counter() - start:.1f} s"
    )
    budget = Budget(spp, arguments.seconds)
    if job.is_spent(budget):
        say(f"already at {renderer.film.n_frames} samples per pixel and {job.seconds:.1f} s: nothing left to render")
    job.run(budget)

    image = renderer.image()
    layers = {"color": image}
    if arguments.aov:
        layers |= renderer.aovs()
        if renderer.cache is not None:
            layers |= debug_views(renderer)
    result: dict[str, Any] = {
        "out": str(out),
        "width": width,
        "height": height,
        "integrator": arguments.integrator,
        "device": str(renderer.device),
        "spp": renderer.film.n_frames,
        "seconds": job.seconds,
        "interrupted": job.interrupted,
        "stages_ms": renderer.stages_ms(),
        **renderer.film.stats(),
    }
    if renderer.cache is not None:
        result["cache"] = renderer.cache.stats()
    _write_picture(out, layers, result)
    if result["invalid_samples"]:
        say(f"{result['invalid_samples']} samples were not finite or negative and were left out")
    if reference is not None:
        figures = compare(image, reference)
        result |= {name: figures[name] for name in ("relmse", "psnr", "mean_bias")}
        say(f"relMSE {figures['relmse']:.5f}, PSNR {figures['psnr']:.2f} dB, mean {100 * figures['mean_bias']:+.2f} %")
    say(f"{result['spp']} samples per pixel in {job.seconds:.1f} s: {out}")
    return result


def _accepts_files(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _write_picture(out: Path, layers: dict[str, np.ndarray], result: dict[str, Any]) -> None:
    if out.suffix.lower() != ".exr":
        write_image(out, layers["color"])
        return
    metadata = {"nrc.integrator": result["integrator"], "nrc.spp": result["spp"], "nrc.seconds": result["seconds"]}
    write_exr(out, layers, metadata)
    write_image(out.with_suffix(".png"), to_srgb8(layers["color"]))


def _scenes(_arguments: argparse.Namespace) -> dict[str, Any]:
    scenes = assets.builtin_scenes()
    if not _arguments.json:
        for name, description in scenes.items():
            print(f"{name:16} {description}")
    return scenes


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    a, b = read_linear(arguments.a), read_linear(arguments.b)
    figures: dict[str, Any] = compare(a, b)
    if arguments.out is not None:
        write_image(arguments.out, difference_picture(a, b))
        figures["out"] = str(arguments.out)
    if not arguments.json:
        for name, value in figures.items():
            print(f"{name:10} {value:.6g}" if isinstance(value, float) else f"{name:10} {value}")
    return figures


def _info(arguments: argparse.Namespace) -> dict[str, Any]:
    import platform

    import warp as wp

    wp.config.log_level = wp.LOG_WARNING
    wp.init()
    packages = {}
    for name in ("warp-lang", "numpy", "trimesh", "openexr", "mitsuba", "torch", "pyglet"):
        try:
            packages[name] = version(name)
        except ImportError:
            packages[name] = "not installed"
    result = {
        "nrc": version("nrc"),
        "python": platform.python_version(),
        "packages": packages,
        "devices": {str(device): device.name for device in wp.get_devices()},
        "default_device": str(launch.resolve_device()),
        "threads": launch.threads(),
        "kernel_cache": wp.config.kernel_cache_dir,
    }
    if not arguments.json:
        for key, value in result.items():
            for i, line in enumerate([f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [value]):
                print(f"{key if i == 0 else '':16} {line}")
    return result


def _bench_cache(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc import bench

    use_threads(arguments)
    scene = _load(arguments)
    reference = read_linear(arguments.reference)
    width, height = _size(arguments, scene, reference)
    result = bench.bench_cache(
        scene,
        reference,
        width,
        height,
        {name: _tracer_config(arguments, scene, name) for name in ("path", "nrc")},
        encoding=arguments.encoding,
        seconds=arguments.seconds,
        device=arguments.device,
        out=arguments.out,
        with_mitsuba=arguments.mitsuba,
        say=say,
    )
    return {"scene": arguments.scene, **result}


def _bench_rays(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc import bench

    use_threads(arguments)
    scene = _load(arguments)
    width, height = _size(arguments, scene, None)
    config = _tracer_config(arguments, scene, "path")
    result = bench.bench_rays(scene, width, height, config, seconds=arguments.seconds, device=arguments.device, say=say)
    return {"scene": arguments.scene, **result}


def _bench_field(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.bench_field import bench_field

    use_threads(arguments)
    return bench_field(
        batch=arguments.batch,
        log2_hashmap_size=arguments.log2_hashmap_size,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        device=arguments.device,
        say=say,
    )


def _jsonable(value: Any) -> Any:
    """`value` as JSON has it: no NaN or infinity, plain numbers."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


if __name__ == "__main__":
    sys.exit(main())
