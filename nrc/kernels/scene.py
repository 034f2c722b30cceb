"""The scene on the device, and what a ray finds at a hit: position, frame, resolved material, emission, opacity."""

import warp as wp

from nrc.kernels.bsdf import Bsdf, bsdf_transmits
from nrc.kernels.intersect import Accel, Hit, ray_closest, ray_occluded
from nrc.kernels.light_tree import LightNode
from nrc.kernels.sampling import Frame, frame_from_normal, frame_from_tangent, max_component
from nrc.kernels.texture import TextureView, texture_eval

wp.set_module_options({"enable_backward": False})

HAS_NORMALS = wp.constant(1)
HAS_UV = wp.constant(2)
HAS_COLORS = wp.constant(4)
HAS_TANGENTS = wp.constant(8)

ALPHA_OPAQUE = wp.constant(0)
ALPHA_MASK = wp.constant(1)
ALPHA_BLEND = wp.constant(2)

LIGHT_TRIANGLE = wp.constant(0)
LIGHT_POINT = wp.constant(1)
LIGHT_SPOT = wp.constant(2)
LIGHT_DIRECTIONAL = wp.constant(3)
LIGHT_ENVIRONMENT = wp.constant(4)

RAY_EPSILON = wp.constant(8.94e-5)  # 1500 ulp at 1: how far a ray starts off the surface, relative to the coordinates
SHADOW_EPSILON = wp.constant(8.94e-4)  # relative shortening of shadow rays, so that they stop before the light
MAX_ALPHA_LAYERS = wp.constant(64)
BUMP_STEP = wp.constant(1.0 / 16.0)  # [texel]


@wp.struct
class MaterialView:
    """`nrc.scene.Material` with textures as indices, -1 for none."""

    bsdf: Bsdf  # factors; textures multiply them at the hit
    base_color_texture: int
    specular_texture: int
    transmittance_texture: int
    roughness_texture: int
    metallic_roughness_texture: int
    transmission_texture: int
    specular_factor_texture: int
    emission_texture: int
    opacity_texture: int
    normal_texture: int
    bump_texture: int
    emission: wp.vec3  # [W m^-2 sr^-1]
    emission_two_sided: int
    opacity: float
    opacity_from_base_color: int
    alpha_mode: int
    alpha_cutoff: float
    two_sided: int
    normal_scale: float
    bump_scale: float
    is_textured: int  # whether any texture or vertex colour can change the factors
    needs_tangent: int  # whether the frame's rotation around the normal matters


@wp.struct
class LightView:
    """One entry of the light table."""

    kind: int
    triangle: int
    instance: int  # that the triangle belongs to, -1 in world space
    leaf: int  # of the light tree
    share: float  # of the leaf, whose other light, if any, is next to this one
    position: wp.vec3
    direction: wp.vec3  # the way the light travels
    intensity: wp.vec3  # [W sr^-1], or [W m^-2] for directional lights
    inner_angle: float  # [rad]
    outer_angle: float  # [rad]
    smooth: int  # falloff squared in the cosine instead of linear in the angle


@wp.struct
class SceneView:
    """Scene arrays; triangles are numbered over all meshes, those in world space first.

    Vertices of meshes that instances place are in the mesh's own space.
    """

    accel: Accel
    positions: wp.array[wp.vec3]
    rest_positions: wp.array[wp.vec3]  # where they were when the scene was uploaded first
    indices: wp.array[wp.vec3i]
    normals: wp.array[wp.vec3]
    uv0: wp.array[wp.vec2]
    uv1: wp.array[wp.vec2]
    colors: wp.array[wp.vec4]
    tangents: wp.array[wp.vec4]
    triangle_material: wp.array[int]
    triangle_mesh: wp.array[int]  # index into the host scene's meshes
    triangle_attributes: wp.array[int]  # HAS_* flags
    triangle_light: wp.array[int]  # light table index, counted from the instance's first; -1: does not emit
    materials: wp.array[MaterialView]
    textures: wp.array[TextureView]
    texels: wp.array[wp.uint32]
    srgb_to_linear: wp.array[float]  # (256,)
    has_alpha: int  # whether any material lets light pass by opacity
    lights: wp.array[LightView]  # those with a place first, the environment last
    n_lights: int
    n_placed_lights: int
    light_cdf: wp.array[float]  # of the choice between the tree and each light without a place
    light_nodes: wp.array[LightNode]  # tree over the lights with a place, the root at 1
    light_depth: int
    leaf_lights: wp.array[int]  # (2^depth,) light table index of the first light, -1 for none
    environment: wp.array[wp.vec3]  # radiance before the scale, row-major
    environment_scale: float
    environment_width: int
    environment_height: int
    environment_rows: wp.array[float]  # marginal CDF over rows, height + 1
    environment_columns: wp.array[float]  # conditional CDFs, height × (width + 1)
    environment_to_world: wp.mat33
    environment_light: int  # light table index, -1 without environment
    center: wp.vec3  # bounding sphere
    radius: float


