"""Ray-triangle intersection: the closest hit and the any-hit query of the path tracer, over two levels.

The scene is one hierarchy over the triangles that stand in world space, and one over the boxes of instances, below
which lies a hierarchy for each mesh that instances share; rays are moved into its space with their length, so that
distances compare. On CUDA the queries are Warp's. On the CPU they traverse eight-wide hierarchies
(`nrc.kernels.bvh_build`) and test the eight boxes of a node, or the eight triangles of a leaf, at once with Clang's
portable vector types.
"""

import warp as wp

from nrc.kernels.bvh_build import BLOCK_FLOATS, LEAF_BIT, NODE_FLOATS, STACK_SIZE, WIDTH

wp.set_module_options({"enable_backward": False})


@wp.struct
class InstanceView:
    """`nrc.scene.Instance` with the hierarchy of its mesh; one that cannot be hit has none."""

    to_world: wp.mat44
    to_object: wp.mat44
    rest_to_world: wp.mat44  # where it stood when the scene was uploaded first
    facing: float  # -1 where to_world reflects, else 1
    first_face: int  # number of its mesh's first triangle in the scene
    first_light: int  # light table index of its first emissive triangle
    mesh: wp.uint64  # CUDA: id of the wp.Mesh
    nodes: wp.uint64  # CPU: (n_nodes, NODE_FLOATS) float32
    blocks: wp.uint64  # CPU: (n_leaves, BLOCK_FLOATS) float32


@wp.struct
class Accel:
    """Acceleration structure, filled by `nrc.bvh`: Warp's on CUDA, addresses on the CPU; 0 where there is nothing."""

    mesh: wp.uint64  # CUDA: id of the wp.Mesh in world space
    nodes: wp.uint64  # CPU: (n_nodes, NODE_FLOATS) float32
    blocks: wp.uint64  # CPU: (n_leaves, BLOCK_FLOATS) float32
    instance_bvh: wp.uint64  # CUDA: id of the wp.Bvh over instances
    instance_nodes: wp.uint64  # CPU: (n_nodes, NODE_FLOATS) float32, whose leaves are instances
    instances: wp.array[InstanceView]


@wp.struct
class Hit:
    """Closest intersection: the point is (1 - u - v) p0 + u p1 + v p2 of triangle `face`; `face` is -1 for a miss."""

    t: float
    face: int
    instance: int  # -1 for triangles in world space
    u: float
    v: float


