"""What backpropagation through a field leaves on the device for an optimizer or a caller to use."""

from __future__ import annotations

from dataclasses import dataclass

import warp as wp


@dataclass(frozen=True)
class Gradients:
    """Gradients of one batch. Rows are summed in chunks of fixed size, so that threads change no result.

    Attributes:
        chunk_size: Rows per chunk.
        chunk_gradient: (chunks, network parameters) float32 gradient of the network's weights.
        chunk_loss: (chunks) float32 part of the loss.
        chunk_finite: (chunks) int, 0 where a gradient is not finite.
        dL_dgrid: (grid levels, rows, features) float32 gradient of the grids' features; None on CUDA.
        dL_dcode: (rows, network inputs) gradient of the encoded inputs times the passes' loss scale, float16 on CUDA and
            float32 on the CPU, where it is None unless the gradient of the inputs was asked for.
    """

    chunk_size: int
    chunk_gradient: wp.array
    chunk_loss: wp.array
    chunk_finite: wp.array
    dL_dgrid: wp.array | None
    dL_dcode: wp.array | None
