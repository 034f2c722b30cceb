"""The viewer for minutes on end: random motion, resizes, mode switches and file loads; does it stay whole and small?

    xvfb-run -a python benchmarks/viewer_soak.py SOURCE [SOURCE ...] [--minutes 10] [--seed 0] [--device cpu]

Opens the sources in turn, a broken file among them, and does random things in between. Memory (resident set) is
compared between the first round through all sources and the last; before the first, everything that can be done with
every source has been done, so that its kernels are compiled and its memory is allocated.
Exits with 1 where an exception reached the window's thread, an unexpected error was shown, or memory grew by 5 %.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import warp as wp

from nrc.display import Operator
from nrc.viewer.app import Viewer
from nrc.viewer.scene_session import VIEWS
from nrc.viewer.window import Window

STAY_SECONDS = 8.0  # with each source
ACT_SECONDS = 0.25  # between two random actions
WARM_UP = 3  # times that everything is done first
MOST_GROWTH = 0.05


def resident() -> float:
    """Resident memory of this process [MiB]."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def actions(viewer: Viewer, rng: random.Random) -> list[Callable[[], Any]]:
    """What can be done with what is on display."""
    from pyglet.window import key, mouse

    window, session = viewer.window.native, viewer.session
    width, height = viewer.window.size

    def drag() -> None:
        button = rng.choice((mouse.LEFT, mouse.RIGHT))
        x, y = rng.randrange(20, max(width - 400, 40)), rng.randrange(20, height - 20)
        window.dispatch_event("on_mouse_press", x, y, button, 0)
        for _ in range(rng.randrange(1, 12)):
            window.dispatch_event("on_mouse_drag", x, y, rng.randint(-30, 30), rng.randint(-20, 20), button, 0)
            viewer.tick()
        window.dispatch_event("on_mouse_release", x, y, button, 0)

    def press(symbol: int) -> None:
        for event in ("on_key_press", "on_key_release"):
            window.dispatch_event(event, symbol, 0)

    def click() -> None:
        x, y = rng.randrange(20, max(width - 400, 40)), rng.randrange(20, height - 20)
        for event in ("on_mouse_press", "on_mouse_release"):
            window.dispatch_event(event, x, y, mouse.LEFT, 0)

    doable: list[Callable[[], Any]] = [
        drag,
        drag,
        drag,
        click,
        lambda: window.dispatch_event("on_mouse_scroll", width // 3, height // 2, 0, rng.uniform(-2.0, 2.0)),
        lambda: press(rng.choice((key.TAB, key.H, key.R, key.F, key.SPACE, key.X, key.W, key.D))),
        lambda: viewer.window.resize(rng.randrange(500, 1300), rng.randrange(300, 800)),
    ]
    settings = viewer.settings
    if session is not None and session.kind == "scene":
        doable += [
            lambda: viewer.change(view=rng.choice(VIEWS)),
            lambda: viewer.change(view="radiance"),
            lambda: viewer.change(integrator=rng.choice(("nrc", "cache", "path"))),
            lambda: viewer.change(tone=replace(settings.tone, operator=rng.choice(get_args(Operator)))),
            lambda: viewer.change(light_gains=tuple(rng.uniform(0.0, 2.0) for _ in settings.light_gains)),
            lambda: viewer.change(cache=replace(settings.cache, encoding=rng.choice(("hash", "frequency")))),
            lambda: viewer.change(compare=rng.choice(("off", "path"))),
            viewer.reset_cache,
        ]
    elif session is not None:
        shows = {"image": ("fitted", "original", "error"), "sdf": ("shaded", "normals", "slice")}
        choices = shows.get(session.kind, ("colour", "depth", "occupancy"))
        doable.append(lambda: viewer.change(show=rng.choice(choices)))
    return doable


def look_at(viewer: Viewer, source: str) -> None:
    """Open a source and wait until that has worked or failed."""
    viewer.open(source)
    while viewer.worker.is_busy:
        viewer.tick()


def go_on(viewer: Viewer, seconds: float) -> None:
    """Let time pass in the window."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not viewer.tick():
            time.sleep(0.003)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--headless", action="store_true")
    arguments = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING
    rng = random.Random(arguments.seed)
    viewer = Viewer(Window(1100, 700, "soak", headless=arguments.headless), device=arguments.device)
    unexpected: list[str] = []
    rounds: list[float] = []  # mean resident memory [MiB]
    n_actions = 0
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.glb"
        broken.write_bytes(b"glTF but not really")
        for source in arguments.sources:
            look_at(viewer, source)
            for _ in range(WARM_UP):
                for i in range(len(actions(viewer, rng))):
                    actions(viewer, rng)[i]()
                    go_on(viewer, ACT_SECONDS)
        print(f"after the warm-up: {resident():.0f} MiB", flush=True)
        begin = time.monotonic()
        while time.monotonic() < begin + 60.0 * arguments.minutes:
            sizes = []
            for source in [*arguments.sources, str(broken)]:
                look_at(viewer, source)
                leave = time.monotonic() + STAY_SECONDS
                while time.monotonic() < leave:
                    rng.choice(actions(viewer, rng))()
                    go_on(viewer, ACT_SECONDS)
                    n_actions += 1
                sizes.append(resident())
                errors = [message.text for message, _ in viewer.messages if message.is_error]
                unexpected += [text for text in errors if broken.name not in text]
                viewer.messages = []
            rounds.append(statistics.mean(sizes))
            print(f"round {len(rounds)}: {rounds[-1]:.0f} MiB", flush=True)
    viewer.close()
    first, last = rounds[0], rounds[-1]
    growth = last / first - 1.0
    print(
        f"{n_actions} actions, {viewer.worker.n_pictures} pictures, {len(rounds)} rounds; memory {first:.0f} MiB in "
        f"the first, {last:.0f} MiB in the last: {growth:+.1%}; {len(unexpected)} unexpected errors"
    )
    for text in unexpected:
        print(f"error: {text}")
    return 1 if unexpected or growth > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
