"""Temporal accumulation: where a pixel's surface was a frame ago, what it looked like, and how much of that to keep.

The temporal half of SVGF (Schied et al. 2017): backward reprojection of the first hit, four taps that each must show
the same surface, a running mean that becomes an exponential one. Where light changes, a test over a window of pixels
decides how much history to drop; what the new frame shows around a pixel takes its place.
"""

import warp as wp

from nrc.kernels.bsdf import Albedo, bsdf_albedo, bsdf_roughness
from nrc.kernels.camera import CameraView, camera_ray
from nrc.kernels.film import is_valid
from nrc.kernels.intersect import Hit, ray_closest
from nrc.kernels.light import environment_radiance
from nrc.kernels.sampling import luminance, max_component, to_local
from nrc.kernels.scene import (
    MAX_ALPHA_LAYERS,
    SceneView,
    Surface,
    find_surface,
    hit_normal,
    hit_opacity,
    hit_position,
    pass_through,
    triangle_edges,
    triangle_normal,
)
from nrc.kernels.trace import INFINITE

wp.set_module_options({"enable_backward": False})

NO_OBJECT = wp.constant(-1)
# How much of other objects a pixel shows besides what is at its centre.
INSIDE = wp.constant(0)  # nothing, and neither do the centres of its eight neighbours
BESIDE = wp.constant(1)  # nothing, but centres of neighbours do
MIXED = wp.constant(2)
MIN_TAP_WEIGHT = wp.constant(0.01)  # of accepted taps together, below which a pixel has no history (SVGF)
OWN_SAMPLES = wp.constant(4)
MIN_OWN = wp.constant(0.02)  # least component to divide by
MIN_CONTRAST = wp.constant(1.0e-3)  # between neighbours' own colours, for which they are averaged over the pixel
MIN_TURN = wp.constant(1.0e-5)  # of a reflection, in rounding
WINDOW = wp.constant(11)  # [px] side of the square over which light is tested for changes
MIN_TESTED = wp.constant(4.0)  # [frames] shorter histories do not know their noise, and are soon forgotten anyway
NOISE_FLOOR = wp.constant(0.3)  # least deviation of frames over their mean
MIN_DEVIATION = wp.constant(1.0e-6)
RESTART_FRAMES = wp.constant(3.0)  # [frames] what a square of new pixels counts in the place of a dropped history
RESTART_RADIUS = wp.constant(2)  # [px] of that square


@wp.struct
class TemporalParams:
    """What stays the same for all pixels."""

    min_alpha: float  # weight of a new frame in a long history
    cos_normal: float  # least cosine between normals of one surface
    plane_distance: float  # largest distance from the tangent plane, relative to the distance from the camera
    mirror_history: float  # [frames] longest history of a mirror whose reflection moves
    t_keep: float  # statistic up to which all history is kept
    t_drop: float  # statistic from which on none is


@wp.struct
class GuideView:
    """What tells surfaces apart."""

    position: wp.array[wp.vec3]  # (pixels,) world space [scene units]
    normal: wp.array[wp.vec3]  # (pixels,) interpolated, before maps
    object: wp.array[int]  # (pixels,) index into the scene's meshes, NO_OBJECT where nothing is hit
    instance: wp.array[int]  # (pixels,) as in `Hit`
    border: wp.array[int]  # (pixels,) INSIDE, BESIDE or MIXED


@wp.struct
class HistoryView:
    """What is remembered of a pixel, divided by its own colour."""

    color: wp.array[wp.vec3]  # (pixels,)
    moments: wp.array[wp.vec2]  # (pixels,) means of the frames' luminance and of its square
    length: wp.array[float]  # (pixels,) [frames], 0 for none


@wp.struct
class Restart:
    """What takes the place of a dropped history."""

    color: wp.vec3
    moments: wp.vec2
    frames: float  # what it counts, 0 for nothing


@wp.func
def visible_hit(scene: wp.ref[SceneView], origin: wp.vec3, d: wp.vec3) -> Hit:
    """Closest hit of a surface that is at least half opaque."""
    o = origin
    hit = Hit()
    for _ in range(MAX_ALPHA_LAYERS):
        hit = ray_closest(scene.accel, o, d, INFINITE)
        if hit.face < 0:
            break
        if hit_opacity(scene, hit) >= 0.5:
            break
        o = pass_through(scene, hit, o, d)
    return hit


