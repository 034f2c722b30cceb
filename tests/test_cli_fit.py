"""`nrc fit`, `nrc eval`, `nrc export` and `nrc sweep`: what they print and write, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import numpy as np
import pytest
import trimesh
from commands import run
from PIL import Image
from small_views import write_sphere_views

import nrc
from nrc import launch
from nrc.fit import FitError, fit_image, sdf
from nrc.image import read_image, read_layers
from nrc.snapshot import save_tensors

SMALL = {
    "encoding": {"otype": "HashGrid", "n_levels": 6, "log2_hashmap_size": 12, "base_resolution": 8},
    "network": {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 1},
    "rgb_network": {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 1},
    "batch_size": 2048,
}
RAW_DISTANCE = {**SMALL, "optimizer": {"otype": "Adam", "learning_rate": 1e-2}}
CPU = ["--device", "cpu"]
ALL_KEYS = {"seconds", "steps", "n_params"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Run in an empty folder; leave the number of threads as it was."""
    monkeypatch.chdir(tmp_path)
    yield
    launch.set_threads(0)


def refused(capsys, *arguments: object) -> str:
    """As `commands.refused`, on the CPU unless the arguments say otherwise."""
    return commands.refused(capsys, *arguments, *([] if "--device" in arguments else CPU))


def write_picture(path: str, width: int = 48, height: int = 32) -> None:
    v, u = np.mgrid[0:height, 0:width]
    Image.fromarray(np.stack([5 * u, 7 * v, 120 + 0 * u], axis=-1).astype(np.uint8)).save(path)


def write_config(name: str = "small.json", config: dict | None = None) -> list[str]:
    Path(name).write_text(json.dumps(config or SMALL))
    return ["--config", name, *CPU]


def test_image_is_fitted_evaluated_and_exported(capsys):
    """All three commands agree with each other about a small picture."""
    write_picture("p.png")
    fitted = run(capsys, "fit", "image", "p.png", "--steps", 300, *write_config())
    assert fitted["out"] == "p_fit" and fitted["steps"] == 300 and fitted["psnr"] > 30.0
    assert json.loads(Path("p_fit/result.json").read_text()) == fitted
    snapshot = Path("p_fit/snapshot.safetensors")
    again = run(capsys, "eval", "p_fit", *CPU)  # a run's folder stands for its snapshot
    for key in ALL_KEYS | {"psnr", "ssim"}:
        assert again[key] == fitted[key]
    run(capsys, "export", snapshot, "--region", 10, 4, 30, 20, "--out", "crop.png", *CPU)
    whole = read_image(fitted["pictures"]["reconstruction"])
    np.testing.assert_array_equal(read_image("crop.png"), whole[4:20, 10:30])
    run(capsys, "export", snapshot, "--zoom", 2, "--out", "large.exr", *CPU)
    assert read_image("large.exr").shape == (64, 96, 3)
    more = run(capsys, "fit", "image", "p.png", "--steps", 310, "--resume", "--no-measure", *write_config())
    assert more["steps"] == 310 and more["seconds"] > fitted["seconds"]
    assert more["psnr"] > 30.0 and "ssim" not in more and "pictures" not in more


def test_mesh_is_fitted_evaluated_and_exported(capsys, monkeypatch):
    """A ball's distance; its mesh comes back in the file's own units."""
    for name, small in (("N_EVALUATE", 1 << 15), ("N_COMPARED", 1 << 12), ("RESOLUTION", 64), ("PICTURE_SIZE", 100)):
        monkeypatch.setattr(sdf, name, small)
    trimesh.creation.icosphere(subdivisions=3, radius=5.0).apply_translation([10.0, 0.0, 0.0]).export("ball.ply")
    fitted = run(capsys, "fit", "sdf", "ball.ply", "--steps", 400, *write_config(config=RAW_DISTANCE))
    assert fitted["iou"] > 0.95
    snapshot = Path("ball_fit/snapshot.safetensors")
    again = run(capsys, "eval", snapshot, *CPU)
    for key in ALL_KEYS | {"iou", "chamfer"}:
        assert again[key] == fitted[key]
    result = run(capsys, "export", snapshot, "--resolution", 40, "--out", "again.obj", *CPU)
    mesh = trimesh.load("again.obj")
    assert result["triangles"] == len(mesh.faces) > 1000
    np.testing.assert_allclose(mesh.bounds, [[5.0, -5.0, -5.0], [15.0, 5.0, 5.0]], atol=0.3)
    run(capsys, "export", snapshot, "--out", "ball.png", *CPU)
    assert read_image("ball.png").std() > 10.0


