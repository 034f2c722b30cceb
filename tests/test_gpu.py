"""The same fields and pictures on CUDA as on the CPU, and again from the same seed."""

from typing import Any

import numpy as np
import pytest
import warp as wp

from nrc import assets
from nrc.cache import CacheConfig
from nrc.field import Field
from nrc.field_cuda import MIN_MMA_ARCH, CudaPasses
from nrc.kernels.cache import N_INPUTS
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.temporal import TemporalAccumulation
from nrc.trainer import Trainer

# Both devices follow the same random numbers, but round differently: a few paths per frame hit another triangle.
SAME_PIXELS = 0.98
# Float atomics add gradients in another order each run; after 16 frames that must not show in the picture.
REPEAT_RELMSE = 1e-3


def render(device: str, integrator: str, n_frames: int) -> np.ndarray:
    """Built-in Cornell box at 64 x 64."""
    scene = assets.load("cornell_box")
    renderer = Renderer(scene, 64, 64, PathTracerConfig(integrator=integrator, max_depth=6), device=device)
    renderer.prepare()
    for _ in range(n_frames):
        renderer.frame()
    return renderer.image()


@pytest.mark.gpu
def test_paths_on_cuda_are_those_on_the_cpu():
    """All but a few pixels agree to rounding, and the means to a tenth of a per cent."""
    cpu, cuda = render("cpu", "path", 4), render("cuda:0", "path", 4)
    close = np.isclose(cuda, cpu, rtol=1e-2, atol=1e-3).all(axis=2)
    assert close.mean() > SAME_PIXELS
    assert abs(cuda.mean() / cpu.mean() - 1.0) < 1e-3


@pytest.mark.gpu
def test_cache_on_cuda_repeats_within_tolerance():
    """Two runs of one seed differ by rounding only."""
    a, b = render("cuda:0", "nrc", 16), render("cuda:0", "nrc", 16)
    assert np.mean((a - b) ** 2 / (b**2 + 0.01)) < REPEAT_RELMSE


@pytest.mark.gpu
def test_cache_on_cuda_gives_the_mean_of_the_cpu():
    """The two paths through encoding, network and optimizer learn the same radiance."""
    cpu, cuda = render("cpu", "nrc", 64), render("cuda:0", "nrc", 64)
    assert abs(cuda.mean() / cpu.mean() - 1.0) < 0.03


@pytest.mark.gpu
def test_moving_scene_on_cuda_gives_the_pictures_of_the_cpu():
    """Instances, their lights, replayed records, a cut and reprojection, over six frames of an animation."""
    means = []
    for device in ("cpu", "cuda:0"):
        scene = assets.load("opening_door")
        cache = CacheConfig(replay=0.25)
        renderer = Renderer(scene, 96, 54, PathTracerConfig(max_depth=6), cache=cache, device=device)
        shown = TemporalAccumulation(96, 54, renderer.device)
        pictures = []
        for i in range(6):
            renderer.set_scene(scene.at(1.2 * i))
            if i == 3:
                renderer.cut()
            for _ in range(12):
                renderer.frame()
            picture = shown.add(renderer.film.mean(), renderer.scene, renderer.tracer.camera).numpy()
            assert np.isfinite(picture).all()
            pictures.append(np.clip(picture, 0.0, 4.0).mean())
        means.append(pictures)
    np.testing.assert_allclose(means[1], means[0], rtol=0.15)  # one noisy lamp behind a door


