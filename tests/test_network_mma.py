"""The tensor-core kernels against NumPy: on an emulated warp anywhere, on the real one where there is a GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import warp as wp
from warp_emulator import LANES, CudaWarp, EmulatedWarp

from nrc.config import parse_encoding
from nrc.kernels import mma, network_mma
from nrc.kernels.encoding import EncodingConfig
from nrc.kernels.network import NetworkConfig

HALF_EPSILON = 2.0**-11  # rounding to half precision, relative
HALF_TINY = 2.0**-24  # smallest positive half, the absolute rounding of what is near zero
# Sums of at most 128 products of halves, in single precision: exact products, rounding of the sum (2^-24 per term
# relative to the largest partial sum; a tensor core truncates instead, twice as much).
SUM_EPSILON = 128 * 2.0**-23
FAST_MATH = 2.0**-16  # __expf, __sinf, __fdividef over the range that the tests reach
LOSS_SCALE = 128.0

ACTIVATE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "None": lambda v: v,
    "ReLU": lambda v: np.maximum(v, 0),
    "LeakyReLU": lambda v: np.where(v > 0, v, 0.01 * v),
    "SiLU": lambda v: v / (1 + np.exp(-v)),
    "Exponential": np.exp,
    "Sine": np.sin,
    "Sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "Squareplus": lambda v: (10 * v + np.sqrt((10 * v) ** 2 + 4)) / 20,
    "Softplus": lambda v: np.log1p(np.exp(10 * v)) / 10,
    "Tanh": np.tanh,
}


def derivative(name: str, v: np.ndarray) -> np.ndarray:
    """Derivative of an activation by central differences; that of the left at the kink of a ReLU."""
    if name in ("ReLU", "LeakyReLU"):
        return np.where(v > 0, 1.0, 0.01 if name == "LeakyReLU" else 0.0)
    return (ACTIVATE[name](v + 1e-5) - ACTIVATE[name](v - 1e-5)) / 2e-5


Warps = EmulatedWarp | CudaWarp


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def warps(request: pytest.FixtureRequest) -> Warps:
    """What the kernels run on: an emulated warp on the CPU, or the GPU."""
    return CudaWarp() if request.param == "cuda" else EmulatedWarp()


def identity_encoding(n_inputs: int) -> EncodingConfig:
    """The inputs themselves as the code."""
    return parse_encoding({"otype": "Identity"}, n_inputs, 0)


def half(x: np.ndarray) -> np.ndarray:
    """x rounded to half precision, in double precision."""
    return x.astype(np.float16).astype(np.float64)


def rows_of(fragments: np.ndarray) -> np.ndarray:
    """Rows of a matrix that the kernels stored in fragments: register 2 s + h of lane 4 g + t holds two columns."""
    n_rows, n_columns = fragments.shape
    # 32 rows, 16 columns, tile m, g, t, s, h, column of a pair
    axes = fragments.reshape(n_rows // 32, n_columns // 16, 2, 8, 4, 2, 2, 2)
    return axes.transpose(0, 2, 6, 3, 1, 4, 5, 7).reshape(n_rows, n_columns)  # 16 m + 8 h + g, 4 t + 2 s + pair


class Run:
    """One pass of all kernels over random rows: what went in and what came out, as NumPy arrays."""

    def __init__(
        self,
        network: NetworkConfig,
        n_rows: int,
        warps: Warps,
        *,
        loss: str | None = None,
        count: int | None = None,
        pdf: np.ndarray | None = None,
        params: np.ndarray | None = None,
        x: np.ndarray | None = None,
        chunk_size: int = 64,
        want_code: bool = True,
    ) -> None:
        rng = np.random.default_rng(network.n_neurons + network.n_outputs)
        self.network, self.n_rows = network, n_rows
        if params is None:
            params = np.concatenate([rng.normal(0, n_in**-0.5, n_in * n_out) for _, n_in, n_out in network.layers])
        self.params = params.astype(np.float32)
        self.x = (rng.uniform(-1, 1, (n_rows, network.n_inputs)) if x is None else x).astype(np.float32)
        self.y = rng.normal(0, 1, (n_rows, network.n_outputs)).astype(np.float32)
        self.n = n_rows if count is None else count
        capacity = -(-n_rows // LANES) * LANES + LANES
        encoding = identity_encoding(network.n_inputs)
        n_sums = network.n_hidden_layers * network.n_neurons

        def upload(a: np.ndarray, dtype: type = float) -> wp.array:
            return wp.array(a, dtype=dtype, device=warps.device)

        def full(shape: tuple[int, ...], dtype: type) -> wp.array:
            return wp.full(shape, 77, dtype=dtype, device=warps.device)

        weights = full((network_mma.packed_size(network),), wp.float16)
        params_device, x_device, y_device = upload(self.params), upload(self.x), upload(self.y)
        count_device = None if count is None else upload(np.array([count]), int)
        rows = [n_rows, count_device, x_device]
        warps.launch(network_mma.make_pack_weights(network), weights.size, [params_device], [weights])
        out_y = full((capacity, network.n_outputs), float)
        infer = warps.make(network_mma.make_infer_mma, encoding, network)
        warps.launch(infer, n_rows, [weights, params_device, *rows], [out_y])
        stored = [
            full((capacity, network.n_inputs + n_sums), wp.float16),
            full((capacity, network_mma.delta_columns(network)), wp.float16),
            full((capacity if want_code else 0, network.n_inputs), wp.float16),
            full((capacity,), float),
        ]
        warps.launch(
            warps.make(network_mma.make_backpropagate_mma, encoding, network, loss),
            n_rows,
            [weights, params_device, LOSS_SCALE, *rows, y_device, None if pdf is None else upload(pdf)],
            stored,
        )
        n_chunks = -(-n_rows // chunk_size)
        chunks = [full((n_chunks, network.n_params), float), full((n_chunks,), float), full((n_chunks,), int)]
        warps.launch(
            warps.make(network_mma.make_accumulate_weight_gradient_mma, network),
            n_chunks * network_mma.weight_gradient_warps(network) * LANES,
            [chunk_size, LOSS_SCALE, n_rows, count_device, stored[0], stored[1], stored[3]],
            chunks,
        )
        self.out_y = out_y.numpy().astype(np.float64)
        self.activations, self.deltas, self.dL_dcode, self.loss = [a.numpy().astype(np.float64) for a in stored]
        self.activations, self.deltas = rows_of(self.activations), rows_of(self.deltas)
        self.chunk_gradient, self.chunk_loss, self.chunk_finite = [a.numpy().astype(np.float64) for a in chunks]

    def weights(self, layer: int) -> np.ndarray:
        """Matrix of a layer in half precision."""
        first, n_in, n_out = self.network.layers[layer]
        return half(self.params[first : first + n_in * n_out]).reshape(n_in, n_out)

    def stored_activations(self, layer: int) -> np.ndarray:
        """What layer `layer` reads, as stored by the kernel; the code for layer 0."""
        net = self.network
        first = net.n_inputs + (layer - 1) * net.n_neurons if layer else 0
        return self.activations[: self.n, first : first + (net.n_neurons if layer else net.n_inputs)]

    def stored_deltas(self, layer: int) -> np.ndarray:
        """Gradients of the sums of layer `layer`, as stored."""
        net = self.network
        first = layer * net.n_neurons
        n = net.n_neurons if layer < net.n_hidden_layers else net.n_outputs
        return self.deltas[: self.n, first : first + n]


def assert_half(actual: np.ndarray, expected: np.ndarray, error: float | np.ndarray) -> None:
    """Equal up to rounding to half precision and an `error` before it."""
    bound = error + (np.abs(expected) + error) * HALF_EPSILON * 1.001 + HALF_TINY
    np.testing.assert_array_less(np.abs(actual - expected), bound)


NETWORKS = [
    NetworkConfig(16, 1, 16, 1),
    NetworkConfig(32, 3, 32, 2, "LeakyReLU", "Exponential"),
    NetworkConfig(48, 4, 64, 2, "Squareplus", "ReLU"),
    NetworkConfig(64, 3, 64, 2),
    NetworkConfig(16, 16, 128, 3, "ReLU", "Sigmoid"),
    NetworkConfig(80, 19, 32, 3, "SiLU", "Squareplus"),
    NetworkConfig(32, 4, 16, 2, "Sine", "Softplus"),
    NetworkConfig(16, 2, 32, 1, "Exponential", "LeakyReLU"),
    NetworkConfig(32, 3, 16, 2, "Sigmoid", "SiLU"),
    NetworkConfig(16, 33, 64, 1, "Softplus", "Tanh"),
    NetworkConfig(16, 3, 32, 2, "Tanh", "Sine"),
    NetworkConfig(16, 3, 64, 5, "None", "None"),
    NetworkConfig(48, 3, 80, 2, otype="MLP"),
]


@pytest.fixture(scope="module")
def runs(warps: Warps) -> Callable[[NetworkConfig], Run]:
    """Runs by network, each made once: 75 rows, not a multiple of a warp or a tile."""
    made: dict[NetworkConfig, Run] = {}

    def run(network: NetworkConfig) -> Run:
        if network not in made:
            made[network] = Run(network, 75, warps)
        return made[network]

    return run


def name_of(network: NetworkConfig) -> str:
    return (
        f"{network.n_inputs}-{network.n_hidden_layers}x{network.n_neurons}-{network.n_outputs}"
        f"-{network.activation}-{network.output_activation}"
    )


all_networks = pytest.mark.parametrize("network", NETWORKS, ids=name_of)


@all_networks
def test_forward_equals_numpy_layer_by_layer(runs: Callable[[NetworkConfig], Run], network: NetworkConfig) -> None:
    """Every stored layer is the rounded activation of the stored layer before it, and inference gives the outputs."""
    run = runs(network)
    assert_half(run.stored_activations(0), run.x.astype(np.float64), 0.0)
    for layer in range(network.n_hidden_layers + 1):
        a, w = run.stored_activations(layer), run.weights(layer)
        error = SUM_EPSILON * (np.abs(a) @ np.abs(w))
        if layer < network.n_hidden_layers:
            expected = ACTIVATE[network.activation](a @ w)
            slope = np.abs(derivative(network.activation, a @ w)) + 0.01
            assert_half(run.stored_activations(layer + 1), expected, slope * error + FAST_MATH * (1 + np.abs(expected)))
        else:
            expected = ACTIVATE[network.output_activation](a @ w)
            slope = np.abs(derivative(network.output_activation, a @ w)) + 0.01
            bound = slope * error + FAST_MATH * (1 + np.abs(expected))
            np.testing.assert_array_less(np.abs(run.out_y[: run.n] - expected), bound)


@all_networks
def test_backward_equals_numpy_layer_by_layer(runs: Callable[[NetworkConfig], Run], network: NetworkConfig) -> None:
    """Every stored gradient is that of the layer after it through the weights, times the activation's derivative."""
    run = runs(network)
    last = network.n_hidden_layers
    sums = run.stored_activations(last) @ run.weights(last)
    expected = LOSS_SCALE * run.y * derivative(network.output_activation, sums)
    kink = np.abs(sums) < 1e-6 if network.output_activation in ("ReLU", "LeakyReLU") else np.zeros(sums.shape, bool)
    assert not kink.any()
    assert_half(run.stored_deltas(last), expected, 1e-4 * LOSS_SCALE * (1 + np.abs(run.y)))
    assert (run.deltas[: run.n, last * network.n_neurons + network.n_outputs :] == 0).all()
    for layer in reversed(range(last + 1)):
        delta, w = run.stored_deltas(layer), run.weights(layer)
        dL_dinput = delta @ w.T
        error = SUM_EPSILON * (np.abs(delta) @ np.abs(w.T))
        if layer == 0:
            assert_half(run.dL_dcode[: run.n], dL_dinput, error)
            break
        a = run.stored_activations(layer)
        sums = run.stored_activations(layer - 1) @ run.weights(layer - 1)
        slope = derivative(network.activation, sums)
        if network.activation in ("ReLU", "LeakyReLU"):  # the sign that the kernel saw, where rounding decides it
            slope = np.where(np.abs(sums) > 1e-6, slope, derivative(network.activation, a))
        # The derivative comes from half precision: of the value, or itself where the value does not do
        rounding = 2 * HALF_EPSILON * (1 + np.abs(slope)) * (10 if network.activation == "Softplus" else 1)
        assert_half(
            run.stored_deltas(layer - 1),
            dL_dinput * slope,
            error * (np.abs(slope) + 0.01) + np.abs(dL_dinput) * rounding,
        )


