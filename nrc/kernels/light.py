"""Light selection and sampling: emissive triangles, points, spots, parallel light and the environment map.

A tree chooses among the lights that are somewhere, by what each may contribute to a point; between them and each light
from infinitely far away power decides. `light_pdf_*` give the density of the same strategy for a direction found
otherwise, per solid angle and including the selection, for multiple importance sampling.
"""

import warp as wp

from nrc.kernels.intersect import Hit
from nrc.kernels.light_tree import light_tree_pmf, light_tree_sample
from nrc.kernels.sampling import (
    PI,
    cdf_search,
    square_to_uniform_sphere,
    square_to_uniform_triangle,
)
from nrc.kernels.scene import (
    LIGHT_DIRECTIONAL,
    LIGHT_ENVIRONMENT,
    LIGHT_SPOT,
    LIGHT_TRIANGLE,
    SceneView,
    emitted_radiance,
    hit_light,
    hit_opacity,
    triangle_edges,
    triangle_normal,
)

wp.set_module_options({"enable_backward": False})


@wp.struct
class LightSample:
    """A direction towards light. `value` is radiance, or what a delta light gives, before division by `pdf`."""

    wi: wp.vec3
    distance: float
    value: wp.vec3
    pdf: float  # per solid angle (the selection probability alone for delta lights); 0: no light there
    delta: int


@wp.func
def environment_radiance(scene: wp.ref[SceneView], d: wp.vec3) -> wp.vec3:
    """Radiance from direction `d` (bilinear, wrapping in azimuth)."""
    width = scene.environment_width
    height = scene.environment_height
    if width * height == 1:
        return scene.environment_scale * scene.environment[0]
    local = wp.transpose(scene.environment_to_world) * d
    u = wp.atan2(local[0], -local[2]) * (0.5 / PI)
    v = wp.acos(wp.clamp(local[1], -1.0, 1.0)) / PI
    x = u * float(width) - 0.5
    y = wp.clamp(v * float(height) - 0.5, 0.0, float(height - 1))
    x0 = wp.floor(x)
    y0 = wp.min(int(y), wp.max(height - 2, 0))
    fx = x - x0
    fy = y - float(y0)
    column = (int(x0) + 2 * width) % width
    next_column = (column + 1) % width
    top = y0 * width
    bottom = wp.min(y0 + 1, height - 1) * width
    upper = (1.0 - fx) * scene.environment[top + column] + fx * scene.environment[top + next_column]
    lower = (1.0 - fx) * scene.environment[bottom + column] + fx * scene.environment[bottom + next_column]
    return scene.environment_scale * ((1.0 - fy) * upper + fy * lower)


@wp.func
def light_share(scene: wp.ref[SceneView], i: int) -> float:
    """Probability of the tree (0), or of one of the lights without a place (from 1)."""
    return scene.light_cdf[i + 1] - scene.light_cdf[i]


@wp.func
def light_pdf_environment(scene: wp.ref[SceneView], d: wp.vec3) -> float:
    """Density with which light sampling finds `d` through the environment."""
    if scene.environment_light < 0:
        return 0.0
    pmf = light_share(scene, 1 + scene.environment_light - scene.n_placed_lights)
    width = scene.environment_width
    height = scene.environment_height
    if width * height == 1:
        return pmf * (0.25 / PI)
    local = wp.transpose(scene.environment_to_world) * d
    u = wp.atan2(local[0], -local[2]) * (0.5 / PI)
    u -= wp.floor(u)
    cos_theta = wp.clamp(local[1], -1.0, 1.0)
    column = wp.clamp(int(u * float(width)), 0, width - 1)
    row = wp.clamp(int(wp.acos(cos_theta) / PI * float(height)), 0, height - 1)
    first = row * (width + 1) + column
    density = (scene.environment_rows[row + 1] - scene.environment_rows[row]) * (
        scene.environment_columns[first + 1] - scene.environment_columns[first]
    )
    sin_theta = wp.sqrt(wp.max(1.0 - cos_theta * cos_theta, 1.0e-12))
    return pmf * density * float(width) * float(height) / (2.0 * PI * PI * sin_theta)


@wp.func
def light_pdf_triangle(
    scene: wp.ref[SceneView], hit: Hit, distance: float, d: wp.vec3, p: wp.vec3, n: wp.vec3
) -> float:
    """Density with which `light_sample` of `p` and `n` finds the point hit at `distance` along `d`, on a triangle."""
    light = hit_light(scene, hit.face, hit.instance)
    if light < 0:
        return 0.0
    _, e1, e2 = triangle_edges(scene, hit.face, hit.instance)
    projected = 0.5 * wp.abs(wp.dot(wp.cross(e1, e2), d))  # area · cos
    if projected < 1.0e-20:
        return 0.0
    of_tree = light_tree_pmf(scene.light_nodes, scene.light_depth, scene.lights[light].leaf, p, n)
    pmf = light_share(scene, 0) * (of_tree * scene.lights[light].share)
    return pmf * distance * distance / projected


