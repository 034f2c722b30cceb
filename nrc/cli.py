"""The `nrc` command."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nrc import assets, cli_fit, cli_render, cli_view, launch
from nrc.cli_arguments import add_device, positive_float, positive_int, say, use_threads
from nrc.cli_scene import add_render_options, add_scene, load_scene, picture_size, tracer_config
from nrc.image import read_linear, write_image
from nrc.metrics import compare, difference_picture


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

    render = cli_render.add_command(commands)

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
    add_scene(cache)
    add_render_options(cache)
    cache.add_argument("--seconds", type=positive_float, default=20.0, help="for each of the two (default: 20)")
    cache.add_argument("--reference", type=Path, required=True, help="converged picture of the same size")
    cache.add_argument("--out", type=Path, help="folder for path.exr and nrc.exr")
    cache.add_argument("--mitsuba", action="store_true", help="also Mitsuba's path integrator (llvm_ad_rgb), same time")
    cache.set_defaults(run=_bench_cache)
    rays = bench.add_parser("rays", help="path tracing throughput beside Mitsuba's")
    add_scene(rays)
    add_render_options(rays)
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
    scene = load_scene(arguments)
    reference = read_linear(arguments.reference)
    width, height = picture_size(arguments, scene, reference)
    result = bench.bench_cache(
        scene,
        reference,
        width,
        height,
        {name: tracer_config(arguments, scene, name) for name in ("path", "nrc")},
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
    scene = load_scene(arguments)
    width, height = picture_size(arguments, scene, None)
    config = tracer_config(arguments, scene, "path")
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
