"""`Field` against its NumPy twin, and its parameter gradients against finite differences in double precision."""

import numpy as np
import pytest
import reference_learning as reference
import warp as wp

import nrc.field
from nrc.field import Field
from nrc.launch import set_threads
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
WAVE = {"otype": "TriangleWave", "n_frequencies": 12, "n_dims_to_encode": 3}
FREQUENCY = {"otype": "Composite", "nested": [WAVE, {"otype": "Identity"}]}
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
    field = make_field(8, 3, FREQUENCY)
    # Eighths are exact, so that octave 11 does not magnify the twin's different rounding
    x = np.random.default_rng(1).integers(0, 4096, (100, 8)).astype(np.float32) / 4096
    expected = reference.field(x, field.params.numpy(), FREQUENCY, NETWORK, 3)
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


def gradients(field, x, upstream, *, wanted=("dL_dx", "dL_dparams"), **options):
    """What `Field.backward` adds to zeros for the gradients in `wanted`."""
    shapes = {"dL_dx": (len(x), field.n_input_dims), "dL_dparams": field.n_params}
    sums = {name: wp.zeros(shapes[name], dtype=float, device="cpu") for name in wanted}
    arrays = [wp.array(a, dtype=float, device="cpu") for a in (x, upstream)]
    field.backward(*arrays, **sums, **options)
    return [array.numpy() for array in sums.values()]


def assert_gradients_agree(gradient, expected):
    """Percentile of the error against the largest entry, direction, and which entries are zero."""
    error = np.abs(gradient - expected) / np.abs(expected).max()
    assert np.percentile(error, 95) < 2e-3
    norms = np.linalg.norm(gradient.astype(np.float64)) * np.linalg.norm(expected)
    assert (gradient * expected).sum() / norms > 0.99999
    assert ((gradient == 0) == (expected == 0)).mean() > 0.97


@pytest.mark.parametrize(
    "encoding, activation, step",
    [  # steps of the inputs: the twin's grid positions are single precision, its waves double
        pytest.param(ENCODING, "ReLU", 2.0**-13, id="hash"),
        pytest.param(ENCODING, "LeakyReLU", 2.0**-13, id="hash-leaky"),
        pytest.param(FREQUENCY, "ReLU", 2.0**-25, id="frequency"),
    ],
)
def test_backward_matches_finite_differences(encoding, activation, step):
    """Gradients by inputs and parameters agree with central differences of the double-precision twin.

    Upstream gradients are random. An input within a step of a kink has one-sided differences that disagree; these few
    are left out.
    """
    network = NETWORK | {"activation": activation}
    field = make_field(encoding=encoding, network=network)
    rng = np.random.default_rng(11)
    # Multiples of the step, so that a step is exact in single precision, away from the faces of the unit cube
    x = rng.uniform(0.01, 0.99, (300, 8))
    x = np.round(x * 2.0**13) / 2.0**13 if encoding is ENCODING else np.float32(x).astype(np.float64)
    upstream = rng.normal(size=(300, 3)).astype(np.float32)
    dL_dx, dL_dparams = gradients(field, x, upstream)
    params = field.params.numpy().astype(np.float64)

    def objective(x, params):
        return (reference.field(x, params, encoding, network, 3) * upstream).sum(axis=1)

    here = objective(x, params)
    forward, backward = np.empty_like(x), np.empty_like(x)
    for column in range(8):
        move = step * np.eye(8)[column]
        forward[:, column] = (objective(x + move, params) - here) / step
        backward[:, column] = (here - objective(x - move, params)) / step
    smooth = np.abs(forward - backward) < 1e-2 * np.abs(forward).max()
    assert smooth.mean() > 0.9
    assert_gradients_agree(dL_dx[smooth], (forward + backward)[smooth] / 2)

    n_weights, tables = field.encoding_offset, range(field.encoding_offset, field.n_params)
    picks = np.concatenate([rng.integers(0, n_weights, 60), rng.choice(tables, 60) if tables else []]).astype(int)
    differences = []
    for i in picks:
        move = 1e-5 * (np.arange(field.n_params) == i)  # small enough that few ReLUs switch within it
        differences.append((objective(x, params + move) - objective(x, params - move)).sum() / 2e-5)
    assert_gradients_agree(dL_dparams[picks], np.array(differences))


