"""Signed distances to a mesh: training samples, exact queries, and sphere tracing of a learned field.

Distances are negative inside, in units of the unit cube that the mesh has been scaled into. The closest point comes
from Warp's bounding volume hierarchy, the side from the generalized winding number (Jacobson et al. 2013; summed as
Barill et al. 2018 do), which the mesh must support.
"""

import warp as wp

from nrc.kernels.rng import TO_UNIT, rng_float, rng_init, rng_next, rng_uint
from nrc.kernels.sampling import square_to_uniform_triangle

wp.set_module_options({"enable_backward": False})

FARTHEST = wp.constant(4.0)  # no two points of the cube are as far apart
WINDING_ACCURACY = wp.constant(2.0)  # clusters of triangles farther than this many radii count as one
HALF_STEP = wp.constant(0.5 * float(TO_UNIT))

TRACED, HIT, MISSED = 0, 1, 2  # states of a ray


@wp.struct
class MeshView:
    """A mesh inside the unit cube, filled by `nrc.fit.mesh_distance.MeshDistance`."""

    mesh: wp.uint64  # id of a wp.Mesh with winding numbers
    area_cdf: wp.array[wp.uint32]  # (n_faces,) share of the area up to and with each face, in 2^-32
    normals_tell_sides: (
        int  # near the surface: the closest feature's normal gives the sign that the winding number gives
    )


@wp.func
def unsigned_distance(mesh: wp.uint64, p: wp.vec3) -> float:
    """Distance to the closest point of the mesh."""
    query = wp.mesh_query_point_no_sign(mesh, p, FARTHEST)
    if not query.result:
        return FARTHEST
    return wp.length(p - wp.mesh_eval_position(mesh, query.face, query.u, query.v))


@wp.func
def signed_distance(mesh: wp.uint64, p: wp.vec3, bound: float) -> float:
    """Distance to the closest point, not farther than `bound`; negative where the winding number is over 1/2."""
    query = wp.mesh_query_point_sign_winding_number(mesh, p, bound, WINDING_ACCURACY, 0.5)
    if not query.result:
        return bound
    return query.sign * wp.length(p - wp.mesh_eval_position(mesh, query.face, query.u, query.v))


@wp.func
def signed_distance_by_normal(mesh: wp.uint64, p: wp.vec3, bound: float) -> float:
    """As `signed_distance`, the side taken from the angle-weighted normal of the closest feature.

    Baerentzen and Aanaes 2005: exact for closed, consistently oriented meshes that do not intersect themselves.
    """
    query = wp.mesh_query_point_sign_normal(mesh, p, bound)
    if not query.result:
        return bound
    return query.sign * wp.length(p - wp.mesh_eval_position(mesh, query.face, query.u, query.v))


@wp.func
def find_face(area_cdf: wp.array[wp.uint32], u: wp.uint32) -> int:
    """First face whose cumulated area exceeds u, the last one if none does."""
    low = int(0)
    high = area_cdf.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if area_cdf[middle] > u:
            high = middle
        else:
            low = middle + 1
    return low


@wp.func
def surface_point(view: MeshView, i: int, n: int, state: wp.uint64):
    """Point i of n on the surface, stratified by area, and the generator's state after it."""
    s = rng_next(state)
    u = ((wp.uint64(wp.uint32(i)) << wp.uint64(32)) + wp.uint64(rng_uint(s))) / wp.uint64(wp.uint32(n))
    face = find_face(view.area_cdf, wp.uint32(u))
    s = rng_next(s)
    a = rng_float(s)
    s = rng_next(s)
    b = square_to_uniform_triangle(wp.vec2(a, rng_float(s)))
    return wp.mesh_eval_position(view.mesh, face, 1.0 - b[0] - b[1], b[0]), s


@wp.func
def logistic(u: float) -> float:
    """Logistic variate of scale 1 (standard deviation pi / sqrt(3)) from u in [0, 1)."""
    p = u + HALF_STEP
    return wp.log(p / (1.0 - p))


@wp.func
def near_point(view: MeshView, i: int, n: int, noise: float, state: wp.uint64):
    """Point i of n on the surface moved by logistic noise, and how far it has been moved."""
    p, s = surface_point(view, i, n, state)
    s = rng_next(s)
    x = logistic(rng_float(s))
    s = rng_next(s)
    y = logistic(rng_float(s))
    s = rng_next(s)
    offset = noise * wp.vec3(x, y, logistic(rng_float(s)))
    return p + offset, wp.length(offset)


