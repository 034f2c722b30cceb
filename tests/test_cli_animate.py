"""`nrc render --animate` and `--time`: files, figures, resuming, refusals."""

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

from nrc import cli, cli_render, launch
from nrc.image import read_layers, read_linear

SMALL = ["--width", "12", "--height", "8", "--spp", "3", "--device", "cpu"]
# A lamp that moves across the picture and gets brighter, over a floor; frame k shows 10 k / 4 at 4 frames per second
MOVING = {
    "materials": {
        "white": {"base_color": [0.7, 0.7, 0.7]},
        "lamp": {"base_color": [0, 0, 0], "emission": {"keyframes": [[0, [1, 1, 1]], [2, [9, 9, 9]]]}},
    },
    "assets": [
        {"shape": "rectangle", "material": "white", "to_world": {"scale": 9, "translate": [0, 0, -1]}},
        {
            "shape": "rectangle",
            "material": "lamp",
            "to_world": {"scale": 0.5, "translate": {"keyframes": [[0, [-1, 0, 0]], [2, [1, 0, 0]]]}},
        },
    ],
    "camera": {"look_at": {"origin": [0, 0, 4], "target": [0, 0, 0]}, "fov": 50},
}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Run in a folder with a moving and a still scene; leave the number of threads as it was."""
    monkeypatch.chdir(tmp_path)
    Path("moving.json").write_text(json.dumps(MOVING))
    still = json.loads(json.dumps(MOVING))
    still["materials"]["lamp"]["emission"] = [1, 1, 1]
    still["assets"][1]["to_world"] = {"scale": 0.5}
    Path("still.json").write_text(json.dumps(still))
    yield
    launch.set_threads(0)


def frames(*arguments: object) -> list[np.ndarray]:
    """Pictures of the files."""
    return [read_linear(str(path)) for path in arguments]


def test_animation_is_an_image_sequence(capsys):
    """Numbered EXRs with PNGs beside them; each shows its moment; the JSON lists them."""
    result = run(capsys, "render", "moving.json", "--animate", "0-2", "--fps", 2, "--integrator", "path", *SMALL)
    assert [entry["frame"] for entry in result["frames"]] == [0, 1, 2] and result["fps"] == 2.0
    assert [entry["time"] for entry in result["frames"]] == [0.0, 0.5, 1.0]
    assert [entry["out"] for entry in result["frames"]] == [f"moving_{k:04d}.exr" for k in range(3)]
    assert all(entry["spp"] == 3 and entry["seconds"] > 0 for entry in result["frames"])
    assert (result["out"], result["width"], result["interrupted"]) == ("moving_####.exr", 12, False)
    for k, picture in enumerate(frames(*(entry["out"] for entry in result["frames"]))):
        bright = picture[3:5].max(axis=(0, 2))
        assert bright.max() == pytest.approx(1 + 2 * k)  # the lamp itself: 1 + 4 t
        columns = np.flatnonzero(bright > 0.99 * bright.max())
        # the lamp's middle at x = t - 1 in a picture that is 4 tan 25° wide on either side
        assert (columns.mean() + 0.5) / 12 == pytest.approx(0.5 + (k / 2 - 1) / (8 * np.tan(np.radians(25))), abs=0.05)
        assert Path(f"moving_{k:04d}.png").is_file()


def test_first_frame_is_the_picture_at_its_time(capsys):
    """A sequence that begins at frame 3 begins as `--time` 0.75 does; without either the time is 0."""
    traced = [*SMALL, "--integrator", "path"]
    run(capsys, "render", "moving.json", "--animate", "3-3", "--fps", 4, "--out", "f.exr", *traced)
    run(capsys, "render", "moving.json", "--time", 0.75, "--out", "t.exr", *traced)
    run(capsys, "render", "moving.json", "--out", "p.exr", *traced)
    run(capsys, "render", "moving.json", "--time", 0, "--out", "z.exr", *traced)
    sequence, moment, plain, zero = frames("f_0003.exr", "t.exr", "p.exr", "z.exr")
    np.testing.assert_array_equal(sequence, moment)
    np.testing.assert_array_equal(plain, zero)
    assert np.abs(moment - plain).max() > 1.0


@pytest.mark.parametrize(
    ("out", "written"),
    [
        ("shots/a_##.png", "shots/a_07.png"),
        ("a_##.exr", "a_07.exr"),
        ("a_##.png", "a_07.png"),
        ("a.hdr", "a_0007.hdr"),
        ("folder", "folder/frame_0007.exr"),
    ],
)
def test_names_of_frames(capsys, out, written):
    """A run of # in the name, a number of four digits at its end, or a folder, which is made."""
    result = run(capsys, "render", "moving.json", "--animate", "7-7", "--out", out, "--integrator", "path", *SMALL)
    assert [entry["out"] for entry in result["frames"]] == [written] and Path(written).is_file()


