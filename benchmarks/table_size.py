"""Cost of a training step against the size of the hash tables, as one JSON object.

    python benchmarks/table_size.py [--log2-hashmap-sizes 14 19 22] [--batch 16384] [--rounds 7]

A 2D grid of 16 levels with 2 features, a 2x64 network, Adam with and without a moving average. Inputs are uniform
random, the worst case for the caches. The sizes take turns; figures are medians over all steps after warm-up. A step
costs what it touches, so it should hardly grow once the tables exceed the batch.
"""

import argparse
import json
import platform
import statistics
import time
from itertools import product

import numpy as np
import warp as wp

import nrc.launch
from nrc.field import Field
from nrc.trainer import Trainer

GRID = {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "base_resolution": 16, "per_level_scale": 1.5}
NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 64, "n_hidden_layers": 2}
ADAM = {"otype": "Adam", "learning_rate": 1e-2, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 1e-6}
N_BATCHES = 8  # different ones, so that steps do not find their entries in a cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-hashmap-sizes", type=int, nargs="+", default=[14, 19, 22])
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    wp.config.quiet = True
    device = nrc.launch.resolve_device(args.device)
    rng = np.random.default_rng(0)
    batches = [
        tuple(wp.array(rng.random((args.batch, n), dtype=np.float32), dtype=float, device=device) for n in (2, 3))
        for _ in range(N_BATCHES)
    ]
    trainers = {}
    for size, average in product(args.log2_hashmap_sizes, (False, True)):
        field = Field(2, 3, GRID | {"log2_hashmap_size": size}, NETWORK, device=device)
        optimizer = {"otype": "Ema", "decay": 0.95, "nested": ADAM} if average else ADAM
        trainers[size, average] = Trainer(field, {"otype": "L2"}, optimizer, batch_size=args.batch)
        nrc.launch.prepare(trainers[size, average].kernels(), device)
    seconds: dict[tuple[int, bool], list[float]] = {key: [] for key in trainers}
    for i in range(args.rounds + 1):
        for key, trainer in trainers.items():
            for x, y in batches:
                wp.synchronize()
                start = time.perf_counter()
                trainer.step(x, y)
                wp.synchronize()
                if i > 0:  # the first round warms up
                    seconds[key].append(time.perf_counter() - start)
    milliseconds = {
        name: {
            f"2^{size}": round(1e3 * statistics.median(seconds[size, average]), 2) for size in args.log2_hashmap_sizes
        }
        for name, average in (("adam_ms", False), ("adam_ema_ms", True))
    }
    machine = platform.processor() or platform.machine()
    about = {"batch": args.batch, "device": str(device), "threads": nrc.launch.threads(), "machine": machine}
    print(json.dumps(milliseconds | about | {"warp": wp.__version__}))


if __name__ == "__main__":
    main()