def test_views_are_fitted_evaluated_and_exported(capsys):
    """A sphere from photographs: metrics, a view with depth, frames along a path, a mesh in the data's world."""
    Path("views").mkdir()
    write_sphere_views(Path("views"))
    fitted = run(capsys, "fit", "nerf", "views", "--steps", 300, "--batch-size", 8192, *write_config())
    assert fitted["psnr"] > 18.0 and fitted["psnr_black"] > 18.0 and len(fitted["images"]) == 2
    snapshot = Path("views_fit/snapshot.safetensors")
    again = run(capsys, "eval", snapshot, *CPU)
    for key in ALL_KEYS | {"psnr", "psnr_black", "ssim"}:
        assert again[key] == fitted[key]
    run(capsys, "export", snapshot, "--view", 1, "--out", "view.exr", *CPU)
    layers = read_layers("view.exr")
    assert layers["color"].shape == (32, 32, 4) and layers["depth"].max() > 0.5
    frames = json.loads(Path("views/transforms_test.json").read_text())["frames"]
    Path("keys.json").write_text(json.dumps([{"transform_matrix": f["transform_matrix"]} for f in frames]))
    arguments = ["--camera-path", "keys.json", "--frames", 3, "--width", 20, "--height", 16, "--out", "frames"]
    assert run(capsys, "export", snapshot, *arguments, *CPU)["frames"] == 3
    assert read_image("frames/frame_0002.png").shape == (16, 20, 3)
    run(capsys, "export", snapshot, "--resolution", 48, "--out", "sphere.glb", *CPU)
    radii = np.linalg.norm(trimesh.load("sphere.glb", force="mesh").vertices, axis=1)  # with shells inside
    assert len(radii) > 100 and abs(np.quantile(radii, 0.99) - 1.0) < 0.3


def test_adaptive_blocks_are_an_encoding_of_images(capsys):
    """--encoding acorn fits, resumes and evaluates as the others do."""
    write_picture("p.png")
    fitted = run(capsys, "fit", "image", "p.png", "--encoding", "acorn", "--steps", 3, "--batch-size", 1024, *CPU)
    again = run(capsys, "eval", "p_fit/snapshot.safetensors", *CPU)
    for key in ALL_KEYS | {"psnr", "ssim"}:
        assert again[key] == fitted[key]
    line = refused(capsys, "export", "p_fit/snapshot.safetensors", "--out", "x.png")
    assert "not a snapshot that can be exported, but of 'acorn'" in line


def test_sweep_writes_a_table(capsys):
    """Every combination is a row."""
    write_picture("p.png")
    config = {"network": SMALL["network"], "batch_size": 512}
    arguments = ["--log2-hashmap-size", 8, 10, "--n-levels", 2, 4, "--steps", 5]
    result = run(capsys, "sweep", "image", "p.png", *arguments, *write_config(config=config))
    assert [(row["log2_hashmap_size"], row["n_levels"]) for row in result["rows"]] == [(8, 2), (8, 4), (10, 2), (10, 4)]
    assert Path("p_sweep/table.csv").is_file() and Path("p_sweep/plot.png").is_file()


def broken_views(**frame: object) -> None:
    Path("views").mkdir()
    Path("views/a.png").write_bytes(b"")
    write_picture("views/a.png")
    entry = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist(), **frame}
    Path("views/transforms.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": [entry, entry]}))


def truncated_picture() -> None:
    write_picture("whole.png", 300, 200)
    Path("p.png").write_bytes(Path("whole.png").read_bytes()[:600])


def nan_picture() -> None:
    from nrc.image import write_image

    image = np.ones((8, 8, 3), np.float32)
    image[2, 3, 1] = np.nan
    write_image("p.exr", image)


