"""The cache inside another kernel: encoding and network of one record as a function, one thread per record.

In single precision, whatever the device: on a CPU the answers of `RadianceCache.query` to rounding, on CUDA without its
half-precision products. Where a whole frame's records are asked at once, `RadianceCache.query` is faster.
"""

from functools import cache

import warp as wp

from .activation import make_activation
from .cache import RecordInput, from_normalised, record_input
from .encoding import EncodingConfig, make_encode
from .network import NetworkConfig
from .sampling import is_finite3

wp.set_module_options({"enable_backward": False})

FLOAT_BYTES = wp.constant(4)


@wp.struct
class CacheView:
    """What `make_query`'s function reads; see `RadianceCache.device_view`."""

    box_lower: wp.vec3
    inverse_extent: float
    scale: wp.array[float]  # (1,) radiance of an output of 1 at reflectance 1
    params: wp.array[float]  # (n_params,) averaged, or those being trained


@wp.func_native("return (wp::uint64)(&x);")
def address(x: wp.ref[RecordInput]) -> wp.uint64:
    """Where a thread's own network input lies, for the encodings, which read rows of memory."""


@wp.func
def layer_address(params: wp.array[float], first: int) -> wp.uint64:
    """Where parameter `first` lies."""
    return params.ptr + wp.uint64(first) * wp.uint64(FLOAT_BYTES)


@cache
def make_query(encoding: EncodingConfig, network: NetworkConfig):
    """Function (view, position, wo, normal, roughness, diffuse, specular) -> scattered radiance towards wo."""
    encode = make_encode(encoding)
    activate, _ = make_activation(network.activation)
    n_inputs, n_neurons, n_dims = network.n_inputs, network.n_neurons, encoding.n_input_dims
    first_hidden, n_hidden_layers = network.layers[1][0], network.n_hidden_layers
    first_output = network.layers[-1][0]
    Hidden = wp.types.vector(length=n_neurons, dtype=float)

    @wp.func
    def evaluate(params: wp.array[float], x: wp.ref[RecordInput]):
        row = wp.array(ptr=address(x), shape=(1, n_dims), dtype=float)
        code = encode(row, 0, params)
        weights = wp.array(ptr=params.ptr, shape=(n_inputs,), dtype=Hidden)
        h = Hidden()
        for k in range(n_inputs):
            h += code[k] * weights[k]
        for layer in range(n_hidden_layers - 1):
            weights = wp.array(
                ptr=layer_address(params, first_hidden + layer * n_neurons * n_neurons),
                shape=(n_neurons,),
                dtype=Hidden,
            )
            before = h
            h = Hidden()
            for k in range(n_neurons):
                h += activate(before[k]) * weights[k]
        last = wp.array(ptr=layer_address(params, first_output), shape=(n_neurons,), dtype=wp.vec3)
        y = wp.vec3(0.0, 0.0, 0.0)
        for k in range(n_neurons):
            y += activate(h[k]) * last[k]
        return y

    @wp.func
    def query(
        view: CacheView,
        position: wp.vec3,
        wo: wp.vec3,
        normal: wp.vec3,
        roughness: float,
        diffuse: wp.vec3,
        specular: wp.vec3,
    ):
        x = record_input(view.box_lower, view.inverse_extent, position, wo, normal, roughness, diffuse, specular)
        y = evaluate(view.params, x)
        if not is_finite3(y):
            y = wp.vec3(0.0, 0.0, 0.0)
        return from_normalised(y, diffuse + specular, view.scale[0])

    return query
