"""NumPy twins of activations, losses and networks, in double precision."""

import numpy as np

K = 10.0  # sharpness of Squareplus and Softplus


def _sigmoid(v):
    return np.exp(-np.logaddexp(0, -v))


def _squareplus(v):
    u, root = K * np.abs(v), np.hypot(K * v, 2.0)
    return np.where(v > 0, 0.5 * (root + u), 2.0 / (root + u)) / K


ACTIVATE = {
    "None": lambda v: v,
    "ReLU": lambda v: np.maximum(v, 0.0),
    "LeakyReLU": lambda v: np.where(v > 0, v, 0.01 * v),
    "SiLU": lambda v: v * _sigmoid(v),
    "Exponential": np.exp,
    "Sine": np.sin,
    "Sigmoid": _sigmoid,
    "Squareplus": _squareplus,
    "Softplus": lambda v: np.logaddexp(0.0, K * v) / K,
    "Tanh": np.tanh,
}
DERIVATIVE = {
    "None": np.ones_like,
    "ReLU": lambda v: np.float64(v > 0),
    "LeakyReLU": lambda v: np.where(v > 0, 1.0, 0.01),
    "SiLU": lambda v: _sigmoid(v) * (1 + v * _sigmoid(-v)),
    "Exponential": np.exp,
    "Sine": np.cos,
    "Sigmoid": lambda v: _sigmoid(v) * _sigmoid(-v),
    "Squareplus": lambda v: 0.5 + 0.5 * K * v / np.hypot(K * v, 2.0),
    "Softplus": lambda v: _sigmoid(K * v),
    "Tanh": lambda v: 1.0 / np.cosh(np.minimum(np.abs(v), 300.0)) ** 2,
}


def _luminance(p):
    rgb = p[:, :3] + (p[:, 3:6] if p.shape[1] >= 6 else 0.0)
    return (rgb @ np.array([0.299, 0.587, 0.114]))[:, None]


# Scale of a row's terms, through which no gradient flows
LOSS_SCALE = {
    "RelativeL2": lambda p, t: 1 / (p**2 + 0.01),
    "RelativeL2Luminance": lambda p, t: 1 / (_luminance(p) ** 2 + 0.01),
    "MAPE": lambda p, t: 1 / (np.abs(t) + 0.01),
    "SMAPE": lambda p, t: 1 / ((np.abs(t) + np.abs(p)) / 2 + 0.01),
}
LOSS_TERM = {
    "L1": lambda p, t: np.abs(p - t),
    "L2": lambda p, t: (p - t) ** 2,
    "RelativeL2": lambda p, t: (p - t) ** 2,
    "RelativeL2Luminance": lambda p, t: (p - t) ** 2,
    "MAPE": lambda p, t: np.abs(p - t),
    "SMAPE": lambda p, t: np.abs(p - t),
    # min over a of (d - a)^2 + 0.2 |a|: the smooth envelope of 0.2 |d| (Moreau), scaled as Instant-NGP does
    "Huber": lambda p, t: np.minimum(np.abs(p - t), 0.1) ** 2 + 0.2 * np.maximum(np.abs(p - t) - 0.1, 0.0),
    "CrossEntropy": lambda p, t: -t * np.log(p),
}


def loss(otype, p, t, p_of_scale=None):
    """Terms (rows, outputs) of a loss; `p_of_scale` freezes the prediction where no gradient flows."""
    scale = LOSS_SCALE.get(otype, lambda p, t: 1.0)
    return LOSS_TERM[otype](p, t) * scale(p if p_of_scale is None else p_of_scale, t)


def loss_gradient(otype, p, t):
    """Derivatives of the terms by their predictions, by central differences that keep away from kinks."""
    h = 1e-4 * np.minimum(np.abs(p - t), np.where(p == 0, np.inf, np.abs(p)))
    return (loss(otype, p + h, t, p) - loss(otype, p - h, t, p)) / (2 * h)


def forward(code, weights, activation, output_activation):
    """Pre-activations and values of every layer, the code first: lists of (rows, neurons)."""
    sums, values = [code], [np.float64(code)]
    for i, w in enumerate(weights):
        name = output_activation if i == len(weights) - 1 else activation
        sums.append(values[-1] @ np.float64(w))
        values.append(ACTIVATE[name](sums[-1]))
    return sums, values


def backward(sums, values, weights, activation, output_activation, dL_dy):
    """Gradients by the code and by each of the weights."""
    gradients, delta = [], dL_dy
    for i in reversed(range(len(weights))):
        name = output_activation if i == len(weights) - 1 else activation
        delta = delta * DERIVATIVE[name](sums[i + 1])
        gradients.insert(0, values[i].T @ delta)
        delta = delta @ np.float64(weights[i]).T
    return delta, gradients
