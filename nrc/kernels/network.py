"""Multilayer perceptrons behind an encoding: the configuration that the implementations share.

`network_wide.py` is the CPU's, `network_mma.py` that of CUDA devices with tensor cores for half precision, and
`network_tile.py` that of older ones and of wide networks.

The weights of a layer are a row-major (inputs, outputs) matrix; the layers follow each other in the flat buffer. There
are no biases: the encoding's padding columns are constant.
"""

from dataclasses import dataclass
from itertools import pairwise

from .activation import ACTIVATIONS

NETWORKS = ("FullyFusedMLP", "MLP")
MAX_NEURONS = 1024
MAX_GRADIENT = 1.0e18  # a larger magnitude counts as non-finite: the square of one must fit a float


@dataclass(frozen=True)
class NetworkConfig:
    """`n_hidden_layers` layers of `n_neurons` between `n_inputs` (a multiple of 16) and `n_outputs`.

    `otype` only sets which widths are allowed: tiny-cuda-nn's FullyFusedMLP has four, its general MLP (CutlassMLP) any
    multiple of 16.
    """

    n_inputs: int
    n_outputs: int
    n_neurons: int = 128
    n_hidden_layers: int = 5
    activation: str = "ReLU"
    output_activation: str = "None"
    otype: str = "FullyFusedMLP"

    def __post_init__(self) -> None:
        if self.otype not in NETWORKS:
            raise ValueError(f"unknown network otype {self.otype!r}; allowed: {', '.join(NETWORKS)}")
        if self.otype == "FullyFusedMLP" and self.n_neurons not in (16, 32, 64, 128):
            raise ValueError(f"FullyFusedMLP n_neurons must be 16, 32, 64 or 128, got {self.n_neurons}; see MLP")
        if self.n_neurons % 16 or not 16 <= self.n_neurons <= MAX_NEURONS:
            raise ValueError(f"MLP n_neurons must be a multiple of 16 up to {MAX_NEURONS}, got {self.n_neurons}")
        if not 1 <= self.n_hidden_layers <= 16:
            raise ValueError(f"n_hidden_layers must be 1 ... 16, got {self.n_hidden_layers}")
        for name in (self.activation, self.output_activation):
            if name not in ACTIVATIONS:
                raise ValueError(f"unknown activation {name!r}; allowed: {', '.join(ACTIVATIONS)}")
        if self.n_inputs % 16 or self.n_inputs < 16:
            raise ValueError(f"a network needs a multiple of 16 inputs, got {self.n_inputs}")
        if self.n_outputs < 1:
            raise ValueError(f"a network needs at least one output, got {self.n_outputs}")

    @property
    def layers(self) -> tuple[tuple[int, int, int], ...]:
        """(first parameter, inputs, outputs) of each layer."""
        widths = [self.n_inputs] + [self.n_neurons] * self.n_hidden_layers + [self.n_outputs]
        layers, first = [], 0
        for n_in, n_out in pairwise(widths):
            layers.append((first, n_in, n_out))
            first += n_in * n_out
        return tuple(layers)

    @property
    def n_params(self) -> int:
        first, n_in, n_out = self.layers[-1]
        return first + n_in * n_out
