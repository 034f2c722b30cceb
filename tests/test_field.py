"""`Field` on the CPU: counts, slices, sums of gradients, seeds, threads and errors. Values: see test_components.py."""

import numpy as np
import pytest
import warp as wp

from nrc import field_cpu
from nrc.field import Encoding, Field, Network
from nrc.launch import set_threads
from nrc.optimizer import Optimizer

GRID = {
    "otype": "HashGrid",
    "n_dims_to_encode": 3,
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 8,
    "base_resolution": 4,
    "per_level_scale": 1.6,
}
GRID_3D = {name: value for name, value in GRID.items() if name != "n_dims_to_encode"}
CACHE = {
    "otype": "Composite",
    "nested": [
        GRID,
        {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 1},
        {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 2, "wrap": False},
        {"otype": "Identity"},
    ],
}
NETWORK = {
    "otype": "FullyFusedMLP",
    "n_neurons": 32,
    "n_hidden_layers": 2,
    "activation": "ReLU",
    "output_activation": "None",
}


def make_field():
    """A CPU field whose table entries are large enough to matter."""
    field = Field(8, 3, CACHE, NETWORK, seed=3, device="cpu")
    params = field.params.numpy()
    params[field.n_matrix_params :] *= 5000.0
    field.set_params(params)
    return field


def evaluate(field, x, **options):
    """Outputs for the rows of `x`, NaN where nothing was written."""
    out = wp.full((len(x), field.n_output_dims), wp.nan, dtype=float, device="cpu")
    field.inference(array(x), out, **options)
    return out.numpy()


def gradients(field, x, upstream, *, wanted=("dL_dx", "dL_dparams"), **options):
    """What `Field.backward` adds to zeros for the gradients in `wanted`."""
    shapes = {"dL_dx": (len(x), field.n_input_dims), "dL_dparams": field.n_params}
    sums = {name: wp.zeros(shapes[name], dtype=float, device="cpu") for name in wanted}
    field.backward(array(x), array(upstream), **sums, **options)
    return [a.numpy() for a in sums.values()]


def array(values):
    return wp.array(values, dtype=float, device="cpu")


def test_inference_stops_at_count():
    """Rows from the device-side count on keep their content, and 0 evaluates none."""
    field = make_field()
    x = np.random.default_rng(2).random((150, 8), dtype=np.float32)
    full = evaluate(field, x)
    for count in (0, 1, 65, 150, 1000):
        y = evaluate(field, x, count=wp.array([count], dtype=int, device="cpu"))
        n = min(count, 150)
        np.testing.assert_array_equal(y[:n], full[:n])
        assert np.isnan(y[n:]).all()


def test_inference_takes_other_params():
    """`params` replaces the field's own parameters for one call; zero rows are fine."""
    field = make_field()
    x = np.random.default_rng(2).random((10, 8), dtype=np.float32)
    own = evaluate(field, x)
    assert (evaluate(field, x, params=wp.zeros(field.n_params, dtype=float, device="cpu")) == 0.0).all()
    np.testing.assert_array_equal(evaluate(field, x), own)
    assert evaluate(field, x[:0]).shape == (0, 3)


def test_inference_in_slices_is_the_same(monkeypatch):
    """Rows beyond one slice of the CPU's two-launch evaluation get the same bits as in a single slice."""
    field = make_field()
    x = np.random.default_rng(4).random((500, 8), dtype=np.float32)
    whole = evaluate(field, x)
    monkeypatch.setattr(field_cpu, "SLICE_ROWS", 128)
    np.testing.assert_array_equal(evaluate(field, x), whole)
    some = evaluate(field, x, count=wp.array([300], dtype=int, device="cpu"))
    np.testing.assert_array_equal(some[:300], whole[:300])
    assert np.isnan(some[300:]).all()


