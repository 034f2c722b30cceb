"""Every kernel compiles for CUDA, down to machine code, on a computer that needs no GPU.

NVRTC comes with Warp. The target is cubin because PTX is not assembled: nonsense in inline assembly passes there.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import warp as wp

import nrc.kernels
from nrc.cache import CacheConfig
from nrc.field import Field
from nrc.field_cuda import MIN_MMA_ARCH, CudaPasses
from nrc.kernels import grid_cuda, nerf, optimizer, pixels
from nrc.kernels.cache import N_INPUTS

ARCHITECTURES = (75, 90)  # the oldest that CUDA 13 compiles for, and the newest data-centre one of the design
MMA_ARCHITECTURES = (MIN_MMA_ARCH, 90)


def field_kernels(
    n_inputs: int,
    n_outputs: int,
    encoding: dict[str, Any],
    network: dict[str, Any],
    loss: str,
    *,
    mma: bool,
    gemm: bool = False,
) -> list[wp.Kernel]:
    """Factory kernels of a field and its gradients as CUDA runs them, `gemm` with cuBLASDx's products."""
    field = Field(n_inputs, n_outputs, encoding, network, device="cpu")
    passes = CudaPasses(field.encoding, field.network, field.device, mma=mma)
    alone = CudaPasses(field.encoding, None, field.device)
    kernels = [
        *passes.kernels().values(),
        *passes.training_kernels(loss).values(),
        *passes.training_kernels(None).values(),
        passes.input_gradient_kernel,
        *alone.kernels().values(),
        *alone.training_kernels(None).values(),
        alone.input_gradient_kernel,
    ]
    for part in field.encoding.grids:
        kernels.append(grid_cuda.make_accumulate_grid_cuda(field.encoding, part, passes.dtype, wp.float32))
    if gemm:
        for kernel in kernels:
            kernel.module.options["enable_mathdx_gemm"] = True
    return kernels


def optimizer_kernels() -> list[wp.Kernel]:
    """Factory kernels of the optimizers."""
    return [
        optimizer.make_update_weights("Adam", True),
        optimizer.make_update_weights("SGD", False),
        optimizer.make_update_tables("Adam", True, wp.float16),
        optimizer.make_update_tables("SGD", False, wp.float32),
    ]


def fit_kernels() -> list[wp.Kernel]:
    """Factory kernels of the offline fits."""
    return [
        pixels.make_draw_pixels(wp.uint8, 3),
        pixels.make_draw_pixels(wp.float32, 4),
        pixels.make_read_window(wp.uint8),
        pixels.make_read_window(wp.float32),
        nerf.make_composite("Huber"),
    ]


HASH, FREQUENCY = CacheConfig("hash"), CacheConfig("frequency")
MANY = {
    "otype": "Composite",
    "nested": [
        {"otype": "TiledGrid", "n_dims_to_encode": 2, "n_levels": 2, "interpolation": "Smoothstep"},
        {"otype": "DenseGrid", "n_dims_to_encode": 3, "n_levels": 2, "n_features_per_level": 1, "base_resolution": 4},
        {"otype": "Frequency", "n_dims_to_encode": 1, "n_frequencies": 4},
        {"otype": "SphericalHarmonics", "n_dims_to_encode": 3, "degree": 4},
    ],
}


NARROW = {"n_neurons": 16, "n_hidden_layers": 1, "activation": "SiLU", "output_activation": "Exponential"}
DEEP = {"n_neurons": 128, "n_hidden_layers": 4, "activation": "Softplus", "output_activation": "Sigmoid"}
GENERAL = {"otype": "MLP", "n_neurons": 208, "n_hidden_layers": 2, "activation": "Sine", "output_activation": "Tanh"}
CACHE_HASH = (N_INPUTS, 3, HASH.encoding_config(), HASH.network_config(), "RelativeL2Luminance")
CACHE_FREQUENCY = (N_INPUTS, 3, FREQUENCY.encoding_config(), FREQUENCY.network_config(), "RelativeL2Luminance")
SMALL = (9, 17, MANY, NARROW, "Huber")
WIDE = (9, 1, MANY, DEEP, "MAPE")
LARGE = (9, 4, MANY, GENERAL, "CrossEntropy")

