"""The eight-wide bounding volume hierarchy of the CPU path: built top down by the binned surface area heuristic, and
fitted to moved vertices bottom up."""

import warp as wp

wp.set_module_options({"enable_backward": False})

WIDTH = 8  # children per node and triangles per leaf
BLOCK_FLOATS = 80  # a leaf: rows of WIDTH: x y z of vertices 0, 1, 2, and the face (as bits, -1 for none)
NODE_FLOATS = 64  # lower x y z, upper x y z, child (as bits), unused: eight rows of WIDTH
LEAF_BIT = 1 << 31  # set in the child reference of a leaf
SAH_DEPTH = 24  # deeper nodes are split by count, at most log8(2^31) + 1 = 11 more levels
MAX_DEPTH = 35
STACK_SIZE = (WIDTH - 1) * MAX_DEPTH + WIDTH

_BUILD = f"""
#if !defined(__CUDA_ARCH__)
    typedef float F4 __attribute__((vector_size(16)));
    struct Range {{ F4 lower, upper; int begin, end; }};
    struct Task {{ Range range; int node, depth; }};
    const int N_BINS = 16;
    F4* boxes = (F4*)box_data;
    int* order = (int*)order_data;
    float* nodes = (float*)node_data;
    int* leaves = (int*)leaf_data;
    int* counts = (int*)count_data;
    const float inf = __builtin_inff();
    const F4 far = {{inf, inf, inf, inf}};

    auto area = [](F4 lower, F4 upper) {{
        F4 e = upper - lower;
        return e[0] * e[1] + e[1] * e[2] + e[2] * e[0];
    }};

    auto bound = [&](Range& r) {{
        r.lower = far;
        r.upper = -far;
        for (int i = r.begin; i < r.end; ++i) {{
            r.lower = __builtin_elementwise_min(r.lower, boxes[2 * i]);
            r.upper = __builtin_elementwise_max(r.upper, boxes[2 * i + 1]);
        }}
    }};

    auto split = [&](const Range r, Range& left, Range& right, bool by_count) {{
        F4 lower = far, upper = -far;
        for (int i = r.begin; i < r.end; ++i) {{
            F4 c = boxes[2 * i] + boxes[2 * i + 1];
            lower = __builtin_elementwise_min(lower, c);
            upper = __builtin_elementwise_max(upper, c);
        }}
        F4 scale = {{0.0f, 0.0f, 0.0f, 0.0f}};
        for (int a = 0; a < 3; ++a)
            if (upper[a] - lower[a] > 1e-30f) scale[a] = 0.9999f * N_BINS / (upper[a] - lower[a]);

        float best_cost = inf;
        int best_axis = 0, best_bin = 0;
        if (!by_count) {{
            F4 bin_lower[3][N_BINS], bin_upper[3][N_BINS];
            int bin_count[3][N_BINS];
            for (int a = 0; a < 3; ++a)
                for (int k = 0; k < N_BINS; ++k) {{
                    bin_lower[a][k] = far;
                    bin_upper[a][k] = -far;
                    bin_count[a][k] = 0;
                }}
            for (int i = r.begin; i < r.end; ++i) {{
                F4 place = (boxes[2 * i] + boxes[2 * i + 1] - lower) * scale;
                for (int a = 0; a < 3; ++a) {{
                    int k = scale[a] > 0.0f ? (int)place[a] : 0;  // an infinite extent has no places
                    bin_lower[a][k] = __builtin_elementwise_min(bin_lower[a][k], boxes[2 * i]);
                    bin_upper[a][k] = __builtin_elementwise_max(bin_upper[a][k], boxes[2 * i + 1]);
                    ++bin_count[a][k];
                }}
            }}
            for (int a = 0; a < 3; ++a) {{
                if (scale[a] == 0.0f) continue;
                float right_cost[N_BINS];
                F4 l = far, u = -far;
                int n = 0;
                for (int k = N_BINS - 1; k > 0; --k) {{
                    l = __builtin_elementwise_min(l, bin_lower[a][k]);
                    u = __builtin_elementwise_max(u, bin_upper[a][k]);
                    n += bin_count[a][k];
                    right_cost[k] = n ? area(l, u) * ((n + {WIDTH - 1}) / {WIDTH}) : inf;
                }}
                l = far;
                u = -far;
                n = 0;
                for (int k = 0; k + 1 < N_BINS; ++k) {{
                    l = __builtin_elementwise_min(l, bin_lower[a][k]);
                    u = __builtin_elementwise_max(u, bin_upper[a][k]);
                    n += bin_count[a][k];
                    float cost = n ? area(l, u) * ((n + {WIDTH - 1}) / {WIDTH}) + right_cost[k + 1] : inf;
                    if (cost < best_cost) {{
                        best_cost = cost;
                        best_axis = a;
                        best_bin = k;
                    }}
                }}
            }}
        }}

        int middle = r.begin + (r.end - r.begin) / 2;
        if (best_cost < inf) {{
            middle = r.begin;
            for (int i = r.begin; i < r.end; ++i) {{
                F4 place = (boxes[2 * i] + boxes[2 * i + 1] - lower) * scale;
                if ((int)place[best_axis] > best_bin) continue;
                F4 l = boxes[2 * i], u = boxes[2 * i + 1];
                boxes[2 * i] = boxes[2 * middle];
                boxes[2 * i + 1] = boxes[2 * middle + 1];
                boxes[2 * middle] = l;
                boxes[2 * middle + 1] = u;
                int face = order[i];
                order[i] = order[middle];
                order[middle++] = face;
            }}
        }}
        left.begin = r.begin;
        left.end = right.begin = middle;
        right.end = r.end;
        bound(left);
        bound(right);
    }};

    Task tasks[{STACK_SIZE}];
    int n_tasks = 1, n_nodes = 1, n_leaves = 0, depth = 0;
    tasks[0].range.begin = 0;
    tasks[0].range.end = n_faces;
    tasks[0].node = 0;
    tasks[0].depth = 1;
    bound(tasks[0].range);
    while (n_tasks) {{
        Task task = tasks[--n_tasks];
        bool by_count = task.depth > {SAH_DEPTH};
        if (task.depth > depth) depth = task.depth;

        // Split the largest child until there are eight or all are leaves.
        Range child[{WIDTH}];
        int n = task.range.end > task.range.begin;
        child[0] = task.range;
        while (n < {WIDTH}) {{
            int largest = -1;
            float size = -1.0f;
            for (int i = 0; i < n; ++i) {{
                int count = child[i].end - child[i].begin;
                float s = by_count ? (float)count : area(child[i].lower, child[i].upper);
                if (count > {WIDTH} && s > size) {{
                    size = s;
                    largest = i;
                }}
            }}
            if (largest < 0) break;
            split(child[largest], child[largest], child[n++], by_count);
        }}

        float* node = nodes + (size_t)task.node * {NODE_FLOATS};
        for (int i = 0; i < {WIDTH}; ++i) {{
            int reference = 0;
            for (int a = 0; a < 3; ++a) {{
                node[a * {WIDTH} + i] = i < n ? child[i].lower[a] : inf;  // no ray meets an inverted box
                node[(3 + a) * {WIDTH} + i] = i < n ? child[i].upper[a] : -inf;
            }}
            if (i < n) {{
                int count = child[i].end - child[i].begin;
                if (count <= {WIDTH}) {{
                    leaves[2 * n_leaves] = child[i].begin;
                    leaves[2 * n_leaves + 1] = count;
                    reference = (int)({LEAF_BIT}u | (unsigned)n_leaves++);
                }} else {{
                    tasks[n_tasks].range = child[i];
                    tasks[n_tasks].node = reference = n_nodes++;
                    tasks[n_tasks++].depth = task.depth + 1;
                }}
            }}
            ((int*)node)[6 * {WIDTH} + i] = reference;
        }}
    }}
    counts[0] = n_nodes;
    counts[1] = n_leaves;
    counts[2] = depth;
#endif
"""


