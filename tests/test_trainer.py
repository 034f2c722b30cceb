"""`Trainer`: batches, averages, schedule, skipped and empty steps, determinism, and that it learns."""

import numpy as np
import pytest
import warp as wp
from reference_optimizer import Twin

import nrc.launch
from nrc.field import Field
from nrc.kernels import optimizer as opt
from nrc.optimizer import Optimizer
from nrc.trainer import Trainer

ADAM = {"otype": "Adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 1e-6}
EMA = {"otype": "Ema", "decay": 0.9, "nested": ADAM}
L2 = {"otype": "L2"}
GRID = {
    "otype": "HashGrid",
    "n_dims_to_encode": 3,
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 8,
    "base_resolution": 4,
    "per_level_scale": 1.6,
}
ENCODING = {
    "otype": "Composite",
    "nested": [
        GRID,
        {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 1},
        GRID | {"n_dims_to_encode": 2, "n_features_per_level": 4},
        {"otype": "Identity"},
    ],
}
NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 2}


def make_field(n_outputs=3):
    """A CPU field with two grids whose entries are large enough to matter."""
    field = Field(8, n_outputs, ENCODING, NETWORK, seed=3, device="cpu")
    params = field.params.numpy().copy()
    params[field.network.n_params :] *= 5000.0
    field.set_params(params)
    return field


def array(values, dtype=float):
    return wp.array(values, dtype=dtype, device="cpu")


def batch(rng, n):
    """Random inputs and a smooth target."""
    x = rng.random((n, 8), dtype=np.float32)
    y = np.stack([np.sin(5 * x[:, 0]), x[:, 1] * x[:, 2], 0.5 + x[:, 3]], axis=1)
    return array(x), array(y.astype(np.float32))


def snapshot(trainer):
    """Everything that outlives a step, by name."""
    state = {name: values.numpy().copy() for name, values in trainer.optimizer.state_arrays().items()}
    state["counters"] = state["counters"][[opt.N_STEPS, opt.N_SKIPPED]]
    return state | {"ema_params": trainer.ema_params.numpy().copy()}


def assert_same(a, b, but=()):
    """Bit for bit the same states, apart from the names in `but`."""
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_average_follows_every_step():
    """The lazily updated average equals the debiased recursion over the weights after each step."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=40)
    np.testing.assert_array_equal(trainer.ema_params.numpy(), trainer.field.params.numpy())
    dense, rng = 0.0, np.random.default_rng(2)
    for t in range(1, 13):
        x, y = batch(rng, 40)
        x.assign(x.numpy() * 0.5)  # leaves part of the table untouched
        trainer.step(x, y)
        dense = (0.1 * trainer.field.params.numpy().astype(np.float64) + 0.9 * (1 - 0.9 ** (t - 1)) * dense) / (
            1 - 0.9**t
        )
        np.testing.assert_allclose(trainer.ema_params.numpy(), dense, atol=2e-6)
    assert trainer.n_steps.numpy()[0] == 12


def test_average_is_params_without_ema():
    """Without an Ema in the optimizer the average is the primary parameter array itself."""
    trainer = Trainer(make_field(), L2, ADAM, batch_size=40)
    assert trainer.ema_params is trainer.field.params


def test_step_uses_only_counted_rows():
    """A device-side count gives the same step as a batch of just those rows."""
    results = []
    for truncated in (False, True):
        rng = np.random.default_rng(4)
        trainer = Trainer(make_field(), L2, EMA, batch_size=200)
        x, y = batch(rng, 200)
        loss = trainer.step(x[:77], y[:77]) if truncated else trainer.step(x, y, count=array([77], int))
        results.append(snapshot(trainer) | {"loss": loss.numpy()})
    assert_same(*results)


def test_empty_step_changes_nothing():
    """Without rows neither weights, moments, average, step count nor learning rate move."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=100)
    x, y = batch(np.random.default_rng(5), 100)
    trainer.step(x, y)
    before = snapshot(trainer)
    trainer.step(x, y, count=array([0], int))
    trainer.step(x[:0], y[:0])
    assert_same(before, snapshot(trainer))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e36])
