"""What paths leave for the cache: records of surface points, compaction, and the targets of training paths.

A training path has `max_records` places for records, in its slot of a `TrainingView`, and one for the point at which it
ends in the cache, its tail. A record's target is scattered radiance, T_i = A_i + B_i T_{i+1}: A is what light sampling
and the next bounce's emission give, B the throughput to the next record. Whatever happens at a vertex that gets no
record of its own (a delta bounce, or one beyond the capacity) is folded into the record before it, whose A goes on
collecting radiance and whose B throughput.

Places come from an exclusive scan of per-path counts, so the order is the same for every number of threads.
"""

import warp as wp

wp.set_module_options({"enable_backward": False})


@wp.struct
class RecordView:
    """Cache inputs at surface points, structure of arrays."""

    position: wp.array[wp.vec3]
    wo: wp.array[wp.vec3]  # towards the previous vertex
    normal: wp.array[wp.vec3]  # shading normal on wo's side
    roughness: wp.array[float]  # perceptual
    diffuse: wp.array[wp.vec3]  # diffuse albedo
    specular: wp.array[wp.vec3]  # specular albedo


@wp.struct
class TrainingView:
    """What training paths leave behind: `max_records` places per path (slot), and one tail."""

    max_records: int
    records: RecordView
    offset: wp.array[wp.vec3]  # A of T_i = A_i + B_i T_{i+1}
    factor: wp.array[wp.vec3]  # B
    count: wp.array[int]  # records of each slot
    tail: RecordView  # vertex at the end of the suffix, one per slot
    has_tail: wp.array[int]


@wp.func
def store_record(
    view: RecordView,
    i: int,
    position: wp.vec3,
    wo: wp.vec3,
    normal: wp.vec3,
    roughness: float,
    diffuse: wp.vec3,
    specular: wp.vec3,
):
    """Describe a surface point to the cache; a normal on the other side of `wo` is turned."""
    view.position[i] = position
    view.wo[i] = wo
    view.normal[i] = wp.where(wp.dot(normal, wo) < 0.0, -normal, normal)
    view.roughness[i] = roughness
    view.diffuse[i] = diffuse
    view.specular[i] = specular


@wp.func
def copy_record(source: RecordView, i: int, target: RecordView, j: int):
    """target[j] = source[i]."""
    target.position[j] = source.position[i]
    target.wo[j] = source.wo[i]
    target.normal[j] = source.normal[i]
    target.roughness[j] = source.roughness[i]
    target.diffuse[j] = source.diffuse[i]
    target.specular[j] = source.specular[i]


@wp.func
def open_record(training: TrainingView, slot: int, n_records: int, A: wp.vec3, B: wp.vec3) -> int:
    """Place for the path's next record, after `n_records` < max_records.

    Gives the record before it the coefficients collected so far; the caller starts over with A = 0, B = 1.
    """
    place = slot * training.max_records + n_records
    if n_records > 0:
        training.offset[place - 1] = A
        training.factor[place - 1] = B
    return place


@wp.func
def close_path(training: TrainingView, slot: int, n_records: int, A: wp.vec3, B: wp.vec3, tail: int):
    """End a training path of `n_records` records; `tail` is 1 where it ends in the cache, at `training.tail`.

    Nothing happens for slot -1, the paths that do not train.
    """
    if slot >= 0:
        if n_records > 0:
            place = slot * training.max_records + n_records - 1
            training.offset[place] = A
            training.factor[place] = B * float(tail)
        training.count[slot] = n_records
        training.has_tail[slot] = tail * wp.min(n_records, 1)


@wp.func
def target_before(A: wp.vec3, B: wp.vec3, target: wp.vec3) -> wp.vec3:
    """T_i from T_{i+1}: one step of the recursion, backwards along a path."""
    return A + wp.cw_mul(B, target)


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
    """Walk a training path backwards. One thread per slot."""
    slot = first + wp.tid()
    count = training.count[slot]
    target = wp.vec3(0.0, 0.0, 0.0)
    if training.has_tail[slot] != 0:
        row = tail_places[slot]
        target = wp.vec3(tail_radiance[row, 0], tail_radiance[row, 1], tail_radiance[row, 2])
    for k in range(count):
        vertex = count - 1 - k
        i = slot * training.max_records + vertex
        target = target_before(training.offset[i], training.factor[i], target)
        place = places[slot] + vertex
        copy_record(training.records, i, out_records, place)
        out_target[place] = target
        out_index[place] = vertex
        out_slot[place] = slot
