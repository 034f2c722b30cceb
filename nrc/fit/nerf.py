"""`NerfTask`: a radiance field from photographs with known cameras (Mildenhall et al. 2020, Müller et al. 2022).

A step draws pixels, marches their rays through the occupied cells, keeps the samples until each ray is opaque,
composites their colours over a random background and descends the gradient of the pixels' loss. The number of rays
follows from how many samples fit the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import warp as wp

from nrc.config import parse_loss, parse_optimizer
from nrc.fit.nerf_render import evaluate_views, write_pictures
from nrc.fit.occupancy import PASSES
from nrc.fit.radiance_field import RadianceField
from nrc.fit.settings import make_config
from nrc.fit.views import Views, load_views
from nrc.kernels import nerf as kn
from nrc.kernels import occupancy as ko
from nrc.kernels.loss import check_loss
from nrc.launch import heavy_range, launch, resolve_device
from nrc.optimizer import Optimizer, restore
from nrc.snapshot import SnapshotError, take_tensor

FINEST = 2048  # resolution of the finest level, per unit of space
N_STEPS, N_STEPS_CPU = 1024, 512  # along the diagonal of the unit cube
UPDATE_INTERVAL = 16  # steps between updates of the occupancy and of the number of rays
WARM_UP = 256  # steps with thorough updates of the occupancy
GRADIENT_SCALE = 1024.0  # keeps gradients of single samples within half precision
MARCHED = 4  # samples in occupied cells that fit, as a multiple of those kept
FIRST_SAMPLES = 256  # of a ray, before it is known
FILL = 0.95  # of the batch that the number of rays aims at
EXPOSURE_RATE = 1e-3  # learning rate of the images' exposures
RANDOM_BACKGROUND = -1.0
BLACK, WHITE = 0.0, 1.0
N_PROGRESS = 4096  # rays
PROGRESS_SAMPLE = -1  # of the generator; training's are its steps


class NerfTask:
    """Trains a `RadianceField` on photographs.

    Args:
        source: What `nrc.fit.views.load_views` reads.
        seed: Of initial parameters and of what steps draw.
        device: Warp device; the first GPU, else the CPU.
        encoding, config, grid, batch_size: As of `nrc.fit.settings.make_config`.
        holdout: Every n-th view is a test view where the data name none; see `load_views`.
        downscale: Average the photographs over boxes of so many pixels squared.
        exposure: Learn a gain of each photograph and channel.
        crop: Part of space to fit, a lower and a higher corner, (2, 3) in unit-cube space.

    Attributes:
        model: The field.
        views, test_views: Photographs to learn from and to measure with.
        n_rays: Of the next step.

    Raises:
        SceneError, ImageError: The source cannot be used.
        ValueError: An unknown or impossible setting.
    """

    kind = "nerf"

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        seed: int = 1337,
        device: Any = None,
        encoding: str = "hash",
        config: Mapping[str, Any] | None = None,
        grid: Mapping[str, int] | None = None,
        batch_size: int | None = None,
        holdout: int | None = None,
        downscale: int = 1,
        exposure: bool = False,
        crop: Any = None,
    ) -> None:
        self.source, self.seed, self.device = Path(source), seed, resolve_device(device)
        self.holdout, self.downscale = holdout, downscale
        self.views = load_views(source, split="train", holdout=holdout, downscale=downscale)
        self.test_views = load_views(source, split="test", holdout=holdout, downscale=downscale)
        self.warnings = tuple(dict.fromkeys(self.views.warnings + self.test_views.warnings))
        self.config = make_config(
            "nerf",
            n_input_dims=3,
            finest=FINEST * self.views.aabb_scale,
            device=self.device,
            encoding=encoding,
            config=config,
            grid=grid,
            batch_size=batch_size,
        )
        self.loss_otype = parse_loss(self.config.loss)
        check_loss(self.loss_otype, 3)
        self.model = RadianceField(
            self.config,
            self.views.aabb_scale,
            near=self.views.near,
            crop=crop,
            n_steps=N_STEPS_CPU if self.device.is_cpu else N_STEPS,
            seed=seed,
            device=self.device,
        )
        self.samples_per_step = self.config.batch_size
        if self.samples_per_step < kn.MAX_SAMPLES:
            raise ValueError(f"batch_size must hold a ray, {kn.MAX_SAMPLES} samples, got {self.samples_per_step}")
        optimizer = scale_optimizer(self.config.optimizer, GRADIENT_SCALE)
        self.density_optimizer = Optimizer(self.model.density, optimizer, batch_size=self.samples_per_step)
        self.color_optimizer = Optimizer(self.model.color, optimizer, batch_size=self.samples_per_step)
        self.cameras = self.views.upload(self.device)
        self._test_cameras: Any = None
        self.model.occupancy.mark_seen(self.cameras, self.views.near)
        self._allocate(len(self.views) if exposure else 0)
        self.n_params = self.model.n_params + 3 * self._log_gain.shape[0]
        self.n_steps = 0
        self.n_rays = max(1, self.samples_per_step // FIRST_SAMPLES)

    def _allocate(self, n_exposures: int) -> None:
        n = self.samples_per_step
        self.max_rays = r = max(256, n // 2)
        self.max_marched = m = MARCHED * n

        def zeros(*shape: int, dtype: Any = float) -> Any:
            return wp.zeros(shape, dtype=dtype, device=self.device)

        self.rays: Any = kn.RaysView()
        for name in ("origin", "direction", "background"):
            setattr(self.rays, name, zeros(r, dtype=wp.vec3))
        for name in ("image", "n_marched", "end_marched", "n_kept", "end_kept"):
            setattr(self.rays, name, zeros(r, dtype=int))
        self.rays.target, self.rays.t_first = zeros(r, 3), zeros(r)
        self._x, self._dt, self._code = zeros(m, dtype=wp.vec3), zeros(m), zeros(m, kn.N_CODE)
        self._kept_x, self._kept_dt = zeros(n, dtype=wp.vec3), zeros(n)
        self._color_x, self._color = zeros(n, kn.N_COLOR_INPUTS), zeros(n, 3)
        self._dL_dcolor, self._dL_dcolor_x = zeros(n, 3), zeros(n, kn.N_COLOR_INPUTS)
        self._n_marched, self._n_kept = zeros(1, dtype=int), zeros(1, dtype=int)
        self._ray_loss, self._loss = zeros(r), zeros(1)
        self._loss_sums = zeros(-(-r // kn.SUM_RAYS), dtype=wp.vec2)
        self._log_gain, self._gain_moments = zeros(n_exposures, 3), zeros(n_exposures, 6)
        self._dL_dlog_gain = zeros(r if n_exposures else 0, 3)
        self._no_gain = zeros(0, 3)

    def identity(self) -> dict[str, Any]:
        """Digests of photographs and cameras, and all settings."""
        return {
            "kind": self.kind,
            "views": _digest(self.views),
            "test_views": _digest(self.test_views),
            "settings": self.config.as_dict(),
            "aabb_scale": self.model.aabb_scale,
            "crop": self.model.crop.tolist(),
            "march_steps": self.model.n_steps,
            "exposure": bool(self._log_gain.shape[0]),
            "seed": self.seed,
        }

    def step(self) -> wp.array:
        """Take one step along the gradient of the mean loss of random pixels, which is returned.

        Where no ray meets an occupied cell nothing is learned.
        """
        if self.n_steps % UPDATE_INTERVAL == 0:
            self._update_occupancy()
        model = self.model
        n_rays, device = self.n_rays, self.device
        self._march(self.cameras, self.n_steps, n_rays, 0, n_rays, RANDOM_BACKGROUND, model.density.params)
        self._shade(n_rays, model.color.params)
        self._composite(n_rays, self.loss_otype, self._log_gain)
        n = -(-n_rays // kn.SUM_RAYS)
        launch(kn.sum_loss, n, inputs=[n_rays, self.rays, self._ray_loss], outputs=[self._loss_sums], device=device)
        launch(kn.mean_loss, 1, inputs=[n, self._loss_sums], outputs=[self._loss], device=device)
        count = self._n_kept
        self.color_optimizer.step(self._color_x, self._dL_dcolor, count=count, dL_dx=self._dL_dcolor_x)
        self.density_optimizer.step(self._kept_x, self._dL_dcolor_x[:, : kn.N_CODE], count=count)
        if self._log_gain.shape[0]:
            self._adjust_exposure()
        self.n_steps += 1
        if self.n_steps % UPDATE_INTERVAL == 0:
            self._choose_n_rays()
        return self._loss

    def _update_occupancy(self) -> None:
        """Look at the density everywhere at first, later where something is and in a sample of the rest."""
        occupancy, warm_up = self.model.occupancy, self.n_steps < WARM_UP
        everywhere = PASSES * occupancy.n_cascades
        if self.n_steps == 0:
            passes = everywhere
        elif self.device.is_cpu:  # a look everywhere takes as long as ten steps
            passes = 2 if warm_up else 1
        else:
            passes = everywhere if warm_up else everywhere // 4
        occupied_passes = 0 if warm_up else 1 if self.device.is_cpu else everywhere // 4
        occupancy.update(
            self.model.density,
            self.model.density.params,
            seed=self.seed,
            update=self.n_steps // UPDATE_INTERVAL,
            passes=passes,
            occupied_passes=occupied_passes,
        )

    def _choose_n_rays(self) -> None:
        """As many rays as should fill the batch, going by the last step. Reads back."""
        marched = self.max_marched / max(1, int(self.rays.end_marched.numpy()[self.n_rays - 1]))
        kept = self.samples_per_step / max(1, int(self.rays.end_kept.numpy()[self.n_rays - 1]))
        self.n_rays = min(self.max_rays, max(1, int(FILL * self.n_rays * min(marched, kept))))

    def _march(
        self, cameras: Any, sample: int, n_rays: int, begin: int, end: int, background: float, params: wp.array
    ) -> None:
        """Begin rays [begin, end) of n_rays and evaluate the density in the occupied cells along them."""
        march, device, rays, n = self.model.march_view(), self.device, self.rays, end - begin
        arguments: dict[str, Any] = {"device": device, "range_size": heavy_range(n)}
        launch(
            kn.begin_rays,
            n,
            inputs=[cameras, march, self.seed, sample, n_rays, begin, background],
            outputs=[rays],
            **arguments,
        )
        wp.utils.array_scan(rays.n_marched[:n], rays.end_marched[:n], inclusive=True)
        launch(
            kn.write_samples,
            n,
            inputs=[march, n, self.max_marched, rays],
            outputs=[self._x, self._dt, self._n_marched],
            **arguments,
        )
        self.model.density.inference(self._x, self._code, params=params, count=self._n_marched)

    def _shade(self, n: int, params: wp.array) -> None:
        """Keep the samples until each of the `n` rays is opaque and evaluate their colours."""
        device, rays = self.device, self.rays
        launch(kn.count_kept, n, inputs=[self._code, self._dt], outputs=[rays], device=device)
        wp.utils.array_scan(rays.n_kept[:n], rays.end_kept[:n], inclusive=True)
        launch(
            kn.keep_samples,
            n,
            inputs=[n, self.samples_per_step, self._x, self._dt, self._code, rays],
            outputs=[self._kept_x, self._kept_dt, self._color_x, self._n_kept],
            device=device,
        )
        self.model.color.inference(self._color_x, self._color, params=params, count=self._n_kept)

    def _composite(self, n: int, loss_otype: str, log_gain: wp.array) -> None:
        """Composite the colours of `n` rays; their losses and the gradients."""
        launch(
            kn.make_composite(loss_otype),
            n,
            inputs=[GRADIENT_SCALE / n, log_gain, self.rays, self._color_x, self._kept_dt, self._color],
            outputs=[self._ray_loss, self._dL_dcolor, self._dL_dcolor_x, self._dL_dlog_gain],
            device=self.device,
        )

    def _adjust_exposure(self) -> None:
        launch(
            kn.adjust_exposure,
            self._log_gain.shape[0],
            inputs=[self.seed, self.n_steps, self.n_rays, EXPOSURE_RATE, self.rays, self._dL_dlog_gain],
            outputs=[self._gain_moments, self._log_gain],
            device=self.device,
            range_size=heavy_range(self._log_gain.shape[0]),
        )
        launch(kn.centre_exposure, 3, inputs=[], outputs=[self._log_gain], device=self.device)

    def progress(self) -> dict[str, float]:
        """PSNR [dB] of a fixed sample of the test views, with the averaged weights; on white where they have alpha."""
        if self._test_cameras is None:
            self._test_cameras = self.test_views.upload(self.device)
        density, color = self.density_optimizer.ema_params, self.color_optimizer.ema_params
        background = WHITE if self.test_views.has_alpha else BLACK
        total, begin, n = 0.0, 0, min(N_PROGRESS, max(1, self.n_rays // 2), self.max_rays)
        while begin < N_PROGRESS:
            end = min(N_PROGRESS, begin + n)
            self._march(self._test_cameras, PROGRESS_SAMPLE, N_PROGRESS, begin, end, background, density)
            self._shade(end - begin, color)
            self._composite(end - begin, "L2", self._no_gain)
            if (self.rays.n_marched.numpy()[: end - begin] == kn.DROPPED).any():
                n = max(1, n // 2)  # fewer at once fit
                continue
            total += float(self._ray_loss.numpy()[: end - begin].sum(dtype=np.float64))
            begin = end
        return {"psnr": -10.0 * math.log10(max(total / N_PROGRESS, 1e-12))}

    def evaluate(self) -> dict[str, Any]:
        """The measures that `evaluate_snapshot` describes."""
        return evaluate_views(self.use_average(), self.test_views)

    def pictures(self, folder: Path) -> dict[str, Path]:
        """Draw a test view beside its photograph, its depth and a novel view into `folder`."""
        return write_pictures(self.use_average(), self.test_views, folder)

    def use_average(self) -> RadianceField:
        """The field, set to be looked at with the averaged weights of the last step."""
        self.model.density_params = self.density_optimizer.ema_params
        self.model.color_params = self.color_optimizer.ema_params
        return self.model

    def state(self) -> dict[str, np.ndarray]:
        """Optimizers, occupancy, exposures, numbers of steps and rays."""
        counts = {"n_steps": np.array([self.n_steps], np.int64), "n_rays": np.array([self.n_rays], np.int64)}
        return {name: array.numpy() for name, array in self._arrays().items()} | counts

    def load_state(self, path: Path, state: dict[str, np.ndarray]) -> None:
        """Restore what `state` gave and the file `path` held. Raises SnapshotError, and then changes nothing."""
        n_steps, n_rays = (int(take_tensor(path, state, name, (1,), np.int64)[0]) for name in ("n_steps", "n_rays"))
        if n_steps < 0 or not 1 <= n_rays <= self.max_rays:
            raise SnapshotError(f"{path}: n_steps is {n_steps}, n_rays is {n_rays}")
        restore(path, state, self._arrays())
        self.n_steps, self.n_rays = n_steps, n_rays
        self.model.occupancy.set_bits()

    def _arrays(self) -> dict[str, wp.array]:
        arrays = {"occupancy.thickness": self.model.occupancy.thickness}
        for prefix, optimizer in (("density", self.density_optimizer), ("color", self.color_optimizer)):
            arrays |= {f"{prefix}.{name}": array for name, array in optimizer.state_arrays().items()}
        if self._log_gain.shape[0]:
            arrays |= {"log_gain": self._log_gain, "gain_moments": self._gain_moments}
        return arrays

    def save(self, path: Path, training: dict[str, Any]) -> None:
        """Write the field with its averaged weights, which `RadianceField.load` reads, and where the views are."""
        views = self.views
        fit = {
            "kind": self.kind,
            "source": str(self.source.resolve()),
            "holdout": self.holdout,
            "downscale": self.downscale,
            "test_views": _digest(self.test_views),
            "scale": views.scale,
            "offset": views.offset.tolist(),
            "rotation": views.rotation.tolist(),
            "exposure": np.exp(self._log_gain.numpy()).tolist(),
            **training,
        }
        self.use_average().save(path, fit)

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of training by name, for `nrc.launch.prepare`."""
        kernels: dict[str, wp.Kernel] = {
            "ray marching": kn.begin_rays,
            "occupancy grid": ko.set_bits,
            "compositing": kn.make_composite(self.loss_otype),
            "measuring": kn.make_composite("L2"),
        }
        for name, optimizer in (("density", self.density_optimizer), ("colour", self.color_optimizer)):
            field = optimizer.field
            training = field.passes.training_kernels(None, input_gradient=name == "colour")
            all_of = field.kernels() | training | optimizer.kernels()
            kernels |= {f"{name} {key}": kernel for key, kernel in all_of.items()}
        return kernels


