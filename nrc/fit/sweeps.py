"""`sweep`: one fit after the other over sizes of the hash grid, as a table and a plot.

The sweep's folder holds `table.csv`, `table.md`, `plot.png` (all written after every run), `settings.json`, and per run
a folder of `nrc.fit.run.fit`, whose `result.json` says that it is finished.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

from nrc.files import write_atomically
from nrc.fit.job import QUALITIES, FitError
from nrc.fit.run import fit, print_line

GRID = {"log2_hashmap_size": "T2^", "n_features_per_level": "F", "n_levels": "L"}  # in folders' names
MEASURES = (*QUALITIES, "ssim", "psnr_black", "n_params", "steps", "seconds", "samples_per_second")
COLUMNS = (*GRID, *MEASURES)
HEADINGS = {"psnr": "PSNR [dB]", "iou": "1 - IoU", "n_params": "parameters", "seconds": "training time [s]"}


def sweep(
    kind: str,
    source: str | PathLike[str],
    *,
    out: str | PathLike[str],
    log2_hashmap_size: Sequence[int] = (14, 16, 18),
    n_features: Sequence[int] = (2,),
    n_levels: Sequence[int] = (16,),
    steps: int | None = None,
    seconds: float | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Fit `source` with every combination of the grid's sizes, each with the same budget.

    Args:
        kind: "image", "sdf" or "nerf".
        source, settings: Of `nrc.fit.run.fit`, but for `grid` and `encoding`.
        out: Folder of the sweep.
        log2_hashmap_size, n_features, n_levels: Values of the grid's `log2_hashmap_size`, `n_features_per_level` and
            `n_levels`.
        steps, seconds: Budget of each run; by default that of `fit`.
        resume: Keep the runs in `out` that are finished and continue one that was cut off.
        say: Receives a line per run and the table; standard error by default.

    Returns:
        Rows of the table: the grid's sizes, `psnr` or `iou` and what else applies, `n_params`, `steps`, `seconds`,
        `samples_per_second`.

    Raises:
        ValueError: What `fit` raises; with `resume`, a folder of other settings.
        KeyboardInterrupt: Ctrl-C, after the state of the run under way was saved.
    """
    say = say or print_line
    folder = Path(out)
    grids = [dict(zip(GRID, values, strict=True)) for values in product(log2_hashmap_size, n_features, n_levels)]
    runs = [folder / "_".join(f"{short}{grid[name]}" for name, short in GRID.items()) for grid in grids]
    about = {"kind": kind, "source": str(Path(source).resolve()), "steps": steps, "seconds": seconds, **settings}
    _start(folder, json.loads(json.dumps(about, default=str)), runs, resume)
    rows: list[dict[str, Any]] = []
    for i, (grid, run) in enumerate(zip(grids, runs, strict=True), 1):
        done = run / "result.json"
        result = json.loads(done.read_text()) if done.is_file() else {"interrupted": True}
        if result["interrupted"]:
            cut_off = (run / "checkpoint.safetensors").is_file()
            budget: dict[str, Any] = {"steps": steps, "seconds": seconds, "resume": cut_off}
            result = fit(kind, source, out=run, grid=grid, progress=progress, say=say, **budget, **settings)
            if result["interrupted"]:
                say(f"interrupted in run {i} of {len(grids)}; --resume continues there")
                raise KeyboardInterrupt
        rows.append(grid | {name: result.get(name) for name in MEASURES})
        _write(folder / "table.csv", _csv(rows))
        shown = ", ".join(f"{name} {_shown(name, rows[-1][name])}" for name in MEASURES if rows[-1][name] is not None)
        say(f"{i}/{len(grids)} {run.name}: {shown}")
        _write(folder / "table.md", table_markdown(rows, COLUMNS))
        draw_sweep(folder / "plot.png", rows)
    return rows


def _start(folder: Path, about: dict[str, Any], runs: Sequence[Path], resume: bool) -> None:
    """Make the folder ready: one of the same settings to resume, else one without results of these runs."""
    path = folder / "settings.json"
    if resume:
        try:
            theirs = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise FitError(f"{path}: no sweep to resume ({error})") from error
        differing = [name for name in sorted({*about, *theirs}) if about.get(name) != theirs.get(name)]
        if differing:
            listed = ", ".join(f"{name} ({theirs.get(name)} there, {about.get(name)} here)" for name in differing)
            raise FitError(f"{path}: belongs to another sweep: {listed}")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            for name in ("result.json", "checkpoint.safetensors"):
                (run / name).unlink(missing_ok=True)
    except OSError as error:
        raise FitError(f"{folder}: cannot be used ({error.strerror})") from error
    _write(path, json.dumps(about, indent=2) + "\n")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}" if name == "n_params" else str(value)
    digits = {"psnr": 2, "psnr_black": 2, "seconds": 1, "samples_per_second": 0}.get(name, 4)
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text), FitError)


def table_markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as a Markdown table of the columns that any row has."""
    used = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [used, ["---"] * len(used), *([_shown(name, row.get(name)) for name in used] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_sweep(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Quality against parameters and time, a line per F and L, points marked with T. Raises FitError: not writable."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = dict(zip(("n_params", "seconds"), figure.subplots(1, 2, sharey=True), strict=True))
    left, right = panels.values()
    left.set_xscale("log")
    for name, axes in panels.items():
        axes.set_xlabel(HEADINGS[name])
        axes.grid(alpha=0.3)
    quality = next((name for name in QUALITIES if any(row[name] is not None for row in rows)), "psnr")
    left.set_ylabel(HEADINGS[quality])
    if quality == "iou":
        left.set_yscale("log")
    lines: dict[tuple[int, int], list[tuple[Mapping[str, Any], float]]] = {}
    for row in rows:
        y = math.nan if row[quality] is None else row[quality]
        y = max(1.0 - y, 1e-6) if quality == "iou" else y
        lines.setdefault((row["n_features_per_level"], row["n_levels"]), []).append((row, y))
    for i, ((n_features, n_levels), points) in enumerate(sorted(lines.items())):
        style: dict[str, Any] = {"marker": "osD^v<>*"[i % 8], "color": f"C{i % 10}", "markersize": 5}
        style["label"] = f"F = {n_features}, L = {n_levels}"
        for name, axes in panels.items():
            axes.plot([row[name] for row, _ in points], [y for _, y in points], **style)
            for row, y in points:
                at = (row[name], y)
                axes.annotate(f"2^{row['log2_hashmap_size']}", at, (4, 4), textcoords="offset points", fontsize=6)
    if lines:
        right.legend(fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120), FitError)
