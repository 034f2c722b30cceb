"""What the sections of `gpu_report.py` share: settings, rows that survive a failure, timing, configurations."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import warp as wp

import nrc

ADAM = {"otype": "Adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15}
GRID = {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "base_resolution": 16, "per_level_scale": 1.5}
N_OUTPUTS = 3


class Skipped(Exception):
    """Something cannot be done here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What the sections need to know."""

    device: wp.Device
    quick: bool
    deadline: float  # of time.perf_counter

    def out_of_time(self) -> bool:
        return time.perf_counter() > self.deadline


Row = dict[str, Any]
# Figures measured before (by name), for later sections; and the rows of this one
Section = Callable[[Settings, dict[str, float]], Iterator[Row]]


def seconds_per_call(settings: Settings, call: Callable[[], object]) -> float:
    """Median over five spans of at least 20 ms, after one call to warm up; in a quick run that of one call."""
    call()
    wp.synchronize_device(settings.device)

    def span(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        wp.synchronize_device(settings.device)
        return (time.perf_counter() - start) / n

    once = span(1)
    if settings.quick:
        return once
    n = max(1, round(0.02 / max(once, 1e-6)))
    return statistics.median(span(n) for _ in range(5))


def of_ceiling(rate: float, ceilings: dict[str, float], name: str) -> float | None:
    """`rate` in per cent of a ceiling, None where that was not measured."""
    return round(100.0 * rate / ceilings[name], 1) if name in ceilings else None


def sized(settings: Settings, full: Any, quick: Any) -> Any:
    return quick if settings.quick else full


def guarded(settings: Settings, label: Row, row: Callable[[], Row]) -> Row:
    """The row, or its label with what went wrong or that time is up: one failure must not cost the other rows."""
    if settings.out_of_time():
        return {**label, "result": "left out: time"}
    try:
        return {**label, **row()}
    except Skipped as reason:
        return {**label, "result": f"skipped: {reason}"}
    except ImportError as error:
        return {**label, "result": f"skipped: {error}"}
    except Exception as error:
        return {**label, "result": f"failed: {type(error).__name__}: {error}"}


def public(name: str) -> Any:
    """A public name of the package, or Skipped where it is not built."""
    if name not in nrc.__all__:
        raise Skipped(f"nrc.{name} is not built yet")
    return getattr(nrc, name)


def array(values: np.ndarray, device: wp.Device) -> wp.array:
    return wp.array(np.ascontiguousarray(values, np.float32), dtype=float, device=device)


def network(n_neurons: int, **options: Any) -> dict[str, Any]:
    return {"otype": "FullyFusedMLP", "n_neurons": n_neurons, "n_hidden_layers": 2, **options}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
