"""Replay: records of past frames that are kept in a reservoir and dealt to the batches beside those of the frame.

A round stores a few of its records, chosen by the permutation that deals them: behind those stored before while there
is room, then in the places of older ones, chosen by another permutation. So the age of what is kept is distributed
exponentially, no two threads write to one place, and the result does not depend on their number.
"""

import warp as wp

from nrc.kernels.cache import (
    FRESH,
    REPLAYED,
    STORED_BEFORE,
    deal_record,
    is_counted,
    permute,
    round_key,
)
from nrc.kernels.records import RecordView, copy_record
from nrc.kernels.rng import mix64

wp.set_module_options({"enable_backward": False})

DRAW_SALT = wp.constant(wp.uint64(0x5851F42D4C957F2D))
STORE_SALT = wp.constant(wp.uint64(0x14057B7EF767814F))


@wp.kernel
def deal_stored_records(
    first: int,
    # Params
    box_lower: wp.vec3,
    inverse_extent: float,
    n_batches: int,
    batch_size: int,
    seed: int,
    # In
    stored: RecordView,
    stored_targets: wp.array[wp.vec3],
    plan: wp.array[int],  # (3,)
    round_index: wp.array[int],  # (1,)
    scale: wp.array[float],  # (1,)
    # Out
    out_x: wp.array2d[float],  # (n_batches * batch_size, N_INPUTS)
    out_y: wp.array2d[float],  # (n_batches * batch_size, 3)
):
    """Deal stored records, each at most once, to the batches behind the frame's own. One thread per replayed record."""
    i = first + wp.tid()
    if i < plan[REPLAYED]:
        place = permute(i, plan[STORED_BEFORE], mix64(round_key(seed, round_index[0]) + DRAW_SALT))
        dealt = plan[FRESH] + i
        row = (dealt % n_batches) * batch_size + dealt // n_batches
        deal_record(stored, stored_targets, place, box_lower, inverse_extent, scale[0], out_x, out_y, row)


@wp.kernel
def store_records(
    first: int,
    # Params
    n_kept: int,
    seed: int,
    # In
    records: RecordView,
    targets: wp.array[wp.vec3],
    flags: wp.array[int],
    places: wp.array[int],  # exclusive scan of flags
    count: wp.array[int],  # (1,) or empty
    n_valid: wp.array[int],  # (1,)
    plan: wp.array[int],  # (3,)
    round_index: wp.array[int],  # (1,)
    # Out
    stored: RecordView,
    stored_targets: wp.array[wp.vec3],
):
    """Store `n_kept` of the valid records at most, chosen at random. One thread per record."""
    i = first + wp.tid()
    if is_counted(i, count):
        if flags[i] != 0:
            key = round_key(seed, round_index[0])
            dealt = permute(places[i], n_valid[0], key)
            if dealt < n_kept:
                place = plan[STORED_BEFORE] + dealt
                room = stored_targets.shape[0]
                if place >= room:
                    place = permute(place - room, plan[STORED_BEFORE], mix64(key + STORE_SALT))
                copy_record(records, i, stored, place)
                stored_targets[place] = targets[i]