BAD_INPUT = {
    "no image": (lambda: None, ["image", "p.png"], ["p.png", "No such file"]),
    "truncated PNG": (truncated_picture, ["image", "p.png"], ["p.png"]),
    "NaN pixels": (nan_picture, ["image", "p.exr"], ["p.exr", "finite"]),
    "not an image": (lambda: Path("p.png").write_text("hello"), ["image", "p.png"], ["p.png"]),
    "no mesh": (lambda: None, ["sdf", "m.obj"], ["m.obj", "No such file"]),
    "empty mesh": (lambda: Path("m.obj").write_text("v 0 0 0\n"), ["sdf", "m.obj"], ["m.obj", "no triangles"]),
    "degenerate triangles": (
        lambda: Path("m.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\nf 1 1 2\n"),
        ["sdf", "m.obj"],
        ["m.obj", "degenerate"],
    ),
    "flat mesh": (
        lambda: Path("m.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"),
        ["sdf", "m.obj"],
        ["m.obj", "encloses nothing"],
    ),
    "no views": (lambda: None, ["nerf", "views"], ["views", "no such file or folder"]),
    "missing images": (lambda: broken_views(file_path="b.png"), ["nerf", "views"], ["transforms.json", "none of"]),
    "singular camera": (
        lambda: broken_views(transform_matrix=np.zeros((4, 4)).tolist()),
        ["nerf", "views"],
        ["transforms.json", "frames[0]"],
    ),
    "wrong JSON type": (lambda: broken_views(transform_matrix="eye"), ["nerf", "views"], ["transform_matrix"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(capsys, case):
    """Exit code 2, one line that names the file and what is wrong with it, nothing written."""
    prepare, arguments, named = BAD_INPUT[case]
    prepare()
    line = refused(capsys, "fit", *arguments, "--steps", 1)
    assert all(word in line for word in named), line


def test_options_that_do_not_fit_are_one_line(capsys):
    """A configuration of wrong types, a snapshot that no fit wrote, an option of another kind of fit."""
    write_picture("p.png")
    Path("bad.json").write_text('{"encoding": {"otype": "HashGrid", "n_levels": "many"}}')
    assert "n_levels" in refused(capsys, "fit", "image", "p.png", "--config", "bad.json", "--steps", 1)
    Path("bad.json").write_text('{"encoding": ')
    assert "bad.json: line 1" in refused(capsys, "fit", "image", "p.png", "--config", "bad.json", "--steps", 1)
    assert "cuda:77" in refused(capsys, "fit", "image", "p.png", "--steps", 1, "--device", "cuda:77")
    assert "missing.safetensors" in refused(capsys, "eval", "missing.safetensors")
    field = nrc.Field(2, 3, SMALL["encoding"], SMALL["network"], device="cpu")
    field.save("field.safetensors")
    assert "no fit wrote" in refused(capsys, "eval", "field.safetensors")
    run(capsys, "fit", "image", "p.png", "--steps", 1, *write_config())
    line = refused(capsys, "fit", "image", "p.png", "--steps", 2, "--resume", "--config", "small.json", "--seed", 3)
    assert "belongs to another run: seed (1337 there, 3 here)" in line
    Path("p.png").rename("moved.png")
    assert "--source says where it is now" in refused(capsys, "eval", "p_fit")
    Path("moved.png").rename("p.png")
    line = refused(capsys, "export", "p_fit/snapshot.safetensors", "--resolution", 3, "--out", "x.ply")
    assert "resolution does not apply" in line
    assert "inside 48x32" in refused(
        capsys, "export", "p_fit/snapshot.safetensors", "--region", 0, 0, 99, 9, "--out", "x.png"
    )
    assert "seed must not be negative" in refused(capsys, "fit", "image", "p.png", "--steps", 1, "--seed", -1)
    with pytest.raises(FitError, match="downscale does not apply to a fit of kind image"):
        fit_image("p.png", downscale=2)
    Path("bad.json").write_text('{"encoding": {"otype": "HashGrid", "base_resolution": 0}}')
    assert "base_resolution" in refused(capsys, "fit", "image", "p.png", "--config", "bad.json", "--steps", 1)


@pytest.mark.parametrize("name", ["kind", "lower", "upper", "offset", "scale", "source", "seed", "sha256"])
@pytest.mark.parametrize("value", [None, [1], {"a": 1}, -1.0, [[0.0], [0.0], [0.0]], [1e30, 0.0, 0.0]])
def test_crafted_distance_is_refused(capsys, name, value):
    """A snapshot whose entry `fit` has a wrong type or no mesh's numbers is one line for both commands."""
    if (name, value) == ("offset", [1e30, 0.0, 0.0]):
        value = [1.0, 2.0]
    fit = {"kind": "sdf", "source": "m.obj", "sha256": "", "seed": 1, "scale": 1.0, "offset": [0.0, 0.0, 0.0]}
    fit |= {"lower": [0.25, 0.25, 0.25], "upper": [0.75, 0.75, 0.75], name: value}
    field = nrc.Field(3, 1, SMALL["encoding"], SMALL["network"], device="cpu")
    save_tensors("s.safetensors", {"params": field.params.numpy()}, field.config() | {"fit": fit}, kind="nrc.field")
    for arguments in (["eval"], ["export", "--out", "m.ply"]):
        assert "s.safetensors: fit: " in refused(capsys, arguments[0], "s.safetensors", *arguments[1:])


def test_sixteen_bits_are_exported_as_floats(capsys):
    """A fit of 16-bit values goes into EXR without a detour over 8 bits."""
    ramp = np.linspace(0.0, 65535.0, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save("p.png")
    run(capsys, "fit", "image", "p.png", "--steps", 50, *write_config())
    run(capsys, "export", "p_fit/snapshot.safetensors", "--out", "p.exr", *CPU)
    assert len(np.unique(read_image("p.exr"))) > 1000
