"""One command for a machine with a CUDA device: does everything agree with the CPU, and how fast is it?

    python benchmarks/gpu_report.py [--device cuda:0] [--minutes 9] [--only SECTION ...] [--out benchmarks/results]

Measures the device's ceilings (copy bandwidth, fp16 tensor-core rate), compares every kernel family with the CPU,
times encoding, inference, training, the radiance cache and the path tracer, runs the tests marked `gpu`, and writes a
JSON file and Markdown tables. Needs warp, numpy, trimesh and openexr; what a missing package or a part that is not
built prevents is skipped with the reason. What does not fit into the minutes is listed as left out. `--device cpu
--quick` runs all of it with tiny sizes, to check this program; its figures mean nothing. The exit code is 1 if anything
failed or differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp
from gpu_parity import measure_parity
from report_rows import (
    ADAM,
    GRID,
    N_OUTPUTS,
    Row,
    Section,
    Settings,
    Skipped,
    array,
    guarded,
    network,
    of_ceiling,
    public,
    say,
    seconds_per_call,
    sized,
)

import nrc
from nrc.launch import launch, prepare, resolve_device, threads

wp.set_module_options({"enable_backward": False})

ROOT = Path(__file__).resolve().parent.parent
TILE = 64  # side of the tiles of the matrix product


# --- ceilings --------------------------------------------------------------------------------------------------------


@wp.kernel
def copy(
    first: int,
    # In
    x: wp.array[wp.vec4],
    # Out
    out_x: wp.array[wp.vec4],
):
    """Copy 16 bytes. One thread per vector."""
    i = first + wp.tid()
    out_x[i] = x[i]


@wp.kernel(module="unique", module_options={"enable_backward": False})
def multiply_tiles(
    # In
    a: wp.array2d[wp.float16],
    b: wp.array2d[wp.float16],
    # Out
    out_c: wp.array2d[float],
):
    """Multiply matrices with fp16 operands and fp32 sums. One thread block per tile of the product."""
    i, j = wp.tid()
    total = wp.tile_zeros(shape=(TILE, TILE), dtype=float)
    for k in range(a.shape[1] // TILE):
        rows = wp.tile_load(a, shape=(TILE, TILE), offset=(i * TILE, k * TILE))
        columns = wp.tile_load(b, shape=(TILE, TILE), offset=(k * TILE, j * TILE))
        wp.tile_matmul(rows, columns, total)
    wp.tile_store(out_c, total, offset=(i * TILE, j * TILE))


MMA_PER_ITERATION = 8
MMA_FLOP = 2 * 16 * 8 * 16  # of one m16n8k16 instruction
MMA_SOURCE = """
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float c[8][4] = {};
    for (int i = 0; i < n; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
                : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3]) : "r"(halves));
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += c[j][0] + c[j][1] + c[j][2] + c[j][3];
    return sum;
#else
    return (float)n;
