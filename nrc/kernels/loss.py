"""Losses: value and gradient of one row of outputs, in Warp and as C++ for the CPU's blocks.

A loss is a mean over rows x outputs; the functions here return the un-normalised terms. A row that was drawn with
density `pdf` counts 1 / pdf times.

Names and formulas are tiny-cuda-nn's, with these differences: the gradient of |d| at d = 0 is 0, and not finite where
d is not; the pdf divides value and gradient of every loss, while there it divides the targets of some; and Huber is the
one that Instant-NGP fits NeRFs with, delta = 0.1 and divided by 5: up to delta it equals L2, beyond it is linear.
"""

from functools import cache

import warp as wp

wp.set_module_options({"enable_backward": False})

# Value, gradient and common factor as C++ of the prediction p, the target t, d = p - t and the row's luminance. No
# gradient flows through a factor's denominator.
_SIGN = "(d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d)"
_TERMS = {
    "L1": ("fabsf(d)", _SIGN, "1.0f"),
    "L2": ("d * d", "2.0f * d", "1.0f"),
    "RelativeL2": ("d * d", "2.0f * d", "1.0f / (p * p + 0.01f)"),
    "RelativeL2Luminance": ("d * d", "2.0f * d", "1.0f / (luminance * luminance + 0.01f)"),
    "MAPE": ("fabsf(d)", _SIGN, "1.0f / (fabsf(t) + 0.01f)"),
    "SMAPE": ("fabsf(d)", _SIGN, "1.0f / (0.5f * (fabsf(t) + fabsf(p)) + 0.01f)"),
    "Huber": (
        "(fabsf(d) > 0.1f ? 0.2f * fabsf(d) - 0.01f : d * d)",
        "(d > 0.1f ? 0.2f : d < -0.1f ? -0.2f : 2.0f * d)",
        "1.0f",
    ),
    "CrossEntropy": ("-t * logf(p)", "-t / p", "1.0f"),
}
LOSSES = tuple(_TERMS)
LUMINANCE = (0.299, 0.587, 0.114)  # of a row's R, G, B; six outputs are two colours to be added


def check_loss(otype: str, n_outputs: int) -> None:
    """Raise ValueError where loss `otype` does not apply to `n_outputs` outputs."""
    if otype == "RelativeL2Luminance" and n_outputs < 3:
        raise ValueError(f"RelativeL2Luminance needs 3 or 6 outputs, R, G, B, got {n_outputs}")


@wp.func
def row_weight(pdf: wp.array[float], i: int):
    """Factor of row i in the loss: 1 / pdf, or 1 where `pdf` is empty."""
    if pdf.shape[0] > 0:
        return 1.0 / pdf[i]
    return 1.0


@cache
def make_loss(otype: str, n_outputs: int):
    """Function (prediction, y, i) -> (sum of the row's terms, gradient vector), for `n_outputs`-vectors."""
    check_loss(otype, n_outputs)
    Output = wp.types.vector(length=n_outputs, dtype=float)
    value_source, gradient_source, factor_source = _TERMS[otype]
    colours = n_outputs // 3 if otype == "RelativeL2Luminance" else 0
    red, green, blue = LUMINANCE

    @wp.func_native(f"const float d = p - t; return {value_source};")
    def term(p: float, t: float) -> float: ...

    @wp.func_native(f"const float d = p - t; return {gradient_source};")
    def term_gradient(p: float, t: float) -> float: ...

    @wp.func_native(f"return {factor_source};")
    def factor(p: float, t: float, luminance: float) -> float: ...

    @wp.func
    def loss(prediction: Output, y: wp.array2d[float], i: int):
        luminance = float(0.0)
        for c in range(wp.static(min(2, colours))):
            luminance += red * prediction[3 * c] + green * prediction[3 * c + 1] + blue * prediction[3 * c + 2]
        value = float(0.0)
        gradient = Output()
        for j in range(n_outputs):
            scale = factor(prediction[j], y[i, j], luminance)
            value += scale * term(prediction[j], y[i, j])
            gradient[j] = scale * term_gradient(prediction[j], y[i, j])
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


def loss_source(otype: str | None, n_outputs: int) -> str:
    """C++ that adds to `value` and sets `gradient[j]` from `prediction[j]`, `target[j]` and the row's `weight`.

    Without a loss the targets are dL/dprediction.
    """
    if otype is None:
        return f"for (int j = 0; j < {n_outputs}; ++j) gradient[j] = weight * target[j];\n"
    check_loss(otype, n_outputs)
    value_source, gradient_source, factor_source = _TERMS[otype]
    source = ""
    if otype == "RelativeL2Luminance":
        colours = range(min(2, n_outputs // 3))
        terms = [f"{w!r}f * prediction[{3 * c + k}]" for c in colours for k, w in enumerate(LUMINANCE)]
        source = f"const float luminance = {' + '.join(terms)};\n"
    return (
        source
        + f"""
    for (int j = 0; j < {n_outputs}; ++j) {{
        const float p = prediction[j], t = target[j], d = p - t;
        const float scale = weight * ({factor_source});
        value += scale * ({value_source});
        gradient[j] = scale * ({gradient_source});
        (void)d;
    }}
    """
    )