@all_networks
def test_weight_gradient_equals_numpy(runs: Callable[[NetworkConfig], Run], network: NetworkConfig) -> None:
    """Each chunk holds the products of the stored activations and gradients of its rows, and nothing of later rows."""
    run = runs(network)
    for chunk in range(2):
        rows = slice(64 * chunk, min(64 * (chunk + 1), run.n))
        for layer, (first, n_in, n_out) in enumerate(network.layers):
            a, d = run.stored_activations(layer)[rows], run.stored_deltas(layer)[rows]
            actual = run.chunk_gradient[chunk, first : first + n_in * n_out].reshape(n_in, n_out)
            bound = SUM_EPSILON * (np.abs(a).T @ np.abs(d)) / LOSS_SCALE + 1e-12
            np.testing.assert_array_less(np.abs(actual - a.T @ d / LOSS_SCALE), bound)
    assert (run.chunk_finite == 1).all()
    assert (run.chunk_loss == 0).all()  # gradients were given, there was no loss


@all_networks
def test_rows_past_the_end_stay_untouched(runs: Callable[[NetworkConfig], Run], network: NetworkConfig) -> None:
    """No kernel writes a row that was not asked for."""
    run = runs(network)
    for array in (run.out_y, run.dL_dcode, run.loss):
        assert (array[run.n :] == 77).all()
    warp_end = -(-run.n // LANES) * LANES
    assert (run.activations[warp_end:] == 77).all() and (run.deltas[warp_end:] == 77).all()
    assert (run.deltas[run.n : warp_end] == 0).all()  # so that the weight gradient may read them
    assert len(run.deltas) == warp_end + LANES


def test_loss_equals_numpy_with_count_and_pdf(warps: Warps) -> None:
    """Loss, norm and pdf act as in the formula, for the rows that the device's count says."""
    network = NetworkConfig(16, 3, 32, 2)
    pdf = np.random.default_rng(5).uniform(0.5, 2, 70).astype(np.float32)
    run = Run(network, 70, warps, loss="L2", count=50, pdf=pdf, want_code=False)
    difference = run.out_y[:50] - run.y[:50]
    norm = 1 / (50 * 3) / pdf[:50].astype(np.float64)
    np.testing.assert_allclose(run.loss[:50], norm * (difference**2).sum(axis=1), rtol=1e-5)
    assert (run.loss[50:] == 77).all()
    assert_half(run.stored_deltas(2), LOSS_SCALE * norm[:, None] * 2 * difference, 1e-5)
    np.testing.assert_allclose(run.chunk_loss, [run.loss[:50].sum(), 0], rtol=1e-5)
    assert run.dL_dcode.shape[0] == 0


def test_count_of_zero_writes_nothing(warps: Warps) -> None:
    """An empty batch leaves the rows alone and has no gradient and no loss."""
    run = Run(NetworkConfig(16, 3, 16, 1), 40, warps, loss="L2", count=0)
    assert (run.out_y == 77).all() and (run.activations == 77).all() and (run.loss == 77).all()
    assert (run.chunk_gradient == 0).all() and (run.chunk_loss == 0).all() and (run.chunk_finite == 1).all()


OVERFLOWS = [("input", 40, 3), ("gradient", 63, 0)] + [
    ("hidden", row, neuron) for row, neuron in ((32, 0), (37, 17), (44, 2), (50, 15), (55, 28), (58, 6), (63, 30))
]


@pytest.mark.parametrize("what, bad, column", OVERFLOWS)
def test_overflow_marks_its_row_alone(warps: Warps, what: str, bad: int, column: int) -> None:
    """A value beyond half precision, anywhere in a row, makes that row's loss NaN and its chunk not finite."""
    network = NetworkConfig(16, 3, 32, 2)
    rng = np.random.default_rng(1)
    params = rng.normal(0, 0.25, network.n_params)
    x = rng.uniform(-1, 1, (75, 16))
    pdf = np.ones(75, np.float32)
    if what == "input":
        x[bad, column] = 1e5
    elif what == "hidden":  # one neuron of the first hidden layer, and negative weights turn the next off altogether
        x[bad] = 0.0
        x[bad, 0] = 30000.0
        params[column] = 4.0
        first = network.layers[1][0] + column * 32
        params[first : first + 32] = -1.0
    else:
        pdf[bad] = 1e-9
    run = Run(network, 75, warps, loss="L2", params=params, x=x, pdf=pdf, chunk_size=32)
    assert np.flatnonzero(~np.isfinite(run.loss[:75])).tolist() == [bad]
    assert run.chunk_finite.tolist() == [1, 0, 1]
    if what == "hidden":
        assert np.argwhere(~np.isfinite(run.stored_activations(1))).tolist() == [[bad, column]]
        assert np.isfinite(run.stored_activations(2)).all() and np.isfinite(run.deltas[:75]).all()


def test_gradient_equals_finite_differences(warps: Warps) -> None:
    """The summed weight gradient is that of the loss of an independent double-precision network, to half precision."""
    network = NetworkConfig(16, 3, 32, 2, "Tanh", "None")
    run = Run(network, 75, warps, loss="L2")

    def loss(params: np.ndarray) -> float:
        a = run.x.astype(np.float64)
        for layer, (first, n_in, n_out) in enumerate(network.layers):
            a = a @ params[first : first + n_in * n_out].reshape(n_in, n_out)
            a = np.tanh(a) if layer < 2 else a
        return float(np.mean((a - run.y) ** 2))

    params = run.params.astype(np.float64)
    gradient = run.chunk_gradient.sum(axis=0)
    rng = np.random.default_rng(0)
    for first, n_in, n_out in network.layers:
        direction = np.zeros(len(params))
        direction[first : first + n_in * n_out] = rng.normal(size=n_in * n_out)
        direction[first : first + n_in * n_out] += gradient[first : first + n_in * n_out] * 30
        slope = (loss(params + 1e-4 * direction) - loss(params - 1e-4 * direction)) / 2e-4
        assert gradient @ direction == pytest.approx(slope, rel=4 * HALF_EPSILON * 3)
    assert run.chunk_loss.sum() == pytest.approx(loss(params), rel=4 * HALF_EPSILON)


def fragment_layouts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column) of element i of lane l of A, B and C, from the PTX ISA's formulas for mma.m16n8k16."""
    lane = np.arange(32)[:, None]
    group, member = lane // 4, lane % 4
    i = np.arange(8)[None]
    a = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8), member * 2 + (i & 1) + np.where(i < 4, 0, 8)
    i = np.arange(4)[None]
    b = member * 2 + (i & 1) + np.where(i < 2, 0, 8), group + 0 * i
    c = np.where(i < 2, group, group + 8), member * 2 + (i & 1)
    return np.stack(a), np.stack(b), np.stack(c)


