"""`Occupancy`: which cells of space hold something, learned beside a radiance field so that rays skip the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import warp as wp

from nrc.field import Field
from nrc.kernels import occupancy as ko
from nrc.launch import launch

DECAY = 0.95  # of a cell's thickness per look at it
MAX_THRESHOLD = 0.01  # opacity of the shortest step from which a cell is occupied, unless the mean is less
MIN_STEP = 3.0**0.5 / 1024.0  # length of the shortest step, in units of the unit cube
N_DRAWS = 1 << 17  # cells looked at in one pass
PASSES = ko.N_CELLS // N_DRAWS  # that see every cell of a cascade


class Occupancy:
    """Cascades of 128³ cells around the unit cube; see `nrc.kernels.occupancy` for their layout.

    A cell holds the largest optical thickness of a shortest step seen in it, which decays with every further look. It
    is occupied where that is above the mean of the finest cascade or `MAX_THRESHOLD`, whichever is less. A cell of a
    coarser cascade is occupied as well where a finer one inside is.

    Args:
        aabb_scale: Side of the scene's box around (0.5, 0.5, 0.5), a power of two.
        device: Warp device.

    Attributes:
        n_cascades: Cascade c has side 2^c.
        thickness: (n_cascades * 128³) float, -1 where no camera sees the cell.
        bits: (n_cascades * 128³ / 64) uint64.
    """

    def __init__(self, aabb_scale: int, device: wp.Device) -> None:
        self.n_cascades = (aabb_scale - 1).bit_length() + 1
        self.device = device
        self._lower, self._inverse_size = 0.5 - 0.5 * aabb_scale, 1.0 / aabb_scale
        n_words = self.n_cascades * ko.N_WORDS
        self.thickness = wp.zeros(self.n_cascades * ko.N_CELLS, dtype=float, device=device)
        self.bits = wp.full(n_words, wp.uint64(0xFFFFFFFFFFFFFFFF), dtype=wp.uint64, device=device)
        self._sums = wp.zeros(ko.N_CELLS // ko.SUM_CELLS, dtype=float, device=device)
        self._threshold = wp.zeros(1, dtype=float, device=device)
        self._n_before = wp.zeros(n_words, dtype=int, device=device)
        self._cell = wp.zeros(N_DRAWS, dtype=int, device=device)
        self._x = wp.zeros(N_DRAWS, dtype=wp.vec3, device=device)
        self._count = wp.zeros(1, dtype=int, device=device)
        self._code: Any = None

    def mark_seen(self, cameras: Any, near: float) -> None:
        """Rule out for good the cells that no camera sees; `cameras` as `Views.upload` gives them."""
        launch(
            ko.mark_seen_cells,
            self.n_cascades * ko.N_WORDS,
            inputs=[cameras, near],
            outputs=[self.thickness],
            device=self.device,
        )

    def update(
        self, density: Field, params: wp.array, *, seed: int, update: int, passes: int, occupied_passes: int
    ) -> None:
        """Look at the density in some cells and decide anew which are occupied.

        Args:
            density: Field whose first output is the logarithm of density.
            params: Its parameters.
            seed, update: What is drawn depends on these two alone.
            passes: Sets of `N_DRAWS` evenly spread cells to look at; `PASSES` a cascade are all.
            occupied_passes: Sets of up to `N_DRAWS` evenly spread occupied cells to look at before.
        """
        if self._code is None or self._code.shape[1] != density.n_output_dims:
            self._code = wp.zeros((N_DRAWS, density.n_output_dims), dtype=float, device=self.device)
        for k in range(occupied_passes):
            self._draw_occupied(seed, update * occupied_passes + k)
            self._look(density, params, self._count)
        stride = self.n_cascades * PASSES
        for k in range(passes):
            offset = (update * passes + k) % stride
            launch(
                ko.draw_cells,
                N_DRAWS,
                inputs=[seed, update, stride, offset, self._lower, self._inverse_size],
                outputs=[self._cell, self._x],
                device=self.device,
            )
            self._look(density, params, None)
        self.set_bits()

    def set_bits(self) -> None:
        """Decide from the cells' thickness which are occupied."""
        device = self.device
        launch(
            ko.sum_thickness,
            self._sums.shape[0],
            inputs=[self.thickness],
            outputs=[self._sums],
            device=device,
            range_size=64,
        )
        launch(ko.choose_threshold, 1, inputs=[MAX_THRESHOLD, self._sums], outputs=[self._threshold], device=device)
        launch(
            ko.set_bits,
            self.bits.shape[0],
            inputs=[self.thickness, self._threshold],
            outputs=[self.bits],
            device=device,
        )
        for cascade in range(1, self.n_cascades):
            launch(ko.join_finer_bits, ko.N_WORDS // 8, inputs=[cascade], outputs=[self.bits], device=device)

    def fraction(self) -> float:
        """Part of the finest cascade's cells that is occupied. Reads back."""
        bits = self.bits.numpy()[: ko.N_WORDS].view(np.uint8)
        return float(np.unpackbits(bits).mean())

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        return {"occupancy grid": ko.set_bits}

    def _draw_occupied(self, seed: int, sample: int) -> None:
        n_words, device = self.bits.shape[0], self.device
        launch(ko.count_occupied, n_words, inputs=[self.bits], outputs=[self._n_before], device=device)
        wp.utils.array_scan(self._n_before, self._n_before, inclusive=True)
        launch(
            ko.draw_occupied_cells,
            N_DRAWS,
            inputs=[
                seed,
                sample,
                N_DRAWS,
                n_words,
                self._lower,
                self._inverse_size,
                self.bits,
                self._n_before,
            ],
            outputs=[self._cell, self._x, self._count],
            device=device,
        )

    def _look(self, density: Field, params: wp.array, count: wp.array | None) -> None:
        density.inference(self._x, self._code, params=params, count=count)
        launch(
            ko.update_cells,
            N_DRAWS,
            inputs=[DECAY, MIN_STEP, count, self._cell, self._code],
            outputs=[self.thickness],
            device=self.device,
        )
