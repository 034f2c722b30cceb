"""`Timeline`: the time of a scene's animation, which plays, rests and is scrubbed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Timeline:
    """State of the animation.

    Attributes:
        duration: Of the animation [s]; 0 for a still scene.
        has_camera: Whether the animation moves the scene's camera.
        time: That is shown [s].
        is_playing: Whether time goes on by itself.
        loops: Whether it begins again at the end.
        speed: Seconds of animation per second.
        follows_camera: Whether one looks through the scene's own camera.
    """

    duration: float = 0.0
    has_camera: bool = False
    time: float = 0.0
    is_playing: bool = False
    loops: bool = True
    speed: float = 1.0
    follows_camera: bool = False

    def __post_init__(self) -> None:
        self.follows_camera = self.has_camera

    def toggle(self) -> None:
        """Play or pause; from the beginning where the end was reached."""
        if self.duration > 0.0:
            self.is_playing = not self.is_playing
            if self.is_playing and self.time >= self.duration:
                self.time = 0.0

    def seek(self, time: float) -> None:
        """Stand still at a time."""
        self.time, self.is_playing = min(max(time, 0.0), self.duration), False

    def advance(self, seconds: float) -> None:
        """Let time pass where it plays."""
        if not self.is_playing:
            return
        self.time += self.speed * seconds
        if self.time >= self.duration:
            self.time = self.time % self.duration if self.loops else self.duration
            self.is_playing = self.loops
