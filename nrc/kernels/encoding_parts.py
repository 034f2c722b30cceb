"""Encodings without parameters: configs, and Warp functions of one sample forward and by the inputs backward.

A forward factory takes a `Part` and the type of a code, and gives a function (x, i, params, code) -> code with the
part's columns filled in; a backward factory gives (x, i, params, dL_dcode, dL_dx) -> dL_dx with the part's share added.
At a kink (a triangle wave's turn) the derivative is that of one side. The readable twins of `encoding_wide.py`.
"""

import math
from dataclasses import dataclass
from typing import Any

import warp as wp

from .grid import make_float_table

wp.set_module_options({"enable_backward": False})


@dataclass(frozen=True)
class Frequency:
    """sin(2^k pi x), cos(2^k pi x) for k < `n_frequencies`, one input after the other (Mildenhall et al. 2020)."""

    n_dims: int
    n_frequencies: int = 12
    n_params = 0
    pad_value = 1.0
    alignment = 1

    def __post_init__(self) -> None:
        _check_frequencies(self.n_frequencies)

    @property
    def n_output_dims(self) -> int:
        return self.n_dims * self.n_frequencies * 2


@dataclass(frozen=True)
class TriangleWave:
    """Triangle waves of `n_frequencies` octaves per input, a cheap sine (Müller et al. 2021, sec. 5)."""

    n_dims: int
    n_frequencies: int = 12
    n_params = 0
    pad_value = 1.0
    alignment = 1

    def __post_init__(self) -> None:
        _check_frequencies(self.n_frequencies)

    @property
    def n_output_dims(self) -> int:
        return self.n_dims * self.n_frequencies


def _check_frequencies(n: int) -> None:
    if not 1 <= n <= 64:
        raise ValueError(f"n_frequencies must be 1 ... 64, got {n}")


@dataclass(frozen=True)
class OneBlob:
    """Quartic blob spread over `n_bins` bins per input (Müller et al. 2019).

    `wrap` joins the ends of [0, 1], as tiny-cuda-nn does; without it the tails fall into the end bins.
    """

    n_dims: int
    n_bins: int = 16
    wrap: bool = True
    n_params = 0
    pad_value = 1.0
    alignment = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n_bins <= 1024 or self.n_bins & (self.n_bins - 1):
            raise ValueError(f"n_bins must be a power of two up to 1024, got {self.n_bins}")

    @property
    def n_output_dims(self) -> int:
        return self.n_dims * self.n_bins


@dataclass(frozen=True)
class SphericalHarmonics:
    """Real spherical harmonics of the bands below `degree` at the unit vector 2 x - 1, band by band, m = -l ... l.

    Odd m carry the sign -1 (Condon and Shortley). Each is a polynomial in z times Re or Im of (x + i y)^|m|, which
    continues it to vectors of other lengths as tiny-cuda-nn does. Padding columns come first.
    """

    n_dims: int = 3
    degree: int = 4
    n_params = 0
    pad_value = 1.0
    alignment = 1

    def __post_init__(self) -> None:
        if self.n_dims != 3:
            raise ValueError(f"SphericalHarmonics encodes 3 dimensions, got {self.n_dims}")
        if not 1 <= self.degree <= 8:
            raise ValueError(f"degree must be 1 ... 8, got {self.degree}")

    @property
    def n_output_dims(self) -> int:
        return self.degree**2

    @property
    def normalizations(self) -> tuple[float, ...]:
        """Factor of each column; the polynomial in z starts at 1 for l = |m| (Sloan 2008, appendix A1)."""
        factors = []
        for band in range(self.degree):
            for m in map(abs, range(-band, band + 1)):
                norm = (2 * band + 1) / (4.0 * math.pi) * math.factorial(band - m) / math.factorial(band + m)
                start = math.prod(range(2 * m - 1, 0, -2))  # (2m - 1)!!, of the associated Legendre function
                factors.append((-1) ** m * start * math.sqrt(norm * (2.0 if m > 0 else 1.0)))
        return tuple(factors)


@dataclass(frozen=True)
class Identity:
    """The inputs themselves: `scale` * x + `offset`."""

    n_dims: int
    scale: float = 1.0
    offset: float = 0.0
    n_params = 0
    pad_value = 1.0
    alignment = 1

    @property
    def n_output_dims(self) -> int:
        return self.n_dims


@dataclass(frozen=True)
class Part:
    """An encoding at its place: first input column, first output column, first parameter of the flat buffer."""

    config: Any  # Grid, Frequency, TriangleWave, OneBlob, SphericalHarmonics or Identity
    first_input: int
    first_output: int
    first_param: int

    @property
    def end_output(self) -> int:
        return self.first_output + self.config.n_output_dims


