"""The cache as a Mitsuba integrator: `path` where the cache is never asked, and known answers where it is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warp as wp
from small_scenes import welch_t

from nrc import RadianceCache

ROOT = Path(__file__).resolve().parent.parent
NEVER = 1e30  # spread_threshold at which no path ends in the cache
T_LIMIT, T_FRACTION, T_MEAN_LIMIT = 3.5, 0.997, 4.0  # as in test_mitsuba_render.py


@pytest.fixture
def mi():
    """Mitsuba with llvm_ad_rgb active and the plugin imported."""
    mitsuba = pytest.importorskip("mitsuba", reason="needs Mitsuba 3 (pip install mitsuba)")
    import drjit as dr

    try:
        mitsuba.set_variant("llvm_ad_rgb")
        dr.eval(mitsuba.Float(0.0) + 1.0)
    except Exception as error:  # drjit raises bare Exceptions
        pytest.skip(f"needs LLVM for llvm_ad_rgb: {error}")
    importlib.import_module("nrc.integrations.mitsuba")
    return mitsuba


def cornell_box(mi, size: int = 32, **film):
    description = mi.cornell_box()
    description["sensor"]["film"] |= {"width": size, "height": size, "rfilter": {"type": "box"}, **film}
    return mi.load_dict(description)


def pictures(mi, scene, integrator, n: int, spp: int, first_seed: int = 0) -> np.ndarray:
    """(n, height, width, channels) independent renders."""
    renders = (mi.render(scene, integrator=integrator, spp=spp, seed=first_seed + i) for i in range(n))
    return np.array([np.array(picture) for picture in renders])


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own, in which no variant has been set."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("film", "options"),
    [
        ({}, {"max_depth": 6, "spp_per_pass": 16}),
        ({}, {"max_depth": 6, "sobol": True, "spp_per_pass": 2}),
        (
            {"rfilter": {"type": "gaussian"}, "pixel_format": "rgba"},
            {"hide_emitters": True, "max_depth": 3, "spp_per_pass": 16},
        ),
        (
            {"crop_offset_x": 8, "crop_offset_y": 4, "crop_width": 20, "crop_height": 12, "sample_border": True},
            {"max_depth": 4, "spp_per_pass": 16},
        ),
    ],
)
def test_plugin_without_cache_agrees_with_path(mi, film, options) -> None:
    """Welch t over independent renders, per pixel channel and in the mean; alpha too."""
    scene = cornell_box(mi, **film)
    shared = {name: value for name, value in options.items() if name in ("max_depth", "hide_emitters")}
    never = {"type": "nrc", "spread_threshold": NEVER, "warm_up": 0}
    ours = pictures(mi, scene, mi.load_dict({**never, **options}), 24, 16)
    theirs = pictures(mi, scene, mi.load_dict({"type": "path", **shared}), 24, 16, first_seed=100)
    assert ours.shape == theirs.shape
    mean_t = np.abs(welch_t(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2))))
    assert mean_t.max() <= T_MEAN_LIMIT, (ours.mean(axis=(0, 1, 2)), theirs.mean(axis=(0, 1, 2)))
    assert np.mean(np.abs(welch_t(ours, theirs)) <= T_LIMIT) >= T_FRACTION


def test_furnace_is_one(mi) -> None:
    """Inside a closed sphere that emits 0.5 and reflects half of what arrives, radiance is 0.5 / (1 - 0.5)."""
    scene = mi.load_dict(
        {
            "type": "scene",
            "sensor": {
                "type": "perspective",
                "to_world": mi.ScalarTransform4f().look_at([0.3, 0.1, -0.5], [0, 0, 1], [0, 1, 0]),
                "film": {"type": "hdrfilm", "width": 32, "height": 32, "rfilter": {"type": "box"}},
            },
            "sphere": {
                "type": "sphere",
                "flip_normals": True,
                "bsdf": {"type": "diffuse", "reflectance": 0.5},
                "emitter": {"type": "area", "radiance": {"type": "rgb", "value": 0.5}},
            },
        }
    )
    integrator = mi.load_dict({"type": "nrc", "spp_per_pass": 1, "warm_up": 96})
    picture = np.array(mi.render(scene, integrator=integrator, spp=32, seed=1))
    assert abs(picture.mean() - 1.0) < 0.02
    assert integrator.cache.stats()["rounds"] == integrator.n_passes == 128


def test_import_registers_for_every_variant() -> None:
    """Before or after `set_variant`, from XML and dict; it sets no variant, and unsupported ones say what runs."""
    pytest.importorskip("mitsuba", reason="needs Mitsuba 3 (pip install mitsuba)")
    program = """