# Slabs: (plane - o) / d with the exit distance enlarged to cover rounding (Ize 2013), also that of the triangle test.
# Triangles: Woop, Benthin and Wald 2013, "Watertight Ray/Triangle Intersection". The edge functions are evaluated as
# Kahan's difference of products, so that their sign is exact and neighbours agree about their shared edge.
_WALK = f"""
    typedef float F __attribute__((vector_size({4 * WIDTH})));
    typedef bool B __attribute__((ext_vector_type({WIDTH})));
    const F zero = {{}};
    auto bits = [](auto mask) {{
        B b = __builtin_convertvector(mask, B);
        unsigned char m;
        __builtin_memcpy(&m, &b, 1);
        return (unsigned)m;
    }};
    auto smaller = [](F a, F b) {{ return a < b ? a : b; }};
    auto larger = [](F a, F b) {{ return a > b ? a : b; }};
    auto sheared = [zero](F x, float s, F z) {{ return __builtin_elementwise_fma(zero - s, z, x); }};
    auto product_difference = [](F a, F b, F c, F d) {{
        F cd = c * d;
        return __builtin_elementwise_fma(a, b, -cd) + __builtin_elementwise_fma(-c, d, cd);
    }};
    float t = t_max;

    // Visit the leaves that the ray meets before t, until `leaf` says true.
    auto walk = [&](wp::uint64 node_data, const wp::vec3& o, const wp::vec3& d, auto leaf)
        __attribute__((always_inline)) {{
        const F* nodes = (const F*)node_data;
        // Rows of a node's near planes; those of the far planes are three on or back.
        float inv[3];
        int near_row[3], far_row[3];
        for (int a = 0; a < 3; ++a) {{
            inv[a] = 1.0f / (__builtin_fabsf(d[a]) > 1e-20f ? d[a] : __builtin_copysignf(1e-20f, d[a]));
            near_row[a] = inv[a] < 0.0f ? 3 + a : a;
            far_row[a] = inv[a] < 0.0f ? a : 3 + a;
        }}
        unsigned long long stack[{STACK_SIZE}];  // entry distance (non-negative, so its bits sort) and reference
        int size = 0;
        unsigned current = 0;
        while (true) {{
            if (current & {LEAF_BIT}u) {{
                if (leaf(current & {LEAF_BIT - 1}u)) return true;
            }} else {{
                const F* node = nodes + (size_t)current * {NODE_FLOATS // WIDTH};
                F enter = larger(
                    larger((node[near_row[0]] - o[0]) * inv[0], (node[near_row[1]] - o[1]) * inv[1]),
                    larger((node[near_row[2]] - o[2]) * inv[2], zero));
                F leave = smaller(
                    smaller((node[far_row[0]] - o[0]) * inv[0], (node[far_row[1]] - o[1]) * inv[1]),
                    smaller((node[far_row[2]] - o[2]) * inv[2], zero + t));
                unsigned children = bits(enter <= leave * 1.000001f);
                if (children) {{
                    const unsigned* reference = (const unsigned*)(node + 6);
                    unsigned entry_bits[{WIDTH}];
                    __builtin_memcpy(entry_bits, &enter, sizeof(enter));
                    auto take = [&]() {{
                        const unsigned i = __builtin_ctz(children);
                        children &= children - 1;
                        return (unsigned long long)entry_bits[i] << 32 | reference[i];
                    }};
                    unsigned long long nearest = take();
                    const int base = size;
                    while (children) {{
                        unsigned long long entry = take();
                        if (ordered && entry < nearest) {{
                            const unsigned long long swapped = entry;
                            entry = nearest;
                            nearest = swapped;
                        }}
                        int place = size++;
                        for (; ordered && place > base && stack[place - 1] < entry; --place)
                            stack[place] = stack[place - 1];
                        stack[place] = entry;
                    }}
                    current = (unsigned)nearest;
                    continue;
                }}
            }}
            unsigned t_bits;
            __builtin_memcpy(&t_bits, &t, 4);
            do {{
                if (!size) return false;
                current = (unsigned)stack[--size];
            }} while ((unsigned)(stack[size] >> 32) > t_bits);
        }}
    }};

    // Visit the triangles that the ray meets before t, until `found` says true.
    auto triangles = [&](wp::uint64 node_data, wp::uint64 block_data, const wp::vec3& o, const wp::vec3& d, auto found)
        __attribute__((always_inline)) {{
        const F* blocks = (const F*)block_data;
        // Shear that turns the ray into the z axis.
        int kz = __builtin_fabsf(d[0]) > __builtin_fabsf(d[1]) ? 0 : 1;
        if (__builtin_fabsf(d[2]) > __builtin_fabsf(d[kz])) kz = 2;
        const int kx = (kz + 1) % 3, ky = (kz + 2) % 3;
        const float sz = 1.0f / d[kz], sx = d[kx] * sz, sy = d[ky] * sz;
        return walk(node_data, o, d, [&](unsigned leaf) __attribute__((always_inline)) {{
            const F* block = blocks + (size_t)leaf * {BLOCK_FLOATS // WIDTH};
            F az = block[kz] - o[kz], bz = block[3 + kz] - o[kz], cz = block[6 + kz] - o[kz];
            F ax = sheared(block[kx] - o[kx], sx, az), ay = sheared(block[ky] - o[ky], sy, az);
            F bx = sheared(block[3 + kx] - o[kx], sx, bz), by = sheared(block[3 + ky] - o[ky], sy, bz);
            F cx = sheared(block[6 + kx] - o[kx], sx, cz), cy = sheared(block[6 + ky] - o[ky], sy, cz);
            F u = product_difference(cx, by, cy, bx);
            F v = product_difference(ax, cy, ay, cx);
            F w = product_difference(bx, ay, by, ax);
            F least = smaller(u, smaller(v, w));
            F most = larger(u, larger(v, w));
            F det = u + v + w;
            auto inside = ((least >= 0.0f) | (most <= 0.0f)) & (det != 0.0f);
            if (!bits(inside)) return false;
            F distance = (u * az + v * bz + w * cz) * sz / det;
            unsigned hits = bits(inside & (distance > 0.0f) & (distance < t));
            return hits ? found(hits, distance, v, w, det, (const int*)(block + 9)) : false;
        }});
    }};
"""

# A ray in an instance's space. Its direction keeps the length that the transform gives it.
_INTO_OBJECT = """
    const auto& instance = accel.instances.data[i];
    const wp::vec3 p = wp::transform_point(instance.to_object, o);
    const wp::vec3 r = wp::transform_vector(instance.to_object, d);
"""

