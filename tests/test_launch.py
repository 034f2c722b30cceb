"""Launching: ranges, threads, devices, first-use compilation."""

from __future__ import annotations

import time

import numpy as np
import pytest
import warp as wp

from nrc import launch as nl

wp.set_module_options({"enable_backward": False})


@wp.kernel
def count_visits(first: int, factor: float, out_count: wp.array[int], out_value: wp.array[float]):
    """Count how often each index runs. One thread per index."""
    i = first + wp.tid()
    out_count[i] = out_count[i] + 1
    x = float(i)
    for _ in range(i % 50):
        x = wp.sin(x * factor)
    out_value[i] = x


@pytest.fixture(autouse=True)
def all_threads():
    """Leave the number of threads as it was."""
    yield
    nl.set_threads(0)


def run(n: int, n_threads: int, range_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    nl.set_threads(n_threads)
    room = max(n, 0) + 3
    count = wp.zeros(room, dtype=int, device="cpu")
    value = wp.full(room, float("nan"), dtype=float, device="cpu")
    nl.launch(count_visits, n, inputs=[1.3], outputs=[count, value], device=count.device, range_size=range_size)
    return count.numpy(), value.numpy()


@pytest.mark.parametrize("n", [-1, 0, 1, 255, 256, 257, 5000, 100_001])
@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("range_size", [None, 1, 100])
def test_launch_visits_every_index_once(n, n_threads, range_size):
    """However the indices are cut into ranges, none is left out, doubled or beyond the end."""
    if range_size == 1 and n > 5000:
        n = 3001  # one launch per index
    count, value = run(n, n_threads, range_size)
    n = max(n, 0)
    assert (count[:n] == 1).all() and (count[n:] == 0).all()
    assert np.isfinite(value[:n]).all() and np.isnan(value[n:]).all()


def test_launch_gives_the_same_bits_for_every_number_of_threads():
    """The work of one index does not depend on the range it runs in."""
    values = [run(20_000, n_threads)[1] for n_threads in (1, 2, 3, 8)]
    assert all(values[0].tobytes() == other.tobytes() for other in values[1:])


def test_launch_passes_on_errors_of_ranges():
    """A wrong argument raises in the calling thread, whatever thread ran the range."""
    nl.set_threads(2)
    wrong = wp.zeros(4, dtype=float, device="cpu")
    with pytest.raises(Exception, match="out_count"):
        nl.launch(count_visits, 5000, inputs=[1.0], outputs=[wrong, wrong], device=wrong.device)
    assert (run(5000, 2)[0][:5000] == 1).all()  # and the pool still works


def test_threads_default_to_all_cores():
    """0 returns to the default; a negative number is refused and changes nothing."""
    default = nl.threads()
    assert default >= 1
    nl.set_threads(3)
    assert nl.threads() == 3
    with pytest.raises(ValueError, match="-2"):
        nl.set_threads(-2)
    assert nl.threads() == 3
    nl.set_threads(0)
    assert nl.threads() == default


def test_resolve_device_names_what_there_is():
    """A device that does not exist is one ValueError that lists those that do."""
    assert nl.resolve_device("cpu").is_cpu
    assert nl.resolve_device(wp.get_device("cpu")).is_cpu
    assert nl.resolve_device().is_cpu == (not wp.is_cuda_available())
    for name in ("cuda:99", "tpu"):
        with pytest.raises(ValueError, match=f"{name}.*cpu"):
            nl.resolve_device(name)


class _SlowModule:
    """Stands for a kernel module whose compilation takes `seconds`."""

    def __init__(self, seconds: float, result: object = 1) -> None:
        self.seconds, self.result, self.loads = seconds, result, 0

    def load(self, _device: wp.Device, _block_dim: int) -> object:
        self.loads += 1
        time.sleep(self.seconds)
        return self.result


class _Kernel:
    def __init__(self, module: _SlowModule) -> None:
        self.module = module


def test_prepare_announces_what_takes_time():
    """Slow modules are announced while they compile and timed afterwards; quick ones stay silent; each loads once."""
    slow, quick = _SlowModule(1.3), _SlowModule(0.0)
    lines: list[str] = []
    kernels = {"path tracer": _Kernel(slow), "the same": _Kernel(slow), "film": _Kernel(quick)}
    seconds = nl.prepare(kernels, wp.get_device("cpu"), lines.append)
    assert slow.loads == quick.loads == 1
    assert seconds >= 1.3
    assert len(lines) == 2 and all("path tracer" in line for line in lines)
    assert lines[0].startswith("compiling") and lines[1].startswith("compiled")


def test_prepare_reports_a_failed_module():
    """A module that does not compile is an error that names it."""
    with pytest.raises(RuntimeError, match="film"):
        nl.prepare({"film": _Kernel(_SlowModule(0.0, None))}, wp.get_device("cpu"), print)


def test_prepare_loads_real_kernels_quietly():
    """What is compiled already says nothing."""
    run(10, 1)
    lines: list[str] = []
    nl.prepare({"counting": count_visits}, wp.get_device("cpu"), lines.append)
    assert lines == []
