"""Sessions of fits: they draw what the library draws, train between pictures, and snapshots of them look alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from small_views import SIZE, write_sphere_views

from nrc.fit import live
from nrc.fit.fitted_image import FittedImage
from nrc.fit.nerf_render import depth_picture, render_occupancy, render_view, to_bytes
from nrc.fit.sdf_render import SdfRenderer, Slice
from nrc.fit.views import Camera as ViewCamera
from nrc.image import to_srgb8
from nrc.metrics import psnr
from nrc.scene import Camera
from nrc.viewer.image_session import ImageSession
from nrc.viewer.nerf_session import NerfSession
from nrc.viewer.sdf_session import SdfSession
from nrc.viewer.session import ImageWindow, Picture, Request

SECONDS = 0.02  # of a frame
ROUNDING = 1  # of 255: the library rounds on the host what sessions round on the device
SPHERE = {
    "encoding": {"otype": "HashGrid", "n_levels": 6, "log2_hashmap_size": 13, "base_resolution": 8},
    "network": {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 1},
    "rgb_network": {"otype": "FullyFusedMLP", "n_neurons": 32, "n_hidden_layers": 1},
    "loss": {"otype": "L2"},
}
BALL = {
    "optimizer": {
        "otype": "Ema",
        "decay": 0.95,
        "nested": {"otype": "Adam", "learning_rate": 2e-3, "beta2": 0.99, "epsilon": 1e-15},
    },
    "encoding": {"otype": "HashGrid", "base_resolution": 8, "per_level_scale": 1.6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image, a mesh and photographs."""
    folder = tmp_path_factory.mktemp("sources")
    y, x = np.mgrid[:80, :120]
    waves = [0.5 + 0.4 * np.sin(0.11 * (c + 1) * x + 0.07 * y + c) for c in range(3)]
    Image.fromarray((255.0 * np.stack(waves, axis=2) + 0.5).astype(np.uint8)).save(folder / "waves.png")
    trimesh.creation.icosphere(3).export(folder / "ball.ply")
    (folder / "views").mkdir()
    write_sphere_views(folder / "views")
    return folder


@pytest.fixture(scope="module")
def image(folder: Path) -> ImageSession:
    """A session that has learned the image."""
    grid = {"n_levels": 8, "log2_hashmap_size": 12}
    return trained(ImageSession(folder / "waves.png", device="cpu", batch_size=1024, grid=grid), 100)


@pytest.fixture(scope="module")
def sdf(folder: Path) -> SdfSession:
    """A session that has learned the ball."""
    grid = {"n_levels": 5, "log2_hashmap_size": 13}
    return trained(SdfSession(folder / "ball.ply", device="cpu", config=BALL, grid=grid, batch_size=4096), 250)


@pytest.fixture(scope="module")
def nerf(folder: Path) -> NerfSession:
    """A session that has learned the photographed sphere."""
    return trained(NerfSession(folder / "views", device="cpu", batch_size=4096, config=SPHERE), 300)


def trained(session: Any, n_steps: int) -> Any:
    """The session after so many steps and two frames, during which the loss has fallen."""
    request = request_of(session)
    session.frame(request)
    first = float(session.task.step().numpy()[0])
    while session.task.n_steps < n_steps:
        session.task.step()
    assert session.frame(request).stats["loss"] < 0.7 * first
    return session


def request_of(session: Any, size: tuple[int, int] | None = (48, 36), **settings: Any) -> Request:
    """A request of the session's own camera and settings, some changed, in a viewport twice as wide and high."""
    viewport = (96, 72) if size is None else (2 * size[0], 2 * size[1])
    return Request(session.camera, None, *viewport, SECONDS, size, replace(session.settings, **settings))


def look(session: Any, **settings: Any) -> np.ndarray:
    """What the session shows without training, (height, width, 3) uint8."""
    return rgb(session.frame(request_of(session, train=False, **settings)))


