"""A small path tracer of its own, to which a radiance cache was added: the lines that this took end in `# nrc`.

    python examples/custom_renderer.py pictures/

Intersection, light sampling and shading are this file's: a closed room of boxes and spheres, all diffuse, whose lamp
hangs behind a partition, so that light has bounced twice or more before it reaches what the camera sees. Without the
marked lines the file is the path tracer that it was before: a test takes them out. Renders for as many seconds without
and with the cache and prints both errors against a longer run without it, which is kept in the folder.
"""
# ruff: noqa: UP018, RUF046 (float(0.0) declares a variable in Warp's kernel language)

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import warp as wp

from nrc import RadianceCache, Records, TrainingPaths, training_tiles  # nrc
from nrc.image import read_linear, write_image
from nrc.kernels.paths import TrainingTiles, has_spread, primary_footprint, spread_increment, training_slot  # nrc
from nrc.kernels.records import RecordView, TrainingView, close_path, open_record, store_record  # nrc
from nrc.launch import launch, resolve_device
from nrc.metrics import mean_bias, relmse

Pixels = wp.array[wp.vec3]
PI = wp.constant(wp.pi)
FAR, NEAR = wp.constant(1.0e30), wp.constant(1.0e-4)
MAX_DEPTH, ROULETTE_DEPTH = wp.constant(24), wp.constant(4)
EYE = wp.constant(wp.vec3(-0.4, 1.1, 2.85))
ROOM_LOWER, ROOM_UPPER = wp.constant(wp.vec3(-2.0, 0.0, -3.0)), wp.constant(wp.vec3(2.0, 2.2, 3.0))
# The lamp: a part of the ceiling behind the partition
LAMP_LOWER, LAMP_UPPER = wp.constant(wp.vec3(-1.5, 2.2, -2.4)), wp.constant(wp.vec3(-0.5, 2.2, -1.4))
LAMP_AREA = wp.constant(1.0)
LAMP_RADIANCE = wp.constant(wp.vec3(300.0, 270.0, 220.0))
SOLIDS = [  # lower and upper corner of a box, or centre and radius of a sphere; albedo
    ((-2.0, 0.0, -0.05), (1.55, 2.2, 0.05), (0.75, 0.75, 0.75)),  # the partition, open on the right
    ((-1.5, 0.0, 0.8), (-0.7, 0.9, 1.5), (0.75, 0.55, 0.25)),
    ((0.3, 0.45, 1.0), 0.45, (0.3, 0.5, 0.8)),
    ((1.2, 0.3, 0.2), 0.3, (0.8, 0.8, 0.8)),
]
for k in range(32):  # pebbles on the floor
    place, size = np.mod(0.1 + k * np.array([0.7548777, 0.5698403]), 1.0), 0.06 + 0.04 * np.sin(k)
    SOLIDS.append(((-1.9 + 3.8 * place[0], size, -2.9 + 5.8 * place[1]), size, (0.6, 0.6 - 0.01 * k, 0.3)))


@wp.struct
class Solids:
    """Boxes and spheres."""

    lower: wp.array[wp.vec3]  # of a sphere the centre
    upper: wp.array[wp.vec3]
    radius: wp.array[float]  # 0 for a box
    albedo: wp.array[wp.vec3]


@wp.struct
class Hit:
    """The nearest surface along a ray."""

    t: float
    n: wp.vec3  # on the ray's side
    albedo: wp.vec3
    emission: wp.vec3


@wp.func
def box_normal(p: wp.vec3, lower: wp.vec3, upper: wp.vec3) -> wp.vec3:
    """Outward normal of the face nearest to `p`."""
    best = FAR
    n = wp.vec3(0.0, 0.0, 0.0)
    for k in range(3):
        for side in range(2):
            distance = wp.abs(p[k] - wp.where(side == 0, lower[k], upper[k]))
            if distance < best:
                best = distance
                n = wp.vec3(0.0, 0.0, 0.0)
                n[k] = 2.0 * float(side) - 1.0
    return n


