"""One check over encodings x networks x losses: value and gradients against the double-precision twin.

By default every encoding meets one network and one loss, in turn; NRC_ALL_COMPONENTS=1 runs the full product.
"""

import os
from itertools import pairwise, product

import numpy as np
import pytest
import reference_encoding as encodings
import reference_network as networks
import warp as wp

from nrc.field import Field
from nrc.trainer import Trainer

N_ROWS = 75  # more than a block, and a remainder
GRID = {"n_levels": 4, "n_features_per_level": 2, "base_resolution": 4, "per_level_scale": 1.6}
HASH = {"otype": "HashGrid", "log2_hashmap_size": 7, **GRID}
ENCODINGS = {
    "hash 2D": (2, HASH | {"n_features_per_level": 4}),
    "hash 3D smoothstep": (3, HASH | {"interpolation": "Smoothstep"}),
    "hash 3D nearest": (3, HASH | {"interpolation": "Nearest", "n_features_per_level": 1}),
    "dense 2D": (2, {"otype": "DenseGrid", **GRID, "n_features_per_level": 8}),
    "dense 3D smoothstep": (3, {"otype": "DenseGrid", **GRID, "n_levels": 2, "interpolation": "Smoothstep"}),
    "tiled 2D": (2, {"otype": "TiledGrid", "log2_hashmap_size": 19, **GRID}),
    "tiled 3D": (3, {"otype": "TiledGrid", "log2_hashmap_size": 19, **GRID, "n_levels": 3}),
    "frequency": (3, {"otype": "Frequency", "n_frequencies": 5}),
    "triangle wave": (3, {"otype": "TriangleWave", "n_frequencies": 5}),
    "one-blob": (3, {"otype": "OneBlob", "n_bins": 16}),
    "one-blob, not wrapped": (2, {"otype": "OneBlob", "n_bins": 8, "wrap": False}),
    "spherical harmonics 4": (3, {"otype": "SphericalHarmonics", "degree": 4}),
    "spherical harmonics 8": (3, {"otype": "SphericalHarmonics", "degree": 8}),
    "identity": (5, {"otype": "Identity", "scale": 2.0, "offset": -0.5}),
    "composite": (
        7,
        {
            "otype": "Composite",
            "nested": [
                HASH | {"n_dims_to_encode": 3},
                {"otype": "SphericalHarmonics", "degree": 3, "n_dims_to_encode": 3},
                {"otype": "Identity"},
            ],
        },
    ),
}
NETWORKS = {
    "16 ReLU": {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 1, "activation": "ReLU"},
    "32 SiLU, Softplus": {
        "otype": "FullyFusedMLP",
        "n_neurons": 32,
        "n_hidden_layers": 3,
        "activation": "SiLU",
        "output_activation": "Softplus",
    },
    "64 Tanh, Sigmoid": {
        "otype": "FullyFusedMLP",
        "n_neurons": 64,
        "n_hidden_layers": 2,
        "activation": "Tanh",
        "output_activation": "Sigmoid",
    },
    "128 LeakyReLU, Exponential": {
        "otype": "FullyFusedMLP",
        "n_neurons": 128,
        "n_hidden_layers": 2,
        "activation": "LeakyReLU",
        "output_activation": "Exponential",
    },
    "MLP 48 Squareplus": {"otype": "MLP", "n_neurons": 48, "n_hidden_layers": 2, "activation": "Squareplus"},
    "MLP 80 Sine": {"otype": "MLP", "n_neurons": 80, "n_hidden_layers": 1, "activation": "Sine"},
}
LOSSES = tuple(networks.LOSS_TERM)
# CrossEntropy wants positive predictions
POSITIVE = [name for name, network in NETWORKS.items() if network.get("output_activation", "None") != "None"]


def cases() -> list[tuple[str, str, str]]:
    """(encoding, network, loss) names."""
    if os.environ.get("NRC_ALL_COMPONENTS"):
        chosen = product(ENCODINGS, NETWORKS, LOSSES)
        return [case for case in chosen if case[2] != "CrossEntropy" or case[1] in POSITIVE]
    names = list(NETWORKS)
    chosen = [(encoding, names[i % len(names)], LOSSES[i % len(LOSSES)]) for i, encoding in enumerate(ENCODINGS)]
    return [(e, n if loss != "CrossEntropy" else POSITIVE[0], loss) for e, n, loss in chosen]


