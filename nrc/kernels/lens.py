"""Calibrated cameras with lens distortion: rays through pixels, projection of points, colours of photographs.

A camera looks along its -z; x right, y up. Image coordinates run right and down, the centre of the first pixel is at
(0.5, 0.5) [px]. Distortion is OpenCV's: section "Camera Calibration and 3D Reconstruction" (`calib3d`) for the radial
and tangential one, section "Fisheye camera model" for the other; a fourth radial term k4 r^8 as in nerfstudio.
"""

import warp as wp

wp.set_module_options({"enable_backward": False})

PINHOLE = 0
OPENCV = 1
OPENCV_FISHEYE = 2

UNDISTORT_STEPS = wp.constant(12)  # quadratic convergence: 3 to 5 are used
UNDISTORT_TOLERANCE = wp.constant(1.0e-7)  # on the image plane at distance 1: below single precision at its border

vec6 = wp.types.vector(length=6, dtype=float)


@wp.struct
class CamerasView:
    """Cameras and their images, one after the other."""

    pixels: wp.array[wp.uint32]  # RGBA, 8 bits each, red lowest; rows from the top
    first_pixel: wp.array[wp.int64]  # (n,)
    size: wp.array[wp.vec2i]  # (n,) [px]
    origin: wp.array[wp.vec3]  # (n,)
    rotation: wp.array[wp.mat33]  # (n,) camera to scene, orthonormal
    focal: wp.array[wp.vec2]  # (n,) [px]
    center: wp.array[wp.vec2]  # (n,) principal point [px]
    distortion: wp.array[vec6]  # (n,) k1, k2, k3, k4, p1, p2
    model: wp.array[int]  # (n,) PINHOLE, OPENCV or OPENCV_FISHEYE
    n_images: int


@wp.func
def distort(x: float, y: float, k: vec6):
    """Image-plane point at distance 1 to its distorted place, and the derivatives (dxd/dx, dxd/dy, dyd/dy)."""
    r2 = x * x + y * y
    radial = 1.0 + r2 * (k[0] + r2 * (k[1] + r2 * (k[2] + r2 * k[3])))
    slope = k[0] + r2 * (2.0 * k[1] + r2 * (3.0 * k[2] + r2 * 4.0 * k[3]))  # d radial / d r2
    p1 = k[4]
    p2 = k[5]
    distorted = wp.vec2(
        x * radial + 2.0 * p1 * x * y + p2 * (r2 + 2.0 * x * x),
        y * radial + 2.0 * p2 * x * y + p1 * (r2 + 2.0 * y * y),
    )
    jacobian = wp.vec3(
        radial + 2.0 * x * x * slope + 2.0 * p1 * y + 6.0 * p2 * x,
        2.0 * (x * y * slope + p1 * x + p2 * y),
        radial + 2.0 * y * y * slope + 6.0 * p1 * y + 2.0 * p2 * x,
    )
    return distorted, jacobian


@wp.func
def undistort(q: wp.vec2, k: vec6) -> wp.vec2:
    """Image-plane point that `distort` moves to q, by Newton's method; the last iterate where it does not converge."""
    x = float(q[0])
    y = float(q[1])
    for _i in range(UNDISTORT_STEPS):
        distorted, jacobian = distort(x, y, k)
        ex = distorted[0] - q[0]
        ey = distorted[1] - q[1]
        determinant = jacobian[0] * jacobian[2] - jacobian[1] * jacobian[1]
        if wp.abs(determinant) < 1.0e-8:
            break
        dx = (jacobian[2] * ex - jacobian[1] * ey) / determinant
        dy = (jacobian[0] * ey - jacobian[1] * ex) / determinant
        x -= dx
        y -= dy
        if dx * dx + dy * dy < UNDISTORT_TOLERANCE * UNDISTORT_TOLERANCE:
            break
    return wp.vec2(x, y)


@wp.func
def fisheye_angle(theta: float, k: vec6):
    """Distance from the principal point at focal length 1 of light at angle theta, and its derivative."""
    t2 = theta * theta
    distance = theta * (1.0 + t2 * (k[0] + t2 * (k[1] + t2 * (k[2] + t2 * k[3]))))
    slope = 1.0 + t2 * (3.0 * k[0] + t2 * (5.0 * k[1] + t2 * (7.0 * k[2] + t2 * 9.0 * k[3])))
    return distance, slope


