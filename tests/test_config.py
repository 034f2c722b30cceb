"""Configuration files and dictionaries: tiny-cuda-nn's and Instant-NGP's read as they are, mistakes are named."""

import json

import pytest

from nrc.config import load_config, parse_encoding, parse_loss, parse_network, parse_optimizer
from nrc.kernels import grid
from nrc.kernels import loss as losses
from nrc.kernels import optimizer as opt
from nrc.kernels.activation import ACTIVATIONS
from nrc.kernels.network import NetworkConfig

# A file as Instant-NGP writes them, with all it may contain
BASE = """{
    "loss": { "otype": "Huber" },  // not "L2"
    /* averaged
       weights */
    "optimizer": {
        "otype": "Ema",
        "decay": 0.95,
        "nested": {
            "otype": "ExponentialDecay",
            "decay_start": 20000,
            "decay_interval": 1e4,
            "decay_base": 0.33,
            "nested": { "otype": "Adam", "learning_rate": 1e-2, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 1e-6 }
        }
    },
    "encoding": { "otype": "HashGrid", "n_levels": 8, "n_features_per_level": 4, "base_resolution": 16 },
    "network": { "otype": "FullyFusedMLP", "n_neurons": 64, "n_hidden_layers": 1 },
    "dir_encoding": { "otype": "Composite", "nested": [ { "n_dims_to_encode": 3, "otype": "SphericalHarmonics" } ] },
    "envmap": { "loss": { "otype": "RelativeL2" }, "url": "http://a/*b*/c", "beta_shampoo": 0.0 }
}"""


