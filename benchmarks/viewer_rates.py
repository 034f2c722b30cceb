"""How fast the viewer is: picture size at a frame rate while the camera moves, stages, answers to input, start.

    xvfb-run -a python benchmarks/viewer_rates.py [SCENE ...] [--fps 10] [--seconds 20] [--device cpu] [--json FILE]

For every scene a window of 1280 x 720 orbits all the time. The size is the median over the pictures of the second half;
the answer time is from an injected mouse event to the end of the drawing that follows it. Start is the whole command
`nrc view SCENE --frames 1`, with an empty kernel cache and again with a filled one, and the time from opening the scene
to its first picture in it. Without a display: `--headless` (EGL).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import warp as wp

from nrc.viewer.app import Viewer
from nrc.viewer.window import Window

WINDOW = (1280, 720)


def measure_motion(scene: str, fps: float, seconds: float, device: str | None, headless: bool) -> dict[str, Any]:
    """Figures of a window that orbits for some time."""
    from pyglet.window import mouse

    viewer = Viewer(Window(*WINDOW, "rates", headless=headless), fps=fps, device=device)
    try:
        viewer.open(scene)
        while viewer.session is None or viewer.worker.is_busy:
            viewer.tick()
            fail_on_error(viewer)
        window, answers, frames = viewer.window.native, [], []
        window.dispatch_event("on_mouse_press", 300, 300, mouse.LEFT, 0)
        start, shown = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            event = time.perf_counter()
            window.dispatch_event("on_mouse_drag", 300, 300, 1, 0, mouse.LEFT, 0)
            if viewer.tick():
                answers.append(time.perf_counter() - event)
            if viewer.worker.n_pictures != shown and viewer.picture is not None:
                shown = viewer.worker.n_pictures
                frames.append((time.perf_counter(), viewer.picture, viewer.stats))
            time.sleep(0.005)
        fail_on_error(viewer)
        half = frames[len(frames) // 2 :]
        areas = sorted((picture.width * picture.height, picture.width, picture.height) for _, picture, _ in half)
        _, width, height = areas[len(areas) // 2]
        names = half[-1][2]["stages_ms"]
        return {
            "scene": Path(scene).parent.name if scene.endswith(".xml") else scene,
            "device": str(viewer.session.device) if viewer.session is not None else "",
            "aim_fps": fps,
            "fps": (len(half) - 1) / (half[-1][0] - half[0][0]),
            "width": width,
            "height": height,
            "stages_ms": {
                name: statistics.median(stats["stages_ms"].get(name, 0.0) for _, _, stats in half) for name in names
            },
            "answer_ms": {
                "median": 1e3 * statistics.median(answers),
                "p99": 1e3 * sorted(answers)[int(0.99 * (len(answers) - 1))],
                "longest": 1e3 * max(answers),
            },
        }
    finally:
        viewer.close()


def fail_on_error(viewer: Viewer) -> None:
    errors = [message.text for message, _ in viewer.messages if message.is_error]
    if errors:
        sys.exit(f"viewer_rates: {errors[0]}")


def measure_start(scene: str, device: str | None, headless: bool) -> dict[str, Any]:
    """Seconds of the whole command for one picture, with an empty kernel cache, then with a filled one."""
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "nrc.cli", "view", scene, "--frames", "1", "--json"]
            command += ["--device", device] if device else []
            command += ["--headless"] if headless else []
            start = time.perf_counter()
            environment = {**os.environ, "WARP_CACHE_PATH": cache}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            whole = time.perf_counter() - start
            figures = json.loads(done.stdout.splitlines()[-1])
            rows[name] = {"command_seconds": whole, "first_picture_seconds": figures["first_picture_seconds"]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", nargs="*", default=["cornell_box", "ajar_room"])
    parser.add_argument("--fps", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of motion for each scene")
    parser.add_argument("--device")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING
    motion = []
    for scene in arguments.scenes:
        row = measure_motion(scene, arguments.fps, arguments.seconds, arguments.device, arguments.headless)
        motion.append(row)
        stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
        print(
            f"{row['scene']}: {row['width']}x{row['height']} at {row['fps']:.1f} frames/s (aim {arguments.fps:g}); "
            f"ms: {stages}; answers to input: median {row['answer_ms']['median']:.1f} ms, "
            f"99 % within {row['answer_ms']['p99']:.1f} ms, longest {row['answer_ms']['longest']:.1f} ms",
            flush=True,
        )
    start = measure_start(arguments.scenes[0], arguments.device, arguments.headless)
    for name, row in start.items():
        print(
            f"{name} start: first picture {row['first_picture_seconds']:.1f} s after opening, "
            f"whole command {row['command_seconds']:.1f} s"
        )
    if arguments.json is not None:
        report = {
            "date": date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "versions": {name: version(name) for name in ("nrc", "warp-lang", "pyglet", "imgui-bundle")},
            "motion": motion,
            "start": start,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