@wp.func
def project(camera: CameraView, v: wp.vec3) -> wp.vec3:
    """Where the camera sees the direction `v` from its centre [px], and the depth, which is negative behind it."""
    depth = -wp.dot(v, camera.z)
    if depth <= 0.0:
        return wp.vec3(0.0, 0.0, -1.0)
    x = wp.dot(v, camera.x) / (depth * camera.half_width)
    y = wp.dot(v, camera.y) / (depth * camera.half_height)
    return wp.vec3(0.5 * (1.0 + x) * float(camera.width), 0.5 * (1.0 - y) * float(camera.height), depth)


@wp.func
def shows_surface(
    guide: GuideView,
    tap: int,
    params: TemporalParams,
    object: int,
    instance: int,
    p: wp.vec3,
    n: wp.vec3,
    distance: float,
) -> bool:
    """Whether pixel `tap` shows the surface around `p`, which the camera sees at `distance`."""
    if guide.object[tap] != object or guide.instance[tap] != instance:
        return False
    if object == NO_OBJECT:
        return True
    if wp.dot(guide.normal[tap], n) < params.cos_normal:
        return False
    return wp.abs(wp.dot(guide.position[tap] - p, n)) <= params.plane_distance * distance


@wp.func
def spoils_background(guide: GuideView, tap: int, object: int, border: int) -> bool:
    """Whether a pixel that shows nothing but background could get an object's light from pixel `tap`.

    Frames are means over pixels, so pixels of the background hold light of an object at its edge. The background stays
    while the object moves on, which would leave a trail.
    """
    return object == NO_OBJECT and border != MIXED and guide.border[tap] != INSIDE


@wp.func
def surface_albedo(surface: wp.ref[Surface], d: wp.vec3) -> Albedo:
    """Albedo towards where a ray with direction `d` comes from."""
    wo = to_local(surface.frame, -d)
    if surface.two_sided != 0 and wo[2] < 0.0:
        wo = wp.vec3(wo[0], wo[1], -wo[2])
    return bsdf_albedo(surface.bsdf, wo)


@wp.func
def own_color(scene: wp.ref[SceneView], hit: Hit, surface: wp.ref[Surface], d: wp.vec3) -> wp.vec3:
    """What to divide colours by: albedo plus emission, the sky's radiance where nothing is hit.

    Without emission, pixels at the edge of a lamp would be a thousand times their neighbours, and smear.
    """
    if hit.face < 0:
        return environment_radiance(scene, d)
    albedo = surface_albedo(surface, d)
    return albedo.diffuse + albedo.specular + surface.emission


@wp.func
def reflected(v: wp.vec3, n: wp.vec3) -> wp.vec3:
    """Mirror direction of `v` at a surface with normal `n`."""
    return v - 2.0 * wp.dot(v, n) * n


@wp.func
def specular_lobe(surface: wp.ref[Surface], d: wp.vec3) -> wp.vec2:
    """Specular share of the albedo, and roughness."""
    albedo = surface_albedo(surface, d)
    specular = max_component(albedo.specular)
    if specular <= 0.0:
        return wp.vec2(0.0, 1.0)
    return wp.vec2(specular / (specular + max_component(albedo.diffuse)), bsdf_roughness(surface.bsdf))


@wp.func
def longest_history(lobe: wp.vec2, turn: float, params: TemporalParams) -> float:
    """Frames after which what a surface reflects has left the lobe that was seen, where it turns by `turn` a frame.

    A reflection moves otherwise than its surface, so a mirror's history is another place's.
    """
    longest = 1.0 / params.min_alpha
    if lobe[0] > 0.0 and turn > MIN_TURN:
        longest = wp.min(longest, (params.mirror_history + lobe[1] * lobe[1] / turn) / lobe[0])
    return longest


