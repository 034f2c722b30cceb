"""Evaluation and backpropagation of a field on CUDA: half-precision products with single-precision sums."""

from __future__ import annotations

from typing import Any

import warp as wp

from .gradients import Gradients, chunk_size_of, max_chunks, no_sums
from .kernels import encoding as enc
from .kernels import grid_cuda, network_mma, network_tile, tile
from .kernels import network as net
from .launch import launch

# Powers of two, so that dividing by them rounds nothing: of gradients that a caller gives, and, so that half precision
# holds one row's part of a mean whatever the batch, of a loss times 1 / (rows x outputs).
LOSS_SCALE, ROW_SCALE = 128.0, 1.0 / 256.0
ROW_MULTIPLE = 128  # what rows are allocated in: whole groups of either implementation
MIN_MMA_ARCH = 80  # the oldest compute capability whose tensor cores `network_mma` programs


class CudaPasses:
    """Kernels and working memory of one encoding and, unless it stands alone, its network.

    Nothing is allocated in a call whose rows are reserved, and nothing is read back: calls can be captured in a graph.

    Args:
        dtype: Of the products' operands and stored gradients: float16, or float32 where `mma` is false.
        mma: Whether the network is that of `network_mma` or that of `network_tile`; by default the former where the
            device has the instructions and the network is a FullyFusedMLP.

    Attributes:
        table_dtype: Of the gradients that `accumulate_grids` adds.
        input_gradient_kernel: Carries dL_dcode on to the inputs.

    Raises:
        ValueError: The network is too wide for the device's shared memory.
    """

    def __init__(
        self,
        encoding: enc.EncodingConfig,
        network: net.NetworkConfig | None,
        device: wp.Device,
        *,
        dtype: Any = wp.float16,
        mma: bool | None = None,
    ) -> None:
        self.encoding, self.network, self.device = encoding, network, device
        self.dtype: Any = dtype if network else wp.float32
        self.table_dtype: Any = self.dtype
        self.input_gradient_kernel = enc.make_input_gradient(encoding, self.dtype)
        self._n_reserved = -1
        self._no_codes = self._zeros(0, 0, dtype=self.dtype)
        if network is None:
            self._evaluate = enc.make_encode_rows(encoding)
            self._no_sums = no_sums(device)
            return
        self._gemm = device.is_cuda and device.arch >= MIN_MMA_ARCH
        if mma is None:
            mma = self._gemm and network.otype == "FullyFusedMLP"
        self.mma = mma
        if mma:
            self._use_mma(network)
        else:
            self._use_tiles(network)
        self._weights = self._zeros(self._n_packed, dtype=self.dtype)
        self._dL_dcode = self._no_codes

    def _use_mma(self, network: net.NetworkConfig) -> None:
        self._pack = network_mma.make_pack_weights(network)
        self._evaluate = network_mma.make_infer_mma(self.encoding, network)
        self._accumulate = network_mma.make_accumulate_weight_gradient_mma(network)
        self._n_packed, self._n_delta_columns = network_mma.packed_size(network), network_mma.delta_columns(network)
        self._group_rows = network_mma.WARP
        self._group_threads = self._gradient_threads = network_mma.WARP
        self._gradient_groups = network_mma.weight_gradient_warps(network)

    def _use_tiles(self, network: net.NetworkConfig) -> None:
        dtype, gemm = self.dtype, self._gemm
        tiling = tile.Tiling(network, dtype)
        self._pack = network_tile.make_pack_weights_tile(network, dtype)
        self._evaluate = network_tile.make_infer_tile(self.encoding, network, dtype, gemm)
        self._accumulate = network_tile.make_accumulate_weight_gradient_tile(network, dtype, gemm)
        self._n_packed, self._n_delta_columns = tiling.n_packed, tiling.n_delta_columns
        self._group_rows, self._gradient_groups = tiling.rows, tiling.n_gradient_blocks
        self._group_threads, self._gradient_threads = tiling.rows, network_tile.GRADIENT_THREADS
        if self.device.is_cpu:  # where a block has one thread
            self._group_threads = self._gradient_threads = 1
            return
        needed, available = tiling.shared_memory(tiling.rows), self.device.max_shared_memory_per_block
        if needed > available:
            raise ValueError(
                f"a network {tiling.width} wide needs {needed} bytes of shared memory, {self.device} has {available}"
            )

    def evaluate(self, params: wp.array, x: wp.array, out: wp.array, count: wp.array | None) -> None:
        """Write the outputs at `x`."""
        n_rows = x.shape[0]
        if self.network is None:
            launch(self._evaluate, n_rows, inputs=[params, n_rows, count, x], outputs=[out], device=self.device)
            return
        self._pack_weights(params)
        self._launch_groups(self._evaluate, n_rows, [self._weights, params, n_rows, count, x], [out])

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
        if self.network is None:
            return Gradients(max(1, x.shape[0]), *self._no_sums, None, y)
        n_rows = x.shape[0]
        self.reserve(n_rows)
        if input_gradient:
            self._reserve_codes()
        dL_dcode = self._dL_dcode if input_gradient or self.encoding.grids else self._no_codes
        scale = self._loss_scale(loss, n_rows, count)
        self._pack_weights(params)
        stored = [self._activations, self._deltas]
        self._launch_groups(
            self._backpropagate_kernel(loss),
            n_rows,
            [self._weights, params, scale, n_rows, count, x, y, pdf],
            [*stored, dL_dcode, self._row_loss],
        )
        size = chunk_size_of(n_rows, self.network.n_params)
        n = -(-n_rows // size) * self._gradient_groups * self._gradient_threads
        launch(
            self._accumulate,
            n,
            inputs=[size, scale, n_rows, count, *stored, self._row_loss],
            outputs=[self._chunk_gradient, self._chunk_loss, self._chunk_finite],
            device=self.device,
            range_size=n,
        )
        return Gradients(
            size,
            self._chunk_gradient,
            self._chunk_loss,
            self._chunk_finite,
            None,
            dL_dcode if dL_dcode.shape[0] else None,
            scale,
        )

    def accumulate_grids(self, x: wp.array, state: wp.array, gradients: Gradients, dL_dtable: wp.array) -> None:
        """Add the gradients of the grids' tables, which start `dL_dtable`, if `state` says so.

        Times `gradients.loss_scale` in a table of `table_dtype`, without it in one of float32.
        """
        scale = 1.0 / gradients.loss_scale if dL_dtable.dtype == wp.float32 else 1.0
        n_rows = x.shape[0]
        for part in self.encoding.grids:
            launch(
                grid_cuda.make_accumulate_grid_cuda(self.encoding, part, self.dtype, dL_dtable.dtype),
                part.config.n_levels * n_rows,
                inputs=[scale, n_rows, state, x, gradients.dL_dcode],
                outputs=[dL_dtable],
                device=self.device,
                range_size=n_rows,
            )

    def reserve(self, n_rows: int) -> None:
        """Allocate what `backpropagate` needs for so many rows."""
        if n_rows <= self._n_reserved or self.network is None:
            return
        n_rows = self._n_reserved = -(-n_rows // ROW_MULTIPLE) * ROW_MULTIPLE
        network = self.network
        n_hidden = network.n_hidden_layers * network.n_neurons
        self._activations = self._zeros(n_rows, network.n_inputs + n_hidden, dtype=self.dtype)
        self._deltas = self._zeros(n_rows, self._n_delta_columns, dtype=self.dtype)
        self._row_loss = self._zeros(n_rows)
        n_chunks = max_chunks(n_rows, self.network.n_params)
        self._chunk_gradient = self._zeros(n_chunks, network.n_params)
        self._chunk_loss = self._zeros(n_chunks)
        self._chunk_finite = self._zeros(n_chunks, dtype=int)
        if self.encoding.grids:
            self._reserve_codes()

    def _reserve_codes(self) -> None:
        if self.network and self._dL_dcode.shape[0] < self._n_reserved:
            self._dL_dcode = self._zeros(self._n_reserved, self.network.n_inputs, dtype=self.dtype)

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels of `evaluate` by name, for `nrc.launch.prepare`."""
        if self.network is None:
            return {"encoding": self._evaluate}
        return {"weight packing": self._pack, "inference": self._evaluate}

    def training_kernels(self, loss: str | None, *, input_gradient: bool = False) -> dict[str, wp.Kernel]:
        """Kernels of `backpropagate` and `accumulate_grids` by name, for `nrc.launch.prepare`.

        With `input_gradient`, also the one that carries the gradient on to the inputs.
        """
        kernels = {"input gradient": self.input_gradient_kernel} if input_gradient else {}
        if self.network:
            kernels |= {"backpropagation": self._backpropagate_kernel(loss), "weight gradient": self._accumulate}
        for i, part in enumerate(self.encoding.grids):
            kernels[f"grid gradient {i}"] = grid_cuda.make_accumulate_grid_cuda(
                self.encoding, part, self.dtype, self.table_dtype
            )
        return kernels

    def _backpropagate_kernel(self, loss: str | None) -> wp.Kernel:
        assert self.network is not None
        if self.mma:
            return network_mma.make_backpropagate_mma(self.encoding, self.network, loss)
        return network_tile.make_backpropagate_tile(self.encoding, self.network, loss, self.dtype, self._gemm)

    def _loss_scale(self, loss: str | None, n_rows: int, count: wp.array | None) -> float:
        if self.dtype != wp.float16:
            return 1.0
        if loss is None or count is not None or self.network is None:  # a mean over how many is not known here
            return LOSS_SCALE
        return max(LOSS_SCALE, ROW_SCALE * (1 << (n_rows * self.network.n_outputs).bit_length()))

    def _pack_weights(self, params: wp.array) -> None:
        launch(self._pack, self._n_packed, inputs=[params], outputs=[self._weights], device=self.device)

    def _launch_groups(self, kernel: wp.Kernel, n_rows: int, inputs: list[Any], outputs: list[Any]) -> None:
        """Launch whole groups of threads, which share work on a number of rows; on the CPU one after the other."""
        n = -(-n_rows // self._group_rows) * self._group_threads
        launch(kernel, n, inputs=inputs, outputs=outputs, device=self.device, range_size=n)

    def _zeros(self, *shape: int, dtype: Any = float) -> wp.array:
        return wp.zeros(shape, dtype=dtype, device=self.device)