class Twin:
    """Encoding and network in double precision, with gradients by parameters and inputs."""

    def __init__(self, n_dims: int, encoding: dict, network: dict, n_outputs: int, params: np.ndarray) -> None:
        self.encoding, self.network = encoding, network
        n_inputs = -(-encodings.encode_width(n_dims, encoding) // 16) * 16
        widths = [n_inputs, *[network["n_neurons"]] * network["n_hidden_layers"], n_outputs]
        self.weights, first = [], 0
        for n_in, n_out in pairwise(widths):
            self.weights.append(np.float64(params[first : first + n_in * n_out]).reshape(n_in, n_out))
            first += n_in * n_out
        self.table = np.float64(params[first:])
        self.activations = network["activation"], network.get("output_activation", "None")

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        self.code, self.jacobian = encodings.encode_with_jacobian(x, self.encoding, self.table)
        self.sums, self.values = networks.forward(self.code, self.weights, *self.activations)
        return self.values[-1]

    def backward(self, x: np.ndarray, dL_dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dL_dparams, dL_dx) at the last `evaluate`, for the gradients of the outputs."""
        dL_dcode, gradients = networks.backward(self.sums, self.values, self.weights, *self.activations, dL_dy)
        parts, column = [g.ravel() for g in gradients], 0
        nested = self.encoding.get("nested", [self.encoding])
        if encodings.is_grid(nested[0]):  # the only grid of these encodings comes first
            n = nested[0].get("n_dims_to_encode", x.shape[1])
            column = nested[0]["n_levels"] * nested[0]["n_features_per_level"]
            parts.append(encodings.grid_gradient(x[:, :n], nested[0], dL_dcode[:, :column]))
        return np.concatenate(parts), np.einsum("nk,nkd->nd", dL_dcode, self.jacobian)


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str, tolerance: float = 2e-5) -> None:
    """All but a few entries within single precision's reach, zeros where zeros belong, the same direction."""
    scale = np.abs(expected).max() + 1e-30
    error = np.abs(actual - expected) / scale
    # Sums of some 1e2 terms of either sign in single precision; a kink within rounding takes the other side
    assert np.percentile(error, 99) < tolerance, f"{what}: {np.percentile(error, [50, 99, 100])} of {scale}"
    if expected.any():
        cosine = (actual * expected).sum() / np.sqrt((actual**2).sum() * (expected**2).sum())
        assert cosine > 0.99999, f"{what}: cosine {cosine}"
    assert not actual[expected == 0.0].any(), f"{what}: {np.count_nonzero(actual[expected == 0.0])} stray values"


def check_component(encoding_name: str, network_name: str, loss: str) -> None:
    """Value, dL/dparams and dL/dx for random cotangents, then loss and dL/dparams of that loss."""
    n_dims, encoding = ENCODINGS[encoding_name]
    network, n_outputs = NETWORKS[network_name], 3
    rng = np.random.default_rng(3)
    field = Field(n_dims, n_outputs, encoding, network, device="cpu")
    params = field.params.numpy().copy()
    params[field.n_matrix_params :] = rng.standard_normal(field.encoding.n_params)
    field.set_params(params)
    x = rng.random((N_ROWS, n_dims), dtype=np.float32)
    for entry in encoding.get("nested", [encoding]):
        if encodings.is_grid(entry):  # keep away from faces, which rounding may cross
            x = x[~encodings.near_face(x[:, : entry.get("n_dims_to_encode", n_dims)], entry)]
    twin = Twin(n_dims, encoding, network, n_outputs, params)
    y = twin.evaluate(x)
    np.testing.assert_allclose(field.inference(x).numpy(), y, atol=2e-5 * np.abs(y).max())

    dL_dy = rng.standard_normal((len(x), n_outputs)).astype(np.float32)
    dL_dx = np.zeros((len(x), n_dims), np.float32)
    dL_dparams = np.zeros(field.n_params, np.float32)
    field.backward(x, dL_dy, dL_dx=dL_dx, dL_dparams=dL_dparams)
    expected_params, expected_x = twin.backward(x, np.float64(dL_dy))
    assert_close(dL_dparams, expected_params, "dL_dparams")
    assert_close(dL_dx, expected_x, "dL_dx")

    # Plain gradient descent shows the loss's gradient: p - rate * g, with a rate that leaves p's rounding behind
    rate = 2.0**20
    trainer = Trainer(field, {"otype": loss}, {"otype": "SGD", "learning_rate": rate, "l2_reg": 0.0})
    target = np.float32(y * rng.uniform(0.2, 0.8, y.shape) + (loss == "CrossEntropy") * 0.01)
    value = trainer.step(x, target).numpy()[0]
    np.testing.assert_allclose(value, networks.loss(loss, y, target).mean(), rtol=1e-5)
    expected, _ = twin.backward(x, networks.loss_gradient(loss, y, target) / y.size)
    tolerance = 2e-4 if loss == "CrossEntropy" else 2e-5  # -t / p magnifies the rounding of a small p
    assert_close((np.float64(params) - field.params.numpy()) / rate, expected, f"{loss} gradient", tolerance)


@pytest.mark.parametrize("encoding, network, loss", cases())
def test_component_matches_twin(encoding: str, network: str, loss: str):
    """Value, gradients and loss of one combination."""
    wp.config.quiet = True
    check_component(encoding, network, loss)