def test_nonfinite_gradient_skips_step(poison):
    """One non-finite target leaves everything as it was and is counted; the next step goes on."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=100)
    x, y = batch(np.random.default_rng(6), 100)
    trainer.step(x, y)
    before = snapshot(trainer)
    bad = y.numpy().copy()
    bad[70, 1] = poison
    trainer.step(x, array(bad))
    assert trainer.skipped_steps.numpy()[0] == 1
    assert_same(before, snapshot(trainer), but=["counters"])
    assert trainer.n_steps.numpy()[0] == 1
    assert np.isfinite(trainer.step(x, y).numpy()[0])
    assert trainer.n_steps.numpy()[0] == 2 and trainer.skipped_steps.numpy()[0] == 1


def test_batches_of_any_size_without_history():
    """Without a batch size memory grows with the batches, and what came before leaves no trace in a step."""
    rng = np.random.default_rng(7)
    x, y = batch(rng, 3000)
    fresh, used, bounded = (Trainer(make_field(), L2, EMA, batch_size=n) for n in (None, None, 5000))
    used.step(x, y, count=array([0], int))  # reserves, changes nothing
    for n in (10, 100, 1000, 300):
        losses = [trainer.step(x[:n], y[:n]).numpy()[0] for trainer in (fresh, used, bounded)]
        assert losses[0] == losses[1] == losses[2] > 0.0
    assert_same(snapshot(fresh), snapshot(used))
    assert_same(snapshot(fresh), snapshot(bounded))


def test_numpy_batches_are_the_same():
    """NumPy arrays give the step that Warp arrays give."""
    results = []
    for convert in (lambda a: a, lambda a: a.numpy()):
        trainer = Trainer(make_field(), L2, ADAM)
        trainer.step(*map(convert, batch(np.random.default_rng(8), 200)))
        results.append(snapshot(trainer))
    assert_same(*results)


def test_density_divides_rows():
    """A row drawn with density 1 / 2 counts as two rows of density 1 would, in loss and step."""
    x, y = batch(np.random.default_rng(9), 50)
    twice = [array(np.concatenate([a.numpy(), a.numpy()[:20]])) for a in (x, y)]
    pdf = np.ones(50, np.float32)
    pdf[:20] = 0.5
    weighted, doubled = (Trainer(make_field(), L2, ADAM | {"epsilon": 0.1}) for _ in range(2))
    loss = weighted.step(x, y, pdf=array(pdf)).numpy()[0]
    # Means over 50 and 70 rows
    assert doubled.step(*twice).numpy()[0] * 70 / 50 == pytest.approx(loss, rel=1e-5)
    first, second = (t.optimizer.state_arrays()["moments"].numpy()[:, :8] for t in (weighted, doubled))
    np.testing.assert_allclose(first, second * 70 / 50, atol=1e-7)


def test_own_loss_takes_the_same_step():
    """A caller with the loss's gradient alone, repeats the trainer's steps."""
    trainer, own = Trainer(make_field(), L2, EMA), make_field()
    optimizer = Optimizer(own, EMA)
    rng = np.random.default_rng(10)
    for _ in range(3):
        x, y = batch(rng, 120)
        trainer.step(x, y)
        dL_dy = array(2.0 * (own.forward(x).numpy() - y.numpy()) / y.size)
        optimizer.step(x, dL_dy)
    assert optimizer.n_steps.numpy()[0] == 3
    for name, values in optimizer.state_arrays().items():
        if name in ("params", "moments"):
            difference = np.abs(values.numpy() - trainer.optimizer.state_arrays()[name].numpy())
            assert np.percentile(difference, 98) < 1e-5


def test_weights_match_twin_behind_fixed_encodings():
    """Without tables, thirty steps of the network's weights equal Adam's of the field's own gradients."""
    config = EMA | {"nested": ADAM | {"l2_reg": 1e-2}}
    field = Field(8, 3, {"otype": "Identity"}, NETWORK, seed=3, device="cpu")
    trainer, twin = Trainer(field, L2, config), Twin(field.params.numpy(), field.n_params, config)
    rng = np.random.default_rng(11)
    for _ in range(30):
        x, y = batch(rng, 64)
        gradient = wp.zeros(field.n_params, dtype=float, device="cpu")
        field.backward(x, array(2.0 * (field.forward(x).numpy() - y.numpy()) / y.size), dL_dparams=gradient)
        twin.step(gradient.numpy().astype(np.float64))
        trainer.step(x, y)
    assert np.percentile(np.abs(trainer.field.params.numpy() - twin.w), 98) < 1e-4
    assert np.percentile(np.abs(trainer.ema_params.numpy() - twin.average), 98) < 1e-4


def test_threads_do_not_change_bits():
    """One and two CPU threads give identical weights, averages and losses."""
    results = []
    for n_threads in (1, 2):
        nrc.launch.set_threads(n_threads)
        try:
            rng = np.random.default_rng(12)
            trainer = Trainer(make_field(), {"otype": "RelativeL2Luminance"}, EMA, batch_size=1000)
            losses = [trainer.step(*batch(rng, 1000)).numpy()[0] for _ in range(10)]
            results.append(snapshot(trainer) | {"losses": np.array(losses)})
        finally:
            nrc.launch.set_threads(0)
    assert_same(*results)


