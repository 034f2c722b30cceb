"""Exclusive sums of counts without working memory of the driver's, so that a frame allocates nothing.

Levels of chunks: sum each chunk, scan the sums, then start every chunk at its sum's place.
"""

import warp as wp

wp.set_module_options({"enable_backward": False})

CHUNK = 256


@wp.kernel
def sum_chunks(
    first: int,
    # In
    n: int,
    values: wp.array[int],  # (n or more,)
    # Out
    out_sums: wp.array[int],  # (chunks,)
):
    """Add up a chunk. One thread per chunk."""
    chunk = first + wp.tid()
    total = int(0)
    for i in range(chunk * CHUNK, wp.min(n, (chunk + 1) * CHUNK)):
        total += values[i]
    out_sums[chunk] = total


@wp.kernel
def scan_chunks(
    first: int,
    # In
    n: int,
    values: wp.array[int],  # (n or more,)
    starts: wp.array[int],  # (chunks,) exclusive scan of their sums
    # Out
    out_places: wp.array[int],  # (n or more,) exclusive scan of the values; may be `values`
    out_total: wp.array[int],  # (1,), or empty
):
    """Scan a chunk; the last one also knows the total. One thread per chunk."""
    chunk = first + wp.tid()
    total = starts[chunk]
    end = wp.min(n, (chunk + 1) * CHUNK)
    for i in range(chunk * CHUNK, end):
        value = values[i]
        out_places[i] = total
        total += value
    if end == n and out_total.shape[0] > 0:
        out_total[0] = total