def rgb(picture: Picture) -> np.ndarray:
    """(height, width, 3) uint8 of a picture on the host, which is opaque."""
    pixels = np.asarray(picture.pixels)
    assert pixels.shape == (picture.height, picture.width, 4) and pixels.dtype == np.uint8
    assert (pixels[..., 3] == 255).all()
    return pixels[..., :3]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bytes that differ by rounding alone."""
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= ROUNDING


def test_image_session_shows_the_window(image: ImageSession) -> None:
    """At 1:1 and enlarged the fit is `reconstruct`'s, the original the file's, the error their difference."""
    window = ImageWindow(60.0, 40.0, 2.0)
    ask = replace(request_of(image, size=(60, 40), train=False), width=120, height=80, window=window)
    file = image.task.source.pixels
    part = np.s_[20:60, 30:90]
    fitted = rgb(image.frame(ask))
    assert_same(fitted, image.task.fitted.reconstruct((30, 20, 90, 60)))
    assert psnr(fitted / 255.0, file[part] / 255.0) > 25.0
    original = rgb(image.frame(replace(ask, settings=replace(ask.settings, show="original"))))
    np.testing.assert_array_equal(original, file[part])
    error = rgb(image.frame(replace(ask, settings=replace(ask.settings, show="error", error_gain=3.0))))
    difference = np.abs(fitted.astype(int) - original.astype(int))
    assert np.abs(error.astype(int) - np.minimum(3 * difference, 255)).max() <= 3  # of values before rounding
    split = rgb(image.frame(replace(ask, settings=replace(ask.settings, split=0.5))))
    np.testing.assert_array_equal(split[:, :30], original[:, :30])
    assert (split[:, 30] == 255).all()
    np.testing.assert_array_equal(split[:, 31:], fitted[:, 31:])
    large = rgb(image.frame(replace(ask, size=(120, 80))))
    assert_same(large, image.task.fitted.reconstruct((30, 20, 90, 60), zoom=2.0))
    picked = image.pick(0.5, 0.25)
    assert picked is not None
    np.testing.assert_allclose(picked["position"], (60.0, 30.0, 0.0))
    np.testing.assert_allclose(picked["original"], file[30, 60] / 255.0, atol=1e-6)
    assert image.pick(1.5, 0.5) is None
    linear = image.image()
    assert linear.shape == (80, 120, 3) and linear.dtype == np.float32
    assert_same(to_srgb8(linear), large)


@pytest.mark.parametrize("show", ["shaded", "normals", "slice"])
def test_sdf_session_shows_the_surface(sdf: SdfSession, show: Any) -> None:
    """Shading, normals and slices are those of `SdfRenderer`, whose careful pictures `nrc fit` writes."""
    found = look(sdf, show=show, axis=0, offset=0.4)
    target = sdf.task.target
    renderer = SdfRenderer(sdf.task.field, target.lower, target.upper, params=sdf.task.trainer.ema_params)
    assert sdf.camera is not None
    color = renderer.render(sdf.camera, 48, 36, show=show, plane=Slice(0, 0.4), quick=True).numpy().reshape(36, 48, 3)
    expected = to_bytes(color) if show == "normals" else to_srgb8(color)
    assert_same(found, expected)
    assert (found != found[0, 0]).any(axis=2).mean() > 0.1
    picked = sdf.pick(0.5, 0.5)
    assert picked is not None
    if show == "slice":
        assert picked["position"][0] == pytest.approx(target.lower[0] + 0.4 * (target.upper - target.lower)[0], abs=0.4)
    else:
        assert np.linalg.norm(picked["position"] - 0.5) == pytest.approx(0.45, abs=0.03)
        assert np.linalg.norm(picked["file_position"]) == pytest.approx(1.0, abs=0.07)
    assert abs(picked["distance"] - picked["mesh_distance"]) < 0.02
    assert sdf.pick(0.0, 0.0) is None


def test_nerf_session_shows_what_the_library_renders(nerf: NerfSession) -> None:
    """Colour, depth, occupancy and crop are `render_view`'s and `render_occupancy`'s through the same camera."""
    field = nerf.task.use_average()
    assert nerf.camera is not None
    camera = ViewCamera.from_scene(nerf.camera, 48, 36)
    seen = render_view(field, camera)
    for background, value in (("white", 1.0), ("black", 0.0)):
        assert_same(look(nerf, background=background), to_bytes(seen.over(value)))
    assert_same(look(nerf, show="depth"), depth_picture(seen.depth, seen.alpha))
    picked = nerf.pick(0.5, 0.5)
    assert picked is not None
    direction = camera.c2w[:, :3] @ [0.5 / camera.focal[0], -0.5 / camera.focal[1], -1.0]
    direction /= np.linalg.norm(direction)
    np.testing.assert_allclose(picked["position"], camera.c2w[:, 3] + seen.depth[18, 24] * direction, atol=1e-5)
    assert_same(look(nerf, show="occupancy"), to_bytes(render_occupancy(field, camera).over(1.0)))
    crop = ((0.5, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert_same(look(nerf, crop=crop), to_bytes(render_view(field, camera, crop=crop).over(1.0)))
    assert nerf.pick(0.01, 0.01) is None
    with pytest.raises(ValueError, match="crop must"):
        nerf.frame(request_of(nerf, train=False, crop=((2.0, 2.0, 2.0), (3.0, 3.0, 3.0))))


def test_nerf_session_knows_its_photographs(nerf: NerfSession) -> None:
    """Cameras are the photographs', z is up, and the fit through one of them resembles its photograph."""
    views = nerf.task.views
    assert nerf.up == (0.0, 0.0, 1.0)
    assert len(nerf.training_cameras) == len(views) and nerf.photograph_sizes[3] == (SIZE, SIZE)
    there_and_back = ViewCamera.from_scene(nerf.training_cameras[3], SIZE, SIZE)
    np.testing.assert_allclose(there_and_back.c2w, views.c2w[3], atol=1e-6)
    np.testing.assert_allclose(there_and_back.focal, views.focal[3], rtol=1e-5)
    ask = replace(request_of(nerf, size=(SIZE, SIZE), train=False, background="black"), camera=nerf.training_cameras[3])
    photo = nerf.photograph(3)
    assert photo.shape == (SIZE, SIZE, 4)
    on_black = photo[..., :3] / 255.0 * (photo[..., 3:] / 255.0)
    assert psnr(rgb(nerf.frame(ask)) / 255.0, on_black) > 20.0
    with pytest.raises(ValueError, match="no photograph"):
        nerf.photograph(len(views))