@wp.func
def box_interval(o: wp.vec3, d: wp.vec3, lower: wp.vec3, upper: wp.vec3) -> wp.vec2:
    """Where a ray enters and leaves a box."""
    near = float(-FAR)
    far = float(FAR)
    for k in range(3):
        inverse = 1.0 / wp.where(wp.abs(d[k]) < 1.0e-9, 1.0e-9, d[k])
        a = (lower[k] - o[k]) * inverse
        b = (upper[k] - o[k]) * inverse
        near = wp.max(near, wp.min(a, b))
        far = wp.min(far, wp.max(a, b))
    return wp.vec2(near, far)


@wp.func
def solid_distance(solids: Solids, i: int, o: wp.vec3, d: wp.vec3) -> float:
    """Distance to solid `i` seen from outside; FAR where the ray misses it."""
    if solids.radius[i] > 0.0:
        to_centre = solids.lower[i] - o
        along = wp.dot(to_centre, d)
        rest = solids.radius[i] * solids.radius[i] - wp.length_sq(to_centre - along * d)
        if rest < 0.0:
            return FAR
        t = along - wp.sqrt(rest)
        return wp.where(t > NEAR, t, FAR)
    interval = box_interval(o, d, solids.lower[i], solids.upper[i])
    return wp.where(interval[0] <= interval[1] and interval[0] > NEAR, interval[0], FAR)


@wp.func
def closest(solids: Solids, o: wp.vec3, d: wp.vec3) -> Hit:
    """First hit: the room's walls, unless a solid is nearer."""
    hit = Hit()
    hit.t = box_interval(o, d, ROOM_LOWER, ROOM_UPPER)[1]
    p = o + hit.t * d
    hit.n = -box_normal(p, ROOM_LOWER, ROOM_UPPER)
    hit.albedo = wp.vec3(0.75, 0.75, 0.75)
    if hit.n[0] > 0.5:
        hit.albedo = wp.vec3(0.7, 0.2, 0.15)
    below = p[0] > LAMP_LOWER[0] and p[0] < LAMP_UPPER[0] and p[2] > LAMP_LOWER[2] and p[2] < LAMP_UPPER[2]
    if hit.n[1] < -0.5 and below:
        hit.emission = LAMP_RADIANCE
    for i in range(solids.radius.shape[0]):
        t = solid_distance(solids, i, o, d)
        if t < hit.t:
            hit.t = t
            p = o + t * d
            if solids.radius[i] > 0.0:
                hit.n = wp.normalize(p - solids.lower[i])
            else:
                hit.n = box_normal(p, solids.lower[i], solids.upper[i])
            hit.albedo = solids.albedo[i]
            hit.emission = wp.vec3(0.0, 0.0, 0.0)
    return hit


@wp.func
def lamp_light(solids: Solids, p: wp.vec3, n: wp.vec3, u: float, v: float) -> wp.vec3:
    """Irradiance at `p` by one point of the lamp, over its density."""
    point = LAMP_LOWER + wp.vec3(u * (LAMP_UPPER[0] - LAMP_LOWER[0]), 0.0, v * (LAMP_UPPER[2] - LAMP_LOWER[2]))
    distance = wp.length(point - p)
    wi = (point - p) / distance
    cosines = wp.max(0.0, wp.dot(n, wi)) * wp.max(0.0, wi[1])
    if cosines > 0.0:
        for i in range(solids.radius.shape[0]):
            if solid_distance(solids, i, p, wi) < distance:
                cosines = float(0.0)
    return LAMP_RADIANCE * (cosines * LAMP_AREA / (distance * distance))


@wp.func
def cosine_direction(n: wp.vec3, u: float, v: float) -> wp.vec3:
    """Direction around `n` with density cos / pi."""
    z = 2.0 * u - 1.0
    r = wp.sqrt(wp.max(0.0, 1.0 - z * z))
    d = n + wp.vec3(r * wp.cos(2.0 * PI * v), r * wp.sin(2.0 * PI * v), z)
    return wp.normalize(wp.where(wp.length_sq(d) < 1.0e-8, n, d))


