"""The `nrc` command: what it prints, writes and returns, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import refused, run

from nrc import cli, launch
from nrc.image import read_layers, read_linear, write_exr

SMALL = ["--width", "12", "--height", "10", "--spp", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Run in an empty folder; leave the number of threads as it was."""
    monkeypatch.chdir(tmp_path)
    yield
    launch.set_threads(0)


# --- render ----------------------------------------------------------------------------------------------------------


def test_render_writes_a_picture_and_a_preview(capsys):
    """An EXR named after the scene, a PNG beside it, and what was done as JSON."""
    result = run(capsys, "render", *SMALL)
    assert result["out"] == "cornell_box.exr" and (result["width"], result["height"]) == (12, 10)
    assert result["integrator"] == "nrc" and result["device"] == "cpu" and result["spp"] == 2
    assert result["seconds"] > 0 and result["interrupted"] is False and result["invalid_samples"] == 0
    assert set(result["stages_ms"]) == {"trace", "query", "tails", "train", "film"}
    assert result["cache"]["rounds"] == 2
    picture = read_linear("cornell_box.exr")
    assert picture.shape == (10, 12, 3) and picture.mean() > 0.01
    assert read_linear("cornell_box.png").shape == (10, 12, 3)


def test_render_clamps_and_says_what_it_took(capsys):
    """Nothing is brighter than the clamp, and the lost share of the energy is in the result."""
    free = run(capsys, "render", "--integrator", "path", *SMALL, "--out", "free.exr")
    result = run(capsys, "render", "--integrator", "path", "--clamp", 0.3, *SMALL, "--out", "clamped.exr")
    mean = {name: read_linear(f"{name}.exr").mean(dtype=np.float64) for name in ("free", "clamped")}
    assert read_linear("clamped.exr").max() <= 0.3 * (1.0 + 1e-5)
    assert free["clamped_fraction"] == 0.0
    assert result["clamped_fraction"] == pytest.approx(1.0 - mean["clamped"] / mean["free"], rel=1e-4)


def test_render_with_reference_prints_the_figures(capsys):
    """relMSE, PSNR, mean bias, seconds, samples; the size is the reference's; against itself there is no difference."""
    run(capsys, "render", "--integrator", "path", *SMALL, "--out", "a.exr")
    result = run(
        capsys,
        "render",
        "--integrator",
        "path",
        "--spp",
        2,
        "--device",
        "cpu",
        "--out",
        "b.exr",
        "--reference",
        "a.exr",
    )
    assert (result["width"], result["height"]) == (12, 10)
    assert result["relmse"] == 0.0 and result["mean_bias"] == 0.0 and result["psnr"] is None  # infinite
    other = run(
        capsys, "render", "--integrator", "path", "--spp", 2, "--seed", 1, "--device", "cpu", "--out", "c.exr",
        "--reference", "a.exr",
    )  # fmt: skip
    a, c = read_linear("a.exr").astype(float), read_linear("c.exr").astype(float)
    assert other["relmse"] == pytest.approx(np.mean((c - a) ** 2 / (a**2 + 0.01)), rel=1e-5)
    assert other["mean_bias"] == pytest.approx(c.mean() / a.mean() - 1.0, abs=1e-6)
    assert {"psnr", "seconds", "spp"} <= set(other)


@pytest.mark.parametrize("asked", [["--width", 13], ["--height", 9], ["--width", 10, "--height", 12]])
def test_render_refuses_a_reference_of_another_size(capsys, asked):
    """One line with the file and both sizes."""
    write_exr(Path("r.exr"), {"color": np.ones((10, 12, 3), np.float32)})
    line = refused(capsys, "render", "--reference", "r.exr", *asked, "--device", "cpu")
    assert "r.exr" in line and "12x10" in line


@pytest.mark.parametrize("suffix", [".exr", ".png", ".hdr"])
def test_render_writes_each_format(capsys, suffix):
    """The suffix decides; what is written reads back."""
    run(capsys, "render", "--integrator", "path", *SMALL, "--out", f"p{suffix}")
    assert read_linear(f"p{suffix}").shape == (10, 12, 3)


