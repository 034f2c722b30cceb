"""Random numbers of paths: Sobol' points for their first vertices, PCG32 behind.

Sobol' points are the same for all pixels of a frame, shifted digitally by a hash of the pixel: a pixel's samples are
well spread over frames while pixels stay independent. PCG32 (O'Neill 2014) has one stream per pixel and frame, state in
registers: Warp's own generator has 2^32 states in all, fewer than an image at a thousand samples per pixel draws.
"""

import warp as wp

wp.set_module_options({"enable_backward": False})

PCG_MULTIPLIER = wp.constant(wp.uint64(6364136223846793005))
PCG_INCREMENT = wp.constant(wp.uint64(1442695040888963407))
MIX_A = wp.constant(wp.uint64(0xBF58476D1CE4E5B9))
MIX_B = wp.constant(wp.uint64(0x94D049BB133111EB))
GOLDEN = wp.constant(wp.uint64(0x9E3779B97F4A7C15))
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
def rng_vec3(state: wp.uint64):
    """Three uniform numbers in [0, 1), and the state after them."""
    a = rng_next(state)
    b = rng_next(a)
    c = rng_next(b)
    return wp.vec3(rng_float(a), rng_float(b), rng_float(c)), c


@wp.func
def sobol_key(seed: int, round: int, index: int) -> wp.uint64:
    """Key of the digital shifts of path `index`; `round` counts how often the table of points has been used up."""
    key = mix64((wp.uint64(wp.uint32(seed)) << wp.uint64(32)) + wp.uint64(wp.uint32(round)))
    return mix64(key ^ (wp.uint64(wp.uint32(index)) * PCG_MULTIPLIER))


@wp.func
def sobol_float(points: wp.array2d[wp.uint32], point: int, dimension: int, key: wp.uint64) -> float:
    """Coordinate of a shifted Sobol' point, uniform in [0, 1)."""
    shift = wp.uint32(mix64(key + wp.uint64(wp.uint32(dimension))) >> wp.uint64(32))
    return float((points[point, dimension] ^ shift) >> wp.uint32(8)) * TO_UNIT


@wp.func
def sobol_vec3(points: wp.array2d[wp.uint32], point: int, dimension: int, key: wp.uint64) -> wp.vec3:
    """Three consecutive coordinates of a shifted Sobol' point."""
    return wp.vec3(
        sobol_float(points, point, dimension, key),
        sobol_float(points, point, dimension + 1, key),
        sobol_float(points, point, dimension + 2, key),
    )
