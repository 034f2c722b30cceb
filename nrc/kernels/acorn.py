"""Adaptive coordinate networks: blocks of features that an encoder's last layer computes and points interpolate.

Martel et al. 2021, "ACORN: Adaptive Coordinate Networks for Neural Scene Representation". The last layer of the
encoder turns its hidden values into thousands of features per block, more outputs than the networks of `network.py`
are made for; it is the linear map here, with its gradients and its Adam step. Cells of a block's grid lie one after
the other in rows, four to a chunk.
"""

import warp as wp

from .optimizer import GO

wp.set_module_options({"enable_backward": False, "max_unroll": 4})

N_FEATURES = 16  # of a cell
CELLS = 4  # of a chunk
Cell = wp.types.vector(length=N_FEATURES, dtype=float)
Chunk = wp.types.vector(length=CELLS * N_FEATURES, dtype=float)


@wp.func
def sum_of(v: Cell) -> float:
    """Sum of the components."""
    s = float(0.0)
    for f in range(wp.static(N_FEATURES)):
        s += v[f]
    return s


@wp.kernel
def expand(
    first: int,
    # Params
    n_rows: int,
    weights: wp.array2d[Chunk],  # (chunks, hidden + 1), the last column unused
    # In
    hidden: wp.array2d[float],  # (rows, hidden)
    # Out
    out_grids: wp.array2d[Chunk],  # (rows, chunks + 1), the last column unused
):
    """Multiply hidden values by the last layer's weights. One thread per chunk and row, rows fastest."""
    i = first + wp.tid()
    chunk = i // n_rows
    row = i % n_rows
    features = Chunk()
    for k in range(hidden.shape[1]):
        features += hidden[row, k] * weights[chunk, k]
    out_grids[row, chunk] = features


@wp.kernel
def expand_backward(
    first: int,
    # Params
    n_rows: int,
    weights: wp.array3d[Cell],  # (chunks, hidden + 1, CELLS)
    # In
    dL_dgrids: wp.array3d[Cell],  # (rows, chunks + 1, CELLS)
    # Out
    dL_dhidden: wp.array2d[float],  # (rows, hidden)
):
    """Carry gradients back to four hidden values of a row. One thread per four hidden values and row, rows fastest."""
    i = first + wp.tid()
    k = i // n_rows * 4
    row = i % n_rows
    a, b, c, d = Cell(), Cell(), Cell(), Cell()
    for chunk in range(weights.shape[0]):
        for cell in range(wp.static(CELLS)):
            g = dL_dgrids[row, chunk, cell]
            a += wp.cw_mul(g, weights[chunk, k, cell])
            b += wp.cw_mul(g, weights[chunk, k + 1, cell])
            c += wp.cw_mul(g, weights[chunk, k + 2, cell])
            d += wp.cw_mul(g, weights[chunk, k + 3, cell])
    dL_dhidden[row, k] = sum_of(a)
    dL_dhidden[row, k + 1] = sum_of(b)
    dL_dhidden[row, k + 2] = sum_of(c)
    dL_dhidden[row, k + 3] = sum_of(d)


@wp.kernel
def update_expansion(
    first: int,
    # Params
    beta1: float,
    beta2: float,
    epsilon: float,
    learning_rate: wp.array[float],  # (1)
    state: wp.array[int],  # of the decoder's optimizer, whose step this one accompanies
    n_steps: wp.array[int],  # (1), this step included
    # In
    n_rows: int,
    hidden: wp.array2d[float],  # (rows, hidden)
    dL_dgrids: wp.array2d[Chunk],  # (rows, chunks + 1)
    # In/out
    weights: wp.array2d[Chunk],  # (chunks, hidden + 1)
    m: wp.array2d[Chunk],  # as weights
    v: wp.array2d[Chunk],
):
    """Take one Adam step (Kingma and Ba 2015) on a row of weights of a chunk. One thread per such row."""
    if state[GO] == 0:
        return
    i = first + wp.tid()
    chunk = i // hidden.shape[1]
    k = i % hidden.shape[1]
    gradient = Chunk()
    for row in range(n_rows):
        gradient += hidden[row, k] * dL_dgrids[row, chunk]
    if not wp.isfinite(gradient):
        return
    t = float(n_steps[0])
    mean = beta1 * m[chunk, k] + (1.0 - beta1) * gradient
    square = beta2 * v[chunk, k] + (1.0 - beta2) * wp.cw_mul(gradient, gradient)
    m[chunk, k] = mean
    v[chunk, k] = square
    rate = learning_rate[0] * wp.sqrt(1.0 - wp.pow(beta2, t)) / (1.0 - wp.pow(beta1, t))
    w = weights[chunk, k]
    for f in range(wp.static(CELLS * N_FEATURES)):
        w[f] = w[f] - rate * mean[f] / (wp.sqrt(square[f]) + epsilon)
    weights[chunk, k] = w