def test_render_adds_layers(capsys):
    """--aov: first-hit layers, and with a cache its debug views."""
    run(capsys, "render", *SMALL, "--aov")
    layers = read_layers("cornell_box.exr")
    assert {"color", "albedo", "normal", "depth", "position", "material_id", "query_vertex", "cache"} <= set(layers)
    assert layers["normal"].shape == (10, 12, 3)


def test_render_keeps_the_aspect_ratio(capsys):
    """One side alone scales the scene's other one."""
    result = run(
        capsys, "render", "textured_court", "--width", 16, "--spp", 1, "--integrator", "path", "--device", "cpu"
    )
    from nrc import assets

    settings = assets.load("textured_court").settings
    assert result["height"] == round(16 * settings.height / settings.width)


def test_render_stops_after_its_seconds(capsys):
    """--seconds without --spp is the only limit."""
    result = run(
        capsys, "render", "--integrator", "path", "--width", 8, "--height", 8, "--seconds", 0.2, "--device", "cpu"
    )
    assert result["seconds"] >= 0.2 and result["spp"] >= 1


def test_render_resumes(capsys):
    """--resume goes on to the new number of samples and gives the picture of one run."""
    run(capsys, "render", "--integrator", "path", *SMALL, "--out", "a.exr")
    options = ["--integrator", "path", "--width", 12, "--height", 10, "--device", "cpu", "--spp", 5]
    resumed = run(capsys, "render", *options, "--out", "a.exr", "--resume")
    run(capsys, "render", *options, "--out", "b.exr")
    assert resumed["spp"] == 5
    assert np.array_equal(read_linear("a.exr"), read_linear("b.exr"))
    line = refused(capsys, "render", *options, "--out", "a.exr", "--resume", "--max-depth", 3)
    assert "a.exr.checkpoint" in line and "tracer" in line
    assert "checkpoint" in refused(capsys, "render", *options, "--out", "c.exr", "--resume")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no_such_scene"], "cornell_box"),
        (["missing.glb"], "missing.glb"),
        (["-D", "novalue"], "novalue"),
        (["-D", "=3"], "=3"),
        (["cornell_box", "-D", "a=3"], "a"),
        (["--out", "p.jpg"], ".jpg"),
        (["--out", "no/such/folder/p.exr"], "folder"),
        (["--aov", "--out", "p.png"], "--aov"),
        (["--max-depth", "0"], "max_depth"),
        (["--rr-depth", "0"], "rr_depth"),
        (["--threshold", "-1"], "threshold"),
        (["--threshold", "inf"], "--threshold inf"),
        (["--min-spread", "nan"], "--min-spread nan"),
        (["--min-spread", "inf"], "--min-spread inf"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--threads", "-3"], "-3"),
        (["--reference", "missing.exr"], "missing.exr"),
    ],
)
def test_render_refuses(capsys, arguments, named):
    """Exit code 2, one line that names the mistake, nothing written."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert named in refused(capsys, "render", *arguments, "--width", 4, "--height", 4, "--spp", 1, *device)


@pytest.mark.parametrize(
    "arguments",
    [["render", "--spp", "0"], ["render", "--seconds", "-1"], ["render", "--integrator", "bdpt"], ["rendr"], []],
)
def test_arguments_outside_their_range_exit_with_2(capsys, arguments):
    """argparse's own refusals."""
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2


def test_broken_scene_file_is_one_line(capsys):
    """The file and the field."""
    Path("s.json").write_text('{"assets": [{"shape": "cube", "material": {"kind": "wood"}}]}')
    line = refused(capsys, "render", "s.json", "--device", "cpu")
    assert "s.json" in line and "kind" in line


# --- in a process of its own -----------------------------------------------------------------------------------------