def test_backward_is_the_gradient_that_training_uses():
    """With the upstream gradient of the mean square error, the parameters' gradient is the trainer's."""
    field = make_field()
    rng = np.random.default_rng(12)
    x, y = rng.random((600, 8), dtype=np.float32), rng.random((600, 3), dtype=np.float32)
    upstream = 2.0 * (evaluate(field, x) - y) / y.size
    (ours,) = gradients(field, x, upstream, wanted=["dL_dparams"])
    theirs, _ = parameter_gradient(field, "L2", x, y)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_backward_adds_to_what_is_there():
    """Both results are added to their arrays, and asking for one alone gives the same bits."""
    field = make_field()
    rng = np.random.default_rng(13)
    x, upstream = rng.random((70, 8), dtype=np.float32), rng.normal(size=(70, 3)).astype(np.float32)
    dL_dx, dL_dparams = gradients(field, x, upstream)
    np.testing.assert_array_equal(gradients(field, x, upstream, wanted=["dL_dx"])[0], dL_dx)
    np.testing.assert_array_equal(gradients(field, x, upstream, wanted=["dL_dparams"])[0], dL_dparams)
    before = [rng.normal(size=a.shape).astype(np.float32) for a in (dL_dx, dL_dparams)]
    after = [wp.array(a, dtype=float, device="cpu") for a in before]
    arrays = [wp.array(a, dtype=float, device="cpu") for a in (x, upstream)]
    field.backward(*arrays, dL_dx=after[0], dL_dparams=after[1])
    for a, b, added in zip(after, before, (dL_dx, dL_dparams), strict=True):
        np.testing.assert_allclose(a.numpy(), b + added, atol=1e-5 * np.abs(added).max())


@pytest.mark.parametrize("count", [0, 1, 257, 1000])
def test_backward_stops_at_count(count):
    """Rows from the device-side count on, even non-finite ones, leave both gradients as they were."""
    field = make_field()
    rng = np.random.default_rng(14)
    x, upstream = rng.random((300, 8), dtype=np.float32), rng.normal(size=(300, 3)).astype(np.float32)
    n = min(count, 300)
    expected = gradients(field, x[:n], upstream[:n]) if n else [np.zeros((0, 8)), np.zeros(field.n_params)]
    x[n:], upstream[n:] = np.nan, np.nan
    some = gradients(field, x, upstream, count=wp.array([count], dtype=int, device="cpu"))
    np.testing.assert_array_equal(some[0][:n], expected[0])
    assert (some[0][n:] == 0.0).all()
    np.testing.assert_array_equal(some[1], expected[1])


def test_backward_is_the_same_for_any_thread_count():
    """One and two threads give the same bits, for more rows than one range and one chunk hold."""
    field = make_field()
    rng = np.random.default_rng(15)
    x, upstream = rng.random((3000, 8), dtype=np.float32), rng.normal(size=(3000, 3)).astype(np.float32)
    results = []
    try:
        for n_threads in (1, 2):
            set_threads(n_threads)
            results.append(gradients(field, x, upstream))
    finally:
        set_threads(0)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.abs(one).max() > 0.0


def test_backward_refuses_wrong_arrays():
    """A wrong shape, a missing row or no result to compute is a ValueError that names the array."""
    field = make_field()
    x, dL_dy, dL_dparams = (wp.zeros(s, dtype=float, device="cpu") for s in ((4, 8), (4, 3), field.n_params))
    for error, arrays, results in (
        ("dL_dx or dL_dparams", (x, dL_dy), {}),
        ("dL_dy must", (x, x), {"dL_dx": x}),
        ("dL_dy has 2 rows", (x, dL_dy[:2]), {"dL_dx": x}),
        ("dL_dx must", (x, dL_dy), {"dL_dx": dL_dy}),
        ("dL_dx has 3 rows", (x, dL_dy), {"dL_dx": wp.zeros((3, 8), dtype=float, device="cpu")}),
        ("dL_dparams must", (x, dL_dy), {"dL_dparams": dL_dparams[1:]}),
    ):
        with pytest.raises(ValueError, match=error):
            field.backward(*arrays, **results)