@wp.func
def fisheye_unproject(q: wp.vec2, k: vec6) -> wp.vec3:
    """Unit direction (x right, y down, z forward) of light that a fisheye lens brings to q."""
    radius = wp.length(q)
    theta = float(radius)
    for _i in range(UNDISTORT_STEPS):
        distance, slope = fisheye_angle(theta, k)
        if wp.abs(slope) < 1.0e-8:
            break
        step = (distance - radius) / slope
        theta = wp.clamp(theta - step, 0.0, wp.pi)
        if wp.abs(step) < UNDISTORT_TOLERANCE:
            break
    if radius < 1.0e-9:
        return wp.vec3(0.0, 0.0, 1.0)
    side = wp.sin(theta) / radius
    return wp.vec3(q[0] * side, q[1] * side, wp.cos(theta))


@wp.func
def camera_ray(cameras: CamerasView, i_image: int, px: wp.vec2):
    """Origin and unit direction of the ray through image point px [px] of a camera."""
    focal = cameras.focal[i_image]
    center = cameras.center[i_image]
    q = wp.vec2((px[0] - center[0]) / focal[0], (px[1] - center[1]) / focal[1])
    d = wp.vec3(q[0], q[1], 1.0)
    model = cameras.model[i_image]
    if model == wp.static(OPENCV):
        q = undistort(q, cameras.distortion[i_image])
        d = wp.vec3(q[0], q[1], 1.0)
    elif model == wp.static(OPENCV_FISHEYE):
        d = fisheye_unproject(q, cameras.distortion[i_image])
    direction = wp.normalize(cameras.rotation[i_image] * wp.vec3(d[0], -d[1], -d[2]))
    return cameras.origin[i_image], direction


@wp.func
def camera_project(cameras: CamerasView, i_image: int, p: wp.vec3) -> wp.vec3:
    """Image point of a scene point and its depth along the viewing axis: (px, py [px], depth).

    The third component is 0 where no ray of the camera reaches the point: behind it, or further out than the angle at
    which the distortion polynomial turns back. A fisheye lens gives the distance instead of the depth.
    """
    local = wp.transpose(cameras.rotation[i_image]) * (p - cameras.origin[i_image])
    x = local[0]
    y = -local[1]
    z = -local[2]
    k = cameras.distortion[i_image]
    q = wp.vec2(0.0, 0.0)
    depth = float(0.0)
    if cameras.model[i_image] == wp.static(OPENCV_FISHEYE):
        side = wp.sqrt(x * x + y * y)
        distance, slope = fisheye_angle(wp.atan2(side, z), k)
        if slope > 0.0:
            depth = wp.length(local)
            if side > 0.0:
                q = wp.vec2(x, y) * (distance / side)
    elif z > 0.0:
        q = wp.vec2(x, y) / z
        depth = z
        if cameras.model[i_image] == wp.static(OPENCV):
            distorted, jacobian = distort(q[0], q[1], k)
            if jacobian[0] * jacobian[2] - jacobian[1] * jacobian[1] <= 0.0 or jacobian[0] <= 0.0:
                depth = 0.0
            q = distorted
    focal = cameras.focal[i_image]
    center = cameras.center[i_image]
    return wp.vec3(q[0] * focal[0] + center[0], q[1] * focal[1] + center[1], depth)


@wp.func
def camera_pixel(cameras: CamerasView, i_image: int, x: int, y: int) -> wp.vec4:
    """Colour in the image's own encoding and alpha (straight), in [0, 1], of pixel (x, y)."""
    word = cameras.pixels[cameras.first_pixel[i_image] + wp.int64(y * cameras.size[i_image][0] + x)]
    byte = wp.uint32(255)
    return wp.vec4(
        float(word & byte),
        float((word >> wp.uint32(8)) & byte),
        float((word >> wp.uint32(16)) & byte),
        float(word >> wp.uint32(24)),
    ) * wp.static(1.0 / 255.0)
