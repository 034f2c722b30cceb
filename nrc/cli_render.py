"""The command `nrc render`: a still picture, or numbered frames of an animation."""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nrc.cli_arguments import UsageError, positive_float, positive_int, say, use_threads
from nrc.cli_scene import add_render_options, add_scene, load_scene, picture_size, tracer_config
from nrc.image import read_linear, to_srgb8, write_exr, write_image
from nrc.metrics import compare
from nrc.scene import Scene

PICTURE_FORMATS = (".exr", ".png", ".hdr")
FPS = 30.0


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of `nrc`."""
    render = commands.add_parser("render", help="render a scene")
    add_scene(render)
    add_render_options(render)
    render.add_argument("--integrator", choices=("path", "nrc", "cache"), default="nrc", help="default: nrc")
    render.add_argument("--spp", type=positive_int, help="samples per pixel, of each frame (default: the scene's)")
    render.add_argument(
        "--seconds",
        type=positive_float,
        help="stop after this long in all, compilation excluded; with --animate: for each frame",
    )
    render.add_argument(
        "--clamp",
        type=positive_float,
        help="largest component that a sample adds to a pixel, against fireflies; the energy it takes is reported "
        "(default: none)",
    )
    render.add_argument("--time", type=float, help="moment of an animated scene [s] (default: 0)")
    render.add_argument("--animate", metavar="A-B", help="frames A to B of an animated scene, as numbered pictures")
    render.add_argument("--fps", type=positive_float, help=f"frames per second of --animate (default: {FPS:g})")
    render.add_argument("--aov", action="store_true", help="add first-hit layers and views of the cache (EXR only)")
    render.add_argument(
        "--out",
        type=Path,
        help=".exr, .png or .hdr (default: SCENE.exr); an EXR gets a PNG too; with --animate: #### stands for the "
        "frame's number, a folder gets frame_####.exr (default: SCENE_####.exr)",
    )
    render.add_argument("--reference", type=Path, help="picture to compare with; its size is the default")
    render.add_argument("--resume", action="store_true", help="continue from OUT.checkpoint")
    render.set_defaults(run=_render)
    return render


def _render(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.animate is None:
        if arguments.fps is not None:
            raise UsageError("--fps needs --animate: one picture has no frames")
        return _render_picture(arguments)
    for option in ("time", "reference"):
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option} is for one picture, --animate makes many")
    return _render_frames(arguments)


def _render_picture(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.render_job import RenderJob, describe

    start = time.perf_counter()
    use_threads(arguments)
    scene = load_scene(arguments)
    if arguments.time is not None:
        if scene.animation is None:
            raise UsageError(f"--time {arguments.time:g}: nothing moves in {arguments.scene}")
        if not (arguments.time >= 0.0 and math.isfinite(arguments.time)):
            raise UsageError(f"--time {arguments.time:g}: expected seconds from 0 on")
        scene = scene.at(arguments.time)
    reference = None if arguments.reference is None else read_linear(arguments.reference)
    size = picture_size(arguments, scene, reference)
    out = arguments.out or Path(f"{Path(arguments.scene).stem}.exr")
    _check_format(arguments, out)
    _check_folder(out)
    renderer = _renderer(arguments, scene, size)
    job = RenderJob(renderer, describe(renderer), out.with_name(out.name + ".checkpoint"))
    if arguments.resume:
        job.resume()
    _say_ready(arguments, scene, renderer, time.perf_counter() - start)
    budget = _budget(arguments, scene)
    if job.is_spent(budget):
        say(f"already at {renderer.film.n_frames} samples per pixel and {job.seconds:.1f} s: nothing left to render")
    job.run(budget)

    result = {
        "out": str(out),
        **_setting(arguments, renderer),
        "spp": renderer.film.n_frames,
        "seconds": job.seconds,
        "interrupted": job.interrupted,
        **_figures(renderer),
    }
    layers = _layers(arguments, renderer)
    _write_picture(out, layers, arguments.integrator, renderer.film.n_frames, job.seconds)
    if result["invalid_samples"]:
        say(f"{result['invalid_samples']} samples were not finite or negative and were left out")
    if arguments.clamp is not None:
        say(f"--clamp {arguments.clamp:g} took {100 * result['clamped_fraction']:.2g} % of the energy")
    if reference is not None:
        figures = compare(layers["color"], reference)
        result |= {name: figures[name] for name in ("relmse", "psnr", "mean_bias")}
        say(f"relMSE {figures['relmse']:.5f}, PSNR {figures['psnr']:.2f} dB, mean {100 * figures['mean_bias']:+.2f} %")
    say(f"{result['spp']} samples per pixel in {job.seconds:.1f} s: {out}")
    return result


def _render_frames(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.animation_job import AnimationJob
    from nrc.render_job import describe

    start = time.perf_counter()
    use_threads(arguments)
    frames = _frames(arguments.animate)
    scene = load_scene(arguments)
    if scene.animation is None:
        raise UsageError(f"--animate {arguments.animate}: nothing moves in {arguments.scene}")
    out = arguments.out or Path(f"{Path(arguments.scene).stem}.exr")
    pattern = _pattern(out)
    _check_format(arguments, pattern)
    try:
        pattern.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot make folder {pattern.parent}: {error.strerror}") from error
    _check_folder(pattern)
    renderer = _renderer(arguments, scene, picture_size(arguments, scene, None))
    budget = _budget(arguments, scene)
    identity = {**describe(renderer), "spp": budget.spp, "seconds": budget.seconds, "first frame": frames[0]}
    checkpoint = pattern.with_name(pattern.name + ".checkpoint")
    job = AnimationJob(renderer, scene, arguments.fps or FPS, identity, checkpoint)
    if arguments.resume:
        job.resume()
    _say_ready(arguments, scene, renderer, time.perf_counter() - start)
    entries = []

    def exists(frame: int) -> bool:
        return all(file.exists() for file in _files(_numbered(pattern, frame)))

    def write(frame: int) -> None:
        file, spp = _numbered(pattern, frame), renderer.film.n_frames
        _write_picture(file, _layers(arguments, renderer), arguments.integrator, spp, job.seconds)
        entry = {"frame": frame, "time": job.time(frame), "out": str(file), "spp": spp, "seconds": job.seconds}
        entries.append({**entry, "clamped_fraction": renderer.film.stats()["clamped_fraction"]})

    written = job.run(frames, budget, exists, write)
    if arguments.clamp is not None and entries:
        taken = max(entry["clamped_fraction"] for entry in entries)
        say(f"--clamp {arguments.clamp:g} took at most {100 * taken:.2g} % of a frame's energy")
    if written or job.interrupted:
        say(f"wrote {len(written)} of {len(frames)} frames: {pattern}")
    else:
        say(f"already complete: all {len(frames)} frames are there, nothing left to render: {pattern}")
    return {
        "out": str(pattern),
        **_setting(arguments, renderer),
        "fps": job.fps,
        "frames": entries,
        "interrupted": job.interrupted,
        **_figures(renderer),
    }


def _frames(text: str) -> range:
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if match is None:
        raise UsageError(f"--animate {text}: expected the first and the last frame, for instance 0-239")
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise UsageError(f"--animate {text}: the first frame comes after the last")
    return range(first, last + 1)


def _pattern(out: Path) -> Path:
    """What the files of a sequence are called, with one run of # in the name for the number."""
    if out.is_dir() or not out.suffix:
        out = out / "frame_####.exr"
    if "#" not in out.name:
        out = out.with_name(f"{out.stem}_####{out.suffix}")
    if len(re.findall("#+", out.name)) > 1:
        raise UsageError(f"--out {out}: one run of # stands for the frame's number, here are several")
    return out


