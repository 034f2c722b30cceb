"""Measurements that `nrc bench` prints: the cache against path tracing, and throughput against Mitsuba."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nrc.cache import CacheConfig
from nrc.device_scene import DeviceScene
from nrc.image import write_exr
from nrc.metrics import mean_bias, relmse
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Scene

Say = Callable[[str], None]


def bench_cache(
    scene: Scene,
    reference: np.ndarray,
    width: int,
    height: int,
    configs: Mapping[str, PathTracerConfig],
    *,
    encoding: Any = "hash",
    seconds: float = 20.0,
    device: Any = None,
    out: Path | None = None,
    with_mitsuba: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Render with path tracing and with an untrained cache for `seconds` each, and compare both with `reference`.

    Args:
        configs: "path" and "nrc", equal but for the integrator.
        out: Folder for path.exr and nrc.exr (and mitsuba.exr).
        with_mitsuba: Also render with Mitsuba's `path` (llvm_ad_rgb) for the same time.

    Returns:
        path.relmse, nrc.relmse, nrc.mean_bias, ratio (path over nrc), stages_ms, and more figures of each run.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    uploaded = DeviceScene(scene, device)
    pictures: dict[str, np.ndarray] = {}
    result: dict[str, Any] = {"width": width, "height": height, "seconds": seconds, "device": str(uploaded.device)}
    for name, config in configs.items():
        renderer = Renderer(uploaded, width, height, config, cache=CacheConfig(encoding=encoding))
        renderer.prepare()
        records = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            renderer.frame()
            if renderer.cache is not None:
                records += min(renderer.n_records, renderer.cache.n_training_records)
        elapsed = time.perf_counter() - start
        pictures[name] = renderer.image()
        result[name] = {
            **_figures(pictures[name], reference),
            "spp": renderer.film.n_frames,
            "seconds": elapsed,
            "invalid_samples": renderer.film.stats()["invalid_samples"],
        }
        if renderer.cache is not None:
            result[name]["records_per_frame"] = records / renderer.film.n_frames
            result["stages_ms"] = renderer.stages_ms()
        say(_line(name, result[name]))
    if with_mitsuba:
        pictures["mitsuba"], n_samples, elapsed = _mitsuba_for(scene, width, height, configs["path"], seconds)
        result["mitsuba"] = {**_figures(pictures["mitsuba"], reference), "spp": n_samples, "seconds": elapsed}
        say(_line("mitsuba", result["mitsuba"]))
        result["ratio_mitsuba"] = result["mitsuba"]["relmse"] / result["nrc"]["relmse"]
    result["ratio"] = result["path"]["relmse"] / result["nrc"]["relmse"]
    say(f"relMSE of path over nrc: {result['ratio']:.2f}")
    if out is not None:
        for name, picture in pictures.items():
            write_exr(out / f"{name}.exr", {"color": picture})
    return result


def bench_rays(
    scene: Scene,
    width: int,
    height: int,
    config: PathTracerConfig,
    *,
    seconds: float = 10.0,
    device: Any = None,
    say: Say = print,
) -> dict[str, Any]:
    """Path tracing throughput, and Mitsuba's (llvm_ad_rgb `path`, same size and depths) in turn with it.

    Returns:
        samples_per_second, mitsuba_samples_per_second and their ratio (ours over Mitsuba's).
    """
    renderer = Renderer(scene, width, height, config, device=device)
    renderer.prepare()
    renderer.frame()
    mitsuba = _MitsubaRenderer(scene, width, height, config)
    rounds = 4
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / rounds:
            renderer.frame()
            n += 1
        ours.append(n * width * height / (time.perf_counter() - start))
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / rounds:
            n += mitsuba.render()
        theirs.append(n * width * height / (time.perf_counter() - start))
    result: dict[str, Any] = {
        "width": width,
        "height": height,
        "device": str(renderer.device),
        "samples_per_second": float(np.median(ours)),
        "mitsuba_samples_per_second": float(np.median(theirs)),
        "ratio": float(np.median(np.asarray(ours) / np.asarray(theirs))),
        "mitsuba_variant": mitsuba.variant,
    }
    say(
        f"{result['samples_per_second'] / 1e6:.2f} M samples/s, Mitsuba ({mitsuba.variant}) "
        f"{result['mitsuba_samples_per_second'] / 1e6:.2f} M: ratio {result['ratio']:.2f}"
    )
    return result


class _MitsubaRenderer:
    """The same scene in Mitsuba, exported by `to_mitsuba`; renders in passes of `spp` samples per pixel."""

    def __init__(self, scene: Scene, width: int, height: int, config: PathTracerConfig, *, spp: int = 16) -> None:
        from nrc.assets.mitsuba_export import to_mitsuba

        try:
            import mitsuba as mi
        except ImportError:
            raise ValueError("this comparison needs Mitsuba 3: pip install mitsuba") from None
        self._mi = mi
        self.spp, self.variant = spp, "llvm_ad_rgb"
        try:
            mi.set_variant(self.variant)
            import drjit as dr

            dr.eval(mi.Float(0.0) + 1.0)
        except Exception as error:  # drjit raises bare Exceptions where LLVM is missing
            library = os.environ.get("DRJIT_LIBLLVM_PATH", "DRJIT_LIBLLVM_PATH not set")
            raise ValueError(f"Mitsuba's {self.variant} does not start ({library=!s}): {error}") from None
        description, _ = to_mitsuba(
            scene,
            width=width,
            height=height,
            spp=spp,
            max_depth=config.max_depth,
            rr_depth=config.rr_depth,
        )
        self._scene = mi.load_dict(description)
        self._n_passes = 0
        self.render()  # compiles

    def render(self) -> int:
        """Render one pass; its samples per pixel. The picture is in `image`."""
        self._n_passes += 1
        self.image = np.array(self._mi.render(self._scene, spp=self.spp, seed=self._n_passes))[..., :3]  # type: ignore[arg-type]
        return self.spp


def _mitsuba_for(
    scene: Scene, width: int, height: int, config: PathTracerConfig, seconds: float
) -> tuple[np.ndarray, int, float]:
    renderer = _MitsubaRenderer(scene, width, height, config)
    total = np.zeros((height, width, 3))
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        spp = renderer.render()
        total += spp * renderer.image
        n += spp
    return (total / n).astype(np.float32), n, time.perf_counter() - start


def _figures(picture: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return {"relmse": relmse(picture, reference), "mean_bias": mean_bias(picture, reference)}


def _line(name: str, figures: Mapping[str, float]) -> str:
    return (
        f"{name:8} {figures['spp']:5d} spp in {figures['seconds']:.1f} s: relMSE {figures['relmse']:.5f}, "
        f"mean {100 * figures['mean_bias']:+.2f} %"
    )