def evaluate_snapshot(
    path: str | PathLike[str], *, source: str | PathLike[str] | None = None, device: Any = None
) -> dict[str, Any]:
    """Measure a snapshot of `NerfTask` against its test views.

    Args:
        source: The views, by default where they were when the fit began.
        device: Warp device; the first GPU, else the CPU.

    Returns:
        What `nrc.fit.nerf_render.evaluate_views` returns.

    Raises:
        SnapshotError: The snapshot cannot be used, or belongs to other views.
        SceneError, ImageError: The views cannot be read.
    """
    fit = RadianceField.load_fit(path)
    where = fit["source"] if source is None else source
    field = RadianceField.load(path, device)
    views = load_views(where, split="test", holdout=fit["holdout"], downscale=fit["downscale"])
    if _digest(views) != fit.get("test_views"):
        raise SnapshotError(f"{path}: fit: test_views are others than those of {where}")
    return evaluate_views(field, views)


def scale_optimizer(optimizer: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The optimizer that takes the same steps with gradients multiplied by `scale`; regularisation is part of them.

    Raises ValueError.
    """
    parsed = parse_optimizer(optimizer)
    scaled = deepcopy(dict(optimizer))
    inner = scaled
    while "nested" in inner:
        inner = inner["nested"]
    inner["l2_reg"] = scale * parsed.l2_reg
    if parsed.otype == "Adam":
        inner["epsilon"] = scale * parsed.epsilon
    else:
        inner["learning_rate"] = parsed.learning_rate / scale
    return scaled


def _digest(views: Views) -> str:
    """SHA-256 of photographs and cameras."""
    digest = hashlib.sha256()
    for array in (views.sizes, views.pixels, views.c2w, views.focal, views.center, views.distortion, views.model):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
