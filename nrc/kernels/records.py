"""Compaction of what paths left behind, and the targets of training paths.

Places come from an exclusive scan of per-path counts, so the order is the same for every number of threads.
"""

import warp as wp

from nrc.kernels.trace import RecordView, TrainingView

wp.set_module_options({"enable_backward": False})


@wp.func
def copy_record(source: RecordView, i: int, target: RecordView, j: int):
    """target[j] = source[i]."""
    target.position[j] = source.position[i]
    target.wo[j] = source.wo[i]
    target.normal[j] = source.normal[i]
    target.roughness[j] = source.roughness[i]
    target.diffuse[j] = source.diffuse[i]
    target.specular[j] = source.specular[i]


@wp.kernel
def mark_queries(
    first: int,
    # In
    query_vertex: wp.array[int],  # (pixels,)
    # Out
    out_flag: wp.array[int],  # (pixels,)
):
    """1 where a path ended in the cache. One thread per pixel."""
    i = first + wp.tid()
    out_flag[i] = wp.min(query_vertex[i], 1)


@wp.kernel
def store_total(
    first: int,
    # In
    places: wp.array[int],  # exclusive scan of counts
    counts: wp.array[int],
    n: int,
    # Out
    out_total: wp.array[int],  # (1,)
):
    """Sum of the counts. One thread."""
    i = first + wp.tid()
    out_total[i] = places[n - 1] + counts[n - 1]


@wp.kernel
def compact_records(
    first: int,
    # In
    records: RecordView,
    places: wp.array[int],  # exclusive scan of flags
    flags: wp.array[int],
    # Out
    out_records: RecordView,
):
    """Move flagged records to the front, in order. One thread per place."""
    i = first + wp.tid()
    if flags[i] != 0:
        copy_record(records, i, out_records, places[i])


@wp.kernel
def gather_targets(
    first: int,
    # Params
    max_records: int,
    # In
    training: TrainingView,
    places: wp.array[int],  # (slots,) exclusive scan of training.count
    tail_places: wp.array[int],  # (slots,) exclusive scan of training.has_tail
    tail_radiance: wp.array2d[float],  # (tails, 3) [W m^-2 sr^-1]
    # Out
    out_records: RecordView,
    out_target: wp.array[wp.vec3],  # scattered radiance of each record [W m^-2 sr^-1]
    out_index: wp.array[int],  # which record of its path each is, from 0
    out_slot: wp.array[int],  # which path each is of
):
    """Walk a training path backwards: T_i = A_i + B_i T_{i+1}. One thread per slot."""
    slot = first + wp.tid()
    count = training.count[slot]
    target = wp.vec3(0.0, 0.0, 0.0)
    if training.has_tail[slot] != 0:
        row = tail_places[slot]
        target = wp.vec3(tail_radiance[row, 0], tail_radiance[row, 1], tail_radiance[row, 2])
    for k in range(count):
        vertex = count - 1 - k
        i = slot * max_records + vertex
        target = training.offset[i] + wp.cw_mul(training.factor[i], target)
        place = places[slot] + vertex
        copy_record(training.records, i, out_records, place)
        out_target[place] = target
        out_index[place] = vertex
        out_slot[place] = slot