import mitsuba as mi
{before}
import nrc.integrations.mitsuba
assert mi.variant() == {variant}, mi.variant()
for variant in ("scalar_rgb", "llvm_ad_rgb", "llvm_ad_spectral", "llvm_ad_rgb"):
    mi.set_variant(variant)
    xml = '<scene version="3.0.0"><integrator type="nrc"><integer name="max_depth" value="3"/></integrator></scene>'
    for load in (lambda: mi.load_string(xml).integrator(), lambda: mi.load_dict({{"type": "nrc", "max_depth": 3}})):
        try:
            print(variant, load().cache)
        except Exception as error:
            print(variant, [line for line in str(error).splitlines() if "nrc: " in line][0])
try:
    mi.load_dict({{"type": "nrc", "no_such_parameter": 3}})
except Exception as error:
    print("no_such_parameter" in str(error))
"""
    for before, variant in (("", None), ('mi.set_variant("llvm_ad_rgb")', "llvm_ad_rgb")):
        done = run(program.format(before=before, variant=repr(variant)))
        if "LLVM" in done.stderr and done.returncode:
            pytest.skip("needs LLVM for llvm_ad_rgb")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        good = ["llvm_ad_rgb None"] * 2
        assert lines[2:4] == good and lines[6:] == [*good, "True"]
        for line, name in zip(lines[:2] + lines[4:6], ["scalar_rgb"] * 2 + ["llvm_ad_spectral"] * 2, strict=True):
            assert f"nrc: runs on llvm_ad_rgb and cuda_ad_rgb, not on {name}" in line


def test_media_are_refused(mi) -> None:
    """One line that says so before anything is rendered: inside a shape, an instance, and around the camera."""
    medium = {"type": "homogeneous", "albedo": 0.5, "sigma_t": 1.0}
    ball = {"type": "sphere", "bsdf": {"type": "null"}, "interior": medium}
    scenes = [
        {"sensor": {"type": "perspective"}, "ball": ball},
        {
            "sensor": {"type": "perspective"},
            "group": {"type": "shapegroup", "ball": ball},
            "instance": {"type": "instance", "shapes": {"type": "ref", "id": "group"}},
        },
        {"sensor": {"type": "perspective", "medium": medium}, "ball": {"type": "sphere"}},
    ]
    for scene in scenes:
        integrator = mi.load_dict({"type": "nrc"})
        with pytest.raises(RuntimeError, match=r"^nrc: participating media are not supported.*$"):
            integrator.render(mi.load_dict({"type": "scene", **scene}), spp=1)
        assert integrator.cache is None


def test_wrong_parameters_are_named(mi) -> None:
    """Types and values are checked when the integrator is made, samples per pass when it is first used."""
    values = [("encoding", "dense"), ("spread_threshold", -1.0), ("spp_per_pass", -1), ("warm_up", -1)]
    values += [("max_depth", -2), ("rr_depth", 0)]
    types = [("max_depth", 3.5), ("max_depth", True), ("rr_depth", 2.0), ("training_records", 1e3), ("warm_up", "1")]
    types += [("spp_per_pass", 1.5), ("spread_threshold", "a"), ("sobol", 1), ("encoding", 1)]
    for wrong, message in [(v, "") for v in values] + [(t, " must be .*, got ") for t in types]:
        with pytest.raises(RuntimeError, match=wrong[0] + message):
            mi.load_dict({"type": "nrc", wrong[0]: wrong[1]})
    assert "threshold = 1.0]" in str(mi.load_dict({"type": "nrc", "spread_threshold": 1}))
    integrator = mi.load_dict({"type": "nrc", "spp_per_pass": 3})
    with pytest.raises(RuntimeError, match=r"spp_per_pass \(3\) does not divide 4 samples per pixel$"):
        integrator.render(cornell_box(mi, 8), spp=4)


def test_samplers_may_round_the_number_of_samples_up(mi) -> None:
    """`orthogonal` draws squares of primes: the picture has as many, and an error says where they come from."""
    description = mi.cornell_box()
    description["sensor"] |= {"sampler": {"type": "orthogonal"}}
    description["sensor"]["film"] |= {"width": 8, "height": 8}
    scene = mi.load_dict(description)
    integrator = mi.load_dict({"type": "nrc", "spp_per_pass": 3, "warm_up": 0})
    mi.render(scene, integrator=integrator, spp=5)
    assert integrator.n_passes == 3
    with pytest.raises(RuntimeError, match=r"does not divide 25 samples per pixel, what this sampler makes of 10$"):
        integrator.render(scene, spp=10)


def test_same_seed_gives_the_same_picture(mi) -> None:
    """An untrained cache and the same seed give the same picture, another seed another one."""
    scene = cornell_box(mi)
    options = {"type": "nrc", "spp_per_pass": 1, "warm_up": 4}
    a, b, c = (np.array(mi.render(scene, integrator=mi.load_dict(options), spp=8, seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # threads add to pixels in any order
    assert np.abs(a - c).max() > 0.05


def test_training_goes_on_across_renders(mi) -> None:
    """Later calls start from what earlier ones learned; forgetting it brings the first call's error back."""
    scene = cornell_box(mi)
    reference = np.array(mi.render(scene, integrator=mi.load_dict({"type": "path"}), spp=2048, seed=99))
    integrator = mi.load_dict({"type": "nrc", "spp_per_pass": 1, "warm_up": 0})

    def bias(seed: int, spp: int) -> float:
        picture = np.array(mi.render(scene, integrator=integrator, spp=spp, seed=seed))
        return abs(picture.mean() / reference.mean() - 1.0)

    first = bias(0, 8)
    mi.render(scene, integrator=integrator, spp=96, seed=1)
    trained = bias(2, 64)
    integrator.reset_cache()
    assert integrator.n_passes == 0
    assert trained < 0.02 < first / 3.0
    assert bias(0, 8) == pytest.approx(first, rel=1e-3)


