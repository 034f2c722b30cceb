"""`AnimationJob`: renders numbered frames of a moving scene, with progress, checkpoints and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nrc.interrupt import interruptible
from nrc.render_job import CHECKPOINT_SECONDS, Budget, load_checkpoint, save_checkpoint
from nrc.renderer import Renderer
from nrc.scene import Scene

CHECKPOINT_KIND = "nrc.animation"
SECONDS_BETWEEN_FRAMES = 5.0  # after which a checkpoint is due where a frame ends; within one, CHECKPOINT_SECONDS


class AnimationJob:
    """Renders frames one after the other; what the cache learned goes from one to the next.

    A checkpoint is the whole state after some sample of some frame. Frames that were written before it stay; all others
    are rendered, the frame under way continued: a job that was stopped and resumed gives the same pictures as one that
    was not (on the CPU bit for bit). Frames before it whose files are gone are rendered first, with what the cache has
    learned by then. A job that begins warms up the cache on its first frame.

    Args:
        renderer: Prepared renderer.
        scene: What moves; frame k shows it at k / fps.
        fps: Frames per second.
        identity: What a checkpoint must agree on to be continued: scene, size, settings, budget of a frame.
        checkpoint: Where the state is kept.

    Attributes:
        frame: Number of the frame that the renderer holds, or None.
        reached: Frames from here on are rendered whatever files there are; earlier ones are known to be written.
        seconds: Rendering time of this frame so far, moving the scene included.
        interrupted: Whether Ctrl-C ended the run.
    """

    def __init__(
        self, renderer: Renderer, scene: Scene, fps: float, identity: dict[str, Any], checkpoint: Path
    ) -> None:
        self.renderer, self.scene, self.fps, self.checkpoint = renderer, scene, fps, checkpoint
        self.identity = json.loads(json.dumps({**identity, "fps": fps}))  # as a checkpoint gives it back
        self.frame: int | None = None
        self.reached = 0
        self.seconds = 0.0
        self.interrupted = False

    def time(self, frame: int) -> float:
        """What moment a frame shows [s]."""
        return frame / self.fps

    def resume(self) -> None:
        """Continue from the checkpoint. Raises CheckpointError when it is missing, broken or of another job."""
        state, config = load_checkpoint(self.checkpoint, CHECKPOINT_KIND, self.identity)
        self.renderer.set_scene(self.scene.at(self.time(config["frame"])))
        self.renderer.load_state(state)
        self.frame, self.reached, self.seconds = config["frame"], config["reached"], config["seconds"]

    def run(
        self, frames: range, budget: Budget, exists: Callable[[int], bool], write: Callable[[int], None]
    ) -> list[int]:
        """Render `frames`, each with one sample at least and until `budget` is spent, or until Ctrl-C.

        Args:
            exists: Whether all files of a frame are there: then it is skipped if a checkpoint says it was written.
            write: Write the renderer's picture as a frame.

        Returns:
            The frames that were written; none where nothing was left to do.
        """
        written: list[int] = []
        todo = [k for k in frames if k >= self.reached or not exists(k)]
        if not todo:
            return written
        last = time.perf_counter()
        with (
            interruptible("sample") as stopped,
            # disable=None: quiet where standard error is not a terminal
            tqdm(total=len(frames), initial=len(frames) - len(todo), unit="frame", desc="render", disable=None) as bar,
        ):
            for k in todo:
                if k != self.frame:
                    is_first = self.frame is None
                    self._show(k)
                    if is_first:
                        self.renderer.warm_up()
                while not stopped() and not self._is_done(budget):
                    start = time.perf_counter()
                    self.renderer.frame()
                    now = time.perf_counter()
                    self.seconds += now - start
                    if now - last > CHECKPOINT_SECONDS:
                        self.save()
                        last = time.perf_counter()
                if not self._is_done(budget):
                    break
                write(k)
                written.append(k)
                self.reached = max(self.reached, k + 1)
                bar.update()
                if len(written) == 1 or time.perf_counter() - last > SECONDS_BETWEEN_FRAMES:
                    self.save()
                    last = time.perf_counter()
            self.interrupted = stopped()
        if self.frame is not None:
            self.save()
        return written

    def _is_done(self, budget: Budget) -> bool:
        """Whether the frame is finished: moving the scene alone may take longer than a frame may."""
        n_samples = self.renderer.film.n_frames
        return n_samples > 0 and budget.is_spent(n_samples, self.seconds)

    def _show(self, frame: int) -> None:
        """Move the scene to a frame."""
        start = time.perf_counter()
        self.renderer.set_scene(self.scene.at(self.time(frame)))
        self.frame, self.seconds = frame, time.perf_counter() - start

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the older one. Raises CheckpointError."""
        config = {"identity": self.identity, "frame": self.frame, "reached": self.reached, "seconds": self.seconds}
        save_checkpoint(self.checkpoint, CHECKPOINT_KIND, self.renderer.state(), config)
