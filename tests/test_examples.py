"""The example programs do what their first lines say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from nrc.fit.views import load_views

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_photographs_of_a_scene_are_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered views load with cameras half a unit from the middle of the unit cube, all looking at it."""
    sizes = ["--views", "3", "--width", "24", "--height", "16", "--spp", "1"]
    monkeypatch.setattr(sys, "argv", ["photograph_scene.py", "cornell_box", str(tmp_path / "views"), *sizes])
    runpy.run_path(str(EXAMPLES / "photograph_scene.py"), run_name="__main__")
    views = load_views(tmp_path / "views", holdout=0)
    assert len(views) == 3 and (views.sizes == [24, 16]).all() and views.aabb_scale == 4
    to_middle = 0.5 - views.c2w[:, :, 3]
    np.testing.assert_allclose(np.linalg.norm(to_middle, axis=1), 0.5, rtol=1e-5)
    np.testing.assert_allclose(to_middle / 0.5, -views.c2w[:, :, 2], atol=1e-5)
    assert all(views.image(i)[:, :, :3].std() > 1.0 for i in range(3))
