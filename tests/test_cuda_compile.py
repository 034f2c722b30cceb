"""Every kernel compiles for CUDA, down to machine code, on a computer that needs no GPU.

NVRTC comes with Warp. The target is cubin because PTX is not assembled: nonsense in inline assembly passes there.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import warp as wp

import nrc.field
import nrc.kernels
from nrc.cache import CacheConfig, RadianceCache

ARCHITECTURES = (75, 90)  # the oldest that CUDA 13 compiles for, and the newest data-centre one of the design


def cache_kernels(encoding: Literal["hash", "frequency"]) -> list[wp.Kernel]:
    """Factory kernels of a cache as CUDA runs it: field, its gradients, and trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nrc.field, "wide", lambda device: False)
        box = (np.zeros(3), np.ones(3))
        cache = RadianceCache(box, CacheConfig(encoding), max_queries=1, max_records=1, device="cpu")
        kernels = {**cache.kernels(), **{f"field {k}": v for k, v in cache.field.backward_kernels().items()}}
    return [kernel for kernel in kernels.values() if kernel.module.name != kernel.func.__module__]


# Objects whose kernels come from factories, each a function that builds one instance and returns these kernels.
COMPONENTS: dict[str, Callable[[], list[wp.Kernel]]] = {
    "RadianceCache hash": lambda: cache_kernels("hash"),
    "RadianceCache frequency": lambda: cache_kernels("frequency"),
}


def kernels_of(module: ModuleType) -> list[wp.Kernel]:
    """The kernels that a Python module defines at its top level."""
    values = vars(module).values()
    return [value for value in values if isinstance(value, wp.Kernel) and value.func.__module__ == module.__name__]


def kernel_makers() -> dict[str, Callable[[], list[wp.Kernel]]]:
    """For each module of nrc.kernels with kernels, and each component, what returns its kernels."""
    names = [info.name for info in pkgutil.walk_packages(nrc.kernels.__path__, "nrc.kernels.")]
    modules = {name: kernels_of(importlib.import_module(name)) for name in names}
    makers: dict[str, Callable[[], list[wp.Kernel]]] = {
        name: lambda kernels=kernels: kernels for name, kernels in modules.items() if kernels
    }
    return makers | COMPONENTS


def compile_to_cubin(kernels: list[wp.Kernel], architecture: int, folder: Path) -> list[Path]:
    """Compile the Warp modules of `kernels` and return the files that came out."""
    modules = {id(kernel.module): kernel.module for kernel in kernels}
    return [
        path
        for module in modules.values()
        for path in wp.compile_aot_module(module, arch=architecture, module_dir=folder, use_ptx=False)
    ]


KERNEL_MAKERS = kernel_makers()
# The megakernel takes NVRTC and ptxas half a minute per architecture; the newer one has to do.
CASES = [
    (name, architecture)
    for name in KERNEL_MAKERS
    for architecture in ARCHITECTURES
    if name != "nrc.kernels.trace" or architecture == max(ARCHITECTURES)
]


@pytest.mark.slow
@pytest.mark.parametrize("name, architecture", CASES)
def test_kernels_compile_for_cuda(name: str, architecture: int, tmp_path: Path) -> None:
    """NVRTC and ptxas accept the kernels, and every Warp module leaves an ELF file."""
    kernels = KERNEL_MAKERS[name]()
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
