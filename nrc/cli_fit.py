"""The commands of offline fitting: `nrc fit`, `nrc eval`, `nrc export`, `nrc sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nrc.cli_arguments import add_device, positive_float, positive_int, say, use_threads
from nrc.config import load_config
from nrc.fit.settings import ENCODINGS, ignored_blocks

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
    nerf.add_argument(
        "--holdout", type=int, metavar="N", help="test with every Nth view (default: the data's test views, else 8)"
    )
    nerf.add_argument("--exposure", action="store_true", help="learn a gain of each photograph and channel")
    _add_crop(nerf)
    for kind, parser in (("image", image), ("sdf", sdf), ("nerf", nerf)):
        parser.set_defaults(run=_fit, kind=kind)

    evaluation = commands.add_parser("eval", help="measure a snapshot of `nrc fit` again")
    evaluation.add_argument("snapshot", type=Path, help="file, or folder of the run")
    evaluation.add_argument("--source", type=Path, help="image, mesh or folder, where it is not where it was")
    add_device(evaluation)
    evaluation.set_defaults(run=_evaluate)

    exported = commands.add_parser("export", help="crop, mesh, view or frames from a snapshot of `nrc fit`")
    exported.add_argument("snapshot", type=Path, help="file, or folder of the run")
    exported.add_argument(
        "--out", type=Path, required=True, help="picture, mesh (.ply, .obj, .glb) or folder of frames"
    )
    exported.add_argument(
        "--region", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="image: part to write [px]"
    )
    exported.add_argument("--zoom", type=positive_float, help="image: pixels per pixel of the source (1)")
    exported.add_argument("--resolution", type=positive_int, help="mesh: cells along the longest side (256)")
    exported.add_argument("--view", type=int, help="nerf: test view to render (0)")
    exported.add_argument("--camera-path", type=Path, help="nerf: JSON file of keyframes; --out is a folder")
    exported.add_argument("--frames", type=positive_int, help="nerf: number of frames along the path (60)")
    exported.add_argument("--width", type=positive_int, help="nerf: of pictures [px]")
    exported.add_argument("--height", type=positive_int, help="nerf: of pictures [px]")
    exported.add_argument("--background", type=float, help="nerf: grey behind what is not opaque (1)")
    exported.add_argument("--source", type=Path, help="nerf: folder of the views, where it is not where it was")
    _add_crop(exported)
    add_device(exported)
    exported.set_defaults(run=_export)

    swept = commands.add_parser("sweep", help="fit with several sizes of the hash grid: table and plot")
    swept.add_argument("kind", choices=("image", "sdf", "nerf"))
    swept.add_argument("source", type=Path)
    for option, default, text in (
        ("--log2-hashmap-size", [14, 16, 18], "entries per level, as powers of two"),
        ("--n-features", [2], "features per entry"),
        ("--n-levels", [16], "levels"),
    ):
        shown = " ".join(map(str, default))
        swept.add_argument(option, type=positive_int, nargs="+", default=default, help=f"{text} (default: {shown})")
    swept.add_argument("--steps", type=positive_int, help="optimizer steps of each run")
    swept.add_argument("--seconds", type=positive_float, help="training time of each run (default: as of nrc fit)")
    swept.add_argument("--config", type=Path, help="JSON file of Instant-NGP or tiny-cuda-nn")
    swept.add_argument("--batch-size", type=positive_int, help="rows of a step")
    swept.add_argument("--seed", type=int, default=1337)
    swept.add_argument("--downscale", type=positive_int, help="nerf: average N x N pixels of the photographs")
    swept.add_argument("--out", type=Path, help="folder of the sweep (default: SOURCE_sweep)")
    swept.add_argument("--resume", action="store_true", help="keep finished runs, continue the one cut off")
    add_device(swept)
    swept.set_defaults(run=_sweep)
    return [image, sdf, nerf, evaluation, exported, swept]


def _add_crop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--crop",
        type=float,
        nargs=6,
        metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="nerf: box to stay in; the cameras look at the unit cube, (0.5, 0.5, 0.5) is the middle",
    )


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
    parser.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="leave measuring and drawing to nrc eval and nrc export",
    )
    add_device(parser)


NOT_OPTIONS = ("json", "run", "threads", "config")


def _fit(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.fit.run import fit

    use_threads(arguments)
    config = None if arguments.config is None else _read_config(arguments.config)
    result = fit(**_options(arguments), config=config)
    _show(result)
    say(f"{result['steps']} steps in {result['seconds']:.1f} s: {result['out']}")
    return result


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.fit.run import evaluate

    use_threads(arguments)
    result = evaluate(arguments.snapshot, source=arguments.source, device=arguments.device)
    _show(result)
    return result


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.fit.exports import export

    use_threads(arguments)
    result = export(**{name: value for name, value in _options(arguments).items() if value is not None})
    about = ", ".join(f"{name} {value}" for name, value in result.items() if name not in ("kind", "out"))
    say(f"{result['out']}: {about}" if about else result["out"])
    return result


def _sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    from nrc.fit.sweeps import sweep

    use_threads(arguments)
    options = {name: value for name, value in _options(arguments).items() if value is not None}
    if arguments.config is not None:
        options["config"] = _read_config(arguments.config)
    options.setdefault("out", Path(f"{arguments.source.resolve().stem}_sweep"))
    rows = sweep(**options)
    say(f"table.csv, table.md and plot.png are in {options['out']}")
    return {"out": str(options["out"]), "rows": rows}


def _read_config(path: Path) -> dict[str, Any]:
    config = load_config(path)
    ignored = ignored_blocks(config)
    if ignored:
        say(f"nrc: warning: {path}: not used: {', '.join(ignored)}")
    return config


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are a function's options."""
    options = {name: value for name, value in vars(arguments).items() if name not in NOT_OPTIONS}
    if options.get("crop") is not None:
        options["crop"] = (options["crop"][:3], options["crop"][3:])
    return options


def _show(result: dict[str, Any]) -> None:
    shown = [
        f"{name} {result[name]:.{2 if unit else 5}f}{f' {unit}' if unit else ''}"
        for name, unit in SHOWN.items()
        if result.get(name) is not None
    ]
    say(", ".join(shown))
