"""Radiance cache: record encoding, reflectance factorisation, shuffling of training records.

A network input row holds, in this order (`N_INPUTS` numbers in [0, 1]): position in the scene's cube (3), azimuth of
direction and normal (2), polar angle of direction and normal (2), roughness 1 - e^-r (1), diffuse albedo (3), specular
albedo (3). Angles of the same kind lie side by side because azimuths wrap around and polar angles do not.
"""

import warp as wp

from nrc.kernels.encoding import n_valid_rows
from nrc.kernels.records import RecordView
from nrc.kernels.rng import mix64
from nrc.kernels.sampling import PI, is_finite3

wp.set_module_options({"enable_backward": False})

N_INPUTS = wp.constant(14)
RecordInput = wp.types.vector(length=14, dtype=float)
SCALE_RECORDS = wp.constant(4096)  # of the first round with light; their mean becomes the unit of radiance
FRESH, REPLAYED, STORED_BEFORE = 0, 1, 2  # places in the plan of a round
MIN_ALBEDO = wp.constant(1.0e-4)  # a channel that reflects less is taken as black by query and training alike


@wp.func
def is_counted(i: int, count: wp.array[int]) -> bool:
    """Whether record `i` is one of those that the count on the device says; all are without one."""
    if count.shape[0] > 0:
        return i < count[0]
    return True


@wp.func
def azimuth(d: wp.vec3) -> float:
    """Angle around +z in [0, 1)."""
    u = wp.atan2(d[1], d[0]) * (0.5 / PI)
    return u - wp.floor(u)


@wp.func
def polar(d: wp.vec3) -> float:
    """Angle from +z over pi, in [0, 1]."""
    return wp.acos(wp.clamp(d[2], -1.0, 1.0)) / PI


@wp.func
def record_input(
    box_lower: wp.vec3,
    inverse_extent: float,
    position: wp.vec3,
    wo: wp.vec3,
    normal: wp.vec3,
    roughness: float,
    diffuse: wp.vec3,
    specular: wp.vec3,
) -> RecordInput:
    """Network input of a surface point; `wo` and `normal` must be unit vectors, or their polar angles are wrong."""
    x = RecordInput()
    p = (position - box_lower) * inverse_extent
    x[3] = azimuth(wo)
    x[4] = azimuth(normal)
    x[5] = polar(wo)
    x[6] = polar(normal)
    x[7] = 1.0 - wp.exp(-roughness)
    for c in range(3):
        x[c] = p[c]
        x[8 + c] = diffuse[c]
        x[11 + c] = specular[c]
    return x


@wp.func
def encode_record(
    records: RecordView, i: int, box_lower: wp.vec3, inverse_extent: float, x: wp.array2d[float], row: int
):
    """Write record `i` as network input `row`."""
    values = record_input(
        box_lower,
        inverse_extent,
        records.position[i],
        records.wo[i],
        records.normal[i],
        records.roughness[i],
        records.diffuse[i],
        records.specular[i],
    )
    for k in range(N_INPUTS):
        x[row, k] = values[k]


@wp.func
def reflectance(records: RecordView, i: int) -> wp.vec3:
    """Albedo sum that the network's output is multiplied by."""
    return records.diffuse[i] + records.specular[i]


@wp.func
def from_normalised(y: wp.vec3, albedo: wp.vec3, scale: float) -> wp.vec3:
    """Radiance of a network output; 0 where the surface reflects nothing, never negative."""
    value = wp.vec3(0.0, 0.0, 0.0)
    for c in range(3):
        if albedo[c] > MIN_ALBEDO:
            value[c] = wp.max(0.0, y[c]) * albedo[c] * scale
    return value


@wp.func
def to_normalised(radiance: wp.vec3, albedo: wp.vec3, scale: float) -> wp.vec3:
    """Network target of a radiance: the inverse of `from_normalised`."""
    value = wp.vec3(0.0, 0.0, 0.0)
    for c in range(3):
        if albedo[c] > MIN_ALBEDO:
            value[c] = radiance[c] / (albedo[c] * scale)
    return value