def test_frames_have_layers(capsys):
    """--aov: first-hit layers and views of the cache in each frame."""
    run(capsys, "render", "moving.json", "--animate", "0-1", "--fps", 1, "--aov", *SMALL)
    layers = [read_layers(f"moving_{k:04d}.exr") for k in range(2)]
    assert {"color", "albedo", "normal", "depth", "position", "material_id", "cache"} <= set(layers[1])
    assert not np.array_equal(layers[0]["material_id"], layers[1]["material_id"])


def test_finished_sequence_is_left_alone(capsys):
    """--resume of a job whose frames are all there writes nothing; a file that is missing is made again."""
    options = ["--fps", 4, "--out", "shots", "--integrator", "path", *SMALL]
    run(capsys, "render", "moving.json", "--animate", "0-2", *options)
    times = {file: file.stat().st_mtime_ns for file in Path("shots").iterdir()}
    assert Path("shots/frame_####.exr.checkpoint") in times
    for last in (2, 1):
        assert cli.main(["render", "moving.json", "--animate", f"0-{last}", "--resume", *map(str, options)]) == 0
        assert f"already complete: all {last + 1} frames are there" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in Path("shots").iterdir()} == times
    Path("shots/frame_0001.png").unlink()
    again = run(capsys, "render", "moving.json", "--animate", "0-2", "--resume", *options)
    assert [entry["frame"] for entry in again["frames"]] == [1] and Path("shots/frame_0001.png").is_file()
    assert run(capsys, "render", "moving.json", "--animate", "0-2", "--resume", *options)["frames"] == []
    line = refused(capsys, "render", "moving.json", "--animate", "2-3", "--resume", *options)
    assert "first frame (0 there, 2 here)" in line
    Path("moving.json").write_text(json.dumps({**MOVING, "camera": {**MOVING["camera"], "fov": 40}}))
    line = refused(capsys, "render", "moving.json", "--animate", "0-2", "--resume", *options)
    assert line.endswith("belongs to another render: scene has changed")


def test_killed_sequence_is_resumed(capsys, monkeypatch):
    """The first frame leaves a checkpoint, from which a job that died later goes on as if nothing had happened."""
    options = ["--animate", "0-2", "--fps", 4, *SMALL]
    write = cli_render._write_picture

    def dies(out: Path, *arguments: object) -> None:
        if "2" in out.name:
            raise RuntimeError("killed")
        write(out, *arguments)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(cli_render, "_write_picture", dies)
        run(capsys, "render", "moving.json", "--out", "a_#.exr", *options)
    resumed = run(capsys, "render", "moving.json", "--out", "a_#.exr", "--resume", *options)
    assert [entry["frame"] for entry in resumed["frames"]] == [1, 2]
    run(capsys, "render", "moving.json", "--out", "b_#.exr", *options)
    for k in range(3):
        np.testing.assert_array_equal(*frames(f"a_{k}.exr", f"b_{k}.exr"))


def test_folder_may_not_be_a_file(capsys):
    """What stands where the folder would be is named, in one line."""
    Path("taken").touch()
    line = refused(capsys, "render", "moving.json", "--animate", "0-1", "--out", "taken", *SMALL)
    assert "--out taken: cannot make folder taken: File exists" in line


