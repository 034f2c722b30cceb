"""The same pictures on CUDA as on the CPU, and again from the same seed."""

import numpy as np
import pytest

from nrc import assets
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer

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
