"""Losses in Warp and as C++ against their double-precision twins."""

import numpy as np
import pytest
import reference_network as reference
import warp as wp

from nrc.kernels.loss import LOSSES, loss_source, make_given_gradient, make_loss, row_weight

N_OUTPUTS = 7  # two colours and one more
N_ROWS = 400


@pytest.fixture(scope="module")
def rows():
    """Predictions, targets and densities over many magnitudes, predictions positive for the cross entropy's sake."""
    rng = np.random.default_rng(1)
    prediction, target = (10 ** rng.uniform(-3, 3, (2, N_ROWS, N_OUTPUTS))).astype(np.float32)
    prediction[100:200] = target[100:200] * rng.uniform(0.9, 1.1, (100, N_OUTPUTS))  # small differences
    target[::3] *= -1
    return prediction, target, rng.uniform(0.2, 5.0, N_ROWS).astype(np.float32)


def evaluate_warp(loss, prediction, target, pdf=None):
    """Value (rows) and gradient (rows, outputs) of a Warp loss, weighted by 1 / pdf."""
    Output = wp.types.vector(length=N_OUTPUTS, dtype=float)

    @wp.kernel(module="unique", module_options={"enable_backward": False})
    def evaluate(
        prediction: wp.array2d[float],
        target: wp.array2d[float],
        pdf: wp.array[float],
        out_value: wp.array[float],
        out_gradient: wp.array2d[float],
    ):
        i = wp.tid()
        p = Output()
        for j in range(N_OUTPUTS):
            p[j] = prediction[i, j]
        value, gradient = loss(p, target, i)
        out_value[i] = value * row_weight(pdf, i)
        for j in range(N_OUTPUTS):
            out_gradient[i, j] = gradient[j] * row_weight(pdf, i)

    return run(evaluate, prediction, target, pdf)


def evaluate_source(otype, prediction, target, pdf=None):
    """The same by the C++ of the CPU's blocks."""
    source = f"""
    for (int i = 0; i < rows.shape[0]; ++i) {{
        const float *prediction = rows.data + i * {N_OUTPUTS}, *target = targets.data + i * {N_OUTPUTS};
        float *gradient = out_gradient.data + i * {N_OUTPUTS}, value = 0.0f;
        const float weight = pdf.shape[0] > 0 ? 1.0f / pdf.data[i] : 1.0f;
        {loss_source(otype, N_OUTPUTS)}
        out_value.data[i] = value;
    }}
    """

    @wp.func_native(source)
    def native(
        rows: wp.array2d[float],
        targets: wp.array2d[float],
        pdf: wp.array[float],
        out_value: wp.array[float],
        out_gradient: wp.array2d[float],
    ): ...

    @wp.kernel(module="unique", module_options={"enable_backward": False})
    def evaluate(
        rows: wp.array2d[float],
        targets: wp.array2d[float],
        pdf: wp.array[float],
        out_value: wp.array[float],
        out_gradient: wp.array2d[float],
    ):
        native(rows, targets, pdf, out_value, out_gradient)

    return run(evaluate, prediction, target, pdf, dim=1)


def run(kernel, prediction, target, pdf, dim=None):
    """Launch `kernel` with outputs full of NaN."""
    given = [None if a is None else wp.array(a, dtype=float, device="cpu") for a in (prediction, target, pdf)]
    out = [wp.full(shape, wp.nan, dtype=float, device="cpu") for shape in (len(prediction), prediction.shape)]
    wp.launch(kernel, dim=dim or len(prediction), inputs=given, outputs=out, device="cpu")
    return [a.numpy() for a in out]


def evaluate(kind, otype, *arrays):
    """Evaluate by Warp or C++."""
    if kind == "warp":
        return evaluate_warp(make_loss(otype, N_OUTPUTS), *arrays)
    return evaluate_source(otype, *arrays)


@pytest.mark.parametrize("kind", ["warp", "source"])
@pytest.mark.parametrize("otype", LOSSES)
def test_loss_matches_twin(otype, kind, rows):
    """Value and gradient agree with the twin and its central differences, weighted by the row's density."""
    prediction, target, pdf = (a.astype(np.float64) for a in rows)
    value, gradient = evaluate(kind, otype, *rows)
    terms = reference.loss(otype, prediction, target) / pdf[:, None]
    scale = np.abs(terms).sum(axis=1)  # of the cross entropy, whose terms have both signs
    assert (np.abs(value - terms.sum(axis=1)) <= 2e-6 * scale).all()
    slopes = reference.loss_gradient(otype, prediction, target) / pdf[:, None]
    # A prediction close to its target keeps few digits in their difference
    digits = np.abs(prediction) / np.abs(prediction - target)
    assert (np.abs(gradient - slopes) <= (1e-5 + 1e-7 * digits) * np.abs(slopes)).all()


@pytest.mark.parametrize("kind", ["warp", "source"])
@pytest.mark.parametrize("otype", LOSSES)
def test_loss_at_its_edges(otype, kind):
    """A hit costs nothing and pulls nowhere (but for the cross entropy); what is not finite shows in the gradient."""
    prediction = np.full((4, N_OUTPUTS), 0.5, np.float32)
    target = prediction.copy()
    target[1], prediction[2], target[3] = np.nan, np.nan, np.inf
    value, gradient = evaluate(kind, otype, prediction, target)
    if otype != "CrossEntropy":
        assert value[0] == 0.0 and (gradient[0] == 0.0).all()
    assert np.isnan(gradient[1:3]).all() and np.isnan(value[1:3]).all()
    assert not np.isfinite(value[3])


def test_huber_is_l2_near_its_target():
    """Up to 0.1 it equals L2; beyond, the gradient stays at +-0.2 (Instant-NGP's NeRF loss)."""
    target = np.zeros((3, N_OUTPUTS), np.float32)
    prediction = target + np.array([[0.09], [-0.3], [4.0]], np.float32)
    value, gradient = evaluate("warp", "Huber", prediction, target)
    np.testing.assert_allclose(value / N_OUTPUTS, [0.09**2, 0.2 * 0.3 - 0.01, 0.2 * 4.0 - 0.01], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], [0.18, -0.2, 0.2], rtol=1e-6)


def test_given_gradient_passes_through(rows):
    """Without a loss the targets are the gradients, weighted like any."""
    prediction, target, pdf = rows
    value, gradient = evaluate_warp(make_given_gradient(N_OUTPUTS), *rows)
    assert (value == 0.0).all()
    np.testing.assert_allclose(gradient, target / pdf[:, None], rtol=1e-6)
    np.testing.assert_array_equal(evaluate_source(None, prediction, target)[1], target)


def test_loss_without_density(rows):
    """An empty array of densities weighs every row alike."""
    prediction, target, _ = rows
    for kind in ("warp", "source"):
        value, _ = evaluate(kind, "L2", prediction, target)
        np.testing.assert_allclose(value, ((prediction - target) ** 2).sum(axis=1), rtol=1e-6)


def test_luminance_needs_a_colour():
    """RelativeL2Luminance of fewer than three outputs is refused."""
    for make in (make_loss, loss_source):
        with pytest.raises(ValueError, match="R, G, B, got 2"):
            make("RelativeL2Luminance", 2)
