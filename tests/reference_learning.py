"""NumPy twins of the learning core, written from the published formulas in double precision."""

from itertools import pairwise

import numpy as np
from reference_encoding import encode, encode_width, grid_corners, grid_levels  # noqa: F401


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
