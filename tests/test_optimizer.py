"""`Optimizer`: Adam, SGD, averages and schedules against their NumPy twins, and that a step touches what it must."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import reference_encoding
import reference_network
import warp as wp
from reference_optimizer import Twin

import nrc.launch
from nrc.field import Field
from nrc.field_cuda import CudaPasses
from nrc.gradients import Gradients
from nrc.kernels import optimizer as opt
from nrc.optimizer import Optimizer, _bias_correction
from nrc.trainer import Trainer

ADAM = {"otype": "Adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 1e-3}
SGD = {"otype": "SGD", "learning_rate": 0.3, "l2_reg": 1e-2}
DECAY = {"otype": "ExponentialDecay", "decay_base": 0.5, "decay_start": 3, "decay_interval": 2, "decay_end": 8}
EMA = {"otype": "Ema", "decay": 0.9}
NESTINGS = {
    "plain": lambda inner: inner,
    "ema": lambda inner: EMA | {"nested": inner},
    "decay": lambda inner: DECAY | {"nested": inner},
    "ema-decay": lambda inner: EMA | {"nested": DECAY | {"nested": inner}},
    "decay-ema": lambda inner: DECAY | {"nested": EMA | {"nested": inner}},
}
GRID = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 7,
    "base_resolution": 4,
    "per_level_scale": 2.0,
}
NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 2}
WIDTHS = [16, 16, 16, 3]  # of its layers


def array(values, dtype=float):
    return wp.array(values, dtype=dtype, device="cpu")


def make_field(grid=GRID):
    """A small CPU field whose table entries are large enough to matter."""
    field = Field(2, 3, grid, NETWORK, seed=3, device="cpu")
    params = field.params.numpy().copy()
    params[field.network.n_params :] *= 5000.0
    field.set_params(params)
    return field


def batch(rng, n):
    """Random points of one half of the square and a smooth target: part of the tables stays untouched."""
    x = rng.random((n, 2), dtype=np.float32) * [0.5, 1.0]
    y = np.stack([np.sin(5 * x[:, 0]), x[:, 0] * x[:, 1], 0.5 + x[:, 1]], axis=1)
    return x.astype(np.float32), y.astype(np.float32)


def loss_and_gradient(x, y, params):
    """Mean square error of `make_field`'s function, and its gradient by the parameters, in double precision."""
    weights, first = [], 0
    for n_in, n_out in pairwise(WIDTHS):
        weights.append(params[first : first + n_in * n_out].reshape(n_in, n_out))
        first += n_in * n_out
    code, _ = reference_encoding.grid(x, GRID, params[first:])
    code = np.pad(code, ((0, 0), (0, WIDTHS[0] - code.shape[1])))
    sums, values = reference_network.forward(code, weights, "ReLU", "None")
    difference = values[-1] - y
    dL_dy = 2 * difference / difference.size
    dL_dcode, gradients = reference_network.backward(sums, values, weights, "ReLU", "None", dL_dy)
    gradients.append(reference_encoding.grid_gradient(x, GRID, dL_dcode))
    return np.mean(difference**2), np.concatenate([gradient.ravel() for gradient in gradients])


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("inner", [ADAM, SGD], ids=["adam", "sgd"])
def test_ten_steps_match_twin(inner, nesting):
    """Loss curve, rates, weights, average and counters of ten steps equal those of the twin in double precision."""
    config, rng = NESTINGS[nesting](inner), np.random.default_rng(1)
    field = make_field()
    trainer = Trainer(field, {"otype": "L2"}, config)
    twin = Twin(field.params.numpy(), field.network.n_params, config)
    for _ in range(10):
        x, y = batch(rng, 150)
        loss, gradient = loss_and_gradient(x, y, twin.w)
        twin.step(gradient)
        assert trainer.step(array(x), array(y)).numpy()[0] == pytest.approx(loss, rel=2e-4)
        assert trainer.optimizer.learning_rate.numpy()[0] == pytest.approx(twin.learning_rate, rel=1e-6)
    # Adam divides by the root of the second moment: entries whose gradient is all rounding may go either way
    for ours, theirs in ((field.params, twin.w), (trainer.ema_params, twin.average)):
        assert np.percentile(np.abs(ours.numpy() - theirs), 98) < 1e-4
    if inner is ADAM:
        n_matrix = field.network.n_params
        steps = trainer.optimizer.state_arrays()["steps"].numpy().ravel()
        assert (steps != twin.n[n_matrix:]).mean() < 0.02
        assert len(np.unique(steps)) > 3


