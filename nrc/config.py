"""Configurations in tiny-cuda-nn's words: dictionaries become frozen dataclasses, errors list what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kernels import encoding as enc
from .kernels import network as net
from .kernels import optimizer as opt


def parse_encoding(config: Mapping[str, Any], n_dims: int, first_param: int) -> enc.Encoding:
    """Turn a tiny-cuda-nn style dictionary over `n_dims` inputs into an `Encoding` whose parameters start there.

    A nested entry of a Composite takes `n_dims_to_encode` inputs from `dims_to_encode_begin` on (by default those that
    follow the previous entry's); the one entry without a count takes what the others leave. Raises ValueError.
    """
    if otype_of(config, "OneBlob").lower() != "composite":
        if "n_dims_to_encode" in config:
            raise ValueError("n_dims_to_encode belongs to the nested encodings of a Composite")
        component = _component(config, n_dims, "encoding")
        return enc.Encoding((enc.Part(component, 0, 0, first_param),))
    parse_options(config, {"nested": []}, "Composite encoding")
    nested = list(config.get("nested", []))
    if not nested:
        raise ValueError("a Composite encoding needs at least one entry in 'nested'")
    open_entries = [entry for entry in nested if "n_dims_to_encode" not in entry]
    rest = n_dims - sum(int(entry.get("n_dims_to_encode", 0)) for entry in nested)
    if len(open_entries) > 1:
        raise ValueError("only one entry of a Composite encoding may omit n_dims_to_encode")
    parts: list[enc.Part] = []
    next_input = 0
    for i, entry in enumerate(nested):
        n = int(entry.get("n_dims_to_encode", rest))
        begin = int(entry.get("dims_to_encode_begin", next_input))
        if n < 1 or begin < 0 or begin + n > n_dims:
            raise ValueError(f"nested encoding {i} reads inputs {begin} ... {begin + n - 1} of {n_dims}")
        next_input = begin + n
        options = {k: v for k, v in entry.items() if k not in ("n_dims_to_encode", "dims_to_encode_begin")}
        component = _component(options, n, f"nested encoding {i}")
        before = enc.Encoding(tuple(parts)) if parts else None
        first_output = before.n_output_dims if before else 0
        parts.append(enc.Part(component, begin, first_output, first_param + (before.n_params if before else 0)))
    covered = {d for p in parts for d in range(p.first_input, p.first_input + p.config.n_dims)}
    if covered != set(range(n_dims)):
        raise ValueError(f"the Composite encoding leaves inputs {sorted(set(range(n_dims)) - covered)} unused")
    return enc.Encoding(tuple(parts))


def parse_network(config: Mapping[str, Any], n_inputs: int, n_outputs: int) -> net.Network:
    """Turn a tiny-cuda-nn style dictionary into a `Network`. Raises ValueError."""
    otype = otype_of(config, "FullyFusedMLP")
    if otype.lower() != "fullyfusedmlp":
        raise ValueError(f"unknown network otype {otype!r}; allowed: FullyFusedMLP")
    defaults = {
        "n_neurons": 128,
        "n_hidden_layers": 5,
        "activation": "ReLU",
        "output_activation": "None",
    }
    options = parse_options(config, defaults, "FullyFusedMLP network")
    for key in ("activation", "output_activation"):
        options[key] = one_of(options[key], net.ACTIVATIONS, key)
    return net.Network(n_inputs, n_outputs, **options)


def one_of(value: Any, allowed: tuple[str, ...], what: str) -> str:
    """The member of `allowed` that equals `value` up to case. Raises ValueError listing them."""
    for name in allowed:
        if isinstance(value, str) and name.lower() == value.lower():
            return name
    raise ValueError(f"unknown {what} {value!r}; allowed: {', '.join(allowed)}")


_COMPONENTS: dict[str, tuple[type, dict[str, Any]]] = {
    "HashGrid": (
        enc.HashGrid,
        {
            "n_levels": 16,
            "n_features_per_level": 2,
            "log2_hashmap_size": 19,
            "base_resolution": 16,
            "per_level_scale": 2.0,
        },
    ),
    "TriangleWave": (enc.TriangleWave, {"n_frequencies": 12}),
    "OneBlob": (enc.OneBlob, {"n_bins": 16, "wrap": True}),
    "Identity": (enc.Identity, {"scale": 1.0, "offset": 0.0}),
}


def _component(config: Mapping[str, Any], n_dims: int, what: str) -> Any:
    otype = one_of(otype_of(config, "OneBlob"), tuple(_COMPONENTS), f"otype of {what}")
    make, defaults = _COMPONENTS[otype]
    return make(n_dims, **parse_options(config, defaults, f"{otype} encoding"))


def otype_of(config: Mapping[str, Any], default: str) -> str:
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a dictionary with 'otype', got {config!r}")
    return str(config.get("otype", default))


def parse_options(config: Mapping[str, Any], defaults: dict[str, Any], what: str) -> dict[str, Any]:
    """`defaults` overridden by `config`, whose values must be of the defaults' types."""
    options = dict(defaults)
    for key, value in config.items():
        if key == "otype":
            continue
        if key not in defaults:
            raise ValueError(f"unknown key {key!r} in {what}; allowed: otype, {', '.join(defaults)}")
        kind = type(defaults[key])
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{key} in {what} must be {kind.__name__}, got {value!r}")
        options[key] = value
    return options


def parse_optimizer(config: Mapping[str, Any]) -> opt.Optimizer:
    """Turn a tiny-cuda-nn style dictionary into an `Optimizer`. Raises ValueError."""
    wrappers = {
        "Ema": ({"decay": 0.99}, {"decay": "ema_decay"}),
        "ExponentialDecay": (
            {"decay_base": 0.1, "decay_interval": 10000, "decay_start": 10000, "decay_end": 10000000},
            {},
        ),
    }
    values: dict[str, Any] = {}
    seen: set[str] = set()
    while True:
        otype = one_of(otype_of(config, "Adam"), ("Adam", *wrappers), "optimizer otype")
        if otype in seen:
            raise ValueError(f"optimizer {otype} is nested in itself")
        seen.add(otype)
        if otype == "Adam":
            defaults = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "l2_reg": 1e-8}
            return opt.Optimizer(**parse_options(config, defaults, "Adam optimizer"), **values)
        defaults, names = wrappers[otype]
        options = parse_options(config, {**defaults, "nested": {}}, f"{otype} optimizer")
        config = options.pop("nested")
        values |= {names.get(key, key): value for key, value in options.items()}