def test_interrupt_writes_what_there_is(tmp_path):
    """Ctrl-C: the picture and its figures so far are written, the exit code is 130, and --resume goes on from there."""
    command = [sys.executable, "-m", "nrc.cli", "render", "--integrator", "path", "--width", "64", "--height", "64"]
    command += ["--device", "cpu", "--out", str(tmp_path / "p.exr"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    process = subprocess.Popen(
        [*command, "--spp", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        for line in process.stderr:  # "ready after ..." comes before the first frame
            if "ready after" in line:
                break
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    result = json.loads(out.splitlines()[-1])
    assert result["interrupted"] is True and 0 < result["spp"] < 1_000_000
    assert read_linear(tmp_path / "p.exr").mean() > 0.01
    more = result["spp"] + 2
    again = subprocess.run(
        [*command, "--spp", str(more), "--resume"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["spp"] == more


def test_version(capsys):
    """--version prints the package's."""
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0 and capsys.readouterr().out.strip()


# --- the other commands ----------------------------------------------------------------------------------------------


def test_scenes_lists_the_built_in_ones(capsys):
    """Names and descriptions, as text and as JSON."""
    listed = run(capsys, "scenes")
    assert {"cornell_box", "furnace", "ajar_room", "glossy_room"} <= set(listed)
    assert all(listed.values())
    assert cli.main(["scenes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(listed)


def test_compare_prints_the_metrics(capsys):
    """MSE, relMSE, PSNR, SSIM, FLIP of two pictures, and a picture of the difference."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 16, 20, 3)).astype(np.float32)
    for name, image in (("a.exr", a), ("b.exr", b), ("c.exr", a[:8])):
        write_exr(Path(name), {"color": image})
    figures = run(capsys, "compare", "a.exr", "b.exr", "--out", "d.png")
    assert {"mse", "relmse", "psnr", "ssim", "flip"} <= set(figures)
    assert figures["mse"] == pytest.approx(np.mean((a.astype(float) - b) ** 2), rel=1e-5)
    assert read_linear("d.png").shape[:2] == (16, 20)
    assert "16" in refused(capsys, "compare", "a.exr", "c.exr")


def test_info_names_versions_and_devices(capsys):
    """What a bug report needs."""
    info = run(capsys, "info")
    assert info["packages"]["warp-lang"] and "cpu" in info["devices"] and info["threads"] >= 1
    assert info["default_device"] in info["devices"] and Path(info["kernel_cache"]).is_dir()


def test_bench_cache_compares_for_equal_time(capsys):
    """Both pictures, their relMSE and ratio, stages and records."""
    run(capsys, "render", "--integrator", "path", *SMALL, "--spp", 64, "--out", "r.exr")
    result = run(
        capsys,
        "bench",
        "cache",
        "cornell_box",
        "--seconds",
        0.5,
        "--reference",
        "r.exr",
        "--out",
        "d",
        "--device",
        "cpu",
    )
    assert result["ratio"] == pytest.approx(result["path"]["relmse"] / result["nrc"]["relmse"])
    assert abs(result["nrc"]["mean_bias"]) < 1.0 and result["nrc"]["records_per_frame"] > 0
    assert set(result["stages_ms"]) >= {"trace", "query", "train"}
    for name in ("path", "nrc"):
        picture = read_linear(f"d/{name}.exr").astype(float)
        reference = read_linear("r.exr").astype(float)
        expected = np.mean((picture - reference) ** 2 / (reference**2 + 0.01))
        assert result[name]["relmse"] == pytest.approx(expected, rel=1e-3)


def test_bench_rays_compares_with_mitsuba(capsys):
    """Samples per second of both, in one run."""
    mitsuba = pytest.importorskip("mitsuba", reason="needs Mitsuba 3 (pip install mitsuba)")
    try:
        mitsuba.set_variant("llvm_ad_rgb")
        import drjit

        drjit.eval(mitsuba.Float(0.0) + 1.0)
    except Exception as error:
        pytest.skip(f"Mitsuba's llvm_ad_rgb does not start, set DRJIT_LIBLLVM_PATH to libLLVM: {error}")
    result = run(
        capsys, "bench", "rays", "cornell_box", "--seconds", 0.4, "--width", 32, "--height", 32, "--device", "cpu"
    )
    assert result["samples_per_second"] > 0 and result["mitsuba_samples_per_second"] > 0 and result["ratio"] > 0