# The cache's two shapes: a small network on a hash grid, and a larger one on a frequency encoding.
FIELDS = {name: CacheConfig(name) for name in ("hash", "frequency")}
# Relative errors in the norm. CUDA multiplies halves of 11 bits and keeps values in them; where a sum changes its sign
# by that, a ReLU's derivative flips, and a part of the gradient with it.
VALUES, GRADIENTS = 5e-3, 8e-2
# Two orders of the same half-precision products
TWINS = 1e-2
LOSS_CURVE = 5e-3  # relative, over ten steps
N_ROWS, COUNT = 5000, 4900
ADAM = {"otype": "Adam", "learning_rate": 1e-3}


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative error in the norm, infinite where something is not finite."""
    value = np.linalg.norm(np.float64(actual) - expected) / np.linalg.norm(np.float64(expected))
    return value if np.isfinite(value) else np.inf


def make_field(config: CacheConfig, device: str) -> Field:
    """The cache's field, with table entries that are not almost zero."""
    field = Field(N_INPUTS, 3, config.encoding_config(), config.network_config(), device=device)
    params = field.params.numpy()
    params[field.n_matrix_params :] *= 1e4
    field.set_params(params)
    return field


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs in the unit cube, and targets that follow them."""
    x = np.float32(np.random.default_rng(0).random((N_ROWS, N_INPUTS)))
    return x, np.float32(np.stack([x[:, 0] * x[:, 1], np.sin(6 * x[:, 2]) ** 2, x[:, 3]], axis=1))


def to_device(array: np.ndarray, device: str, dtype: Any = float) -> wp.array:
    return wp.array(array, dtype=dtype, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FIELDS)
def test_field_on_cuda_has_the_values_and_gradients_of_the_cpu(name: str):
    """Outputs, and gradients by parameters and inputs, of the rows that count."""
    x, _ = make_data()
    dL_dy = np.float32(np.random.default_rng(1).normal(size=(N_ROWS, 3)))
    results = []
    for device in ("cpu", "cuda:0"):
        field = make_field(FIELDS[name], device)
        count = to_device([COUNT], device, int)
        out = to_device(np.full((N_ROWS, 3), np.nan), device)
        dL_dx = wp.zeros((N_ROWS, N_INPUTS), dtype=float, device=device)
        dL_dparams = wp.zeros(field.n_params, dtype=float, device=device)
        inputs = to_device(x, device)
        field.inference(inputs, out, count=count)
        field.backward(inputs, to_device(dL_dy, device), dL_dx=dL_dx, dL_dparams=dL_dparams, count=count)
        assert np.isnan(out.numpy()[COUNT:]).all() and not dL_dx.numpy()[COUNT:].any()
        n_matrix = field.n_matrix_params
        dL_dparams = dL_dparams.numpy()
        results.append([out.numpy()[:COUNT], dL_dx.numpy(), dL_dparams[:n_matrix], dL_dparams[n_matrix:]])
    for expected, actual, tolerance in zip(*results, (VALUES, *[GRADIENTS] * 3), strict=True):
        if expected.size:
            assert error(actual, expected) < tolerance


@pytest.mark.gpu
def test_trainer_on_cuda_has_the_losses_of_the_cpu():
    """Ten steps of Adam on a hash grid: the same loss before each, to the tolerance of half-precision gradients."""
    x, y = make_data()
    curves = []
    for device in ("cpu", "cuda:0"):
        trainer = Trainer(make_field(FIELDS["hash"], device), {"otype": "L2"}, ADAM, batch_size=N_ROWS)
        inputs, targets = to_device(x, device), to_device(y, device)
        curves.append([float(trainer.step(inputs, targets).numpy()[0]) for _ in range(10)])
    np.testing.assert_allclose(curves[1], curves[0], rtol=LOSS_CURVE)
    assert curves[1][-1] < curves[1][0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FIELDS)
def test_both_networks_on_cuda_agree(name: str):
    """`mma` and tile kernels give the same outputs, losses, and gradients by weights and codes."""
    field = make_field(FIELDS[name], "cuda:0")
    if field.device.arch < MIN_MMA_ARCH:
        pytest.skip(f"{field.device} is older than sm_{MIN_MMA_ARCH}")
    x, y = (to_device(array, "cuda:0") for array in make_data())
    count = to_device([COUNT], "cuda:0", int)
    results = []
    for mma in (False, True):
        passes = CudaPasses(field.encoding, field.network, field.device, mma=mma)
        out = wp.zeros((N_ROWS, 3), dtype=float, device="cuda:0")
        passes.evaluate(field.params, x, out, count)
        gradients = passes.backpropagate(
            field.params, x, y, count, loss="RelativeL2Luminance", pdf=None, input_gradient=True
        )
        n_chunks = -(-COUNT // gradients.chunk_size)
        assert gradients.chunk_finite.numpy()[:n_chunks].all()
        arrays = gradients.chunk_gradient, gradients.chunk_loss
        results.append(
            [out.numpy()[:COUNT], gradients.dL_dcode.numpy()[:COUNT]] + [a.numpy()[:n_chunks] for a in arrays]
        )
    for tile, mma in zip(*results, strict=True):
        assert error(mma, tile) < TWINS


@pytest.mark.gpu
def test_captured_step_equals_an_eager_one():
    """A training step in a CUDA graph, launched five times, leaves what five eager steps leave."""
    x, y = (to_device(array, "cuda:0") for array in make_data())
    losses, params = [], []
    for captured in (False, True):
        trainer = Trainer(make_field(FIELDS["frequency"], "cuda:0"), {"otype": "L2"}, ADAM, batch_size=N_ROWS)
        loss = trainer.step(x, y)  # compiles and allocates
        if captured:
            with wp.ScopedCapture("cuda:0") as capture:
                loss = trainer.step(x, y)
            for _ in range(5):
                wp.capture_launch(capture.graph)
        else:
            for _ in range(5):
                loss = trainer.step(x, y)
        losses.append(float(loss.numpy()[0]))
        params.append(trainer.field.params.numpy())
    assert losses[0] == losses[1] > 0.0
    np.testing.assert_array_equal(params[1], params[0])
