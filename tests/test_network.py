"""`Field` against its NumPy twin, and its parameter gradients against finite differences in double precision."""

import numpy as np
import pytest
import reference_learning as reference
import warp as wp

import nrc.field
from nrc.field import Field
from nrc.trainer import Trainer

GRID = {
    "otype": "HashGrid",
    "n_dims_to_encode": 3,
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 8,
    "base_resolution": 4,
    "per_level_scale": 1.6,
}
ENCODING = {
    "otype": "Composite",
    "nested": [
        GRID,
        {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 1},
        {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 2, "wrap": False},
        {"otype": "Identity"},
    ],
}
NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 2}


@pytest.fixture(params=[True, False], ids=["wide", "plain"])
def wide(request, monkeypatch):
    """Run a test with the CPU's block kernels and with the one-thread-per-sample kernels that CUDA uses."""
    monkeypatch.setattr(nrc.field, "wide", lambda device: request.param)
    return request.param


def make_field(n_inputs=8, n_outputs=3, encoding=ENCODING, network=NETWORK):
    """A CPU field whose table entries are large enough to matter."""
    field = Field(n_inputs, n_outputs, encoding, network, seed=3, device="cpu")
    params = field.params.numpy()
    params[field.encoding_offset :] *= 5000.0
    field.set_params(params)
    return field


def evaluate(field, x, **options):
    """Outputs for the rows of `x`, NaN where nothing was written."""
    out = wp.full((len(x), field.n_output_dims), wp.nan, dtype=float, device="cpu")
    field.inference(wp.array(x, dtype=float, device="cpu"), out, **options)
    return out.numpy()


@pytest.mark.parametrize(
    "n_neurons, n_hidden, n_outputs, activation",
    [(16, 1, 1, "ReLU"), (32, 3, 3, "LeakyReLU"), (64, 2, 3, "ReLU"), (128, 2, 16, "None")],
)
def test_inference_matches_twin(wide, n_neurons, n_hidden, n_outputs, activation):
    """Every width, depth and activation agrees with the double-precision twin, for a row number with a remainder."""
    network = {"n_neurons": n_neurons, "n_hidden_layers": n_hidden, "activation": activation}
    field = make_field(n_outputs=n_outputs, network=network | {"otype": "FullyFusedMLP"})
    x = np.random.default_rng(1).random((203, 8), dtype=np.float32)
    expected = reference.field(x, field.params.numpy(), ENCODING, network, n_outputs)
    np.testing.assert_allclose(evaluate(field, x), expected, atol=2e-4)  # dominated by grid positions' rounding


def test_inference_frequency_encoding(wide):
    """The cache's other encoding, 12 octaves of triangle waves, agrees with the twin."""
    wave = {"otype": "TriangleWave", "n_frequencies": 12, "n_dims_to_encode": 3}
    encoding = {"otype": "Composite", "nested": [wave, {"otype": "Identity"}]}
    field = make_field(8, 3, encoding)
    # Eighths are exact, so that octave 11 does not magnify the twin's different rounding
    x = np.random.default_rng(1).integers(0, 4096, (100, 8)).astype(np.float32) / 4096
    expected = reference.field(x, field.params.numpy(), encoding, NETWORK, 3)
    np.testing.assert_allclose(evaluate(field, x), expected, atol=1e-5)


def test_inference_stops_at_count(wide):
    """Rows from the device-side count on keep their content, and 0 evaluates none."""
    field = make_field()
    x = np.random.default_rng(2).random((150, 8), dtype=np.float32)
    full = evaluate(field, x)
    for count in (0, 1, 65, 150, 1000):
        y = evaluate(field, x, count=wp.array([count], dtype=int, device="cpu"))
        n = min(count, 150)
        np.testing.assert_array_equal(y[:n], full[:n])
        assert np.isnan(y[n:]).all()


def test_inference_takes_other_params(wide):
    """`params` replaces the field's own parameters for one call; zero rows are fine."""
    field = make_field()
    x = np.random.default_rng(2).random((10, 8), dtype=np.float32)
    own = evaluate(field, x)
    assert (evaluate(field, x, params=wp.zeros(field.n_params, dtype=float, device="cpu")) == 0.0).all()
    np.testing.assert_array_equal(evaluate(field, x), own)
    assert evaluate(field, x[:0]).shape == (0, 3)


