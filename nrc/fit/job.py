"""`FitJob`: trains a task until a budget is spent, with progress, metrics, checkpoints and a clean stop on Ctrl-C.

A run's folder holds:

| file | what |
|---|---|
| `metrics.jsonl` | one JSON object per line: step, training seconds, loss, samples per second, quality |
| `curve.png` | the same as a picture |
| `checkpoint.safetensors` | everything to continue from |
| `snapshot.safetensors` | the result, for `nrc eval` and other programs |
| `result.json` | what the command prints with --json |
| pictures | of the task |
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import warp as wp
from tqdm import tqdm

from nrc.files import write_atomically
from nrc.fit.curve import draw_curve
from nrc.fit.settings import FitConfig
from nrc.interrupt import interruptible
from nrc.snapshot import SnapshotError, load_tensors, save_tensors, take_tensor

CHECKPOINT_KIND = "nrc.fit"
TASK_STEPS = "task.n_steps"  # in the state of a task
BURST_SECONDS = 0.25  # between two looks at the clock
# A line of metrics after the longest of: seconds, share of the run so far, times what the last line took
REPORT_SECONDS, REPORT_SHARE, REPORT_COST = 2.0, 0.05, 10.0
QUALITIES = ("psnr", "iou")  # shown beside the progress bar


class FitError(ValueError):
    """A run that cannot start, continue or be written; the message names the file or the setting at fault."""


class Task(Protocol):
    """What `FitJob` trains: a source of batches, a model and its measures.

    Attributes:
        kind: "image", "sdf" or "nerf".
        config: Complete settings.
        n_params: Trained numbers.
        samples_per_step: Rows of a batch.
        n_steps: Steps taken.
        warnings: What was left out or substituted in the source.
    """

    kind: str
    config: FitConfig
    device: wp.Device
    n_params: int
    samples_per_step: int
    n_steps: int
    warnings: Sequence[str]

    def identity(self) -> dict[str, Any]:
        """All that changes the result, as JSON holds it: digests of the source's files, settings, seed."""
        ...

    def step(self) -> wp.array:
        """Take one step; its loss, one float32 on the device, is overwritten by the next."""
        ...

    def progress(self) -> dict[str, float]:
        """Quality on a small fixed sample that training does not see more of than of the rest."""
        ...

    def evaluate(self) -> dict[str, Any]:
        """Full measures of the result."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """All that training changes, by name."""
        ...

    def load_state(self, path: Path, state: dict[str, np.ndarray]) -> None:
        """Restore what `state` gave and the file `path` held. Raises SnapshotError."""
        ...

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Write the snapshot, with `training` (seconds, steps, n_params) in its entry `fit`."""
        ...

    def pictures(self, folder: Path) -> dict[str, Path]:
        """Draw the result into `folder`; the files by name."""
        ...

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of training by name, for `nrc.launch.prepare`."""
        ...


class FitJob:
    """Trains until `steps` steps or `seconds` seconds of training, whichever is first, then saves and measures.

    Args:
        task: What to train.
        out: Folder of the run, made where it is missing.
        checkpoint_seconds: At most this much training is lost when the process is killed.

    Attributes:
        seconds: Training time so far, that of resumed runs included; measuring and drawing excluded.
        interrupted: Whether Ctrl-C ended the run.
    """

    def __init__(self, task: Task, out: Path, *, checkpoint_seconds: float = 30.0) -> None:
        self.task, self.out = task, out
        self.checkpoint_seconds = checkpoint_seconds
        self.seconds = 0.0
        self.interrupted = False
        self.identity = _as_json(task.identity())  # as a checkpoint gives it back
        self._metrics: list[dict[str, Any]] = []
        self._report_seconds = 0.0
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FitError(f"{out}: cannot make this folder ({error.strerror})") from error

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.out / "checkpoint.safetensors"

    @property
    def snapshot(self) -> Path:
        """Where the result is kept."""
        return self.out / "snapshot.safetensors"

    def resume(self) -> None:
        """Continue from the checkpoint. Raises FitError when it is missing, broken or of another run."""
        path = self.checkpoint
        if not path.is_file():
            raise FitError(f"{path}: no checkpoint to resume from")
        try:
            state, config = load_tensors(path, kind=CHECKPOINT_KIND)
            theirs = config["identity"]
            differing = _differences(theirs, self.identity)
            if differing:
                raise FitError(f"{path}: belongs to another run: {', '.join(differing)}")
            seconds, metrics = float(config["seconds"]), config["metrics"]
            if not (math.isfinite(seconds) and seconds >= 0.0 and _are_metrics(metrics)):
                raise FitError(f"{path}: seconds or metrics are not those of a run")
            self.task.load_state(path, state)
            self.seconds, self._metrics = seconds, metrics
        except SnapshotError as error:
            raise FitError(str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FitError):
                raise
            raise FitError(f"{path}: incomplete ({error})") from error

    def run(self, *, steps: int | None, seconds: float | None, progress: bool = True) -> None:
        """Train until the budget is spent or Ctrl-C, leaving metrics, checkpoint, snapshot and curve behind."""
        if steps is None and seconds is None:
            raise FitError("a run needs a number of steps or of seconds to end at")
        self._write_metrics()
        task = self.task
        saved = time.perf_counter()
        due = self.seconds + self._report_interval()
        burst = 1
        with interruptible("step") as stopped, _ProgressBar(self, steps, seconds, progress) as bar:
            while not stopped() and not self.is_spent(steps, seconds):
                count = burst if steps is None else min(burst, steps - task.n_steps)
                start = time.perf_counter()
                for _ in range(count):
                    loss = task.step()
                wp.synchronize_device(task.device)
                elapsed = time.perf_counter() - start
                self.seconds += elapsed
                speed = count * task.samples_per_step / elapsed
                burst = max(1, min(2 * burst, int(BURST_SECONDS * count / elapsed)))
                bar.update(task.n_steps, self.seconds, float(loss.numpy()[0]), speed)
                if self.seconds >= due or self.is_spent(steps, seconds) or stopped():
                    bar.show(self._report(float(loss.numpy()[0]), speed))
                    due = self.seconds + self._report_interval()
                if time.perf_counter() - saved > self.checkpoint_seconds:
                    self.save()
                    saved = time.perf_counter()
            self.interrupted = stopped()
        self.save()
        task.save(self.snapshot, {"seconds": self.seconds, "steps": task.n_steps, "n_params": task.n_params})
        draw_curve(self.out / "curve.png", self._metrics)

    def is_spent(self, steps: int | None, seconds: float | None) -> bool:
        """Whether nothing is left to train."""
        return (steps is not None and self.task.n_steps >= steps) or (seconds is not None and self.seconds >= seconds)

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the older one. Raises FitError."""
        config = {"identity": self.identity, "seconds": self.seconds, "metrics": self._metrics}
        try:
            save_tensors(self.checkpoint, self.task.state(), config, kind=CHECKPOINT_KIND)
        except SnapshotError as error:
            raise FitError(str(error)) from error

    def finish(self, *, measure: bool = True) -> dict[str, Any]:
        """Measure and draw the result, and write `result.json`.

        Args:
            measure: False, like an interrupt, leaves it at the quality that the last line of metrics has.

        Returns:
            The task's measures, `seconds`, `steps`, `n_params`, `samples_per_second`, the files by name.
        """
        task = self.task
        last = self._metrics[-1] if self._metrics else {}
        result: dict[str, Any] = {
            "kind": task.kind,
            "out": str(self.out),
            "device": str(task.device),
            "seconds": self.seconds,
            "steps": task.n_steps,
            "n_params": task.n_params,
            "batch_size": task.samples_per_step,
            "samples_per_second": task.n_steps * task.samples_per_step / self.seconds if self.seconds else None,
            "loss": last.get("loss"),
            "snapshot": str(self.snapshot),
            "interrupted": self.interrupted,
        }
        if self.interrupted or not measure:
            result |= {name: last[name] for name in QUALITIES if name in last}
        else:
            result |= task.evaluate()
            result["pictures"] = {name: str(path) for name, path in task.pictures(self.out).items()}
        result = _as_json(result)
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(self.out / "result.json", lambda temporary: temporary.write_text(text), FitError)
        return result

    def _report(self, loss: float, speed: float) -> dict[str, Any]:
        start = time.perf_counter()
        line = {"step": self.task.n_steps, "seconds": self.seconds, "loss": loss, "samples_per_second": speed}
        line = _as_json(line | self.task.progress())
        self._metrics.append(line)
        path = self.out / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise FitError(f"{path}: cannot be written ({error.strerror})") from error
        self._report_seconds = time.perf_counter() - start
        return line

    def _write_metrics(self) -> None:
        """The lines so far: none in a new run, in a resumed one those up to its checkpoint."""
        text = "".join(json.dumps(line) + "\n" for line in self._metrics)
        write_atomically(self.out / "metrics.jsonl", lambda temporary: temporary.write_text(text), FitError)

    def _report_interval(self) -> float:
        return max(REPORT_SECONDS, REPORT_SHARE * self.seconds, REPORT_COST * self._report_seconds)


