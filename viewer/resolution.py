"""How large a picture may be so that a frame takes the time it should."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nrc.viewer.session import Request

SHORTEST = 64  # [px] short side, below which a picture shows nothing
STEPS = 4  # levels per halving of the sides: neighbours differ by sqrt(2) in pixels
MOST_STEPS = 4  # levels that one change may grow by
GROW, SHRINK = 0.7, 1.15  # of the time aimed at; further apart than sqrt(2), or noise would swing between two levels
RESTED = 16  # accumulated frames from which the size stays
MIDDLE = 1.05  # of the time aimed at, for a size shrunk to: as far from growing again as from shrinking further
PIXEL_SHARE = 0.25  # of the target time that pixels get however long the rest takes

NOISE = 0.12  # of a frame's time, relative standard deviation
DRIFT = 0.02  # of all costs together from frame to frame, relative
SPLIT_AT_FIRST, SPLIT_DRIFT = 0.5, 0.02  # of the part that does not depend on size, relative to a frame's time
SPLIT_KNOWN = 0.25  # uncertainty below which the split needs no trial
OUTLIER = 1.6  # factor between a time and its prediction that a first frame does not explain


class Resolution:
    """Chooses the size of pictures. Call `size` before a frame and `measure` after it, from one thread.

    A request's own size is used as it is. Otherwise the picture has the viewport's shape, at one of the scales
    1, 2^(-1/4), 2^(-1/2), ..., and no smaller than 64 px on its short side (or the viewport's own, where that is less):

    - A frame is modelled as `fixed + per_pixel * pixels` seconds, both followed by a Kalman filter over the measured
      times, in which all costs together drift more than their ratio does. One time far off its prediction (a factor
      1.6 and three standard deviations) is left out; with a second in a row, on the same side, all costs jump (or,
      where the size has just changed, the ratio).
    - It starts at the smallest scale. From then on the size may change once a frame of the present size has been
      measured. It grows where its pixels are predicted to take less than 0.7 of what the fixed part leaves of the
      target, to the largest scale within the target, by a factor 2 of the sides at most; at first also on trial, by
      one scale, until the two parts of the time can be told apart: within the target, or beyond it from the smallest
      scale and where most of the time seems fixed. It shrinks, to the largest scale within 1.05 of the target, where
      the prediction and the last two times exceed 1.15 of it. In between it stays.
    - Where the fixed part leaves less than a quarter of the target, the pixels get that quarter and frames are slower
      than asked for: a tiny picture would not make them faster.
    - From 16 accumulated frames on the size stays (a change would throw them away) until the view moves.
    - A new viewport or target lets the size follow the prediction at once, rested or not.
    """

    def __init__(self) -> None:
        self._fixed = 0.0  # [s]
        self._per_pixel = 0.0  # [s]
        self._covariance: tuple[float, float, float] | None = None  # of fixed, both, per_pixel; None: no frame yet
        self._suspicion = 0  # side of its prediction on which the last time was left out: -1, 0 or 1
        self._last = 0  # [px] of the last frame measured
        self._times: list[float] = []  # [s] of the frames in a row of that many pixels
        self._before = 0  # [px] of the frames before those
        self._split_known = False
        self._asked: tuple[int, int, float] | None = None  # viewport and target that `_size` is for
        self._size = (1, 1)

    def predict(self, width: int, height: int) -> float:
        """Time [s] of a frame of this size; 0 before the first measurement."""
        return self._fixed + self._per_pixel * width * height

    def size(self, request: Request, n_frames: int = 0) -> tuple[int, int]:
        """Width and height [px] of the picture for a request.

        Args:
            n_frames: Accumulated so far for the request's view at the present size; 0 while the view moves.
        """
        if request.size is not None:
            return request.size
        asked = (max(request.width, 1), max(request.height, 1), request.seconds)
        sizes = _sizes(asked[0], asked[1])
        if self._covariance is None:
            self._asked, self._size = asked, sizes[-1]
        elif asked != self._asked:
            self._asked, self._size = asked, self._largest(sizes, self._aim(request.seconds))
        elif n_frames < RESTED and self._last == self._size[0] * self._size[1]:
            aim = self._aim(request.seconds)
            predicted, present = self.predict(*self._size), sizes.index(self._size)
            if predicted - self._fixed < GROW * (aim - self._fixed):
                self._size = self._largest(sizes[max(present - MOST_STEPS, 0) : present + 1], aim)
            elif not self._split_known and (predicted <= aim or self._worth_a_trial(sizes[-1])):
                self._size = sizes[max(present - 1, 0)]
            elif predicted > SHRINK * aim and len(self._times) > 1 and min(self._times[-2:]) > SHRINK * aim:
                self._size = self._largest(sizes[present + 1 :] or [self._size], MIDDLE * aim)
        return self._size

    def measure(self, width: int, height: int, seconds: float) -> None:
        """Learn that a frame of `width` × `height` [px] took `seconds`."""
        if not (math.isfinite(seconds) and width > 0 and height > 0):
            return
        pixels, seconds = width * height, max(seconds, 1e-7)
        if pixels != self._last:
            self._before, self._last, self._times = self._last, pixels, []
        self._times = [*self._times[-2:], seconds]
        if self._covariance is None:
            self._fixed, self._per_pixel = 0.0, seconds / pixels
            self._covariance = (0.0, 0.0, 0.0)
            self._blur(pixels, NOISE, SPLIT_AT_FIRST)
            return
        self._blur(pixels, DRIFT, SPLIT_DRIFT)
        predicted = self.predict(width, height)
        error = seconds - predicted
        if error**2 > 9.0 * self._variance(pixels) and not 1.0 / OUTLIER < seconds / predicted < OUTLIER:
            side = 1 if error > 0.0 else -1
            if self._suspicion != side:
                self._suspicion = side
                return
            if len(self._times) == 2 and self._before:  # a size just changed to
                self._blur(self._before, NOISE, SPLIT_AT_FIRST)
            else:
                scale = seconds / predicted
                a, b, c = self._covariance
                self._fixed, self._per_pixel = scale * self._fixed, scale * self._per_pixel
                self._covariance = (scale**2 * a, scale**2 * b, scale**2 * c)
                self._blur(pixels, NOISE, 0.0)
        self._suspicion = 0
        self._update(pixels, seconds)

    def _update(self, pixels: int, seconds: float) -> None:
        """Kalman filter of the state (fixed, per_pixel), observed as (1, pixels)."""
        assert self._covariance is not None
        a, b, c = self._covariance
        variance, error = self._variance(pixels), seconds - self._fixed - self._per_pixel * pixels
        gain_fixed, gain_pixel = (a + b * pixels) / variance, (b + c * pixels) / variance
        fixed, per_pixel = self._fixed + gain_fixed * error, self._per_pixel + gain_pixel * error
        a, b, c = a - gain_fixed**2 * variance, b - gain_fixed * gain_pixel * variance, c - gain_pixel**2 * variance
        total = max(fixed + per_pixel * pixels, 1e-7)
        self._fixed = min(max(fixed, 0.0), 0.98 * total)
        self._per_pixel = (total - self._fixed) / pixels
        self._covariance = (a, b, c)
        if self._before:
            # Variance of fixed / total
            dfixed, dpixel = self._per_pixel * pixels / total**2, -self._fixed * pixels / total**2
            split = dfixed**2 * a + 2.0 * dfixed * dpixel * b + dpixel**2 * c
            self._split_known = self._split_known or split < SPLIT_KNOWN**2

    def _variance(self, pixels: int) -> float:
        """Of a measured time around its prediction."""
        assert self._covariance is not None
        a, b, c = self._covariance
        return a + 2.0 * b * pixels + c * pixels**2 + (NOISE * (self._fixed + self._per_pixel * pixels)) ** 2

    def _blur(self, pixels: int, together: float, split: float) -> None:
        """Make the costs less certain, relative to a frame's time: all in proportion, and how they share the time."""
        assert self._covariance is not None
        a, b, c = self._covariance
        fixed, per_pixel = together * self._fixed, together * self._per_pixel
        share = split * (self._fixed + self._per_pixel * pixels)
        self._covariance = (
            a + fixed**2 + share**2,
            b + fixed * per_pixel - share**2 / pixels,
            c + per_pixel**2 + (share / pixels) ** 2,
        )

    def _worth_a_trial(self, smallest: tuple[int, int]) -> bool:
        mostly_fixed = self._fixed > 0.5 * self.predict(*self._size)
        return len(self._times) > 1 and (self._size == smallest or mostly_fixed)

    def _aim(self, seconds: float) -> float:
        """Time [s] that a frame may take where `seconds` are asked for."""
        return max(seconds, self._fixed + PIXEL_SHARE * seconds)

    def _largest(self, sizes: list[tuple[int, int]], seconds: float) -> tuple[int, int]:
        """The first of falling `sizes` that is predicted to take no longer than that, else the last."""
        return next((size for size in sizes if self.predict(*size) <= seconds), sizes[-1])


def _sizes(width: int, height: int) -> list[tuple[int, int]]:
    """Sizes in a viewport's shape, falling from its own to one of `SHORTEST` on the short side."""
    smallest = min(1.0, SHORTEST / min(width, height))
    n = math.ceil(-STEPS * math.log2(smallest) - 1e-9)
    scales = [max(2.0 ** (-i / STEPS), smallest) for i in range(n + 1)]
    return [(round(scale * width), round(scale * height)) for scale in scales]
