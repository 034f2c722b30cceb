"""PCG32 random numbers: one stream per (pixel, sample), state in registers.

O'Neill 2014, "PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms for Random Number Generation".
Warp's own generator has 2^32 states in all, fewer than one image at a thousand samples per pixel draws.
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