@wp.func
def sample_environment(scene: wp.ref[SceneView], u: wp.vec2) -> wp.vec3:
    """Direction drawn in proportion to the texels' power."""
    width = scene.environment_width
    height = scene.environment_height
    if width * height == 1:
        return square_to_uniform_sphere(u)
    row = cdf_search(scene.environment_rows, 0, height, u[1])
    low = scene.environment_rows[row]
    fv = (u[1] - low) / wp.max(scene.environment_rows[row + 1] - low, 1.0e-20)
    first = row * (width + 1)
    column = cdf_search(scene.environment_columns, first, width, u[0])
    left = scene.environment_columns[first + column]
    fu = (u[0] - left) / wp.max(scene.environment_columns[first + column + 1] - left, 1.0e-20)
    phi = (float(column) + wp.clamp(fu, 0.0, 1.0)) / float(width) * 2.0 * PI
    theta = (float(row) + wp.clamp(fv, 0.0, 1.0)) / float(height) * PI
    sin_theta = wp.sin(theta)
    local = wp.vec3(wp.sin(phi) * sin_theta, wp.cos(theta), -wp.cos(phi) * sin_theta)
    return scene.environment_to_world * local


@wp.func
def spot_falloff(cos_angle: float, inner: float, outer: float, smooth: int) -> float:
    """Attenuation at an angle to the axis: 1 inside `inner`, 0 outside `outer` [rad]."""
    angle = wp.acos(wp.clamp(cos_angle, -1.0, 1.0))
    if angle <= inner:
        return 1.0
    if angle >= outer:
        return 0.0
    if smooth != 0:
        t = (cos_angle - wp.cos(outer)) / wp.max(wp.cos(inner) - wp.cos(outer), 1.0e-6)
        return t * t
    return (outer - angle) / (outer - inner)


@wp.func
def light_sample(scene: wp.ref[SceneView], p: wp.vec3, n: wp.vec3, u_select: float, u: wp.vec2) -> LightSample:
    """Choose a light and a direction from `p` towards it. Visibility is not tested.

    `n` is the normal on the side that light must come from, or zero where it may come from both.
    """
    result = LightSample()
    result.pdf = 0.0
    result.delta = 0
    if scene.n_lights == 0:
        return result
    group = cdf_search(scene.light_cdf, 0, scene.light_cdf.shape[0] - 1, u_select)
    pmf = light_share(scene, group)
    i = scene.n_placed_lights + group - 1
    if group == 0:
        leaf, of_tree, rest = light_tree_sample(scene.light_nodes, scene.light_depth, p, n, u_select / pmf)
        if of_tree <= 0.0:
            return result
        i = scene.leaf_lights[leaf]
        if rest >= scene.lights[i].share:
            i += 1
        pmf *= of_tree * scene.lights[i].share
    light = scene.lights[i]
    if light.kind == LIGHT_TRIANGLE:
        p0, e1, e2 = triangle_edges(scene, light.triangle, light.instance)
        b = square_to_uniform_triangle(u)
        to_light = p0 + b[0] * e1 + b[1] * e2 - p
        distance2 = wp.dot(to_light, to_light)
        if distance2 <= 0.0:
            return result
        result.distance = wp.sqrt(distance2)
        result.wi = to_light / result.distance
        # Cosine times twice the area
        cos_area = -wp.dot(triangle_normal(scene, light.instance, e1, e2), result.wi)
        projected = 0.5 * wp.abs(cos_area)
        if projected < 1.0e-20:
            return result
        hit = Hit()
        hit.face = light.triangle
        hit.instance = light.instance
        hit.t = result.distance
        hit.u = b[0]
        hit.v = b[1]
        result.value = emitted_radiance(scene, hit, cos_area)
        if scene.has_alpha != 0:
            result.value *= hit_opacity(scene, hit)
        result.pdf = pmf * distance2 / projected
        return result
    if light.kind == LIGHT_ENVIRONMENT:
        result.wi = sample_environment(scene, u)
        result.distance = 4.0 * scene.radius + wp.length(p - scene.center)
        result.value = environment_radiance(scene, result.wi)
        result.pdf = light_pdf_environment(scene, result.wi)
        return result
    result.delta = 1
    result.pdf = pmf
    if light.kind == LIGHT_DIRECTIONAL:
        result.wi = -light.direction
        result.distance = 4.0 * scene.radius + wp.length(p - scene.center)
        result.value = light.intensity
        return result
    to_light = light.position - p
    distance2 = wp.max(wp.dot(to_light, to_light), 1.0e-20)
    result.distance = wp.sqrt(distance2)
    result.wi = to_light / result.distance
    result.value = light.intensity / distance2
    if light.kind == LIGHT_SPOT:
        cos_angle = -wp.dot(result.wi, light.direction)
        result.value *= spot_falloff(cos_angle, light.inner_angle, light.outer_angle, light.smooth)
    return result
