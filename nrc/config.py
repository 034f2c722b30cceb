"""Configurations in tiny-cuda-nn's words: dictionaries become frozen dataclasses, errors list what is allowed.

`load_config` reads tiny-cuda-nn's and Instant-NGP's JSON files. Names are compared without regard to case, and a
missing key or `otype` means tiny-cuda-nn's default. Its keys that have no meaning here are accepted at the value that
asks for what happens anyway.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .kernels import encoding as enc
from .kernels import encoding_parts as parts
from .kernels import grid
from .kernels import loss as losses
from .kernels import network as net
from .kernels import optimizer as opt
from .kernels.activation import ACTIVATIONS

# Keys and defaults by otype, and the other keys of tiny-cuda-nn with the values they may have
Keys = tuple[dict[str, Any], dict[str, tuple[Any, ...]]]

_GRID_KEYS: Keys = (
    {
        "n_levels": 16,
        "n_features_per_level": 2,
        "log2_hashmap_size": 19,
        "base_resolution": 16,
        "per_level_scale": 2.0,
        "type": "Hash",
        "interpolation": "Linear",
        "n_features": 32,  # of all levels together, instead of n_levels
        "n_grid_features": 32,  # older name of it
    },
    {"hash": ("CoherentPrime",), "stochastic_interpolation": (False,), "fixed_point_pos": (False,)},
)
_GRIDS = {"Grid": "Hash", "HashGrid": "Hash", "DenseGrid": "Dense", "TiledGrid": "Tiled"}
_ENCODINGS: dict[str, Keys] = {
    **dict.fromkeys(_GRIDS, _GRID_KEYS),
    "Frequency": ({"n_frequencies": 12}, {}),
    "TriangleWave": ({"n_frequencies": 12}, {}),
    "OneBlob": ({"n_bins": 16, "wrap": True}, {}),
    "SphericalHarmonics": ({"degree": 4}, {}),
    "Identity": ({"scale": 1.0, "offset": 0.0}, {}),
    "Composite": ({"nested": []}, {"reduction": ("Concatenation",)}),
}
_COMPONENTS = {
    "Frequency": parts.Frequency,
    "TriangleWave": parts.TriangleWave,
    "OneBlob": parts.OneBlob,
    "SphericalHarmonics": parts.SphericalHarmonics,
    "Identity": parts.Identity,
}
_NETWORK_KEYS = {"n_neurons": 128, "n_hidden_layers": 5, "activation": "ReLU", "output_activation": "None"}
_NETWORKS: dict[str, Keys] = {
    "FullyFusedMLP": (_NETWORK_KEYS, {"feedback_alignment": (False,)}),
    "MLP": (_NETWORK_KEYS, {}),
}
_NETWORK_ALIASES = {"MegakernelMLP": "FullyFusedMLP", "CutlassMLP": "MLP"}
_LOSSES: dict[str, Keys] = dict.fromkeys(losses.LOSSES, ({}, {}))
_OPTIMIZERS: dict[str, Keys] = {
    "Adam": (
        {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "l2_reg": 1e-8},
        {
            "relative_decay": (0.0,),
            "absolute_decay": (0.0,),
            "clipping_magnitude": (0.0,),
            "non_matrix_learning_rate_factor": (1.0,),
            "adabound": (False,),
            "optimize_matrix_params": (True,),
            "optimize_non_matrix_params": (True,),
        },
    ),
    "Ema": ({"decay": 0.99, "nested": {}}, {"full_precision": (False, True)}),
    "ExponentialDecay": (
        {"decay_base": 0.1, "decay_interval": 10000, "decay_start": 10000, "decay_end": 10000000, "nested": {}},
        {},
    ),
    "SGD": ({"learning_rate": 1e-3, "l2_reg": 1e-8}, {}),
}


def parse_encoding(config: Mapping[str, Any], n_dims: int, first_param: int) -> enc.EncodingConfig:
    """Turn a tiny-cuda-nn style dictionary over `n_dims` inputs into an `Encoding` whose parameters start there.

    A nested entry of a Composite takes `n_dims_to_encode` inputs from `dims_to_encode_begin` on (by default those that
    follow the previous entry's); the one entry without a count takes what the others leave, perhaps nothing. Raises
    ValueError.
    """
    otype, options = _encoding_options(config, "encoding")
    if otype != "Composite":
        if n_dims < 1:
            raise ValueError(f"an encoding needs at least one input, got {n_dims}")
        return enc.compose([(_make_component(otype, options, n_dims), 0)], first_param)
    nested = options["nested"]
    counts = [_whole(entry, "n_dims_to_encode", -1, i) for i, entry in enumerate(nested)]
    rest = n_dims - sum(max(0, n) for n in counts)
    if counts.count(-1) > 1:
        raise ValueError("only one entry of a Composite encoding may omit n_dims_to_encode")
    if -1 in counts and any("dims_to_encode_begin" in entry for entry in nested):
        raise ValueError("with dims_to_encode_begin, every entry of a Composite encoding needs n_dims_to_encode")
    configs: list[tuple[Any, int]] = []
    next_input = 0
    for i, entry in enumerate(nested):
        n = counts[i] if counts[i] >= 0 else rest
        begin = _whole(entry, "dims_to_encode_begin", next_input, i)
        if n < 0 or begin + n > n_dims:
            raise ValueError(f"nested encoding {i} reads inputs {begin} ... {begin + n - 1} of {n_dims}")
        next_input = begin + n
        if n > 0:
            configs.append((_make_component(*_nested_options(entry, i), n), begin))
    covered = {d for component, begin in configs for d in range(begin, begin + component.n_dims)}
    if covered != set(range(n_dims)) or not configs:
        raise ValueError(f"the Composite encoding leaves inputs {sorted(set(range(n_dims)) - covered)} unused")
    return enc.compose(configs, first_param)


def parse_network(config: Mapping[str, Any], n_inputs: int, n_outputs: int) -> net.NetworkConfig:
    """Turn a tiny-cuda-nn style dictionary into a `Network`. Raises ValueError."""
    otype, options = _network_options(config)
    return net.NetworkConfig(n_inputs, n_outputs, otype=otype, **options)


def parse_loss(config: Mapping[str, Any]) -> str:
    """The loss, one of `kernels.loss.LOSSES`, that a tiny-cuda-nn style dictionary names. Raises ValueError."""
    otype = one_of(otype_of(config, "RelativeL2"), losses.LOSSES, "loss otype")
    parse_options(config, {}, f"{otype} loss")
    return otype


def parse_optimizer(config: Mapping[str, Any]) -> opt.OptimizerConfig:
    """Turn a tiny-cuda-nn style dictionary, Ema and ExponentialDecay nested in any order, into an `Optimizer`.

    Raises ValueError.
    """
    values: dict[str, Any] = {}
    seen: set[str] = set()
    while True:
        otype = one_of(otype_of(config, "Adam"), tuple(_OPTIMIZERS), "optimizer otype")
        if otype in seen:
            raise ValueError(f"optimizer {otype} is nested in itself")
        seen.add(otype)
        options = _parse_keys(config, _OPTIMIZERS[otype], f"{otype} optimizer")
        if otype in ("Adam", "SGD"):
            return opt.OptimizerConfig(otype="Adam" if otype == "Adam" else "SGD", **options, **values)
        config = options.pop("nested")
        if "decay" in options:
            options["ema_decay"] = options.pop("decay")
        values |= options


def load_config(path: str | Path) -> dict[str, Any]:
    """Read a tiny-cuda-nn or Instant-NGP JSON file: // and /* */ comments, `parent` files merged.

    `parent` names a file, relative to this one, whose blocks hold where this one says nothing (RFC 7396). Where a block
    changes its parent's `otype`, the parent's keys that the new one does not know are dropped. The blocks `encoding`,
    `network`, `loss` and `optimizer` are checked as far as they can be without the numbers of inputs and outputs;
    others are passed on as they are.

    Raises:
        ValueError: The file cannot be read or is not JSON, with line and column, or a key or value is wrong. The
            message names file and field.
    """
    config = _load_with_parents(Path(path), ())
    checks = {
        "encoding": _check_encoding,
        "network": _network_options,
        "loss": parse_loss,
        "optimizer": parse_optimizer,
    }
    for name, check in checks.items():
        if name not in config:
            continue
        try:
            check(config[name])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return config


def one_of(value: Any, allowed: tuple[str, ...], what: str) -> str:
    """The member of `allowed` that equals `value` up to case. Raises ValueError listing them."""
    for name in allowed:
        if isinstance(value, str) and name.lower() == value.lower():
            return name
    raise ValueError(f"unknown {what} {value!r}; allowed: {', '.join(allowed)}")


def otype_of(config: Mapping[str, Any], default: str) -> str:
    """The dictionary's `otype` as written. Raises ValueError if it is no dictionary."""
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a dictionary with 'otype', got {config!r}")
    return str(config.get("otype", default))


def parse_options(
    config: Mapping[str, Any], defaults: dict[str, Any], what: str, only: Mapping[str, tuple[Any, ...]] | None = None
) -> dict[str, Any]:
    """`defaults` overridden by `config`, whose values must be of the defaults' types.

    Keys of `only` may be given with one of their values and are left out. Raises ValueError.
    """
    only = only or {}
    options = dict(defaults)
    for key, value in config.items():
        if key == "otype":
            continue
        if key in only:
            if not any(_same(value, allowed) for allowed in only[key]):
                raise ValueError(f"{key} in {what} is {value!r}; allowed: {', '.join(map(str, only[key]))}")
            continue
        if key not in defaults:
            chosen = "" if "otype" in config else " (the default, as 'otype' is missing)"
            allowed = ", ".join(("otype", *defaults, *only))
            raise ValueError(f"unknown key {key!r} in {what}{chosen}; allowed: {allowed}")
        options[key] = _typed(value, type(defaults[key]), f"{key} in {what}")
    return options


def _typed(value: Any, kind: type, what: str) -> Any:
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) < 1e300 and (kind is float or value == int(value)):  # 1e4 is a whole number too
            return kind(value)
    elif type(value) is kind or (kind is dict and isinstance(value, Mapping)):
        return value
    raise ValueError(f"{what} must be {kind.__name__}, got {value!r}")