def test_resumed_sequence_is_the_uninterrupted_one(capsys):
    """Frames before the checkpoint's stay as they are, later ones continue its cache: bit for bit the same."""
    options = ["--fps", 4, *SMALL]
    run(capsys, "render", "moving.json", "--animate", "0-3", "--out", "a_#.exr", *options)
    run(capsys, "render", "moving.json", "--animate", "0-1", "--out", "b_#.exr", *options)
    first = Path("b_0.exr").stat().st_mtime_ns
    resumed = run(capsys, "render", "moving.json", "--animate", "0-3", "--out", "b_#.exr", "--resume", *options)
    assert [entry["frame"] for entry in resumed["frames"]] == [2, 3]
    assert Path("b_0.exr").stat().st_mtime_ns == first
    for k in range(4):
        np.testing.assert_array_equal(*frames(f"a_{k}.exr", f"b_{k}.exr"))
    Path("b_0.exr").unlink()
    again = run(capsys, "render", "moving.json", "--animate", "0-3", "--out", "b_#.exr", "--resume", *options)
    assert [entry["frame"] for entry in again["frames"]] == [0]  # what is missing is rendered
    assert read_linear("b_0.exr").max() == pytest.approx(1.0)  # the lamp of its moment
    more = [*options[:-2], "--device", "cpu", "--max-depth", 3]
    line = refused(capsys, "render", "moving.json", "--animate", "0-3", "--out", "b_#.exr", "--resume", *more)
    assert "b_#.exr.checkpoint" in line and "tracer.max_depth" in line
    assert "checkpoint" in refused(capsys, "render", "moving.json", "--animate", "0-3", "--resume", *options)


def test_frame_has_a_sample_however_short_its_time(capsys):
    """Moving the scene counts as part of a frame's seconds; what is written is a picture nevertheless."""
    options = ["--integrator", "path", *SMALL[:4], "--device", "cpu", "--seconds", 1e-6, "--out", "a_#.exr"]
    result = run(capsys, "render", "moving.json", "--animate", "0-1", *options)
    assert [entry["spp"] for entry in result["frames"]] == [1, 1]
    assert all(picture.max() > 0.0 for picture in frames("a_0.exr", "a_1.exr"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["still.json", "--animate", "0-3"], "nothing moves in still.json"),
        (["still.json", "--time", "1"], "nothing moves in still.json"),
        (["moving.json", "--animate", "3-0"], "3-0"),
        (["moving.json", "--animate", "3"], "0-239"),
        (["moving.json", "--animate", "a-b"], "a-b"),
        (["moving.json", "--animate", "0-1", "--time", "1"], "--time"),
        (["moving.json", "--animate", "0-1", "--reference", "r.exr"], "--reference"),
        (["moving.json", "--animate", "0-1", "--out", "a_#_#.exr"], "a_#_#.exr"),
        (["moving.json", "--animate", "0-1", "--out", "none/x/a_#.exr"], "cannot make folder none/x: No such file"),
        (["moving.json", "--animate", "0-1", "--out", "none/folder"], "cannot make folder none/folder: No such file"),
        (["moving.json", "--animate", "0-1", "--out", "none/../x/"], "--out none/../x: cannot make folder"),
        (["moving.json", "--animate", "0-1", "--out", "none/a_#.gif"], ".gif"),
        (["moving.json", "--animate", "0-1", "--out", "a_#.gif"], ".gif"),
        (["moving.json", "--animate", "0-1", "--aov", "--out", "a_#.png"], "--aov"),
        (["moving.json", "--fps", "30"], "--fps needs --animate"),
        (["moving.json", "--time", "-1"], "--time -1"),
        (["moving.json", "--time", "nan"], "--time nan"),
    ],
)
def test_animate_refuses(capsys, arguments, named):
    """Exit code 2, one line that names the mistake, nothing written."""
    assert named in refused(capsys, "render", *arguments, *SMALL)


def test_interrupt_leaves_whole_frames(tmp_path):
    """Ctrl-C: only finished frames are written, the exit code is 130, and --resume completes the one under way."""
    command = [sys.executable, "-m", "nrc.cli", "render", "moving.json", "--integrator", "path", "--width", "32"]
    command += ["--height", "32", "--device", "cpu", "--spp", "40", "--fps", "100", "--out", "c_###.exr", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    process = subprocess.Popen(
        [*command, "--animate", "0-999"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        while not Path("c_001.exr").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    result = json.loads(out.splitlines()[-1])
    done = len(result["frames"])
    assert result["interrupted"] is True and 2 <= done < 1000
    assert sorted(path.name for path in tmp_path.glob("c_*.exr")) == [f"c_{k:03d}.exr" for k in range(done)]
    again = subprocess.run(
        [*command, "--animate", f"0-{done}", "--resume"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert [entry["frame"] for entry in json.loads(again.stdout.splitlines()[-1])["frames"]][-1] == done
    whole = [*command[: command.index("--out")], "--out", "w_###.exr", "--animate", f"0-{done}"]
    subprocess.run(whole, capture_output=True, check=True, env=environment, timeout=120)
    np.testing.assert_array_equal(*frames(f"c_{done:03d}.exr", f"w_{done:03d}.exr"))