def test_field_refuses_wrong_arrays():
    """A wrong shape, a missing row or a wrong parameter array is a ValueError that says what was expected."""
    field = make_field()
    x, y = wp.zeros((4, 8), dtype=float, device="cpu"), wp.zeros((4, 3), dtype=float, device="cpu")
    for bad_x, bad_y in ((y, y), (x, x), (x, y[:2])):
        with pytest.raises(ValueError):
            field.inference(bad_x, bad_y)
    with pytest.raises(ValueError, match="params"):
        field.inference(x, y, params=wp.zeros(3, dtype=float, device="cpu"))
    with pytest.raises(ValueError, match="finite"):
        field.set_params(np.full(field.n_params, np.nan, np.float32))


def test_field_refuses_wrong_networks():
    """A wrong network is a ValueError that lists what is allowed."""
    for options, message in (
        ({"n_neurons": 48}, "16, 32, 64 or 128"),
        ({"activation": "GeLU"}, "allowed: None, ReLU"),
        ({"otype": "CNN"}, "FullyFusedMLP"),
    ):
        with pytest.raises(ValueError, match=message):
            Field(8, 3, CACHE, NETWORK | options, device="cpu")


def test_reset_restores_seed():
    """The seed fixes the initial parameters: Glorot bounds for the weights, +-1e-4 for the table."""
    field = Field(8, 3, CACHE, NETWORK, seed=5, device="cpu")
    first = field.params.numpy().copy()
    field.set_params(np.zeros(field.n_params))
    field.reset()
    np.testing.assert_array_equal(field.params.numpy(), first)
    field.reset(6)
    assert (field.params.numpy() != first).mean() > 0.99
    assert np.abs(first[field.n_matrix_params :]).max() <= 1e-4
    start, n_in, n_out = field.network.layers[1]
    layer = first[start : start + n_in * n_out]
    bound = np.sqrt(6 / (n_in + n_out))
    assert 0.98 * bound < np.abs(layer).max() <= bound


def test_backward_adds_to_what_is_there():
    """Both results are added to their arrays, and asking for one alone gives the same bits."""
    field = make_field()
    rng = np.random.default_rng(13)
    x, upstream = rng.random((70, 8), dtype=np.float32), rng.normal(size=(70, 3)).astype(np.float32)
    dL_dx, dL_dparams = gradients(field, x, upstream)
    np.testing.assert_array_equal(gradients(field, x, upstream, wanted=["dL_dx"])[0], dL_dx)
    np.testing.assert_array_equal(gradients(field, x, upstream, wanted=["dL_dparams"])[0], dL_dparams)
    before = [rng.normal(size=a.shape).astype(np.float32) for a in (dL_dx, dL_dparams)]
    after = [array(a) for a in before]
    field.backward(array(x), array(upstream), dL_dx=after[0], dL_dparams=after[1])
    for a, b, added in zip(after, before, (dL_dx, dL_dparams), strict=True):
        np.testing.assert_allclose(a.numpy(), b + added, atol=1e-5 * np.abs(added).max())


@pytest.mark.parametrize("count", [0, 1, 257, 1000])
def test_backward_stops_at_count(count):
    """Rows from the device-side count on, even non-finite ones, leave both gradients as they were."""
    field = make_field()
    rng = np.random.default_rng(14)
    x, upstream = rng.random((300, 8), dtype=np.float32), rng.normal(size=(300, 3)).astype(np.float32)
    n = min(count, 300)
    # Zero cotangents, not fewer rows: the size of a chunk follows the array's
    upstream[n:] = 0.0
    expected = gradients(field, x, upstream)
    x[n:], upstream[n:] = np.nan, np.nan
    some = gradients(field, x, upstream, count=wp.array([count], dtype=int, device="cpu"))
    np.testing.assert_array_equal(some[0][:n], expected[0][:n])
    assert (some[0][n:] == 0.0).all()
    np.testing.assert_allclose(some[1], expected[1], atol=1e-6 * max(1.0, np.abs(expected[1]).max()))