@wp.kernel(enable_backward=False)
def trace_paths(
    first: int,
    solids: Solids,
    width: int,
    height: int,
    frame: int,
    tiles: TrainingTiles,  # nrc
    threshold: float,  # nrc
    queries: RecordView,  # nrc
    weights: Pixels,  # nrc
    training: TrainingView,  # nrc
    weight: float,
    film: Pixels,  # (pixels,) weighted sum over frames
):
    """Trace one path through each pixel and add what it finds to the film. One thread per path."""
    i = first + wp.tid()
    x = i % width
    y = i // width
    rng = wp.rand_init(frame, i)
    across = (2.0 * (float(x) + wp.randf(rng)) / float(width) - 1.0) * float(width) / float(height)
    up = 1.0 - 2.0 * (float(y) + wp.randf(rng)) / float(height)
    o = EYE
    d = wp.normalize(wp.vec3(0.62 * across, 0.62 * up - 0.12, -1.0))
    L = wp.vec3(0.0, 0.0, 0.0)
    beta = wp.vec3(1.0, 1.0, 1.0)
    slot = training_slot(tiles, x, y)  # nrc
    spread, footprint, pdf = float(0.0), float(0.0), float(FAR)  # nrc
    in_suffix, tail, n_records = int(0), int(0), int(0)  # nrc
    A, B, shown = wp.vec3(0.0, 0.0, 0.0), wp.vec3(1.0, 1.0, 1.0), wp.vec3(0.0, 0.0, 0.0)  # nrc
    weights[i] = wp.vec3(0.0, 0.0, 0.0)  # nrc
    for vertex in range(MAX_DEPTH):
        hit = closest(solids, o, d)
        if hit.emission[0] > 0.0:
            if vertex == 0:
                L += hit.emission
            break
        o = o + hit.t * d + NEAR * hit.n
        spread += spread_increment(hit.t, pdf, -wp.dot(hit.n, d))  # nrc
        if vertex == 0:  # nrc
            footprint = primary_footprint(hit.t, -wp.dot(hit.n, d))  # nrc
        if has_spread(spread, footprint, threshold) and in_suffix == 0:  # nrc
            store_record(queries, i, o, -d, hit.n, 1.0, hit.albedo, wp.vec3(0.0, 0.0, 0.0))  # nrc
            weights[i] = beta  # nrc
            if slot < 0:  # nrc
                break  # nrc
            in_suffix, spread, shown, beta = int(1), float(0.0), L, wp.vec3(1.0, 1.0, 1.0)  # nrc
        elif has_spread(spread, footprint, threshold):  # nrc
            if wp.randf(rng) > 0.7:  # or go on, to train where suffixes end  # nrc
                store_record(training.tail, slot, o, -d, hit.n, 1.0, hit.albedo, wp.vec3(0.0, 0.0, 0.0))  # nrc
                tail = int(1)  # nrc
                break  # nrc
            spread = float(0.0)  # nrc
        if vertex >= ROULETTE_DEPTH:
            q = wp.min(wp.max(beta), 0.95)
            if wp.randf(rng) >= q:
                break
            beta = beta / q
            B = B / q  # nrc
        if slot >= 0 and n_records < training.max_records:  # nrc
            place = open_record(training, slot, n_records, A, B)  # nrc
            store_record(training.records, place, o, -d, hit.n, 1.0, hit.albedo, wp.vec3(0.0, 0.0, 0.0))  # nrc
            n_records, A, B = n_records + 1, wp.vec3(0.0, 0.0, 0.0), wp.vec3(1.0, 1.0, 1.0)  # nrc
        irradiance = lamp_light(solids, o, hit.n, wp.randf(rng), wp.randf(rng))
        L += wp.cw_mul(beta, wp.cw_mul(hit.albedo / PI, irradiance))
        A += wp.cw_mul(B, wp.cw_mul(hit.albedo / PI, irradiance))  # nrc
        d = cosine_direction(hit.n, wp.randf(rng), wp.randf(rng))
        pdf = wp.dot(hit.n, d) / PI  # nrc
        beta = wp.cw_mul(beta, hit.albedo)
        B = wp.cw_mul(B, hit.albedo)  # nrc
    L = wp.where(in_suffix == 1, shown, L)  # nrc
    close_path(training, slot, n_records, A, B, tail)  # nrc
    film[i] += weight * L


