"""`fit_image`, `fit_sdf`, `fit_nerf` and `evaluate`: what the commands `nrc fit` and `nrc eval` do, as functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from nrc.config import one_of
from nrc.fit.job import FitError, FitJob
from nrc.launch import prepare
from nrc.snapshot import load_tensors

TASKS = {"image": "ImageTask", "sdf": "SdfTask", "nerf": "NerfTask", "acorn": "AcornTask"}  # by their modules here
KINDS = ("image", "sdf", "nerf")
SNAPSHOT_KINDS = ("nrc.field", "nrc.nerf", "nrc.acorn")
DEFAULT_SECONDS = {"image": 60.0, "sdf": 120.0, "nerf": 900.0}


def fit_image(source: str | PathLike[str], **options: Any) -> dict[str, Any]:
    """Fit an image file: PNG, JPEG, TIFF, EXR, HDR. Options, result and errors as of `fit`."""
    return fit("image", source, **options)


def fit_sdf(source: str | PathLike[str], **options: Any) -> dict[str, Any]:
    """Fit the signed distance of a mesh: OBJ, STL, PLY, GLB. Options, result and errors as of `fit`."""
    return fit("sdf", source, **options)


def fit_nerf(source: str | PathLike[str], **options: Any) -> dict[str, Any]:
    """Fit a radiance field to photographs: a folder with transforms.json or a COLMAP model, as `nrc.fit.views` reads.

    Options, result and errors as of `fit`.
    """
    return fit("nerf", source, **options)


def fit(
    kind: str,
    source: str | PathLike[str],
    *,
    out: str | PathLike[str] | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    measure: bool = True,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a signal, leaving snapshot, checkpoint, metrics and pictures in the folder `out`.

    Args:
        kind: "image", "sdf" or "nerf".
        source: File, or folder of views.
        out: Folder of the run; by default SOURCE_fit, named after the source, in the working folder.
        steps, seconds: Budget of training, whichever is spent first; `seconds` counts training alone. By default 60 s
            for an image, 120 s for a mesh, 900 s for a radiance field.
        resume: Continue from `out`/checkpoint.safetensors; budgets count what was trained before.
        checkpoint_seconds: Time between checkpoints.
        measure: Measure and draw the result; without, quality is that of the fixed small sample of `metrics.jsonl`.
        progress: Show a progress bar where standard error is a terminal.
        say: Receives lines about warnings and results; standard error by default.
        settings: Of the task: `seed`, `device`, `encoding`, `config`, `grid`, `batch_size` as `make_config` in
            `nrc.fit.settings` describes them, and those of `ImageTask`, `SdfTask` or `NerfTask` alone. An image's
            encoding may also be "acorn": `AcornTask`.

    Returns:
        What `nrc fit --json` prints: `psnr`, `ssim`, `iou`, `chamfer` where they apply, `seconds`, `steps`, `n_params`,
        `samples_per_second`, the files written, ...

    Raises:
        ValueError: A source, setting or checkpoint that cannot be used; the message names file and field.
    """
    one_of(kind, KINDS, "kind of fit")
    say = say or print_line
    if steps is None and seconds is None:
        seconds = DEFAULT_SECONDS[kind]
    source = Path(source)
    if kind == "image" and settings.get("encoding") == "acorn":
        kind = settings.pop("encoding")
    make_task = getattr(import_module(f"nrc.fit.{kind}"), TASKS[kind])
    for name in settings:
        if name not in inspect.signature(make_task).parameters:
            raise FitError(f"{name} does not apply to a fit of kind {kind}")
    if settings.get("seed", 0) < 0:
        raise FitError(f"seed must not be negative, got {settings['seed']}")
    task = make_task(source, **settings)
    for warning in task.warnings:
        say(f"warning: {warning}")
    folder = Path(f"{source.resolve().stem}_fit") if out is None else Path(out)
    job = FitJob(task, folder, checkpoint_seconds=checkpoint_seconds)
    if resume:
        job.resume()
    prepare(task.kernels(), task.device)
    if job.is_spent(steps, seconds):
        say(f"already at {task.n_steps} steps and {job.seconds:.1f} s: nothing left to train")
    elif not resume and job.checkpoint.is_file():
        say(f"warning: {folder} holds another run, which this one replaces; --resume would go on with it")
    job.run(steps=steps, seconds=seconds, progress=progress)
    measure = measure and not job.interrupted
    if measure:
        say(f"step {task.n_steps} after {job.seconds:.1f} s of training; measuring and drawing ...")
    result = job.finish(measure=measure)
    if kind == "sdf" and measure and result["chamfer"] is None:
        say("warning: the zero level is still mostly noise: no mesh was extracted, nothing was compared with it")
    return result


def evaluate(
    snapshot: str | PathLike[str], *, source: str | PathLike[str] | None = None, device: Any = None
) -> dict[str, Any]:
    """Measure the result of a fit again, from its snapshot.

    Args:
        source: Where the image, mesh or views are now, by default where they were when the fit began.

    Returns:
        What `fit` returns, without what only training knows.

    Raises:
        ValueError: A snapshot or source that cannot be used; the message names file and field.
    """
    path, config = read_snapshot(snapshot)
    entry = config.get("fit")
    if not isinstance(entry, dict) or str(entry.get("kind")) not in TASKS:
        raise FitError(f"{path}: fit: the snapshot holds a field that no fit wrote, nothing to compare it with")
    try:
        measures = import_module(f"nrc.fit.{entry['kind']}").evaluate_snapshot(path, source=source, device=device)
    except ValueError as error:
        where = str(entry.get("source"))
        if source is None and where in str(error) and not Path(where).exists():
            raise FitError(f"{error}; --source says where it is now") from error
        raise
    training = {name: entry.get(name) for name in ("seconds", "steps", "n_params")}
    return {"kind": entry["kind"], "snapshot": str(path), **training, **measures}


def read_snapshot(path: str | PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """File and configuration of a snapshot; a run's folder stands for the snapshot in it. Raises SnapshotError."""
    file = Path(path)
    if file.is_dir():
        file = file / "snapshot.safetensors"
    return file, load_tensors(file, kind=SNAPSHOT_KINDS)[1]


def print_line(line: str) -> None:
    """Print a line of the command to standard error."""
    print(f"nrc: {line}", file=sys.stderr, flush=True)