@wp.struct
class Surface:
    """A point on a surface and its material there."""

    p: wp.vec3
    ng: wp.vec3  # geometric normal, towards the triangle's front
    frame: Frame  # shading frame
    n: wp.vec3  # shading normal before bump and normal maps
    is_mapped: int  # whether such a map turned the frame
    bsdf: Bsdf
    emission: wp.vec3  # towards the viewer, zero on a side that does not emit
    two_sided: int


@wp.func
def scene_texture(scene: wp.ref[SceneView], i: int, uv0: wp.vec2, uv1: wp.vec2) -> wp.vec4:
    """Texture `i` at a surface point."""
    return texture_eval(scene.textures[i], scene.texels, scene.srgb_to_linear, uv0, uv1)


@wp.func
def scene_texture_rgb(scene: wp.ref[SceneView], i: int, uv0: wp.vec2, uv1: wp.vec2) -> wp.vec3:
    """Colour of texture `i` at a surface point."""
    c = scene_texture(scene, i, uv0, uv1)
    return wp.vec3(c[0], c[1], c[2])


@wp.func
def interpolate_uv(values: wp.array[wp.vec2], vertices: wp.vec3i, u: float, v: float) -> wp.vec2:
    """Texture coordinates at barycentrics (u, v)."""
    return (1.0 - u - v) * values[vertices[0]] + u * values[vertices[1]] + v * values[vertices[2]]


@wp.func
def hit_uv0(scene: wp.ref[SceneView], hit: Hit) -> wp.vec2:
    """First texture coordinate set at a hit, the barycentrics where the mesh has none."""
    if (scene.triangle_attributes[hit.face] & HAS_UV) == 0:
        return wp.vec2(hit.u, hit.v)
    return interpolate_uv(scene.uv0, scene.indices[hit.face], hit.u, hit.v)


@wp.func
def hit_uv1(scene: wp.ref[SceneView], hit: Hit) -> wp.vec2:
    """Second texture coordinate set at a hit; the first where the mesh has one only."""
    if scene.uv1.shape[0] <= 1:
        return hit_uv0(scene, hit)
    return interpolate_uv(scene.uv1, scene.indices[hit.face], hit.u, hit.v)


@wp.func
def hit_color(scene: wp.ref[SceneView], hit: Hit) -> wp.vec4:
    """Vertex colour at a hit, white where the mesh has none."""
    if (scene.triangle_attributes[hit.face] & HAS_COLORS) == 0:
        return wp.vec4(1.0, 1.0, 1.0, 1.0)
    vertices = scene.indices[hit.face]
    return (
        (1.0 - hit.u - hit.v) * scene.colors[vertices[0]]
        + hit.u * scene.colors[vertices[1]]
        + hit.v * scene.colors[vertices[2]]
    )


@wp.func
def hit_opacity(scene: wp.ref[SceneView], hit: Hit) -> float:
    """Fraction of light the surface stops at a hit, after the alpha mode: 0 lets all pass, 1 none."""
    m = scene.triangle_material[hit.face]
    if scene.materials[m].alpha_mode == ALPHA_OPAQUE:
        return 1.0
    material = scene.materials[m]
    opacity = material.opacity * hit_color(scene, hit)[3]
    if material.opacity_from_base_color != 0 and material.base_color_texture >= 0:
        opacity *= scene_texture(scene, material.base_color_texture, hit_uv0(scene, hit), hit_uv1(scene, hit))[3]
    if material.opacity_texture >= 0:
        opacity *= scene_texture(scene, material.opacity_texture, hit_uv0(scene, hit), hit_uv1(scene, hit))[0]
    if material.alpha_mode == ALPHA_MASK:
        return wp.where(opacity < material.alpha_cutoff, 0.0, 1.0)
    return wp.clamp(opacity, 0.0, 1.0)