#endif
"""


@wp.func_native(MMA_SOURCE)
def repeat_mma(n: int, halves: wp.uint32) -> float: ...


@wp.kernel(module="unique", module_options={"enable_backward": False})
def saturate_tensor_cores(
    first: int,
    # Params
    n: int,
    halves: wp.uint32,
    # Out
    out_sum: wp.array[float],
):
    """Multiply the same fragments again and again, in registers. Whole warps."""
    i = first + wp.tid()
    out_sum[i] = repeat_mma(n, halves)


def measure_ceilings(settings: Settings, ceilings: dict[str, float]) -> Iterator[Row]:
    """Copy bandwidth and fp16 matrix rates; the best of the latter is what the timings are set beside."""
    device = settings.device

    def bandwidth() -> Row:
        n = sized(settings, 1 << 25, 1 << 12)  # 512 MiB
        x, y = (wp.zeros(n, dtype=wp.vec4, device=device) for _ in range(2))
        seconds = seconds_per_call(settings, lambda: launch(copy, n, inputs=[x], outputs=[y], device=device))
        ceilings["GB/s"] = 2 * 16 * n / seconds / 1e9
        return {"figure": round(ceilings["GB/s"], 1), "unit": "GB/s read and written"}

    def rate(flop: float, seconds: float) -> Row:
        figure = flop / seconds / 1e12
        ceilings["TFLOP/s"] = max(ceilings.get("TFLOP/s", 0.0), figure)
        return {"figure": round(figure, 3), "unit": "TFLOP/s"}

    def mma() -> Row:
        if device.is_cpu or device.arch < 80:
            raise Skipped("mma.sync needs a CUDA device of compute capability 8.0")
        n_threads, n = device.sm_count * 2048, 2048
        out = wp.zeros(n_threads, dtype=float, device=device)
        halves = wp.uint32(0x2C002C00)  # 1/16 twice
        seconds = seconds_per_call(
            settings, lambda: launch(saturate_tensor_cores, n_threads, inputs=[n, halves], outputs=[out], device=device)
        )
        return rate(n_threads // 32 * n * MMA_PER_ITERATION * MMA_FLOP, seconds)

    def tiles() -> Row:
        n = sized(settings, 4096, 2 * TILE)
        a, b = (wp.full((n, n), 0.0625, dtype=wp.float16, device=device) for _ in range(2))
        c = wp.zeros((n, n), dtype=float, device=device)
        inputs, dim = [a, b], [n // TILE, n // TILE]
        seconds = seconds_per_call(
            settings,
            lambda: wp.launch_tiled(multiply_tiles, dim=dim, inputs=inputs, outputs=[c], device=device, block_dim=128),
        )
        if not np.allclose(c.numpy()[:2], n * 0.0625**2):
            raise RuntimeError("the product is wrong")
        return rate(2.0 * n**3, seconds)

    def library() -> Row:
        if device.is_cpu:
            raise Skipped("a rate of CUDA devices")
        try:
            import torch
        except ImportError:
            raise Skipped("PyTorch is not installed") from None
        if not torch.cuda.is_available():
            raise Skipped("this PyTorch has no CUDA device")
        n = 8192
        a, b = (torch.full((n, n), 0.0625, dtype=torch.float16, device=wp.device_to_torch(device)) for _ in range(2))

        def multiply() -> None:
            a @ b
            torch.cuda.synchronize()

        return rate(2.0 * n**3, seconds_per_call(settings, multiply))

    for name, measure in (
        ("copy", bandwidth),
        ("mma.sync m16n8k16 in registers", mma),
        ("wp.tile_matmul", tiles),
        ("torch.matmul fp16", library),
    ):
        yield guarded(settings, {"ceiling": name}, measure)


# --- speed of the learning core --------------------------------------------------------------------------------------


def measure_encoding(settings: Settings, ceilings: dict[str, float]) -> Iterator[Row]:
    """The 3D hash grid alone: GB/s are table entries read (fp32) and outputs written."""
    for log2_size in sized(settings, (14, 19, 22), (10,)):
        config = {**GRID, "log2_hashmap_size": log2_size}
        for batch in sized(settings, [1 << n for n in (14, 16, 18, 20)], [256]):

            def encode(config: dict[str, Any] = config, batch: int = batch) -> Row:
                encoding = public("Encoding")(3, config, device=settings.device)
                x = array(np.random.default_rng(0).random((batch, 3)), settings.device)
                out = encoding.inference(x)
                seconds = seconds_per_call(settings, lambda: encoding.inference(x, out))
                n_features = config["n_levels"] * config["n_features_per_level"]
                rate = 4.0 * batch * (8 * n_features + n_features + 3) / seconds / 1e9
                return {
                    "ms": round(1e3 * seconds, 4),
                    "M samples/s": round(batch / seconds / 1e6, 2),
                    "GB/s": round(rate, 1),
                    "% of copy": of_ceiling(rate, ceilings, "GB/s"),
                }

            label = {"log2_hashmap_size": log2_size, "batch": batch}
            yield guarded(settings, label, encode)


def measure_field(settings: Settings, ceilings: dict[str, float]) -> Iterator[Row]:
    """3D hash grid (T = 2^19) and two hidden layers: inference, and the training step launched eagerly and as a graph.

    TFLOP/s count the matrix products alone, three times as many in training as in inference; GB/s the table entries
    read, and in training also their gradients read and written, 4 bytes per feature.
    """
    log2_size = sized(settings, 19, 10)
    for width in sized(settings, (32, 64, 128), (16,)):
        for batch in sized(settings, [1 << n for n in (14, 16, 18, 20)], [256]):
            label = {"width": width, "batch": batch}
            yield guarded(settings, label, partial(time_field, settings, ceilings, width, batch, log2_size))


def measure_table_sizes(settings: Settings, ceilings: dict[str, float]) -> Iterator[Row]:
    """The training step of 2^14 samples at several table sizes: what is not touched should cost little."""
    width, batch = sized(settings, (64, 1 << 14), (16, 256))
    for log2_size in sized(settings, (14, 19, 22), (10,)):
        label = {"log2_hashmap_size": log2_size, "width": width, "batch": batch}
        yield guarded(settings, label, partial(time_field, settings, ceilings, width, batch, log2_size))


def time_field(settings: Settings, ceilings: dict[str, float], width: int, batch: int, log2_size: int) -> Row:
    device = settings.device
    config = {**GRID, "log2_hashmap_size": log2_size}
    n_features = config["n_levels"] * config["n_features_per_level"]
    field = nrc.Field(3, N_OUTPUTS, config, network(width), device=device)
    trainer = nrc.Trainer(field, {"otype": "L2"}, ADAM, batch_size=batch)
    prepare({**field.kernels(), **trainer.kernels()}, device)
    rng = np.random.default_rng(0)
    x, y = array(rng.random((batch, 3)), device), array(rng.random((batch, N_OUTPUTS)), device)
    out = wp.zeros((batch, N_OUTPUTS), dtype=float, device=device)
    infer = seconds_per_call(settings, lambda: field.inference(x, out))
    step = seconds_per_call(settings, lambda: trainer.step(x, y))
    graph = None
    if device.is_cuda:
        with wp.ScopedCapture(device) as capture:
            trainer.step(x, y)
        graph = seconds_per_call(settings, lambda: wp.capture_launch(capture.graph))
    flop = 2.0 * batch * (n_features * width + width * width + width * N_OUTPUTS)
    bytes_read = 4.0 * batch * 8 * n_features
    best = min(step, graph or step)
    infer_rate, train_rate = flop / infer / 1e12, 3.0 * flop / best / 1e12
    return {
        "inference ms": round(1e3 * infer, 4),
        "M samples/s": round(batch / infer / 1e6, 2),
        "TFLOP/s": round(infer_rate, 3),
        "% of fp16": of_ceiling(infer_rate, ceilings, "TFLOP/s"),
        "GB/s": round(bytes_read / infer / 1e9, 1),
        "% of copy": of_ceiling(bytes_read / infer / 1e9, ceilings, "GB/s"),
        "training ms": round(1e3 * step, 4),
        "as graph ms": None if graph is None else round(1e3 * graph, 4),
        "training M samples/s": round(batch / best / 1e6, 2),
        "training TFLOP/s": round(train_rate, 3),
        "training % of fp16": of_ceiling(train_rate, ceilings, "TFLOP/s"),
        "training GB/s": round(3.0 * bytes_read / best / 1e9, 1),
    }


# --- speed of rendering ----------------------------------------------------------------------------------------------


def measure_cache(settings: Settings, _ceilings: dict[str, float]) -> Iterator[Row]:
    """Milliseconds per 1080p frame of tracing, asking the cache and training it."""
    width, height = sized(settings, (1920, 1080), (32, 18))
    for name in sized(settings, ("cornell_box", "ajar_room"), ("cornell_box",)):

        def frame(name: str = name) -> Row:
            renderer = nrc.Renderer(nrc.load(name), width, height, nrc.PathTracerConfig("nrc"), device=settings.device)
            renderer.prepare()
            stages, seconds = frames(settings, renderer)
            return {
                **{f"{stage} ms": round(1e3 * value, 3) for stage, value in stages.items()},
                "frames/s": round(1.0 / seconds, 2),
                "records": renderer.n_records,
            }

        label = {"scene": name, "size": f"{width}x{height}"}
        yield guarded(settings, label, frame)


def measure_paths(settings: Settings, _ceilings: dict[str, float]) -> Iterator[Row]:
    """Path tracing at 1080p: camera rays alone (one ray per sample, so M samples/s are Mrays/s), and whole paths."""
    width, height = sized(settings, (1920, 1080), (32, 18))
    for name in sized(settings, ("cornell_box", "ajar_room", "textured_court"), ("cornell_box",)):
        for max_depth in (1, 16):

            def paths(name: str = name, max_depth: int = max_depth) -> Row:
                config = nrc.PathTracerConfig("path", max_depth=max_depth)
                renderer = nrc.Renderer(nrc.load(name), width, height, config, device=settings.device)
                renderer.prepare()
                stages, _ = frames(settings, renderer)
                rate = width * height / stages["trace"] / 1e6
                return {
                    "trace ms": round(1e3 * stages["trace"], 3),
                    "M samples/s": round(rate, 2),
                    "Mrays/s": round(rate, 2) if max_depth == 1 else None,
                }

            label = {"scene": name, "size": f"{width}x{height}", "max_depth": max_depth}
            yield guarded(settings, label, paths)


def frames(settings: Settings, renderer: Any) -> tuple[dict[str, float], float]:
    """Mean seconds per frame of each stage and of the whole, after frames to warm up."""
    for _ in range(sized(settings, 8, 1)):
        renderer.frame()
    before, n = dict(renderer.stage_seconds), sized(settings, 32, 1)
    start = time.perf_counter()
    for _ in range(n):
        renderer.frame()
    seconds = (time.perf_counter() - start) / n
    return {name: (value - before[name]) / n for name, value in renderer.stage_seconds.items() if value > 0.0}, seconds


# --- tests and fits --------------------------------------------------------------------------------------------------


def run_gpu_tests(settings: Settings, _ceilings: dict[str, float]) -> Iterator[Row]:
    """The tests marked `gpu`, in a process of their own."""

    def tests() -> Row:
        if settings.device.is_cpu:
            raise Skipped("the tests marked gpu need a CUDA device")
        if importlib.util.find_spec("pytest") is None:
            raise Skipped("pytest is not installed")
        left = min(180.0, settings.deadline - time.perf_counter())
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return {"result": f"left out: not done after {left:.0f} s"}
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
        trouble = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        passed = done.returncode == 0
        return {"summary": lines[-1], "result": "passed" if passed else f"failed: {'; '.join(trouble) or lines[-1]}"}

    yield guarded(settings, {"tests": "pytest -m gpu"}, tests)


# Task, source in the folder of real data, quality that a CPU of two cores ends at, seconds
FITS = (
    ("image", "image/apollo17_pan_16810x1708.jpg", "psnr", 29.0, 30.0),
    ("sdf", "sdf/armadillo.obj", "iou", 0.995, 30.0),
    ("nerf", "nerf/lego", "psnr", 28.0, 60.0),
)


def measure_fits(settings: Settings, _ceilings: dict[str, float]) -> Iterator[Row]:
    """Quality of the offline tasks, and the training time to what a CPU reaches in minutes."""
    data = next((folder for folder in data_folders() if folder.is_dir()), None)

    def fit(task: str, source: str, quality: str, target: float, seconds: float) -> Row:
        for package in ("rasterio", "matplotlib", "safetensors", "trimesh", "scipy"):
            if importlib.util.find_spec(package) is None:
                raise Skipped(f"{package} is not installed")
        from nrc.fit import fit as run

        with tempfile.TemporaryDirectory() as folder:
            if settings.quick and task != "image":
                raise Skipped("measuring it takes long on a CPU")
            if settings.quick:
                path, seconds = ROOT / "docs" / "pictures" / "ajar_room_nrc.png", 1.0
            elif data is None:
                raise Skipped("no real data: NRC_DATA is unset")
            else:
                path = data / source
            result = run(
                task, path, out=Path(folder) / "run", seconds=seconds, device=settings.device, progress=False, say=say
            )
            lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        reached = next((line["seconds"] for line in lines if (line[quality] or 0.0) >= target), None)
        return {
            "source": path.name,
            "seconds": result["seconds"],
            "steps": result["steps"],
            "M samples/s": result["samples_per_second"] / 1e6,
            quality: result[quality],
            f"s to {quality} {target}": "not reached" if reached is None else reached,
        }

    for row in FITS:
        yield guarded(settings, {"task": row[0]}, partial(fit, *row))


def data_folders() -> list[Path]:
    """Where the folder of real data may be."""
    named = [Path(os.environ["NRC_DATA"])] if os.environ.get("NRC_DATA") else []
    return [*named, ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]


SECTIONS: dict[str, Section] = {
    "Ceilings": measure_ceilings,
    "Agreement with the CPU": measure_parity,
    "Tests marked gpu": run_gpu_tests,
    "Encoding": measure_encoding,
    "Field": measure_field,
    "Table sizes": measure_table_sizes,
    "Radiance cache": measure_cache,
    "Path tracer": measure_paths,
    "Fits": measure_fits,
}


# --- the report ------------------------------------------------------------------------------------------------------


def describe_device(device: wp.Device) -> Row:
    if device.is_cpu:
        return {"name": device.name, "alias": device.alias, "threads": threads()}
    major, minor = wp.get_cuda_driver_version()
    return {
        "name": device.name,
        "alias": device.alias,
        "compute_capability": device.arch / 10.0,
        "multiprocessors": device.sm_count,
        "memory_GiB": round(device.total_memory / 2**30, 1),
        "cuda_driver": f"{major}.{minor}",
        "cuda_toolkit": ".".join(map(str, wp.get_cuda_toolkit_version())),
    }


def describe_versions() -> Row:
    found = {"nrc": nrc.__version__, "python": platform.python_version()}
    for package in ("warp-lang", "numpy", "trimesh", "openexr", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def markdown(report: Row) -> str:
    """The report as headings and tables."""
    device = ", ".join(f"{name} {value}" for name, value in report["device"].items())
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [f"# {report['device']['name']}, {report['date']}", "", device + ".", "", versions + ".", ""]
    if report["quick"]:
        lines += ["A quick run: these figures mean nothing.", ""]
    for title, section in report["sections"].items():
        rows = section["rows"]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += [f"## {title}", "", section["about"], ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in rows:
            cells = ("" if row.get(name) is None else str(row[name]).replace("|", "/") for name in columns)
            lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda:0, ... or cpu (default: the first CUDA device)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check this program")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help="sections to run, by title"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing new begins (default: 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING
    device = resolve_device(arguments.device)
    if device.is_cpu and not (arguments.quick and arguments.device):
        parser.error("there is no CUDA device; --device cpu --quick checks this program without one")
    if not arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is not a folder")
    start = time.perf_counter()
    settings = Settings(device, arguments.quick, start + 60.0 * arguments.minutes)
    report: Row = {
        "date": date.today().isoformat(),
        "device": describe_device(device),
        "machine": platform.processor() or platform.machine(),
        "versions": describe_versions(),
        "quick": arguments.quick,
        "sections": {},
    }
    ceilings: dict[str, float] = {}
    for title in arguments.only or SECTIONS:
        section = SECTIONS[title]
        begin = time.perf_counter()
        rows = []
        for row in section(settings, ceilings):
            rows.append(row)
            say(f"[{time.perf_counter() - start:4.0f} s] {title}: " + ", ".join(f"{k} {v}" for k, v in row.items()))
        about = " ".join((section.__doc__ or "").split())
        report["sections"][title] = {"about": about, "seconds": round(time.perf_counter() - begin, 1), "rows": rows}
    report["seconds"] = round(time.perf_counter() - start, 1)
    name = "cpu_check" if device.is_cpu else re.sub(r"\W+", "_", device.name.lower()).strip("_")
    stem = arguments.out / f"{report['date']}_{name}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    results = [str(row.get("result", "")) for section in report["sections"].values() for row in section["rows"]]
    bad = [result for result in results if result.startswith(("failed", "differs"))]
    say(f"{len(results)} rows in {report['seconds']:.0f} s, {len(bad)} failed or differ: {stem}.json, {stem}.md")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