def test_field_is_the_same_for_any_thread_count():
    """One and two threads give the same bits, for more rows than one range and one chunk hold."""
    field = make_field()
    rng = np.random.default_rng(15)
    x, upstream = rng.random((3000, 8), dtype=np.float32), rng.normal(size=(3000, 3)).astype(np.float32)
    results = []
    try:
        for n_threads in (1, 2):
            set_threads(n_threads)
            results.append([evaluate(field, x), *gradients(field, x, upstream)])
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: Field(3, 2, GRID_3D, NETWORK, device="cpu"),
        lambda: Network(3, 2, NETWORK, device="cpu"),
        lambda: Encoding(3, GRID_3D, device="cpu"),
    ],
    ids=["field", "network", "encoding"],
)
def test_no_rows_at_first_are_fine(make):
    """The first call may have no rows: nothing is added, nothing is learned."""
    model = make()
    before = model.params.numpy().copy()
    x, y = np.zeros((0, 3), np.float32), np.zeros((0, model.n_output_dims), np.float32)
    dL_dx, dL_dparams = np.zeros((0, 3), np.float32), np.zeros(model.n_params, np.float32)
    assert model.forward(x).shape == (0, model.n_output_dims)
    model.backward(x, y, dL_dx=dL_dx, dL_dparams=dL_dparams)
    assert not dL_dparams.any()
    Optimizer(model, {"otype": "Adam"}).step(x, y)
    np.testing.assert_array_equal(model.params.numpy(), before)


def test_encoding_alone_is_trained():
    """An optimizer fits a grid without a network, and skips nothing."""
    grid = Encoding(2, GRID_3D | {"n_levels": 1, "n_features_per_level": 1}, device="cpu")
    optimizer = Optimizer(grid, {"otype": "Adam", "learning_rate": 1e-2})
    x = 0.1 + 0.7 * np.random.default_rng(1).random((500, 2), dtype=np.float32)  # the last cells wrap
    target = (x[:, :1] * x[:, 1:] - 0.3).astype(np.float32)
    for _ in range(200):
        optimizer.step(x, (grid.forward(x).numpy() - target) / len(x))
    assert optimizer.n_steps.numpy()[0] == 200 and optimizer.skipped_steps.numpy()[0] == 0
    assert np.abs(grid.inference(x).numpy() - target).mean() < 0.01


def test_grids_of_close_configurations_live_together():
    """Level tables that compare equal as numbers but differ in type do not stand in for each other."""
    for resolution in (15, 16, 2):
        grid = Encoding(2, GRID_3D | {"n_levels": 1, "base_resolution": resolution}, device="cpu")
        dL_dx = np.zeros((4, 2), np.float32)
        x = np.random.default_rng(2).random((4, 2), dtype=np.float32)
        grid.set_params(np.random.default_rng(3).random(grid.n_params))
        grid.backward(x, np.ones((4, 2)), dL_dx=dL_dx)
        assert np.abs(dL_dx).min() > 0.0


def test_too_wide_for_the_stack_is_refused():
    """Columns that no thread's stack holds are an error at construction, not a crash."""
    for make in (
        lambda: Field(40, 3, {"otype": "OneBlob", "n_bins": 1024}, NETWORK, device="cpu"),
        lambda: Field(2, 40000, {"otype": "Identity"}, NETWORK, device="cpu"),
        lambda: Encoding(40, {"otype": "OneBlob", "n_bins": 1024}, device="cpu"),
    ):
        with pytest.raises(ValueError, match="MB of a thread's stack on the CPU"):
            make()


def test_wrong_arguments_are_named():
    """Numbers that are none, dictionaries that are none, an option without otype."""
    with pytest.raises(ValueError, match=r"n_input_dims must be a whole number, got 2\.5"):
        Field(2.5, 3, GRID_3D, NETWORK, device="cpu")
    with pytest.raises(ValueError, match="expected a dictionary with 'otype', got 'HashGrid'"):
        Field(2, 3, "HashGrid", NETWORK, device="cpu")
    with pytest.raises(ValueError, match=r"OneBlob encoding .the default, as 'otype' is missing.; allowed: otype"):
        Field(2, 3, {"otyp": "HashGrid"}, NETWORK, device="cpu")
    assert Field(np.int64(3), 2, GRID_3D, NETWORK, device="cpu").n_input_dims == 3