def write(folder, **files):
    """Write texts or dictionaries as JSON files and return the first one's path."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.json"


def test_file_loads_with_comments_and_foreign_blocks(tmp_path):
    """Comments go, strings that look like them stay, blocks of other programs are passed on."""
    config = load_config(write(tmp_path, base=BASE))
    assert set(config) == {"loss", "optimizer", "encoding", "network", "dir_encoding", "envmap"}
    assert config["envmap"]["url"] == "http://a/*b*/c"
    assert parse_loss(config["loss"]) == "Huber"
    optimizer = parse_optimizer(config["optimizer"])
    assert (optimizer.ema_decay, optimizer.decay_base, optimizer.decay_interval) == (0.95, 0.33, 10000)
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (1e-2, 0.9, 0.99)
    encoding = parse_encoding(config["encoding"], 3, 0)
    assert encoding.parts[0].config == grid.Grid(3, 8, 4)
    assert parse_network(config["network"], encoding.n_padded, 16) == NetworkConfig(32, 16, 64, 1)


def test_tiny_cuda_nn_sample_loads(tmp_path):
    """The configuration that tiny-cuda-nn's README begins with, and its total of parameters."""
    sample = {
        "loss": {"otype": "RelativeL2"},
        "optimizer": {"otype": "Adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15},
        "encoding": {
            "otype": "HashGrid",
            "n_levels": 16,
            "n_features_per_level": 2,
            "log2_hashmap_size": 15,
            "base_resolution": 16,
            "per_level_scale": 1.5,
            "fixed_point_pos": False,
        },
        "network": {"otype": "FullyFusedMLP", "activation": "ReLU", "n_neurons": 64, "n_hidden_layers": 2},
    }
    config = load_config(write(tmp_path, config_hash=sample))
    assert config == sample
    encoding = parse_encoding(config["encoding"], 2, 0)
    # (16^2 + 24^2 + 36^2 + 54^2 + 81^2 + 122^2 rounded up to 8, and ten tables) times 2 features
    assert encoding.n_params == 2 * (256 + 576 + 1296 + 2920 + 6568 + 14888 + 10 * 32768)
    assert parse_network(config["network"], encoding.n_padded, 3).n_params == 32 * 64 + 64 * 64 + 64 * 3


def test_parent_files_are_merged(tmp_path):
    """A child overrides single keys at any depth; null removes one; a parent may have a parent elsewhere."""
    (tmp_path / "old").mkdir()
    write(tmp_path / "old", base=BASE)
    child = {
        "parent": "middle.json",
        "encoding": {"n_levels": 4},
        "optimizer": {"nested": {"nested": {"learning_rate": 3e-4}}},
        "envmap": None,
    }
    path = write(tmp_path, child=child, middle={"parent": "old/base.json", "encoding": {"log2_hashmap_size": 14}})
    config = load_config(path)
    assert config["encoding"] == {
        "otype": "HashGrid",
        "n_levels": 4,
        "n_features_per_level": 4,
        "base_resolution": 16,
        "log2_hashmap_size": 14,
    }
    assert parse_optimizer(config["optimizer"]).learning_rate == 3e-4
    assert parse_optimizer(config["optimizer"]).beta2 == 0.99
    assert "envmap" not in config and "parent" not in config and "dir_encoding" in config


def test_child_changes_otype_of_parents_block(tmp_path):
    """Keys that a new otype does not know are not inherited; those it knows are."""
    child = {
        "parent": "base.json",
        "encoding": {"otype": "Frequency", "n_frequencies": 10},
        "network": {"otype": "CutlassMLP", "n_neurons": 256},
        "optimizer": {"otype": "SGD"},
        "dir_encoding": {"otype": "OneBlob"},
    }
    config = load_config(write(tmp_path, child=child, base=BASE))
    assert config["encoding"] == {"otype": "Frequency", "n_frequencies": 10}
    assert config["network"] == {"otype": "CutlassMLP", "n_neurons": 256, "n_hidden_layers": 1}
    assert config["optimizer"] == {"otype": "SGD"} and config["dir_encoding"] == {"otype": "OneBlob"}
    dense = {"parent": "base.json", "encoding": {"otype": "DenseGrid", "per_level_scale": 1.4}}
    config = load_config(write(tmp_path, dense=dense))
    assert parse_encoding(config["encoding"], 3, 0).parts[0].config == grid.Grid(
        3, 8, 4, per_level_scale=1.4, type="Dense"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"encoding": {"otype": "HashGrid", "n_level": 3}}', r"child.json: encoding: unknown key 'n_level'.*n_levels"),
        ('{"encoding": {"otype": "Composite", "nested": [{"otype": "X"}]}}', r"encoding: unknown otype of nested enc"),
        ('{"encoding": 3}', r"child.json: encoding: expected a dictionary"),
        ('{"network": {"otype": "MLP", "activation": "Step"}}', r"child.json: network: unknown activation 'Step'"),
        ('{"network": {"otype": "Resnet"}}', r"network: unknown network otype 'Resnet'; allowed: FullyFusedMLP, MLP"),
        ('{"network": {"n_neurons": 64.5}}', r"network: n_neurons in MLP network must be int, got 64.5"),
        ('{"network": {"n_neurons": true}}', r"network: n_neurons in MLP network must be int, got True"),
        ('{"loss": {"otype": "Variance"}}', r"child.json: loss: unknown loss otype 'Variance'; allowed: L1, L2"),
        ('{"loss": {"otype": "L2", "delta": 1}}', r"child.json: loss: unknown key 'delta'"),
        ('{"optimizer": {"otype": "Shampoo"}}', r"optimizer: unknown optimizer otype 'Shampoo'; allowed: Adam, "),
        ('{"optimizer": {"adabound": true}}', r"optimizer: adabound in Adam optimizer is True; allowed: False"),
        ('{"optimizer": {"otype": "Ema", "nested": {"otype": "EMA"}}}', r"optimizer: .*nested in itself"),
        ('{"optimizer": {"otype": "Ema", "nested": []}}', r"nested in Ema optimizer must be dict"),
        ('{\n "loss": {,}\n}', r"child.json: line 2, column 11"),
        ('{/* two\nlines */ "loss": x}', r"child.json: line 2, column 18"),
        ('{"a": 1, }', r"child.json: line 1"),
        ('{"a": "// open', r"child.json: line 1"),
        ('{"a": NaN}', r"child.json: NaN is not a JSON number"),
        ("[" * 100000, r"child.json: nested too deeply"),
        ("[1]", r"child.json: expected an object"),
        ("", r"child.json: line 1, column 1"),
        ('{"parent": "none.json"}', r"child.json: parent: .*none.json: cannot be read \(No such file"),
        ('{"parent": "child.json"}', r"child.json: parent: .*its own parent"),
        ('{"parent": 3}', r"parent must be the name of a file"),
    ],
)
def test_wrong_file_is_named(tmp_path, text, message):
    """File and field, or line and column, and what is allowed."""
    with pytest.raises(ValueError, match=message) as error:
        load_config(write(tmp_path, child=text))
    assert "\n" not in str(error.value)


