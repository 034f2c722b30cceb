"""First-hit layers of a picture: albedo, normal, depth, position, material, object."""

import warp as wp

from nrc.kernels.bsdf import bsdf_albedo
from nrc.kernels.camera import CameraView, camera_ray
from nrc.kernels.intersect import ray_closest
from nrc.kernels.sampling import to_local
from nrc.kernels.scene import MAX_ALPHA_LAYERS, SceneView, Surface, find_surface, hit_opacity, pass_through
from nrc.kernels.trace import INFINITE

wp.set_module_options({"enable_backward": False})


@wp.kernel
def trace_first_hits(
    first: int,
    # Scene
    scene: SceneView,
    camera: CameraView,
    # Out
    out_albedo: wp.array[wp.vec3],  # (pixels,) diffuse + specular
    out_normal: wp.array[wp.vec3],  # (pixels,) shading normal, world space, towards the camera
    out_depth: wp.array[float],  # (pixels,) distance along the ray [scene units], 0 where nothing is hit
    out_position: wp.array[wp.vec3],  # (pixels,) world space [scene units]
    out_material: wp.array[int],  # (pixels,) index into the scene's materials, -1 where nothing is hit
    out_object: wp.array[int],  # (pixels,) index into the scene's meshes, -1 where nothing is hit
):
    """Describe what the centre of each pixel sees. One thread per pixel."""
    i = first + wp.tid()
    centre = wp.vec2(0.5, 0.5)
    ray = camera_ray(camera, i % camera.width, i // camera.width, centre, centre)
    o = ray.o
    d = ray.d
    hit = ray_closest(scene.accel, o, d, INFINITE)
    for _ in range(MAX_ALPHA_LAYERS):
        if hit.face < 0:
            break
        if hit_opacity(scene, hit) >= 0.5:
            break
        o = pass_through(scene, hit, o, d)
        hit = ray_closest(scene.accel, o, d, INFINITE)
    zero = wp.vec3(0.0, 0.0, 0.0)
    out_albedo[i] = zero
    out_normal[i] = zero
    out_depth[i] = 0.0
    out_position[i] = zero
    out_material[i] = -1
    out_object[i] = -1
    if hit.face >= 0:
        surface = Surface()
        find_surface(scene, hit, d, surface)
        wo = to_local(surface.frame, -d)
        if surface.two_sided != 0 and wo[2] < 0.0:
            wo = wp.vec3(wo[0], wo[1], -wo[2])
        albedo = bsdf_albedo(surface.bsdf, wo)
        out_albedo[i] = albedo.diffuse + albedo.specular
        n = surface.frame.n
        if wp.dot(n, d) > 0.0:
            n = -n
        out_normal[i] = n
        out_depth[i] = wp.length(surface.p - ray.o)
        out_position[i] = surface.p
        out_material[i] = scene.triangle_material[hit.face]
        out_object[i] = scene.triangle_mesh[hit.face]
