"""`ImageTask`: fits a field to an image, a colour for every position.

The field learns sRGB-encoded values, those of floating-point files by the same curve continued above 1: one loss and
one path for all, in which an error counts as it is seen. What is written is in the file's own terms again.

A position is (pixel + 0.5) / max(width, height), so that a cell of the grid is a square of pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.field import SNAPSHOT_KIND, Field
from nrc.fit.fitted_image import FittedImage, checked_region, error_picture, load_fit, measure, psnr_of
from nrc.fit.job import TASK_STEPS, steps_of
from nrc.fit.pixels import PixelSource
from nrc.fit.settings import make_config
from nrc.image import write_image
from nrc.kernels import pixels as px
from nrc.launch import launch, resolve_device
from nrc.optimizer import restore
from nrc.snapshot import check_finite, save_tensors
from nrc.trainer import Trainer

PROBE_PIXELS = 1 << 15  # of `ImageTask.progress`
FOCUS_SHARE = 0.9  # of a batch's rows inside `ImageTask.focus`
LOG2_TABLE = (14, 24)


class ImageTask:
    """Fits a field to an image file: nearest samples at pixel centres, L2 of sRGB-encoded values.

    Each step draws one pixel from every one of as many strata as the batch has rows, and every pixel once before any of
    its stratum comes again (see `nrc.kernels.pixels`). On CUDA the pixels live on the device where they fill at most
    half of its free memory; else they are gathered by the CPU.

    Args:
        source: PNG, JPEG, TIFF, EXR, HDR or another file that `PixelSource` reads, of any size.
        seed: Of the initial parameters and the order of pixels.
        device: Warp device; the first GPU, else the CPU.
        encoding, config, grid, batch_size: Of `nrc.fit.settings.make_config`. The table's default size is
            `default_log2_table`.
        scratch: Of `PixelSource`.

    Attributes:
        focus: Region (x0, y0, x1, y1) [px] that nine in ten samples are drawn from, or None. May change at any time.
        warnings: What was ignored or changed in the source, in sentences.

    Raises:
        ImageError, ValueError: A source or a setting that cannot be used.
    """

    kind = "image"

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        seed: int = 1337,
        device: Any = None,
        encoding: str = "hash",
        config: Mapping[str, Any] | None = None,
        grid: Mapping[str, int] | None = None,
        batch_size: int | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.source = PixelSource(source, scratch=scratch)
        self.warnings = tuple(self.source.warnings)
        self.seed = seed
        width, height = self.source.width, self.source.height
        settings = make_config(
            "image",
            n_input_dims=2,
            finest=max(width, height) / 2,
            device=self.device,
            encoding=encoding,
            config=config,
            grid=grid,
            log2_hashmap_size=default_log2_table(width * height),
            batch_size=batch_size,
        )
        self.samples_per_step = min(settings.batch_size, width * height)
        self.config = replace(settings, batch_size=self.samples_per_step)
        self.field = Field(
            2, self.source.n_channels, self.config.encoding, self.config.network, seed=seed, device=self.device
        )
        self.trainer = Trainer(self.field, self.config.loss, self.config.optimizer, batch_size=self.samples_per_step)
        self.n_params = self.field.n_params
        self.n_steps = 0
        self._fitted = FittedImage(self.field, width, height, self.source.pixels.dtype.name)
        self._focus: tuple[int, int, int, int] | None = None
        self._allocate_batch()
        self._probe_x, self._probe_y = self._draw_probe()
        self._snapshot_bytes = 4 * self.n_params

    def _allocate_batch(self) -> None:
        source = self.source
        room = self.device.free_memory // 2 if self.device.is_cuda else 0
        self._sampler = self.device if source.pixels.nbytes <= room else wp.get_device("cpu")
        self._pixels: Any = wp.array(source.pixels, device=self._sampler, copy=False)
        self._draw = px.make_draw_pixels(self._pixels.dtype, source.n_channels)
        n = self.samples_per_step
        self._x = wp.empty((n, 2), dtype=float, device=self.device)
        self._y = wp.empty((n, source.n_channels), dtype=float, device=self.device)
        self._drawn_x, self._drawn_y = self._x, self._y
        if self._sampler != self.device:
            self._drawn_x = wp.empty(self._x.shape, dtype=float, device="cpu", pinned=True)
            self._drawn_y = wp.empty(self._y.shape, dtype=float, device="cpu", pinned=True)

    def _draw_probe(self) -> tuple[wp.array, np.ndarray]:
        """Pixels of `progress`, the same in every run on an image of this size."""
        source = self.source
        rng = np.random.default_rng(0)
        place = rng.integers(0, source.width * source.height, min(PROBE_PIXELS, source.width * source.height))
        y, x = np.divmod(np.sort(place), source.width)
        coordinates = (np.stack([x, y], axis=1) + 0.5) * self._fitted.inverse_size
        on_device: Any = wp.array(coordinates.astype(np.float32), dtype=float, device=self.device)
        return on_device, source.shown(source.pixels[y, x])

    @property
    def focus(self) -> tuple[int, int, int, int] | None:
        """Region (x0, y0, x1, y1) [px] that nine in ten samples are drawn from."""
        return self._focus

    @focus.setter
    def focus(self, region: tuple[int, int, int, int] | None) -> None:
        if region is not None:
            region = checked_region(region, self.source.width, self.source.height)
        self._focus = region

    def identity(self) -> dict[str, Any]:
        """All that changes the result, as JSON holds it."""
        return {
            "kind": self.kind,
            "source_sha256": self.source.sha256,
            "config": self.config.as_dict(),
            "seed": self.seed,
        }

    def step(self) -> wp.array:
        """Take one step; its loss, one float32 on the device, is overwritten by the next."""
        if self._sampler != self.device:
            wp.synchronize_device(self.device)  # the last step may still read the pinned batch
        for strata in self._strata():
            launch(
                self._draw,
                strata.n_rows,
                inputs=[strata, self.n_steps, self._fitted.inverse_size, self._pixels],
                outputs=[self._drawn_x, self._drawn_y],
                device=self._sampler,
            )
        if self._sampler != self.device:
            wp.copy(self._x, self._drawn_x)
            wp.copy(self._y, self._drawn_y)
        self.n_steps += 1
        return self.trainer.step(self._x, self._y)

    def _strata(self) -> list[Any]:
        """Windows of the batch: the whole image, behind the focus if there is one."""
        n = self.samples_per_step
        whole = (0, 0, self.source.width, self.source.height)
        if self._focus is None:
            return [_make_strata(self.seed, 0, n, whole)]
        n_focus = round(FOCUS_SHARE * n)
        inside = _make_strata(self.seed + 1, 0, n_focus, self._focus)
        return [inside, _make_strata(self.seed, n_focus, n - n_focus, whole)]

    def progress(self) -> dict[str, float]:
        """PSNR [dB] over a fixed sample of pixels."""
        y = self.field.inference(self._probe_x, params=self._inference_params()).numpy()
        shown = np.clip(y[:, : self.source.n_colors], 0.0, 1.0)
        return {"psnr": psnr_of(np.mean(np.square(shown - self._probe_y), dtype=np.float64))}

    def _inference_params(self) -> wp.array:
        return self.trainer.ema_params

    @property
    def fitted(self) -> FittedImage:
        """The image as of the last step; training goes on in the memory that it reads."""
        self._fitted.params = self._inference_params()
        return self._fitted

    def evaluate(self) -> dict[str, Any]:
        """Measures of `measure` over the whole image."""
        return measure(self.fitted, self.source) | self._sizes()

    def _sizes(self) -> dict[str, int]:
        return {"snapshot_bytes": self._snapshot_bytes, "source_bytes": self.source.n_bytes}

    def state(self) -> dict[str, np.ndarray]:
        """All that training changes, by name; on the CPU the memory itself, which the next step overwrites."""
        arrays = {name: array.numpy() for name, array in self.trainer.optimizer.state_arrays().items()}
        return arrays | {TASK_STEPS: np.array([self.n_steps], np.int64)}

    def load_state(self, path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` gave and the file `path` held. Raises SnapshotError, and then changes nothing."""
        n_steps = steps_of(path, state)
        restore(path, state, self.trainer.optimizer.state_arrays())
        self.n_steps = n_steps

    def save(self, path: str | os.PathLike[str], training: Mapping[str, Any]) -> None:
        """Write the snapshot: parameters (their moving average where there is one) as float32, and what they show.

        `training`, which says what is behind it, becomes part of the entry `fit`.

        `nrc.Field.load` reads the field in it, `FittedImage.load` the image. Raises SnapshotError.
        """
        params = self._inference_params().numpy()
        check_finite(path, "params", params)
        fit = {
            "kind": self.kind,
            "source": str(self.source.path.resolve()),
            "source_sha256": self.source.sha256,
            "width": self.source.width,
            "height": self.source.height,
            "dtype": self._fitted.dtype.name,
            "seed": self.seed,
            "settings": self.config.as_dict(),
            **training,
        }
        save_tensors(path, {"params": params}, self.field.config() | {"fit": fit}, kind=SNAPSHOT_KIND)
        self._snapshot_bytes = Path(path).stat().st_size

    def pictures(self, folder: Path) -> dict[str, Path]:
        """Write the reconstruction (see `FittedImage.write`) and error.png (see `error_picture`)."""
        fitted = self.fitted
        files = {"reconstruction": fitted.write(folder, "reconstruction"), "error": folder / "error.png"}
        write_image(files["error"], error_picture(fitted, self.source))
        return files

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of training and evaluation by name, for `nrc.launch.prepare`."""
        return self.trainer.kernels() | self.field.kernels() | {"pixels": self._draw, "places": px.place_pixels}


def default_log2_table(n_pixels: int) -> int:
    """Entries per level of an image's hash grid, as a power of two within 2^14 ... 2^24.

    At most a quarter of the pixels, as many as the finest level has cells over them: few of these collide.
    """
    return min(max(int(math.log2(n_pixels / 4)), LOG2_TABLE[0]), LOG2_TABLE[1])


def evaluate_snapshot(
    path: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None, device: Any = None
) -> dict[str, Any]:
    """Measures of a snapshot against its image, as `ImageTask.evaluate` gives them.

    Args:
        source: Where the image is now; by default where it was when the fit began.

    Raises:
        SnapshotError, ImageError: A snapshot or source that cannot be used.
    """
    fitted, fit = load_fit(path, device)
    pixels = PixelSource(fit["source"] if source is None else source)
    sizes = {"snapshot_bytes": Path(path).stat().st_size, "source_bytes": pixels.n_bytes}
    return measure(fitted, pixels) | sizes


def _make_strata(seed: int, first_row: int, n_rows: int, window: tuple[int, int, int, int]) -> Any:
    x0, y0, x1, y1 = window
    n_pixels = (x1 - x0) * (y1 - y0)
    n_strata = max(1, min(n_rows, n_pixels))
    strata = px.Strata()
    strata.seed, strata.first_row = seed & 0x7FFFFFFF, first_row
    strata.n_rows, strata.n_strata = n_rows, n_strata
    strata.x0, strata.y0, strata.width, strata.height = x0, y0, x1 - x0, y1 - y0
    strata.length, strata.n_longer = divmod(n_pixels, n_strata)
    # Strata about as high as wide
    strata.band_height = max(1, min(y1 - y0, round(math.sqrt(n_pixels / n_strata))))
    return strata
