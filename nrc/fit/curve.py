"""The training curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nrc.files import write_atomically

LABELS = {"psnr": "PSNR [dB]", "iou": "1 - IoU"}


def draw_curve(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Loss and quality against training time, from the lines of `metrics.jsonl`. Raises ValueError: not writable."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("training time [s]")
    axes.set_ylabel("loss", color="C0")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)

    def column(name: str) -> np.ndarray:
        return np.array([line.get(name) for line in metrics], float)  # null is NaN, which is left out

    axes.plot(column("seconds"), column("loss"), color="C0", alpha=0.7)
    for name, label in LABELS.items():
        if metrics and name in metrics[-1]:
            right = axes.twinx()
            right.set_ylabel(label, color="C1")
            values = column(name)
            if name == "iou":
                right.set_yscale("log")
                values = np.maximum(1.0 - values, 1e-6)
            right.plot(column("seconds"), values, color="C1", marker=".")
    if metrics:
        axes.set_title(f"{metrics[-1]['step']} steps")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