@wp.func
def offset_origin(p: wp.vec3, ng: wp.vec3, d: wp.vec3) -> wp.vec3:
    """Origin of a ray leaving `p` along `d`, moved off the surface by more than the rounding error of `p`."""
    magnitude = (1.0 + max_component(wp.vec3(wp.abs(p[0]), wp.abs(p[1]), wp.abs(p[2])))) * RAY_EPSILON
    return p + ng * wp.where(wp.dot(ng, d) < 0.0, -magnitude, magnitude)


@wp.func
def triangle_edges(scene: wp.ref[SceneView], face: int, instance: int) -> tuple[wp.vec3, wp.vec3, wp.vec3]:
    """First vertex of a triangle in world space, and its edges to the second and third."""
    vertices = scene.indices[face]
    p0 = scene.positions[vertices[0]]
    e1 = scene.positions[vertices[1]] - p0
    e2 = scene.positions[vertices[2]] - p0
    if instance >= 0:
        to_world = scene.accel.instances[instance].to_world
        p0 = wp.transform_point(to_world, p0)
        e1 = wp.transform_vector(to_world, e1)
        e2 = wp.transform_vector(to_world, e2)
    return p0, e1, e2


@wp.func
def triangle_normal(scene: wp.ref[SceneView], instance: int, e1: wp.vec3, e2: wp.vec3) -> wp.vec3:
    """Normal of the front of a triangle with these edges in world space, with the length of twice its area."""
    n = wp.cross(e1, e2)
    if instance >= 0:
        n = n * scene.accel.instances[instance].facing
    return n


@wp.func
def hit_position(scene: wp.ref[SceneView], hit: Hit) -> wp.vec3:
    """World space position of a hit, also in another pose of the scene than the one that was hit."""
    p0, e1, e2 = triangle_edges(scene, hit.face, hit.instance)
    return p0 + hit.u * e1 + hit.v * e2


@wp.func
def hit_normal(scene: wp.ref[SceneView], hit: Hit, ng: wp.vec3) -> wp.vec3:
    """Shading normal at a hit before maps, `ng` where the mesh has none; also in another pose of the scene."""
    if (scene.triangle_attributes[hit.face] & HAS_NORMALS) == 0:
        return ng
    vertices = scene.indices[hit.face]
    w = 1.0 - hit.u - hit.v
    n = w * scene.normals[vertices[0]] + hit.u * scene.normals[vertices[1]] + hit.v * scene.normals[vertices[2]]
    if hit.instance >= 0:
        # Normals move by the inverse transpose, which a reflection leaves on their side.
        n = wp.transform_vector(wp.transpose(scene.accel.instances[hit.instance].to_object), n)
    length = wp.length(n)
    if length > 1.0e-6:
        return n / length
    return ng


@wp.func
def rest_position(scene: wp.ref[SceneView], hit: Hit) -> wp.vec3:
    """Where the hit point was, in world space, when the scene was uploaded first."""
    vertices = scene.indices[hit.face]
    p = (
        (1.0 - hit.u - hit.v) * scene.rest_positions[vertices[0]]
        + hit.u * scene.rest_positions[vertices[1]]
        + hit.v * scene.rest_positions[vertices[2]]
    )
    if hit.instance >= 0:
        p = wp.transform_point(scene.accel.instances[hit.instance].rest_to_world, p)
    return p


@wp.func
def pass_through(scene: wp.ref[SceneView], hit: Hit, o: wp.vec3, d: wp.vec3) -> wp.vec3:
    """Origin of the ray from `o` along `d` behind the surface it hit."""
    _, e1, e2 = triangle_edges(scene, hit.face, hit.instance)
    return offset_origin(o + hit.t * d, wp.normalize(wp.cross(e1, e2)), d)


@wp.func
def hit_light(scene: wp.ref[SceneView], face: int, instance: int) -> int:
    """Light table index of a triangle, -1 for one that does not emit."""
    light = scene.triangle_light[face]
    if light >= 0 and instance >= 0:
        light += scene.accel.instances[instance].first_light
    return light


@wp.func
def emitted_radiance(scene: wp.ref[SceneView], hit: Hit, cos_front: float) -> wp.vec3:
    """Radiance leaving the surface at `hit` towards a direction with cosine `cos_front` to the front normal."""
    m = scene.triangle_material[hit.face]
    if cos_front <= 0.0 and scene.materials[m].emission_two_sided == 0:
        return wp.vec3(0.0, 0.0, 0.0)
    emission = scene.materials[m].emission
    texture = scene.materials[m].emission_texture
    if texture >= 0:
        emission = wp.cw_mul(emission, scene_texture_rgb(scene, texture, hit_uv0(scene, hit), hit_uv1(scene, hit)))
    return emission