def _numbered(pattern: Path, frame: int) -> Path:
    return pattern.with_name(re.sub("#+", lambda run: f"{frame:0{len(run[0])}d}", pattern.name))


def _check_format(arguments: argparse.Namespace, out: Path) -> None:
    if out.suffix.lower() not in PICTURE_FORMATS:
        raise UsageError(f"--out {out}: cannot write '{out.suffix}'; one of {', '.join(PICTURE_FORMATS)}")
    if arguments.aov and out.suffix.lower() != ".exr":
        raise UsageError(f"--aov needs an .exr to hold its layers, --out is {out}")


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK) or not _accepts_files(out.parent):
        raise UsageError(f"--out {out}: cannot write into folder {out.parent}")


def _accepts_files(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _renderer(arguments: argparse.Namespace, scene: Scene, size: tuple[int, int]) -> Any:
    """A renderer with its kernels compiled."""
    from nrc.cache import CacheConfig
    from nrc.renderer import Renderer

    renderer = Renderer(
        scene,
        *size,
        tracer_config(arguments, scene, arguments.integrator),
        cache=CacheConfig(encoding=arguments.encoding),
        clamp=arguments.clamp or 0.0,
        device=arguments.device,
    )
    renderer.prepare()
    return renderer


def _say_ready(arguments: argparse.Namespace, scene: Scene, renderer: Any, seconds: float) -> None:
    size = f"{renderer.tracer.width}x{renderer.tracer.height}"
    name = scene.name or arguments.scene
    say(f"{name}: {size}, {arguments.integrator} on {renderer.device}, ready after {seconds:.1f} s")


def _budget(arguments: argparse.Namespace, scene: Scene) -> Any:
    from nrc.render_job import Budget

    return Budget(arguments.spp or (None if arguments.seconds else scene.settings.spp), arguments.seconds)


def _setting(arguments: argparse.Namespace, renderer: Any) -> dict[str, Any]:
    return {
        "width": renderer.tracer.width,
        "height": renderer.tracer.height,
        "integrator": arguments.integrator,
        "device": str(renderer.device),
    }


def _figures(renderer: Any) -> dict[str, Any]:
    figures = {"stages_ms": renderer.stages_ms(), **renderer.film.stats()}
    return figures if renderer.cache is None else {**figures, "cache": renderer.cache.stats()}


def _layers(arguments: argparse.Namespace, renderer: Any) -> dict[str, np.ndarray]:
    """The picture, and what --aov adds to it."""
    from nrc.debug_views import debug_views

    layers = {"color": renderer.image()}
    if arguments.aov:
        layers |= renderer.aovs()
        if renderer.cache is not None:
            layers |= debug_views(renderer)
    return layers


def _files(out: Path) -> tuple[Path, ...]:
    """What a picture is written as: an EXR has a PNG beside it."""
    return (out, out.with_suffix(".png")) if out.suffix.lower() == ".exr" else (out,)


def _write_picture(out: Path, layers: dict[str, np.ndarray], integrator: str, spp: int, seconds: float) -> None:
    _, *beside = _files(out)
    if not beside:
        write_image(out, layers["color"])
        return
    write_image(beside[0], to_srgb8(layers["color"]))
    write_exr(out, layers, {"nrc.integrator": integrator, "nrc.spp": spp, "nrc.seconds": seconds})
