"""NumPy twin of the optimizers, in double precision, sweeping over all parameters in every step."""

import numpy as np


class Twin:
    """Adam or SGD inside an exponentially decaying learning rate and a debiased moving average.

    Every parameter has its own step counter. Entries of tables, behind the first `n_matrix` parameters, stand still
    where their gradient is exactly zero; L2 regularisation acts on the first `n_matrix` alone.
    """

    def __init__(self, params, n_matrix, config):
        self.w = np.float64(params)
        self.matrix = np.arange(len(self.w)) < n_matrix
        self.decay, self.schedule, self.t, self.start = None, None, 0, 0
        while "nested" in config:
            if config["otype"] == "Ema":
                self.decay = config["decay"]
            else:
                self.schedule = config
            config = config["nested"]
        self.config = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "l2_reg": 1e-8, **config}
        self.m, self.v, self.n = np.zeros_like(self.w), np.zeros_like(self.w), np.zeros(len(self.w), int)
        self.average = self.w.copy()
        self.learning_rate = config["learning_rate"]

    def step(self, gradient):
        """Move along `gradient`, then advance the average: ((1 - a) W_t + a eta_{t-1} A_{t-1}) / eta_t."""
        c = self.config
        self.learning_rate = c["learning_rate"]
        if self.schedule and self.t >= self.schedule["decay_start"]:
            s = self.schedule
            times = (min(self.t, s["decay_end"]) - s["decay_start"]) // s["decay_interval"] + 1
            self.learning_rate *= s["decay_base"] ** times
        self.t += 1
        on = self.matrix | (gradient != 0)
        g = gradient[on] + np.where(self.matrix, c["l2_reg"] * self.w, 0)[on]
        if c["otype"] == "SGD":
            self.w[on] -= self.learning_rate * g
        else:
            self.n[on] += 1
            self.m[on] = c["beta1"] * self.m[on] + (1 - c["beta1"]) * g
            self.v[on] = c["beta2"] * self.v[on] + (1 - c["beta2"]) * g * g
            correction = np.sqrt(1 - c["beta2"] ** self.n[on]) / (1 - c["beta1"] ** self.n[on])
            self.w[on] -= self.learning_rate * correction * self.m[on] / (np.sqrt(self.v[on]) + c["epsilon"])
        if self.decay is None:
            self.average = self.w.copy()
        else:
            n = self.t - self.start
            before, now = 1 - self.decay ** (n - 1), 1 - self.decay**n
            self.average = ((1 - self.decay) * self.w + self.decay * before * self.average) / now

    def restart_average(self):
        """Count the steps from the next one on."""
        self.start, self.average = self.t, self.w.copy()