class _ProgressBar:
    """Steps or seconds, whichever limits the run, with loss, quality and speed."""

    def __init__(self, job: FitJob, steps: int | None, seconds: float | None, enabled: bool) -> None:
        self._by_time = steps is None
        self._quality = ""
        unit = "s" if self._by_time else "steps"
        self._bar = tqdm(
            total=seconds if self._by_time else steps,
            initial=job.seconds if self._by_time else job.task.n_steps,
            desc=f"fit {job.task.kind}",
            disable=None if enabled else True,  # None: quiet where standard error is not a terminal
            bar_format=f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total:.0f}} {unit} [{{remaining}} left{{postfix}}]",
        )

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bar.close()

    def show(self, line: dict[str, Any]) -> None:
        """Take the quality of a line of metrics over into the display."""
        self._quality = "".join(
            f", {name.upper()} {line[name]:.2f} dB" if name == "psnr" else f", {name.upper()} {line[name]:.4f}"
            for name in QUALITIES
            if line.get(name) is not None
        )

    def update(self, step: int, seconds: float, loss: float, speed: float) -> None:
        value = seconds if self._by_time else step
        other = f"step {step}" if self._by_time else f"{seconds:.0f} s"
        self._bar.set_postfix_str(
            f"{other}, loss {loss:.3g}{self._quality}, {speed / 1e6:.2f} M samples/s", refresh=False
        )
        self._bar.update(min(value, self._bar.total) - self._bar.n)


