"""The command `nrc view`."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

from nrc.cli_arguments import UsageError, add_device, parse_defines, positive_float, positive_int, say, use_threads

SIZE = re.compile(r"(\d+)x(\d+)")


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of `nrc`."""
    view = commands.add_parser("view", help="look at a scene, image, mesh, radiance field or snapshot while it trains")
    view.add_argument(
        "source",
        nargs="?",
        default="cornell_box",
        help="scene (built-in name or file), image, mesh, folder of photographs, snapshot (default: cornell_box)",
    )
    view.add_argument(
        "--as", dest="kind", choices=("scene", "image", "sdf", "nerf"), help="what to take the source for"
    )
    view.add_argument("--window", type=_size, default=(1280, 720), metavar="WxH", help="size of the window (1280x720)")
    view.add_argument("--size", type=_size, metavar="WxH", help="of the picture [px] (default: adapts to --fps)")
    view.add_argument("--fps", type=positive_float, help="frames per second to aim at (10 on a CPU, 60 on CUDA)")
    view.add_argument("--integrator", choices=("path", "nrc", "cache"), default="nrc", help="of a scene (nrc)")
    view.add_argument("--encoding", choices=("hash", "frequency"), default="hash", help="of the cache (hash)")
    view.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE", help="of a Mitsuba XML")
    view.add_argument("--reference", type=Path, help="picture to measure a scene against; its size is the default")
    view.add_argument("--time", type=float, help="moment of an animated scene to begin at [s] (default: 0)")
    view.add_argument("--play", action="store_true", help="let an animated scene play from the start")
    view.add_argument("--frames", type=positive_int, help="exit after this many pictures")
    view.add_argument("--screenshot", type=Path, help="write the window at the end (.png)")
    view.add_argument("--viewport-screenshot", type=Path, help="write the picture alone (.png, or linear .exr)")
    view.add_argument("--headless", action="store_true", help="without a display: EGL, or no window at all")
    view.add_argument("--no-panels", action="store_true", help="begin with closed panels")
    add_device(view)
    view.set_defaults(run=_view)
    return view


def _view(arguments: argparse.Namespace) -> dict[str, Any]:
    use_threads(arguments)
    for option in ("screenshot", "viewport_screenshot"):
        path = getattr(arguments, option)
        if path is not None and arguments.frames is None:
            raise UsageError(f"--{option.replace('_', '-')} needs --frames: when to take it")
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"--{option.replace('_', '-')} {path}: folder {path.parent} does not exist")
    if arguments.time is not None and not (arguments.time >= 0.0 and math.isfinite(arguments.time)):
        raise UsageError(f"--time {arguments.time:g}: expected seconds from 0 on")
    if arguments.headless and arguments.frames is None:
        raise UsageError("--headless needs --frames: there is no window to close")
    try:
        from nrc.viewer.command import view
    except ModuleNotFoundError as error:
        raise UsageError(f"the viewer needs {error.name}: pip install 'nrc[viewer]'") from error
    return view(
        arguments.source,
        window_size=arguments.window,
        size=arguments.size,
        fps=arguments.fps,
        n_pictures=arguments.frames,
        screenshot=arguments.screenshot,
        viewport_screenshot=arguments.viewport_screenshot,
        reference=arguments.reference,
        headless=arguments.headless,
        panels=not arguments.no_panels,
        start_time=arguments.time,
        play=arguments.play,
        say=say,
        kind=arguments.kind,
        defines=parse_defines(arguments.defines),
        integrator=arguments.integrator,
        encoding=arguments.encoding,
        device=arguments.device,
    )


def _size(text: str) -> tuple[int, int]:
    match = SIZE.fullmatch(text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= length <= 16384 for length in size):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, 1 to 16384 each, got {text}")
    return size