@wp.kernel(enable_backward=False)  # nrc
def add_answers(first: int, beta: Pixels, radiance: Pixels, weight: float, film: Pixels):  # nrc
    i = first + wp.tid()  # one thread per pixel  # nrc
    film[i] += weight * wp.cw_mul(beta[i], radiance[i])  # nrc


class Renderer:
    """Adds up frames of one path per pixel."""

    def __init__(
        self,
        width: int,
        height: int,
        device: str | None = None,
        seed: int = 0,
        with_cache: bool = False,  # nrc
    ) -> None:
        self.width, self.height, self.device, self.seed = width, height, resolve_device(device), seed
        self.solids = Solids()
        lower, upper, albedo = zip(*SOLIDS, strict=True)
        radius = [0.0 if isinstance(u, tuple) else u for u in upper]
        upper = [u if isinstance(u, tuple) else (0.0, 0.0, 0.0) for u in upper]
        for name, values in (("lower", lower), ("upper", upper), ("albedo", albedo)):
            setattr(self.solids, name, wp.array(np.float32(values), dtype=wp.vec3, device=self.device))
        self.solids.radius = wp.array(radius, dtype=float, device=self.device)
        n = width * height
        self.film = wp.zeros(n, dtype=wp.vec3, device=self.device)
        self.n_frames, self.total_weight = 0, 0.0
        self.n_paths = n // 10 if with_cache else 0  # nrc
        self.queries, self.paths = Records(n, self.device), TrainingPaths(self.n_paths, 8, self.device)  # nrc
        self.weights, self.answers = (wp.zeros(n, dtype=wp.vec3, device=self.device) for _ in range(2))  # nrc
        self.cache = RadianceCache((ROOM_LOWER, ROOM_UPPER), max_queries=n, max_records=n, device=self.device)  # nrc

    def frame(self) -> None:
        """Trace one path per pixel."""
        film, device, weight = self.film, self.device, 1.0
        weight = min(1.0, (self.n_frames + 1) / 100) if self.n_paths else weight  # dark at first  # nrc
        self.paths.clear()  # nrc
        launch(
            trace_paths,
            len(film),
            inputs=[
                self.solids,
                self.width,
                self.height,
                self.seed + self.n_frames,
                training_tiles(self.width, self.height, self.n_paths, self.n_frames),  # nrc
                0.01 if self.n_paths else FAR,  # nrc
                self.queries.view,  # nrc
                self.weights,  # nrc
                self.paths.view,  # nrc
                weight,
                film,
            ],
            device=device,
        )
        if self.n_paths:  # nrc
            self.cache.train_paths(self.paths)  # nrc
            self.cache.query(self.queries, out=self.answers)  # nrc
            launch(add_answers, len(film), inputs=[self.weights, self.answers, weight, film], device=device)  # nrc
        self.n_frames += 1
        self.total_weight += weight

    def render(self, seconds: float) -> np.ndarray:
        """(height, width, 3) mean of the frames of so many seconds, after one that compiles."""
        self.frame()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.frame()
            wp.synchronize_device(self.device)
        return (self.film.numpy() / self.total_weight).reshape(self.height, self.width, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the pictures; a reference_WxH.exr in it is used")
    parser.add_argument("--size", type=int, nargs=2, default=(144, 96), metavar=("W", "H"))
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--reference-seconds", type=float, default=12.0)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING
    folder, size, device = arguments.folder, arguments.size, arguments.device
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"reference_{size[0]}x{size[1]}.exr"
    if not file.exists():
        write_image(file, Renderer(*size, device, 1 << 20).render(arguments.reference_seconds))
    reference = read_linear(file)
    renderers = {"without": Renderer(*size, device)}
    renderers["with_cache"] = Renderer(*size, device, with_cache=True)  # nrc
    for name, renderer in renderers.items():
        picture = renderer.render(arguments.seconds)
        write_image(folder / f"{name}.png", picture)
        error, bias = relmse(picture, reference), 100 * mean_bias(picture, reference)
        print(f"{name}: {renderer.n_frames} frames in {arguments.seconds:g} s, relMSE {error:.4f}, mean {bias:+.1f} %")
    write_image(folder / "reference.png", reference)


if __name__ == "__main__":
    main()