_CLOSEST = f"""
#if defined(__CUDA_ARCH__)
    float sign;
    wp::vec3 normal;
    float weight_0, weight_1;  // Warp's u and v weigh p0 and p1
    if (accel.mesh && wp::mesh_query_ray(accel.mesh, o, d, t_max, hit.t, weight_0, weight_1, sign, normal, hit.face)) {{
        hit.u = weight_1;
        hit.v = 1.0f - weight_0 - weight_1;
    }}
    if (accel.instance_bvh) {{
        wp::bvh_query_t query = wp::bvh_query_ray(accel.instance_bvh, o, d, -1);
        int i;
        while (wp::bvh_query_ray_next(query, i, hit.t)) {{
            {_INTO_OBJECT}
            float distance;
            int face;
            if (instance.mesh
                && wp::mesh_query_ray(instance.mesh, p, r, hit.t, distance, weight_0, weight_1, sign, normal, face)) {{
                hit.t = distance;
                hit.u = weight_1;
                hit.v = 1.0f - weight_0 - weight_1;
                hit.face = instance.first_face + face;
                hit.instance = i;
            }}
        }}
    }}
#else
    const bool ordered = true;
    {_WALK}
    auto closest = [&](wp::uint64 nodes, wp::uint64 blocks, const wp::vec3& p, const wp::vec3& r, int first, int i)
        __attribute__((noinline)) {{
        triangles(nodes, blocks, p, r, [&](unsigned hits, F distance, F v, F w, F det, const int* face) {{
            while (hits) {{
                unsigned k = __builtin_ctz(hits);
                hits &= hits - 1;
                if (distance[k] < t) {{
                    hit.t = t = distance[k];
                    hit.u = v[k] / det[k];
                    hit.v = w[k] / det[k];
                    hit.face = first + face[k];
                    hit.instance = i;
                }}
            }}
            return false;
        }});
    }};
    if (accel.nodes) closest(accel.nodes, accel.blocks, o, d, 0, -1);
    if (accel.instance_nodes) {{
        walk(accel.instance_nodes, o, d, [&](unsigned i) {{
            {_INTO_OBJECT}
            if (instance.nodes) closest(instance.nodes, instance.blocks, p, r, instance.first_face, i);
            return false;
        }});
    }}
#endif
"""

_OCCLUDED = f"""
#if defined(__CUDA_ARCH__)
    if (accel.mesh && wp::mesh_query_ray_anyhit(accel.mesh, o, d, t_max)) return true;
    if (accel.instance_bvh) {{
        wp::bvh_query_t query = wp::bvh_query_ray(accel.instance_bvh, o, d, -1);
        int i;
        while (wp::bvh_query_ray_next(query, i, t_max)) {{
            {_INTO_OBJECT}
            if (instance.mesh && wp::mesh_query_ray_anyhit(instance.mesh, p, r, t_max)) return true;
        }}
    }}
    return false;
#else
    const bool ordered = false;  // any order will do, and sorting costs more than it saves
    {_WALK}
    auto any = [&](wp::uint64 nodes, wp::uint64 blocks, const wp::vec3& p, const wp::vec3& r)
        __attribute__((noinline)) {{
        return triangles(nodes, blocks, p, r, [](unsigned, F, F, F, F, const int*) {{ return true; }});
    }};
    if (accel.nodes && any(accel.nodes, accel.blocks, o, d)) return true;
    return accel.instance_nodes && walk(accel.instance_nodes, o, d, [&](unsigned i) {{
        {_INTO_OBJECT}
        return instance.nodes && any(instance.nodes, instance.blocks, p, r);
    }});
#endif
"""


@wp.func_native(_CLOSEST)
def _query_closest(accel: Accel, o: wp.vec3, d: wp.vec3, t_max: float, hit: wp.ref[Hit]): ...  # type: ignore[type-arg]


@wp.func_native(_OCCLUDED)
def _query_any(accel: Accel, o: wp.vec3, d: wp.vec3, t_max: float) -> bool: ...  # type: ignore[empty-body]


@wp.func
def ray_closest(accel: Accel, o: wp.vec3, d: wp.vec3, t_max: float) -> Hit:
    """Closest hit with 0 < t < t_max along the unit direction d."""
    hit = Hit()
    hit.t = t_max
    hit.face = -1
    hit.instance = -1
    _query_closest(accel, o, d, t_max, hit)
    return hit


@wp.func
def ray_occluded(accel: Accel, o: wp.vec3, d: wp.vec3, t_max: float) -> bool:
    """Whether anything is hit with 0 < t < t_max along the unit direction d."""
    return _query_any(accel, o, d, t_max)
