"""Evaluation and backpropagation of a field on the CPU: blocks of rows on all cores, nothing kept between calls."""

from __future__ import annotations

from typing import Any

import warp as wp

from .gradients import Gradients, chunk_size_of, max_chunks, no_sums
from .kernels import encoding as enc
from .kernels import encoding_wide, grid_wide, network_wide
from .kernels import network as net
from .launch import heavy_range, launch

SLICE_ROWS = 65536  # rows evaluated at once; their grid features are kept between two launches


class CpuPasses:
    """Kernels and working memory of one encoding and, unless it stands alone, its network.

    Attributes:
        input_gradient_kernel: Carries dL_dcode on to the inputs.
    """

    def __init__(self, encoding: enc.EncodingConfig, network: net.NetworkConfig | None, device: wp.Device) -> None:
        self.encoding, self.network, self.device = encoding, network, device
        self.input_gradient_kernel = enc.make_input_gradient(encoding, wp.float32)
        self._encode_grids = [grid_wide.make_encode_grid_wide(encoding, part) for part in encoding.grids]
        self._accumulate_grids = [grid_wide.make_accumulate_grid_wide(encoding, part) for part in encoding.grids]
        self._features = self._allocate_features(SLICE_ROWS)
        self._n_reserved = -1
        if network is None:
            self._evaluate = encoding_wide.make_encode_wide(encoding)
            self._no_sums = no_sums(device)
            self._split_gradient = enc.make_split_gradient(encoding)
            return
        self._evaluate = network_wide.make_infer_wide(encoding, network)
        self._dL_dcode = self._zeros(0, network.n_inputs)

    def evaluate(self, params: wp.array, x: wp.array, out: wp.array, count: wp.array | None) -> None:
        """Write the outputs at `x`, in slices whose grid features are read level by level."""
        for row in range(0, x.shape[0], SLICE_ROWS):
            n_rows = min(SLICE_ROWS, x.shape[0] - row)
            self._read_grids(params, row, n_rows, count, x, self._features)
            n_blocks = -(-n_rows // encoding_wide.BLOCK)
            launch(
                self._evaluate,
                n_blocks,
                inputs=[params, row, n_rows, count, x, self._features],
                outputs=[out],
                device=self.device,
                range_size=heavy_range(n_blocks),
            )

    def backpropagate(
        self,
        params: wp.array,
        x: wp.array,
        y: wp.array,
        count: wp.array | None,
        *,
        loss: str | None,
        pdf: wp.array | None,
        input_gradient: bool,
    ) -> Gradients:
        """Gradients of the mean `loss` of the outputs at `x` against targets `y`; without a loss, `y` is dL/doutput.

        Their arrays are overwritten by the next call. Allocates where more rows come than ever before.
        """
        n_rows = x.shape[0]
        self.reserve(n_rows)
        if self.network is None:
            launch(
                self._split_gradient, n_rows, inputs=[n_rows, count, y], outputs=[self._dL_dgrid], device=self.device
            )
            return Gradients(max(1, n_rows), *self._no_sums, self._dL_dgrid, y)
        size = chunk_size_of(n_rows, self.network.n_params)
        n_chunks = -(-n_rows // size)
        if input_gradient and self._dL_dcode.shape[0] < n_rows:
            self._dL_dcode = self._zeros(self._n_reserved, self.network.n_inputs)
        gradients = Gradients(
            size,
            self._chunk_gradient,
            self._chunk_loss,
            self._chunk_finite,
            self._dL_dgrid,
            self._dL_dcode if input_gradient else None,
        )
        # The features' buffer becomes their gradients'
        self._read_grids(params, 0, n_rows, count, x, self._dL_dgrid)
        launch(
            network_wide.make_backpropagate_wide(self.encoding, self.network, loss, input_gradient),
            n_chunks,
            inputs=[params, size, n_rows, count, x, y, pdf],
            outputs=[
                self._dL_dgrid,
                gradients.dL_dcode,
                self._chunk_gradient,
                self._chunk_loss,
                self._chunk_finite,
            ],
            device=self.device,
            range_size=heavy_range(n_chunks),
        )
        return gradients

    def accumulate_grids(self, x: wp.array, state: wp.array, gradients: Gradients, dL_dtable: wp.array) -> None:
        """Add the gradients of the grids' tables, which start `dL_dtable`, if `state` says so."""
        for part, accumulate in zip(self.encoding.grids, self._accumulate_grids, strict=True):
            launch(
                accumulate,
                part.config.n_levels,
                inputs=[state, x, gradients.dL_dgrid, dL_dtable],
                device=self.device,
                range_size=1,
            )

    def reserve(self, n_rows: int) -> None:
        """Allocate what `backpropagate` needs for so many rows."""
        if n_rows <= self._n_reserved:
            return
        self._n_reserved = n_rows
        self._dL_dgrid = self._allocate_features(n_rows)
        if self.network:
            n_chunks = max_chunks(n_rows, self.network.n_params)
            self._chunk_gradient = self._zeros(n_chunks, self.network.n_params)
            self._chunk_loss = self._zeros(n_chunks)
            self._chunk_finite = self._zeros(n_chunks, dtype=int)

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of `evaluate` by name, for `nrc.launch.prepare`."""
        grids = {f"grid {i}": kernel for i, kernel in enumerate(self._encode_grids)}
        return grids | {"inference" if self.network else "encoding": self._evaluate}

    def training_kernels(self, loss: str | None, *, input_gradient: bool = False) -> dict[str, wp.Kernel]:
        """Kernels of `backpropagate` by name, for `nrc.launch.prepare`; with the inputs' gradient, of that as well."""
        assert self.network is not None
        make = network_wide.make_backpropagate_wide
        kernels = {"backpropagation": make(self.encoding, self.network, loss, input_gradient)}
        return kernels | ({"input gradient": self.input_gradient_kernel} if input_gradient else {})

    def _read_grids(
        self, params: wp.array, row: int, n_rows: int, count: wp.array | None, x: wp.array, out: wp.array
    ) -> None:
        """Write the grid features of rows [row, row + n_rows) of `x`, level by level, into `out`."""
        n_parts = -(-n_rows // grid_wide.GRID_ROWS)
        for part, encode in zip(self.encoding.grids, self._encode_grids, strict=True):
            launch(
                encode,
                part.config.n_levels * n_parts,
                inputs=[params, row, n_rows, count, x],
                outputs=[out],
                device=self.device,
                range_size=heavy_range(part.config.n_levels * n_parts),
            )

    def _allocate_features(self, n_rows: int) -> wp.array:
        """Room for the grid features of `n_rows` rows: (grid levels, n_rows, n_features_per_level)."""
        grids = [part.config for part in self.encoding.grids]
        n_levels = sum(grid.n_levels for grid in grids)
        n_features = max([grid.n_features_per_level for grid in grids], default=1)
        return self._zeros(max(1, n_levels), n_rows if n_levels else 1, n_features)

    def _zeros(self, *shape: int, dtype: Any = float) -> wp.array:
        return wp.zeros(shape, dtype=dtype, device=self.device)