@wp.func
def round_key(seed: int, round_index: int) -> wp.uint64:
    """Key of a round's permutation."""
    return mix64((wp.uint64(wp.uint32(seed)) << wp.uint64(32)) + wp.uint64(wp.uint32(round_index)))


@wp.func
def permute(i: int, n: int, key: wp.uint64) -> int:
    """Place of `i` in a pseudorandom permutation of [0, n).

    Four Feistel rounds over the next even power of two, walked along their cycle until the result is below n (Black &
    Rogaway 2002): a bijection for every n.
    """
    half_bits = int(1)
    while (1 << (2 * half_bits)) < n:
        half_bits += 1
    mask = (1 << half_bits) - 1
    value = int(i)
    inside = int(0)
    while inside == 0:
        left = value >> half_bits
        right = value & mask
        for r in range(4):
            mixed = int(
                mix64(key + wp.uint64(wp.uint32(right)) + (wp.uint64(wp.uint32(r)) << wp.uint64(40))) >> wp.uint64(40)
            )
            swapped = right
            right = left ^ (mixed & mask)
            left = swapped
        value = (left << half_bits) | right
        if value < n:
            inside = 1
    return value


@wp.kernel
def encode_records(
    first: int,
    # Params
    box_lower: wp.vec3,
    inverse_extent: float,
    # In
    records: RecordView,
    count: wp.array[int],  # (1,) or empty
    # Out
    out_x: wp.array2d[float],  # (capacity, N_INPUTS)
):
    """Network inputs of the first `count` records. One thread per record."""
    i = first + wp.tid()
    if is_counted(i, count):
        encode_record(records, i, box_lower, inverse_extent, out_x, i)


@wp.kernel
def decode_radiance(
    first: int,
    # In
    records: RecordView,
    count: wp.array[int],  # (1,) or empty
    y: wp.array2d[float],  # (capacity, 3) network outputs
    scale: wp.array[float],  # (1,) radiance of an output of 1 at reflectance 1
    # Out
    out_radiance: wp.array2d[float],  # (capacity, 3) [W m^-2 sr^-1]
    out_invalid: wp.array[int],  # (capacity,) times this row's answer was not finite
):
    """Scattered radiance of the first `count` records. One thread per record."""
    i = first + wp.tid()
    if is_counted(i, count):
        value = wp.vec3(y[i, 0], y[i, 1], y[i, 2])
        if not is_finite3(value):
            out_invalid[i] = out_invalid[i] + 1
            value = wp.vec3(0.0, 0.0, 0.0)
        value = from_normalised(value, reflectance(records, i), scale[0])
        out_radiance[i, 0] = value[0]
        out_radiance[i, 1] = value[1]
        out_radiance[i, 2] = value[2]


@wp.kernel
def flag_valid_records(
    first: int,
    # In
    records: RecordView,
    targets: wp.array[wp.vec3],
    count: wp.array[int],  # (1,) or empty
    # Out
    out_flag: wp.array[int],  # (capacity,)
    out_invalid: wp.array[int],  # (capacity,) times a record in this place was dropped
):
    """1 for records that may be trained on: finite inputs, finite target >= 0. One thread per record."""
    i = first + wp.tid()
    flag = int(0)
    if is_counted(i, count):
        target = targets[i]
        finite = is_finite3(target) and is_finite3(records.position[i]) and is_finite3(reflectance(records, i))
        finite = finite and is_finite3(records.wo[i]) and is_finite3(records.normal[i])
        finite = finite and wp.isfinite(records.roughness[i])
        if finite and wp.min(target[0], wp.min(target[1], target[2])) >= 0.0:
            flag = 1
        else:
            out_invalid[i] = out_invalid[i] + 1
    out_flag[i] = flag