@wp.func
def shadow_transmittance(scene: wp.ref[SceneView], o: wp.vec3, d: wp.vec3, t_max: float) -> float:
    """Fraction of light that passes from o to o + t_max d: 0 or 1, or a product over alpha-blended layers."""
    if scene.has_alpha == 0:
        return wp.where(ray_occluded(scene.accel, o, d, t_max), 0.0, 1.0)
    transmittance = float(1.0)
    origin = o
    remaining = float(t_max)
    for _ in range(MAX_ALPHA_LAYERS):
        hit = ray_closest(scene.accel, origin, d, remaining)
        if hit.face < 0:
            return transmittance
        transmittance *= 1.0 - hit_opacity(scene, hit)
        if transmittance <= 0.0:
            return 0.0
        next_origin = pass_through(scene, hit, origin, d)
        remaining -= wp.length(next_origin - origin)
        origin = next_origin
        if remaining <= 0.0:
            return transmittance
    return 0.0


@wp.func
def shading_frame(
    scene: wp.ref[SceneView], hit: Hit, material: wp.ref[MaterialView], n: wp.vec3, uv0: wp.vec2, uv1: wp.vec2
) -> Frame:
    """Shading frame around the interpolated normal `n`: tangent along u, then bump or normal map."""
    vertices = scene.indices[hit.face]
    attributes = scene.triangle_attributes[hit.face]
    w = 1.0 - hit.u - hit.v
    if material.needs_tangent == 0:
        return frame_from_normal(n)
    _, e1, e2 = triangle_edges(scene, hit.face, hit.instance)
    dp_du = e1
    dp_dv = e2
    facing = float(1.0)
    if hit.instance >= 0:
        facing = scene.accel.instances[hit.instance].facing
    handedness = facing
    if (attributes & HAS_UV) != 0:
        t0 = scene.uv0[vertices[0]]
        d1 = scene.uv0[vertices[1]] - t0
        d2 = scene.uv0[vertices[2]] - t0
        determinant = d1[0] * d2[1] - d1[1] * d2[0]
        if wp.abs(determinant) > 1.0e-20:
            dp_du = (d2[1] * e1 - d1[1] * e2) / determinant
            dp_dv = (d1[0] * e2 - d2[0] * e1) / determinant
            handedness = wp.where(determinant < 0.0, facing, -facing)  # v runs down the image, the bitangent up
    if (attributes & HAS_TANGENTS) != 0:
        tangent = (
            w * scene.tangents[vertices[0]] + hit.u * scene.tangents[vertices[1]] + hit.v * scene.tangents[vertices[2]]
        )
        dp_du = wp.vec3(tangent[0], tangent[1], tangent[2])
        if hit.instance >= 0:
            dp_du = wp.transform_vector(scene.accel.instances[hit.instance].to_world, dp_du)
        handedness = wp.where(scene.tangents[vertices[0]][3] < 0.0, -facing, facing)
    frame = frame_from_tangent(n, dp_du)
    if material.bump_texture >= 0:
        # Displaced surface p + h n (Blinn 1978), derivatives of h by central differences well inside a texel.
        i = material.bump_texture
        step_u = wp.vec2(BUMP_STEP / float(scene.textures[i].width), 0.0)
        step_v = wp.vec2(0.0, BUMP_STEP / float(scene.textures[i].height))
        dh_u = scene_texture(scene, i, uv0 + step_u, uv1 + step_u)[0]
        dh_u -= scene_texture(scene, i, uv0 - step_u, uv1 - step_u)[0]
        dh_v = scene_texture(scene, i, uv0 + step_v, uv1 + step_v)[0]
        dh_v -= scene_texture(scene, i, uv0 - step_v, uv1 - step_v)[0]
        bu = dp_du + n * (material.bump_scale * dh_u / (2.0 * step_u[0]) - wp.dot(n, dp_du))
        bv = dp_dv + n * (material.bump_scale * dh_v / (2.0 * step_v[1]) - wp.dot(n, dp_dv))
        bumped = wp.cross(bu, bv)
        length = wp.length(bumped)
        if length > 1.0e-12:
            bumped = bumped / length
            if wp.dot(bumped, n) < 0.0:
                bumped = -bumped
            frame = frame_from_tangent(bumped, bu)
    if material.normal_texture >= 0:
        c = scene_texture(scene, material.normal_texture, uv0, uv1)
        x = (2.0 * c[0] - 1.0) * material.normal_scale
        y = (2.0 * c[1] - 1.0) * material.normal_scale * handedness
        mapped = wp.normalize(frame.s * x + frame.t * y + frame.n * (2.0 * c[2] - 1.0))
        frame = frame_from_tangent(mapped, frame.s)
    return frame


