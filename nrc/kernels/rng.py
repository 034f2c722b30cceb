"""Random numbers of paths: Sobol' points for their first vertices, PCG32 behind.

A pixel's frames go through Sobol' points, in an order and with shifts of the pixel's own: its samples are well spread
over frames while pixels stay independent. PCG32 (O'Neill 2014) has one stream per pixel and frame, state in
registers: Warp's own generator has 2^32 states in all, fewer than an image at a thousand samples per pixel draws.
"""

import warp as wp

wp.set_module_options({"enable_backward": False})

PCG_MULTIPLIER = wp.constant(wp.uint64(6364136223846793005))
PCG_INCREMENT = wp.constant(wp.uint64(1442695040888963407))
MIX_A = wp.constant(wp.uint64(0xBF58476D1CE4E5B9))
MIX_B = wp.constant(wp.uint64(0x94D049BB133111EB))
GOLDEN = wp.constant(wp.uint64(0x9E3779B97F4A7C15))
SHUFFLE_A = wp.constant(wp.uint32(0x3D20ADEA))
SHUFFLE_B = wp.constant(wp.uint32(0x05526C56))
SHUFFLE_C = wp.constant(wp.uint32(0x53A22864))
LOW_HALF = wp.constant(wp.uint64(0xFFFFFFFF))
TO_UNIT = wp.constant(1.0 / 16777216.0)  # 2^-24: the largest result is 1 - 2^-24


@wp.func
def mix64(x: wp.uint64) -> wp.uint64:
    """SplitMix64 finalizer (Steele et al. 2014): every input bit reaches every output bit."""
    z = (x ^ (x >> wp.uint64(30))) * MIX_A
    z = (z ^ (z >> wp.uint64(27))) * MIX_B
    return z ^ (z >> wp.uint64(31))


@wp.func
def rng_init(seed: int, sample: int, index: int) -> wp.uint64:
    """Stream of path `index` in frame `sample` of a run with `seed`."""
    key = mix64((wp.uint64(wp.uint32(seed)) << wp.uint64(32)) + wp.uint64(wp.uint32(sample)) + GOLDEN)
    return mix64(key + wp.uint64(wp.uint32(index)) * GOLDEN)


@wp.func
def rng_next(state: wp.uint64) -> wp.uint64:
    """Advance the state; read numbers from it with `rng_uint` and `rng_float`."""
    return state * PCG_MULTIPLIER + PCG_INCREMENT


@wp.func
def rng_uint(state: wp.uint64) -> wp.uint32:
    """32 bits of the state (XSH-RR output function)."""
    xorshifted = wp.uint32(((state >> wp.uint64(18)) ^ state) >> wp.uint64(27))
    rotation = wp.uint32(state >> wp.uint64(59))
    return (xorshifted >> rotation) | (xorshifted << ((wp.uint32(32) - rotation) & wp.uint32(31)))


@wp.func
def rng_float(state: wp.uint64) -> float:
    """Uniform number in [0, 1)."""
    return float(rng_uint(state) >> wp.uint32(8)) * TO_UNIT


@wp.func
def rng_vec2(state: wp.uint64):
    """Two uniform numbers in [0, 1), and the state after them."""
    a = rng_next(state)
    b = rng_next(a)
    return wp.vec2(rng_float(a), rng_float(b)), b


@wp.func
def sobol_key(seed: int, round: int, index: int) -> wp.uint64:
    """Key of path `index`; `round` counts how often the table of points has been used up."""
    key = mix64((wp.uint64(wp.uint32(seed)) << wp.uint64(32)) + wp.uint64(wp.uint32(round)))
    return mix64(key ^ (wp.uint64(wp.uint32(index)) * PCG_MULTIPLIER))


@wp.func
def sobol_vec2(points: wp.array2d[wp.uint32], reversed_index: int, group: int, key: wp.uint64) -> wp.vec2:
    """Two-dimensional sample of a path in [0, 1)².

    Each group of dimensions goes through the points in an order of its own and shifts them digitally. The order is a
    nested uniform shuffle by hashing (Burley 2020, "Practical Hash-based Owen Scrambling", section 4), so that the
    first 2^k frames see a (0, 2)-net in every group while groups stay independent of each other. `points` is in
    bit-reversed order and the index comes bit-reversed, which is what the hash works on.
    """
    bits = mix64(key + wp.uint64(wp.uint32(2 * group)))
    shift = mix64(key + wp.uint64(wp.uint32(2 * group + 1)))
    seed = wp.uint32(bits >> wp.uint64(32))
    x = wp.uint32(reversed_index)
    x ^= x * SHUFFLE_A
    x += seed
    x *= (seed >> wp.uint32(16)) | wp.uint32(1)
    x ^= x * SHUFFLE_B
    x ^= x * SHUFFLE_C
    row = int(x & wp.uint32(points.shape[0] - 1))
    u = points[row, 0] ^ wp.uint32(shift >> wp.uint64(32))
    v = points[row, 1] ^ wp.uint32(shift & LOW_HALF)
    return wp.vec2(float(u >> wp.uint32(8)) * TO_UNIT, float(v >> wp.uint32(8)) * TO_UNIT)