def test_training_lowers_loss():
    """300 steps on a smooth function reduce the L2 loss a hundredfold."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=256)
    rng = np.random.default_rng(13)
    first = trainer.step(*batch(rng, 256)).numpy()[0]
    for _ in range(300):
        last = trainer.step(*batch(rng, 256)).numpy()[0]
    assert last < 0.01 * first


def test_small_updates_survive():
    """An update a thousand times smaller than an fp16 ulp of the weight reaches the fp32 weight."""
    trainer = Trainer(make_field(), L2, ADAM | {"learning_rate": 1e-7, "l2_reg": 0.0}, batch_size=64)
    before = trainer.field.params.numpy().copy()
    trainer.step(*batch(np.random.default_rng(14), 64))
    moved = np.abs(trainer.field.params.numpy() - before)[: trainer.field.network.n_params]
    assert (moved > 0).mean() > 0.5 and moved.max() < 3e-7


def test_learning_rate_schedule():
    """ExponentialDecay multiplies the rate by its base at start, start + interval, ... up to its end."""
    decay = {"otype": "ExponentialDecay", "decay_base": 0.5, "decay_start": 3, "decay_interval": 2, "decay_end": 8}
    trainer = Trainer(make_field(), L2, decay | {"nested": ADAM}, batch_size=64)
    rates = []
    for _ in range(12):
        trainer.step(*batch(np.random.default_rng(15), 64))
        rates.append(trainer.optimizer.learning_rate.numpy()[0])
    expected = [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125, 0.125]
    np.testing.assert_allclose(rates, 1e-2 * np.array(expected), rtol=1e-6)


def test_reset_repeats_training():
    """After both resets the same batches give the same weights, bit for bit."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=128)
    start = trainer.field.params.numpy().copy()
    results = []
    for _ in range(2):
        trainer.field.set_params(start)
        trainer.optimizer.reset()
        rng = np.random.default_rng(16)
        for _ in range(5):
            trainer.step(*batch(rng, 128))
        results.append(snapshot(trainer))
    assert_same(*results)


@pytest.mark.parametrize("otype", ["Adam", "SGD"])
def test_state_arrays_continue_training(otype):
    """A second trainer that is given the first one's state arrays takes the same next steps, bit for bit."""
    config = EMA | {"nested": {"otype": otype, "learning_rate": 1e-2}}
    first, second = (Trainer(make_field(), L2, config, batch_size=128) for _ in range(2))
    rng = np.random.default_rng(17)
    for _ in range(3):
        first.step(*batch(rng, 128))
    for name, values in first.optimizer.state_arrays().items():
        second.optimizer.state_arrays()[name].assign(values.numpy())
    x, y = batch(rng, 128)
    for trainer in (first, second):
        trainer.step(x, y)
    assert_same(snapshot(first), snapshot(second))


@pytest.mark.parametrize(
    "loss, optimizer, message",
    [
        ({"otype": "L3"}, ADAM, "RelativeL2Luminance"),
        (L2, {"otype": "Lion"}, "Adam, Ema, ExponentialDecay, SGD"),
        (L2, ADAM | {"lr": 1.0}, "learning_rate"),
        (L2, {"otype": "SGD", "beta1": 0.9}, "beta1"),
        (L2, {"otype": "Ema", "nested": EMA}, "nested in itself"),
        (L2, ADAM | {"beta2": 1.0}, "beta2"),
        (L2 | {"delta": 1.0}, ADAM, "unknown key 'delta'"),
    ],
)
def test_trainer_errors_name_what_is_allowed(loss, optimizer, message):
    """An unknown loss, optimizer, key or value is refused with what is allowed."""
    with pytest.raises(ValueError, match=message):
        Trainer(make_field(), loss, optimizer, batch_size=64)


def test_trainer_refuses_losses_that_do_not_fit():
    """The luminance of two outputs is not defined."""
    with pytest.raises(ValueError, match="3"):
        Trainer(make_field(n_outputs=2), {"otype": "RelativeL2Luminance"}, ADAM)


def test_trainer_refuses_wrong_batches():
    """Batches that are too large, too short or of the wrong width are refused, densities and counts likewise."""
    trainer = Trainer(make_field(), L2, ADAM, batch_size=64)
    x, y = batch(np.random.default_rng(18), 65)
    for bad in ((x, y), (x[:64], y[:63]), (y[:64], y[:64])):
        with pytest.raises(ValueError):
            trainer.step(*bad)
    with pytest.raises(ValueError, match="pdf"):
        trainer.step(x[:64], y[:64], pdf=array(np.ones(65)))
    with pytest.raises(ValueError, match="count"):
        trainer.step(x[:64], y[:64], count=array([1.0]))
    with pytest.raises(ValueError, match="batch_size"):
        Trainer(make_field(), L2, ADAM, batch_size=0)