@wp.func
def apply_textures(
    scene: wp.ref[SceneView],
    hit: Hit,
    material: wp.ref[MaterialView],
    uv0: wp.vec2,
    uv1: wp.vec2,
    bsdf: wp.ref[Bsdf],
):
    """Multiply the factors in `bsdf` by textures and vertex colours."""
    c = hit_color(scene, hit)
    bsdf.base_color = wp.cw_mul(bsdf.base_color, wp.vec3(c[0], c[1], c[2]))
    if material.base_color_texture >= 0:
        bsdf.base_color = wp.cw_mul(bsdf.base_color, scene_texture_rgb(scene, material.base_color_texture, uv0, uv1))
    if material.specular_texture >= 0:
        bsdf.specular = wp.cw_mul(bsdf.specular, scene_texture_rgb(scene, material.specular_texture, uv0, uv1))
    if material.transmittance_texture >= 0:
        tint = scene_texture_rgb(scene, material.transmittance_texture, uv0, uv1)
        bsdf.transmittance = wp.cw_mul(bsdf.transmittance, tint)
    if material.transmission_texture >= 0:
        bsdf.transmission = bsdf.transmission * scene_texture(scene, material.transmission_texture, uv0, uv1)[0]
    if material.specular_factor_texture >= 0:
        factor = scene_texture(scene, material.specular_factor_texture, uv0, uv1)[3]
        bsdf.specular_factor = bsdf.specular_factor * factor
    roughness = float(1.0)
    if material.roughness_texture >= 0:
        roughness = scene_texture(scene, material.roughness_texture, uv0, uv1)[0]
    if material.metallic_roughness_texture >= 0:
        packed = scene_texture(scene, material.metallic_roughness_texture, uv0, uv1)
        roughness *= packed[1]
        bsdf.metallic = bsdf.metallic * packed[2]
    bsdf.alpha = bsdf.alpha * (roughness * roughness)


@wp.func
def is_consistent(surface: wp.ref[Surface], wi: wp.vec3, cos_mapped: float) -> bool:
    """Whether `wi` lies on the same side of the surface before and after its normal was mapped; else no light flows."""
    return surface.is_mapped == 0 or wp.dot(surface.n, wi) * cos_mapped > 0.0


@wp.func
def lit_side(surface: wp.ref[Surface], wo: wp.vec3) -> wp.vec3:
    """Shading normal on the side that light must come from to leave along `wo`; zero where either will do."""
    if bsdf_transmits(surface.bsdf):
        return wp.vec3(0.0, 0.0, 0.0)
    return wp.where(wp.dot(surface.frame.n, wo) < 0.0, -surface.frame.n, surface.frame.n)


@wp.func
def find_surface(scene: wp.ref[SceneView], hit: Hit, d: wp.vec3, surface: wp.ref[Surface]):
    """Fill `surface` with everything the integrator needs at a hit of a ray with direction `d`."""
    p0, e1, e2 = triangle_edges(scene, hit.face, hit.instance)
    surface.p = p0 + hit.u * e1 + hit.v * e2
    surface.ng = wp.normalize(triangle_normal(scene, hit.instance, e1, e2))
    m = scene.triangle_material[hit.face]
    surface.bsdf = scene.materials[m].bsdf
    surface.two_sided = scene.materials[m].two_sided
    surface.emission = wp.vec3(0.0, 0.0, 0.0)
    uv0 = wp.vec2(hit.u, hit.v)
    uv1 = uv0
    if scene.materials[m].is_textured != 0:
        uv0 = hit_uv0(scene, hit)
        uv1 = hit_uv1(scene, hit)
        apply_textures(scene, hit, scene.materials[m], uv0, uv1, surface.bsdf)
    n = hit_normal(scene, hit, surface.ng)
    surface.n = n
    surface.is_mapped = wp.max(scene.materials[m].normal_texture, scene.materials[m].bump_texture) + 1
    surface.frame = shading_frame(scene, hit, scene.materials[m], n, uv0, uv1)
    if hit_light(scene, hit.face, hit.instance) >= 0:
        surface.emission = emitted_radiance(scene, hit, -wp.dot(surface.ng, d))
