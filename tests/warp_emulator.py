"""A warp of 32 lanes on the CPU, to run the tensor-core kernels of `nrc/kernels/network_mma.py` without a GPU.

Warp runs a CPU block of 32 threads as fibers with a barrier between them. `EMULATED_PRIMITIVES` takes the place of
`mma.PRIMITIVES`: the instructions of a warp, with data exchanged through static arrays as the PTX ISA lays out
the fragments. All other code of the kernels is compiled as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import warp as wp

from nrc.kernels import mma

LANES = 32

EMULATED_PRIMITIVES = """
const int lane = wp_cpu_get_thread_idx();
static unsigned stage[512], words[32];
static float a_matrix[16][16], b_matrix[16][8];
auto sync_warp = [] { WP_TILE_SYNC(); };
auto as_uint = [](float value) { unsigned bits; __builtin_memcpy(&bits, &value, 4); return bits; };
auto as_float = [](unsigned bits) { float value; __builtin_memcpy(&value, &bits, 4); return value; };
// All lanes publish a word; `take` then finds it in `words`
auto exchange = [&](unsigned word, auto take) {
    words[lane] = word;
    sync_warp();
    const unsigned taken = take();
    sync_warp();
    return taken;
};
auto ballot = [&](bool vote) {
    return exchange(vote, [&] {
        unsigned votes = 0;
        for (int l = 0; l < 32; ++l) votes |= words[l] << l;
        return votes;
    });
};
auto shuffle_xor = [&](float value, int mask) {
    return as_float(exchange(as_uint(value), [&] { return words[lane ^ mask]; }));
};
auto fast_exp = [](float x) { return expf(x); };
auto fast_log = [](float x) { return logf(x); };
auto fast_sin = [](float x) { return sinf(x); };
auto fast_cos = [](float x) { return cosf(x); };
auto fast_reciprocal = [](float x) { return 1.0f / x; };
auto half_float = [](unsigned bits) { wp::half h; h.u = (unsigned short)bits; return wp::half_to_float(h); };
auto low_float = [&](unsigned halves) { return half_float(halves & 0xffffu); };
auto high_float = [&](unsigned halves) { return half_float(halves >> 16); };
auto pack_half2 = [](float low, float high) {
    return (unsigned)wp::float_to_half(low).u | (unsigned)wp::float_to_half(high).u << 16;
};
auto pack_half2_relu = [&](float low, float high) {
    return pack_half2(low < 0.0f ? 0.0f : low, high < 0.0f ? 0.0f : high);
};
auto where_positive = [&](unsigned halves, unsigned kept) {
    return pack_half2(
        low_float(halves) * (low_float(kept) > 0.0f ? 1.0f : 0.0f),
        high_float(halves) * (high_float(kept) > 0.0f ? 1.0f : 0.0f));
};
auto mark_non_finite = [&](unsigned& mark, unsigned halves) __attribute__((noinline)) {
    mark = pack_half2(low_float(mark) + 0.0f * low_float(halves), high_float(mark) + 0.0f * high_float(halves));
};
auto load_quad = [](const Quad* from) { return *from; };
// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"
auto mma_16816 = [&](float* c, const unsigned* a, unsigned b0, unsigned b1) __attribute__((noinline)) {
    const int group = lane / 4, member = lane % 4;
    for (int r = 0; r < 4; ++r) {
        float* to = &a_matrix[group + 8 * (r % 2)][2 * member + 8 * (r / 2)];
        to[0] = low_float(a[r]);
        to[1] = high_float(a[r]);
    }
    b_matrix[2 * member][group] = low_float(b0);
    b_matrix[2 * member + 1][group] = high_float(b0);
    b_matrix[2 * member + 8][group] = low_float(b1);
    b_matrix[2 * member + 9][group] = high_float(b1);
    sync_warp();
    for (int r = 0; r < 4; ++r)
        for (int k = 0; k < 16; ++k)
            c[r] += a_matrix[group + 8 * (r / 2)][k] * b_matrix[k][2 * member + r % 2];
    sync_warp();
};
auto transpose_8x8 = [&](unsigned halves) __attribute__((noinline)) {
    return exchange(halves, [&] {
        const int row = lane / 4, column = 2 * (lane % 4), shift = 16 * (row % 2);  // of the transpose
        const unsigned low = words[4 * column + row / 2], high = words[4 * (column + 1) + row / 2];
        return (low >> shift & 0xffffu) | (high >> shift & 0xffffu) << 16;
    });
};
"""


class EmulatedWarp:
    """Makes kernels that run on the CPU, and launches them as blocks of one warp."""

    def __init__(self) -> None:
        self.device = wp.get_device("cpu")
        self.primitives = EMULATED_PRIMITIVES

    def make(self, factory: Callable[..., wp.Kernel], *args: Any) -> wp.Kernel:
        """The kernel of a factory of `network_mma`, with emulated primitives; the factory's cache never sees it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mma, "PRIMITIVES", self.primitives)
            return factory.__wrapped__(*args)  # type: ignore[attr-defined]

    def launch(self, kernel: wp.Kernel, n: int, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Launch `n` threads rounded up to whole warps, one warp after the other."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wp.config, "enable_cpu_blocks", True)
            patch.setattr(wp.config, "optimization_level", 0)  # compiles in half the time
            wp.launch(kernel, whole_warps(n), [0, *inputs], list(outputs), device=self.device, block_dim=LANES)


class CudaWarp:
    """The same with real warps."""

    def __init__(self) -> None:
        self.device = wp.get_device("cuda:0")
        self.primitives = mma.PRIMITIVES

    def make(self, factory: Callable[..., wp.Kernel], *args: Any) -> wp.Kernel:
        """The kernel of a factory."""
        return factory(*args)

    def launch(self, kernel: wp.Kernel, n: int, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Launch `n` threads rounded up to whole warps."""
        block_dim = kernel.module.options["block_dim"]
        wp.launch(kernel, whole_warps(n), [0, *inputs], list(outputs), device=self.device, block_dim=block_dim)


def whole_warps(n: int) -> int:
    """`n` rounded up to a multiple of 32."""
    return -(-n // LANES) * LANES
