"""`nrc bench field`: the baselines are the function that ours is, and the command prints what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
import warp as wp

from nrc import bench_field, cli, launch

BATCH, LOG2_SIZE = 512, 10
# Of the range of outputs, for table entries of order 1: x * scale + 0.5 is rounded to 1/4096 of a cell at the finest,
# and an implementation may round the scale itself; another hash or order of weights would change all by as much as 1.
SAME_OUTPUT = 4e-3


@pytest.fixture(autouse=True)
def same_threads():
    """Leave the number of threads as it was."""
    yield
    launch.set_threads(0)


def start(make):
    """A contestant on the CPU, or skip with the reason why it cannot run here."""
    x, y = bench_field._data(BATCH)
    try:
        return make(x, y, LOG2_SIZE, wp.get_device("cpu"))
    except bench_field._Absent as error:
        pytest.skip(f"baseline absent: {error}")


def ours_with(rng: np.random.Generator):
    """Outputs of ours with parameters from N(0, 1) (network scaled down), its tables by level, its weight matrices."""
    ours = start(bench_field._Ours)
    field = ours._field
    params = rng.standard_normal(field.n_params).astype(np.float32)
    n_matrix = field.network.n_params
    params[:n_matrix] *= 0.2
    field.set_params(params)
    ours.infer(0)
    ours.wait()
    tables, first = [], n_matrix
    for level in range(bench_field.N_LEVELS):
        n = bench_field._level(level, 1 << LOG2_SIZE)[2] * bench_field.N_FEATURES
        tables.append(params[first : first + n].reshape(-1, bench_field.N_FEATURES))
        first += n
    assert first == field.n_params
    matrices, first = [], 0
    for shape in ((32, 64), (64, 64), (64, 3)):
        matrices.append(params[first : first + shape[0] * shape[1]].reshape(shape))
        first += shape[0] * shape[1]
    return ours.outputs().copy(), tables, matrices


def test_torch_baseline_is_the_same_function():
    """With our parameters, the PyTorch implementation gives our outputs."""
    torch_one = start(bench_field._Torch)
    torch = torch_one._torch
    expected, tables, matrices = ours_with(np.random.default_rng(0))
    with torch.no_grad():
        for theirs, table in zip(torch_one._tables, tables, strict=True):
            theirs.copy_(torch.from_numpy(table))
        for theirs, matrix in zip(torch_one._weights, matrices, strict=True):
            theirs.copy_(torch.from_numpy(matrix.T.copy()))
    torch_one.infer(0)
    assert np.ptp(expected) > 1.0
    assert np.abs(torch_one.outputs() - expected).max() < SAME_OUTPUT * np.ptp(expected)


def test_drjit_baseline_is_the_same_function():
    """With our parameters, drjit's layers give our outputs, as cooperative vectors and as tensors."""
    drjit_one = start(bench_field._DrJit)
    ad = drjit_one._ad
    expected, tables, matrices = ours_with(np.random.default_rng(0))
    grid = drjit_one._grid
    values = np.zeros((grid.n_params // 2, 2), np.float32)
    offsets = grid._level_offsets
    for table, begin, end in zip(tables, offsets[:-1], offsets[1:], strict=True):
        values[begin:end] = table[: end - begin]  # its levels are rounded up less
    drjit_one._adam["grid"] = ad.Float(values.ravel())
    names = [name for name in drjit_one._adam if name != "grid"]
    for name, matrix in zip(names, matrices, strict=True):
        drjit_one._adam[name] = ad.TensorXf(matrix.T.copy())
    drjit_one._copy_weights()
    for vectors in (False, True):
        drjit_one._vectors = vectors
        drjit_one.infer(0)
        drjit_one.wait()
        # At a level whose size was rounded differently, the entry read at the far border differs: leave those rows out
        error = np.abs(drjit_one.outputs() - expected).max(axis=1)
        assert (error < SAME_OUTPUT * np.ptp(expected)).mean() > 0.98


def test_bench_field_prints_and_returns_the_figures(capsys):
    """Throughputs, ratios, losses that fall, configuration and versions; what is absent has its reason."""
    options = ["--batch", BATCH, "--log2-hashmap-size", LOG2_SIZE, "--seconds", 0.3, "--rounds", 3, "--device", "cpu"]
    assert cli.main(["bench", "field", *map(str, options), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert "training" in printed.err and "inference" in printed.err
    present = [name for name in ("drjit", "torch") if name not in result["absent"]]
    for task in ("training", "inference"):
        figures = result[task]
        assert figures["samples_per_second"] == np.median(figures["rounds"]["ours"]) > 0.0
        assert len(figures["rounds"]["ours"]) == 3
        for name in present:
            assert figures[name] == np.median(figures["rounds"][name]) > 0.0
            ratios = np.divide(figures["rounds"]["ours"], figures["rounds"][name])
            assert figures[f"ratio_{name}"] == pytest.approx(np.median(ratios))
    assert set(result["losses"]) == {"ours", *present}
    for loss in result["losses"].values():
        assert loss["last"] < 0.5 * loss["first"]
    for name, reason in result["absent"].items():
        assert name in ("drjit", "torch") and reason
    assert result["configuration"]["encoding"]["per_level_scale"] == 1.5
    assert result["configuration"]["batch"] == BATCH and result["device"] == "cpu"
    assert result["versions"]["warp-lang"] and result["machine"] and result["threads"] >= 1


def test_missing_baseline_is_named_and_the_rest_runs(monkeypatch):
    """A package that cannot be imported: the row says why, ours is measured all the same."""

    def absent(*_arguments):
        raise bench_field._Absent("no such package")

    monkeypatch.setattr(bench_field, "_DrJit", absent)
    monkeypatch.setattr(bench_field, "_Torch", absent)
    lines: list[str] = []
    result = bench_field.bench_field(
        batch=64, log2_hashmap_size=LOG2_SIZE, seconds=0.05, rounds=1, device="cpu", say=lines.append
    )
    assert result["absent"] == {"drjit": "no such package", "torch": "no such package"}
    assert result["training"]["samples_per_second"] > 0.0 and "drjit" not in result["training"]
    assert any("drjit" in line and "no such package" in line for line in lines)


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--seconds", "-1"], ["--rounds", "x"]])
def test_bench_field_refuses_numbers_out_of_range(arguments):
    """argparse's refusal, exit code 2."""
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "field", *arguments])
    assert error.value.code == 2
