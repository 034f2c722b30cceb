"""The CPU's block kernels against the network's double-precision twin, by random cotangents and all losses."""

from dataclasses import dataclass

import numpy as np
import pytest
import reference_network as reference
import warp as wp

from nrc.config import parse_encoding
from nrc.kernels import network_wide
from nrc.kernels.loss import LOSSES
from nrc.kernels.network import NetworkConfig
from nrc.launch import heavy_range, launch, set_threads

CHUNK = 128
# float32 sums of hundreds of terms, against the largest entry
TOLERANCE = 3e-5


@dataclass(frozen=True)
class Case:
    """A network behind an encoding and what to backpropagate through it."""

    n_neurons: int
    n_hidden: int
    n_outputs: int
    activation: str
    output_activation: str
    loss: str | None
    n_inputs: int = 5
    grids: bool = False
    pdf: bool = False
    input_gradient: bool = True
    n_rows: int = 203

    def __str__(self):
        name = f"{self.n_neurons}x{self.n_hidden}-{self.activation}-{self.n_outputs}-{self.output_activation}"
        return f"{name}-{self.loss}"


# Every width class, depth, activation in both places, loss; remainders of outputs, columns and rows
CASES = [
    Case(16, 1, 1, "ReLU", "None", "L2"),
    Case(32, 2, 3, "LeakyReLU", "ReLU", "RelativeL2Luminance", pdf=True, grids=True),
    Case(64, 2, 3, "ReLU", "Exponential", "RelativeL2", grids=True, input_gradient=False),
    Case(128, 1, 16, "SiLU", "LeakyReLU", "L1", n_inputs=33),
    Case(48, 3, 17, "Sine", "Sigmoid", "CrossEntropy", pdf=True),
    Case(80, 4, 5, "Sigmoid", "Sine", "MAPE", n_rows=64),
    Case(112, 2, 4, "Squareplus", "SiLU", "SMAPE", n_inputs=16),
    Case(16, 16, 6, "Softplus", "Squareplus", "RelativeL2Luminance"),
    Case(64, 5, 2, "Tanh", "Softplus", "Huber", pdf=True, n_rows=1),
    Case(32, 1, 3, "Exponential", "Tanh", None, pdf=True, n_rows=300),
    Case(256, 2, 40, "None", "None", None, grids=True),
]


