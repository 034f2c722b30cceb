"""NumPy twins of the encodings, written from the published formulas in double precision, with their derivatives."""

import math

import numpy as np

PRIMES = (1, 2654435761, 805459861, 3674653429)
GRID_TYPES = {"hashgrid": "Hash", "grid": "Hash", "densegrid": "Dense", "tiledgrid": "Tiled"}


def grid_levels(n_dims, n_levels, log2_hashmap_size, base_resolution, per_level_scale, grid_type="Hash"):
    """(scale, resolution, entries, hashed) of every level; single-precision scale as in tiny-cuda-nn's grid_scale."""
    levels = []
    log2_scale = np.float32(np.log2(np.float32(per_level_scale)))
    for i in range(n_levels):
        growth = np.float32(np.exp2(np.float64(np.float32(i) * log2_scale)))
        scale = growth * np.float32(base_resolution) - np.float32(1)
        resolution = math.ceil(scale) + 1
        n_entries = -(-(resolution**n_dims) // 8) * 8
        most = {"Hash": 2**log2_hashmap_size, "Dense": n_entries, "Tiled": base_resolution**n_dims}[grid_type]
        n_entries = min(n_entries, most)
        levels.append((float(scale), resolution, n_entries, grid_type == "Hash" and resolution**n_dims > n_entries))
    return levels


def levels_of(config, n_dims):
    """The levels of a grid's dictionary."""
    return grid_levels(
        n_dims,
        config["n_levels"],
        config.get("log2_hashmap_size", 19),
        config["base_resolution"],
        config["per_level_scale"],
        config.get("type", GRID_TYPES[config["otype"].lower()]),
    )


def grid_corners(x, level, interpolation="Linear"):
    """Entries (n, corners) and weights (n, corners)."""
    return grid_corners_with_slopes(x, level, interpolation)[:2]


def grid_corners_with_slopes(x, level, interpolation="Linear"):
    """Entries (n, corners), weights (n, corners) and their derivatives (n, corners, d); single-precision positions."""
    scale, resolution, n_entries, hashed = level
    n_dims = x.shape[1]
    position = np.float64(np.clip(np.float32(x), 0, 1)) * np.float64(scale) + 0.5
    position = np.float64(np.float32(position))  # one rounding, like a fused multiply-add
    cell = np.floor(position)
    fraction = position - cell
    slope = np.full_like(fraction, scale)
    if interpolation == "Smoothstep":
        slope = scale * 6 * fraction * (1 - fraction)
        fraction = fraction**2 * (3 - 2 * fraction)
    entries, weights, slopes = [], [], []
    for corner in range(1 if interpolation == "Nearest" else 2**n_dims):
        bits = np.array([corner >> d & 1 for d in range(n_dims)])
        vertex = (cell + bits).astype(np.uint64)
        if hashed:
            index = np.zeros(len(x), np.uint64)
            for d in range(n_dims):
                index ^= vertex[:, d] * np.uint64(PRIMES[d]) & np.uint64(0xFFFFFFFF)
        else:
            index = sum(vertex[:, d] * np.uint64(resolution**d) for d in range(n_dims)) & np.uint64(0xFFFFFFFF)
        entries.append(index % np.uint64(n_entries))
        factors = np.where(bits == 1, fraction, 1 - fraction)
        if interpolation == "Nearest":
            factors, slope = np.ones_like(fraction), np.zeros_like(fraction)
        weights.append(factors.prod(axis=1))
        others = [np.delete(factors, d, axis=1).prod(axis=1) for d in range(n_dims)]
        slopes.append(np.stack(others, 1) * np.where(bits == 1, slope, -slope))
    return np.stack(entries, 1).astype(np.int64), np.stack(weights, 1), np.stack(slopes, 1)


def grid(x, config, params):
    """Interpolated features of a grid (Müller et al. 2022, sec. 3) and their derivatives."""
    out, jacobian, first = [], [], 0
    table = params.reshape(-1, config["n_features_per_level"]).astype(np.float64)
    for level in levels_of(config, x.shape[1]):
        entries, weights, slopes = grid_corners_with_slopes(x, level, config.get("interpolation", "Linear"))
        values = table[first + entries]
        out.append(np.einsum("ncf,nc->nf", values, weights))
        jacobian.append(np.einsum("ncf,ncd->nfd", values, slopes))
        first += level[2]
    return np.concatenate(out, axis=1), np.concatenate(jacobian, axis=1)


def near_face(x, config):
    """Rows with a coordinate so close to a cell's face that single precision may round it to the other side."""
    near = np.zeros(len(x), bool)
    for scale, *_ in levels_of(config, x.shape[1]):
        position = np.float64(x) * scale + 0.5
        near |= (np.abs(position - np.round(position)) < (position + 1) * 2.0**-21).any(axis=1)
    return near


def grid_gradient(x, config, dL_dcode):
    """Gradient of a grid's parameters."""
    levels, width = levels_of(config, x.shape[1]), config["n_features_per_level"]
    gradient, first = np.zeros((sum(level[2] for level in levels), width)), 0
    for i, level in enumerate(levels):
        entries, weights = grid_corners(x, level, config.get("interpolation", "Linear"))
        d = np.float64(dL_dcode[:, i * width : (i + 1) * width])
        np.add.at(gradient, first + entries, weights[:, :, None] * d[:, None, :])
        first += level[2]
    return gradient.ravel()


def _separate(x, code, slope):
    """Columns and derivatives of an encoding of single inputs, whose values are (n, d, columns)."""
    jacobian = np.einsum("ndk,de->ndke", slope, np.eye(x.shape[1]))
    n_columns = code.shape[1] * code.shape[2]
    return code.reshape(len(x), n_columns), jacobian.reshape(len(x), n_columns, x.shape[1])


def frequency(x, config):
    """sin and cos of 2^k pi x in turns, frequencies of one input together (Mildenhall et al. 2020, Eq. 4)."""
    rate = np.pi * 2.0 ** np.arange(config["n_frequencies"])
    angle = np.float64(x)[:, :, None] * rate
    code = np.stack([np.sin(angle), np.cos(angle)], axis=3)
    slope = np.stack([rate * np.cos(angle), -rate * np.sin(angle)], axis=3)
    return _separate(x, code.reshape(*code.shape[:2], -1), slope.reshape(*code.shape[:2], -1))


def triangle_wave(x, config):
    """4 |frac(v) - 1/2| - 1 with v = x 2^(k-1) + k / 4, frequencies of one input together."""
    k = np.arange(config["n_frequencies"])
    v = np.float64(x)[:, :, None] * 2.0 ** (k - 1) + k / 4
    centred = v - np.floor(v) - 0.5
    return _separate(x, 4 * np.abs(centred) - 1, 4 * np.sign(centred) * 2.0 ** (k - 1))


def one_blob(x, config):
    """Integral of a quartic blob of radius 1 / n_bins over each bin, by its polynomial antiderivative."""
    n_bins, wrap = config["n_bins"], config.get("wrap", True)
    edges = np.arange(n_bins + 1) / n_bins
    t = edges - np.float64(x)[:, :, None]

    def cdf(t):
        u = np.clip(t * n_bins, -1, 1)
        return 15 / 16 * (u - 2 / 3 * u**3 + u**5 / 5) + 0.5

    def pdf(t):
        return n_bins * 15 / 16 * np.maximum(1 - (t * n_bins) ** 2, 0) ** 2

    if wrap:
        at, slope = (f(t) + f(t - 1) + f(t + 1) for f in (cdf, pdf))
    else:
        at, slope = cdf(t), pdf(t)
        at[:, :, 0], at[:, :, -1], slope[:, :, 0], slope[:, :, -1] = 0, 1, 0, 0
    return _separate(x, np.diff(at, axis=2), -np.diff(slope, axis=2))


def spherical_harmonics(x, config):
    """Real spherical harmonics from derivatives of Legendre polynomials, with (-1)^m (Condon and Shortley)."""
    vx, vy, vz = (2 * np.float64(x) - 1).T
    columns, jacobian = [], []
    for l in range(config["degree"]):  # noqa: E741
        for m in range(-l, l + 1):
            k = abs(m)
            norm = (2 * l + 1) / (4 * np.pi) * math.factorial(l - k) / math.factorial(l + k) * (2 if k else 1)
            p = np.polynomial.Legendre.basis(l).deriv(k) * (-1) ** k * math.sqrt(norm)
            power, before = (vx + 1j * vy) ** k, k * (vx + 1j * vy) ** max(0, k - 1)
            part = np.imag if m < 0 else np.real
            columns.append(p(vz) * part(power))
            slopes = (p(vz) * part(before), p(vz) * part(1j * before), p.deriv()(vz) * part(power))
            jacobian.append(2 * np.stack(slopes, 1))
    return np.stack(columns, 1), np.stack(jacobian, 1)


def identity(x, config):
    """scale x + offset."""
    scale = config.get("scale", 1.0)
    return np.float64(x) * scale + config.get("offset", 0.0), np.tile(scale * np.eye(x.shape[1]), (len(x), 1, 1))


TWINS = {
    "Frequency": frequency,
    "TriangleWave": triangle_wave,
    "OneBlob": one_blob,
    "SphericalHarmonics": spherical_harmonics,
    "Identity": identity,
}


def _nested(n_dims, config):
    """(entry, inputs) of a composite's entries or of the encoding itself."""
    nested = config["nested"] if config["otype"] == "Composite" else [config]
    rest = n_dims - sum(entry.get("n_dims_to_encode", 0) for entry in nested)
    begin = 0
    for entry in nested:
        begin, n = entry.get("dims_to_encode_begin", begin), entry.get("n_dims_to_encode", rest)
        if n > 0:
            yield entry, slice(begin, begin + n)
        begin += n


def is_grid(entry):
    """Whether a dictionary is that of a grid."""
    return entry["otype"].lower() in GRID_TYPES


def encode_with_jacobian(x, config, params, alignment=16):
    """Code with padding to a multiple of `alignment`, and its derivatives, of a tiny-cuda-nn style dictionary."""
    entries = list(_nested(x.shape[1], config))
    codes, jacobians, first = [], [], 0
    for i, (entry, columns) in enumerate(entries):
        part = x[:, columns]
        if is_grid(entry):
            size = sum(level[2] for level in levels_of(entry, part.shape[1])) * entry["n_features_per_level"]
            code, slopes = grid(part, entry, params[first : first + size])
            first += size
        else:
            code, slopes = TWINS[entry["otype"]](part, entry)
        jacobian = np.zeros((*code.shape, x.shape[1]))
        jacobian[:, :, columns] = slopes
        # Padding so that the next entry is aligned: grids to their features
        step = alignment
        if i + 1 < len(entries):
            after = entries[i + 1][0]
            step = after["n_features_per_level"] if is_grid(after) else 1
        before = sum(c.shape[1] for c in codes)
        pad = -(before + code.shape[1]) % step
        sides = (pad, 0) if entry["otype"] == "SphericalHarmonics" else (0, pad)
        codes.append(np.pad(code, ((0, 0), sides), constant_values=0.0 if is_grid(entry) else 1.0))
        jacobians.append(np.pad(jacobian, ((0, 0), sides, (0, 0))))
    return np.concatenate(codes, axis=1), np.concatenate(jacobians, axis=1)


def encode(x, encoding, params, alignment=16):
    """Encode with a tiny-cuda-nn style dictionary and pad to a multiple of `alignment`."""
    return encode_with_jacobian(x, encoding, params, alignment)[0]


def encode_width(n_dims, encoding):
    """Columns of the code before the final padding."""
    n_params = sum(
        sum(level[2] for level in levels_of(entry, columns.stop - columns.start)) * entry["n_features_per_level"]
        for entry, columns in _nested(n_dims, encoding)
        if is_grid(entry)
    )
    return encode(np.zeros((1, n_dims)), encoding, np.zeros(n_params), alignment=1).shape[1]
