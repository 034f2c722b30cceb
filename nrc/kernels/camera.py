"""Camera rays: pinhole and thin lens, one box-filtered sample per call."""

import warp as wp

from nrc.kernels.sampling import square_to_uniform_disk_concentric

wp.set_module_options({"enable_backward": False})


@wp.struct
class CameraView:
    """Camera looking along its -z; x right, y up."""

    origin: wp.vec3
    x: wp.vec3
    y: wp.vec3
    z: wp.vec3
    half_width: float  # of the image plane at distance 1
    half_height: float
    aperture_radius: float
    focus_distance: float
    width: int  # [px]
    height: int  # [px]


@wp.struct
class Ray:
    """Half-line; d is a unit vector."""

    o: wp.vec3
    d: wp.vec3


@wp.func
def camera_ray(camera: CameraView, x: int, y: int, u_film: wp.vec2, u_lens: wp.vec2) -> Ray:
    """Ray through a uniformly chosen point of pixel (x, y), row 0 at the top."""
    px = (2.0 * (float(x) + u_film[0]) / float(camera.width) - 1.0) * camera.half_width
    py = (1.0 - 2.0 * (float(y) + u_film[1]) / float(camera.height)) * camera.half_height
    ray = Ray()
    if camera.aperture_radius > 0.0:
        lens = square_to_uniform_disk_concentric(u_lens) * camera.aperture_radius
        f = camera.focus_distance
        ray.o = camera.origin + camera.x * lens[0] + camera.y * lens[1]
        ray.d = wp.normalize(camera.x * (px * f - lens[0]) + camera.y * (py * f - lens[1]) - camera.z * f)
    else:
        ray.o = camera.origin
        ray.d = wp.normalize(camera.x * px + camera.y * py - camera.z)
    return ray
