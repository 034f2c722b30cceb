"""The one place that launches kernels: device choice, CPU threads, and first-use compilation.

A Warp launch on the CPU runs on one thread but releases the interpreter lock, so the CPU path splits the leading
dimension into ranges and runs them on a thread pool. Every kernel launched from here therefore takes the index of its
range's first element as its first parameter and is one-dimensional::

    @wp.kernel
    def scale(first: int, factor: float, out_x: wp.array[float]):
        i = first + wp.tid()
        out_x[i] = factor * out_x[i]

    launch(scale, n, inputs=[2.0], outputs=[x], device=device)

Two ranges must never write the same address: CPU atomics are plain read-modify-writes. A kernel that keeps to that
gives the same bits for every number of threads, because the work of one index does not depend on its range.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import warp as wp

MIN_RANGE = 2048  # of a cheap kernel's indices, below which starting a range costs more than its work

_pool: ThreadPoolExecutor | None = None
_n_threads = 0
_lock = threading.Lock()


def threads() -> int:
    """Number of CPU threads that launches use: `set_threads`, or all cores this process may run on."""
    return _n_threads or _available_cores()


def set_threads(n_threads: int) -> None:
    """Use `n_threads` CPU threads from now on; 0 returns to all cores. Raises ValueError for a negative number."""
    global _n_threads, _pool
    if n_threads < 0:
        raise ValueError(f"threads must be 0 (all cores) or positive, got {n_threads}")
    with _lock:
        _n_threads = n_threads
        if _pool is not None:
            _pool.shutdown()
            _pool = None


def resolve_device(device: Any = None) -> wp.Device:
    """The Warp device for a name, a Device of Warp or torch, or None: the first CUDA device, else the CPU."""
    if device is None:
        device = "cuda:0" if wp.is_cuda_available() else "cpu"
    try:
        return wp.get_device(device if isinstance(device, wp.Device) else str(device))
    except (ValueError, RuntimeError) as error:
        names = ", ".join(str(d) for d in wp.get_devices())
        raise ValueError(f"unknown device {device!r}; available: {names}") from error


def launch(
    kernel: wp.Kernel,
    n: int,
    *,
    inputs: Sequence[Any],
    outputs: Sequence[Any] = (),
    device: wp.Device,
    range_size: int | None = None,
) -> None:
    """Run `kernel` for indices 0 ... n-1 on `device`, spread over all CPU cores or as one CUDA launch.

    Args:
        kernel: One-dimensional kernel whose first parameter is `first: int`. Its module's option `block_dim` is the
            number of CUDA threads per block, 256 by default.
        n: Number of indices.
        inputs, outputs: The kernel's other parameters in order.
        range_size: CPU only. Indices per range: `heavy_range(n)` where each index is much work, 1 where it is a block
            of work; by default as many ranges as threads.
    """
    if n <= 0:
        return
    if not device.is_cpu:
        block_dim = kernel.module.options["block_dim"]
        wp.launch(kernel, dim=n, inputs=[0, *inputs], outputs=list(outputs), device=device, block_dim=block_dim)
        return
    n_threads = threads()
    if range_size is None:
        range_size = max(MIN_RANGE, -(-n // n_threads))
    if n_threads == 1 or n <= range_size:
        wp.launch(kernel, dim=n, inputs=[0, *inputs], outputs=list(outputs), device=device)
        return

    kernel.module.load(device, 1)  # compile once, not once per thread

    begins = iter(range(0, n, range_size))  # which all threads, this one too, take from

    def run() -> None:
        for first in begins:
            count = min(range_size, n - first)
            wp.launch(
                kernel, dim=count, inputs=[first, *inputs], outputs=list(outputs), device=device, record_tape=False
            )

    others = [_executor().submit(run) for _ in range(min(n_threads, -(-n // range_size)) - 1)]
    try:
        run()
    finally:
        wait(others)
    for other in others:
        other.result()


def heavy_range(n: int) -> int:
    """Indices per CPU range where each index is much work: several ranges per thread even out their differences."""
    return max(1, n // (8 * threads()))


def prepare(kernels: Mapping[str, wp.Kernel], device: wp.Device, report: Callable[[str], None] | None = None) -> float:
    """Compile (or load from Warp's cache) the modules of `kernels`, side by side, and say what takes time.

    Args:
        kernels: Kernels by the name to announce them with; kernels of one module share a compilation.
        report: Receives one line per compiled module; standard error by default.

    Returns:
        Wall-clock seconds.
    """
    say = report or _say
    start = time.perf_counter()
    named: dict[Any, str] = {}
    for name, kernel in kernels.items():
        named.setdefault(kernel.module, name)

    def load(item: tuple[Any, str]) -> None:
        module, name = item
        begin = time.perf_counter()
        timer = threading.Timer(
            1.0, say, [f"compiling {name} for {device} (first use, kept in Warp's kernel cache) ..."]
        )
        timer.start()
        try:
            if module.load(device, 1 if device.is_cpu else module.options["block_dim"]) is None:
                raise RuntimeError(
                    f"kernel module '{name}' failed to compile for {device}; Warp's output above has the reason"
                )
        finally:
            timer.cancel()
        elapsed = time.perf_counter() - begin
        if elapsed > 1.0:
            say(f"compiled {name} in {elapsed:.1f} s")

    with ThreadPoolExecutor(max(1, min(len(named), _available_cores()))) as pool:
        list(pool.map(load, named.items()))
    return time.perf_counter() - start


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(threads(), thread_name_prefix="nrc")
        return _pool
