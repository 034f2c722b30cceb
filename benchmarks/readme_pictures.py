"""Draw the README's pictures: one frame and ten seconds, path traced and with the cache; the viewer's window.

    python benchmarks/readme_pictures.py docs/pictures

Prints how long a frame takes with each. The window is drawn through EGL.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nrc import assets
from nrc.device_scene import DeviceScene
from nrc.image import to_srgb8, write_image
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.viewer.app import Viewer
from nrc.viewer.window import Window

SCENE, WIDTH, HEIGHT, SECONDS = "ajar_room", 480, 270, 10.0

WINDOW, PICTURE, N_FRAMES, SPLIT = (1280, 720), (470, 360), 120, 0.4  # of the viewer


def draw_viewer(file: Path) -> None:
    """The viewer's window, split between path tracing and the cache, with pictures of half the resolution."""
    viewer = Viewer(Window(*WINDOW, "nrc", headless=True), size=PICTURE)
    try:
        viewer.open(SCENE)
        viewer.run(n_pictures=N_FRAMES)  # the cache settles
        viewer.change(split=SPLIT)
        viewer.run(n_pictures=N_FRAMES + N_FRAMES // 3)
        viewer.screenshot(file)
        viewer.messages = []
        viewer.settle()
    finally:
        viewer.close()


def main() -> None:
    """Render and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    scene = DeviceScene(assets.load(SCENE))
    for integrator in ("path", "nrc"):
        config = PathTracerConfig(integrator=integrator, max_depth=scene.scene.settings.max_depth)
        renderer = Renderer(scene, WIDTH, HEIGHT, config)
        renderer.prepare()
        start = time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            renderer.frame()
        frame = renderer.film.frame.numpy().reshape(HEIGHT, WIDTH, 3)
        write_image(folder / f"{SCENE}_{integrator}_frame.png", to_srgb8(frame))
        write_image(folder / f"{SCENE}_{integrator}.png", to_srgb8(renderer.image()))
        milliseconds = 1e3 * (time.perf_counter() - start) / renderer.film.n_frames
        print(f"{integrator}: {renderer.film.n_frames} frames of {milliseconds:.0f} ms")
    draw_viewer(folder / "viewer.png")


if __name__ == "__main__":
    main()