def test_mma_and_transpose_follow_the_isa(warps: Warps) -> None:
    """The primitives multiply and transpose matrices that are dealt to the lanes as the PTX ISA says."""

    @wp.func_native(
        mma.TYPES
        + warps.primitives
        + """
        float d[4];
        for (int i = 0; i < 4; ++i) d[i] = c.data[4 * lane + i];
        unsigned f[4];
        for (int i = 0; i < 4; ++i) f[i] = a.data[4 * lane + i];
        mma_16816(d, f, b.data[2 * lane], b.data[2 * lane + 1]);
        for (int i = 0; i < 4; ++i) c.data[4 * lane + i] = d[i];
        a.data[4 * lane] = transpose_8x8(f[0]);
        """
    )
    def multiply(a: wp.array[wp.uint32], b: wp.array[wp.uint32], c: wp.array[float]): ...

    @wp.kernel(module="unique", enable_backward=False)
    def multiply_fragments(first: int, a: wp.array[wp.uint32], b: wp.array[wp.uint32], c: wp.array[float]):
        """c += a b, and transpose a's first register. One warp."""
        multiply(a, b, c)

    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    c = rng.normal(size=(16, 8)).astype(np.float32)
    at_a, at_b, at_c = fragment_layouts()
    for layout, size in ((at_a, 256), (at_b, 128), (at_c, 128)):  # every element is dealt once
        assert len(set(zip(*layout.reshape(2, -1).tolist(), strict=True))) == size
    words_a = wp.array(a[tuple(at_a)].reshape(-1).view(np.uint32), device=warps.device)
    words_b = wp.array(b[tuple(at_b)].reshape(-1).view(np.uint32), device=warps.device)
    words_c = wp.array(c[tuple(at_c)].reshape(-1), device=warps.device)
    warps.launch(multiply_fragments, 32, [words_a, words_b], [words_c])
    expected = c + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(words_c.numpy(), expected[tuple(at_c)].reshape(-1), rtol=1e-5, atol=1e-5)
    corner = a[:8, :8].T
    lane = np.arange(32)
    dealt = np.stack([corner[lane // 4, lane % 4 * 2], corner[lane // 4, lane % 4 * 2 + 1]], axis=1)
    assert (words_a.numpy().reshape(32, 4)[:, 0] == np.ascontiguousarray(dealt).view(np.uint32)[:, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    "network", [NetworkConfig(64, 3, 64, 2), NetworkConfig(16, 16, 128, 3, "SiLU", "Sine")], ids=name_of
)
def test_kernels_compile_to_machine_code(network: NetworkConfig, architecture: int, tmp_path: Path) -> None:
    """NVRTC and ptxas accept the kernels as they run on a GPU, inline assembly included."""
    encoding = identity_encoding(network.n_inputs)
    kernels = [
        network_mma.make_pack_weights(network),
        network_mma.make_infer_mma(encoding, network),
        network_mma.make_backpropagate_mma(encoding, network, "L2"),
        network_mma.make_accumulate_weight_gradient_mma(network),
    ]
    cubins = [
        path
        for kernel in kernels
        for path in wp.compile_aot_module(kernel.module, arch=architecture, module_dir=tmp_path, use_ptx=False)
    ]
    assert len(cubins) == 4
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in cubins)