@wp.kernel
def draw_uniform(
    first: int,
    # Scene
    view: MeshView,
    # Params
    seed: int,
    sample: int,  # which set of points
    lower: wp.vec3,
    extent: wp.vec3,
    first_out: int,
    # Out
    out_x: wp.array[wp.vec3],  # (at least first_out + n,)
    out_distance: wp.array[float],  # like out_x, signed
):
    """Draw points uniformly in a box with their signed distances. One thread per point."""
    i = first + wp.tid()
    s = rng_next(rng_init(seed, sample, i))
    a = rng_float(s)
    s = rng_next(s)
    b = rng_float(s)
    s = rng_next(s)
    p = lower + wp.cw_mul(extent, wp.vec3(a, b, rng_float(s)))
    out_x[first_out + i] = p
    out_distance[first_out + i] = signed_distance(view.mesh, p, FARTHEST)


@wp.kernel
def draw_batch(
    first: int,
    # Scene
    view: MeshView,
    # Params
    seed: int,
    step: int,
    n_uniform: int,
    n_surface: int,
    n_rows: int,
    noise: float,  # scale of the logistic distribution
    first_pooled: int,  # of the n_uniform rows of the pool to use
    # In
    pool_x: wp.array[wp.vec3],  # uniform points
    pool_distance: wp.array[float],
    # Out
    out_x: wp.array[wp.vec3],  # (n_rows,)
    out_distance: wp.array2d[float],  # (n_rows, 1) signed
):
    """Fill a batch: pooled uniform points, points on the surface, points near it. One thread per row."""
    i = first + wp.tid()
    if i < n_uniform:
        out_x[i] = pool_x[first_pooled + i]
        out_distance[i, 0] = pool_distance[first_pooled + i]
        return
    state = rng_init(seed, step, i)
    if i < n_uniform + n_surface:
        p, _s = surface_point(view, i - n_uniform, n_surface, state)
        out_x[i] = p
        out_distance[i, 0] = 0.0
        return
    q, moved = near_point(view, i - n_uniform - n_surface, n_rows - n_uniform - n_surface, noise, state)
    bound = 1.001 * moved + 1.0e-6  # the point it came from is no farther
    out_x[i] = q
    if view.normals_tell_sides != 0:
        out_distance[i, 0] = signed_distance_by_normal(view.mesh, q, bound)
    else:
        out_distance[i, 0] = signed_distance(view.mesh, q, bound)


@wp.kernel
def compare_signs(
    first: int,
    # Scene
    view: MeshView,
    # Params
    seed: int,
    n: int,
    noise: float,
    # Out
    out_differs: wp.array[int],  # (n,) 1 where the signs differ
    out_inside: wp.array[int],  # (n,) 1 where the winding number says inside
):
    """Compare the sign by winding number with that by normal near the surface. One thread per point."""
    i = first + wp.tid()
    p, moved = near_point(view, i, n, noise, rng_init(seed, 0, i))
    bound = 1.001 * moved + 1.0e-6
    by_winding = signed_distance(view.mesh, p, bound)
    by_normal = signed_distance_by_normal(view.mesh, p, bound)
    out_differs[i] = wp.where((by_winding < 0.0) != (by_normal < 0.0), 1, 0)
    out_inside[i] = wp.where(by_winding < 0.0, 1, 0)


@wp.kernel
def query_distance(
    first: int,
    # Scene
    mesh: wp.uint64,
    # Params
    with_sign: int,  # 0: no side, for meshes without winding numbers
    # In
    x: wp.array[wp.vec3],  # (n,)
    # Out
    out_distance: wp.array[float],  # (n,)
):
    """Measure the distance of points to a mesh. One thread per point."""
    i = first + wp.tid()
    if with_sign != 0:
        out_distance[i] = signed_distance(mesh, x[i], FARTHEST)
    else:
        out_distance[i] = unsigned_distance(mesh, x[i])


@wp.struct
class PinholeView:
    """Pinhole camera of the pictures: right, up and forward times what one pixel's step or the centre needs."""

    eye: wp.vec3
    right: wp.vec3  # half the image's width at distance 1
    up: wp.vec3  # half its height
    forward: wp.vec3  # unit
    width: int
    height: int


