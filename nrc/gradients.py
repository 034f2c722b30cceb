"""What backpropagation through a field leaves on the device for an optimizer or a caller to use."""

from __future__ import annotations

from dataclasses import dataclass

import warp as wp

MIN_CHUNK, MAX_CHUNK = 64, 256
MIN_CHUNKS, MAX_CHUNKS, MAX_SUMS = 16, 128, 1 << 25  # chunks of a large batch; floats that their sums may take


def chunk_size_of(n_rows: int, n_weights: int) -> int:
    """Rows that share a sum of weight gradients: of batch and network alone, as results should be."""
    size = min(MAX_CHUNK, max(MIN_CHUNK, n_rows // 32))
    size = max(size, -(-n_rows // _most(n_weights)))
    return 1 << (size - 1).bit_length()  # the next power of two


def max_chunks(n_rows: int, n_weights: int) -> int:
    """Chunks that batches of up to `n_rows` rows may have."""
    return min(_most(n_weights), -(-n_rows // MIN_CHUNK))


def _most(n_weights: int) -> int:
    return max(MIN_CHUNKS, min(MAX_CHUNKS, MAX_SUMS // max(1, n_weights)))


@dataclass(frozen=True)
class Gradients:
    """Gradients of one batch. Rows are summed in chunks of fixed size, so that threads change no result.

    Attributes:
        chunk_size: Rows per chunk.
        chunk_gradient: (chunks, network parameters) float32 gradient of the network's weights.
        chunk_loss: (chunks) float32 part of the loss.
        chunk_finite: (chunks) int, 0 where a gradient is not finite.
        dL_dgrid: (grid levels, rows, features) float32 gradient of the grids' features; None on CUDA.
        dL_dcode: (rows, network inputs) gradient of the encoded inputs times `loss_scale`, float16 on CUDA and float32
            on the CPU, where it is None unless the gradient of the inputs was asked for.
        loss_scale: Power of two that keeps half-precision gradients away from underflow; 1 on the CPU.
    """

    chunk_size: int
    chunk_gradient: wp.array
    chunk_loss: wp.array
    chunk_finite: wp.array
    dL_dgrid: wp.array | None
    dL_dcode: wp.array | None
    loss_scale: float = 1.0


def no_sums(device: wp.Device) -> tuple[wp.array, wp.array, wp.array]:
    """Chunk gradient, loss and finiteness of an encoding alone, which has no weights: one empty chunk."""
    return (
        wp.zeros((1, 0), dtype=float, device=device),
        wp.zeros(1, dtype=float, device=device),
        wp.ones(1, dtype=int, device=device),
    )