@wp.func
def cell_weights(u: float, v: float, resolution: int):
    """Lower cell of a point of a block, and the fractions towards the next: the outer cells lie on the block's edge."""
    x = wp.clamp(u, 0.0, 1.0) * float(resolution - 1)
    y = wp.clamp(v, 0.0, 1.0) * float(resolution - 1)
    column = wp.min(int(x), resolution - 2)
    row = wp.min(int(y), resolution - 2)
    return row * resolution + column, x - float(column), y - float(row)


@wp.func
def cell_of(grids: wp.array3d[Cell], row: int, i: int) -> Cell:
    """Features of cell i."""
    return grids[row, i // CELLS, i % CELLS]


@wp.func
def interpolate(grids: wp.array3d[Cell], row: int, u: float, v: float, resolution: int) -> Cell:
    """Bilinear interpolation in the grid of a row at local coordinates."""
    i, a, b = cell_weights(u, v, resolution)
    lower = (1.0 - a) * cell_of(grids, row, i) + a * cell_of(grids, row, i + 1)
    upper = (1.0 - a) * cell_of(grids, row, i + resolution) + a * cell_of(grids, row, i + resolution + 1)
    return (1.0 - b) * lower + b * upper


@wp.kernel
def interpolate_points(
    first: int,
    # Params
    resolution: int,
    # In
    n_points: int,  # of a row
    grids: wp.array3d[Cell],  # (rows, chunks + 1, CELLS)
    local: wp.array2d[float],  # (rows n_points, 2)
    # Out
    out_features: wp.array2d[float],  # (rows n_points, N_FEATURES)
):
    """Interpolate a row's grid at its points. One thread per point."""
    i = first + wp.tid()
    features = interpolate(grids, i // n_points, local[i, 0], local[i, 1], resolution)
    for f in range(wp.static(N_FEATURES)):
        out_features[i, f] = features[f]


@wp.kernel
def interpolate_points_backward(
    first: int,
    # Params
    resolution: int,
    # In
    n_points: int,  # of a row
    local: wp.array2d[float],  # (rows n_points, 2)
    dL_dfeatures: wp.array[Cell],  # (rows n_points)
    # Out
    dL_dgrids: wp.array3d[Cell],  # (rows, chunks + 1, CELLS), overwritten
):
    """Sum the gradients of a row's points into its grid. One thread per row, so that none add to the same cell."""
    row = first + wp.tid()
    for i in range(resolution * resolution):
        dL_dgrids[row, i // CELLS, i % CELLS] = Cell()
    for point in range(row * n_points, (row + 1) * n_points):
        i, a, b = cell_weights(local[point, 0], local[point, 1], resolution)
        g = dL_dfeatures[point]
        dL_dgrids[row, i // CELLS, i % CELLS] += (1.0 - a) * (1.0 - b) * g
        i += 1
        dL_dgrids[row, i // CELLS, i % CELLS] += a * (1.0 - b) * g
        i += resolution
        dL_dgrids[row, i // CELLS, i % CELLS] += a * b * g
        i -= 1
        dL_dgrids[row, i // CELLS, i % CELLS] += (1.0 - a) * b * g


@wp.kernel
def interpolate_anywhere(
    first: int,
    # Params
    resolution: int,
    n_across: int,  # finest blocks along x
    n_down: int,  # and y
    finest: float,  # side of these
    # In
    n_blocks: int,
    keys: wp.array[int],  # (n_blocks), increasing: Morton code of a block's first finest block
    blocks: wp.array2d[float],  # (n_blocks, 3): x and y of the corner, side
    grids: wp.array3d[Cell],  # (n_blocks, chunks + 1, CELLS)
    x: wp.array2d[float],  # (points, 2): in the image, [0, 1]
    # Out
    out_features: wp.array2d[float],  # (points, N_FEATURES)
):
    """Find a point's block by its Morton code and interpolate there. One thread per point."""
    i = first + wp.tid()
    column = wp.clamp(int(x[i, 0] / finest), 0, n_across - 1)
    row = wp.clamp(int(x[i, 1] / finest), 0, n_down - 1)
    key = int(0)
    for bit in range(15):
        key = key | (((column >> bit) & 1) << (2 * bit)) | (((row >> bit) & 1) << (2 * bit + 1))
    low = int(0)
    high = int(n_blocks)
    while high - low > 1:  # keys[low] <= key < keys[high]
        middle = (low + high) // 2
        if keys[middle] <= key:
            low = middle
        else:
            high = middle
    u = (x[i, 0] - blocks[low, 0]) / blocks[low, 2]
    v = (x[i, 1] - blocks[low, 1]) / blocks[low, 2]
    features = interpolate(grids, low, u, v, resolution)
    for f in range(wp.static(N_FEATURES)):
        out_features[i, f] = features[f]
