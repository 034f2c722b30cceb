"""Section of `gpu_report.py`: every kernel family on a device against the same on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import warp as wp
from report_rows import ADAM, GRID, N_OUTPUTS, Row, Settings, Skipped, array, guarded, network, public, sized

import nrc
from nrc.launch import prepare, threads

ACTIVATIONS = (
    "None", "ReLU", "LeakyReLU", "SiLU", "Exponential", "Sine", "Sigmoid", "Squareplus", "Softplus", "Tanh",
)  # fmt: skip
LOSSES = ("L1", "L2", "RelativeL2", "RelativeL2Luminance", "MAPE", "SMAPE", "Huber", "CrossEntropy")
SMALL_GRID = {**GRID, "n_levels": 6, "log2_hashmap_size": 12}
N_ROWS = 1000  # no multiple of any block

# Relative differences (root of the summed squares) that rounding explains. fp32 encodings: x * scale + 0.5 is rounded
# to 2^-13 of a cell at the finest level here. fp16 operands: 2^-11 each. Ten training steps amplify both.
ENCODING_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 2e-2
TRAINING_TOLERANCE = 3e-2
# Fractions of pixels whose path meets another triangle because of rounding.
HIT_TOLERANCE = 0.01
PATH_TOLERANCE = 0.02
MEAN_TOLERANCE = 0.03  # of pictures with a cache that learned with other roundings


@dataclass
class Case:
    """Something to compute on two devices.

    `build` allocates on a device and returns the kernels to compile and the function that computes arrays by name;
    `tolerance` bounds the relative difference of each.
    """

    family: str
    name: str
    tolerance: float
    build: Callable[[wp.Device], tuple[dict[str, wp.Kernel], Callable[[], dict[str, np.ndarray]]]]


def component_case(family: str, name: str, make: Callable[[wp.Device], Any], n_in: int, tolerance: float) -> Case:
    """Outputs, and gradients by inputs and parameters, of a Field, Encoding or Network with N(0, 1) table entries."""

    def build(device: wp.Device) -> tuple[dict[str, wp.Kernel], Callable[[], dict[str, np.ndarray]]]:
        component = make(device)
        rng = np.random.default_rng(0)
        if component.n_params:
            params = component.params.numpy().copy()
            tables = np.abs(params) <= 1e-4
            params[tables] = rng.standard_normal(int(tables.sum()))
            component.set_params(params)
        x = array(rng.random((N_ROWS, n_in)), device)

        def compute() -> dict[str, np.ndarray]:
            y = component.inference(x)
            dL_dy = array(np.random.default_rng(1).standard_normal(y.shape), device)
            dL_dx = wp.zeros((N_ROWS, n_in), dtype=float, device=device)
            results = {"y": y.numpy()}
            if component.n_params:
                dL_dparams = wp.zeros(component.n_params, dtype=float, device=device)
                component.backward(x, dL_dy, dL_dx=dL_dx, dL_dparams=dL_dparams)
                results["dL_dparams"] = dL_dparams.numpy()
            else:
                component.backward(x, dL_dy, dL_dx=dL_dx)
            return {**results, "dL_dx": dL_dx.numpy()}

        return component.kernels(), compute

    return Case(family, name, tolerance, build)


def training_case(family: str, name: str, loss: dict[str, Any], optimizer: dict[str, Any]) -> Case:
    """Losses of ten steps and what the field answers after them."""

    def build(device: wp.Device) -> tuple[dict[str, wp.Kernel], Callable[[], dict[str, np.ndarray]]]:
        field = nrc.Field(2, N_OUTPUTS, SMALL_GRID, network(32, output_activation="Sigmoid"), device=device)
        trainer = nrc.Trainer(field, loss, optimizer, batch_size=4096)
        x = np.random.default_rng(0).random((4096, 2))
        y = 0.5 + 0.4 * np.sin(7.0 * x @ np.array([[1.0, 0.5, -1.0], [0.3, 1.0, 2.0]]))
        on_device = array(x, device), array(y, device)

        def compute() -> dict[str, np.ndarray]:
            losses = [float(trainer.step(*on_device).numpy()[0]) for _ in range(10)]
            out = wp.zeros(y.shape, dtype=float, device=device)
            field.inference(on_device[0], out, params=trainer.ema_params)
            return {"losses": np.array(losses), "outputs": out.numpy()}

        return {**field.kernels(), **trainer.kernels()}, compute

    return Case(family, name, TRAINING_TOLERANCE, build)


def learning_cases(settings: Settings) -> Iterator[Case]:
    """Encodings x interpolation, activations and widths, losses, optimizers."""
    grids: list[tuple[str, dict[str, Any], int]] = [
        (f"HashGrid {interpolation} {n_dims}D", {**SMALL_GRID, "interpolation": interpolation}, n_dims)
        for interpolation in ("Linear", "Smoothstep", "Nearest")
        for n_dims in (2, 3)
    ]
    others: list[tuple[str, dict[str, Any], int]] = [
        ("DenseGrid", {**SMALL_GRID, "otype": "DenseGrid", "n_levels": 3}, 3),
        ("TiledGrid", {**SMALL_GRID, "otype": "TiledGrid"}, 2),
        ("Frequency", {"otype": "Frequency", "n_frequencies": 6}, 3),
        ("TriangleWave", {"otype": "TriangleWave", "n_frequencies": 6}, 3),
        ("OneBlob", {"otype": "OneBlob", "n_bins": 8}, 3),
        ("SphericalHarmonics", {"otype": "SphericalHarmonics", "degree": 4}, 3),
        ("Identity", {"otype": "Identity"}, 3),
    ]
    composite = [{**SMALL_GRID, "n_dims_to_encode": 3}, {"otype": "OneBlob", "n_bins": 4}]
    others.append(("Composite", {"otype": "Composite", "nested": composite}, 5))
    for name, config, n_dims in sized(settings, [*grids, *others], [grids[0], others[4]]):
        yield component_case(
            "encoding", name, lambda device, c=config, n=n_dims: public("Encoding")(n, c, device=device), n_dims,
            ENCODING_TOLERANCE,
        )  # fmt: skip
    for activation in sized(settings, ACTIVATIONS, ACTIVATIONS[1:2]):
        config = network(64, activation=activation, output_activation="None")
        yield component_case(
            "activation", activation, lambda device, c=config: public("Network")(32, N_OUTPUTS, c, device=device), 32,
            GRADIENT_TOLERANCE,
        )  # fmt: skip
    for width in sized(settings, (16, 32, 128), (16,)):
        yield component_case(
            "field", f"{width} wide",
            lambda device, w=width: nrc.Field(3, N_OUTPUTS, SMALL_GRID, network(w), device=device), 3,
            GRADIENT_TOLERANCE,
        )  # fmt: skip
    for loss in sized(settings, LOSSES, ("L2",)):
        yield training_case("loss", loss, {"otype": loss}, ADAM)
    averaged = {"otype": "Ema", "decay": 0.9, "nested": ADAM}
    decaying = {"otype": "ExponentialDecay", "decay_start": 3, "decay_interval": 2, "nested": averaged}
    optimizers = {
        "Adam": ADAM,
        "SGD": {"otype": "SGD", "learning_rate": 1.0},
        "ExponentialDecay(Ema(Adam))": decaying,
    }
    for name in sized(settings, list(optimizers), ["ExponentialDecay(Ema(Adam))"]):
        yield training_case("optimizer, 10 steps", name, {"otype": "L2"}, optimizers[name])


def measure_parity(settings: Settings, _ceilings: dict[str, float]) -> Iterator[Row]:
    """The largest relative difference between this device and the CPU, for every kernel family."""
    cases = [(case.family, case.name) for case in learning_cases(settings)]
    now = time.perf_counter()
    deadline = now + (settings.deadline - now) / 2.0  # the other half is for the timings
    # Compiling takes nearly all of the time and most of it has one thread: as many processes as cores
    n_processes = 1 if settings.quick else min(threads(), len(cases), 12)
    if n_processes == 1:
        for i in range(len(cases)):
            yield compare(i, str(settings.device), settings.quick, deadline)
    else:
        with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
            arguments = (str(settings.device), settings.quick, deadline)
            futures = [pool.submit(compare, i, *arguments) for i in range(len(cases))]
            for (family, name), future in zip(cases, futures, strict=True):
                # A process that died takes its case and those behind it along, not the report
                error = future.exception()
                label = {"family": family, "case": name}
                yield (
                    future.result()
                    if error is None
                    else {**label, "result": f"failed: {type(error).__name__}: {error}"}
                )
    yield from picture_parity(settings)


def compare(i: int, device: str, quick: bool, deadline: float) -> Row:
    """The row of one case."""
    wp.config.log_level = wp.LOG_WARNING
    settings = Settings(wp.get_device(device), quick, deadline)
    case = list(learning_cases(settings))[i]

    def row() -> Row:
        try:
            results = []
            for place in (wp.get_device("cpu"), settings.device):
                kernels, compute = case.build(place)
                prepare(kernels, place)
                results.append(compute())
        except ValueError as error:
            if "unknown" in str(error):
                raise Skipped(f"not built yet ({error})") from None
            raise
        expected, found = results
        errors = {name: relative_difference(found[name], expected[name]) for name in expected}
        worst = max(errors, key=lambda name: errors[name])
        return agreement(errors[worst], case.tolerance, of=worst)

    return guarded(settings, {"family": case.family, "case": case.name}, row)


def picture_parity(settings: Settings) -> Iterator[Row]:
    """Intersection by first-hit layers, the path tracer and the cache, on the built-in Cornell box."""
    devices = (wp.get_device("cpu"), settings.device)
    size = sized(settings, 64, 16)

    def render(device: wp.Device, integrator: Any, n_frames: int) -> Any:
        scene = nrc.load("cornell_box")
        config = nrc.PathTracerConfig(integrator=integrator, max_depth=6)
        renderer = nrc.Renderer(scene, size, size, config, device=device)
        renderer.prepare()
        for _ in range(n_frames):
            renderer.frame()
        return renderer

    def hits() -> Row:
        cpu, here = (render(device, "path", 1).aovs() for device in devices)
        same = np.ones((size, size), bool)
        for name in ("depth", "normal", "material_id"):
            close = np.isclose(here[name], cpu[name], rtol=1e-3, atol=1e-3)
            same &= close.reshape(size, size, -1).all(axis=2)
        return agreement(1.0 - same.mean(), HIT_TOLERANCE, of="pixels")

    def paths() -> Row:
        cpu, here = (render(device, "path", 4).image() for device in devices)
        close = np.isclose(here, cpu, rtol=1e-2, atol=1e-3).all(axis=2)
        return agreement(1.0 - close.mean(), PATH_TOLERANCE, of="pixels")

    def cache() -> Row:
        cpu, here = (render(device, "nrc", sized(settings, 64, 4)).image() for device in devices)
        return agreement(abs(here.mean() / cpu.mean() - 1.0), MEAN_TOLERANCE, of="mean")

    for family, compute in (("intersection", hits), ("path tracer", paths), ("cache", cache)):
        yield guarded(settings, {"family": family, "case": f"cornell_box {size}x{size}"}, compute)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the summed squared differences over that of the expected values; infinite where either is not finite.

    The half per cent of the elements that differ most is left out: a sample at the face of a grid's cell falls on one
    side or the other by rounding, and Nearest interpolation and all input gradients jump there.
    """
    a, b = found.astype(float).ravel(), expected.astype(float).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    differences = np.sort(np.abs(a - b))[: a.size - a.size // 200]
    return float(np.linalg.norm(differences) / max(np.linalg.norm(b), 1e-30))


def agreement(error: float, tolerance: float, *, of: str) -> Row:
    return {
        "of": of,
        "difference": float(f"{error:.3g}") if np.isfinite(error) else "not finite",
        "tolerance": tolerance,
        "result": "agrees" if error <= tolerance else "differs",
    }
