"""The viewer for minutes on end: random motion, resizes, mode switches and file loads; does it stay whole and small?

    xvfb-run -a python benchmarks/viewer_soak.py SOURCE [SOURCE ...] [--minutes 10] [--seed 0] [--device cpu]

Opens the sources in turn, a broken file among them, and does random things in between. Memory (resident set) is
compared between the second round through all sources, when everything has been compiled and allocated once, and the
last.
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
            lambda: viewer.change(view=rng.choice(VIEWS if settings.integrator != "path" else VIEWS[:4])),
            lambda: viewer.change(view="radiance"),
            lambda: viewer.change(integrator=rng.choice(("nrc", "cache", "path")), view="radiance", split=None),
            lambda: viewer.change(tone=replace(settings.tone, operator=rng.choice(get_args(Operator)))),
            lambda: viewer.change(light_gains=tuple(rng.uniform(0.0, 2.0) for _ in settings.light_gains)),
            lambda: viewer.change(cache=replace(settings.cache, encoding=rng.choice(("hash", "frequency")))),
            lambda: viewer.change(compare=rng.choice(("off", "path"))),
            lambda: viewer.worker.call(lambda session: session.reset_cache()),
        ]
    elif session is not None:
        shows = {"image": ("fitted", "original", "error"), "sdf": ("shaded", "normals", "slice")}
        choices = shows.get(session.kind, ("colour", "depth", "occupancy"))
        doable.append(lambda: viewer.change(show=rng.choice(choices)))
    return doable


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
    rounds: list[list[float]] = []
    n_actions = 0
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.glb"
        broken.write_bytes(b"glTF but not really")
        end = time.monotonic() + 60.0 * arguments.minutes
        while time.monotonic() < end:
            rounds.append([])
            for source in [*arguments.sources, str(broken)]:
                viewer.open(source)
                while viewer.worker.is_busy:
                    viewer.tick()
                leave = min(time.monotonic() + STAY_SECONDS, end)
                while time.monotonic() < leave:
                    act = time.monotonic() + ACT_SECONDS
                    while time.monotonic() < act:
                        if not viewer.tick():
                            time.sleep(0.003)
                    rng.choice(actions(viewer, rng))()
                    n_actions += 1
                rounds[-1].append(resident())
                unexpected += [
                    message.text
                    for message, _ in viewer.messages
                    if message.is_error and broken.name not in message.text
                ]
                viewer.messages = []
            print(f"round {len(rounds)}: {statistics.mean(rounds[-1]):.0f} MiB", flush=True)
    viewer.close()
    whole = [values for values in rounds if len(values) == len(arguments.sources) + 1]
    if len(whole) < 3:
        sys.exit(f"viewer_soak: {len(whole)} rounds through all sources are too few to compare; give it more minutes")
    first, last = statistics.mean(whole[1]), statistics.mean(whole[-1])
    growth = last / first - 1.0
    print(
        f"{n_actions} actions, {viewer.worker.n_pictures} pictures, {len(rounds)} rounds; memory {first:.0f} MiB in "
        f"round 2, {last:.0f} MiB in round {len(whole)}: {growth:+.1%}; {len(unexpected)} unexpected errors"
    )
    for text in unexpected:
        print(f"error: {text}")
    return 1 if unexpected or growth > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