class ScriptedPasses:
    """Stands in for CUDA's passes: hands out prepared gradients, those of the tables in one array."""

    def __init__(self, dtype, loss_scale):
        self.table_dtype, self.loss_scale = dtype, loss_scale

    def accumulate_grids(self, x, state, gradients, dL_dtable):
        if state.numpy()[opt.GO]:
            assert not dL_dtable.numpy().any(), "the last step's gradient must have been cleared"
            dL_dtable.assign(self.dL_dtable)


def scripted_step(optimizer, passes, weight_chunks, table, finite=1):
    """One step whose weight gradient is the sum of `weight_chunks` and whose table gradient is `table`."""
    n = len(weight_chunks)
    passes.dL_dtable = (table * passes.loss_scale).astype(wp.dtype_to_numpy(passes.table_dtype))
    ones = np.ones(n, np.float32)
    flags = array(finite * ones.astype(int), int)
    gradients = Gradients(64, array(weight_chunks), array(ones), flags, None, None, passes.loss_scale)
    return optimizer.apply(gradients, None, 64 * n, None)


def scripted_field(n_matrix, n_encoding, passes, rng):
    """What `Optimizer` needs of a field."""
    params = array(rng.normal(size=n_matrix + n_encoding).astype(np.float32))
    encoding = SimpleNamespace(n_params=n_encoding, grids=())
    return SimpleNamespace(
        n_params=n_matrix + n_encoding, encoding=encoding, params=params, passes=passes, device=params.device
    )


