"""Activations of a network and their derivatives, in Warp for one value and as C++ for 16 values at once.

Names and formulas are tiny-cuda-nn's. A derivative is taken from the activation's value `y`, except for SiLU and Sine,
whose value does not determine it: those need the sum `v` they were applied to.
"""

from functools import cache

import warp as wp

from .vectors import EXP_SOURCE, SIN_SOURCE

wp.set_module_options({"enable_backward": False})

ACTIVATIONS = (
    "None",
    "ReLU",
    "LeakyReLU",
    "SiLU",
    "Exponential",
    "Sine",
    "Sigmoid",
    "Squareplus",
    "Softplus",
    "Tanh",
)
LEAKY_SLOPE = wp.constant(0.01)
SHARPNESS = wp.constant(10.0)  # K of Squareplus and Softplus: they turn within 1 / K of zero


def needs_sum(name: str) -> bool:
    """Whether the derivative needs the sum `v` and not only the value `y`."""
    return name in ("SiLU", "Sine")


# For one value. Large magnitudes neither overflow nor cancel.


@wp.func
def activate_none(v: float):
    return v


@wp.func
def derivative_none(v: float, y: float):
    return 1.0


@wp.func
def activate_relu(v: float):
    if v > 0.0:
        return v
    return 0.0 * v  # NaN stays NaN


@wp.func
def derivative_relu(v: float, y: float):
    if y > 0.0:
        return 1.0
    return 0.0


@wp.func
def activate_leaky_relu(v: float):
    if v > 0.0:
        return v
    return LEAKY_SLOPE * v


@wp.func
def derivative_leaky_relu(v: float, y: float):
    if y > 0.0:
        return 1.0
    return LEAKY_SLOPE


@wp.func
def sigmoid(v: float):
    return 1.0 / (1.0 + wp.exp(-v))


@wp.func
def derivative_sigmoid(v: float, y: float):
    return y * (1.0 - y)


@wp.func
def activate_silu(v: float):
    return v * sigmoid(v)


@wp.func
def derivative_silu(v: float, y: float):
    s = sigmoid(v)
    return s + y * (1.0 - s)


@wp.func
def activate_exponential(v: float):
    return wp.exp(v)


@wp.func
def derivative_exponential(v: float, y: float):
    return y


@wp.func
def activate_sine(v: float):
    return wp.sin(v)


@wp.func
def derivative_sine(v: float, y: float):
    return wp.cos(v)


@wp.func
def activate_squareplus(v: float):
    u = wp.abs(SHARPNESS * v)
    root = u
    if u < 1.0e6:  # above, the 4 does not count
        root = wp.sqrt(u * u + 4.0)
    if v > 0.0:
        return 0.5 / SHARPNESS * (root + u)
    return 2.0 / SHARPNESS / (root + u)  # root - u without cancellation


@wp.func
def derivative_squareplus(v: float, y: float):
    t = wp.min(SHARPNESS * y, 1.0e6)
    return t * t / (t * t + 1.0)


@wp.func
def activate_softplus(v: float):
    u = SHARPNESS * v
    return (wp.max(u, 0.0) + wp.log(1.0 + wp.exp(-wp.abs(u)))) / SHARPNESS


@wp.func
def derivative_softplus(v: float, y: float):
    return 1.0 - wp.exp(-SHARPNESS * y)


@wp.func
def activate_tanh(v: float):
    return wp.tanh(v)


@wp.func
def derivative_tanh(v: float, y: float):
    return 1.0 - y * y


@cache
def make_activation(name: str):
    """Functions (sum) -> value and (sum, value) -> derivative; the sum counts only where `needs_sum(name)`."""
    return {
        "None": (activate_none, derivative_none),
        "ReLU": (activate_relu, derivative_relu),
        "LeakyReLU": (activate_leaky_relu, derivative_leaky_relu),
        "SiLU": (activate_silu, derivative_silu),
        "Exponential": (activate_exponential, derivative_exponential),
        "Sine": (activate_sine, derivative_sine),
        "Sigmoid": (sigmoid, derivative_sigmoid),
        "Squareplus": (activate_squareplus, derivative_squareplus),
        "Softplus": (activate_softplus, derivative_softplus),
        "Tanh": (activate_tanh, derivative_tanh),
    }[name]


