"""Settings of fits: defaults of the paper, its comparators, and configuration files over them."""

import numpy as np
import pytest
import warp as wp

from nrc.config import parse_encoding, parse_loss, parse_network, parse_optimizer
from nrc.fit.settings import ENCODINGS, ignored_blocks, make_config

CPU = wp.get_device("cpu")


def config_of(task="image", n_input_dims=2, finest=2048.0, **options):
    return make_config(task, n_input_dims=n_input_dims, finest=finest, device=CPU, **options)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("task", "n_dims"), [("image", 2), ("sdf", 3), ("nerf", 3)])
def test_every_combination_is_a_model(task, n_dims, encoding):
    """Each task with each encoding is understood by the learning core."""
    config = config_of(task, n_dims, encoding=encoding)
    parsed = parse_encoding(config.encoding, n_dims, 0)
    parse_network(config.network, parsed.n_padded, 3)
    parse_loss(config.loss)
    assert parse_optimizer(config.optimizer).otype == "Adam"
    assert (config.rgb_network is not None) == (task == "nerf")


@pytest.mark.parametrize(
    ("encoding", "n_entries"),  # of table 2 of Müller et al. 2022: 33.6 and 16.3 million, networks aside
    [("dense", 128**3 * 16), ("dense-multi", 16.3e6)],
)
def test_dense_grids_have_the_papers_size(encoding, n_entries):
    """In three dimensions the dense comparators have the paper's number of entries, in two about as many."""
    parsed = parse_encoding(config_of("nerf", 3, encoding=encoding).encoding, 3, 0)
    assert parsed.n_params == pytest.approx(n_entries, rel=0.02)
    assert parse_encoding(config_of(encoding=encoding).encoding, 2, 0).n_params == pytest.approx(n_entries, rel=0.05)


def test_finest_level_ends_where_asked():
    """A missing per_level_scale is chosen so that the finest level has the wanted resolution."""
    grid = parse_encoding(config_of(finest=3000.0).encoding, 2, 0).grids[0].config
    assert grid.levels[-1].resolution == pytest.approx(3000, abs=1)
    config = {"encoding": {"otype": "HashGrid", "n_features": 8, "n_features_per_level": 2, "base_resolution": 32}}
    grid = parse_encoding(config_of(finest=256.0, config=config).encoding, 2, 0).grids[0].config
    assert [level.resolution for level in grid.levels] == [32, 64, 128, 256]
    config["encoding"]["per_level_scale"] = 2.0
    assert config_of(finest=1e6, config=config).encoding["per_level_scale"] == 2.0
    assert config_of(finest=4.0).encoding["per_level_scale"] == 1.0  # never coarser than the base


def test_blocks_and_options_override_defaults():
    """A file's blocks replace the task's, options replace both, and what nobody reads is named."""
    config = {"loss": {"otype": "L1"}, "batch_size": 77, "envmap": {}}
    fitted = config_of(config=config, grid={"log2_hashmap_size": 12})
    assert fitted.loss == {"otype": "L1"} and fitted.batch_size == 77
    assert fitted.encoding["log2_hashmap_size"] == 12 and fitted.encoding["n_levels"] == 16
    assert config_of(config=config, batch_size=5).batch_size == 5
    assert ignored_blocks(config) == ["envmap"]
    assert config_of(log2_hashmap_size=22).encoding["log2_hashmap_size"] == 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "fourier"}, "unknown encoding 'fourier'; allowed: hash, none"),
        ({"encoding": "dense", "config": {"encoding": {"otype": "HashGrid"}}}, "contradict each other"),
        ({"encoding": "dense", "grid": {"n_levels": 3}}, "of a hash grid can be set"),
        ({"grid": {"levels": 3}}, "of a hash grid can be set, got levels"),
        ({"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        ({"config": {"batch_size": "many"}}, "batch_size must be a positive whole number, got 'many'"),
        ({"config": {"encoding": {"otype": "HashGrid", "n_levels": "x"}}}, "n_levels in HashGrid encoding must be int"),
        ({"config": {"loss": 3}}, "loss must be a JSON object, got 3"),
    ],
)
def test_contradictions_are_refused(options, message):
    """What does not fit together is one clear line."""
    with pytest.raises(ValueError, match=message):
        config_of(**options)


def test_deep_networks_learn_slower():
    """The 8 x 256 networks of the comparators without tables take a smaller rate."""
    rates = {name: parse_optimizer(config_of(encoding=name).optimizer).learning_rate for name in ENCODINGS}
    assert np.isclose(rates["hash"], 1e-2) and rates["frequency"] <= 1e-3
