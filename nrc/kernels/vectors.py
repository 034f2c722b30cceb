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