# Kernels that come from factories: for what cards, and a function that returns them.
COMPONENTS: dict[str, tuple[tuple[int, ...], Callable[[], list[wp.Kernel]]]] = {
    "fits": (ARCHITECTURES, fit_kernels),
    "optimizer": (ARCHITECTURES, optimizer_kernels),
    "tile large": ((75,), lambda: field_kernels(*LARGE, mma=False)),
    "tile cache hash": ((90,), lambda: field_kernels(*CACHE_HASH, mma=False, gemm=True)),
    "mma cache hash": (MMA_ARCHITECTURES, lambda: field_kernels(*CACHE_HASH, mma=True)),
    "mma cache frequency": (MMA_ARCHITECTURES, lambda: field_kernels(*CACHE_FREQUENCY, mma=True)),
    "mma small": (MMA_ARCHITECTURES, lambda: field_kernels(*SMALL, mma=True)),
    "mma wide": (MMA_ARCHITECTURES, lambda: field_kernels(*WIDE, mma=True)),
}


def kernels_of(module: ModuleType) -> list[wp.Kernel]:
    """The kernels that a Python module defines at its top level."""
    values = vars(module).values()
    return [value for value in values if isinstance(value, wp.Kernel) and value.func.__module__ == module.__name__]


def module_kernels() -> dict[str, list[wp.Kernel]]:
    """The kernels of each module of nrc.kernels that has some."""
    names = [info.name for info in pkgutil.walk_packages(nrc.kernels.__path__, "nrc.kernels.")]
    modules = {name: kernels_of(importlib.import_module(name)) for name in names}
    return {name: kernels for name, kernels in modules.items() if kernels}


def compile_to_cubin(kernels: list[wp.Kernel], architecture: int, folder: Path) -> list[Path]:
    """Compile the Warp modules of `kernels` and return the files that came out."""
    modules = {id(kernel.module): kernel.module for kernel in kernels}
    return [
        path
        for module in modules.values()
        for path in wp.compile_aot_module(module, arch=architecture, module_dir=folder, use_ptx=False)
    ]


MODULES = module_kernels()
CASES = [(name, architecture) for name in MODULES for architecture in ARCHITECTURES]
CASES += [(name, architecture) for name, (architectures, _) in COMPONENTS.items() for architecture in architectures]


@pytest.mark.slow
@pytest.mark.parametrize("name, architecture", CASES)
def test_kernels_compile_for_cuda(name: str, architecture: int, tmp_path: Path) -> None:
    """NVRTC and ptxas accept the kernels, and every Warp module leaves an ELF file."""
    kernels = MODULES[name] if name in MODULES else COMPONENTS[name][1]()
    cubins = compile_to_cubin(kernels, architecture, tmp_path)
    n_modules = len({id(kernel.module) for kernel in kernels})
    assert len(cubins) == n_modules > 0
    assert all(path.name.endswith(f".sm{architecture}.cubin") for path in cubins)
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in cubins)


@wp.func_native('asm volatile("nonsense;");')
def emit_nonsense(): ...


@wp.kernel(module="unique", enable_backward=False)
def run_nonsense(first: int, out_x: wp.array[float]):
    """Store 1, with an unknown instruction. One thread per element."""
    emit_nonsense()
    out_x[first + wp.tid()] = 1.0


def test_unknown_instruction_is_rejected(tmp_path: Path) -> None:
    """The check reaches the assembler: inline assembly that ptxas does not know fails."""
    with pytest.raises(Exception, match="CUDA kernel build failed"):
        compile_to_cubin([run_nonsense], ARCHITECTURES[0], tmp_path)