@wp.kernel
def trace_centres(
    first: int,
    # Scene
    scene: SceneView,
    camera: CameraView,
    # Out
    out_hits: wp.array[Hit],  # (pixels,)
    out_guide: GuideView,  # but for the border
    out_own: wp.array[wp.vec3],  # (pixels,) colour to divide by, at the centre
    out_lobe: wp.array[wp.vec2],  # (pixels,) as of `specular_lobe`
):
    """Find what the centre of each pixel sees. One thread per pixel."""
    i = first + wp.tid()
    centre = wp.vec2(0.5, 0.5)
    ray = camera_ray(camera, i % camera.width, i // camera.width, centre, centre)
    hit = visible_hit(scene, ray.o, ray.d)
    object = int(NO_OBJECT)
    p = wp.vec3(0.0, 0.0, 0.0)
    n = wp.vec3(0.0, 0.0, 0.0)
    lobe = wp.vec2(0.0, 1.0)
    surface = Surface()
    if hit.face >= 0:
        find_surface(scene, hit, ray.d, surface)
        object = scene.triangle_mesh[hit.face]
        p = surface.p
        n = surface.n
        lobe = specular_lobe(surface, ray.d)
    out_hits[i] = hit
    out_guide.object[i] = object
    out_guide.instance[i] = hit.instance
    out_guide.position[i] = p
    out_guide.normal[i] = n
    out_own[i] = own_color(scene, hit, surface, ray.d)
    out_lobe[i] = lobe


@wp.kernel
def average_own_color(
    first: int,
    # Scene
    scene: SceneView,
    camera: CameraView,
    # In
    guide: GuideView,
    centre: wp.array[wp.vec3],  # (pixels,) at the centre
    # Out
    out_own: wp.array[wp.vec3],  # (pixels,) mean over the pixel
    out_border: wp.array[int],  # (pixels,) of the guide
):
    """Find the mean own colour of the pixels whose neighbours have another one, and borders. One thread per pixel.

    Frames are means over pixels too. Divided by what the centre shows they would hold the texture's fine detail, and
    the edges of objects, as noise.
    """
    i = first + wp.tid()
    x = i % camera.width
    y = i // camera.width
    mean = centre[i]
    object = guide.object[i]
    contrast = float(0.0)
    border = int(INSIDE)
    for r in range(wp.max(y - 1, 0), wp.min(y + 2, camera.height)):
        for c in range(wp.max(x - 1, 0), wp.min(x + 2, camera.width)):
            contrast = wp.max(contrast, wp.length(centre[r * camera.width + c] - mean))
            if guide.object[r * camera.width + c] != object:
                border = BESIDE
    if contrast > MIN_CONTRAST or border != INSIDE:
        total = wp.vec3(0.0, 0.0, 0.0)
        surface = Surface()
        k = int(0)
        while k < OWN_SAMPLES:  # a range would be unrolled
            # Rotated grid: one sample in each row and column.
            at = wp.vec2((float(k) + 0.5) / 4.0, (float(2 - 2 * k + 5 * (k // 2)) + 0.5) / 4.0)
            ray = camera_ray(camera, x, y, at, wp.vec2(0.5, 0.5))
            hit = visible_hit(scene, ray.o, ray.d)
            seen = int(NO_OBJECT)
            if hit.face >= 0:
                find_surface(scene, hit, ray.d, surface)
                seen = scene.triangle_mesh[hit.face]
            if seen != object:
                border = MIXED
            total += own_color(scene, hit, surface, ray.d)
            k += 1
        mean = total / float(OWN_SAMPLES)
        # A straight edge that cuts off less than a sample's part cuts off a corner.
        k = int(0)
        while border == BESIDE and k < 4:
            at = wp.vec2(float(k % 2), float(k // 2))
            ray = camera_ray(camera, x, y, at, wp.vec2(0.5, 0.5))
            hit = visible_hit(scene, ray.o, ray.d)
            seen = int(NO_OBJECT)
            if hit.face >= 0:
                seen = scene.triangle_mesh[hit.face]
            if seen != object:
                border = MIXED
            k += 1
    out_border[i] = border
    out_own[i] = wp.vec3(wp.max(mean[0], MIN_OWN), wp.max(mean[1], MIN_OWN), wp.max(mean[2], MIN_OWN))


@wp.kernel
def reproject_history(
    first: int,
    # Scene
    camera: CameraView,
    previous_scene: SceneView,
    previous_camera: CameraView,
    # Params
    params: TemporalParams,
    has_previous: int,  # 0 in the first frame
    is_moved: int,  # whether the two scenes may differ in geometry
    # In
    hits: wp.array[Hit],  # (pixels,) of this frame
    guide: GuideView,
    lobe: wp.array[wp.vec2],  # (pixels,)
    centre_own: wp.array[wp.vec3],  # (pixels,) at the centre
    own: wp.array[wp.vec3],  # (pixels,) mean over the pixel
    previous_guide: GuideView,
    history: HistoryView,  # of the previous frame's pixels
    # Out
    out_history: HistoryView,  # of this frame's pixels
):
    """Find the history of what each pixel's centre sees, where it was a frame ago. One thread per pixel."""
    i = first + wp.tid()
    centre = wp.vec2(0.5, 0.5)
    ray = camera_ray(camera, i % camera.width, i // camera.width, centre, centre)
    hit = hits[i]
    object = guide.object[i]
    border = guide.border[i]
    p = guide.position[i]
    n = guide.normal[i]
    to_previous = ray.d  # from where the previous camera is
    longest = 1.0 / params.min_alpha

    # The same point of the same triangle a frame ago.
    if has_previous != 0 and hit.face >= 0:
        if is_moved != 0:
            p = hit_position(previous_scene, hit)
            _, e1, e2 = triangle_edges(previous_scene, hit.face, hit.instance)
            ng = wp.normalize(triangle_normal(previous_scene, hit.instance, e1, e2))
            n = hit_normal(previous_scene, hit, ng)
        to_previous = p - previous_camera.origin
        turn = wp.length(reflected(ray.d, guide.normal[i]) - reflected(wp.normalize(to_previous), n))
        longest = longest_history(lobe[i], turn, params)

    color = wp.vec3(0.0, 0.0, 0.0)
    moments = wp.vec2(0.0, 0.0)
    length = float(0.0)
    weight = float(0.0)
    seen = project(previous_camera, to_previous)
    if has_previous != 0 and seen[2] > 0.0:
        width = previous_camera.width
        height = previous_camera.height
        x = wp.clamp(seen[0], -1.0, float(width + 1)) - 0.5
        y = wp.clamp(seen[1], -1.0, float(height + 1)) - 0.5
        column = int(wp.floor(x))
        row = int(wp.floor(y))
        distance = wp.length(to_previous)
        for r in range(wp.max(row, 0), wp.min(row + 2, height)):
            for c in range(wp.max(column, 0), wp.min(column + 2, width)):
                tap = r * width + c
                same = shows_surface(previous_guide, tap, params, object, hit.instance, p, n, distance)
                if same and history.length[tap] > 0.0:
                    w = (1.0 - wp.abs(x - float(c))) * (1.0 - wp.abs(y - float(r)))
                    tap_color = history.color[tap]
                    tap_moments = history.moments[tap]
                    if spoils_background(previous_guide, tap, object, border):
                        # What the tap would hold without the object: nothing but background, which is known.
                        tap_color = wp.cw_div(centre_own[i], own[i])
                        brightness = luminance(tap_color)
                        tap_moments = wp.vec2(brightness, brightness * brightness)
                    weight += w
                    color += w * tap_color
                    moments += w * tap_moments
                    length += w * history.length[tap]
    if weight < MIN_TAP_WEIGHT:
        out_history.color[i] = wp.vec3(0.0, 0.0, 0.0)
        out_history.moments[i] = wp.vec2(0.0, 0.0)
        out_history.length[i] = 0.0
    else:
        out_history.color[i] = color / weight
        out_history.moments[i] = moments / weight
        out_history.length[i] = wp.min(length / weight, longest)


@wp.kernel
def compare_history(
    first: int,
    # In
    color: wp.array[wp.vec3],  # (pixels,) the new frame [W m^-2 sr^-1]
    own: wp.array[wp.vec3],  # (pixels,)
    history: HistoryView,
    # Out
    out_terms: wp.array[wp.vec3],  # (pixels,) weighted difference, its square, the history's variance; 0 where unknown
):
    """Weigh the difference in luminance between the new frame and the history by the noise. One thread per pixel."""
    i = first + wp.tid()
    terms = wp.vec3(0.0, 0.0, 0.0)
    if history.length[i] >= MIN_TESTED and is_valid(color[i]):
        mean = history.moments[i][0]
        variance = wp.max(history.moments[i][1] - mean * mean, 0.0)
        weight = 1.0 / (wp.sqrt(variance) + NOISE_FLOOR * mean + MIN_DEVIATION)
        difference = weight * (luminance(wp.cw_div(color[i], own[i])) - mean)
        terms = wp.vec3(difference, difference * difference, weight * weight * variance)
    out_terms[i] = terms


@wp.func
def window_start(x: int, size: int) -> int:
    """First pixel of the window around `x`, which stays inside the picture's `size`."""
    return wp.max(wp.min(x - WINDOW // 2, size - WINDOW), 0)


@wp.kernel
def sum_rows(
    first: int,
    # Params
    width: int,  # [px]
    # In
    terms: wp.array[wp.vec3],  # (pixels,)
    # Out
    out_sums: wp.array[wp.vec3],  # (pixels,) over the window's row
):
    """Sum over the part of each pixel's window that lies in its row. One thread per pixel."""
    i = first + wp.tid()
    x = i % width
    sums = wp.vec3(0.0, 0.0, 0.0)
    start = window_start(x, width)
    for column in range(start, wp.min(start + WINDOW, width)):
        sums += terms[i - x + column]
    out_sums[i] = sums


@wp.func
def restarted(
    params: TemporalParams,
    eye: wp.vec3,
    width: int,
    height: int,
    x: int,
    y: int,
    color: wp.array[wp.vec3],
    own: wp.array[wp.vec3],
    guide: GuideView,
) -> Restart:
    """What the new frame shows of the surface in the square around pixel (x, y)."""
    i = y * width + x
    restart = Restart()
    p = guide.position[i]
    n = guide.normal[i]
    distance = wp.length(p - eye)
    count = float(0.0)
    for r in range(wp.max(y - RESTART_RADIUS, 0), wp.min(y + RESTART_RADIUS + 1, height)):
        for c in range(wp.max(x - RESTART_RADIUS, 0), wp.min(x + RESTART_RADIUS + 1, width)):
            j = r * width + c
            if shows_surface(guide, j, params, guide.object[i], guide.instance[i], p, n, distance):
                if is_valid(color[j]) and not spoils_background(guide, j, guide.object[i], guide.border[i]):
                    divided = wp.cw_div(color[j], own[j])
                    brightness = luminance(divided)
                    restart.color += divided
                    restart.moments += wp.vec2(brightness, brightness * brightness)
                    count += 1.0
    if count > 1.5:  # the pixel itself comes in anyway
        restart.color = restart.color / count
        restart.moments = restart.moments / count
        restart.frames = RESTART_FRAMES
    return restart


@wp.kernel
def blend_history(
    first: int,
    # Params
    params: TemporalParams,
    width: int,  # [px]
    height: int,  # [px]
    eye: wp.vec3,  # the camera's centre
    # In
    color: wp.array[wp.vec3],  # (pixels,) the new frame [W m^-2 sr^-1]
    own: wp.array[wp.vec3],  # (pixels,)
    guide: GuideView,
    history: HistoryView,
    row_sums: wp.array[wp.vec3],  # (pixels,)
    # Out
    out_history: HistoryView,  # may be `history`
    out_color: wp.array[wp.vec3],  # (pixels,) [W m^-2 sr^-1]
):
    """Mix the new frame with the history that the test for changed light leaves. One thread per pixel.

    The statistic is the sum of weighted differences over a window, over the root of the larger of what noise would make
    of its square: the sum of squared differences, and of the history's variances. Each is good where the other fails:
    a firefly in the new frame counts as one deviation at most, and a window without any is not dark beside a history
    that owes its mean to them.

    A pixel whose history is dropped would show one path, which is often black. The mean of the new frame over the same
    surface around it fills in for a few frames.
    """
    i = first + wp.tid()
    x = i % width
    y = i // width
    sums = wp.vec3(0.0, 0.0, 0.0)
    start = window_start(y, height)
    for row in range(start, wp.min(start + WINDOW, height)):
        sums += row_sums[row * width + x]
    t = wp.abs(sums[0]) / wp.sqrt(wp.max(sums[1], sums[2]) + MIN_DEVIATION)
    dropped = wp.clamp((t - params.t_keep) / (params.t_drop - params.t_keep), 0.0, 1.0)
    past = history.color[i]
    past_moments = history.moments[i]
    length = history.length[i]
    if dropped > 0.0 and length > 0.0:
        restart = restarted(params, eye, width, height, x, y, color, own, guide)
        kept = length * (1.0 - dropped)
        length = kept + dropped * wp.min(restart.frames, length)
        if length > 0.0:
            past = wp.lerp(restart.color, past, kept / length)
            past_moments = wp.lerp(restart.moments, past_moments, kept / length)

    new = wp.vec3(0.0, 0.0, 0.0)
    alpha = wp.max(1.0 / (length + 1.0), params.min_alpha)
    if is_valid(color[i]):
        new = wp.cw_div(color[i], own[i])
    else:
        alpha = wp.where(length > 0.0, 0.0, 1.0)
    brightness = luminance(new)
    mixed = wp.lerp(past, new, alpha)
    out_history.color[i] = mixed
    out_history.moments[i] = wp.lerp(past_moments, wp.vec2(brightness, brightness * brightness), alpha)
    out_history.length[i] = wp.min(length + 1.0, 1.0 / params.min_alpha)
    out_color[i] = wp.cw_mul(mixed, own[i])