def test_field_refuses_wrong_arrays():
    """A wrong shape, type or parameter array is a ValueError that says what was expected."""
    field = make_field()
    x, y = wp.zeros((4, 8), dtype=float, device="cpu"), wp.zeros((4, 3), dtype=float, device="cpu")
    for bad_x, bad_y in ((y, y), (x, x), (x, y[:2]), (wp.zeros((4, 8), dtype=wp.float64, device="cpu"), y)):
        with pytest.raises(ValueError):
            field.inference(bad_x, bad_y)
    with pytest.raises(ValueError, match="params"):
        field.inference(x, y, params=wp.zeros(3, dtype=float, device="cpu"))
    with pytest.raises(ValueError, match="finite"):
        field.set_params(np.full(field.n_params, np.nan, np.float32))
    with pytest.raises(ValueError, match="n_neurons"):
        Field(8, 3, ENCODING, NETWORK | {"n_neurons": 48}, device="cpu")
    with pytest.raises(ValueError, match="allowed: None, ReLU"):
        Field(8, 3, ENCODING, NETWORK | {"activation": "GeLU"}, device="cpu")
    with pytest.raises(ValueError, match="FullyFusedMLP"):
        Field(8, 3, ENCODING, {"otype": "CutlassMLP"}, device="cpu")


def test_reset_restores_seed():
    """The seed fixes the initial parameters: Glorot bounds for the weights, +-1e-4 for the table."""
    field = Field(8, 3, ENCODING, NETWORK, seed=5, device="cpu")
    first = field.params.numpy().copy()
    field.set_params(np.zeros(field.n_params))
    field.reset()
    np.testing.assert_array_equal(field.params.numpy(), first)
    field.reset(6)
    assert (field.params.numpy() != first).mean() > 0.99
    assert np.abs(first[field.encoding_offset :]).max() <= 1e-4
    start, n_in, n_out = field.network.layers[1]
    layer = first[start : start + n_in * n_out]
    bound = np.sqrt(6 / (n_in + n_out))
    assert 0.98 * bound < np.abs(layer).max() <= bound


def parameter_gradient(field, loss, x, y):
    """dL/dparams as the trainer sees it: ten times the first moments after the first step (beta1 = 0.9)."""
    trainer = Trainer(field, {"otype": loss}, {"otype": "Adam", "l2_reg": 0.0}, batch_size=len(x))
    value = trainer.step(wp.array(x, dtype=float, device="cpu"), wp.array(y, dtype=float, device="cpu"))
    return 10.0 * trainer._adam.blocks.numpy()["m"].ravel().astype(np.float64), float(value.numpy()[0])


@pytest.mark.parametrize("loss", ["L2", "RelativeL2Luminance"])
@pytest.mark.parametrize("n_neurons, n_hidden", [(16, 1), (64, 3)])
def test_parameter_gradient_matches_finite_differences(wide, loss, n_neurons, n_hidden):
    """Weights and table entries agree with central differences of the double-precision twin's loss."""
    network = {"otype": "FullyFusedMLP", "n_neurons": n_neurons, "n_hidden_layers": n_hidden}
    field = make_field(network=network)
    rng = np.random.default_rng(7)
    x, y = rng.random((90, 8), dtype=np.float32), rng.random((90, 3), dtype=np.float32)
    params = field.params.numpy().astype(np.float64)
    prediction = reference.field(x, params, ENCODING, network, 3)
    denominator = reference.luminance_denominator(prediction) if loss != "L2" else 1.0

    def objective(p):
        return reference.relative_l2_luminance(reference.field(x, p, ENCODING, network, 3), y, denominator)

    gradient, value = parameter_gradient(field, loss, x, y)
    assert value == pytest.approx(objective(params), rel=1e-4)
    picks = np.concatenate(
        [rng.integers(0, field.encoding_offset, 60), rng.integers(field.encoding_offset, field.n_params, 60)]
    )
    step = 1e-5  # small enough that few ReLUs switch within it
    expected = []
    for i in picks:
        up, down = params.copy(), params.copy()
        up[i] += step
        down[i] -= step
        expected.append((objective(up) - objective(down)) / (2 * step))
    expected = np.array(expected)
    scale = np.abs(gradient[picks]).max()
    error = np.abs(gradient[picks] - expected) / scale
    assert np.percentile(error, 95) < 2e-3
    cosine = gradient[picks] @ expected / np.linalg.norm(gradient[picks]) / np.linalg.norm(expected)
    assert cosine > 0.99999
    assert ((gradient[picks] == 0) == (expected == 0)).mean() > 0.97  # untouched entries and dead units


def test_inference_in_slices_is_the_same(monkeypatch):
    """Rows beyond one slice of the CPU's two-launch evaluation get the same bits as in a single slice."""
    field = make_field()
    x = np.random.default_rng(4).random((500, 8), dtype=np.float32)
    whole = evaluate(field, x)
    monkeypatch.setattr(nrc.field, "SLICE_ROWS", 128)
    np.testing.assert_array_equal(evaluate(field, x), whole)
    count = wp.array([300], dtype=int, device="cpu")
    some = evaluate(field, x, count=count)
    np.testing.assert_array_equal(some[:300], whole[:300])
    assert np.isnan(some[300:]).all()
