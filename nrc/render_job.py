"""`RenderJob`: runs a `Renderer` until a budget is spent, with progress, checkpoints and a clean stop on Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nrc.interrupt import interruptible
from nrc.renderer import Renderer
from nrc.snapshot import SnapshotError, load_tensors, save_tensors

CHECKPOINT_KIND = "nrc.render"
CHECKPOINT_SECONDS = 30.0  # at most this much is lost when the process is killed


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this job, or cannot be read; the message names the file and what differs."""


@dataclass(frozen=True)
class Budget:
    """When to stop: after `spp` samples per pixel or `seconds` of rendering, whichever is first; None: no limit."""

    spp: int | None = None
    seconds: float | None = None

    def is_spent(self, spp: int, seconds: float) -> bool:
        """Whether nothing is left after so many samples per pixel and seconds."""
        return (self.spp is not None and spp >= self.spp) or (self.seconds is not None and seconds >= self.seconds)


class RenderJob:
    """Renders until the budget is spent.

    Args:
        renderer: Prepared renderer.
        identity: What a checkpoint must agree on to be continued: scene, size, settings.
        checkpoint: Where the state is kept, or None.

    Attributes:
        seconds: Rendering time so far, that of resumed runs included.
        interrupted: Whether Ctrl-C ended the run.
    """

    def __init__(self, renderer: Renderer, identity: dict[str, Any], checkpoint: Path | None = None) -> None:
        self.renderer, self.checkpoint = renderer, checkpoint
        self.identity = json.loads(json.dumps(identity))  # as a checkpoint gives it back
        self.seconds = 0.0
        self.interrupted = False

    def resume(self) -> None:
        """Continue from the checkpoint. Raises CheckpointError when it is missing, broken or of another job."""
        state, config = load_checkpoint(self.checkpoint, CHECKPOINT_KIND, self.identity)
        self.renderer.load_state(state)
        self.seconds = config["seconds"]

    def run(self, budget: Budget, *, progress: bool = True) -> None:
        """Render frames until the budget is spent or Ctrl-C; the frame under way is always finished."""
        film = self.renderer.film
        last_checkpoint = time.perf_counter()
        with interruptible("frame") as stopped, _progress_bar(budget, film.n_frames, enabled=progress) as bar:
            while not stopped() and not self.is_spent(budget):
                start = time.perf_counter()
                self.renderer.frame()
                now = time.perf_counter()
                self.seconds += now - start
                bar.update(film.n_frames, self.seconds)
                if self.checkpoint is not None and now - last_checkpoint > CHECKPOINT_SECONDS:
                    self.save()
                    last_checkpoint = time.perf_counter()
            self.interrupted = stopped()
        if self.checkpoint is not None:
            self.save()

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the older one."""
        if self.checkpoint is None:
            raise ValueError("this job was made without a checkpoint path")
        config = {"identity": self.identity, "seconds": self.seconds}
        save_checkpoint(self.checkpoint, CHECKPOINT_KIND, self.renderer.state(), config)

    def is_spent(self, budget: Budget) -> bool:
        """Whether nothing is left to render."""
        return budget.is_spent(self.renderer.film.n_frames, self.seconds)


class _ProgressBar:
    def __init__(self, budget: Budget, n_frames: int, enabled: bool) -> None:
        self._by_time = budget.spp is None
        total = budget.seconds if self._by_time else budget.spp
        unit = "s" if self._by_time else "spp"
        layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed} elapsed, {remaining} left{postfix}]"
        if total is None:
            layout = "{n:.0f} {unit} [{elapsed} elapsed{postfix}]"
        self._bar = tqdm(
            total=total,
            initial=0 if self._by_time else n_frames,
            unit=unit,
            desc="render",
            disable=None if enabled else True,  # None: quiet where standard error is not a terminal
            bar_format=layout,
        )

    def update(self, n_frames: int, seconds: float) -> None:
        value = seconds if self._by_time else n_frames
        self._bar.set_postfix_str(f"{n_frames} spp" if self._by_time else f"{seconds:.0f} s", refresh=False)
        limit = self._bar.total
        self._bar.update(min(value, limit) - self._bar.n if limit is not None else value - self._bar.n)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def _progress_bar(budget: Budget, n_frames: int, *, enabled: bool) -> Iterator[_ProgressBar]:
    bar = _ProgressBar(budget, n_frames, enabled)
    try:
        yield bar
    finally:
        bar.close()


def load_checkpoint(
    path: Path | None, kind: str, identity: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """State and entries of a checkpoint of the job `identity`. Raises CheckpointError."""
    if path is None or not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint to resume from")
    try:
        state, config = load_tensors(path, kind=kind)
    except SnapshotError as error:
        raise CheckpointError(str(error)) from error
    theirs = config["identity"]
    differing = sorted(key for key in identity | theirs if identity.get(key) != theirs.get(key))
    if differing:
        listed = ", ".join(_difference(key, theirs.get(key), identity.get(key)) for key in differing)
        raise CheckpointError(f"{path}: belongs to another render: {listed}")
    return state, config


def _difference(key: str, there: Any, here: Any) -> str:
    """What two jobs differ in; the digests of what is too large to print say nothing."""
    if all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in (there, here)):
        return f"{key} has changed"
    return f"{key} ({there} there, {here} here)"


def save_checkpoint(path: Path, kind: str, state: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Write a checkpoint, replacing an older one only once it is complete. Raises CheckpointError."""
    try:
        save_tensors(path, state, config, kind=kind)
    except SnapshotError as error:
        raise CheckpointError(str(error)) from error


def describe(renderer: Renderer) -> dict[str, Any]:
    """Identity of a job: everything that changes its picture."""
    scene = renderer.scene.scene
    digest = hashlib.sha256()
    for part in (scene.meshes, scene.instances, scene.materials, scene.lights, scene.environment, scene.camera):
        _hash(part, digest)
    _hash(scene.animation, digest)
    cache: dict[str, Any] = {}
    if renderer.cache is not None:
        cache = {**asdict(renderer.cache.config), "batch_size": renderer.cache.batch_size}
    return {
        "nrc": version("nrc"),
        "scene": digest.hexdigest(),
        "width": renderer.tracer.width,
        "height": renderer.tracer.height,
        **{f"tracer.{name}": value for name, value in asdict(renderer.config).items()},
        **{f"cache.{name}": value for name, value in cache.items()},
        "clamp": renderer.film.clamp,
    }


def _hash(value: Any, digest: Any) -> None:
    """Feed everything that `value` (nested dataclasses, tuples, arrays and plain values) holds to `digest`."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif is_dataclass(value):
        for field in fields(value):
            _hash(getattr(value, field.name), digest)
    elif isinstance(value, tuple):
        for item in value:
            _hash(item, digest)
    else:
        digest.update(repr(value).encode())
