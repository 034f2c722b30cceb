"""Where a path ends in the cache, and which paths train it: for the path tracer here, and for other renderers' kernels.

These functions know neither scenes nor materials. Lengths are in scene units, densities per solid angle.
"""

import warp as wp

from nrc.kernels.sampling import PI

wp.set_module_options({"enable_backward": False})

MIN_COS = wp.constant(1.0e-3)  # bounds a vertex' footprint at grazing incidence


@wp.struct
class TrainingTiles:
    """Which pixels' paths train the cache in a frame: one in each tile, the same place in all of them.

    A width of 0 means none. Made by `nrc.records.training_tiles`.
    """

    width: int  # [px]
    height: int
    columns: int  # tiles side by side
    offset_x: int  # [px], within each tile
    offset_y: int


@wp.func
def spread_increment(distance: float, pdf: float, cos_arrival: float) -> float:
    """Square root of one vertex' footprint area (Eq. 3, Müller et al. 2021).

    Add it up along the path, from the second vertex on and not after delta bounces.

    Args:
        distance: From the vertex before.
        pdf: Density of the whole BSDF's sampling there, of the direction taken.
        cos_arrival: Absolute cosine between that direction and the geometric normal here.
    """
    return distance / wp.sqrt(wp.max(pdf * wp.max(cos_arrival, MIN_COS), 1.0e-20))


@wp.func
def primary_footprint(distance: float, cos_arrival: float) -> float:
    """Area a_0 that the first vertex covers as seen from the camera (Eq. 4, Müller et al. 2021)."""
    return distance * distance / (4.0 * PI * wp.max(cos_arrival, MIN_COS))


@wp.func
def has_spread(spread: float, footprint: float, threshold: float) -> bool:
    """Whether the path may end in the cache: a > c a_0 (Eq. 4, Müller et al. 2021).

    Args:
        spread: Sum of `spread_increment` since the camera, or since the vertex at which the spread was last restarted.
        footprint: The path's `primary_footprint`, also where the spread was restarted.
        threshold: c; 0.01 in the paper.
    """
    return spread * spread > threshold * footprint


@wp.func
def inside_box(p: wp.vec3, lower: wp.vec3, upper: wp.vec3) -> bool:
    """Whether the cache is defined at `p`."""
    return (
        p[0] >= lower[0]
        and p[1] >= lower[1]
        and p[2] >= lower[2]
        and p[0] <= upper[0]
        and p[1] <= upper[1]
        and p[2] <= upper[2]
    )


@wp.func
def training_slot(tiles: TrainingTiles, x: int, y: int) -> int:
    """Slot of the training path through pixel (x, y), -1 for the others."""
    if tiles.width == 0:
        return -1
    if x % tiles.width != tiles.offset_x or y % tiles.height != tiles.offset_y:
        return -1
    return (y // tiles.height) * tiles.columns + x // tiles.width