def make_encode_identity(part: Part, Code):
    n_dims, scale, offset = part.config.n_dims, float(part.config.scale), float(part.config.offset)
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def encode_identity(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        for d in range(n_dims):
            y[first_output + d] = scale * x[i, first_input + d] + offset
        return y

    return encode_identity


def make_encode_frequency(part: Part, Code):
    n_dims, n_frequencies = part.config.n_dims, part.config.n_frequencies
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def encode_frequency(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        for d in range(n_dims):
            v = x[i, first_input + d]
            for k in range(n_frequencies):
                angle = wp.pi * half_turn(v)
                y[first_output + (d * n_frequencies + k) * 2] = wp.sin(angle)
                y[first_output + (d * n_frequencies + k) * 2 + 1] = wp.cos(angle)
                v = 2.0 * v
        return y

    return encode_frequency


@wp.func
def half_turn(v: float):
    """v minus the nearest even number: sin(pi v) keeps its precision at high frequencies."""
    return v - 2.0 * wp.floor(0.5 * v + 0.5)


def make_encode_triangle_wave(part: Part, Code):
    n_dims, n_frequencies = part.config.n_dims, part.config.n_frequencies
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def encode_triangle_wave(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        for d in range(n_dims):
            frequency = float(0.5)
            for k in range(n_frequencies):
                v = x[i, first_input + d] * frequency + 0.25 * float(k)
                y[first_output + d * n_frequencies + k] = 4.0 * wp.abs(v - wp.floor(v) - 0.5) - 1.0
                frequency = 2.0 * frequency
        return y

    return encode_triangle_wave


@wp.func
def quartic_cdf(x: float, inv_radius: float):
    """Integral of the quartic kernel 15/16 (1 - u²)² up to u = x * inv_radius."""
    u = x * inv_radius
    u2 = u * u
    return wp.clamp(15.0 / 16.0 * u * (1.0 - 2.0 / 3.0 * u2 + 0.2 * u2 * u2) + 0.5, 0.0, 1.0)


@wp.func
def wrapped_cdf(x: float, inv_radius: float):
    return quartic_cdf(x, inv_radius) + quartic_cdf(x - 1.0, inv_radius) + quartic_cdf(x + 1.0, inv_radius)


def make_encode_one_blob(part: Part, Code):
    n_dims, n_bins, wrap = part.config.n_dims, part.config.n_bins, part.config.wrap
    first_input, first_output = part.first_input, part.first_output
    inv_radius = float(n_bins)

    @wp.func
    def encode_one_blob(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        for d in range(n_dims):
            v = x[i, first_input + d]
            left = float(0.0)
            if wp.static(wrap):
                left = wrapped_cdf(-v, inv_radius)
            for k in range(n_bins):
                boundary = float(k + 1) / inv_radius
                right = float(1.0)
                if wp.static(wrap):
                    right = wrapped_cdf(boundary - v, inv_radius)
                else:
                    if k < n_bins - 1:
                        right = quartic_cdf(boundary - v, inv_radius)
                y[first_output + d * n_bins + k] = right - left
                left = right
        return y

    return encode_one_blob


def make_encode_spherical_harmonics(part: Part, Code):
    degree, first_input, first_output = part.config.degree, part.first_input, part.first_output
    factor = make_float_table(part.config.normalizations)

    @wp.func
    def encode_spherical_harmonics(x: wp.array2d[float], i: int, params: wp.array[float], code: Code):
        y = code
        vx = 2.0 * x[i, first_input] - 1.0
        vy = 2.0 * x[i, first_input + 1] - 1.0
        vz = 2.0 * x[i, first_input + 2] - 1.0
        re = float(1.0)  # of (vx + i vy)^m
        im = float(0.0)
        for m in range(degree):
            p = float(1.0)  # polynomial in vz by Legendre's recurrence over the bands
            p_before = float(0.0)
            for band in range(m, degree):
                at = band * band + band
                y[first_output + at - m] = factor(at + m) * p * im
                y[first_output + at + m] = factor(at + m) * p * re
                p_next = (float(2 * band + 1) * vz * p - float(band + m) * p_before) / float(band + 1 - m)
                p_before = p
                p = p_next
            re_next = re * vx - im * vy
            im = re * vy + im * vx
            re = re_next
        return y

    return encode_spherical_harmonics


def make_backward_identity(part: Part, Code, Input):
    n_dims, scale = part.config.n_dims, float(part.config.scale)
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def backward_identity(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        for d in range(n_dims):
            g[first_input + d] += scale * dL_dcode[first_output + d]
        return g

    return backward_identity


def make_backward_frequency(part: Part, Code, Input):
    n_dims, n_frequencies = part.config.n_dims, part.config.n_frequencies
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def backward_frequency(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        for d in range(n_dims):
            v = x[i, first_input + d]
            rate = float(wp.pi)
            for k in range(n_frequencies):
                angle = wp.pi * half_turn(v)
                at = first_output + (d * n_frequencies + k) * 2
                g[first_input + d] += rate * (wp.cos(angle) * dL_dcode[at] - wp.sin(angle) * dL_dcode[at + 1])
                v = 2.0 * v
                rate = 2.0 * rate
        return g

    return backward_frequency


def make_backward_triangle_wave(part: Part, Code, Input):
    n_dims, n_frequencies = part.config.n_dims, part.config.n_frequencies
    first_input, first_output = part.first_input, part.first_output

    @wp.func
    def backward_triangle_wave(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        for d in range(n_dims):
            frequency = float(0.5)
            for k in range(n_frequencies):
                v = x[i, first_input + d] * frequency + 0.25 * float(k)
                slope = 4.0 * frequency
                if v - wp.floor(v) < 0.5:
                    slope = -slope
                g[first_input + d] += slope * dL_dcode[first_output + d * n_frequencies + k]
                frequency = 2.0 * frequency
        return g

    return backward_triangle_wave


@wp.func
def quartic_pdf(x: float, inv_radius: float):
    """Derivative of `quartic_cdf` by x."""
    u = x * inv_radius
    rest = wp.max(1.0 - u * u, 0.0)
    return 15.0 / 16.0 * inv_radius * rest * rest


@wp.func
def wrapped_pdf(x: float, inv_radius: float):
    return quartic_pdf(x, inv_radius) + quartic_pdf(x - 1.0, inv_radius) + quartic_pdf(x + 1.0, inv_radius)


def make_backward_one_blob(part: Part, Code, Input):
    n_dims, n_bins, wrap = part.config.n_dims, part.config.n_bins, part.config.wrap
    first_input, first_output = part.first_input, part.first_output
    inv_radius = float(n_bins)

    @wp.func
    def backward_one_blob(x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input):
        g = dL_dx
        for d in range(n_dims):
            v = x[i, first_input + d]
            left = float(0.0)
            if wp.static(wrap):
                left = wrapped_pdf(-v, inv_radius)
            for k in range(n_bins):
                boundary = float(k + 1) / inv_radius
                right = float(0.0)
                if wp.static(wrap):
                    right = wrapped_pdf(boundary - v, inv_radius)
                else:
                    if k < n_bins - 1:
                        right = quartic_pdf(boundary - v, inv_radius)
                g[first_input + d] += (left - right) * dL_dcode[first_output + d * n_bins + k]
                left = right
        return g

    return backward_one_blob


def make_backward_spherical_harmonics(part: Part, Code, Input):
    degree, first_input, first_output = part.config.degree, part.first_input, part.first_output
    factor = make_float_table(part.config.normalizations)

    @wp.func
    def backward_spherical_harmonics(
        x: wp.array2d[float], i: int, params: wp.array[float], dL_dcode: Code, dL_dx: Input
    ):
        g = dL_dx
        vx = 2.0 * x[i, first_input] - 1.0
        vy = 2.0 * x[i, first_input + 1] - 1.0
        vz = 2.0 * x[i, first_input + 2] - 1.0
        re = float(1.0)  # of (vx + i vy)^m
        im = float(0.0)
        re_before = float(0.0)  # of (vx + i vy)^(m - 1)
        im_before = float(0.0)
        for m in range(degree):
            p = float(1.0)  # polynomial in vz, and its derivative
            p_before = float(0.0)
            dp = float(0.0)
            dp_before = float(0.0)
            dL_dvx = float(0.0)
            dL_dvy = float(0.0)
            dL_dvz = float(0.0)
            for band in range(m, degree):
                at = band * band + band
                dL_dre = factor(at + m) * dL_dcode[first_output + at + m]
                dL_dim = float(0.0)
                if m > 0:
                    dL_dim = factor(at + m) * dL_dcode[first_output + at - m]
                dL_dvx += p * (dL_dre * re_before + dL_dim * im_before)
                dL_dvy += p * (dL_dim * re_before - dL_dre * im_before)
                dL_dvz += dp * (dL_dre * re + dL_dim * im)
                a = float(2 * band + 1)
                b = float(band + m)
                c = 1.0 / float(band + 1 - m)
                p_next = (a * vz * p - b * p_before) * c
                dp_next = (a * (p + vz * dp) - b * dp_before) * c
                p_before = p
                p = p_next
                dp_before = dp
                dp = dp_next
            g[first_input] += 2.0 * float(m) * dL_dvx
            g[first_input + 1] += 2.0 * float(m) * dL_dvy
            g[first_input + 2] += 2.0 * dL_dvz
            re_before = re
            im_before = im
            re = re_before * vx - im_before * vy
            im = re_before * vy + im_before * vx
        return g

    return backward_spherical_harmonics
