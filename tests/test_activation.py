"""Activations in Warp and as C++ vectors against their double-precision twins."""

import numpy as np
import pytest
import reference_network as reference
import warp as wp

from nrc.kernels.activation import (
    ACTIVATIONS,
    activate_source,
    activation_functions,
    derivative_source,
    make_activation,
    needs_sum,
)
from nrc.kernels.vectors import VECTOR_SOURCE

MAGNITUDES = np.array([0.0, 1e-30, 1e-6, 1e-3, 0.1, 0.29, 0.31, 1.0, 3.0, 8.0, 20.0, 80.0, 200.0, 1e4, 1e9, 1e30])
INPUTS = np.concatenate([np.linspace(-12, 12, 4001), MAGNITUDES, -MAGNITUDES]).astype(np.float32)
INPUTS = np.append(INPUTS, np.zeros(-len(INPUTS) % 16, np.float32))


def evaluate_vectors():
    """Value and derivative (activations, 2, inputs) by the C++ expressions."""
    source = VECTOR_SOURCE + activation_functions(*ACTIVATIONS)
    for i, name in enumerate(ACTIVATIONS):
        # An expression that does not need the sum must not read it
        given = "const f16 v = x;" if needs_sum(name) else ""
        source += f"""
        for (int k = 0; k < n; k += 16) {{
            const f16 x = *(const f16*)(inputs.data + k);
            const f16 y = [&](f16 v) {{ return (f16)({activate_source(name)}); }}(x);
            {given}
            *(f16*)(out.data + {2 * i} * n + k) = y;
            *(f16*)(out.data + {2 * i + 1} * n + k) = {derivative_source(name)};
        }}
        """

    @wp.func_native(source)
    def evaluate(n: int, inputs: wp.array[float], out: wp.array[float]): ...

    @wp.kernel(module="unique", module_options={"enable_backward": False})
    def evaluate_all(n: int, inputs: wp.array[float], out: wp.array[float]):
        evaluate(n, inputs, out)

    return run(evaluate_all, len(ACTIVATIONS)).reshape(len(ACTIVATIONS), 2, -1)


def run(kernel, n_activations):
    """Launch `kernel` on INPUTS with room for value and derivative of `n_activations`."""
    out = wp.full(2 * n_activations * len(INPUTS), wp.nan, dtype=float, device="cpu")
    dim = 1 if n_activations > 1 else len(INPUTS)
    inputs = wp.array(INPUTS, dtype=float, device="cpu")
    wp.launch(kernel, dim=dim, inputs=[len(INPUTS), inputs], outputs=[out], device="cpu")
    return out.numpy()


def evaluate_scalar(name):
    """Value and derivative (2, inputs) by the Warp functions."""
    activate, derivative = make_activation(name)
    sum_counts = needs_sum(name)

    @wp.kernel(module="unique", module_options={"enable_backward": False})
    def evaluate_one(n: int, inputs: wp.array[float], out: wp.array[float]):
        i = wp.tid()
        y = activate(inputs[i])
        out[i] = y
        out[n + i] = derivative(wp.where(sum_counts, inputs[i], wp.nan), y)

    return run(evaluate_one, 1).reshape(2, -1)


@pytest.fixture(scope="module")
def vectors():
    """Results of the C++ expressions, compiled once."""
    return evaluate_vectors()


@pytest.mark.parametrize("kind", ["warp", "vectors"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_matches_twin(name, kind, vectors):
    """Value and derivative, also of tiny and huge sums, agree with the twin; nothing overflows or cancels."""
    value, derivative = vectors[ACTIVATIONS.index(name)] if kind == "vectors" else evaluate_scalar(name)
    v = INPUTS.astype(np.float64)
    # Beyond 1e5 a sine's argument is mostly rounding; single precision ends at exp(88.7) and exp(-103)
    inside = np.abs(v) < {"Sine": 1e5, "Exponential": 88.0}.get(name, np.inf)
    with np.errstate(over="ignore"):
        expected, slope = reference.ACTIVATE[name](v), reference.DERIVATIVE[name](v)
    np.testing.assert_allclose(value[inside], expected[inside], rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(derivative[inside], slope[inside], rtol=3e-7, atol=6e-7)
    if name == "Exponential":
        assert np.isinf(value[v > 89]).all() and (value[v < -104] == 0).all()
    if name == "Sine":
        assert (np.abs(value) <= 1.001).all() and (np.abs(derivative) <= 1.001).all()


def test_vector_functions_are_accurate(vectors):
    """Relative errors of exp, sin and tanh stay below 3e-7 where the results are normal numbers."""
    v = INPUTS.astype(np.float64)
    for name, inside in (("Exponential", np.abs(v) < 87), ("Sine", np.abs(v) < 3), ("Tanh", np.abs(v) < 1e9)):
        expected = reference.ACTIVATE[name](v[inside])
        error = np.abs(vectors[ACTIVATIONS.index(name), 0, inside] - expected)
        assert (error <= 3e-7 * np.abs(expected)).all(), name


@pytest.mark.parametrize("kind", ["warp", "vectors"])
def test_activation_keeps_nan(kind, monkeypatch):
    """A NaN stays one, so that training notices it."""
    monkeypatch.setitem(globals(), "INPUTS", np.full(16, np.nan, np.float32))
    for i, name in enumerate(ACTIVATIONS):
        value = evaluate_vectors()[i, 0] if kind == "vectors" else evaluate_scalar(name)[0]
        assert np.isnan(value).all(), name
