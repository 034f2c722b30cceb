"""NumPy twins of the learning core, written from the published formulas in double precision."""

import math
from itertools import pairwise

import numpy as np

PRIMES = (1, 2654435761, 805459861, 3674653429)


def grid_levels(n_dims, n_levels, log2_hashmap_size, base_resolution, per_level_scale):
    """(scale, resolution, entries, hashed) of every level; single-precision scale as in tiny-cuda-nn's grid_scale."""
    levels = []
    log2_scale = np.float32(np.log2(np.float32(per_level_scale)))
    for i in range(n_levels):
        scale = np.float32(np.exp2(np.float64(np.float32(i) * log2_scale))) * np.float32(base_resolution) - np.float32(
            1
        )
        resolution = math.ceil(scale) + 1
        n_entries = min(-(-(resolution**n_dims) // 8) * 8, 2**log2_hashmap_size)
        levels.append((float(scale), resolution, n_entries, resolution**n_dims > n_entries))
    return levels


def grid_corners(x, level):
    """Entries (n, 2^d) and weights (n, 2^d) of the cell around each row of x; single-precision positions."""
    scale, resolution, n_entries, hashed = level
    n_dims = x.shape[1]
    position = np.float64(np.clip(np.float32(x), 0, 1)) * np.float64(scale) + 0.5
    position = np.float64(np.float32(position))  # one rounding, like a fused multiply-add
    cell = np.floor(position)
    fraction = position - cell
    entries, weights = [], []
    for corner in range(2**n_dims):
        bits = np.array([corner >> d & 1 for d in range(n_dims)])
        vertex = (cell + bits).astype(np.uint64)
        if hashed:
            index = np.zeros(len(x), np.uint64)
            for d in range(n_dims):
                index ^= vertex[:, d] * np.uint64(PRIMES[d]) & np.uint64(0xFFFFFFFF)
        else:
            index = sum(vertex[:, d] * np.uint64(resolution**d) for d in range(n_dims))
        entries.append(index % np.uint64(n_entries))
        weights.append(np.where(bits == 1, fraction, 1 - fraction).prod(axis=1))
    return np.stack(entries, 1).astype(np.int64), np.stack(weights, 1)


def grid_encode(x, params, levels, n_features):
    """Interpolated features (n, levels * n_features) of a hash grid (Müller et al. 2022, sec. 3)."""
    out, first = [], 0
    table = params.reshape(-1, n_features).astype(np.float64)
    for level in levels:
        entries, weights = grid_corners(x, level)
        out.append((table[first + entries] * weights[:, :, None]).sum(axis=1))
        first += level[2]
    return np.concatenate(out, axis=1)


def triangle_wave(x, n_frequencies):
    """4 |frac(v) - 1/2| - 1 with v = x 2^(k-1) + k / 4, frequencies of one input together."""
    k = np.arange(n_frequencies)
    v = np.float64(x)[:, :, None] * 2.0 ** (k - 1) + k / 4
    return (4 * np.abs(v - np.floor(v) - 0.5) - 1).reshape(len(x), -1)


def one_blob(x, n_bins, wrap):
    """Integral of a quartic blob of radius 1 / n_bins over each bin, by its polynomial antiderivative."""
    edges = np.arange(n_bins + 1) / n_bins

    def cdf(t):
        u = np.clip(t * n_bins, -1, 1)
        return 15 / 16 * (u - 2 / 3 * u**3 + u**5 / 5) + 0.5

    t = edges - np.float64(x)[:, :, None]
    if wrap:
        values = np.diff(cdf(t) + cdf(t - 1) + cdf(t + 1), axis=2)
    else:
        at = cdf(t)
        at[:, :, 0], at[:, :, -1] = 0, 1
        values = np.diff(at, axis=2)
    return values.reshape(len(x), -1)


def encode(x, encoding, params):
    """Encode with a tiny-cuda-nn style dictionary and pad to a multiple of 16."""
    nested = encoding["nested"] if encoding["otype"] == "Composite" else [encoding]
    rest = x.shape[1] - sum(entry.get("n_dims_to_encode", 0) for entry in nested)
    columns, first, begin, pad = [], 0, 0, 1.0
    for entry in nested:
        n = entry.get("n_dims_to_encode", rest)
        part = x[:, begin : begin + n]
        begin += n
        pad = 1.0
        if entry["otype"] == "HashGrid":
            levels = grid_levels(
                n, entry["n_levels"], entry["log2_hashmap_size"], entry["base_resolution"], entry["per_level_scale"]
            )
            n_features = entry["n_features_per_level"]
            size = sum(level[2] for level in levels) * n_features
            columns.append(grid_encode(part, params[first : first + size], levels, n_features))
            first += size
            pad = 0.0
        elif entry["otype"] == "TriangleWave":
            columns.append(triangle_wave(part, entry["n_frequencies"]))
        elif entry["otype"] == "OneBlob":
            columns.append(one_blob(part, entry["n_bins"], entry.get("wrap", True)))
        else:
            columns.append(np.float64(part) * entry.get("scale", 1.0) + entry.get("offset", 0.0))
    code = np.concatenate(columns, axis=1)
    return np.pad(code, ((0, 0), (0, -code.shape[1] % 16)), constant_values=pad)


def field(x, params, encoding, network, n_outputs):
    """Evaluate encoding and network in double precision from one flat parameter vector."""
    width, n_hidden = network["n_neurons"], network["n_hidden_layers"]
    slope = {"ReLU": 0.0, "None": 1.0, "LeakyReLU": 0.01}[network.get("activation", "ReLU")]
    n_inputs = -(-encode_width(x.shape[1], encoding) // 16) * 16
    widths = [n_inputs] + [width] * n_hidden + [n_outputs]
    weights, first = [], 0
    for n_in, n_out in pairwise(widths):
        weights.append(np.float64(params[first : first + n_in * n_out]).reshape(n_in, n_out))
        first += n_in * n_out
    h = encode(x, encoding, params[first:])
    for w in weights[:-1]:
        h = h @ w
        h = np.where(h > 0, h, slope * h)
    return h @ weights[-1]


def encode_width(n_dims, encoding):
    """Columns of the code before padding."""
    nested = encoding["nested"] if encoding["otype"] == "Composite" else [encoding]
    rest = n_dims - sum(entry.get("n_dims_to_encode", 0) for entry in nested)
    width = 0
    for entry in nested:
        n = entry.get("n_dims_to_encode", rest)
        width += {
            "HashGrid": lambda n=n, e=entry: e["n_levels"] * e["n_features_per_level"],
            "TriangleWave": lambda n=n, e=entry: n * e["n_frequencies"],
            "OneBlob": lambda n=n, e=entry: n * e["n_bins"],
            "Identity": lambda n=n, e=entry: n,
        }[entry["otype"]]()
    return width


def relative_l2_luminance(prediction, target, denominator=None):
    """Mean of (p - t)^2 / (lum(p)^2 + 0.01); `denominator` freezes lum^2 + 0.01 where no gradient may flow."""
    if denominator is None:
        denominator = luminance_denominator(prediction)
    return np.mean((prediction - target) ** 2 / denominator)


def luminance_denominator(prediction):
    """lum^2 + 0.01 of the prediction, per row."""
    return (prediction @ np.array([0.299, 0.587, 0.114]))[:, None] ** 2 + 0.01


class Adam:
    """Adam with a counter per parameter: zero gradients skip table entries, L2 only on the first `n_matrix` weights."""

    def __init__(self, params, n_matrix, learning_rate, beta1, beta2, epsilon, l2_reg):
        self.w = np.float64(params)
        self.m, self.v, self.n = np.zeros_like(self.w), np.zeros_like(self.w), np.zeros(len(self.w), int)
        self.matrix = np.arange(len(self.w)) < n_matrix
        self.learning_rate, self.beta1, self.beta2 = learning_rate, beta1, beta2
        self.epsilon, self.l2_reg = epsilon, l2_reg

    def step(self, gradient):
        """Update the parameters whose gradient is not zero, and every matrix weight."""
        on = self.matrix | (gradient != 0)
        g = gradient[on] + np.where(self.matrix, self.l2_reg * self.w, 0)[on]
        self.n[on] += 1
        self.m[on] = self.beta1 * self.m[on] + (1 - self.beta1) * g
        self.v[on] = self.beta2 * self.v[on] + (1 - self.beta2) * g * g
        rate = self.learning_rate * np.sqrt(1 - self.beta2 ** self.n[on]) / (1 - self.beta1 ** self.n[on])
        self.w[on] -= rate * self.m[on] / (np.sqrt(self.v[on]) + self.epsilon)


class DebiasedEma:
    """W_t average: ((1 - a) / eta_t) W_t + (a eta_{t-1} / eta_t) average_{t-1}, eta_t = 1 - a^t."""

    def __init__(self, decay):
        self.decay, self.t, self.average = decay, 0, None

    def step(self, w):
        """Advance by one step whose weights are `w`."""
        self.t += 1
        before, now = 1 - self.decay ** (self.t - 1), 1 - self.decay**self.t
        old = 0.0 if self.average is None else self.average
        self.average = (1 - self.decay) / now * w + self.decay * before / now * old
