"""The CUDA passes on the CPU: with the tile network against NumPy in double precision, with `mma` against the tiles."""

from typing import Any

import numpy as np
import pytest
import reference_encoding as encodings
import reference_network as reference
import warp as wp
from warp_emulator import LANES, EmulatedWarp

import nrc.field_cuda
from nrc.config import parse_encoding
from nrc.field_cuda import CudaPasses
from nrc.kernels import network_mma
from nrc.kernels.network import NetworkConfig
from nrc.kernels.tile import Tiling

# Relative errors in the norm: of a few roundings to 24 and to 11 bits. The oracle rounds weights and values as the
# passes do, or else a ReLU's derivative would flip where its sum is smaller than that.
TOLERANCE = {wp.float32: 1e-5, wp.float16: 2e-3}


def grid(n_levels: int, n_features: int, base_resolution: int) -> dict[str, Any]:
    """Hash grid of 64 entries at most, so that the finer levels are hashed."""
    return {
        "otype": "HashGrid",
        "n_levels": n_levels,
        "n_features_per_level": n_features,
        "log2_hashmap_size": 6,
        "base_resolution": base_resolution,
        "per_level_scale": 1.5,
    }


GRID, FINE, SINGLE = grid(3, 2, 4), grid(4, 4, 3), grid(5, 1, 4)
WAVES = {"otype": "TriangleWave", "n_frequencies": 8}
IDENTITY = {"otype": "Identity"}

# encoding of the first two inputs, rest, network (neurons, layers, outputs, activations), loss, type
CASES = {
    "64 ReLU": (GRID, WAVES, (64, 2, 3, "ReLU", "None"), "RelativeL2Luminance", wp.float16),
    "32 SiLU": (FINE, IDENTITY, (32, 1, 20, "SiLU", "Softplus"), "L2", wp.float16),
    "128 LeakyReLU": (SINGLE, WAVES, (128, 2, 4, "LeakyReLU", "Sigmoid"), "L1", wp.float16),
    "48 Sine": (FINE, WAVES, (48, 3, 17, "Sine", "Exponential"), "Huber", wp.float32),
}
N_ROWS, COUNT = 333, 307  # rows of the arrays, and of them those that count: neither fills a tile


class Problem:
    """Passes, random parameters and data, and what NumPy makes of them."""

    def __init__(self, name: str) -> None:
        position, rest, (n_neurons, n_layers, n_outputs, *activations), self.loss, self.dtype = CASES[name]
        self.config = {"otype": "Composite", "nested": [{"n_dims_to_encode": 2, **position}, rest]}
        n_inputs = parse_encoding(self.config, 5, 0).n_padded
        self.network = NetworkConfig(n_inputs, n_outputs, n_neurons, n_layers, *activations, otype="MLP")
        self.encoding = parse_encoding(self.config, 5, self.network.n_params)
        self.name, self.device = name, wp.get_device("cpu")
        self.passes = CudaPasses(self.encoding, self.network, self.device, dtype=self.dtype)
        rng = np.random.default_rng(0)
        params = rng.normal(size=self.network.n_params + self.encoding.n_params)
        for first, n_in, n_out in self.network.layers:
            params[first : first + n_in * n_out] /= np.sqrt(n_in)
        self.params = np.float32(params)
        self.x = np.float32(rng.random((N_ROWS, 5)))
        self.y = np.float32(rng.uniform(0.2, 1.0, (N_ROWS, n_outputs)))
        self.pdf = np.float32(rng.uniform(0.5, 2.0, N_ROWS))
        self.count = self.array([COUNT], int)

    def array(self, values, dtype=float) -> wp.array:
        return wp.array(values, dtype=dtype, device=self.device)

    @property
    def weights(self) -> list[np.ndarray]:
        return [self.rounded(self.params[f : f + n * m]).reshape(n, m) for f, n, m in self.network.layers]

    def forward(self):
        """Pre-activations and values of all layers for the rows that count."""
        code = encodings.encode(self.x[:COUNT], self.config, self.params[self.network.n_params :])
        sums, values = [code], [self.rounded(code)]
        for i, w in enumerate(self.weights):
            sums.append(values[i] @ w)
            last = i == len(self.weights) - 1
            name = self.network.output_activation if last else self.network.activation
            value = reference.ACTIVATE[name](sums[-1])
            values.append(value if last else self.rounded(value))
        return sums, values

    def rounded(self, values):
        return np.float64(values.astype(wp.dtype_to_numpy(self.dtype)))

    def deltas(self, sums, dL_dy):
        """Gradients by every layer's pre-activations, and by the code."""
        deltas, gradient = [], dL_dy
        for i in reversed(range(len(self.weights))):
            last = i == len(self.weights) - 1
            name = self.network.output_activation if last else self.network.activation
            deltas.insert(0, gradient * reference.DERIVATIVE[name](sums[i + 1]))
            gradient = deltas[0] @ self.weights[i].T
        return deltas, gradient

    def backpropagate(self, y, loss, pdf=None):
        return self.passes.backpropagate(
            self.array(self.params),
            self.array(self.x),
            self.array(y),
            self.count,
            loss=loss,
            pdf=None if pdf is None else self.array(pdf),
            input_gradient=False,
        )


