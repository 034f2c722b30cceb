"""`LiveTraining`: trains a task a little at a time, between the pictures of somebody who watches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import warp as wp

from nrc.fit.job import Task

PROGRESS_SECONDS, PROGRESS_COST = 5.0, 20.0  # between two looks at the quality: at least, and in times of what it takes
# Share of the latest steps in the time expected of the next, where they were faster, and where they were slower, of
# which no more than twice what was expected is believed: now and then a step takes much longer
FASTER, SLOWER, MOST = 0.5, 0.1, 2.0


class LiveTraining:
    """Takes steps of a task for a given time, and keeps the figures.

    Attributes:
        seconds: Training time so far.
        loss: Of the last step; None before.
        quality: What the task's `progress` gave last, with its measure's name; looked at every five seconds of training
            or less often, where it takes long.
    """

    def __init__(self, task: Any) -> None:
        self.task: Task = task
        self.seconds = 0.0
        self.loss: float | None = None
        self.quality: dict[str, float] = {}
        self._samples_per_second = 0.0
        self._step_seconds = 0.0  # expected of the next; 0 before the first
        self._progress_due = PROGRESS_SECONDS

    def train(self, seconds: float) -> float:
        """Take as many steps as should fit into `seconds`, at least one; the time it took."""
        task, begin = self.task, time.perf_counter()
        n_steps, elapsed = 0, 0.0
        while n_steps == 0 or elapsed + self._step_seconds < seconds:
            count = 1
            if self._step_seconds:
                count = max(1, int(0.5 * (seconds - elapsed) / self._step_seconds))
            start = time.perf_counter()
            for _ in range(count):
                loss = task.step()
            wp.synchronize_device(task.device)
            spent = (time.perf_counter() - start) / count
            expected = self._step_seconds or spent
            share = FASTER if spent < expected else SLOWER
            self._step_seconds = expected + share * (min(spent, MOST * expected) - expected)
            n_steps += count
            elapsed = time.perf_counter() - begin
        self.loss = float(loss.numpy()[0])
        self.seconds += elapsed
        self._samples_per_second = n_steps * task.samples_per_step / elapsed
        if self.seconds >= self._progress_due:
            start = time.perf_counter()
            self.quality = task.progress()
            cost = time.perf_counter() - start
            self._progress_due = self.seconds + max(PROGRESS_SECONDS, PROGRESS_COST * cost)
        return elapsed

    def stats(self) -> dict[str, Any]:
        """`steps`, `train_seconds`, `samples_per_second`, `n_params`, and once known `loss` and the quality."""
        figures: dict[str, Any] = {
            "steps": self.task.n_steps,
            "train_seconds": self.seconds,
            "samples_per_second": self._samples_per_second,
            "n_params": self.task.n_params,
        }
        if self.loss is not None:
            figures["loss"] = self.loss
        return figures | self.quality

    def save(self, path: Path) -> None:
        """Write the task's snapshot. Raises SnapshotError."""
        task = self.task
        task.save(path, {"seconds": self.seconds, "steps": task.n_steps, "n_params": task.n_params})
