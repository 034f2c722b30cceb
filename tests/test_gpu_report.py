"""`benchmarks/gpu_report.py` runs from end to end without a GPU, and says what agrees, failed or was left out."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warp as wp

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def modules():
    """The report's Python modules, which lie outside the package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return [importlib.import_module(name) for name in ("report_rows", "gpu_parity", "gpu_report")]
    finally:
        sys.path.pop(0)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_report_runs_on_a_cpu(tmp_path):
    """Every section, in JSON and Markdown; nothing fails or differs, what is skipped has a reason."""
    done = run("--device", "cpu", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    sections = report["sections"]
    assert list(sections) == [
        "Ceilings", "Agreement with the CPU", "Tests marked gpu", "Encoding", "Field", "Table sizes", "Radiance cache",
        "Path tracer", "Fits",
    ]  # fmt: skip
    rows = [row for section in sections.values() for row in section["rows"]]
    for row in rows:
        result = row.get("result", "agrees")
        assert result == "agrees" or (result.startswith("skipped: ") and len(result) > len("skipped: "))
    compared = {row["family"] for row in sections["Agreement with the CPU"]["rows"]}
    assert {"encoding", "activation", "field", "loss", "intersection", "path tracer", "cache"} < compared
    assert sections["Ceilings"]["rows"][0]["figure"] > 0.0
    assert sections["Field"]["rows"][0]["M samples/s"] > 0.0
    assert sections["Radiance cache"]["rows"][0]["train ms"] > 0.0
    assert report["versions"]["warp-lang"] and report["device"]["name"] and report["quick"] is True
    text = next(tmp_path.glob("*.md")).read_text()
    assert all(f"## {title}" in text for title in sections)
    assert "these figures mean nothing" in text


@pytest.mark.skipif(wp.is_cuda_available(), reason="there is a CUDA device here")
def test_report_without_a_gpu_says_what_to_do(tmp_path):
    """Exit code 2 and the way to check the program; nothing is written."""
    done = run("--out", tmp_path)
    assert done.returncode == 2 and "--device cpu --quick" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_survive_what_goes_wrong(modules):
    """A failure, a missing package, a part not built, no time left: the label and the reason, not an exception."""
    rows = modules[0]

    def raising(error: Exception):
        def row():
            raise error

        return row

    settings = rows.Settings(wp.get_device("cpu"), True, time.perf_counter() + 100.0)
    late = rows.Settings(wp.get_device("cpu"), True, time.perf_counter() - 1.0)
    label = {"case": "a"}
    assert rows.guarded(settings, label, lambda: {"ms": 1}) == {"case": "a", "ms": 1}
    for error, result in (
        (ZeroDivisionError("by zero"), "failed: ZeroDivisionError: by zero"),
        (ImportError("No module named 'x'"), "skipped: No module named 'x'"),
        (rows.Skipped("nrc.x is not built yet"), "skipped: nrc.x is not built yet"),
    ):
        assert rows.guarded(settings, label, raising(error)) == {"case": "a", "result": result}
    assert rows.guarded(late, label, lambda: {"ms": 1}) == {"case": "a", "result": "left out: time"}
    with pytest.raises(rows.Skipped, match="Telepathy"):
        rows.public("Telepathy")


def test_difference_sees_what_rounding_does_not_explain(modules):
    """Rounding and a few samples on the other side of a cell pass; an offset, a NaN, a wrong tenth do not."""
    parity = modules[1]
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((1000, 4))
    rounded = expected * (1.0 + 1e-5 * rng.standard_normal(expected.shape))
    rounded[3] += 1.0
    assert parity.relative_difference(rounded, expected) < parity.ENCODING_TOLERANCE
    wrong = expected.copy()
    wrong[:100] = 0.0
    for found in (expected + 0.1, -expected, wrong, np.where(expected > 3.0, np.nan, expected)):
        error = parity.relative_difference(found, expected)
        assert error > parity.TRAINING_TOLERANCE
        assert parity.agreement(error, parity.TRAINING_TOLERANCE, of="y")["result"] == "differs"
    assert parity.agreement(1e-4, 1e-3, of="y")["result"] == "agrees"


@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_ceiling_kernels_compile_for_cuda(modules, tmp_path, architecture):
    """NVRTC and ptxas accept the copy and the tensor-core kernel, the latter's instruction included."""
    report = modules[2]
    for kernel in (report.copy, report.saturate_tensor_cores):
        (cubin,) = wp.compile_aot_module(kernel.module, arch=architecture, module_dir=tmp_path, use_ptx=False)
        assert cubin.read_bytes()[:4] == b"\x7fELF"
