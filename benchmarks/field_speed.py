"""Speed of the cache's field: samples per second of inference and of training steps, as one JSON object.

    python benchmarks/field_speed.py [--log2-hashmap-size 17] [--batch 8192] [--queries 50000] [--threads 0]

Inputs are uniform random, the worst case for the tables' caches. Figures are medians after warm-up.
"""

import argparse
import json
import platform
import statistics
import time

import numpy as np
import warp as wp

import nrc.launch
from nrc.field import Field
from nrc.trainer import Trainer

NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 64, "n_hidden_layers": 2}
ADAM = {"otype": "Adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15, "l2_reg": 1e-6}


def encoding(log2_hashmap_size: int) -> dict:
    """The radiance cache's 14 inputs: position, direction, normal, roughness, two albedos."""
    wrapped = {"otype": "OneBlob", "n_bins": 4, "n_dims_to_encode": 1}
    clamped = wrapped | {"wrap": False}
    grid = {"otype": "HashGrid", "n_dims_to_encode": 3, "log2_hashmap_size": log2_hashmap_size, "per_level_scale": 2.0}
    angles = [wrapped, clamped, wrapped, clamped]
    return {"otype": "Composite", "nested": [grid, *angles, clamped, {"otype": "Identity"}]}


def median_seconds(run, repeats: int = 15) -> float:
    """Median wall-clock seconds of `run`, after one call to warm up."""
    run()
    wp.synchronize()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        wp.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-hashmap-size", type=int, default=17)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--queries", type=int, default=50000)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    nrc.launch.set_threads(args.threads)
    device = nrc.launch.resolve_device(args.device)
    field = Field(14, 3, encoding(args.log2_hashmap_size), NETWORK, device=device)
    optimizer = {"otype": "Ema", "decay": 0.99, "nested": ADAM}
    trainer = Trainer(field, {"otype": "RelativeL2Luminance"}, optimizer, batch_size=args.batch)
    compile_seconds = nrc.launch.prepare({**field.kernels(), **trainer.kernels()}, device)
    rng = np.random.default_rng(0)

    def random(n: int, columns: int) -> wp.array:
        return wp.array(rng.random((n, columns), dtype=np.float32), dtype=float, device=device)

    x, out = random(args.queries, 14), random(args.queries, 3)
    batch_x, batch_y = random(args.batch, 14), random(args.batch, 3)
    infer = median_seconds(lambda: field.inference(x, out))
    step = median_seconds(lambda: trainer.step(batch_x, batch_y))
    result = {
        "inference_samples_per_second": round(args.queries / infer),
        "training_samples_per_second": round(args.batch / step),
        "ema_ms": round(1e3 * median_seconds(lambda: trainer.ema_params), 3),
        "compile_seconds": round(compile_seconds, 2),
        "n_params": field.n_params,
        "batch": args.batch,
        "queries": args.queries,
        "threads": nrc.launch.threads(),
        "device": str(device),
        "machine": platform.processor() or platform.machine(),
        "warp": wp.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