@wp.kernel
def start_rays(
    first: int,
    # Params
    camera: PinholeView,
    lower: wp.vec3,
    upper: wp.vec3,
    # Out
    out_direction: wp.array[wp.vec3],  # (n_rays,) unit
    out_t: wp.array[float],  # (n_rays,) where the ray enters the box
    out_t_end: wp.array[float],  # (n_rays,) where it leaves it
    out_state: wp.array[int],  # (n_rays,) TRACED or MISSED
):
    """Send a ray through each pixel's centre to the box. One thread per ray."""
    i = first + wp.tid()
    column = float(i % camera.width) + 0.5
    row = float(i // camera.width) + 0.5
    x = 2.0 * column / float(camera.width) - 1.0
    y = 1.0 - 2.0 * row / float(camera.height)
    d = wp.normalize(camera.forward + x * camera.right + y * camera.up)
    enter = float(0.0)
    leave = float(1.0e30)
    for axis in range(3):
        direction = d[axis]
        if wp.abs(direction) < 1.0e-9:
            direction = 1.0e-9
        a = (lower[axis] - camera.eye[axis]) / direction
        b = (upper[axis] - camera.eye[axis]) / direction
        enter = wp.max(enter, wp.min(a, b))
        leave = wp.min(leave, wp.max(a, b))
    out_direction[i] = d
    out_t[i] = enter
    out_t_end[i] = leave
    out_state[i] = wp.where(enter < leave, TRACED, MISSED)


@wp.kernel
def place_points(
    first: int,
    # Params
    eye: wp.vec3,
    # In
    ray: wp.array[int],  # (n,) ray of each point
    direction: wp.array[wp.vec3],  # (n_rays,)
    t: wp.array[float],  # (n_rays,)
    # Out
    out_x: wp.array[wp.vec3],  # (n,)
):
    """Place the points at which rays have arrived. One thread per ray still traced."""
    i = first + wp.tid()
    out_x[i] = eye + t[ray[i]] * direction[ray[i]]


@wp.kernel
def advance_rays(
    first: int,
    # Params
    close: float,  # distance that counts as a hit
    # In
    ray: wp.array[int],  # (n,) ray of each point
    distance: wp.array2d[float],  # (n, 1) of the field there
    t_end: wp.array[float],  # (n_rays,)
    # In/out
    t: wp.array[float],  # (n_rays,)
    state: wp.array[int],  # (n_rays,)
):
    """Advance each ray by the distance at its point, back where it is negative (Hart 1996). One thread per ray."""
    i = first + wp.tid()
    r = ray[i]
    d = distance[i, 0]
    t[r] += d
    if wp.abs(d) < close:
        state[r] = HIT
    elif t[r] > t_end[r]:
        state[r] = MISSED


@wp.func
def tetrahedron_corner(k: int) -> wp.vec3:
    """Corner k of four: (1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)."""
    return wp.vec3(wp.where(k < 2, 1.0, -1.0), wp.where(k % 2 == 0, 1.0, -1.0), wp.where(k == 0 or k == 3, 1.0, -1.0))


@wp.kernel
def place_corners(
    first: int,
    # Params
    h: float,
    # In
    x: wp.array[wp.vec3],  # (n,)
    # Out
    out_x: wp.array[wp.vec3],  # (4 n,)
):
    """Place four points around each, the corners of a tetrahedron. One thread per corner."""
    i = first + wp.tid()
    out_x[i] = x[i // 4] + h * tetrahedron_corner(i % 4)


@wp.kernel
def shade_points(
    first: int,
    # Params
    to_light: wp.vec3,  # unit
    # In
    ray: wp.array[int],  # (n,) ray of each point
    corner_distance: wp.array2d[float],  # (4 n, 1) from place_corners
    # Out
    out_normal: wp.array[wp.vec3],  # (n_rays,)
    out_color: wp.array[wp.vec3],  # (n_rays,) linear
):
    """Take the normal from differences of the field and shade with a sun and a sky. One thread per hit."""
    i = first + wp.tid()
    gradient = wp.vec3(0.0, 0.0, 0.0)
    for k in range(4):
        gradient += corner_distance[4 * i + k, 0] * tetrahedron_corner(k)
    n = wp.normalize(gradient)
    sun = wp.max(0.0, wp.dot(n, to_light)) * wp.vec3(0.62, 0.57, 0.5)
    sky = (0.5 + 0.5 * n[1]) * wp.vec3(0.16, 0.2, 0.27) + wp.vec3(0.04, 0.035, 0.03)
    out_normal[ray[i]] = n
    out_color[ray[i]] = sun + sky