@wp.kernel
def begin_training_round(
    first: int,
    # Params
    n_batches: int,
    batch_size: int,
    n_replay: int,  # records of full batches that stored ones stand for
    n_kept: int,  # records of this round to store
    room: int,  # for stored records
    # In
    n_records: int,
    records: RecordView,
    targets: wp.array[wp.vec3],
    flags: wp.array[int],
    places: wp.array[int],  # exclusive scan of flags
    count: wp.array[int],  # (1,) records before the flags, or empty
    # In/out
    scale: wp.array[float],  # (1,) 0 until estimated
    round_index: wp.array[int],  # (1,) non-empty rounds so far
    n_stored: wp.array[int],  # (1,) stored records
    # Out
    out_n_valid: wp.array[int],  # (1,)
    out_plan: wp.array[int],  # (3,) records of this round to train on, of stored ones, and those stored before
    out_batch_counts: wp.array2d[int],  # (n_batches, 1)
):
    """Size the batches, plan the replay, estimate the radiance scale from the first records with light. One thread."""
    n_valid = int(0)
    n = n_valid_rows(n_records, count)
    if n > 0:
        n_valid = places[n - 1] + flags[n - 1]
    i = first + wp.tid()
    out_n_valid[i] = n_valid
    budget = n_batches * batch_size
    fresh = wp.min(n_valid, budget)
    replayed = int(0)
    if n_stored[0] > 0:
        fresh = wp.min(n_valid, budget - n_replay)
        share = wp.int64(fresh) * wp.int64(n_replay) // wp.int64(budget - n_replay)
        replayed = wp.min(int(share), n_stored[0])
    out_plan[FRESH] = fresh
    out_plan[REPLAYED] = replayed
    out_plan[STORED_BEFORE] = n_stored[0]
    n_stored[0] = wp.min(n_stored[0] + wp.min(n_kept, n_valid), room)
    for b in range(n_batches):
        out_batch_counts[b, 0] = (fresh + replayed - b + n_batches - 1) // n_batches
    if n_valid > 0:
        round_index[i] = round_index[i] + 1
    if scale[0] == 0.0:
        total = float(0.0)
        n_summed = int(0)
        for j in range(wp.min(n, SCALE_RECORDS)):
            if flags[j] != 0:
                y = to_normalised(targets[j], reflectance(records, j), 1.0)
                total += (y[0] + y[1] + y[2]) / 3.0
                n_summed += 1
        if total > 0.0:
            scale[0] = total / float(n_summed)


@wp.func
def deal_record(
    records: RecordView,
    targets: wp.array[wp.vec3],
    i: int,
    box_lower: wp.vec3,
    inverse_extent: float,
    scale: float,
    out_x: wp.array2d[float],
    out_y: wp.array2d[float],
    row: int,
):
    """Write record `i` and its normalised target as a row of the batches."""
    encode_record(records, i, box_lower, inverse_extent, out_x, row)
    unit = wp.where(scale > 0.0, scale, 1.0)
    y = to_normalised(targets[i], reflectance(records, i), unit)
    for c in range(3):
        out_y[row, c] = y[c]


@wp.kernel
def shuffle_records(
    first: int,
    # Params
    box_lower: wp.vec3,
    inverse_extent: float,
    n_batches: int,
    batch_size: int,
    seed: int,
    # In
    records: RecordView,
    targets: wp.array[wp.vec3],
    flags: wp.array[int],
    places: wp.array[int],
    count: wp.array[int],  # (1,) or empty
    n_valid: wp.array[int],  # (1,)
    plan: wp.array[int],  # (3,)
    round_index: wp.array[int],  # (1,)
    scale: wp.array[float],  # (1,)
    # Out
    out_x: wp.array2d[float],  # (n_batches * batch_size, N_INPUTS)
    out_y: wp.array2d[float],  # (n_batches * batch_size, 3)
):
    """Deal the valid records to the batches in random order; what does not fit is dropped. One thread per record."""
    i = first + wp.tid()
    if is_counted(i, count):
        if flags[i] != 0:
            dealt = permute(places[i], n_valid[0], round_key(seed, round_index[0]))
            if dealt < plan[FRESH]:
                row = (dealt % n_batches) * batch_size + dealt // n_batches
                deal_record(records, targets, i, box_lower, inverse_extent, scale[0], out_x, out_y, row)