def test_first_picture_comes_from_a_trained_cache(mi, tmp_path: Path) -> None:
    """Training passes before it, once: not in later calls, and not with a cache that was saved."""
    scene = cornell_box(mi)
    reference = np.array(mi.render(scene, integrator=mi.load_dict({"type": "path"}), spp=2048, seed=99))
    integrator = mi.load_dict({"type": "nrc", "spp_per_pass": 8})
    first = np.array(mi.render(scene, integrator=integrator, spp=64))
    assert abs(first.mean() / reference.mean() - 1.0) < 0.02
    assert integrator.n_passes == integrator.cache.stats()["rounds"] == 128 + 8
    mi.render(scene, integrator=integrator, spp=16)
    assert integrator.n_passes == 128 + 8 + 2
    integrator.cache.save(tmp_path / "cache.nrc")
    other = mi.load_dict({"type": "nrc", "spp_per_pass": 8})
    other.cache = RadianceCache.load(tmp_path / "cache.nrc", max_queries=1, max_records=1, device="cpu")
    mi.render(scene, integrator=other, spp=16)
    assert other.n_passes == 2 and other.cache.stats()["rounds"] == 128 + 8 + 2 + 2


def test_one_integrator_renders_several_scenes_and_sensors(mi) -> None:
    """Another sensor and a scene in the box keep the cache, an unlit one is black; a larger one gets its own."""
    scene = cornell_box(mi, 16)
    integrator = mi.load_dict({"type": "nrc", "spread_threshold": NEVER, "warm_up": 0})
    mi.render(scene, integrator=integrator, spp=4)
    cache = integrator.cache
    sensor = mi.load_dict({"type": "perspective", "film": {"type": "hdrfilm", "width": 24, "height": 8}})
    assert np.array(mi.render(scene, integrator=integrator, sensor=sensor, spp=4)).shape == (8, 24, 3)
    params = mi.traverse(scene)
    params["light.emitter.radiance.value"] = mi.Color3f(0.0)
    params.update()
    dark = np.array(mi.render(scene, integrator=integrator, spp=4))
    assert integrator.cache is cache and not dark.any()
    description = mi.cornell_box()
    description["far"] = {"type": "sphere", "center": [9.0, 0.0, 0.0]}
    description["sensor"]["film"] |= {"width": 16, "height": 16}
    mi.render(mi.load_dict(description), integrator=integrator, spp=4)
    assert integrator.cache is not cache