def error(actual, expected) -> float:
    """Relative error in the norm, infinite where something is not finite."""
    assert actual.shape == expected.shape
    difference = np.linalg.norm(np.float64(actual) - expected) / np.linalg.norm(expected)
    return difference if np.isfinite(difference) else np.inf


@pytest.fixture(scope="module", params=list(CASES))
def problem(request) -> Problem:
    return Problem(request.param)


def test_inference_equals_numpy(problem: Problem):
    """Every counted row has the oracle's outputs, the others keep their content."""
    out = problem.array(np.full((N_ROWS, problem.network.n_outputs), np.nan))
    problem.passes.evaluate(problem.array(problem.params), problem.array(problem.x), out, problem.count)
    _, values = problem.forward()
    assert error(out.numpy()[:COUNT], values[-1]) < TOLERANCE[problem.dtype]
    assert np.isnan(out.numpy()[COUNT:]).all()


def test_gradients_equal_numpy(problem: Problem):
    """Deltas, code and weight gradients follow from random gradients of the outputs."""
    passes, tolerance = problem.passes, TOLERANCE[problem.dtype]
    dL_dy = np.random.default_rng(1).normal(size=problem.y.shape)
    gradients = problem.backpropagate(dL_dy, None)
    sums, values = problem.forward()
    deltas, dL_dcode = problem.deltas(sums, dL_dy[:COUNT])
    stored = passes._deltas.numpy()[:COUNT, : passes._n_delta_columns] / gradients.loss_scale
    n_neurons = problem.network.n_neurons
    for i, delta in enumerate(deltas):
        assert error(stored[:, i * n_neurons : i * n_neurons + delta.shape[1]], delta) < tolerance
    assert error(gradients.dL_dcode.numpy()[:COUNT] / gradients.loss_scale, dL_dcode) < tolerance
    n_chunks = -(-COUNT // gradients.chunk_size)
    total = gradients.chunk_gradient.numpy()[:n_chunks].sum(axis=0)
    for (first, n_in, n_out), value, delta in zip(problem.network.layers, values, deltas, strict=False):
        dL_dw = total[first : first + n_in * n_out].reshape(n_in, n_out)
        assert error(dL_dw, value.T @ delta) < tolerance
    assert gradients.chunk_finite.numpy()[:n_chunks].all()
    assert not gradients.chunk_loss.numpy()[:n_chunks].any()


@pytest.mark.parametrize("name", ["64 ReLU", "48 Sine"])
def test_loss_and_its_gradient_equal_numpy(name: str):
    """The weighted mean over rows x outputs, and the gradient by the outputs."""
    problem = Problem(name)
    passes, tolerance = problem.passes, TOLERANCE[problem.dtype]
    gradients = problem.backpropagate(problem.y, problem.loss, problem.pdf)
    sums, values = problem.forward()
    norm = COUNT * problem.network.n_outputs * np.float64(problem.pdf[:COUNT, None])
    terms = reference.loss(problem.loss, values[-1], problem.y[:COUNT]) / norm
    n_chunks = -(-COUNT // gradients.chunk_size)
    loss = gradients.chunk_loss.numpy()[:n_chunks]
    assert error(loss, np.add.reduceat(terms.sum(axis=1), np.arange(n_chunks) * gradients.chunk_size)) < tolerance
    dL_dy = reference.loss_gradient(problem.loss, values[-1], problem.y[:COUNT]) / norm
    deltas, _ = problem.deltas(sums, dL_dy)
    first = passes._n_delta_columns - Tiling(problem.network, problem.dtype).n_outputs
    stored = passes._deltas.numpy()[:COUNT, first : first + problem.network.n_outputs] / gradients.loss_scale
    assert error(stored, deltas[-1]) < tolerance


def test_table_gradient_equals_numpy(problem: Problem):
    """Corner weights times code gradients, in the type of the optimizer's buffer and in single precision."""
    passes = problem.passes
    dL_dy = np.random.default_rng(1).normal(size=problem.y.shape)
    gradients = problem.backpropagate(dL_dy, None)
    dL_dcode = np.float64(gradients.dL_dcode.numpy()[:COUNT]) / gradients.loss_scale
    config = CASES[problem.name][0]
    n_columns = config["n_levels"] * config["n_features_per_level"]
    expected = encodings.grid_gradient(problem.x[:COUNT, :2], config, dL_dcode[:, :n_columns])
    state = problem.array([1, COUNT, 1, 0], int)
    for dtype in (passes.table_dtype, wp.float32):
        scale = gradients.loss_scale if dtype == wp.float16 else 1.0
        table = wp.zeros(problem.encoding.n_params, dtype=dtype, device=problem.device)
        passes.accumulate_grids(problem.array(problem.x), state, gradients, table)
        assert error(table.numpy() / scale, expected) < TOLERANCE[dtype]
    halted = problem.array([0, COUNT, 1, 0], int)
    table.zero_()
    passes.accumulate_grids(problem.array(problem.x), halted, gradients, table)
    assert not table.numpy().any()


def test_rows_that_are_not_finite_are_found(problem: Problem):
    """A NaN input and a gradient beyond the type's range mark their rows and chunks, and no others."""
    passes = problem.passes
    x = problem.x.copy()
    problem.x = x.copy()
    problem.x[70, 4] = np.nan
    y = np.ones_like(problem.y)
    y[200] = np.inf
    try:
        gradients = problem.backpropagate(y, None)
    finally:
        problem.x = x
    bad = np.isnan(passes._row_loss.numpy()[:COUNT])
    assert np.flatnonzero(bad).tolist() == [70, 200]
    finite = gradients.chunk_finite.numpy()[: -(-COUNT // gradients.chunk_size)]
    assert np.flatnonzero(finite == 0).tolist() == [70 // gradients.chunk_size, 200 // gradients.chunk_size]


def test_an_overflowing_layer_marks_its_row():
    """A hidden value beyond half precision counts, though the saturated output's delta is an innocent zero."""
    problem = Problem("128 LeakyReLU")
    first, n_in, n_out = problem.network.layers[-1]
    problem.params[:first] *= 1e3
    problem.params[first : first + n_in * n_out] = 0.1
    assert all(np.isfinite(w).all() for w in problem.weights)
    gradients = problem.backpropagate(np.ones_like(problem.y), None)
    stored = problem.passes._deltas.numpy()[:COUNT]
    assert not stored[:, 2 * 128 :].any()
    assert np.isnan(problem.passes._row_loss.numpy()[:COUNT]).all()
    assert not gradients.chunk_finite.numpy()[: -(-COUNT // gradients.chunk_size)].any()


def test_encoding_alone_passes_its_gradients_on():
    """Without a network the outputs are the code, and gradients of it reach the tables in single precision."""
    problem = Problem("32 SiLU")
    passes = CudaPasses(problem.encoding, None, problem.device)
    out = problem.array(np.full((N_ROWS, problem.encoding.n_output_dims), np.nan))
    passes.evaluate(problem.array(problem.params), problem.array(problem.x), out, problem.count)
    code = encodings.encode(problem.x, problem.config, problem.params[problem.network.n_params :], alignment=1)
    assert error(out.numpy()[:COUNT], code[:COUNT]) < TOLERANCE[wp.float32]
    assert np.isnan(out.numpy()[COUNT:]).all()
    dL_dcode = np.random.default_rng(2).normal(size=code.shape)
    gradients = passes.backpropagate(
        problem.array(problem.params),
        problem.array(problem.x),
        problem.array(dL_dcode),
        problem.count,
        loss=None,
        pdf=None,
        input_gradient=False,
    )
    table = wp.zeros(problem.encoding.n_params, dtype=passes.table_dtype, device=problem.device)
    passes.accumulate_grids(problem.array(problem.x), problem.array([1, COUNT, 1, 0], int), gradients, table)
    expected = encodings.grid_gradient(problem.x[:COUNT, :2], FINE, dL_dcode[:COUNT, :16])
    assert error(table.numpy(), expected) < TOLERANCE[wp.float32]


def test_threads_of_a_block_share_its_work(monkeypatch: pytest.MonkeyPatch):
    """A block of as many threads as on CUDA, run as fibers, computes what one thread does, up to the loss's order."""
    problem = Problem("64 ReLU")
    dL_dy = np.random.default_rng(1).normal(size=problem.y.shape)

    def results():
        out = problem.array(np.zeros((N_ROWS, problem.network.n_outputs)))
        problem.passes.evaluate(problem.array(problem.params), problem.array(problem.x), out, problem.count)
        gradients = problem.backpropagate(dL_dy, None)
        n_chunks = -(-COUNT // gradients.chunk_size)
        arrays = out, problem.passes._deltas, gradients.dL_dcode
        return [a.numpy()[:COUNT].copy() for a in arrays] + [gradients.chunk_gradient.numpy()[:n_chunks].copy()]

    alone = results()
    threads = {True: problem.passes._evaluate.module.options["block_dim"], False: 128}

    def launch_blocks(kernel, n, *, inputs, outputs, device, range_size=None):
        wp.launch(kernel, n, [0, *inputs], list(outputs), device=device, block_dim=kernel.module.options["block_dim"])

    monkeypatch.setattr(wp.config, "enable_cpu_blocks", True)
    monkeypatch.setattr(nrc.field_cuda, "launch", launch_blocks)
    problem.passes._group_threads, problem.passes._gradient_threads = threads[True], threads[False]
    for together, expected in zip(results(), alone, strict=True):
        np.testing.assert_array_equal(together, expected)


def test_both_networks_agree_through_the_same_passes(monkeypatch: pytest.MonkeyPatch):
    """`mma` kernels on an emulated warp: outputs, losses, gradients by weights and codes are those of the tiles."""
    problem, warps = Problem("64 ReLU"), EmulatedWarp()
    for name in [name for name in vars(network_mma) if name.startswith("make_") and "mma" in name]:
        factory = getattr(network_mma, name)
        monkeypatch.setattr(network_mma, name, lambda *args, factory=factory: warps.make(factory, *args))

    def launch_warps(kernel, n, *, inputs, outputs, device, range_size=None):
        if kernel.key.endswith("_mma"):
            assert n % LANES == 0
            warps.launch(kernel, n, inputs, outputs)
        else:
            wp.launch(kernel, n, [0, *inputs], list(outputs), device=device)

    monkeypatch.setattr(nrc.field_cuda, "launch", launch_warps)

    def results():
        out = problem.array(np.full((N_ROWS, problem.network.n_outputs), np.nan))
        problem.passes.evaluate(problem.array(problem.params), problem.array(problem.x), out, problem.count)
        gradients = problem.backpropagate(problem.y, problem.loss, problem.pdf)
        n_chunks = -(-COUNT // gradients.chunk_size)
        assert gradients.chunk_finite.numpy()[:n_chunks].all() and np.isnan(out.numpy()[COUNT:]).all()
        chunks = [a.numpy()[:n_chunks] for a in (gradients.chunk_gradient, gradients.chunk_loss)]
        return [out.numpy()[:COUNT], gradients.dL_dcode.numpy()[:COUNT], *chunks]

    tiles = results()
    problem.passes = CudaPasses(problem.encoding, problem.network, problem.device, mma=True)
    for mma, tile in zip(results(), tiles, strict=True):
        assert error(mma, np.float64(tile)) < TOLERANCE[wp.float16]