@pytest.mark.parametrize("kind", ["image", "sdf", "nerf"])
def test_frames_train_or_rest(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame that trains takes a step; what rests grows to the viewport's size, and then costs nothing."""
    session = request.getfixturevalue(kind)
    before = session.task.n_steps
    stats = session.frame(request_of(session)).stats
    assert stats["steps"] == session.task.n_steps > before and not stats["idle"]
    assert stats["stages_ms"]["train"] > 0.0 and stats["stages_ms"]["draw"] > 0.0
    assert stats["samples_per_second"] > 0.0 and stats["n_params"] == session.task.n_params
    monkeypatch.setattr("nrc.viewer.fit_session.STILL_SECONDS", 100.0)
    still = request_of(session, size=None, train=False)
    for _ in range(20):
        picture = session.frame(still)
        if picture.stats["idle"]:
            break
    assert picture.stats["idle"] and (picture.width, picture.height) == (96, 72)
    assert session.frame(replace(still, settings=replace(still.settings))).pixels is picture.pixels
    assert session.task.n_steps == stats["steps"]
    moved = replace(still, size=(8, 8))
    assert not session.frame(moved).stats["idle"]


def test_quality_is_looked_at_now_and_then(image: ImageSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task's own measure is in the figures once it is due."""
    monkeypatch.setattr(live, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(image.training, "_progress_due", 0.0)
    stats = image.frame(request_of(image)).stats
    assert stats["psnr"] == pytest.approx(image.task.progress()["psnr"])


@pytest.mark.parametrize("kind", ["image", "sdf", "nerf"])
def test_snapshots_look_like_what_was_trained(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A snapshot shows the same picture with and without its source, and does not train."""
    session = request.getfixturevalue(kind)
    expected = look(session)
    path = tmp_path / f"{kind}.safetensors"
    session.save(path)
    opened = type(session).from_snapshot(path, device="cpu")
    assert opened.warnings == session.warnings
    assert opened.frame(request_of(session)).stats["stages_ms"]["train"] == 0.0
    np.testing.assert_array_equal(
        look(opened, background=session.settings.background) if kind == "nerf" else look(opened), expected
    )
    np.testing.assert_array_equal(opened.bounds, session.bounds)
    assert opened.up == session.up
    with pytest.raises(ValueError, match=path.name):
        opened.save(path)


def test_snapshots_without_their_source_open(
    image: ImageSession, sdf: SdfSession, nerf: NerfSession, folder: Path, tmp_path: Path
) -> None:
    """They say what is missing; the fit is shown where the original was asked for."""
    for session in (image, sdf, nerf):
        session.save(tmp_path / f"{session.kind}.safetensors")
    names = {"image": "waves.png", "sdf": "ball.ply", "nerf": "views"}
    opened: dict[str, Any] = {}
    for name in names.values():
        (folder / name).rename(folder / f"away_{name}")
    try:
        for kind, made in (("image", ImageSession), ("sdf", SdfSession), ("nerf", NerfSession)):
            opened[kind] = made.from_snapshot(tmp_path / f"{kind}.safetensors", device="cpu")
    finally:
        for name in names.values():
            (folder / f"away_{name}").rename(folder / name)
    for kind, session in opened.items():
        assert any(names[kind] in warning for warning in session.warnings)
    assert not opened["image"].has_original
    np.testing.assert_array_equal(look(opened["image"], show="original", split=0.5), look(image))
    assert opened["nerf"].training_cameras == [] and isinstance(opened["nerf"].camera, Camera)
    assert (look(opened["nerf"]) != 255).any()
    assert (look(opened["sdf"]) != look(opened["sdf"])[0, 0]).any()


@pytest.mark.parametrize("made", [ImageSession, SdfSession, NerfSession])
def test_bad_files_are_named(made: Any, tmp_path: Path, image: ImageSession) -> None:
    """Sources and snapshots that are missing, damaged or of another kind raise ValueErrors with the file's name."""
    for name in ("none.png", "none.ply", "none"):
        with pytest.raises(ValueError, match=name):
            made(tmp_path / name, device="cpu")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not a snapshot")
    other = tmp_path / "other.safetensors"
    image.task.field.save(other)
    for path in (damaged, other, tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match=path.name):
            made.from_snapshot(path, device="cpu")


def test_fitted_images_load_from_what_sessions_save(image: ImageSession, tmp_path: Path) -> None:
    """`nrc export` and others read the session's snapshot."""
    image.save(tmp_path / "a.safetensors")
    loaded = FittedImage.load(tmp_path / "a.safetensors", "cpu").reconstruct()
    np.testing.assert_array_equal(loaded, image.task.fitted.reconstruct())