def test_integrators_around_the_plugin(mi) -> None:
    """`aov` has the plugin's colours and its own channels; `moment`, which asks ray by ray, has those of `path`."""
    description = mi.cornell_box()
    description["sensor"]["film"] |= {"width": 16, "height": 16}
    scene = mi.load_dict(description)
    options = {"type": "nrc", "warm_up": 2}

    def around(kind: str, inner: dict, **more) -> np.ndarray:
        return np.array(mi.render(scene, integrator=mi.load_dict({"type": kind, "img": inner, **more}), spp=4, seed=5))

    alone = np.array(mi.render(scene, integrator=mi.load_dict(options), spp=4, seed=5))
    aovs = {"aovs": "depth:depth,normal:sh_normal"}
    ours, theirs = around("aov", options, **aovs), around("aov", {"type": "path"}, **aovs)
    assert ours.shape == theirs.shape == (16, 16, 7)
    np.testing.assert_allclose(ours[..., :3], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(ours[..., :3] - theirs[..., :3]).max() > 0.05
    np.testing.assert_allclose(ours[..., 3:].mean((0, 1)), theirs[..., 3:].mean((0, 1)), rtol=0.02, atol=0.02)
    paths = {"type": "path", "max_depth": -1}
    np.testing.assert_allclose(around("moment", options), around("moment", paths), rtol=1e-5, atol=1e-6)


def test_scene_that_only_mitsuba_reads(mi, tmp_path: Path) -> None:
    """Blended, bump-mapped and thin materials, instances, curves, an SDF grid and a thin lens: the mean is `path`'s."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        scene = mi.load_dict(importlib.import_module("mitsuba_plugin").builtin_scene(48, 36, tmp_path))
    finally:
        sys.path.pop(0)
    integrator = mi.load_dict({"type": "nrc", "max_depth": 16, "spp_per_pass": 4})
    picture = np.array(mi.render(scene, integrator=integrator, spp=64, seed=1))
    expected = np.array(mi.render(scene, integrator=mi.load_dict({"type": "path", "max_depth": 16}), spp=256, seed=2))
    assert np.isfinite(picture).all()
    assert abs(picture.mean() / expected.mean() - 1.0) < 0.05
    assert integrator.cache.stats()["invalid_queries"] == 0


def test_arrays_cross_without_copies(mi) -> None:
    """What one side writes the other one reads."""
    from nrc.integrations.mitsuba import as_drjit, as_records, as_warp
    from nrc.integrations.mitsuba_paths import FIELDS

    device = wp.get_device("cpu")
    values = mi.Float(np.arange(12, dtype=np.float32))
    array = as_warp(values, wp.vec3, device)
    assert array.shape == (4,) and array.ptr == as_warp(values, wp.float32, device).ptr
    array.fill_(7.0)
    assert np.all(np.array(values) == 7.0)

    answers = wp.zeros((4, 3), dtype=float, device=device)
    seen = as_drjit(answers)
    answers.fill_(3.0)
    assert np.all(np.array(seen) == 3.0)
    assert as_warp(seen, wp.float32, device).ptr == answers.ptr

    fields = tuple(mi.Float(np.full(4 * width, width, np.float32)) for width in FIELDS.values())
    records = as_records(fields, device)
    for (name, _), field in zip(FIELDS.items(), fields, strict=True):
        assert getattr(records, name).ptr == as_warp(field, wp.float32, device).ptr


def test_sizes_may_alternate() -> None:
    """Renders of other sample counts and film sizes in between leave the integrator as it was."""
    program = """
import mitsuba as mi
import nrc.integrations.mitsuba
mi.set_variant("llvm_ad_rgb")
description = mi.cornell_box()
description["sensor"]["film"] |= {"width": 64, "height": 64}
scene = mi.load_dict({**description, "integrator": {"type": "nrc", "warm_up": 0}})
wide = mi.load_dict({**description["sensor"], "film": {**description["sensor"]["film"], "width": 96, "height": 48}})
for spp, sensor in ((16, 0), (64, 0), (16, 0), (16, wide), (16, 0), (16, wide)):
    print(mi.render(scene, sensor=sensor, spp=spp).array.numpy().mean() > 0.05)
"""
    done = run(program)  # a crash of Dr.Jit would end this process too
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-6:] == ["True"] * 6
