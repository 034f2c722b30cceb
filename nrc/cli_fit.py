"""The commands of offline fitting: `nrc fit`, `nrc eval`, `nrc export`, `nrc sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nrc.cli_arguments import add_device, positive_float, positive_int, say, use_threads
from nrc.config import load_config

ENCODINGS = ("hash", "none", "frequency", "dense", "dense-multi")
SHOWN = {"psnr": "dB", "psnr_black": "dB", "ssim": "", "iou": "", "chamfer": ""}


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the subparsers of `nrc`; returns those that take --json."""
    kinds = commands.add_parser("fit", help="fit an image, a mesh's signed distance or a radiance field")
    kinds = kinds.add_subparsers(required=True, metavar="KIND")

    image = kinds.add_parser("image", help="PNG, JPEG, TIFF, EXR or HDR of any size")
    image.add_argument("source", type=Path, metavar="FILE")
    _add_fit_options(image, "60 s", (*ENCODINGS, "acorn"))

    sdf = kinds.add_parser("sdf", help="OBJ, STL, PLY or GLB")
    sdf.add_argument("source", type=Path, metavar="MESH")
    _add_fit_options(sdf, "120 s", ENCODINGS)

    nerf = kinds.add_parser("nerf", help="photographs with cameras: transforms.json or a COLMAP model")
    nerf.add_argument("source", type=Path, metavar="FOLDER")
    _add_fit_options(nerf, "900 s", ENCODINGS)
    nerf.add_argument("--downscale", type=positive_int, default=1, help="average N x N pixels of the photographs (1)")
    for kind, parser in (("image", image), ("sdf", sdf), ("nerf", nerf)):
        parser.set_defaults(run=_fit, kind=kind)

    evaluation = commands.add_parser("eval", help="measure a snapshot of `nrc fit` again")
    evaluation.add_argument("snapshot", type=Path)
    evaluation.add_argument("--source", type=Path, help="image, mesh or folder, where it is not where it was")
    add_device(evaluation)
    evaluation.set_defaults(run=_evaluate)
    return [image, sdf, nerf, evaluation]


def _add_fit_options(parser: argparse.ArgumentParser, default: str, encodings: tuple[str, ...]) -> None:
    parser.add_argument("--steps", type=positive_int, help="stop after this many optimizer steps in all")
    parser.add_argument(
        "--seconds", type=positive_float, help=f"stop after so long, training alone (default: {default})"
    )
    parser.add_argument("--encoding", choices=encodings, default="hash", help="hash, or one to compare it with")
    parser.add_argument("--config", type=Path, help="JSON file of Instant-NGP or tiny-cuda-nn: encoding, network, ...")
    parser.add_argument("--batch-size", type=positive_int, help="rows of a step")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out", type=Path, help="folder of the run (default: SOURCE_fit)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument(
        "--checkpoint-seconds", type=positive_float, default=30.0, help="time between checkpoints (default: 30)"
    )
    add_device(parser)


COMMON = {"json", "run", "threads", "config"}


def _fit(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.fit.run import fit
    from nrc.fit.settings import ignored_blocks

    use_threads(arguments)
    options = {name: value for name, value in vars(arguments).items() if name not in COMMON}
    config = None
    if arguments.config is not None:
        config = load_config(arguments.config)
        ignored = ignored_blocks(config)
        if ignored:
            say(f"nrc: warning: {arguments.config}: not used: {', '.join(ignored)}")
    result = fit(**options, config=config)
    _show(result)
    say(f"{result['steps']} steps in {result['seconds']:.1f} s: {result['out']}")
    return result


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.fit.run import evaluate

    use_threads(arguments)
    result = evaluate(arguments.snapshot, source=arguments.source, device=arguments.device)
    _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    shown = [
        f"{name} {result[name]:.{2 if unit else 5}f}{f' {unit}' if unit else ''}"
        for name, unit in SHOWN.items()
        if result.get(name) is not None
    ]
    say(", ".join(shown))
