"""How large a picture may be so that a frame takes the time it should."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nrc.viewer.session import Request

SHORTEST = 64  # [px] short side, below which a picture shows nothing
STEPS = 4  # levels per halving of the sides: neighbours differ by sqrt(2) in pixels
MOST_STEPS = 4  # levels that one change may grow by
GROW, SHRINK = 0.7, 1.15  # of the time aimed at; further apart than sqrt(2), or noise would swing between two levels
MIDDLE = 1.05  # of the time aimed at, for a size shrunk to: as far from growing again as from shrinking further
GROW_RESTED = 0.35  # instead of GROW, for what rests
RESTED = 16  # accumulated frames from which the size stays
PIXEL_SHARE = 0.25  # of the target time that pixels get however long the rest takes
LEAST_SHARE = 0.02  # of a frame's time that pixels take
WINDOW = 16  # frames that the time of a size is the median of
OUTLIER = 1.6  # factor between a time and that median; two in a row on the same side are a change


class Resolution:
    """Chooses the size of pictures. Call `size` before a frame and `measure` after it, from one thread.

    A request's own size is used as it is. Otherwise the picture has the viewport's shape, at one of the scales
    1, 2^(-1/4), 2^(-1/2), ..., and no smaller than 64 px on its short side (or the viewport's own, where that is less):

    - A frame is taken to cost `fixed + per_pixel * pixels` seconds: the line through the median times of the present
      size and of the one before; through the origin as long as there is but one. Two times in a row far above or far
      below the median mean that all costs have changed by that factor; a single one means nothing.
    - It starts at the smallest scale. From then on the size may change once a frame of the present size has been
      measured. It grows where its pixels take less than 0.7 of what the fixed part leaves of the target, to the largest
      scale within the target, by a factor 2 of the sides at most. It shrinks, to the largest scale within 1.05 of the
      target, where the median and the last two times exceed 1.15 of it. In between it stays; but for one scale up on
      trial, where there was no other size yet to tell the fixed part from.
    - Where the fixed part leaves less than a quarter of the target, the pixels get that quarter and frames are slower
      than asked for: a tiny picture would not make them faster.
    - From 16 accumulated frames on the size stays (a change would throw them away) until the view moves; unless its
      pixels take less than 0.35 of what they may: a slow moment must not leave a coarse picture behind for good.
    - A new viewport or target lets the size follow the prediction at once, rested or not.
    """

    def __init__(self) -> None:
        self._pixels, self._times = 0, [0.0]  # [px] of the last frame, times [s] of the frames in a row of that size
        self._before: tuple[int, float] | None = None  # [px] and median time [s] of the frames before those
        self._asked: tuple[int, int, float] | None = None  # viewport and target that `_size` is for
        self._size = (1, 1)

    def predict(self, width: int, height: int) -> float:
        """Time [s] of a frame of this size; 0 before the first measurement."""
        fixed, per_pixel = self._costs()
        return fixed + per_pixel * width * height

    def size(self, request: Request, n_frames: int = 0) -> tuple[int, int]:
        """Width and height [px] of the picture for a request.

        Args:
            n_frames: Accumulated so far for the request's view at the present size; 0 while the view moves.
        """
        if request.size is not None:
            return request.size
        asked = (max(request.width, 1), max(request.height, 1), request.seconds)
        sizes = _sizes(asked[0], asked[1])
        fixed, _ = self._costs()
        aim = max(request.seconds, fixed + PIXEL_SHARE * request.seconds)
        if not self._pixels:
            self._asked, self._size = asked, sizes[-1]
        elif asked != self._asked:
            self._asked, self._size = asked, self._largest(sizes, aim)
        elif self._pixels == self._size[0] * self._size[1]:
            usual, i, rested = median(self._times), sizes.index(self._size), n_frames >= RESTED
            if usual - fixed < (GROW_RESTED if rested else GROW) * (aim - fixed):
                self._size = self._largest(sizes[max(i - MOST_STEPS, 0) : i + 1], aim)
            elif rested:
                return self._size
            elif self._before is None and (usual <= aim or i == len(sizes) - 1):
                self._size = sizes[max(i - 1, 0)]
            elif len(self._times) > 1 and min(usual, *self._times[-2:]) > SHRINK * aim:
                self._size = self._largest(sizes[i + 1 :] or [self._size], MIDDLE * aim)
        return self._size

    def measure(self, width: int, height: int, seconds: float) -> None:
        """Learn that a frame of `width` × `height` [px] took `seconds`."""
        if not (math.isfinite(seconds) and width > 0 and height > 0):
            return
        pixels = width * height
        if pixels != self._pixels:
            self._before = (self._pixels, median(self._times)) if self._pixels else None
            self._pixels, self._times = pixels, []
        self._times = [*self._times, max(seconds, 1e-7)][-WINDOW:]
        recent, usual = self._times[-2:], median(self._times[:-2] or self._times[:1])
        if min(recent) > OUTLIER * usual or OUTLIER * max(recent) < usual:
            self._times = recent
            if self._before is not None:
                self._before = (self._before[0], self._before[1] * median(recent) / usual)

    def _costs(self) -> tuple[float, float]:
        """Of a frame [s], and of each of its pixels [s]."""
        seconds = median(self._times)
        most = seconds / max(self._pixels, 1)
        per_pixel = most
        if self._before is not None:
            slope = (seconds - self._before[1]) / (self._pixels - self._before[0])
            per_pixel = min(max(slope, LEAST_SHARE * most), most)
        return seconds - per_pixel * self._pixels, per_pixel

    def _largest(self, sizes: list[tuple[int, int]], seconds: float) -> tuple[int, int]:
        """The first of falling sizes that takes no longer; the last if none does."""
        return next((size for size in sizes if self.predict(*size) <= seconds), sizes[-1])


def _sizes(width: int, height: int) -> list[tuple[int, int]]:
    """Sizes in a viewport's shape, falling from its own to one of `SHORTEST` on the short side."""
    smallest = min(1.0, SHORTEST / min(width, height))
    n = math.ceil(-STEPS * math.log2(smallest) - 1e-9)
    scales = [max(2.0 ** (-i / STEPS), smallest) for i in range(n + 1)]
    return [(round(scale * width), round(scale * height)) for scale in scales]
