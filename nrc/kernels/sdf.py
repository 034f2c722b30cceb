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
ISO_STEP = wp.constant(0.025)  # between lines of equal distance on a slice
ISO_WIDTH = wp.constant(0.0015)  # of half the line at distance 0; the others are half as wide


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


@wp.struct
class SliceView:
    """An axis-aligned plane through the box, which hides what lies behind it."""

    axis: int  # 0, 1 or 2; -1 for no plane
    level: float  # coordinate along the axis


@wp.kernel
def start_rays(
    first: int,
    # Params
    camera: PinholeView,
    lower: wp.vec3,
    upper: wp.vec3,
    plane: SliceView,
    # Out
    out_direction: wp.array[wp.vec3],  # (n_rays,) unit
    out_t: wp.array[float],  # (n_rays,) where the ray enters the box
    out_t_end: wp.array[float],  # (n_rays,) where it meets the plane, or leaves the box
    out_state: wp.array[int],  # (n_rays,) TRACED or MISSED
    out_on_plane: wp.array[int],  # (n_rays,) 1 where it meets the plane inside the box
    out_alive: wp.array[int],  # (n_rays,) 1 where it is traced
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
    t_plane = float(-1.0)
    for axis in range(3):
        direction = d[axis]
        if wp.abs(direction) < 1.0e-9:
            direction = 1.0e-9
        a = (lower[axis] - camera.eye[axis]) / direction
        b = (upper[axis] - camera.eye[axis]) / direction
        enter = wp.max(enter, wp.min(a, b))
        leave = wp.min(leave, wp.max(a, b))
        if axis == plane.axis:
            t_plane = (plane.level - camera.eye[axis]) / direction
    # On a face of the box the two distances are the same
    on_plane = enter <= leave and t_plane >= enter and t_plane <= leave
    if on_plane:
        leave = t_plane
    alive = enter < leave
    out_direction[i] = d
    out_t[i] = enter
    out_t_end[i] = leave
    out_state[i] = wp.where(alive, TRACED, MISSED)
    out_on_plane[i] = wp.where(on_plane, 1, 0)
    out_alive[i] = wp.where(alive, 1, 0)


@wp.kernel
def gather_points(
    first: int,
    # Params
    eye: wp.vec3,
    # In
    ray: wp.array[int],  # (slots,) ray of each slot; the slot's own number where empty
    alive: wp.array[int],  # (slots,)
    end: wp.array[int],  # (slots,) inclusive scan of `alive`
    direction: wp.array[wp.vec3],  # (n_rays,)
    t: wp.array[float],  # (n_rays,)
    # Out
    out_ray: wp.array[int],
    out_x: wp.array[wp.vec3],
):
    """Move the rays that are alive together and place the points where they have arrived. One thread per slot."""
    i = first + wp.tid()
    if alive[i] == 1:
        r = i
        if ray:
            r = ray[i]
        out_ray[end[i] - 1] = r
        out_x[end[i] - 1] = eye + t[r] * direction[r]


@wp.kernel
def advance_rays(
    first: int,
    # Params
    close: float,  # distance that counts as a hit, and what it grows by with distance from the eye
    spread: float,
    # In
    count: wp.array[int],  # (1,) slots in use, or empty: all
    ray: wp.array[int],  # (slots,)
    distance: wp.array2d[float],  # (slots, 1) of the field there
    t_end: wp.array[float],  # (n_rays,)
    # In/out
    t: wp.array[float],  # (n_rays,)
    state: wp.array[int],  # (n_rays,)
    # Out
    out_alive: wp.array[int],  # (slots,) 1 where the ray is still traced
):
    """Advance each ray by the distance at its point, back where it is negative (Hart 1996). One thread per slot."""
    i = first + wp.tid()
    out_alive[i] = 0
    if count:
        if i >= count[0]:
            return
    r = ray[i]
    d = distance[i, 0]
    t[r] += d
    if wp.abs(d) < close + spread * t[r]:
        state[r] = HIT
    elif t[r] > t_end[r] or t[r] < 0.0:
        state[r] = MISSED
    else:
        out_alive[i] = 1


@wp.kernel
def mark_hits(
    first: int,
    # Params
    take_traced: int,  # 1: rays that have not arrived anywhere count as hits
    # In/out
    state: wp.array[int],  # (n_rays,)
    # Out
    out_hit: wp.array[int],  # (n_rays,)
):
    """Mark the rays that have met the surface. One thread per ray."""
    i = first + wp.tid()
    if take_traced != 0 and state[i] == TRACED:
        state[i] = HIT
    out_hit[i] = wp.where(state[i] == HIT, 1, 0)


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


@wp.func
def slice_color(distance: float, blur: float) -> wp.vec3:
    """False colour of a signed distance, linear, with lines of equal distance and a black one at 0.

    Warm outside, blue inside, both darker with distance; edges of lines are smooth over `blur`.
    """
    far = 1.0 - wp.exp(-6.0 * wp.abs(distance))
    near_color = wp.vec3(0.95, 0.85, 0.7)
    color = wp.lerp(near_color, wp.vec3(0.8, 0.25, 0.05), far)
    if distance < 0.0:
        color = wp.lerp(wp.vec3(0.75, 0.88, 0.95), wp.vec3(0.02, 0.12, 0.5), far)
    nearest = wp.abs(distance - ISO_STEP * wp.round(distance / ISO_STEP))
    color *= 0.6 + 0.4 * wp.smoothstep(0.5 * ISO_WIDTH, 0.5 * ISO_WIDTH + blur, nearest)
    return color * wp.smoothstep(ISO_WIDTH, ISO_WIDTH + blur, wp.abs(distance))


@wp.kernel
def shade_slice(
    first: int,
    # Params
    pixel: float,  # of the picture, at distance 1
    opacity: float,  # of the surface in front of the plane
    # In
    ray: wp.array[int],  # (n,) ray of each point
    distance: wp.array2d[float],  # (n, 1) of the field there
    t_plane: wp.array[float],  # (n_rays,)
    state: wp.array[int],  # (n_rays,)
    # In/out
    color: wp.array[wp.vec3],  # (n_rays,) linear; of the surface in front
):
    """Show the distances on the plane, through what is in front of it. One thread per ray that meets the plane."""
    i = first + wp.tid()
    r = ray[i]
    shown = slice_color(distance[i, 0], pixel * t_plane[r])
    if state[r] == HIT:
        shown = wp.lerp(shown, color[r], opacity)
    color[r] = shown


@wp.kernel
def show_normals(
    first: int,
    # Params
    background: float,
    # In
    state: wp.array[int],  # (n_rays,)
    normal: wp.array[wp.vec3],  # (n_rays,)
    # Out
    out_color: wp.array[wp.vec3],  # (n_rays,)
):
    """Write normals as colours (n + 1) / 2. One thread per ray."""
    i = first + wp.tid()
    shown = wp.vec3(background)
    if state[i] == HIT:
        shown = 0.5 * normal[i] + wp.vec3(0.5)
    out_color[i] = shown
