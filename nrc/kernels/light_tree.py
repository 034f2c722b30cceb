"""Choosing one of many lights by what each may contribute to a point, in O(log n).

A perfectly balanced binary tree (Lin and Yuksel 2020) whose nodes bound position, direction and intensity of the lights
below them (Conty Estévez and Kulla 2018; `LightBounds` of Pharr, Jakob and Humphreys 2023, section 12.6). The choice
walks down from the root, to each child with a probability in proportion to its importance. The children of node k are
2k and 2k + 1, the root is 1, so the bits of a leaf's number are the way to it.
"""

import warp as wp

wp.set_module_options({"enable_backward": False})

ONE_MINUS_EPSILON = wp.constant(0.99999994)


@wp.struct
class LightNode:
    """Bounds of lights: a sphere around all positions, a cone around all axes, an angle beyond which none emits."""

    center: wp.vec3
    radius: float
    axis: wp.vec3  # of the cone
    cos_axis: float  # of the cone's half angle
    sin_axis: float
    cos_emission: float  # of the angle to its axis up to which a light emits, 0 or more
    intensity: float  # sum of the largest luminous intensities [W sr^-1]; 0: nothing here
    two_sided: int  # whether the cone stands for its mirror image too


@wp.func
def mean_height(height: float, radius: float) -> float:
    """About the mean height above a plane of what is above it, over a ball whose centre has this height."""
    above = wp.max(height + radius, 0.0)
    return wp.where(height >= radius, height, above * above / (4.0 * wp.max(radius, 1.0e-20)))


@wp.func
def node_importance(node: wp.ref[LightNode], p: wp.vec3, n: wp.vec3) -> float:
    """About the irradiance at `p` from the lights of a node; above 0 wherever one of them can contribute.

    `n` is the normal on the side that light must come from, or zero where it may come from both. A node near the point
    counts for more than with the bounds that the literature takes for its distance and its cosines, because a node
    around the point, which has all the near lights, must not lose against one beside it. The parts of the radius in
    the distances were chosen by the variance in rooms of 6 to 8,000 lights.
    """
    to_light = node.center - p
    distance2 = wp.max(wp.dot(to_light, to_light), 1.0e-14)
    distance = wp.sqrt(distance2)
    radius2 = node.radius * node.radius
    # Cosine at the light: mean of its largest and its least value over the cone and, for the former, the sphere. Names
    # with _d have the distance as a factor, with _d2 its square; `tangent` is the length of a line that touches the
    # sphere.
    along_d = -wp.dot(node.axis, to_light)
    if node.two_sided != 0:
        along_d = wp.abs(along_d)
    across_d = wp.sqrt(wp.max(distance2 - along_d * along_d, 0.0))
    tangent = wp.sqrt(wp.max(distance2 - radius2, 0.0))
    cos_beyond_d = along_d * node.cos_axis + across_d * node.sin_axis
    sin_beyond_d = across_d * node.cos_axis - along_d * node.sin_axis
    largest_d2 = cos_beyond_d * tangent + sin_beyond_d * node.radius
    if distance2 <= radius2 or along_d >= node.cos_axis * distance or cos_beyond_d >= tangent:
        largest_d2 = distance2
    if largest_d2 < node.cos_emission * distance2:
        return 0.0
    least_d = along_d * node.cos_axis - across_d * node.sin_axis
    if along_d < -node.cos_axis * distance:
        least_d = 0.0
    cosine_d2 = 0.5 * (largest_d2 + wp.max(least_d, 0.0) * distance)
    importance = node.intensity * cosine_d2 / (distance2 * (distance2 + 0.125 * radius2))
    if wp.dot(n, n) > 0.0:
        importance *= mean_height(wp.dot(n, to_light), node.radius) / wp.sqrt(distance2 + 0.5 * radius2)
    return importance


@wp.func
def left_probability(nodes: wp.array[LightNode], left: int, p: wp.vec3, n: wp.vec3) -> float:
    """Probability of node `left` against the one after it; negative if neither can contribute."""
    importance = node_importance(nodes[left], p, n)
    total = importance + node_importance(nodes[left + 1], p, n)
    if total <= 0.0:
        return -1.0
    return importance / total


@wp.func
def light_tree_sample(nodes: wp.array[LightNode], depth: int, p: wp.vec3, n: wp.vec3, u: float):
    """Number of a leaf, its probability, 0 where there is nothing to choose, and what is left of `u`, in [0, 1)."""
    node = int(1)
    pmf = float(1.0)
    for _ in range(depth):
        left = 2 * node
        probability = left_probability(nodes, left, p, n)
        if probability < 0.0:
            return 0, 0.0, u
        if u < probability:
            node = left
            pmf *= probability
            u = wp.min(u / probability, ONE_MINUS_EPSILON)
        else:
            node = left + 1
            pmf *= 1.0 - probability
            u = wp.min((u - probability) / (1.0 - probability), ONE_MINUS_EPSILON)
    return node - (1 << depth), pmf, u


@wp.func
def light_tree_pmf(nodes: wp.array[LightNode], depth: int, leaf: int, p: wp.vec3, n: wp.vec3) -> float:
    """Probability with which `light_tree_sample` draws a leaf."""
    node = leaf + (1 << depth)
    pmf = float(1.0)
    for level in range(depth):
        shift = depth - 1 - level
        probability = left_probability(nodes, (node >> shift) & -2, p, n)
        if probability < 0.0:
            return 0.0
        if ((node >> shift) & 1) == 0:
            pmf *= probability
        else:
            pmf *= 1.0 - probability
    return pmf
