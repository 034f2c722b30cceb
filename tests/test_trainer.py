"""`Trainer`: Adam, moving average, schedule, skipped and empty steps, determinism, and that it learns."""

import numpy as np
import pytest
import reference_learning as reference
import warp as wp
from test_network import make_field, wide  # noqa: F401

import nrc.field
import nrc.launch
from nrc.kernels import optimizer as opt
from nrc.trainer import Trainer, parse_optimizer

ADAM = {"otype": "Adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 1e-6}
EMA = {"otype": "Ema", "decay": 0.9, "nested": ADAM}
L2 = {"otype": "L2"}


def array(values, dtype=float):
    return wp.array(values, dtype=dtype, device="cpu")


def batch(rng, n, n_inputs=8):
    """Random inputs and a smooth target."""
    x = rng.random((n, n_inputs), dtype=np.float32)
    y = np.stack([np.sin(5 * x[:, 0]), x[:, 1] * x[:, 2], 0.5 + x[:, 3]], axis=1)
    return array(x), array(y.astype(np.float32))


def snapshot(trainer):
    """Everything a step may change."""
    blocks = trainer._adam.blocks.numpy()
    arrays = (trainer.ema_params, trainer._state, trainer.learning_rate)
    fields = [blocks[name].copy() for name in ("m", "v", "steps", "ema")]
    return [trainer.params.numpy().copy(), *fields, *(a.numpy().copy() for a in arrays)]


def test_adam_matches_twin():
    """Sparse random gradients through 30 updates: zero ones leave table entries alone, each keeps its own count."""
    field = make_field()
    trainer = Trainer(field, L2, EMA, batch_size=64)
    twin = reference.Adam(field.params.numpy(), field.encoding_offset, 1e-2, 0.9, 0.99, 1e-15, 1e-6)
    average = reference.DebiasedEma(0.9)
    rng = np.random.default_rng(1)
    for step in range(1, 31):
        gradient = rng.normal(size=field.n_params).astype(np.float32)
        gradient[rng.random(field.n_params) < (0.97 if step % 3 else 0.2)] = 0.0
        trainer._dL_dparams.assign(gradient)
        trainer._state.assign([1, 64, step, 0])
        n_blocks = field.n_params // opt.UPDATE_BLOCK
        inputs = [trainer._state, trainer._adam, trainer._dL_dparams]
        nrc.launch.launch(opt.update_params, n_blocks, inputs=inputs, device=field.device)
        twin.step(np.float64(gradient))
        average.step(twin.w)
        assert not trainer._dL_dparams.numpy().any()
    blocks = trainer._adam.blocks.numpy()
    np.testing.assert_array_equal(blocks["steps"].ravel(), twin.n)
    np.testing.assert_allclose(blocks["m"].ravel(), twin.m, atol=1e-6)
    np.testing.assert_allclose(blocks["v"].ravel(), twin.v, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(field.params.numpy(), twin.w, atol=1e-5)
    np.testing.assert_allclose(trainer.ema_params.numpy(), average.average, atol=1e-5)


def test_ema_follows_every_step(wide):  # noqa: F811
    """The lazily updated average equals the debiased recursion over the weights after each step."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=40)
    np.testing.assert_array_equal(trainer.ema_params.numpy(), trainer.params.numpy())
    average, rng = reference.DebiasedEma(0.9), np.random.default_rng(2)
    for _ in range(12):
        x, y = batch(rng, 40)
        x.assign(x.numpy() * 0.5)  # leaves part of the table untouched
        trainer.step(x, y)
        average.step(trainer.params.numpy().astype(np.float64))
        np.testing.assert_allclose(trainer.ema_params.numpy(), average.average, atol=2e-6)
    assert trainer.n_steps.numpy()[0] == 12


def test_ema_is_params_without_config():
    """Without an Ema in the optimizer the average is the primary parameter array itself."""
    trainer = Trainer(make_field(), L2, ADAM, batch_size=40)
    assert trainer.ema_params is trainer.params is trainer.field.params


def test_wide_matches_plain(monkeypatch):
    """The CPU's block kernels take the same steps as the one-thread-per-sample kernels."""
    results = []
    for wide_kernels in (True, False):
        monkeypatch.setattr(nrc.field, "wide", lambda device, w=wide_kernels: w)
        rng = np.random.default_rng(3)
        trainer = Trainer(make_field(), {"otype": "RelativeL2Luminance"}, EMA, batch_size=300)
        losses = [trainer.step(*batch(rng, 300)).numpy()[0] for _ in range(3)]
        results.append((snapshot(trainer), losses))
    (wide_state, wide_losses), (plain_state, plain_losses) = results
    np.testing.assert_allclose(wide_losses, plain_losses, rtol=1e-4)
    for a, b in zip(wide_state[1:3], plain_state[1:3], strict=True):  # moments are continuous in the gradient
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)
    assert (wide_state[3] != plain_state[3]).mean() < 1e-3
    # Adam's first steps are signs of gradients: entries whose gradient is all rounding may go either way
    for a, b in zip(wide_state[4:6], plain_state[4:6], strict=True):
        assert np.percentile(np.abs(a - b), 99) < 1e-4


def test_step_uses_only_counted_rows(wide):  # noqa: F811
    """A device-side count gives the same step as a batch of just those rows."""
    results = []
    for truncated in (False, True):
        rng = np.random.default_rng(4)
        trainer = Trainer(make_field(), L2, EMA, batch_size=200)
        x, y = batch(rng, 200)
        loss = trainer.step(x[:77], y[:77]) if truncated else trainer.step(x, y, count=array([77], int))
        results.append([*snapshot(trainer), loss.numpy()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_empty_step_changes_nothing(wide):  # noqa: F811
    """Without rows neither weights, moments, average, step count nor learning rate move."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=100)
    x, y = batch(np.random.default_rng(5), 100)
    trainer.step(x, y)
    before = snapshot(trainer)
    before[6][:2] = 0  # go and the row count of the last step
    trainer.step(x, y, count=array([0], int))
    trainer.step(x[:0], y[:0])
    for a, b in zip(before, snapshot(trainer), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e36])
def test_nonfinite_gradient_skips_step(wide, poison):  # noqa: F811
    """One non-finite target leaves everything as it was and is counted; the next step goes on."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=100)
    x, y = batch(np.random.default_rng(6), 100)
    trainer.step(x, y)
    before = snapshot(trainer)
    bad = y.numpy().copy()
    bad[70, 1] = poison
    trainer.step(x, array(bad))
    assert trainer.skipped_steps.numpy()[0] == 1
    after = snapshot(trainer)
    for i in (0, 1, 2, 3, 4, 5, 7):
        np.testing.assert_array_equal(before[i], after[i])
    assert trainer.n_steps.numpy()[0] == 1
    assert np.isfinite(trainer.step(x, y).numpy()[0])
    assert trainer.n_steps.numpy()[0] == 2 and trainer.skipped_steps.numpy()[0] == 1


def test_threads_do_not_change_bits():
    """One and two CPU threads give identical weights, averages and losses."""
    results = []
    for n_threads in (1, 2):
        nrc.launch.set_threads(n_threads)
        try:
            rng = np.random.default_rng(7)
            trainer = Trainer(make_field(), {"otype": "RelativeL2Luminance"}, EMA, batch_size=1000)
            losses = [trainer.step(*batch(rng, 1000)).numpy()[0] for _ in range(10)]
            results.append([*snapshot(trainer), np.array(losses)])
        finally:
            nrc.launch.set_threads(0)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_lowers_loss(wide):  # noqa: F811
    """300 steps on a smooth function reduce the L2 loss a hundredfold."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=256)
    rng = np.random.default_rng(8)
    first = trainer.step(*batch(rng, 256)).numpy()[0]
    for _ in range(300):
        last = trainer.step(*batch(rng, 256)).numpy()[0]
    assert last < 0.01 * first


def test_small_updates_survive():
    """An update a thousand times smaller than an fp16 ulp of the weight reaches the fp32 weight."""
    trainer = Trainer(make_field(), L2, ADAM | {"learning_rate": 1e-7, "l2_reg": 0.0}, batch_size=64)
    before = trainer.params.numpy().copy()
    trainer.step(*batch(np.random.default_rng(9), 64))
    moved = np.abs(trainer.params.numpy() - before)[: trainer.field.encoding_offset]
    assert (moved > 0).mean() > 0.5 and moved.max() < 3e-7


def test_learning_rate_schedule():
    """ExponentialDecay multiplies the rate by its base at start, start + interval, ... up to its end."""
    decay = {"otype": "ExponentialDecay", "decay_base": 0.5, "decay_start": 3, "decay_interval": 2, "decay_end": 8}
    trainer = Trainer(make_field(), L2, decay | {"nested": ADAM}, batch_size=64)
    rates = []
    for _ in range(12):
        trainer.step(*batch(np.random.default_rng(10), 64))
        rates.append(trainer.learning_rate.numpy()[0])
    expected = [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125, 0.125]
    np.testing.assert_allclose(rates, 1e-2 * np.array(expected), rtol=1e-6)


def test_reset_repeats_training():
    """After both resets the same batches give the same weights, bit for bit."""
    trainer = Trainer(make_field(), L2, EMA, batch_size=128)
    start = trainer.params.numpy().copy()
    results = []
    for _ in range(2):
        trainer.field.set_params(start)
        trainer.reset()
        rng = np.random.default_rng(11)
        for _ in range(5):
            trainer.step(*batch(rng, 128))
        results.append(snapshot(trainer))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_optimizer_defaults_are_tiny_cuda_nn():
    """Missing keys take tiny-cuda-nn's defaults, nested wrappers in either order."""
    assert parse_optimizer({"otype": "Adam"}) == opt.Optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-8)
    one = parse_optimizer({"otype": "Ema", "nested": {"otype": "ExponentialDecay", "nested": ADAM}})
    two = parse_optimizer({"otype": "ExponentialDecay", "nested": {"otype": "EMA", "nested": ADAM}})
    assert one == two
    assert (one.ema_decay, one.decay_base, one.decay_start, one.learning_rate) == (0.99, 0.1, 10000, 1e-2)


@pytest.mark.parametrize(
    "loss, optimizer, message",
    [
        ({"otype": "L3"}, ADAM, "L2, RelativeL2Luminance"),
        (L2, {"otype": "Lion"}, "Adam, Ema, ExponentialDecay"),
        (L2, ADAM | {"lr": 1.0}, "learning_rate"),
        (L2, {"otype": "Ema", "nested": EMA}, "nested in itself"),
        (L2, ADAM | {"beta2": 1.0}, "beta2"),
        (L2 | {"delta": 1.0}, ADAM, "unknown key 'delta'"),
    ],
)
def test_trainer_errors_name_what_is_allowed(loss, optimizer, message):
    """An unknown loss, optimizer, key or value is refused with what is allowed."""
    with pytest.raises(ValueError, match=message):
        Trainer(make_field(), loss, optimizer, batch_size=64)


def test_trainer_refuses_wrong_batches():
    """Batches that are too large, too short or of the wrong width are refused."""
    trainer = Trainer(make_field(), L2, ADAM, batch_size=64)
    x, y = batch(np.random.default_rng(12), 65)
    for bad in ((x, y), (x[:64], y[:63]), (y[:64], y[:64])):
        with pytest.raises(ValueError):
            trainer.step(*bad)


def test_state_arrays_continue_training():
    """A second trainer that is given the first one's state arrays takes the same next steps, bit for bit."""
    first, second = (Trainer(make_field(), L2, EMA, batch_size=128) for _ in range(2))
    rng = np.random.default_rng(13)
    for _ in range(3):
        first.step(*batch(rng, 128))
    for name, values in first.state_arrays().items():
        second.state_arrays()[name].assign(values.numpy())
    x, y = batch(rng, 128)
    for trainer in (first, second):
        trainer.step(x, y)
    for a, b in zip(snapshot(first), snapshot(second), strict=True):
        np.testing.assert_array_equal(a, b)
