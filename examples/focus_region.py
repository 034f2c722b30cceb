"""Online adaptivity: train on a whole image, then draw most samples from one region and watch it sharpen.

    python examples/focus_region.py photo.jpg --region 600 400 800 600

The region's table entries, network weights and moments are those of the whole image: nothing is allocated or restarted
when the focus moves, and the field goes on learning the rest from one sample in ten.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from nrc.fit.image import ImageTask

DEFAULT_IMAGE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "ajar_room_nrc.png"


def psnr_by_region(task: ImageTask, region: tuple[int, int, int, int]) -> dict[str, float]:
    """PSNR [dB] of the pixels inside and outside of (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = region
    inside = np.zeros((task.source.height, task.source.width), bool)
    inside[y0:y1, x0:x1] = True
    reference = task.source.shown(task.source.pixels)
    shown = np.concatenate([strip for _, strip in task.fitted.strips()])
    square = np.square(np.clip(shown[..., : task.source.n_colors], 0.0, 1.0) - reference).mean(axis=2)
    return {
        name: float(-10.0 * np.log10(square[where].mean()))
        for name, where in (("inside", inside), ("outside", ~inside))
    }


def focus_region(
    image: Path,
    region: tuple[int, int, int, int] | None = None,
    *,
    steps: int = 300,
    focus_steps: int = 300,
    log2_hashmap_size: int = 12,
    batch_size: int = 1 << 14,
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Train `steps` steps on the image, then `focus_steps` on the region; the PSNR inside and outside after both.

    Args:
        region: (x0, y0, x1, y1) [px]; the middle ninth by default.
        log2_hashmap_size: Small enough that regions compete for the table's entries.
    """
    task = ImageTask(image, device=device, batch_size=batch_size, grid={"log2_hashmap_size": log2_hashmap_size})
    width, height = task.source.width, task.source.height
    region = region or (width // 3, height // 3, 2 * width // 3, 2 * height // 3)
    for _ in range(steps):
        task.step()
    before = psnr_by_region(task, region)
    task.focus = region
    for _ in range(focus_steps):
        task.step()
    return {"before": before, "after": psnr_by_region(task, region)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?", default=DEFAULT_IMAGE)
    parser.add_argument("--region", type=int, nargs=4, metavar=("X0", "Y0", "X1", "Y1"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--focus-steps", type=int, default=300)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    region = tuple(arguments.region) if arguments.region else None
    result = focus_region(
        arguments.image, region, steps=arguments.steps, focus_steps=arguments.focus_steps, device=arguments.device
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