def _same(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, str):
        return isinstance(value, str) and value.lower() == allowed.lower()
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def _parse_keys(config: Mapping[str, Any], keys: Keys, what: str) -> dict[str, Any]:
    defaults, only = keys
    return parse_options(config, defaults, what, only)


def _network_options(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name = one_of(otype_of(config, "MLP"), (*_NETWORKS, *_NETWORK_ALIASES), "network otype")
    otype = _NETWORK_ALIASES.get(name, name)
    options = _parse_keys(config, _NETWORKS[otype], f"{name} network")
    for key in ("activation", "output_activation"):
        options[key] = one_of(options[key], ACTIVATIONS, key)
    return otype, options


def _check_encoding(config: Mapping[str, Any]) -> None:
    otype, options = _encoding_options(config, "encoding")
    if otype == "Composite":
        for i, entry in enumerate(options["nested"]):
            _nested_options(entry, i)


def _encoding_options(config: Mapping[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    """The canonical otype of an encoding and the arguments of its dataclass, or the `nested` of a Composite."""
    otype = one_of(otype_of(config, "OneBlob"), tuple(_ENCODINGS), f"otype of {what}")
    if "n_dims_to_encode" in config or "dims_to_encode_begin" in config:
        raise ValueError("n_dims_to_encode and dims_to_encode_begin belong to the nested encodings of a Composite")
    options = _parse_keys(config, _ENCODINGS[otype], f"{otype} encoding")
    if otype in _GRIDS:
        _complete_grid(options, config, _GRIDS[otype])
    if otype == "Composite" and not options["nested"]:
        raise ValueError("a Composite encoding needs at least one entry in 'nested'")
    return otype, options


def _nested_options(entry: Mapping[str, Any], i: int) -> tuple[str, dict[str, Any]]:
    what = f"nested encoding {i}"
    otype_of(entry, "")  # a dictionary at all
    config = {k: v for k, v in entry.items() if k not in ("n_dims_to_encode", "dims_to_encode_begin")}
    otype, options = _encoding_options(config, what)
    if otype == "Composite":
        one_of(otype, tuple(name for name in _ENCODINGS if name != "Composite"), f"otype of {what}")
    return otype, options


def _complete_grid(options: dict[str, Any], config: Mapping[str, Any], default_type: str) -> None:
    """Resolve what depends on other keys: the number of levels, the type, a dense grid's scale."""
    for alias in ("n_features", "n_grid_features"):
        n_features, width = options.pop(alias), options["n_features_per_level"]
        if alias not in config:
            continue
        if "n_levels" in config:
            raise ValueError(f"{alias}, of all levels together, and n_levels contradict each other: give one of them")
        if width < 1 or n_features % width:
            raise ValueError(f"{alias} is {n_features}, no multiple of n_features_per_level, {width}")
        options["n_levels"] = n_features // width
    kind = options["type"] if "type" in config else default_type
    options["type"] = "Tiled" if kind.lower() == "tile" else one_of(kind, grid.GRID_TYPES, "grid type")
    options["interpolation"] = one_of(options["interpolation"], grid.INTERPOLATIONS, "interpolation")
    if options["type"] == "Dense" and "per_level_scale" not in config and options["n_levels"] > 1:
        # The finest level has 256 vertices a side
        ratio = 256.0 / max(1, options["base_resolution"])
        options["per_level_scale"] = math.exp(math.log(ratio) / (options["n_levels"] - 1))


def _make_component(otype: str, options: dict[str, Any], n_dims: int) -> Any:
    make: Any = grid.Grid if otype in _GRIDS else _COMPONENTS[otype]
    return make(n_dims, **options)


def _whole(entry: Mapping[str, Any], key: str, default: int, i: int) -> int:
    otype_of(entry, "")  # a dictionary at all
    value = _typed(entry.get(key, default), int, f"{key} in nested encoding {i}")
    if key in entry and value < 0:
        raise ValueError(f"{key} in nested encoding {i} must not be negative, got {value}")
    return value


def _load_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise ValueError(f"{path}: parent: the file is its own parent")
    config = _read_json(path)
    parent = config.pop("parent", None)
    if parent is None:
        return config
    if not isinstance(parent, str):
        raise ValueError(f"{path}: parent must be the name of a file, got {parent!r}")
    try:
        inherited = _load_with_parents(path.parent / parent, (*children, path.resolve()))
    except ValueError as error:
        raise ValueError(f"{path}: parent: {error}") from error
    return _merge(inherited, config)


def _merge(inherited: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON merge patch (RFC 7396), less the inherited keys that a block's new otype does not know."""
    merged = dict(inherited)
    otype = str(config.get("otype", "")).lower()
    if otype and otype != str(inherited.get("otype", "")).lower():
        known = _known_keys(otype)
        merged = {key: value for key, value in inherited.items() if known is None or key in known}
    for key, value in config.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            before = merged.get(key)
            merged[key] = _merge(before if isinstance(before, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _known_keys(otype: str) -> set[str] | None:
    """Keys of a component of any kind by its name in lower case; None for an unknown one."""
    aliases = {alias.lower(): name.lower() for alias, name in _NETWORK_ALIASES.items()}
    for table in (_ENCODINGS, _NETWORKS, _LOSSES, _OPTIMIZERS):
        for name, (defaults, only) in table.items():
            if name.lower() == aliases.get(otype, otype):
                return {*defaults, *only}
    return None


_COMMENT_OR_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file with comments. Raises ValueError naming the file, and where it is wrong."""

    def blank(match: re.Match[str]) -> str:  # keeps lines and columns
        text = match.group()
        return text if text.startswith('"') else re.sub(r"[^\n]", " ", text)

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        text = path.read_text(encoding="utf-8-sig")
        config = json.loads(_COMMENT_OR_STRING.sub(blank, text), parse_constant=refuse)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    except ValueError as error:  # not text, or no number
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object with 'encoding', 'network', ..., got {type(config).__name__}")
    return config
