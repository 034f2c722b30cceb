"""What commands that trace a scene share: their arguments, the scene, the picture's size, the tracer's settings."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import numpy as np

from nrc import assets
from nrc.cli_arguments import UsageError, add_device, parse_defines, positive_int
from nrc.scene import Scene


def add_scene(parser: argparse.ArgumentParser) -> None:
    """The scene and the parameters of a Mitsuba file."""
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


def add_render_options(parser: argparse.ArgumentParser) -> None:
    """Size, path lengths, cache, seed and device."""
    parser.add_argument("--width", type=positive_int, help="[px]")
    parser.add_argument("--height", type=positive_int, help="[px]")
    parser.add_argument("--max-depth", type=int, help="longest path in edges, -1 for no limit (default: the scene's)")
    parser.add_argument("--rr-depth", type=int, help="edges before Russian roulette (default: the scene's)")
    parser.add_argument("--threshold", type=float, default=0.01, help="spread c that ends a path in the cache (0.01)")
    parser.add_argument(
        "--min-spread",
        type=float,
        default=0.0,
        help="least width of a path's footprint where it may end in the cache, as a fraction of the scene's size: 0.02 "
        "to 0.08 keeps contact shadows in close-ups (0)",
    )
    parser.add_argument(
        "--record-space",
        choices=("world", "object"),
        default="world",
        help="where the cache takes a point of a moving object to be: where it is, or where it was at first (world)",
    )
    parser.add_argument("--encoding", choices=("hash", "frequency"), default="hash", help="of the cache (hash)")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)


def load_scene(arguments: argparse.Namespace) -> Scene:
    """The scene, with its warnings on standard error."""
    scene = assets.load(arguments.scene, defines=parse_defines(arguments.defines))
    for warning in scene.warnings:
        print(f"nrc: warning: {warning}", file=sys.stderr)
    if not scene.has_light:
        print("nrc: warning: nothing in this scene emits light; the picture will be black", file=sys.stderr)
    return scene


def picture_size(arguments: argparse.Namespace, scene: Scene, reference: np.ndarray | None) -> tuple[int, int]:
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


def tracer_config(arguments: argparse.Namespace, scene: Scene, integrator: Any) -> Any:
    """`PathTracerConfig`, with the scene's path lengths where none are asked for."""
    from nrc.pathtracer import PathTracerConfig

    for option in ("threshold", "min_spread"):
        value = getattr(arguments, option)
        if not math.isfinite(value):  # checkpoints and results are JSON, which has no such numbers
            raise UsageError(f"--{option.replace('_', '-')} {value:g}: expected a finite number")
    settings = scene.settings
    return PathTracerConfig(
        integrator=integrator,
        max_depth=settings.max_depth if arguments.max_depth is None else arguments.max_depth,
        rr_depth=settings.rr_depth if arguments.rr_depth is None else arguments.rr_depth,
        spread_threshold=arguments.threshold,
        min_spread=arguments.min_spread,
        record_space=arguments.record_space,
        seed=arguments.seed,
    )
