"""How many frames the cache needs after a light switch, a camera cut, and after looking away, with nothing reset.

    python benchmarks/adaptation.py glossy_room ajar_room cornell_box --seeds 3 --json

Each run renders until the cache has settled, changes something, and follows the error mean |nrc - path|, over the mean
brightness with the light on, from picture to picture: 0, 1, 2, ... frames after the change. Both pictures are averaged
over blocks of 16 x 16 pixels first, and the cache stands still while a picture of several samples is taken, so that
the figure is about the cache and not about the noise of a single frame. The scenarios:

    light_off  the brightest emissive material goes dark; with --all, all light
    light_on   it comes back
    cut        the camera jumps to a part of the scene not seen before
    away_back  the camera jumps there, stays for --away frames, and comes back

Each once as it is and once with `Renderer.cut` at every change; with --replay also with that share of the batches drawn
from records of past frames, without and with cuts. A figure is the first frame from which on two pictures are within a
tenth of the error right after the change: of that error itself ("to 10 %"), and of what lies above the error that stays
("excess"), which is the mean of the last quarter of pictures, the smallest of all ways'. Medians over seeds. "lost", of
another view, is how much of what an untrained cache lacks the change cost: where it is small there is nothing to
recover, and the frames are noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import warp as wp

from nrc import assets
from nrc.cache import CacheConfig
from nrc.cli_arguments import add_device, positive_int, use_threads
from nrc.device_scene import DeviceScene
from nrc.launch import resolve_device
from nrc.pathtracer import PathTracerConfig
from nrc.renderer import Renderer
from nrc.scene import Camera, Scene

BLOCK = 16  # [px]
DARK = 64  # frames without the light before it comes back
# Views of what the scenes' own cameras do not show, by scene: origin and target
OTHER_VIEWS = {
    "glossy_room": ((-0.9, 1.6, -3.7), (0.5, 1.0, 3.5)),
    "ajar_room": ((0.8, 1.5, -4.7), (-2.6, 1.0, -3.1)),
    "cornell_box": ((0.6, 1.7, -0.85), (-0.5, 0.3, 0.9)),
}
SCENARIOS = ("light_off", "light_on", "cut", "away_back")


@dataclass(frozen=True, eq=False)
class View:
    """A scene as it is lit, and a camera."""

    scene: DeviceScene
    camera: Camera


@dataclass(frozen=True)
class Run:
    """What one run saw.

    Attributes:
        errors: Of the pictures at `picture_frames`.
        before: Of a picture of the same view before the first change, where there was one.
        untrained: Of a cache that knows nothing.
    """

    errors: np.ndarray
    before: float | None
    untrained: float


def switch_off(scene: Scene, everything: bool) -> Scene:
    """The scene without its brightest emitter, or without any."""
    emitting = [i for i, material in enumerate(scene.materials) if material.emits]
    if not emitting:
        raise SystemExit("this scene has no emissive material")
    power = [
        sum(scene.materials[i].emission) * sum(len(mesh.indices) for mesh in scene.meshes if mesh.material == i)
        for i in emitting
    ]
    off = set(emitting) if everything else {emitting[int(np.argmax(power))]}
    materials = tuple(
        replace(material, emission=(0.0, 0.0, 0.0)) if i in off else material
        for i, material in enumerate(scene.materials)
    )
    if everything:
        return replace(scene, materials=materials, lights=(), environment=None)
    return replace(scene, materials=materials)


def blocks(image: np.ndarray) -> np.ndarray:
    """Means over BLOCK x BLOCK pixels."""
    h, w = (n // BLOCK for n in image.shape[:2])
    return image[: h * BLOCK, : w * BLOCK].reshape(h, BLOCK, w, BLOCK, 3).mean(axis=(1, 3))


def picture(renderer: Renderer, spp: int) -> np.ndarray:
    """Blocks of the view with the cache as it is, which does not learn meanwhile."""
    renderer.train = False
    renderer.restart()
    for _ in range(spp):
        renderer.frame()
    renderer.train = True
    return blocks(renderer.image())


def picture_frames(n: int) -> np.ndarray:
    """Frames after which pictures are taken: all at first, then every second, then every fourth."""
    return np.array([i for i in range(n + 1) if i <= 8 or (i <= 32 and i % 2 == 0) or i % 4 == 0])


def first_within(errors: np.ndarray, limit: float, frames: np.ndarray) -> int | None:
    """Frame of the first of two pictures in a row within the limit."""
    within = errors <= limit
    found = np.flatnonzero(within[:-1] & within[1:])
    return int(frames[found[0]]) if len(found) else None


class Study:
    """The scenarios of one scene at one picture size, with their references."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        scene = assets.load(name)
        self.size = (arguments.width, arguments.height)
        self.config = PathTracerConfig(max_depth=scene.settings.max_depth)
        on = DeviceScene(scene, arguments.device)
        off = on.replaced(switch_off(scene, arguments.all))
        origin, target = OTHER_VIEWS[name]
        there = Camera.look_at(origin, target, fov=70.0)
        self.home, self.dark, self.other = View(on, scene.camera), View(off, scene.camera), View(on, there)
        self._references: dict[View, np.ndarray] = {}
        self._settled: dict[CacheConfig, dict[str, np.ndarray]] = {}  # states of renderers that have seen `home`

    def stations(self, scenario: str) -> list[tuple[View, int]]:
        """Views after `home`, and for how many frames; pictures are taken at the last."""
        n = self.arguments.frames
        return {
            "light_off": [(self.dark, n)],
            "light_on": [(self.dark, DARK), (self.home, n)],
            "cut": [(self.other, n)],
            "away_back": [(self.other, self.arguments.away), (self.home, n)],
        }[scenario]

    def reference(self, view: View) -> np.ndarray:
        """Path-traced blocks of a view."""
        if view not in self._references:
            renderer = Renderer(view.scene, *self.size, replace(self.config, integrator="path"))
            renderer.prepare()
            renderer.set_camera(view.camera)
            self._references[view] = picture(renderer, self.arguments.reference_spp)
        return self._references[view]

    def run(self, scenario: str, seed: int, *, cut: bool, replay: float) -> Run:
        """One run of a scenario, with `Renderer.cut` at every change or without."""
        a, stations = self.arguments, self.stations(scenario)
        last, n_frames = stations[-1]
        reference = self.reference(last)
        scale = float(self.reference(self.other if scenario == "cut" else self.home).mean())
        cache = CacheConfig(seed=CacheConfig.seed + seed, replay=replay)
        renderer = Renderer(self.home.scene, *self.size, replace(self.config, seed=seed), cache=cache)
        renderer.prepare()

        def show(view: View) -> None:
            renderer.set_scene(view.scene)
            renderer.set_camera(view.camera)

        def error() -> float:
            return float(np.abs(picture(renderer, a.spp) - reference).mean()) / scale

        show(last)
        untrained = error()
        show(self.home)
        if cache not in self._settled:
            for _ in range(a.before):
                renderer.frame()
            self._settled[cache] = renderer.state()
        renderer.load_state(self._settled[cache])
        before = error() if last is self.home else None
        errors = []
        for view, n in stations:
            show(view)
            if view is last:
                errors.append(error())
            if cut:
                renderer.cut(keep_records=not scenario.startswith("light"))
            if view is not last:
                for _ in range(n):
                    renderer.frame()
        for start, end in itertools.pairwise(picture_frames(n_frames)):
            for _ in range(end - start):
                renderer.frame()
            errors.append(error())
        return Run(np.array(errors), before, untrained)

    def figures(self, scenario: str) -> list[dict[str, Any]]:
        """Medians over seeds, one row for each way."""
        a, frames = self.arguments, picture_frames(self.arguments.frames)
        ways = {"as is": (False, 0.0), "cut": (True, 0.0)}
        if a.replay > 0.0:
            ways |= {"replay": (False, a.replay), "cut, replay": (True, a.replay)}
        runs = {
            way: [self.run(scenario, seed, cut=cut, replay=replay) for seed in range(a.seeds)]
            for way, (cut, replay) in ways.items()
        }
        quarter = -(len(frames) // 4)
        stays = min(float(np.mean([run.errors[quarter:].mean() for run in group])) for group in runs.values())

        def middle(values: list[int | None]) -> int | None:
            found = median(a.frames + 1 if value is None else value for value in values)
            return None if found > a.frames else int(found)

        rows = []
        for way, group in runs.items():
            first = [float(run.errors[0]) for run in group]
            plain = [first_within(run.errors, 0.1 * e, frames) for run, e in zip(group, first, strict=True)]
            excess = [
                first_within(run.errors, stays + 0.1 * max(e - stays, 0.0), frames)
                for run, e in zip(group, first, strict=True)
            ]
            lost = [(e - stays) / (run.untrained - stays) for run, e in zip(group, first, strict=True)]
            at = {n: median(float(np.interp(n, frames, run.errors)) for run in group) for n in (4, 8, 16, 32)}
            rows.append(
                {
                    "way": way,
                    "frames_to_10_percent": middle(plain),
                    "frames_of_excess_to_10_percent": middle(excess),
                    "frames_of_excess_to_10_percent_by_seed": excess,
                    "error_before": median(run.before for run in group if run.before is not None)
                    if group[0].before is not None
                    else None,
                    "error_after_change": median(first),
                    **{f"error_after_{n}": error for n, error in at.items()},
                    "error_stays": stays,
                    "error_untrained": median(run.untrained for run in group),
                    "lost": None if scenario.startswith("light") else median(lost),
                }
            )
        return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", nargs="*", metavar="scene", help=f"of {', '.join(OTHER_VIEWS)}; all by default")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--width", type=positive_int, default=160)
    parser.add_argument("--height", type=positive_int, default=90)
    parser.add_argument("--before", type=positive_int, default=160, help="frames before the change")
    parser.add_argument("--frames", type=positive_int, default=96, help="frames after it")
    parser.add_argument("--away", type=positive_int, default=120, help="frames elsewhere before coming back")
    parser.add_argument("--spp", type=positive_int, default=4, help="samples per pixel of a picture")
    parser.add_argument("--reference-spp", type=positive_int, default=256)
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--replay", type=float, default=0.0, help="share of the batches, to compare with none")
    parser.add_argument("--all", action="store_true", help="switch off every light")
    parser.add_argument("--json", action="store_true")
    add_device(parser)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.scenes) - set(OTHER_VIEWS))
    if unknown:
        parser.error(f"no second view of {', '.join(unknown)}; there are {', '.join(OTHER_VIEWS)}")
    use_threads(arguments)

    rows = []
    for name in arguments.scenes or OTHER_VIEWS:
        study = Study(name, arguments)
        for scenario in arguments.scenarios:
            for row in study.figures(scenario):
                rows.append({"scene": name, "scenario": scenario} | row)
    print("scene        scenario   way           lost  error: change     4     8    16    32  stays  to 10 %  excess")
    for row in rows:
        errors = [row["error_after_change"], *(row[f"error_after_{n}"] for n in (4, 8, 16, 32)), row["error_stays"]]
        counts = [row["frames_to_10_percent"], row["frames_of_excess_to_10_percent"]]
        lost = "-" if row["lost"] is None else f"{100.0 * row['lost']:.0f} %"
        print(
            f"{row['scene']:12} {row['scenario']:10} {row['way']:11} {lost:>6}         "
            + " ".join(f"{error:.3f}" for error in errors)
            + "".join(f"{'-' if n is None else n:>8}" for n in counts)
        )
    if arguments.json:
        device = resolve_device(arguments.device)
        about = {"machine": platform.processor() or platform.machine(), "device": str(device), "warp": wp.__version__}
        print(json.dumps(about | {"arguments": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