def steps_of(path: str | PathLike[str], state: Mapping[str, np.ndarray]) -> int:
    """Steps taken, as a task's state in the file `path` has them in TASK_STEPS. Raises SnapshotError."""
    n_steps = int(take_tensor(path, state, TASK_STEPS, (1,), np.int64)[0])
    if not 0 <= n_steps < 1 << 31:
        raise SnapshotError(f"{path}: {TASK_STEPS} is {n_steps}")
    return n_steps


def _as_json(value: Any) -> Any:
    """`value` as JSON gives it back; null for NaN and infinity."""
    return json.loads(json.dumps(value), parse_constant=lambda _name: None)


def _differences(theirs: Any, mine: Any, name: str = "") -> list[str]:
    """What differs between two values as JSON has them, by the path of its keys; digests are not spelled out."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [key for key in theirs | mine if theirs.get(key) != mine.get(key)]
        inner = [_differences(theirs.get(key), mine.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return [line for lines in inner for line in lines]
    is_digest = isinstance(mine, str) and len(mine) == 64
    return [name if is_digest else f"{name} ({theirs} there, {mine} here)"]


def _are_metrics(value: Any) -> bool:
    """Whether a value from a file is a list of lines that `FitJob` reported."""
    return isinstance(value, list) and all(
        isinstance(line, dict)
        and {"step", "seconds", "loss"} <= set(line)
        and all(number is None or isinstance(number, int | float) for number in line.values())
        for line in value
    )
