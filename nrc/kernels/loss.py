"""Losses: value and gradient for one sample, in Warp and as C++ for the CPU's blocks.

A loss is a mean over rows x outputs; its functions return the un-normalised terms. Formulas as in tiny-cuda-nn.
"""

from functools import cache

import warp as wp

wp.set_module_options({"enable_backward": False})

LOSSES = ("L2", "RelativeL2Luminance")
LUMINANCE_EPSILON = 0.01  # added to the squared luminance (Müller et al. 2021, Eq. 4 uses the same constant)


@cache
def make_loss(otype: str, n_outputs: int):
    """Function (prediction, y, i) -> (sum of the row's terms, gradient vector), for `n_outputs`-vectors."""
    Output = wp.types.vector(length=n_outputs, dtype=float)
    relative = otype == "RelativeL2Luminance"

    @wp.func
    def loss(prediction: Output, y: wp.array2d[float], i: int):
        scale = float(1.0)
        if wp.static(relative):  # no gradient flows through the denominator
            luminance = 0.299 * prediction[0] + 0.587 * prediction[1] + 0.114 * prediction[2]
            scale = 1.0 / (luminance * luminance + LUMINANCE_EPSILON)
        value = float(0.0)
        gradient = Output()
        for j in range(n_outputs):
            difference = prediction[j] - y[i, j]
            value += difference * difference * scale
            gradient[j] = 2.0 * difference * scale
        return value, gradient

    return loss


@cache
def make_given_gradient(n_outputs: int):
    """Stand-in for a loss whose gradient is known: `y` holds dL/dprediction. Same signature as of `make_loss`."""
    Output = wp.types.vector(length=n_outputs, dtype=float)

    @wp.func
    def given_gradient(prediction: Output, y: wp.array2d[float], i: int):
        gradient = Output()
        for j in range(n_outputs):
            gradient[j] = y[i, j]
        return 0.0, gradient

    return given_gradient


def loss_source(otype: str, n_outputs: int) -> str:
    """C++ that adds to `value` and sets `gradient[j]` from `prediction[j]` and `target[j]`."""
    source = "float scale = 1.0f;\n"
    if otype == "RelativeL2Luminance":
        source += f"""
        const float luminance = 0.299f * prediction[0] + 0.587f * prediction[1] + 0.114f * prediction[2];
        scale = 1.0f / (luminance * luminance + {LUMINANCE_EPSILON!r}f);
        """
    return (
        source
        + f"""
    for (int j = 0; j < {n_outputs}; ++j) {{
        const float difference = prediction[j] - target[j];
        value += difference * difference * scale;
        gradient[j] = 2.0f * difference * scale;
    }}
    """
    )
