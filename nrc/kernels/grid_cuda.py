"""Gradients of grid tables on CUDA: rows are spread over threads, and atomic additions collect them."""

from functools import cache
from typing import Any

import warp as wp

from .encoding import UNIQUE, EncodingConfig, Part
from .grid import make_corner_weight, make_first_entry, make_grid_cell, make_grid_entry
from .optimizer import GO, N_ROWS

wp.set_module_options({"enable_backward": False})


def _add_source(n: int) -> str:
    """C++ that adds n halves, v0 and following, to `table` from `at` on: in one transaction where the card has it."""

    def add(kind: str, operands: str) -> str:  # noftz keeps subnormal sums
        return f'asm volatile("red.global.add.noftz.{kind};" :: {operands} : "memory");'

    pairs = "".join(f"const unsigned p{i} = (unsigned)v{i}.u | (unsigned)v{i + 1}.u << 16;" for i in range(0, n - 1, 2))
    older = "".join(add("f16x2 [%0], %1", f'"l"(address + {2 * i}), "r"(p{i})') for i in range(0, n - 1, 2))
    newer = older
    if n == 1:
        older = newer = add("f16 [%0], %1", '"l"(address), "h"(v0.u)')
    if n == 4:
        newer = add("v2.f16x2 [%0], {%1, %2}", '"l"(address), "r"(p0), "r"(p2)')
    one_by_one = "".join(f"entry[{i}] = wp::half((float)entry[{i}] + (float)v{i});" for i in range(n))
    return f"""
#if defined(__CUDA_ARCH__)
    {pairs}
    const size_t address = __cvta_generic_to_global(table.data + at);
#if __CUDA_ARCH__ >= 900
    {newer}
#else
    {older}
#endif
#else
    wp::half* entry = table.data + at;
    {one_by_one}
#endif
"""


@wp.func_native(_add_source(1))
def atomic_add_one(table: wp.array[wp.float16], at: int, v0: wp.float16):
    """Add to an entry."""


@wp.func_native(_add_source(2))
def atomic_add_two(table: wp.array[wp.float16], at: int, v0: wp.float16, v1: wp.float16):
    """Add to two neighbouring entries, the first of even index."""


@wp.func_native(_add_source(4))
def atomic_add_four(
    table: wp.array[wp.float16], at: int, v0: wp.float16, v1: wp.float16, v2: wp.float16, v3: wp.float16
):
    """Add to four neighbouring entries, the first's index a multiple of four."""


@cache
def make_accumulate_grid_cuda(encoding: EncodingConfig, part: Part, dtype: Any, table_dtype: Any):
    """Kernel that adds the table gradient of one grid: codes' gradients of type `dtype` into `table_dtype`."""
    grid = part.config
    grid_cell, grid_entry = make_grid_cell(grid), make_grid_entry(grid)
    corner_weight, _ = make_corner_weight(grid)
    n_dims, n_features, n_corners = grid.n_dims, grid.n_features_per_level, grid.n_corners
    first_input, first_output = part.first_input, part.first_output
    first_param = part.first_param - encoding.first_param
    padding_end, n_padded = sum(encoding.final_padding), encoding.n_padded
    halves = table_dtype == wp.float16
    together = min(4, n_features) if halves else 1  # features of an entry that one addition takes
    Point = wp.types.vector(length=n_dims, dtype=float)
    first_entry = make_first_entry(grid)

    @wp.kernel(module="unique", module_options=UNIQUE)
    def accumulate_grid_cuda(
        first: int,
        # Params
        gradient_scale: float,
        # In
        n_rows: int,
        state: wp.array[int],  # as in optimizer.py
        x: wp.array2d[float],  # (n_rows, n_input_dims)
        dL_dcode: wp.array2d[dtype],  # (n_rows, n_padded or n_output_dims)
        # In/out
        dL_dtable: wp.array[table_dtype],  # (encoding's parameters)
    ):
        """Add gradient_scale times a row's gradient of one level, if the step is taken. One thread per (level, row)."""
        i = first + wp.tid()
        level = i // n_rows
        row = i % n_rows
        if state[GO] == 0 or row >= state[N_ROWS]:
            return
        point = Point()
        for d in range(n_dims):
            point[d] = x[row, first_input + d]
        column = first_output + level * n_features
        if column >= padding_end:
            column -= n_padded - dL_dcode.shape[1]
        cell, weight, _slope = grid_cell(point, level)
        for corner in range(n_corners):
            at = first_param + (first_entry(level) + grid_entry(cell, level, corner)) * n_features
            scale = gradient_scale * corner_weight(weight, corner)
            for f in range(0, n_features, together):
                v0 = table_dtype(scale * float(dL_dcode[row, column + f]))
                if wp.static(not halves):
                    wp.atomic_add(dL_dtable, at + f, v0)
                if wp.static(halves and together == 1):
                    atomic_add_one(dL_dtable, at + f, v0)
                if wp.static(together > 1):
                    v1 = table_dtype(scale * float(dL_dcode[row, column + f + 1]))
                    if wp.static(together == 2):
                        atomic_add_two(dL_dtable, at + f, v0, v1)
                    if wp.static(together == 4):
                        v2 = table_dtype(scale * float(dL_dcode[row, column + f + 2]))
                        v3 = table_dtype(scale * float(dL_dcode[row, column + f + 3]))
                        atomic_add_four(dL_dtable, at + f, v0, v1, v2, v3)

    return accumulate_grid_cuda