class Setup:
    """Arrays of a case: random weights, inputs, grid features, targets or cotangents; and the kernels."""

    def __init__(self, case, seed=1):
        self.case = case
        rng = np.random.default_rng(seed)
        grid = {"otype": "HashGrid", "n_dims_to_encode": 2, "n_levels": 3, "n_features_per_level": 2}
        nested = [grid | {"log2_hashmap_size": 4}] if case.grids else []
        self.n_features = 6 if case.grids else 0
        self.n_dims = case.n_inputs + (2 if case.grids else 0)
        encoding = {"otype": "Composite", "nested": [*nested, {"otype": "Identity"}]}
        self.encoding = parse_encoding(encoding, self.n_dims, 0)
        self.network = NetworkConfig(
            self.encoding.n_padded,
            case.n_outputs,
            case.n_neurons,
            case.n_hidden,
            case.activation,
            case.output_activation,
            otype="MLP",
        )
        self.x = rng.uniform(-1, 1, (case.n_rows, self.n_dims)).astype(np.float32)
        self.features = rng.uniform(-1, 1, (max(1, self.n_features // 2), case.n_rows, 2)).astype(np.float32)
        self.y = rng.uniform(0.05, 1, (case.n_rows, case.n_outputs)).astype(np.float32)
        self.pdf = rng.uniform(0.3, 3, case.n_rows).astype(np.float32) if case.pdf else None
        layers = self.network.layers
        # Sums of about unit variance
        self.weights = [rng.standard_normal(layer[1:], np.float32) / np.float32(np.sqrt(layer[1])) for layer in layers]
        self.params = np.concatenate([w.ravel() for w in self.weights])

    @property
    def code(self):
        """The encoded inputs: grid features level by level, the other inputs, ones as padding."""
        n = self.case.n_rows
        features = self.features.transpose(1, 0, 2).reshape(n, -1)[:, : self.n_features]
        columns = [features, self.x[:, -self.case.n_inputs :]]
        n_padding = self.network.n_inputs - sum(c.shape[1] for c in columns)
        return np.concatenate([*columns, np.ones((n, n_padding))], axis=1).astype(np.float64)

    def infer(self, count=None):
        """Outputs by the kernel, NaN where nothing was written."""
        n, kernel = self.case.n_rows, network_wide.make_infer_wide(self.encoding, self.network)
        out = full(n, self.case.n_outputs)
        inputs = [device(self.params), 0, n, count, device(self.x), device(self.features)]
        n_blocks = -(-n // network_wide.BLOCK)
        launch(kernel, n_blocks, inputs=inputs, outputs=[out], device=cpu(), range_size=heavy_range(n_blocks))
        return out.numpy()

    def backpropagate(self, count=None):
        """Gradients by features, code and parameters (chunks), loss and finite flags (chunks) by the kernel."""
        case, n = self.case, self.case.n_rows
        kernel = network_wide.make_backpropagate_wide(self.encoding, self.network, case.loss, case.input_gradient)
        features, n_chunks = device(self.features), -(-n // CHUNK)
        dL_dcode = full(n, self.network.n_inputs) if case.input_gradient else None
        chunks = [full(n_chunks, self.network.n_params), full(n_chunks), wp.full(n_chunks, -1, dtype=int, device="cpu")]
        launch(
            kernel,
            n_chunks,
            inputs=[device(self.params), CHUNK, n, count, device(self.x), device(self.y), device(self.pdf)],
            outputs=[features, dL_dcode, *chunks],
            device=cpu(),
            range_size=1,
        )
        return [None if a is None else a.numpy() for a in (features, dL_dcode, *chunks)]

    def expected(self):
        """Outputs, loss, gradient by the code and by the parameters of the twin."""
        case, y = self.case, self.y.astype(np.float64)
        names = (case.activation, case.output_activation)
        sums, values = reference.forward(self.code, self.weights, *names)
        prediction, weight = values[-1], 1.0 if self.pdf is None else 1 / self.pdf[:, None].astype(np.float64)
        value, dL_dy = 0.0, y * weight
        if case.loss:
            value = (reference.loss(case.loss, prediction, y) * weight).mean()
            dL_dy = reference.loss_gradient(case.loss, prediction, y) * weight / y.size
        dL_dcode, gradients = reference.backward(sums, values, self.weights, *names, dL_dy)
        return prediction, value, dL_dcode, np.concatenate([g.ravel() for g in gradients])


def cpu():
    return wp.get_device("cpu")


def device(array):
    return None if array is None else wp.array(array, dtype=float, device="cpu")


def full(*shape):
    return wp.full(shape, wp.nan, dtype=float, device="cpu")


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * max(np.abs(expected).max(), 1e-3))


def test_cases_cover_everything():
    """The cases name every activation, hidden and output, and every loss."""
    from nrc.kernels.activation import ACTIVATIONS

    assert {case.activation for case in CASES} == {case.output_activation for case in CASES} == set(ACTIVATIONS)
    assert {case.loss for case in CASES} == {None, *LOSSES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_network_matches_twin(case):
    """Outputs, loss, gradients by parameters, code and grid features agree with the twin."""
    setup = Setup(case)
    prediction, value, dL_dcode, dL_dparams = setup.expected()
    assert_close(setup.infer(), prediction)
    features, code, chunk_gradient, chunk_loss, chunk_finite = setup.backpropagate()
    assert (chunk_finite == 1).all()
    assert_close(chunk_loss.sum(), value)
    assert_close(chunk_gradient.sum(axis=0), dL_dparams)
    if case.input_gradient:
        assert_close(code, dL_dcode)
    if case.grids:
        columns = features.transpose(1, 0, 2).reshape(case.n_rows, -1)
        assert_close(columns, dL_dcode[:, : setup.n_features])


@pytest.mark.parametrize("activation", sorted({case.activation for case in CASES}))
def test_twin_matches_finite_differences(activation):
    """The twin's own gradients agree with central differences in double precision."""
    setup = Setup(Case(16, 2, 3, activation, activation, None, n_rows=20))
    code, weights = setup.code, [w.astype(np.float64) for w in setup.weights]

    def objective(code, weights):
        return (reference.forward(code, weights, activation, activation)[1][-1] * setup.y).sum()

    dL_dcode, gradients = reference.backward(
        *reference.forward(code, weights, activation, activation), weights, activation, activation, setup.y
    )
    rng, step = np.random.default_rng(2), 1e-6
    for array, gradient in zip([code, *weights], [dL_dcode, *gradients], strict=True):
        for at in rng.integers(0, array.size, 5):
            up, down = array.copy(), array.copy()
            up.flat[at] += step
            down.flat[at] -= step

            def moved(new, array=array):
                return [new if a is array else a for a in [code, *weights]]

            difference = objective(moved(up)[0], moved(up)[1:]) - objective(moved(down)[0], moved(down)[1:])
            np.testing.assert_allclose(gradient.flat[at], difference / (2 * step), rtol=1e-4, atol=1e-6)


def test_smaller_tiles_match_twin(monkeypatch):
    """The tiles for processors without AVX-512 agree with the twin, too."""
    case = Case(48, 2, 5, "ReLU", "None", "L2", n_rows=150)
    for name in ("LAYER_SOURCE", "WEIGHT_GRADIENT_SOURCE"):
        source = getattr(network_wide, name)
        assert "__AVX512F__" in source
        monkeypatch.setattr(network_wide, name, source.replace("__AVX512F__", "ANOTHER_PROCESSOR"))
    setup = Setup(case)
    prediction, value, dL_dcode, dL_dparams = setup.expected()
    assert_close(setup.infer(), prediction)
    _, code, chunk_gradient, chunk_loss, _ = setup.backpropagate()
    assert_close(chunk_loss.sum(), value)
    assert_close(code, dL_dcode)
    assert_close(chunk_gradient.sum(axis=0), dL_dparams)


def test_inference_stops_at_count():
    """Rows from the device-side count on keep their content; the others are those of a full evaluation."""
    setup = Setup(CASES[0])
    whole = setup.infer()
    for count in (0, 1, 65, 500):
        y = setup.infer(wp.array([count], dtype=int, device="cpu"))
        n = min(count, len(y))
        np.testing.assert_array_equal(y[:n], whole[:n])
        assert np.isnan(y[n:]).all()


def test_backpropagation_stops_at_count():
    """Rows past the count, non-finite as they are, change neither gradients nor the mean."""
    case = CASES[1]
    setup, count = Setup(case), 100
    for array in (setup.x, setup.y):
        array[count:] = np.nan
    setup.features[:, count:] = np.nan
    some = setup.backpropagate(wp.array([count], dtype=int, device="cpu"))
    first = Setup(case)
    first.case = Case(**(vars(case) | {"n_rows": count}))
    first.x, first.y, first.pdf = first.x[:count], first.y[:count], first.pdf[:count]
    first.features = np.ascontiguousarray(first.features[:, :count])
    alone = first.backpropagate()
    np.testing.assert_array_equal(some[0][:, :count], alone[0])
    np.testing.assert_array_equal(some[1][:count], alone[1])
    assert np.isnan(some[0][:, count:]).all() and np.isnan(some[1][count:]).all()
    for a, b in zip(some[2:], alone[2:], strict=True):
        np.testing.assert_array_equal(a[:1], b)  # the second chunk has no rows


@pytest.mark.parametrize("poison", ["x", "y", "weights"])
def test_non_finite_gradients_are_noticed(poison):
    """A single NaN among inputs, targets or weights lowers the flag of its chunk alone."""
    setup = Setup(CASES[1])
    if poison == "weights":
        setup.params[7] = np.nan
    else:
        getattr(setup, poison)[150, -1] = np.nan
    finite = setup.backpropagate()[-1]
    assert finite.tolist() == ([0, 0] if poison == "weights" else [1, 0])


def test_network_is_the_same_for_any_thread_count():
    """One and two threads give the same bits."""
    setup = Setup(Case(64, 3, 3, "SiLU", "Tanh", "L2", n_rows=3000))
    results = []
    try:
        for n_threads in (1, 2):
            set_threads(n_threads)
            results.append([setup.infer(), *setup.backpropagate()])
    finally:
        set_threads(0)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.isfinite(one[: len(setup.y)]).all() and np.abs(one).max() > 0.0


def test_largest_network_fits_the_stack():
    """16 hidden layers of 1024 neurons train on the threads of a pool; with kept sums they are refused."""
    setup = Setup(Case(1024, 16, 3, "None", "None", "L2", n_rows=CHUNK + 1, input_gradient=False))
    prediction, value, _, dL_dparams = setup.expected()
    try:
        set_threads(2)
        assert_close(setup.infer(), prediction)
        _, _, chunk_gradient, chunk_loss, _ = setup.backpropagate()
    finally:
        set_threads(0)
    assert_close(chunk_loss.sum(), value)
    assert_close(chunk_gradient.sum(axis=0), dL_dparams)
    network = NetworkConfig(16, 3, 1024, 16, "SiLU", otype="MLP")
    with pytest.raises(ValueError, match="of a thread's stack"):
        network_wide.make_backpropagate_wide(setup.encoding, network, "L2", False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_neurons": 48}, "FullyFusedMLP n_neurons must be 16, 32, 64 or 128, got 48"),
        ({"n_neurons": 40, "otype": "MLP"}, "multiple of 16 up to 1024, got 40"),
        ({"n_neurons": 1040, "otype": "MLP"}, "multiple of 16 up to 1024, got 1040"),
        ({"n_hidden_layers": 0}, "1 ... 16, got 0"),
        ({"n_hidden_layers": 17}, "1 ... 16, got 17"),
        ({"activation": "GeLU"}, "allowed: None, ReLU, LeakyReLU, SiLU"),
        ({"otype": "CNN"}, "allowed: FullyFusedMLP, MLP"),
        ({"n_outputs": 0}, "at least one output"),
        ({"n_inputs": 20}, "multiple of 16 inputs"),
    ],
)
def test_network_refuses(options, message):
    """A network that cannot be is an error that says what is allowed."""
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**({"n_inputs": 16, "n_outputs": 3} | options))
