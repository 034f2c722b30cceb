"""C++ vector types of the CPU kernels: 16 floats, integers or unsigned integers to a vector."""

VECTOR_SOURCE = """
typedef float f16 __attribute__((vector_size(64), aligned(4)));
typedef int i16 __attribute__((vector_size(64), aligned(4)));
typedef unsigned u16 __attribute__((vector_size(64), aligned(4)));
const f16 zero = {};
auto to_float = [](auto v) { return (f16)__builtin_convertvector(v, f16); };
auto to_int = [](f16 v) { return (i16)__builtin_convertvector(v, i16); };
auto clamp01 = [&](f16 v) { v = v > zero ? v : zero; return v < zero + 1.0f ? v : zero + 1.0f; };  // NaN becomes 0
"""

# Elementary functions of 16 values to single precision, for the kernels that use them. Argument reduction by a constant
# split in two or three (Cody and Waite 1980), then the Taylor series on the remaining interval: its first dropped term
# is below half a unit in the last place.

EXP_SOURCE = """
auto exponential = [&](f16 x) {  // |x - n ln 2| <= ln 2 / 2; 2^n in two factors, as it need not be a float
    x = x > zero + 90.0f ? zero + 90.0f : x;
    x = x < zero - 105.0f ? zero - 105.0f : x;
    const f16 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // the nearest integer
    const f16 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    const f16 series = 1.0f + r * (1.0f + r * (1.0f / 2.0f + r * (1.0f / 6.0f + r * (1.0f / 24.0f + r * (1.0f / 120.0f
        + r * (1.0f / 720.0f + r * (1.0f / 5040.0f)))))));
    const i16 whole = to_int(n), half = whole >> 1;
    return series * (f16)((half + 127) << 23) * (f16)((whole - half + 127) << 23);
};
"""

SIN_SOURCE = """
auto sine_of_quarters = [&](f16 x, int quarters) {  // sin(x + quarters pi / 2), accurate for |x| < 1e5, else bounded
    const f16 n = (x * 0.636619772f + 12582912.0f) - 12582912.0f;
    f16 r = ((x - n * 1.5703125f) - n * 4.83751297e-4f) - n * 7.54978995e-8f;
    r = r > zero + 0.8f ? zero + 0.8f : r;
    r = r < zero - 0.8f ? zero - 0.8f : r;
    const f16 z = r * r;
    const f16 sine = r + r * z * (-1.0f / 6.0f + z * (1.0f / 120.0f + z * (-1.0f / 5040.0f + z * (1.0f / 362880.0f))));
    const f16 cosine = 1.0f + z * (-1.0f / 2.0f + z * (1.0f / 24.0f + z * (-1.0f / 720.0f + z * (1.0f / 40320.0f
        + z * (-1.0f / 3628800.0f)))));
    const i16 quarter = to_int(n) + quarters;
    const f16 value = (quarter & 1) != 0 ? cosine : sine;
    return (quarter & 2) != 0 ? -value : value;
};
auto sine = [&](f16 x) { return sine_of_quarters(x, 0); };
auto cosine = [&](f16 x) { return sine_of_quarters(x, 1); };
"""
