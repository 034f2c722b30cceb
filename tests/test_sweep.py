"""Sweeps: every combination once, rows kept on disk, resuming, the plot."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import nrc.fit.sweeps as sweeps
from nrc.fit.job import FitError
from nrc.fit.sweeps import COLUMNS, sweep, table_markdown

SIZES = {"log2_hashmap_size": [10, 12], "n_features": [1, 2], "n_levels": [4]}
BUDGET = {"steps": 12, "batch_size": 256, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of 64 x 48 pixels."""
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    path = tmp_path_factory.mktemp("source") / "picture.png"
    Image.fromarray((128 + 90 * np.sin(x / 5) * np.cos(y / 4)).astype(np.uint8)).save(path)
    return path


def read_table(folder):
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_sweep_runs_every_combination_and_resumes(picture, tmp_path, monkeypatch):
    """Four rows in order; a sweep that dies in its third run keeps two and then repeats the uninterrupted table."""
    lines = []
    rows = sweep("image", picture, out=tmp_path / "whole", say=lines.append, **SIZES, **BUDGET)
    sizes = [(row["log2_hashmap_size"], row["n_features_per_level"], row["n_levels"]) for row in rows]
    assert sizes == [(10, 1, 4), (10, 2, 4), (12, 1, 4), (12, 2, 4)]
    assert all(row["steps"] == 12 and row["psnr"] > 5.0 for row in rows)
    assert rows[0]["n_params"] < rows[1]["n_params"] and len(set(row["n_params"] for row in rows)) > 2
    assert [line[:3] for line in lines if "/4 " in line] == ["1/4", "2/4", "3/4", "4/4"]
    table = read_table(tmp_path / "whole")
    assert list(table[0]) == list(COLUMNS) and [float(row["psnr"]) for row in table] == [row["psnr"] for row in rows]

    real, calls = sweeps.fit, []

    def dying(*arguments, **options):
        calls.append(options["grid"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(sweeps, "fit", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep("image", picture, out=tmp_path / "cut", say=lines.append, **SIZES, **BUDGET)
    assert len(read_table(tmp_path / "cut")) == 2
    again = sweep("image", picture, out=tmp_path / "cut", resume=True, say=lines.append, **SIZES, **BUDGET)
    assert len(calls) == 5  # the third and fourth run
    for row, expected in zip(again, rows, strict=True):
        assert all(row[name] == expected[name] for name in ("psnr", "ssim", "n_params", "steps"))
    assert (tmp_path / "cut" / "table.md").read_text().count("\n") == 6
    with Image.open(tmp_path / "cut" / "plot.png") as plot:
        assert plot.size == (1200, 540)


def test_resume_refuses_another_sweep(picture, tmp_path):
    """Other budgets, and folders without a sweep, are named; a new sweep discards what an older one finished."""
    with pytest.raises(FitError, match="no sweep to resume"):
        sweep("image", picture, out=tmp_path, resume=True, **SIZES, **BUDGET)
    sizes = {"log2_hashmap_size": [10], "n_features": [2], "n_levels": [4]}
    first = sweep("image", picture, out=tmp_path, say=str, **sizes, **BUDGET)
    with pytest.raises(FitError, match=r"steps \(12 there, 3 here\)"):
        sweep("image", picture, out=tmp_path, resume=True, **sizes, **(BUDGET | {"steps": 3}))
    second = sweep("image", picture, out=tmp_path, say=str, **sizes, **(BUDGET | {"steps": 3}))
    assert (first[0]["steps"], second[0]["steps"]) == (12, 3)
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 3


def test_interrupted_run_is_continued(picture, tmp_path):
    """A result that says it was interrupted is no row: the run goes on to its budget."""
    sizes = {"log2_hashmap_size": [10], "n_features": [2], "n_levels": [4]}
    whole = sweep("image", picture, out=tmp_path, say=str, **sizes, **BUDGET)
    path = next(tmp_path.glob("*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"interrupted": True, "psnr": 0.5}))
    again = sweep("image", picture, out=tmp_path, resume=True, say=str, **sizes, **BUDGET)
    assert again[0]["psnr"] == whole[0]["psnr"] and not json.loads(path.read_text())["interrupted"]


def test_table_leaves_out_columns_without_values():
    """Markdown of the columns that apply, in their order."""
    rows = [{"n_levels": 8, "psnr": 30.125, "n_params": 12345, "iou": None}, {"n_levels": 16, "n_params": 5}]
    assert table_markdown(rows, COLUMNS).splitlines() == [
        "| n_levels | psnr | n_params |",
        "| --- | --- | --- |",
        "| 8 | 30.12 | 12,345 |",
        "| 16 |  | 5 |",
    ]