@wp.func_native(_BUILD)
def _build(
    n_faces: int,
    box_data: wp.uint64,
    order_data: wp.uint64,
    node_data: wp.uint64,
    leaf_data: wp.uint64,
    count_data: wp.uint64,
): ...


@wp.kernel
def build_bvh(
    # Params
    first: int,
    n_faces: int,
    # In/out
    boxes: wp.uint64,  # (n_faces, 2, 4) float32 address: lower and upper corner, reordered
    order: wp.uint64,  # (n_faces,) int32 address: face of each box, reordered
    # Out
    out_nodes: wp.uint64,  # (n_faces + 1, NODE_FLOATS) float32 address
    out_leaves: wp.uint64,  # (n_faces, 2) int32 address: first box and count
    out_counts: wp.uint64,  # (3,) int32 address: nodes, leaves, depth
):
    """Build the hierarchy of all boxes, the root in node 0. One thread."""
    _build(n_faces, boxes, order, out_nodes, out_leaves, out_counts)


# Children come after their parents, so one sweep from the last node to the first sees every child's boxes done.
_REFIT = f"""
#if !defined(__CUDA_ARCH__)
    float* nodes = (float*)node_data;
    float* blocks = (float*)block_data;
    const float* positions = (const float*)position_data;
    const int* indices = (const int*)index_data;
    const float inf = __builtin_inff();
    float largest = 0.0f;
    for (int leaf = 0; leaf < n_leaves; ++leaf) {{
        float* block = blocks + (size_t)leaf * {BLOCK_FLOATS};
        const int* face = (const int*)(block + 9 * {WIDTH});
        for (int i = 0; i < {WIDTH}; ++i)
            for (int k = 0; face[i] >= 0 && k < 9; ++k) {{
                const float x = positions[3 * (size_t)indices[3 * (size_t)face[i] + k / 3] + k % 3];
                block[k * {WIDTH} + i] = x;
                largest = __builtin_fmaxf(largest, __builtin_fabsf(x));
            }}
    }}
    const float padding = largest * 1.1920929e-7f;  // a ray along a face of a box still meets it
    for (int n = n_nodes - 1; n >= 0; --n) {{
        float* node = nodes + (size_t)n * {NODE_FLOATS};
        for (int i = 0; i < {WIDTH}; ++i) {{
            if (node[i] > node[3 * {WIDTH} + i]) continue;  // an inverted box has no child
            const unsigned reference = ((const unsigned*)node)[6 * {WIDTH} + i];
            for (int a = 0; a < 3; ++a) {{
                float lower = inf, upper = -inf;
                if (reference & {LEAF_BIT}u) {{
                    const float* block = blocks + (size_t)(reference & {LEAF_BIT - 1}u) * {BLOCK_FLOATS};
                    for (int j = 0; j < {WIDTH}; ++j)
                        for (int k = a; ((const int*)(block + 9 * {WIDTH}))[j] >= 0 && k < 9; k += 3) {{
                            lower = __builtin_fminf(lower, block[k * {WIDTH} + j]);
                            upper = __builtin_fmaxf(upper, block[k * {WIDTH} + j]);
                        }}
                    lower -= padding;
                    upper += padding;
                }} else {{
                    const float* child = nodes + (size_t)reference * {NODE_FLOATS};
                    for (int j = 0; j < {WIDTH}; ++j) {{
                        lower = __builtin_fminf(lower, child[a * {WIDTH} + j]);
                        upper = __builtin_fmaxf(upper, child[(3 + a) * {WIDTH} + j]);
                    }}
                }}
                node[a * {WIDTH} + i] = lower;
                node[(3 + a) * {WIDTH} + i] = upper;
            }}
        }}
    }}
#endif
"""


@wp.func_native(_REFIT)
def _refit(
    n_nodes: int,
    n_leaves: int,
    node_data: wp.uint64,
    block_data: wp.uint64,
    position_data: wp.uint64,
    index_data: wp.uint64,
): ...


@wp.kernel
def refit_bvh(
    first: int,
    n_nodes: int,
    n_leaves: int,
    # In
    positions: wp.uint64,  # (n, 3) float32 address
    indices: wp.uint64,  # (m, 3) int32 address
    # In/out
    nodes: wp.uint64,  # (n_nodes, NODE_FLOATS) float32 address
    blocks: wp.uint64,  # (n_leaves, BLOCK_FLOATS) float32 address
):
    """Fit triangles and boxes to moved vertices. One thread."""
    _refit(n_nodes, n_leaves, nodes, blocks, positions, indices)