def test_file_that_is_no_text_is_named(tmp_path):
    """Bytes that are not UTF-8, and a folder."""
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff"}')
    for path in (tmp_path / "bytes.json", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            load_config(path)


def test_names_are_compared_without_case():
    """otypes and values of other case mean the same, as in tiny-cuda-nn."""
    one = parse_encoding({"otype": "hashGRID", "interpolation": "SMOOTHSTEP", "hash": "coherentprime"}, 2, 0)
    assert one == parse_encoding({"otype": "Grid", "type": "hash", "interpolation": "Smoothstep"}, 2, 0)
    assert parse_network({"otype": "fullyfusedmlp", "activation": "silu"}, 16, 1).activation == "SiLU"
    assert parse_loss({"otype": "Mape"}) == "MAPE" and parse_loss({"otype": "Smape"}) == "SMAPE"
    assert parse_optimizer({"otype": "EMA", "nested": {"otype": "adam"}}).ema_decay == 0.99


def test_missing_keys_take_tiny_cuda_nns_defaults():
    """An empty dictionary is tiny-cuda-nn's default component."""
    assert parse_encoding({}, 2, 0) == parse_encoding({"otype": "OneBlob", "n_bins": 16}, 2, 0)
    assert parse_encoding({"otype": "HashGrid"}, 3, 0).parts[0].config == grid.Grid(3, 16, 2, 19, 16, 2.0)
    assert parse_network({}, 32, 3) == NetworkConfig(32, 3, 128, 5, "ReLU", "None", "MLP")
    assert parse_loss({}) == "RelativeL2"
    assert parse_optimizer({}) == opt.OptimizerConfig(1e-3, 0.9, 0.999, 1e-8, 1e-8)
    decayed = parse_optimizer({"otype": "ExponentialDecay"})
    assert (decayed.decay_base, decayed.decay_start, decayed.decay_interval) == (0.1, 10000, 10000)


def test_optimizers_nest_in_any_order():
    """Ema and ExponentialDecay around Adam or SGD commute; keys with one meaning are accepted at that value."""
    adam = {"otype": "Adam", "learning_rate": 1e-2, "adabound": False, "relative_decay": 0}
    schedule = {"otype": "ExponentialDecay", "decay_base": 0.5, "decay_start": 3, "decay_interval": 2, "decay_end": 9}
    for inner in (adam, {"otype": "SGD", "learning_rate": 0.1, "l2_reg": 0}):
        one = parse_optimizer({"otype": "Ema", "decay": 0.9, "nested": schedule | {"nested": inner}})
        two = parse_optimizer(schedule | {"nested": {"otype": "Ema", "decay": 0.9, "nested": inner}})
        assert one == two and one.otype == inner["otype"]
        assert (one.ema_decay, one.decay_base, one.decay_start, one.decay_end) == (0.9, 0.5, 3, 9)
    assert parse_optimizer({"otype": "SGD", "learning_rate": 0.1, "l2_reg": 0}).l2_reg == 0.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_have_all_activations(activation):
    """Both networks take every activation, hidden and at the output, and their own widths."""
    fused = parse_network({"otype": "FullyFusedMLP", "output_activation": activation, "n_neurons": 32}, 16, 3)
    assert fused == NetworkConfig(16, 3, 32, 5, "ReLU", activation, "FullyFusedMLP")
    plain = parse_network({"otype": "CutlassMLP", "activation": activation, "n_neurons": 1024}, 16, 3)
    assert plain == NetworkConfig(16, 3, 1024, 5, activation, "None", "MLP")
    for otype, n_neurons in (("FullyFusedMLP", 48), ("MLP", 40), ("MLP", 2048)):
        with pytest.raises(ValueError, match="n_neurons must be"):
            parse_network({"otype": otype, "n_neurons": n_neurons}, 16, 3)


@pytest.mark.parametrize("otype", losses.LOSSES)
def test_losses_have_no_options(otype):
    """Every loss is named by its otype alone."""
    assert parse_loss({"otype": otype.upper()}) == otype
    with pytest.raises(ValueError, match="unknown key 'scale'"):
        parse_loss({"otype": otype, "scale": 2.0})