# For 16 values: C++ expressions of `v` and `y`. Those of more than one step are functions of `activation_functions`.

_ACTIVATE = {
    "None": "v",
    "ReLU": "(v < zero ? zero : v)",
    "LeakyReLU": f"(v > zero ? v : v * {LEAKY_SLOPE!r}f)",
    "SiLU": "v / (1.0f + exponential(-v))",
    "Exponential": "exponential(v)",
    "Sine": "sine(v)",
    "Sigmoid": "1.0f / (1.0f + exponential(-v))",
    "Squareplus": "squareplus(v)",
    "Softplus": "softplus(v)",
    "Tanh": "hyperbolic_tangent(v)",
}
_DERIVATIVE = {
    "None": "(zero + 1.0f)",
    "ReLU": "(y > zero ? zero + 1.0f : zero)",
    "LeakyReLU": f"(y > zero ? zero + 1.0f : zero + {LEAKY_SLOPE!r}f)",
    "SiLU": "silu_derivative(v, y)",
    "Exponential": "y",
    "Sine": "cosine(v)",
    "Sigmoid": "(y * (1.0f - y))",
    "Squareplus": "squareplus_derivative(y)",
    "Softplus": f"(1.0f - exponential({-SHARPNESS!r}f * y))",
    "Tanh": "(1.0f - y * y)",
}
_FUNCTIONS = {
    "SiLU": """
auto silu_derivative = [&](f16 v, f16 y) {
    const f16 s = 1.0f / (1.0f + exponential(-v));
    return s + y * (1.0f - s);
};
""",
    "Squareplus": f"""
auto squareplus = [&](f16 v) {{
    const f16 u = {SHARPNESS!r}f * (v > zero ? v : -v);
    const f16 sum = u + (u < zero + 1.0e6f ? __builtin_elementwise_sqrt(u * u + 4.0f) : u);  // above, the 4 is lost
    return v > zero ? {0.5 / SHARPNESS!r}f * sum : {2.0 / SHARPNESS!r}f / sum;  // root - u without cancellation
}};
auto squareplus_derivative = [&](f16 y) {{
    f16 t = {SHARPNESS!r}f * y;
    t = t > zero + 1.0e6f ? zero + 1.0e6f : t;
    return t * t / (t * t + 1.0f);
}};
""",
    # log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3
    "Softplus": f"""
auto softplus = [&](f16 v) {{
    const f16 u = {SHARPNESS!r}f * v;
    const f16 e = exponential(u > zero ? -u : u), s = e / (2.0f + e), z = s * s;
    const f16 series = 1.0f + z * (1.0f / 3.0f + z * (1.0f / 5.0f + z * (1.0f / 7.0f + z * (1.0f / 9.0f
        + z * (1.0f / 11.0f + z * (1.0f / 13.0f))))));
    return {1.0 / SHARPNESS!r}f * ((u > zero ? u : u * 0.0f) + 2.0f * s * series);
}};
""",
    # By exp(-2 |v|), and near zero, where that cancels, by the Taylor series
    "Tanh": """
auto hyperbolic_tangent = [&](f16 v) {
    const f16 e = exponential(v > zero ? -2.0f * v : 2.0f * v), far = (1.0f - e) / (1.0f + e), z = v * v;
    const f16 near = v + v * z * (-1.0f / 3.0f + z * (2.0f / 15.0f + z * (-17.0f / 315.0f + z * (62.0f / 2835.0f))));
    return z < zero + 0.09f ? near : (v > zero ? far : -far);
};
""",
}


def activation_functions(*names: str) -> str:
    """C++ functions that the expressions of the activations `names` call. Needs VECTOR_SOURCE."""
    source = ""
    if {"SiLU", "Exponential", "Sigmoid", "Softplus", "Tanh"} & set(names):
        source += EXP_SOURCE
    if "Sine" in names:
        source += SIN_SOURCE
    return source + "".join(_FUNCTIONS.get(name, "") for name in dict.fromkeys(names))


def activate_source(name: str) -> str:
    """C++ expression of the value, a vector of 16, of the sums `v`. Needs `activation_functions`."""
    return _ACTIVATE[name]


def derivative_source(name: str) -> str:
    """C++ expression of the derivative from values `y` and, where `needs_sum(name)`, sums `v`."""
    return _DERIVATIVE[name]