@pytest.mark.parametrize("dtype, loss_scale", [(wp.float32, 1.0), (wp.float16, 128.0)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("config", [NESTINGS["ema-decay"](ADAM), NESTINGS["ema"](SGD), ADAM, SGD])
def test_table_update_matches_twin(config, dtype, loss_scale):
    """Sparse random gradients through 30 updates as CUDA takes them."""
    rng = np.random.default_rng(2)
    passes = ScriptedPasses(dtype, loss_scale)
    n_matrix, n_encoding = 48, 400
    field = scripted_field(n_matrix, n_encoding, passes, rng)
    optimizer = Optimizer(field, config)
    twin = Twin(field.params.numpy(), n_matrix, config)
    for step in range(30):
        chunks = rng.normal(size=(11, n_matrix)).astype(np.float32)
        table = rng.normal(size=n_encoding).astype(np.float16)
        table[rng.random(n_encoding) < (0.97 if step % 3 else 0.2)] = 0.0
        scripted_step(optimizer, passes, chunks, np.float64(table))
        twin.step(np.concatenate([chunks.astype(np.float64).sum(0), np.float64(table)]))
    np.testing.assert_allclose(field.params.numpy(), twin.w, atol=2e-5)
    np.testing.assert_allclose(optimizer.ema_params.numpy(), twin.average, atol=2e-5)
    arrays = optimizer.state_arrays()
    if "steps" in arrays:
        np.testing.assert_array_equal(arrays["steps"].numpy().ravel()[:n_encoding], twin.n[n_matrix:])
        moments = arrays["moments"].numpy().reshape(-1, 2, 8)
        np.testing.assert_allclose(moments[:, 0].ravel()[:n_encoding], twin.m[n_matrix:], atol=1e-5)
        np.testing.assert_allclose(moments[:, 1].ravel()[:n_encoding], twin.v[n_matrix:], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(arrays["weights"].numpy()[0], twin.m[:n_matrix], atol=1e-5)


def restart(optimizer):
    """Restart the average, and check that it is the parameters then and that nothing else changes."""
    before = {name: values.numpy().copy() for name, values in optimizer.state_arrays().items()}
    optimizer.restart_average()
    np.testing.assert_array_equal(optimizer.ema_params.numpy(), before["params"])
    after = {name: values.numpy() for name, values in optimizer.state_arrays().items()}
    np.testing.assert_array_equal(after["weights"][:2], before["weights"][:2])
    for name in after.keys() - {"weights", "average", "stamps", "average_start"}:
        np.testing.assert_array_equal(after[name], before[name])


def test_restarted_average_matches_twin():
    """The average of the steps since the last restart, of entries that stand still too, as CUDA takes it."""
    config, rng, passes = NESTINGS["ema"](ADAM), np.random.default_rng(4), ScriptedPasses(wp.float32, 1.0)
    n_matrix, n_encoding = 48, 400
    field = scripted_field(n_matrix, n_encoding, passes, rng)
    optimizer, twin = Optimizer(field, config), Twin(field.params.numpy(), n_matrix, config)
    for step in range(12):
        if step in (0, 5, 6):
            restart(optimizer)
            twin.restart_average()
        chunks = rng.normal(size=(11, n_matrix)).astype(np.float32)
        table = np.where(rng.random(n_encoding) < 0.9, 0.0, rng.normal(size=n_encoding))
        scripted_step(optimizer, passes, chunks, table)
        twin.step(np.concatenate([chunks.astype(np.float64).sum(0), table]))
        np.testing.assert_allclose(optimizer.ema_params.numpy(), twin.average, atol=2e-5)


def test_restarted_average_on_a_cpu_is_the_recurrence():
    """Of the parameters after each step since the last restart, in double precision."""
    trainer, rng = Trainer(make_field(), {"otype": "L2"}, NESTINGS["ema"](ADAM)), np.random.default_rng(5)
    expected, n = np.zeros(trainer.field.n_params), 0
    for step in range(12):
        if step in (0, 5, 6):
            restart(trainer.optimizer)
            n = 0
        trainer.step(*map(array, batch(rng, 5)))
        n += 1
        w = trainer.field.params.numpy().astype(np.float64)
        expected = (0.1 * w + 0.9 * (1 - 0.9 ** (n - 1)) * expected) / (1 - 0.9**n)
        np.testing.assert_allclose(trainer.ema_params.numpy(), expected, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("config", [NESTINGS["ema"](ADAM), NESTINGS["decay"](ADAM), NESTINGS["ema"](SGD)])
def test_weight_kernels_agree(config):
    """The kernel of CUDA and the CPU's update the network's weights alike, for any number of chunks."""
    rng = np.random.default_rng(10)
    passes = ScriptedPasses(wp.float32, 1.0)
    start = rng.normal(size=48).astype(np.float32)
    wide, plain = (Optimizer(scripted_field(48, 0, passes, rng), config) for _ in range(2))
    plain._update_weights = opt.make_update_weights(plain.config.otype, plain.config.ema_decay is not None)
    plain._weights_per_thread = 1
    for optimizer in (wide, plain):
        optimizer.field.params.assign(start)
    for n_chunks in (1, 7, 8, 9, 40):
        chunks = rng.normal(size=(n_chunks, 48)).astype(np.float32)
        for optimizer in (wide, plain):
            scripted_step(optimizer, passes, chunks, np.zeros(0))
    assert not np.allclose(wide.field.params.numpy(), start, atol=1e-3)
    for name, values in wide.state_arrays().items():
        np.testing.assert_allclose(values.numpy(), plain.state_arrays()[name].numpy(), rtol=1e-5, atol=1e-6)


def test_overflown_table_gradient_leaves_its_entry():
    """An infinite sum of half-precision gradients is no step for that entry; its neighbours take theirs."""
    passes = ScriptedPasses(wp.float16, 128.0)
    field = scripted_field(16, 16, passes, np.random.default_rng(3))
    optimizer = Optimizer(field, SGD | {"learning_rate": 1.0})
    before = field.params.numpy().copy()
    table = np.array([0.0, 600.0, 0.25, *[0.0] * 13])  # 600 * 128 exceeds the largest half
    with np.errstate(over="ignore"):
        scripted_step(optimizer, passes, np.zeros((1, 16), np.float32), table)
    moved = field.params.numpy()[16:] - before[16:]
    np.testing.assert_allclose(moved, [0.0, 0.0, -0.25, *[0.0] * 13], atol=1e-6)


def test_l2_shrinks_weights_alone():
    """Without gradient SGD multiplies the network's weights by 1 - rate * l2_reg and leaves tables alone."""
    passes = ScriptedPasses(wp.float32, 1.0)
    field = scripted_field(32, 16, passes, np.random.default_rng(4))
    optimizer = Optimizer(field, SGD)
    before = field.params.numpy().copy()
    scripted_step(optimizer, passes, np.zeros((1, 32), np.float32), np.zeros(16))
    np.testing.assert_allclose(field.params.numpy()[:32], before[:32] * (1 - 0.3 * 1e-2), rtol=1e-6)
    np.testing.assert_array_equal(field.params.numpy()[32:], before[32:])


def test_skipped_step_keeps_everything():
    """A gradient that is not finite moves nothing but the count of skipped steps."""
    passes = ScriptedPasses(wp.float16, 128.0)
    field = scripted_field(32, 16, passes, np.random.default_rng(5))
    optimizer = Optimizer(field, NESTINGS["ema"](ADAM))
    chunks, table = np.ones((2, 32), np.float32), np.ones(16)
    scripted_step(optimizer, passes, chunks, table)
    before = {name: values.numpy().copy() for name, values in optimizer.state_arrays().items()}
    scripted_step(optimizer, passes, chunks, table, finite=0)
    assert optimizer.skipped_steps.numpy()[0] == 1 and optimizer.n_steps.numpy()[0] == 1
    for name, values in optimizer.state_arrays().items():
        if name != "counters":
            np.testing.assert_array_equal(values.numpy(), before[name])
    assert before["counters"][opt.N_STEPS] == 1 and before["moments"].any()


def test_bias_correction_ends_at_one():
    """The table follows the formula, and where 16-bit counters end before the correction does, 1 is a good end."""
    short = _bias_correction(opt.OptimizerConfig(beta1=0.9, beta2=0.99))
    n = np.arange(1, len(short))
    np.testing.assert_allclose(short[1:], np.sqrt(1 - 0.99**n) / (1 - 0.9**n), rtol=1e-6)
    long = _bias_correction(opt.OptimizerConfig(beta2=0.9999))
    assert len(long) == 65536 and long[-1] == 1.0 and abs(long[-2] - 1.0) < 1e-3
    with pytest.raises(ValueError, match="beta2"):
        opt.OptimizerConfig(beta2=0.99999)


def test_step_counters_saturate():
    """A parameter updated 65535 times stays at that count, and its step is the one without bias correction."""
    passes = ScriptedPasses(wp.float32, 1.0)
    field = scripted_field(16, 8, passes, np.random.default_rng(6))
    optimizer = Optimizer(field, ADAM | {"beta2": 0.9999, "epsilon": 1e-30})
    optimizer.state_arrays()["steps"].fill_(65535)
    optimizer.state_arrays()["moments"].fill_(1.0)
    before = field.params.numpy().copy()
    scripted_step(optimizer, passes, np.zeros((1, 16), np.float32), np.ones(8))
    assert (optimizer.state_arrays()["steps"].numpy() == 65535).all()
    np.testing.assert_allclose(field.params.numpy()[16:], before[16:] - 1e-2, atol=1e-6)


def test_step_counters_saturate_level_by_level():
    """The same where a table's levels are updated one by one: the counters stay, and the step is uncorrected."""
    field, rng = make_field(), np.random.default_rng(6)
    trainer = Trainer(field, {"otype": "L2"}, ADAM | {"learning_rate": 1.0, "beta2": 0.9999, "epsilon": 1.0})
    trainer.optimizer.state_arrays()["steps"].fill_(65535)
    before = field.params.numpy().copy()
    trainer.step(*map(array, batch(rng, 100)))
    assert (trainer.optimizer.state_arrays()["steps"].numpy() == 65535).all()
    # A first moment of (1 - beta1) g and no correction; the second moment is nothing beside epsilon
    m = trainer.optimizer.state_arrays()["moments"].numpy().reshape(-1, 2, 8)[:, 0].ravel()
    moved = field.params.numpy()[field.network.n_params :] - before[field.network.n_params :]
    assert np.abs(moved).max() > 1e-5
    np.testing.assert_allclose(moved, -m, rtol=1e-3, atol=2e-7)


@pytest.fixture(scope="module")
def large():
    """Sixty sparse steps on tables of 2^22 entries: the trainer, the points of each step, and sampled weights."""
    grid = GRID | {"n_levels": 3, "log2_hashmap_size": 22, "base_resolution": 1024}
    trainer = Trainer(Field(2, 3, grid, NETWORK, device="cpu"), {"otype": "L2"}, NESTINGS["ema"](ADAM))
    rng = np.random.default_rng(7)
    points, history, averages = rng.random((96, 2), dtype=np.float32), [], []
    touched = touched_blocks(points)
    n_matrix, n_blocks = trainer.field.network.n_params, trainer.field.encoding.n_params // 8
    blocks = np.concatenate([touched, rng.integers(n_blocks, size=200)])
    sample = (n_matrix + 8 * blocks[:, None] + np.arange(8)).ravel()
    steps = []
    for _ in range(60):
        x = points[rng.choice(96, 4)]  # a point sees every 24th step or so
        trainer.step(array(x), array(rng.random((4, 3), dtype=np.float32)))
        steps.append((x, trainer.optimizer.state_arrays()["stamps"].numpy().copy()))
        history.append(trainer.field.params.numpy()[sample].astype(np.float64))
        averages.append(trainer.ema_params.numpy()[sample] if len(steps) in (7, 33, 60) else None)
    return trainer, steps, history, averages


def touched_blocks(x):
    """Blocks of 8 parameters that the points `x` read from the tables of `large`."""
    first, blocks = 0, []
    for level in reference_encoding.grid_levels(2, 3, 22, 1024, 2.0):
        entries, _ = reference_encoding.grid_corners(x, level)
        blocks.append((first + entries.ravel()) // 4)
        first += level[2]
    return np.unique(np.concatenate(blocks))


def test_lazy_average_is_the_dense_one(large):
    """At 2^22 entries the average caught up in closed form is the recurrence over every step, in double precision."""
    _, _, history, averages = large
    dense, n_compared = np.zeros_like(history[0]), 0
    for t, (w, average) in enumerate(zip(history, averages, strict=True), 1):
        dense = ((1 - 0.9) * w + 0.9 * (1 - 0.9 ** (t - 1)) * dense) / (1 - 0.9**t)
        if average is not None:
            np.testing.assert_allclose(average, dense, rtol=2e-6, atol=1e-9)
            n_compared += 1
    assert n_compared == 3
    assert (history[0] != history[-1]).any(axis=0).mean() > 0.1


def test_step_touches_what_its_rows_read(large):
    """Of two million blocks at 2^22 entries, a step brings those up to date that its rows interpolate, no other."""
    trainer, steps, _, _ = large
    for t, (x, stamps) in enumerate(steps, 1):
        np.testing.assert_array_equal(np.flatnonzero(stamps == t), touched_blocks(x))
    assert len(steps[0][1]) > 2_000_000
    everything = np.unique(np.concatenate([touched_blocks(x) for x, _ in steps]))
    steps_taken = trainer.optimizer.state_arrays()["steps"].numpy()
    assert np.isin(np.flatnonzero(steps_taken.any(axis=1)), everything).all()


def test_threads_do_not_change_bits():
    """One, two and five CPU threads give identical weights, moments, averages and losses."""
    results = []
    for n_threads in (1, 2, 5):
        nrc.launch.set_threads(n_threads)
        try:
            rng = np.random.default_rng(8)
            trainer = Trainer(make_field(), {"otype": "L2"}, NESTINGS["ema"](ADAM))
            losses = [trainer.step(*map(array, batch(rng, 1000))).numpy()[0] for _ in range(10)]
            arrays = {**trainer.optimizer.state_arrays(), "ema_params": trainer.ema_params}
            results.append({name: values.numpy().copy() for name, values in arrays.items()} | {"losses": losses})
        finally:
            nrc.launch.set_threads(0)
    for other in results[1:]:
        for name, values in results[0].items():
            np.testing.assert_array_equal(values, other[name])


def test_threads_may_grow_after_construction():
    """An optimizer made for one thread works with more later."""
    nrc.launch.set_threads(1)
    try:
        rng = np.random.default_rng(9)
        trainer = Trainer(make_field(), {"otype": "L2"}, SGD)
        first = trainer.step(*map(array, batch(rng, 500))).numpy()[0]
        nrc.launch.set_threads(3)
        for _ in range(20):
            last = trainer.step(*map(array, batch(rng, 500))).numpy()[0]
        assert last < first
    finally:
        nrc.launch.set_threads(0)


@pytest.mark.parametrize("dtype, tolerance", [(wp.float32, 1e-4), (wp.float16, 2e-2)], ids=["fp32", "fp16"])
def test_whole_table_gradients_take_the_same_steps(dtype, tolerance):
    """With CUDA's passes, which sum the gradients of whole tables, training goes as with the CPU's."""
    config, losses = NESTINGS["ema"](ADAM | {"epsilon": 1e-4}), []
    for whole in (False, True):
        field, rng = make_field(), np.random.default_rng(11)
        if whole:
            field.passes = CudaPasses(field.encoding, field.network, field.device, dtype=dtype, mma=False)
        trainer = Trainer(field, {"otype": "L2"}, config)
        losses.append([trainer.step(*map(array, batch(rng, 128))).numpy()[0] for _ in range(12)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
    assert losses[0][11] < 0.7 * losses[0][0]


def test_step_gives_the_input_gradient_of_before() -> None:
    """`dL_dx` gains what `Field.backward` computes before the step, and the step itself stays the same."""
    encoding = {"otype": "HashGrid", "n_levels": 4, "log2_hashmap_size": 10}
    network = {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 2}
    rng = np.random.default_rng(0)
    x, dL_dy = rng.random((500, 3), dtype=np.float32), rng.normal(size=(500, 5)).astype(np.float32)
    fields = [Field(3, 5, encoding, network, device="cpu") for _ in range(2)]
    for field in fields:
        field.set_params(np.random.default_rng(1).uniform(-0.3, 0.3, field.n_params))
    expected, out = (np.full((500, 3), 2.0, np.float32) for _ in range(2))
    fields[0].backward(x, dL_dy, dL_dx=expected)
    count = wp.array([400], dtype=int, device="cpu")
    for field, dL_dx in zip(fields, (None, out), strict=True):
        Optimizer(field, {"otype": "Adam"}).step(x, dL_dy, dL_dx=dL_dx, count=count)
    np.testing.assert_array_equal(out[:400], expected[:400])
    np.testing.assert_array_equal(out[400:], 2.0)
    assert np.abs(expected - 2.0).max() > 0.1
    np.testing.assert_array_equal(fields[0].params.numpy(), fields[1].params.numpy())
