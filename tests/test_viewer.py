"""The viewer in a real window: opened, resized, driven by events, compared with the library's own pictures, closed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nrc import assets
from nrc.image import read_image, read_linear, to_srgb8
from nrc.metrics import psnr
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer

pytest.importorskip("pyglet", reason="the viewer's packages are not installed (pip install 'nrc[viewer]')")
pytest.importorskip("imgui_bundle", reason="the viewer's packages are not installed (pip install 'nrc[viewer]')")

PATIENCE = 120.0  # seconds that anything may take on a busy machine, first compilation included
SAME = 45.0  # dB: the window's picture and the library's, which differ by one rounding to eight bits
SIZE = (160, 120)  # of pictures
MANY = 30  # samples that take so long that no start over is missed between two looks


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    """A display: the one there is, or a virtual one of this module's own."""
    if os.environ.get("DISPLAY"):
        yield os.environ["DISPLAY"]
        return
    if shutil.which("Xvfb") is None:
        pytest.skip("there is no display, and no Xvfb to make one")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1600x1000x24", "-nolisten", "tcp"]
    process = subprocess.Popen(command, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as pipe:
        number = pipe.readline().strip()
    assert number, "Xvfb did not start"
    os.environ["DISPLAY"] = f":{number}"
    try:
        yield os.environ["DISPLAY"]
    finally:
        del os.environ["DISPLAY"]
        process.terminate()
        process.wait()


@pytest.fixture
def viewer(display: str) -> Iterator[object]:
    """A viewer in a window, without a source."""
    from nrc.viewer.app import Viewer
    from nrc.viewer.window import Window

    viewer = Viewer(Window(800, 600, "test"), size=SIZE, device="cpu")
    yield viewer
    viewer.close()


def until(viewer, condition: Callable[[], bool]) -> None:
    """Run the window until something has happened."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        viewer.tick()
        time.sleep(0.001)


def opened(viewer, source: str) -> None:
    """Open `source` and wait for its first picture."""
    viewer.open(source)
    until(viewer, lambda: viewer.session is not None and viewer.picture is not None and not viewer.worker.is_busy)
    assert not [message for message, _ in viewer.messages if message.is_error]


def drag(viewer, start: tuple[int, int], end: tuple[int, int], button: int) -> None:
    """Press, move in steps, release, and let the window take the events; y is up, as pyglet has it."""
    window = viewer.window.native
    window.dispatch_event("on_mouse_press", *start, button, 0)
    previous = start
    for i in range(1, 5):
        now = tuple(round(a + (b - a) * i / 4) for a, b in zip(start, end, strict=True))
        window.dispatch_event("on_mouse_drag", *now, now[0] - previous[0], now[1] - previous[1], button, 0)
        previous = now
    window.dispatch_event("on_mouse_release", *end, button, 0)
    viewer.tick()


def press(viewer, key: int) -> None:
    """Hit a key and let the window take the event."""
    for event in ("on_key_press", "on_key_release"):
        viewer.window.native.dispatch_event(event, key, 0)
    viewer.tick()


def test_picture_is_the_librarys_own(viewer, tmp_path: Path) -> None:
    """After n frames the window shows what n frames of a Renderer with the same seed give."""
    viewer.worker.limit = 8
    viewer.open("cornell_box")
    until(viewer, lambda: viewer.stats.get("spp") == 8)
    png, exr = tmp_path / "a.png", tmp_path / "a.exr"
    viewer.viewport_screenshot(png)
    viewer.viewport_screenshot(exr)
    viewer.settle()
    scene = assets.load("cornell_box")
    config = PathTracerConfig("nrc", max_depth=scene.settings.max_depth, rr_depth=scene.settings.rr_depth)
    renderer = Renderer(scene, *SIZE, config, device="cpu")
    for _ in range(8):
        renderer.frame()
    expected = renderer.image()
    np.testing.assert_allclose(read_linear(exr), expected, rtol=1e-5, atol=1e-6)
    shown, library = read_image(png)[..., :3], to_srgb8(expected)
    assert psnr(shown / 255.0, library / 255.0) > SAME


def test_window_shows_the_picture(viewer, tmp_path: Path) -> None:
    """A picture of the viewport's size is in the window pixel by pixel."""
    viewer.show_panels = False
    viewer.size = (800, 600)
    opened(viewer, "cornell_box")
    viewer.worker.limit = viewer.worker.n_pictures + 1
    until(viewer, lambda: viewer._n_shown == viewer.worker.limit)
    window, picture = tmp_path / "window.png", tmp_path / "picture.png"
    viewer.viewport_screenshot(picture)
    viewer.screenshot(window)
    viewer.settle()
    shot, shown = read_image(window)[..., :3], read_image(picture)[..., :3]
    assert shot.shape == (600, 800, 3) and shown.max() == 255
    np.testing.assert_array_equal(shot[100:500], shown[100:500])  # between figures and messages


def test_dragging_orbits_and_starts_the_picture_over(viewer) -> None:
    """The camera turns about its pivot at the same distance; samples are counted anew."""
    from pyglet.window import mouse

    opened(viewer, "cornell_box")
    until(viewer, lambda: viewer.stats["spp"] > MANY)
    before = viewer.camera
    drag(viewer, (200, 300), (260, 320), mouse.LEFT)
    until(viewer, lambda: viewer.stats["spp"] < MANY)
    assert not np.allclose(viewer.camera.to_world, before.to_world)
    assert viewer.picked is None  # a drag is no click


def test_every_button_and_the_wheel_move_the_camera(viewer) -> None:
    """Right drags pan, the wheel dollies, W flies, R goes back."""
    from pyglet.window import key, mouse

    opened(viewer, "cornell_box")
    first = viewer.camera.to_world.copy()

    def eye() -> np.ndarray:
        return viewer.camera.to_world[:3, 3].copy()

    moves = {
        "pan": lambda: drag(viewer, (200, 300), (240, 300), mouse.RIGHT),
        "dolly": lambda: viewer.window.native.dispatch_event("on_mouse_scroll", 200, 300, 0, 2),
        "fly": lambda: viewer.window.native.dispatch_event("on_key_press", key.W, 0),
    }
    for name, move in moves.items():
        before = eye()
        move()
        until(viewer, lambda before=before: not np.allclose(eye(), before))
        assert name
    viewer.window.native.dispatch_event("on_key_release", key.W, 0)
    press(viewer, key.R)
    np.testing.assert_allclose(viewer.camera.to_world, first, atol=1e-12)


def test_click_picks_what_is_there(viewer) -> None:
    """A click gives the object and point that the first-hit layers have there; F turns to it."""
    from pyglet.window import key, mouse

    opened(viewer, "cornell_box")
    left, top, right, bottom = viewer.picture_box
    x, y = round(left + 0.5 * (right - left)), round(top + 0.75 * (bottom - top))
    drag(viewer, (x, 600 - y), (x, 600 - y), mouse.LEFT)
    until(viewer, lambda: viewer.picked is not None)
    renderer = Renderer(assets.load("cornell_box"), *SIZE, PathTracerConfig("path"), device="cpu")
    u, v = viewer._fractions(x, y)
    position = renderer.aovs()["position"][int(v * SIZE[1]), int(u * SIZE[0])]
    assert np.linalg.norm(viewer.picked["position"] - position) < 0.05
    press(viewer, key.F)
    at = viewer.project(np.asarray(viewer.picked["position"], float))
    np.testing.assert_allclose(at, (left + (right - left) / 2, top + (bottom - top) / 2), atol=0.5)


def test_keys_change_integrator_and_split(viewer) -> None:
    """1 traces paths alone, 2 asks the cache again, which kept what it learned; X splits the view."""
    from pyglet.window import key

    opened(viewer, "cornell_box")
    until(viewer, lambda: viewer.stats.get("rounds", 0) >= 3)
    press(viewer, key._1)
    until(viewer, lambda: "rounds" not in viewer.stats)
    press(viewer, key._2)
    until(viewer, lambda: viewer.stats.get("rounds", 0) > 3)
    until(viewer, lambda: viewer.stats["spp"] > MANY)
    press(viewer, key.X)
    assert viewer.settings.split == 0.5
    until(viewer, lambda: viewer.stats["spp"] < MANY)


def test_view_of_the_cache_waits_for_a_cache(viewer) -> None:
    """Path tracing shows radiance in its place; with the cache back it returns."""
    from pyglet.window import key

    opened(viewer, "cornell_box")
    viewer.change(view="query_vertex")
    press(viewer, key._1)
    until(viewer, lambda: "rounds" not in viewer.stats)
    assert viewer.settings.shown_view == "radiance"
    press(viewer, key._2)
    until(viewer, lambda: "rounds" in viewer.stats)
    assert viewer.settings.shown_view == "query_vertex"
    assert not [message.text for message, _ in viewer.messages if message.is_error]


def test_animation_plays_pauses_and_is_scrubbed(viewer, tmp_path: Path) -> None:
    """T starts and stops time; at a time one sees that pose through the scene's own camera."""
    from pyglet.window import key

    opened(viewer, "opening_door")
    assert viewer.timeline.duration == 8.0 and viewer.timeline.follows_camera
    press(viewer, key.T)
    until(viewer, lambda: viewer.settings.time > 0.2)
    press(viewer, key.T)
    stopped = viewer.settings.time
    until(viewer, lambda: viewer.stats["spp"] > 2)
    assert viewer.settings.time == stopped and not viewer.timeline.is_playing
    viewer.change(integrator="path")
    viewer.timeline.seek(6.0)
    viewer.worker.limit = None
    until(viewer, lambda: viewer.session._shown.time == 6.0 and viewer.stats["spp"] == 1)
    exr = tmp_path / "pose.exr"
    viewer.viewport_screenshot(exr)
    viewer.settle()
    pose = assets.load("opening_door").at(6.0)
    renderer = Renderer(pose, *SIZE, PathTracerConfig("path"), device="cpu")
    for _ in range(64):
        renderer.frame()
    block = renderer.image().reshape(6, 20, 8, 20, 3).mean(axis=(1, 3))
    seen = read_linear(exr).reshape(6, 20, 8, 20, 3).mean(axis=(1, 3))
    assert np.corrcoef(np.log(block.ravel() + 1e-3), np.log(seen.ravel() + 1e-3))[0, 1] > 0.8


def test_dragging_leaves_the_animated_camera_where_it_stands(viewer) -> None:
    """From then on time goes on and the camera is the user's, who began where the scene's was."""
    from pyglet.window import mouse

    opened(viewer, "opening_door")
    viewer.timeline.seek(8.0)
    until(viewer, lambda: viewer.session._shown.time == 8.0 and viewer.picture.camera is viewer.session._pose.camera)
    expected = assets.load("opening_door").at(8.0).camera.to_world[:3, 3]
    drag(viewer, (200, 300), (201, 300), mouse.RIGHT)
    assert not viewer.timeline.follows_camera
    assert np.linalg.norm(viewer.camera.to_world[:3, 3] - expected) < 0.05
    camera = viewer.camera
    viewer.timeline.toggle()
    until(viewer, lambda: viewer.settings.time > 0.1)
    assert viewer.camera is camera


def test_timeline_loops_or_stops_at_the_end() -> None:
    """Time wraps at the end or rests there, and begins again from the start; a still scene has none."""
    from nrc.viewer.timeline import Timeline

    timeline = Timeline(duration=2.0)
    timeline.toggle()
    timeline.advance(2.5)
    assert timeline.time == pytest.approx(0.5) and timeline.is_playing and not timeline.follows_camera
    timeline.loops = False
    timeline.advance(3.0)
    assert timeline.time == 2.0 and not timeline.is_playing
    timeline.toggle()
    assert timeline.time == 0.0 and timeline.is_playing
    timeline.seek(9.0)
    assert timeline.time == 2.0 and not timeline.is_playing
    still = Timeline()
    still.toggle()
    assert not still.is_playing


def test_fixed_size_has_a_viewport_of_its_shape(display: str) -> None:
    """What pictures are scaled to, and what drags and clicks are measured by, has their shape, in the middle."""
    from nrc.viewer.app import Viewer
    from nrc.viewer.window import NullWindow

    viewer = Viewer(NullWindow(940, 600), size=(200, 50), panels=False, device="cpu")
    try:
        opened(viewer, "cornell_box")
        assert (viewer._asked.width, viewer._asked.height) == (940, 235)
        assert viewer.picture_box == viewer.frame_box == (0.0, 182.5, 940.0, 417.5)
        assert viewer._fractions(470.0, 300.0) == (0.5, 0.5) and viewer._fractions(470.0, 100.0) is None
    finally:
        viewer.close()


def test_path_may_be_cleared_while_it_is_scrubbed(viewer) -> None:
    """The camera is free again, also where the path was being recorded."""
    from nrc.viewer.camera_path import CameraPath

    opened(viewer, "cornell_box")
    viewer.playback.path.add(viewer.camera)
    viewer.playback.path.add(viewer.camera)
    viewer.playback.seek(0.5)
    viewer.playback.set_path(CameraPath())
    viewer.tick()
    assert viewer.camera is viewer.navigation.camera
    viewer.playback.record(viewer.camera)
    viewer.playback.set_path(CameraPath())
    assert not viewer.playback.is_recording


def test_escape_dismisses_a_message_before_anything_is_open(viewer) -> None:
    """An error about the first source goes away as others do."""
    from pyglet.window import key

    viewer.open("missing.glb")
    until(viewer, lambda: bool(viewer.messages))
    press(viewer, key.ESCAPE)
    assert not viewer.messages


def test_failing_panel_leaves_a_message_and_the_window(viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, however often the panel is drawn, and the next panel is drawn again."""
    from nrc.viewer import panels

    def fail(_viewer) -> None:
        raise KeyError("what is not there")

    opened(viewer, "cornell_box")
    with monkeypatch.context() as patch:
        patch.setattr(panels, "_draw_output", fail)
        rounds = viewer._rounds
        until(viewer, lambda: viewer._rounds > rounds + 5)
        assert ["not there" in message.text for message, _ in viewer.messages if message.is_error] == [True]
    shown = viewer._n_shown
    until(viewer, lambda: viewer._n_shown > shown)


class Recorder:
    """A session that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def frame(self, request):
        from nrc.viewer.session import Picture

        self.asked.append(request)
        return Picture(np.zeros((1, 1, 4), np.uint8), 1, 1, {"idle": True})


def test_worker_answers_nothing_that_was_asked_before_it_settled() -> None:
    """A request made between a call that changes settings and its `then` is dropped; a limit may be raised later."""
    from nrc.viewer.session import Request
    from nrc.viewer.worker import Worker

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.001)

    worker, session, taken = Worker(), Recorder(), []
    old, new = (Request(None, None, 1, 1, seconds=seconds, size=None, settings=None) for seconds in (1.0, 2.0))
    try:
        worker.session = session
        worker.call(lambda _: None, taken.append, settled=True)
        wait(lambda: bool(worker._results))
        worker.ask(old)
        time.sleep(0.05)
        assert not session.asked and not taken
        worker.limit = 1
        worker.take_results()
        worker.ask(new)
        wait(lambda: bool(session.asked))
        time.sleep(0.05)
        assert taken == [None] and session.asked == [new]
        worker.limit = None
        wait(lambda: len(session.asked) > 1)
        assert old not in session.asked
    finally:
        worker.stop()


def test_worker_says_what_fails_in_the_window() -> None:
    """An exception in a `then` becomes a message."""
    from nrc.viewer.worker import Worker

    worker = Worker()
    try:
        worker.call(lambda _: 0, lambda x: 1 // x)
        while not worker._results:
            time.sleep(0.001)
        assert [message.is_error for message in worker.take_results()] == [True]
    finally:
        worker.stop()


def test_resized_window_asks_for_its_own_size(viewer) -> None:
    """Pictures that adapt have the viewport's shape, before and after a resize."""
    viewer.size = None
    opened(viewer, "cornell_box")
    for width, height in ((800, 600), (600, 500)):
        viewer.window.resize(width, height)
        until(viewer, lambda size=(width, height): viewer.window.size == size)
        _, _, w, h = viewer.viewport
        until(viewer, lambda ratio=w / h: abs(viewer.picture.width / viewer.picture.height / ratio - 1.0) < 0.03)


def test_bad_file_leaves_a_message_and_the_picture(viewer, tmp_path: Path) -> None:
    """The message names the file; what was on display goes on."""
    opened(viewer, "cornell_box")
    broken = tmp_path / "broken.glb"
    broken.write_bytes(b"not a model")
    viewer.window.native.dispatch_event("on_file_drop", 10, 10, [str(broken)])
    until(viewer, lambda: any(message.is_error for message, _ in viewer.messages))
    assert "broken.glb" in next(message.text for message, _ in viewer.messages if message.is_error)
    shown = viewer._n_shown
    until(viewer, lambda: viewer._n_shown > shown)
    assert viewer.session.name == "cornell_box"


def test_cache_survives_saving_and_loading(viewer, tmp_path: Path) -> None:
    """A saved cache dropped on its scene goes on where it was."""
    from nrc.viewer.opening import holds_cache

    opened(viewer, "cornell_box")
    until(viewer, lambda: viewer.stats.get("rounds", 0) >= 5)
    file = tmp_path / "cache.safetensors"
    viewer.save(file)
    viewer.settle()
    assert holds_cache(file) and not holds_cache(tmp_path / "missing.safetensors")
    viewer.reset_cache()
    until(viewer, lambda: viewer.stats["rounds"] < 5)
    viewer.open(str(file))
    until(viewer, lambda: viewer.stats["rounds"] > 5)


def test_lights_and_materials_change_live(viewer) -> None:
    """Twice the light is twice the radiance without the cache; a picked object takes another colour."""
    from dataclasses import replace

    viewer.show_panels = False
    opened(viewer, "cornell_box")
    viewer.change(integrator="path")
    until(viewer, lambda: viewer.stats["spp"] == 4)
    images = []
    for gain in (1.0, 2.0):
        viewer.change(light_gains=(gain,) * len(viewer.session.light_names))
        viewer.worker.limit = None
        until(viewer, lambda gain=gain: viewer.worker._request.settings.light_gains[0] == gain)
        viewer.worker.call(_restart)
        viewer.worker.call(lambda session, n=4: [session.frame(viewer._asked) for _ in range(n)])
        viewer.worker.call(lambda session: images.append(session.image()))
        viewer.settle()
    assert abs(images[1].mean() / images[0].mean() - 2.0) < 0.1
    material = viewer.session._base.materials[0]
    viewer.change(materials=((0, replace(material, kind="diffuse", base_color=(0.0, 0.0, 1.0))),))
    before = viewer._n_shown
    until(viewer, lambda: viewer._n_shown > before + 2)
    assert viewer.session._renderer.scene.scene.meshes[0].material == len(viewer.session._base.materials)


def _restart(session) -> None:
    session._renderer.restart()


def test_input_is_handled_while_frames_compute(viewer) -> None:
    """The window takes an event and draws long before a slow frame is done."""
    viewer.size = (1024, 768)
    viewer.open("cornell_box")
    until(viewer, lambda: viewer.session is not None and viewer.worker.session is not None)
    ticks, pictures = 0, viewer.worker.n_pictures
    until(viewer, lambda: viewer.worker.n_pictures > pictures)
    pictures = viewer.worker.n_pictures
    while viewer.worker.n_pictures == pictures:
        viewer.tick()
        ticks += 1
    assert ticks > 3


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`nrc view` as a command."""
    command = [sys.executable, "-m", "nrc.cli", "view", "--device", "cpu", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=2 * PATIENCE, env={**os.environ, **environment}, check=False
    )


def test_command_in_a_window(display: str, tmp_path: Path) -> None:
    """--frames ends it, both screenshots are written, the figures are printed."""
    import json

    window, picture = tmp_path / "window.png", tmp_path / "picture.png"
    done = run(
        "cornell_box", "--frames", "5", "--size", "160x120", "--screenshot", str(window),
        "--viewport-screenshot", str(picture), "--window", "640x480", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["spp"] == 5 and figures["first_picture_seconds"] > 0.0
    assert read_image(window).shape[:2] == (480, 640) and read_image(picture).shape[:2] == (120, 160)


def test_command_without_a_display(tmp_path: Path) -> None:
    """--headless writes the picture through EGL or without any window, and says so."""
    picture = tmp_path / "picture.png"
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    command = [
        sys.executable, "-m", "nrc.cli", "view", "--device", "cpu", "cornell_box", "--headless", "--frames", "3",
        "--size", "80x60", "--viewport-screenshot", str(picture),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert read_image(picture).shape[:2] == (60, 80)


def test_command_begins_where_it_is_told(display: str) -> None:
    """The first picture of --time is of that moment; with --play time goes on from there."""
    from nrc.viewer.app import Viewer
    from nrc.viewer.window import NullWindow

    for play in (False, True):
        viewer = Viewer(NullWindow(160, 120), size=(32, 24), device="cpu", start_time=3.0, play=play)
        try:
            viewer.open("opening_door")
            viewer.run(n_pictures=1)
            assert viewer.timeline.is_playing == play and 3.0 <= viewer.session._shown.time < 8.0
            assert viewer.session._shown.time == 3.0 or play
            until(viewer, lambda play=play, viewer=viewer: viewer.timeline.time > 3.2 or not play)
            opened(viewer, "opening_door")  # the next one begins as always
            assert viewer.timeline.time == 0.0 and not viewer.timeline.is_playing
        finally:
            viewer.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cornell_box", "--headless", "--frames", "1", "--time", "1"], "nothing moves in"),
        (["cornell_box", "--headless", "--frames", "1", "--play"], "nothing moves in"),
        (["opening_door", "--time", "nan"], "--time nan"),
        (["opening_door", "--time", "-1"], "--time -1"),
        (["missing.glb", "--headless", "--frames", "1"], "missing.glb"),
        (["cornell_box", "--headless"], "--frames"),
        (["cornell_box", "--screenshot", "x.png"], "--frames"),
        (["cornell_box", "--headless", "--frames", "1", "--viewport-screenshot", "nowhere/x.png"], "nowhere"),
    ],
)
def test_command_refuses_in_one_line(arguments: list[str], expected: str) -> None:
    """Mistakes are one line naming what is wrong, and exit code 2."""
    done = run(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
def test_pixels_stay_on_the_gpu(tmp_path: Path) -> None:
    """A CUDA picture goes through a registered buffer into the window, pixel by pixel."""
    from nrc.viewer.app import Viewer
    from nrc.viewer.window import Window

    viewer = Viewer(Window(800, 600, "test", headless=True), size=(800, 600), device="cuda:0", panels=False)
    try:
        opened(viewer, "cornell_box")
        viewer.worker.limit = viewer.worker.n_pictures + 1
        until(viewer, lambda: viewer._n_shown == viewer.worker.limit)
        assert viewer.picture.pixels.device.is_cuda
        window, picture = tmp_path / "window.png", tmp_path / "picture.png"
        viewer.viewport_screenshot(picture)
        viewer.screenshot(window)
        viewer.settle()
        shot, shown = read_image(window)[..., :3], read_image(picture)[..., :3]
        assert shown.max() == 255
        np.testing.assert_array_equal(shot[100:500], shown[100:500])
    finally:
        viewer.close()
